"""Published runs of FSDP, torchtitan, NeMo and Llama 3, in bf16 and fp8 with flash attention.

What a source does not state is filled in here, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from course_lib.planner.clusters import cluster
from course_lib.planner.layouts import Layout
from course_lib.planner.models import MODELS, Model
from course_lib.planner.rows import Run, read

_MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}


def llm_foundry() -> Iterator[Run]:
    """MosaicML's FSDP runs; H100 nodes are taken to have 400 Gb/s a GPU, as a DGX has."""
    for row in read("llm_foundry_fsdp"):
        layers, hidden, heads = _MPT[row["model"]]
        sequence, gpus = int(row["seq"]), int(row["gpus"])
        model = Model(
            row["model"],
            layers,
            hidden,
            heads,
            4 * hidden,
            50368,
            positions=sequence,
        )
        gpu = {"h100_80gb": "H100", "a100_80gb": "A100", "a100_40gb": "A100-40GB"}[row["gpu"]]
        layout = Layout(
            batch=int(row["global_batch"]),
            sequence_length=sequence,
            data=gpus,
            sharded=3,
            microbatch=int(row["microbatch"]),
            recompute="full" if row["act_ckpt"] == "True" else "none",
            precision="fp8" if "fp8" in row["precision"] else "bf16",
            float32_gradients=row["mp_mode"] != "PURE",
            attention="flash1",
            kernels="eager",
        )
        seconds = layout.batch * sequence / (float(row["tokens_s_gpu"]) * gpus)
        yield Run("llm_foundry", model.name, model, cluster(gpu, gpus), layout, seconds)


def torchtitan() -> Iterator[Run]:
    """torchtitan's Llama 3 runs in bf16 and float8, tables of December 2024 and June 2025.

    Rows of row-wise scales are left out: scaling a row costs more than its product gains. As many
    microbatches as stages are torchtitan's default; memory is what the allocator held at most.
    """
    for row in read("torchtitan_2024_12"):
        # As in "FSDP8 TP8 PP8 1F1B".
        sizes = {
            kind: int(size) for kind, size in re.findall(r"([A-Z]+)(\d+)\b", row["parallelism"])
        }
        technique = row["technique"]
        interleaved = "Int1F1B" in row["parallelism"]
        stages = sizes.get("PP", 1)
        gpus, context = int(row["gpus"]), sizes.get("CP", 1)
        data = sizes["FSDP"]
        model = MODELS[f"llama3-{row['model'].lower()}"]
        batch = int(row["local_batch"]) * data
        layout = Layout(
            batch=batch,
            sequence_length=int(row["seq"]),
            data=data,
            sharded=3,
            tensor=sizes.get("TP", 1),
            sequence_parallel="TP" in sizes,
            pipeline=stages,
            schedule="interleaved" if interleaved else "1F1B",
            virtual_stages=2 if interleaved else 1,
            context=context,
            microbatch=int(row["local_batch"]) // stages,
            recompute="alternate" if row["ac"] == "selective" else "full",
            precision="fp8" if "float8" in technique else "bf16",
            attention="flash2",
            overlap_tensor="asyncTP" in technique,
            kernels="compiled" if "compile" in technique else "eager",
        )
        seconds = batch * layout.sequence_length / (float(row["tps_per_gpu"]) * gpus)
        yield Run(
            "torchtitan",
            row["model"],
            model,
            cluster("H100-96GB", gpus),
            layout,
            seconds,
            float(row["mem_GiB"]) * 2**30,
            counted="allocator",
        )
    for row in read("torchtitan_async_tp_2025_06"):
        model = MODELS[f"llama3-{row['model'].lower()}"]
        gpus, data, tensor = int(row["gpus"]), int(row["fsdp"]), int(row["tp"])
        batch = int(row["local_batch"]) * data
        if row["quant"] == "fp8_rowwise":
            continue
        for overlapped, column in ((False, "vanilla_tps"), (True, "async_tps")):
            layout = Layout(
                batch=batch,
                sequence_length=8192,
                data=data,
                sharded=3,
                tensor=tensor,
                sequence_parallel=True,
                microbatch=int(row["local_batch"]),
                recompute="full" if row["ac"] == "full" else "alternate",
                precision="bf16" if row["quant"] == "bf16" else "fp8",
                attention="flash2",
                overlap_tensor=overlapped,
                kernels="compiled",
            )
            seconds = batch * 8192 / (float(row[column]) * gpus)
            where = cluster("H100-96GB", gpus)
            yield Run("torchtitan", f"{row['model']} async", model, where, layout, seconds)


def nemo() -> Iterator[Run]:
    """NeMo's Llama 3 runs in 8 bits; 4-bit rows are left out. Recomputation is not stated: none.

    GB200 and GB300 reach 64 GPUs over NVLink. Virtual stages that are not stated are five, as in
    the other releases' rows of that model.
    """
    names = {"LLAMA3_70B": "llama3-70b", "LLAMA3.1_405B": "llama3-405b"}
    for row in read("nemo_llama_pretrain"):
        if "FP4" in row["precision"]:
            continue
        model = MODELS[names[row["model"]]]
        gpus, tensor, stages = int(row["gpus"]), int(row["tp"]), int(row["pp"])
        context = int(row["cp"])
        virtual = int(row["vp"]) if row["vp"] != "n/a" else 5
        virtual = virtual if stages > 1 else 1
        gpu = row["system"].removeprefix("DGX-")
        layout = Layout(
            batch=int(row["gbs"]),
            sequence_length=int(row["seq"]),
            data=gpus // tensor // stages // context,
            sharded=3 if int(row["fsdp"] or 0) else 1,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            pipeline=stages,
            schedule="interleaved" if virtual > 1 else "1F1B",
            virtual_stages=virtual,
            context=context,
            microbatch=int(row["mbs"]),
            precision="fp8",
            overlap_tensor=True,
        )
        seconds = layout.batch * layout.sequence_length / (float(row["tokens_s_gpu"]) * gpus)
        where = cluster(gpu, gpus, node_size=8 if gpu == "H100" else 64)
        yield Run("nemo", f"{gpu} {row['model']}", model, where, layout, seconds)


def llama3() -> Iterator[Run]:
    """Llama 3 405B, table 4 of its paper: seconds from its TFLOP/s, half of the scores counted."""
    for row in read("llama3_table4"):
        model = MODELS["llama3-405b"]
        gpus, sequence = int(row["gpus"]), int(row["seq"])
        data = int(row["dp"])
        layout = Layout(
            batch=int(row["batch_per_dp"]) * data,
            sequence_length=sequence,
            data=data,
            sharded=2,
            tensor=int(row["tp"]),
            sequence_parallel=True,
            pipeline=int(row["pp"]),
            schedule="interleaved",
            virtual_stages=8,
            context=int(row["cp"]),
        )
        flops = model.flops_per_token(sequence, causal=True) * layout.batch * sequence / gpus
        seconds = flops / (float(row["tflops_per_gpu"]) * 1e12)
        yield Run("llama3", "llama3-405b", model, cluster("H100", gpus), layout, seconds)
