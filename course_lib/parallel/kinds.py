"""The kinds of values that the methods pass around, each named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Devices = Sequence[torch.device]

# A value on several devices: one tensor a device.
Tensors = Sequence[Tensor]

# Makes the mean loss, a scalar, of (outputs, targets).
Loss = Callable[[Tensor, Tensor], Tensor]
