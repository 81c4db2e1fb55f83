"""Lesson 12: a machine of two nodes. Links inside, and a network card for each GPU."""

from drawing import ACTIVATION, GRADIENT, GREY, SOFT, Picture, save, tint

NODES = 2
SIZE = 4
LEFTS = 30, 470  # of the nodes
WIDTH, TOP, HEIGHT = 400, 56, 232
GPU, STEP = 78, 95
SWITCH = 352  # top of the network


def draw() -> str:
    picture = Picture(
        440,
        "Two nodes of four GPUs, joined by a network",
        "Two boxes side by side, node 0 and node 1, with four GPUs in each: GPUs 0 to 3 and GPUs 4 "
        "to 7. Inside a node a thick bar joins all four GPUs: links of 300 gigabytes a second. "
        "Below each GPU is a network card, and a thin line of 25 gigabytes a second leads from "
        "each card down to one network, which joins both nodes.",
    )
    for node, left in enumerate(LEFTS):
        draw_node(picture, left, node)
    picture.box(30, SWITCH, 840, 40, "the network: 25 GB/s through each card", GRADIENT, 15, True)
    picture.text(450, 418, "thick: many bytes a second; thin: few", 14, colour=SOFT)
    return picture.svg()


def draw_node(picture: Picture, left: float, node: int) -> None:
    picture.rect(left, TOP, WIDTH, HEIGHT, "white", GREY, 1.5, 12, dashed=True)
    picture.text(left + WIDTH / 2, 32, f"node {node}", 17, bold=True)
    picture.box(left + 16, TOP + 18, WIDTH - 32, 34, "links inside: 300 GB/s", ACTIVATION, 15, True)
    for place in range(SIZE):
        x = left + 19 + place * STEP
        middle = x + GPU / 2
        picture.line((middle, TOP + 52), (middle, TOP + 84), colour=ACTIVATION, thickness=10)
        picture.device(x, TOP + 84, GPU, 50)
        picture.text(middle, TOP + 109, f"GPU {node * SIZE + place}", 15, bold=True)
        picture.line((middle, TOP + 134), (middle, TOP + 168), colour=GREY, thickness=2)
        picture.rect(x + 10, TOP + 168, GPU - 20, 34, tint(GRADIENT, 0.25), GRADIENT)
        picture.text(middle, TOP + 185, "card", 14)
        picture.line((middle, TOP + 202), (middle, SWITCH), colour=GRADIENT, thickness=2)


if __name__ == "__main__":
    save(__file__, draw())
