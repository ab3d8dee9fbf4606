"""Products and factorisations by the fastest routine of each library; the table of what lies outside the standard."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from natgrad_array._arrays.checks import broadcast_shapes
from natgrad_array._arrays.libraries import (
    Array,
    Namespace,
    Shape,
    device,
    eps,
    eye,
    finite_members,
    is_cupy,
    is_jax,
    is_numpy,
    is_torch,
)
from natgrad_array._arrays.pieces import BLAS_THREADS_FROM, PIECE_BYTES


def gram(xp: Namespace, x: Array, divisor: Any = 1, *, less: Array | None = None) -> Array:
    """A new (xᵀx − lessᵀ less) / divisor, exactly symmetric; `less` is a row.

    NumPy knows the product of a matrix with its own transpose, computes half of it and
    mirrors that, so that no mean of both halves is needed.
    """
    if is_torch(x) and x.ndim == 3 and isinstance(divisor, int | float):
        # The product is scaled as it is made, and needs no pass over memory for that.
        blank = x.new_empty(()).expand(x.shape[0], x.shape[2], x.shape[2])
        half = sys.modules["torch"].baddbmm(blank, x.mT, x, beta=0, alpha=0.5 / divisor)
        product = half + half.mT
        return product if less is None else add_outer(xp, product, less / divisor**0.5, -1)
    product, halves = xp.matrix_transpose(x) @ x, 1
    if not (is_numpy(x) and _blas_layout(x)):
        # Halved after the sum: XLA would fuse the two halves into one rounding and one exact product.
        product, halves = product + xp.matrix_transpose(product), 2
    if less is not None:
        product = add_outer(xp, product, less, -halves)
    product /= halves * divisor
    return product


def add_outer(xp: Namespace, a: Array, row: Array, factor: float = 1.0) -> Array:
    """`a`, which is the caller's own, with rowᵀ row times ±1 or ±2 added: what is symmetric stays so.

    torch does it in one pass over memory.
    """
    column = xp.matrix_transpose(row)
    if is_torch(a):
        return a.addcmul_(column, row, value=factor)
    a += (factor * column) * row
    return a


def symmetrized(a: Array, divisor: Array | None = None) -> Array:
    """(a + aᵀ) / 2, over a divisor, for an `a`, the caller's own, that rounding alone keeps from being symmetric.

    NumPy's products of a matrix with its own transpose are symmetric already.
    """
    if not is_numpy(a):
        a, divisor = a + a.mT, 2.0 if divisor is None else 2.0 * divisor
    if divisor is None:
        return a
    # Not in place where torch needs what was there for a derivative.
    if is_torch(a) and a.requires_grad:
        return a / divisor
    a /= divisor
    return a


def scaled_gap(a: Array, b: Array, c: Array, scale: float) -> Array:
    """A new scale (a − b c), in one pass over memory on torch, and with one array on NumPy."""
    batch = broadcast_shapes((b.shape[:-2], c.shape[:-2]))
    if is_torch(a) and a.ndim == 3 and tuple(a.shape[:-2]) == batch:
        b, c = (factor.expand(*batch, *factor.shape[-2:]) for factor in (b, c))
        return sys.modules["torch"].baddbmm(a, b, c, beta=scale, alpha=-scale)
    product = b @ c
    if is_numpy(a) and a.shape == product.shape:
        np.subtract(a, product, out=product)
    else:
        product = a - product
    product *= scale
    return product


def lerp(xp: Namespace, a: Array, b: Array, share: Array) -> Array:
    """The point a + share (b − a), from the nearer end on: a itself at 0 and b itself at 1, to the last bit."""
    if is_torch(a):
        return sys.modules["torch"].lerp(a, b, share)
    nearer = share < 0.5
    return xp.where(nearer, a, b) + (b - a) * xp.where(nearer, share, share - 1.0)


def _blas_layout(x: np.ndarray[Any, Any]) -> bool:
    """Whether NumPy hands these matrices to BLAS as they are: it does not know of copies that they are the same."""
    (n, p), (down, right), size = x.shape[-2:], x.strides[-2:], x.itemsize
    by_rows = right == size and down % size == 0 and down >= p * size
    by_columns = down == size and right % size == 0 and right >= n * size
    return by_rows or by_columns or x.size == 0


def sum_rows(xp: Namespace, x: Array) -> Array:
    """The sum over axis -2, kept as an axis of length one.

    A product with ones is faster than the strided sum on NumPy, and slower on torch and on
    JAX, whose compiler fuses the sum with what is around it.
    """
    if is_jax(x) or is_torch(x):
        return xp.sum(x, axis=-2, keepdims=True)
    return xp.ones((1, x.shape[-2]), dtype=x.dtype, device=device(x)) @ x


def mean_rows(xp: Namespace, x: Array) -> Array:
    """`sum_rows` over their number."""
    return xp.mean(x, axis=-2, keepdims=True) if is_torch(x) else sum_rows(xp, x) / x.shape[-2]


def reduce_blocks(
    x: Array,
    weights: Array | None,
    rows: int,
    of: Callable[[Array, Array | None], Array],
    merge: Callable[[Array, Array], Array],
) -> Array:
    """Look at every block of samples of a Dask array once, and merge what was seen by a tree.

    Parameters
    ----------
    x : Dask array, shape (*batch, n, p)
        In any chunks, of any library; features are brought into one.
    weights : Dask array, shape (*batch, n), or None
        Batch axes broadcast.
    rows : int
        Of what a block leaves.
    of : callable
        Takes a block, (*batch, n_k, p), and its weights, (*batch, n_k), as arrays of the
        blocks' own library, and returns an array (*batch, rows, p).
    merge : callable
        Takes two of these and returns one.

    Returns
    -------
    Dask array, shape (*batch, rows, p)
        Not computed yet.
    """
    da, given = sys.modules["dask.array"], None
    if weights is not None:
        batch = np.broadcast_shapes(x.shape[:-2], weights.shape[:-1])
        x, given = da.broadcast_to(x, (*batch, *x.shape[-2:])), weights[..., None]

    def chunk(block: Array, weights: Array | None = None, **_: Any) -> Array:
        return of(block, None if weights is None else weights[..., 0])

    def combine(parts: Any, **_: Any) -> Array:
        return functools.reduce(merge, parts) if isinstance(parts, list) else parts

    return da.reduction(
        x.rechunk({x.ndim - 1: -1}),
        chunk,
        combine,
        combine=combine,
        axis=x.ndim - 2,
        keepdims=True,
        output_size=rows,
        concatenate=False,
        dtype=x.dtype,
        meta=x._meta,
        weights=given,
    )


def add_to_diagonal(xp: Namespace, a: Array, values: float | Array) -> Array:
    """`a`, which is the caller's own, with values of shape (*batch, 1, 1) added to its diagonals.

    NumPy and torch write through a view of the diagonal: on NumPy a stack of multiples of
    the identity doubles the time of the shrinkage of small matrices.
    """
    if is_numpy(a):
        diagonal = np.einsum("...ii->...i", a)
    elif is_torch(a):
        diagonal = a.diagonal(dim1=-2, dim2=-1)
    else:
        a += values * eye(xp, a.shape[-1], a)
        return a
    diagonal += values if isinstance(values, float) else values[..., 0]
    return a


def plus_transpose(a: Array) -> Array:
    """A new a + aᵀ.

    Columns of rows that lie a power of two apart fall on few places of the cache: on NumPy such
    large matrices are read from a copy with longer rows, in a third of the time.
    """
    n = int(a.shape[-1])
    if not is_numpy(a) or n < 128 or n * a.dtype.itemsize % 1024:
        return a + a.mT
    apart = np.empty((*a.shape[:-1], n + 8), dtype=a.dtype)[..., :n]
    apart[...] = a
    return a + apart.mT


def spectral_product(xp: Namespace, vectors: Array, values: Array) -> Array:
    """V diag(values) Vᵀ; on torch's CPU without the first columns whose value is 0 in every member.

    These are half of all in a stack of rank n/2, whose eigenvalues come in ascending order.
    To look for them takes longer than the products of matrices below 16 × 16.
    """
    if is_torch(values) and values.device.type == "cpu" and values.ndim > 1 and values.shape[-1] >= 16:
        needed = (values != 0.0).flatten(0, -2).any(dim=0)
        first = int(needed.to(sys.modules["torch"].uint8).argmax()) if bool(needed.any()) else 0
        vectors, values = vectors[..., first:], values[..., first:]
    return (vectors * values[..., None, :]) @ xp.matrix_transpose(vectors)


def cholesky(xp: Namespace, a: Array) -> Array:
    """Lower Cholesky factors; NaN in members that have none.

    NumPy's public function raises for a whole stack and computes float32 in float64; the
    generalised ufunc behind it writes NaN into the members that fail and keeps the dtype.
    """
    kernel = getattr(getattr(np.linalg, "_umath_linalg", None), "cholesky_lo", None)
    if is_numpy(a):
        if kernel is not None:
            with np.errstate(all="ignore"):
                return kernel(a, signature="f->f" if a.dtype == np.float32 else "d->d")
    elif is_torch(a):
        return _nan_where_failed(*sys.modules["torch"].linalg.cholesky_ex(a))
    elif is_jax(a):
        return xp.linalg.cholesky(a)
    elif is_cupy(a):
        return nan_unless_factor(xp, xp.linalg.cholesky(a), a)
    finite = finite_members(xp, a)
    safe = xp.where(finite, a, eye(xp, a.shape[-1], a))
    (factor,) = by_halving(xp, lambda x: (xp.linalg.cholesky(x),), safe, lambda x: (xp.full_like(x, xp.nan),))
    return xp.where(finite, factor, xp.nan)


def nan_unless_factor(xp: Namespace, factor: Array, a: Array) -> Array:
    """Cholesky factors with NaN in the members that they do not belong to.

    CuPy leaves finite garbage where a factorisation broke off, and its norms may pass for
    those of an inverse; but only a factor of the matrix has its diagonal.
    """
    rows, diagonal = xp.linalg.vecdot(factor, factor), xp.linalg.diagonal(a)
    precision = 8 * a.shape[-1] * eps(xp, a)
    fits = xp.all(xp.abs(rows - diagonal) <= precision * xp.abs(diagonal), axis=-1)
    return xp.where(fits[..., None, None], factor, xp.nan)


def has_fast_inverse(a: Array) -> bool:
    """Whether `inverse`, one call for all, beats the way by Cholesky factors: for a few small matrices on NumPy.

    By sizes alone, so that digits do not depend on where it is called.
    """
    return bool(is_numpy(a) and a.shape[-1] <= BLAS_THREADS_FROM and a.size < 2**13)


def calls_outweigh_work(a: Array) -> bool:
    """Whether a stack is so small that its calls take longer than what they do: on torch."""
    return is_torch(a) and a.device.type == "cpu" and math.prod(a.shape) * a.element_size() <= PIECE_BYTES


def merges_products(a: Array, b: Array) -> bool:
    """Whether one large product is faster than a stack of small ones.

    BLAS starts threads of its own for it, which stay busy for a while: not for little work on
    NumPy, as in a piece, nor where rows would have to be copied before they are one matrix.
    """
    return not is_numpy(a) or (a.flags.c_contiguous and a.size * b.shape[-1] >= 2**24)


def inverse(xp: Namespace, a: Array) -> Array:
    """Inverses of square matrices; not finite, or not an inverse at all, in members that have none.

    NumPy's public function raises for a whole stack and computes float32 in float64. What
    comes out holds for a member whose condition number says so. Where a member has none,
    NumPy would warn, but every door is `quiet`.
    """
    kernel = getattr(getattr(np.linalg, "_umath_linalg", None), "inv", None)
    if is_numpy(a) and kernel is not None:
        return kernel(a, signature="f->f" if a.dtype == np.float32 else "d->d")
    if is_torch(a) and a.device.type == "cpu":
        return _nan_where_failed(*sys.modules["torch"].linalg.inv_ex(a))
    finite = finite_members(xp, a)
    # A NaN can keep a GPU's LU factorisation busy for ever.
    safe = xp.where(finite, a, eye(xp, a.shape[-1], a))
    if is_jax(a):
        return xp.where(finite, xp.linalg.inv(safe), xp.nan)
    if is_torch(a):
        return xp.where(finite, _nan_where_failed(*sys.modules["torch"].linalg.inv_ex(safe)), xp.nan)
    (result,) = by_halving(xp, lambda x: (xp.linalg.inv(x),), safe, lambda x: (xp.full_like(x, xp.nan),))
    return xp.where(finite, result, xp.nan)


def _nan_where_failed(result: Array, failed: Array) -> Array:
    """What torch's functions without checks return, with NaN in members that they could not do."""
    if failed.device.type == "cpu" and not bool(failed.any()):
        return result
    return sys.modules["torch"].where((failed == 0)[..., None, None], result, math.nan)


