"""Pseudo-inverses, preconditioning and the thin bodies under them, case by case on every library."""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import array_api_strict
import mpmath
import numpy as np
import pytest
import scipy.linalg
from backends import BACKENDS, JAX, JAX_JIT, NUMPY, STRICT_DEVICE1, STRICT_DEVICE2, Backend, compiled_if_jax
from cases import (
    BATCH_SHAPES,
    RECTANGLES,
    SIZES,
    SPECIAL,
    factors,
    from_spectrum,
    members,
    orthogonal,
    positive_definite,
    special_stack,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Drawn, indefinite, positive_semidefinite, symmetric

import natgrad_array as ng
from natgrad_array import _arrays, linalg
from natgrad_array._arrays.control import _jitted

METHODS = ["auto", "eigh", "cholesky"]
COMPLETE = ["auto", "eigh"]  # the methods that answer for every matrix


# Eager JAX compiles every operation anew for every shape, and what it runs is what "jax-jit" runs:
# it gets a part of what the other libraries get.
def crossed(name: str, values: Iterable[Any], float32: Iterable[Any] = (), eager_jax: Iterable[Any] = ()) -> Any:
    """Cross the libraries with shapes, in float64 and for some in float32; eager JAX gets a few only."""
    chosen, single, few = list(values), list(float32), list(eager_jax)
    rows = [
        pytest.param(backend, dtype, value, id=f"{backend}-{dtype}-{value}")
        for backend in BACKENDS
        for dtype, listed in (
            ("float64", few if backend is JAX else chosen),
            ("float32", single if backend.float64 and backend is not JAX else []),
        )
        for value in listed
    ]
    return pytest.mark.parametrize(("backend", "dtype", name), rows, indirect=["backend"])


def everywhere(*names: str) -> Any:
    """Cross the libraries with dtypes and methods."""
    options = {"dtype": ["float64", "float32"], "method": METHODS, "complete": COMPLETE}
    rows = [
        pytest.param(backend, *values, id="-".join([str(backend), *values]))
        for backend in BACKENDS
        for values in itertools.product(*(options[name] for name in names))
        if not ("float32" in values and (backend is JAX or not backend.float64))
        if not ("eigh" in values and backend is JAX)
    ]
    return pytest.mark.parametrize(("backend", *names), rows, indirect=["backend"])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=COMPLETE)
def complete(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def epsilon(array: np.ndarray) -> float:
    return float(np.finfo(array.dtype).eps)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: object = "") -> None:
    """Every member within `tolerance` of its own norm, and NaN exactly where expected."""
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg=str(what))
    actual, expected = np.nan_to_num(actual).astype(np.float64), np.nan_to_num(expected).astype(np.float64)
    error = np.linalg.norm(actual - expected, axis=(-2, -1))
    bound = tolerance * np.linalg.norm(expected, axis=(-2, -1))
    assert np.all(error <= bound), f"{what} error over bound: {np.max(error / np.where(bound > 0, bound, 1.0))}"


