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
# Bytes of one logit while the loss is computed: in 16 bits, in float32, their softmax, and a
# gradient, which Megatron-LM keeps in 16 bits and PyTorch in float32.
_LOGIT = {"fused": 12.0, "eager": 14.0, "compiled": 14.0}
# With a vocabulary split over GPUs, PyTorch's backward holds one more in float32
# (torch.distributed.tensor.parallel.loss_parallel).
_SPLIT_LOGIT = 4.0


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
        buffers: what gathers and sends, what PyTorch's allocator holds beyond its tensors, and
            what CUDA and NCCL have for themselves.
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
    if layout.sequence_parallel and layout.kernels != "fused":
        # The inputs of attention and of the feed-forward part, gathered: PyTorch keeps them whole,
        # and Megatron-LM gathers them a second time (arXiv:2205.05198, section 4.2.2).
        whole += 4.0 * model.hidden * (split - 1)
    if recompute == "alternate":
        # Outputs of four of seven products (queries, values, the first of SwiGLU's, the last one)
        # and of attention, and the layer's input (torchtitan's selective activation checkpointing:
        # every second product is made again). Compiled, what backward does not read is not kept:
        # the last product's output.
        whole = (2.0 if layout.kernels == "compiled" else 4.0) * model.hidden
        inside = 4.0 * heads + keys_values + 2.0 * width
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
    states = _states(shares.parameters, layout)
    activations = kept_activations(model, layout, stage, shares.layers)
    # Either the loss is being computed, or a layer made again: one after the other.
    activations += max(_layer_again(model, layout), _logits(model, layout, stage))
    buffers = _gathered(model, layout, shares)
    held = (activations + buffers) * (constants.fragments - 1)  # free, but held by the allocator
    return Memory(*states, activations, buffers + held + constants.outside)


def kept_activations(model: Model, layout: Layout, stage: int, layers: int) -> float:
    """Bytes that a stage keeps of the microbatches in flight, with nothing being worked on."""
    one = layer_activations(model, layout, layout.recompute) * layers
    around = layout.tensor if layout.sequence_parallel else 1
    width = layout.tokens * model.hidden / around
    if layout.pipeline > 1 and layout.keeps_outputs:
        one += 2.0 * width
    if stage == 0 and model.biased and layout.pipeline > 1:
        one += width  # the mask of the embedding's dropout (arXiv:2205.05198, section 4.3)
    return one * in_flight(layout, stage)


def _layer_again(model: Model, layout: Layout) -> float:
    """Bytes of the layer that is being made again."""
    if layout.recompute not in ("full", "alternate"):
        return 0.0
    return layer_activations(model, layout, "none")


def _logits(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of the logits on the last stage, while the loss is computed."""
    if stage < layout.pipeline - 1:
        return 0.0
    logits = layout.tokens * model.vocabulary / layout.tensor
    by_pytorch = layout.kernels != "fused"
    one = _LOGIT[layout.kernels] + (_SPLIT_LOGIT if by_pytorch and layout.tensor > 1 else 0.0)
    if by_pytorch and layout.pipeline > 1:
        # PyTorch's schedules keep every microbatch's output, to return them together.
        one += 2.0 * (layout.microbatches - 1)
    return logits * one


def _gathered(model: Model, layout: Layout, shares: Shares) -> float:
    """Bytes of what is gathered, sent or put in one row."""
    gradient = 4 if layout.float32_gradients else 2
    if layout.sharded in (1, 2):
        # For the update a shard's gradient is put in one row, and made float32 if it is not. No
        # block that activations left behind is as large.
        row = 0 if layout.float32_gradients else 2 + 4
        # With ZeRO-2, a virtual stage's gradients are whole until they are scattered.
        whole = layout.sharded == 2 and layout.pipeline > 1
        summed = shares.parameters / layout.virtual_stages * gradient if whole else 0.0
        return _BUCKETS + shares.parameters / layout.shards * row + summed
    if layout.sharded == 3 and layout.pipeline > 1:
        # Gathered once a step: all weights of the stage, and their gradients until the last one.
        # Where a virtual stage takes all microbatches in a row, its gradients are through with
        # before the next one's begin.
        once = layout.virtual_stages if layout.rounds == 1 else 1
        return shares.parameters * (2 + gradient / once)
    if layout.sharded == 3:
        # Two layers' gathered weights and one layer's whole gradient; embedding and head, which
        # are one unit, stay gathered from their forward pass to their backward pass.
        layer = model.layer_parameters / layout.tensor / layout.expert
        return layer * (2 * 2 + gradient) + 2 * model.embedding_parameters / layout.tensor
    return 0.0


def _states(parameters: float, layout: Layout) -> tuple[float, float, float]:
    shards = layout.shards
    gradient = 4.0 if layout.float32_gradients else 2.0
    if layout.sharded == 3:
        return 4 * parameters / shards, gradient * parameters / shards, 8 * parameters / shards
    gradients = gradient * parameters / (shards if layout.sharded >= 2 else 1)
    return 2 * parameters, gradients, 12 * parameters / (shards if layout.sharded else 1)
