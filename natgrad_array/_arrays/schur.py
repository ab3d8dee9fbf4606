"""Inverses of stacks of small matrices by matrix products, where LAPACK's calls take longer than those.

On a CPU all libraries hand LAPACK one member after another, at a tenth of the rate of a product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from natgrad_array._arrays.control import compiled
from natgrad_array._arrays.factorisations import cholesky, inverse_lower_in_place
from natgrad_array._arrays.libraries import Array, is_jax, is_numpy, is_torch, namespace

FEWEST = 16
"""Of so many members on, blocks are faster than LAPACK's calls on JAX."""

_FEWEST_ROWS = 2**9
"""Of so many rows of all members on, they are so on torch, where every operation takes some microseconds."""

_MANY_ROWS = 2**13
"""Of so many on, torch takes less for a few operations on all of them than for a call of LAPACK for each."""

_LARGEST = {"jax": 128, "torch": 256}
"""Larger positive definite matrices are better off with LAPACK's own blocks."""

_LARGEST_GENERAL = {"jax": 16, "torch": 8}
"""Up to here the products that make up for missing pivots pay."""


def inverts_by_blocks(a: Array, *, positive: bool = False) -> bool:
    """Whether `inverse_by_blocks` or `inverse_lower_by_blocks` is the faster way."""
    n, members = int(a.shape[-1]), math.prod(a.shape[:-2])
    if is_numpy(a):
        return positive and a.size > 0
    if is_torch(a) and a.device.type == "cpu":
        fewest, largest = (_FEWEST_ROWS, _LARGEST) if positive else (_MANY_ROWS, _LARGEST_GENERAL)
        # What works in place has no derivative.
        return 1 <= n <= largest["torch"] and members * n >= fewest and not a.requires_grad
    if not is_jax(a) or sys.modules["jax"].default_backend() != "cpu":
        return False
    return members >= FEWEST and 1 <= n <= (_LARGEST if positive else _LARGEST_GENERAL)["jax"]


def _leaf(a: Array) -> int:
    """What matrices are cut to.

    JAX goes through those row by row, with the members of the stack on the last axis. So does torch
    with many of half this size at most, and it leaves the others to LAPACK, as NumPy does.
    """
    return 8 if is_jax(a) else 16 if is_torch(a) else 32


def inverse_by_blocks(a: Array) -> Array:
    """Inverses by Schur complements, without pivots and so without a promise.

    With A = (P, Q; T P, R) and S = R − T Q the inverse is (P⁻¹ + P⁻¹Q S⁻¹T, −P⁻¹Q S⁻¹; −S⁻¹T, S⁻¹).
    """
    return _with_members_in_a_row(_inverse, a)


def inverse_lower_by_blocks(a: Array) -> Array:
    """L⁻¹ for the Cholesky factors of positive definite A = L Lᵀ; NaN in members that have none.

    With A = (P, Qᵀ; Q, R), P = M Mᵀ, T = Q M⁻ᵀ and R − T Tᵀ = N Nᵀ it is (M⁻¹, 0; −N⁻¹ T M⁻¹, N⁻¹).
    """
    return _with_members_in_a_row(_inverse_lower, a)


def _with_members_in_a_row(function: Callable[[Array], Array], a: Array) -> Array:
    found: Array = compiled(_in_a_row, function, a, a)
    return found


def _in_a_row(function: Callable[[Array], Array], a: Array) -> Array:
    return function(a.reshape(-1, *a.shape[-2:])).reshape(a.shape)


def _half(a: Array) -> int:
    """Where to cut: leaves are whole but for the last."""
    return int(_leaf(a) * 2 ** math.ceil(math.log2(a.shape[-1] / _leaf(a)) - 1))


def _inverse(a: Array) -> Array:
    if not is_jax(a):
        return _eliminate_all_in_place(a)
    if a.shape[-1] <= _leaf(a):
        return _members_first(_eliminate(_members_last(a)))
    h, jnp = _half(a), sys.modules["jax"].numpy
    first, q = _inverse(a[:, :h, :h]), a[:, :h, h:]
    t = a[:, h:, :h] @ first
    last = _inverse(a[:, h:, h:] - t @ q)
    beside, corner = first @ q, last @ t
    top = jnp.concatenate([first + beside @ corner, -(beside @ last)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([-corner, last], axis=-1)], axis=-2)


