"""Checks of lesson 13: a sampler, a test over ranks, gradient noise, error feedback, DiLoCo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Facts,
    Unchanged,
    known_mistake,
    require_finite,
    require_not_over_host,
    require_tensors,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.parallel.data_parallel import replicate

# ----------------------------------------------------------------------- 1. who sees what


@check
def check_sampler(examples_of: Callable[..., Sequence[int]]) -> Verdict:
    """Graded on epochs of several sizes: equal, disjoint parts, and a new order each time."""
    for count, examples in ((4, 103), (3, 12), (1, 7), (8, 1437)):
        parts = _parts(examples_of, count, examples, 0, 0)
        _judge_parts(parts, count, examples)
    state = torch.get_rng_state()
    first = _parts(examples_of, 4, 103, 0, 0)
    if not torch.equal(state, torch.get_rng_state()):
        raise Wrong(
            "your function moves PyTorch's own random numbers, which the model draws from as well: "
            "use a generator of your own, torch.Generator().manual_seed(...)."
        )
    torch.rand(3)  # another rank has drawn other numbers meanwhile
    if _parts(examples_of, 4, 103, 0, 0) != first:
        raise Wrong(
            "the same arguments give another answer the second time. Each rank calls it for "
            "itself: they would no longer agree on one order."
        )
    if _parts(examples_of, 4, 103, 1, 0) == first:
        raise Wrong("epoch 1 has the same order as epoch 0.")
    if _parts(examples_of, 4, 103, 0, 1) == first:
        raise Wrong("seed 1 gives the same order as seed 0.")
    sets = [[set(part) for part in _parts(examples_of, 4, 103, epoch, 0)] for epoch in range(6)]
    if all(each == sets[0] for each in sets):
        raise Wrong(
            "each rank sees the same examples in every epoch, in another order: shuffle all of "
            "them first, and deal them out afterwards."
        )
    left_out = [frozenset(range(103)) - frozenset().union(*each) for each in sets]
    if len(set(left_out)) == 1:
        raise Wrong(
            f"in six epochs the same examples were left out, {sorted(left_out[0])}: they are never "
            "learnt from."
        )
    if any(part == sorted(part) for part in first):
        raise Wrong("a rank gets its examples sorted, and should get them in random order.")
    return right("one order, which all ranks find alone, and a new one each epoch.")


def _parts(
    examples_of: Callable[..., Sequence[int]], count: int, examples: int, epoch: int, seed: int
) -> list[list[int]]:
    parts = []
    for rank in range(count):
        part = examples_of(rank, count, examples, epoch, seed)
        if part is None:
            raise Wrong("your function returned None: is a return statement missing?")
        if isinstance(part, int) or (isinstance(part, Tensor) and part.dim() != 1):
            raise Wrong("return the numbers of the examples in a row: a list, or a tensor of them.")
        parts.append([int(each) for each in part])
    return parts


def _judge_parts(parts: list[list[int]], count: int, examples: int) -> None:
    case = f"{examples} examples on {count} GPU{'s' if count > 1 else ''}"
    lengths = [len(part) for part in parts]
    everything = [each for part in parts for each in part]
    for each in everything:
        if not 0 <= each < examples:
            raise Wrong(
                f"{case}: there is an example {each}; they go from 0 on, to {examples - 1}."
            )
    if len(set(lengths)) > 1:
        raise Wrong(
            f"{case}: the ranks get {lengths}: not equally many. The rank that has more would wait "
            "in its last all-reduce for ever."
        )
    if len(set(everything)) < len(everything):
        if count > 1 and all(set(part) == set(parts[0]) for part in parts):
            raise Wrong(f"{case}: all ranks get the same examples.")
        twice = len(everything) - len(set(everything))
        raise Wrong(f"{case}: {twice} of them come twice in one epoch.")
    if len(everything) < examples // count * count:
        raise Wrong(
            f"{case}: {examples - len(everything)} are left out, and no more than "
            f"{examples % count} need be."
        )


# --------------------------------------------------------------------- 2. a test over ranks


@check
def check_evaluate(accuracy_of_all: Callable[..., float]) -> Verdict:
    """Graded on the accuracy, and on how many images each GPU looks at."""
    facts: Facts = []
    for count, examples in ((4, 10), (3, 100), (4, 3), (1, 5), (7, 50)):
        model = nn.Linear(6, 10)
        x, y = torch.randn(examples, 6), torch.randint(0, 10, (examples,))
        scores = model(x).argmax(1)
        y[: examples * 3 // 4] = scores[: examples * 3 // 4]  # right at the front, wrong at the end
        y[examples * 3 // 4 :] = (scores[examples * 3 // 4 :] + 1) % 10
        hits = (scores == y).float()
        with hardware.fresh_devices(count) as gpus:
            replicas, seen = replicate(model, gpus), [0] * count
            for rank, replica in enumerate(replicas):
                _count_rows(replica, rank, seen)
            unchanged = Unchanged(
                {"x": x, "y": y} | {f"replica {r}": m for r, m in enumerate(replicas)}
            )
            ours = require_number(accuracy_of_all(list(replicas), x, y))
            unchanged.require()
        case = f"{examples} images on {count} GPU{'s' if count > 1 else ''}"
        most = -(-examples // count)
        facts = [("most images on one GPU", str(max(seen)), f"at most {most}")]
        if ours != ours:
            raise Wrong(f"{case}: the accuracy is NaN: what is the mean of an empty shard?", facts)
        if abs(ours - hits.mean().item()) > 1e-6:
            raise Wrong(
                f"{case}: {hits.mean():.4f} is right, and yours is {ours:.4f}."
                f"{_evaluate_mistake(ours, hits, count, sum(seen))}",
                facts,
            )
        if sum(seen) != examples:
            raise Wrong(
                f"{case}: the accuracy is right, and the GPUs looked at {sum(seen)} images in all.",
                facts,
            )
        if max(seen) > most:
            raise Wrong(f"{case}: one GPU looked at {max(seen)}: share them evenly.", facts)
    return right("each image once, and each GPU its part of them.", facts)


def _count_rows(replica: nn.Module, rank: int, seen: list[int]) -> None:
    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[rank] += len(inputs[0])

    replica.register_forward_pre_hook(count)


def _evaluate_mistake(ours: float, hits: Tensor, count: int, looked: int) -> str:
    """What the number looks like, of the mistakes that the images looked at do not rule out."""
    if not looked:
        return " No replica was asked about an image: call each with its part of them."
    shards = [shard for shard in hits.tensor_split(count) if len(shard)]
    total = len(hits)
    equal = total // count * count
    padded = torch.cat([hits, hits[: -total % count]])
    mistakes: dict[str, Tensor | float] = {
        " This is the mean of the GPUs' means, in which an image of a small shard weighs more than "
        "one of a large shard.": sum(shard.mean() for shard in shards) / len(shards),
        " Divided by all GPUs, of which some have no image.": sum(s.mean() for s in shards) / count,
        " This is the first GPU's part alone.": shards[0].mean(),
        " This is a number of hits: divide it by the number of images.": hits.sum(),
    }
    if looked > total:
        words = " Here some images are counted twice, to make the shards even."
        mistakes[words] = padded.mean()
    if looked == equal:
        mistakes[" Here the images that do not divide are left out."] = hits[:equal].mean()
    return known_mistake(
        lambda wrong: abs(ours - float(wrong)) < 1e-6,
        {words: torch.as_tensor(value) for words, value in mistakes.items()},
    )


# ------------------------------------------------------------------------ 3. gradient noise


@check
def check_noise(mean_and_noise: Callable[..., tuple[float, float]]) -> Verdict:
    """Graded on the mean, both estimates, and the bytes: an all-reduce, and a number a GPU."""
    facts: Facts = []
    for count, shard, length in ((4, 16, 1000), (2, 1, 300), (3, 5, 999)):
        before = [torch.randn(length) + 0.2 for _ in range(count)]
        with hardware.fresh_devices(count) as gpus:
            rows = [row.to(gpu) for row, gpu in zip(before, gpus, strict=True)]
            with timeline.trace() as t:
                answer = mean_and_noise(rows, shard)
            after = [row.cpu() for row in rows]
            sent = t.bytes_between_devices
        least = 2 * (count - 1) * 4 * length
        facts = [("bytes between GPUs", format_bytes(sent), f"at most {format_bytes(least + 64)}")]
        mean = torch.stack(before).mean(0)
        case = f"{count} GPUs with {shard} example{'s' if shard > 1 else ''} each"
        for rank, row in enumerate(after):
            if torch.allclose(row, mean * count, atol=1e-4):
                raise Wrong(f"{case}: rank {rank}'s row is the sum, and should be the mean.", facts)
            if not torch.allclose(row, mean, atol=1e-4):
                raise Wrong(
                    f"{case}: rank {rank}'s row is not the mean of all gradients afterwards.", facts
                )
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise Wrong("return two numbers: the estimates of |G|² and of V.", facts)
        ours = [
            require_number(each.item() if isinstance(each, Tensor) else each) for each in answer
        ]
        _judge_noise(ours, before, mean, shard, case, facts)
        if sent > least + 64:
            raise Wrong(
                f"{case}: more is sent than one ring all-reduce and a number a GPU: take each "
                "GPU's own norm where its row is.",
                facts,
            )
        require_not_over_host(t, "gradients", facts, least=4 * length)
    return right("the mean gradient, and how much of it is noise, for a number a GPU.", facts)


def _judge_noise(
    ours: list[float], before: list[Tensor], mean: Tensor, shard: int, case: str, facts: Facts
) -> None:
    count = len(before)
    small = sum(row.square().sum().item() for row in before) / count
    large = mean.square().sum().item()
    variance = (small - large) / (1 / shard - 1 / (shard * count))
    signal = large - variance / (shard * count)

    def same(pair: Tensor) -> bool:
        scale = 1e-3 * max(abs(signal), abs(variance))
        return all(
            abs(a - b) < max(1e-3 * abs(b), 1e-4 * scale)
            for a, b in zip(ours, pair.tolist(), strict=True)
        )

    if any(each != each for each in ours):
        raise Wrong(f"{case}: an estimate is NaN.", facts)
    if same(torch.tensor([signal, variance], dtype=torch.float64)):
        return
    own = before[0].square().sum().item()
    of_own = (own - large) / (1 / shard - 1 / (shard * count))
    of_norms = (small**0.5 - large**0.5) / (1 / shard - 1 / (shard * count))
    mean_norm = (sum(row.norm().item() for row in before) / count) ** 2
    of_mean_norm = (mean_norm - large) / (1 / shard - 1 / (shard * count))
    per_gpu = (small - large) / (1 - 1 / count)
    sized = {
        "these are V and |G|²: return |G|² first.": [variance, signal],
        "|G|² is the squared norm of the mean, with its noise in it: take V/B off.": [
            large,
            variance,
        ],
        "this takes the norm of GPU 0 for all: the mean over the GPUs is less noisy.": [
            large - of_own / (shard * count),
            of_own,
        ],
        "these are of norms, and the equations are about *squared* norms.": [
            large**0.5 - of_norms / (shard * count),
            of_norms,
        ],
        "the norms are averaged and then squared: square each first.": [
            large - of_mean_norm / (shard * count),
            of_mean_norm,
        ],
        "this V is that of a whole shard's gradient: of one example's it is as many times larger "
        "as a shard has examples.": [large - per_gpu / count, per_gpu],
    }
    wrong = {
        f" It looks as if {words}": torch.tensor(pair, dtype=torch.float64)
        for words, pair in sized.items()
        if not (shard == 1 and pair[1] == per_gpu)
    }
    raise Wrong(
        f"{case}: |G|² = {signal:.4g} and V = {variance:.4g} are right; yours are {ours[0]:.4g} "
        f"and {ours[1]:.4g}.{known_mistake(same, wrong)}",
        facts,
    )


# ------------------------------------------------------------------------ 4. error feedback


@check
def check_feedback(say_signs: Callable[..., tuple[Tensor, Tensor]]) -> Verdict:
    """Graded on what is said and owed, and on the loss of a training that uses it."""
    wanted, owed = torch.randn(500), torch.randn(500)
    unchanged = Unchanged({"the gradient": wanted, "what is owed": owed})
    said, now_owed = _said_and_owed(say_signs, wanted, owed)
    unchanged.require()
    sizes = said.abs().unique()
    if len(sizes) > 2 or (len(sizes) == 2 and (sizes[1] - sizes[0]) > 1e-6 * sizes[1]):
        raise Wrong(
            f"what is said has numbers of {len(sizes)} different sizes: a sign for each and one "
            "size for all can be sent in a bit a number."
        )
    if torch.allclose(now_owed, torch.zeros_like(now_owed)):
        raise Wrong("nothing is owed afterwards: what was not said is forgotten.")
    total = wanted + owed
    if not torch.allclose(said + now_owed, total, atol=1e-5):
        mistakes = {
            "what was owed before is forgotten.": wanted - said,
            "what is owed has the wrong sign.": said - total,
            "what is owed is added up, though it was said again already: the new one replaces the "
            "old one.": total - said + owed,
        }
        raise Wrong(
            "what is said and what is owed afterwards must add up to the gradient and what was "
            "owed before, and do not. "
            + known_mistake(lambda wrong: torch.allclose(now_owed, wrong, atol=1e-5), mistakes)
        )
    if not torch.equal(said.sign(), total.sign()):
        agrees = torch.equal(said.sign(), wanted.sign())
        raise Wrong(
            "the signs are those of the gradient alone: say what is owed as well."
            if agrees
            else "the signs are not those of the gradient and what is owed."
        )
    size, mean = sizes[-1].item(), total.abs().mean().item()
    loss, exact = _loss_with(say_signs), _loss_with(lambda row, owed: (row, owed))
    facts = [
        ("loss after 200 steps", f"{loss:.2g}", f"at most {2 * exact:.2g}"),
        ("bytes a step and GPU", format_bytes(500 / 8 + 4), format_bytes(500 / 8 + 4)),
    ]
    if abs(size - mean) > 1e-4 * mean:
        raise Wrong(
            f"the size is {size:.4f}, and the mean size of what is wanted, {mean:.4f}, is nearest "
            "to it.",
            facts,
        )
    if not loss <= 2 * exact:
        raise Wrong(
            "the training that uses it does not come as far as with whole gradients.", facts
        )
    return right("a bit a number, and over many steps nothing is lost.", facts)


def _said_and_owed(
    say_signs: Callable[..., tuple[Tensor, Tensor]], wanted: Tensor, owed: Tensor
) -> tuple[Tensor, Tensor]:
    answer = say_signs(wanted, owed)
    if answer is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise Wrong("return two rows: what is said, and what is owed from now on.")
    for each in answer:
        if not isinstance(each, Tensor) or each.shape != wanted.shape:
            raise Wrong(f"return two rows of {len(wanted)} numbers each.")
    require_finite(answer, "what is said or owed")
    return answer[0].detach().clone(), answer[1].detach().clone()


def _loss_with(say: Callable[..., tuple[Tensor, Tensor]]) -> float:
    """The loss of a regression that two GPUs learn, each of which says its gradient by ``say``."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(500, generator=generator)
    place, owed = torch.zeros(500), [torch.zeros(500), torch.zeros(500)]
    for _ in range(200):
        total = torch.zeros(500)
        for rank in range(2):
            x = torch.randn(64, 500, generator=generator)
            gradient = x.T @ (x @ (place - truth)) / 64
            said, owed[rank] = say(gradient, owed[rank])
            total = total + said
        place = place - 0.02 * total / 2
    return ((place - truth).square().mean()).item()


