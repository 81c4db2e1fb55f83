"""The suite watches itself: a test that leaves something behind is told what it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from matplotlib import pyplot as plt

import course_lib
from course_lib.virtual.machine import machine
from leftovers import own_machine

kept: list[object] = []  # as a module keeps what a test gives it


def a_tensor() -> None:
    kept.append(torch.ones(25, device=course_lib.devices(2)[1]))


def a_trace_that_never_ends() -> None:
    course_lib.devices(1)
    kept.append(course_lib.trace())
    kept[-1].__enter__()


def a_listener_of_hazards() -> None:
    machine.clock.hazard_listeners.append(kept.append)


def a_handler() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)


def a_variable() -> None:
    os.environ["COURSE_LEFTOVER"] = "1"


def a_figure() -> None:
    plt.figure()


def a_look() -> None:
    plt.rcParams["font.size"] = 13.5


def a_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def a_default_device() -> None:
    torch.set_default_device("meta")


def no_gradients() -> None:
    torch.set_grad_enabled(False)


@pytest.fixture
def _afterwards() -> Iterator[None]:
    """Everything is put back, or these tests would be the ones to leave something."""
    handler, size = signal.getsignal(signal.SIGTERM), plt.rcParams["font.size"]
    yield
    kept.clear()
    signal.signal(signal.SIGTERM, handler)
    os.environ.pop("COURSE_LEFTOVER", None)
    plt.close("all")
    plt.rcParams["font.size"] = size
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (a_tensor, "100 bytes on vgpu:1"),
        (a_trace_that_never_ends, "a listener of the clock"),
        (a_trace_that_never_ends, "a listener of the memory of vgpu:0"),
        (a_trace_that_never_ends, "a listener of the hazards"),
        (a_listener_of_hazards, "a listener of the hazards"),
        (a_handler, "a signal handler: 15"),
        (a_variable, "an environment variable: COURSE_LEFTOVER"),
        (a_figure, "an open figure: [1]"),
        (a_look, "a value of matplotlib's rcParams: font.size"),
        (a_dtype, "the default dtype: torch.float64"),
        (a_default_device, "the default device: meta"),
        (no_gradients, "grad mode: (False, False)"),
    ],
)
def test_what_is_left_is_named(_afterwards, leave: Callable[[], None], named: str) -> None:
    with own_machine() as left:
        leave()
    assert named in left


def test_nothing_is_left_by_a_program_that_ends() -> None:
    with own_machine() as left:
        gpu = course_lib.devices(1)[0]
        with course_lib.trace():
            x = torch.ones(25, device=gpu)
        cycle = [x]
        cycle.append(cycle)
        del x, cycle
    assert left == []


def test_every_test_has_a_machine_without_devices_and_the_same_random_numbers(request) -> None:
    assert "_own_machine" in request.fixturenames
    assert machine.device_count == 0
    assert torch.initial_seed() == 0


def test_devices_made_outside_of_a_test_are_refused() -> None:
    course_lib.devices(1)
    with pytest.raises(RuntimeError, match="outside of a test"), own_machine():
        pass
