"""Streams and events of virtual GPUs keep CUDA's order, and a missing wait is reported."""

from __future__ import annotations

import io
import pickle
import warnings

import pytest
import torch
from matplotlib import pyplot as plt

import course_lib
from course_lib import StreamHazard
from round_numbers import LATENCY, LAUNCH, seconds, spans_of

Devices = list[torch.device]

# A product of two 100 x 100 matrices takes 2 ms; to fill one takes 0.4 ms, to copy one 1 + 4 ms.
FILL = 4 * 100**2 / 1e8
PRODUCT = 2 * 100**3 / 1e9
COPY = LATENCY + 4 * 100**2 / 1e7


def matrix(gpu: torch.device) -> torch.Tensor:
    return torch.ones(100, 100, device=gpu)


# What runs at the same time.


def test_a_copy_on_side_streams_runs_beside_a_product(gpus: Devices):
    x = matrix(gpus[0])
    sender, receiver = course_lib.side_stream(gpus[0]), course_lib.side_stream(gpus[1])

    def program():
        x @ x
        with sender, receiver:
            x.to(gpus[1])

    product, copy = spans_of(program)
    assert (product.start, product.end) == (seconds(LAUNCH), seconds(LAUNCH + PRODUCT))
    assert (copy.start, copy.end) == (seconds(2 * LAUNCH), seconds(2 * LAUNCH + COPY))
    assert (product.streams, copy.streams) == (("",), ("stream 1", "stream 1"))


def test_a_copy_on_default_streams_waits_for_the_product(gpus: Devices):
    x = matrix(gpus[0])

    def program():
        x @ x
        x.to(gpus[1])

    product, copy = spans_of(program)
    assert copy.start == product.end


@pytest.mark.parametrize("side", [0, 1])
def test_a_copy_waits_if_one_of_its_ends_is_on_a_busy_default_stream(gpus: Devices, side: int):
    x, y = matrix(gpus[0]), matrix(gpus[1])
    side_stream = course_lib.side_stream(gpus[side])

    def program():
        (x @ x, y @ y)
        with side_stream:
            x.to(gpus[1])

    first, second, copy = spans_of(program)
    assert copy.start == (second.end if side == 0 else first.end)


def test_products_of_two_streams_of_a_device_take_turns(gpus: Devices):
    x = matrix(gpus[0])
    side = course_lib.side_stream(gpus[0])

    def program():
        x @ x
        with side:
            x @ x

    first, second = spans_of(program)
    assert (second.start, second.end) == (first.end, seconds(LAUNCH + 2 * PRODUCT))


def test_work_that_is_ready_goes_before_work_that_waits(gpus: Devices):
    x = matrix(gpus[0])
    main = course_lib.current_stream(gpus[0])
    side, sender = course_lib.side_stream(gpus[0]), course_lib.side_stream(gpus[0])
    receiver = course_lib.side_stream(gpus[1])

    def program():
        with sender, receiver:
            x.to(gpus[1])
        main.wait_stream(sender)
        x @ x
        with side:
            x @ x

    copy, waits, ready = spans_of(program)
    assert waits.start == copy.end
    assert ready.start == seconds(3 * LAUNCH)
    assert ready.end < waits.start


def test_copies_in_both_directions_run_at_the_same_time(gpus: Devices):
    x, y = matrix(gpus[0]), matrix(gpus[1])
    there = [course_lib.side_stream(gpu) for gpu in gpus[:2]]
    back = [course_lib.side_stream(gpu) for gpu in gpus[:2]]

    def program():
        with there[0], there[1]:
            x.to(gpus[1])
        with back[0], back[1]:
            y.to(gpus[0])

    one, other = spans_of(program)
    assert other.start == seconds(2 * LAUNCH)
    assert other.start < one.end


