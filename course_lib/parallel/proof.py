"""Is it the same training? How far apart two models, or two gradients, are."""

from __future__ import annotations

import torch
from torch import nn


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between any number in the parameters of two models.

    Raises:
        ValueError: the models do not have parameters of the same names and shapes.
    """
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if {name: p.shape for name, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("the two models have different parameters and cannot be compared")
    differences = [
        (ours[name].detach().cpu() - theirs[name].detach().cpu()).abs().max().double()
        for name in ours
    ]
    return torch.stack(differences).max().item()  # unlike Python's max, it does not lose a NaN
