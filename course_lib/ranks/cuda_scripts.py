"""Scripts that say "cuda", read as if they said "vgpu": for ``python -m course_lib.ranks --cuda``.

The files on the disk stay as they are. What is read differently, in the script and in the modules
beside it, as each file is read:

* the strings ``"cuda"``, ``"cuda:1"``, ``"cuda:"``, ``"cuda:{}"``, ``f"cuda:{rank}"``;
* ``torch.cuda`` and what is imported from it;
* ``.cuda(...)`` and ``.is_cuda`` of tensors and modules;
* ``is_nccl_available()``, which is true. ``"nccl"`` stays: ranks have one backend by all names.

Every node of the syntax tree stays at its place, so that a traceback shows the script's own lines.
A name of a device that comes from elsewhere, from a configuration or through ``exec``, is not read
here: :func:`explain` says so where PyTorch refuses it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

from course_lib.virtual.spec import DEVICE_TYPE

_DEVICE = re.compile(r"cuda(:(\d+|%[dis]|\{[^{}]*\})?)?")
_NO_CUDA = ("not compiled with CUDA", "NVIDIA driver", "CUDA GPUs are available", "'_cuda_")


class Reading:
    """The files of one program, each read once however many ranks import it.

    Args:
        folder: whose files are the program's own, but for packages installed in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._codes: dict[Path, CodeType] = {}
        self._places: dict[str, int] = {}

    def code(self, path: Path) -> CodeType:
        """What Python runs in place of the file."""
        if path not in self._codes:
            rewrite = _Rewrite()
            tree = rewrite.visit(ast.parse(path.read_bytes(), str(path)))
            self._codes[path] = compile(tree, str(path), "exec", dont_inherit=True)
            self._note(str(path.resolve().relative_to(self.folder)), rewrite.places)
        return self._codes[path]

    def arguments(self, given: Sequence[str]) -> list[str]:
        """A command line with ``cuda``, ``--device=cuda`` read as the files are."""
        read = [_read_argument(each) for each in given]
        self._note("its arguments", sum(a != b for a, b in zip(given, read, strict=True)))
        return read

    def owns(self, path: Path) -> bool:
        """Whether a file is the program's own."""
        path = path.resolve()
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        return path.suffix == ".py" and self.folder in path.parents and not installed

    def _note(self, where: str, places: int) -> None:
        if places:
            self._places[where] = places

    def __str__(self) -> str:
        if not self._places:
            return 'nothing was read differently: "cuda" stands nowhere'
        many = [
            f"{where} ({count} place{'s' if count > 1 else ''})"
            for where, count in sorted(self._places.items())
        ]
        return f'read differently, "{DEVICE_TYPE}" for "cuda": {", ".join(many)}'


@contextmanager
def read_differently(folder: Path) -> Iterator[Reading]:
    """Read, in the block, every module of ``folder`` that is imported as this module says."""
    reading = Reading(folder.resolve())
    with mock.patch.object(sys, "meta_path", [_Finder(reading), *sys.meta_path]):
        yield reading


def explain(error: BaseException, reads_differently: bool) -> None:
    """Add a line to PyTorch's error that there is no CUDA."""
    if not any(words in str(error) for words in _NO_CUDA):
        return
    if reads_differently:
        error.add_note(
            "--cuda reads the script's own files differently, and this device was named elsewhere: "
            f'in a configuration, a checkpoint or a library. Name it "{DEVICE_TYPE}" there'
        )
    else:
        error.add_note('a script that says "cuda" runs with --cuda')


class _Finder(MetaPathFinder):
    """Finds the program's own modules where Python does, and has them read differently."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or not self._reading.owns(Path(spec.origin)):
            return None
        spec.loader = _Loader(name, spec.origin)
        spec.loader.reading = self._reading
        return spec


class _Loader(SourceFileLoader):
    """Reads a file, and neither looks for nor leaves compiled ones beside it."""

    reading: Reading

    def get_code(self, fullname: str) -> CodeType:
        return self.reading.code(Path(self.path))


class _Rewrite(ast.NodeTransformer):
    """Changes a syntax tree, and counts the ``places``."""

    def __init__(self) -> None:
        self.places = 0
        self._torch = {"torch"}  # the names under which PyTorch is known

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str) and _DEVICE.fullmatch(node.value):
            self._write(node, "value", _renamed(node.value))
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        first: Any = node.values[0] if node.values else None
        self.generic_visit(node)
        is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
        if is_text and len(node.values) > 1 and re.fullmatch(r"cuda:\d*", first.value):
            self._write(first, "value", _renamed(first.value))
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if alias.name == "torch" and alias.asname:
                self._torch.add(alias.asname)
            self._rename_module(alias, "name")
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level == 0:
            self._rename_module(node, "module")
            for alias in node.names:
                if node.module == "torch" and alias.name == "cuda":
                    alias.asname = alias.asname or "cuda"
                    self._write(alias, "name", DEVICE_TYPE)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name):
            if node.value.id in self._torch:
                self._write(node, "attr", DEVICE_TYPE)
        elif node.attr == "is_cuda":
            self._write(node, "attr", f"is_{DEVICE_TYPE}")
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "cuda":
            self._write(called, "attr", DEVICE_TYPE)
        name = getattr(called, "attr", getattr(called, "id", None))
        if name == "is_nccl_available":
            self.places += 1
            return ast.copy_location(ast.Constant(True), node)
        return node

    def _rename_module(self, node: Any, field: str) -> None:
        name = getattr(node, field) or ""
        if name == "torch.cuda" or name.startswith("torch.cuda."):
            self._write(node, field, name.replace("torch.cuda", f"torch.{DEVICE_TYPE}", 1))

    def _write(self, node: Any, field: str, value: str) -> None:
        setattr(node, field, value)
        self.places += 1


def _renamed(device: str) -> str:
    return DEVICE_TYPE + device.removeprefix("cuda")


def _read_argument(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return option + equals + _renamed(value) if _DEVICE.fullmatch(value) else argument
