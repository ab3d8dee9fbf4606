"""Moments against NumPy, scikit-learn and sums in extended precision."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import re
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import array_api_strict
import numpy as np
import pytest
from backends import BACKENDS, DASK, JAX, JAX_JIT, STRICT_DEVICE1, STRICT_DEVICE2, Backend, compiled_if_jax
from cases import BATCH_SHAPES, orthogonal
from hypothesis import given
from hypothesis import strategies as st
from recording import complaint, record
from sklearn.covariance import ledoit_wolf, oas, shrunk_covariance

import natgrad_array.moments as moments_module
from natgrad_array import _arrays
from natgrad_array.moments import (
    Moments,
    _merged,
    _merged_to_fourth_order,
    _seen,
    _seen_to_fourth_order,
    covariance,
    second_moment,
)

SHRINKERS = {"ledoit_wolf": ledoit_wolf, "oas": oas}


@pytest.fixture(params=[*BACKENDS, DASK], ids=str)
def everywhere(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each library in turn, Dask among them."""
    request.param.activate()
    try:
        yield request.param
    finally:
        request.param.deactivate()


def tolerance(dtype: Any) -> float:
    return 1e-12 if np.dtype(dtype) == np.float64 else 2e-5


def samples(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """Correlated samples with a mean of the size of their spread."""
    rng = np.random.default_rng(seed)
    p = shape[-1]
    x = rng.standard_normal(shape) @ rng.standard_normal((p, p)) + rng.standard_normal(p)
    return x.astype(dtype)


def fractions_of(*shape: int, seed: int = 1, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 2.0, shape).astype(dtype)


def exact(
    x: np.ndarray, weights: np.ndarray | None = None, correction: float = 0, centre: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of one member by sums in extended precision, from the first sample on."""
    x = x.astype(np.longdouble)
    w = np.ones(x.shape[0], np.longdouble) if weights is None else weights.astype(np.longdouble)
    total = w.sum()
    shift = (w[:, None] * (x - x[0])).sum(0) / total
    deviation = x - x[0] - shift if centre else x
    scatter = np.einsum("k,ki,kj->ij", w, deviation, deviation)
    return x[0] + shift, scatter / (total - correction * (w**2).sum() / total)


def assert_close(actual: np.ndarray, desired: np.ndarray, tol: float | None = None, case: str = "") -> None:
    """Compare on the scale of the largest entry, as rounding in a matrix product goes."""
    assert actual.shape == desired.shape
    tol = tolerance(actual.dtype) if tol is None else tol
    scale = float(np.max(np.abs(desired), initial=0.0))
    np.testing.assert_allclose(actual, desired.astype(np.float64), rtol=tol, atol=tol * scale, err_msg=case)


def numpy_moments(backend: Backend, moments: Moments) -> Moments:
    return Moments(*(backend.to_numpy(field) for field in moments))


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that NumPy's arrays took during a call."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------- values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("p", "q"), [(4, 2), (2, 5), (3, 3)])
def test_second_moment_is_the_mean_of_outer_products(everywhere, dtype, weighted, p, q):
    x, y = samples(9, p, dtype=dtype), samples(9, q, seed=3, dtype=dtype)
    w = fractions_of(9, dtype=dtype) if weighted else np.ones(9)
    expected = sum(w[k] * np.outer(x[k].astype(float), y[k]) for k in range(9)) / w.sum()
    options = {"weights": everywhere.asarray(w.astype(dtype))} if weighted else {}
    given_x, given_y = everywhere.asarrays(x, y)
    actual = everywhere.call(second_moment, given_x, given_y, **options)
    everywhere.check(actual, given_x)
    assert_close(everywhere.to_numpy(actual), expected)
    own = sum(w[k] * np.outer(x[k].astype(float), x[k]) for k in range(9)) / w.sum()
    actual = everywhere.call(second_moment, given_x, **options)
    everywhere.check(actual, given_x)
    assert_close(everywhere.to_numpy(actual), own)


@pytest.mark.parametrize("weighted", [False, True])
def test_covariance_is_numpys(everywhere, dtype, weighted):
    x = samples(3, 9, 4, dtype=dtype)
    w = fractions_of(3, 9, dtype=dtype) if weighted else None
    options = {} if w is None else {"weights": everywhere.asarray(w)}
    given_x = everywhere.asarray(x)

    def run(a: Any, **options: Any) -> list[Any]:
        return [covariance(a, correction=correction, **options) for correction in (0, 1, 0.5)]

    for correction, actual in zip((0, 1, 0.5), everywhere.call(run, given_x, **options), strict=True):
        everywhere.check(actual, given_x)
        actual = everywhere.to_numpy(actual)
        for b in range(3):
            if correction == 0.5:  # numpy.cov takes whole numbers only
                expected = exact(x[b], None if w is None else w[b], 0.5)[1]
            else:
                expected = np.cov(x[b].T.astype(float), aweights=None if w is None else w[b], ddof=correction)
            assert_close(actual[b], expected)


def test_covariance_about_a_known_mean(everywhere):
    x, w = samples(9, 4), fractions_of(9)
    given_x, given_w = everywhere.asarrays(x, w)
    actual = everywhere.call(covariance, given_x, assume_centered=True, correction=1)
    assert_close(everywhere.to_numpy(actual), exact(x, None, 1, centre=False)[1])
    actual = everywhere.call(covariance, given_x, assume_centered=True, correction=1, weights=given_w)
    assert_close(everywhere.to_numpy(actual), exact(x, w, 1, centre=False)[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_one_piece(everywhere, dtype, weighted):
    x = samples(3, 9, 4, dtype=dtype)
    w = fractions_of(3, 9, dtype=dtype) if weighted else np.ones((3, 9), dtype)
    options = {"weights": everywhere.asarray(w)} if weighted else {}
    given_x = everywhere.asarray(x)

    def run(a: Any, **options: Any) -> tuple[Any, ...]:
        moments = Moments.from_samples(a, **options)
        return moments, moments.second_moment(), moments.covariance(), moments.covariance(correction=1)

    moments, *results = everywhere.call(run, given_x, **options)
    assert isinstance(moments, Moments)
    for array in (*moments, *results):
        everywhere.check(array, given_x)
    actual = numpy_moments(everywhere, moments)
    second, *covariances = [everywhere.to_numpy(result) for result in results]
    assert_close(actual.weight, w.astype(float).sum(-1))
    assert_close(actual.weight_squared, (w.astype(float) ** 2).sum(-1))
    for b in range(3):
        mean, cov = exact(x[b], w[b])
        assert_close(actual.mean[b], mean)
        assert_close(actual.scatter[b], cov * w[b].sum(dtype=np.longdouble))
        assert_close(second[b], exact(x[b], w[b], centre=False)[1])
        for correction in (0, 1):
            assert_close(covariances[correction][b], exact(x[b], w[b], correction)[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_far_from_zero_costs_no_digits(everywhere, weighted):
    offset = np.asarray([1e8, -1e8, 3e7]) * (1.0 if everywhere.float64 else 1e-4)
    x = everywhere.to_numpy(everywhere.asarray(samples(2, 200, 3) + offset))
    w = everywhere.to_numpy(everywhere.asarray(fractions_of(2, 200)))
    options = {"weights": everywhere.asarray(w)} if weighted else {}

    def run(a: Any, **options: Any) -> tuple[Any, Any]:
        pieces = [
            Moments.from_samples(
                a[:, k : k + 50, ...], **{name: value[:, k : k + 50] for name, value in options.items()}
            )
            for k in range(0, 200, 50)
        ]
        return covariance(a, correction=1, **options), functools.reduce(Moments.merge, pieces)

    direct, streamed = everywhere.call(run, everywhere.asarray(x), **options)
    direct, streamed = everywhere.to_numpy(direct), numpy_moments(everywhere, streamed)
    for b in range(2):
        mean, cov = exact(x[b], w[b] if weighted else None, 1)
        assert_close(direct[b], cov, 1e-13 if everywhere.float64 else 1e-5)
        # The means of pieces are stored to 1e8 · eps, 1.5e-8 of the spread, and so are their differences.
        assert_close(streamed.covariance(correction=1)[b], cov, 1e-7 if everywhere.float64 else 2e-3)
        assert_close(streamed.mean[b], mean, 1e-15 if everywhere.float64 else 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rounding_error_of_the_mean_is_taken_back(backend, dtype, weighted):
    """Near 1/eps the mean itself rounds to 3 % of the spread, which one centring would leave in."""
    if dtype == "float64" and not backend.float64:
        dtype = "float32"
    offset = 0.5 / float(np.finfo(dtype).eps) / 8
    x = (samples(1000, 3) + offset).astype(dtype)
    w = fractions_of(1000, dtype=dtype) if weighted else None
    options = {} if w is None else {"weights": backend.asarray(w)}
    given_x = backend.asarray(x)
    cov = backend.to_numpy(backend.call(covariance, given_x, **options))
    moments = numpy_moments(backend, backend.call(Moments.from_samples, given_x, **options))
    mean, expected = exact(x, w)
    assert_close(cov, expected)
    assert_close(moments.covariance(), expected)
    np.testing.assert_allclose(moments.mean, mean.astype(float), rtol=1.01 * np.finfo(dtype).eps)


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0])
def test_one_centring_is_enough_below_a_bound(backend, dtype, distance, monkeypatch):
    """Of 300 samples, whose mean rounding leaves off by less than their product shows; two beyond the bound."""
    if dtype == "float64" and not backend.float64:
        dtype = "float32"
    eps = float(np.finfo(dtype).eps)
    x = samples(300, 3)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    x = (x + distance / (300 * (2 * eps) ** 0.5)).astype(dtype)
    twice, two_pass = [], moments_module._two_pass
    monkeypatch.setattr(moments_module, "_two_pass", lambda *args: twice.append(1) or two_pass(*args))
    found = backend.to_numpy(backend.call(covariance, backend.asarray(x)))
    np.testing.assert_allclose(found, exact(x)[1].astype(float), rtol=0, atol=20 * eps)
    if not backend.jit and _arrays.can_branch(backend.asarray(x)):
        assert bool(twice) == (distance > 1.0)


@pytest.mark.parametrize(("n", "kind"), [(300_001, np.float32), (20_001, np.float64)])
def test_the_mean_of_many_samples_is_right_to_the_last_bit(n, kind):
    x = np.random.default_rng(0).uniform(1.0, 2.0, (n, 2)).astype(kind)
    for weights in (None, np.ones(n, kind)):
        mean = Moments.from_samples(x, weights=weights).mean
        np.testing.assert_allclose(mean, exact(x)[0].astype(float), rtol=np.finfo(kind).eps)


# -------------------------------------------------------------------------- many samples


def ways(n: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Stacks of n samples, named by what the mean of most of their members is like."""
    rng = np.random.default_rng(n)
    big = 1e7 if dtype == "float64" else 1e3
    centred = rng.standard_normal((6, n, 3))
    centred -= centred.mean(-2, keepdims=True)
    constant = centred.copy()
    constant[..., 1] = 0.1
    one_far = centred.copy()
    one_far[2] += big
    one_feature = centred.copy()
    one_feature[..., 2] += big
    late = centred.copy()  # the few samples that are looked at say little of the others
    late[:, 1::2, 0] += big
    near = centred + np.linspace(0.5, 1.0, 6)[:, None, None]  # on both sides of the bound
    stacks = {"none": centred, "all": centred + big, "one": one_far, "one feature": one_feature, "near": near}
    stacks |= {"constant": constant, "ramp": np.sort(centred, axis=-2) + 3.0, "late": late}
    return {name: stack.astype(dtype) for name, stack in stacks.items()}


@pytest.mark.parametrize("n", [64, 65, 127, 300])
def test_many_samples_with_and_without_a_mean(everywhere, dtype, n, monkeypatch):
    if n in (65, 300):  # as if they were too many to be copied unseen
        monkeypatch.setattr("natgrad_array.moments.SMALL_BYTES", 0)

    def run(a: Any) -> tuple[Any, ...]:
        return covariance(a), covariance(a, correction=1), Moments.from_samples(a)

    for name, x in ways(n, dtype if everywhere.float64 else "float32").items():
        given_x = everywhere.asarray(x)
        direct, unbiased, moments = everywhere.call(run, given_x)
        everywhere.check(direct, given_x)
        direct, unbiased = everywhere.to_numpy(direct), everywhere.to_numpy(unbiased)
        moments = numpy_moments(everywhere, moments)
        tol = 1e-13 if direct.dtype == np.float64 else 1e-5
        eps = float(np.finfo(direct.dtype).eps)
        for cov in (direct, moments.scatter):
            np.testing.assert_array_equal(cov, np.swapaxes(cov, -1, -2), err_msg=name)
        for b in range(6):
            mean, cov = exact(x[b])
            assert_close(direct[b], cov, tol, name)
            assert_close(unbiased[b], exact(x[b], None, 1)[1], tol, name)
            assert_close(moments.scatter[b], cov * n, tol, name)
            # On the scale of the spread where that is larger than the mean.
            bound = 10 * eps * (np.abs(mean) + np.sqrt(np.diagonal(cov)))
            assert np.all(np.abs(moments.mean[b] - mean) <= bound), name
            if name == "constant":
                assert np.all(np.abs(direct[b][1]) <= eps**2)


@pytest.mark.parametrize("shrinkage", SHRINKERS)
@pytest.mark.parametrize("name", ways(64))
def test_estimated_shrinkage_of_many_samples(everywhere, dtype, name, shrinkage, monkeypatch):
    if dtype == "float32":  # as if they were too many to be copied unseen
        monkeypatch.setattr("natgrad_array.moments.SMALL_BYTES", 0)
    x = ways(150, dtype if everywhere.float64 else "float32")[name]
    actual = everywhere.to_numpy(everywhere.call(covariance, everywhere.asarray(x), shrinkage=shrinkage))
    for b in range(6):
        # About its mean, so that scikit-learn's single centring loses nothing.
        deviation = (x[b] - exact(x[b])[0]).astype(float)
        assert_close(actual[b], SHRINKERS[shrinkage](deviation)[0], 1e-11 if actual.dtype == np.float64 else 2e-5)


@pytest.mark.parametrize("mean", [0.0, 7.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, "huge"])
def test_a_bad_sample_among_many(backend, mean, bad):
    x = samples(5, 80, 3) + mean
    clean = backend.call(covariance, backend.asarray(x))
    if bad == "huge":  # its square overflows
        bad = 1e200 if backend.float64 else 1e30
    x[3, 11, 1] = bad
    x[3, 12, 1] = -bad
    actual = backend.to_numpy(backend.call(covariance, backend.asarray(x)))
    others = [0, 1, 2, 4]
    assert_close(actual[others], backend.to_numpy(clean)[others])
    assert not np.all(np.isfinite(actual[3]))


@pytest.mark.parametrize("shrinkage", [None, "ledoit_wolf", "oas", "moments"])
@pytest.mark.parametrize("name", ["none", "all", "one", "near"])
def test_gradients_of_many_samples(name, shrinkage, monkeypatch):
    import jax

    torch = pytest.importorskip("torch")
    # A mean of 1e7 would drown the differences that these are compared to.
    x = np.where(np.abs(ways(64)[name]) > 1e6, ways(64)[name] - 1e7 + 50.0, ways(64)[name])
    c = samples(3, 3, seed=9)
    direction = np.random.default_rng(3).standard_normal(x.shape)

    def value(a: Any) -> Any:
        weigh = torch.asarray(c) if isinstance(a, torch.Tensor) else c
        if shrinkage != "moments":
            return (covariance(a, shrinkage=shrinkage) * weigh).sum()
        moments = Moments.from_samples(a)
        return (moments.covariance() * weigh).sum() + (moments.mean**2).sum() / 100.0

    step = 1e-4
    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    leaf = torch.asarray(x.copy(), requires_grad=True)
    value(leaf).backward()
    for gradient in (leaf.grad.numpy(), np.asarray(jax.grad(value)(JAX.asarray(x)))):
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr("natgrad_array.moments.SMALL_BYTES", 0)
    other = torch.asarray(x.copy(), requires_grad=True)
    value(other).backward()
    np.testing.assert_allclose(other.grad.numpy(), leaf.grad.numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [None, "ledoit_wolf"])
def test_members_of_a_stack_in_pieces_keep_their_places(shrinkage):
    pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 171, 1100, 12))
    x *= np.linspace(1.0, 9.0, 342).reshape(2, 171, 1, 1)
    x += np.linspace(-1e3, 1e6, 342).reshape(2, 171, 1, 1)
    x[0, 1, ::2] += 50.0  # what some of the samples say of the others is wrong
    x[1, 160, :, 3] = 0.1
    deviation = x - x[..., :1, :]
    deviation -= deviation.mean(-2, keepdims=True)
    expected = np.swapaxes(deviation, -1, -2) @ deviation / 1100
    if shrinkage:
        chosen = [(0, 0), (0, 1), (0, 170), (1, 3), (1, 160), (1, 170)]
        expected = np.stack([SHRINKERS[shrinkage](deviation[member])[0] for member in chosen])
    x[1, 7, 1000, 2] = np.nan
    for backend in BACKENDS:
        if backend.name in ("torch", "jax-jit"):
            found = backend.to_numpy(backend.call(covariance, backend.asarray(x), shrinkage=shrinkage))
            np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))
            assert np.isnan(found[1, 7, 2, 2])
            assert np.isnan(found).any((-1, -2)).sum() == 1
            found = np.stack([found[member] for member in chosen]) if shrinkage else found
            good = ~np.isnan(found).any((-1, -2))
            assert_close(found[good], expected[good], 1e-9)


