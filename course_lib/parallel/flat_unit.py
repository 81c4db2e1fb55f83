"""A unit of sharded training: layers whose parameters are one row of numbers.

The row can be cut into equal shards, gathered and dropped, whatever shapes the parameters have.
FSDP calls it a flat parameter (Zhao and others, "PyTorch FSDP: Experiences on Scaling Fully Sharded
Data Parallel", 2023); FSDP2 shards each parameter along its first dimension instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from course_lib.hardware import event
from course_lib.parallel.kinds import Devices, MakeOptimizer, OptionsOf


class FlatUnit:
    """Layers whose parameters come and go together, and what each device has of them.

    Args:
        layers: on the device "meta": what to compute, without numbers.
        names: of their parameters in the whole model.

    Attributes:
        rows: all parameters one after the other, and zeros, so that N divides the length; of
            length 0 while they are not there.
        arrived: the moment at which the row is there.
        shards: at stage 3, the device's part of the row.
        masters: that part (at stage 0 the row) in full precision, with what changes it.
        gradients: those of that part, from backward until they are dropped.
    """

    def __init__(
        self, layers: nn.Sequential, names: list[str], devices: Devices, dtype: torch.dtype
    ) -> None:
        self.layers, self.names = layers, names
        self.shapes = [parameter.shape for parameter in layers.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.places = [slice(a, b) for a, b in pairwise([0, *accumulate(self.sizes)])]
        self.rows = [torch.empty(0, dtype=dtype, device=d, requires_grad=True) for d in devices]
        self.arrived = [event(device) for device in devices]
        self.shards: list[Tensor] = []
        self.masters: list[Master] = []
        self.gradients: list[Tensor] = []

    def set_rows(self, values: list[Tensor]) -> None:
        for row, value in zip(self.rows, values, strict=True):
            row.data = value  # to autograd it stays the same tensor

    def drop_rows(self) -> None:
        self.set_rows([row.new_empty(0) for row in self.rows])

    def take_gradients(self) -> list[Tensor]:
        gradients = [row.grad for row in self.rows if row.grad is not None]
        for row in self.rows:
            row.grad = None
        return gradients

    def forward(self, rank: int, x: Tensor) -> Tensor:
        """Apply the layers on one device, with pieces of its row for their parameters.

        A layer saves its weight for backward, and autograd would keep it in memory until then: a
        dropped row would not be gone. So, of what the layers save, the hooks below replace each
        piece of the row by its place in it. By the time backward asks for the piece, the row has
        been gathered again, into new memory, and the piece is cut out of that.
        """
        row = self.rows[rank]
        # One split for all: autograd joins its gradients once, where slices would each fill a row.
        *pieces, _ = row.split([*self.sizes, len(row) - sum(self.sizes)])
        names = [name for name, _ in self.layers.named_parameters()]
        views = [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

        # Detached: an output that is kept with its graph would keep itself alive, if backward never
        # comes.
        def keep(tensor: Tensor) -> Tensor | tuple:
            # A transposed weight is a view of the row too: size and stride say which.
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            return place if tensor._base is row else tensor.detach()

        def find(kept: Tensor | tuple) -> Tensor:
            # Detached: what backward computes with the weight needs no graph of its own.
            return row.detach().as_strided(*kept) if isinstance(kept, tuple) else kept

        with saved_tensors_hooks(keep, find):
            return torch.func.functional_call(self.layers, dict(zip(names, views, strict=True)), x)

    def groups(self, options_of: OptionsOf | None) -> list[tuple[slice, dict[str, Any]]]:
        """Stretches of the row whose parameters have the same options; zeros belong to the last.

        Asked of the parameters as the model has them: in a row all have one dimension.
        """
        stretches: list[tuple[slice, dict[str, Any]]] = []
        parameters = zip(self.names, self.layers.parameters(), self.places, strict=True)
        for name, parameter, place in parameters:
            options = options_of(name, parameter) if options_of else {}
            if stretches and stretches[-1][1] == options:
                place = slice(stretches.pop()[0].start, place.stop)
            stretches.append((place, options))
        last, options = stretches[-1]
        return [*stretches[:-1], (slice(last.start, None), options)]

    def by_name(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters, or what there is one number a parameter of, cut out of a row."""
        cut = zip(self.names, self.places, self.shapes, strict=True)
        return {name: row[place].view(shape).clone() for name, place, shape in cut}

    def row_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """The row, zeros included, of one tensor for each of the parameters."""
        row = torch.cat([values[name].detach().flatten() for name in self.names])
        return nn.functional.pad(row, (0, -len(row) % len(self.rows)))


