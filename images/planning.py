"""Lesson 14: the two sides of a plan, what a GPU must hold and what a step takes.

Heights and lengths are not to scale: how large each part is, the lesson asks the reader.
"""

from drawing import (
    ACTIVATION,
    GRADIENT,
    GREY,
    LAYER,
    OPTIMIZER,
    SOFT,
    Picture,
    save,
)

LEFT, TOP, WIDE, HIGH = 40, 96, 210, 56
HOLDERS = [  # what is held, its colour, what divides it
    ("weights", LAYER, "÷ tensor, ÷ pipeline"),
    ("gradients", GRADIENT, "÷ tensor, ÷ pipeline"),
    ("optimizer", OPTIMIZER, "÷ tensor, ÷ pipeline, ÷ data if sharded"),
    ("activations", ACTIVATION, "÷ tensor, ÷ pipeline, × microbatches in flight"),
]
PARTS = [  # what takes time, its colour, what it grows with
    ("products", LAYER, ["operations", "÷ speed"]),
    ("all else", ACTIVATION, ["bytes moved", "÷ memory's speed"]),
    ("sums, hops", GRADIENT, ["bytes sent", "÷ links' speed"]),
    ("waits", GREY, ["the pipeline", "fills, empties"]),
    ("exchange", OPTIMIZER, ["gradients,", "weights"]),
]


def draw() -> str:
    picture = Picture(
        590,
        "A plan has two sides: what a GPU must hold, and what a step takes",
        "Above, the memory of one GPU as four boxes on top of each other, each with what divides "
        "it: weights and gradients are divided by tensor and pipeline parallelism, the optimizer "
        "also by data parallelism where it is sharded, activations by tensor and pipeline "
        "parallelism, times the microbatches in flight. Beside it the question: does it fit? "
        "Below, one step as a row of five boxes: products, which take operations divided by "
        "speed; all else, which takes bytes moved divided by the speed of the memory; sums and "
        "hops, which take bytes sent divided by the speed of the links; waits, while the pipeline "
        "fills and empties; and the exchange of gradients and weights between replicas. The first "
        "three repeat for each microbatch. Beside it the question: how many tokens a day?",
    )
    picture.text(24, 30, "1. what a GPU must hold", 17, "start", bold=True)
    picture.text(24, 56, "decides which layouts are possible", 15, "start", colour=SOFT)
    picture.device(LEFT - 12, TOP - 14, WIDE + 24, HIGH * len(HOLDERS) + 28)
    for place, (words, colour, divided) in enumerate(HOLDERS):
        top = TOP + place * HIGH
        picture.box(LEFT, top, WIDE, HIGH - 6, words, colour, 16, bold=True)
        picture.text(LEFT + WIDE + 36, top + HIGH / 2 - 3, divided, 15, "start")
    middle = TOP + HIGH * len(HOLDERS) / 2 - 3
    picture.arrow((640, middle), (706, middle), colour=SOFT)
    picture.text(722, middle - 11, "does it fit in the", 16, "start", bold=True)
    picture.text(722, middle + 11, "memory of a GPU?", 16, "start", bold=True)
    draw_step(picture, 380)
    return picture.svg()


def draw_step(picture: Picture, top: float) -> None:
    picture.text(24, top, "2. what a step takes", 17, "start", bold=True)
    picture.text(24, top + 26, "decides among those that are left", 15, "start", colour=SOFT)
    row, step = top + 86, 126
    picture.bracket(LEFT, LEFT + 3 * step - 6, row - 14, "for each microbatch")
    for place, (words, colour, grows) in enumerate(PARTS):
        left = LEFT + place * step
        picture.box(left, row, step - 6, 50, words, colour, 16, bold=True)
        for line, each in enumerate(grows):
            picture.text(left + step / 2 - 3, row + 68 + 19 * line, each, 14)
    middle = row + 25
    picture.arrow((LEFT + 5 * step, middle), (706, middle), colour=SOFT)
    picture.text(722, middle - 11, "how many tokens", 16, "start", bold=True)
    picture.text(722, middle + 11, "a day?", 16, "start", bold=True)


if __name__ == "__main__":
    save(__file__, draw())
