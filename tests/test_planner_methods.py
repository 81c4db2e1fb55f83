"""Each method from both sides: the planner's seconds and bytes, and what virtual GPUs simulate.

The GPUs hold no numbers, so the models may be as wide as real ones. The planner gets what the data
sheet promises, and each operation for itself; nothing that was fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention

import course_lib
import data_sheet
from bare_gpt import BareGPT
from course_lib import ranks
from course_lib.hardware import memory_in_use
from course_lib.models import GPT, next_token_loss
from course_lib.parallel import schedules
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import backward_on_shards, parameter_copies, replicate
from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import MixtureOfExperts
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.schedule_rules import Schedule, held
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.split_parameter import all_reduce_partial_gradients
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy
from course_lib.planner import Layout, cluster, gpt
from course_lib.planner.activations import in_flight
from course_lib.planner.memory import gpu_memory
from course_lib.planner.timing import StepTime, step_time
from course_lib.timeline import Trace

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH = 8192, 512, 8192, 64, 1
BF16 = torch.bfloat16
BARE = BareGPT(VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH)
a_gpt, sizes, tokens = BARE.a_gpt, BARE.sizes, BARE.tokens
# An A100 whose host is never late. Ring attention adds up in float32: it is as fast here.
SPEC = course_lib.A100.with_(launch_overhead=0.0, flops={torch.float32: 312e12, BF16: 312e12})
SHEET = replace(data_sheet.SHEET, nvlink_part=1.0, nvlink_base=0.0, nvlink_hop=SPEC.latency)
USUAL = {"kernels": "eager", "attention": "flash2", "float32_gradients": False, "overlap": False}


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four of them that hold no numbers."""
    return course_lib.devices(4, SPEC.with_(memory=1e13), backing="meta")


def planned(layout: Layout, depth: int = DEPTH) -> StepTime:
    return step_time(sizes(depth), cluster("A100", layout.gpus), layout, SHEET)


def bytes_of(time: StepTime) -> float:
    return sum(each.count * each.bytes for each in time.collectives)


def sum_gradients(replicas: Sequence[nn.Module]) -> None:
    for copies in parameter_copies(replicas):
        ring_all_reduce([copy.grad for copy in copies])