# --------------------------------------------------------------------------- 5. DiLoCo


@check
def check_outer(outer_step: Callable[..., tuple[list[Tensor], list[Tensor]]]) -> Verdict:
    """Graded on three meetings, beside PyTorch's own SGD, and on the bytes."""
    length, count = 1000, 4
    place = nn.Parameter(torch.randn(length))
    outer = torch.optim.SGD([place], lr=0.7, momentum=0.9, nesterov=True)
    place.grad = 0.1 * torch.randn(length)
    outer.step()  # so that there is a momentum
    momentum = outer.state[place]["momentum_buffer"]  # which each step changes in place
    facts: Facts = []
    with hardware.fresh_devices(count) as gpus:
        anchors: list[Tensor] = [place.detach().to(gpu) for gpu in gpus]
        momenta: list[Tensor] = [momentum.to(gpu) for gpu in gpus]
        for meeting in range(3):
            moved = [0.1 * torch.randn(length) - 0.05 for _ in gpus]
            came = [(place.detach() + each).to(gpu) for each, gpu in zip(moved, gpus, strict=True)]
            was, was_momentum = place.detach().clone(), momentum.clone()
            place.grad = -torch.stack(moved).mean(0)
            outer.step()
            with timeline.trace() as t:
                answer = outer_step(list(anchors), list(came), list(momenta))
            if answer is None:
                raise Wrong("your function returned None: is a return statement missing?")
            if not isinstance(answer, (tuple, list)) or len(answer) != 2:
                raise Wrong("return two lists: the new places and the new momenta.")
            anchors, momenta = list(answer[0]), list(answer[1])
            for values in (anchors, momenta):
                require_tensors(values, [(length,)] * count)
                require_finite(values, "what is returned")
            sent = max(t.bytes_sent(gpu) for gpu in gpus)
            least = 2 * (count - 1) * 4 * length // count
            facts = [("most bytes sent by one GPU", format_bytes(sent), format_bytes(least))]
            for rank, (anchor, gpu) in enumerate(zip(anchors, gpus, strict=True)):
                if anchor.device != gpu or momenta[rank].device != gpu:
                    raise Wrong(f"rank {rank}'s answer is not on {gpu}.", facts)
            ours = anchors[0].cpu()
            if not torch.allclose(ours, place.detach(), atol=1e-4):
                raise Wrong(
                    f"meeting {meeting}: the new place is not that of SGD with a rate of 0.7 and "
                    "Nesterov momentum of 0.9." + _outer_mistake(ours, was, moved, was_momentum),
                    facts,
                )
            if not all(torch.allclose(each.cpu(), momentum, atol=1e-4) for each in momenta):
                raise Wrong(
                    "the new places are right, and the momenta are not 0.9·m + d: the next meeting "
                    "would begin with wrong ones.",
                    facts,
                )
            if not all(torch.equal(anchors[0].cpu(), each.cpu()) for each in anchors):
                raise Wrong(
                    "the places on the GPUs are not equal to the bit: they would drift apart.",
                    facts,
                )
            require_not_over_host(t, "places", facts)
            if sent > least:
                raise Wrong("more is sent than one ring all-reduce of a row.", facts)
    return right("three meetings, each for one all-reduce.", facts)


