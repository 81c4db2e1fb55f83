"""Checks of lesson 06: a third border, a cut by heads, the best token, what a block costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import Unchanged, require_not_over_host, require_tensors
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.models import Block
from course_lib.parallel.tensor_parallel import ParallelBlock


@check
def check_gather(gather_neurons: Callable[[list[Tensor]], Sequence[Tensor]]) -> Verdict:
    """Graded on outputs and gradients of every GPU, and on the bytes that moved."""
    for count in (2, 1, 4):
        with hardware.fresh_devices(count) as gpus:
            whole = torch.randn(6, 5 * count)
            leaves = [
                part.to(gpu).requires_grad_()
                for part, gpu in zip(whole.chunk(count, 1), gpus, strict=True)
            ]
            before = Unchanged(
                {f"the part of {gpu}": x for gpu, x in zip(gpus, leaves, strict=True)}
            )
            where = f"with {count} GPU{'s' if count > 1 else ''}, "
            with timeline.trace() as forward:
                outs = gather_neurons(list(leaves))
            require_tensors(outs, [tuple(whole.shape)] * count)
            for gpu, out in zip(gpus, outs, strict=True):
                if out.device != gpu:
                    raise Wrong(f"{where}one result is on {out.device}, and should be on {gpu}.")
                if not torch.equal(out.detach().cpu(), whole):
                    raise Wrong(f"{where}{gpu} does not have all parts side by side, in order.")
            gradient = torch.randn_like(whole)
            for out in outs:
                if not out.requires_grad:
                    raise Wrong(
                        f"{where}the results have no way back to the parts. Autograd follows "
                        "tensors that `apply` gets one by one, none in a list, and nothing that "
                        "was detached."
                    )
            copies = [gradient.to(gpu) for gpu in gpus]  # the same work on every GPU
            with timeline.trace() as backward:
                torch.autograd.backward(list(outs), copies)
            ours = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            _judge_gradients(torch.cat([x.cpu() for x in ours], 1), gradient, count, where)
            before.require()
            facts = _gather_facts(forward, backward, count, leaves[0].nbytes)
    return right("the parts side by side, and each part's own gradient on the way back.", facts)


def _judge_gradients(ours: Tensor, gradient: Tensor, count: int, where: str) -> None:
    if torch.allclose(ours, gradient):
        return
    if count > 1 and torch.allclose(ours, count * gradient):
        raise Wrong(
            f"{where}each part gets {count} times its gradient. All GPUs' gradients are equal, "
            "copies of one: they are not to be added."
        )
    if torch.allclose(count * ours, gradient):
        raise Wrong(
            f"{where}each part gets its gradient divided by {count}. All GPUs' gradients are "
            "copies of one, and that one is whole."
        )
    if not ours.any():
        raise Wrong(f"{where}no gradient arrives at the parts.")
    first = torch.cat([gradient[:, : gradient.shape[1] // count]] * count, 1)
    if torch.equal(ours, first):
        raise Wrong(f"{where}every part gets the first columns' gradient: give each its own.")
    raise Wrong(f"{where}the parts' gradients are not those of their own columns.")


def _gather_facts(
    forward: timeline.Trace, backward: timeline.Trace, count: int, part_bytes: int
) -> list[tuple[str, str, str]]:
    least = count * (count - 1) * part_bytes
    moved = forward.bytes_between_devices
    facts = [
        ("bytes moved forward", format_bytes(moved), f"at most {format_bytes(least)}"),
        ("bytes moved backward", format_bytes(backward.bytes_between_devices), "0 bytes"),
    ]
    for t in (forward, backward):
        require_not_over_host(t, "tensors", facts)
    if moved > least:
        raise Wrong("each part needs to go to each other GPU once, and no more.", facts)
    if backward.bytes_between_devices:
        raise Wrong(
            "the gradients are right, and they travelled: every GPU has its own part's gradient "
            "already.",
            facts,
        )
    return facts


@check
def check_heads(split_qkv: Callable[[Tensor, int, int, int], Sequence[Tensor]]) -> Verdict:
    """Graded on the rows that each GPU gets."""
    # Heads, pairs, rows a head and GPUs; first without sharing, where fewer mistakes are possible.
    for heads, pairs, rows, count in ((4, 4, 2, 2), (8, 4, 2, 2), (8, 4, 3, 4), (4, 2, 4, 1)):
        width = heads * rows
        kinds = torch.randn(width + 2 * pairs * rows, width).split([width, *[pairs * rows] * 2])
        weight = torch.cat(kinds)
        where = f"with {heads} heads and {pairs} pairs, "
        parts = split_qkv(weight.clone(), heads, pairs, count)
        require_tensors(parts, [(len(weight) // count, width)] * count, where)
        for rank, part in enumerate(parts):
            part = part.detach().cpu()  # which may be on its GPU already
            expected = torch.cat([kind.chunk(count)[rank] for kind in kinds])
            own = f"{rank * heads // count} to {(rank + 1) * heads // count - 1}"
            mistake = _heads_mistake(part, expected, weight.chunk(count)[rank], own)
            if mistake:
                raise Wrong(f"{where}GPU {rank} of {count} {mistake}")
    return right("every GPU has its own heads' queries, and the keys and values that they use.")


def _heads_mistake(part: Tensor, expected: Tensor, piece: Tensor, own: str) -> str | None:
    if torch.equal(part, expected):
        return None
    if torch.equal(part, piece):
        return (
            "has one piece of the rows as they stand, and not its share of each kind: cut queries, "
            "keys and values each."
        )
    if torch.equal(part.sort(0).values, expected.sort(0).values):
        return (
            "has the right rows in another order: first come its queries, then its keys, then its "
            "values."
        )
    return f"has other rows than those of its heads, {own}, and of the pairs that they use."


@check
def check_best(best_token: Callable[[list[Tensor]], Tensor]) -> Verdict:
    """Graded on the tokens, where they are, and the bytes that each GPU sent to another."""
    rows, most = 50, 0.0
    for sizes in ([40, 40, 40], [30, 25, 7, 38], [64]):
        with hardware.fresh_devices(len(sizes)) as gpus:
            scores = torch.randn(rows, sum(sizes)) - 3  # all may be negative
            scores[0, [3, sum(sizes) - 1]] = 5.0  # equal ones, in two parts
            parts = [part.to(gpu) for part, gpu in zip(scores.split(sizes, 1), gpus, strict=True)]
            with timeline.trace() as t, _HostReads() as host:
                best = best_token(list(parts))
            _require_indices(best, rows, gpus[0])
            sent = max(
                (n for (source, _), n in t.bytes_moved.items() if source != "host"), default=0
            )
            most = max(most, sent / rows)  # on one GPU nothing can move
            facts = [("most bytes a row", f"{most:g}", "at most 16")]
            mistake = _best_mistake(best.cpu(), scores, sizes)
            if mistake:
                raise Wrong(mistake, facts)
            if host.reads:
                raise Wrong(
                    f"the host read {host.reads} numbers one by one and waited for each: leave the "
                    "choice to the GPU (argmax, where).",
                    facts,
                )
            if any(target == "host" for _, target in t.bytes_moved):
                raise Wrong("something went over the host: copy from GPU to GPU.", facts)
            if sent > 16 * rows:
                raise Wrong("more than 16 bytes a row: send winners, not scores.", facts)
    return right("the best token of each row, for a score and an index from each GPU.", facts)


class _HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads, as ``.item()``, ``int()`` or ``if`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _require_indices(best: object, rows: int, home: torch.device) -> None:
    if best is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(best, Tensor):
        raise Wrong(f"return a tensor of {rows} indices, and not a {type(best).__name__}.")
    if tuple(best.shape) != (rows,):
        raise Wrong(f"return one index a row, shape ({rows},), and not {tuple(best.shape)}.")
    if best.device != home:
        raise Wrong(f"the result is on {best.device}, and should be on {home}.")
    if best.is_floating_point():
        whole = torch.equal(best.detach(), best.detach().round())
        remedy = "Add `.long()`." if whole else "Are they scores?"
        raise Wrong(f"indices are whole numbers, and these are {best.dtype}. {remedy}")


def _best_mistake(best: Tensor, scores: Tensor, sizes: list[int]) -> str | None:
    expected = scores.argmax(-1)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    owner = torch.bucketize(expected, starts[1:-1], right=True)
    if torch.equal(best.long(), expected):
        return None
    if torch.equal(best, owner):
        return "these say which GPU has the highest score, and not which token it is."
    if torch.equal(best, expected - starts[owner]):
        return "these are places within a part: add where the part begins in the vocabulary."
    if torch.equal(best[1:], expected[1:]):
        return "of two equal scores the first one counts, and you have the other."
    if len(set(sizes)) > 1:
        return f"with parts of {sizes} tokens some are wrong: parts may be of different sizes."
    return "some are not the highest score of their row."


@check
def check_block(block_costs: Callable[[int, int, int, int], tuple[float, float]]) -> Verdict:
    """Graded against what the meter says of a block that runs, without numbers, on N GPUs."""
    # Widths that are neither T nor 2 T, where two different mistakes would count the same.
    for B, T, D, N in ((3, 32, 48, 8), (2, 16, 40, 4), (4, 8, 24, 2), (1, 128, 40, 1)):
        flops, sent = _measured_block(B, T, D, N)
        answer = block_costs(B, T, D, N)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise Wrong("return two numbers: operations of one GPU, and bytes that it sends.")
        case = f"for B={B}, T={T}, D={D}, N={N}"
        operations, nbytes = (require_number(each) for each in answer)
        if math.isclose(operations, sent) and math.isclose(nbytes, flops):
            raise Wrong("the operations come first and the bytes second, and yours are exchanged.")
        if not math.isclose(operations, flops):
            raise Wrong(
                f"{case} you count {operations:,.0f} operations and the meter {flops:,.0f}. "
                f"{_operations_mistake(operations, B, T, D, N)}"
            )
        if not math.isclose(nbytes, sent):
            raise Wrong(
                f"{case} you count {nbytes:,.0f} bytes and the meter {sent:,.0f}. "
                f"{_bytes_mistake(nbytes, sent, B * T * D * 4, N)}"
            )
    return right("your counts are the meter's, on 8, 4, 2 GPUs and on one.")


def _measured_block(B: int, T: int, D: int, N: int) -> tuple[float, int]:
    """Operations of one GPU, and bytes that it sends, in a forward pass."""
    with hardware.fresh_devices(N, backing="meta") as gpus:
        with gpus[0]:
            block = ParallelBlock(Block(D, heads=8, dropout=0.0), gpus)
        xs = [torch.empty(T, B, D, device=gpu) for gpu in gpus]
        with timeline.trace() as t:
            block(xs)
    return t.flops / N, t.bytes_sent(gpus[0])


def _operations_mistake(ours: float, B: int, T: int, D: int, N: int) -> str:
    """The sentence on a count that is wrong in a known way, or what to do if in none."""
    linear, attention = 24 * B * T * D * D / N, 4 * B * T * T * D / N
    right_one = linear + attention
    known = {
        right_one / 2: "Each multiplication comes with an addition: count both.",
        linear: "Attention's two products are missing.",
        linear / 2: "Each multiplication comes with an addition, and attention's products are "
        "missing.",
        linear + attention / 2: "Attention's products come to half of theirs.",
        linear + attention / B: "Attention's two products are done for each of B passages.",
        linear + N * attention: "The heads are split too: each GPU has H/N of them.",
        N * linear + attention: "The linear layers are split too.",
        N * right_one: "That is what all GPUs do together.",
        3 * right_one: "That is forward and backward.",
    }
    unknown = "Count one of its six products after the other."
    return next((said for count, said in known.items() if math.isclose(ours, count)), unknown)


def _bytes_mistake(ours: float, sent: float, tensor: int, N: int) -> str:
    known = {
        0: "Every GPU needs the sum of all partial results.",
        sent / 2: "That is half: a block has two all-reduces, a ring has two halves, and a number "
        "has four bytes.",
        sent / 4: "That is a quarter: is it numbers, and not bytes?",
        sent * 2: "That is twice as many: only forward was asked for, and its four layers have two "
        "all-reduces.",
        sent * N: "That is what all GPUs send together.",
        sent / N: "Each GPU sends one N-th of a tensor in each of the ring's 2·(N - 1) rounds, and "
        "there are two rings.",
        4 * tensor: "In each half of a ring a GPU sends all chunks but one.",
        2 * (N - 1) * tensor: "In a ring nobody sends the whole tensor to everybody.",
    }
    unknown = "Count one ring, and how many there are."
    matches = (said for count, said in known.items() if N > 1 and math.isclose(ours, count))
    return next(matches, unknown)