def norms(xp: Namespace, a: Array) -> Array:
    """Frobenius norm of each member of a stack of matrices."""
    if is_numpy(a):
        flat = a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])
        return np.sqrt(np.vecdot(flat, flat))
    if is_torch(a):
        return sys.modules["torch"].linalg.vector_norm(a, dim=(-2, -1))
    flat = xp.reshape(a, (*a.shape[:-2], a.shape[-2] * a.shape[-1]))
    return xp.sqrt(xp.linalg.vecdot(flat, flat))


def inverse_of_factored(factor: Array) -> Array | None:
    """Inverses of matrices with given lower Cholesky factors by the library's own means, else None.

    Symmetric up to rounding.
    """
    if is_numpy(factor):
        return _gram_of_lower(_inverse_lower_in_place(factor))
    if is_torch(factor):
        return sys.modules["torch"].cholesky_inverse(factor)
    if is_jax(factor):
        jax = sys.modules["jax"]
        identity = jax.numpy.broadcast_to(jax.numpy.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        half = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        return half.mT @ half
    return None


def _inverse_lower_in_place(lower: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`linalg.inverse_lower` on NumPy: the same rounds, written through views of one array."""
    n = lower.shape[-1]
    flat = np.ascontiguousarray(lower).reshape(-1, n, n)
    inverse = np.zeros_like(flat)
    with np.errstate(all="ignore"):
        whole = n - n % _SMALLEST
        _substitute(flat[:, :whole, :whole], inverse[:, :whole, :whole], _SMALLEST)
        _substitute(flat[:, whole:, whole:], inverse[:, whole:, whole:], n % _SMALLEST)
        size = _SMALLEST
        while size < n:
            whole = n // (2 * size)
            top, bottom = _blocks(inverse, 0, 0, size, whole), _blocks(inverse, size, size, size, whole)
            product = bottom @ (_blocks(flat, size, 0, size, whole) @ top)
            np.negative(product, out=_blocks(inverse, size, 0, size, whole))
            start = 2 * size * whole
            if n - start > size:
                # What is left at the end holds one block and a smaller one.
                left, right = slice(start, start + size), slice(start + size, None)
                inverse[:, right, left] = -(inverse[:, right, right] @ (flat[:, right, left] @ inverse[:, left, left]))
            size *= 2
    return inverse.reshape(lower.shape)


def _gram_of_lower(lower: Array) -> Array:
    """lowerᵀ lower of lower triangular matrices, where they are large without the products with zeros."""
    n = lower.shape[-1]
    if n < 2 * BLAS_THREADS_FROM:
        return lower.mT @ lower
    h = n // 2
    left, right = lower[..., h:, :h], lower[..., h:, h:]
    product = np.empty_like(lower)
    product[..., :h, :h] = _gram_of_lower(lower[..., :h, :h])
    product[..., :h, :h] += left.mT @ left
    corner = np.matmul(right.mT, left, out=product[..., h:, :h])
    product[..., :h, h:] = corner.mT
    product[..., h:, h:] = _gram_of_lower(right)
    return product


# Below this size a matrix product is all overhead: rows of all blocks are worked on at once.
_SMALLEST = 4


def _substitute(lower: np.ndarray[Any, Any], inverse: np.ndarray[Any, Any], size: int) -> None:
    """Invert the diagonal blocks of `size` by forward substitution, with blocks on the last axes."""
    if not lower.shape[-1]:
        return
    rows, result = _tiles(lower, size).copy(), _tiles(inverse, size)
    for i in range(size):
        pivot = 1.0 / rows[i, i]
        result[i, i] = pivot
        for k in range(i):
            rows[i, k] *= -pivot
        for j in range(i):
            total = rows[i, j] * result[j, j]
            for k in range(j + 1, i):
                total += rows[i, k] * result[k, j]
            result[i, j] = total


def _tiles(a: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """A view of the diagonal blocks, (members, n, n) to (size, size, members, n / size)."""
    member, down, right = a.strides
    return np.lib.stride_tricks.as_strided(
        a, (size, size, a.shape[0], a.shape[-1] // size), (down, right, member, size * (down + right))
    )


def _blocks(a: np.ndarray[Any, Any], row: int, column: int, size: int, count: int) -> np.ndarray[Any, Any]:
    """A view of the blocks at (row, column) in each of `count` diagonal tiles of twice the size."""
    member, down, right = a.strides
    return np.lib.stride_tricks.as_strided(
        a[:, row:, column:],
        (a.shape[0], count, size, size),
        (member, 2 * size * (down + right), down, right),
    )


def by_halving(
    xp: Namespace, factorise: Callable[[Array], Any], a: Array, alone: Callable[[Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Factorise a stack although the library raises for all of it when one member fails.

    Libraries that raise do not say which member failed, so the stack is halved until every
    failure is alone; `alone` then gives its factors, with a batch axis of length one.
    """
    try:
        return tuple(factorise(a))
    except (ValueError, RuntimeError) as error:
        # NumPy's is a ValueError, torch's a RuntimeError.
        if not type(error).__name__.endswith("LinAlgError"):
            raise
        flat = xp.reshape(a, (-1, *a.shape[-2:]))
        if flat.shape[0] == 1:
            parts = alone(flat)
        else:
            middle = flat.shape[0] // 2
            halves = [by_halving(xp, factorise, half, alone) for half in (flat[:middle, ...], flat[middle:, ...])]
            parts = tuple(xp.concat(pair) for pair in zip(*halves, strict=True))
        return tuple(xp.reshape(part, (*a.shape[:-2], *part.shape[1:])) for part in parts)


def stack_products(
    xp: Namespace, factors: Callable[[int], tuple[Array, Array]], sizes: Sequence[int], batch: Shape, like: Array
) -> Array:
    """A square matrix of which the k-th rows are all products of a row of one wide matrix with one of another.

    Parameters
    ----------
    factors : callable
        Takes k and returns the two, (*batch, m_k, P) and (*batch, n_k, P).
    sizes : sequence of int
        Their numbers of rows, m_k n_k; P is the sum.
    """

    def parts(k: int) -> tuple[Array, Array]:
        left, right = factors(k)
        return left[..., :, None, :], right[..., None, :, :]

    ends = list(itertools.accumulate(sizes, initial=0))
    if not any(test(like) for test in (is_numpy, is_cupy, is_torch)):
        rows = [xp.reshape(xp.multiply(*parts(k)), (*batch, size, ends[-1])) for k, size in enumerate(sizes)]
        return xp.concat(rows, axis=-2)
    whole = xp.empty((*batch, ends[-1], ends[-1]), dtype=like.dtype, device=device(like))
    for k, (start, end) in enumerate(itertools.pairwise(ends)):
        left, right = parts(k)
        room = whole[..., start:end, :].reshape((*batch, left.shape[-3], right.shape[-2], ends[-1]))
        try:
            xp.multiply(left, right, out=room)
        except RuntimeError:  # torch's, of what has a derivative
            room[...] = left * right
    return whole
