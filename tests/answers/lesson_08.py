"""The checks of lesson 08 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_08
from course_lib.parallel.collectives import all_gather, reduce_scatter, ring_all_reduce
from exercise_answers import Answers

FIT = Answers("08", "fit", lesson_08.check_fit)
GATHER = Answers("08", "gather", lesson_08.check_gather)
BACK = Answers("08", "back", lesson_08.check_back)
HOOK = Answers("08", "hook", lesson_08.check_hook)
EXERCISES = [FIT, GATHER, BACK, HOOK]


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


@FIT.wrong("0 is right, and yours is 1", "a lower one fits as well: stage 0 takes exactly 80 GB")
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


# ------------------------------------------------------------------------- 2. gather, use, forget


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


@GATHER.wrong("GPU 0 held 2.0 whole weights at once", "a name or a list still holds one")
def the_last_one_kept_while_the_next_comes(layers, xs):
    for shards in layers:
        whole = all_gather(shards)
        xs = layer(xs, whole)
    return xs


@GATHER.wrong("GPU 3 held 2.0 whole weights at once", "the variable of a loop")
def a_loop_variable_that_lives_on(layers, xs):
    for shards in layers:
        whole = all_gather(shards)
        outs = []
        for x, weight in zip(xs, whole, strict=True):
            outs.append(F.relu(F.linear(x, weight)))
        del whole
        xs = outs
    return xs


@GATHER.wrong("held 6.0 whole weights at once", "a name or a list still holds one")
def all_gathered_first(layers, xs):
    for whole in [all_gather(shards) for shards in layers]:
        xs = layer(xs, whole)
    return xs


@GATHER.wrong("GPU 0 held 1.8 whole weights", "beside it something else, such as shards")
def shards_beside_the_whole(layers, xs):
    for shards in layers:
        xs = [F.relu(F.linear(x, torch.cat([s.to(x.device) for s in shards]))) for x in xs]
    return xs


@GATHER.wrong("2 times the bytes of the shards that it lacks", "gather each weight once")
def gathered_twice(layers, xs):
    for shards in layers:
        all_gather(shards)
        xs = layer(xs, all_gather(shards))
    return xs


@GATHER.wrong("4 times the bytes of the shards that it lacks", "gather each weight once")
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


@GATHER.wrong("over the host", "from GPU to GPU")
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


@GATHER.wrong("less than the shards that it lacks", "the weights come to it")
def the_inputs_sent_to_the_shards(layers, xs):
    for shards in layers:
        xs = [
            torch.cat(
                [F.relu(F.linear(x.to(shard.device), shard)).to(x.device) for shard in shards], -1
            )
            for x in xs
        ]
    return xs


@GATHER.wrong("returned None: is a return statement missing?")
def no_outputs(layers, xs):
    a_function_that_forgets(layers, xs)


@GATHER.wrong("an output is on vgpu:0, and should be on vgpu:1")
def all_on_the_first_gpu(layers, xs):
    outs = a_function_that_forgets(layers, xs)
    return [out.to(outs[0].device) for out in outs]


@GATHER.wrong("GPU 0 sends 4 times what each GPU would send")
def gathered_on_one_gpu_and_broadcast(layers, xs):
    for shards in layers:
        home = xs[0].device
        whole = torch.empty(4 * len(shards[0]), shards[0].shape[1], device=home)
        for rank, shard in enumerate(shards):
            whole[rank * len(shard) : (rank + 1) * len(shard)] = shard
        xs = [F.relu(F.linear(x, whole.to(x.device))) for x in xs]
        del whole
    return xs


@GATHER.wrong("GPU 0 gets", "something else than weights travels")
def all_examples_computed_on_the_last_gpu(layers, xs):
    home = xs[-1].device
    values = [x.to(home) for x in xs]
    for shards in layers:
        weight = torch.empty(4 * len(shards[0]), shards[0].shape[1], device=home)
        for rank, shard in enumerate(shards):
            weight[rank * len(shard) : (rank + 1) * len(shard)] = shard
        values = layer(values, [weight] * len(values))
        del weight
    return [value.to(x.device) for value, x in zip(values, xs, strict=True)]


@GATHER.wrong("NaN", "the output on vgpu:0")
def not_a_number(layers, xs):
    return [out * float("nan") for out in a_function_that_forgets(layers, xs)]


@GATHER.wrong("layer 0's shard on GPU 0 changed")
def shards_forgotten_too(layers, xs):
    outs = a_function_that_forgets(layers, xs)
    layers[0][0].zero_()
    return outs


@GATHER.wrong("return a list of 4 tensors for 4 GPUs")
def one_output(layers, xs):
    return a_function_that_forgets(layers, xs)[0]


# ------------------------------------------------------------- 3. back for the backward


def back_with(keep, gather, scatter):
    """The answer that keeps ``keep(xs, shards)``, and finds weights and gradients by the others."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            xs, shards = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
            whole = all_gather(shards)
            ctx.save_for_backward(*xs, *keep(shards, whole))
            return tuple(F.linear(*each) for each in zip(xs, whole, strict=True))

        @staticmethod
        def backward(ctx, *gradients):
            N = len(gradients)
            xs, kept = ctx.saved_tensors[:N], ctx.saved_tensors[N:]
            back = [g @ weight for g, weight in zip(gradients, gather(kept), strict=True)]
            return (*back, *scatter([g.T @ x for g, x in zip(gradients, xs, strict=True)]))

    return lambda xs, shards: list(Layer.apply(*xs, *shards))


