"""Checks of lesson 15: a program is mended when no instrument finds anything, and nothing is lost.

What is not mended is answered with a reading, as an instrument shows it, and not with the cause:
that comes when it is right, for the learner to compare with what they wrote down.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from course_lib.doctor import INSTRUMENTS, Report
from course_lib.doctor.watching import Prepare, TrainingStep
from course_lib.exercises.broken.cases import CASES
from course_lib.exercises.broken.named import with_names
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.parallel.collectives import all_reduce_bytes
from course_lib.parallel.kinds import Devices

# The cases that the lesson itself works through.
WORKED = ("accumulated", "whole_batches", "logged")


def draw(count: int, seed: int) -> None:
    """Print ``count`` broken programs for a class to find, the same ones for the same seed.

    Raises:
        ValueError: there are not that many.
    """
    names = [name for name in CASES if name not in WORKED]
    if not 1 <= count <= len(names):
        raise ValueError(f"there are 1 to {len(names)} programs to draw, and not {count}")
    for number, name in enumerate(random.Random(seed).sample(names, count), 1):
        symptom = CASES[name].symptom
        print(f"# {number}. Symptom: {symptom}.\n\n{program_text(CASES[name].program)}\n")


def program_text(program: Prepare) -> str:
    """A program without its docstring, which says what is wrong with it."""
    source = textwrap.dedent(inspect.getsource(program))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    lines = source.splitlines()
    told = function.body[0]
    del lines[told.lineno - 1 : told.end_lineno]
    return "\n".join(lines)


def _check(
    name: str, *conditions: Callable[[Report], None], prepared: Callable | None = None
) -> Callable[..., Verdict]:
    """The check of one case, with what else must be true of a program that is right.

    It takes the program, and what the learner named: the line at fault, and an instrument.

    Args:
        conditions: asked of the report of a program in which no instrument finds anything.
        prepared: calls the program and looks at what it returns; by default, that it is a pair.
    """

    @check
    def check_program(program: Prepare) -> Verdict:
        report = CASES[name].examine(partial(prepared or _prepared, program))
        _require_silence(report)
        for condition in (_require_learning, _require_all_at_work, *conditions):
            condition(report)
        return right(
            f"{report.steps} steps, and no instrument finds anything. The cause was: "
            f"{CASES[name].cause}.",
            _facts_of_what_it_took(report),
        )

    def check_all(program: Prepare, line: object = None, instrument: object = None) -> Verdict:
        text = program_text(CASES[name].program)
        return with_names(check_program(program), name, text, line, instrument)

    return check_all


def _prepared(
    program: Prepare, model: nn.Module, gpus: Devices
) -> tuple[Sequence[nn.Module], TrainingStep]:
    names = [name for name, _ in model.named_parameters()]
    pair = program(model, gpus)
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1])
    if not is_pair or isinstance(pair[1], nn.Module) or not isinstance(pair[0], tuple | list):
        raise Wrong("return the replicas and the step, as the program did.")
    for replica in pair[0] or [None]:
        is_model = isinstance(replica, nn.Module)
        if not is_model or [name for name, _ in replica.named_parameters()] != names:
            raise Wrong("return models with the parameters of the one that you were given.")
    return pair


def _in_one_row(
    program: Prepare, model: nn.Module, gpus: Devices
) -> tuple[Sequence[nn.Module], TrainingStep]:
    """The program, in which the first layer's parameters must be parts of one row."""
    replicas, step = _prepared(program, model, gpus)
    for rank, replica in enumerate(replicas):
        places = {
            parameter.untyped_storage().data_ptr()
            for parameter in replica[0].parameters()  # type: ignore[index]
        }
        if len(places) > 1:
            raise Wrong(
                f"the first layer's weight and bias of rank {rank} are not parts of one row: "
                "the row should stay."
            )
    return replicas, step


def _restarted(
    program: Prepare, model: nn.Module, gpus: Devices
) -> tuple[Sequence[nn.Module], TrainingStep]:
    """The program, whose third step must read what was saved, or train other models."""
    replicas, step = _prepared(program, model, gpus)
    first, read, steps = replicas[0], [], 0
    first.register_load_state_dict_pre_hook(lambda module, *arguments: read.append(module))

    def watched(x: Tensor, y: Tensor) -> object:
        nonlocal steps
        steps += 1
        loss = step(x, y)
        if steps == 3 and not read and replicas[0] is first:
            raise Wrong("nothing is saved and read any more: the restart should stay.")
        return loss

    return replicas, watched


