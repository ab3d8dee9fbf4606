"""Deep linear networks against dense matrices, finite differences and automatic differentiation."""

from __future__ import annotations

import functools
import itertools
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, DASK, JAX, NUMPY, STRICT_DEVICE1, STRICT_DEVICE2, Backend
from cases import BATCH_SHAPES
from reference import (
    CASES,
    FEW,
    Problem,
    ahead,
    behind,
    case,
    relative,
    split,
    stack,
    stacked,
    tangent_of,
    velocity,
    well_conditioned,
)

import natgrad_array as ng
from natgrad_array import deep_linear as dl

INVERSES = ["layerwise", "exact", "moore_penrose", "block_diagonal"]

Quantities = dict[str, Any]


def tolerance(backend: Backend, dtype: str) -> float:
    return 1e-10 if dtype == "float64" and backend.float64 else 1e-3


# ---------------------------------------------------- everything at once, and what it must be


def everything(weights: Any, moments: Any, tangent: Any) -> Quantities:
    """All that a network and its task determine, in one call so that it is compiled once."""
    task = ng.GaussianTask(*moments)
    fisher = dl.fisher(weights, task)
    last = len(weights) - 1
    found: Quantities = {
        "end_to_end": dl.end_to_end(weights),
        "velocity": dl.end_to_end_velocity(weights, tangent),
        "kernel": dl.end_to_end_kernel(weights),
        "balancedness": dl.balancedness(weights),
        "loss": dl.loss(weights, task),
        "excess_loss": dl.excess_loss(weights, task),
        "minimum_loss": task.minimum_loss(),
        "optimum": task.optimum(),
        "gradient": dl.gradient(weights, task),
        "exact_velocity": dl.exact_velocity(weights, task),
        "projections": dl.projections(weights, task),
        "dense": fisher.to_dense(),
        "block": fisher.block(0, last),
        "factors": fisher.factors(last, 0),
        "matvec": fisher.matvec(tangent),
        "rank": fisher.rank(),
        "spectrum": fisher.spectrum(),
        "logdet": fisher.logdet(),
    }
    for inverse in INVERSES:
        found[inverse] = dl.natural_gradient(weights, task, inverse=inverse)
        found[f"{inverse} of a tangent"] = fisher.precondition(tangent, inverse=inverse)
    return found


def expected(problem: Problem, tangent: Any) -> Quantities:
    """The same from dense matrices, for one network."""
    weights, depth = problem.weights, problem.depth
    fisher = problem.fisher()
    pairs = problem.product.size
    spectrum = np.sort(np.concatenate([np.zeros(pairs), np.linalg.eigvalsh(fisher)]))[-pairs:]
    rank = problem.rank()
    ends = np.cumsum([0, *(w.size for w in weights)])
    out: Quantities = {
        "end_to_end": problem.product,
        "velocity": velocity(weights, tangent),
        "kernel": problem.kernel(),
        "balancedness": tuple(weights[i + 1].T @ weights[i + 1] - weights[i] @ weights[i].T for i in range(depth - 1)),
        "loss": problem.loss(),
        "excess_loss": problem.excess_loss(),
        "minimum_loss": problem.minimum_loss(),
        "optimum": problem.optimum(),
        "gradient": problem.gradient(),
        "exact_velocity": problem.exact_velocity(),
        "projections": problem.projections(),
        "dense": fisher,
        "block": fisher[: ends[1], ends[-2] :],
        "factors": (
            behind(weights, depth - 1) @ problem.input_moment,
            np.linalg.inv(problem.noise_covariance) @ ahead(weights, 0),
        ),
        "matvec": split(fisher @ stack(tangent), weights),
        "rank": float(rank),
        "spectrum": spectrum,
        "logdet": float(np.sum(np.log(spectrum[pairs - rank :]))),
    }
    for inverse in INVERSES:
        operator = problem.operator(inverse)
        out[inverse] = split(operator @ stack(problem.gradient()), weights)
        out[f"{inverse} of a tangent"] = split(operator @ stack(tangent), weights)
    return out


def leaves(value: Any) -> list[Any]:
    """Arrays in nested tuples, in order."""
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@functools.cache
def expected_of(name: str) -> Quantities:
    problem = case(name)
    return expected(problem, tangent_of(problem.weights))


