"""What stages hand on, what they do not compute, and what a microbatch counts."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import course_lib
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.schedule_rules import Schedule, Step, check
from course_lib.parallel.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from course_lib.parallel.stage_values import each, tensors_in

Devices = list[torch.device]

on_two = pytest.mark.parametrize(
    "schedule", [gpipe(2, 3), one_f_one_b(2, 3), zero_bubble(2, 3)], ids=lambda s: s.name
)
recomputing = pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])


def require_gradients_of_one_gpu(
    model: nn.Sequential,
    gpus: Devices,
    cuts: list[int],
    schedule: Schedule,
    batch: tuple[Tensor, Tensor],
    loss_function=F.cross_entropy,
    recompute: bool = False,
) -> Pipeline:
    model = model.double()
    pipeline = Pipeline(copy.deepcopy(model), gpus[: len(cuts) + 1], cuts)
    loss = loss_function(model(batch[0]), batch[1])
    loss.backward()
    with course_lib.trace(strict=True):
        parts = pipeline.forward_backward(schedule, *batch, loss_function, recompute)
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(pipeline.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-12, atol=1e-14)
    return pipeline


def digits(rows: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 4).double(), torch.randint(4, (rows,))


# Several tensors.


class Pair(NamedTuple):
    hidden: Tensor
    skip: Tensor


class Fork(nn.Module):
    """Hands on a tuple of all kinds; the mask is of whole numbers and gets no gradient."""

    def forward(self, x: Tensor) -> tuple:
        return x, (x.relu(), None), (x > 0).long(), 3, Pair(x, x.tanh())


class Join(nn.Module):
    def forward(self, handed_on: tuple) -> Tensor:
        x, (relu, nothing), mask, number, pair = handed_on
        assert nothing is None
        return x + number * relu * mask + pair.skip


@on_two
@recomputing
def test_a_stage_hands_on_tuples(gpus: Devices, schedule: Schedule, recompute: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Fork(), Join(), nn.Linear(4, 4))
    options = {"recompute": recompute}
    require_gradients_of_one_gpu(model, gpus, [2], schedule, digits(), **options)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


def test_what_cannot_be_handed_on_is_refused_in_one_line(gpus: Devices) -> None:
    pipeline = Pipeline(nn.Sequential(nn.Linear(4, 4), Named(), nn.Linear(4, 4)), gpus[:2], [2])
    x, y = digits()
    with pytest.raises(TypeError, match="a stage hands on a dict: what goes from stage to stage"):
        pipeline.forward_backward(gpipe(2, 2), x.float(), y, F.cross_entropy)


def test_tensors_are_found_from_left_to_right() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert tensors_in((a, [None, b], 2)) == [a, b]
    assert each((1, [b]), Tensor, Tensor.item) == (1, [1.0])


# Stages that do not use their input, or have nothing to learn.


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand_as(x) * 1.0


@recomputing
@pytest.mark.parametrize("make", [one_f_one_b, zero_bubble])
def test_a_stage_may_ignore_its_input(gpus: Devices, make, recompute: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Constant(), nn.Linear(4, 4))
    options = {"recompute": recompute}
    pipeline = require_gradients_of_one_gpu(model, gpus, [1, 2], make(3, 3), digits(), **options)
    assert pipeline.stages[0][0].weight.grad is None


@recomputing
@on_two
def test_below_the_lowest_layer_that_learns_nothing_is_computed_backward(
    gpus: Devices, schedule: Schedule, recompute: bool
) -> None:
    torch.manual_seed(0)
    model = MLP(4, 4, 4, 4)
    model[0].requires_grad_(False)
    options = {"recompute": recompute}
    require_gradients_of_one_gpu(model, gpus, [2], schedule, digits(), **options)
    pipeline = Pipeline(model.float(), gpus[:2], [2])
    x, y = digits()
    with course_lib.trace() as recording:
        pipeline.forward_backward(schedule, x.float(), y, F.cross_entropy, recompute)
    back = [route for route in recording.bytes_moved if route == (str(gpus[1]), str(gpus[0]))]
    assert back == []


def test_a_first_stage_takes_whole_numbers(gpus: Devices) -> None:
    torch.manual_seed(0)
    gpt = GPT(11, context=6, width=8, heads=2, depth=2, tied=False)
    tokens = torch.randint(11, (4, 6))
    batch = tokens, tokens.roll(1)
    require_gradients_of_one_gpu(gpt, gpus, [1], one_f_one_b(2, 4), batch, next_token_loss)


# What counts.


@on_two
@pytest.mark.parametrize("first_row", [0, 3])
def test_microbatches_count_by_their_targets_that_are_not_ignored(
    gpus: Devices, schedule: Schedule, first_row: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.randint(4, (7,))
    y[first_row : first_row + 3] = -100  # with three microbatches, one is all padding
    require_gradients_of_one_gpu(MLP(4, 4, 4), gpus, [1], schedule, (x, y))


def test_targets_that_are_cut_and_counted_make_no_one_wait(gpus: Devices) -> None:
    torch.manual_seed(0)
    x, y = digits()
    y[:3] = -100
    found = []
    for targets in (y, microbatches_of(y, 3, str(gpus[1]))):
        pipeline = Pipeline(copy.deepcopy(MLP(4, 4, 4)), gpus[:2], [1])
        torch.manual_seed(1)
        for parameter in pipeline.parameters():
            nn.init.normal_(parameter)
        x_there = x.float().to(gpus[0])
        course_lib.synchronize()
        with course_lib.trace() as recording:
            pipeline.forward_backward(gpipe(2, 3), x_there, targets, F.cross_entropy)
        from_host = sum(n for route, n in recording.bytes_moved.items() if "host" in route)
        found.append((from_host, [p.grad.cpu() for p in pipeline.parameters()]))
    assert found[0][0] > 0 == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_microbatches_of_another_number_are_refused(gpus: Devices) -> None:
    pipeline = Pipeline(MLP(4, 4, 4), gpus[:2], [1])
    x, y = digits()
    counted = microbatches_of(y, 3, gpus[1])
    with pytest.raises(ValueError, match="3 microbatches of targets, and the schedule 2"):
        pipeline.forward_backward(gpipe(2, 2), x.float(), counted, F.cross_entropy)


# Statistics, and other buffers that change.


def batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def instance_norm(keeps: bool = True) -> nn.Sequential:
    norm = nn.InstanceNorm1d(2, track_running_stats=keeps)
    rows = nn.Unflatten(1, (2, 2))
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(rows, norm, nn.Flatten()), nn.Linear(4, 4))


@pytest.mark.parametrize(("microbatches", "recompute"), [(2, False), (1, True)])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (batch_norm, r"^stages\.0\.1 is of type BatchNorm1d, .*use LayerNorm"),
        (instance_norm, r"^stages\.0\.1\.1 is of type InstanceNorm1d, .*use LayerNorm"),
    ],
)
def test_statistics_are_refused_where_they_would_be_other_than_the_batchs_once(
    gpus: Devices, model, said: str, microbatches: int, recompute: bool
) -> None:
    pipeline = Pipeline(model(), gpus[:2], [2])
    x, y = digits()
    with pytest.raises(ValueError, match=said) as error:
        schedule = gpipe(2, microbatches)
        pipeline.forward_backward(schedule, x.float(), y, F.cross_entropy, recompute)
    assert "\n" not in str(error.value)
    assert all(parameter.grad is None for parameter in pipeline.parameters())


@pytest.mark.parametrize("model", [batch_norm, instance_norm])
def test_statistics_are_right_with_one_microbatch_or_if_they_are_fixed(
    gpus: Devices, model
) -> None:
    torch.manual_seed(0)
    require_gradients_of_one_gpu(model(), gpus, [2], gpipe(2, 1), digits())
    fixed = model()
    fixed[1].eval()
    require_gradients_of_one_gpu(fixed, gpus, [2], gpipe(2, 3), digits(), recompute=True)


@recomputing
def test_an_instance_norm_without_statistics_looks_at_one_example(
    gpus: Devices, recompute: bool
) -> None:
    torch.manual_seed(0)
    model = instance_norm(keeps=False)
    require_gradients_of_one_gpu(model, gpus, [2], gpipe(2, 3), digits(), recompute=recompute)


class RunningMean(nn.Module):
    """With a statistic of its own, changed in place or made anew."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        now = x.mean(0).detach()
        self.mean = self.mean.lerp_(now, 0.1) if self.in_place else self.mean.lerp(now, 0.1)
        return x - self.mean


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_that_recomputation_would_change_twice_are_refused(
    gpus: Devices, in_place: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), RunningMean(in_place), nn.Linear(4, 4))
    require_gradients_of_one_gpu(copy.deepcopy(model), gpus, [2], gpipe(2, 1), digits())
    pipeline = Pipeline(model, gpus[:2], [2])
    x, y = digits()
    with pytest.raises(ValueError, match=r"changes its buffers \['1.mean'\] in forward") as error:
        pipeline.forward_backward(gpipe(2, 1), x.float(), y, F.cross_entropy, recompute=True)
    assert "\n" not in str(error.value)


class Remembering(nn.Module):
    """A buffer made at first use, such as a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0, dtype=x.dtype, device=x.device)
        return x * self.table


def test_a_buffer_that_is_made_once_may_be_recomputed_with(gpus: Devices) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Remembering(), nn.Linear(4, 4))
    require_gradients_of_one_gpu(model, gpus, [2], gpipe(2, 3), digits(), recompute=True)


# Devices by name, and schedules that name others.


def test_devices_may_be_named(gpus: Devices) -> None:
    named = [str(gpu) for gpu in gpus[:2]]
    torch.manual_seed(0)
    pipeline = require_gradients_of_one_gpu(
        MLP(4, 4, 4), named, [1], interleaved(2, 2, 1), digits()
    )
    assert pipeline.devices == gpus[:2]


def test_a_stage_on_a_device_without_steps_is_refused() -> None:
    steps = [[Step("F", 0, 0), Step("B", 0, 0)]]
    with pytest.raises(ValueError, match="stage 1 is on device 5, and there are steps for devices"):
        check(Schedule("mine", 1, [0, 5], steps))
