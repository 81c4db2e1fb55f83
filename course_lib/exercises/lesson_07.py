"""Checks of lesson 07: a merge without overflow, pairs to skip, one block's backward, a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import hardware, timeline
from course_lib.exercises.diagnosis import Unchanged, gradient_of, known_mistake, require_finite
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


def _judge_merge(state: Any, expected: _State, where: str, blocks: list[_State]) -> None:
    is_state = isinstance(state, (list, tuple)) and all(isinstance(each, Tensor) for each in state)
    if not is_state or len(state) != 3:
        raise Wrong("return three tensors: the output, the largest score, the sum.")
    for name, ours, theirs in zip(("out", "top", "total"), state, expected, strict=True):
        if ours.shape != theirs.shape:
            raise Wrong(f"`{name}` has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}.")
        _require_dtype(f"`{name}`", ours, theirs)
    if not all(torch.isfinite(each).all() for each in state):
        raise Wrong(f"{where}there are infinities or NaNs: some exponential is too large.")
    out, top, total = state
    expected_out, expected_top, expected_total = expected
    if not torch.allclose(top, expected_top):
        raise Wrong(f"{where}`top` is not the largest score of both blocks.")
    if not torch.allclose(out, expected_out):
        raise Wrong(f"{where}the output is wrong. {_merge_mistake(out, expected, blocks)}".strip())
    if not torch.allclose(total, expected_total):
        raise Wrong(f"{where}`total` is not the sum of exp(score - top), with the new top.")


def _require_dtype(what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.dtype != theirs.dtype:
        raise Wrong(f"{what} is {ours.dtype}, and what you were given is {theirs.dtype}.")


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
        "Each output was divided by its own sum: it counts with its top and its sum.": (
            a * u + b * v
        ),
        "The difference of the tops has the wrong sign: exp(its top - the new one).": (
            (a * m / u + b * n / v) / (m / u + n / v)
        ),
    }
    return next((words for words, value in causes.items() if torch.allclose(out, value)), "")


WORDS = ("skip", "mask", "all")


@check
def check_meet(meet: Callable[[int, int, int], Sequence[Sequence[str]]]) -> Verdict:
    """Graded on every pair of GPUs, against the tokens themselves."""
    for count in (3, 1, 4):
        for rank, source in product(range(count), repeat=2):
            where = f"GPU {rank} of {count} with the block of GPU {source}: "
            ours = meet(rank, source, count)
            _require_words(ours, where)
            expected = _meeting(rank, source, count, zigzag=True)
            if [list(row) for row in ours] == expected:
                continue
            raise Wrong(f"{where}{_meeting_mistake(ours, expected, rank, source, count)}")
    return right("every pair that is needed, and no other; all GPUs always do the same work.")


def _require_words(rows: Any, where: str) -> None:
    if rows is None:
        raise Wrong("your function returned None: is a return statement missing?")
    is_table = isinstance(rows, (list, tuple)) and len(rows) == 2
    if not is_table or any(not isinstance(row, (list, tuple)) or len(row) != 2 for row in rows):
        raise Wrong(f"{where}return two lists of two words, one list for each chunk of queries.")
    for word in (word for row in rows for word in row):
        if word not in WORDS:
            raise Wrong(f"{where}{word!r} is none of the words 'skip', 'mask' and 'all'.")


def _meeting(rank: int, source: int, count: int, zigzag: bool) -> list[list[str]]:
    """What each pair needs, by looking at two tokens a chunk, in either order."""
    last = 2 * count - 1

    def tokens(owner: int) -> list[range]:
        chunks = (owner, last - owner) if zigzag else (2 * owner, 2 * owner + 1)
        return [range(2 * chunk, 2 * chunk + 2) for chunk in chunks]

    def word(queries: range, keys: range) -> str:
        seen = [key <= query for query, key in product(queries, keys)]
        return "all" if all(seen) else "mask" if any(seen) else "skip"

    return [[word(queries, keys) for keys in tokens(source)] for queries in tokens(rank)]


def _meeting_mistake(
    ours: Sequence[Sequence[str]],
    expected: list[list[str]],
    rank: int,
    source: int,
    count: int,
) -> str:
    table = [list(row) for row in ours]
    pair = next((i, j) for i, j in product(range(2), repeat=2) if table[i][j] != expected[i][j])
    queries, keys = (
        [owner, 2 * count - 1 - owner][half]
        for owner, half in zip((rank, source), pair, strict=True)
    )
    said = (
        f"queries of chunk {queries} and keys of chunk {keys} need {expected[pair[0]][pair[1]]!r}, "
        f"and yours is {table[pair[0]][pair[1]]!r}."
    )
    if table == _meeting(rank, source, count, zigzag=False):
        return f"{said} Yours would be right for tokens in plain order."
    if table == [list(row) for row in zip(*expected, strict=True)]:
        return f"{said} Rows are for queries, and columns for keys."
    return said


@check
def check_back(block_backward: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the gradients of attention to two blocks, and of each block's part of them."""
    n, d = 6, 4
    q, grad = torch.randn(2, n, d, dtype=torch.float64)
    k, v = (torch.randn(9, d, dtype=torch.float64) for _ in range(2))
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    one_q, one_k, one_v = (leaf[None] for leaf in leaves)
    out = F.scaled_dot_product_attention(one_q, one_k, one_v)[0]
    out.backward(grad)
    expected_q, expected_k, expected_v = (gradient_of(leaf) for leaf in leaves)
    log_sum = (q @ k.T / d**0.5).logsumexp(-1, keepdim=True)
    dot = (grad * out.detach()).sum(-1, keepdim=True)
    q_total = torch.zeros_like(q)
    for block in (slice(0, 5), slice(5, 9)):
        given = [each.clone() for each in (q, k[block], v[block], log_sum, grad, dot)]
        names = ("q", "k", "v", "log_sum", "grad", "dot")
        unchanged = Unchanged(dict(zip(names, given, strict=True)))
        ours = block_backward(*given)
        if ours is None:
            raise Wrong("your function returned None: is a return statement missing?")
        tensors = isinstance(ours, (list, tuple)) and all(isinstance(x, Tensor) for x in ours)
        if not tensors or len(ours) != 3:
            raise Wrong("return three tensors: the gradients of q, k and v.")
        m = block.stop - block.start
        for name, each, rows in zip("qkv", ours, (n, m, m), strict=True):
            if tuple(each.shape) != (rows, d):
                raise Wrong(f"the gradient of {name} has shape {tuple(each.shape)}, not {rows, d}.")
            _require_dtype(f"the gradient of {name}", each, q)
        require_finite(ours, "the gradients")
        unchanged.require()
        q_grad, k_grad, v_grad = ours
        wanted = {"v": expected_v[block], "k": expected_k[block]}
        for name, each in (("v", v_grad), ("k", k_grad)):
            if not torch.allclose(each, wanted[name]):
                mistake = _back_mistake(name, each, q, k[block], v[block], log_sum, grad, dot)
                raise Wrong(f"the gradient of {name} is wrong. {mistake}".strip())
        q_total += q_grad
    if not torch.allclose(q_total, expected_q):
        mistake = ""
        if torch.allclose(q_total, expected_q * d**0.5):
            mistake = "It lacks the factor 1/√d."
        raise Wrong(f"the blocks' gradients of q do not add up to that of q. {mistake}".strip())
    return right("what each of two blocks adds is what autograd finds for both together.")


