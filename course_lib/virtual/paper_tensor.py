"""What a program holds of a machine on paper: GPUs, streams, and tensors that are a size alone.

They have the methods of PyTorch's that collectives call, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from course_lib.virtual.tasks import Engine

if TYPE_CHECKING:
    from course_lib.virtual.paper import PaperMachine


class _Sketch:
    """Says in one line what it does not have."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            has = ", ".join(each for each in dir(type(self)) if not each.startswith("_"))
            raise AttributeError(
                f"{name!r} is nothing that a {type(self).__name__} has: on paper collectives can "
                f"be played, and they find {has}"
            )
        raise AttributeError(name)


class PaperDevice(_Sketch):
    """A GPU on paper.

    Attributes:
        index: its number in its machine.
        node, card: where it stands, and what it sends through to other nodes.
        sender, receiver, cores: its own parts.
        streams: the default one first.
        current: the stream that work is enqueued on.
        made: how many side streams were asked for.
    """

    __slots__ = (
        *("card", "cores", "current", "index", "machine", "made"),
        *("node", "receiver", "sender", "streams"),
    )

    def __init__(self, machine: PaperMachine, index: int) -> None:
        self.machine, self.index = machine, index
        self.node, self.card = machine.nodes.node_of(index), machine.nodes.card_of(index)
        self.sender, self.receiver, self.cores = Engine(), Engine(), Engine()
        self.current = PaperStream(self, index)
        self.streams = [self.current]
        self.made = 0

    def __repr__(self) -> str:
        return f"paper:{self.index}"


class PaperStream(_Sketch):
    """A queue of work on a GPU on paper.

    Attributes:
        number: of all streams of the machine.
        free_at: simulated seconds at which the next operation can start, if nobody had to wait
            for a link or cores so far.
    """

    __slots__ = ("_outer", "device", "free_at", "number")

    def __init__(self, device: PaperDevice, number: int) -> None:
        self.device, self.number = device, number
        self.free_at = 0.0
        self._outer: list[PaperStream] = []

    def wait_stream(self, other: PaperStream) -> None:
        """Let what is enqueued here from now on start after all that is on ``other`` now."""
        self.device.machine.wait(self, other)

    def __enter__(self) -> PaperStream:
        self._outer.append(self.device.current)
        self.device.current = self
        return self

    def __exit__(self, *error: object) -> None:
        self.device.current = self._outer.pop()


class PaperTensor(_Sketch):
    """A tensor on paper: a device, a shape and a dtype. Parts of one size are one object."""

    __slots__ = ("_numel", "device", "dtype", "nbytes", "shape")

    requires_grad = False

    def __init__(self, device: PaperDevice, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.device, self.shape, self.dtype = device, tuple(shape), dtype
        self._numel = math.prod(self.shape)
        self.nbytes = self._numel * dtype.itemsize

    def numel(self) -> int:
        return self._numel

    def dim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def is_contiguous(self) -> bool:
        return True

    def record_stream(self, stream: PaperStream) -> None:
        """Nothing to keep: there is no memory."""

    def new_empty(self, shape: Sequence[int]) -> PaperTensor:
        return PaperTensor(self.device, shape, self.dtype)

    def view(self, *shape: Any) -> PaperTensor:
        if shape == (-1,) and len(self.shape) == 1:
            return self
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            place = sizes.index(-1)
            sizes[place] = 1
            sizes[place] = self._numel // max(1, math.prod(sizes))
        if math.prod(sizes) != self._numel:
            raise RuntimeError(f"a PaperTensor of {self._numel} numbers has no shape {shape}")
        return self if tuple(sizes) == self.shape else self.new_empty(sizes)

    reshape = view

    def split(self, sizes: Sequence[int]) -> list[PaperTensor]:
        """Parts of so many rows."""
        made = {size: self.new_empty((size, *self.shape[1:])) for size in set(sizes)}
        return [made[size] for size in sizes]

    def tensor_split(self, count: int) -> list[PaperTensor]:
        rows, longer = divmod(self.shape[0], count)
        return self.split([rows + 1] * longer + [rows] * (count - longer))

    def to(self, device: PaperDevice, copy: bool = False) -> PaperTensor:
        if device is self.device and not copy:
            return self
        arrived = PaperTensor.__new__(PaperTensor)  # not measured anew: millions are made
        arrived.device, arrived.shape, arrived.dtype = device, self.shape, self.dtype
        arrived.nbytes, arrived._numel = self.nbytes, self._numel
        return arrived.copy_(self)

    def copy_(self, source: PaperTensor) -> PaperTensor:
        if source.device is self.device:
            self.device.machine.compute(self.device, 2 * self.nbytes)  # read and written
        else:
            self.device.machine.copy(source.device, self.device, self.nbytes)
        return self

    def add_(self, other: PaperTensor) -> PaperTensor:
        if other.device is not self.device:
            raise RuntimeError(f"add_ needs both on one device: {self.device}, {other.device}")
        self.device.machine.compute(self.device, 3 * self.nbytes)  # two read, one written
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> PaperTensor:
        if func is not torch.cat or kwargs or len(args) != 1:
            raise NotImplementedError(
                f"torch.{getattr(func, '__name__', func)} is not on paper: of PyTorch's functions "
                "only torch.cat(tensors) is"
            )
        tensors = args[0]
        first = tensors[0]
        whole = first.new_empty((sum(len(tensor) for tensor in tensors), *first.shape[1:]))
        first.device.machine.compute(first.device, 2 * whole.nbytes)
        return whole

    def __repr__(self) -> str:
        return f"<{list(self.shape)} on {self.device}>"
