"""What it means that a virtual GPU and the CPU give the same: device, form, and every bit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from conformance.exceptions import Kind

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


def seed() -> None:
    """Reset every source of random numbers that a sample or an operator may draw on."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def moved(sample: Any, device: str, keep_indices: bool = False) -> Any:
    """A copy of ``sample`` on ``device``: its tensors, and what it says of a device.

    A copy on the CPU too, so that in-place operators leave the sample as it is.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            stays = keep_indices and value.dtype == torch.int64
            return _copied(value.detach(), "cpu" if stays else device).requires_grad_(
                value.requires_grad
            )
        if isinstance(value, torch.device) or value == "cpu":
            return torch.device(device)
        return value

    return tree_map(move, sample)


def _copied(value: torch.Tensor, device: str) -> torch.Tensor:
    if not _is_part_of_a_row(value):
        return value.to(device, copy=True)
    # as_strided reaches outside of such a view, so what is around it moves with it.
    count = value.untyped_storage().nbytes() // value.element_size()
    whole = value.as_strided((count,), (1,), 0).to(device, copy=True)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _is_part_of_a_row(value: torch.Tensor) -> bool:
    return (
        value.layout == torch.strided
        and value.dim() == 1
        and value.is_contiguous()
        and value.storage_offset() > 0
        and not value.is_conj()
        and not value.is_neg()
    )


def differences(actual: Any, expected: Any, kind: Kind | None) -> str:
    """How ``actual``, a tree of tensors and other values, differs; empty if it does not."""
    actual_leaves, actual_form = tree_flatten(actual)
    expected_leaves, expected_form = tree_flatten(expected)
    if actual_form != expected_form:
        return f"{actual_form} and not {expected_form}"
    compare = _COMPARISONS.get(kind, _same)
    said = [compare(*pair) for pair in zip(actual_leaves, expected_leaves, strict=True)]
    return "; ".join(words for words in said if words)


def _same_form(actual: Any, expected: Any, strides: bool = True) -> str:
    if not isinstance(expected, torch.Tensor):
        return "" if type(actual) is type(expected) else f"{actual!r} and not {expected!r}"
    if not isinstance(actual, torch.Tensor):
        return f"{actual!r} and not a tensor"
    for name in ("shape", "dtype", "layout", "requires_grad"):
        if getattr(actual, name) != getattr(expected, name):
            return f"{name} {getattr(actual, name)} and not {getattr(expected, name)}"
    if strides and expected.layout == torch.strided and actual.stride() != expected.stride():
        return f"stride {actual.stride()} and not {expected.stride()}"
    return ""


def _same(actual: Any, expected: Any) -> str:
    return _same_form(actual, expected) or _compare_values(actual, expected, torch.equal)


def _close(actual: Any, expected: Any) -> str:
    tolerance = TOLERANCE.get(getattr(expected, "dtype", None), TOLERANCE[torch.float32])
    return _same_form(actual, expected, strides=False) or _compare_values(
        actual, expected, partial(torch.allclose, **tolerance)
    )


_COMPARISONS: dict[Kind | None, Callable[[Any, Any], str]] = {
    Kind.CLOSE: _close,
    Kind.FORM: _same_form,
}


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