def compare(backend: Backend, found: Quantities, wanted: Quantities, tol: float, like: Any) -> None:
    """Every array of the library and dtype of `like`, within the tolerance of its norm."""
    for key, value in wanted.items():
        actual, desired = leaves(found[key]), leaves(value)
        assert len(actual) == len(desired), key
        for a, d in zip(actual, desired, strict=True):
            backend.check(a, like)
            error = relative(backend.to_numpy(a), d)
            assert error <= tol, f"{key}: off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_everything_on_numpy(dtype, name):
    problem = case(name)
    weights, moments = problem.on(NUMPY, dtype)
    tangent = tuple(d.astype(dtype) for d in tangent_of(problem.weights))
    compare(NUMPY, everything(weights, moments, tangent), expected_of(name), tolerance(NUMPY, dtype), weights[0])


# JAX compiles every shape anew, which is slow: one small case eagerly, and one of each solver under jit.
SLOW = {
    "jax": [("float64", "all singular 3")],
    "jax-jit": [("float64", "all singular 3"), ("float64", "many pairs, bottleneck 3"), ("float32", "intermediate 3")],
}
COMBINATIONS = [
    pytest.param(backend, dtype, name, id=f"{backend}-{dtype}-{name}")
    for backend in BACKENDS
    for dtype, name in SLOW.get(backend.name, itertools.product(("float64", "float32"), FEW))
]


@pytest.mark.parametrize(("backend", "dtype", "name"), COMBINATIONS, indirect=["backend", "dtype"])
def test_everything_on_every_library(backend, dtype, name):
    problem = case(name)
    weights, moments = problem.on(backend, dtype)
    tangent = backend.asarrays(*(d.astype(dtype) for d in tangent_of(problem.weights)))
    found = backend.call(everything, weights, moments, tangent)
    compare(backend, found, expected_of(name), tolerance(backend, dtype), weights[0])


# --------------------------------------------------------------------------------- stacks


STACKS = {
    "dead inputs": lambda seed: well_conditioned((5, 4, 3), input_rank=4, seed=seed),
    "bottleneck": lambda seed: well_conditioned((4, 2, 3, 3), seed=seed),
}


def compare_members(
    backend: Backend, found: Quantities, problem: Problem, tangent: Any, shapes: Quantities, tol: float, like: Any
) -> None:
    """Every member against its own dense matrices; `shapes` has the core shapes, for stacks of none."""
    batch = problem.batch
    wanted = [
        expected(member, tuple(np.broadcast_to(d, (*batch, *d.shape[-2:]))[index] for d in tangent))
        for index, member in zip(np.ndindex(*batch), problem.members(), strict=True)
    ]
    for key, example in shapes.items():
        for position, leaf in enumerate(leaves(example)):
            actual = leaves(found[key])[position]
            backend.check(actual, like)
            full = np.broadcast_to(backend.to_numpy(actual), (*batch, *np.shape(leaf)))
            for index, member in zip(np.ndindex(*batch), wanted, strict=True):
                error = relative(full[index], leaves(member[key])[position])
                assert error <= tol, f"{key}{list(index)}: off by {error:.1e}"


@pytest.mark.parametrize("batch", BATCH_SHAPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_stack_is_its_members(dtype, batch, name):
    problem = stacked(batch, STACKS[name])
    weights, moments = problem.on(NUMPY, dtype)
    tangent = tuple(d.astype(dtype) for d in tangent_of(problem.weights))
    single = STACKS[name](0)
    shapes = expected(single, tangent_of(single.weights))
    found = everything(weights, moments, tangent)
    compare_members(NUMPY, found, problem, tangent, shapes, tolerance(NUMPY, dtype), weights[0])
    assert found["loss"].shape == batch
    assert found["layerwise"][0].shape == weights[0].shape


def broadcasting() -> Problem:
    """Six networks: layers, moments and targets each with batch axes of their own."""
    one = stacked((2, 1), lambda seed: well_conditioned((5, 4, 3), input_rank=4, seed=seed))
    three = stacked((3,), lambda seed: well_conditioned((5, 4, 3), input_rank=4, seed=10 + seed))
    teacher = np.random.default_rng(0).standard_normal((2, 1, 3, 5))
    cross = teacher @ three.input_moment
    output = cross @ teacher.mT + one.noise_covariance[0, 0]
    return Problem(
        (one.weights[0], three.weights[1]),
        three.input_moment,
        one.noise_covariance[0, 0],
        cross,
        (output + output.mT) / 2,
    )


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}")
        for backend in BACKENDS
        for dtype in ("float64", "float32")
        if "jax" not in backend.name or (backend.lazy and dtype == "float64")
    ],
    indirect=True,
)
def test_layers_and_moments_broadcast(backend, dtype):
    problem = broadcasting()
    assert problem.batch == (2, 3)
    weights, moments = problem.on(backend, dtype)
    tangent = tangent_of(problem.members()[0].weights)
    found = backend.call(everything, weights, moments, backend.asarrays(*(d.astype(dtype) for d in tangent)))
    shapes = expected(problem.members()[0], tangent)
    compare_members(backend, found, problem, tangent, shapes, tolerance(backend, dtype), weights[0])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "jax"], indirect=True, ids=str)