def run_pinvh(backend: Backend, matrix: np.ndarray, **options: Any) -> np.ndarray:
    """`pinvh` of a NumPy array on a backend, checked for library, dtype, device, shape and mutation."""
    a = backend.asarray(matrix)
    before = backend.to_numpy(a)
    options = {name: backend.asarray(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    result = backend.call(ng.pinvh, a, **options)
    backend.check(result, a)
    assert result.shape == a.shape
    np.testing.assert_array_equal(backend.to_numpy(a), before)
    return backend.to_numpy(result)


def numpy_pinv(matrix: np.ndarray, rtol: float) -> np.ndarray:
    """NumPy's Hermitian pseudo-inverse in float64, a member at a time."""
    return members(lambda a: np.linalg.pinv(a, rcond=rtol, hermitian=True), matrix.astype(np.float64))


# ----------------------------------------------------------------------- pinvh: shapes


@crossed("batch", BATCH_SHAPES, float32=[(2, 3)], eager_jax=[(), (0,)])
def test_pinvh_batch_shapes(backend: Backend, dtype: str, method: str, batch: tuple[int, ...]) -> None:
    matrix = positive_definite(batch, 3).astype(dtype)
    actual = run_pinvh(backend, matrix, method=method)
    assert_close(actual, numpy_pinv(matrix, 1e-6), 200 * epsilon(actual))


@crossed("n", SIZES, float32=[33], eager_jax=[0, 2, 257])
def test_pinvh_sizes(backend: Backend, dtype: str, method: str, n: int) -> None:
    matrix = positive_definite((2,), n).astype(dtype)
    actual = run_pinvh(backend, matrix, method=method)
    assert_close(actual, members(np.linalg.inv, matrix.astype(np.float64)) if n else matrix, 500 * epsilon(actual))


@everywhere("complete")
@pytest.mark.parametrize("n", [2, 33])
def test_pinvh_sizes_half_rank(backend: Backend, complete: str, n: int) -> None:
    spectrum = np.where(np.arange(n) < n // 2, np.linspace(2.0, 1.0, n), 0.0)
    made = from_spectrum(spectrum, seed=n)
    actual = run_pinvh(backend, made.matrix, method=complete, rtol=1e-3)
    assert_close(actual, made.pinv(1e-3), 50 * n * epsilon(actual))


@everywhere("method")
def test_pinvh_stack_equals_loop(backend: Backend, method: str) -> None:
    matrix = positive_definite((5,), 4)
    matrix[1] = from_spectrum([1.0, 0.5, 0.0, 0.0]).matrix
    stacked = run_pinvh(backend, matrix, method=method, rtol=1e-5)
    looped = np.stack([run_pinvh(backend, member, method=method, rtol=1e-5) for member in matrix])
    assert_close(stacked, looped, 100 * epsilon(stacked))


# ---------------------------------------------------------------------- pinvh: values


@everywhere("dtype", "complete")
def test_pinvh_every_rank(backend: Backend, dtype: str, complete: str) -> None:
    made = [from_spectrum(np.where(np.arange(6) < rank, 3.0 - np.arange(6) / 3, 0.0), seed=rank) for rank in range(7)]
    matrix = np.stack([case.matrix for case in made]).astype(dtype)
    actual = run_pinvh(backend, matrix, method=complete, rtol=1e-4)
    assert_close(actual, np.stack([case.pinv(1e-4) for case in made]), 200 * epsilon(actual))


@everywhere("dtype", "method")
def test_pinvh_special_alone(backend: Backend, dtype: str, method: str) -> None:
    for name, special in SPECIAL.items():
        expected = special.pinv if special.certified or method != "cholesky" else np.full((3, 3), np.nan)
        actual = run_pinvh(backend, special.matrix.astype(dtype), method=method, rtol=1e-5)
        assert_close(actual, expected, 50 * epsilon(actual), name)


@everywhere("dtype", "method")
def test_pinvh_special_in_a_stack(backend: Backend, dtype: str, method: str) -> None:
    matrix, expected, certified = special_stack()
    matrix = matrix.astype(dtype)
    if method == "cholesky":
        expected = np.where(certified[:, None, None], expected, np.nan)
    actual = run_pinvh(backend, matrix, method=method, rtol=1e-5)
    assert_close(actual, expected, 50 * epsilon(actual))
    # A neighbour of a bad member is what it is in a stack of good ones, to the last bit.
    good = run_pinvh(backend, np.broadcast_to(matrix[0], matrix.shape), method=method, rtol=1e-5)
    np.testing.assert_array_equal(actual[::2], good[::2])


@everywhere("dtype", "method")
def test_pinvh_scales(backend: Backend, dtype: str, method: str) -> None:
    unit = from_spectrum([1.0, 0.5, 0.25, 0.05], seed=5)
    scales = 10.0 ** np.asarray([-20.0, 0.0, 20.0, -30.0, 30.0])[:, None, None]
    actual = run_pinvh(backend, (unit.matrix * scales).astype(dtype), method=method)
    assert_close(actual.astype(np.float64) * scales, np.stack([unit.pinv(0.0)] * 5), 500 * epsilon(actual))


@everywhere("method")
def test_pinvh_conditions(backend: Backend, method: str) -> None:
    decades = np.arange(2, 17)
    smallest = 10.0**-decades
    made = [from_spectrum([1.0, 0.7, value], seed=seed) for seed, value in enumerate(smallest)]
    rtol = 10.0 ** -np.minimum(decades + 0.5, 13.5 if backend.float64 else 5.5)
    result = run_pinvh(backend, np.stack([case.matrix for case in made]), method=method, rtol=rtol)
    eps = epsilon(result)
    for actual, case, cut, value in zip(result, made, rtol, smallest, strict=True):
        inverted = value > cut
        if method == "cholesky" and not (inverted and np.isfinite(actual).all()):
            # Too near the cut-off, or below it: no certificate, hence no number. Far above, it must be given.
            assert np.isnan(actual).all()
            assert not value > 4 * (cut + 3 * eps)
        else:
            assert_close(actual, case.pinv(cut), 100 * eps / (value if inverted else 1.0), value)


def test_cholesky_is_certified_far_above_the_cutoff(backend: Backend) -> None:
    for decades in (1, 2, 4, 6, 8, 10, 12) if backend.float64 else (1, 2, 4):
        made = from_spectrum([1.0, 1.0, 0.5, 10.0**-decades], seed=decades)
        actual = run_pinvh(backend, made.matrix, method="cholesky")
        assert_close(actual, made.pinv(0.0), 100 * epsilon(actual) * 10.0**decades, decades)


def test_cholesky_gives_nan_near_the_cutoff(backend: Backend) -> None:
    # The smallest eigenvalues over the cut-off: 0.5, 0.99, 1, 1.01 and 1000.
    ratios = np.asarray([0.5, 0.99, 1.0, 1.01, 1000.0])
    matrix = np.stack([from_spectrum([1.0, 1.0, 1e-4 * ratio], seed=1).matrix for ratio in ratios])
    actual = run_pinvh(backend, matrix, method="cholesky", rtol=1e-4)
    assert np.isnan(actual[:3]).all()
    assert_close(actual[4], from_spectrum([1.0, 1.0, 0.1], seed=1).pinv(0.0), 1e3 * epsilon(actual))


def test_cholesky_of_many_indefinite_matrices(backend: Backend) -> None:
    rng = np.random.default_rng(7)
    half = rng.standard_normal((60, 5, 5))
    matrix = half + np.swapaxes(half, -1, -2)
    smallest = np.linalg.eigvalsh(matrix)[:, 0]
    matrix = matrix[smallest < 0]
    assert matrix.shape[0] > 40
    assert np.isnan(run_pinvh(backend, matrix, method="cholesky")).all()


def aborted_cholesky(xp: Any, a: np.ndarray) -> np.ndarray:
    """Factors as CuPy leaves them: columns up to the first bad pivot, and what was there after it."""
    result = np.tril(a)
    for lower in result.reshape(-1, *a.shape[-2:]):
        for j in range(a.shape[-1]):
            if not lower[j, j] > 0.0:
                break
            lower[j:, j] /= np.sqrt(lower[j, j])
            lower[j + 1 :, j + 1 :] -= np.tril(np.outer(lower[j + 1 :, j], lower[j + 1 :, j]))
    return result


def test_cholesky_sees_through_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy does not say where it failed, so what it returns is asked whether it is a factor."""

    def checked(xp: Any, a: np.ndarray) -> np.ndarray:
        return _arrays.nan_unless_factor(xp, aborted_cholesky(xp, a), a)

    monkeypatch.setattr(linalg._arrays, "cholesky", checked)
    rng = np.random.default_rng(3)
    spectra = np.abs(rng.standard_normal((500, 6))) + 0.1
    spectra[np.arange(500), rng.integers(0, 6, 500)] *= -1.0
    matrix = np.stack([from_spectrum(spectrum, seed).matrix for seed, spectrum in enumerate(spectra)])
    finite = np.isfinite(linalg.inverse_lower(np, aborted_cholesky(np, matrix))).all(axis=(-2, -1))
    assert finite.mean() > 0.9
    assert np.isnan(ng.pinvh(matrix, method="cholesky")).all()
    good = positive_definite((5,), 6)
    np.testing.assert_allclose(ng.pinvh(good, method="cholesky"), np.linalg.inv(good), rtol=1e-10)


@pytest.mark.parametrize("deficient", [16, 1])
def test_a_sample_without_factors_sends_the_whole_stack_to_eigenvalues(
    deficient: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factorisation of a few members, and what every member would get alone, also where the sample misleads."""
    matrix = positive_definite((80,), 5)
    matrix[::deficient, 0] = matrix[::deficient, :, 0] = 0.0
    sizes = []
    cholesky = _arrays.cholesky
    monkeypatch.setattr(_arrays, "cholesky", lambda xp, a: sizes.append(a.shape[0]) or cholesky(xp, a))
    found = ng.pinvh(matrix)
    assert sizes == [3]
    np.testing.assert_allclose(found, np.linalg.pinv(matrix, hermitian=True), atol=1e-10)


@pytest.mark.parametrize("deficient", [slice(0, None, 16), slice(None), slice(1, None, 2)], ids=str)
@everywhere("dtype")
def test_a_few_members_decide_how_and_not_what(backend: Backend, dtype: str, deficient: slice) -> None:
    """Also where a library decides in a trace, and where cut-offs have more members than matrices.

    The few are every sixteenth: all of them are deficient, or none is.
    """
    matrix = positive_definite((80,), 5)
    matrix[deficient, 0] = matrix[deficient, :, 0] = 0.0
    matrix = matrix.astype(dtype)
    expected = numpy_pinv(matrix, 1e-4)
    actual = run_pinvh(backend, matrix)
    assert_close(actual, expected, 30 * 5 * 10 * epsilon(actual))
    grad, rtol = np.ones((2, 80, 5, 1), dtype=dtype), np.asarray([[1e-4], [0.2]], dtype=dtype)
    actual = run_precondition(backend, grad, matrix, np.ones((1, 1), dtype=dtype), rtol=rtol)
    expected = np.stack([numpy_pinv(matrix, cutoff) for cutoff in (1e-4, 0.2)]) @ grad
    assert_close(actual, expected, 30 * 5 * 10 * epsilon(actual))


def test_pinvh_on_a_mesh() -> None:
    """Both ways of a conditional are of arrays that vary over the devices."""
    jax = pytest.importorskip("jax")
    matrix = positive_definite((80,), 5).astype(np.float32)
    over, spec = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("members",)), jax.sharding.PartitionSpec("members")
    for cutoff in (None, 1e-4):
        on_mesh = jax.shard_map(functools.partial(ng.pinvh, rtol=cutoff), mesh=over, in_specs=spec, out_specs=spec)
        np.testing.assert_allclose(on_mesh(jax.numpy.asarray(matrix)), np.linalg.inv(matrix), rtol=1e-3, atol=1e-3)


def test_what_is_compiled_serves_for_every_cutoff() -> None:
    jax = pytest.importorskip("jax")
    matrix = jax.numpy.asarray(positive_definite((2, 80), 5, condition=3.0), dtype="float32")
    ways = [_jitted(function, False) for function in (linalg._certified_inverse, linalg._spectral_inverse)]
    counts = []
    for cutoff in (1e-4, 0.01, 0.1):
        ng.pinvh(matrix, rtol=cutoff)
        ng.pinvh(matrix, rtol=cutoff, method="eigh")
        counts.append([way._cache_size() for way in ways])
    assert counts[0] == counts[1] == counts[2] != [0, 0]


@everywhere("dtype", "complete")
def test_pinvh_penrose(backend: Backend, dtype: str, complete: str) -> None:
    made = [
        from_spectrum([5.0, -3.0, 2.0, 1.0, 0.0, 0.0], seed=1),
        from_spectrum([1.0, 1.0, 1.0, 0.3, 0.2, 0.0], seed=2),
    ]
    a = np.stack([case.matrix for case in made]).astype(dtype)
    p = run_pinvh(backend, a, method=complete, rtol=1e-4)
    tolerance = 500 * epsilon(p)
    a = a.astype(np.float64)
    p = p.astype(np.float64)
    np.testing.assert_allclose(a @ p @ a, a, atol=tolerance * 5)
    np.testing.assert_allclose(p @ a @ p, p, atol=tolerance * 5)
    np.testing.assert_allclose(a @ p, np.swapaxes(a @ p, -1, -2), atol=tolerance)
    np.testing.assert_allclose(p @ a, np.swapaxes(p @ a, -1, -2), atol=tolerance)


@everywhere("dtype", "complete")
def test_pinvh_is_symmetric_to_the_last_bit(backend: Backend, dtype: str, complete: str) -> None:
    actual = run_pinvh(backend, positive_definite((4,), 9).astype(dtype), method=complete)
    np.testing.assert_array_equal(actual, np.swapaxes(actual, -1, -2))


@pytest.mark.parametrize("n", [3, 6, 8])
def test_pinvh_against_mpmath(n: int, method: str) -> None:
    hilbert = scipy.linalg.hilbert(n)
    with mpmath.workdps(60):
        exact = np.asarray((mpmath.matrix(hilbert.tolist()) ** -1).tolist(), dtype=np.float64)
    condition = np.linalg.cond(hilbert)
    actual = run_pinvh(NUMPY, hilbert, method=method)
    assert_close(actual, exact, 10 * np.finfo(np.float64).eps * condition)


@everywhere("complete")
def test_pinvh_against_scipy(backend: Backend, complete: str) -> None:
    half = np.random.default_rng(3).standard_normal((4, 7, 5))
    matrix = half @ np.swapaxes(half, -1, -2)
    actual = run_pinvh(backend, matrix, method=complete, rtol=1e-5)
    expected = np.stack([scipy.linalg.pinvh(member, atol=0.0, rtol=1e-5) for member in matrix])
    assert_close(actual, expected, 5e3 * epsilon(actual))


@everywhere("complete")
def test_pinvh_float32_against_float64(backend: Backend, complete: str) -> None:
    matrix = (positive_definite((8,), 12, condition=1e3)).astype(np.float32)
    actual = run_pinvh(backend, matrix, method=complete)
    assert actual.dtype == np.float32
    expected = numpy_pinv(matrix, 12 * float(np.finfo(np.float32).eps))
    assert_close(actual, expected, 10 * 1e3 * epsilon(actual))


@everywhere("dtype", "method")
def test_pinvh_equivariance(backend: Backend, dtype: str, method: str) -> None:
    rng = np.random.default_rng(11)
    matrix = positive_definite((3,), 5)
    rotation, order = orthogonal(rng, 5), rng.permutation(5)
    stack = np.stack([matrix, rotation @ matrix @ rotation.T, matrix[:, order][:, :, order], 1024.0 * matrix])
    actual = run_pinvh(backend, stack.astype(dtype), method=method).astype(np.float64)
    plain = actual[0]
    expected = np.stack([plain, rotation @ plain @ rotation.T, plain[:, order][:, :, order], plain / 1024.0])
    assert_close(actual, expected, 500 * float(np.finfo(dtype if backend.float64 else "float32").eps))


# ----------------------------------------------------------------------- pinvh: rtol


@everywhere("complete")
def test_rtol_is_strict(backend: Backend, complete: str) -> None:
    matrix = np.diag([0.25, 1.0, 0.5])
    for rtol, expected in [
        (0.24, [4.0, 1.0, 2.0]),
        (0.25, [0.0, 1.0, 2.0]),
        (0.5, [0.0, 1.0, 0.0]),
        (0.75, [0.0, 1.0, 0.0]),
        (1.0, [0.0, 0.0, 0.0]),
        (1, [0.0, 0.0, 0.0]),
        (7.0, [0.0, 0.0, 0.0]),
    ]:
        actual = run_pinvh(backend, matrix, method=complete, rtol=rtol)
        np.testing.assert_allclose(actual, np.diag(expected), rtol=4 * epsilon(actual))


@everywhere("complete")
def test_rtol_zero_inverts_everything_but_zero(backend: Backend, complete: str) -> None:
    actual = run_pinvh(backend, np.diag([1.0, 1e-30, 0.0]), method=complete, rtol=0)
    np.testing.assert_allclose(actual, np.diag([1.0, 1e30, 0.0]), rtol=1e-5)


def test_rtol_of_cholesky(backend: Backend) -> None:
    matrix = np.diag([0.25, 1.0, 0.5])
    actual = run_pinvh(backend, matrix, method="cholesky", rtol=0)
    np.testing.assert_allclose(actual, np.diag([4.0, 1.0, 2.0]), rtol=8 * epsilon(actual))
    for rtol in (0.25, 1.0, 7.0):
        assert np.isnan(run_pinvh(backend, matrix, method="cholesky", rtol=rtol)).all()


@everywhere("dtype", "complete")
def test_rtol_default_is_n_eps(backend: Backend, dtype: str, complete: str) -> None:
    eps = float(np.finfo(dtype if backend.float64 else "float32").eps)
    matrix = np.zeros((2, 4, 4))
    matrix[:] = np.diag([1.0, 1.0, 0.5, 0.0])
    matrix[0, 3, 3], matrix[1, 3, 3] = 3.9 * eps, 4.1 * eps
    actual = run_pinvh(backend, matrix.astype(dtype), method=complete)
    assert actual[0, 3, 3] == 0.0
    np.testing.assert_allclose(actual[1, 3, 3], 1 / (4.1 * eps), rtol=1e-5)


CUTOFFS = [0.1, (0.3,), (0.0, 0.3, 2.0), ((0.3,), (0.1,)), ((0.0, 0.1, 0.2), (0.3, 0.6, 2.0))]


@crossed("cutoffs", CUTOFFS, eager_jax=CUTOFFS[-1:])
def test_rtol_per_member(backend: Backend, dtype: str, method: str, cutoffs: Any) -> None:
    rtol = np.asarray(cutoffs, dtype=dtype)
    matrix = np.zeros((2, 3, 3, 3))
    matrix[:] = from_spectrum([1.0, 0.5, 0.25]).matrix
    each = np.broadcast_to(rtol, (2, 3))
    expected = np.stack([[from_spectrum([1.0, 0.5, 0.25]).pinv(value) for value in row] for row in each])
    actual = run_pinvh(backend, matrix, method=method, rtol=rtol)
    if method == "cholesky":
        # The bound of the certificate is not tight: what it gives is right, and it gives what is far from the cut-off.
        given_up = np.isnan(actual).all(axis=(-2, -1))
        assert not np.any(given_up & (each <= 0.1))
        assert np.all(given_up | (each < 0.25))
        expected = np.where(given_up[..., None, None], np.nan, expected)
    assert_close(actual, expected, 100 * epsilon(actual))


@everywhere("method")
def test_rtol_bad_entries_hurt_their_member_only(backend: Backend, method: str) -> None:
    matrix = np.broadcast_to(np.diag([1.0, 2.0]), (4, 2, 2))
    actual = run_pinvh(backend, matrix, method=method, rtol=np.asarray([1e-3, -1e-3, np.nan, 0.0]))
    expected = np.broadcast_to(np.diag([1.0, 0.5]), (4, 2, 2)).copy()
    expected[1:3] = np.nan
    assert_close(actual, expected, 10 * epsilon(actual))


@pytest.mark.parametrize("rtol", [-1e-3, -1, float("nan"), float("-inf")])
def test_rtol_bad_number(backend: Backend, rtol: float) -> None:
    with pytest.raises(ValueError, match="rtol must be at least 0, got"):
        ng.pinvh(backend.asarray(np.eye(2)), rtol=rtol)


# ----------------------------------------------------- pinvh: dtypes, memory, concurrency


@everywhere("method")
@pytest.mark.parametrize("integer", ["int8", "uint8", "int32", "int64"])
def test_integers_are_promoted(backend: Backend, integer: str, method: str) -> None:
    a = backend.asarray(np.asarray([[2, 1], [1, 2]], dtype=integer))
    actual = backend.call(ng.pinvh, a, method=method)
    default = (
        backend.xp.float32 if backend.name in ("strict-device2", "strict-no_float64", "torch") else backend.xp.float64
    )
    backend.check(actual, a, dtype=default)
    np.testing.assert_allclose(backend.to_numpy(actual), np.asarray([[2.0, -1.0], [-1.0, 2.0]]) / 3, rtol=1e-6)


def _strided(matrix: np.ndarray) -> dict[str, np.ndarray]:
    wide = np.zeros((*matrix.shape[:-1], 2 * matrix.shape[-1]))
    wide[..., ::2] = matrix
    return {
        "fortran": np.asfortranarray(matrix),
        "transposed": np.ascontiguousarray(np.swapaxes(matrix, -1, -2)).swapaxes(-1, -2),
        "batch last in memory": np.moveaxis(np.ascontiguousarray(np.moveaxis(matrix, 0, -1)), -1, 0),
        "negative strides": np.ascontiguousarray(matrix[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "every other column": wide[..., ::2],
        "zero strides": np.broadcast_to(matrix[0], matrix.shape),
    }


@pytest.mark.parametrize("layout", list(_strided(np.zeros((2, 2, 2)))))
@pytest.mark.parametrize("readonly", [False, True])
def test_memory_layouts(layout: str, method: str, readonly: bool) -> None:
    matrix = positive_definite((4,), 5)
    given = _strided(matrix)[layout]
    if layout == "zero strides":
        matrix = np.ascontiguousarray(given)
    if readonly:
        given.flags.writeable = False
    before = given.copy()
    np.testing.assert_allclose(ng.pinvh(given, method=method), ng.pinvh(matrix, method=method), rtol=1e-12, atol=1e-12)
    grad = np.ones((4, 5, 5))
    np.testing.assert_allclose(
        ng.precondition(grad, given, given, method=method),
        ng.precondition(grad, matrix, matrix, method=method),
        rtol=1e-10,
    )
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name == "torch"], ids=str)
def test_memory_layouts_torch(backend: Backend, method: str) -> None:
    matrix = backend.asarray(positive_definite((4,), 5))
    transposed = matrix.mT.contiguous().mT
    backend.xp.testing.assert_close(ng.pinvh(transposed, method=method), ng.pinvh(matrix, method=method))
    expanded = matrix[0].expand(4, 5, 5)
    backend.xp.testing.assert_close(ng.pinvh(expanded, method=method), ng.pinvh(expanded.clone(), method=method))


def test_threads(method: str) -> None:
    stacks = [positive_definite((6,), 8, seed=seed) for seed in range(16)]
    stacks[3][2] = np.nan
    serial = [ng.pinvh(stack, method=method) for stack in stacks]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda stack: ng.pinvh(stack, method=method), stacks))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_functions_pickle() -> None:
    for function in (ng.pinvh, ng.precondition):
        assert pickle.loads(pickle.dumps(function)) is function


