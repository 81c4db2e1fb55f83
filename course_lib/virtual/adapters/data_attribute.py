"""``p.data = p.data.to(gpu)``: the tensor moves, and stays the object that it was.

Between real devices PyTorch lets ``p`` take over what ``p.data.to(gpu)`` holds. Between a tensor of
its own and a virtual one it does not, because they are of two classes: here the two exchange class
and contents. The gradient, if there is one, moves with its tensor. A graph that was recorded before
keeps what it saved, and hands its gradient to the tensor that was.

Rests on ``torch._C._swap_tensor_impl``, as ``torch.utils.swap_tensors`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from course_lib.virtual.tensor import OF_VIRTUAL_TENSORS, VirtualTensor

_in_cpp: Any = torch._C.TensorBase.data
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    tensor_class: Any = torch.Tensor
    tensor_class.data = property(_in_cpp.__get__, _set_data)


def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(self, VirtualTensor) and isinstance(value, VirtualTensor):
        with torch._C._DisableTorchDispatch():
            _in_cpp.__set__(self, value)
        self.held, self.allocation = value.held, value.allocation
    elif isinstance(self, VirtualTensor) or isinstance(value, VirtualTensor):
        become(self, value)
    else:
        _in_cpp.__set__(self, value)


def become(self: torch.Tensor, value: torch.Tensor) -> None:
    """Give ``self``, a leaf, the numbers and the device of ``value``.

    Raises:
        RuntimeError: ``self`` is the result of other tensors.
    """
    if not self.is_leaf:
        raise RuntimeError(
            f"cannot set .data of a result of other tensors, on {self.device}, to a tensor on "
            f"{value.device}: take y = x.to({str(value.device)!r}) instead"
        )
    value = value.detach()
    other: torch.Tensor
    if isinstance(self, nn.Parameter):
        other = nn.Parameter(value, self.requires_grad)
    else:
        other = value.requires_grad_(self.requires_grad)
    gradient = self.grad
    if gradient is not None:  # stays the object that it was, too
        moved = gradient.to(other)
        self.grad = None
        become(gradient, moved)
        other.grad = gradient
    for name in _HOOKS:
        if getattr(self, name):
            setattr(other, name, getattr(self, name))
    kept = {name: own for name, own in vars(self).items() if name not in OF_VIRTUAL_TENSORS}
    self.__class__, other.__class__ = other.__class__, self.__class__
    self.__dict__, other.__dict__ = {**vars(other), **kept}, vars(self)
    torch._C._swap_tensor_impl(self, other)
