"""A pipeline as one rank sees it: its stage, and what it gets from its two neighbours.

PyTorch's own is ``torch.distributed.pipelining``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.parallel.counting import counts_of, part_of_mean


class StageOfRank:
    """Some layers of a model, the stage of this rank, and its messages to the ranks beside it.

    Sends are posted and not waited for at once, so that a stage goes on while its activation
    travels. An activation's is waited for when its gradient comes, a gradient's before the next one
    is sent: what was sent would otherwise stay in memory until the step ends.

    Args:
        layers: this rank's own.
        shape: of the activation of one microbatch between two stages; whoever receives must know
            it before.
    """

    def __init__(self, layers: nn.Module, shape: Sequence[int]) -> None:
        self.layers, self.shape = layers, shape
        self.rank, self.last = dist.get_rank(), dist.get_world_size() - 1
        self.device = next(layers.parameters()).device
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._sent_up: dict[int, dist.Work | None] = {}
        self._sent_down: dist.Work | None = None

    def forward(self, i: int, x: Tensor | None) -> Tensor:
        """Microbatch ``i`` through this stage; the first takes ``x``, the others receive theirs."""
        if x is None:
            x = self._receive(self.rank - 1)
        x = x.detach().requires_grad_(self.rank > 0)  # the gradient of the data is for nobody
        out = self.layers(x)
        self.kept[i] = x, out
        if self.rank < self.last:
            self._sent_up[i] = dist.isend(out.detach(), self.rank + 1)
        return out

    def backward(self, i: int, gradient: Tensor | None) -> None:
        """The way back of microbatch ``i``; the last one takes ``gradient``."""
        if gradient is None:
            gradient = self._receive(self.rank + 1)
        x, out = self.kept.pop(i)
        _wait(self._sent_up.pop(i, None))
        if out.requires_grad:  # as it does unless the first stage is frozen
            out.backward(gradient)
        if self.rank > 0:
            assert x.grad is not None
            _wait(self._sent_down)
            self._sent_down = dist.isend(x.grad, self.rank - 1)

    def finish(self) -> None:
        """Wait for what was sent last, which must not be changed or freed before."""
        _wait(self._sent_down)
        self._sent_down = None

    def _receive(self, source: int) -> Tensor:
        arrived = torch.empty(*self.shape, device=self.device, dtype=self._dtype())
        dist.recv(arrived, source)
        return arrived

    def _dtype(self) -> torch.dtype:
        return next(self.layers.parameters()).dtype


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def gpipe_step(
    stage: StageOfRank,
    xs: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """All forwards, then all backwards of one batch; gradients add up in the parameters.

    A rank holds all microbatches (Huang and others, "GPipe", 2019). PyTorch's is ``ScheduleGPipe``.

    Args:
        xs: the microbatches; they are looked at on the first rank alone.
        ys: their targets, looked at on the last rank alone. Padding (-100) counts nothing in the
            mean; the host waits until the rest is counted.
        loss_function: the mean loss of (outputs, targets).

    Returns:
        On the last rank each microbatch's part of the mean loss; elsewhere nothing.
    """
    return _step(stage, xs, ys, loss_function, ahead=len(xs))


def one_f_one_b_step(
    stage: StageOfRank,
    xs: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """A backward as early as possible, then one forward and one backward by turns: 1F1B.

    Rank r holds N - r microbatches at most, however many there are (Narayanan and others,
    "Memory-Efficient Pipeline-Parallel DNN Training", 2021). PyTorch's is ``Schedule1F1B``. Takes
    and returns what :func:`gpipe_step` does, and the gradients are equal to its to the bit.
    """
    return _step(stage, xs, ys, loss_function, ahead=stage.last - stage.rank)


def _step(
    stage: StageOfRank,
    xs: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    ahead: int,
) -> list[Tensor]:
    """``ahead`` forwards; then a forward and a backward by turns, then the backwards left."""
    count = len(xs)
    targets = counts_of(ys) if stage.rank == stage.last else []
    losses: list[Tensor] = []
    starts: dict[int, Tensor | None] = {}  # of backward, on the last rank

    def forward(i: int) -> None:
        out = stage.forward(i, xs[i] if stage.rank == 0 else None)
        if stage.rank == stage.last:
            scores = out.detach().requires_grad_()
            loss = part_of_mean(loss_function, scores, ys[i], targets[i], sum(targets))
            loss.backward()
            losses.append(loss.detach())
            starts[i] = scores.grad

    for i in range(min(ahead, count)):
        forward(i)
    for i in range(count):
        if ahead + i < count:
            forward(ahead + i)
        stage.backward(i, starts.pop(i, None))
    stage.finish()
    return losses
