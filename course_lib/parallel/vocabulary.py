"""An embedding and a loss that are divided by vocabulary: the first and last layer of lesson 06."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.parallel.collectives import all_gather
from course_lib.parallel.counting import IGNORED
from course_lib.parallel.inputs import require_one_each, require_tokens
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.regions import leave, reduce_from_ranks
from course_lib.parallel.split_parameter import Shards


class VocabularyEmbedding(nn.Module):
    """An embedding with the vectors of some tokens on each device, which has zeros for others."""

    def __init__(
        self, embedding: nn.Embedding, devices: Devices, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.weight = Shards(embedding.weight, devices, 0)

    def forward(self, tokens_TB: Tensor) -> list[Tensor]:
        on_each = [tokens_TB.to(weight.device) for weight in self.weight]
        terms = [
            F.embedding(rows_TB, weight).masked_fill(absent_TB.unsqueeze(-1), 0)
            for weight, rows_TB, absent_TB in _look_up(on_each, list(self.weight), 0)
        ]
        return leave(terms, self.sequence_parallel)


def vocabulary_cross_entropy(scores: Tensors, targets_BT: Tensor) -> list[Tensor]:
    """Mean cross-entropy of scores that are divided by vocabulary, and never gathered.

    Each device adds up the exponentials of its own scores and picks the targets that it has. What
    moves is three numbers a token: a largest one, so that no exponential overflows, and two sums.

    Args:
        scores: on each device, of shape (B, T, its part of V).
        targets_BT: from wherever they are; those that are ignored (-100) do not count.

    Returns:
        The same loss on every device; zero if no target counts.

    Raises:
        TypeError: scores are no list, or targets no tensor of whole numbers.
        ValueError: there are no scores, or targets of another shape.
    """
    require_one_each(scores, max(len(scores), 1), "the loss")
    require_tokens(targets_BT, "targets")
    if scores[0].shape[:-1] != targets_BT.shape:
        raise ValueError(
            f"scores of {list(scores[0].shape[:-1])} tokens need targets of that shape, and not "
            f"{list(targets_BT.shape)}"
        )
    on_each = [targets_BT.to(part.device) for part in scores]
    ignored = [here_BT == IGNORED for here_BT in on_each]
    # Looked up as token 0, which every vocabulary has, and then left out.
    known = [here_BT.masked_fill(out, 0) for here_BT, out in zip(on_each, ignored, strict=True)]
    logs = [part.logsumexp(-1) for part in scores]
    targets = [
        part.gather(-1, rows_BT.unsqueeze(-1)).squeeze(-1).masked_fill(absent_BT, 0)
        for part, rows_BT, absent_BT in _look_up(known, scores, -1)
    ]
    gathered = all_gather([log.detach().unsqueeze(0) for log in logs])
    largest = [each.amax(0) for each in gathered]
    terms = [
        torch.stack([(log - most).exp(), target])
        for log, most, target in zip(logs, largest, targets, strict=True)
    ]
    return [
        (total.log() + most - target).masked_fill(left_out, 0).sum() / (~left_out).sum().clamp(1)
        for (total, target), most, left_out in zip(
            reduce_from_ranks(terms), largest, ignored, strict=True
        )
    ]


def _look_up(
    tokens: Tensors, parts: Tensors, dimension: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each part of the vocabulary, the row in it of each token, and which tokens it has not.

    A token outside the vocabulary falls to the first part or the last, where looking it up is the
    same error as on one GPU.
    """
    edges = [0, *accumulate(part.shape[dimension] for part in parts)]
    for here, part, (first, end) in zip(tokens, parts, pairwise(edges), strict=True):
        absent = torch.zeros_like(here, dtype=torch.bool)
        if first > 0:
            absent |= here < first
        if end < edges[-1]:
            absent |= here >= end
        yield part, (here - first).masked_fill(absent, 0), absent
