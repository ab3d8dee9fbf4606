"""The ladder of the layerwise rule: routes from shapes, and every rung against plain pseudo-inverses."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from backends import BACKENDS, Backend

import natgrad_array as ng
from natgrad_array import _arrays, linalg
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import is_lazy
from natgrad_array.deep_linear import layerwise as ladder
from natgrad_array.deep_linear import square, waist
from natgrad_array.deep_linear.duals import chains, duals, routes, thin
from natgrad_array.deep_linear.products import products

JAX, JAX_JIT = (next(b for b in BACKENDS if b.name == name) for name in ("jax", "jax-jit"))
SIZES = [
    (4, 4, 4),
    (4, 4, 4, 4),
    (6, 5, 4, 3),
    (3, 4, 5, 6),
    (8, 3, 8),
    (8, 3, 3, 3, 6),
    (4, 4, 4, 6),
    (8, 6, 3, 6, 8),
    (8, 6, 3, 7, 3, 8),
    (8, 6, 3, 3, 7, 8),
    (4, 9, 9, 4),
    (4, 9, 4, 5),
    (8, 8, 8, 5),
    (5, 8, 8, 8),
    (8, 3, 9, 2, 9, 3, 8),
]


def network(sizes: tuple[int, ...], batch: int = 3, seed: int = 0, spread: float = 0.5) -> tuple[np.ndarray, ...]:
    """Layers of full rank with singular values between 1 and 1 + spread."""
    rng = np.random.default_rng(seed)
    layers = []
    for n, m in itertools.pairwise(sizes):
        u = np.linalg.qr(rng.standard_normal((batch, m, m)))[0]
        v = np.linalg.qr(rng.standard_normal((batch, n, n)))[0]
        s = 1.0 + spread * rng.random((batch, min(m, n)))
        layers.append((u[..., : min(m, n)] * s[:, None, :]) @ np.swapaxes(v[..., : min(m, n)], -1, -2))
    return tuple(layers)


def moments(n_in: int, n_out: int, seed: int = 1, rank: int | None = None) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n_in, 4 * n_in)) / np.sqrt(4 * n_in)
    if rank is not None:
        root = np.diag(np.arange(n_in) < rank) @ root
    noise = rng.standard_normal((n_out, 4 * n_out)) / np.sqrt(4 * n_out)
    sigma, noise = root @ root.T, noise @ noise.T
    teacher = rng.standard_normal((n_out, n_in))
    return sigma, noise, teacher @ sigma, teacher @ sigma @ teacher.T + noise


def expected(weights: tuple[np.ndarray, ...], given: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Eq 42 for one network: singular values of the factors, ranks by a gap that none of these cases is near."""
    sigma, noise, cross, _ = given
    depth, product = len(weights), np.linalg.multi_dot([*weights[::-1], np.eye(sigma.shape[0])])
    power, basis = np.linalg.eigh(sigma)
    root = basis * np.sqrt(np.clip(power, 0, None))
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    error = whiten @ (product @ sigma - cross) @ np.linalg.pinv(root, rcond=1e-7).T
    found = []
    for i in range(depth):
        ahead, behind = whiten.T, root
        for w in weights[:i:-1]:
            ahead = w.T @ ahead
        for w in weights[:i]:
            behind = w @ behind
        left, right = np.linalg.pinv(ahead, rcond=1e-9).T, np.linalg.pinv(behind, rcond=1e-9)
        found.append(left @ error @ right / depth)
    return found


def assert_members(actual: Any, weights: tuple[np.ndarray, ...], given: tuple[np.ndarray, ...], tol: float) -> None:
    for b in range(weights[0].shape[0]):
        for a, e in zip(actual, expected(tuple(w[b] for w in weights), given), strict=True):
            assert np.linalg.norm(a[b] - e) <= tol * np.linalg.norm(e)


# --------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("widths", "kinds", "starts"),
    [
        ((5,), ["root"], [0]),
        ((4, 4, 4), ["root", "layer", "layer"], [0, 0, 1]),
        ((8, 6, 4), ["root", "whole", "whole"], [0, 1, 2]),
        ((4, 6, 8), ["root", "split", "split"], [0, 0, 0]),
        ((8, 3, 6, 8), ["root", "whole", "split", "split"], [0, 1, 1, 1]),
        ((8, 3, 6, 3, 8), ["root", "whole", "split", "whole", "split"], [0, 1, 1, 3, 3]),
        ((4, 9, 4, 5), ["root", "split", "split", "split"], [0, 0, 0, 2]),
        ((8, 3, 3, 5), ["root", "whole", "layer", "split"], [0, 1, 1, 2]),
    ],
    ids=str,
)
def test_routes(widths: tuple[int, ...], kinds: list[str], starts: list[int]) -> None:
    found = routes(widths)
    assert [route.kind for route in found] == kinds
    assert [route.start for route in found] == starts


