"""``nn.DataParallel`` and the functions of ``torch.nn.parallel``, for virtual GPUs.

They end in C++ functions that PyTorch has only where it is built for CUDA; here those are made of
copies. What runs on the replicas runs in turn and not in a thread a device: the devices work at the
same time all the same, because the host only fills their queues.

Rests on ``torch._C._broadcast_coalesced``, ``_broadcast``, ``_scatter`` and ``_gather`` as
``torch.nn.parallel.comm`` calls them, and on ``torch.nn.parallel.parallel_apply``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.tensor import device_of

# What nn.DataParallel calls device_ids.
DeviceIds = Sequence[int | torch.device]


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    if not torch.cuda.is_available():
        torch._C._broadcast = _broadcast
        torch._C._broadcast_coalesced = _broadcast_coalesced
        torch._C._scatter = _scatter
        torch._C._gather = _gather
        vgpu = torch.get_device_module(DEVICE_TYPE)
        torch.nn.parallel._functions._get_stream = vgpu.current_stream  # to copy from the host
        _apply_in_turn()
        _leave_models_on_the_cpu()


def _device(device: int | str | torch.device) -> torch.device:
    return device_of(device) if isinstance(device, int) else torch.device(device)


def _broadcast(tensor: Tensor, devices: DeviceIds) -> list[Tensor]:
    """``tensor`` on each of ``devices``; where it is already, it is itself."""
    return [tensor.to(_device(device)) for device in devices]


def _broadcast_coalesced(
    tensors: Sequence[Tensor], devices: DeviceIds, buffer_size: int
) -> list[list[Tensor]]:
    """For each of ``devices`` all of ``tensors``."""
    return [[tensor.to(_device(device)) for tensor in tensors] for device in devices]


def _scatter(
    tensor: Tensor,
    devices: DeviceIds,
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Sequence[Any] | None,
) -> list[Tensor]:
    """The parts of ``tensor`` along ``dim``, each on its device."""
    if chunk_sizes is None:
        parts = tensor.chunk(len(devices), dim)
    else:
        parts = tensor.split(list(chunk_sizes), dim)
    return [part.contiguous().to(_device(each)) for part, each in zip(parts, devices, strict=False)]


def _gather(tensors: Sequence[Tensor], dim: int, destination_index: int | None) -> Tensor:
    """``tensors`` put together along ``dim``; without a destination, on the current GPU."""
    if destination_index is None or destination_index == -1:
        destination_index = machine.clock.current_device
    return torch.cat([tensor.to(_device(destination_index)) for tensor in tensors], dim)


def _apply_in_turn() -> None:
    one_at_a_time = nn.parallel.parallel_apply

    def parallel_apply(
        modules: Sequence[nn.Module],
        inputs: Sequence[Any],
        kwargs_tup: Sequence[dict[str, Any]] | None = None,
        devices: Sequence[int | torch.device | None] | None = None,
    ) -> list[Any]:
        kwargs_tup = kwargs_tup or [{}] * len(modules)
        devices = devices or [None] * len(modules)
        if not len(modules) == len(inputs) == len(kwargs_tup) == len(devices):
            return one_at_a_time(modules, inputs, kwargs_tup, devices)  # says what does not match
        return [
            output
            for module, input, kwargs, device in zip(
                modules, inputs, kwargs_tup, devices, strict=True
            )
            for output in one_at_a_time([module], [input], [kwargs], [device])
        ]

    _replace(one_at_a_time, parallel_apply)


def _replace(function: Callable, other: Callable) -> None:
    """Put ``other`` under the name of ``function`` wherever ``torch.nn.parallel`` imported it."""
    for name in ("", ".parallel_apply", ".data_parallel"):
        module = sys.modules[f"torch.nn.parallel{name}"]
        if getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, other)


def _leave_models_on_the_cpu() -> None:
    """A model that is on the CPU runs there, as it does where there is no GPU."""
    forward = nn.DataParallel.forward

    def forward_where_it_is(self: nn.DataParallel, *inputs: Any, **kwargs: Any) -> Any:
        own = list(chain(self.module.parameters(), self.module.buffers()))
        if own and all(tensor.device.type == "cpu" for tensor in own):
            return self.module(*inputs, **kwargs)
        return forward(self, *inputs, **kwargs)

    nn.DataParallel.forward = forward_where_it_is
