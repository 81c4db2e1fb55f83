"""The explorer of lesson 11."""

from __future__ import annotations

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel

from course_lib import CLASSROOM, Spec, hardware, ranks, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.models import GPT, next_token_loss
from course_lib.timeline import region

MEGABYTES = [0.02, 0.1, 0.4, 25]  # sizes of a bucket: DDP's default is the last
TOKENS, SEQUENCES = 64, 4  # that each GPU trains on


class BucketsExplorer(Explorer):
    """An explorer that says what takes it some seconds."""

    working = f"Working: DDP with {len(MEGABYTES)} sizes of a bucket. Some seconds ..."


def explore_buckets() -> Explorer:
    """Lesson 11: the seconds of a step of DDP, by the size of its buckets."""

    def draw(width: int, count: int, latency: float) -> Figure:
        spec = CLASSROOM.with_(launch_overhead=0.0, memory=1e9, latency=latency * 1e-6)
        milliseconds = [seconds_of_a_step(width, count, spec, mb) * 1e3 for mb in MEGABYTES]
        best = MEGABYTES[milliseconds.index(min(milliseconds))]
        figure, ax = style.figure(height=2.8)
        names = [f"{mb:g} MB" for mb in MEGABYTES]
        ax.barh(names, milliseconds, color=style.BLUE)
        for place, taken in enumerate(milliseconds):
            ax.text(taken, place, f"  {taken:.1f} ms", va="center")
        ax.set(xlabel="milliseconds a step", ylabel="bucket_cap_mb")
        ax.set_xlim(0, 1.15 * max(milliseconds))
        ax.set_title(f"{count} GPUs, width {width}: fastest with {best:g} MB (simulated)")
        ax.invert_yaxis()
        return figure

    return BucketsExplorer(
        draw,
        width=choice("width of the GPT", [32, 64, 128], 64),
        count=choice("GPUs", [2, 4, 8], 4),
        latency=choice("latency, microseconds", [2.5, 25, 100, 400], 25),
    )


def seconds_of_a_step(width: int, count: int, spec: Spec, megabytes: float) -> float:
    """Simulated seconds of the second step of DDP; in its first, all gradients are one bucket."""

    def train() -> None:
        dist.init_process_group()
        gpt = GPT(64, context=TOKENS, width=width, heads=4, depth=4, tied=False).to("vgpu")
        model = DistributedDataParallel(gpt, bucket_cap_mb=megabytes)
        tokens = torch.zeros(SEQUENCES, TOKENS, dtype=torch.int64, device="vgpu")
        for step in range(2):
            with region(f"step {step}"):
                next_token_loss(model(tokens), tokens).backward()

    with hardware.fresh_devices(count, spec) as gpus, timeline.trace() as t:
        ranks.run(train, gpus)
    last = [span for span in t.spans if span.region == "step 1"]
    return max(span.end for span in last) - min(span.start for span in last)
