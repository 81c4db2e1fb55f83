"""What belongs to a process, and must change hands with the baton.

Ranks on a cluster are processes: each has a host clock, random numbers, an environment, a standard
output of its own. Here they share one process, so all that is taken out when a rank stops running,
and put back when it goes on. :data:`PARTS` is the list of it; what PyTorch keeps for each thread by
itself (grad mode, autocast, the current device) is not in it.

Rests on ``os.environ._data``, a dictionary that can be exchanged at no cost.
"""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from course_lib.virtual.machine import machine


class Part(NamedTuple):
    """Something of a process: how to read it, and how to put a value in its place."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


def attribute(owner: Callable[[], Any], name: str) -> Part:
    """The part that is an attribute of what ``owner`` returns."""
    return Part(lambda: getattr(owner(), name), lambda value: setattr(owner(), name, value))


def _clock() -> Any:
    return machine.clock


PARTS: dict[str, Part] = {
    "host": attribute(_clock, "host"),
    "seen_by_host": attribute(_clock, "seen_by_host"),
    "current streams": attribute(_clock, "current"),
    "region": attribute(_clock, "region"),
    "after_host_waited": attribute(_clock, "after_host_waited"),
    "own device": attribute(_clock, "own_device"),
    "device generators": attribute(lambda: machine, "generators"),
    "torch": Part(torch.default_generator.get_state, torch.default_generator.set_state),
    "random": Part(random.getstate, random.setstate),
    "numpy": Part(np.random.get_state, np.random.set_state),
    "default dtype": Part(torch.get_default_dtype, torch.set_default_dtype),
    "environment": attribute(lambda: os.environ, "_data"),
    "stdout": attribute(lambda: sys, "stdout"),
    "stderr": attribute(lambda: sys, "stderr"),
    "excepthook": attribute(lambda: sys, "excepthook"),
}


class ProcessState:
    """The values of all parts, for the time in which they are not in place."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def as_it_is(cls) -> ProcessState:
        """That of the process now."""
        return cls({name: part.get() for name, part in PARTS.items()})

    def put_in_place(self) -> None:
        for name, value in self.values.items():
            PARTS[name].set(value)

    def take_out(self) -> None:
        for name in self.values:
            self.values[name] = PARTS[name].get()

    def for_rank(self, rank: int, world_size: int, device: int) -> ProcessState:
        """A process like this one that a launcher would start as ``rank``, with GPU ``device``.

        It has the random numbers of this one, and what it prints is kept.
        """
        clock = machine.clock
        # As torchrun sets them on one node, where a local rank is the index of a GPU.
        numbers = {"RANK": rank, "LOCAL_RANK": device, "GROUP_RANK": 0}
        sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
        environment = dict(self.values["environment"])
        for name, value in {**numbers, **sizes, **address}.items():
            environment[os.environ.encodekey(name)] = os.environ.encodevalue(str(value))
        return ProcessState(
            {
                **self.values,
                "seen_by_host": dict(self.values["seen_by_host"]),
                "current streams": [streams[0] for streams in clock.streams],
                "after_host_waited": None,
                "own device": device,
                "device generators": [
                    generator.clone_state()
                    for generator in self.values["device generators"][: machine.device_count]
                ],
                "environment": environment,
                "stdout": io.StringIO(),
                "stderr": io.StringIO(),
            }
        )

    def meet(self, others: list[ProcessState]) -> None:
        """Go on when all ``others`` have ended: the host's clock is that of the last one."""
        self.values["host"] = max(state.values["host"] for state in [self, *others])
        seen = self.values["seen_by_host"]
        for state in others:
            for stream, count in state.values["seen_by_host"].items():
                seen[stream] = max(seen.get(stream, 0), count)


def undo_environment(own: dict[Any, Any], others: list[ProcessState]) -> None:
    """Take back what ranks told the operating system of their environment.

    ``os.environ`` itself has been exchanged; what C code and new processes see has not.
    """
    decode = os.environ.decodekey
    for state in others:
        theirs = state.values["environment"]
        for key in {*own, *theirs}:
            if own.get(key) == theirs.get(key):
                continue
            if key in own:
                os.putenv(decode(key), os.environ.decodevalue(own[key]))
            else:
                os.unsetenv(decode(key))
