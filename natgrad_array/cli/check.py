"""`natgrad-array verify`: the claims of the theory on a drawn ensemble."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.table import Table

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array.cli.libraries import Backend

CONDITION = 10.0


def draw(sizes: tuple[int, ...], members: int, seed: int, dtype: str, backend: Backend) -> tuple[Any, ng.GaussianTask]:
    """Networks with orthonormal layers, and a task whose moments have condition 10."""
    rng = np.random.default_rng(seed)
    n, m = sizes[0], sizes[-1]
    inputs, noise = _positive_definite(rng, n), _positive_definite(rng, m)
    teacher = rng.standard_normal((m, n)) / math.sqrt(n)
    cross = teacher @ inputs
    outputs = cross @ teacher.T + noise
    moments = (backend.asarray(moment.astype(dtype)) for moment in (inputs, noise, cross, (outputs + outputs.T) / 2))
    task = ng.GaussianTask(*moments)
    return ng.deep_linear.orthogonal(rng, sizes, (members,), like=task.cross_moment), task


def _positive_definite(rng: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    matrix = (basis * np.geomspace(1.0, 1.0 / CONDITION, n)) @ basis.T
    return np.asarray((matrix + matrix.T) / 2)


def failed(row: Any) -> int | None:
    """How many members a claim fails for; None where it does not apply."""
    if row.holds is None:
        return None
    holds = _arrays.to_numpy(row.holds) if not isinstance(row.holds, bool) else np.asarray(row.holds)
    return int(np.sum(~holds))


def table(report: Any) -> Table:
    """The report for a terminal."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("equation")
    result.add_column("claim", overflow="fold")
    result.add_column("residual", justify="right", no_wrap=True)
    result.add_column("tolerance", justify="right", no_wrap=True)
    result.add_column("holds", no_wrap=True)
    for row in report.rows:
        failures = failed(row)
        verdict = "does not apply" if failures is None else "yes" if failures == 0 else f"NO ({failures} fail)"
        style = "dim" if failures is None else "" if failures == 0 else "bold red"
        result.add_row(row.equation, row.claim, _worst(row.residual), _worst(row.tolerance), verdict, style=style)
    return result


def as_json(report: Any) -> dict[str, Any]:
    """The report for a program: lists with an entry a member, null where there is no number."""
    rows = [
        {
            "equation": row.equation,
            "claim": row.claim,
            "residual": _numbers(row.residual),
            "tolerance": _numbers(row.tolerance),
            "holds": None if row.holds is None else np.atleast_1d(_host(row.holds)).tolist(),
        }
        for row in report.rows
    ]
    return {"regime": report.regime, "holds": all(not failed(row) for row in report.rows), "rows": rows}


def _host(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value) if isinstance(value, bool | float) else _arrays.to_numpy(value)


def _numbers(value: Any) -> list[float | None]:
    flat = np.atleast_1d(_host(value)).astype(np.float64)
    return [float(number) if math.isfinite(number) else None for number in flat]


def _worst(value: Any) -> str:
    numbers = [number for number in _numbers(value) if number is not None]
    return f"{max(numbers):.1e}" if numbers else "–"
