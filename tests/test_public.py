"""What a user sees: the public names, their documentation, and what an import brings along."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import natgrad_array as ng

OPTIONAL = (
    "torch",
    "jax",
    "cupy",
    "dask",
    "distributed",
    "optax",
    "scipy",
    "sklearn",
    "matplotlib",
    "typer",
    "rich",
    "array_api_strict",
    "hypothesis",
    "xarray",
    "zarr",
)
# One example, of `DataParallel` itself, stands for all that cannot run without a cluster.
ON_A_CLUSTER = tuple(f"natgrad_array.optimizers.{name}" for name in ("DataParallel.", "ParallelState"))


def public_modules() -> list[ModuleType]:
    """The package and the modules among its public names, and theirs."""
    found, queue = [], [ng]
    while queue:
        module = queue.pop()
        found.append(module)
        queue += [value for name in module.__all__ if inspect.ismodule(value := getattr(module, name))]
    return found


def public_objects() -> dict[str, Any]:
    """Public functions and classes by their path."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in public_modules()
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    }


def public_methods() -> dict[str, Any]:
    """Public methods of public classes by their path, properties and inherited ones left out."""
    found = {}
    for path, cls in public_objects().items():
        if inspect.isclass(cls):
            for name, member in vars(cls).items():
                function = getattr(member, "__func__", member)
                # A named tuple gets methods that are not of our making.
                if (
                    not name.startswith("_")
                    and inspect.isfunction(function)
                    and function.__module__.startswith("natgrad_array")
                ):
                    found[f"{path}.{name}"] = function
    return found


def every_module() -> list[str]:
    return ["natgrad_array", *(module.name for module in pkgutil.walk_packages(ng.__path__, "natgrad_array."))]


def load(name: str) -> ModuleType:
    """A module of the package; tests go without the one that needs torch where there is none."""
    if name == "natgrad_array.adapters.torch":
        pytest.importorskip("torch")
    return importlib.import_module(name)