def test_a_guess_of_the_mean_from_samples_unlike_the_others(backend):
    """Every 2000th sample lies far off, and these are the few that are looked at first."""
    x = np.random.default_rng(0).standard_normal((128_000, 4)).astype(np.float32)
    x[::2000] += 1e4
    found = backend.to_numpy(backend.call(covariance, backend.asarray(x)))
    expected = np.cov(x.T.astype(float), bias=True)
    # With the guess kept the error is 0.05; torch's own product of these numbers has one of 5e-4.
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_no_samples_are_copied_without_need():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 70_000, 8))
    far = x + 5.0
    worst = far.copy()
    worst[:3, :, 0] = 0.3
    runs = {
        "none": (0.05, lambda: covariance(x)),
        "moments": (0.05, lambda: Moments.from_samples(x)),
        "oas": (0.05, lambda: covariance(x, shrinkage="oas")),
        "ledoit_wolf": (0.5, lambda: covariance(x, shrinkage="ledoit_wolf")),  # lengths are p times smaller
        "far": (1.05, lambda: covariance(far)),
        "most centred twice": (2.1, lambda: covariance(worst)),
    }
    for name, (limit, run) in runs.items():
        assert peak_of(run) < limit * x.nbytes, name


# ------------------------------------------------------- what is reached beyond the standard


