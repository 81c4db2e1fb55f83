"""Lesson 02: data parallelism. The batch is split; every GPU has the whole model.

Each GPU computes the loss and the gradients of its own shard. The gradients meet in an all-reduce,
which hands every GPU the same sum; so all update their copies alike.
"""

from drawing import ACTIVATION, DATA, GRADIENT, LAYER, OPTIMIZER, SOFT, Picture, save

GPUS = 4
GPU_WIDTH, GAP = 198, 20
TOP, GPU_HEIGHT = 140, 262
REDUCE = 456


def draw() -> str:
    picture = Picture(
        560,
        "Data parallelism on four GPUs",
        "One batch is split into four shards, one for each GPU. Every GPU holds the same full "
        "model of three layers and computes the loss and the gradients of its shard. The gradients "
        "go down into one box, all-reduce (sum); the same sum comes back up to every GPU, and each "
        "updates its copy of the model alike.",
    )
    shard = 852 / GPUS
    picture.text(450, 30, "one batch, split into four shards", 16, bold=True)
    for i in range(GPUS):
        left = 24 + i * (GPU_WIDTH + GAP)
        picture.box(24 + i * shard, 50, shard, 44, f"shard {i}", DATA)
        draw_gpu(picture, left, i)
        picture.arrow((left + 59, 94), (left + 59, TOP + 40), colour=SOFT)
    words = "all-reduce (sum): add up the four gradients, give everyone the sum"
    picture.box(24, REDUCE, 852, 48, words, GRADIENT, size=16, bold=True)
    picture.text(450, 532, "Each GPU then updates its own copy of the model.", 15)
    return picture.svg()


def draw_gpu(picture: Picture, left: float, index: int) -> None:
    picture.device(left, TOP, GPU_WIDTH, GPU_HEIGHT)
    picture.text(left + 150, TOP + 22, f"GPU {index}", size=15, bold=True)
    column, width, middle = left + 14, 90, left + 59
    for layer in range(3):
        top = TOP + 40 + 38 * layer
        picture.box(column, top, width, 30, f"layer {layer + 1}", LAYER)
        picture.arrow((middle, top + 30), (middle, top + 38 + 0.5), colour=SOFT, thickness=1.2)
    picture.box(column, TOP + 154, width, 30, "loss", ACTIVATION)
    picture.arrow((middle, TOP + 184), (middle, TOP + 208), colour=GRADIENT)
    picture.box(column, TOP + 208, width, 38, "gradients", GRADIENT)
    picture.arrow((middle, TOP + 246), (middle, REDUCE), colour=GRADIENT, thickness=3)
    picture.text(middle + 10, TOP + 196, "backward", 13, "start", colour=SOFT)
    picture.text(middle - 10, TOP + GPU_HEIGHT + 26, "its own", 13, "end", colour=SOFT)

    side = left + 150
    picture.box(side - 33, TOP + 208, 66, 38, "update", OPTIMIZER)
    picture.arrow((side, REDUCE), (side, TOP + 246), colour=GRADIENT, thickness=3)
    picture.text(side - 10, TOP + GPU_HEIGHT + 26, "the sum", 13, "end", colour=SOFT)
    model, edge = TOP + 40 + 53, column + width + 10
    picture.arrow((side, TOP + 208), (side, model), (edge, model), colour=OPTIMIZER)
    ends = (edge - 5, TOP + 40), (edge, TOP + 40), (edge, TOP + 146), (edge - 5, TOP + 146)
    picture.line(*ends, colour=SOFT, thickness=1.5)
    picture.text(side + 4, TOP + 66, "full model", 13)


if __name__ == "__main__":
    save(__file__, draw())
