"""The cases of lesson 15: a broken program, what it is tried on, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from course_lib import CLASSROOM, doctor, hardware
from course_lib.doctor.watching import MakeOptimizer, Prepare, TrainingStep
from course_lib.exercises.broken import chance, meters, split_models, the_sum, who_learns
from course_lib.exercises.broken.batches import (
    VOCABULARY,
    Batches,
    one_epoch,
    padded,
    passages,
    points,
)
from course_lib.models import MLP, next_token_loss
from course_lib.parallel.kinds import Loss

# Nothing is waited for but work itself: a launch would hide how long a small product takes.
SPEC = CLASSROOM.with_(launch_overhead=0.0)


def sgd(rate: float = 0.1, momentum: float = 0.0) -> MakeOptimizer:
    """What makes an SGD optimizer."""
    return lambda parameters: SGD(parameters, lr=rate, momentum=momentum)


PLAIN = sgd()


@dataclass(frozen=True)
class Case:
    """A broken program, and what is known about it.

    Attributes:
        program: as :func:`course_lib.doctor.examine` takes it; its docstring names the report.
        symptom: what a user would notice, if anything.
        cause: what is wrong.
        lines: of the program, each of which may be called the one at fault: where it is wrong, or
            where what is missing belongs.
        make_model, batches, loss, optimizer: what it is tried on; ``batches`` takes how many.
        gpu_count: on how many devices.
        alone, shuffles, bytes_a_step: as the doctor takes them.
    """

    program: Prepare
    symptom: str
    cause: str
    lines: tuple[str, ...] = ()
    make_model: Callable[[], nn.Module] = lambda: MLP(16, 32, 4)
    batches: Callable[[int], Batches] = points
    loss: Loss = F.cross_entropy
    optimizer: MakeOptimizer = PLAIN
    gpu_count: int = 3
    alone: Callable[[nn.Module], TrainingStep] | None = None
    shuffles: bool = False
    bytes_a_step: int | None = None

    def examine(self, prepare: Prepare | None = None, steps: int = 4) -> doctor.Report:
        """What the doctor says of the broken program, or of another in its place.

        Its devices are its own, and so are its random numbers.
        """
        with hardware.fresh_devices(self.gpu_count, SPEC) as gpus:
            torch.default_generator.manual_seed(0)
            model = self.make_model()
            return doctor.examine(
                model,
                prepare or self.program,
                self.batches(steps),
                self.loss,
                self.optimizer,
                gpus,
                alone=self.alone,
                shuffles=self.shuffles,
                bytes_a_step=self.bytes_a_step,
            )


def _token_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY))


def _clipped(model: nn.Module) -> TrainingStep:
    optimizer = SGD(model.parameters(), lr=0.5)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def _unfrozen_at_the_third(model: nn.Module) -> TrainingStep:
    optimizer, steps = SGD(model.parameters(), lr=0.1), 0
    model[0].requires_grad_(False)  # type: ignore[index]

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal steps
        steps += 1
        model[0].requires_grad_(steps >= 3)  # type: ignore[index]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


CASES: dict[str, Case] = {
    "accumulated": Case(
        the_sum.accumulated,
        "a larger batch does not learn better",
        "the exchange comes after the first piece, not the last",
    ),
    "short_passages": Case(
        the_sum.short_passages,
        "short passages count for more than they should",
        "shards are weighted by passages, and the mean is over tokens",
        lines=(
            "share = len(y_part) / len(y)",
            "loss = next_token_loss(replica(x_part), y_part) * share",
        ),
        make_model=_token_model,
        batches=lambda steps: padded(steps, 2, 3, 5, 8, 12, 16),
        loss=next_token_loss,
        optimizer=sgd(1.0),
    ),
    "four_pieces": Case(
        the_sum.four_pieces,
        "accumulation does not make a step cheaper",
        "gradients are exchanged after every piece",
        lines=(
            "for copies in parameter_copies(replicas):",
            "all_reduce(gradients)",
        ),
    ),
    "clipped": Case(
        the_sum.clipped,
        "with more GPUs, each step learns less",
        "every copy of a gradient counts in the norm",
        lines=(
            "gradients = [p.grad for replica in replicas for p in replica.parameters()]",
            "clip_together(gradients, gradients, max_norm=0.1)",
        ),
        alone=_clipped,
    ),
    "one_row": Case(
        who_learns.one_row,
        "the model learns less than it should",
        "the optimizers hold parameters that the model no longer has",
        lines=(
            "optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]",
            "layer.weight, layer.bias = nn.Parameter(weight.view_as(layer.weight))",
        ),
    ),
    "thawed": Case(
        who_learns.thawed,
        "validation differs from rank to rank, from some step on",
        "the list of what is exchanged was made before the layer was unfrozen",
        lines=(
            "reduced = [copies for copies in parameter_copies(replicas)",
            "for copies in reduced:",
            "replica[0].requires_grad_(True)",
        ),
        alone=_unfrozen_at_the_third,
    ),
    "moved": Case(
        who_learns.moved,
        "after a restart the loss falls more slowly",
        "the checkpoint has no optimizer in it",
        lines=(
            'saved = {"model": replicas[0].state_dict()}',
            "optimizers[:] = [SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]",
        ),
        optimizer=sgd(0.1, 0.9),
        bytes_a_step=0,
    ),
    "with_dropout": Case(
        chance.with_dropout,
        "none",
        "all devices draw from one seed",
        lines=("seed_device(1, gpu)",),
        make_model=lambda: nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)
        ),
    ),
    "epochs": Case(
        chance.epochs,
        "none",
        "the seed of the order is the same in every epoch",
        lines=("shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))",),
        batches=one_epoch,
        shuffles=True,
        bytes_a_step=0,
    ),
    "recomputed": Case(
        chance.recomputed,
        "evaluation is off, training is not",
        "a layer that keeps statistics is computed twice",
        lines=(
            "h = checkpoint(first_stage, x, use_reentrant=False)",
            "return norm(front(x))",
        ),
        make_model=lambda: nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 4)
        ),
        gpu_count=2,
        bytes_a_step=0,
    ),
    "microbatches": Case(
        split_models.microbatches,
        "the logged norm is too large; clipping bites too early",
        "the loss is divided by its microbatches after backward",
        lines=(
            "loss.backward()",
            "losses.append(F.cross_entropy(back(h.to(gpus[1])), y_piece.to(gpus[1])))",
            "return sum(loss.item() for loss in losses) / count",
        ),
        optimizer=lambda parameters: AdamW(parameters, lr=1e-2),
        gpu_count=2,
        bytes_a_step=0,
    ),
    "split_layers": Case(
        split_models.split_layers,
        "the loss begins too high",
        "a bias is added on every device before the sum",
        lines=("part = F.linear(h, down.weight, model.bias.to(gpu))",),
        make_model=lambda: split_models.SplitMLP(16, 32, 4, 2),
        gpu_count=2,
        bytes_a_step=0,
    ),
    "long_passages": Case(
        split_models.long_passages,
        "none",
        "attention takes tokens in plain order for zigzag order, and sees the future",
        lines=(
            "places = torch.arange(x.shape[1]).chunk(len(gpus))",
            "replicas, ring_attention(qs, ks, vs, causal=True), places, gpus",
        ),
        make_model=lambda: split_models.Reader(VOCABULARY, 16, 16),
        batches=passages,
        loss=next_token_loss,
        optimizer=sgd(0.5),
        gpu_count=2,
        bytes_a_step=0,
    ),
    "whole_batches": Case(
        meters.whole_batches,
        "more GPUs do not make an epoch shorter",
        "every device is given the whole batch",
    ),
    "logged": Case(
        meters.logged,
        "out of memory after some thousand steps",
        "losses are kept with their graphs",
    ),
    "side_streams": Case(
        meters.side_streams,
        "now and then, on some machines, another loss",
        "nobody waits for the side streams",
        lines=(
            "with sides.beside(gradients):",
            "all_reduce(gradients)",
            "optimizer.step()",
        ),
    ),
    "by_length": Case(
        meters.by_length,
        "GPUs wait for one another",
        "passages are dealt out by length",
        lines=(
            "own = by_length.chunk(len(gpus))[rank]",
            "by_length = lengths.argsort(stable=True)",
        ),
        make_model=_token_model,
        batches=lambda steps: padded(steps, 32, 2, 9, 24, 3, 6, 18, 2, 13),
        loss=next_token_loss,
        optimizer=sgd(1.0),
    ),
}
