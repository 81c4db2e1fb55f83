"""Judges the answers of one notebook: what runs in a process of its own.

    python -m course_lib.progress.judging TASK RESULTS GIGABYTES

``TASK`` is a JSON file: ``setup``, ``own`` (the learner's cells) and ``answers``, each with
``name``, ``answer`` and ``check``. ``RESULTS`` gets a line when the set-up has run, and a line of
JSON as soon as an answer is judged, so that what ends this process loses nothing of that.
"""

from __future__ import annotations

import ast
import contextlib
import json
import linecache
import sys
from pathlib import Path
from typing import Any

from course_lib.exercises.verdict import WRONG, Verdict
from course_lib.progress.lessons import definitions_of

READY = "ready"


def limit_memory(gigabytes: float) -> None:
    """Let this process have no more than ``gigabytes`` of its own; where there is no such limit, go
    on without.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    # Not the address space: PyTorch reserves much more of it than it ever touches.
    limit = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def judge(task: dict[str, Any], results: Path) -> None:
    """Run the set-up, then each answer and its check."""
    names: dict[str, Any] = {"__name__": "__main__"}
    _run(task["setup"], "the lesson", names)
    for source in task["own"]:
        # A cell that does not run may have nothing to do with the exercises.
        with contextlib.suppress(Exception):
            _run(definitions_of(source), "a cell of your own", names)
    with results.open("w", encoding="utf-8") as file:
        print(READY, file=file, flush=True)
        for each in task["answers"]:
            judged = {"name": each["name"], "status": _verdict(each, names).status}
            print(json.dumps(judged), file=file, flush=True)


def _verdict(each: dict[str, str], names: dict[str, Any]) -> Verdict:
    try:
        _run(each["answer"], f"ex-{each['name']}", names)
    except Exception as error:  # whatever a learner wrote
        return Verdict(WRONG, f"the cell itself stopped with {type(error).__name__}: {error}")
    return _run(each["check"], f"check-{each['name']}", names)


def _run(source: str, title: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; the value of its last line, if that is an expression."""
    # A verdict quotes the line of the answer that stopped, and Python looks for it here.
    linecache.cache[title] = (len(source), None, source.splitlines(keepends=True), title)
    tree = ast.parse(source, title)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, title, "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, title, "exec"), names)
    return eval(compile(ast.Expression(last.value), title, "eval"), names)


if __name__ == "__main__":
    limit_memory(float(sys.argv[3]))
    judge(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
