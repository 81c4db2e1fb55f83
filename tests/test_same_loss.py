"""To the same loss: samplers, a test over ranks, gradient noise, and the stored sweeps."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import course_lib
from course_lib.parallel import gradient_noise
from course_lib.parallel.data_parallel import replicate, split_batch
from course_lib.parallel.gradient_noise import Noise
from course_lib.parallel.sampling import batch_indices, epoch_order, evaluate
from course_lib.sweeps import __main__ as script
from course_lib.sweeps import experts, overlap, tables, training

# Samplers.


def test_an_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(50, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 9
    assert torch.equal(epoch_order(50, 2, 1), orders[7])


@pytest.mark.parametrize("batch", [1, 7, 50, 120])
def test_batches_follow_the_epochs_without_a_gap(batch: int) -> None:
    steps = math.ceil(150 / batch)
    seen = torch.cat([batch_indices(step, batch, 50, 3) for step in range(steps)])
    assert torch.equal(seen[:150], torch.cat([epoch_order(50, epoch, 3) for epoch in range(3)]))


def test_an_order_leaves_the_random_numbers_of_the_program_alone() -> None:
    before = torch.get_rng_state()
    epoch_order(50, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_orders_and_batches_that_cannot_be_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="an order needs examples, an epoch and a seed"):
        epoch_order(0, 0, 0)
    with pytest.raises(ValueError, match="a batch of at least 1, and not 2, 0"):
        batch_indices(2, 0, 10, 0)


# A test over ranks.


@pytest.mark.parametrize("count, examples", [(1, 5), (3, 10), (4, 3), (4, 64)])
def test_a_test_over_ranks_is_that_of_one_device(count: int, examples: int) -> None:
    model = nn.Linear(6, 10)
    x, y = torch.randn(examples, 6), torch.randint(10, (examples,))
    gpus = course_lib.devices(count)
    score = evaluate(replicate(model, gpus), split_batch(x, gpus), split_batch(y, gpus))
    assert score.loss == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-5)
    assert score.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("shape", [(), (3,)], ids=["of examples", "of tokens"])
def test_what_has_no_label_does_not_count_in_a_test(shape: tuple) -> None:
    model = nn.Conv1d(6, 10, 1) if shape else nn.Linear(6, 10)
    x, y = torch.randn(8, 6, *shape), torch.randint(10, (8, *shape))
    y[:3] = -100  # the first shard has none, the second some
    gpus = course_lib.devices(4)
    score = evaluate(replicate(model, gpus), split_batch(x, gpus), split_batch(y, gpus))
    assert score.loss == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-5)
    hits = (model(x).argmax(1) == y)[3:].float()
    assert score.accuracy == pytest.approx(hits.mean().item())


def test_a_test_that_cannot_be_is_refused_in_one_line() -> None:
    gpus = course_lib.devices(2)
    replicas = replicate(nn.Linear(6, 10), gpus)
    nothing = split_batch(torch.empty(0, 6), gpus), split_batch(torch.empty(0).long(), gpus)
    unlabelled = torch.full((4,), -100)
    with pytest.raises(ValueError, match="no example"):
        evaluate(replicas, *nothing)
    with pytest.raises(ValueError, match="or none with a label"):
        evaluate(replicas, split_batch(torch.ones(4, 6), gpus), split_batch(unlabelled, gpus))
    with pytest.raises(ValueError, match="2 replicas need as many of each: there are 1 inputs, 2"):
        evaluate(replicas, nothing[0][:1], nothing[1])


# Gradient noise.


def test_two_norms_tell_signal_and_noise() -> None:
    noise = gradient_noise.from_two_batches(4, 2.0 + 8.0 / 4, 16, 2.0 + 8.0 / 16)
    assert noise == pytest.approx((2.0, 8.0))
    assert noise.scale == pytest.approx(4.0)
    assert Noise(-0.1, 8.0).scale == math.inf
    with pytest.raises(ValueError, match="the smaller one first"):
        gradient_noise.from_two_batches(16, 1.0, 4, 1.0)


def test_noise_between_devices_is_on_average_that_of_the_examples() -> None:
    gpus = course_lib.devices(4)
    true = torch.randn(200)
    noises = []
    for _ in range(100):
        rows = [(true + 3 * torch.randn(8, 200)).mean(0).to(gpu) for gpu in gpus]
        mean = torch.stack([row.cpu() for row in rows]).mean(0)
        noises.append(gradient_noise.mean_and_noise(rows, shard=8))
        assert all(torch.allclose(row.cpu(), mean, atol=1e-5) for row in rows)
    noise = gradient_noise.over_steps(noises)
    assert noise.signal == pytest.approx(true.square().sum().item(), rel=0.05)
    assert noise.variance == pytest.approx(9 * 200, rel=0.05)


def test_noise_costs_a_number_a_device_and_needs_two() -> None:
    gpus = course_lib.devices(4)
    rows = [torch.randn(1000, device=gpu) for gpu in gpus]
    with course_lib.trace() as t:
        gradient_noise.mean_and_noise(rows, shard=8)
    assert t.bytes_between_devices == 2 * 3 * 4000 + 3 * 4
    with pytest.raises(ValueError, match="there is one"):
        gradient_noise.mean_and_noise(rows[:1], shard=8)


# The stored sweeps.


def test_the_best_rate_is_that_of_the_median_seed() -> None:
    rows = [
        {"batch": 8, "rate": rate, "steps": steps}
        for rate, by_seed in ((0.1, (9, 9, 9)), (0.2, (5, 8, math.inf)), (0.4, (1, math.inf, 9)))
        for steps in by_seed
    ]
    assert tables.best_rates(rows, "batch") == {8: (0.2, [5, 8, math.inf])}


def test_the_tables_hold_every_case_of_the_script_once() -> None:
    batches = [(r["batch"], r["rate"], r["seed"]) for r in tables.read("batches")]
    assert sorted(batches) == sorted(
        (b, r, s) for b in script.BATCHES for r in training.SGD_RATES for s in script.SEEDS
    )
    methods = [(r["method"], r["rate"], r["seed"]) for r in tables.read("methods")]
    assert sorted(methods) == sorted(
        (m, r, s) for m, (rates, _) in training.METHODS.items() for r in rates for s in script.SEEDS
    )


@pytest.mark.parametrize("case", [
    ("float32", 8, "Ethernet", 64),
    ("int8", 4, "NVLink", 64),
    ("DiLoCo", 4, "InfiniBand", 64),
], ids=str)  # fmt: skip
def test_a_stored_cost_is_what_the_virtual_gpus_say(case: tuple[str, int, str, int]) -> None:
    method, count, link, batch = case
    (stored,) = [
        (r["seconds"], r["bytes"])
        for r in tables.read("costs")
        if (r["method"], r["gpus"], r["link"], r["batch"]) == case
    ]
    assert training.step_cost(method, count, link, batch) == pytest.approx(stored, rel=1e-5)


def test_a_stored_training_goes_the_same_way_again() -> None:
    (stored,) = [
        r["steps"]
        for r in tables.read("methods")
        if (r["method"], r["rate"], r["seed"]) == ("bfloat16", 0.2, 1)
    ]
    gpus = course_lib.devices(script.COUNT, training.SPEC)
    assert abs(training.method_steps("bfloat16", gpus, 0.2, seed=1) - stored) <= 2 * training.PERIOD


def test_a_stored_curve_ends_where_the_median_seed_does() -> None:
    best, curves = tables.best_rates(tables.read("methods"), "method"), tables.read("curves")
    ends = {r["method"]: r for r in curves}  # the last row of each stays
    assert set(ends) == {m for m, (_, steps) in best.items() if median(steps) < math.inf}
    for method, end in ends.items():
        rate, steps = best[method]
        assert (end["rate"], end["steps"]) == (rate, median(steps)) == (rate, steps[end["seed"]])
        assert end["loss"] <= training.TARGET


def test_a_stored_curve_goes_the_same_way_again() -> None:
    stored = [r for r in tables.read("curves") if r["method"] == "float32, AdamW"]
    gpus = course_lib.devices(script.COUNT, training.SPEC)
    again = training.method_losses("float32, AdamW", gpus, stored[0]["rate"], stored[0]["seed"])
    assert again[:2] == pytest.approx([r["loss"] for r in stored[:2]], rel=0.1)


def test_the_runs_of_experts_and_of_late_meetings_are_all_there() -> None:
    runs = {(r["model"], r["rate"], r["seed"]) for r in tables.read("experts")}
    tuned = {(m, r, 0) for m in experts.MODELS for r in experts.RATES}
    assert {run for run in runs if run[2] == 0} == tuned
    assert len(runs - tuned) == len(experts.MODELS) * len(script.SEEDS[1:])
    for model, rate, seed in runs:  # each to the target, or given up
        mine = [
            row for row in tables.read("experts")
            if (row["model"], row["rate"], row["seed"]) == (model, rate, seed)
        ]  # fmt: skip
        assert [row["steps"] for row in mine] == [experts.EVERY * n for n, _ in enumerate(mine, 1)]
        assert all(row["loss"] > experts.TARGET for row in mine[:-1])
        assert mine[-1]["loss"] <= experts.TARGET or mine[-1]["steps"] == 300
    late = [(r["method"], r["rate"], r["seed"]) for r in tables.read("overlap")]
    assert sorted(late) == sorted(
        (m, r, s) for m in overlap.MEETING for r in training.METHODS[m][0] for s in script.SEEDS
    )


@pytest.mark.parametrize("kind", experts.MODELS)
def test_a_stored_run_of_experts_begins_the_same_way_again(kind: str) -> None:
    stored = [
        row["loss"] for row in tables.read("experts")
        if (row["model"], row["rate"], row["seed"]) == (kind, 0.002, 1)
    ]  # fmt: skip
    again = [next(experts.losses(kind, 0.002, seed=1))]
    assert again == pytest.approx(stored[:1], rel=0.05)


def test_a_dense_token_and_one_with_experts_cost_the_same_products() -> None:
    dense, sparse = (experts.model_of(kind, 0) for kind in experts.MODELS)
    up, _, down = dense.parts()[1][0].mlp
    of_expert = sparse.layers[0].experts[0]
    assert up.weight.numel() + down.weight.numel() == experts.TOP_K * (
        of_expert[0].weight.numel() + of_expert[2].weight.numel()
    )


def test_stored_costs_of_experts_and_of_late_meetings_are_what_the_virtual_gpus_say() -> None:
    (row,) = [
        row for row in tables.read("expert_costs")
        if (row["model"], row["link"]) == ("experts", "NVLink")
    ]  # fmt: skip
    seconds, nbytes, _ = experts.step_cost("experts", "NVLink")
    assert seconds == pytest.approx(row["seconds"], rel=0.01)
    assert nbytes["within a node"] == row["within"]
    (row,) = [
        row for row in tables.read("overlap_costs")
        if (row["method"], row["link"]) == ("DiLoCo", "Ethernet")
    ]  # fmt: skip
    assert overlap.overlapped_cost("DiLoCo", 4, "Ethernet") == pytest.approx(
        (row["seconds"], row["bytes"]), rel=0.01
    )
