"""``torch.load(map_location="vgpu:2")``: what was saved on any device arrives on a virtual GPU.

PyTorch reads a storage, moves it, and builds tensors on it. A storage cannot be on a virtual GPU,
only a tensor can: so the storage stays on the host, is told where to go, and the tensors that are
built on it are views of one tensor there.

Rests on ``torch.serialization.register_package`` and ``torch._utils._rebuild_tensor``.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    rebuild = torch._utils._rebuild_tensor

    def rebuild_there(storage: Any, offset: int, shape: Any, stride: Any) -> torch.Tensor:
        untyped = storage._untyped_storage
        if not hasattr(untyped, "vgpu_location"):
            return rebuild(storage, offset, shape, stride)
        if not hasattr(untyped, "on_vgpu"):
            everything = torch.empty(0, dtype=torch.uint8).set_(untyped)
            untyped.on_vgpu = everything.to(untyped.vgpu_location)
        row = untyped.on_vgpu.view(storage.dtype)
        return row.as_strided(shape, stride, offset)

    torch._utils._rebuild_tensor = rebuild_there
    torch.serialization.register_package(9, lambda storage: None, _send)


def _send(storage: Any, location: str) -> Any:
    if not location.startswith(DEVICE_TYPE):
        return None
    storage.vgpu_location = location
    return storage
