"""The layerwise rule (Eq 42) for an ensemble, each member by the fastest way that is exact for it.

A ladder: for square networks one inverse of the end-to-end matrix, or one of each layer;
for any other the smaller Gram matrices of its factors, applied and never multiplied out;
then the dual factors themselves, by their singular values where a rank is in doubt. A
condition number says which members a rung has right, and the others go to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear import square
from natgrad_array.deep_linear.duals import Chain, chains, duals, trusted
from natgrad_array.deep_linear.products import products
from natgrad_array.deep_linear.task import TaskFactors

Directions = tuple[Array, ...]
Rung = Callable[[Namespace, tuple[Array, ...], TaskFactors, float], tuple[Directions, Array]]

_MATRICES = tuple(name for name in TaskFactors._fields if name != "minimum_loss")


def layerwise(xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float) -> Directions:
    """`scale` times E_i^{+T} R⁻¹(W − W*)S X_i⁺ for every layer."""
    depth = len(layers)
    if depth == 1:
        return _by_duals(xp, layers, factors, scale)[0]
    stacks = (*layers, *(getattr(factors, name) for name in _MATRICES))

    def on_stacks(rung: Rung) -> Callable[..., tuple[Array, ...]]:
        """A rung as a function of stacks of matrices, with the flags as the last of them."""

        def run(*arrays: Array) -> tuple[Array, ...]:
            matrices: dict[str, Any] = dict(zip(_MATRICES, arrays[depth:], strict=True))
            found, certified = rung(xp, arrays[:depth], factors._replace(**matrices), scale)
            batch = _arrays.broadcast_batch({str(i): tuple(d.shape[:-2]) for i, d in enumerate(found)})
            if tuple(certified.shape) != batch:
                certified = xp.broadcast_to(certified, batch)
            return (*found, certified[..., None, None])

        return run

    is_square = square.is_square(layers, factors)
    fast = [square.by_one_inverse, square.by_layer_inverses] if is_square else [_by_gram_matrices]
    rungs = [on_stacks(rung) for rung in (*fast, _by_duals)]
    cores = [tuple(layer.shape[-2:]) for layer in layers]

    def down_from(first: int) -> Directions:
        return _arrays.in_pieces(lambda *arrays: _descend(xp, arrays, rungs[first:]), stacks, cores)

    if not is_square:
        return down_from(0)
    found: Directions = _arrays.branch(
        square.one_inverse_serves(xp, layers), lambda: down_from(0), lambda: down_from(1)
    )
    return found


def _descend(xp: Namespace, stacks: tuple[Array, ...], rungs: list[Callable[..., tuple[Array, ...]]]) -> Directions:
    """Take all members down the first rung, and those without a certificate down the next ones."""
    found = rungs[0](*stacks)
    for rung in rungs[1:]:
        found = _arrays.repair(xp, ~found[-1][..., 0, 0], found, stacks, rung)
    return found[:-1]


# ----------------------------------------------------------------------------- other networks


def _by_gram_matrices(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float
) -> tuple[Directions, Array]:
    """Apply the inverses of the smaller Gram matrices, from the narrow end to the wide one.

    For a factor m × n of rank r = min(m, n): one Gram matrix and two products with it,
    and about 2r³ flops for its inverse.
    """
    found = products(layers, factors)
    left, right, full = chains(xp, layers, factors, found)
    apply = _Application(left, right, -scale * found.error)
    depth = len(layers)
    directions = tuple(apply.layer(depth - 1 - i, i) for i in range(depth))
    certified: Array = full
    for chain in (left, right):
        for k in range(1, depth):
            piece = chain.piece(k)
            certified = certified & trusted(xp, piece.condition * _arrays.eps(xp, piece.core))
    return directions, certified


class _Application:
    """(Z_k⁺)ᵀ Y X⁺ for factors Z_k of the left and X of the right chain, parts shared by layers done once."""

    def __init__(self, left: Chain, right: Chain, error: Array) -> None:
        self.left, self.right = left, right
        self.known: dict[tuple[int | None, int | None], Array] = {(None, None): error}

    def layer(self, i: int, j: int) -> Array:
        """Products that make the error smaller come first, those that make it larger last."""
        y = self.reduced(_narrow(self.left, i), _narrow(self.right, j))
        grow_left = self.left.piece(i) if i and self.left.is_tall(i) else None
        grow_right = self.right.piece(j) if j and self.right.is_tall(j) else None
        if grow_right is not None:
            y = y @ grow_right.core
        if grow_left is not None:
            y = grow_left.times(y)
        return y if grow_right is None else y @ grow_right.x.mT

    def reduced(self, i: int | None, j: int | None) -> Array:
        """The error multiplied by those parts of both duals that have full row rank."""
        if (i, j) not in self.known:
            from_left = j is None or (i is not None and self.left.widths[i] > self.right.widths[j])
            self.known[i, j] = self._from_left(i, j) if from_left else self._from_right(i, j)
        return self.known[i, j]

    def _from_left(self, i: int | None, j: int | None) -> Array:
        assert i is not None
        if i == 0:
            return self.left.root_dual @ self.reduced(None, j)
        start = self.left.routes[i].start if self.left.routes[i].kind == "layer" else None
        return self.left.piece(i).times(self.reduced(start, j))

    def _from_right(self, i: int | None, j: int | None) -> Array:
        assert j is not None
        if j == 0:
            return linalg.matmul(self.reduced(i, None), self.right.root_dual.mT)
        start = self.right.routes[j].start if self.right.routes[j].kind == "layer" else None
        return self.right.piece(j).times_from_right(self.reduced(i, start))


def _narrow(chain: Chain, k: int) -> int | None:
    """The last factor of full row rank on the route to Z_k, if the dual of Z_k uses one."""
    if k == 0 or not chain.is_tall(k):
        return k
    return chain.routes[k].start if chain.routes[k].kind == "split" else None


# -------------------------------------------------------------------------- the general case


def _by_duals(xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float) -> tuple[Directions, Array]:
    """Multiply by explicit dual factors: 6L − 3 products, and what the duals are made of. All are right."""
    found = products(layers, factors)
    error = -scale * found.error
    pairs, _ = duals(xp, layers, factors, found)
    directions = tuple(e @ error @ x.mT for e, x in pairs)
    return directions, xp.ones((), dtype=xp.bool, device=_arrays.device(error))
