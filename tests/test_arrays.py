"""The room that knows array libraries exist."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import array_api_compat as compat
import jax
import numpy as np
import pytest
from backends import BACKENDS, DASK, JAX, NUMPY, STRICT_DEVICE1, STRICT_DEVICE2, Backend
from cases import SPECIAL, positive_definite

from natgrad_array import _arrays

EYE = np.eye(2)


def only(*names: str) -> Any:
    """Run a test on the named libraries; one that is not installed is left out."""
    return pytest.mark.parametrize("backend", [b for b in [*BACKENDS, DASK] if b.name in names], ids=str)


# ------------------------------------------------------------------- words and checks


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (EYE, "a numpy array of dtype float64 and shape (2, 2)"),
        ([1, 2, 3], "a list of length 3"),
        ((), "a tuple of length 0"),
        (2.5, "float 2.5"),
        ("text", "str 'text'"),
        (None, "NoneType None"),
    ],
    ids=str,
)
def test_describe(value: object, words: str) -> None:
    assert _arrays.describe(value) == words


def test_describe_names_the_library(backend: Backend) -> None:
    words = _arrays.describe(backend.asarray(np.zeros((2, 3), dtype=np.float32)))
    assert "float32" in words
    assert words.endswith("and shape (2, 3)")
    assert words.split()[1][:3] == backend.library.removeprefix("array_api_compat.")[:3]


def test_check_arrays_returns_the_namespace(backend: Backend, dtype: str) -> None:
    a = backend.asarray(EYE.astype(dtype))
    assert _arrays.check_arrays({"a": a, "b": None, "c": a}, optional=("b",)) is backend.xp
    assert _arrays.namespace(a) is backend.xp


def test_check_arrays_integers(backend: Backend) -> None:
    a, b = backend.asarrays(EYE.astype(np.int32), EYE)
    assert _arrays.check_arrays({"a": a, "b": b}, integers=True) is backend.xp
    with pytest.raises(TypeError, match=r"a must have dtype float32 or float64, got .*int32"):
        _arrays.check_arrays({"a": a})
    with pytest.raises(TypeError, match=r"a must have dtype float32, float64 or an integer dtype, got .*bool"):
        _arrays.check_arrays({"a": backend.asarray(EYE.astype(bool))}, integers=True)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"a": EYE, "b": [1.0]}, TypeError, "b must be an array .* got a list of length 1; convert it"),
        ({"a": 1.0}, TypeError, "a must be an array .* got float 1.0"),
        ({"a": EYE.astype("float16")}, TypeError, "a must have dtype float32 or float64, got float16"),
        ({"a": EYE.astype("longdouble")}, TypeError, "a must have dtype float32 or float64"),
        ({"a": EYE.astype(complex)}, TypeError, "a must have dtype float32 or float64, got complex128"),
        ({"a": EYE, "b": EYE.astype("float32")}, TypeError, "b has dtype float32, but a has dtype float64; convert"),
        (
            {"a": EYE, "b": STRICT_DEVICE1.asarray(EYE)},
            TypeError,
            "one library, got a: numpy.ndarray, b: array_api_strict",
        ),
        (
            {"a": STRICT_DEVICE1.asarray(EYE), "b": STRICT_DEVICE2.asarray(EYE)},
            ValueError,
            "b has device .*device2.*, but a has device .*device1.*; move with to_device",
        ),
    ],
    ids=str,
)
def test_check_arrays_refuses(arrays: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _arrays.check_arrays(arrays)


def test_check_arrays_none() -> None:
    given = {"a": EYE, "b": None}
    assert _arrays.check_arrays(given, optional=("b",)) is NUMPY.xp
    with pytest.raises(TypeError, match=r"b must be an array .* got NoneType None"):
        _arrays.check_arrays(given)


def test_check_arrays_under_a_trace() -> None:
    """A tracer has no device yet; it follows the arrays beside it."""
    a = JAX.asarray(EYE)
    np.testing.assert_array_equal(jax.jit(lambda b: (_arrays.check_arrays({"a": a, "b": b}), a + b)[1])(a), 2 * EYE)
    with pytest.raises(TypeError, match="b has dtype float32, but a has dtype float64"):
        jax.jit(lambda b: _arrays.check_arrays({"a": a, "b": b}))(JAX.asarray(EYE.astype("float32")))


def test_promote(backend: Backend) -> None:
    xp = backend.xp
    whole, single = backend.asarrays(EYE.astype(np.int64), EYE.astype(np.float32))
    first, none, second = _arrays.promote(xp, whole, None, single)
    assert none is None
    backend.check(first, single)
    assert second is single
    (alone,) = _arrays.promote(xp, whole)
    default = xp.float32 if backend.name in ("strict-device2", "strict-no_float64", "torch") else xp.float64
    backend.check(alone, whole, dtype=default)
    np.testing.assert_array_equal(backend.to_numpy(alone), EYE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _arrays.check_matrix("a", np.ones(3)), ValueError, r"a must have shape \(\*batch, m, n\), got \(3,\)"),
        (
            lambda: _arrays.check_matrix("a", np.ones((2, 3)), square=True),
            ValueError,
            r"\(\*batch, n, n\), got \(2, 3\)",
        ),
        (
            lambda: _arrays.check_core("a", np.ones((4, 2)), (3,), "to fit"),
            ValueError,
            r"\(\*batch, 3\) to fit, got \(4, 2\)",
        ),
        (
            lambda: _arrays.check_core("a", np.ones(3), (3, 3), "to fit"),
            ValueError,
            r"\(\*batch, 3, 3\) to fit, got \(3,\)",
        ),
        (lambda: _arrays.check_option("how", "c", ("a", "b")), ValueError, "how must be one of 'a', 'b', got 'c'"),
        (lambda: _arrays.check_option("how", np.ones(2), ("a",)), ValueError, "how must be one of 'a', got array"),
        (
            lambda: _arrays.broadcast_batch({"a": (2,), "b": (3, 1), "c": (4,)}),
            ValueError,
            r"batch shapes must broadcast, got a: \(2,\), b: \(3, 1\), c: \(4,\)",
        ),
        (lambda: _arrays.check_sequence("w", EYE, "a tuple"), TypeError, "w must be a tuple, got a numpy array"),
        (lambda: _arrays.check_sequence("w", [], "a tuple"), ValueError, "w must be a tuple, got an empty list"),
        (
            lambda: _arrays.check_sequence("w", iter([EYE]), "a tuple"),
            TypeError,
            "w must be a tuple, got list_iterator",
        ),
        (lambda: _arrays.check_nonnegative("d", -1, np, EYE), ValueError, "d must be at least 0, got -1"),
        (lambda: _arrays.check_nonnegative("d", float("nan"), np, EYE), ValueError, "d must be at least 0, got nan"),
        (
            lambda: _arrays.check_nonnegative("d", True, np, EYE),
            TypeError,
            "d must be a number or an array .* got bool True",
        ),
        (
            lambda: _arrays.check_nonnegative("d", None, np, EYE),
            TypeError,
            "d must be a number or an array .* got NoneType",
        ),
        (
            lambda: _arrays.check_nonnegative("d", [1.0], np, EYE),
            TypeError,
            "d must be a number or an array .* got a list",
        ),
        (
            lambda: _arrays.check_nonnegative("d", np.ones(2), np, EYE, batch=(3,)),
            ValueError,
            r"d must have a shape that broadcasts to the batch shape \(3,\), got \(2,\)",
        ),
        (
            lambda: _arrays.check_nonnegative("d", np.ones((2, 3)), np, EYE, batch=(3,)),
            ValueError,
            r"\(3,\), got \(2, 3\)",
        ),
    ],
)
def test_checks_refuse(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_checks_accept() -> None:
    _arrays.check_matrix("a", np.ones((4, 2, 3)))
    _arrays.check_matrix("a", np.ones((4, 0, 0)), square=True)
    _arrays.check_core("a", np.ones((4, 2, 3)), (2, 3), "")
    _arrays.check_core("a", np.ones((4, 2, 3)), (), "")
    _arrays.check_option("how", "a", ("a", "b"))
    assert _arrays.broadcast_batch({}) == ()
    assert _arrays.broadcast_batch({"a": (), "b": (3, 1), "c": (4,)}) == (3, 4)
    assert _arrays.broadcast_batch({"a": (0,), "b": (1,)}) == (0,)
    assert _arrays.check_sequence("w", [1, 2], "") == (1, 2)


def test_check_nonnegative(backend: Backend, dtype: str) -> None:
    like, value = backend.asarrays(np.ones((3, 2, 2), dtype=dtype), np.asarray([0.0, -1.0, np.nan], dtype=dtype))
    for number in (0, 0.0, 2, np.float64(2.0)):
        assert isinstance(_arrays.check_nonnegative("d", number, backend.xp, like), float)
    checked = backend.call(
        lambda v, a: _arrays.check_nonnegative("d", v, backend.xp, a, batch=(3,), core_ndim=2), value, like
    )
    backend.check(checked, like)
    np.testing.assert_array_equal(backend.to_numpy(checked), np.asarray([0.0, np.nan, np.nan]).reshape(3, 1, 1))


# ------------------------------------------------------------------------ constructors


def test_constructors(backend: Backend, dtype: str) -> None:
    xp, like = backend.xp, backend.asarray(np.ones(1, dtype=dtype))
    for made, expected in (
        (_arrays.eye(xp, 3, like), np.eye(3)),
        (_arrays.asarray_like(xp, [[1, 2]], like), [[1, 2]]),
        (_arrays.asarray_like(xp, np.asarray([0.5]), like), [0.5]),
    ):
        backend.check(made, like)
        np.testing.assert_array_equal(backend.to_numpy(made), expected)
    assert _arrays.device(like) == compat.device(like)
    assert _arrays.eps(xp, like) == np.finfo(backend.to_numpy(like).dtype).eps


def test_finite_members(backend: Backend) -> None:
    x = np.ones((2, 3, 2, 2))
    y = np.ones((3, 4, 1))
    x[0, 1, 0, 1], x[1, 2, 1, 1], y[0, 2, 0] = np.nan, np.inf, -np.inf
    a, b = backend.asarrays(x, y)
    flags = backend.to_numpy(backend.call(lambda a, b: _arrays.finite_members(backend.xp, a, b), a, b))
    expected = np.asarray([[False, False, True], [False, True, False]])[..., None, None]
    np.testing.assert_array_equal(flags, expected)
    masked = backend.call(lambda a: _arrays.nan_unless_finite(backend.xp, a), a)
    backend.check(masked, a)
    bad = np.asarray([[False, True, False], [False, False, True]])[..., None, None]
    np.testing.assert_array_equal(backend.to_numpy(masked), np.where(bad, np.nan, 1.0) * np.ones((2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_plainly_finite(backend: Backend, bad: float | None) -> None:
    """Infs of both signs do not cancel; large numbers may pass for an Inf, but not the other way."""
    x = np.ones((2, 3, 3))
    if bad is not None:
        x[0, 1, 2], x[1, 0, 0] = bad, -bad
    (a,) = backend.asarrays(x)
    assert _arrays.plainly_finite(backend.xp, a) == (bad is None and not _arrays.is_lazy(a))
    assert not _arrays.plainly_finite(backend.xp, a * 3e307 if backend.float64 else a * 3e37)


# ------------------------------------------------------------------ outside the standard


def test_is_lazy() -> None:
    for backend in BACKENDS:
        assert not _arrays.is_lazy(backend.asarray(EYE))
    assert _arrays.is_lazy(DASK.asarray(EYE))
    assert jax.jit(lambda a: a + float(_arrays.is_lazy(a)))(JAX.asarray(0.0)) == 1.0
    jax.vmap(lambda a: a if _arrays.is_lazy(a) else pytest.fail("a batched tracer has no values"))(JAX.asarray(EYE))


def test_to_numpy(backend: Backend, dtype: str) -> None:
    expected = EYE.astype(dtype if backend.float64 else "float32")
    for x in (expected, expected[0, 0], expected.astype(int), expected.astype(bool), expected[:0]):
        copy = _arrays.to_numpy(backend.asarray(x))
        assert type(copy) is np.ndarray
        assert copy.dtype == x.dtype
        np.testing.assert_array_equal(copy, x)


def test_to_numpy_dask() -> None:
    np.testing.assert_array_equal(_arrays.to_numpy(DASK.asarray(EYE)), EYE)


@only("torch")
def test_to_numpy_of_a_leaf_with_gradients(backend: Backend) -> None:
    np.testing.assert_array_equal(_arrays.to_numpy(backend.asarray(EYE).requires_grad_()), EYE)


def test_eager_any(backend: Backend) -> None:
    flags = backend.asarray(np.asarray([False, True]))
    seen = backend.call(lambda f: (_arrays.eager_any(backend.xp, f), _arrays.eager_any(backend.xp, f & ~f)), flags)
    assert seen == ((None, None) if backend.jit else (True, False))
    assert _arrays.eager_any(DASK.xp, DASK.asarray(np.asarray([True]))) is None


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 4])
def test_cholesky(backend: Backend, dtype: str, batch: tuple[int, ...], n: int) -> None:
    x = positive_definite(batch, n).astype(dtype)
    a = backend.asarray(x)
    factor = backend.call(lambda a: _arrays.cholesky(backend.xp, a), a)
    backend.check(factor, a)
    lower = backend.to_numpy(factor)
    np.testing.assert_allclose(lower, np.linalg.cholesky(x.astype(np.float64)), atol=20 * np.finfo(lower.dtype).eps)


def test_cholesky_finds_the_failures(backend: Backend, dtype: str) -> None:
    bad = ("nan", "nan in the upper triangle only", "all nan", "inf", "minus inf", "indefinite", "negative definite")
    good = ("repeated eigenvalues", "two equal eigenvalues")
    x = np.stack([SPECIAL[name].matrix for name in (*bad, *good, *bad)]).astype(dtype)
    factor = backend.to_numpy(backend.call(lambda a: _arrays.cholesky(backend.xp, a), backend.asarray(x)))
    for lower, name in zip(factor, (*bad, *good, *bad), strict=True):
        # A NaN in the upper triangle is not seen by those that read the lower one.
        if name in good or name != "nan in the upper triangle only":
            assert np.isfinite(lower).all() == (name in good), name


def test_cholesky_neighbours(backend: Backend) -> None:
    good = positive_definite((9,), 5)
    for position in (0, 4, 8):
        x = good.copy()
        x[position] = -np.eye(5)
        factor = backend.to_numpy(backend.call(lambda a: _arrays.cholesky(backend.xp, a), backend.asarray(x)))
        others = np.arange(9) != position
        assert np.isnan(factor[position]).any()
        np.testing.assert_allclose(
            factor[others], np.linalg.cholesky(good)[others], atol=20 * np.finfo(factor.dtype).eps
        )


def test_while_loop(backend: Backend) -> None:
    """Newton's square root, until every member has it."""
    target = np.asarray([2.0, 9.0, 1e4])
    a = backend.asarray(target)
    xp = backend.xp

    def unfinished(state: tuple[Any, ...]) -> Any:
        root, value, rounds = state
        return xp.any(xp.abs(root * root - value) > 1e-5 * value) & (rounds < 50)

    def improve(state: tuple[Any, ...]) -> tuple[Any, ...]:
        root, value, rounds = state
        return (root + value / root) / 2, value, rounds + 1

    def run(a: Any) -> tuple[Any, ...]:
        rounds = xp.zeros((), dtype=xp.int32, device=_arrays.device(a))
        return _arrays.while_loop(unfinished, improve, (xp.ones_like(a), a, rounds))

    root, value, rounds = backend.call(run, a)
    backend.check(root, a)
    np.testing.assert_allclose(backend.to_numpy(root), np.sqrt(target), rtol=1e-4)
    np.testing.assert_array_equal(backend.to_numpy(value), backend.to_numpy(a))
    assert 5 < int(backend.to_numpy(rounds)) < 20


