"""Lesson 01: one training step on one GPU, and what holds memory for how long.

Time runs to the right. Activations pile up in the forward pass and go away in the backward pass,
last layer first: a hill. Parameters and optimizer state stay. Gradients wait for the step.
"""

from drawing import (
    ACTIVATION,
    BACKWARD,
    DATA,
    FORWARD,
    GRADIENT,
    LAYER,
    OPTIMIZER,
    SOFT,
    Picture,
    save,
    tint,
)

LEFT, UNIT = 146, 70
# Each operation, its colour, and how long it takes: a backward pass takes longer than a forward.
STEPS = [
    ("batch", DATA, 0.75),
    ("layer 1", FORWARD, 1.0),
    ("layer 2", FORWARD, 1.0),
    ("layer 3", FORWARD, 1.0),
    ("loss", ACTIVATION, 0.7),
    ("layer 3", BACKWARD, 1.6),
    ("layer 2", BACKWARD, 1.6),
    ("layer 1", BACKWARD, 1.6),
    ("optimizer step", OPTIMIZER, 1.15),
]
FORWARDS, BACKWARDS = [1, 2, 3], [7, 6, 5]  # where layers 1, 2 and 3 are in STEPS
PARAMETERS = 36  # the height of a bar


def draw() -> str:
    picture = Picture(
        544,
        "One training step, and the memory it holds",
        "A timeline. A batch goes forward through layers 1, 2 and 3, then comes the loss, then the "
        "backward pass through layers 3, 2 and 1, then the optimizer step. Below, four bars on the "
        "same timeline show the memory held. Parameters: always. Activations: a hill, which grows "
        "in the forward pass and shrinks in the backward pass. Gradients: grow in the backward "
        "pass and stay until the step. Optimizer state: always. Heights are not to scale.",
    )
    edges = [LEFT + UNIT * sum(step[2] for step in STEPS[:i]) for i in range(len(STEPS) + 1)]
    picture.bracket(edges[1], edges[4] - 4, 44, "forward")
    picture.bracket(edges[5], edges[8] - 4, 44, "backward")
    for (name, colour, _), start, end in zip(STEPS, edges, edges[1:], strict=False):
        lines = name.split() if colour == OPTIMIZER else [name]
        picture.box(start, 62, end - start - 4, 46, lines, colour)
    picture.text(24, 85, "one GPU does", anchor="start", bold=True)

    for edge in (edges[1], edges[4], edges[5], edges[8]):
        picture.line((edge - 2, 116), (edge - 2, 496), colour=tint(SOFT, 0.35), thickness=1)
    picture.text(24, 130, "its memory holds", anchor="start", bold=True)
    end = edges[-1] - 4

    always = LEFT, end - LEFT
    lane(picture, 146, PARAMETERS, "parameters")
    picture.box(always[0], 146, always[1], PARAMETERS, "always", LAYER)

    block = 38
    top = 224
    lane(picture, top, 3 * block, "activations")
    for layer in (1, 2, 3):
        start, stop = edges[FORWARDS[layer - 1]], edges[BACKWARDS[layer - 1] + 1] - 4
        words = f"of layer {layer}"
        picture.box(start, top + (3 - layer) * block, stop - start, block, words, ACTIVATION)
    peak = (edges[FORWARDS[2]] + edges[BACKWARDS[2] + 1] - 4) / 2
    picture.rect(peak - 110, top - 26, 220, 22, "white")
    picture.text(peak, top - 14, "the peak: all layers at once", bold=True)
    picture.arrow((edges[1] + 10, top + 66), (edges[2] + 46, top + 8), colour=SOFT, thickness=1.5)
    picture.arrow((edges[7] - 40, top + 8), (edges[8] - 14, top + 66), colour=SOFT, thickness=1.5)
    picture.text(edges[2] - 26, top + 14, "grow", colour=SOFT)
    picture.text(edges[8] - 40, top + 14, "shrink", colour=SOFT)

    top = 368
    lane(picture, top, PARAMETERS, "gradients")
    for i, position in enumerate(reversed(BACKWARDS)):
        height = PARAMETERS / 3
        start = edges[position]
        picture.box(start, top + (2 - i) * height, end - start, height, "", GRADIENT, radius=2)

    words = "grow, then wait for the step"
    picture.text(edges[5] + 4, top - 6, words, anchor="start", colour=SOFT)

    top = 426
    lane(picture, top, PARAMETERS, "optimizer", "state")
    words = "always"
    picture.box(always[0], top, always[1], PARAMETERS, words, OPTIMIZER)

    picture.arrow((LEFT, 496), (end, 496), colour=SOFT)
    picture.text(end, 516, "time", anchor="end", colour=SOFT)
    words = "heights are not to scale: the lesson measures them"
    picture.text(LEFT, 516, words, anchor="start", colour=SOFT)
    return picture.svg()


def lane(picture: Picture, top: float, height: float, *names: str) -> None:
    """The name of a row, at its left."""
    for i, name in enumerate(names):
        y = top + height / 2 + 18 * (i - (len(names) - 1) / 2)
        picture.text(24, y, name, size=15, anchor="start")


if __name__ == "__main__":
    save(__file__, draw())
