"""Sending and receiving: two ranks, a copy, and a pair of streams for each way between two GPUs.

A send and a receive are posted; whichever comes second makes the copy. Messages of one sender and
one tag arrive in the order in which they were sent.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from course_lib.ranks.calls import form_of
from course_lib.ranks.errors import MismatchError
from course_lib.ranks.meetings import Moment
from course_lib.virtual.machine import machine
from course_lib.virtual.streams import Event, Stream

SEND, RECEIVE = "send", "receive"


class Post:
    """One side of a message.

    Attributes:
        side: :data:`SEND` or :data:`RECEIVE`.
        rank, other: the ranks of the world, this one and the one it means.
        tag: what a receive must have in common with the send that it is for.
        line: where in the program it was posted.
    """

    def __init__(
        self,
        side: str,
        tensor: Tensor,
        rank: int,
        other: int,
        tag: int,
        device: torch.device,
        line: str,
    ) -> None:
        self.side, self.tensor, self.tag = side, tensor, tag
        self.rank, self.other, self.line = rank, other, line
        self.device = device
        self.moment = Moment(device)
        self._is_over = False
        self._end: Event | None = None
        self._host = 0.0

    def is_over(self) -> bool:
        return self._is_over

    def end(self) -> Event | None:
        return self._end

    def host_seconds(self) -> float:
        return self._host

    def finish(self, host: float, end: Event | None) -> None:
        self._is_over, self._host, self._end = True, host, end

    def __str__(self) -> str:
        tagged = f" with tag {self.tag}" if self.tag else ""
        if self.side == SEND:
            return f"in a send{tagged} to rank {self.other}, which has posted no receive for it"
        return f"in a receive{tagged} from rank {self.other}, which has sent nothing{tagged}"


class Exchange:
    """All messages of one group on their way.

    Args:
        ranks: of the world, those in the group.
        devices: the GPU of each.
    """

    def __init__(self, ranks: Sequence[int], devices: Sequence[torch.device]) -> None:
        self._ranks, self._devices = list(ranks), list(devices)
        self._waiting: dict[tuple[int, int, int, str], deque[Post]] = defaultdict(deque)
        self._streams: dict[tuple[int, int], tuple[Stream, Stream]] = {}

    def post(self, side: str, tensor: Tensor, rank: int, other: int, tag: int, line: str) -> Post:
        """Post one side; if the other is there already, copy.

        Args:
            rank, other: in the group.

        Raises:
            MismatchError: the two tensors differ in size or dtype.
            ValueError: ``tensor`` is not on the rank's own GPU.
        """
        device = self._devices[rank]
        if tensor.device.type != "cpu" and tensor.device != device:
            raise ValueError(
                f"{side}: the tensor of rank {self._ranks[rank]} is on {tensor.device}; "
                f"its GPU is {device}: put it there"
            )
        post = Post(side, tensor, self._ranks[rank], self._ranks[other], tag, device, line)
        sender, receiver = (rank, other) if side == SEND else (other, rank)
        opposite = RECEIVE if side == SEND else SEND
        partners = self._waiting[sender, receiver, tag, opposite]
        if not partners:
            self._waiting[sender, receiver, tag, side].append(post)
            return post
        partner = partners.popleft()
        send, receive = (post, partner) if side == SEND else (partner, post)
        self._copy(send, receive, (sender, receiver))
        return post

    def let_go(self) -> None:
        """Keep no tensor of a message that nobody took."""
        self._waiting.clear()

    def _copy(self, send: Post, receive: Post, way: tuple[int, int]) -> None:
        source, destination = send.tensor, receive.tensor
        if source.numel() != destination.numel() or source.dtype != destination.dtype:
            raise MismatchError(
                f"rank {send.rank} sends {form_of(source)}, and rank {receive.rank} receives "
                f"{form_of(destination)}\n    rank {send.rank} at {send.line}\n"
                f"    rank {receive.rank} at {receive.line}"
            )
        host = max(send.moment.host, receive.moment.host)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((destination,)):
            if source.device.type == destination.device.type == "cpu":
                destination.copy_(source.view_as(destination))
                send.finish(host, None)
                receive.finish(host, None)
                return
            clock = machine.clock
            outer, clock.host = clock.host, -math.inf  # when it starts is for the streams to say
            try:
                with ExitStack() as stack:
                    for stream, post in zip(self._pair(way), (send, receive), strict=True):
                        post.moment.wait(stream)
                        stack.enter_context(stream)
                    destination.copy_(source.contiguous().view_as(destination))
                for stream, post in zip(self._pair(way), (send, receive), strict=True):
                    post.finish(host, stream.record_event())
            finally:
                clock.host = outer

    def _pair(self, way: tuple[int, int]) -> tuple[Stream, Stream]:
        """The streams of a sender and a receiver, made when they are first needed."""
        if way not in self._streams:
            sender, receiver = way
            clock = machine.clock
            self._streams[way] = (
                clock.add_link_stream(
                    self._devices[sender].index, f"to rank {self._ranks[receiver]}"
                ),
                clock.add_link_stream(
                    self._devices[receiver].index, f"from rank {self._ranks[sender]}"
                ),
            )
        return self._streams[way]
