"""Checks of lesson 11: a guard against what trains nothing; shards, plans and bytes of engines."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from course_lib import CLASSROOM, format_bytes, hardware, ranks, timeline
from course_lib.exercises.diagnosis import Facts, known_mistake, require_finite
from course_lib.exercises.llama_block import LlamaBlock
from course_lib.exercises.rank_runs import on_ranks
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import GPT, next_token_loss

SPEC = CLASSROOM.with_(launch_overhead=0.0)


def _gpt(depth: int, width: int = 32) -> GPT:
    return GPT(32, context=16, width=width, heads=4, depth=depth, tied=False)


def _tokens(examples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(32, (examples, 17))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _shard(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _whole(model: nn.Module) -> list[Tensor]:
    wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [each.detach().cpu() for each in wholes]


def _sent(t: timeline.Trace, region: str) -> int:
    """The most bytes that one GPU sent to others in a region."""
    sent = [0] * t.device_count
    for span in t.spans:
        if span.region == region and span.route and None not in span.route:
            sent[span.route[0]] += span.bytes  # type: ignore[index]  # None is left out
    return max(sent)


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(ours, theirs, strict=True)
    )


# ---------------------------------------------------------------------- 1. a guard


@check
def check_untrained(untrained: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> Verdict:
    """Graded on six models and optimizers, and on sending nothing."""
    gpt = _gpt(1, width=16)
    everything = [name for name, _ in gpt.named_parameters()]
    norms = [name for name in everything if "norm_2" in name]
    expected = {
        "an optimizer that was made before fully_shard": everything,
        "an optimizer that was made after it": [],
        "a sharded model with its embedding frozen, and the rest in the optimizer": [],
        "an optimizer without norm_2, which has the same numbers as norm_1": norms,
        "two groups, of all weights and of all biases": [],
        "a model that is not sharded, and its optimizer": [],
    }

    def cases() -> list[Any]:
        early, late, frozen, parts, groups, plain = (copy.deepcopy(gpt) for _ in expected)
        before = _sgd(early)
        for model in (early, late, frozen, parts, groups):
            _shard(model)
        frozen[0].requires_grad_(False)
        learning = [p for p in frozen.parameters() if p.requires_grad]
        without = [p for name, p in parts.named_parameters() if name not in norms]
        by_kind = [
            {"params": [p for name, p in groups.named_parameters() if ("bias" in name) == is_bias]}
            for is_bias in (False, True)
        ]
        sgd = torch.optim.SGD
        plain = plain.to("vgpu")
        pairs = (
            (early, before),
            (late, _sgd(late)),
            (frozen, sgd(learning, lr=0.1)),
            (parts, sgd(without, lr=0.1)),
            (groups, sgd(by_kind, lr=0.1)),
            (plain, _sgd(plain)),
        )
        try:
            with timeline.region("answer"):
                return [untrained(*pair) for pair in pairs]
        except RuntimeError as error:
            if "aten.eq" not in str(error):
                raise
            raise Wrong(
                "two parameters are compared by their numbers, as == does, and `in` with it: are "
                "they one object?"
            ) from None

    with hardware.fresh_devices(2, SPEC) as gpus, timeline.trace() as t:
        (answers, _) = on_ranks(cases, gpus)
    for (case, wanted), ours in zip(expected.items(), answers, strict=True):
        _judge_names(case, wanted, ours)
    if _sent(t, "answer"):
        raise Wrong(
            "the names are right, and bytes were sent: look at the objects, not at numbers."
        )
    return right("it names what the optimizer does not have, and sends nothing.")


def _judge_names(case: str, wanted: list[str], ours: Any) -> None:
    if ours is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(ours, Iterable) or isinstance(ours, str | Tensor):
        raise Wrong(f"return a list of names, and not a {type(ours).__name__}.")
    names = list(ours)
    odd = [each for each in names if not isinstance(each, str)]
    if odd:
        raise Wrong(f"a name is a str, and in your list there is a {type(odd[0]).__name__}.")
    missing = [each for each in wanted if each not in names]
    surplus = [each for each in names if each not in wanted]
    if missing:
        count = "all" if len(missing) == len(wanted) else "some"
        raise Wrong(f"{case}: {count} of those it lacks are not named, such as {missing[0]}.")
    if surplus:
        raise Wrong(f"{case}: {surplus[0]} is named, and either it is trained or it should not be.")


# ---------------------------------------------------------------------- 2. make it fit

PEAK, SENT = 1.8, 2.0  # limits, in bytes of the whole model


@check
def check_fit(shard_to_fit: Callable[[nn.Sequential], Any]) -> Verdict:
    """Graded on the parameters after two steps, on the peak and on the bytes of the second."""
    gpt, (x, y) = _gpt(5), _tokens(4)
    nbytes = _nbytes(gpt)

    def work() -> list[Tensor]:
        model = copy.deepcopy(gpt)
        shard_to_fit(model)
        if not any(isinstance(p, DTensor) for p in model.parameters()):
            raise Wrong("no parameter of the model is sharded: call fully_shard on its layers.")
        mine = [each.chunk(4)[dist.get_rank()].to("vgpu") for each in (x, y)]
        _two_steps(model, *mine)
        return _whole(model)

    with hardware.fresh_devices(4, SPEC) as gpus, timeline.trace() as t:
        parameters = on_ranks(work, gpus)[0]
    peak, sent = max(t.peak_memory) / nbytes, _sent(t, "step 1") / nbytes
    facts = [
        ("peak, in bytes of the model", f"{peak:.2f}", f"at most {PEAK}"),
        ("sent by one GPU in a step", f"{sent:.2f}", f"at most {SENT}"),
    ]
    alone = copy.deepcopy(gpt)
    _two_steps(alone, x, y)
    if not _same(parameters, _whole(alone)):
        raise Wrong("the parameters are not those of one GPU.", facts)
    if peak > PEAK and sent > SENT:
        raise Wrong("neither limit holds: is there a unit for each layer?", facts)
    if peak > 2.5:
        raise Wrong(
            "at one moment the whole model is there, and its gradients: one unit for all layers "
            "is gathered as one.",
            facts,
        )
    if peak > PEAK:
        raise Wrong(
            "it sends little and does not fit: fewer layers may stay after their forward, and of "
            "those that stay it matters which.",
            facts,
        )
    if sent > SENT:
        raise Wrong(
            "it fits and sends too much: which layers does backward need first, before there is "
            "time to forget them?",
            facts,
        )
    return right("it fits, and the layers that backward needs first are not gathered twice.", facts)


def _two_steps(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = _sgd(model)
    for step in range(2):
        with timeline.region(f"step {step}"):
            optimizer.zero_grad()
            next_token_loss(model(x), y).backward()
            optimizer.step()


# ---------------------------------------------------------------------- 3. a plan


@check
def check_plan(plan: Callable[[], Any]) -> Verdict:
    """Graded on output and gradients, on what each GPU holds, and on all-reduces by their bytes."""
    block, (B, T, D) = LlamaBlock(32, heads=4), (2, 8, 32)
    x, gradient = torch.randn(B, T, D), torch.randn(B, T, D)

    def work() -> tuple[list[Tensor], int]:
        styles = plan()
        if not isinstance(styles, dict):
            raise Wrong(f"return a dictionary, from names to styles, not {type(styles).__name__}.")
        _require_names(styles, block)
        model = copy.deepcopy(block).to("vgpu")
        return _run_plan(model, styles, x.to("vgpu").requires_grad_(), gradient.to("vgpu"))

    with hardware.fresh_devices(4, SPEC) as gpus, timeline.trace() as t, _no_log():
        returned = on_ranks(work, gpus)
    ring = 2 * 3 * x.nbytes // 4
    sums = [_sent(t, region) / ring for region in ("forward", "backward")]
    matrices = sum(p.nbytes for p in block.parameters() if p.dim() == 2)
    facts = [
        ("weights on one GPU", format_bytes(returned[0][1]), format_bytes(matrices / 4)),
        ("all-reduces forward, by their bytes", f"{sums[0]:.2f}", "2"),
        ("all-reduces backward", f"{sums[1]:.2f}", "2"),
    ]
    alone = copy.deepcopy(block)
    inputs = x.clone().requires_grad_()
    (out := alone(inputs)).backward(gradient)
    wanted = [out.detach(), *(each.grad for each in (inputs, *alone.parameters()))]
    for rank, (values, _) in enumerate(returned):
        _judge_values(rank, values, wanted, facts)
    if returned[0][1] > 1.1 * matrices / 4:
        raise Wrong("the result is right, and some weights are whole on every GPU.", facts)
    if sums[0] > 2.01:
        raise Wrong(
            "forward sends more than two all-reduces: between a column and a row layer nothing "
            "needs to travel.",
            facts,
        )
    if sums[1] > 2.01:
        raise Wrong(
            f"backward sends {sums[1]:.0f} all-reduces: layers that read the same x each sum their "
            "own gradient of it. Make x a DTensor once, before them.",
            facts,
        )
    return right("two all-reduces forward and two backward.", facts)


@contextmanager
def _no_log() -> Iterator[None]:
    """PyTorch logs a traceback of its own where the widths of two layers do not fit."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _require_names(styles: dict, block: nn.Module) -> None:
    names = [name for name, _ in block.named_modules()]
    unknown = [each for each in styles if not any(fnmatch(name, str(each)) for name in names)]
    if unknown:
        raise Wrong(f"the block has no module {unknown[0]!r}; it has {', '.join(names[1:])}.")


