"""Sharded data parallelism: each device keeps a part of what data parallelism copies to all.

What lesson 08 derives. Rajbhandari and others, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2020. PyTorch's own are ``ZeroRedundancyOptimizer`` (stage 1) and
``torch.distributed.fsdp.fully_shard`` (stages 2 and 3).

In mixed precision a parameter takes 16 bytes: 2 for its bfloat16 value, 2 for its gradient, and 12
for the optimizer's state in float32, which is the master weight and AdamW's two moments. With N
devices, what each one holds, and what it sends in a step, as a multiple of the parameters:

    =====  ==========  =========  ===============  =================  =============
    stage  parameters  gradients  optimizer state  bytes a parameter  sent
    =====  ==========  =========  ===============  =================  =============
    0      all         all        all              16                 2 * (N - 1)/N
    1      all         all        1/N              4 + 12/N           2 * (N - 1)/N
    2      all         1/N        1/N              2 + 14/N           2 * (N - 1)/N
    3      1/N         1/N        1/N              16/N               3 * (N - 1)/N
    =====  ==========  =========  ===============  =================  =============
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from course_lib.hardware import current_stream, event
from course_lib.parallel.collectives import all_gather, reduce_scatter, ring_all_reduce
from course_lib.parallel.kinds import Loss
from course_lib.parallel.transfers import SideStreams


class Sharded:
    """A sequential model that trains in data parallel, by any stage of ZeRO.

    All devices work on one unit before they go on to the next, so that its parameters can be
    gathered, and its gradients summed, for all of them at once.

    Args:
        model: stays as it is. No parameter may be shared or frozen, and there may be no buffers.
        devices: one for each shard of the batch.
        stage: 0 (all hold everything: data parallelism), 1 (each holds a part of the optimizer
            state), 2 (and of the gradients) or 3 (and of the parameters).
        dtype: of parameters, gradients and activations. Master weights and the loss are in
            float32, or in float64 if that is the dtype.
        make_optimizer: makes an optimizer for a list of tensors. It must treat each number by
            itself, as SGD and Adam do: it gets rows of parameters, or parts of rows.
        prefetch: at stage 3, gather the next unit's parameters while this one's are at work.

    Attributes:
        units: the layers; one without parameters belongs to the one before.

    Raises:
        ValueError: ``model`` is not sequential or has what it may not have, or there is no such
            stage, no such dtype or no device.
    """

    def __init__(
        self,
        model: nn.Sequential,
        devices: Sequence[torch.device],
        stage: int,
        dtype: torch.dtype = torch.bfloat16,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = torch.optim.AdamW,
        prefetch: bool = True,
    ) -> None:
        _check(model, devices, stage, dtype)
        self.devices, self.stage, self.dtype, self.prefetch = devices, stage, dtype, prefetch
        self.master_dtype = torch.promote_types(dtype, torch.float32)
        self._sides = SideStreams(devices)
        self._empty_model = copy.deepcopy(model).to("meta")  # what to compute, without numbers
        self.units = [_Unit(layers, devices, dtype) for layers in _split(self._empty_model)]
        for unit, layers in zip(self.units, _split(model), strict=True):
            row = parameters_to_vector(layers.parameters()).detach()
            row = nn.functional.pad(row, (0, -len(row) % len(devices)))
            parts = row.chunk(len(devices)) if stage else [row] * len(devices)
            for part, device in zip(parts, devices, strict=True):
                unit.masters.append(part.to(device, self.master_dtype, copy=True))
                unit.optimizers.append(make_optimizer(unit.masters[-1:]))
            self._renew_parameters(unit)

    def train_step(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], loss_function: Loss
    ) -> list[Tensor]:
        """One step of training, as :func:`course_lib.parallel.data_parallel.train_step` does it.

        Args:
            inputs, targets: one shard a device; an empty one takes part with zeros.
            loss_function: returns the mean loss of (outputs, targets).

        Returns:
            Each shard's part of the mean loss, a scalar on its device; an empty one has none.

        Raises:
            ValueError: there is not one shard of each for every device, or no example at all.
        """
        counts = [len(y) for y in targets]
        if not len(inputs) == len(counts) == len(self.devices) or not any(counts):
            raise ValueError(
                f"{len(self.devices)} devices need a shard of each, and one example at least: "
                f"there are {len(inputs)} inputs, and targets of {counts} examples"
            )
        for unit in self.units:
            unit.gradients = []
        kept, losses, grad_outputs = self._forward(inputs, targets, loss_function)
        self._backward(kept, grad_outputs)
        self._step()
        return [loss for loss, count in zip(losses, counts, strict=True) if count]

    def _forward(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], loss_function: Loss
    ) -> tuple[list[tuple], list[Tensor], list[Tensor]]:
        """What went in and came out of each unit; the losses, and their gradients of the output."""
        kept = []
        xs = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        for unit, following in _with_next(self.units):
            with self._whole(unit, following):
                outs = [unit.forward(rank, x) for rank, x in enumerate(xs)]
            kept.append((xs, outs))
            # Cut autograd's graph, so that backward comes to one unit at a time as well.
            xs = [out.detach().requires_grad_() for out in outs]
        batch_size = sum(len(y) for y in targets)
        losses = [
            loss_function(x.to(self.master_dtype), y) * (len(y) / batch_size)
            for x, y in zip(xs, targets, strict=True)
        ]
        for loss in losses:
            loss.backward()
        return kept, [loss.detach() for loss in losses], [x.grad for x in xs]

    def _backward(self, kept: list[tuple], grad_outputs: list[Tensor]) -> None:
        for unit, following in _with_next(self.units[::-1]):
            xs, outs = kept.pop()
            with self._whole(unit, following):
                for out, grad_output in zip(outs, grad_outputs, strict=True):
                    out.backward(grad_output)
            grad_outputs = [x.grad for x in xs]
            unit.gradients = self._sum(unit.take_gradients())

    def _sum(self, gradients: list[Tensor]) -> list[Tensor]:
        """Sum over the devices, while they compute, and keep of it what the stage says."""
        with self._sides.beside(gradients):
            if self.stage == 0:
                ring_all_reduce(gradients)
                return gradients
            parts = reduce_scatter(gradients)  # views: they keep the memory of the whole
            return parts if self.stage == 1 else [part.clone() for part in parts]

    def _step(self) -> None:
        self._sides.join()
        for unit in self.units:
            state = zip(unit.masters, unit.optimizers, unit.gradients, strict=True)
            for master, optimizer, gradient in state:
                master.grad = gradient.to(self.master_dtype)
                optimizer.step()
                master.grad = None
            self._renew_parameters(unit)

    def _renew_parameters(self, unit: _Unit) -> None:
        """Round the master weights to parameters, and put them where the stage has them."""
        # If both are in one dtype, they are the same memory.
        shards = [master.to(self.dtype) for master in unit.masters]
        if self.stage == 0:
            unit.set_rows(shards)
        elif self.stage == 3:
            unit.shards = shards
        else:
            unit.drop_rows()  # before there are new ones
            self._gather(unit, shards)

    def _gather(self, unit: _Unit, shards: list[Tensor]) -> None:
        """Put all shards on every device, while the devices compute.

        It waits for all that the devices were given so far. So a unit is fetched when the one
        before the present one is done and has left its memory: at most two are there at a time,
        however far ahead the host is.
        """
        with self._sides.beside(shards):
            unit.set_rows(all_gather(shards))
        unit.arrived = self._sides.record_events()

    @contextmanager
    def _whole(self, unit: _Unit, following: _Unit | None) -> Iterator[None]:
        """Have all parameters of ``unit`` on every device, during the block at least."""
        if self.stage == 3 and not len(unit.rows[0]):
            self._gather(unit, unit.shards)
        if self.stage == 3 and self.prefetch and following:
            self._gather(following, following.shards)
        for device, arrived in zip(self.devices, unit.arrived, strict=True):
            arrived.wait(current_stream(device))
        yield
        if self.stage == 3:
            unit.drop_rows()

    def to_model(self) -> nn.Sequential:
        """The whole model, on the host, in the precision of the master weights."""
        model = copy.deepcopy(self._empty_model).to_empty(device="cpu")
        for unit, layers in zip(self.units, _split(model), strict=True):
            parts = unit.masters if self.stage else unit.masters[:1]
            vector_to_parameters(torch.cat([part.cpu() for part in parts]), layers.parameters())
        return model


class _Unit:
    """Layers whose parameters come and go together, and what each device has of them.

    Attributes:
        rows: all parameters one after the other, and zeros, so that N divides the length; of
            length 0 while they are not there.
        arrived: the moment at which the row is there.
        shards: at stage 3, the device's part of the row.
        masters, optimizers: that part (at stage 0 the row) in full precision, and what changes it.
        gradients: those of that part, from backward until the next step begins.
    """

    def __init__(
        self, layers: nn.Sequential, devices: Sequence[torch.device], dtype: torch.dtype
    ) -> None:
        self.layers = layers
        self.rows = [torch.empty(0, dtype=dtype, device=d, requires_grad=True) for d in devices]
        self.arrived = [event(device) for device in devices]
        self.shards: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.gradients: list[Tensor] = []

    def set_rows(self, values: list[Tensor]) -> None:
        for row, value in zip(self.rows, values, strict=True):
            row.data = value  # to autograd it stays the same tensor

    def drop_rows(self) -> None:
        self.set_rows([row.new_empty(0) for row in self.rows])

    def take_gradients(self) -> list[Tensor]:
        gradients = [row.grad for row in self.rows]
        for row in self.rows:
            row.grad = None
        return gradients

    def forward(self, rank: int, x: Tensor) -> Tensor:
        """Apply the layers on one device, with pieces of its row for their parameters.

        Autograd keeps what backward will need, and would keep it in memory. Of a parameter it gets
        to keep its place in the row, which may be dropped, and be there again for backward.
        """
        row = self.rows[rank]
        names, shapes = zip(*[(n, p.shape) for n, p in self.layers.named_parameters()], strict=True)
        sizes = [shape.numel() for shape in shapes]
        *pieces, _ = row.split([*sizes, len(row) - sum(sizes)])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

        def keep(tensor: Tensor) -> Tensor | tuple:
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            return place if tensor._base is row else tensor

        def find(kept: Tensor | tuple) -> Tensor:
            return row.detach().as_strided(*kept) if isinstance(kept, tuple) else kept

        with saved_tensors_hooks(keep, find):
            return torch.func.functional_call(self.layers, dict(zip(names, views, strict=True)), x)


def _split(model: nn.Sequential) -> list[nn.Sequential]:
    """One piece for each layer with parameters, and the layers without that follow it."""
    pieces: list[list[nn.Module]] = [[]]
    for layer in model:
        if list(layer.parameters()) and list(nn.ModuleList(pieces[-1]).parameters()):
            pieces.append([])
        pieces[-1].append(layer)
    return [nn.Sequential(*piece) for piece in pieces]


def _with_next(units: list[_Unit]) -> Iterator[tuple[_Unit, _Unit | None]]:
    return zip(units, [*units[1:], None], strict=True)


def _check(
    model: nn.Module, devices: Sequence[torch.device], stage: int, dtype: torch.dtype
) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    dtypes = torch.bfloat16, torch.float32, torch.float64
    for is_wrong, what in (
        (not isinstance(model, nn.Sequential), f"the model is an nn.Sequential, not {type(model)}"),
        (stage not in (0, 1, 2, 3), f"stage is 0 (nothing is sharded), 1, 2 or 3, not {stage!r}"),
        (not devices, "there is no device"),
        (dtype not in dtypes, f"dtype is one of {dtypes}, not {dtype}"),
        (not parameters, "the model has no parameters"),
        (frozen, f"these parameters are frozen, and a row is trained as one: {frozen}"),
        (buffers, f"these buffers would differ from device to device: {buffers}"),
        (
            len(set(parameters.values())) < len(parameters),
            "two layers share a parameter: build the model untied, as in GPT(..., tied=False)",
        ),
    ):
        if is_wrong:
            raise ValueError(f"Sharded cannot do this: {what}")


def bytes_a_parameter(stage: int, device_count: int) -> float:
    """Bytes of parameters, gradients and optimizer state on each device, in mixed precision."""
    n = device_count
    return (16.0, 4 + 12 / n, 2 + 14 / n, 16 / n)[stage]
