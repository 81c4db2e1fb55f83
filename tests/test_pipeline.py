"""Pipeline parallelism: any schedule is the same training, and takes the time its formula says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from torch import Tensor, nn
from torch.nn import functional as F

import course_lib
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.schedule_chart import bubble, draw, step_times
from course_lib.parallel.schedule_rules import Schedule, Step, check, held, in_order
from course_lib.parallel.schedules import gpipe, interleaved, naive, one_f_one_b, zero_bubble
from course_lib.parallel.weight_gradients import add_weight_gradients, put_off_weight_gradients
from round_numbers import SPEC

Devices = list[torch.device]

ONE_STAGE_A_DEVICE = [naive, gpipe, one_f_one_b, zero_bubble]
FREE_COMMUNICATION = SPEC.with_(
    latency=0, link_bandwidth=1e30, launch_overhead=0, memory_bandwidth=1e30
)

few_settings = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def schedules(draw, most_devices: int = 6, most_microbatches: int = 12) -> Schedule:
    devices = draw(st.integers(1, most_devices))
    microbatches = draw(st.integers(1, most_microbatches))
    build = draw(st.sampled_from([*ONE_STAGE_A_DEVICE, interleaved]))
    if build is interleaved:
        groups = 1 + microbatches // devices
        return interleaved(devices, groups * devices, draw(st.integers(1, 4)))
    return build(devices, microbatches)


def every_schedule(*shapes: tuple[int, int]) -> list:
    """All five for each of (devices, microbatches); two stages a device where they interleave."""
    found = [build(p, m) for p, m in shapes for build in ONE_STAGE_A_DEVICE]
    found += [interleaved(p, m, 2) for p, m in shapes if m % p == 0]
    return [
        pytest.param(schedule, id=f"{schedule.name} {len(schedule.steps)} {schedule.microbatches}")
        for schedule in found
    ]


def pipeline_of(model: nn.Sequential, schedule: Schedule, gpus: Devices) -> Pipeline:
    """A copy of ``model``, cut into stages of about equally many layers."""
    devices = [gpus[device] for device in schedule.placement]
    return Pipeline(copy.deepcopy(model), devices, equal_cuts(model, len(devices)))


def equal_cuts(model: nn.Sequential, count: int) -> list[int]:
    return [len(model) * stage // count for stage in range(1, count)]


class Shift(nn.Module):
    """Adds a parameter: in front of a layer, it makes the layer compute its input's gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def equal_stages(count: int, width: int = 32) -> nn.Sequential:
    """One matrix product a stage: 1 in the forward, 2 in the backward, equally long."""
    return nn.Sequential(
        *(nn.Sequential(Shift(width), nn.Linear(width, width)) for _ in range(count))
    )


def run(schedule: Schedule, spec: course_lib.Spec, rows: int = 4, width: int = 32, **options):
    """A recording of one step over equal stages, ``rows`` examples a microbatch."""
    gpus = course_lib.devices(len(schedule.steps), spec)
    pipeline = pipeline_of(equal_stages(len(schedule.placement), width), schedule, gpus)
    x = torch.ones(rows * schedule.microbatches, width)
    x, y = x.to(gpus[0]), x.to(gpus[-1])
    with course_lib.trace(strict=True) as recording:
        pipeline.forward_backward(schedule, x, y, F.mse_loss, **options)
    return recording


def measured_bubble(recording: course_lib.Trace) -> float:
    count = recording.device_count
    return sum(recording.idle_fraction(index) for index in range(count)) / count


# The same training.


@pytest.mark.parametrize("schedule", every_schedule((1, 3), (2, 1), (4, 2), (4, 7), (4, 8)))
def test_gradients_and_loss_are_those_of_one_gpu_for_any_number_of_microbatches(
    gpus: Devices, schedule: Schedule
):
    assert_equals_one_gpu(schedule, gpus)


@pytest.mark.parametrize("schedule", every_schedule((2, 4), (4, 3)))
def test_gradients_and_loss_are_those_of_one_gpu_with_recomputation_too(
    gpus: Devices, schedule: Schedule
):
    assert_equals_one_gpu(schedule, gpus, recompute=True)


