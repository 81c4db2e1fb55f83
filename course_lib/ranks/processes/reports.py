"""What a rank tells the caller at its end: what it returned, or which error ended it."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field
from typing import Any

from course_lib.ranks.processes import sending
from course_lib.ranks.processes.remote_traceback import Line, lines_of, traceback_of


@dataclass(frozen=True)
class Failed:
    """An error, in a form that can be sent.

    Attributes:
        error: the error itself, pickled.
        lines: of its traceback.
        cause: the error that it was raised from, or while handling which.
        is_meant: whether it was raised *from* that one.
        moment: when, in seconds that all processes of a machine count alike.
    """

    error: bytes
    lines: list[Line]
    cause: Failed | None
    is_meant: bool
    moment: float = field(default_factory=time.monotonic)

    @classmethod
    def with_error(cls, error: BaseException) -> Failed:
        cause = error.__cause__
        if cause is None and not error.__suppress_context__:
            cause = error.__context__
        return cls(
            _packed_error(error),
            lines_of(error.__traceback__),
            cls.with_error(cause) if cause is not None else None,
            error.__cause__ is not None,
        )

    def made_anew(self) -> BaseException:
        """The error, with its traceback, as if it had been raised here."""
        error: BaseException = pickle.loads(self.error)
        error.__traceback__ = traceback_of(self.lines)
        if self.cause is not None:
            cause = self.cause.made_anew()
            if self.is_meant:
                error.__cause__ = cause
            else:
                error.__context__ = cause
        return error

    def words(self) -> str:
        """The error in words, without its traceback."""
        error = pickle.loads(self.error)
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Returned:
    """What a rank returned, pickled."""

    value: bytes


Report = Returned | Failed


def returned(value: Any) -> Returned:
    """The report of a rank that returned ``value``.

    Raises:
        TypeError: it cannot be sent.
    """
    try:
        return Returned(sending.packed(value))
    except Exception as error:
        raise TypeError(
            f"what a rank returns is sent to the process that called ranks.run, and a "
            f"{type(value).__name__} cannot be sent: {error}"
        ) from None


def _packed_error(error: BaseException) -> bytes:
    """``error``, or its words if it is of a kind that cannot be sent."""
    try:
        packed = sending.packed(error)
        pickle.loads(packed)  # some can be taken apart and not put together again
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__qualname__}: {error}"))
    return packed
