"""An optimizer: an estimate, an inverse, a step rule and a damping policy, put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.networks.network import Network, Params
from natgrad_array.optimizers import stepping
from natgrad_array.optimizers.estimates import Estimate, InputsOnly, Statistics
from natgrad_array.optimizers.inverses import Identity, Inverse
from natgrad_array.optimizers.preconditioner import Preconditioner
from natgrad_array.optimizers.stepping import OptimizerState, StepInfo, check_network, check_state
from natgrad_array.optimizers.steps import Damping, Fixed, Scaling


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
        If a choice is of the wrong kind, `refresh` is not a positive integer, or the weight
        decay is neither a number of at least 0 nor an array. One that does not broadcast to
        the ensemble raises in a step.

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
        _arrays.check_setting("weight_decay", self.weight_decay)

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

        Examples
        --------
        An ensemble of five, each with a damping of its own.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((2, 3, 1))
        >>> state = ng.optimizers.kfac(damping=0.5).init(net, net.init(0, (5,), like=np.empty(0)))
        >>> state.damping
        array([0.5, 0.5, 0.5, 0.5, 0.5])
        """
        _, given = check_network(net, params)
        return stepping.start(self, given)

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

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 1.0]]),)
        >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[4.0], [7.0]])
        >>> net.gradient(params, x, y)
        (array([[-0.5, -0.5]]),)
        >>> opt = ng.optimizers.sgd(learning_rate=0.5)
        >>> params, state, info = opt.step(net, params, opt.init(net, params), x, y)
        >>> params, float(info.loss), int(state.count)
        ((array([[2.25, 1.25]]),), 0.25, 1)
        """
        _, given = check_network(net, params)
        check_state(state)
        return stepping.step(self, net, given, state, x, y, rng, None)

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
        _, given = check_network(net, params)
        check_state(state)
        trace = net.forward(given, x)
        at = stepping.context(self, net, given, x, trace, stepping.gradient_of(net, given, trace, y), state)
        statistics = self.estimate.observe(net, given, trace, y, rng) if self.inverse.uses_statistics else None
        moments, prepared = stepping.prepare(self, state, at, statistics)
        if statistics is not None and stepping.works_on_samples(self):
            moments = self.inverse.moments(statistics, self.estimate)
        return Preconditioner(self.inverse, moments, prepared, at)

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
        for part, needs in ((self.inverse, self.inverse.needs_network), (self.scaling, self.scaling.needs_products)):
            if needs:
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
        state = stepping.start(self, given) if state is None else state
        at = stepping.context(self, None, given, None, None, steps, state)
        return stepping.advance(self, at, state, statistics, None, None)
