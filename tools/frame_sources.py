"""What the pictures of an explorer depend on, as two hashes."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OWN = "course_lib.explorers."
# They show pictures and draw none.
_SHOWING = (_OWN + "explorer", _OWN + "frames")


def sources_of(module: str) -> str:
    """Two hashes, joined by a hyphen, of what the explorers of ``module`` are drawn with.

    The first is of their own code, in course_lib.explorers; the second of all else of the course
    that is imported from there, and of its data. Comments and docstrings are in neither.
    """
    code: dict[str, str] = {}
    waiting = [module, "tools.small_svg"]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in code or name in _SHOWING or path is None:
            continue
        code[name], imports = _read(path.read_text(encoding="utf-8"))
        waiting += imports
    own = {name: text for name, text in code.items() if name.startswith(_OWN)}
    rest = {name: text for name, text in code.items() if name not in own}
    return f"{_hash(own)}-{_hash(rest | _data())}"


def is_of_the_same_explorer(sources: str, others: str) -> bool:
    """Whether both are of the same code in course_lib.explorers."""
    return sources.partition("-")[0] == others.partition("-")[0]


def _hash(texts: dict[str, str]) -> str:
    whole = "\n".join(f"{name} {text}" for name, text in sorted(texts.items()))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _data() -> dict[str, str]:
    """The course's tables, texts and numbers: no import says which of them is read."""
    package = ROOT / "course_lib"
    files = [path for end in ("csv", "json", "npz", "txt") for path in package.rglob(f"*.{end}")]
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = path / "__init__.py", path.with_suffix(".py")
    return next((each for each in candidates if each.is_file()), None)


@cache
def _read(text: str) -> tuple[str, tuple[str, ...]]:
    """A module's code without comments and docstrings, and what it imports of the course.

    Most explorers import the same modules.
    """
    tree = ast.parse(text)
    imports = tuple(_imports(tree))
    return ast.unparse(_without_docstrings(tree)), imports  # dump() differs between Pythons


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("course_lib"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("course_lib"):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        match body:
            case [ast.Expr(ast.Constant()), *_]:
                is_all = len(body) == 1 and not isinstance(node, ast.Module)
                body[:1] = [ast.Pass()] if is_all else []
    return tree
