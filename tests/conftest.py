"""What all tests share: four virtual GPUs, fresh for each test."""

from __future__ import annotations

import gc

import matplotlib
import pytest
import torch

import course_lib
from round_numbers import SPEC

matplotlib.use("agg")
torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist already uses the cores


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def vgpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """``vgpu:0`` to ``vgpu:3``: nothing on them, their clock at zero, their dice seeded."""
    monkeypatch.setenv("COURSE_DEVICES", "virtual")
    devices = course_lib.devices(4)
    if any(course_lib.memory_in_use(device) for device in devices):
        gc.collect()  # what an earlier test's traceback held
    for device in devices:
        course_lib.reset_peak_memory(device)
    torch.manual_seed(0)
    return devices


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four GPUs whose times can be worked out in the head."""
    return course_lib.devices(4, SPEC)
