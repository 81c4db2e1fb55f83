"""What a run of ranks in processes must not leave behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from course_lib import ranks


@contextmanager
def nothing_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the block there is no file of a run, and no process but the fork server."""
    get_temp_dir()  # the fork server's socket is elsewhere: a path to it must be short
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.glob("course_ranks_*")) == []
    assert multiprocessing.active_children() == []


def assert_usable() -> None:
    """The next run works."""

    def total() -> float:
        dist.init_process_group()
        x = torch.ones(4)
        dist.all_reduce(x)
        return x[0].item() + int(os.environ["RANK"])

    assert ranks.run(total, processes=2) == [2, 3]
