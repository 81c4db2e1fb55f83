"""Bytes that a GPU must hold, by what holds them.

Model state: parameters, gradients and Adam's states as ZeRO counts them (arXiv:1910.02054, section
3.1: 2 + 2 + 12 bytes a parameter in mixed precision). Activations: see
:mod:`course_lib.planner.activations`.
Fully sharded, a layer's gathered weights, its whole gradient and all that it keeps are taken to be
there at one moment; PyTorch's FSDP2 has less by up to a layer's gradient and weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from course_lib.planner.activations import in_backward, in_loss, kept_activations
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
        experts: those of them that are experts', where experts are split: fewer GPUs have the same.
        alike: those of them that all GPUs of a tensor-parallel group have.
    """

    layers: int
    parameters: float
    experts: float = 0.0
    alike: float = 0.0

    def owned(self, layout: Layout) -> float:
        """Parameters whose sharded state is on this GPU."""
        dense = self.parameters - self.experts
        return dense / layout.shards + self.experts / layout.expert_shards


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
    experts = layers * model.experts * model.expert_parameters
    whole = layers * model.layer_parameters - experts
    table = model.vocabulary * model.hidden
    norm = model.hidden * (2 if model.biased else 1)
    # Norms, biases of the products that end a region, routers and learned positions.
    ends = 1 + model.experts / layout.expert if model.biased else 0
    alike = layers * (2 * norm + model.router_parameters + ends * model.hidden)
    if stage == 0:
        whole += table + model.positions * model.hidden
        alike += model.positions * model.hidden
    if stage == last:
        # A tied head on another stage is a copy of the embedding.
        whole += norm + (0 if model.tied and last == 0 else table)
        alike += norm
    own = experts / layout.expert / layout.tensor
    held = (whole - alike) / layout.tensor + alike + own
    return Shares(layers, held, own if layout.expert > 1 else 0.0, alike)


def gpu_memory(model: Model, layout: Layout, constants: Constants) -> Memory:
    """Bytes on the fullest GPU: of the first stage, the second or the last."""
    stages = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    found = [stage_memory(model, layout, constants, stage) for stage in sorted(stages)]
    return max(found, key=lambda each: each.total)


def stage_memory(model: Model, layout: Layout, constants: Constants, stage: int) -> Memory:
    shares = stage_shares(model, layout, stage)
    states = _states(shares, layout)
    activations = kept_activations(model, layout, stage, shares.layers)
    buffers = _gathered(model, layout, shares)
    # Either the loss is being computed, or a layer's backward pass: one after the other.
    backward, beside = in_backward(model, layout), _layers_gathered(model, layout)
    loss = in_loss(model, layout, stage)
    activations += loss if loss > backward + beside else backward
    buffers += beside if loss <= backward + beside else 0.0
    held = (activations + buffers) * (constants.fragments - 1)  # free, but held by the allocator
    return Memory(*states, activations, buffers + held + constants.outside)


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
        return _BUCKETS + shares.owned(layout) * row + summed
    if layout.sharded == 3 and layout.pipeline > 1:
        # Gathered once a step: all weights of the stage, and their gradients until the last one.
        # Where a virtual stage takes all microbatches in a row, its gradients are through with
        # before the next one's begin.
        once = layout.virtual_stages if layout.rounds == 1 else 1
        return shares.parameters * (2 + gradient / once)
    if layout.sharded == 3:
        # Embedding, head and the last norm are one unit: gathered from their forward pass to their
        # backward pass.
        norm = model.hidden * (2 if model.biased else 1)
        return 2 * (model.embedding_parameters + norm) / layout.tensor
    return 0.0


def _layers_gathered(model: Model, layout: Layout) -> float:
    """Bytes of two layers' gathered weights and of one layer's whole gradient."""
    if layout.sharded < 3 or layout.pipeline > 1:
        return 0.0
    experts = model.experts * model.expert_parameters
    layer = (model.layer_parameters - experts + experts / layout.expert) / layout.tensor
    return layer * (2 * 2 + (4 if layout.float32_gradients else 2))


def _states(shares: Shares, layout: Layout) -> tuple[float, float, float]:
    gradient = 4.0 if layout.float32_gradients else 2.0
    whole, split = shares.parameters, shares.owned(layout)
    if layout.sharded == 3:
        return 4 * split, gradient * split, 8 * split
    gradients = gradient * (split if layout.sharded == 2 else whole)
    return 2 * whole, gradients, 12 * split
