"""A gradient on another device than its tensor is refused, in the words of CUDA.

PyTorch's autograd engine checks devices, and spares tensor subclasses. So the check is made where a
gradient comes from outside: from the caller of backward, from a hook, and from the backward of an
``autograd.Function``.

Rests on ``torch.autograd.function.BackwardCFunction`` and ``Node._input_metadata``.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    run_backward = BackwardCFunction.apply
    register_hook = torch.Tensor.register_hook

    def apply_checked(self: Any, *args: Any) -> Any:
        gradients = run_backward(self, *args)
        each = list(gradients) if isinstance(gradients, tuple) else [gradients]
        # Gradients are counted over all inputs, next functions over those that are tensors: the
        # two meet in the inputs that need a gradient.
        nodes = iter([following for following in self.next_functions if following[0] is not None])
        for index, (gradient, is_needed) in enumerate(
            zip(each, self.needs_input_grad, strict=False)
        ):
            if not is_needed:
                continue
            node, place = next(nodes)
            if isinstance(gradient, torch.Tensor):
                expected = node._input_metadata[place].device
                if DEVICE_TYPE in (gradient.device.type, expected.type):
                    whose = f"Function {self.name()} returned an "
                    each[index] = _there(gradient, expected, index, whose)
        return tuple(each)

    def register_checked(self: torch.Tensor, hook: Any) -> Any:
        device = self.device

        @wraps(hook)
        def checked(gradient: torch.Tensor) -> torch.Tensor | None:
            result = hook(gradient)
            if isinstance(result, torch.Tensor):
                check(result, device, 0, f"hook {getattr(hook, '__name__', hook)} returned an ")
            return result

        return register_hook(self, checked)

    BackwardCFunction.apply = apply_checked
    VirtualTensor.register_hook = register_checked


def check_roots(tensors: tuple, gradients: tuple) -> tuple:
    """What ``backward`` is called with: a number moves to its tensor, all else must be there.

    Raises:
        RuntimeError: a gradient is on another device than its tensor.
    """
    checked = []
    for index, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        if isinstance(tensor, torch.Tensor) and isinstance(gradient, torch.Tensor):
            gradient = _there(gradient, tensor.device, index)
        checked.append(gradient)
    return tuple(checked)


def _there(
    gradient: torch.Tensor, device: torch.device, index: int, whose: str = ""
) -> torch.Tensor:
    """``gradient`` on ``device``: one number is moved, as by CUDA's engine; all else is checked."""
    if gradient.device != device and gradient.dim() == 0:
        return gradient.to(device)
    check(gradient, device, index, whose)
    return gradient


def check(gradient: torch.Tensor, device: torch.device, index: int, whose: str = "") -> None:
    """Raise CUDA's error if ``gradient`` is not on ``device``."""
    if gradient.device != device:
        raise RuntimeError(
            f"{whose}invalid gradient at index {index} - expected device {device} "
            f"but got {gradient.device}"
        )