def assert_equals_one_gpu(schedule: Schedule, gpus: Devices, **options) -> None:
    model = MLP(12, 9, 8, 7, 9, 6, 7, 8, 5).double()
    x, y = torch.randn(13, 12).double(), torch.randint(5, (13,))  # 13 are never evenly split
    pipeline = pipeline_of(model, schedule, gpus)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with course_lib.trace(strict=True):
        losses = pipeline.forward_backward(schedule, x, y, F.cross_entropy, **options)
    assert len(losses) == schedule.microbatches
    assert sum(part.item() for part in losses) == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(pipeline.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", every_schedule((3, 4), (2, 4)))
def test_a_gpt_trained_by_any_schedule_is_the_gpt_trained_on_one_gpu(
    gpus: Devices, schedule: Schedule
):
    model = GPT(20, context=6, width=8, heads=2, depth=2, tied=False).double()
    pipeline = pipeline_of(model, schedule, gpus)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, pipeline)]
    for _ in range(2):
        tokens, targets = torch.randint(20, (6, 6)), torch.randint(20, (6, 6))
        for optimizer in optimizers:
            optimizer.zero_grad()
        next_token_loss(model(tokens), targets).backward()
        pipeline.forward_backward(schedule, tokens, targets, next_token_loss)
        for optimizer in optimizers:
            optimizer.step()
    count = len(pipeline.stages)
    on_cpu = Pipeline(model, ["cpu"] * count, equal_cuts(model, count))  # to have the same names
    assert largest_difference(pipeline, on_cpu) < 1e-12


def test_gradients_add_up_over_steps(gpus: Devices):
    schedule = zero_bubble(2, 2)
    pipeline = pipeline_of(MLP(4, 4, 4), schedule, gpus)
    x = torch.randn(4, 4)
    pipeline.forward_backward(schedule, x, x, F.mse_loss)
    once = [parameter.grad.clone() for parameter in pipeline.parameters()]
    pipeline.forward_backward(schedule, x, x, F.mse_loss)
    for parameter, grad in zip(pipeline.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad.cpu(), 2 * grad.cpu())


def test_recomputation_drops_what_the_first_forward_dropped(gpus: Devices):
    model = GPT(20, context=6, width=8, heads=2, depth=2, dropout=0.5, tied=False)
    schedule = one_f_one_b(4, 4)
    tokens = torch.randint(20, (4, 6))
    found = []
    for recompute in (False, True):
        pipeline = pipeline_of(model, schedule, gpus)
        torch.manual_seed(1)
        pipeline.forward_backward(schedule, tokens, tokens, next_token_loss, recompute)
        dice_after = [torch.rand(1, device=gpu).item() for gpu in gpus]
        found.append(([parameter.grad.cpu() for parameter in pipeline.parameters()], dice_after))
    (plain, dice), (recomputed, dice_after) = found
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    assert dice == dice_after


def test_a_first_stage_with_nothing_to_learn_is_no_obstacle(gpus: Devices):
    for schedule in (gpipe(2, 2), zero_bubble(2, 2)):
        pipeline = Pipeline(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), gpus[:2], [1])
        x = torch.randn(2, 2, 2)
        pipeline.forward_backward(schedule, x, torch.tensor([0, 2]), F.cross_entropy)
        assert pipeline.stages[1][0].weight.grad.abs().sum() > 0


# Time.


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (naive(4), 3 / 4),
        (naive(4, 8), 3 / 4),
        (gpipe(4, 8), 3 / (8 + 3)),
        (one_f_one_b(4, 8), 3 / (8 + 3)),
        (one_f_one_b(4, 2), 3 / (2 + 3)),
        (interleaved(4, 8, 2), 3 / (2 * 8 + 3)),
        (interleaved(2, 4, 3), 1 / (3 * 4 + 1)),
        (zero_bubble(4, 8), 3 / (3 * 8 + 3)),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_the_bubble_on_devices_is_its_formula_when_communication_is_free(
    schedule: Schedule, formula: float
):
    assert measured_bubble(run(schedule, FREE_COMMUNICATION)) == pytest.approx(formula, rel=1e-2)


# A product of 4 x 32 by 32 x 32 takes 8.192 us; an activation has 512 bytes.
FORWARD = 2 * 4 * 32 * 32 / 1e9
SLOW_LINKS = FREE_COMMUNICATION.with_(link_bandwidth=512 / (0.25 * FORWARD))


