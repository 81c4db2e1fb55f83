"""Checks of lesson 07: a merge that cannot overflow, a fair deal of tokens, an uneven loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right

_State = tuple[Tensor, Tensor, Tensor]  # output, largest score, sum


@check
def check_merge(merge_tops: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output of two and three blocks, with small scores and with huge ones."""
    for scale in (1.0, 1e4):
        scores = torch.randn(5, 12, dtype=torch.float64) * scale
        values = torch.randn(12, 3, dtype=torch.float64)
        blocks = [
            _block(part, value)
            for part, value in zip(scores.split([3, 4, 5], 1), values.split([3, 4, 5]), strict=True)
        ]
        where = f"with scores near {scale:,.0f}, "
        both = _block(scores[:, :7], values[:7])
        _judge_merge(merge_tops(*_copies(blocks[:2])), both, where, blocks[:2])
        _judge_merge(
            merge_tops(*_copies([both, blocks[2]])),
            _block(scores, values),
            f"{where}and a third block, ",
            [both, blocks[2]],
        )
    return right("exact for two blocks and for three, and no exponential is too large.")


def _copies(blocks: list[_State]) -> list[Tensor]:
    """The arguments, which the answer may overwrite."""
    return [each.clone() for block in blocks for each in block]


def _judge_merge(state: object, expected: _State, where: str, blocks: list[_State]) -> None:
    is_state = isinstance(state, (list, tuple)) and all(isinstance(each, Tensor) for each in state)
    if not is_state or len(state) != 3:
        raise Wrong("return three tensors: the output, the largest score, the sum.")
    for name, ours, theirs in zip(("out", "top", "total"), state, expected, strict=True):
        if ours.shape != theirs.shape:
            raise Wrong(f"`{name}` has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}.")
    if not all(torch.isfinite(each).all() for each in state):
        raise Wrong(f"{where}there are infinities or NaNs: some exponential is too large.")
    out, top, total = state
    expected_out, expected_top, expected_total = expected
    if not torch.equal(top, expected_top):
        raise Wrong(f"{where}`top` is not the largest score of both blocks.")
    if not torch.allclose(out, expected_out):
        raise Wrong(f"{where}the output is wrong. {_merge_mistake(out, expected, blocks)}".strip())
    if not torch.allclose(total, expected_total):
        raise Wrong(f"{where}`total` is not the sum of exp(score - top), with the new top.")


def _block(scores: Tensor, values: Tensor) -> _State:
    top = scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ values, top, (scores - top).exp().sum(-1, keepdim=True)


def _merge_mistake(out: Tensor, expected: _State, blocks: list[_State]) -> str:
    """Which mistake it looks like, "" if like none."""
    (a, s, m), (b, t, n) = blocks
    merged, top, total = expected
    u, v = (s - top).exp(), (t - top).exp()
    causes = {
        "It is the plain mean of the blocks: weight them by their sums.": (a + b) / 2,
        "The sums are relative to different tops: bring them to the common one first.": (
            (a * m + b * n) / (m + n)
        ),
        "It is not divided by the common sum.": merged * total,
        "The tops are in the weights, and the sums are not.": (a * u + b * v) / (u + v),
    }
    return next((words for words, value in causes.items() if torch.allclose(out, value)), "")


@check
def check_deal(deal: Callable[[int, int], Sequence[Sequence[int]]]) -> Verdict:
    """Graded on completeness, on equal numbers of tokens and on equal work."""
    for length, count in ((16, 4), (24, 2), (60, 3), (8, 1)):
        hands = deal(length, count)
        where = f"{length} tokens for {count} GPUs: "
        if not isinstance(hands, (list, tuple)) or len(hands) != count:
            raise Wrong(f"{where}return {count} lists of positions.")
        hands = [[index(position) for position in hand] for hand in hands]
        dealt = sorted(position for hand in hands for position in hand)
        for position in range(length):
            if dealt.count(position) != 1:
                times = f"{dealt.count(position)} times, not once"
                raise Wrong(f"{where}position {position} is dealt {times}.")
        if len(dealt) > length:
            raise Wrong(f"{where}the positions go from 0 to {length - 1}.")
        if any(hand != sorted(hand) for hand in hands):
            raise Wrong(f"{where}the positions of a GPU must rise.")
        if len({len(hand) for hand in hands}) > 1:
            counts = [len(hand) for hand in hands]
            raise Wrong(f"{where}the GPUs have different numbers of tokens, {counts}.")
        work = [sum(position + 1 for position in hand) for hand in hands]
        if len(set(work)) > 1:
            raise Wrong(f"{where}the work is not equal: {work} pairs of a query and a key.")
    return right("equally many tokens and equally much work for all.")


