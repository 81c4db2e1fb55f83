"""How much of a batch's gradient is noise, and from which batch size on more examples help little.

The gradient of a batch is the mean of its examples' gradients. Around the true gradient G these
scatter with a covariance whose trace is V, and the mean of B independent ones with V / B. So what
one measures is, on average::

    squared norm of a batch's gradient = |G|² + V / B

Two batch sizes make two equations, and give ``|G|²`` and V. Their ratio, ``V / |G|²``, is the
*simple noise scale* of McCandlish and others, "An empirical model of large-batch training" (2018):
at a batch of that size, noise and gradient are equally long. In data parallelism both norms cost
next to nothing: each device has the gradient of a small batch before the all-reduce, and of a large
one after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.kinds import Tensors


class Noise(NamedTuple):
    """What gradients are made of.

    Attributes:
        signal: ``|G|²``, the squared norm of the true gradient. An estimate may be below zero.
        variance: V, the trace of the covariance of one example's gradient.
    """

    signal: float
    variance: float

    @property
    def scale(self) -> float:
        """``V / |G|²``, a number of examples; infinite where the signal drowns."""
        return self.variance / self.signal if self.signal > 0 else float("inf")


def from_two_batches(small: int, small_norm: float, large: int, large_norm: float) -> Noise:
    """Solve the two equations: of batches of ``small`` and ``large`` examples.

    Args:
        small_norm, large_norm: the *squared* norm of each batch's gradient, or a mean of several.

    Raises:
        ValueError: the sizes are not two, in this order, from 1 on.
    """
    if not 1 <= small < large:
        raise ValueError(f"two batch sizes, the smaller one first, are needed: {small}, {large}")
    variance = (small_norm - large_norm) / (1 / small - 1 / large)
    return Noise(large_norm - variance / large, variance)


def mean_and_noise(rows: Tensors, shard: int) -> Noise:
    """Replace each device's gradient by the mean of all, and say how much of it is noise.

    Besides the all-reduce, each device sends one number to the first.

    Args:
        rows: the gradient of each device's ``shard`` examples, in a row; at least two.

    Raises:
        ValueError: there is only one device, or what :func:`ring_all_reduce` refuses.
    """
    if len(rows) < 2:
        raise ValueError("noise is seen between devices, and there is one")
    home = rows[0].device
    own = torch.stack([row.square().sum().to(home) for row in rows]).mean()
    ring_all_reduce(rows)
    for row in rows:
        row.div_(len(rows))
    small_norm, large_norm = torch.stack([own, rows[0].square().sum()]).tolist()
    return from_two_batches(shard, small_norm, shard * len(rows), large_norm)


def over_steps(noises: Iterable[Noise]) -> Noise:
    """The mean of both parts over several steps, for a ratio of means.

    A single step's ratio is of little use: its signal is often near zero, or below.
    """
    noises = list(noises)
    signal = sum(each.signal for each in noises) / len(noises)
    variance = sum(each.variance for each in noises) / len(noises)
    return Noise(signal, variance)