@pytest.mark.parametrize("schedule", every_schedule((4, 8), (2, 4), (4, 3)))
def test_devices_take_the_time_that_was_worked_out_on_paper(schedule: Schedule):
    times = step_times(schedule, FORWARD, FORWARD, FORWARD, transfer=0.25 * FORWARD)
    on_paper = max(end for _, end in times.values())
    assert run(schedule, SLOW_LINKS).seconds == pytest.approx(on_paper, rel=1e-9)


@few_settings
@given(schedules(), st.floats(0, 0.5))
def test_communication_has_its_price(schedule: Schedule, c: float):
    def seconds(transfer: float) -> float:
        return max(end for _, end in step_times(schedule, transfer=transfer).values())

    p, m, stages = len(schedule.steps), schedule.microbatches, len(schedule.placement)
    assume(p > 1)
    if schedule.name == "1F1B":
        assume(m % p == 0)
    transfers = {
        "naive": 2 * m * (p - 1),
        "GPipe": 2 * (p - 1),
        "1F1B": 2 * (p - 1) * m / p + 2 * (p - 2),
        "zero bubble": min(4 * (p - 1), 2 * (p - 1) + 2 * max(0, m - 2)),
    }.get(schedule.name, 2 * (stages - 1))
    assert seconds(c) - seconds(0) == pytest.approx(transfers * c, abs=1e-9)


@few_settings
@given(schedules(), st.floats(1, 2))
def test_the_bubble_on_paper_is_its_formula_for_any_number_of_anything(
    schedule: Schedule, forward: float
):
    p, m = len(schedule.steps), schedule.microbatches
    v = len(schedule.placement) // p
    formula = (p - 1) / ((1 if schedule.name == "naive" else v * m) + p - 1)
    if schedule.splits_backward:  # the two halves of the backward take 1 each
        idle = (p - 1) * forward + max(0, p - m)
        formula = idle / (m * (forward + 2) + idle)
    assert bubble(schedule, forward=forward) == pytest.approx(formula, abs=1e-9)


@pytest.mark.parametrize(("b", "w"), [(1, 1), (1.5, 1), (0.8, 0.4)])
def test_a_split_backward_leaves_f_plus_b_minus_w_idle_for_each_other_device(b: float, w: float):
    p, m, f = 4, 8, 1
    schedule = zero_bubble(p, m)
    end = max(end for _, end in step_times(schedule, f, b, w).values())
    assert end - m * (f + b + w) == pytest.approx((p - 1) * (f + b - w))


def test_a_transfer_goes_on_while_both_ends_compute():
    recording = run(gpipe(2, 4), SLOW_LINKS)
    first_copy = next(span for span in recording.spans if span.route == (0, 1))
    beside = [s for s in recording.spans if s.device == 0 and s.flops and s.route is None]
    assert any(s.start < first_copy.end and first_copy.start < s.end for s in beside)


def test_a_split_backward_costs_no_operation_more():
    assert run(zero_bubble(4, 4), SPEC).flops == run(one_f_one_b(4, 4), SPEC).flops


def test_recomputation_costs_one_more_forward():
    plain = run(one_f_one_b(4, 4), FREE_COMMUNICATION)
    again = run(one_f_one_b(4, 4), FREE_COMMUNICATION, recompute=True)
    assert again.flops == pytest.approx(plain.flops * 4 / 3)
    assert again.seconds == pytest.approx(plain.seconds * 4 / 3)


# Memory.


@few_settings
@given(schedules())
def test_a_device_holds_as_many_activations_as_its_schedule_promises(schedule: Schedule):
    p, m = len(schedule.steps), schedule.microbatches
    v = len(schedule.placement) // p
    promised = {
        "naive": [1] * p,
        "GPipe": [m] * p,
        "1F1B": [min(m, p - device) for device in range(p)],
        "zero bubble": [min(m, p)] * p,
    }.get(schedule.name)
    if promised is None:
        assert max(held(schedule)) == held(schedule)[0] == min(m * v, (v + 1) * p - 1)
    else:
        assert held(schedule) == promised


