"""Tracebacks in a notebook that end in the learner's own line.

An error on a virtual GPU comes up below dozens of lines of PyTorch and of this package, and what
the learner wrote stands somewhere above. Here those lines are left out. ``%xmode Verbose`` brings
them back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_MACHINERY = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def install() -> None:
    """Show short tracebacks from now on, if this is a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        shell.set_custom_exc((Exception, KeyboardInterrupt), _show)


def _show(
    shell: Any, kind: type, error: BaseException, tb: TracebackType | None, tb_offset: Any = None
) -> list[str]:
    """IPython calls it for each error that ends a cell."""
    is_short = shell.InteractiveTB.mode != "Verbose"
    shown = up_to_the_learner(tb) if is_short and error.__cause__ is None else tb
    lines = shell.InteractiveTB.structured_traceback(kind, error, shown, tb_offset=tb_offset)
    shell._showtraceback(kind, error, lines)
    return lines


def is_machinery(filename: str) -> bool:
    """Whether a file is of PyTorch or of this package, and not the learner's."""
    return filename.startswith(_MACHINERY)


def up_to_the_learner(tb: TracebackType | None) -> TracebackType | None:
    """``tb`` without the lines of PyTorch and of this package behind the last other one.

    A traceback with no other line, or with none of theirs at its end, comes back as it is.
    """
    links = list(_links(tb))
    mine = [
        place
        for place, link in enumerate(links)
        if not is_machinery(link.tb_frame.f_code.co_filename)
    ]
    if not mine or mine[-1] == len(links) - 1:
        return tb
    short = None
    for link in reversed(links[: mine[-1] + 1]):
        short = TracebackType(short, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return short


def _links(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        yield tb
        tb = tb.tb_next
