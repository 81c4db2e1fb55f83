"""The highest memory of a whole step from both sides: the planner's, and what virtual GPUs hold.

Parameters, gradients, optimizer and activations of each method, to the byte, while earlier passes'
gradients are there. What the planner leaves out or counts besides stands in each test by its name
and size; ``course_lib.planner.activations`` says the same in words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import course_lib
from bare_gpt import BareGPT
from course_lib import ranks
from course_lib.hardware import memory_in_use
from course_lib.models import GPT, next_token_loss
from course_lib.parallel import schedules
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.expert_gpt import ExpertGPT, ParallelExpertGPT
from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import MixtureOfExperts
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.sequence_order import SequenceParts
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy
from course_lib.planner import Layout
from course_lib.planner.activations import in_flight, layer_activations
from course_lib.planner.constants import fitted
from course_lib.planner.memory import Memory, gpu_memory, stage_memory

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH, ROWS = 8192, 512, 1024, 16, 2, 8
TOKENS = ROWS * LENGTH
BF16 = torch.bfloat16
BARE = BareGPT(VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH)
a_gpt, sizes, tokens = BARE.a_gpt, BARE.sizes, BARE.tokens
# Tensors alone: nothing outside of the allocator, and nothing that it holds besides.
TENSORS = replace(fitted(), outside=0.0, fragments=1.0)
POSITIONS = 8 * LENGTH  # bytes of their numbers
SCALAR = 4  # bytes of a loss, or of its gradient


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four of them that hold no numbers."""
    return course_lib.devices(4, course_lib.A100, backing="meta")


def layout(batch: int = ROWS, **sizes: Any) -> Layout:
    usual = {"microbatch": ROWS, "kernels": "eager", "float32_gradients": False}
    return Layout(batch, LENGTH, **{**usual, **sizes})


def with_gradients(model: nn.Module) -> None:
    """As if there had been a microbatch before."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def without_optimizer(counted: Memory) -> float:
    return counted.total - counted.optimizer


def beside_layers(asked: Layout, depth: int = DEPTH) -> float:
    """What blocks without dropout keep of a microbatch beside what the planner counts.

    In float32 two numbers a norm and token, and one a head; but no masks of two dropouts.
    """
    around = asked.tensor if asked.sequence_parallel else 1
    numbers = 4 * (2 * 2 / around + HEADS / asked.tensor)
    return asked.tokens * depth * (numbers - 2 * WIDTH / around)


def beside_ends(asked: Layout) -> float:
    """Two numbers in float32 of the last norm; and the tokens."""
    around = asked.tensor if asked.sequence_parallel else 1
    return asked.tokens * 8 / around + asked.tokens * 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_data_parallelism_and_zero(gpus: list[torch.device], stage: int) -> None:
    """The planner's buffers are DeepSpeed's, and FSDP2's; here none is there with the logits."""
    before = memory_in_use(gpus[0])
    sums = torch.float32 if stage == 3 else BF16
    model = Sharded(a_gpt(), gpus, stage, BF16, prefetch=False, reduce_dtype=sums)
    xs = [tokens(ROWS, gpu) for gpu in gpus]
    model.train_step(xs, xs, next_token_loss)
    model.zero_grad()
    with course_lib.trace() as recording:
        with model.accumulate():
            model.backward(xs, xs, next_token_loss)
        model.backward(xs, xs, next_token_loss)
        model.step()
    asked = layout(8 * ROWS, data=4, sharded=stage, float32_gradients=stage == 3)
    counted = gpu_memory(sizes(), asked, TENSORS)
    little = beside_layers(asked) + beside_ends(asked) + POSITIONS + 2 * SCALAR
    if stage == 3:
        little += 2 * sizes().parameters / 4  # its shard in 16 bits beside the one in 32
    peak = recording.peak_memory[0] - before
    assert peak == counted.total - counted.buffers + little


def fsdp2_peak(gpus: list[torch.device], vocabulary: int) -> int:
    """Of PyTorch's ``fully_shard`` in the second step."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)

    def work() -> int:
        dist.init_process_group()
        with torch.device("meta"):
            model = GPT(vocabulary, LENGTH, WIDTH, HEADS, DEPTH, tied=False)
        model = model.to("vgpu")
        for block in model.parts()[1]:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        x = tokens(ROWS, "vgpu")
        for _ in range(2):
            torch.vgpu.reset_peak_memory_stats()
            scores = model(x)
            next_token_loss(scores.float(), x).backward()
            optimizer.step()
        return torch.vgpu.max_memory_allocated()

    return ranks.run(work, gpus)[0]


def test_fsdp2(gpus: list[torch.device]) -> None:
    """With the logits there is what embedding and head gathered, and no layer."""
    asked = layout(2 * ROWS, data=2, sharded=3, float32_gradients=True)
    counted = gpu_memory(sizes(), asked, TENSORS)
    little = beside_layers(asked) + beside_ends(asked) + POSITIONS + 2 * SCALAR
    assert fsdp2_peak(gpus[:2], VOCABULARY) == counted.total + little
    # With few logits the peak is in a layer's backward pass. There the planner adds up gathered
    # layers, a whole layer's gradient and activations, which are not all there at one moment.
    few = replace(sizes(), vocabulary=128)
    counted = gpu_memory(few, asked, TENSORS)
    too_much = counted.total + little - fsdp2_peak(gpus[:2], 128)
    assert 0 < too_much < (2 + 4) * few.layer_parameters


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallelism(gpus: list[torch.device], sequence_parallel: bool) -> None:
    """The course's loss makes two gradients of each logit and adds them: one more in float32."""
    before = memory_in_use(gpus[1])
    model = ParallelGPT(a_gpt(), gpus, sequence_parallel)
    x = tokens(ROWS, gpus[0])
    with_gradients(model)
    with course_lib.trace() as recording:
        scores = model(x)
        losses = vocabulary_cross_entropy([part.float() for part in scores], x)
        torch.autograd.backward(losses)
    asked = layout(tensor=4, sequence_parallel=sequence_parallel)
    counted = gpu_memory(sizes(), asked, TENSORS)
    little = beside_layers(asked) + beside_ends(asked) + 2 * SCALAR
    little += TOKENS * (4 * VOCABULARY / 4 + 8 + 1)  # and tokens looked up, and which are elsewhere
    assert recording.peak_memory[1] - before == without_optimizer(counted) + little


