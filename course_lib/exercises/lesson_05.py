"""Checks of lesson 05: a schedule of one's own, the loss of a microbatch, how many microbatches."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import CLASSROOM, hardware, timeline
from course_lib.exercises.diagnosis import gradient_of, require_finite
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedule_chart import draw, step_times
from course_lib.parallel.schedule_rules import Schedule, Step, held
from course_lib.parallel.schedule_rules import check as check_schedule
from course_lib.parallel.schedules import gpipe

GPUS, MICROBATCHES, MOST_HELD = 2, 4, 2


@check
def check_write(my_schedule: Callable[[], list[list[str]]]) -> Verdict:
    """Graded on legality, activations held and time, on paper; then it is run."""
    schedule = _from_words(my_schedule())
    try:
        check_schedule(schedule)
    except ValueError as error:
        raise Wrong(f"this cannot run: {_with_gpus(error)}.") from None
    most = max(held(schedule))
    taken, allowed = _length(schedule), _length(gpipe(GPUS, MICROBATCHES))
    facts = [
        ("activations held", str(most), f"at most {MOST_HELD}"),
        ("time, in forwards", f"{taken:g}", f"at most {allowed:g}"),
    ]
    for gpu, count in enumerate(held(schedule)):
        if count > MOST_HELD:
            raise Wrong(f"GPU {gpu} holds {count} activations at once: go backward earlier.", facts)
    if taken > allowed:
        raise Wrong("it takes longer than GPipe: some GPU waits where it need not.", facts)
    seconds = _run(schedule).seconds
    return right(
        f"legal, thrifty and as fast as GPipe. Run on two GPUs: {seconds * 1e3:.0f} ms "
        "(simulated), with the gradients of one GPU.",
        facts,
    )


def _from_words(lists: list[list[str]] | list[str]) -> Schedule:
    """``[["F0", "B0"], ...]`` or ``["F0 B0", ...]`` as a schedule."""
    rows = lists if isinstance(lists, (list, tuple)) else []
    rows = [row.split() if isinstance(row, str) else row for row in rows]
    if len(rows) != GPUS or not all(isinstance(row, (list, tuple)) for row in rows):
        raise Wrong(f"return {GPUS} lists of words, one for each GPU.")
    steps = []
    for gpu, words in enumerate(rows):
        row = []
        for word in words:
            if not (isinstance(word, str) and word[:1] in ("F", "B") and word[1:].isdecimal()):
                raise Wrong(
                    f"GPU {gpu}: {word!r} is no step. A step is a word such as 'F0' or 'B3'."
                )
            row.append(Step(word[0], gpu, int(word[1:])))
        steps.append(row)
    return Schedule("yours", MICROBATCHES, list(range(GPUS)), steps)


def _with_gpus(error: ValueError) -> str:
    """What the library says of a schedule, in the lesson's word for a device."""
    return str(error).replace("device", "GPU")


def _length(schedule: Schedule) -> float:
    return max(end for _, end in step_times(schedule).values())


def show(my_schedule: Callable[[], list[list[str]]]) -> None:
    """Draw an answer to exercise 1: on paper, and as two virtual GPUs run it."""
    try:
        schedule = _from_words(my_schedule())
        check_schedule(schedule)
    except NotImplementedError:
        print("nothing to show yet: write your schedule above, and run this cell again.")
        return
    except Wrong as wrong:
        print(f"this cannot be drawn: {wrong}")
        return
    except ValueError as error:
        print(f"this cannot be drawn: {_with_gpus(error)}")
        return
    _, (paper, run) = plt.subplots(2, figsize=(9, 5.6), layout="constrained")
    draw(schedule, paper)
    _run(schedule).plot(run, title="The same, run on two GPUs")
    plt.show()


def _run(schedule: Schedule) -> timeline.Trace:
    """Record a real step by this schedule, and compare its gradients."""
    with hardware.fresh_devices(GPUS, CLASSROOM.with_(launch_overhead=0.0)) as gpus:
        layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).double()
        x, y = torch.randn(256, 256).double(), torch.randint(0, 256, (256,))
        parts = [nn.Linear(256, 256).double() for _ in range(2)]
        for part, layer in zip(parts, layers, strict=True):
            part.load_state_dict(layer.state_dict())
        model = Pipeline(nn.Sequential(*parts), gpus, [1])
        x_first, y_last = x.to(gpus[0]), y.to(gpus[1])
        with timeline.trace() as t:
            model.forward_backward(schedule, x_first, y_last, F.cross_entropy)
        F.cross_entropy(layers(x), y).backward()
        for ours, single in zip(model.parameters(), layers.parameters(), strict=True):
            assert torch.allclose(gradient_of(ours).cpu(), gradient_of(single))
    return t


