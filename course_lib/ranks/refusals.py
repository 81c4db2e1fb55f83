"""What ``torch.distributed`` offers and virtual ranks do not do: refused in one line that names it.

What is called through the process group is refused there; here are functions that would end
before, in an error about something else, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.distributed.rpc as rpc
import torch.multiprocessing as multiprocessing

_REFUSED = [
    (dist, "split_group", "call new_group"),
    (dist, "TCPStore", "call init_process_group() without a store"),
    (checkpoint, "async_save", "call torch.distributed.checkpoint.save"),
    (rpc, "init_rpc", "send tensors with torch.distributed.send, objects with send_object_list"),
    (multiprocessing, "spawn", "a rank is there for each GPU already; call the function itself"),
]

# What a program calls that takes virtual GPUs for those of CUDA, on a machine that has none.
_CUDA = [(torch.cuda, "set_device", "a rank's GPU is current from the start, and called 'vgpu'")]


@contextmanager
def in_place() -> Iterator[None]:
    """Refuse, in the block, what is in the list above."""
    with ExitStack() as stack:
        for module, name, instead in [*_REFUSED, *([] if torch.cuda.is_available() else _CUDA)]:
            refuse = _refusing(f"{module.__name__}.{name}", instead)
            stack.enter_context(mock.patch.object(module, name, refuse))
        yield


def _refusing(name: str, instead: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"ranks on virtual GPUs cannot {name}: {instead}")

    return refuse
