"""Closed-form dynamics against numerical integration of the equations they solve."""

from __future__ import annotations

import functools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
from backends import DASK, JAX, Backend, compiled_if_jax
from reference import Problem, case, product, relative, split, stack, well_conditioned
from scipy.integrate import solve_ivp

import natgrad_array as ng
from natgrad_array import deep_linear as dl

DEPTHS = [1, 2, 3, 5, 8]
TIMES = np.asarray([0.0, 0.01, 0.3, 1.0, 4.0, 20.0])
STARTS = np.asarray([0.0, 1e-6, 1e-3, 0.3, 1.0, 1.5, 4.0])
TARGETS = np.asarray([0.0, 0.1, 1.0, 1.5, 3.0])


def tolerance(backend: Backend, dtype: str) -> float:
    return 1e-10 if dtype == "float64" and backend.float64 else 1e-3


def integrate(slope: Any, start: np.ndarray, times: np.ndarray, rtol: float = 1e-12) -> np.ndarray:
    """States at the given times (rows), by an adaptive Runge–Kutta rule of order eight that stops at each."""
    states, now = [], 0.0
    for time in times:
        if time > now:
            solution = solve_ivp(lambda _, y: slope(y), (now, float(time)), start, "DOP853", rtol=rtol, atol=1e-14)
            assert solution.success
            start, now = solution.y[:, -1], float(time)
        states.append(start)
    return np.asarray(states)


# --------------------------------------------------------------------------------- modes


@functools.cache
def integrated_modes(depth: int) -> np.ndarray:
    """(times, starts, targets) of da/dt = L a^(2 − 2/L) (s − a)."""
    a, s = (grid.ravel() for grid in np.meshgrid(STARTS, TARGETS, indexing="ij"))
    exponent = 2.0 - 2.0 / depth
    states = integrate(lambda y: depth * np.abs(y) ** exponent * (s - y), a, TIMES)
    return states.reshape(TIMES.size, STARTS.size, TARGETS.size)


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_flow_modes_solve_their_equation(backend, dtype, depth):
    compiled_if_jax(backend)
    arrays = (STARTS[:, None], TARGETS, TIMES[:, None, None])
    initial, target, time = backend.asarrays(*(a.astype(dtype) for a in arrays))
    found = backend.call(functools.partial(dl.gradient_flow_modes, depth=depth), initial, target, time)
    backend.check(found, initial)
    tol = 1e-9 if tolerance(backend, dtype) < 1e-9 else 1e-3
    np.testing.assert_allclose(backend.to_numpy(found), integrated_modes(depth), rtol=tol, atol=tol * 1e-3)


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_flow_modes_start_rest_and_arrive(dtype, depth):
    tol = 1e-12 if dtype == "float64" else 1e-4
    start = np.asarray([0.0, 1e-30, 1e-9, 0.2, 1.0, 7.0], dtype)
    target = np.asarray([0.5, 2.0, 1.0, 1.0, 1.0, 0.3], dtype)
    np.testing.assert_allclose(dl.gradient_flow_modes(start, target, 0.0, depth=depth), start, rtol=tol)
    rest = dl.gradient_flow_modes(target, target, 3.0, depth=depth)
    np.testing.assert_allclose(rest, target, rtol=tol)
    late = dl.gradient_flow_modes(start[3:], target[3:], 1e4, depth=depth)
    np.testing.assert_allclose(late, target[3:], rtol=tol)
    if depth > 1:
        origin = np.zeros(3, dtype)
        for time in (0.0, 5.0, 1e4):
            still = dl.gradient_flow_modes(origin, np.asarray([0.0, 1.0, 9.0], dtype), time, depth=depth)
            np.testing.assert_array_equal(still, origin)


