"""Which layers can realise which part of the error: the shares of the exact layerwise rule.

A layer realises Q_i Y R_i, with Q_i the projector on the range of its ahead factor and R_i
that on the row space of its behind factor. Ranges grow and row spaces shrink with the
layer, so every piece ΔQ_a Y ΔR_b belongs to the layers from a to b, in equal parts.
"""

from __future__ import annotations

from typing import NamedTuple

from natgrad_array import linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.duals import Pair
from natgrad_array.deep_linear.products import Products


class Subspaces(NamedTuple):
    """Orthonormal bases adapted to the nested ranges of all layers.

    Left direction p lies in the range of ahead products (Q_i) of `left_count` layers, the
    last ones; right direction q in the row space of behind products (R_i) of
    `right_count` layers, the first ones. The layers that have both can realise p qᵀ.
    """

    left: Array
    """U, (*batch, n_L, n_L)."""
    left_count: Array
    """(*batch, n_L, 1)."""
    right: Array
    """V, (*batch, ρ, ρ)."""
    right_count: Array
    """(*batch, 1, ρ)."""


def projectors(pairs: list[Pair], products: Products) -> list[Pair]:
    """Q_i and R_i of every layer, from its duals."""
    return [
        (linalg.symmetric_part(a.mT @ e), linalg.symmetric_part(b.mT @ x))
        for (e, x), a, b in zip(pairs, products.ahead, products.behind, strict=True)
    ]


def common_bases(xp: Namespace, pairs: list[Pair]) -> Subspaces:
    """Bases that split all nested ranges at once, from the projectors on them.

    Nested projectors commute, and the eigenvalue of their sum at a direction is the number
    of layers that reach it: an integer, so the bases are well determined.
    """
    (left, right), *others = pairs
    for q, r in others:
        left, right = left + q, right + r
    left_count, u = linalg.eigh(xp, left)
    right_count, v = linalg.eigh(xp, right)
    return Subspaces(u, xp.round(left_count)[..., :, None], v, xp.round(right_count)[..., None, :])


def shares(xp: Namespace, whitened: list[Array], spaces: Subspaces) -> list[Array]:
    """Each layer's share of the error that it sees, at any ranks."""
    depth = len(whitened)
    realised_by = spaces.left_count + spaces.right_count - depth
    part = 1.0 / xp.where(realised_by > 0.5, realised_by, 1.0)
    found = []
    for i, y in enumerate(whitened):
        takes_part = (spaces.left_count > depth - i - 0.5) & (spaces.right_count > i + 0.5)
        rotated = spaces.left.mT @ y @ spaces.right
        found.append(spaces.left @ xp.where(takes_part, part * rotated, 0.0) @ spaces.right.mT)
    return found


def shares_of_full_rank(whitened: list[Array], pairs: list[Pair], products: Products, widths: Shape) -> list[Array]:
    """`shares` where all factors have the full rank of their shapes: no eigenproblem, a few thin products.

    `widths` are (ρ, n_1, ..., n_L). A projector changes only where the rank does.
    """
    depth = len(whitened)
    left_rank = [0] + [min(widths[i + 1 :]) for i in range(depth)]
    right_rank = [min(widths[: i + 1]) for i in range(depth)] + [0]
    starts = [a for a in range(depth) if left_rank[a + 1] > left_rank[a]]
    ends = [b for b in range(depth) if right_rank[b] > right_rank[b + 1]]

    def on_left(a: int, y: Array) -> Array:
        return y if left_rank[a + 1] == widths[-1] else products.ahead[a].mT @ (pairs[a][0] @ y)

    def on_right(b: int, y: Array) -> Array:
        return y if right_rank[b] == widths[0] else (y @ pairs[b][1].mT) @ products.behind[b]

    found: list[Array] = []
    pieces: dict[int, Array] = {}
    for i, y in enumerate(whitened):
        if i == 0 or y is not whitened[i - 1]:
            reached = [on_right(b, y) for b in ends]
            pieces = {
                b: here if after is None else here - after
                for b, here, after in zip(ends, reached, [*reached[1:], None], strict=True)
            }
        total: Array = None
        inner = [a for a in starts if a <= i]
        for a, after in zip(inner, [*inner[1:], None], strict=True):
            # Σ ΔQ_a M_a = Σ Q_a (M_a − M of the next start), so each projector is applied once.
            mixed: Array = None
            for b in ends:
                if b >= i:
                    weight = 1.0 / (b - a + 1) - (0.0 if after is None else 1.0 / (b - after + 1))
                    term = weight * pieces[b]
                    mixed = term if mixed is None else mixed + term
            term = on_left(a, mixed)
            total = term if total is None else total + term
        found.append(total)
    return found
