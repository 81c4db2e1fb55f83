"""Pipeline parallelism: the stages of a model work on different microbatches at the same time.

What lesson 05 derives. A schedule is data (:mod:`course_lib.parallel.schedule_rules`), and here
any of them is run on devices; :mod:`course_lib.parallel.schedule_chart` runs it on paper. Both are
loops over one walk, :func:`course_lib.parallel.schedule_rules.in_order`. PyTorch's own is
``torch.distributed.pipelining``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from course_lib.parallel.counting import CountedShards, part_of_mean
from course_lib.parallel.inputs import require_tensor, unchanged_buffers
from course_lib.parallel.kinds import Loss
from course_lib.parallel.layer_parallel import LayerParallel
from course_lib.parallel.schedule_rules import Schedule, check, in_order
from course_lib.parallel.stage_values import each, tensors_in
from course_lib.parallel.transfers import Link, Transfer
from course_lib.parallel.weight_gradients import (
    Pending,
    add_weight_gradients,
    put_off_weight_gradients,
)


class Pipeline(LayerParallel):
    """A sequential model in stages, which trains by any schedule.

    It is made like :class:`LayerParallel`, with a device for each stage, which for a given schedule
    are ``[gpus[device] for device in schedule.placement]``. What a stage hands to the next one is a
    tensor, or a tuple of tensors and of things that are none.
    """

    def forward_backward(
        self,
        schedule: Schedule,
        inputs: Tensor,
        targets: Tensor | CountedShards,
        loss_function: Loss,
        recompute: bool = False,
    ) -> list[Tensor]:
        """Compute the loss and the gradients of a batch; gradients add up in the parameters.

        The batch is cut into microbatches that differ by at most one example. Each one's mean loss
        is weighted by its share of what the loss counts (:mod:`course_lib.parallel.counting`), so
        that losses and gradients are those of the mean over the batch, however uneven they are.

        Args:
            inputs: the batch, anywhere; the first dimension counts examples.
            targets: for each example. What a loss counts of them is read from the host's memory:
                for targets on a device the host waits, unless they are already cut and counted, by
                :func:`microbatches_of`.
            loss_function: returns the mean loss of (outputs, targets).
            recompute: keep only a stage's input, and run its forward again before its backward
                (Chen and others, "Training Deep Nets with Sublinear Memory Cost", 2016).

        Returns:
            Each microbatch's part of the mean loss, a scalar on the last device. A read of one
            makes the host wait.

        Raises:
            ValueError: the schedule is illegal or is not for these stages, there are fewer examples
                than microbatches or other than targets, a BatchNorm (or an InstanceNorm that keeps
                statistics) would see microbatches, or a stage changes its buffers when recomputed.
            TypeError: inputs or targets are not one tensor, or a stage hands on something that is
                neither a tensor nor a tuple of tensors.
        """
        require_tensor(inputs, "inputs are")
        check(schedule)
        self._check_same_placement(schedule)
        if schedule.microbatches > 1 or recompute:
            self._check_no_statistics()
        if not isinstance(targets, CountedShards):
            targets = microbatches_of(targets, schedule.microbatches, self.devices[-1])
        _check_examples(len(inputs), [len(each) for each in targets], schedule.microbatches)
        run = _Run(self, schedule, inputs, targets, loss_function, recompute)
        work = {"F": run.forward, "B": run.backward, "W": run.weight_gradient}
        for _, step in in_order(schedule):
            work[step.kind](step.stage, step.microbatch)
        return [run.losses[microbatch] for microbatch in range(schedule.microbatches)]

    def _check_same_placement(self, schedule: Schedule) -> None:
        wanted, there = list(schedule.placement), self.devices
        if len(wanted) != len(there) or any(
            (wanted[one] == wanted[other]) != (there[one] == there[other])
            for one, other in combinations(range(len(there)), 2)
        ):
            raise ValueError(
                f"the schedule has its stages on devices {wanted}, this pipeline on "
                f"{[str(device) for device in there]}: cut the model and repeat the devices alike"
            )

    def _check_no_statistics(self) -> None:
        for name, module in self.named_modules():
            keeps_mean = isinstance(module, _NormBase) and module.running_mean is not None
            # A mean that is kept may be fixed; without one, InstanceNorm looks at one example.
            if module.training if keeps_mean else isinstance(module, _BatchNorm):
                raise ValueError(
                    f"{name} is of type {type(module).__name__}, whose statistics would be those "
                    "of a microbatch, and counted twice if recomputed: use LayerNorm or GroupNorm, "
                    "or call its eval()"
                )


def microbatches_of(targets: Tensor, count: int, device: torch.device | str) -> CountedShards:
    """``count`` microbatches of targets, counted and on the last device, before the first step.

    Raises:
        TypeError: the targets are no tensor.
        ValueError: there are no microbatches.
    """
    require_tensor(targets, "targets are")
    if count < 1:
        raise ValueError(f"targets are cut into one microbatch or more: {count}")
    return CountedShards(torch.tensor_split(targets, count), [torch.device(device)] * count)


def _check_examples(inputs: int, targets: Sequence[int], microbatches: int) -> None:
    if len(targets) != microbatches:
        raise ValueError(f"{len(targets)} microbatches of targets, and the schedule {microbatches}")
    if inputs != sum(targets):
        raise ValueError(f"there are {inputs} inputs and {sum(targets)} targets")
    if inputs < microbatches:
        raise ValueError(f"{inputs} examples cannot fill {microbatches} microbatches")


class _Run:
    """A step of training under way: what is kept until someone needs it."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        inputs: Tensor,
        targets: CountedShards,
        loss_function: Loss,
        recompute: bool,
    ) -> None:
        self.stages, self.devices = pipeline.stages, pipeline.devices
        self.last = len(self.stages) - 1
        # All at once, since the host waits for a copy from its memory.
        self.inputs = torch.tensor_split(inputs.to(self.devices[0]), schedule.microbatches)
        self.targets, self.total = targets, sum(targets.counts)
        self.loss_function, self.recompute = loss_function, recompute
        self.splits_backward = schedule.splits_backward
        # From the lowest stage with something to learn, gradients are computed and sent.
        learning = [
            number
            for number, stage in enumerate(self.stages)
            if any(parameter.requires_grad for parameter in stage.parameters())
        ]
        self.lowest = min(learning, default=len(self.stages))
        self.losses: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple] = {}
        self.pending: dict[tuple[int, int], list[Pending]] = defaultdict(list)
        self.links: dict[tuple, Link] = {}
        self.under_way: dict[tuple[str, int, int], Any] = {}

    def forward(self, stage: int, microbatch: int) -> None:
        x = self.receive("F", stage, microbatch) if stage else self.inputs[microbatch]
        # Cut off from the graph of the stage before; its gradient is sent on by hand.
        needs_gradient = stage > self.lowest
        x = each(
            x,
            Tensor,
            lambda one: one.detach().requires_grad_(needs_gradient and one.is_floating_point()),
        )
        device, rng_state = self.devices[stage], None
        if self.recompute:
            rng_state = torch.get_device_module(device).get_rng_state(device)
        with torch.set_grad_enabled(not self.recompute):
            out = self.run_stage(stage, microbatch, x)
        self.kept[stage, microbatch] = x, rng_state, None if self.recompute else out
        if stage == self.last:
            self.losses[microbatch] = out.detach()
        else:
            self.send("F", each(out, Tensor, Tensor.detach), stage, stage + 1, microbatch)

    def backward(self, stage: int, microbatch: int) -> None:
        x, rng_state, out = self.kept.pop((stage, microbatch))
        if stage < self.lowest:
            return
        gradients = [None] if stage == self.last else self.receive("B", stage, microbatch)
        if self.recompute:  # with the random state of the first time, for dropout to drop the same
            device = self.devices[stage]
            with (
                unchanged_buffers(self.stages[stage]),
                torch.random.fork_rng([device], device_type=device.type),
            ):
                torch.get_device_module(device).set_rng_state(rng_state, device)
                out = self.run_stage(stage, microbatch, x)
        # An output may need no gradient, and the stage after may not use it; the loss starts alone.
        used = [
            (tensor, gradient)
            for tensor, gradient in zip(tensors_in(out), gradients, strict=True)
            if tensor.requires_grad and (gradient is not None or stage == self.last)
        ]
        if used:
            outputs, their_gradients = zip(*used, strict=True)
            torch.autograd.backward(outputs, their_gradients)
        if stage > self.lowest:
            of_inputs = tuple(tensor.grad for tensor in tensors_in(x))
            self.send("B", of_inputs, stage, stage - 1, microbatch)

    def weight_gradient(self, stage: int, microbatch: int) -> None:
        add_weight_gradients(self.pending.pop((stage, microbatch), []))

    def run_stage(self, stage: int, microbatch: int, x: Any) -> Any:
        """The stage's output; behind the last stage, the microbatch's part of the loss."""
        split = put_off_weight_gradients(self.pending[stage, microbatch])
        with split if self.splits_backward else nullcontext():
            out = self.stages[stage](x)
            if stage < self.last:
                return out
            targets, count = self.targets[microbatch], self.targets.counts[microbatch]
            return part_of_mean(self.loss_function, out, targets, count, self.total)

    def send(self, kind: str, value: Any, stage: int, other: int, microbatch: int) -> None:
        """Copy ``value`` to the device of stage ``other``, while both devices go on computing."""
        ends = self.devices[stage], self.devices[other]
        if (kind, *ends) not in self.links:
            self.links[kind, *ends] = Link(*ends)
        link = self.links[kind, *ends]
        self.under_way[kind, other, microbatch] = each(value, Tensor, link.send)

    def receive(self, kind: str, stage: int, microbatch: int) -> Any:
        """What was sent to ``stage``; what its device does from now on waits for it."""
        return each(self.under_way.pop((kind, stage, microbatch)), Transfer, Transfer.receive)
