"""The methods as one rank sees them give what the single controller's lessons give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

import course_lib
from course_lib import devices, ranks
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel import collectives
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import gpipe, one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.tensor_parallel import ParallelMLP
from course_lib.ranks.by_hand import messages
from course_lib.ranks.by_hand.data_parallel import AveragedGradients, broadcast_model, shard_of
from course_lib.ranks.by_hand.messages import ring_all_reduce
from course_lib.ranks.by_hand.pipeline import StageOfRank, gpipe_step, one_f_one_b_step
from course_lib.ranks.by_hand.sharded_data_parallel import ShardedParameters
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
@pytest.mark.parametrize(("numel", "piece"), [(33, 2**21), (2, 2**21), (33, 4), (32, 8)])
def test_the_ring_is_the_controller_s_to_the_bit_and_to_the_byte(
    count: int, numel: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces too, of which a chunk has as many on every rank, whatever its length."""
    monkeypatch.setattr(messages, "PIECE", piece)
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


def one_layer_s_gradient(backward: Callable[[AveragedGradients, nn.Module, Tensor], Any]) -> Tensor:
    """What ``backward`` leaves in a layer's weights, when rank 0 has ones and rank 1 twos."""

    def run() -> Tensor:
        model = nn.Linear(2, 1).to("vgpu")
        averaged = AveragedGradients(model, 1)
        backward(averaged, model, torch.full((1, 2), dist.get_rank() + 1.0, device="vgpu"))
        assert model.weight.grad is not None
        return model.weight.grad.cpu()

    first, second = on_ranks(devices(2), run)
    assert torch.equal(first, second)
    return first


def test_no_sync_inside_no_sync_changes_nothing() -> None:
    def backward(averaged: AveragedGradients, model: nn.Module, x: Tensor) -> None:
        with averaged.no_sync():
            with averaged.no_sync():
                model(x).sum().backward()
            model(x).sum().backward()
        model(x).sum().backward()
        averaged.finish()

    assert one_layer_s_gradient(backward).tolist() == [[4.5, 4.5]]


@pytest.mark.filterwarnings("ignore::course_lib.StreamHazard")  # of what is then refused
@pytest.mark.parametrize("then", ["again", "in no_sync", "dropped"])
def test_a_second_backward_before_finish_is_refused_and_one_behind_it_is_right(then: str) -> None:
    def backward(averaged: AveragedGradients, model: nn.Module, x: Tensor) -> None:
        model(9 * x).sum().backward()
        if then == "dropped":
            model.zero_grad()
        with (
            pytest.raises(RuntimeError, match=r"came a second time before finish\(\): call finish"),
            averaged.no_sync() if then == "in no_sync" else nullcontext(),
        ):
            model(x).sum().backward()
        averaged.finish()
        model.zero_grad()
        model(x).sum().backward()
        averaged.finish()

    assert one_layer_s_gradient(backward).tolist() == [[1.5, 1.5]]


def test_averaged_gradients_leave_frozen_parameters_alone_while_they_are() -> None:
    torch.manual_seed(0)
    whole, x = MLP(4, 4, 4), torch.randn(4, 4)
    whole[0].requires_grad_(False)
    whole[2].bias.requires_grad_(False)

    def backward() -> list[Tensor | None]:
        model = copy.deepcopy(whole).to("vgpu")
        averaged = AveragedGradients(model, 1)
        model(shard_of(x).to("vgpu")).square().mean().backward()
        averaged.finish()
        gradients = [p.grad if p.grad is None else p.grad.cpu() for p in model.parameters()]
        model.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"learns that was frozen .* make it anew"):
            averaged.finish()
        return gradients

    found = on_ranks(devices(2), backward)
    whole(x).square().mean().backward()
    for ours in found:
        for one, parameter in zip(ours, whole.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad)


def test_a_gradient_that_does_not_come_is_named() -> None:
    def backward() -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("vgpu")
        averaged = AveragedGradients(model, 1e9)
        model[1](torch.ones(1, 2, device="vgpu")).sum().backward()
        averaged.finish()

    with pytest.raises(RuntimeError, match=r"backward pass for 0\.bias, 0\.weight"):
        on_ranks(devices(2), backward)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def sharded_by_hand(microbatches: int = 1) -> tuple[nn.Module, ShardedParameters]:
    """A model that was trained at stage 3, on ranks on virtual GPUs or in processes."""
    model = gpt().to(ranks.device())
    sharded = ShardedParameters(model)
    optimizer = sgd(sharded.shards)
    for x, y in batches():
        optimizer.zero_grad()
        parts = (shard_of(part).to(ranks.device()).chunk(microbatches) for part in (x, y))
        for some_x, some_y in zip(*parts, strict=True):
            (next_token_loss(model(some_x), some_y) / microbatches).backward()
        sharded.finish()
        optimizer.step()
    return model, sharded


def whole_parameters(microbatches: int = 1) -> list[Tensor]:
    model, sharded = sharded_by_hand(microbatches)
    with sharded.whole():
        return [parameter.detach().cpu().clone() for parameter in model.parameters()]


