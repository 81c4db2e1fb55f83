"""A GPU with round numbers, so that every time in a test can be worked out in the head."""

from __future__ import annotations

import pytest
import torch

import course_lib
from course_lib import Spec
from course_lib.spans import Span

SPEC = Spec(
    name="test GPU",
    flops={torch.float32: 1e9, torch.bfloat16: 4e9},
    memory=1e9,
    memory_bandwidth=1e8,
    link_bandwidth=1e7,
    host_bandwidth=5e6,
    source="made up",
    latency=1e-3,
    launch_overhead=1e-5,
)
LAUNCH, LATENCY = SPEC.launch_overhead, SPEC.latency


def seconds(expected: float) -> object:
    """Equal, apart from the rounding of a few additions."""
    return pytest.approx(expected, rel=1e-9)


def spans_of(program) -> list[Span]:
    with course_lib.trace() as recording:
        program()
    return recording.spans
