"""Who the process of a rank is: what ``torchrun`` would tell it, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Place:
    """The place of one process among those of a run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: its GPU, or the CPU.
        folder: private to the run, and gone after it.
    """

    rank: int
    world_size: int
    device: torch.device
    folder: Path

    @property
    def local_rank(self) -> int:
        """The index of its GPU; its rank if it has none, for all are on one machine."""
        return self.rank if self.device.index is None else self.device.index

    @property
    def job(self) -> Path:
        """What all ranks are to do."""
        return self.folder / "job"

    @property
    def stdout(self) -> Path:
        """What the rank printed."""
        return self.folder / f"stdout_{self.rank}"

    @property
    def stderr(self) -> Path:
        """What the rank printed as errors and warnings."""
        return self.folder / f"stderr_{self.rank}"

    @property
    def native(self) -> Path:
        """What C++ printed, past Python: worth reading if the process has died."""
        return self.folder / f"native_{self.rank}"

    @property
    def whereabouts(self) -> Path:
        """Where the rank was when it was stopped."""
        return self.folder / f"whereabouts_{self.rank}"

    def store(self, number: int) -> Path:
        """Where the ranks meet when they make their first group for the ``number``-th time."""
        return self.folder / f"store_{number}"

    def printed(self, path: Path) -> str:
        """What stands in one of these files; nothing if the rank never came to write it."""
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    def environment(self) -> dict[str, str]:
        """What ``torchrun`` would set."""
        values = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.world_size,
        }
        return {name: str(value) for name, value in values.items()}


class Here:
    """Who this process is, if it is a rank."""

    place: Place | None = None
