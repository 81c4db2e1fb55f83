"""Everyday lines of PyTorch, each of which once failed on virtual GPUs with inner words."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import course_lib

pytestmark = pytest.mark.usefixtures("vgpus")


def test_a_tensor_of_losses():
    losses = [torch.tensor(1.5, device="vgpu:1"), torch.tensor(2.5, device="vgpu:2")]
    assert torch.tensor(losses).tolist() == [1.5, 2.5]
    assert str(torch.tensor([losses, losses], device="vgpu:3").device) == "vgpu:3"


def test_a_tensor_of_a_storage():
    x = torch.arange(3.0, device="vgpu:1")
    assert torch.tensor(x.untyped_storage(), dtype=torch.float32).tolist() == [0, 1, 2]


def test_copy_from_a_number():
    x = torch.zeros(2, device="vgpu:1")
    assert x.copy_(3.0) is x and x.tolist() == [3, 3]


def test_one_hot_refuses_a_class_that_is_out_of_range():
    classes = torch.tensor([0, 5], device="vgpu:1")
    assert F.one_hot(classes).shape == (2, 6)
    with pytest.raises(RuntimeError, match="must be smaller than num_classes"):
        F.one_hot(classes, 3)


def test_one_hot_makes_the_host_wait_only_if_it_must_count_the_classes():
    classes = torch.zeros(1_000_000, dtype=torch.long, device="vgpu:0")
    launch = course_lib.CLASSROOM.launch_overhead
    before = course_lib.host_seconds()
    F.one_hot(classes, 7)
    assert course_lib.host_seconds() - before == pytest.approx(launch)
    F.one_hot(classes)
    assert course_lib.host_seconds() - before > 3 * launch


def test_one_hot_without_numbers():
    course_lib.devices(1, backing="meta")
    assert F.one_hot(torch.zeros(2, 3, dtype=torch.long, device="vgpu:0"), 7).shape == (2, 3, 7)


def test_new_stays_with_its_tensor():
    x = torch.ones(2, device="vgpu:2")
    made = [x.new(2), x.new(2, 3), x.new(), x.new(torch.Size([4])), x.new([5.0, 6.0])]
    assert [str(each.device) for each in made] == ["vgpu:2"] * 5
    assert [tuple(each.shape) for each in made] == [(2,), (2, 3), (0,), (4,), (2,)]
    assert made[-1].tolist() == [5, 6]


def test_what_a_virtual_tensor_keeps_hides_no_method():
    x = torch.arange(3.0, device="vgpu:0")
    assert [name for name in vars(x) if hasattr(torch.Tensor, name)] == []
    assert x.inner(x).item() == 5


def test_tensors_move_under_inference_mode():
    with torch.inference_mode():
        x = torch.arange(2.0, device="vgpu:0")
        moved, beside = x.to("vgpu:1"), torch.ones(2, device="vgpu:2").to(x)
    assert str(moved.device) == "vgpu:1" and moved.tolist() == [0, 1]
    assert str(beside.device) == "vgpu:0" and type(beside.held) is torch.Tensor


def test_inference_counts_the_products_of_a_layer():
    layer, x = nn.Linear(64, 32).to("vgpu:1"), torch.ones(8, 64, device="vgpu:1")
    with torch.inference_mode(), course_lib.trace() as trace:
        layer(x)
    assert sum(span.flops for span in trace.spans) == 2 * 8 * 64 * 32


NAMELESS: dict[str, Callable[[], torch.Tensor]] = {
    "to": lambda: torch.ones(2).to("vgpu"),
    "to another dtype": lambda: torch.ones(2).to("vgpu", torch.float64),
    "to by keyword": lambda: torch.ones(2).to(device=torch.device("vgpu")),
    "from a device": lambda: torch.ones(2, device="vgpu:1").to("vgpu"),
    "tensor": lambda: torch.tensor([1.0], device="vgpu"),
    "as_tensor": lambda: torch.as_tensor([1.0], device="vgpu"),
    "zeros": lambda: torch.zeros(2, device="vgpu"),
    "new_tensor": lambda: torch.ones(2).new_tensor([1.0], device="vgpu"),
    "module": lambda: nn.Linear(2, 2).to("vgpu").weight,
    "method": lambda: torch.ones(2).vgpu(),
}


@pytest.mark.parametrize("make", NAMELESS.values(), ids=NAMELESS)
def test_a_device_without_an_index_is_the_current_one(make: Callable[[], torch.Tensor]):
    with torch.vgpu.device(2):
        assert str(make().device) == "vgpu:2"


@pytest.mark.parametrize(
    "make",
    [
        torch.ones,
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        lambda _: torch.get_default_device(),
    ],
    ids=["ones", "tensor", "as_tensor", "asarray", "get_default_device"],
)
def test_a_default_device_without_an_index_is_the_current_one(make: Callable):
    def where() -> torch.device:
        made = make((1, 2))
        return made if isinstance(made, torch.device) else made.device

    with torch.device("vgpu"):
        for index in (2, 3):
            with torch.vgpu.device(index):
                assert str(where()) == f"vgpu:{index}"
    torch.set_default_device("vgpu")
    try:
        with torch.vgpu.device(1):
            assert str(where()) == "vgpu:1"
    finally:
        torch.set_default_device(None)
    with torch.device("vgpu:1"), torch.vgpu.device(2):
        assert str(where()) == "vgpu:1"


@pytest.mark.parametrize(
    "export", [torch.from_dlpack, np.from_dlpack, lambda x: torch.utils.dlpack.to_dlpack(x)]
)
def test_dlpack_is_refused_in_one_line(export: Callable):
    with pytest.raises(BufferError, match=r"on vgpu:1 cannot be exported.*Use x\.cpu") as caught:
        export(torch.ones(2, device="vgpu:1"))
    assert "\n" not in str(caught.value)
    assert torch.from_dlpack(torch.ones(2)).tolist() == [1, 1]


def test_histc_of_whole_numbers():
    x = torch.tensor([1, 2, 2], device="vgpu:1")
    assert torch.histc(x, bins=3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("grad", [True, False])
def test_a_transformer_in_evaluation_takes_a_padding_mask(grad: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
    with torch.set_grad_enabled(grad):
        expected = model(x, src_key_padding_mask=padding)
        on_gpu = copy.deepcopy(model).to("vgpu:1")
        out = on_gpu(x.to("vgpu:1"), src_key_padding_mask=padding.to("vgpu:1")).cpu()
    assert torch.allclose(out[~padding], expected[~padding], atol=1e-6)


RAGGED = {"layout": torch.jagged}
ON_GPU = {"device": "vgpu:0"}
NO_DENSE_TENSORS: dict[str, Callable[[], object]] = {
    "list": lambda: torch.nested.nested_tensor(_rows(), **ON_GPU),
    "jagged list": lambda: torch.nested.nested_tensor(_rows(), **RAGGED, **ON_GPU),
    "list of device tensors": lambda: torch.nested.as_nested_tensor(_rows(**ON_GPU)),
    "moved": lambda: torch.nested.nested_tensor(_rows()).to("vgpu:0"),
    "jagged, moved": lambda: torch.nested.nested_tensor(_rows(), **RAGGED).to("vgpu:0"),
    "offsets": lambda: torch.nested.nested_tensor_from_jagged(
        torch.ones(5, **ON_GPU), torch.tensor([0, 2, 5], **ON_GPU)
    ),
    "quantized": lambda: torch._empty_affine_quantized(
        [2], scale=1.0, zero_point=0, dtype=torch.qint8, **ON_GPU
    ),
    "sparse": lambda: torch.ones(2).to_sparse().to("vgpu:0"),
}


def _rows(device: str = "cpu") -> list[torch.Tensor]:
    return [torch.ones(2, device=device), torch.ones(3, device=device)]


@pytest.mark.parametrize("make", NO_DENSE_TENSORS.values(), ids=NO_DENSE_TENSORS)
def test_what_is_not_dense_is_refused_in_one_line(make: Callable[[], object]):
    with pytest.raises(
        NotImplementedError, match=r"^virtual GPUs hold dense tensors only, not .*$"
    ):
        make()


def test_nested_tensors_of_the_cpu_stay_what_they_were():
    for layout in ({}, RAGGED):
        nested = torch.nested.nested_tensor(_rows(), **layout) * 2
        assert [row.tolist() for row in nested.unbind()] == [[2, 2], [2, 2, 2]]


def test_pytorchs_profiler_of_a_device_is_refused_in_one_line():
    with pytest.raises(RuntimeError, match=r"use course_lib\.trace\(\) for those"):
        torch.autograd.profiler.profile(use_device="vgpu")
    with torch.autograd.profiler.profile() as profile:
        torch.ones(2, **ON_GPU) + 1
    assert "aten::add" in {event.key for event in profile.key_averages()}


def test_pytorchs_profiler_measures_the_cpu_if_it_is_not_told_what():
    with torch.profiler.profile() as profile:
        torch.ones(2, **ON_GPU) + 1
    assert "aten::add" in {event.key for event in profile.key_averages()}


def test_a_copy_has_what_the_program_set_on_its_tensor():
    tensor = torch.ones(2, **ON_GPU)
    tensor.names_of_rows = ["a", "b"]
    parameter = nn.Parameter(torch.ones(2, **ON_GPU))
    parameter.is_shared = True
    for copied in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert copied.names_of_rows == ["a", "b"]
        assert copied.names_of_rows is not tensor.names_of_rows
        assert (copied.device, copied.tolist()) == (tensor.device, [1, 1])
    assert pickle.loads(pickle.dumps(parameter)).is_shared
    on_cpu = nn.Parameter(torch.ones(2))
    on_cpu.is_shared = True  # which PyTorch leaves out when it copies a parameter deeply
    assert hasattr(copy.deepcopy(parameter), "is_shared") == hasattr(
        copy.deepcopy(on_cpu), "is_shared"
    )


@pytest.mark.parametrize("home", ["cpu", "vgpu:0"])
@pytest.mark.parametrize("target", ["cpu", "vgpu:1"])
def test_what_the_program_set_is_saved_and_loaded_to_any_device(home: str, target: str):
    tensor = torch.ones(2, device=home)
    tensor.names_of_rows = ["a", "b"]
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    assert (loaded.names_of_rows, loaded.device) == (["a", "b"], torch.device(target))


def test_nested_tensors_are_refused_in_one_line():
    with pytest.raises(NotImplementedError, match="dense tensors only, not nested") as caught:
        torch.nested.nested_tensor([torch.ones(2, device="vgpu:1")])
    assert "\n" not in str(caught.value)


# Generators of one's own.


def test_a_generator_of_a_device_draws_what_its_seed_gives():
    generator = torch.Generator(device="vgpu:1").manual_seed(3)
    on_host = torch.Generator().manual_seed(3)
    assert generator.device == torch.device("vgpu:1") and isinstance(generator, torch.Generator)
    for _ in range(2):
        drawn = torch.rand(3, device="vgpu:1", generator=generator)
        assert torch.equal(drawn.cpu(), torch.rand(3, generator=on_host))
    x = torch.empty(4, device="vgpu:1").normal_(generator=generator)
    assert torch.equal(x.cpu(), torch.empty(4).normal_(generator=on_host))


def test_a_generator_of_ones_own_leaves_the_devices_alone():
    torch.manual_seed(0)
    expected = torch.rand(3, device="vgpu:1").tolist()
    torch.manual_seed(0)
    torch.rand(3, device="vgpu:1", generator=torch.Generator("vgpu:1"))
    assert torch.rand(3, device="vgpu:1").tolist() == expected


def test_generators_of_the_host_stay_what_they_were():
    assert isinstance(torch.default_generator, torch.Generator)
    assert torch.Generator().device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="Expected a 'vgpu' device type for generator"):
        torch.rand(2, device="vgpu:1", generator=torch.Generator())


def test_torchscript_knows_the_functions_that_make_tensors():
    """As it does without virtual GPUs; ``torch.distributed.optim`` is compiled where imported."""
    source = "def numbers(x: float):\n    return torch.tensor([x, 2.0]), torch.as_tensor(3.0)\n"
    compiled = torch.jit.CompilationUnit(source).numbers
    assert [each.tolist() for each in compiled(1.0)] == [[1.0, 2.0], 3.0]
    assert import_module("torch.distributed.optim").ZeroRedundancyOptimizer
