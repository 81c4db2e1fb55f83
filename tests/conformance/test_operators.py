"""Every operator of PyTorch's own database gives on a virtual GPU what it gives on the CPU.

The database (``torch.testing._internal.common_methods_invocations.op_db``) holds for each operator
the arguments that PyTorch itself tests it with. Each is run on the CPU and on ``vgpu:1``, forward
and backward, under one seed; values, shapes, strides and dtypes must be equal, bit for bit: in
float32 on every sample, in bfloat16 and float64 on the first. ``exceptions.py`` says what is not.

    make conformance                     # all of it
    make test                            # a part
    pytest tests/conformance -k softmax  # the operators with "softmax" in their name
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from conformance.database import OPERATORS
from conformance.equality import differences, moved, seed, tensors
from conformance.exceptions import Kind, kind_of

DEVICE = "vgpu:1"

# Their index tensors must be on the CPU, for CUDA too.
HOST_INDICES = {"tensor_split"}

Sample = tuple[Any, tuple, dict]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_the_cpu_in_float32_on_every_sample(name: str) -> None:
    check(name, torch.float32)


@pytest.mark.parametrize(
    "name",
    [name for name, op in OPERATORS.items() if op.supports_dtype(torch.bfloat16, "cpu")],
)
def test_operator_equals_the_cpu_in_bfloat16(name: str) -> None:
    check(name, torch.bfloat16, samples=1)


@pytest.mark.parametrize(
    "name",
    [name for name, op in OPERATORS.items() if op.supports_dtype(torch.float64, "cpu")],
)
def test_operator_equals_the_cpu_in_float64(name: str) -> None:
    check(name, torch.float64, samples=1)


def check(name: str, dtype: torch.dtype, samples: int | None = None) -> None:
    op = OPERATORS[name]
    kind = kind_of(name, dtype)
    if kind is Kind.NO_REFERENCE:
        # When PyTorch gives it to the CPU one day, the table must lose its row.
        with pytest.raises(AssertionError, match="only supported on CUDA"):
            problems(op, dtype, kind, samples)
    elif kind is Kind.REFUSED:
        said = problems(op, dtype, kind, samples)
        assert said
        for words in said:
            assert "NotImplementedError" in words and "dense" in words and "\n" not in words
    else:
        assert problems(op, dtype, kind, samples) == []


def test_at_least_99_percent_of_the_operators_pass() -> None:
    """What the table excuses from having the CPU's numbers; all else fails if it has not."""
    kinds = [kind_of(name) for name in OPERATORS]
    with_reference = [kind for kind in kinds if kind is not Kind.NO_REFERENCE]
    passing = [kind for kind in with_reference if kind is not Kind.REFUSED]
    assert len(passing) >= 0.99 * len(with_reference)


def problems(
    op: Any, dtype: torch.dtype, kind: Kind | None = None, samples: int | None = None
) -> list[str]:
    """How ``op`` on a virtual GPU differs from ``op`` on the CPU; empty if it does not."""
    found = []
    differentiable = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    for number, sample in enumerate(islice(_samples(op, dtype, differentiable), samples)):
        backward = differentiable
        try:
            expected = _run(op, sample, "cpu", backward)
        except RuntimeError:  # an ill-defined gradient
            backward = False
            expected = _run(op, sample, "cpu", backward)
        try:
            actual = _run(op, sample, DEVICE, backward)
        except Exception as error:
            found.append(f"sample {number}: {type(error).__name__}: {error}")
            continue
        for part in expected:
            difference = differences(actual[part], expected[part], kind)
            if difference:
                found.append(f"sample {number}: {part}: {difference}")
        if tensors(sample) and any(str(leaf.device) != DEVICE for leaf in tensors(actual)):
            found.append(f"sample {number}: the result is not on {DEVICE}")
    return found


def _samples(op: Any, dtype: torch.dtype, requires_grad: bool) -> Iterator[Sample]:
    seed()
    for sample in op.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        yield sample.input, sample.args, sample.kwargs


def _run(op: Any, sample: Sample, device: str, backward: bool) -> dict[str, Any]:
    """The operator's output and, if asked for, the gradient of every input."""
    first, args, kwargs = moved(sample, device, keep_indices=op.name in HOST_INDICES)
    seed()
    out = op(first, *args, **kwargs)
    result = {"output": out}
    if not backward:
        return result
    inputs = [leaf for leaf in tensors((first, args, kwargs)) if leaf.requires_grad]
    outputs = [leaf for leaf in tensors(out) if leaf.requires_grad]
    outputs = [leaf for leaf in outputs if leaf.is_floating_point() or leaf.is_complex()]
    if inputs and outputs:
        seed()
        weights = [torch.randn(leaf.shape, dtype=leaf.dtype).to(device) for leaf in outputs]
        result["gradients"] = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return result
