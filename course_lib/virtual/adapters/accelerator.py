"""``torch.accelerator`` for virtual GPUs.

Its functions end in C++ ones that ask a device guard and an allocator, and of those a device type
written in Python has none that answer. So the C++ functions give way to ones that ask
``torch.vgpu``. Once virtual GPUs are there, they are the accelerator.

Rests on the names ``torch._C._accelerator_*``, which are the same in PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.tensor import device_of, index_of

_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


def prepare() -> None:
    """Put the functions below in place of PyTorch's. To be called once."""
    vgpu = torch.get_device_module(DEVICE_TYPE)
    _replace(
        getDeviceIndex=vgpu.current_device,
        setDeviceIndex=_set_device,
        exchangeDevice=_exchange_device,
        maybeExchangeDevice=_exchange_device,
        synchronizeDevice=vgpu.synchronize,
        getStream=partial(_current_stream, torch._C._accelerator_getStream),
        setStream=vgpu.set_stream,
        getDeviceCapability=lambda device: {"supported_dtypes": set(_DTYPES)},
        isAllocatorInitialized=lambda: True,
        emptyCache=vgpu.empty_cache,
        emptyHostCache=vgpu.empty_cache,
        getMemoryInfo=vgpu.mem_get_info,
        getDeviceStats=_memory_stats,
        resetPeakStats=vgpu.reset_peak_memory_stats,
        resetAccumulatedStats=lambda device: None,  # the totals that it resets are not kept
    )


def _replace(**functions: Any) -> None:
    for name, function in functions.items():
        setattr(torch._C, f"_accelerator_{name}", function)


def _set_device(index: int) -> None:
    if index >= 0:  # PyTorch's word for "leave it"
        machine.clock.current_device = index_of(device_of(index))


def _exchange_device(index: int) -> int:
    before = machine.clock.current_device
    _set_device(index)
    return before


def _current_stream(in_cpp: Callable[[int], Any], index: int) -> Any:
    # torch.compile, of a function for the CPU too, wants a stream of PyTorch's own class.
    tracing = torch._guards.TracingContext.try_get() is not None
    return in_cpp(index) if tracing else torch.get_device_module(DEVICE_TYPE).current_stream(index)


def _memory_stats(index: int) -> dict[str, Any]:
    """Bytes in use, under the names that PyTorch's allocators give them."""
    vgpu = torch.get_device_module(DEVICE_TYPE)
    in_use = {
        "current": vgpu.memory_allocated(index),
        "peak": vgpu.max_memory_allocated(index),
    }
    return {"allocated_bytes": {"all": in_use}, "reserved_bytes": {"all": dict(in_use)}}
