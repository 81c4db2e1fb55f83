"""Spans from ``torch.profiler``, on real GPUs. ``timeline`` counts and draws them.

The profiler writes one list of events: on the host's threads the annotations (the ranges of
``record_function``) and the calls that launch work, on the GPUs the kernels and copies. A launch
and what it launched have the same ``correlation`` id, which is how a kernel finds its region.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from course_lib.spans import Span

# Optimizers and data loaders annotate as well: the prefix tells our regions from theirs.
REGION = "course_lib.region: "
BLOCK = "course_lib.trace"

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# The number that CUPTI, below the profiler, gives the default stream of a GPU.
_DEFAULT_STREAM = 7
# A profiler knows no FLOPs. Kernels of the libraries that compute matrix products have these words
# in their names.
_PRODUCT_NAMES = ("gemm", "gemv", "cutlass", "nvjet", "conv", "flash")


def annotate(region: str) -> record_function:
    """A context in which launched work belongs to ``region``."""
    # The profiler writes names into its JSON as they are: a quote or an umlaut would break it.
    return record_function(REGION + quote(region, safe=" "))


@contextmanager
def record_spans(spans: list[Span], devices: Sequence[torch.device]) -> Iterator[None]:
    """Add to ``spans``, after the block, what ``devices`` did in it; its start is second zero.

    Raises:
        RuntimeError: a profiler is running already, and PyTorch has one.
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError(
            "a trace of real GPUs cannot start inside another trace or torch.profiler: end that "
            "one first"
        )
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    try:
        with profiler, record_function(BLOCK):
            try:
                yield
            finally:
                for device in devices:
                    torch.cuda.synchronize(device)
    finally:
        used = {device.index for device in devices}
        for span in spans_from_profiler(_events(profiler)):
            if used & {span.device, *(span.route or ())}:
                spans.append(span)


def _events(profiler: profile) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def spans_from_profiler(events: list[dict]) -> list[Span]:
    """Spans from the events of a ``torch.profiler`` trace of CUDA devices.

    Args:
        events: Chrome trace events, times in microseconds; one is the annotation :data:`BLOCK`.
    """
    block = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == BLOCK)
    regions = _regions_of_launches(events, home=_thread(block))
    work = sorted((e for e in events if e.get("cat") in _WORK), key=lambda event: event["ts"])
    return [_span(event, block["ts"], regions) for event in work]


def _regions_of_launches(events: list[dict], home: tuple) -> dict[int, str]:
    """The region in which each launch was made, by its correlation id: the innermost one.

    Backward launches from threads of its own, while the thread that called it waits: a launch
    on a thread without regions belongs to that of ``home``, the thread of the trace.
    """
    regions: dict[int, str] = {}
    entered: dict[tuple, list[dict]] = defaultdict(list)
    calls = [e for e in events if e.get("cat") in ("user_annotation", *_LAUNCHES)]
    for event in sorted(calls, key=lambda event: event["ts"]):
        thread = _thread(event)
        if event["cat"] in _LAUNCHES:
            for stack in (entered[thread], entered[home]):
                while stack and stack[-1]["ts"] + stack[-1]["dur"] < event["ts"]:
                    stack.pop()
            stack = entered[thread] or entered[home]
            if stack:
                regions[event["args"]["correlation"]] = unquote(stack[-1]["name"][len(REGION) :])
        elif event["name"].startswith(REGION):
            entered[thread].append(event)
    return regions


def _thread(event: dict) -> tuple:
    return event["pid"], event["tid"]


def _span(event: dict, began: float, regions: dict[int, str]) -> Span:
    start = (event["ts"] - began) * 1e-6
    details = event["args"]
    name = event["name"]
    device = int(details.get("device", details.get("fromDevice", 0)))  # peer copies have no device
    is_product = any(word in name.lower() for word in _PRODUCT_NAMES)
    route = _route(event, device) if event["cat"] == "gpu_memcpy" else None
    return Span(
        name=name,
        device=device,
        start=start,
        end=start + event["dur"] * 1e-6,
        flops=1.0 if is_product else 0.0,
        bytes=int(details.get("bytes", 0)),
        route=route,
        region=regions.get(details.get("correlation"), ""),
        streams=_streams(details.get("stream"), route),
    )


def _route(event: dict, device: int) -> tuple[int | None, int | None] | None:
    """From where to where a copy went; ``None`` if it stayed on its device."""
    if "HtoD" in event["name"]:
        return None, device
    if "DtoH" in event["name"]:
        return device, None
    sender, receiver = (int(event["args"].get(end, device)) for end in ("fromDevice", "toDevice"))
    return (sender, receiver) if sender != receiver else None


def _streams(number: int | None, route: tuple[int | None, int | None] | None) -> tuple[str, ...]:
    name = "" if number in (None, _DEFAULT_STREAM) else f"stream {number}"
    # A copy between two GPUs runs on a stream of the sender, and the receiver's waits for it.
    return (name, "") if route and None not in route else (name,)
