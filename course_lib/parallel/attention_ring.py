"""Ring attention: a query meets the keys of all devices, block by block, in a ring.

What lesson 07 derives (Liu and others, "Ring Attention with Blockwise Transformers", 2023): keys
and values travel from device to device, and every query keeps a running softmax over the blocks
that it has met. The arithmetic of one block is in :mod:`course_lib.parallel.blockwise_attention`.

A value is a list with one tensor a device. Shape suffixes are those of ``models``, with T the
tokens of one device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from course_lib.parallel.blockwise_attention import attend, attend_backward, merge, wide
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.sequence_order import Tile, meetings, require_order, tiles_of
from course_lib.parallel.transfers import Transfer, ring_of_links, send_round


def ring_attention(
    qs_BHTK: Tensors,
    ks_BHTK: Tensors,
    vs_BHTK: Tensors,
    causal: bool,
    zigzag: bool = True,
    tile: int = 1024,
) -> list[Tensor]:
    """Each device's part of the attention of a sequence that no device has the whole of.

    In N steps every block of keys and values visits every device. A device sends (N - 1) / N of
    all keys and values forward, and twice that backward, when their gradients travel as well.

    Args:
        qs_BHTK, ks_BHTK, vs_BHTK: parts of one sequence, one a device, all of one shape.
        causal: whether a token sees only itself and those before it.
        zigzag: the order of the tokens, as :func:`split_sequence` takes it.
        tile: the most queries, and keys, in one product: all else that a device needs memory for
            grows as T.

    Raises:
        ValueError: there is not one part of each for every device, the parts are not of one shape
            and dtype, they were split in the other order, or their tokens, being odd in number,
            cannot be in zigzag order.
        TypeError: one of them is a single tensor.
    """
    kinds = {"queries": qs_BHTK, "keys": ks_BHTK, "values": vs_BHTK}
    for kind, parts in kinds.items():
        if isinstance(parts, Tensor):  # which would be taken for its rows
            raise TypeError(f"ring attention takes a list of {kind}, one tensor a device")
        require_order(parts, zigzag)
    if not len(qs_BHTK) == len(ks_BHTK) == len(vs_BHTK) > 0:
        counts = ", ".join(f"{len(parts)} parts of {kind}" for kind, parts in kinds.items())
        raise ValueError(f"ring attention takes one part of each a device, not {counts}")
    forms = {f"{tuple(part.shape)} {part.dtype}" for parts in kinds.values() for part in parts}
    if len(forms) > 1:
        raise ValueError(f"ring attention takes parts of one shape and dtype, not {sorted(forms)}")
    if tile < 1:
        raise ValueError(f"a tile has at least one token: tile={tile}")
    count, T = len(qs_BHTK), qs_BHTK[0].shape[-2]
    tiles = [tiles_of(count, T, rank, zigzag, tile) for rank in range(count)]
    return list(_RingAttention.apply(causal, tiles, *qs_BHTK, *ks_BHTK, *vs_BHTK))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, causal: bool, tiles: list[list[Tile]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        qs, ks, vs = _groups(tensors, 3)
        ctx.meetings = partial(meetings, tiles, causal)
        outs = [wide(torch.zeros_like(q)) for q in qs]
        log_sums = [torch.full_like(out[..., :1], -math.inf) for out in outs]  # of nothing, so far
        kvs = [torch.stack(pair) for pair in zip(ks, vs, strict=True)]  # to travel as one
        for step in _go_round(kvs):
            for rank, queries, keys, masked in ctx.meetings(step):
                q, out, log_sum = (each[rank][..., queries, :] for each in (qs, outs, log_sums))
                k, v = kvs[rank][..., keys, :]
                more = attend(q, k, v, masked)
                # No name for what is merged: it would be held until the next tile is there, too.
                for old, new in zip((out, log_sum), merge(out, log_sum, *more), strict=True):
                    old.copy_(new)
        outs = [out.to(q.dtype) for out, q in zip(outs, qs, strict=True)]
        ctx.save_for_backward(*tensors, *outs, *log_sums)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qs, ks, vs, outs, log_sums = _groups(ctx.saved_tensors, 5)
        # Of each query, the sum of dO * O: all that a softmax's backward needs of the other keys.
        dots = [
            (wide(grad) * wide(out)).sum(-1, True) for grad, out in zip(grads, outs, strict=True)
        ]
        # Sums of many terms, in float32 at least: each block adds one.
        q_grads = [wide(torch.zeros_like(q)) for q in qs]
        kvs = [torch.stack(pair) for pair in zip(ks, vs, strict=True)]
        links = ring_of_links([q.device for q in qs])
        travelling: list[Transfer] = []
        for step in _go_round(kvs):
            # What the visitors get here, by the queries of the device where they are.
            kv_grads = [wide(torch.zeros_like(kv)) for kv in kvs]
            for rank, queries, keys, masked in ctx.meetings(step):
                q, *others = (each[rank][..., queries, :] for each in (qs, log_sums, grads, dots))
                k, v = kvs[rank][..., keys, :]
                q_grad, kv_grad = attend_backward(q, k, v, masked, *others)
                q_grads[rank][..., queries, :].add_(q_grad)
                kv_grads[rank][..., keys, :].add_(kv_grad)
            if step == 0:
                at_home = kv_grads  # their block has not left
            else:
                # The gradients of a block follow it, one step behind: what it got on the devices
                # before is added, and all of it sent on; after the last step that is home.
                _add(kv_grads, travelling)
                travelling = send_round(links, kv_grads)
        _add(at_home, travelling)
        dtype = qs[0].dtype
        q_grads = [grad.to(dtype) for grad in q_grads]
        k_grads, v_grads = zip(*(grad.to(dtype) for grad in at_home), strict=True)
        return None, None, *q_grads, *k_grads, *v_grads


def _groups(tensors: Tensors, count: int) -> list[Tensors]:
    size = len(tensors) // count
    return [tensors[first : first + size] for first in range(0, len(tensors), size)]


def _add(sums: Tensors, terms: list[Transfer]) -> None:
    for total, term in zip(sums, terms, strict=False):  # at first, no terms have come
        total.add_(term.receive())


def _go_round(kvs: list[Tensor]) -> Iterator[int]:
    """The steps of a way round the ring; before each but the first, ``kvs`` moves on by a device.

    It sets out when the step before begins, so that it travels while that one computes.
    """
    links = ring_of_links([kv.device for kv in kvs])
    for step in range(len(kvs) - 1):
        under_way = send_round(links, kvs)
        yield step
        kvs[:] = [transfer.receive() for transfer in under_way]
    yield len(kvs) - 1
