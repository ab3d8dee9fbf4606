"""The layerwise rule (Eq 42) for an ensemble, each member by the fastest way that is exact for it.

A ladder: for square networks one inverse of the end-to-end matrix, one of each two layers
or one of each; for any other the smaller Gram matrices of its factors, applied and never
multiplied out; then the dual factors themselves, by their singular values where a rank is
in doubt. A condition number says which members a rung has right, and the others go to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear import square, waist
from natgrad_array.deep_linear.duals import Chain, chains, duals, full_roots, trusted
from natgrad_array.deep_linear.products import half_square, products
from natgrad_array.deep_linear.task import TaskFactors

Directions = tuple[Array, ...]
"""One array a layer; the excess loss, (*batch, 1, 1), after them where it is asked for."""
Rung = Callable[[Namespace, tuple[Array, ...], TaskFactors, float, bool], tuple[Directions, Array]]


def layerwise(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, *, with_excess: bool = False
) -> Directions:
    """`scale` times E_i^{+T} R⁻¹(W − W*)S X_i⁺ for every layer, and the excess loss after them if asked."""
    if len(layers) == 1:
        return _by_duals(xp, layers, factors, scale, with_excess)[0]
    if not square.is_square(layers, factors):
        first: Rung = waist.by_ends if waist.is_waisted(layers, factors) else _by_gram_matrices
        rungs: list[Rung] = [first, _by_duals]
        calls = _square_factors(layers, factors)
        # Calls of LAPACK within one compiled function could meet.
        whole = _goes_by_blocks(layers) and not (calls and _arrays.calls_may_meet(layers[0], calls))
        ways = _compiled(rungs, layers[0], calls=calls) if whole else rungs
        return _in_pieces(xp, layers, factors, scale, with_excess, ways)
    rest: list[Rung] = [square.by_layer_inverses, _by_duals]
    if square.is_small(layers):
        return _descend(xp, layers, factors, scale, with_excess, _compiled([square.by_one_inverse, *rest], layers[0]))
    # With the excess it is a simulation, whose networks are soon as well conditioned as the target.
    tries = with_excess or _arrays.branches_freely(layers[0])

    def without_one() -> Directions:
        first: list[Rung] = []
        by_blocks = _arrays.inverts_by_blocks(layers[0])
        # On JAX members whose pairs are not certified, many in float32, cost more than the others save.
        tries_pairs = not _arrays.is_jax(layers[0]) or _arrays.item_bytes(xp, layers[0]) == 8
        if tries_pairs and not _arrays.is_lazy(layers[0]) and bool(square.pair_inverses_serve(layers)):
            first = [square.by_pair_inverses]
        elif by_blocks:
            first = [square.by_layer_inverses_without_pivots]
        return _in_pieces(xp, layers, factors, scale, with_excess, _compiled(first + rest, layers[0]))

    found: Directions = _arrays.branch(
        square.one_inverse_serves(layers) if tries else False,
        lambda: _in_pieces(
            xp, layers, factors, scale, with_excess, _compiled([square.by_one_inverse, *rest], layers[0])
        ),
        without_one,
    )
    return found


def _compiled(rungs: list[Rung], like: Array, *, calls: int = 1) -> list[Rung]:
    """The same; for JAX compiled, with so many calls of LAPACK side by side, but for the last, which has more."""
    if not _arrays.is_jax(like):
        return rungs

    def compiled(rung: Rung) -> Rung:
        def as_one(
            xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
        ) -> tuple[Directions, Array]:
            # Singular values of every factor.
            most = 2 * (len(layers) - 1) if rung is _by_duals else calls
            if most > 1 and _arrays.calls_may_meet(layers[0], most):
                return rung(xp, layers, factors, scale, with_excess)
            names, stacks = _as_stacks(layers, factors)
            cores = [*_cores(layers, with_excess), (1, 1)]
            *found, certified = _arrays.in_parts(_take, (rung, names, scale, with_excess), stacks, cores, calls=most)
            return tuple(found), certified[..., 0, 0]

        return as_one

    return [*map(compiled, rungs)]


def _take(how: tuple[Rung, tuple[str, ...], float, bool], *stacks: Array) -> tuple[Array, ...]:
    rung, names, scale, with_excess = how
    on_stacks = _on_stacks(rung, names, scale, with_excess)
    layers, _ = _restored(names, stacks)
    cores = [*_cores(layers, with_excess), (1, 1)]
    return _arrays.in_pieces(on_stacks, stacks, cores) if _pays_in_pieces(layers, cores) else on_stacks(*stacks)


def _in_pieces(
    xp: Namespace,
    layers: tuple[Array, ...],
    factors: TaskFactors,
    scale: float,
    with_excess: bool,
    rungs: list[Rung],
) -> Directions:
    """Descend with pieces of a stack that is large."""
    cores = _cores(layers, with_excess)
    if not _pays_in_pieces(layers, cores):
        return _descend(xp, layers, factors, scale, with_excess, rungs)
    names, stacks = _as_stacks(layers, factors)

    def on_stacks(*stacks: Array) -> Directions:
        return _descend(xp, *_restored(names, stacks), scale, with_excess, rungs)

    return _arrays.in_pieces(on_stacks, stacks, cores)


def _descend(
    xp: Namespace,
    layers: tuple[Array, ...],
    factors: TaskFactors,
    scale: float,
    with_excess: bool,
    rungs: list[Rung],
) -> Directions:
    """Take all members down the first rung, and those without a certificate down the next ones."""
    found, certified = rungs[0](xp, layers, factors, scale, with_excess)
    if len(rungs) == 1 or _arrays.eager_all(xp, certified):
        return found
    names, stacks = _as_stacks(layers, factors)
    batch = _arrays.broadcast_shapes(tuple(d.shape[:-2]) for d in found)

    flags = certified[..., None, None]
    kept = tuple(_with_batch(xp, part, batch) for part in (*found, flags))
    for rung in rungs[1:]:
        slow = _on_stacks(rung, names, scale, with_excess)
        kept = _arrays.repair(xp, ~kept[-1][..., 0, 0], kept, stacks, slow, spent=True)
    return kept[:-1]


def _with_batch(xp: Namespace, part: Array, batch: _arrays.Shape) -> Array:
    """Results with all batch axes; what has them is left as it is, to be written to."""
    shape = (*batch, *part.shape[-2:])
    return part if tuple(part.shape) == shape else xp.broadcast_to(part, shape)


def _pays_in_pieces(layers: tuple[Array, ...], cores: list[_arrays.Shape]) -> bool:
    """Not for what calls LAPACK on JAX, which is slower in the rounds of a loop."""
    if _arrays.is_jax(layers[0]) and not _goes_by_blocks(layers):
        return False
    return _arrays.pays_in_pieces(layers, cores)


def _goes_by_blocks(layers: tuple[Array, ...]) -> bool:
    """Whether JAX needs no call of LAPACK for the inverses of a network that is not square: no layer of it is."""
    return all(w.shape[-2] != w.shape[-1] and _arrays.inverts_by_blocks(w, positive=True) for w in layers)


def _square_factors(layers: tuple[Array, ...], factors: TaskFactors) -> int:
    """How many products, of layers and of layers with S, can be square and of full rank: LAPACK inverts each."""
    n_in, rank = factors.input_root.shape[-2:]
    count = 0
    for first in {n_in, rank}:
        sizes = [first, *(layer.shape[-2] for layer in layers)]
        for i, k in itertools.combinations(range(len(sizes)), 2):
            count += sizes[i] == sizes[k] == min(sizes[i : k + 1])
    return count


def _cores(layers: tuple[Array, ...], with_excess: bool) -> list[_arrays.Shape]:
    """The core shapes of the directions, and of the excess loss."""
    return [*(tuple(layer.shape[-2:]) for layer in layers), *([(1, 1)] if with_excess else [])]


def _on_stacks(rung: Rung, names: tuple[str, ...], scale: float, with_excess: bool) -> Callable[..., tuple[Array, ...]]:
    """A rung as a function of stacks of matrices, with the flags as the last of them."""

    def on_stacks(*stacks: Array) -> tuple[Array, ...]:
        xp = _arrays.namespace(stacks[0])
        found, certified = rung(xp, *_restored(names, stacks), scale, with_excess)
        members = _arrays.broadcast_shapes(tuple(d.shape[:-2]) for d in found)
        return (*found, xp.broadcast_to(certified, members)[..., None, None])

    return on_stacks


def _as_stacks(layers: tuple[Array, ...], factors: TaskFactors) -> tuple[tuple[str, ...], tuple[Array, ...]]:
    """The matrices of a network and its task side by side, with the names of the task's."""
    given = {name: value for name, value in factors._asdict().items() if value is not None and name != "minimum_loss"}
    return tuple(given), (*layers, *given.values())


