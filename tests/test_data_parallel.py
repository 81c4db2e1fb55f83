"""Data parallelism is the same training as on one GPU."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib import CLASSROOM, devices, memory_in_use, trace
from course_lib.models import GPT, MLP, next_token_loss, parameter_count
from course_lib.parallel import collectives, data_parallel
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    backward_on_shards,
    replicate,
    split_batch,
)
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.proof import difference, largest_difference
from course_lib.parallel.seeds import seed_ranks


def train(model, count: int, batches, loss_function=F.cross_entropy) -> list:
    gpus = devices(count)
    replicas = data_parallel.replicate(model, gpus)
    optimizers = [torch.optim.SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]
    for x, y in batches:
        xs, ys = data_parallel.split_batch(x, gpus), data_parallel.split_batch(y, gpus)
        data_parallel.train_step(replicas, optimizers, xs, ys, loss_function)
    return replicas


def train_plainly(model, batches, loss_function=F.cross_entropy):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()
    return model


def image_batches(*sizes: int) -> list:
    torch.manual_seed(0)
    return [(torch.randn(size, 64), torch.randint(10, (size,))) for size in sizes]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("last", [24, 7, 1], ids=["even", "uneven", "fewer-than-gpus"])
def test_parameters_are_those_of_plain_training(count: int, last: int) -> None:
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(24, 24, last)
    replicas = train(model, count, batches)
    assert largest_difference(replicas[0], train_plainly(model, batches)) < 1e-6
    assert all(largest_difference(replicas[0], replica) == 0 for replica in replicas)


def test_tied_weights_stay_tied_and_right() -> None:
    torch.manual_seed(1)
    model = GPT(20, context=8, width=16, heads=2, depth=1, tied=True)
    batches = [(torch.randint(20, (5, 8)), torch.randint(20, (5, 8))) for _ in range(3)]
    replicas = train(model, 3, batches, next_token_loss)
    plain = train_plainly(model, batches, next_token_loss)
    assert largest_difference(replicas[2], plain) < 1e-6
    assert all(replica[-1].linear.weight is replica[0].token.weight for replica in replicas)


def test_a_frozen_layer_neither_learns_nor_travels() -> None:
    torch.manual_seed(1)
    model = MLP(64, 32, 10)
    model[0].requires_grad_(False)
    batches = image_batches(12)
    replicas = train(model, 2, batches)
    for replica in replicas:
        for parameter in replica[2].parameters():
            parameter.grad = torch.ones_like(parameter)
    with trace() as t:
        data_parallel.all_reduce_gradients(replicas)
    assert torch.equal(replicas[1][0].weight.cpu(), model[0].weight)
    assert largest_difference(replicas[0], train_plainly(model, batches)) < 1e-6
    learning = parameter_count(model[2])
    assert t.bytes_between_devices == collectives.all_reduce_bytes(2, 4 * learning)


def test_replicas_learn_what_the_model_learns() -> None:
    model = MLP(4, 3, 2)
    model[0].requires_grad_(False)
    for replica in data_parallel.replicate(model, devices(2)):
        assert [p.requires_grad for p in replica.parameters()] == [False, False, True, True]


def test_devices_may_be_strings() -> None:
    devices(2)
    names = ["vgpu:0", "vgpu:1"]
    replicas = replicate(MLP(4, 2), names)
    shards = split_batch(torch.ones(4, 4), names)
    backward_on_shards(replicas, shards, split_batch(torch.ones(4, 2), names), nn.MSELoss())
    all_reduce_gradients(replicas)
    seed_ranks(3, names)
    assert [str(p.grad.device) for r in replicas for p in r.parameters()] == [
        name for name in names for _ in range(2)
    ]


@pytest.mark.parametrize("others", ["the model's", "another replica's"])
def test_an_optimizer_of_other_parameters_is_refused_and_nothing_moves(others: str) -> None:
    model = MLP(4, 2)
    replicas = replicate(model, devices(2))
    foreign = {"the model's": model, "another replica's": replicas[0]}[others]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (replicas[0], foreign)]
    with pytest.raises(ValueError, match="optimizer 1 has parameters that are not replica 1's"):
        data_parallel.train_step(
            replicas, optimizers, [torch.ones(1, 4)] * 2, [torch.ones(1, 2)] * 2, nn.MSELoss()
        )
    assert largest_difference(model, replicas[0]) == 0


def test_an_optimizer_of_some_of_a_replicas_parameters_is_taken() -> None:
    gpus = devices(2)
    replicas = replicate(MLP(4, 3, 2), gpus)
    optimizers = [torch.optim.SGD(replica[2].parameters(), lr=0.1) for replica in replicas]
    xs, ys = (split_batch(torch.ones(4, n), gpus) for n in (4, 2))
    data_parallel.train_step(replicas, optimizers, xs, ys, nn.MSELoss())
    assert largest_difference(*replicas) == 0


def test_replicas_of_different_models_are_refused_in_one_line() -> None:
    gpus = devices(2)
    unlike = [MLP(4, 2).to(gpus[0]), MLP(4, 2, 2).to(gpus[1])]
    for use in (all_reduce_gradients, lambda replicas: GradientBuckets(replicas, 1)):
        with pytest.raises(ValueError, match="replica 1 has other parameters than replica 0"):
            use(unlike)


def test_a_shard_may_be_a_dictionary_where_its_targets_are_a_tensor() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, batch: dict) -> torch.Tensor:
            return self.layer(batch["x"]) * batch["scale"]

    torch.manual_seed(0)
    gpus, model = devices(2), Reads()
    x, scale, y = torch.randn(5, 4), torch.randn(5, 1), torch.randint(2, (5,))
    replicas = replicate(model, gpus)
    shards = zip(split_batch(x, gpus), split_batch(scale, gpus), strict=True)
    inputs = [{"x": part, "scale": factor} for part, factor in shards]
    backward_on_shards(replicas, inputs, split_batch(y, gpus), F.cross_entropy)
    all_reduce_gradients(replicas)
    F.cross_entropy(model({"x": x, "scale": scale}), y).backward()
    assert torch.allclose(replicas[1].layer.weight.grad.cpu(), model.layer.weight.grad, atol=1e-6)


def test_dropout_of_seeded_ranks_differs_and_can_be_repeated() -> None:
    gpus = devices(4)

    def drawn() -> list[tuple]:
        return [tuple(F.dropout(torch.ones(32, device=gpu)).tolist()) for gpu in gpus]

    torch.manual_seed(0)
    assert len(set(drawn())) == 1, "one seed for all: replicas drop the same places"
    seed_ranks(0, gpus)
    first = drawn()
    assert len(set(first)) == 4
    seed_ranks(0, gpus)
    assert drawn() == first


def test_accumulated_pieces_make_the_gradient_of_the_whole() -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model, ((x, y),) = MLP(64, 32, 10), image_batches(23)
    replicas = data_parallel.replicate(model, gpus)
    for x_piece, y_piece in zip(x.split(10), y.split(10), strict=True):
        xs, ys = (data_parallel.split_batch(part, gpus) for part in (x_piece, y_piece))
        data_parallel.backward_on_shards(replicas, xs, ys, F.cross_entropy, batch_size=23)
    data_parallel.all_reduce_gradients(replicas)
    F.cross_entropy(model(x), y).backward()
    for ours, theirs in zip(replicas[2].parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-7)


def test_gradients_that_were_summed_are_not_summed_again() -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model, ((x, y),) = MLP(64, 32, 10), image_batches(23)
    F.cross_entropy(model(x), y).backward()
    replicas = data_parallel.replicate(model, gpus)
    shards = [data_parallel.split_batch(part, gpus) for part in (x, y)]
    for _ in range(2):  # the second step begins anew
        data_parallel.backward_on_shards(replicas, *shards, F.cross_entropy)
        for _ in range(2):
            data_parallel.all_reduce_gradients(replicas)
            for ours, theirs in zip(replicas[2].parameters(), model.parameters(), strict=True):
                assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-7)
        for replica in replicas:
            replica.zero_grad()


def test_a_backward_pass_behind_the_sum_is_refused() -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    replicas = data_parallel.replicate(MLP(64, 10), gpus)
    ((x, y),) = image_batches(23)
    shards = [data_parallel.split_batch(part, gpus) for part in (x, y)]
    data_parallel.backward_on_shards(replicas, *shards, F.cross_entropy)
    data_parallel.all_reduce_gradients(replicas)
    data_parallel.backward_on_shards(replicas, *shards, F.cross_entropy)
    with pytest.raises(RuntimeError, match="sum them once a step, after its last backward pass"):
        data_parallel.all_reduce_gradients(replicas)


def test_the_shards_losses_add_up_to_the_batch_loss() -> None:
    gpus = devices(4)
    torch.manual_seed(1)
    model, ((x, y),) = MLP(64, 32, 10), image_batches(10)
    replicas = data_parallel.replicate(model, gpus)
    xs, ys = (data_parallel.split_batch(part, gpus) for part in (x, y))
    losses = data_parallel.backward_on_shards(replicas, xs, ys, F.cross_entropy)
    total = sum(loss.item() for loss in losses)
    assert total == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)


def test_shards_differ_by_one_example_at_most() -> None:
    gpus = devices(4)
    assert [len(s) for s in data_parallel.split_batch(torch.zeros(10, 2), gpus)] == [3, 3, 2, 2]
    assert [len(s) for s in data_parallel.split_batch(torch.zeros(2, 2), gpus)] == [1, 1, 0, 0]


def test_replicas_start_without_the_models_gradients() -> None:
    gpus = devices(2)
    model = MLP(4, 3, 2)
    for home in ("cpu", gpus[0]):
        model = MLP(4, 3, 2).to(home)
        model(torch.ones(1, 4, device=home)).sum().backward()
        with trace() as t:
            replicas = data_parallel.replicate(model, gpus)
        assert all(p.grad is None for replica in replicas for p in replica.parameters())
        assert all(p.grad is not None for p in model.parameters())
        moved = sum(nbytes for route, nbytes in t.bytes_moved.items() if route[1] == "vgpu:1")
        assert moved == 4 * parameter_count(model)


@pytest.mark.parametrize(
    ("optimizers", "inputs", "targets"), [(1, 2, 2), (3, 2, 2), (2, 1, 2), (2, 2, 3), (2, 0, 0)]
)
def test_a_step_names_the_counts_that_do_not_match(optimizers, inputs, targets) -> None:
    replicas = data_parallel.replicate(MLP(4, 2), devices(2))
    counts = ([None] * optimizers, [None] * inputs, [None] * targets)
    with pytest.raises(ValueError) as caught:
        data_parallel.train_step(replicas, *counts, F.cross_entropy)
    assert str(caught.value) == (
        f"2 replicas need as many of each: there are {optimizers} optimizers, {inputs} inputs, "
        f"{targets} targets"
    )


def test_a_step_that_is_refused_leaves_the_gradients_alone() -> None:
    gpus = devices(2)
    replicas = data_parallel.replicate(MLP(4, 2), gpus)
    optimizers = [torch.optim.SGD(replica.parameters()) for replica in replicas]
    replicas[0](torch.ones(1, 4, device=gpus[0])).sum().backward()
    with pytest.raises(ValueError, match="2 replicas need"):
        data_parallel.train_step(replicas, optimizers, [], [], F.cross_entropy)
    assert replicas[0][0].weight.grad is not None


def test_backward_names_the_counts_that_do_not_match() -> None:
    replicas = data_parallel.replicate(MLP(4, 2), devices(2))
    with pytest.raises(ValueError, match="2 replicas need as many of each: there are 1 inputs, 2"):
        data_parallel.backward_on_shards(replicas, [None], [None] * 2, F.cross_entropy)


def test_models_of_different_shapes_cannot_be_compared() -> None:
    for other in (MLP(4, 3), MLP(4, 2, 2)):
        with pytest.raises(ValueError, match="different parameters and cannot be compared"):
            largest_difference(MLP(4, 2), other)


def test_the_proof_says_where_two_models_differ_most() -> None:
    one, other = MLP(4, 3, 2), MLP(4, 3, 2)
    other.load_state_dict(one.state_dict())
    assert difference(one, other) == ("0.weight", 0.0)
    other[2].bias.data[1] += 0.5
    other[0].weight.data[2, 1] += 0.25
    name, largest = difference(one, other)
    assert (name, largest) == ("2.bias", pytest.approx(0.5))
    other[0].bias.data[0] = float("nan")
    assert difference(one, other).name == "0.bias"
    assert difference(nn.ReLU(), nn.ReLU()) == ("", 0.0)


def test_the_proof_compares_buffers() -> None:
    one = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = copy.deepcopy(one)
    one(torch.randn(8, 4))
    assert difference(one, other).name == "1.num_batches_tracked"
    other[1].num_batches_tracked += 1
    name, largest = difference(one, other)
    assert name in ("1.running_mean", "1.running_var")
    assert largest > 0


def test_batch_norms_of_replicas_drift_apart_and_the_proof_sees_it() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    replicas = train(model, 2, image_batches(8, 8))
    assert difference(*replicas).name.startswith("1.running")


def test_a_model_with_a_nan_is_not_equal_to_one_without() -> None:
    one, other = MLP(4, 2), MLP(4, 2)
    other.load_state_dict(one.state_dict())
    other[0].bias.data[0] = float("nan")
    difference = largest_difference(one, other)
    assert difference != difference


# ------------------------------------------------------------------------- gradient buckets


def gradients(replicas) -> list[list]:
    return [
        [None if p.grad is None else p.grad.cpu() for p in replica.parameters()]
        for replica in replicas
    ]


def assert_same_gradients(replicas, others) -> None:
    """Those of all replicas are equal to the bit, and those of others up to rounding."""
    ours, theirs = gradients(replicas), gradients(others)[0]
    for rank in ours:
        for gradient, first, expected in zip(rank, ours[0], theirs, strict=True):
            if expected is None:
                assert gradient is None
            else:
                assert torch.equal(gradient, first)
                assert torch.allclose(gradient, expected, atol=1e-6)


def backward(replicas, batch, loss_function=F.cross_entropy, batch_size=None) -> None:
    gpus = [next(replica.parameters()).device for replica in replicas]
    xs, ys = (split_batch(part, gpus) for part in batch)
    backward_on_shards(replicas, xs, ys, loss_function, batch_size)


def reduced_after_backward(model, gpus, batch, loss_function=F.cross_entropy) -> list:
    replicas = replicate(model, gpus)
    backward(replicas, batch, loss_function)
    all_reduce_gradients(replicas)
    return replicas


def reduced_in_buckets(model, gpus, batch, bucket_bytes, loss_function=F.cross_entropy) -> list:
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, bucket_bytes)
    with trace(strict=True):
        backward(replicas, batch, loss_function)
        buckets.finish()
        for replica in replicas:  # what comes next on the main streams may change them at once
            for parameter in replica.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0)
    return replicas


class Branches(nn.Module):
    """A layer that every shard meets, one that none meets, one for shards of a positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.unused, self.sometimes = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.trunk(x)
        return y + self.sometimes(y) if x.sum() > 0 else y


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 9000, 1e9])
def test_buckets_give_the_gradients_of_an_all_reduce_after_backward(count, bucket_bytes) -> None:
    gpus = devices(count)
    torch.manual_seed(1)
    model, (batch,) = MLP(64, 32, 16, 10), image_batches(7)
    replicas = reduced_in_buckets(model, gpus, batch, bucket_bytes)
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_buckets_take_a_tied_gpt(count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(1)
    model = GPT(20, context=8, width=16, heads=2, depth=1, tied=True)
    batch = torch.randint(20, (5, 8)), torch.randint(20, (5, 8))
    replicas = reduced_in_buckets(model, gpus, batch, 2000, next_token_loss)
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch, next_token_loss))


