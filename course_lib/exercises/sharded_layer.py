"""What lesson 08 looks at in a layer whose weight comes and goes: outputs, gradients, their memory.

What judges raises :class:`~course_lib.exercises.verdict.Wrong` with one sentence, or does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import format_bytes
from course_lib.exercises.diagnosis import Facts, require_finite
from course_lib.exercises.verdict import Wrong


def weights_in_shards(
    gpus: list[torch.device], width: int, depth: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Random weights of some layers, whole on the host, and for each its shards on the GPUs."""
    weights = [torch.randn(width, width) / width**0.5 for _ in range(depth)]
    layers = [
        [part.to(gpu) for part, gpu in zip(weight.chunk(len(gpus)), gpus, strict=True)]
        for weight in weights
    ]
    return weights, layers


def judge_outputs(
    outs: Sequence[Tensor], inputs: list[Tensor], weights: list[Tensor], gpus: list[torch.device]
) -> None:
    """Whether each GPU's output is its input times all weights, with a graph behind it."""
    for out, x, gpu in zip(outs, inputs, gpus, strict=True):
        for weight in weights:
            x = F.linear(x, weight)
        if out.device != gpu:
            raise Wrong(f"an output is on {out.device}, and should be on {gpu}.")
        require_finite([out], f"the output on {gpu}")
        if not torch.allclose(out.detach().cpu(), x, atol=1e-4):
            raise Wrong(f"the output on {gpu} is not x Wᵀ.")
        if not out.requires_grad:
            raise Wrong(
                f"the output on {gpu} has no way back: no gradient will reach its input. Autograd "
                "follows tensors that `apply` gets one by one, none in a list, and nothing under "
                "no_grad."
            )


def judge_gradients(
    xs: list[Tensor],
    layers: list[list[Tensor]],
    inputs: list[Tensor],
    weights: list[Tensor],
    facts: Facts,
) -> None:
    """Compare with autograd on the host, for each GPU's loss, and for all of them together.

    Args:
        xs: each GPU's input, with its gradient.
        layers: for each of them the shards of its weight, with theirs.
        inputs, weights: the same on the host, whole.
    """
    alone = []  # by GPU: the gradients of its own loss, first that of its input
    for x in inputs:
        leaves = [each.clone().requires_grad_() for each in (x, *weights)]
        value = leaves[0]
        for weight in leaves[1:]:
            value = F.linear(value, weight)
        alone.append(torch.autograd.grad(value.square().sum(), leaves))
    for rank, (x, (wanted, *_)) in enumerate(zip(xs, alone, strict=True)):
        if x.grad is None:
            raise Wrong(f"no gradient arrives at the input of GPU {rank}.", facts)
        require_finite([x.grad], f"the gradient of GPU {rank}'s input")
        if not _close(x.grad, wanted):
            raise Wrong(
                f"the gradient of GPU {rank}'s input is not that of the output times W.", facts
            )
    for i, shards in enumerate(layers):
        own = [gradients[1 + i].chunk(len(shards)) for gradients in alone]
        for rank, shard in enumerate(shards):
            where = f"layer {i}'s shard on GPU {rank}"
            if shard.grad is None:
                raise Wrong(f"no gradient arrives at {where}.", facts)
            require_finite([shard.grad], f"the gradient of {where}")
            total = torch.stack([chunks[rank] for chunks in own]).sum(0)
            if _close(shard.grad, total):
                continue
            if _close(shard.grad, own[rank][rank]):
                raise Wrong(
                    f"{where} has the gradient of GPU {rank}'s own examples alone: add those of "
                    "all GPUs.",
                    facts,
                )
            if _close(shard.grad * len(shards), total):
                raise Wrong(f"{where} has the mean over the GPUs: the sum is asked for.", facts)
            raise Wrong(f"{where} has not chunk {rank} of the sum of all gradients.", facts)


def _close(ours: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(ours.cpu(), wanted, rtol=1e-3, atol=1e-3)


def require_own_memory(part: Tensor, facts: Facts) -> None:
    """Whether the part of a gradient is all that its memory holds."""
    held, needed = part.untyped_storage().nbytes(), part.nbytes
    if held > needed:
        raise Wrong(
            f"a shard's gradient of {format_bytes(needed)} is a part of a tensor of "
            f"{format_bytes(held)} and keeps all of it in memory: a copy of the part does not.",
            facts,
        )
