"""Which GPUs to use, real or virtual. Nothing above this module needs to know which they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from course_lib import tracebacks
from course_lib.virtual import streams as virtual_streams
from course_lib.virtual.adapters import loading
from course_lib.virtual.machine import DEVICE_TYPE, MAX_DEVICES, machine
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.spec import CLASSROOM, Spec

loading.prepare()  # a file that was saved on a virtual GPU can be met before devices() is called


class Event(Protocol):
    """What a ``torch.cuda.Event`` and a virtual one have in common."""

    def record(self, stream: Any = None, /) -> None: ...
    def wait(self, stream: Any = None, /) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any, /) -> float: ...


class Stream(Protocol):
    """What a ``torch.cuda.Stream`` and a virtual one have in common.

    Each takes streams and events of its own kind alone, which is more than a type can say here.
    """

    @property
    def device(self) -> torch.device: ...
    def wait_stream(self, other: Any, /) -> None: ...
    def wait_event(self, event: Any, /) -> None: ...
    def record_event(self, event: Any = None, /) -> Event: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...


ENVIRONMENT_VARIABLE = "COURSE_DEVICES"

# The real GPUs that devices() gave last; empty when it gave virtual ones.
real_devices: list[torch.device] = []


def devices(
    count: int, spec: Spec | None = None, backing: str | None = None, nodes: int = 1
) -> list[torch.device]:
    """Get ``count`` GPUs: real ones if the machine has that many, otherwise virtual ones.

    The environment variable ``COURSE_DEVICES`` set to ``virtual`` or ``cuda`` forces either.
    Prints one line that says what they are. Calling it again sets the simulated clock to zero.

    Args:
        count: how many GPUs.
        spec: what a virtual GPU can do, :data:`course_lib.CLASSROOM` (``A100 / 1000``) if not
            given. Real GPUs are what they are.
        backing: asks for virtual GPUs, and says where their numbers are: ``"cpu"`` (what they
            have if nothing is said), ``"meta"`` (nowhere: shapes, memory and time alone, for
            models of any size) or ``"cuda:0"`` (on a real GPU, which they share).
        nodes: asks for virtual GPUs if it is above 1, and says in how many machines they stand:
            the first ones in node 0, as many in node 1, and so on. ``spec.network`` joins them.

    Raises:
        ValueError: ``count`` is not a whole number from 1 to 128, or no multiple of ``nodes``.
        RuntimeError: ``COURSE_DEVICES=cuda`` on a machine with fewer GPUs than that, or a
            ``backing`` that this machine does not have.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"devices(count) takes a whole number from 1 to {MAX_DEVICES}: {count!r}")
    if spec is not None and not isinstance(spec, Spec):
        raise TypeError(f"devices(count, spec) takes a Spec, such as A100 / 1000: {spec!r}")
    if machine.clock.listeners:
        raise RuntimeError("devices() sets the clock to zero: call it before trace(), not inside")
    real_count = torch.cuda.device_count()
    tracebacks.install()
    real_devices.clear()
    if backing is None and nodes == 1 and _wants_real(count, real_count):
        machine.configure(CLASSROOM, 0)
        name = torch.cuda.get_device_name(0)
        print(
            f"{_plural(count, 'real GPU')}: {_range('cuda', count)} ({name}). Times are measured."
        )
        real_devices.extend(torch.device("cuda", index) for index in range(count))
        return list(real_devices)

    # Registering the device type changes PyTorch, so it waits until someone needs it.
    from course_lib.virtual import backend

    spec = spec or CLASSROOM
    backing = backing or "cpu"
    _check_backing(backing, real_count)
    backend.register()
    machine.configure(spec, count, backing, nodes)
    numbers = {"cpu": "", "meta": " They hold no numbers."}.get(
        backing, f" Their numbers are on {backing}."
    )
    places = f" in {nodes} nodes, joined by {spec.network.name}" if nodes > 1 else ""
    print(
        f"{_plural(count, 'virtual GPU')}{places}: {_range(DEVICE_TYPE, count)}, each like an "
        f"{spec.name} with {format_bytes(spec.memory)} of memory. Times are simulated.{numbers}"
    )
    return [torch.device(DEVICE_TYPE, index) for index in range(count)]


@contextmanager
def fresh_devices(
    count: int, spec: Spec | None = None, backing: str = "cpu", nodes: int = 1
) -> Iterator[list[torch.device]]:
    """Virtual devices for a measurement that must not disturb the program's own.

    They are fresh, with empty memories and a clock at zero, and gone after the block; the random
    numbers that the block draws are not missed afterwards. What was made outside of the block
    (tensors, streams, events) is refused inside, and the other way round. Exercises and explorers
    use them on machines with real GPUs too: what they are held to is simulated.
    """
    from course_lib.virtual import backend

    backend.register()
    other = machine.replaced(spec or CLASSROOM, count, backing, nodes)
    with torch.random.fork_rng(devices=[]), other:
        yield [torch.device(DEVICE_TYPE, index) for index in range(count)]


def _check_backing(backing: str, real_count: int) -> None:
    known = ["cpu", "meta", *(f"cuda:{index}" for index in range(real_count))]
    if backing not in known:
        raise RuntimeError(f"backing={backing!r} is not on this machine; it has {known}")