def test_a_root_with_fewer_columns_than_rows_is_not_split_at() -> None:
    found = routes((4, 4, 9, 4, 5), root_is_square=False)
    assert [route.kind for route in found] == ["root", "whole", "split", "split", "split"]
    assert [route.start for route in found] == [0, 1, 1, 1, 3]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_unit_noise_and_noise_that_only_looks_like_it_give_the_same(sizes: tuple[int, ...], rank: int | None) -> None:
    """Unit noise is left out of products; noise a last digit away from it is not."""
    weights, (sigma, _, cross, output) = network(sizes), moments(sizes[0], sizes[-1], rank=rank)
    identity = np.eye(sizes[-1])
    nearly = identity * (1.0 + np.finfo(np.float64).eps)
    unit, other = (ng.GaussianTask(sigma, noise, cross, output) for noise in (identity, nearly))
    assert unit.factors.noise_root is None
    assert other.factors.noise_root is not None
    found = dl.natural_gradient(weights, unit)
    for a, b in zip(found, dl.natural_gradient(weights, other), strict=True):
        assert np.linalg.norm(a - b) <= 1e-11 * np.linalg.norm(b)
    if rank is None:
        assert_members(found, weights, (sigma, identity, cross, output), 1e-10)


def test_unit_noises_of_a_batch_keep_its_shape() -> None:
    task = ng.GaussianTask(
        *(np.broadcast_to(a, (5, 2, 2)) if i == 1 else a for i, a in enumerate((np.eye(2),) * 3)), 3 * np.eye(2)
    )
    weights = (2 * np.eye(2), np.eye(2))
    assert dl.excess_loss(weights, task).shape == (5,)
    assert all(q.shape == (5, 2, 2) for q, _ in dl.projections(weights, task))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_duals_are_transposed_pseudo_inverses(sizes: tuple[int, ...]) -> None:
    weights, task = network(sizes), ng.GaussianTask(*moments(sizes[0], sizes[-1]))
    factors = products(weights, task.factors)
    pairs, full = duals(xp, weights, task.factors, factors)
    assert np.all(full)
    for i, (e, x) in enumerate(pairs):
        for dual, factor in ((e, factors.ahead[i]), (x, factors.behind[i])):
            wanted = np.swapaxes(np.linalg.pinv(factor, rcond=1e-9), -1, -2)
            assert np.linalg.norm(dual - wanted) <= 1e-12 * np.linalg.norm(wanted)


