"""The doctor: your own data-parallel training step, beside training on one device.

Training that is wrong in parallel raises no error, and its loss goes down. No single instrument
sees everything that can be wrong; here twelve of them are read after every step::

    def prepare(model, gpus):
        replicas = replicate(model, gpus)
        optimizers = [torch.optim.AdamW(each.parameters()) for each in replicas]
        def step(x, y):
            train_step(replicas, optimizers, split_batch(x, gpus), split_batch(y, gpus), loss)
        return replicas, step

    print(doctor.examine(model, prepare, batches, loss, torch.optim.AdamW, gpus))

What is off by less than a hundredth of the way that a parameter has gone counts as rounding: a
forgotten weight decay, after four steps, is less. A finding is a reading, and not yet a cause; but
it says where to look first. Lesson 15 goes from readings to causes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from course_lib.doctor.instruments import INSTRUMENTS
from course_lib.doctor.watching import (
    Alone,
    MakeOptimizer,
    Prepare,
    Run,
    State,
    TrainingStep,
    watch,
)
from course_lib.parallel.collectives import all_reduce_bytes
from course_lib.parallel.inputs import require_devices
from course_lib.parallel.kinds import Devices, Loss
from course_lib.timeline import Trace


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
        run: what was there after each step, for a closer look.
        findings: what was not right, in the order in which it came up.
    """

    run: Run
    findings: list[Finding] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps were watched."""
        return len(self.run.moments)

    @property
    def traces(self) -> list[Trace]:
        """A recording of each step."""
        return [moment.recording for moment in self.run.moments]

    @property
    def losses(self) -> list[float]:
        """What the steps returned, where that was a number."""
        return [moment.loss for moment in self.run.moments if moment.loss is not None]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        if not self.is_healthy:
            return "\n".join(str(finding) for finding in self.findings)
        if self.run.now.alone is None:
            return f"{self.steps} step(s): nothing found, and no comparison with one device."
        return f"{self.steps} step(s): the same training as on one device, as far as seen."

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
    make_optimizer: MakeOptimizer,
    gpus: Devices,
    *,
    alone: Callable[[nn.Module], TrainingStep] | None = None,
    shuffles: bool = False,
    bytes_a_step: int | None = None,
) -> Report:
    """Train with your step and, beside it, on the host alone, and compare after every batch.

    Args:
        model: on the host; it stays as it is. Where it draws random numbers, as dropout does, one
            device draws others than yours, and no parameters are compared with its: take dropout
            out for that.
        prepare: makes of a model and devices the replicas, and a function that trains them on a
            batch. A model that is spread over the devices is one replica. A number that the step
            returns is compared with one device's mean loss; several, a list, are its parts.
        batches: pairs of inputs and targets, on the host; your step is given copies. Four are
            enough for most, and what grows in memory is not seen in fewer.
        loss_function: the mean loss, as one device would use it on the whole batch.
        make_optimizer: as one device would use it.
        gpus: virtual or real.
        alone: makes the step of one device, where the plain one will not do.
        shuffles: whether the step itself puts what it is given in a random order, as one that is
            a whole epoch does. Then no device can be trained beside it.
        bytes_a_step: what devices should send each other in a step; if not given, one all-reduce
            of all parameters. 0 if it is not known.

    Raises:
        TypeError: ``gpus`` is no list, ``prepare`` returns something else, a batch is no pair of
            tensors, or ``make_optimizer`` is no function.
        ValueError: ``prepare`` made no replicas, or of another model; there are no batches; the
            model or a batch is not on the host.
    """
    if not callable(make_optimizer):
        raise TypeError(
            "make_optimizer makes an optimizer of parameters, as torch.optim.AdamW does, and "
            f"{_in_words(make_optimizer)} is none"
        )
    gpus = require_devices(gpus)
    _check_on_host("the model", [*model.parameters(), *model.buffers()])
    reference = None if shuffles else Alone(model, loss_function, make_optimizer, alone)
    replicas, step = _prepared(prepare(deepcopy(model), gpus))
    names = [name for name, _ in model.named_parameters()]
    if not replicas or [name for name, _ in replicas[0].named_parameters()] != names:
        raise ValueError("prepare(model, gpus) returns the replicas of that model, and a step")
    if bytes_a_step is None:
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        bytes_a_step = all_reduce_bytes(len(replicas), nbytes)
    report = Report(Run(State(model), bytes_a_step, shuffles))
    for run in watch(report.run, replicas, step, reference, map(_checked, batches)):
        for name, instrument in INSTRUMENTS.items():
            report._note(name, instrument(run))
    if not report.steps:
        raise ValueError("there are no batches to train on")
    return report


def _prepared(made: Any) -> tuple[Sequence[nn.Module], TrainingStep]:
    """What ``prepare`` has returned, if it is what it should be."""
    if isinstance(made, list | tuple) and len(made) == 2:
        replicas, step = made
        if isinstance(replicas, list | tuple | nn.ModuleList) and callable(step):
            # Itself and no copy: a step may put other replicas into the list.
            return cast("Sequence[nn.Module]", replicas), step
    raise TypeError(
        "prepare(model, gpus) returns the replicas of that model, a list, and a function "
        f"step(x, y), and not {_in_words(made)}"
    )


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not is_pair or not all(isinstance(each, Tensor) for each in batch):
        raise TypeError(
            f"batches gives pairs of tensors (x, y), as in [(x, y)] * 4, and not {_in_words(batch)}"
        )
    _check_on_host("a batch", batch)
    return batch[0], batch[1]


def _check_on_host(what: str, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{what} is on {tensor.device}: give it on the host, as with .cpu(); prepare and "
                "step move copies of it"
            )


def _in_words(value: object) -> str:
    """Its type, and of a few things together the type of each."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(type(each).__name__ for each in value)})"
    return "None" if value is None else f"a {type(value).__name__}"