def test_while_loop_that_never_starts(backend: Backend) -> None:
    a = backend.asarray(np.ones(2))
    run = lambda a: _arrays.while_loop(lambda s: backend.xp.any(s[0] > 5.0), lambda s: (s[0] * 0.0,), (a,))  # noqa: E731
    (same,) = backend.call(run, a)
    np.testing.assert_array_equal(backend.to_numpy(same), 1.0)


def test_register_pytree_once() -> None:
    class Pair:
        def __init__(self, first: Any, second: Any) -> None:
            self.parts = (first, second)

    for _ in range(2):
        _arrays.register_pytree(Pair, lambda pair: (pair.parts, None), lambda _, parts: Pair(*parts))
    doubled = jax.jit(lambda pair: Pair(2 * pair.parts[0], pair.parts[1]))(Pair(JAX.asarray(1.0), JAX.asarray(3.0)))
    assert [float(part) for part in doubled.parts] == [2.0, 3.0]


def test_available_bytes(backend: Backend) -> None:
    free = _arrays.available_bytes(backend.asarray(EYE))
    assert free is None or free > 2**20


def test_check_fits(backend: Backend, dtype: str) -> None:
    a = backend.asarray(EYE.astype(dtype))
    _arrays.check_fits("a matrix", (10, 10), backend.xp, a, "use less")
    with pytest.raises(ValueError, match=r"a matrix of shape \(10000000, 10000000\) needs about .* GB .*; use less"):
        _arrays.check_fits("a matrix", (10**7, 10**7), backend.xp, a, "use less")


