"""Without numbers, an operator is asked once for each form of its arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import course_lib
from course_lib.virtual import known_forms


@pytest.fixture
def gpu() -> torch.device:
    known_forms._forms.clear()
    return course_lib.devices(1, backing="meta")[0]


def form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype


CALCULATIONS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "a sum with a whole number": lambda x: x.int() + 1,
    "a sum with a fraction": lambda x: x.int() + 1.0,
    "a sum with a truth": lambda x: x.int() + True,
    "a transposed one": lambda x: x.t() * 2,
    "a part": lambda x: x[:, 1:3] * 2,
    "a broadcast": lambda x: x * x[0],
    "a product": lambda x: x @ x.t(),
    "a normalisation": lambda x: F.rms_norm(x, (x.shape[-1],)),
    "several results": lambda x: torch.max(x, dim=0),
    "a mean that keeps": lambda x: x.mean(0, keepdim=True),
    "a cut into parts": lambda x: x.sigmoid().chunk(2),
    "joined": lambda x: torch.cat([x, x], dim=1),
    "another dtype": lambda x: x.to(torch.float64) / 3,
}


@pytest.mark.parametrize("calculation", CALCULATIONS.values(), ids=CALCULATIONS)
def test_asked_twice_the_result_has_the_form_that_the_cpu_gives(gpu, calculation) -> None:
    expected = calculation(torch.ones(4, 6))
    for _ in range(2):
        result = calculation(torch.empty(4, 6, device=gpu))
        pairs = (
            [(result, expected)]
            if isinstance(result, Tensor)
            else zip(result, expected, strict=True)
        )
        for one, other in pairs:
            assert form(one) == form(other)


def test_all_calculations_in_a_row_do_not_disturb_each_other(gpu) -> None:
    for calculation in [*CALCULATIONS.values(), *reversed(CALCULATIONS.values())]:
        expected = calculation(torch.ones(4, 6))
        result = calculation(torch.empty(4, 6, device=gpu))
        if isinstance(result, Tensor):
            assert form(result) == form(expected)


def test_it_is_asked_once(gpu, monkeypatch) -> None:
    x = torch.empty(4, 6, device=gpu)
    x * 2
    asked = []
    monkeypatch.setattr(known_forms, "_keep", lambda *of: asked.append(of))
    x * 2
    assert not asked
    x * 3
    assert len(asked) == 1


def test_in_place_it_returns_the_tensor_itself(gpu) -> None:
    x = torch.empty(4, 6, device=gpu)
    for _ in range(2):
        assert x.mul_(2) is x


def test_what_does_not_fit_is_refused_each_time(gpu) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            torch.empty(4, 6, device=gpu) + torch.empty(5, device=gpu)
        with pytest.raises(RuntimeError):
            torch.empty(6, device=gpu).add_(torch.empty(4, 6, device=gpu))


def test_the_default_dtype_counts(gpu) -> None:
    whole = torch.empty(3, dtype=torch.int64, device=gpu)
    assert (whole / 2).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert (whole / 2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_memory_and_seconds_are_the_same_when_it_is_known(gpu) -> None:
    x = torch.empty(64, 64, device=gpu)
    seen = []
    for _ in range(2):
        course_lib.synchronize()
        start, before = course_lib.host_seconds(), course_lib.memory_in_use(gpu)
        y = F.rms_norm(x * 2, (64,))
        course_lib.synchronize()
        seen.append((course_lib.host_seconds() - start, course_lib.memory_in_use(gpu) - before))
        del y
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-12)
    assert seen[0][1] == seen[1][1] > 0


def test_old_answers_go_when_there_are_too_many(gpu, monkeypatch) -> None:
    monkeypatch.setattr(known_forms, "MOST", 5)
    x = torch.empty(4, device=gpu)
    for factor in range(20):
        x * factor
    assert len(known_forms._forms) <= 5
