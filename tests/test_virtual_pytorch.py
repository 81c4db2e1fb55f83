"""What PyTorch's own machinery asks of a device, virtual GPUs answer.

Mixed precision, pinned memory, data loaders, function transforms, ``torch.accelerator``, threads,
lazy modules and the compiler. Where the CPU can do the same, the results are its, bit for bit.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, TensorDataset

import course_lib
from course_lib.models import MLP

Devices = list[torch.device]
pytestmark = pytest.mark.usefixtures("vgpus")


def assert_same(program: Callable[[str], Any], device: str = "vgpu:1") -> None:
    """``program(device)`` returns the tensors that ``program("cpu")`` does, on that device."""
    torch.manual_seed(0)
    expected = tree_leaves(program("cpu"))
    torch.manual_seed(0)
    actual = tree_leaves(program(device))
    assert len(expected) == len(actual)
    for one, other in zip(actual, expected, strict=True):
        assert one.device == torch.device(device)
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one.detach().cpu(), other.detach())


# Mixed precision.


def test_autocast_multiplies_what_was_rounded_to_its_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = nn.Linear(8, 4), torch.randn(3, 8)
        expected = F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
        layer.to("vgpu:1")
        with torch.autocast("vgpu", dtype=dtype):
            y = layer(x.to("vgpu:1"))
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), expected)


def test_autocast_is_float16_as_on_cuda_if_not_told_and_can_be_switched_off_inside():
    x = torch.ones(2, 2, device="vgpu:1")
    with torch.autocast("vgpu"):
        assert torch.is_autocast_enabled("vgpu")
        assert (x @ x).dtype == torch.float16
        with torch.autocast("vgpu", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_autocast_reaches_functions_that_say_how_they_are_cast():
    seen = []

    class Scale(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="vgpu", cast_inputs=torch.float32)
        def forward(ctx, x):
            seen.append((x.dtype, torch.is_autocast_enabled("vgpu")))
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="vgpu")
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(2, device="vgpu:1", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("vgpu"):
        Scale.apply(x).sum().backward()
    assert seen == [(torch.float32, False)]
    assert x.grad.tolist() == [2, 2]


def scaled_training(device: str, spoil: int | None = None) -> list[Tensor]:
    """Three steps of SGD with a loss scale of 1024; the gradient of step ``spoil`` is infinite."""
    model = MLP(4, 8, 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(3):
        x = torch.randn(6, 4).to(device)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        if step == spoil:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == ([1024, 2048, 2048] if spoil is None else [1024, 512, 512])
    return list(model.parameters())


@pytest.mark.parametrize("spoil", [None, 1])
def test_a_grad_scaler_trains_as_on_the_cpu_and_skips_steps_with_infinite_gradients(spoil):
    assert_same(lambda device: scaled_training(device, spoil))


def test_a_grad_scaler_serves_a_model_split_over_devices(vgpus: Devices):
    first, second = nn.Linear(3, 3).to(vgpus[0]), nn.Linear(3, 1).to(vgpus[1])
    parameters = [*first.parameters(), *second.parameters()]
    before = [parameter.detach().cpu() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("vgpu", init_scale=1024.0)
    scaler.scale(second(first(torch.ones(2, 3, device=vgpus[0])).to(vgpus[1])).sum()).backward()
    second.weight.grad[0, 0] = float("nan")  # what is found on one device stops the step on all
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    for one, other in zip(parameters, before, strict=True):
        assert torch.equal(one.cpu(), other)


def test_a_grad_scaler_is_saved_and_loaded():
    scaler = torch.amp.GradScaler("vgpu", init_scale=8.0)
    scaler.scale(torch.ones(1, device="vgpu:1"))
    other = torch.amp.GradScaler("vgpu")
    other.load_state_dict(scaler.state_dict())
    assert other.scale(torch.ones(1, device="vgpu:1")).item() == 8.0


# Pinned memory and data loaders.


def test_pinned_memory_is_known_by_the_tensor_and_its_views():
    x = torch.arange(6.0)
    pinned = x.pin_memory()
    assert not x.is_pinned()
    assert pinned.is_pinned() and pinned[2:].is_pinned() and pinned.view(2, 3).is_pinned()
    assert pinned.pin_memory() is pinned
    assert not pinned.clone().is_pinned()
    assert torch.equal(pinned, x)


def test_pinned_memory_goes_to_a_device_and_comes_back_without_blocking():
    x = torch.arange(4.0).pin_memory()
    there = x.to("vgpu:1", non_blocking=True)
    host = torch.zeros(4).pin_memory()
    host.copy_(there * 2, non_blocking=True)
    course_lib.synchronize()
    assert host.tolist() == [0, 2, 4, 6]


class Squares(Dataset):
    """Ten numbers and their squares, by name; a class that a worker can import."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index)]), "label": index * index, "name": str(index)}


