"""What the core asks of an array library: only what CuPy has too, and as often for one member as for fifty."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
from cases import factors, positive_definite
from recording import EXTENSIONS, Call, complaint, record

import natgrad_array as ng
from natgrad_array import deep_linear as dl

CUPY = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy has no build for this system")
SIZES = {"wide": (4, 6, 5, 3), "intermediate": (6, 5, 4, 3), "bottleneck": (5, 2, 4)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def psd(batch: int, n: int, seed: int = 0) -> np.ndarray:
    return positive_definite((batch,), n, seed)


def singular(batch: int, n: int, rank: int) -> np.ndarray:
    half = factors((batch,), n, n, rank)
    return half @ np.swapaxes(half, -1, -2)


def network(batch: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    layers = zip(sizes[1:], sizes[:-1], strict=True)
    return tuple(factors((batch,), m, n, min(m, n), seed) for seed, (m, n) in enumerate(layers))


def task(batch: int, sizes: tuple[int, ...], *, dead: int = 0) -> ng.GaussianTask:
    x, y = normal(1, batch, 40, sizes[0]), normal(2, batch, 40, sizes[-1])
    x[..., :dead] = 0.0
    return ng.GaussianTask.from_samples(x, y)


def pair(batch: int, kind: str = "wide") -> tuple[tuple[np.ndarray, ...], ng.GaussianTask]:
    return network(batch, SIZES[kind]), task(batch, SIZES[kind])


def deferred(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def of_fisher(method: str, *args: Any, kind: str = "wide", **options: Any) -> Callable[[int], Callable[[], Any]]:
    def make(batch: int) -> Callable[[], Any]:
        weights, goal = pair(batch, kind)
        tangent = tuple(normal(3, *w.shape) for w in weights)
        given = tuple(tangent if arg == "tangent" else arg for arg in args)
        # Made inside, since it keeps what it has computed.
        return lambda: getattr(dl.fisher(weights, goal), method)(*given, **options)

    return make


def of_pair(function: Callable[..., Any], kind: str = "wide", **options: Any) -> Callable[[int], Callable[[], Any]]:
    return lambda batch: deferred(function, *pair(batch, kind), **options)


def of_weights(function: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    return lambda batch: deferred(function, network(batch, SIZES["wide"]))


def of_moments(method: str, *args: Any) -> Callable[[int], Callable[[], Any]]:
    def make(batch: int) -> Callable[[], Any]:
        moments = ng.Moments.from_samples(normal(0, batch, 9, 4))
        given = tuple(moments if arg == "self" else arg for arg in args)
        return lambda: getattr(moments, method)(*given)

    return make


#: Named calls: the public name, a remark after a space, and from a batch size a call to record.
CALLS: dict[str, Callable[[int], Callable[[], Any]]] = {
    # linalg
    **{
        f"pinvh {method}": lambda b, m=method: deferred(ng.pinvh, psd(b, 5), method=m)
        for method in ("auto", "eigh", "cholesky")
    },
    "pinvh singular": lambda b: deferred(ng.pinvh, singular(b, 5, 3), method="eigh"),
    "pinvh empty": lambda b: deferred(ng.pinvh, np.zeros((b, 0, 0))),
    "pinvh integers": lambda b: deferred(ng.pinvh, np.ones((b, 3, 3), dtype=int)),
    "pinvh rtol per member": lambda b: deferred(ng.pinvh, psd(b, 5), rtol=np.full(b, 0.1)),
    "pinvh cholesky, rtol per member": lambda b: deferred(
        ng.pinvh, psd(b, 5), rtol=np.full(b, 1e-9), method="cholesky"
    ),
    "pinvh large": lambda b: deferred(ng.pinvh, psd(b, 17), method="cholesky"),
    "precondition": lambda b: deferred(ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3)),
    "precondition damped": lambda b: deferred(ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3), damping=0.1),
    "precondition damped per member": lambda b: deferred(
        ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3), damping=np.full(b, 0.1), rtol=np.full(b, 1e-3)
    ),
    # moments
    "second_moment": lambda b: deferred(ng.second_moment, normal(0, b, 9, 4)),
    "second_moment of two": lambda b: deferred(ng.second_moment, normal(0, b, 9, 4), normal(1, b, 9, 2)),
    "second_moment weighted": lambda b: deferred(
        ng.second_moment, normal(0, b, 9, 4), normal(1, b, 9, 2), weights=np.ones((b, 9))
    ),
    "covariance": lambda b: deferred(ng.covariance, normal(0, b, 9, 4)),
    "covariance weighted": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), weights=np.ones((b, 9)), correction=1),
    "covariance centred": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), assume_centered=True, shrinkage=0.1),
    "covariance ledoit_wolf": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), shrinkage="ledoit_wolf"),
    "covariance oas": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), shrinkage="oas"),
    **{
        f"covariance many samples {name}, mean {mean}": lambda b, name=name, mean=mean: deferred(
            ng.covariance, normal(0, b, 90, 4) + mean, shrinkage=name
        )
        for name in (None, "ledoit_wolf", "oas")
        for mean in (0, 5)
    },
    "Moments.from_samples": lambda b: deferred(ng.Moments.from_samples, normal(0, b, 9, 4)),
    "Moments.from_samples many samples": lambda b: deferred(ng.Moments.from_samples, normal(0, b, 90, 4)),
    "Moments.from_samples weighted": lambda b: deferred(
        ng.Moments.from_samples, normal(0, b, 9, 4), weights=np.ones((b, 9))
    ),
    "Moments.empty": lambda b: deferred(ng.Moments.empty, 4, like=normal(0, 1), batch_shape=(b,)),
    "Moments.merge": of_moments("merge", "self"),
    "Moments.discount": of_moments("discount", 0.5),
    "Moments.second_moment": of_moments("second_moment"),
    "Moments.covariance": of_moments("covariance"),
    # deep_linear: the task
    "GaussianTask": lambda b: deferred(ng.GaussianTask, psd(b, 4), psd(b, 3), normal(0, b, 3, 4) / 200, 9 * psd(b, 3)),
    "GaussianTask.from_samples": lambda b: deferred(
        ng.GaussianTask.from_samples, normal(0, b, 9, 4), normal(1, b, 9, 2)
    ),
    "GaussianTask.from_samples dead inputs": lambda b: deferred(task, b, (4, 2), dead=2),
    "GaussianTask.from_moments": lambda b: deferred(
        ng.GaussianTask.from_moments, ng.Moments.from_samples(normal(0, b, 9, 6)), 4
    ),
    "GaussianTask.from_modes": lambda b: deferred(
        ng.GaussianTask.from_modes, factors((b,), 3, 2, 2), np.ones((b, 2)), factors((b,), 4, 2, 2)
    ),
    "GaussianTask.optimum": lambda b: deferred(task(b, (4, 2)).optimum),
    "GaussianTask.minimum_loss": lambda b: deferred(task(b, (4, 2)).minimum_loss),
    # deep_linear: functions of weights and task
    **{
        f"deep_linear.{name}": of_weights(getattr(dl, name))
        for name in ("end_to_end", "end_to_end_kernel", "balancedness", "regime")
    },
    **{
        f"deep_linear.{name}": of_pair(getattr(dl, name))
        for name in ("loss", "excess_loss", "gradient", "fisher", "exact_velocity", "projections")
    },
    "deep_linear.end_to_end_velocity": lambda b: deferred(
        dl.end_to_end_velocity, network(b, SIZES["wide"]), network(b, SIZES["wide"])
    ),
    "deep_linear.exact_velocity bottleneck": of_pair(dl.exact_velocity, "bottleneck"),
    **{
        f"deep_linear.natural_gradient {inverse}, {kind}, {method}": of_pair(
            dl.natural_gradient, kind, inverse=inverse, method=method
        )
        for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal")
        for kind in SIZES
        for method in ("auto", "eigh", "cholesky")
        if (inverse, method) != ("moore_penrose", "cholesky")
    },
    "deep_linear.natural_gradient rtol per member": lambda b: deferred(
        dl.natural_gradient, *pair(b), rtol=np.full(b, 1e-9)
    ),
    "deep_linear.natural_gradient one layer": lambda b: deferred(
        dl.natural_gradient, network(b, (4, 3)), task(b, (4, 3)), inverse="moore_penrose"
    ),
    "deep_linear.natural_gradient dead inputs": lambda b: deferred(
        dl.natural_gradient, network(b, (4, 5, 3)), task(b, (4, 3), dead=1), inverse="moore_penrose"
    ),
    # deep_linear: the Fisher object
    "deep_linear.DeepLinearFisher.factors": of_fisher("factors", 0, 1),
    "deep_linear.DeepLinearFisher.block": of_fisher("block", 0, 1),
    "deep_linear.DeepLinearFisher.to_dense": of_fisher("to_dense"),
    "deep_linear.DeepLinearFisher.matvec": of_fisher("matvec", "tangent"),
    **{
        f"deep_linear.DeepLinearFisher.precondition {inverse}, {kind}": of_fisher(
            "precondition", "tangent", kind=kind, inverse=inverse
        )
        for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal")
        for kind in SIZES
    },
    "deep_linear.DeepLinearFisher.rank": of_fisher("rank"),
    "deep_linear.DeepLinearFisher.spectrum": of_fisher("spectrum"),
    "deep_linear.DeepLinearFisher.logdet": of_fisher("logdet"),
    # deep_linear: dynamics and networks to start from
    "deep_linear.natural_gradient_flow": lambda b: deferred(
        dl.natural_gradient_flow, normal(0, b, 2, 4), task(b, (4, 2)), 0.5
    ),
    "deep_linear.natural_gradient_flow_modes": lambda b: deferred(
        dl.natural_gradient_flow_modes, np.full((b, 2), 0.1), np.full((b, 2), 2.0), 0.5
    ),
    **{
        f"deep_linear.gradient_flow_modes depth {depth}": lambda b, depth=depth: deferred(
            dl.gradient_flow_modes, np.full((b, 2), 0.1), np.full((b, 2), 2.0), 0.5, depth=depth
        )
        for depth in (1, 2, 3)
    },
    "deep_linear.euler_decay_rate": lambda b: deferred(dl.euler_decay_rate, np.full(b, 0.1)),
    **{
        f"deep_linear.{f.__name__}": lambda b, f=f: deferred(f, 0, (4, 5, 3), (b,), like=normal(0, 1))
        for f in (dl.gaussian, dl.small, dl.orthogonal, dl.balanced)
    },
    # verification
    "verify": of_pair(ng.verify),
    "verify bottleneck": of_pair(ng.verify, "bottleneck"),
    "check_preconditioner": lambda b: deferred(ng.check_preconditioner, lambda gradient: gradient, *pair(b)),
}


#: These read shapes, or what was computed when the object was made, or work by operators alone.
NO_CALLS = {
    "GaussianTask.optimum",
    "GaussianTask.minimum_loss",
    "deep_linear.end_to_end",
    "deep_linear.end_to_end_velocity",
    "deep_linear.natural_gradient_flow",
    "deep_linear.regime",
}


def cupy_namespace() -> ModuleType:
    """CuPy's namespace with its extensions, which are modules of their own; no GPU is needed."""
    for extension in EXTENSIONS:
        importlib.import_module(f"array_api_compat.cupy.{extension}")
    return importlib.import_module("array_api_compat.cupy")


