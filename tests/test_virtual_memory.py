"""A virtual GPU holds as many bytes as its tensors have, and runs out of them as CUDA does."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import course_lib
from course_lib.models import MLP, parameter_count
from course_lib.virtual import room, special_operators
from course_lib.virtual.machine import machine
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.operators import known_operators
from course_lib.virtual.tensor import wrap

Devices = list[torch.device]
pytestmark = pytest.mark.usefixtures("vgpus")
DEVICE = "vgpu:1"
MB = 1_000_000


def in_use() -> int:
    return course_lib.memory_in_use(torch.device(DEVICE))


def peak() -> int:
    return course_lib.peak_memory(torch.device(DEVICE))


def zeros(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.uint8, 1), (torch.bfloat16, 2), (torch.float32, 4), (torch.complex64, 8)],
)
def test_a_tensor_holds_its_elements_times_their_size(dtype: torch.dtype, size: int):
    x = torch.zeros(3, 5, dtype=dtype, device=DEVICE)
    assert in_use() == 15 * size == x.nbytes


def test_del_frees():
    x = zeros(100)
    y = zeros(10)
    del x
    assert in_use() == 10
    del y
    assert in_use() == 0


def test_views_share_the_bytes_of_their_base():
    x = torch.zeros(10, 10, device=DEVICE)
    views = [x[2:], x.t(), x.view(100), x.detach(), x.unsqueeze(0).expand(5, 10, 10), x.diagonal()]
    assert in_use() == 400
    del x
    assert in_use() == 400  # the smallest view keeps all of it
    del views
    assert in_use() == 0


def test_in_place_operators_need_no_memory():
    x = torch.ones(100, device=DEVICE)
    course_lib.reset_peak_memory(torch.device(DEVICE))
    x.add_(1).mul_(2)
    x[3:5] += 1
    x.t_()
    assert peak() == in_use() == 400


def test_a_copy_to_another_device_is_charged_there(vgpus: Devices):
    x = torch.zeros(100, device=vgpus[0])
    y = x.to(vgpus[1])
    assert [course_lib.memory_in_use(device) for device in vgpus] == [400, 400, 0, 0]
    del x
    assert [course_lib.memory_in_use(device) for device in vgpus] == [0, 400, 0, 0]
    host = y.cpu()
    del y
    assert host.sum().item() == 0
    assert in_use() == 0


def test_moving_a_module_moves_its_bytes(vgpus: Devices):
    model = MLP(10, 10, 10).to(vgpus[0])
    size = 4 * 2 * (10 * 10 + 10)
    assert course_lib.memory_in_use(vgpus[0]) == size
    model.to(vgpus[1])
    assert [course_lib.memory_in_use(device) for device in vgpus[:2]] == [0, size]


def test_assigning_data_frees_what_was_there():
    x = nn.Parameter(torch.zeros(100, device=DEVICE))
    x.data = torch.zeros(25, device=DEVICE)
    assert in_use() == 100
    del x
    assert in_use() == 0


def test_what_autograd_keeps_for_backward_is_in_use_until_backward_ran():
    x = torch.ones(1000, device=DEVICE, requires_grad=True)
    y = x.exp().sin().sum()
    assert in_use() == 4000 + 4000 + 4  # x, exp's result, y; nobody needs sin's
    y.backward()
    assert in_use() == 4000 + 4000 + 4  # x, its gradient, y
    del x, y
    assert in_use() == 0


def test_what_adamw_training_holds_is_four_times_the_parameters():
    model = MLP(32, 64, 10).to(DEVICE)
    parameters = in_use()
    assert parameters == 4 * parameter_count(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(8, 32).to(DEVICE)).square().mean().backward()
    assert in_use() == 2 * parameters
    optimizer.step()
    assert in_use() == 4 * parameters  # values, gradients and two moments
    optimizer.zero_grad()
    assert in_use() == 3 * parameters


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_trained_model_leaves_nothing_behind(how: dict):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, 4))
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    for _ in range(2):
        optimizer.zero_grad()
        x, y = torch.randn(6, 8).to(DEVICE), torch.arange(6).remainder(4).to(DEVICE)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    del model, optimizer, x, y, loss
    gc.collect()
    assert in_use() == 0


def test_peak_memory_is_the_most_there_was():
    x = zeros(100)
    y = zeros(50)
    del y
    z = zeros(20)
    assert peak() == 150
    course_lib.reset_peak_memory(torch.device(DEVICE))
    assert peak() == 120 == in_use()
    del x, z


def test_a_product_peaks_at_its_inputs_and_output():
    x, y = torch.ones(10, 20, device=DEVICE), torch.ones(20, 30, device=DEVICE)
    course_lib.reset_peak_memory(torch.device(DEVICE))
    z = x @ y
    assert peak() == 4 * (200 + 600 + 300) == in_use()
    del z


def test_each_device_has_its_own_memory(vgpus: Devices):
    held = [torch.zeros(15 * MB, device=device) for device in vgpus]
    assert [course_lib.memory_in_use(device) for device in vgpus] == [60 * MB] * 4
    del held


# Out of memory.

FULL = re.compile(
    r"^vgpu:1 out of memory\. Tried to allocate 50\.00 MB\. "
    r"It has a total capacity of 80\.00 MB, of which 20\.00 MB is free and 60\.00 MB is in use\.$"
)


def test_out_of_memory_says_what_was_tried_and_what_there_is():
    held = zeros(60 * MB)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        zeros(50 * MB)
    assert FULL.match(str(caught.value))
    assert isinstance(caught.value, RuntimeError)
    del held


@pytest.mark.parametrize(
    "allocate",
    [
        lambda held: zeros(50 * MB),
        lambda held: torch.zeros(50 * MB, dtype=torch.uint8).to(DEVICE),
        lambda held: torch.zeros(50 * MB, dtype=torch.uint8, device="vgpu:0").to(DEVICE),
        lambda held: held[: 50 * MB] + 1,
        lambda held: held[: 50 * MB].clone(),
        lambda held: torch.cat([held[: 25 * MB], held[: 25 * MB]]),
        lambda held: torch.empty_like(held[: 50 * MB]),
        lambda held: held[: 25 * MB].to(torch.int16),
    ],
    ids=["factory", "from host", "from GPU", "operator", "clone", "cat", "empty_like", "dtype"],
)
def test_out_of_memory_loses_nothing_and_the_device_goes_on(allocate):
    held = zeros(60 * MB)
    with pytest.raises(torch.OutOfMemoryError, match=FULL):
        allocate(held)
    assert in_use() == 60 * MB
    assert held[-1].item() == 0
    small = zeros(20 * MB)  # to the last byte
    assert in_use() == 80 * MB
    del held, small
    assert in_use() == 0
    assert zeros(80 * MB).nbytes == 80 * MB


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, what virtual GPUs have run may make no more than 10 MB on the host."""
    special_operators._without_waiting.cache_clear()
    for operator in known_operators.values():

        def run(*args, quiet=operator.run, **kwargs):
            out = quiet(*args, **kwargs)
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and made.device.type == "cpu":
                    nbytes = made.untyped_storage().nbytes()
                    assert nbytes < 10 * MB, "the host works"
            return out

        monkeypatch.setattr(operator, "run", run)


