"""Pipeline parallelism: the stages of a model work on different microbatches at the same time.

What lesson 05 derives. A schedule is data (:mod:`course_lib.parallel.schedules`), and here any of
them is run on devices; :mod:`course_lib.parallel.schedule_chart` runs it on paper. Both are loops
over one walk, :func:`course_lib.parallel.schedules.in_order`. PyTorch's own is
``torch.distributed.pipelining``.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import torch
from torch import Tensor

from course_lib.parallel.kinds import Loss
from course_lib.parallel.layer_parallel import LayerParallel
from course_lib.parallel.schedules import Schedule, check, in_order
from course_lib.parallel.transfers import Link, Transfer
from course_lib.parallel.weight_gradients import (
    Pending,
    add_weight_gradients,
    put_off_weight_gradients,
)


class Pipeline(LayerParallel):
    """A sequential model in stages, which trains by any schedule.

    It is made like :class:`LayerParallel`, with a device for each stage, which for a given schedule
    are ``[gpus[device] for device in schedule.placement]``.
    """

    def forward_backward(
        self,
        schedule: Schedule,
        inputs: Tensor,
        targets: Tensor,
        loss_function: Loss,
        recompute: bool = False,
    ) -> list[Tensor]:
        """Compute the loss and the gradients of a batch; gradients add up in the parameters.

        The batch is cut into microbatches that differ by at most one example. Each one's mean loss
        is weighted by its share of the batch, so that losses and gradients are those of the mean
        over the batch, however uneven the microbatches.

        Args:
            inputs, targets: the batch, anywhere; the first dimension counts examples.
            loss_function: returns the mean loss of (outputs, targets).
            recompute: keep only a stage's input, and run its forward again before its backward
                (Chen and others, "Training Deep Nets with Sublinear Memory Cost", 2016).

        Returns:
            Each microbatch's part of the mean loss, a scalar on the last device. A read of one
            makes the host wait.

        Raises:
            ValueError: the schedule is illegal or is not for these stages, or there are fewer
                examples than microbatches or other than targets.
        """
        check(schedule)
        self._check_fits(schedule, inputs, targets)
        run = _Run(self, schedule, inputs, targets, loss_function, recompute)
        work = {"F": run.forward, "B": run.backward, "W": run.weight_gradient}
        for _, step in in_order(schedule):
            work[step.kind](step.stage, step.microbatch)
        return [run.losses[microbatch] for microbatch in range(schedule.microbatches)]

    def _check_fits(self, schedule: Schedule, inputs: Tensor, targets: Tensor) -> None:
        wanted, there = list(schedule.placement), self.devices
        if [wanted.index(d) for d in wanted] != [there.index(d) for d in there]:
            raise ValueError(
                f"the schedule has its stages on devices {wanted}, this pipeline on "
                f"{[str(device) for device in there]}: cut the model and repeat the devices alike"
            )
        if len(inputs) != len(targets):
            raise ValueError(f"there are {len(inputs)} inputs and {len(targets)} targets")
        if len(inputs) < schedule.microbatches:
            raise ValueError(
                f"{len(inputs)} examples cannot fill {schedule.microbatches} microbatches"
            )


class _Run:
    """A step of training under way: what is kept until someone needs it."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        inputs: Tensor,
        targets: Tensor,
        loss_function: Loss,
        recompute: bool,
    ) -> None:
        self.stages, self.devices = pipeline.stages, pipeline.devices
        self.last = len(self.stages) - 1
        # All at once, since the host waits for a copy from its memory.
        count = schedule.microbatches
        self.inputs = torch.tensor_split(inputs.to(self.devices[0]), count)
        self.targets = torch.tensor_split(targets.to(self.devices[-1]), count)
        self.batch_size = len(inputs)
        self.loss_function, self.recompute = loss_function, recompute
        self.splits_backward = schedule.splits_backward
        self.losses: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple] = {}
        self.pending: dict[tuple[int, int], list[Pending]] = defaultdict(list)
        self.links: dict[tuple, Link] = {}
        self.under_way: dict[tuple[str, int, int], Transfer] = {}

    def forward(self, stage: int, microbatch: int) -> None:
        x = self.receive("F", stage, microbatch) if stage else self.inputs[microbatch]
        x = x.detach().requires_grad_(stage > 0)
        dice = torch.get_device_module(x.device).get_rng_state(x.device) if self.recompute else None
        with torch.set_grad_enabled(not self.recompute):
            out = self.run_stage(stage, microbatch, x)
        self.kept[stage, microbatch] = x, dice, None if self.recompute else out
        if stage == self.last:
            self.losses[microbatch] = out.detach()
        else:
            self.send("F", out.detach(), stage, stage + 1, microbatch)

    def backward(self, stage: int, microbatch: int) -> None:
        x, dice, out = self.kept.pop((stage, microbatch))
        gradient = None if stage == self.last else self.receive("B", stage, microbatch)
        if self.recompute:  # with the dice of the first time, for dropout to drop the same
            with torch.random.fork_rng([x.device], device_type=x.device.type):
                torch.get_device_module(x.device).set_rng_state(dice, x.device)
                out = self.run_stage(stage, microbatch, x)
        if out.requires_grad:  # a first stage may have nothing to learn
            out.backward(gradient)
        if stage:
            self.send("B", x.grad, stage, stage - 1, microbatch)

    def weight_gradient(self, stage: int, microbatch: int) -> None:
        add_weight_gradients(self.pending.pop((stage, microbatch)))

    def run_stage(self, stage: int, microbatch: int, x: Tensor) -> Tensor:
        """The stage's output; behind the last stage, the microbatch's part of the loss."""
        split = put_off_weight_gradients(self.pending[stage, microbatch])
        with split if self.splits_backward else nullcontext():
            out = self.stages[stage](x)
            if stage < self.last:
                return out
            share = len(self.inputs[microbatch]) / self.batch_size
            return self.loss_function(out, self.targets[microbatch]) * share

    def send(self, kind: str, tensor: Tensor, stage: int, other: int, microbatch: int) -> None:
        """Copy ``tensor`` to the device of stage ``other``, while both devices go on computing."""
        ends = self.devices[stage], self.devices[other]
        if (kind, *ends) not in self.links:
            self.links[kind, *ends] = Link(*ends)
        self.under_way[kind, other, microbatch] = self.links[kind, *ends].send(tensor)

    def receive(self, kind: str, stage: int, microbatch: int) -> Tensor:
        """What was sent to ``stage``; what its device does from now on waits for it."""
        return self.under_way.pop((kind, stage, microbatch)).receive()