def test_check_fits_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix and the pieces it is made of: twice its size."""
    for dtype, size in (("float64", 8), ("float32", 4)):
        a = EYE.astype(dtype)
        monkeypatch.setattr(_arrays.memory, "available_bytes", lambda _, size=size: 2 * 100 * size)
        _arrays.check_fits("it", (10, 10), NUMPY.xp, a, "")
        with pytest.raises(ValueError, match="it of shape"):
            _arrays.check_fits("it", (10, 11), NUMPY.xp, a, "")
    monkeypatch.setattr(_arrays.memory, "available_bytes", lambda _: None)
    _arrays.check_fits("it", (10**9, 10**9), NUMPY.xp, EYE, "")


def test_available_bytes_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    counts = {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(_arrays.memory, "os", SimpleNamespace(sysconf=counts.__getitem__))
    assert _arrays.available_bytes(EYE) is None or _arrays.available_bytes(EYE) == 7 * 4096
    monkeypatch.setattr(_arrays.memory, "os", SimpleNamespace())
    assert _arrays.available_bytes(EYE) is None


# --------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("shape", [(), (4,), (0, 2), (3, 2)], ids=str)
def test_normal_of_seeds_is_the_same_everywhere(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    like = backend.asarray(np.ones(1, dtype=dtype))
    expected = np.random.default_rng(5).standard_normal(shape)
    for rng in (5, np.int64(5), np.random.default_rng(5)):
        drawn = _arrays.standard_normal(rng, shape, backend.xp, like)
        backend.check(drawn, like)
        assert drawn.shape == shape
        np.testing.assert_array_equal(backend.to_numpy(drawn), expected.astype(backend.to_numpy(like).dtype))


def test_normal_generator_advances(backend: Backend) -> None:
    like = backend.asarray(EYE)
    rng = np.random.default_rng(0)
    first, second = (backend.to_numpy(_arrays.standard_normal(rng, (3,), backend.xp, like)) for _ in range(2))
    assert not np.any(first == second)


def test_normal_of_noise(backend: Backend) -> None:
    like, noise = backend.asarrays(EYE, np.arange(6.0).reshape(2, 3))
    assert _arrays.standard_normal(noise, (2, 3), backend.xp, like) is noise
    for shape in ((3, 2), (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"rng must have shape .* when it is noise already drawn, got \(2, 3\)"):
            _arrays.standard_normal(noise, shape, backend.xp, like)
    with pytest.raises(TypeError, match=r"rng has dtype|rng must have dtype"):
        _arrays.standard_normal(backend.asarray(np.ones(2, dtype=int)), (2,), backend.xp, like)


def test_normal_of_noise_from_elsewhere() -> None:
    with pytest.raises(TypeError, match=r"one library, got rng: numpy\.ndarray"):
        _arrays.standard_normal(np.ones(2), (2,), STRICT_DEVICE1.xp, STRICT_DEVICE1.asarray(EYE))


@only("jax", "jax-jit")
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_normal_of_a_jax_key(backend: Backend, dtype: str, make: Callable[[int], Any]) -> None:
    key, like = make(3), backend.asarray(EYE.astype(dtype))
    drawn = backend.call(lambda key, like: _arrays.standard_normal(key, (1000,), backend.xp, like), key, like)
    backend.check(drawn, like)
    np.testing.assert_array_equal(backend.to_numpy(drawn), np.asarray(jax.random.normal(key, (1000,), dtype=dtype)))
    assert abs(float(drawn.mean())) < 0.15
    assert abs(float(drawn.std()) - 1) < 0.1


@pytest.mark.parametrize("rng", [0, np.random.default_rng(0)], ids=["seed", "generator"])
def test_normal_of_host_randomness_under_a_trace(rng: Any) -> None:
    with pytest.raises(TypeError, match=r"rng is a NumPy generator or seed under a JAX trace.* pass a JAX key"):
        jax.jit(lambda like: _arrays.standard_normal(rng, (2,), JAX.xp, like))(JAX.asarray(EYE))


@only("torch")
def test_normal_of_a_torch_generator(backend: Backend, dtype: str) -> None:
    torch = backend.xp
    like = backend.asarray(EYE.astype(dtype))
    drawn = _arrays.standard_normal(torch.Generator().manual_seed(3), (4, 2), backend.xp, like)
    backend.check(drawn, like)
    expected = torch.randn((4, 2), generator=torch.Generator().manual_seed(3), dtype=like.dtype)
    np.testing.assert_array_equal(backend.to_numpy(drawn), backend.to_numpy(expected))


@only("torch")
def test_normal_of_a_torch_generator_for_others(backend: Backend) -> None:
    with pytest.raises(
        TypeError, match=r"rng must draw arrays of the library in use, got Generator .* beside a numpy array"
    ):
        _arrays.standard_normal(backend.xp.Generator(), (2,), np, EYE)


@only("cupy")
def test_normal_of_a_cupy_generator(backend: Backend, dtype: str) -> None:
    like = backend.asarray(EYE.astype(dtype))
    drawn = _arrays.standard_normal(backend.xp.random.default_rng(3), (1000,), backend.xp, like)
    backend.check(drawn, like)
    assert abs(float(drawn.mean())) < 0.15


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_normal_of_a_jax_key_for_others(key: Callable[[int], Any]) -> None:
    with pytest.raises(TypeError, match=r"rng must draw arrays of the library in use, got .* beside a numpy array"):
        _arrays.standard_normal(key(0), (2,), np, EYE)


@pytest.mark.parametrize(
    "rng", [None, True, 1.5, "seed", [1], np.random.RandomState(0)], ids=lambda r: type(r).__name__
)
def test_normal_refuses(backend: Backend, rng: Any) -> None:
    with pytest.raises(TypeError, match="rng must be a generator, a key, an integer seed or an array of noise, got "):
        _arrays.standard_normal(rng, (2,), backend.xp, backend.asarray(EYE))


def test_split_rng() -> None:
    """Every source gives different noise, and the same one each time."""
    for make in (lambda: 7, lambda: np.int32(7), lambda: np.random.default_rng(7)):
        draws = [
            [_arrays.standard_normal(rng, (3,), np, EYE) for rng in _arrays.split_rng(make(), 3)] for _ in range(2)
        ]
        np.testing.assert_array_equal(*draws)
        assert np.unique(draws[0]).size == 9
    like = JAX.asarray(EYE)
    for key in (jax.random.key(7), jax.random.PRNGKey(7)):
        draws = [
            [_arrays.standard_normal(rng, (3,), JAX.xp, like) for rng in _arrays.split_rng(key, 3)] for _ in range(2)
        ]
        np.testing.assert_array_equal(np.asarray(draws[0]), np.asarray(draws[1]))
        assert np.unique(np.asarray(draws[0])).size == 9


# ------------------------------------------------------------ the tests' own backends


class Both(NamedTuple):
    first: Any
    second: Any


def test_backend_call_keeps_structure(backend: Backend) -> None:
    a = backend.asarray(EYE)

    def f(pair: Both, *, scale: float, extra: dict[str, Any]) -> Any:
        assert _arrays.is_lazy(pair.first) == backend.jit
        return Both(pair.first * scale, [pair.second + extra["x"]]), "text", 3

    result, text, number = backend.call(f, Both(a, a), scale=2.0, extra={"x": a})
    assert isinstance(result, Both)
    assert (text, number) == ("text", 3)
    np.testing.assert_array_equal(backend.to_numpy(result.first), 2 * EYE)
    np.testing.assert_array_equal(backend.to_numpy(result.second[0]), 2 * EYE)
    for scale in (3.0, 4.0):
        result, *_ = backend.call(f, Both(a, a), scale=scale, extra={"x": a})
        np.testing.assert_array_equal(backend.to_numpy(result.first), scale * EYE)


def test_backend_check_can_fail(backend: Backend) -> None:
    a = backend.asarray(EYE.astype(np.float32))
    backend.check(a, a)
    with pytest.raises(AssertionError):
        backend.check(backend.asarray(EYE.astype(int)), a)
    with pytest.raises(AssertionError):
        backend.check([1.0], a)
    other = STRICT_DEVICE2 if backend.name == "strict-device1" else STRICT_DEVICE1
    with pytest.raises(AssertionError):
        backend.check(other.asarray(EYE.astype(np.float32)), a)


def test_backend_arrays_are_copies(backend: Backend) -> None:
    x = np.zeros(2)
    a = backend.asarray(x)
    x[0] = 1.0
    np.testing.assert_array_equal(backend.to_numpy(a), 0.0)
    backend.to_numpy(a)[0] = 1.0
    np.testing.assert_array_equal(backend.to_numpy(a), 0.0)
    if backend.readonly:
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 1.0
