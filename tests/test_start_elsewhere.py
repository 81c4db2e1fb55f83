"""The course started elsewhere: on Colab, on Binder, in a container, on a JupyterHub."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

import addresses
import hosted
import lab
from course_lib import tried_versions
from notebook_tools import ROOT, dumps, lessons

KNOWN = addresses.Addresses("https://github.com/o/n", "https://o.github.io/n", "1.2.3")

# -------------------------------------------------------------------------------- addresses


def project(urls: str, folder: Path) -> Path:
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "1.2.3"\n{urls}')
    return folder


def test_one_place_says_where_the_course_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(addresses, "ROOT", project("", tmp_path))
    assert addresses.addresses() is None
    urls = (
        '[project.urls]\nRepository = "https://github.com/o/n/"\nHomepage = "https://o.github.io/n"'
    )
    project(urls, tmp_path)
    assert addresses.addresses() == KNOWN


@pytest.mark.parametrize(
    "urls",
    ['Repository = "https://github.com/o/n"', 'Homepage = "x"\nRepository = "https://x.org/o/n"'],
    ids=["half", "not on GitHub"],
)
def test_half_an_address_is_refused(urls: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(addresses, "ROOT", project(f"[project.urls]\n{urls}", tmp_path))
    with pytest.raises(ValueError, match="needs both Repository"):
        addresses.addresses()


def test_the_readme_leads_where_the_course_is() -> None:
    readme = addresses.README.read_text(encoding="utf-8")
    assert addresses.with_addresses(readme, addresses.addresses()) == readme, "run: make badges"
    led = addresses.with_addresses(readme, KNOWN)
    assert "git clone https://github.com/o/n multi-gpu-by-hand" in led
    for link in (KNOWN.colab(), KNOWN.binder, KNOWN.codespaces):
        assert f"]({link})" in led
    assert addresses.with_addresses(led, None) == addresses.with_addresses(readme, None)


def test_links_have_the_forms_that_the_services_ask_for() -> None:
    lesson = "00_meet_your_gpus.ipynb"
    assert KNOWN.colab() == (
        f"https://colab.research.google.com/github/o/n/blob/lessons/colab/{lesson}"
    )
    assert (
        KNOWN.binder == f"https://mybinder.org/v2/gh/o/n/main?urlpath=lab/tree/my_lessons/{lesson}"
    )
    assert KNOWN.wheel.endswith("/n/wheel/multi_gpu_by_hand-1.2.3-py3-none-any.whl")
    assert KNOWN.hub("https://hub.example.org/") == (
        "https://hub.example.org/hub/user-redirect/git-pull?repo=https%3A%2F%2Fgithub.com%2Fo%2Fn"
        f"&branch=lessons&urlpath=lab%2Ftree%2Fn%2Fhub%2F{lesson}"
    )


# ------------------------------------------------------------------------ the hosted edition


@pytest.mark.parametrize("on_colab", [True, False], ids=["colab", "hub"])
@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_hosted_lesson_installs_the_course_and_leads_on(lesson: Path, on_colab: bool) -> None:
    made = hosted.hosted_edition(lab.without_outputs(lesson), KNOWN, on_colab)
    nb = nbformat.reads(dumps(made), as_version=4)
    assert nb.cells[1].id == "get-the-course" and KNOWN.wheel in nb.cells[1].source
    assert all(not cell.get("outputs") for cell in nb.cells)
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    assert "](../" not in text
    others = re.findall(r"\]\(([^)\s]*\.ipynb)[#)]", text)
    assert others
    start = KNOWN.colab("") if on_colab else ""
    assert all(re.fullmatch(re.escape(start) + r"\d\d_\w+\.ipynb", other) for other in others)


def test_what_is_there_already_is_not_installed() -> None:
    (line, *rest) = [each for each in hosted.INSTALL.splitlines() if each.startswith("if ")]
    condition = line.removeprefix("if ").removesuffix(":")
    assert not rest and not eval(condition, {"importlib": __import__("importlib.util")})
    assert "%pip install -q --no-deps {wheel} " in hosted.INSTALL, "PyTorch stays as it is"


def test_the_hosted_edition_needs_an_address(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(hosted, "addresses", lambda: None)
    with pytest.raises(SystemExit, match=r"set \[project.urls\]"):
        hosted.main([str(tmp_path)])
    monkeypatch.setattr(hosted, "addresses", lambda: KNOWN)
    monkeypatch.setattr(hosted, "lessons", lambda: lessons()[:1])
    hosted.main([str(tmp_path)])
    (lesson,) = (path.name for path in lessons()[:1])
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.ipynb")}
    assert made == {f"{kind}/{lesson}" for kind in ("lessons/colab", "lessons/hub", "student/hub")}
    with_solutions = (tmp_path / "lessons" / "hub" / lesson).read_text("utf-8")
    without = (tmp_path / "student" / "hub" / lesson).read_text("utf-8")
    assert "<summary>Solution" in with_solutions and "<summary>Solution" not in without
    assert KNOWN.wheel in without


def test_a_copy_outside_of_the_repository_has_no_link_into_it(tmp_path) -> None:
    lesson = lessons()[0]
    inside = lab.copy_of(lesson, ROOT / "my_lessons").cells[0].source
    outside = lab.copy_of(lesson, tmp_path / "my_lessons").cells[0].source
    assert "](../README.md)" in inside and "](../README.md)" not in outside
    assert "](01_single_gpu_baseline.ipynb)" in inside and "](01_single" in outside


def test_code_that_looks_like_a_link_stays() -> None:
    assert addresses.relinked("`blocks[part](h.to(gpus[1]))`", KNOWN, None) == (
        "`blocks[part](h.to(gpus[1]))`"
    )


# --------------------------------------------------------------------- another PyTorch

NEEDS = ["numpy", "torch<2.15,>=2.13"]


@pytest.mark.parametrize("version", ["2.13.0+x", "2.14.9"])
def test_a_pytorch_that_was_tried_is_met_in_silence(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried_versions.warn_unless_tried(version, NEEDS)
        tried_versions.warn_unless_tried("1.0", None)


@pytest.mark.parametrize("version", ["2.12.1", "2.15.0", "3.0"])
def test_another_pytorch_is_named_with_what_to_do(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"{version}\. If a cell fails: pip install .torch>=2.13"):
        tried_versions.warn_unless_tried(version, NEEDS)


# --------------------------------------------------------------------------- containers

SCRIPTS = [
    "tools/container_setup.sh", "tools/container_student.sh", "tools/container_start.sh",
    ".binder/postBuild", ".binder/start",
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_a_container_is_sound_and_may_be_run(script: str) -> None:
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    if os.name == "posix":
        assert os.access(ROOT / script, os.X_OK)


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def test_the_image_takes_what_is_there_and_gives_up_root() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert names[0] == "FROM" and names.index("USER") > names.index("COPY")
    words = dict(found)
    assert words["USER"] == "1000"
    settings = dict(pair.split("=") for pair in words["ENV"].split())
    assert settings["OMP_NUM_THREADS"] == "1" and settings["COURSE_DEVICES"] == "virtual"
    scripts = " ".join(rest for name, rest in found if name in ("RUN", "ENTRYPOINT"))
    for path in re.findall(r"/srv/course/([\w./]+)", scripts):
        assert (ROOT / path).is_file(), path
    assert words["ARG"] == "EDITION=complete" and names.index("ARG") < names.index("USER")
    command = json.loads(words["CMD"])
    (first,) = [each.rpartition("/")[2] for each in command if each.endswith(".ipynb")]
    assert (ROOT / "notebooks" / first).is_file()


def test_an_image_has_no_environment_of_the_machine_that_builds_it() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert {".git", ".venv", "build", "dist", "my_lessons"} <= set(left_out)
    assert {each for each in ignored if not each.startswith(("*", "."))} <= {
        each.removeprefix("**/") for each in left_out
    }


def test_the_devcontainer_opens_a_working_copy() -> None:
    described = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    (opened,) = described["customizations"]["codespaces"]["openFiles"]
    assert (ROOT / "notebooks" / opened.removeprefix("my_lessons/")).is_file()
    assert described["containerEnv"] == {"OMP_NUM_THREADS": "1", "COURSE_DEVICES": "virtual"}
    for path in re.findall(r"tools/[\w.]+", described["postCreateCommand"]):
        assert (ROOT / path).is_file(), path


@pytest.fixture
def image(tmp_path) -> Path:
    """The files of an image, with two lessons."""
    course = tmp_path / "course"
    for name in ("tools", "docs/teaching/lessons"):
        shutil.copytree(ROOT / name, course / name, ignore=shutil.ignore_patterns("__pycache__"))
    (course / "notebooks").mkdir()
    (course / "tests").mkdir()
    for name in (*lessons()[:2], ROOT / "pyproject.toml"):
        shutil.copy(name, course / name.relative_to(ROOT))
    return course


def run_in(image: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    mine = {"COURSE_LESSONS": str(image.parent / "mine"), "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", image / "tools" / script, *arguments],
        env=os.environ | mine,
        capture_output=True,
        text=True,
    )


def test_a_container_starts_with_copies_in_the_learners_own_folder(image: Path) -> None:
    started = run_in(image, "container_start.sh", "echo", "then", "this")
    assert started.returncode == 0, started.stderr
    assert started.stdout == "then this\n"
    copies = sorted((image.parent / "mine").iterdir())
    assert [path.name for path in copies] == [path.name for path in lessons()[:2]]
    assert all("<summary>Solution" in path.read_text("utf-8") for path in copies)


def test_an_image_for_students_has_no_solution_and_a_clone_keeps_its_own(image: Path) -> None:
    (image / ".git").mkdir()
    refused = run_in(image, "container_student.sh")
    assert refused.returncode == 1 and "never in a clone" in refused.stderr
    assert (image / "tests").exists()

    (image / ".git").rmdir()
    made = run_in(image, "container_student.sh")
    assert made.returncode == 0, made.stderr
    for lesson in (image / "notebooks").iterdir():
        assert "<summary>Hint" in (text := lesson.read_text("utf-8"))
        assert "<summary>Solution" not in text
    assert not any((image / name).exists() for name in ("build", "tests", "docs/teaching/lessons"))


def test_the_page_about_hubs_has_settings_that_can_be_read() -> None:
    import yaml

    text = (ROOT / "docs" / "teaching" / "hub.md").read_text("utf-8")
    blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", text, re.DOTALL))
    ast.parse(blocks["python"])
    user = yaml.safe_load(blocks["yaml"])["singleuser"]
    assert user["memory"]["limit"] == "2G" and user["cpu"]["guarantee"] == 1
