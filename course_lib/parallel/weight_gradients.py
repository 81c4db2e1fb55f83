"""The backward pass in two halves: what the stage before waits for, and what nobody waits for.

The gradient of a linear layer's input is needed at once, by the layer before it. That of its weight
is needed by the optimizer alone, so it can wait for a moment in which the device would be idle (Qi
and others, "Zero Bubble Pipeline Parallelism", 2023). Each takes one matrix product: put off, they
cost what they cost together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Of one linear layer: its weight, its input, the gradient of its output.
Pending = tuple[nn.Parameter, Tensor, Tensor]


class put_off_weight_gradients(TorchFunctionMode):
    """In this block, linear layers run so that backward leaves out their weights' gradients.

    What :func:`add_weight_gradients` needs for them is put on a list instead. Parameters that are
    not the weight of a linear layer (biases, norms, embeddings) get their gradients in backward,
    as ever: they are a small part of the work.

    Args:
        pending: the list.
    """

    def __init__(self, pending: list[Pending]) -> None:
        super().__init__()
        self.pending = pending

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # At once, in backward: a weight that is computed from others (a parametrization), and one
        # with a hook that wants to see or change its gradient there.
        if not (weight.is_leaf and weight.requires_grad) or weight._backward_hooks:
            return F.linear(input, weight, bias)
        # Autograd does not see the weight: hooks that run when its gradient has been added must
        # not run in backward. But something must need a gradient, or there is no backward.
        anchor = weight.detach()[:0].requires_grad_()
        return _Linear.apply(self.pending, [weight], anchor, input, bias)


def add_weight_gradients(pending: list[Pending]) -> None:
    """Add to each weight's ``grad`` what backward left out."""
    for weight, x, gradient in pending:
        part = (_rows(gradient).T @ _rows(x)).to(weight.dtype)
        weight.grad = part if weight.grad is None else weight.grad.add_(part)
        # As autograd does when it has added to a gradient: data parallelism waits for it.
        for hook in (weight._post_accumulate_grad_hooks or {}).values():
            hook(weight)


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward does not compute the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        pending: list[Pending],
        hidden_weight: list[nn.Parameter],
        anchor: Tensor,
        x: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        (weight,) = hidden_weight
        out = F.linear(x, weight, bias)
        ctx.pending, ctx.weight, ctx.types = pending, weight, (x.dtype, bias is not None)
        # Under autocast the product is in a shorter type, and so is what is kept for backward.
        ctx.save_for_backward(x.to(out.dtype), weight.detach().to(out.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype, has_bias = ctx.types
        ctx.pending.append((ctx.weight, x.detach(), gradient))  # detached: its own graph can go
        _, _, _, needs_x, needs_bias = ctx.needs_input_grad
        grad_x = (gradient @ weight).to(dtype) if needs_x else None
        grad_bias = _rows(gradient).sum(0) if has_bias and needs_bias else None
        return None, None, None, grad_x, grad_bias


def _rows(x: Tensor) -> Tensor:
    """``x`` as one row an example, whatever its dimensions: a single example is one row."""
    return x.reshape(-1, x.shape[-1])
