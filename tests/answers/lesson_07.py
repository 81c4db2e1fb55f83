"""The checks of lesson 07 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_07
from course_lib.parallel.collectives import all_gather, all_reduce, ring_all_reduce
from exercise_answers import Answers

MERGE = Answers("07", "merge", lesson_07.check_merge)
DEAL = Answers("07", "deal", lesson_07.check_deal)
LOSS = Answers("07", "loss", lesson_07.check_loss)
EXERCISES = [MERGE, DEAL, LOSS]


# ---------------------------------------------------------------- 1. a merge without overflow


@MERGE.right
def with_logarithms(out, top, total, other_out, other_top, other_total):
    mine, others = top + total.log(), other_top + other_total.log()
    both, new_top = torch.logaddexp(mine, others), torch.maximum(top, other_top)
    merged = out * (mine - both).exp() + other_out * (others - both).exp()
    return merged, new_top, (both - new_top).exp()


@MERGE.right
def the_difference_cut_off_at_zero(out, top, total, other_out, other_top, other_total):
    mine = total * (top - other_top).clamp(max=0).exp()
    others = other_total * (other_top - top).clamp(max=0).exp()
    share = mine / (mine + others)
    return [share * out + (1 - share) * other_out, torch.max(top, other_top), mine + others]


@MERGE.right
def a_softmax_of_two(out, top, total, other_out, other_top, other_total):
    tops = torch.stack([top, other_top])
    new_top = tops.amax(0)
    sums = torch.stack([total, other_total]) * (tops - new_top).exp()
    outs = torch.stack([out, other_out])
    return (outs * sums).sum(0) / sums.sum(0), new_top, sums.sum(0)


@MERGE.right
def in_place(out, top, total, other_out, other_top, other_total):
    new_top = torch.maximum(top, other_top)
    total *= (top - new_top).exp()
    other_total *= (other_top - new_top).exp()
    out *= total
    out += other_out * other_total
    total += other_total
    out /= total
    return out, new_top, total


@MERGE.wrong("scores near 1, the output is wrong", "plain mean", "weight them by their sums")
def the_mean_of_the_outputs(out, top, total, other_out, other_top, other_total):
    return (out + other_out) / 2, torch.maximum(top, other_top), total + other_total


@MERGE.wrong("scores near 1, the output is wrong", "relative to different tops")
def the_sums_as_they_are(out, top, total, other_out, other_top, other_total):
    both = total + other_total
    return (out * total + other_out * other_total) / both, torch.maximum(top, other_top), both


@MERGE.wrong("scores near 10,000, there are infinities or NaNs", "exponential is too large")
def relative_to_zero(out, top, total, other_out, other_top, other_total):
    mine, others = total * top.exp(), other_total * other_top.exp()
    new_top = torch.maximum(top, other_top)
    both = mine + others
    return (out * mine + other_out * others) / both, new_top, both * (-new_top).exp()


@MERGE.wrong("scores near 10,000, there are infinities or NaNs", "exponential is too large")
def relative_to_the_first_top(out, top, total, other_out, other_top, other_total):
    others = other_total * (other_top - top).exp()
    both, new_top = total + others, torch.maximum(top, other_top)
    return (out * total + other_out * others) / both, new_top, both * (top - new_top).exp()


@MERGE.wrong("scores near 1, `top` is not the largest")
def the_smaller_top(out, top, total, other_out, other_top, other_total):
    low = torch.minimum(top, other_top)
    mine, others = total * (top - low).exp(), other_total * (other_top - low).exp()
    return (out * mine + other_out * others) / (mine + others), low, mine + others


@MERGE.wrong("scores near 1, `top` is not the largest")
def the_top_of_the_first(out, top, total, *other):
    merged, _, both = with_logarithms(out, top, total, *other)
    return merged, top, both


@MERGE.wrong("`top` has shape ()", "not (5, 1)")
def one_top_for_all_rows(out, top, total, *other):
    merged, new_top, both = with_logarithms(out, top, total, *other)
    return merged, new_top.max(), both


@MERGE.wrong("the output is wrong", "not divided by the common sum")
def not_divided(out, top, total, other_out, other_top, other_total):
    new_top = torch.maximum(top, other_top)
    mine, others = total * (top - new_top).exp(), other_total * (other_top - new_top).exp()
    return out * mine + other_out * others, new_top, mine + others


@MERGE.wrong("the output is wrong", "the sums are not")
def weights_without_the_sums(out, top, total, other_out, other_top, other_total):
    new_top = torch.maximum(top, other_top)
    mine, others = (top - new_top).exp(), (other_top - new_top).exp()
    merged = (out * mine + other_out * others) / (mine + others)
    return merged, new_top, total * mine + other_total * others


@MERGE.wrong("scores near 1, `total` is not the sum of exp(score - top)")
def a_total_of_the_sums_as_they_are(out, top, total, other_out, other_top, other_total):
    merged, new_top, _ = with_logarithms(out, top, total, other_out, other_top, other_total)
    return merged, new_top, total + other_total


@MERGE.wrong("return three tensors")
def two_values_only(*blocks):
    return with_logarithms(*blocks)[:2]


@MERGE.wrong("return three tensors")
def no_return(*blocks):
    with_logarithms(*blocks)


# ----------------------------------------------------------------------- 2. deal out the tokens


@DEAL.right
def zigzag_by_single_tokens(length, count):
    rounds = range(0, length, 2 * count)
    return [
        [start + place for start in rounds for place in (rank, 2 * count - 1 - rank)]
        for rank in range(count)
    ]


@DEAL.right
def the_first_with_the_last(length, count):
    pairs = [(place, length - 1 - place) for place in range(length // 2)]
    return [sorted(sum(pairs[rank::count], ())) for rank in range(count)]


@DEAL.right
def ranges_in_a_tuple(length, count):
    half = length // 2 // count
    fronts = [range(rank * half, (rank + 1) * half) for rank in range(count)]
    return tuple((*front, *(length - 1 - place for place in reversed(front))) for front in fronts)


@DEAL.right
def tensors(length, count):
    chunks = torch.arange(length).chunk(2 * count)
    return [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(count)]


@DEAL.wrong("16 tokens for 4 GPUs", "work is not equal", "[10, 26, 42, 58]")
def contiguous(length, count):
    size = length // count
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(count)]


@DEAL.wrong("16 tokens for 4 GPUs", "work is not equal", "[28, 32, 36, 40]")
def in_turn(length, count):
    return [list(range(rank, length, count)) for rank in range(count)]


@DEAL.wrong("work is not equal")
def a_chunk_from_the_front_of_each_half(length, count):
    size = length // (2 * count)
    chunks = [list(range(place * size, (place + 1) * size)) for place in range(2 * count)]
    return [chunks[rank] + chunks[count + rank] for rank in range(count)]


@DEAL.wrong("16 tokens for 4 GPUs", "position 4 is dealt 2 times, not once")
def a_position_twice(length, count):
    size = length // count
    return [list(range(rank * size, (rank + 1) * size + 1)) for rank in range(count)]


@DEAL.wrong("16 tokens for 4 GPUs", "position 0 is dealt 0 times, not once")
def counting_from_one(length, count):
    return [[place + 1 for place in hand] for hand in zigzag_by_single_tokens(length, count)]


@DEAL.wrong("16 tokens for 4 GPUs", "the positions go from 0 to 15")
def one_too_many(length, count):
    *hands, last = zigzag_by_single_tokens(length, count)
    return [*hands, [*last, length]]


@DEAL.wrong("the positions of a GPU must rise")
def the_back_first(length, count):
    return [hand[::-1] for hand in zigzag_by_single_tokens(length, count)]


@DEAL.wrong("the positions of a GPU must rise")
def pairs_unsorted(length, count):
    pairs = [(place, length - 1 - place) for place in range(length // 2)]
    return [sum(pairs[rank::count], ()) for rank in range(count)]


@DEAL.wrong("different numbers of tokens", "[8, 4, 2, 2]")
def equal_work_and_uneven_counts(length, count):
    hands, work = [[] for _ in range(count)], 0
    for position in range(length):
        share = length * (length + 1) / 2 / count
        hands[min(count - 1, int(work / share))].append(position)
        work += position + 1
    return hands


@DEAL.wrong("return 4 lists of positions")
def one_list(length, count):
    return list(range(length))


@DEAL.wrong("return 4 lists of positions")
def two_lists_a_gpu(length, count):
    size = length // (2 * count)
    return [list(range(place * size, (place + 1) * size)) for place in range(2 * count)]


# --------------------------------------------------------------- 3. the loss of a split sequence


def sums(scores, targets):
    """Each GPU's sum over its targets that count."""
    pairs = zip(scores, targets, strict=True)
    return [F.cross_entropy(*pair, reduction="sum") for pair in pairs]


