"""Optimizers: estimates, inverses, step rules and damping, against dense matrices and other libraries."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import jax
import numpy as np
import pytest
from backends import JAX, JAX_JIT, Backend
from network_reference import NETS, case, deltas_of, on, relative, rows_of, stack, truth

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array import optimizers as opts
from natgrad_array.kronecker import Kronecker
from natgrad_array.networks import MLP, ConvNet
from natgrad_array.optimizers.estimates import weighted
from natgrad_array.optimizers.inverses import Context
from natgrad_array.optimizers.presets import PRESETS
from natgrad_array.optimizers.steps import curvatures, dot

MLPS = ["MLP tanh gaussian", "MLP tanh bernoulli", "MLP gelu categorical", "MLP noise", "one unit"]


def observed(name: str, estimate: opts.Estimate, rng: Any = 0) -> tuple[Any, Any]:
    net, params, x, y = case(name)
    seen = estimate.observe(net, params, net.forward(params, x), y, rng)
    return seen, estimate.factors(seen)


def context(net: Any, params: Any, x: Any, y: Any, damping: Any = 0.0) -> Any:
    trace = net.forward(params, x)
    gradient = net.gradient(params, x, y)
    loss = net.loss(params, x, y)
    return Context(net, params, x, trace, gradient, damping + 0.0 * loss, np.asarray(0.0))


def step_of(
    optimizer: opts.Optimizer, net: Any, params: Any, x: Any, y: Any, rng: Any = None
) -> tuple[Any, opts.OptimizerState, opts.StepInfo]:
    return optimizer.step(net, params, optimizer.init(net, params), x, y, rng)


# ------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("name", MLPS)
def test_moments_of_every_output_direction(name: str) -> None:
    """A = ⟨ā āᵀ⟩, and G = ⟨Dᵀ M D⟩ with D and M by JAX."""
    _, factors = observed(name, opts.ExactDirections())
    for block, rows, delta in zip(factors, rows_of(name), deltas_of(name), strict=True):
        assert relative(block.forward, rows.T @ rows / len(rows)) <= 1e-13
        wanted = np.einsum("nai,nab,nbj->ij", delta, truth(name).metric, delta) / len(rows)
        assert relative(block.backward, wanted) <= 1e-12


@pytest.mark.parametrize("name", MLPS)
def test_moments_of_the_data(name: str) -> None:
    net, params, x, y = case(name)
    residual = net.likelihood.residual(net.output(params, x), y)
    _, factors = observed(name, opts.Empirical())
    for block, delta in zip(factors, deltas_of(name), strict=True):
        errors = np.einsum("na,nai->ni", residual, delta)
        assert relative(block.backward, errors.T @ errors / len(x)) <= 1e-12


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP tanh bernoulli", "MLP gelu categorical", "MLP noise"])
def test_sampled_moments_lie_within_their_standard_error(name: str) -> None:
    """Means of single draws spread around the exact moments, less so with more of them."""
    draws = 400
    wanted = observed(name, opts.ExactDirections())[1]
    rng = np.random.default_rng(3)
    found = [observed(name, opts.ModelSampled(), rng)[1] for _ in range(draws)]
    for i, block in enumerate(wanted):
        each = np.stack([factors[i].backward for factors in found])
        error = each.std(axis=0, ddof=1) / draws**0.5
        assert np.all(np.abs(each.mean(axis=0) - block.backward) <= 4.5 * error + 1e-12)
    many = [observed(name, opts.ModelSampled(n_samples=16), rng)[1][0].backward for _ in range(60)]
    one = np.stack([factors[0].backward for factors in found])
    ratio = np.linalg.norm(np.std(many, axis=0)) / np.linalg.norm(one.std(axis=0))
    assert 0.15 < ratio < 0.4


def test_inputs_alone_have_no_moment_of_errors() -> None:
    seen, factors = observed("MLP noise", opts.InputsOnly())
    assert seen.deltas is None
    assert all(block.backward is None for block in factors)


@pytest.mark.parametrize("name", ["MLP noise", "ConvNet small", "MLP gelu categorical"])
@pytest.mark.parametrize("estimate", [opts.ExactDirections, opts.Empirical, opts.InputsOnly])
def test_a_share_is_the_first_part_of_the_batch(name: str, estimate: Any) -> None:
    net, params, x, y = case(name)
    part = estimate(share=0.5)
    found = part.factors(part.observe(net, params, net.forward(params, x), y, None))
    few = net.forward(params, x[:3])
    wanted = part.factors(estimate().observe(net, params, few, y[:3], None))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a.forward, b.forward) <= 1e-14
        assert a.backward is b.backward is None or relative(a.backward, b.backward) <= 1e-14


@pytest.mark.parametrize("convolution", ["expand", "reduce"])
def test_moments_of_a_convolution(convolution: str) -> None:
    """Ω and Γ of Grosse and Martens, with patches cut out by hand; or means of patches and sums of errors."""
    net, params, x, y = case("ConvNet small")
    estimate = opts.Empirical(convolution=convolution)
    block = estimate.factors(estimate.observe(net, params, net.forward(params, x), y, None))[0]
    layer = net.layers[0]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    height, width, _ = layer.output_shape
    patches = np.stack(
        [padded[:, i : i + 3, j : j + 3].reshape(len(x), -1) for i in range(height) for j in range(width)], axis=1
    )
    patches = np.concatenate([patches, np.ones((*patches.shape[:2], 1))], axis=-1)
    errors = net.likelihood.residual(net.output(params, x), y)
    delta = net.backward(params, net.forward(params, x), errors)[0]
    if convolution == "reduce":
        patches, delta = patches.mean(axis=1, keepdims=True), delta.sum(axis=1, keepdims=True)
    positions = patches.shape[1]
    forward = np.einsum("nti,ntj->ij", patches, patches) / len(x)
    backward = np.einsum("nti,ntj->ij", delta, delta) / (len(x) * positions)
    assert relative(block.forward, forward) <= 1e-13
    assert relative(block.backward, backward) <= 1e-13


def test_factors_of_a_deep_linear_network_make_its_exact_fisher_blocks() -> None:
    net = MLP((4, 5, 3), activation="identity")
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal((30, 4)), net.init(1, like=rng.standard_normal(1))
    estimate = opts.ExactDirections()
    factors = estimate.factors(estimate.observe(net, params, net.forward(params, x), x[:, :3], None))
    task = ng.GaussianTask.from_samples(x, x[:, :3])
    exact = dl.fisher(tuple(w[:, :-1] for w in params), task)
    for i, block in enumerate(factors):
        # Without the row and column of the bias.
        assert relative(np.kron(block.forward[:-1, :-1], block.backward), exact.block(i, i)) <= 1e-12


def test_averages_weigh_the_old_by_one_minus_one_over_k() -> None:
    net, params, x, y = case("MLP noise")
    optimizer = opts.Optimizer(opts.Empirical(average=0.7), opts.FactoredTikhonov(), damping=opts.Damping(1.0))
    state, wanted = optimizer.init(net, params), None
    rng = np.random.default_rng(0)
    for k in range(1, 7):
        batch = rng.standard_normal(x.shape)
        _, state, _ = optimizer.step(net, params, state, batch, y)
        rows = np.concatenate([batch, np.ones((len(x), 1))], axis=-1)
        new, weight = rows.T @ rows / len(x), min(1 - 1 / k, 0.7)
        wanted = new if wanted is None else weight * wanted + (1 - weight) * new
        assert relative(state.moments[0].forward, wanted) <= 1e-13


def test_weighted_keeps_structure_and_what_is_not_there() -> None:
    old, new = ((Kronecker(np.ones(1), None),), np.zeros(2)), ((Kronecker(np.zeros(1), None),), np.ones(2))
    found = weighted(old, new, np.asarray(0.25))
    assert isinstance(found[0][0], Kronecker)
    assert found[0][0] == (np.asarray([0.25]), None)
    np.testing.assert_array_equal(found[1], [0.75, 0.75])


# ------------------------------------------------------------------------------- inverses


def apply_inverse(
    inverse: Any, name: str, estimate: opts.Estimate, damping: float, *, of_samples: bool = False
) -> tuple[Any, Any, Any]:
    """A direction, and the estimate's moments as dense blocks (A, G) by the tested formulas."""
    net, params, x, y = case(name)
    at = context(net, params, x, y, damping)
    seen = estimate.observe(net, params, at.trace, y, 0)
    moments = () if of_samples else inverse.moments(seen, estimate)
    prepared = () if of_samples else inverse.start(params, estimate)
    prepared = inverse.refresh(prepared, moments, seen, estimate, at)
    return inverse.apply(prepared, at), estimate.factors(seen), at.gradient


