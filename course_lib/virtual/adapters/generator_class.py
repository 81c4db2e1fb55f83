"""``torch.Generator(device="vgpu:1")``: a generator of one's own for draws on virtual GPUs.

Its numbers are those that a generator of the same seed gives where the backing is. As on CUDA, a
generator of the host is refused on a device.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.random_states import DeviceGenerator
from course_lib.virtual.tensor import device_of, index_of

_InCpp = torch._C.Generator
_KindInCpp: Any = type(_InCpp)


class _Kind(_KindInCpp):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _InCpp)


class Generator(_InCpp, metaclass=_Kind):
    """What ``torch.Generator`` is once there are virtual GPUs."""

    def __new__(cls, device: Any = "cpu") -> Any:
        device = torch.device(device)
        if device.type != DEVICE_TYPE:
            return _InCpp(device)
        return DeviceGenerator(device_of(index_of(device)), machine.backing)


def prepare() -> None:
    """Put it in the place of PyTorch's class. To be called once."""
    pytorch: Any = torch
    pytorch.Generator = Generator