@pytest.mark.parametrize("wide", [False, True])
def test_the_newton_step_undoes_the_squaring(wide: bool) -> None:
    """A Gram matrix alone loses κ² digits, the dual after the step only κ."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((9, 5)))[0], np.linalg.qr(rng.standard_normal((5, 5)))[0]
    x, wanted = (u * np.logspace(0, -3, 5)) @ v.T, (u * np.logspace(0, 3, 5)) @ v.T
    if wide:
        x, wanted = x.T.copy(), wanted.T
    piece = thin(xp, x)
    dual, condition = piece.refined(xp)
    assert np.linalg.norm(dual - wanted) <= 1e-12 * np.linalg.norm(wanted)
    assert 1e6 <= piece.condition <= 2e6
    assert 1e3 <= condition <= 3e3


# ---------------------------------------------------------------------------------- rungs


@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 5, 4, 3), (8, 6, 3, 6, 8), (8, 3, 3, 3, 6)], ids=str)
def test_direction_on_every_library(backend: Backend, sizes: tuple[int, ...]) -> None:
    weights, given = network(sizes), moments(sizes[0], sizes[-1])
    task = ng.GaussianTask(*backend.asarrays(*given))
    layers = backend.asarrays(*weights)
    found = backend.call(lambda w, t: dl.natural_gradient(w, t), layers, task)
    assert_members([backend.to_numpy(d) for d in found], weights, given, 1e-10 if backend.float64 else 2e-4)


@pytest.mark.parametrize("sizes", [*SIZES, (4,) * 6, (8, 3, 3, 3, 3, 6)], ids=str)
def test_every_rung_gives_the_same_direction(sizes: tuple[int, ...]) -> None:
    weights, given = network(sizes), moments(sizes[0], sizes[-1])
    task = ng.GaussianTask(*given)
    scale = 1.0 / len(weights)
    rungs = [ladder._by_gram_matrices, ladder._by_duals]
    if len(set(sizes)) == 1:
        rungs += [square.by_one_inverse, square.by_layer_inverses]
        rungs += [square.by_pair_inverses] if len(weights) > 2 else []
    if waist.is_waisted(weights, task.factors):
        rungs.append(waist.by_ends)
    for rung in rungs:
        (*found, excess), certified = rung(xp, weights, task.factors, scale, True)
        assert np.all(certified)
        assert_members(found, weights, given, 1e-11 if rung is ladder._by_duals else 1e-10)
        assert excess.shape == (len(weights[0]), 1, 1)
        np.testing.assert_allclose(excess[:, 0, 0], excess_losses(weights, given), rtol=1e-10)
        alone, _ = rung(xp, weights, task.factors, scale, False)
        assert all(np.array_equal(d, f) for d, f in zip(alone, found, strict=True))


def excess_losses(weights: Any, given: tuple[np.ndarray, ...]) -> np.ndarray:
    """½ tr Σ̃⁻¹ (W − W*) Σ (W − W*)ᵀ."""
    moment, noise, cross, _ = given
    gap = functools.reduce(lambda product, layer: layer @ product, weights) - cross @ np.linalg.inv(moment)
    return 0.5 * np.trace(np.linalg.inv(noise) @ gap @ moment @ np.swapaxes(gap, -1, -2), axis1=-2, axis2=-1)


@pytest.mark.parametrize(
    ("sizes", "rank", "waisted"),
    [
        ((8, 3, 8), None, True),
        ((8, 3, 3, 6), None, True),
        ((4, 4, 4, 6), None, True),
        ((8, 3, 3, 6), 2, False),
        ((8, 6, 3, 8), None, False),
        ((4, 5, 8), None, False),
    ],
    ids=str,
)
def test_one_width_between_wider_ends(sizes: tuple[int, ...], rank: int | None, waisted: bool) -> None:
    task = ng.GaussianTask(*moments(sizes[0], sizes[-1], rank=rank))
    assert waist.is_waisted(network(sizes), task.factors) is waisted


@pytest.mark.parametrize("sizes", [(8, 3, 6), (8, 3, 3, 3, 6), (6, 5, 4, 3), (4, 9, 4, 5)], ids=str)
def test_inputs_that_never_move_in_some_directions(sizes: tuple[int, ...]) -> None:
    """Nothing moves along them, although the layer has weights there."""
    weights, given = network(sizes), moments(sizes[0], sizes[-1], rank=sizes[0] - 1)
    found = dl.natural_gradient(weights, ng.GaussianTask(*given))
    assert_members(found, weights, given, 1e-10)
    assert np.max(np.abs(found[0][..., -1])) <= 1e-12


@pytest.mark.parametrize("layer", [0, 1])
def test_either_end_of_a_waist_decides(backend: Backend, layer: int) -> None:
    """Member 1 has lost a rank at one end; on torch both ends are inverted as one stack."""
    weights, given = [w.copy() for w in network((8, 3, 8), batch=5)], moments(8, 8)
    u, s, vh = np.linalg.svd(weights[layer][1], full_matrices=False)
    s[-1] = 0.0
    weights[layer][1] = (u * s) @ vh
    task, layers = ng.GaussianTask(*backend.asarrays(*given)), backend.asarrays(*weights)
    found = backend.call(lambda w, t: dl.natural_gradient(w, t), layers, task)
    tol = 1e-9 if backend.float64 else 5e-4
    assert_members([backend.to_numpy(d) for d in found], tuple(weights), given, tol)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_members_without_a_certificate_take_the_next_rung_alone(sizes: tuple[int, ...]) -> None:
    """Member 1 has a singular layer, member 2 one of condition 1e5: each gets what it would get alone."""
    weights, given = [w.copy() for w in network(sizes, batch=5)], moments(sizes[0], sizes[-1])
    u, s, vh = np.linalg.svd(weights[1][1:3], full_matrices=False)
    s[0, -1], s[1, -1] = 0.0, 1e-5
    weights[1][1:3] = (u * s[:, None, :]) @ vh
    task = ng.GaussianTask(*given)
    found = dl.natural_gradient(tuple(weights), task)
    for b, tol in ((0, 1e-10), (2, 1e-8), (3, 1e-10), (4, 1e-10)):
        alone = tuple(w[b : b + 1] for w in weights)
        assert_members([d[b : b + 1] for d in found], alone, given, tol)
    singular = tuple(w[1:2] for w in weights)
    assert_members([d[1:2] for d in found], singular, given, 1e-9)


def test_layers_of_full_rank_whose_product_is_singular() -> None:
    """Only the square factor W_2 W_1 S shows it: all that is inverted besides has full rank."""
    weights, given = list(network((4, 9, 4, 5))), moments(4, 5)
    u, _, vh = np.linalg.svd(weights[0][1], full_matrices=True)
    left = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    weights[0][1] = (u[:, :4] * [2.0, 1.5, 1.2, 1.0]) @ vh
    weights[1][1] = left @ (u[:, [0, 1, 2, 5]] * [1.0, 1.3, 1.6, 1.0]).T
    found = dl.natural_gradient(tuple(weights), ng.GaussianTask(*given))
    assert_members(found, tuple(weights), given, 1e-10)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_nan_stays_in_its_member(sizes: tuple[int, ...]) -> None:
    weights, given = [w.copy() for w in network(sizes)], moments(sizes[0], sizes[-1])
    weights[0][1, 0, 0] = np.nan
    found = dl.natural_gradient(tuple(weights), ng.GaussianTask(*given))
    assert all(np.isnan(d[1]).all() for d in found)
    for b in (0, 2):
        assert_members([d[b : b + 1] for d in found], tuple(w[b : b + 1] for w in weights), given, 1e-10)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 4, 4), (4, 6, 5), (6, 4, 4, 3)], ids=str)
def test_tasks_of_different_rank_in_one_stack(sizes: tuple[int, ...]) -> None:
    """S has zero columns in the member of lower rank, where no route for a full rank holds."""
    weights = network(sizes, batch=2)
    both = [moments(sizes[0], sizes[-1]), moments(sizes[0], sizes[-1], rank=2)]
    task = ng.GaussianTask(*(np.stack(pair) for pair in zip(*both, strict=True)))
    found = dl.natural_gradient(weights, task)
    for b in range(2):
        assert_members([d[b : b + 1] for d in found], tuple(w[b : b + 1] for w in weights), both[b], 1e-9)


def test_only_some_layers_are_batched() -> None:
    sizes = (4, 4, 4)
    weights, given = network(sizes), moments(4, 4)
    shared = (weights[0][0], weights[1])
    found = dl.natural_gradient(shared, ng.GaussianTask(*given))
    whole = (np.broadcast_to(weights[0][:1], weights[0].shape).copy(), weights[1])
    assert_members(found, whole, given, 1e-10)


def test_gaussian_networks_in_float32_keep_their_digits() -> None:
    """Products of Gaussian layers have conditions near 1/eps; inverses of the layers do not."""
    rng = np.random.default_rng(0)
    weights = tuple((rng.standard_normal((64, 32, 32)) / 32**0.5) for _ in range(4))
    given = moments(32, 32)
    single = tuple(w.astype(np.float32) for w in weights)
    found = dl.natural_gradient(single, ng.GaussianTask(*(m.astype(np.float32) for m in given)))
    double = tuple(w.astype(np.float64) for w in single)
    gap = np.linalg.multi_dot
    off = []
    for b in range(64):
        w = [layer[b] for layer in double]
        optimum = given[2] @ np.linalg.inv(given[0])
        error = gap(w[::-1]) - optimum
        inverses = [np.linalg.inv(layer) for layer in w]
        wanted = []
        for i in range(4):
            d = error
            for j in range(3, i, -1):
                d = inverses[j] @ d
            for j in range(i):
                d = d @ inverses[j]
            wanted.append(d / 4)
        misfit = sum(np.sum((f[b] - d) ** 2) for f, d in zip(found, wanted, strict=True))
        off.append((misfit / sum(np.sum(d**2) for d in wanted)) ** 0.5)
    assert np.median(off) <= 1e-4
    assert np.mean(np.asarray(off) > 1e-2) <= 1 / 64


@np.errstate(invalid="ignore")  # as behind every door
def test_inverses_of_pairs_are_certified_by_the_condition_of_the_pairs() -> None:
    """Each member has one layer of condition 1 / least: six digits or more are kept, or the next rung has it."""
    least, sizes = np.asarray([1.0, 1e-5, 1e-8, 0.0]), (6,) * 6
    weights, given = list(network(sizes, batch=4)), moments(6, 6)
    for number in (0, 3, 4):
        u, s, vh = np.linalg.svd(weights[number])
        s[:, -1] = least * s[:, -1]
        changed = list(weights)
        changed[number] = (u * s[:, None, :]) @ vh
        task = ng.GaussianTask(*given)
        _, pairs = square.by_pair_inverses(xp, tuple(changed), task.factors, 0.2, False)
        found, layers = square.by_layer_inverses(xp, tuple(changed), task.factors, 0.2, False)
        # The last of five layers is on its own, and known exactly.
        assert pairs.tolist() == [True, True, number == 4, False]
        assert layers.tolist() == [True, True, True, False]
        good = tuple(w[:2] for w in changed)
        assert_members([d[:2] for d in found], good, given, 1e-8)
        assert_members(
            [d[:2] for d in square.by_pair_inverses(xp, good, task.factors, 0.2, False)[0]], good, given, 1e-8
        )


def test_a_probe_chooses_the_way_of_a_square_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussian products are too ill conditioned for one inverse, and in float32 for those of pairs."""
    taken: list[str] = []
    for name in ("by_one_inverse", "by_pair_inverses", "by_layer_inverses"):
        way = getattr(square, name)
        monkeypatch.setattr(square, name, lambda *args, way=way, name=name: taken.append(name) or way(*args))
    task = ng.GaussianTask(*moments(32, 32))
    rng = np.random.default_rng(0)
    gaussian = tuple(rng.standard_normal((48, 32, 32)) / 32**0.5 for _ in range(4))
    dl.natural_gradient(gaussian, task)
    assert taken[0] == "by_pair_inverses"
    assert "by_one_inverse" not in taken
    taken.clear()
    single = ng.GaussianTask(*(m.astype(np.float32) for m in moments(32, 32)))
    dl.natural_gradient(tuple(w.astype(np.float32) for w in gaussian), single)
    assert set(taken) == {"by_layer_inverses"}
    taken.clear()
    dl.natural_gradient(network((32,) * 5, batch=48), task)
    assert set(taken) == {"by_one_inverse"}