# ------------------------------------------------------------------ pinvh: drawn matrices


def _check_drawn(backend: Backend, drawn: Drawn) -> None:
    # As an array, so that a compiled function serves every cut-off.
    rtol = np.asarray(drawn.rtol, dtype=drawn.matrix.dtype)
    for method in METHODS:
        actual = run_pinvh(backend, drawn.matrix, method=method, rtol=rtol)
        n = drawn.matrix.shape[-1]
        if method == "cholesky" and np.isnan(actual).any():
            assert np.isnan(actual).all()
            # The Frobenius norm is at most √n times the largest eigenvalue, for A and for its inverse.
            certain = drawn.definite and n * drawn.condition * (drawn.rtol + 2 * n * epsilon(actual)) < 1.0
            assert not certain
        else:
            assert method != "cholesky" or drawn.definite
            assert_close(actual, drawn.pinv, drawn.tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", [positive_semidefinite, indefinite])
@given(data=st.data())
@settings(max_examples=150)
def test_drawn_matrices(kind: Callable[..., Any], dtype: str, data: st.DataObject) -> None:
    _check_drawn(NUMPY, data.draw(kind(dtype)))


@given(data=st.data())
@settings(max_examples=20)
def test_drawn_matrices_everywhere(backend: Backend, data: st.DataObject) -> None:
    dtype = "float64" if backend.float64 else "float32"
    _check_drawn(backend, data.draw(symmetric(dtype, indefinite=data.draw(st.booleans()), max_size=3)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(data=st.data())
@settings(max_examples=50)
def test_drawn_matrices_stacked(dtype: str, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(symmetric(dtype, max_size=5), min_size=1, max_size=4))
    n = max(case.matrix.shape[0] for case in drawn)
    drawn = [case for case in drawn if case.matrix.shape[0] == n]
    stack = np.stack([case.matrix for case in drawn])
    bad = data.draw(st.integers(-1, len(drawn) - 1)) if n else -1
    if bad >= 0:
        stack[bad, 0, n - 1] = np.nan
    actual = run_pinvh(NUMPY, stack, rtol=np.asarray([case.rtol for case in drawn], dtype=dtype))
    for index, case in enumerate(drawn):
        if index == bad:
            assert np.isnan(actual[index]).all()
        else:
            assert_close(actual[index], case.pinv, case.tolerance)


# -------------------------------------------------------------------------- precondition


def dense_precondition(
    grad: np.ndarray, left: np.ndarray, right: np.ndarray, *, damping: float = 0.0, rtol: float = 1e-10
) -> np.ndarray:
    """Solve (right ⊗ left + damping) x = vec(grad) as one dense system, in the kept directions."""
    grad, left, right = (array.astype(np.float64) for array in (grad, left, right))
    inverse_left = np.linalg.pinv(left, rcond=rtol, hermitian=True)
    inverse_right = np.linalg.pinv(right, rcond=rtol, hermitian=True)
    kept = np.kron(right @ inverse_right, left @ inverse_left)
    system = kept @ np.kron(right, left) @ kept + damping * np.eye(kept.shape[0])
    inverse = np.linalg.pinv(system, rcond=1e-9, hermitian=True)
    solution = kept @ inverse @ kept @ grad.reshape(-1, order="F")
    return solution.reshape(grad.shape, order="F")


def run_precondition(
    backend: Backend, grad: np.ndarray, left: np.ndarray, right: np.ndarray, **options: Any
) -> np.ndarray:
    arrays = backend.asarrays(grad, left, right)
    before = [backend.to_numpy(array) for array in arrays]
    options = {name: backend.asarray(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    result = backend.call(ng.precondition, *arrays, **options)
    backend.check(result, arrays[0])
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(array), old)
    return backend.to_numpy(result)


def layer(batch: tuple[int, ...], m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grad = np.random.default_rng(seed).standard_normal((*batch, m, n))
    return grad, positive_definite(batch, m, seed + 1), positive_definite(batch, n, seed + 2)


def singular_layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stack of two: 4 × 5 gradients, a left moment of rank 2 or 4, a right one of rank 3 or 0."""
    grad = np.random.default_rng(seed).standard_normal((2, 4, 5))
    left = np.stack(
        [from_spectrum([3.0, 1.0, 0.0, 0.0], seed=1).matrix, from_spectrum([2.0, 1.0, 1.0, 0.5], seed=2).matrix]
    )
    right = np.stack([from_spectrum([2.0, 1.0, 0.5, 0.0, 0.0], seed=3).matrix, np.zeros((5, 5))])
    return grad, left, right


@crossed("batch", BATCH_SHAPES, float32=[(2, 3)], eager_jax=[(), (0,)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_precondition_batch_shapes(backend: Backend, dtype: str, batch: tuple[int, ...], damping: float) -> None:
    grad, left, right = (array.astype(dtype) for array in layer(batch, 3, 2))
    actual = run_precondition(backend, grad, left, right, damping=damping)
    expected = members(lambda *core: dense_precondition(*core, damping=damping), grad, left, right)
    assert_close(actual, expected, 2e3 * epsilon(actual))


@crossed("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (5, 1), (2, 7), (31, 33)], eager_jax=[(2, 7)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_precondition_sizes(backend: Backend, dtype: str, shape: tuple[int, int], damping: float) -> None:
    grad, left, right = (array.astype(dtype) for array in layer((2,), *shape))
    actual = run_precondition(backend, grad, left, right, damping=damping)
    if grad.size == 0:
        assert actual.shape == grad.shape
        return
    # L X R + d X = G, written as d L⁻¹ X + X R = L⁻¹ G.
    expected = np.stack(
        [
            scipy.linalg.solve_sylvester(damping * np.linalg.inv(a), b, np.linalg.inv(a) @ g)
            for a, b, g in zip(left, right, grad, strict=True)
        ]
    )
    assert_close(actual, expected, 2e3 * epsilon(actual))


def test_precondition_cholesky(backend: Backend) -> None:
    grad, left, right = layer((3,), 3, 2)
    right[1] = 0.0
    actual = run_precondition(backend, grad, left, right, method="cholesky")
    expected = members(dense_precondition, grad, left, right)
    expected[1] = np.nan
    assert_close(actual, expected, 1e4 * epsilon(actual))


@everywhere("dtype", "complete")
def test_precondition_in_the_kept_directions(backend: Backend, dtype: str, complete: str) -> None:
    grad, left, right = (array.astype(dtype) for array in singular_layer())
    for damping in (0.0, 1e-3, 1.0, 100.0):
        actual = run_precondition(backend, grad, left, right, damping=damping, rtol=1e-4, method=complete)
        expected = members(lambda *core, d=damping: dense_precondition(*core, damping=d, rtol=1e-4), grad, left, right)
        assert_close(actual, expected, 2e3 * epsilon(actual), damping)


@everywhere("complete")
def test_precondition_is_an_inverse_kronecker_product(backend: Backend, complete: str) -> None:
    grad, left, right = singular_layer(seed=4)
    actual = run_precondition(backend, grad, left, right, rtol=1e-4, method=complete)
    for g, a, b, x in zip(grad, left, right, actual, strict=True):
        expected = scipy.linalg.pinvh(np.kron(b, a), atol=1e-4) @ g.reshape(-1, order="F")
        np.testing.assert_allclose(x.reshape(-1, order="F"), expected, atol=2e3 * epsilon(actual))


@everywhere("complete")
def test_damping_to_zero(backend: Backend, complete: str) -> None:
    grad, left, right = singular_layer()
    limit = run_precondition(backend, grad, left, right, rtol=1e-4, method=complete)
    for damping in (1e-3, 1e-6):
        near = run_precondition(backend, grad, left, right, damping=damping, rtol=1e-4, method=complete)
        # Eigenvalues of the kept part of the Kronecker product are at least 0.5.
        assert_close(near, limit, 2 * damping + 200 * epsilon(near))
    none = run_precondition(backend, grad, left, right, damping=np.asarray(0.0), rtol=1e-4, method=complete)
    assert_close(none, limit, 200 * epsilon(none))


@everywhere("complete")
def test_damping_to_infinity(backend: Backend, complete: str) -> None:
    grad, left, right = singular_layer()
    damping = 1e6
    far = run_precondition(backend, grad, left, right, damping=damping, rtol=1e-4, method=complete)
    project_left = left @ numpy_pinv(left, 1e-4)
    project_right = right @ numpy_pinv(right, 1e-4)
    # Eigenvalues of the Kronecker product are at most 6.
    assert_close(damping * far, project_left @ grad @ project_right, 1e-5)


@pytest.mark.parametrize("damping", [np.asarray([0.0, 0.5, 2.0]), np.asarray([[0.1], [1.0]]), np.asarray(0.2)], ids=str)
def test_damping_per_member(backend: Backend, damping: np.ndarray) -> None:
    arrays = layer((2, 3), 3, 2)
    actual = run_precondition(backend, *arrays, damping=damping)
    expected = np.empty((2, 3, 3, 2))
    for member in np.ndindex(2, 3):
        value = float(np.broadcast_to(damping, (2, 3))[member])
        expected[member] = dense_precondition(*(array[member] for array in arrays), damping=value)
    assert_close(actual, expected, 2e3 * epsilon(actual))


@everywhere("complete")
def test_damping_and_rtol_bad_entries_hurt_their_member_only(backend: Backend, complete: str) -> None:
    arrays = layer((3,), 3, 2)
    good = run_precondition(backend, *arrays, damping=np.asarray([0.1, 0.1, 0.1]), method=complete)
    bad_damping = run_precondition(backend, *arrays, damping=np.asarray([0.1, -0.1, 0.1]), method=complete)
    assert np.isnan(bad_damping[1]).all()
    np.testing.assert_array_equal(bad_damping[::2], good[::2])
    for damping in (0.0, 0.1):
        good = run_precondition(backend, *arrays, rtol=np.asarray([0.0, 0.0, 0.0]), damping=damping, method=complete)
        bad = run_precondition(backend, *arrays, rtol=np.asarray([0.0, -0.1, 0.0]), damping=damping, method=complete)
        assert np.isnan(bad[1]).all()
        np.testing.assert_array_equal(bad[::2], good[::2])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("bad", ["grad", "left", "right"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_precondition_bad_member(backend: Backend, damping: float, bad: str, value: float) -> None:
    arrays = dict(zip(("grad", "left", "right"), layer((3,), 3, 2), strict=True))
    good = run_precondition(backend, *arrays.values(), damping=damping)
    arrays[bad][1, 0, 1] = value
    actual = run_precondition(backend, *arrays.values(), damping=damping)
    assert not np.isfinite(actual[1]).all()
    if bad != "grad":
        assert np.isnan(actual[1]).all()
    np.testing.assert_array_equal(actual[::2], good[::2])


BROADCASTS = [((), (3,), (2, 1)), ((2, 1), (3,), ()), ((1,), (0,), (1,)), ((4,), (), ()), ((2, 3), (1, 3), (2, 1))]


@crossed("batches", BROADCASTS, eager_jax=BROADCASTS[:1])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_precondition_broadcasts(
    backend: Backend, dtype: str, batches: tuple[tuple[int, ...], ...], damping: float
) -> None:
    grad, left, right = (layer(batch, 3, 2)[i].astype(dtype) for i, batch in enumerate(batches))
    actual = run_precondition(backend, grad, left, right, damping=damping)
    batch = np.broadcast_shapes(*batches)
    full = [np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (grad, left, right)]
    expected = members(lambda *core: dense_precondition(*core, damping=damping), *full)
    # Both moments have condition 30, the dense system that of the pair.
    assert_close(actual, expected, 8 * 30**2 * epsilon(actual))


@given(
    left=positive_semidefinite("float64", max_size=4),
    right=positive_semidefinite("float64", max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_drawn_preconditioning(left: Drawn, right: Drawn, seed: int) -> None:
    grad = np.random.default_rng(seed).standard_normal((left.matrix.shape[0], right.matrix.shape[0]))
    expected = left.pinv @ grad @ right.pinv
    # One cut-off serves both factors, so they are preconditioned one at a time.
    half = (
        ng.precondition(grad, left.matrix, np.eye(right.matrix.shape[0]), rtol=left.rtol) if left.rtol < 1 else 0 * grad
    )
    actual = (
        ng.precondition(half, np.eye(left.matrix.shape[0]), right.matrix, rtol=right.rtol)
        if right.rtol < 1
        else 0 * half
    )
    scale = np.linalg.norm(left.pinv) * np.linalg.norm(grad) * np.linalg.norm(right.pinv)
    assert np.linalg.norm(actual - expected) <= 2 * (left.tolerance + right.tolerance) * scale


# ---------------------------------------------------------------------- the bodies below


@everywhere("dtype")
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (33, 2), (3, 0)], ids=str)
def test_svd_guard(backend: Backend, dtype: str, shape: tuple[int, int]) -> None:
    x = factors((4,), *shape, min(shape)).astype(dtype)
    if x.size:
        x[1, 0, 0] = np.nan
        x[2, -1, -1] = -np.inf
    a = backend.asarray(x)
    u, s, vh = (backend.to_numpy(part) for part in backend.call(lambda a: linalg.svd(backend.xp, a), a))
    assert (u.shape, s.shape, vh.shape) == ((4, shape[0], min(shape)), (4, min(shape)), (4, min(shape), shape[1]))
    if not x.size:
        return
    assert np.isnan(u[1:3]).all()
    assert np.isnan(s[1:3]).all()
    assert np.isnan(vh[1:3]).all()
    np.testing.assert_allclose((u * s[:, None, :] @ vh)[::3], x[::3], atol=50 * epsilon(s))
    np.testing.assert_allclose(s[::3], np.linalg.svd(x[::3].astype(np.float64))[1], rtol=50 * epsilon(s))


@everywhere("dtype")
@pytest.mark.parametrize("n", [0, 1, 5])
def test_eigh_guard(backend: Backend, dtype: str, n: int) -> None:
    x = positive_definite((4,), n).astype(dtype)
    if n:
        x[1, 0, 0] = np.nan
        x[2, -1, -1] = np.inf
    values, vectors = (
        backend.to_numpy(p) for p in backend.call(lambda a: linalg.eigh(backend.xp, a), backend.asarray(x))
    )
    assert (values.shape, vectors.shape) == ((4, n), (4, n, n))
    if not n:
        return
    assert np.isnan(values[1:3]).all()
    assert np.isnan(vectors[1:3]).all()
    np.testing.assert_allclose(values[::3], np.linalg.eigvalsh(x[::3].astype(np.float64)), rtol=2e3 * epsilon(values))
    good = vectors[::3]
    np.testing.assert_allclose(
        good * values[::3, None, :] @ np.swapaxes(good, -1, -2), x[::3], atol=50 * epsilon(values)
    )


@crossed("n", SIZES, float32=[33], eager_jax=[0, 2])
def test_inverse_lower(backend: Backend, dtype: str, n: int) -> None:
    lower = np.linalg.cholesky(positive_definite((2,), n)).astype(dtype)
    actual = backend.to_numpy(backend.call(lambda a: linalg.inverse_lower(backend.xp, a), backend.asarray(lower)))
    expected = members(
        lambda a: scipy.linalg.solve_triangular(a, np.eye(n), lower=True) if n else a, lower.astype(np.float64)
    )
    assert_close(actual, expected, 500 * epsilon(actual))
    np.testing.assert_array_equal(np.triu(actual, 1), 0.0)


def test_inverse_lower_nan_member(backend: Backend) -> None:
    lower = np.stack([np.linalg.cholesky(positive_definite((), 5))] * 3)
    lower[1] = np.nan
    actual = backend.to_numpy(backend.call(lambda a: linalg.inverse_lower(backend.xp, a), backend.asarray(lower)))
    assert np.isnan(actual[1]).any()
    assert np.isfinite(actual[::2]).all()


def dual_oracle(x: np.ndarray, rank: int, rtol: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    kept = (s > rtol * s.max(initial=0.0)) & (np.arange(s.size) < rank)
    return np.linalg.pinv((u * np.where(kept, s, 0.0)) @ vh, rcond=1e-9).T


@crossed("shape", [s for s in RECTANGLES if 0 not in s], float32=[(5, 3)], eager_jax=[(5, 3)])
def test_dual(backend: Backend, dtype: str, method: str, shape: tuple[int, int]) -> None:
    rank = min(shape)
    x = factors((2, 2), *shape, rank).astype(dtype)
    a = backend.asarray(x)
    actual = backend.call(lambda a: linalg.dual(backend.xp, a, rank, 1e-3, method), a)
    backend.check(actual, a)
    expected = members(lambda core: np.linalg.pinv(core.astype(np.float64)).T, x)
    assert_close(backend.to_numpy(actual), expected, 500 * epsilon(backend.to_numpy(actual)))


@everywhere("complete")
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_dual_low_rank(backend: Backend, complete: str, shape: tuple[int, int]) -> None:
    x = factors((3,), *shape, 2)
    actual = backend.to_numpy(backend.call(lambda a: linalg.dual(backend.xp, a, 3, 1e-2, complete), backend.asarray(x)))
    assert_close(actual, members(lambda core: np.linalg.pinv(core, rcond=1e-6).T, x), 500 * epsilon(actual))


def test_dual_stops_at_the_rank_of_the_shapes(backend: Backend) -> None:
    x = factors((), 6, 5, 5)
    for rank in range(6):
        actual = backend.to_numpy(
            backend.call(lambda a, r=rank: linalg.dual(backend.xp, a, r, 0.0), backend.asarray(x))
        )
        np.testing.assert_allclose(actual, dual_oracle(x, rank, 0.0), atol=100 * epsilon(actual))


@everywhere("method")
def test_dual_cutoff(backend: Backend, method: str) -> None:
    """The cut-off is on the singular values of the factor, also where its Gram matrix is inverted."""
    x = np.diag([1.0, 0.5, 0.25])[:, :]
    for rtol, expected in [
        (0.2, [1.0, 2.0, 4.0]),
        (0.3, [1.0, 2.0, 0.0]),
        (0.6, [1.0, 0.0, 0.0]),
        (1.5, [0.0, 0.0, 0.0]),
    ]:
        a = backend.asarray(x)
        actual = backend.to_numpy(backend.call(lambda a, t=rtol: linalg.dual(backend.xp, a, 3, t, method), a))
        if method == "cholesky" and np.isnan(actual).any():
            assert np.isnan(actual).all()
            continue
        np.testing.assert_allclose(actual, np.diag(expected), atol=50 * epsilon(actual))


@everywhere("complete")
def test_dual_per_member(backend: Backend, complete: str) -> None:
    x = np.broadcast_to(np.diag([1.0, 0.5, 0.25]), (4, 3, 3)).copy()
    x[1, 2, 0] = np.nan
    a, rtol = backend.asarrays(x, np.asarray([0.3, 0.3, -1.0, 0.0]))
    actual = backend.to_numpy(backend.call(lambda a, t: linalg.dual(backend.xp, a, 3, t, complete), a, rtol))
    expected = np.stack(
        [np.diag([1.0, 2.0, 0.0]), np.full((3, 3), np.nan), np.full((3, 3), np.nan), np.diag([1.0, 2.0, 4.0])]
    )
    # A negative cut-off squared is positive: only "auto" is asked about that member.
    chosen = [0, 1, 2, 3] if complete == "auto" else [0, 1, 3]
    assert_close(actual[chosen], expected[chosen], 50 * epsilon(actual))


@pytest.mark.parametrize(
    ("shapes", "batches"),
    [
        (((2, 3), (4, 5)), ((), ())),
        (((2, 3), (4, 5)), ((2, 1), (3,))),
        (((1, 1), (3, 2)), ((2,), (2,))),
        (((3, 1), (1, 3)), ((0,), (1,))),
        (((0, 2), (2, 2)), ((), (2,))),
    ],
    ids=str,
)
def test_kron(backend: Backend, shapes: Any, batches: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((*batch, *shape)) for batch, shape in zip(batches, shapes, strict=True))
    a, b = backend.asarrays(x, y)
    actual = backend.call(lambda a, b: linalg.kron(backend.xp, a, b), a, b)
    backend.check(actual, a)
    batch = np.broadcast_shapes(*batches)
    expected = members(np.kron, *(np.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (x, y)))
    assert_close(backend.to_numpy(actual), expected, 4 * epsilon(backend.to_numpy(actual)))


@everywhere("dtype")
def test_wide_factors(backend: Backend, dtype: str) -> None:
    rng = np.random.default_rng(1)
    shapes = [((2, 3), (4, 2)), ((2, 1), (4, 5)), ((2, 2), (4, 3))]
    batches = [((), (3,)), ((2, 1), ()), ((2, 3), (3,))]
    drawn = [
        tuple(rng.standard_normal((*batch, *core)).astype(dtype) for batch, core in zip(*pair, strict=True))
        for pair in zip(batches, shapes, strict=True)
    ]
    arrays = [backend.asarrays(*pair) for pair in drawn]

    def side_by_side(*pairs: Any) -> Any:
        left, right = linalg.wide_factors(backend.xp, pairs, (2, 3))
        return backend.xp.reshape(left[..., :, None, :] * right[..., None, :, :], (2, 3, 8, -1))

    actual = backend.call(side_by_side, *arrays)
    expected = [members(np.kron, *(np.broadcast_to(z, (2, 3, *z.shape[-2:])) for z in pair)) for pair in drawn]
    assert_close(backend.to_numpy(actual), np.concatenate(expected, axis=-1), 4 * epsilon(backend.to_numpy(actual)))


@pytest.mark.parametrize(
    ("batch", "shape"), [*((b, (2, 3)) for b in BATCH_SHAPES), ((), (3, 2)), ((2,), (0, 3))], ids=str
)
def test_vec(backend: Backend, batch: tuple[int, ...], shape: tuple[int, int]) -> None:
    x = np.arange(np.prod((*batch, *shape)), dtype=np.float64).reshape(*batch, *shape)
    a = backend.asarray(x)
    stacked = backend.call(lambda a: linalg.vec(backend.xp, a), a)
    backend.check(stacked, a)
    assert stacked.shape == (*batch, shape[0] * shape[1])
    for member in np.ndindex(*batch):
        np.testing.assert_array_equal(backend.to_numpy(stacked)[member], x[member].reshape(-1, order="F"))
    back = backend.call(lambda v: linalg.unvec(backend.xp, v, *shape), stacked)
    np.testing.assert_array_equal(backend.to_numpy(back), x)


def test_vec_and_kron_agree(backend: Backend) -> None:
    """vec(A X B) = (Bᵀ ⊗ A) vec(X)."""
    rng = np.random.default_rng(0)
    x, y, z = backend.asarrays(
        rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 2, 5)), rng.standard_normal((3, 5, 6))
    )
    xp = backend.xp
    one, other = backend.call(
        lambda a, m, b: (linalg.vec(xp, a @ m @ b), (linalg.kron(xp, b.mT, a) @ linalg.vec(xp, m)[..., None])[..., 0]),
        x,
        y,
        z,
    )
    one, other = backend.to_numpy(one), backend.to_numpy(other)
    np.testing.assert_allclose(one, other, atol=200 * epsilon(one))


# ------------------------------------------------------------------------------ bad input

EYE = np.eye(2)
EYE32 = np.eye(2, dtype=np.float32)
STACK = np.zeros((3, 2, 2))


def strict(array: Any, where: str = "device1") -> Any:
    return array_api_strict.asarray(array, device=array_api_strict.Device(where))


BAD_PINVH: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: ng.pinvh([[1.0]]), TypeError, "a must be an array .* got a list of length 1"),
    ("tuple", lambda: ng.pinvh(((1.0,),)), TypeError, "a must be an array .* got a tuple of length 1"),
    ("float", lambda: ng.pinvh(2.0), TypeError, "a must be an array .* got float 2.0"),
    ("int", lambda: ng.pinvh(2), TypeError, "a must be an array .* got int 2"),
    ("None", lambda: ng.pinvh(None), TypeError, "a"),
    ("string", lambda: ng.pinvh("eye"), TypeError, "a must be an array .* got str 'eye'"),
    (
        "float16",
        lambda: ng.pinvh(EYE.astype("float16")),
        TypeError,
        "a must have dtype float32, float64 or an integer dtype",
    ),
    ("complex", lambda: ng.pinvh(EYE.astype(complex)), TypeError, "a must have dtype .* got complex128"),
    ("bool", lambda: ng.pinvh(EYE.astype(bool)), TypeError, "a must have dtype .* got bool"),
    ("object", lambda: ng.pinvh(EYE.astype(object)), TypeError, "a must have dtype"),
    ("vector", lambda: ng.pinvh(np.ones(3)), ValueError, r"a must have shape \(\*batch, n, n\), got \(3,\)"),
    ("zero axes", lambda: ng.pinvh(np.asarray(1.0)), ValueError, r"a must have shape .* got \(\)"),
    ("not square", lambda: ng.pinvh(np.ones((4, 2, 3))), ValueError, r"a must have shape .* got \(4, 2, 3\)"),
    ("unknown method", lambda: ng.pinvh(EYE, method="qr"), ValueError, "method must be one of 'auto', .* got 'qr'"),
    ("method None", lambda: ng.pinvh(EYE, method=None), ValueError, "method must be one of .* got None"),
    ("method list", lambda: ng.pinvh(EYE, method=["eigh"]), ValueError, "method must be one of"),
    ("negative rtol", lambda: ng.pinvh(EYE, rtol=-1e-3), ValueError, "rtol must be at least 0, got -0.001"),
    ("nan rtol", lambda: ng.pinvh(EYE, rtol=float("nan")), ValueError, "rtol must be at least 0, got nan"),
    ("rtol list", lambda: ng.pinvh(EYE, rtol=[0.1]), TypeError, "rtol must be a number or an array .* got a list"),
    ("rtol string", lambda: ng.pinvh(EYE, rtol="0.1"), TypeError, "rtol must be a number or an array .* got str '0.1'"),
    ("rtol bool", lambda: ng.pinvh(EYE, rtol=True), TypeError, "rtol must be a number or an array .* got bool True"),
    ("rtol complex", lambda: ng.pinvh(EYE, rtol=1j), TypeError, "rtol must be a number or an array"),
    ("rtol dtype", lambda: ng.pinvh(EYE, rtol=np.asarray(0.1, dtype="float32")), TypeError, "rtol.*dtype float32"),
    (
        "rtol integer",
        lambda: ng.pinvh(EYE, rtol=np.asarray(0)),
        TypeError,
        "rtol must have dtype float32 or float64, got int64",
    ),
    (
        "rtol library",
        lambda: ng.pinvh(EYE, rtol=strict(np.asarray(0.1))),
        TypeError,
        "one library.*rtol: array_api_strict",
    ),
    ("rtol device", lambda: ng.pinvh(strict(EYE), rtol=strict(np.asarray(0.1), "device2")), ValueError, "rtol.*device"),
    (
        "rtol shape",
        lambda: ng.pinvh(STACK, rtol=np.zeros(4)),
        ValueError,
        r"rtol must have a shape .* \(3,\), got \(4,\)",
    ),
    (
        "rtol too many axes",
        lambda: ng.pinvh(EYE, rtol=np.zeros(1)),
        ValueError,
        r"rtol must have a shape .* \(\), got \(1,\)",
    ),
    ("rtol enlarges", lambda: ng.pinvh(STACK, rtol=np.zeros((2, 3))), ValueError, r"rtol .* \(3,\), got \(2, 3\)"),
]

BAD_PRECONDITION: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("grad list", lambda: ng.precondition([[1.0]], EYE, EYE), TypeError, "grad must be an array"),
    ("left list", lambda: ng.precondition(EYE, [[1.0]], EYE), TypeError, "left must be an array"),
    ("right scalar", lambda: ng.precondition(EYE, EYE, 1.0), TypeError, "right must be an array .* got float 1.0"),
    ("left None", lambda: ng.precondition(EYE, None, EYE), TypeError, "left"),
    (
        "float16",
        lambda: ng.precondition(EYE, EYE.astype("float16"), EYE),
        TypeError,
        "left must have dtype .* got float16",
    ),
    (
        "complex",
        lambda: ng.precondition(EYE.astype(complex), EYE, EYE),
        TypeError,
        "grad must have dtype .* got complex128",
    ),
    ("integer", lambda: ng.precondition(EYE, EYE, EYE.astype(int)), TypeError, "right must have dtype .* got int64"),
    (
        "mixed dtypes",
        lambda: ng.precondition(EYE, EYE, EYE32),
        TypeError,
        "right has dtype float32, but grad has dtype float64",
    ),
    (
        "mixed libraries",
        lambda: ng.precondition(EYE, strict(EYE), EYE),
        TypeError,
        "all arrays must come from one library, got grad: numpy.ndarray, left: array_api_strict",
    ),
    ("NumPy and JAX", lambda: ng.precondition(EYE, EYE, JAX.asarray(EYE)), TypeError, "one library.*right: jax"),
    (
        "mixed devices",
        lambda: ng.precondition(STRICT_DEVICE1.asarray(EYE), STRICT_DEVICE1.asarray(EYE), STRICT_DEVICE2.asarray(EYE)),
        ValueError,
        "right has device .*device2.* but grad has device .*device1",
    ),
    ("grad vector", lambda: ng.precondition(np.ones(2), EYE, EYE), ValueError, r"grad must have shape .* got \(2,\)"),
    (
        "left shape",
        lambda: ng.precondition(np.ones((3, 2)), EYE, EYE),
        ValueError,
        r"left must have shape \(\*batch, 3, 3\)",
    ),
    (
        "right shape",
        lambda: ng.precondition(np.ones((2, 3)), EYE, EYE),
        ValueError,
        r"right must have shape \(\*batch, 3, 3\)",
    ),
    ("left not square", lambda: ng.precondition(EYE, np.ones((2, 3)), EYE), ValueError, r"left must .* got \(2, 3\)"),
    ("left vector", lambda: ng.precondition(EYE, np.ones(2), EYE), ValueError, r"left must have shape .* got \(2,\)"),
    (
        "batches",
        lambda: ng.precondition(STACK, np.zeros((4, 2, 2)), EYE),
        ValueError,
        r"batch shapes must broadcast, got grad: \(3,\), left: \(4,\), right: \(\)",
    ),
    ("method", lambda: ng.precondition(EYE, EYE, EYE, method="lu"), ValueError, "method must be one of .* got 'lu'"),
    (
        "negative damping",
        lambda: ng.precondition(EYE, EYE, EYE, damping=-1.0),
        ValueError,
        "damping must be at least 0, got -1",
    ),
    (
        "nan damping",
        lambda: ng.precondition(EYE, EYE, EYE, damping=float("nan")),
        ValueError,
        "damping must be at least 0",
    ),
    (
        "damping list",
        lambda: ng.precondition(EYE, EYE, EYE, damping=[1.0]),
        TypeError,
        "damping must be a number or an array",
    ),
    (
        "damping None",
        lambda: ng.precondition(EYE, EYE, EYE, damping=None),
        TypeError,
        "damping must be a number or an array",
    ),
    (
        "damping shape",
        lambda: ng.precondition(STACK, EYE, EYE, damping=np.ones(2)),
        ValueError,
        r"damping .* \(3,\), got \(2,\)",
    ),
    ("negative rtol", lambda: ng.precondition(EYE, EYE, EYE, rtol=-1), ValueError, "rtol must be at least 0, got -1"),
    (
        "damped cholesky",
        lambda: ng.precondition(EYE, EYE, EYE, damping=0.1, method="cholesky"),
        ValueError,
        "method 'cholesky' has no eigenbasis",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in BAD_PINVH], ids=[row[0] for row in BAD_PINVH]
)
def test_pinvh_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in BAD_PRECONDITION], ids=[row[0] for row in BAD_PRECONDITION]
)
def test_precondition_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_options_are_keywords_and_arrays_are_not() -> None:
    with pytest.raises(TypeError):
        ng.pinvh(EYE, 1e-3)
    with pytest.raises(TypeError):
        ng.pinvh(a=EYE)
    with pytest.raises(TypeError):
        ng.precondition(EYE, EYE, EYE, 0.1)


# ----------------------------------------------------------- decompositions that do not converge


def _raise_for(monkeypatch: pytest.MonkeyPatch, name: str, stubborn: np.ndarray) -> None:
    """Make NumPy's decomposition raise for every stack that holds a given matrix."""
    original = getattr(np.linalg, name)

    def decomposition(a: np.ndarray, *args: Any, **options: Any) -> Any:
        if a.shape[-2:] == stubborn.shape and (a == stubborn).all(axis=(-2, -1)).any():
            raise np.linalg.LinAlgError(f"{name} did not converge")
        return original(a, *args, **options)

    monkeypatch.setattr(np.linalg, name, decomposition)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)])
def test_svd_that_does_not_converge_is_tried_on_the_transpose(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, *shape))
    _raise_for(monkeypatch, "svd", x[1, 2])
    u, s, vh = linalg.svd(NUMPY.xp, x)
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, x, atol=1e-14)
    monkeypatch.undo()
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), rtol=1e-13)


