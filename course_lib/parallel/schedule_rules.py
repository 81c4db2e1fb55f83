"""What a schedule of pipeline parallelism is, as data, and whether it can run.

For each device a schedule has the steps that it does, in order.
:mod:`course_lib.parallel.schedules` makes those of the papers, and you can write down others;
:mod:`course_lib.parallel.schedule_chart` times and draws any of them, and
:mod:`course_lib.parallel.pipeline` runs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Step:
    """What one stage does for one microbatch.

    Attributes:
        kind: ``"F"`` forward, ``"B"`` backward, or ``"W"``: the weights' gradients alone, in a
            schedule that splits the backward pass, where ``"B"`` is the input's gradient alone.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage} for microbatch {self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """Who does what, and in which order.

    Attributes:
        microbatches: how many parts the batch is cut into.
        placement: for each stage, the number of its device.
        steps: for each device, what it does, in order.
        splits_backward: whether ``"W"`` is a step of its own.
    """

    name: str
    microbatches: int
    placement: Sequence[int]
    steps: Sequence[Sequence[Step]]
    splits_backward: bool = False

    @property
    def kinds(self) -> str:
        """The kinds of steps that each stage does for each microbatch, in order."""
        return "FBW" if self.splits_backward else "FB"

    def needs(self, step: Step) -> list[Step]:
        """What must be done before ``step`` can begin."""
        stage, microbatch = step.stage, step.microbatch
        if step.kind == "F":
            return [Step("F", stage - 1, microbatch)] if stage else []
        if step.kind == "W":
            return [Step("B", stage, microbatch)]
        following = [Step("B", stage + 1, microbatch)] if stage + 1 < len(self.placement) else []
        return [Step("F", stage, microbatch), *following]


def in_order(schedule: Schedule) -> Iterator[tuple[int, Step]]:
    """Every ``(device, step)``, each after all that it needs, with the devices taking turns.

    Raises:
        ValueError: a deadlock: there are steps left, and each waits for another.
    """
    waiting = [deque(steps) for steps in schedule.steps]
    done: set[Step] = set()

    def lacking(device: int) -> list[Step]:
        return [need for need in schedule.needs(waiting[device][0]) if need not in done]

    while left := [device for device, steps in enumerate(waiting) if steps]:
        ready = [device for device in left if not lacking(device)]
        if not ready:
            reasons = [f"on device {d} {waiting[d][0]} waits for {lacking(d)[0]}" for d in left]
            raise ValueError(f"deadlock: {'; '.join(reasons)}")
        for device in ready:
            step = waiting[device].popleft()
            done.add(step)
            yield device, step


def check(schedule: Schedule, most_held: int | None = None) -> None:
    """Raise an error that says why ``schedule`` is illegal, if it is.

    Args:
        most_held: how many activations fit on a device; not checked if not given.

    Raises:
        TypeError: it is no :class:`Schedule`.
        ValueError: a stage is on a device that has no list of steps; a device has a step of
            another device's stage, or one that no stage has; a step is missing or is there twice;
            a device has a step before one that it needs; the devices wait for each other for ever;
            or one of them holds too many activations.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"this takes a Schedule, such as gpipe(2, 4), not {schedule!r:.60}")
    stages, microbatches = range(len(schedule.placement)), range(schedule.microbatches)
    for stage, device in enumerate(schedule.placement):
        if device not in range(len(schedule.steps)):
            raise ValueError(
                f"stage {stage} is on device {device}, and there are steps for devices 0 to "
                f"{len(schedule.steps) - 1}"
            )
    wanted = {Step(kind, s, i): 0 for i in microbatches for s in stages for kind in schedule.kinds}
    for device, steps in enumerate(schedule.steps):
        for step in steps:
            if step not in wanted:
                raise ValueError(f"device {device} has {step}, and there is no such step")
            home = schedule.placement[step.stage]
            if home != device:
                raise ValueError(f"device {device} has {step}, and that stage is on device {home}")
            wanted[step] += 1
    for step, times in wanted.items():
        if times != 1:
            wrong = f"is there {times} times" if times else "is missing"
            raise ValueError(f"{step} {wrong}, on device {schedule.placement[step.stage]}")
    for device, steps in enumerate(schedule.steps):
        later = set(steps)
        for step in steps:
            later.remove(step)
            for need in later.intersection(schedule.needs(step)):
                raise ValueError(f"device {device} has {step} before {need}, which it needs")
    for _ in in_order(schedule):  # which raises an error at a deadlock
        pass
    for device, count in enumerate(held(schedule)):
        if most_held is not None and count > most_held:
            raise ValueError(
                f"device {device} holds {count} activations at once, more than {most_held}"
            )


def held(schedule: Schedule) -> list[int]:
    """The most activations that each device holds at once.

    One is what a stage keeps of one microbatch from its forward to the end of its backward.
    """
    change = {"F": 1, schedule.kinds[-1]: -1}
    return [
        max(accumulate(change.get(step.kind, 0) for step in steps), default=0)
        for steps in schedule.steps
    ]
