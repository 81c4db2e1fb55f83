"""All published runs, by table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from course_lib.planner.megatron_runs import (
    bloom,
    korthikanti,
    megatron_2020,
    megatron_2021,
    vtrain,
    zero_bubble,
)
from course_lib.planner.rows import Run
from course_lib.planner.sharded_runs import llama3, llm_foundry, nemo, torchtitan

READERS: dict[str, Callable[[], Iterator[Run]]] = {
    "megatron_2020": megatron_2020,
    "megatron_2021": megatron_2021,
    "korthikanti": korthikanti,
    "vtrain_multi": lambda: vtrain("vtrain_multi"),
    "vtrain_single": lambda: vtrain("vtrain_single"),
    "bloom": bloom,
    "zero_bubble": zero_bubble,
    "llm_foundry": llm_foundry,
    "torchtitan": torchtitan,
    "nemo": nemo,
    "llama3": llama3,
}


def runs(table: str) -> list[Run]:
    """All runs of a table."""
    return [replace(run, row=row) for row, run in enumerate(READERS[table]())]


def all_runs() -> list[Run]:
    """Every run of every table."""
    return [run for table in READERS for run in runs(table)]
