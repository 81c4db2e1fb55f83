"""Dropout on several devices at once: the same places of copies, other places of parts.

Where devices hold copies of one value, as between the split regions of tensor parallelism, each
must drop what the others drop, or the copies are copies no longer. Where they hold parts of it, as
of a sequence, each must draw for itself, or all parts lose the same places. Megatron-LM keeps a
random generator for either; here each call draws a seed on the host, which ``torch.manual_seed``
decides, and whatever else is drawn on the devices does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib.parallel.inputs import require_one_each
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.seeds import seed_device


def dropout_of_copies(copies: Tensors, p: float, training: bool) -> list[Tensor]:
    """Drop the same numbers of equal tensors, each with probability ``p``, as ``F.dropout`` does.

    Args:
        copies: one a device, of one shape.
        training: if not, they stay as they are.

    Raises:
        TypeError: it is a single tensor.
        ValueError: ``p`` is no probability.
    """
    return _drop(copies, p, training, difference=0)


def dropout_of_parts(parts: Tensors, p: float, training: bool) -> list[Tensor]:
    """Drop numbers of the parts of a whole, on each device others.

    Takes and raises what :func:`dropout_of_copies` does.
    """
    return _drop(parts, p, training, difference=1)


def _drop(tensors: Tensors, p: float, training: bool, difference: int) -> list[Tensor]:
    require_one_each(tensors, len(tensors), "dropout")
    if not training or p == 0:
        return list(tensors)
    seed = int(torch.randint(2**31, (), device="cpu"))
    dropped = []
    for rank, x in enumerate(tensors):
        # The device's own numbers go on afterwards as if nothing had been drawn.
        with torch.random.fork_rng([x.device], device_type=x.device.type):
            seed_device(seed + difference * rank, x.device)
            dropped.append(F.dropout(x, p))
    return dropped
