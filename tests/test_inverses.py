"""Inverses with structure of their own: block-tridiagonal, low rank, whitened; and pruning."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import Backend, compiled_if_jax
from network_reference import apply, case, losses, on, relative, stack
from test_optimizers import context

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array import optimizers as opts
from natgrad_array.networks import MLP
from natgrad_array.optimizers.low_rank import LowRank
from natgrad_array.optimizers.whitening import _whitener


def covariance(n: int, batch: tuple[int, ...] = (), seed: int = 0) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((*batch, n, 3 * n))
    return root @ np.swapaxes(root, -1, -2) / (3 * n)


# ----------------------------------------------------------------------- block-tridiagonal


def dense_inverse(net: Any, params: Any, x: Any, y: Any, damping: float) -> tuple[np.ndarray, Any, list[int]]:
    """The inverse as a matrix, column by column, and the moments it was made of."""
    at = context(net, params, x, y, damping)
    inverse, estimate = opts.BlockTridiagonal(), opts.ExactDirections()
    seen = estimate.observe(net, params, at.trace, y, None)
    moments = inverse.moments(seen, estimate)
    prepared = inverse.refresh(inverse.start(params, estimate), moments, seen, estimate, at)
    ends = np.cumsum([0, *(w.size for w in params)]).tolist()
    units = np.eye(ends[-1])
    tangents = tuple(
        np.swapaxes(units[:, a:b].reshape(-1, w.shape[1], w.shape[0]), -1, -2)
        for (a, b), w in zip(itertools.pairwise(ends), params, strict=True)
    )
    found, _ = inverse.apply(prepared, at._replace(gradient=tangents))
    columns = [np.swapaxes(d, -1, -2).reshape(ends[-1], -1) for d in found]
    return np.concatenate(columns, axis=-1), moments, ends


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP gelu categorical"])
def test_the_inverse_is_block_tridiagonal_and_its_inverse_has_the_three_diagonals(name: str) -> None:
    """The two properties that one matrix alone has: the most random one with these three block diagonals."""
    net, params, x, y = case(name)
    damping = 0.05
    found, (blocks, crosses), ends = dense_inverse(net, params, x, y, damping)
    assert relative(found, found.T) <= 1e-10
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    assert np.abs(found[parts[0], parts[2]]).max() <= 1e-10 * np.abs(found).max()
    matrix = np.linalg.inv(found)
    for i, block in enumerate(blocks):
        a, g = block.damped(np.asarray(damping))
        assert relative(matrix[parts[i], parts[i]], np.kron(a, g)) <= 1e-8
    for i, (forward, backward) in enumerate(crosses):
        assert relative(matrix[parts[i], parts[i + 1]], np.kron(forward, backward)) <= 1e-8


def test_crosses_of_a_deep_linear_network_are_its_fisher_blocks() -> None:
    net = MLP((3, 4, 4, 2), activation="identity")
    x = np.random.default_rng(0).standard_normal((40, 3))
    params, estimate = net.init(1, like=x), opts.ExactDirections()
    seen = estimate.observe(net, params, net.forward(params, x), x[:, :2], None)
    _, crosses = opts.BlockTridiagonal().moments(seen, estimate)
    exact = dl.fisher(tuple(w[:, :-1] for w in params), ng.GaussianTask.from_samples(x, x[:, :2]))
    for i, (forward, backward) in enumerate(crosses):
        assert relative(np.kron(forward[:-1, :-1], backward), exact.block(i, i + 1)) <= 1e-12


def test_without_damping_what_the_next_layer_determines_is_left_out() -> None:
    """Square deep linear layers determine each other: the conditional covariances are zero."""
    net = MLP((3, 3, 3), activation="identity")
    x = np.random.default_rng(0).standard_normal((40, 3))
    params = net.init(1, like=x)
    found, _, ends = dense_inverse(net, params, x, x, 0.0)
    assert np.isfinite(found).all()
    last = net.fisher(params, x).block(1, 1)
    # The first layer is determined by the last, which keeps its own inverse.
    assert np.abs(found[: ends[1]]).max() <= 1e-6 * np.abs(found).max()
    assert relative(found[ends[1] :, ends[1] :], np.linalg.inv(last)) <= 1e-6


def test_convolutions_are_refused() -> None:
    net, params, x, y = case("ConvNet small")
    optimizer = opts.tridiagonal_kfac()
    with pytest.raises(ValueError, match="net must have dense layers only for the inverse BlockTridiagonal"):
        optimizer.step(net, params, optimizer.init(net, params), x, y, 0)


# ------------------------------------------------------------------------------- low rank


def dense(low: LowRank) -> np.ndarray:
    r, d, rest = (np.asarray(part) for part in low)
    return np.swapaxes(r, -1, -2) @ (d[..., None] * r) + rest[..., None, None] * np.eye(r.shape[-1])


@pytest.mark.parametrize(("n", "rank"), [(6, 2), (6, 5), (1, 0), (2, 1)])
def test_one_update_of_the_low_rank_form(backend: Backend, n: int, rank: int) -> None:
    """Against the power method on dense matrices."""
    if backend.lazy:
        pytest.skip("methods of an object: eager here, under jit in the tests of optimizers")
    s, t = covariance(n, (3,)), covariance(n, (3,), seed=1)
    tol = 1e-10 if backend.float64 else 1e-4
    low = LowRank.of(backend.asarray(s), rank)
    backend.check(low.rows, backend.asarray(s))
    first = LowRank(*(backend.to_numpy(part) for part in low))
    new = LowRank(*(backend.to_numpy(part) for part in low.updated(backend.asarray(t), 0.3)))
    values = np.linalg.eigvalsh(s)
    np.testing.assert_allclose(np.linalg.eigvalsh(dense(first))[:, n - rank :], values[:, n - rank :], rtol=tol)
    np.testing.assert_allclose(np.trace(dense(first), axis1=-2, axis2=-1), values.sum(axis=-1), rtol=tol)
    for b in range(3):
        total = 0.3 * t[b] + 0.7 * dense(first)[b]
        if new.rest[b] > 0.0 and np.all(new.excess[b] > 0.0):
            np.testing.assert_allclose(np.trace(dense(new)[b]), np.trace(total), rtol=tol)
        rows = new.rows[b]
        np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=10 * tol)
        # The span is that of R T, and RFRᵀ the root of (R T)(R T)ᵀ, but for ρ.
        y = first.rows[b] @ total
        if rank:
            # Below ρ there is nothing: D is not negative.
            wanted = np.maximum(np.linalg.svd(y, compute_uv=False), new.rest[b])
            np.testing.assert_allclose(np.sort(new.excess[b] + new.rest[b])[::-1], wanted, rtol=10 * tol)
            _, _, vh = np.linalg.svd(y, full_matrices=False)
            np.testing.assert_allclose(rows.T @ rows, vh.T @ vh, atol=10 * tol)


def test_the_smoothed_inverse_keeps_the_size_of_the_batch() -> None:
    s, t = covariance(6, (3,)), covariance(6, (3,), seed=1)
    low = LowRank.of(s, 2)
    found = low.smoothed_inverse(t, 4.0)
    for b in range(3):
        f = dense(low)[b]
        inverse = np.linalg.inv(f + 4.0 * np.trace(f) / 6 * np.eye(6))
        wanted = inverse * np.sqrt(np.trace(t[b]) / np.trace(inverse @ t[b] @ inverse))
        assert relative(found[b], wanted) <= 1e-12
        assert abs(np.trace(found[b] @ t[b] @ found[b]) / np.trace(t[b]) - 1) <= 1e-12


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rows_are_kept_where_batches_are_smaller_than_the_rank(dtype: str) -> None:
    """Three samples a batch and nothing at all at first: R stays orthonormal, and F finds the moment."""
    rng, n, rank = np.random.default_rng(0), 30, 20
    scale = np.sqrt(np.linspace(9.0, 1.0, n))

    def moment(samples: int) -> np.ndarray:
        x = rng.standard_normal((samples, n)) * scale
        return (x.T @ x / samples).astype(dtype)

    low = LowRank.of(np.stack([moment(3), np.zeros((n, n), dtype)]), rank)
    for k in range(300):
        drawn = moment(3)
        low = low.updated(np.stack([drawn, 0 * drawn if k < 3 else drawn]), 0.02)
        np.testing.assert_allclose(
            low.rows @ low.rows.mT, [np.eye(rank)] * 2, atol=1e-12 if dtype == "float64" else 1e-5
        )
    for _ in range(400):
        low = low.updated(np.diag(scale**2).astype(dtype), 0.1)
    for b in range(2):
        # All but the last few of the largest directions have been found.
        values = np.linalg.eigvalsh(dense(low)[b])[::-1]
        np.testing.assert_allclose(values[:10], scale[:10] ** 2, rtol=0.02)
        np.testing.assert_allclose(low.trace()[b], np.sum(scale**2), rtol=1e-3)


def test_with_all_but_one_direction_it_follows_the_moment_itself() -> None:
    """Of the widest rank, fed with one moment, F tends to that moment; a NaN stays in its member."""
    s = covariance(5, (2,))
    s[1, 0, 0] = np.nan
    low = LowRank.of(covariance(5, (2,), seed=3), 4)
    for _ in range(400):
        low = low.updated(s, 0.3)
    assert relative(dense(low)[0], s[0]) <= 1e-6
    assert np.isnan(dense(low)[1]).all()


def test_each_batch_is_preconditioned_by_those_before_it() -> None:
    net, params, x, y = case("MLP tanh gaussian")
    optimizer = opts.ng_sgd(learning_rate=0.0, input_rank=2, output_rank=2, refresh=1)
    state, rng, sides = optimizer.init(net, params), np.random.default_rng(0), None
    for _ in range(4):
        batch = rng.standard_normal(x.shape)
        rows = np.concatenate([batch, np.ones((len(x), 1))], axis=-1)
        moment = rows.T @ rows / len(x)
        _, state, _ = optimizer.step(net, params, state, batch, y)
        sides = LowRank.of(moment, 2) if sides is None else sides
        wanted = sides.smoothed_inverse(moment, 4.0)
        assert relative(state.prepared[1][0][0], wanted) <= 1e-10
        sides = sides.updated(moment, 0.1)


# ------------------------------------------------------------------------------- whitened


@pytest.mark.parametrize("deficient", [False, True])
def test_whitened_descent_is_that_on_the_parameters_of_the_paper(deficient: bool) -> None:
    """z = V U (h − c) + d, differentiated by JAX in V and d, moved, and written back as W and b."""
    net, params, x, y = case("MLP tanh gaussian")
    if deficient:
        x = np.concatenate([x[:, :1], x[:, :1], 0.0 * x[:, 2:]], axis=-1)
    rate, damping = 0.1, 0.05
    hidden, transforms = jnp.asarray(x), []
    for i, w in enumerate(params):
        centre = np.asarray(hidden).mean(axis=0)
        spread = np.asarray(hidden) - centre
        values, vectors = np.linalg.eigh(spread.T @ spread / len(x))
        transforms.append((vectors @ np.diag((values + damping) ** -0.5) @ vectors.T, centre))
        z = hidden @ w[:, :-1].T + w[:, -1]
        hidden = jnp.tanh(z) if i < len(params) - 1 else z

    def to_weights(vs: Any) -> Any:
        found = []
        for (v, d), (u, c) in zip(vs, transforms, strict=True):
            w = v @ u
            found.append(jnp.concatenate([w, (d - w @ c)[:, None]], axis=-1))
        return found

    start = [
        (w[:, :-1] @ np.linalg.inv(u), w[:, -1] + w[:, :-1] @ c) for w, (u, c) in zip(params, transforms, strict=True)
    ]
    assert relative(stack(to_weights(start)), stack(params)) <= 1e-10  # the function is preserved
    gradient = jax.grad(lambda vs: jnp.mean(losses(net, apply(net, to_weights(vs), x), y)))(start)
    moved = jax.tree_util.tree_map(lambda p, g: p - rate * g, start, gradient)
    optimizer = opts.prong(learning_rate=rate, damping=damping, average=0.0)
    found, _, _ = optimizer.step(net, params, optimizer.init(net, params), x, y)
    assert relative(stack(found), stack(to_weights(moved))) <= 1e-9


def test_whitening_without_damping_leaves_dead_inputs_alone() -> None:
    net, params, x, y = case("MLP tanh gaussian")
    x = np.concatenate([x[:, :2], 0.0 * x[:, 2:]], axis=-1)
    optimizer = opts.prong(damping=0.0, average=0.0)
    found, _, _ = optimizer.step(net, params, optimizer.init(net, params), x, y)
    assert np.isfinite(stack(found)).all()
    np.testing.assert_array_equal(found[0][:, 2], params[0][:, 2])


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_new_whitening_changes_no_parameter(damping: float) -> None:
    """Bit for bit, with inputs of rank one too: a step of length zero is none, whatever is whitened."""
    net, params, x, y = case("MLP tanh gaussian")
    optimizer = opts.prong(learning_rate=0.0, damping=damping, refresh=1)
    state, found = optimizer.init(net, params), params
    for scale in (1.0, 0.0, 100.0):
        found, state, _ = optimizer.step(net, found, state, scale * x[:, :1] + 0.0 * x, y)
    for a, b in zip(found, params, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4])
def test_whitening_tells_rounding_from_variance(mean: float) -> None:
    """Inputs far from zero, one of them constant and one a sum of others, without damping."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((100, 4))
    h[:, 2], h[:, 3] = 0.0, h[:, 0] + h[:, 1]
    wanted = np.linalg.pinv(np.cov(h.T, bias=True), rcond=1e-8)
    h = h + mean * np.asarray([1.1, 0.7, 0.3, 1.3])
    rows = np.concatenate([h, np.ones((100, 1))], axis=-1)
    found = _whitener(np, rows.T @ rows / 100, np.asarray(0.0))
    assert relative(found[:4, :4], wanted) <= 1e-13 * (1 + mean) ** 2
    # The function of the gradient alone: a constant shift of all inputs changes nothing it sees.
    assert relative(rows @ found, rows @ np.linalg.multi_dot([_centring(h).T, _padded(wanted), _centring(h)])) <= 1e-6


