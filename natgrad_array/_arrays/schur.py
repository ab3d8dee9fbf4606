"""Inverses of stacks of small matrices by matrix products, where LAPACK's calls take longer than those.

In JAX on a CPU LAPACK works on one member after another, at a tenth of the rate of a product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from natgrad_array._arrays.control import compiled
from natgrad_array._arrays.libraries import Array, is_jax

FEWEST = 16
"""Of so many members on, blocks are faster than LAPACK's calls."""

_LEAF = 8
"""Up to this size matrices are worked on row by row, with the members of the stack on the last axis."""


def inverts_by_blocks(a: Array, *, positive: bool = False) -> bool:
    """Whether `inverse_by_blocks` or `inverse_lower_by_blocks` is the faster way.

    Large matrices lose by them what LAPACK's own blocks are better at, general ones soon the
    steps that make up for missing pivots.
    """
    if not is_jax(a) or sys.modules["jax"].default_backend() != "cpu":
        return False
    n, members = int(a.shape[-1]), math.prod(a.shape[:-2])
    return members >= FEWEST and 1 <= n <= (128 if positive else 16)


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


def _half(n: int) -> int:
    """Where to cut: leaves are whole but for the last."""
    return int(_LEAF * 2 ** math.ceil(math.log2(n / _LEAF) - 1))


def _inverse(a: Array) -> Array:
    n, jnp = int(a.shape[-1]), sys.modules["jax"].numpy
    if n <= _LEAF:
        return _members_first(_eliminate(_members_last(a)))
    h = _half(n)
    first, q = _inverse(a[:, :h, :h]), a[:, :h, h:]
    t = a[:, h:, :h] @ first
    last = _inverse(a[:, h:, h:] - t @ q)
    beside, corner = first @ q, last @ t
    top = jnp.concatenate([first + beside @ corner, -(beside @ last)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([-corner, last], axis=-1)], axis=-2)


def _inverse_lower(a: Array) -> Array:
    n, jnp = int(a.shape[-1]), sys.modules["jax"].numpy
    if n <= _LEAF:
        return _members_first(_eliminate_below(_members_last(a)))
    h = _half(n)
    first = _inverse_lower(a[:, :h, :h])
    t = a[:, h:, :h] @ first.mT
    last = _inverse_lower(a[:, h:, h:] - t @ t.mT)
    corner = last @ (t @ first)
    top = jnp.concatenate([first, jnp.zeros_like(corner.mT)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([-corner, last], axis=-1)], axis=-2)


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
