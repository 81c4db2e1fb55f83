"""Lesson 13: the two factors of the time to a loss: what a step knows, and what a step takes."""

from math import cos, radians, sin

from drawing import BACKWARD, FORWARD, GRADIENT, GREY, OPTIMIZER, ORANGE, SOFT, Picture, save, tint

STEP = 118  # pixels that the mean of many examples' gradients goes
# By how many degrees an example's gradient points beside the true one, and how long it is.
EXAMPLES = [
    *((-48, 0.8), (30, 1.3), (-16, 1.2), (70, 0.6), (-34, 1.3)),
    *((19, 1.0), (-76, 0.5), (52, 0.75), (-4, 1.4)),
]
ROWS = [("few examples", EXAMPLES[:1] + EXAMPLES[2:3]), ("more examples", EXAMPLES)]


def draw() -> str:
    picture = Picture(
        470,
        "What decides the time to a loss",
        "Time to a loss is steps times the seconds of a step. On the left, what a step knows: each "
        "example's gradient is a thin arrow in a direction of its own, and the step goes along "
        "their mean, a thick arrow. The mean of few examples points beside the true gradient, a "
        "dashed arrow; the mean of more lies nearer to it. On the right, what a step takes: a bar "
        "for computing, which more GPUs make shorter, and a bar for the exchange of the gradients, "
        "which depends on the links and on the bytes that are sent.",
    )
    picture.text(450, 30, "time to a loss  =  steps  ×  seconds of a step", 20, bold=True)
    picture.text(220, 72, "how many steps: what a step knows", 16, bold=True)
    picture.text(672, 72, "how long each: what a step takes", 16, bold=True)
    picture.line((450, 62), (450, 446), colour=GREY, thickness=1)
    for row, (words, examples) in enumerate(ROWS):
        draw_gradients(picture, 190, 168 + 140 * row, words, examples)
    draw_legend(picture, 416)
    draw_times(picture)
    return picture.svg()


def draw_gradients(
    picture: Picture, x: float, y: float, words: str, examples: list[tuple[float, float]]
) -> None:
    picture.text(24, y, words, 15, "start", bold=True)
    ends = [
        (STEP * length * cos(radians(angle)), STEP * length * sin(radians(angle)))
        for angle, length in examples
    ]
    for across, down in ends:
        picture.arrow((x, y), (x + across, y + down), colour=tint(GRADIENT, 0.55), thickness=1.3)
    picture.arrow((x, y), (x + 1.25 * STEP, y), colour=SOFT, thickness=2, dashed=True)
    across = sum(end[0] for end in ends) / len(ends)
    down = sum(end[1] for end in ends) / len(ends)
    picture.arrow((x, y), (x + across, y + down), colour=OPTIMIZER, thickness=4)


def draw_legend(picture: Picture, y: float) -> None:
    for x, words, colour, thickness, dashed in (
        (24, "one example's", tint(GRADIENT, 0.55), 1.3, False),
        (170, "their mean: the step", OPTIMIZER, 4, False),
        (350, "the true one", SOFT, 2, True),
    ):
        picture.arrow((x, y), (x + 30, y), colour=colour, thickness=thickness, dashed=dashed)
        picture.text(x, y + 22, words, 13, "start", colour=SOFT)


def draw_times(picture: Picture) -> None:
    left = 484
    picture.box(left, 112, 220, 48, ["computing"], FORWARD, 15)
    picture.box(left + 224, 112, 150, 48, ["exchange"], BACKWARD, 15)
    picture.text(left, 184, "one GPU's part of the batch", 13, "start", colour=SOFT)
    picture.text(left + 224, 184, "all gradients, on the links", 13, "start", colour=SOFT)
    picture.text(left, 236, "What can be changed, and what it touches:", 15, "start", bold=True)
    for place, (what, touches) in enumerate((
        ("more GPUs", "seconds"),
        ("a larger batch", "seconds, steps"),
        ("another learning rate", "steps"),
        ("faster links", "seconds"),
        ("fewer bytes in a sum", "seconds, steps"),
        ("meeting now and then", "seconds, steps"),
    )):  # fmt: skip
        y = 268 + 30 * place
        picture.text(left, y, what, 15, "start")
        for word in touches.split(", "):
            x = left + 200 if word == "seconds" else left + 296
            colour = FORWARD if word == "seconds" else ORANGE
            picture.box(x, y - 12, 86, 24, word, colour, 13)


if __name__ == "__main__":
    save(__file__, draw())