GPU = "vgpu:0"

# With n = 20,000 each asks for far more than the 80 MB of a GPU.
TOO_LARGE = {
    "randn": (lambda n, tall, wide: torch.randn(n, n, device=GPU), "1.60 GB"),
    "zeros": (lambda n, tall, wide: torch.zeros((n, n // 4), device=GPU), "400.00 MB"),
    "empty": (lambda n, tall, wide: torch.empty(n, n, n, device=GPU), "32.00 TB"),
    "int8": (lambda n, tall, wide: torch.zeros(n, n, dtype=torch.int8, device=GPU), "400.00 MB"),
    "full": (lambda n, tall, wide: torch.full((n, n), True, device=GPU), "400.00 MB"),
    "randint": (lambda n, tall, wide: torch.randint(5, (n, n), device=GPU), "3.20 GB"),
    "arange": (lambda n, tall, wide: torch.arange(n * n, device=GPU), "3.20 GB"),
    "arange in steps": (lambda n, tall, wide: torch.arange(0, 1, n**-2, device=GPU), "1.60 GB"),
    "linspace": (lambda n, tall, wide: torch.linspace(0, 1, n * n, device=GPU), "1.60 GB"),
    "randperm": (lambda n, tall, wide: torch.randperm(n * n, device=GPU), "3.20 GB"),
    "eye": (lambda n, tall, wide: torch.eye(n, device=GPU), "1.60 GB"),
    "tril_indices": (lambda n, tall, wide: torch.tril_indices(n, n, device=GPU), "3.20 GB"),
    "add": (lambda n, tall, wide: tall + wide, "1.60 GB"),
    "gt": (lambda n, tall, wide: tall > wide, "400.00 MB"),
    "mm": (lambda n, tall, wide: tall @ wide, "1.60 GB"),
    "addmm": (lambda n, tall, wide: torch.addmm(wide, tall, wide), "1.60 GB"),
    "cdist": (lambda n, tall, wide: torch.cdist(tall, tall), "1.60 GB"),
    "pdist": (lambda n, tall, wide: F.pdist(tall), "799.96 MB"),
    "diag": (lambda n, tall, wide: torch.diag(wide[0]), "1.60 GB"),
    "conv": (lambda n, tall, wide: F.conv1d(wide[None], tall[..., None]), "1.60 GB"),
    "embedding": (lambda n, tall, wide: F.embedding(tall[:, 0].long() - 1, wide), "1.60 GB"),
    "index": (lambda n, tall, wide: wide[tall[:, 0].long() - 1], "1.60 GB"),
    "index_select": (
        lambda n, tall, wide: wide.index_select(0, tall[:, 0].long() - 1),
        "1.60 GB",
    ),
    "meshgrid": (lambda n, tall, wide: 1 + tall.expand(n, n), "1.60 GB"),
    "clone": (lambda n, tall, wide: tall.expand(n, n).clone(), "1.60 GB"),
    "dtype": (lambda n, tall, wide: tall.expand(n, n).double(), "3.20 GB"),
    "cumsum": (lambda n, tall, wide: tall.expand(n, n).cumsum(0), "1.60 GB"),
    "ones_like": (lambda n, tall, wide: torch.ones_like(tall.expand(n, n)), "1.60 GB"),
    "cat": (lambda n, tall, wide: torch.cat([tall.expand(n, n // 2)] * 2), "1.60 GB"),
    "unfold": (lambda n, tall, wide: wide[0].unfold(0, n // 2, 1).clone(), "400.04 MB"),
    "sort": (lambda n, tall, wide: tall.expand(n, n).sort(), "4.80 GB"),
    "repeat": (lambda n, tall, wide: tall.repeat(1, n), "1.60 GB"),
    "repeat_interleave": (lambda n, tall, wide: tall.repeat_interleave(n), "1.60 GB"),
    "pad": (lambda n, tall, wide: F.pad(tall, (0, n)), "1.60 GB"),
    "interpolate": (
        lambda n, tall, wide: F.interpolate(wide[None, None, :, :9], size=(n, n)),
        "1.60 GB",
    ),
    "F.unfold": (lambda n, tall, wide: F.unfold(wide[None], (1, n // 2)), "400.04 MB"),
    "one_hot": (lambda n, tall, wide: F.one_hot(torch.arange(n, device=GPU)), "3.20 GB"),
    "multinomial": (lambda n, tall, wide: wide[0, :9].multinomial(n * n, True), "3.20 GB"),
    "masked_select": (
        lambda n, tall, wide: tall.expand(n, n).masked_select(wide > 0),
        "1.60 GB",
    ),
    "new_ones": (lambda n, tall, wide: tall.new_ones(n, n), "1.60 GB"),
    "resize_": (lambda n, tall, wide: torch.empty(1, device=GPU).resize_(n, n), "1.60 GB"),
    "to another": (lambda n, tall, wide: tall.expand(n, n).to(DEVICE), "1.60 GB"),
    "from the host": (lambda n, tall, wide: torch.ones(1).expand(n, n).to(GPU), "1.60 GB"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_cannot_fit_is_refused_before_the_host_works(name, monkeypatch):
    make, size = TOO_LARGE[name]
    tall, wide = torch.ones(20_000, 1, device=GPU), torch.ones(1, 20_000, device=GPU)
    make(20, tall[:20], wide[:, :20])  # fits
    forbid_work(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make(20_000, tall, wide)
    assert f"Tried to allocate {size}. " in str(caught.value)
    del caught
    gc.collect()
    assert course_lib.memory_in_use(GPU) == 160_000


def test_parts_of_large_tensors_that_have_no_numbers_are_multiplied_as_on_the_cpu():
    x = torch.ones(1000, 1000, device=GPU)
    assert (x[:, :0] @ x[:0]).cpu().equal(torch.zeros(1000, 1000))
    assert torch.addmm(x, x[:, :0], x[:0]).cpu().equal(torch.ones(1000, 1000))


def test_a_sum_of_equal_shapes_that_cannot_fit_is_refused_before_the_host_works(monkeypatch):
    x, y = (torch.ones(7_000_000, device=GPU) for _ in range(2))
    x[:1] + y[:1]
    forbid_work(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 28.00 MB\. "):
        x + y


@pytest.mark.parametrize("layout", ["sparse", "nested"])
def test_what_is_refused_for_its_layout_takes_no_memory(layout: str):
    inner = {
        "sparse": torch.eye(2).to_sparse(),
        "nested": torch._nested_view_from_buffer(
            torch.ones(5), torch.tensor([[2], [3]]), torch.ones(2, 1).long(), torch.tensor([0, 2])
        ),
    }[layout]
    with pytest.raises(NotImplementedError, match="virtual GPUs hold dense tensors only"):
        wrap(inner, machine.memories[1])
    assert peak() == 0


def test_what_fits_is_not_refused():
    tall, wide = torch.ones(8000, 1, device="vgpu:0"), torch.ones(1, 8000, device="vgpu:0")
    assert (tall > wide).nbytes == 64_000_000  # as float32 it would be 256 MB
    assert torch.full((70_000_000,), False, device="vgpu:0").nbytes == 70_000_000
    row = torch.ones(9000, device="vgpu:0")
    assert (row * tall[:1]).shape == (1, 9000)
    spread = tall.expand(8000, 8000)
    assert spread.sum() == 64_000_000
    assert spread[:2].clone().nbytes == 64_000
    assert (spread == wide).nbytes == 64_000_000


def test_where_the_host_cannot_allocate_the_device_is_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError, match=r"^vgpu:0 out of memory. Tried to allocate"):
        torch.ones(2, 2, device="vgpu:0").repeat(10**7, 10**7)


def test_a_gpu_that_this_computer_cannot_back_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    gpu = course_lib.devices(1, course_lib.A100)[0]
    monkeypatch.setattr(room, "host_memory_left", lambda: 16e9)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.zeros(5_000_000_000, device=gpu)
    assert str(caught.value) == (
        "vgpu:0 has room for 20.00 GB, but this computer, which keeps its numbers, has not. Ask "
        "for smaller GPUs, as in devices(4, A100 / 1000), or for GPUs without numbers: "
        "devices(..., backing='meta') keeps shapes, memory and time."
    )
    x = torch.ones(1, device=gpu)
    for grow, size in ((x.resize_, 5_000_000_000), (x.untyped_storage().resize_, 20_000_000_000)):
        with pytest.raises(torch.OutOfMemoryError, match="but this computer"):
            grow(size)
    assert (x.shape, course_lib.memory_in_use(gpu)) == ((1,), 4)
    gpu = course_lib.devices(1, course_lib.A100, backing="meta")[0]
    assert torch.zeros(5_000_000_000, device=gpu).nbytes == 20e9


def test_out_of_memory_on_one_device_leaves_the_others_alone(vgpus: Devices):
    held = zeros(80 * MB)
    with pytest.raises(torch.OutOfMemoryError):
        zeros(1)
    assert torch.zeros(10 * MB, dtype=torch.uint8, device=vgpus[0]).nbytes == 10 * MB
    del held


def test_running_out_in_backward_raises_and_the_learner_goes_on():
    x = torch.ones(MB, device=DEVICE, requires_grad=True)
    y = x
    for _ in range(6):
        y = y.sin()
    loss = y.sum()
    del y
    filler = zeros(80 * MB - in_use() - 5 * MB)  # room for one gradient and not for two
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^vgpu:1 out of memory\. Tried to allocate 4"
    ):
        loss.backward()
    del loss, filler, x
    gc.collect()
    assert in_use() == 0
    x = torch.ones(MB, device=DEVICE, requires_grad=True)
    x.sin().sum().backward()
    assert x.grad.shape == x.shape


def test_garbage_in_cycles_is_collected_before_giving_up():
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself, node.tensor = node, zeros(60 * MB)
        del node
        assert in_use() == 60 * MB
        assert zeros(50 * MB).nbytes == 50 * MB
    finally:
        gc.enable()


def test_asking_for_devices_again_forgets_the_peak(vgpus: Devices):
    held = torch.ones(1000, device=vgpus[0])
    torch.ones(5000, device=vgpus[0])
    assert course_lib.peak_memory(vgpus[0]) == 24_000
    course_lib.devices(2)
    assert course_lib.peak_memory(vgpus[0]) == held.nbytes


def test_a_gpu_smaller_than_what_it_holds_has_nothing_free(vgpus: Devices):
    held = torch.ones(1_000_000, device=vgpus[0])
    course_lib.devices(2, course_lib.CLASSROOM.with_(memory=1e6))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        held + 1
    assert str(caught.value).endswith("of which 0 B is free and 4.00 MB is in use.")
    assert torch.vgpu.mem_get_info(0) == (0, 1_000_000)


def test_less_memory_can_be_asked_for():
    small = course_lib.devices(1, course_lib.CLASSROOM.with_(memory=1000))[0]
    assert course_lib.memory_capacity(small) == 1000
    with pytest.raises(
        torch.OutOfMemoryError, match=r"capacity of 1\.00 kB, of which 1\.00 kB is free"
    ):
        torch.zeros(251, device=small)
    assert torch.zeros(250, device=small).nbytes == 1000


def test_asking_for_devices_again_keeps_what_they_hold():
    x = zeros(1000)
    course_lib.devices(2)
    assert in_use() == 1000
    assert x.sum().item() == 0
    del x
    assert in_use() == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (3145728, "3.15 MB"),
        (80e9, "80.00 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_bytes_are_written_as_in_a_data_sheet(nbytes: float, text: str):
    assert format_bytes(nbytes) == text
