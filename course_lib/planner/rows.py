"""Tables of published measurements, and what a row of one is: a run that can be predicted.

Each table is a file in ``tables/``; its first lines say where it comes from.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from course_lib.planner.clusters import Cluster
from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model

TABLES = Path(__file__).with_name("tables")
Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        table: the table that it is in.
        group: what it is left out with, in splits by model.
        model, cluster, layout: what ran; the layout's kernels are those of its software.
        seconds: of a step, measured; 0 if the source does not say.
        memory: bytes on the fullest GPU, measured; 0 if the source does not say.
        row: which of its table, counted from 0.
        counted: what that memory is: ``"tensors"``, what PyTorch's ``"allocator"`` holds for
            them, or ``"all"`` that is taken of the GPU.
    """

    table: str
    group: str
    model: Model
    cluster: Cluster
    layout: Layout
    seconds: float = 0.0
    memory: float = 0.0
    counted: str = "all"
    row: int = 0


def read(table: str) -> list[Row]:
    """The rows of a table, without its lines of comment."""
    lines = (TABLES / f"{table}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def source(table: str) -> str:
    """Where a table comes from."""
    first = (TABLES / f"{table}.csv").read_text().splitlines()[0]
    return first.removeprefix("# source: ")