def test_svd_that_does_not_converge_either_way_is_nan_in_its_member(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 3))
    x[3] = np.diag([1.0, 2.0, 3.0])  # its own transpose
    _raise_for(monkeypatch, "svd", x[3])
    parts = linalg.svd(NUMPY.xp, x)
    for part in parts:
        np.testing.assert_array_equal(np.isnan(part).reshape(5, -1).all(axis=1), [False, False, False, True, False])
    single = linalg.svd(NUMPY.xp, x[3])
    assert [part.shape for part in single] == [(3, 3), (3,), (3, 3)]
    assert all(np.isnan(part).all() for part in single)


def test_eigh_that_does_not_converge_is_nan_in_its_member(monkeypatch: pytest.MonkeyPatch) -> None:
    x = positive_definite((6,), 4)
    _raise_for(monkeypatch, "eigh", x[1] + x[1].T)  # what is decomposed
    bad = np.arange(6) == 1
    np.testing.assert_array_equal(np.isnan(ng.pinvh(x, method="eigh")).all(axis=(1, 2)), bad)
    np.testing.assert_allclose(ng.pinvh(x, method="eigh")[~bad], np.linalg.inv(x)[~bad], rtol=1e-9)


# --------------------------------------------------- fast ways of a library, against the standard one


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 31, 33])
def test_inverse_of_factored_is_the_standard_one(backend: Backend, dtype: str, n: int) -> None:
    compiled_if_jax(backend)
    lower = np.linalg.cholesky(positive_definite((2, 3), n)).astype(dtype)
    fast = backend.call(linalg._arrays.inverse_of_factored, backend.asarray(lower))
    half = backend.to_numpy(backend.call(lambda x: linalg.inverse_lower(backend.xp, x), backend.asarray(lower)))
    standard = np.swapaxes(half, -1, -2) @ half
    tolerance = 1e3 * np.finfo(half.dtype).eps
    if fast is not None:
        backend.check(fast, backend.asarray(lower))
        np.testing.assert_allclose(backend.to_numpy(fast), standard, rtol=0, atol=tolerance * np.abs(standard).max())
    exact = np.linalg.inv(lower.astype(np.float64) @ np.swapaxes(lower, -1, -2).astype(np.float64))
    np.testing.assert_allclose(standard, exact, rtol=0, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("shape", [(7, 4), (5, 7, 4), (2, 3, 7, 4)])
def test_gram_is_symmetric_and_takes_a_row_off(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x, row = (rng.standard_normal(size).astype(dtype) for size in (shape, (*shape[:-2], 1, shape[-1])))
    for less in (None, row):
        expected = np.swapaxes(x, -1, -2).astype(np.float64) @ x
        expected = (expected - (0.0 if less is None else np.swapaxes(less, -1, -2) * less)) / 5.0
        given = [x] if less is None else [x, less]
        found = backend.to_numpy(
            backend.call(lambda x, less=None: _arrays.gram(backend.xp, x, 5.0, less=less), *backend.asarrays(*given))
        )
        np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))
        np.testing.assert_allclose(found, expected, rtol=0, atol=100 * np.finfo(found.dtype).eps)


