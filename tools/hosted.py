"""The lessons for machines that others run: Colab, and a JupyterHub that fetches them.

    python tools/hosted.py FOLDER

Each lesson without outputs, with a first cell that installs the course where it is missing, beside
the PyTorch that is there. ``FOLDER/lessons/colab`` and ``FOLDER/lessons/hub`` differ in where a
link to another lesson leads; ``FOLDER/student/hub`` has no solutions. The workflow keeps each
folder of FOLDER as a branch of its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from addresses import BRANCH, STUDENT_BRANCH, Addresses, addresses, relinked
from editions import student_edition
from lab import without_outputs
from notebook_tools import dumps, folder_of, lessons

# --no-deps: PyTorch, Matplotlib and widgets are there, and stay in the versions that others need.
# What else the course needs needs nothing itself, and is left alone where it is there.
INSTALL = """\
# Gets the course, if it is not there yet. The PyTorch of this machine stays as it is.
import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small: more threads get in the way
if importlib.util.find_spec("course_lib") is None:
    %pip install -q --no-deps {wheel} cloudpickle tqdm"""


def hosted_edition(nb: NotebookNode, known: Addresses, on_colab: bool) -> NotebookNode:
    """``nb``, which has no outputs, with the cell that installs the course, and links that lead."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, known, known.colab if on_colab else None)
    source = INSTALL.format(wheel=known.wheel)
    nb.cells.insert(1, nbformat.v4.new_code_cell(source, id="get-the-course"))
    return nb


# Each folder, what its lessons are made from, and whether they are read on Colab.
KINDS: dict[str, tuple[Callable[[Path], NotebookNode], bool]] = {
    f"{BRANCH}/colab": (without_outputs, True),
    f"{BRANCH}/hub": (without_outputs, False),
    f"{STUDENT_BRANCH}/hub": (student_edition, False),
}


def main(arguments: list[str]) -> None:
    root = folder_of(arguments, "say where the lessons go: python tools/hosted.py FOLDER")
    known = addresses()
    if known is None:
        raise SystemExit("the course has no address: set [project.urls] in pyproject.toml")
    for place, (edition, on_colab) in KINDS.items():
        folder = root / place
        folder.mkdir(parents=True, exist_ok=True)
        for lesson in lessons():
            text = dumps(hosted_edition(edition(lesson), known, on_colab))
            (folder / lesson.name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(lessons())} lessons for Colab and for a JupyterHub in {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
