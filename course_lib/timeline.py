"""What ran where and when, which bytes moved, how much memory was held, and pictures of it.

    with course_lib.trace() as t:
        train_step()
    t.plot()

On virtual GPUs the times are simulated; on real ones the same object is filled from
``torch.profiler``, and they are measured.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from course_lib import hardware, style
from course_lib.virtual.clock import Span
from course_lib.virtual.machine import DEVICE_TYPE, machine

LOOKS = {
    "matmul": {"facecolor": style.BLUE, "edgecolor": "white"},
    "other": {"facecolor": style.SKY, "edgecolor": "white"},
    "copy": {"facecolor": style.ORANGE, "edgecolor": "white", "hatch": "////"},
}
KIND_NAMES = {"matmul": "matrix products", "other": "other operations", "copy": "copies"}


@dataclass
class Trace:
    """A recording of what the devices did.

    Attributes:
        device_type: ``"vgpu"`` or ``"cuda"``.
        device_count: how many devices there were.
        spans: every operation and copy in the order they were enqueued; seconds since the start.
        memory: for each device, ``(seconds, bytes in use)`` at each change, the seconds being
            those at which the device gets there (virtual GPUs only).
        peak_memory: for each device, the most bytes in use.
        seconds: from the start until every device had finished.
    """

    device_type: str
    device_count: int
    spans: list[Span] = field(default_factory=list)
    memory: list[list[tuple[float, int]]] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def simulated(self) -> bool:
        """Whether the times were computed and not measured."""
        return self.device_type == DEVICE_TYPE

    @property
    def bytes_moved(self) -> dict[tuple[str, str], int]:
        """Bytes copied for each ``(source, destination)``, as in ``("vgpu:0", "vgpu:1")``."""
        total: dict[tuple[str, str], int] = defaultdict(int)
        for span in self.spans:
            if span.route is not None:
                source, destination = span.route
                total[self._name(source), self._name(destination)] += span.bytes
        return dict(total)

    @property
    def bytes_between_devices(self) -> int:
        """Bytes copied from one device to another; copies from and to the host left out."""
        return sum(span.bytes for span in self.spans if span.route and None not in span.route)

    def busy_seconds(self, index: int) -> float:
        """Seconds in which device ``index`` computed or copied."""
        busy = done = 0.0
        for span in sorted(self.spans, key=lambda span: span.start):
            if index in _rows(span):  # on a real GPU, spans of one device can overlap
                busy += max(0.0, span.end - max(span.start, done))
                done = max(done, span.end)
        return busy

    def idle_fraction(self, index: int) -> float:
        """The part of the whole time in which device ``index`` did nothing, from 0 to 1."""
        return 1 - self.busy_seconds(index) / self.seconds if self.seconds else 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of all matrix products (virtual GPUs only)."""
        return sum(span.flops for span in self.spans)

    def seconds_by_kind(self, region: str | None = None) -> dict[str, float]:
        """Device seconds of ``"matmul"``, ``"other"`` and ``"copy"``, in one region or in all."""
        total = dict.fromkeys(LOOKS, 0.0)
        for span in self.spans:
            if region is None or span.region == region:
                total[span.kind] += span.end - span.start
        return total

    def plot(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the timeline: one row a device, a copy on the rows of both of its ends.

        Devices that did nothing are left out.
        """
        devices = sorted({index for span in self.spans for index in _rows(span)} - {None})
        ax = ax or style.figure(height=1.6 + 0.4 * len(devices))[1]
        unit, scale = _unit(self.seconds)
        for kind, look in LOOKS.items():
            spans = [span for span in self.spans if span.kind == kind]
            for row, index in enumerate(devices):
                bars = [
                    (span.start * scale, (span.end - span.start) * scale)
                    for span in spans
                    if index in _rows(span)
                ]
                edge = 0.5 if len(self.spans) < 200 else 0  # too many edges would hide the bars
                ax.broken_barh(bars, (row - 0.36, 0.72), linewidth=edge, **look)
        ax.set_yticks(range(len(devices)), [self._name(index) for index in devices])
        ax.set_ylim(len(devices) - 0.4, -0.6)
        ax.set_xlim(0, max(self.seconds * scale, 1e-12))
        ax.set_xlabel(unit)
        ax.set_title(f"{title or 'Timeline'} ({self._provenance})")
        if not ax.figure.legends:
            handles = [Patch(label=KIND_NAMES[kind], **look) for kind, look in LOOKS.items()]
            ax.figure.legend(handles=handles, loc="outside lower right", ncols=3)
        return ax

    def plot_memory(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the bytes in use on each device, as the device goes through its work."""
        ax = ax or style.figure()[1]
        unit, scale = _unit(self.seconds)
        for index, events in enumerate(self.memory):
            times = [seconds * scale for seconds, _ in events]
            megabytes = [nbytes / 1e6 for _, nbytes in events]
            ax.step(times, megabytes, where="post", label=self._name(index))
        ax.set_xlabel(unit)
        ax.set_ylabel("MB in use")
        ax.set_ylim(bottom=0)
        ax.set_title(f"{title or 'Memory'} ({self._provenance})")
        if self.device_count > 1:
            ax.legend(ncols=2)
        return ax

    @property
    def _provenance(self) -> str:
        return "simulated" if self.simulated else "measured"

    def _name(self, index: int | None) -> str:
        return "host" if index is None else f"{self.device_type}:{index}"

    def __repr__(self) -> str:
        return (
            f"<trace of {self.device_count} device(s): {len(self.spans)} spans, "
            f"{self.seconds * 1e3:.3f} ms {self._provenance}>"
        )


def _rows(span: Span) -> tuple[int | None, ...]:
    """The devices that a span keeps busy."""
    return (span.device,) if span.route is None else span.route


def _unit(seconds: float) -> tuple[str, float]:
    """A readable unit for a duration, and how many of it a second has."""
    for unit, scale in (("seconds", 1.0), ("milliseconds", 1e3)):
        if seconds * scale >= 1:
            return unit, scale
    return "microseconds", 1e6


@contextmanager
def trace() -> Iterator[Trace]:
    """Record what the GPUs do in the block; the recording is complete when the block ends."""
    gc.collect()  # peak memory must not depend on when Python last looked for garbage
    hardware.synchronize()
    recording = _trace_virtual() if machine.device_count else _trace_real()
    with recording as result:
        yield result


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name what the program is doing, as in ``with course_lib.region("forward"):``."""
    clock = machine.clock
    outer, clock.region = clock.region, name
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        clock.region = outer


@contextmanager
def _trace_virtual() -> Iterator[Trace]:
    clock, count = machine.clock, machine.device_count
    result = Trace(DEVICE_TYPE, count)
    began = clock.host

    def add_span(span: Span) -> None:
        span.start -= began
        span.end -= began
        result.spans.append(span)

    def watch(index: int, events: list[tuple[float, int]]) -> Callable[[int], None]:
        def add_event(nbytes: int) -> None:
            # The host reserves memory when it enqueues an operation, often long before the
            # device gets there. Drawn at the host's time, all would stand at the left edge.
            events.append((max(clock.host, clock.free_at[index]) - began, nbytes))

        return add_event

    listeners = []
    for index, memory in enumerate(machine.memories[:count]):
        events = [(0.0, memory.in_use)]
        listeners.append(watch(index, events))
        memory.listeners.append(listeners[-1])
        result.memory.append(events)
    clock.listeners.append(add_span)
    try:
        yield result
    finally:
        machine.synchronize()
        clock.listeners.remove(add_span)
        for memory, listener in zip(machine.memories, listeners, strict=False):
            memory.listeners.remove(listener)
        result.seconds = clock.host - began
        for events in result.memory:
            events.append((result.seconds, events[-1][1]))
            result.peak_memory.append(max(nbytes for _, nbytes in events))


@contextmanager
def _trace_real() -> Iterator[Trace]:
    count = torch.cuda.device_count()
    result = Trace("cuda", count)
    for index in range(count):
        torch.cuda.reset_peak_memory_stats(index)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield result
        hardware.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        result.spans = spans_from_profiler(json.loads(path.read_text())["traceEvents"])
    result.seconds = max((span.end for span in result.spans), default=0.0)
    result.peak_memory = [torch.cuda.max_memory_allocated(index) for index in range(count)]


def spans_from_profiler(events: list[dict]) -> list[Span]:
    """Spans from the events of a ``torch.profiler`` trace of CUDA devices.

    A kernel counts as a matrix product by its name, since a profiler knows no FLOPs: the
    libraries that compute them use the words in ``_PRODUCT_NAMES``.
    """
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        return []
    began = min(event["ts"] for event in work)
    return [_span_from_event(event, began) for event in sorted(work, key=lambda e: e["ts"])]


_PRODUCT_NAMES = ("gemm", "gemv", "cutlass", "nvjet", "conv", "flash")


def _span_from_event(event: dict, began: float) -> Span:
    start = (event["ts"] - began) * 1e-6
    details = event.get("args", {})
    name = event["name"]
    device = int(details.get("device", details.get("fromDevice", 0)))  # peer copies have no device
    route = None
    if event["cat"] == "gpu_memcpy":
        sender = int(details.get("fromDevice", device))
        receiver = int(details.get("toDevice", device))
        if "HtoD" in name:
            route = (None, device)
        elif "DtoH" in name:
            route = (device, None)
        elif sender != receiver:
            route = (sender, receiver)
    is_product = any(word in name.lower() for word in _PRODUCT_NAMES)
    return Span(
        name=name,
        device=device,
        start=start,
        end=start + event["dur"] * 1e-6,
        flops=1.0 if is_product else 0.0,
        bytes=int(details.get("bytes", 0)),
        route=route,
    )
