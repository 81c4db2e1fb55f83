"""What one layer does for one microbatch on one GPU, and the seconds that it takes.

Three kinds of work: matrix products (bound by the peak), attention's scores, and all the rest
(norms, activations, dropout, residuals), which is bound by the bytes that it moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from course_lib import Spec
from course_lib.planner.clusters import FP8, family
from course_lib.planner.constants import Constants
from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model

# Numbers read and written for each number of the layer's width, with nothing fused: two norms
# (read, write), two residual sums (2 reads, write), two dropouts (read, write, half a mask).
_WHOLE = 2 * (2 + 3 + 2.5)
# For each number of the feed-forward width: bias (read, write) and GELU (read, write); SwiGLU
# reads two and writes one, and writes SiLU in between.
_FEED_FORWARD, _SWIGLU = 4.0, 5.0
# For each number of the queries, keys and values: a bias, and a turn of the axes.
_HEADS = 4.0
# For each score: write, mask and scale (read, write), softmax (read, write), dropout (read, write,
# half a mask), read.
_SCORES = 8.5
# Bytes for each number that attention returns, where PyTorch's ring merges what the keys of each
# GPU add to it, in float32 and operation by operation (torch.distributed.tensor.experimental): for
# each GPU but the first, and once.
_MERGING, _MERGING_BACKWARD = (38.0, 12.0), (20.0, 30.0)
# The head's logits in float32: written, then read and written for the loss, and once more back.
_LOGITS = 12.0
# What a multiprocessor computes at a time: a tile of 128 x 256 of a product's numbers.
_TILE = 128 * 256
_MULTIPROCESSORS = {
    "V100": 80,
    "A100": 108,
    "H100": 132,
    "H200": 132,
    "B200": 148,
    "GB200": 148,
    "GB300": 160,
}


@dataclass(frozen=True)
class Product:
    """``count`` products of an m x k with a k x n matrix."""

    m: float
    k: float
    n: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.k * self.n * self.count

    def backward(self) -> list[Product]:
        """The two products of its backward pass: the gradient of each factor."""
        return [
            Product(self.m, self.n, self.k, self.count),
            Product(self.k, self.m, self.n, self.count),
        ]

    @property
    def bytes(self) -> float:
        """Bytes of its three matrices, in 16 bits."""
        return 2.0 * (self.m * self.k + self.k * self.n + self.m * self.n) * self.count


@dataclass(frozen=True)
class Seconds:
    """Seconds of one pass through something, by kind."""

    products: float = 0.0
    scores: float = 0.0
    others: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.products + other.products, self.scores + other.scores, self.others + other.others
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.products * factor, self.scores * factor, self.others * factor)

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.products + self.scores + self.others


def linear_products(model: Model, layout: Layout) -> list[Product]:
    """The products of one layer's linear parts, forward, on one GPU."""
    tokens, split = layout.tokens, layout.tensor
    queries = model.heads * model.head_size / split
    keys_values = 2 * max(model.kv_heads / split, 1) * model.head_size
    up = (2 if model.gated else 1) * model.ffn / split
    # Every token visits `active` experts; the tokens of all GPUs are spread evenly over them.
    local = model.experts / layout.expert
    routed = tokens * model.active / local
    return [
        Product(tokens, model.hidden, queries + keys_values),
        Product(tokens, queries, model.hidden),
        Product(routed, model.hidden, up, local),
        Product(routed, model.ffn / split, model.hidden, local),
    ]


def products_again(model: Model, layout: Layout) -> list[Product]:
    """The linear products of one layer that are made a second time, by the policy.

    ``"alternate"`` makes every second one again: of queries, keys, values, attention's output, the
    first two of SwiGLU's and the last one these are the keys', the output's and the second of
    SwiGLU's (without SwiGLU the last one, of as many operations).
    """
    products = linear_products(model, layout)
    if layout.recompute == "full":
        return products
    if layout.recompute != "alternate":
        return []
    keys = max(model.kv_heads / layout.tensor, 1) * model.head_size
    return [
        Product(layout.tokens, model.hidden, keys),
        products[1],
        replace(products[2], n=model.ffn / layout.tensor),
    ]


def score_flops(model: Model, layout: Layout) -> float:
    """Operations of one layer's scores and their products with the values, forward, unmasked."""
    width = model.heads * model.head_size / layout.tensor
    return 4.0 * layout.tokens * layout.sequence_length * width


