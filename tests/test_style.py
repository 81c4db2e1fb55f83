"""Figures have words for who cannot see them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import nbclient
import nbformat
from matplotlib.figure import Figure

from course_lib import style


def a_figure() -> Figure:
    fig, axes = style.figure(columns=2)
    axes[0].plot([1, 2], [3, 4], label="by hand")
    axes[0].set(xlabel="GPUs", ylabel="speed-up", title="One block (simulated)")
    axes[1].set_title("Nothing yet")
    plt.close(fig)
    return fig


def test_a_figure_in_words_has_its_titles_its_axes_and_what_is_drawn():
    assert style.in_words(a_figure()) == (
        "One block (simulated), speed-up against GPUs, with by hand; Nothing yet"
    )


def test_a_figure_without_words_says_so():
    fig, _ = style.figure()
    plt.close(fig)
    assert style.in_words(fig) == "a figure without a title"


def test_in_a_notebook_the_words_go_with_the_picture():
    source = """
import matplotlib.pyplot as plt
from course_lib import style
style.use()
style.figure()[1].set_title("One block")
plt.show()
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.metadata["image/png"]["alt"] == "One block"
