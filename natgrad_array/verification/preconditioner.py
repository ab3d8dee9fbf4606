"""`check_preconditioner`: is a linear preconditioner a natural gradient?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array
from natgrad_array.deep_linear.products import Weights, check_tangent, check_weights


class PreconditionerCheck(NamedTuple):
    """How far a preconditioner is from the exact natural gradient, per member.

    Attributes
    ----------
    residual : array, shape (*batch,)
        ‖S − Π‖ / ‖Π‖: zero to rounding exactly when F C F = F.
    cosine : array, shape (*batch,)
        Cosine between C∇ and F⁺∇.
    length : array, shape (*batch,)
        Length of C∇ over that of F⁺∇. At least 1 for every natural gradient.
    """

    residual: Array
    cosine: Array
    length: Array


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
    xp, layers = check_weights(weights, task)
    fisher = dl.fisher(layers, task)
    factors = task.factors
    n_out, rank = factors.target.shape[-2:]
    size = int(n_out * rank)
    _arrays.check_fits("the matrix S", (*fisher.batch_shape, 2 * size, size), xp, layers[0], "check a smaller network")

    def direction(gradient: tuple[Array, ...]) -> tuple[Array, ...]:
        return check_tangent("the direction that apply returns", apply(gradient), layers)

    ahead, behind = _partial_products(layers, factors)
    columns, expected = [], []
    basis = np.eye(size)
    for k in range(size):
        h = _arrays.asarray_like(xp, basis[k].reshape(n_out, rank), layers[0])
        gradient = tuple(a @ h @ b.mT for a, b in zip(ahead, behind, strict=True))
        velocity = dl.end_to_end_velocity(layers, direction(gradient))
        columns.append(_flat(xp, factors.noise_root_inverse @ velocity @ factors.input_root, fisher.batch_shape))
        expected.append(_flat(xp, fisher.realisable(h), fisher.batch_shape))
    s, projector = xp.stack(columns, axis=-1), xp.stack(expected, axis=-1)
    gradient = dl.gradient(layers, task)
    step, exact = direction(gradient), dl.natural_gradient(layers, task, inverse="moore_penrose")
    product, length, reference = _inner(xp, step, exact), _inner(xp, step, step) ** 0.5, _inner(xp, exact, exact) ** 0.5
    return PreconditionerCheck(
        _frobenius(xp, s - projector) / _frobenius(xp, projector), product / (length * reference), length / reference
    )


def _partial_products(layers: tuple[Array, ...], factors: Any) -> tuple[list[Array], list[Array]]:
    ahead, behind = [factors.noise_root_inverse.mT], [factors.input_root]
    for layer in layers[:0:-1]:
        ahead.append(layer.mT @ ahead[-1])
    for layer in layers[:-1]:
        behind.append(layer @ behind[-1])
    return ahead[::-1], behind


def _flat(xp: Any, matrix: Array, batch: tuple[int, ...]) -> Array:
    matrix = xp.broadcast_to(matrix, (*batch, *matrix.shape[-2:]))
    return xp.reshape(matrix, (*batch, matrix.shape[-2] * matrix.shape[-1]))


def _inner(xp: Any, a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    return sum(xp.sum(x * y, axis=(-2, -1)) for x, y in zip(a, b, strict=True))


def _frobenius(xp: Any, a: Array) -> Array:
    return xp.sqrt(xp.sum(a * a, axis=(-2, -1)))
