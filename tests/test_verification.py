"""`verify`: quiet on every sound network, and loud, in the right row, for every fault."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from backends import BACKENDS, JAX, JAX_JIT, NUMPY, Backend
from cases import orthogonal

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array.deep_linear.fisher import DeepLinearFisher
from natgrad_array.verification import Report, Row
from natgrad_array.verification.claims import CLAIMS

EQUATIONS = [equation for equation, _, _ in CLAIMS]

# ----------------------------------------------------------------- networks and tasks


def layers(sizes: tuple[int, ...], seed: int = 0, singular: int | None = None) -> list[np.ndarray]:
    """A network whose products are all well conditioned; one layer may lack a direction."""
    rng = np.random.default_rng(seed)
    bases = [orthogonal(rng, n) for n in sizes]
    weights = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        rank = min(m, n) - (i == singular)
        scale = rng.uniform(0.8, 1.25, rank)
        layer = (bases[i + 1][:, :rank] * scale) @ bases[i][:, :rank].T
        weights.append((np.eye(m) + 0.1 / m**0.5 * rng.standard_normal((m, m))) @ layer)
    return weights


def moments(n_in: int, n_out: int, seed: int = 0, rank: int | None = None) -> tuple[np.ndarray, ...]:
    """Σ (of the given rank), Σ̃, M and ⟨yyᵀ⟩ of a task that leaves an error of its own."""
    rng = np.random.default_rng(1000 + seed)
    spectrum = np.where(np.arange(n_in) < (n_in if rank is None else rank), rng.uniform(0.2, 1.6, n_in), 0.0)
    basis = orthogonal(rng, n_in)
    inputs = (basis * spectrum) @ basis.T
    basis = orthogonal(rng, n_out)
    noise = (basis * rng.uniform(0.3, 1.5, n_out)) @ basis.T
    teacher, residual = rng.standard_normal((n_out, n_in)), rng.standard_normal((n_out, 2 * n_out))
    cross = teacher @ inputs
    outputs = cross @ teacher.T + residual @ residual.T / n_out
    return (inputs + inputs.T) / 2, (noise + noise.T) / 2, cross, (outputs + outputs.T) / 2


class Problem(NamedTuple):
    """A network and the moments of its task, both NumPy."""

    weights: list[np.ndarray]
    moments: tuple[np.ndarray, ...]

    def on(self, backend: Backend = NUMPY, dtype: str = "float64") -> tuple[tuple[Any, ...], ng.GaussianTask]:
        weights = tuple(backend.asarray(w.astype(dtype)) for w in self.weights)
        return weights, ng.GaussianTask(*(backend.asarray(m.astype(dtype)) for m in self.moments))

    def member(self, k: int) -> Problem:
        return Problem([w[k] for w in self.weights], tuple(m[k] for m in self.moments))


def problem(
    sizes: tuple[int, ...],
    seed: int = 0,
    rank: int | None = None,
    singular: int | None = None,
    members: int | None = None,
) -> Problem:
    if members is None:
        return Problem(layers(sizes, seed, singular), moments(sizes[0], sizes[-1], seed, rank))
    alone = [problem(sizes, 10 * seed + k, rank, singular) for k in range(members)]
    return Problem(
        [np.stack(parts) for parts in zip(*(p.weights for p in alone), strict=True)],
        tuple(np.stack(parts) for parts in zip(*(p.moments for p in alone), strict=True)),
    )


# ------------------------------------------------------------------------ dense oracles


def product(weights: list[np.ndarray], n_in: int) -> np.ndarray:
    """W_i ⋯ W_1 of layers with so many inputs; the identity of no layers."""
    return functools.reduce(lambda a, b: b @ a, weights, np.eye(n_in))


class Dense(NamedTuple):
    """One network's matrices, formed in full."""

    ahead: list[np.ndarray]
    behind: list[np.ndarray]
    jacobian: np.ndarray  # A, Eq 20
    one_layer: np.ndarray  # B, Eq 21
    gradient: np.ndarray


def dense(weights: list[np.ndarray], task: tuple[np.ndarray, ...]) -> Dense:
    inputs, noise, cross, _ = task
    ahead = [functools.reduce(np.matmul, weights[:i:-1], np.eye(weights[-1].shape[0])) for i in range(len(weights))]
    behind = [product(weights[:i], weights[0].shape[1]) for i in range(len(weights))]
    jacobian = np.concatenate([np.kron(b, a.T) for a, b in zip(ahead, behind, strict=True)])
    error = np.linalg.solve(noise, ahead[0] @ weights[0] @ inputs - cross)
    return Dense(ahead, behind, jacobian, np.kron(inputs, np.linalg.inv(noise)), jacobian @ error.T.ravel())


