"""Closed forms of learning: natural gradient flow and gradient flow."""

from __future__ import annotations

import cmath
import math
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear.task import GaussianTask


@_arrays.quiet
def natural_gradient_flow(end_to_end: Array, task: GaussianTask, time: float | Array, /) -> Array:
    r"""End-to-end matrix under natural gradient flow, W* + exp(−t)(W_0 − W*).

    Parameters
    ----------
    end_to_end : array, shape (*batch, n_L, n_0)
        W_0, the product of the layers at time zero.
    task : GaussianTask
        What the network learns.
    time : float or array of shape (*batch,)
        Time since then, in units of the learning rate: steps times step size.

    Returns
    -------
    array, shape (*batch, n_L, n_0)
        W(t). Directions in which the inputs never move stay as they were.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit the task, or `time` is negative.

    Notes
    -----
    The solution of Eq 30 of Bernacchia, Lengyel and Hennequin (2018), supplement. It holds
    for every natural gradient of a network without a bottleneck, and for the layerwise
    rule in the wide regime. The excess loss falls as exp(−2t).

    Examples
    --------
    >>> import math
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> ng.deep_linear.natural_gradient_flow(one, task, math.log(2.0))
    array([[1.5]])
    """
    if not isinstance(task, GaussianTask):
        raise TypeError(f"task must be a GaussianTask, got {_arrays.describe(task)}")
    xp = _arrays.check_arrays({"end_to_end": end_to_end, "task": task.cross_moment})
    _arrays.check_core("end_to_end", end_to_end, (task.n_outputs, task.n_inputs), "(outputs, inputs) of the task")
    time = _arrays.check_nonnegative("time", time, xp, end_to_end, core_ndim=2)
    factors = task.factors
    error = factors.target - factors.whiten(end_to_end @ factors.input_root)
    moved = math.expm1(-time) if isinstance(time, float) else xp.expm1(-time)
    return end_to_end - moved * factors.unwhiten(error @ factors.input_root_pinv)


@_arrays.quiet
def natural_gradient_flow_modes(initial: Array, target: Array, time: float | Array, /) -> Array:
    r"""Modes under natural gradient flow, da/dt = s − a.

    Parameters
    ----------
    initial : array, shape (*batch,)
        Modes a at time zero.
    target : array, shape (*batch,)
        Singular values s of the optimum.
    time : float or array of shape (*batch,)
        Time since then.

    Returns
    -------
    array, shape (*batch,)
        a(t). Every mode is learned at the same rate, at every depth.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a floating array, or `time` is negative.

    Notes
    -----
    Eq 30 of Bernacchia, Lengyel and Hennequin (2018), supplement, mode by mode.

    Examples
    --------
    >>> import math
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.natural_gradient_flow_modes(np.asarray([0.0]), np.asarray([3.0]), math.log(3.0))
    array([2.])
    """
    xp, time = _check_modes(initial, target, time)
    return initial - (target - initial) * xp.expm1(-time)


@_arrays.quiet
def gradient_flow_modes(initial: Array, target: Array, time: float | Array, /, *, depth: int) -> Array:
    r"""Modes of an aligned balanced network under gradient flow.

    They obey :math:`da/dt = L a^{2 - 2/L} (s - a)` where inputs are white and the
    network's singular vectors are those of the optimum.

    Parameters
    ----------
    initial : array, shape (*batch,)
        Modes a at time zero, at least 0 (of any sign for one layer).
    target : array, shape (*batch,)
        Singular values s of the optimum, at least 0.
    time : float or array of shape (*batch,)
        Time since then.
    depth : int
        L, the number of layers.

    Returns
    -------
    array, shape (*batch,)
        a(t), NaN where a mode is negative. For one layer an exponential, for two a
        logistic curve; beyond, the time at which a mode is reached has a closed form, which
        is inverted by bisection to the last digit.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a floating array, `time` is negative, or `depth` is not a
        positive integer.

    Notes
    -----
    Saxe, McClelland and Ganguli (2014), for noise of unit covariance. Natural gradient
    removes the factor :math:`L a^{2-2/L}`: `natural_gradient_flow_modes`.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.gradient_flow_modes(np.asarray([0.5]), np.asarray([1.0]), 0.0, depth=3)
    array([0.5])
    """
    xp, time = _check_modes(initial, target, time)
    if not _arrays.is_integer(depth) or depth < 1:
        raise ValueError(f"depth must be a positive integer, got {depth!r}")
    if depth == 1:
        return initial - (target - initial) * xp.expm1(-time)
    valid = (initial >= 0.0) & (target >= 0.0)
    a = xp.where(valid, initial, xp.nan)
    learned = target > 0.0
    s = xp.where(learned, target, 1.0)
    # Without a target a mode decays by a power law, which is also the limit of the rest.
    power = 2.0 - 2.0 / depth
    faded = a / (1.0 + power * depth * time * a**power) ** (1.0 / power)
    if depth == 2:
        due = 2.0 * s * time
        rest = xp.exp(-due)
        span = xp.where(due > 0.0, -xp.expm1(-due) / s, 2.0 * time)
        # Nothing grows from zero, not even when the exponential underflows.
        grown = a / xp.where((a == 0.0) & (rest == 0.0), 1.0, rest + a * span)
    else:
        # Far above its target a mode does not feel it yet.
        learned = learned & (faded * _arrays.eps(xp, a) < s)
        start = xp.where(learned, a / s, a)
        grown = s * _invert_time(xp, start ** (1.0 / depth), s**power * time, depth) ** depth
    # A mode at zero stays there, for ever too.
    return xp.where(a == 0.0, a, xp.where(learned, grown, faded))


