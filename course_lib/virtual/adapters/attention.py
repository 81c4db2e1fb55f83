"""``scaled_dot_product_attention`` picks its algorithm by device; here it picks the CPU's."""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual.arguments import mixed_devices
from course_lib.virtual.machine import machine

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


def _like_on_cpu(tensor: torch.Tensor | None) -> Any:
    """A CPU tensor of the same form, numbers aside, to ask what the CPU would do with it."""
    if tensor is None or machine.backing.type == "cpu":
        return getattr(tensor, "held", tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