@pytest.mark.parametrize("start", [1e-6, 1e-3, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("depth", DEPTHS)
def test_time_to_reach_a_mode(depth, start):
    """Backwards from a quadrature in many digits, from starts far below and far above the target."""
    exponent = 2 - mpmath.mpf(2) / depth
    for reached in (0.5, 0.99) if start < 1.0 else (0.9 * start, 3.0, 1.01):
        corners = [
            start,
            *(mpmath.mpf(start) ** (1 - k) * mpmath.mpf(reached) ** k for k in (0.25, 0.5, 0.75)),
            reached,
        ]
        time = mpmath.quad(lambda a: 1 / (depth * a**exponent * (1 - a)), corners)
        found = dl.gradient_flow_modes(np.asarray(start), np.asarray(1.0), float(time), depth=depth)
        assert abs(float(found) / reached - 1.0) <= 1e-9
    now = dl.gradient_flow_modes(np.asarray(start), np.asarray(1.0), 0.0, depth=depth)
    assert abs(float(now) / start - 1.0) <= 1e-9


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_flow_modes_do_not_cross(depth):
    """From either side, monotone in time and never beyond the target, to the last digit."""
    times = np.linspace(0.0, 30.0, 400)
    for start, target in ((1e-4, 1.0), (0.9, 2.0), (5.0, 1.0), (1.0, 0.0), (1.0 - 1e-12, 1.0)):
        path = dl.gradient_flow_modes(np.asarray(start), np.asarray(target), times, depth=depth)
        steps = np.diff(path) * np.sign(target - start)
        assert np.all(steps >= -4e-16 * max(start, target))
        assert np.all((path - target) * np.sign(start - target) >= -4e-16 * max(start, target))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_flow_modes_in_other_units(depth, scale):
    """a and s in units of c are the same curve with time in units of c^(2/L − 2)."""
    start, target, times = np.asarray([0.1, 0.9, 2.5])[:, None], np.asarray(1.5), np.asarray([0.1, 0.5, 2.0])
    wanted = scale * dl.gradient_flow_modes(start, target, times, depth=depth)
    rescaled = times * scale ** -(2.0 - 2.0 / depth)
    found = dl.gradient_flow_modes(start * scale, target * scale, rescaled, depth=depth)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_gradient_flow_modes_on_a_plateau():
    """A small start stays small for a time that grows with depth, then moves all at once."""
    start, target = np.asarray(1e-3), np.asarray(1.0)
    for depth in (3, 5):
        exponent = 2.0 - 2.0 / depth
        takes = (1e-3 ** (1 - exponent) - 0.5 ** (1 - exponent)) / (exponent - 1) / depth
        assert float(dl.gradient_flow_modes(start, target, 0.5 * takes, depth=depth)) < 0.01
        assert float(dl.gradient_flow_modes(start, target, 2.0 * takes, depth=depth)) > 0.5


def test_modes_that_are_negative_or_nan(backend):
    """NaN there and nowhere else; one layer takes any sign."""
    values = np.asarray([0.5, -0.1, np.nan, 0.5])
    targets = np.asarray([1.0, 1.0, 1.0, -1.0])
    initial, target = backend.asarrays(values, targets)
    for depth in (2, 3):
        found = backend.to_numpy(
            backend.call(functools.partial(dl.gradient_flow_modes, depth=depth), initial, target, 0.7)
        )
        assert np.isfinite(found[0])
        assert np.all(np.isnan(found[1:]))
    found = backend.to_numpy(backend.call(functools.partial(dl.gradient_flow_modes, depth=1), initial, target, 0.7))
    wanted = targets + (values - targets) * math.exp(-0.7)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_negative_time_of_one_member_is_nan():
    times = np.asarray([0.5, -0.5, np.nan])
    one = np.ones(3)
    for found in (
        dl.gradient_flow_modes(0.3 * one, one, times, depth=3),
        dl.gradient_flow_modes(0.3 * one, one, times, depth=2),
        dl.natural_gradient_flow_modes(0.3 * one, one, times),
    ):
        np.testing.assert_array_equal(np.isnan(found), [False, True, True])


def test_natural_gradient_flow_modes(backend, dtype):
    arrays = (STARTS[:, None] - 1.0, TARGETS, TIMES[:, None, None])
    initial, target, time = backend.asarrays(*(a.astype(dtype) for a in arrays))
    found = backend.call(dl.natural_gradient_flow_modes, initial, target, time)
    backend.check(found, initial)
    a, s = (grid.ravel() for grid in np.meshgrid(STARTS - 1.0, TARGETS, indexing="ij"))
    wanted = integrate(lambda y: s - y, a, TIMES).reshape(TIMES.size, STARTS.size, TARGETS.size)
    np.testing.assert_allclose(
        backend.to_numpy(found), wanted, rtol=0, atol=1e-9 if tolerance(backend, dtype) < 1e-9 else 1e-5
    )


def test_modes_learn_at_one_rate_under_natural_gradient_only():
    start, target = np.full(3, 0.1), np.asarray([0.5, 1.0, 4.0])
    for time in (0.1, 1.0):
        natural = (target - dl.natural_gradient_flow_modes(start, target, time)) / (target - start)
        np.testing.assert_allclose(natural, math.exp(-time), rtol=1e-12)
        standard = (target - dl.gradient_flow_modes(start, target, time, depth=3)) / (target - start)
        assert np.ptp(standard) > 0.001


# ---------------------------------------------------------------------- layers that move


def flow(problem: Problem, direction: Any, times: np.ndarray, rtol: float = 1e-10) -> list[list[np.ndarray]]:
    """Layers at the given times when dW_i/dt = −direction_i."""

    def slope(theta: np.ndarray) -> np.ndarray:
        return -stack(direction(split(theta, problem.weights)))

    states = integrate(slope, stack(problem.weights), times, rtol)
    return [split(state, problem.weights) for state in states]


@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        ("wide 2", "layerwise"),
        ("wide 3", "layerwise"),
        ("dead inputs 2", "layerwise"),
        ("wide 3", "exact"),
        ("wide 3", "moore_penrose"),
        ("intermediate 3", "exact"),
        ("intermediate 2", "moore_penrose"),
    ],
)
def test_layers_under_natural_gradient_flow(name, inverse):
    """The layers move along nonlinear paths; their product goes straight to W*."""
    problem = case(name)
    task = ng.GaussianTask(*problem.moments)
    times = np.asarray([0.0, 0.2, 1.0])
    states = flow(problem, lambda w: dl.natural_gradient(w, task, inverse=inverse), times)
    start = problem.product
    for time, weights in zip(times, states, strict=True):
        wanted = dl.natural_gradient_flow(start, task, float(time))
        assert relative(problem.seen(product(weights)), problem.seen(wanted)) <= 1e-7
        excess = dl.excess_loss(weights, task)
        assert abs(float(excess) / problem.excess_loss() - math.exp(-2 * time)) <= 1e-7