def condition(weights: list[np.ndarray], task: tuple[np.ndarray, ...]) -> float:
    """The worst condition number of a product or of a moment, zeros left out."""
    d = dense(weights, task)
    worst = 1.0
    for matrix in (*d.ahead, *d.behind, task[0], task[1]):
        s = np.linalg.svd(matrix, compute_uv=False)
        s = s[s > 1e-10 * s[0]]
        worst = max(worst, float(s[0] / s[-1]))
    return worst


def layerwise_deviation(weights: list[np.ndarray], task: tuple[np.ndarray, ...]) -> float:
    """‖v_layerwise − v_exact‖ / ‖v_exact‖ in the metric B, from dense pseudo-inverses."""
    d = dense(weights, task)
    exact = d.jacobian.T @ np.linalg.pinv(d.jacobian @ d.one_layer @ d.jacobian.T, rcond=1e-10) @ d.gradient
    inputs, precision = task[0], np.linalg.inv(task[1])
    direction, start = [], 0
    for a, b in zip(d.ahead, d.behind, strict=True):
        block = np.kron(b @ inputs @ b.T, a.T @ precision @ a)
        direction.append(np.linalg.pinv(block, rcond=1e-10) @ d.gradient[start : start + block.shape[0]])
        start += block.shape[0]
    gap = d.jacobian.T @ np.concatenate(direction) / len(weights) - exact
    return float(np.sqrt(gap @ d.one_layer @ gap) / np.sqrt(exact @ d.one_layer @ exact))


def failed(report: Report) -> set[str]:
    """The rows that fail in any member."""
    return {row.equation for row in report.rows if row.holds is not None and not np.all(np.asarray(row.holds))}


def skipped(report: Report) -> set[str]:
    return {row.equation for row in report.rows if row.holds is None}


# ------------------------------------------------------------------- sound networks hold

SQUARE_ROWS = {"33–34", "33, 36", "one inverse"}
NETWORKS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    # name: how it is made, its regime, the rows that do not apply
    "one layer": ({"sizes": (4, 3)}, "wide", SQUARE_ROWS | {"balance"}),
    "one square layer": ({"sizes": (3, 3)}, "wide", {"balance"}),
    "one layer, singular Σ": ({"sizes": (5, 3), "rank": 3}, "wide", SQUARE_ROWS | {"balance"}),
    "wide": ({"sizes": (4, 6, 3)}, "wide", SQUARE_ROWS),
    "wide, deep": ({"sizes": (3, 5, 4, 4, 6, 2)}, "wide", SQUARE_ROWS),
    "wide for the rank of Σ": ({"sizes": (6, 4, 5, 3), "rank": 4}, "wide", SQUARE_ROWS),
    "square": ({"sizes": (3, 3, 3, 3)}, "wide", set()),
    "square, singular Σ": ({"sizes": (4, 4, 4), "rank": 3}, "wide", SQUARE_ROWS),
    "intermediate": ({"sizes": (6, 5, 4, 3)}, "intermediate", SQUARE_ROWS | {"exact rule, wide", "regimes"}),
    "intermediate, singular Σ": (
        {"sizes": (6, 3, 3), "rank": 4},
        "intermediate",
        SQUARE_ROWS | {"exact rule, wide", "regimes"},
    ),
    "bottleneck": ({"sizes": (5, 2, 5)}, "bottleneck", SQUARE_ROWS | {"exact rule, wide", "regimes", "24–30"}),
    "bottleneck, deep": (
        {"sizes": (4, 5, 2, 3, 3, 4), "rank": 3},
        "bottleneck",
        SQUARE_ROWS | {"exact rule, wide", "regimes", "24–30"},
    ),
    # W_2 of rank 2 among layers of rank 3: the first and the last alone realise all there is.
    "singular layer": (
        {"sizes": (3, 3, 3, 3), "singular": 1},
        "wide",
        SQUARE_ROWS | {"exact rule, wide", "regimes", "short form"},
    ),
    "singular layer at a bottleneck": (
        {"sizes": (4, 3, 4, 4), "singular": 1},
        "bottleneck",
        SQUARE_ROWS | {"exact rule, wide", "regimes", "24–30", "short form"},
    ),
}


