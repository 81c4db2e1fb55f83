"""Where in the program a rank is: the learner's line, not those of PyTorch and this package."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType

from course_lib.tracebacks import is_machinery


def line_of(frame: FrameType | None) -> str:
    """The innermost line of the program itself, as in ``train.py:12, in step: dist.recv(x)``.

    Cells of a notebook have no file that a reader knows, and are called cells.
    """
    while frame is not None and is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    return line_at(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def line_at(path: str, number: int, function: str) -> str:
    """A line of the program as :func:`line_of` words it."""
    place = f"line {number} of a cell" if _is_cell(path) else f"{Path(path).name}:{number}"
    text = linecache.getline(path, number).strip()
    return f"{place}, in {function}" + (f": {text}" if text else "")


def line_here() -> str:
    """The line of the program that is running now, on this thread."""
    return line_of(sys._getframe(1))


def line_of_thread(ident: int | None) -> str:
    """The line of the program that another thread is at."""
    return line_of(sys._current_frames().get(ident or 0))


def _is_cell(path: str) -> bool:
    return path.startswith("<") or "ipykernel_" in path