class NoUpdate(torch.optim.Optimizer):
    """PyTorch's own updates move other bytes than the planner's."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        pass


def same_seconds(recording: Trace, time: StepTime) -> None:
    """Within 5 %; without the update."""
    assert recording.seconds == pytest.approx(time.total - time.optimizer, rel=0.05)


def test_data_parallelism(gpus: list[torch.device]) -> None:
    replicas = replicate(a_gpt(), gpus)
    xs = [tokens(8, gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        backward_on_shards(replicas, xs, xs, next_token_loss)
        sum_gradients(replicas)
    time = planned(Layout(32, LENGTH, data=4, microbatch=8, **USUAL))
    same_seconds(recording, time)
    for gpu in gpus:
        assert recording.bytes_sent(gpu) == pytest.approx(bytes_of(time), rel=1e-12)


@pytest.mark.parametrize(("stage", "pieces"), [(1, 2), (2, 2), (3, 1)])
def test_sharded_data_parallelism(gpus: list[torch.device], stage: int, pieces: int) -> None:
    """Stages 2 and 3 exchange anew for every microbatch."""
    depth = 2 if stage == 3 else DEPTH  # a planner's unit is a layer, the embedding none
    model = Sharded(a_gpt(depth), gpus, stage, BF16, NoUpdate, prefetch=False)
    xs = [tokens(8, gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        for piece in range(pieces):
            if piece < pieces - 1:
                with model.accumulate():
                    model.backward(xs, xs, next_token_loss)
            else:
                model.backward(xs, xs, next_token_loss)
        model.step()
    layout = Layout(32 * pieces, LENGTH, data=4, sharded=stage, microbatch=8, **USUAL)
    time = planned(layout, depth)
    same_seconds(recording, time)
    for gpu in gpus:
        assert recording.bytes_sent(gpu) == pytest.approx(bytes_of(time), rel=1e-9)


def test_hybrid_sharding(gpus: list[torch.device]) -> None:
    """HSDP: shards within a pair, and an all-reduce across of what each GPU owns."""
    before = [memory_in_use(gpu) for gpu in gpus]
    pairs = [Sharded(a_gpt(2), gpus[at : at + 2], 3, BF16, prefetch=False) for at in (0, 2)]
    xs = [tokens(8, gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        for at, model in zip((0, 2), pairs, strict=True):
            model.backward(
                xs[at : at + 2], xs[at : at + 2], next_token_loss, batch_size=32 * LENGTH
            )
        for model in pairs:
            model.join()
        for units in zip(*(model.units for model in pairs), strict=True):
            for place in (0, 1):
                ring_all_reduce([unit.gradients[place] for unit in units])
    layout = Layout(32, LENGTH, data=4, sharded=3, shard_group=2, microbatch=8, **USUAL)
    time = planned(layout, 2)
    same_seconds(recording, time)
    for gpu in gpus:
        assert recording.bytes_sent(gpu) == pytest.approx(bytes_of(time), rel=1e-9)
    for model in pairs:
        model.step()
    # A weight of 16 bits and one of 32 are there, and a gradient of 16; the planner has 32 and 32.
    counted = gpu_memory(sizes(2), replace(layout, float32_gradients=True), SHEET)
    state = counted.parameters + counted.gradients + counted.optimizer
    for gpu, start, x in zip(gpus, before, xs, strict=True):
        assert memory_in_use(gpu) - start - x.nbytes == pytest.approx(state, rel=1e-9)


def test_tensor_and_sequence_parallelism(gpus: list[torch.device]) -> None:
    model = ParallelGPT(a_gpt(), gpus, sequence_parallel=True)
    x = tokens(16, gpus[0])
    with course_lib.trace() as recording:
        losses = vocabulary_cross_entropy(model(x), x)
        torch.autograd.backward(losses)
        all_reduce_partial_gradients(model)
    layout = Layout(16, LENGTH, tensor=4, sequence_parallel=True, microbatch=16, **USUAL)
    time = planned(layout)
    same_seconds(recording, time)
    # The course's loss sums scores of 16 bits in 16 bits.
    half = sum(each.count * each.bytes for each in time.collectives if each.name == "loss") / 2
    for gpu in gpus[1:]:
        assert recording.bytes_sent(gpu) == pytest.approx(bytes_of(time) - half, rel=1e-9)
    to_others = 2 * 3 * x.nbytes  # inputs and targets, from the first
    assert recording.bytes_sent(gpus[0]) - to_others == recording.bytes_sent(gpus[1])


SCHEDULES = {
    "GPipe": (schedules.gpipe(2, 4), {}),
    "1F1B": (schedules.one_f_one_b(2, 4), {}),
    "interleaved": (schedules.interleaved(2, 4, 2), {"virtual_stages": 2}),
    "ZB-1p": (schedules.zero_bubble(2, 4), {}),
}


def staged(schedule: Schedule, depth: int, gpus: Sequence[torch.device]) -> Pipeline:
    stages = len(schedule.placement)
    cuts = [1 + depth * stage // stages for stage in range(1, stages)]
    return Pipeline(a_gpt(depth), [gpus[at] for at in schedule.placement], cuts)


@pytest.mark.parametrize("name", SCHEDULES)
def test_pipelines(gpus: list[torch.device], name: str) -> None:
    schedule, more = SCHEDULES[name]
    depth, two = 4, gpus[:2]
    pipeline = staged(schedule, depth, two)
    x, ys = tokens(16, two[0]), microbatches_of(tokens(16), 4, two[1])
    with course_lib.trace() as recording:
        pipeline.forward_backward(schedule, x, ys, next_token_loss)
    layout = Layout(16, LENGTH, pipeline=2, microbatch=4, schedule=name, **more, **USUAL)
    time = planned(layout, depth)
    same_seconds(recording, time)
    (sends,) = time.collectives
    # There and back at each virtual stage; but the first one receives nothing, and the last sends
    # nothing on.
    stages = 2 * layout.virtual_stages
    hops = (stages - 1) / stages
    total = sum(recording.bytes_sent(gpu) for gpu in two)
    assert total == pytest.approx(2 * hops * sends.count * sends.bytes, rel=1e-12)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ["GPipe", "1F1B", "interleaved", "ZB-1p"])
def test_a_stage_has_as_many_microbatches_in_flight_as_the_planner_says(
    name: str, devices: int
) -> None:
    make = {
        "GPipe": lambda: schedules.gpipe(devices, 8),
        "1F1B": lambda: schedules.one_f_one_b(devices, 8),
        "interleaved": lambda: schedules.interleaved(devices, 8, 2),
        "ZB-1p": lambda: schedules.zero_bubble(devices, 8),
    }
    virtual = 2 if name == "interleaved" else 1
    layout = Layout(8, LENGTH, pipeline=devices, schedule=name, virtual_stages=virtual)
    counted = [in_flight(layout, stage) * virtual for stage in range(devices)]
    assert held(make[name]()) == counted


def test_context_parallelism(gpus: list[torch.device]) -> None:
    """Short sequences and a wide model: scores and running sums, which the ring keeps in float32
    and the planner does not count, are a small part of the work."""
    length, width, rows = LENGTH // 4, 4 * WIDTH, 512
    with torch.device("meta"):
        wide = GPT(VOCABULARY, LENGTH, width, 4 * HEADS, DEPTH, tied=False).to(BF16)
    model = ContextParallelGPT(wide, gpus)
    xs = split_sequence(tokens(rows)[:, :length], gpus, dimension=1)
    model.positions_of(length, zigzag=True)
    with course_lib.trace() as recording:
        torch.autograd.backward(next_token_losses(model(xs), xs))
        sum_gradients(list(model.replicas))
    its_sizes = replace(sizes(), hidden=width, heads=4 * HEADS, kv_heads=4 * HEADS, ffn=4 * width)
    layout = Layout(rows, length, context=4, microbatch=rows, **USUAL)
    time = step_time(its_sizes, cluster("A100", 4), layout, SHEET)
    same_seconds(recording, time)
    # Three ways round: keys and values, again for the backward pass, and their gradients, which
    # are twice as large in float32.
    ring = sum(each.count * each.bytes for each in time.collectives if each.name == "context")
    for gpu in gpus:
        assert recording.bytes_sent(gpu) == pytest.approx(bytes_of(time) + ring / 3, rel=1e-12)


class WithPositions(nn.Module):
    """A GPT that is told where its tokens stand."""

    def __init__(self, whole: GPT) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, tokens_BT: Tensor, positions_T: Tensor) -> Tensor:
        embedding, blocks, head = self.whole.parts()
        x_BTD = embedding.token(tokens_BT) + embedding.position(positions_T)
        return head(nn.Sequential(*blocks)(x_BTD))


@pytest.mark.parametrize("rotation", ["alltoall", "allgather"])
@pytest.mark.parametrize(("width", "length"), [(2048, 8192), (4096, 4096)])
def test_pytorchs_context_parallelism(
    gpus: list[torch.device], width: int, length: int, rotation: str
) -> None:
    """At usual widths, its own engine; gradients are summed by another one.

    It merges each GPU's part of the attention in float32, operation by operation.
    """
    rows, members = 2, len(gpus)

    def work() -> float:
        dist.init_process_group()
        _attention.set_rotate_method(rotation)
        with torch.device("meta"):
            whole = GPT(VOCABULARY, length, width, width // 128, 1, tied=False).to(BF16)
        model = WithPositions(whole).to("vgpu")
        x = torch.zeros(rows, length, dtype=torch.int64, device="vgpu")
        parts = [x, torch.arange(length, device="vgpu")]
        mesh = init_device_mesh("vgpu", (members,))
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[1, 0],
                              no_restore_buffers=set(parts)):  # fmt: skip
            start, end = (torch.vgpu.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            start.record()
            next_token_loss(model(*parts), x).backward()
            end.record()
            torch.vgpu.synchronize()
        return start.elapsed_time(end) / 1e3

    took = max(ranks.run(work, gpus))
    model = gpt("", 1, width, width // 128, VOCABULARY)
    model = replace(model, positions=length, tied=False)
    layout = Layout(rows, length, context=members, microbatch=rows, **USUAL)
    time = step_time(model, cluster("A100", members), layout, SHEET)
    gradients = sum(each.total for each in time.collectives if each.name == "gradients")
    planned = time.total - time.optimizer - gradients
    assert planned == pytest.approx(took, rel=0.05)


def test_expert_parallelism(gpus: list[torch.device]) -> None:
    """A layer's experts; every one of them gets as many tokens."""
    with torch.device("meta"):
        moe = MixtureOfExperts(WIDTH, 4 * WIDTH, experts=8, top_k=2, capacity_factor=1.0).to(BF16)
    layer = ExpertParallel(moe, gpus)
    xs = [torch.zeros(4096, WIDTH, dtype=BF16, device=gpu, requires_grad=True) for gpu in gpus]
    with course_lib.trace() as recording:
        outputs, _ = layer(xs)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    model = replace(sizes(1), experts=8, active=2)
    layout = Layout(32, LENGTH, data=4, expert=4, microbatch=8, **USUAL)
    where = cluster("A100", 4)
    time = step_time(model, where, layout, SHEET)
    without = step_time(replace(model, ffn=1), where, layout, SHEET)  # all else of the layer
    exchange = [each for each in time.collectives if each.name == "expert"]
    seconds = sum(each.total for each in exchange)
    seconds += time.products + time.others - without.products - without.others
    assert recording.seconds == pytest.approx(seconds, rel=0.05)
    for gpu in gpus:
        sent = sum(each.count * each.bytes for each in exchange)
        assert recording.bytes_sent(gpu) == pytest.approx(sent, rel=1e-12)