def test_buckets_leave_frozen_parameters_alone() -> None:
    gpus = devices(3)
    model, (batch,) = MLP(64, 32, 16, 10), image_batches(7)
    model[2].requires_grad_(False)
    replicas = reduced_in_buckets(model, gpus, batch, 500)
    assert replicas[0][2].weight.grad is None
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_a_parameter_without_gradient_on_some_replicas_takes_part_with_zeros() -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model = Branches()
    x = torch.ones(6, 6)
    x[2:4] *= -1  # the second replica alone does not meet the layer
    batch = x, torch.randint(6, (6,))
    for bucket_bytes in (1, 1e9):
        replicas = reduced_in_buckets(model, gpus, batch, bucket_bytes)
        assert all(replica.unused.weight.grad is None for replica in replicas)
        assert all(replica.sometimes.weight.grad is not None for replica in replicas)
        assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


@pytest.mark.parametrize("bucket_bytes", [1, 1e9])
def test_an_empty_shard_takes_part_with_zeros(bucket_bytes) -> None:
    gpus = devices(3)
    model, (batch,) = MLP(64, 32, 10), image_batches(2)
    replicas = reduced_in_buckets(model, gpus, batch, bucket_bytes)
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_with_buckets_train_as_plain_training_does(set_to_none: bool) -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(12, 7, 2, 12)
    replicas = replicate(model, gpus)
    optimizers = [torch.optim.SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]
    buckets = GradientBuckets(replicas, 1000)
    with trace(strict=True):
        for batch in batches:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=set_to_none)
            backward(replicas, batch)
            buckets.finish()
            for optimizer in optimizers:
                optimizer.step()
    assert largest_difference(replicas[0], train_plainly(model, batches)) < 1e-6
    assert all(largest_difference(replicas[0], replica) == 0 for replica in replicas)


