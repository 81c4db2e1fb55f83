"""The README's picture: five ways to split training over four GPUs, drawn alike.

Every GPU is drawn with the whole batch and the whole model; what it holds is filled, the rest
is pale. So a look tells what each method splits, and what it copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from drawing import ACTIVATION, GRADIENT, GREY, LAYER, SOFT, Picture, save, tint

N = 4  # GPUs, samples, positions and layers
CELL = 10.5
GPU_WIDTH, GPU_HEIGHT, GAP = 56, 132, 13
PANEL_WIDTH, PANEL_HEIGHT = 276, 262


@dataclass
class Method:
    """A way to split the training.

    Attributes:
        data: whether GPU ``gpu`` holds sample ``row`` at position ``column`` of the sequence.
        model: whether GPU ``gpu`` holds part ``column`` of the matrices of layer ``layer``.
        moves: what crosses the links, in the words below the GPUs.
        chain: whether it goes from each GPU to the next one only.
    """

    name: str
    split: str
    copied: str
    data: Callable[[int, int, int], bool]
    model: Callable[[int, int, int], bool]
    moves: str
    chain: bool = False


METHODS = [
    Method(
        "data parallelism",
        "the batch",
        "the model",
        data=lambda gpu, row, column: row == gpu,
        model=lambda gpu, layer, column: True,
        moves="gradients",
    ),
    Method(
        "model parallelism (layers)",
        "the layers",
        "nothing",
        data=lambda gpu, row, column: gpu == 1,
        model=lambda gpu, layer, column: layer == gpu,
        moves="activations; one GPU works at a time",
        chain=True,
    ),
    Method(
        "pipeline parallelism",
        "the layers + microbatches",
        "nothing",
        data=lambda gpu, row, column: row == N - 1 - gpu,
        model=lambda gpu, layer, column: layer == gpu,
        moves="activations; all GPUs work at once",
        chain=True,
    ),
    Method(
        "tensor parallelism",
        "the matrices of each layer",
        "the batch",
        data=lambda gpu, row, column: True,
        model=lambda gpu, layer, column: column == gpu,
        moves="activations, in every layer",
    ),
    Method(
        "sequence parallelism",
        "the sequence",
        "the model",
        data=lambda gpu, row, column: column == gpu,
        model=lambda gpu, layer, column: True,
        moves="keys and values; gradients",
    ),
]


def draw() -> str:
    picture = Picture(
        2 * PANEL_HEIGHT + 20,
        "Five ways to train one model on four GPUs",
        "Five small drawings of four GPUs. "
        + " ".join(
            f"{method.name.capitalize()}: split {method.split}, copied {method.copied}; "
            f"across the links: {method.moves}."
            for method in METHODS
        ),
    )
    for i, method in enumerate(METHODS):
        draw_method(picture, 24 + i % 3 * (PANEL_WIDTH + 12), 12 + i // 3 * PANEL_HEIGHT, method)
    draw_key(picture, 24 + 2 * (PANEL_WIDTH + 12), 12 + PANEL_HEIGHT)
    return picture.svg()


def draw_method(picture: Picture, left: float, top: float, method: Method) -> None:
    start = left + 8
    tops = top + 12
    for gpu in range(N):
        x = start + gpu * (GPU_WIDTH + GAP)
        draw_gpu(picture, x, tops, f"GPU {gpu}", method, gpu)
        if method.chain and gpu < N - 1:
            edge = x + GPU_WIDTH
            ends = (edge, tops + 50), (edge + GAP, tops + 50)
            picture.arrow(*ends, colour=ACTIVATION, thickness=2.5)
    colour = GRADIENT if method.moves == "gradients" else ACTIVATION
    width = N * GPU_WIDTH + (N - 1) * GAP
    y = tops + GPU_HEIGHT + 14
    if not method.chain:
        for gpu in range(N):
            x = start + gpu * (GPU_WIDTH + GAP) + GPU_WIDTH / 2
            picture.line((x, y - 13), (x, y), colour=colour, thickness=2.5)
        first = start + GPU_WIDTH / 2
        ends = (first, y), (start + width - GPU_WIDTH / 2, y)
        picture.line(*ends, colour=colour, thickness=2.5)
    picture.text(start + width / 2, y + 14, method.moves, 13, colour=SOFT)
    y += 40
    picture.text(start, y, method.name, 16, "start", bold=True)
    picture.text(start, y + 21, method.split, 14, "start", lead="split:")
    picture.text(start, y + 40, method.copied, 14, "start", lead="copied:")


def draw_gpu(
    picture: Picture, left: float, top: float, name: str, method: Method, gpu: int
) -> None:
    picture.device(left, top, GPU_WIDTH, GPU_HEIGHT)
    picture.text(left + GPU_WIDTH / 2, top + 13, name, 13)
    draw_parts(picture, left + (GPU_WIDTH - N * CELL) / 2, top + 27, CELL, method, gpu)


def draw_parts(
    picture: Picture, left: float, top: float, size: float, method: Method, gpu: int
) -> None:
    """The batch as a square of samples and positions, and below it the model, layer by layer."""
    for row in range(N):
        for column in range(N):
            x, y = left + column * size, top + row * size
            draw_cell(picture, x, y, size, ACTIVATION, method.data(gpu, row, column))
            y = top + N * size + 8 + row * (size + 2.5)
            draw_cell(picture, x, y, size, LAYER, method.model(gpu, row, column))


def draw_cell(picture: Picture, x: float, y: float, size: float, colour: str, held: bool) -> None:
    fill = colour if held else tint(GREY, 0.3)
    picture.rect(x, y, size, size, fill, "white", thickness=1, radius=0)


def draw_key(picture: Picture, left: float, top: float) -> None:
    """How to read a GPU."""
    left, top = left + 8, top + 12
    picture.rect(left, top, N * GPU_WIDTH + (N - 1) * GAP, 234, stroke=GREY, radius=10, dashed=True)
    picture.text(left + 14, top + 22, "how to read it", 16, "start", bold=True)
    size = 14
    picture.device(left + 14, top + 42, N * size + 28, 170)
    picture.text(left + 56, top + 58, "a GPU", 14)
    draw_parts(picture, left + 28, top + 72, size, METHODS[0], 1)
    words = left + 104
    picture.text(words, top + 82, "the batch", 14, "start", bold=True)
    picture.text(words, top + 100, "a row: one sample", 13, "start")
    picture.text(words, top + 117, "a column: one position", 13, "start")
    picture.text(words, top + 147, "the model", 14, "start", bold=True)
    picture.text(words, top + 165, "a row: one layer", 13, "start")
    for i, colour in enumerate([ACTIVATION, LAYER]):
        draw_cell(picture, words + i * size, top + 191, size, colour, held=True)
    picture.text(words + 2 * size + 6, top + 198, "here", 13, "start")
    draw_cell(picture, words + 74, top + 191, size, GREY, held=False)
    picture.text(words + 74 + size + 6, top + 198, "not here", 13, "start")


if __name__ == "__main__":
    save(__file__, draw())