@pytest.mark.parametrize("members", [None, 3], ids=["single", "stacked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_claim_that_applies_holds(name: str, members: int | None) -> None:
    options, regime, missing = NETWORKS[name]
    p = problem(**options, seed=3, members=members)
    singles = [p] if members is None else [p.member(k) for k in range(members)]
    assert max(condition(*single) for single in singles) <= 30
    report = ng.verify(*p.on())
    assert report.regime == regime
    assert report.batch_shape == (() if members is None else (members,))
    assert skipped(report) == missing, report
    assert failed(report) == set(), report
    assert report.holds is True if members is None else report.holds.tolist() == [True] * members
    applied = [row for row in report.rows if row.holds is not None]
    assert max(float(np.max(row.residual)) for row in applied) <= 1e-10

    # In float32 a claim may be beyond the precision, but none fails and all are near.
    single_precision = ng.verify(*p.on(dtype="float32"))
    assert failed(single_precision) == set(), single_precision
    for row in applied:
        low = single_precision[row.equation]
        assert low.residual.dtype == low.tolerance.dtype == np.float32
        assert np.max(low.residual) <= 1e-3, low.equation
    decided = [row for row in applied if single_precision[row.equation].holds is not None]
    assert len(decided) >= 0.6 * len(applied), single_precision


@pytest.mark.parametrize("library", [b for b in BACKENDS if b not in (NUMPY, JAX_JIT)], ids=str)
def test_holds_on_every_library(library: Backend) -> None:
    # JAX compiles every operation of a new shape: one network is enough there.
    names = ["square"] if library is JAX else ["square", "bottleneck, deep", "singular layer"]
    library.activate()
    try:
        for name in names:
            options, regime, missing = NETWORKS[name]
            weights, task = problem(**options, seed=4, members=2).on(library)
            report = ng.verify(weights, task)
            assert report.regime == regime
            assert skipped(report) - missing == set() if library.float64 else True
            assert library.to_numpy(report.holds).tolist() == [True, True], report
            for row in report.rows:
                library.check(row.residual, weights[0])
                library.check(row.tolerance, weights[0])
                if row.holds is not None:
                    library.check(row.holds, weights[0], dtype=library.xp.bool)
                    assert library.to_numpy(row.residual).max() <= (1e-10 if library.float64 else 1e-3)
            assert str(report).endswith("holds for 2 of 2")
    finally:
        library.deactivate()


@pytest.mark.parametrize("name", ["wide", "intermediate", "intermediate, singular Σ", "bottleneck", "singular layer"])
def test_the_regimes_row_measures_the_layerwise_rule(name: str) -> None:
    p = problem(**NETWORKS[name][0], seed=5)
    measured = float(ng.verify(*p.on())["regimes"].residual)
    expected = layerwise_deviation(*p)
    assert measured == pytest.approx(expected, abs=1e-12, rel=1e-9)
    assert expected < 1e-12 if name == "wide" else expected > 0.02


def test_a_bad_member_fails_alone() -> None:
    p = problem((3, 4, 3), members=4)
    p.weights[0][1, 0, 0] = np.nan
    p.moments[2][2, 1, 1] = np.inf
    report = ng.verify(*p.on())
    assert report.holds.tolist() == [True, False, False, True]
    alone = ng.verify(*p.member(3).on())
    for row in report.rows:
        np.testing.assert_array_equal(np.isnan(row.residual[[0, 3]]), np.isnan(alone[row.equation].residual))
        if row.holds is not None:
            assert row.holds[[0, 3]].all()
    assert "2 of 4" in str(report)
    assert ng.verify(*p.member(1).on()).holds is False


def test_regimes_mix_in_a_stack() -> None:
    """A claim that does not apply to a member is not held against it."""
    p = problem((3, 3, 3, 3), members=2)
    p.weights[1][1] = layers((3, 3, 3, 3), singular=1)[1]
    report = ng.verify(*p.on())
    assert report.holds.tolist() == [True, True]
    row = report["regimes"]
    assert row.residual[0] < 1e-12
    assert row.residual[1] > 0.01 > row.tolerance[1]
    assert row.holds.tolist() == [True, True]


def test_ill_conditioned_networks_raise_no_alarm(dtype: str) -> None:
    """Sixteen square Gaussian layers of width 20: a condition number near 3e15."""
    weights = list(dl.gaussian(1, (20,) * 17, like=np.empty(0)))
    report = ng.verify(*Problem(weights, moments(20, 20)).on(dtype=dtype))
    assert failed(report) == set(), report
    for equation in ("23", "31–32", "33–34", "33, 36", "one inverse", "regimes", "exact velocity"):
        assert report[equation].holds is None


@pytest.mark.parametrize("kind", ["gaussian", "scaled", "damaged"])
def test_random_networks_raise_no_alarm(kind: str, dtype: str) -> None:
    for seed in range(25):
        rng = np.random.default_rng([seed, len(kind)])
        sizes = tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(2, 7)))
        rank = int(rng.integers(1, sizes[0] + 1)) if seed % 3 == 0 else None
        weights = list(dl.gaussian(seed, sizes, like=np.empty(0)))
        if kind == "scaled":
            weights = [w * 10.0 ** rng.uniform(-2, 2) for w in weights]
        elif kind == "damaged":
            i = int(rng.integers(len(weights)))
            row = int(rng.integers(weights[i].shape[0]))
            weights[i] = 0.0 * weights[i] if seed % 2 else weights[i] * (np.arange(weights[i].shape[0]) != row)[:, None]
        report = ng.verify(*Problem(weights, moments(sizes[0], sizes[-1], seed, rank)).on(dtype=dtype))
        assert report.holds is True, f"{seed} {sizes} {rank}\n{report}"