def _inverse_lower(a: Array) -> Array:
    n, leaf = int(a.shape[-1]), _leaf(a)
    if is_jax(a):
        if n <= leaf:
            return _members_first(_eliminate_below(_members_last(a)))
    elif is_torch(a) and 2 * n <= leaf and a.shape[0] * n >= _MANY_ROWS:
        return _eliminate_in_place(a)
    elif 2 * n <= 3 * leaf:  # a rest of half a leaf is not worth calls of its own
        return _inverse_of_factor(a)
    h = _half(a)
    first = _inverse_lower(a[:, :h, :h])
    t = a[:, h:, :h] @ first.mT
    last = _inverse_lower(a[:, h:, h:] - t @ t.mT)
    below = -(last @ (t @ first))
    if is_jax(a):
        jnp = sys.modules["jax"].numpy
        top = jnp.concatenate([first, jnp.zeros_like(below.mT)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([below, last], axis=-1)], axis=-2)
    found = namespace(a).zeros(tuple(a.shape), dtype=a.dtype)
    found[:, :h, :h], found[:, h:, :h], found[:, h:, h:] = first, below, last
    return found


def _members_last(a: Array) -> Array:
    return sys.modules["jax"].numpy.transpose(a, (1, 2, 0))


def _members_first(a: Array) -> Array:
    return sys.modules["jax"].numpy.transpose(a, (2, 0, 1))


def _eliminate(a: Array) -> Array:
    """Gauss and Jordan's inverse of (n, n, members): a loop, whose round is compiled once for all rows."""
    jax, n = sys.modules["jax"], a.shape[0]
    jnp, index = jax.numpy, jax.numpy.arange(n)[:, None]

    def round_of(k: Array, a: Array) -> Array:
        here = index == k
        pivot = 1.0 / a[k, k]
        row = jnp.where(here, pivot, a[k] * pivot)
        column = jnp.where(here, -1.0, a[:, k])
        rest = jnp.where(here[:, None] | here[None, :], 0.0, a)
        return rest - column[:, None] * row[None, :]

    return jax.lax.fori_loop(0, n, round_of, a)


def _eliminate_below(a: Array) -> Array:
    """L⁻¹ of (n, n, members), by rows: what takes A to a triangle takes its place below the diagonal."""
    jax, n = sys.modules["jax"], a.shape[0]
    jnp, index = jax.numpy, jax.numpy.arange(n)[:, None]

    def round_of(k: Array, a: Array) -> Array:
        share = jnp.where(index > k, a[:, k] / a[k, k], 0.0)
        row = jnp.where(index == k, 1.0, a[k])
        rest = jnp.where((index > k)[:, None] & (index == k)[None, :], 0.0, a)
        return rest - share[:, None] * row[None, :]

    found = jax.lax.fori_loop(0, n, round_of, a)
    pivots = jnp.diagonal(found, axis1=0, axis2=1).T
    unit = jnp.where((index > index.T)[..., None], found, jnp.eye(n, dtype=a.dtype)[..., None])
    return unit / jnp.sqrt(pivots)[:, None]


def _inverse_of_factor(a: Array) -> Array:
    """L⁻¹ by LAPACK's factorisation, and on torch by its substitution."""
    if is_numpy(a):
        return inverse_lower_in_place(cholesky(namespace(a), a))
    torch = sys.modules["torch"]
    factor, failed = torch.linalg.cholesky_ex(a)
    found = torch.linalg.solve_triangular(factor, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), upper=False)
    return found.masked_fill_((failed != 0)[:, None, None], math.nan) if bool(failed.any()) else found


def _eliminate_all_in_place(a: Array) -> Array:
    """`_eliminate` on torch, of (members, n, n)."""
    torch = sys.modules["torch"]
    a = a.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    for k in range(a.shape[0]):
        pivot, column = a[k, k].reciprocal(), a[:, k].clone()
        row = a[k] * pivot
        row[k], column[k] = pivot, -1.0
        a[:, k] = a[k] = 0.0
        a.addcmul_(column[:, None], row, value=-1)
    return a.permute(2, 0, 1).contiguous()


def _eliminate_in_place(a: Array) -> Array:
    """`_eliminate_below` on torch, of (members, n, n)."""
    torch = sys.modules["torch"]
    a = a.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    for k, row in enumerate(a.unbind(0)[:-1]):
        rest = a[k + 1 :]
        column = rest[:, k]
        share = column / row[k]
        rest.addcmul_(share[:, None], row, value=-1)
        torch.neg(share, out=column)
        row[k + 1 :].zero_()
    diagonal = a.diagonal(dim1=0, dim2=1)
    scale = diagonal.rsqrt()
    a *= scale.mT[:, None]
    diagonal.copy_(scale)
    return a.permute(2, 0, 1).contiguous()