def _back_mistake(
    name: str,
    ours: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    dot: Tensor,
) -> str:
    """Which mistake a block's gradient of keys or values looks like, "" if like none."""
    scale = q.shape[-1] ** -0.5
    scores = q @ k.T * scale
    weights, alone = (scores - log_sum).exp(), scores.softmax(-1)
    unscaled = (scores / scale - log_sum).exp()
    by_division = scores.exp() / log_sum
    of_block = "The weights are a softmax over this block alone: use log_sum, which is over all."
    lacking_scale = "The scores lack the factor 1/√d."
    a_logarithm = "log_sum is the logarithm of the sum: the weights are exp(S - log_sum)."
    if name == "v":
        return known_mistake(
            lambda wrong: torch.allclose(ours, wrong),
            {
                of_block: alone.T @ grad,
                lacking_scale: unscaled.T @ grad,
                a_logarithm: by_division.T @ grad,
            },
        )
    inner = grad @ v.T
    own_dot = (grad * (weights @ v)).sum(-1, keepdim=True)
    return known_mistake(
        lambda wrong: torch.allclose(ours, wrong),
        {
            "It lacks the factor 1/√d.": (weights * (inner - dot)).T @ q,
            "`dot` is not subtracted.": (weights * inner).T @ q * scale,
            of_block: (alone * (inner - dot)).T @ q * scale,
            "δ is that of this block's output: use `dot`, which is over all.": (
                (weights * (inner - own_dot)).T @ q * scale
            ),
            "It has the factor 1/√d twice.": (weights * (inner - dot)).T @ q * scale**2,
        },
    )


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
    for loss in losses:
        _require_dtype("a loss", loss, scores)
    total = sum((loss.detach().cpu().sum() for loss in losses), start=torch.zeros(()))
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
    if not torch.allclose(gradient, gradient_of(whole), atol=1e-6):
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
        "you divided by the number of GPUs, too: the losses are added up.": expected / len(pairs),
    }
    for words, value in causes.items():
        if torch.allclose(total, value, atol=1e-5):
            return words
    return f"the losses add up to {total:.4f}, and the mean is {expected:.4f}."
