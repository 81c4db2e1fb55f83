"""PyTorch's tracers refuse virtual GPUs, in one line.

``torch.compile`` takes what it does not know for a Python object, and would go on to compile the
virtual GPUs' own code, with pages of warnings. Before that it asks every tensor of a class that it
does not know for ``__tensor_flatten__``, and this is the answer. ``make_fx``, which
``torch.func.linearize`` uses, would take what it computed while tracing for constants.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.fx.experimental.proxy_tensor import _MakefxTracer
from torch.utils._pytree import tree_leaves

from course_lib.virtual.tensor import VirtualTensor

_REFUSAL = (
    "torch.compile does not work on virtual GPUs: their operators run in Python, one by one, and "
    "there is nothing to compile. Call the model as it is."
)


def prepare() -> None:
    """Let both refuse. To be called once."""
    tensor_class: Any = VirtualTensor
    tensor_class.__tensor_flatten__ = property(_refuse_while_tracing)
    trace = _MakefxTracer.trace

    def trace_others(self: _MakefxTracer, f: Any, *args: Any) -> Any:
        if any(isinstance(leaf, VirtualTensor) for leaf in tree_leaves(args)):
            raise RuntimeError(
                "make_fx does not work on virtual GPUs, nor does torch.func.linearize, which is "
                "made with it. Use torch.func.jvp."
            )
        return trace(self, f, *args)

    _MakefxTracer.trace = trace_others


def _refuse_while_tracing(tensor: VirtualTensor) -> NoReturn:
    if torch._guards.TracingContext.try_get() is None:  # others ask too, and have no such thing
        raise AttributeError("__tensor_flatten__")
    raise _refusal()


def _refusal() -> Exception:
    from torch._dynamo.exc import TorchRuntimeError  # a large import, made by torch.compile

    class CompileRefused(TorchRuntimeError):
        """PyTorch adds a page about its tracer to a message, and none of it helps here."""

        def __str__(self) -> str:
            return _REFUSAL

    return CompileRefused(_REFUSAL)
