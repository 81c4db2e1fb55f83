"""``nn.TransformerEncoder`` packs padded sequences into nested tensors; virtual GPUs hold none.

So in evaluation too the padding stays, as it does in training.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn

from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    forward = nn.TransformerEncoder.forward

    @wraps(forward)
    def forward_padded(
        self: nn.TransformerEncoder, src: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not isinstance(src, VirtualTensor):
            return forward(self, src, *args, **kwargs)
        packs, self.use_nested_tensor = self.use_nested_tensor, False
        try:
            return forward(self, src, *args, **kwargs)
        finally:
            self.use_nested_tensor = packs

    nn.TransformerEncoder.forward = forward_padded