@pytest.mark.parametrize("workers", [None, "fork", "spawn"])
def test_a_data_loader_pins_batches_that_move_to_a_device(workers: str | None):
    options = {"num_workers": 1, "multiprocessing_context": workers} if workers else {}
    batches = list(DataLoader(Squares(), batch_size=4, pin_memory=True, **options))
    assert [len(batch["name"]) for batch in batches] == [4, 4, 2]
    assert all(batch["x"].is_pinned() and batch["label"].is_pinned() for batch in batches)
    there = [batch["label"].to("vgpu:1", non_blocking=True) for batch in batches]
    assert torch.cat(there).tolist() == [n * n for n in range(10)]


def test_a_data_loader_shuffles_alike_whatever_the_device(vgpus: Devices):
    def order(device: torch.device | str) -> list[float]:
        torch.manual_seed(5)
        torch.rand(3, device=device) if device != "cpu" else None
        loader = DataLoader(TensorDataset(torch.arange(20.0)), batch_size=5, shuffle=True)
        return [value for (batch,) in loader for value in batch.to(device).tolist()]

    assert order(vgpus[1]) == order("cpu")


# Saving and loading.


@pytest.mark.parametrize(
    "where",
    ["vgpu:2", {"cpu": "vgpu:2"}, lambda storage, location: storage],
    ids=["text", "dict", "function"],
)
def test_what_the_cpu_saved_is_loaded_to_a_device_and_back(where: Any):
    file = io.BytesIO()
    model = MLP(4, 8, 2)
    torch.save({"model": model.state_dict(), "step": 3}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=where, weights_only=True)
    expected = torch.device("cpu" if callable(where) else "vgpu:2")
    assert {tensor.device for tensor in loaded["model"].values()} == {expected}
    assert loaded["step"] == 3
    assert all(tensor.is_leaf for tensor in loaded["model"].values())
    other = MLP(4, 8, 2).to("vgpu:1")
    other.load_state_dict(loaded["model"])
    for one, parameter in zip(other.parameters(), model.parameters(), strict=True):
        assert one.device == torch.device("vgpu:1")
        assert torch.equal(one.cpu(), parameter)


def test_tensors_that_share_memory_share_it_when_loaded(vgpus: Devices):
    file = io.BytesIO()
    x = torch.arange(6.0)
    torch.save({"all": x, "part": x[2:4], "turned": x.view(2, 3).t()}, file)
    file.seek(0)
    before = course_lib.memory_in_use(vgpus[2])
    loaded = torch.load(file, map_location="vgpu:2")
    assert course_lib.memory_in_use(vgpus[2]) - before == 24
    loaded["part"].zero_()
    assert loaded["all"].tolist() == [0, 1, 0, 0, 4, 5]
    assert loaded["turned"].tolist() == [[0, 0], [1, 4], [0, 5]]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_load_a_state_dict_on_every_device(kind: type[nn.Module]):
    source = kind(3, 4)
    for device in ("cpu", "vgpu:1"):
        model = kind(3, 4).to(device)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model.weight_hh_l0.cpu(), source.weight_hh_l0)