def peaks(schedule: Schedule, **options) -> list[int]:
    """Peak memory of the four devices, above the parameters, gradients and data."""
    gpus = course_lib.devices(4, SPEC)
    model = nn.Sequential(*(MLP(*[64] * 5) for _ in range(4)))
    pipeline = pipeline_of(model, schedule, gpus)
    x = torch.ones(32 * schedule.microbatches, 64)
    x, y = x.to(gpus[0]), x.to(gpus[-1])
    for parameter in pipeline.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [course_lib.memory_in_use(gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        pipeline.forward_backward(schedule, x, y, F.mse_loss, **options)
    return [peak - base for peak, base in zip(recording.peak_memory, before, strict=True)]


WIDE = 32 * 64 * 4  # bytes of what goes from stage to stage, of one microbatch


def test_the_memory_of_gpipe_grows_with_the_microbatches_and_that_of_1f1b_does_not():
    grown = [many - few for few, many in zip(peaks(gpipe(4, 4)), peaks(gpipe(4, 8)), strict=True)]
    # A stage keeps its three hidden layers and its output, and where it was sent, its input.
    assert grown == [4 * 4 * WIDE] + [4 * 5 * WIDE] * 2 + [pytest.approx(4 * 5 * WIDE, abs=16)]
    few, many = peaks(one_f_one_b(4, 4)), peaks(one_f_one_b(4, 8))
    assert many == pytest.approx(few, abs=16)  # the losses are 4 bytes each
    assert few[1] - few[2] == 5 * WIDE  # one activation less from device to device


def test_recomputation_keeps_the_inputs_alone():
    few, many = peaks(gpipe(4, 4), recompute=True), peaks(gpipe(4, 8), recompute=True)
    grown = [after - before for before, after in zip(few, many, strict=True)]
    assert grown == [0, 4 * WIDE, 4 * WIDE, pytest.approx(4 * WIDE, abs=16)]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("schedule", every_schedule((4, 4)))
def test_after_a_step_the_gradients_are_all_that_is_new_in_memory(
    gpus: Devices, schedule: Schedule, recompute: bool
):
    pipeline = pipeline_of(equal_stages(8), schedule, gpus)
    x = torch.ones(8, 32, device=gpus[0])
    y = x.to(gpus[3])
    before = [course_lib.memory_in_use(gpu) for gpu in gpus]
    pipeline.forward_backward(schedule, x, y, F.mse_loss, recompute)
    pipeline.zero_grad()
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == before


# Legal and illegal.


@few_settings
@given(schedules())
def test_every_schedule_is_legal(schedule: Schedule):
    check(schedule, most_held=max(held(schedule)))
    done: set[Step] = set()
    for device, step in in_order(schedule):
        assert device == schedule.placement[step.stage]
        assert done.issuperset(schedule.needs(step))
        done.add(step)
    assert len(done) == len(schedule.kinds) * len(schedule.placement) * schedule.microbatches


@settings(max_examples=40, deadline=None, derandomize=True)
@given(schedules(most_devices=3, most_microbatches=3), st.data())
def test_a_schedule_that_somebody_broke_is_refused_or_still_right(schedule: Schedule, data):
    steps = [list(each) for each in schedule.steps]
    on = data.draw(st.sampled_from(steps))
    i, j = (data.draw(st.integers(0, len(on) - 1)) for _ in range(2))
    damage = data.draw(st.sampled_from(["drop", "double", "swap", "swap"]))
    if damage == "swap":
        on[i], on[j] = on[j], on[i]
    else:
        on[i : i + 1] = [] if damage == "drop" else [on[i]] * 2
    broken = replace(schedule, steps=steps)
    try:
        check(broken)
    except ValueError as error:
        assert i != j or damage != "swap"
        assert "\n" not in str(error)
        return
    assert damage == "swap"
    gpus = course_lib.devices(len(steps), SPEC)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in schedule.placement)).double()
    pipeline = pipeline_of(model, broken, gpus)
    x = torch.randn(schedule.microbatches, 3).double()
    F.mse_loss(model(x), x).backward()
    pipeline.forward_backward(broken, x, x, F.mse_loss)
    for ours, theirs in zip(pipeline.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-12, atol=1e-14)


