"""Lesson 04: model parallelism by layers. The model is too large for one GPU; each GPU has a layer.

Activations cross the boundaries to the right in the forward pass, their gradients to the left in
the backward pass.
"""

from drawing import (
    ACTIVATION,
    DATA,
    GRADIENT,
    INK,
    LAYER,
    SOFT,
    Picture,
    save,
)

GPUS = 4
GPU_WIDTH, GAP = 132, 108
TOP, GPU_HEIGHT = 132, 138


def draw() -> str:
    picture = Picture(
        290,
        "Model parallelism: one layer on each of four GPUs",
        "A model of four layers is too large for the memory of one GPU, so each of four GPUs holds "
        "one layer. In the forward pass activations move to the right, from GPU to GPU; in the "
        "backward pass their gradients move to the left.",
    )
    draw_model(picture)
    for i in range(GPUS):
        draw_gpu(picture, i)
    return picture.svg()


def gpu_left(index: int) -> float:
    return 24 + index * (GPU_WIDTH + GAP)


def draw_model(picture: Picture) -> None:
    """The whole model, and for comparison the memory of one GPU."""
    width, left = 140, 170
    for i in range(GPUS):
        start = left + i * width
        picture.box(start, 34, width, 38, f"layer {i + 1}", LAYER)
        ends = (start + width / 2, 84), (gpu_left(i) + GPU_WIDTH / 2, TOP - 4)
        picture.arrow(*ends, colour=SOFT, thickness=1.5)
    picture.rect(left - 8, 26, 1.25 * width, 54, stroke=INK, thickness=2, radius=8, dashed=True)
    picture.text(left - 18, 44, "the memory", anchor="end", bold=True)
    picture.text(left - 18, 62, "of one GPU", anchor="end", bold=True)
    picture.text(left + 4 * width + 14, 44, "a model", anchor="start", bold=True)
    picture.text(left + 4 * width + 14, 62, "too large for it", anchor="start", bold=True)


def draw_gpu(picture: Picture, index: int) -> None:
    left = gpu_left(index)
    picture.device(left, TOP, GPU_WIDTH, GPU_HEIGHT)
    picture.text(left + 14, TOP + 18, f"GPU {index}", size=15, anchor="start", bold=True)
    picture.box(left + 14, TOP + 36, GPU_WIDTH - 28, 46, f"layer {index + 1}", LAYER, bold=True)
    if index in (0, GPUS - 1):
        words, colour = ("batch", DATA) if index == 0 else ("loss", ACTIVATION)
        picture.box(left + 32, TOP + 100, GPU_WIDTH - 64, 28, words, colour)
        ends = [(left + GPU_WIDTH / 2, TOP + y) for y in (100, 82)]
        picture.arrow(*(ends if index == 0 else reversed(ends)), colour=SOFT, thickness=1.5)
    if index == GPUS - 1:
        return
    start, end = left + GPU_WIDTH + 4, left + GPU_WIDTH + GAP - 4
    middle = (start + end) / 2
    picture.text(middle, TOP + 14, "forward:", bold=True)
    picture.text(middle, TOP + 32, "activations")
    picture.arrow((start, TOP + 50), (end, TOP + 50), colour=ACTIVATION, thickness=4)
    picture.arrow((end, TOP + 88), (start, TOP + 88), colour=GRADIENT, thickness=4)
    picture.text(middle, TOP + 106, "backward:", bold=True)
    picture.text(middle, TOP + 124, "gradients")


if __name__ == "__main__":
    save(__file__, draw())
