"""PyTorch's profiler measures the CPU alone, and a profile of ``vgpu`` is refused in one line.

PyTorch would ask C++ for the device's times with every operator, and print that there are none; and
a profile that names no activities would ask for those of every device type there is.

Rests on ``torch.autograd._supported_activities``.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity

from course_lib.virtual.machine import DEVICE_TYPE


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    _refuse_profiles_of_virtual_gpus()
    _measure_the_rest()


def _refuse_profiles_of_virtual_gpus() -> None:
    start = profiler.profile.__init__

    @wraps(start)
    def start_elsewhere(self: profiler.profile, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_device") == DEVICE_TYPE:
            raise RuntimeError(
                "PyTorch's profiler measures this computer, and the times of virtual GPUs are "
                "simulated: use course_lib.trace() for those, and profile the CPU alone."
            )
        start(self, *args, **kwargs)

    profiler.profile.__init__ = start_elsewhere


def _measure_the_rest() -> None:
    autograd: Any = torch.autograd
    supported = autograd._supported_activities
    autograd._supported_activities = lambda: supported() - {ProfilerActivity.PrivateUse1}
