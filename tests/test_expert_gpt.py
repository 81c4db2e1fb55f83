"""A GPT with experts on several devices is the one on one device, to float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import course_lib
from course_lib.models import GPT, next_token_loss, parameter_count
from course_lib.parallel.context_parallel import next_token_losses
from course_lib.parallel.data_parallel import split_batch
from course_lib.parallel.expert_gpt import ExpertGPT, ParallelExpertGPT

V, T, WIDTH, HIDDEN, E = 11, 6, 8, 4, 4


def a_gpt(capacity_factor: float = 1.0) -> ExpertGPT:
    torch.manual_seed(0)
    gpt = GPT(V, T, WIDTH, heads=2, depth=2)
    return ExpertGPT(gpt, HIDDEN, E, top_k=2, capacity_factor=capacity_factor).double()


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, y = torch.randint(V, (2, 8, T))
    return x, y


@pytest.mark.parametrize("count, nodes", [(1, 1), (2, 1), (4, 2)])
def test_losses_and_all_gradients_are_those_of_one_device(count: int, nodes: int):
    gpt, (x, y) = a_gpt(), a_batch()
    scores, balance = gpt(x, groups=count)
    (next_token_loss(scores, y) + 0.01 * balance).backward()

    gpus = course_lib.devices(count, nodes=nodes)
    parallel = ParallelExpertGPT(gpt, gpus)
    xs, ys = ([p.to(g) for p, g in zip(each.chunk(count), gpus, strict=True)] for each in (x, y))
    with course_lib.trace(strict=True):  # no wait is missing
        all_scores, balances = parallel(xs)
        torch.autograd.backward(
            [
                (next_token_loss(s, t) + 0.01 * b) / count
                for s, t, b in zip(all_scores, ys, balances, strict=True)
            ]
        )
        parallel.reduce_gradients()

    def same(ours: nn.Module, right: nn.Module) -> None:
        for p, q in zip(ours.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-10, atol=1e-12)

    torch.testing.assert_close(torch.cat([s.detach().cpu() for s in all_scores]), scores.detach())
    for rest in parallel.replicas:
        same(rest, gpt.rest)
    for layer, right in zip(parallel.layers, gpt.layers, strict=True):
        for router in layer.routers:
            same(router, right.router)
        experts = [expert for own in layer.experts for expert in own]
        for expert, its in zip(experts, right.experts, strict=True):
            same(expert, its)


def test_padding_that_is_dealt_out_unevenly_does_not_count():
    gpt, (x, y) = a_gpt(), a_batch()
    y[:4, 1:] = -100
    y[6:] = -100  # of four devices, the first two have little to count, and the last nothing
    scores, balance = gpt(x, groups=4)
    (next_token_loss(scores, y) + 0.01 * balance).backward()

    gpus = course_lib.devices(4)
    parallel = ParallelExpertGPT(gpt, gpus)
    xs, ys = (split_batch(each, gpus) for each in (x, y))
    all_scores, balances = parallel(xs)
    losses = next_token_losses(all_scores, ys)
    losses += [0.01 * balance / len(gpus) for balance in balances]
    torch.autograd.backward(losses)
    parallel.reduce_gradients()
    for p, q in zip(parallel.replicas[3].parameters(), gpt.rest.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-10, atol=1e-12)


def test_gradients_are_summed_once_and_one_more_backward_pass_is_refused():
    gpt, (x, y) = a_gpt(), a_batch()
    gpt.layers[1].router.requires_grad_(False)
    gpus = course_lib.devices(4)
    parallel = ParallelExpertGPT(gpt, gpus)
    xs, ys = (split_batch(each, gpus) for each in (x, y))

    def backward() -> None:
        torch.autograd.backward(next_token_losses(parallel(xs)[0], ys))

    backward()
    parallel.reduce_gradients()
    summed = [p.grad.clone() for p in parallel.parameters() if p.grad is not None]
    parallel.reduce_gradients()
    parallel.layers[0].reduce_gradients()
    again = [p.grad for p in parallel.parameters() if p.grad is not None]
    assert all(map(torch.equal, again, summed))
    backward()
    with pytest.raises(RuntimeError, match="sum them once a step, after its last backward pass"):
        parallel.reduce_gradients()


def test_each_device_trains_its_copies_and_its_experts_and_together_all():
    gpt = a_gpt()
    parallel = ParallelExpertGPT(gpt, course_lib.devices(4))
    replicated = gpt.rest, *(layer.router for layer in gpt.layers)
    copied = sum(parameter_count(module) for module in replicated)
    experts = parameter_count(gpt) - copied
    for rank in range(4):
        assert sum(p.numel() for p in parallel.parameters_of(rank)) == copied + experts // 4


def test_groups_have_places_of_their_own():
    gpt, (x, _) = a_gpt(capacity_factor=0.5), a_batch()
    assert not torch.allclose(gpt(x, groups=1)[0], gpt(x, groups=4)[0])
    roomy = a_gpt(capacity_factor=float(E))
    assert torch.allclose(roomy(x, groups=1)[0], roomy(x, groups=4)[0])


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="no dropout here"):
        ExpertGPT(GPT(V, T, WIDTH, heads=2, dropout=0.1), HIDDEN, E)
    with pytest.raises(ValueError, match="8 sequences do not divide among 3 groups"):
        a_gpt()(a_batch()[0], groups=3)
