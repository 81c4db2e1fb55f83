"""Each of PyTorch's engines on eight virtual GPUs, beside the same method written by hand.

``python tests/test_ranks_on_eight.py`` prints the table: bytes of all GPUs in the second step, the
highest peak of a GPU, simulated seconds of that step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import course_lib
from course_lib import ranks
from course_lib.models import GPT, Attention, next_token_loss
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.mesh import Mesh, MeshGPT
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedule_rules import Schedule, Step
from course_lib.parallel.schedules import gpipe, interleaved, one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.split_parameter import all_reduce_partial_gradients, unsplit
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy
from course_lib.virtual.machine import machine
from test_ranks_engines import assert_equal, nbytes_of, sgd, shard_all, shard_of, whole

N = 8
V, T, D, B = 32, 16, 32, 16  # vocabulary, tokens, width, sequences in a batch
Devices = list[torch.device]
Replicas = list[list[Tensor]]  # all parameters, of each replica
Train = Callable[[Devices], Replicas]


# Nothing waits for the host, which by hand is one for eight GPUs, and with ranks one for each.
SPEC = course_lib.CLASSROOM.with_(launch_overhead=0.0)


def gpt(depth: int = 1) -> GPT:
    torch.manual_seed(0)
    return GPT(V, context=T, width=D, heads=N, depth=depth, tied=False)


def two_blocks() -> GPT:
    return gpt(2)


def of_eight_layers() -> GPT:
    return gpt(6)


def of_sixteen_layers() -> GPT:
    return gpt(14)


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    """A batch for each of two steps, in a region that tells the meters which step it is."""
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        tokens = torch.randint(0, V, (B, T + 1), generator=generator)
        with course_lib.region(f"step {step}"):
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Measured(NamedTuple):
    replicas: Replicas
    sent: int  # bytes between GPUs in the second step
    peak: int  # most bytes in use on a GPU
    seconds: float  # of the second step, simulated


def measure(train: Train) -> Measured:
    gpus = course_lib.devices(N, SPEC)
    with course_lib.trace(strict=True) as trace:
        replicas = train(gpus)
    of_the_step = [span for span in trace.spans if span.region == "step 1"]
    # Without the batch's way from the host, which each of the two takes at another time.
    spans = [span for span in of_the_step if span.route is None or None not in span.route]
    sent = sum(span.bytes for span in spans if span.route)
    seconds = max(span.end for span in spans) - min(span.start for span in spans)
    return Measured(replicas, sent, max(trace.peak_memory), seconds)


def on_ranks(work: Callable[[], list[Tensor]]) -> Train:
    def train(gpus: Devices) -> Replicas:
        def with_a_group() -> list[Tensor]:
            dist.init_process_group()
            return work()

        return ranks.run(with_a_group, gpus)

    return train


def on_one_gpu(model: nn.Module) -> list[Tensor]:
    model = model.to("vgpu:0")
    train_on(model, sgd(model.parameters()), lambda each: each.to("vgpu:0"))
    return whole(model)


def train_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part_of: Callable[[Tensor], Tensor],
) -> None:
    for x, y in steps():
        optimizer.zero_grad()
        next_token_loss(model(part_of(x)), part_of(y)).backward()
        optimizer.step()


# ---------------------------------------------------------------------- data parallelism


def mine(batch: Tensor) -> Tensor:
    return shard_of(batch, dist.get_rank(), N)


def ddp() -> list[Tensor]:
    model = DistributedDataParallel(
        gpt().to("vgpu"), bucket_cap_mb=1000, gradient_as_bucket_view=True
    )
    train_on(model, sgd(model.parameters()), mine)
    return whole(model)


def buckets_by_hand(gpus: Devices) -> Replicas:
    replicas = replicate(gpt(), gpus)
    buckets = GradientBuckets(replicas, 10**9)
    optimizer = sgd(nn.ModuleList(replicas).parameters())
    for x, y in steps():
        optimizer.zero_grad()
        backward_on_shards(replicas, split_batch(x, gpus), split_batch(y, gpus), next_token_loss)
        buckets.finish()
        optimizer.step()
    return [whole(replica) for replica in replicas]


def fsdp() -> list[Tensor]:
    model = shard_all(gpt())
    train_on(model, sgd(model.parameters()), mine)
    return whole(model)


def stage_3_by_hand(gpus: Devices) -> Replicas:
    model = Sharded(gpt(), gpus, 3, torch.float32, make_optimizer=sgd)
    for x, y in steps():
        model.train_step(split_batch(x, gpus), split_batch(y, gpus), next_token_loss)
    return [whole(model.to_model())]


def hsdp() -> list[Tensor]:
    mesh = init_device_mesh("vgpu", (2, 4), mesh_dim_names=("replicate", "shard"))
    model = shard_all(gpt(), mesh=mesh)
    train_on(model, sgd(model.parameters()), mine)
    return whole(model)


def hybrid_by_hand(gpus: Devices) -> Replicas:
    fours = [
        Sharded(gpt(), four, 3, torch.float32, make_optimizer=sgd) for four in (gpus[:4], gpus[4:])
    ]
    for x, y in steps():
        for model, its_x, its_y in zip(fours, x.chunk(2), y.chunk(2), strict=True):
            xs, ys = split_batch(its_x, model.devices), split_batch(its_y, model.devices)
            model.zero_grad()
            model.backward(xs, ys, next_token_loss, batch_size=y.numel())
            model.join()
        for units in zip(*(model.units for model in fours), strict=True):
            for gradients in zip(*(unit.gradients for unit in units), strict=True):
                ring_all_reduce(list(gradients))
        for model in fours:
            model.step()
    return [whole(model.to_model()) for model in fours]


# ---------------------------------------------------------------------- tensor parallelism


class SplitAttention(nn.Module):
    """The course's attention, with a layer each for queries, keys and values, as DTensor wants."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_width = D // attention.heads
        self.q, self.k, self.v = (copy.deepcopy(attention.out) for _ in range(3))
        for name in ("weight", "bias"):
            thirds = getattr(attention.qkv, name).detach().chunk(3)
            for layer, third in zip((self.q, self.k, self.v), thirds, strict=True):
                getattr(layer, name).data.copy_(third)
        self.out = attention.out

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (
            layer(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def split_gpt(depth: int = 1) -> GPT:
    model = gpt(depth)
    for block in model.parts()[1]:
        block.attention = SplitAttention(block.attention)
    return model


def two_blocks_split() -> GPT:
    return split_gpt(2)


PLAN = {
    "attention": PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
    ),
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "mlp.0": ColwiseParallel(),
    "mlp.2": RowwiseParallel(),
}
ENDS = {
    "0.token": RowwiseParallel(input_layouts=Replicate()),
    "2.linear": ColwiseParallel(use_local_output=False),
}


def tensor_parallel() -> list[Tensor]:
    mesh = init_device_mesh("vgpu", (N,))
    model = split_gpt().to("vgpu")
    for block in model.parts()[1]:
        parallelize_module(block, mesh, PLAN)
    parallelize_module(model, mesh, ENDS)
    with loss_parallel():
        train_on(model, sgd(model.parameters()), lambda each: each.to("vgpu"))
    return whole(model)


def tensor_by_hand(gpus: Devices) -> Replicas:
    model = ParallelGPT(gpt(), gpus)
    optimizer = sgd(model.parameters())
    for x, y in steps():
        optimizer.zero_grad()
        x, y = x.to(gpus[0]), y.to(gpus[0])
        torch.autograd.backward(vocabulary_cross_entropy(model(x), y))
        all_reduce_partial_gradients(model)
        optimizer.step()
    return [whole(unsplit(model, gpt()))]


# ---------------------------------------------------------------------- context parallelism


class WithPositions(nn.Module):
    """A GPT that is told where its tokens stand."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens_BT: Tensor, positions_T: Tensor) -> Tensor:
        embedding, *layers = self.gpt
        x_BTD = embedding.token(tokens_BT) + embedding.position(positions_T)
        for layer in layers:
            x_BTD = layer(x_BTD)
        return x_BTD


def context_parallel_of(rotation: str) -> Callable[[], list[Tensor]]:
    def work() -> list[Tensor]:
        _attention.set_rotate_method(rotation)
        mesh = init_device_mesh("vgpu", (N,))
        model = DistributedDataParallel(
            WithPositions(gpt()).to("vgpu"), bucket_cap_mb=1000, gradient_as_bucket_view=True
        )
        optimizer = sgd(model.parameters())
        for x, y in steps():
            optimizer.zero_grad()
            parts = [each.to("vgpu") for each in (x, y, torch.arange(T))]
            with context_parallel(
                mesh, buffers=parts, buffer_seq_dims=[1, 1, 0], no_restore_buffers=set(parts)
            ):
                own_x, own_y, own_positions = parts
                next_token_loss(model(own_x, own_positions), own_y).backward()
            optimizer.step()
        return whole(model)

    return work


def context_by_hand(gpus: Devices) -> Replicas:
    model = ContextParallelGPT(gpt(), gpus)
    buckets = GradientBuckets(list(model.replicas), 10**9)
    optimizer = sgd(model.parameters())
    for x, y in steps():
        optimizer.zero_grad()
        xs, ys = (split_sequence(each, gpus, 1) for each in (x, y))
        torch.autograd.backward(next_token_losses(model(xs), ys))
        buckets.finish()
        optimizer.step()
    return [whole(replica) for replica in model.replicas]


# ---------------------------------------------------------------------- pipelines


class Cut(NamedTuple):
    """How a model, a stage a layer, is run by the engine."""

    kind: Any
    microbatches: int
    model: Callable[[], GPT]
    in_a_v: bool = False  # rank 0 has the first stage and the last, and so on

    def stages_of(self, rank: int) -> list[int]:
        stages = len(self.model())
        if stages == N:
            return [rank]
        return [rank, stages - 1 - rank if self.in_a_v else rank + N]

    def placement(self) -> list[int]:
        ranks_of = {stage: rank for rank in range(N) for stage in self.stages_of(rank)}
        return [ranks_of[stage] for stage in sorted(ranks_of)]

    def on_this_rank(self) -> tuple[Any, dict[int, nn.Module]]:
        """The schedule, and the modules of this rank's stages by their numbers."""
        rank, layers = dist.get_rank(), list(self.model())
        own = torch.device("vgpu", rank)
        modules = {stage: layers[stage].to("vgpu") for stage in self.stages_of(rank)}
        parts = [PipelineStage(module, s, len(layers), own) for s, module in modules.items()]
        given = parts[0] if len(parts) == 1 else parts
        return self.kind(given, self.microbatches, loss_fn=next_token_loss), modules


def pipelined(cut: Cut) -> Train:
    def work() -> dict[int, list[Tensor]]:
        dist.init_process_group()
        schedule, modules = cut.on_this_rank()
        last = len(cut.model()) - 1
        optimizer = sgd([p for module in modules.values() for p in module.parameters()])
        for x, y in steps():
            optimizer.zero_grad()
            given = [x.to("vgpu")] if 0 in modules else []
            target = {"target": y.to("vgpu")} if last in modules else {}
            schedule.step(*given, **target)
            optimizer.step()
        return {stage: whole(module) for stage, module in modules.items()}

    def train(gpus: Devices) -> Replicas:
        stages = {s: stage for each in ranks.run(work, gpus) for s, stage in each.items()}
        return [[parameter for s in sorted(stages) for parameter in stages[s]]]

    return train


def pipeline_by_hand(cut: Cut, make_schedule: Callable[[], Schedule]) -> Train:
    def train(gpus: Devices) -> Replicas:
        schedule, layers = make_schedule(), list(cut.model())
        devices = [gpus[place] for place in schedule.placement]
        model = Pipeline(nn.Sequential(*layers), devices, list(range(1, len(layers))))
        optimizer = sgd(model.parameters())
        for x, y in steps():
            optimizer.zero_grad()
            model.forward_backward(schedule, x, y, next_token_loss)
            optimizer.step()
        return [whole(model)]

    return train


KINDS = {
    "FORWARD": "F",
    "BACKWARD_INPUT": "B",
    "BACKWARD_WEIGHT": "W",
    "FULL_BACKWARD": "BW",
}


def order_of(cut: Cut) -> Callable[[], Schedule]:
    """The engine's own order, as a schedule for the pipeline written by hand."""

    def work() -> dict[int, list[Any]]:
        dist.init_process_group()
        return cut.on_this_rank()[0].pipeline_order

    def make_schedule() -> Schedule:
        with machine.replaced(SPEC, 0):  # so that no meter sees it
            order = ranks.run(work, course_lib.devices(N))[0]
        lists = [
            [
                Step(kind, part.stage_index, part.microbatch_index)
                for action in order[rank]
                if action is not None
                for part in action.sub_actions or [action]
                for kind in KINDS[part.computation_type.name]
            ]
            for rank in range(N)
        ]
        name = cut.kind.__name__
        return Schedule(name, cut.microbatches, cut.placement(), lists, splits_backward=True)

    return make_schedule


GPIPE = Cut(ScheduleGPipe, N, of_eight_layers)
ONE_F_ONE_B = Cut(Schedule1F1B, N, of_eight_layers)
INTERLEAVED = Cut(ScheduleInterleaved1F1B, N, of_sixteen_layers)
ZBV = Cut(ScheduleZBVZeroBubble, N // 2, of_sixteen_layers, in_a_v=True)
DUAL = Cut(ScheduleDualPipeV, 2 * N, of_sixteen_layers, in_a_v=True)


# ---------------------------------------------------------------------- 2 x 2 x 2


def mesh_of_three() -> dict[int, list[Tensor]]:
    mesh = init_device_mesh("vgpu", (2, 2, 2), mesh_dim_names=("pipe", "data", "tensor"))
    number, part = mesh.get_local_rank("pipe"), mesh.get_local_rank("data")
    layers = list(two_blocks_split())[2 * number : 2 * number + 2]
    block = layers[1 - number].to("vgpu")
    parallelize_module(block, mesh["tensor"], PLAN)
    fully_shard(block, mesh=mesh["data"])
    module = fully_shard(nn.Sequential(*layers).to("vgpu"), mesh=mesh["data"])
    own = torch.device("vgpu", dist.get_rank())
    stage = PipelineStage(module, number, 2, own, group=mesh.get_group("pipe"))
    schedule, optimizer = ScheduleGPipe(stage, 2, loss_fn=next_token_loss), sgd(module.parameters())
    for x, y in steps():
        optimizer.zero_grad()
        given = [shard_of(x, part, 2)] if number == 0 else []
        target = {"target": shard_of(y, part, 2)} if number == 1 else {}
        schedule.step(*given, **target)
        optimizer.step()
    return whole(module)


def mesh_on_ranks(gpus: Devices) -> Replicas:
    returned = on_ranks(mesh_of_three)(gpus)
    return [begin + end for begin, end in zip(returned[:4], returned[4:], strict=True)]


def mesh_by_hand(gpus: Devices) -> Replicas:
    mesh = Mesh(gpus, 2, 2, 2, ("pipeline", "data", "tensor"))
    model = MeshGPT(two_blocks(), mesh, bucket_bytes=10**9)
    optimizer = sgd(model.parameters())
    for x, y in steps():
        optimizer.zero_grad()
        model.forward_backward(model.place(x, y, microbatches=2))
        optimizer.step()
    return [whole(unsplit(replica, two_blocks())) for replica in model.replicas]


# ---------------------------------------------------------------------- the table

X = B * T * 8  # bytes of all tokens, or of all targets
A = B * T * D * 4  # of one activation of the whole batch
KV = 2 * A  # of its keys and values


def told_by_ddp() -> int:
    """Rank 0 tells the others, in every step, sizes and order: a number a parameter, and two."""
    return (N - 1) * 4 * (len(list(gpt().parameters())) + 2)


def less_by_dtensor() -> int:
    """By hand, GPU 0 hands on the tokens and the targets, where each rank has its own; and the
    largest score of each token is gathered from all, where DTensor all-reduces it."""
    scores = B * T * 4
    return -(2 * (N - 1) * X + N * (N - 1) * scores - 2 * (N - 1) * scores)


def one_hop_more() -> int:
    """The engine sends the gradients of keys and values home from where they are computed last,
    also those that were computed at home: N hops, where by hand it is N - 1."""
    return told_by_ddp() + len(gpt().parts()[1]) * KV


def more_on_the_mesh() -> int:
    """What the engines send on 2 x 2 x 2 that the mesh by hand does not.

    FSDP2 gathers a block for both microbatches and for the backward pass, and then sums: four
    times. What is in no block is gathered once and summed. By hand all gradients are summed, in two
    passes. And there embedding and head are split: sums of activations at both ends, in the loss a
    gather and a sum of two numbers a token, and tokens and targets are handed to the second GPU.
    """
    embedding, blocks, head = two_blocks().parts()
    copied = sum(2 * nbytes_of(norm) for block in blocks for norm in (block.norm_1, block.norm_2))
    copied = copied // 2 + len(blocks) * 2 * D * 4  # and the biases of layers split by rows
    in_blocks = sum(nbytes_of(block) for block in blocks) + copied  # on both tensor ranks
    at_the_ends = 2 * (nbytes_of(embedding) + nbytes_of(head))
    split = nbytes_of(embedding.token) + nbytes_of(head.linear)
    engines = 4 * in_blocks + 2 * at_the_ends
    by_hand = 2 * (in_blocks + at_the_ends - split)
    in_the_loss = 2 * B * T * 4 + 2 * 2 * B * T * 4
    return engines - by_hand - 2 * 2 * A - in_the_loss - 2 * X


class Pair(NamedTuple):
    """An engine beside the method by hand.

    Attributes:
        more: bytes that the engine sends more in a step.
        model, by_hand: what is trained.
        at_once: bytes that the engine holds and the method by hand does not, by design.
    """

    engine: Train
    hand: Train
    more: Callable[[], int] = lambda: 0
    model: Callable[[], nn.Module] = gpt
    by_hand: Callable[[], nn.Module] = gpt
    at_once: int = 0


def pipelines(cut: Cut, make_schedule: Callable[[], Schedule], at_once: int = 0) -> Pair:
    engine, hand = pipelined(cut), pipeline_by_hand(cut, make_schedule)
    return Pair(engine, hand, model=cut.model, by_hand=cut.model, at_once=at_once)


PAIRS = {
    "DDP": Pair(on_ranks(ddp), buckets_by_hand, told_by_ddp),
    "FSDP2": Pair(on_ranks(fsdp), stage_3_by_hand),
    "HSDP 2 x 4": Pair(on_ranks(hsdp), hybrid_by_hand),
    "DTensor": Pair(on_ranks(tensor_parallel), tensor_by_hand, less_by_dtensor, split_gpt),
    # It gathers the keys and values of all others at once.
    "context, gather": Pair(
        on_ranks(context_parallel_of("allgather")),
        context_by_hand,
        one_hop_more,
        at_once=(N - 1) * KV // N,
    ),
    "context, ring": Pair(on_ranks(context_parallel_of("alltoall")), context_by_hand, one_hop_more),
    "GPipe": pipelines(GPIPE, lambda: gpipe(N, N)),
    "1F1B": pipelines(ONE_F_ONE_B, lambda: one_f_one_b(N, N)),
    "interleaved": pipelines(INTERLEAVED, lambda: interleaved(N, N, 2)),
    "ZBV": pipelines(ZBV, order_of(ZBV)),
    # For each of two stages it has a place from the start for each microbatch's activation to
    # arrive in, and one for its gradient: of the two, by hand nothing is there before it comes.
    "DualPipeV": pipelines(DUAL, order_of(DUAL), at_once=2 * 2 * A),
    "2 x 2 x 2": Pair(mesh_on_ranks, mesh_by_hand, more_on_the_mesh, two_blocks_split, two_blocks),
}


@cache  # what is measured is numbers and tensors of the host: no test sees another's machine
def measured(train: Train) -> Measured:
    return measure(train)


@cache
def expected(model: Callable[[], nn.Module]) -> list[Tensor]:
    course_lib.devices(1)
    return on_one_gpu(model())


@pytest.mark.parametrize("name", PAIRS)
def test_an_engine_on_eight_gpus_is_one_gpu_and_costs_what_the_method_by_hand_costs(name):
    pair = PAIRS[name]
    engine, hand = measured(pair.engine), measured(pair.hand)
    for replica in engine.replicas:
        assert_equal(replica, expected(pair.model))
    for replica in hand.replicas:
        assert_equal(replica, expected(pair.by_hand))
    assert engine.sent - hand.sent == pair.more()
    assert engine.peak - pair.at_once == pytest.approx(hand.peak, rel=0.1)
    assert engine.seconds == pytest.approx(hand.seconds, rel=0.15)
    print(line(name))  # with -s; all of them by running this file


WIDTHS = 11, 11, 11, 11, 7, 9, 9


def line(name: str) -> str:
    engine, hand = measured(PAIRS[name].engine), measured(PAIRS[name].hand)
    values = (
        f"{engine.sent:,}",
        f"{hand.sent:,}",
        f"{engine.peak:,}",
        f"{hand.peak:,}",
        f"{engine.peak / hand.peak:.2f}",
        f"{engine.seconds * 1e3:.2f}",
        f"{hand.seconds * 1e3:.2f}",
    )
    return f"{name:16s}" + "".join(f"{v:>{w}s}" for v, w in zip(values, WIDTHS, strict=True))


def table() -> str:
    names = "sent", "by hand", "peak", "by hand", "ratio", "ms", "by hand"
    head = f"{'':16s}" + "".join(f"{name:>{w}s}" for name, w in zip(names, WIDTHS, strict=True))
    return "\n".join([head, *map(line, PAIRS)])


if __name__ == "__main__":
    print(table())
