"""How an exercise is answered: not attempted, wrong (and how), or right (and what it took)."""

from __future__ import annotations

import _thread
import html
import linecache
import random
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from numbers import Real
from types import FunctionType

import numpy as np
import torch

NOT_ATTEMPTED, WRONG, RIGHT = "not attempted", "wrong", "right"
_SYMBOLS = {NOT_ATTEMPTED: ("○", "#8A8A8A"), WRONG: ("✗", "#D55E00"), RIGHT: ("✓", "#009E73")}


@dataclass
class Verdict:
    """What a check shows below its cell.

    Attributes:
        status: ``"not attempted"``, ``"wrong"`` or ``"right"``.
        message: one or two sentences.
        facts: rows of (what, yours, target), for example bytes moved.
    """

    status: str
    message: str
    facts: list[tuple[str, str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [f"{self.status}: {self.message}"]
        lines += [f"  {what}: {yours} (target {target})" for what, yours, target in self.facts]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        symbol, colour = _SYMBOLS[self.status]
        rows = "".join(
            f"<tr><td>{html.escape(what)}</td><td>{html.escape(yours)}</td>"
            f"<td>target {html.escape(target)}</td></tr>"
            for what, yours, target in self.facts
        )
        table = f"<table>{rows}</table>" if rows else ""
        return (
            f'<div style="border-left: 4px solid {colour}; padding: 4px 12px">'
            f"<b>{symbol} {self.status}</b><br>"
            f"{html.escape(self.message)}{table}</div>"
        )


class Wrong(Exception):
    """Raised inside a check when the answer is wrong; its text is the verdict's message."""

    def __init__(self, message: str, facts: list[tuple[str, str, str]] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or []


def check(function: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """Turn a function that raises into a check that never does, and that throws its own dice.

    An error is laid to the answer only if a line of the answer was at work when it came; then the
    verdict names the line. An answer that is still at work after :data:`PATIENCE` seconds is
    stopped.
    """

    @wraps(function)
    def never_raises(*answer: object) -> Verdict:
        for each in answer:
            if not callable(each):
                kind = type(each).__name__
                return Verdict(WRONG, f"give the check your function: a {kind} is not callable.")
        try:
            with _own_dice(), _patience():
                return function(*answer)
        except Wrong as wrong:
            return Verdict(WRONG, str(wrong), wrong.facts)
        except Exception as error:
            if isinstance(error, NotImplementedError) and not str(error):  # as the stub raises it
                message = "write your answer in the cell above and run both again."
                return Verdict(NOT_ATTEMPTED, message)
            return Verdict(WRONG, _what_stopped(error, answer))

    return never_raises


def _what_stopped(error: Exception, answers: tuple[object, ...]) -> str:
    name, lines = type(error).__name__, str(error).splitlines()
    what = f"{name}: {lines[0]}" if lines else f"a bare {name}."
    line = _line_of_the_answer(error, answers)
    if line is None and "Backward returned an in" in what:  # an invalid gradient; a wrong number
        # Autograd's own name for it is the class's with a word behind it, which nobody wrote.
        said = re.sub(r"^[Ff]unction (\w+)Backward ", r"the backward of \1 ", lines[0])
        return (
            "your backward must return one gradient for each argument of `apply`, of its shape and "
            f"in the same order; several are a tuple, and not a list. Autograd says: {said}"
        )
    called = [answer.__qualname__ for answer in answers if isinstance(answer, FunctionType)]
    if line is None and any(what.startswith(f"TypeError: {each}() ") for each in called):
        return (
            "your function could not be called: leave its parameters as the exercise has them. "
            f"{lines[0]}."
        )
    if line is None:
        return (
            "your code ran, and what it returned or changed could not be looked at. The check "
            f"stopped with {what}"
        )
    return f"your code stopped with {what} ({line})"


def _line_of_the_answer(error: Exception, answers: tuple[object, ...]) -> str | None:
    """Where in the answer ``error`` came up; ``None`` if no line of it was at work."""
    # What else the learner wrote, such as a helper in another cell, shares the answer's globals.
    theirs = [answer.__globals__ for answer in answers if isinstance(answer, FunctionType)]
    found = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if any(frame.f_globals is names for names in theirs):
            source = linecache.getline(frame.f_code.co_filename, number).strip()
            found = f"line {number}: {source}" if source else f"line {number}"
    return found


# Seconds that an answer may take; the slowest right one takes a few.
PATIENCE = 60.0


@contextmanager
def _patience() -> Iterator[None]:
    """Stop what runs in the block as Ctrl-C would, if it does not end by itself.

    Only the main thread can be interrupted, which is where a notebook runs its cells.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    has_run_out = threading.Event()

    def stop() -> None:
        has_run_out.set()
        _thread.interrupt_main()

    timer = threading.Timer(PATIENCE, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not has_run_out.is_set():
            raise
        raise Wrong(
            f"your code was still at work after {PATIENCE:g} seconds, and was stopped: is there a "
            "loop that never ends?"
        ) from None
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _own_dice() -> Iterator[None]:
    """Random numbers from seed 0; afterwards every generator goes on as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed real GPUs too. Virtual ones follow this seed.
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def right(message: str, facts: list[tuple[str, str, str]] | None = None) -> Verdict:
    """The verdict on a right answer."""
    return Verdict(RIGHT, message, facts or [])


def require_number(value: object) -> float:
    """``value`` as a float, or a clear word that it is none."""
    if value is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Wrong(f"your function should return a number, and returned a {type(value).__name__}.")
    return float(value)
