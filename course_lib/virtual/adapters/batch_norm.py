"""The statistics of ``SyncBatchNorm``: operators that PyTorch has for CUDA alone.

Each rank normalizes its own examples by the mean and the variance of all ranks' together. The ranks
exchange, for each channel, a mean, an inverse standard deviation and a count; in backward two sums.
Here each operator is what it computes, made of others, so that it takes their time and memory.
Statistics are float32 for inputs of 16 bits, as on CUDA.

A channel is dimension 1: N is the examples, C the channels, and ``*`` what is behind, if anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.virtual.operators import Operator, runs

aten = torch.ops.aten


def prepare() -> None:
    """Let virtual GPUs run the operators. To be called once."""
    for overload, handler in (
        (aten.batch_norm_stats.default, _stats),
        (aten.batch_norm_gather_stats_with_counts.default, _gather_stats),
        (aten.batch_norm_elemt.default, _normalize),
        (aten.batch_norm_backward_reduce.default, _backward_sums),
        (aten.batch_norm_backward_elemt.default, _backward),
    ):
        runs(overload)(handler)


def _stats(operator: Operator, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each channel of what one rank has."""
    x_NC, eps = args
    variance_C, mean_C = torch.var_mean(_fine(x_NC), _all_but_channels(x_NC), correction=0)
    return mean_C, (variance_C + eps).rsqrt()


def _gather_stats(operator: Operator, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """The same of all ranks' numbers, from theirs, [ranks, C]; the running ones move there."""
    _, mean_RC, invstd_RC, running_mean, running_var, momentum, eps, count_R = args
    weight_R1 = (count_R / count_R.sum()).to(mean_RC.dtype).unsqueeze(1)
    mean_C = (weight_R1 * mean_RC).sum(0)
    own_RC = invstd_RC.square().reciprocal() - eps
    variance_C = (weight_R1 * (own_RC + (mean_RC - mean_C).square())).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
    if running_var is not None:
        count = count_R.sum()
        unbiased_C = variance_C * (count / (count - 1)).to(variance_C.dtype)
        running_var.lerp_(unbiased_C.to(running_var.dtype), momentum)
    return mean_C, (variance_C + eps).rsqrt()


def _normalize(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    x_NC, weight, bias, mean, invstd, _ = args
    like = _fine(x_NC)
    scale = invstd if weight is None else invstd * weight
    y_NC = (like - _as_channels(mean, like)) * _as_channels(scale, like)
    if bias is not None:
        y_NC = y_NC + _as_channels(bias, like)
    return y_NC.to(x_NC.dtype)


def _backward_sums(operator: Operator, args: tuple, kwargs: dict) -> tuple[Any, ...]:
    """What ranks add up in backward, and the gradients of weight and bias of this rank's part."""
    grad_NC, x_NC, mean, invstd, weight, _, needs_weight, needs_bias = args
    grad, like, dims = _fine(grad_NC), _fine(x_NC), _all_but_channels(x_NC)
    sum_C = grad.sum(dims)
    sum_with_x_C = (grad * (like - _as_channels(mean, like))).sum(dims)
    grad_weight = grad_bias = None
    if weight is not None:
        grad_weight = (sum_with_x_C * invstd).to(weight.dtype) if needs_weight else None
        grad_bias = sum_C.to(weight.dtype) if needs_bias else None
    return sum_C, sum_with_x_C, grad_weight, grad_bias


def _backward(operator: Operator, args: tuple, kwargs: dict) -> Tensor:
    """The gradient of one rank's input, from the sums over all."""
    grad_NC, x_NC, mean, invstd, weight, sum_C, sum_with_x_C, count_R = args
    grad, like = _fine(grad_NC), _fine(x_NC)
    count = count_R.sum().to(invstd.dtype)
    slope_C = sum_with_x_C * invstd.square() / count
    scale = invstd if weight is None else invstd * weight
    centred = grad - _as_channels(sum_C / count, like)
    centred = centred - (like - _as_channels(mean, like)) * _as_channels(slope_C, like)
    return (centred * _as_channels(scale, like)).to(x_NC.dtype)


def _fine(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_but_channels(x_NC: Tensor) -> list[int]:
    return [dim for dim in range(x_NC.dim()) if dim != 1]


def _as_channels(value_C: Tensor, like: Tensor) -> Tensor:
    """One number a channel, as a tensor that can be added to ``like``."""
    return value_C.view(1, -1, *[1] * (like.dim() - 2))
