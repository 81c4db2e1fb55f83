"""The operators that do more than compute: indices, shapes changed in place, dropout and others."""

from __future__ import annotations

import copy
import math
import re
from functools import cache

import torch
from torch._prims_common import suggest_memory_format

from course_lib.virtual.arguments import inner_of, target_of
from course_lib.virtual.execution import execute, finish, follow_resized
from course_lib.virtual.machine import machine
from course_lib.virtual.operators import Operator, runs
from course_lib.virtual.room import check_as_told, check_room, is_large, refuse_if_host_is_full
from course_lib.virtual.tensor import VirtualTensor

aten = torch.ops.aten


@runs(aten.index.Tensor)
def _index(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``x[indices]``: with a mask of booleans the host waits to know how many were picked."""
    _check_indices(args)
    has_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return execute(operator if has_mask else _without_waiting(operator), args, kwargs)


@runs(
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
)
def _index_put(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    _check_indices(args)
    return execute(operator, args, kwargs)


def _check_indices(args: tuple) -> None:
    """Raise CUDA's error if what is indexed and its indices are on two devices."""
    self, indices = args[:2]
    for index in indices:
        if isinstance(index, VirtualTensor) and index.device != self.device:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({self.device})"
            )


@cache
def _without_waiting(operator: Operator) -> Operator:
    operator = copy.copy(operator)
    operator.host_waits = False
    return operator


