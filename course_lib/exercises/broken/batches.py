"""What the broken programs of lesson 15 are tried on: small, and learnt in a few steps."""

from __future__ import annotations

import torch
from torch import Tensor

Batches = list[tuple[Tensor, Tensor]]  # inputs and targets, on the host
VOCABULARY = 12


def points(steps: int, size: int = 24) -> Batches:
    """Points in sixteen dimensions, of four classes that a linear layer can tell apart."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(16, 4, generator=generator)
    xs = torch.randn(size, 16, generator=generator), torch.randn(size, 16, generator=generator)
    pairs = [(x, (x @ classes).argmax(dim=1)) for x in xs]
    return [pairs[0] if step % 2 == 0 else pairs[1] for step in range(steps)]


def one_epoch(steps: int) -> Batches:
    """The same points in every epoch."""
    return points(1, size=48) * steps


def passages(steps: int, size: int = 6, length: int = 16) -> Batches:
    """Passages in which the next token follows from this one alone."""
    generator = torch.Generator().manual_seed(1)
    after = torch.randperm(VOCABULARY, generator=generator)
    x = torch.randint(VOCABULARY, (size, length), generator=generator)
    return [(x, after[x])] * steps


def padded(steps: int, *lengths: int) -> Batches:
    """Passages of these lengths, the shorter ones padded."""
    pairs = passages(steps, len(lengths), max(lengths))
    _, y = pairs[0]
    for row, length in enumerate(lengths):
        y[row, length:] = -100
    return pairs
