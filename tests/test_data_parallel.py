"""Data parallelism is the same training as on one GPU."""

import copy

import pytest
import torch
from torch.nn import functional as F

from course_lib import collectives, data_parallel, devices, trace
from course_lib.compare import largest_difference
from course_lib.models import GPT, MLP, next_token_loss, parameter_count


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
    with trace() as t:
        data_parallel.all_reduce_gradients(replicas)
    assert torch.equal(replicas[1][0].weight.cpu(), model[0].weight)
    assert largest_difference(replicas[0], train_plainly(model, batches)) < 1e-6
    learning = parameter_count(model[2])
    assert t.bytes_between_devices == collectives.all_reduce_bytes(2, 4 * learning)


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
    with pytest.raises(ValueError, match="different parameters"):
        largest_difference(MLP(4, 2), MLP(4, 3))


def test_a_model_with_a_nan_is_not_equal_to_one_without() -> None:
    one, other = MLP(4, 2), MLP(4, 2)
    other.load_state_dict(one.state_dict())
    other[0].bias.data[0] = float("nan")
    difference = largest_difference(one, other)
    assert difference != difference
