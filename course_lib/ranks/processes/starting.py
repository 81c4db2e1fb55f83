"""Starting processes quickly: forks of one that has imported PyTorch and done nothing else.

Importing PyTorch takes seconds and 200 MB, a process at a time. So the first call starts a *fork
server*, which imports it once; a rank is a fork of that, and shares its memory. The caller itself
could not be forked: it has threads, perhaps a GPU. macOS and Windows start each process anew
(``spawn``).

Rests on ``multiprocessing.spawn.get_preparation_data``.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

from course_lib.ranks.processes import rank_process
from course_lib.ranks.processes.impatience import interrupts_come_later
from course_lib.ranks.processes.place import Place

_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_PRELOADED = "course_lib.ranks.processes.fork_server"

_one_at_a_time = threading.Lock()


def start(process: BaseProcess) -> None:
    """Start ``process``, made by :func:`made`. Half a start would be a process nobody knows of."""
    with (
        interrupts_come_later(),
        _one_at_a_time,
        mock.patch.object(spawn, "get_preparation_data", _without_main),
    ):
        process.start()


def made(place: Place) -> tuple[BaseProcess, Connection]:
    """A process for the rank at ``place``, not started; and the caller's end of a pipe to it."""
    context: Any = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload([_PRELOADED])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=rank_process.live, args=(place, theirs), name=f"rank {place.rank}"
    )
    return process, mine


_preparation_data = spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    """What ``multiprocessing`` tells a process first, except which program to run as ``__main__``.

    A rank has no use for it, since cloudpickle sends what it needs of it; and a script that calls
    ``ranks.run`` at its top level would begin again in each rank.
    """
    data = _preparation_data(name)
    data.pop("init_main_from_name", None)
    data.pop("init_main_from_path", None)
    return data
