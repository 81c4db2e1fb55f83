"""The explorers: live where they can be, a picture where they cannot."""

import base64

import pytest

from course_lib import devices, widgets
from course_lib.hardware import memory_in_use
from course_lib.virtual.machine import machine

EXPLORERS = [
    widgets.explore_queues,
    widgets.explore_step,
    widgets.explore_data_parallel,
    widgets.explore_stages,
]


@pytest.mark.parametrize("make", EXPLORERS)
def test_an_explorer_has_a_short_name_and_a_static_picture(make) -> None:
    bundle = make()._repr_mimebundle_()
    assert bundle["text/plain"].startswith("<explorer: ")
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle


@pytest.mark.parametrize("make", EXPLORERS)
def test_every_control_changes_the_picture_at_both_ends(make) -> None:
    explorer = make()
    *controls, picture = explorer.children
    for control in controls:
        before, start = picture.value, control.value
        ends = [False, True] if isinstance(start, bool) else [control.options[0],
                                                              control.options[-1]]  # fmt: skip
        seen = set()
        for end in ends:
            control.value = end
            seen.add(picture.value)
        assert seen != {before}, control.description
        control.value = start


def test_an_explorer_does_not_disturb_the_devices_in_use() -> None:
    (gpu,) = devices(1)
    clock, in_use = machine.clock.host, memory_in_use(gpu)
    widgets.explore_queues()
    assert (machine.clock.host, memory_in_use(gpu)) == (clock, in_use)
    assert machine.device_count == 1
