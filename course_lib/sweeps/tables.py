"""The stored tables: rows as dictionaries, and the best of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from csv import DictReader
from importlib.resources import files
from statistics import median
from typing import Any

Row = dict[str, Any]

_WHOLE = ("batch", "seed", "gpus", "within", "across", "peak")
_REAL = ("rate", "steps", "loss", "seconds", "bytes")


def read(name: str) -> list[Row]:
    """The rows of the table ``name``, such as ``"batches"``: a file beside this module."""
    text = files("course_lib.sweeps").joinpath(f"{name}.csv").read_text("utf-8")
    return [
        {key: _value(key, each) for key, each in row.items()}
        for row in DictReader(text.splitlines())
    ]


def _value(key: str, text: str) -> Any:
    if key in _WHOLE:
        return int(text)
    return float(text) if key in _REAL else text


def best_rates(rows: Iterable[Row], by: str) -> dict[Any, tuple[float, list[float]]]:
    """For each value of the column ``by``, its best learning rate and that rate's steps, by seed.

    The best is the one with the fewest steps in the median of its seeds; of equals, that with the
    fewest in all; of those, the lowest.
    """
    steps: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        steps[row[by]][row["rate"]].append(row["steps"])
    best = {}
    for key, by_rate in steps.items():
        rate = min(by_rate, key=lambda r: (median(by_rate[r]), sum(by_rate[r]), r))
        best[key] = (rate, by_rate[rate])
    return best
