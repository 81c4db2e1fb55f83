"""Random numbers: each virtual GPU has a generator, seeded by ``torch.manual_seed``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.random_states import made_for_devices


@contextmanager
def device_generator(index: int) -> Iterator[None]:
    """Let the device's random number generator stand in for that of the backing."""
    if machine.backing.type == "meta":
        yield
        return
    own, standard = machine.generators[index], machine.standard_generator()
    with _standard_generator_in_use:
        saved = standard.get_state()
        standard.set_state(own.full_state())
        try:
            yield
        finally:
            own.set_full_state(standard.get_state())
            standard.set_state(saved)


_standard_generator_in_use = threading.RLock()  # all threads share the standard generator


def check_generator(generator: torch.Generator) -> None:
    """Raise an error, in the words of CUDA, if ``generator`` is not of a virtual GPU."""
    in_cpp: Any = generator
    if in_cpp._cdata not in made_for_devices:
        found = generator.device.type
        raise RuntimeError(
            f"Expected a '{DEVICE_TYPE}' device type for generator but found '{found}'. Make it "
            f"with torch.Generator(device='{DEVICE_TYPE}:0'), or leave generator= out: each "
            "virtual GPU has its own, seeded by torch.manual_seed."
        )
