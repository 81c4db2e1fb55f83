"""The checks of lesson 08 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_08
from course_lib.parallel.collectives import all_gather, broadcast, reduce_scatter, ring_all_reduce
from exercise_answers import Answers

FIT = Answers("08", "fit", lesson_08.check_fit)
STEP = Answers("08", "step", lesson_08.check_step)
GATHER = Answers("08", "gather", lesson_08.check_gather)
HOOK = Answers("08", "hook", lesson_08.check_hook)
EXERCISES = [FIT, STEP, GATHER, HOOK]


# ------------------------------------------------------------------------------ 1. does it fit?


def needed(parameters, count):
    """Bytes that each stage takes."""
    return [parameters * each for each in (16, 4 + 12 / count, 2 + 14 / count, 16 / count)]


@FIT.right
def the_first_that_fits(parameters, count, memory):
    return next((s for s, nbytes in enumerate(needed(parameters, count)) if nbytes <= memory), None)


@FIT.right
def term_by_term(parameters, count, memory):
    for stage in range(4):
        parts = [count if stage >= first else 1 for first in (3, 2, 1)]
        nbytes = [parameters * each / n for each, n in zip((2, 2, 12), parts, strict=True)]
        if sum(nbytes) <= memory:
            return stage


@FIT.right
def how_many_do_not_fit(parameters, count, memory):
    too_small = sum(nbytes > memory for nbytes in needed(parameters, count))
    return too_small if too_small < 4 else None


@FIT.wrong("5.1 billion parameters on 4 GPUs of 80 GB: 1 is right, and yours is 3")
def the_optimizer_undivided_below_stage_3(parameters, count, memory):
    laws = [16, 16, 16, 16 / count]
    return next((s for s, each in enumerate(laws) if parameters * each <= memory), None)


@FIT.wrong("5 billion parameters on 4 GPUs", "0 is right, and yours is 1", "a lower one fits")
def float32_parameters(parameters, count, memory):
    laws = [20, 8 + 12 / count, 4 + 16 / count, 20 / count]
    return next((s for s, each in enumerate(laws) if parameters * each <= memory), None)


@FIT.wrong("0 is right, and yours is 3", "Stage 3 takes 4 GB and fits", "a lower one fits as well")
def the_highest_stage(parameters, count, memory):
    fitting = [s for s, nbytes in enumerate(needed(parameters, count)) if nbytes <= memory]
    return fitting[-1] if fitting else None


@FIT.wrong("5 billion parameters on 4 GPUs of 80 GB: 0 is right, and yours is 1")
def less_than(parameters, count, memory):
    return next((s for s, nbytes in enumerate(needed(parameters, count)) if nbytes < memory), None)


@FIT.wrong("41 billion", "None is right, and yours is 0", "Stage 0 takes 656 GB and does not fit")
def nought_for_none(parameters, count, memory):
    return the_first_that_fits(parameters, count, memory) or 0


@FIT.wrong("0 is right, and yours is None")
def none_for_nought(parameters, count, memory):
    return the_first_that_fits(parameters, count, memory) or None


@FIT.wrong("None is right, and yours is False")
def false_for_none(parameters, count, memory):
    stage = the_first_that_fits(parameters, count, memory)
    return False if stage is None else stage


@FIT.wrong("0 is right, and yours is True")
def whether_it_fits(parameters, count, memory):
    return min(needed(parameters, count)) <= memory


@FIT.wrong("5.1 billion parameters on 4 GPUs", "1 is right, and yours is None")
def the_count_left_out(parameters, count, memory):
    return the_first_that_fits(parameters, 1, memory)


@FIT.wrong("5 billion parameters on 4 GPUs of 40 GB", "1 is right, and yours is 0", "takes 80 GB")
def eighty_whatever_the_memory(parameters, count, memory):
    return the_first_that_fits(parameters, count, 80e9)


@FIT.wrong("0 is right, and yours is None")
def no_return(parameters, count, memory):
    the_first_that_fits(parameters, count, memory)


# -------------------------------------------------------------- 2. the step between the halves


def own_chunks(rows):
    """Each GPU's shard, a part of its row."""
    return [row.chunk(len(rows))[rank] for rank, row in enumerate(rows)]


def share(rows, shards):
    """Put all shards into each row."""
    for row, whole in zip(rows, all_gather(shards), strict=True):
        row.copy_(whole)


@STEP.right
def shards_updated_in_their_rows(rows, gradients, lr):
    shards = own_chunks(rows)
    for shard, gradient in zip(shards, reduce_scatter(gradients), strict=True):
        shard.add_(gradient, alpha=-lr)
    share(rows, shards)