def _centring(h: np.ndarray) -> np.ndarray:
    """C = [[1, −c], [0, 1]]."""
    c = np.eye(h.shape[-1] + 1)
    c[:-1, -1] = -h.mean(axis=0)
    return c


def _padded(inner: np.ndarray) -> np.ndarray:
    return np.block([[inner, np.zeros((len(inner), 1))], [np.zeros((1, len(inner))), np.ones((1, 1))]])


# -------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_saliencies_and_corrections_are_those_of_the_dense_inverse(backend: Backend, damping: float) -> None:
    compiled_if_jax(backend)
    if not backend.float64:
        pytest.skip("compared to the last digits")
    net, params, x, y = case("MLP tanh gaussian")
    estimate = opts.ExactDirections()
    factors = estimate.factors(estimate.observe(net, params, net.forward(params, x), y, None))
    wanted, inverses = [], []
    for w, block in zip(params, factors, strict=True):
        a, g = block.damped(np.asarray(damping))
        inverses.append(np.linalg.pinv(np.kron(a, g), rcond=1e-11))
        wanted.append(0.5 * w.T.reshape(-1) ** 2 / np.diag(inverses[-1]))
    moved, given, inputs, _ = on(backend, case("MLP tanh gaussian"))
    found = backend.call(opts.saliencies, moved, given, inputs, damping=damping)
    for a, b in zip(found, wanted, strict=True):
        assert relative(backend.to_numpy(a).T.reshape(-1), b) <= 1e-6
    removed = backend.call(opts.prune, moved, given, inputs, damping=damping)
    i, row, column = (int(part) for part in removed[2:5])
    w = params[i]
    q = column * w.shape[0] + row
    least = min(s.min() for s in wanted)
    assert relative(backend.to_numpy(removed.saliency), np.asarray(least)) <= 1e-6
    change = -w[row, column] * inverses[i][:, q] / inverses[i][q, q]
    for j, (new, old) in enumerate(zip(removed.params, params, strict=True)):
        expected = old + (change.reshape(old.shape[::-1]).T if j == i else 0.0)
        assert relative(backend.to_numpy(new), expected) <= 1e-8
    assert backend.to_numpy(removed.params[i])[row, column] == 0.0


