"""The README's moving picture: a training step on four GPUs, as the virtual GPUs recorded it.

Above, the gradients are summed when backward has ended; below, in buckets while it goes on, as
lesson 03 does both. It is uncovered from left to right, twice, and then stays whole. Who asks for
less motion sees it whole from the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from drawing import SOFT, Picture, save
from torch import Tensor, nn

import course_lib
from course_lib.data import text
from course_lib.hardware import fresh_devices
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.style import BLUE, ORANGE, PALE

N = 4
LEFT, RIGHT = 84, 876
ROW, PANEL, TOP = 26, 166, 16
SECONDS = 6  # of the animation, for one step

SPEC = course_lib.CLASSROOM.with_(launch_overhead=0.0)  # as in lesson 03
BUCKET = 300_000  # bytes

Stretch = tuple[float, float]


def sum_gradients(replicas: Sequence[nn.Module]) -> None:
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        ring_all_reduce([parameter.grad for parameter in parameters])


def recorded(bucket_bytes: int | None = None) -> course_lib.Trace:
    """One step of a small GPT, without the optimizer; in buckets of so many bytes, if any."""
    corpus = text()
    x, y = corpus.batch(size=16, length=64, seed=0)
    with fresh_devices(N, SPEC) as gpus:
        torch.manual_seed(0)
        gpt = GPT(len(corpus.vocabulary), context=64, width=64, heads=4, depth=6, tied=False)
        replicas = replicate(gpt, gpus)
        shards: list[Sequence[Tensor]] = [split_batch(x, gpus), split_batch(y, gpus)]
        buckets = GradientBuckets(replicas, bucket_bytes) if bucket_bytes else None
        course_lib.synchronize()
        with course_lib.trace(strict=True) as t:
            backward_on_shards(replicas, *shards, next_token_loss)
            buckets.finish() if buckets else sum_gradients(replicas)
    return t


def stretches(t: course_lib.Trace, gpu: int, sends: bool, shortest: float) -> list[Stretch]:
    """When the GPU computes, or sends to another one; what is nearer than ``shortest`` is one."""
    found: list[Stretch] = []
    for span in sorted(t.spans, key=lambda span: span.start):
        is_ours = span.route[0] == gpu if span.route else span.device == gpu
        if not is_ours or (span.route is not None) != sends:
            continue
        if found and span.start - found[-1][1] < shortest:
            found[-1] = found[-1][0], max(found[-1][1], span.end)
        else:
            found.append((span.start, span.end))
    return found


def draw() -> str:
    after, during = recorded(), recorded(BUCKET)
    height = TOP + 2 * PANEL + 30
    picture = Picture(
        height,
        "Two ways through one training step on four GPUs, simulated",
        "Two timelines of four GPUs, above each other, with the same scale. Above, the GPUs "
        f"compute, then send gradients: {after.seconds * 1e3:.0f} ms. Below, they send in buckets "
        f"while backward goes on: {during.seconds * 1e3:.0f} ms, with the same gradients.",
    )
    scale = (RIGHT - LEFT) / max(after.seconds, during.seconds)
    panels = [(after, "gradients summed after backward"),
              (during, "gradients summed in buckets, during backward")]  # fmt: skip
    for number, (t, words) in enumerate(panels):
        top = TOP + number * PANEL + 30
        draw_panel(picture, top, t, scale)
        end = LEFT + t.seconds * scale
        picture.uncover(LEFT, top, RIGHT + 2 - LEFT, N * ROW + 4, SECONDS)
        said = f"{words}: {t.seconds * 1e3:.0f} ms"
        picture.text(LEFT, top - 14, said, 16, "start", bold=True)
        picture.line((end, top), (end, top + N * ROW), colour=SOFT, dashed=True)
    draw_key(picture, height - 22)
    return picture.svg()


def draw_panel(picture: Picture, top: float, t: course_lib.Trace, scale: float) -> None:
    for gpu in range(N):
        y = top + gpu * ROW
        picture.text(LEFT - 10, y + ROW / 2, f"GPU {gpu}", 14, "end")
        picture.line((LEFT, y + ROW - 1), (RIGHT, y + ROW - 1), colour=PALE, thickness=1)
        for sends, colour, down in ((False, BLUE, 2), (True, ORANGE, 13)):
            for start, end in stretches(t, gpu, sends, shortest=0.6 / scale):
                width = max((end - start) * scale, 0.5)
                picture.rect(LEFT + start * scale, y + down, width, 10, colour, radius=0)


def draw_key(picture: Picture, y: float) -> None:
    for x, colour, words in ((LEFT, BLUE, "computes"), (LEFT + 110, ORANGE, "sends gradients")):
        picture.rect(x, y - 5, 22, 10, colour, radius=0)
        picture.text(x + 30, y, words, 14, "start", colour=SOFT)
    words = "one step of a small GPT, recorded on virtual GPUs; times are simulated"
    picture.text(RIGHT, y, words, 14, "end", colour=SOFT)


if __name__ == "__main__":
    save(__file__, draw())
