"""How layers are combined and how far to go: the third of an optimizer's three choices.

A step rule turns a direction into a change of the parameters, and a damping policy learns
from what the loss did. Both work member by member of an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.networks.passes import Trace
from natgrad_array.optimizers.estimates import _first
from natgrad_array.optimizers.inverses import Context, Tangent

PREDICTIONS = ("exact", "block_diagonal", "damped")


class Change(NamedTuple):
    """A change of the parameters, before it is made.

    Attributes
    ----------
    change : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        What is added.
    rate : array, shape (*batch,)
        How much of the direction is in it.
    curvature : array, shape (*batch,), or None
        ΔᵀFΔ of the change Δ, if a rule has found out.
    share : float
        The part of the batch that this F is of.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, w = np.asarray([[2.0]]), np.asarray([[3.0, 0.0]])
    >>> zero, trace = np.asarray(0.0), net.forward(params, x)
    >>> at = ng.optimizers.Context(net, params, x, trace, (w,), zero, zero)
    >>> made = ng.optimizers.QuadraticModel(momentum=False).take((w,), (w,), at)
    >>> float(made.rate), float(made.change[0][0, 0]), float(made.curvature)  # the best step along w
    (0.25, -0.75, 2.25)
    """

    change: Tangent
    rate: Array
    curvature: Array | None = None
    share: float = 1.0


def dot(xp: Namespace, a: Tangent, b: Tangent) -> Array:
    """Inner product of two tangents, member by member."""
    total: Array = 0.0
    for u, v in zip(a, b, strict=True):
        total = total + xp.sum(xp.linalg.vecdot(u, v), axis=-1)
    return total


def curvatures(at: Context, share: float, ways: Sequence[Tangent]) -> list[list[Array]]:
    """Products aᵀ F b of directions with each other, on the first part of the batch."""
    if at.sums is not None:
        return _square([total / at.samples for total in at.sums(ways)])
    trace = part_of(at, share)
    samples = trace.output.shape[-2]
    return _square([total / samples for total in sums_of_products(at.net, at.params, trace, ways)])


def sums_of_products(net: Any, params: Tangent, trace: Trace, ways: Sequence[Tangent]) -> list[Array]:
    """Sums over samples of (J a)ᵀ M (J b), by how the outputs move: of every pair with a not after b."""
    xp = _arrays.namespace(trace.output)
    moved = net.tangent(
        params, trace, tuple(xp.stack(xp.broadcast_arrays(*parts)) for parts in zip(*ways, strict=True))
    )
    products = [net.likelihood.metric(trace.output, moved[k, ...]) for k in range(len(ways))]
    return [xp.sum(moved[i, ...] * product, axis=(-2, -1)) for j, product in enumerate(products) for i in range(j + 1)]


def _square(pairs: list[Array]) -> list[list[Array]]:
    """A symmetric matrix from its columns down to the diagonal."""
    size = math.isqrt(2 * len(pairs))
    return [[pairs[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(size)] for i in range(size)]


def decays(decay: float | Array) -> bool:
    """Whether there is a weight decay at all."""
    return not (isinstance(decay, float) and decay == 0.0)


class Scaling:
    """What all step rules share.

    Notes
    -----
    A step rule of one's own is a `take` that returns a `Change`: what is added, and how much of the
    direction is in it. One that asks for products with F has `needs_products`, and may hand the
    curvature that it finds on to the damping policy.

    Examples
    --------
    A learning rate of 1/k in step k, member by member.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> class Decaying(ng.optimizers.Scaling):
    ...     def take(self, direction, previous, at):
    ...         rate = 1.0 / (1.0 + at.count) + 0.0 * at.damping
    ...         return ng.optimizers.Change(tuple(-rate[..., None, None] * d for d in direction), rate, None)
    >>> seen = ng.optimizers.Statistics.of([np.ones((1, 1))], bias=False)
    >>> opt = ng.optimizers.Optimizer(scaling=Decaying())
    >>> params, state, gradient = (np.zeros((1, 1)),), None, (np.ones((1, 1)),)
    >>> for _ in range(2):
    ...     params, state, info = opt.update(params, state, gradient, seen)
    >>> params, float(info.rate)
    ((array([[-1.5]]),), 0.5)
    """

    needs_products: ClassVar[bool] = False
    """Whether it asks for products with F, which take passes through the network."""

    def take(self, direction: Tangent, previous: Tangent, at: Context) -> Change:
        """Turn a direction into a change of the parameters.

        Parameters
        ----------
        direction : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            What the inverse made of the gradient.
        previous : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The last change that was made.
        at : Context
            Where the optimizer is.

        Returns
        -------
        Change
            Before it is made.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> w, d, one = np.asarray([[1.0]]), np.asarray([[4.0]]), np.asarray(1.0)
        >>> at = ng.optimizers.Context(None, (w,), None, None, (d,), one, one)
        >>> ng.optimizers.Fixed(0.5, momentum=0.9).take((d,), (w,), at).change
        (array([[-1.1]]),)
        """
        raise NotImplementedError("a step rule says how far it goes")


def _full(xp: Namespace, value: float, like: Array) -> Array:
    return xp.full(tuple(like.shape), value, dtype=like.dtype, device=_arrays.device(like))


@dataclass(frozen=True)
class Fixed(Scaling):
    """A fixed learning rate, with or without momentum.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        How much of the direction is taken. Its batch axes are those of the ensemble: a
        sweep over learning rates is one.
    momentum : float
        How much of the last change is added, in [0, 1).

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range. A learning rate that does not broadcast to the
        ensemble raises in a step, where a negative entry of an array makes its member NaN.

    Examples
    --------
    Changes of 1 and of 1 + ½.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> seen = ng.optimizers.Statistics.of([np.ones((1, 1))], bias=False)
    >>> opt = ng.optimizers.Optimizer(scaling=ng.optimizers.Fixed(1.0, momentum=0.5))
    >>> params, state, gradient = (np.zeros((1, 1)),), None, (np.ones((1, 1)),)
    >>> for _ in range(2):
    ...     params, state, info = opt.update(params, state, gradient, seen)
    >>> params
    (array([[-2.5]]),)
    """

    learning_rate: Any = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _arrays.check_setting("learning_rate", self.learning_rate)
        _arrays.check_within("momentum", self.momentum, *_arrays.FRACTION)

    def _rate(self, at: Context) -> Array:
        rate = _arrays.check_nonnegative(
            "learning_rate", self.learning_rate, at.xp, at.damping, batch=tuple(at.damping.shape)
        )
        return rate + at.xp.zeros_like(at.damping)

    def _changed(self, direction: Tangent, previous: Tangent, rate: Array) -> Change:
        scalar = -rate[..., None, None]
        change = tuple(scalar * d for d in direction)
        if self.momentum:
            change = tuple(c + self.momentum * p for c, p in zip(change, previous, strict=True))
        return Change(change, rate)

    def take(self, direction: Tangent, previous: Tangent, at: Context) -> Change:
        return self._changed(direction, previous, self._rate(at))


@dataclass(frozen=True)
class PerLayer(Fixed):
    """A learning rate divided by the number of layers: the step of the layerwise rule (Eq 42).

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        α, of which each layer takes one L-th.
    momentum : float
        How much of the last change is added, in [0, 1).

    Raises
    ------
    TypeError, ValueError
        As `Fixed` does.

    Notes
    -----
    Eq 42 of Bernacchia, Lengyel and Hennequin (2018), supplement.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> seen = ng.optimizers.Statistics.of([np.ones((1, 1)), np.ones((1, 1))], bias=False)
    >>> opt = ng.optimizers.Optimizer(scaling=ng.optimizers.PerLayer(1.0))
    >>> one = np.ones((1, 1))
    >>> _, _, info = opt.update((one, one), None, (one, one), seen)
    >>> float(info.rate)
    0.5
    """

    def _rate(self, at: Context) -> Array:
        return super()._rate(at) / len(at.params)


@dataclass(frozen=True)
class NormBound(Fixed):
    """The learning rate, or less where the step would be longer than a bound in the metric of F̂.

    min(learning_rate, √(bound / Δᵀ F̂ Δ)), with F̂ what the direction was inverted with, so
    that Δᵀ F̂ Δ is the gradient times the direction (Ba, Grosse and Martens 2017).

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        The largest share of the direction.
    momentum : float
        How much of the last change is added, in [0, 1).
    bound : float
        Of the squared length.

    Raises
    ------
    TypeError, ValueError
        If `bound` is not above 0; as `Fixed` does.

    Examples
    --------
    A step of squared length 2 · 2 in the metric of the identity, bounded by 1.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> seen = ng.optimizers.Statistics.of([np.ones((1, 1))], bias=False)
    >>> opt = ng.optimizers.Optimizer(scaling=ng.optimizers.NormBound(1.0, bound=1.0))
    >>> params, _, info = opt.update((np.zeros((1, 1)),), None, (2.0 * np.ones((1, 1)),), seen)
    >>> params, float(info.rate)
    ((array([[-1.]]),), 0.5)
    """

    bound: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _arrays.check_within("bound", self.bound, *_arrays.POSITIVE)

    def _rate(self, at: Context) -> Array:
        return super()._rate(at)

    def take(self, direction: Tangent, previous: Tangent, at: Context) -> Change:
        xp, rate = at.xp, self._rate(at)
        square = dot(xp, at.gradient, direction)
        allowed = xp.sqrt(self.bound / xp.where(square > 0.0, square, 1.0))
        rate = xp.where((square > 0.0) & (allowed < rate), allowed, rate)
        return self._changed(direction, previous, rate)


@dataclass(frozen=True)
class QuadraticModel(Scaling):
    """The best step, and the best share of the last one, in the exact quadratic model of the loss.

    Δ = α d + μ Δ_0, with d the direction and Δ_0 the last change, where α and μ solve

        α dᵀBd + μ dᵀBΔ_0 = −∇ᵀd,    α dᵀBΔ_0 + μ Δ_0ᵀBΔ_0 = −∇ᵀΔ_0,

    and B is the exact Fisher information of the batch plus the damping and the weight decay
    (Martens and Grosse 2015, sections 6.4 and 7).

    Parameters
    ----------
    momentum : bool
        Whether the last change takes part.
    share : float
        The part of the batch that products with F are computed on, in (0, 1].

    Raises
    ------
    TypeError, ValueError
        If `momentum` is no truth value, or `share` is out of range.

    Examples
    --------
    The gradient (−16, −1), where F = diag(4, 1).

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[2.0], [-2.0]]), np.asarray([[9.0], [-7.0]])
    >>> opt = ng.optimizers.Optimizer(scaling=ng.optimizers.QuadraticModel())
    >>> _, _, info = opt.step(net, params, opt.init(net, params), x, y)
    >>> bool(np.isclose(info.rate, (16**2 + 1) / (4 * 16**2 + 1)))
    True
    """

    momentum: bool = True
    share: float = 1.0

    needs_products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, bool):
            raise TypeError(f"momentum must be True or False, got {_arrays.describe(self.momentum)}")
        _arrays.check_within("share", self.share, *_arrays.SHARE)

    def take(self, direction: Tangent, previous: Tangent, at: Context) -> Change:
        xp = at.xp
        f = curvatures(at, self.share, [direction, previous] if self.momentum else [direction])
        b_dd = f[0][0] + at.shift * dot(xp, direction, direction)
        slope = dot(xp, at.gradient, direction)
        alone = -slope / xp.where(b_dd > 0.0, b_dd, 1.0)
        if not self.momentum:
            change = tuple(alone[..., None, None] * d for d in direction)
            return Change(change, -alone, alone * alone * f[0][0], self.share)
        b_pp = f[1][1] + at.shift * dot(xp, previous, previous)
        b_dp = f[0][1] + at.shift * dot(xp, direction, previous)
        slope_p = dot(xp, at.gradient, previous)
        determinant = b_dd * b_pp - b_dp * b_dp
        # Without a last change, or along the direction, the second equation says nothing new.
        solvable = determinant > 16 * _arrays.eps(xp, determinant) * b_dd * b_pp
        safe = xp.where(solvable, determinant, 1.0)
        alpha = xp.where(solvable, (b_dp * slope_p - b_pp * slope) / safe, alone)
        mu = xp.where(solvable, (b_dp * slope - b_dd * slope_p) / safe, 0.0)
        a, m = alpha[..., None, None], mu[..., None, None]
        change = tuple(a * d + m * p for d, p in zip(direction, previous, strict=True))
        square = alpha * alpha * f[0][0] + 2.0 * alpha * mu * f[0][1] + mu * mu * f[1][1]
        return Change(change, -alpha, square, self.share)


def part_of(at: Context, share: float) -> Trace:
    """The trace of the first part of the batch."""
    part = part_size(at.trace, share)
    return at.trace if part == at.trace.output.shape[-2] else _first(at.net, at.trace, part)


def part_size(trace: Trace, share: float) -> int:
    """How many samples a share of the batch is."""
    return max(1, math.ceil(share * int(trace.output.shape[-2])))


# --------------------------------------------------------------------------------- damping


@dataclass(frozen=True)
class Damping:
    """A damping that stays as it is.

    Parameters
    ----------
    initial : float or array of shape (*batch,)
        The damping, in units of the eigenvalues of the Fisher information; its batch axes are
        those of the ensemble.

    Raises
    ------
    TypeError, ValueError
        If `initial` is neither a number of at least 0 nor an array. One that does not broadcast
        to the ensemble raises when a state is made.

    Examples
    --------
    A sweep over three dampings is an ensemble.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> opt = ng.optimizers.kfac(damping=np.asarray([0.1, 1.0, 10.0]))
    >>> net = ng.networks.MLP((2, 3, 1))
    >>> opt.init(net, net.init(0, (3,), like=np.empty(0))).damping
    array([ 0.1,  1. , 10. ])
    """

    initial: Any = 0.0

    def __post_init__(self) -> None:
        _arrays.check_setting("damping", self.initial)

    def start(self, xp: Namespace, like: Array) -> Array:
        """Make the first damping of every member.

        Parameters
        ----------
        xp : namespace
            Of the arrays.
        like : array, shape (*batch,)
            Gives dtype, device and the shape of the ensemble.

        Returns
        -------
        array, shape (*batch,)
            The damping.

        Raises
        ------
        TypeError, ValueError
            If `initial` is negative, or does not broadcast to the ensemble.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.optimizers.Damping(0.5).start(np, np.zeros((3,)))
        array([0.5, 0.5, 0.5])
        """
        value = _arrays.check_nonnegative("damping", self.initial, xp, like, batch=tuple(like.shape))
        return value + xp.zeros_like(like)


class Verdict(NamedTuple):
    """What a damping policy makes of a step.

    Attributes
    ----------
    damping : array, shape (*batch,)
        For the next step.
    ratio : array, shape (*batch,)
        Actual over predicted reduction of the loss.
    accepted : array of bool, shape (*batch,)
        Whether the step is made.
    """

    damping: Array
    ratio: Array
    accepted: Array


@dataclass(frozen=True)
class LevenbergMarquardt(Damping):
    """A damping that grows where the model promised too much, and falls where it kept its word.

    Parameters
    ----------
    initial : float or array of shape (*batch,)
        The first damping.
    prediction : {"exact", "block_diagonal", "damped"}
        The reduction that is expected of a change Δ: "exact" −∇ᵀΔ − ½ ΔᵀFΔ with the exact
        F (and the weight decay), "damped" with F + damping, "block_diagonal" with the inverse's own blocks, as if
        layers did not see each other. By the last a perfect step of the layerwise rule
        has a ratio of L/(2L − 1) in place of 1; it costs no pass.
    lower, upper : float
        Ratios below and above which the damping changes.
    grow, shrink : float
        What it is multiplied by then.
    every : int
        Steps between changes; a step that is taken back changes it at once.
    reject : bool
        Whether a step that raises the loss, or makes it NaN, is taken back.
    share : float
        The part of the batch that products with F are computed on, in (0, 1]. In steps that
        do not change the damping, one that lowers the loss of this part is taken to lower
        that of the batch; where it does not, the whole batch decides. On eager arrays that
        costs a scalar brought to the host.
    minimum : float
        The damping never falls below it.

    Raises
    ------
    TypeError, ValueError
        If `prediction` is unknown, or a number is none or out of range.

    Notes
    -----
    The rule of Bernacchia, Lengyel and Hennequin's own experiments (2018) by default, with another
    prediction; `kfac` has that of section 6.5 of Martens and Grosse (2015).

    Examples
    --------
    Natural gradient steps of linear regression keep what the model promised: ratios are 1.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[2.0], [-2.0]]), np.asarray([[9.0], [-7.0]])
    >>> opt = ng.optimizers.Optimizer(
    ...     inverse=ng.optimizers.FullFisher(), damping=ng.optimizers.LevenbergMarquardt(9.0)
    ... )
    >>> state = opt.init(net, params)
    >>> for _ in range(2):
    ...     params, state, info = opt.step(net, params, state, x, y)
    >>> float(state.damping)
    4.0
    """

    prediction: str = "exact"
    lower: float = 0.25
    upper: float = 0.75
    grow: float = 1.5
    shrink: float = 2.0 / 3.0
    every: int = 1
    reject: bool = False
    share: float = 1.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _arrays.check_option("prediction", self.prediction, PREDICTIONS)
        for name in ("lower", "upper", "grow", "shrink"):
            _arrays.check_within(name, getattr(self, name), *_arrays.FINITE)
        _arrays.check_within("share", self.share, *_arrays.SHARE)
        _arrays.check_within("minimum", self.minimum, *_arrays.NONNEGATIVE)
        if not self.grow >= 1.0 >= self.shrink > 0.0:
            raise ValueError(f"grow must be at least 1 and shrink in (0, 1], got {self.grow} and {self.shrink}")
        if not self.lower <= self.upper:
            raise ValueError(f"lower must be at most upper, got {self.lower} and {self.upper}")
        if not _arrays.is_integer(self.every) or self.every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {self.every!r}")

    def predicted(self, step: Change, direction: Tangent, at: Context) -> Array:
        """The reduction of the loss that the model expects.

        Parameters
        ----------
        step : Change
            What is about to be made.
        direction : tuple of arrays
            What the inverse made of the gradient.
        at : Context
            Where it is made.

        Returns
        -------
        array, shape (*batch,)
            Positive for a step that should help.

        Examples
        --------
        In linear regression it is what comes.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
        >>> x, y = np.asarray([[2.0], [-2.0]]), np.asarray([[9.0], [-7.0]])
        >>> gradient, rule = net.gradient(params, x, y), ng.optimizers.Fixed(0.25)
        >>> zero, trace = np.asarray(0.0), net.forward(params, x)
        >>> at = ng.optimizers.Context(net, params, x, trace, gradient, zero, zero)
        >>> step = rule.take(gradient, gradient, at)
        >>> predicted = ng.optimizers.LevenbergMarquardt().predicted(step, gradient, at)
        >>> later = tuple(w + d for w, d in zip(params, step.change))
        >>> bool(np.isclose(predicted, net.loss(params, x, y) - net.loss(later, x, y)))
        True
        """
        xp = at.xp
        if self.prediction == "block_diagonal":
            return step.rate * (1.0 - 0.5 * step.rate) * dot(xp, at.gradient, direction)
        square = step.curvature
        if square is None or step.share != self.share:
            square = curvatures(at, self.share, [step.change])[0][0]
        reduction = -dot(xp, at.gradient, step.change) - 0.5 * square
        if self.prediction == "exact" and not decays(at.decay):
            return reduction
        shift = at.decay if self.prediction == "exact" else at.shift
        return reduction - 0.5 * shift * dot(xp, step.change, step.change)

    def judge(self, loss: Array, new_loss: Array, predicted: Array, at: Context) -> Verdict:
        """Compare what came with what was expected.

        Parameters
        ----------
        loss, new_loss : arrays, shape (*batch,)
            Before and after the step.
        predicted : array, shape (*batch,)
            The reduction that the model expected.
        at : Context
            Where the step was made.

        Returns
        -------
        Verdict
            Member by member.

        Notes
        -----
        The ratio is ρ = (loss − new_loss) / predicted: below `lower` the damping grows, above
        `upper` it shrinks (Martens and Grosse 2015, section 6.5).

        Examples
        --------
        Nine tenths of what was promised: the model is trusted more.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> at = ng.optimizers.Context(None, (), None, None, (), np.asarray(3.0), np.asarray(0.0))
        >>> loss, new_loss, predicted = np.asarray(1.0), np.asarray(0.1), np.asarray(1.0)
        >>> verdict = ng.optimizers.LevenbergMarquardt().judge(loss, new_loss, predicted, at)
        >>> float(verdict.ratio), float(verdict.damping), bool(verdict.accepted)
        (0.9, 2.0, True)
        """
        xp = at.xp
        ratio = (loss - new_loss) / xp.where(predicted == 0.0, 1.0, predicted)
        # Rounding alone moves a loss by a few eps of itself: a smaller promise proves nothing.
        silent = xp.abs(predicted) <= 8 * _arrays.eps(xp, loss) * xp.abs(loss)
        ratio = xp.where(silent & (xp.abs(loss - new_loss) <= 16 * _arrays.eps(xp, loss) * xp.abs(loss)), 1.0, ratio)
        # A step that the model itself expects to do harm is no proof of the model.
        bad = ~xp.isfinite(new_loss) | (ratio < self.lower) | ((predicted <= 0.0) & ~silent)
        good = ~bad & (ratio > self.upper)
        accepted = (new_loss <= loss) if self.reject else xp.ones_like(loss) > 0.0
        damping = xp.where(bad, self.grow * at.damping, xp.where(good, self.shrink * at.damping, at.damping))
        damping = xp.where(damping < self.minimum, self.minimum, damping)
        if self.every > 1:
            damping = xp.where(self.due(at) | ~accepted, damping, at.damping)
        return Verdict(damping, ratio, accepted)

    def due(self, at: Context) -> Array:
        """Say whether this is a step that changes the damping.

        Parameters
        ----------
        at : Context
            Where the step is made.

        Returns
        -------
        array of bool, shape ()
            True in every `every`-th step.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> policy, zero = ng.optimizers.LevenbergMarquardt(every=5), np.asarray(0.0)
        >>> [bool(policy.due(ng.optimizers.Context(None, (), None, None, (), zero, zero + k))) for k in range(6)]
        [False, False, False, False, True, False]
        """
        return (at.count + 1.0) % self.every == 0.0
