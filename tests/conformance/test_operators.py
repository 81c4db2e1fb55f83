"""Every operator of PyTorch's own database gives on a virtual GPU what it gives on the CPU.

The database (``torch.testing._internal.common_methods_invocations.op_db``) holds for each operator
the arguments that PyTorch itself tests it with. Each is run on the CPU and on ``vgpu:1``, forward
and backward, under one seed; values, shapes, strides and dtypes must be equal, bit for bit.

    pytest -n 2 tests/conformance        # all 677 operators, two minutes
    pytest                               # one in twelve, so that every `make test` sees some
    pytest tests/conformance -k softmax  # those with "softmax" in their name
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import course_lib
from conformance.database import OPERATORS

DEVICE = "vgpu:1"


@pytest.fixture(autouse=True)
def _large_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of this is about memory, and one thread is faster on inputs as small as these."""
    monkeypatch.setenv("COURSE_DEVICES", "virtual")
    course_lib.devices(2, course_lib.A100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_equals_the_cpu(op: Any) -> None:
    if op.full_name.startswith(NOT_ON_CPU):
        pytest.skip("the CPU cannot run it either")
    if op.name in SPARSE:
        said = problems(op)
        assert said
        assert all("NotImplementedError" in words and "dense" in words for words in said), said
    else:
        assert problems(op) == []


def problems(op: Any) -> list[str]:
    """How ``op`` on a virtual GPU differs from ``op`` on the CPU; empty if it does not."""
    found = []
    for number, sample in enumerate(_samples(op)):
        try:
            backward = op.supports_autograd
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
            difference = _differences(actual[part], expected[part], _comparison(op))
            if difference:
                found.append(f"sample {number}: {part}: {difference}")
        if _tensors(sample) and any(str(leaf.device) != DEVICE for leaf in _tensors(actual)):
            found.append(f"sample {number}: the result is not on {DEVICE}")
    return found


# What the CPU cannot run either: kernels for CUDA, and views of more than a copy holds.
NOT_ON_CPU = ("jiterator", "as_strided.partial_views")

# A virtual GPU holds dense tensors only, and says so.
SPARSE = {"sparse.mm", "sparse.sampled_addmm", "to_sparse"}

# They return memory as it is found there: only their shape, strides and dtype can be compared.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}

# Equal to seven digits and not to the last bit.
ROUNDED = {
    "masked_fill": "PyTorch's gradient formula sums in another order for every tensor subclass",
    "prod": "likewise",
    "masked.prod": "likewise",
    "ormqr": "likewise; equal values, other strides",
    "linalg.lstsq": "the CPU's own two runs differ: LAPACK's gelsy",
}

# Their index tensors must be on the CPU, for CUDA too.
HOST_INDICES = {"tensor_split"}


def _comparison(op: Any) -> Callable[[Any, Any], str]:
    if op.name in UNINITIALISED:
        return _same_form
    return _close if op.name in ROUNDED else _same


def _samples(op: Any) -> list[tuple[Any, tuple, dict]]:
    _seed()
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)
    return [(sample.input, sample.args, sample.kwargs) for sample in samples]


def _run(op: Any, sample: tuple[Any, tuple, dict], device: str, backward: bool) -> dict[str, Any]:
    """The operator's output and, if asked for, the gradient of every input."""
    first, args, kwargs = _moved(sample, device, keep_indices=op.name in HOST_INDICES)
    _seed()
    out = op(first, *args, **kwargs)
    result = {"output": out}
    if not backward:
        return result
    inputs = [leaf for leaf in _tensors((first, args, kwargs)) if leaf.requires_grad]
    outputs = [leaf for leaf in _tensors(out) if leaf.requires_grad]
    outputs = [leaf for leaf in outputs if leaf.is_floating_point() or leaf.is_complex()]
    if inputs and outputs:
        _seed()
        weights = [torch.randn(leaf.shape, dtype=leaf.dtype).to(device) for leaf in outputs]
        result["gradients"] = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return result


def _moved(sample: Any, device: str, keep_indices: bool) -> Any:
    """A copy of ``sample`` on ``device``: tensors, and what is said of a device."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            stays = keep_indices and value.dtype == torch.int64
            # A copy on the CPU too, so that in-place operators leave the sample as it is.
            moved = value.detach().to("cpu" if stays else device, copy=True)
            return moved.requires_grad_(value.requires_grad)
        if isinstance(value, torch.device) or value == "cpu":
            return torch.device(device)
        return value

    return tree_map(move, sample)


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _differences(actual: Any, expected: Any, compare: Callable[[Any, Any], str]) -> str:
    actual_leaves, actual_form = tree_flatten(actual)
    expected_leaves, expected_form = tree_flatten(expected)
    if actual_form != expected_form:
        return f"{actual_form} and not {expected_form}"
    said = [compare(*pair) for pair in zip(actual_leaves, expected_leaves, strict=True)]
    return "; ".join(words for words in said if words)


def _same_form(actual: Any, expected: Any) -> str:
    if not isinstance(expected, torch.Tensor):
        return "" if type(actual) is type(expected) else f"{actual!r} and not {expected!r}"
    if not isinstance(actual, torch.Tensor):
        return f"{actual!r} and not a tensor"
    for name in ("shape", "dtype", "layout", "requires_grad"):
        if getattr(actual, name) != getattr(expected, name):
            return f"{name} {getattr(actual, name)} and not {getattr(expected, name)}"
    if expected.layout == torch.strided and actual.stride() != expected.stride():
        return f"stride {actual.stride()} and not {expected.stride()}"
    return ""


def _same(actual: Any, expected: Any) -> str:
    return _same_form(actual, expected) or _compare_values(actual, expected, torch.equal)


def _close(actual: Any, expected: Any) -> str:
    return _compare_values(actual, expected, partial(torch.allclose, rtol=1e-5, atol=1e-5))


def _compare_values(
    actual: Any, expected: Any, equal: Callable[[torch.Tensor, torch.Tensor], bool]
) -> str:
    if isinstance(expected, torch.Tensor):
        actual, expected = _numbers(actual), _numbers(expected)
        same = True
        if expected.is_floating_point():
            nan = expected.isnan()
            same = torch.equal(actual.isnan(), nan)
            actual, expected = actual.masked_fill(nan, 0), expected.masked_fill(nan, 0)
        return "" if same and equal(actual, expected) else "other values"
    if isinstance(expected, float) and math.isnan(expected):
        return "" if math.isnan(actual) else f"{actual!r} and not nan"
    return "" if actual == expected or isinstance(actual, torch.device) else f"{actual!r}"


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of ``tensor`` on the CPU; a complex one is two."""
    tensor = tensor.detach().cpu().resolve_conj()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
