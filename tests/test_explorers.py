"""The explorers: live where they can be, a picture where they cannot."""

import base64
import io
import re

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

import small_svg
from course_lib import CLASSROOM, devices, ranks, style
from course_lib.explorers import explorer as explorer_module
from course_lib.explorers import (
    frames,
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
    lesson_12,
    lesson_13,
    lesson_14,
    lesson_15,
)
from course_lib.explorers.explorer import Explorer, choice, titles_of
from course_lib.hardware import memory_in_use
from course_lib.virtual.machine import machine

ALL = [
    lesson_00.explore_queues,
    lesson_01.explore_step,
    lesson_02.explore_data_parallel,
    lesson_03.explore_all_reduce,
    lesson_04.explore_stages,
    lesson_05.explore_schedules,
    lesson_06.explore_tensor_parallel,
    lesson_07.explore_ring_attention,
    lesson_08.explore_sharding,
    lesson_09.explore_methods,
    lesson_10.explore_circle,
    lesson_11.explore_buckets,
    lesson_12.explore_nodes,
    lesson_13.explore_batches,
    lesson_14.explore_plans,
    lesson_15.explore_broken,
]
# These draw fast, so that several of their settings can be tried.
EXPLORERS = [
    lesson_00.explore_queues,
    lesson_01.explore_step,
    lesson_03.explore_all_reduce,
    lesson_08.explore_sharding,
    lesson_10.explore_circle,
    lesson_12.explore_nodes,
    lesson_13.explore_batches,
    lesson_14.explore_plans,
    lesson_15.explore_broken,
]

# What takes seconds where an explorer starts is drawn at another position.
CHEAPER = {
    lesson_09.explore_methods: {"count": 2},
    lesson_11.explore_buckets: {"width": 32, "count": 2, "latency": 400},
}

# What a maintainer is told whose change moved a picture.
CHANGED = (
    "what is kept of this explorer is not what it draws now. If that is as you meant it, run "
    "`make frames` and commit course_lib/explorers/kept/ with your change"
)


@pytest.mark.parametrize("make", ALL)
def test_what_is_kept_of_an_explorer_is_what_it_draws_now(make) -> None:
    explorer = make()
    values = explorer.values | CHEAPER.get(make, {})
    figure = explorer.draw(**values)
    with style.look():
        words = small_svg.words_in(small_svg.as_svg(figure))
    plt.close(figure)
    kept = frames.read(frames.path_of(make.__name__))
    place = kept.place(values)
    assert small_svg.words_in(kept.frames[place]) == words, CHANGED
    assert kept.titles[place] == titles_of(figure), CHANGED


def test_an_explorer_has_a_short_name_and_a_static_picture() -> None:
    """Of all others, the cell of the lesson that shows it has both, and they are compared there."""
    bundle = lesson_00.explore_queues()._repr_mimebundle_()
    assert bundle["text/plain"] == "<explorer: side=256, products=4, read=True>"
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle


@pytest.mark.parametrize("make", EXPLORERS)
def test_every_control_changes_the_picture_at_both_ends(make) -> None:
    explorer = make()
    *controls, _, picture = explorer.children
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
    lesson_00.explore_queues()
    assert (machine.clock.host, memory_in_use(gpu)) == (clock, in_use)
    assert machine.device_count == 1


@pytest.mark.parametrize("make", EXPLORERS)
def test_an_explorer_leaves_the_dice_as_they_were(make) -> None:
    devices(1)
    before = torch.get_rng_state(), torch.vgpu.get_rng_state(0)
    explorer = make()
    control = explorer.children[0]
    control.value = control.options[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.vgpu.get_rng_state(0), before[1])


def inverse(number: int) -> Explorer:
    """An explorer that cannot draw zero."""

    def draw(number: int) -> plt.Figure:
        figure, ax = style.figure()
        ax.plot([1 / number])
        ax.set_title("one over it")
        return figure

    return Explorer(draw, number=choice("number", [0, 1, 2], number))


def test_an_error_stands_in_one_line_where_the_picture_was() -> None:
    explorer = inverse(2)
    control, status, picture = explorer.children
    before = picture.value
    control.value = 0
    assert "ZeroDivisionError: division by zero" in status.value
    assert picture.value == ""
    control.value = 1
    assert "ZeroDivisionError" not in status.value
    assert picture.value.startswith("<img") and picture.value != before


