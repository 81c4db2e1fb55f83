"""Lesson 11: a training loop of four lines, and where each engine steps in."""

from drawing import (
    ACTIVATION,
    GRADIENT,
    GREY,
    LAYER,
    SOFT,
    Picture,
    save,
)

CODE, FIRST, STEP, WIDTH = 24, 258, 158, 148  # where columns begin, and how wide they are
TOP, ROW, HEIGHT = 92, 84, 72
LINES = [
    ("model = engine(model)", "once"),
    ("loss = f(model(x), y)", "forward"),
    ("loss.backward()", "backward"),
    ("optimizer.step()", ""),
]
# For each engine, at each line: what travels (in its colour), or what it does there.
ENGINES = {
    "DDP": [
        (["copies of", "rank 0's model"], LAYER),
        None,
        (["all-reduce of", "gradients, bucket", "by bucket"], GRADIENT),
        None,
    ],
    "FSDP2": [
        (["parameters", "become shards"], GREY),
        (["all-gather of", "a layer, before it"], LAYER),
        (["all-gather again,", "reduce-scatter", "of gradients"], GRADIENT),
        (["each rank its", "own shards"], GREY),
    ],
    "DTensor": [
        (["weights become", "columns and rows"], GREY),
        (["all-reduce of", "activations"], ACTIVATION),
        (["all-reduce of", "their gradients"], GRADIENT),
        (["each rank its", "own shards"], GREY),
    ],
    "pipelining": [
        (["each rank takes", "some layers"], GREY),
        (["activations to", "the next rank"], ACTIVATION),
        (["their gradients", "to the one before"], GRADIENT),
        (["each rank its", "own layers"], GREY),
    ],
}


def draw() -> str:
    picture = Picture(
        TOP + ROW * len(LINES) + 62,
        "Where each engine steps into the training loop",
        "A table. Its rows are the lines of a training loop: the model is given to an engine, "
        "forward, backward, optimizer step. Its columns are four engines. DDP copies the model of "
        "rank 0 once, and all-reduces gradients bucket by bucket in backward. FSDP2 cuts "
        "parameters into shards, gathers each layer before its forward and again before its "
        "backward, and reduce-scatters gradients; the optimizer works on shards. DTensor cuts "
        "weights by columns and rows, and all-reduces activations in forward and their gradients "
        "in backward. Pipelining gives each rank some layers; activations go to the next rank in "
        "forward, their gradients to the one before in backward.",
    )
    for column, (name, cells) in enumerate(ENGINES.items()):
        left = FIRST + column * STEP
        picture.text(left + WIDTH / 2, 50, name, 17, bold=True)
        for row, cell in enumerate(cells):
            y = TOP + row * ROW
            if cell is None:
                picture.text(left + WIDTH / 2, y + HEIGHT / 2, "as on one GPU", 13, colour=SOFT)
            else:
                words, colour = cell
                picture.box(left, y, WIDTH, HEIGHT, words, colour, size=15)
    for row, (line, when) in enumerate(LINES):
        y = TOP + row * ROW + HEIGHT / 2
        picture.text(CODE, y - (9 if when else 0), line, 15, "start", code=True)
        if when:
            picture.text(CODE, y + 14, when, 14, "start", colour=SOFT)
    for row in range(1, len(LINES)):
        y = TOP + row * ROW - (ROW - HEIGHT) / 2
        picture.line((CODE, y), (FIRST + 4 * STEP - 10, y), colour="#DDDDDD", thickness=1)
    words = "blue: parameters travel; green: gradients; orange: activations; grey: nothing travels"
    picture.text(450, TOP + ROW * len(LINES) + 26, words, 14, colour=SOFT)
    return picture.svg()


if __name__ == "__main__":
    save(__file__, draw())
