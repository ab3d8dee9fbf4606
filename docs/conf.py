"""Sphinx configuration."""

import importlib.util
import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "docs" / "_ext")]

import natgrad_figures

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
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "natgrad_docs",
    "natgrad_dashboards",
]
exclude_patterns = ["_build", "gallery", "notebooks"]
templates_path = ["_templates"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autosummary_context = {"package_level": natgrad_array.__all__}
autodoc_typehints = "none"
# Adapters are documented on machines without their libraries too.
autodoc_mock_imports = [name for name in ("jax", "optax", "torch") if importlib.util.find_spec(name) is None]
numpydoc_show_class_members = False

# The introduction is a notebook, and a page of the gallery.
(root / "docs" / "gallery" / "plot_introduction.py").write_text(
    natgrad_figures.script(root / "docs" / "notebooks" / "introduction.ipynb"), encoding="utf-8"
)

# Scripts are run when the site is built; one that fails fails the build.
sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["examples"],
    "within_subsection_order": "natgrad_figures.Order",
    "image_scrapers": ("natgrad_figures.scraper",),
    "reset_modules": ("matplotlib", "natgrad_figures.style"),
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "capture_repr": (),
    "plot_gallery": True,
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "natgrad-array"
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# Pages with wide tables and no neighbours.
html_sidebars = {name: [] for name in ("index", "start", "performance", "theory", "comparison")}
