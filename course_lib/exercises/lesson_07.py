"""Checks of lesson 07: a merge that cannot overflow, a fair deal of tokens, an uneven loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right


@check
def check_merge(merge_tops: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output of two and three blocks, with small scores and with huge ones."""
    for scale in (1.0, 1e4):
        scores = torch.randn(5, 12, dtype=torch.float64) * scale
        values = torch.randn(12, 3, dtype=torch.float64)
        expected = scores.softmax(-1) @ values
        blocks = [
            _block(part, value)
            for part, value in zip(scores.split([3, 4, 5], 1), values.split([3, 4, 5]), strict=True)
        ]
        state = blocks[0]
        for block in blocks[1:]:
            state = merge_tops(*state, *block)
            if not isinstance(state, (list, tuple)) or len(state) != 3:
                raise Wrong("return three tensors: the output, the largest score, the sum.")
        out, top, total = state
        what = "scores near 1" if scale == 1 else "scores near 10,000"
        if not all(torch.isfinite(each).all() for each in state):
            raise Wrong(f"with {what} there are infinities or NaNs: some exponential is too large.")
        if not torch.allclose(out, expected):
            raise Wrong(f"with {what} the output is wrong. {_merge_mistake(out, blocks)}")
        if not torch.equal(top, scores.amax(-1, keepdim=True)):
            raise Wrong(f"with {what} `top` is not the largest score of both blocks.")
        if not torch.allclose(total, (scores - top).exp().sum(-1, keepdim=True)):
            raise Wrong(f"with {what} `total` is not the sum of exp(score - top).")
    return right("exact for two blocks and for three, and no exponential is too large.")


def _block(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ values, top, (scores - top).exp().sum(-1, keepdim=True)


def _merge_mistake(out: Tensor, blocks: list) -> str:
    (a, _, m), (b, _, n), (c, _, o) = blocks
    if torch.allclose(out, ((a + b) / 2 + c) / 2):
        return "It is the plain mean of the blocks: weight them by their sums."
    if torch.allclose(out, (a * m + b * n + c * o) / (m + n + o)):
        return "The sums are relative to different tops: bring them to the common one first."
    return ""


@check
def check_deal(deal: Callable[[int, int], Sequence[Sequence[int]]]) -> Verdict:
    """Graded on completeness, on equal numbers of tokens and on equal work."""
    for length, count in ((16, 4), (24, 2), (60, 3), (8, 1)):
        hands = deal(length, count)
        where = f"{length} tokens for {count} GPUs: "
        if not isinstance(hands, (list, tuple)) or len(hands) != count:
            raise Wrong(f"{where}return {count} lists of positions.")
        hands = [list(hand) for hand in hands]
        dealt = sorted(position for hand in hands for position in hand)
        if dealt != list(range(length)):
            raise Wrong(f"{where}each position from 0 to {length - 1} must be dealt once.")
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
    for padding in ([0, 0, 0], [1, 5, 0], [8, 2, 3], [0, 8, 0]):
        with hardware.other_devices(3) as gpus:
            scores, targets = torch.randn(3, 8, 10), torch.randint(0, 10, (3, 8))
            for row, hidden in zip(targets, padding, strict=True):
                row[:hidden] = -100
            parts = [part.to(gpu).requires_grad_() for part, gpu in zip(scores, gpus, strict=True)]
            labels = [label.to(gpu) for label, gpu in zip(targets, gpus, strict=True)]
            with timeline.trace() as t:
                losses = split_loss(list(parts), list(labels))
            _judge_losses(losses, parts, scores, targets, padding, gpus)
            moved = t.bytes_between_devices
            facts = [("bytes between GPUs", str(moved), "at most 100")]
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
    if [loss.device for loss in losses] != gpus:
        raise Wrong("each loss must be on its own GPU.")
    whole = scores.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten())
    expected.backward()
    total = sum(loss.detach().cpu() for loss in losses)
    if not torch.allclose(total, expected.detach(), atol=1e-5):
        raise Wrong(f"{where}{_loss_mistake(total, expected.detach(), scores, targets)}")
    torch.autograd.backward(list(losses))
    gradient = torch.stack([part.grad.cpu() for part in parts])
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