@STEP.right
def an_optimizer_for_each_shard(rows, gradients, lr):
    shards = own_chunks(rows)
    for shard, gradient in zip(shards, reduce_scatter(gradients), strict=True):
        shard.grad = gradient
        torch.optim.SGD([shard], lr=lr).step()
    share(rows, shards)


@STEP.right
def the_parameters_travelling_in_the_sum(rows, gradients, lr):
    for gradient, shard, mine in zip(
        gradients, own_chunks(rows), own_chunks(gradients), strict=True
    ):
        gradient.mul_(-lr)
        mine += shard
    ring_all_reduce(gradients)
    for row, new in zip(rows, gradients, strict=True):
        row.copy_(new)


@STEP.right
def shards_copied_straight_to_the_others(rows, gradients, lr):
    N = len(rows)
    for rank, (row, gradient) in enumerate(zip(rows, reduce_scatter(gradients), strict=True)):
        shard = row.view(N, -1)[rank]
        shard -= lr * gradient
        for other in rows[:rank] + rows[rank + 1 :]:
            other.view(N, -1)[rank] = shard


@STEP.wrong("on 2 GPUs, GPU 0", "its own gradients alone")
def each_with_its_own_gradient(rows, gradients, lr):
    for row, gradient in zip(rows, gradients, strict=True):
        row -= lr * gradient


@STEP.wrong("on 2 GPUs, GPU 0", "are not the parameters after one step")
def gathering_shards_of_its_own_gradient(rows, gradients, lr):
    each_with_its_own_gradient(rows, gradients, lr)
    share(rows, [chunk.clone() for chunk in own_chunks(rows)])


@STEP.wrong("on 2 GPUs, GPU 0", "mean of the gradients: the sum is asked for")
def the_mean(rows, gradients, lr):
    shards_updated_in_their_rows(rows, gradients, lr / len(rows))


@STEP.wrong("on 2 GPUs, GPU 0", "its own shard is right", "gather them")
def only_its_own_shard(rows, gradients, lr):
    for shard, gradient in zip(own_chunks(rows), reduce_scatter(gradients), strict=True):
        shard -= lr * gradient


@STEP.wrong("on 2 GPUs, one adds to a whole row", "its shard only")
def everyone_updates_everything(rows, gradients, lr):
    ring_all_reduce(gradients)
    each_with_its_own_gradient(rows, gradients, lr)


@STEP.wrong("on 2 GPUs, one adds to a whole row", "its shard only")
def everyone_updates_everything_out_of_place(rows, gradients, lr):
    ring_all_reduce(gradients)
    for row, gradient in zip(rows, gradients, strict=True):
        row.copy_(row - lr * gradient)


@STEP.wrong("on 2 GPUs, one adds to a whole row", "its shard only")
def the_first_updates_all(rows, gradients, lr):
    for gradient in gradients[1:]:
        gradients[0] += gradient.to(gradients[0].device)
    rows[0] -= lr * gradients[0]
    broadcast(rows)


@STEP.wrong("on 1 GPU, GPU 0", "wrong direction")
def uphill(rows, gradients, lr):
    shards_updated_in_their_rows(rows, gradients, -lr)


@STEP.wrong("without lr")
def no_learning_rate(rows, gradients, lr):
    shards_updated_in_their_rows(rows, gradients, 1)


@STEP.wrong("the row is what it was", "in place, with copy_")
def new_rows(rows, gradients, lr):
    shards = [
        shard - lr * gradient
        for shard, gradient in zip(own_chunks(rows), reduce_scatter(gradients), strict=True)
    ]
    return all_gather(shards)


@STEP.wrong("the row is what it was", "in place, with copy_")
def new_rows_in_the_list(rows, gradients, lr):
    rows[:] = new_rows(rows, gradients, lr)


@STEP.wrong("over the host", "use the collectives")
def over_the_host(rows, gradients, lr):
    total = sum(gradient.cpu() for gradient in gradients)
    new = rows[0].cpu() - lr * total
    for row in rows:
        row.copy_(new)


@STEP.wrong("the rows agree, but not to the last bit")
def each_beginning_with_its_own_gradient(rows, gradients, lr):
    for rank, row in enumerate(rows):
        for gradient in gradients[rank:] + gradients[:rank]:
            row -= lr * gradient.to(row.device)


