"""Lesson 05: pipeline parallelism. Four stages on four GPUs, and the batch in four microbatches.

While a GPU works on one microbatch, the next GPU works on the one before. What that saves is the
lesson's question, so the time grid shows one batch at a time alone.
"""

from drawing import (
    ACTIVATION,
    BACKWARD,
    DATA,
    FORWARD,
    GRADIENT,
    GREY,
    LAYER,
    SOFT,
    Picture,
    save,
)

GPUS = MICROBATCHES = 4
BACKWARD_TIME = 2  # in forward times
BATCH_WIDTH, GPU_WIDTH, GAP = 100, 116, 84
TOP, GPU_HEIGHT = 48, 130
TIME_LEFT, ROW, ROW_STEP = 96, 26, 31
NAIVE_TOP = 238
UNIT = (876 - TIME_LEFT) / (GPUS * (1 + BACKWARD_TIME))  # the batch's forward pass on one GPU


def draw() -> str:
    picture = Picture(
        396,
        "Pipeline parallelism on four GPUs",
        "A model is cut into four stages, one on each of four GPUs, and a batch into four "
        "microbatches. At the moment shown GPU 3 works on microbatch 0, GPU 2 on microbatch 1, "
        "GPU 1 on microbatch 2 and GPU 0 on microbatch 3. Activations move to the right, "
        "gradients to the left. Below is a time grid with a row for each GPU. "
        "One batch at a time: a staircase of forward passes down from GPU 0 to GPU 3, then of "
        "backward passes up again, each twice as long; everywhere else the GPUs are idle.",
    )
    draw_batch(picture)
    for i in range(GPUS):
        draw_gpu(picture, i)
    draw_naive(picture)
    draw_axis(picture)
    return picture.svg()


def draw_batch(picture: Picture) -> None:
    picture.text(24, 26, "one batch, cut into four microbatches", 16, "start", bold=True)
    words = "one moment: each GPU works on a microbatch of its own"
    picture.text(876, 26, words, 14, "end", colour=SOFT)
    height = GPU_HEIGHT / MICROBATCHES
    for i in range(MICROBATCHES):
        picture.box(24, TOP + i * height, BATCH_WIDTH, height, f"microbatch {i}", DATA, 13)
    middle = TOP + GPU_HEIGHT / 2
    ends = (24 + BATCH_WIDTH, middle), (gpu_left(0), middle)
    picture.arrow(*ends, colour=SOFT)


def gpu_left(index: int) -> float:
    return 876 - GPU_WIDTH - (GPUS - 1 - index) * (GPU_WIDTH + GAP)


def draw_gpu(picture: Picture, index: int) -> None:
    left = gpu_left(index)
    picture.device(left, TOP, GPU_WIDTH, GPU_HEIGHT)
    picture.text(left + 12, TOP + 18, f"GPU {index}", 15, "start", bold=True)
    inner = left + 10, GPU_WIDTH - 20
    picture.box(inner[0], TOP + 36, inner[1], 40, f"stage {index}", LAYER, bold=True)
    words = f"microbatch {GPUS - 1 - index}"
    picture.box(inner[0], TOP + 92, inner[1], 28, words, DATA, 13)
    middle = left + GPU_WIDTH / 2
    picture.arrow((middle, TOP + 92), (middle, TOP + 76), colour=SOFT, thickness=1.5)
    if index == GPUS - 1:
        return
    start, end = left + GPU_WIDTH + 3, left + GPU_WIDTH + GAP - 3
    middle = (start + end) / 2
    picture.text(middle, TOP + 12, "forward:", bold=True)
    picture.text(middle, TOP + 30, "activations")
    picture.arrow((start, TOP + 48), (end, TOP + 48), colour=ACTIVATION, thickness=4)
    picture.arrow((end, TOP + 82), (start, TOP + 82), colour=GRADIENT, thickness=4)
    picture.text(middle, TOP + 100, "backward:", bold=True)
    picture.text(middle, TOP + 118, "gradients")


def draw_naive(picture: Picture) -> None:
    """The staircase of lesson 04."""
    words = "three of the four GPUs are idle at any moment"
    picture.text(24, NAIVE_TOP - 22, words, 15, "start", lead="One batch at a time:")
    total = GPUS * (1 + BACKWARD_TIME)
    for i in range(GPUS):
        top = row(picture, NAIVE_TOP, i)
        back = total - BACKWARD_TIME * (i + 1)
        idle(picture, top, 0, i, "idle")
        work(picture, top, i, 1, "forward", FORWARD)
        idle(picture, top, i + 1, back, "idle")
        work(picture, top, back, BACKWARD_TIME, "backward", BACKWARD)
        idle(picture, top, back + BACKWARD_TIME, total, "idle")


def row(picture: Picture, top: float, index: int) -> float:
    """Name a row of a time grid; return where it begins."""
    top += index * ROW_STEP
    picture.text(24, top + ROW / 2, f"GPU {index}", 14, "start", bold=True)
    return top


def work(
    picture: Picture, top: float, start: float, length: float, words: str, colour: str
) -> None:
    left = TIME_LEFT + start * UNIT
    picture.box(left + 1, top, length * UNIT - 2, ROW, words, colour, strength=0.35, radius=3)


def idle(picture: Picture, top: float, start: float, end: float, words: str) -> None:
    """A hatched box; the small ones have no room for their name."""
    left, width = TIME_LEFT + start * UNIT, (end - start) * UNIT
    if not width:
        return
    picture.rect(left + 1, top, width - 2, ROW, "url(#hatch)", GREY, thickness=1, radius=3)
    pill = 9 * len(words)
    if width > pill + 24:
        picture.rect(left + (width - pill) / 2, top + 4, pill, ROW - 8, "white", radius=8)
        picture.text(left + width / 2, top + ROW / 2, words, colour=SOFT)


def draw_axis(picture: Picture) -> None:
    y = NAIVE_TOP + GPUS * ROW_STEP + 4
    picture.arrow((TIME_LEFT, y), (876, y), colour=SOFT)
    picture.text(TIME_LEFT, y + 19, "time", anchor="start", colour=SOFT)


if __name__ == "__main__":
    save(__file__, draw())
