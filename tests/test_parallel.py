"""Data-parallel steps: those of one process to rounding, and old inverses as old as they are said to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import distributed
import numpy as np
import pytest
from backends import BACKENDS, NUMPY, Backend

import natgrad_array as ng
from natgrad_array import networks as nn
from natgrad_array import optimizers as opts

RNG = np.random.default_rng(0)
X, IMAGES = RNG.standard_normal((37, 4)), RNG.standard_normal((37, 4, 4, 1))
TARGETS: dict[str, np.ndarray] = {
    "gaussian": RNG.standard_normal((37, 3)),
    "categorical": RNG.integers(0, 3, 37),
    "bernoulli": (RNG.standard_normal((37, 3)) > 0) + 0.0,
}
PRESETS: dict[str, Callable[[], opts.Optimizer]] = {
    "natural_gradient": opts.natural_gradient,
    "bounded_kfac": opts.bounded_kfac,
    "prong": opts.prong,
    "adam": opts.adam,
    "heskes": opts.heskes,
    "kfac": lambda: opts.kfac(share=1.0, refresh=3),
    "tridiagonal_kfac": lambda: opts.tridiagonal_kfac(share=1.0, refresh=2),
}


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    with distributed.Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


def compare(
    backend: Backend,
    opt: opts.Optimizer,
    client: distributed.Client,
    net: nn.Network,
    x: Any,
    y: Any,
    batch: Any,
    steps: int,
) -> None:
    """Both ways side by side, each going its own."""
    x, y = backend.asarrays(x, y)
    alone = spread = net.init(1, batch, like=x)
    parallel = opts.DataParallel(opt, client)
    state, shared = opt.init(net, alone), parallel.init(net, spread)
    for seed in range(steps):
        alone, state, wanted = opt.step(net, alone, state, x, y, seed)
        spread, shared, info = parallel.step(net, spread, shared, x, y, seed)
        for a, b in zip(spread, alone, strict=True):
            backend.check(a, x)
            np.testing.assert_allclose(backend.to_numpy(a), backend.to_numpy(b), rtol=1e-11, atol=1e-12)
        for name in ("loss", "new_loss", "rate", "damping", "ratio"):
            value = getattr(wanted, name)
            if value is not None:
                found = backend.to_numpy(getattr(info, name))
                np.testing.assert_allclose(found, backend.to_numpy(value), rtol=1e-8)
    assert shared.steps == steps


@pytest.mark.parametrize("likelihood", TARGETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_are_those_of_one_process(preset: str, likelihood: str, client: distributed.Client) -> None:
    """37 samples on three workers, noise drawn in one place, two networks."""
    net = nn.MLP((4, 6, 3), likelihood=likelihood)
    compare(NUMPY, PRESETS[preset](), client, net, X, TARGETS[likelihood], (2,), 4)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name in ("torch", "jax", "cupy")], ids=str)
def test_arrays_of_other_libraries(backend: Backend, client: distributed.Client) -> None:
    opt = opts.Optimizer(opts.Empirical(0.5), opts.FactoredTikhonov(), opts.Fixed(0.1), opts.Damping(0.1))
    compare(backend, opt, client, nn.MLP((4, 3)), X, TARGETS["gaussian"], (), 2)


def test_convolutions(client: distributed.Client) -> None:
    net = nn.Network((nn.Conv2d((4, 4, 1), 2), nn.Dense(8, 3)), "tanh", "categorical")
    compare(NUMPY, opts.natural_gradient(), client, net, IMAGES, TARGETS["categorical"], (), 3)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_chunks_of_dask_arrays_are_shards(likelihood: str, client: distributed.Client) -> None:
    net, opt = nn.MLP((4, 6, 3), likelihood=likelihood), opts.natural_gradient()
    y = TARGETS[likelihood]
    chunks = ((20, 1, 16), *y.shape[1:])
    lazy = client.persist([da.from_array(X, chunks=((20, 1, 16), 4)), da.from_array(y, chunks=chunks)])
    params = net.init(0, like=X)
    parallel = opts.DataParallel(opt, client)
    found, _, info = parallel.step(net, params, parallel.init(net, params), *lazy, 3)
    wanted, _, alone = opt.step(net, params, opt.init(net, params), X, y, 3)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(info.new_loss, alone.new_loss, rtol=1e-11)


# ------------------------------------------------------------------------------ staleness


def dense_direction(net: nn.Network, at: Any, damping: float, gradient: Any) -> list[np.ndarray]:
    """(A ⊗ G + damping)⁻¹ times a gradient by dense matrices, with A and G of the data's errors at some parameters."""
    found = []
    hidden = np.tanh(np.c_[X, np.ones(37)] @ at[0].T)
    outer = np.c_[hidden, np.ones(37)]
    errors = outer @ at[1].T - TARGETS["gaussian"]
    inner = (errors @ at[1][:, :-1]) * (1 - hidden**2)
    for rows, delta, g in ((np.c_[X, np.ones(37)], inner, gradient[0]), (outer, errors, gradient[1])):
        fisher = np.kron(rows.T @ rows / 37, delta.T @ delta / 37)
        solved = np.linalg.solve(fisher + damping * np.eye(len(fisher)), g.T.ravel())
        found.append(solved.reshape(g.shape[::-1]).T)
    return found


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_inverses_are_as_old_as_they_may_be(staleness: int, client: distributed.Client) -> None:
    """The one of step 0 first, and then always that of so many steps before."""
    net = nn.MLP((4, 5, 3))
    opt = opts.Optimizer(opts.Empirical(), opts.Tikhonov(), opts.Fixed(0.2), opts.Damping(0.3))
    parallel = opts.DataParallel(opt, client, staleness=staleness)
    params = net.init(0, like=X)
    visited, state = [params], parallel.init(net, params)
    for step in range(6):
        gradient = net.gradient(params, X, TARGETS["gaussian"])
        direction = dense_direction(net, visited[max(0, step - staleness)], 0.3, gradient)
        wanted = [w - 0.2 * d for w, d in zip(params, direction, strict=True)]
        params, state, _ = parallel.step(net, params, state, X, TARGETS["gaussian"])
        visited.append(params)
        for a, b in zip(params, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        assert len(state.waiting) == min(step, staleness)


# ------------------------------------------------------------------------------- mistakes

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no optimizer": ("kfac", TypeError, "optimizer must be an Optimizer, got str 'kfac'"),
    "passes": (
        opts.Optimizer(inverse=opts.FullFisher()),
        ValueError,
        r"from sums over samples; .* makes passes through the network",
    ),
    "follows": (
        opts.Optimizer(opts.Empirical(), opts.RescaledEigenbasis()),
        ValueError,
        "RescaledEigenbasis.* follows every batch",
    ),
    "share": (opts.Optimizer(opts.Empirical(share=0.5), opts.Tikhonov()), ValueError, "whole batch, share 1"),
    "share of products": (opts.Optimizer(scaling=opts.QuadraticModel(share=0.5)), ValueError, "got scaling Quadratic"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_from_sums(name: str, client: distributed.Client) -> None:
    optimizer, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        opts.DataParallel(optimizer, client)


def test_mistakes(client: distributed.Client) -> None:
    with pytest.raises(ValueError, match="staleness must be an integer of at least 0, got -1"):
        opts.DataParallel(opts.sgd(), client, staleness=-1)
    with pytest.raises(TypeError, match=r"client must be a dask.distributed.Client, got NoneType None"):
        opts.DataParallel(opts.sgd(), None)
    net = nn.MLP((4, 5, 3))
    params, y = net.init(0, like=X), TARGETS["gaussian"]
    parallel = opts.DataParallel(opts.natural_gradient(), client)
    state = parallel.init(net, params)
    with pytest.raises(TypeError, match="rng must be a source of randomness for an estimate that samples the model"):
        parallel.step(net, params, state, X, y)
    with pytest.raises(ValueError, match="x and y must be Dask arrays in the same chunks of samples"):
        parallel.step(net, params, state, da.from_array(X, chunks=(10, 4)), da.from_array(y, chunks=(9, 3)), 0)
    with pytest.raises(TypeError, match="state must be what init or step returned"):
        parallel.step(net, params, state.optimizer, X, y, 0)


@pytest.mark.parametrize(
    ("likelihood", "x", "y", "error", "words"),
    [
        ("gaussian", X, np.ones((38, 3)), ValueError, r"y must have shape \(\*batch, 37, 3\) .*, got \(38, 3\)"),
        ("gaussian", X, np.ones(37), ValueError, r"y must have shape \(\*batch, 37, 3\) .*, got \(37,\)"),
        ("gaussian", X[:, :3], np.ones((37, 3)), ValueError, r"x must have shape \(\*batch, N, 4\) .*, got \(37, 3\)"),
        ("gaussian", X.astype("f"), np.ones((37, 3)), TypeError, r"x has dtype float32, but params\[0\] has dtype"),
        ("gaussian", X, np.ones((2, 37, 3)), ValueError, r"batch shapes must broadcast, got .*y: \(2,\)"),
        ("gaussian", None, np.ones((37, 3)), TypeError, "x must be an array or a Dask array, got NoneType"),
        ("categorical", X, np.ones((37, 3), int), ValueError, r"y must hold class numbers of shape \(\*batch, 37\)"),
        ("gaussian", da.ones((37, 3)), da.ones((37, 3)), ValueError, r"x must have shape .*, got \(37, 3\)"),
        ("gaussian", da.ones((37, 4), dtype="f"), da.ones((37, 3)), TypeError, "dtype of .*, float64, got float32"),
    ],
)
def test_mistakes_are_not_sent(
    client: distributed.Client,
    monkeypatch: pytest.MonkeyPatch,
    likelihood: str,
    x: Any,
    y: Any,
    error: type[Exception],
    words: str,
) -> None:
    net = nn.MLP((4, 5, 3), likelihood=likelihood)
    parallel = opts.DataParallel(opts.sgd(), client)
    params = tuple(np.stack([w] * 3) for w in net.init(0, like=X))
    state = parallel.init(net, params)
    for name in ("keep", "submit"):
        monkeypatch.setattr(f"natgrad_array.optimizers.parallel.{name}", None)
    with pytest.raises(error, match=words):
        parallel.step(net, params, state, x, y)


def test_a_cluster_that_is_gone() -> None:
    net = nn.MLP((4, 5, 3))
    params = net.init(0, like=X)
    with distributed.Client(processes=False, n_workers=1, dashboard_address=":0") as client:
        parallel = ng.optimizers.DataParallel(opts.sgd(), client)
        state = parallel.init(net, params)
    with pytest.raises(ConnectionError, match="client must be connected to a running cluster"):
        parallel.step(net, params, state, X, TARGETS["gaussian"])
