"""``Module.to`` for virtual GPUs: every parameter stays the object that it was.

On CUDA a parameter that moves keeps its identity, so that two layers may share it and an optimiser
may hold it: PyTorch sets its ``.data``. For a device type of its own it makes a new parameter,
because it takes the two for incompatible. They are not: ``data_attribute`` sets the one to the
other. Models that stay on the CPU are moved and cast by PyTorch alone.

Rests on ``torch._has_compatible_shallow_copy_type``, ``Module._apply`` and
``torch.nn.parameter.UninitializedTensorMixin``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import parameter

from course_lib.virtual.operators import Operator
from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    _set_data_while_moving()
    _move_placeholders()
    _materialize_where_told()


def _set_data_while_moving() -> None:
    in_cpp = torch._has_compatible_shallow_copy_type

    def is_compatible(input: torch.Tensor, from_: torch.Tensor) -> bool:
        if isinstance(input, VirtualTensor) or isinstance(from_, VirtualTensor):
            return input.device.type != "meta" and from_.device.type != "meta"
        return in_cpp(input, from_)

    torch._has_compatible_shallow_copy_type = is_compatible
    # Tensor.to asks it too, and under inference_mode it gets as far as here.
    compatible = torch.ops.aten._has_compatible_shallow_copy_type.default
    Operator.of(compatible).handler = lambda operator, args, kwargs: False


def _move_placeholders() -> None:
    apply = nn.Module._apply

    def apply_to_all(self: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
        waiting = _take_placeholders(self)
        try:
            return apply(self, fn, recurse)
        finally:
            for holder, name, placeholder in waiting:
                holder[name] = placeholder
                placeholder.moves = [*getattr(placeholder, "moves", ()), fn]

    nn.Module._apply = apply_to_all


def _take_placeholders(module: nn.Module) -> list[tuple[dict, str, Any]]:
    """Take out what a lazy module has in place of parameters until it is first called."""
    waiting = []
    for holder in (module._parameters, module._buffers):
        for name, value in holder.items():
            if value is not None and parameter.is_lazy(value):
                waiting.append((holder, name, value))
                holder[name] = None
    return waiting


def _materialize_where_told() -> None:
    """A placeholder has no numbers to move: it moves when it gets some."""
    placeholder: Any = vars(parameter)["UninitializedTensorMixin"]
    materialize = placeholder.materialize

    def materialize_and_move(self: Any, shape: Any, device: Any = None, dtype: Any = None) -> None:
        materialize(self, shape, device, dtype)
        with torch.no_grad():
            for move in self.__dict__.pop("moves", ()):
                there = move(self)
                if isinstance(self, nn.Parameter):
                    there = nn.Parameter(there, self.requires_grad)
                torch.utils.swap_tensors(self, there)

    placeholder.materialize = materialize_and_move
