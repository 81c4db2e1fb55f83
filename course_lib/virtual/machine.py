"""The simulated computer: some GPUs of one kind, their memories, their clock, their dice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from course_lib.virtual.clock import Clock
from course_lib.virtual.memory import Memory
from course_lib.virtual.spec import CLASSROOM, DEVICE_TYPE, Spec

MAX_DEVICES = 1024


class Machine:
    """All the state that the virtual GPUs have. There is one of it, :data:`machine`."""

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.generators: list[torch.Generator] = []
        self.clock = Clock(CLASSROOM, 0)
        self.configure(CLASSROOM, 0)

    def configure(self, spec: Spec, device_count: int, backing: str = "cpu") -> None:
        """Put ``device_count`` GPUs of kind ``spec`` into the machine, and set its clock to zero.

        Tensors that live on a device stay there and keep their bytes.

        Args:
            backing: where the numbers are: ``"cpu"``, ``"cuda:0"`` (on a real GPU) or ``"meta"``
                (there are none: shapes, memory and time alone).
        """
        self.spec = spec
        self.device_count = device_count
        self.backing = torch.device(backing)
        for index in range(len(self.memories), device_count):
            self.memories.append(Memory(f"{DEVICE_TYPE}:{index}", spec.memory))
            # As if torch.manual_seed had been called after this device came to be.
            self.generators.append(torch.Generator().manual_seed(torch.initial_seed()))
        for memory in self.memories:
            memory.capacity = spec.memory
        self.clock.ended = True
        # Devices that are gone keep a place, for the tensors that are still there.
        self.clock = Clock(spec, len(self.memories))

    @contextmanager
    def replaced(self, spec: Spec, device_count: int, backing: str = "cpu") -> Iterator[None]:
        """Put other GPUs in the machine for a while, with empty memories and a clock at zero.

        Afterwards everything is as it was. Tensors made before must not be used meanwhile.
        """
        before = dict(self.__dict__)
        self.__init__()
        self.configure(spec, device_count, backing)
        try:
            yield
        finally:
            self.__dict__.update(before)

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
            f"course_lib.devices({index + 1}) gives you more."
        )

    def synchronize(self) -> None:
        """Make the host wait for every device."""
        for index in range(self.device_count):
            self.clock.synchronize(index)


machine = Machine()
