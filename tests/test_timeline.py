"""A trace says what ran where and when, which bytes moved, and draws it."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color

import course_lib
from course_lib import Trace
from course_lib.spans import Span
from course_lib.timeline import MemoryHistory
from course_lib.timeline.plots import LOOKS

Devices = list[torch.device]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def by_hand(device_type: str = "vgpu") -> Trace:
    """Two devices: a product and a copy on the first, a copy and something else on the second."""
    spans = [
        Span("mm", 0, 0.0, 0.4, flops=10.0, bytes=8, region="forward"),
        Span("copy", 0, 0.4, 0.5, flops=0, bytes=100, route=(0, 1), region="forward"),
        Span("add", 1, 0.5, 0.75, flops=0, bytes=4, region="backward"),
        Span("copy", 1, 0.75, 1.0, flops=0, bytes=7, route=(1, None)),
        Span("copy", 0, 0.8, 0.9, flops=0, bytes=50, route=(0, 1)),
    ]
    memory = [MemoryHistory((0.0, 0), (0.5, 2_000_000)), MemoryHistory((0.0, 1))]
    return Trace(device_type, 2, spans, memory, [5, 6], 1.0)


# What it counts.


def test_bytes_moved_are_added_up_for_each_route():
    recording = by_hand()
    assert recording.bytes_moved == {("vgpu:0", "vgpu:1"): 150, ("vgpu:1", "host"): 7}
    assert recording.bytes_between_devices == 150


def test_busy_and_idle_time_of_each_device():
    recording = by_hand()
    assert recording.busy_seconds(0) == pytest.approx(0.4 + 0.1 + 0.1)
    assert recording.idle_fraction(0) == pytest.approx(0.4)


def test_a_device_that_does_two_things_at_once_is_busy_once():
    recording = by_hand()  # from 0.8 to 0.9 the second device sends and receives
    assert recording.busy_seconds(1) == pytest.approx(0.1 + 0.25 + 0.25)
    assert recording.idle_fraction(1) == pytest.approx(0.4)


@pytest.mark.parametrize("device_type", ["vgpu", "cuda"])
def test_a_device_is_taken_itself_by_name_and_by_index(vgpus: Devices, device_type: str):
    recording = by_hand(device_type)
    for index in range(2):
        name = f"{device_type}:{index}"
        for given in (torch.device(name), name, np.int64(index), index):
            assert recording.bytes_sent(given) == [150, 0][index]
            assert recording.busy_seconds(given) == pytest.approx(0.6)
            assert recording.idle_fraction(given) == pytest.approx(0.4)


@pytest.mark.parametrize("device", ["vgpu:2", "vgpu", "cuda:0", "cpu", 2, -1, 1.0, True, None])
def test_what_is_no_device_of_a_recording_is_refused(vgpus: Devices, device):
    recording = by_hand()
    is_device = isinstance(device, str)
    for given in (device, torch.device(device)) if is_device else (device,):
        for ask in (recording.bytes_sent, recording.busy_seconds, recording.idle_fraction):
            with pytest.raises(ValueError, match=f"2 device.s., from vgpu:0 on, and '{device}'"):
                ask(given)


def test_flops_are_added_up():
    assert by_hand().flops == 10


def test_seconds_by_kind_in_one_region_or_in_all():
    recording = by_hand()
    assert recording.seconds_by_kind() == pytest.approx(
        {"matmul": 0.4, "other": 0.25, "copy": 0.45}
    )
    forward = recording.seconds_by_kind("forward")
    assert forward == pytest.approx({"matmul": 0.4, "other": 0, "copy": 0.1})


def test_an_empty_trace_has_nothing_and_draws_nothing(vgpus: Devices):
    with course_lib.trace() as recording:
        pass
    assert recording.spans == [] and recording.bytes_moved == {}
    assert recording.seconds == 0
    assert [recording.idle_fraction(index) for index in range(4)] == [0, 0, 0, 0]
    assert all(len(bars_of(recording.plot(), row)) == 0 for row in range(4))


def test_repr_fits_on_one_line():
    assert repr(by_hand()) == "<trace of 2 device(s): 5 spans, 1000.000 ms simulated>"
    assert repr(by_hand("cuda")).endswith("measured>")


# What it records.


def test_a_trace_starts_at_zero_and_ends_when_every_device_has_finished(vgpus: Devices):
    x = torch.ones(100, 100, device=vgpus[0])
    x @ x  # before the trace
    with course_lib.trace() as recording:
        x @ x
        x + x
    assert [span.name for span in recording.spans] == ["mm", "add"]
    assert recording.spans[0].start == pytest.approx(course_lib.CLASSROOM.launch_overhead)
    assert recording.seconds == pytest.approx(max(span.end for span in recording.spans))
    assert (recording.device_type, recording.device_count, recording.simulated) == ("vgpu", 4, True)


def test_bytes_moved_are_those_of_the_tensors(vgpus: Devices):
    x = torch.ones(1000, device=vgpus[0])
    with course_lib.trace() as recording:
        x.to(vgpus[1]).to(vgpus[2]).cpu()
        x.to(vgpus[1], torch.bfloat16)
        torch.ones(10).to(vgpus[3])
    assert recording.bytes_moved == {
        ("vgpu:0", "vgpu:1"): 8000,
        ("vgpu:1", "vgpu:2"): 4000,
        ("vgpu:2", "host"): 4000,
        ("host", "vgpu:3"): 40,
    }
    assert recording.bytes_between_devices == 12_000


def test_peak_memory_of_each_device_within_the_trace(vgpus: Devices):
    held = torch.zeros(1000, device=vgpus[0])
    big = torch.zeros(9000, device=vgpus[0])
    del big
    with course_lib.trace() as recording:
        y = held + 1
        del y
        z = torch.zeros(10, device=vgpus[1])
    assert recording.peak_memory == [8000, 40, 0, 0]
    assert [nbytes for _, nbytes in recording.memory[0]] == [4000, 8000, 4000, 4000]
    times = [seconds for seconds, _ in recording.memory[0]]
    assert times == sorted(times) and times[-1] == recording.seconds
    del held, z


def test_a_tensor_that_outlives_its_trace_is_no_longer_recorded(vgpus: Devices):
    with course_lib.trace() as recording:
        x = torch.zeros(10, device=vgpus[0])
    events = len(recording.memory[0])
    del x
    torch.zeros(10, device=vgpus[0]).add_(1)
    assert len(recording.memory[0]) == events
    assert "add_" not in [span.name for span in recording.spans]


def test_idle_fraction_of_a_device_that_waits(vgpus: Devices):
    x = torch.ones(300, 300, device=vgpus[0])
    with course_lib.trace() as recording:
        y = (x @ x).to(vgpus[1])
        y @ y
    busy = [span.end - span.start for span in recording.spans]
    assert recording.idle_fraction(0) == pytest.approx(1 - sum(busy[:2]) / recording.seconds)
    assert recording.idle_fraction(1) == pytest.approx(1 - sum(busy[1:]) / recording.seconds)
    assert recording.idle_fraction(3) == 1


def test_regions_name_what_the_program_does(vgpus: Devices):
    x = torch.ones(10, 10, device=vgpus[0])
    with course_lib.trace() as recording:
        with course_lib.region("outer"):
            x + 1
            with course_lib.region("inner"):
                x * 2
            x - 1
        x / 2
    assert [span.region for span in recording.spans] == ["outer", "inner", "outer", ""]


def test_a_region_ends_with_an_error_too(vgpus: Devices):
    with pytest.raises(ZeroDivisionError), course_lib.region("doomed"):
        raise ZeroDivisionError
    with course_lib.trace() as recording:
        torch.ones(3, device=vgpus[0]).add_(1)
    assert {span.region for span in recording.spans} == {""}


def test_nested_traces_each_start_at_zero(vgpus: Devices):
    x = torch.ones(100, 100, device=vgpus[0])
    with course_lib.trace() as outer:
        x @ x
        with course_lib.trace() as inner:
            x + x
        x * x
    assert [span.name for span in outer.spans] == ["mm", "add", "mul"]
    assert [span.name for span in inner.spans] == ["add"]
    first, second, third = outer.spans
    assert 0 < first.start < first.end <= second.start < second.end <= third.start
    launch = course_lib.CLASSROOM.launch_overhead
    assert inner.spans[0].start == pytest.approx(launch)
    assert second.start == pytest.approx(first.end + launch)
    assert inner.seconds < outer.seconds


def test_a_trace_that_an_error_ends_keeps_what_it_saw(vgpus: Devices):
    x = torch.ones(3, device=vgpus[0])
    with pytest.raises(RuntimeError, match="same device"), course_lib.trace() as recording:
        x + 1
        x + torch.ones(3, device=vgpus[1])
    assert recording.spans[0].name == "add"
    assert recording.seconds > 0
    spans = len(recording.spans)
    x + 1
    assert len(recording.spans) == spans


def test_garbage_of_an_earlier_cell_is_not_in_the_trace(vgpus: Devices):
    class Node:
        pass

    node = Node()
    node.itself, node.tensor = node, torch.zeros(1000, device=vgpus[0])
    del node
    with course_lib.trace() as recording:
        torch.zeros(10, device=vgpus[0])
    assert recording.peak_memory[0] == 40


# How it is drawn.


def bars_of(ax: Axes, row: int, kind: str | None = None) -> list[tuple[float, float]]:
    """``(start, end)`` of every bar in a row, by start; of one kind only, if asked for."""
    found = []
    for collection in ax.collections:
        assert isinstance(collection, PolyCollection)
        colour = LOOKS[kind]["facecolor"] if kind else None
        if colour and not same_color(collection.get_facecolor()[0], colour):
            continue
        for path in collection.get_paths():
            x, y = path.vertices[:, 0], path.vertices[:, 1]
            if y.min() < row < y.max():
                found.append((round(x.min(), 9), round(x.max(), 9)))
    return sorted(found)


def title_of(ax: Axes) -> str:
    return ax.get_title(loc="left") + ax.get_title()


def test_bars_stand_where_and_when_the_spans_ran():
    ax = by_hand().plot()  # in seconds
    assert bars_of(ax, 0) == [(0, 0.4), (0.4, 0.5), (0.8, 0.9)]
    assert bars_of(ax, 1) == [(0.4, 0.5), (0.5, 0.75), (0.75, 1.0), (0.8, 0.9)]
    assert bars_of(ax, 0, "matmul") == [(0, 0.4)]
    assert bars_of(ax, 0, "copy") == [(0.4, 0.5), (0.8, 0.9)]
    assert bars_of(ax, 1, "other") == [(0.5, 0.75)]


def test_bars_of_two_devices_do_not_touch():
    ax = by_hand().plot()
    for collection in ax.collections:
        for path in collection.get_paths():
            height = np.ptp(path.vertices[:, 1])
            assert 0.5 < height < 1


@pytest.mark.parametrize(
    ("seconds", "unit", "scale"),
    [(2.0, "seconds", 1), (0.02, "milliseconds", 1e3), (2e-5, "microseconds", 1e6)],
)
def test_the_axis_has_a_readable_unit(seconds: float, unit: str, scale: float):
    recording = Trace("vgpu", 1, [Span("mm", 0, 0.0, seconds, 1.0, 4)], seconds=seconds)
    ax = recording.plot()
    assert ax.get_xlabel() == unit
    assert bars_of(ax, 0) == [(0, pytest.approx(seconds * scale))]
    assert ax.get_xlim() == (0, pytest.approx(seconds * scale))


def test_rows_are_labelled_with_devices_the_first_on_top():
    ax = by_hand().plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vgpu:0", "vgpu:1"]
    bottom, top = ax.get_ylim()
    assert bottom > 1 and top < 0


@pytest.mark.parametrize(
    ("device_type", "word", "other"),
    [("vgpu", "simulated", "measured"), ("cuda", "measured", "simulated")],
)
def test_the_title_says_whether_times_are_simulated(device_type: str, word: str, other: str):
    recording = by_hand(device_type)
    for ax in (recording.plot(), recording.plot_memory()):
        assert word in title_of(ax) and other not in title_of(ax)
    ax = recording.plot(title="One step")
    assert title_of(ax) == f"One step ({word})"
    assert ax.get_yticklabels()[0].get_text() == f"{device_type}:0"


def test_the_legend_names_every_kind():
    (legend,) = by_hand().plot().figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["matrix products", "other operations", "copies"]


def test_it_can_be_drawn_into_an_axes_of_a_larger_figure():
    _, axes = plt.subplots(2, 1)
    assert by_hand().plot(axes[0], title="before") is axes[0]
    assert by_hand().plot_memory(axes[1]) is axes[1]
    assert len(plt.get_fignums()) == 1


def test_memory_is_drawn_in_megabytes_over_time():
    ax = by_hand().plot_memory()
    first, second = ax.get_lines()
    assert list(first.get_xdata()) == [0, 0.5]
    assert list(first.get_ydata()) == [0, 2]
    assert first.get_drawstyle() == "steps-post"
    assert first.get_label() == "vgpu:0" and second.get_label() == "vgpu:1"
    assert "MB" in ax.get_ylabel()


def test_a_long_recording_is_drawn_with_as_many_bars_as_an_eye_can_tell():
    gap = 1e-5  # between spans, in a recording that is half a second long
    spans = [Span("add", 0, i * gap, (i + 0.5) * gap, 0.0, 4) for i in range(50_000)]
    memory = MemoryHistory(*[(i * gap, i % 7) for i in range(50_000)])
    recording = Trace("vgpu", 1, spans, [memory], [6], seconds=0.5)
    bars = recording.plot().collections[0].get_paths()
    assert len(bars) < 5000
    first, last = bars[0].get_extents(), bars[-1].get_extents()
    assert (first.x0, last.x1) == (0, pytest.approx(500, rel=1e-4))  # milliseconds
    line = recording.plot_memory().get_lines()[0]
    assert len(line.get_xdata()) <= 8000
    assert (min(line.get_ydata()), max(line.get_ydata())) == (0, 6 / 1e6)


def test_spans_further_apart_than_a_hair_stay_apart():
    spans = [Span("add", 0, i / 300, (i + 0.5) / 300, 0.0, 4) for i in range(300)]
    recording = Trace("vgpu", 1, spans, seconds=1.0)
    assert len(recording.plot().collections[0].get_paths()) == 300


def test_memory_over_time_of_real_gpus_is_said_not_to_be_recorded():
    ax = Trace("cuda", 2, peak_memory=[5, 6], seconds=1.0).plot_memory()
    (line,) = ax.texts
    assert line.get_text() == (
        "Memory over time is recorded on virtual GPUs only; peak_memory has the most."
    )
    assert not ax.get_lines() and not ax.axison


def test_a_real_program_is_drawn_with_a_copy_on_both_rows(vgpus: Devices):
    x = torch.ones(300, 300, device=vgpus[0])
    with course_lib.trace() as recording:
        (x @ x).to(vgpus[1])
    ax = recording.plot()
    product, copy = recording.spans
    assert recording.seconds < 1
    scale = 1e3 if "milliseconds" in ax.get_xlabel() else 1e6
    expected = pytest.approx((copy.start * scale, copy.end * scale))
    assert [len(bars_of(ax, row)) for row in range(4)] == [2, 1, 0, 0]
    assert bars_of(ax, 0, "copy") == [expected] == bars_of(ax, 1, "copy")
    assert bars_of(ax, 0, "matmul")[0][1] == pytest.approx(product.end * scale)
