"""Sending less: compressed sums lose nothing for ever, and local training meets where it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

import course_lib
from course_lib.models import MLP
from course_lib.parallel.compressed_sums import Bfloat16Sums, Int8Sums, SumRows, TopKSums
from course_lib.parallel.data_parallel import replicate, split_batch, train_step
from course_lib.parallel.local_training import LocalTraining, average, diloco
from course_lib.parallel.overlapped_training import OverlappedTraining
from course_lib.parallel.proof import largest_difference

LENGTH = 1001
KINDS = [Bfloat16Sums, Int8Sums, lambda: TopKSums(0.1)]
NAMES = ["bfloat16", "int8", "top-k"]


def random_rows(gpus: list[torch.device], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(LENGTH).to(gpu) for gpu in gpus]


def total(rows: list[Tensor]) -> Tensor:
    return torch.stack([row.cpu() for row in rows]).sum(0)


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_all_devices_have_the_same_bits(make):
    rows = random_rows(course_lib.devices(4), 0)
    with course_lib.trace(strict=True):
        make()(rows)
    assert all(torch.equal(row.cpu(), rows[0].cpu()) for row in rows)


@pytest.mark.parametrize("make, bound", [(Bfloat16Sums, 0.05), (Int8Sums, 0.1)])
def test_a_short_sum_is_near_the_sum(make, bound: float):
    rows = random_rows(course_lib.devices(4), 0)
    expected = total(rows)
    make()(rows)
    assert (rows[0].cpu() - expected).abs().max() < bound
    assert not torch.equal(rows[0].cpu(), expected)


def test_top_k_of_everything_is_the_sum():
    rows = random_rows(course_lib.devices(4), 0)
    expected = total(rows)
    TopKSums(1.0)(rows)
    torch.testing.assert_close(rows[0].cpu(), expected)


@pytest.mark.parametrize("make", [Int8Sums, lambda: TopKSums(0.1)], ids=["int8", "top-k"])
def test_over_many_steps_what_is_said_and_what_is_owed_add_up_to_all(make):
    gpus, compressed = course_lib.devices(3), make()
    said, wanted = torch.zeros(LENGTH), torch.zeros(LENGTH)
    for seed in range(20):
        rows = random_rows(gpus, seed)
        wanted += total(rows)
        compressed(rows)
        said += rows[0].cpu()
    owed = total(compressed.feedback.owed)
    if isinstance(compressed, Int8Sums):
        owed += torch.cat([each.cpu() for each in compressed.of_sums.owed])
    torch.testing.assert_close(said + owed, wanted, rtol=0, atol=1e-4)


def test_without_feedback_the_same_small_number_is_lost_in_every_step():
    gpus = course_lib.devices(2)
    with_feedback = TopKSums(0.5)
    said = torch.zeros(2)
    for _ in range(10):
        rows = [torch.tensor([1.0, 0.4], device=gpu) for gpu in gpus]
        with_feedback(rows)
        said += rows[0].cpu()
    assert said[1] > 0.5 * 10 * 0.8  # the small one had its turns
    forgetful = torch.zeros(2)
    for _ in range(10):
        rows = [torch.tensor([1.0, 0.4], device=gpu) for gpu in gpus]
        TopKSums(0.5)(rows)
        forgetful += rows[0].cpu()
    assert forgetful.tolist() == [20.0, 0.0]


@pytest.mark.parametrize("make, nbytes", [
    (Bfloat16Sums, 2 * 3 * 4000 * 2),  # a ring, of two bytes a number
    (Int8Sums, 2 * 3 * (4000 + 4 * 4)),  # there and back, a byte a number and 4 scales
    (lambda: TopKSums(0.01), 3 * 4 * 40 * 8),  # 40 values and 40 places of each, to the 3 others
], ids=NAMES)  # fmt: skip
def test_the_bytes_are_what_the_formula_says(make, nbytes: int):
    rows = [torch.randn(4000).to(gpu) for gpu in course_lib.devices(4)]
    with course_lib.trace() as t:
        make()(rows)
    assert t.bytes_between_devices == nbytes


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_rows_of_zeros_stay_zeros(make):
    rows = [torch.zeros(10, device=gpu) for gpu in course_lib.devices(2)]
    make()(rows)
    assert rows[0].cpu().count_nonzero() == 0


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_what_is_no_row_is_refused_in_one_line(make):
    with pytest.raises(ValueError, match=r"takes rows, .* have the shape \(2, 3\)"):
        make()([torch.zeros(2, 3, device=gpu) for gpu in course_lib.devices(2)])


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_rows_of_nothing_stay_so(make):
    rows = [torch.zeros(0, device=gpu) for gpu in course_lib.devices(2)]
    make()(rows)
    assert rows[0].shape == (0,)


def test_other_rows_than_before_are_refused_in_one_line():
    gpus = course_lib.devices(2)
    compressed: SumRows = Bfloat16Sums()
    compressed([torch.zeros(4, device=gpu) for gpu in gpus])
    with pytest.raises(ValueError, match="of other shapes or another number than before"):
        compressed([torch.zeros(5, device=gpu) for gpu in gpus])


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_fractions_that_cannot_be_are_refused_in_one_line(fraction: float):
    with pytest.raises(ValueError, match="fraction is above 0 and at most 1"):
        TopKSums(fraction)


# Local training.


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 8, generator=generator)
    return x, torch.randint(0, 4, (24,), generator=generator)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return MLP(8, 16, 4)


def sgd(parameters) -> SGD:
    return SGD(parameters, lr=0.1)


def adam(parameters) -> Adam:
    return Adam(parameters, lr=0.01)


def apart_from_data_parallelism(make_optimizer) -> float:
    """How far three steps with a meeting after each are from three of data parallelism."""
    gpus = course_lib.devices(4)
    local = LocalTraining(replicate(a_model(), gpus), make_optimizer, period=1)
    plain = replicate(a_model(), gpus)
    optimizers = [make_optimizer(replica.parameters()) for replica in plain]
    for seed in range(3):
        xs, ys = (split_batch(each, gpus) for each in batch(seed))
        local.step(xs, ys, F.cross_entropy)
        train_step(plain, optimizers, xs, ys, F.cross_entropy)
    return largest_difference(local.replicas[0], plain[0])


def test_to_meet_after_every_step_of_sgd_is_data_parallelism_and_of_adam_is_not():
    assert apart_from_data_parallelism(sgd) < 1e-6
    assert apart_from_data_parallelism(adam) > 1e-3


@pytest.mark.parametrize("make_outer", [None, diloco], ids=["average", "diloco"])
def test_replicas_part_between_meetings_and_are_bit_identical_after_each(make_outer):
    gpus = course_lib.devices(3)
    options = {} if make_outer is None else {"make_outer": make_outer}
    local = LocalTraining(replicate(a_model(), gpus), sgd, period=2, **options)
    for step in range(1, 7):
        xs, ys = (split_batch(each, gpus) for each in batch(step))
        with course_lib.trace() as t:
            local.step(xs, ys, F.cross_entropy)
        apart = max(largest_difference(local.replicas[0], each) for each in local.replicas[1:])
        assert (apart == 0.0) == (step % 2 == 0)
        assert (t.bytes_between_devices > 0) == (step % 2 == 0)


def test_diloco_takes_the_distance_for_a_gradient_with_nesterov_momentum():
    gpus = course_lib.devices(1)
    start = a_model()
    local = LocalTraining(replicate(start, gpus), sgd, period=1, make_outer=diloco)
    alone = replicate(start, gpus)[0]
    xs, ys = (split_batch(each, gpus) for each in batch(0))
    optimizer = sgd(alone.parameters())
    F.cross_entropy(alone(xs[0]), ys[0]).backward()
    optimizer.step()
    local.step(xs, ys, F.cross_entropy)
    for began, went, came in zip(
        start.parameters(), alone.parameters(), local.replicas[0].parameters(), strict=True
    ):
        distance = began - went.cpu()
        torch.testing.assert_close(came.cpu(), began - 0.7 * (1 + 0.9) * distance)


def test_bad_input_is_refused_in_one_line():
    gpus = course_lib.devices(2)
    with pytest.raises(ValueError, match="at least one replica"):
        LocalTraining([], sgd, period=1)
    with pytest.raises(ValueError, match="period=0"):
        LocalTraining(replicate(a_model(), gpus), sgd, period=0)
    local = LocalTraining(replicate(a_model(), gpus), sgd, period=1)
    with pytest.raises(ValueError, match="2 replicas need as many of each: there are 1 inputs, 2"):
        local.step([torch.ones(1)], [torch.ones(1)] * 2, F.cross_entropy)


# Meetings that overlap.


def late_outer_steps_by_hand(starts, gradients, period, delay, outer_rate, momentum):
    """A delayed outer step on plain numbers: SGD of rate 0.1 on gradients that are given.

    Args:
        gradients: ``gradients[step][rank]``.

    Returns:
        After every step each replica's number, and the anchor.
    """
    places, anchor, speed, sent, seen = list(starts), starts[0], 0.0, None, []
    for step, of_ranks in enumerate(gradients, start=1):
        places = [p - 0.1 * g for p, g in zip(places, of_ranks, strict=True)]
        if sent is not None and step % period == delay:
            distance = sum(anchor - p for p in sent) / len(sent)
            speed = momentum * speed + distance
            anchor -= outer_rate * (distance + momentum * speed if momentum else distance)
            places = [anchor + (p - old) for p, old in zip(places, sent, strict=True)]
        if step % period == 0:
            sent = list(places)
        seen.append((places, anchor))
    return seen


@pytest.mark.parametrize("outer, rate, momentum", [(average, 1.0, 0.0), (diloco, 0.7, 0.9)])
@pytest.mark.parametrize("period, delay", [(2, 1), (4, 1), (4, 3)])
def test_a_late_outer_step_is_that_of_the_meeting_and_keeps_the_way_since(
    period, delay, outer, rate, momentum
):
    gpus = course_lib.devices(3)
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 2.0)
    run = OverlappedTraining(replicate(model, gpus), lambda p: SGD(p, lr=0.1), period, delay, outer)
    gradients = torch.randn(13, 3, dtype=torch.float64).tolist()
    seen = late_outer_steps_by_hand([2.0] * 3, gradients, period, delay, rate, momentum)
    with course_lib.trace(strict=True):  # no wait is missing
        for of_ranks, (places, anchor) in zip(gradients, seen, strict=True):
            xs = [
                torch.tensor([[g]], dtype=torch.float64).to(gpu)
                for g, gpu in zip(of_ranks, gpus, strict=True)
            ]
            run.step(xs, xs, lambda out, _: out.sum())  # of which the gradient is x
            ours = [replica.weight.item() for replica in run.replicas]
            assert ours == pytest.approx(places, rel=1e-12)
            assert [each.item() for each in run.anchors] == pytest.approx([anchor] * 3, rel=1e-12)


def test_anchors_are_bit_identical_and_replicas_are_not_while_a_sum_is_late():
    gpus = course_lib.devices(3)
    run = OverlappedTraining(replicate(a_model(), gpus), sgd, period=3, delay=2, make_outer=diloco)
    for step in range(5):
        run.step(*(split_batch(each, gpus) for each in batch(step)), F.cross_entropy)
    first, *others = (anchor.cpu() for anchor in run.anchors)
    assert all(torch.equal(first, other) for other in others)
    assert largest_difference(run.replicas[0], run.replicas[1]) > 0


def test_a_meeting_that_overlaps_takes_no_time_of_its_own_where_the_delay_covers_it():
    seconds = {}
    for delay in (0, 2):
        with course_lib.hardware.fresh_devices(
            4, course_lib.CLASSROOM.with_(launch_overhead=0.0), nodes=4
        ) as gpus:
            replicas = replicate(a_model(), gpus)
            run = (
                OverlappedTraining(replicas, sgd, period=4, delay=delay)
                if delay
                else LocalTraining(replicas, sgd, period=4)
            )
            xs, ys = ([p.repeat(40, *[1] * (p.dim() - 1)).to(g) for p, g in
                       zip(split_batch(each, gpus), gpus, strict=True)]
                      for each in batch(0))  # fmt: skip
            for _ in range(6):
                run.step(xs, ys, F.cross_entropy)
            course_lib.synchronize()
            with course_lib.trace() as t:
                for _ in range(4):
                    run.step(xs, ys, F.cross_entropy)
            seconds[delay] = t.seconds, t.bytes_between_devices
    assert seconds[2][1] == seconds[0][1]
    assert seconds[2][0] < seconds[0][0]


def test_delays_that_cannot_be_are_refused_in_one_line():
    replicas = replicate(a_model(), course_lib.devices(2))
    for delay in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 steps late.*delay={delay}"):
            OverlappedTraining(replicas, sgd, period=4, delay=delay)