@pytest.mark.parametrize("last", [9, 2], ids=["even", "an empty shard at last"])
def test_accumulated_microbatches_travel_once_and_make_the_gradient_of_all(last: int) -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(9, 4, last)
    size = sum(len(x) for x, _ in batches)
    replicas, others = replicate(model, gpus), replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1000)
    with trace(strict=True) as t:
        with buckets.accumulate():
            for batch in batches[:-1]:
                backward(replicas, batch, batch_size=size)
        backward(replicas, batches[-1], batch_size=size)
        buckets.finish()
    for batch in batches:
        backward(others, batch, batch_size=size)
    all_reduce_gradients(others)
    assert_same_gradients(replicas, others)
    assert t.bytes_between_devices == collectives.all_reduce_bytes(3, 4 * parameter_count(model))


def test_a_layer_that_only_an_earlier_microbatch_met_is_reduced_all_the_same() -> None:
    gpus = devices(2)
    model, y = Branches(), torch.tensor([1, 2])
    replicas, others = replicate(model, gpus), replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1)
    with buckets.accumulate():
        backward(replicas, (torch.ones(2, 6), y))
    backward(replicas, (-torch.ones(2, 6), y))
    buckets.finish()
    for sign in (1, -1):
        backward(others, (sign * torch.ones(2, 6), y))
    all_reduce_gradients(others)
    assert replicas[0].sometimes.weight.grad is not None
    assert_same_gradients(replicas, others)