class Master:
    """One device's part of a row in full precision, and the optimizer that changes it.

    Args:
        values: the part.
        start: where in the row it begins.
        groups: stretches of the row, and the options of each.

    Raises:
        ValueError: ``make_optimizer`` sorted the pieces into groups of its own.
    """

    def __init__(
        self,
        values: Tensor,
        start: int,
        groups: Sequence[tuple[slice, dict[str, Any]]],
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.values = values
        self._pieces: list[tuple[slice, Tensor]] = []
        parameter_groups = []
        for stretch, options in groups:
            place = _overlap(stretch, start, len(values))
            if place.start < place.stop:
                piece = values[place]  # a view: what changes it changes the part
                self._pieces.append((place, piece))
                parameter_groups.append({"params": [piece], **options})
        self.optimizer = make_optimizer(parameter_groups)
        made = [group["params"] for group in self.optimizer.param_groups]
        if [len(pieces) for pieces in made] != [1] * len(parameter_groups):
            raise ValueError(
                "make_optimizer made other parameter groups than it was given: in a row all "
                "parameters have one dimension and no name, so sort them by options_of"
            )

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.to(self.values.dtype)
        for place, piece in self._pieces:
            piece.grad = gradient[place]
        self.optimizer.step()
        for _, piece in self._pieces:
            piece.grad = None

    def state(self) -> dict[str, Any]:
        """What the optimizer remembers: tensors like ``values``, and values for all numbers."""
        state: dict[str, Any] = {}
        for place, piece in self._pieces:
            for key, value in self.optimizer.state.get(piece, {}).items():
                if isinstance(value, Tensor) and value.shape == piece.shape:
                    state.setdefault(key, torch.zeros_like(self.values))[place] = value
                else:
                    state[key] = value
        return state

    def load(self, key: str, value: Any) -> None:
        """Put one entry of what :meth:`state` returned, from any device, in its place."""
        for place, piece in self._pieces:
            own = copy.deepcopy(value)
            if isinstance(value, Tensor) and value.dim():
                own = value[place].to(piece.device, copy=True)
            elif isinstance(value, Tensor) and self._counts_on_device():
                own = value.to(piece.device, copy=True)
            self.optimizer.state[piece][key] = own

    def _counts_on_device(self) -> bool:
        """Whether the optimizer keeps the count of its steps where its kernels read it."""
        return any(self.optimizer.defaults.get(name) for name in ("fused", "capturable"))


def _overlap(stretch: slice, start: int, length: int) -> slice:
    """The part of ``stretch`` that is in the ``length`` numbers behind ``start``."""
    stop = length if stretch.stop is None else min(stretch.stop - start, length)
    return slice(max(stretch.start - start, 0), stop)


def split_into_units(model: nn.Sequential) -> list[nn.Sequential]:
    """One piece for each layer with parameters, and the layers without that follow it."""
    pieces: list[list[nn.Module]] = [[]]
    for layer in model:
        if list(layer.parameters()) and list(nn.ModuleList(pieces[-1]).parameters()):
            pieces.append([])
        pieces[-1].append(layer)
    return [nn.Sequential(*piece) for piece in pieces]


def with_next(units: list[FlatUnit]) -> Iterator[tuple[FlatUnit, FlatUnit | None]]:
    return zip(units, [*units[1:], None], strict=True)


def require_shardable(
    model: nn.Module, stage: int, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """Say in one line why ``model`` cannot train as rows of these units, if so.

    Raises:
        ValueError: one of the things below.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    dtypes = torch.bfloat16, torch.float32, torch.float64
    for is_wrong, what in (
        (not isinstance(model, nn.Sequential), f"the model is an nn.Sequential, not {type(model)}"),
        (stage not in (0, 1, 2, 3), f"stage is 0 (nothing is sharded), 1, 2 or 3, not {stage!r}"),
        (dtype not in dtypes, f"dtype is one of {dtypes}, not {dtype}"),
        (reduce_dtype not in dtypes, f"reduce_dtype is one of {dtypes}, not {reduce_dtype}"),
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
