"""The same bytes from both sides: what the planner counts is what virtual GPUs send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import course_lib
from course_lib.hardware import memory_in_use
from course_lib.models import GPT, Block, next_token_loss
from course_lib.parallel.data_parallel import replicate, split_batch, train_step
from course_lib.parallel.expert_parallel import exchange_bytes
from course_lib.parallel.methods import pipeline_step
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.tensor_parallel import ParallelBlock
from course_lib.planner import Layout, Model, cluster, gpt
from course_lib.planner.activations import layer_activations
from course_lib.planner.communication import (
    Network,
    layer_collectives,
    stage_sends,
    state_collectives,
)
from course_lib.planner.constants import fitted
from course_lib.planner.memory import gpu_memory, stage_shares
from course_lib.planner.timing import step_time
from data_sheet import SHEET

CONTEXT, WIDTH, HEADS, DEPTH, VOCABULARY = 32, 48, 4, 2, 64


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four A100 that hold no numbers."""
    return course_lib.devices(4, course_lib.A100, backing="meta")


def sent(model: Model, stage: int) -> dict[str, float]:
    """Bytes that the planner says one of four replicas sends in a step, by what travels."""
    layout = Layout(8, CONTEXT, data=4, sharded=stage, microbatch=2)
    shares = stage_shares(model, layout, 0)
    found = state_collectives(layout, Network(cluster("A100", 4), fitted()), shares)
    return {each.name: each.count * each.bytes for each in found}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(8, CONTEXT + 1, dtype=torch.int64)
    return tokens[:, :-1], tokens[:, 1:]


def planned(**changes: object) -> Model:
    return replace(gpt("", DEPTH, WIDTH, HEADS, VOCABULARY), positions=CONTEXT, **changes)


def test_a_gpt_of_the_course_has_the_parameters_that_the_planner_counts() -> None:
    for tied in (True, False):
        model = GPT(VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH, tied=tied)
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert counted == planned(tied=tied).parameters


def test_data_parallelism_sends_the_bytes_that_the_planner_counts(gpus: list[torch.device]) -> None:
    replicas = replicate(GPT(VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH), gpus)
    optimizers = [torch.optim.SGD(replica.parameters(), 0.1) for replica in replicas]
    inputs, targets = (split_batch(part, gpus) for part in batch())
    with course_lib.trace() as recording:
        train_step(replicas, optimizers, inputs, targets, next_token_loss)
    total = sum(recording.bytes_sent(gpu) for gpu in gpus)
    assert total == pytest.approx(4 * sent(planned(), 0)["gradients"], rel=1e-9)


def test_zero_sends_the_bytes_that_the_planner_counts(gpus: list[torch.device]) -> None:
    """In float32: weights travel with twice the bytes of 16 bits, gradients as planned."""
    for stage in (1, 2, 3):
        model = GPT(VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH, tied=False)
        sharded = Sharded(model, gpus, stage, dtype=torch.float32, prefetch=False)
        inputs, targets = (split_batch(part, gpus) for part in batch())
        sharded.train_step(inputs, targets, next_token_loss)
        with course_lib.trace() as recording:
            sharded.train_step(inputs, targets, next_token_loss)
        counted = sent(planned(tied=False), stage)
        expected = 4 * (counted["gradients"] + 2 * counted["parameters"])
        total = sum(recording.bytes_sent(gpu) for gpu in gpus)
        assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_tensor_parallel_block_sends_the_bytes_that_the_planner_counts(
    gpus: list[torch.device], sequence_parallel: bool
) -> None:
    """Forward and backward; the sums of what norms learn come after."""
    block = ParallelBlock(Block(WIDTH, HEADS, dropout=0.0), gpus, sequence_parallel)
    length = CONTEXT // 4 if sequence_parallel else CONTEXT
    shape = (length, 2, WIDTH) if sequence_parallel else (2, length, WIDTH)
    xs = [torch.zeros(shape, device=gpu, requires_grad=True) for gpu in gpus]
    with course_lib.trace() as recording:
        outputs = block(xs)
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    layout = Layout(2, CONTEXT, tensor=4, sequence_parallel=sequence_parallel, microbatch=2)
    network = Network(cluster("A100", 4), fitted())
    (sums,) = layer_collectives(planned(), layout, network)
    in_float32 = 2 * sums.count * sums.bytes * 2  # forward and backward
    for gpu in gpus:
        assert recording.bytes_sent(gpu) == in_float32


