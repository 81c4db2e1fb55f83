"""The broken programs of lesson 15: each is seen, none by everything, and each has its report."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from torch import nn

from course_lib import CLASSROOM, devices, doctor
from course_lib.doctor.instruments import _off
from course_lib.exercises.broken.batches import points
from course_lib.exercises.broken.cases import CASES, sgd
from course_lib.exercises.lesson_15 import WORKED, draw, program_text
from course_lib.explorers.lesson_15 import explore_broken
from course_lib.models import MLP
from course_lib.parallel.proof import largest_difference
from notebook_tools import NOTEBOOKS, Exercise, exercises
from test_lessons_equal_modules import definitions, namespaces

NOTEBOOK = "15_broken_on_purpose.ipynb"
each_case = pytest.mark.parametrize("name", CASES)

ONE, REPLICAS, NORM = "against one device", "replica against replica", "gradient norm"
SEEN = {
    "accumulated": {REPLICAS: 1, ONE: 1, NORM: 1},
    "short_passages": {ONE: 1, NORM: 1},
    "four_pieces": {"bytes": 1},
    "clipped": {ONE: 1, NORM: 1},
    "one_row": {ONE: 1, "distance from the start": 1, NORM: 4},
    "thawed": {REPLICAS: 3, ONE: 3, NORM: 3},
    "moved": {ONE: 3, NORM: 4},
    "with_dropout": {"masks": 1},
    "epochs": {"examples": 2},
    "recomputed": {"buffers": 1},
    "microbatches": {NORM: 1},
    "split_layers": {ONE: 1, NORM: 1},
    "long_passages": {ONE: 1, NORM: 1},
    "whole_batches": {"examples": 1, "operations": 1},
    "logged": {"memory": 4},
    "side_streams": {"waits": 1},
    "by_length": {"timeline": 1},
}


@each_case
def test_it_runs_its_loss_goes_down_and_these_instruments_see_it(name: str) -> None:
    report = CASES[name].examine()
    assert report.losses[-1] < report.losses[0]
    assert {finding.instrument: finding.step for finding in report.findings} == SEEN[name]


def test_no_instrument_sees_all_and_each_has_something_to_see() -> None:
    for instrument in doctor.INSTRUMENTS:
        assert 0 < sum(instrument in seen for seen in SEEN.values()) < len(SEEN)


def test_the_two_proofs_find_eight_and_eight_instruments_find_what_no_other_does() -> None:
    """As the lesson says in words."""
    assert len(SEEN) == 17
    assert sum(REPLICAS in seen or ONE in seen for seen in SEEN.values()) == 8
    assert len({next(iter(seen)) for seen in SEEN.values() if len(seen) == 1}) == 8
    assert SEEN["recomputed"] == {"buffers": 1}  # the one that passes the proof itself


@each_case
def test_it_is_short_and_names_its_public_report(name: str) -> None:
    program = CASES[name].program
    assert program.__name__ == name
    assert len(program_text(program).splitlines()) <= 30
    report = re.search(r"([\w.-]+/[\w.-]+)#(\d+)", program.__doc__ or "")
    assert report, "a repository and a number"
    repository, number = report.groups()
    cells = nbformat.read(NOTEBOOKS / NOTEBOOK, as_version=4).cells
    links = [f"https://github.com/{repository}/{kind}/{number}" for kind in ("issues", "pull")]
    assert sum(cell.source.count(f"({link})") for cell in cells for link in links) == 1


def body(source: str) -> list[str]:
    """What a program does: its statements, without docstring and the line that raises."""
    (function,) = (
        each
        for each in ast.parse(textwrap.dedent(source)).body
        if isinstance(each, ast.FunctionDef)  # not what is named above it
    )
    assert isinstance(function, ast.FunctionDef)
    told = [ast.unparse(statement) for statement in function.body[1:]]
    return [line for line in told if line != "raise NotImplementedError"]


def lesson() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / NOTEBOOK, as_version=4)


def exercise_of(name: str) -> Exercise:
    (found,) = [each for each in exercises(lesson()) if each.name == name.replace("_", "-")]
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in WORKED])
def test_the_stub_is_the_broken_program_and_the_solution_another(name: str) -> None:
    nb, exercise = lesson(), exercise_of(name)
    broken = body(inspect.getsource(CASES[name].program))
    assert body(nb.cells[exercise.stub_index].source) == broken
    assert body(exercise.solution) != broken


def test_each_case_is_worked_or_an_exercise() -> None:
    names = {each.name.replace("-", "_") for each in exercises(lesson())}
    assert names | set(WORKED) == set(CASES) and len(names) == 14


@pytest.fixture
def lesson_15():
    yield definitions(NOTEBOOK, "data", "suspect", "off", "mended", "two-more", "two-more-log")
    for names in namespaces:
        names.clear()
    namespaces.clear()


def test_the_lesson_and_the_module_measure_the_same_distance(lesson_15) -> None:
    for _ in range(3):
        here, there, start = torch.randn(3, 5, 4)
        assert lesson_15.off(here, there, start) == pytest.approx(_off(here, there, start))


@pytest.mark.parametrize("name", WORKED)
def test_the_worked_programs_are_the_modules_to_the_bit(lesson_15, name: str) -> None:
    gpus = devices(3, CLASSROOM)
    torch.manual_seed(0)
    model, trained = MLP(16, 32, 4), []
    for program in (getattr(lesson_15, name), CASES[name].program):
        replicas, step = program(model, gpus)
        for x, y in points(2):
            step(x, y)
        trained.append(replicas)
    for ours, theirs in zip(*trained, strict=True):
        assert largest_difference(ours, theirs) == 0


def test_draw_prints_the_same_programs_for_the_same_seed_and_no_causes(capsys) -> None:
    draw(3, seed=2)
    first = capsys.readouterr().out
    draw(3, seed=2)
    assert capsys.readouterr().out == first
    draw(3, seed=3)
    assert capsys.readouterr().out != first
    assert first.count("# ") >= 3 and first.count("def step(x, y)") == 3
    assert '"""' not in first
    draw(14, seed=0)
    everything = capsys.readouterr().out
    for case in CASES.values():
        assert case.cause not in everything


def test_draw_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="there are 1 to 14 programs to draw, and not 15"):
        draw(15, seed=0)


def test_a_model_with_dropout_is_not_compared_with_one_device() -> None:
    gpus = devices(2)
    model = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5))

    def prepare(model, gpus):
        return [model.to(gpus[0])], lambda x, y: None

    report = doctor.examine(model, prepare, points(1), nn.functional.cross_entropy, sgd(), gpus)
    assert report.run.now.alone is None
    assert str(report) == "1 step(s): nothing found, and no comparison with one device."


@pytest.mark.parametrize(
    ("name", "ratio"), [("recomputed", 0.76), ("split_layers", 0.89), ("short_passages", 0.98)]
)
def test_curves_that_are_lower_than_they_should_be(name: str, ratio: float) -> None:
    """As the answer below the lesson's explorer says."""
    figure = explore_broken()._draw(program=name, instrument="memory")
    broken, alone = (line.get_ydata()[-1] for line in figure.axes[0].lines)
    plt.close(figure)
    assert broken / alone == pytest.approx(ratio, abs=0.01)
