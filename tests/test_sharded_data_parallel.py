"""Sharded data parallelism is the same training in less memory, and moves what the paper says."""

from __future__ import annotations

import gc
from functools import cache, partial
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib import A100, memory_in_use, trace
from course_lib.hardware import fresh_devices
from course_lib.models import GPT, MLP, next_token_loss, parameter_count
from course_lib.parallel import data_parallel, flat_unit
from course_lib.parallel.data_parallel import replicate, split_batch
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.unit_exchange import bytes_a_step

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
    assert sent == [bytes_a_step(stage, count, 2 * LARGE)] * count


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
        seen, set_rows = [], flat_unit.FlatUnit.set_rows

        def count_units(unit, values):
            set_rows(unit, values)
            seen.append(sum(len(each.rows[0]) > 0 for each in sharded.units))

        monkeypatch.setattr(flat_unit.FlatUnit, "set_rows", count_units)
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
    with pytest.raises(ValueError, match="on 2 devices, and was given 3 tensors"):
        sharded.train_step(split_batch(x, vgpus[:3]), split_batch(y, vgpus[:2]), F.cross_entropy)
    with pytest.raises(ValueError, match="one example at least"):
        sharded.train_step(*[split_batch(part[:0], vgpus[:2]) for part in (x, y)], F.cross_entropy)


class Fork(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple:
        return x, x.relu()


class Join(nn.Module):
    def forward(self, handed_on: tuple) -> torch.Tensor:
        return handed_on[0] + handed_on[1]


@stages
def test_a_tuple_stays_within_a_unit_and_between_units_is_refused(vgpus, stage: int) -> None:
    ((x, y),) = image_batches(4)
    batch = split_batch(x.float(), vgpus[:2]), split_batch(y, vgpus[:2]), F.cross_entropy
    within = nn.Sequential(nn.Linear(6, 6), Fork(), Join(), nn.Linear(6, 5))
    Sharded(within, vgpus[:2], stage, torch.float32).train_step(*batch)
    between = nn.Sequential(nn.Linear(6, 6), Fork(), nn.Sequential(Join(), nn.Linear(6, 5)))
    for model in (between, between[:2]):
        with pytest.raises(TypeError, match="one tensor for its output, not a tuple: put") as error:
            Sharded(model, vgpus[:2], stage, torch.float32).train_step(*batch)
        assert "\n" not in str(error.value)


# Training: accumulation, clipping, groups, state.


@stages
def test_gradients_of_several_batches_add_up_to_those_of_one(vgpus, stage: int) -> None:
    ((x, y),) = image_batches(13)
    whole, pieces = (Sharded(an_mlp(), vgpus[:3], stage, torch.float64, ADAMW) for _ in range(2))
    train(whole, [(x, y)], F.cross_entropy)
    pieces.zero_grad()
    with trace(strict=True):
        *first, last = zip(x.split(5), y.split(5), strict=True)
        with pieces.accumulate():
            for batch in first:
                pieces.backward(*[split_batch(p, vgpus[:3]) for p in batch], F.cross_entropy, 13)
        pieces.backward(*[split_batch(part, vgpus[:3]) for part in last], F.cross_entropy, 13)
        pieces.step()
    assert largest_difference(whole.to_model(), pieces.to_model()) < CLOSE


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 4), (3, 9)])
def test_accumulation_is_free_up_to_stage_1(stage: int, times: int) -> None:
    with fresh_devices(4, A100, "meta") as gpus:
        sharded = large_mlp(gpus, stage)
        xs = [torch.empty(1, 48, device=gpu) for gpu in gpus]
        ys = [torch.empty(1, dtype=torch.int64, device=gpu) for gpu in gpus]
        sharded.zero_grad()
        with trace() as t:
            with sharded.accumulate():
                for _ in range(2):
                    sharded.backward(xs, ys, F.cross_entropy, 12)
            sharded.backward(xs, ys, F.cross_entropy, 12)
            sharded.step()
        assert t.bytes_sent(gpus[0]) == times * 3 * 2 * LARGE // 4


