"""The layerwise rule for networks of square layers, where every factor is undone by an inverse.

With W_i^a and W_i^b invertible, Eq 42 is d_i = (W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ / L whatever the
moments are (Eq 34). There are three fast ways to it, by one inverse of W, by one of each
two layers or by one of each layer, and conditions say which members have them right; the
rest take singular values.
"""

from __future__ import annotations

import math

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.duals import full_roots, layer_rounding, trusted
from natgrad_array.deep_linear.products import half_square
from natgrad_array.deep_linear.task import TaskFactors

Found = tuple[tuple[Array, ...], Array]
"""The directions (and the excess loss where it is asked for), and which members have them right."""

PROBED = 16
"""Members looked at before a way is chosen for a stack, and at most one in four times as many."""


def is_square(layers: tuple[Array, ...], factors: TaskFactors) -> bool:
    """Whether all layers and the root of the input moment have one size."""
    sizes = {size for layer in layers for size in layer.shape[-2:]}
    return len(sizes | {factors.input_root.shape[-1]}) == 1


def is_small(layers: tuple[Array, ...]) -> bool:
    """Whether there is too little work for a probe, or for threads, to save any."""
    largest = max(math.prod(layer.shape) for layer in layers)
    return largest * layers[0].shape[-1] < 2**18 and not _arrays.is_lazy(layers[0])


def one_inverse_serves(layers: tuple[Array, ...]) -> Array:
    """Whether so many members can have their direction by one inverse that it is worth a try.

    A scalar, from a few of them. An attempt for all costs about half of the next way for all.
    """
    serves: Array = _arrays.compiled(_one_serves, None, layers[0], layers)
    return serves


def _one_serves(_: None, layers: tuple[Array, ...]) -> Array:
    xp, product = _arrays.namespace(layers[0]), None
    for few in _probe(layers):
        product = few if product is None else few @ product
    return _are_most(xp, _one_inverse(xp, product)[1])


def pair_inverses_serve(layers: tuple[Array, ...]) -> Array | bool:
    """Whether so many members can have their direction by inverses of pairs that they are worth a try."""
    if len(layers) < 3:
        return False
    serve: Array = _arrays.compiled(_pairs_serve, None, layers[0], layers)
    return serve


def _pairs_serve(_: None, layers: tuple[Array, ...]) -> Array:
    xp = _arrays.namespace(layers[0])
    products = tuple(pair[1] @ pair[0] for pair in _pairs(_probe(layers)) if len(pair) == 2)
    certified: Array | bool = True
    for _, condition in linalg.inverses(xp, products, pivots=False):
        certified = certified & trusted(xp, condition)
    return _are_most(xp, certified)


