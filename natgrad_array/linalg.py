"""Batched algebra of positive-semidefinite matrices and of their factors.

`pinvh` and `precondition` are the public door. The functions below them are the thin
bodies that the rooms above call with arrays that have been checked already.
"""

from __future__ import annotations

from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace

METHODS = ("auto", "eigh", "cholesky")


# ------------------------------------------------------------------------------ the door


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
    """(a + aᵀ) / 2, halved first so that large entries do not overflow."""
    half = 0.5 * a
    return half + half.mT


def eigh(xp: Namespace, a: Array) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors, NaN in members that are not finite or do not converge.

    Libraries raise, or loop, for a whole stack that holds one NaN, so such members are
    replaced before the factorisation.
    """
    finite = _arrays.finite_members(xp, a)

    def alone(x: Array) -> tuple[Array, Array]:
        return xp.full_like(x[..., 0], xp.nan), xp.full_like(x, xp.nan)

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
    magnitude = xp.abs(values)
    return values, vectors, magnitude > cutoff * xp.max(magnitude, axis=-1, keepdims=True)


def reciprocal(xp: Namespace, x: Array, kept: Array) -> Array:
    """1/x where `kept`, 0 elsewhere, NaN where x is NaN; nothing is divided by zero."""
    return xp.where(xp.isnan(x), xp.nan, xp.where(kept, 1.0 / xp.where(kept, x, 1.0), 0.0))


# ----------------------------------------------------------------------- pseudo-inverses


def pinvh_checked(xp: Namespace, a: Array, rtol: float | Array | None, method: str) -> Array:
    """`pinvh` behind the door: `a` floating and square, `rtol` and `method` checked."""
    a = symmetric_part(_arrays.nan_unless_finite(xp, a))
    if method == "cholesky":
        return _pinvh_cholesky(xp, a, rtol)
    values, vectors, kept = eigh_kept(xp, a, rtol)
    return symmetric_part((vectors * reciprocal(xp, values, kept)[..., None, :]) @ vectors.mT)


def _pinvh_cholesky(xp: Namespace, a: Array, rtol: float | Array | None) -> Array:
    """Inverses through Cholesky factors, NaN where full rank is not certified.

    A factorisation that succeeds proves nothing about rank, but the inverse it gives
    does: λ_max ≤ ‖A‖ and λ_min ≥ 1/‖A⁻¹‖, so ‖A‖·‖A⁻¹‖ < 1/rtol puts every eigenvalue
    above the cut-off. That holds only if the factor is one of A, which is asked too:
    some libraries return finite garbage for an indefinite matrix.
    """
    n = a.shape[-1]
    if n == 0:
        return a
    precision = n * _arrays.eps(xp, a)
    factor = _arrays.cholesky(xp, a)
    half = inverse_lower(xp, factor)
    inverse = half.mT @ half
    norm, inverse_norm = spectral_bound(xp, a), spectral_bound(xp, inverse)
    misfit = spectral_bound(xp, factor @ factor.mT - a)
    cutoff = rank_cutoff(xp, a, rtol)
    cutoff = cutoff if isinstance(cutoff, float) else cutoff[..., 0]
    certified = (misfit <= 8 * precision * norm) & (norm * inverse_norm * (cutoff + precision) < 1.0)
    return xp.where(certified[..., None, None], inverse, xp.nan)


def spectral_bound(xp: Namespace, a: Array) -> Array:
    """The smaller of two upper bounds on ‖a‖₂ of symmetric matrices: Frobenius, largest row sum."""
    scale = xp.max(xp.abs(a), axis=(-2, -1))
    unit = a / xp.where(scale > 0.0, scale, 1.0)[..., None, None]
    frobenius = xp.sqrt(xp.sum(unit * unit, axis=(-2, -1)))
    return scale * xp.minimum(frobenius, xp.max(xp.sum(xp.abs(unit), axis=-1), axis=-1))


def inverse_lower(xp: Namespace, lower: Array) -> Array:
    """Inverses of lower triangular matrices by doubling, at matrix-product speed.

    Once the diagonal blocks of size s are inverted, [[A, 0], [C, B]]⁻¹ has −B⁻¹ C A⁻¹ in
    its corner, which gives all diagonal blocks of size 2s at once.
    """
    n = lower.shape[-1]
    index = xp.arange(n, device=_arrays.device(lower))
    inverse = reciprocal(xp, lower, index[:, None] == index)
    size = 1
    while size < n:
        block = index // size
        corner = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)
        inverse = inverse - inverse @ xp.where(corner, lower, 0.0) @ inverse
        size *= 2
    return inverse


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


def vec(xp: Namespace, x: Array) -> Array:
    """Stack the columns of matrices: (*batch, m, n) to (*batch, m·n)."""
    return xp.reshape(xp.matrix_transpose(x), (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def unvec(xp: Namespace, x: Array, m: int, n: int) -> Array:
    """Undo `vec`: (*batch, m·n) to (*batch, m, n)."""
    return xp.matrix_transpose(xp.reshape(x, (*x.shape[:-1], n, m)))
