"""Recurrent layers on virtual GPUs: one operator each, with the CPU's numbers."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import course_lib

KINDS = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])


def layer_and_input(kind: type[nn.Module], device: str, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, **options).to(device)
    x = torch.randn(5, 2, 3).to(device).requires_grad_()
    torch.manual_seed(1)  # from here on only the device rolls its dice
    return layer, x


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@KINDS
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"bidirectional": True}])
def test_a_layer_equals_the_cpus_to_the_last_bit(kind, options, vgpus):
    def program(device: str) -> list[Tensor]:
        layer, x = layer_and_input(kind, device, **options)
        out, _ = layer(x)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in layer.parameters())]

    assert_equal(program("vgpu:1"), program("cpu"))


@KINDS
def test_packed_sequences_equal_the_cpus(kind, vgpus):
    def program(device: str) -> list[Tensor]:
        layer, x = layer_and_input(kind, device)
        out, _ = layer(nn.utils.rnn.pack_padded_sequence(x, [5, 3]))
        out.data.square().sum().backward()
        return [out.data, x.grad, *(p.grad for p in layer.parameters())]

    assert_equal(program("vgpu:1"), program("cpu"))


@KINDS
def test_backward_twice_and_a_checkpoint_give_the_same_gradients(kind, vgpus):
    layer, x = layer_and_input(kind, "vgpu:1", dropout=0.5)
    loss = layer(x)[0].square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    layer, x = layer_and_input(kind, "vgpu:1", dropout=0.5)
    torch.vgpu.manual_seed_all(1)
    with torch.autograd.graph.save_on_cpu():
        loss = layer(x)[0].square().sum()
    (moved,) = torch.autograd.grad(loss, x)
    assert_equal([first, first], [second, moved])
    layer, x = layer_and_input(kind, "vgpu:1")
    (plain,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert_equal([plain], list(torch.autograd.grad(again.square().sum(), x)))


@KINDS
def test_gradients_of_gradients_are_those_of_the_cpu_or_refused(kind, vgpus):
    def program(device: str, dropout: float) -> Tensor:
        layer, x = layer_and_input(kind, device, dropout=dropout)
        (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with torch.backends.mkldnn.flags(enabled=False):  # which has no such gradients
        expected = program("cpu", 0.0)
    assert torch.allclose(program("vgpu:1", 0.0).cpu(), expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match="with dropout: use dropout=0"):
        program("vgpu:1", 0.5)


def test_training_keeps_the_gates_until_backward_and_evaluation_nothing(vgpus):
    layer, x = layer_and_input(nn.LSTM, "vgpu:1")
    with torch.no_grad():
        layer(x)
    before = course_lib.memory_in_use(vgpus[1])
    out, (state, cell) = layer(x)
    outputs = 4 * (out.numel() + state.numel() + cell.numel())
    zeros = 2 * 4 * state.numel()  # the first state and cell
    gates_state_output = 2 * (4 * 4 + 2 * 4) * 10 * 4  # for 2 layers and 10 inputs, in float32
    assert course_lib.memory_in_use(vgpus[1]) - before == outputs + zeros + gates_state_output
    out.sum().backward()
    del out, state, cell
    grads = 4 * (x.numel() + sum(p.numel() for p in layer.parameters()))
    assert course_lib.memory_in_use(vgpus[1]) - before == grads


@KINDS
def test_a_state_on_another_device_is_refused(kind, vgpus):
    layer, x = layer_and_input(kind, "vgpu:1")
    state = torch.zeros(2, 2, 4)
    with pytest.raises(RuntimeError, match="same device"):
        layer(x, (state, state) if kind is nn.LSTM else state)


@KINDS
def test_autocast_and_inference_mode_run_layers_too(kind, vgpus):
    layer, x = layer_and_input(kind, "vgpu:1")
    expected = layer(x)[0]
    with torch.inference_mode():
        inferred = layer(x)[0]
    assert torch.allclose(inferred.cpu(), expected.cpu(), atol=1e-6)
    with torch.autocast("vgpu", dtype=torch.bfloat16):
        assert torch.allclose(layer(x)[0].float().cpu(), expected.cpu(), atol=0.05)


def test_the_products_of_a_layer_are_charged_by_formula(vgpus):
    layer, x = layer_and_input(nn.GRU, "vgpu:1")
    with course_lib.trace() as trace:
        layer(x)[0].sum().backward()
    flops = {span.name: span.flops for span in trace.spans if span.name.startswith("gru")}
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert flops == {"gru": 2 * 10 * weights, "gru_backward": 4 * 10 * weights}
