"""Tensor parallelism: one layer on several GPUs, a group of its neurons on each.

What lessons 06 and 07 derive. Shoeybi and others, "Megatron-LM", 2019; with sequence parallelism,
Korthikanti and others, "Reducing Activation Recomputation in Large Transformer Models", 2022.
PyTorch's own is ``torch.distributed.tensor.parallel``.

A value is a list with one tensor a device; :mod:`course_lib.parallel.regions` says what moves
between regions in which it is split and regions in which it is replicated.

Activations are sequence first, [T, B, D], so that a part of the sequence is one piece of memory.
Shape suffixes are those of ``models``; a part of V is still V.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.models import GPT, Attention, Block
from course_lib.parallel.dropout import dropout_of_copies, dropout_of_parts
from course_lib.parallel.inputs import require_gpt, require_one_each, require_tokens
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.regions import enter, leave
from course_lib.parallel.split_parameter import Shards
from course_lib.parallel.vocabulary import VocabularyEmbedding


class ColumnLinear(nn.Module):
    """A linear layer with some of its neurons on each device: Y_r = X A_r + b_r.

    A neuron is a column of the papers' A, and a row of PyTorch's weight.

    Args:
        linear: the layer on one device; as with all layers here, it stays as it is.
        groups: as :class:`Shards` takes them.
    """

    def __init__(
        self, linear: nn.Linear, devices: Devices, sequence_parallel: bool = False, groups: int = 1
    ) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.weight = Shards(linear.weight, devices, 0, groups)
        self.bias = None if linear.bias is None else Shards(linear.bias, devices, 0, groups)

    def forward(self, xs_TBD: Tensors) -> list[Tensor]:
        """From all inputs, [T, B, D], or with sequence parallelism those of some tokens,
        [T/N, B, D], to some of the outputs, [T, B, O/N] on each device.
        """
        require_one_each(xs_TBD, len(self.weight), "this layer")
        xs_TBD = enter(xs_TBD, self.sequence_parallel)
        biases = self.bias or [None] * len(xs_TBD)
        return [F.linear(*each) for each in zip(xs_TBD, self.weight, biases, strict=True)]


class RowLinear(nn.Module):
    """A linear layer with some of its inputs on each device: Y = X_0 A_0 + X_1 A_1 + ... + b."""

    def __init__(
        self, linear: nn.Linear, devices: Devices, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.weight = Shards(linear.weight, devices, 1)
        self.bias = None
        if linear.bias is not None:
            self.bias = Shards(linear.bias, devices, partial_gradients=sequence_parallel)

    def forward(self, xs: Tensors) -> list[Tensor]:
        """From some of the inputs, [T, B, I/N] on each device, to all outputs, [T, B, D].

        With sequence parallelism each device gets its part of the tokens, [T/N, B, D].
        """
        require_one_each(xs, len(self.weight), "this layer")
        terms_TBD = [F.linear(x, weight) for x, weight in zip(xs, self.weight, strict=True)]
        sums_TBD = leave(terms_TBD, self.sequence_parallel)
        # Added to the sum: a bias in each device's term would count N times.
        return _add(sums_TBD, list(self.bias)) if self.bias else sums_TBD


def _add(xs: Tensors, ys: Tensors) -> list[Tensor]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


class ParallelMLP(nn.Module):
    """A linear layer, an activation and a linear layer: nothing moves between the two."""

    def __init__(
        self, mlp: nn.Sequential, devices: Devices, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        layers: list[Any] = list(mlp)
        if len(layers) != 3:
            raise ValueError(f"an MLP here has three layers, linear, activation, linear: {layers}")
        up, self.activation, down = layers
        self.up = ColumnLinear(up, devices, sequence_parallel)
        self.down = RowLinear(down, devices, sequence_parallel)

    def forward(self, xs_TBD: Tensors) -> list[Tensor]:
        return self.down([self.activation(hidden) for hidden in self.up(xs_TBD)])


class ParallelAttention(nn.Module):
    """Causal self-attention with some of the heads on each device.

    Raises:
        ValueError: the heads do not divide over the devices.
    """

    def __init__(
        self, attention: Attention, devices: Devices, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        if devices and attention.heads % len(devices):
            raise ValueError(
                f"{attention.heads} heads do not divide over {len(devices)} devices: each takes "
                "whole heads, with their keys and values"
            )
        self.head_width = attention.out.in_features // attention.heads
        # Its neurons are all queries, then all keys, then all values: a device needs some of each.
        self.qkv = ColumnLinear(attention.qkv, devices, sequence_parallel, groups=3)
        self.out = RowLinear(attention.out, devices, sequence_parallel)

    def forward(self, xs_TBD: Tensors) -> list[Tensor]:
        return self.out([self._attend(qkv) for qkv in self.qkv(xs_TBD)])

    def _attend(self, qkv: Tensor) -> Tensor:
        T, B, _ = qkv.shape
        qkv_T_B_3_H_K = qkv.view(T, B, 3, -1, self.head_width)
        q_BHTK, k_BHTK, v_BHTK = qkv_T_B_3_H_K.permute(2, 1, 3, 0, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return y_BHTK.permute(2, 0, 1, 3).reshape(T, B, -1)


class CopiedNorm(nn.Module):
    """A layer norm, the same on every device."""

    def __init__(
        self, norm: nn.LayerNorm, devices: Devices, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        if norm.weight is None or norm.bias is None:
            raise ValueError("a layer norm here has a weight and a bias to copy: make it with both")
        self.eps = norm.eps
        self.weight = Shards(norm.weight, devices, partial_gradients=sequence_parallel)
        self.bias = Shards(norm.bias, devices, partial_gradients=sequence_parallel)

    def forward(self, xs_TBD: Tensors) -> list[Tensor]:
        require_one_each(xs_TBD, len(self.weight), "this layer")
        return [
            F.layer_norm(x_TBD, weight.shape, weight, bias, self.eps)
            for x_TBD, weight, bias in zip(xs_TBD, self.weight, self.bias, strict=True)
        ]


class ParallelBlock(nn.Module):
    """One transformer block: two split regions, two all-reduces forward and two backward."""

    def __init__(self, block: Block, devices: Devices, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.sequence_parallel, self.dropout = sequence_parallel, block.dropout.p
        self.norm_1 = CopiedNorm(block.norm_1, devices, sequence_parallel)
        self.attention = ParallelAttention(block.attention, devices, sequence_parallel)
        self.norm_2 = CopiedNorm(block.norm_2, devices, sequence_parallel)
        self.mlp = ParallelMLP(block.mlp, devices, sequence_parallel)
        self.train(block.training)

    def forward(self, xs_TBD: Tensors) -> list[Tensor]:
        xs_TBD = _add(xs_TBD, self._drop(self.attention(self.norm_1(xs_TBD))))
        return _add(xs_TBD, self._drop(self.mlp(self.norm_2(xs_TBD))))

    def _drop(self, xs_TBD: Tensors) -> list[Tensor]:
        dropout = dropout_of_parts if self.sequence_parallel else dropout_of_copies
        return dropout(xs_TBD, self.dropout, self.training)


class ParallelGPT(nn.Module):
    """A GPT on several devices.

        losses = vocabulary_cross_entropy(parallel(tokens_BT), targets_BT)
        torch.autograd.backward(losses)
        all_reduce_partial_gradients(parallel)

    It takes the tokens, (B, T), from wherever they are, and returns the scores divided by
    vocabulary, (B, T, a part of V) on each device. Any optimizer that works number by number can
    train its parameters. ``nn.utils.clip_grad_norm_`` cannot clip them, since it would count every
    copy: :mod:`course_lib.parallel.gradient_norm` can.

    Args:
        gpt: it stays as it is.
        sequence_parallel: whether to divide by sequence what is replicated otherwise.

    Raises:
        TypeError: the model is another than a GPT, or ``devices`` is one device and no list.
        ValueError: the heads do not divide over the devices, or there are more devices than tokens
            in the vocabulary, or none.
    """

    def __init__(self, gpt: GPT, devices: Devices, sequence_parallel: bool = False) -> None:
        super().__init__()
        require_gpt(gpt)
        embedding, blocks, head = gpt.parts()
        self.sequence_parallel = sequence_parallel
        self.token = VocabularyEmbedding(embedding.token, devices, sequence_parallel)
        self.position = Shards(
            embedding.position.weight, devices, partial_gradients=sequence_parallel
        )
        self.blocks = nn.Sequential(*(ParallelBlock(b, devices, sequence_parallel) for b in blocks))
        self.norm = CopiedNorm(head.norm, devices, sequence_parallel)
        self.head = ColumnLinear(head.linear, devices, sequence_parallel)
        if head.linear.weight is embedding.token.weight:
            self.head.weight = self.token.weight

    def forward(self, tokens_BT: Tensor) -> list[Tensor]:
        require_tokens(tokens_BT)
        T, context = tokens_BT.shape[1], len(self.position[0])
        if context < T:
            raise ValueError(f"{T} tokens are more than this GPT can read, {context}")
        rows_TD = [weight[:T] for weight in self.position]
        if self.sequence_parallel:
            rows_TD = [each.tensor_split(len(rows_TD))[r] for r, each in enumerate(rows_TD)]
        xs_TBD = _add(self.token(tokens_BT.T), [each.unsqueeze(1) for each in rows_TD])
        scores = self.head(self.norm(self.blocks(xs_TBD)))
        return [scores_TBV.transpose(0, 1) for scores_TBV in scores]
