"""Honest splits of the published runs: what is fitted on, and what is predicted from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from course_lib.planner.clusters import family
from course_lib.planner.rows import Run


@dataclass(frozen=True)
class Split:
    """Rows that nobody fitted.

    Attributes:
        name: what is predicted from what.
        held: whether a run is held out.
        quantity: ``"seconds"`` or ``"memory"``.
    """

    name: str
    held: Callable[[Run], bool]
    quantity: str = "seconds"


def _table(name: str) -> Callable[[Run], bool]:
    return lambda run: run.table == name


def _large(table: str, parameters: float) -> Callable[[Run], bool]:
    return lambda run: run.table == table and run.model.parameters > parameters


def _wide(table: str, gpus: int) -> Callable[[Run], bool]:
    return lambda run: run.table == table and run.cluster.gpus >= gpus


def _group(table: str, *groups: str) -> Callable[[Run], bool]:
    return lambda run: run.table == table and run.group in groups


def _half(table: str, which: int) -> Callable[[Run], bool]:
    return lambda run: run.table == table and run.row % 2 == which


SPLITS = (
    Split("Megatron 2021: above 30 B, from smaller", _large("megatron_2021", 30e9)),
    Split("Megatron 2021: the year left out", _table("megatron_2021")),
    Split("Korthikanti 2022: the year left out", _table("korthikanti")),
    Split("vTrain: odd rows, from even rows", _half("vtrain_multi", 1)),
    Split("vTrain: even rows, from odd rows", _half("vtrain_multi", 0)),
    Split("vTrain: 175 B left out", _large("vtrain_multi", 100e9)),
    Split("vTrain, one node: odd rows, from even rows", _half("vtrain_single", 1)),
    Split("BLOOM: left out", _table("bloom")),
    Split("BLOOM: odd rows, from even rows", _half("bloom", 1)),
    Split("BLOOM: even rows, from odd rows", _half("bloom", 0)),
    Split("Zero Bubble: above 20 B, from smaller", _large("zero_bubble", 20e9)),
    Split("llm-foundry: 32 GPUs and more, from fewer", _wide("llm_foundry", 32)),
    Split("llm-foundry: 13b and above, from smaller", _large("llm_foundry", 10e9)),
    Split("torchtitan: 2025 left out", _group("torchtitan", "70B async", "8B async")),
    Split("NeMo: H100 left out", _group("nemo", "H100 LLAMA3_70B", "H100 LLAMA3.1_405B")),
    Split("Llama 3 405B left out", _table("llama3")),
    Split("memory, Zero Bubble left out", _table("zero_bubble"), "memory"),
    Split("memory, torchtitan left out", _table("torchtitan"), "memory"),
    Split("memory, BLOOM left out", _table("bloom"), "memory"),
)


def part_of_peak(run: Run) -> float:
    """The MFU that a run reached."""
    layout = run.layout
    tokens = layout.batch * layout.sequence_length
    flops = run.model.flops_per_token(layout.sequence_length) * tokens
    peak = run.cluster.gpu.peak_flops(torch.bfloat16) * run.cluster.gpus
    return flops / (peak * run.seconds)


def rival(train: list[Run], held: list[Run]) -> list[float]:
    """Seconds by one number: the middle MFU of the fitted rows of the same table and GPU.

    Where the whole table is held out, the middle of the other tables' middles on the same GPU.
    """
    reached: dict[tuple[str, str], list[float]] = {}
    for run in train:
        reached.setdefault((family(run.cluster.gpu), run.table), []).append(part_of_peak(run))
    middles = {key: float(np.median(parts)) for key, parts in reached.items()}
    predicted = []
    for run in held:
        gpu = family(run.cluster.gpu)
        alike = [middle for (other, _), middle in middles.items() if other == gpu]
        others = float(np.median(alike or list(middles.values())))
        middle = middles.get((gpu, run.table), others)
        predicted.append(run.seconds * part_of_peak(run) / middle)
    return predicted


def rivals_errors(held: list[Run], train: list[Run]) -> np.ndarray:
    """Relative errors of these seconds."""
    seconds = np.array([run.seconds for run in held])
    return np.array(rival(train, held)) / seconds - 1
