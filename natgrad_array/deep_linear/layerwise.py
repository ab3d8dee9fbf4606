"""The layerwise rule (Eq 42) for an ensemble, each member by the fastest way that is exact for it.

A ladder of three: one inverse of the end-to-end matrix of a square network; the smaller
Gram matrices of its factors, applied and never multiplied out, for any other; the dual
factors themselves, by their singular values where a rank is in doubt. A condition number
says which members a rung has right, and the others go to the next.
"""

from __future__ import annotations

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear.duals import Chain, chains, duals, full_roots
from natgrad_array.deep_linear.products import products, widths
from natgrad_array.deep_linear.task import TaskFactors

Directions = tuple[Array, ...]


def layerwise(xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float) -> Directions:
    """`scale` times E_i^{+T} R⁻¹(W − W*)S X_i⁺ for every layer."""
    if len(layers) == 1:
        return _by_duals(xp, layers, factors, scale)
    square = len({*widths(layers), int(factors.input_root.shape[-1])}) == 1
    fast = (_by_one_inverse if square else _by_gram_matrices)(xp, layers, factors, scale)
    if fast is None:
        return _by_duals(xp, layers, factors, scale)
    found, certified = fast
    batch = _arrays.broadcast_batch({str(i): tuple(d.shape[:-2]) for i, d in enumerate(found)})
    flags = xp.broadcast_to(~certified, batch)
    matrices = [name for name in factors._fields if name != "minimum_loss"]

    def slow(*arrays: Array) -> Directions:
        some, rest = arrays[: len(layers)], arrays[len(layers) :]
        return _by_duals(xp, some, factors._replace(**dict(zip(matrices, rest, strict=True))), scale)

    return _arrays.repair(xp, flags, found, (*layers, *(getattr(factors, name) for name in matrices)), slow)


def _trusted(xp: Namespace, error: Array) -> Array:
    """Which members a rung may keep whose relative error is at most about `error`.

    It grows with a squared condition number, where the next rung's grows with the number
    itself. The limit is 6e-10 in float64 and 4e-4 in float32; most errors are far below.
    """
    return error < 16 * _arrays.eps(xp, error) ** (2 / 3)


# ---------------------------------------------------------------------------- square networks


def _by_one_inverse(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float
) -> tuple[Directions, Array] | None:
    """(W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ = (W_i ⋯ W_1) P⁻¹ (W − W*) P⁻¹ (W_L ⋯ W_i), with P = W.

    One inverse and 3L + 1 products, 2n³ flops each, in place of 2(L − 1) solves. None if
    most members need another way.
    """
    ahead = [layers[-1]]
    for layer in layers[-2::-1]:
        ahead.append(ahead[-1] @ layer)
    product = ahead.pop()
    inverse, condition = linalg.inverse(xp, product)
    certified = _trusted(xp, condition**2 * _arrays.eps(xp, product)) & full_roots(xp, factors)
    if _arrays.eager_most(xp, certified) is False:
        return None
    gap = product - factors.optimum
    gap *= scale
    half = inverse @ gap
    found = [layers[0] @ half]
    moved = layers[0] @ (half @ inverse)
    for layer, rest in zip(layers[1:], reversed(ahead), strict=True):
        moved = layer @ moved
        found.append(moved @ rest)
    return tuple(found), certified


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
            certified = certified & _trusted(xp, piece.condition * _arrays.eps(xp, piece.core))
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


def _by_duals(xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float) -> Directions:
    """Multiply by explicit dual factors: 6L − 3 products, and what the duals are made of."""
    found = products(layers, factors)
    error = -scale * found.error
    pairs, _ = duals(xp, layers, factors, found)
    return tuple(e @ error @ x.mT for e, x in pairs)
