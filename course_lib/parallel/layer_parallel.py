"""Model parallelism by layers: each device holds some of the layers, activations move between.

What lesson 04 derives. Also called inter-layer or vertical model parallelism; without microbatches
it is the naive form of pipeline parallelism (Huang and others, "GPipe", 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.parallel.inputs import require_devices
from course_lib.parallel.stage_values import each


class LayerParallel(nn.Module):
    """A sequential model whose layers are placed on several devices.

    The forward pass moves the activation from each stage's device to the next one's. Autograd
    records the move, and moves the activation's gradient back the same way in the backward pass.

    Args:
        layers: the model; it is taken apart and moved, not copied.
        devices: one for each stage.
        cuts: where to cut, positions in ``layers``: ``[2, 5]`` makes three stages, layers 0 and 1,
            layers 2 to 4, and the rest.

    Raises:
        TypeError: the model is not sequential, or cuts or devices are no lists.
        ValueError: there is no device, the cuts do not make one non-empty stage for each device,
            or two stages share a parameter.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        devices: Sequence[torch.device | str],
        cuts: Sequence[int],
    ) -> None:
        super().__init__()
        self.devices = require_devices(devices)
        if not isinstance(layers, nn.Sequential):
            raise TypeError(f"an nn.Sequential is cut into stages, not a {type(layers).__name__}")
        if not isinstance(cuts, list | tuple) or not all(isinstance(cut, int) for cut in cuts):
            raise TypeError(f"cuts are a list of positions in the model, whole numbers: {cuts!r}")
        edges = [0, *cuts, len(layers)]
        if len(cuts) != len(devices) - 1 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(
                f"{len(devices)} devices need {len(devices) - 1} cuts, in rising order, strictly "
                f"between 0 and {len(layers)}: got {list(cuts)}"
            )
        # A slice of an MLP or a GPT would call that class's constructor.
        plain = list(layers)
        self.stages = nn.ModuleList(nn.Sequential(*plain[a:b]) for a, b in pairwise(edges))
        _check_nothing_shared(self.stages)
        for stage, device in zip(self.stages, self.devices, strict=True):
            stage.to(device)

    def forward(self, x: Any) -> Any:
        """The model's output, on the last device; ``x`` may start anywhere.

        What goes from stage to stage is a tensor, or a tuple of tensors and of things that are
        none.

        Raises:
            TypeError: it is something else, such as a dictionary.
        """
        for stage, device in zip(self.stages, self.devices, strict=True):
            x = stage(each(x, Tensor, methodcaller("to", device)))
        return x


def _check_nothing_shared(stages: nn.ModuleList) -> None:
    seen: set[nn.Parameter] = set()
    for stage in stages:
        parameters = set(stage.parameters())
        if seen & parameters:
            raise ValueError(
                "two stages share a parameter, which can only be on one device: "
                "build the model untied, as in GPT(..., tied=False)"
            )
        seen |= parameters


def balanced_cuts(costs: Sequence[float], stage_count: int) -> list[int]:
    """Cut a row of layers into stages so that the costliest stage costs as little as it can.

    Args:
        costs: one number for each layer, 0 or above: its parameters, FLOPs or bytes.
        stage_count: how many stages.

    Returns:
        ``stage_count - 1`` positions, as :class:`LayerParallel` takes them.

    Raises:
        TypeError: ``stage_count`` is no whole number.
        ValueError: there are fewer layers than stages, or a cost is negative or not finite.
    """
    if not isinstance(stage_count, int):
        raise TypeError(f"a model is cut into a whole number of stages: {stage_count!r}")
    for index, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise ValueError(f"a layer costs a finite number, 0 or above: costs[{index}] is {cost}")
    count = len(costs)
    if not 1 <= stage_count <= count:
        raise ValueError(f"cannot cut {count} layers into {stage_count} non-empty stages")
    total = [0.0, *accumulate(costs)]
    # best[i] is (cost of the costliest stage, cuts) for the first i layers.
    best: dict[int, tuple[float, list[int]]] = {i: (total[i], []) for i in range(1, count + 1)}
    for stages in range(2, stage_count + 1):
        best = {
            end: min(
                (max(best[cut][0], total[end] - total[cut]), [*best[cut][1], cut])
                for cut in range(stages - 1, end)
            )
            for end in range(stages, count + 1)
        }
    return best[count][1]