@pytest.mark.parametrize("shape", [(9, 4), (1, 3), (5, 0), (7, 1), (2, 3, 40, 17), (0, 5, 2)], ids=str)
def test_gram_is_the_product_and_symmetric(backend, dtype, shape):
    x = samples(*shape, dtype=dtype) if shape[-1] else np.zeros(shape, dtype)
    row = samples(*shape[:-2], 1, shape[-1], seed=2, dtype=dtype) if shape[-1] else np.zeros((1, 0), dtype)
    given_x, given_row = backend.asarrays(x, row)

    def run(a: Any, less: Any) -> tuple[Any, Any]:
        xp = _arrays.namespace(a)
        return _arrays.gram(xp, a), _arrays.gram(xp, a, 2.5, less=less)

    plain, full = (backend.to_numpy(result) for result in backend.call(run, given_x, given_row))
    wide, wide_row = x.astype(float), row.astype(float)
    assert_close(plain, np.swapaxes(wide, -1, -2) @ wide)
    assert_close(full, (np.swapaxes(wide, -1, -2) @ wide - np.swapaxes(wide_row, -1, -2) * wide_row) / 2.5)
    for result in (plain, full):
        np.testing.assert_array_equal(result, np.swapaxes(result, -1, -2))


@pytest.mark.parametrize("layout", ["F-order", "transposed", "every other", "negative strides", "zero strides"])
def test_gram_of_numpy_is_symmetric_in_every_layout(layout, dtype):
    view = LAYOUTS[layout](samples(3, 37, 11, dtype=dtype))
    product = _arrays.gram(_arrays.namespace(view), view)
    np.testing.assert_array_equal(product, np.swapaxes(product, -1, -2))
    assert_close(product, np.einsum("bki,bkj->bij", view.astype(float), view))


def test_sum_rows_and_diagonals(everywhere, dtype):
    x, a = samples(2, 9, 4, dtype=dtype), samples(2, 3, 3, dtype=dtype)
    values = samples(2, 1, 1, dtype=dtype)
    given_x, given_values = everywhere.asarrays(x, values)
    xp = _arrays.namespace(given_x)
    total = everywhere.call(lambda x: _arrays.sum_rows(xp, x), given_x)
    everywhere.check(total, given_x)
    assert_close(everywhere.to_numpy(total), x.astype(float).sum(-2, keepdims=True))
    for layout in (np.ascontiguousarray, np.asfortranarray, lambda a: a.swapaxes(-1, -2).copy().swapaxes(-1, -2)):
        for value, expected in ((given_values, values), (0.5, 0.5)):
            # What it is given is its own.
            own = xp.matrix_transpose(everywhere.asarray(layout(a).swapaxes(-1, -2))) + 0.0
            actual = everywhere.call(lambda a, v: _arrays.add_to_diagonal(xp, a, v), own, value)
            assert_close(everywhere.to_numpy(actual), a.astype(float) + expected * np.eye(3))


def test_means_outer_products_and_points_between(everywhere, dtype):
    x, row, a = samples(2, 9, 4, dtype=dtype), samples(2, 1, 4, dtype=dtype), samples(2, 5, 4, seed=1, dtype=dtype)
    share = np.asarray([0.0, 0.25, 0.5, 0.8, 1.0], dtype)[:, None]
    b = (samples(2, 5, 4, seed=2) * 1e6).astype(dtype)
    given = everywhere.asarrays(x, row, a, b, share)

    def run(x: Any, row: Any, a: Any, b: Any, share: Any) -> tuple[Any, ...]:
        xp = _arrays.namespace(x)
        outer = _arrays.add_outer(xp, xp.matrix_transpose(x) @ x, row, -2.0)
        return _arrays.mean_rows(xp, x), outer, _arrays.lerp(xp, a, b, share)

    mean, outer, between = (everywhere.to_numpy(result) for result in everywhere.call(run, *given))
    assert_close(mean, x.astype(float).mean(-2, keepdims=True))
    assert_close(outer, np.swapaxes(x, -1, -2).astype(float) @ x - 2.0 * np.swapaxes(row, -1, -2).astype(float) * row)
    assert_close(between, (1.0 - share.astype(float)) * a + share.astype(float) * b)
    np.testing.assert_array_equal(between[:, 0], a[:, 0].astype(between.dtype))
    np.testing.assert_array_equal(between[:, 4], b[:, 4].astype(between.dtype))


def test_branch_takes_one_way(backend):
    numbers = backend.asarray(np.asarray([1.0, 2.0]))

    def run(a: Any, bound: float) -> Any:
        xp = _arrays.namespace(a)
        assert _arrays.can_branch(a)
        return _arrays.branch(xp.all(a > bound), lambda: a + 1.0, lambda: a - 1.0)

    np.testing.assert_array_equal(backend.to_numpy(backend.call(run, numbers, 0.0)), [2.0, 3.0])
    np.testing.assert_array_equal(backend.to_numpy(backend.call(run, numbers, 1.5)), [0.0, 1.0])
    assert not _arrays.can_branch(DASK.asarray(np.zeros(2)))


# ----------------------------------------------------------------------------- shrinkage