F0, B0, W0 = (Step(kind, 0, 0) for kind in "FBW")
F1, B1 = Step("F", 1, 0), Step("B", 1, 0)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            [[F0], [F1, B1]],
            "B of stage 0 for microbatch 0 is missing, on device 0",
        ),
        (
            [[F0, B0, B0], [F1, B1]],
            "B of stage 0 for microbatch 0 is there 2 times, on device 0",
        ),
        (
            [[F0, B0, F1], [B1]],
            "device 0 has F of stage 1 for microbatch 0, and that stage is on device 1",
        ),
        (
            [[F0, B0, W0], [F1, B1]],
            "device 0 has W of stage 0 for microbatch 0, and there is no such step",
        ),
        (
            [[F0, B0, Step("F", 2, 0)], [F1, B1]],
            "device 0 has F of stage 2 for microbatch 0, and there is no such step",
        ),
        (
            [[F0, B0], [B1, F1]],
            "device 1 has B of stage 1 for microbatch 0 before F of stage 1 for microbatch 0, "
            "which it needs",
        ),
    ],
)
def test_the_validator_says_why_a_schedule_is_illegal(steps: list, reason: str):
    with pytest.raises(ValueError) as caught:
        check(Schedule("mine", 1, [0, 1], steps))
    assert str(caught.value) == reason


def test_the_validator_says_who_waits_for_whom_in_a_deadlock():
    steps = [
        [Step("F", 0, 0), Step("B", 0, 0), Step("F", 0, 1), Step("B", 0, 1)],
        [Step("F", 1, 0), Step("F", 1, 1), Step("B", 1, 0), Step("B", 1, 1)],
    ]
    with pytest.raises(ValueError) as caught:
        check(Schedule("mine", 2, [0, 1], steps))
    assert str(caught.value) == (
        "deadlock: "
        "on device 0 B of stage 0 for microbatch 0 waits for B of stage 1 for microbatch 0; "
        "on device 1 F of stage 1 for microbatch 1 waits for F of stage 0 for microbatch 1"
    )


def test_the_validator_says_who_holds_too_much():
    check(one_f_one_b(4, 8), most_held=4)
    with pytest.raises(ValueError, match=r"^device 0 holds 8 activations at once, more than 4$"):
        check(gpipe(4, 8), most_held=4)
    with pytest.raises(ValueError, match=r"^device 0 holds 4 activations at once, more than 3$"):
        check(zero_bubble(4, 8), most_held=3)


def test_a_schedule_of_ones_own_runs_like_any_other(gpus: Devices):
    """Stages placed in a V, as in ZB-V: the first device has the last stage too."""
    forward, backward = ([Step(kind, stage, 0) for stage in range(4)] for kind in "FB")
    on_first = [forward[0], forward[3], backward[3], backward[0]]
    schedule = Schedule("V", 1, [0, 1, 1, 0], [on_first, [*forward[1:3], *backward[2:0:-1]]])
    model = equal_stages(4).double()
    pipeline = pipeline_of(model, schedule, gpus)
    x = torch.randn(3, 32).double()
    F.mse_loss(model(x), 2 * x).backward()
    with course_lib.trace(strict=True):
        pipeline.forward_backward(schedule, x, 2 * x, F.mse_loss)
    for ours, theirs in zip(pipeline.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-12, atol=1e-14)


# The drawing.


@pytest.mark.parametrize("schedule", every_schedule((4, 8)))
def test_the_drawing_has_a_row_a_device_and_a_box_with_its_number_for_each_step(
    schedule: Schedule,
):
    ax = draw(schedule)
    boxes = [path.get_extents() for each in ax.collections for path in each.get_paths()]
    drawn = sorted((round((box.y0 + box.y1) / 2), box.x0, box.x1) for box in boxes)
    times = step_times(schedule)
    assert drawn == sorted((schedule.placement[s.stage], *times[s]) for s in times)
    numbers = sorted(int(text.get_text()) for text in ax.texts)
    assert numbers == sorted(step.microbatch for step in times)
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "GPU 3"
    assert f"{schedule.name}: bubble {bubble(schedule):.1%}" == ax.get_title(loc="left")
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    split = ["forward", "input gradient", "weight gradient"]
    assert words == (split if schedule.splits_backward else ["forward", "backward"])
    plt.close(ax.figure)


def test_a_drawing_numbers_all_boxes_of_a_kind_or_none():
    crowded = draw(one_f_one_b(8, 32))  # a backward is twice as long as a forward
    numbers = sorted(int(text.get_text()) for text in crowded.texts)
    assert numbers == sorted(list(range(32)) * 8), "each backward's, and no forward's"
    plt.close(crowded.figure)


