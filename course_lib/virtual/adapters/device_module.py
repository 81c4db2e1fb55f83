"""``torch.vgpu``: what a program asks of a kind of device, under the names of ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.streams import Stream
from course_lib.virtual.tensor import index_of


class DeviceModule:
    """What ``torch.vgpu`` is."""

    _initialized = True

    def is_available(self) -> bool:
        return machine.device_count > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return machine.device_count

    def current_device(self) -> int:
        return machine.clock.current_device

    def set_device(self, device: Any) -> None:
        machine.clock.current_device = _index(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        clock = machine.clock
        outer, clock.current_device = clock.current_device, _index(device)
        try:
            yield
        finally:
            clock.current_device = outer

    def synchronize(self, device: Any = None) -> None:
        if device is None:
            machine.synchronize()
        else:
            machine.clock.synchronize(_index(device))

    def current_stream(self, device: Any = None) -> Stream:
        return machine.clock.current[_index(device)]

    def default_stream(self, device: Any = None) -> Stream:
        return machine.clock.streams[_index(device)][0]

    def set_stream(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(
                f"a stream of a virtual GPU comes from course_lib.stream(device): {stream!r}"
            )
        stream.__enter__()  # and nothing leaves it

    def memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].in_use

    def max_memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        machine.memories[_index(device)].reset_peak()

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)  # nothing is cached

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated(device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = machine.memories[_index(device)]
        return int(memory.free), int(memory.capacity)

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_device_name(self, device: Any = None) -> str:
        return f"virtual {machine.spec.name} {_index(device)}"

    def manual_seed(self, seed: int) -> None:
        machine.generators[machine.clock.current_device].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in machine.generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return machine.generators[_index(device)].get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        machine.generators[_index(device)].set_state(new_state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _index(device: Any) -> int:
    """A device given as ``"vgpu:1"``, as a ``torch.device``, as ``1`` or not at all."""
    if device is None:
        return machine.clock.current_device
    return index_of(
        torch.device(DEVICE_TYPE, device) if isinstance(device, int) else torch.device(device)
    )
