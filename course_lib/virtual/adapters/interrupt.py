"""Ctrl-C, and any other signal, at a moment that can bear it.

Python's own handler of SIGINT raises ``KeyboardInterrupt`` wherever the program happens to be, and
a program's handler of SIGALRM its ``TimeoutError``. In three kinds of places that does harm:

* PyTorch's C++ code asks the device guard, written in Python, from functions that must not fail:
  an error there ends the process. pybind11 looks the guard's method up, lets Python handle signals
  (``PyObject_Str`` does), then calls the method, and all of that must pass undisturbed;
* in a destructor, and where a weak dictionary forgets what has died, Python prints the error and
  goes on, so that the interrupt is lost;
* the few lines that count bytes must run to their end.

So every handler that is a function is put behind one that calls it, except in those places. There
the signal is made to come again when Python next looks for signals, a few bytecodes later, as often
as it takes. Everywhere else, in a sleep or a read too, it comes at once, as it always does. To a
program that asks ``signal.getsignal`` its own handler is told.

A handler set by C code, or by Python code that took ``signal`` itself out of its module before the
first ``devices()`` and sets one after it, is not seen (a Jupyter kernel's is).
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from course_lib.virtual.memory import Allocation, Memory

_uninterrupted: set[CodeType] = {Memory.allocate.__code__, Allocation.__del__.__code__}
_weak: list[Any] = [WeakKeyDictionary(), WeakSet(), WeakValueDictionary()]
_uninterrupted.update(each._remove.__code__ for each in _weak)


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


def _careful(handler: Any) -> Any:
    """``handler`` where it can be borne; what is no function, or careful, is itself."""
    if not callable(handler) or hasattr(handler, "is_careful"):
        return handler

    @wraps(handler)
    def handle(signum: int, frame: FrameType | None) -> Any:
        take_error()  # of a backward pass that was failing when the signal came
        if not (cpp.is_asking or _is_uninterrupted(frame)):
            return handler(signum, frame)
        # Python runs the pending call as soon as it returns to bytecode, that is here, and handles
        # the signal the next time it looks: after this function, of which this is the last call.
        return _add_pending_call(_RAISE_SIGNAL, signum)

    vars(handle)["is_careful"] = True
    return handle


def _chosen(handler: Any) -> Any:
    """The handler that the program chose, of one that is set."""
    return handler.__wrapped__ if hasattr(handler, "is_careful") else handler


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
    """Be careful with all handlers that there are, and those that are set from now on."""
    set_handler, get_handler = signal.signal, signal.getsignal

    @wraps(set_handler)
    def set_careful(signalnum: int, handler: Any) -> Any:
        return _chosen(set_handler(signalnum, _careful(_chosen(handler))))

    @wraps(get_handler)
    def get_chosen(signalnum: int) -> Any:
        return _chosen(get_handler(signalnum))

    def set_again(*info: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for signum in signal.valid_signals():
                handler = get_handler(signum)
                if _careful(handler) is not handler:
                    set_handler(signum, _careful(handler))

    signal.signal, signal.getsignal = set_careful, get_chosen
    set_again()
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:  # a Jupyter kernel sets Python's handler again for every cell
        shell.events.register("pre_run_cell", set_again)