@pytest.mark.parametrize("shape", [(30, 4), (4, 30), (2, 3), (50, 1), (1, 1), (400, 2)], ids=str)
def test_estimated_shrinkage_is_scikit_learns(everywhere, dtype, shape):
    compiled_if_jax(everywhere)
    x = np.stack([samples(*shape, seed=seed, dtype=dtype) * scale for seed, scale in ((0, 1), (1, 1e-3), (2, 50))])
    given_x = everywhere.asarray(x)
    choices = list(itertools.product(SHRINKERS, (False, True)))

    def run(a: Any) -> list[Any]:
        return [covariance(a, shrinkage=name, assume_centered=centred) for name, centred in choices]

    for (name, centred), actual in zip(choices, everywhere.call(run, given_x), strict=True):
        everywhere.check(actual, given_x)
        actual = everywhere.to_numpy(actual)
        for b in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a single sample
                expected, _ = SHRINKERS[name](x[b].astype(float), assume_centered=centred)
            assert_close(actual[b], expected, max(tolerance(actual.dtype), 1e-11))


@pytest.mark.parametrize("name", SHRINKERS)
def test_shrinkage_that_reaches_its_ends(name):
    rng = np.random.default_rng(5)
    for x in (
        np.vstack([np.eye(3), -np.eye(3)]),  # a multiple of the identity already
        np.zeros((5, 3)),
        np.ones((5, 3)),
        np.asarray([[1.0, 2.0, 3.0]]),
        rng.standard_normal((3, 200)),  # nothing to be learnt about directions
        np.outer(np.linspace(-1, 1, 60), [1.0, 2.0, 3.0]),  # rank one
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, _ = SHRINKERS[name](x)
        np.testing.assert_allclose(covariance(x, shrinkage=name), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SHRINKERS)
@pytest.mark.parametrize("scale", [1e-17, 1e15])
def test_shrinkage_has_no_units_in_float32(name, scale):
    x = samples(20, 5, dtype="float32")
    scaled = covariance(x * np.float32(scale), shrinkage=name).astype(float)
    assert_close(scaled / scale**2, SHRINKERS[name](x.astype(float))[0], 2e-5)


@pytest.mark.parametrize("amount", [0, 0.3, 1, 1.0, np.float64(0.5)])
def test_fixed_shrinkage(everywhere, amount):
    x, w = samples(2, 9, 4), fractions_of(9)
    given_x, given_w = everywhere.asarrays(x, w)
    actual = everywhere.call(covariance, given_x, shrinkage=amount, weights=given_w, correction=1)
    everywhere.check(actual, given_x)
    for b in range(2):
        expected = shrunk_covariance(np.cov(x[b].T, aweights=w, ddof=1), float(amount))
        assert_close(everywhere.to_numpy(actual)[b], expected)


# ----------------------------------------------------------------------------- streaming


@st.composite
def pieces_in_an_order(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    n = draw(st.integers(1, 40), label="samples")
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=6), label="cuts")) if n > 1 else []
    pairs = draw(st.lists(st.integers(0, 1000), min_size=len(cuts), max_size=len(cuts)), label="which two to merge")
    return n, cuts, pairs


