"""``Module.to`` for virtual GPUs: every parameter stays the object that it was.

On CUDA a parameter that moves keeps its identity, so that two layers may share it and an optimiser
may hold it. For a device type of its own PyTorch makes new parameters, unless it is told to swap
their contents; that setting holds for ``load_state_dict`` too, where it breaks ``nn.LSTM`` and its
like. Here it holds while a module moves, on the thread that moves it.

Rests on ``torch.__future__.get_swap_module_params_on_conversion``, ``Module._apply`` and
``torch.nn.parameter.UninitializedTensorMixin``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin, is_lazy

from course_lib.virtual.operators import Operator


class _Moving(threading.local):
    now = False


_moving = _Moving()


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    _swap_while_moving()
    # Module.to asks it of tensors on two devices, and under inference_mode it gets as far as here.
    compatible = torch.ops.aten._has_compatible_shallow_copy_type.default
    Operator.of(compatible).handler = lambda operator, args, kwargs: False
    _materialize_where_told()


def _swap_while_moving() -> None:
    apply, was_set = nn.Module._apply, torch.__future__.get_swap_module_params_on_conversion

    def apply_swapping(self: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
        outer, _moving.now = _moving.now, True
        waiting = _take_placeholders(self)
        try:
            return apply(self, fn, recurse)
        finally:
            _moving.now = outer
            for holder, name, placeholder in waiting:
                holder[name] = placeholder
                placeholder.moves = [*getattr(placeholder, "moves", ()), fn]

    nn.Module._apply = apply_swapping
    torch.__future__.get_swap_module_params_on_conversion = lambda: _moving.now or was_set()


def _take_placeholders(module: nn.Module) -> list[tuple[dict, str, Any]]:
    """Take out what a lazy module has in place of parameters until it is first called."""
    waiting = []
    for holder in (module._parameters, module._buffers):
        for name, value in holder.items():
            if is_lazy(value):
                waiting.append((holder, name, value))
                holder[name] = None
    return waiting


def _materialize_where_told() -> None:
    """A placeholder has no numbers to move: it moves when it gets some."""
    materialize = UninitializedTensorMixin.materialize

    def materialize_and_move(self: Any, shape: Any, device: Any = None, dtype: Any = None) -> None:
        materialize(self, shape, device, dtype)
        with torch.no_grad():
            for move in self.__dict__.pop("moves", ()):
                there = move(self)
                if isinstance(self, nn.Parameter):
                    there = nn.Parameter(there, self.requires_grad)
                torch.utils.swap_tensors(self, there)

    UninitializedTensorMixin.materialize = materialize_and_move
