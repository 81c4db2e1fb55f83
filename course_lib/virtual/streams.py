"""Streams, events, and the order that they promise: the rules of CUDA.

A stream is a queue. Work on one stream runs in order; two streams do not wait for each other
unless the program says so, with ``wait_stream`` or an event. What they wait for is counted: a
stream knows how many operations of every other stream its own next one comes after (a vector
clock; PyTorch's ``torch.cuda._sanitizer`` keeps the same count).

The methods have the names that ``torch.cuda.Stream`` and ``torch.cuda.Event`` give them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from course_lib.virtual.spec import DEVICE_TYPE

if TYPE_CHECKING:
    from course_lib.virtual.clock import Clock

# An operation: its stream, its number on that stream, its name.
Ticket = tuple["Stream", int, str]

# As many streams as PyTorch has for each device; who asks for more gets the first ones again.
STREAMS_A_DEVICE = 32


class Stream:
    """A queue of work on one virtual GPU.

    Attributes:
        device_index: which virtual GPU.
        name: ``""`` for the default stream of its device, then ``"stream 1"`` and so on.
        free_at: simulated seconds at which all that was enqueued is done.
        count: how many operations have been enqueued.
        seen: for other streams, how many of their operations the next one here comes after.
    """

    __slots__ = ("_outer", "clock", "count", "device_index", "free_at", "name", "names", "seen")

    def __init__(self, clock: Clock, device_index: int, name: str) -> None:
        self.clock = clock
        self.device_index = device_index
        self.name = name
        self.names = (name,)  # made once, for every span to share
        self.free_at = 0.0
        self.count = 0
        self.seen: dict[Stream, int] = {}
        self._outer: list[tuple[int, Stream]] = []

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE_TYPE, self.device_index)

    def wait_stream(self, other: Stream) -> None:
        """Let what is enqueued here from now on start after all that is on ``other`` now."""
        self.come_after(other.free_at, other, other.count, other.seen)

    def wait_event(self, event: Event) -> None:
        """Let what is enqueued here from now on start after ``event``."""
        event.wait(self)

    def record_event(self) -> Event:
        """An event that happens when all that is enqueued here now is done."""
        event = Event(self)
        event.record()
        return event

    def synchronize(self) -> None:
        """Make the host wait for all that is enqueued here."""
        self.clock.wait(self.free_at, self, self.count, self.seen)

    def query(self) -> bool:
        """Whether all that was enqueued is done, by the host's clock."""
        return self.free_at <= self.clock.host

    def is_after(self, ticket: Ticket) -> bool:
        """Whether the next operation here starts only when that of ``ticket`` is done."""
        stream, number, _ = ticket
        if stream is self or stream.clock is not self.clock:  # or of a clock set to zero since
            return True
        done = max(self.seen.get(stream, 0), self.clock.seen_by_host.get(stream, 0))
        return done >= number

    def come_after(
        self, seconds: float, other: Stream, count: int, seen: dict[Stream, int]
    ) -> None:
        """Wait for the first ``count`` operations of ``other``, done at ``seconds``.

        Args:
            seen: what those operations came after themselves.
        """
        self.free_at = max(self.free_at, seconds)
        remember(self.seen, other, count, seen)

    def __enter__(self) -> Stream:
        clock = self.clock
        if clock.ended:
            raise RuntimeError(
                f"this stream is of virtual GPUs that are gone: devices() was called after it. "
                f"Make a new one with course_lib.stream('{DEVICE_TYPE}:{self.device_index}')."
            )
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


class Event:
    """A moment in the work of a stream, for other streams or the host to wait for.

    Args:
        stream: where :meth:`record` and :meth:`wait` apply if they are not told.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._recorded: tuple[float, Stream, int, dict[Stream, int]] | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Let the event happen when all that is enqueued on ``stream`` now is done."""
        stream = stream or self._stream
        seconds = max(stream.free_at, stream.clock.host)
        self._recorded = (seconds, stream, stream.count, dict(stream.seen))

    def wait(self, stream: Stream | None = None) -> None:
        """Let what is enqueued on ``stream`` from now on start after the event.

        As on CUDA, an event that was never recorded is no reason to wait.
        """
        if self._recorded is not None:
            (stream or self._stream).come_after(*self._recorded)

    def synchronize(self) -> None:
        """Make the host wait for the event."""
        if self._recorded is not None:
            self._stream.clock.wait(*self._recorded)

    def query(self) -> bool:
        """Whether the event has happened, by the host's clock."""
        return self._recorded is None or self._recorded[0] <= self._stream.clock.host

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``.

        Raises:
            RuntimeError: one of the two was never recorded.
        """
        if self._recorded is None or end._recorded is None:
            raise RuntimeError("elapsed_time needs two events that were recorded: call record()")
        return (end._recorded[0] - self._recorded[0]) * 1e3