def public_callables() -> set[str]:
    """The public functions and classes, by their path from the package."""
    names = {name for name in ng.__all__ if not inspect.ismodule(getattr(ng, name))}
    return names | {f"deep_linear.{name}" for name in dl.__all__ if name != "GaussianTask"}


def test_every_public_callable_is_recorded() -> None:
    recorded = {name.split(" ")[0] for name in CALLS}
    missing = {name for name in public_callables() if not any(r == name or r.startswith(name + ".") for r in recorded)}
    assert not missing


@CUPY
@pytest.mark.parametrize("name", CALLS)
def test_calls_exist_in_cupy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, CALLS[name](3))
    assert calls or name in NO_CALLS
    reasons = [complaint(call, cupy_namespace()) for call in set(calls)]
    assert not [reason for reason in reasons if reason is not None]


@pytest.mark.parametrize("name", CALLS)
def test_calls_do_not_grow_with_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three, fifty = (Counter(record(monkeypatch, CALLS[name](batch))) for batch in (1, 3, 50))
    assert one == three
    assert one == fifty


@CUPY
def test_array_attributes_exist_in_cupy() -> None:
    """Attributes of NumPy arrays that the sources name are attributes of CuPy's arrays."""
    import cupy

    used = set()
    for module in pkgutil.walk_packages(ng.__path__, "natgrad_array."):
        # The command line works on NumPy arrays, and `_arrays` asks each library for what is its own.
        if module.name.startswith(("natgrad_array.cli", "natgrad_array._arrays")):
            continue
        path = module.module_finder.find_spec(module.name, None).origin  # type: ignore[union-attr, call-arg]
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    on_arrays = {name for name in used if hasattr(np.ndarray, name) and not name.startswith("__")}
    assert {"mT", "shape", "dtype"} <= on_arrays
    assert not {name for name in on_arrays if not hasattr(cupy.ndarray, name)}


