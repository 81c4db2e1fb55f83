"""Sparse, nested and quantized tensors are refused in one line.

PyTorch would say of each operator that it has no kernel for ``NestedTensorvgpu``, in pages.

Rests on ``torch.nested._internal.nested_tensor.NestedTensor`` and, for operators, on the names of
PyTorch's dispatch keys.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.tensor import VirtualTensor, not_dense

_NESTED, _QUANTIZED = "nested ones: pad them", "quantized ones"
_KEYS = {
    "NestedTensorPrivateUse1": _NESTED,
    "QuantizedPrivateUse1": _QUANTIZED,
    "SparsePrivateUse1": "sparse ones",
    "SparseCsrPrivateUse1": "sparse ones",
}


def register() -> list[torch.library.Library]:
    """Let every way to such a tensor refuse.

    Returns:
        The libraries of operators, which must be kept.
    """
    libraries = []
    for key, what in _KEYS.items():
        libraries.append(torch.library.Library("_", "IMPL", key))
        libraries[-1].fallback(_refusing(what))
    _refuse_ragged()
    return libraries


def _refusing(what: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise not_dense(what)

    return refuse


def _refuse_ragged() -> None:
    """Those of ``layout=torch.jagged`` are made in Python, around a tensor with the numbers."""
    make = NestedTensor.__new__

    def make_others(cls: type, values: torch.Tensor, *args: Any, **kwargs: Any) -> NestedTensor:
        if isinstance(values, VirtualTensor):
            raise not_dense(_NESTED)
        return make(cls, values, *args, **kwargs)

    NestedTensor.__new__ = make_others
    in_cpp: Any = torch._C
    make_list = in_cpp._nested.nested_tensor

    def make_list_elsewhere(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == DEVICE_TYPE:
            raise not_dense(_NESTED)
        return make_list(*args, **kwargs)

    in_cpp._nested.nested_tensor = make_list_elsewhere
