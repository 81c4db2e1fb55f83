"""The backward pass in two halves: what the stage before waits for, and what nobody waits for.

The gradient of a linear layer's input is needed at once, by the layer before it. That of its weight
is needed by the optimizer alone, so it can wait for a moment in which the device would be idle (Qi
and others, "Zero Bubble Pipeline Parallelism", 2023). Each takes one matrix product: put off, they
cost what they cost together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Of one linear layer: its weight, its input, the gradient of its output.
Pending = tuple[Tensor, Tensor, Tensor]


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

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        # A weight that is computed from others (a parametrization) must get its gradient at once.
        if func is F.linear and args[1].is_leaf and args[1].requires_grad:
            return _Linear.apply(self.pending, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def add_weight_gradients(pending: list[Pending]) -> None:
    """Add to each weight's ``grad`` what backward left out."""
    for weight, x, gradient in pending:
        part = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad.add_(part)


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward does not compute the weight's gradient."""

    @staticmethod
    def forward(ctx, pending: list[Pending], x: Tensor, weight: Tensor, bias: Tensor | None = None):
        ctx.pending = pending
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        ctx.pending.append((weight, x.detach(), gradient))  # detached: its own graph can go
        _, needs_x, _, *needs_bias = ctx.needs_input_grad
        grad_x = gradient @ weight if needs_x else None
        grad_bias = gradient.flatten(0, -2).sum(0) if any(needs_bias) else None
        return (None, grad_x, None, grad_bias)[: len(ctx.needs_input_grad)]