def test_two_copies_out_of_one_device_take_turns(gpus: Devices):
    x = matrix(gpus[0])
    streams = [(course_lib.side_stream(gpus[0]), course_lib.side_stream(gpu)) for gpu in gpus[1:3]]

    def program():
        for (sender, receiver), gpu in zip(streams, gpus[1:3], strict=True):
            with sender, receiver:
                x.to(gpu)

    one, other = spans_of(program)
    assert other.start == one.end


def test_a_ring_of_copies_takes_as_long_as_one_copy_a_round(gpus: Devices):
    blocks = [matrix(gpu) for gpu in gpus]
    senders, receivers = ([course_lib.side_stream(gpu) for gpu in gpus] for _ in range(2))

    def program():
        for _ in range(3):
            for rank in range(4):
                senders[rank].wait_stream(receivers[rank])
            course_lib.synchronize()
            for rank, block in enumerate(blocks):
                following = (rank + 1) % 4
                with senders[rank], receivers[following]:
                    block.to(gpus[following])

    spans = spans_of(program)
    # The host enqueues four copies a round; the last of them begins and ends last.
    assert spans[-1].end == seconds(3 * (4 * LAUNCH + COPY))


# What waits for what.


def test_wait_stream_waits_for_what_was_enqueued_before_it(gpus: Devices):
    x = matrix(gpus[0])
    main, side = course_lib.current_stream(gpus[0]), course_lib.side_stream(gpus[0])
    receiver = course_lib.side_stream(gpus[1])

    def program():
        x @ x
        side.wait_stream(main)
        x @ x
        with side, receiver:
            x.to(gpus[1])

    first, _, copy = spans_of(program)
    assert copy.start == first.end


def test_an_event_is_a_moment_on_a_stream(gpus: Devices):
    x = matrix(gpus[0])
    main, side = course_lib.current_stream(gpus[0]), course_lib.side_stream(gpus[0])
    receiver = course_lib.side_stream(gpus[1])
    event = course_lib.event(gpus[0])

    def program():
        x @ x
        event.record(main)
        x @ x
        event.wait(side)
        with side, receiver:
            x.to(gpus[1])

    first, _, copy = spans_of(program)
    assert copy.start == first.end
    assert event.query()


def test_elapsed_time_is_the_time_between_two_events_in_milliseconds(gpus: Devices):
    x = matrix(gpus[0])
    main = course_lib.current_stream(gpus[0])
    x @ x  # so that the host is ahead
    start = main.record_event()
    x @ x
    x @ x
    end = main.record_event()
    with pytest.raises(RuntimeError, match="call synchronize"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) == seconds(2 * PRODUCT * 1e3)
    with pytest.raises(RuntimeError, match="call record"):
        start.elapsed_time(course_lib.event(gpus[0]))


def test_the_host_waits_for_a_stream_or_an_event_and_for_no_more(gpus: Devices):
    x = matrix(gpus[0])
    main, side = course_lib.current_stream(gpus[0]), course_lib.side_stream(gpus[0])
    side.wait_stream(main)
    x @ x
    event = main.record_event()
    with side:
        x @ x
    began = course_lib.host_seconds()
    event.synchronize()
    assert course_lib.host_seconds() == seconds(LAUNCH + FILL + PRODUCT)
    assert course_lib.host_seconds() > began
    assert main.query()
    assert not side.query()
    side.synchronize()
    assert course_lib.host_seconds() == seconds(LAUNCH + FILL + 2 * PRODUCT)


def test_reading_a_value_waits_for_the_current_stream_alone(gpus: Devices):
    x, number = matrix(gpus[0]), torch.ones((), device=gpus[0])
    course_lib.synchronize()
    with course_lib.side_stream(gpus[0]):
        x @ x
    number.item()
    assert course_lib.host_seconds() < PRODUCT
    course_lib.synchronize()
    assert course_lib.host_seconds() > PRODUCT


def test_an_event_that_was_never_recorded_holds_nobody_up(gpus: Devices):
    event = course_lib.event(gpus[0])
    event.wait(course_lib.current_stream(gpus[0]))
    event.synchronize()
    assert event.query()
    assert course_lib.host_seconds() == 0