def test_layerwise_rule_bends_the_path_elsewhere():
    problem = case("intermediate 3")
    task = ng.GaussianTask(*problem.moments)
    (_, weights) = flow(problem, lambda w: dl.natural_gradient(w, task), np.asarray([0.0, 1.0]))
    straight = dl.natural_gradient_flow(problem.product, task, 1.0)
    assert relative(problem.seen(product(weights)), problem.seen(straight)) > 0.01


def test_natural_gradient_flow(backend, dtype):
    compiled_if_jax(backend)
    problem = case("wide 3")
    _, moments = problem.on(backend, dtype)
    start = np.random.default_rng(0).standard_normal((2, 3, 4))
    times = np.asarray([0.3, 2.0])
    given = backend.asarray(start.astype(dtype))
    found = backend.call(
        lambda w, m, t: dl.natural_gradient_flow(w, ng.GaussianTask(*m), t),
        given,
        moments,
        backend.asarray(times.astype(dtype)),
    )
    backend.check(found, given)
    for k in range(2):
        wanted = problem.optimum() + math.exp(-times[k]) * (start[k] - problem.optimum())
        assert relative(backend.to_numpy(found)[k], wanted) <= tolerance(backend, dtype)


def test_directions_that_inputs_never_move_in_stay():
    problem = case("dead inputs 2")
    task = ng.GaussianTask(*problem.moments)
    start = np.random.default_rng(0).standard_normal((4, 6))
    late = dl.natural_gradient_flow(start, task, 50.0)
    values, vectors = np.linalg.eigh(problem.input_moment)
    dead = vectors[:, values < 1e-9]
    assert dead.shape[1] == 2
    np.testing.assert_allclose(late @ dead, start @ dead, atol=1e-12)
    assert relative(problem.seen(late), problem.seen(problem.optimum())) <= 1e-12
    np.testing.assert_array_equal(dl.natural_gradient_flow(start, task, 0.0), start)


