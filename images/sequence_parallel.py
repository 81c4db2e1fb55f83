"""Lesson 07: sequence-parallel regions. One transformer block on two GPUs, from left to right.

Above, tensor parallelism as lesson 06 leaves it: norm and add work on copies of all tokens. Below,
each GPU has half of the tokens there. An activation is drawn as its matrix, one row a token; what a
GPU does not hold is dashed. The borders of both stand in the same places.
"""

from drawing import ACTIVATION, GRADIENT, GREY, INK, LAYER, SOFT, Picture, save, tint

NAMES = 56  # the width of the column with the names of the GPUs
BORDER = 96
REGION = (852 - NAMES - 10 - 4 * BORDER) / 5
OPERATIONS = "norm", "attention", "add, norm", "MLP", "add"
TOKENS, D, HIDDEN = 60, 68, 76  # pixels; a hidden layer is drawn less wide than it is
SMALL = 28  # the height of an activation in the upper part
ABOVE = 44  # the top of the upper part
TOP, GPU_HEIGHT, GAP = 246, 150, 138
HALF = 44  # the height of half a box of a border
ARROWS = "the arrows are", "the forward pass;", "backward goes", "against them"


def draw() -> str:
    picture = Picture(
        730,
        "Sequence-parallel regions: a transformer block on two GPUs",
        "One transformer block from left to right: norm, attention, add and norm, MLP, add. Above, "
        "tensor parallelism of lesson 06. In norm and add both GPUs have a copy of the activation, "
        "T times D, where T is the number of tokens. In attention each has half of the columns, "
        "those of its heads; in the MLP those of its hidden neurons. Before attention and before "
        "the MLP: nothing in the forward pass, all-reduce in the backward pass. After them: "
        "all-reduce in the forward pass, nothing in the backward pass. Below, with "
        "sequence-parallel regions. In norm and add each GPU has half of the rows, those of its "
        "tokens, T/2 times D. Attention and MLP are as before: all tokens of half of the columns. "
        "Before attention and before the MLP: all-gather in the forward pass, reduce-scatter in "
        "the backward pass. After them: reduce-scatter in the forward pass, all-gather in the "
        "backward pass.",
    )
    draw_tensor_parallel(picture)
    words = "in norm and add each GPU has half of the tokens"
    picture.text(450, TOP - 18, words, 16, lead="with sequence-parallel regions:")
    for gpu in range(2):
        draw_gpu(picture, gpu)
    for index in range(4):
        draw_meeting(picture, index)
    for i, words in enumerate(ARROWS):
        picture.text(34, TOP + GPU_HEIGHT + GAP / 2 + 18 * (i - 1.5), words, 13, "start")
    bottom = TOP + 2 * GPU_HEIGHT + GAP
    words = "T: tokens, D: width of the model. An all-reduce is a reduce-scatter and an all-gather."
    picture.text(450, bottom + 24, words, 15)
    return picture.svg()


def left_of(region: int) -> float:
    return 24 + NAMES + region * (REGION + BORDER)


def border_left(index: int) -> float:
    """Border ``index`` is behind region ``index``."""
    return left_of(index) + REGION


def draw_operation(picture: Picture, region: int, top: float) -> None:
    words = OPERATIONS[region]
    picture.box(left_of(region), top, REGION, 26, words, LAYER)


def draw_border(picture: Picture, index: int, top: float, forward: str, backward: str) -> None:
    """What is sent there, in each direction of training."""
    left, width = border_left(index) + 2, BORDER - 4
    passes = [("forward", forward, ACTIVATION), ("backward", backward, GRADIENT)]
    for i, (name, words, colour) in enumerate(passes):
        y = top + i * HALF
        picture.box(left, y, width, HALF, "", colour)
        picture.text(left + width / 2, y + 13, name, 13, bold=True)
        picture.text(left + width / 2, y + 31, words, 13)