# The block.


def test_a_block_makes_a_stream_and_its_device_current_and_gives_back_what_was(gpus: Devices):
    main, side = course_lib.current_stream(gpus[1]), course_lib.side_stream(gpus[1])
    with side:
        assert course_lib.current_stream(gpus[1]) is side
        assert torch.zeros(1, device="vgpu").device == gpus[1]
        with course_lib.side_stream(gpus[2]), main:
            assert course_lib.current_stream(gpus[1]) is main
        assert course_lib.current_stream(gpus[1]) is side
    assert course_lib.current_stream(gpus[1]) is main
    assert torch.zeros(1, device="vgpu").device == gpus[0]


def test_a_stream_of_devices_that_are_gone_is_refused(gpus: Devices):
    side = course_lib.side_stream(gpus[0])
    course_lib.devices(4)
    with pytest.raises(
        RuntimeError, match=r"Make a new one with course_lib.side_stream\('vgpu:0'\)"
    ):
        side.__enter__()


def test_a_stream_of_a_device_that_does_not_exist_is_refused(gpus: Devices):
    with pytest.raises(RuntimeError, match="vgpu:7 does not exist"):
        course_lib.side_stream(torch.device("vgpu:7"))


def test_streams_come_from_a_pool_of_32_as_in_pytorch(gpus: Devices):
    streams = [course_lib.side_stream(gpus[0]) for _ in range(33)]
    assert len(set(streams)) == 32
    assert streams[32] is streams[0]


def test_the_picture_shows_what_a_device_does_at_the_same_time(gpus: Devices):
    x = matrix(gpus[0])
    sender, receiver = course_lib.side_stream(gpus[0]), course_lib.side_stream(gpus[1])
    with course_lib.trace() as recording:
        x @ x
        with sender, receiver:
            x.to(gpus[1])
    ax = recording.plot()
    plt.close(ax.figure)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "vgpu:0 computes",
        "sends",
        "receives",
        "vgpu:1 computes",
        "sends",
        "receives",
    ]


# A missing wait.


def hazards_of(program) -> list:
    with course_lib.trace() as recording:
        program()
    return recording.hazards


def test_a_read_that_does_not_wait_for_the_write_is_reported(gpus: Devices):
    x = matrix(gpus[0])
    side = course_lib.side_stream(gpus[0])
    results = []

    def program():
        y = x @ x
        with side:
            results.append(y + 1)

    (hazard,) = hazards_of(program)
    assert (hazard.first, hazard.first_writes) == (("mm", "vgpu:0 default stream"), True)
    assert (hazard.second, hazard.second_writes) == (("add", "vgpu:0 stream 1"), False)
    assert str(hazard) == (
        "add on vgpu:0 stream 1 reads a float32 tensor of shape (100, 100) that mm on vgpu:0 "
        "default stream writes, and does not wait for it. Missing: a wait_stream of vgpu:0 "
        "stream 1 for vgpu:0 default stream, or a wait for an event recorded after mm. Here the "
        "values are right; on a GPU they need not be."
    )
    assert torch.equal(results[0].cpu(), torch.full((100, 100), 101.0))


def test_a_copy_that_does_not_wait_is_reported_at_either_end(gpus: Devices):
    x, y = matrix(gpus[0]), matrix(gpus[1])
    sender, receiver = course_lib.side_stream(gpus[0]), course_lib.side_stream(gpus[1])

    def unwritten():
        with sender, receiver:
            x.add_(1).to(gpus[1])

    def early_use():
        with sender, receiver:
            arrived = x.to(gpus[1])
        arrived + 1

    def overwritten():
        y * 2
        with sender, receiver:
            y.copy_(x)

    assert hazards_of(unwritten) == []
    assert [hazard.first[0] for hazard in hazards_of(early_use)] == ["copy"]
    (hazard,) = hazards_of(overwritten)
    assert (hazard.first[0], hazard.first_writes, hazard.second_writes) == ("mul", False, True)


