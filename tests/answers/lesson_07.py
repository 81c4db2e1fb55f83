"""The checks of lesson 07 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_07
from course_lib.parallel.collectives import all_gather, all_reduce, ring_all_reduce
from exercise_answers import Answers

MERGE = Answers("07", "merge", lesson_07.check_merge)
MEET = Answers("07", "meet", lesson_07.check_meet)
BACK = Answers("07", "back", lesson_07.check_back)
LOSS = Answers("07", "loss", lesson_07.check_loss)
EXERCISES = [MERGE, MEET, BACK, LOSS]


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


@MERGE.wrong("the output is wrong", "divided by its own sum")
def weighted_by_the_tops_alone(out, top, total, other_out, other_top, other_total):
    new_top = torch.maximum(top, other_top)
    mine, others = (top - new_top).exp(), (other_top - new_top).exp()
    return out * mine + other_out * others, new_top, total * mine + other_total * others


@MERGE.wrong("the output is wrong", "wrong sign")
def the_tops_the_other_way_round(out, top, total, other_out, other_top, other_total):
    new_top = torch.maximum(top, other_top)
    mine, others = total * (new_top - top).exp(), other_total * (new_top - other_top).exp()
    return (out * mine + other_out * others) / (mine + others), new_top, mine + others


@MERGE.wrong("`out` is torch.float32", "given is torch.float64", unsaid="could not be looked at")
def in_float32(*blocks):
    return [each.float() for each in with_logarithms(*blocks)]


@MERGE.wrong("return three tensors")
def two_values_only(*blocks):
    return with_logarithms(*blocks)[:2]


@MERGE.wrong("return three tensors")
def no_return(*blocks):
    with_logarithms(*blocks)


# ------------------------------------------------------------------ 2. skip, mask or compute


def pairs(queries, keys):
    def word(query, key):
        return "all" if key < query else "mask" if key == query else "skip"

    return [[word(query, key) for key in keys] for query in queries]


def chunks(rank, count):
    return [rank, 2 * count - 1 - rank]


@MEET.right
def by_who_is_earlier(rank, source, count):
    if source == rank:
        return (("mask", "skip"), ("all", "mask"))
    if source < rank:
        return [["all", "skip"], ["all", "skip"]]
    return [["skip", "skip"], ["all", "all"]]


@MEET.right
def by_the_tokens(rank, source, count):
    rows = []
    for query in chunks(rank, count):
        row = []
        for key in chunks(source, count):
            seen = [k <= q for q in (2 * query, 2 * query + 1) for k in (2 * key, 2 * key + 1)]
            row.append("all" if all(seen) else "mask" if any(seen) else "skip")
        rows.append(row)
    return rows


@MEET.wrong("plain order", "queries of chunk 5 and keys of chunk 1 need 'all'")
def as_if_in_plain_order(rank, source, count):
    return pairs([2 * rank, 2 * rank + 1], [2 * source, 2 * source + 1])


@MEET.wrong("need 'skip', and yours is 'mask'")
def a_mask_everywhere(rank, source, count):
    return [["mask", "mask"], ["mask", "mask"]]


@MEET.wrong("queries of chunk 0 and keys of chunk 0 need 'mask', and yours is 'all'")
def everything(rank, source, count):
    return [["all", "all"], ["all", "all"]]


@MEET.wrong("Rows are for queries")
def keys_in_rows(rank, source, count):
    return [list(row) for row in zip(*by_who_is_earlier(rank, source, count), strict=True)]


@MEET.wrong("need 'mask', and yours is 'all'")
def no_mask_at_home(rank, source, count):
    return [
        [word.replace("mask", "all") for word in row] for row in by_the_tokens(rank, source, count)
    ]


@MEET.wrong("GPU 0 of 3 with the block of GPU 1")
def nobody_skips_who_comes_later(rank, source, count):
    if source > rank:
        return [["skip", "skip"], ["all", "skip"]]
    return by_the_tokens(rank, source, count)


@MEET.wrong("'no' is none of the words")
def other_words(rank, source, count):
    return [["no", "skip"], ["all", "mask"]]


@MEET.wrong("return two lists of two words")
def one_list(rank, source, count):
    return ["mask", "skip", "all", "mask"]


@MEET.wrong("returned None", "return statement")
def no_words(rank, source, count):
    by_the_tokens(rank, source, count)


# ------------------------------------------------------------- 3. backward through one block


def weights_of(q, k, log_sum):
    return (q @ k.T / q.shape[-1] ** 0.5 - log_sum).exp()


def with_weights(weights, q, k, v, grad, dot, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_grad = weights * (grad @ v.T - dot)
    return scores_grad @ k * scale, scores_grad.T @ q * scale, weights.T @ grad


@BACK.right
def with_scaled_queries(q, k, v, log_sum, grad, dot):
    scaled = q / q.shape[-1] ** 0.5
    weights = torch.exp(scaled @ k.T - log_sum)
    scores_grad = weights * (torch.einsum("nd,md->nm", grad, v) - dot)
    return [scores_grad @ k / q.shape[-1] ** 0.5, scores_grad.T @ scaled, weights.T @ grad]


@BACK.right
def query_by_query(q, k, v, log_sum, grad, dot):
    q_grad, k_grad, v_grad = (torch.zeros_like(each) for each in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for i in range(len(q)):
        weights = (k @ q[i] * scale - log_sum[i]).exp()
        scores_grad = weights * (v @ grad[i] - dot[i])
        q_grad[i] = scores_grad @ k * scale
        k_grad += scores_grad[:, None] * q[i] * scale
        v_grad += weights[:, None] * grad[i]
    return q_grad, k_grad, v_grad


@BACK.wrong("gradient of v", "softmax over this block alone")
def a_softmax_over_the_block(q, k, v, log_sum, grad, dot):
    weights = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
    return with_weights(weights, q, k, v, grad, dot)


@BACK.wrong("gradient of v", "scores lack the factor")
def scores_without_the_scale(q, k, v, log_sum, grad, dot):
    return with_weights((q @ k.T - log_sum).exp(), q, k, v, grad, dot)


@BACK.wrong("gradient of v", "log_sum is the logarithm of the sum")
def divided_by_the_logarithm(q, k, v, log_sum, grad, dot):
    weights = (q @ k.T / q.shape[-1] ** 0.5).exp() / log_sum
    return with_weights(weights, q, k, v, grad, dot)


@BACK.wrong("gradient of k", "δ is that of this block's output")
def the_row_sums_of_this_block(q, k, v, log_sum, grad, dot):
    weights = weights_of(q, k, log_sum)
    own = (grad * (weights @ v)).sum(-1, keepdim=True)
    return with_weights(weights, q, k, v, grad, own)


@BACK.wrong("gradient of k", "the factor 1/√d twice")
def the_scale_twice(q, k, v, log_sum, grad, dot):
    return with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot, scale=1 / q.shape[-1])


@BACK.wrong("the gradient of q is torch.float32", unsaid="could not be looked at")
def gradients_in_float32(q, k, v, log_sum, grad, dot):
    found = with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)
    return [each.float() for each in found]


@BACK.wrong("gradient of k", "lacks the factor 1/√d")
def gradients_without_the_scale(q, k, v, log_sum, grad, dot):
    return with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot, scale=1)


@BACK.wrong("gradient of k", "`dot` is not subtracted")
def dot_forgotten(q, k, v, log_sum, grad, dot):
    return with_weights(weights_of(q, k, log_sum), q, k, v, grad, 0 * dot)


@BACK.wrong("gradients of q do not add up", "lacks the factor")
def the_queries_without_the_scale(q, k, v, log_sum, grad, dot):
    q_grad, *others = with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)
    return q_grad * q.shape[-1] ** 0.5, *others


@BACK.wrong("gradient of q has shape (5, 4), not (6, 4)")
def in_another_order(q, k, v, log_sum, grad, dot):
    q_grad, k_grad, v_grad = with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)
    return k_grad, q_grad, v_grad


@BACK.wrong("return three tensors")
def two_gradients(q, k, v, log_sum, grad, dot):
    return with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)[:2]


@BACK.wrong("returned None", "return statement")
def no_gradients(q, k, v, log_sum, grad, dot):
    with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)


@BACK.wrong("q changed")
def writing_into_the_queries(q, k, v, log_sum, grad, dot):
    found = with_weights(weights_of(q, k, log_sum), q, k, v, grad, dot)
    q.div_(2)
    return found


# --------------------------------------------------------------- 4. the loss of a split sequence


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


@LOSS.wrong("you divided by the number of GPUs, too")
def divided_by_the_gpus_too(scores, targets):
    return [loss / len(scores) for loss in a_count_in_python(scores, targets)]


@LOSS.wrong("a loss is torch.float64", unsaid="could not be looked at")
def in_float64(scores, targets):
    return [loss.double() for loss in a_count_in_python(scores, targets)]


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
