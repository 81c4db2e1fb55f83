"""Random numbers of several devices: which must differ, and which must agree."""

from __future__ import annotations

import torch

from course_lib.parallel.inputs import require_devices
from course_lib.parallel.kinds import Devices


def seed_ranks(seed: int, devices: Devices) -> None:
    """Give the generator of each device a seed of its own: ``seed`` plus its rank.

    After ``torch.manual_seed(seed)`` all devices draw the same numbers, so that all replicas drop
    the same places of their different examples: call this once, after they are made. Models that
    are split see to their dropout themselves, with :mod:`course_lib.parallel.dropout`.

    Raises:
        TypeError: ``devices`` is one device, or no list.
        ValueError: there is no device in it.
    """
    for rank, device in enumerate(require_devices(devices)):
        seed_device(seed + rank, device)


def seed_device(seed: int, device: torch.device | str) -> None:
    """Give the generator of one device a seed, and leave those of the others as they are."""
    module = torch.get_device_module(device)
    with module.device(device):
        module.manual_seed(seed)
