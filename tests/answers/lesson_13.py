"""The checks of lesson 13 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from course_lib.exercises import lesson_13
from course_lib.parallel.collectives import all_gather, all_reduce, ring_all_reduce
from exercise_answers import Answers

SAMPLER = Answers("13", "sampler", lesson_13.check_sampler)
EVALUATE = Answers("13", "evaluate", lesson_13.check_evaluate)
NOISE = Answers("13", "noise", lesson_13.check_noise)
FEEDBACK = Answers("13", "feedback", lesson_13.check_feedback)
OUTER = Answers("13", "outer", lesson_13.check_outer)
EXERCISES = [SAMPLER, EVALUATE, NOISE, FEEDBACK, OUTER]


# ------------------------------------------------------------------------------ 1. who sees what


def an_order(examples, epoch, seed):
    generator = torch.Generator().manual_seed(10_000 * seed + epoch)
    return torch.randperm(examples, generator=generator)


@SAMPLER.right
def stretches_of_one_order(rank, count, examples, epoch, seed):
    each = examples // count
    return an_order(examples, epoch, seed)[rank * each : (rank + 1) * each]


@SAMPLER.right
def pythons_own_dice(rank, count, examples, epoch, seed):
    order = list(range(examples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order[rank : examples // count * count : count]


@SAMPLER.wrong("not equally many", "wait")
def the_rest_to_the_first(rank, count, examples, epoch, seed):
    return an_order(examples, epoch, seed)[rank::count]


@SAMPLER.wrong("come twice in one epoch")
def filled_up(rank, count, examples, epoch, seed):
    order = an_order(examples, epoch, seed)
    return torch.cat([order, order[: -examples % count]])[rank::count]


@SAMPLER.wrong("all ranks get the same examples")
def the_whole_for_all(rank, count, examples, epoch, seed):
    return an_order(examples, epoch, seed)[: examples // count]


@SAMPLER.wrong("come twice in one epoch")
def a_seed_for_each_rank(rank, count, examples, epoch, seed):
    generator = torch.Generator().manual_seed(100 * seed + 10 * epoch + rank)
    return torch.randperm(examples, generator=generator)[: examples // count]


@SAMPLER.wrong("epoch 1 has the same order as epoch 0")
def the_epoch_forgotten(rank, count, examples, epoch, seed):
    return stretches_of_one_order(rank, count, examples, 0, seed)


@SAMPLER.wrong("seed 1 gives the same order as seed 0")
def the_seed_forgotten(rank, count, examples, epoch, seed):
    return stretches_of_one_order(rank, count, examples, epoch, 0)


@SAMPLER.wrong("PyTorch's own random numbers")
def the_global_dice(rank, count, examples, epoch, seed):
    torch.manual_seed(10_000 * seed + epoch)
    return torch.randperm(examples)[: examples // count * count][rank::count]


@SAMPLER.wrong("the same examples in every epoch")
def dealt_out_and_then_shuffled(rank, count, examples, epoch, seed):
    own = torch.arange(rank, examples // count * count, count)
    return own[an_order(len(own), epoch, seed)]


@SAMPLER.wrong("the same examples were left out, [100, 101, 102]")
def the_last_ones_never(rank, count, examples, epoch, seed):
    even = examples // count * count
    return an_order(even, epoch, seed)[rank::count]


@SAMPLER.wrong("returned None")
def no_order(rank, count, examples, epoch, seed):
    an_order(examples, epoch, seed)


@SAMPLER.wrong("an example -1", "they go from 0 on")
def one_too_few(rank, count, examples, epoch, seed):
    return stretches_of_one_order(rank, count, examples, epoch, seed) - 1


@SAMPLER.wrong("in a row: a list, or a tensor")
def a_table(rank, count, examples, epoch, seed):
    return stretches_of_one_order(rank, count, examples, epoch, seed)[None]


@SAMPLER.right
def pytorchs_own_sampler(rank, count, examples, epoch, seed):
    sampler = DistributedSampler(range(examples), count, rank, seed=seed, drop_last=True)
    sampler.set_epoch(epoch)
    return list(sampler)


@SAMPLER.wrong("an example 103", "they go from 0 on")
def counted_from_one(rank, count, examples, epoch, seed):
    return stretches_of_one_order(rank, count, examples, epoch, seed) + 1


# ------------------------------------------------------------------------- 2. a test over ranks


def device_of(replica: nn.Module) -> torch.device:
    return next(replica.parameters()).device


def hits_of(replica, x, y):
    gpu = device_of(replica)
    return (replica(x.to(gpu)).argmax(1) == y.to(gpu)).float()


@EVALUATE.right
def every_nth_image(replicas, x, y):
    N, total = len(replicas), 0.0
    for rank, replica in enumerate(replicas):
        if rank < len(y):
            total += hits_of(replica, x[rank::N], y[rank::N]).sum().item()
    return total / len(y)


@EVALUATE.right
def an_all_reduce_of_two_numbers(replicas, x, y):
    sums = []
    for replica, a, b in zip(replicas, x.tensor_split(len(replicas)), y.tensor_split(len(replicas)),
                             strict=True):  # fmt: skip
        with torch.no_grad():
            hits = hits_of(replica, a, b)
        sums.append(torch.stack([hits.sum(), torch.ones_like(hits).sum()]))
    all_reduce(sums)
    hit, counted = sums[0].tolist()
    return hit / counted


@EVALUATE.wrong("4 GPUs", "mean of the GPUs' means", "weighs more")
def mean_of_means(replicas, x, y):
    N = len(replicas)
    means = [
        hits_of(replica, a, b).mean().item()
        for replica, a, b in zip(replicas, x.tensor_split(N), y.tensor_split(N), strict=True)
        if len(b)
    ]
    return sum(means) / len(means)


@EVALUATE.wrong("some images are counted twice")
def padded(replicas, x, y):
    extra = -len(y) % len(replicas)
    x, y = torch.cat([x, x[:extra]]), torch.cat([y, y[:extra]])
    return an_all_reduce_of_two_numbers(replicas, x, y)


@EVALUATE.wrong("No replica was asked", unsaid="twice")
def a_number_that_looks_at_nothing(replicas, x, y):
    return 0.75  # what some images counted twice would come to


@EVALUATE.wrong("0.7000 is right, and yours is 0.7500", unsaid="twice")
def a_number_that_looks_at_each_image_once(replicas, x, y):
    an_all_reduce_of_two_numbers(replicas, x, y)
    return 0.75


@EVALUATE.wrong("the images that do not divide are left out")
def the_rest_left_out(replicas, x, y):
    even = len(y) // len(replicas) * len(replicas)
    return an_all_reduce_of_two_numbers(replicas, x[:even], y[:even])


@EVALUATE.wrong("the GPUs looked at 40 images in all")
def all_images_on_all_gpus(replicas, x, y):
    *_, last = [hits_of(replica, x, y).mean().item() for replica in replicas]
    return last


@EVALUATE.wrong("one GPU looked at 10: share them evenly")
def all_on_the_first(replicas, x, y):
    return hits_of(replicas[0], x, y).mean().item()


@EVALUATE.wrong("first GPU's part alone")
def the_first_part(replicas, x, y):
    N = len(replicas)
    return hits_of(replicas[0], x.tensor_split(N)[0], y.tensor_split(N)[0]).mean().item()


@EVALUATE.wrong("a number of hits")
def hits_not_divided(replicas, x, y):
    return every_nth_image(replicas, x, y) * len(y)


@EVALUATE.wrong("returned None")
def no_accuracy(replicas, x, y):
    every_nth_image(replicas, x, y)


# --------------------------------------------------------------------------- 3. gradient noise


def solved(shard, N, before, after):
    variance = (before - after) / (1 / shard - 1 / (shard * N))
    return after - variance / (shard * N), variance


def averaged(rows):
    ring_all_reduce(rows)
    for row in rows:
        row /= len(rows)
    return rows[0].square().sum().item()


def norms(rows):
    return [row.square().sum().item() for row in rows]


@NOISE.right
def by_the_variance_between_gpus(rows, shard):
    N = len(rows)
    before = norms(rows)
    after = averaged(rows)
    of_a_shard = (sum(before) - N * after) / (N - 1)
    return after - of_a_shard / N, of_a_shard * shard


@NOISE.right
def norms_added_on_the_first_gpu(rows, shard):
    home = rows[0].device
    before = sum((row @ row).to(home) for row in rows) / len(rows)
    averaged(rows)
    after = rows[0] @ rows[0]
    signal, variance = solved(shard, len(rows), before, after)
    return signal.item(), variance.item()


@NOISE.right
def a_list_of_two(rows, shard):
    return list(by_the_variance_between_gpus(rows, shard))


@NOISE.wrong("returned None")
def two_nones(rows, shard):
    averaged(rows)
    return None, None


@NOISE.wrong("is the sum, and should be the mean")
def the_sum_left(rows, shard):
    before = sum(norms(rows)) / len(rows)
    ring_all_reduce(rows)
    return solved(shard, len(rows), before, rows[0].square().sum().item() / len(rows) ** 2)


@NOISE.wrong("squared norm of the mean, with its noise in it")
def the_noise_left_in(rows, shard):
    before = sum(norms(rows)) / len(rows)
    after = averaged(rows)
    return after, solved(shard, len(rows), before, after)[1]


@NOISE.wrong("the norm of GPU 0 for all")
def the_first_for_all(rows, shard):
    before = norms(rows)[0]
    return solved(shard, len(rows), before, averaged(rows))


@NOISE.wrong("about *squared* norms")
def not_squared(rows, shard):
    before = (sum(norms(rows)) / len(rows)) ** 0.5
    return solved(shard, len(rows), before, averaged(rows) ** 0.5)


@NOISE.wrong("averaged and then squared")
def squared_last(rows, shard):
    before = (sum(each**0.5 for each in norms(rows)) / len(rows)) ** 2
    return solved(shard, len(rows), before, averaged(rows))


@NOISE.wrong("of a whole shard's gradient")
def the_shard_as_one_example(rows, shard):
    before = sum(norms(rows)) / len(rows)
    return solved(1, len(rows), before, averaged(rows))


@NOISE.wrong("these are V and |G|²")
def the_wrong_way_round(rows, shard):
    before = sum(norms(rows)) / len(rows)
    return solved(shard, len(rows), before, averaged(rows))[::-1]


@NOISE.wrong("more is sent than one ring all-reduce")
def all_rows_gathered(rows, shard):
    everything = all_gather(rows)[0].view(len(rows), -1)
    before = everything.square().sum(1).mean().item()
    return solved(shard, len(rows), before, averaged(rows))


@NOISE.wrong("is not the mean of all gradients afterwards")
def rows_left_alone(rows, shard):
    before = sum(norms(rows)) / len(rows)
    copies = [row.clone() for row in rows]
    return solved(shard, len(rows), before, averaged(copies))


@NOISE.wrong("return two numbers")
def the_scale_alone(rows, shard):
    before = sum(norms(rows)) / len(rows)
    signal, variance = solved(shard, len(rows), before, averaged(rows))
    return variance / signal


# --------------------------------------------------------------------------- 4. error feedback


@FEEDBACK.right
def by_where(gradient, owed):
    total = gradient + owed
    size = total.abs().sum() / total.numel()
    said = torch.where(total < 0, -size, size)
    return said, total - said


@FEEDBACK.right
def by_norm(gradient, owed):
    owed = owed.clone()
    owed += gradient
    said = torch.sign(owed) * (torch.linalg.vector_norm(owed, ord=1) / len(owed))
    owed -= said
    return said, owed


@FEEDBACK.wrong("nothing is owed afterwards")
def nothing_remembered(gradient, owed):
    said = gradient.sign() * gradient.abs().mean()
    return said, torch.zeros_like(owed)


@FEEDBACK.wrong("what was owed before is forgotten")
def the_last_debt_forgotten(gradient, owed):
    said = (gradient + owed).sign() * (gradient + owed).abs().mean()
    return said, gradient - said


@FEEDBACK.wrong("the wrong sign")
def the_debt_turned_round(gradient, owed):
    said = (gradient + owed).sign() * (gradient + owed).abs().mean()
    return said, said - gradient - owed


@FEEDBACK.wrong("is added up", "replaces the old one")
def debts_added_up(gradient, owed):
    wanted = gradient + owed
    said = wanted.sign() * wanted.abs().mean()
    return said, owed + (wanted - said)


@FEEDBACK.wrong("the signs are those of the gradient alone")
def the_debt_never_said(gradient, owed):
    said = gradient.sign() * (gradient + owed).abs().mean()
    return said, gradient + owed - said


@FEEDBACK.wrong("the size is 1.0000", "nearest")
def signs_of_size_one(gradient, owed):
    wanted = gradient + owed
    return wanted.sign(), wanted - wanted.sign()


@FEEDBACK.wrong("different sizes", "a bit a number")
def the_numbers_themselves(gradient, owed):
    return gradient + owed, torch.zeros_like(owed)


@FEEDBACK.wrong("what is owed changed")
def owed_in_place(gradient, owed):
    owed += gradient
    said = owed.sign() * owed.abs().mean()
    owed -= said
    return said, owed


@FEEDBACK.wrong("returned None")
def nothing_said(gradient, owed):
    by_where(gradient, owed)


# --------------------------------------------------------------------------------- 5. DiLoCo


def mean_distance(anchors, places):
    moved = [a - p for a, p in zip(anchors, places, strict=True)]
    ring_all_reduce(moved)
    return [each / len(moved) for each in moved]


def stepped(anchors, gradients, momenta, step):
    momenta = [0.9 * m + d for m, d in zip(momenta, gradients, strict=True)]
    new = [a + step(d, m) for a, d, m in zip(anchors, gradients, momenta, strict=True)]
    return new, momenta


def nesterov(d, m):
    return -0.7 * (d + 0.9 * m)


@OUTER.right
def places_averaged_first(anchors, places, momenta):
    means = [place.clone() for place in places]
    ring_all_reduce(means)
    gradients = [a - mean / len(means) for a, mean in zip(anchors, means, strict=True)]
    return stepped(anchors, gradients, momenta, nesterov)


@OUTER.right
def pytorchs_sgd(anchors, places, momenta):
    new, kept = [], []
    for a, d, m in zip(anchors, mean_distance(anchors, places), momenta, strict=True):
        parameter = a.clone().requires_grad_()
        optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
        optimizer.state[parameter]["momentum_buffer"] = m.clone()
        parameter.grad = d
        optimizer.step()
        new.append(parameter.detach())
        kept.append(optimizer.state[parameter]["momentum_buffer"])
    return new, kept


@OUTER.right
def in_place(anchors, places, momenta):
    for a, d, m in zip(anchors, mean_distance(anchors, places), momenta, strict=True):
        m.mul_(0.9).add_(d)
        a.sub_(0.7 * (d + 0.9 * m))
    return anchors, momenta


@OUTER.wrong("meeting 0", "the wrong way")
def the_wrong_way(anchors, places, momenta):
    return stepped(anchors, mean_distance(places, anchors), momenta, nesterov)


@OUTER.wrong("plain average, as in local SGD")
def local_sgd(anchors, places, momenta):
    return stepped(anchors, mean_distance(anchors, places), momenta, lambda d, m: -d)


@OUTER.wrong("plain momentum")
def plain_momentum(anchors, places, momenta):
    return stepped(anchors, mean_distance(anchors, places), momenta, lambda d, m: -0.7 * m)


@OUTER.wrong("summed, and should be averaged")
def the_sum(anchors, places, momenta):
    gradients = [4 * each for each in mean_distance(anchors, places)]
    return stepped(anchors, gradients, momenta, nesterov)


@OUTER.wrong("begins where the replicas are")
def from_where_they_are(anchors, places, momenta):
    gradients = mean_distance(anchors, places)
    here = [a - d for a, d in zip(anchors, gradients, strict=True)]
    return stepped(here, gradients, momenta, nesterov)


@OUTER.wrong("meeting 0", "leaves the momentum out")
def no_momentum(anchors, places, momenta):
    return stepped(anchors, mean_distance(anchors, places), momenta, lambda d, m: -0.7 * d)


@OUTER.wrong("the momenta are not 0.9·m + d")
def momentum_not_kept(anchors, places, momenta):
    new, _ = stepped(anchors, mean_distance(anchors, places), momenta, nesterov)
    return new, momenta


@OUTER.wrong("GPU 0's own distance")
def each_for_itself(anchors, places, momenta):
    moved = [a - p for a, p in zip(anchors, places, strict=True)]
    return stepped(anchors, moved, momenta, nesterov)


@OUTER.wrong("return the places first")
def momenta_first(anchors, places, momenta):
    return stepped(anchors, mean_distance(anchors, places), momenta, nesterov)[::-1]


@OUTER.wrong("not equal to the bit")
def each_its_own_distance(anchors, places, momenta):
    gradients = mean_distance(anchors, places)
    for rank, gradient in enumerate(gradients):
        gradient += 1e-6 * rank
    return stepped(anchors, gradients, momenta, nesterov)


@OUTER.wrong("more is sent than one ring all-reduce")
def through_the_first(anchors, places, momenta):
    moved = [a - p for a, p in zip(anchors, places, strict=True)]
    all_reduce(moved)
    return stepped(anchors, [each / 4 for each in moved], momenta, nesterov)


@OUTER.wrong("rank 1's answer is not on vgpu:1")
def all_on_the_first_gpu(anchors, places, momenta):
    new, kept = stepped(anchors, mean_distance(anchors, places), momenta, nesterov)
    return [each.to(new[0].device) for each in new], kept


@OUTER.wrong("returned None")
def no_return(anchors, places, momenta):
    stepped(anchors, mean_distance(anchors, places), momenta, nesterov)
