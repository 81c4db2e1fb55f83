"""What ran where and when, which bytes moved, how much memory was held, and pictures of it.

    with course_lib.trace() as t:
        train_step()
    t.plot()

On virtual GPUs the times are simulated; on real ones the same object is filled from
``torch.profiler``, and they are measured.
"""

from __future__ import annotations

import gc
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from course_lib import hardware, profiler, style
from course_lib.virtual import hazards
from course_lib.virtual.clock import Span
from course_lib.virtual.hazards import Hazard, StreamHazard
from course_lib.virtual.machine import DEVICE_TYPE, machine

LOOKS = {
    "matmul": {"facecolor": style.BLUE, "edgecolor": "white"},
    "other": {"facecolor": style.SKY, "edgecolor": "white"},
    "copy": {"facecolor": style.ORANGE, "edgecolor": "white", "hatch": "////"},
}
# What a device can do at the same time, in the order of the rows.
LANES = ("computes", "sends", "receives")
KIND_NAMES = {"matmul": "matrix products", "other": "other operations", "copy": "copies"}


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
    """

    device_type: str
    device_count: int
    spans: list[Span] = field(default_factory=list)
    memory: list[MemoryHistory] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)
    seconds: float = 0.0
    hazards: list[Hazard] = field(default_factory=list)

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
                total[self._name(source), self._name(destination)] += span.bytes
        return dict(total)

    @property
    def bytes_between_devices(self) -> int:
        """Bytes copied from one device to another; copies from and to the host left out."""
        return sum(span.bytes for span in self.spans if span.route and None not in span.route)

    def bytes_sent(self, device: torch.device) -> int:
        """Bytes that ``device`` sent to other devices."""
        copies = (span for span in self.spans if span.route and None not in span.route)
        return sum(span.bytes for span in copies if span.route[0] == device.index)

    def busy_seconds(self, index: int) -> float:
        """Seconds in which device ``index`` computed or copied."""
        busy = done = 0.0
        for span in sorted(self.spans, key=lambda span: span.start):
            if index in span.devices:
                # Copies and products of one device can overlap.
                busy += max(0.0, span.end - max(span.start, done))
                done = max(done, span.end)
        return busy

    def idle_fraction(self, index: int) -> float:
        """The part of the whole time in which device ``index`` did nothing, from 0 to 1."""
        return 1 - self.busy_seconds(index) / self.seconds if self.seconds else 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of all matrix products; not a number on real GPUs."""
        return sum(span.flops for span in self.spans) if self.simulated else math.nan

    def seconds_by_kind(self, region: str | None = None) -> dict[str, float]:
        """Device seconds of ``"matmul"``, ``"other"`` and ``"copy"``, in one region or in all."""
        total = dict.fromkeys(LOOKS, 0.0)
        for span in self.spans:
            if region is None or span.region == region:
                total[span.kind] += span.end - span.start
        return total

    def plot(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the timeline: one row a device, a copy on the rows of both of its ends.

        With side streams a device can do several things at once, and has a row for each: what it
        computes, what it sends, what it receives. Devices that did nothing are left out.
        """
        bars = self._bars()
        rows = sorted({row for row, _ in bars})
        if self._has_side_streams:
            rows = [(device, lane) for device in sorted({row[0] for row in rows}) for lane in LANES]
        ax = (
            ax
            or style.figure(height=1.6 + (0.26 if self._has_side_streams else 0.4) * len(rows))[1]
        )
        unit, scale = _unit(self.seconds)
        are_few = len(self.spans) < 200
        for (row, kind), (starts, ends) in sorted(bars.items()):
            if not are_few:
                starts, ends = _merge(starts, ends, gap=self.seconds / 4000)
            stretches = np.column_stack([starts, ends - starts]) * scale
            edge = 0.5 if are_few else 0  # too many edges would hide the bars
            place = (rows.index(row) - 0.36, 0.72)
            ax.broken_barh(stretches, place, linewidth=edge, **LOOKS[kind])
        ax.set_yticks(range(len(rows)), [self._row_name(*row) for row in rows])
        for first in range(3, len(rows), 3) if self._has_side_streams else ():
            ax.axhline(first - 0.5, color=style.PALE, linewidth=1, zorder=0)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlim(0, max(self.seconds * scale, 1e-12))
        ax.set_xlabel(unit)
        ax.set_title(f"{title or 'Timeline'} ({self._provenance})")
        if not ax.figure.legends:
            handles = [Patch(label=KIND_NAMES[kind], **look) for kind, look in LOOKS.items()]
            ax.figure.legend(handles=handles, loc="outside lower right", ncols=3)
        return ax

    @cached_property
    def _has_side_streams(self) -> bool:
        return any(any(span.streams) for span in self.spans)

    def _bars(self) -> dict[tuple[tuple[int, str], str], tuple[np.ndarray, np.ndarray]]:
        """Starts and ends of the spans of each row and kind, in seconds."""
        times: dict[tuple, list[float]] = defaultdict(list)
        compute, send, receive = LANES if self._has_side_streams else ("", "", "")
        for span in self.spans:
            if span.route is None:  # nearly all: a million of them must not take long
                key = (span.device, compute), "matmul" if span.flops else "other"
                times[key] += (span.start, span.end)
            else:
                for device, lane in zip(span.route, (send, receive), strict=True):
                    if device is not None:
                        times[(device, lane), "copy"] += (span.start, span.end)
        return {key: np.array(pairs).reshape(-1, 2).T for key, pairs in times.items()}

    def _row_name(self, index: int, lane: str) -> str:
        return lane if lane in LANES[1:] else f"{self._name(index)} {lane}".strip()

    def plot_memory(self, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the bytes in use on each device, as the device goes through its work.

        On real GPUs it says that they are not recorded: a lesson goes on.
        """
        ax = ax or style.figure()[1]
        if not self.simulated:
            text = "Memory over time is recorded on virtual GPUs only; peak_memory has the most."
            ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")
            ax.set_axis_off()
            ax.set_title(f"{title or 'Memory'} ({self._provenance})")
            return ax
        unit, scale = _unit(self.seconds)
        for index, history in enumerate(self.memory):
            times, nbytes = np.array(history.seconds), np.array(history.nbytes)
            if len(times) > 10_000:
                times, nbytes = _extremes(times, nbytes, bins=4000)
            ax.step(times * scale, nbytes / 1e6, where="post", label=self._name(index))
        ax.set_xlabel(unit)
        ax.set_ylabel("MB in use")
        ax.set_ylim(bottom=0)
        ax.set_title(f"{title or 'Memory'} ({self._provenance})")
        if self.device_count > 1:
            ax.legend(ncols=2)
        return ax

    @property
    def _provenance(self) -> str:
        return "simulated" if self.simulated else "measured"

    def _name(self, index: int | None) -> str:
        return "host" if index is None else f"{self.device_type}:{index}"

    def __repr__(self) -> str:
        hazards = f", {len(self.hazards)} missing wait(s)" if self.hazards else ""
        return (
            f"<trace of {self.device_count} device(s): {len(self.spans)} spans, "
            f"{self.seconds * 1e3:.3f} ms {self._provenance}{hazards}>"
        )


def _merge(starts: np.ndarray, ends: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw as one what is so close together that no eye could tell."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] - np.maximum.accumulate(ends)[:-1] > gap
    return starts[is_first], np.maximum.reduceat(ends, np.flatnonzero(is_first))


def _extremes(times: np.ndarray, values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest of ``values`` in each of many stretches of time."""
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    edges = np.unique(np.searchsorted(times, np.linspace(times[0], times[-1], bins)))
    pairs = np.column_stack(
        [np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)]
    )
    return np.repeat(times[edges], 2), pairs.ravel()


def _unit(seconds: float) -> tuple[str, float]:
    """A readable unit for a duration, and how many of it a second has."""
    for unit, scale in (("seconds", 1.0), ("milliseconds", 1e3)):
        if seconds * scale >= 1:
            return unit, scale
    return "microseconds", 1e6


@contextmanager
def trace(strict: bool = False) -> Iterator[Trace]:
    """Record what the GPUs do in the block; the recording is complete when the block ends.

    Args:
        strict: raise a :class:`~course_lib.StreamHazard` at the first operation that does not
            wait for another stream as it should, where otherwise it is noted in ``hazards``
            (virtual GPUs only).

    Raises:
        RuntimeError: there are no devices yet.
    """
    if not machine.device_count and not hardware.real_devices:
        raise RuntimeError("there is nothing to record yet: call course_lib.devices(4) first")
    gc.collect()  # peak memory must not depend on when Python last looked for garbage
    hardware.synchronize()
    recording = _trace_virtual(strict) if machine.device_count else _trace_real()
    with recording as result:
        yield result


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name what the program is doing, as in ``with course_lib.region("forward"):``."""
    clock = machine.clock
    outer, clock.region = clock.region, name
    try:
        with profiler.annotate(name):
            yield
    finally:
        clock.region = outer


@contextmanager
def _trace_virtual(strict: bool) -> Iterator[Trace]:
    clock, count = machine.clock, machine.device_count
    result = Trace(DEVICE_TYPE, count)
    began = clock.host

    def add_hazard(hazard: Hazard) -> None:
        result.hazards.append(hazard)
        if strict:
            raise StreamHazard(str(hazard))

    def watch(index: int, history: MemoryHistory) -> Callable[[int], None]:
        def add_change(nbytes: int) -> None:
            # The host reserves memory when it enqueues an operation, often long before the
            # device gets there. Drawn at the host's time, all would stand at the left edge.
            free_at, tasks = clock.current[index].end()
            if tasks:
                unsettled.append((history, len(history), tasks))
            history.append(max(clock.host, free_at) - began, nbytes)

        return add_change

    unsettled: list[tuple[MemoryHistory, int, list]] = []
    listeners = []
    for index, memory in enumerate(machine.memories[:count]):
        history = MemoryHistory((0.0, memory.in_use))
        listeners.append(watch(index, history))
        memory.listeners.append(listeners[-1])
        result.memory.append(history)
    clock.listeners.append(result.spans.append)
    hazards.listeners.append(add_hazard)
    try:
        yield result
    finally:
        machine.synchronize()
        clock.listeners.remove(result.spans.append)
        hazards.listeners.remove(add_hazard)
        for memory, listener in zip(machine.memories, listeners, strict=False):
            memory.listeners.remove(listener)
        result.seconds = clock.host - began
        for span in result.spans:
            span.start -= began
            span.end -= began
        for history, place, tasks in unsettled:
            seconds = clock.end_of(tasks) - began
            history.seconds[place] = max(history.seconds[place], seconds)
        for history in result.memory:
            history.append(result.seconds, history.nbytes[-1])
            result.peak_memory.append(max(history.nbytes))


@contextmanager
def _trace_real() -> Iterator[Trace]:
    gpus = hardware.real_devices
    result = Trace("cuda", len(gpus))
    for gpu in gpus:
        hardware.reset_peak_memory(gpu)
    try:
        with profiler.record_spans(result.spans, gpus):
            yield result
    finally:
        result.seconds = max((span.end for span in result.spans), default=0.0)
        result.peak_memory = [hardware.peak_memory(gpu) for gpu in gpus]
