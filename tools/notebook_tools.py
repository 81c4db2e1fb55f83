"""The one form that a committed notebook has, and the exercises in it.

    python tools/notebook_tools.py execute [notebooks/02_x.ipynb ...]   run and rewrite
    python tools/notebook_tools.py check [notebooks/02_x.ipynb ...]     only say what is wrong

Two runs of a lesson give the same file, so a diff shows what an author changed and nothing else.
"""

import argparse
import ast
import base64
import copy
import html
import io
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
LONGEST_CELL = 45  # lines; about a screen
PATIENCE = 600  # seconds for what takes two; a machine that is busy is no fault
IGNORE = "tag the cell nbval-ignore-output"

CELL_ID = re.compile(r"[a-z0-9-]+")
RANDOM_ID = re.compile(r"[0-9a-f]{8,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])(?:~/\w|/(?:home|root|Users|tmp|private|var|opt|usr|mnt|srv|work|workspace)/\w)"
    r"|\b[A-Z]:\\[\w ]+\\"
    r"|\bsite-packages\b"
)
TEMPORARY = re.compile(r"(?<![a-zA-Z0-9])tmp[a-z0-9_]{6,8}\b")
TIME_OF_DAY = re.compile(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d|\b\d{1,2}:\d\d:\d\d\b")
DURATION = re.compile(
    r"\b(?:took|elapsed|wall(?: time)?|(?:done|finished|ran) in)\b\D{0,12}"
    r"\d[\d.]*\s*(?:ns|[uµm]?s|sec(?:onds)?|min(?:utes)?)\b",
    re.IGNORECASE,
)
# A cell that reads the simulated clock, whose seconds are exact, and one that reads a real one.
SIMULATED = re.compile(r"\.seconds\b|\bhost_seconds\b|\bstep_times\b|\bsimulated\b")
REAL_CLOCK = re.compile(
    r"\bperf_counter\b|\btime\.(?:time|monotonic|process_time)\b|\bdatetime\b.*\b(?:now|today)\("
    r"|\btimeit\b|%%?time\b"
)
# Two strings or more in braces, and no colon after the first: not a dict.
SET_OF_STRINGS = re.compile(r"""\{(?:'[^'\n]*'|"[^"\n]*"), ?(?:'[^'\n]*'|"[^"\n]*")[^:\n]*?\}""")
# In a traceback: whatever stands before course_lib/, or before the name of an installed package.
TRACEBACK_ROOT = re.compile(
    r"(?:~|[A-Za-z]:)?[/\\][^\s\x1b]*?(?:site-packages[/\\]|(?=\bcourse_lib[/\\]))"
)


# ---------------------------------------------------------------------------- the canonical form


def lessons() -> list[Path]:
    """The notebooks of the course, in reading order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def dumps(nb: NotebookNode) -> str:
    """The text of a notebook's file."""
    return nbformat.writes(nb, version=nbformat.NO_CONVERT, indent=1).rstrip("\n") + "\n"


def normalise(nb: NotebookNode) -> NotebookNode:
    """A canonical copy of `nb`; what needs an author to mend it is left for `problems` to report.

    Sets the notebook's metadata, keeps of a cell's metadata only its tags, drops empty cells,
    widget views and the machine's paths in tracebacks, merges consecutive streams, stores figures
    in fewer bytes, and gives a readable id to each cell that has none.
    """
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict(METADATA)
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    taken: set[str] = set()
    for cell in nb.cells:
        cell.id = _readable_id(cell, taken)
        taken.add(cell.id)
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _normal_outputs(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _in_few_colours(output.data["image/png"])
    return nb


def _in_few_colours(png: str) -> str:
    """The figure with a palette of 256 colours: a third of the bytes, and no difference to see."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if picture.mode == "P":
            return png
        few = picture.convert("RGB").quantize(
            256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _readable_id(cell: NotebookNode, taken: set[str]) -> str:
    """The cell's own id if a person chose it, else its first words, numbered if already taken."""
    own = cell.get("id", "")
    if CELL_ID.fullmatch(own) and not RANDOM_ID.fullmatch(own) and own not in taken:
        return own
    words = re.findall(r"[a-z0-9]+", cell.source.strip().splitlines()[0].lower())
    stem = "-".join(words[:5])[:40].strip("-")
    if not stem or RANDOM_ID.fullmatch(stem):
        stem = f"{cell.cell_type}-cell"
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    return name


def _normal_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        elif output.output_type == "error":
            output.traceback = [TRACEBACK_ROOT.sub("", line) for line in output.traceback]
        elif WIDGET_VIEW in output.data:
            del output.data[WIDGET_VIEW]
            if not output.data:
                continue
        kept.append(output)
    return kept


def problems(nb: NotebookNode) -> list[str]:
    """What keeps `nb` from being canonical, one line each; an empty list if nothing does."""
    found = []
    if (nb.nbformat, nb.nbformat_minor) != (4, 5):
        found.append(f"format {nb.nbformat}.{nb.nbformat_minor} instead of 4.5")
    if nb.metadata != METADATA:
        found.append("metadata is more or less than the kernelspec and language python")
    taken: set[str] = set()
    count = 0
    for number, cell in enumerate(nb.cells, start=1):
        own = cell.get("id", "")
        where = f"cell {number} ({own})"
        if not cell.source.strip():
            found.append(f"{where}: is empty")
            continue
        if own != _readable_id(cell, taken):
            found.append(f"{where}: its id is random, unreadable or already taken")
        taken.add(own)
        if set(cell.metadata) - {"tags"}:
            found.append(f"{where}: has metadata other than tags")
        if cell.cell_type == "markdown" and (row := _row_outside_a_table(cell.source)):
            found.append(f"{where}: a row of a table stands alone: {row[:40]!r}")
        if cell.cell_type == "code":
            count += 1
            found += [f"{where}: {problem}" for problem in _code_problems(cell, count)]
    return found


def _row_outside_a_table(source: str) -> str:
    """The first row that a blank line cuts off from its table's head, so that it is shown raw."""
    for block in re.split(r"\n\s*\n", source):
        first, *others = block.strip().splitlines() or [""]
        rule = others[0] if others else ""
        if first.startswith("|") and not re.fullmatch(r"[|: -]*---[|: -]*", rule.strip()):
            return first
    return ""


def _code_problems(cell: NotebookNode, count: int) -> list[str]:
    found = []
    tags = cell.metadata.get("tags", [])
    if cell.execution_count != count:
        found.append(f"execution count is {cell.execution_count} instead of {count}")
    if cell.source.rstrip().endswith(";"):
        found.append("ends in a semicolon, which nbval does not see: end in plt.show()")
    lines = len(cell.source.splitlines())
    if lines > LONGEST_CELL:
        found.append(f"has {lines} lines; {LONGEST_CELL} are a screen")
    if cell.outputs != _normal_outputs(copy.deepcopy(cell.outputs)):
        found.append("its outputs hold a widget view, a split stream or a traceback with paths")
    for output in cell.outputs:
        if output.get("execution_count", count) != count:
            found.append("its result and the cell itself have different execution counts")
        if output.output_type == "error" and "raises-exception" not in tags:
            found.append(f"raises {output.ename} without the tag raises-exception")
        if output.get("name") == "stderr" and "nbval-ignore-output" not in tags:
            found.append(f"writes to stderr: {output.text.strip()[:80]!r}")
        text = _all_text(output)
        found += _text_problems(text)
        if "nbval-ignore-output" not in tags:
            found += _unsteady(text, cell.source)
    return found


def _all_text(output: NotebookNode) -> str:
    """Everything that can be read in an output, so no picture in base64."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return ANSI.sub("", "\n".join([output.evalue, *output.traceback]))
    return "\n".join(
        data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        for kind, data in output.data.items()
        if not kind.startswith("image/") or kind == "image/svg+xml"
    )


def _unsteady(text: str, source: str) -> list[str]:
    """What an output holds that another run would print otherwise, and nbval would refuse."""
    found = []
    if match := TIME_OF_DAY.search(text):
        found.append(f"prints the time of day, {match[0]!r}: leave it out, or {IGNORE}")
    if REAL_CLOCK.search(source):
        found.append(f"prints what a real clock measured: {IGNORE}")
    elif (match := DURATION.search(text)) and not SIMULATED.search(source + text):
        found.append(f"prints a duration that no simulated clock gave, {match[0]!r}: {IGNORE}")
    if match := SET_OF_STRINGS.search(text):
        found.append(f"prints a set, whose order changes, {match[0][:60]!r}: print sorted(...)")
    return found


def _text_problems(text: str) -> list[str]:
    text = ANSI.sub("", text)
    found = []
    if match := TEMPORARY.search(text):
        found.append(f"prints the name of a temporary folder or file: {match[0]!r}")
    if match := ADDRESS.search(text):
        found.append(f"prints a memory address: {match[0]!r}")
    if match := MACHINE_PATH.search(text):
        found.append(f"prints a path of this machine: {text[match.start() :][:60]!r}")
    host = socket.gethostname()
    # A host called "ring" may be a word of the lesson; one called "lab-3" is not.
    if not host.isalpha() and re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", text):
        found.append(f"prints the name of this machine: {host!r}")
    return found


def file_problems(path: Path) -> list[str]:
    """What keeps the file at `path` from being canonical."""
    text = path.read_bytes().decode()
    nb = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    found = problems(nb)
    if not found and text != dumps(nb):
        found.append("its JSON is not indented by 1, not sorted or has no newline at its end")
    return found


# -------------------------------------------------------------------------------- the exercises


@dataclass(frozen=True)
class Exercise:
    """One exercise: the cells `ex-NAME` (the stub), `check-NAME` and `sol-NAME`."""

    name: str
    stub_index: int
    check_index: int
    hint: str
    solution: str


def exercises(nb: NotebookNode) -> list[Exercise]:
    """The exercises of a lesson, in order. Raises ValueError if one is not in the house's form."""
    return [
        _exercise(nb, index)
        for index, cell in enumerate(nb.cells)
        if cell.cell_type == "code" and cell.get("id", "").startswith("ex-")
    ]


def _exercise(nb: NotebookNode, stub: int) -> Exercise:
    name = nb.cells[stub].id.removeprefix("ex-")

    def demand(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"exercise {name}: {message}")

    def following(index: int, cell_type: str) -> int:
        rest = range(index + 1, len(nb.cells))
        return next((i for i in rest if nb.cells[i].cell_type == cell_type), -1)

    functions = [
        node
        for node in ast.walk(ast.parse(nb.cells[stub].source))
        if isinstance(node, ast.FunctionDef)
    ]
    demand(bool(functions), "the stub defines no function")
    demand(bool(ast.get_docstring(functions[0])), "the stub's function has no docstring")
    demand("raise NotImplementedError" in nb.cells[stub].source, "the stub does not raise")

    check = following(stub, "code")
    demand(check > 0 and nb.cells[check].id == f"check-{name}", f"no check-{name} comes next")
    answer = following(check, "markdown")
    demand(answer > 0 and nb.cells[answer].id == f"sol-{name}", f"no sol-{name} after the check")

    blocks = re.findall(
        r"<details([^>]*)>\s*<summary>(.*?)</summary>(.*?)</details>",
        nb.cells[answer].source,
        re.DOTALL,
    )
    demand(len(blocks) == nb.cells[answer].source.count("<details"), "a <details> is not closed")
    titles = [html.unescape(summary).strip() for _, summary, _ in blocks]
    demand(titles == ["Hint", "Solution"], f"its details are {titles}, not Hint and Solution")
    demand(not any("open" in attributes for attributes, _, _ in blocks), "its details are open")
    code = re.findall(r"^```python\n(.*?)\n```\s*$", blocks[1][2], re.DOTALL | re.MULTILINE)
    demand(
        len(code) == 1 and blocks[1][2].count("```") == 2,
        "the solution is not one ```python block",
    )
    return Exercise(name, stub, check, hint=blocks[0][2].strip(), solution=code[0])


def with_solutions(nb: NotebookNode) -> NotebookNode:
    """A copy of the lesson in which each stub is replaced with its solution."""
    nb = copy.deepcopy(nb)
    for exercise in exercises(nb):
        nb.cells[exercise.stub_index].source = exercise.solution
    return nb


def without_measurements(nb: NotebookNode) -> NotebookNode:
    """A copy of the lesson that only defines things until its exercises begin.

    Of the cells before them the set-up stays, and of the others imports, classes, and functions
    whose definition computes nothing: what a solution may use. What the lesson measures and draws
    takes minutes, and nbval runs it.
    """
    from course_lib.progress.lessons import definitions_of  # and PyTorch: the rest does without

    nb = copy.deepcopy(nb)
    for cell in nb.cells[: min(exercise.stub_index for exercise in exercises(nb))]:
        if cell.cell_type == "code" and cell.id != "setup":
            cell.source = definitions_of(cell.source)
    return nb


def said(cell: NotebookNode) -> str:
    """What a code cell says: its stdout and the text of its results."""
    text = ""  # a slow machine sends one print in several outputs, which belong together
    for output in cell.outputs:
        if output.get("name") == "stdout":
            text += output.text
        elif "data" in output:
            text += output.data.get("text/plain", "") + "\n"
    return text.strip()


def folder_of(arguments: list[str], usage: str) -> Path:
    """The folder that a tool writes into, its only argument; ``--help`` and the like are none."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit(usage)
    return Path(arguments[0])


# --------------------------------------------------------------------------------- running them


def execute(nb: NotebookNode, cwd: Path = NOTEBOOKS) -> NotebookNode:
    """Run a copy of `nb` in a fresh kernel and return it, its outputs filled in."""
    nb = copy.deepcopy(nb)
    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=PATIENCE,
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(cwd)}},
    )
    with same_handlers():
        client.execute()
    return nb


@contextmanager
def same_handlers() -> Iterator[None]:
    """Put back the signal handlers that nbclient replaces with Python's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["execute", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="all notebooks if none is given")
    options = parser.parse_args(arguments)
    bad = 0
    for path in options.paths or lessons():
        found = []
        started = time.perf_counter()
        if options.action == "execute":
            try:
                nb = execute(nbformat.read(path, as_version=4), cwd=path.parent)
                path.write_text(dumps(normalise(nb)), encoding="utf-8", newline="\n")
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                found = [f"did not run, file left as it was: {error}"]
        found = found or file_problems(path)
        print(f"{path.name}: {len(found)} problems, {time.perf_counter() - started:.1f} s")
        for problem in found:
            print("  " + problem)
        bad += len(found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
