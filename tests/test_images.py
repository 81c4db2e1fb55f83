"""The pictures: each is what its script draws, and can be read by eye and by screen reader."""

import re
import runpy
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from course_lib import pictures

IMAGES = Path(__file__).resolve().parent.parent / "images"
PICTURES = sorted(IMAGES.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
COLUMN = 900  # pixels: how wide a page or a notebook shows a picture
SMALLEST_FONT = 13

of_each_picture = pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)


def test_every_script_has_its_picture():
    scripts = {path.stem for path in IMAGES.glob("*.py")} - {"drawing"}
    drawn = {path.stem for path in IMAGES.glob("*.svg")} | {p.stem for p in IMAGES.glob("*.png")}
    assert PICTURES
    assert scripts == drawn


@of_each_picture
def test_script_draws_the_committed_bytes(picture, tmp_path, monkeypatch):
    for name in (f"{picture.stem}.py", "drawing.py"):
        shutil.copy(IMAGES / name, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "drawing", raising=False)
    runpy.run_path(str(tmp_path / f"{picture.stem}.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "drawing")
    assert (tmp_path / picture.name).read_bytes() == picture.read_bytes(), "run: make images"


@of_each_picture
def test_the_png_is_made_of_the_committed_svg_and_says_what_it_shows(picture):
    shown = pictures.picture(picture.stem)
    with Image.open(picture.with_suffix(".png")) as png:
        assert png.info["Source"] == sha256(picture.read_bytes()).hexdigest(), "run: make images"
        assert png.width == 1.5 * COLUMN
    root = ElementTree.parse(picture).getroot()
    assert shown.alt == f"{root.findtext(SVG + 'title')}. {root.findtext(SVG + 'desc')}"
    assert shown.width == COLUMN


def test_an_unknown_picture_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no picture 'rings' .* there are: .*ring"):
        pictures.picture("rings")


@of_each_picture
def test_picture_says_what_it_shows(picture):
    root = ElementTree.parse(picture).getroot()
    assert root.tag == SVG + "svg"
    assert root.findtext(SVG + "title")
    assert root.findtext(SVG + "desc")


@of_each_picture
def test_text_is_text_and_large_enough(picture):
    root = ElementTree.parse(picture).getroot()
    shown = min(1, COLUMN / float(root.get("viewBox").split()[2]))
    sizes = [
        float(size) for size in re.findall(r'font-size="([\d.]+)"', picture.read_text("utf-8"))
    ]
    assert root.findall(f".//{SVG}text")
    assert min(sizes) * shown >= SMALLEST_FONT


def test_a_moving_picture_is_whole_where_nothing_moves():
    svg = (IMAGES / "overlap.svg").read_text("utf-8")
    covers = re.findall(r'<rect class="cover\d+"[^>]*>', svg)
    assert covers and all('visibility="hidden"' in cover for cover in covers)
    still = re.sub(r"@media \(prefers-reduced-motion: no-preference\) \{ .*? \} \}", "", svg)
    assert "animation:" in svg and "animation:" not in still
    assert "linear 2 }" in svg, "it moves twice, and then stays"
    assert len(svg.encode()) < 100_000
