"""Which GPUs to use, real or virtual: ``devices()`` decides, and says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from course_lib import tracebacks
from course_lib.virtual.adapters import loading
from course_lib.virtual.machine import DEVICE_TYPE, MAX_DEVICES, machine
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.spec import CLASSROOM, Spec

loading.prepare()  # a file that was saved on a virtual GPU can be met before devices() is called

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
    _require(count, spec, nodes)
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
        f"{_plural(count, 'virtual GPU')}{places}: {_range(DEVICE_TYPE, count)}, each like "
        f"{_with_article(spec.name)} with {format_bytes(spec.memory)} of memory. "
        f"Times are simulated.{numbers}"
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

    Raises:
        ValueError, TypeError, RuntimeError: what is given cannot be, as in :func:`devices`.
    """
    _require(count, spec, nodes)
    _check_backing(backing, torch.cuda.device_count())
    from course_lib.virtual import backend

    backend.register()
    other = machine.replaced(spec or CLASSROOM, count, backing, nodes)
    with torch.random.fork_rng(devices=[]), other:
        yield [torch.device(DEVICE_TYPE, index) for index in range(count)]


def _require(count: int, spec: Spec | None, nodes: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_DEVICES:
        way = ""
        if isinstance(count, int) and count > MAX_DEVICES:
            joined = f", nodes={nodes}" if nodes != 1 else ""
            way = f"; collectives on more are played on paper, by PaperMachine({count}{joined})"
        raise ValueError(
            f"devices(count) takes a whole number from 1 to {MAX_DEVICES}: {count!r}{way}"
        )
    if spec is not None and not isinstance(spec, Spec):
        raise TypeError(f"devices(count, spec) takes a Spec, such as A100 / 1000: {spec!r}")


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


def _with_article(name: str) -> str:
    """An H100, a GB200: a name that begins with capitals is read letter by letter."""
    vowels = "AEFHILMNORSX" if name[:2].isupper() or name[1:2].isdigit() else "AEIOaeiou"
    return f"an {name}" if name[:1] in vowels else f"a {name}"


def _range(kind: str, count: int) -> str:
    return f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
