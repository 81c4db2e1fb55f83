"""Lesson 08: ZeRO. What each of four GPUs holds for the same model, at each of the stages.

A bar is 16 bytes a parameter high, and as wide as there are parameters. Where a GPU holds a quarter
of the parameters' bytes, its quarter is filled and the rest is dashed: filled area is memory.
"""

from drawing import GRADIENT, GREY, LAYER, OPTIMIZER, SOFT, Picture, save, tint

GPUS = 4
BYTE = 7  # pixels high
BARS, BAR_WIDTH, BAR_STEP = 268, 88, 110
TOP, ROW_STEP = 74, 144
STATES = [  # what it is, bytes a parameter, colour, from which stage on it is sharded
    ("parameters", 2, LAYER, 3),
    ("gradients", 2, GRADIENT, 2),
    ("master weights", 4, OPTIMIZER, 1),
    ("momentum", 4, OPTIMIZER, 1),
    ("variance", 4, OPTIMIZER, 1),
]
ROWS = [  # its name, bytes a parameter, for four GPUs, what is sent, in which collectives
    (("data", "parallelism"), "16", "16", "2 ×", ["all-reduce"]),
    (("ZeRO", "stage 1"), "4 + 12/N", "7", "2 ×", ["reduce-scatter,", "all-gather"]),
    (("ZeRO", "stage 2"), "2 + 14/N", "5.5", "2 ×", ["reduce-scatter,", "all-gather"]),
    (("ZeRO", "stage 3"), "16/N", "4", "3 ×", ["two all-gathers,", "one reduce-scatter"]),
]


def draw() -> str:
    picture = Picture(
        702,
        "ZeRO: what each of four GPUs holds",
        "Four rows, one for plain data parallelism and one for each of ZeRO's stages 1, 2 and 3; "
        "in each a bar for each of four GPUs, drawn to scale. From top to bottom a bar has 2 bytes "
        "a parameter of parameters, 2 of gradients, and 12 of optimizer state in float32: 4 of "
        "master weights, 4 of momentum, 4 of variance. Data parallelism: every GPU holds all, 16 "
        "bytes a parameter; 2 times the parameters are sent. Stage 1: each GPU holds its own "
        "quarter of the optimizer state and all of the rest, 4 + 12/N bytes, where N is the number "
        "of GPUs; 2 times the parameters are sent. Stage 2: a quarter of the gradients too, 2 + "
        "14/N bytes; 2 times. Stage 3: a quarter of everything, 16/N bytes; 3 times. What is sent "
        "is for each GPU and step, to be multiplied by (N - 1)/N.",
    )
    for gpu in range(GPUS):
        middle = BARS + gpu * BAR_STEP + BAR_WIDTH / 2
        picture.text(middle, 46, f"GPU {gpu}", 15, bold=True)
    picture.text(24, 24, "what each GPU holds", 16, "start", bold=True)
    picture.text(252, 46, "bytes a parameter", 14, "end", colour=SOFT)
    picture.text(704, 46, "on each; here N = 4", 15, "start", bold=True)
    for stage in range(len(ROWS)):
        draw_row(picture, stage)
    words = (
        "filled: held by this GPU; dashed: held by another one. Filled area is memory, to scale."
    )
    picture.text(450, 650, words, 15)
    picture.text(450, 676, "sent: by each GPU in a step, times (N - 1)/N", 15)
    return picture.svg()


def draw_row(picture: Picture, stage: int) -> None:
    name, size, for_four, sent, collectives = ROWS[stage]
    top = TOP + stage * ROW_STEP
    middle = top + 8 * BYTE
    for i, line in enumerate(name):
        picture.text(24, middle - 10 + 20 * i, line, 16, "start", bold=True)
    y = top
    for words, count, _, _ in STATES:
        picture.text(236, y + count * BYTE / 2, words, 13, "end")
        picture.text(252, y + count * BYTE / 2, f"{count}", 13, "end")
        y += count * BYTE
    for gpu in range(GPUS):
        draw_gpu(picture, BARS + gpu * BAR_STEP, top, gpu, stage)
    left = 704
    picture.text(left, middle - 46, size, 19, "start", bold=True)
    picture.text(left, middle - 24, f"bytes a parameter; here {for_four}", 14, "start")
    picture.text(left, middle + 6, "the parameters", 14, "start", lead=f"sent: {sent}")
    for i, line in enumerate(collectives):
        picture.text(left, middle + 26 + 17 * i, line, 13, "start", colour=SOFT)


def draw_gpu(picture: Picture, left: float, top: float, gpu: int, stage: int) -> None:
    picture.device(left - 6, top - 6, BAR_WIDTH + 12, 16 * BYTE + 12)
    for _, count, colour, sharded_from in STATES:
        height = count * BYTE
        if stage < sharded_from:
            picture.rect(left, top, BAR_WIDTH, height, tint(colour, 0.5), colour, 1.5, 0)
        else:
            picture.rect(left, top, BAR_WIDTH, height, "white", GREY, 1, 0, dashed=True)
            part = BAR_WIDTH / GPUS
            picture.rect(left + gpu * part, top, part, height, tint(colour, 0.5), colour, 1.5, 0)
        top += height


if __name__ == "__main__":
    save(__file__, draw())
