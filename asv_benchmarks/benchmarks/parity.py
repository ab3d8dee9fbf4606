"""A library beside NumPy on every public operation, at small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import natgrad_array as ng
from benchmarks import backends, contests, problems
from benchmarks.backends import Backend

dl = ng.deep_linear

TOLERANCE = {"float64": 1e-9, "float32": 2e-3}
"""Largest difference over the largest entry: roundings differ, and condition numbers are up to 1e3."""

NETWORKS = {
    "square": (6, 6, 6, 6),
    "contracting": (9, 7, 5, 4),
    "expanding": (4, 5, 7, 9),
    "bottleneck": (8, 6, 3, 6, 8),
}
INVERSES = ("layerwise", "exact", "moore_penrose", "block_diagonal")


@dataclass(frozen=True)
class Row:
    """How far one operation is from NumPy."""

    name: str
    dtype: str
    difference: float
    error: str = ""

    @property
    def fine(self) -> bool:
        """Whether that is rounding."""
        return not self.error and self.difference <= TOLERANCE[self.dtype]

    def __str__(self) -> str:
        verdict = "ok" if self.fine else self.error or "differs"
        return f"{self.name:40s} {self.dtype}  {self.difference:8.1e}  {verdict}"


def operations() -> Iterator[tuple[str, Callable[..., Any], Callable[[str], tuple[Any, ...]]]]:
    """Name, function, and what makes its arguments as NumPy arrays of a dtype."""

    def broken(dtype: str) -> tuple[Any, ...]:
        stack = problems.one_deficient(7, 8, dtype).copy()
        stack[2, 1, 1] = np.nan
        return (stack,)

    for n in (1, 8, 33, 70):
        yield f"pinvh {n} x {n}", ng.pinvh, lambda dtype, n=n: (problems.definite(5, n, dtype),)
    yield "pinvh, rank n/2", ng.pinvh, lambda dtype: (problems.half_rank(5, 16, dtype),)
    yield "pinvh, a deficient member and a NaN", ng.pinvh, broken
    for damping in (0.0, 0.1):
        yield (
            f"precondition, damping {damping}",
            lambda g, a, b, damping=damping: ng.precondition(g, a, b, damping=damping),
            lambda dtype: (
                problems.samples(5, 6, 8, dtype),
                problems.definite(5, 6, dtype),
                problems.definite(5, 8, dtype),
            ),
        )

    def samples(dtype: str) -> tuple[Any, ...]:
        return (problems.samples(5, 40, 6, dtype),)

    yield "second_moment", ng.second_moment, samples
    for shrinkage in (None, 0.3, "ledoit_wolf", "oas"):
        yield (
            f"covariance, shrinkage {shrinkage}",
            lambda x, shrinkage=shrinkage: ng.covariance(x, shrinkage=shrinkage),
            samples,
        )
    yield (
        "Moments",
        lambda x: ng.Moments.from_samples(x[:, :9]).merge(ng.Moments.from_samples(x[:, 9:])).discount(0.5).covariance(),
        samples,
    )
    for name, sizes in NETWORKS.items():
        yield from _of_networks(name, sizes)


def _of_networks(name: str, sizes: tuple[int, ...]) -> Iterator[Any]:
    def arguments(dtype: str) -> tuple[Any, ...]:
        moments = problems.task(sizes[0], sizes[-1], "general", dtype)
        return problems.weights(sizes, 5, "orthogonal", dtype), tuple(moments)

    def on(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda layers, moments: function(layers, ng.GaussianTask(*moments))

    yield f"task.optimum, {name}", on(lambda w, t: (t.optimum(), t.minimum_loss())), arguments
    yield f"end_to_end, {name}", on(lambda w, t: dl.end_to_end(w)), arguments
    yield f"end_to_end_kernel, {name}", on(lambda w, t: dl.end_to_end_kernel(w)), arguments
    yield f"balancedness, {name}", on(lambda w, t: dl.balancedness(w)), arguments
    for function in (dl.loss, dl.excess_loss, dl.gradient, dl.exact_velocity):
        yield f"{function.__name__}, {name}", on(function), arguments
    yield f"projections, {name}", on(lambda w, t: tuple(p for pair in dl.projections(w, t) for p in pair)), arguments
    for inverse in INVERSES:
        yield (
            f"natural_gradient {inverse}, {name}",
            on(lambda w, t, inverse=inverse: dl.natural_gradient(w, t, inverse=inverse)),
            arguments,
        )
    yield f"F.matvec, {name}", on(lambda w, t: dl.fisher(w, t).matvec(dl.gradient(w, t))), arguments
    yield f"F.to_dense, {name}", on(lambda w, t: dl.fisher(w, t).to_dense()), arguments
    yield f"F.precondition, {name}", on(lambda w, t: dl.fisher(w, t).precondition(dl.gradient(w, t))), arguments
    for method in ("rank", "spectrum"):
        yield f"F.{method}, {name}", on(lambda w, t, method=method: getattr(dl.fisher(w, t), method)()), arguments
    yield f"verify, {name}", on(lambda w, t: ng.verify(w, t).holds), arguments
    yield (
        f"check_preconditioner, {name}",
        on(lambda w, t: tuple(ng.check_preconditioner(dl.fisher(w, t).precondition, w, t))),
        arguments,
    )
    yield (
        f"draws from a seed, {name}",
        lambda layers, moments: (
            *dl.gaussian(0, sizes, (3,), like=moments[0]),
            *dl.orthogonal(0, sizes, (3,), like=moments[0]),
            # Its layers go by singular vectors, whose signs are each library's own.
            dl.end_to_end(dl.balanced(0, sizes, (3,), like=moments[0])),
        ),
        arguments,
    )


def rows(backend: Backend) -> Iterator[Row]:
    """Each operation on a library and on NumPy, in both dtypes."""
    reference = backends.connect("numpy")
    for name, function, make in operations():
        for dtype in ("float32", "float64"):
            arguments = make(dtype)
            expected = _flat(reference, function(*contests.to(reference, arguments)))
            try:
                result = function(*contests.to(backend, arguments))
                backend.synchronise(result)
                got = _flat(backend, result)
            except Exception as error:  # noqa: BLE001 libraries have no common error
                yield Row(name, dtype, float("nan"), contests.complaint(error))
                continue
            yield Row(name, dtype, max(_difference(x, y) for x, y in zip(got, expected, strict=True)))


def _flat(backend: Backend, result: Any) -> list[np.ndarray]:
    items = result if isinstance(result, list | tuple) else (result,)
    return [np.asarray(backend.to_numpy(item)) for item in items]


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference over the largest entry; Inf where shape, dtype or the place of a NaN differ."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return float("inf")
    top, scale = np.nanmax(np.abs(x - y), initial=0.0), np.nanmax(np.abs(y), initial=0.0)
    # What is zero in exact arithmetic (a residual) is rounding on both sides.
    return float(top / max(scale, 1.0))
