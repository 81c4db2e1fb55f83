"""The explorer of lesson 07."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from course_lib import A100, hardware, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.parallel.context_parallel import ring_attention


def explore_ring_attention() -> Explorer:
    """Lesson 07: the timeline of causal ring attention on four A100."""

    def draw(order: str, tokens: int, link: int) -> Figure:
        spec = A100.with_(launch_overhead=0.0, link_bandwidth=link * 1e9)
        with hardware.fresh_devices(4, spec, backing="meta") as gpus:
            qs, ks, vs = [
                [
                    torch.empty(
                        1, 32, tokens // 4, 128,
                        dtype=torch.bfloat16, device=gpu, requires_grad=True,
                    )
                    for gpu in gpus
                ]
                for _ in "qkv"
            ]  # fmt: skip
            with timeline.trace() as t:
                outs = ring_attention(qs, ks, vs, causal=True, zigzag=order == "zigzag")
                torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
        figure, ax = style.figure(height=4.4)
        t.plot(ax, title=f"Causal, forward and backward, {t.seconds * 1e3:.1f} ms")
        return figure

    return Explorer(
        draw,
        order=choice("order of the tokens", ["contiguous", "zigzag"], "contiguous"),
        tokens=choice("tokens", [2048, 8192, 32768], 8192),
        link=choice("link, GB/s", [3, 25, 300], 300),
    )