def _require_silence(report: Report) -> None:
    if report.is_healthy:
        return
    first, *others = report.findings
    facts = [(each.instrument, f"step {each.step}: {each.reading}", "silence") for each in others]
    raise Wrong(
        f"after step {first.step} an instrument finds something. {first.instrument}: "
        f"{first.reading}.",
        facts,
    )


def _require_learning(report: Report) -> None:
    start, now = report.run.start.parameters, report.run.now.replicas[0].parameters
    if all(torch.equal(now[name], start[name]) for name in start):
        raise Wrong(f"after {report.steps} steps no parameter has moved: who updates them?")


def _require_all_at_work(report: Report) -> None:
    t = report.run.now.recording
    for index in range(t.device_count):
        if not any(span.flops for span in t.spans if index in span.devices):
            raise Wrong(f"{t.name_of(index)} multiplied nothing: all devices should work.")


def _require_dropout(report: Report) -> None:
    for rank, pairs in enumerate(report.run.now.masks):
        if not any((x & ~y).any() for x, y in pairs):
            raise Wrong(f"rank {rank} drops nothing any more: its dropout should stay.")


def _require_epochs(report: Report) -> None:
    everything = _sorted(CASES["epochs"].batches(1)[0][0])
    for epoch, moment in enumerate(report.run.moments, 1):
        given = [x for inputs in moment.inputs for x in inputs]
        if not given or not torch.equal(_sorted(torch.cat(given)), everything):
            raise Wrong(f"in epoch {epoch} not every example was given out once.")


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def _require_pieces(report: Report) -> None:
    if any(len(inputs) < 2 for inputs in report.run.now.inputs):
        raise Wrong("a batch goes through in one piece: the pieces should stay, for memory's sake.")


def _require_recomputation(report: Report) -> None:
    now = report.run.now
    if now.recording.flops < 1.02 * now.flops:
        raise Wrong(
            "no product is computed a second time: the linear layer should not be kept, but "
            "computed again."
        )


def _require_cutting(report: Report) -> None:
    now = report.run.now
    if now.recording.flops > 0.95 * now.flops:
        raise Wrong("as much is multiplied as with all the padding: each part should be cut.")


def _require_microbatches(report: Report) -> None:
    t = report.run.now.recording
    for index in range(t.device_count):
        products = sum(bool(span.flops) for span in t.spans if index in span.devices)
        if products < 2 * 4:  # a layer takes two for each microbatch, or three
            raise Wrong(
                f"{t.name_of(index)} took {products} products for a step, and four microbatches "
                "take 8 at least: they should stay."
            )


def _require_halves(report: Report) -> None:
    t = report.run.now.recording
    operations = [
        sum(span.flops for span in t.spans if index in span.devices)
        for index in range(t.device_count)
    ]
    if max(operations) > 1.01 * min(operations):
        shares = ", ".join(f"{each / sum(operations):.0%}" for each in operations)
        raise Wrong(f"the GPUs' shares of the products are {shares}: each should have half.")


def _require_travelling_keys(report: Report) -> None:
    gradients = sum(each.nbytes for each in report.run.start.parameters.values())
    sent = report.run.now.recording.bytes_between_devices
    if sent <= all_reduce_bytes(len(report.run.now.replicas), gradients):
        raise Wrong(
            "nothing but gradients is sent: each GPU should have half of the tokens, and keys "
            "and values go round."
        )


def _require_side_streams(report: Report) -> None:
    if not report.run.now.recording.has_side_streams:
        raise Wrong("nothing runs on a side stream any more: the exchange should stay there.")


def _facts_of_what_it_took(report: Report) -> list[tuple[str, str, str]]:
    run = report.run
    facts = [("instruments that find something", f"0 of {len(INSTRUMENTS)}", "0")]
    if run.bytes_a_step:
        sent = run.now.recording.bytes_between_devices
        facts.append(("bytes between devices in a step", f"{sent:,}", f"{run.bytes_a_step:,}"))
    return facts


check_short_passages = _check("short_passages")
check_four_pieces = _check("four_pieces", _require_pieces)
check_clipped = _check("clipped")
check_one_row = _check("one_row", prepared=_in_one_row)
check_thawed = _check("thawed")
check_moved = _check("moved", prepared=_restarted)
check_with_dropout = _check("with_dropout", _require_dropout)
check_epochs = _check("epochs", _require_epochs)
check_recomputed = _check("recomputed", _require_recomputation)
check_microbatches = _check("microbatches", _require_microbatches)
check_split_layers = _check("split_layers", _require_halves)
check_long_passages = _check("long_passages", _require_travelling_keys)
check_side_streams = _check("side_streams", _require_side_streams)
check_by_length = _check("by_length", _require_cutting)
