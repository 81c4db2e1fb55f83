"""The same bytes from both sides: what the planner counts is what virtual GPUs send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import course_lib
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.data_parallel import replicate, split_batch, train_step
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.planner import Layout, Model, cluster, gpt
from course_lib.planner.communication import Network, state_collectives
from course_lib.planner.constants import fitted
from course_lib.planner.memory import stage_shares

CONTEXT, WIDTH, HEADS, DEPTH, VOCABULARY = 32, 48, 4, 2, 64


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four A100 that hold no numbers."""
    return course_lib.devices(4, course_lib.A100, backing="meta")


def sent(model: Model, stage: int) -> dict[str, float]:
    """Bytes that the planner says one of four replicas sends in a step, by what travels."""
    layout = Layout(8, CONTEXT, data=4, sharded=stage, microbatch=2)
    shares = stage_shares(model, layout, 0)
    found = state_collectives(model, layout, Network(cluster("A100", 4), fitted()), shares)
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
