"""A ring for tensors on the CPU, where there are no streams and nothing is metered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from course_lib.parallel.ring import Ring


class HostRing(Ring):
    """The steps of a ring, done at once."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)

    @contextmanager
    def turning(self) -> Iterator[None]:
        yield

    @contextmanager
    def between(self, rank: int, following: int) -> Iterator[None]:
        yield

    def on(self, rank: int) -> AbstractContextManager[None]:
        return nullcontext()

    def next_round(self) -> None:
        """Nothing waits."""
