"""Functional collectives: operators that return new tensors, which are not ready until waited for.

DTensor and tensor parallelism call them. In C++ they would reach the numbers inside of virtual
tensors, past every meter; so each is run here, on the rank's process group. The work that a result
waits for stays with its memory until somebody waits.

FSDP2's own operator is here as well: the tensors that it returns are parts of one that it is given,
which its schema does not say.

Rests on the operators ``torch.ops._c10d_functional``, ``torch.ops.fsdp.all_gather_copy_in`` and
``_resolve_process_group``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # defines its operators
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from course_lib.virtual.memory import Allocation
from course_lib.virtual.operators import Operator, runs
from course_lib.virtual.tensor import VirtualTensor

ops = torch.ops._c10d_functional

# What must be waited for before the tensors of a piece of memory are right.
_works: WeakKeyDictionary[Allocation, list[dist.Work]] = WeakKeyDictionary()


def _group(name: Any) -> Any:
    """The group of that name, or the one in a box of C++."""
    is_name = isinstance(name, str)
    return _resolve_process_group(name) if is_name else dist.ProcessGroup.unbox(name)


def _op(name: str) -> Any:
    return getattr(dist.ReduceOp, name.upper())


def _pending(tensor: Any, work: dist.Work) -> Tensor:
    _works.setdefault(tensor.allocation, []).append(work)
    return tensor


@runs(ops.wait_tensor.default)
def _wait(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    (tensor,) = args
    for work in _works.pop(tensor.allocation, ()):
        work.wait()
    return tensor


@runs(ops.all_reduce_.default)
def _all_reduce_(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, op, name = args
    return _pending(tensor, _group(name).allreduce([tensor], _op(op)))


@runs(ops.all_reduce.default)
def _all_reduce(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, *rest = args
    return _all_reduce_(operator, (_copy(tensor), *rest), {})


@runs(ops.all_reduce_coalesced_.default)
def _all_reduce_all_(operator: Operator, args: tuple, kwargs: dict) -> list[Tensor]:
    tensors, *rest = args
    return [_all_reduce_(operator, (tensor, *rest), {}) for tensor in tensors]


@runs(ops.all_reduce_coalesced.default)
def _all_reduce_all(operator: Operator, args: tuple, kwargs: dict) -> list[Tensor]:
    tensors, *rest = args
    return [_all_reduce(operator, (tensor, *rest), {}) for tensor in tensors]


@runs(ops.all_gather_into_tensor_out.default)
def _all_gather_into(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, _, name = args
    out = kwargs["out"]
    return _pending(out, _group(name).all_gather_single(out, tensor.contiguous()))


@runs(ops.all_gather_into_tensor.default)
def _all_gather(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, count, _ = args
    out = tensor.new_empty((count * tensor.shape[0], *tensor.shape[1:]))
    return _all_gather_into(operator, args, {"out": out})


@runs(ops.all_gather_into_tensor_coalesced.default)
def _all_gather_all(operator: Operator, args: tuple, kwargs: dict) -> list[Tensor]:
    tensors, *rest = args
    return [_all_gather(operator, (tensor, *rest), {}) for tensor in tensors]


@runs(ops.reduce_scatter_tensor_out.default)
def _reduce_scatter_into(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, op, _, name = args
    out = kwargs["out"]
    return _pending(out, _group(name).reduce_scatter_single(out, tensor.contiguous(), _op(op)))


@runs(ops.reduce_scatter_tensor.default)
def _reduce_scatter(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, _, count, _ = args
    out = tensor.new_empty((tensor.shape[0] // count, *tensor.shape[1:]))
    return _reduce_scatter_into(operator, args, {"out": out})


@runs(ops.reduce_scatter_tensor_coalesced.default)
def _reduce_scatter_all(operator: Operator, args: tuple, kwargs: dict) -> list[Tensor]:
    tensors, *rest = args
    return [_reduce_scatter(operator, (tensor, *rest), {}) for tensor in tensors]


@runs(ops.all_to_all_single.default)
def _all_to_all(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, output_sizes, input_sizes, name = args
    out = tensor.new_empty((sum(output_sizes), *tensor.shape[1:]))
    group = _group(name)
    return _pending(
        out, group.all_to_all_single(out, tensor.contiguous(), output_sizes, input_sizes)
    )


@runs(ops.broadcast_.default)
def _broadcast_(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, root, name = args
    return _pending(tensor, _group(name).broadcast([tensor], root))


@runs(ops.broadcast.default)
def _broadcast(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    tensor, *rest = args
    return _broadcast_(operator, (_copy(tensor), *rest), {})


@runs(ops._wrap_tensor_autograd.default)
def _as_a_result(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    """A tensor that waits by itself when it is first used."""
    (tensor,) = args
    return AsyncCollectiveTensor(tensor)


@runs(ops.batch_p2p_ops.default, ops.isend.default, ops.irecv.default)
def _refuse(operator: Operator, args: tuple, kwargs: dict) -> Any:
    raise NotImplementedError(
        f"ranks on virtual GPUs cannot run the operator {operator.name}: call torch.distributed's "
        "own isend, irecv and batch_isend_irecv"
    )


@runs(torch.ops.fsdp.all_gather_copy_in.default)
def _copy_in(operator: Operator, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """As its kernel for CUDA: a rank's shards, one after the other, to its place in the whole."""
    shards, whole, sizes, numel, rank = args
    mine = whole.narrow(0, numel * rank, numel)
    torch._foreach_copy_(torch.split(mine, sizes), shards)
    return mine, whole


def _copy(tensor: VirtualTensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