@pytest.mark.parametrize(("sizes", "damaged"), [((11, 2, 7, 10, 8), 2), ((11, 3, 11, 4, 9, 9), 3), ((9, 9, 9, 9), 1)])
def test_a_layer_of_rank_one_in_a_larger_network(sizes: tuple[int, ...], damaged: int) -> None:
    """Too large for a dense root: F⁺ iterates, on a kernel that is singular in most directions."""
    p = problem(sizes, seed=2)
    u, s, vh = np.linalg.svd(p.weights[damaged])
    p.weights[damaged][...] = s[0] * np.outer(u[:, 0], vh[0])
    report = ng.verify(*p.on())
    assert report.holds is True, report
    for equation in ("23", "Penrose", "31–32", "exact velocity", "F⁺∇, shortest"):
        assert report[equation].residual <= 1e-10


def test_large_networks_skip_what_needs_a_dense_matrix() -> None:
    report = ng.verify(*problem((40, 40, 40)).on())
    assert report.holds is True
    assert report["22, rank"].holds is None
    assert report["20, kernel"].holds is None
    assert np.isnan(report["22, rank"].residual)


def test_zero_networks_and_empty_stacks() -> None:
    zero = ng.verify(tuple(0.0 * w for w in layers((3, 4, 2))), ng.GaussianTask(*moments(3, 2)))
    assert zero.holds is True
    nothing = ng.verify(tuple(np.empty((0, *w.shape)) for w in layers((3, 4, 2))), ng.GaussianTask(*moments(3, 2)))
    assert nothing.batch_shape == (0,)
    assert nothing.holds.shape == (0,)
    assert "holds for 0 of 0" in str(nothing)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 3, 3, 2), (4, 4, 4), (5, 3, 4, 2)])
def test_learned_networks_hold(sizes: tuple[int, ...], dtype: str) -> None:
    """At the optimum gradient and directions are rounding, and no alarm."""
    p = problem(sizes)
    optimum = np.linalg.solve(p.moments[0], p.moments[2].T).T
    p.weights[0][...] = np.linalg.pinv(product(p.weights[1:], sizes[1])) @ optimum
    weights, task = p.on(dtype=dtype)
    assert dl.excess_loss(weights, task) < 1e-9 * dl.loss(weights, task)
    assert ng.verify(weights, task).holds is True


def test_batches_broadcast_between_layers_and_task() -> None:
    p = problem((3, 4, 3), members=3)
    weights = (p.weights[0][:, None], p.weights[1][0])
    task = ng.GaussianTask(*(m[:2] for m in p.moments))
    report = ng.verify(weights, task)
    assert report.batch_shape == (3, 2)
    assert all(row.residual.shape == row.tolerance.shape == (3, 2) for row in report.rows)
    assert report.holds.tolist() == [[True] * 2] * 3


# ------------------------------------------------------------------------ faults are seen


def negative(tangent: Any) -> Any:
    return tuple(-d for d in tangent)


