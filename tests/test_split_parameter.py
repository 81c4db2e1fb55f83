"""One parameter on several devices is cut, kept, joined and completed as it should be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import course_lib
from course_lib import devices
from course_lib.parallel.split_parameter import (
    Shards,
    all_reduce_partial_gradients,
    largest_copy_difference,
    unsplit,
)


@pytest.fixture(autouse=True)
def _virtual(vgpus: list[torch.device]) -> None:
    torch.manual_seed(0)


class Split(nn.Module):
    """A module with one parameter, on several devices."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__()
        self.weight = Shards(*arguments, **keywords)


def whole(*shape: int) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(*shape))
    return module


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("dimension", "groups"), [(0, 1), (1, 1), (0, 3), (1, 2), (None, 1)],
    ids=["rows", "columns", "rows of three groups", "columns of two groups", "copies"],
)  # fmt: skip
def test_what_is_cut_joins_to_the_whole(count: int, dimension: int | None, groups: int) -> None:
    weight = torch.randn(12, 10)
    shards = Shards(weight, devices(count), dimension, groups)
    assert torch.equal(shards.join(shards), weight)
    doubled = [2 * part for part in shards]
    assert torch.equal(shards.join(doubled), 2 * weight)


def test_each_group_is_cut_for_all_devices() -> None:
    first, second = Shards(torch.arange(12.0), devices(2), 0, groups=3)
    assert first.tolist() == [0, 1, 4, 5, 8, 9]
    assert second.tolist() == [2, 3, 6, 7, 10, 11]


def test_each_device_holds_its_part_and_no_more() -> None:
    gpus = devices(3)
    shards = Shards(torch.randn(7, 4, device=gpus[0]), gpus, 0)
    assert [part.device for part in shards] == gpus
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == [3 * 16, 2 * 16, 2 * 16]


def test_the_whole_stays_as_it_is() -> None:
    gpus = devices(2)
    weight = torch.ones(4, device=gpus[0])
    with torch.no_grad():
        for part in [*Shards(weight, gpus, 0), *Shards(weight, gpus)]:
            part.zero_()
    assert weight.tolist() == [1, 1, 1, 1]


def test_partial_gradients_are_summed_and_no_others() -> None:
    gpus = devices(2)
    partial = Split(torch.zeros(3), gpus, partial_gradients=True)
    complete = Split(torch.zeros(3), gpus)
    both = nn.Sequential(partial, complete)
    for module in both:
        for part, gradient in zip(module.weight, (1.0, 2.0), strict=True):
            part.grad = torch.full_like(part, gradient)
    all_reduce_partial_gradients(both)
    assert [part.grad.tolist() for part in partial.weight] == [[3.0] * 3] * 2
    assert [part.grad.tolist() for part in complete.weight] == [[1.0] * 3, [2.0] * 3]


def test_partial_gradients_that_were_summed_are_not_summed_again() -> None:
    split = Split(torch.zeros(3), devices(2), partial_gradients=True)
    for part in split.weight:
        part.grad = torch.ones_like(part)
    for _ in range(2):
        all_reduce_partial_gradients(split)
        assert [part.grad.tolist() for part in split.weight] == [[2.0] * 3] * 2
    split.weight[1].grad.add_(1)  # as another backward pass does
    with pytest.raises(RuntimeError, match="would count more than once"):
        all_reduce_partial_gradients(split)


def test_unsplit_has_the_parameters_and_the_gradients_of_the_parts() -> None:
    single = whole(5, 2)
    split = Split(single.weight, devices(2), 0)
    with torch.no_grad():
        for rank, part in enumerate(split.weight):
            part.add_(1)
            part.grad = torch.full_like(part, rank)
    joined = unsplit(split, single)
    assert torch.equal(joined.weight, single.weight + 1)
    assert joined.weight.grad[:, 0].tolist() == [0, 0, 0, 1, 1]


def test_copies_that_differ_are_found() -> None:
    copies, cut = (Split(torch.ones(4), devices(2), dimension) for dimension in (None, 0))
    with torch.no_grad():
        for split in (copies, cut):
            split.weight[1] -= 0.5
    assert largest_copy_difference(copies) == 0.5
    assert largest_copy_difference(cut) == 0, "parts are no copies"


def test_more_devices_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut 2 rows into 3 parts"):
        Shards(torch.zeros(6, 4), devices(3), 0, groups=3)


def test_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        Shards(torch.zeros(4), [])


@pytest.mark.parametrize("trained", [True, False])
def test_a_part_learns_if_the_whole_does(trained: bool) -> None:
    weight = nn.Parameter(torch.zeros(4), requires_grad=trained)
    for shards in (Shards(weight, devices(2), 0), Shards(weight, devices(2))):
        assert [part.requires_grad for part in shards] == [trained, trained]


def test_the_parts_of_another_model_are_refused() -> None:
    split = Split(torch.zeros(4, 2), devices(2), 0)
    with pytest.raises(ValueError, match=r"of shape \(4, 2\) stand where .* shape \(4, 3\)"):
        unsplit(split, whole(4, 3))
    with pytest.raises(ValueError, match="has 1 parameters and the other 2"):
        unsplit(split, nn.Linear(2, 2))


def test_devices_may_be_named() -> None:
    gpus = devices(2)
    assert [part.device for part in Shards(torch.zeros(4), [str(gpu) for gpu in gpus])] == gpus
