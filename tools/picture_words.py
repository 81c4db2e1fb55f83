"""Words for a notebook's pictures, for those who do not see them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nbformat import NotebookNode

_TITLE = re.compile(r"(?:set_title\(|\btitle=)\s*f?\"([^\"]+)\"")
_LABEL = re.compile(r"\b([xy])label(?:=|\()\s*f?\"([^\"]+)\"")
_LONGEST = 300  # letters: more is for the text beside it


def words_for(cells: Sequence[NotebookNode], index: int) -> str:
    """What the picture that the cell shows is of.

    A picture of ``images/`` brings its own words, and an explorer its settings. A figure has its
    title, what its axes are, and the first sentence that the lesson says of it below (two, if the
    first is short).
    """
    cell = cells[index]
    for output in cell.outputs:
        metadata = output.get("metadata", {})
        own = metadata.get("alt") or metadata.get("image/png", {}).get("alt")
        if own:
            return str(own)
        shown = output.get("data", {}).get("text/plain", "")
        if shown.startswith("<explorer: "):
            return f"An explorer at one of its settings: {shown[len('<explorer: ') : -1]}"
    titles = [_plain(title) for title in _TITLE.findall(cell.source)]
    if not titles:
        titles = [_heading(cells, index)]
    below = _first_sentence(cells[index + 1]) if index + 1 < len(cells) else ""
    words = "; ".join(titles + _axes(cell.source))
    return f"Figure: {words}. {below}".strip()[:_LONGEST]


def _axes(source: str) -> list[str]:
    """What is drawn against what, for each axes that has words at both of its sides."""
    labels = {side: [_plain(each) for at, each in _LABEL.findall(source) if at == side]
              for side in "xy"}  # fmt: skip
    if len(labels["x"]) != len(labels["y"]):
        return []
    both = zip(labels["y"], labels["x"], strict=True)
    return list(dict.fromkeys(f"{y} against {x}" for y, x in both))


def _plain(title: str) -> str:
    """A title in which numbers that the program puts in are missing, or have their names."""
    start = re.sub(r"[:,(]?\s*\{[^}]*\}.*", "", title).strip()
    return start or re.sub(r"\{(\w*)[^}]*\}|[{}]", r"\1", title).strip()


def _heading(cells: Sequence[NotebookNode], index: int) -> str:
    for cell in reversed(cells[:index]):
        found = re.findall(r"^#+ (.*)", cell.source, re.MULTILINE) if _is_text(cell) else []
        if found:
            return str(found[-1])
    return ""


def _first_sentence(cell: NotebookNode) -> str:
    if not _is_text(cell) or cell.source.startswith(("#", "<", "|")):
        return ""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`$]", lambda m: m[1] or "", cell.source.split("\n")[0])
    first, *rest = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return f"{first} {rest[0]}" if rest and len(first) < 30 else first


def _is_text(cell: NotebookNode) -> bool:
    return bool(cell.cell_type == "markdown")
