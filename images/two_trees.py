"""Lesson 12: two binary trees over eight GPUs, as course_lib.parallel.double_tree makes them."""

from drawing import ACTIVATION, GRADIENT, GREY, LAYER, SOFT, Picture, save, tint

from course_lib.parallel.double_tree import parents

GPUS, SIZE = 8, 4  # in nodes of four
LEFTS = 50, 500  # of the trees
STEP, TOP, ROW = 50, 104, 76
WIDTH, HEIGHT = 42, 38  # of a GPU
HALVES = "first", "second"


def draw() -> str:
    trees = [parents(GPUS, shift) for shift in (0, 1)]
    picture = Picture(
        456,
        "Two trees over eight GPUs, each for half of the tensor",
        "Two binary trees side by side, over the same eight GPUs in two nodes of four. "
        + " ".join(map(described, HALVES, trees))
        + " An end of a branch has a dashed outline, and every GPU that is one in one tree passes "
        "on in the other. Lines between two nodes are thin and green, those inside one are thick "
        "and orange.",
    )
    for shift, (left, half) in enumerate(zip(LEFTS, HALVES, strict=True)):
        middle = left + (GPUS - 1) * STEP / 2
        picture.text(middle, 32, f"for the {half} half of the tensor", 17, bold=True)
        draw_tree(picture, left, trees[shift], shift)
    words = "up: a GPU adds what comes from below; down: it passes the whole sum on"
    picture.text(450, 66, words, 14, colour=SOFT)
    draw_key(picture, 424)
    return picture.svg()


def described(half: str, tree: dict[int, int]) -> str:
    """Who stands below whom, from the root down."""
    below = [
        f"GPU {gpu} has {' and '.join(map(str, children_of(gpu, tree)))} below it"
        for gpu in sorted(range(GPUS), key=lambda gpu: (depth_of(gpu, tree), gpu))
        if children_of(gpu, tree)
    ]
    return f"For the {half} half, {', '.join(below)}."


def children_of(gpu: int, tree: dict[int, int]) -> list[int]:
    return sorted(child for child, parent in tree.items() if parent == gpu)


def depth_of(gpu: int, tree: dict[int, int]) -> int:
    return 1 + depth_of(tree[gpu], tree) if gpu in tree else 0


def draw_tree(picture: Picture, left: float, tree: dict[int, int], shift: int) -> None:
    """A GPU's column is its place in the tree: so no two lines cross."""
    middles = {
        gpu: (left + (gpu + shift) % GPUS * STEP, TOP + HEIGHT / 2 + depth_of(gpu, tree) * ROW)
        for gpu in range(GPUS)
    }
    for child, parent in tree.items():
        crosses = child // SIZE != parent // SIZE
        colour, thickness = (GRADIENT, 2.5) if crosses else (ACTIVATION, 7)
        picture.line(middles[child], middles[parent], colour=colour, thickness=thickness)
    for gpu, (x, y) in middles.items():
        draw_gpu(picture, x, y, str(gpu), passes_on=bool(children_of(gpu, tree)))


def draw_gpu(picture: Picture, x: float, y: float, words: str, passes_on: bool) -> None:
    fill = tint(LAYER, 0.3) if passes_on else "white"
    stroke = LAYER if passes_on else GREY
    place = x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT
    picture.rect(*place, fill, stroke, 2, 9, dashed=not passes_on)
    picture.text(x, y, words, 17, bold=True)


def draw_key(picture: Picture, y: float) -> None:
    draw_gpu(picture, 61, y, "", passes_on=True)
    picture.text(92, y, "passes on", 14, "start", colour=SOFT)
    draw_gpu(picture, 211, y, "", passes_on=False)
    picture.text(242, y, "the end of a branch", 14, "start", colour=SOFT)
    picture.line((416, y), (456, y), colour=ACTIVATION, thickness=7)
    picture.text(468, y, "inside a node (0 to 3, 4 to 7)", 14, "start", colour=SOFT)
    picture.line((700, y), (740, y), colour=GRADIENT, thickness=2.5)
    picture.text(752, y, "over the network", 14, "start", colour=SOFT)


if __name__ == "__main__":
    save(__file__, draw())
