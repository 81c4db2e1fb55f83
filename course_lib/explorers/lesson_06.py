"""The explorer of lesson 06."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from course_lib import A100, Spec, hardware, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.explorers.speed_ups import draw_speed_ups
from course_lib.models import Block
from course_lib.parallel.tensor_parallel import ParallelBlock


def explore_tensor_parallel() -> Explorer:
    """Lesson 06: computing and waiting of a transformer block on one to eight A100."""
    counts = [1, 2, 4, 8]

    def draw(width: int, tokens: int, link: int) -> Figure:
        spec = A100.with_(launch_overhead=0.0, link_bandwidth=link * 1e9)
        seconds = [_measure_block(count, width, tokens, spec) for count in counts]
        products = [first * 1e3 for first, _ in seconds]
        total = [whole * 1e3 for _, whole in seconds]
        rest = [whole - product for whole, product in zip(total, products, strict=True)]
        parts = {"matrix products": products, "all else: exchange, norms, sums": rest}
        title = "One block, forward and backward (simulated; speed-up above each bar)"
        return draw_speed_ups("A100", counts, parts, title)

    return Explorer(
        draw,
        width=choice("width", [1024, 2048, 4096, 8192], 4096),
        tokens=choice("tokens", [512, 1024, 2048, 4096], 2048),
        link=choice("link, GB/s", [3, 25, 64, 300, 450], 300),
    )


def _measure_block(count: int, width: int, tokens: int, spec: Spec) -> tuple[float, float]:
    """Seconds in matrix products on one GPU, and of the whole."""
    with hardware.fresh_devices(count, spec, backing="meta") as gpus:
        with gpus[0]:
            block = ParallelBlock(Block(width, 32, 0.0), gpus).bfloat16()
        xs = [
            torch.empty(tokens, 1, width, dtype=torch.bfloat16, device=gpu, requires_grad=True)
            for gpu in gpus
        ]
        with timeline.trace() as t:
            outs = block(xs)
            torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    products = t.seconds_by_kind()["matmul"] / count
    return products, t.seconds
