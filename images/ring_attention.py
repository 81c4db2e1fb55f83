"""Lesson 07: ring attention. Four GPUs in a circle, and a quarter of the tokens on each.

The queries of a GPU stay; a block of keys and values goes on to the next GPU after every step. The
circle is shown in step 1. The table tells for all pairs in which step they meet.
"""

from drawing import ACTIVATION, INK, SOFT, Picture, save, tint

N = 4  # GPUs, blocks of keys and values, and steps
SHOWN = 1  # the step that the circle shows
LEFT, TOP = 24, 92
BOX_WIDTH, BOX_HEIGHT = 152, 148
ACROSS, DOWN = 300, 216  # from one GPU to its neighbour
TABLE_LEFT, TABLE_TOP, CELL = 598, 118, 68
STAYS = 0.12  # how strong the tint is of what stays on a GPU


def draw() -> str:
    picture = Picture(
        536,
        "Ring attention on four GPUs",
        "Four GPUs stand in a circle: GPU 0 sends to GPU 1, GPU 1 to GPU 2, GPU 2 to GPU 3, and "
        "GPU 3 back to GPU 0. GPU r has the queries Q r of its quarter of the tokens, and their "
        "running softmax; both stay. A block of keys and values K,V is with each GPU for a step, "
        "then it travels to the next. The circle shows step 1: GPU 0 has block 3, GPU 1 block 0, "
        "GPU 2 block 1, GPU 3 block 2. A table beside it has a row for the queries of each GPU and "
        "a column for each block of keys; a cell holds the step in which the two meet, which is "
        "row minus column, modulo 4. Row Q 0: 0, 3, 2, 1. Row Q 1: 1, 0, 3, 2. Row Q 2: 2, 1, 0, "
        "3. Row Q 3: 3, 2, 1, 0. A dashed line runs above the diagonal: the keys beyond it come "
        "after all queries of the row, and a causal mask hides them.",
    )
    middle = LEFT + (ACROSS + BOX_WIDTH) / 2
    picture.text(middle, 32, "queries stay, keys and values travel", 17, bold=True)
    picture.text(middle, 58, f"step {SHOWN}, of steps 0 to {N - 1}", 15, colour=SOFT)
    draw_ring(picture)
    picture.line((508, 20), (508, 468), colour=tint(SOFT, 0.35), thickness=1)
    draw_table(picture)
    words = "GPU r has the keys and values of block (r - s) mod 4. After step 3 all have met."
    picture.text(450, 504, words, 15, lead="In step s")
    return picture.svg()


def draw_ring(picture: Picture) -> None:
    boxes = [(LEFT + x * ACROSS, TOP + y * DOWN) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
    for gpu, (x, y) in enumerate(boxes):
        draw_gpu(picture, x, y, gpu)
    edge, centre = BOX_HEIGHT / 2, BOX_WIDTH / 2
    outgoing = [(BOX_WIDTH, edge), (centre, BOX_HEIGHT), (0, edge), (centre, 0)]
    incoming = [(0, edge), (centre, 0), (BOX_WIDTH, edge), (centre, BOX_HEIGHT)]  # at the next
    places = [("middle", 0, -16), ("end", -14, 0), ("middle", 0, -16), ("start", 14, 0)]
    for gpu, (anchor, right, down) in enumerate(places):
        following = (gpu + 1) % N
        start, end = (
            (boxes[box][0] + by[0], boxes[box][1] + by[1])
            for box, by in ((gpu, outgoing[gpu]), (following, incoming[gpu]))
        )
        picture.arrow(start, end, colour=ACTIVATION, thickness=4)
        x, y = (start[0] + end[0]) / 2 + right, (start[1] + end[1]) / 2 + down
        picture.text(x, y, f"K,V {(gpu - SHOWN) % N} goes on", 14, anchor)


def draw_gpu(picture: Picture, left: float, top: float, gpu: int) -> None:
    picture.device(left, top, BOX_WIDTH, BOX_HEIGHT)
    picture.text(left + 14, top + 18, f"GPU {gpu}", 15, "start", bold=True)
    width = BOX_WIDTH - 24
    rows = [
        (36, f"Q {gpu}: stays", STAYS),
        (72, f"K,V {(gpu - SHOWN) % N}: travels", 0.55),
        (108, "running softmax", STAYS),
    ]
    for down, words, strength in rows:
        bold = strength != STAYS
        picture.box(left + 12, top + down, width, 30, words, ACTIVATION, 14, bold, strength)


def draw_table(picture: Picture) -> None:
    """In which step each GPU's queries meet each block of keys."""
    left, top = TABLE_LEFT, TABLE_TOP
    middle = left + N * CELL / 2 - 30  # of the table with the names of its rows
    picture.text(middle, 32, "the step in which they meet", 17, bold=True)
    picture.text(left + N * CELL / 2, 70, "keys and values of block", 15, colour=SOFT)
    for i in range(N):
        picture.text(left + (i + 0.5) * CELL, top - 20, f"K,V {i}", 15, bold=True)
        picture.text(left - 50, top + (i + 0.5) * CELL - 9, f"Q {i}", 15, bold=True)
        picture.text(left - 50, top + (i + 0.5) * CELL + 10, f"on GPU {i}", 14, colour=SOFT)
    for row in range(N):
        for column in range(N):
            step = (row - column) % N
            x, y = left + column * CELL, top + row * CELL
            words = str(step)
            strength = 0.55 if step == SHOWN else 0.12
            picture.box(x, y, CELL, CELL, words, ACTIVATION, 20, step == SHOWN, strength, radius=0)
    for row in range(N):
        column = (row - SHOWN) % N
        x, y = left + column * CELL + 2, top + row * CELL + 2
        picture.rect(x, y, CELL - 4, CELL - 4, stroke=INK, thickness=2.5, radius=2)
    corners = [(left + CELL, top - 6)]
    for i in range(1, N):
        corners += [(left + i * CELL, top + i * CELL), (left + (i + 1) * CELL, top + i * CELL)]
    picture.line(*corners, dashed=True, thickness=2.5)
    bottom = top + N * CELL
    picture.text(middle, bottom + 24, f"framed: step {SHOWN}, as in the circle", 14)
    picture.text(middle, bottom + 50, "tokens in order, right of the dashed line:", 14)
    picture.text(middle, bottom + 69, "later keys, which a causal mask hides", 14)


if __name__ == "__main__":
    save(__file__, draw())
