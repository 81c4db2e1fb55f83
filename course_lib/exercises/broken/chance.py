"""Programs in which chance, or a statistic, is not what it should be."""

# The programs stand here as a reader meets them in the lesson: without hints, zip as it comes.
# mypy: allow-untyped-defs
# ruff: noqa: B905

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from course_lib.parallel.data_parallel import all_reduce_gradients, replicate, split_batch
from course_lib.parallel.seeds import seed_device


def with_dropout(model, gpus):
    """Gives all devices one seed, and so one dropout: huggingface/transformers#31412."""
    replicas = replicate(model, gpus)
    for gpu in gpus:
        seed_device(1, gpu)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        for replica, x_part, y_part in zip(replicas, xs, ys):
            loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
            loss.backward()
            total += loss.item()
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def epochs(model, gpus):
    """Shuffles alike in every epoch: pytorch/pytorch#31771. Here a step is a whole epoch."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    size, epoch = 12, 0

    def step(x, y):
        nonlocal epoch
        epoch += 1
        shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        total = 0.0
        for chosen in shuffled.split(size):
            for optimizer in optimizers:
                optimizer.zero_grad()
            xs, ys = split_batch(x[chosen], gpus), split_batch(y[chosen], gpus)
            for replica, x_part, y_part in zip(replicas, xs, ys):
                loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
                loss.backward()
                total += loss.item() * len(chosen) / len(x)
            all_reduce_gradients(replicas)
            for optimizer in optimizers:
                optimizer.step()
        return total

    return replicas, step


def recomputed(model, gpus):
    """Recomputes a layer that keeps statistics: pytorch/pytorch#96136."""
    front, norm, back = model[:2].to(gpus[0]), model[2].to(gpus[0]), model[3:].to(gpus[1])
    optimizer = SGD(model.parameters(), lr=0.1)

    def first_stage(x):
        return norm(front(x))

    def step(x, y):
        optimizer.zero_grad()
        x, y = x.to(gpus[0]), y.to(gpus[1])
        h = checkpoint(first_stage, x, use_reentrant=False)  # not kept: computed again
        loss = F.cross_entropy(back(h.to(gpus[1])), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return [model], step
