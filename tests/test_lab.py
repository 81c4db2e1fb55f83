"""Working copies: without outputs, the reader's own, and never overwritten without a word."""

import json
import os
from pathlib import Path

import nbformat
import pytest

import lab

LESSON = "02_data_parallelism.ipynb"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "my_lessons"
    lab.make_copies(folder)
    return folder


def write_into(copy: Path, cell_id: str, source: str) -> None:
    nb = nbformat.read(copy, as_version=4)
    next(cell for cell in nb.cells if cell["id"] == cell_id).source = source
    nbformat.write(nb, copy)


def an_answer(copy: Path) -> str:
    nb = nbformat.read(copy, as_version=4)
    return next(cell["id"] for cell in nb.cells if cell["id"].startswith("ex-") and
                cell.cell_type == "code")  # fmt: skip


def test_every_lesson_is_copied_without_an_output(copies: Path) -> None:
    lessons = sorted(lab.NOTEBOOKS.glob("*.ipynb"))
    assert [copy.name for copy in sorted(copies.iterdir())] == [path.name for path in lessons]
    for copy in copies.iterdir():
        nb = nbformat.read(copy, as_version=4)
        code = [cell for cell in nb.cells if cell.cell_type == "code"]
        assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_an_existing_copy_is_left_alone_and_an_old_one_is_named(copies: Path, capsys) -> None:
    copy = copies / LESSON
    nb = nbformat.read(copy, as_version=4)
    nb.metadata["course_version"] = "older"
    nbformat.write(nb, copy)
    before = copy.read_bytes()
    lab.make_copies(copies)
    assert copy.read_bytes() == before
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(LESSON) and "make fresh NB=02" in line


def test_a_fresh_copy_keeps_the_answers_and_the_old_copy(copies: Path, capsys) -> None:
    copy = copies / LESSON
    answer = an_answer(copy)
    write_into(copy, answer, "my_answer = 42")
    for number in (1, 2):
        before = copy.read_bytes()
        lab.fetch_fresh("02", copies)
        assert (copies / f"02_data_parallelism.old{number}.ipynb").read_bytes() == before
        assert "1 of your answers kept" in capsys.readouterr().out
    cells = {cell["id"]: cell.source for cell in nbformat.read(copy, as_version=4).cells}
    assert cells[answer] == "my_answer = 42"


def test_a_copy_that_cannot_be_read_is_not_lost(copies: Path) -> None:
    (copies / LESSON).write_text("{ half a file")
    lab.make_copies(copies)
    with pytest.raises(SystemExit, match="cannot be read"):
        lab.fetch_fresh("02", copies)
    assert (copies / LESSON).read_text() == "{ half a file"


@pytest.mark.parametrize("number", ["", "99", "x", "*"])
def test_a_number_without_a_lesson_is_refused_with_those_there_are(number: str, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"there is no lesson .* there are 00, 01"):
        lab.fetch_fresh(number, tmp_path)


@pytest.mark.parametrize("asked, given", [(None, "1"), ("4", "4")])
def test_one_thread_computes_unless_the_reader_asks_for_more(asked, given, monkeypatch, copies):
    seen = []
    monkeypatch.setattr(lab, "COPIES", copies)
    monkeypatch.setattr(
        "jupyterlab.labapp.main",
        lambda flags: seen.append((os.environ.get("OMP_NUM_THREADS"), flags)),
    )
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")
    lab._open_jupyterlab(["--no-browser"])
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    ((threads, flags),) = seen
    assert threads == given and f"--ServerApp.root_dir={copies}" in flags
    assert "--LabApp.default_url=/lab/tree/00_meet_your_gpus.ipynb" in flags


def test_the_courses_settings_are_read_before_the_readers_own(monkeypatch, copies) -> None:
    monkeypatch.setattr(lab, "COPIES", copies)
    monkeypatch.setattr("jupyterlab.labapp.main", lambda flags: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "theirs")
    lab._open_jupyterlab([])
    ours, theirs = os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    assert theirs == "theirs"
    assert (Path(ours) / "jupyter_server_config.py").exists()
    overrides = Path(ours) / "labconfig" / "default_setting_overrides.json"
    settings = json.loads(overrides.read_text(encoding="utf-8"))
    (notification,) = settings.values()
    assert notification == {"checkForUpdates": False, "fetchNews": "false"}


def test_a_saved_explorer_is_its_picture() -> None:
    source = (lab.ROOT / "tools" / "jupyter" / "jupyter_server_config.py").read_text(
        encoding="utf-8"
    )

    class Config:
        class ContentsManager:
            pre_save_hook = None

    names: dict = {"get_config": lambda: Config}
    exec(source, names)
    live = {"image/png": "picture", names["WIDGET_VIEW"]: {"model_id": "1"}, "text/plain": "x"}
    slider = {names["WIDGET_VIEW"]: {"model_id": "2"}}
    model = {"type": "notebook", "content": {"cells": [
        {"cell_type": "code", "outputs": [{"data": dict(live)}, {"data": dict(slider)}]},
        {"cell_type": "markdown"},
    ]}}  # fmt: skip
    Config.ContentsManager.pre_save_hook(model=model, path="a.ipynb", contents_manager=None)
    explorer, other = model["content"]["cells"][0]["outputs"]
    assert explorer["data"] == {"image/png": "picture", "text/plain": "x"}
    assert other["data"] == slider
