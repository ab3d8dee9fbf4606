"""GaussianTask: where its moments come from, what it refuses, and how it travels."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, JAX, JAX_JIT, STRICT_DEVICE1, STRICT_DEVICE2
from reference import Problem, case, pinv, relative, stacked, well_conditioned

import natgrad_array as ng
from natgrad_array import deep_linear as dl

#: Libraries whose values are looked at when a task is made.
EAGER = [backend for backend in BACKENDS if not backend.lazy]
MOMENTS = ("input_moment", "noise_covariance", "cross_moment", "output_moment")


def tolerance(backend: Any, dtype: str) -> float:
    return 1e-10 if dtype == "float64" and backend.float64 else 1e-3


def data(n: int = 30, p: int = 4, q: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ rng.standard_normal((p, p)) + 1.0
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q))


def noise(q: int = 3) -> np.ndarray:
    return np.eye(q) + 0.3


# --------------------------------------------------------------------------- constructors


@pytest.mark.parametrize("given", [False, True])
def test_from_samples(backend, dtype, given):
    x, y = data()
    options = {"noise_covariance": backend.asarray(noise().astype(dtype))} if given else {}
    given_x, given_y = backend.asarrays(x.astype(dtype), y.astype(dtype))
    task = backend.call(ng.GaussianTask.from_samples, given_x, given_y, **options)
    model = noise() if given else np.eye(3)
    wanted = (x.T @ x / 30, model, y.T @ x / 30, y.T @ y / 30)
    for name, value in zip(MOMENTS, wanted, strict=True):
        backend.check(getattr(task, name), given_x)
        assert relative(backend.to_numpy(getattr(task, name)), value) <= tolerance(backend, dtype)
    slope = np.linalg.lstsq(x, y, rcond=None)[0].T
    residual = y - x @ slope.T
    least = 0.5 * np.mean(np.einsum("ni,ij,nj->n", residual, np.linalg.inv(model), residual))
    backend.check(task.optimum(), given_x)
    backend.check(task.minimum_loss(), given_x)
    assert relative(backend.to_numpy(task.optimum()), slope) <= tolerance(backend, dtype)
    assert relative(backend.to_numpy(task.minimum_loss()), least) <= tolerance(backend, dtype)
    assert (task.n_inputs, task.n_outputs, task.input_rank, task.batch_shape) == (4, 3, 4, ())


def test_from_samples_of_a_stack():
    many = [data(seed=seed) for seed in range(6)]
    x, y = (np.stack([pair[k] for pair in many]).reshape(2, 3, 30, -1) for k in range(2))
    task = ng.GaussianTask.from_samples(x, y)
    assert task.batch_shape == (2, 3)
    for k, (one_x, one_y) in enumerate(many):
        alone = ng.GaussianTask.from_samples(one_x, one_y)
        assert relative(task.optimum()[divmod(k, 3)], alone.optimum()) <= 1e-12
        assert relative(task.minimum_loss()[divmod(k, 3)], alone.minimum_loss()) <= 1e-12
    shared = ng.GaussianTask.from_samples(x[0, 0], y)
    assert shared.batch_shape == (2, 3)


def test_from_samples_takes_integers():
    x, y = np.asarray([[1, 0], [0, 2], [1, 1]]), np.asarray([[1], [2], [2]])
    task = ng.GaussianTask.from_samples(x, y)
    assert task.optimum().dtype == np.float64
    assert relative(task.optimum(), np.linalg.lstsq(x.astype(float), y.astype(float), rcond=None)[0].T) <= 1e-12


@pytest.mark.parametrize("given", [False, True])
def test_from_streamed_moments(backend, given):
    """Three pieces of data, merged; a task sees moments about zero, not about the mean."""
    x, y = data(45)
    options = {"noise_covariance": backend.asarray(noise())} if given else {}
    pieces = [backend.asarray(piece) for piece in np.split(np.concatenate([x, y], axis=-1), 3)]

    def stream(*arrays: Any, **noise_option: Any) -> ng.GaussianTask:
        joint = ng.Moments.from_samples(arrays[0])
        for array in arrays[1:]:
            joint = joint.merge(ng.Moments.from_samples(array))
        return ng.GaussianTask.from_moments(joint, 4, **noise_option)

    task = backend.call(stream, *pieces, **options)
    tol = tolerance(backend, "float64")
    wanted = (x.T @ x / 45, noise() if given else np.eye(3), y.T @ x / 45, y.T @ y / 45)
    for name, value in zip(MOMENTS, wanted, strict=True):
        backend.check(getattr(task, name), pieces[0])
        assert relative(backend.to_numpy(getattr(task, name)), value) <= tol
    assert relative(backend.to_numpy(task.optimum()), np.linalg.lstsq(x, y, rcond=None)[0].T) <= tol


@pytest.mark.parametrize("white", [False, True])
def test_from_modes(backend, dtype, white):
    rng = np.random.default_rng(1)
    left, right = (
        np.linalg.qr(rng.standard_normal((3, 3)))[0][:, :2],
        np.linalg.qr(rng.standard_normal((4, 4)))[0][:, :2],
    )
    values = np.asarray([3.0, 0.5])
    problem = well_conditioned((4, 3))
    sigma, model = (np.eye(4), np.eye(3)) if white else (problem.input_moment, problem.noise_covariance)
    options = (
        {}
        if white
        else {
            "input_moment": backend.asarray(sigma.astype(dtype)),
            "noise_covariance": backend.asarray(model.astype(dtype)),
        }
    )
    arrays = backend.asarrays(left.astype(dtype), values.astype(dtype), right.astype(dtype))
    task = backend.call(ng.GaussianTask.from_modes, *arrays, **options)
    teacher = (left * values) @ right.T
    wanted = (sigma, model, teacher @ sigma, teacher @ sigma @ teacher.T + model)
    for name, value in zip(MOMENTS, wanted, strict=True):
        backend.check(getattr(task, name), arrays[0])
        assert relative(backend.to_numpy(getattr(task, name)), value) <= tolerance(backend, dtype)
    assert relative(backend.to_numpy(task.optimum()), teacher) <= tolerance(backend, dtype)
    assert relative(backend.to_numpy(task.minimum_loss()), 1.5) <= tolerance(backend, dtype)


def test_from_modes_of_a_stack():
    rng = np.random.default_rng(1)
    values = rng.uniform(0.5, 2.0, (5, 3))
    task = ng.GaussianTask.from_modes(np.eye(3), values, np.eye(4)[:, :3])
    assert task.batch_shape == (5,)
    for k in range(5):
        assert relative(task.optimum()[k], np.diag(values[k]) @ np.eye(3, 4)) <= 1e-12


# ------------------------------------------------------------------------ rank deficient Σ


@pytest.mark.parametrize("name", ["one layer, dead inputs", "dead inputs 3", "all singular 3"])
def test_optimum_on_singular_inputs(backend, dtype, name):
    """W* = M Σ⁺, also under jit, where the rank is not known."""
    problem = case(name)
    _, moments = problem.on(backend, dtype)
    optimum, least = backend.call(
        lambda *m: (ng.GaussianTask(*m).optimum(), ng.GaussianTask(*m).minimum_loss()), *moments
    )
    backend.check(optimum, moments[0])
    assert relative(backend.to_numpy(optimum), problem.cross_moment @ pinv(problem.input_moment)) <= tolerance(
        backend, dtype
    )
    assert relative(backend.to_numpy(least), problem.minimum_loss()) <= tolerance(backend, dtype)
    if not backend.lazy:
        rank = int(np.linalg.matrix_rank(problem.input_moment, tol=1e-6))
        assert ng.GaussianTask(*moments).input_rank == rank


def test_a_dead_feature():
    x, y = data()
    x[:, 1] = 0.0
    task = ng.GaussianTask.from_samples(x, y)
    assert task.input_rank == 3
    assert np.max(np.abs(task.optimum()[:, 1])) <= 1e-14
    assert relative(task.optimum(), np.linalg.lstsq(x, y, rcond=None)[0].T) <= 1e-12


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fewer_samples_than_features(dtype):
    x, y = (a.astype(dtype) for a in data(3, 6, 2))
    task = ng.GaussianTask.from_samples(x, y)
    assert task.input_rank == 3
    assert relative(task.optimum(), np.linalg.lstsq(x.astype(float), y.astype(float), rcond=None)[0].T) <= (
        1e-10 if dtype == "float64" else 1e-2
    )
    assert abs(float(task.minimum_loss())) <= (1e-12 if dtype == "float64" else 1e-3) * float(np.mean(y * y))


def test_one_sample_and_no_inputs_that_move():
    task = ng.GaussianTask.from_samples(np.asarray([[2.0, 0.0]]), np.asarray([[4.0]]))
    assert relative(task.optimum(), [[2.0, 0.0]]) <= 1e-14
    still = ng.GaussianTask(np.zeros((2, 2)), np.eye(1), np.zeros((1, 2)), np.eye(1))
    assert not np.any(still.optimum())
    assert float(still.minimum_loss()) == 0.5
    weights = [np.ones((2, 2)), np.ones((1, 2))]
    for d in (*dl.gradient(weights, still), *dl.natural_gradient(weights, still, inverse="exact")):
        assert not np.any(d)
    assert float(dl.fisher(weights, still).rank()) == 0.0


def test_ranks_of_a_stack():
    """The largest rank counts for shapes; the others are padded, not disturbed."""
    problems = [well_conditioned((5, 3), input_rank=rank, seed=rank) for rank in (2, 4, 3)]
    task = ng.GaussianTask(*(np.stack([p.moments[k] for p in problems]) for k in range(4)))
    assert task.input_rank == 4
    for k, problem in enumerate(problems):
        assert relative(task.optimum()[k], problem.optimum()) <= 1e-10
        assert relative(task.minimum_loss()[k], problem.minimum_loss()) <= 1e-10


@pytest.mark.parametrize("scale_y", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale_x", [1e-6, 1.0, 1e6])
def test_units_of_inputs_and_targets(dtype, scale_x, scale_y):
    x, y = data()
    task = ng.GaussianTask.from_samples((x * scale_x).astype(dtype), (y * scale_y).astype(dtype))
    wanted = np.linalg.lstsq(x, y, rcond=None)[0].T * (scale_y / scale_x)
    tol = 1e-10 if dtype == "float64" else 1e-3
    assert task.optimum().dtype == np.dtype(dtype)
    assert relative(task.optimum(), wanted) <= tol
    least = 0.5 * np.mean(np.sum((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2, axis=-1)) * scale_y**2
    assert relative(task.minimum_loss(), least) <= tol


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-12])
def test_features_in_very_different_units(dtype, small):
    """Real data are taken as they come, whichever side of the cut-off a small feature falls on."""
    x, y = data(200)
    x = x * np.asarray([1.0 / small, 1.0, small, 1.0])
    task = ng.GaussianTask.from_samples(x.astype(dtype), y.astype(dtype))
    assert np.all(np.isfinite(task.optimum()))
    assert np.isfinite(float(task.minimum_loss()))


@pytest.mark.parametrize("seed", range(20))
def test_moments_of_data_are_never_refused(dtype, seed):
    """Rounding of moments, features that nearly coincide, targets that are functions of the inputs."""
    rng = np.random.default_rng(seed)
    n, p, q = int(rng.integers(1, 40)), int(rng.integers(1, 8)), int(rng.integers(1, 6))
    x = rng.standard_normal((n, p)) * 10.0 ** rng.uniform(-3, 3, p) + rng.standard_normal(p) * 10.0 ** rng.uniform(
        -2, 2
    )
    x[:, -1] = x[:, 0] * (1.0 + 10.0 ** rng.uniform(-12, 0) * rng.standard_normal(n))
    y = x @ rng.standard_normal((p, q)) if seed % 2 else rng.standard_normal((n, q))
    task = ng.GaussianTask.from_samples(x.astype(dtype), y.astype(dtype))
    assert np.all(np.isfinite(task.optimum()))


def test_a_member_that_overflows_warns_of_nothing_and_touches_no_other():
    sigma = np.stack([np.eye(2), 1e308 * np.ones((2, 2)), 4 * np.eye(2)])
    task = ng.GaussianTask(sigma, np.eye(2), 0.1 * np.ones((2, 2)), 4 * np.eye(2))
    np.testing.assert_allclose(task.optimum()[[0, 2]], 0.1 * np.ones((2, 2, 2)) / np.asarray([1.0, 4.0])[:, None, None])


# ------------------------------------------------------------------------------ bad values

EYE2, EYE3 = np.eye(2), np.eye(3)


def moments(**changes: np.ndarray) -> dict[str, np.ndarray]:
    good = {
        "input_moment": EYE3,
        "noise_covariance": EYE2,
        "cross_moment": 0.5 * np.ones((2, 3)),
        "output_moment": 4 * EYE2,
    }
    return good | changes


def entry(array: np.ndarray, index: tuple[int, int], value: float) -> np.ndarray:
    changed = np.array(array, dtype=np.float64)
    changed[index] = value
    return changed


BAD_VALUES: dict[str, tuple[str, np.ndarray, str]] = {
    "nan input": ("input_moment", entry(EYE3, (0, 1), np.nan), r"input_moment must be finite, got NaN or Inf"),
    "inf input": ("input_moment", entry(EYE3, (1, 1), np.inf), r"input_moment must be finite"),
    "nan noise": ("noise_covariance", entry(EYE2, (0, 0), np.nan), r"noise_covariance must be finite"),
    "nan cross": ("cross_moment", entry(np.ones((2, 3)), (1, 2), np.nan), r"cross_moment must be finite"),
    "minus inf cross": ("cross_moment", entry(np.ones((2, 3)), (1, 2), -np.inf), r"cross_moment must be finite"),
    "nan output": ("output_moment", entry(4 * EYE2, (1, 0), np.nan), r"output_moment must be finite"),
    "asymmetric input": ("input_moment", entry(EYE3, (0, 2), 0.3), r"input_moment must be symmetric"),
    "asymmetric noise": ("noise_covariance", entry(EYE2, (0, 1), 0.3), r"noise_covariance must be symmetric"),
    "asymmetric output": ("output_moment", entry(4 * EYE2, (0, 1), 0.3), r"output_moment must be symmetric"),
    "singular noise": ("noise_covariance", np.ones((2, 2)), r"noise_covariance must be positive definite"),
    "zero noise": ("noise_covariance", 0.0 * EYE2, r"noise_covariance must be positive definite"),
    "indefinite noise": ("noise_covariance", np.diag([1.0, -0.5]), r"noise_covariance must be positive definite"),
    "negative noise": ("noise_covariance", -EYE2, r"noise_covariance must be positive definite"),
    "indefinite input": ("input_moment", np.diag([1.0, 1.0, -0.1]), r"input_moment must be positive semidefinite"),
    "negative input": ("input_moment", -EYE3, r"input_moment must be positive semidefinite"),
    "cross outside the inputs": (
        "input_moment",
        np.diag([1.0, 1.0, 0.0]),
        r"cross_moment must have its rows in the range of input_moment",
    ),
    "output below the signal": ("output_moment", 0.1 * EYE2, r"output_moment must be at least cross_moment"),
    "output below the signal in one direction": (
        "output_moment",
        np.asarray([[1.0, -0.9], [-0.9, 1.0]]),
        r"output_moment must be at least cross_moment",
    ),
    "negative output": ("output_moment", -EYE2, r"output_moment must be at least cross_moment"),
}


@pytest.mark.parametrize("backend", EAGER, ids=str, indirect=True)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_values_of_one_task_raise(backend, bad):
    name, value, message = BAD_VALUES[bad]
    with pytest.raises(ValueError, match=message):
        ng.GaussianTask(**{key: backend.asarray(array) for key, array in moments(**{name: value}).items()})


@pytest.mark.parametrize("backend", EAGER, ids=str, indirect=True)
@pytest.mark.parametrize("name", MOMENTS)
def test_bad_values_in_a_stack_are_nan_there(backend, name):
    """Every other member has one; the other moments are not stacked."""
    bad = [value for changed, value, _ in BAD_VALUES.values() if changed == name]
    between = [moments()[name], *(array for value in bad for array in (value, moments()[name]))]
    task = ng.GaussianTask(**{key: backend.asarray(a) for key, a in moments(**{name: np.stack(between)}).items()})
    good = ng.GaussianTask(**{key: backend.asarray(a) for key, a in moments().items()})
    tol = 1e-14 if backend.float64 else 1e-6
    for found, wanted in ((task.optimum(), good.optimum()), (task.minimum_loss(), good.minimum_loss())):
        numbers, desired = backend.to_numpy(found), backend.to_numpy(wanted)
        assert np.all(np.isnan(numbers[1::2]))
        for number in numbers[0::2]:
            assert relative(number, desired) <= tol
    weights = backend.asarrays(0.3 * np.ones((4, 3)), 0.2 * np.ones((2, 4)))
    for array in (dl.loss(weights, task), *dl.natural_gradient(weights, task)):
        numbers = backend.to_numpy(array)
        assert np.all(np.isnan(numbers[1::2]))
        assert np.all(np.isfinite(numbers[0::2]))


def test_values_under_a_trace_are_not_looked_at():
    """No error and no NaN by decree: what comes out is what the formulas give."""
    for bad in ("asymmetric input", "indefinite noise", "cross outside the inputs", "negative output"):
        name, value, _ = BAD_VALUES[bad]
        arrays = {key: JAX_JIT.asarray(array) for key, array in moments(**{name: value}).items()}
        JAX_JIT.call(lambda m: ng.GaussianTask(**m).optimum(), arrays)
    arrays = {key: JAX_JIT.asarray(array) for key, array in moments(input_moment=entry(EYE3, (1, 1), np.nan)).items()}
    assert np.all(np.isnan(JAX_JIT.to_numpy(JAX_JIT.call(lambda m: ng.GaussianTask(**m).optimum(), arrays))))


def test_rounded_moments_are_taken():
    """Asymmetry, negative eigenvalues and misfits of the size of rounding are no errors."""
    x, y = (a.astype(np.float32).astype(np.float64) for a in data(6, 4, 3))
    x[:, 3] = x[:, 0] + x[:, 1]
    sigma = x.T @ x / 6
    sigma[0, 1] *= 1 + 1e-10
    task = ng.GaussianTask(sigma, EYE3, y.T @ x / 6, y.T @ y / 6)
    assert np.all(np.isfinite(task.optimum()))
    np.testing.assert_array_equal(task.input_moment, task.input_moment.T)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_moment": [[1.0]]}, TypeError, r"input_moment must be an array .* got a list of length 1"),
        ({"noise_covariance": 1.0}, TypeError, r"noise_covariance must be an array .* got float 1.0"),
        ({"input_moment": EYE3.astype(int)}, TypeError, r"input_moment must have dtype float32 or float64, got int64"),
        ({"output_moment": EYE2.astype(np.float16)}, TypeError, r"output_moment must have dtype .* got float16"),
        ({"cross_moment": np.ones((2, 3), complex)}, TypeError, r"cross_moment must have dtype .* got complex128"),
        (
            {"cross_moment": np.ones((2, 3), np.float32)},
            TypeError,
            r"cross_moment has dtype float32, but input_moment has",
        ),
        (
            {"input_moment": np.ones((3, 4))},
            ValueError,
            r"input_moment must have shape \(\*batch, n, n\), got \(3, 4\)",
        ),
        (
            {"noise_covariance": np.ones(2)},
            ValueError,
            r"noise_covariance must have shape \(\*batch, n, n\), got \(2,\)",
        ),
        (
            {"cross_moment": np.ones((3, 2))},
            ValueError,
            r"cross_moment must have shape \(\*batch, 2, 3\) \(outputs, inputs\), got \(3, 2\)",
        ),
        (
            {"output_moment": EYE3},
            ValueError,
            r"output_moment must have shape \(\*batch, 2, 2\) to match noise_covariance",
        ),
        (
            {"input_moment": np.stack([EYE3] * 2), "output_moment": np.stack([EYE2] * 3)},
            ValueError,
            r"batch shapes must broadcast, got input_moment: \(2,\)",
        ),
        (
            {"input_moment": np.ones((0, 0)), "cross_moment": np.ones((2, 0))},
            ValueError,
            r"a task must have at least one input and one output, got 0 and 2",
        ),
    ],
)
def test_bad_types_and_shapes(changes, error, message):
    with pytest.raises(error, match=message):
        ng.GaussianTask(**moments(**changes))


def test_mixed_libraries_and_devices():
    import jax

    with pytest.raises(TypeError, match="all arrays must come from one library"):
        ng.GaussianTask(**moments() | {"cross_moment": jax.numpy.ones((2, 3))})
    arrays = {key: STRICT_DEVICE1.asarray(array) for key, array in moments().items()}
    arrays["output_moment"] = STRICT_DEVICE2.asarray(4 * EYE2)
    with pytest.raises(
        ValueError, match=r"output_moment has device .*device2.*, but input_moment has device .*device1"
    ):
        ng.GaussianTask(**arrays)


X, Y = data()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ng.GaussianTask.from_samples(X.tolist(), Y), TypeError, r"x must be an array"),
        (lambda: ng.GaussianTask.from_samples(X, 1.0), TypeError, r"y must be an array .* got float 1.0"),
        (lambda: ng.GaussianTask.from_samples(X, Y[:-1]), ValueError, r"y must have as many .* x: \(30.* y: \(29"),
        (lambda: ng.GaussianTask.from_samples(X[:0], Y[:0]), ValueError, r"x must have at least one sample"),
        (lambda: ng.GaussianTask.from_samples(X[0], Y[0]), ValueError, r"x must have shape .* got \(\d+,\)"),
        (lambda: ng.GaussianTask.from_samples(X, Y[:, 0]), ValueError, r"y must have shape .* got \(30,\)"),
        (lambda: ng.GaussianTask.from_samples(X, Y.astype(np.float32)), TypeError, r"y has dtype float32, but x has"),
        (
            lambda: ng.GaussianTask.from_samples(X, Y, noise_covariance=[[1.0]]),
            TypeError,
            r"noise_covariance must be an array",
        ),
        (
            lambda: ng.GaussianTask.from_samples(X, Y, noise_covariance=EYE2),
            ValueError,
            r"noise_covariance|cross_moment",
        ),
        (
            lambda: ng.GaussianTask.from_samples(np.where(np.arange(30)[:, None] % 9 == 4, np.nan, X), Y),
            ValueError,
            r"x must be finite, got NaN or Inf in 3 of 30 samples, the first x\[4\]",
        ),
        (
            lambda: ng.GaussianTask.from_samples(X, np.where(np.arange(30)[:, None] == 29, -np.inf, Y)),
            ValueError,
            r"y must be finite, .* in 1 of 30 samples, the first y\[29\]",
        ),
        (lambda: ng.GaussianTask.from_moments(X, 2), TypeError, r"joint must be a Moments .* got a numpy array"),
        (
            lambda: ng.GaussianTask.from_moments(ng.Moments.from_samples(X), 0),
            ValueError,
            r"n_inputs must be an integer from 1 to 3, got 0",
        ),
        (
            lambda: ng.GaussianTask.from_moments(ng.Moments.from_samples(X), 4),
            ValueError,
            r"n_inputs must be an integer from 1 to 3, got 4",
        ),
        (
            lambda: ng.GaussianTask.from_moments(ng.Moments.from_samples(X), 2.0),
            ValueError,
            r"n_inputs must be an integer .* got 2.0",
        ),
        (
            lambda: ng.GaussianTask.from_moments(ng.Moments.from_samples(X), True),
            ValueError,
            r"n_inputs must be an integer .* got True",
        ),
        (
            lambda: ng.GaussianTask.from_moments(ng.Moments.from_samples(X), 2, noise_covariance=EYE3),
            ValueError,
            r"noise_covariance|cross_moment",
        ),
        (lambda: ng.GaussianTask.from_modes(EYE3, [1.0], EYE3), TypeError, r"singular_values must be an array"),
        (
            lambda: ng.GaussianTask.from_modes(EYE3, np.ones(2), EYE3),
            ValueError,
            r"singular_values must have shape \(\*batch, 3\)",
        ),
        (
            lambda: ng.GaussianTask.from_modes(EYE3, np.ones(3), EYE3[:, :2]),
            ValueError,
            r"right must have as many columns as left has \(3\)",
        ),
        (lambda: ng.GaussianTask.from_modes(np.ones(3), np.ones(3), EYE3), ValueError, r"left must have shape"),
        (
            lambda: ng.GaussianTask.from_modes(EYE3, np.ones(3), EYE3, input_moment=EYE2),
            ValueError,
            r"input_moment|right|cross",
        ),
        (
            lambda: ng.GaussianTask.from_modes(EYE3, np.ones(3, np.float32), EYE3),
            TypeError,
            r"singular_values has dtype float32",
        ),
    ],
)
def test_bad_arguments_of_constructors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------- how a task travels


def test_it_cannot_be_changed():
    task = ng.GaussianTask(**moments())
    for name in (*MOMENTS, "factors", "anything"):
        with pytest.raises(AttributeError, match=f"immutable: {name} cannot be set"):
            setattr(task, name, EYE3)
    with pytest.raises(AttributeError, match="immutable: input_moment cannot be deleted"):
        del task.input_moment
    assert not hasattr(task, "__dict__")


def test_it_does_not_change_with_the_arrays_it_was_made_from():
    arrays = {key: array.copy() for key, array in moments().items()}
    task = ng.GaussianTask(**arrays)
    before = pickle.dumps(task)
    for array in arrays.values():
        array += 1.0
    assert pickle.dumps(task) == before


@pytest.mark.parametrize(
    "backend",
    [b for b in BACKENDS if b.library in ("array_api_compat.numpy", "array_api_compat.torch", "jax.numpy")],
    ids=str,
    indirect=True,
)
def test_pickle(backend):
    problem = case("dead inputs 3")
    weights, arrays = problem.on(backend)
    task = ng.GaussianTask(*arrays)
    again = pickle.loads(pickle.dumps(task))
    assert isinstance(again, ng.GaussianTask)
    for name in MOMENTS:
        np.testing.assert_array_equal(backend.to_numpy(getattr(again, name)), backend.to_numpy(getattr(task, name)))
    assert repr(again) == repr(task)
    np.testing.assert_array_equal(backend.to_numpy(dl.loss(weights, again)), backend.to_numpy(dl.loss(weights, task)))


def test_repr():
    task = ng.GaussianTask(**moments(noise_covariance=np.stack([EYE2, 2 * EYE2, EYE2])))
    assert repr(task) == "GaussianTask(n_inputs=3, n_outputs=2, input_rank=3, batch_shape=(3,))"


def test_jax_tree():
    import jax

    problem = case("dead inputs 3")
    weights, arrays = problem.on(JAX)
    task = ng.GaussianTask(*arrays)
    leaves, tree = jax.tree_util.tree_flatten(task)
    assert len(leaves) == 4 + len(task.factors)
    unit = ng.GaussianTask(arrays[0], JAX.asarray(np.eye(arrays[1].shape[-1])), *arrays[2:])
    assert len(jax.tree_util.tree_leaves(unit)) == len(leaves) - 2  # the roots of the noise are not there
    again = jax.tree_util.tree_unflatten(tree, leaves)
    assert isinstance(again, ng.GaussianTask)
    assert again.input_rank == 4
    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, task)
    np.testing.assert_array_equal(doubled.input_moment, 2 * task.input_moment)
    wanted = problem.loss()
    assert relative(jax.jit(dl.loss)(weights, task), wanted) <= 1e-10
    # A placeholder in every leaf, as transformations make: nothing may be computed from it.
    shapes = jax.eval_shape(lambda t: t, task)
    assert isinstance(shapes, ng.GaussianTask)


def test_jax_vmap_over_tasks_and_networks():
    import jax

    problem = stacked((3,), lambda seed: well_conditioned((5, 4, 3), input_rank=4, seed=seed))
    weights, arrays = problem.on(JAX)
    task = ng.GaussianTask(*arrays)
    natural = jax.jit(jax.vmap(lambda w, t: (dl.loss(w, t), dl.natural_gradient(w, t, inverse="exact"))))
    loss, found = natural(weights, task)
    for k, member in enumerate(problem.members()):
        assert relative(loss[k], member.loss()) <= 1e-10
        for a, b in zip(found, member.direction("exact"), strict=True):
            assert relative(a[k], b) <= 1e-10
    one_task = ng.GaussianTask(*(a[0] for a in arrays))
    losses = jax.jit(jax.vmap(dl.loss, in_axes=(0, None)))(weights, one_task)
    first = problem.members()[0]
    for k, member in enumerate(problem.members()):
        assert relative(losses[k], Problem(member.weights, *first.moments).loss()) <= 1e-10


def test_jax_vmap_of_the_constructor():
    import jax

    many = [data(seed=seed) for seed in range(3)]
    x, y = (JAX.asarray(np.stack([pair[k] for pair in many])) for k in range(2))
    optimum = jax.jit(jax.vmap(lambda a, b: ng.GaussianTask.from_samples(a, b).optimum()))(x, y)
    for k, (one_x, one_y) in enumerate(many):
        assert relative(optimum[k], np.linalg.lstsq(one_x, one_y, rcond=None)[0].T) <= 1e-10


def test_a_task_made_on_a_device_stays_there():
    arrays = {key: STRICT_DEVICE2.asarray(array) for key, array in moments().items()}
    task = ng.GaussianTask(**arrays)
    factors = (factor for factor in task.factors if factor is not None)
    for leaf in (*factors, *(getattr(task, name) for name in MOMENTS)):
        STRICT_DEVICE2.check(leaf, arrays["input_moment"])


def test_stack_of_no_tasks():
    empty = ng.GaussianTask(np.ones((0, 3, 3)), EYE2, np.ones((0, 2, 3)), np.ones((0, 2, 2)))
    assert empty.batch_shape == (0,)
    assert empty.optimum().shape == (0, 2, 3)
    assert empty.minimum_loss().shape == (0,)
