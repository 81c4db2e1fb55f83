"""The kinds of values that the methods pass around, each named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Devices = Sequence[torch.device]

# A value on several devices: one tensor a device.
Tensors = Sequence[Tensor]

# Makes the mean loss, a scalar, of (outputs, targets).
Loss = Callable[[Tensor, Tensor], Tensor]

# Makes an optimizer for parameter groups, dictionaries as all of PyTorch's optimizers take them.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

# What a parameter's group says beside "params", given its name in the model and the parameter.
OptionsOf = Callable[[str, nn.Parameter], dict[str, Any]]
