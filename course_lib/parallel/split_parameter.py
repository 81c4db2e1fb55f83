"""One parameter on several devices: a part of it on each, or a copy.

What the layers of ``tensor_parallel`` keep their weights in, and what is done with the parameters
of a whole model: completing gradients, and putting the parts together again for a proof.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.inputs import require_devices
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.sums import are_sums, mark_as_sums


class Shards(nn.ParameterList):
    """One parameter on several devices: a part of it on each, or a copy.

    Args:
        whole: the parameter; it stays as it is. If it is frozen, so are its parts.
        dimension: along which to cut it; ``None`` for copies.
        groups: cut each of so many equal groups of rows, as of queries, keys and values.
        partial_gradients: whether each copy gets only a part of the parameter's gradient.

    Raises:
        TypeError: ``devices`` is one device and no list.
        ValueError: there are no devices, or more of them than rows.
    """

    def __init__(
        self,
        whole: Tensor,
        devices: Devices,
        dimension: int | None = None,
        groups: int = 1,
        partial_gradients: bool = False,
    ) -> None:
        devices = require_devices(devices)
        self.dimension, self.groups = dimension, groups
        self.partial_gradients = partial_gradients
        parts = [whole] * len(devices)
        if dimension is not None:
            parts = self._cut(whole, dimension, len(devices))
        super().__init__(
            # A view would keep the whole in memory.
            nn.Parameter(part.detach().to(device, copy=True).contiguous(), whole.requires_grad)
            for part, device in zip(parts, devices, strict=True)
        )

    def _cut(self, whole: Tensor, dimension: int, count: int) -> list[Tensor]:
        rows = whole.shape[dimension] // self.groups
        if rows < count:
            raise ValueError(f"cannot cut {rows} rows into {count} parts, one for each device")
        grouped = whole.unflatten(dimension, (self.groups, rows))
        parts = grouped.tensor_split(count, dimension + 1)
        return [part.flatten(dimension, dimension + 1) for part in parts]

    def join(self, parts: Tensors) -> Tensor:
        """The whole, on the host, of ``parts`` that are cut as these are, such as gradients."""
        parts = [part.detach().cpu() for part in parts]
        if self.dimension is None:
            return parts[0]
        grouped = [part.unflatten(self.dimension, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, self.dimension + 1).flatten(self.dimension, self.dimension + 1)


def all_reduce_partial_gradients(parallel: nn.Module) -> None:
    """Complete the gradients that each device has only a part of, in one all-reduce.

    To be called once after a backward pass with sequence parallelism: a norm, a bias or a position
    that worked on a part of the sequence has that part's gradient. Without sequence parallelism
    every device has the whole gradient, and nothing happens; nor does it at a second call.

    Raises:
        RuntimeError: a backward pass has added to gradients that were summed already.
    """
    partial = [
        [part.grad for part in shards]
        for shards in _all_shards(parallel)
        if shards.partial_gradients and shards[0].grad is not None
    ]
    on_each = list(zip(*(copies for copies in partial if not are_sums(copies)), strict=True))
    flat = [nn.utils.parameters_to_vector(gradients) for gradients in on_each]
    if flat:
        ring_all_reduce(flat)
    for gradients, sums in zip(on_each, flat, strict=True):
        nn.utils.vector_to_parameters(sums, gradients)
        mark_as_sums(gradients)


def unsplit(parallel: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of ``like``, the model that ``parallel`` was made of, with what ``parallel`` has now.

    Parameters and gradients, for a proof: ``largest_difference(unsplit(parallel, gpt), gpt)``.

    Raises:
        ValueError: ``parallel`` was made of another model.
    """
    whole = copy.deepcopy(like)
    parameters, split = list(whole.parameters()), _all_shards(parallel)
    if len(parameters) != len(split):
        raise ValueError(
            f"the split model has {len(split)} parameters and the other {len(parameters)}: give "
            "the model that it was made of"
        )
    for parameter, shards in zip(parameters, split, strict=True):
        joined = shards.join(list(shards))
        if joined.shape != parameter.shape:
            raise ValueError(
                f"parts of a parameter of shape {tuple(joined.shape)} stand where the model has "
                f"one of shape {tuple(parameter.shape)}: give the model that it was made of"
            )
        parameter.data.copy_(joined)
        gradients = [part.grad for part in shards]
        parameter.grad = None  # a copy of that in ``like``, which must not pass for ours
        if gradients[0] is not None:
            parameter.grad = shards.join(gradients).to(parameter.device)
    return whole


def largest_copy_difference(parallel: nn.Module) -> float:
    """The largest difference between devices in the parameters that all of them have."""
    differences = [
        (part.detach().cpu() - shards[0].detach().cpu()).abs().max().double()
        for shards in _all_shards(parallel)
        if shards.dimension is None
        for part in shards
    ]
    return torch.stack([torch.tensor(0.0).double(), *differences]).max().item()


def _all_shards(parallel: nn.Module) -> list[Shards]:
    """In the order of the parameters of the model that was split; a tied one once."""
    return [each for each in parallel.modules() if isinstance(each, Shards)]
