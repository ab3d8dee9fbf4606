"""An optimizer: an estimate, an inverse, a step rule and a damping policy, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.networks import passes
from natgrad_array.networks.network import Network, Params
from natgrad_array.optimizers.estimates import Estimate, InputsOnly, Statistics, weighted
from natgrad_array.optimizers.inverses import Context, Identity, Inverse, Tangent
from natgrad_array.optimizers.preconditioner import Preconditioner
from natgrad_array.optimizers.steps import Damping, Fixed, LevenbergMarquardt, Scaling, decays, dot, part_size


class OptimizerState(NamedTuple):
    """What an optimizer remembers between steps: arrays in nested tuples.

    Attributes
    ----------
    count : array, shape ()
        Steps taken.
    damping : array, shape (*batch,)
        Of each member.
    moments : tuple
        Averaged moments of the layers; empty where nothing is averaged.
    prepared : tuple
        What the inverse has made of them; empty where it is made anew in each step.
    previous : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The last change of the parameters.
    """

    count: Any
    damping: Any
    moments: Any
    prepared: Any
    previous: Any


class StepInfo(NamedTuple):
    """What happened in a step, member by member.

    Attributes
    ----------
    loss : array, shape (*batch,)
        Of the batch before the step, in nats per sample, a penalty included.
    new_loss : array, shape (*batch,), or None
        Of the same batch after it, where the damping policy asked for it; in steps that do
        not change the damping, by what happened to a part of the batch.
    rate : array, shape (*batch,)
        How much of the direction was taken.
    damping : array, shape (*batch,)
        Of this step.
    ratio : array, shape (*batch,), or None
        Actual over predicted reduction of the loss, the actual one as in `new_loss`.
    accepted : array of bool, shape (*batch,), or None
        Whether the step was made.
    ranks : tuple of pairs of arrays, shapes (*batch,)
        Of the two moments of each layer, where the inverse decides on ranks.
    """

    loss: Any
    new_loss: Any
    rate: Any
    damping: Any
    ratio: Any
    accepted: Any
    ranks: Any


@dataclass(frozen=True)
class Optimizer:
    """Three choices and a damping: how a network, or an ensemble of them, is trained.

    Presets such as `kfac` make the named methods of the literature; any mixture is as good.

    Parameters
    ----------
    estimate : Estimate
        Where the moments of the layers come from.
    inverse : Inverse
        What stands for the inverse of the Fisher information.
    scaling : Scaling
        How far to go.
    damping : Damping
        How the damping starts, and what it learns from.
    refresh : int
        Steps between two inverses. On eager arrays more than one costs a scalar brought to
        the host in each step.
    weight_decay : float or array of shape (*batch,)
        η of a penalty ½ η ‖θ‖² on all parameters, which is part of the loss: of its gradient,
        of what a step is expected to gain, and of the curvature, where η adds to the damping
        as in K-FAC. (Not where the damping is on the inputs alone, as in `Whitening`.)

    Raises
    ------
    TypeError, ValueError
        If a choice is of the wrong kind, or `refresh` is not a positive integer. A weight
        decay that is negative, or does not broadcast to the ensemble, raises in a step.

    Notes
    -----
    Every quantity that adapts is an array over the ensemble: a member that diverges turns
    to NaN alone. Under `jax.jit` the state is a pytree.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((2, 8, 1))
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((50, 2))
    >>> y = x[:, :1] * x[:, 1:]
    >>> params = net.init(0, (5,), like=x)
    >>> opt = ng.optimizers.natural_gradient()
    >>> state = opt.init(net, params)
    >>> for _ in range(20):
    ...     params, state, info = opt.step(net, params, state, x, y, rng)
    >>> bool(np.all(net.loss(params, x, y) < 0.1 * np.mean(y**2)))
    True
    """

    estimate: Estimate = field(default_factory=InputsOnly)
    inverse: Inverse = field(default_factory=Identity)
    scaling: Scaling = field(default_factory=Fixed)
    damping: Damping = field(default_factory=Damping)
    refresh: int = 1
    weight_decay: Any = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("estimate", Estimate), ("inverse", Inverse), ("scaling", Scaling), ("damping", Damping)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be of the kind {kind.__name__}, got {_arrays.describe(getattr(self, name))}"
                )
        if self.inverse.needs_errors and not self.estimate.has_errors:
            raise ValueError(f"estimate must have errors for the inverse {self.inverse}, got {self.estimate}")
        if not _arrays.is_integer(self.refresh) or self.refresh < 1:
            raise ValueError(f"refresh must be an integer of at least 1, got {self.refresh!r}")

    @property
    def _keeps_prepared(self) -> bool:
        """Whether what the inverse makes of moments is needed in another step."""
        return self.inverse.remembers or self.refresh > 1

    @property
    def _works_on_samples(self) -> bool:
        """Whether moments are not needed: nothing is averaged or kept, and the inverse has another way."""
        return self.inverse.looks_at_samples and self.estimate.average == 0.0 and not self._keeps_prepared

    @_arrays.quiet
    def init(self, net: Network, params: Params, /) -> OptimizerState:
        """Make the state before the first step.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The first parameters.

        Returns
        -------
        OptimizerState
            Of the library, dtype and device of the parameters.

        Raises
        ------
        TypeError, ValueError
            If `net` is no network, or `params` do not fit it.
        """
        _, given = _check(net, params)
        return self._start(given)

    def _start(self, given: tuple[Array, ...]) -> OptimizerState:
        xp = _arrays.namespace(given[0])
        batch = _arrays.broadcast_batch({str(i): tuple(w.shape[:-2]) for i, w in enumerate(given)})
        zeros = tuple(xp.zeros((*batch, *w.shape[-2:]), dtype=w.dtype, device=_arrays.device(w)) for w in given)
        damping = self.damping.start(xp, xp.sum(zeros[0], axis=(-2, -1)))
        count = xp.zeros((), dtype=given[0].dtype, device=_arrays.device(given[0]))
        moments = self.inverse.start_moments(zeros, self.estimate) if self.estimate.average > 0.0 else ()
        prepared = self.inverse.start(zeros, self.estimate) if self._keeps_prepared else ()
        return OptimizerState(count, damping, moments, prepared, zeros)

    @_arrays.quiet
    def step(
        self, net: Network, params: Params, state: OptimizerState, x: Array, y: Array, rng: Any = None, /
    ) -> tuple[tuple[Array, ...], OptimizerState, StepInfo]:
        """Take one step on one batch.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters.
        state : OptimizerState
            From `init` or from the last step.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            Their targets.
        rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
            Where randomness comes from, for estimates that sample the model. A seed draws
            the same in each step: give a generator, or a new key each time.

        Returns
        -------
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The new parameters.
        state : OptimizerState
            For the next step.
        info : StepInfo
            What happened.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit the network or each other, or `rng` is missing.
        """
        _, given = _check(net, params)
        _check_state(state)
        return self._step(net, given, state, x, y, rng, None)

    @_arrays.quiet
    def preconditioner(
        self, net: Network, params: Params, state: OptimizerState, x: Array, y: Array, rng: Any = None, /
    ) -> Preconditioner:
        """Look at one batch, and make the map from gradients to directions that a step would use.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters.
        state : OptimizerState
            From `init` or from the last step: averages, what the inverse remembers, and the
            damping.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            Their targets, which only an empirical estimate looks at.
        rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
            Where randomness comes from, as for `step`.

        Returns
        -------
        Preconditioner
            To apply, or to hold against the exact Fisher information by its `compare`.

        Raises
        ------
        TypeError, ValueError
            As `step` does.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((2, 3, 1))
        >>> x = np.random.default_rng(0).standard_normal((50, 2))
        >>> params, y = net.init(0, like=x), x[:, :1] * x[:, 1:]
        >>> opt = ng.optimizers.kfac(damping=1e-3, share=1.0)
        >>> kfac = opt.preconditioner(net, params, opt.init(net, params), x, y, 0)
        >>> report = net.fisher(params, x).compare(kfac, net.gradient(params, x, y))
        >>> bool(report.left_out == report.cross_layer)
        True
        """
        _, given = _check(net, params)
        _check_state(state)
        trace = net.forward(given, x)
        at = self._context(net, given, x, trace, _gradient(net, given, trace, y), state)
        statistics = self.estimate.observe(net, given, trace, y, rng) if self.inverse.uses_statistics else None
        moments, prepared = self._prepare(state, at, statistics)
        if statistics is not None and self._works_on_samples:
            moments = self.inverse.moments(statistics, self.estimate)
        return Preconditioner(self.inverse, moments, prepared, at)

    def _step(
        self,
        net: Network,
        given: Tangent,
        state: OptimizerState,
        x: Array,
        y: Array,
        rng: Any,
        gradient: Tangent | None,
    ) -> tuple[Tangent, OptimizerState, StepInfo]:
        """A step with a gradient of the caller's, or with that of the loss."""
        trace = net.forward(given, x)
        loss = net.likelihood.loss(trace.output, y)
        gradient = _gradient(net, given, trace, y) if gradient is None else gradient
        at = self._context(net, given, x, trace, gradient, state)
        statistics = self.estimate.observe(net, given, trace, y, rng) if self.inverse.uses_statistics else None

        def evaluate(new: Tangent) -> Array:
            return net.likelihood.loss(net.output(new, x), y)

        def glance(new: Tangent, share: float) -> tuple[Array, Array]:
            part = slice(part_size(trace, share))
            some = x[(..., part, *(slice(None),) * len(net.layers[0].input_shape))]
            targets = y[..., part] if net.likelihood.name == "categorical" else y[..., part, :]
            before = net.likelihood.loss(trace.output[..., part, :], targets)
            return before, net.likelihood.loss(net.output(new, some), targets)

        return self._advance(at, state, statistics, loss, evaluate, glance)

    def _context(
        self, net: Any, params: Tangent, x: Any, trace: Any, gradient: Tangent, state: OptimizerState
    ) -> Context:
        """Where the optimizer is, with the weight decay in the gradient."""
        xp, like = _arrays.namespace(state.damping), state.damping
        decay = _arrays.check_nonnegative("weight_decay", self.weight_decay, xp, like, batch=tuple(like.shape))
        if decays(decay):
            decay = decay + xp.zeros_like(like)
            gradient = tuple(g + decay[..., None, None] * w for g, w in zip(gradient, params, strict=True))
        return Context(net, params, x, trace, gradient, like, state.count, state.previous, decay)

    def _advance(
        self,
        at: Context,
        state: OptimizerState,
        statistics: Statistics | None,
        loss: Array | None,
        evaluate: Callable[[Tangent], Array] | None,
        glance: Callable[[Tangent, float], tuple[Array, Array]] | None = None,
        elsewhere: tuple[Any, Any] | None = None,
    ) -> tuple[Tangent, OptimizerState, StepInfo]:
        """A step from what is known of a batch; without a loss the damping stays as it is.

        `evaluate` gives the loss of the batch at new parameters, `glance` that of a part of it
        before and after. Moments and the inverse come from the statistics, or were made
        elsewhere. The network in `at` needs no more than a likelihood and `tangent`: adapters
        to other frameworks bring one of their own.
        """
        xp, loss = at.xp, None if loss is None else _penalised(at, loss, at.params)
        moments, prepared = self._prepare(state, at, statistics) if elsewhere is None else elsewhere
        moments = moments if self.estimate.average > 0.0 else ()
        direction, prepared = self.inverse.apply(prepared, at)
        made = self.scaling.take(direction, state.previous, at)
        new = tuple(w + d for w, d in zip(at.params, made.change, strict=True))
        change, damping = made.change, state.damping
        new_loss = ratio = accepted = None
        if evaluate is not None and isinstance(self.damping, LevenbergMarquardt):
            predicted = self.damping.predicted(made, direction, at)
            new_loss = self._evaluated(at, loss, new, evaluate, glance)
            damping, ratio, accepted = self.damping.judge(loss, new_loss, predicted, at)
            if self.damping.reject:
                made_ones = accepted[..., None, None]
                new = tuple(xp.where(made_ones, a, b) for a, b in zip(new, at.params, strict=True))
                change = tuple(xp.where(made_ones, d, 0.0) for d in change)
        info = StepInfo(loss, new_loss, made.rate, state.damping, ratio, accepted, self.inverse.ranks(prepared))
        prepared = prepared if self._keeps_prepared else ()
        return new, OptimizerState(state.count + 1.0, damping, moments, prepared, change), info

    def _evaluated(self, at: Context, loss: Any, new: Tangent, evaluate: Any, glance: Any) -> Array:
        """The loss after a step; where a glance is enough, as the part of the batch says."""
        policy, xp = self.damping, at.xp
        assert isinstance(policy, LevenbergMarquardt)

        def whole() -> Array:
            return _penalised(at, evaluate(new), new)

        if glance is None or policy.every == 1 or policy.share == 1.0:
            return whole()
        before, after = glance(new, policy.share)
        change = _penalised(at, after, new) - _penalised(at, before, at.params)
        # Not "rises", so that a NaN has to be looked at. Each member's own part decides for it.
        doubtful = ~(change <= 0.0) | policy.due(at)
        return _arrays.branch(
            xp.any(doubtful), lambda: xp.where(doubtful, whole(), loss + change), lambda: loss + change
        )

    @_arrays.quiet
    def update(
        self, params: Params, state: OptimizerState | None, gradient: Params, statistics: Statistics, /
    ) -> tuple[tuple[Array, ...], OptimizerState, StepInfo]:
        """Take one step for a network that lives elsewhere, from its gradient and statistics.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters of the layers, the bias as last column (or none, without one).
        state : OptimizerState or None
            From the last update; None before the first.
        gradient : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The gradient of the loss.
        statistics : Statistics
            What came into the layers and back, as `Statistics.of` makes it. The estimate's
            way to look at a batch plays no part, its average does.

        Returns
        -------
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The new parameters.
        state : OptimizerState
            For the next update.
        info : StepInfo
            What happened; losses are not known and None. The damping stays as it is.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit each other, or the inverse or the step rule makes
            passes through the network.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
        >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
        >>> opt = ng.optimizers.foof(learning_rate=1.0, damping=0.0)
        >>> params, state, info = opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)
        >>> params
        (array([[0.2]]),)
        """
        for part in (self.inverse, self.scaling):
            if part.needs_network:
                raise ValueError(f"{part} makes passes through the network; use step, or choose another")
        given = _arrays.check_sequence("params", params, "a tuple or list with one array for each layer")
        steps = _arrays.check_sequence("gradient", gradient, "a tuple or list with one array for each layer")
        if not isinstance(statistics, Statistics):
            raise TypeError(f"statistics must be a Statistics, got {_arrays.describe(statistics)}")
        if self.inverse.needs_errors and statistics.deltas is None:
            raise ValueError(f"statistics must have errors for the inverse {self.inverse}, got none")
        named = {f"params[{i}]": w for i, w in enumerate(given)} | {f"gradient[{i}]": g for i, g in enumerate(steps)}
        _arrays.check_arrays(named | {f"statistics.rows[{i}]": rows for i, rows in enumerate(statistics.rows)})
        if not len(given) == len(steps) == len(statistics.rows):
            raise ValueError(
                f"params, gradient and statistics must be of the same layers, "
                f"got {len(given)}, {len(steps)} and {len(statistics.rows)}"
            )
        for i, (w, rows) in enumerate(zip(given, statistics.rows, strict=True)):
            _arrays.check_matrix(f"params[{i}]", w)
            _arrays.check_core(f"gradient[{i}]", steps[i], tuple(w.shape[-2:]), "like the parameters")
            _arrays.check_core(f"statistics.rows[{i}]", rows, (w.shape[-1],), "to match the columns of the parameters")
            if statistics.deltas is not None:
                delta = statistics.deltas[i]
                _arrays.check_core(
                    f"statistics.deltas[{i}]", delta, (w.shape[-2],), "to match the rows of the parameters"
                )
        if not self.estimate.has_errors:
            statistics = statistics._replace(deltas=None)
        state = self._start(given) if state is None else state
        at = self._context(None, given, None, None, steps, state)
        return self._advance(at, state, statistics, None, None)

    def _prepare(self, state: OptimizerState, at: Context, statistics: Statistics | None) -> tuple[Any, Any]:
        """The moments and the inverse that this step uses."""
        if statistics is None or not self.inverse.uses_statistics:
            return state.moments, state.prepared
        if self._works_on_samples:
            return (), self.inverse.refresh((), (), statistics, self.estimate, at)
        moments = self._averaged(state, at, self.inverse.moments(statistics, self.estimate))

        def refreshed() -> Any:
            return self.inverse.refresh(state.prepared, moments, statistics, self.estimate, at)

        if self.refresh == 1:
            return moments, refreshed()
        due = state.count % self.refresh == 0.0
        prepared = _arrays.branch(
            due, refreshed, lambda: self.inverse.follow(state.prepared, statistics, self.estimate, at)
        )
        return moments, prepared

    def _averaged(self, state: OptimizerState, at: Context, moments: Any) -> Any:
        """Moments of a batch, with those of the batches before."""
        average = self.estimate.average
        if average > 0.0 or self._keeps_prepared:
            # What all members share has batch axes of its own from here on, as the state does.
            moments = _spread(moments, self.inverse.start_moments(state.previous, self.estimate))
        if average > 0.0:
            kept = 1.0 - 1.0 / (state.count + 1.0)
            moments = weighted(state.moments, moments, at.xp.where(kept < average, kept, average))
        return moments