@check
def check_share(microbatch_loss: Callable[[Tensor, Tensor, int, int, int], Tensor]) -> Verdict:
    """Graded on the gradient of a whole batch with padding, cut in several ways."""
    # Of each microbatch its examples, and how many of them are padding. At first no two of stages,
    # microbatches and their examples are equal, nor what counts: mistakes look different.
    for sizes, padding, stages in (
        ([5, 5, 5, 5], [0, 0, 0, 0], 3),
        ([6, 5, 5], [4, 0, 1], 2),
        ([4, 4], [4, 1], 3),
        ([9], [2], 1),
    ):
        scores, targets = torch.randn(sum(sizes), 10), torch.randint(0, 10, (sum(sizes),))
        for part, hidden in zip(targets.split(sizes), padding, strict=True):
            part[:hidden] = -100
        counts = [int((part != -100).sum()) for part in targets.split(sizes)]
        whole = scores.clone().requires_grad_()
        F.cross_entropy(whole, targets).backward()
        gradients = []
        for part, labels in zip(scores.split(sizes), targets.split(sizes), strict=True):
            part = part.clone().requires_grad_()
            loss = microbatch_loss(part, labels.clone(), sum(counts), len(sizes), stages)
            if loss is None:
                raise Wrong("your function returned None: is a return statement missing?")
            if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
                raise Wrong(
                    "return a loss: a tensor that is a single number, computed from the scores, so "
                    "that backward() can start from it."
                )
            if not torch.isfinite(loss):
                count = int((labels != -100).sum())
                why = "" if count else ": a mean over no targets at all is 0/0"
                raise Wrong(
                    f"a microbatch of which {count} targets count has loss {loss.item():g}{why}."
                )
            loss.backward()
            gradients.append(torch.zeros_like(part) if part.grad is None else part.grad)
        ours = torch.cat(gradients)
        require_finite([ours], "the gradient of the scores")
        where = f"for microbatches of {sizes} examples, of which {padding} are padding, "
        if not torch.allclose(ours, gradient_of(whole), atol=1e-7):
            likely = _likely(ours, gradient_of(whole), sizes, counts, stages)
            raise Wrong(f"{where}on {stages} stages, it is not the batch's gradient. {likely}")
    return right("even and uneven microbatches, with padding, and one that is all padding.")


def _likely(
    ours: Tensor, expected: Tensor, sizes: list[int], counts: list[int], stages: int
) -> str:
    """Which mistake a gradient looks like."""
    total = sum(counts)
    parts = list(zip(expected.split(sizes), sizes, counts, strict=True))
    means = torch.cat([part * (total / max(count, 1)) for part, _, count in parts])
    by_examples = torch.cat(
        [part * (total / max(count, 1)) * (size / sum(sizes)) for part, size, count in parts]
    )
    own_part = (
        "The stages do not share the loss: each has the gradient of the whole loss with respect to "
        "its own part. Do not divide by them."
    )
    mistakes = {
        "This is the sum of the microbatches' means: weight them.": [means],
        "This is the plain mean of the microbatches' means, which are over different numbers of "
        "targets.": [means / len(sizes)],
        "The microbatches are weighted by their examples, and padding does not count.": [
            by_examples
        ],
        own_part: [expected / stages, means / stages, means / (len(sizes) * stages)],
        "You divided by the number of microbatches, too: its share of the targets is all the "
        "weight that a microbatch needs.": [expected / len(sizes)],
        "You divided a microbatch's mean by the targets of the batch: multiply it by its own "
        "targets first.": [means / total],
        "You divide by all examples: padding does not count.": [expected * total / sum(sizes)],
        "This is the sum over all targets; the mean is asked for.": [expected * total],
    }
    for words, gradients in mistakes.items():
        for gradient in gradients:
            if torch.allclose(ours, gradient, atol=1e-6) and not torch.allclose(gradient, expected):
                return words
    return "Compare it with a mean over all targets that count."


@check
def check_choose(choose_microbatches: Callable[..., int | None]) -> Verdict:
    """Graded on several batches, pipelines and memories."""
    for B, p, an_example, room, smallest in (
        (512, 4, 1000, 1e9, 1),
        (512, 4, 1000, 1e9, 16),
        (512, 4, 1000, 32_000, 8),
        (512, 4, 1000, 100_000, 4),
        (60, 8, 10, 600, 7),
        (64, 8, 10, 640, 32),
        (64, 4, 1000, 15_000, 4),
    ):
        given = (
            f"B = {B}, p = {p}, {an_example} bytes an example, {room:,.0f} bytes of room, at least "
            f"{smallest} examples"
        )
        fits = [
            m
            for m in range(1, B + 1)
            if B % m == 0 and B // m >= smallest and min(m, p) * (B // m) * an_example <= room
        ]
        expected = max(fits, default=None)
        ours = choose_microbatches(B, p, an_example, room, smallest)
        if ours == expected and not isinstance(ours, float):
            continue
        if ours is not None and not (isinstance(ours, Integral) and ours >= 1):
            raise Wrong(
                "return a whole number of microbatches, 1 or above, or None if nothing fits; for "
                f"{given} yours is {ours!r}."
            )
        explained = _explain(ours, expected, B, p, an_example, room, smallest)
        raise Wrong(f"for {given}: {expected} is right, and yours is {ours}. {explained}")
    return right("as many microbatches as fit, and no smaller than allowed.")


def _explain(
    m: int | None,
    expected: int | None,
    B: int,
    p: int,
    bytes_an_example: int,
    room: float,
    smallest: int,
) -> str:
    """What is wrong with a number of microbatches, or with none."""

    def needed(m: int) -> int:
        return min(m, p) * (B // m) * bytes_an_example

    if m is None:
        assert expected is not None  # or the two would be equal
        return (
            f"Of {expected} microbatches the first GPU holds {min(expected, p)} at most, "
            f"{needed(expected):,} bytes: they fit."
        )
    if B % m:
        return f"{m} does not divide the batch."
    if B // m < smallest:
        return f"Of {m} microbatches, each has {B // m} of the examples: that is too few."
    if needed(m) > room:
        return (
            f"Of {m} microbatches, with {B // m} of the examples each, the first GPU holds "
            f"{min(m, p)} at most: {needed(m):,} bytes."
        )
    return "Yours fits, and with more microbatches the bubble is smaller."