def _restored(names: tuple[str, ...], stacks: tuple[Array, ...]) -> tuple[tuple[Array, ...], TaskFactors]:
    """What `_as_stacks` put side by side, but for the loss at the optimum, which no rung looks at."""
    depth = len(stacks) - len(names)
    matrices: dict[str, Any] = dict.fromkeys(TaskFactors._fields) | dict(zip(names, stacks[depth:], strict=True))
    return stacks[:depth], TaskFactors(**matrices)


# ----------------------------------------------------------------------------- other networks


def _by_gram_matrices(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> tuple[Directions, Array]:
    """Apply the inverses of the smaller Gram matrices, from the narrow end to the wide one.

    For a factor m × n of rank r = min(m, n): one Gram matrix and two products with it,
    and about 2r³ flops for its inverse. A root that no Gram matrix needs is left out.
    """
    left, right = chains(xp, layers, factors)
    error = _error(left, right, layers, factors)
    excess: Directions = ()
    if with_excess:
        whitened = error if left.needs_root else factors.whiten(error)
        excess = (half_square(xp, whitened if right.needs_root else linalg.matmul(whitened, factors.input_root)),)
    error *= -scale
    apply = _Application(left, right, error)
    depth = len(layers)
    directions = tuple(apply.layer(depth - 1 - i, i) for i in range(depth))
    certified: Array = full_roots(xp, factors)
    for chain in (left, right):
        for k in range(1, depth):
            piece = chain.piece(k)
            certified = certified & trusted(xp, piece.condition)
    return directions + excess, certified


def _error(left: Chain, right: Chain, layers: tuple[Array, ...], factors: TaskFactors) -> Array:
    """A new W* − W, multiplied by R⁻¹ and by S where the chains need their roots."""
    if left.needs_root and right.needs_root:
        target = factors.target
    else:
        target = factors.optimum @ factors.input_root if right.needs_root else factors.optimum
        target = factors.whiten(target) if left.needs_root else target
    cut = min(range(1, len(layers)), key=lambda i: int(layers[i].shape[-1]))
    return target - left.product(len(layers) - cut).mT @ right.product(cut)


class _Application:
    """(Z_k⁺)ᵀ Y X⁺ for factors Z_k of the left and X of the right chain, parts shared by layers done once."""

    def __init__(self, left: Chain, right: Chain, error: Array) -> None:
        self.left, self.right = left, right
        self.known: dict[tuple[int | None, int | None], Array] = {
            (None if left.needs_root else 0, None if right.needs_root else 0): error
        }

    def layer(self, i: int, j: int) -> Array:
        """Products that make the error smaller come first, those that make it larger last."""
        tall_left, tall_right = self.left.is_tall(i), self.right.is_tall(j)
        y = self.reduced(self.left.start(i) if tall_left else i, self.right.start(j) if tall_right else j)
        if tall_right:
            y = y @ self.right.piece(j).core
        if tall_left:
            y = self.left.piece(i).times(y)
        return y @ self.right.piece(j).x.mT if tall_right else y

    def reduced(self, i: int | None, j: int | None) -> Array:
        """The error multiplied by those parts of both duals that have full row rank."""
        if (i, j) not in self.known:
            # One that the error has not yet been multiplied by, the one that leaves less of it if both are.
            from_left = i is not None and (i > 0 or self.left.needs_root)
            if i is not None and j is not None and (j > 0 or self.right.needs_root):
                from_left = from_left and self.left.widths[i] > self.right.widths[j]
            self.known[i, j] = self._from_left(i, j) if from_left else self._from_right(i, j)
        return self.known[i, j]

    def _from_left(self, i: int | None, j: int | None) -> Array:
        assert i is not None
        if i == 0:
            return self.left.root_dual @ self.reduced(None, j)
        return self.left.piece(i).times(self.reduced(self.left.start(i), j))

    def _from_right(self, i: int | None, j: int | None) -> Array:
        assert j is not None
        if j == 0:
            return linalg.matmul(self.reduced(i, None), self.right.root_dual.mT)
        return self.right.piece(j).times_from_right(self.reduced(i, self.right.start(j)))


# -------------------------------------------------------------------------- the general case


def _by_duals(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> tuple[Directions, Array]:
    """Multiply by explicit dual factors: 6L − 3 products, and what the duals are made of. All are right."""
    found = products(layers, factors)
    error = -scale * found.error
    pairs, _ = duals(xp, layers, factors, found)
    directions = tuple(e @ error @ x.mT for e, x in pairs)
    if with_excess:
        directions = (*directions, half_square(xp, found.error))
    return directions, xp.ones((), dtype=xp.bool, device=_arrays.device(error))
