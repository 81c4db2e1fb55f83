"""Lesson 10: one program with a list of tensors, or four programs with a tensor each."""

from drawing import ACTIVATION, DEVICE, GREY, SOFT, Picture, save, tint

GPUS = 4
HALVES = 24, 470  # their left edges
HALF = 406  # width of one
STEP, WIDTH = 102, 92  # from one GPU to the next, and one
CODE_TOP, CODE_HEIGHT = 62, 96
GPU_TOP, GPU_HEIGHT = 246, 104


def draw() -> str:
    picture = Picture(
        402,
        "One program for four GPUs, or four programs with one GPU each",
        "Left half: a single controller. One program holds a list of four tensors, loops over it, "
        "and an arrow leads from it to each of four GPUs, which hold the tensors. Right half: one "
        "program a GPU. Four boxes with the same text, each with a rank from 0 to 3 of its own, "
        "and one arrow from each to the one GPU below it. No program stands above them.",
    )
    left, right = HALVES
    picture.text(left + HALF / 2, 30, "lessons 00 to 09: a single controller", 17, bold=True)
    picture.text(right + HALF / 2, 30, "this lesson: one process a GPU", 17, bold=True)
    picture.line((450, 20), (450, 346), colour=tint(SOFT, 0.35), thickness=1)

    draw_program(picture, left, HALF, ["for rank in range(4):", "    tensors[rank].mul_(2)"], 14)
    for gpu in range(GPUS):
        x = left + gpu * STEP
        draw_gpu(picture, x, gpu, f"tensors[{gpu}]")
        start = left + HALF / 2 + (gpu - 1.5) * 40
        picture.arrow((start, CODE_TOP + CODE_HEIGHT), (x + WIDTH / 2, GPU_TOP), colour=DEVICE)

    for gpu in range(GPUS):
        x = right + gpu * STEP
        draw_program(picture, x, WIDTH, ["tensor", " .mul_(2)"], 13)
        picture.text(x + WIDTH / 2, CODE_TOP + CODE_HEIGHT + 18, f"rank {gpu}", 14, bold=True)
        draw_gpu(picture, x, gpu, "tensor")
        middle = x + WIDTH / 2
        picture.arrow((middle, CODE_TOP + CODE_HEIGHT + 32), (middle, GPU_TOP), colour=DEVICE)
    words = "the same text in all four; a program knows its rank, and sees its own tensor only"
    picture.text(450, 376, words, 14, colour=SOFT)
    return picture.svg()


def draw_program(
    picture: Picture, left: float, width: float, lines: list[str], size: float
) -> None:
    picture.rect(left, CODE_TOP, width, CODE_HEIGHT, "white", GREY, 2, radius=8)
    picture.text(left + 10, CODE_TOP + 18, "program", 13, "start", colour=SOFT)
    for i, line in enumerate(lines):
        picture.text(left + 10, CODE_TOP + 46 + 24 * i, line, size, "start", code=True)


def draw_gpu(picture: Picture, left: float, gpu: int, name: str) -> None:
    picture.device(left, GPU_TOP, WIDTH, GPU_HEIGHT)
    picture.text(left + WIDTH / 2, GPU_TOP + 18, f"GPU {gpu}", 14, bold=True)
    picture.box(left + 8, GPU_TOP + 44, WIDTH - 16, 40, name, ACTIVATION, 14)


if __name__ == "__main__":
    save(__file__, draw())