def counts(targets):
    """How many targets of each GPU count, as a tensor there."""
    return [(target != -100).sum() for target in targets]


def divided(losses, numbers):
    return [loss / number for loss, number in zip(losses, numbers, strict=True)]


@LOSS.right
def a_count_in_python(scores, targets):
    count = sum(int(number) for number in counts(targets))
    return [loss / count for loss in sums(scores, targets)]


@LOSS.right
def counts_gathered(scores, targets):
    gathered = all_gather([number.view(1) for number in counts(targets)])
    return divided(sums(scores, targets), [each.sum() for each in gathered])


@LOSS.right
def the_first_gpu_adds(scores, targets):
    numbers = counts(targets)
    all_reduce(numbers)
    return tuple(divided(sums(scores, targets), numbers))


@LOSS.right
def by_the_formula(scores, targets):
    numbers = counts(targets)
    ring_all_reduce(numbers)
    losses = []
    for score, target, number in zip(scores, targets, numbers, strict=True):
        chosen = score.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
        losses.append(-(chosen * (target != -100)).sum() / number)
    return losses


@LOSS.right
def means_weighted_where_there_are_any(scores, targets):
    mine = counts(targets)
    numbers = [number.clone() for number in mine]
    ring_all_reduce(numbers)
    return [
        F.cross_entropy(score, target, reduction="sum") / own.clamp(min=1) * own / number
        for score, target, own, number in zip(scores, targets, mine, numbers, strict=True)
    ]


