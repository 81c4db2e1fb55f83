"""Programs whose sum of gradients is wrong, or made too often."""

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
from course_lib.parallel.gradient_norm import clip_together


def accumulated(model, gpus):
    """Exchanges the gradients of the first piece, and not of all: modelscope/FunASR#3472."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    pieces = 4

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        for number, (x_piece, y_piece) in enumerate(zip(x.chunk(pieces), y.chunk(pieces))):
            xs, ys = split_batch(x_piece, gpus), split_batch(y_piece, gpus)
            for replica, x_part, y_part in zip(replicas, xs, ys):
                loss = F.cross_entropy(replica(x_part), y_part) / (pieces * len(gpus))
                loss.backward()
                total += loss.item()
            if number % pieces == 0:
                all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def short_passages(model, gpus):
    """Weights each shard's mean over its tokens alike: huggingface/transformers#34242."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=1.0) for replica in replicas]

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        for replica, x_part, y_part in zip(replicas, xs, ys):
            share = len(y_part) / len(y)
            loss = next_token_loss(replica(x_part), y_part) * share
            loss.backward()
            total += loss.item()
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def four_pieces(model, gpus):
    """Exchanges gradients after every piece of a batch: NVIDIA/cosmos-framework#161."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]
    count = 4

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        for x_piece, y_piece in zip(x.chunk(count), y.chunk(count)):
            xs, ys = split_batch(x_piece, gpus), split_batch(y_piece, gpus)
            for replica, x_part, y_part in zip(replicas, xs, ys):
                loss = F.cross_entropy(replica(x_part), y_part) / count
                loss.backward()
                total += loss.item() / len(gpus)
            for copies in parameter_copies(replicas):
                gradients = [parameter.grad for parameter in copies]
                all_reduce(gradients)
                for gradient in gradients:
                    gradient /= len(gpus)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step


def clipped(model, gpus):
    """Clips by a norm in which every copy of a gradient counts: NVIDIA-NeMo/RL#3788."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.5) for replica in replicas]

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
        gradients = [p.grad for replica in replicas for p in replica.parameters()]
        clip_together(gradients, gradients, max_norm=0.1)
        for optimizer in optimizers:
            optimizer.step()
        return total

    return replicas, step
