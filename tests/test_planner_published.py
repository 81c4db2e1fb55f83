"""What the planner promises about published runs that nobody fitted.

The constants of each split were fitted without the rows that are predicted here; they are kept in
``constants.json``, with the date of no run in them but those of the tables.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from course_lib.planner import clusters, mixture_runs, searched_runs
from course_lib.planner.communication import Network
from course_lib.planner.constants import Constants, fitted, held_out, meanings
from course_lib.planner.fit import (
    EXCHANGE,
    LINKS,
    MEMORY,
    PARTS,
    START,
    STEPS,
    errors_of,
    fit_exchange,
    fit_links,
    fit_memory,
    predicted_memory,
    predicted_seconds,
)
from course_lib.planner.layouts import check
from course_lib.planner.published import READERS, all_runs, runs
from course_lib.planner.rows import TABLES, read, source
from course_lib.planner.splits import SPLITS, part_of_peak, rival, rivals_errors

# Mean and median of the sizes of the errors, with a small margin over what the fit reaches.
PROMISES = {
    "Megatron 2021: above 30 B, from smaller": (0.03, 0.03),
    "Megatron 2021: the year left out": (0.03, 0.03),
    "Korthikanti 2022: the year left out": (0.04, 0.04),
    "vTrain: odd rows, from even rows": (0.08, 0.05),
    "vTrain: even rows, from odd rows": (0.08, 0.05),
    "vTrain: 175 B left out": (0.05, 0.055),
    "vTrain, one node: odd rows, from even rows": (0.10, 0.09),
    "BLOOM: left out": (0.105, 0.09),
    "BLOOM: odd rows, from even rows": (0.07, 0.055),
    "BLOOM: even rows, from odd rows": (0.07, 0.055),
    "Zero Bubble: above 20 B, from smaller": (0.055, 0.05),
    "llm-foundry: 32 GPUs and more, from fewer": (0.06, 0.04),
    "llm-foundry: 13b and above, from smaller": (0.09, 0.08),
    "torchtitan: 2025 left out": (0.12, 0.11),
    "NeMo: H100 left out": (0.12, 0.12),
    "Llama 3 405B left out": (0.05, 0.05),
    "memory, Zero Bubble left out": (0.02, 0.02),
    "memory, torchtitan left out": (0.045, 0.04),
    "memory, BLOOM left out": (0.07, 0.05),
}


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_rows_that_nobody_fitted_are_predicted_as_promised(split) -> None:
    ours, others = errors_of(split, held_out()[split.name])
    mean, median = PROMISES[split.name]
    assert np.abs(ours).mean() <= mean
    assert np.median(np.abs(ours)) <= median
    if others is not None:  # the constant MFU of a table
        assert np.abs(ours).mean() < np.abs(others).mean() * 1.05


@pytest.mark.parametrize("table", searched_runs.TABLES)
def test_megatron_core_on_h100s_is_within_8_percent_with_what_the_search_chooses(
    table: str,
) -> None:
    errors = searched_runs.errors(table, fitted())
    assert np.mean(np.abs(errors)) <= 0.08
    assert np.median(np.abs(errors)) <= 0.07


def test_a_rival_that_never_saw_megatron_core_is_no_closer_on_both() -> None:
    means = [
        [np.abs(errors).mean() for errors in (searched_runs.errors(table, fitted()), rivals)]
        for table in searched_runs.TABLES
        for rivals in [rivals_errors(list(searched_runs.stated(table)), all_runs())]
    ]
    assert sum(ours for ours, _ in means) < sum(others for _, others in means)


MIXTURES = {"Mixtral in bf16": 0.06, "Qwen3 in bf16": 0.17, "Qwen3 in fp8": 0.50}


def test_mixtures_of_experts_take_longer_than_planned_and_by_how_much() -> None:
    """Of eight large experts by little, of 128 small ones by much; one MFU is further off."""
    judged = mixture_runs.judged(fitted(), all_runs())
    assert set(judged) == set(MIXTURES)
    for kind, (ours, others) in judged.items():
        assert np.abs(ours).mean() <= MIXTURES[kind]
        assert (ours < 0).all()
        assert np.abs(ours).mean() < np.abs(others).mean()
    for run in mixture_runs.mixtures():
        check(run.model, run.cluster, run.layout)


def test_llama_3_405b_is_within_10_percent_of_its_published_mfu() -> None:
    constants = held_out()["Llama 3 405B left out"]
    for run, row in zip(runs("llama3"), read("llama3_table4"), strict=True):
        predicted = float(row["mfu_pct"]) * run.seconds / predicted_seconds(run, constants)
        assert predicted == pytest.approx(float(row["mfu_pct"]), rel=0.10)


def test_memory_of_all_measured_runs_is_within_7_percent_on_average() -> None:
    measured = [run for run in all_runs() if run.memory]
    errors = [abs(predicted_memory(run, fitted()) / run.memory - 1) for run in measured]
    assert len(measured) > 80
    assert np.mean(errors) <= 0.03


def test_memory_of_tensors_alone_takes_no_constant() -> None:
    """Zero Bubble's 48 runs, by the formulas of the papers."""
    for run in runs("zero_bubble"):
        without = replace(fitted(), outside=0.0, fragments=1.0)
        assert predicted_memory(run, fitted()) == predicted_memory(run, without)
        assert predicted_memory(run, without) == pytest.approx(run.memory, rel=0.035)


