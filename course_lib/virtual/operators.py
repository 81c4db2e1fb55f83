"""What must be known of one operator of PyTorch, looked up once, and who runs it.

``@runs(aten.copy_.default)`` lets the function below it run that operator on virtual GPUs, and
``@runs_all_others`` the one that runs whatever has no function of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from course_lib.virtual.cost import bytes_formula, flops_formula, reads_nothing, runs_nothing

aten = torch.ops.aten

# Takes the operator, its arguments and its keyword arguments, and returns what it returns.
Handler = Callable[["Operator", tuple, dict], Any]

_handlers: dict[torch._ops.OpOverload | None, Handler] = {}


def runs(*overloads: torch._ops.OpOverload) -> Callable[[Handler], Handler]:
    """Let the decorated function run ``overloads``. To be called before any of them runs."""

    def register(handler: Handler) -> Handler:
        _handlers.update(dict.fromkeys(overloads, handler))
        return handler

    return register


def runs_all_others(handler: Handler) -> Handler:
    """Let the decorated function run every operator that has no function of its own."""
    _handlers[None] = handler
    return handler


def _decompose(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """Run an operator as those that it is made of: under ``inference_mode`` nobody else does."""
    return operator.func.decompose(*args, **kwargs)


_OUTGROW = {
    *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution),
    *(aten._cdist_forward, aten._euclidean_dist),
    *(aten.embedding, aten.index, aten.index_select, aten.cat, aten.stack),
}
# Two tensors of 45 kB each are the least of which something large can come, in four bytes a number.
_LEAST = 2_000_000_000
_IF_SPREAD = 1 << 1000  # less than infinity; compared with another whole number it takes less time


class Operator:
    """One operator: how to run it, and what it does to its arguments."""

    def __init__(self, func: torch._ops.OpOverload) -> None:
        schema = func._schema
        returned = [str(value.type) for value in schema.returns]
        # What calling ``func`` calls in the end, without the detour.
        self.run: Callable = _QUICKER.get(func, func._op)
        self.func = func
        self.handler: Handler = _handlers.get(func) or (
            _decompose if self._is_made_of_others() else _handlers[None]
        )
        self.name: str = func._opname
        self.runs_nothing = runs_nothing(func)
        self.reads_nothing = reads_nothing(func)
        self.flops = flops_formula(func)
        self.bytes_moved = bytes_formula(func)
        self.is_mutable: bool = schema.is_mutable
        self.writes = [
            argument.name if argument.kwarg_only else position
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            # A fused optimizer changes gradients only if it is given a grad_scale to undo.
            and not (self.name.startswith("_fused_") and argument.name == "grads")
        ]
        # Only _unsafe_view and its like say that what they return is new, and return a view.
        self.returns_new = (
            set(returned) == {"Tensor"}
            and all(value.alias_info is None for value in schema.returns)
            and not func._can_decompose()
            and "unsafe" not in self.name
        )
        self.may_resize = any(argument.is_out for argument in schema.arguments)
        self.is_pointwise = torch.Tag.pointwise in func.tags
        # From how many bytes of all tensors, multiplied, far more may come out than goes in.
        outgrows = func._overloadpacket in _OUTGROW or self.is_pointwise
        self.may_outgrow_from = _LEAST if outgrows and self.returns_new else _IF_SPREAD
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        # The host cannot go on without the number, or the shape.
        self.host_waits = torch.Tag.dynamic_output_shape in func.tags or (
            not self.is_mutable and not any("Tensor" in kind for kind in returned)
        )
        # Where a tensor without dimensions may be on the host, as a Python number would be.
        self.takes_host_scalars = self.is_pointwise or (
            self.name.removesuffix("_") in _TAKES_HOST_SCALARS
            or self.name.startswith(("_foreach", "_fused"))
        )
        self.takes_host_indices = self.name.removesuffix("_") in _INDEXES

    def _is_made_of_others(self) -> bool:
        """Whether PyTorch knows it by other operators only; then it runs and counts as those."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return self.func._can_decompose() and not has_kernel(self.func.name(), "CPU")

    @classmethod
    def of(cls, func: torch._ops.OpOverload) -> Operator:
        if id(func) not in known_operators:
            known_operators[id(func)] = cls(func)
        return known_operators[id(func)]


# Pointwise operators that PyTorch does not tag so, and those that read one number.
_TAKES_HOST_SCALARS = set(
    "copysign eq ne ge gt le lt gcd lcm heaviside floor_divide rsub where polar complex fill "
    "masked_fill index_fill huber_loss mse_loss smooth_l1_loss soft_margin_loss dist bernoulli "
    "normal linspace logspace __lshift__ __rshift__ __ilshift__ __irshift__".split()
)
_INDEXES = {"index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"}


# By id, because hashing an operator takes a call to Python; operators live for ever.
known_operators: dict[int, Operator] = {}


# Python's own bindings read their arguments faster than an operator does that is called by name:
# a microsecond for each of the operators that training consists of.
_QUICKER: dict[torch._ops.OpOverload, Callable] = {
    aten._softmax.default: torch._softmax,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.sub.Tensor: torch.sub,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.view.default: torch.Tensor.view,
}
