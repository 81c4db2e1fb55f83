"""All-reduce up and down two binary trees at once, each of which carries half of the tensor.

In one tree the ranks at its leaves only send up once and receive once: half of all ranks, and half
of what their links could do. So there are two trees, and a rank that is a leaf in one is an inner
node of the other (Sanders, Speck and Traff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan", 2009). NCCL's tree between nodes is such a pair. Its latency grows with
log2(N), and that of a ring with N.

Each half is cut into pieces, which follow each other: while one goes down, the next comes up.

On virtual GPUs it is ahead where there are many nodes and few bytes: between 64 nodes of one GPU it
sums 4 kB in less time than a ring, and in half of that of one tree. For large tensors it stays
behind a ring, by 1.7 times: full bandwidth needs a schedule in which no link waits for two pieces
at once, as in the paper, and here they come as the trees have them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from course_lib.hardware import current_stream, side_stream
from course_lib.parallel.collectives import matching, require_contiguous

PIECES = 8  # of each half, if nothing is said


def double_tree_all_reduce(tensors: Iterable[Tensor], pieces: int = PIECES) -> None:
    """Replace each tensor by the sum of all, over two trees.

    With N tensors of S bytes it moves 2 (N - 1) S in all, as any all-reduce here, and no device
    sends or receives more than 2 S. All tensors end up bit-identical.

    Args:
        tensors: one a device, contiguous, of one shape and dtype. Nothing need divide them.
        pieces: into how many each half is cut. More of them overlap better, and each costs a
            latency on every link.

    Raises:
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, one is not contiguous, their shapes or
            dtypes differ, or ``pieces`` is below 1.
    """
    tensors = matching(tensors)
    require_contiguous(tensors)
    if pieces < 1:
        raise ValueError(f"each half is cut into 1 piece or more, not into {pieces!r}")
    count = len(tensors)
    halves = [tensor.view(-1).tensor_split(2) for tensor in tensors]
    trees = [
        _Tree([pair[which] for pair in halves], parents(count, shift), pieces)
        for which, shift in enumerate((0, 1))
    ]
    for number in range(pieces):  # both trees' pieces by turns: neither is always the second
        for tree in trees:
            tree.reduce(number)
            tree.broadcast(number)
    for tree in trees:
        tree.finish()


def parents(count: int, shift: int = 0) -> dict[int, int]:
    """The parent of each rank in a binary tree, but of the root.

    Places 1 to ``count`` form a tree in which odd places are leaves: a place whose lowest set bit
    is b has children b/2 before and behind it. Rank r stands at place r + 1; with ``shift``, that
    many places on, so that the leaves are others.
    """
    found = {}
    for rank in range(count):
        place = (rank + shift) % count + 1
        lowest = place & -place
        parent = (place ^ lowest) | (2 * lowest)
        if parent > count:  # there is no such place: the next one up is before it
            parent = place ^ lowest
        if parent:
            found[rank] = (parent - 1 - shift) % count
    return found


class _Tree:
    """One tree. A rank has four streams: to receive and to send on the way up, and on the way down.

    Args:
        tensors: one a rank, summed in place.
        parents: of each rank but the root.
    """

    def __init__(self, tensors: list[Tensor], parents: dict[int, int], pieces: int) -> None:
        self.pieces = [tensor.tensor_split(pieces) for tensor in tensors]
        self.parents = parents
        self.order = leaves_first(parents, len(tensors))
        devices = [tensor.device for tensor in tensors]
        self.main = [current_stream(device) for device in devices]
        self.sides = [[side_stream(device) for device in devices] for _ in range(4)]
        self.up_in, self.up_out, self.down_in, self.down_out = self.sides
        for streams in self.sides:
            for side, main in zip(streams, self.main, strict=True):
                side.wait_stream(main)

    def reduce(self, number: int) -> None:
        """A piece travels from the leaves to the root and grows by each rank's part."""
        for rank in self.order:
            self.up_out[rank].wait_stream(self.up_in[rank])  # what came from the children
            if rank in self.parents:
                parent = self.parents[rank]
                piece, total = self.pieces[rank][number], self.pieces[parent][number]
                if piece.numel():
                    with self.up_out[rank], self.up_in[parent]:
                        total.add_(piece.to(total.device))

    def broadcast(self, number: int) -> None:
        """The sum travels from the root to the leaves."""
        root = self.order[-1]
        self.down_out[root].wait_stream(self.up_in[root])
        for rank in reversed(self.order):
            if rank in self.parents:
                parent = self.parents[rank]
                piece, total = self.pieces[rank][number], self.pieces[parent][number]
                if piece.numel():
                    with self.down_out[parent], self.down_in[rank]:
                        piece.copy_(total)
            self.down_out[rank].wait_stream(self.down_in[rank])

    def finish(self) -> None:
        """Let the current streams go on after the tree."""
        for streams in self.sides:
            for main, side in zip(self.main, streams, strict=True):
                main.wait_stream(side)


def leaves_first(parents: dict[int, int], count: int) -> list[int]:
    """All ranks, each before its parent."""

    def depth(rank: int) -> int:
        return 1 + depth(parents[rank]) if rank in parents else 0

    return sorted(range(count), key=depth, reverse=True)
