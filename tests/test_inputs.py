"""What is no device, batch, model, schedule or shape of a method is said in one clear line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.models import GPT, MLP
from course_lib.parallel.collectives import all_gather, reduce_scatter
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    join_sequence,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.dropout import dropout_of_parts
from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import MixtureOfExperts
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.layer_parallel import LayerParallel, balanced_cuts
from course_lib.parallel.local_training import LocalTraining
from course_lib.parallel.mesh import Mesh, MeshGPT
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.sampling import evaluate
from course_lib.parallel.schedule_chart import step_times
from course_lib.parallel.schedules import gpipe
from course_lib.parallel.seeds import seed_ranks
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.tensor_parallel import (
    ColumnLinear,
    CopiedNorm,
    ParallelGPT,
    ParallelMLP,
    RowLinear,
)
from course_lib.parallel.ulysses import ulysses_attention
from course_lib.parallel.unit_exchange import bytes_a_parameter, bytes_a_step
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

Gpus = list[torch.device]

TOKENS = torch.zeros(4, 8, dtype=torch.int64)
NOT_A_MEAN = nn.CrossEntropyLoss(reduction="none")


def gpt() -> GPT:
    return GPT(11, context=8, width=8, heads=4, depth=2, tied=False)


def on(gpus: Gpus, *shape: int) -> list[torch.Tensor]:
    return [torch.ones(shape, device=gpu) for gpu in gpus]


def check_refused(error: type[Exception], match: str, use: Callable, gpus: Gpus) -> None:
    with pytest.raises(error, match=match) as refusal:
        use(gpus)
    assert "\n" not in str(refusal.value)


TAKE_DEVICES: dict[str, Callable[[Gpus], object]] = {
    "replicate": lambda d: replicate(MLP(4, 4), d),
    "split_batch": lambda d: split_batch(torch.ones(4), d),
    "split_sequence": lambda d: split_sequence(TOKENS, d, 1),
    "layers": lambda d: LayerParallel(MLP(4, 4), d, []),
    "tensor": lambda d: ParallelGPT(gpt(), d),
    "context": lambda d: ContextParallelGPT(gpt(), d),
    "sharded": lambda d: Sharded(MLP(4, 4), d, 1),
}


@pytest.mark.parametrize("use", TAKE_DEVICES.values(), ids=TAKE_DEVICES)
def test_one_device_is_no_list_and_none_is_too_few(vgpus: Gpus, use: Callable) -> None:
    check_refused(TypeError, r"list of devices, and vgpu:0 is one: give \[", use, vgpus[0])
    check_refused(TypeError, "and vgpu:0 is one: give", use, "vgpu:0")
    check_refused(ValueError, "no device in the list", use, [])


@pytest.mark.parametrize(
    "split", [ParallelGPT, ContextParallelGPT, lambda m, d: MeshGPT(m, Mesh(d, 2, 1, 2))]
)
def test_another_model_than_a_gpt_is_refused(vgpus: Gpus, split: Callable) -> None:
    check_refused(TypeError, r"models.GPT, and not a MLP", lambda d: split(MLP(4, 4), d), vgpus)


BATCHES: dict[str, tuple[type[Exception], str, Callable[[Gpus], object]]] = {
    "a single number": (
        ValueError,
        "examples along its first dimension",
        lambda d: split_batch(torch.tensor(1.0), d),
    ),
    "a loss that is no mean": (
        ValueError,
        r'made \[2\]: give it reduction="mean"',
        lambda d: backward_on_shards(
            replicate(MLP(8, 4), d),
            split_batch(torch.ones(8, 8), d),
            split_batch(TOKENS.flatten()[:8], d),
            NOT_A_MEAN,
        ),
    ),
    "the same in a pipeline": (
        ValueError,
        'give it reduction="mean"',
        lambda d: Pipeline(MLP(8, 8, 4), d[:2], [2]).forward_backward(
            gpipe(2, 2), torch.ones(4, 8), TOKENS[:, 0], NOT_A_MEAN
        ),
    ),
    "targets in a dictionary": (
        TypeError,
        "targets are one tensor, and not a dict",
        lambda d: microbatches_of({"y": TOKENS}, 2, d[0]),
    ),
    "no microbatch": (ValueError, "or more: 0", lambda d: microbatches_of(TOKENS, 0, d[0])),
    "targets that were not split": (
        TypeError,
        "targets are a list with one tensor a device",
        lambda d: next_token_losses(
            ContextParallelGPT(gpt(), d)(split_sequence(TOKENS, d, 1)), TOKENS
        ),
    ),
    "tokens of one passage": (
        ValueError,
        r"shape \[B, T\], and not \[8\]",
        lambda d: ParallelGPT(gpt(), d)(TOKENS[0]),
    ),
    "tokens in floating point": (
        TypeError,
        "not torch.float32",
        lambda d: ParallelGPT(gpt(), d)(TOKENS.float()),
    ),
    "tokens that were split": (
        TypeError,
        "not list",
        lambda d: ParallelGPT(gpt(), d)([TOKENS] * 4),
    ),
    "fewer targets than tokens": (
        ValueError,
        r"need targets of that shape, and not \[2, 8\]",
        lambda d: vocabulary_cross_entropy(on(d, 4, 8, 3), TOKENS[:2]),
    ),
    "fewer targets on a mesh": (
        ValueError,
        r"need targets of that shape, not \[2, 8\]",
        lambda d: MeshGPT(gpt(), Mesh(d, 2, 1, 2)).place(TOKENS, TOKENS[:2], 1),
    ),
    "scores of one device": (
        TypeError,
        "the loss takes a list",
        lambda d: vocabulary_cross_entropy(torch.ones(4, 8, 3, device=d[0]), TOKENS),
    ),
    "a bad reduce_dtype": (
        ValueError,
        "reduce_dtype is one of",
        lambda d: Sharded(MLP(4, 4), d, 1, reduce_dtype=torch.int64),
    ),
    "buckets in megabytes": (
        ValueError,
        "bucket_bytes='25MB'",
        lambda d: GradientBuckets(replicate(MLP(4, 4), d), "25MB"),
    ),
}


ROWS = torch.ones(4, 8)  # as many rows as there are devices


TAKE_A_LIST: dict[str, tuple[str, Callable[[Gpus], object]]] = {
    "inputs of replicas": (
        "inputs are a list with one tensor a replica",
        lambda d: backward_on_shards(replicate(MLP(8, 4), d), ROWS, on(d, 1), F.cross_entropy),
    ),
    "targets of replicas": (
        "targets are a list",
        lambda d: backward_on_shards(replicate(MLP(8, 4), d), on(d, 1, 8), ROWS, F.cross_entropy),
    ),
    "a test": ("inputs are a list", lambda d: evaluate(replicate(MLP(8, 4), d), ROWS, on(d, 1))),
    "local training": (
        "targets are a list",
        lambda d: LocalTraining(replicate(MLP(8, 4), d), torch.optim.SGD, 1).step(
            on(d, 1, 8), ROWS, F.cross_entropy
        ),
    ),
    "sharded": (
        "this model takes a list",
        lambda d: Sharded(MLP(8, 4), d, 1).backward(ROWS, on(d, 1), F.cross_entropy),
    ),
    "context": ("this GPT takes a list", lambda d: ContextParallelGPT(gpt(), d)(TOKENS)),
    "its scores": (
        "the loss takes a list",
        lambda d: next_token_losses(torch.ones(4, 1, 8, 11), split_sequence(TOKENS, d, 1)),
    ),
    "joining": ("join_sequence takes a list", lambda d: join_sequence(TOKENS, 1)),
    "ulysses": (
        "Ulysses takes a list",
        lambda d: ulysses_attention(*[torch.ones(4, 4, 8, 4)] * 3, causal=True),
    ),
    "a norm": ("this layer takes a list", lambda d: CopiedNorm(nn.LayerNorm(8), d)(ROWS)),
    "experts": (
        "this layer takes a list",
        lambda d: ExpertParallel(MixtureOfExperts(8, 8, 4), d)(torch.ones(4, 2, 8)),
    ),
}


@pytest.mark.parametrize(("match", "use"), TAKE_A_LIST.values(), ids=TAKE_A_LIST)
def test_a_single_tensor_is_not_taken_for_its_rows(vgpus: Gpus, match: str, use: Callable) -> None:
    check_refused(TypeError, f"{match}.*not a single tensor", use, vgpus)


TAKE_TENSORS: dict[str, Callable[[Gpus], object]] = {
    "a pipeline": lambda d: Pipeline(MLP(8, 8, 4), d[:2], [2]).forward_backward(
        gpipe(2, 2), {"x": ROWS, "mask": ROWS}, TOKENS[:, 0], F.cross_entropy
    ),
    "sharded inputs": lambda d: Sharded(MLP(8, 4), d, 1).backward(
        [{"x": x} for x in on(d, 1, 8)], on(d, 1), F.cross_entropy
    ),
    "sharded targets": lambda d: Sharded(MLP(8, 4), d, 1).backward(
        on(d, 1, 8), [{"y": y} for y in on(d, 1)], F.cross_entropy
    ),
    "a sequence": lambda d: split_sequence({"x": TOKENS}, d, 1),
}


@pytest.mark.parametrize("use", TAKE_TENSORS.values(), ids=TAKE_TENSORS)
def test_a_dictionary_in_place_of_a_tensor_is_refused(vgpus: Gpus, use: Callable) -> None:
    check_refused(TypeError, "one tensor, and not a dict", use, vgpus)


@pytest.mark.parametrize(("error", "match", "use"), BATCHES.values(), ids=BATCHES)
def test_a_batch_or_loss_that_does_not_fit_is_refused(vgpus, error, match, use) -> None:
    check_refused(error, match, use, vgpus)


OTHERS: dict[str, tuple[type[Exception], str, Callable[[Gpus], object]]] = {
    "a column for each device": (
        ValueError,
        "this layer is on 4 devices, and was given 1 tensors",
        lambda d: ColumnLinear(nn.Linear(8, 8), d)(on(d[:1], 2, 2, 8)),
    ),
    "a row for each device": (
        ValueError,
        "on 4 devices, and was given 2",
        lambda d: RowLinear(nn.Linear(8, 8), d)(on(d[:2], 2, 2, 2)),
    ),
    "an MLP of one layer": (
        ValueError,
        "an MLP here has three layers",
        lambda d: ParallelMLP(nn.Sequential(nn.Linear(4, 4)), d),
    ),
    "a norm without parameters": (
        ValueError,
        "a weight and a bias to copy",
        lambda d: CopiedNorm(nn.LayerNorm(4, elementwise_affine=False), d),
    ),
    "dropout of one tensor": (
        TypeError,
        "dropout takes a list",
        lambda d: dropout_of_parts(torch.ones(4, device=d[0]), 0.5, True),
    ),
    "gathering numbers": (ValueError, r"give tensor.unsqueeze\(0\)", lambda d: all_gather(on(d))),
    "scattering numbers": (ValueError, "a single number has none", lambda d: reduce_scatter(on(d))),
    "a model that is no row of layers": (
        TypeError,
        "an nn.Sequential is cut into stages, not a Linear",
        lambda d: LayerParallel(nn.Linear(4, 4), d[:2], [1]),
    ),
    "one cut and no list": (
        TypeError,
        "cuts are a list of positions",
        lambda d: LayerParallel(MLP(4, 4, 4), d[:2], 1),
    ),
    "half a stage": (
        TypeError,
        "whole number of stages: 1.5",
        lambda d: balanced_cuts([1, 2], 1.5),
    ),
    "a schedule's name": (
        TypeError,
        "takes a Schedule, such as",
        lambda d: Pipeline(MLP(4, 4, 4), d[:2], [2]).forward_backward(
            "gpipe", torch.ones(4, 4), torch.ones(4, 4), F.mse_loss
        ),
    ),
    "negative time": (ValueError, "is negative", lambda d: step_times(gpipe(2, 2), transfer=-1)),
    "a mesh of a quarter": (TypeError, "whole numbers of devices", lambda d: Mesh(d, 4.0, 1, 1)),
    "a place out of the mesh": (
        ValueError,
        "there is no place",
        lambda d: Mesh(d, 2, 1, 2).rank(2, 0, 0),
    ),
    "another axis": (ValueError, "'context'", lambda d: Mesh(d, 2, 1, 2).groups("context")),
    "a stage below 0": (ValueError, "stages are 0 to 3", lambda d: bytes_a_parameter(-1, 4)),
    "a stage above 3": (ValueError, "stages are 0 to 3", lambda d: bytes_a_parameter(4, 4)),
    "a stage of no devices": (ValueError, "of 0 devices", lambda d: bytes_a_parameter(1, 0)),
    "True for a stage": (ValueError, "stage True", lambda d: bytes_a_parameter(True, 4)),
    "half a device": (ValueError, "of 2.5 devices", lambda d: bytes_a_parameter(3, 2.5)),
    "no group": (ValueError, "in 0 groups", lambda d: bytes_a_step(3, 4, 100, 0)),
    "half a group": (ValueError, "in 2.5 groups", lambda d: bytes_a_step(3, 4, 100, 2.5)),
    "bytes below 0": (ValueError, "-100 bytes", lambda d: bytes_a_step(3, 4, -100)),
    "a device to seed": (TypeError, "takes a list of devices", lambda d: seed_ranks(0, "vgpu:0")),
    "nothing to seed": (ValueError, "no device in the list", lambda d: seed_ranks(0, [])),
}


@pytest.mark.parametrize(("error", "match", "use"), OTHERS.values(), ids=OTHERS)
def test_a_part_that_does_not_fit_is_refused(vgpus, error, match, use) -> None:
    check_refused(error, match, use, vgpus)
