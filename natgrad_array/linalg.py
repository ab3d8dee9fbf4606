"""Batched algebra of positive-semidefinite matrices and of their factors.

`pinvh` and `precondition` are the public door. The functions below them are the thin
bodies that the rooms above call with arrays that have been checked already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape

METHODS = ("auto", "eigh", "cholesky")


# ------------------------------------------------------------------------------ the door


@_arrays.quiet
def pinvh(a: Array, /, *, rtol: float | Array | None = None, method: str = "auto") -> Array:
    r"""Moore–Penrose pseudo-inverse of symmetric matrices, with a relative cut-off.

    Parameters
    ----------
    a : array, shape (*batch, n, n)
        Symmetric matrices; the symmetric part of what comes is used. Positive
        semidefinite is the common case, and an indefinite matrix gets its
        Moore–Penrose inverse too. Integers are promoted.
    rtol : float or array of shape (*batch,), optional
        Eigenvalues with :math:`|\lambda| > \mathrm{rtol} \cdot \max |\lambda|` are
        inverted, the others give zero. Default: n times the machine epsilon.
    method : {"auto", "eigh", "cholesky"}
        "eigh" decomposes every member. "cholesky" inverts through the Cholesky factor
        and is for matrices known to be positive definite: members for which it cannot
        certify that every eigenvalue lies above the cut-off come out NaN. "auto" takes
        the fastest way that is exact for every member.

    Returns
    -------
    array, shape (*batch, n, n)
        The pseudo-inverses, symmetric. A member with a NaN or an Inf is NaN and touches
        no other; so is one whose entry of `rtol` is negative.

    Raises
    ------
    TypeError
        If `a` is not an array of dtype float32, float64 or an integer.
    ValueError
        If `a` is not square, `rtol` is negative, or `method` is unknown.

    See Also
    --------
    precondition : apply two pseudo-inverses to a gradient.

    Notes
    -----
    This is the inverse of the covariances in Eq 42 of Bernacchia, Lengyel and Hennequin
    (2018), their Eqs 40 and 14–15 of the main text.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> x = np.asarray([[2.0, 0.0], [0.0, 0.0]])
    >>> ng.pinvh(x)
    array([[0.5, 0. ],
           [0. , 0. ]])
    """
    xp = _arrays.check_arrays({"a": a}, integers=True)
    _arrays.check_matrix("a", a, square=True)
    _arrays.check_option("method", method, METHODS)
    (a,) = _arrays.promote(xp, a)
    if rtol is not None:
        rtol = _arrays.check_nonnegative("rtol", rtol, xp, a, batch=tuple(a.shape[:-2]))
    return pinvh_checked(xp, a, rtol, method)


@_arrays.quiet
def precondition(
    grad: Array,
    left: Array,
    right: Array,
    /,
    *,
    damping: float | Array = 0.0,
    rtol: float | Array | None = None,
    method: str = "auto",
) -> Array:
    r"""Precondition a layer's gradient by the pseudo-inverses of two second moments.

    Without damping this is ``left⁺ grad right⁺``: the inverse of the Kronecker product
    right ⊗ left on the column-stacked gradient. With damping it is the exact Tikhonov
    solution for that product: in the joint eigenbasis, with eigenvalues :math:`\lambda_p`
    of `left` and :math:`\mu_q` of `right`, entry (p, q) is divided by
    :math:`\lambda_p \mu_q + \mathrm{damping}`. Directions that the cut-off drops from
    either factor stay zero, so the limit of no damping is the pseudo-inverse.

    Parameters
    ----------
    grad : array, shape (*batch, m, n)
        Gradients of a weight matrix with m outputs and n inputs.
    left : array, shape (*batch, m, m)
        Second moment of the back-propagated errors.
    right : array, shape (*batch, n, n)
        Second moment of the inputs.
    damping : float or array of shape (*batch,)
        Added to the eigenvalues of the Kronecker product, in their units.
    rtol : float or array of shape (*batch,), optional
        Cut-off of each factor, as in `pinvh`.
    method : {"auto", "eigh", "cholesky"}
        As in `pinvh`. Damping needs the eigenbasis: "cholesky" goes without it.

    Returns
    -------
    array, shape (*batch, m, n)
        The preconditioned gradients, batch axes broadcast.

    Raises
    ------
    TypeError
        If an argument is not an array of the common library and dtype.
    ValueError
        If shapes do not fit, batch axes do not broadcast, `damping` or `rtol` is
        negative, `method` is unknown, or damping is asked of "cholesky".

    Notes
    -----
    Undamped and divided by the number of layers it is Eq 42 of Bernacchia, Lengyel and
    Hennequin (2018); with damping, the exact form of what K-FAC (Martens and Grosse 2015)
    approximates by damping each factor.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> grad = np.asarray([[4.0, 6.0]])
    >>> ng.precondition(grad, np.asarray([[2.0]]), np.asarray([[1.0, 0.0], [0.0, 3.0]]))
    array([[2., 1.]])
    """
    xp = _arrays.check_arrays({"grad": grad, "left": left, "right": right})
    _arrays.check_option("method", method, METHODS)
    _arrays.check_matrix("grad", grad)
    m, n = grad.shape[-2:]
    _arrays.check_core("left", left, (m, m), "to match the rows of grad")
    _arrays.check_core("right", right, (n, n), "to match the columns of grad")
    batch = _arrays.broadcast_batch(
        {k: tuple(v.shape[:-2]) for k, v in (("grad", grad), ("left", left), ("right", right))}
    )
    if rtol is not None:
        rtol = _arrays.check_nonnegative("rtol", rtol, xp, grad, batch=batch)
    damping = _arrays.check_nonnegative("damping", damping, xp, grad, batch=batch, core_ndim=2)
    grad, left, right = (_arrays.nan_unless_finite(xp, array) for array in (grad, left, right))
    if isinstance(damping, float) and damping == 0.0:
        return pinvh_checked(xp, left, rtol, method) @ grad @ pinvh_checked(xp, right, rtol, method)
    if method == "cholesky":
        raise ValueError(
            "method 'cholesky' has no eigenbasis to damp in, got damping other than 0; use 'auto' or 'eigh'"
        )
    lam, u, kept_lam = eigh_kept(xp, symmetric_part(left), rtol)
    mu, v, kept_mu = eigh_kept(xp, symmetric_part(right), rtol)
    kept = kept_lam[..., :, None] & kept_mu[..., None, :]
    scale = lam[..., :, None] * mu[..., None, :] + damping
    rotated = u.mT @ grad @ v
    # Moments have no negative eigenvalues; where those of other matrices meet the damping, nothing solves.
    scale = xp.where(kept & (scale == 0.0), xp.nan, scale)
    solved = xp.where(kept, rotated / xp.where(kept, scale, 1.0), 0.0)
    return u @ xp.where(xp.isnan(rotated + scale), xp.nan, solved) @ v.mT


# -------------------------------------------------------------------- guarded decompositions


def symmetric_part(a: Array) -> Array:
    """(a + aᵀ) / 2, with one new array where the library can work in place."""
    total = _arrays.plus_transpose(a)
    total *= 0.5
    return total


def matmul(a: Array, b: Array) -> Array:
    """Multiply a @ b, as one product where all members share b."""
    if b.ndim > 2 or a.ndim < 3 or not _arrays.merges_products(a, b):
        return a @ b
    xp = _arrays.namespace(a)
    rows = xp.reshape(a, (math.prod(a.shape[:-1]), a.shape[-1]))
    return xp.reshape(rows @ b, (*a.shape[:-1], b.shape[-1]))


def eigh(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors, NaN in members that are not finite or do not converge.

    Libraries raise, or loop, for a whole stack that holds one NaN, so such members are
    replaced before the factorisation.
    """

    def alone(x: Array) -> tuple[Array, Array]:
        return xp.full_like(x[..., 0], xp.nan), xp.full_like(x, xp.nan)

    if _arrays.plainly_finite(xp, a):
        return _arrays.by_halving(xp, xp.linalg.eigh, a, alone)
    finite = _arrays.finite_members(xp, a)
    values, vectors = _arrays.by_halving(xp, xp.linalg.eigh, xp.where(finite, a, 0.0), alone)
    return xp.where(finite[..., 0], values, xp.nan), xp.where(finite, vectors, xp.nan)


