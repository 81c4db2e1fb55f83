"""The doctor: your own data-parallel training step, beside training on one device.

Training that is wrong in parallel raises no error, and its loss goes down. Four instruments see
most of it, and here they are read after every step: the comparison of replicas with each other, the
comparison with one device, the waits that are missing between streams, and the bytes on the links.

    def prepare(model, gpus):
        replicas = replicate(model, gpus)
        optimizers = [torch.optim.AdamW(each.parameters()) for each in replicas]
        def step(x, y):
            train_step(replicas, optimizers, split_batch(x, gpus), split_batch(y, gpus), loss)
        return replicas, step

    print(doctor.examine(model, prepare, batches, loss, torch.optim.AdamW, gpus))

A finding is a reading, and not yet a cause; but it says where to look first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.parallel.kinds import Devices, Loss
from course_lib.timeline import Trace, trace

Step = Callable[[Tensor, Tensor], object]
Prepare = Callable[[nn.Module, Devices], tuple[Sequence[nn.Module], Step]]

# How far a parameter may be from where it should be, as a part of the way that it has gone. Sums in
# another order put a GPT that AdamW trains off by less than a tenth of this (tests/test_doctor.py).
TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """One reading that is not as it should be, the first of its kind.

    Attributes:
        step: after which step it was read, from 1.
        instrument: which one was read.
        reading: what it said.
    """

    step: int
    instrument: str
    reading: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.instrument}: {self.reading}"


@dataclass
class Report:
    """What the instruments said.

    Attributes:
        steps: how many steps were watched.
        findings: what was not right, in the order in which it came up.
        traces: a recording of each step, for a closer look.
    """

    steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        if self.is_healthy:
            return f"{self.steps} step(s): the same training as on one device, as far as seen."
        return "\n".join(str(finding) for finding in self.findings)

    def _note(self, instrument: str, reading: str | None) -> None:
        """Add a finding, if it is one and the first of its instrument."""
        known = any(finding.instrument == instrument for finding in self.findings)
        if reading is not None and not known:
            self.findings.append(Finding(self.steps, instrument, reading))


def examine(
    model: nn.Module,
    prepare: Prepare,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_function: Loss,
    make_optimizer: Callable[[Iterable[Tensor]], Optimizer],
    gpus: Devices,
) -> Report:
    """Train with your step and, beside it, on the host alone, and compare after every batch.

    Args:
        model: on the host; it stays as it is. Dropout draws other numbers there: take it out.
        prepare: makes of a model and devices the replicas, and a function that trains them on a
            batch.
        batches: pairs of inputs and targets, on the host. Two or three are enough for most.
        loss_function: the mean loss, as one device would use it on the whole batch.
        make_optimizer: as one device would use it.
        gpus: virtual or real.

    Raises:
        ValueError: ``prepare`` made no replicas, or of another model; or there are no batches.
    """
    reference = deepcopy(model)
    optimizer = make_optimizer(reference.parameters())
    replicas, step = prepare(deepcopy(model), gpus)
    names = [name for name, _ in model.named_parameters()]
    if not replicas or [name for name, _ in replicas[0].named_parameters()] != names:
        raise ValueError("prepare(model, gpus) returns the replicas of that model, and a step")
    report = Report()
    for x, y in batches:
        report.steps += 1
        with trace() as recording:
            step(x, y)
        report.traces.append(recording)
        optimizer.zero_grad()
        loss_function(reference(x), y).backward()
        optimizer.step()
        states = [_numbers(replica) for replica in replicas]
        start, right = _numbers(model), _numbers(reference)
        report._note("replica against replica", _between_replicas(states, start))
        report._note("against one device", _against_one(states[0], right, start))
        report._note("waits", str(recording.hazards[0]) if recording.hazards else None)
        report._note("bytes", _bytes(recording, len(replicas)))
    if not report.steps:
        raise ValueError("there are no batches to train on")
    return report


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes, on the host: parameters first, then buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().cpu().clone() for name, tensor in named}


def _between_replicas(states: list[dict[str, Tensor]], start: dict[str, Tensor]) -> str | None:
    for name, first in states[0].items():
        for rank, state in enumerate(states[1:], 1):
            off = _off(state[name], first, start[name])
            if off > TOLERANCE:
                return f"{name} of rank {rank} is not rank 0's: {_in_words(off)}"
    return None


def _against_one(
    state: dict[str, Tensor], right: dict[str, Tensor], start: dict[str, Tensor]
) -> str | None:
    wrong = {name: _off(state[name], right[name], start[name]) for name in right}
    wrong = {name: off for name, off in wrong.items() if off > TOLERANCE}
    if not wrong:
        return None
    name, off = next(iter(wrong.items()))
    worst = max(wrong, key=lambda name: wrong[name])
    return (
        f"{len(wrong)} of {len(right)} tensors are not one device's, the first of them {name}: "
        f"{_in_words(off)}; the worst {worst}: {_in_words(wrong[worst])}"
    )


def _off(here: Tensor, there: Tensor, start: Tensor) -> float:
    """How far two tensors are apart, as a part of the way that the second one has gone."""
    if here.shape != there.shape:
        return float("inf")
    here, there, start = here.double(), there.double(), start.double()
    apart, way = (here - there).norm(), (there - start).norm()
    if not torch.isfinite(apart):
        return float("inf")
    return (apart / way.clamp_min(1e-9)).item()


def _in_words(off: float) -> str:
    if off == float("inf"):
        return "not a number, or of another shape"
    return f"off by {off:.2g} of the way it has gone"


def _bytes(recording: Trace, count: int) -> str | None:
    if count > 1 and not recording.bytes_between_devices:
        return "nothing was sent from device to device: each replica trains by itself"
    return None