_RESHAPING = ("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "as_strided_")


@runs(
    *(
        getattr(getattr(aten, packet), overload)
        for packet in _RESHAPING
        for overload in getattr(aten, packet).overloads()
    )
)
def _change_shape_in_place(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``x.t_()`` and the like: the shape changes inside, and outside where PyTorch looks."""
    self = args[0]
    operator.run(self.held, *args[1:], **kwargs)
    inner = self.held
    with torch.utils._mode_utils.no_dispatch():
        torch.as_strided_(self, inner.size(), inner.stride(), inner.storage_offset())
    return self


@runs(aten.expand.default, aten.as_strided.default, aten.unfold.default)
def _spread(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """Views with more numbers than there is memory: operators on them may run out of it."""
    view = execute(operator, args, kwargs)
    if is_large(view.numel()) and view.nbytes > view.allocation.nbytes:
        view.allocation.spread = math.inf
    return view


_UPSAMPLING = [name for name in dir(torch._C._nn) if re.fullmatch(r"_?upsample_\w+\dd(_aa)?", name)]


@runs(
    *(getattr(aten, name).default for name in _UPSAMPLING),
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten._pdist_forward.default,
    aten.affine_grid_generator.default,
    aten.constant_pad_nd.default,
    aten.diag_embed.default,
    aten.im2col.default,
    aten.multinomial.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.repeat.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
def _as_large_as_told(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """Operators whose arguments say how much they return, however little they are given."""
    target = target_of(kwargs.get("device"), args[0].device_index)
    if target is not None:
        check_as_told(operator, args, kwargs, machine.memories[target])
    return execute(operator, args, kwargs)


@runs(aten.resize_.default)
def _resize(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``x.resize_(shape)``: refused before anything is done, if there is no room for it."""
    self, shape = args
    nbytes = (self.storage_offset() + math.prod(shape)) * self.element_size()
    memory = self.allocation.memory
    if nbytes > self.allocation.nbytes:
        check_room(nbytes, memory)
    try:
        operator.run(self.held, shape, **kwargs)
    except RuntimeError as error:
        refuse_if_host_is_full(error, memory)
        raise
    follow_resized([self])
    return self


@runs(aten.resize_as_.default)
def _resize_as(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    self, template = args
    if kwargs.get("memory_format") is torch.preserve_format:
        kwargs = {"memory_format": suggest_memory_format(template)}
    return _resize(Operator.of(aten.resize_.default), (self, template.shape), kwargs)


@runs(*(getattr(aten.set_, overload) for overload in aten.set_.overloads()))
def set_(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``x.set_(y)``: from now on a view of the memory of ``y``, a tensor or a storage."""
    self, *rest = args
    source = kwargs.pop("source", None) if "source" in kwargs else (rest.pop(0) if rest else None)
    if source is None:
        allocation = machine.memories[self.device_index].allocate(0)
        inner_source = []
    elif source.device == self.device:
        allocation, inner_source = source.allocation, [source.held]
    else:
        raise RuntimeError(
            f"Attempted to set the storage of a tensor on device {self.device} to a storage on "
            f"different device {source.device}.  This is no longer allowed; the devices must match."
        )
    operator.run(self.held, *inner_source, *rest, **kwargs)
    self.follow(self.held, allocation)
    return self


@runs(aten.native_dropout.default)
def _dropout(operator: Operator, args: tuple, kwargs: dict) -> tuple[VirtualTensor, VirtualTensor]:
    """``native_dropout``, what a GPU runs, keeps a mask of booleans; the numbers are the CPU's."""
    x, probability, training = args
    if not training or probability == 0:
        return execute(operator, args, kwargs)
    keep = torch.empty_like(inner_of(x))
    keep.bernoulli_(1 - probability, generator=machine.generators[x.device_index])
    out = (x.held * (keep / (1 - probability)), keep.bool())
    return finish(operator, [], {}, x.allocation.memory, [x], out)


@runs(aten.native_dropout_backward.default)
def _dropout_backward(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """The gradient of dropout, rounded as the CPU's autograd rounds it."""
    grad, mask, scale = args
    divisor = 1 / scale if scale else math.inf  # nothing was kept: the gradient is zero
    out = grad.held * (mask.held.to(grad.dtype) / divisor)
    return finish(operator, [], {}, grad.allocation.memory, [grad, mask], out)


@runs(aten.one_hot.default)
def _one_hot(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``F.one_hot`` as on the CPU, which refuses a class that is out of range.

    The host waits only if it must find out how many classes there are, as on CUDA.
    """
    tensor, classes = args if len(args) == 2 else (args[0], -1)
    if classes != -1:
        operator = _without_waiting(operator)
    if machine.backing.type != "meta":
        if classes == -1 and tensor.numel():
            classes = int(inner_of(tensor).max()) + 1
        check_as_told(operator, (tensor, classes), kwargs, tensor.allocation.memory)
        return execute(operator, args, kwargs)
    return tensor.unsqueeze(-1).eq(torch.arange(classes, device=tensor.device)).long()


@runs(aten.histc.default)
def _histc(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``histc`` of whole numbers, which CUDA takes and the CPU does not."""
    tensor, *rest = args
    if tensor.is_floating_point():
        return execute(operator, args, kwargs)
    return execute(operator, (tensor.double(), *rest), kwargs).to(tensor.dtype)


@runs(aten._new_zeros_with_same_feature_meta.default)
def _zeros_of_form(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """Zeros beside the first tensor in the form of the second, which may be on another device."""
    self, other = args
    if kwargs or self.device == other.device:
        return execute(operator, args, kwargs)
    count = other.untyped_storage().nbytes() // other.element_size()
    row = torch.zeros(count, dtype=self.dtype, device=self.device)
    return row.as_strided(other.shape, other.stride(), other.storage_offset())


@runs(
    aten.is_same_size.default,
    aten.is_set_to.default,
    aten._has_same_storage_numel.default,
)
def _compare_forms(operator: Operator, args: tuple, kwargs: dict) -> bool:
    """What these ask is known without a look at the numbers, on whatever device they are."""
    return operator.run(*[inner_of(tensor) for tensor in args])


@runs(aten.block_diag.default)
def _block_diag(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    first, *others = args[0]
    for index, other in enumerate(others, 1):
        if other.device != first.device:
            raise RuntimeError(
                "torch.block_diag: input tensors must all be on the same device. Input 0 is on "
                f"device {first.device} and input {index} is on device {other.device}"
            )
    return execute(operator, args, kwargs)
