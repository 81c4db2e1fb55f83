"""The checks of lesson 02 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch

from course_lib.exercises import lesson_02
from course_lib.parallel import collectives, data_parallel
from course_lib.parallel.data_parallel import all_reduce_gradients
from exercise_answers import Answers

MEAN = Answers("02", "mean", lesson_02.check_mean)
COMBINE = Answers("02", "combine", lesson_02.check_combine)
ONCE = Answers("02", "once", lesson_02.check_once)
EXERCISES = [MEAN, COMBINE, ONCE]


# ----------------------------------------------------------------- 1. all-reduce to the mean


@MEAN.right
def dividing_first(tensors):
    for tensor in tensors:
        tensor /= len(tensors)
    collectives.all_reduce(tensors)


@MEAN.right
def a_new_tensor_that_is_copied_to_all(tensors):
    mean = torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).mean(dim=0)
    for tensor in tensors:
        tensor.copy_(mean)


@MEAN.right
def gathering_on_the_last_gpu(tensors):
    last = tensors[-1]
    total = reduce(lambda a, b: a + b, [tensor.to(last.device) for tensor in tensors])
    last.copy_(total / len(tensors))
    for tensor in tensors[:-1]:
        tensor[:] = last.to(tensor.device)


@MEAN.right
def a_chain_there_and_back(tensors):
    for left, right in pairwise(tensors):
        right.add_(left.to(right.device))
    tensors[-1].div_(len(tensors))
    for right, left in pairwise(reversed(tensors)):
        left.copy_(right)


@MEAN.right
def a_ring_of_chunks(tensors):
    count = len(tensors)
    chunks = [list(tensor.chunk(count)) for tensor in tensors]
    for step in range(count - 1):
        for rank in range(count):
            chunk = (rank - step) % count
            target = chunks[(rank + 1) % count][chunk]
            target += chunks[rank][chunk].to(target.device)
    for rank in range(count):
        chunks[rank][(rank + 1) % count] /= count
    for step in range(count - 1):
        for rank in range(count):
            chunk = (rank + 1 - step) % count
            chunks[(rank + 1) % count][chunk].copy_(chunks[rank][chunk])


@MEAN.wrong("vgpu:0", "the sum", "divide by the number of tensors")
def the_sum(tensors):
    collectives.all_reduce(tensors)


@MEAN.wrong("vgpu:1", "the sum", "divide by the number of tensors")
def dividing_only_on_the_first(tensors):
    collectives.all_reduce(tensors)
    tensors[0] /= len(tensors)


@MEAN.wrong("vgpu:0", "not the mean")
def dividing_twice(tensors):
    for tensor in tensors:
        tensor /= len(tensors)
    collectives.all_reduce(tensors)
    for tensor in tensors:
        tensor /= len(tensors)


@MEAN.wrong("vgpu:1", "is what it was", "copy_")
def never_sending_it_back(tensors):
    first = tensors[0]
    for tensor in tensors[1:]:
        first += tensor.to(first.device)
    first /= len(tensors)


@MEAN.wrong("vgpu:1", "is what it was", "gives another tensor its name")
def rebinding_the_others(tensors):
    first = tensors[0]
    for tensor in tensors[1:]:
        first += tensor.to(first.device)
    first /= len(tensors)
    for tensor in tensors[1:]:
        tensor = first.to(tensor.device)


@MEAN.wrong("the tensors are what they were", "in place")
def putting_other_tensors_into_the_list(tensors):
    mean = sum(tensor.to(tensors[0].device) for tensor in tensors) / len(tensors)
    for i in range(len(tensors)):
        tensors[i] = mean.to(tensors[i].device)


@MEAN.wrong("the tensors are what they were", "in place")
def returning_the_means(tensors):
    mean = sum(tensor.to(tensors[0].device) for tensor in tensors) / len(tensors)
    return [mean.to(tensor.device) for tensor in tensors]


@MEAN.wrong("the tensors are what they were")
def doing_nothing(tensors):
    return None


@MEAN.wrong("2 (N - 1)", "add up on one GPU")
def every_gpu_pulling_from_every_other(tensors):
    means = []
    for home in tensors:
        means.append(sum(tensor.to(home.device) for tensor in tensors) / len(tensors))
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean)


@MEAN.wrong("not to the last bit", "order", "Compute it once, and copy it")
def each_gpu_adding_in_its_own_order(tensors):
    means = []
    for i, home in enumerate(tensors):
        in_my_order = tensors[i:] + tensors[:i]
        means.append(sum(tensor.to(home.device) for tensor in in_my_order) / len(tensors))
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean)


@MEAN.wrong("vgpu:1", "not the mean")
def pulling_from_tensors_that_have_changed(tensors):
    for home in tensors:
        home.copy_(sum(tensor.to(home.device) for tensor in tensors) / len(tensors))


@MEAN.wrong("over the host", "from GPU to GPU")
def going_over_the_host(tensors):
    mean = torch.stack([tensor.cpu() for tensor in tensors]).mean(dim=0)
    for tensor in tensors:
        tensor.copy_(mean)


@MEAN.wrong("vgpu:0", "not the mean")
def the_mean_of_each_tensor(tensors):
    for tensor in tensors:
        tensor.fill_(tensor.mean())


@MEAN.wrong("stopped with RuntimeError", "same device")
def adding_across_devices(tensors):
    for tensor in tensors[1:]:
        tensors[0] += tensor


@MEAN.wrong("stopped with AttributeError")
def a_method_that_is_not_there(tensors):
    tensors.mean()


# ------------------------------------------------------------------------- 2. the last batch


def present(gradients, sizes):
    """The gradients that are there, with their sizes, and the device of the first."""
    pairs = [(g, n) for g, n in zip(gradients, sizes, strict=True) if g is not None]
    return pairs, pairs[0][0].device


@COMBINE.right
def dividing_at_the_end(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return sum(g.to(home) * n for g, n in pairs) / sum(sizes)


@COMBINE.right
def a_stack_and_weights(gradients, sizes):
    pairs, home = present(gradients, sizes)
    weights = torch.tensor([n / sum(sizes) for _, n in pairs], device=home)
    return (torch.stack([g.to(home) for g, _ in pairs]) * weights[:, None]).sum(dim=0)


@COMBINE.right
def a_product_of_weights_and_gradients(gradients, sizes):
    pairs, home = present(gradients, sizes)
    weights = torch.tensor([n for _, n in pairs], device=home, dtype=torch.float32)
    return weights @ torch.stack([g.to(home) for g, _ in pairs]) / weights.sum()


@COMBINE.right
def scaling_the_gradients_in_place(gradients, sizes):
    pairs, home = present(gradients, sizes)
    for g, n in pairs:
        g.mul_(n / sum(sizes))
    total, *others = [g for g, _ in pairs]
    for other in others:
        total += other.to(home)
    return total


@COMBINE.right
def zeros_for_the_empty_shard(gradients, sizes):
    _, home = present(gradients, sizes)
    like = next(g for g in gradients if g is not None)
    filled = [torch.zeros_like(like) if g is None else g.to(home) for g in gradients]
    return reduce(torch.add, [g * n / sum(sizes) for g, n in zip(filled, sizes, strict=True)])


@COMBINE.wrong("[104, 103, 103, 103]", "plain mean of the shards' means")
def the_plain_mean(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return sum(g.to(home) for g, _ in pairs) / len(pairs)


@COMBINE.wrong("plain mean of the shards' means")
def torch_mean(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return torch.stack([g.to(home) for g, _ in pairs]).mean(dim=0)


@COMBINE.wrong("sum of the shards' means")
def the_sum_of_the_means(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return sum(g.to(home) for g, _ in pairs)


@COMBINE.wrong("sum over all images", "mean is asked for")
def weighting_without_dividing(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return sum(g.to(home) * n for g, n in pairs)


@COMBINE.wrong("Divide by the number of images", "not by the number of GPUs")
def dividing_by_the_number_of_gpus(gradients, sizes):
    pairs, home = present(gradients, sizes)
    return sum(g.to(home) * n for g, n in pairs) / len(gradients)


@COMBINE.wrong("[1, 1, 1, 0]", "divided by the number of GPUs")
def treating_nearly_even_shards_as_even(gradients, sizes):
    pairs, home = present(gradients, sizes)
    if 0 in sizes:
        return sum(g.to(home) for g, _ in pairs) / len(sizes)
    return sum(g.to(home) * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("[1, 1, 1, 0]", "TypeError", "None", "must be skipped")
def not_expecting_none(gradients, sizes):
    home = gradients[0].device
    parts = [g * (n / sum(sizes)) for g, n in zip(gradients, sizes, strict=True)]
    return sum(part.to(home) for part in parts)


@COMBINE.wrong("[1, 1, 1, 0]", "AttributeError", "None")
def moving_none(gradients, sizes):
    pairs = zip(gradients, sizes, strict=True)
    return sum(g.to(gradients[0].device) * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("[0, 2, 1, 0]", "None")
def expecting_none_only_at_the_end(gradients, sizes):
    home = gradients[0].device
    pairs = [(g, n) for g, n in zip(gradients, sizes, strict=True) if g is not None]
    return sum(g.to(home) * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("should be on vgpu:0, and is on cpu")
def leaving_the_result_on_the_cpu(gradients, sizes):
    pairs, _ = present(gradients, sizes)
    return sum(g.cpu() * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("should be on vgpu:0, and is on vgpu:3")
def adding_on_the_last_gpu(gradients, sizes):
    pairs, _ = present(gradients, sizes)
    return sum(g.to(pairs[-1][0].device) * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("shape (1, 6)", "(6,)")
def keeping_the_dimension(gradients, sizes):
    pairs, home = present(gradients, sizes)
    weighted = torch.stack([g.to(home) * n / sum(sizes) for g, n in pairs])
    return weighted.sum(dim=0, keepdim=True)


@COMBINE.wrong("stopped with RuntimeError", "same device")
def not_moving(gradients, sizes):
    pairs, _ = present(gradients, sizes)
    return sum(g * n for g, n in pairs) / sum(sizes)


@COMBINE.wrong("should return a tensor", "None")
def writing_into_the_first(gradients, sizes):
    pairs, home = present(gradients, sizes)
    pairs[0][0].copy_(sum(g.to(home) * n for g, n in pairs) / sum(sizes))


@COMBINE.wrong("should return a tensor", "[")
def one_result_a_gpu(gradients, sizes):
    pairs, _ = present(gradients, sizes)
    return [g * n / sum(sizes) for g, n in pairs]


# ----------------------------------------------------------------- 3. accumulate, then exchange


def image_count(pieces):
    return sum(len(x) for xs, _ in pieces for x in xs)


def shards(replicas, pieces):
    """Each replica with each of its shards."""
    for xs, ys in pieces:
        yield from zip(replicas, xs, ys, strict=True)


@ONCE.right
def replica_by_replica(replicas, pieces, loss_function):
    total = image_count(pieces)
    for i, replica in enumerate(replicas):
        loss = 0
        for xs, ys in pieces:
            loss = loss + loss_function(replica(xs[i]), ys[i]) * len(xs[i]) / total
        loss.backward()
    all_reduce_gradients(replicas)


@ONCE.right
def dividing_the_gradients_at_the_end(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * len(x)).backward()
    all_reduce_gradients(replicas)
    for replica in replicas:
        for parameter in replica.parameters():
            parameter.grad /= image_count(pieces)


@ONCE.right
def joining_a_replicas_shards(replicas, pieces, loss_function):
    for i, replica in enumerate(replicas):
        x = torch.cat([xs[i] for xs, _ in pieces])
        y = torch.cat([ys[i] for _, ys in pieces])
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.right
def the_functions_of_the_module(replicas, pieces, loss_function):
    total = image_count(pieces)
    for xs, ys in pieces:
        data_parallel.backward_on_shards(replicas, xs, ys, loss_function, total)
    all_reduce_gradients(replicas)


@ONCE.right
def reading_the_losses_and_one_flat_exchange(replicas, pieces, loss_function):
    losses = []
    for replica, x, y in shards(replicas, pieces):
        loss = loss_function(replica(x), y) * (len(x) / image_count(pieces))
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
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
        all_reduce_gradients(replicas)


@ONCE.wrong("nothing was exchanged", "its own shards")
def no_exchange(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()


@ONCE.wrong("about 9 times too large", "weight each shard's loss")
def no_weights(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        loss_function(replica(x), y).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("about 3 times too large", "share of all the images")
def weights_within_each_piece(replicas, pieces, loss_function):
    for xs, ys in pieces:
        size = sum(len(x) for x in xs)
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            (loss_function(replica(x), y) * (len(x) / size)).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("a piece of 20 images", "as much as one of 25")
def every_piece_counting_the_same(replicas, pieces, loss_function):
    for xs, ys in pieces:
        size = sum(len(x) for x in xs)
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            (loss_function(replica(x), y) * (len(x) / size / len(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("close", "every shard needs its own weight")
def every_shard_counting_the_same(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) / (len(pieces) * len(replicas))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("0.33 times", "weights, which already add up to one")
def dividing_by_the_gpus_after_the_weights(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    all_reduce_gradients(replicas)
    for replica in replicas:
        for parameter in replica.parameters():
            parameter.grad /= len(replicas)


@ONCE.wrong("set to zero between the pieces")
def zero_grad_between_the_pieces(replicas, pieces, loss_function):
    for xs, ys in pieces:
        for replica, x, y in zip(replicas, xs, ys, strict=True):
            replica.zero_grad()
            (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    all_reduce_gradients(replicas)


@ONCE.wrong("exchanged more than once")
def exchanging_again_at_the_end(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    all_reduce_gradients(replicas)
    all_reduce_gradients(replicas)


@ONCE.wrong("more bytes", "than one exchange takes", "add up on one GPU")
def every_gpu_pulling_from_every_other_once(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = sum(gradient.to(parameter.device) for gradient in gradients)


@ONCE.wrong("over the host", "from GPU to GPU")
def exchanging_over_the_host(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        total = sum(parameter.grad.cpu() for parameter in parameters)
        for parameter in parameters:
            parameter.grad = total.to(parameter.device)


@ONCE.wrong("vgpu:1 computed nothing", "its own shards")
def all_the_work_on_the_first_replica(replicas, pieces, loss_function):
    first = replicas[0]
    home = next(first.parameters()).device
    for _, x, y in shards(replicas, pieces):
        loss = loss_function(first(x.to(home)), y.to(home)) * (len(x) / image_count(pieces))
        loss.backward()
    for replica in replicas[1:]:
        for parameter, done in zip(replica.parameters(), first.parameters(), strict=True):
            parameter.grad = done.grad.to(parameter.device)


@ONCE.wrong("differ in the last bit", "copy one result")
def chunks_added_up_in_two_orders(replicas, pieces, loss_function):
    for replica, x, y in shards(replicas, pieces):
        (loss_function(replica(x), y) * (len(x) / image_count(pieces))).backward()
    for a, b, c in zip(*(replica.parameters() for replica in replicas), strict=True):
        there = b.grad + c.grad.to(b.device)  # 1 tensor moved
        first = a.grad + there.to(a.device)  # 2
        second = b.grad + a.grad.to(b.device) + (there - b.grad)  # 3
        a.grad, b.grad = first, second
        c.grad = first.to(c.device)  # 4


@ONCE.wrong("no gradients", ".backward()")
def returning_the_losses(replicas, pieces, loss_function):
    return [loss_function(replica(x), y) for replica, x, y in shards(replicas, pieces)]


@ONCE.wrong("no gradients")
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
