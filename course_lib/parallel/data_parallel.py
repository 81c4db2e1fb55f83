"""Data parallelism: a copy of the model on every device, a part of the batch for each.

What lesson 02 derives; :mod:`course_lib.parallel.gradient_buckets` has what lesson 03 adds.
PyTorch's own is ``torch.nn.parallel.DistributedDataParallel`` (Li and others, "PyTorch
Distributed", 2020), with one process a device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from course_lib.parallel.collectives import all_reduce
from course_lib.parallel.counting import CountedShards, counts_of, part_of_mean, total_count
from course_lib.parallel.inputs import require_devices, require_one_a_replica
from course_lib.parallel.kinds import Devices, Loss, Tensors
from course_lib.parallel.sums import are_sums, mark_as_sums

Model = TypeVar("Model", bound=nn.Module)


def replicate(model: Model, devices: Devices) -> list[Model]:
    """One copy of ``model`` on each device, without gradients; ``model`` itself stays as it is.

    What a layer keeps or draws by itself is each replica's own. BatchNorm takes its statistics
    from a shard and not from the batch, so that it is another training, and its running mean
    differs from replica to replica (PyTorch has ``SyncBatchNorm``). Dropout would drop the same
    places on all: call :func:`course_lib.parallel.seeds.seed_ranks`.

    Raises:
        TypeError: ``devices`` is one device and no list.
        ValueError: there are none.
    """
    replicas = []
    for device in require_devices(devices):
        replica = copy.deepcopy(model)
        replica.zero_grad()  # before it moves: gradients would move as well
        replicas.append(replica.to(device))
    return replicas


def split_batch(batch: Tensor, devices: Devices) -> CountedShards:
    """Split a batch along its first dimension, one shard a device: a list of tensors.

    Shards differ by at most one example; with fewer examples than devices, some are empty.

    Raises:
        TypeError: the batch is no tensor, or ``devices`` is one device and no list.
        ValueError: there are no devices, or the batch is a single number.
    """
    devices = require_devices(devices)
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"split_batch splits one tensor, not a {type(batch).__name__}: call it for each tensor "
            "of a batch that has several"
        )
    if batch.dim() == 0:
        raise ValueError("a batch has examples along its first dimension: this is a single number")
    return CountedShards(torch.tensor_split(batch, len(devices)), devices)


def backward_on_shards(
    replicas: Sequence[nn.Module],
    inputs: Tensors,
    targets: Tensors,
    loss_function: Loss,
    batch_size: int | None = None,
) -> list[Tensor]:
    """Compute the loss and the gradients of every shard on its own device.

    Each shard's loss is a mean over the shard. Weighted by the shard's share of what the mean
    counts (examples, or targets that are not padding), the losses add up to the mean over the
    batch, and so do their gradients, however uneven the shards.

    Args:
        targets: one tensor a replica; best from :func:`split_batch`, which has counted them.
        loss_function: returns the mean loss of (outputs, targets). It must not compare the
            examples of a batch with each other, nor weigh classes: a shard sees its own examples
            alone. :func:`course_lib.parallel.counting.require_mean_of_parts` checks one.
        batch_size: targets that the mean is over, if not those of these shards alone: with
            gradient accumulation, what all the small batches count.

    Returns:
        Each shard's part of the mean loss, a scalar on its device. A read of one makes the host
        wait, so read them after all the work has been enqueued.

    Raises:
        TypeError: inputs or targets are a single tensor, or the targets of a shard are none.
        ValueError: there is not one shard of each for every replica, or ``batch_size`` is less
            than what these shards count.
    """
    require_one_a_replica(replicas, inputs=inputs, targets=targets)
    counts = counts_of(targets)
    total = total_count(counts, batch_size)
    losses = []
    for replica, x, y, count in zip(replicas, inputs, targets, counts, strict=True):
        if len(y) == 0:
            continue
        loss = part_of_mean(loss_function, replica(x), y, count, total)
        loss.backward()
        losses.append(loss.detach())
    return losses


def all_reduce_gradients(replicas: Sequence[nn.Module]) -> None:
    """Replace every gradient by the sum over all replicas, one parameter at a time.

    A parameter without a gradient on any replica (a frozen one) is left alone. A replica that
    has none while others do, because its shard was empty, takes part with zeros.

    Call it once a step, after the last backward pass. A second call changes nothing.

    Raises:
        ValueError: the replicas have different parameters.
        RuntimeError: a backward pass has added to gradients that were summed already.
    """
    for parameters in parameter_copies(replicas):
        there = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not there or are_sums(there):
            continue
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [each.grad for each in parameters if each.grad is not None]  # now all have one
        all_reduce(gradients)
        mark_as_sums(gradients)


def parameter_copies(replicas: Sequence[nn.Module]) -> list[tuple[nn.Parameter, ...]]:
    """For each parameter of the model its copies, one a replica.

    Raises:
        ValueError: the replicas have different parameters.
    """
    named = [dict(replica.named_parameters()) for replica in replicas]
    shapes = [{name: each.shape for name, each in copies.items()} for copies in named]
    for rank, theirs in enumerate(shapes):
        if theirs != shapes[0]:
            raise ValueError(
                f"replica {rank} has other parameters than replica 0: make all from one model, "
                "with replicate()"
            )
    return list(zip(*(copies.values() for copies in named), strict=True))


def train_step(
    replicas: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    inputs: Tensors,
    targets: Tensors,
    loss_function: Loss,
) -> list[Tensor]:
    """One step of data-parallel training; returns each shard's part of the mean loss.

    Raises:
        TypeError: what :func:`backward_on_shards` refuses so.
        ValueError: there is not one optimizer and one shard of each for every replica, or an
            optimizer has parameters that are not its replica's.
    """
    require_one_a_replica(replicas, optimizers=optimizers, inputs=inputs, targets=targets)
    for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
        _require_own_parameters(rank, replica, optimizer)
    for optimizer in optimizers:
        optimizer.zero_grad()
    losses = backward_on_shards(replicas, inputs, targets, loss_function)
    all_reduce_gradients(replicas)
    for optimizer in optimizers:
        optimizer.step()
    return losses


def _require_own_parameters(
    rank: int, replica: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    own = set(replica.parameters())
    if any(each not in own for group in optimizer.param_groups for each in group["params"]):
        raise ValueError(
            f"optimizer {rank} has parameters that are not replica {rank}'s: make the optimizers "
            "after replicate(), each from its replica's parameters()"
        )
