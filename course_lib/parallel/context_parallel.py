"""Context parallelism: one long sequence on several GPUs, a part of its tokens on each.

What lesson 07 derives. All of a GPT works on each token alone, but attention: there a query needs
the keys and values of all tokens before it, which :mod:`course_lib.parallel.attention_ring` brings
to it. PyTorch's own is ``torch.distributed.tensor.experimental.context_parallel``.

A value is a list with one tensor a device; :mod:`course_lib.parallel.sequence_order` says which
device has which tokens. Shape suffixes are those of ``models``, with T the tokens of one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from course_lib.models import GPT, Block, next_token_loss
from course_lib.parallel.attention_ring import ring_attention
from course_lib.parallel.counting import counts_of, part_of_mean
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.dropout import dropout_of_parts
from course_lib.parallel.inputs import (
    require_devices,
    require_gpt,
    require_one_each,
    require_tensor,
)
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.sequence_order import SequenceParts, order_of, positions, require_order


def split_sequence(
    whole: Tensor, devices: Devices, dimension: int, zigzag: bool = True
) -> SequenceParts:
    """Each device's tokens, those at its :func:`positions` along ``dimension``.

    Raises:
        TypeError: the sequence is no tensor, or ``devices`` is one device and no list.
        ValueError: there are none, or the sequence does not divide into equal chunks.
    """
    devices = require_devices(devices)
    require_tensor(whole, "a sequence to split is")
    length, count = whole.shape[dimension], len(devices)
    orders = [positions(length, count, rank, zigzag).to(whole.device) for rank in range(count)]
    parts = [whole.index_select(dimension, own) for own in orders]
    return SequenceParts(parts, devices, zigzag)


def join_sequence(parts: Tensors, dimension: int, zigzag: bool = True) -> Tensor:
    """The whole, on the host, of what :func:`split_sequence` cut.

    Raises:
        TypeError: the parts are a single tensor.
        ValueError: the parts were cut in the other order.
    """
    require_one_each(parts, len(parts), "join_sequence")
    require_order(parts, zigzag)
    together = torch.cat([part.cpu() for part in parts], dimension)
    length, count = together.shape[dimension], len(parts)
    order = torch.cat([positions(length, count, rank, zigzag) for rank in range(count)])
    return together.index_select(dimension, order.argsort())


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
        TypeError: it is another model, or ``devices`` is one device and no list.
        ValueError: there are none.
    """

    def __init__(self, gpt: GPT, devices: Devices) -> None:
        super().__init__()
        require_gpt(gpt)
        self.replicas = nn.ModuleList(replicate(gpt, devices))
        self.context = gpt.parts()[0].position.num_embeddings
        self.devices = list(devices)
        self._positions: dict[tuple[int, bool], list[Tensor]] = {}

    def forward(self, tokens_BT: Tensors) -> SequenceParts:
        """The scores, [B, T, V], of each device's part of the tokens.

        Args:
            tokens_BT: of :func:`split_sequence`, in either order; parts that do not say in which
                order they are cut are taken to be in zigzag order.

        Raises:
            TypeError: the tokens are a single tensor.
            ValueError: there is not one part for each device, or more tokens than it can read.
        """
        require_one_each(tokens_BT, len(self.devices), "this GPT")
        zigzag = order_of(tokens_BT)
        own = self.positions_of(len(self.devices) * tokens_BT[0].shape[1], zigzag)
        embeddings, *layers, heads = zip(*self.replicas, strict=True)
        xs_BTD = [
            each.token(tokens) + each.position(own_T)
            for each, tokens, own_T in zip(embeddings, tokens_BT, own, strict=True)
        ]
        for blocks in layers:
            xs_BTD = _run(blocks, xs_BTD, zigzag)
        scores = [head(x_BTD) for head, x_BTD in zip(heads, xs_BTD, strict=True)]
        return SequenceParts(scores, self.devices, zigzag)

    def positions_of(self, length: int, zigzag: bool) -> list[Tensor]:
        """Each device's positions, made once for each length: a copy from the host waits.

        Ask for them before the first step, and that one need not wait either.
        """
        if length > self.context:
            raise ValueError(f"{length} tokens are more than this GPT can read, {self.context}")
        if (length, zigzag) not in self._positions:
            self._positions[length, zigzag] = [
                positions(length, len(self.devices), rank, zigzag).to(device)
                for rank, device in enumerate(self.devices)
            ]
        return self._positions[length, zigzag]


def _run(blocks: Sequence[Block], xs_BTD: Tensors, zigzag: bool) -> list[Tensor]:
    """What :class:`course_lib.models.Block` does, on all devices."""
    qkvs = []
    for block, x_BTD in zip(blocks, xs_BTD, strict=True):
        qkv_BTD = block.attention.qkv(block.norm_1(x_BTD))
        qkvs.append(qkv_BTD.unflatten(-1, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4))
    qs_BHTK, ks_BHTK, vs_BHTK = zip(*qkvs, strict=True)
    ys_BHTK = ring_attention(qs_BHTK, ks_BHTK, vs_BHTK, causal=True, zigzag=zigzag)
    ys_BTD = [
        block.attention.out(y_BHTK.transpose(1, 2).flatten(2))
        for block, y_BHTK in zip(blocks, ys_BHTK, strict=True)
    ]
    xs_BTD = _add_dropped(xs_BTD, ys_BTD, blocks[0].dropout)
    ys_BTD = [block.mlp(block.norm_2(x)) for block, x in zip(blocks, xs_BTD, strict=True)]
    return _add_dropped(xs_BTD, ys_BTD, blocks[0].dropout)


def _add_dropped(xs: Tensors, ys: Tensors, dropout: nn.Dropout) -> list[Tensor]:
    ys = dropout_of_parts(ys, dropout.p, dropout.training)
    return [x + y for x, y in zip(xs, ys, strict=True)]


def next_token_losses(scores_BTV: Tensors, targets_BT: Tensors) -> list[Tensor]:
    """Each device's part of the mean cross-entropy over all tokens: they add up to it.

    A device counts by its targets that are not ignored (-100), perhaps none.

    Args:
        targets_BT: of :func:`split_sequence`, which has counted them; the host waits for others.

    Raises:
        TypeError: scores or targets are a single tensor.
        ValueError: there are not as many of both, or the targets were split in another order.
    """
    require_order(targets_BT, order_of(scores_BTV))
    counts = counts_of(targets_BT)
    require_one_each(scores_BTV, len(counts), "the loss")
    return [
        part_of_mean(next_token_loss, scores, targets, count, sum(counts))
        for scores, targets, count in zip(scores_BTV, targets_BT, counts, strict=True)
    ]
