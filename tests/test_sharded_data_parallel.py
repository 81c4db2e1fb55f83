"""Sharded data parallelism is the same training in less memory, and moves what the paper says."""

from __future__ import annotations

import gc
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib import A100, memory_in_use, trace
from course_lib.hardware import fresh_devices
from course_lib.models import GPT, MLP, next_token_loss, parameter_count
from course_lib.parallel import data_parallel, sharded_data_parallel
from course_lib.parallel.data_parallel import replicate, split_batch
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.sharded_data_parallel import Sharded

CLOSE = 1e-12
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
stages = pytest.mark.parametrize("stage", [0, 1, 2, 3])
counts = pytest.mark.parametrize("count", [1, 2, 3, 4])


def lesson_02(model, gpus, batches, loss_function, make_optimizer=ADAMW) -> nn.Module:
    replicas = replicate(model, gpus)
    optimizers = [make_optimizer(replica.parameters()) for replica in replicas]
    for x, y in batches:
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        data_parallel.train_step(replicas, optimizers, xs, ys, loss_function)
    return replicas[0]


def train(sharded: Sharded, batches, loss_function) -> list[torch.Tensor]:
    with trace(strict=True):
        for x, y in batches:
            xs, ys = split_batch(x, sharded.devices), split_batch(y, sharded.devices)
            losses = sharded.train_step(xs, ys, loss_function)
    return losses


def image_batches(*sizes: int) -> list:
    torch.manual_seed(0)
    return [(torch.randn(n, 6).double(), torch.randint(5, (n,))) for n in sizes]


def an_mlp() -> MLP:
    torch.manual_seed(1)
    return MLP(6, 7, 5, 5).double()  # rows of 49, 40 and 30 numbers: most need padding


@stages
@counts
def test_an_mlp_trains_as_in_lesson_02(vgpus, stage: int, count: int) -> None:
    model, gpus, batches = an_mlp(), vgpus[:count], image_batches(12, 7, 2)
    sharded = Sharded(model, gpus, stage, torch.float64, ADAMW)
    train(sharded, batches, F.cross_entropy)
    expected = lesson_02(model, gpus, batches, F.cross_entropy)
    assert largest_difference(sharded.to_model(), expected) < CLOSE
    assert largest_difference(sharded.to_model(), model) > 0.01


@stages
def test_a_gpt_trains_as_in_lesson_02(vgpus, stage: int) -> None:
    torch.manual_seed(1)
    model = GPT(11, context=4, width=8, heads=2, depth=1, tied=False).double()
    batches = [(torch.randint(11, (n, 4)), torch.randint(11, (n, 4))) for n in (5, 1)]
    sharded = Sharded(model, vgpus[:3], stage, torch.float64, ADAMW)
    train(sharded, batches, next_token_loss)
    expected = lesson_02(model, vgpus[:3], batches, next_token_loss)
    assert largest_difference(sharded.to_model(), expected) < CLOSE


@stages
def test_other_optimizers_and_float32_train_as_in_lesson_02(vgpus, stage: int) -> None:
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = an_mlp().float()
    batches = [(x.float(), y) for x, y in image_batches(12, 7, 2)]
    sharded = Sharded(model, vgpus[:3], stage, torch.float32, sgd)
    train(sharded, batches, F.cross_entropy)
    expected = lesson_02(model, vgpus[:3], batches, F.cross_entropy, sgd)
    assert largest_difference(sharded.to_model(), expected) < 1e-6


@pytest.mark.parametrize("stage", [0, 3])
def test_dropout_drops_the_same(vgpus, stage: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5)).double()
    batches = image_batches(12, 8)
    sharded = Sharded(model, vgpus[:2], stage, torch.float64, ADAMW)
    torch.manual_seed(2)
    train(sharded, batches, F.cross_entropy)
    torch.manual_seed(2)
    expected = lesson_02(model, vgpus[:2], batches, F.cross_entropy)
    assert largest_difference(sharded.to_model(), expected) < CLOSE