def test_a_pipeline_sends_the_bytes_that_the_planner_counts(gpus: list[torch.device]) -> None:
    model = GPT(VOCABULARY, CONTEXT, WIDTH, HEADS, depth=4, tied=False)
    inputs, targets = batch()
    step = pipeline_step(model, gpus, inputs.contiguous(), targets.contiguous(), 1)
    with course_lib.trace() as recording:
        step()
    layout = Layout(8, CONTEXT, pipeline=4)
    (send,) = stage_sends(planned(), layout, Network(cluster("A100", 4), fitted()))
    in_float32 = layout.microbatches * send.bytes * 2
    sent = [recording.bytes_sent(gpu) for gpu in gpus]
    assert sent == [in_float32, 2 * in_float32, 2 * in_float32, in_float32]


def test_experts_receive_the_bytes_that_the_planner_counts() -> None:
    """Where every expert gets as many tokens: two exchanges in a pass, there and back."""
    model = replace(planned(), experts=8, active=2)
    layout = Layout(8, CONTEXT, data=4, expert=4, microbatch=2)
    (routed,) = layer_collectives(model, layout, Network(cluster("A100", 4), fitted()))
    rows = layout.tokens * model.active  # E x C on each GPU, with none to spare
    assert routed.count == 2
    assert 4 * routed.bytes == exchange_bytes(4, rows, WIDTH, itemsize=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_hold_the_state_that_the_planner_counts(
    gpus: list[torch.device], stage: int
) -> None:
    """In mixed precision, after a step; stage 3's weights are float32 shards in the planner."""
    model = GPT(VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH, tied=False)
    before = [memory_in_use(gpu) for gpu in gpus]
    sharded = Sharded(model, gpus, stage, dtype=torch.bfloat16, prefetch=False)
    inputs, targets = (split_batch(part, gpus) for part in batch())
    in_batch = inputs[0].nbytes + targets[0].nbytes
    sharded.train_step(inputs, targets, next_token_loss)
    course_lib.synchronize()
    layout = Layout(8, CONTEXT, data=4, sharded=stage, microbatch=2, float32_gradients=stage == 3)
    counted = gpu_memory(planned(tied=False), layout, fitted())
    state = counted.parameters + counted.gradients + counted.optimizer
    for gpu, start in zip(gpus, before, strict=True):
        assert memory_in_use(gpu) - start - in_batch == pytest.approx(state, rel=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_block_keeps_the_bytes_that_the_planner_counts(
    gpus: list[torch.device], dropout: float
) -> None:
    """And in float32 two numbers a norm, and one a head, of which the planner knows nothing."""
    block = Block(WIDTH, HEADS, dropout).to(torch.bfloat16).to(gpus[0])
    x = torch.zeros(2, CONTEXT, WIDTH, dtype=torch.bfloat16, device=gpus[0], requires_grad=True)
    before = memory_in_use(gpus[0])
    output = block(x)
    kept = memory_in_use(gpus[0]) - before
    del output
    layout = Layout(2, CONTEXT, microbatch=2)
    counted = layer_activations(planned(), layout, "none")
    masks = 0 if dropout else 2 * WIDTH  # of two dropouts, which the planner counts
    little = 4 * (2 * 2 + HEADS)
    assert kept == counted + layout.tokens * (little - masks)


@pytest.mark.parametrize(("width", "heads", "depth"), [(4096, 32, 4), (8192, 64, 2)])
def test_a_wide_gpt_takes_the_simulated_seconds_to_5_percent(
    vgpus: list[torch.device], width: int, heads: int, depth: int
) -> None:
    """Forward and backward on one GPU. The update is PyTorch's own, and moves other bytes."""
    spec = course_lib.A100.with_(launch_overhead=0.0)
    (gpu,) = course_lib.devices(1, spec, backing="meta")
    with torch.device("meta"):
        model = GPT(8192, 2048, width, heads, depth, tied=False)
    model = model.to(torch.bfloat16).to(gpu)
    tokens = torch.zeros(1, 2048, dtype=torch.int64, device=gpu)
    with course_lib.trace() as recording:
        next_token_loss(model(tokens), tokens).backward()
    layout = Layout(1, 2048, kernels="eager", attention="flash2")
    sizes = gpt("", depth, width, heads, 8192)
    counted = step_time(sizes, cluster("A100", 1), layout, SHEET)
    assert recording.seconds == pytest.approx(counted.total - counted.optimizer, rel=0.05)
