"""K-FAC's factors with a γ of its own, chosen among three."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.optimizers.estimates import Estimate, Statistics
from natgrad_array.optimizers.inverses import Context, FactoredTikhonov, Tangent, multiply
from natgrad_array.optimizers.steps import QuadraticModel, dot


@dataclass(frozen=True)
class SearchedTikhonov(FactoredTikhonov):
    """(A + πγ 1)⁻¹ ⊗ (G + γ/π 1)⁻¹ with γ adapted on its own: at times the best of γ, ωγ and γ/ω.

    γ starts at the root of damping and weight decay. The best is the one whose step, scaled
    and mixed with the last change, has the lowest value of the quadratic model of the loss;
    a search takes three inverses in place of one.

    Parameters
    ----------
    every : int
        Steps between searches, T_2: a multiple of the optimizer's `refresh`, or there is
        none at times when it is due.
    scaling : QuadraticModel
        The model.

    Raises
    ------
    TypeError, ValueError
        If one of them is no such thing.

    Notes
    -----
    Section 6.6 of Martens and Grosse (2015), with ω = (19/20)^{T_2/2}.

    Examples
    --------
    In linear regression, with little damping in the model, less is better in the factors: each of
    four searches takes the smallest γ that there is.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[3.0], [7.0]])
    >>> model, damping = ng.optimizers.QuadraticModel(momentum=False), ng.optimizers.Damping(0.01)
    >>> inverse = ng.optimizers.SearchedTikhonov(every=1, scaling=model)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.ExactDirections(), inverse, model, damping)
    >>> state = opt.init(net, params)
    >>> for _ in range(5):
    ...     params, state, info = opt.step(net, params, state, x, y)
    >>> blocks, square = state.prepared
    >>> bool(np.isclose(square, 0.01 * (19 / 20) ** 4))
    True
    """

    every: int = 20
    scaling: QuadraticModel = field(default_factory=QuadraticModel)

    needs_network: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _arrays.is_integer(self.every) or self.every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {self.every!r}")
        if not isinstance(self.scaling, QuadraticModel):
            raise TypeError(f"scaling must be a QuadraticModel, got {_arrays.describe(self.scaling)}")

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        return super().start(params, estimate), params[0][..., 0, 0]

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        first = at.count == 0.0
        square = at.xp.where(first, at.shift, prepared[1])

        def kept() -> Any:
            return tuple(block.damped_inverse(square[..., None, None]) for block in moments), square

        return _arrays.branch((at.count % self.every == 0.0) & ~first, lambda: self._search(moments, square, at), kept)

    def _search(self, moments: Any, square: Array, at: Context) -> Any:
        """The best of three γ² and its inverses, member by member."""
        xp, factor = at.xp, (19.0 / 20.0) ** self.every
        squares = xp.stack([square, factor * square, square / factor])
        tried = tuple(block.damped_inverse(squares[..., None, None]) for block in moments)
        change = self.scaling.take(multiply(tried, at.gradient), at.previous, at).change
        # At its minimum over steps a quadratic model is half its slope.
        value = dot(xp, at.gradient, change)
        best = xp.argmin(xp.where(xp.isnan(value), xp.inf, value), axis=0)

        def pick(three: Array | None) -> Array | None:
            if three is None:
                return None
            index = xp.reshape(best, (*best.shape, *(1,) * (three.ndim - 1 - best.ndim)))
            return xp.where(index == 0, three[0, ...], xp.where(index == 1, three[1, ...], three[2, ...]))

        blocks = tuple(type(block)(*(pick(part) for part in block)) for block in tried)
        return blocks, pick(squares)

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        return multiply(prepared[0], at.gradient), prepared
