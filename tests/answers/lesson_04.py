"""The checks of lesson 04 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import numpy as np
import torch

import course_lib
from course_lib.exercises import lesson_04
from course_lib.parallel import layer_parallel
from exercise_answers import Answers

BACKWARD = Answers("04", "backward", lesson_04.check_backward)
BALANCE = Answers("04", "balance", lesson_04.check_balance)
HALVES = Answers("04", "halves", lesson_04.check_halves)
EXERCISES = [BACKWARD, BALANCE, HALVES]


# ------------------------------------------------ 1. backward by hand, over three stages


@BACKWARD.right
def line_by_line(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h1.backward(r2.grad.to(gpus[1]))
    h0.backward(r1.grad.to(gpus[0]))


@BACKWARD.right
def with_autograd_grad_and_a_recursion(stages, gpus, x, y, loss_function):
    def go(i, received):
        out = stages[i](received)
        if i == 2:
            loss_function(out, y).backward()
            return
        onwards = out.detach().to(gpus[i + 1])
        onwards.requires_grad = True
        go(i + 1, onwards)
        torch.autograd.backward([out], [onwards.grad.to(out.device)])

    go(0, x)


@BACKWARD.wrong("stages[1] received still has a graph", "detach")
def leaving_it_to_autograd(stages, gpus, x, y, loss_function):
    for stage, gpu in zip(stages, gpus, strict=True):
        x = stage(x.to(gpu))
    loss_function(x, y).backward()


@BACKWARD.wrong("asks for no gradient", "requires_grad_()")
def detaching_and_no_more(stages, gpus, x, y, loss_function):
    h1 = stages[1](stages[0](x).detach().to(gpus[1]))
    loss_function(stages[2](h1.detach().to(gpus[2])), y).backward()


@BACKWARD.wrong("stages[1] received is detached", "requires_grad_() comes after .to")
def asking_before_the_copy(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().requires_grad_()
    h1 = stages[1](r1.to(gpus[1]))
    r2 = h1.detach().requires_grad_()
    loss_function(stages[2](r2.to(gpus[2])), y).backward()
    h1.backward(r2.grad)
    h0.backward(r1.grad)


@BACKWARD.wrong("stopped with AttributeError", "h0.backward(r1.grad.to(gpus[0]))")
def handing_a_gradient_on_before_it_is_there(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h0.backward(r1.grad.to(gpus[0]))
    h1.backward(r2.grad.to(gpus[1]))


@BACKWARD.wrong("stages[0] has no gradients")
def stopping_before_the_first_stage(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h1.backward(r2.grad.to(gpus[1]))


@BACKWARD.wrong("stopped with RuntimeError", "grad can be implicitly created only for scalar")
def backward_without_a_gradient(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h1.backward()


@BACKWARD.wrong("over the host")
def carrying_over_the_host(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().cpu().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().cpu().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h1.backward(r2.grad.to(gpus[1]))
    h0.backward(r1.grad.to(gpus[0]))


@BACKWARD.wrong("not those of one GPU")
def a_gradient_of_ones_for_the_first_stage(stages, gpus, x, y, loss_function):
    h0 = stages[0](x)
    r1 = h0.detach().to(gpus[1]).requires_grad_()
    h1 = stages[1](r1)
    r2 = h1.detach().to(gpus[2]).requires_grad_()
    loss_function(stages[2](r2), y).backward()
    h1.backward(r2.grad.to(gpus[1]))
    h0.backward(torch.ones_like(h0))


@BACKWARD.wrong("was never run")
def two_stages_only(stages, gpus, x, y, loss_function):
    stages[0](x)
    stages[1](torch.ones(32, 48, device=gpus[1], requires_grad=True))


@BACKWARD.wrong("the parameters changed")
def a_step_inside(stages, gpus, x, y, loss_function):
    line_by_line(stages, gpus, x, y, loss_function)
    with torch.no_grad():
        for parameter in stages[0].parameters():
            parameter -= parameter.grad


# --------------------------------------------------------------------------- 2. where to cut


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


@BALANCE.wrong("The last stage costs most", "filled before the next one began")
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


# ------------------------------------------------------- 3. do not wait for the whole batch


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


@HALVES.wrong("All parts are copied before the second GPU starts")
def copying_all_parts_first(stages, gpus, x):
    hs = [stages[0](part).to(gpus[1]) for part in x.chunk(8)]
    return torch.cat([stages[1](h) for h in hs])


def _cuts_by(key, costs, count):
    def spread(cuts):
        edges = [0, *cuts, len(costs)]
        return key([sum(costs[a:b]) for a, b in pairwise(edges)])

    return list(min(combinations(range(1, len(costs)), count - 1), key=spread))


@BALANCE.wrong("cheaper costliest stage", unsaid="The last stage costs most")
def comparing_the_lists_and_not_their_sums(costs, count):
    ways = combinations(range(1, len(costs)), count - 1)

    def largest(cuts):
        return max(costs[a:b] for a, b in pairwise([0, *cuts, len(costs)]))

    return list(min(ways, key=largest))


@BALANCE.wrong("cheaper costliest stage", unsaid="Equally many")
def the_least_difference(costs, count):
    return _cuts_by(lambda sums: max(sums) - min(sums), costs, count)


@BALANCE.wrong("cheaper costliest stage", unsaid="Equally many")
def the_least_sum_of_squares(costs, count):
    return _cuts_by(lambda sums: sum(s * s for s in sums), costs, count)