def test_two_writes_in_no_order_are_reported(gpus: Devices):
    x = matrix(gpus[0])
    side = course_lib.side_stream(gpus[0])

    def program():
        x.add_(1)
        with side:
            x.zero_()

    (hazard,) = hazards_of(program)
    assert (hazard.first[0], hazard.second[0]) == ("add_", "zero_")
    assert hazard.first_writes and hazard.second_writes


def test_a_view_is_the_same_memory(gpus: Devices):
    x = matrix(gpus[0])
    side = course_lib.side_stream(gpus[0])

    def program():
        x[:10].zero_()
        with side:
            x.t() + 1

    assert len(hazards_of(program)) == 1


def test_two_parts_of_one_tensor_are_two_pieces_of_memory(gpus: Devices):
    x = matrix(gpus[0])
    side = course_lib.side_stream(gpus[0])

    def program(part: torch.Tensor) -> None:
        x[:50].zero_()
        with side:
            part + 1

    assert hazards_of(lambda: program(x[50:])) == []
    assert len(hazards_of(lambda: program(x[49:]))) == 1


def test_reading_a_number_too_early_is_reported(gpus: Devices):
    def program():
        with course_lib.side_stream(gpus[0]):
            total = torch.ones(3, device=gpus[0]).sum()
        total.item()

    (hazard,) = hazards_of(program)
    assert hazard.second[0] == "item"


@pytest.mark.parametrize(
    "wait",
    [
        lambda main, side, other: side.wait_stream(main),
        lambda main, side, other: main.record_event().wait(side),
        lambda main, side, other: side.wait_event(main.record_event()),
        lambda main, side, other: main.synchronize(),
        lambda main, side, other: main.record_event().synchronize(),
        lambda main, side, other: course_lib.synchronize(),
        lambda main, side, other: (other.wait_stream(main), side.wait_stream(other)),
    ],
    ids=["stream", "event", "wait_event", "host", "host and event", "all", "through a third"],
)
def test_nothing_is_reported_after_a_wait_of_any_kind(gpus: Devices, wait):
    x = matrix(gpus[0])
    main = course_lib.current_stream(gpus[0])
    side, other = course_lib.side_stream(gpus[0]), course_lib.side_stream(gpus[0])

    def program():
        y = x @ x
        wait(main, side, other)
        with side:
            y + 1

    assert hazards_of(program) == []


def test_a_wait_for_an_earlier_event_is_not_enough(gpus: Devices):
    x = matrix(gpus[0])
    main, side = course_lib.current_stream(gpus[0]), course_lib.side_stream(gpus[0])

    def program():
        event = main.record_event()
        y = x @ x
        event.wait(side)
        with side:
            y + 1

    assert len(hazards_of(program)) == 1


def test_default_streams_need_no_waits(gpus: Devices):
    course_lib.side_stream(gpus[0])
    x = matrix(gpus[0]).requires_grad_()

    def program():
        y = (x @ x).to(gpus[1]).relu()
        (y @ y).to(gpus[0]).sum().backward()
        x.grad.add_(1)

    assert hazards_of(program) == []


@pytest.mark.parametrize("where", ["vgpu:0", "vgpu:1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x, where: x.new_ones(2, device=where),
        lambda x, where: x.new_zeros(2, device=where),
        lambda x, where: x.new_full((2,), 3.0, device=where),
        lambda x, where: torch.zeros_like(x, device=where),
        lambda x, where: torch.ones_like(x, device=where),
        lambda x, where: torch.full_like(x, 3.0, device=where),
        lambda x, where: torch.randn_like(x, device=where),
    ],
    ids=["new_ones", "new_zeros", "new_full", "zeros_like", "ones_like", "full_like", "randn_like"],
)
def test_a_tensor_that_lends_its_form_alone_is_not_read(gpus: Devices, make, where: str):
    side = course_lib.side_stream(where)

    def program():
        x = matrix(gpus[0])
        with side:
            made = make(x, where)
        x.add_(1)
        with side:
            made.add_(1)

    assert hazards_of(program) == []


