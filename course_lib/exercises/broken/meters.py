"""Programs whose parameters are right: what is wrong shows on a meter, or on another machine."""

# The programs stand here as a reader meets them in the lesson: without hints, zip as it comes.
# mypy: allow-untyped-defs
# ruff: noqa: B905

from __future__ import annotations

from torch.nn import functional as F
from torch.optim import SGD

from course_lib.models import next_token_loss
from course_lib.parallel.collectives import all_reduce
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    parameter_copies,
    replicate,
    split_batch,
)
from course_lib.parallel.transfers import SideStreams


def whole_batches(model, gpus):
    """Gives every device the whole batch: innnky/so-vits-svc#70."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        for replica, gpu in zip(replicas, gpus):
            loss = F.cross_entropy(replica(x.to(gpu)), y.to(gpu)) / len(gpus)
            loss.backward()
            total += loss.item()
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def logged(model, gpus):
    """Keeps the graph of every loss that it logs: horovod/horovod#641."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    losses = []

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        for replica, x_part, y_part in zip(replicas, xs, ys):
            loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
            loss.backward()
            losses.append(loss)
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return sum(loss.item() for loss in losses[-len(gpus) :])

    return replicas, step


def side_streams(model, gpus):
    """Uses what a side stream may still be at work on: ROCm/pytorch#3194."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    sides = SideStreams(gpus)

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        for replica, x_part, y_part in zip(replicas, xs, ys):
            loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
            loss.backward()
            total += loss.item()
        for copies in parameter_copies(replicas):
            gradients = [parameter.grad for parameter in copies]
            with sides.beside(gradients):
                all_reduce(gradients)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def by_length(model, gpus):
    """Deals out passages by length, and so one rank most of the work: Tencent-Hunyuan/UniRL#45."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=1.0) for replica in replicas]

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        lengths = (y != -100).sum(dim=1)
        by_length = lengths.argsort(stable=True)
        total, count = 0.0, lengths.sum().item()
        for rank, (replica, gpu) in enumerate(zip(replicas, gpus)):
            own = by_length.chunk(len(gpus))[rank]
            longest = int(lengths[own].max())  # no more columns than its longest passage needs
            x_part, y_part = x[own, :longest].to(gpu), y[own, :longest].to(gpu)
            share = lengths[own].sum().item() / count
            loss = next_token_loss(replica(x_part), y_part) * share
            loss.backward()
            total += loss.item()
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step
