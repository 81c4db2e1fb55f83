"""The lessons of the course, and the exercises in them."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """One exercise as the course has it.

    Attributes:
        name: what follows ``ex-`` in its cell's id.
        stub: the cell that a learner fills in.
        check: the cell that judges it.
    """

    name: str
    stub: str
    check: str


@dataclass(frozen=True)
class Lesson:
    """One notebook of the course.

    Attributes:
        stem: the file's name without ``.ipynb``.
        setup: what an exercise may use: the set-up cell, and what other cells define.
        cell_ids: of all its cells.
        exercises: in order.
    """

    stem: str
    setup: str
    cell_ids: frozenset[str]
    exercises: list[Exercise]

    @property
    def number(self) -> str:
        """Its two digits."""
        return self.stem[:2]


def lessons_in(folder: Path) -> list[Lesson]:
    """The lessons in ``folder``, in reading order.

    Raises:
        ValueError: there is none.
    """
    found = [_lesson(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not found:
        raise ValueError(f"{folder} holds no lessons: say where they are with --lessons FOLDER")
    return found


def _lesson(path: Path) -> Lesson:
    cells = cells_of(path)
    sources = {cell["id"]: text_of(cell) for cell in cells}
    code = [cell["id"] for cell in cells if cell["cell_type"] == "code"]
    names = [cell_id.removeprefix("ex-") for cell_id in code if cell_id.startswith("ex-")]
    before: list[str] = []
    for cell_id in code:
        if cell_id.startswith("ex-"):
            break
        source = sources[cell_id]
        before.append(source if cell_id == "setup" else definitions_of(source))
    return Lesson(
        path.stem,
        "\n".join(before),
        frozenset(sources),
        [Exercise(name, sources[f"ex-{name}"], sources[f"check-{name}"]) for name in names],
    )


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook.

    Raises:
        ValueError: the file is no notebook; the message says in what way.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            cell.setdefault("id", "")
            text_of(cell)
            cell["cell_type"]
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is no text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no notebook, or half of one: line {error.lineno}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError("is no notebook: it has no cells as Jupyter writes them") from None
    return cells


def text_of(cell: dict[str, Any]) -> str:
    """The source of a cell; a file may have it as one text or as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def definitions_of(source: str) -> str:
    """Of a cell: imports, classes, and functions whose definition computes nothing.

    What a lesson measures and draws takes minutes, and no answer may rely on it.

    Raises:
        SyntaxError: it is no Python.
    """
    tree = ast.parse(source)
    tree.body = [part for part in tree.body if _only_defines(part)]
    return ast.unparse(tree)


def _only_defines(part: ast.stmt) -> bool:
    if isinstance(part, ast.FunctionDef):
        return not part.args.defaults
    return isinstance(part, (ast.Import, ast.ImportFrom, ast.ClassDef))
