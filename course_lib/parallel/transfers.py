"""Transfers: copies and collectives that run beside computing, and the waits that make them safe.

Work on a side stream runs while the device computes on its current one. Three things must be said
for that, and here they are said once: the side stream waits until its input is ready; nobody else
gets the input's memory before it has been read; and whoever uses the result waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from course_lib.hardware import Event, Stream, current_stream, side_stream
from course_lib.parallel.kinds import Devices, Tensors


def keep_for(stream: Stream, tensor: Tensor) -> None:
    """Give nobody else the memory of ``tensor`` before the work of ``stream`` on it is done."""
    tensor.record_stream(stream)  # type: ignore[arg-type]  # it knows only PyTorch's own streams


class Transfer:
    """A tensor on its way to another device."""

    def __init__(self, tensor: Tensor, arrived: Event) -> None:
        self._tensor, self._arrived = tensor, arrived

    def receive(self) -> Tensor:
        """The tensor; what its device does from now on waits until it is there."""
        here = current_stream(self._tensor.device)
        self._arrived.wait(here)
        keep_for(here, self._tensor)
        return self._tensor


class Link:
    """A way from one device to another, with a side stream at each end.

    A copy stands in a stream of both devices. These two are used for nothing else, so neither
    device stops computing for it.
    """

    def __init__(self, source: torch.device, destination: torch.device) -> None:
        self._destination = destination
        self._sending, self._receiving = side_stream(source), side_stream(destination)

    def send(self, tensor: Tensor) -> Transfer:
        """Start to copy ``tensor``, as it is after all that its device was given so far."""
        self._sending.wait_stream(current_stream(tensor.device))
        with self._sending, self._receiving:
            arriving = tensor.to(self._destination)
        keep_for(self._sending, tensor)
        return Transfer(arriving, self._receiving.record_event())


def ring_of_links(devices: Devices) -> list[Link]:
    """For each device the link on which it receives, from the one before it in a circle."""
    return [Link(devices[rank - 1], device) for rank, device in enumerate(devices)]


def send_round(links: Sequence[Link], tensors: Tensors) -> list[Transfer]:
    """Start to copy each device's tensor to the next one in the circle of ``links``."""
    return [link.send(tensors[rank - 1]) for rank, link in enumerate(links)]


class SideStreams:
    """A side stream on each of some devices, for work that all of them do together."""

    def __init__(self, devices: Devices) -> None:
        self._devices = list(devices)
        self._streams = [side_stream(device) for device in devices]

    @contextmanager
    def beside(self, tensors: Tensors, ready: Sequence[Event] | None = None) -> Iterator[None]:
        """Work on ``tensors``, one a device, while the devices go on computing.

        Args:
            ready: for each device the moment at which its tensor is complete; if not given, when
                all is done that the device was given so far.
        """
        with ExitStack() as stack:
            for rank, (tensor, side) in enumerate(zip(tensors, self._streams, strict=True)):
                if ready is None:
                    side.wait_stream(current_stream(tensor.device))
                else:
                    ready[rank].wait(side)
                keep_for(side, tensor)
                stack.enter_context(side)
            yield

    def record_events(self) -> list[Event]:
        """For each device the moment at which its side stream has done all its work so far."""
        return [side.record_event() for side in self._streams]

    def join(self) -> None:
        """Let what the devices do from now on wait for all work on the side streams."""
        for device, side in zip(self._devices, self._streams, strict=True):
            current_stream(device).wait_stream(side)