@STEP.wrong("on 2 GPUs, one sends more than 2 (N - 1)/N rows")
def gathering_all_gradients(rows, gradients, lr):
    N = len(rows)
    shards = own_chunks(rows)
    for rank, everything in enumerate(all_gather(gradients)):
        for gradient in everything.view(N, N, -1)[:, rank]:
            shards[rank] -= lr * gradient
    share(rows, shards)


@STEP.wrong("on 2 GPUs, one sends more than 2 (N - 1)/N rows")
def an_all_reduce_and_then_a_gather(rows, gradients, lr):
    ring_all_reduce(gradients)
    shards = own_chunks(rows)
    for shard, gradient in zip(shards, own_chunks(gradients), strict=True):
        shard -= lr * gradient
    share(rows, shards)


# ------------------------------------------------------------------------- 3. gather, use, forget


def layer(xs, weights):
    """One layer on each GPU."""
    return [F.relu(F.linear(x, weight)) for x, weight in zip(xs, weights, strict=True)]


@GATHER.right
def a_function_that_forgets(layers, xs):
    for shards in layers:
        xs = layer(xs, all_gather(shards))
    return xs


@GATHER.right
def none_in_place_of_del(layers, xs):
    for shards in layers:
        whole = all_gather(shards)
        xs = tuple(torch.clamp(x @ weight.T, min=0) for x, weight in zip(xs, whole, strict=True))
        whole = None
    return xs


@GATHER.right
def one_shard_at_a_time(layers, xs):
    for shards in layers:
        xs = [
            torch.cat([F.relu(F.linear(x, shard.to(x.device))) for shard in shards], -1) for x in xs
        ]
    return xs


@GATHER.right
def each_shard_into_its_place(layers, xs):
    for shards in layers:
        rows = len(shards[0])
        outs = []
        for x in xs:
            whole = torch.empty(rows * len(shards), x.shape[-1], device=x.device)
            for number, shard in enumerate(shards):
                whole[number * rows : (number + 1) * rows].copy_(shard)
            outs.append(F.relu(F.linear(x, whole)))
            del whole
        xs = outs
    return xs


@GATHER.wrong("held 2.0 whole weights at once", "forget one before you gather the next")
def the_last_one_kept_while_the_next_comes(layers, xs):
    for shards in layers:
        whole = all_gather(shards)
        xs = layer(xs, whole)
    return xs


@GATHER.wrong("GPU 3 held 2.0 whole weights at once")
def a_loop_variable_that_lives_on(layers, xs):
    for shards in layers:
        whole = all_gather(shards)
        outs = []
        for x, weight in zip(xs, whole, strict=True):
            outs.append(F.relu(F.linear(x, weight)))
        del whole
        xs = outs
    return xs


@GATHER.wrong("held 6.0 whole weights at once", "forget one before")
def all_gathered_first(layers, xs):
    for whole in [all_gather(shards) for shards in layers]:
        xs = layer(xs, whole)
    return xs


@GATHER.wrong("GPU 0 held 1.8 whole weights", "beside the whole weight that they become")
def shards_beside_the_whole(layers, xs):
    for shards in layers:
        xs = [F.relu(F.linear(x, torch.cat([s.to(x.device) for s in shards]))) for x in xs]
    return xs


@GATHER.wrong("gathered more than once")
def gathered_twice(layers, xs):
    for shards in layers:
        all_gather(shards)
        xs = layer(xs, all_gather(shards))
    return xs


@GATHER.wrong("gathered more than once")
def gathered_again_for_each_gpu(layers, xs):
    for shards in layers:
        xs = [F.relu(F.linear(x, all_gather(shards)[rank])) for rank, x in enumerate(xs)]
    return xs


@GATHER.wrong("vgpu:0 lacks the relu")
def no_relu(layers, xs):
    for shards in layers:
        xs = [F.linear(*each) for each in zip(xs, all_gather(shards), strict=True)]
    return xs


@GATHER.wrong("is not relu(x Wᵀ) through all layers")
def no_relu_after_the_last(layers, xs):
    *first, last = layers
    xs = a_function_that_forgets(first, xs)
    return [F.linear(*each) for each in zip(xs, all_gather(last), strict=True)]


@GATHER.wrong("is not relu(x Wᵀ) through all layers")
def weights_not_transposed(layers, xs):
    for shards in layers:
        xs = [F.relu(x @ weight) for x, weight in zip(xs, all_gather(shards), strict=True)]
    return xs


@GATHER.wrong("is not relu(x Wᵀ) through all layers")
def the_first_input_for_all(layers, xs):
    return a_function_that_forgets(layers, [xs[0].to(x.device) for x in xs])