def test_accumulating_ends_with_its_block_also_after_an_error() -> None:
    gpus = devices(2)
    model, (batch,) = MLP(64, 10), image_batches(4)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1)
    with pytest.raises(ZeroDivisionError), buckets.accumulate():
        raise ZeroDivisionError
    with trace() as t:
        backward(replicas, batch)
    assert t.bytes_between_devices, "reduced by the hooks, and not left to finish()"
    buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_a_second_backward_pass_before_finish_is_refused_and_the_next_step_is_right() -> None:
    gpus = devices(2)
    model, (batch,) = MLP(64, 10), image_batches(4)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1)
    backward(replicas, batch)
    with trace(), pytest.raises(RuntimeError) as caught:  # which also misses a wait by then
        backward(replicas, batch)
    assert "a second time before finish()" in str(caught.value)
    assert "accumulate()" in str(caught.value)
    assert "\n" not in str(caught.value)
    buckets.finish()
    for replica in replicas:
        replica.zero_grad()
    backward(replicas, batch)
    buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


@pytest.mark.parametrize("cleared", ["not at all", "to None", "to zero"])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 1), (8, 5, 2)], ids=str)
def test_what_was_reduced_is_not_reduced_again(cleared: str, sizes) -> None:
    """finish() after each of several pieces adds up to the gradient of all, unless cleared."""
    gpus = devices(3)
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(*sizes)
    replicas, others = replicate(model, gpus), replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1000)
    with trace(strict=True):
        for batch in batches:
            if cleared != "not at all":
                for replica in replicas:
                    replica.zero_grad(set_to_none=cleared == "to None")
            backward(replicas, batch)
            buckets.finish()
    for batch in batches if cleared == "not at all" else batches[-1:]:
        backward(others, batch)
    all_reduce_gradients(others)
    assert_same_gradients(replicas, others)


