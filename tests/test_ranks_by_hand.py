"""The methods as one rank sees them give what the single controller's lessons give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import course_lib
from course_lib import devices, ranks
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel import collectives
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import gpipe
from course_lib.parallel.tensor_parallel import ParallelMLP
from course_lib.ranks.by_hand.data_parallel import AveragedGradients, broadcast_model, shard_of
from course_lib.ranks.by_hand.messages import ring_all_reduce
from course_lib.ranks.by_hand.pipeline import StageOfRank, gpipe_step
from course_lib.ranks.by_hand.tensor_parallel import NeuronsOfRank


def on_ranks(gpus: list[torch.device], function: Callable[[], Any]) -> list[Any]:
    """``function`` on ranks that have met."""

    def with_a_group() -> Any:
        dist.init_process_group()
        return function()

    return ranks.run(with_a_group, gpus)


@pytest.fixture(autouse=True)
def _virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICES", "virtual")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", [33, 2])
def test_the_ring_is_the_controller_s_to_the_bit_and_to_the_byte(count: int, numel: int) -> None:
    torch.manual_seed(0)
    values = [torch.randn(numel) for _ in range(count)]
    gpus = devices(count)
    flat = [value.to(gpu) for value, gpu in zip(values, gpus, strict=True)]
    with course_lib.trace() as controller:
        collectives.ring_all_reduce(flat)
    expected = [tensor.cpu() for tensor in flat]

    def reduce(by: Callable[[Tensor], object]) -> Tensor:
        dist.init_process_group()
        tensor = values[dist.get_rank()].to("vgpu")
        by(tensor)
        return tensor.cpu()

    gpus = devices(count)
    for by in (ring_all_reduce, dist.all_reduce):
        with course_lib.trace(strict=True) as t:
            sums = ranks.run(reduce, gpus, by)
        for ours, theirs in zip(sums, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert t.bytes_between_devices == controller.bytes_between_devices


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(32, context=8, width=16, heads=4, depth=2, tied=False)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(32, (8, 9), generator=generator) for _ in range(count)]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1e9])
def test_averaged_gradients_train_as_gradient_buckets_do(bucket_bytes: float) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(dist.get_rank())
        model = gpt() if dist.get_rank() == 0 else GPT(32, 8, 16, 4, 2, tied=False)
        broadcast_model(model.to("vgpu"))
        averaged = AveragedGradients(model, bucket_bytes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for x, y in batches():
            optimizer.zero_grad()
            next_token_loss(model(shard_of(x).to("vgpu")), shard_of(y).to("vgpu")).backward()
            averaged.finish()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    gpus = devices(4)
    trained = on_ranks(gpus, train)
    replicas = replicate(gpt(), gpus)
    buckets = GradientBuckets(replicas, bucket_bytes)
    optimizers = [torch.optim.AdamW(replica.parameters(), lr=1e-3) for replica in replicas]
    for x, y in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        backward_on_shards(replicas, xs, ys, next_token_loss)
        buckets.finish()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(trained, replicas, strict=True):
        for one, other in zip(ours, theirs.parameters(), strict=True):
            assert torch.equal(one, other.detach().cpu())


def test_no_sync_sends_once_and_gives_the_whole_batch_s_gradient() -> None:
    (x, y), *_ = batches()

    def accumulate() -> list[Tensor]:
        model = gpt().to("vgpu")
        averaged = AveragedGradients(model, 3000)
        halves = zip(shard_of(x).chunk(2), shard_of(y).chunk(2), strict=True)
        first, second = [(a.to("vgpu"), b.to("vgpu")) for a, b in halves]
        with averaged.no_sync():
            (next_token_loss(model(first[0]), first[1]) / 2).backward()
        (next_token_loss(model(second[0]), second[1]) / 2).backward()
        averaged.finish()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None]

    gpus = devices(4)
    with course_lib.trace() as t:
        found = on_ranks(gpus, accumulate)
    whole = gpt()
    next_token_loss(whole(x), y).backward()
    for ours in found:
        for one, parameter in zip(ours, whole.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
    nbytes = sum(parameter.nbytes for parameter in whole.parameters())
    assert t.bytes_between_devices == 6 * nbytes


def test_a_gradient_that_does_not_come_is_named() -> None:
    def backward() -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("vgpu")
        averaged = AveragedGradients(model, 1e9)
        model[1](torch.ones(1, 2, device="vgpu")).sum().backward()
        averaged.finish()

    with pytest.raises(RuntimeError, match=r"backward pass for 0\.bias, 0\.weight"):
        on_ranks(devices(2), backward)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gpipe_by_ranks_gives_the_pipeline_s_gradients_to_the_bit(count: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*MLP(*[32] * 9))
    x, y, m = torch.randn(21, 32), torch.randint(32, (21,)), 3
    edges = [16 // count * stage for stage in range(count)]

    def step() -> tuple[list[float], list[Tensor]]:
        start = edges[dist.get_rank()]
        part = copy.deepcopy(layers[start : start + 16 // count]).to("vgpu")
        stage = StageOfRank(part, shape=(7, 32))
        xs = [each.to("vgpu") for each in x.chunk(m)]
        ys = [each.to("vgpu") for each in y.chunk(m)]
        losses = gpipe_step(stage, xs, ys, F.cross_entropy)
        return [each.item() for each in losses], [p.grad.cpu() for p in part.parameters()]

    gpus = devices(count)
    found = on_ranks(gpus, step)
    pipeline = Pipeline(copy.deepcopy(layers), gpus, edges[1:])
    losses = pipeline.forward_backward(gpipe(count, m), x, y, F.cross_entropy)
    assert found[-1][0] == [loss.item() for loss in losses]
    gradients = [gradient for _, own in found for gradient in own]
    for ours, parameter in zip(gradients, pipeline.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad.cpu())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_neurons_of_ranks_are_the_parallel_mlp_to_the_bit(count: int) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    x = torch.randn(5, 1, 16)

    def run() -> list[Tensor]:
        part, own = NeuronsOfRank(mlp, "vgpu"), x.to("vgpu").requires_grad_()
        out = part(own)
        out.square().mean().backward()
        return [each.cpu() for each in (out, own.grad, *(p.grad for p in part.parameters()))]

    gpus = devices(count)
    found = on_ranks(gpus, run)
    module, xs = ParallelMLP(mlp, gpus), [x.to(gpu).requires_grad_() for gpu in gpus]
    outs = module(xs)
    torch.autograd.backward([out.square().mean() for out in outs])
    shards = [module.up.weight, module.up.bias, module.down.weight, module.down.bias]
    for rank, ours in enumerate(found):
        theirs = [outs[rank], xs[rank].grad, *(list(each)[rank].grad for each in shards)]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other.cpu())
