"""Whether a linear preconditioner is a natural gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array
from natgrad_array.deep_linear.products import Weights, check_tangent, check_weights, products


class PreconditionerCheck(NamedTuple):
    """How far a preconditioner is from the exact natural gradient, per member.

    Attributes
    ----------
    residual : array, shape (*batch,)
        ‖S − Π‖ / ‖Π‖: zero to rounding exactly when F C F = F. Zero for a network that
        no small change of its layers moves (Π = 0): then every C passes.
    cosine : array, shape (*batch,)
        Cosine between C∇ and F⁺∇; NaN where one of them is zero.
    length : array, shape (*batch,)
        Length of C∇ over that of F⁺∇, NaN where that is zero. At least 1 for every natural
        gradient.
    """

    residual: Array
    cosine: Array
    length: Array


@_arrays.quiet
def check_preconditioner(
    apply: Callable[[tuple[Array, ...]], Any], weights: Weights, task: dl.GaussianTask, /
) -> PreconditionerCheck:
    r"""Put any linear preconditioner C of the gradient to the test of exactness.

    With S = B^{1/2}AᵀCAB^{1/2} and Π the projector on the range of B^{1/2}Aᵀ, S = Π holds
    exactly when C is a generalised inverse of the Fisher information, at any widths and
    ranks.

    Parameters
    ----------
    apply : callable
        Takes a gradient (a tuple with one array for each layer, shapes
        (*batch, n_i, n_{i-1})) and returns a direction of the same form, in descent sign:
        an update subtracts it. Called n_L rank(Σ) + 1 times.
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    PreconditionerCheck
        Residual of exactness, and cosine and length of its step beside F⁺∇.

    Raises
    ------
    TypeError, ValueError
        If `apply` is not callable or returns no direction, `weights` is not a network or
        does not fit `task`, or the matrices would not fit in memory.

    Notes
    -----
    Eqs 31–32 of Bernacchia, Lengyel and Hennequin (2018), supplement, in the form that
    needs neither full rank of Σ nor the absence of a bottleneck.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.standard_normal((100, 4)), rng.standard_normal((100, 3))
    >>> task = ng.GaussianTask.from_samples(x, y)
    >>> weights = ng.deep_linear.orthogonal(0, (4, 5, 3), like=x)
    >>> F = ng.deep_linear.fisher(weights, task)
    >>> bool(ng.check_preconditioner(F.precondition, weights, task).residual < 1e-12)
    True
    >>> bool(ng.check_preconditioner(lambda g: g, weights, task).residual < 1e-12)
    False
    """
    if not callable(apply):
        raise TypeError(f"apply must be callable, got {_arrays.describe(apply)}")
    if not isinstance(task, dl.GaussianTask):
        raise TypeError(f"task must be a GaussianTask, got {_arrays.describe(task)}")
    xp, layers = check_weights(weights, task)
    fisher = dl.fisher(layers, task)
    factors = task.factors
    batch = fisher.batch_shape
    n_out, rank = factors.target.shape[-2:]
    size = int(n_out * rank)
    _arrays.check_fits("the matrix S", (*batch, 2 * size, size), xp, layers[0], "check a smaller network")

    def direction(gradient: tuple[Array, ...]) -> tuple[Array, ...]:
        given = tuple(
            g if g.shape[:-2] == batch else xp.broadcast_to(g, (*batch, *g.shape[-2:])) + 0.0 for g in gradient
        )
        found = check_tangent("the direction that apply returns", apply(given), layers)
        shapes = {str(i): tuple(d.shape[:-2]) for i, d in enumerate(found)}
        if _arrays.broadcast_batch(shapes | {"network": batch}) != batch:
            came = ", ".join(map(str, shapes.values()))
            raise ValueError(
                f"the direction that apply returns must have batch axes that broadcast to {batch}, got {came}"
            )
        return found

    ahead, behind, _ = products(layers, factors)
    columns, expected = [], []
    basis = _arrays.eye(xp, size, layers[0])
    for k in range(size):
        h = xp.reshape(basis[k, :], (n_out, rank))
        gradient = tuple(a @ h @ b.mT for a, b in zip(ahead, behind, strict=True))
        velocity = dl.end_to_end_velocity(layers, direction(gradient))
        columns.append(_flat(xp, factors.whiten(velocity @ factors.input_root), batch))
        expected.append(_flat(xp, fisher._realisable(h), batch))
    s, projector = xp.stack(columns, axis=-1), xp.stack(expected, axis=-1)
    gradient = dl.gradient(layers, task)
    step, exact = direction(gradient), dl.natural_gradient(layers, task, inverse="moore_penrose")
    length, reference = _inner(xp, step, step) ** 0.5, _inner(xp, exact, exact) ** 0.5
    misfit, scale = _frobenius(xp, s - projector), _frobenius(xp, projector)
    moves = scale > 0.0
    residual = xp.where(moves | xp.isnan(scale), misfit / xp.where(moves, scale, 1.0), 0.0 * misfit)
    return PreconditionerCheck(
        residual, _ratio(xp, _inner(xp, step, exact), length * reference), _ratio(xp, length, reference)
    )


def _flat(xp: Any, matrix: Array, batch: tuple[int, ...]) -> Array:
    matrix = xp.broadcast_to(matrix, (*batch, *matrix.shape[-2:]))
    return xp.reshape(matrix, (*batch, matrix.shape[-2] * matrix.shape[-1]))


def _inner(xp: Any, a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    return sum(xp.sum(x * y, axis=(-2, -1)) for x, y in zip(a, b, strict=True))


def _ratio(xp: Any, a: Array, b: Array) -> Array:
    """Divide, with NaN where there is nothing to divide by."""
    nonzero = b > 0.0
    return xp.where(nonzero, a / xp.where(nonzero, b, 1.0), xp.nan)


def _frobenius(xp: Any, a: Array) -> Array:
    return xp.sqrt(xp.sum(a * a, axis=(-2, -1)))
