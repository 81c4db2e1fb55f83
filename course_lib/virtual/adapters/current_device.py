"""``"vgpu"`` without an index means the current device, ``torch.vgpu.current_device()``.

Where PyTorch's C++ code must know the index it asks a device guard, and one written in Python can
only answer 0. So the functions through which programs name a device put the index in themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.tensor import device_of, index_of


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    _device_constructors()  # what torch.set_default_device knows, while these are PyTorch's own
    torch.Tensor.to = _with_index_first(torch.Tensor.to)
    torch.Tensor.new_tensor = _with_index(torch.Tensor.new_tensor)
    torch.tensor = _known_to_torchscript(_with_index(torch.tensor), torch.tensor)
    torch.as_tensor = _known_to_torchscript(_with_index(torch.as_tensor), torch.as_tensor)
    torch.asarray = _with_index(torch.asarray)
    DeviceContext.device = property(_device_now, _keep)  # type: ignore[assignment]  # an attribute


def _device_now(self: DeviceContext) -> torch.device:
    """What ``with torch.device("vgpu")`` and ``torch.set_default_device`` mean at this moment."""
    return _current_if_unnamed(vars(self)["device"])


def _keep(self: DeviceContext, device: torch.device) -> None:
    vars(self)["device"] = device  # where those are, too, that were made before


def _known_to_torchscript(function: Callable, original: Callable) -> Callable:
    """``function``, which code that is compiled by ``torch.jit.script`` may call as ``original``.

    PyTorch compiles its own optimizers so where ``torch.distributed.optim`` is imported.
    """
    operator = torch.jit._builtins._find_builtin(original)
    if operator is not None:
        torch.jit._builtins._register_builtin(function, operator)
    return function


def _with_index(function: Callable) -> Callable:
    """``function``, whose keyword argument ``device`` may lack the index."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _current_if_unnamed(kwargs["device"])
        return function(*args, **kwargs)

    return call


def _with_index_first(method: Callable) -> Callable:
    """``method``, whose first argument or keyword argument ``device`` may lack the index."""

    @wraps(method)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_current_if_unnamed(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = _current_if_unnamed(kwargs["device"])
        return method(self, *args, **kwargs)

    return call


def _current_if_unnamed(device: Any) -> Any:
    if isinstance(device, str):
        has_no_index = device == DEVICE_TYPE
    else:
        is_device = type(device) is torch.device
        has_no_index = is_device and device.type == DEVICE_TYPE and device.index is None
    return device_of(index_of(torch.device(DEVICE_TYPE))) if has_no_index else device