def the_shards(shards, whole):
    return shards


def copied_parts(gradients):
    return [part.clone() for part in reduce_scatter(gradients)]


@BACK.right
def a_function_of_all_gpus(xs, shards):
    return back_with(the_shards, all_gather, copied_parts)(xs, shards)


@BACK.right
def chunks_straight_to_their_owners(xs, shards):
    def scatter(gradients):
        return [
            torch.stack([g.chunk(len(gradients))[rank].to(mine.device) for g in gradients]).sum(0)
            for rank, mine in enumerate(gradients)
        ]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.right
def saved_tensor_hooks(xs, shards):
    parts = [shard.detach() for shard in shards]
    wholes = [whole.requires_grad_() for whole in all_gather(parts)]
    came = []

    def keep(rank):
        weight = wholes[rank]
        return lambda t: (rank, t.stride()) if t is weight or t._base is weight else t

    def find(kept):
        if not isinstance(kept, tuple):
            return kept
        rank, stride = kept
        if not len(wholes[rank]):
            for whole, value in zip(wholes, all_gather(parts), strict=True):
                whole.data = value
        weight = wholes[rank].detach()
        return weight if weight.stride() == stride else weight.T

    def forget(weight):
        weight.data = weight.new_empty(0)

    def scatter(weight):
        forget(weight)
        came.append(weight)
        if len(came) == len(wholes):
            for shard, part in zip(shards, reduce_scatter([w.grad for w in wholes]), strict=True):
                shard.grad = part.clone()
            for each in wholes:
                each.grad = None
            came.clear()

    outs = []
    for rank, (x, whole) in enumerate(zip(xs, wholes, strict=True)):
        with torch.autograd.graph.saved_tensors_hooks(keep(rank), find):
            outs.append(F.linear(x, whole))
        whole.register_post_accumulate_grad_hook(scatter)
        forget(whole)
    return outs


@BACK.right
def gradients_put_into_the_shards_by_hand(xs, shards):
    def scatter(gradients):
        parts = copied_parts(gradients)
        for shard, part in zip(shards, parts, strict=True):
            shard.grad = part
        return [None] * len(parts)

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("forward sends more than one gather of each weight")
def a_function_for_each_gpu(xs, shards):
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rank, x, *shards):
            ctx.rank = rank
            ctx.save_for_backward(x, *shards)
            return x @ all_gather(shards)[rank].T

        @staticmethod
        def backward(ctx, gradient):
            x, *shards = ctx.saved_tensors
            parts = (gradient.T @ x).chunk(len(shards))
            parts = [p.to(s.device, copy=True) for p, s in zip(parts, shards, strict=True)]
            return None, gradient @ all_gather(shards)[ctx.rank], *parts

    return [Layer.apply(rank, x, *shards) for rank, x in enumerate(xs)]


