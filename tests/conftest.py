"""What all tests share: a machine of their own, and four virtual GPUs in it."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import matplotlib
import pytest
import torch

import course_lib
from course_lib.virtual import backend
from leftovers import own_machine
from round_numbers import SPEC

matplotlib.use("agg")
torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist already uses the cores
backend.register()  # once a process, and never undone: no test is the first
# A shell that starts the tests in the background lets them ignore Ctrl-C, and some are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Whether a test failed, for the fixture that looks at what it left.
FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests come in random order, the cells of a notebook in theirs."""
    cells = [item for item in items if item.path.suffix == ".ipynb"]
    cells.sort(key=lambda cell: (cell.path, cell.cell_num))
    items[:] = [item for item in items if item.path.suffix != ".ipynb"] + cells


def pytest_collection_finish() -> None:
    _spare_what_was_imported()


@pytest.fixture(scope="module", autouse=True)
def _spare_what_the_tests_of_this_file_imported() -> Iterator[None]:
    yield
    _spare_what_was_imported()


def _spare_what_was_imported() -> None:
    """Let the garbage collector, which every recording calls, not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Note which tests failed, for the fixture below."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(autouse=True)
def _own_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Empty virtual GPUs for each test; it fails if it leaves anything behind."""
    with own_machine() as left:
        yield
        request.node.funcargs.clear()  # what other fixtures gave the test is gone with it
    # The traceback of a test that failed holds its tensors.
    if left and not request.node.stash.get(FAILED, False):
        pytest.fail("this test leaves behind: " + ", ".join(left), pytrace=False)


@pytest.fixture
def vgpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """``vgpu:0`` to ``vgpu:3``: nothing on them, and their clock at zero."""
    monkeypatch.setenv("COURSE_DEVICES", "virtual")
    return course_lib.devices(4)


@pytest.fixture
def gpus(vgpus: list[torch.device]) -> list[torch.device]:
    """Four GPUs whose times can be worked out in the head."""
    return course_lib.devices(4, SPEC)
