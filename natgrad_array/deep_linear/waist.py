"""The layerwise rule for networks with one width between wider ends: a linear autoencoder, say.

Every factor ahead of a layer then has full column rank and every one behind it full row
rank, so that Eq 42 leaves the layer itself: d_i = (W_i − E_i⁺ R⁻¹W*S X_i⁺) / L, for the
first layer that part of it which inputs see. The end-to-end matrix is not needed, and what
multiplies W* is shared by all members.
"""

from __future__ import annotations

import functools

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear.duals import chains, full_roots, layer_rounding, thin_pair, trusted
from natgrad_array.deep_linear.products import half_square
from natgrad_array.deep_linear.task import TaskFactors


def is_waisted(layers: tuple[Array, ...], factors: TaskFactors) -> bool:
    """Whether all hidden layers have one width, which the rank of the inputs and the outputs are at least."""
    widths = {int(layer.shape[-2]) for layer in layers[:-1]}
    return len(widths) == 1 and widths.pop() <= min(factors.target.shape[-2:])


def by_ends(
    xp: Namespace, layers: tuple[Array, ...], factors: TaskFactors, scale: float, with_excess: bool
) -> tuple[tuple[Array, ...], Array]:
    """E_i⁺ = W_{i+1}⁻¹ ⋯ W_{L-1}⁻¹ (R⁻¹W_L)⁺ and X_i⁺ = (W_1 S)⁺ W_2⁻¹ ⋯ W_{i-1}⁻¹.

    With r the width: both ends by their Gram matrices, 2r²(n_0 + n_L) flops and an inverse
    each, two products of r² and two of r by n_0 n_L, and for each layer between them an
    inverse and at most four products of r³.
    """
    left, right = chains(xp, layers, factors)
    front, back = thin_pair(xp, left.factor(1), right.factor(1))
    middle = [linalg.inverse(xp, layer) for layer in layers[1:-1]]
    # Each as the two matrices that it is the product of.
    onto_front = front.times_as_product(factors.whiten(factors.optimum))
    core, rest = back.times_as_product(xp.matrix_transpose(factors.unwhiten(factors.target)))
    onto_back = rest.mT, core.mT
    root = factors.input_root
    seen = layers[0]
    if root.shape[-1] < root.shape[-2]:
        seen = linalg.matmul(seen, root @ factors.input_root_pinv)
    between = []
    if middle:
        whole = functools.reduce(lambda left, right: left @ right, (inverse for inverse, _ in middle))
        onto_front = whole, linalg.matmul(*onto_front)
        onto_back = onto_back[0] @ onto_back[1], whole
        # What E_i⁺ and X_i⁺ of the layers between the ends have in common, from the right.
        ahead = [back.times_from_right(linalg.matmul(onto_front[1], root))]
        for inverse, _ in middle[:0:-1]:
            ahead.append(inverse @ ahead[-1])
        between, behind = [layers[1] - ahead[-1]], middle[0][0]
        between[0] *= scale
        for layer, shared, (inverse, _) in zip(layers[2:-1], ahead[-2::-1], middle[1:], strict=True):
            between.append(_arrays.scaled_gap(layer, shared, behind, scale))
            behind = behind @ inverse
    found = [
        _arrays.scaled_gap(seen, *onto_front, scale),
        *between,
        _arrays.scaled_gap(layers[-1], *onto_back, scale),
    ]
    if with_excess:
        found.append(half_square(xp, factors.target - left.factor(1).mT @ right.factor(len(layers) - 1)))
    certified: Array = full_roots(xp, factors)
    for end in (front, back):
        certified = certified & trusted(xp, end.condition)
    for inverse, condition in middle:
        certified = certified & (condition * layer_rounding(xp, inverse) < 1.0)
    return tuple(found), certified
