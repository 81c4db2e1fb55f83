"""What one training step takes by each method: time, memory, bytes, and what devices wait for.

What lesson 09 measures with. The methods are in :mod:`course_lib.parallel.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from course_lib import hardware, timeline
from course_lib.models import GPT
from course_lib.parallel.kinds import Devices
from course_lib.parallel.methods import METHODS


@dataclass(frozen=True)
class Measurement:
    """What one step took.

    Attributes:
        seconds: simulated.
        peak: the most bytes in use on any device.
        between_steps: the most bytes in use on any device after the step: parameters and
            optimizer state, and the gradients where they stay.
        sent: the most bytes that any device sent to others.
        exposed: of the step, the part in which a device sends or receives and computes nothing,
            from 0 to 1: the mean over the devices.
        idle: likewise, the part in which it does neither.
    """

    seconds: float
    peak: int
    between_steps: int
    sent: int
    exposed: float
    idle: float


def measure(step: Callable[[], object], devices: Devices) -> Measurement:
    """Run ``step`` once, and measure it.

    Args:
        step: its optimizer has its state, as :func:`course_lib.parallel.methods.adamw` makes it.
            Otherwise the first step is not like the others.
    """
    with timeline.trace() as t:
        step()
    sent = max(t.bytes_sent(device) for device in devices)
    ends = [history[-1][1] for history in t.memory]
    shares = [_exposed_and_idle(t, device.index) for device in devices]
    exposed, idle = (sum(values) / len(devices) for values in zip(*shares, strict=True))
    return Measurement(t.seconds, max(t.peak_memory), max(ends), sent, exposed, idle)


def _exposed_and_idle(t: timeline.Trace, index: int) -> tuple[float, float]:
    """Parts of a recording: a device copies alone, and a device does nothing."""
    own = [span for span in t.spans if index in span.devices]
    busy = _covered([(span.start, span.end) for span in own])
    computing = _covered([(span.start, span.end) for span in own if span.route is None])
    return (busy - computing) / t.seconds, 1 - busy / t.seconds


def _covered(stretches: list[tuple[float, float]]) -> float:
    """How many seconds are in at least one of some stretches of time."""
    seconds = done = 0.0
    for start, end in sorted(stretches):
        seconds += max(0.0, end - max(start, done))
        done = max(done, end)
    return seconds


def compare(
    gpt: GPT,
    batch: int,
    length: int,
    count: int,
    spec: hardware.Spec,
    names: Iterable[str],
    accumulations: int = 1,
    backing: str = "cpu",
) -> dict[str, Measurement | None]:
    """Measure some methods on ``count`` virtual devices of their own each.

    Args:
        batch, length: sequences in a step, and tokens in each.
        names: of :data:`METHODS`.
        accumulations: in how many pieces a batch is computed, one after the other, if it has as
            many sequences for each device (or, where devices share every layer, for all).
        backing: as :func:`hardware.devices` takes it.

    Returns:
        A measurement for each name; ``None`` if the model did not fit.

    Raises:
        ValueError: there is no such method.
    """
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}: there are {list(METHODS)}")
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    results: dict[str, Measurement | None] = {}
    for name in names:
        with hardware.fresh_devices(count, spec, backing) as devices:
            try:
                step = METHODS[name](gpt, devices, tokens, tokens, accumulations)
                results[name] = measure(step, devices)
            except torch.OutOfMemoryError:
                results[name] = None
    return results


def largest(fits: Callable[[int], bool], sizes: Sequence[int]) -> int | None:
    """The largest of some rising sizes that fits, found by halving; ``None`` if none does.

    Args:
        fits: whether a size does; if one does, so do all that are smaller.
    """
    fitting, too_large = -1, len(sizes)
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(sizes[middle]):
            fitting = middle
        else:
            too_large = middle
    return sizes[fitting] if fitting >= 0 else None
