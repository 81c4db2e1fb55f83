"""Expert parallelism is the layer on one GPU, to float64: outputs, gradients, dropped tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import course_lib
from course_lib.parallel.expert_parallel import ExpertParallel, exchange_bytes
from course_lib.parallel.experts import MixtureOfExperts, Router, combine, dispatch

D, HIDDEN, E, TOKENS = 6, 8, 8, 12


def layer(**options: float) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(D, HIDDEN, E, **options).double()


def inputs(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(TOKENS, D, dtype=torch.float64) for _ in range(count)]


def loss_of(output: Tensor, balance: Tensor, count: int) -> Tensor:
    return (output.square().mean() + 0.01 * balance) / count


def on_one_gpu(moe: MixtureOfExperts, xs: list[Tensor]) -> list[Tensor]:
    """Each rank's tokens routed by themselves, as on ranks; the gradients stay in ``moe``."""
    outputs = []
    for x in xs:
        output, balance = moe(x)
        loss_of(output, balance, len(xs)).backward()
        outputs.append(output.detach())
    return outputs


def on_gpus(moe: MixtureOfExperts, xs: list[Tensor], nodes: int = 1):
    gpus = course_lib.devices(len(xs), nodes=nodes)
    parallel = ExpertParallel(moe, gpus)
    xs = [x.to(gpu).requires_grad_() for x, gpu in zip(xs, gpus, strict=True)]
    with course_lib.trace(strict=True):  # no wait is missing
        outputs, balances = parallel(xs)
        torch.autograd.backward(
            [loss_of(y, b, len(xs)) for y, b in zip(outputs, balances, strict=True)]
        )
        parallel.reduce_gradients()
    return parallel, outputs


@pytest.mark.parametrize("capacity_factor", [0.5, 1.25, 8.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("count, nodes", [(1, 1), (2, 1), (4, 2), (8, 2)])
def test_outputs_and_gradients_are_those_of_one_gpu(
    count: int, nodes: int, top_k: int, capacity_factor: float
):
    moe, xs = layer(top_k=top_k, capacity_factor=capacity_factor), inputs(count)
    parallel, outputs = on_gpus(moe, xs, nodes)
    expected = on_one_gpu(moe, xs)
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.detach().cpu(), right, rtol=1e-12, atol=1e-12)
    mine = [expert for part in parallel.experts for expert in part]
    for expert, right in zip(mine, moe.experts, strict=True):
        for p, q in zip(expert.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-12, atol=1e-12)
    for router in parallel.routers:
        torch.testing.assert_close(
            router.score.weight.grad.cpu(), moe.router.score.weight.grad, rtol=1e-12, atol=1e-12
        )


def test_routers_are_summed_once_and_frozen_ones_not_at_all():
    moe, xs = layer(), inputs(4)
    parallel, _ = on_gpus(moe, xs)
    on_one_gpu(moe, xs)
    parallel.reduce_gradients()
    for router in parallel.routers:
        torch.testing.assert_close(
            router.score.weight.grad.cpu(), moe.router.score.weight.grad, rtol=1e-12, atol=1e-12
        )
    frozen = layer()
    frozen.router.requires_grad_(False)
    parallel, _ = on_gpus(frozen, xs)
    assert all(router.score.weight.grad is None for router in parallel.routers)


def test_a_full_expert_drops_what_comes_later_and_a_token_it_drops_is_zero():
    router = Router(D, 2, top_k=1, capacity_factor=1.0)
    with torch.no_grad():
        router.score.weight.copy_(torch.stack([torch.ones(D), -torch.ones(D)]))
    routing = router(torch.ones(4, D))  # all four want expert 0, which has two places
    assert routing.place_KT.tolist() == [[0, 1, 4, 4]]
    assert routing.tokens_E.tolist() == [4, 0]
    assert routing.dropped == 2
    y = combine(dispatch(torch.ones(4, D), routing), routing)
    assert y.sum(1).tolist() == [D, D, 0, 0]


def test_all_first_choices_find_their_place_before_any_second_one():
    router = Router(2, 2, top_k=2, capacity_factor=0.5)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(2))
    # Two tokens, one place in each expert: token 1's first choice is token 0's second.
    routing = router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert routing.place_KT.tolist() == [[0, 1], [2, 2]]


def test_the_balance_is_1_when_all_experts_get_equally_much_and_more_when_one_gets_all():
    router = Router(4, 4, top_k=1, capacity_factor=1.0)
    with torch.no_grad():
        router.score.weight.copy_(100 * torch.eye(4))
    assert router(torch.eye(4)).balance.item() == pytest.approx(1.0)
    assert router(torch.eye(4)[:1].repeat(4, 1)).balance.item() == pytest.approx(4.0)


def test_the_host_does_not_wait_for_the_router():
    gpus = course_lib.devices(4)
    parallel = ExpertParallel(layer().float(), gpus)
    xs = [torch.ones(TOKENS, D, device=gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        before = course_lib.host_seconds()
        parallel(xs)
        enqueued = course_lib.host_seconds() - before
    launches = len(recording.spans)
    assert enqueued == pytest.approx(launches * course_lib.CLASSROOM.launch_overhead)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_four_exchanges_of_a_step_move_what_the_formula_says(count: int):
    moe, xs = layer(), inputs(count)
    rows = E * moe.router.capacity(TOKENS)
    gpus = course_lib.devices(count)
    parallel = ExpertParallel(moe, gpus)
    xs = [x.to(gpu).requires_grad_() for x, gpu in zip(xs, gpus, strict=True)]
    with course_lib.trace(strict=True) as recording:
        outputs, _ = parallel(xs)
        torch.autograd.backward([output.sum() for output in outputs])
    assert recording.bytes_between_devices == 4 * exchange_bytes(count, rows, D, itemsize=8)


def test_experts_that_do_not_divide_are_refused_in_one_line():
    with pytest.raises(ValueError, match="8 experts do not divide among 3 devices"):
        ExpertParallel(layer(), course_lib.devices(3))


def test_inputs_that_do_not_fit_are_refused_in_one_line():
    parallel = ExpertParallel(layer(), course_lib.devices(2))
    with pytest.raises(ValueError, match="on 2 devices, and was given 1 tensors"):
        parallel(inputs(1))
    with pytest.raises(ValueError, match=r"as many tokens as the others, not \[12, 5\]"):
        parallel([inputs(1)[0], inputs(1)[0][:5]])


@pytest.mark.parametrize("top_k, factor, message", [
    (0, 1.0, "a token visits 1 to 8 experts, not 0"),
    (9, 1.0, "a token visits 1 to 8 experts, not 9"),
    (2, 0.0, "capacity_factor is above 0, not 0.0"),
])  # fmt: skip
def test_routers_that_cannot_be_are_refused_in_one_line(top_k: int, factor: float, message: str):
    with pytest.raises(ValueError, match=message):
        Router(D, E, top_k, factor)