@LOSS.wrong("with [1, 5, 0] targets that do not count", "the mean of the GPUs' means")
def the_mean_of_the_means(scores, targets):
    pairs = zip(scores, targets, strict=True)
    return [F.cross_entropy(*pair) / len(scores) for pair in pairs]


@LOSS.wrong("with [1, 5, 0] targets", "add up to the sum of the GPUs' means")
def the_sum_of_the_means(scores, targets):
    return [F.cross_entropy(*pair) for pair in zip(scores, targets, strict=True)]


@LOSS.wrong("with [8, 2, 3] targets", "not a number", "without any target has divided by zero")
def weighted_means(scores, targets):
    mine = counts(targets)
    numbers = [number.clone() for number in mine]
    ring_all_reduce(numbers)
    shares = divided(mine, numbers)
    return [F.cross_entropy(*each) * w for *each, w in zip(scores, targets, shares, strict=True)]


@LOSS.wrong("you divide by all targets", "-100 must not count")
def divided_by_all(scores, targets):
    everyone = sum(len(target) for target in targets)
    return [loss / everyone for loss in sums(scores, targets)]


@LOSS.wrong("with [1, 5, 0] targets", "every GPU has the whole mean")
def the_whole_mean_everywhere(scores, targets):
    numbers = counts(targets)
    ring_all_reduce(numbers)
    totals = sums(scores, targets)
    whole = sum(total.to(totals[0].device) for total in totals) / numbers[0]
    return [whole.to(score.device) for score in scores]


@LOSS.wrong("the sum over all targets: divide by how many count")
def not_divided_at_all(scores, targets):
    return sums(scores, targets)


@LOSS.wrong("the losses add up to", "and the mean is")
def divided_by_one_more_than_its_share(scores, targets):
    numbers = [number * len(scores) + 1 for number in counts(targets)]
    return divided(sums(scores, targets), numbers)


@LOSS.wrong("too much was exchanged", "a number from each GPU is enough")
def everything_on_the_first(scores, targets):
    home = scores[0].device
    whole = F.cross_entropy(
        torch.cat([score.to(home) for score in scores]),
        torch.cat([target.to(home) for target in targets]),
    )
    return [whole, *(score.sum() * 0 for score in scores[1:])]


@LOSS.wrong("too much was exchanged", "a number from each GPU is enough")
def everything_on_the_host(scores, targets):
    whole = F.cross_entropy(
        torch.cat([score.cpu() for score in scores]),
        torch.cat([target.cpu() for target in targets]),
    )
    return [whole.to(score.device) / len(scores) for score in scores]


@LOSS.wrong("each loss must be on its own GPU")
def all_on_the_first(scores, targets):
    return [loss.to(scores[0].device) for loss in a_count_in_python(scores, targets)]


@LOSS.wrong("loss on GPU 0 is detached from its scores")
def detached(scores, targets):
    return [loss.detach() for loss in a_count_in_python(scores, targets)]


@LOSS.wrong("with [8, 2, 3] targets", "loss on GPU 0 is detached", "sum over no targets is 0")
def a_constant_where_nothing_counts(scores, targets):
    losses = a_count_in_python(scores, targets)
    return [
        loss if (target != -100).any() else torch.zeros((), device=loss.device)
        for loss, target in zip(losses, targets, strict=True)
    ]


@LOSS.wrong("the sum is right, and its gradient is not")
def the_gradient_of_one_gpu_only(scores, targets):
    first, *others = a_count_in_python(scores, targets)
    constants = [
        loss.detach() + 0 * score.sum() for loss, score in zip(others, scores[1:], strict=True)
    ]
    return [first, *constants]


@LOSS.wrong("a tensor with one number")
def a_loss_for_each_token(scores, targets):
    pairs = zip(scores, targets, strict=True)
    return [F.cross_entropy(*pair, reduction="none") for pair in pairs]


@LOSS.wrong("a tensor with one number")
def plain_numbers(scores, targets):
    return [loss.item() for loss in a_count_in_python(scores, targets)]


@LOSS.wrong("return 3 losses")
def one_loss(scores, targets):
    return a_count_in_python(scores, targets)[0]
