"""What PyTorch's engines take for granted of a process, and is not so with ranks in threads.

DTensor keeps, for the whole process, a table of operators that ``loss_parallel`` changes, and what
it knows of random numbers: each rank has its own. A cache of what operators return would answer
with a tensor on another rank's GPU, and is left out. DDP asks what pinned memory and which
version of CUDA there are, and takes times.

Rests on ``DTensor._op_dispatcher._custom_op_handlers``,
``torch.distributed.tensor._random._rng_tracker``,
``torch._subclasses.fake_tensor.FakeTensorMode._cached_dispatch_impl``, and
``DistributedDataParallel``'s ``_check_comm_hook``, ``_pre_forward`` and ``_active_ddp_module``, and
``torch.nn.parallel.distributed._verify_param_shape_across_processes``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import _random
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.ranks import functional as functional  # lets virtual GPUs know its operators
from course_lib.ranks import refusals, sequence_parts
from course_lib.ranks.own_numbers import OwnNumbers
from course_lib.ranks.rank_state import PARTS, attribute
from course_lib.virtual import pinned
from course_lib.virtual.machine import machine

PARTS["DTensor's random numbers"] = attribute(lambda: _random, "_rng_tracker")
PARTS["DDP's model in forward"] = attribute(lambda: DistributedDataParallel, "_active_ddp_module")


def state_of_a_rank() -> dict[str, Any]:
    """The parts above, as a process has them that has done nothing yet."""
    return {**sequence_parts.state_of_a_rank(), "DTensor's random numbers": None}


@contextmanager
def prepared() -> Iterator[None]:
    """Change PyTorch, in the block, as the functions below say."""
    with ExitStack() as stack:
        for change in (
            mock.patch.object(FakeTensorMode, "_cached_dispatch_impl", _without_cache),
            mock.patch.object(DistributedDataParallel, "_check_comm_hook", _check_hook),
            mock.patch.object(DistributedDataParallel, "forward", _forward),
            mock.patch.object(DistributedDataParallel, "_pre_forward", _pre_forward),
            mock.patch.object(distributed, "_verify_param_shape_across_processes", _verify),
            sequence_parts.shared_rules(),
            refusals.in_place(),
            mock.patch.object(torch.autograd, "_engine_run_backward", _backward_of_ranks()),
        ):
            stack.enter_context(change)
        yield


def _without_cache(self: FakeTensorMode, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return self._dispatch_impl(func, types, args, kwargs)


_check_any_hook = DistributedDataParallel._check_comm_hook


def _check_hook(self: DistributedDataParallel, hook: Any) -> None:
    """Here bfloat16 needs no version of CUDA or NCCL."""
    if getattr(hook, "__module__", "") != default_hooks.__name__:
        _check_any_hook(self, hook)


class _QuietLogger:
    """DDP's logger, but for the times: it cannot take those of virtual GPUs, and says so in the
    middle of what ranks print."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def set_runtime_stats_and_log(self) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)


class _Here(threading.local):
    """Of each rank: whether a model of its looks for parameters that are not used."""

    asks_for_pinned_memory = False


class _PinnedMemory(TorchDispatchMode):
    """Pinned memory where C++ code asks CUDA's allocator for it: ordinary memory with a mark."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "pin_memory": False})
        pinned.mark(made)
        return made


_here = _Here()
_verify_any = distributed._verify_param_shape_across_processes
_pre_forward_of_any = DistributedDataParallel._pre_forward
_forward_of_any = DistributedDataParallel.forward


def _forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
    if not isinstance(self.logger, _QuietLogger):
        self.logger = _QuietLogger(self.logger)
    if self.mixed_precision is not None:
        raise NotImplementedError(
            "DistributedDataParallel(mixed_precision=...) does not train on virtual GPUs: take "
            "torch.autocast, or fully_shard with a MixedPrecisionPolicy"
        )
    if self.find_unused_parameters or self.static_graph:
        _here.asks_for_pinned_memory = True
    return _forward_of_any(self, *inputs, **kwargs)


def _verify(*args: Any, **kwargs: Any) -> Any:
    """When it is made, DDP compares the shapes of all ranks' parameters."""
    with _reading():
        return _verify_any(*args, **kwargs)


def _pre_forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
    """After its first step, DDP tells the other ranks in which order gradients came."""
    with _reading():
        return _pre_forward_of_any(self, *inputs, **kwargs)


def _backward_of_ranks() -> Callable[..., Any]:
    """In backward, DDP tells the other ranks which parameters it did not use.

    What runs backward is asked for here and not when this module is imported: that may be before
    the first ``devices()``, which puts a function of virtual GPUs there.
    """
    run_backward = torch.autograd._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not _here.asks_for_pinned_memory:
            return run_backward(*args, **kwargs)
        with _reading(), _PinnedMemory():
            return run_backward(*args, **kwargs)

    return run


def _reading() -> AbstractContextManager[Any]:
    """Lets DDP read what it has sent, where there are no numbers."""
    return OwnNumbers() if machine.has_no_numbers else nullcontext()
