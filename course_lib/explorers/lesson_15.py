"""The explorer of lesson 15."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from textwrap import fill

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call

from course_lib import style
from course_lib.doctor import INSTRUMENTS, Report
from course_lib.doctor.watching import State
from course_lib.exercises.broken.cases import CASES, Case
from course_lib.explorers.explorer import Explorer, choice

STEPS = 12


def explore_broken() -> Explorer:
    """Lesson 15: the loss of a broken program beside one device's, and what instruments say."""

    def draw(program: str, instrument: str) -> Figure:
        report = _examined(program)
        figure, (left, right) = style.figure(columns=2, height=3.6)
        _draw_losses(left, CASES[program], report)
        _draw_findings(right, report, instrument)
        return figure

    return Explorer(
        draw,
        program=choice("program", list(CASES), "accumulated"),
        instrument=choice("read in full", list(INSTRUMENTS), "replica against replica"),
    )


@cache
def _examined(program: str) -> Report:
    return CASES[program].examine(steps=STEPS)


def _draw_losses(ax: Axes, case: Case, report: Report) -> None:
    with torch.random.fork_rng(devices=[]):  # its numbers are replaced; the dice are not missed
        model = case.make_model()
    batches, moments = case.batches(STEPS), report.run.moments
    for name, marker, states in (
        ("broken", "o-", [moment.replicas[0] for moment in moments]),
        ("one device", "s--", [moment.alone for moment in moments]),
    ):
        losses = [_loss(case, model, state, *batches[0]) for state in states if state is not None]
        if losses:
            ax.plot(range(1, len(losses) + 1), losses, marker, label=name)
    ax.set(xlabel="step", ylabel="loss")
    ax.set_title("Loss on the first batch, no dropout")
    ax.legend()


def _loss(case: Case, model: nn.Module, state: State, x: object, y: object) -> float:
    """The loss with these parameters and buffers, as in evaluation."""
    model = deepcopy(model).eval()
    scores = functional_call(model, state.parameters | state.buffers, (x,))
    return float(case.loss(scores, y))  # type: ignore[arg-type]


def _draw_findings(ax: Axes, report: Report, instrument: str) -> None:
    found = {finding.instrument: finding for finding in report.findings}
    names = list(INSTRUMENTS)
    for row, name in enumerate(names):
        is_found, is_chosen = name in found, name == instrument
        words = f"from step {found[name].step} on" if is_found else "silent"
        colour = style.RED if is_found else style.GREY
        weight = "bold" if is_chosen else "normal"
        ax.text(0.0, -row, name, fontweight=weight)
        ax.text(0.5, -row, words, color=colour, fontweight=weight)
    reading = found[instrument].reading if instrument in found else "nothing found"
    ax.text(0.0, -len(names) - 0.2, fill(reading, 62), va="top", fontsize=9)
    ax.set(xlim=(0, 1), ylim=(-len(names) - 3.5, 1))
    ax.set_axis_off()
    ax.set_title("The instruments")
