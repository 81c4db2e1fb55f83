"""Sharded data parallelism, stage 3 of ZeRO, as one rank sees it: a part of each layer.

``torch.distributed.fsdp.fully_shard`` does the same (Zhao and others, "PyTorch FSDP", 2023), and
cuts each parameter by itself; here a layer's parameters are one row of numbers, which is cut.
:mod:`course_lib.parallel.sharded_data_parallel` is the single controller's, of lesson 08.

A layer says by hooks when its parameters must be there and when its gradients are complete:

    =========================  ===============================================================
    before its forward         all-gather its row, begin with the next layer's
    after its forward          give the row's memory back
    before its backward        all-gather its row anew, begin with that of the layer before
    at its last gradient       give the memory back, begin the reduce-scatter of the gradients
    =========================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Unit:
    """A layer whose parameters are one row, and this rank's shard of it.

    The parameters stay what they are, views of the row, whether it has memory or not: what autograd
    saves of them for backward finds the numbers that were gathered since. As a bucket does, a unit
    knows no parameter, since their hooks refer to it.

    Args:
        layer: its parameters are of one dtype, on one device, and the same on all ranks.

    Attributes:
        shard: what an optimizer changes. It treats each number by itself, as SGD and Adam do.
        after, before: the units of the next layer and of the one before, if there are such.
    """

    def __init__(self, layer: nn.Module) -> None:
        rank, N = dist.get_rank(), dist.get_world_size()
        parameters = list(layer.parameters())
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.row = nn.functional.pad(flat, (0, -len(flat) % N))  # so that N divides it
        self.shard = nn.Parameter(self.row.chunk(N)[rank].clone())
        self.after: Unit | None = None
        self.before: Unit | None = None
        self._gradients: dict[int, Tensor] = {}  # of parameters, by where in the row they begin
        self._count = len(parameters)
        self._arriving: dist.Work | None = None
        self._summed: tuple[dist.Work | None, Tensor] | None = None
        ends = accumulate((parameter.numel() for parameter in parameters), initial=0)
        for parameter, (start, end) in zip(parameters, pairwise(ends), strict=True):
            place = slice(start, end)
            parameter.data = self.row[place].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, place))
        layer.register_forward_pre_hook(lambda *_: self.fetch(self.after))
        layer.register_forward_hook(self._after_forward)
        self.drop()

    def _after_forward(self, layer: nn.Module, inputs: tuple, out: Tensor) -> None:
        self.drop()
        if out.requires_grad:  # its gradient comes as the layer's backward begins
            out.register_hook(lambda _: self.fetch(self.before))

    def fetch(self, following: Unit | None = None) -> None:
        """Have the row here, and let the one that is needed next be on its way."""
        self._begin_to_gather()
        if following is not None:
            following._begin_to_gather()
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def _begin_to_gather(self) -> None:
        storage = self.row.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self.row.nbytes)
            self._arriving = dist.all_gather_single(self.row, self.shard.detach(), async_op=True)

    def drop(self) -> None:
        """Give the row's memory back."""
        self.row.untyped_storage().resize_(0)

    def _on_gradient(self, place: slice, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        # One row of all of them from the start would stand beside all of the layer's activations.
        self._gradients[place.start] = parameter.grad.flatten()
        parameter.grad = None
        if len(self._gradients) == self._count:
            self.drop()
            self._begin_to_sum()

    def _begin_to_sum(self) -> None:
        self.take_sum()  # of a backward pass before this one
        if self.after is not None:
            self.after.take_sum()  # or its gradients stay in memory until the step ends
        parts = [self._gradients[start] for start in sorted(self._gradients)]
        self._gradients.clear()
        padding = self.row.numel() - sum(map(len, parts))
        gradients = torch.cat([*parts, parts[0].new_zeros(padding)]).div_(dist.get_world_size())
        mine = torch.empty_like(self.shard)
        self._summed = dist.reduce_scatter_single(mine, gradients, async_op=True), mine

    def take_sum(self) -> None:
        """Add the last sum to the shard's gradient, once it is there."""
        if self._summed is None:
            return
        work, mine = self._summed
        self._summed = None
        if work is not None:
            work.wait()
        if self.shard.grad is None:
            self.shard.grad = mine
        else:
            self.shard.grad.add_(mine)

    def finish(self) -> None:
        """Have the gradient of this step, and no parameters of it.

        Raises:
            RuntimeError: a gradient has not come, so that none was sent.
        """
        self.take_sum()
        self.drop()
        if self._gradients or self.shard.grad is None:
            raise RuntimeError(
                f"of a layer's {self._count} parameters, {self._count - len(self._gradients)} got "
                "no gradient in this backward pass"
            )


class ShardedParameters:
    """The parameters of a model's layers, in shards over all ranks.

        sharded = ShardedParameters(model)
        optimizer = torch.optim.AdamW(sharded.shards)
        loss_function(model(x), y).backward()
        sharded.finish()
        optimizer.step()

    The gradients are those of the mean over the ranks. Layers run in the order of ``layers``, each
    once in a forward, and every parameter gets a gradient on every rank.

    Args:
        layers: of a model, such as an ``nn.Sequential``; those without parameters are left alone.
            Equal on all ranks.

    Raises:
        ValueError: two layers share a parameter, which would have two places, or one is frozen.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        layers = [layer for layer in layers if any(True for _ in layer.parameters())]
        ids = [id(parameter) for layer in layers for parameter in layer.parameters()]
        if len(set(ids)) < len(ids):
            raise ValueError("two layers share a parameter: put both into one layer")
        if not all(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            raise ValueError(
                "a parameter is frozen, and a layer's row is trained as one: leave its layer out, "
                "which stays whole on every rank"
            )
        self.units = [Unit(layer) for layer in layers]
        for one, other in pairwise(self.units):
            one.after, other.before = other, one

    @property
    def shards(self) -> list[nn.Parameter]:
        """This rank's part of each layer, for an optimizer."""
        return [unit.shard for unit in self.units]

    def finish(self) -> None:
        """Wait for the gradients of this step; raises what :meth:`Unit.finish` does."""
        for unit in self.units:
            unit.finish()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In this block the model has all its parameters, to look at or to save; on all ranks."""
        for unit in self.units:
            unit.fetch()
        try:
            yield
        finally:
            for unit in self.units:
                unit.drop()