def test_a_step_without_gradients_is_refused(vgpus) -> None:
    sharded = Sharded(an_mlp(), vgpus[:2], 1, torch.float64)
    with pytest.raises(RuntimeError, match="there are no gradients"):
        sharded.step()
    x, y = image_batches(4)[0]
    with sharded.accumulate():
        sharded.backward(split_batch(x, vgpus[:2]), split_batch(y, vgpus[:2]), F.cross_entropy)
    with pytest.raises(RuntimeError, match="outside of accumulate"):
        sharded.step()


@stages
def test_an_interrupted_step_can_be_dropped(vgpus, stage: int) -> None:
    good, interrupted = (Sharded(an_mlp(), vgpus, stage, torch.float64, ADAMW) for _ in range(2))
    ((x, y),) = image_batches(8)
    with pytest.raises(KeyboardInterrupt):
        interrupted.backward(split_batch(x, vgpus), split_batch(y, vgpus), stop)
    with interrupted.accumulate():
        interrupted.backward(split_batch(x, vgpus), split_batch(y, vgpus), F.cross_entropy)
    for sharded in (good, interrupted):
        train(sharded, [(x, y)], F.cross_entropy)
    assert largest_difference(good.to_model(), interrupted.to_model()) == 0


def stop(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


@stages
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(vgpus, stage: int) -> None:
    ((x, y),) = image_batches(12)
    model, sgd = an_mlp(), partial(torch.optim.SGD, lr=1.0)
    sharded = Sharded(model, vgpus[:3], stage, torch.float64, sgd)
    sharded.backward(split_batch(x, vgpus[:3]), split_batch(y, vgpus[:3]), F.cross_entropy)
    norm = sharded.clip_gradients(0.05)
    sharded.step()
    F.cross_entropy(model(x), y).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    sgd(model.parameters()).step()
    assert norm.item() == pytest.approx(expected.item(), abs=CLOSE)
    assert expected > 0.1
    assert largest_difference(sharded.to_model(), model) < CLOSE


def decay(name: str, parameter: nn.Parameter) -> dict:
    return {"weight_decay": 0.5 if parameter.dim() >= 2 else 0.0, "lr": 0.1 if "2" in name else 0.2}


@stages
@pytest.mark.parametrize("count", [1, 3, 4])
def test_groups_are_those_of_the_models_own_parameters(vgpus, stage: int, count: int) -> None:
    model, gpus, batches = an_mlp(), vgpus[:count], image_batches(12, 7)
    sharded = Sharded(model, gpus, stage, torch.float64, torch.optim.AdamW, decay)
    train(sharded, batches, F.cross_entropy)

    def with_groups(parameters) -> torch.optim.Optimizer:
        names = [name for name, _ in model.named_parameters()]
        pairs = zip(names, parameters, strict=True)
        return torch.optim.AdamW([{"params": [p], **decay(name, p)} for name, p in pairs])

    expected = lesson_02(model, gpus, batches, F.cross_entropy, with_groups)
    assert largest_difference(sharded.to_model(), expected) < CLOSE


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(("counts", "later"), [((4, 4), 3), ((4, 2), 3), ((4, 3), 1), ((2, 4), 0)])
def test_training_goes_on_with_another_number_of_gpus(vgpus, stage, counts, later: int) -> None:
    batches = image_batches(12, 7, 8, 5)
    first = Sharded(an_mlp(), vgpus[: counts[0]], stage, torch.float64, ADAMW, decay)
    train(first, batches[:2], F.cross_entropy)
    second = Sharded(an_mlp(), vgpus[: counts[1]], later, torch.float64, ADAMW, decay)
    second.load_state_dict(first.state_dict())
    train(second, batches[2:], F.cross_entropy)
    whole = Sharded(an_mlp(), vgpus[: counts[0]], stage, torch.float64, ADAMW, decay)
    train(whole, batches, F.cross_entropy)
    apart = largest_difference(second.to_model(), whole.to_model())
    assert apart == 0 if counts == (4, 4) and stage == later else apart < CLOSE


def test_a_state_of_another_model_is_refused(vgpus) -> None:
    state = Sharded(an_mlp(), vgpus[:2], 1).state_dict()
    with pytest.raises(ValueError, match=r"another model, which differs in \['2.bias'"):
        Sharded(MLP(6, 7, 4, 5), vgpus[:2], 1).load_state_dict(state)


def test_what_is_no_state_is_refused(vgpus) -> None:
    with pytest.raises(ValueError, match=r"no state of Sharded.* has \['0.bias', '0.weight'"):
        Sharded(an_mlp(), vgpus[:2], 1).load_state_dict(an_mlp().state_dict())


def test_an_optimizer_that_sorts_parameters_by_itself_is_refused(vgpus) -> None:
    """By their dimensions, say: in a row, all of them have one."""

    def make_optimizer(groups):
        pieces = [piece for group in groups for piece in group["params"]]
        sorted_by_dimension = [
            {
                "params": [p for p in pieces if (p.dim() >= 2) == decays],
                "weight_decay": 0.1 * decays,
            }
            for decays in (True, False)
        ]
        return torch.optim.AdamW(sorted_by_dimension)

    with pytest.raises(ValueError, match="sort them by options_of"):
        Sharded(an_mlp(), vgpus[:2], 1, torch.float32, make_optimizer)


def by_dimensions(groups):
    for group in groups:
        group["weight_decay"] = 0.1 if group["params"][0].dim() >= 2 else 0.0
    return torch.optim.AdamW(groups)


def by_size(groups):
    return torch.optim.AdamW([{**g, "lr": 1 / g["params"][0].numel()} for g in groups])


@pytest.mark.parametrize("make_optimizer", [by_dimensions, by_size])
def test_an_optimizer_whose_options_depend_on_shapes_is_refused(vgpus, make_optimizer) -> None:
    with pytest.raises(ValueError, match="none: choose them by options_of") as error:
        Sharded(an_mlp(), vgpus[:2], 1, torch.float64, make_optimizer)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_computes_with_rows_and_columns_is_refused(vgpus) -> None:
    with pytest.raises(ValueError, match="Adafactor computes with the rows and columns") as error:
        Sharded(an_mlp(), vgpus[:2], 1, torch.float64, torch.optim.Adafactor)
    assert "\n" not in str(error.value)


SGD = torch.optim.SGD
OPTIMIZERS = {
    "AdamW": ADAMW,
    "AdamW with amsgrad": partial(ADAMW, amsgrad=True),
    "SGD": SGD,
    "SGD with momentum": partial(SGD, momentum=0.9),
}


@pytest.mark.parametrize(("saved", "loading"), list(permutations(OPTIMIZERS, 2)))
def test_a_state_of_another_optimizer_is_refused_and_nothing_moves(
    vgpus, saved: str, loading: str
) -> None:
    first = Sharded(an_mlp(), vgpus[:2], 1, torch.float64, OPTIMIZERS[saved])
    train(first, image_batches(8), F.cross_entropy)
    second = Sharded(an_mlp(), vgpus[:3], 3, torch.float64, OPTIMIZERS[loading])
    if saved != "SGD":  # which keeps nothing
        with pytest.raises(ValueError, match="the state of another optimizer, which keeps") as said:
            second.load_state_dict(first.state_dict())
        assert "\n" not in str(said.value)
        assert largest_difference(second.to_model(), an_mlp()) == 0
    second.load_state_dict({**first.state_dict(), "optimizer": {}})  # as the line says to do
    assert largest_difference(second.to_model(), first.to_model()) == 0
    train(second, image_batches(8), F.cross_entropy)


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
)
def test_training_goes_on_with_whatever_treats_each_number_by_itself(vgpus, name: str) -> None:
    make_optimizer, batches = getattr(torch.optim, name), image_batches(12, 8)
    first = Sharded(an_mlp(), vgpus[:2], 1, torch.float64, make_optimizer)
    train(first, batches[:1], F.cross_entropy)
    second = Sharded(an_mlp(), vgpus[:3], 3, torch.float64, make_optimizer)
    second.load_state_dict(first.state_dict())
    train(second, batches[1:], F.cross_entropy)
    expected = lesson_02(an_mlp(), vgpus[:2], batches, F.cross_entropy, make_optimizer)
    assert largest_difference(second.to_model(), expected) < 1e-9


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_training_goes_on_where_steps_are_counted_on_the_gpu(vgpus, option: str) -> None:
    make_optimizer, batches = partial(torch.optim.AdamW, **{option: True}), image_batches(12, 8)
    first = Sharded(an_mlp(), vgpus[:2], 3, torch.float64, make_optimizer)
    train(first, batches[:1], F.cross_entropy)
    state = first.state_dict()
    assert state["optimizer"]["step"].device.type == "cpu"
    second = Sharded(an_mlp(), vgpus[:3], 3, torch.float64, make_optimizer)
    second.load_state_dict(state)
    train(second, batches[1:], F.cross_entropy)
    expected = lesson_02(an_mlp(), vgpus[:2], batches, F.cross_entropy, make_optimizer)
    assert largest_difference(second.to_model(), expected) < 1e-9


