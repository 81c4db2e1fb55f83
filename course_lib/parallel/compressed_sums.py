"""Sums over devices with fewer bytes on the links: fewer digits, a byte a number, or few numbers.

Each takes the rows of all devices (one tensor a device, such as all gradients in a row) and
replaces each by the sum of all, nearly. What a device could not say this time it remembers, and
adds to what it says the next time: *error feedback* (Seide and others, "1-bit stochastic gradient
descent", 2014; Karimireddy and others, "Error feedback fixes SignSGD", 2019). So over many steps
nothing is lost, and each sum that is wrong in one step is made up for in a later one.

All tensors of a sum end up bit-identical, so that replicas stay so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course_lib.parallel.collectives import all_gather, matching, ring_all_reduce
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.node_collectives import all_to_all

SumRows = Callable[[Tensors], None]


class ErrorFeedback:
    """What each device still owes: the sum of all that it has left out so far.

    Attributes:
        owed: one tensor a device, zeros at first.
    """

    def __init__(self) -> None:
        self.owed: list[Tensor] = []

    def add_to(self, rows: Tensors) -> list[Tensor]:
        """The rows, and with each what its device owes.

        Raises:
            ValueError: they are no rows, or there were other rows before.
        """
        if rows[0].dim() != 1:
            raise ValueError(
                "a compressed sum takes rows, of one dimension, and these have the shape "
                f"{tuple(rows[0].shape)}: flatten them"
            )
        if not self.owed:
            self.owed = [torch.zeros_like(row) for row in rows]
        if [row.shape for row in rows] != [owed.shape for owed in self.owed]:
            raise ValueError(
                "a compressed sum remembers what it left out of each row, and these rows are of "
                "other shapes or another number than before: make a new one"
            )
        return [row + owed for row, owed in zip(rows, self.owed, strict=True)]

    def note(self, wanted: Tensors, said: Tensors) -> None:
        """Remember the difference between what was to be said and what was."""
        self.owed = [want - say for want, say in zip(wanted, said, strict=True)]


class Bfloat16Sums:
    """Half the bytes: a ring of bfloat16. What each rounding on the way loses is not fed back."""

    def __init__(self) -> None:
        self.feedback = ErrorFeedback()

    def __call__(self, rows: Tensors) -> None:
        """Replace each row by the sum of all; raises what :func:`matching` does."""
        rows = matching(rows)
        wanted = self.feedback.add_to(rows)
        short = [want.to(torch.bfloat16) for want in wanted]
        self.feedback.note(
            wanted, [each.to(want) for each, want in zip(short, wanted, strict=True)]
        )
        ring_all_reduce(short)
        for row, total in zip(rows, short, strict=True):
            row.copy_(total)


class Int8Sums:
    """A quarter of the bytes: a byte a number, and one scale a chunk.

    Bytes cannot be added on the way, or they would overflow. So each device sends chunk r to rank
    r, which adds in float32, rounds the sum to a byte again, and sends it to all. Both roundings
    are fed back, the second one by the rank that made it, as in 1-bit Adam (Tang and others, 2021).
    """

    def __init__(self) -> None:
        self.feedback = ErrorFeedback()
        self.of_sums = ErrorFeedback()

    def __call__(self, rows: Tensors) -> None:
        """Replace each row by the sum of all; raises what :func:`matching` does."""
        rows = matching(rows)
        count = len(rows)
        wanted = self.feedback.add_to(rows)
        coded = [[_to_bytes(chunk) for chunk in want.tensor_split(count)] for want in wanted]
        self.feedback.note(wanted, [torch.cat([_from_bytes(c) for c in row]) for row in coded])
        arrived = all_to_all(coded)
        sums = [torch.stack([_from_bytes(part) for part in parts]).sum(0) for parts in arrived]
        sums = self.of_sums.add_to(sums)
        coded_sums = [_to_bytes(each) for each in sums]
        self.of_sums.note(sums, [_from_bytes(each) for each in coded_sums])
        lengths = [len(each) for each in coded_sums]
        for row, everything in zip(rows, all_gather(coded_sums), strict=True):
            parts = everything.split(lengths)
            torch.cat([_from_bytes(part) for part in parts], out=row)


def _to_bytes(numbers: Tensor) -> Tensor:
    """One byte for each number, and behind them the four of their scale."""
    largest = numbers.abs().amax() if numbers.numel() else numbers.new_zeros(())
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    coded = (numbers / scale).round().to(torch.int8)
    return torch.cat([coded, scale.float().reshape(1).view(torch.int8)])


def _from_bytes(coded: Tensor) -> Tensor:
    # The scale starts anywhere in the row; to be read as a float32 it must start afresh.
    scale = coded[-4:].clone().view(torch.float32)
    return coded[:-4] * scale


class TopKSums:
    """The largest numbers of each device alone, and where they stand: 8 bytes for each of them.

    Args:
        fraction: how many of a row's numbers a device sends, from 0 to 1; at least one.

    Raises:
        ValueError: ``fraction`` is not in that range.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is above 0 and at most 1, not {fraction}")
        self.fraction = fraction
        self.feedback = ErrorFeedback()

    def __call__(self, rows: Tensors) -> None:
        """Replace each row by the sum of all; raises what :func:`matching` does."""
        rows = matching(rows)
        wanted = self.feedback.add_to(rows)
        count = min(len(rows[0]), max(1, round(self.fraction * len(rows[0]))))
        places = [want.abs().topk(count).indices for want in wanted]
        values = [want[place] for want, place in zip(wanted, places, strict=True)]
        said = [
            torch.zeros_like(want).index_copy(0, place, value)
            for want, place, value in zip(wanted, places, values, strict=True)
        ]
        self.feedback.note(wanted, said)
        sent = all_gather([place.to(torch.int32) for place in places])
        for row, place, value in zip(rows, sent, all_gather(values), strict=True):
            row.zero_().index_add_(0, place, value)
