"""Checks of lesson 02: three silent bugs, uneven shards, one exchange for many pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Facts,
    Unchanged,
    gradient_of,
    require_finite,
    require_not_over_host,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import GPT, MLP, next_token_loss, parameter_count
from course_lib.parallel.data_parallel import replicate, split_batch
from course_lib.parallel.kinds import Loss


@check
def check_bugs(mended_gradients: Callable) -> Verdict:
    """Graded on the cases in which the three mistakes show, one after the other."""
    for case in _cases():
        with hardware.fresh_devices(3) as gpus:
            _require_case(mended_gradients, case, gpus)
    return right("even, uneven and empty shards, a frozen layer and a shared weight.")


@dataclass(frozen=True)
class _Case:
    """A batch on which some mistakes show.

    Attributes:
        words: when it is, as in "with shards of 3, 2 and 2 images".
    """

    words: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss_function: Loss


def _cases() -> Iterator[_Case]:
    def images(words: str, size: int, model: nn.Module) -> _Case:
        x, y = torch.randn(size, 64), torch.randint(10, (size,))
        return _Case(words, model, x, y, F.cross_entropy)

    yield images("with three shards of two images", 6, MLP(64, 16, 10))
    yield images("with shards of 3, 2 and 2 images", 7, MLP(64, 16, 10))
    yield images("with shards of 1, 1 and no image", 2, MLP(64, 16, 10))
    frozen = MLP(64, 16, 10)
    frozen[0].requires_grad_(False)
    yield images("with a frozen layer", 6, frozen)
    tied = GPT(11, context=8, width=16, heads=2, depth=1, tied=True)
    tokens, targets = torch.randint(11, (6, 8)), torch.randint(11, (6, 8))
    yield _Case("with a weight that two layers share", tied, tokens, targets, next_token_loss)


def _require_case(mended_gradients: Callable, case: _Case, gpus: list[torch.device]) -> None:
    replicas = replicate(case.model, gpus)
    unchanged = Unchanged({f"the parameters of replica {r}": m for r, m in enumerate(replicas)})
    xs, ys = split_batch(case.x, gpus), split_batch(case.y, gpus)
    with timeline.trace() as t:
        mended_gradients(replicas, list(xs), list(ys), case.loss_function)
    unchanged.require()
    nbytes = sum(p.nbytes for p in case.model.parameters() if p.requires_grad)
    facts = [("bytes moved", format_bytes(t.bytes_between_devices), format_bytes(4 * nbytes))]
    require_not_over_host(t, f"{case.words}, gradients", facts, least=nbytes)
    case.loss_function(case.model(case.x), case.y).backward()
    for rank, replica in enumerate(replicas):
        for (name, ours), theirs in zip(
            replica.named_parameters(), case.model.parameters(), strict=True
        ):
            if not theirs.requires_grad:
                if ours.grad is not None:
                    raise Wrong(f"{case.words}, {name} is frozen and has a gradient.", facts)
                continue
            _require_gradient(case.words, rank, name, ours.grad, gradient_of(theirs), facts)
    for replica in replicas[1:]:
        pairs = zip(replica.parameters(), replicas[0].parameters(), strict=True)
        learning = [(gradient_of(a), gradient_of(b)) for a, b in pairs if a.requires_grad]
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in learning):
            raise Wrong(f"{case.words}, the replicas differ in the last bit: copy one sum.", facts)
    if t.bytes_between_devices > 4 * nbytes:
        raise Wrong(f"{case.words}, more bytes moved than one exchange takes.", facts)


def _require_gradient(
    words: str, rank: int, name: str, ours: Tensor | None, theirs: Tensor, facts: Facts
) -> None:
    if ours is None:
        raise Wrong(
            f"{words}, {name} of replica {rank} has no gradient, so that its optimizer leaves it "
            "where it was.",
            facts,
        )
    require_finite([ours], f"the gradients, {words}")
    if torch.allclose(ours.cpu(), theirs, atol=1e-6):
        return
    scale = (ours.cpu() * theirs).sum() / (theirs**2).sum()
    times = ""
    if torch.allclose(ours.cpu(), scale * theirs, atol=1e-5):
        times = f": it is {scale:.2f} times what it should be"
    raise Wrong(f"{words}, the gradient of {name} on replica {rank} is wrong{times}.", facts)


@check
def check_combine(combine: Callable[[list[Tensor | None], list[int]], Tensor]) -> Verdict:
    """Graded on the gradient for even, uneven and empty shards."""
    with hardware.fresh_devices(4) as gpus:
        for sizes in ([5, 5, 5, 5], [104, 103, 103, 103], [9, 1, 4, 2], [1, 1, 1, 0], [0, 2, 1, 0]):
            examples = [torch.randn(size, 6) for size in sizes]
            gradients = [
                shard.mean(dim=0).to(gpu) if len(shard) else None
                for shard, gpu in zip(examples, gpus, strict=True)
            ]
            expected = torch.cat(examples).mean(dim=0)
            means = torch.stack([g.cpu() for g in gradients if g is not None])
            answer = _combined(combine, gradients, sizes)
            home = next(gradient.device for gradient in gradients if gradient is not None)
            if answer.device != home:
                raise Wrong(
                    f"for shards of {sizes} images the result should be on {home}, and is on "
                    f"{answer.device}."
                )
            if answer.shape != expected.shape:
                raise Wrong(
                    f"the result has shape {tuple(answer.shape)}, and should have the shape of "
                    f"each gradient, {tuple(expected.shape)}."
                )
            answer = answer.cpu().to(expected.dtype)
            require_finite([answer], f"the result for shards of {sizes} images")
            if torch.allclose(answer, expected, atol=1e-6):
                continue
            hint = ""
            if torch.allclose(answer, means.mean(dim=0), atol=1e-5):
                hint = " This is the plain mean of the shards' means."
            elif torch.allclose(answer, means.sum(dim=0), atol=1e-5):
                hint = " This is the sum of the shards' means."
            elif torch.allclose(answer, means.sum(dim=0) / len(sizes), atol=1e-5):
                hint = " This is the sum of the shards' means, divided by the number of GPUs."
            elif torch.allclose(answer, expected * sum(sizes), atol=1e-3):
                hint = " This is the sum over all images; the mean is asked for."
            elif torch.allclose(answer, expected * sum(sizes) / len(sizes), atol=1e-3):
                hint = " Divide by the number of images, not by the number of GPUs."
            raise Wrong(f"for shards of {sizes} images it is not the whole batch's gradient.{hint}")
    return right("even, uneven and empty shards, all weighted by their share.")


def _combined(combine: Callable, gradients: list[Tensor | None], sizes: list[int]) -> Tensor:
    """What the answer returns; an error on an empty shard is told with its likely cause."""
    try:
        answer = combine(list(gradients), list(sizes))
    except (TypeError, AttributeError) as error:
        if all(gradient is not None for gradient in gradients):
            raise
        raise Wrong(
            f"for shards of {sizes} images your code stopped with {type(error).__name__}: the "
            "gradient of an empty shard is None, which must be skipped."
        ) from None
    if not isinstance(answer, Tensor):
        raise Wrong(f"your function should return a tensor, and returned {answer!r:.60}.")
    return answer


@check
def check_once(accumulate_and_exchange: Callable) -> Verdict:
    """Graded on the gradients of every replica, and on the bytes of one exchange."""
    with hardware.fresh_devices(3) as gpus:
        model = MLP(64, 32, 10)
        x, y = torch.randn(70, 64), torch.randint(10, (70,))
        y[3:14], y[28:31], y[50:] = -100, -100, -100  # a shard, some, and a piece have no label
        pieces = [
            (list(split_batch(xs, gpus)), list(split_batch(ys, gpus)))
            for xs, ys in zip(x.split(25), y.split(25), strict=True)
        ]
        replicas = replicate(model, gpus)
        unchanged = Unchanged({f"the parameters of replica {r}": m for r, m in enumerate(replicas)})
        F.cross_entropy(model(x), y).backward()
        with timeline.trace() as t:
            accumulate_and_exchange(replicas, pieces, F.cross_entropy)
        unchanged.require()
        moved, target = t.bytes_between_devices, 2 * 2 * 4 * parameter_count(model)
        facts = [("bytes moved", format_bytes(moved), format_bytes(target))]
        gradients = []
        for rank, replica in enumerate(replicas):
            without = f"replica {rank} has no gradients."
            ours = [gradient_of(p, without, facts).cpu() for p in replica.parameters()]
            require_finite(ours, f"the gradients of replica {rank}")
            gradients.append(ours)
        require_not_over_host(t, "gradients", facts, least=4 * parameter_count(model))
        if moved == 0:
            raise Wrong("nothing was exchanged: each replica has the gradient of its own shards.")
        _require_one_exchange(moved, target, facts)
        for ours in gradients:
            _require_gradients(ours, model, facts)
        for others in gradients[1:]:
            if not all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True)):
                raise Wrong("the replicas' gradients differ in the last bit: copy one result.")
        busy = {span.device for span in t.spans if span.kind == "matmul"}
        for index, gpu in enumerate(gpus):
            if index not in busy:
                raise Wrong(f"{gpu} computed nothing: each replica runs its own shards.", facts)
        return right("three pieces, 36 labelled images, one exchange.", facts)


def _require_one_exchange(moved: int, target: int, facts: Facts) -> None:
    if moved >= 2 * target:
        raise Wrong(
            "the gradients were exchanged more than once. Besides the bytes, the second exchange "
            "adds up sums that were added up before.",
            facts,
        )
    if moved > target:
        raise Wrong(
            "more bytes crossed the links than one exchange takes, 2 (N - 1) times the gradients: "
            "add up on one GPU, and send the result to the others.",
            facts,
        )


def _require_gradients(gradients: list[Tensor], model: nn.Module, facts: Facts) -> None:
    expected = [gradient_of(parameter) for parameter in model.parameters()]
    pairs = list(zip(gradients, expected, strict=True))
    if all(torch.allclose(a, b, atol=1e-6) for a, b in pairs):
        return
    scale = sum((a * b).sum().item() for a, b in pairs) / sum((b**2).sum().item() for _, b in pairs)
    if all(torch.allclose(a, scale * b, atol=1e-5) for a, b in pairs):
        raise Wrong(
            f"the gradient points the right way and is {scale:.2f} times what it should be: by "
            "what share is each loss weighted, and is something divided besides?",
            facts,
        )
    raise Wrong(
        "the gradient is not that of the mean over all labelled images: does each count once, in "
        "every piece, on every replica, and no other image at all?",
        facts,
    )