class LayerTimes:
    """Seconds of a layer's passes on a GPU, for one microbatch."""

    def __init__(self, model: Model, gpu: Spec, layout: Layout, constants: Constants) -> None:
        self.model, self.gpu, self.layout, self.constants = model, gpu, layout, constants
        self.peak = gpu.peak_flops(torch.bfloat16)
        self.rate = self.peak * constants.product_part(gpu, layout.libraries)
        self.linear = linear_products(model, layout)

    def products(self, products: list[Product]) -> float:
        """Seconds of matrix products: their operations at the part of the peak that large ones
        reach, and what is not hidden of their memory traffic, which small ones feel."""
        rate = self.rate
        if self.layout.precision == "fp8" and FP8 in self.gpu.flops:
            ratio = self.gpu.peak_flops(FP8) / self.peak
            rate *= 1 + (ratio - 1) * self.constants.fp8_gain
        wave = _TILE * _MULTIPROCESSORS[family(self.gpu)]
        flops, moved = 0.0, 0.0
        for product in products:
            waves = product.m * product.n / wave
            flops += product.flops * (1 + self.constants.wave / (1 + waves))
            moved += product.bytes
        return flops / rate + self.moving(moved) * self.constants.product_traffic

    def moving(self, moved: float) -> float:
        """Seconds to move bytes to or from the GPU's memory."""
        return moved / self.gpu.memory_bandwidth

    def forward(self) -> Seconds:
        """The forward pass of one layer."""
        return Seconds(
            self.products(self.linear),
            self._scores(backward=False),
            self.moving(self._other_bytes()),
        )

    def backward(self) -> Seconds:
        """The backward pass of one layer: two products for each one, and twice the traffic."""
        products = [part for product in self.linear for part in product.backward()]
        return Seconds(
            self.products(products),
            self._scores(backward=True),
            2 * self.moving(self._other_bytes()),
        )

    def again(self, forward: Seconds) -> Seconds:
        """What of a forward pass is computed a second time, by the policy."""
        policy = self.layout.recompute
        if policy == "full":
            return forward
        if policy == "alternate":
            again = self.products(products_again(self.model, self.layout))
            return Seconds(again, 0.0, forward.others)
        if policy == "selective":
            scores = forward.scores if self.layout.attention == "unfused" else 0.0
            return Seconds(0.0, scores, forward.others / 2)
        return Seconds()

    def head(self) -> Seconds:
        """Forward and backward of the head and the loss."""
        vocabulary = self.model.vocabulary / self.layout.tensor
        product = Product(self.layout.tokens, self.model.hidden, vocabulary)
        logits = self.layout.tokens * vocabulary * 4.0 * _LOGITS / 2
        moved = logits * self.constants.traffic(self.layout.kernels)
        return Seconds(self.products([product, *product.backward()]), 0.0, self.moving(moved))

    def _scores(self, backward: bool) -> float:
        layout, constants = self.layout, self.constants
        flops = score_flops(self.model, layout)
        if layout.attention != "unfused":
            # Five products instead of two in the backward pass: scores are made again.
            flops *= 2.5 if backward else 1.0
            rate = self.peak * constants.attention_part(self.gpu, layout.attention)
            return flops * 0.5 / rate + self.moving(self._merged_bytes(backward))
        heads = self.model.heads / layout.tensor
        scores = layout.tokens * layout.sequence_length * heads * 2.0 * _SCORES
        once = flops / self.rate + self.moving(scores) * constants.scores_traffic
        return once * (2 if backward else 1)

    def _merged_bytes(self, backward: bool) -> float:
        """Bytes that merging moves under context parallelism, unless a kernel does it."""
        model, layout = self.model, self.layout
        if layout.context == 1 or layout.kernels != "eager":
            return 0.0
        each, once = _MERGING_BACKWARD if backward else _MERGING
        numbers = layout.tokens * model.heads * model.head_size / layout.tensor
        return numbers * (each * (layout.context - 1) + once) * self.constants.traffic("eager")

    def _other_bytes(self) -> float:
        model, layout = self.model, self.layout
        split = layout.tensor
        whole = _WHOLE * model.hidden / (split if layout.sequence_parallel else 1)
        inside = (_SWIGLU if model.gated else _FEED_FORWARD) * model.ffn * model.active
        heads = _HEADS * (model.heads + 2 * model.kv_heads) * model.head_size
        numbers = layout.tokens * (whole + (inside + heads) / split)
        return numbers * 2.0 * self.constants.traffic(layout.kernels)
