"""What a mean loss counts: padding nothing, and the parts of a batch add up to the whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib import devices, trace
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.counting import (
    count_targets,
    counts_of,
    part_of_mean,
    require_mean_of_parts,
    total_count,
)
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    backward_on_shards,
    replicate,
    split_batch,
)
from course_lib.parallel.mesh import Mesh, MeshGPT
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import gpipe


def test_padding_does_not_count_and_an_example_of_numbers_counts_once() -> None:
    tokens = torch.tensor([[3, 1, -100], [-100, -100, -100]])
    assert count_targets(tokens) == 2
    assert count_targets(torch.zeros(5, dtype=torch.int64)) == 5
    assert count_targets(torch.zeros(5, 7)) == 5  # regression, or class probabilities
    assert count_targets(torch.zeros(())) == 1
    assert count_targets(torch.zeros(0, 4, dtype=torch.int64)) == 0


def test_padding_is_padding_in_every_kind_of_whole_numbers() -> None:
    tokens = torch.tensor([3, 156, -100])  # 156 is -100 as a byte
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        assert count_targets(tokens.to(dtype)[[0, 2]]) == 1
    assert count_targets(tokens[:2].to(torch.uint8)) == 2
    assert count_targets(torch.tensor([True, False])) == 2


def test_targets_without_numbers_all_count() -> None:
    (gpu,) = devices(1, backing="meta")
    tokens = torch.full((2, 3), -100)
    assert count_targets(tokens.to(gpu)) == count_targets(tokens.to("meta")) == 6


def test_targets_that_are_no_tensor_are_refused_in_one_line() -> None:
    for batch in ({"labels": torch.zeros(3), "mask": torch.zeros(3)}, (torch.zeros(3),)):
        with pytest.raises(TypeError, match="the targets of a shard are one tensor, not a"):
            count_targets(batch)
        with pytest.raises(TypeError, match="split_batch splits one tensor, not a"):
            split_batch(batch, devices(2))


def test_shards_are_counted_on_the_host_and_nobody_waits() -> None:
    gpus = devices(2)
    y = torch.tensor([[1, 2], [3, -100], [-100, -100]])
    shards = split_batch(y, gpus)
    assert isinstance(shards, list)
    assert [shard.shape for shard in shards] == [(2, 2), (1, 2)]
    with trace() as t:
        assert counts_of(shards) == [3, 0]
    assert not t.spans
    assert counts_of(list(shards)) == [3, 0]  # a plain list is counted where it is


def test_a_whole_that_counts_less_than_its_piece_is_refused() -> None:
    assert total_count([3, 4], None) == 7
    assert total_count([3, 4], 9) == 9
    with pytest.raises(ValueError, match="batch_size=2 is less than the 7 targets counted"):
        total_count([3, 4], 2)


def test_a_part_that_is_all_padding_adds_zero_and_no_nan() -> None:
    outputs = torch.full((2, 3), float("-inf"), requires_grad=True)
    loss = part_of_mean(F.cross_entropy, outputs, torch.tensor([-100, -100]), 0, 5)
    loss.backward()
    assert loss.item() == 0.0
    assert outputs.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("passages", [[0, 7, 7, 0, 3, 0], [0, 0, 0, 0, 8, 8]])
def test_padded_batches_have_the_gradient_of_one_gpu(count: int, passages: list[int]) -> None:
    """``passages``: how many of each one's targets are padding; with 8 of 8 a shard has none."""
    torch.manual_seed(0)
    gpt = GPT(11, context=8, width=16, heads=2, depth=1)
    x, y = torch.randint(11, (6, 8)), torch.randint(11, (6, 8))
    for passage, padded in zip(y, passages, strict=True):
        passage[:padded] = -100
    gpus = devices(count)
    replicas = replicate(gpt, gpus)
    losses = backward_on_shards(
        replicas, split_batch(x, gpus), split_batch(y, gpus), next_token_loss
    )
    all_reduce_gradients(replicas)
    loss = next_token_loss(gpt(x), y)
    loss.backward()
    assert sum(each.item() for each in losses) == pytest.approx(loss.item(), abs=1e-6)
    for ours, theirs in zip(replicas[-1].parameters(), gpt.parameters(), strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-6)


def test_padded_targets_of_32_bits_have_the_loss_of_one_gpu() -> None:
    torch.manual_seed(0)
    gpt, gpus = GPT(11, context=8, width=16, heads=2, depth=2, tied=False), devices(4)
    x, y = torch.randint(11, (2, 8, 8))
    y[:2, 1:] = -100
    right, y = next_token_loss(gpt(x), y).item(), y.int()

    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return next_token_loss(scores, targets.long())

    mesh = MeshGPT(gpt, Mesh(gpus, data=2, pipeline=1, tensor=2))
    shards = split_batch(x, gpus), split_batch(y, gpus)
    for losses in (
        backward_on_shards(replicate(gpt, gpus), *shards, loss),
        mesh.forward_backward(mesh.place(x, y, microbatches=2)),
        Pipeline(gpt, gpus[:2], [2]).forward_backward(gpipe(2, 4), x, y, loss),
    ):
        assert sum(each.item() for each in losses) == pytest.approx(right, abs=1e-6)


def test_accumulated_padded_pieces_have_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    gpt, gpus = GPT(11, context=8, width=16, heads=2, depth=1), devices(2)
    x, y = torch.randint(11, (6, 8)), torch.randint(11, (6, 8))
    y[:2, 1:] = -100
    replicas = replicate(gpt, gpus)
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        shards = split_batch(xs, gpus), split_batch(ys, gpus)
        backward_on_shards(replicas, *shards, next_token_loss, batch_size=count_targets(y))
    all_reduce_gradients(replicas)
    next_token_loss(gpt(x), y).backward()
    for ours, theirs in zip(replicas[0].parameters(), gpt.parameters(), strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-6)


def contrastive_loss(z: torch.Tensor, _) -> torch.Tensor:
    scores = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.1
    return F.cross_entropy(scores, torch.arange(len(z), device=z.device) ^ 1)


def test_a_loss_over_pairs_of_examples_is_refused_by_its_check_and_a_mean_is_not() -> None:
    torch.manual_seed(0)
    outputs, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    y[0] = -100
    require_mean_of_parts(F.cross_entropy, outputs, y)
    require_mean_of_parts(nn.MSELoss(), outputs, torch.randn(8, 10))
    with pytest.raises(ValueError, match="not a mean over examples or targets"):
        require_mean_of_parts(contrastive_loss, outputs, y)
    with pytest.raises(ValueError, match="not a mean over examples or targets"):
        require_mean_of_parts(nn.MSELoss(reduction="sum"), outputs, torch.randn(8, 10))
    with pytest.raises(ValueError, match="two examples or more: outputs has 1"):
        require_mean_of_parts(F.cross_entropy, outputs[:1], y[:1])


def test_weights_of_classes_are_noticed_where_both_halves_weigh_as_much() -> None:
    torch.manual_seed(0)
    outputs, y = torch.randn(8, 2), torch.tensor([1, 0, 0, 0, 1, 0, 0, 0])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))
    with pytest.raises(ValueError, match="weighted mean of its 3 parts"):
        require_mean_of_parts(weighted, outputs, y)