def test_what_buckets_reduced_is_not_summed_again_without_them() -> None:
    gpus = devices(3)
    torch.manual_seed(1)
    model, (batch,) = MLP(64, 32, 10), image_batches(8)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1000)
    for _ in range(2):  # the second step begins anew
        for replica in replicas:
            replica.zero_grad()
        backward(replicas, batch)
        buckets.finish()
        all_reduce_gradients(replicas)
        assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))
    with buckets.accumulate():
        backward(replicas, batch)
    with pytest.raises(RuntimeError, match="sum them once a step, after its last backward pass"):
        all_reduce_gradients(replicas)


def test_pieces_may_be_reduced_one_by_one_or_several_at_once() -> None:
    gpus = devices(2)
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(8, 6, 4, 2)
    replicas, others = replicate(model, gpus), replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1000)
    for batch in batches:
        with buckets.accumulate() if len(batch[0]) == 6 else nullcontext():
            backward(replicas, batch)
        if len(batch[0]) != 6:
            buckets.finish()
        backward(others, batch)
    all_reduce_gradients(others)
    assert_same_gradients(replicas, others)


def test_a_layer_unfrozen_after_the_buckets_were_made_is_refused() -> None:
    gpus = devices(2)
    model, (batch,) = MLP(64, 32, 10), image_batches(4)
    model[0].requires_grad_(False)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1000)
    replicas[1][0].requires_grad_(True)
    backward(replicas, batch)
    with pytest.raises(RuntimeError, match="make new GradientBuckets after unfreezing"):
        buckets.finish()


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1e9])
@pytest.mark.parametrize("done", [1, 2])
@pytest.mark.parametrize("how", ["set_to_none", "reset"])
def test_a_dropped_step_leaves_nothing_in_the_next_one(bucket_bytes, done: int, how: str) -> None:
    """So many of three replicas, or all, had done their backward pass when it was interrupted."""
    gpus = devices(3)
    torch.manual_seed(1)
    model, (dropped, batch) = MLP(64, 32, 10), image_batches(9, 6)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, bucket_bytes)
    with trace(strict=True):
        backward(replicas[:done], [part[: 3 * done] for part in dropped])
        if how == "reset":
            buckets.reset()
            assert all(p.grad is None for replica in replicas for p in replica.parameters())
        for replica in replicas:
            replica.zero_grad(set_to_none=True)
        backward(replicas, batch)
        buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_a_step_that_is_dropped_before_finish_leaves_nothing_either() -> None:
    gpus = devices(2)
    torch.manual_seed(1)
    model, (dropped, batch) = MLP(64, 32, 10), image_batches(9, 6)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 3000)
    with trace(strict=True):
        backward(replicas, dropped)
        for replica in replicas:
            replica.zero_grad(set_to_none=True)
        backward(replicas, batch)
        buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_a_dropped_step_whose_gradients_are_zeroed_in_place_needs_reset() -> None:
    gpus = devices(2)
    torch.manual_seed(1)
    model, (batch,) = MLP(64, 32, 10), image_batches(6)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 3000)
    backward(replicas[:1], batch)
    for replica in replicas:
        replica.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"reset\(\) to drop a step that was interrupted"):
        backward(replicas, batch)
    buckets.reset()
    backward(replicas, batch)
    buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_a_block_of_accumulate_inside_another_changes_nothing() -> None:
    gpus = devices(2)
    torch.manual_seed(1)
    model, batches = MLP(64, 32, 10), image_batches(4, 4, 4)
    replicas, others = replicate(model, gpus), replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1)
    with buckets.accumulate():
        with buckets.accumulate():
            backward(replicas, batches[0])
        with trace() as t:
            backward(replicas, batches[1])
    assert t.bytes_between_devices == 0
    backward(replicas, batches[2])
    buckets.finish()
    for batch in batches:
        backward(others, batch)
    all_reduce_gradients(others)
    assert_same_gradients(replicas, others)


