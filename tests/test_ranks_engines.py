"""PyTorch's own engines on four virtual GPUs: one GPU's parameters, and bytes known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import course_lib
from course_lib import ranks
from course_lib.models import GPT, next_token_loss
from course_lib.parallel import gradient_buckets
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded

N = 4
V, T, D = 32, 8, 16  # vocabulary, tokens, width
STEPS = 2
Batch = tuple[Tensor, Tensor]
Train = Callable[[], list[Tensor]]


def gpt(depth: int = 2, vocabulary: int = V) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary, context=T, width=D, heads=4, depth=depth, tied=False)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, V, (8, T + 1), generator=generator) for _ in range(STEPS)]
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, foreach=False)


def on_one_gpu(model: nn.Module) -> list[Tensor]:
    model = model.to("vgpu:0")
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        next_token_loss(model(x.to("vgpu:0")), y.to("vgpu:0")).backward()
        optimizer.step()
    return whole(model)


def whole(model: nn.Module) -> list[Tensor]:
    """All parameters on the host; on a GPU no more than one of them is whole at a time."""
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu()
        for p in model.parameters()
    ]


def shard_of(batch: Tensor, rank: int, count: int = N) -> Tensor:
    return batch.chunk(count)[rank].to("vgpu")


def train(
    model: nn.Module,
    rank: int,
    count: int = N,
    loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss,
) -> None:
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        loss(model(shard_of(x, rank, count)), shard_of(y, rank, count)).backward()
        optimizer.step()


def bytes_a_step(trace: course_lib.Trace, gpu: torch.device) -> float:
    return trace.bytes_sent(gpu) / STEPS


@contextmanager
def traced(vgpus: list[torch.device], function: Callable[[], Any]) -> Iterator[tuple[Any, Any]]:
    with course_lib.trace(strict=True) as trace:
        returned = ranks.run(function, vgpus)
    yield trace, returned


def assert_equal(one: list[Tensor], other: list[Tensor], within: float = 1e-6) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert (mine - theirs).abs().max().item() <= within


def nbytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


# ---------------------------------------------------------------------- data parallelism


def ddp(**options: Any) -> Train:
    def work() -> list[Tensor]:
        dist.init_process_group()
        model = DistributedDataParallel(gpt().to("vgpu"), **options)
        train(model, dist.get_rank())
        return whole(model)

    return work


def ddp_with_no_sync() -> list[Tensor]:
    dist.init_process_group()
    model = DistributedDataParallel(gpt().to("vgpu"))
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        x, y = shard_of(x, dist.get_rank()), shard_of(y, dist.get_rank())
        with model.no_sync():
            (next_token_loss(model(x[:1]), y[:1]) / 2).backward()
        (next_token_loss(model(x[1:]), y[1:]) / 2).backward()
        optimizer.step()
    return whole(model)


def ddp_with_a_hook() -> list[Tensor]:
    dist.init_process_group()
    model = DistributedDataParallel(gpt().to("vgpu"))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    train(model, dist.get_rank())
    return whole(model)


@pytest.mark.parametrize(
    "work",
    [
        ddp(),
        ddp(gradient_as_bucket_view=True),
        ddp(bucket_cap_mb=0.01),
        ddp(find_unused_parameters=True),
        ddp(static_graph=True),
        ddp_with_no_sync,
        ddp_with_a_hook,
    ],
    ids=["plain", "views", "buckets", "unused", "static", "no_sync", "hook"],
)
def test_ddp_equals_one_gpu(vgpus, work):
    expected = on_one_gpu(gpt())
    for parameters in ranks.run(work, vgpus):
        assert_equal(parameters, expected)


def test_ddp_sends_what_buckets_by_hand_send(vgpus):
    def by_hand() -> None:
        replicas = replicate(gpt(), vgpus)
        buckets = gradient_buckets.GradientBuckets(replicas, 10**9)
        optimizers = [sgd(replica.parameters()) for replica in replicas]
        for x, y in batches():
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward_on_shards(
                replicas, split_batch(x, vgpus), split_batch(y, vgpus), next_token_loss
            )
            buckets.finish()
            for optimizer in optimizers:
                optimizer.step()

    def by_ddp(steps: bool) -> Callable[[], None]:
        def work() -> None:
            dist.init_process_group()
            model = DistributedDataParallel(gpt().to("vgpu"), bucket_cap_mb=1000)
            if steps:
                train(model, dist.get_rank())

        return work

    with course_lib.trace() as trace:
        by_hand()
    hand = trace.bytes_between_devices
    with traced(vgpus, by_ddp(steps=False)) as (trace, _):
        start = trace.bytes_between_devices  # it makes the models the same once
    # After the first step it says once in which order the gradients came, in which buckets.
    order = (N - 1) * 4 * (len(list(gpt().parameters())) + 2)
    with traced(vgpus, by_ddp(steps=True)) as (trace, _):
        assert trace.bytes_between_devices - start - order == hand


def test_ddp_sends_gradients_while_backward_computes(vgpus):
    with traced(vgpus, ddp(bucket_cap_mb=0.002)) as (trace, _):
        copies = [s for s in trace.spans if s.route and None not in s.route]
        computing = [s for s in trace.spans if s.name == "mm"]
    overlaps = [
        copy for copy in copies for s in computing if s.start < copy.end and copy.start < s.end
    ]
    assert overlaps


def test_no_gpu_waits_for_a_bucket_before_the_last_whichever_rank_comes_last():
    """In each step another rank may come last to a bucket, and its GPU must compute on as well."""
    gpus = course_lib.devices(N, course_lib.CLASSROOM.with_(launch_overhead=0.0))
    torch.manual_seed(0)
    model = GPT(V, context=T, width=64, heads=4, depth=4, tied=False)
    seconds = []

    def work(cap: float) -> None:
        dist.init_process_group()
        engine = DistributedDataParallel(copy.deepcopy(model).to("vgpu"), bucket_cap_mb=cap)
        x = torch.zeros(32, T, dtype=torch.int64, device="vgpu")
        for step in range(3):
            with course_lib.region(f"step {step}"):
                next_token_loss(engine(x), x).backward()

    for cap in (0.2, 1000):
        with traced(gpus, lambda cap=cap: work(cap)) as (trace, _):
            last = [span for span in trace.spans if span.region == "step 2"]
        seconds.append(max(span.end for span in last) - min(span.start for span in last))
    overlapped, one_bucket = seconds
    assert overlapped < 0.92 * one_bucket


def test_ddp_prints_nothing_of_its_own(vgpus, capfd):
    ranks.run(ddp(), vgpus)
    assert capfd.readouterr().err == ""


def test_gradients_in_bfloat16_are_half_the_bytes(vgpus):
    def with_hook() -> list[Tensor]:
        dist.init_process_group()
        model = DistributedDataParallel(gpt().to("vgpu"))
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        train(model, dist.get_rank())
        return whole(model)

    with traced(vgpus, ddp()) as (trace, _):
        plain = trace.bytes_between_devices
    with traced(vgpus, with_hook) as (trace, (parameters, *_)):
        halved = plain - trace.bytes_between_devices
    assert halved == STEPS * 2 * (N - 1) * nbytes_of(gpt()) // 2
    assert_equal(parameters, on_one_gpu(gpt()), within=1e-3)


# ---------------------------------------------------------------------- sharded data parallelism


def shard_all(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(**options: Any) -> Train:
    def work() -> list[Tensor]:
        dist.init_process_group()
        model = shard_all(gpt().to("vgpu"), **options)
        train(model, dist.get_rank())
        return whole(model)

    return work


def fsdp_of_a_model_on_the_cpu() -> list[Tensor]:
    dist.init_process_group()
    model = shard_all(gpt())
    train(model, dist.get_rank())
    return whole(model)


def fsdp_that_accumulates() -> list[Tensor]:
    dist.init_process_group()
    model: Any = shard_all(gpt().to("vgpu"))
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        x, y = shard_of(x, dist.get_rank()), shard_of(y, dist.get_rank())
        model.set_requires_gradient_sync(False)
        (next_token_loss(model(x[:1]), y[:1]) / 2).backward()
        model.set_requires_gradient_sync(True)
        (next_token_loss(model(x[1:]), y[1:]) / 2).backward()
        optimizer.step()
    return whole(model)


def hsdp() -> list[Tensor]:
    dist.init_process_group()
    mesh = init_device_mesh("vgpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard_all(gpt().to("vgpu"), mesh=mesh)
    train(model, dist.get_rank())
    return whole(model)


# In bytes of the model that each GPU sends in one step: a part of (N - 1) / N for each gather of
# parameters and each sum of gradients.
@pytest.mark.parametrize(
    ("work", "models_sent"),
    [
        (fsdp(), 3 * 0.75),
        (fsdp(reshard_after_forward=False), 2 * 0.75),
        (fsdp_of_a_model_on_the_cpu, 3 * 0.75),
        (fsdp_that_accumulates, 5 * 0.75),
        # Over two shards, then the sum of half a model over two replicas.
        (hsdp, 3 * 0.5 + 2 * 0.5 * 0.5),
    ],
    ids=["reshard", "keep", "cpu", "accumulate", "hsdp"],
)
def test_fsdp_equals_one_gpu(vgpus, work, models_sent):
    at_the_end = 0.75 if work is not hsdp else 0.5  # full_tensor() gathers once more
    with traced(vgpus, work) as (trace, returned):
        sent = [trace.bytes_sent(gpu) for gpu in vgpus]
    expected = on_one_gpu(gpt())
    for parameters in returned:
        assert_equal(parameters, expected)
    nbytes = nbytes_of(gpt())
    assert sent == pytest.approx([(STEPS * models_sent + at_the_end) * nbytes] * N, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [V, V + 1])
def test_fsdp_sends_what_stage_3_by_hand_sends(vgpus, vocabulary):
    def by_engine() -> None:
        dist.init_process_group()
        train(shard_all(gpt(vocabulary=vocabulary).to("vgpu")), dist.get_rank())

    sharded = Sharded(gpt(vocabulary=vocabulary), vgpus, 3, torch.float32, make_optimizer=sgd)
    with course_lib.trace() as trace:
        for x, y in batches():
            sharded.train_step(split_batch(x, vgpus), split_batch(y, vgpus), next_token_loss)
    hand = bytes_a_step(trace, vgpus[0])
    with traced(vgpus, by_engine) as (trace, _):
        engine = bytes_a_step(trace, vgpus[0])
    # The engine shards each parameter by rows, and pads them: those of the embedding and the head.
    padding = 2 * (-vocabulary % N) * D * 4
    assert engine == hand + 3 * 0.75 * padding


@pytest.mark.parametrize(
    "make",
    [
        lambda: shard_all(gpt().to("vgpu")),
        lambda: DistributedDataParallel(gpt().to("vgpu"), bucket_cap_mb=0.002),
        lambda: DistributedDataParallel(gpt().to("vgpu"), find_unused_parameters=True),
        lambda: DistributedDataParallel(gpt().to("vgpu"), static_graph=True),
    ],
    ids=["FSDP2", "DDP", "DDP, unused", "DDP, static"],
)
def test_without_numbers_bytes_memory_and_time_are_the_same(make):
    def work() -> None:
        dist.init_process_group()
        train(make(), dist.get_rank())

    def measured(backing: str) -> tuple[int, list[int], float]:
        gpus = course_lib.devices(N, backing=backing)
        with traced(gpus, work) as (trace, _):
            return trace.bytes_between_devices, trace.peak_memory, trace.seconds

    (sent, peaks, seconds), real = measured("meta"), measured("cpu")
    assert (sent, peaks) == real[:2]
    assert seconds == pytest.approx(real[2], rel=0.05)


def test_without_numbers_only_ddp_s_own_messages_are_read():
    def work() -> None:
        dist.init_process_group()
        model = DistributedDataParallel(gpt().to("vgpu"))
        model(shard_of(batches()[0][0], dist.get_rank())).sum().item()

    with pytest.raises(RuntimeError, match="these virtual GPUs have none"):
        ranks.run(work, course_lib.devices(N, backing="meta"))


def test_fsdp_in_mixed_precision(vgpus):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def work() -> list[Tensor]:
        dist.init_process_group()
        model = shard_all(gpt().to("vgpu"), mp_policy=policy)
        train(model, dist.get_rank(), loss=lambda out, y: next_token_loss(out.float(), y))
        return whole(model)

    with traced(vgpus, work) as (trace, returned):
        sent = trace.bytes_sent(vgpus[0])
    # Two gathers in two bytes a number, a sum in four; one more gather at the end.
    models_sent = STEPS * 0.75 * (0.5 + 0.5 + 1) + 0.75
    assert sent == pytest.approx(models_sent * nbytes_of(gpt()), rel=1e-3)
    assert_equal(returned[0], on_one_gpu(gpt()), within=1e-3)


def test_fsdp_holds_a_part_of_the_model(vgpus):
    """What is freed by shrinking storages is free."""

    def in_use() -> tuple[int, int]:
        dist.init_process_group()
        model = shard_all(gpt().to("vgpu"))
        before = torch.vgpu.memory_allocated()
        out = model(shard_of(batches()[0][0], dist.get_rank()))
        del out
        return before, torch.vgpu.memory_allocated()

    for before, after in ranks.run(in_use, vgpus):
        assert before == pytest.approx(nbytes_of(gpt()) / N, rel=0.1)
        # The root keeps its own parameters after forward: here they are in its layers.
        assert after <= 1.6 * before


def test_to_gather_a_layer_takes_a_row_and_its_parameters(vgpus):
    """And no copy of the row: the operator that fills it returns parts of what it is given."""

    def gather() -> list[int]:
        dist.init_process_group()
        model: Any = shard_all(gpt())
        before = torch.vgpu.memory_allocated()
        torch.vgpu.reset_peak_memory_stats()
        model[1].unshard()
        taken = torch.vgpu.max_memory_allocated(), torch.vgpu.memory_allocated()
        return [each - before for each in taken]

    layer = nbytes_of(gpt()[1])
    assert ranks.run(gather, vgpus) == [[2 * layer, layer]] * N


# ---------------------------------------------------------------------- tensor parallelism


class Attention(nn.Module):
    """As in ``models``, with products of their own for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = [nn.Linear(D, D) for _ in range(4)]

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = [
            layer(x_BTD).view(B, T, -1, D // N).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(D), Attention()
        self.norm_2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))
        return x_BTD + self.down(nn.functional.gelu(self.up(self.norm_2(x_BTD))))


