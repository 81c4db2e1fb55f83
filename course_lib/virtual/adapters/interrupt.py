"""Ctrl-C at a moment that can bear it.

Python's own handler of SIGINT raises ``KeyboardInterrupt`` wherever the program happens to be. In
three kinds of places that does harm:

* PyTorch's C++ code asks the device guard, written in Python, from functions that must not fail:
  an error there ends the process. pybind11 looks the guard's method up, lets Python handle signals
  (``PyObject_Str`` does), then calls the method, and all of that must pass undisturbed;
* in a destructor Python prints the error and goes on, so that the interrupt is lost;
* the few lines that count bytes must run to their end.

The handler here raises the same error as Python's, except in those places. There it makes the
signal come again when Python next looks for signals, a few bytecodes later, as often as it takes.
Everywhere else, in a sleep or a read too, the interrupt comes at once, as it always does.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from course_lib.virtual.memory import Allocation, Memory

_uninterrupted: set[CodeType] = {
    function.__code__ for function in (Memory.allocate, Allocation.__init__, Allocation.__del__)
}


class _Cpp:
    """Whether C++ code is in the middle of asking Python something."""

    is_asking = False


class _Failure(threading.local):
    """The error that ended a backward pass on this thread."""

    error: BaseException | None = None


cpp = _Cpp()
failure = _Failure()


def uninterrupted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Put off an interrupt that comes while ``function`` runs, or what it calls."""
    _uninterrupted.add(function.__code__)
    return function


@uninterrupted
def take_error() -> None:
    """Take out the error that is set, if one is, and keep it in ``failure``.

    When an operator fails during backward, the engine asks the guard on its way out, while
    Python's error is still set. No Python function can return then.
    """
    try:
        _raise_error()
    except BaseException as error:
        failure.error = error


# Called through ctypes, any C function raises the error that is set.
_raise_error = ctypes.pythonapi.PyErr_Occurred


def _handle(signum: int, frame: FrameType | None) -> None:
    take_error()  # of a backward pass that was failing when the signal came
    if cpp.is_asking or _is_uninterrupted(frame):
        # Python runs the pending call as soon as it returns to bytecode, that is here, and handles
        # the signal the next time it looks: after this function, of which this is the last call.
        _add_pending_call(_RAISE_SIGNAL, signum)
    else:
        signal.default_int_handler(signum, frame)


def _is_uninterrupted(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _uninterrupted:
            return True
        frame = frame.f_back
    return False


_add_pending_call = ctypes.pythonapi.Py_AddPendingCall
_add_pending_call.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_RAISE_SIGNAL = ctypes.cast(ctypes.pythonapi.PyErr_SetInterruptEx, ctypes.c_void_p)


def install() -> None:
    """Handle SIGINT from now on, unless the program has chosen a handler of its own."""
    _install()
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:  # a Jupyter kernel sets Python's handler again for every cell
        shell.events.register("pre_run_cell", _install)


def _install(*info: Any) -> None:
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)
