"""Checks of lesson 02: three silent bugs, statistics of a batch, one exchange for many pieces."""

from __future__ import annotations

import copy
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
    known_mistake,
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
def check_statistics(batch_statistics: Callable[[list[Tensor]], list]) -> Verdict:
    """Graded on mean and variance for even, uneven and empty shards, and on the bytes."""
    features = 6
    for sizes in ([20, 20, 20], [30, 4, 8], [16, 9, 0], [0, 12, 20]):
        with hardware.fresh_devices(3) as gpus:
            originals = [3 + rank + torch.randn(size, features) for rank, size in enumerate(sizes)]
            shards = [shard.to(gpu) for shard, gpu in zip(originals, gpus, strict=True)]
            unchanged = Unchanged({f"the shard on {s.device}": s for s in shards})
            with timeline.trace() as t:
                answer = batch_statistics(list(shards))
            unchanged.require()
            means, variances = _pairs(answer, gpus, features)
        moved = t.bytes_between_devices
        target = 2 * (len(gpus) - 1) * 4 * 2 * features  # a sum and a sum of squares a feature
        with_count = target + 2 * (len(gpus) - 1) * 4
        facts = [("bytes moved", format_bytes(moved), format_bytes(target))]
        case = f"for shards of {sizes} examples"
        for rank in range(len(gpus)):
            _require_statistics(f"{case}, GPU {rank}'s", means[rank], variances[rank], originals)
        require_not_over_host(t, "numbers", facts)
        if moved > with_count:
            raise Wrong(
                "the statistics are right, and more crossed the links than one all-reduce of two "
                "numbers a feature. How many examples there are, len(shard) says on the host.",
                facts,
            )
        if not all(torch.equal(a, b[0]) for b in (means, variances) for a in b):
            raise Wrong(f"{case}, the GPUs differ in the last bit: copy one sum.", facts)
    return right("the whole batch's mean and variance, for two numbers a feature.", facts)


def _pairs(
    answer: object, gpus: list[torch.device], features: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Means and variances on the host, of an answer that has a pair for each GPU."""
    if answer is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(answer, (list, tuple)) or len(answer) != len(gpus):
        raise Wrong(f"return a list of {len(gpus)} pairs for {len(gpus)} GPUs.")
    values: tuple[list[Tensor], list[Tensor]] = [], []
    for gpu, pair in zip(gpus, answer, strict=True):
        if not isinstance(pair, (list, tuple, Tensor)) or len(pair) != 2:
            raise Wrong(f"for {gpu} there should be a pair, the mean and the variance.")
        for what, value, column in zip(("mean", "variance"), pair, values, strict=True):
            if not isinstance(value, Tensor) or tuple(value.shape) != (features,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise Wrong(f"the {what} for {gpu} should have shape ({features},), not {shape}.")
            if value.device != gpu:
                raise Wrong(f"the {what} for {gpu} is on {value.device}.")
            column.append(value.detach().cpu())
    return values


def _require_statistics(
    whose: str, mean: Tensor, variance: Tensor, originals: list[Tensor]
) -> None:
    batch = torch.cat(originals)
    present = [shard for shard in originals if len(shard)]
    means = torch.stack([shard.mean(dim=0) for shard in present])
    spreads = torch.stack([shard.var(dim=0, correction=0) for shard in present])
    shares = torch.tensor([[len(shard) / len(batch)] for shard in present])
    mean_mistakes = {
        "It is the plain mean of the shards' means.": means.mean(dim=0),
        "It is the sum of the shards' means, divided by the number of GPUs.": (
            means.sum(dim=0) / len(originals)
        ),
        "It is the sum: divide by the number of examples.": batch.sum(dim=0),
    }
    inside = (
        "It is a mean of the shards' variances, which leaves out how far their means lie apart."
    )
    variance_mistakes = {
        inside: (spreads * shares).sum(dim=0),
        f"{inside} And each shard counts the same.": spreads.mean(dim=0),
        "It is the mean of the squares: take off the square of the mean.": (batch**2).mean(dim=0),
        "It is divided by one example less than there are.": batch.var(dim=0),
        "It is the standard deviation: its square is asked for.": batch.std(dim=0, correction=0),
    }
    for rank, shard in enumerate(originals):
        if len(shard):
            alone = f"It is that of shard {rank} alone."
            mean_mistakes[alone] = shard.mean(dim=0)
            variance_mistakes[alone] = shard.var(dim=0, correction=0)
    for what, ours, expected, mistakes in (
        ("mean", mean, batch.mean(dim=0), mean_mistakes),
        ("variance", variance, batch.var(dim=0, correction=0), variance_mistakes),
    ):
        if not torch.isfinite(ours).all():
            raise Wrong(f"{whose} {what} is NaN or infinite. The mean of no examples is 0 / 0.")

        def matches(other: Tensor, ours: Tensor = ours) -> bool:
            return torch.allclose(ours.to(other.dtype), other, rtol=1e-4, atol=1e-4)

        if not matches(expected):
            mistake = known_mistake(matches, mistakes)
            raise Wrong(f"{whose} {what} is not the whole batch's. {mistake}".strip())


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
            _require_gradients(ours, model, pieces, facts)
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


def _require_gradients(
    gradients: list[Tensor], model: nn.Module, pieces: list, facts: Facts
) -> None:
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
    ours = torch.cat([gradient.flatten() for gradient in gradients])
    mistake = known_mistake(lambda other: _same_direction(ours, other), _weighted(model, pieces))
    raise Wrong(
        "the gradient is not that of the mean over all labelled images"
        + (
            f". {mistake}"
            if mistake
            else ": does each count once, in every piece, on every replica, and no other at all?"
        ),
        facts,
    )


def _same_direction(ours: Tensor, other: Tensor) -> bool:
    scale = (ours @ other) / (other @ other)
    return torch.allclose(ours, scale * other, atol=1e-5)


def _weighted(model: nn.Module, pieces: list) -> dict[str, Tensor]:
    """The gradients that wrong weights of the shards come to, by the sentence that names them."""
    by_images, by_shard, by_piece = [], [], []
    for xs, ys in pieces:
        labels = sum((y.cpu() != -100).sum().item() for y in ys)
        for x, y in zip(xs, ys, strict=True):
            single = copy.deepcopy(model).cpu()
            single.zero_grad()
            count = (y.cpu() != -100).sum().item()
            if not count:
                continue
            F.cross_entropy(single(x.cpu()), y.cpu()).backward()
            mean = torch.cat([gradient_of(p).flatten() for p in single.parameters()])
            by_images.append(mean * len(y))
            by_shard.append(mean)
            by_piece.append(mean * count / labels)
    return {
        "It is weighted by images, and those without a label count.": sum(by_images),
        "Every shard counts the same, however many labels it has.": sum(by_shard),
        "Every piece counts the same, however many labels it has.": sum(by_piece),
    }
