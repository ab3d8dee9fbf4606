"""One step of an optimizer: what each of its choices does, and in which order.

Functions of an `Optimizer`, whose methods check what comes and call them; so do those who make
a step in parts, on other machines or with passes through a network of another framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.networks import passes
from natgrad_array.networks.network import Network, Params
from natgrad_array.optimizers.estimates import Statistics, weighted
from natgrad_array.optimizers.inverses import Context, Tangent
from natgrad_array.optimizers.steps import LevenbergMarquardt, decays, dot, part_size

if TYPE_CHECKING:
    from natgrad_array.optimizers.optimizer import Optimizer


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

    Examples
    --------
    A state is arrays in nested tuples, so that it can be kept, and gone back to.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 1.0]]),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[4.0], [7.0]])
    >>> opt = ng.optimizers.sgd(learning_rate=0.5, momentum=0.9)
    >>> start = opt.init(net, params)
    >>> _, state, _ = opt.step(net, params, start, x, y)
    >>> state.previous
    (array([[0.25, 0.25]]),)
    >>> int(start.count), int(state.count)
    (0, 1)
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

    Examples
    --------
    The quadratic model of linear regression is exact: the loss falls by what was predicted, and the
    damping to two thirds.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[3.0], [7.0]])
    >>> opt = ng.optimizers.Optimizer(
    ...     inverse=ng.optimizers.FullFisher(), damping=ng.optimizers.LevenbergMarquardt(3.0, reject=True)
    ... )
    >>> params, state, info = opt.step(net, params, opt.init(net, params), x, y)
    >>> bool(info.new_loss < info.loss), bool(np.isclose(info.ratio, 1.0)), bool(info.accepted)
    (True, True, True)
    >>> float(info.damping), float(state.damping)
    (3.0, 2.0)
    """

    loss: Any
    new_loss: Any
    rate: Any
    damping: Any
    ratio: Any
    accepted: Any
    ranks: Any


def keeps_prepared(opt: Optimizer) -> bool:
    """Whether what the inverse makes of moments is needed in another step."""
    return opt.inverse.remembers or opt.refresh > 1


def works_on_samples(opt: Optimizer) -> bool:
    """Whether moments are not needed: nothing is averaged or kept, and the inverse has another way."""
    return opt.inverse.looks_at_samples and opt.estimate.average == 0.0 and not keeps_prepared(opt)


def start(opt: Optimizer, given: tuple[Array, ...]) -> OptimizerState:
    """Make the state before the first step."""
    xp = _arrays.namespace(given[0])
    batch = _arrays.broadcast_batch({str(i): tuple(w.shape[:-2]) for i, w in enumerate(given)})
    zeros = tuple(xp.zeros((*batch, *w.shape[-2:]), dtype=w.dtype, device=_arrays.device(w)) for w in given)
    damping = opt.damping.start(xp, xp.sum(zeros[0], axis=(-2, -1)))
    count = xp.zeros((), dtype=given[0].dtype, device=_arrays.device(given[0]))
    moments = opt.inverse.start_moments(zeros, opt.estimate) if opt.estimate.average > 0.0 else ()
    prepared = opt.inverse.start(zeros, opt.estimate) if keeps_prepared(opt) else ()
    return OptimizerState(count, damping, moments, prepared, zeros)


def step(
    opt: Optimizer,
    net: Network,
    given: Tangent,
    state: OptimizerState,
    x: Array,
    y: Array,
    rng: Any,
    gradient: Tangent | None,
) -> tuple[Tangent, OptimizerState, StepInfo]:
    """Take a step with a gradient of the caller's, or with that of the loss."""
    trace = net.forward(given, x)
    loss = net.likelihood.loss(trace.output, y)
    gradient = gradient_of(net, given, trace, y) if gradient is None else gradient
    at = context(opt, net, given, x, trace, gradient, state)
    statistics = opt.estimate.observe(net, given, trace, y, rng) if opt.inverse.uses_statistics else None

    def evaluate(new: Tangent) -> Array:
        return net.likelihood.loss(net.output(new, x), y)

    def glance(new: Tangent, share: float) -> tuple[Array, Array]:
        part = slice(part_size(trace, share))
        some = x[(..., part, *(slice(None),) * len(net.layers[0].input_shape))]
        targets = y[..., part] if net.likelihood.name == "categorical" else y[..., part, :]
        before = net.likelihood.loss(trace.output[..., part, :], targets)
        return before, net.likelihood.loss(net.output(new, some), targets)

    return advance(opt, at, state, statistics, loss, evaluate, glance)


def context(
    opt: Optimizer, net: Any, params: Tangent, x: Any, trace: Any, gradient: Tangent, state: OptimizerState
) -> Context:
    """Where the optimizer is, with the weight decay in the gradient."""
    xp, like = _arrays.namespace(state.damping), state.damping
    decay = _arrays.check_nonnegative("weight_decay", opt.weight_decay, xp, like, batch=tuple(like.shape))
    if decays(decay):
        decay = decay + xp.zeros_like(like)
        gradient = tuple(g + decay[..., None, None] * w for g, w in zip(gradient, params, strict=True))
    return Context(net, params, x, trace, gradient, like, state.count, state.previous, decay)


