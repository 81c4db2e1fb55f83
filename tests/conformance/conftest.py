"""Large virtual GPUs for every test here, and which tests run: all if this folder was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import course_lib

# Otherwise one in so many of each test's cases, so that every `make test` sees some.
EVERY = 24


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("conformance" in argument for argument in config.args):
        return
    seen: Counter[str] = Counter()
    left_out = []
    for item in sorted(items, key=lambda item: item.nodeid):  # the same ones in any order
        if item.path.parent.name == "conformance" and hasattr(item, "callspec"):
            test = item.originalname
            if seen[test] % EVERY:
                left_out.append(item)
            seen[test] += 1
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _large_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of this is about memory, and one thread is faster on inputs as small as these."""
    monkeypatch.setenv("COURSE_DEVICES", "virtual")
    course_lib.devices(2, course_lib.A100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
