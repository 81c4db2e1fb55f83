"""Published runs of mixtures of experts, which nobody fitted.

The planner's experts are products and exchanges. That tells Mixtral's run, with its eight large
experts, and not those of Qwen3, with 128 small ones: sorting tokens, products that are too small
to fill a GPU, and a host that is busy with many of them are in no formula here. So the planner is
too fast there, in 8 bits by more than in 16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from course_lib.planner.clusters import cluster
from course_lib.planner.constants import Constants
from course_lib.planner.layouts import Layout
from course_lib.planner.models import MODELS
from course_lib.planner.rows import Run, read
from course_lib.planner.splits import rivals_errors
from course_lib.planner.timing import step_time

TABLE = "moe_pretrain"


def mixtures() -> Iterator[Run]:
    """Mixtral and Qwen3. Recomputation is not stated: none; ``n/a`` is taken to be 1F1B.

    Megatron may split experts over tensor-parallel GPUs, too. Where it did, a GPU gets as much of
    them here by fewer GPUs for experts, each of which splits them by tensor parallelism.
    """
    for row in read(TABLE):
        model = MODELS[row["model"]]
        gpus, tensor, stages = int(row["gpus"]), int(row["tp"]), int(row["pp"])
        data, length = gpus // tensor // stages, int(row["seq"])
        virtual = int(row["vp"]) if row["vp"] != "n/a" else 1
        layout = Layout(
            batch=int(row["gbs"]),
            sequence_length=length,
            data=data,
            sharded=1,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            pipeline=stages,
            schedule="interleaved" if virtual > 1 else "1F1B",
            virtual_stages=virtual,
            expert=min(int(row["ep"]), data),
            microbatch=int(row["mbs"]),
            precision="bf16" if row["precision"] == "BF16" else "fp8",
            overlap_tensor=True,
        )
        tokens = layout.batch * length
        if row["tokens_s_gpu"]:
            seconds = tokens / (float(row["tokens_s_gpu"]) * gpus)
        else:
            flops = model.flops_per_token(length) * tokens
            seconds = flops / (float(row["model_tflops_gpu"]) * 1e12 * gpus)
        gpu = row["system"].removeprefix("DGX-")
        where = cluster(gpu, gpus, node_size=64 if gpu.startswith("GB") else 8)
        yield Run(TABLE, f"{gpu} {model.name}", model, where, layout, seconds)


def judged(constants: Constants, others: list[Run]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Relative errors of their seconds by kind: the planner's, and a rival's from other tables."""
    kinds: dict[str, list[Run]] = {}
    for run in mixtures():
        family = run.model.name.split("-")[0].capitalize()
        kinds.setdefault(f"{family} in {run.layout.precision}", []).append(run)
    found = {}
    for kind, runs in kinds.items():
        times = [step_time(run.model, run.cluster, run.layout, constants).total for run in runs]
        measured = np.array([run.seconds for run in runs])
        found[kind] = np.array(times) / measured - 1, rivals_errors(runs, others)
    return found
