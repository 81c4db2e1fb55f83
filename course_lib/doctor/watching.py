"""What the doctor writes down after each step: of your training, and of one device's beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from course_lib.parallel.kinds import Devices, Loss
from course_lib.timeline import Trace, trace

TrainingStep = Callable[[Tensor, Tensor], object]
Prepare = Callable[[nn.Module, Devices], tuple[Sequence[nn.Module], TrainingStep]]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Pairs = list[list[tuple[Tensor, Tensor]]]


class State:
    """All that training changes in a model, on the host.

    Attributes:
        parameters, buffers: by name.
        gradients: the norm of each that the step left, by the name of its parameter.
        norm: of all gradients together.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = _on_host(model.named_parameters())
        self.buffers = _on_host(model.named_buffers())
        self.gradients = {
            name: parameter.grad.detach().cpu().double().norm().item()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        self.norm = math.hypot(*self.gradients.values())


def _on_host(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in named}


@dataclass(frozen=True)
class Moment:
    """What was there after one step.

    Attributes:
        replicas: the state of each.
        alone: that of one device, or ``None`` where the two cannot be compared.
        flops: of one device's matrix products in this step; 0 where there is none.
        recording: of your step.
        inputs: what each replica was given, in the order of its calls, on the host.
        masks: for each replica, for each call of a dropout, where numbers came in and where they
            went out: two tensors of truth values.
        losses: the numbers that your step returned: one, or one a rank, or none. Several are parts
            of the mean, which add up to it.
        alone_loss: what one device's step returned, or ``None`` as with ``alone``.
    """

    replicas: list[State]
    alone: State | None
    flops: float
    recording: Trace
    inputs: list[list[Tensor]]
    masks: Pairs
    losses: list[float]
    alone_loss: float | None

    @property
    def loss(self) -> float | None:
        """The loss that your step returned, if it returned one."""
        return sum(self.losses) if self.losses else None


@dataclass
class Run:
    """A training, step by step.

    Attributes:
        start: the model before the first step.
        bytes_a_step: what devices should send each other in a step, in all; 0 if it is not known.
        shuffles: whether the step itself puts what it is given in a random order.
        moments: one for each step so far.
    """

    start: State
    bytes_a_step: int = 0
    shuffles: bool = False
    moments: list[Moment] = field(default_factory=list)

    @property
    def now(self) -> Moment:
        """What was there after the last step."""
        return self.moments[-1]


def watch(
    run: Run,
    replicas: Sequence[nn.Module],
    step: TrainingStep,
    alone: Alone | None,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[Run]:
    """Train, and give ``run`` back after each step, with what was there.

    Args:
        replicas, step: what was prepared.
        alone: trains on one device beside it.
        batches: pairs of inputs and targets, on the host.
    """
    for x, y in batches:
        with _listening(replicas) as (inputs, outputs), trace() as recording:
            returned = step(x.clone(), y.clone())  # what it does to them is not for the other
        right = _numbers(alone.step(x, y)) if alone is not None else []
        masks = [[(x.cpu() != 0, y.cpu() != 0) for x, y in pairs] for pairs in outputs]
        run.moments.append(
            Moment(
                [State(replica) for replica in replicas],
                State(alone.model) if alone is not None and not alone.threw_dice else None,
                alone.flops if alone is not None else 0.0,
                recording,
                [[each.detach().cpu() for each in given] for given in inputs],
                masks,
                _numbers(returned),
                sum(right) if right and alone is not None and not alone.threw_dice else None,
            )
        )
        yield run


class Alone:
    """Training on one device, the host, with the operations counted.

    Args:
        model: it stays as it is; a copy is trained.
        make_step: makes the function that trains it on a batch; if not given, it is the plain one.

    Attributes:
        model: the copy.
        flops: of the matrix products in the last step.
        threw_dice: whether a step so far drew random numbers; others than yours, then.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: Loss,
        make_optimizer: MakeOptimizer,
        make_step: Callable[[nn.Module], TrainingStep] | None,
    ) -> None:
        self.model = deepcopy(model)
        self.flops, self.threw_dice = 0.0, False
        self._loss_function = loss_function
        self._step = make_step(self.model) if make_step else self._plain
        self._optimizer = None if make_step else make_optimizer(self.model.parameters())

    def step(self, x: Tensor, y: Tensor) -> object:
        """One step on a batch; returns its loss, or what a step of its own returns."""
        rng_state = torch.default_generator.get_state()
        with FlopCounterMode(display=False) as counter:
            loss = self._step(x, y)
        self.flops = float(counter.get_total_flops())
        if not torch.equal(torch.default_generator.get_state(), rng_state):
            self.threw_dice = True
            torch.default_generator.set_state(rng_state)  # as if it had not been here
        return loss

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        loss = self._loss_function(self.model(x), y)
        loss.backward()
        self._optimizer.step()
        return loss


@contextmanager
def _listening(replicas: Sequence[nn.Module]) -> Iterator[tuple[list[list[Tensor]], Pairs]]:
    """What replicas are given in the block, and what goes into their dropouts and comes out."""
    inputs: list[list[Tensor]] = [[] for _ in replicas]
    outputs: Pairs = [[] for _ in replicas]
    handles = []
    for rank, replica in enumerate(replicas):

        def given(module: nn.Module, arguments: tuple, rank: int = rank) -> None:
            inputs[rank] += [each for each in arguments if isinstance(each, Tensor)]

        def dropped(module: nn.Module, arguments: tuple, y: Tensor, rank: int = rank) -> None:
            outputs[rank].append((arguments[0].detach(), y.detach()))

        handles.append(replica.register_forward_pre_hook(given))
        dropouts = [module for module in replica.modules() if isinstance(module, nn.Dropout)]
        handles += [module.register_forward_hook(dropped) for module in dropouts]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _numbers(returned: object) -> list[float]:
    """The losses in what a step returned; none, if there is anything else in it."""
    several = returned if isinstance(returned, list | tuple) else [returned]
    found = [_number(each) for each in several]
    return [] if None in found else [each for each in found if each is not None]


def _number(returned: object) -> float | None:
    if isinstance(returned, Tensor) and returned.numel() == 1:
        return float(returned.detach().cpu())
    return float(returned) if isinstance(returned, int | float) else None
