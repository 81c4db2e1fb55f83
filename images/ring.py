"""Lesson 03: ring all-reduce. Four GPUs in a circle, each with its tensor cut into four chunks.

A chunk is drawn as four stripes, one for what each GPU adds to it; a filled stripe is in. The left
half shows the end of the reduce-scatter, whose chunks still tell the story: chunk c set out on the
GPU after GPU c, and each GPU that it came through holds one part more, up to GPU c, which holds all
four. The right half shows the end of the all-gather.
"""

from drawing import GRADIENT, GREY, INK, SOFT, Picture, save, tint

N = 4  # GPUs, and chunks of a tensor
HALVES = 24, 464  # their left edges
BOX_WIDTH, BOX_HEIGHT = 144, 124
ACROSS, DOWN = 268, 216  # from one GPU to its neighbour
TOP = 92
CHUNK, STRIPE = 26, 12
KEY_TOP = 460


def draw() -> str:
    picture = Picture(
        590,
        "Ring all-reduce on four GPUs",
        "Four GPUs stand in a circle: GPU 0 sends to GPU 1, GPU 1 to GPU 2, GPU 2 to GPU 3, and "
        "GPU 3 back to GPU 0. The tensor of each is cut into chunks 0 to 3. A chunk is drawn as "
        "four stripes, one for the part of each GPU; a filled stripe has been added. Left half: "
        "reduce-scatter, rounds 1 to 3. In each round every GPU sends one chunk to the next GPU, "
        "which adds it: GPU r sends chunk r - 1, then r - 2, then r - 3, counted modulo 4. At the "
        "end GPU r holds chunk r complete, with all four parts, and partial sums of the others. "
        "Right half: all-gather, rounds 4 to 6. GPU r sends the complete chunk r, then r - 1, "
        "then r - 2, and the next GPU keeps a copy. At the end all GPUs hold all chunks complete.",
    )
    left, right = HALVES
    draw_half(picture, left, "reduce-scatter: send, and add", "at the end of round 3", 0)
    draw_half(picture, right, "all-gather: send, and copy", "at the end of round 6", 1)
    picture.line((450, 20), (450, KEY_TOP - 20), colour=tint(SOFT, 0.35), thickness=1)
    draw_key(picture)
    return picture.svg()


def held(phase: int, gpu: int, chunk: int) -> set[int]:
    """The GPUs whose parts are in the chunk on ``gpu``, when a phase is over."""
    if phase == 1:
        return set(range(N))
    came_through = (gpu - chunk - 1) % N + 1
    return {(chunk + 1 + i) % N for i in range(came_through)}


def draw_half(picture: Picture, left: float, name: str, when: str, phase: int) -> None:
    middle = left + (ACROSS + BOX_WIDTH) / 2
    picture.text(middle, 32, name, 17, bold=True)
    picture.text(middle, 58, when, 15, colour=SOFT)
    boxes = [(left + x * ACROSS, TOP + y * DOWN) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
    for gpu, (x, y) in enumerate(boxes):
        draw_gpu(picture, x, y, gpu, phase)
    edge, centre = BOX_HEIGHT / 2, BOX_WIDTH / 2
    outgoing = [(BOX_WIDTH, edge), (centre, BOX_HEIGHT), (0, edge), (centre, 0)]
    incoming = [(0, edge), (centre, 0), (BOX_WIDTH, edge), (centre, BOX_HEIGHT)]
    for gpu in range(N):
        following = (gpu + 1) % N
        start, end = (
            (boxes[box][0] + by[0], boxes[box][1] + by[1])
            for box, by in ((gpu, outgoing[gpu]), (following, incoming[following - 1]))
        )
        picture.arrow(start, end, colour=GRADIENT, thickness=4)
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        if gpu % 2 == 0:
            draw_rounds(picture, x, y + (42 if gpu == 0 else -42), "middle", gpu, phase)
        else:
            anchor, by = ("end", -14) if gpu == 1 else ("start", 14)
            draw_rounds(picture, x + by, y, anchor, gpu, phase)


def draw_rounds(picture: Picture, x: float, y: float, anchor: str, gpu: int, phase: int) -> None:
    """Which chunk ``gpu`` sends in each round of the phase."""
    for i in range(N - 1):
        chunk = (gpu - i - 1 + phase) % N
        words = f"round {1 + i + phase * (N - 1)}: chunk {chunk}"
        picture.text(x, y + 18 * (i - 1), words, 14, anchor)


def draw_gpu(picture: Picture, left: float, top: float, gpu: int, phase: int) -> None:
    picture.device(left, top, BOX_WIDTH, BOX_HEIGHT)
    picture.text(left + 14, top + 16, f"GPU {gpu}", 15, "start", bold=True)
    step = (BOX_WIDTH - 28 - CHUNK) / (N - 1)
    for chunk in range(N):
        x = left + 14 + chunk * step
        parts = held(phase, gpu, chunk)
        draw_chunk(picture, x, top + 46, parts)
        picture.text(x + CHUNK / 2, top + 35, f"{chunk}", 13, bold=len(parts) == N)
    words = "all complete" if phase else f"chunk {gpu} complete"
    picture.text(left + BOX_WIDTH / 2, top + BOX_HEIGHT - 14, words, 14, bold=True)


def draw_chunk(picture: Picture, left: float, top: float, parts: set[int]) -> None:
    for part in range(N):
        fill = tint(GRADIENT, 0.75) if part in parts else "white"
        y = top + part * STRIPE
        picture.rect(left, y, CHUNK, STRIPE, fill, SOFT, thickness=1, radius=0)
    if len(parts) == N:
        picture.rect(left, top, CHUNK, N * STRIPE, stroke=INK, thickness=2.5, radius=2)


def draw_key(picture: Picture) -> None:
    """How to read a chunk."""
    top = KEY_TOP
    picture.rect(24, top, 852, 106, stroke=GREY, radius=10, dashed=True)
    picture.text(40, top + 20, "a chunk, and what is in it", 15, "start", bold=True)
    for part in range(N):
        y = top + 44 + part * 15
        fill = tint(GRADIENT, 0.75) if part == 2 else "white"
        picture.rect(40, y - 7.5, 40, 15, fill, SOFT, thickness=1, radius=0)
        picture.text(88, y, f"the part of GPU {part}", 13, "start")
    examples = [
        ({2}, "at the start", "on GPU 2: its own part"),
        ({1, 2}, "under way", "the sum of some parts"),
        ({0, 1, 2, 3}, "complete", "the sum of all four"),
    ]
    for i, (parts, name, words) in enumerate(examples):
        left = 252 + i * 212
        draw_chunk(picture, left, top + 40, parts)
        picture.text(left + CHUNK + 10, top + 54, name, 14, "start", bold=True)
        picture.text(left + CHUNK + 10, top + 74, words, 13, "start")


if __name__ == "__main__":
    save(__file__, draw())
