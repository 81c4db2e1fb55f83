"""Streams, events, and the order that they promise: the rules of CUDA.

A stream is a queue. Work on one stream runs in order; two streams do not wait for each other
unless the program says so, with ``wait_stream`` or an event. What they wait for is counted: a
stream knows how many operations of every other stream its own next one comes after (a vector
clock; PyTorch's ``torch.cuda._sanitizer`` keeps the same count).

The methods have the names that ``torch.cuda.Stream`` and ``torch.cuda.Event`` give them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from course_lib.virtual.spec import DEVICE_TYPE
from course_lib.virtual.tasks import Task, Tasks

# An operation: its stream, its number on that stream, its name.
Ticket = tuple["Stream", int, str]

# As many streams as PyTorch has for each device; who asks for more gets the first ones again.
STREAMS_A_DEVICE = 32

# What a question costs the host if the answer is no. A program that asks until something is done
# would ask forever on a clock that stands still.
_SECONDS_OF_A_QUESTION = 1e-6


class Timekeeper(Protocol):
    """What a stream asks of the clock that it belongs to, which is a ``clock.Clock``."""

    host: float
    tasks: Tasks
    in_use: bool
    seen_by_host: dict[Stream, int]
    current: list[Stream]
    current_device: int
    hazard_listeners: list[Callable[[Any], None]]

    def wait(self, seconds: float, stream: Stream, count: int, seen: dict[Stream, int]) -> None: ...


class Stream:
    """A queue of work on one virtual GPU.

    Attributes:
        device_index: which virtual GPU.
        name: ``""`` for the default stream of its device, then ``"stream 1"`` and so on.
        free_at: simulated seconds at which the next operation can start, as far as is known.
        count: how many operations have been enqueued.
        seen: for other streams, how many of their operations the next one here comes after.
    """

    def __init__(self, clock: Timekeeper, device_index: int, name: str) -> None:
        self.clock = clock
        self.device_index = device_index
        self.name = name
        self.free_at = 0.0
        self.count = 0
        self.seen: dict[Stream, int] = {}
        # What the next operation waits for and when it ends is not known: of each lane the last.
        self._waits_for: dict[object, Task] = {}
        self._outer: list[tuple[int, Stream]] = []

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE_TYPE, self.device_index)

    def put(self, task: Task) -> None:
        """Enqueue ``task``: it comes after all that is here, and all that comes next after it."""
        task.ready = max(task.ready, self.free_at)
        for earlier in self._waits_for.values():
            task.wait_for(earlier)
        if task.lane is None:  # a copy is in two streams
            task.lane = self
        self._waits_for = {task.lane: task}

    def settle(self) -> None:
        """Find out when all that is enqueued here is done."""
        self.free_at = max(self.free_at, self.clock.tasks.end_of(self._tasks()))
        self._waits_for = {}

    def wait_stream(self, other: Stream) -> None:
        """Let what is enqueued here from now on start after all that is on ``other`` now."""
        _check("wait_stream", other, Stream)
        self._come_after(other._now())

    def wait_event(self, event: Event) -> None:
        """Let what is enqueued here from now on start after ``event``."""
        _check("wait_event", event, Event)
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        """An event, a new one if none is given, that happens when all enqueued here is done."""
        event = event or Event(self)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Make the host wait for all that is enqueued here."""
        self.check_in_use()
        self.settle()
        self.clock.wait(self.free_at, self, self.count, self.seen)

    def query(self) -> bool:
        """Whether all that was enqueued is done, by the host's clock."""
        return self._now().is_past()

    def is_after(self, ticket: Ticket) -> bool:
        """Whether the next operation here starts only when that of ``ticket`` is done."""
        stream, number, _ = ticket
        if stream is self or stream.clock is not self.clock:  # or of a clock set to zero since
            return True
        done = max(self.seen.get(stream, 0), self.clock.seen_by_host.get(stream, 0))
        return done >= number

    def end(self) -> tuple[float, list[Task]]:
        """When all that is enqueued here is done: not before these seconds and these tasks."""
        return self.free_at, self._tasks()

    def go_on_after(self, seconds: float, tasks: list[Task], seen: dict[Stream, int]) -> None:
        """Have one more operation, of several tasks: what comes next comes after all of them.

        Args:
            seen: how many operations of other streams they come after.
        """
        self.free_at, self._waits_for = seconds, {}
        self._wait_for(tasks)
        self.count += 1
        self.seen = dict(seen)

    def check_in_use(self) -> None:
        """Raise a clear error if its GPU is not among those that are there now."""
        if not self.clock.in_use:
            raise RuntimeError(
                f"this stream, or the stream of this event, is of other virtual GPUs than those "
                f"there are now: devices() was called after it was made, or it was made outside "
                f"of this fresh_devices() block, or inside of one that has ended. "
                f"Make a new one with course_lib.side_stream('{DEVICE_TYPE}:{self.device_index}')."
            )

    def _wait_for(self, tasks: list[Task]) -> None:
        """Let the next operation wait for these too: of each lane, the last one stands for all."""
        for task in tasks:
            known = self._waits_for.get(task.lane)
            if known is None or known.number < task.number:
                self._waits_for[task.lane] = task

    def _tasks(self) -> list[Task]:
        return list(self._waits_for.values())

    def _now(self) -> Moment:
        self.check_in_use()
        return Moment(self, self.free_at, self._tasks(), self.count, dict(self.seen))

    def _come_after(self, moment: Moment) -> None:
        self.check_in_use()
        moment.stream.check_in_use()
        self.free_at = max(self.free_at, moment.seconds)
        self._wait_for(moment.tasks)
        remember(self.seen, moment.stream, moment.count, moment.seen)

    def __enter__(self) -> Stream:
        clock = self.clock
        self.check_in_use()
        self._outer.append((clock.current_device, clock.current[self.device_index]))
        clock.current_device, clock.current[self.device_index] = self.device_index, self
        return self

    def __exit__(self, *error: object) -> None:
        clock = self.clock
        clock.current_device, clock.current[self.device_index] = self._outer.pop()

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        return f"{DEVICE_TYPE}:{self.device_index} {self.name or 'default stream'}"


