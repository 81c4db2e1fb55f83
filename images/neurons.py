"""Lesson 06: the idea of tensor parallelism. Some of the hidden neurons on each of two GPUs."""

from drawing import ACTIVATION, GREY, LAYER, SOFT, Picture, save, tint

INPUTS, HIDDEN, OUTPUTS = 190, 450, 710  # the columns, from left to right
TOP, STEP = 112, 44
NEURONS, ENDS = 6, 3  # in the hidden layer; at the input and at the output
RADIUS = 26  # of the dots, as the width of a box with round corners
COLOURS = [LAYER, ACTIVATION]


def draw() -> str:
    picture = Picture(
        424,
        "Tensor parallelism: each GPU has some of the hidden neurons",
        "A network of three layers: three inputs on the left, six hidden neurons in the middle, "
        "three outputs on the right. The upper three hidden neurons are in a box named GPU 0, the "
        "lower three in one named GPU 1. Lines lead from every input to every hidden neuron and "
        "from every hidden neuron to every output; those of a GPU's neurons, on both sides, have "
        "the colour of that GPU.",
    )
    words = "what leads into a neuron, and what leads out of it, is on the neuron's GPU"
    picture.text(450, 28, words, 16)
    for gpu in range(2):
        draw_group(picture, gpu)
    for neuron in range(NEURONS):
        draw_weights(picture, neuron)
    for neuron in range(NEURONS):
        dot(picture, HIDDEN, hidden_at(neuron), COLOURS[neuron * 2 // NEURONS])
    for end in range(ENDS):
        dot(picture, INPUTS, end_at(end), GREY)
        dot(picture, OUTPUTS, end_at(end), GREY)
    middle = end_at(1)
    picture.text(INPUTS - 34, middle, "inputs: all on", 14, "end", colour=SOFT)
    picture.text(INPUTS - 34, middle + 19, "both GPUs", 14, "end", colour=SOFT)
    picture.text(OUTPUTS + 34, middle, "outputs: each a sum", 14, "start", colour=SOFT)
    picture.text(OUTPUTS + 34, middle + 19, "over all neurons", 14, "start", colour=SOFT)
    return picture.svg()


def hidden_at(neuron: int) -> float:
    return TOP + neuron * STEP + (30 if neuron >= NEURONS // 2 else 0)


def end_at(end: int) -> float:
    middle = (hidden_at(0) + hidden_at(NEURONS - 1)) / 2
    return middle + (end - 1) * 2 * STEP


def draw_group(picture: Picture, gpu: int) -> None:
    first = hidden_at(gpu * NEURONS // 2)
    height = (NEURONS / 2 - 1) * STEP + RADIUS + 20
    picture.device(HIDDEN - 62, first - RADIUS / 2 - 10, 124, height)
    outside = first - RADIUS / 2 - 26 if gpu == 0 else first + height - 2
    picture.text(HIDDEN, outside, f"GPU {gpu}", 15, bold=True)


def draw_weights(picture: Picture, neuron: int) -> None:
    colour = COLOURS[neuron * 2 // NEURONS]
    for end in range(ENDS):
        here = HIDDEN, hidden_at(neuron)
        picture.line((INPUTS, end_at(end)), here, colour=tint(colour, 0.7), thickness=1.5)
        picture.line(here, (OUTPUTS, end_at(end)), colour=tint(colour, 0.7), thickness=1.5)


def dot(picture: Picture, x: float, y: float, colour: str) -> None:
    left, top = x - RADIUS / 2, y - RADIUS / 2
    picture.rect(left, top, RADIUS, RADIUS, tint(colour, 0.5), colour, 2, RADIUS / 2)


if __name__ == "__main__":
    save(__file__, draw())
