"""Checks of lesson 06: a row layer's bias, a cut by heads, the best token of a split vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.collectives import ring_all_reduce
from course_lib.exercises.verdict import Verdict, Wrong, check, right


@check
def check_row(row_linear: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output of every GPU, for several counts of them."""
    for count in (1, 2, 4):
        with hardware.other_devices(count) as gpus:
            x, weight, bias = torch.randn(6, 12), torch.randn(5, 12), torch.randn(5)
            xs, weights = (
                [part.to(gpu) for part, gpu in zip(whole.chunk(count, 1), gpus, strict=True)]
                for whole in (x, weight)
            )
            biases = [bias.to(gpu) for gpu in gpus]
            with timeline.trace() as t:
                outs = row_linear(list(xs), list(weights), list(biases), ring_all_reduce)
            expected = F.linear(x, weight, bias)
            if not isinstance(outs, (list, tuple)) or len(outs) != count:
                raise Wrong(f"return a list of {count} tensors, one for each GPU.")
            for gpu, out in zip(gpus, outs, strict=True):
                if out.device != gpu:
                    raise Wrong(f"one result is on {out.device}, and should be on {gpu}.")
                if not torch.allclose(out.cpu(), expected, atol=1e-4):
                    raise Wrong(
                        f"on {count} GPUs: {_row_mistake(out.cpu(), expected, bias, count)}"
                    )
            moved, once = t.bytes_between_devices, 2 * (count - 1) * expected.nbytes
            facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(once)}")]
            if moved > once:
                raise Wrong("one all-reduce is enough: the bias is on every GPU already.", facts)
    return right("the sum of the terms, and the bias once.", facts)


def _row_mistake(out: Tensor, expected: Tensor, bias: Tensor, count: int) -> str:
    if torch.allclose(out, expected + (count - 1) * bias, atol=1e-4):
        return f"the bias is in it {count} times: add it after the sum."
    if torch.allclose(out, expected - bias, atol=1e-4):
        return "the bias is missing."
    return "this is not X W + b. Are the terms of all GPUs in it?"


@check
def check_heads(split_qkv: Callable[[Tensor, int, int], Sequence[Tensor]]) -> Verdict:
    """Graded on the rows that each GPU gets."""
    for heads, head_width, count in ((4, 2, 2), (8, 3, 4), (6, 2, 3), (4, 4, 1)):
        width = heads * head_width
        weight = torch.randn(3 * width, width)
        parts = split_qkv(weight.clone(), heads, count)
        if not isinstance(parts, (list, tuple)) or len(parts) != count:
            raise Wrong(f"return {count} parts for {count} GPUs.")
        kinds = weight.view(3, heads, head_width, width)
        for rank, part in enumerate(parts):
            own = slice(rank * heads // count, (rank + 1) * heads // count)
            expected = kinds[:, own].reshape(-1, width)
            if tuple(part.shape) != tuple(expected.shape):
                raise Wrong(
                    f"GPU {rank}'s part has shape {tuple(part.shape)}, and should have "
                    f"{tuple(expected.shape)}."
                )
            if not torch.equal(part, expected):
                raise Wrong(_heads_mistake(part, weight, kinds, own, rank, count))
    return right("every GPU has the queries, keys and values of its own heads.")


def _heads_mistake(
    part: Tensor, weight: Tensor, kinds: Tensor, own: slice, rank: int, count: int
) -> str:
    if torch.equal(part, weight.chunk(count)[rank]):
        return (
            f"GPU {rank} has one piece of the rows: one GPU gets queries alone, another one values. "
            "Cut queries, keys and values each."
        )
    by_head = kinds[:, own].transpose(0, 1).reshape(part.shape)
    if torch.equal(part, by_head):
        return f"GPU {rank} has the right rows in another order: all its queries come first."
    return f"GPU {rank} has rows of other heads than its own."


@check
def check_best(best_token: Callable[[list[Tensor]], Tensor]) -> Verdict:
    """Graded on the tokens, where they are, and the bytes that each GPU sent."""
    rows = 50
    for sizes in ([40, 40, 40], [30, 25, 7, 38], [64]):
        with hardware.other_devices(len(sizes)) as gpus:
            scores = torch.randn(rows, sum(sizes)) - 3  # all may be negative
            scores[0, [3, sum(sizes) - 1]] = 5.0  # equal ones, in two parts
            parts = [part.to(gpu) for part, gpu in zip(scores.split(sizes, 1), gpus, strict=True)]
            with timeline.trace() as t:
                best = best_token(list(parts))
            expected = scores.argmax(-1)
            if not isinstance(best, Tensor) or tuple(best.shape) != (rows,):
                raise Wrong(f"return a tensor of {rows} indices, one a row.")
            if best.device != gpus[0]:
                raise Wrong(f"the result is on {best.device}, and should be on {gpus[0]}.")
            sent = max(
                (n for (source, _), n in t.bytes_moved.items() if source != "host"), default=0
            )
            facts = [("most bytes a row", f"{sent / rows:g}", "at most 16")]
            if not torch.equal(best.cpu(), expected):
                raise Wrong(_best_mistake(best.cpu(), scores, sizes), facts)
            if any("host" in route for route in t.bytes_moved):
                raise Wrong("scores went over the host: copy from GPU to GPU.", facts)
            if sent > 16 * rows:
                raise Wrong("more than 16 bytes a row: send winners, not scores.", facts)
    return right("the best token of each row, for a score and an index from each GPU.", facts)


def _best_mistake(best: Tensor, scores: Tensor, sizes: list[int]) -> str:
    expected = scores.argmax(-1)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    owner = torch.bucketize(expected, starts[1:-1], right=True)
    if torch.equal(best, expected - starts[owner]):
        return "these are places within a part: add where the part begins in the vocabulary."
    if torch.equal(best[1:], expected[1:]):
        return "of two equal scores the first one counts, and you have the other."
    even = max(sizes) if len(set(sizes)) > 1 else sizes[0]
    if torch.equal(best, expected - starts[owner] + owner * even) or len(set(sizes)) > 1:
        return f"with parts of {sizes} tokens some are wrong: parts may be of different sizes."
    return "some are not the highest score of their row."
