"""A GPT whose MLPs are mixtures of experts, on one device and spread over several.

What is not an expert is replicated, as in data parallelism: embedding, attention, norms, routers
and head. Each device has its own sequences. Where a layer has experts all devices meet, in
:class:`course_lib.parallel.expert_parallel.ExpertParallel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.models import GPT
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.expert_parallel import ExpertParallel, rows_by_expert, rows_by_source
from course_lib.parallel.experts import MixtureOfExperts, combine, dispatch, run_experts
from course_lib.parallel.inputs import require_gpt, require_one_each
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.node_collectives import hierarchical_all_reduce
from course_lib.parallel.sums import are_sums, mark_as_sums


class Rest(nn.Module):
    """All of a GPT but its MLPs."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.embedding, blocks, self.head = deepcopy(gpt).parts()
        for block in blocks:
            del block.mlp
        self.blocks = nn.ModuleList(blocks)

    def attend(self, layer: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a block's attention, [B, T, D], and what its experts get, [B T, D]."""
        block: Any = self.blocks[layer]  # its parts have no types to a ModuleList
        x_BTD = x_BTD + block.attention(block.norm_1(x_BTD))
        return x_BTD, block.norm_2(x_BTD).flatten(0, 1)


class ExpertGPT(nn.Module):
    """A GPT with a mixture of experts in the place of each MLP, on one device.

    Args:
        gpt: embedding, attention and head are copied from it, the experts are new.
        hidden, experts, top_k, capacity_factor: as :class:`MixtureOfExperts` takes them.

    Raises:
        TypeError: the model is another than a GPT.
        ValueError: it has dropout, which is not done here.
    """

    def __init__(
        self, gpt: GPT, hidden: int, experts: int, top_k: int = 2, capacity_factor: float = 1.25
    ) -> None:
        super().__init__()
        require_gpt(gpt)
        embedding, blocks, _ = gpt.parts()
        if any(block.dropout.p for block in blocks):
            raise ValueError("a GPT with experts has no dropout here: make the GPT without")
        width = embedding.token.embedding_dim
        self.rest = Rest(gpt)
        self.layers = nn.ModuleList(
            MixtureOfExperts(width, hidden, experts, top_k, capacity_factor) for _ in blocks
        )

    def forward(self, tokens_BT: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Scores, [B, T, V], and the mean auxiliary loss of a layer and group, a scalar.

        Args:
            groups: into how many groups the sequences are cut, each of which has its own places in
                the experts: as many as there are devices, to train as they do.

        Raises:
            ValueError: the groups would not be of one size.
        """
        if len(tokens_BT) % groups:
            raise ValueError(f"{len(tokens_BT)} sequences do not divide among {groups} groups")
        x_BTD, balances = self.rest.embedding(tokens_BT), []
        for number, layer in enumerate(self.layers):
            x_BTD, x_ND = self.rest.attend(number, x_BTD)
            outputs, balance = _in_groups(layer, x_ND.chunk(groups))
            x_BTD = x_BTD + torch.cat(outputs).view_as(x_BTD)
            balances.append(balance)
        return self.rest.head(x_BTD), torch.stack(balances).mean()


def _in_groups(moe: nn.Module, groups: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each group's output, and the mean auxiliary loss: routed by themselves, worked on at once."""
    assert isinstance(moe, MixtureOfExperts)  # which a ModuleList of them does not tell
    routings = [moe.router(x_TD) for x_TD in groups]
    rows_GRD = torch.stack([dispatch(*each) for each in zip(groups, routings, strict=True)])
    out = run_experts(moe.experts, rows_by_expert(rows_GRD, len(moe.experts)))
    returned_GRD = rows_by_source(out, len(moe.experts), len(groups))
    outputs = [combine(*each) for each in zip(returned_GRD, routings, strict=True)]
    return outputs, torch.stack([routing.balance for routing in routings]).mean()


class ParallelExpertGPT(nn.Module):
    """The same on several devices: experts dealt out, all else replicated.

        tokens, targets = (split_batch(each, devices) for each in batch)
        scores, balances = parallel(tokens)               # one a device, on it
        losses = next_token_losses(scores, targets)       # parts of the mean over all targets
        losses += [0.01 * balance / len(devices) for balance in balances]
        torch.autograd.backward(losses)
        parallel.reduce_gradients()

    :func:`course_lib.parallel.context_parallel.next_token_losses` weighs each device by the targets
    that count there: where one has more padding, a mean of the devices' means is another loss.

    Args:
        gpt: it stays as it is.
        devices: one a rank; the experts divide among them.
    """

    def __init__(self, gpt: ExpertGPT, devices: Devices) -> None:
        super().__init__()
        layers: list[Any] = list(gpt.layers)
        self.replicas = nn.ModuleList(replicate(gpt.rest, devices))
        self.layers = nn.ModuleList(ExpertParallel(layer, devices) for layer in layers)

    def forward(self, tokens_BT: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Each device's scores, [B, T, V], and the mean auxiliary loss of its layers.

        Args:
            tokens_BT: one a device, all of one shape.
        """
        require_one_each(tokens_BT, len(self.replicas), "this GPT")
        replicas: list[Any] = list(self.replicas)
        pairs = list(zip(replicas, tokens_BT, strict=True))
        xs_BTD = [rest.embedding(tokens) for rest, tokens in pairs]
        balances: list[list[Tensor]] = [[] for _ in pairs]
        for number, layer in enumerate(self.layers):
            attended = [r.attend(number, x) for r, x in zip(replicas, xs_BTD, strict=True)]
            outputs, of_layer = layer([x_ND for _, x_ND in attended])
            xs_BTD = [
                x_BTD + out.view_as(x_BTD)
                for (x_BTD, _), out in zip(attended, outputs, strict=True)
            ]
            for own, balance in zip(balances, of_layer, strict=True):
                own.append(balance)
        scores = [rest.head(x) for rest, x in zip(replicas, xs_BTD, strict=True)]
        return scores, [torch.stack(own).mean() for own in balances]

    def parameters_of(self, rank: int) -> list[nn.Parameter]:
        """What a rank's optimizer trains: its copy of the rest, its routers and its experts."""
        layers: list[Any] = list(self.layers)
        own = [part[rank] for layer in layers for part in (layer.routers, layer.experts)]
        return [p for each in (self.replicas[rank], *own) for p in each.parameters()]

    def reduce_gradients(self) -> None:
        """Add up, in one row, the gradients of all that is replicated; experts need no such.

        Once after a backward pass; a second call changes nothing. Raises what
        :func:`sum_in_one_row` does.
        """
        layers: list[Any] = list(self.layers)
        routers = [[layer.routers[r] for layer in layers] for r in range(len(self.replicas))]
        sum_in_one_row([
            [p for module in (rest, *own) for p in module.parameters()]
            for rest, own in zip(self.replicas, routers, strict=True)
        ])  # fmt: skip


def sum_in_one_row(replicas: Sequence[Sequence[nn.Parameter]]) -> None:
    """Replace the gradients of all replicas by their sums: one row, added up by levels.

    Args:
        replicas: each one's parameters, in the same order.

    Raises:
        RuntimeError: a backward pass has added to gradients that were summed already.
    """
    copies = [[p.grad for p in each if p.grad is not None] for each in zip(*replicas, strict=True)]
    on_each = list(zip(*(each for each in copies if each and not are_sums(each)), strict=True))
    rows = [nn.utils.parameters_to_vector(gradients) for gradients in on_each]
    if rows:
        hierarchical_all_reduce(rows)
    for gradients, row in zip(on_each, rows, strict=True):
        nn.utils.vector_to_parameters(row, gradients)
        mark_as_sums(gradients)