def sharded_by_engine() -> None:
    model = gpt().to(ranks.device())
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        next_token_loss(model(shard_of(x).to("vgpu")), shard_of(y).to("vgpu")).backward()
        optimizer.step()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_of_ranks_train_as_stage_3_does_to_the_bit_and_to_the_byte(count: int) -> None:
    gpus = devices(count)
    with course_lib.trace(strict=True) as t:
        found = on_ranks(gpus, whole_parameters)
    gpus = devices(count)
    sharded = Sharded(gpt(), gpus, 3, torch.float32, make_optimizer=sgd)
    with course_lib.trace(strict=True) as controller:
        for x, y in batches():
            sharded.train_step(split_batch(x, gpus), split_batch(y, gpus), next_token_loss)
    for ours in found:
        for one, other in zip(ours, sharded.to_model().parameters(), strict=True):
            assert torch.equal(one, other)
    rows = sum(unit.row_of(dict(gpt().named_parameters())).nbytes for unit in sharded.units)
    once_more = (count - 1) * rows  # by whole(), at the end
    assert t.bytes_between_devices - once_more == controller.bytes_between_devices


def test_shards_of_ranks_train_as_one_gpu_does_in_microbatches_and_in_processes() -> None:
    whole = gpt()
    optimizer = sgd(whole.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        next_token_loss(whole(x), y).backward()
        optimizer.step()

    def train() -> list[Tensor]:
        dist.init_process_group()
        return whole_parameters(microbatches=2)

    for found in (ranks.run(train, devices(2)), ranks.run(train, processes=2)):
        for ours in found:
            for one, other in zip(ours, whole.parameters(), strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-6)


def test_shards_hold_what_fully_shard_holds_within_a_hundredth() -> None:
    """And send as many bytes."""
    seen = []
    for train in (lambda: sharded_by_hand() and None, sharded_by_engine):
        gpus = devices(4)
        with course_lib.trace(strict=True) as t:
            on_ranks(gpus, train)
        seen.append((max(t.peak_memory), t.bytes_between_devices))
    (ours, sent), (theirs, sent_by_engine) = seen
    assert ours <= 1.01 * theirs
    assert sent == sent_by_engine


def test_a_frozen_layer_has_no_shards_and_is_left_out() -> None:
    torch.manual_seed(0)
    whole, x = MLP(4, 4, 4, 4), torch.randn(4, 4)
    whole[2].requires_grad_(False)

    def train() -> list[Tensor]:
        model = copy.deepcopy(whole).to("vgpu")
        with pytest.raises(ValueError, match=r"a parameter is frozen, .*: leave its layer out"):
            ShardedParameters(model)
        sharded = ShardedParameters([model[0], model[4]])
        optimizer = sgd(sharded.shards)
        model(shard_of(x).to("vgpu")).square().mean().backward()
        sharded.finish()
        optimizer.step()
        with sharded.whole():
            return [parameter.detach().cpu().clone() for parameter in model.parameters()]

    found = on_ranks(devices(2), train)
    optimizer = sgd(whole.parameters())
    whole(x).square().mean().backward()
    optimizer.step()
    for ours in found:
        for one, other in zip(ours, whole.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach())


def test_a_shard_that_gets_no_gradient_is_named_and_shared_parameters_are_refused() -> None:
    def backward() -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("vgpu")
        sharded = ShardedParameters(model)
        model[1](torch.ones(1, 2, device="vgpu")).sum().backward()
        sharded.finish()

    def share() -> None:
        layer = nn.Linear(2, 2).to("vgpu")
        ShardedParameters([layer, layer])

    with pytest.raises(RuntimeError, match="of a layer's 2 parameters, 2 got no gradient"):
        on_ranks(devices(2), backward)
    with pytest.raises(ValueError, match="two layers share a parameter"):
        on_ranks(devices(2), share)


@pytest.mark.parametrize("schedule", [(gpipe_step, gpipe), (one_f_one_b_step, one_f_one_b)])
@pytest.mark.parametrize(("count", "m"), [(1, 3), (2, 3), (4, 3), (4, 7)])
def test_a_pipeline_by_ranks_gives_the_pipeline_s_gradients_to_the_bit(
    count: int, m: int, schedule: tuple
) -> None:
    by_ranks, by_controller = schedule
    torch.manual_seed(0)
    layers = nn.Sequential(*MLP(*[32] * 9))
    x, y = torch.randn(21, 32), torch.randint(32, (21,))
    edges = [16 // count * stage for stage in range(count)]

    def step() -> tuple[list[float], list[Tensor]]:
        start = edges[dist.get_rank()]
        part = copy.deepcopy(layers[start : start + 16 // count]).to(ranks.device())
        stage = StageOfRank(part, shape=(21 // m, 32))
        xs = [each.to(ranks.device()) for each in x.chunk(m)]
        ys = [each.to(ranks.device()) for each in y.chunk(m)]
        losses = by_ranks(stage, xs, ys, F.cross_entropy)
        assert not stage.kept
        gradients = [p.grad.cpu() for p in part.parameters() if p.grad is not None]
        return [each.item() for each in losses], gradients

    gpus = devices(count)
    found = on_ranks(gpus, step)
    pipeline = Pipeline(copy.deepcopy(layers), gpus, edges[1:])
    losses = pipeline.forward_backward(by_controller(count, m), x, y, F.cross_entropy)
    assert found[-1][0] == [loss.item() for loss in losses]
    gradients = [gradient for _, own in found for gradient in own]
    for ours, parameter in zip(gradients, pipeline.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad.cpu())


@pytest.mark.parametrize("by_ranks", [gpipe_step, one_f_one_b_step])
def test_a_pipeline_by_ranks_with_padding_and_a_frozen_stage_is_one_gpu_s_step(
    by_ranks: Callable,
) -> None:
    whole, ((x, y), *_) = gpt(), batches()
    whole[0].requires_grad_(False)
    y[:2] = y[2:4, :5] = -100  # the first microbatch has no other targets

    def step() -> tuple[float, list[Tensor | None]]:
        rank = dist.get_rank()
        part = copy.deepcopy(nn.Sequential(*list(whole)[rank : rank + 1 if rank < 1 else None]))
        stage = StageOfRank(part.to("vgpu"), (2, 8, 16))
        xs, ys = x.to("vgpu").chunk(4), y.to("vgpu").chunk(4)
        losses = by_ranks(stage, xs, ys, next_token_loss)
        gradients = [p.grad if p.grad is None else p.grad.cpu() for p in part.parameters()]
        return sum(loss.item() for loss in losses), gradients

    found = on_ranks(devices(2), step)
    loss = next_token_loss(whole(x), y)
    loss.backward()
    assert found[-1][0] == pytest.approx(loss.item())
    for one, parameter in zip(found[0][1] + found[1][1], whole.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


WIDTH, MICROBATCHES = 64, 8  # of the pipeline below


def pipelined(by: str) -> list[Tensor]:
    """For ranks on virtual GPUs and in processes: gradients of this rank's stage after a step."""
    dist.init_process_group()
    rank, count, device = dist.get_rank(), dist.get_world_size(), ranks.device()
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
    x, y = torch.randn(2, 16 * MICROBATCHES, WIDTH)
    part = whole[4 // count * rank : 4 // count * (rank + 1)].to(device)
    x, y = x.to(device), y.to(device)
    if by == "hand":
        stage = StageOfRank(part, (16, WIDTH))
        xs, ys = x.chunk(MICROBATCHES), y.chunk(MICROBATCHES)
        one_f_one_b_step(stage, xs, ys, F.mse_loss)
    else:
        engine = PipelineStage(part, rank, count, device)
        schedule = Schedule1F1B(engine, MICROBATCHES, loss_fn=F.mse_loss)
        inputs = [x] if rank == 0 else []
        schedule.step(*inputs, **({"target": y} if rank == count - 1 else {}))
    return [p.grad.cpu() for p in part.parameters() if p.grad is not None]


def test_1f1b_by_ranks_is_one_gpu_s_step_and_holds_no_more_than_the_engine() -> None:
    peaks, found = {}, {}
    for by in ("hand", "engine"):
        gpus = devices(4)
        with course_lib.trace(strict=True) as t:
            found[by] = ranks.run(pipelined, gpus, by)
        peaks[by] = max(t.peak_memory)
    assert peaks["hand"] <= 1.05 * peaks["engine"]
    found["one GPU"] = ranks.run(pipelined, devices(1), "hand")
    found["processes"] = ranks.run(pipelined, None, "hand", processes=2)
    ours = found.pop("hand")
    for name, theirs in found.items():
        for one, other in zip(chain(*ours), chain(*theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)


def test_1f1b_holds_as_many_microbatches_as_there_are_stages_from_here_on() -> None:
    def most_kept() -> int:
        stage = StageOfRank(nn.Linear(4, 4).to("vgpu"), (1, 4))
        most, forward = [0], stage.forward

        def watched(i: int, x: Tensor | None) -> Tensor:
            out = forward(i, x)
            most.append(len(stage.kept))
            return out

        stage.forward = watched  # type: ignore[method-assign]
        xs = list(torch.ones(6, 1, 4, device="vgpu"))
        one_f_one_b_step(stage, xs, xs, F.mse_loss)
        return max(most)

    assert on_ranks(devices(4), most_kept) == [4, 3, 2, 1]


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


def test_neurons_of_a_frozen_mlp_are_frozen() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    mlp[0].requires_grad_(False)
    mlp[2].bias.requires_grad_(False)

    def learning() -> list[str]:
        part = NeuronsOfRank(mlp, "vgpu")
        return [name for name, each in part.named_parameters() if each.requires_grad]

    assert on_ranks(devices(2), learning) == [["down_weight"]] * 2
