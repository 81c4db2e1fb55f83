"""Collectives that differ between ranks are named, and do not hang or mix up numbers.

PyTorch compares what the ranks are about to do, at the cost of a small message before each
collective, if ``TORCH_DISTRIBUTED_DEBUG`` is ``DETAIL``. Here it is, unless it was set before:
whoever measures sets it to ``OFF``.

Rests on the words of PyTorch's message and on ``torch.distributed.Logger``.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from course_lib.ranks.errors import MismatchError

_MISMATCH = "Detected mismatch between collectives"


class _NoLogger(dist.Logger):
    """Notes nothing of a ``DistributedDataParallel``.

    With ``DETAIL`` on a CPU, PyTorch's own notes end in a crash (2.13, under ``torchrun`` too).
    """

    def set_construction_data_and_log(self, *args: Any) -> None:
        pass


def begin() -> None:
    """Compare in all groups of this process."""
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    dist.set_debug_level_from_env()
    dist.Logger = _NoLogger  # type: ignore[misc]


def mismatch_in(error: RuntimeError) -> MismatchError | None:
    """``error`` as these ranks name it, if it says that collectives differ."""
    if _MISMATCH not in str(error):
        return None
    return MismatchError(str(error)).with_traceback(error.__traceback__)