def _probe(layers: tuple[Array, ...]) -> tuple[Array, ...]:
    """A few of the members."""
    batch = _arrays.broadcast_shapes(tuple(layer.shape[:-2]) for layer in layers)
    some = _some(batch, min(PROBED, -(-math.prod(batch) // (4 * PROBED))))
    return tuple(layer[(*some[len(batch) + 2 - layer.ndim :], ...)] for layer in layers)


def _are_most(xp: Namespace, flags: Array) -> Array:
    return 4 * xp.count_nonzero(flags) >= 3 * math.prod(flags.shape)


def _some(batch: Shape, count: int) -> tuple[slice, ...]:
    """Slices of the batch axes that leave about `count` members, evenly spread."""
    slices = []
    for length in batch:
        step = max(1, -(-length // count))
        slices.append(slice(None, None, step))
        count = max(1, count // max(1, -(-length // step)))
    return tuple(slices)


def _one_inverse(xp: Namespace, product: Array) -> tuple[Array, Array]:
    """W⁻¹, and where it is good enough to be multiplied by W⁻¹ again and by W."""
    inverse, condition = linalg.inverse_without_pivots(xp, product)
    return inverse, trusted(xp, condition, 2)


def by_one_inverse(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> Found:
    """(W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ = (W_i ⋯ W_1) W⁻¹ (W − W*) W⁻¹ (W_L ⋯ W_i).

    One inverse and 3L products, 2n³ flops each.
    """
    ahead = [layers[-1]]
    for layer in layers[-2::-1]:
        ahead.append(ahead[-1] @ layer)
    product = ahead.pop()
    inverse, certified = _one_inverse(xp, product)
    gap = product - factors.optimum
    excess = (_excess(xp, gap, factors),) if with_excess else ()
    moved = layers[0] @ _arrays.scaled_product(inverse, gap, scale)
    found = [moved]
    moved = moved @ inverse
    for layer, rest in zip(layers[1:], reversed(ahead), strict=True):
        moved = layer @ moved
        found.append(moved @ rest)
    roots = full_roots(xp, factors)
    return (*found, *excess), certified if roots is True else certified & roots


def by_pair_inverses(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> Found:
    """W_i − W_i G⁻¹ T and W_{i+1} − T G⁻¹ W_{i+1} for each two layers, with G = W_{i+1} W_i.

    T is what the pair alone would have to become, W* between the inverses of the other pairs.
    For L ≥ 3. L/2 inverses and 4L − 4 products, 2n³ flops each, for an even L; for an odd one
    the last layer is on its own. Errors go with the conditions of the pairs.
    """
    return _by_inverses(xp, _pairs(layers), factors, scale, with_excess, pivots=False)


def by_layer_inverses(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> Found:
    """(W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ = W_i − (W_{i+1}⁻¹ ⋯ W_L⁻¹) W* (W_1⁻¹ ⋯ W_{i-1}⁻¹).

    L inverses and 3L − 4 products, 2n³ flops each. Errors go with the conditions of the
    layers, in place of that of their product.
    """
    return _by_inverses(xp, [(layer,) for layer in layers], factors, scale, with_excess, pivots=True)


def by_layer_inverses_without_pivots(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> Found:
    """`by_layer_inverses` by matrix products; a few members of any stack are left to it."""
    return _by_inverses(xp, [(layer,) for layer in layers], factors, scale, with_excess, pivots=False)


def _pairs(layers: tuple[Array, ...]) -> list[tuple[Array, ...]]:
    """Layers by twos, and the last on its own if there is an odd number of them."""
    return [layers[i : i + 2] for i in range(0, len(layers), 2)]


def _by_inverses(
    xp: Namespace,
    groups: list[tuple[Array, ...]],
    factors: TaskFactors,
    scale: float,
    with_excess: bool,
    *,
    pivots: bool,
) -> Found:
    """An inverse for each group, of one layer or two; there are two groups at least."""
    certified: Array = full_roots(xp, factors)
    products = tuple(group[0] if len(group) == 1 else group[1] @ group[0] for group in groups)
    inverses = []
    for group, (inverse, condition) in zip(groups, linalg.inverses(xp, products, pivots=pivots), strict=True):
        inverses.append(inverse)
        fits = condition * layer_rounding(xp, inverse) < 1.0 if len(group) == 1 else trusted(xp, condition)
        certified = certified & fits
    ahead = [factors.optimum]
    for inverse in inverses[:1:-1]:
        ahead.append(inverse @ ahead[-1])
    found, behind = [], inverses[0]
    for j, group in enumerate(groups):
        # What the group alone would have to become, as a product of two.
        first, last = (ahead[-j], behind) if j else (inverses[1], ahead[-1])
        if 0 < j < len(groups) - 1:
            behind = behind @ inverses[j]
        if len(group) == 1:
            found.append(_arrays.scaled_gap(group[0], first, last, scale))
            continue
        target = first @ last
        found.append(_arrays.scaled_gap(group[0], group[0], inverses[j] @ target, scale))
        found.append(_arrays.scaled_gap(group[1], target @ inverses[j], group[1], scale))
    if with_excess:
        product = products[0]
        for factor in products[1:]:
            product = factor @ product
        found.append(_excess(xp, product - factors.optimum, factors))
    return tuple(found), certified


def _excess(xp: Namespace, gap: Array, factors: TaskFactors) -> Array:
    return half_square(xp, factors.whiten(linalg.matmul(gap, factors.input_root)))
