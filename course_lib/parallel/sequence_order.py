"""Which device has which tokens of a sequence, and which blocks of queries and keys meet.

    contiguous    0 0 1 1 2 2 3 3
    zigzag        0 1 2 3 3 2 1 0

With a causal mask the last tokens have the most to look at. In zigzag order, Megatron-LM's, each
device has an early and a late chunk, and all have equally much to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import torch
from torch import Tensor

from course_lib.parallel.counting import CountedShards
from course_lib.parallel.kinds import Devices, Tensors

# Where in the sequence a piece of a chunk begins, and where on its device it is.
Tile = tuple[int, slice]


class SequenceParts(CountedShards):
    """A sequence in parts, one a device, that know in which order its tokens were dealt out.

    Attributes:
        zigzag: as :func:`split_sequence` took it.
        counts: for each part what a mean loss counts in it, if these are targets.
    """

    def __init__(self, parts: Tensors, devices: Devices, zigzag: bool) -> None:
        super().__init__(parts, devices)
        self.zigzag = zigzag


def positions(length: int, count: int, rank: int, zigzag: bool = True) -> Tensor:
    """Where in a sequence of ``length`` the tokens of device ``rank`` of ``count`` are.

    In zigzag order the sequence has 2N chunks, and device r the chunks r and 2N - 1 - r.

    Raises:
        ValueError: the sequence does not divide into equal chunks, or there is no such device.
    """
    if rank not in range(count):
        raise ValueError(f"there is no device {rank} among {count}: they count from 0")
    chunk_count = 2 * count if zigzag else count
    if length % chunk_count:
        raise ValueError(
            f"a sequence of {length} tokens does not divide into {chunk_count} equal chunks, "
            f"{chunk_count // count} for each of {count} device(s): pad it or cut it shorter"
        )
    chunks = torch.arange(length).view(chunk_count, -1)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if zigzag else chunks[rank]


def order_of(parts: Tensors) -> bool:
    """Whether parts are in zigzag order; those that do not say are taken to be."""
    return parts.zigzag if isinstance(parts, SequenceParts) else True


def require_order(parts: Tensors, zigzag: bool) -> None:
    """Refuse parts that are in another order; those that do not say are taken at their word.

    Raises:
        ValueError: they are.
    """
    if isinstance(parts, SequenceParts) and parts.zigzag != zigzag:
        raise ValueError(
            f"a sequence that was split with zigzag={parts.zigzag} is taken here for one with "
            f"zigzag={zigzag}: give both the same"
        )


def tiles_of(count: int, T: int, rank: int, zigzag: bool, size: int) -> list[Tile]:
    """Cut each chunk that a device has into pieces of at most ``size`` of its T tokens."""
    own = positions(count * T, count, rank, zigzag).tolist()
    chunk = T // 2 if zigzag else T
    edges = [*range(0, chunk, size), *range(chunk, T, size), T]
    return [(own[first], slice(first, end)) for first, end in pairwise(edges)]


def meetings(
    tiles: list[list[Tile]], causal: bool, step: int
) -> Iterator[tuple[int, slice, slice, bool]]:
    """What there is to compute when each block of keys is ``step`` devices from home.

    With a causal mask, tiles of keys that come after the queries are skipped, and those before
    them are seen whole. Only where both are the same tile is there something to mask.

    Args:
        tiles: of each device.

    Yields:
        A device, some of its queries, some of the keys that it has there, and whether each of the
        queries sees only some of the keys.
    """
    for rank, own in enumerate(tiles):
        for (i, queries), (j, keys) in product(own, tiles[rank - step]):
            if j <= i or not causal:
                yield rank, queries, keys, causal and i == j
