"""The simulated computer: some GPUs of one kind, their memories, their clock, their dice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

from course_lib.virtual.clock import Clock
from course_lib.virtual.memory import Memory
from course_lib.virtual.network import Nodes
from course_lib.virtual.random_states import DeviceGenerator
from course_lib.virtual.spec import CLASSROOM, DEVICE_TYPE, Spec

MAX_DEVICES = 128  # PyTorch keeps a device's index in 8 bits, and -1 means none


class State:
    """All that the virtual GPUs of one machine are and hold at this moment.

    Attributes:
        number: unlike that of any other machine; what is made here carries it.
        spec: what each of its GPUs can do.
        device_count: how many there are.
        backing: where their numbers are.
        has_no_numbers: whether they are nowhere.
        memories: one a device; devices that are gone keep theirs, for the tensors still there.
        generators: one a device, of random numbers.
        clock: the time, the streams, and who listens.
    """

    def __init__(self, spec: Spec, device_count: int, backing: str = "cpu", nodes: int = 1) -> None:
        self.number = next(_numbers)
        self.backing = torch.device(backing)
        self.has_no_numbers = self.backing.type == "meta"
        self.memories: list[Memory] = []
        self.generators: list[DeviceGenerator] = []
        self.clock = Clock(spec, 0, Nodes.of(0, 1, spec.network))
        self.set_up(spec, device_count, nodes)

    def set_up(self, spec: Spec, device_count: int, nodes: int) -> None:
        """Have ``device_count`` GPUs of kind ``spec`` in so many nodes, a clock at zero and no peak
        but what is in use. Tensors that live on a device stay there and keep their bytes."""
        joined = Nodes.of(device_count, nodes, spec.network)
        self.spec = spec
        self.device_count = device_count
        for index in range(len(self.memories), device_count):
            device = torch.device(DEVICE_TYPE, index)
            self.memories.append(Memory(device, spec.memory, self.number))
            # As if torch.manual_seed had been called after this device came to be.
            generator = DeviceGenerator(device, self.backing)
            self.generators.append(generator.manual_seed(torch.initial_seed()))
        for memory in self.memories:
            memory.capacity = spec.memory
            memory.reset_peak()
        self.clock.end()
        self.clock = Clock(spec, len(self.memories), joined)


_numbers = count()


class Machine(State):
    """The state in use. There is one machine, :data:`machine`, and its state is swapped whole."""

    def __init__(self) -> None:
        super().__init__(CLASSROOM, 0)

    def configure(
        self, spec: Spec, device_count: int, backing: str = "cpu", nodes: int = 1
    ) -> None:
        """Put ``device_count`` GPUs of kind ``spec`` into the machine, and set its clock to zero.

        Tensors that live on a device stay there and keep their bytes. If the numbers are to be
        elsewhere, they are of another machine than this one and can no longer be used.

        Args:
            backing: where the numbers are: ``"cpu"``, ``"cuda:0"`` (on a real GPU) or ``"meta"``
                (there are none: shapes, memory and time alone).
            nodes: how many machines the GPUs stand in.

        Raises:
            ValueError: they do not divide among the nodes.
        """
        self._check_not_in_a_rank()
        if torch.device(backing) == self.backing:
            self.set_up(spec, device_count, nodes)
        else:
            self._swap(vars(State(spec, device_count, backing, nodes)))

    @contextmanager
    def replaced(
        self, spec: Spec, device_count: int, backing: str = "cpu", nodes: int = 1
    ) -> Iterator[None]:
        """Put other GPUs in the machine for a while, with empty memories and a clock at zero.

        Afterwards everything is as it was. Tensors, streams and events made on either side are
        refused on the other.
        """
        self._check_not_in_a_rank()
        before = self._swap(vars(State(spec, device_count, backing, nodes)))
        try:
            yield
        finally:
            self._swap(before)

    def _check_not_in_a_rank(self) -> None:
        if self.clock.own_device is not None:
            raise RuntimeError(
                "a rank has the GPUs that ranks.run() was given, and cannot ask for others: call "
                "devices() before it"
            )

    def _swap(self, state: dict[str, Any]) -> dict[str, Any]:
        """Take on the attributes of another state, and return those that there were."""
        before = self.__dict__
        self.clock.end()
        self.__dict__ = state
        self.clock.in_use = True
        return before

    def check_made_here(self, memory: Memory) -> None:
        """Raise a clear error if ``memory`` is of other virtual GPUs than those there are now."""
        if memory.machine_number != self.number:
            raise RuntimeError(
                f"this tensor on {memory.device} is of other virtual GPUs than there are now: it "
                "was made outside of this fresh_devices() block, or inside of one that has "
                "ended, or before devices() with another backing=. Hand over its .cpu() instead."
            )

    def standard_generator(self) -> torch.Generator:
        """The generator that operators use when they are given none."""
        if self.backing.type == "cuda":
            return torch.cuda.default_generators[self.backing.index]
        return torch.default_generator

    def check_index(self, index: int) -> None:
        """Raise a clear error when there is no device of that index."""
        if 0 <= index < self.device_count:
            return
        if self.device_count == 0:
            raise RuntimeError("there are no virtual GPUs yet: call course_lib.devices(4) first")
        last = f"{DEVICE_TYPE}:{self.device_count - 1}"
        raise RuntimeError(
            f"{DEVICE_TYPE}:{index} does not exist: this machine has {self.device_count} virtual "
            f"GPU{'s' if self.device_count > 1 else ''}, the last of them {last}. "
            f"course_lib.devices(count) gives you up to {MAX_DEVICES}."
        )

    def synchronize(self) -> None:
        """Make the host wait for every device that the running process works with."""
        own = self.clock.own_device
        for index in range(self.device_count) if own is None else [own]:
            self.clock.synchronize(index)


machine = Machine()