@pytest.mark.parametrize("ranks", [(9, 9, 9), (3, 17, 12), (0, 0, 0), (0, 5, None)])
def test_columns_left_out_of_a_spectral_product_count_for_nothing(
    backend: Backend, dtype: str, ranks: tuple[int | None, ...]
) -> None:
    """Members of any rank beside each other, indefinite ones too, and one of NaN."""
    n = 17
    vectors = np.stack([orthogonal(np.random.default_rng(seed), n) for seed in range(3)])
    values = np.stack([np.arange(n) >= n - (n if rank is None else rank) for rank in ranks]) * np.linspace(-1.0, 2.0, n)
    values[[rank is None for rank in ranks]] = np.nan
    expected = np.einsum("...ik,...k,...jk->...ij", vectors, values, vectors)
    u, x = backend.asarrays(vectors.astype(dtype), values.astype(dtype))
    found = backend.call(lambda u, x: _arrays.spectral_product(backend.xp, u, x), u, x)
    backend.check(found, u)
    found = backend.to_numpy(found)
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * epsilon(found))


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each.float64], indirect=True, ids=str)
@pytest.mark.parametrize("n", [4, 9, 40])
def test_certificate_and_cutoff_agree_at_the_edge(backend: Backend, n: int) -> None:
    """A smallest eigenvalue just below the cut-off is dropped, one just above is inverted: never in between."""
    basis = orthogonal(np.random.default_rng(n), n)
    factors_of_cutoff = np.asarray([0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 30.0, 1e3])
    spectra = np.ones((factors_of_cutoff.size, n))
    spectra[:, 0] = 1e-6 * factors_of_cutoff
    stack = (basis * spectra[:, None, :]) @ basis.T
    kept = np.where(factors_of_cutoff[:, None] * np.ones(n) > 1.0, 1.0, np.r_[0.0, np.ones(n - 1)])
    expected = (basis * (kept / spectra)[:, None, :]) @ basis.T
    found = backend.to_numpy(backend.call(ng.pinvh, backend.asarray((stack + stack.mT) / 2), rtol=1e-6))
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 200])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_condition_bound_is_above_the_condition_and_close_to_it(n: int, spread: float, dtype: str) -> None:
    """With equal singular values the bound is near 1, where the product of the two norms is n."""
    rng = np.random.default_rng(n)
    u, v = (np.linalg.qr(rng.standard_normal((3, n, n)))[0] for _ in range(2))
    s = np.logspace(0.0, -spread, n) if n > 1 else np.ones(1)
    a = ((u * s) @ np.swapaxes(v, -1, -2)).astype(dtype)
    _, bound = linalg.inverse(NUMPY.xp, a)
    exact = np.linalg.cond(a.astype(np.float64))
    assert np.all(bound >= exact * (1 - 10 * n * np.finfo(dtype).eps * exact))  # the inverse is known to that
    frobenius = np.sqrt(np.sum(s**2) * np.sum(s**-2.0))
    assert np.all(bound <= frobenius * 1.01 + 2)
    if spread == 0.0:
        assert np.all(bound <= 2.0 + 6 * n * n * np.finfo(dtype).eps)


