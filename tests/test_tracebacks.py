"""Tracebacks in a notebook end in the line that the learner wrote."""

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from course_lib.tracebacks import up_to_the_learner
from notebook_tools import ANSI, PATIENCE, same_handlers

SETUP = """import torch, course_lib
gpus = course_lib.devices(2, course_lib.CLASSROOM.with_(memory=1e6))
def mine(a, b):
    return torch.nn.functional.linear(a, b)
"""
CELLS = {
    "devices mixed": "mine(torch.ones(2, 2, device=gpus[0]), torch.ones(2, 2, device=gpus[1]))",
    "out of memory": "layer = torch.nn.Linear(2000, 2000).to(gpus[0])",
    "in backward": "x = torch.ones(400, 400, device=gpus[0], requires_grad=True)\n"
    "(x.exp() @ x).sum().backward()",
}


def said(*sources: str) -> list[str]:
    """The lines of the error that ends each cell but the first."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nb = nbformat.v4.new_notebook(cells=cells)
    with same_handlers():
        NotebookClient(nb, timeout=PATIENCE, kernel_name="python3", allow_errors=True).execute()
    texts = []
    for cell in cells[1:]:
        (error,) = [out for out in cell.outputs if out.output_type == "error"]
        texts.append(ANSI.sub("", "\n".join(error.traceback)))
    return texts


def test_no_line_of_pytorch_or_of_the_course_is_shown() -> None:
    for name, text in zip(CELLS, said(SETUP, *CELLS.values()), strict=True):
        assert "site-packages" not in text and "course_lib/" not in text, name
        assert len(text.splitlines()) <= 22, name


def test_the_learners_own_helper_is_the_last_line_shown() -> None:
    (text,) = said(SETUP, CELLS["devices mixed"])
    assert text.index("mine(torch.ones") < text.index("return torch.nn.functional.linear(a, b)")


def test_verbose_mode_brings_the_rest_back() -> None:
    (text,) = said(SETUP + "\n%xmode Verbose", CELLS["out of memory"])
    assert "course_lib" in text and len(text.splitlines()) > 25


def test_an_error_of_the_learner_alone_stays_whole() -> None:
    with pytest.raises(ZeroDivisionError) as info:
        torch.nn.Sequential(torch.nn.Identity()).apply(lambda module: 1 / 0)
    tb = info.value.__traceback__
    assert up_to_the_learner(tb) is tb
    assert up_to_the_learner(None) is None
