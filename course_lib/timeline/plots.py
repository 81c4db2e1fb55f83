"""Pictures of a recording: the timeline, and the memory in use."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from course_lib import style

if TYPE_CHECKING:  # a recording draws itself here
    from course_lib.timeline.recording import Trace

LOOKS: dict[str, dict[str, Any]] = {
    "matmul": {"facecolor": style.BLUE, "edgecolor": "white"},
    "other": {"facecolor": style.SKY, "edgecolor": "white"},
    "copy": {"facecolor": style.ORANGE, "edgecolor": "white", "hatch": "////"},
}


# What a device can do at the same time, in the order of the rows.
LANES = ("computes", "sends", "receives")


KIND_NAMES = {"matmul": "matrix products", "other": "other operations", "copy": "copies"}


def plot_timeline(trace: Trace, ax: Axes | None = None, title: str = "") -> Axes:
    """What :meth:`Trace.plot` does."""
    with style.look():
        return _plot_timeline(trace, ax, title)


def _plot_timeline(trace: Trace, ax: Axes | None, title: str) -> Axes:
    bars = _bars(trace)
    rows = sorted({row for row, _ in bars})
    if trace.has_side_streams:
        rows = [(device, lane) for device in sorted({row[0] for row in rows}) for lane in LANES]
    ax = ax or style.figure(height=1.6 + (0.26 if trace.has_side_streams else 0.4) * len(rows))[1]
    unit, scale = _unit(trace.seconds)
    are_few = len(trace.spans) < 200
    for (row, kind), (starts, ends) in sorted(bars.items()):
        if not are_few:
            starts, ends = _merge(starts, ends, gap=trace.seconds / 4000)
        stretches = np.column_stack([starts, ends - starts]) * scale
        edge = 0.5 if are_few else 0  # too many edges would hide the bars
        place = (rows.index(row) - 0.36, 0.72)
        ax.broken_barh(stretches.tolist(), place, linewidth=edge, **LOOKS[kind])
    ax.set_yticks(range(len(rows)), [_row_name(trace, *row) for row in rows])
    for first in range(3, len(rows), 3) if trace.has_side_streams else ():
        ax.axhline(first - 0.5, color=style.PALE, linewidth=1, zorder=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, max(trace.seconds * scale, 1e-12))
    ax.set_xlabel(unit)
    ax.set_title(f"{title or 'Timeline'} ({trace.provenance})")
    if not ax.figure.legends:
        handles = [Patch(label=KIND_NAMES[kind], **look) for kind, look in LOOKS.items()]
        ax.figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return ax


def _bars(trace: Trace) -> dict[tuple[tuple[int, str], str], np.ndarray]:
    """Starts and ends of the spans of each row and kind, in seconds."""
    times: dict[tuple, list[float]] = defaultdict(list)
    compute, send, receive = LANES if trace.has_side_streams else ("", "", "")
    for span in trace.spans:
        if span.route is None:  # nearly all: a million of them must not take long
            key = (span.device, compute), "matmul" if span.flops else "other"
            times[key] += (span.start, span.end)
        else:
            for device, lane in zip(span.route, (send, receive), strict=True):
                if device is not None:
                    times[(device, lane), "copy"] += (span.start, span.end)
    return {key: np.array(pairs).reshape(-1, 2).T for key, pairs in times.items()}


def plot_links(trace: Trace, ax: Axes | None = None, title: str = "") -> Axes:
    """What :meth:`Trace.plot_links` does."""
    with style.look():
        return _plot_links(trace, ax, title)


def _plot_links(trace: Trace, ax: Axes | None, title: str) -> Axes:
    busy = _link_ends(trace)
    rows = sorted(busy, key=lambda end: (end.is_card, end.number, end.receives))
    ax = ax or style.figure(height=1.6 + 0.26 * max(1, len(rows)))[1]
    unit, scale = _unit(trace.seconds)
    for place, end in enumerate(rows):
        starts, ends = np.array(busy[end]).T
        starts, ends = _merge(starts, ends, gap=trace.seconds / 4000)
        stretches = np.column_stack([starts, ends - starts]) * scale
        color = style.RED if end.is_card else style.ORANGE
        ax.broken_barh(stretches.tolist(), (place - 0.36, 0.72), facecolor=color)
    ax.set_yticks(range(len(rows)), [_link_end_name(trace, end) for end in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, max(trace.seconds * scale, 1e-12))
    ax.set_xlabel(unit)
    ax.set_title(f"{title or 'Links'} ({trace.provenance})")
    return ax


class _LinkEnd(NamedTuple):
    """One end of a link: a GPU's own, or a network card (counted over all nodes)."""

    is_card: bool
    number: int
    receives: bool


def _link_ends(trace: Trace) -> dict[_LinkEnd, list[tuple[float, float]]]:
    """When each end of a link between GPUs was busy."""
    busy: dict[_LinkEnd, list[tuple[float, float]]] = defaultdict(list)
    for span in trace.spans:
        source, destination = span.route or (None, None)
        if source is None or destination is None:
            continue
        nodes = trace.nodes if trace.link_of(span) == "network" else None
        for device, receives in ((source, False), (destination, True)):
            number = nodes.card_of(device) if nodes else device
            busy[_LinkEnd(nodes is not None, number, receives)].append((span.start, span.end))
    return busy


def _link_end_name(trace: Trace, end: _LinkEnd) -> str:
    does = "receives" if end.receives else "sends"
    if not end.is_card or trace.nodes is None:
        return f"{trace.name_of(end.number)} {does}"
    node, card = divmod(end.number, trace.nodes.cards)
    return f"node {node} card {card} {does}"


def _row_name(trace: Trace, index: int, lane: str) -> str:
    return lane if lane in LANES[1:] else f"{trace.name_of(index)} {lane}".strip()


def plot_memory(trace: Trace, ax: Axes | None = None, title: str = "") -> Axes:
    """What :meth:`Trace.plot_memory` does."""
    with style.look():
        return _plot_memory(trace, ax, title)


def _plot_memory(trace: Trace, ax: Axes | None, title: str) -> Axes:
    ax = ax or style.figure()[1]
    if not trace.simulated:
        text = "Memory over time is recorded on virtual GPUs only; peak_memory has the most."
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")
        ax.set_axis_off()
        ax.set_title(f"{title or 'Memory'} ({trace.provenance})")
        return ax
    unit, scale = _unit(trace.seconds)
    for index, history in enumerate(trace.memory):
        times, nbytes = np.array(history.seconds), np.array(history.nbytes)
        if len(times) > 10_000:
            times, nbytes = _extremes(times, nbytes, bins=4000)
        ax.step(times * scale, nbytes / 1e6, where="post", label=trace.name_of(index))
    ax.set_xlabel(unit)
    ax.set_ylabel("MB in use")
    ax.set_ylim(bottom=0)
    ax.set_title(f"{title or 'Memory'} ({trace.provenance})")
    if trace.device_count > 1:
        ax.legend(ncols=2)
    return ax


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