def test_the_recording_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, lambda: ng.pinvh(np.eye(2)))
    assert any(call.function == "linalg.vecdot" for call in calls)
    assert Call("isdtype", (), 2) in calls
    # The monkeypatch is gone.
    assert isinstance(ng.pinvh(np.eye(2)), np.ndarray)
    assert ng.linalg._arrays.check_arrays({"a": np.eye(2)}) is array_api_compat.numpy


@CUPY
@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (Call("linalg.eigh", (), 1), False),
        (Call("linalg.svd", ("full_matrices",), 1), False),
        (Call("max", ("axis", "keepdims"), 1), False),
        (Call("minimum", (), 2), False),
        (Call("linalg.eigh", ("UPLO",), 1), True),  # would vanish in **kwargs
        (Call("linalg.inv", ("hermitian",), 1), True),
        (Call("linalg.no_such_function", (), 1), True),
        (Call("no_such_function", (), 1), True),
        (Call("matrix_transpose", (), 2), True),
        (Call("minimum", (), 3), True),
        (Call("sqrt", ("where",), 1), True),
        (Call("max", ("initial",), 1), True),
    ],
    ids=str,
)
def test_complaint_can_complain(call: Call, wrong: bool) -> None:
    assert (complaint(call, cupy_namespace()) is not None) == wrong
