"""Programs that split a model, and are wrong where its parts meet."""

# The programs stand here as a reader meets them in the lesson: without hints, zip as it comes.
# mypy: allow-untyped-defs
# ruff: noqa: B905

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from course_lib.models import Attention, Embedding, next_token_loss
from course_lib.parallel.attention_ring import ring_attention
from course_lib.parallel.data_parallel import all_reduce_gradients, replicate


class SplitMLP(nn.Module):
    """Two linear layers, cut for tensor parallelism: the first by neurons, the second by inputs."""

    def __init__(self, inputs: int, hidden: int, outputs: int, count: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(inputs, hidden // count) for _ in range(count))
        self.downs = nn.ModuleList(
            nn.Linear(hidden // count, outputs, bias=False) for _ in range(count)
        )
        self.bias = nn.Parameter(torch.linspace(-1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """As one device computes it."""
        parts = [down(F.relu(up(x))) for up, down in zip(self.ups, self.downs, strict=True)]
        return sum(parts) + self.bias


class Reader(nn.Module):
    """A language model of one attention layer."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, context, width)
        self.attention = Attention(width, heads=2)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """As one device computes it: scores, [B, T, V]."""
        return self.head(self.attention(self.embedding(tokens_BT)))


def microbatches(model, gpus):
    """Divides the loss by its microbatches in the log alone: pytorch/torchtitan#2972."""
    layers = list(model)
    front, back = nn.Sequential(*layers[:2]).to(gpus[0]), nn.Sequential(*layers[2:]).to(gpus[1])
    optimizer = AdamW(model.parameters(), lr=1e-2)
    count = 4

    def step(x, y):
        optimizer.zero_grad()
        losses = []
        for x_piece, y_piece in zip(x.chunk(count), y.chunk(count)):
            h = front(x_piece.to(gpus[0]))
            losses.append(F.cross_entropy(back(h.to(gpus[1])), y_piece.to(gpus[1])))
        for loss in losses:
            loss.backward()
        optimizer.step()
        return sum(loss.item() for loss in losses) / count

    return [model], step


def split_layers(model, gpus):
    """Adds a bias on every device, before the sum: Wenyueh/MinivLLM#80."""
    for up, down, gpu in zip(model.ups, model.downs, gpus):
        up.to(gpu), down.to(gpu)
    model.bias.data = model.bias.data.to(gpus[0])
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        parts = []
        for up, down, gpu in zip(model.ups, model.downs, gpus):
            h = F.relu(up(x.to(gpu)))
            part = F.linear(h, down.weight, model.bias.to(gpu))
            parts.append(part.to(gpus[0]))
        loss = F.cross_entropy(sum(parts), y.to(gpus[0]))
        loss.backward()
        optimizer.step()
        return loss.item()

    return [model], step


def long_passages(model, gpus):
    """Takes plain order for zigzag order: feifeibear/long-context-attention#53."""
    replicas = replicate(model, gpus)
    optimizers = [SGD(replica.parameters(), lr=0.5) for replica in replicas]

    def step(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        places = torch.arange(x.shape[1]).chunk(len(gpus))  # whose tokens are where
        triples = []
        for replica, own, gpu in zip(replicas, places, gpus):
            tokens, own = x[:, own].to(gpu), own.to(gpu)
            h = replica.embedding.token(tokens) + replica.embedding.position(own)
            qkv = replica.attention.qkv(h).unflatten(-1, (3, replica.attention.heads, -1))
            triples.append(qkv.permute(2, 0, 3, 1, 4).unbind())
        qs, ks, vs = zip(*triples)
        losses = []
        for replica, out, own, gpu in zip(
            replicas, ring_attention(qs, ks, vs, causal=True), places, gpus
        ):
            h = replica.attention.out(out.transpose(1, 2).flatten(2))
            losses.append(next_token_loss(replica.head(h), y[:, own].to(gpu)) / len(gpus))
        torch.autograd.backward(losses)
        all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
        return sum(loss.item() for loss in losses)

    return replicas, step
