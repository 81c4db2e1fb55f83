"""A deck for each lesson, for a teacher to edit and to show.

    python tools/slides.py FOLDER        (needs python-pptx)

A slide asks what the lesson asks, one shows its picture, one each figure and each answer to a
prediction, in the lesson's order; what the lesson says between them is in the speaker's notes.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from notebook_tools import folder_of, lessons, said

# Inches: a slide, and what is left of it for its contents below the title.
WIDTH, HEIGHT, MARGIN, TOP = 13.333, 7.5, 0.6, 1.5
MOST_LINES = 16  # of printed text that can be read from the last row
TYPE_IT = r"[:.]? [Tt]ype .*$"  # what a notebook asks for, and nobody can do on a slide


@dataclass
class Slide:
    """What stands on one slide.

    Attributes:
        title: one line.
        bullets: lines of text.
        printed: what a cell printed, or nothing.
        picture: a PNG, or nothing.
        notes: for the speaker.
    """

    title: str
    bullets: list[str] = field(default_factory=list)
    printed: str = ""
    picture: bytes = b""
    notes: str = ""


def slides_of(nb: NotebookNode) -> list[Slide]:
    """The slides of a lesson."""
    return [
        _title_slide(nb),
        _question_slide(nb),
        *_shown(nb),
        Slide("Exercises", [_plain(each) for each in _headings(nb, "### ") if "minutes)" in each]),
        Slide("What you can now explain", _bullets(_cell(nb, "summary"))),
    ]


def _title_slide(nb: NotebookNode) -> Slide:
    lines = nb.cells[0].source.splitlines()
    title = _plain(lines[0].removeprefix("# "))
    return Slide(title, [_plain(line) for line in lines[1:] if line.startswith("**")])


def _question_slide(nb: NotebookNode) -> Slide:
    source = _cell(nb, "question")
    asked = [_plain(text) for text in re.findall(r"\*\*([^*]+\?)\*\*", source)]
    guesses = re.findall(
        r"^guess_\w+ = None  # (.+)$",
        "\n".join(cell.source for cell in nb.cells if cell.id.startswith("guess-")),
        re.MULTILINE,
    )
    asked += [f"Your guess: {_plain(re.sub(TYPE_IT, '', guess))}" for guess in guesses]
    return Slide("The question", asked, notes=source)


def _shown(nb: NotebookNode) -> Iterator[Slide]:
    """A slide for each figure, and for each cell that answers a prediction."""
    title, notes = "", ""
    everything = "\n".join(cell.source for cell in nb.cells)
    guesses = re.findall(r"^(guess_\w+) = None", everything, re.MULTILINE)
    for cell in nb.cells:
        if cell.id.startswith("ex-"):
            return
        if cell.cell_type == "markdown":
            headings = re.findall(r"^##+ (.+)$", cell.source, re.MULTILINE)
            title = _plain(headings[-1]) if headings else title
            notes = cell.source
            continue
        for picture in _pictures(cell):
            yield Slide(title, picture=picture, notes=notes)
        answers = any(name in cell.source for name in guesses) and not cell.id.startswith("guess-")
        lines = [line for line in said(cell).splitlines() if not line.startswith("<Figure")]
        if answers and lines:
            yield Slide(title, printed="\n".join(lines[:MOST_LINES]), notes=notes)


def _pictures(cell: NotebookNode) -> Iterator[bytes]:
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            yield base64.b64decode(output.data["image/png"])


def _cell(nb: NotebookNode, cell_id: str) -> str:
    return next(cell.source for cell in nb.cells if cell.id == cell_id)


def _headings(nb: NotebookNode, mark: str) -> list[str]:
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    return [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]


def _bullets(source: str) -> list[str]:
    return [_plain(line[2:]) for line in source.splitlines() if line.startswith("* ")]


def _plain(markdown: str) -> str:
    """A line without Markdown's marks."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown)
    return re.sub(r"\*\*|`|(?<!\w)\*(?!\s)|(?<!\s)\*(?!\w)", "", text).strip()


# ------------------------------------------------------------------------------ writing the file


def write_deck(slides: list[Slide], path: Path) -> None:
    """Write the slides to a file that PowerPoint, Keynote and LibreOffice open."""
    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    layout = deck.slide_layouts[6]  # without boxes of its own
    for slide in slides:
        page = deck.slides.add_slide(layout)
        _write_text(page, [slide.title], top=0.4, height=0.9, size=32, bold=True)
        if slide.bullets:
            _write_text(page, slide.bullets, top=TOP, height=HEIGHT - TOP - MARGIN, size=22)
        if slide.printed:
            _write_text(page, slide.printed.splitlines(), TOP, 5.0, 18, font="Consolas")
        if slide.picture:
            _write_picture(page, slide.picture)
        page.notes_slide.notes_text_frame.text = slide.notes
    deck.save(str(path))


def _write_text(
    page: Any,
    lines: list[str],
    top: float,
    height: float,
    size: int,
    bold: bool = False,
    font: str = "Calibri",
) -> None:
    from pptx.util import Inches, Pt

    box = page.shapes.add_textbox(
        Inches(MARGIN), Inches(top), Inches(WIDTH - 2 * MARGIN), Inches(height)
    )
    frame = box.text_frame
    frame.word_wrap = True
    for number, line in enumerate(lines):
        paragraph = frame.paragraphs[0] if number == 0 else frame.add_paragraph()
        run = paragraph.add_run()
        run.text = line
        run.font.size, run.font.bold, run.font.name = Pt(size), bold, font
        if font == "Calibri":
            paragraph.space_after = Pt(10)


def _write_picture(page: Any, picture: bytes) -> None:
    """The picture as large as fits below the title, in the middle."""
    from pptx.util import Inches

    with Image.open(io.BytesIO(picture)) as pixels:
        ratio = pixels.width / pixels.height
    width = min(WIDTH - 2 * MARGIN, (HEIGHT - TOP - MARGIN) * ratio)
    page.shapes.add_picture(
        io.BytesIO(picture), Inches((WIDTH - width) / 2), Inches(TOP), width=Inches(width)
    )


def main(arguments: list[str]) -> None:
    folder = folder_of(arguments, "say where the decks go: python tools/slides.py FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    for lesson in lessons():
        slides = slides_of(nbformat.read(lesson, as_version=4))
        path = folder / f"{lesson.stem}.pptx"
        write_deck(slides, path)
        print(f"{path}: {len(slides)} slides")


if __name__ == "__main__":
    main(sys.argv[1:])