def test_a_strict_trace_raises_at_the_first_missing_wait(gpus: Devices):
    x = matrix(gpus[0])
    said = pytest.raises(StreamHazard, match="add on vgpu:0 stream 1 reads")
    with said, course_lib.trace(strict=True):
        y = x @ x
        with course_lib.side_stream(gpus[0]):
            y + 1
    with course_lib.trace() as recording:
        x + 1
    assert recording.hazards == []


def test_a_strict_trace_raises_in_backward_too(gpus: Devices):
    x = matrix(gpus[0]).requires_grad_()
    y = (x @ x).relu()
    course_lib.synchronize()
    with pytest.raises(StreamHazard), course_lib.trace(strict=True):
        gradient = torch.ones(100, 100, device=gpus[0])
        with course_lib.side_stream(gpus[0]):
            y.backward(gradient)


def test_without_a_trace_python_warns(gpus: Devices):
    x = matrix(gpus[0])
    y = x @ x
    with pytest.warns(StreamHazard, match="wait_stream") as said, course_lib.side_stream(gpus[0]):
        y + 1
    assert said[0].filename == __file__
    with warnings.catch_warnings(), course_lib.side_stream(gpus[0]):
        warnings.simplefilter("error", StreamHazard)
        with pytest.raises(StreamHazard):
            y + 1


def test_a_trace_says_how_many_waits_are_missing(gpus: Devices):
    x = matrix(gpus[0])
    with course_lib.trace() as recording:
        y = x @ x
        with course_lib.side_stream(gpus[0]):
            y + 1
    assert "1 missing wait" in repr(recording)


# Side streams that nobody uses change nothing.


def test_a_program_on_default_streams_takes_the_same_time_if_side_streams_exist(vgpus: Devices):
    def run(with_side_stream: bool) -> course_lib.Trace:
        gpus = course_lib.devices(3)
        if with_side_stream:
            course_lib.side_stream(gpus[0])
        x = torch.ones(64, 64, device=gpus[0], requires_grad=True)
        with course_lib.trace() as recording:
            y = (x @ x).relu().to(gpus[1])
            if (y @ y).sum().item() > 0:
                (y @ y).to(gpus[2]).softmax(-1).sum().backward()
            x.grad.cpu()
        return recording

    without, with_one = run(False), run(True)
    assert without.spans == with_one.spans
    assert [list(history) for history in without.memory] == [list(h) for h in with_one.memory]
    assert without.seconds == with_one.seconds


def test_what_is_enqueued_later_goes_first_if_it_is_ready_first(gpus: Devices):
    x, side = matrix(gpus[0]), course_lib.side_stream(gpus[0])
    main = course_lib.current_stream(gpus[0])

    def program():
        for _ in range(3):
            x @ x
        with side:
            x @ x

    side.wait_stream(main)
    first, second, third, late = spans_of(program)
    # It was ready while the first one ran; the second one was ready when that had ended.
    assert (late.start, second.start, third.start) == (first.end, late.end, second.end)


# Copies from and to the host.


def host_waits_for(program) -> bool:
    """Whether the host waits for a copy of 4 MB, which takes 0.8 s."""
    began = course_lib.host_seconds()
    program()
    return course_lib.host_seconds() - began > 0.5


def test_the_host_does_not_wait_for_a_copy_to_or_from_pinned_memory(gpus: Devices):
    plain, pinned = torch.ones(1_000_000), torch.ones(1_000_000).pin_memory()
    there = torch.ones(1_000_000, device=gpus[0])
    course_lib.synchronize()
    assert host_waits_for(lambda: plain.to(gpus[0], non_blocking=True))
    assert host_waits_for(lambda: pinned.to(gpus[0]))
    assert host_waits_for(lambda: there.cpu())
    assert host_waits_for(lambda: plain.copy_(there, non_blocking=True))
    assert not host_waits_for(lambda: pinned.to(gpus[0], non_blocking=True))
    assert not host_waits_for(lambda: pinned.copy_(there, non_blocking=True))
    # As on CUDA, the memory that PyTorch allocates for it is pinned.
    assert not host_waits_for(lambda: there.to("cpu", non_blocking=True))


