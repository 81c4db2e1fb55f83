"""Which GPUs to use, real or virtual. Nothing above this module needs to know which they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from course_lib.virtual.machine import DEVICE_TYPE, MAX_DEVICES, machine
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.spec import CLASSROOM, Spec

ENVIRONMENT_VARIABLE = "COURSE_DEVICES"


def devices(count: int, spec: Spec | None = None) -> list[torch.device]:
    """Get ``count`` GPUs: real ones if the machine has that many, otherwise virtual ones.

    The environment variable ``COURSE_DEVICES`` set to ``virtual`` or ``cuda`` forces either.
    Prints one line that says what they are. Calling it again sets the simulated clock to zero.

    Args:
        count: how many GPUs.
        spec: what a virtual GPU can do, :data:`course_lib.CLASSROOM` (``A100 / 1000``) if not
            given. Real GPUs are what they are.

    Raises:
        ValueError: ``count`` is not a whole number from 1 to 1024.
        RuntimeError: ``COURSE_DEVICES=cuda`` on a machine with fewer GPUs than that.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"devices(count) takes a whole number from 1 to {MAX_DEVICES}: {count!r}")
    if spec is not None and not isinstance(spec, Spec):
        raise TypeError(f"devices(count, spec) takes a Spec, such as A100 / 1000: {spec!r}")
    if machine.clock.listeners:
        raise RuntimeError("devices() sets the clock to zero: call it before trace(), not inside")
    real_count = torch.cuda.device_count()
    if _wants_real(count, real_count):
        name = torch.cuda.get_device_name(0)
        print(
            f"{_plural(count, 'real GPU')}: {_range('cuda', count)} ({name}). Times are measured."
        )
        return [torch.device("cuda", index) for index in range(count)]

    # Registering the device type changes PyTorch, so it waits until someone needs it.
    from course_lib.virtual import backend

    spec = spec or CLASSROOM
    backend.register()
    machine.configure(spec, count)
    print(
        f"{_plural(count, 'virtual GPU')}: {_range(DEVICE_TYPE, count)}, each like an {spec.name} "
        f"with {format_bytes(spec.memory)} of memory. Times are simulated."
    )
    return [torch.device(DEVICE_TYPE, index) for index in range(count)]


@contextmanager
def other_devices(count: int, spec: Spec | None = None) -> Iterator[list[torch.device]]:
    """Virtual devices for a measurement that must not disturb the program's own.

    They are fresh, with empty memories and a clock at zero, and gone after the block. Exercises
    and explorers use them on machines with real GPUs too: what they are held to is simulated.
    """
    from course_lib.virtual import backend

    backend.register()
    with machine.replaced(spec or CLASSROOM, count):
        yield [torch.device(DEVICE_TYPE, index) for index in range(count)]


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


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _range(kind: str, count: int) -> str:
    return f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def is_virtual(device: torch.device) -> bool:
    """Whether ``device`` is a virtual GPU."""
    return device.type == DEVICE_TYPE


def synchronize() -> None:
    """Make the host wait until every GPU has done all its work."""
    machine.synchronize()
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def host_seconds() -> float:
    """What the host's clock says: simulated when the GPUs are virtual, measured otherwise."""
    return machine.clock.host if machine.device_count else time.perf_counter()


def memory_in_use(device: torch.device) -> int:
    """Bytes that tensors on ``device`` hold at this moment."""
    return torch.get_device_module(device).memory_allocated(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use on ``device`` since the last :func:`reset_peak_memory`."""
    return torch.get_device_module(device).max_memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring :func:`peak_memory` anew, from what is in use now."""
    torch.get_device_module(device).reset_peak_memory_stats(device)


def memory_capacity(device: torch.device) -> int:
    """Bytes of memory that ``device`` has."""
    if is_virtual(device):
        return int(machine.spec.memory)
    return torch.cuda.get_device_properties(device).total_memory
