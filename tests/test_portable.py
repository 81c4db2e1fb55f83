"""The run on other CPUs names the cells that print something else, and no others."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from portable import MACHINES, differences, main


def lesson(text: str, tags: tuple[str, ...] = ()):
    cell = new_code_cell("print(x)", id="print-x", metadata={"tags": list(tags)})
    cell.outputs = [new_output("stream", name="stdout", text=text)]
    return new_notebook(cells=[cell])


def test_a_cell_that_prints_something_else_is_named_with_its_first_line_that_differs() -> None:
    found = differences(lesson("one\n0.12\n"), lesson("one\n0.13\n"))
    assert found == ["print-x: '0.12' is now '0.13'"]


def test_a_line_more_is_a_difference() -> None:
    assert differences(lesson("one\n"), lesson("one\ntwo\n")) == ["print-x: '' is now 'two'"]
    assert differences(lesson("one\ntwo\n"), lesson("one\n")) == ["print-x: 'two' is now ''"]


def test_a_print_that_came_in_two_parts_is_no_difference() -> None:
    in_two = lesson("one\n")
    in_two.cells[0].outputs.append(new_output("stream", name="stdout", text="two\n"))
    assert differences(lesson("one\ntwo\n"), in_two) == []


def test_the_same_text_and_cells_that_nobody_compares_are_no_difference() -> None:
    assert differences(lesson("one\n"), lesson("one\n")) == []
    measured = ("nbval-ignore-output",)
    assert differences(lesson("one\n", measured), lesson("two\n", measured)) == []


def test_each_machine_is_tried_in_kernels_of_its_own(tmp_path: Path, capsys) -> None:
    source = (
        "import os; print(os.environ.get('ATEN_CPU_CAPABILITY'), os.environ['OMP_NUM_THREADS'])"
    )
    nb = new_notebook(cells=[new_code_cell(source, id="cpu")])
    nb.cells[0].outputs = [new_output("stream", name="stdout", text="None 1\n")]
    path = tmp_path / "x.ipynb"
    nbformat.write(nb, path)
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert len(MACHINES) == 5 and said.count("1 cells differ") == 4
    for line in ("this CPU: 0 cells differ", "'default 1'", "'avx2 1'", "'None 2'", "'None 8'"):
        assert line in said
