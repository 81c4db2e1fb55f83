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
                # Tiles that grow with the sequence: as many spans to record and to draw.
                outs = ring_attention(
                    qs, ks, vs, causal=True, zigzag=order == "zigzag", tile=tokens // 8
                )
                torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
        computing = [_seconds_computing(t, gpu) / t.seconds for gpu in range(4)]
        figure, ax = style.figure(height=4.4)
        t.plot(
            ax,
            title=f"{t.seconds * 1e3:.1f} ms, of which GPU 0 computes {computing[0]:.0%} "
            f"and GPU 3 {computing[3]:.0%}",
        )
        return figure

    return Explorer(
        draw,
        order=choice("order of the tokens", ["contiguous", "zigzag"], "contiguous"),
        tokens=choice("tokens", [2048, 8192, 32768], 8192),
        link=choice("link, GB/s", [3, 25, 300], 300),
    )


def _seconds_computing(t: timeline.Trace, gpu: int) -> float:
    own = (span for span in t.spans if span.device == gpu and span.kind != "copy")
    return sum(span.end - span.start for span in own)
