"""What the web page is made of, as far as it can be tested without building it."""

import importlib
import math
import pkgutil
import re
import runpy

import nbformat
import pytest
import torch
from matplotlib.figure import Figure

import addresses
import explorer_frames
import formulas
import frame_sources
import reference_pages
import small_svg
import stage_site
from course_lib import CLASSROOM, parallel
from course_lib.explorers import frames, lesson_00, lesson_03
from course_lib.explorers.explorer import Explorer, choice
from course_lib.planner import activations, layer_work, layouts, models, timing
from lesson_map import Lesson, as_svg, as_table, direct_needs, lesson_of, rows_of
from notebook_tools import ROOT, lessons
from picture_words import words_for

DOCS = sorted((ROOT / "docs").rglob("*.md"))
LESSONS = [
    lesson_of(path.stem, nbformat.read(path, as_version=4).cells[0].source) for path in lessons()
]

# ---------------------------------------------------------------------------------- formulas

MODULES = {
    module.name: importlib.import_module(f"{parallel.__name__}.{module.name}")
    for module in pkgutil.iter_modules(parallel.__path__)
}
PLANNER = (activations, layer_work, layouts, models, timing)
MODULES |= {module.__name__.rpartition(".")[2]: module for module in PLANNER}
SPEC = CLASSROOM
NAMES = "NSpmkngclhvstAbdxyTEKf"
VALUES = [
    dict(zip(NAMES, values, strict=True))
    for values in (
        (2, 4096, 2, 8, 5, 7, 2, 1, 3, 64, 100, 32, 1, 4, 2, 6, 5.0, 3.0, 10, 4, 1, 1.0),
        (4, 8192, 4, 16, 3, 2, 4, 2, 8, 512, 1000, 256, 2, 8, 1, 32, 9.0, 2.0, 50, 8, 2, 1.25),
        (8, 1 << 20, 8, 32, 64, 1, 8, 4, 24, 1024, 51200, 2048, 4, 16, 4, 8, 7.0, 6.0, 9, 8, 3, 2),
    )
]


@pytest.mark.parametrize("row", formulas.formulas(), ids=lambda row: row.what)
def test_a_formula_says_what_its_code_computes(row: formulas.Formula) -> None:
    gpu = {"a": SPEC.latency, "B": SPEC.link_bandwidth, "M": SPEC.memory_bandwidth}
    gpu |= {"w": SPEC.network.latency, "W": SPEC.network.bandwidth}
    functions = {"ceil": math.ceil, "log2": math.log2, "min": min, "sqrt": math.sqrt}
    for values in VALUES:
        expected = eval(row.formula, functions | gpu | values)
        found = eval(row.code, MODULES | {"gpu": SPEC, "torch": torch} | values)
        assert found == pytest.approx(expected)


