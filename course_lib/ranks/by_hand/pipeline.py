"""A pipeline as one rank sees it: its stage, and what it gets from its two neighbours.

PyTorch's own is ``torch.distributed.pipelining``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class StageOfRank:
    """Some layers of a model, the stage of this rank, and its messages to the ranks beside it.

    Sends are posted and not waited for before :meth:`finish`, so that a stage goes on while its
    activation travels.

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
        self._sent: list[dist.Work | None] = []

    def forward(self, i: int, x: Tensor | None) -> Tensor:
        """Microbatch ``i`` through this stage; the first takes ``x``, the others receive theirs."""
        if x is None:
            x = self._receive(self.rank - 1)
        x = x.detach().requires_grad_(x.is_floating_point())
        out = self.layers(x)
        self.kept[i] = x, out
        if self.rank < self.last:
            self._sent.append(dist.isend(out.detach(), self.rank + 1))
        return out

    def backward(self, i: int, gradient: Tensor | None) -> None:
        """The way back of microbatch ``i``; the last one takes ``gradient``."""
        if gradient is None:
            gradient = self._receive(self.rank + 1)
        x, out = self.kept.pop(i)
        out.backward(gradient)
        if self.rank > 0:
            assert x.grad is not None
            self._sent.append(dist.isend(x.grad, self.rank - 1))

    def finish(self) -> None:
        """Wait for what was sent, which must not be changed or freed before."""
        for work in self._sent:
            assert work is not None  # the rank is in the group
            work.wait()
        self._sent.clear()

    def _receive(self, source: int) -> Tensor:
        arrived = torch.empty(*self.shape, device=self.device, dtype=self._dtype())
        dist.recv(arrived, source)
        return arrived

    def _dtype(self) -> torch.dtype:
        return next(self.layers.parameters()).dtype


def gpipe_step(
    stage: StageOfRank,
    xs: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """All forwards, then all backwards of one batch; gradients add up in the parameters.

    Args:
        xs: the microbatches; they are looked at on the first rank alone.
        ys: their targets, looked at on the last rank alone.
        loss_function: the mean loss of (outputs, targets).

    Returns:
        On the last rank each microbatch's part of the mean loss; elsewhere nothing.
    """
    losses, starts = [], []
    examples = sum(len(y) for y in ys)
    for i, x in enumerate(xs):
        out = stage.forward(i, x if stage.rank == 0 else None)
        if stage.rank == stage.last:
            scores = out.detach().requires_grad_()
            loss = loss_function(scores, ys[i]) * (len(ys[i]) / examples)
            loss.backward()
            losses.append(loss.detach())
            starts.append(scores.grad)
    for i in range(len(xs)):
        stage.backward(i, starts[i] if stage.rank == stage.last else None)
    stage.finish()
    return losses
