"""Lesson 12: expert parallelism. Tokens travel to their experts, and come home."""

from drawing import ACTIVATION, DATA, LAYER, SOFT, Picture, save, tint

GPUS = 4
LEFT, STEP, WIDTH = 120, 194, 168
# Which expert each token of a GPU goes to, one choice each.
CHOICES = [(2, 0, 1), (1, 3, 0), (2, 1, 3), (0, 2, 3)]
TOKENS, EXPERTS, HOME = 58, 246, 434  # where the rows begin


def draw() -> str:
    picture = Picture(
        590,
        "Expert parallelism on four GPUs",
        "Four GPUs, in three rows from top to bottom. At the top each GPU has three tokens of its "
        "own and a router, a copy of the same one. An all-to-all brings each token to the expert "
        "that it chose; expert 0 stands on GPU 0, expert 1 on GPU 1, and so on, and each is "
        "another. A second all-to-all brings what the experts made of the tokens back, each to "
        "the GPU and the place that it came from.",
    )
    for gpu in range(GPUS):
        picture.text(centre(gpu), 26, f"GPU {gpu}", 15, bold=True)
        draw_row(picture, gpu, TOKENS, "router", "")
        draw_row(picture, gpu, HOME, "", "")
        picture.device(LEFT + gpu * STEP, EXPERTS, WIDTH, 70)
        picture.box(LEFT + gpu * STEP + 20, EXPERTS + 14, WIDTH - 40, 42, f"expert {gpu}", LAYER,
                    15, True)  # fmt: skip
        for token, expert in enumerate(CHOICES[gpu]):
            x, to = token_x(gpu, token), centre(expert) + (gpu - 1.5) * 24
            picture.arrow((x, TOKENS + 92), (to, EXPERTS), colour=ACTIVATION, thickness=1.5)
            picture.arrow((to, EXPERTS + 70), (x, HOME + 10), colour=ACTIVATION, thickness=1.5)
    for y, words in ((TOKENS + 40, "tokens"), (EXPERTS + 35, "experts"), (HOME + 40, "outputs")):
        picture.text(24, y, words, 16, "start", bold=True)
    picture.text(24, 200, "all-to-all", 15, "start", colour=SOFT)
    picture.text(24, 376, "all-to-all", 15, "start", colour=SOFT)
    words = "the routers are copies of one; the experts differ; a square is a token"
    picture.text(450, 560, words, 14, colour=SOFT)
    return picture.svg()


def centre(gpu: int) -> float:
    return LEFT + gpu * STEP + WIDTH / 2


def token_x(gpu: int, token: int) -> float:
    return LEFT + gpu * STEP + 36 + token * 48


def draw_row(picture: Picture, gpu: int, top: float, name: str, words: str) -> None:
    """A GPU with its tokens, or with what came back of them."""
    picture.device(LEFT + gpu * STEP, top, WIDTH, 92)
    for token in range(len(CHOICES[gpu])):
        x = token_x(gpu, token)
        y = top + 50 if name else top + 14
        picture.rect(x - 14, y, 28, 28, tint(DATA, 0.6), DATA, 1.5)
        picture.text(x, y + 14, f"{3 * gpu + token}", 13)
    if name:
        picture.box(LEFT + gpu * STEP + 34, top + 10, WIDTH - 68, 28, name, LAYER, 14)
    else:
        picture.text(centre(gpu), top + 66, "back home", 14, colour=SOFT)


if __name__ == "__main__":
    save(__file__, draw())
