"""Answers right and wrong to every exercise, a module a lesson."""

from importlib import import_module
from pkgutil import iter_modules

from exercise_answers import Answers


def all_exercises() -> list[Answers]:
    """Every lesson's exercises, in reading order, with the answers that their tests feed in."""
    modules = sorted(module.name for module in iter_modules(__path__))
    return [
        exercise for name in modules for exercise in import_module(f"{__name__}.{name}").EXERCISES
    ]
