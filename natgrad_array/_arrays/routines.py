"""Products, sums and norms by the fastest routine of each library; the table of what lies outside the standard."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from natgrad_array._arrays.checks import broadcast_shapes
from natgrad_array._arrays.control import branch
from natgrad_array._arrays.libraries import (
    Array,
    Namespace,
    Shape,
    device,
    eye,
    is_cupy,
    is_jax,
    is_numpy,
    is_torch,
)
from natgrad_array._arrays.pieces import PIECE_BYTES


def gram(xp: Namespace, x: Array, divisor: Any = 1, *, less: Array | None = None) -> Array:
    """A new (xᵀx − lessᵀ less) / divisor, exactly symmetric; `less` is a row.

    NumPy knows the product of a matrix with its own transpose, computes half of it and
    mirrors that, so that no mean of both halves is needed.
    """
    if is_torch(x) and x.ndim == 3 and isinstance(divisor, int | float):
        half = scaled_product(x.mT, x, 0.5 / divisor)
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


def scaled_product(a: Array, b: Array, scale: float) -> Array:
    """A new scale a b, which torch scales as it is made, without a pass over memory."""
    if is_torch(a) and a.ndim == 3 and a.shape[:-2] == b.shape[:-2]:
        blank = a.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2])
        return sys.modules["torch"].baddbmm(blank, a, b, beta=0, alpha=scale)
    product = a @ b
    product *= scale
    return product


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
    """V diag(values) Vᵀ; on a CPU without the first columns whose value is 0 in every member.

    These are half of all in a stack of rank n/2, whose eigenvalues come in ascending order. JAX,
    which compiles for a number of them, leaves out that half or none. To look for them takes
    longer than the products of matrices below 16 × 16.
    """

    def of_columns_from(first: int) -> Array:
        kept = vectors[..., first:]
        return (kept * values[..., None, first:]) @ xp.matrix_transpose(kept)

    n = values.shape[-1]
    if values.ndim == 1 or n < 16 or not _is_on_host(values):
        return of_columns_from(0)
    if is_jax(values):
        return branch(xp.any(values[..., : n // 2] != 0.0), lambda: of_columns_from(0), lambda: of_columns_from(n // 2))
    needed = xp.any(xp.reshape(values, (math.prod(values.shape[:-1]), n)) != 0.0, axis=0)
    return of_columns_from(int(xp.argmax(xp.astype(needed, xp.uint8))))


def _is_on_host(array: Array) -> bool:
    """Whether it is NumPy's, torch's or JAX's, and on a CPU."""
    if is_jax(array):
        return bool(sys.modules["jax"].default_backend() == "cpu")
    return is_numpy(array) or (is_torch(array) and array.device.type == "cpu")


def calls_outweigh_work(a: Array) -> bool:
    """Whether a stack is so small that its calls take longer than what they do: on torch."""
    return is_torch(a) and a.device.type == "cpu" and math.prod(a.shape) * a.element_size() <= PIECE_BYTES


def merges_products(a: Array, b: Array) -> bool:
    """Whether one large product is faster than a stack of small ones.

    BLAS starts threads of its own for it, which stay busy for a while: not for little work on
    NumPy, as in a piece, nor where rows would have to be copied before they are one matrix.
    """
    return not is_numpy(a) or (a.flags.c_contiguous and a.size * b.shape[-1] >= 2**24)


def norms(xp: Namespace, a: Array) -> Array:
    """Frobenius norm of each member of a stack of matrices."""
    if is_numpy(a):
        flat = a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])
        return np.sqrt(np.vecdot(flat, flat))
    if is_torch(a):
        return sys.modules["torch"].linalg.vector_norm(a, dim=(-2, -1))
    flat = xp.reshape(a, (*a.shape[:-2], a.shape[-2] * a.shape[-1]))
    return xp.sqrt(xp.linalg.vecdot(flat, flat))


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
