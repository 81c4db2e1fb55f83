"""Lay out what the web page is made of, in one folder, for Sphinx: ``make site``.

Nothing is executed, and nothing is kept twice in the repository: the pages of ``docs/``, the
committed notebooks and the pictures they link to are copied to ``build/site-source/``. On the way

- links between files become links between pages; a linked file that is no page can be downloaded;
- each picture in a notebook gets words for those who do not see it;
- an explorer gets its sliders, if its pictures are kept;
- the map of the lessons and the pages of the reference are written.

It says of which explorers the pictures may be out of date.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from matplotlib import font_manager
from nbformat import NotebookNode

import explorer_frames
import formulas
import reference_pages
from course_lib.explorers import frames
from lesson_map import as_svg, as_table, lesson_of
from notebook_tools import ROOT, folder_of, lessons
from picture_words import words_for

# Where a file of the repository is on the web page; the rest of docs/ is at the top.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "course_lib/ranks/TRIED.md": "tried.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_BADGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)\s]*\)")
_IMPORT = re.compile(r"from course_lib\.explorers\.lesson_\w+ import (explore_\w+)")


def stage(folder: Path) -> None:
    """Fill ``folder`` anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_frames(folder)
    for page in pages():
        _stage_page(page, folder)
    for path in lessons():
        _stage_lesson(path, folder)
    reference_pages.write(folder / "reference")


def pages() -> list[Path]:
    """All files of the repository that become a page, but lessons; docs/index.md is the README."""
    outside = [ROOT / name for name in PAGES if name != "README.md"]
    return [*(ROOT / "docs").rglob("*.md"), *outside]


# ------------------------------------------------------------------------------------- links


def place_of(path: Path) -> str:
    """Where a file of the repository stands on the page, as a path from its top."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith(("notebooks/", "images/")):
        return name
    if name.startswith("docs/"):
        return name.removeprefix("docs/").replace("/README.md", "/index.md")
    return f"files/{name}"


def relinked(text: str, path: Path, folder: Path) -> str:
    """``text`` of the file ``path``, with links that lead to the same files from its new place."""
    here = Path(place_of(path)).parent

    def moved(link: re.Match) -> str:
        target = Path(os.path.normpath(path.parent / link[2]))
        if target.is_dir() and target.is_relative_to(ROOT / "docs"):
            return f"{link[1]}#pages-in-this-part{link[3]}"
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        place = place_of(target)
        is_page = target.suffix in (".md", ".ipynb") and not place.startswith("files/")
        if not is_page:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, folder / place)
        return f"{link[1]}{Path(os.path.relpath(place, here)).as_posix()}{link[3]}"

    return _LINK.sub(moved, text)


# ------------------------------------------------------------------------------------- pages


def _stage_page(path: Path, folder: Path) -> None:
    text = relinked(path.read_text(encoding="utf-8"), path, folder)
    readme = ROOT / "README.md"
    text = re.sub(
        r"<!-- README: (.*) -->",
        lambda found: relinked(readme_section(found[1]), readme, folder),
        text,
    )
    text = _BADGE.sub(r"\1", text)  # a badge is a picture from elsewhere: here its words lead on
    if path.name == "index.md":
        text = text.replace("<!-- map -->", _map())
        text = text.replace("<!-- other pages -->", "\n".join(_pages_not_in(text)))
    if path.name == "README.md":
        text += _pages_below(path.parent)
    if path == formulas.PAGE:
        text = formulas.drawn(text)
    if path.name == "glossary.md":
        text = re.sub(r"^\| (?!word \|)(\w[^|]*) \|", _anchored, text, flags=re.MULTILINE)
    target = folder / place_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def _pages_not_in(front: str) -> list[str]:
    """What the front page does not list by itself: a page of docs/, and a folder's first page."""
    docs = ROOT / "docs"
    pages = [page.stem for page in docs.glob("*.md")]
    pages += [f"{page.parent.name}/index" for page in docs.glob("*/README.md")]
    return sorted(page for page in pages if page != "index" and f"\n{page}\n" not in front)


