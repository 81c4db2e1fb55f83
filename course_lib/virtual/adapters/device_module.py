"""``torch.vgpu``: what a program asks of a kind of device, under the names of ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from course_lib.virtual import streams
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.streams import Stream
from course_lib.virtual.tensor import device_of, index_of


class _KnowsStreams(type):
    """The clock makes streams; ``isinstance(x, torch.vgpu.Stream)`` is true for each of them."""

    def __instancecheck__(cls, other: Any) -> bool:
        return isinstance(other, streams.Stream)


class NewStream(metaclass=_KnowsStreams):
    """``torch.vgpu.Stream(device)``: one more stream; ``priority`` changes nothing here."""

    def __new__(cls, device: Any = None, priority: int = 0) -> Any:
        return machine.clock.new_stream(_index(device))


class CurrentEvent(streams.Event):
    """``torch.vgpu.Event()``: it is recorded, and waited for, on the stream that is current then.

    Args:
        enable_timing: whether :meth:`elapsed_time` may be asked.
        blocking, interprocess: taken for the sake of CUDA's programs, and of no effect.
        device: whose current stream that is; the current device's unless told.
    """

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        device: Any = None,
    ) -> None:
        self._device = device
        super().__init__(self._current())
        self.enable_timing = enable_timing

    def _current(self) -> Stream:
        return machine.clock.current[_index(self._device)]

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or self._current()
        super().record(self._stream)

    def wait(self, stream: Stream | None = None) -> None:
        super().wait(stream or self._current())

    def elapsed_time(self, end: streams.Event) -> float:
        if not (self.enable_timing and getattr(end, "enable_timing", True)):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return super().elapsed_time(end)


class DeviceProperties(NamedTuple):
    """What ``get_device_properties`` tells of a virtual GPU; memory in bytes."""

    name: str
    total_memory: int


class DeviceModule:
    """What ``torch.vgpu`` is."""

    _initialized = True
    Stream = NewStream
    Event = CurrentEvent
    OutOfMemoryError = torch.OutOfMemoryError

    def init(self) -> None:
        """Nothing is to be done."""

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

    def current_stream(self, device: Any = None) -> streams.Stream:
        return machine.clock.current[_index(device)]

    def default_stream(self, device: Any = None) -> streams.Stream:
        return machine.clock.streams[_index(device)][0]

    def set_stream(self, stream: streams.Stream) -> None:
        if not isinstance(stream, streams.Stream):
            raise TypeError(
                f"a stream of a virtual GPU comes from course_lib.side_stream(device): {stream!r}"
            )
        stream.__enter__()  # and nothing leaves it

    def stream(self, stream: streams.Stream | None) -> AbstractContextManager:
        """Work inside of the block is enqueued on ``stream``; ``None`` changes nothing."""
        if stream is None:
            return nullcontext()
        if not isinstance(stream, streams.Stream):
            raise TypeError(
                f"torch.{DEVICE_TYPE}.stream takes a stream, as torch.{DEVICE_TYPE}.Stream() makes "
                f"it, and not {stream!r}"
            )
        return stream

    def device_of(self, tensor: Any) -> AbstractContextManager:
        """The device of ``tensor`` is the current one inside of the block, if it is on one."""
        is_here = isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE_TYPE
        return self.device(tensor.device) if is_here else nullcontext()

    def can_device_access_peer(self, device: Any, peer_device: Any) -> bool:
        return _index(device) != _index(peer_device)

    def get_device_properties(self, device: Any = None) -> DeviceProperties:
        name, memory = self.get_device_name(device), machine.memories[_index(device)]
        return DeviceProperties(name, int(memory.capacity))

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Bytes in use and their peak, under the names of CUDA's; nothing else is counted."""
        memory = machine.memories[_index(device)]
        return {
            f"{kind}_bytes.all.{name}": nbytes
            for kind in ("allocated", "reserved")
            for name, nbytes in (("current", memory.in_use), ("peak", memory.peak))
        }

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        memory = machine.memories[_index(device)]
        rows = {"in use": memory.in_use, "peak": memory.peak, "capacity": memory.capacity}
        lines = [f"{name:8} {format_bytes(nbytes):>10}" for name, nbytes in rows.items()]
        return "\n".join([f"memory of {device_of(_index(device))}", *lines])

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

    @property
    def default_generators(self) -> tuple[torch.Generator, ...]:
        return tuple(machine.generators[: machine.device_count])

    def manual_seed(self, seed: int) -> None:
        machine.generators[machine.clock.current_device].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in machine.generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return machine.generators[_index(device)].get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        machine.generators[_index(device)].set_state(new_state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state(index) for index in range(machine.device_count)]

    def set_rng_state_all(self, new_states: list[torch.Tensor]) -> None:
        for index, state in enumerate(new_states):
            self.set_rng_state(state, index)

    def initial_seed(self) -> int:
        return machine.generators[_index(None)].initial_seed()

    def seed(self) -> None:
        """Seed the current device by chance."""
        machine.generators[_index(None)].seed()

    def seed_all(self) -> None:
        """Seed all devices by chance, and all alike."""
        self.seed()
        self.manual_seed_all(self.initial_seed())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def __getattr__(self, name: str) -> Any:
        """Asked for what is nowhere else; ``hasattr`` takes the error for a no."""
        of_cuda = f", as torch.cuda.{name} would be" if hasattr(torch.cuda, name) else ""
        raise AttributeError(f"there is no torch.{DEVICE_TYPE}.{name} for virtual GPUs{of_cuda}")


def _index(device: Any) -> int:
    """A device given as ``"vgpu:1"``, as a ``torch.device``, as ``1`` or not at all."""
    if device is None:
        return machine.clock.current_device
    return index_of(
        torch.device(DEVICE_TYPE, device) if isinstance(device, int) else torch.device(device)
    )
