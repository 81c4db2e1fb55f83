"""A saved trace has every span, where and when it ran."""

from __future__ import annotations

import json

import torch

import course_lib


def test_a_saved_trace_has_every_span_with_its_bytes(gpus, tmp_path):
    with course_lib.trace() as trace:
        x = torch.ones(4, 4, device=gpus[0])
        side = course_lib.side_stream(gpus[0])
        side.wait_stream(course_lib.current_stream(gpus[0]))
        with side, course_lib.region("product"):
            y = x @ x
        course_lib.current_stream(gpus[0]).wait_stream(side)
        y.to(gpus[1])
    trace.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    events = saved["traceEvents"]
    assert saved["otherData"] == {"times": "simulated"}

    spans = {(each["name"], each["pid"]): each for each in events if each["ph"] == "X"}
    product, sent, received = spans["mm", 0], spans["copy", 0], spans["copy", 1]
    (span,) = [each for each in trace.spans if each.name == "mm"]
    assert product["ts"] == span.start * 1e6
    assert product["dur"] == (span.end - span.start) * 1e6
    assert product["args"] == {"bytes": span.bytes, "FLOPs": 128, "region": "product"}
    assert sent["args"] == received["args"] == {"bytes": 64, "from": "vgpu:0", "to": "vgpu:1"}

    names = {
        (each["name"], each["pid"], each["tid"]): each["args"]["name"]
        for each in events
        if each["ph"] == "M"
    }
    assert names["process_name", 0, 0] == "vgpu:0 (simulated)"
    assert names["thread_name", 0, product["tid"]] == "stream 1"
    assert names["thread_name", 0, sent["tid"]] == "default stream"
    peaks = [each["args"]["bytes"] for each in events if each["ph"] == "C" and each["pid"] == 0]
    assert max(peaks) == trace.peak_memory[0]