def test_stack_of_no_members(backend):
    problem = stacked((0,), STACKS["bottleneck"])
    weights, moments = problem.on(backend)
    found = backend.call(everything, weights, moments, weights)
    for key, value in found.items():
        for leaf in leaves(value):
            backend.check(leaf, weights[0])
            assert leaf.shape[0] == 0, key


def test_nothing_is_written_to():
    problem = case("intermediate 3")
    weights, moments = problem.on(NUMPY)
    tangent = tangent_of(problem.weights)
    before = pickle.dumps((weights, moments, tangent))
    everything(weights, moments, tangent)
    assert pickle.dumps((weights, moments, tangent)) == before


def test_memory_layout_does_not_matter():
    """Transposed, reversed and repeated views, as they come out of slicing."""
    problem = stacked((3,), STACKS["dead inputs"])
    weights, moments = problem.on(NUMPY)
    tangent = tangent_of(weights)
    views = [
        lambda a: np.asfortranarray(a),
        lambda a: np.ascontiguousarray(a.mT).mT,
        lambda a: np.ascontiguousarray(a[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        lambda a: np.repeat(a, 2, axis=0)[::2],
    ]
    wanted = everything(weights, moments, tangent)
    for view in views:
        found = everything(*([view(a) for a in arrays] for arrays in (weights, moments, tangent)))
        for key, value in wanted.items():
            for a, b in zip(leaves(found[key]), leaves(value), strict=True):
                assert relative(a, b) <= 1e-12, key


def test_lists_and_tuples_of_layers_are_alike():
    problem = case("wide 2")
    task = ng.GaussianTask(*problem.moments)
    np.testing.assert_array_equal(dl.end_to_end(list(problem.weights)), dl.end_to_end(problem.weights))
    for a, b in zip(dl.gradient(list(problem.weights), task), dl.gradient(problem.weights, task), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["dead inputs 3", "intermediate 3"])
def test_units_of_data_and_weights(dtype, name, scale):
    """Inputs and targets in other units: W, its velocity and the cut-offs follow."""
    problem = case(name)
    rescaled = Problem(
        (problem.weights[0] * scale, *problem.weights[1:]),
        problem.input_moment / scale**2,
        problem.noise_covariance,
        problem.cross_moment / scale,
        problem.output_moment,
    )
    weights, moments = rescaled.on(NUMPY, dtype)
    task = ng.GaussianTask(*moments)
    tol = tolerance(NUMPY, dtype)
    assert relative(dl.loss(weights, task), problem.loss()) <= tol
    assert relative(task.optimum() / scale, problem.optimum()) <= tol
    assert relative(dl.exact_velocity(weights, task) / scale, problem.exact_velocity()) <= tol
    for inverse in ("layerwise", "exact"):
        found = dl.natural_gradient(weights, task, inverse=inverse)
        wanted = problem.direction(inverse)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert relative(a / (scale if i == 0 else 1.0), b) <= tol
    assert int(dl.fisher(weights, task).rank()) == problem.rank()


# ------------------------------------------------------------- oracles: differences, autodiff


@pytest.mark.parametrize("name", ["one layer", "wide 3", "all singular 3", "bottleneck 5"])
def test_gradient_by_finite_differences(name):
    problem = case(name)
    found = dl.gradient(problem.weights, ng.GaussianTask(*problem.moments))
    for a, b in zip(found, problem.numerical_gradient(), strict=True):
        assert relative(a, b) <= 1e-10


def written_out_loss(xp: Any, weights: Any, moments: Any) -> Any:
    """½ tr Σ̃⁻¹(⟨yyᵀ⟩ − WMᵀ − MWᵀ + WΣWᵀ), summed over members."""
    sigma, noise, cross, output = moments
    w = weights[0]
    for layer in weights[1:]:
        w = layer @ w
    moment = output - w @ cross.mT - cross @ w.mT + w @ sigma @ w.mT
    return 0.5 * xp.sum(xp.linalg.inv(noise) * moment.mT)


@pytest.mark.parametrize("name", ["intermediate 3", "all singular 3"])
def test_gradient_by_jax(name):
    import jax

    problem = case(name)
    weights, moments = problem.on(JAX)
    wanted = jax.jit(jax.grad(lambda w: written_out_loss(jax.numpy, w, moments)))(weights)
    found = dl.gradient(problem.weights, ng.GaussianTask(*problem.moments))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= 1e-10


def test_gradient_by_torch():
    torch = pytest.importorskip("torch")
    problem = stacked((4,), STACKS["dead inputs"])
    weights = [torch.asarray(w, dtype=torch.float64).requires_grad_() for w in problem.weights]
    moments = [torch.asarray(m, dtype=torch.float64) for m in problem.moments]
    wanted = torch.autograd.grad(written_out_loss(torch, weights, moments), weights)
    found = dl.gradient([w.detach() for w in weights], ng.GaussianTask(*moments))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= 1e-10


def test_loss_itself_can_be_differentiated():
    """The library's loss inside someone else's training loop, with respect to weights."""
    import jax

    problem = case("all singular 3")
    weights, moments = problem.on(JAX)
    task = ng.GaussianTask(*moments)
    for function in (dl.loss, dl.excess_loss):
        found = jax.grad(lambda w, function=function: function(w, task))(weights)
        for a, b in zip(found, problem.gradient(), strict=True):
            assert relative(a, b) <= 1e-10


def test_loss_from_samples_is_the_mean_over_them():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 3))
    x[:, 2] = 0.0
    problem = case("intermediate 3")
    weights = [rng.standard_normal((4, 5)), rng.standard_normal((3, 4))]
    noise = problem.noise_covariance
    task = ng.GaussianTask.from_samples(x, y, noise_covariance=noise)
    residual = y - x @ (weights[1] @ weights[0]).T
    wanted = 0.5 * np.mean(np.einsum("ni,ij,nj->n", residual, np.linalg.inv(noise), residual))
    assert relative(dl.loss(weights, task), wanted) <= 1e-12


