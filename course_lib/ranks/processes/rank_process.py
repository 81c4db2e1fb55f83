"""What the process of a rank does, from its first line to its last.

Rests on ``multiprocessing.process.BaseProcess._config``.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import current_process, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch

from course_lib.ranks.processes import checked_collectives, reports, whereabouts
from course_lib.ranks.processes.job import unpacked
from course_lib.ranks.processes.place import Here, Place
from course_lib.ranks.processes.rendezvous import meet_in_folder

# Seconds that a process stays after its rank has ended, unless it is stopped: what it has sent
# arrives by then. After that its connections close, and who still waits for it learns so.
_LINGER = 1.0

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def live(place: Place, control: Connection) -> None:
    """Do the job, and report its end on ``control``."""
    Here.place = place
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the caller, who stops the ranks
    _end_with_the_caller(place.folder)
    # What multiprocessing leaves of a rank that is stopped, such as a DataLoader's.
    current_process()._config["tempdir"] = str(place.folder)  # type: ignore[attr-defined]
    _redirect_output(place)
    whereabouts.write_when_stopped(place)
    report: reports.Report
    try:
        settings, call = unpacked(place.job.read_bytes())
        settings.put_in_place()
        _become_a_rank(place)
        report = reports.returned(_called(call, place.rank))
    except BaseException as error:
        report = reports.Failed.with_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    control.send(report)
    time.sleep(_LINGER)
    os._exit(0)  # no farewell: what C++ would still say at its end, nobody reads


def _called(call: Callable[[], Any], rank: int) -> Any:
    try:
        return call()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"rank {rank} ended with sys.exit({ended.code!r})") from None
    except RuntimeError as error:
        mismatch = checked_collectives.mismatch_in(error)
        if mismatch is None:
            raise
        raise mismatch from None
    return None


def _become_a_rank(place: Place) -> None:
    os.environ.update(place.environment())
    if sys.platform in _LOOPBACK:  # the ranks are on one machine, which may have no network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
    torch.set_num_threads(1)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    meet_in_folder(place)
    checked_collectives.begin()


def _end_with_the_caller(folder: Path) -> None:
    """When the caller is gone, however it died, remove its files and go."""

    def watch() -> None:
        caller = parent_process()
        assert caller is not None
        caller.join()
        while folder.exists():  # others may still write while it is emptied
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _redirect_output(place: Place) -> None:
    """Python's output goes to files that the caller shows, and C++'s to one that it may show."""
    native = os.open(place.native, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(native, descriptor)
    sys.stdout, sys.stderr = _writer(place.stdout), _writer(place.stderr)


def _writer(path: Path) -> TextIO:
    """A file that has each line as soon as it is printed: the process may be killed."""
    return path.open("w", buffering=1, encoding="utf-8")
