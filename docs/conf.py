"""Sphinx configuration."""

import importlib.util
import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "docs" / "_ext")]

import natgrad_array

project_table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project = project_table["name"]
author = "natgrad-array developers"
copyright = f"2026, {author}"
version = release = project_table["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "natgrad_docs",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autosummary_context = {"package_level": natgrad_array.__all__}
autodoc_typehints = "none"
# Adapters are documented on machines without their libraries too.
autodoc_mock_imports = [name for name in ("jax", "optax", "torch") if importlib.util.find_spec(name) is None]
numpydoc_show_class_members = False

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "natgrad-array"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
}
html_sidebars = {"index": [], "start": [], "concepts": [], "theory": [], "care": [], "support": []}
