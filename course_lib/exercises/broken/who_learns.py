"""Programs in which something does not learn, or forgets what it had learnt."""

# The programs stand here as a reader meets them in the lesson: without hints, zip as it comes.
# mypy: allow-untyped-defs
# ruff: noqa: B905

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from course_lib.parallel.collectives import all_reduce
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    parameter_copies,
    replicate,
    split_batch,
)


def one_row(model, gpus):
    """Makes optimizers before a wrapper makes new parameters: huggingface/accelerate#3256."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    for replica in replicas:
        layer = replica[0]  # its weight and bias become parts of one row
        row = torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])
        weight, bias = row.split([layer.weight.numel(), layer.bias.numel()])
        layer.weight, layer.bias = nn.Parameter(weight.view_as(layer.weight)), nn.Parameter(bias)

    def step(x, y):
        for replica in replicas:
            replica.zero_grad()
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


def thawed(model, gpus):
    """Sets hooks, and unfreezes a layer afterwards: Lightning-AI/pytorch-lightning#20340."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    for replica in replicas:
        replica[0].requires_grad_(False)
    reduced = [copies for copies in parameter_copies(replicas) if copies[0].requires_grad]
    steps = 0

    def step(x, y):
        nonlocal steps
        steps += 1
        if steps == 3:
            for replica in replicas:
                replica[0].requires_grad_(True)
        for replica in replicas:
            replica.zero_grad()
        total = 0.0
        for replica, x_part, y_part in zip(replicas, split_batch(x, gpus), split_batch(y, gpus)):
            loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
            loss.backward()
            total += loss.item()
        for copies in reduced:
            all_reduce([parameter.grad for parameter in copies])
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def moved(model, gpus):
    """Goes on without the optimizer's state: EvolvingLMMs-Lab/OneVision-Encoder#65."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1, momentum=0.9) for replica in replicas]
    steps = 0

    def step(x, y):
        nonlocal steps
        steps += 1
        if steps == 3:  # the machines were taken away; others read what was saved
            saved = {"model": replicas[0].state_dict()}
            replicas[:] = replicate(model, gpus)
            for replica in replicas:
                replica.load_state_dict(saved["model"])
            optimizers[:] = [SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]
        for replica in replicas:
            replica.zero_grad()
        total = 0.0
        for replica, x_part, y_part in zip(replicas, split_batch(x, gpus), split_batch(y, gpus)):
            loss = F.cross_entropy(replica(x_part), y_part) / len(gpus)
            loss.backward()
            total += loss.item()
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step
