"""``torch.Stream("vgpu:1")`` and ``torch.Event("vgpu:1")`` are streams and events of that GPU.

PyTorch's own classes ask a device guard, and one written in Python has no streams to give. So the
two names are taken by classes that make a virtual GPU's where one is asked for, and PyTorch's
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual import streams
from course_lib.virtual.adapters.device_module import CurrentEvent, NewStream
from course_lib.virtual.machine import DEVICE_TYPE

_StreamInCpp, _EventInCpp = torch.Stream, torch.Event


class _Kind(type):
    """Whoever asks ``isinstance(x, torch.Stream)`` means PyTorch's class as well."""

    classes: tuple[type, ...]

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.classes)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.classes)


class Stream(metaclass=_Kind):
    """What ``torch.Stream`` is once there are virtual GPUs."""

    classes = (_StreamInCpp, streams.Stream)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if _is_here(*args, **kwargs):
            return NewStream(*args, **kwargs)
        return _StreamInCpp(*args, **kwargs)


class Event(metaclass=_Kind):
    """What ``torch.Event`` is once there are virtual GPUs."""

    classes = (_EventInCpp, streams.Event)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not _is_here(*args, **kwargs):
            return _EventInCpp(*args, **kwargs)
        device = kwargs.pop("device", None) if not args else args[0]
        return CurrentEvent(**kwargs, device=device)


def prepare() -> None:
    """Put them in the place of PyTorch's classes. To be called once."""
    pytorch: Any = torch
    pytorch.Stream, pytorch.Event = Stream, Event


def _is_here(device: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Whether a virtual GPU is meant: by name, by its number, or as the current device."""
    if args or "stream_id" in kwargs or "device_type" in kwargs:  # made in C++ before
        return False
    if device is None or isinstance(device, int):
        return torch._C._get_accelerator().type == DEVICE_TYPE
    return torch.device(device).type == DEVICE_TYPE
