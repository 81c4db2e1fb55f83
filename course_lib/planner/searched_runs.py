"""Megatron Core's runs on H100s, which nobody fitted, and whose layouts are stated in part.

Tensor, pipeline and data parallelism are stated; microbatch, virtual stages and recomputation are
not. The search chooses them, as the people who ran it must have. The strong-scaling table was
digitized from a picture (about 1 %).

Why one MFU is closer here. One team tuned each of these runs, and all but the smallest reach 42 to
49 % of the peak: that spread is all that there is to foretell. The planner is off where it has to
guess (the 462 B model is taken to have no virtual stages, for want of memory), and where products
are small: the models of 1.7 and 7.1 B are slower than it says. A part of its own for hidden sums of
tensor parallelism was tried: fitted on the tables that know it, these two came out no better.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from course_lib.planner.clusters import cluster
from course_lib.planner.constants import Constants
from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model
from course_lib.planner.rows import Run, read
from course_lib.planner.searching import search

TABLES = ("megatron_core_h100_weak", "megatron_core_h100_strong")


def stated(table: str) -> Iterator[Run]:
    """The runs of a table, each in a layout with what is stated of it."""
    for row in read(table):
        # The strong-scaling table is of one model: 177 B parameters, 1,152 sequences a step.
        layers, hidden = int(row.get("layers", 96)), int(row.get("hidden", 12288))
        heads, batch = int(row.get("heads", 96)), int(row.get("batch", 1152))
        tensor, pipeline = int(row.get("tp", 8)), int(row.get("pp", 6))
        gpus, vocabulary, length = int(row["gpus"]), 131072, 4096
        model = Model("", layers, hidden, heads, 4 * hidden, vocabulary, biased=False)
        layout = Layout(
            batch,
            length,
            data=gpus // tensor // pipeline,
            sharded=1,
            tensor=tensor,
            pipeline=pipeline,
            overlap_tensor=True,
        )
        # Its TFLOP/s count all scores, and no recomputation (arXiv:2104.04473, equation 3).
        inside = 1 + length / (6 * hidden) + vocabulary / (12 * layers * hidden)
        flops = 72.0 * batch * length * layers * hidden**2 * inside
        measured = flops / (gpus * float(row["tflops_per_gpu"]) * 1e12)
        yield Run(table, model.name, model, cluster("H100", gpus), layout, measured)


def errors(table: str, constants: Constants) -> list[float]:
    """Relative errors of the seconds that the search's first choice takes, a row each."""
    found = []
    for run in stated(table):
        layout = run.layout
        first = search(
            run.model,
            run.cluster,
            layout.batch,
            layout.sequence_length,
            memory_limit=80e9,
            keep=1,
            constants=constants,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            data=layout.data,
            sharded=1,
            overlap_tensor=True,
        ).best[0]
        found.append(first.seconds / run.seconds - 1)
    return found


def own_rival(table: str) -> np.ndarray:
    """Relative errors of seconds by the middle MFU of the table's own rows."""
    reached = np.array([float(row["mfu_pct"]) for row in read(table)])
    return reached / np.median(reached) - 1
