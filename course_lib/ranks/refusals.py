"""What ``torch.distributed`` offers and virtual ranks do not do: refused in one line that names it.

What is called through the process group is refused there; here are functions that would end
before, in an error about something else, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.distributed.rpc as rpc
import torch.multiprocessing as multiprocessing

_REFUSED = [
    (dist, "split_group", "call new_group"),
    (checkpoint, "async_save", "call torch.distributed.checkpoint.save"),
    (rpc, "init_rpc", "send tensors with torch.distributed.send, objects with send_object_list"),
    (multiprocessing, "spawn", "a rank is there for each GPU already; call the function itself"),
]


@contextmanager
def in_place() -> Iterator[None]:
    """Refuse, in the block, what is in the list above."""
    with ExitStack() as stack:
        for module, name, instead in _REFUSED:
            refuse = _refusing(f"{module.__name__}.{name}", instead)
            stack.enter_context(mock.patch.object(module, name, refuse))
        yield


def _refusing(name: str, instead: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"ranks on virtual GPUs cannot {name}: {instead}")

    return refuse
