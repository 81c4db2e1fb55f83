"""Storages of virtual GPUs: sizes and addresses that are true, memory freed and taken, files."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import course_lib
from course_lib.models import MLP

pytestmark = pytest.mark.usefixtures("vgpus")


# What a storage says of itself.


def test_views_share_a_storage_and_differ_by_their_offset():
    x = torch.arange(6.0, device="vgpu:1")
    view = x[2:]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() == x.data_ptr()
    assert view.data_ptr() == x.data_ptr() + 2 * 4
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert x.untyped_storage().nbytes() == x.untyped_storage().size() == 24
    assert x.untyped_storage().device == torch.device("vgpu:1")


@pytest.mark.parametrize("backing", ["cpu", "meta"])
def test_every_parameter_has_an_address_of_its_own(backing: str):
    course_lib.devices(2, backing=backing)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)]).to("vgpu:1")
    model[3].weight = model[5].weight
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == 23
    assert len({p.untyped_storage().data_ptr() for p in model.state_dict().values()}) == 23


def test_a_storage_is_of_pytorchs_class_and_reads_as_on_the_cpu():
    values = torch.tensor([1, 2, 300])
    storage = values.to("vgpu:2").untyped_storage()
    assert torch.is_storage(storage) and isinstance(storage, torch.UntypedStorage)
    assert storage.tolist() == values.untyped_storage().tolist()
    assert storage[0] == 1
    typed = values.to("vgpu:2")._typed_storage()
    assert typed._size() == 3 and typed.dtype == torch.int64


def test_a_storage_keeps_its_memory_in_use_and_costs_none():
    x = torch.ones(1000, device="vgpu:0")
    storage = x.untyped_storage()
    del x
    assert course_lib.memory_in_use("vgpu:0") == 4000
    del storage
    assert course_lib.memory_in_use("vgpu:0") == 0


def test_copies_of_a_storage_have_bytes_of_their_own():
    x = torch.ones(3, device="vgpu:0")
    twin = copy.deepcopy(x.untyped_storage())
    x.zero_()
    assert torch.empty(0, device="vgpu:0").set_(twin).tolist() == [1, 1, 1]
    assert torch.empty(0).set_(twin.cpu()).tolist() == [1, 1, 1]
    moved = twin.to(device="vgpu:1")
    assert torch.empty(0, device="vgpu:1").set_(moved).tolist() == [1, 1, 1]


def test_storages_are_made_on_a_device():
    assert torch.UntypedStorage(8, device="vgpu:1").nbytes() == 8
    storage = torch.UntypedStorage([1, 2, 3], device="vgpu:1")
    assert storage.device == torch.device("vgpu:1") and storage[1:].tolist() == [2, 3]
    typed = torch.TypedStorage([1, 2], dtype=torch.int64, device="vgpu:1")
    assert typed._untyped_storage.nbytes() == 16
    assert torch.UntypedStorage(4).nbytes() == torch.UntypedStorage(4, device="meta").nbytes() == 4


# Memory that is freed and taken below the tensors, as FSDP2 does.


def test_resizing_a_storage_to_nothing_and_back_frees_and_takes_memory(vgpus):
    x = torch.ones(1000, device=vgpus[0])
    view = x[10:20]
    storage = x.untyped_storage()
    storage.resize_(0)
    assert course_lib.memory_in_use(vgpus[0]) == 0 and storage.size() == 0
    assert view.untyped_storage().size() == 0  # the views' memory is the same
    course_lib.reset_peak_memory(vgpus[0])
    storage.resize_(4000)
    x.fill_(2.0)
    assert view.tolist() == [2.0] * 10
    assert course_lib.memory_in_use(vgpus[0]) == course_lib.peak_memory(vgpus[0]) == 4000
    del x, view, storage
    assert course_lib.memory_in_use(vgpus[0]) == 0


def test_a_storage_that_does_not_fit_is_refused_and_stays_as_it_was(vgpus):
    capacity = course_lib.memory_capacity(vgpus[0])
    x = torch.ones(1000, device=vgpus[0])
    with pytest.raises(torch.OutOfMemoryError, match="vgpu:0 out of memory"):
        x.untyped_storage().resize_(capacity + 1)
    with pytest.raises(torch.OutOfMemoryError, match="vgpu:0 out of memory"):
        x.resize_(capacity)
    assert x.shape == (1000,) and x.sum().item() == 1000
    assert course_lib.memory_in_use(vgpus[0]) == 4000


# Tensors that take another form.


def test_resize_keeps_the_first_numbers_and_counts_the_memory(vgpus):
    x = torch.arange(4.0, device=vgpus[0])
    assert x.resize_(2, 3).shape == (2, 3)
    assert x.flatten()[:4].tolist() == [0, 1, 2, 3]
    assert course_lib.memory_in_use(vgpus[0]) == 24
    assert x.resize_(2).tolist() == [0, 1]  # what shrinks keeps its memory, as on CUDA
    assert course_lib.memory_in_use(vgpus[0]) == 24


def test_resize_as_takes_the_shape_of_the_other():
    x = torch.empty(0, device="vgpu:0").resize_as_(torch.ones(2, 5, device="vgpu:0"))
    assert x.shape == (2, 5) and x.add_(1).shape == (2, 5)


@pytest.mark.parametrize("inference", [False, True])
def test_out_takes_the_shape_of_the_result(vgpus, inference: bool):
    with torch.inference_mode(inference):
        x = torch.arange(6.0, device=vgpus[0]).view(2, 3)
        out = torch.empty(0, device=vgpus[0])
        assert torch.add(x, 1, out=out) is out
        assert out.shape == (2, 3) and out.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert course_lib.memory_in_use(vgpus[0]) == 48


def test_set_makes_a_view_of_another_tensors_memory(vgpus):
    x = torch.arange(6.0, device=vgpus[0])
    y = torch.zeros(100, device=vgpus[0])
    y.set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    assert y.tolist() == [[2, 3], [4, 5]]
    y.mul_(10)
    assert x.tolist() == [0, 1, 20, 30, 40, 50]
    assert course_lib.memory_in_use(vgpus[0]) == 24
    assert y.set_(x).shape == (6,) and y.is_set_to(x)
    assert y.set_().shape == (0,)


def test_set_to_another_devices_memory_is_refused_in_pytorchs_words():
    x, y = torch.ones(2, device="vgpu:0"), torch.ones(2, device="vgpu:1")
    with pytest.raises(RuntimeError, match="the devices must match"):
        x.set_(y)
    with pytest.raises(RuntimeError, match="the devices must match"):
        x.set_(torch.ones(2).untyped_storage())
    with pytest.raises(RuntimeError, match="the devices must match"):
        torch.ones(2).set_(x.untyped_storage())


# ``.data =`` across devices: the idiom of ZeRO and of offloading.


@pytest.mark.parametrize("way", [("cpu", "vgpu:1"), ("vgpu:1", "cpu"), ("vgpu:0", "vgpu:1")])
def test_data_moves_a_parameter_that_stays_itself(way: tuple[str, str]):
    start, end = way
    layer = nn.Linear(2, 1, bias=False).to(start)
    weight = layer.weight
    weight.note = "kept"
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with torch.no_grad():
        weight.fill_(1.0)
    weight.data = weight.data.to(end)
    assert weight is layer.weight and isinstance(weight, nn.Parameter) and weight.note == "kept"
    assert str(weight.device) == end and weight.requires_grad
    layer(torch.ones(3, 2, device=end)).sum().backward()
    optimizer.step()
    assert layer.weight.tolist() == [[-2.0, -2.0]]


def test_data_after_a_forward_leaves_the_memory_of_the_old_device(vgpus):
    layer = nn.Linear(100, 100).to(vgpus[0])
    y = layer(torch.ones(1, 100, device=vgpus[0]))
    del y
    for parameter in layer.parameters():
        parameter.data = parameter.data.cpu()
    gc.collect()
    assert course_lib.memory_in_use(vgpus[0]) == 0
    layer(torch.ones(1, 100)).sum().backward()
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(vgpus[1])
        assert parameter.grad.device == vgpus[1]  # the gradient moves with its tensor


def test_hooks_of_a_parameter_stay_when_it_moves():
    parameter, seen = nn.Parameter(torch.ones(2)), []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(str(p.device)))
    parameter.data = parameter.data.to("vgpu:1")
    parameter.sum().backward()
    assert seen == ["vgpu:1"]


def test_data_of_a_result_on_another_device_is_refused_in_one_line():
    y = torch.ones(2, device="vgpu:1", requires_grad=True) * 2
    with pytest.raises(RuntimeError, match=r"cannot set \.data of a result") as caught:
        y.data = torch.ones(2)
    assert "\n" not in str(caught.value)


# Files and copies.


def _saved(what: Any, old_format: bool) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file, _use_new_zipfile_serialization=not old_format)
    file.seek(0)
    return file


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("saved_on", ["cpu", "vgpu:1"])
@pytest.mark.parametrize(
    ("map_location", "arrives_on"),
    [
        ("vgpu:0", "vgpu:0"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ({"vgpu:1": "vgpu:2", "cpu": "vgpu:2"}, "vgpu:2"),
        (lambda storage, location: storage, "cpu"),
        (lambda storage, location: storage.vgpu(3), "vgpu:3"),
        (None, None),
    ],
    ids=["vgpu", "cpu", "device", "dictionary", "as it is", "function", "none"],
)
def test_a_checkpoint_arrives_where_it_is_told(
    old_format: bool, saved_on: str, map_location: Any, arrives_on: str | None
):
    state = MLP(8, 8, 4).to(saved_on).state_dict()
    loaded = torch.load(_saved(state, old_format), map_location=map_location)
    for name, tensor in state.items():
        assert str(loaded[name].device) == (arrives_on or saved_on)
        assert torch.equal(loaded[name].cpu(), tensor.cpu())


def test_views_are_views_again_after_saving_and_copying():
    x = torch.zeros(4, device="vgpu:1")
    for a, b in (
        torch.load(_saved([x, x[1:3]], False)),
        copy.deepcopy([x, x[1:3]]),
    ):
        b += 1
        assert a.tolist() == [0, 1, 1, 0]
    assert x.sum().item() == 0


def test_pickle_keeps_device_and_numbers():
    x = torch.arange(3.0, device="vgpu:1", requires_grad=True)
    again = pickle.loads(pickle.dumps(x))
    assert again.device == x.device and again.requires_grad and again.tolist() == [0, 1, 2]


def test_a_copy_that_is_not_deep_shares_the_numbers():
    x = torch.zeros(2, device="vgpu:1")
    twin = copy.copy(x)
    x += 1
    assert twin.tolist() == [1, 1] and twin is not x
    assert isinstance(copy.copy(nn.Parameter(x)), nn.Parameter)


def test_a_model_saved_whole_has_parameters_again():
    model = nn.Linear(3, 2).to("vgpu:1")
    again = torch.load(_saved(model, False), weights_only=False)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in again.parameters())
    assert torch.equal(again.weight, model.weight)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(nn.Linear(2, 2).to("vgpu:1").state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def _in_a_new_process(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def test_a_process_without_the_course_loads_a_checkpoint_to_the_cpu(checkpoint: Path):
    code, error = _in_a_new_process(f"import torch; torch.load({str(checkpoint)!r}, 'cpu')")
    assert code == 0, error
    code, error = _in_a_new_process(f"import torch; torch.load({str(checkpoint)!r})")
    assert code != 0 and "map_location" in error


def test_loading_before_there_are_gpus_says_what_to_call(checkpoint: Path):
    code, error = _in_a_new_process(f"import torch, course_lib; torch.load({str(checkpoint)!r})")
    assert code != 0 and "call course_lib.devices(4) first" in error
