"""The process of one rank, as the caller knows it: started, looked at, stopped."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from course_lib.ranks.processes import starting
from course_lib.ranks.processes.place import Place
from course_lib.ranks.processes.reports import Report, Returned


class RankProcess:
    """One process.

    Attributes:
        place: which rank it is.
        report: what it said at its end, once it has.
        exitcode: how it ended, once it has: below zero, the signal that killed it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.report: Report | None = None
        self.exitcode: int | None = None
        self._process, self._control = starting.made(place)
        self._was_stopped = self._is_closed = False

    def start(self) -> None:
        starting.start(self._process)

    def look(self) -> None:
        """Read its report if it has come, else see whether it has died."""
        if self.is_over:
            return
        has_died = not self._process.is_alive()  # asked first: it reports before it ends
        try:
            if self._control.poll():
                self.report = self._control.recv()
        except (EOFError, OSError):
            has_died = True  # before its report was complete
            self._process.join()
        if has_died:
            self.exitcode = self._process.exitcode

    @property
    def is_over(self) -> bool:
        return self.report is not None or self.exitcode is not None

    @property
    def has_gone_wrong(self) -> bool:
        return self.is_over and not isinstance(self.report, Returned)

    @property
    def is_lost(self) -> bool:
        """Whether it died without a word, and was not stopped by :meth:`ask_to_end`."""
        return self.report is None and self.exitcode is not None and not self._was_stopped

    @property
    def news(self) -> list[Any]:
        """What is ready when there is something to look at."""
        return [self._control, self._process.sentinel]

    def ask_to_end(self) -> None:
        """Stop it, unless it has ended by itself. It writes down where it was."""
        if not self._is_closed and self._process.is_alive():
            self._was_stopped = True
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until it has ended, and kill it if it has not by ``deadline``; and its children."""
        if self._is_closed:
            return
        if self._process.pid is not None:  # it was started
            self._process.join(max(0.0, deadline - time.monotonic()))
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self.exitcode = self._process.exitcode
            _kill_group(self._process.pid)
        # An error that was raised keeps this object, but no pipes.
        self._process.close()
        self._control.close()
        self._is_closed = True


def _kill_group(number: int) -> None:
    """What a rank has started and left, such as the workers of a ``DataLoader``.

    A rank begins a group of processes, of its own number, and its children are born into it.
    """
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # there is nobody left
            os.killpg(number, signal.SIGKILL)
