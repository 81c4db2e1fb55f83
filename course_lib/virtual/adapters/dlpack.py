"""DLPack hands on an address in memory, and nobody else could read a virtual GPU's: refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Let every way of exporting a virtual tensor refuse. To be called once."""
    to_dlpack = torch.utils.dlpack.to_dlpack

    def export(tensor: torch.Tensor) -> Any:
        return _refuse(tensor) if isinstance(tensor, VirtualTensor) else to_dlpack(tensor)

    torch.utils.dlpack.to_dlpack = torch.to_dlpack = export
    VirtualTensor.__dlpack__ = VirtualTensor.__dlpack_device__ = _refuse


def _refuse(tensor: VirtualTensor, *args: Any, **kwargs: Any) -> NoReturn:
    raise BufferError(
        f"a tensor on {tensor.device} cannot be exported through DLPack: its memory is simulated. "
        "Use x.cpu() first."
    )