@pytest.mark.parametrize("n", [128, 256, 300])
def test_large_matrices_are_worked_on_in_blocks(n: int, dtype: str) -> None:
    """What is read from longer rows is the same, and what leaves zeros out is the inverse and symmetric."""
    a = np.random.default_rng(n).standard_normal((2, n, n)).astype(dtype)
    np.testing.assert_array_equal(_arrays.plus_transpose(a), a + np.swapaxes(a, -1, -2))
    a = positive_definite((2,), n).astype(dtype)
    inverse, _ = linalg.positive_inverse(NUMPY.xp, a)
    np.testing.assert_array_equal(inverse, np.swapaxes(inverse, -1, -2))
    np.testing.assert_allclose(a @ inverse, np.broadcast_to(np.eye(n), a.shape), atol=1e3 * epsilon(a))


@everywhere("dtype")
def test_inverse_of_a_stack_with_bad_members(backend: Backend, dtype: str) -> None:
    """A singular member and one with a NaN are known by their bound; the others are inverted as if alone."""
    a = np.stack([positive_definite((), 4, seed) for seed in range(5)])
    a[1] = 1.0
    a[3, 0, 0] = np.nan
    x = backend.asarray(a.astype(dtype))
    inverse, bound = backend.call(_arrays.quiet(lambda x: linalg.inverse(backend.xp, x)), x)
    backend.check(inverse, x)
    inverse, bound = backend.to_numpy(inverse), backend.to_numpy(bound)
    assert not np.any(bound[[1, 3]] < 1e6)
    assert not np.any(np.all(np.isfinite(inverse[[1, 3]]), axis=(-2, -1)))
    for b in (0, 2, 4):
        np.testing.assert_allclose(inverse[b], np.linalg.inv(a[b]), atol=2000 * epsilon(inverse))
        assert bound[b] < 1e5


