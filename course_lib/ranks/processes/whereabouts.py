"""Where a rank was when it was stopped, however deep in C++ it waited.

A rank that is stopped gets SIGTERM. Its process then writes the lines that it is at into a file,
which needs neither Python nor the rank's consent, and ends. Windows has no such signal.
"""

from __future__ import annotations

import faulthandler
import re
import signal
from pathlib import Path

from course_lib.ranks.processes.place import Place
from course_lib.ranks.where import line_at
from course_lib.tracebacks import is_machinery

# Where a rank begins, and where it calls the program.
_LIVE, _CALL = (str(Path(__file__).with_name(name)) for name in ("rank_process.py", "job.py"))

_LINE = re.compile(r'^  File "(?P<path>.*)", line (?P<number>\d+) in (?P<function>.*)$', re.M)


def write_when_stopped(place: Place) -> None:
    """From now on, leave word when this process is stopped."""
    if hasattr(faulthandler, "register"):
        file = place.whereabouts.open("w")  # stays open, and belongs to the signal's handler
        faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)


def read(place: Place) -> str:
    """The innermost line of the program that the rank was at, in words."""
    lines = list(_LINE.finditer(place.printed(place.whereabouts)))  # the innermost first
    paths = [match["path"] for match in lines]
    if not paths or (_LIVE in paths and _CALL not in paths):
        return "was at no line of the program yet"
    for match in lines:
        if not is_machinery(match["path"]) and not match["path"].startswith("<frozen"):
            return "was at " + line_at(match["path"], int(match["number"]), match["function"])
    return "was at an unknown line"
