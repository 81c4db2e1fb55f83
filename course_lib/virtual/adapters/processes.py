"""``init_process_group()`` without a backend, where virtual GPUs are the accelerator.

PyTorch picks the backend by the accelerator and knows none for virtual GPUs, which no process can
share. What processes exchange is on the CPU, and so it is ``gloo``, as without virtual GPUs.

Rests on ``torch.distributed.distributed_c10d.BackendConfig``.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    if not torch.distributed.is_available():
        return
    config = torch.distributed.distributed_c10d.BackendConfig
    undefined = torch.distributed.Backend.UNDEFINED
    configure = config.__init__

    def configure_for_the_cpu(self: Any, backend: str) -> None:
        is_ours = torch._C._get_accelerator().type == DEVICE_TYPE
        configure(self, "cpu:gloo" if is_ours and backend == undefined else backend)

    config.__init__ = configure_for_the_cpu
