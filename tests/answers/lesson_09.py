"""The checks of lesson 09 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from itertools import product

import torch

from course_lib.exercises import lesson_09
from exercise_answers import Answers

MESH = Answers("09", "mesh", lesson_09.check_mesh)
EXPOSED = Answers("09", "exposed", lesson_09.check_exposed)
CHOOSE = Answers("09", "choose", lesson_09.check_choose)
EXERCISES = [MESH, EXPOSED, CHOOSE]


# ---------------------------------------------------------------------- 1. groups of a mesh


def grid(data, pipeline, tensor):
    return torch.arange(data * pipeline * tensor).view(data, pipeline, tensor)


def along(ranks, dimension):
    """The groups along one dimension of a grid of ranks."""
    return ranks.movedim(dimension, -1).flatten(0, 1).tolist()


@MESH.right
def groups_as_tuples(*shape):
    return tuple(tuple(map(tuple, along(grid(*shape), d))) for d in (2, 1, 0))


@MESH.right
def with_arithmetic(data, pipeline, tensor):
    count, replica = data * pipeline * tensor, pipeline * tensor
    return [
        [list(range(first, first + tensor)) for first in range(0, count, tensor)],
        [
            list(range(first + t, first + replica, tensor))
            for first in range(0, count, replica)
            for t in range(tensor)
        ],
        [list(range(first, count, replica)) for first in range(replica)],
    ]


@MESH.right
def the_groups_in_another_order(*shape):
    return [along(grid(*shape), d)[::-1] for d in (2, 1, 0)]


@MESH.right
def whoever_shares_the_other_two_indices(*shape):
    places = list(product(*map(range, shape)))
    kinds = []
    for own in (2, 1, 0):
        members = {}
        for rank, place in enumerate(places):
            members.setdefault((*place[:own], *place[own + 1 :]), []).append(rank)
        kinds.append(list(members.values()))
    return kinds


@MESH.right
def tensors_of_ranks(*shape):
    return [grid(*shape).movedim(d, -1).flatten(0, 1) for d in (2, 1, 0)]


@MESH.wrong("the tensor groups are [[0, 1], [2, 3]", "[[0, 4], [1, 5]", "These are the data groups")
def the_data_index_fastest(data, pipeline, tensor):
    ranks = grid(tensor, pipeline, data).permute(2, 1, 0)
    return [along(ranks, d) for d in (2, 1, 0)]


@MESH.wrong("the tensor groups are", "These are the pipeline groups")
def tensor_and_pipeline_groups_swapped(*shape):
    return [along(grid(*shape), d) for d in (1, 2, 0)]


@MESH.wrong("the tensor groups are", "These are the pipeline groups")
def the_pipeline_index_fastest(data, pipeline, tensor):
    ranks = grid(data, tensor, pipeline).transpose(1, 2)
    return [along(ranks, d) for d in (2, 1, 0)]


@MESH.wrong("the tensor groups are", "These are the data groups")
def the_three_kinds_in_the_order_of_the_mesh(*shape):
    return [along(grid(*shape), d) for d in (0, 1, 2)]


@MESH.wrong("the data groups are", "Missing: [7]")
def the_last_rank_missing(*shape):
    tensors, pipelines, datas = (along(grid(*shape), d) for d in (2, 1, 0))
    return tensors, pipelines, [*datas[:-1], datas[-1][:-1]]


@MESH.wrong("the tensor groups are", "Every rank is in one group of a kind")
def ranks_from_one(*shape):
    ranks = [along(grid(*shape), d) for d in (2, 1, 0)]
    return [[[*group, 8] for group in groups] for groups in ranks]


@MESH.wrong("the pipeline groups are [[0, 2], [1, 3], [4, 6], [5, 7]]", "[[0, 1, 2, 3]")
def a_whole_replica_for_a_pipeline_group(data, pipeline, tensor):
    ranks = grid(data, pipeline, tensor)
    return along(ranks, 2), ranks.flatten(1).tolist(), along(ranks, 0)


@MESH.wrong("for data 2 x pipeline 2 x tensor 2: the data groups are", "yours are [[4, 0], [5, 1]")
def falling_ranks(*shape):
    ranks = grid(*shape)
    return along(ranks, 2), along(ranks, 1), [group[::-1] for group in along(ranks, 0)]


@MESH.wrong(
    "for data 1 x pipeline 2 x tensor 4: the tensor groups are [[0, 1, 2, 3], [4, 5, 6, 7]]"
)
def groups_of_two(*_):
    return [along(grid(2, 2, 2), d) for d in (2, 1, 0)]


@MESH.wrong("the data groups should be a list of lists of ranks")
def one_flat_list(*shape):
    ranks = grid(*shape)
    return along(ranks, 2), along(ranks, 1), ranks.flatten().tolist()


@MESH.wrong("return three lists of groups")
def no_data_groups(*shape):
    return [along(grid(*shape), d) for d in (2, 1)]


@MESH.wrong("returned None", "return statement")
def nothing_returned(*shape):
    along(grid(*shape), 2)


# ------------------------------------------------------------------------ 2. what is exposed


def union(stretches):
    """Stretches that do not overlap, in order, and cover the same time."""
    merged = []
    for start, end in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return merged


def length(stretches):
    return sum(end - start for start, end in stretches)


@EXPOSED.right
def busy_less_computing(computing, copying):
    return length(union(computing + copying)) - length(union(computing))


@EXPOSED.right
def copying_less_what_is_hidden(computing, copying):
    hidden = 0
    for start, end in union(copying):
        for first, last in union(computing):
            hidden += max(0, min(end, last) - max(start, first))
    return length(union(copying)) - hidden


@EXPOSED.right
def a_sweep_over_events(computing, copying):
    events = []
    for kind, stretches in enumerate((computing, copying)):
        for start, end in stretches:
            events += [(start, kind, 1), (end, kind, -1)]
    at_work, total, before = [0, 0], 0.0, 0.0
    for now, kind, change in sorted(events):
        if at_work[1] and not at_work[0]:
            total += now - before
        at_work[kind] += change
        before = now
    return total


@EXPOSED.right
def cut_in_small_steps(computing, copying):
    def inside(moment, stretches):
        return any(start <= moment < end for start, end in stretches)

    moments = [step / 8 for step in range(80)]
    return sum(inside(m, copying) and not inside(m, computing) for m in moments) / 8


@EXPOSED.wrong("computing = [(0, 4)]", "2 seconds are exposed, and yours is 3", "hides behind")
def all_of_the_copying(computing, copying):
    return length(union(copying))


@EXPOSED.wrong("yours is 3", "all copies added up, hidden or not")
def all_copies(computing, copying):
    return length(copying)


@EXPOSED.wrong("2 seconds are exposed, and yours is 1", "That is what is hidden")
def what_is_hidden(computing, copying):
    return length(union(copying)) - busy_less_computing(computing, copying)


@EXPOSED.wrong("2 seconds are exposed, and yours is 3", "the other way round")
def computed_while_nothing_is_copied(computing, copying):
    return busy_less_computing(copying, computing)


@EXPOSED.wrong("copying = [(1, 3), (2, 4)], 3 seconds", "yours is 4", "overlap count once")
def copy_by_copy(computing, copying):
    return sum(busy_less_computing(computing, [each]) for each in copying)


@EXPOSED.wrong("yours is -1", "copying less computing, as sums")
def a_difference_of_sums(computing, copying):
    return length(copying) - length(computing)


@EXPOSED.wrong("yours is 0", "copying less computing, and not below 0")
def a_difference_of_sums_not_below_zero(computing, copying):
    return max(0, length(copying) - length(computing))


@EXPOSED.wrong("computing = [(1, 4), (0, 3)]", "2 seconds", "yours is 0", "stretches of computing")
def computing_counted_twice(computing, copying):
    return length(union(computing + copying)) - length(computing)


@EXPOSED.wrong("computing = [(1, 4), (0, 3)]", "yours is 1", "what both of them hide counts once")
def hidden_twice(computing, copying):
    hidden = 0
    for start, end in union(copying):
        for first, last in computing:
            hidden += max(0, min(end, last) - max(start, first))
    return length(union(copying)) - hidden


@EXPOSED.wrong("copying = [(1, 3), (2, 4)], 3 seconds", "yours is 4", "pair by pair")
def pair_by_pair(computing, copying):
    hidden = 0
    for start, end in copying:
        for first, last in computing:
            hidden += max(0, min(end, last) - max(start, first))
    return length(copying) - hidden


@EXPOSED.wrong("computing = [(0, 8), (1, 2)]", "1 second is", "yours is 2", "inside another")
def joined_to_the_end_of_the_last(computing, copying):
    def joined(stretches):
        merged = []
        for start, end in sorted(stretches):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = end
            else:
                merged.append([start, end])
        return merged

    return length(union(joined(computing) + joined(copying))) - length(joined(computing))


@EXPOSED.wrong("copying = [(1, 6)], 3 seconds", "yours is 0", "copies in a gap")
def the_tail_alone(computing, copying):
    last_copy = max((end for _, end in copying), default=0)
    return max(0, last_copy - max((end for _, end in computing), default=0))


@EXPOSED.wrong("computing = [(0, 2), (5, 7)]", "3 seconds are exposed, and yours is 4.")
def hidden_by_the_first_stretch_alone(computing, copying):
    return busy_less_computing(computing[:1], copying)


@EXPOSED.wrong("yours is 2.")
def twos(computing, copying):
    return 2


@EXPOSED.wrong("changed the lists")
def sorted_in_place(computing, copying):
    computing.sort()
    copying.sort()
    return busy_less_computing(computing, copying)


@EXPOSED.wrong("yours is nan")
def not_a_number(computing, copying):
    return float("nan")


@EXPOSED.wrong("should return a number, and returned a list")
def the_stretches(computing, copying):
    return union(copying)


@EXPOSED.wrong("stopped with ValueError")
def no_computing_was_not_thought_of(computing, copying):
    return min(start for start, _ in computing) * 0 + busy_less_computing(computing, copying)


@EXPOSED.wrong("returned None", "return statement")
def no_seconds(computing, copying):
    busy_less_computing(computing, copying)


# -------------------------------------------------------------------- 3. the choice of a mesh


def meshes(N, P, memory, node, layers):
    """All that fit, as (data, pipeline, tensor)."""
    return [
        (data, pipeline, tensor)
        for data, pipeline, tensor in product(range(1, N + 1), repeat=3)
        if data * pipeline * tensor == N
        and pipeline <= layers
        and tensor <= node
        and memory * pipeline * tensor >= 16 * P
    ]


def the_best(*arguments):
    """The most data parallelism, and then the shortest pipeline."""
    return min(meshes(*arguments), key=lambda mesh: (-mesh[0], mesh[1]), default=None)


@CHOOSE.right
def the_first_from_above(N, P, memory, node, layers):
    for data in range(N, 0, -1):
        for tensor in range(node, 0, -1):
            pipeline, rest = divmod(N, data * tensor)
            fits = 16 * P * data <= memory * N
            if rest == 0 and 1 <= pipeline <= layers and fits:
                return data, pipeline, tensor
    return None


@CHOOSE.right
def a_list(*arguments):
    best = the_best(*arguments)
    return None if best is None else list(best)


@CHOOSE.right
def sizes_by_division(N, P, memory, node, layers):
    best = the_best(N, P, memory, node, layers)
    return best and (best[0], best[1], N / best[0] / best[1])


@CHOOSE.right
def sorted_by_what_counts(*arguments):
    ranked = sorted(meshes(*arguments), key=lambda mesh: (mesh[0], mesh[2]))
    return ranked[-1] if ranked else None


@CHOOSE.wrong("(2, 3, 8) is right", "(1, 6, 8)", "more data parallelism fits")
def the_most_model_parallelism(*arguments):
    return min(meshes(*arguments), key=lambda mesh: (mesh[0], mesh[1]), default=None)


@CHOOSE.wrong("nodes of 8", "(2, 1, 24)", "must stay inside a node")
def ignoring_the_node(N, P, memory, node, layers):
    return the_best(N, P, memory, N, layers)


@CHOOSE.wrong("1 layers: None is right", "(1, 2, 8)", "not so many layers")
def ignoring_the_layers(N, P, memory, node, layers):
    return the_best(N, P, memory, node, N)


@CHOOSE.wrong("(2, 3, 8) is right", "(48, 1, 1)", "does not fit")
def ignoring_the_memory(N, P, memory, node, layers):
    return the_best(N, 0, memory, node, layers)


@CHOOSE.wrong("must use all 48 GPUs")
def leaving_gpus_out(N, P, memory, node, layers):
    tensor = min(node, -(-16 * P // memory))
    return 1, 1, int(tensor)


@CHOOSE.wrong("for 10 GPUs", "(2, 5, 1) is right", "(3, 1, 3)", "must use all 10 GPUs")
def at_most_so_many_gpus(N, P, memory, node, layers):
    """Where fewer GPUs would do, the last one or two are left out."""
    fewer = [mesh for n in range(1, N + 1) for mesh in meshes(n, P, memory, node, layers)]
    return max(fewer, key=lambda mesh: (mesh[0], mesh[2]), default=None)


@CHOOSE.wrong("for 10 GPUs", "(2, 5, 1) is right", "(2, 1, 4)", "must use all 10 GPUs")
def tensor_as_large_as_the_node(N, P, memory, node, layers):
    for data in range(N, 0, -1):
        if N % data == 0:
            tensor = min(node, N // data)
            pipeline = N // data // tensor
            if pipeline <= layers and memory * pipeline * tensor >= 16 * P:
                return data, pipeline, tensor
    return None


@CHOOSE.wrong("(2, 3, 8) is right", "yours is None", "This one fits")
def powers_of_two_alone(*arguments):
    powers = [mesh for mesh in meshes(*arguments) if {*mesh[1:]} <= {1, 2, 4, 8, 16}]
    return min(powers, key=lambda mesh: (-mesh[0], mesh[1]), default=None)


@CHOOSE.wrong("10 billion parameters", "(4, 1, 2) is right", "(2, 1, 4)", "more data parallelism")
def less_than_the_memory_and_not_all_of_it(N, P, memory, node, layers):
    return the_best(N, P, memory * (1 - 1e-9), node, layers)


@CHOOSE.wrong("(2, 3, 8) is right", "(2, 8, 3)", "order is (data, pipeline, tensor)")
def data_tensor_pipeline(*arguments):
    best = the_best(*arguments)
    return best and (best[0], best[2], best[1])


@CHOOSE.wrong("(2, 3, 8) is right", "(8, 3, 2)", "order is (data, pipeline, tensor)")
def tensor_pipeline_data(*arguments):
    best = the_best(*arguments)
    return best and best[::-1]


@CHOOSE.wrong("(2, 3, 8) is right", "(2, 24, 1)", "more tensor parallelism fits")
def pipeline_before_tensor(*arguments):
    return max(meshes(*arguments), default=None)


@CHOOSE.wrong("three numbers, (data, pipeline, tensor), or None if nothing fits")
def zero_for_none(*arguments):
    return the_best(*arguments) or 0


@CHOOSE.wrong("three numbers, (data, pipeline, tensor), or None if nothing fits")
def an_empty_tuple_for_none(*arguments):
    return the_best(*arguments) or ()


@CHOOSE.wrong("three numbers, (data, pipeline, tensor), or None if nothing fits")
def data_alone(*arguments):
    best = the_best(*arguments)
    return best and best[0]


@CHOOSE.wrong("(2, 3, 8) is right", "yours is None", "This one fits")
def no_mesh(*arguments):
    the_best(*arguments)


@CHOOSE.wrong("stopped with ValueError")
def the_best_of_nothing(*arguments):
    return max(meshes(*arguments), key=lambda mesh: (mesh[0], mesh[2]))
