"""``scaled_dot_product_attention`` picks its algorithm by device; here it picks the CPU's.

Tensors of another class that hold virtual ones, DTensor's, are given CUDA's flash attention, by
which PyTorch splits them, by heads or, for context parallelism, by the sequence. Its parts run the
CPU's.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual.arguments import mixed_devices
from course_lib.virtual.machine import machine
from course_lib.virtual.operators import Operator, runs
from course_lib.virtual.tensor import VirtualTensor

aten = torch.ops.aten


def register(library: torch.library.Library) -> None:
    """Register the operator for virtual GPUs."""
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    tensors = (query, key, value, attn_mask)
    for tensor in tensors[1:]:
        if tensor is not None and tensor.device != query.device:
            raise mixed_devices(query.device, tensor.device)
    if not isinstance(query, VirtualTensor) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    q, k, v, mask = (_like_on_cpu(tensor) for tensor in tensors)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
        attn_mask = torch.zeros_like(allowed, dtype=query.dtype)
        attn_mask.masked_fill_(allowed.logical_not(), float("-inf"))
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    learns_mask = attn_mask is not None and attn_mask.requires_grad
    on_cuda = machine.backing.type == "cuda"  # where the CPU's algorithm does not run
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    if choice == flash and not (learns_mask or on_cuda):
        # PyTorch 2.14 chooses it for a single sequence as well, as a batch of one.
        is_single = query.dim() == 3
        if is_single:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
            if attn_mask is not None and attn_mask.dim() == 3:
                attn_mask = attn_mask.unsqueeze(0)
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out.squeeze(0) if is_single else out
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


@runs(aten._scaled_dot_product_flash_attention.default)
def _flash(operator: Operator, args: tuple, kwargs: dict) -> tuple[Any, ...]:
    """CUDA's flash attention: what comes out, its log-sum-exp, and what is for CUDA alone."""
    query, key, value, dropout_p, is_causal = (*args, 0.0, False)[:5]
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=kwargs.get("scale")
    )
    seed_and_offset, unused = (query.new_empty(size, dtype=torch.int64) for size in ((2,), ()))
    lengths = query.shape[2], key.shape[2]
    return out, logsumexp, None, None, *lengths, seed_and_offset, unused, query.new_empty(0)


@runs(aten._scaled_dot_product_flash_attention_backward.default)
def _flash_backward(operator: Operator, args: tuple, kwargs: dict) -> tuple[Any, ...]:
    names = [argument.name for argument in operator.func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal")
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *[given[name] for name in inputs], scale=given.get("scale")
    )


def _like_on_cpu(tensor: torch.Tensor | None) -> Any:
    """A CPU tensor of the same form, numbers aside, to ask what the CPU would do with it."""
    if tensor is None or machine.backing.type == "cpu":
        return getattr(tensor, "held", tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