@given(pieces_in_an_order(), st.booleans(), st.sampled_from([0.0, 1e3]))
def test_pieces_merged_in_any_order_are_the_whole(drawn, weighted, offset):
    n, cuts, pairs = drawn
    x, w = samples(2, n, 3, seed=n) + offset, fractions_of(2, n)
    bounds = [0, *cuts, n]
    parts = [
        Moments.from_samples(x[:, a:b], weights=w[:, a:b] if weighted else None) for a, b in itertools.pairwise(bounds)
    ]
    for pick in pairs:
        first = parts.pop(pick % len(parts))
        second = parts.pop(pick // 7 % len(parts))
        parts.append(first.merge(second))
    (merged,) = parts
    for b in range(2):
        weights = w[b] if weighted else None
        mean, cov = exact(x[b], weights)
        np.testing.assert_allclose(merged.mean[b], mean.astype(float), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(merged.covariance()[b], cov.astype(float), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(
            merged.second_moment()[b], exact(x[b], weights, centre=False)[1].astype(float), rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(merged.weight[b], n if weights is None else weights.sum(), rtol=1e-13)


def test_empty_is_neutral_to_the_last_bit(everywhere, dtype):
    x = everywhere.asarray(samples(2, 9, 4, dtype=dtype) + 3.0)
    moments = Moments.from_samples(x)
    for shape in ((), (2,), (1,)):
        nothing = Moments.empty(4, like=x, batch_shape=shape)
        for array in nothing:
            everywhere.check(array, x)
        assert tuple(nothing.weight.shape) == shape
        for merged in (
            everywhere.call(Moments.merge, nothing, moments),
            everywhere.call(Moments.merge, moments, nothing),
        ):
            for before, after in zip(moments, merged, strict=True):
                np.testing.assert_array_equal(everywhere.to_numpy(after), everywhere.to_numpy(before))


def test_forgotten_samples_leave_no_trace():
    before, after = Moments.from_samples(samples(9, 4) + 1e12), Moments.from_samples(samples(9, 4, seed=8))
    for merged in (before.discount(0.0).merge(after), after.merge(before.discount(0))):
        for expected, actual in zip(after, merged, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_nothing_merged_with_nothing(everywhere):
    like = everywhere.asarray(np.zeros(1))
    nothing = Moments.empty(3, like=like)
    both = numpy_moments(everywhere, everywhere.call(Moments.merge, nothing, nothing))
    assert not any(np.any(field) for field in both)
    assert np.all(np.isnan(everywhere.to_numpy(nothing.covariance())))
    assert np.all(np.isnan(everywhere.to_numpy(nothing.second_moment())))


def test_discount_is_a_weight(everywhere):
    x = samples(3, 9, 4)
    factor = np.asarray([0.5, 0.8, 1.0])

    def run(a: Any, by: Any) -> tuple[Any, ...]:
        moments = Moments.empty(4, like=a)
        for k in range(0, 9, 3):
            moments = moments.merge(Moments.from_samples(a[:, k : k + 3, ...]))
            moments = moments.discount(by)
        return moments, moments.covariance(), moments.covariance(correction=1)

    for by, rates in ((0.7, (0.7, 0.7, 0.7)), (everywhere.asarray(factor), factor)):
        moments, *covariances = everywhere.call(run, everywhere.asarray(x), by)
        moments = numpy_moments(everywhere, moments)
        tol = tolerance(moments.mean.dtype)
        for b, rate in enumerate(rates):
            w = np.repeat([rate**3, rate**2, rate], 3)
            np.testing.assert_allclose(moments.weight[b], w.sum(), rtol=tol)
            for correction in (0, 1):
                mean, expected = exact(x[b], w, correction)
                assert_close(everywhere.to_numpy(covariances[correction])[b], expected, tol)
                assert_close(moments.mean[b], mean, tol)


def test_a_bad_discount_spoils_its_member_only(everywhere):
    moments = Moments.from_samples(everywhere.asarray(samples(4, 9, 3)))
    factor = everywhere.asarray(np.asarray([-0.5, 0.5, 1.5, np.nan]))
    actual = numpy_moments(everywhere, everywhere.call(Moments.discount, moments, factor))
    for before, after in zip(numpy_moments(everywhere, moments), actual, strict=True):
        assert np.all(np.isnan(after[[0, 2, 3]]))
        assert np.all(np.isfinite(after[1]))
        assert after.shape == before.shape


CHUNKS = ((100, 2), (7, 4), ((0, 150, 0, 149, 1), 4), (1, 4), (300, 1))


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_dask_blocks_are_merged_in_any_chunks(chunks, mean):
    """Empty ones, one sample each, features apart: by the formulas, with weights of which a block is all zero."""
    import dask
    import dask.array as da

    x, w = samples(300, 4) + mean, fractions_of(300)
    w[:120] = 0.0
    lazy, tol = da.from_array(x, chunks=chunks), 1e-12 if mean == 0.0 else 1e-10
    with dask.config.set(scheduler="synchronous"):
        found = covariance(lazy, correction=1)
        assert isinstance(found, da.Array)
        assert_close(found.compute(), np.cov(x.T), tol)
        assert_close(covariance(lazy, shrinkage="ledoit_wolf").compute(), ledoit_wolf(x)[0], tol)
        weighted = covariance(lazy, weights=da.from_array(w, chunks=90), correction=1)
        assert_close(weighted.compute(), np.cov(x.T, aweights=w), tol)
        (moments,) = dask.compute(Moments.from_samples(lazy, weights=da.from_array(w, chunks=90)))
        assert isinstance(moments, Moments)
        assert_close(moments.mean, np.average(x, axis=0, weights=w), tol)
        assert_close(moments.covariance(), np.cov(x.T, aweights=w, ddof=0), tol)
        np.testing.assert_allclose(moments.weight_squared, np.sum(w * w))


def test_dask_looks_at_each_block_once():
    import dask
    import dask.array as da

    seen = []

    def look(block):
        seen.append(block.shape)
        return block

    x = da.from_array(samples(100, 4), chunks=(10, 4)).map_blocks(look, dtype=float, meta=np.empty((0, 0)))
    with dask.config.set(scheduler="synchronous"):
        for result in (
            covariance(x),
            covariance(x, shrinkage="ledoit_wolf"),
            covariance(x, shrinkage="oas"),
            second_moment(x),
            Moments.from_samples(x),
        ):
            seen.clear()
            dask.compute(result)
            assert len(seen) == 10


def test_dask_blocks_of_another_library():
    """What is done with blocks asks their own namespace: a stand-in for CuPy, which Dask itself knows."""
    import dask.array as da

    x = samples(60, 4)
    lazy = da.from_array(x, chunks=(9, 4)).map_blocks(array_api_strict.asarray, dtype=x.dtype, meta=np.empty((0, 0)))
    options = {"scheduler": "synchronous"}
    found = _arrays.reduce_blocks(lazy, None, 6, _seen, _merged).compute(**options)
    assert type(found) is type(array_api_strict.asarray(x))
    assert_close(np.asarray(found)[:4] / 60, np.cov(x.T, ddof=0))
    found = _arrays.reduce_blocks(lazy, None, 8, _seen_to_fourth_order, _merged_to_fourth_order)
    centred = x - np.mean(x, axis=0)
    fourth = np.sum(np.sum(centred**2, axis=1) ** 2) / np.sum(centred**2) ** 2
    assert_close(np.asarray(found.compute(**options))[7], np.full(4, fourth))


def test_dask_fourth_moments_have_no_units():
    import dask.array as da

    x = samples(90, 3)
    lazy = da.from_array(x * 1e100, chunks=(20, 3))
    found = covariance(lazy, shrinkage="ledoit_wolf").compute(scheduler="synchronous")
    assert_close(found / 1e200, ledoit_wolf(x)[0], 1e-11)


def test_dask_pieces_by_tree_reduction():
    import dask
    import dask.array as da

    x = samples(57, 4) + 100.0
    chunked = da.from_array(x, chunks=(10, 3))
    with dask.config.set(scheduler="synchronous"):
        assert_close(second_moment(chunked).compute(), x.T @ x / 57)
        assert_close(second_moment(chunked, chunked[:, :2]).compute(), x.T @ x[:, :2] / 57)
        assert_close(covariance(chunked, correction=1).compute(), np.cov(x.T))
        assert_close(covariance(chunked, shrinkage="oas").compute(), oas(x)[0], 1e-11)
        assert_close(covariance(chunked, shrinkage="ledoit_wolf").compute(), ledoit_wolf(x)[0], 1e-11)
        w = fractions_of(57)
        actual = covariance(chunked, weights=da.from_array(w, chunks=7)).compute()
        assert_close(actual, np.cov(x.T, aweights=w, ddof=0))
        assert_close(Moments.from_samples(chunked).covariance().compute(), np.cov(x.T, ddof=0))
        rows = da.from_array(x, chunks=(10, 4)).to_delayed().ravel()
        parts = [dask.delayed(Moments.from_samples)(block) for block in rows]
        while len(parts) > 1:
            parts = [
                dask.delayed(Moments.merge)(*pair) if len(pair) == 2 else pair[0]
                for pair in (parts[k : k + 2] for k in range(0, len(parts), 2))
            ]
        assert_close(parts[0].compute().covariance(correction=1), np.cov(x.T), 1e-11)
        unknown = chunked[chunked[:, 0] > 100.0]
        with pytest.raises(ValueError, match="known number"):
            covariance(unknown)


# -------------------------------------------------------------------------------- stacks


def everything(x: Any, y: Any, w: Any) -> list[Any]:
    """All results that come from samples, with and without weights."""
    results = [second_moment(x), second_moment(x, weights=w), second_moment(x, y), second_moment(x, y, weights=w)]
    results += [second_moment(y, x, weights=w), covariance(x), covariance(x, weights=w, correction=0.5)]
    results += [covariance(x, weights=w, shrinkage=0.25), covariance(x, weights=w, assume_centered=True)]
    results += [covariance(x, shrinkage=name) for name in ("oas", "ledoit_wolf", 0.25)]
    moments = Moments.from_samples(x, weights=w)
    merged = moments.merge(Moments.from_samples(x)).discount(0.5)
    return [*results, moments.scatter, merged.scatter, merged.second_moment(), merged.covariance(correction=1)]


SYMMETRIC = [k for k in range(16) if k not in (2, 3, 4)]
WEIGHTED = [1, 3, 4, 6, 7, 8, 12, 13, 14, 15]


# Eager JAX compiles each operation anew for each shape; under jit it goes through them all.
@pytest.mark.parametrize(
    ("everywhere", "batch"),
    [(b, shape) for b in (*BACKENDS, DASK) for shape in BATCH_SHAPES if b is not JAX or shape in ((), (2, 3))],
    indirect=["everywhere"],
    ids=str,
)
def test_a_stack_is_a_loop(everywhere, batch):
    x, y, w = samples(*batch, 9, 4), samples(*batch, 9, 2, seed=4), fractions_of(*batch, 9)
    given_arrays = everywhere.asarrays(x, y, w)
    actual = everywhere.call(everything, *given_arrays)
    alone = {b: everything(x[b], y[b], w[b]) for b in np.ndindex(*batch)}
    for k, stack in enumerate(actual):
        everywhere.check(stack, given_arrays[0])
        stack = everywhere.to_numpy(stack)
        assert stack.shape[:-2] == batch
        for b, results in alone.items():
            assert_close(stack[b], results[k], 1e-13 if everywhere.float64 else 2e-5)


def test_batch_axes_broadcast(everywhere):
    x, y, w = samples(2, 1, 6, 3), samples(4, 6, 2, seed=4), fractions_of(3, 1, 1, 6)
    given_x, given_y, given_w = everywhere.asarrays(x, y, w)
    actual = everywhere.to_numpy(everywhere.call(second_moment, given_x, given_y, weights=given_w))
    expected = np.einsum("abcn,bcni,bcnj->abcij", *map(np.array, (np.broadcast_to(w, (3, 2, 4, 6)),
        np.broadcast_to(x, (2, 4, 6, 3)), np.broadcast_to(y, (2, 4, 6, 2)))))  # fmt: skip
    assert_close(actual, expected / w.sum(-1)[..., None, None])
    # One set of samples, many sets of weights; and the other way round.
    many = fractions_of(5, 6)
    given_many = everywhere.asarray(many)
    one = everywhere.asarray(x[0, 0])
    actual = everywhere.to_numpy(everywhere.call(covariance, one, weights=given_many))
    moments = everywhere.call(Moments.from_samples, one, weights=given_many)
    assert [tuple(a.shape) for a in moments] == [(5,), (5,), (5, 3), (5, 3, 3)]
    for b in range(5):
        assert_close(actual[b], np.cov(x[0, 0].T, aweights=many[b], ddof=0))
    shared = everywhere.asarray(many[0])
    moments = everywhere.call(Moments.from_samples, given_x, weights=shared)
    assert [tuple(a.shape) for a in moments] == [(2, 1), (2, 1), (2, 1, 3), (2, 1, 3, 3)]
    actual = everywhere.to_numpy(moments.covariance())
    for b in range(2):
        assert_close(actual[b, 0], np.cov(x[b, 0].T, aweights=many[0], ddof=0))


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (9, 1), (1, 1), (9, 0)], ids=str)
def test_few_samples_or_features(everywhere, shape):
    n, p = shape
    x = samples(n, p, dtype="float64") if p else np.zeros((n, 0))
    given_x = everywhere.asarray(x)
    for correction in (0, 1):
        expected = exact(x, None, correction)[1] if n > correction else np.full((p, p), np.nan)
        for cov in (
            everywhere.call(covariance, given_x, correction=correction),
            everywhere.call(covariance, given_x, correction=correction, weights=everywhere.asarray(np.full(n, 2.0))),
            everywhere.call(Moments.from_samples, given_x).covariance(correction=correction),
        ):
            cov = everywhere.to_numpy(cov)
            assert cov.shape == (p, p)
            if n == 1 and not correction:
                np.testing.assert_allclose(cov, 0.0, atol=1e-13)
            else:
                assert_close(cov, expected)
    for shrinkage in (0.5, "oas", "ledoit_wolf"):
        result = everywhere.to_numpy(everywhere.call(covariance, given_x, shrinkage=shrinkage))
        assert result.shape == (p, p)
        assert np.all(np.isfinite(result))


def test_zero_weight_is_absence(everywhere):
    x, w = samples(9, 3), fractions_of(9)
    w[[1, 4]] = 0.0
    given_x, given_w = everywhere.asarrays(x, w)
    kept = w > 0
    actual = everywhere.call(covariance, given_x, weights=given_w, correction=1)
    assert_close(everywhere.to_numpy(actual), np.cov(x[kept].T, aweights=w[kept]))
    alone = everywhere.asarray((np.arange(9) == 2).astype(float))
    assert np.all(np.isnan(everywhere.to_numpy(everywhere.call(covariance, given_x, weights=alone, correction=1))))
    np.testing.assert_allclose(
        everywhere.to_numpy(everywhere.call(covariance, given_x, weights=alone)), 0.0, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_only_ratios_of_weights_count(scale):
    x, w = samples(9, 3), fractions_of(9)
    assert_close(covariance(x, weights=w * scale, correction=1), np.cov(x.T, aweights=w))
    assert_close(second_moment(x, weights=w * scale), second_moment(x, weights=w))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sample_spoils_its_member_only(everywhere, bad):
    if everywhere.name == "dask":
        bad = np.nan  # NumPy warns of an Inf inside Dask's own threads
    x, y, w = samples(3, 9, 4), samples(3, 9, 2, seed=4), fractions_of(3, 9)
    spoilt = x.copy()
    spoilt[1, 2, 1] = bad
    spoilt[1, 3, 2] = -bad
    spoilt[1, 4, 2] = bad
    good, given_x, given_y, given_w = everywhere.asarrays(x, spoilt, y, w)
    clean = everywhere.call(everything, good, given_y, given_w)
    for expected, actual in zip(clean, everywhere.call(everything, given_x, given_y, given_w), strict=True):
        expected, actual = everywhere.to_numpy(expected), everywhere.to_numpy(actual)
        np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])
        assert not np.all(np.isfinite(actual[1]))


def test_bad_weights_spoil_their_member_only(everywhere):
    x, y, w = samples(7, 9, 4), samples(7, 9, 2, seed=4), fractions_of(7, 9)
    spoilt = w.copy()
    spoilt[1, 2] = -0.5
    spoilt[2, 8] = np.nan
    spoilt[3, 0] = np.inf
    spoilt[4] = 0.0
    spoilt[5] = -1.0
    given_x, given_y, good, given_w = everywhere.asarrays(x, y, w, spoilt)
    clean = everywhere.call(everything, given_x, given_y, good)
    bad = everywhere.call(everything, given_x, given_y, given_w)
    for k, (expected, actual) in enumerate(zip(clean, bad, strict=True)):
        expected, actual = everywhere.to_numpy(expected), everywhere.to_numpy(actual)
        np.testing.assert_array_equal(actual[[0, 6]], expected[[0, 6]])
        assert np.all(np.isnan(actual[1:6])) == (k in WEIGHTED)
        assert np.all(np.isfinite(actual[1:6])) == (k not in WEIGHTED)
    moments = numpy_moments(everywhere, everywhere.call(Moments.from_samples, given_x, weights=given_w))
    for field in moments:
        assert np.all(np.isnan(field[1:6]))
        assert np.all(np.isfinite(field[[0, 6]]))


@pytest.mark.parametrize("bad", [[1.0, -0.5, 1.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0], [1.0, np.inf, 1.0]], ids=str)
def test_bad_weights_without_a_batch_raise_where_they_can_be_seen(everywhere, bad):
    x, weights = everywhere.asarrays(samples(2, 3, 4), np.asarray(bad))
    for f in (second_moment, covariance, lambda a, weights: Moments.from_samples(a, weights=weights).mean):
        if everywhere.lazy:
            assert np.all(np.isnan(everywhere.to_numpy(everywhere.call(f, x, weights=weights))))
        else:
            with pytest.raises(ValueError, match="weights must be finite, at least 0 and not all 0, got"):
                f(x, weights=weights)


# ------------------------------------------------------------------- symmetry, equivariance


def test_results_are_exactly_symmetric(backend, dtype):
    arrays = samples(3, 37, 11, dtype=dtype) + 5.0, samples(3, 37, 2, dtype=dtype), fractions_of(3, 37, dtype=dtype)
    results = backend.call_optimized(everything, *backend.asarrays(*(array.astype(dtype) for array in arrays)))
    for k in SYMMETRIC:
        result = backend.to_numpy(results[k])
        np.testing.assert_array_equal(result, np.swapaxes(result, -1, -2))


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6), st.sampled_from([None, 0.3, "oas", "ledoit_wolf"]))
def test_equivariance(seed, n, p, shrinkage):
    x = samples(n, p, seed=seed)
    rng = np.random.default_rng(seed)
    cov = covariance(x, shrinkage=shrinkage)
    scale = max(float(np.abs(cov).max()), 1e-3)
    q = orthogonal(rng, p)
    np.testing.assert_allclose(covariance(x @ q.T, shrinkage=shrinkage), q @ cov @ q.T, rtol=0, atol=1e-10 * scale)
    order = rng.permutation(p)
    np.testing.assert_allclose(
        covariance(x[:, order], shrinkage=shrinkage), cov[order][:, order], rtol=0, atol=1e-12 * scale
    )
    np.testing.assert_allclose(covariance(x[rng.permutation(n)], shrinkage=shrinkage), cov, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(covariance(-4.0 * x, shrinkage=shrinkage), 16.0 * cov, rtol=0, atol=1e-11 * scale)
    np.testing.assert_allclose(covariance(x + 1.0, shrinkage=shrinkage), cov, rtol=0, atol=1e-12 * scale)
    a = rng.standard_normal((2, p))
    second = second_moment(x)
    np.testing.assert_allclose(second_moment(x, x @ a.T), second @ a.T, rtol=1e-11, atol=1e-11 * second.max())


# ------------------------------------------------------------------------- inputs as they come


LAYOUTS = {
    "F-order": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0),
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "negative strides": lambda x: np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
    "zero strides": lambda x: np.broadcast_to(x[0], x.shape),
    "read-only": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, y, w = samples(3, 9, 4), samples(3, 9, 2, seed=4), fractions_of(3, 9)
    view = LAYOUTS[layout](x)
    view.flags.writeable = False
    expected = everything(np.array(view, order="C"), y, w)
    for reference, actual in zip(expected, everything(view, y, w), strict=True):
        assert_close(actual, reference, 1e-14)


def test_torch_layouts():
    torch = pytest.importorskip("torch")
    x, y, w = samples(3, 9, 4), samples(3, 9, 2, seed=4), fractions_of(3, 9)
    other = torch.asarray(y), torch.asarray(w)
    transposed = torch.asarray(np.ascontiguousarray(x.swapaxes(-1, -2))).mT
    for a, plain in ((transposed, x), (torch.asarray(x[0]).expand(3, 9, 4), np.stack([x[0]] * 3))):
        for reference, actual in zip(everything(plain, y, w), everything(a, *other), strict=True):
            assert_close(actual.numpy(), reference, 1e-13)


def test_inputs_are_never_written_to(everywhere):
    arrays = samples(3, 9, 4), samples(3, 9, 2, seed=4), fractions_of(3, 9)
    given_arrays = everywhere.asarrays(*arrays)
    before = [everywhere.to_numpy(array) for array in given_arrays]
    everywhere.call(everything, *given_arrays)
    everywhere.call(covariance, given_arrays[0], shrinkage="ledoit_wolf", assume_centered=True)
    for array, copy in zip(given_arrays, before, strict=True):
        np.testing.assert_array_equal(everywhere.to_numpy(array), copy)
    moments = everywhere.call(Moments.from_samples, given_arrays[0], weights=given_arrays[2])
    fields = numpy_moments(everywhere, moments)
    moments.merge(moments).discount(0.5).covariance(correction=1)
    for field, copy in zip(moments, fields, strict=True):
        np.testing.assert_array_equal(everywhere.to_numpy(field), copy)


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8"])
def test_integers_are_promoted(everywhere, kind):
    x = np.asarray([[200, 0], [100, 3], [7, 250]]).astype(kind)
    w = np.asarray([1, 2, 3]).astype(kind)
    given_x, given_w = everywhere.asarrays(x, w)
    floating = everywhere.asarray(np.asarray([0.5, 1.0, 1.5]))
    expected = np.cov(x.T.astype(float), aweights=w, ddof=0)
    for weights in (given_w, floating):
        actual = everywhere.call(covariance, given_x, weights=weights)
        if weights is floating:
            everywhere.check(actual, floating)
        assert everywhere.xp.isdtype(actual.dtype, "real floating")
        assert_close(everywhere.to_numpy(actual), expected)
    mixed = everywhere.call(second_moment, given_x, floating[:, None])
    everywhere.check(mixed, floating)
    assert_close(everywhere.to_numpy(mixed), x.T.astype(float) @ [[0.5], [1.0], [1.5]] / 3)
    assert_close(everywhere.to_numpy(everywhere.call(second_moment, given_x)), x.T.astype(float) @ x / 3)
    empty = Moments.empty(2, like=given_x)
    merged = empty.merge(everywhere.call(Moments.from_samples, given_x))
    assert everywhere.xp.isdtype(merged.mean.dtype, "real floating")
    assert_close(everywhere.to_numpy(merged.mean), x.mean(0))


X = np.zeros((4, 3))
STATE = Moments.from_samples(samples(4, 3))
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: second_moment([[1.0, 2.0]]), TypeError, "x must be an array .* got a list of length 1"),
    (lambda: covariance(2.0), TypeError, r"x must be an array .* got float 2\.0"),
    (lambda: covariance(None), TypeError, "x|got"),
    (lambda: second_moment(X, [[1.0]]), TypeError, "y must be an array"),
    (lambda: covariance(X, weights=[1.0, 1.0, 1.0, 1.0]), TypeError, "weights must be an array"),
    (lambda: covariance(X.astype(np.float16)), TypeError, "x must have dtype .* got float16"),
    (lambda: covariance(X.astype(complex)), TypeError, "x must have dtype .* got complex128"),
    (lambda: covariance(X.astype(bool)), TypeError, "x must have dtype .* got bool"),
    (lambda: covariance(X, weights=np.ones(4, bool)), TypeError, "weights must have dtype .* got bool"),
    (
        lambda: covariance(X, weights=np.ones(4, np.float32)),
        TypeError,
        "weights has dtype float32, but x has dtype float64",
    ),
    (lambda: second_moment(X, X.astype(np.float32)), TypeError, "y has dtype float32, but x has dtype float64"),
    (lambda: covariance(np.zeros(3)), ValueError, r"x must have shape \(\*batch, samples, features\), got \(3,\)"),
    (lambda: covariance(np.asarray(3.0)), ValueError, r"x must have shape .* got \(\)"),
    (lambda: covariance(X[:0]), ValueError, r"x must have at least one sample .* got shape \(0, 3\)"),
    (lambda: second_moment(X[:0]), ValueError, r"x must have at least one sample .* got shape \(0, 3\)"),
    (lambda: Moments.from_samples(X[:0]), ValueError, r"x must have at least one sample .* got shape \(0, 3\)"),
    (lambda: second_moment(X, X[:3]), ValueError, r"y must have as many samples .* x: \(4, 3\), y: \(3, 3\)"),
    (lambda: second_moment(X, X[0]), ValueError, r"y must have shape .* got \(3,\)"),
    (lambda: covariance(X, weights=np.ones(3)), ValueError, r"weights must have shape \(\*batch, 4\) .* got \(3,\)"),
    (lambda: covariance(X, weights=np.asarray(1.0)), ValueError, r"weights must have shape .* got \(\)"),
    (lambda: covariance(np.zeros((2, 4, 3)), weights=np.ones((3, 4))), ValueError, r"x: \(2,\), weights: \(3,\)"),
    (lambda: second_moment(np.zeros((2, 4, 3)), np.zeros((3, 4, 1))), ValueError, r"x: \(2,\), y: \(3,\)"),
    (lambda: covariance(X, correction=-1), ValueError, "correction must be a finite number, at least 0, got -1"),
    (lambda: covariance(X, correction=math.nan), ValueError, "correction must be .* got nan"),
    (lambda: covariance(X, correction="1"), TypeError, "correction must be .* got str '1'"),
    (lambda: covariance(X, correction=True), TypeError, "correction must be .* got bool True"),
    (lambda: covariance(X, assume_centered=1), TypeError, "assume_centered must be True or False, got int 1"),
    (lambda: covariance(X, shrinkage=1.5), ValueError, r"shrinkage must be None, a number in \[0, 1\].* got 1\.5"),
    (lambda: covariance(X, shrinkage=-0.1), ValueError, r"shrinkage must be .* got -0\.1"),
    (lambda: covariance(X, shrinkage=math.nan), ValueError, "shrinkage must be .* got nan"),
    (lambda: covariance(X, shrinkage=True), TypeError, "shrinkage must be .* got bool True"),
    (lambda: covariance(X, shrinkage=[0.5]), TypeError, "shrinkage must be .* got a list of length 1"),
    (lambda: covariance(X, shrinkage="lw"), ValueError, "shrinkage must be one of 'ledoit_wolf', 'oas', got 'lw'"),
    (lambda: covariance(X, shrinkage="oas", correction=1), ValueError, "'oas' needs equal weights .* got correction 1"),
    (
        lambda: covariance(X, shrinkage="ledoit_wolf", weights=np.ones(4)),
        ValueError,
        "'ledoit_wolf' needs .* got weights",
    ),
    (lambda: STATE.merge(3.0), TypeError, r"other must be a Moments, got float 3\.0"),
    (lambda: STATE.merge(Moments.empty(2, like=X)), ValueError, "other must have the 3 features of self, got 2"),
    (lambda: STATE.merge(Moments.empty(3, like=X.astype("f"))), TypeError, "other has dtype float32, but self has"),
    (
        lambda: Moments.empty(3, like=X, batch_shape=(2,)).merge(Moments.empty(3, like=X, batch_shape=(3,))),
        ValueError,
        r"self: \(2,\), other: \(3,\)",
    ),
    (lambda: STATE.discount(1.5), ValueError, r"factor must be a number in \[0, 1\], got 1\.5"),
    (lambda: STATE.discount(-0.5), ValueError, r"factor must be a number in \[0, 1\], got -0\.5"),
    (lambda: STATE.discount(math.nan), ValueError, "factor must be a number .* got nan"),
    (lambda: STATE.discount(True), TypeError, "factor must be a number .* got bool True"),
    (lambda: STATE.discount("0.5"), TypeError, "factor must be a number .* got str '0.5'"),
    (lambda: STATE.discount(np.ones(2)), ValueError, r"factor must have a shape that broadcasts .* got \(2,\)"),
    (lambda: STATE.discount(np.ones((), np.float32)), TypeError, "factor has dtype float32|float32"),
    (lambda: STATE.covariance(correction=-1), ValueError, "correction must be .* got -1"),
    (lambda: Moments.empty(2.0, like=X), TypeError, r"features must be an integer, got float 2\.0"),
    (lambda: Moments.empty(-2, like=X), ValueError, "features must not be negative, got -2"),
    (lambda: Moments.empty(2, like=[1.0]), TypeError, "like must be an array"),
    (lambda: Moments.empty(2, like=X.astype(complex)), TypeError, "like must have dtype .* got complex128"),
    (lambda: Moments.empty(2, like=X, batch_shape=3), TypeError, "batch_shape must be a tuple of integers, got int 3"),
    (lambda: Moments.empty(2, like=X, batch_shape=(1.5,)), TypeError, r"batch_shape .* got float 1\.5"),
    (lambda: Moments.empty(2, like=X, batch_shape=(-1,)), ValueError, "batch_shape must not be negative, got -1"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_mixed_libraries_and_devices():
    ones = np.ones((4, 3))
    with pytest.raises(TypeError, match=r"all arrays must come from one library, got x: numpy.*, y: "):
        second_moment(ones, JAX.asarray(ones))
    with pytest.raises(TypeError, match="one library"):
        covariance(STRICT_DEVICE1.asarray(ones), weights=np.ones(4))
    with pytest.raises(TypeError, match="one library"):
        STATE.merge(Moments.from_samples(JAX.asarray(ones)))
    first, second = STRICT_DEVICE1.asarray(ones), STRICT_DEVICE2.asarray(ones)
    with pytest.raises(ValueError, match=r"y has device .*device2.* but x has device .*device1"):
        second_moment(first, second)
    with pytest.raises(ValueError, match="device"):
        covariance(first, weights=second[:, 0])
    with pytest.raises(ValueError, match="other has device"):
        Moments.from_samples(first).merge(Moments.from_samples(second))


def test_float16_of_every_library(backend):
    half = {"array_api_strict": None}.get(backend.library, "float16")
    if half is None:
        array = backend.xp.zeros((4, 3), dtype=array_api_strict.complex64)
    else:
        array = backend.asarray(np.zeros((4, 3), half))
    with pytest.raises(TypeError, match="x must have dtype"):
        backend.call(covariance, array)


# ----------------------------------------------------------------------- state and libraries


def test_pickle():
    for shape in ((9, 3), (2, 9, 3)):
        moments = Moments.from_samples(samples(*shape), weights=fractions_of(*shape[:-1]))
        assert all(isinstance(field, np.ndarray) for field in moments)
        restored = pickle.loads(pickle.dumps(moments))
        assert isinstance(restored, Moments)
        for before, after in zip(moments, restored, strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("shape", [(9, 3), (2, 9, 3)], ids=str)
def test_every_call_returns_arrays(backend, shape):
    x = backend.asarray(samples(*shape))
    moments = backend.call(Moments.from_samples, x)
    for state in (moments, backend.call(Moments.merge, moments, moments), backend.call(Moments.discount, moments, 0.5)):
        assert isinstance(state, Moments)
        for field, core in zip(state, ((), (), (3,), (3, 3)), strict=True):
            backend.check(field, x)
            assert not isinstance(field, np.generic)
            assert tuple(field.shape) == shape[:-2] + core


def test_jax_pytree_and_one_compiled_step():
    import jax

    x = samples(3, 8, 4)
    moments = Moments.from_samples(JAX.asarray(x[0]))
    leaves, tree = jax.tree_util.tree_flatten(moments)
    assert len(leaves) == len(Moments._fields)
    assert isinstance(jax.tree_util.tree_unflatten(tree, leaves), Moments)

    def step(state: Moments, chunk: Any) -> tuple[Moments, Any]:
        state = state.discount(0.5).merge(Moments.from_samples(chunk))
        return state, state.covariance(correction=1)

    start = Moments.empty(4, like=JAX.asarray(x))
    _, covariances = jax.lax.scan(step, start, JAX.asarray(x))
    for k in range(3):
        w = np.repeat(0.5 ** np.arange(k, -1, -1.0), 8)
        assert_close(np.asarray(covariances[k]), np.cov(x[: k + 1].reshape(-1, 4).T, aweights=w))


def test_gradients_flow_through():
    import jax

    x = samples(6, 3)
    c = samples(3, 3, seed=9)

    def value(a: Any) -> Any:
        return (covariance(a, correction=1) * c).sum()

    deviation = x - x.mean(0)
    expected = deviation @ (c + c.T) / 5
    assert_close(np.asarray(jax.grad(value)(JAX.asarray(x))), expected)
    torch = pytest.importorskip("torch")
    leaf = torch.asarray(x, requires_grad=True)
    (covariance(leaf, correction=1) * torch.asarray(c)).sum().backward()
    assert_close(leaf.grad.numpy(), expected)


def test_no_hidden_float64():
    import jax

    shapes = (2, 9, 3), (2, 9, 1), (2, 9)
    jaxpr = jax.make_jaxpr(everything)(*(JAX.asarray(np.ones(shape, np.float32)) for shape in shapes))
    # Printed with all inner programs; a Python number is a weak 0-d float64 until it meets an array.
    assert not re.findall(r"f64\[[^\]]+\]", str(jaxpr))
    assert re.findall(r"f32\[[^\]]+\]", str(jaxpr))


def every_function(batch: tuple[int, ...]) -> Any:
    x, y, w = samples(*batch, 9, 4), samples(*batch, 9, 2), fractions_of(*batch, 9)

    def run() -> None:
        everything(x, y, w)
        Moments.empty(4, like=x, batch_shape=batch).merge(Moments.from_samples(x)).discount(w[..., 0] * 0.1)

    return run


def test_calls_do_not_depend_on_the_batch(monkeypatch):
    logs = [record(monkeypatch, every_function(batch)) for batch in ((1,), (7,), (2, 3), (0,))]
    assert len(logs[0]) > 50
    assert all(log == logs[0] for log in logs)


def test_cupy_knows_every_call(monkeypatch):
    pytest.importorskip("cupy")
    import array_api_compat.cupy

    complaints = {complaint(call, array_api_compat.cupy) for call in record(monkeypatch, every_function((2,)))}
    assert complaints == {None}


def test_large_samples_are_held_once():
    x, w = samples(200_000, 8), fractions_of(200_000)
    runs = {
        "weighted": lambda: covariance(x, weights=w),
        "ledoit_wolf": lambda: covariance(x, shrinkage="ledoit_wolf"),
        "oas": lambda: covariance(x, shrinkage="oas"),
        "moments": lambda: Moments.from_samples(x, weights=w),
    }
    for name, run in runs.items():
        assert peak_of(run) < 1.5 * x.nbytes, name


def test_wide_samples_need_no_square_of_samples_or_cube():
    x = samples(500, 40)
    peak = peak_of(lambda: covariance(x, shrinkage="ledoit_wolf"))
    assert peak < 3 * x.nbytes  # 500 × 500 would be 12.5, 500 × 40 × 40 would be 40


def test_a_single_thread_does_not_own_the_result():
    from concurrent.futures import ThreadPoolExecutor

    x = samples(16, 30, 4)
    x[3, 0, 0] = np.inf
    expected = covariance(x)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: covariance(x), range(32)):
            np.testing.assert_array_equal(actual, expected)


def test_warnings_elsewhere_are_left_on():
    covariance(np.asarray([[np.inf, 1.0], [-np.inf, 2.0]]))
    with pytest.warns(RuntimeWarning, match="invalid"):
        np.subtract(np.inf, np.inf)


def test_a_single_member_on_every_jit_path():
    """A trace in which weights are a constant still gives numbers."""
    x, w = samples(6, 3), fractions_of(6)
    constant = JAX.asarray(w)
    actual = JAX_JIT.call(lambda a: covariance(a, weights=constant), JAX.asarray(x))
    assert_close(np.asarray(actual), np.cov(x.T, aweights=w, ddof=0))
