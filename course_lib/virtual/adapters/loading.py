"""``torch.save`` and ``torch.load``: from any device to a virtual GPU, and from one to any device.

A file names for each storage the device that it was on. For virtual GPUs the name is
``privateuseone:2``, which every PyTorch knows: one without this library loads the file with
``map_location="cpu"``, and without it says so. Programs that ask, as a ``map_location`` that is a
dictionary or a function does, are told ``vgpu:2``.

Rests on ``torch.serialization.register_package`` and ``torch.serialization._get_restore_location``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from course_lib.virtual.machine import machine
from course_lib.virtual.spec import DEVICE_TYPE

_IN_FILES = "privateuseone"
_BEFORE_OTHERS = 9  # the CPU's priority is 10


def prepare() -> None:
    """Let PyTorch save from and load to virtual GPUs. To be called once, before there are any."""
    torch.serialization.register_package(_BEFORE_OTHERS, _name_in_files, _send)
    restore_location = torch.serialization._get_restore_location

    def restore_named(map_location: Any) -> Callable[[Any, str], Any]:
        restore = restore_location(map_location)
        return lambda storage, location: restore(storage, location.replace(_IN_FILES, DEVICE_TYPE))

    torch.serialization._get_restore_location = restore_named


def _name_in_files(storage: Any) -> str | None:
    device = storage.device
    return f"{_IN_FILES}:{device.index}" if device.type == DEVICE_TYPE else None


def _send(storage: Any, location: str) -> Any:
    if not location.startswith(DEVICE_TYPE):
        return None
    if machine.device_count == 0:
        raise RuntimeError(
            f"there is no {location} to load this to yet: call course_lib.devices(4) first, or "
            "load it with map_location='cpu'"
        )
    if getattr(storage, "_torch_load_uninitialized", False):  # an old file; its numbers come later
        empty = torch.empty(storage.nbytes(), dtype=torch.uint8, device=location)
        return empty.untyped_storage()
    return storage.to(device=location)
