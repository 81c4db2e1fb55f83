"""Models that no one here wrote train on virtual GPUs as they train on the CPU.

A transformer with rotary positions and shared keys (x-transformers), a temporal convolutional
network with weight normalisation (pytorch-tcn), an ordinary differential equation solved by an
adaptive method (torchdiffeq), and PyTorch's own encoder and decoder. Each takes three steps of
AdamW on the CPU, on one device, and with its layers spread over four: losses and parameters are
equal, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_tcn import TCN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchdiffeq import odeint, odeint_adjoint
from x_transformers import Decoder, TransformerWrapper

import course_lib

Devices = list[torch.device]


class Case(NamedTuple):
    """A model, the parts of it that may each be on a device of their own, and its task."""

    build: Callable[[float], nn.Module]  # takes the probability of dropout
    parts: Callable[[nn.Module], list[nn.Module]] | None
    batch: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]


def _decoder(dropout: float) -> nn.Module:
    layers = Decoder(
        dim=16,
        depth=3,
        heads=4,
        attn_kv_heads=2,
        attn_dim_head=8,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_glu=True,
        attn_dropout=dropout,
        ff_dropout=dropout,
    )
    return TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=layers)


def _next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


class Spiral(nn.Module):
    """The right side of dy/dt = f(y), as in the solver's own examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y**3)


def _solved_by(solve: Callable) -> Callable[..., Tensor]:
    def loss(model: nn.Module, start: Tensor, path: Tensor) -> Tensor:
        times = torch.linspace(0, 1, 5, device=start.device)
        return (solve(model, start, times, rtol=1e-4, atol=1e-4) - path).abs().mean()

    return loss


CASES = {
    "x-transformers": Case(
        build=_decoder,
        parts=lambda model: [layer[1] for layer in model.attn_layers.layers],
        batch=lambda: (torch.randint(0, 11, (3, 9)),),
        loss=_next_token_loss,
    ),
    "pytorch-tcn": Case(
        build=lambda dropout: TCN(3, [6, 6, 4], kernel_size=3, dropout=dropout),
        parts=lambda model: list(model.network),
        batch=lambda: (torch.randn(4, 3, 20), torch.randn(4, 4, 20)),
        loss=lambda model, x, y: F.mse_loss(model(x), y),
    ),
    "torchdiffeq": Case(
        build=lambda dropout: Spiral(),
        parts=lambda model: [model.layers[0], model.layers[2]],
        batch=lambda: (torch.randn(6, 2), torch.randn(5, 6, 2)),
        loss=_solved_by(odeint),
    ),
    "torchdiffeq, adjoint": Case(
        build=lambda dropout: Spiral(),
        parts=None,  # it puts all parameters into one row, so they must share a device
        batch=lambda: (torch.randn(6, 2), torch.randn(5, 6, 2)),
        loss=_solved_by(odeint_adjoint),
    ),
    "torch.nn.Transformer": Case(
        build=lambda dropout: nn.Transformer(16, 2, 2, 2, 32, dropout, batch_first=True),
        parts=lambda model: [*model.encoder.layers, *model.decoder.layers],
        batch=lambda: (torch.randn(3, 5, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 16)),
        loss=lambda model, source, target, y: F.mse_loss(model(source, target), y),
    ),
}


def train(case: Case, device: str, spread: Devices = (), dropout: float = 0.0) -> list[Tensor]:
    """The losses of three steps, then the parameters."""
    torch.manual_seed(0)
    model = case.build(dropout).to(device)
    for number, part in enumerate(case.parts(model) if spread else []):
        place(part, spread[number % len(spread)], device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        batch = [tensor.to(device) for tensor in case.batch()]
        torch.manual_seed(step)  # the device's dice, like the CPU's, start here
        optimizer.zero_grad()
        loss = case.loss(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return [tensor.detach().cpu() for tensor in (*losses, *model.parameters())]


def place(part: nn.Module, device: torch.device, home: str) -> None:
    """Put ``part`` on ``device``: what it is called with goes there, what it returns goes home."""

    def there(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return moved((args, kwargs), device)

    part.to(device)
    part.register_forward_pre_hook(there, with_kwargs=True)
    part.register_forward_hook(lambda module, args, out: moved(out, home))


def moved(tree: Any, device: torch.device | str) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_model_trains_on_one_device_as_on_the_cpu(name: str, vgpus: Devices):
    for one, other in zip(
        train(CASES[name], "vgpu:1", dropout=0.1),
        train(CASES[name], "cpu", dropout=0.1),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.parts])
def test_a_foreign_model_trains_spread_over_devices_as_on_the_cpu(name: str, vgpus: Devices):
    before = [course_lib.memory_in_use(device) for device in vgpus]
    spread = train(CASES[name], "vgpu:0", spread=vgpus[1:])
    peaks = [course_lib.peak_memory(device) for device in vgpus]
    assert sum(peak > held for peak, held in zip(peaks, before, strict=True)) >= 3
    for one, other in zip(spread, train(CASES[name], "cpu"), strict=True):
        assert torch.equal(one, other)
