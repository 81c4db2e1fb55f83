"""Checks of lesson 01: operations of a block, bytes of a model, gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.models import MLP


@check
def check_flops(block_flops: Callable[[int, int, int], float]) -> Verdict:
    """Graded against the formula that tests/test_lesson_01.py proves equal to the meter."""
    for B, T, D in ((2, 32, 64), (4, 16, 32), (1, 128, 64)):
        linear, attention = 24 * B * T * D * D, 4 * B * T * T * D
        answer, expected = require_number(block_flops(B, T, D)), linear + attention
        known_mistakes = {
            expected / 2: "half of it: each multiplication comes with an addition.",
            linear: "the linear layers are right; attention's two products are missing.",
            linear + attention / 2: "attention has two products, or count all T x T pairs: one "
            "half of it is missing.",
            3 * expected: "that is forward and backward; only forward was asked for.",
        }
        if not math.isclose(answer, expected):
            kind = next((k for n, k in known_mistakes.items() if math.isclose(answer, n)), "")
            raise Wrong(
                f"for B={B}, T={T}, D={D} you count {answer:,.0f} and the meter "
                f"{expected:,.0f}. {kind}".strip()
            )
    facts = [("operations for B=1, T=128, D=64", f"{answer:,.0f}", f"{expected:,.0f}")]
    return right("your count is the meter's.", facts)


@check
def check_memory(model_bytes: Callable[[int, str], float]) -> Verdict:
    """Graded against the bytes that a model, its gradients and an optimizer took on a device."""
    numbers = {"sgd": 2, "momentum": 3, "adamw": 4}
    for optimizer, count in numbers.items():
        parameters = 1_000_000
        answer, expected = require_number(model_bytes(parameters, optimizer)), 4e6 * count
        if answer != expected:
            kinds = {
                expected - 4 * parameters: "One of the holders is missing.",
                expected / 4: "That is how many numbers; each has 4 bytes.",
                expected / 2: "Float32 numbers have 4 bytes.",
            }
            raise Wrong(
                f"a million parameters with {optimizer} hold {format_bytes(expected)}, and you "
                f"say {format_bytes(answer)}. {kinds.get(answer, '')}".strip()
            )
    return right("8, 12 and 16 bytes a parameter.")


@check
def check_accumulate(accumulate: Callable[[nn.Module, Tensor, Tensor, int], None]) -> Verdict:
    """Graded on the gradients, and on the peak memory beside that of one piece."""
    pieces = 8
    with hardware.other_devices(1) as (gpu,):
        torch.manual_seed(0)
        model = MLP(64, 64, 64, 10).to(gpu)
        x = torch.randn(1024, 64, device=gpu)
        y = torch.randint(10, (1024,), device=gpu)
        F.cross_entropy(model(x), y).backward()
        expected = [parameter.grad.cpu() for parameter in model.parameters()]
        model.zero_grad()
        one_piece = _peak(gpu, lambda: _backward(model, x[: 1024 // pieces], y[: 1024 // pieces]))
        model.zero_grad()
        peak = _peak(gpu, lambda: accumulate(model, x, y, pieces))
        gradients = [parameter.grad for parameter in model.parameters()]
        if any(gradient is None for gradient in gradients):
            raise Wrong("the parameters have no gradients: call .backward() on each piece's loss.")
        _require_gradients([gradient.cpu() for gradient in gradients], expected, pieces)
        facts = [("peak memory", format_bytes(peak), f"at most {format_bytes(1.2 * one_piece)}")]
        if peak > 1.2 * one_piece:
            raise Wrong(
                "the gradient is right, but more than one piece's activations were in memory at "
                "the same time. Does something keep the losses, or run on the whole batch?",
                facts,
            )
        return right("the whole batch's gradient, in the memory of one piece.", facts)


def _require_gradients(gradients: list[Tensor], expected: list[Tensor], pieces: int) -> None:
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
