"""Lesson 15: one step of data parallelism, and where each of the twelve instruments looks."""

from drawing import ACTIVATION, DATA, DEVICE, GRADIENT, LAYER, OPTIMIZER, SOFT, Picture, save

GPUS = 3
LANE, TOP = 62, 122  # height of a device's lane, and where the first one begins
BOX = 34
COLUMNS = [  # left edge, width, name, colour, and the instruments that look there
    (100, 96, "shard", DATA, ["examples"]),
    (222, 104, "forward", LAYER, ["masks", "buffers"]),
    (352, 104, "backward", ACTIVATION, ["gradient norm"]),
    (482, 96, "sum", GRADIENT, ["bytes", "waits"]),
    (604, 96, "update", OPTIMIZER, ["distance from", "the start"]),
    (726, 136, "parameters", LAYER, ["replica against", "replica"]),
]
BELOW = TOP + GPUS * LANE + 10


def draw() -> str:
    picture = Picture(
        490,
        "Twelve instruments on one step of data parallelism",
        "Four lanes, one device above and three GPUs below. In each lane a step goes from left to "
        "right: shard (or the whole batch), forward, backward, sum, update, parameters; the sum "
        "reaches over all three GPUs. Below each part stand the instruments that look there: "
        "examples at the shard, masks and buffers at forward, the gradient norm after backward, "
        "bytes and waits at the sum, the distance from the start at the update, replica against "
        "replica at the parameters. An arrow between the parameters of one device and those of GPU "
        "0 is labelled: against one "
        "device. A bar below the whole step has operations, memory and timeline.",
    )
    draw_lane(picture, 34, "one device")
    for gpu in range(GPUS):
        draw_lane(picture, TOP + gpu * LANE, f"GPU {gpu}")
    left, width, *_ = COLUMNS[3]
    height = (GPUS - 1) * LANE + BOX
    picture.box(left, TOP, width, height, ["sum", "over all"], GRADIENT, bold=True)
    left, width, *_ = COLUMNS[5]
    middle = left + width / 2
    picture.arrow((middle, 34 + BOX), (middle, TOP), both=True)
    picture.text(middle - 12, (34 + BOX + TOP) / 2, "against one device", 15, "end", bold=True)
    for left, width, _, colour, names in COLUMNS:
        middle = left + width / 2
        picture.line((middle, BELOW - 16), (middle, BELOW + 8), colour=colour, thickness=3)
        for row, name in enumerate(names):
            picture.text(middle, BELOW + 26 + 22 * row, name, 15, bold=True)
    picture.bracket(100, 862, BELOW + 96, "")
    picture.text(
        481, BELOW + 120, "over the whole step: operations, memory, timeline", 15, bold=True
    )
    picture.text(450, 466, "bold: an instrument. Each sees what it looks at.", 14, colour=SOFT)
    return picture.svg()


def draw_lane(picture: Picture, top: float, name: str) -> None:
    picture.device(14, top - 8, 872, BOX + 16)
    picture.text(24, top + BOX / 2, name, 14, "start")
    alone = {0: "batch", 3: "gradient"} if name == "one device" else {}
    for i, (left, width, words, colour, _) in enumerate(COLUMNS):
        if i != 3 or alone:
            picture.box(left, top, width, BOX, alone.get(i, words), colour)
        if i + 1 < len(COLUMNS):
            end = COLUMNS[i + 1][0]
            picture.arrow((left + width, top + BOX / 2), (end, top + BOX / 2), colour=DEVICE)


if __name__ == "__main__":
    save(__file__, draw())
