"""``torch.autograd.profiler.profile(use_device="vgpu")`` is refused in one line.

PyTorch would ask C++ for the device's times with every operator, and print that there are none.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch.autograd import profiler

from course_lib.virtual.machine import DEVICE_TYPE


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    start = profiler.profile.__init__

    @wraps(start)
    def start_elsewhere(self: profiler.profile, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_device") == DEVICE_TYPE:
            raise RuntimeError(
                "PyTorch's profiler measures this computer, and the times of virtual GPUs are "
                "simulated: use course_lib.trace() for those, or leave use_device= out."
            )
        start(self, *args, **kwargs)

    profiler.profile.__init__ = start_elsewhere
