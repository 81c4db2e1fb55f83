"""Checks of lesson 12: a broadcast by levels, rounds that do not mix, a queue, balance, groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import CLASSROOM, format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Facts,
    Unchanged,
    gradient_of,
    known_mistake,
    require_finite,
    require_not_over_host,
    require_tensors,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.hardware import current_stream, side_stream
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import MixtureOfExperts

SPEC = CLASSROOM.with_(launch_overhead=0.0)  # as the lesson has it


@check
def check_broadcast(broadcast_by_levels: Callable[[list[list[Tensor]]], object]) -> Verdict:
    """Graded on the values, on the bytes that cross the network, and on the seconds."""
    facts: Facts = []
    for nodes, size in ((1, 2), (3, 2), (2, 4)):
        facts = _judge_broadcast(broadcast_by_levels, nodes, size)
    return right("each node gets the tensor once, through all of its cards.", facts)


def _judge_broadcast(answer: Callable, nodes: int, size: int) -> Facts:
    numel = 240_001  # no number of GPUs here divides it
    with hardware.fresh_devices(nodes * size, SPEC, nodes=nodes) as gpus:
        tensors = [torch.randn(numel).to(gpu) for gpu in gpus]
        expected = tensors[0].cpu()
        with timeline.trace(strict=True) as t:
            answer([tensors[node * size : (node + 1) * size] for node in range(nodes)])
        least, nbytes = (nodes - 1) * tensors[0].nbytes, t.bytes_by_link["network"]
        # A scatter, the chunks through the cards one node after the other, and a gather.
        chunk = tensors[0].nbytes / size
        target = 2 * (size - 1) * (SPEC.latency + chunk / SPEC.link_bandwidth)
        target += (nodes - 1) * (SPEC.network.latency + chunk / SPEC.network.bandwidth)
        facts = [
            ("bytes over the network", format_bytes(nbytes), format_bytes(least)),
            ("simulated time", f"{t.seconds * 1e3:.1f} ms", f"about {target * 1e3:.1f} ms"),
        ]
        case = f"with {nodes} node{'s' if nodes > 1 else ''} of {size}: "
        if not torch.equal(tensors[0].cpu(), expected):
            raise Wrong(f"{case}the tensor that is sent changed.", facts)
        for rank, tensor in enumerate(tensors):
            if not torch.equal(tensor.cpu(), expected):
                share = (tensor.cpu() == expected).float().mean().item()
                raise Wrong(
                    f"{case}{share:.0%} of the numbers on GPU {rank} are those of GPU 0.", facts
                )
    require_not_over_host(t, "the tensor", facts)
    if nbytes > least:
        raise Wrong(
            f"{case}what crosses the network is {nbytes / least:.3g} times one tensor for each "
            "other node: inside a node there are faster links.",
            facts,
        )
    if nodes > 1 and t.seconds > 1.6 * target:
        raise Wrong(f"{case}{_why_slow(t, nodes, size)}", facts)
    return facts


def _why_slow(t: timeline.Trace, nodes: int, size: int) -> str:
    """What kept a broadcast: cards that carried nothing, or copies that took turns."""
    crossing = [span.route for span in t.spans if span.route and t.link_of(span) == "network"]
    said = f"it takes {t.seconds * 1e3:.1f} ms"
    receivers, wanted = {to for _, to in crossing}, (nodes - 1) * size
    if len(receivers) < wanted:
        idle = wanted - len(receivers)
        return f"{said}, and {idle} of {wanted} cards receive nothing: cut the tensor up before."
    senders = {source for source, _ in crossing}
    if len(senders) < size:
        return (
            f"{said}, and all that crosses leaves through {len(senders)} of {size} cards: spread "
            "it over the first node before."
        )
    return f"{said}: copies wait for each other that need not."


@check
def check_rounds(rounds: Callable[[int, int], list[list[int]]]) -> Verdict:
    """Graded on whether it is an all-to-all, and on its seconds."""
    facts: Facts = []
    for nodes, size in ((1, 4), (3, 2), (2, 4)):
        plan = rounds(nodes, size)
        case = f"with {nodes} node{'s' if nodes > 1 else ''} of {size}: "
        _require_all_to_all(plan, nodes * size, case)
        seconds, target = _seconds_of_rounds(plan, nodes, size), _alone(nodes, size)
        facts = [(f"an all-to-all of 40 kB a part, {nodes} by {size} GPUs",
                  f"{seconds * 1e3:.2f} ms", f"{target * 1e3:.2f} ms")]  # fmt: skip
        if seconds > 1.02 * target:
            raise Wrong(f"{case}it takes {seconds / target:.2f} times as long as its copies "
                        f"would without a wait.{_mixed(plan, size)}", facts)  # fmt: skip
    return right("no round mixes fast and slow links, and nobody waits.", facts)


def _require_all_to_all(plan: Any, count: int, case: str) -> None:
    if not isinstance(plan, (list, tuple)) or not all(isinstance(r, (list, tuple)) for r in plan):
        raise Wrong(f"{case}return a list of rounds, each a list of ranks.")
    pairs = set()
    for number, to in enumerate(plan):
        if len(to) != count or {*to} != {*range(count)}:
            raise Wrong(
                f"{case}in round {number} every one of the {count} ranks should be sent to once, "
                f"and your list is {list(to)}."
            )
        for rank, other in enumerate(to):
            if rank == other:
                raise Wrong(f"{case}in round {number} rank {rank} sends to itself.")
            if (rank, other) in pairs:
                raise Wrong(f"{case}rank {rank} sends to {other} a second time in round {number}.")
            pairs.add((rank, other))
    if len(pairs) < count * (count - 1):
        missing = next((r, d) for r in range(count) for d in range(count)
                       if r != d and (r, d) not in pairs)  # fmt: skip
        raise Wrong(f"{case}rank {missing[0]} never sends to rank {missing[1]}.")


def _seconds_of_rounds(plan: Sequence[Sequence[int]], nodes: int, size: int) -> float:
    """The lesson's all-to-all in these rounds."""
    with hardware.fresh_devices(nodes * size, SPEC, "meta", nodes) as gpus:
        part = [torch.empty(10_000, device=gpu) for gpu in gpus]
        sends, receives = ([side_stream(gpu) for gpu in gpus] for _ in range(2))
        for gpu, send, receive in zip(gpus, sends, receives, strict=True):
            send.wait_stream(current_stream(gpu))
            receive.wait_stream(current_stream(gpu))
        with timeline.trace() as t:
            for to in plan:
                for rank, other in enumerate(to):
                    with sends[rank], receives[other]:
                        part[rank].to(gpus[other])
    return t.seconds