def test_small_excess_loss_keeps_its_digits():
    """1e-24 above the minimum, where the difference of two losses is rounding."""
    problem = case("wide 2")
    task = ng.GaussianTask(*problem.moments)
    first = problem.weights[0]
    last = problem.optimum() @ np.linalg.pinv(first)
    shift = tangent_of([last])[0]
    step = 1e-12 * shift @ first
    near = dl.excess_loss([first, last + 1e-12 * shift], task)
    wanted = 0.5 * np.trace(np.linalg.solve(problem.noise_covariance, step @ problem.input_moment @ step.T))
    assert abs(float(near) / wanted - 1.0) < 0.02


# ------------------------------------------------------------------------------- regimes


@pytest.mark.parametrize("name", CASES)
def test_regime_of_a_network_and_task(name):
    problem = case(name)
    assert dl.regime(problem.weights, ng.GaussianTask(*problem.moments)) == problem.regime()


@pytest.mark.parametrize(
    ("sizes", "regime"),
    [
        ((4, 3), "wide"),
        ((3, 4), "wide"),
        ((4, 4, 4), "wide"),
        ((3, 7, 5), "wide"),
        ((3, 5, 5), "wide"),
        ((3, 4, 5), "intermediate"),
        ((5, 4, 3), "intermediate"),
        ((6, 5, 4, 3), "intermediate"),
        ((6, 8, 3, 3), "intermediate"),
        ((5, 2, 5), "bottleneck"),
        ((5, 9, 2, 9, 3), "bottleneck"),
        ((1, 1, 1), "wide"),
    ],
    ids=str,
)
def test_regime_of_widths(backend, sizes, regime):
    weights = backend.asarrays(*(np.ones((2, m, n)) for n, m in itertools.pairwise(sizes)))
    assert backend.call(dl.regime, weights) == regime


