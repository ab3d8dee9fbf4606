"""The online natural gradient of Povey et al.: a low-rank inverse that follows the data.

On either side of a layer the second moment of rows is kept as F = Rᵀ D R + ρ 1, with R of
few orthonormal rows. An update is one step of the power method on T = η S + (1 − η) F, for
S the moment of the batch:

    Y = R T,    Y Yᵀ = U C Uᵀ,    R ← C^{-1/2} Uᵀ Y,    D ← C^{1/2} − ρ 1,

with ρ such that the trace of F is that of T. C^{1/2} and the new R are the singular values
and right singular vectors of Y. As in the authors' code ρ has a floor: without one, rows
that a few small batches do not reach would be lost for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.optimizers.estimates import Estimate, Statistics
from natgrad_array.optimizers.inverses import Context, Inverse, Tangent

_FLOOR = 5e-4


class LowRank(NamedTuple):
    """F = Rᵀ D R + ρ 1.

    Attributes
    ----------
    rows : array, shape (*batch, r, d)
        R, with orthonormal rows.
    excess : array, shape (*batch, r)
        The diagonal of D, at least 0.
    rest : array, shape (*batch,)
        ρ.
    """

    rows: Array
    excess: Array
    rest: Array

    @classmethod
    def of(cls, moment: Array, rank: int, /) -> LowRank:
        """The largest eigenvalues of a moment, and the mean of the rest.

        Parameters
        ----------
        moment : array, shape (*batch, d, d)
            S.
        rank : int
            r, below d.

        Returns
        -------
        LowRank
            Of the same trace, unless ρ is at its floor.
        """
        xp = _arrays.namespace(moment)
        values, vectors = linalg.eigh(xp, linalg.symmetric_part(moment + 0.0))
        cut = values.shape[-1] - rank
        rest = _floored(xp, xp.mean(values[..., :cut], axis=-1), values)
        return cls(vectors[..., :, cut:].mT, _excess(xp, values[..., cut:], rest), rest)

    def trace(self) -> Array:
        """Tr F.

        Returns
        -------
        array, shape (*batch,)
            Σ D + ρ d.
        """
        return _arrays.namespace(self.rows).sum(self.excess, axis=-1) + self.rest * self.rows.shape[-1]

    def to_dense(self) -> Array:
        """F itself.

        Returns
        -------
        array, shape (*batch, d, d)
            Rᵀ D R + ρ 1.
        """
        xp = _arrays.namespace(self.rows)
        rest = self.rest[..., None, None] * _arrays.eye(xp, self.rows.shape[-1], self.rows)
        return self.rows.mT @ (self.excess[..., None] * self.rows) + rest

    def updated(self, moment: Array, eta: float, /) -> LowRank:
        """Take one step of the power method.

        Parameters
        ----------
        moment : array, shape (*batch, d, d)
            S, of a batch.
        eta : float
            η, the weight of the batch.

        Returns
        -------
        LowRank
            Of the trace of η S + (1 − η) F, unless ρ is at its floor.
        """
        xp, (rank, d) = _arrays.namespace(moment), self.rows.shape[-2:]
        total = eta * xp.linalg.trace(moment) + (1.0 - eta) * self.trace()
        if rank == 0:
            return self._replace(rest=total / d)
        own = (self.excess + self.rest[..., None])[..., None] * self.rows
        y = eta * (self.rows @ moment) + (1.0 - eta) * own
        # Orthonormal also where Y has not the full rank, as in a layer that is dead so far.
        _, scale, rows = linalg.svd(xp, y)
        rest = _floored(xp, (total - xp.sum(scale, axis=-1)) / (d - rank), scale)
        return LowRank(rows, _excess(xp, scale, rest), rest)

    def smoothed_inverse(self, moment: Array, alpha: float, /) -> Array:
        """The inverse of F + α tr F / d, scaled so that it leaves the size of the batch's rows as it is.

        Parameters
        ----------
        moment : array, shape (*batch, d, d)
            S, of the batch.
        alpha : float
            α, how much of the mean eigenvalue is added.

        Returns
        -------
        array, shape (*batch, d, d)
            γ (F + α tr F / d)⁻¹, with tr(γ² G⁻¹ S G⁻¹) = tr S. The identity where F is zero.
        """
        xp, d = _arrays.namespace(moment), moment.shape[-1]
        shift = (self.rest + alpha * self.trace() / d)[..., None]
        alive = shift > 0.0
        safe = xp.where(alive, shift, 1.0)
        share = self.excess / (self.excess + safe)
        inverse = _arrays.eye(xp, d, moment) - self.rows.mT @ (share[..., None] * self.rows)
        inverse = xp.where(xp.isnan(shift[..., None]), xp.nan, inverse / safe[..., None])
        before, after = xp.linalg.trace(moment), xp.sum((inverse @ moment) * inverse, axis=(-2, -1))
        scale = xp.sqrt(xp.where(after > 0.0, before, 1.0) / xp.where(after > 0.0, after, 1.0))
        return scale[..., None, None] * inverse


def _floored(xp: Namespace, rest: Array, values: Array) -> Array:
    """ρ, or its floor relative to the largest eigenvalue."""
    floor = _FLOOR * xp.max(values, axis=-1)
    return xp.where(rest < floor, floor, rest)


def _excess(xp: Namespace, values: Array, rest: Array) -> Array:
    """What eigenvalues have above ρ."""
    excess = values - rest[..., None]
    return xp.where(excess < 0.0, 0.0, excess)


@dataclass(frozen=True)
class LowRankOnline(Inverse):
    """Low-rank inverses on both sides of each layer, each batch preconditioned by what came before it.

    Parameters
    ----------
    input_rank, output_rank : int
        r on either side; one less than the width where that is smaller.
    alpha : float
        How much of the mean eigenvalue is added to all of them.
    eta : float
        The weight of a batch in an update; the optimizer's `refresh` says how often.

    Raises
    ------
    ValueError
        If a rank is no integer of at least 1, or `alpha` or `eta` is out of range.

    Notes
    -----
    Povey, Zhang and Khudanpur (2014), appendix A: rows of inputs and of errors are
    multiplied by the inverse of F + α tr F / d, with F = Rᵀ D R + ρ 1 on either side, so that the
    gradient is on both sides; each is scaled to leave the size of the batch's rows as it was.

    Examples
    --------
    Inputs whose moment has eigenvalues 8 and 2, of mean 5: a fifth of it is added to each.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a = np.asarray([[4.0, 0.0], [-4.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [np.ones((4, 1))], bias=False)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(), ng.optimizers.LowRankOnline(alpha=0.2))
    >>> [w], _, _ = opt.update([np.zeros((1, 2))], None, [-np.ones((1, 2))], seen)
    >>> bool(np.isclose(w[0, 1] / w[0, 0], (8 + 0.2 * 5) / (2 + 0.2 * 5)))
    True
    """

    input_rank: int = 20
    output_rank: int = 80
    alpha: float = 4.0
    eta: float = 0.1

    uses_statistics: ClassVar[bool] = True
    needs_errors: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("input_rank", "output_rank"):
            if not _arrays.is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        _arrays.check_within("alpha", self.alpha, *_arrays.POSITIVE)
        _arrays.check_within("eta", self.eta, *_arrays.SHARE)

    def _ranks(self, w: Array) -> tuple[int, int]:
        m, n = w.shape[-2:]
        return min(self.input_rank, n - 1), min(self.output_rank, m - 1)

    def moments(self, statistics: Statistics, estimate: Estimate) -> Any:
        return estimate.factors(statistics)

    def start_moments(self, params: Tangent, estimate: Estimate) -> Any:
        return tuple(_zero_moments(w) for w in params)

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        found = []
        for w in params:
            pairs = zip(_zero_moments(w), self._ranks(w), strict=True)
            found.append(tuple(LowRank(m[..., :r, :], m[..., :r, 0], m[..., 0, 0]) for m, r in pairs))
        return tuple(found), tuple(_zero_moments(w) for w in params)

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        kept = _arrays.branch(
            at.count == 0.0,
            lambda: tuple(
                tuple(LowRank.of(m, r) for m, r in zip(block, self._ranks(w), strict=True))
                for block, w in zip(moments, at.params, strict=True)
            ),
            lambda: prepared[0],
        )
        used = self._inverses(kept, moments)
        later = tuple(
            tuple(side.updated(m, self.eta) for side, m in zip(sides, block, strict=True))
            for sides, block in zip(kept, moments, strict=True)
        )
        return later, used

    def follow(self, prepared: Any, statistics: Statistics, estimate: Estimate, at: Context) -> Any:
        return prepared[0], self._inverses(prepared[0], estimate.factors(statistics))

    def _inverses(self, kept: Any, moments: Any) -> Any:
        return tuple(
            tuple(side.smoothed_inverse(m, self.alpha) for side, m in zip(sides, block, strict=True))
            for sides, block in zip(kept, moments, strict=True)
        )

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        pairs = zip(prepared[1], at.gradient, strict=True)
        return tuple(backward @ g @ forward for (forward, backward), g in pairs), prepared

    def block(self, i: int, j: int, moments: Any, prepared: Any, at: Context) -> Array | None:
        forward, backward = (side.to_dense() for side in prepared[0][i])
        return linalg.kron(at.xp, forward, backward) if i == j else None


def _zero_moments(w: Array) -> tuple[Array, Array]:
    """Zeros of the shapes of a layer's two moments."""
    xp: Namespace = _arrays.namespace(w)
    batch, (m, n) = tuple(w.shape[:-2]), w.shape[-2:]
    kind = {"dtype": w.dtype, "device": _arrays.device(w)}
    return xp.zeros((*batch, n, n), **kind), xp.zeros((*batch, m, m), **kind)
