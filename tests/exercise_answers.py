"""Answers to an exercise, right and wrong, and how a check must treat them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import nbformat
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
)
from torch.nn import functional as F

import course_lib
import notebook_tools
from course_lib.exercises.verdict import Verdict
from course_lib.parallel.collectives import all_gather, all_reduce, reduce_scatter, ring_all_reduce
from course_lib.planner import Layout

Answer = Callable[..., object]


def all_reduce_gradients(replicas: list[nn.Module]) -> None:
    """Lesson 02's own, which sums as often as it is called; the module's sums once."""
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        if all(parameter.grad is None for parameter in parameters):
            continue
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        all_reduce([parameter.grad for parameter in parameters])


# What a learner has at hand when they come to the exercises.
LESSON_NAMES = {
    "torch": torch,
    "nn": nn,
    "fully_shard": fully_shard,
    "Replicate": Replicate,
    "ColwiseParallel": ColwiseParallel,
    "PrepareModuleInput": PrepareModuleInput,
    "RowwiseParallel": RowwiseParallel,
    "F": F,
    "course_lib": course_lib,
    "dist": torch.distributed,
    "all_reduce_gradients": all_reduce_gradients,
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "ring_all_reduce": ring_all_reduce,
    "Layout": Layout,
}

BELITTLING = re.compile(r"\b(simply|just|obviously|trivially)\b", re.IGNORECASE)


@dataclass(eq=False)
class Answers:
    """One exercise's check, and the answers that its tests feed in.

    Use the methods as decorators: ``@SUM.wrong("in place")`` on a function says that the check
    refuses it, with these words in its message, and without those in ``unsaid``; ``@SUM.right``
    says that it accepts it.
    """

    lesson: str
    name: str
    check: Callable[[Answer], Verdict]
    wrong_answers: list[tuple[Answer, tuple[str, ...], str]] = field(
        default_factory=list, repr=False
    )
    right_answers: list[Answer] = field(default_factory=list, repr=False)

    def wrong(self, *words: str, unsaid: str = "") -> Callable[[Answer], Answer]:
        def keep(answer: Answer) -> Answer:
            self.wrong_answers.append((answer, words, unsaid))
            return answer

        return keep

    def right(self, answer: Answer) -> Answer:
        self.right_answers.append(answer)
        return answer

    @property
    def stub(self) -> Answer:
        """The function in the notebook that the learner has not touched."""
        exercise, nb = _from_notebook(self.lesson, self.name)
        return _last_function(nb.cells[exercise.stub_index].source, nb)

    @property
    def solution(self) -> Answer:
        """The function behind the notebook's *Solution*."""
        exercise, nb = _from_notebook(self.lesson, self.name)
        return _last_function(exercise.solution, nb)

    def judge(self, answer: Answer) -> Verdict:
        """What the check says about ``answer``: one line, in the course's tone."""
        verdict = self.check(answer)
        assert verdict.message and "\n" not in verdict.message
        assert not BELITTLING.search(verdict.message)
        assert verdict.status in verdict._repr_html_()
        return verdict


@cache
def _from_notebook(lesson: str, name: str) -> tuple[notebook_tools.Exercise, nbformat.NotebookNode]:
    (path,) = notebook_tools.NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    nb = nbformat.read(path, as_version=4)
    (exercise,) = (found for found in notebook_tools.exercises(nb) if found.name == name)
    return exercise, nb


def _last_function(source: str, nb: nbformat.NotebookNode) -> Answer:
    names = {**LESSON_NAMES, **_imports_of_the_set_up(nb)}
    exec(source, names)
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return names[functions[-1].name]


def _imports_of_the_set_up(nb: nbformat.NotebookNode) -> dict[str, object]:
    """What the set-up cell imports; the rest of it would make devices."""
    (set_up,) = [cell.source for cell in nb.cells if cell.id == "setup"]
    tree = ast.parse(set_up)
    tree.body = [part for part in tree.body if isinstance(part, ast.Import | ast.ImportFrom)]
    names: dict[str, object] = {}
    exec(compile(tree, "the set-up cell", "exec"), names)
    return names


def each_exercise(exercises: Iterable[Answers]) -> pytest.MarkDecorator:
    """Run a test once for each exercise."""
    return pytest.mark.parametrize("exercise", exercises, ids=lambda exercise: exercise.name)


def each_wrong_answer(exercises: Iterable[Answers]) -> pytest.MarkDecorator:
    """Run a test once for each wrong answer to each exercise."""
    return pytest.mark.parametrize(
        ("exercise", "answer", "words", "unsaid"),
        [
            pytest.param(exercise, answer, words, unsaid, id=_promise(exercise, answer))
            for exercise in exercises
            for answer, words, unsaid in exercise.wrong_answers
        ],
    )


def each_right_answer(exercises: Iterable[Answers]) -> pytest.MarkDecorator:
    """Run a test once for each answer that is right in another way than the solution."""
    return pytest.mark.parametrize(
        ("exercise", "answer"),
        [
            pytest.param(exercise, answer, id=_promise(exercise, answer))
            for exercise in exercises
            for answer in exercise.right_answers
        ],
    )


def _promise(exercise: Answers, answer: Answer) -> str:
    return f"{exercise.name}: {answer.__name__.replace('_', ' ')}"
