"""A trace in the Chrome trace format, which Perfetto and ``chrome://tracing`` open.

One process a device, one thread a stream, one event a span; a copy between devices stands in both.
The format is described in "Trace Event Format" (Google, 2016). Its times are in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.spans import Span

if TYPE_CHECKING:
    from course_lib.timeline.recording import Trace

Event = dict[str, Any]


def save(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` to a file, whose name should end in ``.json``."""
    content = {
        "traceEvents": events_of(trace),
        "displayTimeUnit": "ms",
        "otherData": {"times": trace.provenance},
    }
    Path(path).write_text(json.dumps(content))


def events_of(trace: Trace) -> list[Event]:
    """Names of devices and streams, then spans, then the bytes in use on each device."""
    lanes: dict[tuple[int, str], int] = {}  # each stream of a device, by number
    spans = []
    for span in trace.spans:
        for device, stream in _places(span):
            lane = lanes.setdefault((device, stream), sum(each[0] == device for each in lanes))
            spans.append(_event_of(trace, span, device, lane))
    return [*_names(trace, lanes), *spans, *_memory(trace)]


def _places(span: Span) -> list[tuple[int, str]]:
    """The devices that the span keeps busy, with the stream of each."""
    devices = [device for device in span.devices if device is not None]
    return list(zip(devices, span.streams, strict=False))


def _event_of(trace: Trace, span: Span, device: int, lane: int) -> Event:
    arguments: Event = {"bytes": span.bytes}
    if span.flops:
        arguments["FLOPs"] = span.flops
    if span.region:
        arguments["region"] = span.region
    if span.route is not None:
        arguments["from"], arguments["to"] = (trace.name_of(end) for end in span.route)
    return {
        "name": span.name,
        "cat": span.kind,
        "ph": "X",
        "pid": device,
        "tid": lane,
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "args": arguments,
    }


def _names(trace: Trace, lanes: dict[tuple[int, str], int]) -> list[Event]:
    names = [
        _metadata("process_name", device, 0, f"{trace.name_of(device)} ({trace.provenance})")
        for device in range(trace.device_count)
    ]
    for (device, stream), lane in lanes.items():
        names.append(_metadata("thread_name", device, lane, stream or "default stream"))
    return names


def _metadata(what: str, device: int, lane: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": device, "tid": lane, "args": {"name": name}}


def _memory(trace: Trace) -> list[Event]:
    return [
        {
            "name": "bytes in use",
            "ph": "C",
            "pid": device,
            "ts": seconds * 1e6,
            "args": {"bytes": nbytes},
        }
        for device, history in enumerate(trace.memory)
        for seconds, nbytes in zip(history.seconds, history.nbytes, strict=True)
    ]
