"""Factorisations and inverses by the fastest routine of each library, which mark the members that have none."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from natgrad_array._arrays.libraries import (
    Array,
    Namespace,
    eps,
    eye,
    finite_members,
    is_cupy,
    is_jax,
    is_numpy,
    is_torch,
)

BLAS_THREADS_FROM = 64
"""OpenBLAS gives products of larger matrices threads of its own."""


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


def inverse_of_factored(factor: Array) -> Array | None:
    """Inverses of matrices with given lower Cholesky factors by the library's own means, else None.

    Symmetric up to rounding.
    """
    if is_torch(factor):
        return sys.modules["torch"].cholesky_inverse(factor)
    if is_jax(factor):
        jax = sys.modules["jax"]
        identity = jax.numpy.broadcast_to(jax.numpy.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        half = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        return half.mT @ half
    return None


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


def inverse_lower_in_place(lower: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`linalg.inverse_lower` on NumPy: the same rounds, written through views of one array."""
    n = lower.shape[-1]
    flat = np.ascontiguousarray(lower).reshape(-1, n, n)
    inverse = np.zeros_like(flat)
    with np.errstate(all="ignore"):
        whole = n - n % _SMALLEST
        _substitute(flat, inverse, 0, whole, _SMALLEST)
        _substitute(flat, inverse, whole, n, n % _SMALLEST)
        size = _SMALLEST
        while size < n:
            start = n - n % (2 * size)
            if start:
                top, bottom, corner = (
                    _blocks(inverse, size, 2 * size, 0, start, at=at) for at in ((0, 0), (size, size), (size, 0))
                )
                product = bottom @ (_blocks(flat, size, 2 * size, 0, start, at=(size, 0)) @ top)
                np.negative(product, out=corner)
            if n - start > size:
                # What is left at the end holds one block and a smaller one.
                left, right = slice(start, start + size), slice(start + size, None)
                inverse[:, right, left] = -(inverse[:, right, right] @ (flat[:, right, left] @ inverse[:, left, left]))
            size *= 2
    return inverse.reshape(lower.shape)


def gram_of_lower(lower: Array) -> Array:
    """lowerᵀ lower of lower triangular matrices, on NumPy where they are large without the products with zeros."""
    n = lower.shape[-1]
    if not is_numpy(lower) or n < 2 * BLAS_THREADS_FROM:
        return lower.mT @ lower
    h = n // 2
    left, right = lower[..., h:, :h], lower[..., h:, h:]
    product = np.empty_like(lower)
    product[..., :h, :h] = gram_of_lower(lower[..., :h, :h])
    product[..., :h, :h] += left.mT @ left
    corner = np.matmul(right.mT, left, out=product[..., h:, :h])
    product[..., :h, h:] = corner.mT
    product[..., h:, h:] = gram_of_lower(right)
    return product


# Below this size a matrix product is all overhead: rows of all blocks are worked on at once.
_SMALLEST = 4


def _substitute(lower: np.ndarray[Any, Any], inverse: np.ndarray[Any, Any], start: int, stop: int, size: int) -> None:
    """Invert the diagonal blocks of `size` between two rows by forward substitution, with blocks on the last axes."""
    if start == stop:
        return
    rows, result = (_blocks(a, size, size, start, stop).transpose(2, 3, 0, 1) for a in (lower, inverse))
    rows = rows.copy()
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


def _blocks(
    a: np.ndarray[Any, Any], size: int, tile: int, start: int, stop: int, *, at: tuple[int, int] = (0, 0)
) -> np.ndarray[Any, Any]:
    """A view (members, tiles, size, size) of one block in each diagonal tile between two rows of a contiguous array.

    Made by hand: `as_strided` takes as long as a product of small blocks.
    """
    member, down, right = a.strides
    return np.ndarray(
        (a.shape[0], (stop - start) // tile, size, size),
        a.dtype,
        a,
        (start + at[0]) * down + (start + at[1]) * right,
        (member, tile * (down + right), down, right),
    )
