"""A script run as each rank's own main program.

Between processes, every rank has its own ``__main__``, its own arguments and its own copies of the
modules beside the script, with their global variables. Here they change hands with the baton, like
all else that belongs to a process; modules of libraries are shared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from unittest import mock

from course_lib.ranks.rank_state import PARTS, Part


def compiled(path: Path) -> CodeType:
    """A file as Python runs it."""
    return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)


@contextmanager
def main_program(
    path: Path, arguments: list[str], read: Callable[[Path], CodeType] = compiled
) -> Iterator[Callable[[], None]]:
    """A function, to be run on each rank in the block, that runs the script at ``path``.

    Args:
        arguments: what the script finds in ``sys.argv`` behind its own name.
        read: how the script becomes what Python runs.
    """
    own = _OwnModules(path.resolve().parent)
    parts = {
        "modules of the script": Part(own.get, own.put),
        "main": Part(lambda: sys.modules["__main__"], _set_main),
        "arguments": Part(lambda: list(sys.argv), _set_arguments),
    }

    def run() -> None:
        sys.argv[:] = [str(path), *arguments]
        main = ModuleType("__main__")
        main.__file__ = str(path)
        before = sys.modules["__main__"]
        _set_main(main)
        try:
            exec(read(path), main.__dict__)
        finally:
            _set_main(before)

    with (
        mock.patch.dict(PARTS, parts),
        mock.patch.object(sys, "path", [str(own.folder), *sys.path]),
    ):
        try:
            yield run
        finally:
            own.put({})


class _OwnModules:
    """The modules that come from the folder of the script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._others = set(sys.modules)

    def get(self) -> dict[str, ModuleType]:
        new = [name for name in sys.modules if name not in self._others]
        mine = {name: sys.modules[name] for name in new if self._is_mine(sys.modules[name])}
        self._others.update(name for name in new if name not in mine)
        return mine

    def put(self, modules: dict[str, ModuleType]) -> None:
        for name in self.get():
            del sys.modules[name]
        sys.modules.update(modules)

    def _is_mine(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        return file is not None and self.folder in Path(file).resolve().parents


def _set_main(module: ModuleType) -> None:
    sys.modules["__main__"] = module


def _set_arguments(arguments: list[str]) -> None:
    sys.argv[:] = arguments
