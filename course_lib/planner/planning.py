"""A plan: what a step of a model on a cluster in a layout takes, in seconds and in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from course_lib import format_bytes
from course_lib.planner.clusters import Cluster
from course_lib.planner.constants import Constants, fitted
from course_lib.planner.layer_work import products_again, score_flops
from course_lib.planner.layouts import Layout, check
from course_lib.planner.memory import Memory, gpu_memory
from course_lib.planner.models import Model
from course_lib.planner.timing import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """What the planner predicts.

    Attributes:
        model, cluster, layout: what was asked.
        time: seconds of a step, by parts.
        memory: bytes on the fullest GPU, by holder.
    """

    model: Model
    cluster: Cluster
    layout: Layout
    time: StepTime
    memory: Memory

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.time.total

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has room."""
        return self.memory.total <= self.cluster.gpu.memory

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.layout.batch * self.layout.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, of all GPUs."""
        return self.tokens / self.seconds

    @property
    def model_flops_per_second(self) -> float:
        """FLOP/s of one GPU that train the model, nothing counted twice."""
        flops = self.model.flops_per_token(self.layout.sequence_length) * self.tokens
        return flops / (self.seconds * self.cluster.gpus)

    @property
    def mfu(self) -> float:
        """Model FLOP/s utilization: of the peak in bf16 (PaLM, arXiv:2204.02311)."""
        return self.model_flops_per_second / self.cluster.gpu.peak_flops(torch.bfloat16)

    @property
    def hfu(self) -> float:
        """Hardware FLOP/s utilization: as MFU, with what is computed a second time."""
        layout = self.layout
        products = sum(product.flops for product in products_again(self.model, layout))
        scores = score_flops(self.model, layout)
        again = {
            "none": 0.0,
            "selective": scores if layout.attention == "unfused" else 0.0,
            "alternate": products,
            "full": products + scores,
        }[layout.recompute]
        # Of one layer, for one microbatch, on one GPU.
        extra = again * self.model.layers / layout.pipeline * layout.microbatches
        peak = self.cluster.gpu.peak_flops(torch.bfloat16)
        return self.mfu + extra / (self.seconds * peak)

    def days(self, tokens: float) -> float:
        """Days to train on ``tokens``, nothing going wrong."""
        return tokens / self.tokens_per_second / 86400

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours for ``tokens``, nothing going wrong."""
        return self.days(tokens) * 24 * self.cluster.gpus

    def report(self, tokens: float = 0.0) -> str:
        """The plan in lines; with days and GPU-hours if ``tokens`` are given."""
        time, held, layout = self.time, self.memory, self.layout
        lines = [
            f"{self.model.name} ({self.model.parameters / 1e9:.3g} B parameters) on "
            f"{self.cluster.gpus} x {self.cluster.gpu.name}, predicted",
            f"layout: {describe(layout)}",
            f"step: {self.seconds:.3g} s for {self.tokens / 1e6:.3g} M tokens, "
            f"{self.tokens_per_second / self.cluster.gpus:.4g} tokens/s a GPU",
            f"      {self.model_flops_per_second / 1e12:.3g} TFLOP/s a GPU, "
            f"MFU {self.mfu:.1%}, HFU {self.hfu:.1%}",
        ]
        parts = {
            "products": time.products,
            "attention": time.attention,
            "other operations": time.others,
            "host and fixed": time.host,
            "exposed communication": time.exposed,
            "bubble": time.bubble,
            "optimizer": time.optimizer,
        }
        lines += [
            f"  {name:22} {part:8.3g} s {part / time.total:6.1%}" for name, part in parts.items()
        ]
        lines += [
            f"  {each.name} over {each.link}: {each.count:.6g} x {format_bytes(round(each.bytes))},"
            f" {each.total:.3g} s"
            for each in time.collectives
        ]
        lines.append(f"memory: {held.total / 1e9:.3g} of {self.cluster.gpu.memory / 1e9:.3g} GB")
        holders = ("parameters", "gradients", "optimizer", "activations", "buffers")
        lines += [f"  {name:22} {getattr(held, name) / 1e9:8.3g} GB" for name in holders]
        if not self.fits:
            lines.append("does not fit: " + remedy(self))
        if tokens:
            lines.append(
                f"{tokens / 1e12:.3g} T tokens: {self.days(tokens):.3g} days, "
                f"{self.gpu_hours(tokens):.3g} GPU-hours, nothing going wrong"
            )
        return "\n".join(lines)


def plan(
    model: Model, cluster: Cluster, layout: Layout, constants: Constants | None = None
) -> Plan:
    """Predict a step: its seconds by parts, and the memory of the fullest GPU by holder.

    Args:
        constants: others than the fitted ones.

    Raises:
        ValueError: the sizes do not go together; says which, and what would.
    """
    check(model, cluster, layout)
    constants = constants or fitted()
    return Plan(
        model,
        cluster,
        layout,
        step_time(model, cluster, layout, constants),
        gpu_memory(model, layout, constants),
    )


def describe(layout: Layout) -> str:
    """A layout in a few words."""
    words = [f"data {layout.data}"]
    if layout.sharded:
        words[0] += f" (ZeRO-{layout.sharded}"
        words[0] += f", shards of {layout.shard_group})" if layout.shard_group else ")"
    if layout.tensor > 1:
        words.append(f"tensor {layout.tensor}" + (" + sequence" * layout.sequence_parallel))
    if layout.pipeline > 1:
        stages = f" x {layout.virtual_stages}" if layout.virtual_stages > 1 else ""
        words.append(f"pipeline {layout.pipeline}{stages} {layout.schedule}")
    words += [
        f"{name} {getattr(layout, name)}"
        for name in ("context", "expert")
        if getattr(layout, name) > 1
    ]
    words.append(f"{layout.microbatches} microbatches of {layout.microbatch}")
    words.append(f"recompute {layout.recompute}")
    words.append(layout.precision)
    return ", ".join(words)


def remedy(asked: Plan) -> str:
    """What would make a plan fit that does not: what the largest holder asks for."""
    held, layout = asked.memory, asked.layout
    if held.activations > held.parameters + held.gradients + held.optimizer:
        if layout.recompute != "full":
            return "most of it is activations: recompute=full keeps a layer's input alone"
        if layout.microbatch > 1:
            return f"most of it is activations: a microbatch below {layout.microbatch}"
        return "most of it is activations: more tensor or context parallelism"
    if layout.sharded < 3 and layout.data > 1:
        return f"most of it is model state: sharded={layout.sharded + 1} splits more of it"
    return "most of it is model state: more tensor or pipeline parallelism, or more GPUs"