def euler_decay_rate(learning_rate: float | Array, /) -> Any:
    r"""Decay rate of the excess loss under Euler steps of natural gradient.

    Parameters
    ----------
    learning_rate : float or array
        Step size η, between 0 and 1.

    Returns
    -------
    float or array
        :math:`-2 \ln(1 - \eta) / \eta` per unit of time η · steps: 2 for small steps. NaN
        where an entry of an array is not between 0 and 1.

    Raises
    ------
    TypeError, ValueError
        If it is neither a number nor a floating array, or a number not between 0 and 1.

    Notes
    -----
    Each step shrinks W − W* by 1 − η, up to second order in the motion of the layers,
    which vanishes as the network converges.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> round(ng.deep_linear.euler_decay_rate(0.1), 4)
    2.1072
    """
    if isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool):
        if not 0.0 < learning_rate < 1.0:
            raise ValueError(f"learning_rate must be between 0 and 1, got {learning_rate}")
        return -2.0 * math.log1p(-learning_rate) / learning_rate
    xp = _arrays.check_arrays({"learning_rate": learning_rate})
    learning_rate = xp.where((learning_rate > 0.0) & (learning_rate < 1.0), learning_rate, xp.nan)
    return -2.0 * xp.log1p(-learning_rate) / learning_rate


def _check_modes(initial: Array, target: Array, time: float | Array) -> tuple[Namespace, Array]:
    xp = _arrays.check_arrays({"initial": initial, "target": target})
    time = _arrays.check_nonnegative("time", time, xp, initial)
    if isinstance(time, float):
        time = _arrays.asarray_like(xp, time, initial)
    _arrays.broadcast_batch({"initial": tuple(initial.shape), "target": tuple(target.shape), "time": tuple(time.shape)})
    return xp, time


def _invert_time(xp: Namespace, start: Array, elapsed: Array, depth: int) -> Array:
    """Solve x' = x^{L−1} (1 − x^L) from x = start > 0 for the x reached after `elapsed`.

    Bisection in ln x, between where it starts and its fixed point 1. Zero stays zero.
    """
    alive = start > 0.0
    first = xp.log(xp.where(alive, start, 1.0)) + xp.zeros_like(elapsed)
    due = _time_to_reach(xp, first, depth) + elapsed
    rising = first < 0.0
    rounds = xp.zeros((), dtype=first.dtype, device=_arrays.device(first))
    limit = -math.log2(_arrays.eps(xp, first)) + 8.0

    def unfinished(state: tuple[Array, ...]) -> Array:
        return state[2] < limit

    def halve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        near, far, rounds = state
        middle = 0.5 * (near + far)
        early = _time_to_reach(xp, middle, depth) < due
        return xp.where(early, middle, near), xp.where(early, far, middle), rounds + 1.0

    near, far, _ = _arrays.while_loop(unfinished, halve, (first, xp.zeros_like(first), rounds))
    x = xp.exp(0.5 * (near + far))
    x = xp.where(rising | (first > 0.0), x, 1.0)
    return xp.where(xp.isnan(start + elapsed), xp.nan, xp.where(alive, x, 0.0))


def _time_to_reach(xp: Namespace, log_x: Array, depth: int) -> Array:
    """The antiderivative of 1 / (x^{L−1} (1 − x^L)) for L ≥ 3: partial fractions, and beyond x = 2 a series.

    Far from 1 the partial fractions cancel; there the integrand is −Σ_k x^{−(2L−1)−kL}.
    """
    near = xp.where(log_x < math.log(2.0), log_x, 0.5 * math.log(2.0))
    x = xp.exp(near)
    close = xp.exp((2 - depth) * near) / (2 - depth)
    gap = xp.abs(xp.expm1(near))
    close = close - xp.where(gap > 0.0, xp.log(xp.where(gap > 0.0, gap, 1.0)), -xp.inf) / depth
    for angle in (2.0 * math.pi * k / depth for k in range(1, depth)):
        real, imaginary = 1.0 - math.cos(angle) * x, math.sin(angle) * x
        log_modulus = 0.5 * xp.log(real * real + imaginary * imaginary)
        close = close - (math.cos(2 * angle) * log_modulus - math.sin(2 * angle) * xp.atan2(imaginary, real)) / depth
    far = xp.where(log_x < math.log(2.0), math.log(2.0), log_x)
    exponents = [2 * depth - 2 + k * depth for k in range(56 // depth + 2)]
    distant = sum(xp.exp(-power * far) / power for power in exponents)
    # Both start from the same zero: x = 2 in the one is x = 2 in the other.
    seam = _partial_fractions_at_two(depth) - sum(2.0**-power / power for power in exponents)
    return xp.where(log_x < math.log(2.0), close - seam, distant)


def _partial_fractions_at_two(depth: int) -> float:
    """The partial fractions of `_time_to_reach` at x = 2."""
    total = 2.0 ** (2 - depth) / (2 - depth)
    for angle in (2.0 * math.pi * k / depth for k in range(1, depth)):
        value = cmath.log(1.0 - 2.0 * cmath.exp(-1j * angle))
        total -= (cmath.exp(2j * angle) * value).real / depth
    return total