def _pages_below(folder: Path) -> str:
    """The list of the pages in a folder of docs/, which its first page ends with."""
    pages = sorted(folder.rglob("*.md"))
    names = [each.relative_to(folder).with_suffix("").as_posix() for each in pages]
    listed = "\n".join(name for name in names if name != "README")
    heading = "## Pages in this part"
    return f"\n{heading}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n" if listed else ""


def readme_section(title: str) -> str:
    """What stands below a heading of the README, so that it is written once.

    Raises:
        ValueError: the README has no such heading.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^(##+) {re.escape(title)}\n(.*?)(?=^##? |\Z)", text, re.M | re.DOTALL)
    if not found:
        raise ValueError(f"a page of docs/ asks for the section {title!r}, which README.md has not")
    return re.sub(r"^#(##+ )", r"\1", found[2].strip(), flags=re.MULTILINE)


def _map() -> str:
    found = [lesson_of(path.stem, _first_cell(path)) for path in lessons()]
    return f"{as_svg(found)}\n\n{as_table(found)}"


def _first_cell(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source


def _anchored(row: re.Match) -> str:
    return f'| <span id="{anchor_of(row[1])}"></span>{row[1]} |'


def anchor_of(word: str) -> str:
    """The place of a word on the page of the glossary."""
    return "word-" + re.sub(r"[^a-z0-9]+", "-", word.lower())


# ----------------------------------------------------------------------------------- lessons


def _stage_lesson(path: Path, folder: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for index, cell in enumerate(notebook.cells):
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, path, folder)
            if index:  # a page has one title
                cell.source = re.sub(r"^# ", "## ", cell.source)
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                words = words_for(notebook.cells, index)
                cell.metadata["mystnb"] = {"image": {"alt": words}}
                cells += _sliders(cell)
    notebook.cells = cells
    target = folder / place_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def _is_progress(output: NotebookNode) -> bool:
    """A bar that a run left behind, at nothing done."""
    return bool(re.match(r" *0%\|", output.get("data", {}).get("text/plain", "")))


def _sliders(cell: NotebookNode) -> list[NotebookNode]:
    """What the page's script makes sliders of, below a cell that shows an explorer."""
    imported = _IMPORT.search(cell.source)
    if not imported or not frames.path_of(imported[1]).exists():
        return []
    name = imported[1]
    kept = frames.read(frames.path_of(name)).controls
    some_are_left_out = explorer_frames.has_more(explorer_frames.makers()[name]())
    # < as a number: else words of a control could end the script that holds them.
    data = json.dumps({"controls": kept, "isPart": some_are_left_out}).replace("<", "\\u003c")
    html = (
        f'<div class="explorer" data-name="{name}" data-source="../frames/{name}.js">\n'
        f'<script type="application/json">{data}</script>\n</div>'
    )
    return [nbformat.v4.new_markdown_cell(html, id=f"{cell.id}-sliders")]


def _write_frames(folder: Path) -> None:
    """The kept pictures as scripts, which a page may load from a disk too, and their font."""
    target = folder / "_extra" / "frames"
    target.mkdir(parents=True)
    letters = set()
    for path in sorted(frames.FOLDER.glob("*.json.gz")):
        name = path.name.removesuffix(".json.gz")
        packed = base64.b64encode(path.read_bytes()).decode()
        (target / f"{name}.js").write_text(f'explorerFrames("{name}", "{packed}");\n')
        letters |= set("".join(frames.read(path).frames))
    _write_font(letters, target / "words.woff")


def _write_font(letters: set[str], path: Path) -> None:
    """Matplotlib's font, with the letters alone that are used."""
    from fontTools import subset

    options = subset.Options(flavor="woff", layout_features=["kern"])
    options.drop_tables += ["FFTM"]
    font = subset.load_font(font_manager.findfont("DejaVu Sans"), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(letters))
    subsetter.subset(font)
    subset.save_font(font, str(path), options)


def main(arguments: list[str]) -> None:
    stage(folder_of(arguments, "say where it goes: python tools/stage_site.py FOLDER"))
    for name, is_another in explorer_frames.stale().items():
        what = (
            "its own code has changed: `make frames` draws all of it anew"
            if is_another
            else "code below it has changed: `make frames` draws a sample, to see if it looks alike"
        )
        print(f"{name}: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
