"""Bytes of activations on a GPU: what a layer keeps, how often, and what is being worked on.

Formulas of Korthikanti and others (arXiv:2205.05198, section 4), with what PyTorch keeps besides.

Left out, because it is small. ``tests/test_planner_peaks.py`` holds each of these to the byte:

- In float32, two numbers a token and norm, and one a token and head, which their backward passes
  read: ``4 (4 + a / t)`` bytes a token and layer, beside ``34 h``.
- The tokens themselves, their positions and targets: 8 bytes each.
- What a router keeps of a token: ``2 E + 21 k + 2`` bytes with E experts of which it visits k.
- The course's own ``index_add`` keeps the rows that it sends to experts, ``2 h k`` bytes a token.
- Keys and values on their way round a ring, and their gradients. They travel in the backward pass,
  when the logits are gone, which are larger unless the vocabulary is very small.
"""

from __future__ import annotations

from course_lib.planner.layouts import Layout
from course_lib.planner.models import Model

# Bytes of one logit while the loss is computed: in 16 bits, in float32, their softmax, and a
# gradient, which Megatron-LM keeps in 16 bits and PyTorch in float32.
_LOGIT = {"fused": 12.0, "eager": 14.0, "compiled": 14.0}
# With a vocabulary split over GPUs, PyTorch's backward holds one more in float32
# (torch.distributed.tensor.parallel.loss_parallel).
_SPLIT_LOGIT = 4.0


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
    if model.experts > 1:
        # What goes into each expert that a token visits, beside what the router reads, and what
        # comes out of it: its product with the router's weight needs it.
        whole += 4.0 * model.hidden * model.active
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


def kept_activations(model: Model, layout: Layout, stage: int, layers: int) -> float:
    """Bytes that a stage keeps of the microbatches in flight, with nothing being worked on."""
    one = layer_activations(model, layout, layout.recompute) * layers
    around = layout.tensor if layout.sequence_parallel else 1
    width = layout.tokens * model.hidden / around
    if stage == 0 and model.biased and layout.pipeline > 1:
        one += width  # the mask of the embedding's dropout (arXiv:2205.05198, section 4.3)
    if stage == layout.pipeline - 1:
        # The inputs of the last norm and of the head, which PyTorch keeps gathered.
        one += 2.0 * width * (1 + (1 if layout.kernels == "fused" else around))
    elif layout.keeps_outputs:
        one += 2.0 * width
    return one * in_flight(layout, stage)


def in_backward(model: Model, layout: Layout) -> float:
    """Bytes that are there for a moment in a layer's backward pass: itself, if it is made again,
    and gradients."""
    again = 0.0
    if layout.recompute in ("full", "alternate"):
        again = layer_activations(model, layout, "none")
    return again + _gradients(model, layout)


def _gradients(model: Model, layout: Layout) -> float:
    """Bytes of gradients where a layer's backward pass has most of them: in its feed-forward part.

    What arrived, and is still to be added to; what it becomes on the inner width (with SwiGLU two
    of them); and the gradient of a weight, which PyTorch makes first and adds then. Megatron-LM
    adds it as it is made.
    """
    split = layout.tensor
    arrived = 2.0 * model.hidden
    if layout.sequence_parallel:
        arrived += arrived / split
    inner = (4.0 if model.gated else 2.0) * model.ffn * model.active / split
    weight = 2.0 * model.hidden * model.ffn / split
    if layout.kernels == "fused" or layout.sharded == 3:  # there it is counted as a whole layer's
        weight = 0.0
    return layout.tokens * (arrived + inner) + weight


def in_loss(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of the logits on the last stage, which are there while the loss is computed."""
    if stage < layout.pipeline - 1:
        return 0.0
    logits = layout.tokens * model.vocabulary / layout.tensor
    by_pytorch = layout.kernels != "fused"
    one = _LOGIT[layout.kernels] + (_SPLIT_LOGIT if by_pytorch and layout.tensor > 1 else 0.0)
    if by_pytorch and layout.pipeline > 1:
        # PyTorch's schedules keep every microbatch's output, to return them together.
        one += 2.0 * (layout.microbatches - 1)
    return logits * one
