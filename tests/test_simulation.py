"""Simulations against closed forms, on every library: order of convergence, what is recorded, who is frozen."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, NUMPY, Backend
from cases import orthogonal

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array.simulation import run

JAX = next(backend for backend in BACKENDS if backend.name == "jax")
EAGER = [backend for backend in BACKENDS if not backend.jit]
RULES = ("layerwise", "exact", "moore_penrose", "block_diagonal", "gradient")
TARGET = np.asarray([3.0, 2.0, 0.7])
START = np.asarray([0.4, 1.0, 1.6])


@pytest.fixture(params=EAGER, ids=str)
def library(request: pytest.FixtureRequest) -> Any:
    """A simulation decides for itself what is compiled: each library but traced JAX."""
    chosen: Backend = request.param
    chosen.activate()
    yield chosen
    chosen.deactivate()


def bases() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return orthogonal(rng, 3), orthogonal(rng, 4)[:, :3]


def teacher() -> tuple[np.ndarray, ...]:
    """Moments of a task with white inputs and unit noise, whose optimum has the modes `TARGET`."""
    u, v = bases()
    cross = (u * TARGET) @ v.T
    return np.eye(4), np.eye(3), cross, cross @ cross.T + np.eye(3)


def aligned(depth: int, start: np.ndarray = START, batch: int = 2) -> tuple[np.ndarray, ...]:
    """Balanced networks with the modes `start` along those of the target, in different hidden bases."""
    u, v = bases()
    product = np.broadcast_to((u * start) @ v.T, (batch, 3, 4))
    return dl.balanced(3, (4, *(5,) * (depth - 1), 3), (batch,), like=product, end_to_end=product)


def random_network(sizes: tuple[int, ...], batch: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Layers with singular values between 0.7 and 1.3."""
    rng = np.random.default_rng(seed)
    layers = []
    for n, m in itertools.pairwise(sizes):
        u, _, vh = np.linalg.svd(rng.standard_normal((*batch, m, n)), full_matrices=False)
        layers.append((u * rng.uniform(0.7, 1.3, (*batch, 1, min(m, n)))) @ vh)
    return tuple(layers)


def random_task(n_in: int, n_out: int, seed: int = 1, batch: tuple[int, ...] = ()) -> ng.GaussianTask:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, 50, n_in))
    y = x @ rng.standard_normal((n_in, n_out)) + rng.standard_normal((*batch, 50, n_out))
    noise = np.diag(np.linspace(0.5, 1.5, n_out))
    return ng.GaussianTask.from_samples(x, y, noise_covariance=noise)


def saxe(depth: int, times: np.ndarray) -> np.ndarray:
    """The modes of gradient flow by quadrature of da/dt = L a^(2 − 2/L)(s − a), (times, modes)."""
    from scipy.integrate import solve_ivp

    def slope(_: float, a: np.ndarray) -> np.ndarray:
        return depth * a ** (2.0 - 2.0 / depth) * (TARGET - a)

    return solve_ivp(slope, (0.0, times[-1]), START, "DOP853", t_eval=times, rtol=1e-12, atol=1e-13).y.T


def relaxed(times: np.ndarray) -> np.ndarray:
    """The modes of natural gradient flow, the solution of da/dt = s − a."""
    return TARGET + np.exp(-times)[:, None] * (START - TARGET)


# ----------------------------------------------------------------- against closed forms


@pytest.mark.parametrize(("integrator", "order"), [("euler", 1), ("rk4", 4)])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("rule", ["layerwise", "exact", "moore_penrose", "gradient"])
def test_modes_follow_their_equation_to_the_order_of_the_integrator(
    rule: str, depth: int, integrator: str, order: int
) -> None:
    """Half the step, an error 2^order times smaller, at the same times."""
    weights, task = aligned(depth), ng.GaussianTask(*teacher())
    off = []
    for steps in (16, 32):
        history = ng.simulate(
            weights,
            task,
            rule=rule,
            integrator=integrator,
            learning_rate=0.8 / steps,
            steps=steps,
            record="modes",
            record_every=steps // 16,
        )
        times = np.linspace(0.0, 0.8, 17)
        np.testing.assert_allclose(history.time[:, 0], times, rtol=1e-14)
        wanted = saxe(depth, times) if rule == "gradient" else relaxed(times)
        off.append(np.max(np.abs(history.modes - wanted[:, None, :])))
    if rule != "gradient" and depth == 1 and integrator == "euler":
        np.testing.assert_allclose(history.modes[-1, 0], TARGET + (1 - 0.025) ** 32 * (START - TARGET), rtol=1e-12)
    assert off[1] < (0.05 if order == 1 else 2e-5)
    assert 0.8 * 2**order < off[0] / off[1] < 1.3 * 2**order