def test_while_it_works_it_says_so_and_then_what_a_screen_reader_should_know() -> None:
    seen = []
    explorer = inverse(2)
    control, status, picture = explorer.children
    status.observe(lambda change: seen.append(change["new"]), names="value")
    control.value = 1
    working, done = seen
    assert explorer_module.WORKING in working
    assert 'role="status"' in done and "number: 1. one over it" in done
    assert 'alt="number: 1. one over it"' in picture.value


def test_the_static_picture_says_how_to_get_the_sliders() -> None:
    png = base64.b64decode(inverse(2)._repr_mimebundle_()["image/png"])
    picture = Image.open(io.BytesIO(png))
    line = picture.crop((0, picture.height - 24, picture.width, picture.height)).convert("L")
    assert line.getextrema()[0] < 100  # ink


def test_an_explorer_whose_first_picture_fails_is_shown_without_one() -> None:
    bundle = inverse(0)._repr_mimebundle_()
    assert bundle["text/plain"] == "<explorer: number=0>"
    assert "image/png" not in bundle


def test_figures_are_closed_whether_or_not_they_were_drawn() -> None:
    before = plt.get_fignums()
    explorer = inverse(1)
    explorer.children[0].value = 0
    assert plt.get_fignums() == before


def test_an_error_message_cannot_be_taken_for_html() -> None:
    def draw(number: int) -> plt.Figure:
        raise ValueError("<b>bold</b>\nand more")

    _, status, _ = Explorer(draw, number=choice("number", [0], 0)).children
    assert "ValueError: &lt;b&gt;bold&lt;/b&gt;</div>" in status.value


@pytest.mark.parametrize(
    ("stage", "billions", "memory", "words"),
    [
        (0, 7, 80, "never fits"),
        (1, 1, 24, "fits from 1 on"),
        (2, 70, 80, "never fits"),  # each GPU has 140 GB of parameters, however many there are
        (3, 70, 80, "fits from 16 on"),
        (3, 405, 24, "fits on more than 128"),  # on 270
    ],
)
def test_a_sharded_model_never_fits_only_if_no_number_of_gpus_is_enough(
    stage: int, billions: float, memory: float, words: str
) -> None:
    counts = [1, 2, 4, 8, 16, 32, 64, 128]
    assert lesson_08.where_it_fits(stage, billions, memory, counts) == words


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (1, "tree, ring from 1.3 MB on"),
        (16, "tree, levels from 400 kB on"),
        (32, "tree, levels from 790 kB on"),  # what lesson 12 answers below its explorer
        (64, "tree, two trees from 790 kB on, levels from 3.2 MB on"),
    ],
)
def test_the_best_all_reduce_is_named_with_the_size_from_which_it_is(nodes: int, words: str):
    explorer = lesson_12.explore_nodes()
    explorer.children[0].value = nodes
    assert f"by formula: {words}" in explorer.children[-2].value


def test_a_cluster_that_is_too_small_is_said_in_the_title() -> None:
    explorer = lesson_14.explore_plans()
    controls = {control.description: control for control in explorer.children[:-2]}
    controls["GPUs"].value = 64
    said = explorer.children[-2].value
    assert "llama3-405b does not fit on 64 x H100" in said
    assert "the smallest layout needs" in said


def test_the_circle_is_a_deadlock_if_all_send_first_and_takes_the_rounds_of_its_order() -> None:
    with pytest.raises(ranks.DeadlockError):
        lesson_10.pass_on(lesson_10.WAYS["all send first"], 3, 1)
    message = 1e6 / CLASSROOM.link_bandwidth
    for way, even, odd in (("even ranks send first", 2, 3), ("both at once", 1, 1)):
        for count, rounds in ((4, even), (5, odd)):
            seconds = lesson_10.pass_on(lesson_10.WAYS[way], count, 1000).seconds
            assert seconds / message == pytest.approx(rounds, rel=0.01)


@pytest.mark.parametrize(("latency", "is_one_for_all_slower"), [(2.5, True), (400, False)])
def test_a_bucket_for_all_is_slower_and_small_ones_pay_their_latency(
    latency: float, is_one_for_all_slower: bool
) -> None:
    """In the kept pictures, of which the second is drawn anew above."""
    kept = frames.read(frames.path_of("explore_buckets"))
    place = kept.place(CHEAPER[lesson_11.explore_buckets] | {"latency": latency})
    smallest, *_, largest = re.findall(r"(\S+) ms", "".join(small_svg.words_in(kept.frames[place])))
    assert (1.03 * float(smallest) < float(largest)) == is_one_for_all_slower
    assert (1.03 * float(largest) < float(smallest)) != is_one_for_all_slower