@BACK.wrong("between forward and backward GPU 0 still holds 5.0 whole weights of 5", "keep shards")
def the_gathered_weights_kept(xs, shards):
    return back_with(lambda shards, whole: whole, lambda kept: kept, copied_parts)(xs, shards)


@BACK.wrong("no gradient arrives at layer 0's shard on GPU 0")
def autograd_through_gathered_weights(xs, shards):
    whole = all_gather([shard.detach() for shard in shards])
    return [F.linear(*each) for each in zip(xs, whole, strict=True)]


@BACK.wrong("all_gather brings no gradients back", "line")
def gathered_with_a_graph(xs, shards):
    whole = all_gather(shards)
    return [F.linear(*each) for each in zip(xs, whole, strict=True)]


@BACK.wrong("GPU 0's own examples alone", "add those of all GPUs")
def each_its_own_chunk(xs, shards):
    def scatter(gradients):
        return [g.chunk(len(gradients))[rank].clone() for rank, g in enumerate(gradients)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("a shard's gradient of 65.54 kB is a part of a tensor of 262.14 kB")
def views_of_whole_gradients(xs, shards):
    return back_with(the_shards, all_gather, reduce_scatter)(xs, shards)


@BACK.wrong("the mean over the GPUs: the sum is asked for")
def the_mean_of_the_gradients(xs, shards):
    def scatter(gradients):
        return [part / len(gradients) for part in reduce_scatter(gradients)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("not chunk 0 of the sum")
def the_wrong_owner(xs, shards):
    def scatter(gradients):
        parts = copied_parts(gradients)
        return [part.to(g.device) for part, g in zip(parts[1:] + parts[:1], gradients, strict=True)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("backward sends more than one gather and one reduce-scatter")
def gradients_all_reduced(xs, shards):
    def scatter(gradients):
        ring_all_reduce(gradients)
        return [g.chunk(len(gradients))[rank].clone() for rank, g in enumerate(gradients)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("backward sends more than one gather and one reduce-scatter")
def gathered_again_for_each_gpu_in_backward(xs, shards):
    def gather(kept):
        return [all_gather(kept)[rank] for rank in range(len(kept))]

    return back_with(the_shards, gather, copied_parts)(xs, shards)


@BACK.wrong("forward sends more than one gather")
def gathered_twice_forward(xs, shards):
    all_gather([shard.detach() for shard in shards])
    return a_function_of_all_gpus(xs, shards)


@BACK.wrong("the gradient of GPU 0's input is not that of the output times W")
def the_weight_transposed(xs, shards):
    def gather(kept):
        return [weight.T for weight in all_gather(kept)]

    return back_with(the_shards, gather, copied_parts)(xs, shards)


@BACK.wrong("no gradient arrives at the input of GPU 0")
def inputs_detached(xs, shards):
    return a_function_of_all_gpus([x.detach() for x in xs], shards)


@BACK.wrong("the output on vgpu:0 has no way back")
def without_a_graph(xs, shards):
    with torch.no_grad():
        return a_function_of_all_gpus(xs, shards)


@BACK.wrong("the output on vgpu:0 has no way back", "none in a list")
def lists_given_to_apply(xs, shards):
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, xs, shards):
            return tuple(F.linear(*each) for each in zip(xs, all_gather(shards), strict=True))

    return Layer.apply(xs, shards)


@BACK.wrong("one gradient for each argument", "in the same order", unsaid="looked at")
def gradients_in_another_order(xs, shards):
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            xs, shards = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
            return tuple(F.linear(*each) for each in zip(xs, all_gather(shards), strict=True))

        @staticmethod
        def backward(ctx, *gradients):
            xs, shards = ctx.saved_tensors[: len(gradients)], ctx.saved_tensors[len(gradients) :]
            back = [g @ weight for g, weight in zip(gradients, all_gather(shards), strict=True)]
            return (*copied_parts([g.T @ x for g, x in zip(gradients, xs, strict=True)]), *back)

    return Layer.apply(*xs, *shards)


@BACK.wrong("one gradient for each argument", "incorrect number of gradients", unsaid="looked at")
def gradients_of_the_inputs_alone(xs, shards):
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors[len(tensors) // 2 :])
            xs, shards = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
            return tuple(F.linear(*each) for each in zip(xs, all_gather(shards), strict=True))

        @staticmethod
        def backward(ctx, *gradients):
            weights = all_gather(ctx.saved_tensors)
            return tuple(g @ weight for g, weight in zip(gradients, weights, strict=True))

    return Layer.apply(*xs, *shards)


@BACK.wrong("NaN", "the gradient of layer")
def gradients_that_are_no_numbers(xs, shards):
    def scatter(gradients):
        return [part * float("nan") for part in reduce_scatter(gradients)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("numbers went over the host")
def the_sum_on_the_host(xs, shards):
    def scatter(gradients):
        total = sum(g.cpu() for g in gradients).chunk(len(gradients))
        return [part.to(g.device) for part, g in zip(total, gradients, strict=True)]

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("layer 0's shard on GPU 0 changed")
def stepped_as_well(xs, shards):
    def scatter(gradients):
        parts = copied_parts(gradients)
        for shard, part in zip(shards, parts, strict=True):
            shard.data -= part
        return parts

    return back_with(the_shards, all_gather, scatter)(xs, shards)


@BACK.wrong("4 tensors for 4 GPUs")
def one_output_of_four(xs, shards):
    return a_function_of_all_gpus(xs, shards)[:1]


@BACK.wrong("whole weights or gradients more than before", "from one layer to the next")
def gradients_remembered(xs, shards):
    def scatter(gradients):
        remembered.append([g.clone() for g in gradients])
        return copied_parts(gradients)

    remembered.clear()
    return back_with(the_shards, all_gather, scatter)(xs, shards)


remembered: list = []


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


@HOOK.wrong("is a part of a tensor of 65.54 kB and keeps all of it in memory")
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


@HOOK.wrong("should be a tensor on vgpu:0, of shape (32, 128), and is on vgpu:0, of shape (4096,)")
def shards_of_a_row(replicas, shards):
    def reduce(name, copies):
        parts = reduce_scatter([parameter.grad.flatten() for parameter in copies])
        keep_shards(shards, name, copies, [part.clone() for part in parts])

    when_all_have_it(replicas, reduce)


@HOOK.wrong("10 of 10 were still whole in .grad", "as soon as", unsaid="such as a list")
def all_at_the_end_of_backward(replicas, shards):
    came = []

    def on_gradient(parameter):
        came.append(parameter)
        if len(came) == sum(len(list(replica.parameters())) for replica in replicas):
            came.clear()
            for name, _ in replicas[0].named_parameters():
                copies = [replica.get_parameter(name) for replica in replicas]
                parts = reduce_scatter([parameter.grad for parameter in copies])
                keep_shards(shards, name, copies, [part.clone() for part in parts])

    for replica in replicas:
        for parameter in replica.parameters():
            parameter.register_post_accumulate_grad_hook(on_gradient)


@HOOK.wrong("a second one does not", "still count")
def counted_on_and_on(replicas, shards):
    def add_hooks(name, copies):
        came = []

        def on_gradient(parameter):
            came.append(name)
            if len(came) == len(copies):
                parts = reduce_scatter([each.grad for each in copies])
                keep_shards(shards, name, copies, [part.clone() for part in parts])

        for parameter in copies:
            parameter.register_post_accumulate_grad_hook(on_gradient)

    for name, _ in replicas[0].named_parameters():
        add_hooks(name, [replica.get_parameter(name) for replica in replicas])


@HOOK.wrong("something, such as a list, holds them", unsaid="still whole in .grad")
def gradients_kept_in_a_list(replicas, shards):
    scattered = []

    def reduce(name, copies):
        gradients = [parameter.grad for parameter in copies]
        scattered.append(gradients)
        keep_shards(shards, name, copies, [part.clone() for part in reduce_scatter(gradients)])

    when_all_have_it(replicas, reduce)


@HOOK.wrong("a parameter on vgpu:0 changed")
def stepped_in_the_hook(replicas, shards):
    def reduce(name, copies):
        parts = [part.clone() for part in reduce_scatter([p.grad for p in copies])]
        keep_shards(shards, name, copies, parts)
        with torch.no_grad():
            copies[0] -= 1.0

    when_all_have_it(replicas, reduce)
