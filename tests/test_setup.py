"""The files that install the course agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import rattler
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
FOR_TESTS = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]

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
    specs = [line for line in environment["dependencies"] if isinstance(line, str)]
    parsed = [rattler.MatchSpec(spec, strict=True) for spec in specs]
    found = {spec.name.normalized: str(spec.version or "") for spec in parsed}
    expected = {CONDA_NAMES.get(need.name, need.name): str(need.specifier) for need in REQUIRED}
    expected |= {"python": PROJECT["requires-python"], "pip": ""}
    assert found == expected
    assert environment["name"] == PROJECT["name"]
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


@pytest.mark.parametrize("need", REQUIRED + FOR_TESTS, ids=lambda need: need.name)
def test_every_dependency_has_a_pin_that_satisfies_it(need: Requirement):
    assert need.specifier.contains(pins()[bare(need.name)])


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
            found = A_BUILD_OF_TORCH.search(path.read_bytes().decode(errors="replace"))
            assert not found, f"{name}: {found[0]}"


def test_readme_gives_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make lab" in text
    assert "make test" in text
