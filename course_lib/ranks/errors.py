"""What ends a run of ranks."""

from __future__ import annotations


class DeadlockError(RuntimeError):
    """Every rank waits for another. The message says who waits for what, and from which line."""


class MismatchError(RuntimeError):
    """Ranks that should take part in one operation do not call the same one."""


class RankStopped(BaseException):
    """Raised where a rank waits, to end it. No program should catch it."""