def run_python(code: str) -> str:
    """What a fresh interpreter prints; it has to end well."""
    root = str(Path(ng.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: module.__name__)
def test_all_is_what_is_public(module: ModuleType) -> None:
    assert list(module.__all__) == sorted(module.__all__, key=str)
    assert len(set(module.__all__)) == len(module.__all__)
    visible = {name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert visible == {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}


def test_modules_outside_all_are_rooms_of_the_package() -> None:
    for module in public_modules():
        for name, value in vars(module).items():
            if inspect.ismodule(value) and not name.startswith("_"):
                assert value.__name__ == f"{module.__name__}.{name}"


def test_the_contract_of_public_names() -> None:
    """The names that a user's code may rely on."""
    assert {
        "second_moment",
        "covariance",
        "Moments",
        "pinvh",
        "precondition",
        "GaussianTask",
        "deep_linear",
        "verify",
        "check_preconditioner",
        "networks",
        "NetworkFisher",
        "sampled_fisher",
        "empirical_fisher",
        "adapters",
        "simulate",
    } <= set(ng.__all__)
    assert {"History", "log_steps", "CheckpointError", "Groups", "simulate_groups", "simulate_training"} <= set(
        ng.simulation.__all__
    )
    assert {"kronecker_factors", "precondition"} <= set(ng.adapters.__all__)
    assert {"MLP", "ConvNet", "Network"} <= set(ng.networks.__all__)
    assert {
        "end_to_end",
        "loss",
        "gradient",
        "fisher",
        "natural_gradient",
        "end_to_end_velocity",
        "exact_velocity",
        "regime",
    } <= set(ng.deep_linear.__all__)


def test_signatures() -> None:
    """Arrays by position, options by keyword."""
    kinds = inspect.Parameter
    for path, function in public_objects().items():
        if inspect.isclass(function):
            continue
        for parameter in inspect.signature(function).parameters.values():
            allowed = (kinds.POSITIONAL_ONLY, kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD)
            assert parameter.kind in allowed, f"{path}: {parameter}"
    assert str(inspect.signature(ng.pinvh, eval_str=False)).startswith("(a: 'Array', /, *, rtol: ")


def documented(text: str) -> set[str]:
    """The names in the Parameters section of a docstring."""
    section = text.partition("Parameters\n----------\n")[2]
    section = re.split(r"\n\n\w[\w ]*\n-+\n", section)[0]
    heads = [line for line in section.splitlines() if line and not line.startswith(" ")]
    return {name.strip().removeprefix("**") for head in heads for name in head.partition(" : ")[0].split(",")}


@pytest.mark.parametrize("path", public_objects())
def test_docstrings(path: str) -> None:
    thing = public_objects()[path]
    text = inspect.getdoc(thing)
    assert text
    summary = text.splitlines()[0]
    assert summary.endswith(".")
    assert ">>> " in text or path.startswith(ON_A_CLUSTER)
    if inspect.isclass(thing):
        sections = ("Parameters\n----------", "Attributes\n----------")
        assert any(section in text for section in sections) or not inspect.signature(thing).parameters
    else:
        assert "Parameters\n----------" in text
        assert "Returns\n-------" in text
        assert "Examples\n--------" in text
        assert documented(text) == set(inspect.signature(thing).parameters)


@pytest.mark.parametrize("path", public_methods())
def test_docstrings_of_methods(path: str) -> None:
    method = public_methods()[path]
    text = inspect.getdoc(method)
    assert text
    assert ">>> " in text or path.startswith(ON_A_CLUSTER)
    assert "Returns\n-------" in text
    assert documented(text) == set(inspect.signature(method).parameters) - {"self", "cls"}


@pytest.mark.parametrize("name", [name for name in every_module() if not name.startswith("natgrad_array.cli")])
def test_doctests(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    with np.printoptions():
        results = doctest.testmod(load(name), optionflags=flags)
    assert results.failed == 0


@pytest.mark.parametrize("name", every_module())
def test_every_module_says_what_it_is(name: str) -> None:
    assert load(name).__doc__


def test_import_loads_no_other_library() -> None:
    code = f"import sys, natgrad_array; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_runs_without_any_other_library() -> None:
    """On a machine where nothing but the run-time dependencies is installed."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
import natgrad_array as ng
assert np.allclose(ng.pinvh(np.diag([2.0, 0.0])), np.diag([0.5, 0.0]))
x = np.random.default_rng(0).standard_normal((50, 3))
task = ng.GaussianTask.from_samples(x, x[:, :2])
weights = ng.deep_linear.gaussian(0, (3, 4, 2), like=x)
for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal"):
    steps = ng.deep_linear.natural_gradient(weights, task, inverse=inverse)
    assert [step.shape for step in steps] == [(4, 3), (2, 4)]
assert bool(ng.verify(weights, task).holds)
try:
    ng.pinvh([[1.0]])
except TypeError as error:
    print("refused:", str(error).split(",")[0])
"""
    assert run_python(code) == "refused: a must be an array (NumPy"


@pytest.mark.parametrize("library", OPTIONAL)
def test_a_blocked_library_is_no_hindrance(library: str) -> None:
    """Some tools block an import by a None among the modules."""
    code = f"import sys; sys.modules[{library!r}] = None\nimport numpy as np, natgrad_array as ng\n"
    assert run_python(code + "print(ng.pinvh(np.diag([2.0, 0.0])).tolist())") == "[[0.5, 0.0], [0.0, 0.0]]"


def test_the_package_is_typed() -> None:
    assert (Path(ng.__file__).parent / "py.typed").is_file()


def test_integers_of_numpy_are_integers() -> None:
    """Sizes and indices often come out of arrays."""
    two, three, one = np.asarray([2, 3, 1])
    like = np.zeros(())
    weights = ng.deep_linear.gaussian(0, (three, two, two), (two,), like=like)
    for a, b in zip(weights, ng.deep_linear.gaussian(0, (3, 2, 2), (2,), like=like), strict=True):
        np.testing.assert_array_equal(a, b)
    joint = ng.Moments.from_samples(np.random.default_rng(0).standard_normal((20, 5)))
    task = ng.GaussianTask.from_moments(joint, three)
    fisher = ng.deep_linear.fisher(weights, task)
    np.testing.assert_array_equal(fisher.block(one, one), fisher.block(1, 1))
    modes = ng.deep_linear.gradient_flow_modes
    start, end = np.asarray([0.5]), np.asarray([1.0])
    np.testing.assert_array_equal(modes(start, end, 1.0, depth=three), modes(start, end, 1.0, depth=3))
    with pytest.raises(ValueError, match="depth must be a positive integer"):
        modes(start, end, 1.0, depth=np.bool_(True))
