"""How an exercise is answered: not attempted, wrong (and how), or right (and what it took)."""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from numbers import Real

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
    """Turn a function that raises into a check that never does, and that throws its own dice."""

    @wraps(function)
    def never_raises(*answer: object) -> Verdict:
        try:
            with _own_dice():
                return function(*answer)
        except Wrong as wrong:
            return Verdict(WRONG, str(wrong), wrong.facts)
        except Exception as error:
            name, lines = type(error).__name__, str(error).splitlines()
            if isinstance(error, NotImplementedError) and not lines:  # as the stub raises it
                message = "write your answer in the cell above and run both again."
                return Verdict(NOT_ATTEMPTED, message)
            what = f"{name}: {lines[0]}" if lines else f"a bare {name}."
            return Verdict(WRONG, f"your code stopped with {what}")

    return never_raises


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