def test_regime_counts_the_rank_of_the_inputs():
    weights = [np.ones((4, 6)), np.ones((3, 4))]
    moment = np.diag([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    task = ng.GaussianTask(moment, np.eye(3), np.zeros((3, 6)), np.eye(3))
    assert dl.regime(weights) == "intermediate"
    assert dl.regime(weights, task) == "wide"


# ------------------------------------------------------------------ what also works on Dask


def test_products_on_dask():
    problem = stacked((3,), STACKS["dead inputs"])
    weights, _ = problem.on(DASK)
    tangent = DASK.asarrays(*tangent_of(problem.weights))
    found = dl.end_to_end(weights), dl.end_to_end_velocity(weights, tangent), *dl.balancedness(weights)
    numpy_weights, numpy_tangent = problem.weights, tangent_of(problem.weights)
    wanted = (
        dl.end_to_end(numpy_weights),
        dl.end_to_end_velocity(numpy_weights, numpy_tangent),
        *dl.balancedness(numpy_weights),
    )
    for a, b in zip(found, wanted, strict=True):
        DASK.check(a, weights[0])
        assert relative(DASK.to_numpy(a), b) <= 1e-12


# ----------------------------------------------------------------------------- bad input

W1, W2 = np.ones((4, 5)), np.ones((3, 4))
GOOD = (W1, W2)
MOMENTS = np.eye(5), np.eye(3), np.zeros((3, 5)), np.eye(3)
TASK = ng.GaussianTask(*MOMENTS)

BAD_WEIGHTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a plain array": (W1, TypeError, r"weights must be a tuple or list .* got a numpy array of dtype float64"),
    "a stacked array": (np.ones((2, 3, 3)), TypeError, r"weights must be a tuple or list"),
    "None": (None, TypeError, r"weights must be .* got NoneType None"),
    "no layers": ((), ValueError, r"weights must be .* got an empty tuple"),
    "an empty list": ([], ValueError, r"weights must be .* got an empty list"),
    "a list in it": (([[1.0]], W2), TypeError, r"weights\[0\] must be an array .* got a list of length 1"),
    "a number in it": ((W1, 2.0), TypeError, r"weights\[1\] must be an array .* got float 2.0"),
    "float16": (
        (W1.astype(np.float16), W2),
        TypeError,
        r"weights\[0\] must have dtype float32 or float64, got float16",
    ),
    "complex": ((W1, W2 + 0j), TypeError, r"weights\[1\] must have dtype float32 or float64, got complex128"),
    "integers": ((W1, np.ones((3, 4), dtype=int)), TypeError, r"weights\[1\] must have dtype .* got int64"),
    "booleans": ((W1 > 0, W2), TypeError, r"weights\[0\] must have dtype .* got bool"),
    "two dtypes": (
        (W1, W2.astype(np.float32)),
        TypeError,
        r"weights\[1\] has dtype float32, but weights\[0\] has dtype float64",
    ),
    "a vector": ((W1, np.ones(4)), ValueError, r"weights\[1\] must have shape \(\*batch, m, n\), got \(4,\)"),
    "no rows": ((np.ones((0, 5)), np.ones((3, 0))), ValueError, r"weights\[0\] must have at least one row"),
    "layers in the wrong order": (
        (W2, W1),
        ValueError,
        r"weights\[1\] must have as many columns as weights\[0\] has rows \(3\)",
    ),
    "batches that do not broadcast": (
        (np.ones((2, 4, 5)), np.ones((3, 3, 4))),
        ValueError,
        r"batch shapes must broadcast, got weights\[0\]: \(2,\), weights\[1\]: \(3,\)",
    ),
}

OF_WEIGHTS = {
    "end_to_end": dl.end_to_end,
    "end_to_end_kernel": dl.end_to_end_kernel,
    "end_to_end_velocity": lambda w: dl.end_to_end_velocity(w, GOOD),
    "balancedness": dl.balancedness,
    "regime": dl.regime,
    "loss": lambda w: dl.loss(w, TASK),
    "excess_loss": lambda w: dl.excess_loss(w, TASK),
    "gradient": lambda w: dl.gradient(w, TASK),
    "fisher": lambda w: dl.fisher(w, TASK),
    "natural_gradient": lambda w: dl.natural_gradient(w, TASK),
    "exact_velocity": lambda w: dl.exact_velocity(w, TASK),
    "projections": lambda w: dl.projections(w, TASK),
}


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
@pytest.mark.parametrize("function", OF_WEIGHTS)
def test_bad_weights(function, bad):
    weights, error, message = BAD_WEIGHTS[bad]
    with pytest.raises(error, match=message):
        OF_WEIGHTS[function](weights)


@pytest.mark.parametrize("function", ["end_to_end", "natural_gradient"])
def test_a_generator_is_no_network(function):
    with pytest.raises(TypeError, match=r"weights must be a tuple or list .* got generator"):
        OF_WEIGHTS[function](w for w in GOOD)


BAD_TANGENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "one layer too few": ((W1,), ValueError, r"{0} must have one array for each of 2 layers, got 1"),
    "one layer too many": ((W1, W2, W2), ValueError, r"{0} must have one array for each of 2 layers, got 3"),
    "no layers": ((), ValueError, r"{0} must be .* got an empty tuple"),
    "an array": (W1, TypeError, r"{0} must be a tuple or list with one array for each layer, got a numpy array"),
    "transposed": (
        (W1.T, W2),
        ValueError,
        r"{0}\[0\] must have shape \(\*batch, 4, 5\) like its layer's weights, got \(5, 4\)",
    ),
    "a number": ((W1, 1.0), TypeError, r"{0}\[1\] must be an array"),
    "integers": ((W1.astype(int), W2), TypeError, r"{0}\[0\] must have dtype float32 or float64, got int64"),
    "float32": ((W1, W2.astype(np.float32)), TypeError, r"{0}\[1\] has dtype float32"),
    "batches that do not broadcast": (
        (np.ones((2, 4, 5)), np.ones((3, 3, 4))),
        ValueError,
        r"batch shapes must broadcast, got {0}\[0\]: \(2,\), {0}\[1\]: \(3,\)",
    ),
}

