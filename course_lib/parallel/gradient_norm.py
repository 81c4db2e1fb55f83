"""Clip gradients by their true norm, whatever a model is split into.

Clipping scales all gradients of a model by one number, so that their norm is at most so much
(Pascanu and others, "On the difficulty of training recurrent neural networks", 2013). The norm is
that of the model's gradient: what is split counts with all of its parts, and what is copied counts
once. ``torch.nn.utils.clip_grad_norm_`` does this on one device, and would count every copy.

To be called after backward, when the gradients are complete: behind ``all_reduce_gradients``,
``GradientBuckets.finish`` or ``all_reduce_partial_gradients``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from course_lib.parallel.kinds import Tensors
from course_lib.parallel.split_parameter import Shards


def clip_gradients(model: nn.Module | Sequence[nn.Module], max_norm: float) -> Tensor:
    """Scale all gradients of ``model`` so that their true norm is at most ``max_norm``.

    Args:
        model: on one device or on several: a pipeline, a model of tensor parallelism. Replicas,
            whose gradients are equal, are a list, or a model that has them in ``replicas``: on a
            mesh, or in context parallelism.

    Returns:
        The norm before, a scalar on the first gradient's device. Reading it makes the host wait.

    Raises:
        ValueError: no parameter has a gradient, or ``max_norm`` is not positive.
    """
    replicas = _replicas_of(model)
    gradients = [p.grad for each in replicas for p in each.parameters() if p.grad is not None]
    counted = _gradients_counted_once(replicas[0]) if replicas else []
    return clip_together(counted, gradients, max_norm)


def _replicas_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    inside = getattr(model, "replicas", model)
    if isinstance(inside, nn.Module) and not isinstance(inside, nn.ModuleList):
        inside = [inside]
    return list(inside)


def _gradients_counted_once(model: nn.Module) -> list[Tensor]:
    copied = [s for s in model.modules() if isinstance(s, Shards) and s.dimension is None]
    further_copies = {part for shards in copied for part in list(shards)[1:]}
    return [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None and parameter not in further_copies
    ]


def clip_together(counted: Tensors, gradients: Tensors, max_norm: float) -> Tensor:
    """Scale ``gradients`` so that the norm of ``counted`` is at most ``max_norm``.

    Args:
        counted: those of ``gradients`` that make up the model's gradient, each part once.

    Returns, and raises, what :func:`clip_gradients` does.
    """
    if not max_norm > 0:
        raise ValueError(f"gradients are clipped to a positive norm: max_norm={max_norm}")
    if not counted:
        raise ValueError("there are no gradients to clip: run a backward pass first")
    norm = total_norm(counted)
    # The host reads nothing, and goes on: the comparison with 1 is made on the device.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, members in _by_device(gradients).items():
        scale_here = scale.to(device)
        for gradient in members:
            gradient.mul_(scale_here)
    return norm


def total_norm(tensors: Tensors) -> Tensor:
    """The norm of all numbers in ``tensors``, which may be on several devices.

    Summed in float32 at least: a bfloat16 sum of many squares stops growing. From each device one
    number moves to the first tensor's.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = [
        torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(each, dtype=dtype) for each in members])
        )
        for members in _by_device(tensors).values()
    ]
    return torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in norms]))


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device].append(tensor)
    return groups
