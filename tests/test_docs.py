"""What is written about the package is true of the package."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import tomllib
import types
from pathlib import Path

import array_api_strict
import numpy as np
import pytest

import natgrad_array as ng
from natgrad_array import _support
from natgrad_array.optimizers.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "howto").glob("*.md"))]
QUICK_START = (
    'python -m pip install ".[demo]" && natgrad-array demo',
    'python -m pip install ".[test]" && python -m pytest',
)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def public_callables():
    """Shortest paths from the package to everything public that can be called."""
    names = {}
    rooms = ("adapters", "deep_linear", "networks", "optimizers", "simulation")
    rooms = {f"{name}.": getattr(ng, name) for name in rooms} | {"": ng}
    for prefix, module in rooms.items():
        names |= {value: prefix + name for name in module.__all__ if callable(value := getattr(module, name))}
    # What an optimizer is made of works where the presets made of it do.
    parts = {f"optimizers.{name}" for name in ng.optimizers.__all__ if name[0].isupper() and name != "Optimizer"}
    return set(names.values()) - parts - {"simulation.CheckpointError"}


def resolve(path):
    """The object behind a name such as ``ng.deep_linear.fisher(...).block``."""
    value = ng
    for part in path.split(".", 1)[1].replace("(...)", "()").split("."):
        value = getattr(value, part.removesuffix("()"))
        if part.endswith("()"):
            eye = np.eye(2)
            value = value((eye,), ng.GaussianTask(eye, eye, eye, eye))
    return value


# --------------------------------------------------------------------------- the commands


def test_readme_quick_start_is_the_two_commands():
    section = re.search(r"^## Quick start$(.*?)^## ", read("README.md"), re.MULTILINE | re.DOTALL)[1]
    assert tuple(re.findall(r"^```sh\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)) == QUICK_START


def test_start_page_has_the_first_command():
    assert QUICK_START[0] in read("docs/start.md").splitlines()


def test_ci_ends_with_the_second_command():
    lines = read(".ci/run").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == QUICK_START[1]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_ci_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --------------------------------------------------------------------------- project data


def test_run_time_dependencies():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"numpy", "array-api-compat", "array-api-extra"}
    assert {"cuda12", "cuda13", "optax", "torch", "demo", "test", "docs"} <= set(project["optional-dependencies"])


def test_changelog_has_the_version():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert re.search(rf"^## {re.escape(version)} ", read("CHANGELOG.md"), re.MULTILINE)


# --------------------------------------------------------------------------- declarations


def test_every_public_callable_has_a_support_row():
    names = [row.name for row in _support.SUPPORT]
    assert len(names) == len(set(names))
    assert set(names) == public_callables()


@pytest.mark.parametrize("row", _support.SUPPORT, ids=lambda row: row.name)
def test_support_row(row):
    assert set(row.libraries) <= set(_support.LIBRARIES)
    # What the array API standard gives, every library has that follows it.
    assert set(row.libraries) >= set(_support.LIBRARIES) - {"dask"}
    assert not row.jit or "jax" in row.libraries


# -------------------------------------------------------------------------------- the text


def theory_rows():
    """(equations, functions, tests) of the rows of the theory page's two tables."""
    rows = []
    for line in read("docs/theory.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and "`tests/" in cells[-1]:
            rows.append((cells[0], re.findall(r"`([^`]+)`", cells[-2]), re.findall(r"`([^`]+)`", cells[-1])))
    return rows


def test_theory_table_covers_every_equation():
    numbers = []
    for equations, _, _ in theory_rows():
        if re.fullmatch(r"[\d–, ]+", equations):
            for part in equations.split(", "):
                first, _, last = part.partition("–")
                numbers += range(int(first), int(last or first) + 1)
    assert sorted(numbers) == list(range(1, 46))


def test_theory_table_names_things_that_are_there():
    rows = theory_rows()
    assert rows
    for equations, functions, tests in rows:
        assert functions, equations
        assert all(callable(resolve(function)) for function in functions)
        for test in tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), test
            assert not name or re.search(rf"^\s*def {re.escape(name)}\b", read(path), re.MULTILINE), test


def test_presets_take_what_their_table_says():
    rows = [line.split(" | ") for line in read("docs/optimizers.md").splitlines() if line.startswith("| `")]
    said = {name: row[-2] for row in rows if len(row) == 7 for name in re.findall(r"`([a-z_]+)`", row[0])}
    assert set(said) == set(PRESETS)
    for name, make in PRESETS.items():
        known = inspect.signature(make).parameters
        options = {"rate": "learning_rate", "damping": "damping", "momentum": "momentum"}
        # One line holds two presets, and says so.
        words = said[name].replace("; `sgd` momentum", ", momentum" if name == "sgd" else "").split(", ")
        assert {options[word] for word in words} == set(options.values()) & set(known), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_are_public(page):
    names = re.findall(r"`(ng\.[\w.]+(?:\(\.\.\.\)\.\w+)?)`", page.read_text(encoding="utf-8"))
    for name in names:
        resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_the_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if any("import torch" in block for block in blocks):
        pytest.importorskip("torch")
    scope = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
    if page.name == "README.md":
        assert scope["weights"][0].shape == (1000, 5, 4)
    if page.name == "start.md":
        assert abs(scope["rate"] - 2) < 0.1


# The command line is left out: it needs an extra and prints.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(ng.__path__, "natgrad_array.")
    if ".cli" not in module.name and not module.name.endswith("__main__")
]