def test_finish_without_a_backward_pass_does_nothing() -> None:
    gpus = devices(2)
    model, (batch,) = MLP(64, 10), image_batches(4)
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1)
    with trace() as t:
        buckets.finish()
    assert t.bytes_moved == {}
    backward(replicas, batch)
    buckets.finish()
    buckets.finish()
    assert_same_gradients(replicas, reduced_after_backward(model, gpus, batch))


def test_buckets_move_every_gradient_once_and_hide_a_part_of_it_behind_backward() -> None:
    gpus = devices(4, CLASSROOM.with_(launch_overhead=0.0))
    model, (batch,) = MLP(64, 256, 256, 256, 256, 10), image_batches(1024)

    def ring_after_backward(replicas) -> None:
        for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
            collectives.ring_all_reduce([parameter.grad for parameter in parameters])

    def record(bucket_bytes: float | None) -> object:
        replicas = replicate(model, gpus)
        buckets = GradientBuckets(replicas, bucket_bytes) if bucket_bytes else None
        with trace(strict=True) as t:
            backward(replicas, batch)
            buckets.finish() if buckets else ring_after_backward(replicas)
        return t

    after, overlapped, late = record(None), record(200_000), record(1e9)
    assert overlapped.seconds < 0.95 * after.seconds
    assert overlapped.seconds < late.seconds
    moved = collectives.all_reduce_bytes(4, 4 * parameter_count(model))
    assert [t.bytes_between_devices for t in (after, overlapped, late)] == [moved] * 3
    last_product = max(span.end for span in overlapped.spans if span.kind == "matmul")
    hidden = [s for s in overlapped.spans if s.route and None not in s.route]
    assert min(span.start for span in hidden) < 0.8 * last_product