def test_modes_on_every_library(library: Backend, dtype: str) -> None:
    """By the fourth-order rule, both flows are within rounding and truncation of the closed forms."""
    depth, steps = 2, 40
    tolerance = 1e-5 if dtype == "float64" and library.float64 else 5e-4
    weights = library.asarrays(*(w.astype(dtype) for w in aligned(depth)))
    task = ng.GaussianTask(*library.asarrays(*(m.astype(dtype) for m in teacher())))
    for rule in ("layerwise", "gradient"):
        history = ng.simulate(
            weights, task, rule=rule, integrator="rk4", learning_rate=0.02, steps=steps, record=("modes", "loss")
        )
        library.check(history.modes, weights[0])
        library.check(history.loss, weights[0])
        library.check(history.weights[1], weights[0])
        times = 0.02 * np.arange(steps + 1)
        wanted = saxe(depth, times) if rule == "gradient" else relaxed(times)
        modes = library.to_numpy(history.modes)
        np.testing.assert_allclose(modes, np.broadcast_to(wanted[:, None, :], modes.shape), atol=tolerance)
        losses = 1.5 + 0.5 * np.sum((wanted - TARGET) ** 2, axis=-1)
        np.testing.assert_allclose(library.to_numpy(history.loss)[:, 1], losses, rtol=tolerance)


@pytest.mark.parametrize("rule", ["layerwise", "exact", "moore_penrose", "block_diagonal"])
def test_the_exponential_integrator_is_the_solution(library: Backend, rule: str) -> None:
    """Of any W in any task, and the same whether records are near or far apart."""
    sizes = (3, 5, 4, 3)
    weights, task = random_network(sizes, (2, 2)), random_task(3, 3)
    gap = functools.reduce(lambda p, w: w @ p, weights) - task.optimum()
    given = ng.GaussianTask(*library.asarrays(*task._flatten()[0][:4]))
    rates = np.asarray([[0.1], [0.3]])
    speed = 3.0 if rule == "block_diagonal" else 1.0
    for options in ({"record_every": 1}, {"record_at": (0, 2, 10)}):
        history = ng.simulate(
            library.asarrays(*weights),
            given,
            rule=rule,
            integrator="exponential",
            learning_rate=library.asarray(rates),
            steps=10,
            record=("end_to_end",),
            **options,
        )
        times = history.steps[:, None, None, None, None] * rates[:, :, None, None]
        wanted = task.optimum() + np.exp(-speed * times) * gap
        tolerance = 1e-12 if library.float64 else 1e-4
        np.testing.assert_allclose(library.to_numpy(history.end_to_end), wanted, atol=tolerance)
        (last,) = history.weights
        np.testing.assert_allclose(library.to_numpy(last), wanted[-1], atol=tolerance)


