"""Dropout in split models is the training of one GPU that drops the same places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.models import GPT, next_token_loss
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    join_sequence,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import all_reduce_gradients
from course_lib.parallel.dropout import dropout_of_copies, dropout_of_parts
from course_lib.parallel.split_parameter import (
    all_reduce_partial_gradients,
    largest_copy_difference,
    unsplit,
)
from course_lib.parallel.tensor_parallel import ParallelBlock, ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

both = pytest.mark.parametrize("dropout", [dropout_of_copies, dropout_of_parts])


@pytest.fixture(autouse=True)
def seeded(vgpus: list[torch.device]) -> None:
    torch.manual_seed(0)


def ones(gpus: list[torch.device], *shape: int) -> list[Tensor]:
    return [torch.ones(shape or (64,), device=gpu) for gpu in gpus]


def different(masks: list[Tensor]) -> int:
    return len({tuple(mask.cpu().flatten().tolist()) for mask in masks})


def test_copies_lose_the_same_places_and_parts_lose_others(vgpus) -> None:
    assert different(dropout_of_copies(ones(vgpus), 0.5, training=True)) == 1
    assert different(dropout_of_parts(ones(vgpus), 0.5, training=True)) == 4


def test_that_does_not_hang_on_what_else_was_drawn(vgpus) -> None:
    torch.rand(3, device=vgpus[1])
    assert different(dropout_of_copies(ones(vgpus), 0.5, training=True)) == 1
    shared = [vgpus[0], vgpus[0], vgpus[1]]  # two ranks on one device
    assert different(dropout_of_copies(ones(shared), 0.5, training=True)) == 1
    assert different(dropout_of_parts(ones(shared), 0.5, training=True)) == 3


@both
def test_each_call_drops_others_and_the_seed_decides_all(vgpus, dropout: Callable) -> None:
    calls = [dropout(ones(vgpus), 0.5, training=True)[0] for _ in range(2)]
    assert different(calls) == 2
    torch.manual_seed(0)
    again = [dropout(ones(vgpus), 0.5, training=True)[0] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(calls, again, strict=True))


@both
def test_the_devices_own_random_numbers_go_on_as_before(vgpus, dropout: Callable) -> None:
    expected = [torch.rand(3, device=gpu).tolist() for gpu in vgpus]
    torch.manual_seed(0)
    dropout(ones(vgpus), 0.5, training=True)
    assert [torch.rand(3, device=gpu).tolist() for gpu in vgpus] == expected


@both
def test_the_mean_stays(vgpus, dropout: Callable) -> None:
    for out in dropout(ones(vgpus, 10_000), 0.4, training=True):
        assert out.mean().item() == pytest.approx(1, abs=0.05)  # of deviation 0.008
        assert (out == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)


@both
@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_where_nothing_is_dropped_nothing_is_drawn(vgpus, dropout, p, training) -> None:
    state = torch.get_rng_state()
    assert all((out == 1).all() for out in dropout(ones(vgpus), p, training))
    assert torch.equal(state, torch.get_rng_state())


def a_gpt() -> GPT:
    gpt = GPT(13, context=8, width=8, heads=4, depth=2, dropout=0.4).double()
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.3)
    return gpt


@pytest.fixture
def masks(monkeypatch) -> list[Tensor]:
    """The mask of each dropout from now on, on the host."""
    seen: list[Tensor] = []
    real = F.dropout

    def watched(x: Tensor, p: float) -> Tensor:
        mask = real(torch.ones_like(x), p)
        seen.append(mask.cpu())
        return x * mask

    monkeypatch.setattr(F, "dropout", watched)
    return seen


def on_one_gpu(
    gpt: GPT, tokens: Tensor, targets: Tensor, masks: Iterator[Tensor], monkeypatch
) -> tuple[GPT, float]:
    """Gradients and loss of plain training that drops what ``masks`` say."""
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: x * next(masks))
    alone = copy.deepcopy(gpt)
    loss = next_token_loss(alone(tokens), targets)
    loss.backward()
    return alone, loss.item()


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=0, atol=1e-12)


def calls_of(masks: list[Tensor], count: int) -> list[list[Tensor]]:
    """One list a call, with the masks of all devices."""
    return [masks[first : first + count] for first in range(0, len(masks), count)]


@pytest.mark.parametrize("by_sequence", [False, True], ids=["replicated", "by-sequence"])
def test_a_split_gpt_with_dropout_is_one_gpu_that_drops_the_same(
    vgpus, masks: list[Tensor], monkeypatch, by_sequence: bool
) -> None:
    gpt = a_gpt()
    tokens, targets = torch.randint(13, (2, 3, 8))
    parallel = ParallelGPT(gpt, vgpus, by_sequence)
    losses = vocabulary_cross_entropy(parallel(tokens), targets)
    torch.autograd.backward(losses)
    all_reduce_partial_gradients(parallel)

    calls = calls_of(masks, 4)
    assert len(calls) == 4  # two a block
    assert {different(call) for call in calls} == {4 if by_sequence else 1}
    whole_TBD = [torch.cat(call) if by_sequence else call[0] for call in calls]
    whole_BTD = iter([mask.transpose(0, 1) for mask in whole_TBD])
    alone, loss = on_one_gpu(gpt, tokens, targets, whole_BTD, monkeypatch)
    assert [each.item() for each in losses] == pytest.approx([loss] * 4, abs=1e-12)
    assert_same_gradients(unsplit(parallel, gpt), alone)


def test_copies_stay_equal_over_steps_with_dropout(vgpus) -> None:
    parallel = ParallelGPT(a_gpt(), vgpus)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    tokens, targets = torch.randint(13, (2, 3, 8))
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(vocabulary_cross_entropy(parallel(tokens), targets))
        optimizer.step()
    assert largest_copy_difference(parallel) == 0


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
def test_a_long_sequence_with_dropout_is_one_gpu_that_drops_the_same(
    vgpus, masks: list[Tensor], monkeypatch, zigzag: bool
) -> None:
    gpt = a_gpt()
    tokens, targets = torch.randint(13, (2, 3, 8))
    parallel = ContextParallelGPT(gpt, vgpus)
    xs, ys = (split_sequence(each, vgpus, 1, zigzag) for each in (tokens, targets))
    losses = next_token_losses(parallel(xs), ys)
    torch.autograd.backward(losses)
    all_reduce_gradients(parallel.replicas)

    calls = calls_of(masks, 4)
    assert len(calls) == 4
    assert {different(call) for call in calls} == {4}
    whole = iter([join_sequence(call, 1, zigzag) for call in calls])
    alone, loss = on_one_gpu(gpt, tokens, targets, whole, monkeypatch)
    assert sum(each.item() for each in losses) == pytest.approx(loss, abs=1e-12)
    for replica in parallel.replicas:
        assert_same_gradients(replica, alone)


def test_a_model_that_does_not_train_is_split_into_one_that_does_not(vgpus) -> None:
    gpt = a_gpt().eval()
    tokens = torch.randint(13, (3, 8))
    scores = torch.cat([part.cpu() for part in ParallelGPT(gpt, vgpus)(tokens)], -1)
    torch.testing.assert_close(scores, gpt(tokens), rtol=0, atol=1e-12)
    block = ParallelBlock(gpt[1], vgpus)
    assert not block.training
    assert block.train().training
