"""Dropless experts are the layer on one GPU with room for everybody, to float64; the host waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import course_lib
from course_lib.parallel.dropless import (
    DroplessExpertParallel,
    counts_bytes,
    exchange_counts,
    uneven_exchange_bytes,
)
from course_lib.parallel.expert_parallel import ExpertParallel, exchange_bytes
from course_lib.parallel.experts import MixtureOfExperts

D, HIDDEN, E, TOKENS = 6, 8, 8, 12


def layer(top_k: int = 2, lean: float = 0.0, capacity_factor: float = 0.25) -> MixtureOfExperts:
    """A layer whose own places would drop most; the leaning one likes expert 3."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(D, HIDDEN, E, top_k, capacity_factor).double()
    with torch.no_grad():
        moe.router.score.weight[3] += lean
    return moe


def inputs(tokens: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(each, D, dtype=torch.float64) + 0.5 for each in tokens]


def by_hand(moe: MixtureOfExperts, x_TD: Tensor) -> Tensor:
    """Every token through each of its experts by itself: no place, no order, no row."""
    out = []
    for x_D in x_TD:
        probability_E = (moe.router.score.weight @ x_D).softmax(-1)
        weight_K, expert_K = probability_E.topk(moe.router.top_k)
        made = [moe.experts[expert](x_D) for expert in expert_K.tolist()]
        out.append(sum(w * y for w, y in zip(weight_K / weight_K.sum(), made, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("lean", [0.0, 5.0])  # with 5 several experts get no token at all
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("tokens, nodes", [
    ([12], 1), ([12, 12], 1), ([12, 3, 1, 9], 2), ([12] * 8, 2),
], ids=str)  # fmt: skip
def test_outputs_and_gradients_are_those_of_one_gpu_that_drops_nothing(
    tokens: list[int], nodes: int, top_k: int, lean: float
):
    moe, xs = layer(top_k, lean), inputs(tokens)
    gpus = course_lib.devices(len(xs), nodes=nodes)
    parallel = DroplessExpertParallel(moe, gpus)
    here = [x.clone().to(gpu).requires_grad_() for x, gpu in zip(xs, gpus, strict=True)]
    with course_lib.trace(strict=True):  # no wait is missing
        outputs, balances = parallel(here)
        torch.autograd.backward(
            [y.square().sum() + b for y, b in zip(outputs, balances, strict=True)]
        )
        parallel.reduce_gradients()

    for x, mine, output in zip(xs, here, outputs, strict=True):
        x.requires_grad_()
        expected = by_hand(moe, x)
        (expected.square().sum() + moe.router.choose(x).balance).backward()
        torch.testing.assert_close(output.detach().cpu(), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.grad.cpu(), x.grad, rtol=1e-12, atol=1e-12)
    experts = [expert for part in parallel.experts for expert in part]
    for expert, right in zip(experts, moe.experts, strict=True):
        for p, q in zip(expert.parameters(), right.parameters(), strict=True):
            gradient = torch.zeros_like(q) if q.grad is None else q.grad
            torch.testing.assert_close(p.grad.cpu(), gradient, rtol=1e-12, atol=1e-12)
    for router in parallel.routers:
        torch.testing.assert_close(
            router.score.weight.grad.cpu(), moe.router.score.weight.grad, rtol=1e-12, atol=1e-12
        )


def test_fixed_places_with_room_for_all_are_the_same_layer():
    moe, xs = layer(capacity_factor=float(E)), inputs([TOKENS] * 4)
    gpus = course_lib.devices(4)
    xs = [x.to(gpu) for x, gpu in zip(xs, gpus, strict=True)]
    fixed, ours = (kind(moe, gpus)(xs)[0] for kind in (ExpertParallel, DroplessExpertParallel))
    for a, b in zip(fixed, ours, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-12, atol=1e-12)


def choices_of(moe: MixtureOfExperts, xs: list[Tensor], count: int) -> list[list[int]]:
    counts = [moe.router.choose(x).tokens_E.view(count, -1).sum(1).tolist() for x in xs]
    return [[int(each) for each in row] for row in counts]


@pytest.mark.parametrize("lean", [0.0, 5.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_moves_its_rows_four_times_and_its_counts_once(count: int, lean: float):
    moe, xs = layer(lean=lean), inputs([TOKENS] * count)
    rows = choices_of(moe, xs, count)
    gpus = course_lib.devices(count)
    parallel = DroplessExpertParallel(moe, gpus)
    xs = [x.to(gpu).requires_grad_() for x, gpu in zip(xs, gpus, strict=True)]
    with course_lib.trace(strict=True) as recording:
        outputs, _ = parallel(xs)
        torch.autograd.backward([output.sum() for output in outputs])
    formula = 4 * uneven_exchange_bytes(rows, D, itemsize=8) + counts_bytes(count, E)
    assert recording.bytes_between_devices == formula


def test_what_all_choose_evenly_is_what_fixed_places_without_slack_would_send():
    even = [[3] * 4] * 4
    assert uneven_exchange_bytes(even, D) == exchange_bytes(4, 12, D)


def test_the_host_waits_for_the_counts_and_for_nothing_else():
    spec = course_lib.CLASSROOM.with_(launch_overhead=0.0)
    gpus = course_lib.devices(4, spec)
    parallel = DroplessExpertParallel(layer().float(), gpus)
    xs = [torch.randn(TOKENS, D).to(gpu) for gpu in gpus]
    course_lib.synchronize()
    before = course_lib.host_seconds()
    with course_lib.trace() as recording:
        parallel(xs)
        waited = course_lib.host_seconds() - before
    reads = [span for span in recording.spans if span.route and span.route[1] is None]
    assert len(reads) == 4  # the counts, once a GPU
    assert waited == pytest.approx(max(span.end for span in reads))
    assert 0 < waited < recording.seconds


def test_counts_tell_each_rank_what_leaves_and_what_comes():
    gpus = course_lib.devices(2)
    counts = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 0])]
    leaving, coming = exchange_counts([c.to(gpu) for c, gpu in zip(counts, gpus, strict=True)])
    assert leaving == [[3, 7], [11, 7]]
    assert coming == [[[1, 2], [5, 6]], [[3, 4], [7, 0]]]


def test_a_missing_input_is_refused_in_one_line():
    parallel = DroplessExpertParallel(layer(), course_lib.devices(2))
    with pytest.raises(ValueError, match="2 devices"):
        parallel(inputs([TOKENS]))
