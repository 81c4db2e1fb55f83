"""How Sphinx makes the web page out of what tools/stage_site.py laid out."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tools")]

project = "Multi-GPU training, by hand"
author = "The course authors"
copyright = "The course authors, under the MIT licence"
with open(HERE.parent / "pyproject.toml", "rb") as file:
    release = tomllib.load(file)["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "maths",  # beside this file
    "word_links",  # likewise
]
exclude_patterns = ["files/**", "_extra/**"]

# The committed outputs, as they are.
nb_execution_mode = "off"
nb_merge_streams = True
nb_number_source_lines = False
nb_render_markdown_format = "myst"  # what a cell shows may be a table
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

napoleon_use_ivar = True  # what a class holds is listed once
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "separated"
add_module_names = False
python_maximum_signature_line_length = 88
# A type that is only imported for the checker, and a module's attribute without its words.
suppress_warnings = ["sphinx_autodoc_typehints", "autodoc.import_object", "ref.python"]

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_extra_path = [str(HERE.parent / "build" / "site-source" / "_extra")]  # kept pictures
html_css_files = ["course.css"]
html_js_files = [("course.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#005a8d", "color-brand-content": "#005a8d"},
    "dark_css_variables": {"color-brand-primary": "#6cc0f5", "color-brand-content": "#6cc0f5"},
}


def _level_of_captions(app, pagename, templatename, context, doctree):
    """A heading for a screen reader has a level."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app):
    app.connect("html-page-context", _level_of_captions, priority=900)  # when the theme is done
