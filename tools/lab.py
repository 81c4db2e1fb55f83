"""Open the course in JupyterLab, in a working copy of the lessons.

    python tools/lab.py [flags of JupyterLab ...]    open the first lesson
    python tools/lab.py --copies                     make the working copies only
    python tools/lab.py --fresh 02                   fetch lesson 02 anew, and keep your answers

A working copy has no outputs, so that nothing a reader is asked to guess is visible before. It is
the reader's: an existing one is never overwritten, and git does not look at it. The variable
``COURSE_LESSONS`` says where the copies are, if not in my_lessons/: a container has them apart.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from addresses import addresses, relinked

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
COPIES = Path(os.environ.get("COURSE_LESSONS") or ROOT / "my_lessons")
ANSWERS = ("ex-", "guess-")  # how the ids of cells begin in which a reader writes


def without_outputs(lesson: Path) -> NotebookNode:
    """The lesson as a reader should find it, with a note of which version it is."""
    nb = nbformat.read(lesson, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nb.metadata["course_version"] = _version(lesson)
    return nb


def _version(lesson: Path) -> str:
    return hashlib.sha256(lesson.read_bytes()).hexdigest()[:16]


def copy_of(lesson: Path, folder: Path) -> NotebookNode:
    """The lesson as it stands in ``folder``: links to other files of the course lead there."""
    nb = without_outputs(lesson)
    if folder.resolve().parent != ROOT:
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = relinked(cell.source, addresses(), None)
    return nb


def make_copies(folder: Path = COPIES) -> None:
    """Make the copies that are not there yet, and say which of the others are out of date."""
    folder.mkdir(exist_ok=True)
    for lesson in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy = folder / lesson.name
        if not copy.exists():
            nbformat.write(copy_of(lesson, folder), copy)
        elif _version_of_copy(copy) != _version(lesson):
            print(
                f"{copy.name}: the lesson has changed since you got your copy, which stays as it "
                f"is. For the new one, with your answers: make fresh NB={lesson.name[:2]}"
            )


def _version_of_copy(copy: Path) -> str | None:
    try:
        return nbformat.read(copy, as_version=4).metadata.get("course_version")
    except Exception:  # whatever a reader did to it, it is theirs
        return None


def fetch_fresh(number: str, folder: Path = COPIES) -> None:
    """Replace a copy by the lesson as it is now, with the reader's answers; the old one is kept.

    Raises:
        SystemExit: there is no lesson of that number, or the old copy cannot be read.
    """
    found = sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    if not number.isdecimal() or len(found) != 1:
        numbers = ", ".join(lesson.name[:2] for lesson in sorted(NOTEBOOKS.glob("*.ipynb")))
        raise SystemExit(f"there is no lesson {number!r}; there are {numbers}")
    (lesson,) = found
    copy = folder / lesson.name
    folder.mkdir(exist_ok=True)
    fresh = copy_of(lesson, folder)
    if copy.exists():
        try:
            old = nbformat.read(copy, as_version=4)
        except Exception as error:
            raise SystemExit(
                f"{copy.name} cannot be read ({type(error).__name__}), so its answers cannot be "
                "kept: rename it, and run this again"
            ) from None
        kept = _carry_answers(old, fresh)
        backup = _free_name(copy)
        copy.rename(backup)
        print(f"{copy.name}: {kept} of your answers kept; the old copy is {backup.name}")
    nbformat.write(fresh, copy)


def _carry_answers(old: NotebookNode, fresh: NotebookNode) -> int:
    """Put what a reader wrote into the cells of the same id; returns in how many."""
    written = {cell.get("id", ""): cell.source for cell in old.cells}
    kept = 0
    for cell in fresh.cells:
        is_answer = cell.cell_type == "code" and cell["id"].startswith(ANSWERS)
        if is_answer and written.get(cell["id"], cell.source) != cell.source:
            cell.source = written[cell["id"]]
            kept += 1
    return kept


def _free_name(copy: Path) -> Path:
    number = 1
    while (backup := copy.with_name(f"{copy.stem}.old{number}.ipynb")).exists():
        number += 1
    return backup


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--copies"]:
        make_copies()
    elif arguments[:1] == ["--fresh"]:
        for number in arguments[1:] or [""]:
            fetch_fresh(number)
    else:
        make_copies()
        _open_jupyterlab(arguments)


def _open_jupyterlab(flags: list[str]) -> None:
    from jupyterlab.labapp import main as open_lab

    # The models are small. On a busy machine a second thread mostly waits for the first: at a load
    # of 20 on two cores, a training step took nine times as long with two threads as with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ours is read first, and whatever else a reader has.
    paths = [str(ROOT / "tools" / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    first = min(COPIES.glob("*.ipynb"))
    top = ROOT if first.is_relative_to(ROOT) else COPIES
    open_lab(
        [
            f"--ServerApp.root_dir={top}",
            f"--LabApp.default_url=/lab/tree/{first.relative_to(top).as_posix()}",
            *flags,
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