def test_every_row_of_the_page_of_formulas_is_read() -> None:
    rows = re.findall(r"^\| [^|\n]+ \|.*\[\d\d\]\(", formulas.PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(formulas.formulas()) == len(rows) >= 30


@pytest.mark.parametrize(
    ("formula", "latex"),
    [
        ("2 * (N - 1) / N * S", r"\frac{2 \, (N - 1)}{N} \, S"),
        ("ceil(log2(N)) * min(p, m)", r"\lceil \log_2 N \rceil \, \min(p, m)"),
        ("1 - 1 / p", r"1 - \frac{1}{p}"),
        ("sqrt(N)", r"\sqrt{N}"),
    ],
)
def test_a_formula_is_drawn_as_it_is_computed(formula: str, latex: str) -> None:
    assert formulas.as_latex(formula) == latex


def test_the_sheet_of_formulas_is_of_the_page_as_it_is() -> None:
    folder = ROOT / "docs" / "teaching"
    handout = runpy.run_path(str(folder / "handout.py"))
    svg = (folder / "handout.svg").read_text("utf-8")
    assert handout["source"]() in svg, "run: python docs/teaching/handout.py"
    assert f"<dc:title>{handout['TITLE']}</dc:title>" in svg
    assert (folder / "handout.pdf").read_bytes().count(b"/Type /Page /Parent") == 1


def test_the_parts_of_the_page_of_formulas_are_its_headings() -> None:
    parts = formulas.parts()
    assert [part.title for part in parts][::4] == ["What moves", "What a batch buys"]
    assert parts[0].rows[0].lesson == "03" and parts[0].letters == ""
    assert parts[-1].letters.startswith("A gradient of **b** examples")
    assert formulas.letters().startswith("**N** GPUs; **S** bytes")


# -------------------------------------------------------------------------- the map of lessons


def lesson(number: str, *needs: str) -> Lesson:
    return Lesson(f"{number}_x", "X & Y", "a thing", needs, 10, 5)


def test_every_lesson_is_below_all_that_it_needs() -> None:
    row = {each.number: place for place, row in enumerate(rows_of(LESSONS)) for each in row}
    assert set(row) == {path.stem[:2] for path in lessons()}
    for each in LESSONS:
        assert all(row[need] < row[each.number] for need in each.needs if need in row)
        assert all(need < each.number for need in each.needs), "a lesson needs a later one"


def test_the_map_leaves_out_what_follows_from_the_rest() -> None:
    few = [lesson("00"), lesson("01", "00"), lesson("02", "00", "01"), lesson("03", "01", "02")]
    assert direct_needs(few) == {"00": set(), "01": {"00"}, "02": {"01"}, "03": {"02"}}
    assert as_svg(few).count('class="arrow"') == 3
    assert "\n\n" not in as_svg(few), "Markdown would end the drawing there"
    assert "X &amp; Y" in as_svg(few)


def test_the_map_in_words_adds_up() -> None:
    table = as_table([lesson("00"), lesson("01", "00")])
    assert "| [00](notebooks/00_x.ipynb) | 10 + 5 |" in table
    assert "**0 + 0 hours**" in table


def test_a_range_of_lessons_is_all_of_them() -> None:
    first_cell = (
        "# 09 · T\n\n**You will build:** a.\n\n**You need:** lessons 02 to 04.\n\n"
        "**Time:** 5 minutes, and 6 more for the exercises."
    )
    assert lesson_of("09_t", first_cell).needs == ("02", "03", "04")
    with pytest.raises(ValueError, match="lacks its title, aim, needs or minutes"):
        lesson_of("09_t", "# 09 · T")


# --------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_a_page_takes_from_the_readme_what_is_there(page) -> None:
    for title in re.findall(r"<!-- README: (.*) -->", page.read_text(encoding="utf-8")):
        assert stage_site.readme_section(title)


def test_a_section_that_the_readme_has_not_is_named() -> None:
    with pytest.raises(ValueError, match="'Nowhere', which README"):
        stage_site.readme_section("Nowhere")


def test_links_lead_to_the_same_files_from_their_new_place(tmp_path) -> None:
    text = "[a](../README.md#start) [b](01_single_gpu_baseline.ipynb) [c](../course_lib/data.py)"
    moved = stage_site.relinked(text, ROOT / "notebooks" / "00_meet_your_gpus.ipynb", tmp_path)
    assert moved == (
        "[a](../index.md#start) [b](01_single_gpu_baseline.ipynb) [c](../files/course_lib/data.py)"
    )
    assert (tmp_path / "files" / "course_lib" / "data.py").exists()
    code = "`make[name](count)` and [the field](https://example.org/x)"
    assert stage_site.relinked(code, ROOT / "README.md", tmp_path) == code


def test_a_page_that_is_linked_to_is_a_page(tmp_path) -> None:
    """Sphinx takes a link to Markdown for a link to a page, and the web page is not built."""
    for page in stage_site.pages():
        stage_site._stage_page(page, tmp_path)
    for page in tmp_path.rglob("*.md"):
        for link in re.findall(r"\]\(([^)\s#:]+\.md)[)#]", page.read_text("utf-8")):
            target = (page.parent / link).resolve()
            assert target.is_file() and "files" not in target.relative_to(tmp_path).parts, link


def test_a_badge_is_words_on_the_page(monkeypatch, tmp_path) -> None:
    known = addresses.Addresses("https://github.com/o/n", "https://o.github.io/n", "1")
    section = addresses.with_addresses("<!-- badges -->\n<!-- /badges -->", known)
    monkeypatch.setattr(stage_site, "readme_section", lambda title: section)
    stage_site._stage_page(ROOT / "docs" / "start.md", tmp_path)
    page = (tmp_path / "start.md").read_text("utf-8")
    assert f"[Start on Binder]({known.binder})" in page
    assert "badge.svg" not in page and "badge_logo" not in page


def test_every_module_is_in_the_reference(tmp_path) -> None:
    reference_pages.write(tmp_path / "reference")
    pages = "\n".join(path.read_text("utf-8") for path in (tmp_path / "reference").iterdir())
    named = set(re.findall(r"automodule:: (\S+)", pages))
    public = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "course_lib").rglob("*.py")
        if "__main__" not in path.name and path.read_text("utf-8").strip()
    }
    assert named == {name for name in public if not name.rpartition(".")[2].startswith("_")}
    index = (tmp_path / "reference" / "index.md").read_text("utf-8")
    assert "\nranks.by_hand\n" in index and (tmp_path / "reference" / "ranks.by_hand.md").exists()


