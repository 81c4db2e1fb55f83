"""The notebook tools mend what they may, report the rest, and read exercises strictly."""

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from notebook_tools import (
    WIDGET_VIEW,
    dumps,
    execute,
    exercises,
    file_problems,
    main,
    normalise,
    problems,
    said,
    with_solutions,
)


def code(source: str = "x = 1", cell_id: str = "set-x", tags=(), outputs=(), **fields):
    cell = new_code_cell(source, id=cell_id, execution_count=1, outputs=list(outputs), **fields)
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


def stream(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


def notebook(*cells):
    return new_notebook(cells=list(cells))


def canonical(*cells):
    return normalise(notebook(*cells))


def figure() -> str:
    """A shaded disc, in base64: more colours than a palette has."""
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 120)])
    shade = np.clip(300 * (1 - np.hypot(x, y)), 0, 255)
    colours = np.stack([shade, 255 - shade, 128 + 60 * x, 0 * x + 255], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(colours.astype("uint8"), "RGBA").save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(png: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    return np.asarray(picture).astype(int)


def test_a_normal_notebook_has_no_problems_and_stays_as_it_is():
    nb = canonical(new_markdown_cell("# Meet", id="title"), code(outputs=[stream("1\n")]))
    assert problems(nb) == []
    assert normalise(nb) == nb


def test_normalise_keeps_a_widgets_picture_and_drops_its_view():
    data = {WIDGET_VIEW: {"model_id": "a"}, "text/plain": "Explorer()", "image/png": figure()}
    nb = notebook(code(outputs=[new_output("display_data", data=data)]))
    nb.metadata["widgets"] = {"state": {}}
    nb.cells[0].metadata["execution"] = {"iopub.status.busy": "12:00"}
    assert len(problems(nb)) == 3
    nb = normalise(nb)
    assert set(nb.cells[0].outputs[0].data) == {"text/plain", "image/png"}
    assert problems(nb) == []


def test_normalise_stores_a_figure_in_fewer_bytes_and_nobody_sees_it():
    before = figure()
    nb = notebook(code(outputs=[new_output("display_data", data={"image/png": before})]))
    once = normalise(nb)
    after = once.cells[0].outputs[0].data["image/png"]
    assert len(after) < len(before)
    assert np.abs(pixels(after) - pixels(before)).max() <= 8
    assert normalise(once) == once


def test_normalise_merges_streams_that_follow_each_other():
    outputs = [stream("a"), stream("b"), stream("c", "stderr"), stream("d")]
    nb = canonical(code(outputs=outputs, tags=["nbval-ignore-output"]))
    assert [output.text for output in nb.cells[0].outputs] == ["ab", "c", "d"]
    assert problems(nb) == []


def test_normalise_names_cells_and_drops_empty_ones():
    nb = canonical(
        new_markdown_cell("# Meet your GPUs\n\nHello.", id="0fce1a2b"),
        new_markdown_cell("Meet your GPUs!", id="b9e0c0de-1111-2222-3333-444455556666"),
        code("import torch", cell_id="chosen"),
        new_markdown_cell("## →", id="Not_Allowed"),
        code("  \n"),
    )
    names = ["meet-your-gpus", "meet-your-gpus-2", "chosen", "markdown-cell"]
    assert [cell.id for cell in nb.cells] == names


def test_normalise_takes_paths_out_of_tracebacks():
    traceback = [
        "File \x1b[32m~/a/course_lib/virtual/tensor.py:9\x1b[39m, in f()",
        "File /a/.venv/lib/python3.11/site-packages/torch/nn/linear.py:1",
        "Cell In[1], line 1",
    ]
    error = new_output("error", ename="E", evalue="no", traceback=traceback)
    nb = canonical(code(outputs=[error], tags=["raises-exception"]))
    assert nb.cells[0].outputs[0].traceback == [
        "File \x1b[32mcourse_lib/virtual/tensor.py:9\x1b[39m, in f()",
        "File torch/nn/linear.py:1",
        "Cell In[1], line 1",
    ]
    assert problems(nb) == []


def result(text: str):
    return new_output("execute_result", data={"text/plain": text}, execution_count=1)


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (code(outputs=[stream("<f at 0x7f3a>")]), "memory address"),
        (code("object()", outputs=[result("<object object at 0x7f1c2b9d0a10>")]), "memory address"),
        (code("plot([1, 2]);"), "semicolon"),
        (code(outputs=[stream("UserWarning: old", "stderr")]), "stderr"),
        (code(outputs=[stream("in /home/ada/x.py")]), "path of this machine"),
        (code(outputs=[stream("in C:\\Users\\ada\\x.py")]), "path of this machine"),
        (code(outputs=[stream("2026-09-22 14:03:11.482913")]), "time of day"),
        (code(outputs=[stream("ready at 9:03:11")]), "time of day"),
        (code("print(took)", outputs=[stream("took 0.1837 s")]), "duration"),
        (code("print(took)", outputs=[stream("Elapsed: 18 ms")]), "duration"),
        (code("print(perf_counter() - start)", outputs=[stream("0.18")]), "real clock"),
        (code("datetime.datetime.now()", outputs=[result("noon")]), "real clock"),
        (code(outputs=[stream("{'norm', 'head', 'bias'}")]), "a set, whose order changes"),
        (code(outputs=[result("frozenset({'a', 'b'})")]), "a set, whose order changes"),
        (code(outputs=[stream("kept in tmpab12cd")]), "temporary folder"),
        (code(outputs=[new_output("error", ename="ValueError")]), "ValueError without the tag"),
        (code("\n".join(["x = 1"] * 46)), "46 lines"),
        (new_markdown_cell("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |", id="t"), "stands alone"),
    ],
)
def test_problems_that_only_an_author_can_mend(cell, problem: str):
    (found,) = problems(canonical(cell))
    assert problem in found


