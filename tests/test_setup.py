"""The files that install the course agree with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import course_lib.virtual

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
TO_READ_AND_RUN = [Requirement(line) for line in EXTRAS["lab"]]
FOR_TESTS = [Requirement(line) for line in EXTRAS["test"]]
FOR_THE_SITE = [Requirement(line) for line in EXTRAS["site"]]

CONDA_NAMES = {"torch": "pytorch"}

# A local version, an index of one kind of build, and conda's names for the kinds.
A_BUILD_OF_TORCH = re.compile(
    r"\d\+(?:cpu|cu\d|rocm)|download\.pytorch\.org/whl|pytorch-(?:cpu|gpu|cuda)\b|\bcpuonly\b"
)


def bare(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        bare(name): version
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }


def test_environment_yml_is_pyproject_for_conda():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    # A conda spec of a name and bounds reads as pip's does.
    specs = [Requirement(line) for line in environment["dependencies"] if isinstance(line, str)]
    found = {spec.name: spec.specifier for spec in specs}
    expected = {
        CONDA_NAMES.get(need.name, need.name): need.specifier for need in REQUIRED + TO_READ_AND_RUN
    }
    expected |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    assert found == expected
    assert environment["name"] == PROJECT["name"]
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


@pytest.mark.parametrize(
    "need",
    REQUIRED + TO_READ_AND_RUN + FOR_TESTS + FOR_THE_SITE,
    ids=lambda need: need.name,
)
def test_every_dependency_has_a_pin_that_satisfies_it(need: Requirement):
    assert need.specifier.contains(pins()[bare(need.name)])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["version"]


def test_what_the_package_needs_at_run_time_suits_a_notebook_service():
    names = {need.name for need in REQUIRED}
    assert names == {"torch", "numpy", "matplotlib", "pillow", "ipywidgets", "tqdm", "cloudpickle"}


def test_constraints_are_names_and_public_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)]
    assert odd == []


def test_no_file_names_a_build_of_torch():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file():  # and not deleted since
            text = path.read_bytes().decode(errors="replace")
            without_pixels = re.sub(r'"image/png": "[^"]*"', "", text)  # where any letters may be
            found = A_BUILD_OF_TORCH.search(without_pixels)
            assert not found, f"{name}: {found[0]}"


def test_readme_gives_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make lab" in text
    assert "make test" in text


def test_importing_the_methods_loads_no_matplotlib():
    """So it changes no rcParams either."""
    program = (
        "import pkgutil, sys, importlib, course_lib.parallel as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_module_has_the_name_of_what_it_defines():
    """Or an import of the one would hide the other."""
    for path in (ROOT / "course_lib").rglob("*.py"):
        own = path.parent.name if path.stem == "__init__" else path.stem
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert own not in [getattr(each, "name", None) for each in body], path


def test_the_way_into_virtual_names_every_module_and_its_core_is_short():
    folder = ROOT / "course_lib/virtual"
    listed = re.findall(r"^\* ``(\w+)``", course_lib.virtual.__doc__, re.MULTILINE)
    there = {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__", "MEASURED"}
    assert sorted(listed) == sorted(there)
    core = listed[: listed.index("execution") + 1]
    lines = sum(len((folder / f"{name}.py").read_text().splitlines()) for name in core)
    assert lines <= 1800  # a line a second
