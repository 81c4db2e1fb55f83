"""Sharded data parallelism: each device keeps a part of what data parallelism copies to all.

What lesson 08 derives. Rajbhandari and others, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2020. PyTorch's own are ``ZeroRedundancyOptimizer`` (stage 1) and
``torch.distributed.fsdp.fully_shard`` (stages 2 and 3).

:mod:`course_lib.parallel.unit_exchange` says what each stage holds and sends, and does the sending;
:mod:`course_lib.parallel.flat_unit` is what a device has of some layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.parallel.counting import counts_of, part_of_mean, total_count
from course_lib.parallel.flat_unit import (
    FlatUnit,
    Master,
    require_shardable,
    split_into_units,
    with_next,
)
from course_lib.parallel.gradient_norm import clip_together
from course_lib.parallel.inputs import (
    require_devices,
    require_elementwise,
    require_one_each,
    require_one_tensor,
)
from course_lib.parallel.kinds import Devices, Loss, MakeOptimizer, OptionsOf, Tensors
from course_lib.parallel.sharded_state import gather_state, scatter_state
from course_lib.parallel.unit_exchange import UnitExchange


class Sharded:
    """A sequential model that trains in data parallel, by any stage of ZeRO.

        sharded.zero_grad()
        sharded.backward(xs, ys, loss_function)
        sharded.clip_gradients(1.0)
        sharded.step()

    All devices work on one unit before they go on to the next, so that its parameters can be
    gathered, and its gradients summed, for all of them at once.

    Args:
        model: stays as it is. No parameter may be shared or frozen, and there may be no buffers.
        devices: one for each shard of the batch.
        stage: 0 (all hold everything: data parallelism), 1 (each holds a part of the optimizer
            state), 2 (and of the gradients) or 3 (and of the parameters).
        dtype: of parameters, gradients and activations. Master weights and the loss are in
            float32, or in float64 if that is the dtype.
        make_optimizer: makes an optimizer for a list of parameter groups. It must treat each
            number by itself, as SGD and Adam do: it gets stretches of rows of parameters.
        options_of: what a parameter's group says beside, such as
            ``lambda name, p: {"weight_decay": 0.1 if p.dim() >= 2 else 0.0}``. It is asked of the
            model's own parameters: in a row, all of them have one dimension.
        prefetch: at stage 3, gather the next unit's parameters while this one's are at work.
        reduce_dtype: in which gradients are summed and kept; ``dtype`` if not given. A ring rounds
            at every hop: with bfloat16 and many devices, float32 is worth its bytes.

    Attributes:
        units: the layers; one without parameters belongs to the one before.

    Raises:
        ValueError: ``model`` is not sequential or has what it may not have, there is no such
            stage, no such dtype or no device, or ``make_optimizer`` makes groups of its own,
            chooses options by shapes or does not treat each number by itself.
    """

    def __init__(
        self,
        model: nn.Sequential,
        devices: Devices,
        stage: int,
        dtype: torch.dtype = torch.bfloat16,
        make_optimizer: MakeOptimizer = torch.optim.AdamW,
        options_of: OptionsOf | None = None,
        prefetch: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        devices, reduce_dtype = require_devices(devices), reduce_dtype or dtype
        require_shardable(model, stage, dtype, reduce_dtype)
        self.devices, self.stage, self.dtype = devices, stage, dtype
        self._make_optimizer = make_optimizer
        self.master_dtype = torch.promote_types(dtype, torch.float32)
        self._exchange = UnitExchange(devices, stage, dtype, reduce_dtype, prefetch)
        self._accumulates = False
        self.units: list[FlatUnit] = []
        self._empty_model = copy.deepcopy(model).to("meta")  # what to compute, without numbers
        require_elementwise(make_optimizer, options_of, self._empty_model)
        values = dict(model.named_parameters())
        names = iter(values)
        for layers in split_into_units(self._empty_model):
            unit = FlatUnit(layers, [next(names) for _ in layers.parameters()], devices, dtype)
            self._place(unit, values, make_optimizer, options_of)
            self.units.append(unit)

    def _place(
        self,
        unit: FlatUnit,
        values: Mapping[str, Tensor],
        make_optimizer: MakeOptimizer,
        options_of: OptionsOf | None,
    ) -> None:
        groups, start = unit.groups(options_of), 0
        for part, device in zip(self._exchange.cut(unit.row_of(values)), self.devices, strict=True):
            part = part.to(device, self.master_dtype, copy=True)
            unit.masters.append(Master(part, start, groups, make_optimizer))
            start += len(part) if self.stage else 0
        self._exchange.put_parameters(unit)

    def train_step(self, inputs: Tensors, targets: Tensors, loss_function: Loss) -> list[Tensor]:
        """One step of training; takes, returns and raises what :meth:`backward` does."""
        self.zero_grad()
        losses = self.backward(inputs, targets, loss_function)
        self.step()
        return losses

    def zero_grad(self) -> None:
        """Drop all gradients; after a step that was interrupted, this starts afresh."""
        self._exchange.join()
        for unit in self.units:
            unit.take_gradients()
            unit.gradients = []

    def backward(
        self,
        inputs: Tensors,
        targets: Tensors,
        loss_function: Loss,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """Compute the loss and its gradients, which are added to those that are there.

        Takes and returns what :func:`course_lib.parallel.data_parallel.backward_on_shards` does; an
        empty shard takes part with zeros, and has no loss.

        Raises:
            ValueError: there is not one shard of each for every device, or no example at all.
            TypeError: inputs or targets are no list of tensors, or what goes from one unit to the
                next, or to the loss, is not one tensor.
        """
        for shards in (inputs, targets):
            require_one_each(shards, len(self.devices), "this model")
        sizes = [len(y) for y in targets]
        if not any(sizes):
            raise ValueError(
                "a batch has one example at least: the targets of all shards are empty"
            )
        kept, outs = self._forward(inputs)
        counts = counts_of(targets)
        total = total_count(counts, batch_size)
        losses = [
            part_of_mean(loss_function, out.to(self.master_dtype), y, count, total)
            for out, y, count in zip(outs, targets, counts, strict=True)
        ]
        for loss in losses:
            loss.backward()
        self._backward(kept, [out.grad for out in outs])
        return [loss.detach() for loss, size in zip(losses, sizes, strict=True) if size]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let stages 0 and 1 exchange nothing: for all but the last of several :meth:`backward`.

        Their gradients stay whole on each device, to be added to. At stages 2 and 3 no device has
        room for them: there every backward pass exchanges all that it always does.
        """
        outside, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = outside

    def _forward(self, inputs: Tensors) -> tuple[list[tuple], list[Tensor]]:
        """What went in and came out of each unit, and the last one's output, cut off from both."""
        kept = []
        xs = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        for unit, following in with_next(self.units):
            with self._exchange.whole(unit, following):
                outs = [require_one_tensor(unit.forward(rank, x)) for rank, x in enumerate(xs)]
            kept.append((xs, outs))
            # Cut autograd's graph, so that backward comes to one unit at a time as well.
            xs = [out.detach().requires_grad_() for out in outs]
        return kept, xs

    def _backward(self, kept: list[tuple], grad_outputs: list[Tensor | None]) -> None:
        for unit, following in with_next(self.units[::-1]):
            xs, outs = kept.pop()
            with self._exchange.whole(unit, following):
                for out, grad_output in zip(outs, grad_outputs, strict=True):
                    out.backward(grad_output)
            grad_outputs = [x.grad for x in xs]
            if self.stage >= 2 or not self._accumulates:
                self._exchange.sum_gradients(unit)

    def join(self) -> None:
        """Let what the devices do from now on wait for all exchanges.

        To be called before anything else reads or changes the units' gradients.
        """
        self._exchange.join()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients so that the norm of the whole model's is at most ``max_norm``.

        Returns, and raises, what :func:`course_lib.parallel.gradient_norm.clip_gradients` does.
        """
        self._exchange.join()
        gradients = [each for unit in self.units for each in unit.gradients]
        copies = 1 if self.stage else len(self.devices)
        return clip_together(gradients[::copies], gradients, max_norm)

    def step(self) -> None:
        """Update each device's part of the parameters, and put them where the stage has them.

        Raises:
            RuntimeError: there are no gradients.
        """
        self._exchange.join()
        for unit in self.units:
            if not unit.gradients:
                raise RuntimeError(
                    "there are no gradients to step with: call backward() first, and at least "
                    "once outside of accumulate()"
                )
            for master, gradient in zip(unit.masters, unit.gradients, strict=True):
                master.step(gradient)
            self._exchange.put_parameters(unit)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All of them, to set a learning rate in their ``param_groups``."""
        return [master.optimizer for unit in self.units for master in unit.masters]

    def to_model(self) -> nn.Sequential:
        """The whole model, on the host, in the precision of the master weights."""
        model = copy.deepcopy(self._empty_model).to_empty(device="cpu")
        model.load_state_dict(self.state_dict()["parameters"])
        return model

    def state_dict(self) -> dict[str, Any]:
        """Master weights and optimizer state, whole, on the host: for any number of devices.

        Returns what :func:`course_lib.parallel.sharded_state.gather_state` does. Options such as
        the learning rate are not in it.
        """
        return gather_state(self.units, is_sharded=self.stage > 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, on these devices and at this stage.

        Raises:
            ValueError: it is the state of a model with other parameters, or of another optimizer.
        """
        self._exchange.join()
        scatter_state(state, self.units, self._exchange.cut, self._make_optimizer)
        for unit in self.units:
            self._exchange.put_parameters(unit)
