"""The pictures of the course, for lessons to show wherever a notebook is opened."""

from __future__ import annotations

from pathlib import Path

from IPython.display import Image
from PIL import Image as Pixels

_PACKAGE = Path(__file__).resolve().parent
_IN_THE_WHEEL, _IN_THE_REPOSITORY = _PACKAGE / "images", _PACKAGE.parent / "images"
FOLDER = _IN_THE_WHEEL if _IN_THE_WHEEL.is_dir() else _IN_THE_REPOSITORY
WIDTH = 900  # pixels on the screen; the file has more, for sharp edges


def picture(name: str) -> Image:
    """The picture ``name``, which ``images/NAME.py`` draws, with its words for a screen reader.

    Raises:
        ValueError: there is no picture of that name.
    """
    file = FOLDER / f"{name}.png"
    if not file.exists():
        names = ", ".join(sorted(each.stem for each in FOLDER.glob("*.png"))) or "none"
        raise ValueError(f"there is no picture {name!r} in {FOLDER.name}/; there are: {names}")
    with Pixels.open(file) as pixels:
        description = pixels.info.get("Description", name)
    return Image(data=file.read_bytes(), width=WIDTH, alt=description)
