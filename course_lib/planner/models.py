"""Models that a planner knows: sizes of a transformer, and what follows from them.

GPT and Llama kinds are one class here. They differ in the feed-forward part (two matrices, or three
with SwiGLU), in the number of heads that keys and values have, and in what is learned beside the
layers (positions, a head of its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer.

    Attributes:
        name: what to call it.
        layers: transformer layers.
        hidden: width of the residual stream.
        heads: heads of the queries.
        ffn: width inside the feed-forward part (of one expert).
        vocabulary: tokens that it tells apart, padding included.
        kv_heads: heads of keys and values; as many as queries have, if 0.
        gated: SwiGLU: three matrices in the feed-forward part instead of two.
        tied: the output head is the embedding.
        biased: linear layers have biases, norms a shift.
        positions: learned positions; 0 for rotary ones or none.
        experts: feed-forward parts in a layer; 1 is a dense model.
        active: how many experts a token goes through.
        head_size: width of a head; ``hidden / heads`` if 0.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    kv_heads: int = 0
    gated: bool = False
    tied: bool = True
    biased: bool = True
    positions: int = 0
    experts: int = 1
    active: int = 1
    head_size: int = 0

    def __post_init__(self) -> None:
        counts = ("layers", "hidden", "heads", "ffn", "vocabulary", "experts", "active")
        for name in counts:
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a model is a whole number above 0, not {number!r}")
        if not self.head_size:
            if self.hidden % self.heads:
                raise ValueError(
                    f"hidden size {self.hidden} does not divide by {self.heads} heads: change one, "
                    "or give head_size"
                )
            object.__setattr__(self, "head_size", self.hidden // self.heads)
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        for name in ("kv_heads", "head_size"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a model is a whole number above 0, not {number!r}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads do not divide by {self.kv_heads} heads of keys and values: "
                "each of these serves as many of those as the others"
            )
        if self.active > self.experts:
            raise ValueError(f"a token cannot go through {self.active} of {self.experts} experts")

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention: queries, keys, values, output."""
        queries = self.heads * self.head_size
        keys_values = 2 * self.kv_heads * self.head_size
        biases = queries + keys_values + self.hidden if self.biased else 0
        return self.hidden * (queries + keys_values) + queries * self.hidden + biases

    @property
    def expert_parameters(self) -> int:
        """Parameters of one feed-forward part."""
        biases = self.ffn + self.hidden if self.biased else 0
        return (3 if self.gated else 2) * self.hidden * self.ffn + biases

    @property
    def router_parameters(self) -> int:
        """Parameters that choose a token's experts in one layer."""
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, all of its experts, router and two norms."""
        norms = 2 * self.hidden * (2 if self.biased else 1)
        experts = self.experts * self.expert_parameters
        return self.attention_parameters + experts + self.router_parameters + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, of learned positions, and of a head if it has its own."""
        return (self.vocabulary * (1 if self.tied else 2) + self.positions) * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        norm = self.hidden * (2 if self.biased else 1)
        return self.layers * self.layer_parameters + self.embedding_parameters + norm

    @property
    def active_parameters(self) -> int:
        """The parameters that one token goes through."""
        idle = self.layers * (self.experts - self.active) * self.expert_parameters
        return self.parameters - idle

    def flops_per_token(self, sequence_length: int, causal: bool = False) -> float:
        """Floating-point operations to train on one token, forward and backward, none of it twice.

        Six for each parameter of a product (two in the forward pass, four in the backward pass),
        and ``12 * layers * width of all heads * sequence_length`` for attention (PaLM,
        arXiv:2204.02311, appendix B). That counts the scores above the diagonal, which a causal
        model has no use for; ``causal=True`` counts half.
        """
        feed_forward = self.active * (3 if self.gated else 2) * self.hidden * self.ffn
        heads = self.heads * self.head_size
        attention = self.hidden * (2 * heads + 2 * self.kv_heads * self.head_size)
        products = self.layers * (feed_forward + attention) + self.vocabulary * self.hidden
        scores = 12 * self.layers * heads * sequence_length
        return 6.0 * products + scores * (0.5 if causal else 1.0)

    def padded(self, multiple: int) -> Model:
        """The same model with its vocabulary rounded up, so that it divides by ``multiple``."""
        return replace(self, vocabulary=math.ceil(self.vocabulary / multiple) * multiple)


def gpt(name: str, layers: int, hidden: int, heads: int, vocabulary: int = 51200) -> Model:
    """A model of GPT's kind: feed-forward four times as wide, learned positions, a tied head."""
    return Model(name, layers, hidden, heads, 4 * hidden, vocabulary, positions=2048)


def llama(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocabulary: int
) -> Model:
    """A model of Llama's kind: SwiGLU, grouped-query attention, rotary positions, no biases."""
    return Model(
        name, layers, hidden, heads, ffn, vocabulary, kv_heads, gated=True, tied=False, biased=False
    )


# Sizes as their papers state them: GPT-2 and GPT-3 (arXiv:2005.14165, table 2.1), Llama 2
# (arXiv:2307.09288), Llama 3 (arXiv:2407.21783, table 3), BLOOM (arXiv:2211.05100), Mixtral
# (arXiv:2401.04088), Qwen3 (arXiv:2505.09388, table 2, and their config.json).
MODELS = {
    model.name: model
    for model in (
        replace(gpt("gpt2", 12, 768, 12, 50304), positions=1024),
        replace(gpt("gpt2-xl", 48, 1600, 25, 50304), positions=1024),
        gpt("gpt3-175b", 96, 12288, 96),
        llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000),
        llama("llama2-13b", 40, 5120, 40, 40, 13824, 32000),
        llama("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
        llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256),
        replace(gpt("bloom-176b", 70, 14336, 112, 250880), positions=0),
        replace(llama("mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000), experts=8, active=2),
        replace(
            llama("qwen3-30b-a3b", 48, 2048, 32, 4, 768, 151936),
            experts=128, active=8, head_size=128,
        ),
        replace(
            llama("qwen3-235b-a22b", 94, 4096, 64, 4, 1536, 151936),
            experts=128, active=8, head_size=128,
        ),
    )
}  # fmt: skip