def svd(xp: Namespace, a: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition, NaN in members that are not finite or do not converge."""
    finite = _arrays.finite_members(xp, a)

    def factorise(x: Array) -> tuple[Array, Array, Array]:
        u, s, vh = xp.linalg.svd(x, full_matrices=False)
        return u, s, vh

    def transposed(x: Array) -> tuple[Array, Array, Array]:
        # The iteration starts elsewhere, and where one does not converge the other does.
        v, s, uh = factorise(x.mT)
        return uh.mT, s, v.mT

    def alone(x: Array) -> tuple[Array, ...]:
        rank = min(x.shape[-2:])
        blank = (x[..., :rank], x[..., 0, :rank] if rank == x.shape[-1] else x[..., :rank, 0], x[..., :rank, :])
        return _arrays.by_halving(xp, transposed, x, lambda _: tuple(xp.full_like(part, xp.nan) for part in blank))

    u, s, vh = _arrays.by_halving(xp, factorise, xp.where(finite, a, 0.0), alone)
    return xp.where(finite, u, xp.nan), xp.where(finite[..., 0], s, xp.nan), xp.where(finite, vh, xp.nan)


def rank_cutoff(xp: Namespace, a: Array, rtol: float | Array | None) -> Any:
    """The relative cut-off lined up with vectors of eigenvalues: n·eps unless given."""
    if rtol is None:
        return a.shape[-1] * _arrays.eps(xp, a)
    return rtol if isinstance(rtol, float) else rtol[..., None]


def eigh_kept(xp: Namespace, a: Array, rtol: float | Array | None) -> tuple[Array, Array, Array]:
    """Eigenvalues, eigenvectors and the mask of eigenvalues above the relative cut-off.

    Eigenvalues are NaN where the cut-off is negative or NaN.
    """
    values, vectors = eigh(xp, a)
    if a.shape[-1] == 0:
        return values, vectors, values > 0.0
    cutoff = rank_cutoff(xp, a, rtol)
    if not isinstance(cutoff, float):
        values = xp.where(cutoff >= 0.0, values, xp.nan)
    # In ascending order the largest magnitude is at one of the ends.
    largest = xp.maximum(-values[..., :1], values[..., -1:])
    return values, vectors, xp.abs(values) > cutoff * largest


def reciprocal(xp: Namespace, x: Array, kept: Array) -> Array:
    """1/x where `kept`, 0 elsewhere, NaN where x is NaN; nothing is divided by zero."""
    return 1.0 / xp.where(kept | xp.isnan(x), x, xp.inf)


# ----------------------------------------------------------------------- pseudo-inverses


def pinvh_checked(xp: Namespace, a: Array, rtol: float | Array | None, method: str) -> Array:
    """`pinvh` behind the door: `a` floating and square, `rtol` and `method` checked.

    "auto" inverts through Cholesky factors and decomposes only the members without a
    certificate. On eager arrays a few scalars say how many these are, in a JAX trace conditionals.
    """
    hopeless = method == "auto" and 0 not in a.shape and _none_certified(xp, a, rtol)
    if method == "eigh" or 0 in a.shape or hopeless is True:
        return _pinvh_eigh(a, rtol)
    n = int(a.shape[-1])
    if n <= _arrays.BLAS_THREADS_FROM:
        return _pinvh_cholesky(xp, a, rtol, method, hopeless)

    how, own = _cutoffs(a, rtol)

    def of(part: Array, *cutoffs: Array) -> tuple[Array]:
        return (_pinvh_cholesky(xp, part, cutoffs[0][..., 0, 0] if cutoffs else how, method, hopeless),)

    return _arrays.in_pieces(of, (a, *own), [(n, n)], one_by_one=True)[0]


def _pinvh_cholesky(xp: Namespace, a: Array, rtol: float | Array | None, method: str, hopeless: Array | bool) -> Array:
    """`pinvh` by Cholesky factors, with members repaired; a traced `hopeless` says whether none is worth the try."""
    how, own = _cutoffs(a, rtol)

    def none() -> tuple[Array, Array]:
        # Made of the arguments: what varies over the devices of a mesh has to do so in both ways.
        number = sum((array[..., 0, 0] for array in own), a[..., 0, 0])
        return (number != number) & False, a

    certified, inverse = _arrays.branch(
        hopeless, none, lambda: _arrays.compiled(_certified_inverse, (how, method), a, a, *own)
    )
    if method == "cholesky":
        return xp.where(certified[..., None, None], inverse, xp.nan)
    own = tuple(cutoffs + xp.zeros_like(a[..., :1, :1]) for cutoffs in own)

    def slow(a: Array, *cutoffs: Array) -> tuple[Array]:
        return (_pinvh_eigh(a, cutoffs[0][..., 0, 0] if cutoffs else how),)

    return _arrays.repair(xp, ~certified, (inverse,), (a, *own), slow)[0]


def _cutoffs(a: Array, rtol: float | Array | None) -> tuple[float | None, tuple[Array, ...]]:
    """A relative cut-off as one number, or as none and a stack of matrices (*batch, 1, 1).

    On JAX a given number is a stack too: what is compiled has to serve for all of them.
    """
    if isinstance(rtol, float) and _arrays.is_jax(a):
        rtol = _arrays.namespace(a).asarray(rtol, dtype=a.dtype)
    return (rtol, ()) if rtol is None or isinstance(rtol, float) else (None, (rtol[..., None, None],))


def _certified_inverse(how: tuple[float | None, str], a: Array, *cutoffs: Array) -> tuple[Array, Array]:
    """Which members have a certificate, and inverses that hold for those; if there are none, `a` in their place."""
    (rtol, method), xp = how, _arrays.namespace(a)
    # To unit size, so that squares of entries stay in the range of the dtype.
    scale = xp.max(xp.abs(xp.linalg.diagonal(a)), axis=-1)[..., None, None]
    scale = xp.where(scale > 0.0, scale, 1.0)
    unit = _arrays.plus_transpose(a)
    unit *= 0.5 / scale
    has_factor, invert = _by_cholesky(xp, unit)
    factored = has_factor()
    if method == "auto" and _arrays.eager_any(xp, factored) is False:
        return factored, a
    inverse = invert()
    cutoff = cutoffs[0][..., 0, 0] if cutoffs else rank_cutoff(xp, a, rtol)
    # The inverse itself is only known to κ·n·eps, which the margin is for.
    margin = 4 * a.shape[-1] * _arrays.eps(xp, a)
    certified = factored & (_condition_bound(xp, unit, inverse) * (cutoff + margin) < 1.0)
    return certified, _arrays.symmetrized(inverse, scale)


def shifted_inverse(xp: Namespace, a: Array, shift: Array) -> Array:
    """(a + shift 1)⁻¹ of positive semidefinite matrices; `pinvh` of the sum where the shift is lost in rounding.

    Of each matrix one triangle is looked at, or the symmetric part, as the library has it.
    The shift bounds the smallest eigenvalue from below, so that a Cholesky factor that exists
    is one to trust, and no rank is in doubt.
    """
    total = _arrays.add_to_diagonal(xp, a + xp.zeros_like(shift), shift)
    has_factor, invert = _by_cholesky(xp, total)
    inverse = _arrays.symmetrized(invert())
    seen = shift[..., 0, 0] > 16 * _arrays.eps(xp, a) * _arrays.norms(xp, a)
    certified = has_factor() & seen
    return _arrays.repair(xp, ~certified, (inverse,), (total,), lambda a: (_pinvh_eigh(a, None),))[0]


def _none_certified(xp: Namespace, a: Array, rtol: float | Array | None) -> Array | bool:
    """Whether not one of a few members of a large stack can have a certificate: then few will.

    Rounding gives some members of deficient rank a Cholesky factor, but with a small pivot:
    the condition number is at least the ratio of two pivots, the squares on a factor's diagonal.
    """
    if a.ndim < 3 or a.shape[-3] < 64 or not _arrays.can_branch(a):
        return False
    few = a[..., :: max(32, a.shape[-3] // 4), :, :]
    root = xp.linalg.diagonal(_arrays.cholesky(xp, few))
    least = rank_cutoff(xp, a, rtol if isinstance(rtol, float) else None) ** 0.5 * xp.max(root, axis=-1)
    none = ~xp.any(xp.min(root, axis=-1) > least)
    return none if _arrays.is_lazy(none) else bool(none)


def _pinvh_eigh(a: Array, rtol: float | Array | None) -> Array:
    how, own = _cutoffs(a, rtol)

    def of(part: Array, *cutoffs: Array) -> tuple[Array]:
        return (_arrays.compiled(_spectral_inverse, how, part, part, *cutoffs),)

    n = int(a.shape[-1])
    # Decompositions of larger matrices have threads within, which would wait for each other.
    return _arrays.in_pieces(of, (a, *own), [(n, n)])[0] if n < 16 else of(a, *own)[0]


def _spectral_inverse(rtol: float | None, a: Array, *cutoffs: Array) -> Array:
    """`pinvh` through the eigenvalues of every member."""
    xp = _arrays.namespace(a)
    # Of the sum with the transpose, that is of 2a: half the inverse, and the sum of two halves is whole.
    values, vectors, kept = eigh_kept(xp, _arrays.plus_transpose(a), cutoffs[0][..., 0, 0] if cutoffs else rtol)
    half = _arrays.spectral_product(xp, vectors, reciprocal(xp, values, kept))
    return _arrays.plus_transpose(half)


def _by_cholesky(xp: Namespace, a: Array) -> tuple[Callable[[], Array], Callable[[], Array]]:
    """Functions that say which members have a Cholesky factor, and give their inverses, symmetric up to rounding."""
    if _arrays.inverts_by_blocks(a, positive=True):
        half = _arrays.inverse_lower_by_blocks(a)
        # A row without a pivot is NaN, and the next ones need not be.
        return lambda: xp.isfinite(xp.sum(xp.linalg.diagonal(half), axis=-1)), lambda: _arrays.gram_of_lower(half)
    factor = _arrays.cholesky(xp, a)

    def invert() -> Array:
        inverse = _arrays.inverse_of_factored(factor)
        if inverse is not None:
            return inverse
        half = inverse_lower(xp, factor)
        return half.mT @ half

    return lambda: xp.isfinite(factor[..., -1, -1]), invert


def _condition_bound(xp: Namespace, a: Array, inverse: Array) -> Array:
    """An upper bound on each member's condition number, which proves its rank.

    A factorisation that succeeds proves nothing about rank, but the inverse it gives
    does: λ_max ≤ ‖A‖ and λ_min ≥ 1/‖A⁻¹‖, so ‖A‖·‖A⁻¹‖ < 1/rtol puts every eigenvalue (or
    singular value) above the cut-off. The product is at least κ + 1/κ + n − 2 (Cauchy and
    Schwarz, with the largest and the smallest singular value paired crosswise), which makes
    the bound close where singular values are equal. Inf where nothing is proved.
    """
    bound = _arrays.norms(xp, a) * _arrays.norms(xp, inverse)
    n = a.shape[-1]
    # Both norms are rounded, by no more than a few n·eps of their product.
    bound = bound * (1.0 + 4 * n * _arrays.eps(xp, a)) - max(n - 2, 0)
    return xp.where(bound > 0.0, bound, xp.inf)


def inverse(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """Inverses of square matrices, and a bound on the condition number that says where to trust them."""
    result = _arrays.inverse(xp, a)
    return result, _condition_bound(xp, a, result)


def inverse_without_pivots(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """`inverse` by matrix products where these are faster, with the bound Inf where it may not be as accurate.

    Members with that bound have pivots after all: on JAX one in 128, most stacks need no more, and are
    spared another way.
    """
    if not _arrays.inverts_by_blocks(a):
        return inverse(xp, a)
    result, condition = _by_blocks(xp, a)
    batch, flags, values = tuple(condition.shape), xp.isinf(condition), (result, condition[..., None, None])

    def with_pivots(few: Array) -> tuple[Array, Array]:
        new, bound = inverse(xp, few)
        return new, bound[..., None, None]

    if _arrays.is_jax(a):
        places, (few,) = _arrays.first_flagged(xp, flags, (a,), -(-math.prod(batch) // 128))
        result, condition = _arrays.put_back(xp, batch, values, with_pivots(few), places)
    else:
        result, condition = _arrays.repair(xp, flags, values, (a,), with_pivots, spent=True)
    return result, condition[..., 0, 0]


def _by_blocks(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """Inverses without pivots, by which a few members of any stack lose digits, and bounds that are Inf for those.

    A step of Newton, X + X (1 − AX), squares their residual, and where its square is below
    eps times the condition number, no more is lost than with pivots.
    """
    result, identity = _arrays.inverse_by_blocks(a), _arrays.eye(xp, a.shape[-1], a)
    # In float32 one step leaves some members wrong in every large stack, and a product costs little there.
    for _ in range(1 if _arrays.item_bytes(xp, a) == 8 else 2):
        residual = identity - a @ result
        result = result + result @ residual
    condition = _condition_bound(xp, a, result)
    left = _arrays.norms(xp, residual) ** 2
    return result, xp.where(left < _arrays.eps(xp, a) * condition, condition, xp.inf)


def inverses(xp: Namespace, arrays: tuple[Array, ...], *, pivots: bool = True) -> list[tuple[Array, Array]]:
    """`inverse` of several stacks of square matrices of one size; without pivots, where that is allowed and faster."""
    if not pivots and all(_arrays.inverts_by_blocks(a) for a in arrays):
        return [_by_blocks(xp, a) for a in arrays]
    if not _arrays.calls_may_meet(arrays[0], len(arrays)):
        return [inverse(xp, a) for a in arrays]
    n = arrays[0].shape[-1]
    lengths = [math.prod(a.shape[:-2]) for a in arrays]
    result = _arrays.inverse(xp, xp.concat([xp.reshape(a, (-1, n, n)) for a in arrays]))
    found, start = [], 0
    for a, length in zip(arrays, lengths, strict=True):
        own = xp.reshape(result[start : start + length, ...], a.shape)
        found.append((own, _condition_bound(xp, a, own)))
        start += length
    return found


def positive_inverse(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """`inverse` of positive definite matrices, through Cholesky factors where that is faster."""
    if _arrays.has_fast_inverse(a):
        return inverse(xp, a)
    result = _by_cholesky(xp, a)[1]()
    return result, _condition_bound(xp, a, result)


def positive_inverses(xp: Namespace, a: Array, b: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`positive_inverse` of two stacks; as one where calls take longer than their work."""
    if tuple(a.shape) != tuple(b.shape) or not _arrays.calls_outweigh_work(a):
        return positive_inverse(xp, a), positive_inverse(xp, b)
    result, condition = positive_inverse(xp, xp.stack((a, b)))
    return (result[0, ...], condition[0, ...]), (result[1, ...], condition[1, ...])


def inverse_lower(xp: Namespace, lower: Array) -> Array:
    """Inverses of lower triangular matrices by doubling, at matrix-product speed.

    Once the diagonal blocks of size s are inverted, [[A, 0], [C, B]]⁻¹ has −B⁻¹ C A⁻¹ in
    its corner, which gives all diagonal blocks of size 2s at once: log₂ n rounds.
    """
    n = lower.shape[-1]
    rounds = math.ceil(math.log2(n)) if n else 0
    padded = _pad_identity(xp, lower, 2**rounds) if n else lower
    blocks = _diagonal_blocks(xp, padded, 1)
    blocks = reciprocal(xp, blocks, xp.ones_like(blocks) > 0.0)
    for size in (2**k for k in range(rounds)):
        pairs = xp.reshape(blocks, (*blocks.shape[:-3], blocks.shape[-3] // 2, 2, size, size))
        top, bottom = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -(bottom @ (_diagonal_blocks(xp, padded, 2 * size)[..., size:, :size] @ top))
        upper = xp.concat([top, xp.zeros_like(top)], axis=-1)
        blocks = xp.concat([upper, xp.concat([corner, bottom], axis=-1)], axis=-2)
    return blocks[..., 0, :n, :n] if n else lower


def _pad_identity(xp: Namespace, a: Array, n: int) -> Array:
    """Extend lower triangular matrices to size n by an identity."""
    missing = n - a.shape[-1]
    if not missing:
        return a
    batch, size = tuple(a.shape[:-2]), a.shape[-1]
    corner = xp.broadcast_to(_arrays.eye(xp, missing, a), (*batch, missing, missing))
    zeros = xp.zeros((*batch, size, missing), dtype=a.dtype, device=_arrays.device(a))
    left = xp.concat([a, xp.matrix_transpose(zeros)], axis=-2)
    return xp.concat([left, xp.concat([zeros, corner], axis=-2)], axis=-1)


def _diagonal_blocks(xp: Namespace, a: Array, size: int) -> Array:
    """The blocks along the diagonal: (*batch, n, n) to (*batch, n/size, size, size)."""
    count, batch = a.shape[-1] // size, tuple(a.shape[:-2])
    d = len(batch)
    tiles = xp.reshape(a, (*batch, count, size, count, size))
    tiles = xp.permute_dims(tiles, (*range(d), d + 1, d + 3, d, d + 2))
    return xp.permute_dims(xp.linalg.diagonal(tiles), (*range(d), d + 2, d, d + 1))


def dual(xp: Namespace, x: Array, rank: int, rtol: float | Array, method: str = "auto") -> Array:
    """The transposed Moore–Penrose inverse (x⁺)ᵀ of factors x, shaped like x.

    Parameters
    ----------
    x : array, shape (*batch, m, n)
        Factors of covariances x xᵀ.
    rank : int
        The largest rank that the shapes behind x allow. The cut-off works below it.
    rtol : float or array of shape (*batch,)
        Relative cut-off on the singular values of x.
    method : {"auto", "eigh", "cholesky"}
        "auto" works on x itself, so accuracy goes with its condition number; the other
        two on its Gram matrix, whose condition number is the square.
    """
    if method != "auto":
        squared = rtol * rtol
        if x.shape[-2] <= x.shape[-1]:
            return pinvh_checked(xp, x @ x.mT, squared, method) @ x
        return x @ pinvh_checked(xp, x.mT @ x, squared, method)
    u, s, vh = svd(xp, x)
    index = xp.arange(s.shape[-1], device=_arrays.device(x))
    cutoff = rtol if isinstance(rtol, float) else rtol[..., None]
    kept = (s > cutoff * xp.max(s, axis=-1, keepdims=True)) & (index < rank)
    scaled = reciprocal(xp, s, kept)
    if not isinstance(rtol, float):
        scaled = xp.where(cutoff >= 0, scaled, xp.nan)
    return (u * scaled[..., None, :]) @ vh


def kron(xp: Namespace, a: Array, b: Array) -> Array:
    """Kronecker products a ⊗ b of stacks of matrices, batch axes broadcast."""
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    p, m, q, n = product.shape[-4:]
    return xp.reshape(product, (*product.shape[:-4], p * m, q * n))


def wide_factors(xp: Namespace, factors: Sequence[tuple[Array, Array]], batch: Shape) -> tuple[Array, Array]:
    """Two matrices, (*batch, m, P) and (*batch, n, P), for a_1 ⊗ b_1, a_2 ⊗ b_2, ... side by side.

    Row (i, j) of these is row i of the one times row j of the other, so that no pass over memory joins blocks.
    """
    sizes = [(int(a.shape[-1]), int(b.shape[-1])) for a, b in factors]

    def wide(parts: list[Array]) -> Array:
        rows = int(parts[0].shape[-3])
        flat = [
            xp.reshape(xp.broadcast_to(part, (*batch, rows, p, q)), (*batch, rows, p * q))
            for part, (p, q) in zip(parts, sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else xp.concat(flat, axis=-1)

    return wide([a[..., :, None] for a, _ in factors]), wide([b[..., None, :] for _, b in factors])


def vec(xp: Namespace, x: Array) -> Array:
    """Stack the columns of matrices: (*batch, m, n) to (*batch, m·n)."""
    return xp.reshape(xp.matrix_transpose(x), (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def unvec(xp: Namespace, x: Array, m: int, n: int) -> Array:
    """Undo `vec`: (*batch, m·n) to (*batch, m, n)."""
    return xp.matrix_transpose(xp.reshape(x, (*x.shape[:-1], n, m)))
