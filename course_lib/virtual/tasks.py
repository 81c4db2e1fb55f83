"""Operations whose times are not known yet, and the order in which they get them.

With side streams, something that is enqueued later may be ready sooner. So operations wait here
until the host waits for one of them: then the times of all that is ready before it are worked out,
in the order in which the GPUs would start them.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from course_lib.spans import Span


class Engine:
    """A part of a GPU that does one thing at a time: its cores, or one end of a link."""

    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = 0.0


_numbers = count()


class Task:
    """An operation whose times are not known yet.

    Attributes:
        seconds: how long it takes.
        engines: what it needs to run.
        ready: when it can start as far as is known: the host has enqueued it, and the operations
            that it waits for, apart from those in ``missing``, are done.
        missing: how many operations it waits for whose times are not known.
        followers: the operations that wait for it.
        spans: what its times are to be noted in when they are known.
        end: when it is done; ``None`` until that is known.
        lane: the queue that it is in. Of two tasks in one, the later waits for the earlier.
        number: tells which of two is the later one.
    """

    __slots__ = (
        "end",
        "engines",
        "followers",
        "lane",
        "missing",
        "number",
        "ready",
        "seconds",
        "spans",
    )

    def __init__(
        self, seconds: float, engines: list[Engine], ready: float, spans: list[Span]
    ) -> None:
        self.seconds, self.engines, self.ready, self.spans = seconds, engines, ready, spans
        self.missing = 0
        self.followers: list[Task] = []
        self.end: float | None = None
        self.lane: object = None
        self.number = next(_numbers)

    def wait_for(self, other: Task) -> None:
        if other.end is None:
            self.missing += 1
            other.followers.append(self)
        else:
            self.ready = max(self.ready, other.end)

    def run(self) -> float:
        """Take the engines as soon as they are free; the times are known then. Returns its end."""
        start = max(self.ready, *[engine.free_at for engine in self.engines])
        self.end = end = start + self.seconds
        for engine in self.engines:
            engine.free_at = end
        for span in self.spans:
            span.start, span.end = start, end
        return end


class Piece(Task):
    """One of several tasks behind the same spans, which last from the first of them to the last."""

    __slots__ = ()

    def run(self) -> float:
        began = [span.start if span.end else None for span in self.spans]
        end = super().run()
        for span, start in zip(self.spans, began, strict=True):
            if start is not None:
                span.start = start
        return end


class Tasks:
    """All operations of one machine whose times are not known."""

    def __init__(self) -> None:
        self._ready: list[tuple[float, int, Task]] = []  # a heap of what waits for nothing
        self._numbers = count()

    def add(self, task: Task) -> None:
        """Take up ``task``, whose ``ready`` and ``missing`` are right."""
        if not task.missing:
            heappush(self._ready, (task.ready, next(self._numbers), task))

    def settle(self, task: Task) -> float:
        """Work out the times of ``task``, and of all that is ready before it; returns its end."""
        while task.end is None:
            self._run_earliest()
        return task.end

    def settle_until(self, seconds: float) -> None:
        """Work out the times of all that is ready by then; the rest is not done."""
        while self._ready and self._ready[0][0] <= seconds:
            self._run_earliest()

    def end_of(self, tasks: list[Task]) -> float:
        """When all ``tasks`` are done; zero if there are none."""
        return max([self.settle(task) for task in tasks], default=0.0)

    def _run_earliest(self) -> None:
        _, _, task = heappop(self._ready)
        end = task.run()
        for follower in task.followers:
            follower.missing -= 1
            follower.ready = max(follower.ready, end)
            if not follower.missing:
                self.add(follower)