def test_a_bucket_has_one_dtype() -> None:
    gpus = devices(2)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
    replicas = replicate(model, gpus)
    buckets = GradientBuckets(replicas, 1e9)
    dtypes = [bucket.buffers[0].dtype for bucket in buckets.buckets]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    for rank, (replica, gpu) in enumerate(zip(replicas, gpus, strict=True)):
        for layer in replica:
            x = torch.full((1, 4), rank + 1.0, device=gpu, dtype=layer.weight.dtype)
            layer(x).sum().backward()
    buckets.finish()
    for replica in replicas:
        for layer in replica:
            assert layer.weight.grad.dtype == layer.weight.dtype
            assert layer.weight.grad.tolist() == [[3.0] * 4] * 4


def test_buckets_hold_as_many_bytes_as_asked_for_last_parameters_first() -> None:
    replicas = replicate(MLP(4, 4, 4, 4), devices(2))  # a layer has 64 and 16 bytes
    names = {parameter: name for name, parameter in replicas[0].named_parameters()}

    def groups(bucket_bytes: float) -> list[list[str]]:
        made = GradientBuckets(replicas, bucket_bytes).buckets
        return [[names[first] for first, _ in bucket.group] for bucket in made]

    assert groups(1) == [[name] for name in reversed(names.values())]
    assert groups(80) == [[f"{n}.bias", f"{n}.weight"] for n in (4, 2, 0)]
    assert groups(81) == [["4.bias", "4.weight", "2.bias"], ["2.weight", "0.bias", "0.weight"]]
    assert groups(1e9) == [list(reversed(names.values()))]


@pytest.mark.parametrize("finishes", [True, False])
def test_deleted_buckets_and_replicas_hold_no_memory(finishes: bool) -> None:
    gpus = devices(2)
    gc.collect()
    before = [memory_in_use(gpu) for gpu in gpus]
    replicas = replicate(MLP(64, 32, 10), gpus)
    buckets = GradientBuckets(replicas, 1000)
    (batch,) = image_batches(8)
    backward(replicas, batch)
    if finishes:
        buckets.finish()
    gc.disable()
    try:
        del buckets, replicas
        assert [memory_in_use(gpu) for gpu in gpus] == before
    finally:
        gc.enable()


def test_without_its_buckets_a_replica_goes_on_alone() -> None:
    gpus = devices(2)
    replicas = replicate(MLP(64, 10), gpus)
    buckets = GradientBuckets(replicas, 1)
    del buckets
    (batch,) = image_batches(4)
    with trace() as t:
        backward(replicas, batch)
    assert t.bytes_between_devices == 0
    assert all(gradient is not None for rank in gradients(replicas) for gradient in rank)


@pytest.mark.parametrize("bucket_bytes", [0, -1, float("nan")])
def test_a_bucket_without_bytes_is_refused_in_one_line(bucket_bytes) -> None:
    replicas = replicate(MLP(4, 2), devices(2))
    with pytest.raises(ValueError) as caught:
        GradientBuckets(replicas, bucket_bytes)
    assert str(caught.value) == f"a bucket holds at least one byte: bucket_bytes={bucket_bytes}"


def test_buckets_for_no_gradient_at_all_are_refused_in_one_line() -> None:
    replicas = replicate(MLP(4, 2).requires_grad_(False), devices(2))
    for none_of_them in (replicas, []):
        with pytest.raises(ValueError, match="there are none"):
            GradientBuckets(none_of_them, 1)
