"""A mixture of experts: many MLPs, of which each token visits a few.

A router scores every expert for every token, and the token goes to the ``top_k`` best. So a layer
can have many times the parameters of an MLP and cost a token no more. Experts have a *capacity*:
what comes when one is full is dropped, and its part of the output is zero (Shazeer and others,
"Outrageously large neural networks", 2017; Lepikhin and others, "GShard", 2020; Fedus and others,
"Switch Transformers", 2021).

Shape suffixes: T tokens, D width, E experts, K choices of a token, C places in an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Choice:
    """What a router chose for each token.

    Attributes:
        expert_KT: for each choice and token the expert.
        weight_KT: how much of that expert's output is the token's; over K they add up to 1.
        chosen_KTE: the same choices as ones among zeros.
        balance: the auxiliary loss: 1 when all experts get equally much, up to E when one gets all.
    """

    expert_KT: Tensor
    weight_KT: Tensor
    chosen_KTE: Tensor
    balance: Tensor

    @property
    def tokens_E(self) -> Tensor:
        """How many choices fell on each expert."""
        return self.chosen_KTE.sum((0, 1))


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        place_KT: for each choice and token the row that it takes, of E x C; E x C if it is dropped.
        weight_KT: how much of that expert's output is the token's; 0 if it is dropped.
        rows: how many rows there are, E x C.
        balance: the auxiliary loss, as in :class:`Choice`.
        tokens_E: how many choices fell on each expert, the dropped ones included.
    """

    place_KT: Tensor
    weight_KT: Tensor
    rows: int
    balance: Tensor
    tokens_E: Tensor

    @property
    def dropped(self) -> Tensor:
        """How many choices found no place, as a tensor: to read it makes the host wait."""
        return (self.place_KT == self.rows).sum()


class Router(nn.Module):
    """Chooses for each token its experts.

    Args:
        width: D.
        experts: E.
        top_k: K, experts that a token visits.
        capacity_factor: an expert has room for this times its fair share of the choices. Each
            batch that is routed by itself has its own places (GShard calls it a group).

    Raises:
        ValueError: ``top_k`` is not from 1 to ``experts``, or ``capacity_factor`` not above 0.
    """

    def __init__(self, width: int, experts: int, top_k: int, capacity_factor: float) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"a token visits 1 to {experts} experts, not {top_k}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor is above 0, not {capacity_factor}")
        self.experts, self.top_k, self.capacity_factor = experts, top_k, capacity_factor
        self.score = nn.Linear(width, experts, bias=False)

    def capacity(self, tokens: int) -> int:
        """C: places for ``tokens`` tokens in each expert."""
        return ceil(self.capacity_factor * self.top_k * tokens / self.experts)

    def forward(self, x_TD: Tensor) -> Routing:
        """Who goes where. Nothing here makes the host wait: every shape is known before."""
        capacity = self.capacity(len(x_TD))
        choice = self.choose(x_TD)
        # All first choices take their places before any second one does.
        before_KTE = (
            choice.chosen_KTE.reshape(-1, self.experts).cumsum(0).view_as(choice.chosen_KTE)
        )
        queue_KT = ((before_KTE - 1) * choice.chosen_KTE).sum(-1)  # how many are before it
        rows = self.experts * capacity
        fits_KT = queue_KT < capacity
        place_KT = torch.where(fits_KT, choice.expert_KT * capacity + queue_KT, rows)
        weight_KT = choice.weight_KT * fits_KT
        return Routing(place_KT, weight_KT, rows, choice.balance, choice.tokens_E)

    def choose(self, x_TD: Tensor) -> Choice:
        """Each token's experts and their weights, whether there is room for it or not."""
        probability_TE = self.score(x_TD).softmax(-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        chosen_KTE = F.one_hot(expert_TK.T, self.experts)
        fraction_E = chosen_KTE.sum((0, 1)) / (len(x_TD) * self.top_k)
        balance = self.experts * (fraction_E * probability_TE.mean(0)).sum()
        return Choice(expert_TK.T, weight_TK.T, chosen_KTE, balance)


def dispatch(x_TD: Tensor, routing: Routing) -> Tensor:
    """The rows of all experts, [E x C, D]: tokens in their places, zeros in empty ones."""
    choices = len(routing.place_KT)
    buffer = x_TD.new_zeros(routing.rows + 1, x_TD.shape[1])  # the last row takes what is dropped
    filled = buffer.index_add(0, routing.place_KT.reshape(-1), x_TD.repeat(choices, 1))
    return filled[:-1]


def combine(rows_RD: Tensor, routing: Routing) -> Tensor:
    """What the experts made of each token, [T, D], added up by weight."""
    padded = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
    chosen_KTD = padded[routing.place_KT]
    return (chosen_KTD * routing.weight_KT.unsqueeze(-1)).sum(0)


class MixtureOfExperts(nn.Module):
    """The layer on one device: what expert parallelism must be equal to.

    Args:
        width, hidden: of each expert, an MLP of two layers.
        experts, top_k, capacity_factor: see :class:`Router`.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int = 2, capacity_factor: float = 1.25
    ) -> None:
        super().__init__()
        self.router = Router(width, experts, top_k, capacity_factor)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The output, [T, D], and the auxiliary loss, a scalar."""
        routing = self.router(x_TD)
        rows_RD = dispatch(x_TD, routing)
        rows_RD = run_experts(self.experts, rows_RD.chunk(len(self.experts)))
        return combine(rows_RD, routing), routing.balance


def run_experts(experts: nn.ModuleList, rows: tuple[Tensor, ...]) -> Tensor:
    """Each expert's output for its rows, one after the other."""
    return torch.cat([expert(own) for expert, own in zip(experts, rows, strict=True)])
