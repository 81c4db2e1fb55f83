"""Meetings: a collective happens when the last rank of the group has come.

Each rank that comes says what it wants done and goes on; it waits only where its program waits for
the result. The last one to come runs the collective for all, on streams that are the group's own.
What it must not do is to count from *its* moment: the work of a rank starts after what was on that
rank's stream when *it* came, and not before its host had come there. Both are noted on arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from course_lib import hardware
from course_lib.parallel.ring import Ring
from course_lib.ranks.calls import Call
from course_lib.ranks.counted_ring import CountedRing
from course_lib.ranks.errors import MismatchError
from course_lib.ranks.host_ring import HostRing
from course_lib.virtual.machine import machine
from course_lib.virtual.streams import Event, Stream, remember


class Moment:
    """What a rank had asked of its device when it came somewhere, and when."""

    def __init__(self, device: torch.device) -> None:
        clock = machine.clock
        clock.host += clock.spec.launch_overhead
        self.host = clock.host
        self._event = clock.current[device.index].record_event(None)
        self._seen_by_host = dict(clock.seen_by_host)

    def wait(self, stream: Stream) -> None:
        """Let what is enqueued on ``stream`` from now on start after it."""
        self._event.wait(stream)
        for other, count in self._seen_by_host.items():
            remember(stream.seen, other, count, {})


class Meeting:
    """One collective of one group.

    Attributes:
        calls: of the ranks that have come.
        is_over: whether all have come, and the work is enqueued.
        ends: for each rank when its part of the work is done.
        host: seconds at which the last host came.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: dict[int, Call] = {}
        self.moments: dict[int, Moment] = {}
        self.is_over = False
        self.ends: list[Event] = []
        self.host = 0.0


class Communicator:
    """What the ranks of one group have together: their streams, and who has called what.

    Args:
        title: what to call the group in messages and on streams.
        ranks: those of the world that are in it.
        devices: the GPU of each.
    """

    def __init__(self, title: str, ranks: Sequence[int], devices: Sequence[torch.device]) -> None:
        self.title, self.ranks, self.devices = title, list(ranks), list(devices)
        self._main: list[Stream] = []
        self._ring: Ring | None = None
        self._meetings: dict[int, Meeting] = {}
        self._counts = [0] * len(ranks)

    def arrive(self, rank: int, call: Call) -> tuple[Meeting, int]:
        """Let ``rank`` take part with ``call``; the meeting, and its number.

        Raises:
            MismatchError: another rank's call at this place is another one.
            ValueError: a tensor is not on the rank's own GPU, or not contiguous.
        """
        self._check_tensors(rank, call)
        number = self._counts[rank]
        meeting = self._meetings.setdefault(number, Meeting(len(self.ranks)))
        for other, theirs in meeting.calls.items():
            self._check_agreement(number, rank, call, other, theirs)
            break  # the others agreed with this one
        self._counts[rank] += 1
        meeting.calls[rank] = call
        meeting.moments[rank] = Moment(self.devices[rank])
        if len(meeting.calls) == meeting.size:
            del self._meetings[number]
            self._hold(meeting)
        return meeting, number

    def missing(self, meeting: Meeting) -> list[int]:
        """The ranks of the world that have not come."""
        return [each for place, each in enumerate(self.ranks) if place not in meeting.calls]

    def let_go(self) -> None:
        """Keep no tensor of a meeting to which somebody did not come."""
        self._meetings.clear()

    def _hold(self, meeting: Meeting) -> None:
        calls = [meeting.calls[rank] for rank in range(meeting.size)]
        moments = [meeting.moments[rank] for rank in range(meeting.size)]
        meeting.host = max(moment.host for moment in moments)
        tensors = tuple(tensor for call in calls for tensor in call.tensors)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensors):
            if all(tensor.device.type == "cpu" for tensor in tensors):
                calls[0].run(HostRing(self.devices), calls)
            else:
                with _host_stands_still(), ExitStack() as streams:
                    ring = self._ring_in_use()
                    for stream, moment in zip(self._main, moments, strict=True):
                        moment.wait(stream)
                        streams.enter_context(stream)
                    if machine.backing.type == "meta":
                        CountedRing(self.devices, self._main).run(calls)
                    else:
                        with ring.turning():
                            calls[0].run(ring, calls)
                    meeting.ends = [stream.record_event() for stream in self._main]
        meeting.is_over = True
        meeting.calls.clear()  # their tensors need not live any longer
        meeting.moments.clear()

    def _ring_in_use(self) -> Ring:
        """The group's streams: made when they are first needed."""
        if self._ring is None:
            clock, title = machine.clock, self.title
            self._main = [clock.add_link_stream(each.index, title) for each in self.devices]
            self._ring = Ring(
                self.devices, lambda device: clock.add_link_stream(device.index, f"{title} ring")
            )
        return self._ring

    def _check_tensors(self, rank: int, call: Call) -> None:
        device = self.devices[rank]
        for tensor in call.tensors:
            if hardware.is_virtual(tensor.device) and tensor.device != device:
                owners = dict(zip(self.devices, self.ranks, strict=True))
                owner = owners.get(tensor.device)
                whose = "" if owner is None else f", the GPU of rank {owner}"
                raise ValueError(
                    f"{call.name}: the tensor of rank {self.ranks[rank]} is on {tensor.device}"
                    f"{whose}; that of rank {self.ranks[rank]} is {device}: put it there"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{call.name}: tensors must be contiguous: call .contiguous()")

    def _check_agreement(
        self, number: int, rank: int, call: Call, other: int, theirs: Call
    ) -> None:
        if call.must_agree() == theirs.must_agree():
            return
        raise MismatchError(
            f"collective number {number + 1} of {self.title} is not the same one everywhere:\n"
            f"  rank {self.ranks[other]}: {theirs}\n    at {theirs.line}\n"
            f"  rank {self.ranks[rank]}: {call}\n    at {call.line}"
        )


class Part:
    """One rank's part in a meeting: what its work waits for."""

    def __init__(
        self, communicator: Communicator, meeting: Meeting, rank: int, name: str, number: int
    ) -> None:
        self._communicator, self._meeting, self._rank = communicator, meeting, rank
        self._name, self._number = name, number

    def is_over(self) -> bool:
        return self._meeting.is_over

    def end(self) -> Event | None:
        return self._meeting.ends[self._rank] if self._meeting.ends else None

    def host_seconds(self) -> float:
        return self._meeting.host

    def __str__(self) -> str:
        missing = self._communicator.missing(self._meeting)
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        what = f"{self._name}, number {self._number + 1} of {self._communicator.title}"
        return f"in {what}, for {who}"


@contextmanager
def _host_stands_still() -> Iterator[None]:
    """What is enqueued in the block takes no time of any host.

    A rank pays for one launch when it comes, as with NCCL, where a collective is one kernel. When
    the work can start is for the streams to say.
    """
    clock = machine.clock
    host, clock.host = clock.host, -math.inf
    try:
        yield
    finally:
        clock.host = host
