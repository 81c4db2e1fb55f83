"""Keep a drawing of every position of every explorer's sliders, in course_lib/explorers/kept/.

``make frames`` draws those anew whose code has changed: the explorer's own, and all that it imports
of the course, comments and docstrings aside. ``python tools/explorer_frames.py NAME`` draws one.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import io
import itertools
import math
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course_lib import explorers, style
from course_lib.explorers import frames
from course_lib.explorers.explorer import Explorer, titles_of

ROOT = Path(__file__).resolve().parent.parent
MOST_POSITIONS = 600  # of an explorer; of one that has more, some options are left out
MOST_BYTES = 1_000_000  # of an explorer, on the page: base64 of its file

# Colours that the page's dark theme changes. Elsewhere the second is what holds.
THEMED = {
    "#ffffff": "var(--ground,#fff)",
    "#222222": "var(--ink,#222)",
    "#000000": "var(--ink,#222)",
    "#8a8a8a": "var(--grey,#8a8a8a)",
    "#ededed": "var(--pale,#ededed)",
}


# A shape that Matplotlib defines, and then uses in one place alone.
_USED_ONCE = re.compile(
    r'<defs><path id="(\w+)" d="([^"]*)"( style="[^"]*")?/></defs>(<g clip-path="[^"]*">)'
    r'<use href="#\1" x="([^"]*)" y="([^"]*)"( style="[^"]*")/>(?!<use href="#\1")'
)


def makers() -> dict[str, Callable[[], Explorer]]:
    """All explorers of the lessons, by the name of the function that makes each."""
    found: dict[str, Callable[[], Explorer]] = {}
    for module in pkgutil.iter_modules(explorers.__path__):
        if module.name.startswith("lesson_"):
            members = vars(importlib.import_module(f"{explorers.__name__}.{module.name}"))
            found |= {name: make for name, make in members.items() if name.startswith("explore_")}
    return found


def as_svg(figure: Figure) -> str:
    """A figure as a small SVG: text is text, places are tenths of a point."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg )|<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(),
                 flags=re.DOTALL)  # fmt: skip
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>", _root, svg, count=1)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"<[^>]*>", _small_tag, svg)
    svg = _USED_ONCE.sub(r'\4<path d="\2" transform="translate(\5 \6)"\7/>', svg)
    while "<g></g>" in svg:
        svg = svg.replace("<g></g>", "")
    return svg


def _small_tag(found: re.Match) -> str:
    tag = re.sub(r"\s+", " ", found[0])
    tag = re.sub(r' id="[A-Za-z.]+(2d)?_\d+"', "", tag)  # of groups; nothing refers to them
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r"-?\d+\.\d+(?:e-\d+)?", _rounded, tag)
    tag = re.sub(r"font-size: ([\d.]+)px; font-family: [^;\"]*", r"font-size:\1px", tag)
    tag = re.sub(r"([;:]) ", r"\1", tag)
    for color, themed in THEMED.items():
        tag = tag.replace(color, themed)
    return re.sub(r' d="[^"]*"', _small_path, tag)


def _small_path(found: re.Match) -> str:
    path = re.sub(r" ?([MLCQz]) ?", r"\1", found[0])
    path = re.sub(r"M(\S+) ([^L]+)L\1 ([^L]+)L([^L ]+) \3L\4 \2z", r"M\1 \2V\3H\4V\2z", path)
    return re.sub(r"M(\S+) ([^L]+)L([^L ]+) \2L\3 ([^L]+)L\1 \4z", r"M\1 \2H\3V\4H\1z", path)


def _root(found: re.Match) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {found[1]} '
        'style="stroke-linejoin:round;font-family:DejaVu Sans,Verdana,sans-serif">'
    )


def _rounded(found: re.Match) -> str:
    return f"{round(float(found[0]), 1) + 0:.6g}"  # + 0, since -0 is 0


def words_in(svg: str) -> list[str]:
    """All that is written in a picture."""
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


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
    options = {name: frames.options_of(each) for name, each in explorer.controls.items()}
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
    options = {name: frames.options_of(each) for name, each in explorer.controls.items()}
    return options != kept_options(explorer)


def described(explorer: Explorer) -> list[dict]:
    """Its controls in words, as they are kept."""
    options = kept_options(explorer)
    return [frames.described(*each, options[each[0]]) for each in explorer.controls.items()]


def draw_all(explorer: Explorer, sources: str) -> frames.Frames:
    pictures = [drawn(explorer, **values) for values in positions(explorer)]
    svgs, titles = map(list, zip(*pictures, strict=True))
    return frames.Frames(described(explorer), svgs, titles, sources)


# -------------------------------------------------------------- what a picture depends on


def sources_of(module: str) -> str:
    """A hash of a module and of all that it imports of the course, without comments."""
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in seen or name in _SHOWING or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen[name] = ast.dump(_without_docstrings(tree))
        waiting += _imports(tree)
    whole = "\n".join(f"{name} {code}" for name, code in sorted(seen.items()))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


# They show pictures and draw none.
_SHOWING = ("course_lib.explorers.explorer", "course_lib.explorers.frames")


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = path / "__init__.py", path.with_suffix(".py")
    return next((each for each in candidates if each.is_file()), None)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("course_lib"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("course_lib"):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        match body:
            case [ast.Expr(ast.Constant()), *_]:
                del body[0]
    return tree


def renew(name: str, make: Callable[[], Explorer]) -> None:
    path = frames.path_of(name)
    sources = sources_of(make.__module__)
    if path.exists() and frames.read(path).sources == sources:
        print(f"{name}: nothing has changed")
        return
    explorer = make()
    start = time.perf_counter()
    path.parent.mkdir(exist_ok=True)
    draw_all(explorer, sources).save(path)
    seconds = time.perf_counter() - start
    nbytes = path.stat().st_size * 4 // 3
    count = len(frames.read(path).frames)
    print(f"{name}: {count} positions in {seconds:.0f} s, {nbytes / 1e3:.0f} kB on the page")
    if nbytes > MOST_BYTES:
        sys.exit(f"{name}: that is more than {MOST_BYTES / 1e6:g} MB")


def main(names: list[str]) -> None:
    matplotlib.use("agg")
    known = makers()
    gc.collect()
    gc.freeze()  # each measurement's fresh devices collect garbage: not among all that was imported
    for name in names or known:
        renew(name, known[name])


if __name__ == "__main__":
    main(sys.argv[1:])
