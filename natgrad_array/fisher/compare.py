"""An estimate of the Fisher information, an inverse or a preconditioner, held against the exact one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.fisher.network import NetworkFisher
from natgrad_array.fisher.roots import join, split
from natgrad_array.networks.network import Params


class FisherComparison(NamedTuple):
    """What an estimate gets right, per member; made by `compare`.

    Attributes
    ----------
    block_errors : array, shape (*batch, L, L), or None
        ‖F̂_ij − F_ij‖ / ‖F_ij‖ in the Frobenius norm. A block of F that is zero gives 0
        where the estimate's is zero too, and Inf elsewhere. None for a preconditioner
        without blocks.
    cross_layer : array, shape (*batch,)
        Norm of the blocks between different layers over that of all of F: what every
        inverse by layers leaves out.
    left_out : array, shape (*batch,), or None
        Norm of those of them where the estimate is zero, over that of all of F. None for
        a preconditioner without blocks.
    spectrum : array, shape (*batch, r)
        Eigenvalues of F that can differ from zero, ascending.
    estimate_spectrum : array, shape (*batch, r'), or None
        Those of the estimate; None for a preconditioner without blocks.
    cosine : array, shape (*batch,), or None
        Between the estimate's step and F⁺∇. NaN where one of them is zero, None without
        a gradient.
    length : array, shape (*batch,), or None
        Of the estimate's step, relative to F⁺∇; None without a gradient.
    gain : array, shape (*batch,), or None
        How much of the largest reduction of the quadratic model −∇ᵀd + ½ dᵀFd lies along the
        estimate's step d: (∇ᵀd)² / (dᵀFd · ∇ᵀF⁺∇), the square of their cosine in the metric
        of F. NaN where a step moves nothing, None without a gradient.

    Examples
    --------
    One sample, with scores of 3 · (1, 1) at the first layer and (2, 1) at the last, and a residual
    of 2: the empirical Fisher information is four times the exact one.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((1, 1, 1), activation="identity")
    >>> params, x, y = (np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 0.0]])), np.ones((1, 1)), 4 * np.ones((1, 1))
    >>> print(net.fisher(params, x).compare(ng.empirical_fisher(net, params, x, y)))
    1 network; relative error of the blocks between layers
                  0        1
         0        3        3
         1        3        3
    share of F between layers          0.58
    share that is left out                0
    largest eigenvalue, exact            23
    largest eigenvalue, estimate         92
    """

    block_errors: Any
    cross_layer: Any
    left_out: Any
    spectrum: Any
    estimate_spectrum: Any
    cosine: Any
    length: Any
    gain: Any

    def __str__(self) -> str:
        shape = self.cross_layer.shape
        lines = ["1 network" if not shape else f"median of {math.prod(shape)} networks"]
        if self.block_errors is not None:
            errors = _arrays.to_numpy(self.block_errors)
            layers = range(errors.shape[-1])
            lines[0] += "; relative error of the blocks between layers"
            lines.append("      " + "".join(f"{j:>9d}" for j in layers))
            lines += [f"{i:>6d}" + "".join(f"{_middle(errors[..., i, j]):>9s}" for j in layers) for i in layers]
        for name, values in (
            ("share of F between layers", self.cross_layer),
            ("share that is left out", self.left_out),
            ("largest eigenvalue, exact", self.spectrum[..., -1]),
            ("largest eigenvalue, estimate", _last(self.estimate_spectrum)),
            ("cosine with the exact step", self.cosine),
            ("length over the exact step's", self.length),
            ("gain over the exact step's", self.gain),
        ):
            if values is not None:
                lines.append(f"{name:<30s}{_middle(_arrays.to_numpy(values)):>9s}")
        return "\n".join(lines)


def _last(values: Array | None) -> Array | None:
    return None if values is None else values[..., -1]


def _middle(values: Any) -> str:
    """The median of the entries that are numbers."""
    numbers = sorted(float(value) for value in values.reshape(-1) if value == value)
    return f"{numbers[len(numbers) // 2]:.2g}" if numbers else "-"


@_arrays.quiet
def compare(
    exact: NetworkFisher,
    estimate: Any,
    gradient: Params | None,
    *,
    inverse: str,
    damping: float | Array,
    rtol: float | Array | None,
) -> FisherComparison:
    """`NetworkFisher.compare`."""
    _check(exact, estimate, gradient, (inverse, damping, rtol))
    blocks = _Estimated(exact, estimate) if _has_blocks(estimate) else None
    xp, depth = _arrays.namespace(exact._trace.output), len(exact._net.layers)
    errors: list[list[Array]] = []
    all_squares: Any = 0.0
    between: Any = 0.0
    left_out: Any = 0.0
    for i in range(depth):
        line = []
        for j in range(depth):
            # F is symmetric: blocks below the diagonal are those above it.
            if j < i:
                line.append(errors[j][i])
                continue
            block = exact.block(i, j)
            size = _arrays.norms(xp, block)
            squares = size * size * (1.0 if i == j else 2.0)
            all_squares = all_squares + squares
            if i != j:
                between = between + squares
            if blocks is None:
                line.append(size)
                continue
            off, own = blocks.error(i, j, block, size)
            line.append(_ratio(xp, off, size))
            if i != j:
                left_out = left_out + xp.where(own == 0.0, squares, 0.0 * own)
        errors.append(line)
    whole = xp.sqrt(all_squares)
    cosine, length, gain = (None, None, None)
    if gradient is not None:
        step = _step(exact, estimate, gradient, inverse, damping, rtol)
        cosine, length, gain = _against_exact(exact, gradient, step)
    return FisherComparison(
        None if blocks is None else _table(xp, errors),
        _ratio(xp, xp.sqrt(between + 0.0 * all_squares), whole),
        None if blocks is None else _ratio(xp, xp.sqrt(left_out + 0.0 * all_squares), whole),
        exact.spectrum(),
        None if blocks is None else blocks.spectrum(),
        cosine,
        length,
        gain,
    )


def _check(exact: NetworkFisher, estimate: Any, gradient: Any, options: tuple[Any, ...]) -> None:
    if isinstance(estimate, NetworkFisher):
        shapes, others = ([layer.parameter_shape for layer in each._net.layers] for each in (exact, estimate))
        if shapes != others:
            raise ValueError(f"estimate must have parameters of shapes {shapes}, got {others}")
        return
    if not callable(estimate):
        raise TypeError(
            "estimate must be a NetworkFisher or a callable that turns a gradient into a direction, "
            f"got {_arrays.describe(estimate)}"
        )
    inverse, damping, rtol = options
    if inverse != "layerwise" or rtol is not None or not (isinstance(damping, int | float) and damping == 0):
        raise ValueError("inverse, damping and rtol say how a NetworkFisher is inverted; a preconditioner has its own")
    if gradient is None and not _has_blocks(estimate):
        raise ValueError("gradient must be given for a preconditioner without blocks, got None")


def _has_blocks(estimate: Any) -> bool:
    return isinstance(estimate, NetworkFisher) or bool(getattr(estimate, "has_blocks", False))


class _Estimated:
    """The blocks of an estimate, asked for once."""

    def __init__(self, exact: NetworkFisher, estimate: Any) -> None:
        self._exact, self._estimate = exact, estimate
        self._xp: Namespace = _arrays.namespace(exact._trace.output)
        self._blocks: dict[tuple[int, int], Array | None] = {}

    def error(self, i: int, j: int, block: Array, size: Array) -> tuple[Array, Array]:
        """‖F̂_ij − F_ij‖ and ‖F̂_ij‖."""
        own = self._estimate.block(i, j)
        if not isinstance(self._estimate, NetworkFisher):
            self._blocks[i, j] = own
        if own is None:
            return size, 0.0 * size
        if tuple(own.shape[-2:]) != tuple(block.shape[-2:]):
            raise ValueError(
                f"estimate must have a block ({i}, {j}) of shape (*batch, {block.shape[-2]}, {block.shape[-1]}), "
                f"got {tuple(own.shape)}"
            )
        return _arrays.norms(self._xp, own - block), _arrays.norms(self._xp, own)

    def spectrum(self) -> Array:
        """Eigenvalues, ascending: by layers where no block lies between them."""
        if isinstance(self._estimate, NetworkFisher):
            return self._estimate.spectrum()
        xp, like, depth = self._xp, self._exact._trace.output, len(self._exact._net.layers)
        batch = _arrays.broadcast_batch(
            {str(key): tuple(block.shape[:-2]) for key, block in self._blocks.items() if block is not None}
            | {"the exact one": self._exact.batch_shape}
        )
        sizes, layers = [self._exact._size(i) for i in range(depth)], range(depth)

        def filled(i: int, j: int) -> Array:
            block, shape = self._blocks[min(i, j), max(i, j)], (*batch, sizes[i], sizes[j])
            if block is None:
                return xp.zeros(shape, dtype=like.dtype, device=_arrays.device(like))
            return xp.broadcast_to(block if i <= j else block.mT, shape)

        if all(self._blocks[i, j] is None for i in layers for j in layers if i < j):
            values = [linalg.eigh(xp, linalg.symmetric_part(filled(i, i)))[0] for i in layers]
            return xp.sort(xp.concat(values, axis=-1), axis=-1)
        total = sum(sizes)
        _arrays.check_fits("the dense estimate", (*batch, total, total), xp, like, "compare a smaller network")
        whole = xp.concat([xp.concat([filled(i, j) for j in layers], axis=-1) for i in layers], axis=-2)
        return linalg.eigh(xp, linalg.symmetric_part(whole))[0]


def _step(
    exact: NetworkFisher,
    estimate: Any,
    gradient: Params,
    inverse: str,
    damping: float | Array,
    rtol: float | Array | None,
) -> tuple[Array, ...]:
    if isinstance(estimate, NetworkFisher):
        return estimate.precondition(gradient, inverse=inverse, damping=damping, rtol=rtol)
    given = exact._check_tangent("gradient", gradient)
    return exact._check_tangent("the direction that estimate returns", estimate(given))


def _against_exact(exact: NetworkFisher, gradient: Params, step: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Cosine, length and gain of a step beside F⁺∇."""
    xp, shapes = _arrays.namespace(step[0]), [layer.parameter_shape for layer in exact._net.layers]
    # To unit size first: squares of small steps must not vanish in float32.
    wanted, wanted_norm = _normalised(xp, join(exact.precondition(gradient, inverse="moore_penrose")))
    found, found_norm = _normalised(xp, join(step))
    slope, _ = _normalised(xp, join(gradient))

    def reduction(way: Array) -> Array:
        curved = xp.sum(way * join(exact.matvec(split(way, shapes))), axis=-1)
        return xp.sum(slope * way, axis=-1) ** 2 / xp.where(curved > 0.0, curved, xp.nan)

    best = reduction(wanted)
    return (
        xp.sum(wanted * found, axis=-1),
        xp.where(wanted_norm > 0.0, found_norm / xp.where(wanted_norm > 0.0, wanted_norm, 1.0), xp.nan),
        reduction(found) / xp.where(best > 0.0, best, xp.nan),
    )


def _table(xp: Namespace, cells: list[list[Array]]) -> Array:
    """Scalars of each member as a matrix."""
    flat = xp.stack(list(xp.broadcast_arrays(*(cell for line in cells for cell in line))), axis=-1)
    return xp.reshape(flat, (*flat.shape[:-1], len(cells), len(cells)))


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
