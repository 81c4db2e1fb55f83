"""Ctrl-C at the wrong moment: while a process starts, or a second time, while all are stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_come_later() -> Iterator[None]:
    """An interrupt that comes in the block is delivered behind it, to whoever handles interrupts.

    Where they are ignored, as in the background of a shell, they go on to be; and a handler that is
    not Python's, which could not be put back, stays.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # others are not interrupted
    if not is_main or before is None or before is signal.SIG_IGN:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