class Fault(NamedTuple):
    """A bug, a network that shows it, and the rows that must fail: these and no others."""

    plant: Callable[[pytest.MonkeyPatch], None]
    network: dict[str, Any]
    rows: set[str]


FAULTS: dict[str, Fault] = {}
WIDE: dict[str, Any] = {"sizes": (3, 5, 4, 3)}
SQUARE: dict[str, Any] = {"sizes": (3, 3, 3, 3)}
BOTTLENECK: dict[str, Any] = {"sizes": (4, 2, 3, 4)}
SINGULAR: dict[str, Any] = {"sizes": (3, 3, 3, 3), "singular": 1}
DEAD_INPUTS: dict[str, Any] = {"sizes": (5, 4, 4, 3), "rank": 3}


def fault(name: str, network: dict[str, Any], rows: set[str]) -> Callable[[Any], Any]:
    def enter(plant: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        assert name not in FAULTS
        FAULTS[name] = Fault(plant, network, rows)
        return plant

    return enter


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by one that is given the original before its arguments."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(lambda *args, **kwargs: change(original, *args, **kwargs)))


def change_inverse(patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Change natural_gradient and F.precondition alike: `change(apply, inverse)` gives the direction."""

    def gradient(original: Any, weights: Any, task: Any, /, *, inverse: str = "layerwise") -> Any:
        return change(lambda i: original(weights, task, inverse=i), inverse)

    def precondition(original: Any, self: Any, tangent: Any, /, *, inverse: str = "layerwise") -> Any:
        return change(lambda i: original(self, tangent, inverse=i), inverse)

    wrap(patch, dl, "natural_gradient", gradient)
    wrap(patch, DeepLinearFisher, "precondition", precondition)


@fault("the loss lacks its half", WIDE, {"3–4"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "loss", lambda f, *a: 2 * f(*a))


@fault("the excess loss is the loss", WIDE, {"3–4"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "excess_loss", dl.loss)


@fault("the minimum loss is zero", WIDE, {"3–4"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ng.GaussianTask, "minimum_loss", lambda f, task: 0 * f(task))


GRADIENT_ROWS = {"7–13", "20, kernel", "exact velocity", "35–37", "38–42", "modes"}


@fault("the sign of the gradient", WIDE, GRADIENT_ROWS)
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "gradient", lambda f, *a: negative(f(*a)))


@fault("the sign of the gradient, square layers", SQUARE, GRADIENT_ROWS | {"33, 36"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "gradient", lambda f, *a: negative(f(*a)))


@fault("one layer's gradient is left out", WIDE, GRADIENT_ROWS | {"balance"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "gradient", lambda f, *a: tuple(g * (i != 1) for i, g in enumerate(f(*a))))


@fault(
    "the sign of the natural gradient",
    WIDE,
    {"24–30", "exact velocity", "exact rule", "35–37", "38–42", "43–45", "regimes", "modes"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "natural_gradient", lambda f, *a, **k: negative(f(*a, **k)))


@fault(
    "the optimum is M, not MΣ⁺",
    SQUARE,
    {"3–4", "W*, Σ⁺", "24–30", "short form", "33–34", "one inverse", "43–45", "30, flow", "Euler"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ng.GaussianTask, "optimum", lambda task: task.cross_moment)


@fault("the optimum is slightly off", DEAD_INPUTS, {"W*, Σ⁺", "24–30", "short form", "43–45", "30, flow", "Euler"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ng.GaussianTask, "optimum", lambda f, task: f(task) * (1 + 1e-8))


# ----------------------------------------------------------------- faults: Fisher matrix


@fault(
    "the noise of p* (residuals) in place of that of p_θ",
    WIDE,
    {"13–17", "14–19", "20–22", "31–32", "exact velocity", "35–37", "38–42"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    def residual_fisher(original: Any, weights: Any, task: Any) -> Any:
        product = dl.end_to_end(weights)
        mixed = product @ task.cross_moment.mT
        residuals = task.output_moment - mixed - mixed.mT + product @ task.input_moment @ product.mT
        residuals = (residuals + residuals.mT) / 2
        return original(weights, ng.GaussianTask(task.input_moment, residuals, task.cross_moment, task.output_moment))

    wrap(patch, dl, "fisher", residual_fisher)


def _diagonal_matvec(original: Any, self: Any, tangent: Any) -> Any:
    alone = [tuple(d * (k == i) for k, d in enumerate(tangent)) for i in range(len(tangent))]
    return tuple(original(self, part)[i] for i, part in enumerate(alone))


@fault(
    "matvec drops the blocks between layers",
    WIDE,
    {"14–19", "20–22", "23", "Penrose", "24–30", "exact velocity", "F⁺∇, shortest"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "matvec", _diagonal_matvec)


def _diagonal_factors(original: Any, self: Any, i: int, j: int) -> Any:
    forward, backward = original(self, i, j)
    return (forward, backward) if i == j else (0 * forward, backward)


@fault("factors drop the blocks between layers", WIDE, {"14–19"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "factors", _diagonal_factors)


@fault("factors drop the blocks between layers, square layers", SQUARE, {"14–19", "33, 36"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "factors", _diagonal_factors)


@fault("the dense matrix stacks rows", WIDE, {"14–19"})
def _(patch: pytest.MonkeyPatch) -> None:
    def by_rows(original: Any, self: Any) -> Any:
        start, order = 0, []
        for layer in self._layers:
            m, n = layer.shape[-2:]
            order.append(start + np.arange(m * n).reshape(n, m).T.ravel())
            start += m * n
        index = np.concatenate(order)
        return original(self)[np.ix_(index, index)]

    wrap(patch, DeepLinearFisher, "to_dense", by_rows)


@fault("the kernel has its two factors swapped", WIDE, {"20, kernel"})
def _(patch: pytest.MonkeyPatch) -> None:
    def swapped(original: Any, weights: Any) -> Any:
        n = weights[0].shape[-1]
        return original(weights).reshape(n, n, n, n).transpose(1, 0, 3, 2).reshape(n * n, n * n)

    wrap(patch, dl, "end_to_end_kernel", swapped)


@fault("the rank is one too high", BOTTLENECK, {"22, rank", "widths"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "rank", lambda f, self: f(self) + 1)


@fault("the rank is one too low", SINGULAR, {"22, rank"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "rank", lambda f, self: f(self) - 1)


@fault("the spectrum has lost an eigenvalue", WIDE, {"22, rank"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, DeepLinearFisher, "spectrum", lambda f, self: f(self) * (np.arange(9) > 0))


@fault("every network is called wide", BOTTLENECK, {"widths"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "regime", lambda *a: "wide")


@fault("a wide network is called a bottleneck", WIDE, {"widths"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "regime", lambda *a: "bottleneck")


# --------------------------------------------------------------------- faults: inverses


def _unscaled_layerwise(depth: int) -> Callable[..., Any]:
    return lambda apply, i: tuple(depth * d for d in apply(i)) if i == "layerwise" else apply(i)


@fault("the layerwise rule lacks 1/L", WIDE, {"exact rule, wide", "35–37", "38–42", "43–45", "regimes"})
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, _unscaled_layerwise(3))


@fault("the layerwise rule lacks 1/L, at a bottleneck", BOTTLENECK, {"35–37", "38–42", "43–45"})
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, _unscaled_layerwise(3))


@fault("the layerwise rule lacks 1/L as an operator only", WIDE, {"exact rule, wide", "38–42"})
def _(patch: pytest.MonkeyPatch) -> None:
    def unscaled(original: Any, self: Any, tangent: Any, /, *, inverse: str = "layerwise") -> Any:
        return _unscaled_layerwise(3)(lambda i: original(self, tangent, inverse=i), inverse)

    wrap(patch, DeepLinearFisher, "precondition", unscaled)


def _first_layer_alone(inverse: str) -> Callable[..., Any]:
    """In the wide regime one layer can do it all: the right velocity by another rule."""

    def change(apply: Callable[[str], Any], i: str) -> Any:
        direction = apply(i)
        return tuple(len(direction) * d * (k == 0) for k, d in enumerate(direction)) if i == inverse else direction

    return change


@fault(
    "the layerwise rule moves one layer by the whole",
    SQUARE,
    {"exact rule, wide", "33–34", "33, 36", "35–37", "one inverse", "38–42"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, _first_layer_alone("layerwise"))


@fault("the exact rule moves one layer by the whole", SQUARE, {"exact rule, wide"})
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, _first_layer_alone("exact"))


@fault(
    "the exact rule is the layerwise one",
    BOTTLENECK,
    {"23", "31–32", "exact velocity", "exact rule", "F⁺∇, shortest"},  # a rule that stops short may be shorter
)
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, lambda apply, i: apply("layerwise" if i == "exact" else i))


@fault(
    "the exact rule is off by a millionth",
    DEAD_INPUTS,
    {"23", "24–30", "31–32", "exact velocity", "exact rule", "exact rule, wide"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, lambda apply, i: tuple((1 + 1e-6 * (i == "exact")) * d for d in apply(i)))


@fault("Moore–Penrose is the exact layerwise rule", BOTTLENECK, {"Penrose", "F⁺∇, shortest", "balance"})
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, lambda apply, i: apply("exact" if i == "moore_penrose" else i))


@fault(
    "Moore–Penrose has the wrong sign",
    WIDE,
    {"23", "Penrose", "24–30", "31–32", "exact velocity", "F⁺∇, shortest", "modes"},
)
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, lambda apply, i: negative(apply(i)) if i == "moore_penrose" else apply(i))


@fault("the block-diagonal rule has 1/L", WIDE, {"35–37"})
def _(patch: pytest.MonkeyPatch) -> None:
    change_inverse(patch, lambda apply, i: apply("layerwise" if i == "block_diagonal" else i))


# ------------------------------------------------------------------- faults: velocities


def _short_velocity(weights: Any, task: Any) -> Any:
    """G̃ − (I − UUᵀ) G̃ (I − VVᵀ), descent sign."""
    k = task.factors
    moves = k.whiten(dl.end_to_end(weights) @ k.input_root)
    u, s, vh = np.linalg.svd(moves, full_matrices=False)
    u, vh = u[:, s > 1e-12 * s[0]], vh[s > 1e-12 * s[0]]
    g = moves - k.target
    left = g - u @ (u.T @ g)
    return k.unwhiten((g - left + (left @ vh.T) @ vh) @ k.input_root_pinv)


@fault("the short velocity formula on a singular layer", SINGULAR, {"exact velocity", "exact rule"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "exact_velocity", _short_velocity)


@fault("the exact velocity is W − W* at a bottleneck", BOTTLENECK, {"exact velocity", "short form", "exact rule"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "exact_velocity", lambda weights, task: dl.end_to_end(weights) - task.optimum())


@fault("the sign of the exact velocity", WIDE, {"exact velocity", "short form", "exact rule", "regimes"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "exact_velocity", lambda f, *a: -f(*a))


@fault("the end-to-end velocity leaves out the last layer", WIDE, {"20, kernel", "27–28", "modes"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "end_to_end_velocity", lambda f, w, d: f(w, (*d[:-1], 0 * d[-1])))


@fault("the projections are identities", BOTTLENECK, {"43–45"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "projections", lambda w, task: [(np.eye(4), np.eye(4)) for _ in w])


@fault("the two projections of a layer are swapped", BOTTLENECK, {"43–45"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "projections", lambda f, *a: [(right, left) for left, right in f(*a)])


# --------------------------------------------------------------------- faults: dynamics


@fault("the balance is a sum", WIDE, {"balance"})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl, "balancedness", lambda w: [b.T @ b + a @ a.T for a, b in itertools.pairwise(w)])


@fault("the flow decays as e^{−2t}", DEAD_INPUTS, {"30, flow"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "natural_gradient_flow", lambda f, w, task, time: f(w, task, 2 * time))


@fault("the decay rate lacks its 2", WIDE, {"Euler"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "euler_decay_rate", lambda f, rate: f(rate) / 2)


@fault("a balanced network is not balanced", WIDE, {"modes"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "balanced", lambda f, *a, **k: (lambda w: (2 * w[0], *w[1:-1], w[-1] / 2))(f(*a, **k)))


@fault("a mode under the gradient lacks L", WIDE, {"modes, time"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "gradient_flow_modes", lambda f, a, s, time, depth: f(a, s, time / depth, depth=depth))


@fault("a mode under natural gradient decays twice as fast", WIDE, {"modes, time"})
def _(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, dl, "natural_gradient_flow_modes", lambda f, a, s, time: f(a, s, 2 * time))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_rows_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, network, rows = FAULTS[name]
    weights, task = problem(**network, seed=6).on()
    assert ng.verify(weights, task).holds is True
    plant(monkeypatch)
    report = ng.verify(weights, task)
    assert failed(report) == rows, report
    assert report.holds is False


def _spoil_second_flow(patch: pytest.MonkeyPatch) -> None:
    def spoil(original: Any, *args: Any) -> Any:
        moved = original(*args)
        return moved * np.where(np.arange(len(moved)) == 1, 2.0, 1.0)[:, None, None]

    wrap(patch, dl, "natural_gradient_flow", spoil)


def test_a_fault_in_one_member_fails_that_member(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, task = problem(**WIDE, members=3).on()
    _spoil_second_flow(monkeypatch)
    report = ng.verify(weights, task)
    assert report.holds.tolist() == [True, False, True]
    assert report["30, flow"].holds.tolist() == [True, False, True]
    assert failed(report) == {"30, flow"}


def test_every_claim_can_fail() -> None:
    assert set().union(*(f.rows for f in FAULTS.values())) == set(EQUATIONS)


# ------------------------------------------------------------------------------ the report


def test_rows() -> None:
    assert len(set(EQUATIONS)) == len(EQUATIONS)
    weights, task = problem((4, 3, 4), members=2).on()
    report = ng.verify(weights, task)
    assert [row.equation for row in report.rows] == EQUATIONS
    assert Row._fields == ("equation", "claim", "residual", "tolerance", "holds")
    row = report["38–42"]
    assert row is report.rows[EQUATIONS.index("38–42")]
    assert row.residual.shape == row.tolerance.shape == row.holds.shape == (2,)
    assert (row.residual <= row.tolerance).all()
    assert isinstance(ng.verify(*problem((4, 3, 4)).on())["38–42"].holds, bool)
    with pytest.raises(KeyError, match=r"no row '38'; there are 3–4, 7–13, .*modes"):
        report["38"]


def test_the_table_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_second_flow(monkeypatch)
    report = ng.verify(*problem((5, 2, 5), members=2).on())
    head, rule, *body, summary = str(report).splitlines()
    starts = [head.index(word) for word in ("equation", "claim", "residual", "tolerance", "holds")]
    assert len(body) == len(report.rows)
    for line, row in zip(body, report.rows, strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells[:2] == [row.equation, row.claim]
        assert cells[2:4] == ["-", "-"] if np.isnan(row.residual).all() else float(cells[2]) >= 0
        expected = {"30, flow": "NO, 1 of 2 fail"}.get(row.equation, "does not apply" if row.holds is None else "yes")
        assert cells[4] == expected
        assert all(line[start - 2 : start] == "  " for start in starts[1:])
    assert set(rule) == {"-", " "}
    assert summary == "2 networks, bottleneck regime: every claim that applies holds for 1 of 2"
    assert str(ng.verify(*problem((3, 3)).on())).splitlines()[-1].startswith("1 network, wide regime")


# -------------------------------------------------------------------------------- bad input


def test_lazy_arrays_are_refused() -> None:
    p = problem((2, 2, 2))
    weights, task = p.on(JAX)
    with pytest.raises(TypeError, match=r"weights and task must have values to look at.*outside of jit"):
        JAX_JIT.call(lambda *w: ng.verify(w, task).rows[0].residual, *weights)
    with pytest.raises(TypeError, match="outside of jit"):
        JAX_JIT.call(lambda *m: ng.verify(weights, ng.GaussianTask(*m)).rows[0].residual, *JAX.asarrays(*p.moments))


@pytest.mark.parametrize(
    ("weights", "task", "error", "message"),
    [
        (np.eye(3), None, TypeError, "weights must be a tuple or list of weight matrices.*got a numpy array"),
        ((), None, ValueError, "weights must be .*got an empty tuple"),
        (([[1.0]],), None, TypeError, r"weights\[0\] must be an array"),
        ((np.eye(3, dtype=int),), None, TypeError, r"weights\[0\] must have dtype float32 or float64"),
        ((np.eye(3, dtype="float32"),), None, TypeError, "dtype"),
        ((np.ones((2, 3)), np.ones((3, 3))), None, ValueError, r"weights\[1\] must have as many columns"),
        ((np.ones((3, 2)),), None, ValueError, r"weights must lead from the task's 3 inputs .*got 2 and 3"),
        ((np.ones((4, 3, 3)), np.ones((5, 3, 3))), None, ValueError, "batch shapes must broadcast"),
        ((np.eye(3),), "a task", TypeError, "task must be a GaussianTask, got str 'a task'"),
        ((np.eye(3),), moments(3, 3), TypeError, "task must be a GaussianTask, got a tuple of length 4"),
    ],
)
def test_bad_input(weights: Any, task: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ng.verify(weights, ng.GaussianTask(*moments(3, 3)) if task is None else task)
