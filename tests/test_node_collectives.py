"""Collectives for a machine with nodes: right on any shape, with the bytes and seconds they say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import course_lib
from course_lib import CLASSROOM, ETHERNET, INFINIBAND_HDR, Network, PaperMachine, Spec, Trace
from course_lib.parallel.all_reduce_costs import SECONDS, AllReduce, fastest_all_reduce
from course_lib.parallel.all_to_all_costs import (
    all_to_all_bytes,
    all_to_all_seconds,
    hierarchical_all_to_all_bytes,
    hierarchical_all_to_all_seconds,
)
from course_lib.parallel.collectives import ring_all_reduce, tree_all_reduce
from course_lib.parallel.double_tree import double_tree_all_reduce, parents
from course_lib.parallel.double_tree_costs import double_tree_bytes, double_tree_seconds
from course_lib.parallel.node_collectives import (
    all_to_all,
    hierarchical_all_reduce,
    hierarchical_all_reduce_bytes,
    hierarchical_all_to_all,
    ring_all_reduce_bytes,
)

PATIENT = CLASSROOM.with_(launch_overhead=0.0)  # the formulas leave the host out
SHAPES = [(1,), (7, 3), (1000,), (5, 0)]
MACHINES = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 2)]  # nodes, GPUs in each


def tensors_on(gpus: list[torch.device], *shape: int) -> tuple[Tensor, list[Tensor]]:
    """Whole numbers, whose sum is exact in any order: the sum, and one tensor a device."""
    torch.manual_seed(0)
    originals = [torch.randint(-9, 9, shape).float() for _ in gpus]
    return sum(originals), [t.to(gpu) for t, gpu in zip(originals, gpus, strict=True)]


def run(all_reduce: AllReduce, spec: Spec, nodes: int, size: int, elements: int) -> Trace:
    gpus = course_lib.devices(nodes * size, spec, nodes=nodes, backing="meta")
    tensors = [torch.empty(elements, device=gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        all_reduce(tensors)
    return recording


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nodes, size", MACHINES)
@pytest.mark.parametrize("all_reduce", [hierarchical_all_reduce, double_tree_all_reduce])
def test_every_gpu_has_the_sum(
    all_reduce: AllReduce, nodes: int, size: int, shape: tuple[int, ...]
):
    total, tensors = tensors_on(course_lib.devices(nodes * size, nodes=nodes), *shape)
    with course_lib.trace(strict=True):
        all_reduce(tensors)
    assert all(torch.equal(tensor.cpu(), total) for tensor in tensors)


@pytest.mark.parametrize("all_reduce", [hierarchical_all_reduce, double_tree_all_reduce])
def test_all_gpus_have_the_same_bits(all_reduce: AllReduce):
    torch.manual_seed(0)
    tensors = [torch.randn(1001, device=gpu) for gpu in course_lib.devices(6, nodes=3)]
    all_reduce(tensors)
    assert all(torch.equal(tensor.cpu(), tensors[0].cpu()) for tensor in tensors)


@pytest.mark.parametrize("nodes, size", MACHINES)
@pytest.mark.parametrize("elements", [1, 1001])
def test_the_hierarchical_one_moves_what_its_formula_says_over_each_kind_of_link(
    nodes: int, size: int, elements: int
):
    moved = run(hierarchical_all_reduce, CLASSROOM, nodes, size, elements).bytes_by_link
    formula = hierarchical_all_reduce_bytes(nodes, size, 4 * elements)
    assert {link: moved[link] for link in formula} == formula


@pytest.mark.parametrize("nodes, size", MACHINES)
def test_a_flat_ring_moves_what_its_formula_says_over_each_kind_of_link(nodes: int, size: int):
    elements = 24 * nodes * size
    moved = run(ring_all_reduce, CLASSROOM, nodes, size, elements).bytes_by_link
    formula = ring_all_reduce_bytes(nodes, size, 4 * elements)
    assert {link: moved[link] for link in formula} == formula


@pytest.mark.parametrize("cards", [0, 1, 2])
@pytest.mark.parametrize("nodes, size", [(1, 4), (2, 4), (4, 2), (2, 2)])
@pytest.mark.parametrize("all_reduce", set(SECONDS) - {double_tree_all_reduce},
                         ids=lambda f: f.__name__)  # fmt: skip
def test_each_takes_the_seconds_of_its_formula(
    all_reduce: AllReduce, nodes: int, size: int, cards: int
):
    network = Network("test", 25e6, "", cards=cards)
    spec = PATIENT.with_(network=network)
    elements = 2**18
    measured = run(all_reduce, spec, nodes, size, elements).seconds
    formula = SECONDS[all_reduce](spec, nodes, size, 4 * elements)
    assert measured == pytest.approx(formula, rel=0.01)


def on_paper(
    all_reduce: AllReduce, spec: Spec, nodes: int, size: int, elements: int
) -> PaperMachine:
    machine = PaperMachine(nodes * size, spec, nodes)
    all_reduce(machine.tensors(elements))
    return machine


NETWORKS = [INFINIBAND_HDR / 1000, ETHERNET / 1000]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize(
    "nodes, size", [(1, 8), (2, 4), (4, 2), (16, 1), (64, 1), (16, 4), (32, 2)]
)
def test_the_tuner_picks_one_within_5_percent_of_the_fastest(
    network: Network, nodes: int, size: int
):
    spec, picked = PATIENT.with_(network=network), set()
    for elements in (2**3, 2**7, 2**10, 2**14, 2**18):
        seconds = {f: on_paper(f, spec, nodes, size, elements).seconds for f in SECONDS}
        choice = fastest_all_reduce(spec, nodes, size, 4 * elements)
        assert seconds[choice] <= 1.05 * min(seconds.values())
        picked.add(choice)
    assert len(picked) > 1  # which is the fastest depends on the size


@pytest.mark.parametrize("nodes", [64, 256])
def test_between_many_nodes_the_tuner_picks_two_trees(nodes: int):
    assert fastest_all_reduce(PATIENT, nodes, 1, 4000) is double_tree_all_reduce


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("nodes, size", [(1, 8), (2, 4), (3, 4), (5, 3), (8, 8), (64, 1), (256, 1)])
@pytest.mark.parametrize("elements", [1000, 2**18])
def test_two_trees_move_the_bytes_of_their_formula_and_take_about_its_seconds(
    nodes: int, size: int, elements: int, network: Network
):
    spec = PATIENT.with_(network=network)
    machine = on_paper(double_tree_all_reduce, spec, nodes, size, elements)
    assert machine.bytes_by_link == double_tree_bytes(nodes, size, 4 * elements)
    within = 0.05 if nodes >= 64 else 0.25
    formula = double_tree_seconds(spec, nodes, size, 4 * elements)
    assert formula == pytest.approx(machine.seconds, rel=within)


def test_a_ring_over_two_nodes_is_slow_and_the_hierarchical_one_is_not():
    ring, hierarchical = (
        run(f, CLASSROOM, 2, 4, 1_000_000).seconds
        for f in (ring_all_reduce, hierarchical_all_reduce)
    )
    assert ring > 4 * hierarchical


@pytest.mark.parametrize("count", [*range(1, 20), 64])
def test_no_rank_of_a_tree_has_more_than_two_children_and_all_lead_to_one_root(count: int):
    for shift in (0, 1):
        tree = parents(count, shift)
        assert len(tree) == count - 1
        assert max(Counter(tree.values()).values(), default=0) <= 2
        for rank in range(count):
            for _ in range(count):
                rank = tree.get(rank, rank)
            assert rank not in tree


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_a_leaf_of_one_tree_is_no_leaf_of_the_other(count: int):
    inner = set(parents(count).values()) & set(parents(count, 1).values())
    assert not inner


def test_pieces_follow_each_other_down_and_up_the_trees():
    one, many = (
        run(lambda tensors, n=n: double_tree_all_reduce(tensors, n), PATIENT, 8, 1, 2**18).seconds
        for n in (1, 16)
    )
    assert many < 0.75 * one


def test_between_many_nodes_two_trees_sum_few_bytes_before_a_ring_or_one_tree_does():
    def seconds(all_reduce: AllReduce) -> float:
        machine = PaperMachine(64, PATIENT, nodes=64)
        all_reduce(machine.tensors(1000))
        return machine.seconds

    ours, ring, one_tree = map(seconds, (double_tree_all_reduce, ring_all_reduce, tree_all_reduce))
    assert ours < 0.9 * ring
    assert ours < 0.5 * one_tree


def test_for_large_tensors_two_trees_stay_behind_a_ring():
    ours, ring = (
        run(all_reduce, PATIENT, 8, 1, 2**18).seconds
        for all_reduce in (double_tree_all_reduce, ring_all_reduce)
    )
    assert ours / ring == pytest.approx(1.7, abs=0.1)


@pytest.mark.parametrize("exchange", [all_to_all, hierarchical_all_to_all])
@pytest.mark.parametrize("nodes, size", MACHINES)
def test_all_to_all_brings_every_part_to_its_rank(exchange, nodes: int, size: int):
    gpus = course_lib.devices(nodes * size, nodes=nodes)
    count = len(gpus)
    torch.manual_seed(0)
    parts = [[torch.randn(r, d + 1, device=gpu) for d in range(count)]
             for r, gpu in enumerate(gpus)]  # fmt: skip
    with course_lib.trace(strict=True):
        result = exchange(parts)
        result = [[2 * part for part in row] for row in result]  # used at once, without a wait
    for d, gpu in enumerate(gpus):
        for r in range(count):
            assert result[d][r].device == gpu
            assert torch.equal(result[d][r].cpu(), 2 * parts[r][d].cpu())


def test_over_two_levels_fewer_messages_cross_the_network_with_the_same_bytes():
    def messages(exchange) -> tuple[int, int]:
        gpus = course_lib.devices(8, nodes=2)
        parts = [[torch.ones(100, device=gpu) for _ in gpus] for gpu in gpus]
        with course_lib.trace() as recording:
            exchange(parts)
        crossing = [s for s in recording.spans if s.route and recording.link_of(s) == "network"]
        return len(crossing), recording.bytes_by_link["network"]

    nbytes = 8 * 4 * 100 * 4  # each of 8 GPUs has a part for each of the 4 of the other node
    assert all_to_all_bytes(2, 4, 400)["network"] == nbytes
    assert messages(all_to_all) == (32, nbytes)
    assert messages(hierarchical_all_to_all) == (8, nbytes)


@pytest.mark.parametrize("cards", [0, 1])
@pytest.mark.parametrize("nodes, size", [(1, 4), (2, 4), (3, 2), (4, 1), (5, 3)])
@pytest.mark.parametrize(
    "exchange, nbytes_formula, seconds_formula",
    [
        (all_to_all, all_to_all_bytes, all_to_all_seconds),
        (
            hierarchical_all_to_all,
            hierarchical_all_to_all_bytes,
            hierarchical_all_to_all_seconds,
        ),
    ],
)
def test_an_all_to_all_moves_and_takes_what_its_formulas_say(
    exchange, nbytes_formula, seconds_formula, nodes: int, size: int, cards: int
):
    spec = PATIENT.with_(network=Network("test", 25e6, "", cards=cards))
    machine = PaperMachine(nodes * size, spec, nodes)
    exchange(
        [tensor.tensor_split(nodes * size) for tensor in machine.tensors(nodes * size * 10_000)]
    )
    assert machine.bytes_by_link == nbytes_formula(nodes, size, 40_000)
    assert machine.seconds == pytest.approx(seconds_formula(spec, nodes, size, 40_000), rel=0.01)


def test_an_all_to_all_over_nodes_of_different_size_brings_every_part_too():
    gpus = course_lib.devices(4, nodes=2)[:3]
    parts = [[torch.full((2,), 10.0 * r + d, device=gpu) for d in range(3)]
             for r, gpu in enumerate(gpus)]  # fmt: skip
    result = all_to_all(parts)
    assert [[int(part[0]) for part in row] for row in result] == [[0, 10, 20], [1, 11, 21],
                                                                  [2, 12, 22]]  # fmt: skip


def test_a_rank_without_a_part_for_each_is_named():
    gpus = course_lib.devices(2)
    parts = [[torch.ones(1, device=gpus[0])] * 2, [torch.ones(1, device=gpus[1])]]
    with pytest.raises(ValueError, match=r"each of the 2 ranks .* and rank 1 has 1"):
        all_to_all(parts)


def test_parts_of_several_dtypes_cannot_travel_together():
    gpus = course_lib.devices(2, nodes=2)
    parts = [[torch.ones(1, device=gpu), torch.ones(1, device=gpu, dtype=torch.int64)]
             for gpu in gpus]  # fmt: skip
    with pytest.raises(ValueError, match="need one dtype, not"):
        hierarchical_all_to_all(parts)


def test_nodes_of_different_size_are_refused_in_one_line():
    gpus = course_lib.devices(4, nodes=2)
    with pytest.raises(ValueError, match=r"every node needs as many tensors .* \{0: 2, 1: 1\}"):
        hierarchical_all_reduce([torch.ones(1, device=gpu) for gpu in gpus[:3]])


def test_no_pieces_are_refused_in_one_line():
    with pytest.raises(ValueError, match="cut into 1 piece or more, not into 0"):
        double_tree_all_reduce([torch.ones(1, device=gpu) for gpu in course_lib.devices(2)], 0)