def _outer_mistake(ours: Tensor, was: Tensor, moved: list[Tensor], momentum: Tensor) -> str:
    gradient = -torch.stack(moved).mean(0)
    new = 0.9 * momentum + gradient
    new_alone = 0.9 * momentum - moved[0]
    mistakes = {
        " It goes the wrong way: a gradient points away from where the replicas went.": (
            was - 0.7 * (-gradient + 0.9 * (0.9 * momentum - gradient))
        ),
        " The step is added, and should be taken off.": was + 0.7 * (gradient + 0.9 * new),
        " This is the plain average, as in local SGD.": was - gradient,
        " This is plain momentum: Nesterov's looks one step ahead.": was - 0.7 * new,
        " This leaves the momentum out.": was - 0.7 * gradient,
        " The distances are summed, and should be averaged.": (
            was - 0.7 * (4 * gradient + 0.9 * (0.9 * momentum + 4 * gradient))
        ),
        " This begins where the replicas are, and not where they last met.": (
            was - gradient - 0.7 * (gradient + 0.9 * new)
        ),
        " This is GPU 0's own distance: take the mean of all.": (
            was - 0.7 * (-moved[0] + 0.9 * new_alone)
        ),
        " This is the new momentum: return the places first.": new,
    }
    return known_mistake(lambda wrong: torch.allclose(ours, wrong, atol=1e-4), mistakes)
