"""What ranks printed, shown once all have ended: in rank order, and so always in the same one."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_in_rank_order(stdout: Sequence[str], stderr: Sequence[str]) -> None:
    """Print what each rank wrote, every line with its rank."""
    for texts, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        for rank, text in enumerate(texts):
            for line in text.splitlines():
                print(f"[rank {rank}] {line}", file=stream)