def orthonormal(n: int, k: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0][:, :k]


@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (4, 3, 3, 3), (3, 4, 5, 4, 4, 4)], ids=str)
def test_layers_under_gradient_flow(sizes):
    """White inputs, an aligned balanced start: every mode follows the scalar equation, at every depth."""
    depth, modes = len(sizes) - 1, min(sizes)
    left, right = orthonormal(sizes[-1], modes, 1), orthonormal(sizes[0], modes, 2)
    target, start = np.asarray([2.0, 1.0, 0.4]), np.asarray([0.3, 0.05, 0.9])
    task = ng.GaussianTask.from_modes(left, target, right)
    weights = dl.balanced(0, sizes, like=np.empty(0), end_to_end=(left * start) @ right.T)
    eye_in, eye_out = np.eye(sizes[0]), np.eye(sizes[-1])
    cross = (left * target) @ right.T
    problem = Problem(weights, eye_in, eye_out, cross, cross @ cross.T + eye_out)
    times = np.asarray([0.0, 0.1, 0.5, 2.0])

    def direction(layers: list[np.ndarray]) -> list[np.ndarray]:
        return Problem(tuple(layers), *problem.moments).gradient()

    for time, layers in zip(times, flow(problem, direction, times), strict=True):
        seen = left.T @ product(layers) @ right
        wanted = dl.gradient_flow_modes(start, target, float(time), depth=depth)
        np.testing.assert_allclose(seen, np.diag(wanted), atol=1e-8)
        for gap in dl.balancedness(layers):
            assert np.max(np.abs(gap)) <= 1e-8
        for a, b in zip(dl.gradient(layers, task), direction(layers), strict=True):
            assert np.linalg.norm(a - b) <= 1e-10


@pytest.mark.parametrize("rule", ["gradient", "moore_penrose"])
def test_what_flows_conserve(rule):
    """W_{i+1}ᵀW_{i+1} − W_iW_iᵀ of an unbalanced network, on inputs that are not white."""
    problem = well_conditioned((4, 5, 4, 3), seed=3)
    task = ng.GaussianTask(*problem.moments)

    def direction(layers: list[np.ndarray]) -> Any:
        return dl.gradient(layers, task) if rule == "gradient" else dl.natural_gradient(layers, task, inverse=rule)

    (_, layers) = flow(problem, direction, np.asarray([0.0, 0.3]))
    assert relative(stack(layers), stack(problem.weights)) > 0.05
    for before, after in zip(dl.balancedness(problem.weights), dl.balancedness(layers), strict=True):
        assert np.max(np.abs(before)) > 0.1
        np.testing.assert_allclose(after, before, atol=1e-7)


def test_layerwise_flow_does_not_conserve_them():
    problem = well_conditioned((4, 5, 4, 3), seed=3)
    task = ng.GaussianTask(*problem.moments)
    (_, layers) = flow(problem, lambda w: dl.natural_gradient(w, task), np.asarray([0.0, 0.3]))
    gaps = [b - a for a, b in zip(dl.balancedness(problem.weights), dl.balancedness(layers), strict=True)]
    assert max(float(np.max(np.abs(gap))) for gap in gaps) > 0.01


