"""Ensembles of networks: the distributions they are drawn from, and where randomness comes from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, JAX, JAX_JIT, STRICT_DEVICE1, STRICT_DEVICE2
from reference import product, relative
from scipy import stats

from natgrad_array import deep_linear as dl

SIZES = (4, 6, 5, 3)
EVERY = {"gaussian": dl.gaussian, "small": dl.small, "orthogonal": dl.orthogonal, "balanced": dl.balanced}
LIKE = np.empty(0)
EAGER = [backend for backend in BACKENDS if not backend.lazy]  # a seed needs one; keys are for the others


def tolerance(dtype: Any) -> float:
    return 1e-12 if np.dtype(dtype) == np.float64 else 1e-5


# --------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gaussian_entries(scale):
    """Mean, spread, shape and independence, each within standard errors."""
    count = 20_000
    weights = dl.gaussian(1, SIZES, (count,), like=LIKE, scale=scale)
    for w, n in zip(weights, SIZES, strict=False):
        sigma = scale / n**0.5
        entries = w.ravel()
        assert abs(entries.mean()) <= 4 * sigma / entries.size**0.5
        assert abs(entries.var() / sigma**2 - 1.0) <= 4 * (2.0 / entries.size) ** 0.5
        assert stats.kstest(entries[:5000] / sigma, "norm").pvalue > 1e-3
        flat = w.reshape(count, -1) / sigma
        correlation = flat.T @ flat / count - np.eye(flat.shape[1])
        assert np.max(np.abs(correlation)) <= 6 * (2.0 / count) ** 0.5
    cross = weights[0].reshape(count, -1).T @ weights[1].reshape(count, -1) / count
    assert np.max(np.abs(cross)) <= 6 * scale**2 / (SIZES[0] * SIZES[1]) ** 0.5 / count**0.5


def test_gaussian_networks_keep_the_size_of_their_inputs():
    weights = dl.gaussian(2, (50, 60, 70), (200,), like=LIKE)
    x = np.random.default_rng(0).standard_normal((200, 50, 1))
    out = weights[1] @ (weights[0] @ x)
    assert abs(float(np.mean(out**2)) - 1.0) < 0.05


def test_small_is_gaussian_with_a_small_scale():
    for a, b in zip(dl.small(3, SIZES, (4,), like=LIKE), dl.gaussian(3, SIZES, (4,), like=LIKE), strict=True):
        assert relative(a, 1e-3 * b) <= 1e-14
    for a, b in zip(dl.small(3, SIZES, like=LIKE, scale=0.1), dl.gaussian(3, SIZES, like=LIKE), strict=True):
        assert relative(a, 0.1 * b) <= 1e-14


@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_orthogonal_layers(backend, dtype, gain):
    like = backend.asarray(np.empty(0, dtype))
    if backend.lazy:
        import jax

        key = jax.random.key(0)
        weights = jax.jit(lambda k: dl.orthogonal(k, SIZES, (2, 3), like=like, gain=gain))(key)
    else:
        weights = dl.orthogonal(0, SIZES, (2, 3), like=like, gain=gain)
    for w, (n, m) in zip(weights, itertools.pairwise(SIZES), strict=True):
        backend.check(w, like)
        assert w.shape == (2, 3, m, n)
        numbers = backend.to_numpy(w)
        gram = numbers.mT @ numbers if m >= n else numbers @ numbers.mT
        wanted = np.broadcast_to(gain**2 * np.eye(min(m, n)), gram.shape)
        assert relative(gram, wanted) <= tolerance(numbers.dtype)


def test_orthogonal_layers_are_uniform():
    """Haar: no sign is preferred, and rotations leave all moments alone."""
    count = 20_000
    (w,) = dl.orthogonal(5, (4, 4), (count,), like=LIKE)
    assert np.max(np.abs(w.mean(axis=0))) <= 4 * 0.5 / count**0.5
    assert np.max(np.abs((w**2).mean(axis=0) - 0.25)) <= 5 * w[:, 0, 0].var() / count**0.5
    traces = np.trace(w, axis1=-2, axis2=-1)
    assert abs(traces.mean()) <= 4 / count**0.5
    assert abs(traces.var() - 1.0) <= 0.1
    determinants = np.linalg.det(w)
    assert abs(determinants.mean()) <= 4 / count**0.5
    (tall,) = dl.orthogonal(6, (2, 5), (count,), like=LIKE)
    assert np.max(np.abs(tall.mean(axis=0))) <= 4 * 0.2**0.5 / count**0.5
    assert np.max(np.abs((tall**2).mean(axis=0) - 0.2)) <= 5 * (tall[:, 0, 0] ** 2).std() / count**0.5


@pytest.mark.parametrize("sizes", [(4, 6, 5, 3), (3, 3), (5, 2, 5), (2, 7, 4), (3, 4, 4, 4, 4, 3)], ids=str)
def test_balanced_networks(dtype, sizes):
    like = np.empty(0, dtype)
    weights = dl.balanced(0, sizes, (5,), like=like)
    tol = tolerance(dtype)
    for w, (n, m) in zip(weights, itertools.pairwise(sizes), strict=True):
        assert w.shape == (5, m, n)
        assert w.dtype == np.dtype(dtype)
    for left, right in itertools.pairwise(weights):
        assert np.max(np.abs(right.mT @ right - left @ left.mT)) <= 10 * tol
    depth, modes = len(weights), min(sizes)
    whole = product(weights)
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)[..., :modes]
    for w in weights:
        found = np.linalg.svd(w.astype(np.float64), compute_uv=False)[..., :modes]
        np.testing.assert_allclose(found, values ** (1 / depth), rtol=1e-3 if dtype == "float32" else 1e-9)


def test_balanced_networks_without_a_product_are_gaussian_end_to_end():
    count = 20_000
    weights = dl.balanced(0, (3, 4, 2), (count,), like=LIKE, scale=2.0)
    entries = product(weights).ravel()
    sigma = 2.0 / 3**0.5
    assert abs(entries.mean()) <= 4 * sigma / entries.size**0.5
    assert abs(entries.var() / sigma**2 - 1.0) <= 4 * (2.0 / entries.size) ** 0.5
    assert stats.kstest(entries[:5000] / sigma, "norm").pvalue > 1e-3


@pytest.mark.parametrize("sizes", [(4, 6, 5, 3), (4, 3), (4, 4, 3), (4, 3, 3, 3, 3)], ids=str)
def test_given_product_is_reproduced(backend, dtype, sizes):
    whole = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(dtype)
    given = backend.asarray(whole)
    if backend.lazy:
        import jax

        draw = jax.jit(lambda k, w: dl.balanced(k, sizes, (2,), like=w, end_to_end=w))
        weights = draw(jax.random.key(1), given)
    else:
        weights = dl.balanced(1, sizes, (2,), like=given, end_to_end=given)
    for w in weights:
        backend.check(w, given)
    numbers = [backend.to_numpy(w) for w in weights]
    assert relative(product(numbers), whole) <= tolerance(numbers[0].dtype)
    for left, right in itertools.pairwise(numbers):
        assert np.max(np.abs(right.mT @ right - left @ left.mT)) <= 10 * tolerance(numbers[0].dtype)


def test_modes_beyond_the_narrowest_layer_are_left_out():
    """The best approximation of that rank, by Eckart and Young."""
    whole = np.random.default_rng(0).standard_normal((5, 6))
    weights = dl.balanced(1, (6, 4, 2, 5), like=LIKE, end_to_end=whole)
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    assert relative(product(weights), (u[:, :2] * s[:2]) @ vh[:2]) <= 1e-12


def test_one_product_for_a_whole_ensemble():
    whole = np.random.default_rng(0).standard_normal((3, 4))
    weights = dl.balanced(1, SIZES, (7,), like=LIKE, end_to_end=whole)
    assert all(w.shape[0] == 7 for w in weights)
    assert relative(product(weights), np.broadcast_to(whole, (7, 3, 4))) <= 1e-12
    assert relative(weights[0][0], weights[0][1]) > 0.1
    for w in weights:
        assert w.flags.writeable
    (shallow,) = dl.balanced(1, (4, 3), (7,), like=LIKE, end_to_end=whole)
    assert relative(shallow, np.broadcast_to(whole, (7, 3, 4))) <= 1e-12
    shallow[0] = 0.0
    assert np.any(shallow[1])


def test_a_nan_product_is_one_bad_member():
    whole = np.random.default_rng(0).standard_normal((3, 3, 4))
    whole[1, 0, 0] = np.nan
    weights = dl.balanced(1, SIZES, (3,), like=LIKE, end_to_end=whole)
    found = product(weights)
    assert np.all(np.isnan(found[1]))
    assert relative(found[0::2], whole[0::2]) <= 1e-12


# ------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("batch", [(), (1,), (0,), (7,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_shapes(name, batch, dtype):
    weights = EVERY[name](0, SIZES, batch, like=np.empty((), dtype))
    assert isinstance(weights, tuple)
    assert [w.shape for w in weights] == [(*batch, m, n) for n, m in itertools.pairwise(SIZES)]
    assert all(w.dtype == np.dtype(dtype) for w in weights)
    assert all(np.all(np.isfinite(w)) for w in weights)


@pytest.mark.parametrize("name", EVERY)
def test_lists_of_sizes(name):
    for a, b in zip(EVERY[name](0, [4, 5, 3], [2], like=LIKE), EVERY[name](0, (4, 5, 3), (2,), like=LIKE), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", EAGER, ids=str, indirect=True)
@pytest.mark.parametrize("name", EVERY)
def test_scale_is_swept_over_the_ensemble(backend, name):
    """One random network at three scales, as a batch axis."""
    option = "gain" if name == "orthogonal" else "scale"
    scales = np.asarray([0.1, 1.0, 3.0])
    like = backend.asarray(np.empty(0))
    swept = EVERY[name](0, SIZES, (3,), like=like, **{option: backend.asarray(scales)})
    plain = EVERY[name](0, SIZES, (3,), like=like, **{option: 1.0})
    depth = len(SIZES) - 1
    for a, b in zip(swept, plain, strict=True):
        backend.check(a, like)
        factor = scales ** (1 / depth) if name == "balanced" else scales
        wanted = factor[:, None, None] * backend.to_numpy(b)
        assert relative(backend.to_numpy(a), wanted) <= 1e-5 if not backend.float64 else 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_sweep_along_one_of_two_axes(name):
    option = "gain" if name == "orthogonal" else "scale"
    scales = np.asarray([[0.5], [2.0]])
    weights = EVERY[name](0, SIZES, (2, 4), like=LIKE, **{option: scales})
    plain = EVERY[name](0, SIZES, (2, 4), like=LIKE, **{option: 1.0})
    power = 1 / 3 if name == "balanced" else 1.0
    for a, b in zip(weights, plain, strict=True):
        assert relative(a, scales[..., None, None] ** power * b) <= 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_a_negative_scale_of_one_member_is_nan(name):
    option = "gain" if name == "orthogonal" else "scale"
    weights = EVERY[name](0, SIZES, (3,), like=LIKE, **{option: np.asarray([1.0, -1.0, 1.0])})
    for w in weights:
        assert np.all(np.isnan(w[1]))
        assert np.all(np.isfinite(w[0::2]))


# ------------------------------------------------------------------------ where it comes from


@pytest.mark.parametrize("backend", EAGER, ids=str, indirect=True)
@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_the_same_numbers_on_every_library(backend, dtype, name):
    wanted = EVERY[name](42, SIZES, (3,), like=np.empty(0, np.float64))
    like = backend.asarray(np.empty(0, dtype))
    for seed in (42, np.random.default_rng(42)):
        for a, b in zip(EVERY[name](seed, SIZES, (3,), like=like), wanted, strict=True):
            backend.check(a, like)
            # Factorisations of float32 differ between libraries in the last digits.
            numbers = backend.to_numpy(a)
            assert relative(numbers, b) <= (1e-12 if numbers.dtype == np.float64 else 1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_seeds_and_layers_differ(name):
    one, other = (EVERY[name](seed, (4, 4, 4), like=LIKE) for seed in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert relative(a, b) > 0.1
    assert relative(one[0], one[1]) > 0.1
    generator = np.random.default_rng(0)
    first, second = (EVERY[name](generator, (4, 4, 4), like=LIKE) for _ in range(2))
    assert relative(first[0], second[0]) > 0.1
    assert relative(first[0], one[0]) <= 1e-15


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["new key", "old key"])
def test_jax_keys(name, kind):
    import jax

    like = JAX.asarray(np.empty(0, np.float32))
    make = jax.random.key if kind == "new key" else jax.random.PRNGKey
    found, again, other = (EVERY[name](make(seed), (4, 4, 3), (2,), like=like) for seed in (0, 0, 1))
    for a, b, c in zip(found, again, other, strict=True):
        JAX.check(a, like)
        np.testing.assert_array_equal(a, b)
        assert relative(a, c) > 0.1
    assert relative(found[0], found[1][:, :1] + 0 * found[0]) > 0.1


def test_jax_keys_under_jit_and_vmap():
    import jax

    like = JAX.asarray(np.empty(0))
    draw = lambda key: dl.gaussian(key, (4, 5, 3), like=like)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(draw))(keys)
    for k in range(3):
        for a, b in zip(many, draw(keys[k]), strict=True):
            assert relative(a[k], b) <= 1e-15


@pytest.mark.parametrize("name", EVERY)
def test_a_host_generator_under_a_trace_is_refused(name):
    import jax

    for rng in (0, np.random.default_rng(0)):
        with pytest.raises(TypeError, match="under a JAX trace, where its draw would be a constant; pass a JAX key"):
            jax.jit(lambda like, rng=rng: EVERY[name](rng, (4, 5, 3), like=like))(JAX_JIT.asarray(LIKE))


@pytest.mark.parametrize("name", EVERY)
def test_torch_generators(name, dtype):
    torch = pytest.importorskip("torch")
    like = torch.empty(0, dtype=getattr(torch, dtype))
    found, again, other = (
        EVERY[name](torch.Generator().manual_seed(seed), (4, 4, 3), (2,), like=like) for seed in (0, 0, 1)
    )
    for a, b, c in zip(found, again, other, strict=True):
        assert a.dtype == like.dtype
        np.testing.assert_array_equal(a, b)
        assert relative(a, c) > 0.1
    generator = torch.Generator().manual_seed(0)
    first, second = (EVERY[name](generator, (4, 4, 3), (2,), like=like) for _ in range(2))
    assert relative(first[0], second[0]) > 0.1


# -------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "one size": (
        lambda f: f(0, (4,), like=LIKE),
        ValueError,
        r"sizes must be a tuple of at least 2 integers of at least 1, got \(4,\)",
    ),
    "no sizes": (lambda f: f(0, (), like=LIKE), ValueError, r"sizes must be .* got \(\)"),
    "zero width": (lambda f: f(0, (4, 0, 3), like=LIKE), ValueError, r"sizes must be .* got \(4, 0, 3\)"),
    "negative width": (lambda f: f(0, (4, -2), like=LIKE), ValueError, r"sizes must be"),
    "width of a float": (lambda f: f(0, (4, 2.0), like=LIKE), ValueError, r"sizes must be .* got \(4, 2.0\)"),
    "width of a bool": (lambda f: f(0, (4, True), like=LIKE), ValueError, r"sizes must be"),
    "sizes of an integer": (lambda f: f(0, 4, like=LIKE), ValueError, r"sizes must be .* got 4"),
    "sizes of a string": (lambda f: f(0, "4,3", like=LIKE), ValueError, r"sizes must be .* got '4,3'"),
    "batch of an integer": (lambda f: f(0, SIZES, 4, like=LIKE), ValueError, r"batch_shape must be .* got 4"),
    "negative batch": (lambda f: f(0, SIZES, (-1,), like=LIKE), ValueError, r"batch_shape must be .* got \(-1,\)"),
    "batch of floats": (lambda f: f(0, SIZES, (2.0,), like=LIKE), ValueError, r"batch_shape must be"),
    "like of a list": (
        lambda f: f(0, SIZES, like=[1.0]),
        TypeError,
        r"like must be an array .* got a list of length 1",
    ),
    "like of integers": (
        lambda f: f(0, SIZES, like=np.empty(0, int)),
        TypeError,
        r"like must have dtype float32 or float64, got int64",
    ),
    "like of float16": (
        lambda f: f(0, SIZES, like=np.empty(0, np.float16)),
        TypeError,
        r"like must have dtype .* got float16",
    ),
    "rng None": (
        lambda f: f(None, SIZES, like=LIKE),
        TypeError,
        r"rng must be a generator, a key, an integer seed .* got NoneType None",
    ),
    "rng bool": (lambda f: f(True, SIZES, like=LIKE), TypeError, r"rng must be .* got bool True"),
    "rng string": (lambda f: f("seed", SIZES, like=LIKE), TypeError, r"rng must be .* got str 'seed'"),
    "rng of another library": (lambda f: f(JAX.asarray(np.zeros(3)), SIZES, like=LIKE), TypeError, r"rng|one library"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", EVERY)
def test_bad_arguments(name, bad):
    call, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        call(EVERY[name])


@pytest.mark.parametrize("name", EVERY)
def test_bad_scales(name):
    option = "gain" if name == "orthogonal" else "scale"
    for value, error, message in (
        (-1.0, ValueError, f"{option} must be at least 0, got -1.0"),
        (float("nan"), ValueError, f"{option} must be at least 0, got nan"),
        ("big", TypeError, f"{option} must be a number or an array"),
        ([1.0], TypeError, f"{option} must be a number or an array"),
        (np.ones(3), ValueError, f"{option} must have a shape that broadcasts to the batch shape"),
        (np.ones(2, np.float32), TypeError, option),
    ):
        with pytest.raises(error, match=message):
            EVERY[name](0, SIZES, (2,), like=LIKE, **{option: value})


@pytest.mark.parametrize(
    ("whole", "error", "message"),
    [
        ([[1.0]], TypeError, r"end_to_end must be an array"),
        (
            np.ones((4, 3)),
            ValueError,
            r"end_to_end must have shape \(\*batch, 3, 4\) \(outputs, inputs\) of sizes, got \(4, 3\)",
        ),
        (np.ones((5, 3, 4)), ValueError, r"end_to_end.*batch_shape"),
        (np.ones((2, 2, 3, 4)), ValueError, r"end_to_end must broadcast to batch_shape \(2,\)"),
        (np.ones((3, 4), np.float32), TypeError, r"like has dtype float64, but end_to_end has dtype float32"),
        (JAX.asarray(np.ones((3, 4))), TypeError, r"one library"),
    ],
)
def test_bad_products(whole, error, message):
    with pytest.raises(error, match=message):
        dl.balanced(0, SIZES, (2,), like=LIKE, end_to_end=whole)


def test_product_on_another_device():
    with pytest.raises(ValueError, match="device"):
        dl.balanced(0, SIZES, like=STRICT_DEVICE1.asarray(LIKE), end_to_end=STRICT_DEVICE2.asarray(np.ones((3, 4))))
