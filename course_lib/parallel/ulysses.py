"""Ulysses: attention to a sequence in parts, by dealing out the heads while it is computed.

All of a GPT but attention works on each token alone, and attention works on each head alone. So an
all-to-all before it turns parts of the sequence with all heads into the whole sequence with some
heads, and one after it turns that back (Jacobs and others, "DeepSpeed Ulysses", 2023).

A device sends 4 (N - 1) / N^2 times the bytes of one of the four tensors, whole, where a ring of
keys and values sends 2 (N - 1) / N: less from N = 3 on. But there must be a head for each device.

A value is a list with one tensor a device. Shape suffixes are those of ``models``, with T the
tokens of one device.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from course_lib.parallel.kinds import Tensors
from course_lib.parallel.regions import exchange
from course_lib.parallel.sequence_order import require_order


def ulysses_attention(
    qs_BHTK: Tensors, ks_BHTK: Tensors, vs_BHTK: Tensors, causal: bool
) -> list[Tensor]:
    """Each device's part of the attention of a sequence that no device has the whole of.

    Args:
        qs_BHTK, ks_BHTK, vs_BHTK: parts of one sequence, one a device, all of one shape, in
            contiguous order (``split_sequence(..., zigzag=False)``): here all have equally much to
            do in that order.
        causal: whether a token sees only itself and those before it.

    Raises:
        ValueError: there is not one part of each for every device, the heads do not divide among
            the devices, or the parts were split in zigzag order.
    """
    for parts in (qs_BHTK, ks_BHTK, vs_BHTK):
        require_order(parts, zigzag=False)
    if not len(qs_BHTK) == len(ks_BHTK) == len(vs_BHTK) > 0:
        raise ValueError(
            "Ulysses takes one part of each a device, not "
            f"{len(qs_BHTK)}, {len(ks_BHTK)} and {len(vs_BHTK)}"
        )
    qs, ks, vs = (_to_heads(parts) for parts in (qs_BHTK, ks_BHTK, vs_BHTK))
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        for q, k, v in zip(qs, ks, vs, strict=True)
    ]
    return _to_sequence(outs)


def _to_heads(parts_BHTK: Tensors) -> list[Tensor]:
    """From all heads of T tokens, [B, H, T, K], to H/N heads of all, [B, H/N, N T, K]."""
    count, heads = len(parts_BHTK), parts_BHTK[0].shape[1]
    if heads % count:
        raise ValueError(f"{heads} heads do not divide among {count} devices")
    arrived = exchange([part.chunk(count, dim=1) for part in parts_BHTK])
    return [from_all_NBHTK.permute(1, 2, 0, 3, 4).flatten(2, 3) for from_all_NBHTK in arrived]


def _to_sequence(heads_BHSK: Tensors) -> list[Tensor]:
    """And back."""
    arrived = exchange([part.chunk(len(heads_BHSK), dim=2) for part in heads_BHSK])
    return [from_all_NBHTK.transpose(0, 1).flatten(1, 2) for from_all_NBHTK in arrived]


def ulysses_bytes(devices: int, nbytes: int) -> int:
    """Bytes that a forward pass moves between all devices; its backward pass moves as many.

    Args:
        nbytes: of the queries of the whole sequence; keys, values and outputs have as many.
    """
    return 4 * (devices - 1) * nbytes // devices


def ring_attention_bytes(devices: int, nbytes: int) -> int:
    """The same for ``ring_attention``, whose backward pass moves twice as many."""
    return 2 * (devices - 1) * nbytes
