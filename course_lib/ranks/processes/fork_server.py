"""Imported by the fork server, before it makes its first rank: what every rank needs.

Rests on ``multiprocessing.forkserver._forkserver._forkserver_address``.
"""

import atexit
import gc
import os
import shutil
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch._dynamo  # DistributedDataParallel and fully_shard import it when first used
import torch.distributed.fsdp  # noqa: F401

import course_lib.ranks.processes.rank_process  # noqa: F401


def _remove_socket() -> None:
    """The folder with the server's socket: the caller removes it, unless it was killed."""
    address: Any = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    if isinstance(address, str) and address:
        shutil.rmtree(Path(address).parent, ignore_errors=True)


# Jupyter kills a kernel with all of its group: the server leaves it, to end when its caller has.
os.setsid()
atexit.register(_remove_socket)  # not in ranks, which end in another way

# What is there by now is no garbage; looking through it would copy it into each rank's memory.
gc.collect()
gc.freeze()
