"""The documentation site: ``make docs`` builds ``docs/`` and the docstrings into ``site/``. Nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "teacher-cache"
copyright = ""
html_show_copyright = False
html_show_sphinx = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "project_pages",
    "command_reference",
    "settings_reference",
]
exclude_patterns = ["_ext", "_static"]
# a name such as samples belongs to several classes, and none of them is meant where it is only typed
suppress_warnings = ["ref.python"]

myst_heading_anchors = 4
# fences without a language hold trees, tables of a terminal and commands alike
highlight_language = "text"

# --flags and quotes are to be copied as they are typed
smartquotes = False

html_theme = "furo"
html_title = "teacher-cache"
html_static_path = ["_static"]
html_favicon = "_static/mark.svg"  # without one a browser asks for one and is told 404
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5c8f", "color-brand-content": "#0b5c8f"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"},
}
html_copy_source = False
html_show_sourcelink = False

# what is copied is what is typed
copybutton_selector = "div.highlight-sh pre, div.highlight-python pre, div.highlight-toml pre, div.highlight-yaml pre"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
# shapes and types are named as the code names them, without the folders
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_numpy_docstring = False

nitpicky = True
# names of other libraries lead nowhere: their documentation is not here, and no inventory is fetched
nitpick_ignore_regex = [
    ("py:.*", r"(?!teacher_cache\.).*"),
    # a base class or a type variable that is nobody's to use
    ("py:.*", r".*\._\w+"),
    # the commands have a reference of their own
    ("py:.*", r"teacher_cache\.\w+\.cli\..*"),
]
