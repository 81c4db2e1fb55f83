"""``torch.vgpu.amp``: autocast and gradient scaling, under the names of ``torch.cuda.amp``.

They are older than ``torch.amp``, which takes the kind of device as an argument, and still what
many scripts import.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import torch

from course_lib.virtual.machine import DEVICE_TYPE


def _autocast(
    enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
) -> torch.autocast:
    return torch.autocast(DEVICE_TYPE, dtype, enabled, cache_enabled)


def prepare() -> None:
    """Make the module, so that it can be imported. To be called once."""
    amp = ModuleType(f"torch.{DEVICE_TYPE}.amp", __doc__)
    names = {
        "autocast": _autocast,
        "GradScaler": partial(torch.amp.GradScaler, DEVICE_TYPE),
        "custom_fwd": partial(torch.amp.custom_fwd, device_type=DEVICE_TYPE),
        "custom_bwd": partial(torch.amp.custom_bwd, device_type=DEVICE_TYPE),
    }
    vars(amp).update(names)
    sys.modules[amp.__name__] = torch.get_device_module(DEVICE_TYPE).amp = amp
