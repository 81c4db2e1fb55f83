"""Messages between two ranks, and the ring all-reduce that is made of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**21  # numbers that arrive before they are added: 8 MB of float32


def begin_exchange(out: Tensor, to: int, into: Tensor, source: int) -> list[dist.Work]:
    """Begin to send ``out`` to one rank and to receive ``into`` from another.

    Neither waits for the other, so ranks that all call it cannot end in a deadlock. Both are posted
    together: over NCCL, two that are posted one after the other might wait for each other.

    Returns:
        What to wait for, the receive last. Over NCCL there is one for both.
    """
    ops = [dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)]
    return dist.batch_isend_irecv(ops)


def exchange(out: Tensor, to: int, into: Tensor, source: int) -> None:
    """Send ``out`` to one rank while ``into`` comes from another; afterwards both are done."""
    for work in begin_exchange(out, to, into, source):
        work.wait()


def ring_all_reduce(tensor: Tensor) -> None:
    """Replace this rank's tensor by the sum of all ranks', in a ring.

    Each rank sends 2 (N - 1) / N of the bytes of ``tensor``. The sums are made in the same order as
    in :func:`course_lib.parallel.collectives.ring_all_reduce`, and are equal to its to the bit.

    That a chunk was sent is waited for at the end alone, for each wait is a thread to wake. Until
    then nothing is written over it but the sum of all ranks, which this very chunk went into. The
    works live as long: with four gloo ranks on two cores, a megabyte was measured to take a third
    more of the CPU if each is freed as soon as it has ended.

    Args:
        tensor: contiguous, and of one shape and dtype on all ranks. N need not divide it.
    """
    rank, N = dist.get_rank(), dist.get_world_size()
    chunks = tensor.view(-1).tensor_split(N)
    following, previous = (rank + 1) % N, (rank - 1) % N
    # New memory costs a CPU as much time as a fifth of the exchange, if it is so large that it goes
    # back to the system in between. So there is one buffer for all rounds, and a small one.
    buffer = torch.empty_like(chunks[0][:PIECE])
    exchanges: list[list[dist.Work]] = []

    def exchange_chunks(out: Tensor, into: Tensor) -> None:
        exchanges.append(begin_exchange(out, following, into, previous))
        exchanges[-1][-1].wait()

    for step in range(2 * (N - 1)):
        out, mine = chunks[(rank - step - 1) % N], chunks[(rank - step - 2) % N]
        if step < N - 1:  # reduce-scatter
            for start in range(0, len(chunks[0]), PIECE):  # as many on each rank
                my_part = mine[start : start + PIECE]
                arrived = buffer[: len(my_part)]
                exchange_chunks(out[start : start + PIECE], arrived)
                my_part.add_(arrived)
        else:  # all-gather
            exchange_chunks(out, mine)
    for *sending, _ in exchanges:
        for work in sending:
            work.wait()
