"""Lesson 00: a host and four GPUs. Each GPU has its own memory and its own queue of work.

The host runs the Python program and puts operations into the queues; each GPU takes them out in
order. Tensors live in one memory, and cross a link to get to another one.
"""

from drawing import ACTIVATION, DATA, DEVICE, INK, LAYER, SOFT, Picture, save, tint

# What still waits, oldest first: GPU 0 is almost done, and the host has just come to GPU 3.
QUEUES = [["relu"], ["add", "relu"], ["matmul", "add", "relu"], ["matmul", "add"]]
TENSORS = ["x", "w"]

TOP, ROW, GAP = 52, 96, 14
HOST = (24, 178)  # left, width
GPU = (318, 462)
HOST_LINK, FAST_LINK = 2, 9  # how thick they are drawn


def draw() -> str:
    picture = Picture(
        528,
        "A host and four GPUs",
        "A host, with a CPU that runs your Python program and with its own memory, stands on the "
        "left. It puts operations into the queues of four GPUs. Each GPU has its own queue, or "
        "stream, its own compute units and its own memory, which holds tensors. A slow link joins "
        "the host with each GPU; fast links join the GPUs with each other.",
    )
    bottom = TOP + 4 * ROW + 3 * GAP
    draw_host(picture, bottom)
    left, width = GPU
    bus = left + width + 44
    middle_of_memory = [TOP + i * (ROW + GAP) + 70 for i in range(4)]
    for y in middle_of_memory:
        picture.line((left + width - 12, y), (bus, y), colour=ACTIVATION, thickness=FAST_LINK)
    ends = (bus, middle_of_memory[0] - FAST_LINK / 2), (bus, middle_of_memory[-1] + FAST_LINK / 2)
    picture.line(*ends, colour=ACTIVATION, thickness=FAST_LINK)
    for i in range(4):
        draw_gpu(picture, i, TOP + i * (ROW + GAP))
    picture.text(bus + 12, TOP + 206, "link", 15, "start", bold=True)
    picture.text(bus + 12, TOP + 226, "fast", anchor="start")
    picture.text(left + 191, TOP - 18, "its own queue (stream)", 15, bold=True)
    picture.text(left + 264, bottom + 20, "its own memory", 15, bold=True)
    return picture.svg()


def draw_host(picture: Picture, bottom: float) -> None:
    left, width = HOST
    picture.device(left, TOP, width, bottom - TOP)
    picture.text(left + width / 2, TOP + 22, "Host", size=17, bold=True)
    inner = left + 14, width - 28
    picture.box(inner[0], TOP + 44, inner[1], 184, colour=DEVICE, strength=0.3)
    picture.text(left + width / 2, TOP + 64, "CPU", bold=True)
    picture.text(left + width / 2, TOP + 84, "your Python program", 13)
    picture.rect(inner[0] + 8, TOP + 104, inner[1] - 16, 112, "white", tint(DEVICE, 0.6))
    for i, line in enumerate(["for gpu in gpus:", "  y = x @ w", "  y = y + b", "  y = y.relu()"]):
        picture.text(inner[0] + 12, TOP + 124 + 24 * i, line, 13, "start", code=True)
    picture.rect(inner[0], TOP + 244, inner[1], 168, "white", INK)
    picture.text(left + width / 2, TOP + 268, "its own memory", 15, bold=True)
    picture.box(inner[0] + 25, TOP + 298, inner[1] - 50, 86, "the batch", DATA)


def draw_gpu(picture: Picture, index: int, top: float) -> None:
    left, width = GPU
    host_edge = HOST[0] + HOST[1]
    picture.device(left, top, width, ROW)
    picture.text(left + 36, top + ROW / 2, f"GPU {index}", bold=True)

    # The queue, with its mouth towards the host and its end at the compute units.
    queue, end = left + 78, left + 304
    picture.rect(queue, top + 10, end - queue, 34, "white", "none")
    for y in (top + 10, top + 44):
        picture.line((queue, y), (end, y))
    for i, operation in enumerate(QUEUES[index]):
        picture.box(end - 72 * (i + 1), top + 15, 66, 24, operation, SOFT, 13, strength=0.12)
    picture.arrow((host_edge, top + 27), (queue, top + 27), thickness=1.5, dashed=True)
    picture.arrow((end, top + 27), (end + 28, top + 27), thickness=1.5)
    picture.box(end + 28, top + 10, width - 12 - (end + 28 - left), 34, "compute", LAYER, bold=True)

    picture.rect(queue, top + 53, width - 12 - 78, 34, "white", INK)
    picture.text(queue + 10, top + 70, "memory", anchor="start")
    for i, tensor in enumerate(TENSORS):
        picture.box(queue + 90 + 140 * i, top + 58, 126, 24, f"tensor {tensor}", DATA, 13)
    ends = (host_edge, top + 70), (queue, top + 70)
    picture.line(*ends, colour=ACTIVATION, thickness=HOST_LINK)
    if index == 0:
        middle = (host_edge + left) / 2
        picture.text(middle, top + 14, "enqueue", 15, bold=True)
        picture.text(middle, top + 56, "link", 15, bold=True)
        picture.text(middle, top + 84, "slow")


if __name__ == "__main__":
    save(__file__, draw())