def advance(
    opt: Optimizer,
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
    moments, prepared = prepare(opt, state, at, statistics) if elsewhere is None else elsewhere
    moments = moments if opt.estimate.average > 0.0 else ()
    direction, prepared = opt.inverse.apply(prepared, at)
    made = opt.scaling.take(direction, state.previous, at)
    new = tuple(w + d for w, d in zip(at.params, made.change, strict=True))
    change, damping = made.change, state.damping
    new_loss = ratio = accepted = None
    if evaluate is not None and isinstance(opt.damping, LevenbergMarquardt):
        predicted = opt.damping.predicted(made, direction, at)
        new_loss = _evaluated(opt, at, loss, new, evaluate, glance)
        damping, ratio, accepted = opt.damping.judge(loss, new_loss, predicted, at)
        if opt.damping.reject:
            made_ones = accepted[..., None, None]
            new = tuple(xp.where(made_ones, a, b) for a, b in zip(new, at.params, strict=True))
            change = tuple(xp.where(made_ones, d, 0.0) for d in change)
    info = StepInfo(loss, new_loss, made.rate, state.damping, ratio, accepted, opt.inverse.ranks(prepared))
    prepared = prepared if keeps_prepared(opt) else ()
    return new, OptimizerState(state.count + 1.0, damping, moments, prepared, change), info


def _evaluated(opt: Optimizer, at: Context, loss: Any, new: Tangent, evaluate: Any, glance: Any) -> Array:
    """The loss after a step; where a glance is enough, as the part of the batch says."""
    policy, xp = opt.damping, at.xp
    assert isinstance(policy, LevenbergMarquardt)

    def whole() -> Array:
        return _penalised(at, evaluate(new), new)

    if glance is None or policy.every == 1 or policy.share == 1.0:
        return whole()
    before, after = glance(new, policy.share)
    change = _penalised(at, after, new) - _penalised(at, before, at.params)
    # Not "rises", so that a NaN has to be looked at. Each member's own part decides for it.
    doubtful = ~(change <= 0.0) | policy.due(at)
    return _arrays.branch(xp.any(doubtful), lambda: xp.where(doubtful, whole(), loss + change), lambda: loss + change)


def prepare(opt: Optimizer, state: OptimizerState, at: Context, statistics: Statistics | None) -> tuple[Any, Any]:
    """The moments and the inverse that this step uses."""
    if statistics is None or not opt.inverse.uses_statistics:
        return state.moments, state.prepared
    if works_on_samples(opt):
        return (), opt.inverse.refresh((), (), statistics, opt.estimate, at)
    moments = averaged(opt, state, at, opt.inverse.moments(statistics, opt.estimate))

    def refreshed() -> Any:
        return opt.inverse.refresh(state.prepared, moments, statistics, opt.estimate, at)

    if opt.refresh == 1:
        return moments, refreshed()
    due = state.count % opt.refresh == 0.0
    prepared = _arrays.branch(due, refreshed, lambda: opt.inverse.follow(state.prepared, statistics, opt.estimate, at))
    return moments, prepared


def averaged(opt: Optimizer, state: OptimizerState, at: Context, moments: Any) -> Any:
    """Moments of a batch, with those of the batches before."""
    average = opt.estimate.average
    if average > 0.0 or keeps_prepared(opt):
        # What all members share has batch axes of its own from here on, as the state does.
        moments = _spread(moments, opt.inverse.start_moments(state.previous, opt.estimate))
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


def gradient_of(net: Network, params: Tangent, trace: passes.Trace, y: Array) -> Tangent:
    """The gradient of the loss, from a forward pass."""
    errors = net.likelihood.residual(trace.output, y) / trace.output.shape[-2]
    return passes.collect(trace.rows, passes.backward(net.layers, params, trace, errors))


def _penalised(at: Context, loss: Array, params: Tangent) -> Array:
    """A loss with ½ η ‖θ‖²."""
    return loss + 0.5 * at.decay * dot(at.xp, params, params) if decays(at.decay) else loss


def check_network(net: Network, params: Params) -> tuple[Namespace, tuple[Array, ...]]:
    """Return the namespace and the parameters as a tuple, if there is a network and they fit it."""
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, got {_arrays.describe(net)}")
    given = _arrays.check_sequence("params", params, "a tuple or list with one array for each layer")
    return _arrays.namespace(given[0]), net.check_tangent("params", given, given[0])


def check_state(state: Any) -> None:
    """Raise unless this is a state."""
    if not isinstance(state, OptimizerState):
        raise TypeError(f"state must be what init or step returned, got {_arrays.describe(state)}")
