"""A machine of its own for each test, and what a test must not leave behind.

Whatever the next test could trip over is named: bytes on a device, a listener, an open figure, a
changed rcParam, signal handler, default dtype or environment variable.
"""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from course_lib import hardware
from course_lib.virtual.machine import machine
from course_lib.virtual.spec import CLASSROOM

# PyTorch's DataLoader handles it from its first workers on, for as long as the process lives.
UNWATCHED = {getattr(signal, "SIGCHLD", None)}  # Windows has none
# Pytest's own, and what torch._dynamo sets when it is imported.
SET_BY_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}

# The state of the process that a program can set: what to call it, and how to read it.
STATE: dict[str, Callable[[], Any]] = {
    "a signal handler": lambda: {
        number: signal.getsignal(number) for number in signal.valid_signals() - UNWATCHED
    },
    "an environment variable": lambda: {
        name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS
    },
    "an open figure": plt.get_fignums,
    "a value of matplotlib's rcParams": lambda: dict(matplotlib.rcParams.items()),
    "real devices": lambda: list(hardware.real_devices),
    "the default dtype": torch.get_default_dtype,
    "the default device": torch.get_default_device,
    "grad mode": lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "autocast": torch.is_autocast_enabled,
    "the number of threads": torch.get_num_threads,
    "deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
    ),
    "anomaly detection": torch.is_anomaly_enabled,
}


def state() -> dict[str, Any]:
    """The state of the process as it is now, to compare with later."""
    return {name: read() for name, read in STATE.items()}


def leftovers(before: dict[str, Any]) -> list[str]:
    """What has changed since ``before``, and what is left in the machine, in a few words each."""
    found = [_change(name, before[name], value) for name, value in state().items()]
    return [change for change in found if change] + listeners() + bytes_on_devices()


def _change(name: str, before: Any, now: Any) -> str:
    if before == now:
        return ""
    if not isinstance(now, dict):
        return f"{name}: {now}"
    missing = object()
    keys = [key for key in before | now if before.get(key, missing) != now.get(key, missing)]
    return f"{name}: {', '.join(map(str, keys))}"


def listeners() -> list[str]:
    """Whoever still listens to the machine: a trace that never ended."""
    clock = machine.clock
    places = {"clock": clock.listeners, "hazards": clock.hazard_listeners} | {
        f"memory of {memory.device}": memory.listeners for memory in machine.memories
    }
    return [f"a listener of the {place}" for place, those in places.items() if those]


def bytes_on_devices() -> list[str]:
    """What is on each device once the garbage is gone."""
    for _ in range(3):  # what a tensor's end sets free may be a cycle again
        if any(memory.in_use for memory in machine.memories):
            gc.collect()  # cycles are no fault: Python frees them when it likes
    return [
        f"{memory.in_use} bytes on {memory.device}" for memory in machine.memories if memory.in_use
    ]


@contextmanager
def own_machine() -> Iterator[list[str]]:
    """An empty machine and seeded dice; a list that says afterwards what was left, if anything.

    Raises:
        RuntimeError: devices were made before, where every test would share them.
    """
    if machine.device_count:
        raise RuntimeError(
            "devices() was called outside of a test, while a module was imported or in a fixture "
            "of wider scope: call it in the test, or in a fixture that is made anew for each"
        )
    left: list[str] = []
    before = state()
    with machine.replaced(CLASSROOM, 0):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield left
        left += leftovers(before)
