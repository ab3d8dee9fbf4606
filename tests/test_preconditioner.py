"""`check_preconditioner` against S and Π formed from dense matrices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import NUMPY, Backend
from cases import orthogonal

import natgrad_array as ng
from natgrad_array import deep_linear as dl

NETWORKS: dict[str, dict[str, Any]] = {
    "one layer": {"sizes": (4, 3)},
    "wide": {"sizes": (4, 5, 4, 3)},
    "wide, singular Σ": {"sizes": (5, 4, 3), "rank": 3},
    "intermediate": {"sizes": (5, 4, 3)},
    "bottleneck": {"sizes": (4, 2, 3, 4)},
    "bottleneck, singular Σ": {"sizes": (5, 2, 3), "rank": 3},
    "singular layer": {"sizes": (3, 3, 3, 3), "singular": 1},
}
WIDE = ["one layer", "wide", "wide, singular Σ"]

Network = tuple[list[np.ndarray], tuple[np.ndarray, ...]]


def network(sizes: tuple[int, ...], seed: int = 0, rank: int | None = None, singular: int | None = None) -> Network:
    """Weights and the moments of a task, well conditioned up to the zeros asked for."""
    rng = np.random.default_rng(seed)
    weights = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        kept = min(m, n) - (i == singular)
        weights.append((orthogonal(rng, m)[:, :kept] * rng.uniform(0.8, 1.25, kept)) @ orthogonal(rng, n)[:, :kept].T)
    n_in, n_out = sizes[0], sizes[-1]
    basis = orthogonal(rng, n_in)
    live = np.arange(n_in) < (n_in if rank is None else rank)
    inputs = (basis * np.where(live, rng.uniform(0.3, 1.5, n_in), 0)) @ basis.T
    basis = orthogonal(rng, n_out)
    noise = (basis * rng.uniform(0.3, 1.5, n_out)) @ basis.T
    teacher = rng.standard_normal((n_out, n_in))
    inputs, noise = (inputs + inputs.T) / 2, (noise + noise.T) / 2
    outputs = teacher @ inputs @ teacher.T + np.eye(n_out)
    return weights, (inputs, noise, teacher @ inputs, (outputs + outputs.T) / 2)


def given(backend: Backend, weights: Any, moments: Any, dtype: str = "float64") -> tuple[Any, ng.GaussianTask]:
    on = [backend.asarray(a.astype(dtype)) for a in (*weights, *moments)]
    return tuple(on[: len(weights)]), ng.GaussianTask(*on[len(weights) :])


class Dense:
    """Everything about one network as matrices; layers in order, Vec stacks columns."""

    def __init__(self, weights: list[np.ndarray], moments: tuple[np.ndarray, ...]) -> None:
        inputs, noise, cross, _ = moments
        depth = len(weights)
        self.shapes = [w.shape for w in weights]
        ahead = [functools.reduce(np.matmul, weights[:i:-1], np.eye(len(noise))) for i in range(depth)]
        behind = [functools.reduce(lambda a, b: b @ a, weights[:i], np.eye(len(inputs))) for i in range(depth)]
        self.a = np.concatenate([np.kron(b, a.T) for a, b in zip(ahead, behind, strict=True)])
        power, basis = np.linalg.eigh(np.kron(inputs, np.linalg.inv(noise)))
        self.root = (basis * np.sqrt(np.where(power > 1e-12, power, 0))) @ basis.T
        self.fisher = self.a @ self.root @ self.root @ self.a.T
        self.pinv = np.linalg.pinv(self.fisher, rcond=1e-10)
        error = np.linalg.solve(noise, ahead[0] @ weights[0] @ inputs - cross)
        self.gradient = self.a @ error.T.ravel()
        columns = self.root @ self.a.T
        u, s, _ = np.linalg.svd(columns)
        kept = u[:, : int(np.sum(s > 1e-10 * s[0]))]
        self.projector = kept @ kept.T
        self.columns = columns
        blocks = [
            np.linalg.pinv(np.kron(b @ inputs @ b.T, a.T @ np.linalg.solve(noise, a)), rcond=1e-10) / depth
            for a, b in zip(ahead, behind, strict=True)
        ]
        self.layerwise = np.zeros_like(self.fisher)
        start = 0
        for block in blocks:
            stop = start + len(block)
            self.layerwise[start:stop, start:stop] = block
            start = stop

    def residual(self, c: np.ndarray) -> float:
        s = self.columns @ c @ self.columns.T
        return float(np.linalg.norm(s - self.projector) / np.linalg.norm(self.projector))

    def cosine(self, c: np.ndarray) -> float:
        step, exact = c @ self.gradient, self.pinv @ self.gradient
        return float(step @ exact / np.linalg.norm(step) / np.linalg.norm(exact))

    def length(self, c: np.ndarray) -> float:
        return float(np.linalg.norm(c @ self.gradient) / np.linalg.norm(self.pinv @ self.gradient))

    def inner_inverse(self, seed: int) -> np.ndarray:
        """A random C with F C F = F, neither symmetric nor reflexive."""
        free = np.random.default_rng(seed).standard_normal(self.fisher.shape)
        return self.pinv + free - self.pinv @ self.fisher @ free @ self.fisher @ self.pinv

    def apply(self, c: np.ndarray) -> Callable[[Any], Any]:
        """C as a function of tuples of NumPy arrays, batched or not."""

        def product(gradient: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            flat = [np.swapaxes(g, -1, -2).reshape(*g.shape[:-2], -1) for g in gradient]
            stacked = (c @ np.concatenate(flat, axis=-1)[..., None])[..., 0]
            parts, start = [], 0
            for m, n in self.shapes:
                part = stacked[..., start : start + m * n]
                parts.append(np.swapaxes(part.reshape(*part.shape[:-1], n, m), -1, -2))
                start += m * n
            return tuple(parts)

        return product


def scaled(factor: float, apply: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda gradient: tuple(factor * d for d in apply(gradient))


# --------------------------------------------------------------------- the library's rules


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inverse", ["exact", "moore_penrose"])
def test_exact_rules_pass_in_every_regime(name: str, inverse: str) -> None:
    arrays = network(**NETWORKS[name])
    weights, task = given(NUMPY, *arrays)
    fisher = dl.fisher(weights, task)
    check = ng.check_preconditioner(lambda g: fisher.precondition(g, inverse=inverse), weights, task)
    assert check.residual.shape == check.cosine.shape == check.length.shape == ()
    assert check.residual <= 1e-10
    assert check.length >= 1 - 1e-10
    if inverse == "moore_penrose":
        assert check.cosine == pytest.approx(1, abs=1e-10)
        assert check.length == pytest.approx(1, abs=1e-10)
    else:
        # F⁺∇ is what is left of any other natural gradient once the free part is gone.
        assert check.cosine == pytest.approx(1 / check.length, rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layerwise_rule_passes_where_the_network_is_wide(name: str) -> None:
    arrays = network(**NETWORKS[name])
    weights, task = given(NUMPY, *arrays)
    oracle = Dense(*arrays)
    check = ng.check_preconditioner(dl.fisher(weights, task).precondition, weights, task)
    expected = oracle.residual(oracle.layerwise)
    assert check.residual == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert check.residual <= 1e-10 if name in WIDE else check.residual > 0.1
    assert check.cosine == pytest.approx(oracle.cosine(oracle.layerwise), rel=1e-9)
    assert check.length == pytest.approx(oracle.length(oracle.layerwise), rel=1e-9)


@pytest.mark.parametrize("name", ["wide", "wide, singular Σ"])
def test_what_is_no_natural_gradient_fails(name: str) -> None:
    arrays = network(**NETWORKS[name])
    weights, task = given(NUMPY, *arrays)
    oracle, fisher = Dense(*arrays), dl.fisher(weights, task)
    rule = fisher.precondition
    residuals = {
        "negative": ng.check_preconditioner(scaled(-1.0, rule), weights, task),
        "double": ng.check_preconditioner(scaled(2.0, rule), weights, task),
        "without 1/L": ng.check_preconditioner(
            functools.partial(fisher.precondition, inverse="block_diagonal"), weights, task
        ),
        "zero": ng.check_preconditioner(scaled(0.0, rule), weights, task),
        "identity": ng.check_preconditioner(lambda g: g, weights, task),
    }
    # S = Π times a number, so the residual is the distance of that number from one.
    assert residuals["negative"].residual == pytest.approx(2, rel=1e-10)
    assert residuals["double"].residual == pytest.approx(1, rel=1e-10)
    assert residuals["without 1/L"].residual == pytest.approx(len(weights) - 1, rel=1e-10)
    assert residuals["zero"].residual == pytest.approx(1, rel=1e-10)
    identity = np.eye(len(oracle.fisher))
    assert residuals["identity"].residual == pytest.approx(oracle.residual(identity), rel=1e-10)
    assert residuals["identity"].residual > 0.3
    assert residuals["negative"].cosine == pytest.approx(-oracle.cosine(oracle.layerwise), rel=1e-9)
    assert residuals["double"].length == pytest.approx(2 * oracle.length(oracle.layerwise), rel=1e-9)
    assert np.isnan(residuals["zero"].cosine)
    assert residuals["zero"].length == 0


# --------------------------------------------------------------------- any matrix of the user


@pytest.mark.parametrize("name", NETWORKS)
def test_a_random_inner_inverse_passes(name: str) -> None:
    arrays = network(**NETWORKS[name])
    weights, task = given(NUMPY, *arrays)
    oracle = Dense(*arrays)
    c = oracle.inner_inverse(3)
    np.testing.assert_allclose(oracle.fisher @ c @ oracle.fisher, oracle.fisher, atol=1e-10)
    check = ng.check_preconditioner(oracle.apply(c), weights, task)
    assert check.residual <= 1e-10
    assert check.cosine == pytest.approx(oracle.cosine(c), rel=1e-9)
    assert check.length == pytest.approx(oracle.length(c), rel=1e-9)
    assert check.length >= 1 - 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_a_random_matrix_is_measured(name: str) -> None:
    arrays = network(**NETWORKS[name])
    weights, task = given(NUMPY, *arrays)
    oracle = Dense(*arrays)
    c = np.random.default_rng(4).standard_normal(oracle.fisher.shape)
    check = ng.check_preconditioner(oracle.apply(c), weights, task)
    assert check.residual == pytest.approx(oracle.residual(c), rel=1e-9)
    assert check.residual > 0.1
    assert check.cosine == pytest.approx(oracle.cosine(c), rel=1e-8)
    assert check.length == pytest.approx(oracle.length(c), rel=1e-9)


def test_a_small_fault_is_measured() -> None:
    """One entry of C off by 1e-6 shows as that, not as rounding."""
    arrays = network(**NETWORKS["wide"])
    weights, task = given(NUMPY, *arrays)
    oracle = Dense(*arrays)
    c = oracle.inner_inverse(5)
    c[3, 7] += 1e-6
    check = ng.check_preconditioner(oracle.apply(c), weights, task)
    assert check.residual == pytest.approx(oracle.residual(c), rel=1e-4)
    assert 1e-9 < check.residual < 1e-4


# ----------------------------------------------------------------------- batches, libraries


@pytest.mark.parametrize("name", ["wide", "bottleneck, singular Σ"])
def test_a_stack_is_its_members(name: str) -> None:
    members = [network(**NETWORKS[name], seed=seed) for seed in range(3)]
    stacked = [np.stack(parts) for parts in zip(*(m[0] for m in members), strict=True)]
    moments = [np.stack(parts) for parts in zip(*(m[1] for m in members), strict=True)]
    weights, task = given(NUMPY, stacked, moments)
    oracles = [Dense(*m) for m in members]
    mixed = [oracles[0].inner_inverse(1), oracles[1].layerwise + 0.1, oracles[2].inner_inverse(1)]
    check = ng.check_preconditioner(oracles[0].apply(np.stack(mixed)), weights, task)
    expected = [(o.residual(c), o.cosine(c), o.length(c)) for o, c in zip(oracles, mixed, strict=True)]
    np.testing.assert_allclose(np.stack(check, axis=-1), expected, rtol=1e-8, atol=1e-10)
    assert (check.residual[[0, 2]] < 1e-10).all()
    assert check.residual[1] > 0.01


def test_a_callable_sees_gradients_of_the_whole_batch() -> None:
    """Also where layers and task broadcast, so that it may stack the layers."""
    (first, second), moments = network((3, 4, 2))
    weights, task = given(NUMPY, (first[None], second), [np.stack([m, 2 * m]) for m in moments])
    shapes = set()

    def identity(gradient: Any) -> Any:
        shapes.add(tuple(g.shape for g in gradient))
        return gradient

    check = ng.check_preconditioner(identity, weights, task)
    assert shapes == {((2, 4, 3), (2, 2, 4))}
    assert check.residual.shape == (2,)
    one, task = given(NUMPY, (np.ones((2, 3)),), moments)
    check = ng.check_preconditioner(dl.fisher((np.ones((5, 2, 3)),), task).precondition, (np.ones((5, 2, 3)),), task)
    assert check.residual.shape == (5,)
    assert check.residual.max() < 1e-10
    assert ng.check_preconditioner(identity, one, task).residual.shape == ()


def test_a_bad_member_is_bad_alone() -> None:
    members = [network(**NETWORKS["wide"], seed=seed) for seed in range(3)]
    stacked = [np.stack(parts) for parts in zip(*(m[0] for m in members), strict=True)]
    moments = [np.stack(parts) for parts in zip(*(m[1] for m in members), strict=True)]
    stacked[1][1, 0, 0] = np.nan
    weights, task = given(NUMPY, stacked, moments)
    for inverse in ("layerwise", "exact", "moore_penrose"):
        apply = functools.partial(dl.fisher(weights, task).precondition, inverse=inverse)
        for values in ng.check_preconditioner(apply, weights, task):
            assert np.isnan(values).tolist() == [False, True, False]
        assert ng.check_preconditioner(apply, weights, task).residual[[0, 2]].max() < 1e-10


def test_networks_that_cannot_move_or_need_not() -> None:
    weights, moments = network((3, 4, 2))
    zero, task = given(NUMPY, [0 * w for w in weights], moments)
    still = ng.check_preconditioner(lambda g: g, zero, task)
    assert still.residual == 0  # F = 0, and every C has F C F = F
    assert np.isnan(still.cosine)
    assert np.isnan(still.length)
    optimum = np.linalg.solve(moments[0], moments[2].T).T
    done, task = given(NUMPY, (np.eye(3), optimum), (moments[0], np.eye(2), optimum @ moments[0], moments[3]))
    reached = ng.check_preconditioner(dl.fisher(done, task).precondition, done, task)
    assert reached.residual < 1e-10


@pytest.mark.parametrize("name", ["wide", "bottleneck"])
def test_float32(name: str) -> None:
    weights, task = given(NUMPY, *network(**NETWORKS[name]), dtype="float32")
    fisher = dl.fisher(weights, task)
    for inverse in ("exact", "moore_penrose"):
        check = ng.check_preconditioner(functools.partial(fisher.precondition, inverse=inverse), weights, task)
        assert {a.dtype for a in check} == {np.dtype("float32")}
        assert check.residual <= 1e-3
    assert ng.check_preconditioner(scaled(-1.0, fisher.precondition), weights, task).residual > 1


def test_every_library(backend: Backend) -> None:
    arrays = network((2, 3, 2))
    oracle = Dense(*arrays)
    identity, rule = np.eye(len(oracle.fisher)), oracle.layerwise
    expected = oracle.residual(identity), oracle.cosine(rule), oracle.length(rule)
    on = [backend.asarray(a) for a in (*arrays[0], *arrays[1])]

    def run(first: Any, second: Any, *moments: Any) -> Any:
        weights, task = (first, second), ng.GaussianTask(*moments)
        fisher = dl.fisher(weights, task)
        return (
            tuple(ng.check_preconditioner(fisher.precondition, weights, task)),
            ng.check_preconditioner(lambda g: g, weights, task).residual,
        )

    (residual, cosine, length), identity = backend.call(run, *on)
    for array in (residual, cosine, length, identity):
        backend.check(array, on[0])
    tolerance = 1e-10 if backend.float64 else 1e-3
    assert backend.to_numpy(residual) <= tolerance
    found = [float(backend.to_numpy(a)) for a in (identity, cosine, length)]
    np.testing.assert_allclose(found, expected, rtol=tolerance)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("apply", "error", "message"),
    [
        ("layerwise", TypeError, "apply must be callable, got str 'layerwise'"),
        (None, TypeError, "apply must be callable, got NoneType"),
        (lambda g: None, TypeError, r"apply returns must be a tuple or list .*got NoneType"),
        (lambda g: g[0], TypeError, r"apply returns must be a tuple or list .*got a numpy array"),
        (lambda g: (), ValueError, "apply returns must be .*got an empty tuple"),
        (lambda g: g[:1], ValueError, "apply returns must have one array for each of 2 layers, got 1"),
        (lambda g: g[::-1], ValueError, r"apply returns\[0\] must have shape \(\*batch, 4, 3\)"),
        (lambda g: (g[0], 1.0), TypeError, r"apply returns\[1\] must be an array"),
        (lambda g: (g[0], g[1].tolist()), TypeError, r"apply returns\[1\] must be an array"),
        (lambda g: (g[0], g[1].astype(int)), TypeError, r"apply returns\[1\] must have dtype float32 or float64"),
        (lambda g: tuple(d.astype("float32") for d in g), TypeError, "apply returns.*dtype"),
        (
            lambda g: tuple(np.stack([d, d]) for d in g),
            ValueError,
            r"apply returns must have batch axes that broadcast to \(\), got \(2,\)",
        ),
    ],
)
def test_bad_callables(apply: Any, error: type[Exception], message: str) -> None:
    weights, task = given(NUMPY, *network((3, 4, 2)))
    with pytest.raises(error, match=message):
        ng.check_preconditioner(apply, weights, task)


def test_errors_of_the_callable_come_through() -> None:
    weights, task = given(NUMPY, *network((3, 4, 2)))

    def broken(gradient: Any) -> Any:
        raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        ng.check_preconditioner(broken, weights, task)


def test_bad_networks_and_tasks() -> None:
    weights, task = given(NUMPY, *network((3, 4, 2)))
    with pytest.raises(TypeError, match="weights must be a tuple or list"):
        ng.check_preconditioner(lambda g: g, weights[0], task)
    with pytest.raises(TypeError, match="task must be a GaussianTask, got NoneType"):
        ng.check_preconditioner(lambda g: g, weights, None)
    with pytest.raises(ValueError, match="weights must lead from the task's 3 inputs to its 2 outputs"):
        ng.check_preconditioner(lambda g: g, weights[:1], task)


def test_a_check_that_does_not_fit_says_so_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    weights, task = given(NUMPY, *network((3, 4, 2)))
    monkeypatch.setattr("natgrad_array._arrays.memory.available_bytes", lambda array: 100)
    with pytest.raises(ValueError, match=r"the matrix S of shape \(12, 6\) needs about .* check a smaller network"):
        ng.check_preconditioner(calls.append, weights, task)
    assert calls == []
