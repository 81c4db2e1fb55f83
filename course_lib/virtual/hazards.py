"""Missing waits: a tensor used on one stream while another may still be writing it.

On a GPU such a program reads whatever is there at that moment. A virtual GPU runs everything in
the order of the program, so its values are right; what it can do is to say so.

PyTorch's ``torch.cuda._sanitizer`` looks for the same on real GPUs.
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from course_lib.virtual.streams import Stream, Ticket, Timekeeper

if TYPE_CHECKING:
    from course_lib.virtual.tensor import VirtualTensor

HOST = "the host"


class StreamHazard(RuntimeWarning):
    """A wait between two streams is missing. The message says which."""


@dataclass(frozen=True)
class Hazard:
    """Two operations on one tensor, the second of which does not wait for the first.

    Attributes:
        tensor: its shape, dtype and device.
        first, second: ``(operation, stream)``; the second can be of :data:`HOST`.
        first_writes, second_writes: whether they write the tensor; at least one does.
    """

    tensor: str
    first: tuple[str, str]
    second: tuple[str, str]
    first_writes: bool
    second_writes: bool

    def __str__(self) -> str:
        (first, first_stream), (second, second_stream) = self.first, self.second
        verbs = ("reads", "writes")
        if second_stream == HOST:
            missing = f"synchronize() of {first_stream}, or of an event recorded after {first}"
        else:
            missing = (
                f"wait_stream of {second_stream} for {first_stream}, or a wait for an event "
                f"recorded after {first}"
            )
        return (
            f"{second} on {second_stream} {verbs[self.second_writes]} {self.tensor} that "
            f"{first} on {first_stream} {verbs[self.first_writes]}, and does not wait for it. "
            f"Missing: a {missing}. Here the values are right; on a GPU they need not be."
        )


@dataclass(frozen=True, slots=True)
class Access:
    """What one operation does to the bytes from ``start`` to ``end`` of a piece of memory."""

    start: float
    end: float
    writes: bool
    ticket: Ticket

    def conflicts_with(self, later: Access) -> bool:
        """Whether they touch the same bytes, and one of them writes."""
        overlap = self.start < later.end and later.start < self.end
        return overlap and (self.writes or later.writes)

    def is_replaced_by(self, later: Access) -> bool:
        """Whether whoever waits for ``later`` has no more need to look at this one."""
        inside = later.start <= self.start and self.end <= later.end
        return inside and (later.writes or (not self.writes and self.stream is later.stream))

    @property
    def stream(self) -> Stream:
        return self.ticket[0]


def check(ticket: Ticket, inputs: list[VirtualTensor], written: list[VirtualTensor]) -> None:
    """Note what the operation of ``ticket`` touches, and report what it touches too early.

    Args:
        inputs: what it reads, and those that it writes in place.
        written: what it writes, new tensors too.
    """
    changed = {id(tensor) for tensor in written}
    for tensor in {id(tensor): tensor for tensor in (*inputs, *written)}.values():
        access = Access(*_extent(tensor), id(tensor) in changed, ticket)
        allocation = tensor.allocation
        if allocation.accesses is None:  # so far there was one stream a device
            first = allocation.writer
            allocation.accesses = [Access(0, math.inf, True, first)] if first else []
        for earlier in allocation.accesses:
            if earlier.conflicts_with(access) and not ticket[0].is_after(earlier.ticket):
                _report(tensor, earlier, access)
                break
        kept = [each for each in allocation.accesses if not each.is_replaced_by(access)]
        allocation.accesses = [*kept, access]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of ``tensor`` in its memory, and the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    start, width = int(tensor.storage_offset()), tensor.element_size()
    return start * width, (start + last + 1) * width


def report_host(
    ticket: Ticket, first_writes: bool, tensor: torch.Tensor, name: str, writes: bool
) -> None:
    """Report that the host uses ``tensor`` before it waited for the copy ``ticket``."""
    _tell(ticket[0].clock, _hazard(tensor, ticket, (name, HOST), first_writes, writes))


def _report(tensor: torch.Tensor, first: Access, second: Access) -> None:
    operation = second.ticket[2], str(second.stream)
    hazard = _hazard(tensor, first.ticket, operation, first.writes, second.writes)
    _tell(second.stream.clock, hazard)


def _hazard(
    tensor: torch.Tensor,
    first: Ticket,
    second: tuple[str, str],
    first_writes: bool,
    second_writes: bool,
) -> Hazard:
    dtype = str(tensor.dtype).removeprefix("torch.")
    what = f"a {dtype} tensor of shape {tuple(tensor.shape)}"
    return Hazard(what, (first[2], str(first[0])), second, first_writes, second_writes)


def _tell(clock: Timekeeper, hazard: Hazard) -> None:
    for listen in clock.hazard_listeners:
        listen(hazard)
    if not clock.hazard_listeners:  # nobody wants to know
        warnings.warn(str(hazard), StreamHazard, stacklevel=_depth_of_the_program())


def _depth_of_the_program() -> int:
    """How far up the stack, from the caller, the first line is that is not the library's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        depth, frame = depth + 1, frame.f_back
    return depth


_LIBRARIES = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
