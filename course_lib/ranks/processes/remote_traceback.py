"""A traceback of another process, made anew in this one.

Tracebacks refer to frames, which belong to the process that ran them. Sent are the lines; from each
the caller makes a frame that stands at the same place of the same file or cell, so that whatever
shows an error (Python, IPython, pytest) shows the learner's line with its source.
"""

from __future__ import annotations

import ast
import traceback
from types import TracebackType
from typing import NamedTuple

from course_lib import tracebacks


class Line(NamedTuple):
    """A line of a program that an error went through; columns count bytes, as Python's do."""

    filename: str
    function: str
    number: int
    end_number: int
    column: int
    end_column: int


def lines_of(tb: TracebackType | None) -> list[Line]:
    """The lines of ``tb`` from the first to the last that is the learner's; none if none is."""
    kept = tracebacks.up_to_the_learner(tb)
    lines = [
        Line(
            each.filename,
            each.name,
            each.lineno or 1,
            each.end_lineno or each.lineno or 1,
            each.colno or 0,
            each.end_colno or 0,
        )
        for each in traceback.extract_tb(kept)
    ]
    mine = [index for index, line in enumerate(lines) if not tracebacks.is_machinery(line.filename)]
    return lines[mine[0] :] if mine else []


def traceback_of(lines: list[Line]) -> TracebackType | None:
    """A traceback that goes through ``lines``."""
    tb: TracebackType | None = None
    for line in reversed(lines):
        made = _raised_at(line)
        tb = TracebackType(tb, made.tb_frame, made.tb_lasti, made.tb_lineno)
    return tb


def _raised_at(line: Line) -> TracebackType:
    """What is left of an error that was raised exactly there."""
    statement = ast.parse("raise error").body[0]
    for node in ast.walk(statement):
        if isinstance(node, ast.stmt | ast.expr):
            node.lineno, node.end_lineno = line.number, line.end_number
            node.col_offset, node.end_col_offset = line.column, line.end_column
    code = compile(ast.Module([statement], []), line.filename, "exec")
    code = code.replace(co_name=line.function, co_qualname=line.function)
    try:
        exec(code, {"error": RuntimeError()})
    except RuntimeError as error:
        assert error.__traceback__ is not None and error.__traceback__.tb_next is not None
        return error.__traceback__.tb_next
    raise AssertionError("it raises")
