"""What the natural gradients of a deep linear network do: velocities, regimes, cut-offs, bad members."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, JAX_JIT, NUMPY
from reference import (
    CASES,
    Problem,
    case,
    condition,
    pinv,
    relative,
    split,
    stack,
    stacked,
    velocity,
    well_conditioned,
)

import natgrad_array as ng
from natgrad_array import deep_linear as dl

INVERSES = ["layerwise", "exact", "moore_penrose", "block_diagonal"]
EXACT = ["exact", "moore_penrose"]
NAMES = list(CASES)
EVERY_REGIME = ["one layer", "wide 3", "intermediate 3", "bottleneck 3", "all singular 3", "many pairs, bottleneck 3"]


def full_rank(name: str) -> bool:
    return "layer_ranks" not in CASES[name][1]


def directions(problem: Problem, **options: Any) -> tuple[np.ndarray, ...]:
    return dl.natural_gradient(problem.weights, ng.GaussianTask(*problem.moments), **options)


def size(problem: Problem) -> float:
    """The scale that velocities are compared on: W and W* as data see them."""
    return float(np.linalg.norm(problem.seen(problem.product)) + np.linalg.norm(problem.seen(problem.optimum())))


# ------------------------------------------------------------------------------ velocities


@pytest.mark.parametrize("inverse", EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_that_of_the_dense_pseudo_inverse(name, inverse):
    problem = case(name)
    moved = velocity(problem.weights, directions(problem, inverse=inverse))
    wanted = velocity(problem.weights, split(pinv(problem.fisher()) @ stack(problem.gradient()), problem.weights))
    assert np.linalg.norm(problem.seen(moved - wanted)) <= 1e-10 * size(problem)


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_of_the_velocity(name):
    problem = case(name)
    found = dl.exact_velocity(problem.weights, ng.GaussianTask(*problem.moments))
    assert relative(found, problem.exact_velocity_by_projectors()) <= 1e-10
    if full_rank(name) and problem.regime() != "bottleneck":
        gap = problem.product - problem.optimum()
        assert np.linalg.norm(problem.seen(found - gap)) <= 1e-10 * size(problem)


@pytest.mark.parametrize("name", NAMES)
def test_layerwise_rule_is_exact_in_the_wide_regime_only(name):
    problem = case(name)
    moved = velocity(problem.weights, directions(problem))
    error = np.linalg.norm(problem.seen(moved - problem.exact_velocity())) / np.linalg.norm(
        problem.seen(problem.exact_velocity())
    )
    if problem.regime() == "wide" and full_rank(name):
        assert error <= 1e-10
    elif problem.depth > 1:
        assert error > 0.01


@pytest.mark.parametrize("sizes", [(6, 5, 4, 3), (6, 4, 3), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_how_far_the_layerwise_rule_is_off(sizes, seed):
    """Between the two a network loses a part of its velocity: tenths, not rounding."""
    problem = well_conditioned(sizes, seed=seed)
    moved, wanted = problem.seen(velocity(problem.weights, directions(problem))), problem.seen(problem.exact_velocity())
    assert 0.05 < relative(moved, wanted) < 0.7


@pytest.mark.parametrize("name", [name for name in NAMES if full_rank(name) and case(name).regime() == "wide"])
def test_exact_rule_is_the_layerwise_rule_in_the_wide_regime(name):
    problem = case(name)
    for a, b in zip(directions(problem, inverse="exact"), directions(problem, inverse="layerwise"), strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_block_diagonal_rule_is_the_layerwise_one_without_the_depth(name):
    problem = case(name)
    for a, b in zip(directions(problem, inverse="block_diagonal"), directions(problem), strict=True):
        assert relative(a, problem.depth * b) <= 1e-14


@pytest.mark.parametrize("name", ["square 2", "square 3"])
def test_square_layers_by_plain_inverses(name):
    """Eq 34: dW_i = (W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ / L."""
    problem = case(name)
    gap = problem.product - problem.cross_moment @ np.linalg.inv(problem.input_moment)
    weights = problem.weights
    for i, found in enumerate(directions(problem)):
        left, right = np.eye(4), np.eye(4)
        for w in weights[:i]:
            right = w @ right
        for w in weights[i + 1 :]:
            left = w @ left
        assert relative(found, np.linalg.inv(left) @ gap @ np.linalg.inv(right) / problem.depth) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_moore_penrose_is_the_shortest(name):
    """Least norm among all updates with the exact velocity, so orthogonal to the null space of Aᵀ."""
    problem = case(name)
    found = stack(directions(problem, inverse="moore_penrose"))
    assert np.linalg.norm(found) <= np.linalg.norm(stack(directions(problem, inverse="exact"))) * (1 + 1e-10)
    fisher = problem.fisher()
    outside = found - fisher @ (pinv(fisher) @ found)
    assert np.linalg.norm(outside) <= 1e-10 * np.linalg.norm(found)


@pytest.mark.parametrize("name", NAMES)
def test_projections_give_the_layerwise_velocity(name):
    """Eq 45 in descent sign, on what data can see."""
    problem = case(name)
    pairs = dl.projections(problem.weights, ng.GaussianTask(*problem.moments))
    optimum = problem.optimum()
    wanted = problem.product - sum(left @ optimum @ right for left, right in pairs) / problem.depth
    moved = velocity(problem.weights, directions(problem))
    assert np.linalg.norm(problem.seen(moved - wanted)) <= 1e-10 * size(problem)
    for left, right in pairs:
        assert relative(left @ left, left) <= 1e-10
        assert relative(right @ right, right) <= 1e-10


@pytest.mark.parametrize("inverse", ["layerwise", "exact", "moore_penrose"])
@pytest.mark.parametrize("name", ["wide 3", "square 3", "intermediate 3", "bottleneck 3", "all singular 3", "wide 5"])
def test_velocity_does_not_depend_on_the_bases_of_hidden_layers(name, inverse):
    """W_i → T W_i, W_{i+1} → W_{i+1} T⁻¹ changes directions, never the motion of W."""
    problem = case(name)
    rng = np.random.default_rng(5)
    weights = list(problem.weights)
    for i in range(problem.depth - 1):
        n = weights[i].shape[0]
        u, _, vh = np.linalg.svd(rng.standard_normal((n, n)))
        basis = (u * np.exp(rng.uniform(-0.7, 0.7, n))) @ vh
        weights[i], weights[i + 1] = basis @ weights[i], weights[i + 1] @ np.linalg.inv(basis)
    other = Problem(tuple(weights), *problem.moments)
    assert relative(other.product, problem.product) <= 1e-12
    before, after = directions(problem, inverse=inverse), directions(other, inverse=inverse)
    assert relative(before[0], after[0]) > 0.01
    gap = velocity(problem.weights, before) - velocity(other.weights, after)
    assert np.linalg.norm(problem.seen(gap)) <= 1e-10 * size(problem)


@pytest.mark.parametrize("inverse", EXACT)
@pytest.mark.parametrize("name", EVERY_REGIME)
def test_preconditioner_is_a_generalised_inverse(name, inverse):
    """F C F = F, column by column of F."""
    problem = case(name)
    fisher = problem.fisher()
    operator = dl.fisher(problem.weights, ng.GaussianTask(*problem.moments))
    columns = tuple(np.stack(parts) for parts in zip(*(split(c, problem.weights) for c in fisher.T), strict=True))
    back = operator.matvec(operator.precondition(columns, inverse=inverse))
    found = np.stack([stack([part[k] for part in back]) for k in range(fisher.shape[0])], axis=-1)
    assert relative(found, fisher) <= 1e-10


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("name", EVERY_REGIME)
def test_natural_gradient_is_the_preconditioned_gradient(name, inverse):
    problem = case(name)
    task = ng.GaussianTask(*problem.moments)
    gradient = dl.gradient(problem.weights, task)
    found = dl.fisher(problem.weights, task).precondition(gradient, inverse=inverse)
    for a, b in zip(found, directions(problem, inverse=inverse), strict=True):
        assert relative(a, b) <= 1e-10


# --------------------------------------------------------------------- methods and cut-offs


@pytest.mark.parametrize("inverse", ["layerwise", "exact", "block_diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_eigendecomposition_agrees(name, inverse, dtype):
    """At the default cut-off, singular covariances (behind every bottleneck) included."""
    problem = case(name)
    weights, moments = problem.on(NUMPY, dtype)
    found = dl.natural_gradient(weights, ng.GaussianTask(*moments), inverse=inverse, method="eigh")
    tol = 1e-10 if dtype == "float64" else 1e-3
    for a, b in zip(found, problem.direction(inverse), strict=True):
        assert a.dtype == np.dtype(dtype)
        assert relative(a, b) <= tol


def ranks_of_factors(problem: Problem) -> list[tuple[int, int]]:
    """The rank of every E_i and X_i, and the largest that the smaller of its Gram matrices could have."""
    ranks = []
    inputs = np.linalg.matrix_rank(problem.input_moment, tol=1e-6)
    for i in range(problem.depth):
        e, x = problem.factors(i)
        ranks.append((int(np.linalg.matrix_rank(e, tol=1e-6)), min(e.shape)))
        ranks.append((int(np.linalg.matrix_rank(x, tol=1e-6)), min(x.shape[0], int(inputs))))
    return ranks


@pytest.mark.parametrize("inverse", ["layerwise", "exact", "block_diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_cholesky_agrees_or_says_nan(name, inverse, dtype):
    problem = case(name)
    weights, moments = problem.on(NUMPY, dtype)
    found = dl.natural_gradient(weights, ng.GaussianTask(*moments), inverse=inverse, method="cholesky")
    tol = 1e-10 if dtype == "float64" else 1e-3
    singular = any(rank < most for rank, most in ranks_of_factors(problem))
    for a, b in zip(found, problem.direction(inverse), strict=True):
        if singular and np.all(np.isnan(a)):
            continue
        assert relative(a, b) <= tol
    if name in ("singular layers 3", "all singular 3"):
        assert any(np.all(np.isnan(a)) for a in found)


@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_methods_on_every_library(backend, method):
    if backend.name == "jax":
        backend = JAX_JIT
    problem = stacked((2,), lambda seed: well_conditioned((4, 5, 4), seed=seed))
    weights, moments = problem.on(backend)
    found = backend.call(
        lambda w, m: dl.natural_gradient(w, ng.GaussianTask(*m), inverse="exact", method=method), weights, moments
    )
    tol = 1e-10 if backend.float64 else 1e-3
    for k, member in enumerate(problem.members()):
        for a, b in zip(found, member.direction("exact"), strict=True):
            backend.check(a, weights[0])
            assert relative(backend.to_numpy(a)[k], b) <= tol


def truncated(problem: Problem, rtol: float) -> list[np.ndarray]:
    """The layerwise rule with eigenvalues of both covariances cut off."""
    found = []
    for i, gradient in enumerate(problem.gradient()):
        e, x = problem.factors(i)
        found.append(pinv(e @ e.T, rtol) @ gradient @ pinv(x @ x.T, rtol) / problem.depth)
    return found


@pytest.mark.parametrize("method", ["auto", "eigh"])
@pytest.mark.parametrize("rtol", [0.03, 0.1, 0.4, 1.0, 2.0])
def test_cut_off_on_the_eigenvalues_of_each_covariance(rtol, method):
    problem = case("intermediate 3")
    wanted = truncated(problem, rtol)
    for a, b in zip(directions(problem, rtol=rtol, method=method), wanted, strict=True):
        assert relative(a, b) <= 1e-10
    if rtol >= 1.0:
        assert not np.any(stack(wanted))
    fisher = dl.fisher(problem.weights, ng.GaussianTask(*problem.moments))
    for a, b in zip(fisher.precondition(problem.gradient(), rtol=rtol, method=method), wanted, strict=True):
        assert relative(a, b) <= 1e-10


def test_cut_off_of_each_member(backend):
    """One cut-off for each member; a negative one is NaN there and nowhere else."""
    if backend.name == "jax":
        backend = JAX_JIT
    one = case("intermediate 3")
    cutoffs = np.asarray([1e-12, 0.1, -1.0, 0.4])
    problem = Problem(tuple(np.stack([w] * 4) for w in one.weights), *one.moments)
    weights, moments = problem.on(backend)
    found = backend.call(
        lambda w, m, rtol: dl.natural_gradient(w, ng.GaussianTask(*m), rtol=rtol),
        weights,
        moments,
        backend.asarray(cutoffs),
    )
    tol = 1e-10 if backend.float64 else 1e-3
    for i, array in enumerate(found):
        backend.check(array, weights[0])
        numbers = backend.to_numpy(array)
        assert np.all(np.isnan(numbers[2]))
        for k in (0, 1, 3):
            assert relative(numbers[k], truncated(one, cutoffs[k])[i]) <= tol


@pytest.mark.parametrize("inverse", INVERSES)
def test_cut_off_of_zero_and_of_rounding(inverse):
    """On a network of full rank nothing lies below a small cut-off."""
    problem = case("wide 3")
    wanted = directions(problem, inverse=inverse)
    for rtol in (0.0, 1e-14, np.asarray(1e-14)):
        for a, b in zip(directions(problem, inverse=inverse, rtol=rtol), wanted, strict=True):
            assert relative(a, b) <= 1e-10


# ----------------------------------------------------------------------------- bad members


def troubled() -> tuple[Problem, list[int]]:
    """Good networks with a bad one between each two; which are bad beyond repair."""
    good = [well_conditioned((5, 4, 3, 3), seed=seed) for seed in range(6)]
    layers = [[w.copy() for w in p.weights] for p in good]
    moments = [[m.copy() for m in p.moments] for p in good]
    rows: list[tuple[list[np.ndarray], list[np.ndarray]]] = list(zip(layers, moments, strict=True))

    def spoil(layer: int, value: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        weights = [w.copy() for w in good[0].weights]
        weights[layer][1, 2] = value
        return weights, moments[0]

    zero = ([np.zeros_like(w) for w in good[0].weights], moments[0])
    one_zero_layer = ([good[0].weights[0], 0.0 * good[0].weights[1], good[0].weights[2]], moments[0])
    singular = (list(well_conditioned((5, 4, 3, 3), layer_ranks={0: 2, 2: 2}).weights), moments[0])
    others = [spoil(0, np.nan), spoil(1, np.inf), spoil(2, -np.inf), zero, one_zero_layer, singular]
    mixed = [row for pair in zip(rows, others, strict=True) for row in pair]
    weights = tuple(np.stack([w[i] for w, _ in mixed]) for i in range(3))
    return Problem(weights, *(np.stack([m[i] for _, m in mixed]) for i in range(4))), [1, 3, 5]


def some_quantities(weights: Any, moments: Any) -> dict[str, Any]:
    task = ng.GaussianTask(*moments)
    fisher = dl.fisher(weights, task)
    found = {inverse: dl.natural_gradient(weights, task, inverse=inverse) for inverse in INVERSES}
    found["eigh"] = dl.natural_gradient(weights, task, method="eigh")
    found["precondition"] = fisher.precondition(weights, inverse="moore_penrose")
    return {
        **found,
        "exact_velocity": dl.exact_velocity(weights, task),
        "loss": dl.loss(weights, task),
        "gradient": dl.gradient(weights, task),
        "rank": fisher.rank(),
        "spectrum": fisher.spectrum(),
        "logdet": fisher.logdet(),
    }


def arrays_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "jax"], indirect=True, ids=str)
def test_a_bad_member_hurts_only_itself(backend):
    """Beside bad ones, every member is what it is in a stack of its own."""
    problem, bad = troubled()
    good = [k for k in range(problem.batch[0]) if k not in bad]
    # NumPy warns where Inf meets zero in a product of matrices.
    with np.errstate(invalid="ignore"):
        found = backend.call(some_quantities, *problem.on(backend))
    own = NUMPY if backend.lazy else backend  # compiling every member's own program takes long
    tol = 1e-6 if not backend.float64 else 1e-10 if backend.lazy else 1e-12 if backend.name == "torch" else 1e-14
    for k in good:
        alone = some_quantities(
            *Problem(tuple(w[[k]] for w in problem.weights), *(m[[k]] for m in problem.moments)).on(own)
        )
        for key, value in found.items():
            beside = stack([backend.to_numpy(array)[k] for array in arrays_of(value)])
            by_itself = stack([own.to_numpy(array)[0] for array in arrays_of(alone[key])])
            assert np.linalg.norm(beside - by_itself) <= tol * max(1.0, np.linalg.norm(by_itself)), f"{key}[{k}]"
    for key, value in found.items():
        for array in arrays_of(value):
            assert not np.any(np.isfinite(backend.to_numpy(array)[bad])), key


def test_zero_and_singular_members_have_their_documented_values():
    problem, bad = troubled()
    with np.errstate(invalid="ignore"):
        found = some_quantities(problem.weights, problem.moments)
    for k, member in enumerate(problem.members()):
        if k in bad:
            continue
        for inverse in INVERSES:
            actual, wanted = stack([d[k] for d in found[inverse]]), stack(member.direction(inverse))
            assert relative(actual, wanted) <= 1e-10, f"{inverse}[{k}]"
        assert int(found["rank"][k]) == member.rank()
    zero = 7
    assert not np.any(problem.weights[0][zero])
    for inverse in INVERSES:
        assert not any(np.any(d[zero]) for d in found[inverse])
    assert not np.any(found["exact_velocity"][zero])
    assert not np.any(found["spectrum"][zero])
    assert found["rank"][zero] == 0.0
    assert found["logdet"][zero] == 0.0
    half = 0.5 * np.trace(np.linalg.solve(problem.noise_covariance[zero], problem.output_moment[zero]))
    assert relative(found["loss"][zero], half) <= 1e-12


def test_conjugate_gradients_with_a_bad_member(backend):
    """Members converge one by one, next to ones that never do."""
    if backend.name == "jax":
        backend = JAX_JIT
    problems = [well_conditioned((9, 9, 8, 8), seed=seed) for seed in range(3)]
    weights = [np.stack([p.weights[i] for p in problems]) for i in range(3)]
    weights[1][1, 0, 0] = np.nan
    moments = [np.stack([p.moments[i] for p in problems]) for i in range(4)]
    moments[2][0] = weights[2][0] @ weights[1][0] @ weights[0][0] @ moments[0][0]  # there the error is zero
    moments[3][0] = moments[2][0] @ np.linalg.solve(moments[0][0], moments[2][0].T) + moments[1][0]
    problem = Problem(tuple(weights), *moments)
    arrays, tasks = problem.on(backend)
    found = backend.call(
        lambda w, m: dl.natural_gradient(w, ng.GaussianTask(*m), inverse="moore_penrose"), arrays, tasks
    )
    wanted = stack(problems[2].direction("moore_penrose"))
    for i, array in enumerate(found):
        numbers = backend.to_numpy(array)
        assert np.all(np.isnan(numbers[1]))
        assert np.linalg.norm(numbers[0]) <= (1e-12 if backend.float64 else 1e-4) * np.linalg.norm(wanted)
        assert relative(numbers[2], split(wanted, problems[2].weights)[i]) <= (1e-10 if backend.float64 else 1e-3)


def test_a_bad_task_hurts_only_its_member(backend):
    problems = [well_conditioned((5, 4, 3), seed=seed) for seed in range(4)]
    weights = [np.stack([p.weights[i] for p in problems]) for i in range(2)]
    moments = [np.stack([p.moments[i] for p in problems]) for i in range(4)]
    moments[0][1, 0, 0] = np.nan
    moments[1][3] = -np.eye(3)
    arrays = backend.asarrays(*weights)
    task = ng.GaussianTask(*backend.asarrays(*moments))
    values = (JAX_JIT if backend.name == "jax" else backend).call(
        lambda w, t: (*dl.natural_gradient(w, t, inverse="exact"), dl.loss(w, t), dl.exact_velocity(w, t)), arrays, task
    )
    numbers = [backend.to_numpy(value) for value in values]
    for array in numbers:
        assert [bool(np.all(np.isnan(member))) for member in array] == [False, True, False, True]
        assert np.all(np.isfinite(array[0::2]))
    for k in (0, 2):
        for a, b in zip(numbers, problems[k].direction("exact"), strict=False):
            assert relative(a[k], b) <= (1e-10 if backend.float64 else 1e-3)


# ---------------------------------------------------------------------- harder networks


@pytest.mark.parametrize("decades", [2, 4, 6])
def test_ill_conditioned_layers_work_on_factors(decades):
    """The error of "auto" goes with κ, where covariances would have κ²."""
    rng = np.random.default_rng(decades)
    weights = []
    for _ in range(2):
        u, _, vh = np.linalg.svd(rng.standard_normal((6, 6)))
        weights.append((u * np.geomspace(1.0, 10.0**-decades, 6)) @ vh)
    optimum = rng.standard_normal((6, 6))
    task = ng.GaussianTask(np.eye(6), np.eye(6), optimum, optimum @ optimum.T + np.eye(6))
    gap = weights[1] @ weights[0] - optimum
    first, second = dl.natural_gradient(weights, task)
    limit = 1e-14 * condition(weights[0]) * 10
    assert relative(first, np.linalg.solve(weights[1], gap) / 2) <= limit
    assert relative(second, np.linalg.solve(weights[0].T, gap.T).T / 2) <= limit


def test_depth_that_makes_the_product_numerically_singular_stays_finite():
    """Sixteen square Gaussian layers of width 20: κ(W) near 1/eps."""
    weights = dl.gaussian(0, (20,) * 17, like=np.empty(0))
    eye = np.eye(20)
    task = ng.GaussianTask(eye, eye, eye, 2 * eye)
    for inverse in ("layerwise", "exact"):
        for d in dl.natural_gradient(weights, task, inverse=inverse):
            assert np.all(np.isfinite(d))


# --------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("inverse", ["layerwise", "block_diagonal"])
def test_peak_memory_of_an_ensemble(inverse, dtype):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((4096, 16, 16)).astype(dtype) for _ in range(3)]
    eye = np.eye(16, dtype=dtype)
    task = ng.GaussianTask(eye, eye, eye, 2 * eye)
    dl.natural_gradient([w[:2] for w in weights], task, inverse=inverse)
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        dl.natural_gradient(weights, task, inverse=inverse)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= 6 * sum(w.nbytes for w in weights)


@pytest.mark.parametrize("method", ["auto", "eigh"])
@pytest.mark.parametrize("small", [1e-4, 1e-9])
def test_exact_gives_what_a_cutoff_drops_to_the_other_layers(small: float, method: str) -> None:
    """One layer is cut at a direction; the other still realises it whole."""
    eye = np.eye(2)
    task = ng.GaussianTask(eye, eye, 2 * eye, 5 * eye)
    weights = (np.diag([1.0, small]), eye)
    direction = dl.natural_gradient(weights, task, inverse="exact", rtol=1e-6, method=method)
    velocity = dl.end_to_end_velocity(weights, direction)
    np.testing.assert_allclose(velocity, np.diag([1.0, small]) - 2 * eye, atol=1e-12)