def splittable() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, D), Block(), Block(), nn.Linear(D, V, bias=False))


TENSOR_PLAN = {
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def tensor_parallel() -> list[Tensor]:
    dist.init_process_group()
    mesh = init_device_mesh("vgpu", (N,))
    model = splittable().to("vgpu")
    for block in model[1:3]:
        parallelize_module(block, mesh, TENSOR_PLAN)
    train(model, 0, count=1)
    return whole(model)


def sequence_parallel() -> list[Tensor]:
    dist.init_process_group()
    mesh = init_device_mesh("vgpu", (N,))
    model = splittable().to("vgpu")
    in_rows = Shard(1)
    parallelize_module(
        model,
        mesh,
        {
            "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=in_rows),
            "3": ColwiseParallel(
                input_layouts=in_rows, output_layouts=Shard(-1), use_local_output=False
            ),
        },
    )
    for block in model[1:3]:
        plan = {
            **TENSOR_PLAN,
            "norm_1": SequenceParallel(),
            "norm_2": SequenceParallel(),
            "attention": PrepareModuleInput(
                input_layouts=(in_rows,), desired_input_layouts=(Replicate(),)
            ),
            "attention.out": RowwiseParallel(output_layouts=in_rows),
            "up": ColwiseParallel(input_layouts=in_rows),
            "down": RowwiseParallel(output_layouts=in_rows),
        }
        parallelize_module(block, mesh, plan)
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        with loss_parallel():
            next_token_loss(model(x.to("vgpu")), y.to("vgpu")).backward()
        optimizer.step()
    return whole(model)


def tensor_and_data_parallel() -> list[Tensor]:
    dist.init_process_group()
    mesh = init_device_mesh("vgpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = splittable().to("vgpu")
    for block in model[1:3]:
        parallelize_module(block, mesh["tensor"], TENSOR_PLAN)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    train(model, mesh.get_local_rank("data"), count=2)
    return whole(model)


@pytest.mark.parametrize("work", [tensor_parallel, sequence_parallel, tensor_and_data_parallel])
def test_tensor_parallelism_equals_one_gpu(vgpus, work):
    expected = on_one_gpu(splittable())
    with traced(vgpus, work) as (_, returned):
        for parameters in returned:
            assert_equal(parameters, expected)


def test_tensor_parallelism_sends_an_all_reduce_for_each_boundary(vgpus):
    def without_the_end() -> None:
        dist.init_process_group()
        mesh = init_device_mesh("vgpu", (N,))
        model = splittable().to("vgpu")
        torch.vgpu.synchronize()
        for block in model[1:3]:
            parallelize_module(block, mesh, TENSOR_PLAN, src_data_rank=None)
        train(model, 0, count=1)

    with traced(vgpus, without_the_end) as (trace, _):
        sent = [bytes_a_step(trace, gpu) for gpu in vgpus]
    activation = 8 * T * D * 4
    forward = backward = 2 * 2  # two blocks of an attention and an MLP
    in_backward = 2 * (3 + 1) - forward  # q, k and v each sum their own: two more in attention
    boundaries = forward + backward + in_backward
    assert sent == [boundaries * 2 * 0.75 * activation] * N


# ---------------------------------------------------------------------- pipelines


def pipeline(schedule: Any, stages: int, in_a_v: bool = False, microbatches: int = 4) -> Any:
    def work() -> dict[int, list[Tensor]]:
        dist.init_process_group()
        rank, layers = dist.get_rank(), list(gpt(depth=6))
        size = len(layers) // stages
        mine = [rank] if stages == N else [rank, stages - 1 - rank if in_a_v else rank + N]
        modules = [nn.Sequential(*layers[s * size : (s + 1) * size]).to("vgpu") for s in mine]
        built = [
            PipelineStage(module, stage, stages, torch.device("vgpu", rank))
            for stage, module in zip(mine, modules, strict=True)
        ]
        runs = schedule(built[0] if stages == N else built, microbatches, loss_fn=next_token_loss)
        optimizer = sgd([p for module in modules for p in module.parameters()])
        for x, y in batches():
            optimizer.zero_grad()
            given = [x.to("vgpu")] if 0 in mine else []
            target = {"target": y.to("vgpu")} if stages - 1 in mine else {}
            runs.step(*given, **target)
            optimizer.step()
        return {s: whole(module) for s, module in zip(mine, modules, strict=True)}

    return work


@pytest.mark.parametrize(
    ("work", "hops"),
    [
        (pipeline(ScheduleGPipe, N), 3),
        (pipeline(Schedule1F1B, N), 3),
        (pipeline(ScheduleInterleaved1F1B, 2 * N), 7),
        (pipeline(ScheduleZBVZeroBubble, 2 * N, in_a_v=True), 6),  # the V turns inside of a rank
        (pipeline(ScheduleDualPipeV, 2 * N, in_a_v=True, microbatches=8), 6),
    ],
    ids=["GPipe", "1F1B", "interleaved", "ZBV", "DualPipeV"],
)
def test_pipelines_equal_one_gpu(vgpus, work, hops):
    expected = on_one_gpu(gpt(depth=6))
    with traced(vgpus, work) as (trace, returned):
        sent = sum(s.bytes for s in trace.spans if s.route and None not in s.route)
    stages = {stage: parameters for each in returned for stage, parameters in each.items()}
    assert_equal([p for stage in sorted(stages) for p in stages[stage]], expected)
    activation = 8 * T * D * 4
    there_and_back = 2 * hops * activation * STEPS
    assert sent == pytest.approx(there_and_back, rel=0.05)  # and the shapes, once


def test_a_pipeline_sends_what_the_one_by_hand_sends(vgpus):
    layers = list(gpt(depth=6))
    by_hand = Pipeline(nn.Sequential(*layers), vgpus, [2, 4, 6])
    with course_lib.trace() as trace:
        for x, y in batches():
            by_hand.forward_backward(one_f_one_b(N, 4), x, y, next_token_loss)
    hand = trace.bytes_between_devices
    with traced(vgpus, pipeline(Schedule1F1B, N)) as (trace, _):
        engine = trace.bytes_between_devices
    assert hand == STEPS * 2 * 3 * 8 * T * D * 4
    assert hand < engine <= 1.05 * hand  # the engine tells each stage the shapes, once


# ---------------------------------------------------------------------- eight ranks


def ddp_on_all() -> list[Tensor]:
    dist.init_process_group()
    model = DistributedDataParallel(gpt().to("vgpu"), bucket_cap_mb=0.01)
    train(model, dist.get_rank(), dist.get_world_size())
    return whole(model)


def test_ddp_on_eight_ranks_equals_one_gpu():
    """What all engines cost there is in ``test_ranks_on_eight``."""
    gpus = course_lib.devices(8)
    expected = on_one_gpu(gpt())
    for parameters in ranks.run(ddp_on_all, gpus):
        assert_equal(parameters, expected)
