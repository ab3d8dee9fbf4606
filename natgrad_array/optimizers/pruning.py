"""Pruning by the optimal brain surgeon, with a layer's inverse Fisher information as A⁻¹ ⊗ G⁻¹ (Heskes 2000).

Of all changes δ that take parameter q to zero the cheapest by ½ δᵀFδ is −θ_q F⁻¹e_q / [F⁻¹]_qq,
at a cost of θ_q² / (2 [F⁻¹]_qq). Where F is singular, and e_q has a part N e_q that F does not
see, −θ_q N e_q / N_qq does it for nothing. What was pruned before stays at zero if F is replaced by
M F M, with M the projection on the parameters that are left; that is no Kronecker product any more.
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
    pruned : tuple of arrays of bool, shapes (*batch, n_i, n_{i-1} + 1)
        All that is pruned now, for the next call.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((2, 1)), (np.asarray([[3.0, 1.0, 0.0]]),)
    >>> x = np.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> once = ng.optimizers.prune(net, params, x)
    >>> int(once.layer), int(once.row), int(once.column), float(once.saliency)
    (0, 0, 1, 0.5)
    """

    params: Any
    saliency: Any
    layer: Any
    row: Any
    column: Any
    pruned: Any


@_arrays.quiet
def saliencies(
    net: Network, params: Params, x: Array, /, *, damping: float | Array = 0.0, pruned: Params | None = None
) -> tuple[Array, ...]:
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
    pruned : sequence of arrays of bool, shapes (*batch, n_i, n_{i-1} + 1), optional
        Parameters that are gone and stay at zero; none without it. They may differ from
        member to member.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        θ² / (2 [F⁻¹]), parameter by parameter, in units of the loss. Without damping it is
        zero for a parameter that no sample depends on, or that others can stand in for. Zero
        for what is pruned already.

    Raises
    ------
    TypeError, ValueError
        If `params`, `x` or `pruned` do not fit the network or each other, `damping` is
        negative, or a layer's dense matrix would not fit in memory.

    Notes
    -----
    Hassibi and Stork (1993); the diagonal of A⁻¹ ⊗ G⁻¹ is a product of diagonals (Heskes
    2000). A layer of m × n parameters costs m³ + n³ operations so; one of which some are
    pruned (in any member, on eager arrays) costs (m n)³ and memory for a few (m n)²
    numbers, for each member.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((1, 1))
    >>> params = (np.asarray([[3.0, 0.0]]),)
    >>> ng.optimizers.saliencies(net, params, np.asarray([[1.0], [-1.0]]))
    (array([[4.5, 0. ]]),)
    """
    costs, _, _ = _saliencies(net, params, x, damping, pruned)
    return costs


class _Surgeon(NamedTuple):
    """What is known of a layer's F = A ⊗ G: its pseudo-inverse and the projection on its range, and which q are free.

    Free are those with N_qq = [1 − F F⁺]_qq above zero by more than rounding.
    """

    inverse: Kronecker
    projection: Kronecker
    diagonal: Array
    free: Array

    @classmethod
    def of(cls, block: Kronecker) -> _Surgeon:
        xp = _arrays.namespace(block.forward)
        forward, backward = _inverse_and_projection(xp, block.forward), _inverse_and_projection(xp, block.backward)
        inverse, projection = Kronecker(forward[0], backward[0]), Kronecker(forward[1], backward[1])
        return cls(inverse, projection, _diagonal(inverse), _free(xp, _diagonal(projection)))

    def way(self, unit: Array, free: Array) -> Array:
        """The direction of the cheapest change that moves one parameter."""
        xp = _arrays.namespace(unit)
        return xp.where(free, unit - self.projection.matvec(unit), self.inverse.matvec(unit))


class _MaskedSurgeon(NamedTuple):
    """The same of M F M, by its eigenvectors: U Λ⁺ Uᵀ and U Uᵀ."""

    vectors: Array
    inverse_values: Array
    diagonal: Array
    free: Array

    @classmethod
    def of(cls, block: Kronecker, gone: Array) -> _MaskedSurgeon:
        xp, (m, n) = _arrays.namespace(block.forward), gone.shape[-2:]
        # From the root of F: its condition number is the square root of that of F.
        root = linalg.kron(xp, _root(xp, block.forward), _root(xp, block.backward))
        u, s, _ = linalg.svd(xp, xp.where(linalg.vec(xp, gone)[..., None], 0.0 * root, root))
        kept = s > m * n * _arrays.eps(xp, s) * xp.max(s, axis=-1, keepdims=True)
        vectors = u * xp.astype(kept, u.dtype)[..., None, :]
        values = linalg.reciprocal(xp, s * s, kept)
        seen = linalg.unvec(xp, xp.sum(vectors * vectors, axis=-1), m, n)
        diagonal = linalg.unvec(xp, xp.sum(vectors * vectors * values[..., None, :], axis=-1), m, n)
        return cls(vectors, values, diagonal, _free(xp, seen) & ~gone)

    def way(self, unit: Array, free: Array) -> Array:
        """As of `_Surgeon`; zero where parameters are gone, up to rounding."""
        xp, (m, n) = _arrays.namespace(unit), unit.shape[-2:]
        column = linalg.vec(xp, unit)[..., None]
        coordinates = self.vectors.mT @ column
        seen = self.vectors @ xp.where(free, coordinates, coordinates * self.inverse_values[..., None])
        return linalg.unvec(xp, xp.where(free, column - seen, seen)[..., 0], m, n)


def _free(xp: Namespace, seen: Array) -> Array:
    # A smaller share would ask for a correction of thousands of times the parameter.
    return 1.0 - seen > _arrays.eps(xp, seen) ** 0.5


def _root(xp: Namespace, a: Array) -> Array:
    """R with R Rᵀ = A, a covariance."""
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(a + 0.0), None)
    return vectors * xp.sqrt(xp.where(xp.isnan(values) | (kept & (values > 0.0)), values, 0.0))[..., None, :]


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
    net: Network, params: Params, x: Array, damping: float | Array, pruned: Params | None
) -> tuple[tuple[Array, ...], list[_Surgeon | _MaskedSurgeon], list[Array | None]]:
    estimate = ExactDirections()
    trace = net.forward(params, x)
    given = tuple(params)
    xp, like = _arrays.namespace(trace.output), trace.output
    damping = _arrays.check_nonnegative("damping", damping, xp, like, core_ndim=2)
    masks = _check_masks(xp, given, pruned)
    factors = estimate.factors(estimate.observe(net, given, trace, like, None))
    found, surgeons = [], []
    for w, block, gone in zip(given, factors, masks, strict=True):
        damped = block.damped(damping + 0.0 * like[..., :1, :1])
        surgeon: _Surgeon | _MaskedSurgeon
        if gone is None or _arrays.eager_any(xp, gone) is False:
            surgeon = _Surgeon.of(damped)
        else:
            size = w.shape[-2] * w.shape[-1]
            shapes = {"a": tuple(like.shape[:-2]), "b": tuple(gone.shape[:-2])}
            shape = (2, *_arrays.broadcast_batch(shapes), size, size)
            _arrays.check_fits("the dense matrix of a layer", shape, xp, like, "prune smaller layers")
            surgeon = _MaskedSurgeon.of(damped, gone)
        cost = 0.5 * w * w / xp.where(surgeon.free | (surgeon.diagonal == 0.0), 1.0, surgeon.diagonal)
        nothing = surgeon.free if gone is None else surgeon.free | gone
        found.append(xp.where(nothing, 0.0 * cost, cost))
        surgeons.append(surgeon)
    return tuple(found), surgeons, masks


def _check_masks(xp: Namespace, params: Params, pruned: Params | None) -> list[Array | None]:
    if pruned is None:
        return [None] * len(params)
    masks = _arrays.check_sequence("pruned", pruned, "a tuple or list with one array of bool for each layer")
    if len(masks) != len(params):
        raise ValueError(f"pruned must have one array for each of {len(params)} layers, got {len(masks)}")
    for i, (gone, w) in enumerate(zip(masks, params, strict=True)):
        name = f"pruned[{i}]"
        if not _arrays.is_bool(xp, gone):
            raise TypeError(f"{name} must be an array of bool of the parameters' library, got {_arrays.describe(gone)}")
        _arrays.check_core(name, gone, tuple(w.shape[-2:]), "like the parameters")
    shapes = {f"pruned[{i}]": tuple(gone.shape[:-2]) for i, gone in enumerate(masks)}
    _arrays.broadcast_batch(shapes | {f"params[{i}]": tuple(w.shape[:-2]) for i, w in enumerate(params)})
    return list(masks)


@_arrays.quiet
def prune(
    net: Network, params: Params, x: Array, /, *, damping: float | Array = 0.0, pruned: Params | None = None
) -> Pruned:
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
    pruned : sequence of arrays of bool, shapes (*batch, n_i, n_{i-1} + 1), optional
        Parameters that are gone and stay at zero; none without it. They may differ from
        member to member.

    Returns
    -------
    Pruned
        The new parameters, what was removed, and all that is pruned now: give that to the
        next call, or its correction moves earlier removals back from zero. Parameters that
        are zero already are not chosen. Where none is left nothing changes, and the
        saliency is Inf.

    Raises
    ------
    TypeError, ValueError
        As for `saliencies`.

    Notes
    -----
    δθ = −θ_q F⁻¹ e_q / [F⁻¹]_qq, the cheapest change that takes parameter q to zero, with F
    restricted to the parameters that are left; costs as for `saliencies`. Where F is
    singular and there is no damping, a parameter that others can stand in for goes first.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((2, 1))
    >>> params = (np.asarray([[3.0, 1.0, 0.0]]),)
    >>> x = np.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> once = ng.optimizers.prune(net, params, x)
    >>> once.params, once.pruned
    ((array([[3., 0., 0.]]),), (array([[False,  True, False]]),))
    >>> ng.optimizers.prune(net, once.params, x, pruned=once.pruned).params
    (array([[0., 0., 0.]]),)
    """
    costs, surgeons, masks = _saliencies(net, params, x, damping, pruned)
    given = tuple(params)
    xp = _arrays.namespace(costs[0])
    batch = _arrays.broadcast_batch({str(i): tuple(cost.shape[:-2]) for i, cost in enumerate(costs)})
    known = [xp.zeros_like(w) > 0.0 if gone is None else gone for w, gone in zip(given, masks, strict=True)]
    held = [xp.broadcast_to(gone, (*batch, *gone.shape[-2:])) for gone in known]
    flat = [
        xp.reshape(xp.where((w == 0.0) | gone, xp.inf, cost), (*batch, -1))
        for w, gone, cost in zip(given, held, costs, strict=True)
    ]
    everything = xp.concat(flat, axis=-1)
    chosen = xp.argmin(everything, axis=-1)
    saliency = xp.min(everything, axis=-1)
    layer, row, column = 0 * chosen, 0 * chosen, 0 * chosen
    start, found, pruned_now = 0, [], []
    for i, (w, surgeon, gone) in enumerate(zip(given, surgeons, held, strict=True)):
        m, n = w.shape[-2:]
        here = (chosen >= start) & (chosen < start + m * n)
        place = xp.where(here, chosen - start, 0)
        layer, row, column = (
            xp.where(here, value, old) for value, old in ((i, layer), (place // n, row), (place % n, column))
        )
        rows = xp.astype(xp.arange(m, device=_arrays.device(w)) == (place // n)[..., None], w.dtype)[..., :, None]
        columns = xp.astype(xp.arange(n, device=_arrays.device(w)) == (place % n)[..., None], w.dtype)[..., None, :]
        w = xp.where(gone, 0.0 * w, w)
        value = rows.mT @ w @ columns.mT
        unit = rows * columns
        free = xp.sum(xp.where(surgeon.free, unit, 0.0), axis=(-2, -1), keepdims=True) > 0.0
        way = surgeon.way(unit, free)
        scale = xp.sum(way * unit, axis=(-2, -1), keepdims=True)
        moved = w - value * way / xp.where(scale == 0.0, 1.0, scale)
        # The parameter itself is zero, not zero up to rounding, and so are those that were pruned before.
        moved = xp.where((unit > 0.0) | gone, 0.0 * moved, moved)
        found.append(xp.where(here[..., None, None], moved, w))
        pruned_now.append(gone | ((unit > 0.0) & (here & (saliency < xp.inf))[..., None, None]))
        start += m * n
    return Pruned(tuple(found), saliency, layer, row, column, tuple(pruned_now))
