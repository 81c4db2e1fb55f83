"""DDP on GPUs without numbers: what it sends of itself, each rank reads as it sent it.

DDP's C++ code tells the other ranks, through the GPUs, how many parameters a model has, of which
shapes, in which order their gradients came and which were used; then it reads what arrived. With
``backing="meta"`` nothing arrives. But ranks that run one program all send the same, so what a rank
has put on its GPU itself is what it is to read. Bytes and seconds are those of the messages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.virtual.copies import charge_copy
from course_lib.virtual.machine import machine
from course_lib.virtual.tensor import VirtualTensor

aten = torch.ops.aten


class OwnNumbers(TorchDispatchMode):
    """In the block, who reads from a GPU without numbers gets what was put there last, of as many
    numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._put: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], VirtualTensor):
            machine.clock.current[args[0].device.index].synchronize()
            return self._put[1].item()
        if func is aten.copy_.default and _is_on_host(args[0]) and not _is_on_host(args[1]):
            charge_copy(args[1], args[0])
            return args[0].copy_(self._put[args[0].numel()].view_as(args[0]))
        if func in (aten.copy_.default, aten._to_copy.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if _is_on_host(source):
                self._put[source.numel()] = source
        return func(*args, **kwargs)


def _is_on_host(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu"
