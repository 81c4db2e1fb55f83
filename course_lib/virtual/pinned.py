"""Pinned memory: host memory that a GPU can copy from while the host goes on.

There is no GPU here that could tell the difference, but programs ask for it and ask about it. A
pinned tensor is an ordinary one whose storage carries a mark.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def register() -> torch.library.Library:
    """Let ``pin_memory`` and ``is_pinned`` of CPU tensors know the mark.

    Returns:
        The library of operators, which must be kept.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("is_pinned", is_pinned, "CPU")
    library.impl("_pin_memory", _pin_memory, "CPU")
    return library


def is_pinned(tensor: torch.Tensor, device: torch.device | None = None) -> bool:
    """Whether ``tensor``, on the CPU, is in memory that ``pin_memory`` made."""
    return getattr(tensor.untyped_storage(), "is_pinned_for_vgpu", False)


def _pin_memory(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    copy = tensor.clone()
    mark(copy)
    return copy


def mark(tensor: torch.Tensor) -> None:
    """Let ``tensor``, on the CPU, count as pinned."""
    storage: Any = tensor.untyped_storage()
    storage.is_pinned_for_vgpu = True
