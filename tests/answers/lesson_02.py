"""The checks of lesson 02 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_02
from course_lib.parallel import collectives, data_parallel
from exercise_answers import Answers, all_reduce_gradients

BUGS = Answers("02", "bugs", lesson_02.check_bugs)
STATISTICS = Answers("02", "statistics", lesson_02.check_statistics)
ONCE = Answers("02", "once", lesson_02.check_once)
EXERCISES = [BUGS, STATISTICS, ONCE]


# ----------------------------------------------------------------- 1. three silent bugs


def weighted_backward(replicas, xs, ys, loss_function):
    total = sum(len(x) for x in xs)
    for replica, x, y in zip(replicas, xs, ys, strict=True):
        if len(x) > 0:
            (loss_function(replica(x), y) * (len(x) / total)).backward()


def plain_backward(replicas, xs, ys, loss_function):
    for replica, x, y in zip(replicas, xs, ys, strict=True):
        if len(x) > 0:
            (loss_function(replica(x), y) / len(replicas)).backward()


def fill_with_zeros(replicas):
    for replica in replicas:
        for parameter in replica.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def reduce_each_layer(replicas):
    """As the colleague did: a shared weight twice."""
    for layers in zip(*(replica.modules() for replica in replicas), strict=True):
        for copies in zip(*(layer.parameters(recurse=False) for layer in layers), strict=True):
            gradients = [p.grad for p in copies if p.grad is not None]
            if gradients:
                collectives.all_reduce(gradients)


@BUGS.right
def with_the_lessons_own_exchange(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    all_reduce_gradients(replicas)


@BUGS.right
def zeros_first_and_each_weight_once(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    fill_with_zeros(replicas)
    for copies in zip(*(replica.parameters() for replica in replicas), strict=True):
        if copies[0].grad is not None:
            collectives.ring_all_reduce([p.grad for p in copies])


@BUGS.right
def the_colleagues_loop_with_a_memory(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    fill_with_zeros(replicas)
    seen = set()
    for layers in zip(*(replica.modules() for replica in replicas), strict=True):
        for copies in zip(*(layer.parameters(recurse=False) for layer in layers), strict=True):
            if copies[0] in seen or copies[0].grad is None:
                continue
            seen.add(copies[0])
            collectives.all_reduce([p.grad for p in copies])


@BUGS.right
def one_flat_tensor(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    fill_with_zeros(replicas)
    learning = [[p for p in replica.parameters() if p.requires_grad] for replica in replicas]
    flat = [torch.cat([p.grad.flatten() for p in mine]) for mine in learning]
    collectives.all_reduce(flat)
    for mine, row in zip(learning, flat, strict=True):
        for p, part in zip(mine, row.split([p.numel() for p in mine]), strict=True):
            p.grad = part.view_as(p)


@BUGS.wrong("with shards of 3, 2 and 2 images", "is wrong")
def as_it_was(replicas, xs, ys, loss_function):
    plain_backward(replicas, xs, ys, loss_function)
    reduce_each_layer(replicas)


@BUGS.wrong("with shards of 1, 1 and no image", "replica 2 has no gradient")
def only_the_shares_mended(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    reduce_each_layer(replicas)


@BUGS.wrong("with a weight that two layers share", "0.token.weight")
def the_shared_weight_left_as_it_was(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    fill_with_zeros(replicas)
    reduce_each_layer(replicas)


@BUGS.wrong("with three shards of two images", "is wrong: it is 3.00 times")
def no_weights_at_all(replicas, xs, ys, loss_function):
    for replica, x, y in zip(replicas, xs, ys, strict=True):
        if len(x) > 0:
            loss_function(replica(x), y).backward()
    all_reduce_gradients(replicas)


@BUGS.right  # the mean of nothing is NaN, and its gradient zero
def empty_shards_not_skipped(replicas, xs, ys, loss_function):
    total = sum(len(x) for x in xs)
    for replica, x, y in zip(replicas, xs, ys, strict=True):
        (loss_function(replica(x), y) * (len(x) / total)).backward()
    all_reduce_gradients(replicas)


@BUGS.wrong("is frozen and has a gradient")
def zeros_for_what_is_frozen(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    for replica in replicas:
        for parameter in replica.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    all_reduce_gradients(replicas)


@BUGS.wrong("the parameters of replica 0 changed")
def a_step_of_the_optimizer_besides(replicas, xs, ys, loss_function):
    with_the_lessons_own_exchange(replicas, xs, ys, loss_function)
    for replica in replicas:
        torch.optim.SGD(replica.parameters(), lr=0.1).step()


@BUGS.wrong("over the host")
def the_exchange_over_the_host(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    fill_with_zeros(replicas)
    for copies in zip(*(replica.parameters() for replica in replicas), strict=True):
        if copies[0].grad is not None:
            total = sum(p.grad.cpu() for p in copies)
            for p in copies:
                p.grad = total.to(p.device)


@BUGS.wrong("on replica 1 is wrong")
def only_the_first_gets_the_sum(replicas, xs, ys, loss_function):
    weighted_backward(replicas, xs, ys, loss_function)
    for first, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
        for other in others:
            first.grad += other.grad.to(first.device)


# ------------------------------------------------------------- 2. BatchNorm over all shards


def sums_of(shards):
    return [torch.stack([shard.sum(dim=0), (shard**2).sum(dim=0)]) for shard in shards]


def reduced(shards):
    sums = sums_of(shards)
    collectives.all_reduce(sums)
    return sums


def statistics(sums, count):
    return [(s / count, squares / count - (s / count) ** 2) for s, squares in sums]


def examples(shards):
    return sum(len(shard) for shard in shards)


@STATISTICS.right
def the_mean_first_and_then_the_distances(shards):
    means = [shard.sum(dim=0) / examples(shards) for shard in shards]
    collectives.all_reduce(means)
    pairs = zip(shards, means, strict=True)
    variances = [((shard - mean) ** 2).sum(dim=0) / examples(shards) for shard, mean in pairs]
    collectives.all_reduce(variances)
    return list(zip(means, variances, strict=True))


@STATISTICS.right
def means_and_squares_weighted_by_share(shards):
    parts = []
    for shard in shards:
        part = torch.zeros(2, shard.shape[1], device=shard.device)
        if len(shard):
            share = len(shard) / examples(shards)
            part[0], part[1] = shard.mean(dim=0) * share, (shard * shard).mean(dim=0) * share
        parts.append(part)
    collectives.all_reduce(parts)
    return [(mean, squares - mean**2) for mean, squares in parts]


@STATISTICS.right
def a_row_with_the_count_in_a_ring(shards):
    rows = [
        torch.cat([s.sum(dim=0), s.square().sum(dim=0), torch.full((1,), len(s), device=s.device)])
        for s in shards
    ]
    collectives.ring_all_reduce(rows)
    width = shards[0].shape[1]
    stacked = [(row[:width] / row[-1], row[width:-1] / row[-1]) for row in rows]
    return [torch.stack([mean, squares - mean**2]) for mean, squares in stacked]


@STATISTICS.wrong("[30, 4, 8]", "plain mean of the shards' means")
def the_plain_mean(shards):
    means = [shard.mean(dim=0) / len(shards) for shard in shards]
    collectives.all_reduce(means)
    pairs = zip(shards, means, strict=True)
    variances = [((shard - mean) ** 2).mean(dim=0) / len(shards) for shard, mean in pairs]
    collectives.all_reduce(variances)
    return list(zip(means, variances, strict=True))


@STATISTICS.wrong("[16, 9, 0]", "NaN or infinite", "0 / 0")
def the_mean_of_an_empty_shard(shards):
    count = examples(shards)
    rows = [torch.stack([s.mean(dim=0), s.square().mean(dim=0)]) * len(s) / count for s in shards]
    collectives.all_reduce(rows)
    return [(mean, squares - mean**2) for mean, squares in rows]


@STATISTICS.wrong("variance", "leaves out how far their means lie apart")
def the_mean_of_the_variances(shards):
    rows = [
        torch.stack([s.mean(dim=0), s.var(dim=0, correction=0)]) * len(s) / examples(shards)
        for s in shards
    ]
    collectives.all_reduce(rows)
    return [(mean, variance) for mean, variance in rows]


@STATISTICS.wrong("GPU 0's mean", "that of shard 0 alone")
def each_its_own(shards):
    return [(shard.mean(dim=0), shard.var(dim=0, correction=0)) for shard in shards]


@STATISTICS.wrong("the mean of the squares", "take off the square of the mean")
def forgetting_the_square_of_the_mean(shards):
    return [(s / examples(shards), q / examples(shards)) for s, q in reduced(shards)]


@STATISTICS.wrong("mean is not the whole batch's", "divide by the number of examples")
def forgetting_to_divide(shards):
    return [(s, q - s**2) for s, q in reduced(shards)]


@STATISTICS.wrong("one example less")
def the_unbiased_variance(shards):
    n = examples(shards)
    return [(mean, v * n / (n - 1)) for mean, v in statistics(reduced(shards), n)]


@STATISTICS.wrong("standard deviation", "its square")
def the_standard_deviation(shards):
    return [(mean, v.sqrt()) for mean, v in statistics(reduced(shards), examples(shards))]


@STATISTICS.wrong("more crossed the links", "two numbers a feature")
def gathering_the_examples(shards):
    home = shards[0].device
    batch = torch.cat([shard.to(home) for shard in shards])
    pair = torch.stack([batch.mean(dim=0), batch.var(dim=0, correction=0)])
    return [tuple(pair.to(shard.device)) for shard in shards]


@STATISTICS.wrong("over the host")
def adding_on_the_host(shards):
    total = sum(s.cpu() for s in sums_of(shards))
    return statistics([total.to(shard.device) for shard in shards], examples(shards))


@STATISTICS.wrong("is on vgpu:0")
def on_the_first_gpu_alone(shards):
    first = reduced(shards)[0]
    return statistics([first] * len(shards), examples(shards))


@STATISTICS.wrong("the shard on vgpu:0 changed")
def squaring_in_place(shards):
    squares = [(shard.sum(dim=0), shard.square_().sum(dim=0)) for shard in shards]
    sums = [torch.stack(pair) for pair in squares]
    collectives.all_reduce(sums)
    return statistics(sums, examples(shards))


@STATISTICS.wrong("a list of 3 pairs")
def two_lists(shards):
    pairs = statistics(reduced(shards), examples(shards))
    return [mean for mean, _ in pairs], [variance for _, variance in pairs]


@STATISTICS.wrong("returned None")
def no_return(shards):
    statistics(reduced(shards), examples(shards))


@STATISTICS.wrong("should have shape (6,)", "()")
def one_number_for_all_features(shards):
    sums = [torch.stack([shard.sum(), (shard**2).sum()]) for shard in shards]
    collectives.all_reduce(sums)
    return statistics(sums, 6 * examples(shards))


# ----------------------------------------------------------------- 3. accumulate, then exchange


def counted(y):
    return (y != -100).sum().item()


def label_count(pieces):
    return sum(counted(y) for _, ys in pieces for y in ys)


def image_count(pieces):
    return sum(len(x) for xs, _ in pieces for x in xs)


def shards(replicas, pieces):
    """Each replica with each of its shards in which something counts."""
    for xs, ys in pieces:
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            if counted(y):
                yield replica, x, y


@ONCE.wrong("a number that is NaN", "the gradients of replica 0")
def divided_by_what_the_last_shard_counts(replicas, pieces, loss_function):
    for xs, ys in pieces:
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            F.cross_entropy(replica(x), y, reduction="sum").backward()
            for parameter in replica.parameters():
                parameter.grad /= counted(y)
    all_reduce_gradients(replicas)


@ONCE.wrong("weighted by images", "those without a label count")
def weighted_by_images(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.right  # which is NaN, and its gradient zero
def the_mean_of_nothing(replicas, pieces, loss_function):
    for xs, ys in pieces:
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.right
def a_sum_in_place_of_a_mean(replicas, pieces, loss_function):
    total = label_count(pieces)
    for xs, ys in pieces:
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            (F.cross_entropy(replica(x), y, reduction="sum") / total).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("not that of the mean over all labelled images")
def the_last_piece_with_labels_left_out(replicas, pieces, loss_function):
    dividing_by(label_count(pieces), replicas, pieces[:1], loss_function)


@ONCE.wrong("not that of the mean over all labelled images")
def one_of_three_replicas_left_out_of_the_sum(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas[:2])


def dividing_by(total, replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / total)).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("the parameters of replica 0 changed")
def a_step_inside(replicas, pieces, loss_function):
    dividing_by(label_count(pieces), replicas, pieces, loss_function)
    for replica in replicas:
        torch.optim.SGD(replica.parameters(), lr=0.1).step()


@ONCE.right
def replica_by_replica(replicas, pieces, loss_function):
    total = label_count(pieces)
    for i, replica in enumerate(replicas):
        loss = 0
        for xs, ys in pieces:
            loss = loss + F.cross_entropy(replica(xs[i]), ys[i], reduction="sum") / total
        loss.backward()
    all_reduce_gradients(replicas)


@ONCE.right
def dividing_the_gradients_at_the_end(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * counted(y)).backward()
    all_reduce_gradients(replicas)
    for replica in replicas:
        for parameter in replica.parameters():
            parameter.grad /= label_count(pieces)


@ONCE.right
def joining_a_replicas_shards(replicas, pieces, loss_function):
    for i, replica in enumerate(replicas):
        x = torch.cat([xs[i] for xs, _ in pieces])
        y = torch.cat([ys[i] for _, ys in pieces])
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.right
def the_functions_of_the_module(replicas, pieces, loss_function):
    total = label_count(pieces)
    for xs, ys in pieces:
        data_parallel.backward_on_shards(replicas, xs, ys, loss_function, total)
    all_reduce_gradients(replicas)


@ONCE.right
def reading_the_losses_and_one_flat_exchange(replicas, pieces, loss_function):
    losses = []
    for replica, x, y in shards(replicas, pieces):
        loss = loss_function(replica(x), y) * (counted(y) / label_count(pieces))
        loss.backward()
        losses.append(loss.item())
    flat = [torch.cat([p.grad.flatten() for p in replica.parameters()]) for replica in replicas]
    collectives.all_reduce(flat)
    for replica, numbers in zip(replicas, flat, strict=True):
        sizes = [p.numel() for p in replica.parameters()]
        for p, part in zip(replica.parameters(), numbers.split(sizes), strict=True):
            p.grad = part.view_as(p)
    return sum(losses)


@ONCE.wrong("exchanged more than once", "added up before")
def the_exchange_inside_the_loop(replicas, pieces, loss_function):
    for xs, ys in pieces:
        for replica, x, y in shards(replicas, [(xs, ys)]):
            (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
        all_reduce_gradients(replicas)


@ONCE.wrong("nothing was exchanged", "its own shards")
def no_exchange(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()


@ONCE.wrong("not that of the mean over all labelled images")
def no_weights(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        loss_function(replica(x), y).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("Every piece counts the same")
def weights_within_each_piece(replicas, pieces, loss_function):
    for xs, ys in pieces:
        size = label_count([(xs, ys)])
        for replica, x, y in shards(replicas, [(xs, ys)]):
            (loss_function(replica(x), y) * (counted(y) / size)).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("Every piece counts the same")
def every_piece_counting_the_same(replicas, pieces, loss_function):
    for xs, ys in pieces:
        size = label_count([(xs, ys)])
        for replica, x, y in shards(replicas, [(xs, ys)]):
            (loss_function(replica(x), y) * (counted(y) / size / len(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("Every shard counts the same")
def every_shard_counting_the_same(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) / (len(pieces) * len(replicas))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("0.33 times what it should be", "is something divided")
def dividing_by_the_gpus_after_the_weights(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas)
    for replica in replicas:
        for parameter in replica.parameters():
            parameter.grad /= len(replicas)


@ONCE.wrong("not that of the mean", "in every piece")
def zero_grad_between_the_pieces(replicas, pieces, loss_function):
    for xs, ys in pieces:
        for replica, x, y in shards(replicas, [(xs, ys)]):
            replica.zero_grad()
            (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("exchanged more than once")
def exchanging_again_at_the_end(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    all_reduce_gradients(replicas)
    all_reduce_gradients(replicas)


@ONCE.wrong("more bytes", "than one exchange takes", "add up on one GPU")
def every_gpu_pulling_from_every_other_once(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = sum(gradient.to(parameter.device) for gradient in gradients)


@ONCE.wrong("over the host", "from GPU to GPU")
def exchanging_over_the_host(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        total = sum(parameter.grad.cpu() for parameter in parameters)
        for parameter in parameters:
            parameter.grad = total.to(parameter.device)


@ONCE.wrong("vgpu:1 computed nothing", "its own shards")
def all_the_work_on_the_first_replica(replicas, pieces, loss_function):
    first = replicas[0]
    home = next(first.parameters()).device
    for _, x, y in shards(replicas, pieces):
        loss = loss_function(first(x.to(home)), y.to(home)) * (counted(y) / label_count(pieces))
        loss.backward()
    for replica in replicas[1:]:
        for parameter, done in zip(replica.parameters(), first.parameters(), strict=True):
            parameter.grad = done.grad.to(parameter.device)


@ONCE.wrong("differ in the last bit", "copy one result")
def chunks_added_up_in_two_orders(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (counted(y) / label_count(pieces))).backward()
    for a, b, c in zip(*(replica.parameters() for replica in replicas), strict=True):
        there = b.grad + c.grad.to(b.device)  # 1 tensor moved
        first = a.grad + there.to(a.device)  # 2
        second = b.grad + a.grad.to(b.device) + (there - b.grad)  # 3
        a.grad, b.grad = first, second
        c.grad = first.to(c.device)  # 4


@ONCE.wrong("replica 0 has no gradients")
def returning_the_losses(replicas, pieces, loss_function):
    return [loss_function(replica(x), y) for replica, x, y in shards(replicas, pieces)]


@ONCE.wrong("replica 1 has no gradients")
def training_only_the_first_replica(replicas, pieces, loss_function):
    (x, *_), (y, *_) = pieces[0]
    loss_function(replicas[0](x), y).backward()


@ONCE.wrong("stopped with RuntimeError", "same device")
def every_shard_on_the_first_replica(replicas, pieces, loss_function):
    for _, x, y in shards(replicas, pieces):
        loss_function(replicas[0](x), y).backward()


@ONCE.wrong("stopped with TypeError")
def taking_the_shards_for_a_tensor(replicas, pieces, loss_function):
    for xs, ys in pieces:
        loss_function(replicas[0](xs), ys).backward()
