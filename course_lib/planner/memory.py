"""Bytes that a GPU must hold, by what holds them.

Model state: parameters, gradients and Adam's states as ZeRO counts them (arXiv:1910.02054, section
3.1: 2 + 2 + 12 bytes a parameter in mixed precision). Activations: formulas of Korthikanti and
others (arXiv:2205.05198, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from course_lib.planner.constants import Constants
from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model

# What is gathered and what is scattered, 5e8 numbers of 16 bits each: DeepSpeed's defaults
# (deepspeed.ai/docs/config-json, allgather_bucket_size and reduce_bucket_size).
_BUCKETS = 2 * 5e8 * 2


@dataclass(frozen=True)
class Shares:
    """What the fullest GPU has of the model.

    Attributes:
        layers: of its stage.
        parameters: on it, before anything is sharded over replicas.
    """

    layers: int
    parameters: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by holder.

    Attributes:
        parameters: weights, in 16 bits (in float32, as a shard, where they are fully sharded).
        gradients: of these weights.
        optimizer: Adam's two averages, and weights in float32 where the weights are not.
        activations: kept for the backward passes, and the layer or the logits being worked on.
        buffers: what gathers and sends, and what the framework reserves.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.buffers


def stage_shares(model: Model, layout: Layout, stage: int) -> Shares:
    """The share of a GPU of one stage; the embedding is on the first, the head on the last."""
    last = layout.pipeline - 1
    layers = layout.stage_layers(model.layers)
    missing = layout.missing_layers(model.layers)
    layers -= int(stage == last and missing > 0) + int(stage == 0 and missing > 1)
    one_layer = model.layer_parameters
    if layout.expert > 1:
        experts = model.experts * model.expert_parameters
        one_layer -= experts - experts // layout.expert
    table = model.vocabulary * model.hidden
    ends = model.positions * model.hidden * (stage == 0) + table * (stage == 0)
    if stage == last:
        ends += model.hidden * (2 if model.biased else 1)  # the last norm
        # A tied head on another stage is a copy of the embedding.
        ends += 0 if model.tied and last == 0 else table
    return Shares(layers, (layers * one_layer + ends) / layout.tensor)


def layer_activations(model: Model, layout: Layout, recompute: str) -> float:
    """Bytes that one layer keeps of one microbatch until its backward pass.

    For GPT's kind with nothing recomputed this is ``s b h (10 + 24 / t + 5 a s / (h t))``, or
    all of it over t with sequence parallelism (arXiv:2205.05198, equations 2 and 4); flash
    attention and selective recomputation leave the last term out. Full keeps ``2 s b h``.
    """
    split = layout.tensor
    around = split if layout.sequence_parallel else 1
    if recompute == "full":
        # Megatron-LM splits what it keeps over the tensor-parallel GPUs only if it is asked to.
        return layout.tokens * 2.0 * model.hidden / around
    heads = model.heads * model.head_size
    keys_values = 2 * model.kv_heads * model.head_size
    width = model.ffn * model.active
    if model.biased:
        # 4 h: two norms' inputs. 4 h: two products' inputs. 2 h: two dropouts' masks.
        whole = 10.0 * model.hidden
        # Queries, keys, values, the input of the output product; GELU's input and its output.
        inside = 2.0 * (heads + keys_values) + 2.0 * heads + 4.0 * width
    else:
        # No dropout. SwiGLU keeps two products' outputs and its own; in eager mode SiLU's too.
        whole = 8.0 * model.hidden
        swiglu = 8.0 if layout.kernels == "eager" else 6.0
        inside = 2.0 * (heads + keys_values) + 2.0 * heads
        inside += (swiglu if model.gated else 4.0) * width
    if recompute == "alternate":
        # Kept: every second product's output, attention's output, the layer's input.
        whole, inside = 4.0 * model.hidden, 2.0 * heads + 2.0 * width + keys_values
    scores = 0.0
    if layout.attention == "unfused" and recompute == "none":
        scores = 5.0 * model.heads * layout.sequence_length
    return layout.tokens * (whole / around + (inside + scores) / split)


def in_flight(layout: Layout, stage: int) -> float:
    """Microbatches whose activations a stage holds at once (arXiv:2104.04473, section 2.2)."""
    stages, microbatches, later = layout.pipeline, layout.microbatches, layout.pipeline - stage - 1
    if layout.schedule == "GPipe":
        return microbatches
    if layout.schedule == "interleaved" and stages > 1:
        virtual = layout.virtual_stages
        return min(microbatches, (2 * later + (virtual - 1) * stages + 1) / virtual)
    if layout.schedule == "ZB-1p":
        return min(microbatches, stages)  # the weights' gradients of later stages wait
    if layout.schedule == "ZB-2p":
        return min(microbatches, 2 * stages - 1)
    return min(microbatches, later + 1)


def gpu_memory(model: Model, layout: Layout, constants: Constants) -> Memory:
    """Bytes on the fullest GPU: of the first stage, the second or the last."""
    stages = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    found = [_stage_memory(model, layout, constants, stage) for stage in sorted(stages)]
    return max(found, key=lambda each: each.total)


def _stage_memory(model: Model, layout: Layout, constants: Constants, stage: int) -> Memory:
    shares = stage_shares(model, layout, stage)
    one_layer = layer_activations(model, layout, layout.recompute)
    kept = one_layer * shares.layers * in_flight(layout, stage)
    if layout.recompute in ("full", "alternate"):
        kept += layer_activations(model, layout, "none")  # the layer that is being made again
    if stage == layout.pipeline - 1:
        # Logits in 16 bits and in float32, their softmax, and a gradient.
        kept += layout.tokens * model.vocabulary / layout.tensor * 12.0
    buffers = constants.reserved + (_BUCKETS if layout.sharded in (1, 2) else 0.0)
    gradient = 4 if layout.float32_gradients else 2
    if layout.sharded == 3 and layout.pipeline > 1:
        # Gathered once a step: all weights of the stage, and their gradients until the last one.
        buffers += shares.parameters * (2 + gradient)
    elif layout.sharded == 3:
        # Two layers' gathered weights and one layer's whole gradient.
        layer = model.layer_parameters / layout.tensor / layout.expert
        buffers += layer * (2 * 2 + gradient)
    return Memory(*_states(shares.parameters, layout), kept * constants.fragments, buffers)


def _states(parameters: float, layout: Layout) -> tuple[float, float, float]:
    shards = layout.shards
    gradient = 4.0 if layout.float32_gradients else 2.0
    if layout.sharded == 3:
        return 4 * parameters / shards, gradient * parameters / shards, 8 * parameters / shards
    gradients = gradient * parameters / (shards if layout.sharded >= 2 else 1)
    return 2 * parameters, gradients, 12 * parameters / (shards if layout.sharded else 1)
