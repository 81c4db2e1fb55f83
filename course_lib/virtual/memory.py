"""Who holds what: bytes in use on each device, counted once for each piece of storage."""

from __future__ import annotations

import gc
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from course_lib.virtual.hazards import Access
from course_lib.virtual.streams import Ticket


class Memory:
    """The memory of one device: how much it has, how much is in use, and the most there was.

    Attributes:
        index: of the device.
        machine_number: of the ``machine.State`` that it belongs to.
    """

    def __init__(self, device: torch.device, capacity: float, machine_number: int) -> None:
        self.device = device
        self.index: int = device.index
        self.capacity = capacity
        self.machine_number = machine_number
        self.in_use = 0
        self.peak = 0
        self.listeners: list[Callable[[int], None]] = []

    @property
    def free(self) -> float:
        """Bytes that are not in use; none where devices() made it smaller than what is in use."""
        return max(0, self.capacity - self.in_use)

    def reset_peak(self) -> None:
        """Start looking for the peak anew, from what is in use now."""
        self.peak = self.in_use

    def allocate(self, nbytes: int) -> Allocation:
        """Take ``nbytes``.

        Raises:
            torch.OutOfMemoryError: the device does not have them, in the words of CUDA.
        """
        if self.in_use + nbytes > self.capacity:
            self._make_room(nbytes)
        self.in_use += nbytes
        if self.in_use > self.peak:
            self.peak = self.in_use
        if self.listeners:
            self.tell_listeners()
        # Every new tensor comes by here. To set what it has takes half as long as an __init__.
        allocation = Allocation()
        allocation.memory = self
        allocation.nbytes = allocation.spread = nbytes
        allocation.writer = allocation.accesses = allocation.storage = None
        return allocation

    def check_free(self, nbytes: int) -> None:
        """Raise what :meth:`allocate` would raise, and take nothing."""
        if self.in_use + nbytes > self.capacity:
            self._make_room(nbytes)

    def _make_room(self, nbytes: int) -> None:
        # Tensors in unreachable reference cycles are garbage that Python has not looked at yet.
        # Whether a program fits must not depend on when it last did.
        if nbytes <= self.capacity:
            gc.collect()
        if self.in_use + nbytes > self.capacity:
            raise torch.OutOfMemoryError(
                f"{self.device} out of memory. Tried to allocate {format_bytes(nbytes)}. "
                f"It has a total capacity of {format_bytes(self.capacity)}, "
                f"of which {format_bytes(self.free)} is free "
                f"and {format_bytes(self.in_use)} is in use."
            )

    def tell_listeners(self) -> None:
        for listen in self.listeners:
            listen(self.in_use)


class Allocation:
    """One piece of device memory, made by :meth:`Memory.allocate`; every tensor on it holds it.

    Python destroys it with the last of those tensors, and the bytes are free again.

    Attributes:
        memory, nbytes: where, and how much.
        spread: as much, or infinity once a view of it has far more numbers, as an expanded one has.
        writer: the last operation that wrote it before there were side streams.
        accesses: who read and wrote which part of it lately, since there are (see ``hazards``).
        storage: what ``untyped_storage()`` gave last, if somebody keeps it (see ``storages``).
    """

    __slots__ = ("__weakref__", "accesses", "memory", "nbytes", "spread", "storage", "writer")

    memory: Memory
    nbytes: int
    spread: float
    writer: Ticket | None
    accesses: list[Access] | None
    storage: weakref.ref | None

    def resize(self, nbytes: int) -> None:
        """Have ``nbytes`` from now on.

        Raises:
            torch.OutOfMemoryError: the device does not have them. Like CUDA, what grows takes its
                new piece before the old one is free.
        """
        other = self.memory.allocate(nbytes)
        self.nbytes, other.nbytes = other.nbytes, self.nbytes  # and the other goes, with the old
        self.spread = max(self.spread, nbytes)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(
            "the memory of a virtual GPU cannot be copied as an object; a tensor can, with "
            ".clone() or .cpu(). (dcp.async_save copies in this way: take dcp.save.)"
        )

    def __del__(self) -> None:
        memory = self.memory
        memory.in_use -= self.nbytes
        if memory.listeners:
            memory.tell_listeners()


def format_bytes(nbytes: float) -> str:
    """``3145728`` as ``"3.15 MB"``; powers of 1000, as in a data sheet."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def host_memory_left() -> float:
    """Bytes that the host can still give without swapping; infinite where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return math.inf
    available = re.search(r"MemAvailable: *(\d+) kB", text)
    return int(available[1]) * 1024 if available else math.inf
