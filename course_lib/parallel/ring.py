"""A ring: devices in a circle, each of which sends to the next one while it receives from the last.

What the collectives of :mod:`course_lib.parallel.collectives` are made of, and those of ranks.

The chunks of a tensor are ``chunks[rank][number]``, as many numbers as ranks. An empty one is not
sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from course_lib.hardware import Stream, current_stream, side_stream

# For each rank its chunks.
Chunks = Sequence[Sequence[Tensor]]

# Adds the second tensor to the first one, in place.
Combine = Callable[[Tensor, Tensor], Tensor]


def add(total: Tensor, part: Tensor) -> Tensor:
    """The combination of a sum, on paper too."""
    return total.add_(part)


class Ring:
    """The streams on which devices send to each other.

    A copy waits for the current stream of both its ends. So that a device can send and receive
    at once, it has a stream for each; what arrives is added on the stream where it arrived.

    Args:
        make_stream: makes a stream of a device.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        make_stream: Callable[[torch.device], Stream] = side_stream,
    ) -> None:
        self.devices = list(devices)
        self.send: list[Stream] = []
        self.receive: list[Stream] = []
        for device in self.devices:
            self.send.append(make_stream(device))
            self.receive.append(make_stream(device))

    @contextmanager
    def turning(self) -> Iterator[None]:
        """What is done in the block starts after the current streams, which go on after it."""
        main = [current_stream(device) for device in self.devices]
        for rank, each in enumerate(main):
            self.send[rank].wait_stream(each)
            self.receive[rank].wait_stream(each)
        yield
        for rank, each in enumerate(main):
            each.wait_stream(self.send[rank])
            each.wait_stream(self.receive[rank])

    def reduce_scatter(self, chunks: Chunks, combine: Combine = add) -> None:
        """In N - 1 rounds every chunk travels once round the ring, growing by each rank's part.

        It sets out next to its owner and ends there: chunk r is complete on rank r. On the way it
        replaces the chunks of others.
        """
        count = len(chunks)
        for step in range(count - 1):
            for rank in range(count):
                number, following = (rank - step - 1) % count, (rank + 1) % count
                source, destination = chunks[rank][number], chunks[following][number]
                if source.numel():
                    with self.between(rank, following):
                        combine(destination, source.to(destination.device))
            self.next_round()

    def reduce_scatter_into(
        self, outputs: Sequence[Tensor], chunks: Chunks, combine: Combine = add
    ) -> None:
        """As :meth:`reduce_scatter`, but the chunks stay, and the sums end in ``outputs``.

        What travels is a tensor of its own, of the size of a chunk.
        """
        count = len(chunks)
        travelling = {rank: chunks[rank][(rank - 1) % count] for rank in range(count)}
        for step in range(count - 1):
            arrived: dict[int, Tensor] = {}
            for rank in range(count):
                number, following = (rank - step - 1) % count, (rank + 1) % count
                own = chunks[following][number]
                if own.numel():
                    with self.between(rank, following):
                        coming = travelling[rank].to(own.device, copy=True)
                        arrived[following] = combine(coming, own)
                        if step == count - 2:
                            outputs[following].copy_(coming)
            travelling = arrived
            self.next_round()

    def all_gather(self, chunks: Chunks) -> None:
        """In N - 1 rounds every chunk travels from its owner to all others."""
        count = len(chunks)
        for step in range(count - 1):
            for rank in range(count):
                number, following = (rank - step) % count, (rank + 1) % count
                if chunks[rank][number].numel():
                    with self.between(rank, following):
                        chunks[following][number].copy_(chunks[rank][number])
            self.next_round()

    def broadcast(self, chunks: Chunks, root: int) -> None:
        """All chunks of ``root`` travel down the line that starts there, one behind the other."""
        count = len(chunks)
        for step in range(2 * count - 2):
            for hop in range(count - 1):
                number = step - hop
                rank, following = (root + hop) % count, (root + hop + 1) % count
                if 0 <= number < count and chunks[rank][number].numel():
                    with self.between(rank, following):
                        chunks[following][number].copy_(chunks[rank][number])
            self.next_round()

    def reduce(self, chunks: Chunks, root: int, combine: Combine = add) -> None:
        """All chunks travel down the line that ends at ``root``, growing by each rank's part.

        The chunks of ``root`` are the sums then; those of others stay.
        """
        count = len(chunks)
        travelling: dict[tuple[int, int], Tensor] = {}
        for step in range(2 * count - 2):
            for hop in range(count - 1):
                number = step - hop
                rank, following = (root + 1 + hop) % count, (root + 2 + hop) % count
                if not (0 <= number < count and chunks[rank][number].numel()):
                    continue
                own = chunks[following][number]
                with self.between(rank, following):
                    source = travelling.pop((rank, number), chunks[rank][number])
                    arrived = source.to(own.device, copy=True)
                    if following == root:
                        combine(own, arrived)
                    else:
                        travelling[following, number] = combine(arrived, own)
            self.next_round()

    def between(self, rank: int, following: int) -> AbstractContextManager:
        """Enqueue on the sending stream of one rank and the receiving one of another."""
        send, receive = self.send[rank], self.receive[following]
        if self.devices[rank] == self.devices[following]:
            return _one_after_the_other(send, receive)
        return _Both(send, receive)

    def on(self, rank: int) -> AbstractContextManager:
        """Enqueue on the stream where a rank receives."""
        return self.receive[rank]

    def next_round(self) -> None:
        """What a device sends next is what it has received."""
        for send, receive in zip(self.send, self.receive, strict=True):
            send.wait_stream(receive)


class _Both:
    """``with send, receive:`` as one block; rings of many GPUs enter millions of them."""

    __slots__ = ("receive", "send")

    def __init__(self, send: Stream, receive: Stream) -> None:
        self.send, self.receive = send, receive

    def __enter__(self) -> None:
        self.send.__enter__()
        self.receive.__enter__()

    def __exit__(self, *error: object) -> None:
        self.receive.__exit__(*error)
        self.send.__exit__(*error)


@contextmanager
def _one_after_the_other(send: Stream, receive: Stream) -> Iterator[None]:
    """Both streams of one device, where no copy waits for both: that is said here."""
    receive.wait_stream(send)
    with send, receive:
        yield
    send.wait_stream(receive)
