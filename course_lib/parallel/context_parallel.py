"""Context parallelism: one long sequence on several GPUs, a part of its tokens on each.

What lesson 07 derives. All of a GPT works on each token alone, but attention: there a query needs
the keys and values of all tokens before it. Those travel in a ring, block by block, and every query
keeps a running softmax over the blocks that it has met (Liu and others, "Ring Attention with
Blockwise Transformers", 2023; Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018). PyTorch's own is ``torch.distributed.tensor.experimental.context_parallel``.

A value is a list with one tensor a device. Which of 4 devices has which part of a sequence:

    contiguous    0 0 1 1 2 2 3 3
    zigzag        0 1 2 3 3 2 1 0

With a causal mask the last tokens have the most to look at. In zigzag order, Megatron-LM's, each
device has an early and a late chunk, and all have equally much to do.

Shape suffixes are those of ``models``, with T the tokens of one device. In a product, Q and S are
how many of its queries and keys take part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from course_lib.models import GPT, Block, next_token_loss
from course_lib.parallel.blockwise_attention import attend, attend_backward, merge, wide
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.transfers import Transfer, ring_of_links, send_round


def positions(length: int, count: int, rank: int, zigzag: bool = True) -> Tensor:
    """Where in a sequence of ``length`` the tokens of device ``rank`` of ``count`` are.

    In zigzag order the sequence has 2N chunks, and device r the chunks r and 2N - 1 - r.

    Raises:
        ValueError: the sequence does not divide into equal chunks.
    """
    chunk_count = 2 * count if zigzag else count
    if length % chunk_count:
        raise ValueError(
            f"a sequence of {length} tokens does not divide into {chunk_count} equal chunks, "
            f"{chunk_count // count} for each of {count} device(s): pad it or cut it shorter"
        )
    chunks = torch.arange(length).view(chunk_count, -1)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if zigzag else chunks[rank]


def split_sequence(
    whole: Tensor, devices: Devices, dimension: int, zigzag: bool = True
) -> list[Tensor]:
    """Each device's tokens, those at its :func:`positions` along ``dimension``."""
    parts = []
    for rank, device in enumerate(devices):
        own = positions(whole.shape[dimension], len(devices), rank, zigzag)
        parts.append(whole.index_select(dimension, own.to(whole.device)).to(device))
    return parts


