"""Lesson 06: tensor parallelism. An MLP on two GPUs; each has half of the hidden neurons.

The first weight is split by columns, the second by rows, so that GELU works on what is there and
the two partial sums add up to the output. The matrices are as in the formula: a hidden neuron is a
column of W1 and a row of W2. PyTorch keeps both transposed. Biases are left out.
"""

from drawing import ACTIVATION, GRADIENT, GREY, INK, LAYER, SOFT, Picture, save, tint

D, BATCH = 36, 58  # pixels; the hidden layer is four times as wide as D
HIDDEN = 4 * D
X, W1, H, W2, PARTIAL, Y = 44, 118, 340, 530, 610, 812  # the left edges of the matrices
TOP, GPU_HEIGHT, GAP = 54, 214, 122
BORDER = 62  # the height of the boxes between the GPUs


def draw() -> str:
    picture = Picture(
        656,
        "Tensor parallelism: an MLP on two GPUs",
        "Two GPUs, one above the other, with the same steps from left to right. Both have a copy "
        "of X, of shape B times D, where B is the batch. Each multiplies it by its half of the "
        "columns of the first weight W1, D times 4D/2, and applies GELU to the result without "
        "communication: the activations of its half of the hidden neurons, B times 4D/2. It "
        "multiplies them by its half of the rows of the second weight W2, 4D/2 times D, and gets a "
        "partial sum, B times D. An all-reduce adds the two partial sums and gives both GPUs the "
        "same Y, B times D. At the entrance, where X comes in: identity in the forward pass, "
        "all-reduce of X's gradients in the backward pass. At the exit: all-reduce in the forward "
        "pass, identity in the backward pass.",
    )
    words = "an MLP on two GPUs: each has half of the hidden neurons"
    picture.text(450, 28, words, 16, lead="Y = GELU(X W1) W2:")
    for gpu in range(2):
        draw_gpu(picture, gpu)
    draw_borders(picture)
    words = "One all-reduce in the forward pass, one in the backward pass; nothing else crosses."
    picture.text(450, TOP + 2 * GPU_HEIGHT + GAP + 26, words, 15)
    return picture.svg()


def gpu_top(gpu: int) -> float:
    return TOP + gpu * (GPU_HEIGHT + GAP)


def middle_of(gpu: int) -> float:
    """Where the matrices are: towards the other GPU, with room for their names behind them."""
    return gpu_top(gpu) + GPU_HEIGHT / 2 + (20 if gpu == 0 else -20)


def draw_gpu(picture: Picture, gpu: int) -> None:
    top, middle = gpu_top(gpu), middle_of(gpu)
    picture.device(24, top, 852, GPU_HEIGHT)
    y = top + (20 if gpu == 0 else GPU_HEIGHT - 20)
    picture.text(38, y, f"GPU {gpu}", 16, "start", bold=True)

    picture.box(X, middle - BATCH / 2, D, BATCH, "X", ACTIVATION, bold=True)
    name(picture, gpu, X, D, BATCH, "a copy", "B × D")
    picture.text((X + D + W1) / 2, middle, "×", 20)
    split(picture, gpu, W1, (HIDDEN, D), LAYER)
    name(picture, gpu, W1, HIDDEN, D, "its columns of W1", "D × 4D/2")
    picture.arrow((W1 + HIDDEN + 8, middle), (H - 8, middle), colour=SOFT)
    gelu = (W1 + HIDDEN + H) / 2 - 3
    picture.text(gelu, middle - 14, "GELU", 15, bold=True)
    picture.text(gelu, middle + 15, "local", 13, colour=SOFT)
    split(picture, gpu, H, (HIDDEN, BATCH), ACTIVATION)
    name(picture, gpu, H, HIDDEN, BATCH, "its neurons' activations", "B × 4D/2")
    picture.text((H + HIDDEN + W2) / 2, middle, "×", 20)
    split(picture, gpu, W2, (D, HIDDEN), LAYER)
    name(picture, gpu, W2, D, HIDDEN, "its rows of W2", "4D/2 × D")
    picture.text((W2 + D + PARTIAL) / 2, middle, "=", 20)
    fill = tint(ACTIVATION, 0.12)
    picture.rect(PARTIAL, middle - BATCH / 2, D, BATCH, fill, ACTIVATION, dashed=True)
    picture.text(PARTIAL + D / 2, middle, f"Y{gpu}")
    name(picture, gpu, PARTIAL, D, BATCH, "partial sum", "B × D")
    picture.text((PARTIAL + D + Y) / 2, middle, "Y = Y0 + Y1", 15)
    picture.box(Y, middle - BATCH / 2, D, BATCH, "Y", ACTIVATION, bold=True)
    name(picture, gpu, Y, D, BATCH, "a copy", "B × D")


