"""Where in the program a rank is: the learner's line, not those of PyTorch and this package."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from course_lib import virtual
from course_lib.tracebacks import is_machinery

# What is below a program that is part of this package itself, such as an exercise's check.
_BELOW = tuple(str(Path(file).parent) for file in (__file__, virtual.__file__, torch.__file__))


def line_of(frame: FrameType | None) -> str:
    """The innermost line of the program itself, as in ``train.py:12, in step: dist.recv(x)``.

    Cells of a notebook have no file that a reader knows, and are called cells.
    """
    mine = _innermost(frame, is_machinery) or _innermost(frame, _is_below)
    if mine is None:
        return "an unknown line"
    return line_at(mine.f_code.co_filename, mine.f_lineno, mine.f_code.co_name)


def _is_below(filename: str) -> bool:
    return filename.startswith(_BELOW)


def _innermost(frame: FrameType | None, is_hidden: Callable[[str], bool]) -> FrameType | None:
    """The innermost frame that is not hidden and does not start a thread."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file != threading.__file__ and not is_hidden(file):
            return frame
        frame = frame.f_back
    return None


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