def test_all_reduces_within_a_node_are_those_that_were_measured() -> None:
    network = Network(clusters.cluster("A100", 8), fitted())
    errors = []
    for row in read("a100_nvlink_allreduce"):
        if int(row["MiB"]) < 16:
            continue  # what a step sends is larger
        size = float(row["MiB"]) * 2**20
        found = network.ring("", size, int(row["gpus"]), 1, rounds=2, count=1).seconds
        errors.append(abs(found / (float(row["time_ns"]) * 1e-9) - 1))
    assert np.mean(errors) <= 0.08


def test_the_links_constants_come_from_their_fit() -> None:
    links = fit_links()
    for name in LINKS:
        assert getattr(fitted(), name) == pytest.approx(getattr(links, name), rel=0.01)


def test_the_constants_of_memory_come_from_their_fit() -> None:
    """Without a split's held-out rows, too: what is kept is what the script finds."""
    for split in SPLITS[-3:]:
        kept = held_out()[split.name]
        train = [run for run in all_runs() if not split.held(run)]
        found = fit_memory(train, fit_links())
        for name in MEMORY:
            assert getattr(found, name) == pytest.approx(getattr(kept, name), rel=0.01)


def test_the_constant_of_blooms_exchange_comes_from_its_fit() -> None:
    for split in SPLITS:
        if split.name.startswith("BLOOM"):
            kept = held_out()[split.name]
            train = [run for run in all_runs() if not split.held(run)]
            found = fit_exchange(train, replace(kept, exchange_2021=START.exchange_2021))
            assert found.exchange_2021 == pytest.approx(kept.exchange_2021, rel=0.01)


def test_every_constant_is_fitted_and_means_a_part_or_a_size() -> None:
    assert set(LINKS + MEMORY + EXCHANGE + STEPS) == set(asdict(fitted()))
    for constants in (fitted(), *held_out().values()):
        for name, value in asdict(constants).items():
            assert value > 0
            assert value <= 1 or name not in PARTS
    assert len(asdict(fitted())) < 30
    assert list(meanings()) == list(asdict(fitted()))


def test_every_split_holds_rows_out_and_has_constants_of_its_own() -> None:
    assert set(held_out()) == {split.name for split in SPLITS} == set(PROMISES)
    everything = all_runs()
    for split in SPLITS:
        held = [run for run in everything if split.held(run)]
        assert 0 < len(held) < len(everything)


def test_the_rival_is_right_where_all_runs_reach_the_same_part_of_the_peak() -> None:
    run = runs("llama3")[0]
    (predicted,) = rival([run], [run])
    assert predicted == pytest.approx(run.seconds)
    assert part_of_peak(run) == pytest.approx(0.45, abs=0.03)  # with all scores counted


def test_every_table_says_where_it_comes_from() -> None:
    for path in TABLES.glob("*.csv"):
        assert "@" in source(path.stem) or "arXiv" in source(path.stem), path.name


@pytest.mark.parametrize("table", READERS)
def test_every_published_run_is_a_layout_that_the_planner_accepts(table: str) -> None:
    found = runs(table)
    assert found
    for run in found:
        check(run.model, run.cluster, run.layout)
        assert run.seconds > 0


def test_a_constant_that_nothing_holds_is_found_again() -> None:
    """The method on a problem whose answer is known."""
    from course_lib.planner.least_squares import Problem, minimize

    wanted = {"step": 0.02, "hidden": 0.6}
    place = np.linspace(0.1, 3, 400)

    def errors(constants: Constants) -> np.ndarray:
        found = constants.step + constants.hidden * place
        return np.log(found / (wanted["step"] + wanted["hidden"] * place))

    problem = Problem(errors, np.ones(400) * 100, ("step", "hidden"), frozenset({"hidden"}))
    found = minimize(problem, START)
    assert found.step == pytest.approx(0.02, rel=0.05)
    assert found.hidden == pytest.approx(0.6, rel=0.01)