@pytest.mark.parametrize("path", lessons(), ids=lambda path: path.stem)
def test_every_picture_of_a_lesson_has_words(path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    for index, cell in enumerate(cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            words = words_for(cells, index)
            assert len(words) > len("Figure: a.") and "{" not in words, cell.id


def test_the_words_of_a_figure_say_what_is_drawn_against_what() -> None:
    source = 'ax.set(title=f"{link}, two", xlabel="seconds", ylabel="loss")\nb.set(xlabel="GPUs")'
    cell = nbformat.v4.new_code_cell(source)
    assert words_for([cell], 0) == "Figure: link, two."
    cell.source = source.partition("\n")[0]
    assert words_for([cell], 0) == "Figure: link, two; loss against seconds."


# ------------------------------------------------------------------------------- the frames


def test_the_place_of_a_frame_is_that_of_the_settings() -> None:
    explorer = lesson_00.explore_queues()
    kept = frames.read(frames.path_of("explore_queues"))
    for place, values in enumerate(explorer_frames.positions(explorer)):
        if place % 7 == 0:
            for name, value in values.items():
                explorer.controls[name].value = value
            assert kept.place(explorer.values) == place
            assert f"idle {kept.titles[place].split('idle ')[1]}" in explorer.children[-1].value


def test_of_very_many_positions_some_options_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(explorer_frames, "MOST_POSITIONS", 20)
    options = explorer_frames.kept_options(lesson_00.explore_queues())
    # 6 x 4 x 2, at the start 256, 4 and True
    assert options == {"side": [16, 256, 512], "products": [1, 4, 8], "read": [False, True]}


def test_what_is_left_out_is_what_its_neighbours_are_nearest_to() -> None:
    explorer = lesson_03.explore_all_reduce()
    # Of 1, 2.5, 5, 10, 25 and 100 microseconds. The lesson asks from which on the tree is best.
    assert explorer_frames.kept_options(explorer)["latency"] == [1, 2.5, 10, 25, 100]


def test_a_position_that_is_not_kept_is_drawn() -> None:
    kept = frames.read(frames.path_of("explore_queues"))
    values = {"side": 256, "products": 4, "read": True}
    assert kept.titles[kept.place(values)].endswith("(simulated)")
    assert kept.place(values | {"side": 100}) is None


def test_a_small_svg_says_what_the_figure_says(gpus) -> None:
    svg, titles = explorer_frames.drawn(lesson_00.explore_queues())
    assert titles in small_svg.words_in(svg)
    assert not re.search(r"\d\.\d\d+", re.sub(r">[^<]*<", "><", svg)), "places in tenths"
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")


@pytest.mark.parametrize("path", sorted(frames.FOLDER.glob("*.gz")), ids=lambda path: path.stem)
def test_every_shape_that_a_picture_uses_is_in_it(path) -> None:
    for svg in frames.read(path).frames:
        used = re.findall(r'(?:href="|url\()#(\w+)', svg)
        assert set(used) <= set(re.findall(r' id="(\w+)"', svg))


OWN = "from course_lib import below\nfrom course_lib.explorers import explorer\n"


def course(folder) -> dict:
    """A small course with an explorer, one module that it draws with, and one that shows it."""
    package = folder / "course_lib"
    (package / "explorers").mkdir(parents=True)
    for name in ("__init__.py", "explorers/__init__.py", "explorers/explorer.py"):
        (package / name).write_text('"""A package."""\n')
    (package / "explorers" / "lesson_00.py").write_text(OWN)
    (package / "below.py").write_text("x = 1  # why\n")
    (package / "table.csv").write_text("1,2\n")
    return {
        "own": package / "explorers" / "lesson_00.py",
        "shows": package / "explorers" / "explorer.py",
        "below": package / "below.py",
        "data": package / "table.csv",
    }


@pytest.mark.parametrize(
    ("file", "text", "own", "rest"),
    [
        ("below", '"""Words."""\n\nx = 1  # because\n', "same", "same"),
        ("below", "x = 2  # why\n", "same", "other"),
        ("data", "1,3\n", "same", "other"),
        ("own", OWN + "y = 1\n", "other", "same"),
        ("shows", "y = 5\n", "same", "same"),
    ],
)
def test_what_a_picture_depends_on(file, text, own, rest, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(frame_sources, "ROOT", tmp_path)
    files = course(tmp_path)
    before = frame_sources.sources_of("course_lib.explorers.lesson_00")
    files[file].write_text(text)
    after = frame_sources.sources_of("course_lib.explorers.lesson_00")
    pairs = zip(before.split("-"), after.split("-"), strict=True)
    assert ["same" if one == other else "other" for one, other in pairs] == [own, rest]
    assert frame_sources.is_of_the_same_explorer(before, after) == (own == "same")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """An explorer of one slider, its pictures kept in a folder, and which positions are drawn."""
    monkeypatch.setattr(frames, "FOLDER", tmp_path)
    monkeypatch.setattr(explorer_frames, "SAMPLE", 2)
    drawn = []

    def make() -> Explorer:
        def draw(x: int) -> Figure:
            drawn.append(x)
            figure = Figure()
            figure.add_subplot().set_title(f"{make.words} {x}")
            return figure

        return Explorer(draw, x=choice("x", [1, 2, 3, 4, 5], 1))

    make.words, make.__module__ = "x is", "course_lib.explorers.lesson_00"
    monkeypatch.setattr(explorer_frames, "sources_of", lambda module: "a-1")
    explorer_frames.renew("explore", make)
    drawn.clear()
    return make, drawn


def renewed(make, drawn: list[int], sources: str, monkeypatch) -> int:
    """How many positions are drawn if the code is now that of ``sources``."""
    monkeypatch.setattr(explorer_frames, "sources_of", lambda module: sources)
    frames.read.cache_clear()
    drawn.clear()
    explorer_frames.renew("explore", make)
    frames.read.cache_clear()
    assert frames.read(frames.path_of("explore")).sources == sources
    return len(drawn)


def test_pictures_are_drawn_anew_as_far_as_they_may_have_changed(kept, monkeypatch) -> None:
    make, drawn = kept
    first = 1  # the explorer itself draws where it starts
    monkeypatch.setattr(explorer_frames, "makers", lambda: {"explore": make})
    assert explorer_frames.stale() == {}
    for sources, must_be_drawn in (("a-2", False), ("b-1", True)):
        monkeypatch.setattr(explorer_frames, "sources_of", lambda module, now=sources: now)
        assert explorer_frames.stale() == {"explore": must_be_drawn}
    assert renewed(make, drawn, "a-1", monkeypatch) == 0, "nothing has changed"
    assert renewed(make, drawn, "a-2", monkeypatch) == first + 2, "a sample is as it was"
    assert renewed(make, drawn, "b-2", monkeypatch) == first + 5, "its own code is another"
    make.words = "x was"
    assert renewed(make, drawn, "b-3", monkeypatch) == first + 1 + 5, "a sample looks different"
    assert frames.read(frames.path_of("explore")).titles[4] == "x was 5"


def test_an_explorer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(SystemExit, match=r"no explorer explore_all; there are: explore_queues"):
        explorer_frames.main(["explore_all"])