def test_a_saved_state_is_a_copy(vgpus) -> None:
    sharded = Sharded(an_mlp(), vgpus[:2], 0, torch.float64, ADAMW)
    train(sharded, image_batches(8), F.cross_entropy)
    state = sharded.state_dict()
    moment = state["optimizer"]["exp_avg"]["0.weight"].clone()
    train(sharded, image_batches(8), F.cross_entropy)
    assert state["optimizer"]["step"] == 1
    assert torch.equal(moment, state["optimizer"]["exp_avg"]["0.weight"])


@stages
def test_padded_targets_do_not_count(vgpus, stage: int) -> None:
    model = an_mlp()
    ((x, y),) = image_batches(12)
    y[:5] = -100  # the first of three shards is all padding, the second in part
    sharded = Sharded(model, vgpus[:3], stage, torch.float64, partial(torch.optim.SGD, lr=1.0))
    losses = train(sharded, [(x, y)], F.cross_entropy)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert sum(each.item() for each in losses) == pytest.approx(loss.item(), abs=CLOSE)
    assert largest_difference(sharded.to_model(), model) < CLOSE


def test_sums_in_float32_round_once() -> None:
    """A bfloat16 ring rounds at every hop, of which 16 devices have 15."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(16, 64)
    sgd = partial(torch.optim.SGD, lr=1.0)
    x = x.bfloat16().float()
    y = torch.randint(64, (16,))
    errors = {}
    for reduce_dtype in (None, torch.float32):
        with fresh_devices(16) as gpus:
            sharded = Sharded(model, gpus, 2, make_optimizer=sgd, reduce_dtype=reduce_dtype)
            parts = split_batch(x, gpus), split_batch(y, gpus)
            sharded.backward(*parts, F.cross_entropy)
            sharded.clip_gradients(1e9)
            ours = torch.cat([each.cpu().float() for each in sharded.units[0].gradients])
            exact = torch.zeros(64 * 64, dtype=torch.float64)
            for rank in range(16):
                alone = Sharded(model, gpus[:1], 2, make_optimizer=sgd)
                part = [each[rank : rank + 1] for each in (x, y)]
                alone.backward(*[split_batch(p, gpus[:1]) for p in part], F.cross_entropy, 16)
                alone.clip_gradients(1e9)
                exact += alone.units[0].gradients[0].cpu().double()
        errors[reduce_dtype] = (ours - exact).norm().item()
    assert errors[torch.float32] < 0.05 * errors[None]


def test_devices_may_be_strings(vgpus) -> None:
    sharded = Sharded(an_mlp(), ["vgpu:0", "vgpu:1"], 3, torch.float64)
    train(sharded, image_batches(8), F.cross_entropy)
    assert sharded.devices == vgpus[:2]


def test_the_bytes_of_a_step_are_told_of_numpys_whole_numbers_too():
    assert bytes_a_step(np.int64(3), np.int64(4), np.int64(100)) == bytes_a_step(3, 4, 100) == 225