def test_the_exponential_integrator_flags_members_without_a_flow() -> None:
    """A layer of zeros does not move, though its widths would let it."""
    weights = tuple(w.copy() for w in random_network((3, 4, 3), (3,)))
    weights[0][1] = 0.0
    weights[1][1] = 0.0
    task = random_task(3, 3)
    history = ng.simulate(weights, task, integrator="exponential", learning_rate=0.1, steps=5)
    np.testing.assert_array_equal(history.diverged_at, [-1, 0, -1])
    assert np.all(np.isfinite(history.loss[:, [0, 2]]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rates_of_modes(depth: int) -> None:
    """Natural gradient removes the factor L a^(2 − 2/L) of depth; block_diagonal is L times too fast."""
    weights, task = aligned(depth), ng.GaussianTask(*teacher())
    for rule in RULES:
        history = ng.simulate(weights, task, rule=rule, learning_rate=0.01, steps=30, record=("rates", "modes"))
        factor = {"gradient": depth * history.modes ** (2.0 - 2.0 / depth), "block_diagonal": depth}.get(rule, 1.0)
        # Alignment and balance hold up to the square of the step.
        np.testing.assert_allclose(history.rates, np.broadcast_to(factor, history.rates.shape), rtol=2e-3)
        np.testing.assert_allclose(history.rates[0], np.broadcast_to(factor, history.rates.shape)[0], rtol=1e-10)
    np.testing.assert_allclose(history.target_modes, TARGET, rtol=1e-12)


def test_modes_keep_their_places_when_they_cross() -> None:
    """START ascends where TARGET descends: singular values would have changed places."""
    task = ng.GaussianTask(*teacher())
    history = ng.simulate(aligned(2), task, learning_rate=0.1, steps=60, record=("modes", "end_to_end"))
    np.testing.assert_allclose(history.modes[0], np.tile(START, (2, 1)), rtol=1e-12)
    np.testing.assert_allclose(history.modes[-1], np.tile(TARGET, (2, 1)), rtol=0.02)
    sorted_modes = np.linalg.svd(history.end_to_end, compute_uv=False)
    np.testing.assert_allclose(np.sort(history.modes, axis=-1)[..., ::-1], sorted_modes, rtol=1e-3)
    assert np.max(np.abs(history.modes[0] - sorted_modes[0])) > 1.0


# --------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 4), (5, 2, 4)], ids=str)
def test_records_are_what_a_loop_by_hand_gives(sizes: tuple[int, ...], rule: str) -> None:
    """Plain formulas at every step, of weights that move by the public directions."""
    weights, task = random_network(sizes, (3,)), random_task(sizes[0], sizes[-1])
    names = ("loss", "excess_loss", "end_to_end", "balancedness", "rank")
    rates = np.asarray([0.05, 0.1, 0.02])
    history = ng.simulate(weights, task, rule=rule, learning_rate=rates, steps=6, record=names)
    only = ng.simulate(weights, task, rule=rule, learning_rate=rates, steps=6)
    for k in range(7):
        product = weights[1] @ weights[0]
        gap = product - task.cross_moment @ np.linalg.inv(task.input_moment)
        precision = np.linalg.inv(task.noise_covariance)
        excess = 0.5 * np.trace(precision @ gap @ task.input_moment @ gap.mT, axis1=-2, axis2=-1)
        spread = task.output_moment - task.cross_moment @ np.linalg.inv(task.input_moment) @ task.cross_moment.T
        loss = excess + 0.5 * np.trace(precision @ spread)
        np.testing.assert_allclose(history.excess_loss[k], excess, rtol=1e-9)
        np.testing.assert_allclose(history.loss[k], loss, rtol=1e-9)
        np.testing.assert_allclose(only.loss[k], loss, rtol=1e-9)
        np.testing.assert_allclose(history.end_to_end[k], product, rtol=1e-8, atol=1e-9)
        balance = weights[1].mT @ weights[1] - weights[0] @ weights[0].mT
        np.testing.assert_allclose(history.balancedness[k, :, 0], np.linalg.norm(balance, axis=(-2, -1)), rtol=1e-8)
        np.testing.assert_array_equal(history.rank[k], min(sizes))
        direction = (
            dl.gradient(weights, task) if rule == "gradient" else dl.natural_gradient(weights, task, inverse=rule)
        )
        last = weights
        weights = tuple(w - rates[:, None, None] * d for w, d in zip(weights, direction, strict=True))
    for found, wanted in zip(history.weights, last, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-9)


def test_functions_of_the_user(library: Backend) -> None:
    """A rule and records of one's own, sparse in time."""
    weights, task = random_network((3, 4, 2), (5,)), random_task(3, 2)
    given = ng.GaussianTask(*library.asarrays(*task._flatten()[0][:4]))

    def half(weights: Any, task: Any) -> Any:
        return tuple(0.5 * d for d in dl.gradient(weights, task))

    def corner(weights: Any, task: Any) -> Any:
        return weights[0][:, :2, 0]

    def count(weights: Any, task: Any) -> Any:
        xp = ng.linalg._arrays.namespace(weights[0])
        return xp.count_nonzero(weights[0] > 0.0, axis=(-2, -1))

    history = ng.simulate(
        library.asarrays(*weights),
        given,
        rule=half,
        learning_rate=0.1,
        steps=9,
        record={"corner": corner, "count": count, "loss": "loss"},
        record_at=(2, 7),
    )
    assert history.steps.tolist() == [0, 2, 7, 9]
    twin = ng.simulate(weights, task, rule="gradient", learning_rate=0.05, steps=9, record=(corner, count, "loss"))
    for name in ("corner", "count", "loss"):
        wanted = getattr(twin, name)[[0, 2, 7, 9]]
        tolerance = 1e-10 if library.float64 else 1e-4
        np.testing.assert_allclose(library.to_numpy(getattr(history, name)), wanted, rtol=tolerance, atol=tolerance)
    assert history.corner.shape == (4, 5, 2)


def test_shapes_broadcast_and_a_single_network_is_one() -> None:
    weights, task = random_network((3, 4, 3), (5,)), random_task(3, 3, batch=(2, 1))
    rates = np.asarray([0.1, 0.01, 0.3])[:, None, None]
    history = ng.simulate(weights, task, learning_rate=rates, steps=4, record=("loss", "modes"))
    assert history.batch_shape == (3, 2, 5)
    assert history.loss.shape == (5, 3, 2, 5)
    assert history.modes.shape == (5, 3, 2, 5, 3)
    assert history.weights[0].shape == (3, 2, 5, 4, 3)
    assert history.regime == "wide"
    for i, j, k in np.ndindex(3, 2, 5):
        own = ng.GaussianTask(*(m[j, 0] if m.ndim == 4 else m for m in task._flatten()[0][:4]))
        alone = ng.simulate(
            tuple(w[k] for w in weights), own, learning_rate=float(rates[i, 0, 0]), steps=4, record=("loss", "modes")
        )
        assert alone.loss.shape == (5,)
        np.testing.assert_allclose(history.loss[:, i, j, k], alone.loss, rtol=1e-10)
        np.testing.assert_allclose(np.abs(history.modes[:, i, j, k]), np.abs(alone.modes), rtol=1e-8)
        for found, wanted in zip(history.weights, alone.weights, strict=True):
            np.testing.assert_allclose(found[i, j, k], wanted, rtol=1e-9, atol=1e-11)


def test_no_members_at_all() -> None:
    weights = tuple(w[:0] for w in random_network((3, 4, 2), (1,)))
    history = ng.simulate(weights, random_task(3, 2), learning_rate=0.1, steps=3, record=("loss", "modes"))
    assert history.loss.shape == (4, 0)
    assert history.modes.shape == (4, 0, 2)
    assert history.weights[0].shape == (0, 4, 3)


def test_what_was_given_stays_as_it_was(library: Backend) -> None:
    weights, task = random_network((3, 4, 2), (3,)), random_task(3, 2)
    given = library.asarrays(*weights)
    ng.simulate(
        given, ng.GaussianTask(*library.asarrays(*task._flatten()[0][:4])), learning_rate=0.1, steps=3, rule="gradient"
    )
    for found, wanted in zip(given, weights, strict=True):
        np.testing.assert_array_equal(library.to_numpy(found), wanted.astype(library.to_numpy(found).dtype))


def test_log_steps() -> None:
    assert ng.simulation.log_steps(1) == (0, 1)
    grid = ng.simulation.log_steps(10**6, count=7)
    assert grid == (0, 1, 10, 100, 1000, 10**4, 10**5, 10**6)
    assert ng.simulation.log_steps(5, count=1) == (0, 1, 5)


# ----------------------------------------------------------- members that diverge or rest


@pytest.mark.parametrize("names", [("loss",), ("loss", "modes")], ids=len)
@pytest.mark.parametrize("rule", ["layerwise", "gradient", "moore_penrose"])
def test_a_member_that_diverges_hurts_only_itself(library: Backend, rule: str, names: tuple[str, ...]) -> None:
    """Frozen as it was, NaN from then on, and the others as if it were not there."""
    weights, task = [w.copy() for w in random_network((3, 4, 3), (4,))], random_task(3, 3)
    weights[0][3, 1, 1] = np.nan
    given = ng.GaussianTask(*library.asarrays(*task._flatten()[0][:4]))
    rates = np.asarray([0.05, 1e9, 0.05, 0.05])
    options: dict[str, Any] = {"rule": rule, "steps": 60, "record": names}
    history = ng.simulate(library.asarrays(*weights), given, learning_rate=library.asarray(rates), **options)
    at = library.to_numpy(history.diverged_at)
    assert at[0] == at[2] == -1
    assert 0 < at[1] < 60
    assert at[3] == 0
    np.testing.assert_array_equal(library.to_numpy(history.diverged), [False, True, False, True])
    assert "2 diverged" in repr(history)
    loss = library.to_numpy(history.loss)
    assert np.all(np.isfinite(loss[: at[1], 1]))
    for name in names:
        record = library.to_numpy(getattr(history, name))
        assert np.all(np.isnan(record[at[1] :, 1]))
        assert np.all(np.isnan(record[:, 3]))
    assert all(np.all(np.isfinite(library.to_numpy(w)[:3])) for w in history.weights)
    np.testing.assert_array_equal(np.isnan(library.to_numpy(history.weights[0])[3]), np.isnan(weights[0][3]))
    kept = tuple(library.asarray(np.asarray(w)[[0, 2]]) for w in weights)
    alone = ng.simulate(kept, given, learning_rate=0.05, **options)
    tolerance = 1e-9 if library.float64 else 1e-3
    np.testing.assert_allclose(loss[:, [0, 2]], library.to_numpy(alone.loss), rtol=tolerance)


@pytest.mark.parametrize("chosen", [NUMPY, JAX], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_frozen_weights_are_the_last_finite_ones(chosen: Backend, every: int) -> None:
    """Those of the last record before, whose loss is that record; members diverge at different records."""
    weights, task = random_network((3, 4, 3), (5,)), random_task(3, 3)
    given = ng.GaussianTask(*chosen.asarrays(*task._flatten()[0][:4]))
    rates = np.asarray([0.05, 1e20, 0.5, 0.6, 0.7])
    options: dict[str, Any] = {"rule": "gradient", "steps": 30, "record_every": every}
    layers = chosen.asarrays(*weights)
    history = ng.simulate(layers, given, learning_rate=chosen.asarray(rates), **options)
    at = chosen.to_numpy(history.diverged_at)
    assert at[0] == -1
    assert len(set(at)) >= 3
    found = tuple(chosen.to_numpy(w) for w in history.weights)
    last = ng.deep_linear.loss(found, task)
    for k in range(1, 5):
        assert at[k] > 0
        assert at[k] % every == 0
        records = chosen.to_numpy(history.loss)[:, k]
        assert np.all(np.isnan(records[at[k] // every :]))
        assert np.all(np.isfinite(records[: at[k] // every]))
        np.testing.assert_allclose(last[k], records[at[k] // every - 1], rtol=1e-6)


@pytest.mark.parametrize("record", [("loss",), ("modes",)], ids=str)
def test_compiled_loops_give_the_same_digits_however_long(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock says how many records a loop makes, and a run that went on from a checkpoint has other loops."""
    weights, task = random_network((3, 4, 3), (5,)), random_task(3, 3)
    given = ng.GaussianTask(*JAX.asarrays(*task._flatten()[0][:4]))
    rates = JAX.asarray(np.asarray([0.05, 1e20, 0.5, 0.6, 0.7]))
    found, states, real = [], [], run.advance

    def spy(*arguments: Any) -> Any:
        states.append(result := real(*arguments))
        return result

    monkeypatch.setattr(run, "advance", spy)
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(run, "BLOCK_SECONDS", seconds)
        history = ng.simulate(
            JAX.asarrays(*weights), given, learning_rate=rates, rule="gradient", steps=30, record=record
        )
        found.append([*history.weights, getattr(history, record[0]), history.diverged_at])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(JAX.to_numpy(one), JAX.to_numpy(other))
    # What diverged does no harm: nothing in motion has to be done by a slower way for it.
    assert all(np.all(np.isfinite(JAX.to_numpy(w))) for w in states[-1][0].weights)


def test_a_bad_task_is_one_member(library: Backend) -> None:
    weights, task = random_network((3, 4, 3), (3,)), random_task(3, 3, batch=(3,))
    moments = [np.array(m) for m in task._flatten()[0][:4]]
    moments[2][1, 0, 0] = np.nan
    given = ng.GaussianTask(*library.asarrays(*moments))
    history = ng.simulate(library.asarrays(*weights), given, learning_rate=0.1, steps=5, record=("loss", "modes"))
    np.testing.assert_array_equal(library.to_numpy(history.diverged_at), [-1, 0, -1])
    wanted = ng.simulate(weights, task, learning_rate=0.1, steps=5)
    tolerance = 1e-9 if library.float64 else 1e-3
    found = library.to_numpy(history.loss)
    np.testing.assert_allclose(found[:, [0, 2]], wanted.loss[:, [0, 2]], rtol=tolerance)


def test_converged_members_are_frozen_where_it_is_asked_for(library: Backend) -> None:
    weights, task = random_network((3, 4, 3), (3,)), random_task(3, 3)
    given = ng.GaussianTask(*library.asarrays(*task._flatten()[0][:4]))
    layers, rates = library.asarrays(*weights), library.asarray(np.asarray([0.02, 0.2, 0.5]))
    options: dict[str, Any] = {"learning_rate": rates, "steps": 20, "record": ("excess_loss",)}
    history = ng.simulate(layers, given, freeze_converged=0.05, **options)
    free = ng.simulate(layers, given, **options)
    at, excess = library.to_numpy(history.converged_at), library.to_numpy(history.excess_loss)
    freely = library.to_numpy(free.excess_loss)
    assert at[0] == -1
    assert np.all(library.to_numpy(free.converged_at) == -1)
    for member in (1, 2):
        first = int(np.argmax(freely[:, member] <= 0.05))
        assert at[member] == first
        np.testing.assert_allclose(excess[: first + 1, member], freely[: first + 1, member], rtol=1e-5)
        np.testing.assert_allclose(excess[first:, member], excess[first, member], rtol=1e-5)
    assert "2 converged" in repr(history)


def test_eager_libraries_are_asked_for_one_scalar_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient needs none itself."""
    weights, task = random_network((3, 4, 3), (4,)), random_task(3, 3)
    asked, real = [], _arrays.eager_any
    monkeypatch.setattr(_arrays, "eager_any", lambda xp, flags: asked.append(1) or real(xp, flags))
    ng.simulate(weights, task, rule="gradient", learning_rate=0.1, steps=40, record_every=10)
    assert len(asked) == 5


def test_jax_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of records at a time, and for the next run of the same kind too."""
    import jax

    traces = []

    def rule(weights: Any, task: Any) -> Any:
        traces.append(1)
        return dl.gradient(weights, task)

    weights, task = random_network((3, 4, 3), (4,)), random_task(3, 3)
    layers = tuple(jax.numpy.asarray(w) for w in weights)
    given = ng.GaussianTask(*(jax.numpy.asarray(m) for m in task._flatten()[0][:4]))
    for steps in (400, 400):
        history = ng.simulate(layers, given, rule=rule, learning_rate=0.1, steps=steps, record_every=2)
    # One call to see its shapes in each run; a shape and a loop at most in the trace.
    assert len(traces) <= 2 + 3
    wanted = ng.simulate(weights, task, rule="gradient", learning_rate=0.1, steps=400, record_every=2)
    np.testing.assert_allclose(np.asarray(history.loss), wanted.loss, rtol=1e-10)


# ------------------------------------------------------------------------------- noise


def test_langevin_noise_has_the_variance_of_its_temperature() -> None:
    """W of one layer is an autoregression: variance T / (λ (1 − ηλ/2)) where λ are the curvatures."""
    members, steps, rate = 4000, 60, 0.4
    power = np.asarray([0.5, 2.0])
    task = ng.GaussianTask(np.diag(power), np.eye(1), np.zeros((1, 2)), np.eye(1))
    temperature = np.asarray([[0.3], [1.2]])
    history = ng.simulate(
        (np.zeros((members, 1, 2)),),
        task,
        rule="gradient",
        learning_rate=rate,
        steps=steps,
        temperature=temperature,
        rng=7,
        record_every=steps,
    )
    (w,) = history.weights
    expected = temperature / (power * (1.0 - 0.5 * rate * power))
    expected *= 1.0 - (1.0 - rate * power) ** (2 * steps)
    found = np.var(w[:, :, 0, :], axis=1)
    np.testing.assert_allclose(found, expected, rtol=4.5 * (2.0 / members) ** 0.5)
    mean = np.mean(w[:, :, 0, :], axis=1) / (expected / members) ** 0.5
    assert np.all(np.abs(mean) < 4.5)
    # Members are independent, and so are the two weights of one.
    assert np.all(np.abs(np.mean(w[:, :-1] * w[:, 1:], axis=1) / expected[:, None]) < 4.5 * members**-0.5)
    crossed = np.mean(w[:, :, 0, 0] * w[:, :, 0, 1], axis=1) / np.prod(expected, axis=-1) ** 0.5
    assert np.all(np.abs(crossed) < 4.5 * members**-0.5)


@pytest.mark.parametrize("rule", ["gradient", "layerwise"])
def test_label_noise_moves_the_target(rule: str) -> None:
    """One step from the optimum is that step along the noise alone, with covariance σ²Σ (or σ²Σ⁻¹)."""
    members, sigma, rate = 6000, 0.5, 0.1
    power = np.asarray([[2.0, 0.6], [0.6, 1.0]])
    task = ng.GaussianTask(power, np.eye(1), np.asarray([[1.0, -1.0]]) @ power, 9 * np.eye(1))
    start = np.broadcast_to(task.optimum(), (members, 1, 2))
    history = ng.simulate((start,), task, rule=rule, learning_rate=rate, steps=1, label_noise=sigma, rng=3)
    moved = (history.weights[0] - start)[:, 0, :] / (rate * sigma)
    expected = power if rule == "gradient" else np.linalg.inv(power)
    np.testing.assert_allclose(moved.T @ moved / members, expected, atol=4.5 * 2.0**0.5 * 2.0 * members**-0.5)
    assert history.loss[0, 0] == pytest.approx(float(task.minimum_loss()), abs=1e-12)


@pytest.mark.parametrize("library_", [b for b in EAGER if b.name in ("torch", "strict-device1", "jax")], ids=str)
def test_noise_follows_seed_step_and_member(library_: Backend) -> None:
    """The same on every library but JAX, which has generators of its own; another with another seed."""
    weights, task = random_network((3, 4, 2), (6,)), random_task(3, 2)
    given = ng.GaussianTask(*library_.asarrays(*task._flatten()[0][:4]))
    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 8, "temperature": 0.01, "label_noise": 0.2}

    def losses(seed: Any, stop: int = 6) -> np.ndarray:
        layers = library_.asarrays(*(w[:stop] for w in weights))
        return library_.to_numpy(ng.simulate(layers, given, rng=seed, **options).loss)

    np.testing.assert_allclose(losses(0, 4), losses(0)[:, :4], rtol=1e-10)
    assert np.max(np.abs(losses(0) - losses(1))) > 1e-3
    host = ng.simulate(weights, task, rng=0, **options).loss
    if library_.name == "jax":
        import jax

        np.testing.assert_array_equal(losses(0), losses(jax.random.key(0)))
        assert np.max(np.abs(losses(0) - host)) > 1e-3
    else:
        np.testing.assert_allclose(losses(0), host, rtol=1e-9)
