"""Estimates, inverses and preconditioners beside the exact Fisher information: against dense matrices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from backends import JAX, JAX_JIT, Backend, compiled_if_jax
from network_reference import case, deltas_of, ends, on, relative, rows_of, stack, tangent_of, truth

import natgrad_array as ng
from natgrad_array import optimizers as opts
from natgrad_array.optimizers.presets import PRESETS

THREE = "MLP tanh gaussian"
BY_BLOCKS = {
    "kfac": opts.FactoredTikhonov(),
    "joint": opts.Tikhonov(),
    "root": opts.RootDamped(),
    "ekfac": opts.RescaledEigenbasis(),
    "tridiagonal": opts.BlockTridiagonal(),
    "low rank": opts.LowRankOnline(2, 2),
}


def exact_of(name: str) -> ng.NetworkFisher:
    net, params, x, _ = case(name)
    return net.fisher(params, x)


def made(inverse: Any, name: str = THREE, damping: float = 0.1, estimate: Any = None) -> opts.Preconditioner:
    net, params, x, y = case(name)
    optimizer = opts.Optimizer(estimate or opts.ExactDirections(), inverse, damping=opts.Damping(damping))
    return optimizer.preconditioner(net, params, optimizer.init(net, params), x, y, 0)


def dense_map(apply: Any, params: Any) -> np.ndarray:
    """The matrix of a linear map of tangents, from all unit tangents."""
    columns, start = [], ends(params)
    for k in range(start[-1]):
        unit = np.zeros(start[-1])
        unit[k] = 1.0
        parts = [unit[a:b].reshape(w.shape[::-1]).T for w, a, b in zip(params, start, start[1:], strict=False)]
        columns.append(stack(apply(tuple(parts))))
    return np.stack(columns, axis=-1)


def dense_blocks(preconditioner: opts.Preconditioner, params: Any) -> np.ndarray:
    start = ends(params)
    whole, depth = np.zeros((start[-1], start[-1])), len(params)
    for i, j in itertools.product(range(depth), repeat=2):
        block = preconditioner.block(i, j)
        if block is not None:
            whole[start[i] : start[i + 1], start[j] : start[j + 1]] = block
    return whole


def gain(f: np.ndarray, gradient: np.ndarray, step: np.ndarray, exact: np.ndarray) -> float:
    """Two minima of a parabola, each along its own line."""

    def lowest(way: np.ndarray) -> float:
        rate = -(gradient @ way) / (way @ f @ way)
        return float(rate * gradient @ way + 0.5 * rate**2 * way @ f @ way)

    return lowest(step) / lowest(exact)


# ------------------------------------------------------------------------------ estimates


def test_an_estimate_of_the_same_kind() -> None:
    given = case("MLP gelu categorical")
    exact, gradient = exact_of("MLP gelu categorical"), tangent_of(given.params)
    estimate = ng.sampled_fisher(given.net, given.params, given.x, 0, n_samples=20)
    report = exact.compare(estimate, gradient, inverse="block_diagonal", damping=0.1)
    dense, other, start = truth("MLP gelu categorical").fisher, estimate.to_dense(), ends(given.params)
    blocks = [(slice(*start[i : i + 2]), slice(*start[j : j + 2])) for i in range(3) for j in range(3)]
    errors = [np.linalg.norm(other[b] - dense[b]) / np.linalg.norm(dense[b]) for b in blocks]
    assert relative(report.block_errors.reshape(-1), errors) <= 1e-9
    diagonal = sum(np.linalg.norm(dense[b]) ** 2 for b in blocks[::4])
    share = (1.0 - diagonal / np.linalg.norm(dense) ** 2) ** 0.5
    assert abs(report.cross_layer - share) <= 1e-12
    wanted = stack(exact.precondition(gradient, inverse="moore_penrose"))
    step = stack(estimate.precondition(gradient, inverse="block_diagonal", damping=0.1))
    assert abs(report.length - np.linalg.norm(step) / np.linalg.norm(wanted)) <= 1e-12 * report.length
    assert abs(report.cosine - step @ wanted / np.linalg.norm(step) / np.linalg.norm(wanted)) <= 1e-12
    np.testing.assert_array_equal(report.spectrum, exact.spectrum())
    np.testing.assert_array_equal(report.estimate_spectrum, estimate.spectrum())
    assert abs(report.gain - gain(dense, stack(gradient), step, wanted)) <= 1e-9
    assert report.left_out == 0.0
    text = str(report)
    assert text.splitlines()[0] == "1 network; relative error of the blocks between layers"
    assert f"{float(report.cosine):.2g}" in text
    assert f"{errors[1]:.2g}" in text
    itself = exact.compare(exact, gradient, inverse="moore_penrose")
    assert not itself.block_errors.any()
    assert abs(itself.cosine - 1.0) <= 1e-12
    assert itself.length == 1.0
    assert abs(itself.gain - 1.0) <= 1e-12


def test_stacks_dead_layers_and_bad_members() -> None:
    net, _, x, y = case("MLP tanh gaussian")
    params = net.init(0, (4,), like=x)
    params[2][1] = 0.0
    params[0][2, 0, 0] = np.nan
    gradient = tangent_of(params)
    exact, empirical = net.fisher(params, x), ng.empirical_fisher(net, params, x, y)
    report = exact.compare(empirical, gradient, damping=0.1)
    assert report.block_errors.shape == (4, 3, 3)
    assert np.isnan(report.cosine).tolist() == [False, False, True, False]
    # No block of the first layers in either: nothing to be wrong about.
    assert not report.block_errors[1, :2, :2].any()
    assert report.block_errors[1, 2, 2] > 0.0
    for b in (0, 1, 3):
        own = tuple(w[b] for w in params)
        alone = net.fisher(own, x).compare(
            ng.empirical_fisher(net, own, x, y), tuple(g[b] for g in gradient), damping=0.1
        )
        for whole, one in zip(report, alone, strict=True):
            np.testing.assert_allclose(whole[b], one, rtol=1e-6, atol=1e-12)
    assert str(report).startswith("median of 4 networks")
    found = JAX_JIT.call(
        lambda p, x, g: net.fisher(p, x).compare(net.fisher(p, x), g, damping=0.1),
        JAX.asarrays(*params),
        JAX.asarray(x),
        JAX.asarrays(*gradient),
    )
    assert isinstance(found, ng.FisherComparison)
    np.testing.assert_allclose(
        found.length, exact.compare(exact, gradient, damping=0.1).length, rtol=1e-6, equal_nan=True
    )


def test_one_layer_and_a_gradient_of_zero() -> None:
    net, params, x, _ = case("one layer")
    fisher = net.fisher(params, x)
    report = fisher.compare(fisher, (0.0 * params[0],))
    assert float(report.cross_layer) == float(report.left_out) == 0.0
    assert np.isnan(report.cosine)
    assert np.isnan(report.length)
    assert np.isnan(report.gain)
    assert "-" in str(report)


# ------------------------------------------------------------------------- preconditioners


@pytest.mark.parametrize("kind", ["kfac", "joint", "root"])
def test_blocks_are_products_of_the_two_moments(kind: str) -> None:
    preconditioner, params = made(BY_BLOCKS[kind]), case(THREE).params
    for i, (rows, delta) in enumerate(zip(rows_of(THREE), deltas_of(THREE), strict=True)):
        forward = rows.T @ rows / len(rows)
        backward = np.einsum("nai,naj->ij", delta, delta) / len(rows)
        assert relative(preconditioner.block(i, i), np.kron(forward, backward)) <= 1e-12
    assert preconditioner.block(0, 1) is preconditioner.block(2, 0) is None
    assert preconditioner.has_blocks
    # Without a moment of errors it is the identity.
    alone = made(BY_BLOCKS[kind], estimate=opts.InputsOnly())
    for i, (rows, w) in enumerate(zip(rows_of(THREE), params, strict=True)):
        assert relative(alone.block(i, i), np.kron(rows.T @ rows / len(rows), np.eye(len(w)))) <= 1e-12


@pytest.mark.parametrize("kind", ["joint", "ekfac"])
def test_blocks_are_what_the_map_inverts_less_its_damping(kind: str) -> None:
    preconditioner, params = made(BY_BLOCKS[kind]), case(THREE).params
    inverted = np.linalg.inv(dense_map(preconditioner, params))
    assert relative(dense_blocks(preconditioner, params), inverted - 0.1 * np.eye(len(inverted))) <= 1e-9


def test_blocks_of_the_tridiagonal_inverse_are_those_of_its_inverse() -> None:
    """Off the diagonal, where no damping is added; layers that are no neighbours included."""
    preconditioner, params = made(BY_BLOCKS["tridiagonal"]), case(THREE).params
    start, whole = ends(params), dense_blocks(preconditioner, params)
    inverted = np.linalg.inv(dense_map(preconditioner, params))
    for i, j in itertools.product(range(3), repeat=2):
        here = slice(*start[i : i + 2]), slice(*start[j : j + 2])
        if i != j:
            assert np.linalg.norm(whole[here]) > 0.0
            assert np.linalg.norm(whole[here] - inverted[here]) <= 1e-9 * np.linalg.norm(whole)
        else:
            rows, delta = rows_of(THREE)[i], deltas_of(THREE)[i]
            backward = np.einsum("nai,naj->ij", delta, delta) / len(rows)
            assert relative(whole[here], np.kron(rows.T @ rows / len(rows), backward)) <= 1e-12


def test_blocks_of_low_rank_keep_the_largest_eigenvalues() -> None:
    """One step of the power method from the moments' own eigenvectors, weight by weight."""
    preconditioner = made(BY_BLOCKS["low rank"])

    def approximated(a: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(a)
        rest = max(values[:-2].mean(), 5e-4 * values[-1])
        for _ in range(2):
            kept = 0.1 * values[-2:] + 0.9 * np.maximum(values[-2:], rest) if _ else values[-2:]
            total = np.trace(a) if not _ else 0.1 * np.trace(a) + 0.9 * (np.sum(kept - rest) + rest * len(a))
            rest = max((total - kept.sum()) / (len(a) - 2), 5e-4 * kept.max())
        return (vectors[:, -2:] * np.maximum(kept - rest, 0.0)) @ vectors[:, -2:].T + rest * np.eye(len(a))

    for i, (rows, delta) in enumerate(zip(rows_of(THREE), deltas_of(THREE), strict=True)):
        backward = np.einsum("nai,naj->ij", delta, delta) / len(rows)
        wanted = np.kron(approximated(rows.T @ rows / len(rows)), approximated(backward))
        assert relative(preconditioner.block(i, i), wanted) <= 1e-9


@pytest.mark.parametrize("kind", BY_BLOCKS)
def test_a_report_on_a_preconditioner(kind: str) -> None:
    preconditioner, params = made(BY_BLOCKS[kind]), case(THREE).params
    dense, gradient, start = truth(THREE).fisher, tangent_of(params), ends(params)
    report = exact_of(THREE).compare(preconditioner, gradient)
    other = dense_blocks(preconditioner, params)
    left_out = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        here = slice(*start[i : i + 2]), slice(*start[j : j + 2])
        size = np.linalg.norm(dense[here])
        assert abs(report.block_errors[i, j] - np.linalg.norm(other[here] - dense[here]) / size) <= 1e-10
        left_out += 0.0 if other[here].any() else size**2
    assert abs(report.left_out - left_out**0.5 / np.linalg.norm(dense)) <= 1e-12
    assert report.left_out == (0.0 if kind == "tridiagonal" else report.cross_layer)
    values = np.linalg.eigvalsh((other + other.T) / 2)
    assert np.max(np.abs(report.estimate_spectrum - values)) <= 1e-12 * np.max(values)
    step = dense_map(preconditioner, params) @ stack(gradient)
    wanted = np.linalg.pinv(dense, rcond=1e-10, hermitian=True) @ stack(gradient)
    assert abs(report.cosine - step @ wanted / np.linalg.norm(step) / np.linalg.norm(wanted)) <= 1e-8
    assert abs(report.length - np.linalg.norm(step) / np.linalg.norm(wanted)) <= 1e-8 * report.length
    assert abs(report.gain - gain(dense, stack(gradient), step, wanted)) <= 1e-8
    assert f"{float(report.left_out):.2g}" in str(report)


def test_the_gain_of_the_loss_gradient_is_a_share() -> None:
    """Along F⁺∇ the model falls by ½ ∇ᵀF⁺∇, and along nothing by more."""
    net, params, x, y = case(THREE)
    f, gradient = exact_of(THREE), net.gradient(params, x, y)
    best = 0.5 * stack(gradient) @ np.linalg.pinv(truth(THREE).fisher, rcond=1e-10, hermitian=True) @ stack(gradient)
    for apply in (made(BY_BLOCKS["kfac"]), lambda g: g, lambda g: tuple(-2.0 * d for d in g)):
        step = stack(apply(gradient))
        found = 0.5 * (stack(gradient) @ step) ** 2 / (step @ truth(THREE).fisher @ step)
        assert 0.0 < f.compare(apply, gradient).gain <= 1.0
        assert abs(f.compare(apply, gradient).gain - found / best) <= 1e-8


def test_any_callable_is_compared_by_its_step_alone() -> None:
    params, exact = case(THREE).params, exact_of(THREE)
    gradient = tangent_of(params)
    report = exact.compare(lambda g: [3.0 * d for d in g], gradient)
    assert report.block_errors is report.left_out is report.estimate_spectrum is None
    wanted = np.linalg.pinv(truth(THREE).fisher, rcond=1e-10, hermitian=True) @ stack(gradient)
    assert relative(report.length, 3.0 * np.linalg.norm(stack(gradient)) / np.linalg.norm(wanted)) <= 1e-8
    assert str(report).startswith("1 network\nshare of F between layers")
    assert "estimate" not in str(report)
    by_itself = exact.compare(made(opts.FullFisher(), damping=0.0), gradient)
    assert by_itself.block_errors is None
    assert abs(by_itself.cosine - 1.0) <= 1e-10


def test_blocks_without_a_gradient() -> None:
    report = exact_of(THREE).compare(made(BY_BLOCKS["kfac"]))
    assert report.cosine is report.length is report.gain is None
    assert report.block_errors.shape == (3, 3)
    assert "cosine" not in str(report)
    assert exact_of(THREE).compare(exact_of(THREE)).left_out == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preconditioner_is_what_the_next_step_applies(name: str) -> None:
    """Also between refreshes, and with averages: a step of fixed rate 1 subtracts it."""
    net, params, x, y = case(THREE)
    preset = PRESETS[name]()
    optimizer = opts.Optimizer(preset.estimate, preset.inverse, opts.Fixed(1.0), opts.Damping(0.3), preset.refresh)
    params = tuple(np.stack([w, 1.1 * w]) for w in params)
    noise = np.random.default_rng(0).standard_normal((4, 1, 2, max(1, int(np.ceil(optimizer.estimate.share * 5))), 3))
    state = optimizer.init(net, params)
    for k in range(4):
        found = optimizer.preconditioner(net, params, state, x, y, noise[k])(net.gradient(params, x, y))
        new, state, _ = optimizer.step(net, params, state, x, y, noise[k])
        for w, v, d in zip(params, new, found, strict=True):
            np.testing.assert_allclose(v, w - d, rtol=1e-9, atol=1e-12)
        params = tuple(w + 0.01 * np.sin(w + k) for w in params)


@pytest.mark.parametrize("kind", ["kfac", "tridiagonal"])
def test_an_ensemble_is_its_members_and_a_bad_one_is_alone(kind: str) -> None:
    net, _, x, y = case(THREE)
    params = net.init(0, (3,), like=x)
    params[1][1, 0, 0] = np.nan
    optimizer = opts.Optimizer(opts.ExactDirections(), BY_BLOCKS[kind], damping=opts.Damping(0.1))
    gradient = tangent_of(params)

    def report(given: Any, gradient: Any) -> ng.FisherComparison:
        state = optimizer.init(net, given)
        return net.fisher(given, x).compare(optimizer.preconditioner(net, given, state, x, y), gradient)

    together = report(params, gradient)
    assert together.block_errors.shape == (3, 3, 3)
    assert np.isnan(together.cosine).tolist() == np.isnan(together.block_errors[:, 2, 2]).tolist() == [0, 1, 0]
    for b in (0, 2):
        alone = report(tuple(w[b] for w in params), tuple(g[b] for g in gradient))
        for whole, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(whole[b], one, rtol=1e-7, atol=1e-10)
    assert str(together).startswith("median of 3 networks; relative error of the blocks")


@pytest.mark.parametrize("kind", ["kfac", "tridiagonal", "low rank"])
def test_preconditioners_on_every_library(backend: Backend, kind: str) -> None:
    compiled_if_jax(backend)
    net, params, x, y = on(backend, case("MLP noise"))
    gradient = backend.asarrays(*tangent_of(case("MLP noise").params))
    optimizer = opts.Optimizer(opts.ExactDirections(), BY_BLOCKS[kind], damping=opts.Damping(0.1))

    def report(params: Any, x: Any, y: Any, gradient: Any) -> Any:
        apply = optimizer.preconditioner(net, params, optimizer.init(net, params), x, y)
        return net.fisher(params, x).compare(apply, gradient)

    found = backend.call(report, params, x, y, gradient)
    wanted = exact_of("MLP noise").compare(made(BY_BLOCKS[kind], "MLP noise"), tangent_of(case("MLP noise").params))
    assert isinstance(found, ng.FisherComparison)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        backend.check(a, x)
        if name not in ("cosine", "length", "gain") or backend.float64:
            assert relative(backend.to_numpy(a), b) <= (1e-7 if backend.float64 else 1e-3), name


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f, g: f.compare(f.to_dense(), g), TypeError, "estimate must be a NetworkFisher or a callable"),
        (
            lambda f, g: f.compare(exact_of("one layer"), g),
            ValueError,
            r"estimate must have parameters of shapes \[\(4, 4\), \(4, 5\), \(3, 5\)\], got \[\(3, 5\)\]",
        ),
        (lambda f, g: f.compare(lambda g: g), ValueError, "gradient must be given for a preconditioner without blocks"),
        (lambda f, g: f.compare(made(opts.Identity())), ValueError, "gradient must be given"),
        (lambda f, g: f.compare(lambda g: g, g, damping=0.1), ValueError, "inverse, damping and rtol say how"),
        (lambda f, g: f.compare(lambda g: g, g, inverse="moore_penrose"), ValueError, "a preconditioner has its own"),
        (lambda f, g: f.compare(lambda g: g, g, rtol=0.1), ValueError, "a preconditioner has its own"),
        (lambda f, g: f.compare(lambda g: g[:1], g), ValueError, "the direction that estimate returns must have one"),
        (lambda f, g: f.compare(lambda g: 3, g), TypeError, "the direction that estimate returns must be a tuple"),
        (lambda f, g: f.compare(lambda g: g, g[:1]), ValueError, "gradient must have one array for each of 3 layers"),
        (
            lambda f, g: f.compare(made(opts.Tikhonov(), "MLP noise"), g),
            ValueError,
            r"estimate must have a block \(0, 0\) of shape \(\*batch, 16, 16\), got \(30, 30\)",
        ),
        (lambda f, g: made(opts.Identity()).block(0, 0), ValueError, "inverts no estimate of the Fisher information"),
        (lambda f, g: made(opts.Tikhonov()).block(0, 3), ValueError, "j must be a layer from 0 to 2, got 3"),
        (lambda f, g: made(opts.Tikhonov())(g[:2]), ValueError, "gradient must have one array for each of 3 layers"),
        (
            lambda f, g: opts.kfac().preconditioner(*case(THREE)[:2], None, *case(THREE)[2:]),
            TypeError,
            "state must be what init or step returned, got NoneType None",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(exact_of(THREE), tangent_of(case(THREE).params))


def test_a_block_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preconditioner = made(opts.Tikhonov())
    monkeypatch.setattr(ng.linalg._arrays.memory, "available_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"block \(1, 1\) of shape .* needs about"):
        preconditioner.block(1, 1)
