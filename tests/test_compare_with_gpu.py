"""The comparison with a real GPU: what can be tried without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare_with_gpu
import course_lib
from compare_with_gpu import (
    CASES,
    RESULT,
    Measurement,
    fit,
    measure,
    operator_name,
    report,
    spec_of,
)
from course_lib import A100, H100, H200

SIMULATED = Measurement(
    seconds=10e-3,
    by_kind={"matmul": 6e-3, "other": 3e-3, "copy": 1e-3},
    by_operator={"mm": 4e-3, "addmm": 2e-3, "sqrt": 3e-3, "copy": 1e-3},
    peak_memory=50_000_000,
)
MEASURED = Measurement(
    seconds=17e-3,
    by_kind={"matmul": 12e-3, "other": 4e-3, "copy": 1e-3},
    by_operator={"mm": 5e-3, "addmm": 7e-3, "_foreach_sqrt": 4e-3, "copy": 500e-6},
    peak_memory=60_000_000,
)
LARGE = next(case for case in CASES if case.compute_bound)
SMALL = next(case for case in CASES if not case.compute_bound)


def test_a_gpu_is_known_by_its_name():
    assert spec_of("NVIDIA A100-SXM4-80GB") is A100
    assert spec_of("NVIDIA H100 80GB HBM3") is H100
    assert spec_of("NVIDIA H200") is H200


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "Tesla T4"])
def test_another_gpu_is_refused_in_one_line(name: str):
    with pytest.raises(SystemExit) as caught:
        spec_of(name)
    assert name in str(caught.value) and "NVIDIA H200" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = RESULT.read_bytes()
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        compare_with_gpu.main()
    assert RESULT.read_bytes() == before


def test_small_and_large_steps_of_both_models_are_compared_in_both_precisions():
    kinds = {(case.name[:3], case.compute_bound, case.precision) for case in CASES}
    assert len(kinds) == 2 * 2 * 2
    assert len({case.title for case in CASES}) == len(CASES)


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of every table row in one section of a page, by the first of them."""
    (section,) = (part for part in page.split("\n## ") if part.startswith(heading))
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in rows}


def test_the_page_compares_times_kinds_and_memory_of_each_step():
    page = report({LARGE: MEASURED}, {LARGE: SIMULATED}, on="one GPU")
    rows = rows_of(page, LARGE.title)
    assert rows["time of a step"] == ["17.00 ms", "10.00 ms", "1.70"]
    assert rows["matrix products"] == ["12.00 ms", "6.00 ms", "2.00"]
    assert rows["other operations"] == ["4.00 ms", "3.00 ms", "1.33"]
    assert rows["peak memory"] == ["60.00 MB", "50.00 MB", "1.20"]


def test_the_page_compares_operators_that_both_have_and_says_what_is_left():
    page = report({LARGE: MEASURED}, {LARGE: SIMULATED}, on="one GPU")
    rows = rows_of(page, LARGE.title)
    assert rows["`addmm`"] == ["7.00 ms", "2.00 ms", "3.50"]
    assert rows["`copy`"] == ["500.0 µs", "1.00 ms", "0.50"]
    assert [name for name in rows if name.startswith("`")] == ["`addmm`", "`mm`", "`copy`"]
    assert "only one of them has: 24% of the measured time, 30% of the simulated time." in page


def test_the_page_begins_with_the_machine_and_the_ratios_of_all_steps():
    on = "one NVIDIA H200, 2030-01-01, with PyTorch 3"
    page = report({LARGE: MEASURED, SMALL: SIMULATED}, {LARGE: SIMULATED, SMALL: SIMULATED}, on)
    assert f"Measured on {on}." in page
    rows = rows_of(page, "# Simulated and measured")
    assert rows[LARGE.title] == ["the GPU", "1.70", "2.00", "1.33", "1.00", "1.20"]
    assert rows[SMALL.title] == ["launches", *["1.00"] * 5]


def test_a_time_that_was_not_simulated_has_no_ratio():
    nothing = dataclasses.replace(SIMULATED, by_kind={"matmul": 6e-3, "other": 3e-3, "copy": 0.0})
    rows = rows_of(report({LARGE: MEASURED}, {LARGE: nothing}, on="one GPU"), LARGE.title)
    assert rows["copies"][-1] == "–"


def test_efficiencies_are_fitted_to_the_steps_that_the_gpu_bounds():
    other = dataclasses.replace(MEASURED, seconds=20e-3)
    measured = {LARGE: MEASURED, CASES[3]: other, SMALL: SIMULATED}
    text = " ".join(fit(measured, dict.fromkeys(measured, SIMULATED)))
    assert "matrix products 50%, other operations 75%" in text
    assert "within 15% of the measured one" in text  # 17 ms, and the second took 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::addmm", "addmm"),
        ("aten::copy_", "copy"),
        ("aten::_flash_attention_forward", "attention"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "attention backward"),
    ],
)
def test_an_operator_has_one_name_on_every_device(name: str, expected: str):
    assert operator_name(name) == expected


def test_a_step_is_measured_on_a_virtual_gpu_as_on_a_real_one(vgpus):
    (gpu,) = course_lib.devices(1, H200)
    step = measure(SMALL, gpu)
    busy = sum(step.by_kind.values())
    assert 0 < busy < step.seconds  # bound by launches
    assert sum(step.by_operator.values()) == pytest.approx(busy)
    assert step.by_operator["addmm"] > 0
    weights = 64 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
    assert step.peak_memory > 4 * 4 * weights  # parameters, gradients, two states


def test_it_writes_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    devices = course_lib.devices
    monkeypatch.setenv("COURSE_DEVICES", "virtual")  # which main() sets, and this sets back
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(
        course_lib, "devices", lambda count, spec=H200, backing="meta": devices(1, spec, backing)
    )
    monkeypatch.setattr(compare_with_gpu, "RESULT", tmp_path / "MEASURED.md")
    case = dataclasses.replace(SMALL, compute_bound=True)
    monkeypatch.setattr(compare_with_gpu, "CASES", [case])
    compare_with_gpu.main()
    page = (tmp_path / "MEASURED.md").read_text(encoding="utf-8")
    assert "Measured on one NVIDIA H200, 2" in page and f"PyTorch {torch.__version__}" in page
    assert rows_of(page, case.title)["time of a step"][-1] == "1.00"  # virtual beside virtual
    assert capsys.readouterr().out.splitlines()[-1].endswith("MEASURED.md")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_profiler_names_operators_as_virtual_gpus_do(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(8, 8)
    assert operator_name("mm") in compare_with_gpu._operators_profiled(lambda: x @ x)
