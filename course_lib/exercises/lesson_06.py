"""Checks of lesson 06: a row layer's bias, a cut by heads, the best token of a split vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.parallel.collectives import ring_all_reduce


@check
def check_row(row_linear: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output of every GPU, for several counts of them, and the bytes that moved."""
    for count in (2, 1, 4):
        with hardware.fresh_devices(count) as gpus:
            x, weight, bias = torch.randn(6, 12), torch.randn(5, 12), torch.randn(5)
            xs, weights = (
                [part.to(gpu) for part, gpu in zip(whole.chunk(count, 1), gpus, strict=True)]
                for whole in (x, weight)
            )
            biases = [bias.to(gpu) for gpu in gpus]
            terms = [F.linear(*each).cpu() for each in zip(xs, weights, strict=True)]
            with timeline.trace() as t:
                outs = row_linear(list(xs), list(weights), list(biases), ring_all_reduce)
            expected = F.linear(x, weight, bias)
            _require_parts(outs, [tuple(expected.shape)] * count)
            for gpu, out, term in zip(gpus, outs, terms, strict=True):
                if out.device != gpu:
                    raise Wrong(f"one result is on {out.device}, and should be on {gpu}.")
                mistake = _row_mistake(out.detach().cpu(), expected, bias, term, count)
                if mistake:
                    raise Wrong(f"{gpu}, with {count} GPUs: {mistake}")
            moved, once = t.bytes_between_devices, 2 * (count - 1) * expected.nbytes
            facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(once)}")]
            if any(target == "host" for _, target in t.bytes_moved):
                raise Wrong("something went over the host: copy from GPU to GPU.", facts)
            if moved > once:
                raise Wrong(
                    "one all-reduce of the terms is enough: weights, inputs and biases need not "
                    "move.",
                    facts,
                )
    return right("the sum of the terms, and the bias once.", facts)


def _require_parts(parts: object, shapes: list[tuple[int, ...]]) -> None:
    """Raise unless ``parts`` are tensors of these shapes, one for each GPU."""
    if parts is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(parts, (list, tuple)) or len(parts) != len(shapes):
        raise Wrong(f"return a list of {len(shapes)} tensors for {len(shapes)} GPUs.")
    for rank, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        if not isinstance(part, Tensor):
            raise Wrong(f"for GPU {rank} there is a {type(part).__name__}, and should be a tensor.")
        if tuple(part.shape) != shape:
            raise Wrong(
                f"GPU {rank}'s tensor has shape {tuple(part.shape)}, and should have {shape}."
            )


def _row_mistake(
    out: Tensor, expected: Tensor, bias: Tensor, term: Tensor, count: int
) -> str | None:
    def close(wrong: Tensor) -> bool:
        return torch.allclose(out, wrong, atol=1e-4)

    if close(expected):
        return None
    if close(term) or close(term + bias):
        return "only its own term is in it, and the sum of all is needed on every GPU."
    if close(count * (expected - bias) + bias):
        return f"every term is in it {count} times: one all-reduce is enough."
    times = 1 + ((out - expected) / bias).mean().item()
    if close(expected - bias):
        return "the bias is missing."
    if close(expected + (times - 1) * bias):
        return f"the bias is in it {times:.2g} times: add it once, after the sum."
    return "this is not X Wᵀ + b. Are the terms of all GPUs in it?"


@check
def check_heads(split_qkv: Callable[[Tensor, int, int], Sequence[Tensor]]) -> Verdict:
    """Graded on the rows that each GPU gets."""
    for heads, head_width, count in ((4, 2, 2), (8, 3, 4), (6, 2, 3), (4, 4, 1)):
        width = heads * head_width
        weight = torch.randn(3 * width, width)
        parts = split_qkv(weight.clone(), heads, count)
        _require_parts(parts, [(3 * width // count, width)] * count)
        each = heads // count
        for rank, part in enumerate(parts):
            own = range(rank * each, (rank + 1) * each)
            mistake = _heads_mistake(part, weight, heads, own, weight.chunk(count)[rank])
            if mistake:
                raise Wrong(f"GPU {rank} of {count} {mistake}")
    return right("every GPU has the queries, keys and values of its own heads.")


def _heads_mistake(
    part: Tensor, weight: Tensor, heads: int, own: range, piece: Tensor
) -> str | None:
    kinds = weight.view(3, heads, -1, weight.shape[1])
    expected = kinds[:, own.start : own.stop].reshape(part.shape)
    if torch.equal(part, expected):
        return None
    if torch.equal(part, piece):
        return (
            "has one piece of the rows, which is queries alone, or values alone: cut queries, keys "
            "and values each."
        )
    if torch.equal(part.sort(0).values, expected.sort(0).values):
        return (
            "has the right rows in another order: first come its queries, then its keys, then its "
            "values."
        )
    return f"has other rows than those of its heads, {own.start} to {own.stop - 1}."


@check
def check_best(best_token: Callable[[list[Tensor]], Tensor]) -> Verdict:
    """Graded on the tokens, where they are, and the bytes that each GPU sent to another."""
    rows = 50
    for sizes in ([40, 40, 40], [30, 25, 7, 38], [64]):
        with hardware.fresh_devices(len(sizes)) as gpus:
            scores = torch.randn(rows, sum(sizes)) - 3  # all may be negative
            scores[0, [3, sum(sizes) - 1]] = 5.0  # equal ones, in two parts
            parts = [part.to(gpu) for part, gpu in zip(scores.split(sizes, 1), gpus, strict=True)]
            with timeline.trace() as t:
                best = best_token(list(parts))
            _require_indices(best, rows, gpus[0])
            sent = max(
                (n for (source, _), n in t.bytes_moved.items() if source != "host"), default=0
            )
            facts = [("most bytes a row", f"{sent / rows:g}", "at most 16")]
            mistake = _best_mistake(best.cpu(), scores, sizes)
            if mistake:
                raise Wrong(mistake, facts)
            if any(target == "host" for _, target in t.bytes_moved):
                raise Wrong("something went over the host: copy from GPU to GPU.", facts)
            if sent > 16 * rows:
                raise Wrong("more than 16 bytes a row: send winners, not scores.", facts)
    return right("the best token of each row, for a score and an index from each GPU.", facts)


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
        raise Wrong(f"indices are whole numbers, and these are {best.dtype}. Are they scores?")


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
