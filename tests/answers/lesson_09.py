"""The checks of lesson 09 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from itertools import product

import torch

from course_lib.exercises import lesson_09
from exercise_answers import Answers

MESH = Answers("09", "mesh", lesson_09.check_mesh)
BYTES = Answers("09", "bytes", lesson_09.check_bytes)
CHOOSE = Answers("09", "choose", lesson_09.check_choose)
EXERCISES = [MESH, BYTES, CHOOSE]


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


# ---------------------------------------------------------------------- 2. bytes by formula


def in_order(data, sharded, tensor):
    return {"data": data, "sharded": sharded, "tensor": tensor}


def formulas(N, P, L, B, T, D):
    part = (N - 1) / N * 4
    return in_order(2 * part * P, 3 * part * P, 8 * part * L * B * T * D)


@BYTES.right
def whole_numbers(N, P, L, B, T, D):
    return in_order(
        2 * (N - 1) * 4 * P // N, 3 * (N - 1) * 4 * P // N, 8 * (N - 1) * 4 * L * B * T * D // N
    )


@BYTES.right
def collective_by_collective(N, P, L, B, T, D):
    def gather(numbers):
        return (N - 1) * (4 * numbers / N)

    def all_reduce(numbers):
        return 2 * gather(numbers)

    activations = sum(all_reduce(B * T * D) for _ in range(4 * L))
    return {"tensor": activations, "sharded": gather(P) * 3, "data": all_reduce(P)}


@BYTES.right
def what_is_sent_less_what_is_there(N, P, L, B, T, D):
    return in_order(8 * P - 8 * P / N, 12 * (P - P / N), 32 * L * B * T * D * (1 - 1 / N))


@BYTES.right
def and_more_than_was_asked_for(*sizes):
    return formulas(*sizes) | {"pipeline": 0.0}


@BYTES.wrong("data sends 7000000 bytes", "yours is 3500000", "a scatter and a gather")
def half_of_an_all_reduce(*sizes):
    return {name: nbytes / 2 for name, nbytes in formulas(*sizes).items()}


@BYTES.wrong("data sends 7000000 bytes", "yours is 8000000", "(N - 1)/N of the whole")
def whole_tensors(N, P, L, B, T, D):
    return in_order(8 * P, 12 * P, 32 * L * B * T * D)


@BYTES.wrong("tensor sends", "four all-reduces")
def two_all_reduces_a_block(*sizes):
    right = formulas(*sizes)
    return right | {"tensor": right["tensor"] / 2}


@BYTES.wrong("tensor sends", "There are L blocks")
def one_block(N, P, L, B, T, D):
    return formulas(N, P, L, B, T, D) | {"tensor": formulas(N, P, 1, B, T, D)["tensor"]}


@BYTES.wrong("sharded sends 10500000", "gathers parameters twice, forward and backward")
def sharded_like_data(*sizes):
    right = formulas(*sizes)
    return right | {"sharded": right["data"]}


@BYTES.wrong("sharded sends 10500000", "three, not four")
def sharded_with_a_whole_all_reduce(*sizes):
    right = formulas(*sizes)
    return right | {"sharded": 2 * right["data"]}


@BYTES.wrong("sharded sends 10500000", "yours is 3500000", "scatters gradients once")
def sharded_without_its_gathers(*sizes):
    right = formulas(*sizes)
    return right | {"sharded": right["data"] / 2}


@BYTES.wrong("data sends 7000000 bytes", "yours is 1750000", "4 bytes")
def numbers_and_not_bytes(*sizes):
    return {name: nbytes / 4 for name, nbytes in formulas(*sizes).items()}


@BYTES.wrong("yours is 56000000", "all GPUs send together")
def all_gpus_together(N, *others):
    return {name: nbytes * N for name, nbytes in formulas(N, *others).items()}


@BYTES.wrong("for N = 1", "data sends 0 bytes", "alone sends nothing")
def a_gpu_alone_that_sends(N, *others):
    return formulas(N, *others) if N > 1 else in_order(80, 120, 32)


@BYTES.wrong("data sends 7000000 bytes", "yours is 0.")
def a_division_too_early(N, P, L, B, T, D):
    return in_order(*(0 * ((N - 1) // N) for _ in range(3)))


@BYTES.wrong("data sends 7000000", "yours is nan")
def not_a_number(*sizes):
    return formulas(*sizes) | {"data": float("nan")}


@BYTES.wrong("there is no 'sharded'")
def a_key_missing(*sizes):
    right = formulas(*sizes)
    return {name: right[name] for name in ("data", "tensor")}


@BYTES.wrong("'tensor' should be a number, and is a NoneType")
def a_value_missing(*sizes):
    return formulas(*sizes) | {"tensor": None}


@BYTES.wrong("return a dictionary, and not a tuple")
def a_tuple(*sizes):
    return tuple(formulas(*sizes).values())


@BYTES.wrong("returned None", "return statement")
def no_bytes(*sizes):
    formulas(*sizes)


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
