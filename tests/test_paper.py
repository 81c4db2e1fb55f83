"""GPUs on paper: the clock of virtual ones, equal to the bit, for machines that PyTorch has not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import course_lib
from course_lib import CLASSROOM, ETHERNET, Network, PaperMachine, Spec
from course_lib.hardware import fresh_devices
from course_lib.parallel.all_reduce_costs import hierarchical_seconds
from course_lib.parallel.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
    ring_all_reduce,
    tree_all_reduce,
)
from course_lib.parallel.double_tree import double_tree_all_reduce
from course_lib.parallel.node_collectives import (
    all_to_all,
    hierarchical_all_reduce,
    hierarchical_all_reduce_bytes,
    hierarchical_all_to_all,
)
from course_lib.parallel.node_trees import tree_broadcast, tree_reduce

PATIENT = CLASSROOM.with_(launch_overhead=0.0)  # the formulas leave the host out


def direct(tensors: list) -> None:
    all_to_all([tensor.tensor_split(len(tensors)) for tensor in tensors])


def by_levels(tensors: list) -> None:
    hierarchical_all_to_all([tensor.tensor_split(len(tensors)) for tensor in tensors])


COLLECTIVES = [all_reduce, broadcast, tree_all_reduce, ring_all_reduce, reduce_scatter, all_gather,
               hierarchical_all_reduce, double_tree_all_reduce, direct, by_levels,
               tree_broadcast, tree_reduce]  # fmt: skip


def on_paper(collective: Callable, spec: Spec, nodes: int, size: int, numel: int) -> PaperMachine:
    machine = PaperMachine(nodes * size, spec, nodes)
    collective(machine.tensors(numel))
    return machine


def assert_equal_to_virtual_gpus(
    collective: Callable, spec: Spec, nodes: int, size: int, numel: int
) -> None:
    """Seconds to the last bit, and bytes and copies over each kind of link."""
    paper = on_paper(collective, spec, nodes, size, numel)
    with fresh_devices(nodes * size, spec, "meta", nodes) as gpus:
        tensors = [torch.empty(numel, device=gpu) for gpu in gpus]
        with course_lib.trace() as t:
            collective(tensors)
    assert paper.seconds == t.seconds
    copies = [t.link_of(span) for span in t.spans if span.route]
    for link in ("within a node", "network"):
        assert paper.bytes_by_link[link] == t.bytes_by_link[link]
        assert paper.copies_by_link[link] == copies.count(link)


@pytest.mark.parametrize("spec", [PATIENT, CLASSROOM, PATIENT.with_(network=ETHERNET / 1000)],
                         ids=["patient", "with launches", "one card a node"])  # fmt: skip
@pytest.mark.parametrize("nodes, size", [(1, 8), (2, 4), (8, 1), (3, 2)])
@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda f: f.__name__)
def test_a_collective_takes_the_same_seconds_and_bytes_as_on_virtual_gpus(
    collective: Callable, nodes: int, size: int, spec: Spec
):
    assert_equal_to_virtual_gpus(collective, spec, nodes, size, 1001)


@pytest.mark.parametrize("collective", [hierarchical_all_reduce, double_tree_all_reduce],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_also_on_64_gpus(collective: Callable):
    assert_equal_to_virtual_gpus(collective, PATIENT, 8, 8, 4096)


@settings(max_examples=20, deadline=None)
@given(
    collective=st.sampled_from(COLLECTIVES),
    nodes=st.integers(1, 5),
    size=st.integers(1, 5),
    numel=st.integers(1, 300),
    sharing=st.integers(1, 5),
    launch=st.sampled_from([0.0, 1e-6, 1e-4]),
)
def test_on_any_machine(
    collective: Callable, nodes: int, size: int, numel: int, sharing: int, launch: float
):
    network = Network("any", 25e6, "", cards=max(1, size // sharing))
    spec = CLASSROOM.with_(network=network, launch_overhead=launch)
    assert_equal_to_virtual_gpus(collective, spec, nodes, size, numel)


def test_one_after_the_other_as_on_virtual_gpus():
    def both(tensors: list) -> None:
        tree_all_reduce(tensors)  # on the main streams, whose times are known at once
        hierarchical_all_reduce(tensors)

    assert_equal_to_virtual_gpus(both, PATIENT.with_(network=ETHERNET / 1000), 2, 4, 1000)


def test_a_stream_is_given_again_when_a_gpu_has_many():
    def many(tensors: list) -> None:
        for _ in range(20):
            ring_all_reduce(tensors)

    assert_equal_to_virtual_gpus(many, PATIENT, 1, 2, 100)


def test_1024_gpus_in_128_nodes_sum_by_levels_as_the_formulas_say():
    machine = on_paper(hierarchical_all_reduce, PATIENT, 128, 8, 2**20)
    assert machine.seconds == pytest.approx(hierarchical_seconds(PATIENT, 128, 8, 2**22), rel=1e-6)
    assert machine.bytes_by_link == hierarchical_all_reduce_bytes(128, 8, 2**22)


def test_who_asks_for_1024_devices_is_told_the_way():
    with pytest.raises(ValueError, match=r"to 128: 1024; .* PaperMachine\(1024, nodes=128\)"):
        course_lib.devices(1024, nodes=128, backing="meta")


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_number_of_gpus_that_is_none_is_refused_in_one_line(count: object):
    with pytest.raises(ValueError, match="a whole number of GPUs from 1 on, not"):
        PaperMachine(count)


def test_gpus_that_do_not_divide_are_refused_in_one_line():
    with pytest.raises(ValueError, match="1000 GPUs do not divide among 128 nodes"):
        PaperMachine(1000, nodes=128)


def test_what_is_not_on_paper_says_so_in_one_line():
    first, second = PaperMachine(2).tensors(4)
    with pytest.raises(AttributeError, match=r"'mul_' is nothing that a PaperTensor has: .* add_"):
        first.mul_(2)
    with pytest.raises(NotImplementedError, match=r"torch.stack is not on paper"):
        torch.stack([first])
    with pytest.raises(RuntimeError, match="add_ needs both on one device: paper:0, paper:1"):
        first.add_(second)
    with pytest.raises(RuntimeError, match=r"of 4 numbers has no shape \(3,\)"):
        first.view(3)
    with pytest.raises(AttributeError, match="'synchronize' is nothing that a PaperStream has"):
        course_lib.side_stream(first.device).synchronize()