def contrast(ink: str, ground: tuple[float, ...]) -> float:
    """Of two colours, as WCAG counts it: 1 for the same, 21 for black on white."""
    opacity = ground[3]
    on_white = [opacity * each + 1 - opacity for each in ground[:3]]
    bright, dark = sorted(map(luminance, (on_white, to_rgb(ink))), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("schedule", [zero_bubble(2, 3), interleaved(2, 4, 2)])
def test_numbers_in_the_drawing_stand_out_from_their_boxes(schedule: Schedule) -> None:
    ax = draw(schedule)
    assert len(ax.texts) == len(ax.collections) > 0
    for text, box in zip(ax.texts, ax.collections, strict=True):
        assert contrast(text.get_color(), box.get_facecolor()[0]) >= 4.5
    plt.close(ax.figure)


# Mistakes.


@pytest.mark.parametrize("build", ONE_STAGE_A_DEVICE)
@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_counts_that_are_none_are_refused(build, count):
    with pytest.raises(ValueError, match="whole number of device_count, 1 or above"):
        build(count, 4)
    with pytest.raises(ValueError, match="whole number of microbatches, 1 or above"):
        build(4, count)


def test_microbatches_that_do_not_interleave_are_refused():
    with pytest.raises(ValueError, match="6 is no multiple of 4 devices"):
        interleaved(4, 6, 2)
    with pytest.raises(ValueError, match="whole number of chunks"):
        interleaved(4, 8, 0)


def test_a_schedule_for_other_stages_is_refused(gpus: Devices):
    pipeline = Pipeline(MLP(*[4] * 5), gpus, [1, 2, 3])
    x = torch.ones(8, 4)
    for other in (gpipe(3, 4), interleaved(2, 4, 2), interleaved(4, 4, 2)):
        with pytest.raises(ValueError, match=r"stages on devices \[0, 1, .* this pipeline on"):
            pipeline.forward_backward(other, x, x, F.mse_loss)


def test_a_batch_that_does_not_fit_is_refused(gpus: Devices):
    pipeline = Pipeline(MLP(4, 4, 4), gpus[:2], [1])
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="3 examples cannot fill 4 microbatches"):
        pipeline.forward_backward(gpipe(2, 4), x, x, F.mse_loss)
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        pipeline.forward_backward(gpipe(2, 2), x, x[:2], F.mse_loss)


def test_an_illegal_schedule_is_not_run(gpus: Devices):
    pipeline = Pipeline(MLP(4, 4, 4), gpus[:2], [1])
    good = gpipe(2, 2)
    x = torch.ones(4, 4)
    with pytest.raises(ValueError, match="is missing"):
        bad = replace(good, steps=[good.steps[0], good.steps[1][:-1]])
        pipeline.forward_backward(bad, x, x, F.mse_loss)
    assert all(parameter.grad is None for parameter in pipeline.parameters())


def test_stages_that_share_a_parameter_are_refused(gpus: Devices):
    with pytest.raises(ValueError, match="share a parameter"):
        Pipeline(GPT(20, depth=2, tied=True), gpus, [1, 2, 3])