def test_each_member_loses_its_own_parameter() -> None:
    net = MLP((3, 4, 2))
    x = np.random.default_rng(0).standard_normal((30, 3))
    params = net.init(0, (5,), like=x)
    params[0][3, 0, 0] = np.nan
    removed = opts.prune(net, params, x, damping=1e-3)
    for b in (0, 1, 2, 4):
        alone = opts.prune(net, tuple(w[b] for w in params), x, damping=1e-3)
        for a, c in zip(alone.params, removed.params, strict=True):
            assert relative(c[b], a) <= 1e-10
        i, row, column = (int(part[b]) for part in removed[2:5])
        assert params[i][b, row, column] != 0.0
        assert removed.params[i][b, row, column] == 0.0


def cheapest(f: np.ndarray, theta: np.ndarray, q: int) -> float:
    """The least ½ δᵀFδ with δ_q = −θ_q: a Schur complement, no inverse of F."""
    others = np.arange(len(f)) != q
    left = f[q, q] - f[q, others] @ np.linalg.pinv(f[np.ix_(others, others)], rcond=1e-11) @ f[others, q]
    return float(0.5 * theta[q] ** 2 * max(left, 0.0))


@pytest.mark.parametrize("kind", ["full", "dead input", "twice the same input", "categorical"])
def test_saliencies_are_the_least_cost_at_any_rank(kind: str) -> None:
    """Where F is singular too; and what removal costs is what the correction makes it cost."""
    net, params, x, y = case("MLP gelu categorical" if kind == "categorical" else "MLP tanh gaussian")
    x = np.random.default_rng(3).standard_normal((30, x.shape[-1]))
    if kind == "dead input":
        x[:, 2] = 0.0
    if kind == "twice the same input":
        x[:, 2] = x[:, 0]
    estimate = opts.ExactDirections()
    factors = estimate.factors(estimate.observe(net, params, net.forward(params, x), y, None))
    found, removed = opts.saliencies(net, params, x), opts.prune(net, params, x)
    scale = max(float(s.max()) for s in found)
    for w, block, costs in zip(params, factors, found, strict=True):
        f, theta = np.kron(block.forward, block.backward), w.T.reshape(-1)
        wanted = [cheapest(f, theta, q) for q in range(w.size)]
        np.testing.assert_allclose(costs.T.reshape(-1), wanted, rtol=1e-6, atol=1e-9 * scale)
    i = int(removed.layer)
    change = (removed.params[i] - params[i]).T.reshape(-1)
    f = np.kron(factors[i].forward, factors[i].backward)
    assert abs(0.5 * change @ f @ change - removed.saliency) <= 1e-9 * scale
    if kind != "full":
        assert removed.saliency == 0.0
        outputs = [np.asarray(net.likelihood.metric(f := net.output(p, x), f)) for p in (params, removed.params)]
        assert relative(outputs[1], outputs[0]) <= 1e-7