def test_a_folder_for_temporary_files_is_named_twice():
    path, folder = problems(canonical(code(outputs=[stream("/tmp/tmpab12cd")])))[::-1]
    assert "path of this machine" in path and "temporary folder" in folder


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("print(t.seconds)", "it took: 25.6 ms"),
        ("show(times)", "took 25.6 ms, simulated"),
        ("start = perf_counter()", ""),
        ("print(sizes)", "{'norm': 3, 'head': 'a', 'bias': {'b': 1}}"),
        ("print(f'{{x, y}}')", "{x, y} and {'alone'}"),
        ("print(ratio)", "3:20 and 1.5 ms, 2026-09-22"),
        ("print(attempt)", "attempt.tmp and tmp"),
    ],
)
def test_what_stays_as_it_is_from_run_to_run_is_no_problem(source: str, output: str):
    assert problems(canonical(code(source, outputs=[stream(output)] if output else []))) == []


def test_measured_times_are_welcome_where_nbval_does_not_compare():
    cell = code("print(perf_counter())", outputs=[stream("took 0.18 s at 14:03:11")])
    cell.metadata["tags"] = ["nbval-ignore-output"]
    assert problems(canonical(cell)) == []


def test_prose_with_slashes_is_no_path():
    text = "0.5 GB/s, and/or https://host/home/x, images/usr/a.png, 1 /2"
    assert problems(canonical(code(outputs=[stream(text)]))) == []


def test_execution_counts_run_from_one():
    second = code("y = 1", cell_id="set-y")
    (found,) = problems(canonical(code(), second))
    assert "execution count is 1 instead of 2" in found


def test_the_file_itself_is_canonical(tmp_path: Path):
    path = tmp_path / "x.ipynb"
    path.write_text(dumps(canonical(code())), newline="\n")
    assert file_problems(path) == []
    path.write_text(path.read_text().rstrip("\n"), newline="\n")
    assert len(file_problems(path)) == 1


SOLUTION = "def double(x):\n    return 2 * x"


def lesson(stub: str | None = None, solution: str | None = None):
    stub = stub or 'def double(x):\n    """Twice `x`."""\n    raise NotImplementedError'
    solution = solution or (
        "<details><summary>Hint</summary>\n\nAdd.\n\n</details>\n\n"
        f"<details><summary>Solution</summary>\n\n```python\n{SOLUTION}\n```\n\n</details>"
    )
    check = (
        "try:\n    print('right' if double(2) == 4 else 'wrong')\n"
        "except NotImplementedError:\n    print('not attempted')"
    )
    return notebook(
        code(stub, cell_id="ex-double"),
        code(check, cell_id="check-double"),
        new_markdown_cell(solution, id="sol-double"),
    )


def test_an_exercise_is_read_and_its_solution_is_right():
    (exercise,) = exercises(lesson())
    assert (exercise.name, exercise.hint, exercise.solution) == ("double", "Add.", SOLUTION)
    assert said(execute(lesson(), cwd=Path.cwd()).cells[1]) == "not attempted"
    assert said(execute(with_solutions(lesson()), cwd=Path.cwd()).cells[1]) == "right"


HINT = "<details><summary>Hint</summary>Add.</details>"
OPEN = HINT.replace("details>", "details open>", 1) + HINT.replace("Hint", "Solution")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lesson(stub="def double(x):\n    raise NotImplementedError"), "docstring"),
        (lesson(stub='def double(x):\n    """Twice."""\n    return x'), "does not raise"),
        (lesson(stub="raise NotImplementedError"), "no function"),
        (lesson(solution=HINT), "not Hint and Solution"),
        (lesson(solution=HINT + "<details><summary>Solution</summary>"), "not closed"),
        (lesson(solution=HINT + "<details><summary>Solution</summary>2x</details>"), "one ```"),
        (lesson(solution=OPEN), "open"),
        (notebook(lesson().cells[0]), "no check-double"),
        (notebook(*lesson().cells[:2]), "no sol-double"),
    ],
)
def test_an_exercise_in_another_form_is_refused(broken, message: str):
    with pytest.raises(ValueError, match=message):
        exercises(broken)


def test_execute_from_the_command_line(tmp_path: Path, capsys):
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print('a'); print('b')")]), good)
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), bad)
    before = bad.read_text()
    assert main(["execute", str(good)]) == 0
    assert main(["check", str(good)]) == 0
    assert main(["execute", str(bad)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert bad.read_text() == before
    (cell,) = nbformat.read(good, as_version=4).cells
    assert (cell.id, said(cell)) == ("print-a-print-b", "a\nb")
