"""Published runs of Megatron-LM and of what was built on it, in fp16 on V100s and A100s.

What a source does not state is filled in here, and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from course_lib.planner.clusters import cluster
from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model, gpt
from course_lib.planner.rows import Run, read


def _megatron(**sizes: Any) -> Layout:
    """Megatron-LM before flash attention: gradients are reduced after the backward pass."""
    usual = {
        "attention": "unfused",
        "recompute": "full",
        "overlap": False,
        "float32_gradients": False,
    }
    return Layout(**{**usual, **sizes})


def megatron_2021() -> Iterator[Run]:
    """Narayanan and others, table 1: seconds from its TFLOP/s by the paper's formula.

    Microbatch and virtual stages are those of NVIDIA/Megatron-LM@79a3bb6,
    examples/sc21/run_table_1.sh.
    """
    microbatch = {1.7: 16, 3.6: 16, 7.5: 16, 18.4: 8, 39.1: 4, 76.1: 2, 145.6: 2}
    virtual = {76.1: 3, 145.6: 2, 310.1: 2, 529.6: 3}
    for row in read("megatron_2104_table1"):
        size = float(row["params_B"])
        model = gpt(f"{size:g}B", int(row["layers"]), int(row["hidden"]), int(row["heads"]))
        gpus, tensor, pipeline = int(row["gpus"]), int(row["tp"]), int(row["pp"])
        layout = _megatron(
            batch=int(row["batch"]),
            sequence_length=2048,
            data=gpus // tensor // pipeline,
            tensor=tensor,
            pipeline=pipeline,
            microbatch=microbatch.get(size, 1),
            schedule="interleaved" if size in virtual else "1F1B",
            virtual_stages=virtual.get(size, 1),
            libraries="2021",
            overlap=pipeline == 1,  # the script asks for PyTorch's DDP there
        )
        flops = recomputed_flops(model, layout) / gpus
        seconds = flops / (float(row["tflops_per_gpu"]) * 1e12)
        yield Run("megatron_2021", model.name, model, cluster("A100", gpus), layout, seconds)


def recomputed_flops(model: Model, layout: Layout) -> float:
    """Operations of a step with full recomputation (arXiv:2104.04473, equation 3)."""
    b, s, layers, h = layout.batch, layout.sequence_length, model.layers, model.hidden
    inside = 1 + s / (6 * h) + model.vocabulary / (16 * layers * h)
    return 96.0 * b * s * layers * h**2 * inside


def vtrain(table: str) -> Iterator[Run]:
    """vTrain's measurements with Megatron-DeepSpeed; its configurations name 800 Gb/s a node."""
    for row in read(table):
        layers, hidden, heads = int(row["layers"]), int(row["hidden"]), int(row["heads"])
        gpus = int(row["gpus"])
        model = gpt(f"{layers} x {hidden}", layers, hidden, heads)
        layout = _megatron(
            batch=int(row["batch"]),
            sequence_length=int(row["seq"]),
            data=int(row["dp"]),
            tensor=int(row["tp"]),
            pipeline=int(row["pp"]),
            microbatch=int(row["microbatch"]),
        )
        where = cluster("A100", gpus, network=100e9 / 8)
        yield Run(table, model.name, model, where, layout, float(row["iter_ms"]) / 1e3)


def zero_bubble() -> Iterator[Run]:
    """Zero Bubble's tables 3 to 5: pipelines only.

    GB are taken to be 10^9 bytes of tensors: then the formulas of the papers give them as they are.
    """
    schedules = {"1F1B": "1F1B", "1F1B-I": "interleaved", "ZB-1p": "ZB-1p", "ZB-2p": "ZB-2p"}
    for row in read("zero_bubble_tables345"):
        layers, hidden, heads = int(row["layers"]), int(row["hidden"]), int(row["heads"])
        stages, microbatch = int(row["pp"]), int(row["microbatch"])
        model = gpt(row["model"], layers, hidden, heads, 50304)
        schedule = schedules[row["schedule"]]
        batch = int(row["n_micro"]) * microbatch
        layout = _megatron(
            batch=batch,
            sequence_length=int(row["seq"]),
            pipeline=stages,
            microbatch=microbatch,
            recompute="none",
            schedule=schedule,
            virtual_stages=(layers + 2) // stages if schedule == "interleaved" else 1,
        )
        seconds = batch / (float(row["samples_per_gpu_s"]) * stages)
        yield Run(
            "zero_bubble",
            model.name,
            model,
            cluster("A100", stages),
            layout,
            seconds,
            float(row["mem_GB"]) * 1e9,
            counted="tensors",
        )


