"""`verify`: every claim of the theory on a given network."""

from __future__ import annotations

from typing import Any

from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array
from natgrad_array.deep_linear.products import Weights, check_weights
from natgrad_array.verification.claims import CLAIMS, Case
from natgrad_array.verification.report import Report, Row

UNDECIDED = 0.1
"""A tolerance above this says that precision cannot decide a claim."""


@_arrays.quiet
def verify(weights: Weights, task: dl.GaussianTask, /) -> Report:
    """Put every claim of the theory to the test on a network or an ensemble.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    Report
        ``report.rows`` has a row for each claim, with its residual, tolerance and verdict
        for every member; ``report.holds`` says whether all that apply hold, and
        ``str(report)`` is a table.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`, or values are lazy: a report
        needs values, so it cannot be made under a JAX trace.

    Notes
    -----
    The equations of Bernacchia, Lengyel and Hennequin (2018), supplement, and what this
    library adds to them. Each is compared with an independent formula. Tolerances grow
    with the condition of the products of layers and with the rounding error of the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.standard_normal((100, 4)), rng.standard_normal((100, 3))
    >>> task = ng.GaussianTask.from_samples(x, y)
    >>> report = ng.verify(ng.deep_linear.orthogonal(0, (4, 5, 3), like=x), task)
    >>> report.holds
    True
    """
    if not isinstance(task, dl.GaussianTask):
        raise TypeError(f"task must be a GaussianTask, got {_arrays.describe(task)}")
    _, weights = check_weights(weights, task)
    if any(_arrays.is_lazy(array) for array in (*weights, task.cross_moment)):
        raise TypeError("weights and task must have values to look at, got lazy arrays; call verify outside of jit")
    case = Case(weights, task)
    rows = tuple(_row(case, equation, words, residual) for equation, words, residual in CLAIMS)
    nothing_fails = (
        case.xp.ones(case.batch, dtype=case.xp.bool, device=_arrays.device(case.like)) if case.batch else True
    )
    return Report(rows, dl.regime(weights, task), case.batch, nothing_fails)


def _row(case: Case, equation: str, words: str, residual: Any) -> Row:
    xp = case.xp
    outcome = residual(case)
    unknown = xp.full(case.batch, xp.nan, dtype=case.like.dtype, device=_arrays.device(case.like))
    if outcome is None:
        return Row(equation, words, unknown, unknown, None)
    value = outcome.residual + 0.0 * case.condition
    tolerance = _tolerance(case, outcome.magnified)
    applies = (tolerance < UNDECIDED) | xp.isnan(tolerance)
    if outcome.applies is not True:
        applies = applies & outcome.applies
    if not _arrays.eager_any(xp, applies):
        return Row(equation, words, value, tolerance, None)
    holds: Any = (value <= tolerance) | ~applies
    return Row(equation, words, value, tolerance, bool(holds) if holds.ndim == 0 else holds)


def _tolerance(case: Case, magnified: Array | None) -> Array:
    """Rounding of sums over all widths, magnified by the condition of what is inverted."""
    return 16 * case.cutoff * (case.condition**2 if magnified is None else magnified)