def strict_namespace():
    """array-api-strict, and what examples take from NumPy that no standard has: comparisons, and draws on the host."""
    known = types.ModuleType("strict")
    known.__dict__.update({key: getattr(array_api_strict, key) for key in dir(array_api_strict) if key[0] != "_"})
    known.diag = lambda values: array_api_strict.asarray(np.diag(values))
    known.allclose = lambda a, b: np.allclose(np.asarray(a), np.asarray(b))
    known.isclose = lambda a, b: np.isclose(np.asarray(a), np.asarray(b))
    known.random = np.random
    return known


class SameNumbers(doctest.OutputChecker):
    """Arrays of two libraries print alike but for what they are called."""

    def check_output(self, want, got, optionflags):
        return super().check_output(self.bare(want), self.bare(got), optionflags | doctest.NORMALIZE_WHITESPACE)

    @staticmethod
    def bare(text):
        text = re.sub(r"\bnp\.(?:float64|float32|int64|bool)\(([^()]*)\)|\bnp\.(True|False)_", r"\1\2", text)
        return re.sub(r"\barray\(([^\[\]()]+)\)", r"\1", text)


def test_docstring_examples_on_array_api_strict(monkeypatch):
    """The examples that tests/test_public.py runs on NumPy, with array-api-strict where they import it."""
    monkeypatch.setattr(type(array_api_strict.asarray(0.0)), "__repr__", lambda self: repr(np.asarray(self)))
    runner = doctest.DocTestRunner(SameNumbers(), verbose=False, optionflags=doctest.ELLIPSIS)
    for name in MODULES:
        if name in ("natgrad_array.adapters.torch", "natgrad_array.adapters.optax"):
            continue  # examples of another library
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
            for example in test.examples:
                source = re.sub(r"^import numpy as np$", "np = strict", example.source, flags=re.MULTILINE)
                # Draws are those of NumPy's generators here and there.
                example.source = re.sub(r"([\w.]+(?:\(0\))?\.standard_normal\(\([^()]*\)\))", r"np.asarray(\1)", source)
            test.globs["strict"] = strict_namespace()
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 200


@pytest.mark.parametrize("name", sorted(public_callables()))
def test_public_docstrings_have_the_sections(name):
    text = resolve(f"ng.{name}").__doc__ or ""
    sections = re.findall(r"^ *(\w[\w ]*)\n *-{3,}$", text, re.MULTILINE)
    assert len(text.splitlines()[0]) > 20, "no summary"
    assert {"Parameters", "Attributes"} & set(sections), f"{name} does not say what it takes or holds"
    assert inspect.isclass(resolve(f"ng.{name}")) or {"Returns", "Raises"} <= set(sections), name
    # A class that a function makes is shown in use by that function.
    assert "Examples" in sections or re.search(r"made by `\w+`", text.splitlines()[0]), f"{name} has no example"
