"""Lesson 12's runs: a GPT with experts beside a dense one of the same compute, to the same loss.

Both have the course's GPT of two blocks, and both do the same products for a token: the dense MLP
has a hidden width of 256; a token visits 2 of 8 experts of a hidden width of 128. A run ends when
the loss on the held-out part of the text is at most :data:`TARGET`. Steps are counted on the host,
where the experts' places are given out in as many groups as there are GPUs: the same training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from course_lib import CLASSROOM, ETHERNET, Network, hardware, timeline
from course_lib.data import Text, text
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.data_parallel import backward_on_shards, replicate
from course_lib.parallel.expert_gpt import ExpertGPT, ParallelExpertGPT, sum_in_one_row

TARGET = 2.3  # the held-out loss to reach, of a character
BATCH, CONTEXT, EVERY = 16, 64, 10  # sequences, characters in each, steps from look to look
HIDDEN, EXPERTS, TOP_K, CAPACITY_FACTOR, BALANCE = 128, 8, 2, 1.25, 0.01
RATES = (0.001, 0.002, 0.004)
COUNT = 8  # GPUs, in one node or in two of four
SPEC = CLASSROOM.with_(launch_overhead=0.0)
LINKS: dict[str, Network | None] = {
    "NVLink": None,
    "InfiniBand": CLASSROOM.network,
    "Ethernet": ETHERNET / 1000,
}
MODELS = ("dense", "experts")


@cache
def _parts() -> tuple[Text, Tensor, Tensor]:
    """What is trained on, nine tenths of the text; inputs and targets of the rest, [80, 64]."""
    whole = text()
    cut = len(whole.tokens) * 9 // 10
    held = whole.tokens[cut:]
    x, y = (held[first : first + 80 * CONTEXT].view(80, CONTEXT) for first in (0, 1))
    return Text(whole.tokens[:cut], whole.vocabulary), x, y


def model_of(kind: str, seed: int) -> nn.Module:
    """One of :data:`MODELS`, as it begins; what is not an MLP begins alike in both."""
    torch.manual_seed(seed)
    gpt = GPT(len(_parts()[0].vocabulary), CONTEXT)
    if kind == "dense":
        return gpt
    return ExpertGPT(gpt, HIDDEN, EXPERTS, TOP_K, CAPACITY_FACTOR)


def loss_of(model: nn.Module, x_BT: Tensor, y_BT: Tensor, balance: float = BALANCE) -> Tensor:
    """The loss that is trained on; with ``balance=0`` that of the text alone."""
    if isinstance(model, ExpertGPT):
        scores_BTV, auxiliary = model(x_BT, groups=COUNT)
        return next_token_loss(scores_BTV, y_BT) + balance * auxiliary
    return next_token_loss(model(x_BT), y_BT)


def losses(kind: str, rate: float, seed: int, most: int = 300) -> Iterator[float]:
    """The held-out loss after every ten steps of AdamW, until it is at most :data:`TARGET`."""
    train, x_held, y_held = _parts()
    model = model_of(kind, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(most):
        optimizer.zero_grad()
        loss_of(model, *train.batch(BATCH, CONTEXT, seed=1_000 * seed + step)).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                loss = loss_of(model, x_held, y_held, balance=0.0).item()
            yield loss
            if not loss > TARGET:
                return


def steps_to_loss(kind: str, rate: float, seed: int) -> float:
    """Steps until the held-out loss is at most :data:`TARGET`; infinite if it is not reached."""
    seen = list(losses(kind, rate, seed))
    return EVERY * len(seen) if seen[-1] <= TARGET else math.inf


def step_cost(kind: str, link: str) -> tuple[float, dict[str, int], int]:
    """Simulated seconds of a step on eight GPUs, bytes over each kind of link, peak memory.

    Over NVLink they stand in one node, and otherwise in two, with that network between them. Both
    models send their gradients after backward, in one row and by levels.
    """
    network = LINKS[link]
    nodes, spec = (1, SPEC) if network is None else (2, SPEC.with_(network=network))
    x, y = _parts()[0].batch(BATCH, CONTEXT, seed=0)
    with hardware.fresh_devices(COUNT, spec, nodes=nodes) as gpus:
        xs, ys = ([p.to(gpu) for p, gpu in zip(each.chunk(COUNT), gpus, strict=True)]
                  for each in (x, y))  # fmt: skip
        step = (_expert_step if kind == "experts" else _dense_step)(gpus, xs, ys)
        step()  # which makes the optimizers' state
        hardware.synchronize()
        with timeline.trace() as t:
            step()
        return t.seconds, t.bytes_by_link, max(t.peak_memory)


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATES[0])


def _dense_step(gpus: list, xs: list[Tensor], ys: list[Tensor]) -> Callable[[], None]:
    replicas = replicate(model_of("dense", 0), gpus)
    optimizers = [_adam(replica.parameters()) for replica in replicas]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward_on_shards(replicas, xs, ys, next_token_loss)
        sum_in_one_row([list(replica.parameters()) for replica in replicas])
        for optimizer in optimizers:
            optimizer.step()

    return step


def _expert_step(gpus: list, xs: list[Tensor], ys: list[Tensor]) -> Callable[[], None]:
    gpt = model_of("experts", 0)
    assert isinstance(gpt, ExpertGPT)
    parallel = ParallelExpertGPT(gpt, gpus)
    optimizers = [_adam(parallel.parameters_of(rank)) for rank in range(COUNT)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        scores, balances = parallel(xs)
        torch.autograd.backward([
            (next_token_loss(s, y) + BALANCE * b) / COUNT
            for s, y, b in zip(scores, ys, balances, strict=True)
        ])  # fmt: skip
        parallel.reduce_gradients()
        for optimizer in optimizers:
            optimizer.step()

    return step
