"""Gradients are clipped by the norm of the one model they belong to, however it is split."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    backward_on_shards,
    replicate,
    split_batch,
)
from course_lib.parallel.expert_gpt import ExpertGPT, ParallelExpertGPT
from course_lib.parallel.gradient_norm import clip_gradients
from course_lib.parallel.mesh import Mesh, MeshGPT
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import one_f_one_b
from course_lib.parallel.split_parameter import all_reduce_partial_gradients, unsplit
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

MAX_NORM = 0.1


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randint(11, (8, 8)), torch.randint(11, (8, 8))


def a_gpt() -> GPT:
    torch.manual_seed(1)
    return GPT(11, context=8, width=8, heads=4, depth=2, tied=False).double()


def clipped_on_one(gpt: GPT, batch) -> tuple[list[torch.Tensor], float]:
    alone = copy.deepcopy(gpt)
    next_token_loss(alone(batch[0]), batch[1]).backward()
    norm = nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM).item()
    assert norm > 2 * MAX_NORM
    return [parameter.grad for parameter in alone.parameters()], norm


def assert_clipped(model: nn.Module, norm: torch.Tensor, gpt: GPT, batch) -> None:
    expected, its_norm = clipped_on_one(gpt, batch)
    assert norm.item() == pytest.approx(its_norm, abs=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=0, atol=1e-12)


def test_replicas_count_once(vgpus, batch) -> None:
    gpt = a_gpt()
    replicas = replicate(gpt, vgpus)
    xs, ys = (split_batch(each, vgpus) for each in batch)
    backward_on_shards(replicas, xs, ys, next_token_loss)
    all_reduce_gradients(replicas)
    norm = clip_gradients(replicas, MAX_NORM)
    for replica in replicas:
        assert_clipped(replica, norm, gpt, batch)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_copies_of_tensor_parallelism_count_once(vgpus, batch, sequence_parallel: bool) -> None:
    gpt = a_gpt()
    parallel = ParallelGPT(gpt, vgpus, sequence_parallel)
    torch.autograd.backward(vocabulary_cross_entropy(parallel(batch[0]), batch[1]))
    all_reduce_partial_gradients(parallel)
    norm = clip_gradients(parallel, MAX_NORM)
    assert_clipped(unsplit(parallel, gpt), norm, gpt, batch)


def test_stages_of_a_pipeline_count_together(vgpus, batch) -> None:
    gpt = a_gpt()
    pipeline = Pipeline(copy.deepcopy(gpt), vgpus[:2], [2])
    pipeline.forward_backward(one_f_one_b(2, 4), *batch, next_token_loss)
    assert_clipped(pipeline, clip_gradients(pipeline, MAX_NORM), gpt, batch)


def test_a_mesh_counts_each_part_once(vgpus, batch) -> None:
    gpt = a_gpt()
    model = MeshGPT(gpt, Mesh(vgpus, data=2, pipeline=1, tensor=2))
    model.forward_backward(model.place(*batch, microbatches=2))
    norm = clip_gradients(model.replicas, MAX_NORM)
    for replica in model.replicas:
        assert_clipped(unsplit(replica, gpt), norm, gpt, batch)


def test_a_model_made_of_replicas_may_be_given_as_it_is(vgpus, batch) -> None:
    gpt = a_gpt()
    mesh = MeshGPT(gpt, Mesh(vgpus, data=2, pipeline=1, tensor=2))
    mesh.forward_backward(mesh.place(*batch, microbatches=2))
    norm = clip_gradients(mesh, MAX_NORM)
    assert_clipped(unsplit(mesh.replicas[1], gpt), norm, gpt, batch)
    long = ContextParallelGPT(gpt, vgpus)
    tokens, targets = (split_sequence(each, vgpus, dimension=1) for each in batch)
    torch.autograd.backward(next_token_losses(long(tokens), targets))
    all_reduce_gradients(long.replicas)
    assert_clipped(long.replicas[3], clip_gradients(long, MAX_NORM), gpt, batch)


def test_experts_count_all_and_the_rest_and_the_routers_once(vgpus, batch) -> None:
    gpt = ExpertGPT(a_gpt(), hidden=8, experts=4).double()
    alone = copy.deepcopy(gpt)
    next_token_loss(alone(batch[0], groups=4)[0], batch[1]).backward()
    right = nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM).item()
    assert right > 2 * MAX_NORM
    parallel = ParallelExpertGPT(gpt, vgpus)
    tokens, targets = (split_batch(each, vgpus) for each in batch)
    torch.autograd.backward(next_token_losses(parallel(tokens)[0], targets))
    parallel.reduce_gradients()
    norm = clip_gradients(parallel, MAX_NORM)
    assert norm.item() == pytest.approx(right, abs=1e-12)
    assert clip_gradients(parallel, 1e9).item() == pytest.approx(MAX_NORM, rel=1e-4)
    expected = alone.rest, *alone.layers[1].experts
    ours = parallel.replicas[3], *(expert for own in parallel.layers[1].experts for expert in own)
    for one, other in zip(ours, expected, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=0, atol=1e-12)


def test_small_gradients_stay_as_they_are(vgpus) -> None:
    model = MLP(4, 4).to(vgpus[0])
    F.cross_entropy(model(torch.randn(3, 4, device=vgpus[0])), torch.tensor([0, 1, 2]).to(vgpus[0])
    ).backward()  # fmt: skip
    before = [parameter.grad.clone() for parameter in model.parameters()]
    clip_gradients(model, 100.0)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad.cpu(), gradient.cpu())


def test_many_bfloat16_squares_do_not_stop_growing() -> None:
    weight = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    module = nn.Module()
    module.weight = weight
    assert clip_gradients(module, 1e9).item() == pytest.approx(100_000**0.5)


def test_what_cannot_be_clipped_is_said_in_one_line(vgpus) -> None:
    with pytest.raises(ValueError, match="run a backward pass first"):
        clip_gradients(MLP(2, 2), 1.0)
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_gradients(MLP(2, 2), 0)