# ------------------------------------------------------------------------------ Euler steps


@pytest.mark.parametrize(
    ("name", "inverse"), [("wide 3", "layerwise"), ("dead inputs 2", "layerwise"), ("intermediate 3", "exact")]
)
@pytest.mark.parametrize("learning_rate", [0.02, 0.1, 0.3])
def test_decay_rate_of_euler_steps(name, inverse, learning_rate):
    problem = case(name)
    task = ng.GaussianTask(*problem.moments)
    weights, losses = problem.weights, []
    steps = int(14.0 / learning_rate)
    for _ in range(steps):
        losses.append(float(dl.excess_loss(weights, task)))
        direction = dl.natural_gradient(weights, task, inverse=inverse)
        weights = tuple(w - learning_rate * d for w, d in zip(weights, direction, strict=True))
    late = np.arange(steps // 2, steps)
    slope = np.polyfit(learning_rate * late, np.log(np.asarray(losses)[late]), 1)[0]
    assert losses[-1] > 1e-26
    assert abs(-slope / dl.euler_decay_rate(learning_rate) - 1.0) < 0.01


def test_euler_decay_rate():
    for rate in (1e-8, 0.01, 0.5, 0.99):
        wanted = -2.0 * math.log1p(-rate) / rate
        assert abs(dl.euler_decay_rate(rate) / wanted - 1.0) <= 1e-15
    assert isinstance(dl.euler_decay_rate(0.1), float)
    assert abs(dl.euler_decay_rate(1e-12) - 2.0) <= 1e-11


def test_euler_decay_rate_of_a_sweep(backend, dtype):
    rates = np.asarray([0.01, 0.1, 0.5, 0.9])
    given = backend.asarray(rates.astype(dtype))
    found = backend.call(dl.euler_decay_rate, given)
    backend.check(found, given)
    np.testing.assert_allclose(
        backend.to_numpy(found), -2 * np.log1p(-rates) / rates, rtol=1e-6 if tolerance(backend, dtype) > 1e-9 else 1e-14
    )
    lazily = dl.euler_decay_rate(DASK.asarray(rates))
    np.testing.assert_allclose(DASK.to_numpy(lazily), -2 * np.log1p(-rates) / rates, rtol=1e-14)


# -------------------------------------------------------------------------------- bad input

ONE, TWO = np.ones(3), 2 * np.ones(3)
EYE = np.eye(2)
TASK = ng.GaussianTask(EYE, EYE, EYE, 2 * EYE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: dl.gradient_flow_modes([0.5], TWO, 1.0, depth=2),
            TypeError,
            r"initial must be an array .* got a list",
        ),
        (
            lambda: dl.gradient_flow_modes(0.5, TWO, 1.0, depth=2),
            TypeError,
            r"initial must be an array .* got float 0.5",
        ),
        (
            lambda: dl.gradient_flow_modes(ONE, 2.0, 1.0, depth=2),
            TypeError,
            r"target must be an array .* got float 2.0",
        ),
        (lambda: dl.gradient_flow_modes(ONE.astype(int), TWO, 1.0, depth=2), TypeError, r"initial must have dtype"),
        (
            lambda: dl.gradient_flow_modes(ONE, TWO.astype(np.float32), 1.0, depth=2),
            TypeError,
            r"target has dtype float32",
        ),
        (lambda: dl.gradient_flow_modes(ONE, TWO, -1.0, depth=2), ValueError, r"time must be at least 0, got -1.0"),
        (
            lambda: dl.gradient_flow_modes(ONE, TWO, float("nan"), depth=2),
            ValueError,
            r"time must be at least 0, got nan",
        ),
        (lambda: dl.gradient_flow_modes(ONE, TWO, "1", depth=2), TypeError, r"time must be a number or an array"),
        (
            lambda: dl.gradient_flow_modes(ONE, TWO, 1.0, depth=0),
            ValueError,
            r"depth must be a positive integer, got 0",
        ),
        (
            lambda: dl.gradient_flow_modes(ONE, TWO, 1.0, depth=2.0),
            ValueError,
            r"depth must be a positive integer, got 2.0",
        ),
        (
            lambda: dl.gradient_flow_modes(ONE, TWO, 1.0, depth=True),
            ValueError,
            r"depth must be a positive integer, got True",
        ),
        (
            lambda: dl.gradient_flow_modes(ONE, np.ones(4), 1.0, depth=2),
            ValueError,
            r"broadcast, got initial: \(3,\), target: \(4,\)",
        ),
        (lambda: dl.gradient_flow_modes(ONE, TWO, np.ones(4), depth=2), ValueError, r"broadcast.*time: \(4,\)"),
        (lambda: dl.natural_gradient_flow_modes([0.5], TWO, 1.0), TypeError, r"initial must be an array"),
        (lambda: dl.natural_gradient_flow_modes(ONE, TWO, -0.1), ValueError, r"time must be at least 0, got -0.1"),
        (lambda: dl.natural_gradient_flow_modes(ONE, np.ones(4), 1.0), ValueError, r"broadcast, got initial"),
        (lambda: dl.natural_gradient_flow([[1.0]], TASK, 1.0), TypeError, r"end_to_end must be an array"),
        (lambda: dl.natural_gradient_flow(EYE, EYE, 1.0), TypeError, r"task must be a GaussianTask, got a numpy array"),
        (
            lambda: dl.natural_gradient_flow(np.ones((2, 3)), TASK, 1.0),
            ValueError,
            r"end_to_end must have shape \(\*batch, 2, 2\)",
        ),
        (lambda: dl.natural_gradient_flow(EYE, TASK, -1.0), ValueError, r"time must be at least 0, got -1.0"),
        (lambda: dl.natural_gradient_flow(EYE, TASK, None), TypeError, r"time must be a number or an array"),
        (
            lambda: dl.natural_gradient_flow(EYE.astype(np.float32), TASK, 1.0),
            TypeError,
            r"has dtype float64, but end_to_end has dtype float32",
        ),
        (lambda: dl.natural_gradient_flow(np.ones((3, 2, 2)), TASK, np.ones(4)), ValueError, r"broadcast|time"),
        (lambda: dl.euler_decay_rate(0.0), ValueError, r"learning_rate must be between 0 and 1, got 0.0"),
        (lambda: dl.euler_decay_rate(1.0), ValueError, r"learning_rate must be between 0 and 1, got 1.0"),
        (lambda: dl.euler_decay_rate(-0.1), ValueError, r"learning_rate must be between 0 and 1"),
        (lambda: dl.euler_decay_rate(float("nan")), ValueError, r"learning_rate must be between 0 and 1"),
        (lambda: dl.euler_decay_rate("fast"), TypeError, r"learning_rate must be .* got str 'fast'"),
        (lambda: dl.euler_decay_rate([0.1]), TypeError, r"learning_rate must be .* got a list"),
        (lambda: dl.euler_decay_rate(np.asarray([1, 2])), TypeError, r"learning_rate must have dtype"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mixed_libraries():
    with pytest.raises(TypeError, match="one library"):
        dl.gradient_flow_modes(ONE, JAX.asarray(TWO), 1.0, depth=2)
    with pytest.raises(TypeError, match="one library"):
        dl.natural_gradient_flow(JAX.asarray(EYE), TASK, 1.0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
def test_modes_at_infinite_time_are_at_their_fixed_points(depth: int) -> None:
    """Nothing grows from zero beyond one layer, where zero is a fixed point; all else ends at the target."""
    initial, target = np.asarray([0.1, 0.0, 2.0, 0.0, 3.0]), np.asarray([1.0, 1.0, 1.0, 0.0, 0.0])
    ends = np.where((initial == 0.0) & (depth > 1), 0.0, target)
    np.testing.assert_allclose(dl.gradient_flow_modes(initial, target, np.inf, depth=depth), ends, atol=1e-15)