def remember(known: dict[Stream, int], stream: Stream, count: int, seen: dict[Stream, int]) -> None:
    """Note in ``known`` that ``count`` operations of ``stream`` are waited for, and with them
    all that they waited for."""
    if known.get(stream, 0) < count:
        known[stream] = count
    for other, number in seen.items():
        if known.get(other, 0) < number:
            known[other] = number


@dataclass
class Moment:
    """When so much of a stream's work is done.

    Attributes:
        seconds: not before this.
        tasks: nor before these are done.
        count: how many operations of the stream are.
        seen: what they came after themselves.
    """

    stream: Stream
    seconds: float
    tasks: list[Task]
    count: int
    seen: dict[Stream, int]

    def settle(self) -> float:
        """The simulated seconds at which it comes."""
        self.stream.check_in_use()
        return max(self.seconds, self.stream.clock.tasks.end_of(self.tasks))

    def is_past(self) -> bool:
        """Whether it has come, by the host's clock. A no takes the host a moment of its time."""
        self.stream.check_in_use()
        clock = self.stream.clock
        clock.tasks.settle_until(clock.host)
        if any(task.end is None for task in self.tasks) or self.settle() > clock.host:
            clock.host += _SECONDS_OF_A_QUESTION
            return False
        clock.wait(self.seconds, self.stream, self.count, self.seen)  # not long: the host knows
        return True


class Event:
    """A moment in the work of a stream, for other streams or the host to wait for.

    Args:
        stream: where :meth:`record` and :meth:`wait` apply if they are not told.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._moment: Moment | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Let the event happen when all that is enqueued on ``stream`` now is done."""
        self._moment = (stream or self._stream)._now()
        self._moment.seconds = max(self._moment.seconds, self._stream.clock.host)

    def wait(self, stream: Stream | None = None) -> None:
        """Let what is enqueued on ``stream`` from now on start after the event.

        As on CUDA, an event that was never recorded is no reason to wait.
        """
        if self._moment is not None:
            (stream or self._stream)._come_after(self._moment)

    def synchronize(self) -> None:
        """Make the host wait for the event."""
        moment = self._moment
        if moment is not None:
            moment.stream.clock.wait(moment.settle(), moment.stream, moment.count, moment.seen)

    def query(self) -> bool:
        """Whether the event has happened, by the host's clock."""
        return self._moment is None or self._moment.is_past()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``.

        Raises:
            RuntimeError: one of the two was never recorded, or has not happened yet.
        """
        if self._moment is None or end._moment is None:
            raise RuntimeError("elapsed_time needs two events that were recorded: call record()")
        if not (self.query() and end.query()):
            raise RuntimeError(
                "elapsed_time needs two events that have happened: call synchronize() first"
            )
        return (end._moment.settle() - self._moment.settle()) * 1e3


def _check(method: str, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        name, maker = ("stream", "side_stream") if kind is Stream else ("event", "event")
        raise TypeError(
            f"{method} takes the {name} of a virtual GPU, as course_lib.{maker}(gpu) makes it, and "
            f"not {given!r}"
        )
