"""Model parallelism by layers is the same training as on one GPU."""

import copy
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import CLASSROOM, devices, trace
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel.layer_parallel import LayerParallel, balanced_cuts
from course_lib.parallel.proof import largest_difference


@pytest.mark.parametrize(("count", "cuts"), [(1, []), (2, [3]), (3, [2, 4]), (4, [1, 3, 6])])
def test_parameters_are_those_of_plain_training_to_the_last_bit(count, cuts) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    model = MLP(64, 32, 32, 32, 10)
    placed = LayerParallel(copy.deepcopy(model), gpus, cuts)
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    for candidate, target in ((model, y), (placed, y.to(gpus[-1]))):
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(candidate(x), target).backward()
            optimizer.step()
    for ours, theirs in zip(placed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_a_gpt_over_four_gpus_equals_the_gpt_on_one() -> None:
    gpus = devices(4)
    torch.manual_seed(0)
    gpt = GPT(20, context=8, width=16, heads=2, depth=2, tied=False)
    placed = LayerParallel(copy.deepcopy(gpt), gpus, [1, 2, 3])
    tokens, targets = torch.randint(20, (3, 8)), torch.randint(20, (3, 8))
    next_token_loss(gpt(tokens), targets).backward()
    next_token_loss(placed(tokens), targets.to(gpus[-1])).backward()
    for ours, theirs in zip(placed.parameters(), gpt.parameters(), strict=True):
        assert torch.equal(ours.grad.cpu(), theirs.grad)


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple:
        return x.tanh(), (x, None), 2


class Join(nn.Module):
    def forward(self, handed_on: tuple) -> Tensor:
        tanh, (x, nothing), number = handed_on
        assert nothing is None
        return x + number * tanh


def test_a_stage_hands_on_tuples() -> None:
    gpus = devices(3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Fork(), nn.Identity(), Join(), nn.Linear(4, 4))
    placed = LayerParallel(copy.deepcopy(model), gpus, [2, 3])
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    placed(x).square().sum().backward()
    for ours, theirs in zip(placed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad.cpu(), theirs.grad)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


def test_what_cannot_be_handed_on_is_refused_in_one_line() -> None:
    placed = LayerParallel(nn.Sequential(Named(), nn.Identity()), devices(2), [1])
    with pytest.raises(TypeError, match="a stage hands on a dict: what goes from stage to stage"):
        placed(torch.ones(2, 4))


@pytest.mark.parametrize("count", [2, 4])
def test_each_boundary_is_crossed_once_each_way(count: int) -> None:
    gpus = devices(count)
    model = LayerParallel(MLP(*[32] * 5), gpus, [7 * i // count for i in range(1, count)])
    x = torch.randn(6, 32, device=gpus[0])
    with trace() as t:
        model(x).sum().backward()
    # The activation forward, its gradient back: 6 examples of 32 numbers of 4 bytes.
    assert t.bytes_between_devices == 2 * (count - 1) * 6 * 32 * 4
    neighbours = {(str(a), str(b)) for a, b in pairwise(gpus)}
    assert set(t.bytes_moved) == neighbours | {(b, a) for a, b in neighbours}


def test_one_gpu_works_at_a_time() -> None:
    gpus = devices(4, CLASSROOM.with_(link_bandwidth=1e15, latency=0))
    model = LayerParallel(MLP(*[256] * 9), gpus, [4, 8, 12])
    x = torch.randn(64, 256, device=gpus[0], requires_grad=True)
    with trace() as t:
        model(x).sum().backward()
    for index in range(4):
        assert t.idle_fraction(index) == pytest.approx(3 / 4, abs=0.01)


@pytest.mark.parametrize("cuts", [[], [0], [7], [3, 2], [2, 4]])
def test_cuts_that_leave_a_stage_empty_or_missing_are_refused(cuts) -> None:
    with pytest.raises(ValueError, match="2 devices need 1 cuts"):
        LayerParallel(MLP(4, 4, 4, 4, 4), devices(2), cuts)


def test_stages_that_share_a_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share a parameter.*tied=False"):
        LayerParallel(GPT(20, tied=True), devices(2), [2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_balanced_cuts_are_the_best_of_all_cuts(costs: list[int], data) -> None:
    count = data.draw(st.integers(1, len(costs)))

    def costliest(cuts) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))

    every_way = combinations(range(1, len(costs)), count - 1)
    assert costliest(balanced_cuts(costs, count)) == min(map(costliest, every_way))


def test_a_model_on_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one device"):
        LayerParallel(MLP(4, 2), [], [])


@pytest.mark.parametrize("cost", [float("nan"), -1, float("inf"), -0.5])
def test_a_cost_that_is_negative_or_not_finite_is_refused(cost: float) -> None:
    with pytest.raises(ValueError) as caught:
        balanced_cuts([3, 1, cost, 2], 2)
    assert str(caught.value) == f"a layer costs a finite number, 0 or above: costs[2] is {cost}"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut 2 layers into 3"):
        balanced_cuts([1, 1], 3)


def test_the_models_named_parameters_can_still_be_compared() -> None:
    one, other = (LayerParallel(MLP(4, 4, 4), devices(2), [2]) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert largest_difference(one, other) == 0
