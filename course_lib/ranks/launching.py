"""``run``: one function, once a rank, on virtual GPUs or in processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from course_lib import hardware, tracebacks
from course_lib.parallel.inputs import require_devices
from course_lib.ranks import running
from course_lib.ranks.processes.place import Here


def run(
    function: Callable[..., Any],
    gpus: Sequence[torch.device] | None = None,
    *args: Any,
    processes: int | None = None,
    timeout: float | None = None,
) -> list[Any]:
    """Run ``function(*args)`` once a rank, and wait for all.

    With virtual ``gpus``, each rank has one of them, and is a thread of this process. With real
    ones, each rank has one of them, and is a process. ``processes=4`` is four processes on whatever
    the machine has: a GPU for each if there are so many, else the CPU. The first call of a program
    takes some seconds, later ones a fraction of one.

    Each rank has what one started by ``torchrun`` has: ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``
    in its environment, random numbers and groups of its own, its GPU as the current device.
    ``torch.distributed.init_process_group()`` needs no arguments.

    What a rank prints comes when all have ended, rank by rank.

    Args:
        function: may stand in a cell of a notebook.
        processes: how many, instead of ``gpus``.
        timeout: for processes, seconds after which they are stopped, and the error says where each
            one was. Virtual ranks need none: a deadlock is an error at once.

    Returns:
        What each rank returned, in rank order.

    Raises:
        DeadlockError: every virtual rank waits for another.
        MismatchError: ranks take part in different collectives.
        RuntimeError: it is called inside of a rank, a process died, or ``gpus`` are no GPUs.
        TimeoutError: a process has not ended in time.
        TypeError: ``function`` is none, or a generator; ``gpus`` is no list; what a process is to
            run, or has returned, cannot be sent to another.
        ValueError: there are no ranks, or a GPU is there twice.

    What else a rank raises ends the others and is raised here: the error of the rank that failed
    first, with a note that says which.
    """
    if Here.place is not None or running.is_in_a_rank():
        raise RuntimeError("ranks.run() cannot be called inside of a rank: its ranks are all there")
    _check_function(function)
    if (gpus is None) == (processes is None):
        raise ValueError("ranks.run(function, gpus) or ranks.run(function, processes=4)")
    devices = _of_processes(processes) if gpus is None else require_devices(gpus)
    if any(map(hardware.is_virtual, devices)):
        if timeout is not None:
            raise ValueError(
                "a timeout is for processes: a wait in vain on virtual GPUs ends at once"
            )
        return running.run(function, devices, *args)
    if gpus is not None:
        _require_real(devices)
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout > 0):
        raise ValueError(f"a timeout is a number of seconds above zero: {timeout!r}")
    tracebacks.install()
    # Imported here, since virtual ranks need no cloudpickle.
    from course_lib.ranks.processes import calling

    return calling.run(function, devices, args, timeout)


def device() -> torch.device:
    """The device of the rank that asks: its GPU, virtual or real, or the CPU if it has none.

    Raises:
        RuntimeError: no rank asks.
    """
    if Here.place is not None:
        return Here.place.device
    return running.device()


def _check_function(function: Any) -> None:
    if not callable(function):
        raise TypeError(
            f"ranks.run(function, ...) calls a function once a rank, and {function!r} is none: "
            "give train itself, and not what train() returns"
        )
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"{name} would only be begun: give ranks.run a plain function, which goes through it "
            "to its end"
        )


def _of_processes(count: int | None) -> list[torch.device]:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"processes=4 is how many, a whole number above zero: {count!r}")
    return hardware.real_gpus(count) or [torch.device("cpu")] * count


def _require_real(devices: Sequence[torch.device]) -> None:
    for each in devices:
        if each.type != "cuda":
            raise RuntimeError(
                f"ranks.run(function, gpus) runs on real or virtual GPUs, and {each} is none: "
                "take gpus = course_lib.devices(4), or ranks.run(function, processes=4)"
            )
        if each.index is None or each.index >= torch.cuda.device_count():
            raise RuntimeError(f"{each} is no GPU of this machine: take 'cuda:0' and so on")
    if len(set(devices)) < len(devices):
        raise ValueError(f"each rank needs a GPU of its own, and one is there twice: {devices}")
