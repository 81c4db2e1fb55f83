"""Code written for CUDA runs on virtual GPUs with only the name of the device changed.

And what comes out is what the CPU gives, bit for bit: every comparison here is ``torch.equal``.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import course_lib
from course_lib.models import GPT, MLP, next_token_loss

Devices = list[torch.device]
pytestmark = pytest.mark.usefixtures("vgpus")


def assert_same(program: Callable[[str], Any], device: str = "vgpu:1") -> None:
    """``program(device)`` returns what ``program("cpu")`` does, as it stands on that device."""
    torch.manual_seed(0)
    expected = tree_leaves(program("cpu"))
    torch.manual_seed(0)
    actual = tree_leaves(program(device))
    assert len(expected) == len(actual)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, Tensor):
            assert one.device == torch.device(device)
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert torch.equal(one.detach().cpu(), other.detach())
        else:
            assert one == other


def randn(*shape: int, device: str, requires_grad: bool = False) -> Tensor:
    """Random numbers that are the same on every device."""
    return torch.randn(*shape).to(device).requires_grad_(requires_grad)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# Making tensors and moving them.


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: torch.zeros(2, 3, **kw),
        lambda **kw: torch.ones(2, 3, dtype=torch.bfloat16, **kw),
        lambda **kw: torch.full((2,), 7, **kw),
        lambda **kw: torch.arange(5, **kw),
        lambda **kw: torch.linspace(0, 1, 7, **kw),
        lambda **kw: torch.eye(3, **kw),
        lambda **kw: torch.tril_indices(3, 3, **kw),
        lambda **kw: torch.tensor([[1.0, 2.0], [3.0, 4.0]], **kw),
        lambda **kw: torch.tensor(3, **kw),
        lambda **kw: torch.as_tensor([1, 2], **kw),
        lambda **kw: torch.zeros_like(torch.ones(2), **kw),
        lambda **kw: torch.ones(2).new_full((3,), 5, **kw),
        lambda **kw: torch.randn(3, 3, **kw),
        lambda **kw: torch.rand(4, **kw),
        lambda **kw: torch.randint(0, 9, (5,), **kw),
        lambda **kw: torch.randperm(8, **kw),
        lambda **kw: torch.hann_window(8, **kw),
    ],
)
def test_factories_make_tensors_on_the_device(make: Callable[..., Tensor]):
    assert_same(lambda device: make(device=device))


def test_a_device_may_be_written_in_every_way_that_pytorch_knows(vgpus: Devices):
    for device in ("vgpu:0", "vgpu", torch.device("vgpu"), torch.device("vgpu", 0), vgpus[0]):
        assert torch.zeros(1, device=device).device == vgpus[0]
    assert torch.zeros(1).to("vgpu:2").device == vgpus[2]
    assert torch.zeros(1).to(torch.zeros(1, device="vgpu:3")).device == vgpus[3]


def test_torch_device_as_a_context_makes_everything_there(vgpus: Devices):
    with torch.device("vgpu:2"):
        assert torch.zeros(2).device == vgpus[2]
        assert nn.Linear(2, 2).weight.device == vgpus[2]


def test_to_changes_device_and_dtype_at_once():
    assert_same(lambda device: torch.arange(6.0).to(device, torch.bfloat16))
    assert_same(lambda device: torch.arange(6.0).to(device).to(torch.int32).float().half())


def test_to_the_device_it_is_on_returns_the_tensor_itself():
    x = torch.ones(3, device="vgpu:1")
    assert x.to("vgpu:1") is x
    assert x.to("vgpu:1", copy=True) is not x


def test_round_trips_between_host_and_devices_keep_every_bit():
    x = torch.randn(5, 7)
    there_and_back = x.to("vgpu:0").to("vgpu:3").to("vgpu:1").cpu()
    assert torch.equal(there_and_back, x)
    assert there_and_back.device.type == "cpu"


def test_copy_between_devices_in_place():
    source, destination = torch.randn(4).to("vgpu:0"), torch.zeros(4, device="vgpu:2")
    destination.copy_(source, non_blocking=True)
    assert torch.equal(destination.cpu(), source.cpu())
    host = torch.zeros(4)
    host.copy_(destination)
    assert torch.equal(host, source.cpu())


def test_a_copy_is_not_a_view():
    x = torch.zeros(3, device="vgpu:0")
    y = x.to("vgpu:1")
    y.add_(1)
    assert x.tolist() == [0, 0, 0]
    z = y.cpu()
    z.add_(1)
    assert y.tolist() == [1, 1, 1]


def test_values_come_back_as_python_numbers():
    x = torch.tensor([[1.5, 2.5]], device="vgpu:1")
    assert x[0, 1].item() == 2.5
    assert x.tolist() == [[1.5, 2.5]]
    assert float(x.sum()) == 4.0
    assert bool((x > 1).all())
    assert [row.shape for row in x] == [(2,)]


def test_a_printed_tensor_shows_its_numbers_and_its_device():
    assert repr(torch.ones(2, device="vgpu:1")) == "tensor([1., 1.], device='vgpu:1')"
    leaf = torch.ones(2, device="vgpu:1", requires_grad=True)
    assert repr(leaf) == "tensor([1., 1.], device='vgpu:1', requires_grad=True)"
    assert "grad_fn=<MulBackward0>" in repr(leaf * 2)
    parameter = nn.Parameter(torch.ones(2, device="vgpu:1"))
    assert repr(parameter).startswith("Parameter containing:\ntensor([1., 1.], device='vgpu:1'")


# Views, in-place operators, indices.


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:, ::2],
        lambda x: x.t(),
        lambda x: x.view(-1)[3:],
        lambda x: x.unsqueeze(0).expand(3, 4, 6),
        lambda x: x.chunk(2, dim=1)[1],
        lambda x: x.split([1, 3])[1],
        lambda x: x.diagonal(),
        lambda x: x.unfold(1, 2, 1),
        lambda x: x.reshape(2, 12).transpose(0, 1),
        lambda x: x.detach(),
    ],
)
def test_views_show_what_is_written_into_them(view: Callable[[Tensor], Tensor]):
    def program(device: str) -> list[Tensor]:
        x = torch.arange(24.0).view(4, 6).to(device)
        seen = view(x)
        if seen.dim() < 3:
            seen.mul_(-1)
        x.add_(1)
        return [x, seen]

    assert_same(program)


def test_in_place_operators_change_the_tensor_they_are_called_on():
    def program(device: str) -> list[Tensor]:
        x = randn(4, 4, device=device)
        y = x.add_(1).mul_(2).clamp_(-1, 1).fill_diagonal_(0)
        assert y is x
        x[0] = 5
        x[:, 1] += 1
        x.t_()
        x.squeeze_()
        return [x, x.unsqueeze_(0), x.zero_()]

    assert_same(program)


def test_out_writes_into_a_tensor():
    def program(device: str) -> Tensor:
        out = torch.empty(3, 3, device=device)
        torch.mm(torch.eye(3, device=device), torch.ones(3, 3, device=device), out=out)
        return out

    assert_same(program)


def test_assigning_data_replaces_the_numbers():
    def program(device: str) -> list[Tensor]:
        x = nn.Parameter(torch.zeros(3, device=device))
        x.data = torch.arange(4.0, device=device)
        (x * x).sum().backward()
        x.data.sub_(x.grad)
        return [x, x.grad, x * 2]

    assert_same(program)


@pytest.mark.parametrize("where", ["cpu", "vgpu:1"])
def test_index_tensors_may_be_on_the_device_or_on_the_host(where: str):
    def program(device: str) -> list[Tensor]:
        rows = torch.tensor([2, 0, 2]).to(device if where != "cpu" else "cpu")
        x = randn(4, 3, device=device)
        y = x.clone()
        y[rows] = 7
        z = x.clone()
        z.index_put_((rows,), torch.ones(3, 3, device=device), accumulate=True)
        return [x[rows], x[rows, 1], y, z]

    assert_same(program)


def test_masks_pick_fill_and_assign():
    def program(device: str) -> list[Tensor]:
        x = randn(4, 3, device=device)
        mask = x > 0
        y = x.clone()
        y[mask] = 0
        return [
            x[mask],
            y,
            x.masked_fill(mask, float("-inf")),
            torch.where(mask, x, -x),
            mask.nonzero(),
            x[(x > 0).cpu()],
        ]

    assert_same(program)


def test_numbers_from_the_host_mix_with_tensors_of_the_device():
    def program(device: str) -> list[Tensor]:
        x = torch.ones(3, device=device)
        return [
            x + 1,
            x * torch.tensor(2.0),
            torch.tensor(3.0) - x,
            x + torch.tensor(1, device="cpu"),
        ]

    assert_same(program)


# Numbers in other formats.


def test_bfloat16_computes_what_the_cpu_computes():
    def program(device: str) -> list[Tensor]:
        x, y = randn(8, 8, device=device).bfloat16(), randn(8, 8, device=device).bfloat16()
        return [x @ y, (x @ y).float(), x.softmax(-1), x + y.float()]

    assert_same(program)


def test_complex_rotations_as_in_rotary_embeddings():
    def program(device: str) -> list[Tensor]:
        x = randn(2, 5, 8, device=device, requires_grad=True)
        angles = torch.arange(5.0, device=device)[:, None] * torch.ones(4, device=device)
        rotation = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation)
        turned.flatten(-2).square().sum().backward()
        inverse = rotation.conj()
        return [turned, x.grad, (rotation * inverse).real, inverse.imag, inverse.resolve_conj()]

    assert_same(program)


# Modules.


def test_a_module_moves_with_to():
    def program(device: str) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))
        model.to(device)
        assert {tensor.device for tensor in model.state_dict().values()} == {torch.device(device)}
        out = model(randn(5, 4, device=device))
        out.sum().backward()
        return [out, *parameters(model), *(p.grad for p in model.parameters()), *model.buffers()]

    assert_same(program)


def test_moving_a_module_keeps_its_parameters_the_same_objects():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.to("vgpu:1")
    model(torch.ones(2, 3, device="vgpu:1")).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before.cpu(), model.weight.cpu())


def test_tied_weights_stay_tied():
    model = GPT(11, context=8, width=8, depth=1).to("vgpu:1")
    assert model[-1].linear.weight is model[0].token.weight
    model.to("vgpu:2")
    assert model[-1].linear.weight is model[0].token.weight
    assert copy.deepcopy(model)[-1].linear.weight.device == torch.device("vgpu:2")


def test_deepcopy_makes_an_independent_copy_on_the_same_device():
    model = MLP(4, 8, 2).to("vgpu:3")
    twin = copy.deepcopy(model)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert {p.device for p in twin.parameters()} == {torch.device("vgpu:3")}
    assert any(p.abs().sum().item() > 0 for p in twin.parameters())


def test_deepcopy_keeps_tied_weights_tied():
    model = copy.deepcopy(GPT(11, context=8, width=8, depth=1).to("vgpu:1"))
    assert model[-1].linear.weight is model[0].token.weight


def test_state_dicts_move_from_device_to_device():
    source, destination = MLP(4, 8, 2).to("vgpu:0"), MLP(4, 8, 2).to("vgpu:2")
    destination.load_state_dict(source.state_dict())
    for one, other in zip(source.parameters(), destination.parameters(), strict=True):
        assert other.device == torch.device("vgpu:2")
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("target", [None, "cpu", "vgpu:2"])
def test_a_state_dict_is_saved_and_loaded_again(target: str | None):
    model = MLP(4, 8, 2).to("vgpu:1")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    assert {str(tensor.device) for tensor in loaded.values()} == {target or "vgpu:1"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name].cpu(), tensor.cpu())
    MLP(4, 8, 2).to("vgpu:3").load_state_dict(loaded)


def test_an_optimizer_is_saved_and_loaded_again():
    def program(device: str) -> list[Tensor]:
        model = MLP(4, 8, 2).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, device, steps=1)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(state)
        train(model, optimizer, device, steps=1)
        return parameters(model)

    assert_same(program)


def test_hooks_see_what_passes():
    def program(device: str) -> list[Tensor]:
        seen: list[Tensor] = []
        model = MLP(4, 8, 2).to(device)
        model[0].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        model[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
        model[2].weight.register_hook(lambda grad: grad * 2)
        model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
        model(randn(3, 4, device=device, requires_grad=True)).sum().backward()
        return seen

    assert_same(program)


def test_cnns_and_layers_of_every_kind():
    def program(device: str) -> list[Tensor]:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Mish(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.LayerNorm(18),
            nn.Linear(18, 5),
        ).to(device)
        loss = F.cross_entropy(model(randn(4, 1, 8, 8, device=device)), torch.arange(4).to(device))
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    assert_same(program)


def test_pytorchs_own_transformer():
    def program(device: str) -> list[Tensor]:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True).to(device)
        x = randn(2, 5, 16, device=device)
        torch.manual_seed(1)  # from here on only the device rolls its dice
        out = layer(x)
        out.square().sum().backward()
        return [out, *(p.grad for p in layer.parameters())]

    assert_same(program)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_agree_to_six_digits(kind: type[nn.Module]):
    def program(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = kind(6, 5, num_layers=2, batch_first=True).to(device)
        out, _ = model(randn(2, 4, 6, device=device))
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters())]

    for one, other in zip(program("vgpu:1"), program("cpu"), strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-6)


# Training.


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: str, steps: int = 3
) -> list[float]:
    losses = []
    for _ in range(steps):
        x, y = torch.randn(6, 4).to(device), torch.randint(0, 2, (6,)).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", ["SGD", "SGD with momentum", "Adam", "AdamW", "Adagrad"])
def test_optimizers_step_as_on_the_cpu(kind: str, how: dict):
    def program(device: str) -> list:
        model = MLP(4, 8, 2).to(device)
        name, _, momentum = kind.partition(" with ")
        options = {**how, **({"momentum": 0.9, "nesterov": True} if momentum else {})}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **options)
        losses = train(model, optimizer, device)
        return [losses, parameters(model)]

    assert_same(program)


@pytest.mark.parametrize("kind", ["RMSprop", "Adadelta", "NAdam", "Adamax", "LBFGS"])
def test_the_other_optimizers_too(kind: str):
    def program(device: str) -> list[Tensor]:
        model = MLP(4, 8, 2).to(device)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
        x, y = randn(6, 4, device=device), torch.randint(0, 2, (6,)).to(device)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return parameters(model)

    assert_same(program)


def test_a_gpt_with_dropout_trains_to_the_cpus_parameters():
    def program(device: str) -> list:
        model = GPT(13, context=8, width=16, heads=2, depth=2, dropout=0.2).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batches = [torch.randint(0, 13, (4, 9)).to(device) for _ in range(3)]
        torch.manual_seed(1)  # from here on only the device rolls its dice
        losses = []
        for tokens in batches:
            loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return [losses, parameters(model)]

    assert_same(program)


def test_batches_of_a_data_loader():
    def program(device: str) -> list[Tensor]:
        data = TensorDataset(torch.arange(10.0).view(5, 2), torch.arange(5))
        loader = DataLoader(data, batch_size=2)
        return [part.to(device, non_blocking=True) for batch in loader for part in batch]

    assert_same(program)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_what_the_cpu_drops(p: float):
    def program(device: str) -> list[Tensor]:
        x = torch.linspace(1, 2, 1000, device=device).requires_grad_()
        y = F.dropout(x, p)
        y.square().sum().backward()
        return [y, x.grad, F.dropout(x, p, training=False), F.dropout(x.detach().clone(), p)]

    assert_same(program)


def test_one_seed_gives_every_device_the_same_dice_and_they_roll_on_their_own(vgpus: Devices):
    torch.manual_seed(3)
    first = [torch.rand(4, device=device) for device in vgpus]
    torch.rand(100, device=vgpus[0])
    second = [torch.rand(4, device=device).cpu() for device in vgpus]
    assert all(torch.equal(x.cpu(), first[0].cpu()) for x in first)
    assert torch.equal(second[1], second[2])
    assert not torch.equal(second[0], second[1])


def test_the_devices_dice_leave_the_hosts_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(4, device="vgpu:1")
    F.dropout(torch.ones(5, device="vgpu:0"))
    assert torch.equal(torch.rand(4), expected)


def test_a_seed_set_before_the_devices_are_asked_for_holds():
    torch.manual_seed(7)
    course_lib.devices(9)  # one more than any other test here, so that vgpu:8 is new
    before = torch.rand(4, device="vgpu:8")
    torch.manual_seed(7)
    assert torch.equal(before.cpu(), torch.rand(4, device="vgpu:8").cpu())


def test_random_state_is_kept_and_restored(vgpus: Devices):
    state = torch.vgpu.get_rng_state(vgpus[1])
    first = torch.rand(4, device=vgpus[1])
    torch.vgpu.set_rng_state(state, vgpus[1])
    assert torch.equal(torch.rand(4, device=vgpus[1]).cpu(), first.cpu())


def test_fork_rng_puts_the_devices_dice_back():
    with torch.random.fork_rng(devices=[0, 1], device_type="vgpu"):
        inside = torch.rand(4, device="vgpu:1")
    assert torch.equal(torch.rand(4, device="vgpu:1").cpu(), inside.cpu())


# Autograd.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients(use_reentrant: bool):
    def program(device: str, checkpointed: bool = True) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 8))
        model.to(device)
        x = randn(4, 8, device=device, requires_grad=True)
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in model.parameters())]

    assert_same(program)
    with_checkpoint, without = program("vgpu:1"), program("vgpu:1", checkpointed=False)
    for one, other in zip(with_checkpoint, without, strict=True):
        assert torch.equal(one.detach().cpu(), other.detach().cpu())


def test_gradients_travel_back_through_copies_between_devices(vgpus: Devices):
    x = torch.arange(3.0, requires_grad=True)
    on_first = x.to(vgpus[0])
    on_second = (on_first * 2).to(vgpus[1])
    loss = (on_second.square().to(vgpus[0]) + on_first).sum()
    loss.backward()
    assert x.grad.device.type == "cpu"
    assert x.grad.tolist() == [1.0, 9.0, 17.0]


def test_a_model_spread_over_devices_equals_the_one_on_the_cpu(vgpus: Devices):
    torch.manual_seed(0)
    expected = MLP(4, 8, 8, 2)
    spread = copy.deepcopy(expected)
    for number, layer in enumerate(spread):
        layer.to(vgpus[number % 4])
    x = torch.randn(5, 4)
    expected(x).sum().backward()
    for number, layer in enumerate(spread):
        x = layer(x.to(vgpus[number % 4]))
    x.sum().backward()
    for one, other in zip(spread.parameters(), expected.parameters(), strict=True):
        assert one.grad.device == one.device
        assert torch.equal(one.grad.cpu(), other.grad)


def test_own_autograd_functions():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * ctx.factor + 0 * x, None

    def program(device: str) -> list[Tensor]:
        x = randn(3, device=device, requires_grad=True)
        y = Scale.apply(x, 3.0)
        y.sum().backward()
        return [y, x.grad]

    assert_same(program)


def test_an_autograd_function_that_copies_between_devices(vgpus: Devices):
    class Send(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, device):
            ctx.source = x.device
            return x.to(device)

        @staticmethod
        def backward(ctx, grad):
            assert grad.device == vgpus[3]
            return grad.to(ctx.source), None

    x = torch.ones(3, device=vgpus[1], requires_grad=True)
    (Send.apply(x, vgpus[3]) * 2).sum().backward()
    assert x.grad.device == vgpus[1]
    assert x.grad.tolist() == [2, 2, 2]


def test_gradients_of_gradients():
    def program(device: str) -> list[Tensor]:
        x = randn(4, device=device, requires_grad=True)
        (first,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [first, second]

    assert_same(program)


def test_gradients_add_up_over_two_backward_passes():
    def program(device: str) -> Tensor:
        x = randn(4, device=device, requires_grad=True)
        y = x.square().sum()
        y.backward(retain_graph=True)
        y.backward()
        return x.grad

    assert_same(program)


def test_inference_mode_and_no_grad():
    def program(device: str) -> list[Tensor]:
        model = MLP(4, 8, 2).to(device)
        x = randn(3, 4, device=device)
        with torch.inference_mode():
            inside = model(x)
            assert inside.is_inference()
            inside.add_(1)
        with torch.no_grad():
            outside = model(x)
        assert not inside.requires_grad and not outside.requires_grad
        return [inside, outside]

    assert_same(program)


def test_backward_works_in_a_thread_of_its_own():
    grads: list[Tensor] = []

    def work() -> None:
        x = torch.ones(3, device="vgpu:2", requires_grad=True)
        (x * 2).to("vgpu:1").sum().backward()
        grads.append(x.grad)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert grads[0].tolist() == [2, 2, 2]


def test_autocast_runs_products_in_bfloat16_and_reductions_in_float32():
    layer = nn.Linear(4, 4).to("vgpu:1")
    with torch.autocast("vgpu", dtype=torch.bfloat16):
        y = layer(torch.ones(2, 4, device="vgpu:1"))
        assert y.dtype == torch.bfloat16
        assert y.softmax(-1).dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_functional_transforms():
    def program(device: str) -> list[Tensor]:
        x = randn(3, 4, device=device)
        grad = torch.func.grad(lambda x: x.square().sum())(x)
        return [grad, torch.func.vmap(torch.dot)(x, x)]

    assert_same(program)


# Attention.

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": CAUSAL},
        {"attn_mask": torch.zeros(6, 6).masked_fill(~CAUSAL, float("-inf"))},
        {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)},
        {"attn_mask": torch.linspace(-1, 1, 108).view(3, 6, 6)},
        {"dropout_p": 0.3},
        {"dropout_p": 0.3, "is_causal": True},
        {"scale": 0.5},
    ],
    ids=["plain", "causal", "bool", "-inf", "bias", "3 biases", "dropout", "both", "scale"],
)
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (3, 6, 8)], ids=["4D", "3D"])
def test_attention_is_the_cpus_forward_and_backward(shape: tuple[int, ...], options: dict):
    def program(device: str) -> list[Tensor]:
        inputs = [randn(*shape, device=device, requires_grad=True) for _ in range(3)]
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(*inputs, **moved)
        out.square().sum().backward()
        return [out, *(x.grad for x in inputs)]

    assert_same(program)


def test_attention_with_a_learned_bias():
    def program(device: str) -> list[Tensor]:
        query, key, value = (randn(2, 3, 6, 8, device=device) for _ in range(3))
        bias = torch.zeros(6, 6, device=device, requires_grad=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out.square().sum().backward()
        return [out, bias.grad]

    assert_same(program)


def test_attention_where_queries_share_keys():
    def program(device: str) -> list[Tensor]:
        query = randn(2, 4, 6, 8, device=device, requires_grad=True)
        key, value = (randn(2, 2, 6, 8, device=device, requires_grad=True) for _ in range(2))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out.square().sum().backward()
        return [out, query.grad, key.grad, value.grad]

    assert_same(program)


def test_attention_checks_that_its_inputs_share_a_device():
    query, key = torch.ones(1, 2, 4, 8, device="vgpu:0"), torch.ones(1, 2, 4, 8, device="vgpu:1")
    with pytest.raises(RuntimeError, match="found at least two devices, vgpu:0 and vgpu:1!"):
        F.scaled_dot_product_attention(query, key, key)


# Errors, in CUDA's words.

TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, "


@pytest.mark.parametrize(
    ("one", "other"), [("vgpu:0", "vgpu:1"), ("vgpu:2", "cpu"), ("cpu", "vgpu:3")]
)
@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.add_(y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch.stack([x, x, y]),
        lambda x, y: F.linear(x, y),
        lambda x, y: torch._foreach_add([x, x], [y, y]),
    ],
)
def test_mixing_devices_raises_cudas_message(mix: Callable, one: str, other: str):
    x, y = torch.ones(3, 3, device=one), torch.ones(3, 3, device=other)
    with pytest.raises(RuntimeError) as caught:
        mix(x, y)
    assert str(caught.value).startswith(TWO_DEVICES)
    assert one in str(caught.value) and other in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_and_a_batch_on_two_devices_raise_cudas_message():
    model = MLP(4, 2).to("vgpu:0")
    with pytest.raises(RuntimeError, match=TWO_DEVICES + "vgpu:[01] and vgpu:[01]!"):
        model(torch.ones(2, 4, device="vgpu:1"))
    with pytest.raises(RuntimeError, match=TWO_DEVICES + "(vgpu:0 and cpu|cpu and vgpu:0)!"):
        model(torch.ones(2, 4))


def test_index_tensors_of_another_gpu_are_refused():
    x, index = torch.ones(3, device="vgpu:0"), torch.tensor([0], device="vgpu:1")
    with pytest.raises(RuntimeError, match=r"as the indexed tensor \(vgpu:0\)"):
        x[index]


def test_a_device_that_does_not_exist_is_named_with_those_that_do():
    for make in (
        lambda: torch.zeros(2, device="vgpu:4"),
        lambda: torch.zeros(2).to("vgpu:4"),
        lambda: torch.zeros(2, device="vgpu:0").to("vgpu:4"),
        lambda: torch.tensor([1.0], device="vgpu:4"),
        lambda: nn.Linear(2, 2).to("vgpu:4"),
    ):
        with pytest.raises(RuntimeError) as caught:
            make()
        message = str(caught.value)
        assert "vgpu:4 does not exist" in message
        assert "4 virtual GPUs" in message and "vgpu:3" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.numpy(),
        lambda x: x.__array__(),
        lambda x: __import__("numpy").asarray(x),
        lambda x: __import__("numpy").add(x, 1),
    ],
)
def test_numpy_asks_for_cpu_first(read: Callable):
    x = torch.ones(2, device="vgpu:1")
    with pytest.raises(TypeError) as caught:
        read(x)
    assert str(caught.value) == (
        "can't convert vgpu:1 device type tensor to numpy. "
        "Use Tensor.cpu() to copy the tensor to host memory first."
    )
    assert x.numpy(force=True).tolist() == [1, 1]
    assert x.cpu().numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: torch.rand(2, device="vgpu:1", generator=generator),
        lambda generator: torch.zeros(2, device="vgpu:1").normal_(generator=generator),
        lambda generator: torch.randperm(4, device="vgpu:1", generator=generator),
    ],
)
def test_a_generator_of_the_host_is_refused(draw: Callable):
    with pytest.raises(RuntimeError, match="Expected a 'vgpu' device type for generator") as caught:
        draw(torch.Generator())
    assert "torch.manual_seed" in str(caught.value)


def test_sparse_tensors_are_refused_in_one_line():
    with pytest.raises(NotImplementedError, match="dense"):
        torch.eye(3, device="vgpu:1").to_sparse()


@pytest.mark.parametrize("kind", ["tensor", "leaf", "module"])
def test_an_error_in_a_hook_arrives_as_it_was_raised(kind: str):
    layer = nn.Linear(3, 3).to("vgpu:1")
    x = torch.ones(2, 3, device="vgpu:1", requires_grad=True)
    y = layer(x)
    if kind == "tensor":
        handle = y.register_hook(_raise)
    elif kind == "leaf":
        handle = layer.weight.register_post_accumulate_grad_hook(_raise)
    else:
        handle = layer.register_full_backward_hook(lambda module, into, out: _raise(into))
        y = layer(x)
    with pytest.raises(LookupError, match="from a hook"):
        y.sum().backward()
    handle.remove()
    x.grad = None
    (x * 2).sum().backward()  # the next backward pass knows nothing of it
    assert x.grad.tolist() == [[2, 2, 2], [2, 2, 2]]


def _raise(grad: Any) -> None:
    raise LookupError("from a hook")


def test_a_checkpoint_that_recomputes_something_else_says_so():
    calls: list[int] = []

    def fickle(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp().sin() if len(calls) == 1 else x.exp()

    x = torch.ones(3, device="vgpu:1", requires_grad=True)
    loss = checkpoint(fickle, x, use_reentrant=False).sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_devices_that_do_not_fit_in_backward_raise_too():
    class Forget(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.ones(3, device="vgpu:2")

    x = torch.ones(3, device="vgpu:1", requires_grad=True)
    with pytest.raises(RuntimeError, match="vgpu:1 and vgpu:2"):
        Forget.apply(x).sum().backward()


def test_torch_accelerator_knows_the_devices(vgpus: Devices):
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator().type == "vgpu"
    assert torch.accelerator.device_count() == 4


def test_the_course_can_be_asked_for_more_devices_later():
    x = torch.ones(3, device="vgpu:3")
    course_lib.devices(6)
    assert (x.to("vgpu:5") + 1).tolist() == [2, 2, 2]
