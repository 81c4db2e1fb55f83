"""Lesson 09: a mesh. Eight GPUs in two data replicas of two pipeline stages of two tensor ranks.

The eight are the corners of a cube, seen from the front so that no edges cross: tensor rank 0 of
each group is outside, rank 1 inside. A tensor group shares a node.
"""

from drawing import ACTIVATION, GRADIENT, LAYER, SOFT, Picture, save

NODE_WIDTH, NODE_HEIGHT = 280, 182
LEFTS, TOPS = (116, 596), (80, 370)
GPU_WIDTH, GPU_HEIGHT = 96, 46
ASIDE, OUTER, INNER = 12, 34, 14  # from the sides of its node to a GPU
FASTEST = "The fastest links carry the tensor groups:"


def draw() -> str:
    picture = Picture(
        640,
        "A mesh of eight GPUs: data x pipeline x tensor = 2 x 2 x 2",
        "Four nodes, two columns by two rows, with two GPUs in each. The columns are pipeline "
        "stages 0 and 1; the rows are data replicas 0 and 1. The two GPUs of a node are a tensor "
        "group: tensor ranks 0 and 1. GPU number = 4 times replica + 2 times stage + tensor rank. "
        "Within a tensor group, on the thickest line, travel activations, four times a block. "
        "Between the stages of a replica, GPUs of the same tensor rank are joined: activations "
        "travel, once a boundary. Between the replicas, GPUs of the same stage and tensor rank are "
        "joined: gradients travel, once a step. The fastest links, those within a node, carry the "
        "tensor groups.",
    )
    words = "eight GPUs, a mesh of data × pipeline × tensor = 2 × 2 × 2"
    picture.text(450, 26, words, 16, bold=True)
    for i in range(2):
        middle = LEFTS[i] + NODE_WIDTH / 2
        picture.text(middle, TOPS[0] - 14, f"pipeline stage {i}", 15, bold=True)
        middle = TOPS[i] + NODE_HEIGHT / 2
        picture.text(24, middle - 10, "data", 15, "start", bold=True)
        picture.text(24, middle + 10, f"replica {i}", 15, "start", bold=True)
    for replica in range(2):
        for stage in range(2):
            draw_node(picture, replica, stage)
    draw_pipeline(picture)
    draw_data(picture)
    for replica in range(2):
        for stage in range(2):
            for tensor in range(2):
                draw_gpu(picture, replica, stage, tensor)
    x, y = (LEFTS[0] + NODE_WIDTH + LEFTS[1]) / 2, (TOPS[0] + NODE_HEIGHT + TOPS[1]) / 2
    picture.text(x, y - 10, "activations on the way forward,", 14, colour=SOFT)
    picture.text(x, y + 10, "their gradients on the way back", 14, colour=SOFT)
    words = "the most is sent, the most often, within them, and everybody waits for it."
    picture.text(450, TOPS[1] + NODE_HEIGHT + 28, words, 15, lead=FASTEST)
    words = "A data replica sends the least often, and while it computes: a slower link will do."
    picture.text(450, TOPS[1] + NODE_HEIGHT + 54, words, 15)
    return picture.svg()


def centre(replica: int, stage: int, tensor: int) -> tuple[float, float]:
    """The middle of a GPU; tensor rank 0 is in the outer corner of its node, 1 in the inner one."""
    near_left, near_top = (stage == 0) == (tensor == 0), (replica == 0) == (tensor == 0)
    x = ASIDE + GPU_WIDTH / 2
    # The outer GPU leaves room for the node's name, which is at the outer edge.
    y = (OUTER if tensor == 0 else INNER) + GPU_HEIGHT / 2
    left, top = LEFTS[stage], TOPS[replica]
    return left + (x if near_left else NODE_WIDTH - x), top + (y if near_top else NODE_HEIGHT - y)


def draw_node(picture: Picture, replica: int, stage: int) -> None:
    left, top = LEFTS[stage], TOPS[replica]
    picture.device(left, top, NODE_WIDTH, NODE_HEIGHT)
    y = top + (17 if replica == 0 else NODE_HEIGHT - 17)
    words = "a tensor group on fast links"
    picture.text(left + NODE_WIDTH / 2, y, words, 14, lead=f"node {2 * replica + stage}:")
    outer, inner = centre(replica, stage, 0), centre(replica, stage, 1)
    right, down = (1 if stage == 0 else -1), (1 if replica == 0 else -1)  # from outer to inner
    x = outer[0] + right * 26
    start, end = (x, outer[1] + down * GPU_HEIGHT / 2), (inner[0] - right * GPU_WIDTH / 2, inner[1])
    picture.arrow(start, (x, inner[1]), end, colour=ACTIVATION, thickness=8, both=True)
    # In the corner over or under the inner GPU, beyond the line to the next stage.
    y = inner[1] - down * (GPU_HEIGHT / 2 + 21)
    x, anchor = (left + NODE_WIDTH - 10, "end") if stage == 0 else (left + 10, "start")
    picture.text(x, y - 9, "activations,", 14, anchor, bold=True)
    picture.text(x, y + 9, "four times a block", 14, anchor)


def draw_gpu(picture: Picture, replica: int, stage: int, tensor: int) -> None:
    x, y = centre(replica, stage, tensor)
    left, top = x - GPU_WIDTH / 2, y - GPU_HEIGHT / 2
    picture.rect(left, top, GPU_WIDTH, GPU_HEIGHT, "white", LAYER, thickness=2)
    picture.text(x, y - 10, f"GPU {4 * replica + 2 * stage + tensor}", 15, bold=True)
    picture.text(x, y + 11, f"tensor {tensor}", 14)


def draw_pipeline(picture: Picture) -> None:
    """From each GPU of stage 0 to the one of stage 1."""
    for replica in range(2):
        ys = []
        for tensor in range(2):
            start, end = centre(replica, 0, tensor), centre(replica, 1, tensor)
            half = GPU_WIDTH / 2
            ends = (start[0] + half, start[1]), (end[0] - half, end[1])
            picture.arrow(*ends, colour=ACTIVATION, thickness=4, both=True)
            ys.append(start[1])
        x, y = (LEFTS[0] + NODE_WIDTH + LEFTS[1]) / 2, sum(ys) / 2
        picture.text(x, y - 10, "activations,", 15, bold=True)
        picture.text(x, y + 10, "once a boundary", 15)


def draw_data(picture: Picture) -> None:
    """From each GPU of replica 0 to the one of replica 1."""
    for stage in range(2):
        xs = []
        for tensor in range(2):
            start, end = centre(0, stage, tensor), centre(1, stage, tensor)
            half = GPU_HEIGHT / 2
            ends = (start[0], start[1] + half), (end[0], end[1] - half)
            picture.arrow(*ends, colour=GRADIENT, thickness=2, both=True)
            xs.append(start[0])
        x, y = sum(xs) / 2, (TOPS[0] + NODE_HEIGHT + TOPS[1]) / 2
        picture.text(x, y - 10, "gradients,", 15, bold=True)
        picture.text(x, y + 10, "once a step", 15)


if __name__ == "__main__":
    save(__file__, draw())
