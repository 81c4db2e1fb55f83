"""A tensor-parallel MLP as one rank sees it: its own neurons, and two borders.

Shoeybi and others, "Megatron-LM", 2019. PyTorch's own is ``torch.distributed.tensor.parallel``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def summed(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, as a new one."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class CopyToRanks(torch.autograd.Function):
    """f: nothing forward, an all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)


class ReduceFromRanks(torch.autograd.Function):
    """g: an all-reduce forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, term: Tensor) -> Tensor:
        return summed(term)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class NeuronsOfRank(nn.Module):
    """Of an MLP's hidden neurons those of this rank: what leads into them, and out of them.

    Args:
        mlp: a linear layer, an activation, a linear layer, the same on all ranks; it stays as it
            is. N divides the hidden neurons. Of what is frozen, the parts are.
        device: where this rank's part lives.
    """

    def __init__(self, mlp: nn.Sequential, device: torch.device | str) -> None:
        super().__init__()
        rank, N = dist.get_rank(), dist.get_world_size()
        layers: list[Any] = list(mlp)
        up, self.activation, down = layers

        def part(tensor: Tensor, dim: int) -> nn.Parameter:
            mine = tensor.detach().chunk(N, dim)[rank].clone().to(device)
            return nn.Parameter(mine, tensor.requires_grad)

        self.up_weight, self.up_bias = part(up.weight, 0), part(up.bias, 0)
        self.down_weight = part(down.weight, 1)
        bias = down.bias.detach().clone().to(device)  # of all ranks
        self.down_bias = nn.Parameter(bias, down.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """From the whole input, the same on all ranks, to the whole output, on all ranks."""
        x = CopyToRanks.apply(x)
        hidden = self.activation(F.linear(x, self.up_weight, self.up_bias))
        term = F.linear(hidden, self.down_weight)
        return ReduceFromRanks.apply(term) + self.down_bias