def test_a_pipeline_under_1f1b(gpus: list[torch.device]) -> None:
    """Each stage; as PyTorch's schedules do, the last one keeps all outputs, to return them."""
    depth, count, rows = 8, 5, 2
    before = memory_in_use(gpus[0])
    pipeline = Pipeline(a_gpt(depth), gpus, [3, 5, 7])
    x, ys = tokens(count * rows, gpus[0]), microbatches_of(tokens(count * rows), count, gpus[3])
    kept: list[Tensor] = []

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        kept.append(scores.detach())
        return next_token_loss(scores.float(), targets)

    with_gradients(pipeline)
    with course_lib.trace() as recording:
        pipeline.forward_backward(schedules.one_f_one_b(4, count), x, ys, loss)
    asked = layout(count * rows, pipeline=4, microbatch=rows)
    arrived, bias = 2 * WIDTH * asked.tokens, 2 * WIDTH
    for stage in range(4):
        flying = in_flight(asked, stage)
        little = flying * beside_layers(asked, depth // 4)
        if stage == 0:
            # Of the embedding no mask of a dropout, but the positions; and all tokens.
            little += flying * (POSITIONS - asked.tokens * WIDTH) + x.nbytes + bias
        elif stage < 3:
            little += arrived + bias  # already there for the next microbatch
        else:
            little += 8 * asked.tokens + x.nbytes + (count + 1) * SCALAR  # the last microbatch
        counted = stage_memory(sizes(depth), asked, TENSORS, stage)
        assert recording.peak_memory[stage] - before == without_optimizer(counted) + little


def test_context_parallelism(gpus: list[torch.device]) -> None:
    before = memory_in_use(gpus[0])
    model = ContextParallelGPT(a_gpt(), gpus)
    xs = split_sequence(tokens(ROWS), gpus, dimension=1)
    model.positions_of(LENGTH, zigzag=True)
    with_gradients(model)
    with course_lib.trace() as recording:
        scores = model(xs)
        in_float32 = SequenceParts([part.float() for part in scores], gpus, zigzag=True)
        losses = next_token_losses(in_float32, xs)
        del in_float32
        torch.autograd.backward(losses)
    asked = layout(context=4)
    counted = gpu_memory(sizes(), asked, TENSORS)
    little = beside_layers(asked) + beside_ends(asked) + POSITIONS / 4 + 2 * SCALAR
    assert recording.peak_memory[0] - before == without_optimizer(counted) + little


def of_routers(asked: Layout, experts: int, active: int) -> float:
    """What a mixture keeps beside what the planner counts: of its router, and of ``index_add``."""
    of_a_token = 2 * experts + 21 * active + 2 + 2 * WIDTH * active
    return asked.tokens * of_a_token + 4 * experts + 4


@pytest.mark.parametrize(("experts", "active"), [(8, 2), (16, 1)])
def test_a_mixture_of_experts_keeps_the_planners_bytes(
    gpus: list[torch.device], experts: int, active: int
) -> None:
    """Of the layer, and of the same layer with an MLP in the place of the mixture."""
    with torch.device("meta"):
        moe = MixtureOfExperts(WIDTH, 4 * WIDTH, experts, active, capacity_factor=1.0).to(BF16)
    layer = ExpertParallel(moe, gpus)
    xs = [torch.zeros(TOKENS, WIDTH, dtype=BF16, device=g, requires_grad=True) for g in gpus]
    before = memory_in_use(gpus[0])
    outputs, balances = layer(xs)
    kept = memory_in_use(gpus[0]) - before - outputs[0].nbytes
    del balances
    asked = layout(4 * ROWS, data=4, expert=4)
    model = replace(sizes(1), experts=experts, active=active)
    mixture = layer_activations(model, asked, "none")
    without = layer_activations(replace(sizes(1), ffn=1), asked, "none") - 4 * TOKENS
    assert kept == mixture - without + of_routers(asked, experts, active)


def test_expert_parallelism(gpus: list[torch.device]) -> None:
    before = memory_in_use(gpus[0])
    with torch.device("meta"):
        whole = ExpertGPT(a_gpt().float(), 4 * WIDTH, 8, 2, capacity_factor=1.0).to(BF16)
    model = ParallelExpertGPT(whole, gpus)
    xs = [tokens(ROWS, gpu) for gpu in gpus]
    with_gradients(model)
    with course_lib.trace() as recording:
        scores, balances = model(xs)
        losses = [
            (next_token_loss(own.float(), x) + 0.01 * balance) / 4
            for own, x, balance in zip(scores, xs, balances, strict=True)
        ]
        torch.autograd.backward(losses)
    asked = layout(4 * ROWS, data=4, expert=4)
    mixture = replace(sizes(), experts=8, active=2)
    counted = gpu_memory(mixture, asked, TENSORS)
    little = beside_layers(asked) + beside_ends(asked) + POSITIONS
    little += DEPTH * of_routers(asked, 8, 2) + 2 * SCALAR
    assert recording.peak_memory[0] - before == without_optimizer(counted) + little