# What the host does with the memory of a copy on its way.


def reports_of(program) -> list[tuple]:
    return [(each.first, each.second, each.second_writes) for each in hazards_of(program)]


READS = {
    "item": lambda x: x[0, 0].item(),
    "__repr__": repr,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "__add__": lambda x: x + 1,
    "sum": lambda x: x.t().sum(),
    "cat": lambda x: torch.cat([torch.ones(2, 2), x]),
    "pickle": pickle.dumps,
    "save": lambda x: torch.save({"x": x}, io.BytesIO()),
    "to another GPU": lambda x: x.to("vgpu:1"),
    "to another GPU, not waiting": lambda x: x.to("vgpu:1", non_blocking=True),
}


@pytest.mark.parametrize("name", READS)
def test_what_the_host_reads_before_it_arrived_is_reported(gpus: Devices, name: str):
    x = torch.ones(2, 2, device=gpus[0])

    def program() -> None:
        arrived = x.to("cpu", non_blocking=True)
        READS[name](arrived)
        READS[name](arrived)  # said once

    first = ("copy", "vgpu:0 default stream")
    assert [each[:1] + each[2:] for each in reports_of(program)] == [(first, False)]
    assert reports_of(program)[0][1][1] == "the host"
    assert len(torch.overrides._get_current_function_mode_stack()) == 0


@pytest.mark.parametrize("side_stream", [False, True])
def test_what_is_sent_on_before_it_arrived_is_reported(gpus: Devices, side_stream: bool):
    x, page = torch.ones(4, device=gpus[0]), torch.ones(4).pin_memory()
    there = gpus[0] if side_stream else gpus[1]
    stream = course_lib.side_stream(there) if side_stream else course_lib.current_stream(there)

    def program(waits: bool) -> None:
        page.copy_(x, non_blocking=True)
        if waits:
            stream.wait_stream(course_lib.current_stream(gpus[0]))
        with stream:
            page.to(there, non_blocking=True)

    ((first, second, writes),) = reports_of(lambda: program(False))
    assert (first[1], second, writes) == ("vgpu:0 default stream", ("copy", "the host"), False)
    course_lib.synchronize()
    assert reports_of(lambda: program(True)) == []


def test_the_report_says_which_wait_is_missing(gpus: Devices):
    with pytest.warns(StreamHazard) as caught:
        torch.ones(2, 2, device=gpus[0]).to("cpu", non_blocking=True).tolist()
    assert str(caught[0].message) == (
        "tolist on the host reads a float32 tensor of shape (2, 2) that copy on vgpu:0 default "
        "stream writes, and does not wait for it. Missing: a synchronize() of vgpu:0 default "
        "stream, or of an event recorded after copy. Here the values are right; on a GPU they need "
        "not be."
    )
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "write",
    [
        lambda page: page.zero_(),
        lambda page: page.__setitem__(0, 1.0),
        lambda page: page[2:].add_(1),
        lambda page: torch.add(page, 1, out=page),
        lambda page: torch._foreach_add_([torch.ones(4), page], 1),
        lambda page: page.copy_(torch.ones(4, device="vgpu:0"), non_blocking=True),
    ],
    ids=["zero_", "setitem", "view", "out", "foreach", "from another GPU"],
)
def test_what_the_host_overwrites_while_it_is_sent_is_reported(gpus: Devices, write):
    page = torch.ones(4).pin_memory()

    def program() -> None:
        page.to(gpus[1], non_blocking=True)
        write(page)

    ((first, second, writes),) = reports_of(program)
    assert (first[1], second[1], writes) == ("vgpu:1 default stream", "the host", True)


