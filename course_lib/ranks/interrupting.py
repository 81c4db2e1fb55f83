"""Ctrl-C while ranks run: the signal comes to the main thread, and must reach a rank's.

The rank that runs is ended by the next operation on a virtual GPU, where an error is an error like
any other. A rank that does none, in a loop of plain Python, is sent the error by the interpreter;
that is the second choice, because it may come wherever the thread is.
"""

from __future__ import annotations

import ctypes
from typing import Any

from course_lib.ranks.baton import Baton
from course_lib.virtual.machine import machine

# Seconds for a rank to come to its next operation.
_PATIENCE = 0.5


def end_interrupted(baton: Baton) -> None:
    """Stop all ranks, and wait until they have ended."""
    baton.is_stopping = True
    listeners = machine.clock.listeners
    listeners.append(_interrupt)
    try:
        if baton.join(_PATIENCE):
            return
    finally:
        listeners.remove(_interrupt)
    while not baton.join(_PATIENCE):
        holder = baton.holder
        if holder is not None and holder.thread.ident is not None:
            ident = ctypes.c_ulong(holder.thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def _interrupt(span: Any) -> None:
    raise KeyboardInterrupt
