"""Which examples a step sees, on which device; and a test that counts each example once.

The order of an epoch follows from its number and a seed alone. So all ranks find the same order
without a word between them, and a run that was interrupted at step k goes on with the examples that
it would have seen. PyTorch's own is ``torch.utils.data.DistributedSampler``, which must be told the
epoch (``set_epoch``), and which fills the ranks up with examples that are there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.parallel.collectives import all_reduce
from course_lib.parallel.counting import counts_of
from course_lib.parallel.inputs import require_one_a_replica


def epoch_order(examples: int, epoch: int, seed: int) -> Tensor:
    """All examples once, in the order of this epoch: int64, shape (examples,).

    Neighbouring seeds share no orders: the epoch is mixed with the seed, not added to it.

    Raises:
        ValueError: there are no examples, or ``epoch`` or ``seed`` is below 0.
    """
    if examples < 1 or epoch < 0 or seed < 0:
        raise ValueError(
            f"an order needs examples, an epoch and a seed from 0 on, and not {examples}, "
            f"{epoch}, {seed}"
        )
    mixed = (seed * 1_000_003 + epoch) % 2**63
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed))


def batch_indices(step: int, batch: int, examples: int, seed: int) -> Tensor:
    """The examples of one step, if the epochs follow each other without a gap: shape (batch,).

    A batch may begin in one epoch and end in the next, so that none is short.

    Raises:
        ValueError: ``batch`` is below 1, ``step`` below 0, or what :func:`epoch_order` refuses.
    """
    if batch < 1 or step < 0:
        raise ValueError(f"a step from 0 on has a batch of at least 1, and not {step}, {batch}")
    first = step * batch
    epochs = range(first // examples, (first + batch - 1) // examples + 1)
    orders = torch.cat([epoch_order(examples, epoch, seed) for epoch in epochs])
    begin = first - epochs[0] * examples
    return orders[begin : begin + batch]


class Score(NamedTuple):
    """What a test says of a model: means over all examples with a label, each counted once."""

    loss: float
    accuracy: float


def evaluate(
    replicas: Sequence[nn.Module], inputs: Sequence[Tensor], labels: Sequence[Tensor]
) -> Score:
    """Loss and accuracy over the shards of all devices, uneven and empty ones included.

    Each device adds up its own examples; then three numbers are summed over the devices, the third
    of which is how many labels there were; those that are ignored (-100) do not count. A mean of
    the devices' means would count an example of a small shard for more than one of a large shard.

    Args:
        inputs, labels: one shard a replica, on its device, such as :func:`split_batch` makes.

    Raises:
        TypeError: inputs or labels are a single tensor, or a shard of labels is none.
        ValueError: there is not one shard for each replica, or no example with a label at all.
    """
    require_one_a_replica(replicas, inputs=inputs, labels=labels)
    counts = counts_of(labels)
    if not any(counts):
        raise ValueError("there is no example to evaluate on, or none with a label")
    sums = []
    with torch.no_grad():
        for replica, x, y, labelled in zip(replicas, inputs, labels, counts, strict=True):
            scores = replica(x) if len(y) else x.new_zeros(0, 1)
            loss = F.cross_entropy(scores, y, reduction="sum") if len(y) else x.new_zeros(())
            hits = (scores.argmax(1) == y).sum() if len(y) else x.new_zeros(())
            count = torch.full_like(loss, labelled)
            sums.append(torch.stack([loss, hits.to(loss.dtype), count]))
        all_reduce(sums)
    loss_sum, hit_sum, count_sum = sums[0].tolist()
    return Score(loss_sum / count_sum, hit_sum / count_sum)
