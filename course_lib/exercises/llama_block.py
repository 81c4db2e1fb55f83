"""A transformer block as in Llama, with a layer for each product: what lesson 11's plan is for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LlamaAttention(nn.Module):
    """Causal self-attention; on a rank with a part of the columns it has a part of the heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            layer(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2)
            for layer in (self.wq, self.wk, self.wv)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.wo(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020: a product of two layers, then a third."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class LlamaBlock(nn.Module):
    """Attention and a gated MLP, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.RMSNorm(width), LlamaAttention(width, heads)
        self.norm_2, self.mlp = nn.RMSNorm(width), GatedMLP(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))
        return x_BTD + self.mlp(self.norm_2(x_BTD))