def name(
    picture: Picture, gpu: int, left: float, width: float, height: float, words: str, shape: str
) -> None:
    """What a matrix is, and its shape, on the side away from the other GPU."""
    side = -1 if gpu == 0 else 1
    y = middle_of(gpu) + side * (height / 2 + 22)
    picture.text(left + width / 2, y - 9, words, bold=True)
    picture.text(left + width / 2, y + 9, shape)


def split(picture: Picture, gpu: int, left: float, size: tuple[float, float], colour: str) -> None:
    """A matrix cut in two, across its longer side; this GPU's half is filled."""
    width, height = size
    top = middle_of(gpu) - height / 2
    for part in range(2):
        if width > height:
            half = left + part * width / 2, top, width / 2, height
        else:
            half = left, top + part * height / 2, width, height / 2
        if part == gpu:
            picture.rect(*half, tint(colour, 0.4), colour, thickness=2)
        else:
            picture.rect(*half, "white", GREY, thickness=1, dashed=True)
        x, y = half[0] + half[2] / 2, half[1] + half[3] / 2
        # A row of words in a wide half, two in a narrow one.
        lines = [f"GPU {part}"] if width > height else ["GPU", f"{part}"]
        for i, line in enumerate(lines):
            down = 16 * (i - (len(lines) - 1) / 2)
            colour_of_words = INK if part == gpu else SOFT
            picture.text(x, y + down, line, 13, bold=part == gpu, colour=colour_of_words)


def draw_borders(picture: Picture) -> None:
    """The two places where the GPUs meet."""
    top = TOP + GPU_HEIGHT + (GAP - BORDER) / 2
    borders = [
        ("entrance", 40, GRADIENT, "identity", "all-reduce (sum)"),
        ("exit", 564, ACTIVATION, "all-reduce (sum)", "identity"),
    ]
    for place, left, colour, forward, backward in borders:
        picture.box(left, top, 296, BORDER, "", colour)
        picture.text(left + 44, top + BORDER / 2, place, 15, bold=True)
        picture.text(left + 90, top + BORDER / 2 - 12, forward, 15, "start", lead="forward:")
        picture.text(left + 90, top + BORDER / 2 + 12, backward, 15, "start", lead="backward:")
    picture.text(450, top + BORDER / 2 - 11, "B: rows of the batch", 14, colour=SOFT)
    picture.text(450, top + BORDER / 2 + 11, "D: width of the model", 14, colour=SOFT)
    for gpu in range(2):
        side = 1 if gpu == 0 else -1
        inner, edge = middle_of(gpu) + side * BATCH / 2, top if gpu == 0 else top + BORDER
        words_at = edge - side * 15
        x = X + D / 2
        picture.arrow((x, inner), (x, edge), colour=GRADIENT, thickness=3, both=True)
        words = "gradients of X: its own in, the sum out"
        picture.text(x + 12, words_at, words, 13, "start", colour=SOFT)
        x = PARTIAL + D / 2
        picture.arrow((x, inner), (x, edge), colour=ACTIVATION, thickness=3)
        picture.text(x + 12, words_at, "its own", 13, "start", colour=SOFT)
        x = Y + D / 2
        picture.arrow((x, edge), (x, inner), colour=ACTIVATION, thickness=3)
        picture.text(x - 12, words_at, "the sum", 13, "end", colour=SOFT)


if __name__ == "__main__":
    save(__file__, draw())
