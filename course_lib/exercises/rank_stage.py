"""One rank's stage of a pipeline: it computes and keeps account; the messages are the answer's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import hardware, timeline
from course_lib.exercises.diagnosis import Facts, gradient_of
from course_lib.exercises.rank_runs import on_ranks
from course_lib.exercises.verdict import Wrong
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import one_f_one_b


class Stage:
    """Some layers of a model, on one rank, and its microbatches.

    Attributes:
        steps: "F0", "B0" and so on, as they came.
        most_held: microbatches that were forward and not yet backward.
    """

    def __init__(self, layers: nn.Module, xs: list[Tensor], ys: list[Tensor]) -> None:
        self.layers, self._xs, self._ys = layers, xs, ys
        self._rank, self._last = dist.get_rank(), dist.get_world_size() - 1
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.steps: list[str] = []
        self.most_held = 0

    def empty(self) -> Tensor:
        """A tensor for one activation, or one gradient."""
        return torch.empty_like(self._xs[0])

    def forward(self, i: int, x: Tensor | None) -> Tensor | None:
        """The activation of microbatch ``i`` for the next rank; ``None`` on the last one."""
        self._begin("F", i, x, from_rank=self._rank - 1)
        x = (self._xs[i] if x is None else x).detach().requires_grad_()
        out = self.layers(x)
        if self._rank == self._last:
            out = F.cross_entropy(out, self._ys[i]) / len(self._ys)
        self._kept[i] = x, out
        self.most_held = max(self.most_held, len(self._kept))
        return None if self._rank == self._last else out.detach()

    def backward(self, i: int, gradient: Tensor | None) -> Tensor | None:
        """The gradient of microbatch ``i`` for the rank before; ``None`` on the first one."""
        self._begin("B", i, gradient, from_rank=self._rank + 1)
        x, out = self._kept.pop(i)
        out.backward(gradient)
        return None if self._rank == 0 else x.grad

    def _begin(self, kind: str, i: int, given: Tensor | None, from_rank: int) -> None:
        step = f"{kind}{i}"
        if not 0 <= i < len(self._ys):
            raise Wrong(f"rank {self._rank} asks for {step}, and m is {len(self._ys)}.")
        if step in self.steps:
            raise Wrong(f"rank {self._rank} does {step} twice.")
        if kind == "B" and f"F{i}" not in self.steps:
            raise Wrong(f"rank {self._rank} does {step} before F{i}.")
        has_neighbour = 0 <= from_rank <= self._last
        what = "an activation" if kind == "F" else "a gradient"
        if has_neighbour and given is None:
            raise Wrong(f"rank {self._rank} does {step} without {what} from rank {from_rank}.")
        if not has_neighbour and given is not None:
            raise Wrong(
                f"rank {self._rank} gives {step} {what}, and there is no rank to get one from: "
                "give None."
            )
        self.steps.append(step)


_WIDTH, _ROWS, _LAYERS = 128, 16, 8  # numbers in a row, rows of a microbatch, linear layers


def judge_turns(by_turns: Callable[[Stage, int], None], count: int, m: int) -> Facts:
    """What ``by_turns`` takes on ``count`` ranks, beside lesson 05's pipeline.

    Raises:
        Wrong: it is no 1F1B, or a slow one.
    """
    linear = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()) for _ in range(_LAYERS)]
    layers = nn.Sequential(nn.LayerNorm(_WIDTH), *linear)
    edges = [0, *(1 + _LAYERS // count * stage for stage in range(1, count)), len(layers)]
    x, y = torch.randn(m * _ROWS, _WIDTH), torch.randint(_WIDTH, (m * _ROWS,))
    with hardware.fresh_devices(count) as gpus:
        whole, on_the_first = Pipeline(copy.deepcopy(layers), gpus, edges[1:-1]), x.to(gpus[0])
        with timeline.trace() as theirs:
            whole.forward_backward(one_f_one_b(count, m), on_the_first, y, F.cross_entropy)
        wanted = [gradient_of(each).cpu() for each in whole.parameters()]

    def prepare() -> Stage:
        rank = dist.get_rank()
        own = copy.deepcopy(layers[edges[rank] : edges[rank + 1]]).to("vgpu")
        return Stage(own, list(x.to("vgpu").chunk(m)), list(y.to("vgpu").chunk(m)))

    with hardware.fresh_devices(count) as gpus:
        stages = on_ranks(prepare, gpus)
        with timeline.trace() as t:
            on_ranks(lambda: by_turns(stages[int(os.environ["RANK"])], m), gpus)
        times = t.seconds / theirs.seconds
        held = ", ".join(str(stage.most_held) for stage in stages)
        facts = [
            ("microbatches held by each rank", held, _limits(count, m)),
            ("time, in lesson 05's", f"{times:.2f}", "at most 1.10"),
        ]
        _judge_steps(stages, m, facts)
        parameters = [p for stage in stages for p in stage.layers.parameters()]
        for ours, given in zip(parameters, layers.parameters(), strict=True):
            if not torch.equal(ours.cpu(), given):
                raise Wrong("a parameter changed: only gradients are to be made.", facts)
        for ours, gradient in zip(parameters, wanted, strict=True):
            if not torch.allclose(gradient_of(ours).cpu(), gradient, atol=1e-6):
                raise Wrong(
                    "a gradient is not that of the batch: does every message reach the step that "
                    "it is meant for?",
                    facts,
                )
    if times > 1.1:
        most, held_first = min(m, count), stages[0].most_held
        why = f" Rank 0 may hold {most} microbatches, and never holds more than {held_first}."
        raise Wrong(
            f"it takes {times:.2f} times as long as lesson 05's pipeline."
            f"{why if held_first < most else ''}",
            facts,
        )
    return facts


def _judge_steps(stages: list[Stage], m: int, facts: Facts) -> None:
    for rank, stage in enumerate(stages):
        if len(stage.steps) < 2 * m:
            raise Wrong(f"rank {rank} does {len(stage.steps)} of {2 * m} steps.", facts)
        if stage.most_held > len(stages) - rank:
            raise Wrong(
                f"rank {rank} holds {stage.most_held} microbatches at once: after its first "
                "forwards, each must be followed by a backward.",
                facts,
            )


def _limits(count: int, m: int) -> str:
    return "at most " + ", ".join(str(min(m, count - rank)) for rank in range(count))