def test_jax_chooses_the_way_of_a_square_stack_outside_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inverses of pairs in float32, within `jax.jit` no choice; whole stacks are traced for a compiled function."""
    taken: list[str] = []
    for name in ("by_one_inverse", "by_pair_inverses", "by_layer_inverses"):
        way = getattr(square, name)

        def spy(*args: Any, way: Any = way, name: str = name) -> Any:
            taken.append(name if is_lazy(args[1][0]) else f"{name}, operation by operation")
            return way(*args)

        monkeypatch.setattr(square, name, spy)
    given = moments(32, 32)
    task = ng.GaussianTask(*JAX.asarrays(*given))
    well = JAX.asarrays(*network((32,) * 5, batch=16))
    worse = network((32,) * 5, batch=16, spread=200.0)
    for weights, wanted in ((well, "by_one_inverse"), (JAX.asarrays(*worse), "by_pair_inverses")):
        found = dl.natural_gradient(weights, task)
        assert taken == [wanted]
        taken.clear()
        assert_members([JAX.to_numpy(d) for d in found], tuple(JAX.to_numpy(w) for w in weights), given, 1e-8)
    single = (m.astype(np.float32) for m in given)
    dl.natural_gradient(JAX.asarrays(*(w.astype(np.float32) for w in worse)), ng.GaussianTask(*JAX.asarrays(*single)))
    assert taken == ["by_layer_inverses"]
    taken.clear()
    JAX_JIT.call(dl.natural_gradient, well, task)
    assert set(taken) == {"by_layer_inverses"}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (12, 8, 6, 5), (9, 4, 9), (9, 6, 3, 6, 9)], ids=str)
def test_jax_inverts_by_blocks_and_leaves_to_others_what_it_can_not(sizes: tuple[int, ...], compiled: bool) -> None:
    """Beside members of full rank: two layers that need a pivot, one of lower rank, one of NaN; in pieces too."""
    given = moments(sizes[0], sizes[-1])
    weights = tuple(np.concatenate([part] * 128) for part in network(sizes, batch=16))
    weights[0][3, 0, 0] = weights[1][4, 0, 0] = 0.0
    weights[0][5, 1] = weights[0][5, 0]
    weights[1][6, 0, 0] = np.nan
    asked = tuple(JAX.asarrays(*weights))
    task = ng.GaussianTask(*JAX.asarrays(*given))
    call = JAX_JIT.call if compiled else JAX.call
    found = [JAX.to_numpy(d) for d in call(dl.natural_gradient, asked, task)]
    chosen = np.asarray([0, 3, 4, 5, 7, 1027, 2047])
    assert_members([d[chosen] for d in found], tuple(w[chosen] for w in weights), given, 1e-8)
    assert np.all(np.isnan(found[0][6]))
    assert not np.isnan(np.delete(found[0], 6, axis=0)).any()


@pytest.mark.parametrize("sizes", [(48, 32, 24, 16), (16, 24, 32, 48)], ids=str)
def test_gaussian_networks_in_float32_need_no_singular_values(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual of a dual proves what the condition of its Gram matrix leaves open."""
    monkeypatch.setattr(linalg, "svd", None)
    rng = np.random.default_rng(0)
    weights = tuple((rng.standard_normal((64, m, n)) / n**0.5).astype(np.float32) for n, m in itertools.pairwise(sizes))
    given = moments(sizes[0], sizes[-1])
    found = dl.natural_gradient(weights, ng.GaussianTask(*(m.astype(np.float32) for m in given)))
    assert_members(found, tuple(w.astype(np.float64) for w in weights), given, 5e-3)


# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize("shape", [(3, 2), (5, 3, 2), (0, 3, 2), (2, 4, 3, 2)], ids=str)
def test_matmul_with_a_shared_matrix(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(shape), rng.standard_normal((2, 6))
    np.testing.assert_allclose(linalg.matmul(a, b), np.einsum("...ij,jk->...ik", a, b), atol=1e-14)


def test_a_square_layer_is_inverted_once_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, task = network((4, 4, 4, 4)), ng.GaussianTask(*moments(4, 4))
    calls = []
    inverse = linalg.inverse
    monkeypatch.setattr(linalg, "inverse", lambda xp, a: calls.append(a) or inverse(xp, a))
    left, right = chains(xp, weights, task.factors)
    left.duals(), right.duals()
    assert len(calls) == 3


@pytest.mark.parametrize(("threads", "calls"), [(5, 1), (6, 3)])
def test_layers_are_inverted_by_one_call_where_calls_may_wait_for_each_other(
    threads: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", str(threads))
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(5)
    host = [rng.standard_normal((*batch, 3, 3)) for batch in ((2, 1), (), (4,))]
    layers = tuple(jax.numpy.asarray(layer) for layer in host)

    def invert(*layers: Any) -> Any:
        return linalg.inverses(jax.numpy, layers)

    assert len(re.findall(r"= lu\b", str(jax.make_jaxpr(invert)(*layers)))) == calls
    for (inverse, condition), layer in zip(invert(*layers), host, strict=True):
        np.testing.assert_allclose(inverse @ layer, np.broadcast_to(np.eye(3), layer.shape), atol=1e-12)
        assert np.all(np.asarray(condition) >= np.linalg.cond(layer))


def test_blocks_of_several_layers_have_no_call_of_lapack() -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(5)
    layers = tuple(jax.numpy.asarray(rng.standard_normal((*batch, 3, 3))) for batch in ((20, 1), (16,), (64,)))

    def invert(*layers: Any) -> Any:
        return linalg.inverses(jax.numpy, layers, pivots=False)

    assert not re.findall(r"= lu\b", str(jax.make_jaxpr(invert)(*layers)))
    for (inverse, condition), layer in zip(invert(*layers), layers, strict=True):
        np.testing.assert_allclose(inverse @ layer, np.broadcast_to(np.eye(3), layer.shape), atol=1e-10)
        assert np.all(np.asarray(condition) >= np.linalg.cond(layer))


@pytest.mark.parametrize("sizes", [(128, 96, 80, 64), (64, 128, 64)], ids=str)
def test_what_jax_compiles_whole_has_no_call_of_lapack(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls in one function could wait for each other for ever; pieces may not become too short for blocks."""
    given = moments(sizes[0], sizes[-1])
    task = ng.GaussianTask(*JAX.asarrays(*given))
    for name in ("cholesky", "inverse"):
        monkeypatch.setattr(_arrays, name, None)
    weights = network(sizes, batch=48)
    found = dl.natural_gradient(tuple(JAX.asarrays(*weights)), task)
    assert_members([JAX.to_numpy(d)[::20] for d in found], tuple(w[::20] for w in weights), given, 1e-8)