# Recurrent networks and lazy modules.


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_drop_out_between_their_layers_and_take_packed_sequences(kind):
    def program(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = kind(3, 4, num_layers=2, dropout=0.5, bidirectional=True).to(device)
        x = torch.randn(5, 2, 3).to(device)
        torch.manual_seed(1)
        out, _ = model(x)
        packed, _ = model.eval()(nn.utils.rnn.pack_padded_sequence(x, [5, 3]))
        out.square().sum().backward()
        return [out, packed.data, *(parameter.grad for parameter in model.parameters())]

    for one, other in zip(program("vgpu:1"), program("cpu"), strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-6)


def test_lazy_modules_move_before_they_know_their_shape():
    def program(device: str) -> list[Tensor]:
        model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
        weight = model[0].weight
        assert model.to(device)[0].weight is weight
        torch.manual_seed(1)
        out = model(torch.linspace(0, 1, 8).view(2, 4).to(device))
        out.square().sum().backward()
        return [out, *model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]

    assert_same(program)


def test_lazy_modules_on_the_cpu_still_change_dtype():
    layer = nn.LazyLinear(3).to(torch.float64)
    assert layer(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_modules_move_and_run_in_inference_mode(vgpus: Devices):
    with torch.inference_mode():
        for layer in (nn.LSTM(3, 3), nn.TransformerEncoderLayer(3, 1, 4).eval()):
            out = layer.to(vgpus[1])(torch.ones(2, 2, 3, device=vgpus[1]))
            expected = layer.to("cpu")(torch.ones(2, 2, 3))
            for one, other in zip(tree_leaves(out), tree_leaves(expected), strict=True):
                assert one.device == vgpus[1]
                assert torch.allclose(one.cpu(), other, atol=1e-6)


# torch.func.

MODEL = MLP(4, 5, 3)


def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(MODEL, parameters, (x,)), y)


def parameters_on(device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MLP(4, 5, 3).to(device)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "transform",
    [
        lambda p, x, y: torch.func.grad(loss_of)(p, x, y),
        lambda p, x, y: torch.func.grad_and_value(loss_of)(p, x, y),
        lambda p, x, y: torch.func.vmap(loss_of, in_dims=(None, 0, 0))(p, x[:, None], y[:, None]),
        lambda p, x, y: torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(
            p, x[:, None], y[:, None]
        ),
        lambda p, x, y: torch.func.vjp(lambda x: loss_of(p, x, y), x)[1](torch.ones_like(x.sum())),
        lambda p, x, y: torch.func.jvp(lambda x: loss_of(p, x, y), (x,), (x.sin(),)),
        lambda p, x, y: torch.func.jacrev(lambda x: x.sin() * x)(x[0]),
        lambda p, x, y: torch.func.jacfwd(lambda x: x.sin() * x)(x[0]),
        lambda p, x, y: torch.func.hessian(lambda x: (x**3).sum())(x[0]),
        lambda p, x, y: torch.func.functionalize(lambda x: x.clone().add_(1))(x),
    ],
    ids=[
        "grad",
        "grad and value",
        "vmap",
        "gradients of each sample",
        "vjp",
        "jvp",
        "jacrev",
        "jacfwd",
        "hessian",
        "functionalize",
    ],
)
def test_function_transforms_equal_the_cpu(transform: Callable):
    def program(device: str) -> Any:
        parameters = parameters_on(device)
        x, y = torch.randn(6, 4).to(device), torch.randint(0, 3, (6,)).to(device)
        return transform(parameters, x, y)

    assert_same(program)


def test_a_transform_that_traces_is_refused_in_one_line():
    x = torch.ones(3, device="vgpu:1")
    with pytest.raises(RuntimeError, match=r"linearize.*Use torch.func.jvp") as caught:
        torch.func.linearize(torch.sin, x)
    assert "\n" not in str(caught.value)
    assert torch.func.linearize(torch.sin, x.cpu())[1](torch.ones(3)).shape == (3,)


# torch.accelerator.


def test_the_current_device_is_one_whoever_sets_it(vgpus: Devices):
    torch.accelerator.set_device_index(2)
    assert torch.accelerator.current_device_index() == torch.vgpu.current_device() == 2
    assert torch.zeros(1, device="vgpu").device == vgpus[2]
    with torch.accelerator.device_index(1):
        assert torch.vgpu.current_device() == 1
        with torch.vgpu.device(3), torch.accelerator.device_index(None):
            assert torch.accelerator.current_device_index() == 3
    assert torch.accelerator.current_device_index() == 2
    torch.accelerator.set_device_index("vgpu:0")
    with pytest.raises(RuntimeError, match="vgpu:7 does not exist"):
        torch.accelerator.set_device_index(7)


def test_the_accelerator_counts_memory(vgpus: Devices):
    before = torch.accelerator.memory_allocated(1)
    x = torch.zeros(1000, device=vgpus[1])
    y = torch.zeros(500, device=vgpus[1])
    del y
    assert torch.accelerator.memory_allocated(1) - before == 4000
    assert torch.accelerator.memory_reserved("vgpu:1") - before == 4000
    assert torch.accelerator.max_memory_allocated(1) - before == 6000
    assert torch.accelerator.max_memory_reserved(1) - before == 6000
    torch.accelerator.reset_peak_memory_stats(1)
    torch.accelerator.reset_accumulated_memory_stats(1)
    torch.accelerator.empty_cache()
    torch.accelerator.empty_host_cache()
    assert torch.accelerator.max_memory_allocated(1) - before == 4000
    free, total = torch.accelerator.get_memory_info(1)
    assert total == course_lib.memory_capacity(vgpus[1])
    assert total - free == torch.accelerator.memory_stats(1)["allocated_bytes.all.current"]
    assert torch.vgpu.mem_get_info(vgpus[1]) == (free, total)
    del x


def test_the_accelerator_makes_the_host_wait(vgpus: Devices):
    started = course_lib.host_seconds()
    x = torch.ones(500, 500, device=vgpus[1])
    x @ x
    enqueued = course_lib.host_seconds()
    torch.accelerator.synchronize(2)  # has nothing to do
    assert course_lib.host_seconds() == enqueued > started
    torch.accelerator.synchronize(1)
    assert course_lib.host_seconds() > enqueued


def test_the_accelerators_streams_are_the_courses(vgpus: Devices):
    default = torch.accelerator.current_stream("vgpu:1")
    for side in (course_lib.side_stream(vgpus[1]), torch.Stream("vgpu:1")):
        torch.accelerator.set_stream(side)
        assert torch.accelerator.current_stream(1) is side
        assert torch.accelerator.current_device_index() == 1
        torch.accelerator.set_stream(default)
        assert torch.vgpu.current_stream(1) is torch.vgpu.default_stream(1) is default
    with pytest.raises(TypeError, match=r"course_lib\.side_stream"):
        torch.accelerator.set_stream("stream 1")


def test_the_accelerator_says_what_it_can_do():
    assert torch.accelerator.current_accelerator(check_available=True).type == "vgpu"
    dtypes = torch.accelerator.get_device_capability()["supported_dtypes"]
    for dtype in dtypes:
        assert torch.zeros(2, device="vgpu:1").to(dtype).dtype == dtype
    assert "A100" in torch.vgpu.get_device_name(1)


def test_every_public_function_of_the_accelerator_is_tested_here():
    tested = {
        "current_accelerator",
        "current_device_index",
        "get_device_capability",
        "current_stream",
        "device_count",
        "device_index",
        "empty_cache",
        "empty_host_cache",
        "get_memory_info",
        "is_available",
        "max_memory_allocated",
        "max_memory_reserved",
        "memory_allocated",
        "memory_reserved",
        "memory_stats",
        "reset_accumulated_memory_stats",
        "reset_peak_memory_stats",
        "set_device_index",
        "set_stream",
        "synchronize",
    }
    old_names = {"current_device_idx", "set_device_idx"}
    assert set(torch.accelerator.__all__) - old_names - {"Graph"} == tested


def test_graphs_are_refused_in_one_line():
    with pytest.raises(RuntimeError, match="not supported on device type: vgpu") as caught:
        torch.accelerator.Graph()
    assert "\n" not in str(caught.value)


# Threads.


def test_threads_train_side_by_side_each_on_its_own_device(vgpus: Devices):
    def train(model: nn.Module, device: torch.device | str) -> list[Tensor]:
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(20):
            x = torch.linspace(-1, 1, 24).view(6, 4).to(device) * (step + 1)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    before = [course_lib.memory_in_use(device) for device in vgpus]
    expected, found = [], {}
    for index in range(4):
        torch.manual_seed(index)
        expected.append(train(MLP(4, 8, 2), "cpu"))

    def work(index: int, model: nn.Module) -> None:
        found[index] = train(model, vgpus[index])

    threads = []
    for index in range(4):
        torch.manual_seed(index)
        threads.append(threading.Thread(target=work, args=(index, MLP(4, 8, 2))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        for one, other in zip(found[index], expected[index], strict=True):
            assert torch.equal(one, other)
    threads.clear()
    assert [course_lib.memory_in_use(device) for device in vgpus] == before


# torch.compile.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["inductor", "eager"])
@pytest.mark.parametrize("kind", ["function", "module", "module.compile()"])
def test_torch_compile_says_in_one_line_that_it_does_not_work(
    kind: str, backend: str, fresh_compiler: None
):
    layer = nn.Linear(3, 3).to("vgpu:1")
    if kind == "function":
        compiled = torch.compile(lambda x: x * 2 + 1, backend=backend)
    elif kind == "module":
        compiled = torch.compile(layer, backend=backend)
    else:
        layer.compile(backend=backend)
        compiled = layer
    with pytest.raises(RuntimeError) as caught:
        compiled(torch.ones(2, 3, device="vgpu:1"))
    assert str(caught.value).startswith("torch.compile does not work on virtual GPUs: ")
    assert "\n" not in str(caught.value)


def test_torch_compile_still_compiles_for_the_cpu(fresh_compiler: None):
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [3, 3, 3]


def test_a_default_device_serves_every_function_that_makes_tensors(vgpus: Devices):
    with torch.device("meta"):
        made = [torch.tensor([1.0]), torch.as_tensor([1.0]), torch.zeros(1)]
    assert [tensor.device.type for tensor in made] == ["meta"] * 3
