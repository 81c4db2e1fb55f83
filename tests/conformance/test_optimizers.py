"""Every optimiser of ``torch.optim`` steps on a virtual GPU as it steps on the CPU.

The database (``torch.testing._internal.common_optimizers.optim_db``) holds for each optimiser the
options that PyTorch itself tests it with. Each takes two steps with one small model, in a loop over
the parameters, with the operators for lists (``foreach``) and with the fused ones where there are
any: the parameters and the optimiser's own tensors must be equal, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from conformance.database import OPTIMIZERS
from conformance.equality import differences, seed
from conformance.exceptions import Kind, kind_of

DEVICE = "vgpu:1"


def _cases() -> list[Any]:
    """Every option of every optimiser, in every way of computing it that it has on the CPU."""
    cases = []
    for name, info in OPTIMIZERS.items():
        if kind_of(name) is Kind.REFUSED:
            continue
        ways = {"loop": {}}
        if "foreach" in info.supported_impls:
            ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
        if "cpu" in info.supports_fused_on:
            ways["fused"] = {"fused": True}
        for entry in info.optim_inputs_func("cpu"):
            for way, options in ways.items():
                case_id = f"{name}-{entry.desc}-{way}"
                cases.append(pytest.param(name, {**entry.kwargs, **options}, id=case_id))
    return cases


@pytest.mark.parametrize(("name", "options"), _cases())
def test_optimizer_steps_as_on_the_cpu(name: str, options: dict[str, Any]) -> None:
    try:
        expected = _train(name, options, "cpu")
    except ValueError as refusal:  # a combination that the optimiser does not offer
        with pytest.raises(ValueError) as caught:
            _train(name, options, DEVICE)
        assert str(caught.value) == str(refusal)
        return
    actual = _train(name, options, DEVICE)
    assert differences(actual, expected, kind_of(name)) == ""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if kind_of(name) is Kind.REFUSED])
def test_optimizer_is_refused_in_one_clear_line(name: str) -> None:
    layer = nn.Embedding(4, 3, sparse=True).to(DEVICE)
    with pytest.raises(NotImplementedError, match="dense") as caught:
        layer(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    assert "\n" not in str(caught.value)


def test_the_database_has_every_optimizer_of_torch_optim() -> None:
    public = {
        name
        for name in torch.optim.__all__
        if isinstance(kind := getattr(torch.optim, name), type) and issubclass(kind, Optimizer)
    }
    assert public - {"Optimizer"} == set(OPTIMIZERS)


def _train(name: str, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Parameters, losses and the optimiser's state after two steps."""
    seed()
    info = OPTIMIZERS[name]
    # Muon is for matrices only.
    model = nn.Sequential(nn.Linear(4, 5, bias=name != "Muon"), nn.Tanh(), nn.Linear(5, 3, False))
    model.to(device)
    optimizer = info.optim_cls(model.parameters(), **copy.deepcopy(options))
    x, y = torch.randn(6, 4).to(device), torch.randn(6, 3).to(device)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        return loss

    for _ in range(2):
        optimizer.step(closure)
    state = optimizer.state_dict()["state"]
    return {"parameters": list(model.parameters()), "losses": losses, "state": state}