def test_the_model_may_start_on_a_device_and_stays_as_it_is(vgpus) -> None:
    model = an_mlp().to(vgpus[1])
    sharded = Sharded(model, vgpus[:2], 3, torch.float64, ADAMW)
    train(sharded, image_batches(8), F.cross_entropy)
    assert largest_difference(model, an_mlp()) == 0
    expected = lesson_02(an_mlp(), vgpus[:2], image_batches(8), F.cross_entropy)
    assert largest_difference(sharded.to_model(), expected) < CLOSE


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replicas_of_the_parameters_stay_bit_identical(vgpus, stage: int) -> None:
    sharded = Sharded(an_mlp(), vgpus, stage, torch.bfloat16, ADAMW)
    train(sharded, image_batches(12, 7), F.cross_entropy)
    for unit in sharded.units:
        first, *others = [row.detach().cpu() for row in unit.rows]
        assert first.any()
        assert all(torch.equal(first, other) for other in others)


@stages
def test_the_losses_add_up_to_the_loss_of_the_batch(vgpus, stage: int) -> None:
    ((x, y),) = image_batches(3)
    model = an_mlp()
    losses = train(Sharded(model, vgpus, stage, torch.float64), [(x, y)], F.cross_entropy)
    assert len(losses) == 3  # the fourth shard is empty
    total = sum(loss.item() for loss in losses)
    assert total == pytest.approx(F.cross_entropy(model(x), y).item(), abs=CLOSE)


LARGE = parameter_count(MLP(48, 48, 48, 48))  # up to 4 devices divide its rows


def large_mlp(gpus, stage: int, depth: int = 3, width: int = 48, prefetch: bool = True) -> Sharded:
    with torch.device("meta"):
        model = MLP(*[width] * (depth + 1))
    sharded = Sharded(model, gpus, stage, prefetch=prefetch)
    step(sharded, width)  # the first one makes the optimizer's state
    return sharded


def step(sharded: Sharded, width: int, examples: int = 4):
    x = torch.empty(examples, width, device="meta")
    y = torch.empty(examples, dtype=torch.int64, device="meta")
    xs, ys = split_batch(x, sharded.devices), split_batch(y, sharded.devices)
    with trace(strict=True) as t:
        sharded.train_step(xs, ys, F.cross_entropy)
    return t


@cache
def held_and_sent(stage: int, count: int) -> tuple[list[int], list[int]]:
    """For each device, bytes in use after a step, and bytes sent in it."""
    with fresh_devices(count, A100, "meta") as gpus:
        sharded = large_mlp(gpus, stage)
        t = step(sharded, 48)
        sent = [0] * count
        for (source, destination), nbytes in t.bytes_moved.items():
            if "host" not in (source, destination):
                sent[int(source.removeprefix("vgpu:"))] += nbytes
        return [memory_in_use(gpu) for gpu in gpus], sent


@stages
@counts
def test_a_device_holds_the_bytes_a_parameter_of_the_paper(stage: int, count: int) -> None:
    held, _ = held_and_sent(stage, count)
    each = [16, 4 + 12 / count, 2 + 14 / count, 16 / count][stage]
    assert held == [each * LARGE] * count


@stages
@counts
def test_a_device_sends_the_bytes_of_the_paper(stage: int, count: int) -> None:
    _, sent = held_and_sent(stage, count)
    times = [2, 2, 2, 3][stage] * (count - 1) / count
    assert sent == [times * 2 * LARGE] * count


def test_the_peak_of_stage_3_is_its_share_and_a_few_units() -> None:
    with fresh_devices(4, A100, "meta") as gpus:
        depth, width = 6, 512
        sharded = large_mlp(gpus, 3, depth, width)
        unit = width * width + width
        peak = step(sharded, width).peak_memory[0]
        # Parameters of two units, gradients of one in pieces and in a row: 2 bytes each.
        assert peak < 16 / 4 * depth * unit + 4 * 2 * unit + 0.3 * unit


def test_a_model_too_large_for_one_device_trains_at_stage_3() -> None:
    with fresh_devices(4, A100, "meta") as gpus, pytest.raises(torch.OutOfMemoryError):
        large_mlp(gpus, 0, depth=6, width=2**15)  # 6.4 billion parameters
    with fresh_devices(4, A100, "meta") as gpus:
        large_mlp(gpus, 3, depth=6, width=2**15)