def _spread(values: Any, like: Any) -> Any:
    """Arrays in nested tuples, broadcast to the shapes of others."""
    if isinstance(values, tuple):
        parts = [_spread(a, b) for a, b in zip(values, like, strict=True)]
        return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
    if values is None or values.shape == like.shape:
        return values
    return _arrays.namespace(values).broadcast_to(values, tuple(like.shape)) + 0.0


def _gradient(net: Network, params: Tangent, trace: passes.Trace, y: Array) -> Tangent:
    errors = net.likelihood.residual(trace.output, y) / trace.output.shape[-2]
    return passes.collect(trace.rows, passes.backward(net.layers, params, trace, errors))


def _penalised(at: Context, loss: Array, params: Tangent) -> Array:
    """A loss with ½ η ‖θ‖²."""
    return loss + 0.5 * at.decay * dot(at.xp, params, params) if decays(at.decay) else loss


def _check(net: Network, params: Params) -> tuple[Namespace, tuple[Array, ...]]:
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, got {_arrays.describe(net)}")
    given = _arrays.check_sequence("params", params, "a tuple or list with one array for each layer")
    return _arrays.namespace(given[0]), net.check_tangent("params", given, given[0])


def _check_state(state: Any) -> None:
    if not isinstance(state, OptimizerState):
        raise TypeError(f"state must be what init or step returned, got {_arrays.describe(state)}")
