"""Pruning by the optimal brain surgeon, with a layer's inverse Fisher information as A⁻¹ ⊗ G⁻¹ (Heskes 2000).

Of all changes δ that take parameter q to zero the cheapest by ½ δᵀFδ is −θ_q F⁻¹e_q / [F⁻¹]_qq,
at a cost of θ_q² / (2 [F⁻¹]_qq). Where F is singular, and e_q has a part N e_q that F does not
see, −θ_q N e_q / N_qq does it for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.kronecker import Kronecker
from natgrad_array.networks.network import Network, Params
from natgrad_array.optimizers.estimates import ExactDirections


class Pruned(NamedTuple):
    """A network without one of its parameters.

    Attributes
    ----------
    params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters, those of the same layer corrected.
    saliency : array, shape (*batch,)
        The loss that the quadratic model expects it to cost.
    layer, row, column : arrays of int, shape (*batch,)
        Which parameter it was.
    """

    params: Any
    saliency: Any
    layer: Any
    row: Any
    column: Any


@_arrays.quiet
def saliencies(net: Network, params: Params, x: Array, /, *, damping: float | Array = 0.0) -> tuple[Array, ...]:
    """What removing each parameter costs, with the others of its layer corrected for it.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        Trained parameters: the loss is taken to be at a minimum.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        Inputs, of which F is the mean.
    damping : float or array of shape (*batch,)
        Split between the two factors as in K-FAC.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        θ² / (2 [F⁻¹]), parameter by parameter, in units of the loss. Without damping it is
        zero for a parameter that no sample depends on, or that others can stand in for.

    Raises
    ------
    TypeError, ValueError
        If `params` or `x` do not fit the network or each other, or `damping` is negative.

    Notes
    -----
    Hassibi and Stork (1993); the diagonal of A⁻¹ ⊗ G⁻¹ is a product of diagonals (Heskes
    2000).

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((1, 1))
    >>> params = (np.asarray([[3.0, 0.0]]),)
    >>> ng.optimizers.saliencies(net, params, np.asarray([[1.0], [-1.0]]))
    (array([[4.5, 0. ]]),)
    """
    costs, _ = _saliencies(net, params, x, damping)
    return costs


class _Surgeon(NamedTuple):
    """What is known of a layer's F = A ⊗ G: its pseudo-inverse and the projection on its range, and which q are free.

    Free are those with N_qq = [1 − F F⁺]_qq above zero by more than rounding.
    """

    inverse: Kronecker
    projection: Kronecker
    rest: Array
    free: Array

    @classmethod
    def of(cls, block: Kronecker) -> _Surgeon:
        xp = _arrays.namespace(block.forward)
        forward, backward = _inverse_and_projection(xp, block.forward), _inverse_and_projection(xp, block.backward)
        projection = Kronecker(forward[1], backward[1])
        rest = 1.0 - _diagonal(projection)
        # A smaller share would ask for a correction of thousands of times the parameter.
        return cls(Kronecker(forward[0], backward[0]), projection, rest, rest > _arrays.eps(xp, rest) ** 0.5)


def _inverse_and_projection(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """A⁺ and A A⁺ of a covariance; the projection from eigenvectors, exact whatever the condition."""
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(a + 0.0), None)
    kept = kept & (values > 0.0)
    inverse = (vectors * linalg.reciprocal(xp, values, kept)[..., None, :]) @ vectors.mT
    return inverse, (vectors * xp.astype(kept, a.dtype)[..., None, :]) @ vectors.mT


def _diagonal(block: Kronecker) -> Array:
    """The diagonal of A ⊗ G, in the shape of a layer's parameters."""
    xp = _arrays.namespace(block.forward)
    return xp.linalg.diagonal(block.backward)[..., :, None] * xp.linalg.diagonal(block.forward)[..., None, :]