def restricted(net: MLP, params: Any, x: np.ndarray, damping: float, masks: Any) -> list[np.ndarray]:
    """Least costs with what is pruned held at zero, by Schur complements of the rows and columns that are left."""
    estimate = opts.ExactDirections()
    factors = estimate.factors(estimate.observe(net, params, net.forward(params, x), None, None))
    found = []
    for w, block, gone in zip(params, factors, masks, strict=True):
        a, g = block.damped(np.asarray(damping)) if damping else block
        f, theta, left = np.kron(a, g), w.T.reshape(-1), np.flatnonzero(~gone.T.reshape(-1))
        costs = np.zeros(w.size)
        for k, q in enumerate(left):
            costs[q] = cheapest(f[np.ix_(left, left)], theta[left], k)
        found.append(costs.reshape(w.shape[::-1]).T)
    return found


@pytest.mark.parametrize("kind", ["full", "dead input", "twice the same input", "few samples", "categorical"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_pruned_parameters_stay_at_zero_until_nothing_is_left(kind: str, damping: float) -> None:
    """Each step against the dense constrained minimum; both members have masks of their own."""
    net = MLP((2, 3, 2), likelihood="categorical" if kind == "categorical" else "gaussian")
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3 if kind == "few samples" else 30, 2))
    if kind == "dead input":
        x[:, 1] = 0.0
    if kind == "twice the same input":
        x[:, 1] = x[:, 0]
    params = tuple(w + 0.3 * rng.standard_normal(w.shape) for w in net.init(rng, (2,), like=x))
    masks = tuple(np.zeros(w.shape, dtype=bool) for w in params)
    total = sum(w[0].size for w in params)
    for k in range(total):
        costs = opts.saliencies(net, params, x, damping=damping, pruned=masks)
        removed = opts.prune(net, params, x, damping=damping, pruned=masks)
        for b in range(2):
            own, gone = tuple(w[b] for w in params), tuple(m[b] for m in masks)
            wanted = restricted(net, own, x, damping, gone)
            scale = max(s.max() for s in wanted)
            for a, c in zip(costs, wanted, strict=True):
                np.testing.assert_allclose(a[b], c, rtol=1e-5, atol=1e-8 * scale)
            i, row, column = (int(part[b]) for part in removed[2:5])
            assert not gone[i][row, column]
            assert removed.saliency[b] == costs[i][b, row, column]
            change = (removed.params[i][b] - own[i]).T.reshape(-1)
            estimate = opts.ExactDirections()
            block = estimate.factors(estimate.observe(net, own, net.forward(own, x), None, None))[i]
            a, g = block.damped(np.asarray(damping)) if damping else block
            assert abs(0.5 * change @ np.kron(a, g) @ change - wanted[i][row, column]) <= 1e-6 * scale + 1e-15
        for new, old, mask, before in zip(removed.params, params, removed.pruned, masks, strict=True):
            assert np.isfinite(new).all()
            assert (new[mask] == 0.0).all()
            assert mask[before].all()
            assert np.abs(new).max() <= 1e4 * max(np.abs(old).max(), 1.0)
        params, masks = removed.params, removed.pruned
        left = [sum(int(mask[b].sum()) for mask in masks) for b in range(2)]
        nonzero = [sum(int((w[b] != 0.0).sum()) for w in params) for b in range(2)]
        assert left == [k + 1, k + 1] or nonzero[left.index(min(left))] == 0
        if not any(nonzero):
            break
    last = opts.prune(net, params, x, damping=damping, pruned=masks)
    assert np.isinf(last.saliency).all()
    assert not any(w.any() for w in last.params)
    for a, b in zip(last.pruned, masks, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_of_members_are_their_own(backend: Backend) -> None:
    """A stack with three masks, a NaN among its members, against each alone; nothing changes elsewhere."""
    compiled_if_jax(backend)
    net = MLP((3, 4, 2))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 3))
    params = net.init(0, (4,), like=x)
    params[0][1, 0, 0] = np.nan
    masks = tuple(rng.random(w.shape) < 0.3 for w in params)
    masks[1][0] = False
    given, inputs = backend.asarrays(*params), backend.asarray(x)
    gone = backend.asarrays(*masks)

    def pruned(params: Any, x: Any, gone: Any) -> Any:
        return tuple(opts.prune(net, params, x, damping=1e-2, pruned=gone))

    found = backend.call(pruned, given, inputs, gone)
    together = opts.Pruned(*found)
    assert np.isnan(backend.to_numpy(together.saliency)).tolist() == [False, True, False, False]
    tol = 1e-8 if backend.float64 else 1e-3
    for b in (0, 2, 3):
        alone = opts.prune(net, tuple(w[b] for w in params), x, damping=1e-2, pruned=tuple(m[b] for m in masks))
        for w, new, mask, before, single in zip(
            alone.params, together.params, together.pruned, masks, alone.pruned, strict=True
        ):
            assert relative(backend.to_numpy(new)[b], w) <= tol
            assert (backend.to_numpy(new)[b][before[b]] == 0.0).all()
            np.testing.assert_array_equal(backend.to_numpy(mask)[b], single)
        i = int(alone.layer)
        held = [w[b] * ~m[b] for w, m in zip(params, masks, strict=True)]
        np.testing.assert_allclose(backend.to_numpy(together.params[1 - i])[b], held[1 - i], rtol=1e-6)


def test_masks_that_cannot_be() -> None:
    net, params, x, _ = case("MLP tanh gaussian")
    good = tuple(np.zeros(w.shape, dtype=bool) for w in params)
    for masks, error, match in (
        (good[:1], ValueError, "pruned must have one array for each of 3 layers, got 1"),
        (tuple(w * 0.0 for w in params), TypeError, r"pruned\[0\] must be an array of bool of the parameters' library"),
        ([[False]] * 3, TypeError, r"pruned\[0\] must be an array of bool"),
        ((good[0], good[1].T[:2], good[2]), ValueError, r"pruned\[1\] must have shape"),
        (good[0], TypeError, "pruned must be a tuple or list"),
    ):
        with pytest.raises(error, match=match):
            opts.prune(net, params, x, pruned=masks)
        with pytest.raises(error, match=match):
            opts.saliencies(net, params, x, pruned=masks)
