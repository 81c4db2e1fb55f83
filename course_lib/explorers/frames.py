"""Pictures that are kept: one drawing for each position of an explorer's sliders.

With them an explorer answers at once, and the web page has it without a kernel. They are made by
``tools/explorer_frames.py``, one file an explorer, ``kept/NAME.json.gz``, which holds::

    controls   [{"name", "label", "options": [words], "start": place}, ...], from the top down;
               of an explorer with very many positions, not all options
    frames     an SVG for each position; the last control moves first, as in itertools.product
    titles     what each picture says of itself, for those who do not see it
    sources    a hash of the code that they were drawn with
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets

FOLDER = Path(__file__).resolve().parent / "kept"


@dataclass(frozen=True)
class Frames:
    """The kept pictures of one explorer; the module says what stands in it."""

    controls: list[dict[str, Any]]
    frames: list[str]
    titles: list[str]
    sources: str

    def place(self, values: Mapping[str, Any]) -> int | None:
        """Which picture belongs to what the controls are set to; None if it is not kept."""
        place = 0
        for control in self.controls:
            options, value = control["options"], str(values[control["name"]])
            if value not in options:
                return None
            place = place * len(options) + options.index(value)
        return place

    def save(self, path: Path) -> None:
        """As few bytes as can be, and the same ones each time."""
        text = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


@lru_cache(2)
def read(path: Path) -> Frames:
    return Frames(**json.loads(gzip.decompress(path.read_bytes())))


def path_of(name: str) -> Path:
    """Where the pictures of the explorer that ``name()`` makes are kept, if they are."""
    return FOLDER / f"{name}.json.gz"


def frames_of(draw: Callable, controls: Mapping[str, ipywidgets.ValueWidget]) -> Frames | None:
    """The kept pictures of one of the course's own explorers, which draws with ``draw``.

    None if there are none, or if they are those of other sliders.
    """
    path = path_of(draw.__qualname__.partition(".")[0])
    if not draw.__module__.startswith(__package__ + ".lesson_") or not path.exists():
        return None
    kept = read(path)
    alike = len(kept.controls) == len(controls) and all(
        _is_of(control, *now) for control, now in zip(kept.controls, controls.items(), strict=True)
    )
    return kept if alike else None


def _is_of(kept: dict[str, Any], name: str, control: ipywidgets.ValueWidget) -> bool:
    words = [str(option) for option in options_of(control)]
    same_names = kept["name"] == name and kept["label"] == control.description
    return same_names and set(kept["options"]) <= set(words)


def options_of(control: ipywidgets.ValueWidget) -> list:
    """All values of a control, from left to right."""
    return [False, True] if isinstance(control.value, bool) else list(control.options)


def described(name: str, control: ipywidgets.ValueWidget, options: list) -> dict[str, Any]:
    """A control in words, with those of its options that are kept."""
    return {
        "name": name,
        "label": control.description,
        "options": [str(option) for option in options],
        "start": options.index(control.value),
    }
