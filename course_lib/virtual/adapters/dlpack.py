"""DLPack hands on an address in memory, and nobody else could read a virtual GPU's: refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Let every way of exporting a virtual tensor refuse. To be called once."""
    pytorch: Any = torch
    to_dlpack = torch.utils.dlpack.to_dlpack

    def export(tensor: torch.Tensor, *how: Any, **options: Any) -> Any:
        if isinstance(tensor, VirtualTensor):
            _refuse(tensor)
        return to_dlpack(tensor, *how, **options)

    pytorch.utils.dlpack.to_dlpack = pytorch.to_dlpack = export
    tensor_class: Any = VirtualTensor
    tensor_class.__dlpack__ = tensor_class.__dlpack_device__ = _refuse


def _refuse(tensor: VirtualTensor, *args: Any, **kwargs: Any) -> NoReturn:
    raise BufferError(
        f"a tensor on {tensor.device} cannot be exported through DLPack: its memory is simulated. "
        "Use x.cpu() first."
    )
