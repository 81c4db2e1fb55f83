"""Attention in blocks: to some of the keys at a time, merged with a running softmax.

What lesson 07 derives (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018;
Liu and others, "Ring Attention with Blockwise Transformers", 2023). Shape suffixes are those of
``models``; Q and S are how many queries and keys take part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(
    q_BHQK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention to one block of keys and values, as if there were no others.

    Args:
        causal: whether query i sees keys 0 to i alone.

    Returns:
        The output, [B, H, Q, K], and the logarithm of each query's sum of exponentials,
        [B, H, Q, 1]; both at least in float32, since more is to be added.
    """
    scores_BHQS = _scores(q_BHQK, k_BHSK, causal)
    log_sum = scores_BHQS.logsumexp(-1, keepdim=True)
    weights_BHQS = scores_BHQS.sub_(log_sum).exp_()
    return wide(weights_BHQS.to(v_BHSK.dtype) @ v_BHSK), log_sum


def merge(out: Tensor, log_sum: Tensor, out_2: Tensor, log_sum_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two blocks together, from what :func:`attend` returned for each.

    Each output counts by its share of the common sum. That is at most one: nothing overflows.

    Args:
        out, out_2: the output of the same queries for each block, [B, H, Q, K].
        log_sum, log_sum_2: the logarithm of each query's sum of exponentials, [B, H, Q, 1].

    Returns:
        Both for the two blocks together, of the same shapes.
    """
    both = torch.logaddexp(log_sum, log_sum_2)
    return out * (log_sum - both).exp() + out_2 * (log_sum_2 - both).exp(), both


def attend_backward(
    q_BHQK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    causal: bool,
    log_sum_BHQ1: Tensor,
    grad_BHQK: Tensor,
    dot_BHQ1: Tensor,
) -> tuple[Tensor, Tensor]:
    """What one block of keys and values adds to the gradients.

    The weights are too large to keep, and are computed again; ``log_sum_BHQ1``, the one over all
    blocks, gives them as they are among all keys.

    Args:
        causal: as :func:`attend` takes it.
        grad_BHQK: the gradient of the output over all blocks.
        dot_BHQ1: its dot product with that output.

    Returns:
        The gradient of the queries, [B, H, Q, K], and that of keys and values as one tensor,
        [2, B, H, S, K].
    """
    weights_BHQS = _scores(q_BHQK, k_BHSK, causal).sub_(log_sum_BHQ1).exp_()
    v_grad_BHSK = weights_BHQS.to(q_BHQK.dtype).mT @ grad_BHQK
    # Softmax backward: each weight times (its own gradient less the weights' mean gradient).
    weights_grad_BHQS = grad_BHQK @ v_BHSK.mT
    scores_grad_BHQS = weights_BHQS.mul_(weights_grad_BHQS - dot_BHQ1).to(q_BHQK.dtype)
    scale = 1 / math.sqrt(q_BHQK.shape[-1])
    q_grad_BHQK = scores_grad_BHQS @ k_BHSK * scale
    k_grad_BHSK = scores_grad_BHQS.mT @ q_BHQK * scale
    return q_grad_BHQK, torch.stack([k_grad_BHSK, v_grad_BHSK])


def _scores(q_BHQK: Tensor, k_BHSK: Tensor, causal: bool) -> Tensor:
    scores_BHQS = wide(q_BHQK / math.sqrt(q_BHQK.shape[-1]) @ k_BHSK.mT)
    if causal:
        future_QS = torch.ones_like(scores_BHQS[0, 0], dtype=torch.bool).triu(1)
        scores_BHQS.masked_fill_(future_QS, -math.inf)
    return scores_BHQS


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least, for sums to which more is to be added."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