WAITS = {
    "synchronize": lambda gpu: course_lib.synchronize(),
    "stream": lambda gpu: course_lib.current_stream(gpu).synchronize(),
    "event": lambda gpu: course_lib.current_stream(gpu).record_event().synchronize(),
    "query": lambda gpu: wait_by_asking(course_lib.current_stream(gpu).record_event()),
    "item": lambda gpu: torch.ones((), device=gpu).item(),
}


def wait_by_asking(event: course_lib.hardware.Event) -> None:
    while not event.query():
        pass


@pytest.mark.parametrize("how", WAITS)
def test_a_host_that_waits_may_read_and_write(gpus: Devices, how: str):
    x, page = torch.ones(2, 2, device=gpus[0]), torch.ones(4).pin_memory()

    def program() -> None:
        arrived = x.to("cpu", non_blocking=True)
        page.to(gpus[0], non_blocking=True)
        WAITS[how](gpus[0])
        assert arrived.sum().item() == 4
        page.zero_()

    assert reports_of(program) == []


def test_reading_what_is_sent_and_looking_at_a_form_are_no_hazards(gpus: Devices):
    x, page = torch.ones(2, 2, device=gpus[0]), torch.ones(4).pin_memory()

    def program() -> None:
        page.to(gpus[0], non_blocking=True)
        assert page.tolist() == [1, 1, 1, 1]  # both may read
        page.to(gpus[1], non_blocking=True)
        torch._foreach_add([page], 1)
        arrived = x.to("cpu", non_blocking=True)
        assert (arrived.shape, arrived.numel(), len(arrived)) == ((2, 2), 4, 2)
        arrived.view(4)[1:]
        torch.zeros_like(arrived)
        arrived.new_ones(2, device=gpus[1])
        arrived.to(gpus[0], non_blocking=True)  # in the order of its stream
        course_lib.current_stream(gpus[1]).wait_stream(course_lib.current_stream(gpus[0]))
        arrived.to(gpus[1], non_blocking=True)
        x.cpu().sum()

    assert reports_of(program) == []


def test_looking_ends_with_the_wait_and_leaves_the_programs_own_modes_in_place(gpus: Devices):
    stack = torch.overrides._get_current_function_mode_stack
    x = torch.ones(2, device=gpus[0])
    assert len(stack()) == 0
    with torch.device("vgpu:1"):
        before = stack()
        x.to("cpu", non_blocking=True)
        x.to("cpu", non_blocking=True)
        assert len(stack()) == 2 and stack()[-1] is before[-1]
        assert torch.ones(2).device == gpus[1]
        course_lib.synchronize()
        assert stack() == before
    assert len(stack()) == 0
    x.to("cpu", non_blocking=True)
    course_lib.devices(4)  # nothing is on its way on new GPUs
    assert len(stack()) == 0


def test_a_value_printed_without_waiting_for_its_stream_is_reported(gpus: Devices):
    side = course_lib.side_stream(gpus[0])

    def program(waits: bool) -> None:
        with side:
            x = torch.ones(2, device=gpus[0]) * 2
        if waits:
            course_lib.current_stream(gpus[0]).wait_stream(side)
        repr(x)

    ((first, second, _),) = reports_of(lambda: program(False))
    assert (first[1], second) == ("vgpu:0 stream 1", ("repr", "vgpu:0 default stream"))
    assert reports_of(lambda: program(True)) == []


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: torch.vgpu.current_stream().wait_stream(None), "wait_stream takes the stream of"),
        (lambda: torch.vgpu.current_stream().wait_event("x"), "wait_event takes the event of"),
        (lambda: torch.vgpu.stream(3), "takes a stream, as torch.vgpu.Stream.* and not 3"),
    ],
)
def test_what_is_no_stream_and_no_event_is_refused(gpus: Devices, ask, words):
    with pytest.raises(TypeError, match=words):
        ask()
