"""The checks of lesson 04 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from functools import reduce
from itertools import accumulate, combinations, pairwise

import numpy as np
import torch
from torch import nn

import course_lib
from course_lib.exercises import lesson_04
from course_lib.parallel import layer_parallel
from exercise_answers import Answers

FORWARD = Answers("04", "forward", lesson_04.check_forward)
BYTES = Answers("04", "bytes", lesson_04.check_bytes)
BALANCE = Answers("04", "balance", lesson_04.check_balance)
HALVES = Answers("04", "halves", lesson_04.check_halves)
EXERCISES = [FORWARD, BYTES, BALANCE, HALVES]


# ------------------------------------------------------------------------- 1. forward, across


@FORWARD.right
def by_index(stages, gpus, x):
    h = x
    for i in range(len(stages)):
        h = stages[i](h if i == 0 else h.to(gpus[i], non_blocking=True))
    return h


@FORWARD.right
def one_line_a_stage(stages, gpus, x):
    first, second, third, last = stages
    h = first(x)
    h = second(h.to(gpus[1]))
    h = third(h.to(gpus[2]))
    return last(h.to(gpus[3]))


@FORWARD.right
def reduce_over_the_stages(stages, gpus, x):
    return reduce(
        lambda h, stage: stage(h.to(next(stage.parameters()).device, copy=False)), stages, x
    )


@FORWARD.right
def layer_by_layer(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = x.to(device=gpu)
        for layer in stage:
            x = layer(x)
    return x


@FORWARD.right
def copying_into_a_buffer(stages, gpus, x):
    h = stages[0](x)
    for stage, gpu in zip(stages[1:], gpus[1:], strict=True):
        h = stage(torch.empty(h.shape, device=gpu).copy_(h))
    return h


@FORWARD.wrong("do not reach the first stage", "cut at a boundary", "detach")
def detach_at_every_boundary(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.detach().to(gpu))
    return x


@FORWARD.wrong("do not reach the first stage", "cut at a boundary")
def a_leaf_at_every_boundary(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.detach().to(gpu).requires_grad_())
    return x


@FORWARD.wrong("do not reach the first stage", ".data")
def data_at_one_boundary(stages, gpus, x):
    h = stages[0](x).data
    for stage, gpu in zip(stages[1:], gpus[1:], strict=True):
        h = stage(h.to(gpu))
    return h


@FORWARD.wrong("knows no way back", "no_grad")
def no_grad(stages, gpus, x):
    with torch.no_grad():
        for stage, gpu in zip(stages, gpus, strict=True):
            x = stage(x.to(gpu))
    return x


@FORWARD.wrong("knows no way back", "detach")
def detaching_the_output(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.to(gpu))
    return x.detach()


@FORWARD.wrong("over the host", "from GPU to GPU")
def going_over_the_host(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.cpu().to(gpu))
    return x


@FORWARD.wrong("more crossed the links", "its stage's GPU to the next stage's")
def gathering_every_activation_on_the_first_gpu(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.to(gpus[0]).to(gpu))
    return x


@FORWARD.wrong("should be on vgpu:3, and is on vgpu:0")
def bringing_the_output_home(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.to(gpu))
    return x.to(gpus[0])


@FORWARD.wrong("stages[1] is no longer on vgpu:1", "not the layers to the activations")
def moving_the_stages_to_the_first_gpu(stages, gpus, x):
    for stage in stages:
        x = stage.to(gpus[0])(x)
    return x.to(gpus[-1])


@FORWARD.wrong("numbers are not", "in order")
def the_middle_stages_in_the_wrong_order(stages, gpus, x):
    for i in (0, 2, 1, 3):
        x = stages[i](x.to(gpus[i]))
    return x


@FORWARD.wrong("stopped with RuntimeError", "shapes cannot be multiplied")
def the_stages_backwards(stages, gpus, x):
    for stage, gpu in zip(reversed(stages), reversed(gpus), strict=True):
        x = stage(x.to(gpu))
    return x


@FORWARD.wrong("does every stage run")
def skipping_a_stage(stages, gpus, x):
    for i in (0, 1, 3):
        x = stages[i](x.to(gpus[i]))
    return x


@FORWARD.wrong("does every stage run")
def the_input_for_every_stage(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        output = stage(x.to(gpu))
    return output


@FORWARD.wrong("shape (32, 64)", "should have (32, 10)")
def leaving_out_the_last_stage(stages, gpus, x):
    for stage, gpu in zip(stages[:-1], gpus[:-1], strict=True):
        x = stage(x.to(gpu))
    return x.to(gpus[-1])


@FORWARD.wrong("stopped with RuntimeError", "same device")
def not_moving_the_activations(stages, gpus, x):
    return nn.Sequential(*stages)(x)


@FORWARD.wrong("should return a tensor", "None")
def forgetting_to_return(stages, gpus, x):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.to(gpu))


@FORWARD.wrong("should return a tensor", "[tensor")
def every_stages_output(stages, gpus, x):
    outputs = [x]
    for stage, gpu in zip(stages, gpus, strict=True):
        outputs.append(stage(outputs[-1].to(gpu)))
    return outputs


# -------------------------------------------------------------- 2. bytes over the boundaries


@BYTES.right
def the_function_of_the_module(B, T, D, stages, bytes_a_number):
    return layer_parallel.boundary_bytes(B * T * D, bytes_a_number, stages)


@BYTES.right
def boundary_by_boundary(B, T, D, stages, bytes_a_number):
    total = 0
    for _ in range(1, stages):
        total += B * T * D * bytes_a_number  # forward
        total += B * T * D * bytes_a_number  # backward
    return total


@BYTES.right
def a_float(B, T, D, stages, bytes_a_number):
    return 2.0 * (stages - 1) * B * T * D * bytes_a_number


@BYTES.wrong("forward only", "the gradients come back")
def forward_only(B, T, D, stages, bytes_a_number):
    return (stages - 1) * B * T * D * bytes_a_number


@BYTES.wrong("one boundary fewer")
def as_many_boundaries_as_stages(B, T, D, stages, bytes_a_number):
    return 2 * stages * B * T * D * bytes_a_number


@BYTES.wrong("forward only", "one boundary fewer")
def forward_only_over_as_many_boundaries_as_stages(B, T, D, stages, bytes_a_number):
    return stages * B * T * D * bytes_a_number


@BYTES.wrong("A bfloat16 number has 2 bytes, not 4")
def four_bytes_always(B, T, D, stages, bytes_a_number):
    return 2 * (stages - 1) * B * T * D * 4


@BYTES.wrong("numbers, not bytes")
def numbers(B, T, D, stages, bytes_a_number):
    return 2 * (stages - 1) * B * T * D


@BYTES.wrong("one gradient over a boundary", "as large as the activation")
def backward_counted_twice(B, T, D, stages, bytes_a_number):
    return 3 * (stages - 1) * B * T * D * bytes_a_number


@BYTES.wrong("in 2 stages", "2,048 bytes cross", "you say 64")
def forgetting_the_tokens_and_the_batch(B, T, D, stages, bytes_a_number):
    return (stages - 1) * D * bytes_a_number


@BYTES.wrong("in 1 stages", "0 bytes cross")
def at_least_one_boundary(B, T, D, stages, bytes_a_number):
    return 2 * max(stages - 1, 1) * B * T * D * bytes_a_number


@BYTES.wrong("None", "return")
def bytes_not_returned(B, T, D, stages, bytes_a_number):
    2 * (stages - 1) * B * T * D * bytes_a_number


@BYTES.wrong("number", "list")
def bytes_of_each_boundary(B, T, D, stages, bytes_a_number):
    return [2 * B * T * D * bytes_a_number] * (stages - 1)


@BYTES.wrong("stopped with TypeError", "argument")
def too_few_arguments(B, T, D, stages):
    return 2 * (stages - 1) * B * T * D * 4


# --------------------------------------------------------------------------- 3. where to cut


def stage_costs(costs, cuts):
    return [sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)])]


@BALANCE.right
def trying_all_in_a_loop(costs, count):
    best, best_cost = None, float("inf")
    for cuts in combinations(range(1, len(costs)), count - 1):
        if max(stage_costs(costs, cuts)) < best_cost:
            best, best_cost = cuts, max(stage_costs(costs, cuts))
    return best


@BALANCE.right
def one_stage_and_the_rest(costs, count):
    if count == 1:
        return []
    ways = []
    for cut in range(1, len(costs) - count + 2):
        ways.append([cut, *(cut + c for c in one_stage_and_the_rest(costs[cut:], count - 1))])
    return min(ways, key=lambda cuts: max(stage_costs(costs, cuts)))


@BALANCE.right
def the_last_of_the_best(costs, count):
    ways = list(combinations(range(1, len(costs)), count - 1))
    return list(min(reversed(ways), key=lambda cuts: max(stage_costs(costs, cuts))))


@BALANCE.right
def whole_numbers_of_numpy(costs, count):
    ways = [np.array(cuts, int) for cuts in combinations(range(1, len(costs)), count - 1)]
    return list(ways[np.argmin([max(stage_costs(costs, cuts)) for cuts in ways])])


@BALANCE.right
def the_smallest_limit_that_works(costs, count):
    def fill(limit):
        cuts, filled = [], 0
        for i, cost in enumerate(costs):
            left, needed = len(costs) - i, count - 1 - len(cuts)
            if i and (filled + cost > limit or left == needed):
                cuts.append(i)
                filled = 0
            filled += cost
        return cuts

    sums = {sum(costs[a:b]) for a, b in combinations(range(len(costs) + 1), 2)}
    for limit in sorted(sums):
        cuts = fill(limit)
        if len(cuts) == count - 1 and max(stage_costs(costs, cuts)) <= limit:
            return cuts


@BALANCE.wrong("cheaper costliest stage", "Equally many layers are not equally costly")
def equally_many_layers(costs, count):
    return [len(costs) * i // count for i in range(1, count)]


@BALANCE.wrong("The last stage costs most", "filled before the next one begins")
def greedy_up_to_the_average(costs, count):
    cuts, filled = [], 0
    for i, cost in enumerate(costs):
        left, needed = len(costs) - i, count - 1 - len(cuts)
        full = filled + cost > sum(costs) / count or left == needed
        if i and full and needed:
            cuts.append(i)
            filled = 0
        filled += cost
    return cuts


@BALANCE.wrong("cheaper costliest stage")
def cutting_where_the_average_is_passed(costs, count):
    totals = list(accumulate(costs))
    cuts = []
    for i in range(1, count):
        cut = next(k for k, total in enumerate(totals) if total >= sum(costs) * i / count) + 1
        cuts.append(max(cut, cuts[-1] + 1 if cuts else 1))
    return [min(cut, len(costs) - count + 1 + i) for i, cut in enumerate(cuts)]


@BALANCE.wrong("cheaper costliest stage")
def the_cheapest_stage_as_costly_as_can_be(costs, count):
    ways = combinations(range(1, len(costs)), count - 1)
    return list(max(ways, key=lambda cuts: min(stage_costs(costs, cuts))))


@BALANCE.wrong("a stage is empty")
def empty_stages(costs, count):
    return [0] * (count - 1)


@BALANCE.wrong("a stage is empty")
def cutting_behind_the_last_layer(costs, count):
    return list(range(len(costs) - count + 2, len(costs) + 1))


@BALANCE.wrong("the cuts do not rise")
def falling_cuts(costs, count):
    return layer_parallel.balanced_cuts(costs, count)[::-1]


@BALANCE.wrong("2 stages need 1 cuts", "you return 2")
def one_cut_a_stage(costs, count):
    return [*layer_parallel.balanced_cuts(costs, count), len(costs)]


@BALANCE.wrong("2 stages need 1 cuts", "you return 3")
def all_edges(costs, count):
    return [0, *layer_parallel.balanced_cuts(costs, count), len(costs)]


@BALANCE.wrong("a list of positions", "[[1, 1], [1, 1]]")
def the_stages_themselves(costs, count):
    edges = [0, *layer_parallel.balanced_cuts(costs, count), len(costs)]
    return [costs[a:b] for a, b in pairwise(edges)]


@BALANCE.wrong("a list of positions", "2.0")
def positions_in_floats(costs, count):
    return [len(costs) * i / count for i in range(1, count)]


@BALANCE.wrong("a list of positions", "None")
def cuts_not_returned(costs, count):
    layer_parallel.balanced_cuts(costs, count)


@BALANCE.wrong("stopped with IndexError")
def a_layer_that_is_not_there(costs, count):
    return [costs[len(costs)]]


# ------------------------------------------------------- 4. do not wait for the whole batch


@HALVES.right
def two_halves(stages, gpus, x):
    first, second = x.tensor_split(2)
    h_first = stages[0](first).to(gpus[1])
    h_second = stages[0](second)
    y_first = stages[1](h_first)
    return torch.cat([y_first, stages[1](h_second.to(gpus[1]))])


@HALVES.right
def a_comprehension_over_eight_parts(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).to(gpus[1])) for part in x.split(64)])


@HALVES.right
def writing_into_a_buffer(stages, gpus, x):
    output = torch.empty(len(x), 10, device=gpus[1])
    for i in range(0, len(x), 100):
        output[i : i + 100] = stages[1](stages[0](x[i : i + 100]).to(gpus[1]))
    return output


@HALVES.right
def the_last_part_first(stages, gpus, x):
    outputs = []
    for part in reversed(x.chunk(4)):
        outputs.insert(0, stages[1](stages[0](part).to(gpus[1])))
    return torch.vstack(outputs)


@HALVES.right
def one_part_ahead(stages, gpus, x):
    parts = list(x.chunk(4))
    outputs, waiting = [], stages[0](parts[0])
    for part in parts[1:]:
        arrived = waiting.to(gpus[1])
        waiting = stages[0](part)
        outputs.append(stages[1](arrived))
    outputs.append(stages[1](waiting.to(gpus[1])))
    return torch.cat(outputs)


@HALVES.wrong("one after the other", "Cut the batch")
def the_whole_batch_in_one_go(stages, gpus, x):
    return stages[1](stages[0](x).to(gpus[1]))


@HALVES.wrong("one after the other", "send each part on before the first GPU starts the next")
def all_parts_on_one_gpu_and_then_on_the_other(stages, gpus, x):
    waiting = [stages[0](part) for part in x.chunk(4)]
    return torch.cat([stages[1](h.to(gpus[1])) for h in waiting])


@HALVES.wrong("one after the other", "Cut the batch")
def joining_the_parts_at_the_boundary(stages, gpus, x):
    h = torch.cat([stages[0](part) for part in x.chunk(4)])
    return stages[1](h.to(gpus[1]))


@HALVES.wrong("one after the other", "read nothing between")
def item_between_the_parts(stages, gpus, x):
    outputs = []
    for part in x.chunk(4):
        outputs.append(stages[1](stages[0](part).to(gpus[1])))
        outputs[-1].mean().item()
    return torch.cat(outputs)


@HALVES.wrong("one after the other")
def synchronize_between_the_parts(stages, gpus, x):
    outputs = []
    for part in x.chunk(4):
        outputs.append(stages[1](stages[0](part).to(gpus[1])))
        course_lib.synchronize()
    return torch.cat(outputs)


@HALVES.wrong("they overlap", "not for long enough", "make the parts equal")
def two_very_unequal_parts(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).to(gpus[1])) for part in x.split([480, 32])])


@HALVES.wrong("they overlap", "not for long enough")
def two_rather_unequal_parts(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).to(gpus[1])) for part in x.split([384, 128])])


@HALVES.wrong("they overlap", "so many small parts", "make fewer")
def a_hundred_parts(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).to(gpus[1])) for part in x.split(5)])


@HALVES.wrong("over the host")
def crossing_over_the_host(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).cpu().to(gpus[1])) for part in x.chunk(4)])


@HALVES.wrong("over the host", "waits")
def collecting_the_outputs_on_the_cpu(stages, gpus, x):
    outputs = [stages[1](stages[0](part).to(gpus[1])).cpu() for part in x.chunk(4)]
    return torch.cat(outputs).to(gpus[1])


@HALVES.wrong("numbers are not", "in order")
def the_parts_in_the_wrong_order(stages, gpus, x):
    outputs = [stages[1](stages[0](part).to(gpus[1])) for part in x.chunk(4)]
    return torch.cat(outputs[::-1])


@HALVES.wrong("shape (256, 10)", "should have (512, 10)")
def half_of_the_batch(stages, gpus, x):
    return stages[1](stages[0](x[:256]).to(gpus[1]))


@HALVES.wrong("should be on vgpu:1, and is on vgpu:0")
def an_output_on_the_first_gpu(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part).to(gpus[1])).to(gpus[0]) for part in x.chunk(4)])


@HALVES.wrong("should return a tensor", "[tensor")
def a_list_of_parts(stages, gpus, x):
    return [stages[1](stages[0](part).to(gpus[1])) for part in x.chunk(4)]


@HALVES.wrong("should return a tensor", "None")
def an_output_not_returned(stages, gpus, x):
    torch.cat([stages[1](stages[0](part).to(gpus[1])) for part in x.chunk(4)])


@HALVES.wrong("stopped with RuntimeError", "same device")
def not_moving_the_parts(stages, gpus, x):
    return torch.cat([stages[1](stages[0](part)) for part in x.chunk(4)])