def _run_plan(
    model: nn.Module, styles: dict, x: Tensor, gradient: Tensor
) -> tuple[list[Tensor], int]:
    """Output and gradients, whole and on the host; and the bytes of weights on this GPU."""
    try:
        parallelize_module(model, init_device_mesh("vgpu", (4,)), styles)
        with timeline.region("forward"):
            out = model(x)
        with timeline.region("backward"):
            out.backward(gradient)
    except (ranks.DeadlockError, ranks.MismatchError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        said = (str(error).splitlines() or [""])[0]
        why = " Which layers take in what another has split?" if "reduction dim" in said else ""
        raise Wrong(
            f"with this plan the block stops with {type(error).__name__}: {said}{why}"
        ) from None
    held = sum(
        (p.to_local() if isinstance(p, DTensor) else p).nbytes
        for p in model.parameters()
        if p.dim() == 2
    )
    values = [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    return [(v.full_tensor() if isinstance(v, DTensor) else v).cpu() for v in values], held


def _judge_values(rank: int, values: list[Tensor], wanted: list[Tensor], facts: Facts) -> None:
    out, *gradients = values
    if out.shape != wanted[0].shape:
        raise Wrong(
            f"rank {rank}'s output has shape {tuple(out.shape)}, and should have all of "
            f"{tuple(wanted[0].shape)}.",
            facts,
        )
    require_finite(values, "the output or the gradients")
    if not _same([out], wanted[:1]):
        raise Wrong(f"the output on rank {rank} is not that of the block on one GPU.", facts)
    if not _same(gradients, wanted[1:]):
        raise Wrong("the output is right, and a gradient is not that of one GPU.", facts)


# ---------------------------------------------------------------------- 4. accumulate


@check
def check_accumulate(accumulate: Callable[..., Any]) -> Verdict:
    """Graded on parameters after two calls and a plain step, and on the bytes of each."""
    gpt, (x, y) = _gpt(1), _tokens(8)
    sizes = [2, 1, 1]  # of the microbatches of a rank

    def work() -> list[list[Tensor]]:
        model, after = _shard(copy.deepcopy(gpt)), []
        optimizer = _sgd(model)
        mine = [each.chunk(2)[dist.get_rank()].to("vgpu") for each in (x, y)]
        pieces = list(zip(*(each.split(sizes) for each in mine), strict=True))
        for call in range(2):
            with timeline.region(f"call {call}"):
                accumulate(model, optimizer, list(pieces), next_token_loss)
            after.append(_whole(model))
        optimizer.zero_grad()
        with timeline.region("plain"):
            next_token_loss(model(mine[0]), mine[1]).backward()
        optimizer.step()
        return [*after, _whole(model)]

    with hardware.fresh_devices(2, SPEC) as gpus, timeline.trace() as t:
        first, second, third = on_ranks(work, gpus)[0]
    half = _nbytes(gpt) / 2
    sent, least = _sent(t, "call 1") / half, 2 * len(sizes) + 1
    facts = [("gathers and sums of the model, by their bytes", f"{sent:.2f}", f"{least}")]
    require_finite(first, "the parameters")
    _judge_accumulation(gpt, x, y, sizes, (first, second), facts)
    if sent > least + 0.1:
        raise Wrong(
            f"the step is right, and sends {sent:.0f} times what one gather or sum of the model "
            f"does. Two gathers for each of {len(sizes)} microbatches and one sum are {least}.",
            facts,
        )
    if sent < least - 0.5:
        raise Wrong(
            f"the step is right, and sends less than {least}: the microbatches were put together, "
            "or parameters kept. Either takes the memory that microbatches are there to save.",
            facts,
        )
    if not _same(third, _steps(gpt, x, y, 3)[2]) or _sent(t, "plain") < 2.9 * half:
        raise Wrong(
            "your steps are right, and what trains the model afterwards is not: its gradients are "
            "no longer summed over the ranks. The setting holds until it is set again.",
            facts,
        )
    return right("gradients travel once a step.", facts)


def _steps(gpt: nn.Module, x: Tensor, y: Tensor, count: int) -> list[list[Tensor]]:
    """Parameters after each of some steps on one GPU."""
    model, after = copy.deepcopy(gpt), []
    optimizer = _sgd(model)
    for _ in range(count):
        optimizer.zero_grad()
        next_token_loss(model(x), y).backward()
        optimizer.step()
        after.append(_whole(model))
    return after


def _judge_accumulation(
    gpt: nn.Module,
    x: Tensor,
    y: Tensor,
    sizes: list[int],
    ours: tuple[list[Tensor], list[Tensor]],
    facts: Facts,
) -> None:
    def after_one_step(weights: list[float]) -> Tensor:
        """The parameters of one GPU in a row, each microbatch's mean weighted so."""
        model = copy.deepcopy(gpt)
        for some_x, some_y in zip(x.chunk(2), y.chunk(2), strict=True):
            parts = zip(some_x.split(sizes), some_y.split(sizes), weights, strict=True)
            for piece_x, piece_y, weight in parts:
                (next_token_loss(model(piece_x), piece_y) * weight / 2).backward()
        _sgd(model).step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    share, first = [size / sum(sizes) for size in sizes], torch.cat([p.flatten() for p in ours[0]])

    def matches(other: Tensor) -> bool:
        return torch.allclose(first, other, rtol=1e-3, atol=1e-6)

    mistakes = {
        "no parameter changed: were the gradients ever summed over the ranks?": after_one_step(
            [0.0, 0.0, 0.0]
        ),
        "each microbatch counts the same, and the first has twice the examples.": after_one_step(
            [1 / 3, 1 / 3, 1 / 3]
        ),
        "the means of the microbatches are added: weight them by their examples.": after_one_step(
            [1.0, 1.0, 1.0]
        ),
        "only the last microbatch's gradient arrives in the step.": after_one_step(
            [0.0, 0.0, share[2]]
        ),
        "only the first microbatch's gradient arrives in the step.": after_one_step(
            [share[0], 0.0, 0.0]
        ),
    }
    wanted = _steps(gpt, x, y, 2)
    if not matches(after_one_step(share)):
        known = known_mistake(matches, mistakes)
        raise Wrong(known or "the parameters after one call are not those of one GPU.", facts)
    if not _same(ours[1], wanted[1]):
        raise Wrong(
            "the first call is right, and the second is not: is something left of the first, such "
            "as its gradients?",
            facts,
        )


# ---------------------------------------------------------------------- 5. collect


@check
def check_collect(collect: Callable[[nn.Module], Any]) -> Verdict:
    """Graded on what each rank returns, on bytes, and on the memory at the peak."""
    gpt, count = _gpt(3), 2
    largest = max(parameter.nbytes for parameter in gpt.parameters())

    def work() -> tuple[Any, int]:
        model = _shard(copy.deepcopy(gpt))
        shards = [p.to_local().cpu() for p in model.parameters() if isinstance(p, DTensor)]
        before = torch.get_device_module("vgpu").memory_allocated()
        torch.get_device_module("vgpu").reset_peak_memory_stats()
        with timeline.region("answer"):
            found = collect(model)
        peak = torch.get_device_module("vgpu").max_memory_allocated()
        _require_shards(model, shards)
        return found, peak - before

    with hardware.fresh_devices(count, SPEC) as gpus, timeline.trace() as t:
        returned = on_ranks(work, gpus)
    nbytes = _nbytes(gpt)
    sent, peak = _sent(t, "answer"), max(more for _, more in returned) / largest
    to_host = sum(
        span.bytes
        for span in t.spans
        if span.region == "answer" and span.route and span.route[1] is None
    )
    facts = [
        ("sent by one GPU", format_bytes(sent), f"at most {format_bytes(nbytes / count)}"),
        ("copied to the host", format_bytes(to_host), f"at most {format_bytes(nbytes)}"),
        ("more at the peak, in the largest parameter", f"{peak:.1f}", "at most 2.2"),
    ]
    _judge_collected([found for found, _ in returned], gpt, facts)
    if sent > 1.01 * nbytes / count:
        raise Wrong("the model is right, and a GPU sends more than its shards, once.", facts)
    if peak > 2.2:
        raise Wrong(
            f"a GPU holds {peak:.1f} times the largest parameter beside its shards: let each whole "
            "one go before the next comes.",
            facts,
        )
    if to_host > 1.01 * nbytes:
        raise Wrong("more than one rank copies the model to the host.", facts)
    return right("all ranks take part in each gather, and rank 0 keeps it.", facts)


def _require_shards(model: nn.Module, shards: list[Tensor]) -> None:
    now = [p.to_local().cpu() for p in model.parameters() if isinstance(p, DTensor)]
    if len(now) < len(shards):
        raise Wrong("afterwards the model is not sharded any more, and training is to go on.")
    if not all(map(torch.equal, now, shards)):
        raise Wrong("afterwards the model's own shards are not what they were.")


def _judge_collected(found: list[Any], gpt: nn.Module, facts: Facts) -> None:
    for rank, each in enumerate(found):
        if not isinstance(each, dict):
            raise Wrong(f"rank {rank} returned a {type(each).__name__}, and not a dictionary.")
        if rank and each:
            raise Wrong(f"rank {rank} returned {len(each)} tensors: only rank 0 should.", facts)
    wanted = dict(gpt.named_parameters())
    missing = [name for name in wanted if name not in found[0]]
    if missing:
        raise Wrong(f"rank 0's dictionary has no {missing[0]!r}.", facts)
    for name, parameter in wanted.items():
        ours = found[0][name]
        if isinstance(ours, DTensor):
            raise Wrong(f"{name} is a DTensor, of which each rank has a part: gather it.", facts)
        if not isinstance(ours, Tensor) or ours.device.type != "cpu":
            raise Wrong(f"{name} should be a tensor on the host.", facts)
        if ours.shape != parameter.shape:
            raise Wrong(
                f"{name} has shape {tuple(ours.shape)}, and the whole {tuple(parameter.shape)}.",
                facts,
            )
        if not torch.equal(ours, parameter.detach()):
            raise Wrong(f"{name} has not the numbers of the model.", facts)