def draw_tensor_parallel(picture: Picture) -> None:
    words = "in norm and add each GPU has a copy of all tokens"
    picture.text(450, 24, words, 16, lead="tensor parallelism (lesson 06):")
    picture.device(24, ABOVE, 852, 154)
    rows = [ABOVE + 50, ABOVE + 58 + SMALL]
    shape_y = ABOVE + 140
    for gpu, top in enumerate(rows):
        picture.text(34, top + SMALL / 2, f"GPU {gpu}", 15, "start", bold=True)
    for region in range(5):
        draw_operation(picture, region, ABOVE + 8)
        width = HIDDEN if region == 3 else D
        left = left_of(region) + (REGION - width) / 2
        for gpu, top in enumerate(rows):
            if region % 2:
                draw_split(picture, left, top, width, SMALL, "columns", gpu)
            else:
                picture.rect(left, top, width, SMALL, tint(ACTIVATION, 0.4), ACTIVATION)
        shape = ["T × D", "T × D/2", "T × D", "T × 4D/2", "T × D"][region]
        picture.text(left_of(region) + REGION / 2, shape_y, shape, 13)
    for index in range(4):
        pair = ["nothing", "all-reduce"]
        draw_border(picture, index, ABOVE + 38, *(reversed(pair) if index % 2 else pair))
        start = border_left(index)
        ends = (start + 4, shape_y), (start + BORDER - 4, shape_y)
        picture.arrow(*ends, colour=SOFT, thickness=1.5)


def gpu_top(gpu: int) -> float:
    return TOP + gpu * (GPU_HEIGHT + GAP)


def activation_top(gpu: int) -> float:
    """Towards the other GPU, with room for the words behind."""
    return gpu_top(gpu) + (GPU_HEIGHT - TOKENS - 8 if gpu == 0 else 8)


def draw_gpu(picture: Picture, gpu: int) -> None:
    top, rows = gpu_top(gpu), activation_top(gpu)
    picture.device(24, top, 852, GPU_HEIGHT)
    picture.text(34, rows + TOKENS / 2, f"GPU {gpu}", 15, "start", bold=True)
    for region in range(5):
        draw_operation(picture, region, top + (8 if gpu == 0 else GPU_HEIGHT - 34))
        width = HIDDEN if region == 3 else D
        middle = left_of(region) + REGION / 2
        cut = "columns" if region % 2 else "rows"
        draw_split(picture, middle - width / 2, rows, width, TOKENS, cut, gpu)
        y = top + (56 if gpu == 0 else GPU_HEIGHT - 56)
        holds = ["its tokens", "its heads", "its tokens", "its neurons", "its tokens"][region]
        shape = ["T/2 × D", "T × D/2", "T/2 × D", "T × 4D/2", "T/2 × D"][region]
        picture.text(middle, y - 9, holds, bold=True)
        picture.text(middle, y + 9, shape)


def draw_split(
    picture: Picture, left: float, top: float, width: float, height: float, cut: str, own: int
) -> None:
    """An activation cut in two, between rows or columns; the half of GPU ``own`` is filled."""
    by_rows = cut == "rows"
    across, down = (width, height / 2) if by_rows else (width / 2, height)
    # The half that is filled comes last, so that its outline is whole.
    for part in sorted(range(2), key=lambda part: part == own):
        x, y = (left, top + part * down) if by_rows else (left + part * across, top)
        if part == own:
            picture.rect(x, y, across, down, tint(ACTIVATION, 0.4), ACTIVATION, thickness=2)
        else:
            picture.rect(x, y, across, down, "white", GREY, thickness=1, dashed=True)
        if height < TOKENS:
            continue
        lines = [f"GPU {part}"] if by_rows else ["GPU", f"{part}"]
        for i, line in enumerate(lines):
            middle = y + down / 2 + 16 * (i - (len(lines) - 1) / 2)
            colour = INK if part == own else SOFT
            picture.text(x + across / 2, middle, line, 13, bold=part == own, colour=colour)


def draw_meeting(picture: Picture, index: int) -> None:
    """A border of the lower part: out of both GPUs, through the box, and back into both."""
    pair = ["all-gather", "reduce-scatter"]
    top = TOP + GPU_HEIGHT + (GAP - 2 * HALF) / 2
    draw_border(picture, index, top, *(reversed(pair) if index % 2 else pair))
    middle = border_left(index) + BORDER / 2
    edges = [(REGION + (HIDDEN if region == 3 else D)) / 2 + 4 for region in (index, index + 1)]
    start, end = left_of(index) + edges[0], left_of(index + 1) + REGION - edges[1]
    for gpu in range(2):
        y = activation_top(gpu) + TOKENS / 2
        edge = top if gpu == 0 else top + 2 * HALF
        colour = {"colour": ACTIVATION, "thickness": 3}
        picture.arrow((start, y), (middle - 16, y), (middle - 16, edge), **colour)
        picture.arrow((middle + 16, edge), (middle + 16, y), (end, y), **colour)


if __name__ == "__main__":
    save(__file__, draw())