OF_TANGENT = {
    "direction": lambda d: dl.end_to_end_velocity(GOOD, d),
    "tangent": lambda d: dl.fisher(GOOD, TASK).matvec(d),
    "gradient": lambda d: dl.fisher(GOOD, TASK).precondition(d),
}


@pytest.mark.parametrize("bad", BAD_TANGENTS)
@pytest.mark.parametrize("name", OF_TANGENT)
def test_bad_tangents(name, bad):
    tangent, error, message = BAD_TANGENTS[bad]
    with pytest.raises(error, match=message.format(name)):
        OF_TANGENT[name](tangent)


BAD_TASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "moments": ((np.eye(5), np.eye(3)), TypeError, r"task must be a GaussianTask, got a tuple of length 2"),
    "None": (None, TypeError, r"task must be a GaussianTask, got NoneType None"),
    "other inputs": (
        ng.GaussianTask(np.eye(4), np.eye(3), np.zeros((3, 4)), np.eye(3)),
        ValueError,
        r"weights must lead from the task's 4 inputs to its 3 outputs, got 5 and 3",
    ),
    "other outputs": (
        ng.GaussianTask(np.eye(5), np.eye(2), np.zeros((2, 5)), np.eye(2)),
        ValueError,
        r"weights must lead from the task's 5 inputs to its 2 outputs, got 5 and 3",
    ),
    "float32": (
        ng.GaussianTask(*(m.astype(np.float32) for m in MOMENTS)),
        TypeError,
        r"task has dtype float32, but weights\[0\] has dtype float64",
    ),
}


@pytest.mark.parametrize("bad", BAD_TASKS)
@pytest.mark.parametrize(
    "function",
    [dl.loss, dl.excess_loss, dl.gradient, dl.fisher, dl.natural_gradient, dl.exact_velocity, dl.projections],
)
def test_bad_tasks(function, bad):
    task, error, message = BAD_TASKS[bad]
    with pytest.raises(error, match=message):
        function(GOOD, task)