@pytest.mark.parametrize("name", ["MLP noise", "ConvNet small"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_inverses_against_dense_blocks(name: str, damping: float) -> None:
    def pinv(a: np.ndarray) -> np.ndarray:
        return np.linalg.pinv(a, rcond=1e-11)

    for inverse in (opts.MoorePenrose(), opts.Tikhonov()):
        (found, prepared), factors, gradient = apply_inverse(inverse, name, opts.ExactDirections(), damping)
        for d, (a, g), v in zip(found, factors, gradient, strict=True):
            dense = np.kron(a, g)
            shift = 0.0 if isinstance(inverse, opts.MoorePenrose) else damping
            wanted = pinv(dense + shift * np.eye(len(dense))) @ v.T.reshape(-1)
            assert relative(d.T.reshape(-1), wanted) <= 1e-7
        if isinstance(inverse, opts.MoorePenrose):
            for ranks, (a, g) in zip(inverse.ranks(prepared), factors, strict=True):
                assert [int(r) for r in ranks] == [np.linalg.matrix_rank(m, tol=1e-11 * np.trace(m)) for m in (a, g)]


def root_damped(a: np.ndarray, damping: float) -> np.ndarray:
    """Every eigenvalue λ that is not zero inverted as 1/(λ + √damping)."""
    values, vectors = np.linalg.eigh(a)
    kept = values > len(a) * np.finfo(float).eps * values[-1]
    return (vectors * np.where(kept, 1.0 / (np.where(kept, values, 1.0) + damping**0.5), 0.0)) @ vectors.T


@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("of_samples", [False, True])
def test_root_damping_inverts_eigenvalues_and_drops_what_no_sample_reaches(damping: float, of_samples: bool) -> None:
    """Five samples, inputs of width 4 and 6 with a bias: the second layer's moments are short of rank."""
    (found, _), factors, gradient = apply_inverse(
        opts.RootDamped(), "MLP noise", opts.ModelSampled(), damping, of_samples=of_samples
    )
    for d, (a, g), v in zip(found, factors, gradient, strict=True):
        assert relative(d, root_damped(g, damping) @ v @ root_damped(a, damping)) <= 1e-9


def test_root_damping_of_few_samples_is_each_members_own() -> None:
    """Members with linearly dependent samples, with none that is not zero, with a NaN, and without damping."""
    rng, members = np.random.default_rng(0), 20
    inputs, errors = rng.standard_normal((members, 5, 8)), rng.standard_normal((members, 5, 7))
    inputs[1, 3], errors[2, 4] = inputs[1, 2], errors[2, 0] - errors[2, 1]
    errors[3], inputs[4, 0, 0] = 0.0, np.nan
    damping = np.full(members, 0.3)
    damping[[0, 1, 2]] = [0.0, 0.0, 1e-8]
    gradient = (rng.standard_normal((members, 7, 9)),)
    seen = opts.Statistics.of([inputs], [errors])
    at = Context(None, (), None, None, gradient, damping, np.asarray(0.0))
    inverse = opts.RootDamped()
    (found,), _ = inverse.apply(inverse.refresh((), (), seen, opts.Empirical(), at), at)
    for k in range(members):
        if k == 4:
            assert np.isnan(found[k]).all()
            continue
        rows = np.concatenate([inputs[k], np.ones((5, 1))], axis=-1)
        a, g = (root_damped(part.T @ part / 5, damping[k]) for part in (rows, errors[k]))
        np.testing.assert_allclose(found[k], g @ gradient[0][k] @ a, rtol=0, atol=1e-9 * (1 + np.abs(a).max() ** 2))


def test_second_moments_in_the_eigenbasis_are_those_of_the_samples_gradients() -> None:
    """EKFAC: the mean square of every sample's gradient in the basis, each gradient by JAX's Jacobian."""
    for name in ("MLP noise", "ConvNet small"):
        inverse, estimate = opts.RescaledEigenbasis(), opts.Empirical()
        (found, prepared), factors, gradient = apply_inverse(inverse, name, estimate, 0.1)
        net, params, x, y = case(name)
        residual = net.likelihood.residual(net.output(params, x), y)
        end = 0
        for d, basis, (a, g), v, w in zip(found, prepared, factors, gradient, params, strict=True):
            jacobian = truth(name).jacobian[..., end : end + w.size]
            end += w.size
            each = np.einsum("na,nap->np", residual, jacobian)
            _, u_a = np.linalg.eigh(a)
            _, u_g = np.linalg.eigh(g)
            turned = each @ np.kron(u_a, u_g)
            wanted = np.kron(u_a, u_g) @ ((np.kron(u_a, u_g).T @ v.T.reshape(-1)) / ((turned**2).mean(axis=0) + 0.1))
            # Degenerate directions turn freely: their basis is that of the package.
            own = np.kron(basis.forward, basis.backward)
            spread = ((each @ own) ** 2).mean(axis=0)
            mine = own @ ((own.T @ v.T.reshape(-1)) / (spread + 0.1))
            assert relative(d.T.reshape(-1), mine) <= 1e-10
            if np.linalg.matrix_rank(a) >= len(a) - 1 and np.linalg.matrix_rank(g) >= len(g) - 1:
                assert relative(d.T.reshape(-1), wanted) <= 1e-8


def test_between_refreshes_the_second_moments_follow() -> None:
    net, params, x, y = case("MLP noise")
    inverse = opts.RescaledEigenbasis(average=0.5)
    optimizer = opts.Optimizer(opts.Empirical(), inverse, opts.Fixed(0.0), opts.Damping(1.0), refresh=2)
    state = optimizer.init(net, params)
    _, first, _ = optimizer.step(net, params, state, x, y)
    _, second, _ = optimizer.step(net, params, first, 2 * x, y)
    fresh = opts.Optimizer(opts.Empirical(), inverse, opts.Fixed(0.0), opts.Damping(1.0))
    seen = opts.Empirical().observe(net, params, net.forward(params, 2 * x), y, None)
    for old, new, (rows, delta) in zip(
        first.prepared, second.prepared, zip(seen.rows, seen.deltas, strict=True), strict=True
    ):
        np.testing.assert_array_equal(old.forward, new.forward)
        each = np.einsum("nti,ntj->nij", delta[0] @ old.backward, rows @ old.forward)
        assert relative(new.scale, 0.5 * old.scale + 0.5 * (each**2).mean(axis=0)) <= 1e-12
    assert fresh.step(net, params, state, x, y)[1].count == 1


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP gelu categorical", "ConvNet small"])
def test_the_full_fisher_solves_with_the_dense_matrix(name: str) -> None:
    net, params, x, y = case(name)
    at = context(net, params, x, y, 0.2)
    found, _ = opts.FullFisher().apply((), at)
    dense = truth(name).fisher
    wanted = np.linalg.solve(dense + 0.2 * np.eye(len(dense)), stack(truth(name).gradient))
    assert relative(stack(found), wanted) <= 1e-9


def test_adam_and_momentum_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    net, params, x, y = case("MLP tanh bernoulli")
    for mine, theirs in (
        (opts.adam(learning_rate=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
        (opts.sgd(learning_rate=0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    ):
        tensors = [torch.tensor(w.copy(), requires_grad=True) for w in params]
        reference, here, state = theirs(tensors), params, mine.init(net, params)
        for _ in range(12):
            for tensor, grad in zip(tensors, net.gradient([t.detach().numpy() for t in tensors], x, y), strict=True):
                tensor.grad = torch.tensor(grad)
            reference.step()
            here, state, _ = mine.step(net, here, state, x, y)
        for a, b in zip(here, tensors, strict=True):
            assert relative(a, b.detach().numpy()) <= 1e-12


# ----------------------------------------------------------------------- steps and damping


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP gelu categorical", "ConvNet small"])
def test_products_with_the_fisher_by_moving_outputs(name: str) -> None:
    net, params, x, y = case(name)
    at, dense = context(net, params, x, y), truth(name).fisher
    rng = np.random.default_rng(0)
    a, b = (tuple(rng.standard_normal(w.shape) for w in params) for _ in range(2))
    c = tuple(rng.standard_normal(w.shape) for w in params)
    ways = np.stack([stack(a), stack(b), stack(c)])
    assert relative(np.asarray(curvatures(at, 1.0, [a, b, c])), ways @ dense @ ways.T) <= 1e-10
    assert relative(dot(np, a, b), stack(a) @ stack(b)) <= 1e-13


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP gelu categorical", "ConvNet small"])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_quadratic_model_is_minimised_over_both_directions(name: str, momentum: bool) -> None:
    net, params, x, y = case(name)
    at, dense = context(net, params, x, y, 0.3), truth(name).fisher
    rng = np.random.default_rng(0)
    d, p = (tuple(rng.standard_normal(w.shape) for w in params) for _ in range(2))
    made = opts.QuadraticModel(momentum=momentum).take(d, p, at)
    ways = np.stack([stack(d), stack(p)][: 1 + momentum])
    matrix = ways @ (dense + 0.3 * np.eye(len(dense))) @ ways.T
    best = -np.linalg.solve(matrix, ways @ stack(at.gradient))
    assert relative(stack(made.change), best @ ways) <= 1e-9
    assert relative(made.rate, -best[0]) <= 1e-9
    assert relative(made.curvature, stack(made.change) @ dense @ stack(made.change)) <= 1e-9
    for prediction, shift in (("exact", 0.0), ("damped", 0.3)):
        change = stack(made.change)
        wanted = -stack(at.gradient) @ change - 0.5 * change @ (dense + shift * np.eye(len(dense))) @ change
        for step in (made, made._replace(curvature=None)):
            found = opts.LevenbergMarquardt(0.3, prediction=prediction).predicted(step, d, at)
            assert relative(found, wanted) <= 1e-9


def test_without_a_last_change_the_direction_is_taken_alone() -> None:
    net, params, x, y = case("MLP tanh gaussian")
    at = context(net, params, x, y, 0.3)
    none = tuple(0.0 * w for w in params)
    for previous in (none, at.gradient):
        both = opts.QuadraticModel().take(at.gradient, previous, at)
        alone = opts.QuadraticModel(momentum=False).take(at.gradient, none, at)
        assert relative(stack(both.change), stack(alone.change)) <= 1e-8


def test_a_bounded_step_is_as_long_as_it_may_be() -> None:
    net, params, x, y = case("MLP tanh gaussian")
    at = context(net, params, x, y)
    direction = tuple(3.0 * g for g in at.gradient)
    square = stack(at.gradient) @ stack(direction)
    short = opts.NormBound(0.5, bound=float(square) * 0.01).take(direction, direction, at)
    assert relative(short.rate, 0.1) <= 1e-12
    free = opts.NormBound(0.5, bound=float(square)).take(direction, direction, at)
    assert float(free.rate) == 0.5
    np.testing.assert_allclose(short.rate**2 * square, square * 0.01)


@pytest.mark.parametrize(("depth", "ratio"), [(3, 0.6), (8, 0.53333333333), (16, 0.51612903226)])
def test_ratios_of_a_perfect_step(depth: int, ratio: float) -> None:
    """L/(2L − 1) where layers do not see each other, 1 with the exact Fisher: on a small enough error."""
    net = MLP((6,) * (depth + 1), activation="identity")
    rng = np.random.default_rng(0)
    layers = [np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(depth)]
    params = tuple(np.concatenate([w, np.zeros((6, 1))], axis=-1) for w in layers)
    x = rng.standard_normal((200, 6))
    x -= x.mean(axis=0)
    y = net.output(params, x) @ (np.eye(6) + 1e-5 * rng.standard_normal((6, 6)))
    for prediction, wanted in (("block_diagonal", ratio), ("exact", 1.0)):
        optimizer = opts.Optimizer(
            opts.ExactDirections(),
            opts.MoorePenrose(),
            opts.PerLayer(1.0),
            opts.LevenbergMarquardt(0.0, prediction=prediction),
        )
        _, _, info = step_of(optimizer, net, params, x, y)
        # A full step of rate 1 closes the gap: the loss falls to zero up to second order.
        assert abs(float(info.ratio) - wanted) <= 1e-3
        assert float(info.new_loss) <= 1e-6 * float(info.loss)


def test_damping_follows_the_ratio_of_each_member() -> None:
    at = context(*case("MLP tanh gaussian"))
    at = at._replace(damping=np.full(5, 2.0))
    policy = opts.LevenbergMarquardt(2.0, grow=3.0, shrink=0.5, reject=True)
    loss, predicted = np.full(5, 10.0), np.full(5, 4.0)
    verdict = policy.judge(loss, loss - np.asarray([4.0, 2.0, 0.4, -1.0, np.nan]), predicted, at)
    np.testing.assert_array_equal(verdict.damping, [1.0, 2.0, 6.0, 6.0, 6.0])
    np.testing.assert_allclose(verdict.ratio, [1.0, 0.5, 0.1, -0.25, np.nan])
    np.testing.assert_array_equal(verdict.accepted, [True, True, True, False, False])
    slow = opts.LevenbergMarquardt(2.0, grow=3.0, every=3, minimum=7.0)
    assert (slow.judge(loss, loss, predicted, at).damping == 2.0).all()
    later = at._replace(count=np.asarray(2.0))
    assert (slow.judge(loss, loss, predicted, later).damping == 7.0).all()


def test_a_rejected_step_is_not_made_and_costs_its_neighbours_nothing() -> None:
    net, params, x, y = case("MLP tanh gaussian")
    params = tuple(np.stack([w, w, w]) for w in params)
    rates = np.asarray([1e-3, 1e6, 1e-3])
    optimizer = opts.Optimizer(
        scaling=opts.Fixed(rates), damping=opts.LevenbergMarquardt(np.asarray([1.0, 1.0, 2.0]), reject=True)
    )
    new, state, info = step_of(optimizer, net, params, x, y)
    np.testing.assert_array_equal(info.accepted, [True, False, True])
    for before, after in zip(params, new, strict=True):
        np.testing.assert_array_equal(after[1], before[1])
        assert not np.array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[0], after[2])
    assert all((change[1] == 0.0).all() for change in state.previous)
    assert state.damping[1] > 1.0


def test_between_changes_of_the_damping_a_part_of_the_batch_is_enough() -> None:
    """Where its loss falls; in members where it does not, and in every third step, the whole batch is asked."""
    net, params, x, y = problem()
    policy = opts.LevenbergMarquardt(1.0, every=3, reject=True, share=0.25)
    optimizer = opts.Optimizer(
        scaling=opts.Fixed(np.asarray([1e-3, 1e4, 1e-3, np.nan])), damping=policy, weight_decay=0.01
    )
    state = optimizer.init(net, params)
    for count in range(3):
        moved = tuple(
            w - optimizer.scaling.learning_rate[:, None, None] * (g + 0.01 * w)
            for w, g in zip(params, net.gradient(params, x, y), strict=True)
        )
        before, after, part, later = (
            net.loss(w, x[:k], y[:k]) + 0.005 * sum(np.sum(v**2, axis=(1, 2)) for v in w)
            for w, k in ((params, 20), (moved, 20), (params, 5), (moved, 5))
        )
        params, state, info = optimizer.step(net, params, state, x, y)
        np.testing.assert_array_equal(info.accepted, [True, False, True, False])
        wanted = np.where((later <= part) & (count < 2), before + later - part, after)
        np.testing.assert_allclose(info.new_loss, wanted, rtol=1e-9)
        assert not np.allclose((before + later - part)[[0, 2]], after[[0, 2]], rtol=1e-9)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_searched_gamma_is_the_best_of_three(momentum: bool) -> None:
    """Each candidate's step by dense matrices: its inverse, the system of the quadratic model, the model's value."""
    net, params, x, y = case("MLP tanh gaussian")
    members = tuple(np.stack([w, 0.2 * w, 3.0 * w, np.nan * w]) for w in params)
    decay, rng = 0.01, np.random.default_rng(0)
    previous = tuple(0.02 * rng.standard_normal(w.shape) for w in members)
    at = context(net, members, x, y, 0.3)._replace(count=np.asarray(20.0), previous=previous, decay=decay)
    inverse, estimate = opts.SearchedTikhonov(20, opts.QuadraticModel(momentum=momentum)), opts.ExactDirections()
    seen = estimate.observe(net, members, at.trace, y, None)
    moments, squares = inverse.moments(seen, estimate), np.asarray([1.0, 1e-3, 30.0, 1.0])
    prepared = inverse.refresh((None, squares), moments, seen, estimate, at)
    direction = inverse.apply(prepared, at)[0]
    chosen = []
    for b in range(3):
        fisher = net.fisher(tuple(w[b] for w in members), x).to_dense()
        curved = fisher + (0.3 + decay) * np.eye(len(fisher))
        gradient, last = stack([g[b] for g in at.gradient]), stack([p[b] for p in previous])
        tried = []
        for square in squares[b] * 0.95 ** np.asarray([0.0, 20.0, -20.0]):
            found = []
            for a, g in ((np.broadcast_to(m, (4, *m.shape[-2:]))[b] for m in block) for block in moments):
                pi = np.sqrt(np.trace(a) / len(a) * len(g) / np.trace(g))
                damped = np.kron(a + pi * square**0.5 * np.eye(len(a)), g + square**0.5 / pi * np.eye(len(g)))
                start = sum(map(len, found))
                found.append(np.linalg.solve(damped, gradient[start : start + len(damped)]))
            ways = np.stack([np.concatenate(found), last][: 1 + momentum])
            move = -np.linalg.solve(ways @ curved @ ways.T, ways @ gradient) @ ways
            tried.append((gradient @ move + 0.5 * move @ curved @ move, square, np.concatenate(found)))
        _, square, wanted = min(tried, key=lambda candidate: candidate[0])
        chosen.append(round(np.log(square / squares[b]) / np.log(0.95)))
        assert relative(prepared[1][b], square) <= 1e-12
        assert relative(stack([d[b] for d in direction]), wanted) <= 1e-8
    assert len(set(chosen)) > 1
    assert all(np.isnan(d[3]).all() for d in direction)


def test_gamma_is_its_own_between_searches() -> None:
    """γ² begins at damping and weight decay, and moves by (19/20)^4 or not at all in every fourth step."""
    net, params, x, y = problem()
    optimizer = opts.kfac(damping=0.3, refresh=2, search=4, share=1.0, weight_decay=0.01)
    state, rng, squares = optimizer.init(net, params), np.random.default_rng(0), []
    for _ in range(30):
        params, state, _ = optimizer.step(net, params, state, x, y, rng)
        squares.append(state.prepared[1])
    powers = np.log(np.asarray(squares) / 0.31) / np.log(0.95**4)
    np.testing.assert_allclose(powers, np.round(powers), atol=1e-9)
    assert not powers[:4].any()
    moves = np.diff(np.round(powers), axis=0)
    assert np.abs(moves).max() == 1.0
    assert not moves[[k for k in range(29) if (k + 1) % 4]].any()


@pytest.mark.parametrize("scaling", [opts.QuadraticModel(), opts.Fixed(1.0)])
def test_weight_decay_is_ridge_regression(scaling: Any) -> None:
    """One layer's penalised loss is quadratic: the full Fisher finds its minimum, known in closed form, in one step."""
    net, rng = MLP((4, 3)), np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
    params, decays = net.init(0, (2,), like=x), np.asarray([0.05, 2.0])
    policy = opts.LevenbergMarquardt(0.0, prediction="exact")
    optimizer = opts.Optimizer(opts.ExactDirections(), opts.FullFisher(), scaling, policy, weight_decay=decays)
    new, _, info = step_of(optimizer, net, params, x, y)
    rows = np.concatenate([x, np.ones((30, 1))], axis=-1)
    for b, decay in enumerate(decays):
        ridge = np.linalg.solve(rows.T @ rows / 30 + decay * np.eye(5), rows.T @ y / 30).T
        assert relative(new[0][b], ridge) <= 1e-9
        losses = [0.5 * np.sum((rows @ w.T - y) ** 2) / 30 + 0.5 * decay * np.sum(w**2) for w in (params[0][b], ridge)]
        np.testing.assert_allclose([info.loss[b], info.new_loss[b]], losses, rtol=1e-10)
    np.testing.assert_allclose(info.ratio, 1.0, rtol=1e-8)


@pytest.mark.parametrize("optimizer", [opts.kfac(damping=0.1, share=1.0), opts.sgd(learning_rate=0.2)])
def test_weight_decay_ends_at_the_penalised_minimum(optimizer: opts.Optimizer) -> None:
    net, rng = MLP((2, 3), likelihood="categorical"), np.random.default_rng(0)
    x, y = rng.standard_normal((30, 2)), rng.integers(0, 3, 30)
    optimizer, params = dataclasses.replace(optimizer, weight_decay=0.1), net.init(0, like=x)
    state = optimizer.init(net, params)
    for _ in range(400):
        params, state, info = optimizer.step(net, params, state, x, y, rng)
    slope = net.gradient(params, x, y)[0] + 0.1 * params[0]
    assert np.abs(slope).max() <= 1e-5
    assert relative(info.loss, net.loss(params, x, y) + 0.05 * np.sum(params[0] ** 2)) <= 1e-6


# ------------------------------------------------------------------------------ invariance


@pytest.mark.parametrize("inverse", [opts.MoorePenrose, opts.FactoredTikhonov, opts.Tikhonov, opts.FullFisher])
@pytest.mark.parametrize("where", ["input", "hidden"])
def test_without_damping_outputs_move_alike_in_all_coordinates(inverse: Any, where: str) -> None:
    """An affine change of what a layer takes or gives, undone by the weights: damping alone tells them apart."""
    rng = np.random.default_rng(0)
    net = MLP((3, 3, 3), activation="tanh" if where == "input" else "identity")
    x, y = rng.standard_normal((2, 40, 3))
    params = tuple(w + 0.3 * rng.standard_normal(w.shape) for w in net.init(rng, like=x))
    change = np.eye(4)
    change[:3, :3] += 0.5 * rng.standard_normal((3, 3))
    change[:3, 3] = rng.standard_normal(3)
    back = np.linalg.inv(change)
    if where == "input":
        moved = x @ change[:3, :3].T + change[:3, 3]
        others = (params[0] @ back, params[1])
    else:
        moved = x
        others = (change[:3] @ np.concatenate([params[0], np.eye(4)[3:]]), params[1] @ back)
    assert relative(net.output(others, moved), net.output(params, x)) <= 1e-12

    def velocity(given: Any, x: Any, damping: float) -> np.ndarray:
        at = context(net, given, x, y, damping)
        estimate, chosen = opts.ExactDirections(), inverse()
        seen = estimate.observe(net, given, at.trace, y, None)
        moments = chosen.moments(seen, estimate)
        prepared = chosen.refresh(chosen.start(given, estimate), moments, seen, estimate, at)
        direction, _ = chosen.apply(prepared, at)
        return np.asarray(net.tangent(given, at.trace, direction))

    assert relative(velocity(others, moved, 0.0), velocity(params, x, 0.0)) <= 1e-8
    if inverse is not opts.MoorePenrose:
        assert relative(velocity(others, moved, 0.1), velocity(params, x, 0.1)) > 1e-3


# --------------------------------------------------------------------- ensembles, libraries


def problem(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    net = MLP((3, 5, 2))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 3))
    y = np.stack([x[:, 0] * x[:, 1], np.sin(x[:, 2])], axis=-1)
    return net, net.init(1, (4,), like=x), x, y


NOISE = np.random.default_rng(5).standard_normal((12, 1, 4, 20, 2))


def train(
    optimizer: opts.Optimizer, net: Any, params: Any, x: Any, y: Any, steps: int, noise: Any, wrap: Any = None
) -> tuple[Any, Any]:
    state = optimizer.init(net, params)

    def step(params: Any, state: Any, x: Any, y: Any, drawn: Any) -> Any:
        return optimizer.step(net, params, state, x, y, drawn)

    step = step if wrap is None else wrap(step)
    for k in range(steps):
        params, state, info = step(params, state, x, y, noise[k])
    return params, info


def noise_of(optimizer: opts.Optimizer) -> np.ndarray:
    samples = int(np.ceil(optimizer.estimate.share * 20))
    return NOISE[..., :samples, :]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_works_without_arguments(name: str) -> None:
    net, params, x, y = problem()
    optimizer = PRESETS[name]()
    state, rng, start = optimizer.init(net, params), np.random.default_rng(0), net.loss(params, x, y)
    for _ in range(60):
        params, state, info = optimizer.step(net, params, state, x, y, rng)
    assert np.all(net.loss(params, x, y) < (0.999 if name in ("sgd", "adam") else 0.6) * start)
    assert info.loss.shape == info.damping.shape == info.rate.shape == (4,)
    again = pickle.loads(pickle.dumps(state))
    assert float(again.count) == 60.0


@pytest.mark.parametrize("name", [*PRESETS, "kfac that searches"])
def test_an_ensemble_is_its_members(name: str) -> None:
    """Six steps of a stack against six of each member, and a NaN that stays where it is."""
    net, params, x, y = problem()
    optimizer = PRESETS[name]() if name in PRESETS else opts.kfac(search=5, weight_decay=0.01)
    noise = noise_of(optimizer)
    together, _ = train(optimizer, net, params, x, y, 6, noise)
    broken = tuple(w.copy() for w in params)
    broken[0][1] = np.nan
    beside, _ = train(optimizer, net, broken, x, y, 6, noise)
    for b in range(4):
        alone, _ = train(optimizer, net, tuple(w[b] for w in params), x, y, 6, noise[:, :, b])
        for a, c, d in zip(alone, together, beside, strict=True):
            assert relative(c[b], a) <= 1e-8
            assert b == 1 or relative(d[b], c[b]) <= 1e-8
    assert np.isnan(beside[0][1]).all()


@pytest.mark.parametrize("name", PRESETS)
def test_compiled_steps_are_the_eager_ones(name: str) -> None:
    net, params, x, y = problem()
    # What K-FAC can do besides is compiled with it.
    optimizer = PRESETS[name](**({"search": 5, "weight_decay": 0.01} if name == "kfac" else {}))
    noise = noise_of(optimizer)
    wanted, _ = train(optimizer, net, params, x, y, 8, noise)
    params, x, y = JAX.asarrays(*params), JAX.asarray(x), JAX.asarray(y)

    def body(carry: Any, drawn: Any) -> tuple[Any, Any]:
        new, state, info = optimizer.step(net, *carry, x, y, drawn)
        return (new, state), info.loss

    run = jax.jit(lambda params, noise: jax.lax.scan(body, (params, optimizer.init(net, params)), noise))
    (found, _), losses = run(params, JAX.asarray(noise[:8]))
    assert losses.shape == (8, 4)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_on_every_library(backend: Backend, dtype: str, name: str) -> None:
    if backend.name == "dask" or backend is JAX_JIT or (dtype == "float64" and (backend is JAX or not backend.float64)):
        pytest.skip("no such arrays here; compiled steps have a test of their own")
    net, params, x, y = problem()
    optimizer = PRESETS[name]()
    noise = noise_of(optimizer)
    wanted, told = train(optimizer, net, params, x, y, 3, noise)
    like = [backend.asarray(a.astype(dtype)) for a in (*params, x, y, noise)]
    # Each operation of JAX is compiled for itself where the step is not: that takes minutes.
    wrap = jax.jit if backend is JAX else None
    drawn = [like[4][k, ...] for k in range(3)]
    found, info = train(optimizer, net, tuple(like[:2]), like[2], like[3], 3, drawn, wrap)
    tol = 1e-8 if dtype == "float64" else 2e-2
    for a, b in zip(found, wanted, strict=True):
        backend.check(a, like[0])
        assert relative(backend.to_numpy(a), b) <= tol
    assert relative(backend.to_numpy(info.loss), told.loss) <= tol


# ------------------------------------------------------------------- networks from elsewhere


@pytest.mark.parametrize("name", ["foof", "prong", "ng_sgd", "bounded_kfac", "sgd", "adam"])
def test_updates_of_a_torch_module_are_the_steps_of_the_same_network(name: str) -> None:
    """Activations and errors by torch's own hooks and autodiff."""
    torch = pytest.importorskip("torch")
    net, params, x, y = case("MLP tanh gaussian")
    optimizer = PRESETS[name]()
    wanted, reference, state = params, optimizer.init(net, params), None
    module = torch.nn.Sequential(*(torch.nn.Linear(w.shape[1] - 1, w.shape[0], dtype=torch.float64) for w in params))
    for _ in range(5):
        layers, inputs, outputs, a = list(module), [], [], torch.tensor(x)
        for i, (layer, w) in enumerate(zip(layers, wanted, strict=True)):
            layer.weight.data, layer.bias.data = torch.tensor(w[:, :-1]), torch.tensor(w[:, -1])
            inputs.append(a.detach())
            outputs.append(layer(a))
            a = torch.tanh(outputs[-1]) if i < len(layers) - 1 else outputs[-1]
        errors = torch.autograd.grad(0.5 * ((torch.tensor(y) - a) ** 2).sum(), outputs)
        gradient = [
            d.T @ torch.cat([b, torch.ones(len(b), 1)], -1) / len(x) for d, b in zip(errors, inputs, strict=True)
        ]
        seen = opts.Statistics.of(inputs, errors)
        found, state, info = optimizer.update([torch.tensor(w) for w in wanted], state, gradient, seen)
        wanted, reference, _ = optimizer.step(net, wanted, reference, x, y, 0)
        assert info.loss is None
        for a, b in zip(found, wanted, strict=True):
            assert relative(a.numpy(), b) <= 1e-9


def test_updates_that_cannot_be() -> None:
    a, e, w = [np.ones((4, 2))], [np.ones((4, 3))], [np.ones((3, 3))]
    seen = opts.Statistics.of(a, e)
    with pytest.raises(ValueError, match=r"QuadraticModel.* makes passes through the network; use step"):
        opts.kfac().update(w, None, w, seen)
    with pytest.raises(ValueError, match=r"statistics must have errors for the inverse LowRankOnline"):
        opts.ng_sgd().update(w, None, w, opts.Statistics.of(a))
    with pytest.raises(TypeError, match="statistics must be a Statistics, got NoneType None"):
        opts.foof().update(w, None, w, None)
    with pytest.raises(ValueError, match=r"got 1, 2 and 1"):
        opts.foof().update(w, None, w + w, seen)
    with pytest.raises(ValueError, match=r"statistics.rows\[0\] must have shape"):
        opts.foof().update([np.ones((3, 5))], None, [np.ones((3, 5))], seen)
    with pytest.raises(ValueError, match=r"gradient\[0\] must have shape"):
        opts.foof().update(w, None, [np.ones((2, 3))], seen)
    with pytest.raises(ValueError, match=r"statistics.deltas\[0\] must have shape"):
        opts.foof().update([np.ones((2, 3))], None, [np.ones((2, 3))], seen)
    with pytest.raises(ValueError, match=r"errors must have one array for each of 1 layers, got 2"):
        opts.Statistics.of(a, e + e)
    with pytest.raises(ValueError, match=r"errors\[0\] must have a row for each of the samples"):
        opts.Statistics.of(a, [np.ones((5, 3))])
    with pytest.raises(TypeError, match="activations must be a tuple or list"):
        opts.Statistics.of(np.ones((4, 2)))


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_bad_members_hurt_nobody(name: str, samples: int) -> None:
    """A dead layer, saturated outputs, inputs of zero, few samples, no damping; a NaN is its member's own."""
    net, rng = MLP((3, 6, 5, 3), likelihood="categorical"), np.random.default_rng(0)
    x, y = rng.standard_normal((5, samples, 3)), rng.integers(0, 3, (5, samples))
    params, noise = net.init(0, (5,), like=x), rng.standard_normal((3, 1, 5, samples, 3, 2))
    params[1][1] = 0.0
    params[2][2] *= 1e3
    x[3] = 0.0
    x[4, 0, 0] = np.nan
    undamped = {} if name in ("sgd", "adam", "ng_sgd") else {"damping": 0.0}
    for optimizer in (PRESETS[name](), PRESETS[name](**undamped)):
        drawn = noise[..., : int(np.ceil(optimizer.estimate.share * samples)), :, :]
        together, info = train(optimizer, net, params, x, y, 3, drawn)
        alone, _ = train(optimizer, net, tuple(w[0] for w in params), x[0], y[0], 3, drawn[:, :, 0])
        assert np.isnan(info.loss).tolist() == [False] * 4 + [True]
        for w, single in zip(together, alone, strict=True):
            assert relative(w[0], single) <= 1e-8
            assert np.isfinite(w[:4]).all()
        # A step to NaN is made, or taken back where steps that do harm are.
        rejects = getattr(optimizer.damping, "reject", False)
        assert all(np.isnan(w[4]).any() != rejects for w in together)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: opts.ModelSampled(average=1.0), ValueError, "average must be at least 0 and below 1, got 1.0"),
        (lambda: opts.ModelSampled(share=0.0), ValueError, "share must be above 0 and at most 1, got 0.0"),
        (lambda: opts.ModelSampled(n_samples=0), ValueError, "n_samples must be an integer of at least 1, got 0"),
        (lambda: opts.Empirical(convolution="sum"), ValueError, "convolution must be one of 'expand', 'reduce'"),
        (lambda: opts.Fixed(momentum=1.0), ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        (lambda: opts.NormBound(bound=0.0), ValueError, "bound must be above 0, got 0.0"),
        (lambda: opts.QuadraticModel(share=2.0), ValueError, "share must be above 0 and at most 1, got 2.0"),
        (lambda: opts.LevenbergMarquardt(1.0, prediction="hope"), ValueError, "prediction must be one of"),
        (lambda: opts.LevenbergMarquardt(1.0, shrink=2.0), ValueError, "grow must be at least 1 and shrink in"),
        (lambda: opts.LevenbergMarquardt(1.0, share=0.0), ValueError, "share must be above 0 and at most 1, got 0.0"),
        (lambda: opts.LevenbergMarquardt(1.0, minimum=-1.0), ValueError, "minimum must be at least 0, got -1.0"),
        (lambda: opts.LevenbergMarquardt(1.0, upper="1"), TypeError, "upper must be a number, finite, got str '1'"),
        (lambda: opts.natural_gradient(damping=-1.0), ValueError, "damping must be at least 0, got -1.0"),
        (lambda: opts.natural_gradient(learning_rate="0.1"), TypeError, "learning_rate must be a number or an array"),
        (lambda: opts.sgd(learning_rate=-0.1), ValueError, "learning_rate must be at least 0, got -0.1"),
        (lambda: opts.heskes(learning_rate=float("nan")), ValueError, "learning_rate must be at least 0, got nan"),
        (lambda: opts.bounded_kfac(learning_rate=[0.1]), TypeError, "learning_rate must be .* got a list of length 1"),
        (lambda: opts.sgd(momentum="0.9"), TypeError, "momentum must be a number, at least 0 and below 1, got str"),
        (lambda: opts.foof(damping=None), TypeError, "damping must be a number or an array .* got NoneType None"),
        (lambda: opts.kfac(momentum=0.9), TypeError, "momentum must be True or False, got float 0.9"),
        (lambda: opts.kfac(weight_decay=-1e-5), ValueError, "weight_decay must be at least 0, got -1e-05"),
        (lambda: opts.kfac(average="0.9"), TypeError, "average must be a number, at least 0 and below 1, got str"),
        (lambda: opts.LowRankOnline(alpha=0.0), ValueError, "alpha must be above 0, got 0.0"),
        (lambda: opts.LevenbergMarquardt(1.0, every=0), ValueError, "every must be an integer of at least 1, got 0"),
        (lambda: opts.Optimizer(refresh=0), ValueError, "refresh must be an integer of at least 1, got 0"),
        (lambda: opts.Optimizer(estimate="model"), TypeError, "estimate must be of the kind Estimate, got str 'model'"),
        (
            lambda: opts.Optimizer(opts.InputsOnly(), opts.RescaledEigenbasis()),
            ValueError,
            "estimate must have errors",
        ),
        (lambda: opts.RescaledEigenbasis(average=-0.1), ValueError, "average must be at least 0 and below 1"),
        (lambda: opts.SearchedTikhonov(every=0), ValueError, "every must be an integer of at least 1, got 0"),
        (lambda: opts.SearchedTikhonov(scaling=opts.Fixed()), TypeError, "scaling must be a QuadraticModel, got Fixed"),
        (lambda: opts.kfac(search=12), ValueError, r"search must be 0 or a multiple of refresh \(5\), got 12"),
        (lambda: opts.kfac(search=-5), ValueError, r"search must be 0 or a multiple of refresh \(5\), got -5"),
        (lambda: opts.Adam(beta1=1.0), ValueError, "beta1 must be at least 0 and below 1, got 1.0"),
        (lambda: opts.MoorePenrose(rtol=-1.0), ValueError, "rtol must be at least 0, got -1.0"),
        (lambda: opts.Adam(beta2="0.9"), TypeError, "beta2 must be a number, at least 0 and below 1, got str '0.9'"),
        (lambda: opts.Adam(eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_choices_that_cannot_be(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_steps_that_cannot_be() -> None:
    net, params, x, y = problem()
    optimizer = opts.natural_gradient()
    state = optimizer.init(net, params)
    with pytest.raises(TypeError, match="rng must be a source of randomness for an estimate that samples the model"):
        optimizer.step(net, params, state, x, y)
    with pytest.raises(TypeError, match="state must be what init or step returned, got NoneType None"):
        optimizer.step(net, params, None, x, y, 0)
    with pytest.raises(TypeError, match="net must be a Network, got str 'net'"):
        optimizer.init("net", params)
    with pytest.raises(ValueError, match=r"params must have one array for each of 2 layers, got 1"):
        optimizer.init(net, params[:1])
    with pytest.raises(ValueError, match=r"damping must have a shape that broadcasts to the batch shape \(4,\)"):
        opts.natural_gradient(damping=np.ones(3)).init(net, params)
    with pytest.raises(ValueError, match=r"weight_decay must have a shape that broadcasts to the batch shape \(4,\)"):
        step_of(opts.kfac(weight_decay=np.ones(3)), net, params, x, y, 0)
    with pytest.raises(ValueError, match=r"y must have shape"):
        optimizer.step(net, params, state, x, y[:, :1], 0)
    with pytest.raises(ValueError, match=r"x must hold at least one sample, got shape \(0, 3\)"):
        optimizer.step(net, params, state, x[:0], y[:0], 0)
    classes = MLP((3, 5, 2), likelihood="categorical")
    with pytest.raises(ValueError, match="y must hold classes from 0 to 1"):
        optimizer.step(classes, params, state, x, np.full(20, 2), 0)


def test_convolutions_train() -> None:
    net = ConvNet((6, 6, 1), (4,), (3,), activation="relu", likelihood="categorical")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 6, 6, 1))
    y = (x.mean(axis=(1, 2, 3)) > 0).astype(int) + (x[:, :3].mean(axis=(1, 2, 3)) > 0)
    for convolution in ("expand", "reduce"):
        params = net.init(0, (2,), like=x)
        start = net.loss(params, x, y)
        optimizer = opts.kfac(estimate=opts.ModelSampled(0.95, convolution=convolution))
        state, rng = optimizer.init(net, params), np.random.default_rng(1)
        for _ in range(40):
            params, state, _ = optimizer.step(net, params, state, x, y, rng)
        assert np.all(net.loss(params, x, y) < 0.3 * start)


def test_networks_are_those_of_the_reference() -> None:
    assert set(MLPS) <= set(NETS)
    net, params, x, y = on(JAX, case("MLP noise"))
    assert relative(net.loss(params, x, y), truth("MLP noise").loss) <= 1e-12