_SIZES_BY_BLOCKS = {
    ("numpy", "float64"): (1, 5, 48, 49, 64, 100, 300),
    ("numpy", "float32"): (1, 5, 48, 49, 64, 100, 300),
    ("jax", "float64"): (1, 5, 8, 13, 16, 24, 33),
    ("jax", "float32"): (1, 5, 8, 13, 16, 24, 33),
    ("torch", "float32"): (1, 2, 8, 13, 24, 25, 40, 100, 200),
    ("torch", "float64"): (1, 2, 8, 13, 24, 32, 72, 200),
}


@pytest.mark.parametrize(
    ("backend", "dtype", "n"),
    [
        (backend, dtype, n)
        for backend in BACKENDS
        for (name, dtype), sizes in _SIZES_BY_BLOCKS.items()
        for n in sizes
        if backend.name == name
    ],
    ids=str,
)
def test_positive_inverses_by_blocks_are_as_accurate_as_those_of_lapack(backend: Backend, dtype: str, n: int) -> None:
    """On a CPU, against float64, at a condition of 1e3, and with members that are not positive definite."""
    members = 20 if backend.name == "jax" else -(-(2**13) // n)
    rng = np.random.default_rng(n)
    basis = np.linalg.qr(rng.standard_normal((members, n, n)))[0]
    positive = ((basis * np.geomspace(1.0, 1e-3, n)) @ basis.mT).astype(dtype)
    positive = (positive + positive.mT) / 2
    positive[1, 0, 0] *= -1.0  # the first pivot, with those after it positive
    positive[2, -1, -1] = -1.0
    positive[3, n // 2, n // 2] = np.nan
    positive[4] = 0.0
    (a,) = backend.asarrays(positive)
    assert _arrays.inverts_by_blocks(a, positive=True)
    # Op by op, JAX compiles hundreds of them for each size.
    call = JAX_JIT.call if backend is JAX else backend.call
    inverse, condition = map(backend.to_numpy, call(linalg.positive_inverse, backend.xp, a))
    assert np.array_equal(backend.to_numpy(a), positive, equal_nan=True)
    assert not np.isfinite(condition[1:5]).any()
    rest = np.delete(np.arange(members), slice(1, 5))
    exact = np.linalg.inv(positive[rest].astype(np.float64))
    error = np.linalg.norm(inverse[rest] - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
    assert error.max() < 1e3 * np.finfo(dtype).eps
    assert np.all(condition[rest] >= 0.99 * np.linalg.cond(positive[rest]))
    found = backend.to_numpy(ng.pinvh(a))
    for k in (0, 1, 2, 4, 5):
        alone = np.linalg.pinv(positive[k].astype(np.float64), hermitian=True)
        assert np.linalg.norm(found[k] - alone) <= 2e3 * np.finfo(dtype).eps * np.linalg.norm(alone)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(found, found.mT)


def test_pinvh_has_a_derivative_on_torch() -> None:
    """That of the inverse, −A⁻¹ R A⁻¹ of ⟨R, A⁻¹⟩, beside members of lower rank."""
    torch = pytest.importorskip("torch")
    matrix = positive_definite((80,), 5)
    matrix[1::2, 0] = matrix[1::2, :, 0] = 0.0
    weight = np.random.default_rng(1).standard_normal(matrix.shape)
    a = torch.asarray(matrix).requires_grad_()
    (gradient,) = torch.autograd.grad((ng.pinvh(a) * torch.asarray(weight)).sum(), a)
    inverse = np.linalg.inv(matrix[::2])
    expected = -inverse @ weight[::2] @ inverse
    expected = (expected + expected.swapaxes(-1, -2)) / 2
    np.testing.assert_allclose(gradient.numpy()[::2], expected, atol=1e-9 * np.abs(expected).max())


def test_what_needs_a_derivative_is_not_inverted_by_blocks_in_place() -> None:
    """torch's blocks have none."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 8, 12)).astype(np.float32)
    a = torch.asarray(x @ x.mT)
    assert _arrays.inverts_by_blocks(a, positive=True)
    linalg.positive_inverse(_arrays.namespace(a), a.requires_grad_())[0].sum().backward()
    exact = np.linalg.inv((x @ x.mT).astype(np.float64))
    slope = -exact.sum(-1)[..., :, None] * exact.sum(-1)[..., None, :]
    assert np.allclose(a.grad, slope, rtol=0.0, atol=1e-3 * np.abs(slope).max())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("backend", "n"),
    [(b, n) for b in BACKENDS for n in {"jax": (1, 5, 8, 13, 16), "torch": (1, 5, 8)}.get(b.name, ())],
    ids=str,
)
def test_inverses_by_blocks_are_as_accurate_as_those_of_lapack(backend: Backend, n: int, dtype: str) -> None:
    """General matrices on a CPU, against float64."""
    eps = np.finfo(dtype).eps
    rng = np.random.default_rng(n)
    members = 260 if backend.name == "jax" else -(-(2**13) // n)
    general = rng.standard_normal((members, n, n)).astype(dtype)
    general[0] = 0.0
    general[1, 0, 0] = np.nan
    # Has an inverse from n = 2 on, which needs a pivot: one member in 128 gets it, the first of them.
    general[2, 0, 0] = general[-1, 0, 0] = 0.0
    general[3, 0, 0] = 30 * eps  # loses nearly all digits without a pivot, and comes out finite
    (a,) = backend.asarrays(general)
    assert _arrays.inverts_by_blocks(a)
    # Op by op, JAX compiles hundreds of them for each size.
    call = JAX_JIT.call if backend is JAX else backend.call
    # What is certified later could all have been repaired: most members need no repair.
    bare = backend.to_numpy(call(_arrays.inverse_by_blocks, a))[4:-1]
    rest = general[4:-1].astype(np.float64)
    assert np.median(np.abs(rest @ bare - np.eye(n)).max((-2, -1))) < 1e3 * n * eps
    inverse, condition = call(linalg.inverse_without_pivots, backend.xp, a)
    assert np.array_equal(backend.to_numpy(a), general, equal_nan=True)
    certified = np.isfinite(backend.to_numpy(condition))
    assert not certified[:2].any()
    assert certified[2] == (n > 1)
    assert certified.mean() > 0.9
    general, inverse = general[certified].astype(np.float64), backend.to_numpy(inverse)[certified]
    exact = np.linalg.inv(general)
    error = np.linalg.norm(inverse - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
    assert np.all(error < 2 * n * eps * np.linalg.cond(general))
