"""``torch.vgpu`` and ``torch.nn.parallel`` have what users of ``torch.cuda`` type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import course_lib

pytestmark = pytest.mark.usefixtures("vgpus")


def work(device: str = "vgpu:1") -> torch.Tensor:
    x = torch.ones(100, 100, device=device)
    return x @ x


def test_a_stream_is_made_entered_and_waited_for():
    stream = torch.vgpu.Stream("vgpu:1")
    assert isinstance(stream, torch.vgpu.Stream)
    assert isinstance(torch.vgpu.current_stream(), torch.vgpu.Stream)
    with torch.vgpu.stream(stream):
        assert torch.vgpu.current_stream() is stream
        assert torch.vgpu.current_device() == 1
        work()
    torch.vgpu.current_stream(1).wait_stream(stream)
    stream.synchronize()
    assert stream.query()
    with torch.vgpu.stream(None):
        assert torch.vgpu.current_device() == 0


def test_an_event_is_recorded_on_the_stream_that_is_current():
    stream = torch.vgpu.Stream("vgpu:1", priority=-1)
    event = torch.vgpu.Event()
    with torch.vgpu.stream(stream):
        work()
        event.record()
    assert not event.query()
    event.synchronize()
    assert event.query() and stream.query()


def test_a_stream_records_an_event_that_it_is_given():
    event = torch.vgpu.Event()
    stream = torch.vgpu.default_stream("vgpu:1")
    work()
    assert stream.record_event(event) is event
    assert not event.query()
    other = torch.vgpu.Stream("vgpu:1")
    other.wait_event(event)
    other.synchronize()
    assert event.query()


@pytest.mark.parametrize("named", [["vgpu:1"], [1], []])
def test_the_classes_of_pytorch_make_streams_and_events_of_the_device_named(named: list):
    with torch.vgpu.device(1 if not named else 0):  # the current one, where none is named
        stream, event = torch.Stream(*named), torch.Event(*named)
    assert isinstance(stream, torch.Stream) and isinstance(stream, torch.vgpu.Stream)
    assert isinstance(event, torch.Event)
    assert stream.device == torch.device("vgpu:1")
    with stream:
        work()
        event.record(stream)
    assert not event.query()
    assert torch.vgpu.default_stream(1).query()  # nothing is there
    event.synchronize()
    assert stream.query()


def test_an_event_of_a_device_is_recorded_on_the_current_stream_of_that_device():
    event = torch.Event(device="vgpu:1")
    work("vgpu:1")
    event.record()
    work("vgpu:0")
    event.synchronize()
    assert torch.vgpu.current_stream(1).query()
    assert not torch.vgpu.current_stream(0).query()


def test_events_measure_time_if_they_are_made_for_it():
    start, end = (torch.vgpu.Event(enable_timing=True) for _ in range(2))
    with torch.vgpu.device(1):
        start.record()
        work()
        end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0
    with pytest.raises(ValueError, match="enable_timing=True"):
        torch.vgpu.Event().elapsed_time(end)


def test_memory_is_told_under_the_names_of_cuda():
    device = torch.device("vgpu:1")
    x = torch.ones(250, device=device)
    capacity = course_lib.memory_capacity(device)
    assert torch.vgpu.memory_stats(1)["allocated_bytes.all.current"] == x.nbytes
    assert torch.vgpu.get_device_properties(device).total_memory == capacity
    assert torch.vgpu.get_device_properties(device).name == torch.vgpu.get_device_name(device)
    assert "1.00 kB" in torch.vgpu.memory_summary(device)
    with pytest.raises(torch.vgpu.OutOfMemoryError):
        torch.empty(int(capacity), device=device)


def test_random_states_of_all_devices_are_kept_and_put_back():
    states = torch.vgpu.get_rng_state_all()
    numbers = [torch.rand(3, device=f"vgpu:{index}").tolist() for index in range(4)]
    torch.vgpu.set_rng_state_all(states)
    assert [torch.rand(3, device=f"vgpu:{index}").tolist() for index in range(4)] == numbers
    torch.vgpu.manual_seed_all(7)
    assert torch.vgpu.initial_seed() == 7
    torch.vgpu.seed_all()
    assert torch.equal(torch.vgpu.get_rng_state(0), torch.vgpu.get_rng_state(3))


def test_small_questions_are_answered():
    assert torch.vgpu.is_bf16_supported()
    assert torch.vgpu.can_device_access_peer(0, 1)
    with torch.vgpu.device_of(torch.ones(1, device="vgpu:2")):
        assert torch.vgpu.current_device() == 2
    with torch.vgpu.device_of(torch.ones(1)):
        assert torch.vgpu.current_device() == 0


@pytest.mark.parametrize("home", ["cpu", "vgpu:0"])
def test_data_parallel_computes_the_gradients_of_the_model_alone(home: str):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()), torch.randn(8, 3)
    model(x).square().sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    model.to("vgpu:0")
    out = nn.DataParallel(model, device_ids=[0, 1, 3])(x.to(home))
    assert out.device == torch.device("vgpu:0")
    assert course_lib.peak_memory(torch.device("vgpu:3")) > 0
    out.square().sum().backward()
    assert torch.allclose(model[0].weight.grad.cpu(), expected, atol=1e-5)


def test_data_parallel_leaves_a_model_on_the_cpu_there():
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    assert torch.equal(nn.DataParallel(model)(x), model(x))


def test_the_functions_of_nn_parallel():
    x = torch.arange(6.0, device="vgpu:0").view(3, 2)
    parts = nn.parallel.scatter(x, [1, 2])
    assert [str(part.device) for part in parts] == ["vgpu:1", "vgpu:2"]
    assert torch.equal(nn.parallel.gather(parts, 0), x)
    replicas = nn.parallel.replicate(nn.Linear(2, 2).to("vgpu:1"), [1, 2])
    outs = nn.parallel.parallel_apply(replicas, parts)
    assert [str(out.device) for out in outs] == ["vgpu:1", "vgpu:2"]
    whole = nn.parallel.data_parallel(nn.Linear(2, 2).to("vgpu:0"), x, [0, 1])
    assert whole.shape == (3, 2)


def test_a_process_group_without_a_backend_is_that_of_the_cpu(tmp_path):
    torch.distributed.init_process_group(
        init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        x = torch.ones(2)
        torch.distributed.all_reduce(x)
        assert x.tolist() == [1, 1]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["vgpu:1", 0])
def test_a_process_group_on_a_virtual_gpu_says_that_ranks_have_one(tmp_path, device):
    device_id = torch.device(device) if isinstance(device, str) else device
    meeting = {"init_method": f"file://{tmp_path / 'meeting'}", "rank": 0, "world_size": 1}
    with pytest.raises(RuntimeError, match=r"=vgpu:\d is .*: leave .* or run ranks") as error:
        torch.distributed.init_process_group(**meeting, device_id=device_id)
    assert "\n" not in str(error.value) and not torch.distributed.is_initialized()


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_worker_that_returns_tensors_of_a_device_gets_one_clear_line(batch_size: int | None):
    data = [torch.ones(2, device="vgpu:0") for _ in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, num_workers=1)
    with pytest.raises(RuntimeError, match=r"move each batch with .to\(device\)"):
        list(loader)