def korthikanti() -> Iterator[Run]:
    """Korthikanti and others, table 5: full recomputation, and selective with sequence parallel."""
    for row in read("korthikanti_table5"):
        gpus, stages = int(row["gpus"]), int(row["pp"])
        model = gpt(row["model"], int(row["layers"]), int(row["hidden"]), int(row["heads"]))
        for policy, column in (("full", "full_recompute_s"), ("selective", "sp_selective_s")):
            interleave = int(row["interleave"])
            layout = _megatron(
                batch=int(row["batch"]),
                sequence_length=2048,
                tensor=int(row["tp"]),
                sequence_parallel=policy == "selective",
                pipeline=stages,
                microbatch=int(row["microbatch"]),
                schedule="interleaved" if interleave > 1 else "1F1B",
                virtual_stages=interleave,
                recompute=policy,
            )
            where = cluster("A100", gpus)
            yield Run("korthikanti", model.name, model, where, layout, float(row[column]))


def megatron_2020() -> Iterator[Run]:
    """Megatron-LM's first tables: tensor parallelism within a node, then 128 replicas of it."""
    for row in read("megatron_2020_single_node"):
        tensor = int(row["tp"])
        model = gpt(row["case"], int(row["layers"]), int(row["hidden"]), int(row["heads"]))
        cases = (("V100", 1, 8, "v100_iter_ms"), ("A100", 1, 16, "a100_iter_ms"))
        for gpu, data, batch, column in (*cases, ("A100", 128, 16, "a100_dp128_iter_ms")):
            layout = _megatron(
                batch=batch * data,
                sequence_length=1024,
                data=data,
                tensor=tensor,
                microbatch=batch,
                libraries="2021",
            )
            where = cluster(gpu, tensor * data)
            seconds = float(row[column]) / 1e3
            yield Run("megatron_2020", f"{gpu} x {data}", model, where, layout, seconds)


def bloom() -> Iterator[Run]:
    """BLOOM's search for a layout: four 100 Gb/s links a node; 64 heads where it does not say.

    Rows without a number of layers, a replica count or a time are left out, and one that its own
    table contradicts. So is the memory of 28 February: it rose by half in unchanged layouts.
    """
    for row in read("bloom_prequel_sweep"):
        stated = row["layers"] and row["dp"] and row["sec_per_it"] not in ("", "x")
        if not stated or row["gbs"] == "1568":
            continue
        heads = int(row["heads"] or 64)
        data, tensor, stages = int(row["dp"]), int(row["tp"]), int(row["pp"])
        layers, hidden = int(row["layers"]), int(row["hidden"])
        gpus = data * tensor * stages
        if gpus != 8 * int(row["nodes"]):
            continue
        model = Model(row["size"], layers, hidden, heads, 4 * hidden, 250880)
        layout = _megatron(
            batch=int(row["gbs"]),
            sequence_length=2048,
            data=data,
            sharded=1,
            tensor=tensor,
            pipeline=stages,
            microbatch=int(row["mbs"]),
            scattered_sends=False,
            libraries="2021",
        )
        if layout.batch % (data * layout.microbatch):
            continue
        where = cluster("A100", gpus, network=400e9 / 8 / 8)
        told = row["mem_GB"] and row["date"] != "02-28"
        memory = float(row["mem_GB"]) * 2**30 if told else 0.0
        yield Run("bloom", row["date"], model, where, layout, float(row["sec_per_it"]), memory)