def _wants_real(count: int, real_count: int) -> bool:
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if choice not in ("", "virtual", "cuda"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 'virtual' or 'cuda', not {choice!r}")
    if choice == "cuda" and real_count < count:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}=cuda asks for real GPUs, and this machine has {real_count} "
            f"of the {count} wanted: unset it to use virtual ones"
        )
    return choice != "virtual" and real_count >= count


def real_gpus(count: int) -> list[torch.device]:
    """``count`` real GPUs, if :func:`devices` would give real ones for that many; else none.

    Raises:
        RuntimeError: ``COURSE_DEVICES=cuda`` on a machine with fewer GPUs than that.
    """
    if not _wants_real(count, torch.cuda.device_count()):
        return []
    return [torch.device("cuda", index) for index in range(count)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _range(kind: str, count: int) -> str:
    return f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def is_virtual(device: torch.device | str) -> bool:
    """Whether ``device`` is a virtual GPU, or the name of one."""
    if isinstance(device, str):  # PyTorch does not know the name before devices() was called
        return device.partition(":")[0] == DEVICE_TYPE
    if not isinstance(device, torch.device):
        raise TypeError(f"a device is a torch.device or its name, such as 'cuda:0': {device!r}")
    return device.type == DEVICE_TYPE


def _existing(device: torch.device | str) -> torch.device:
    """``device`` with its index.

    Raises:
        RuntimeError: it is no GPU, or not there.
    """
    if is_virtual(device):
        if isinstance(device, str):
            machine.check_index(0)
            device = torch.device(device)
        index = machine.clock.current_device if device.index is None else device.index
        machine.check_index(index)
        return torch.device(DEVICE_TYPE, index)
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"this is for GPUs, real or virtual, and not for {str(device)!r}")
    count = torch.cuda.device_count()
    index = device.index
    if index is None and count:
        index = torch.cuda.current_device()
    if index is None or index >= count:
        raise RuntimeError(
            f"{device} does not exist: this machine has {count} real GPU{'' if count == 1 else 's'}"
        )
    return torch.device("cuda", index)


def node_of(device: torch.device | str) -> int:
    """The node that ``device`` stands in, from 0. Real GPUs are those of one machine: 0."""
    gpu = _existing(device)
    return machine.clock.nodes.node_of(gpu.index) if is_virtual(gpu) else 0


def holds_numbers(device: torch.device) -> bool:
    """Whether tensors on ``device`` have numbers, and not only a shape."""
    return device.type != "meta" and not (is_virtual(device) and machine.backing.type == "meta")


def stream(device: torch.device | str) -> Stream:
    """A new side stream of ``device``: ``with course_lib.stream(gpu):`` enqueues work there.

    Work on different streams of a device runs at the same time if the device can do both (a copy
    beside a product), and in no order, until one stream waits for the other. A copy between two
    devices is enqueued on the current streams of both. On a real GPU it is a
    ``torch.cuda.Stream``; a virtual one has the same methods.
    """
    gpu = _existing(device)
    return machine.clock.new_stream(gpu.index) if is_virtual(gpu) else torch.cuda.Stream(gpu)


def current_stream(device: torch.device | str) -> Stream:
    """The stream of ``device`` that work is enqueued on: the default one, outside of any block."""
    gpu = _existing(device)
    if is_virtual(gpu):
        return machine.clock.current[gpu.index]
    return torch.cuda.current_stream(gpu)


def event(device: torch.device | str) -> Event:
    """A new event, to ``record`` on a stream of ``device`` and to ``wait`` for on any stream.

    On a real GPU it is a ``torch.cuda.Event`` that keeps the time.
    """
    gpu = _existing(device)
    if is_virtual(gpu):
        return virtual_streams.Event(machine.clock.streams[gpu.index][0])
    return torch.cuda.Event(enable_timing=True)


def synchronize() -> None:
    """Make the host wait until every GPU has done all its work."""
    machine.synchronize()
    for gpu in real_devices:
        torch.cuda.synchronize(gpu)


def host_seconds() -> float:
    """What the host's clock says: simulated when the GPUs are virtual, measured otherwise."""
    return machine.clock.host if machine.device_count else time.perf_counter()


def memory_in_use(device: torch.device | str) -> int:
    """Bytes that tensors on ``device`` hold at this moment."""
    gpu = _existing(device)
    return torch.get_device_module(gpu).memory_allocated(gpu)


def peak_memory(device: torch.device | str) -> int:
    """The most bytes in use on ``device`` since the last :func:`reset_peak_memory`."""
    gpu = _existing(device)
    return torch.get_device_module(gpu).max_memory_allocated(gpu)


def reset_peak_memory(device: torch.device | str) -> None:
    """Start measuring :func:`peak_memory` anew, from what is in use now."""
    gpu = _existing(device)
    torch.get_device_module(gpu).reset_peak_memory_stats(gpu)


def memory_capacity(device: torch.device | str) -> int:
    """Bytes of memory that ``device`` has."""
    gpu = _existing(device)
    if is_virtual(gpu):
        return int(machine.spec.memory)
    return torch.cuda.get_device_properties(gpu).total_memory
