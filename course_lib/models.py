"""The two models that all lessons share: an MLP for digits and a GPT for text.

Both are ``nn.Sequential``, so that a slice of a model is a model: the lessons on model
parallelism cut them into pieces. Shape suffixes: B batch, T tokens, D width, H heads, K the width
of one head, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Sequential):
    """Linear layers with a ReLU after each but the last.

    Args:
        widths: numbers in the input, in each hidden layer and in the output;
            ``MLP(64, 256, 10)`` has two linear layers.
    """

    def __init__(self, *widths: int) -> None:
        if len(widths) < 2:
            raise ValueError(f"an MLP needs at least an input and an output width, not {widths}")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class Embedding(nn.Module):
    """Tokens to vectors: one for the character and one for its position, added."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.token(tokens_BT) + self.position(positions_T)


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_B_T_3_H_K = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads)
        q_BHTK, k_BHTK, v_BHTK = qkv_B_T_3_H_K.permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """One transformer block: attention, then an MLP, each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_1(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.norm_2(x_BTD)))


class Head(nn.Module):
    """Vectors to a score for each character of the vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(self.norm(x_BTD))


class GPT(nn.Sequential):
    """A small GPT: an embedding, ``depth`` blocks, a head.

    Args:
        vocabulary: how many different tokens, V.
        context: the longest passage it can read, in tokens.
        width: numbers in the vector of one token, D.
        heads: attention heads, a divisor of ``width``.
        depth: blocks.
        dropout: the part of each block's output that is dropped in training.
        tied: whether the head shares its weight with the token embedding, as in GPT-2.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        embedding, head = Embedding(vocabulary, context, width), Head(width, vocabulary)
        blocks = [Block(width, heads, dropout) for _ in range(depth)]
        super().__init__(embedding, *blocks, head)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if tied:
            head.linear.weight = embedding.token.weight

    def parts(self) -> tuple[Embedding, list[Block], Head]:
        """Its layers, by what they are: the embedding, the blocks, the head."""
        embedding, *blocks, head = self
        return embedding, blocks, head  # type: ignore[return-value]  # modules of any kind, to it


def next_token_loss(scores_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of every prediction in the batch."""
    return F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten())


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters of ``model``; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
