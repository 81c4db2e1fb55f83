"""The pages of the web page's reference: all public names of the package, by module.

Sphinx fills them from the docstrings; what is listed here is what there is.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from pathlib import Path

from notebook_tools import ROOT


def write(folder: Path) -> None:
    """Make ``folder`` with a page for the package, and one for each package in it."""
    folder.mkdir()
    packages = _packages("course_lib")
    listed = "\n".join(name.removeprefix("course_lib.") for name in packages)
    (folder / "index.md").write_text(
        "# Reference\n\nWhat `course_lib` holds, from its docstrings.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n\n" + _modules("course_lib")
    )
    for name in packages:
        page = folder / f"{name.removeprefix('course_lib.')}.md"
        page.write_text(f"# {name}\n\n" + _modules(name))


def _packages(package: str) -> list[str]:
    """All packages in a package, and in those; a folder of data, which says nothing, is none."""
    inner = [each.name for each in _inside(package) if each.ispkg]
    own = [name for name in inner if (_path(name) / "__init__.py").read_text("utf-8").strip()]
    return [each for name in own for each in [name, *_packages(name)]]


def _inside(package: str) -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules([str(_path(package))], prefix=f"{package}.")


def _path(package: str) -> Path:
    return ROOT.joinpath(*package.split("."))


def _modules(package: str) -> str:
    """The package's own words, and each of its modules."""
    parts = [f"```{{eval-rst}}\n.. automodule:: {package}\n   :no-index:\n```\n"]
    for module in _inside(package):
        name = module.name.rpartition(".")[2]
        if not module.ispkg and not name.startswith("_"):
            parts.append(
                f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {module.name}\n   :members:\n```\n"
            )
    return "\n".join(parts)
