"""Ulysses: attention to a sequence in parts, by dealing out the heads while it is computed.

All of a GPT but attention works on each token alone, and attention works on each head alone. So an
all-to-all before it turns parts of the sequence with all heads into the whole sequence with some
heads, and one after it turns that back (Jacobs and others, "DeepSpeed Ulysses", 2023).

A device sends 4 (N - 1) / N^2 times the bytes of one of the four tensors, whole, where a ring of
keys and values sends 2 (N - 1) / N: less from N = 3 on. But there must be a head of queries for
each device.

With grouped queries there are fewer heads of keys and values, and where there are fewer than
devices, each is repeated before it travels, so that every device gets the one that its queries ask
for: those bytes do not shrink below a head a device. (DeepSpeed and others repeat them so.) In
backward the gradients of the copies add up where the head came from.

A value is a list with one tensor a device. Shape suffixes are those of ``models``, with T the
tokens of one device.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor
from torch.nn import functional as F

from course_lib.parallel.inputs import require_one_each
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.regions import exchange
from course_lib.parallel.sequence_order import require_order


def ulysses_attention(
    qs_BHTK: Tensors, ks_BHTK: Tensors, vs_BHTK: Tensors, causal: bool
) -> list[Tensor]:
    """Each device's part of the attention of a sequence that no device has the whole of.

    Args:
        qs_BHTK, ks_BHTK, vs_BHTK: parts of one sequence, one a device, of one shape each, in
            contiguous order (``split_sequence(..., zigzag=False)``): here all have equally much to
            do in that order. Keys and values may have fewer heads than queries, a divisor.
        causal: whether a token sees only itself and those before it.

    Raises:
        TypeError: one of them is a single tensor.
        ValueError: there is not one part of each for every device, the heads of queries do not
            divide among the devices, those of keys and values do neither divide them nor divide
            among them, or the parts were split in zigzag order.
    """
    for parts in (qs_BHTK, ks_BHTK, vs_BHTK):
        require_one_each(parts, len(parts), "Ulysses")
        require_order(parts, zigzag=False)
    if not len(qs_BHTK) == len(ks_BHTK) == len(vs_BHTK) > 0:
        raise ValueError(
            "Ulysses takes one part of each a device, not "
            f"{len(qs_BHTK)}, {len(ks_BHTK)} and {len(vs_BHTK)}"
        )
    count, heads, kv_heads = len(qs_BHTK), qs_BHTK[0].shape[1], ks_BHTK[0].shape[1]
    if heads % kv_heads or (count % kv_heads and kv_heads % count):
        raise ValueError(
            f"{kv_heads} heads of keys and values for {heads} of queries on {count} devices: each "
            "device needs whole ones, or one that it shares with whole devices"
        )
    copies = max(count // kv_heads, 1)
    repeated = (_repeated(parts, copies) for parts in (ks_BHTK, vs_BHTK))
    qs, ks, vs = (_to_heads(parts) for parts in (qs_BHTK, *repeated))
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)
        for q, k, v in zip(qs, ks, vs, strict=True)
    ]
    return _to_sequence(outs)


def _repeated(parts_BHTK: Tensors, copies: int) -> Tensors:
    """Each head so many times, in the order of the devices that need it."""
    if copies == 1:
        return parts_BHTK
    return [part.repeat_interleave(copies, dim=1) for part in parts_BHTK]


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


def ulysses_bytes(devices: int, nbytes: int, heads_per_kv: int = 1, heads: int = 0) -> int:
    """Bytes that a forward pass moves between all devices; its backward pass moves as many.

    Queries and outputs go once over, and keys and values with fewer heads: but never with fewer
    than one for each device.

    Args:
        nbytes: of the queries of the whole sequence; outputs have as many.
        heads_per_kv: heads of queries that share one of keys and values, r.
        heads: of queries; to be given where there are fewer heads of keys and values than devices.
    """
    kv_share = Fraction(1, heads_per_kv)
    if heads and heads // heads_per_kv < devices:
        kv_share = Fraction(devices, heads)
    return int((2 + 2 * kv_share) * (devices - 1) * nbytes / devices)


def ring_attention_bytes(devices: int, nbytes: int) -> int:
    """The same for ``ring_attention``, whose backward pass moves twice as many.

    Args:
        nbytes: of the keys of the whole sequence; values have as many.
    """
    return 2 * (devices - 1) * nbytes
