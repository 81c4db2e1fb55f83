"""Megatron Core's runs on H100s, which nobody fitted, and whose layouts are stated in part.

Tensor, pipeline and data parallelism are stated; microbatch, virtual stages and recomputation are
not. The search chooses them, as the people who ran it must have. The strong-scaling table was
digitized from a picture (about 1 %).
"""

from __future__ import annotations

import numpy as np

from course_lib.planner.clusters import cluster
from course_lib.planner.constants import Constants
from course_lib.planner.models import Model
from course_lib.planner.rows import read
from course_lib.planner.searching import search

TABLES = ("megatron_core_h100_weak", "megatron_core_h100_strong")


def errors(table: str, constants: Constants) -> list[float]:
    """Relative errors of the seconds that the search's first choice takes, a row each."""
    found = []
    for row in read(table):
        # The strong-scaling table is of one model: 177 B parameters, 1,152 sequences a step.
        layers, hidden = int(row.get("layers", 96)), int(row.get("hidden", 12288))
        heads, batch = int(row.get("heads", 96)), int(row.get("batch", 1152))
        tensor, pipeline = int(row.get("tp", 8)), int(row.get("pp", 6))
        gpus, vocabulary, length = int(row["gpus"]), 131072, 4096
        model = Model("", layers, hidden, heads, 4 * hidden, vocabulary, biased=False)
        first = search(
            model,
            cluster("H100", gpus),
            batch,
            length,
            memory_limit=80e9,
            keep=1,
            constants=constants,
            tensor=tensor,
            pipeline=pipeline,
            data=gpus // tensor // pipeline,
            sharded=1,
            overlap_tensor=True,
        ).best[0]
        # Its TFLOP/s count all scores, and no recomputation (arXiv:2104.04473, equation 3).
        inside = 1 + length / (6 * hidden) + vocabulary / (12 * layers * hidden)
        flops = 72.0 * batch * length * layers * hidden**2 * inside
        measured = flops / (gpus * float(row["tflops_per_gpu"]) * 1e12)
        found.append(first.seconds / measured - 1)
    return found


def own_rival(table: str) -> np.ndarray:
    """Relative errors of seconds by the middle MFU of the table's own rows."""
    reached = np.array([float(row["mfu_pct"]) for row in read(table)])
    return reached / np.median(reached) - 1
