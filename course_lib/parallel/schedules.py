"""Schedules of pipeline parallelism, each named after its paper.

In the formulas, p devices work on m microbatches, with v stages a device. The bubble is the part of
the devices' time in which they are idle, with equal stages and free communication. Where a transfer
takes c, no more than half a forward, a step of training takes longer by the price.

The first three differ in one number: the forwards before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from course_lib.parallel.schedule_rules import Schedule, Step


def naive(device_count: int, microbatches: int = 1) -> Schedule:
    """One microbatch after the other goes through the whole model: one device works at a time.

    With one microbatch it is lesson 04's training step; with more, gradient accumulation.
    Bubble: (p - 1) / p, however many microbatches there are. Price: 2 m (p - 1) c. A device holds
    1 activation.
    """
    return _one_stage_a_device("naive", device_count, microbatches, lambda device: 0)


def gpipe(device_count: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang and others, "GPipe", 2019).

    Bubble: (p - 1) / (m + p - 1). Price: 2 (p - 1) c. A device holds m activations.
    """
    return _one_stage_a_device("GPipe", device_count, microbatches, lambda device: microbatches)


def one_f_one_b(device_count: int, microbatches: int) -> Schedule:
    """A backward as early as possible, then one forward and one backward by turns: 1F1B.

    PipeDream-Flush (Narayanan and others, "Memory-Efficient Pipeline-Parallel DNN Training",
    2021). Bubble: (p - 1) / (m + p - 1), as GPipe's. Device i holds min(m, p - i) activations, and
    waits for one to come back before it begins another. So every p microbatches pay the price
    anew: 2 (p - 1) c m / p + 2 (p - 2) c, where p is above 1 and divides m.
    """
    last = device_count - 1
    return _one_stage_a_device("1F1B", device_count, microbatches, lambda device: last - device)


def interleaved(device_count: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with ``chunks`` stages a device, each a v-th as long: stage s is on device s mod p.

    Narayanan and others, "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", 2021. Bubble: (p - 1) / (v m + p - 1). Price: 2 (v p - 1) c if p is above 1,
    however many microbatches: devices begin earlier than they must. The first one holds the most,
    up to (v + 1) p - 1 activations of these shorter stages.

    Raises:
        ValueError: the microbatches are not a multiple of the devices.
    """
    _require_counts(device_count=device_count, microbatches=microbatches, chunks=chunks)
    if microbatches % device_count:
        raise ValueError(
            f"interleaved() takes microbatches in groups of one a device: {microbatches} is no "
            f"multiple of {device_count} devices"
        )
    lists = []
    for device in range(device_count):
        forwards, backwards = [], []
        for turn in range(microbatches * chunks):
            # A group of p microbatches goes through the first chunk, then through the next one.
            group, rest = divmod(turn, device_count * chunks)
            chunk, place = divmod(rest, device_count)
            microbatch = group * device_count + place
            forwards.append(Step("F", chunk * device_count + device, microbatch))
            last_first = (chunks - 1 - chunk) * device_count + device
            backwards.append(Step("B", last_first, microbatch))
        warm_up = 2 * (device_count - 1 - device) + (chunks - 1) * device_count
        lists.append(_by_turns(forwards, backwards, warm_up))
    placement = list(range(device_count)) * chunks
    return Schedule(f"interleaved 1F1B, v = {chunks}", microbatches, placement, lists)


def zero_bubble(device_count: int, microbatches: int) -> Schedule:
    """1F1B whose backward is split: device i puts its weight gradients off by i microbatches.

    ZB-H1 of Qi and others, "Zero Bubble Pipeline Parallelism", 2023. Every device is idle for
    (p - 1) (F + B - W), the times of the three steps, of which W must be the shortest: with equal
    ones the bubble is (p - 1) / (3 m + p - 1). That takes m >= p; below, add (p - m) W. Price: at
    most 4 (p - 1) c. Every device holds min(m, p) activations, each from its F to its W; between
    B and W that is the input and the output's gradient of each linear layer.
    """
    lists = []
    for device, plain in enumerate(one_f_one_b(device_count, microbatches).steps):
        steps: list[Step] = []
        for step in plain:
            steps.append(step)
            if step.kind == "B" and step.microbatch >= device:
                steps.append(Step("W", device, step.microbatch - device))
        first_left = max(0, microbatches - device)
        steps += [Step("W", device, late) for late in range(first_left, microbatches)]
        lists.append(steps)
    return Schedule("zero bubble", microbatches, list(range(device_count)), lists, True)


def _one_stage_a_device(
    name: str, device_count: int, microbatches: int, warm_up: Callable[[int], int]
) -> Schedule:
    """Each device with one stage, and ``warm_up(device)`` forwards before its first backward."""
    _require_counts(device_count=device_count, microbatches=microbatches)
    lists = []
    for device in range(device_count):
        forwards, backwards = (
            [Step(kind, device, microbatch) for microbatch in range(microbatches)] for kind in "FB"
        )
        lists.append(_by_turns(forwards, backwards, warm_up(device)))
    return Schedule(name, microbatches, list(range(device_count)), lists)


def _by_turns(forwards: list[Step], backwards: list[Step], warm_up: int) -> list[Step]:
    """``warm_up`` forwards, then one forward and one backward by turns, then what is left."""
    pairs = zip_longest(forwards[warm_up:], backwards)
    return forwards[:warm_up] + [step for pair in pairs for step in pair if step]


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"a schedule takes a whole number of {name}, 1 or above: {count!r}")