@pytest.mark.parametrize("prefetch, at_once", [(True, 2), (False, 1)])
def test_so_many_units_are_gathered_at_once(monkeypatch, prefetch: bool, at_once: int) -> None:
    with fresh_devices(3, A100, "meta") as gpus:
        sharded = large_mlp(gpus, 3, depth=5, prefetch=prefetch)
        seen, set_rows = [], sharded_data_parallel._Unit.set_rows

        def count_units(unit, values):
            set_rows(unit, values)
            seen.append(sum(len(each.rows[0]) > 0 for each in sharded.units))

        monkeypatch.setattr(sharded_data_parallel._Unit, "set_rows", count_units)
        step(sharded, 48)
        assert max(seen) == at_once
        assert seen[-1] == 0


def test_prefetch_hides_gathers_behind_computing() -> None:
    seconds = {}
    for prefetch in (True, False):
        with fresh_devices(4, A100 / 1000, "meta") as gpus:
            sharded = large_mlp(gpus, 3, depth=6, width=256, prefetch=prefetch)
            t = step(sharded, 256, examples=4000)
            seconds[prefetch] = t.seconds
            computing = sum(s.end - s.start for s in t.spans if s.device == 0 and s.route is None)
    gathers = 2 * 6 * 2 * (256 * 256 + 256) * 3 / 4 / (A100 / 1000).link_bandwidth
    assert seconds[False] - seconds[True] > 0.7 * gathers
    assert seconds[True] < 1.1 * computing


@stages
def test_master_weights_keep_what_bfloat16_would_lose(vgpus, stage: int) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    sharded = Sharded(model, vgpus[:2], stage, make_optimizer=partial(torch.optim.SGD, lr=1e-3))
    batch = torch.ones(2, 1), torch.zeros(2, 1)

    def train_and_read(steps: int) -> tuple[float, float]:
        train(sharded, [batch] * steps, lambda outputs, _: outputs.mean())  # its gradient is 1
        unit = sharded.units[0]
        rounded = (unit.shards if stage == 3 else unit.rows)[0][0].item()
        return rounded, sharded.to_model()[0].weight.item()

    assert train_and_read(1) == (1.0, pytest.approx(0.999))
    assert train_and_read(3) == (1 - 2**-8, pytest.approx(0.996))


@stages
def test_memory_returns_to_zero(vgpus, stage: int) -> None:
    sharded = Sharded(an_mlp(), vgpus, stage)
    train(sharded, image_batches(8), F.cross_entropy)
    assert memory_in_use(vgpus[3]) > 0
    del sharded
    gc.collect()
    assert [memory_in_use(gpu) for gpu in vgpus] == [0] * 4


def frozen_mlp() -> MLP:
    model = an_mlp()
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "model, stage, dtype, message",
    [
        (nn.Linear(2, 2), 1, torch.float32, "is an nn.Sequential, not"),
        (an_mlp(), 4, torch.float32, "1, 2 or 3, not 4"),
        (an_mlp(), 1, torch.float16, "not torch.float16"),
        (nn.Sequential(nn.ReLU()), 1, torch.float32, "no parameters"),
        (frozen_mlp(), 1, torch.float32, r"frozen.*\['2.bias'\]"),
        (GPT(5, width=4, heads=1), 1, torch.float32, "tied=False"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 1, torch.float32, "1.running_mean"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_one_line(vgpus, model, stage, dtype, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Sharded(model, vgpus, stage, dtype)
    assert "\n" not in str(error.value)


def test_a_shard_is_needed_for_every_device(vgpus) -> None:
    with pytest.raises(ValueError, match="no device"):
        Sharded(an_mlp(), [], 1)
    sharded = Sharded(an_mlp(), vgpus[:2], 1)
    x, y = image_batches(4)[0]
    with pytest.raises(ValueError, match=r"2 devices need .* 3 inputs"):
        sharded.train_step(split_batch(x, vgpus[:3]), split_batch(y, vgpus[:2]), F.cross_entropy)
    with pytest.raises(ValueError, match="one example at least"):
        sharded.train_step(*[split_batch(part[:0], vgpus[:2]) for part in (x, y)], F.cross_entropy)
