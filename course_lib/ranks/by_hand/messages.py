"""Messages between two ranks, and the ring all-reduce that is made of them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**21  # numbers that arrive before they are added: 8 MB of float32


def exchange(out: Tensor, to: int, into: Tensor, source: int) -> None:
    """Send ``out`` to one rank while ``into`` is received from another; afterwards both are done.

    Neither waits for the other, so ranks that all call it cannot end in a deadlock. Both are posted
    together: over NCCL, two that are posted one after the other might wait for each other.
    """
    ops = [dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def ring_all_reduce(tensor: Tensor) -> None:
    """Replace this rank's tensor by the sum of all ranks', in a ring.

    Each rank sends 2 (N - 1) / N of the bytes of ``tensor``. The sums are made in the same order as
    in :func:`course_lib.parallel.collectives.ring_all_reduce`, and are equal to its to the bit.

    Args:
        tensor: contiguous, and of one shape and dtype on all ranks. N need not divide it.
    """
    rank, N = dist.get_rank(), dist.get_world_size()
    chunks = tensor.view(-1).tensor_split(N)
    following, previous = (rank + 1) % N, (rank - 1) % N
    # New memory costs a CPU as much time as a fifth of the exchange, if it is so large that it goes
    # back to the system in between. So there is one buffer for all rounds, and a small one.
    buffer = torch.empty_like(chunks[0][:PIECE])
    pieces = max(1, math.ceil(len(chunks[0]) / PIECE))  # of each chunk, on each rank
    for step in range(2 * (N - 1)):
        out, mine = chunks[(rank - step - 1) % N], chunks[(rank - step - 2) % N]
        if step < N - 1:  # reduce-scatter
            parts = zip(out.tensor_split(pieces), mine.tensor_split(pieces), strict=True)
            for out_part, my_part in parts:
                arrived = buffer[: len(my_part)]
                exchange(out_part, following, arrived, previous)
                my_part.add_(arrived)
        else:  # all-gather
            exchange(out, following, mine, previous)