@GATHER.wrong("over the host", "use all_gather")
def weights_over_the_host(layers, xs):
    for shards in layers:
        whole = torch.cat([shard.cpu() for shard in shards])
        xs = [F.relu(F.linear(x, whole.to(x.device))) for x in xs]
    return xs


@GATHER.wrong("stopped with RuntimeError", "shape")
def its_own_shard_as_the_whole(layers, xs):
    for shards in layers:
        xs = layer(xs, shards)
    return xs


@GATHER.wrong("the inputs travel and not the weights", "lesson 06")
def the_inputs_sent_to_the_shards(layers, xs):
    for shards in layers:
        xs = [
            torch.cat(
                [F.relu(F.linear(x.to(shard.device), shard)).to(x.device) for shard in shards], -1
            )
            for x in xs
        ]
    return xs


@GATHER.wrong("return a list of 4 outputs")
def no_outputs(layers, xs):
    a_function_that_forgets(layers, xs)


@GATHER.wrong("return on vgpu:1 its output", "shape (2, 256)")
def all_on_the_first_gpu(layers, xs):
    outs = a_function_that_forgets(layers, xs)
    return [out.to(outs[0].device) for out in outs]


# ----------------------------------------------------------------------- 4. scatter in a hook


def when_all_have_it(replicas, reduce):
    """Call ``reduce(name, copies)`` when a parameter's gradient is there on all replicas."""

    def add_hooks(name, copies):
        came = []

        def on_gradient(parameter):
            came.append(parameter)
            if len(came) == len(copies):
                came.clear()
                reduce(name, copies)

        for parameter in copies:
            parameter.register_post_accumulate_grad_hook(on_gradient)

    for name, _ in replicas[0].named_parameters():
        add_hooks(name, [replica.get_parameter(name) for replica in replicas])


def keep_shards(shards, name, copies, parts):
    for rank, (parameter, part) in enumerate(zip(copies, parts, strict=True)):
        shards[rank][name] = part
        parameter.grad = None


@HOOK.right
def a_function_for_each_parameter(replicas, shards):
    def reduce(name, copies):
        parts = reduce_scatter([parameter.grad for parameter in copies])
        keep_shards(shards, name, copies, [part.clone() for part in parts])

    when_all_have_it(replicas, reduce)


@HOOK.right
def chunks_sent_straight_to_their_owners(replicas, shards):
    def reduce(name, copies):
        chunks = [parameter.grad.chunk(len(copies)) for parameter in copies]
        parts = []
        for rank, parameter in enumerate(copies):
            moved = [each[rank].to(parameter.device) for each in chunks]
            parts.append(torch.stack(moved).sum(0))
        keep_shards(shards, name, copies, parts)

    when_all_have_it(replicas, reduce)


@HOOK.wrong("a part of a tensor keeps all of it in memory")
def views_kept(replicas, shards):
    def reduce(name, copies):
        parts = reduce_scatter([parameter.grad for parameter in copies])
        keep_shards(shards, name, copies, parts)

    when_all_have_it(replicas, reduce)


@HOOK.wrong("whole gradients are still in .grad")
def gradients_not_dropped(replicas, shards):
    def reduce(name, copies):
        parts = reduce_scatter([parameter.grad.clone() for parameter in copies])
        for rank, part in enumerate(parts):
            shards[rank][name] = part.clone()

    when_all_have_it(replicas, reduce)


@HOOK.wrong("is not chunk 0 of the sum of all gradients")
def each_its_own_gradient(replicas, shards):
    def reduce(name, copies):
        parts = [p.grad.chunk(len(copies))[rank].clone() for rank, p in enumerate(copies)]
        keep_shards(shards, name, copies, parts)

    when_all_have_it(replicas, reduce)


@HOOK.wrong("sends more than a reduce-scatter")
def all_reduced_and_cut(replicas, shards):
    def reduce(name, copies):
        ring_all_reduce([parameter.grad for parameter in copies])
        parts = [p.grad.chunk(len(copies))[rank].clone() for rank, p in enumerate(copies)]
        keep_shards(shards, name, copies, parts)

    when_all_have_it(replicas, reduce)


@HOOK.wrong("means over the GPUs")
def the_mean_of_all(replicas, shards):
    def reduce(name, copies):
        parts = reduce_scatter([parameter.grad for parameter in copies])
        keep_shards(shards, name, copies, [part / len(copies) for part in parts])

    when_all_have_it(replicas, reduce)


@HOOK.wrong("shards[0] has no '0.weight' after backward")
def no_hooks(replicas, shards):
    pass
