"""Keep a drawing of every position of every explorer's sliders, in course_lib/explorers/kept/.

    python tools/explorer_frames.py [NAME ...]       make frames

It draws an explorer anew if its own code has changed. If the code below it has, or the course's
data, it draws a sample first, and all the rest only if the sample looks different: most changes
move no picture, and all of them together take many minutes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import math
import pkgutil
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from course_lib import explorers, style
from course_lib.explorers import frames
from course_lib.explorers.explorer import Explorer, titles_of
from frame_sources import is_of_the_same_explorer, sources_of
from small_svg import as_svg

MOST_POSITIONS = 600  # of an explorer; of one that has more, some options are left out
MOST_BYTES = 1_000_000  # of an explorer, on the page
SAMPLE = 12  # positions that are drawn before all are


def makers() -> dict[str, Callable[[], Explorer]]:
    """All explorers of the lessons, by the name of the function that makes each."""
    found: dict[str, Callable[[], Explorer]] = {}
    for module in pkgutil.iter_modules(explorers.__path__):
        if module.name.startswith("lesson_"):
            members = vars(importlib.import_module(f"{explorers.__name__}.{module.name}"))
            found |= {name: make for name, make in members.items() if name.startswith("explore_")}
    return found


def drawn(explorer: Explorer, **values: Any) -> tuple[str, str]:
    """The picture of ``values``, or else of what the sliders are set to, and its titles."""
    figure = explorer.draw(**values)
    with style.look():
        svg = as_svg(figure)
    plt.close(figure)
    return svg, titles_of(figure)


def kept_options(explorer: Explorer) -> dict[str, list]:
    """The options of each control whose positions are kept: all, or as many as may be.

    Of numbers, one after the other is left out of the longest row, the one whose neighbours are
    the nearest to each other: never the first, the last, or the one that the explorer starts with.
    """
    options = _all_options(explorer)
    while math.prod(map(len, options.values())) > MOST_POSITIONS:
        spare = {
            name: [each for each in row[1:-1] if each != explorer.values[name]]
            for name, row in options.items()
            if not isinstance(row[0], str)
        }
        longest = max(spare, key=lambda name: (bool(spare[name]), len(options[name])))
        options[longest].remove(_least_missed(spare[longest], options[longest]))
    return options


def _least_missed(spare: list, row: list) -> Any:
    """Of the numbers ``spare`` of a row, that whose neighbours differ least; of several, one from
    the middle."""

    def gap(number: Any) -> float:
        place = row.index(number)
        before, after = row[place - 1], row[place + 1]
        return round((after - before) / (abs(after) + abs(before)), 6)

    smallest = min(map(gap, spare))
    alike = [number for number in spare if gap(number) == smallest]
    return alike[len(alike) // 2]


def positions(explorer: Explorer) -> Iterator[dict]:
    """All settings that are kept, the last control moving first."""
    options = kept_options(explorer)
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def has_more(explorer: Explorer) -> bool:
    """Whether it has positions that are not kept."""
    return _all_options(explorer) != kept_options(explorer)


def _all_options(explorer: Explorer) -> dict[str, list]:
    return {name: frames.options_of(each) for name, each in explorer.controls.items()}


def described(explorer: Explorer) -> list[dict]:
    """Its controls in words, as they are kept."""
    options = kept_options(explorer)
    return [frames.described(*each, options[each[0]]) for each in explorer.controls.items()]


def draw_all(explorer: Explorer, sources: str) -> frames.Frames:
    pictures = [drawn(explorer, **values) for values in positions(explorer)]
    svgs, titles = map(list, zip(*pictures, strict=True))
    return frames.Frames(described(explorer), svgs, titles, sources)


# ----------------------------------------------------------------------------- renewing


def renew(name: str, make: Callable[[], Explorer]) -> None:
    """Draw the explorer anew, as far as it may have changed, and say what was done.

    Raises:
        SystemExit: its pictures are too large for a page.
    """
    path = frames.path_of(name)
    sources = sources_of(make.__module__)
    kept = frames.read(path) if path.exists() else None
    if kept and kept.sources == sources:
        print(f"{name}: nothing has changed")
        return
    explorer = make()
    start = time.perf_counter()
    if kept and is_of_the_same_explorer(kept.sources, sources) and _still_right(explorer, kept):
        dataclasses.replace(kept, sources=sources).save(path)
        print(f"{name}: a sample of its {len(kept.frames)} positions, drawn anew, is as it was")
        return
    path.parent.mkdir(exist_ok=True)
    draw_all(explorer, sources).save(path)
    nbytes, seconds = _bytes_on_the_page(path), time.perf_counter() - start
    count = math.prod(map(len, kept_options(explorer).values()))
    print(f"{name}: {count} positions in {seconds:.0f} s, {nbytes / 1e3:.0f} kB on the page")
    if nbytes > MOST_BYTES:
        sys.exit(f"{name}: that is more than {MOST_BYTES / 1e6:g} MB on the page")


def _still_right(explorer: Explorer, kept: frames.Frames) -> bool:
    """Whether a sample of what is kept, another one for each version of it, is drawn the same."""
    if kept.controls != described(explorer):
        return False
    values = list(positions(explorer))
    chosen = random.Random(kept.sources).sample(range(len(values)), min(SAMPLE, len(values)))
    return all(
        drawn(explorer, **values[place]) == (kept.frames[place], kept.titles[place])
        for place in chosen
    )


def _bytes_on_the_page(path: Path) -> int:
    return path.stat().st_size * 4 // 3  # base64


def stale() -> dict[str, bool]:
    """The explorers whose code, or what it imports, has changed since their pictures were kept.

    True: all of it must be drawn anew. False: a sample tells whether it must be.
    """
    found = {}
    for name, make in makers().items():
        path, sources = frames.path_of(name), sources_of(make.__module__)
        kept = frames.read(path).sources if path.exists() else ""
        if kept != sources:
            found[name] = not is_of_the_same_explorer(kept, sources)
    return found


def main(names: list[str]) -> None:
    matplotlib.use("agg")
    known = makers()
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"there is no explorer {', '.join(unknown)}; there are: {', '.join(known)}")
    gc.collect()
    gc.freeze()  # each measurement's fresh devices collect garbage: not among all that was imported
    for name in names or known:
        renew(name, known[name])


if __name__ == "__main__":
    main(sys.argv[1:])
