"""Clip gradients by their true norm, whatever a model is split into.

Clipping scales all gradients of a model by one number, so that their norm is at most so much
(Pascanu and others, "On the difficulty of training recurrent neural networks", 2013). The norm is
that of the model's gradient: what is split counts with all of its parts, and what is copied counts
once. ``torch.nn.utils.clip_grad_norm_`` does this on one device, and would count every copy.

To be called after backward, when the gradients are complete: behind ``all_reduce_gradients``,
``GradientBuckets.finish``, ``all_reduce_partial_gradients`` or the ``reduce_gradients`` of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.split_parameter import Shards


def clip_gradients(model: nn.Module | Sequence[nn.Module], max_norm: float) -> Tensor:
    """Scale all gradients of ``model`` so that their true norm is at most ``max_norm``.

    Args:
        model: on one device or on several: a pipeline, a model of tensor parallelism, experts.
            Replicas, whose gradients are equal, are a list, or a model that has them in
            ``replicas``: on a mesh, in context parallelism, or around experts.

    Returns:
        The norm before, a scalar on the first gradient's device. Reading it makes the host wait.

    Raises:
        ValueError: no parameter has a gradient, or ``max_norm`` is not positive.
    """
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        model = [model]
    models = nn.ModuleList(model)
    copies = _copies_of_others(models)
    gradients = {p: p.grad for p in models.parameters() if p.grad is not None}
    counted = [gradient for p, gradient in gradients.items() if p not in copies]
    return clip_together(counted, list(gradients.values()), max_norm)


def _copies_of_others(replicas: nn.ModuleList) -> set[nn.Parameter]:
    """What is a copy of a parameter that stands before it."""
    equal = [replicas, *(getattr(replica, "replicas", nn.ModuleList()) for replica in replicas)]
    copies: set[nn.Parameter] = set()
    for module in replicas.modules():
        if isinstance(module, ExpertParallel):
            equal.append(module.routers)
        if isinstance(module, Shards) and module.dimension is None:
            copies.update(list(module)[1:])
    return copies.union(*(further.parameters() for row in equal for further in list(row)[1:]))


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