def join_sequence(parts: Tensors, dimension: int, zigzag: bool = True) -> Tensor:
    """The whole, on the host, of what :func:`split_sequence` cut."""
    together = torch.cat([part.cpu() for part in parts], dimension)
    length, count = together.shape[dimension], len(parts)
    order = torch.cat([positions(length, count, rank, zigzag) for rank in range(count)])
    return together.index_select(dimension, order.argsort())


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
            and dtype, or their tokens, being odd in number, cannot be in zigzag order.
    """
    kinds = {"queries": qs_BHTK, "keys": ks_BHTK, "values": vs_BHTK}
    if not len(qs_BHTK) == len(ks_BHTK) == len(vs_BHTK) > 0:
        counts = ", ".join(f"{len(parts)} parts of {kind}" for kind, parts in kinds.items())
        raise ValueError(f"ring attention takes one part of each a device, not {counts}")
    forms = {f"{tuple(part.shape)} {part.dtype}" for parts in kinds.values() for part in parts}
    if len(forms) > 1:
        raise ValueError(f"ring attention takes parts of one shape and dtype, not {sorted(forms)}")
    if tile < 1:
        raise ValueError(f"a tile has at least one token: tile={tile}")
    count, T = len(qs_BHTK), qs_BHTK[0].shape[-2]
    tiles = [_tiles(count, T, rank, zigzag, tile) for rank in range(count)]
    return list(_RingAttention.apply(causal, tiles, *qs_BHTK, *ks_BHTK, *vs_BHTK))


# Where in the sequence a tile begins, and where on its device it is.
Tile = tuple[int, slice]


def _tiles(count: int, T: int, rank: int, zigzag: bool, size: int) -> list[Tile]:
    """Cut each chunk that a device has into pieces of at most ``size`` tokens."""
    own = positions(count * T, count, rank, zigzag).tolist()
    chunk = T // 2 if zigzag else T
    edges = [*range(0, chunk, size), *range(chunk, T, size), T]
    return [(own[first], slice(first, end)) for first, end in pairwise(edges)]


def _meetings(
    tiles: list[list[Tile]], causal: bool, step: int
) -> Iterator[tuple[int, slice, slice, bool]]:
    """What there is to compute when each block is ``step`` devices from home.

    Yields:
        A device, some of its queries, some of the keys that it has there, and whether each of the
        queries sees only some of the keys.
    """
    for rank, own in enumerate(tiles):
        for (i, queries), (j, keys) in product(own, tiles[rank - step]):
            if j <= i or not causal:
                yield rank, queries, keys, causal and i == j


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, causal: bool, tiles: list[list[Tile]], *tensors: Tensor) -> tuple[Tensor, ...]:
        qs, ks, vs = _groups(tensors, 3)
        ctx.meetings = partial(_meetings, tiles, causal)
        outs = [wide(torch.zeros_like(q)) for q in qs]
        log_sums = [torch.full_like(out[..., :1], -math.inf) for out in outs]  # of nothing, so far
        kvs = [torch.stack(pair) for pair in zip(ks, vs, strict=True)]  # to travel as one
        for step in _go_round(kvs):
            for rank, queries, keys, masked in ctx.meetings(step):
                q, *so_far = (each[rank][..., queries, :] for each in (qs, outs, log_sums))
                more = attend(q, *kvs[rank][..., keys, :], masked)
                for old, new in zip(so_far, merge(*so_far, *more), strict=True):
                    old.copy_(new)
        outs = [out.to(q.dtype) for out, q in zip(outs, qs, strict=True)]
        ctx.save_for_backward(*tensors, *outs, *log_sums)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qs, ks, vs, outs, log_sums = _groups(ctx.saved_tensors, 5)
        dots = [(grad * out).sum(-1, keepdim=True) for grad, out in zip(grads, outs, strict=True)]
        q_grads = [torch.zeros_like(q) for q in qs]
        kvs = [torch.stack(pair) for pair in zip(ks, vs, strict=True)]
        links = ring_of_links([q.device for q in qs])
        travelling: list[Transfer] = []
        for step in _go_round(kvs):
            kv_grads = [torch.zeros_like(kv) for kv in kvs]
            for rank, queries, keys, masked in ctx.meetings(step):
                q, *others = (each[rank][..., queries, :] for each in (qs, log_sums, grads, dots))
                more = attend_backward(q, *kvs[rank][..., keys, :], masked, *others)
                q_grads[rank][..., queries, :].add_(more[0])
                kv_grads[rank][..., keys, :].add_(more[1])
            if step == 0:
                at_home = kv_grads
            else:  # a block's gradients follow it from device to device, and then come home
                _add(kv_grads, travelling)
                travelling = send_round(links, kv_grads)
        _add(at_home, travelling)
        return None, None, *q_grads, *(kv[0] for kv in at_home), *(kv[1] for kv in at_home)


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


class ContextParallelGPT(nn.Module):
    """A GPT on several devices: all of its weights on each, and a part of the sequence.

        tokens, targets = (split_sequence(each, devices, dimension=1) for each in batch)
        losses = next_token_losses(parallel(tokens), targets)
        torch.autograd.backward(losses)
        all_reduce_gradients(parallel.replicas)

    Each replica gets the gradients of its own tokens, which ``all_reduce_gradients`` of
    ``data_parallel`` adds up.

    Args:
        gpt: it stays as it is.

    Raises:
        ValueError: the model has dropout.
    """

    def __init__(self, gpt: GPT, devices: Devices) -> None:
        super().__init__()
        if any(module.p for module in gpt.modules() if isinstance(module, nn.Dropout)):
            # Devices with the same dice would drop the same places of different chunks.
            raise ValueError("context parallelism here knows no dropout: build with dropout=0")
        self.replicas = nn.ModuleList(replicate(gpt, devices))

    def forward(self, tokens_BT: Tensors) -> list[Tensor]:
        """The scores, [B, T, V], of each device's part of the tokens."""
        embeddings, *layers, heads = zip(*self.replicas, strict=True)
        count, context = len(tokens_BT), embeddings[0].position.num_embeddings
        length = count * tokens_BT[0].shape[1]
        if length > context:
            raise ValueError(f"{length} tokens are more than this GPT can read, {context}")
        xs_BTD = [
            each.token(tokens) + each.position(positions(length, count, rank).to(tokens.device))
            for rank, (each, tokens) in enumerate(zip(embeddings, tokens_BT, strict=True))
        ]
        for blocks in layers:
            xs_BTD = _run(blocks, xs_BTD)
        return [head(x_BTD) for head, x_BTD in zip(heads, xs_BTD, strict=True)]


def _run(blocks: Sequence[Block], xs_BTD: Tensors) -> list[Tensor]:
    """What :class:`course_lib.models.Block` does, on all devices."""
    qkvs = []
    for block, x_BTD in zip(blocks, xs_BTD, strict=True):
        qkv_BTD = block.attention.qkv(block.norm_1(x_BTD))
        qkvs.append(qkv_BTD.unflatten(-1, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4))
    ys_BHTK = ring_attention(*zip(*qkvs, strict=True), causal=True)
    outs_BTD = []
    for block, x_BTD, y_BHTK in zip(blocks, xs_BTD, ys_BHTK, strict=True):
        x_BTD = x_BTD + block.attention.out(y_BHTK.transpose(1, 2).flatten(2))
        outs_BTD.append(x_BTD + block.mlp(block.norm_2(x_BTD)))
    return outs_BTD


def next_token_losses(scores_BTV: Tensors, targets_BT: Tensors) -> list[Tensor]:
    """Each device's part of the mean cross-entropy over all tokens: they add up to it."""
    return [
        next_token_loss(scores, targets) / len(scores_BTV)
        for scores, targets in zip(scores_BTV, targets_BT, strict=True)
    ]
