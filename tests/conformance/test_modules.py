"""Every module of PyTorch's own database gives on a virtual GPU what it gives on the CPU.

The database (``torch.testing._internal.common_modules.module_db``) holds for each layer of
``torch.nn`` the arguments that PyTorch itself builds and calls it with. Each is built on the CPU,
copied to ``vgpu:1``, and run forward and backward, for training and for evaluation: output, buffers
and the gradients of parameters and inputs must be equal, bit for bit. ``exceptions.py`` says which
are not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conformance.database import MODULES
from conformance.equality import differences, moved, seed, tensors
from conformance.exceptions import Kind, kind_of

DEVICE = "vgpu:1"

# The database draws where they pool in float64 whatever the dtype, and the CPU insists on one.
FLOAT64 = {"nn.FractionalMaxPool2d", "nn.FractionalMaxPool3d"}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_module_equals_the_cpu(name: str, training: bool) -> None:
    assert problems(MODULES[name], training, kind_of(name)) == []


def problems(info: Any, training: bool, kind: Kind | None) -> list[str]:
    """How the module on a virtual GPU differs from the one on the CPU; empty if it does not."""
    dtype = torch.float64 if info.name in FLOAT64 else torch.float32
    seed()
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    found = []
    for number, module_input in enumerate(inputs):
        seed()
        built = module_input.constructor_input
        on_cpu = info.module_cls(*built.args, **built.kwargs).train(training)
        args, kwargs = moved((built.args, built.kwargs), DEVICE)  # plain attributes too
        on_device = info.module_cls(*args, **kwargs).train(training).to(DEVICE)
        if dtype is torch.float64:
            on_cpu, on_device = on_cpu.double(), on_device.double()
        if not info.is_lazy:
            on_device.load_state_dict(on_cpu.state_dict())
        call = module_input.forward_input
        expected = _run(on_cpu, (call.args, call.kwargs), "cpu")
        try:
            actual = _run(on_device, (call.args, call.kwargs), DEVICE)
        except Exception as error:
            found.append(f"input {number}: {type(error).__name__}: {error}")
            continue
        for part in expected:
            difference = differences(actual[part], expected[part], kind)
            if difference:
                found.append(f"input {number}: {part}: {difference}")
        if any(str(leaf.device) != DEVICE for leaf in tensors(actual)):
            found.append(f"input {number}: the result is not on {DEVICE}")
    return found


def _run(module: nn.Module, call: tuple[tuple, dict], device: str) -> dict[str, Any]:
    """The module's output and buffers, and the gradient of every parameter and input."""
    args, kwargs = moved(call, device)
    seed()
    out = module(*args, **kwargs)
    inputs = [leaf for leaf in tensors((args, kwargs)) if leaf.requires_grad]
    inputs += [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs = [leaf for leaf in tensors(out) if leaf.requires_grad]
    result = {"output": out, "buffers": dict(module.named_buffers())}
    if inputs and outputs:
        seed()
        weights = [torch.randn(leaf.shape, dtype=leaf.dtype).to(device) for leaf in outputs]
        result["gradients"] = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return result
