"""Random numbers of several devices: which must differ, and which must agree."""

from __future__ import annotations

import torch

from course_lib.parallel.kinds import Devices


def seed_ranks(seed: int, devices: Devices) -> None:
    """Give the generator of each device a seed of its own: ``seed`` plus its rank.

    After ``torch.manual_seed(seed)`` all devices draw the same numbers, so that all replicas drop
    the same places of their different examples. Where devices hold different examples (data
    parallelism) or different neurons (inside tensor parallelism), dropout must differ: call this
    once, after the model is made. Where they hold copies of one value, it must agree:
    ``torch.manual_seed`` is right there. Megatron-LM keeps a generator for either.
    """
    for rank, device in enumerate(devices):
        device = torch.device(device)
        module = torch.get_device_module(device)
        with module.device(device):
            module.manual_seed(seed + rank)