@check
def check_loss(split_loss: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]) -> Verdict:
    """Graded on the sum of the losses, its gradient, and the bytes that were exchanged."""
    for padding in ([1, 5, 0], [8, 2, 3], [0, 8, 0], [0, 0, 0]):  # first where the means differ
        with hardware.fresh_devices(3) as gpus:
            scores, targets = torch.randn(3, 8, 10), torch.randint(0, 10, (3, 8))
            for row, hidden in zip(targets, padding, strict=True):
                row[:hidden] = -100
            parts = [part.to(gpu).requires_grad_() for part, gpu in zip(scores, gpus, strict=True)]
            labels = [label.to(gpu) for label, gpu in zip(targets, gpus, strict=True)]
            with timeline.trace() as t:
                losses = split_loss(list(parts), list(labels))
            _judge_losses(losses, parts, scores, targets, padding, gpus)
            moved = sum(t.bytes_moved.values())
            facts = [("bytes exchanged", str(moved), "at most 100")]
            if moved > 100:
                raise Wrong("too much was exchanged: a number from each GPU is enough.", facts)
    return right("the mean over all targets that count, however they are spread.", facts)


def _judge_losses(
    losses: Sequence[Tensor],
    parts: list[Tensor],
    scores: Tensor,
    targets: Tensor,
    padding: list[int],
    gpus: list[torch.device],
) -> None:
    where = f"with {padding} targets that do not count, "
    if not isinstance(losses, (list, tuple)) or len(losses) != len(gpus):
        raise Wrong(f"return {len(gpus)} losses, one for each GPU.")
    if any(not isinstance(loss, Tensor) or loss.numel() != 1 for loss in losses):
        raise Wrong("each loss must be a tensor with one number.")
    if [loss.device for loss in losses] != gpus:
        raise Wrong("each loss must be on its own GPU.")
    whole = scores.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten())
    expected.backward()
    total = sum(loss.detach().cpu().sum() for loss in losses)
    if not torch.allclose(total, expected.detach(), atol=1e-5):
        raise Wrong(f"{where}{_loss_mistake(total, expected.detach(), scores, targets)}")
    for rank, loss in enumerate(losses):
        if not loss.requires_grad:
            raise Wrong(
                f"{where}the loss on GPU {rank} is detached from its scores: backward stops there. "
                "A sum over no targets is 0, and is not detached."
            )
    torch.autograd.backward(list(losses))
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
    gradient = torch.stack([each.cpu() for each in gradients])
    if not torch.allclose(gradient, whole.grad, atol=1e-6):
        raise Wrong(f"{where}the sum is right, and its gradient is not that of the mean.")


def _loss_mistake(total: Tensor, expected: Tensor, scores: Tensor, targets: Tensor) -> str:
    if total.isnan():
        return "the sum is not a number: a GPU without any target has divided by zero."
    pairs = list(zip(scores, targets, strict=True))
    means = torch.stack([F.cross_entropy(*pair) for pair in pairs])
    sums = torch.stack([F.cross_entropy(*pair, reduction="sum") for pair in pairs])
    causes = {
        "the losses add up to the sum of the GPUs' means.": means.sum(),
        "the losses add up to the mean of the GPUs' means, whose counts differ.": means.mean(),
        "the losses add up to the sum over all targets: divide by how many count.": sums.sum(),
        "you divide by all targets: those with -100 must not count.": sums.sum() / targets.numel(),
        "every GPU has the whole mean: they add up to a multiple of it.": expected * len(pairs),
    }
    for words, value in causes.items():
        if torch.allclose(total, value, atol=1e-5):
            return words
    return f"the losses add up to {total:.4f}, and the mean is {expected:.4f}."
