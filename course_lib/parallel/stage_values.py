"""What goes from one stage of a pipeline to the next: a tensor, or a tuple of several.

A tuple (or list) may have tuples in it, and things that need not be moved: ``None`` for what is
not there, numbers, words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

NOT_MOVED = (type(None), int, float, str)


def each(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """``value`` with ``function(item)`` in place of every item of that ``kind``.

    Raises:
        TypeError: there is something in it that cannot be handed on, such as a dictionary.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        make = getattr(value, "_make", type(value))  # a named tuple is made in its own way
        return make([each(item, kind, function) for item in value])
    if isinstance(value, NOT_MOVED):
        return value
    raise TypeError(
        f"a stage hands on a {type(value).__name__}: what goes from stage to stage is a tensor, "
        "or a tuple of tensors, numbers and None"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of ``value``, from left to right."""
    found: list[Tensor] = []
    each(value, Tensor, found.append)
    return found