def _saliencies(
    net: Network, params: Params, x: Array, damping: float | Array
) -> tuple[tuple[Array, ...], list[_Surgeon]]:
    estimate = ExactDirections()
    trace = net.forward(params, x)
    given = tuple(params)
    xp, like = _arrays.namespace(trace.output), trace.output
    damping = _arrays.check_nonnegative("damping", damping, xp, like, core_ndim=2)
    factors = estimate.factors(estimate.observe(net, given, trace, like, None))
    surgeons = [_Surgeon.of(block.damped(damping + 0.0 * like[..., :1, :1])) for block in factors]
    found = []
    for w, surgeon in zip(given, surgeons, strict=True):
        diagonal = _diagonal(surgeon.inverse)
        cost = 0.5 * w * w / xp.where(surgeon.free, 1.0, diagonal)
        found.append(xp.where(surgeon.free, 0.0 * cost, cost))
    return tuple(found), surgeons


@_arrays.quiet
def prune(net: Network, params: Params, x: Array, /, *, damping: float | Array = 0.0) -> Pruned:
    """Remove the parameter of least saliency from each member, and correct the others of its layer.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        Trained parameters: the loss is taken to be at a minimum.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        Inputs, of which F is the mean.
    damping : float or array of shape (*batch,)
        Split between the two factors as in K-FAC.

    Returns
    -------
    Pruned
        The new parameters, and what was removed. Parameters that are zero already are not
        chosen, but may be moved by the correction of another one.

    Raises
    ------
    TypeError, ValueError
        As for `saliencies`.

    Notes
    -----
    δθ = −θ_q F⁻¹ e_q / [F⁻¹]_qq, the cheapest change that takes parameter q to zero. Where F
    is singular and there is no damping, a parameter that others can stand in for goes first.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((2, 1))
    >>> params = (np.asarray([[3.0, 1.0, 0.0]]),)
    >>> x = np.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> ng.optimizers.prune(net, params, x).params
    (array([[3., 0., 0.]]),)
    """
    costs, surgeons = _saliencies(net, params, x, damping)
    given = tuple(params)
    xp = _arrays.namespace(costs[0])
    batch = _arrays.broadcast_batch({str(i): tuple(cost.shape[:-2]) for i, cost in enumerate(costs)})
    flat = [
        xp.reshape(xp.broadcast_to(xp.where(w == 0.0, xp.inf, cost), (*batch, *w.shape[-2:])), (*batch, -1))
        for w, cost in zip(given, costs, strict=True)
    ]
    everything = xp.concat(flat, axis=-1)
    chosen = xp.argmin(everything, axis=-1)
    saliency = xp.min(everything, axis=-1)
    layer, row, column = 0 * chosen, 0 * chosen, 0 * chosen
    start, found = 0, []
    for i, (w, surgeon) in enumerate(zip(given, surgeons, strict=True)):
        m, n = w.shape[-2:]
        here = (chosen >= start) & (chosen < start + m * n)
        place = xp.where(here, chosen - start, 0)
        layer, row, column = (
            xp.where(here, value, old) for value, old in ((i, layer), (place // n, row), (place % n, column))
        )
        rows = xp.astype(xp.arange(m, device=_arrays.device(w)) == (place // n)[..., None], w.dtype)[..., :, None]
        columns = xp.astype(xp.arange(n, device=_arrays.device(w)) == (place % n)[..., None], w.dtype)[..., None, :]
        value = rows.mT @ w @ columns.mT
        unit = rows * columns
        free = xp.sum(xp.where(surgeon.free, unit, 0.0), axis=(-2, -1), keepdims=True) > 0.0
        way = xp.where(free, unit - surgeon.projection.matvec(unit), surgeon.inverse.matvec(unit))
        scale = xp.sum(way * unit, axis=(-2, -1), keepdims=True)
        moved = w - value * way / xp.where(scale == 0.0, 1.0, scale)
        # The parameter itself is zero, not zero up to rounding.
        moved = xp.where(unit > 0.0, 0.0 * moved, moved)
        found.append(xp.where(here[..., None, None], moved, w))
        start += m * n
    return Pruned(tuple(found), saliency, layer, row, column)
