"""Random numbers: each virtual GPU has a generator, seeded by ``torch.manual_seed``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine


@contextmanager
def device_generator(index: int) -> Iterator[None]:
    """Let the device's random number generator stand in for that of the backing."""
    if machine.backing.type == "meta":
        yield
        return
    own, standard = machine.generators[index], machine.standard_generator()
    with _standard_generator_in_use:
        saved = standard.get_state()
        standard.set_state(own.get_state())
        try:
            yield
        finally:
            own.set_state(standard.get_state())
            standard.set_state(saved)


_standard_generator_in_use = threading.RLock()  # all threads share the standard generator


def refuse_generator(generator: torch.Generator) -> None:
    """Raise an error, in the words of CUDA, and say what to do."""
    raise RuntimeError(
        f"Expected a '{DEVICE_TYPE}' device type for generator but found '{generator.device.type}'."
        " Leave generator= out: each virtual GPU has its own, seeded by torch.manual_seed."
    )
