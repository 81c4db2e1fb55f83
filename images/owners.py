"""Lesson 08: the idea of sharding. Four copies of everything, or four owners of a part each."""

from drawing import DEVICE, GRADIENT, GREY, LAYER, OPTIMIZER, SOFT, Picture, save, tint

GPUS = 4
LEFT, STEP, WIDTH = 238, 168, 132
STATES = [("parameters", LAYER), ("gradients", GRADIENT), ("optimizer's state", OPTIMIZER)]
HEIGHT = 30  # of each of them
ROWS = [  # where it begins, its name, and how it is said
    (70, ("data", "parallelism"), "a copy of everything on every GPU"),
    (258, ("sharded data", "parallelism"), "each GPU is the owner of a part, its shard"),
]


def draw() -> str:
    picture = Picture(
        438,
        "Sharding: copies of everything, or an owner for each part",
        "Two rows of four GPUs. In the upper one, data parallelism, every GPU holds all of the "
        "parameters, all of the gradients and all of the optimizer's state. In the lower one, "
        "sharded data parallelism, each GPU holds another part of the three: GPU 0 the first, "
        "GPU 1 the second, and so on; arrows between the GPUs say that each lends its part to the "
        "others when they need it.",
    )
    for gpu in range(GPUS):
        picture.text(LEFT + gpu * STEP + WIDTH / 2, 28, f"GPU {gpu}", 15, bold=True)
    for row, (top, name, words) in enumerate(ROWS):
        for i, line in enumerate(name):
            picture.text(24, top + 22 + 20 * i, line, 16, "start", bold=True)
        for gpu in range(GPUS):
            draw_gpu(picture, LEFT + gpu * STEP, top, gpu, is_sharded=row == 1)
        picture.text(571, top + 3 * HEIGHT + 32, words, 15)
    draw_lending(picture, ROWS[1][0] + 1.5 * HEIGHT)
    words = "filled: held by this GPU; dashed: lent by its owner when it is needed, and forgotten"
    picture.text(450, 414, words, 14, colour=SOFT)
    return picture.svg()


def draw_gpu(picture: Picture, left: float, top: float, gpu: int, is_sharded: bool) -> None:
    picture.device(left - 6, top - 12, WIDTH + 12, 3 * HEIGHT + 24)
    for i, (words, colour) in enumerate(STATES):
        y = top + i * HEIGHT
        if is_sharded:
            picture.rect(left, y, WIDTH, HEIGHT, "white", GREY, 1, 0, dashed=True)
            part = WIDTH / GPUS
            picture.rect(left + gpu * part, y, part, HEIGHT, tint(colour, 0.5), colour, 1.5, 0)
        else:
            picture.rect(left, y, WIDTH, HEIGHT, tint(colour, 0.5), colour, 1.5, 0)
            picture.text(left + WIDTH / 2, y + HEIGHT / 2, words, 14)
    if is_sharded and gpu == 0:
        for i, (words, _) in enumerate(STATES):
            picture.text(LEFT - 16, top + (i + 0.5) * HEIGHT, words, 13, "end", colour=SOFT)


def draw_lending(picture: Picture, y: float) -> None:
    for gpu in range(GPUS - 1):
        start, end = LEFT + gpu * STEP + WIDTH + 8, LEFT + (gpu + 1) * STEP - 8
        picture.arrow((start, y), (end, y), colour=DEVICE, both=True)


if __name__ == "__main__":
    save(__file__, draw())
