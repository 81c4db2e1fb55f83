"""Checks of lesson 01: operations of a step, bytes of a model, gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Unchanged,
    bytes_over_host,
    gradient_of,
    require_finite,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.models import MLP


@check
def check_flops(step_flops: Callable[[list[int], int], float]) -> Verdict:
    """Graded against the meter, which counts the products of a real step."""
    for widths, batch in (([64, 512, 512, 10], 128), ([20, 30, 7], 16), ([48, 9], 5)):
        answer = require_number(step_flops(list(widths), batch))
        expected = _metered_flops(widths, batch)
        if math.isclose(answer, expected):
            continue
        layers = [2 * batch * inputs * outputs for inputs, outputs in pairwise(widths)]
        forward = sum(layers)
        biases = 2 * batch * sum(widths[1:])  # what they cost if one takes them for weights
        once = "Each multiplication comes with an addition: count both."
        known_mistakes = {
            3 * forward: "Nobody needs the gradient of the input, and you count it.",
            3 * forward / 2: f"{once} And nobody needs the gradient of the input.",
            expected / 2: once,
            forward: "That is forward alone.",
            expected - forward: "That is backward alone.",
            expected / batch: "That is one example's.",
            expected - layers[-1] * 3: "The last layer is missing.",
            3 * (forward + biases): "Biases take no product. Nobody needs the input's gradient.",
            expected + 3 * biases: "Biases cost an addition each, and no product.",
        }
        if len(layers) > 1:  # with one layer these are no mistakes
            known_mistakes |= {
                2 * forward: "Backward takes two products for each layer but the first.",
                expected - layers[0]: "Backward takes one product for the first layer, not none.",
            }
        kind = next((k for n, k in known_mistakes.items() if math.isclose(answer, n)), "")
        raise Wrong(
            f"for widths {widths} and {batch} examples you count {answer:,.0f}, and the meter "
            f"{expected:,.0f}. {kind}".strip()
        )
    facts = [("operations for [48, 9] and 5 examples", f"{answer:,.0f}", f"{expected:,.0f}")]
    return right("your count is the meter's.", facts)


def _metered_flops(widths: list[int], batch: int) -> float:
    with hardware.fresh_devices(1) as (gpu,):
        model = MLP(*widths).to(gpu)
        with timeline.trace() as t:
            model(torch.zeros(batch, widths[0], device=gpu)).sum().backward()
    return t.flops


@check
def check_memory(model_bytes: Callable[[int, str], float]) -> Verdict:
    """Graded against the bytes that a model, its gradients and an optimizer took on a device."""
    parameters = 1_000_000
    remembered = {
        "momentum": "Momentum remembers one number a parameter",
        "sgd": "Plain SGD remembers nothing",
        "adamw": "AdamW remembers two numbers a parameter",
    }
    # Momentum first: of three numbers, one missing and 2 bytes each are not the same amount.
    for optimizer, count in (("momentum", 3), ("sgd", 2), ("adamw", 4)):
        answer = require_number(model_bytes(parameters, optimizer))
        expected = 4 * parameters * count
        if answer != expected:
            besides = f"{remembered[optimizer]}; besides, there are the parameter and its gradient."
            kinds = {
                expected / 1e6: "That is megabytes: return bytes.",
                expected / 4: "That is how many numbers; each has 4 bytes.",
                expected / 2: "Float32 numbers have 4 bytes, not 2.",
                expected * 2: "Float32 numbers have 4 bytes, not 8.",
                expected - 8 * parameters: f"Two numbers a parameter are missing. {besides}",
                expected - 4 * parameters: f"One number a parameter is missing. {besides}",
                expected + 4 * parameters: f"One number a parameter is too many. {besides}",
                expected + 8 * parameters: f"Two numbers a parameter are too many. {besides}",
            }
            raise Wrong(
                f"a million parameters with {optimizer} hold {format_bytes(expected)}, and you "
                f"say {format_bytes(answer)}. {kinds.get(answer, '')}".strip()
            )
    return right("8, 12 and 16 bytes a parameter.")


@check
def check_accumulate(accumulate: Callable[[nn.Module, Tensor, Tensor, int], None]) -> Verdict:
    """Graded on the gradients, and on the peak memory beside that of one piece."""
    pieces, size = 8, 256
    with hardware.fresh_devices(1) as (gpu,):
        model = MLP(64, 64, 64, 10).to(gpu)
        x = torch.randn(pieces * size, 64, device=gpu)
        y = torch.randint(10, (pieces * size,), device=gpu)
        F.cross_entropy(model(x), y).backward()
        expected = [gradient_of(parameter).cpu() for parameter in model.parameters()]
        model.zero_grad()
        _backward(model, x[:size], y[:size])  # so that the next piece meets gradients, as most do
        nbytes = sum(gradient_of(parameter).nbytes for parameter in model.parameters())
        one_piece = nbytes + _peak(gpu, lambda: _backward(model, x[:size], y[:size]))
        model.zero_grad()
        unchanged = Unchanged({"the model's parameters": model, "the images": x, "the labels": y})
        with timeline.trace() as t:
            peak = _peak(gpu, lambda: accumulate(model, x, y, pieces))
        unchanged.require()
        without = "the parameters have no gradients: call .backward() on each piece's loss."
        gradients = [gradient_of(parameter, without) for parameter in model.parameters()]
        require_finite(gradients, "the gradients")
        _require_gradients([g.cpu() for g in gradients], expected, pieces, len(x))
        facts = [("peak memory", format_bytes(peak), f"at most {format_bytes(1.2 * one_piece)}")]
        if bytes_over_host(t) >= x[:size].nbytes:
            raise Wrong(
                "the gradient is right, and it was computed on the host: keep the model and the "
                "batch on their GPU.",
                facts,
            )
        if peak > 1.2 * one_piece:
            raise Wrong(
                "the gradient is right, but more than one piece's activations were in memory at "
                "the same time. Does something keep the losses, or run on the whole batch?",
                facts,
            )
        return right("the whole batch's gradient, in the memory of one piece.", facts)


def _require_gradients(
    gradients: list[Tensor], expected: list[Tensor], pieces: int, size: int
) -> None:
    def close(factor: float) -> bool:
        return all(
            torch.allclose(ours * factor, theirs, rtol=1e-3, atol=1e-6)
            for ours, theirs in zip(gradients, expected, strict=True)
        )

    if close(1.0):
        return
    if close(1 / pieces):
        raise Wrong(
            f"the gradient is {pieces} times too large: the mean over the batch is the mean of "
            "the pieces' means, not their sum."
        )
    if close(pieces):
        raise Wrong(
            f"the gradient is {pieces} times too small: each piece's mean is divided by the "
            "number of pieces once, not twice."
        )
    if close(1 / size):
        raise Wrong(
            f"the gradient is {size:,} times too large, as many as there are examples: it is that "
            "of the sum of the losses, and the mean is asked for."
        )
    if close(size / pieces):
        raise Wrong(
            f"the gradient is {size // pieces:,} times too small: each piece's loss is a mean over "
            "its examples already, so divide by the number of pieces, not of examples."
        )
    scale = sum((a * b).sum().item() for a, b in zip(gradients, expected, strict=True)) / sum(
        (b**2).sum().item() for b in expected
    )
    if scale and close(1 / scale):
        raise Wrong(
            f"the gradient is {scale:,.4g} times what it should be. How many pieces did you "
            "make, and by what did you divide? x.chunk(n) makes n pieces, x.split(n) pieces of n."
        )
    raise Wrong(
        "this is not the gradient of the whole batch. Does every piece take part, and does "
        "nothing set the gradients to zero in between?"
    )


def _backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def _peak(gpu: torch.device, action: Callable[[], None]) -> int:
    """Bytes that ``action`` needed at its peak, beyond what was in use before."""
    hardware.reset_peak_memory(gpu)
    before = hardware.memory_in_use(gpu)
    action()
    return hardware.peak_memory(gpu) - before