def _alone(nodes: int, size: int, nbytes: int = 40_000) -> float:
    """Seconds of one GPU's copies, one behind the other."""
    network = SPEC.network
    inside = (size - 1) * (SPEC.latency + nbytes / SPEC.link_bandwidth)
    return inside + (nodes - 1) * size * (network.latency + nbytes / network.bandwidth)


def _mixed(plan: Sequence[Sequence[int]], size: int) -> str:
    for number, to in enumerate(plan):
        crosses = [rank // size != other // size for rank, other in enumerate(to)]
        if len(set(crosses)) > 1:
            inside, outside = crosses.index(False), crosses.index(True)
            return (
                f" In round {number} rank {inside} sends inside its node, and rank {outside} "
                "through its card."
            )
    return ""


@check
def check_queue(places_together: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the places, on what travels, and on the host."""
    facts: Facts = []
    for count, tokens, experts, capacity in ((1, 9, 3, 2), (2, 6, 2, 4), (4, 200, 8, 80)):
        with hardware.fresh_devices(count, SPEC, nodes=1) as gpus:
            popular = torch.tensor([4.0] + [1.0] * (experts - 1))
            whole = torch.multinomial(popular, count * tokens, replacement=True)
            choices = [part.to(gpu) for part, gpu in zip(whole.chunk(count), gpus, strict=True)]
            unchanged = Unchanged({f"GPU {r}'s choices": c for r, c in enumerate(choices)})
            with timeline.trace() as t:
                places = places_together(list(choices), experts, capacity)
            case = f"with {count} GPU{'s' if count > 1 else ''}: "
            require_tensors(places, [(tokens,)] * count, case)
            most = count * (count - 1) * experts * 8
            facts = [("bytes between GPUs", format_bytes(t.bytes_between_devices),
                      f"at most {format_bytes(most)}")]  # fmt: skip
            _judge_places([place.cpu() for place in places], whole, experts, capacity, case, facts)
            for rank, (place, gpu) in enumerate(zip(places, gpus, strict=True)):
                if place.device != gpu:
                    raise Wrong(f"{case}GPU {rank}'s places are on {place.device}.", facts)
            unchanged.require()
        require_not_over_host(t, "numbers", facts)
        if t.bytes_between_devices > most:
            raise Wrong(
                f"{case}more travels than a count for each expert from each GPU to each other: "
                "leave the choices where they are.",
                facts,
            )
    return right("the same tokens are dropped as on one GPU, and counts alone travel.", facts)


def _queue(chosen: Tensor, experts: int, capacity: int, before: Tensor | int = 0) -> Tensor:
    """The places of some tokens, where so many stand before them."""
    one_hot = F.one_hot(chosen, experts)
    queue = ((one_hot.cumsum(0) - 1 + before) * one_hot).sum(-1)
    return torch.where(queue < capacity, chosen * capacity + queue, experts * capacity)


def _judge_places(
    ours: list[Tensor], whole: Tensor, experts: int, capacity: int, case: str, facts: Facts
) -> None:
    """Raise unless the places are those in one queue, and say which other queue they are of."""
    count = len(ours)
    parts = whole.chunk(count)
    got, expected = torch.cat(ours), _queue(whole, experts, capacity)
    if torch.equal(got, expected):
        return
    counts = [F.one_hot(part, experts).sum(0) for part in parts]
    including = [sum(counts[: rank + 1]) for rank in range(count)]
    shared = -(-capacity // count)
    own = torch.cat([_queue(part, experts, capacity) for part in parts])
    shares = torch.cat([_queue(part, experts, shared) for part in parts])
    behind = torch.cat(
        [_queue(part, experts, capacity, n) for part, n in zip(parts, including, strict=True)]
    )
    mistakes = {
        " Each GPU's tokens begin at the head of the queue, as if no others stood there.": own,
        " Each GPU has its share of the places to itself: that is many queues.": shares,
        " Each GPU's tokens stand behind its own ones too: count the ranks before alone.": behind,
    }
    hint = known_mistake(lambda wrong: torch.equal(got, wrong), mistakes)
    at = int((got != expected).nonzero()[0])
    rank, token = divmod(at, len(parts[0]))
    raise Wrong(
        f"{case}token {token} of GPU {rank} belongs in row {expected[at]}, and yours is "
        f"{got[at]} ({experts * capacity} is dropped).{hint}",
        facts,
    )


@check
def check_balance(balance_over_all: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the sum, on the gradients, and on what travels; GPUs whose tokens differ."""
    facts: Facts = []
    for count, tokens, experts, top_k in ((2, 6, 4, 1), (4, 32, 8, 2)):
        with hardware.fresh_devices(count, SPEC) as gpus:
            whole = torch.randn(count, tokens, experts, dtype=torch.float64)
            for rank in range(count):  # each GPU likes other experts
                whole[rank, :, rank * experts // count :][:, : experts // count] += 3
            scores = [part.to(gpu).requires_grad_() for part, gpu in zip(whole, gpus, strict=True)]
            unchanged = Unchanged({f"GPU {rank}'s scores": s for rank, s in enumerate(scores)})
            with timeline.trace() as t:
                losses = balance_over_all(list(scores), top_k)
            case = f"with {count} GPUs: "
            require_tensors(losses, [()] * count, case)
            require_finite(losses, "the losses")
            expected = whole.flatten(0, 1).requires_grad_()
            total = _balance(expected, top_k)
            total.backward()
            own = sum(_balance(part, top_k) for part in whole) / count
            most = 2 * (count - 1) * experts * 8
            facts = [
                ("the loss, all together", f"{float(sum(x.detach().cpu() for x in losses)):.3f}",
                 f"{total.item():.3f}"),
                ("bytes between GPUs", format_bytes(t.bytes_between_devices),
                 f"at most {format_bytes(most)}"),
            ]  # fmt: skip
            _judge_sum(losses, total, own, count, case, facts)
            _judge_score_gradients(losses, scores, expected, case, facts)
            unchanged.require()
        require_not_over_host(t, "numbers", facts)
        if t.bytes_between_devices > most:
            raise Wrong(
                f"{case}more travels than an all-reduce of one number an expert: leave the scores "
                "where they are.",
                facts,
            )
    return right("the loss of all tokens, and one number an expert travels.", facts)


def _balance(scores_TE: Tensor, top_k: int) -> Tensor:
    tokens, experts = scores_TE.shape
    counts = F.one_hot(scores_TE.topk(top_k).indices, experts).sum((0, 1))
    return experts * (counts / (tokens * top_k) * scores_TE.softmax(-1).mean(0)).sum()


def _judge_sum(
    losses: Sequence[Tensor], total: Tensor, own: Any, count: int, case: str, facts: Facts
) -> None:
    ours = torch.stack([loss.detach().cpu().double() for loss in losses]).sum()
    if torch.allclose(ours, total.detach()):
        return
    mistakes = {
        " It is the mean of the GPUs' own losses: f is to count the tokens of all.": own,
        " It is the sum of the GPUs' own losses: f is to count the tokens of all.": own * count,
        f" It is {count} times that: p is a mean over the tokens of all.": total.detach() * count,
        f" It is 1/{count} of that.": total.detach() / count,
    }
    hint = known_mistake(lambda w: torch.allclose(ours, w), mistakes)
    raise Wrong(
        f"{case}your losses add up to {ours:.3f}, and the auxiliary loss of all tokens is "
        f"{total.item():.3f}.{hint}",
        facts,
    )


def _judge_score_gradients(
    losses: Sequence[Tensor],
    scores: list[Tensor],
    expected: Tensor,
    case: str,
    facts: Facts,
) -> None:
    for rank, (loss, score) in enumerate(zip(losses, scores, strict=True)):
        if loss.device != score.device:
            raise Wrong(f"{case}GPU {rank}'s loss is on {loss.device}.", facts)
        if not loss.requires_grad:
            raise Wrong(f"{case}GPU {rank}'s loss has no way back to its scores.", facts)
    torch.autograd.backward(list(losses))
    rights = gradient_of(expected).chunk(len(scores))
    for rank, (score, gradient) in enumerate(zip(scores, rights, strict=True)):
        ours = gradient_of(score, f"{case}no gradient arrives at GPU {rank}'s scores.", facts)
        if not torch.allclose(ours.cpu(), gradient):
            raise Wrong(
                f"{case}the gradient of GPU {rank}'s scores is not that of the loss of all tokens.",
                facts,
            )


GROUP_CASES = ((64, 32, 256), (1024, 32, 32), (128, 64, 64))  # tokens, width, hidden
NODES, SIZE = 2, 4
BY_NODE = ((0, 1, 2, 3), (4, 5, 6, 7))
ACROSS = ((0, 2, 4, 6), (1, 3, 5, 7))


@check
def check_groups(expert_groups: Callable[[int, int, int], list[list[int]]]) -> Verdict:
    """Graded on the seconds of a step in these groups, beside the better of two."""
    facts: Facts = []
    for case in GROUP_CASES:
        tokens, width, hidden = case
        name = f"{tokens} tokens a GPU, width {width}, hidden {hidden}"
        groups = _groups_of(expert_groups(*case), name)
        ours = _seconds_of_groups(case, groups)
        best = min((BY_NODE, ACROSS), key=lambda each: _seconds_of_groups(case, each))
        target = _seconds_of_groups(case, best)
        facts.append((name, f"{ours * 1e3:.1f} ms", f"{target * 1e3:.1f} ms"))
        if ours > 1.05 * target:
            what = {
                BY_NODE: "the tokens inside a node, and let the gradients cross",
                ACROSS: "the gradients inside a node, and let the tokens cross",
            }[best]
            raise Wrong(
                f"{name}: a step takes {ours * 1e3:.1f} ms in your groups, and can take "
                f"{target * 1e3:.1f}: keep {what}.",
                facts,
            )
    return right("what weighs more stays inside a node.", facts)


def _groups_of(answer: Any, name: str) -> tuple[tuple[int, ...], ...]:
    try:
        groups = tuple(tuple(int(rank) for rank in group) for group in answer)
    except (TypeError, ValueError):
        raise Wrong(f"{name}: return two lists of four ranks.") from None
    if [len(group) for group in groups] != [SIZE] * NODES:
        raise Wrong(f"{name}: return two lists of four ranks, and not {answer}.")
    if sorted(rank for group in groups for rank in group) != list(range(NODES * SIZE)):
        raise Wrong(f"{name}: each of the ranks 0 to 7 is in one group, and not {answer}.")
    return groups


@cache
def _seconds_of_groups(case: tuple[int, int, int], groups: tuple[tuple[int, ...], ...]) -> float:
    """A step of a layer with an expert a GPU, in expert groups, each of all four experts."""
    tokens, width, hidden = case
    moe = MixtureOfExperts(width, hidden, SIZE, top_k=1, capacity_factor=1.0)
    with hardware.fresh_devices(NODES * SIZE, SPEC, "meta", NODES) as gpus:
        layers = [ExpertParallel(moe, [gpus[rank] for rank in group]) for group in groups]
        inputs = [[torch.empty(tokens, width, device=gpu, requires_grad=True)
                   for gpu in layer.devices] for layer in layers]  # fmt: skip
        with timeline.trace() as t:
            for layer, xs in zip(layers, inputs, strict=True):
                outputs, balances = layer(xs)
                losses = [out.sum() + b for out, b in zip(outputs, balances, strict=True)]
                torch.autograd.backward(losses)
            for place in range(SIZE):
                copies = [list(layer.experts[place].parameters()) for layer in layers]
                for pair in zip(*copies, strict=True):
                    ring_all_reduce([p.grad for p in pair if p.grad is not None])
    return t.seconds
