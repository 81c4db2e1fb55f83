"""A model that was used moves as a whole, and its parameters stay the objects that they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import course_lib

pytestmark = pytest.mark.usefixtures("vgpus")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    "recurrent": lambda: nn.GRU(4, 4),
}


def first(out: torch.Tensor | tuple) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_used_moves_as_a_whole(name: str):
    model, x = MODELS[name](), torch.randn(3, 2, 4)
    parameters = list(model.parameters())
    expected = first(model(x))  # kept, and its graph with it
    for device in ("vgpu:0", "vgpu:1", "cpu", "vgpu:2"):
        model.to(device)
        assert [p.device.type for p in parameters] == [torch.device(device).type] * len(parameters)
        assert all(now is was for now, was in zip(model.parameters(), parameters, strict=True))
        out = first(model(x.to(device)))
        assert torch.allclose(out.cpu(), expected, atol=1e-6)


def test_a_model_moves_between_forward_and_backward_with_its_gradients():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    model(x).sum().backward()
    model.weight.tag = "mine"
    expected = model.weight.grad.clone()
    model(x)
    model.to("vgpu:1")
    assert model.weight.tag == "mine"
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.grad.device == torch.device("vgpu:1")
    assert torch.equal(model.weight.grad.cpu(), expected)


def test_a_gradient_moves_once_and_stays_the_object_that_it_was():
    model = nn.Linear(3, 3, bias=False)
    model(torch.randn(2, 3)).sum().backward()
    gradient = model.weight.grad
    for device in ("vgpu:1", "vgpu:0", "cpu"):
        with course_lib.trace() as timeline:
            model.to(device)
        assert [span.name for span in timeline.spans] == ["copy", "copy"]
        assert model.weight.grad is gradient
        assert gradient.device == model.weight.device == torch.device(device)


def test_an_optimizer_made_before_the_move_goes_on():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3))
    model.to("vgpu:0")
    before = model.weight.detach().clone()
    model(torch.randn(2, 3, device="vgpu:0")).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_tied_weights_stay_tied_after_a_forward_and_a_move():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    model(torch.tensor([1, 2]))
    model.to("vgpu:3")
    assert head.weight is embedding.weight
    assert head.weight.device == torch.device("vgpu:3")


@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_a_model_on_the_cpu_that_was_used_changes_dtype(cast: Callable):
    model = nn.Linear(3, 3)
    out = model(torch.randn(2, 3))
    weight = model.weight
    cast(model)
    assert model.weight is weight
    assert model.weight.dtype != out.dtype


def test_moving_a_model_frees_the_device_that_it_leaves():
    model = nn.Linear(3, 3).to("vgpu:0")
    model(torch.randn(2, 3, device="vgpu:0"))
    model.to("vgpu:1")
    assert course_lib.memory_in_use(torch.device("vgpu:0")) == 0
