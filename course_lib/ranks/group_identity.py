"""What a process group says of itself: its name, its size, what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from course_lib.ranks.meetings import Communicator
from course_lib.virtual.spec import DEVICE_TYPE

if TYPE_CHECKING:
    from course_lib.ranks.running import Run

# PyTorch's stub lists every way of calling each method; its own code calls them in one.
_ProcessGroup: Any = dist.ProcessGroup


class GroupIdentity(_ProcessGroup):
    """The part of a process group that sends nothing.

    Args:
        communicator: what the ranks of the group share.
        rank: its rank in the group.
    """

    def __init__(self, run: Run, communicator: Communicator, rank: int, store: dist.Store) -> None:
        super().__init__(rank, len(communicator.ranks))
        self._run, self._communicator = run, communicator
        self._rank, self._store = rank, store
        self._name = self._description = "undefined"

    def getBackendName(self) -> str:
        return "virtual ranks"

    def getSize(self) -> int:
        return len(self._communicator.ranks)

    def _get_backend_name(self) -> str:
        return "virtual ranks"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device(DEVICE_TYPE)]

    def _get_backend(self, device: torch.device) -> GroupIdentity:
        return self

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._description

    def getGroupName(self) -> str:
        return self._name

    def getGroupDesc(self) -> str:
        return self._description

    def get_group_store(self) -> dist.Store:
        return self._store

    def set_timeout(self, timeout: Any) -> None:
        """A wait that cannot end is a deadlock, and named at once."""

    def _set_sequence_number_for_group(self) -> None:
        """Calls are numbered where the ranks meet."""

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        self._run.finish_pending()

    def shutdown(self) -> None:
        """Nothing is to be freed."""

    abort = shutdown

    def __repr__(self) -> str:
        return f"<{self._communicator.title}, seen by its rank {self._rank}>"