def test_batch_of_a_task_has_to_broadcast():
    task = ng.GaussianTask(np.stack([np.eye(5)] * 2), np.eye(3), np.zeros((3, 5)), np.eye(3))
    with pytest.raises(ValueError, match=r"batch shapes must broadcast, got .*weights\[1\]: \(3,\), task: \(2,\)"):
        dl.loss((W1, np.ones((3, 3, 4))), task)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "inverse": ({"inverse": "pinv"}, ValueError, r"inverse must be one of 'layerwise', 'exact', .* got 'pinv'"),
    "inverse of no string": ({"inverse": None}, ValueError, r"inverse must be one of .* got None"),
    "method": ({"method": "svd"}, ValueError, r"method must be one of 'auto', 'eigh', 'cholesky', got 'svd'"),
    "rtol": ({"rtol": -1e-3}, ValueError, r"rtol must be at least 0, got -0.001"),
    "rtol NaN": ({"rtol": float("nan")}, ValueError, r"rtol must be at least 0, got nan"),
    "rtol of a string": ({"rtol": "tiny"}, TypeError, r"rtol must be a number or an array .* got str 'tiny'"),
    "rtol of a list": ({"rtol": [0.1]}, TypeError, r"rtol must be a number or an array .* got a list of length 1"),
    "rtol of a bool": ({"rtol": True}, TypeError, r"rtol must be a number or an array"),
    "rtol of another batch": (
        {"rtol": np.ones(3)},
        ValueError,
        r"rtol must have a shape that broadcasts to the batch shape",
    ),
    "rtol float32": (
        {"rtol": np.ones((), np.float32)},
        TypeError,
        r"rtol has dtype float32|has dtype float64, but rtol",
    ),
}


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options(bad, inverse):
    options, error, message = BAD_OPTIONS[bad]
    options = {"inverse": inverse} | options
    with pytest.raises(error, match=message):
        dl.natural_gradient(GOOD, TASK, **options)
    with pytest.raises(error, match=message):
        dl.fisher(GOOD, TASK).precondition(GOOD, **options)


def test_options_are_keywords_and_arrays_positional():
    with pytest.raises(TypeError, match="positional"):
        dl.natural_gradient(GOOD, TASK, "exact")
    with pytest.raises(TypeError, match="positional"):
        dl.end_to_end(weights=GOOD)


def test_mixed_libraries():
    import jax

    mixed = (W1, jax.numpy.asarray(W2))
    for function in OF_WEIGHTS.values():
        with pytest.raises(TypeError, match=r"all arrays must come from one library, got weights\[0\]: numpy.ndarray"):
            function(mixed)
    for function in OF_TANGENT.values():
        with pytest.raises(TypeError, match="all arrays must come from one library"):
            function(mixed)
    task = ng.GaussianTask(*(jax.numpy.asarray(m) for m in case("intermediate 3").moments))
    with pytest.raises(TypeError, match=r"one library, got weights\[0\]: numpy.ndarray.* task: "):
        dl.loss(case("intermediate 3").weights, task)


def test_mixed_devices():
    here, there = STRICT_DEVICE1.asarray(W1), STRICT_DEVICE2.asarray(W2)
    with pytest.raises(ValueError, match=r"weights\[1\] has device .*device2.*, but weights\[0\] has device .*device1"):
        dl.end_to_end((here, there))
    with pytest.raises(ValueError, match=r"device"):
        dl.end_to_end_velocity((here, STRICT_DEVICE1.asarray(W2)), (here, there))
    elsewhere = ng.GaussianTask(*STRICT_DEVICE2.asarrays(*MOMENTS))
    with pytest.raises(ValueError, match=r"task has device .*device2.*, but weights\[0\] has device .*device1"):
        dl.loss((here, STRICT_DEVICE1.asarray(W2)), elsewhere)


def test_kernel_that_would_not_fit():
    weights = np.broadcast_to(np.float64(1.0), (1, 2000)), np.broadcast_to(np.float64(1.0), (2000, 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"the end-to-end kernel of shape \(4000000, 4000000\) needs about .* GB"):
            dl.end_to_end_kernel(weights)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
