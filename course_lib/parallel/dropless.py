"""Experts that drop nothing: every token finds its place, and the host must wait to know how many.

With fixed places (:mod:`course_lib.parallel.expert_parallel`) every message has a size that is
known beforehand: places stay empty, and what finds none is dropped. Here a device sends what there
is. First it counts, and tells every other how many rows will come; the host reads the counts, since
it cuts tensors and makes room by them; then the rows travel, as many as there are. MegaBlocks (Gale
and others, 2022) calls such layers dropless. In ``torch.distributed`` the exchange is
``all_to_all_single`` with ``input_split_sizes`` and ``output_split_sizes``, which are lists of
numbers on the host for this reason.

Shape suffixes are those of :mod:`course_lib.parallel.experts`; R is any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import Choice
from course_lib.parallel.inputs import require_one_each
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.node_collectives import all_to_all
from course_lib.parallel.regions import exchange_uneven

Sizes = list[list[int]]


class DroplessExpertParallel(ExpertParallel):
    """A mixture of experts over several devices, equal to one GPU whose experts have endless room.

    Used as :class:`ExpertParallel` is; the router's capacity counts for nothing. The devices may
    have different numbers of tokens.
    """

    def forward(self, xs_TD: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Each device's outputs, [T, D], and its auxiliary loss.

        The host waits once, for the counts of all devices.

        Raises:
            ValueError: there is not one input for each device.
        """
        require_one_each(xs_TD, len(self.devices), "this layer")
        routers: list[Any] = list(self.routers)
        choices: list[Choice] = [
            router.choose(x_TD) for router, x_TD in zip(routers, xs_TD, strict=True)
        ]
        orders = [choice.expert_KT.flatten().argsort(stable=True) for choice in choices]
        rows_RD = [
            x_TD.repeat(len(choice.expert_KT), 1)[order]  # the rows of expert 0, of expert 1, ...
            for x_TD, choice, order in zip(xs_TD, choices, orders, strict=True)
        ]
        leaving, coming = exchange_counts([choice.tokens_E for choice in choices])

        parts = [list(rows.split(sizes)) for rows, sizes in zip(rows_RD, leaving, strict=True)]
        worked = [
            self._work_uneven(rank, arrived, coming[rank])
            for rank, arrived in enumerate(exchange_uneven(parts))
        ]
        returned = exchange_uneven(worked)
        outputs = [
            _in_their_places(torch.cat(rows), order, choice.weight_KT)
            for rows, order, choice in zip(returned, orders, choices, strict=True)
        ]
        return outputs, [choice.balance for choice in choices]

    def _work_uneven(self, rank: int, arrived: Tensors, counts: Sizes) -> list[Tensor]:
        """What a rank's experts make of what came from each source: as many rows, in order.

        Args:
            counts: for each source how many rows it has for each expert here.
        """
        experts = self.experts[rank]
        assert isinstance(experts, nn.ModuleList)  # which a ModuleList of them does not tell
        pieces = [rows.split(of) for rows, of in zip(arrived, counts, strict=True)]
        made = [
            expert(torch.cat(of_expert)).split([len(rows) for rows in of_expert])
            for expert, of_expert in zip(experts, zip(*pieces, strict=True), strict=True)
        ]
        return [torch.cat(of_source) for of_source in zip(*made, strict=True)]


def exchange_counts(counts_E: Tensors) -> tuple[Sizes, list[Sizes]]:
    """Tell every device how many rows will come to it; the host waits until all know.

    Args:
        counts_E: on each device its rows for each of the E experts, whole numbers.

    Returns:
        For each rank the rows that leave it, for each destination; and for each rank the rows that
        come to it: for each source, for each of its own experts.
    """
    count = len(counts_E)
    arrived = all_to_all([counts.chunk(count) for counts in counts_E])
    # One read a device, and all is enqueued before the first: the devices are done at once.
    both = [torch.cat([own, *came]) for own, came in zip(counts_E, arrived, strict=True)]
    leaving, coming = [], []
    for numbers in [each.tolist() for each in both]:
        experts = len(numbers) // 2
        own, came = numbers[:experts], numbers[experts:]
        leaving.append([sum(part) for part in _cut(own, count)])
        coming.append(_cut(came, count))
    return leaving, coming


def _cut(numbers: list[int], count: int) -> Sizes:
    each = len(numbers) // count
    return [numbers[rank * each : (rank + 1) * each] for rank in range(count)]


def _in_their_places(rows_RD: Tensor, order: Tensor, weight_KT: Tensor) -> Tensor:
    """What the experts made of each token, [T, D], of rows sorted by expert."""
    chosen_RD = torch.zeros_like(rows_RD).index_copy(0, order, rows_RD)
    return (chosen_RD.view(*weight_KT.shape, -1) * weight_KT.unsqueeze(-1)).sum(0)


def uneven_exchange_bytes(rows: Sequence[Sequence[int]], width: int, itemsize: int = 4) -> int:
    """Bytes that one exchange moves between the devices in all; a step has four.

    Args:
        rows: ``rows[r][d]`` is how many rank r has for rank d.
    """
    away = sum(n for r, own in enumerate(rows) for d, n in enumerate(own) if r != d)
    return away * width * itemsize


def counts_bytes(devices: int, experts: int) -> int:
    """Bytes of the exchange of counts, whole numbers of 8 bytes: once a step, forward."""
    return (devices - 1) * experts * 8