# The split backward pass.


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_put_off_are_the_gradients(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3, bias), nn.LayerNorm(3), nn.Linear(3, 4, bias)).double()
    plain = copy.deepcopy(layers)
    x = torch.randn(shape).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        pending: list = []
        with put_off_weight_gradients(pending):
            out = layers(x)
        out.pow(2).sum().backward()
        add_weight_gradients(pending)
        plain(y).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(layers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_backward_leaves_the_weights_of_linear_layers_and_nothing_else():
    layers = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    pending: list = []
    with put_off_weight_gradients(pending):
        out = layers(torch.randn(5, 4))
    out.sum().backward()
    without = [name for name, parameter in layers.named_parameters() if parameter.grad is None]
    assert without == ["0.weight"]
    assert [weight is layers[0].weight for weight, _, _ in pending] == [True]


def test_a_weight_that_is_frozen_or_computed_is_not_put_off():
    frozen, computed = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    frozen.weight.requires_grad_(False)
    pending: list = []
    with put_off_weight_gradients(pending):
        out = computed(frozen(torch.randn(5, 4)))
    out.sum().backward()
    assert pending == []
    assert frozen.weight.grad is None
    assert computed.parametrizations.weight.original1.grad is not None


class Functional(nn.Module):
    """Linear layers called in the ways that people call them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, weight=self.weight, bias=self.bias)
        x = F.linear(input=x, weight=self.weight)
        return F.linear(x, self.weight, bias=None)


def test_a_linear_layer_with_arguments_by_name_is_put_off_too():
    torch.manual_seed(0)
    layer, x = Functional(), torch.randn(5, 4)
    plain = copy.deepcopy(layer)
    pending: list = []
    with put_off_weight_gradients(pending):
        out = layer(x)
    out.square().sum().backward()
    assert len(pending) == 3
    add_weight_gradients(pending)
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_the_weight_gradient_of_a_single_example_is_put_off_too():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(3)
    plain = copy.deepcopy(layer)
    pending: list = []
    with put_off_weight_gradients(pending):
        layer(x).square().sum().backward()
    add_weight_gradients(pending)
    plain(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_zero_bubble_under_autocast_is_plain_training_under_autocast(gpus: Devices, where: str):
    torch.manual_seed(0)
    model = MLP(8, 8, 8, 8)
    x, y = torch.randn(8, 8), torch.randint(8, (8,))
    found = []
    for schedule in (one_f_one_b(2, 2), zero_bubble(2, 2)):
        pipeline = Pipeline(copy.deepcopy(model), gpus[:2], [2])
        half = torch.autocast(gpus[0].type, torch.bfloat16)
        if where == "inside":
            for stage in pipeline.stages:
                stage.forward = half(stage.forward)
            pipeline.forward_backward(schedule, x, y, F.cross_entropy)
        else:
            with half:
                pipeline.forward_backward(schedule, x, y, F.cross_entropy)
        found.append([parameter.grad.cpu() for parameter in pipeline.parameters()])
    for plain, split in zip(*found, strict=True):
        assert plain.dtype == split.dtype == torch.float32
        torch.testing.assert_close(split, plain, rtol=0.02, atol=1e-4)  # bfloat16 rounds to 2^-8


def test_zero_bubble_tells_hooks_of_a_gradient_when_it_is_there(gpus: Devices):
    """As data parallelism needs it, whose hooks start an all-reduce."""
    pipeline = Pipeline(MLP(4, 4, 4), gpus[:2], [1])
    seen: list[tuple[nn.Parameter, Tensor]] = []
    for parameter in pipeline.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda told: seen.append((told, told.grad.detach().clone()))
        )
    x = torch.randn(4, 4)
    pipeline.forward_backward(zero_bubble(2, 2), x, x, F.mse_loss)
    for parameter in pipeline.parameters():
        told = [grad for one, grad in seen if one is parameter]
        assert len(told) == 2  # once a microbatch
        assert torch.equal(told[-1], parameter.grad)
    seen.clear()  # a hook that knows its own parameter would keep it alive


@pytest.mark.parametrize("microbatches", [1, 4])
def test_zero_bubble_in_data_parallel_sums_in_buckets_what_it_put_off(
    gpus: Devices, microbatches: int
):
    torch.manual_seed(0)
    model, x, y = MLP(8, 16, 16, 4).double(), torch.randn(6, 8).double(), torch.randint(4, (6,))
    replicas = [Pipeline(copy.deepcopy(model), pair, [2]) for pair in (gpus[:2], gpus[2:])]
    stages = zip(*(replica.stages for replica in replicas), strict=True)
    buckets = [GradientBuckets(copies, bucket_bytes=100) for copies in stages]
    with course_lib.trace(strict=True):
        with ExitStack() as several:  # microbatches, whose gradients add up before they are summed
            for each in buckets if microbatches > 1 else ():
                several.enter_context(each.accumulate())
            for replica, rows in zip(replicas, (slice(2), slice(2, 6)), strict=True):
                share = len(x[rows]) / len(x)
                replica.forward_backward(
                    zero_bubble(2, min(microbatches, len(x[rows]))),
                    x[rows],
                    y[rows],
                    lambda outputs, targets, share=share: share * F.cross_entropy(outputs, targets),
                )
        for each in buckets:
            each.finish()
    F.cross_entropy(model(x), y).backward()
    for replica in replicas:
        for ours, theirs in zip(replica.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_hook_that_changes_a_gradient_is_heard():
    layer = nn.Linear(4, 4)
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    plain, x, pending = copy.deepcopy(layer), torch.randn(5, 4), []
    with put_off_weight_gradients(pending):
        out = layer(x)
    out.sum().backward()
    add_weight_gradients(pending)
    plain.weight._backward_hooks = None
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * plain.weight.grad)
