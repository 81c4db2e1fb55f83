"""Broadcast and reduce by tree: right from any root, and the network crossed once a node."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import course_lib
from course_lib import CLASSROOM, PaperMachine
from course_lib.hardware import fresh_devices
from course_lib.parallel.node_trees import (
    tree_broadcast,
    tree_broadcast_seconds,
    tree_bytes,
    tree_reduce,
    tree_reduce_seconds,
)

PATIENT = CLASSROOM.with_(launch_overhead=0.0)  # the formulas leave the host out


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int, list[int], int, tuple[int, ...]]:
    """Nodes, GPUs in each, the ranks that take part in any order, the root, a shape."""
    nodes, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ranks = draw(st.permutations(range(nodes * size)))[: draw(st.integers(1, nodes * size))]
    root = draw(st.integers(0, len(ranks) - 1))
    return nodes, size, ranks, root, tuple(draw(st.lists(st.integers(0, 5), max_size=3)))


@settings(max_examples=20, deadline=None)
@given(groups())
def test_whoever_takes_part_has_the_tensor_of_the_root(group):
    nodes, size, ranks, root, shape = group
    with fresh_devices(nodes * size, nodes=nodes) as gpus:
        torch.manual_seed(0)
        originals = [torch.randn(shape) for _ in ranks]
        tensors = [t.to(gpus[rank]) for t, rank in zip(originals, ranks, strict=True)]
        with course_lib.trace(strict=True):
            tree_broadcast(tensors, root)
        assert all(torch.equal(tensor.cpu(), originals[root]) for tensor in tensors)


@settings(max_examples=20, deadline=None)
@given(groups())
def test_the_root_has_the_sum_of_all(group):
    nodes, size, ranks, root, shape = group
    with fresh_devices(nodes * size, nodes=nodes) as gpus:
        torch.manual_seed(0)
        originals = [torch.randint(-9, 10, shape).double() for _ in ranks]  # exact in any order
        tensors = [t.to(gpus[rank]) for t, rank in zip(originals, ranks, strict=True)]
        with course_lib.trace(strict=True):
            tree_reduce(tensors, root)
        assert torch.equal(tensors[root].cpu(), sum(originals))


@settings(max_examples=40, deadline=None)
@given(groups())
@pytest.mark.parametrize("collective", [tree_broadcast, tree_reduce])
def test_the_tensor_crosses_the_network_once_for_each_other_node(collective, group):
    nodes, size, ranks, root, _ = group
    machine = PaperMachine(nodes * size, PATIENT, nodes)
    tensors = machine.tensors(3)
    collective([tensors[rank] for rank in ranks], root)
    taking_part = len({rank // size for rank in ranks})
    assert machine.copies_by_link == {
        "within a node": len(ranks) - taking_part,
        "network": taking_part - 1,
    }
    assert machine.bytes_by_link["network"] == 12 * (taking_part - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2000), st.data())
@pytest.mark.parametrize(
    "collective, formula",
    [(tree_broadcast, tree_broadcast_seconds), (tree_reduce, tree_reduce_seconds)],
)
def test_each_takes_the_bytes_and_seconds_of_its_formula(collective, formula, nodes, size, n, data):
    root = data.draw(st.integers(0, nodes * size - 1))
    machine = PaperMachine(nodes * size, PATIENT, nodes)
    collective(machine.tensors(n), root)
    assert machine.bytes_by_link == tree_bytes(nodes, size, 4 * n)
    assert machine.seconds == pytest.approx(formula(PATIENT, nodes, size, 4 * n), rel=1e-9)


@pytest.mark.parametrize("collective, formula", [(tree_broadcast, tree_broadcast_seconds),
                                                 (tree_reduce, tree_reduce_seconds)])  # fmt: skip
def test_on_1024_gpus_in_128_nodes_it_takes_ten_rounds(collective, formula):
    machine = PaperMachine(1024, PATIENT, nodes=128)
    collective(machine.tensors(2**20))
    assert machine.seconds == pytest.approx(formula(PATIENT, 128, 8, 2**22), rel=1e-9)
    assert machine.copies_by_link == {"within a node": 128 * 7, "network": 127}


@pytest.mark.parametrize("root", [2, -1, 0.0, True])
@pytest.mark.parametrize("collective", [tree_broadcast, tree_reduce])
def test_a_root_that_is_none_of_them_is_refused_in_one_line(collective, root: object):
    tensors = [torch.ones(1, device=gpu) for gpu in course_lib.devices(2, nodes=2)]
    with pytest.raises(ValueError, match="root is the place of one of the 2 tensors, not"):
        collective(tensors, root)
