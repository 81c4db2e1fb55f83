"""What a recording holds: spans, bytes, memory, and the sums that lessons ask of them."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from course_lib.spans import Span
from course_lib.timeline import chrome_trace
from course_lib.virtual.hazards import Hazard
from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.network import NETWORK, ONE_NODE, WITHIN, Nodes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("matmul", "other", "copy")
LINKS = (WITHIN, NETWORK, "host")  # what a copy can cross


class MemoryHistory:
    """The bytes in use on one device at each change: pairs of ``(seconds, bytes)``.

    Kept as two arrays, since a long recording has millions of changes.
    """

    def __init__(self, *changes: tuple[float, int]) -> None:
        self.seconds = array("d")
        self.nbytes = array("q")
        for change in changes:
            self.append(*change)

    def append(self, seconds: float, nbytes: int) -> None:
        self.seconds.append(seconds)
        self.nbytes.append(nbytes)

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, place: int) -> tuple[float, int]:
        return self.seconds[place], self.nbytes[place]


@dataclass
class Trace:
    """A recording of what the devices did.

    Attributes:
        device_type: ``"vgpu"`` or ``"cuda"``.
        device_count: how many devices there were.
        spans: every operation and copy in the order they were enqueued; seconds since the start.
        memory: for each device, ``(seconds, bytes in use)`` at each change, the seconds being
            those at which the device gets there (virtual GPUs only).
        peak_memory: for each device, the most bytes in use.
        hazards: the waits between streams that the program lacks (virtual GPUs only).
        seconds: from the start until every device had finished.
        nodes: which device is in which node.
    """

    device_type: str
    device_count: int
    spans: list[Span] = field(default_factory=list)
    memory: list[MemoryHistory] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)
    seconds: float = 0.0
    hazards: list[Hazard] = field(default_factory=list)
    nodes: Nodes = ONE_NODE

    @property
    def simulated(self) -> bool:
        """Whether the times were computed and not measured."""
        return self.device_type == DEVICE_TYPE

    @property
    def bytes_moved(self) -> dict[tuple[str, str], int]:
        """Bytes copied for each ``(source, destination)``, as in ``("vgpu:0", "vgpu:1")``."""
        total: dict[tuple[str, str], int] = defaultdict(int)
        for span in self.spans:
            if span.route is not None:
                source, destination = span.route
                total[self.name_of(source), self.name_of(destination)] += span.bytes
        return dict(total)

    def link_of(self, span: Span) -> str:
        """What a copy crossed: ``"within a node"``, ``"network"`` or ``"host"``.

        Raises:
            ValueError: ``span`` is no copy.
        """
        if span.route is None:
            raise ValueError(f"{span.name} crossed no link: it is no copy")
        source, destination = span.route
        if source is None or destination is None:
            return "host"
        joined = self.nodes.network_joins(source, destination)
        return NETWORK if joined else WITHIN

    @property
    def bytes_by_link(self) -> dict[str, int]:
        """Bytes that crossed each kind of link: ``"within a node"``, ``"network"``, ``"host"``."""
        total = dict.fromkeys(LINKS, 0)
        for span in self.spans:
            if span.route is not None:
                total[self.link_of(span)] += span.bytes
        return total

    @property
    def bytes_between_devices(self) -> int:
        """Bytes copied from one device to another; copies from and to the host left out."""
        return sum(span.bytes for span in self.spans if span.route and None not in span.route)

    def bytes_sent(self, device: torch.device | str | int) -> int:
        """Bytes that ``device``, which may be given by name or index, sent to other devices.

        Raises:
            ValueError: it is no device of this recording.
        """
        index = self._index_of(device)
        return sum(
            span.bytes
            for span in self.spans
            if span.route and None not in span.route and span.route[0] == index
        )

    def busy_seconds(self, device: torch.device | str | int) -> float:
        """Seconds in which ``device``, which may be given by name or index, computed or copied.

        Raises:
            ValueError: it is no device of this recording.
        """
        index = self._index_of(device)
        busy = done = 0.0
        for span in sorted(self.spans, key=lambda span: span.start):
            if index in span.devices:
                # Copies and products of one device can overlap.
                busy += max(0.0, span.end - max(span.start, done))
                done = max(done, span.end)
        return busy

    def idle_fraction(self, device: torch.device | str | int) -> float:
        """The part of the whole time in which ``device`` did nothing, from 0 to 1.

        It is given, and refused, as for :meth:`busy_seconds`.
        """
        busy = self.busy_seconds(device)
        return 1 - busy / self.seconds if self.seconds else 0.0

    def _index_of(self, device: torch.device | str | int) -> int:
        """The index of a device of this recording, which may be given by name or index.

        Raises:
            ValueError: it is none.
        """
        names = [self.name_of(index) for index in range(self.device_count)]
        is_index = isinstance(device, Integral) and not isinstance(device, bool)
        # Names are compared: PyTorch may not know "vgpu" where a recording is read.
        name = f"{self.device_type}:{device}" if is_index else str(device)
        if name not in names:
            raise ValueError(
                f"this recording has {self.device_count} device(s), from {self.name_of(0)} on, and "
                f"{str(device)!r} is none of them: give a device, its name or its index"
            )
        return names.index(name)

    @property
    def flops(self) -> float:
        """Floating-point operations of all matrix products; not a number on real GPUs."""
        return sum(span.flops for span in self.spans) if self.simulated else math.nan

    def seconds_by_kind(self, region: str | None = None) -> dict[str, float]:
        """Device seconds of ``"matmul"``, ``"other"`` and ``"copy"``, in one region or in all."""
        total = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            if region is None or span.region == region:
                total[span.kind] += span.end - span.start
        return total

    def save(self, path: str | Path) -> None:
        """Write a file, ``trace.json``, that Perfetto and ``chrome://tracing`` open: one process a
        device, one thread a stream, with bytes and FLOPs beside each operation."""
        chrome_trace.save(self, path)

    def plot(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the timeline: one row a device, a copy on the rows of both of its ends.

        With side streams a device can do several things at once, and has a row for each: what it
        computes, what it sends, what it receives. Devices that did nothing are left out.
        """
        from course_lib.timeline import plots  # here, so that recording loads no matplotlib

        return plots.plot_timeline(self, ax, title)

    def plot_links(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw one row for each end of a link that was used, and when it sent or received.

        A GPU's own link and a node's network card are different rows, so a card that several GPUs
        share shows how they take turns.
        """
        from course_lib.timeline import plots

        return plots.plot_links(self, ax, title)

    def plot_memory(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the bytes in use on each device, as the device goes through its work.

        On real GPUs it says that they are not recorded: a lesson goes on.
        """
        from course_lib.timeline import plots

        return plots.plot_memory(self, ax, title)

    @cached_property
    def has_side_streams(self) -> bool:
        """Whether any work was on another than its device's default stream."""
        return any(any(span.streams) for span in self.spans)

    @property
    def provenance(self) -> str:
        """``"simulated"`` or ``"measured"``, as the times are."""
        return "simulated" if self.simulated else "measured"

    def name_of(self, index: int | None) -> str:
        """What device ``index`` is called, as in ``"vgpu:1"``; ``None`` is the host."""
        return "host" if index is None else f"{self.device_type}:{index}"

    def __repr__(self) -> str:
        hazards = f", {len(self.hazards)} missing wait(s)" if self.hazards else ""
        return (
            f"<trace of {self.device_count} device(s): {len(self.spans)} spans, "
            f"{self.seconds * 1e3:.3f} ms {self.provenance}{hazards}>"
        )
