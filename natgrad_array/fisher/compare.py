"""An estimate of the Fisher information, or an inverse of it, held against the exact one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.fisher.network import NetworkFisher
from natgrad_array.fisher.roots import join
from natgrad_array.networks.network import Params


class FisherComparison(NamedTuple):
    """What an estimate gets right, per member; made by `compare`.

    Attributes
    ----------
    block_errors : array, shape (*batch, L, L)
        ‖F̂_ij − F_ij‖ / ‖F_ij‖ in the Frobenius norm. A block of F that is zero gives 0
        where the estimate's is zero too, and Inf elsewhere.
    cross_layer : array, shape (*batch,)
        Norm of the blocks between different layers over that of all of F: what every
        inverse by layers leaves out.
    spectrum : array, shape (*batch, r)
        Eigenvalues of F that can differ from zero.
    estimate_spectrum : array, shape (*batch, r')
        Those of the estimate.
    cosine : array, shape (*batch,)
        Between the estimate's step and F⁺∇. NaN where one of them is zero.
    length : array, shape (*batch,)
        Of the estimate's step, relative to F⁺∇.
    """

    block_errors: Array
    cross_layer: Array
    spectrum: Array
    estimate_spectrum: Array
    cosine: Array
    length: Array

    def __str__(self) -> str:
        errors = _arrays.to_numpy(self.block_errors)
        depth = errors.shape[-1]
        members = math.prod(errors.shape[:-2])
        what = "1 network" if errors.ndim == 2 else f"median of {members} networks"
        lines = [f"{what}; relative error of the blocks between layers"]
        lines.append("      " + "".join(f"{j:>9d}" for j in range(depth)))
        lines += [f"{i:>6d}" + "".join(f"{_middle(errors[..., i, j]):>9s}" for j in range(depth)) for i in range(depth)]
        for name, values in (
            ("share of F between layers", self.cross_layer),
            ("largest eigenvalue, exact", self.spectrum[..., -1]),
            ("largest eigenvalue, estimate", self.estimate_spectrum[..., -1]),
            ("cosine with the exact step", self.cosine),
            ("length over the exact step's", self.length),
        ):
            lines.append(f"{name:<30s}{_middle(_arrays.to_numpy(values)):>9s}")
        return "\n".join(lines)


def _middle(values: Any) -> str:
    """The median of the entries that are numbers."""
    numbers = sorted(float(value) for value in values.reshape(-1) if value == value)
    return f"{numbers[len(numbers) // 2]:.2g}" if numbers else "-"


@_arrays.quiet
def compare(
    exact: NetworkFisher,
    estimate: NetworkFisher,
    gradient: Params,
    *,
    inverse: str,
    damping: float | Array,
    rtol: float | Array | None,
) -> FisherComparison:
    """`NetworkFisher.compare`."""
    if not isinstance(estimate, NetworkFisher):
        raise TypeError(f"estimate must be a NetworkFisher, got {_arrays.describe(estimate)}")
    shapes, others = ([layer.parameter_shape for layer in each._net.layers] for each in (exact, estimate))
    if shapes != others:
        raise ValueError(f"estimate must have parameters of shapes {shapes}, got {others}")
    xp, depth = _arrays.namespace(exact._trace.output), len(shapes)
    errors: list[list[Array]] = []
    all_squares: Any = 0.0
    between: Any = 0.0
    for i in range(depth):
        line = []
        for j in range(depth):
            # F is symmetric: blocks below the diagonal are those above it.
            if j < i:
                line.append(errors[j][i])
                continue
            block = exact.block(i, j)
            size, off = _arrays.norms(xp, block), _arrays.norms(xp, estimate.block(i, j) - block)
            line.append(_ratio(xp, off, size))
            squares = size * size * (1.0 if i == j else 2.0)
            all_squares = all_squares + squares
            if i != j:
                between = between + squares
        errors.append(line)
    cells = xp.stack([cell for line in errors for cell in line], axis=-1)
    share = _ratio(xp, xp.sqrt(between + 0.0 * all_squares), xp.sqrt(all_squares))
    wanted = join(exact.precondition(gradient, inverse="moore_penrose"))
    step = join(estimate.precondition(gradient, inverse=inverse, damping=damping, rtol=rtol))
    # To unit size first: squares of small steps must not vanish in float32.
    unit_wanted, wanted_norm = _normalised(xp, wanted)
    unit_step, step_norm = _normalised(xp, step)
    return FisherComparison(
        xp.reshape(cells, (*cells.shape[:-1], depth, depth)),
        share,
        exact.spectrum(),
        estimate.spectrum(),
        xp.sum(unit_wanted * unit_step, axis=-1),
        xp.where(wanted_norm > 0.0, step_norm / xp.where(wanted_norm > 0.0, wanted_norm, 1.0), xp.nan),
    )


def _ratio(xp: Namespace, part: Array, whole: Array) -> Array:
    """Divide part by whole; 0 for 0 / 0, and Inf for anything else over 0."""
    positive = whole > 0.0
    empty = xp.where(part == 0.0, 0.0, part * xp.inf)
    return xp.where(positive, part / xp.where(positive, whole, 1.0), empty)


def _normalised(xp: Namespace, vectors: Array) -> tuple[Array, Array]:
    """Unit vectors, NaN for zero, and their lengths."""
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True)
    scaled = vectors / xp.where(largest > 0.0, largest, 1.0)
    norm = xp.sqrt(xp.sum(scaled * scaled, axis=-1, keepdims=True))
    unit = xp.where(norm > 0.0, scaled / xp.where(norm > 0.0, norm, 1.0), xp.nan)
    return unit, (norm * largest)[..., 0]
