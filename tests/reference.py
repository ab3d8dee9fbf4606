"""Deep linear networks in plain, slow float64 NumPy: what the tests hold the package against.

Written from the equations of the paper's supplement with dense Kronecker products, dense
inverses and one network at a time. Nothing here comes from the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Layers = Sequence[np.ndarray]

CUTOFF = 1e-9
"""Relative size below which an eigenvalue of the well-conditioned cases is rounding."""


# ------------------------------------------------------------------------- matrix algebra


def vec(matrix: np.ndarray) -> np.ndarray:
    """Columns of a matrix, one under the other."""
    return matrix.flatten(order="F")


def unvec(vector: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return vector.reshape((rows, columns), order="F")


def stack(tangent: Layers) -> np.ndarray:
    """All layers' columns, one under the other."""
    return np.concatenate([vec(d) for d in tangent])


def split(vector: np.ndarray, weights: Layers) -> list[np.ndarray]:
    """Undo `stack`."""
    ends = np.cumsum([w.size for w in weights])
    return [unvec(part, *w.shape) for part, w in zip(np.split(vector, ends[:-1]), weights, strict=True)]


def power(matrix: np.ndarray, exponent: float, cutoff: float = CUTOFF) -> np.ndarray:
    """A power of a positive-semidefinite matrix on its range, zero on its null space."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > cutoff * values[-1]
    values = np.where(kept, values, 1.0) ** exponent * kept
    return (vectors * values) @ vectors.T


def pinv(matrix: np.ndarray, cutoff: float = CUTOFF) -> np.ndarray:
    """Pseudo-inverse of any matrix; `cutoff` is relative to the largest singular value."""
    if matrix.shape[0] == matrix.shape[1] and np.allclose(matrix, matrix.T, rtol=1e-12):
        # The singular value decomposition of a large singular F fails to converge now and then.
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        kept = np.abs(values) > cutoff * np.max(np.abs(values))
        return (vectors * np.where(kept, 1.0 / np.where(kept, values, 1.0), 0.0)) @ vectors.T
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > cutoff * s[0]
    return (vh.T * np.where(kept, 1.0 / np.where(kept, s, 1.0), 0.0)) @ u.T


def projector(matrix: np.ndarray) -> np.ndarray:
    """Orthogonal projector on the range of a matrix."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    basis = u[:, s > CUTOFF * max(s[0], 1e-300)]
    return basis @ basis.T


def condition(matrix: np.ndarray) -> float:
    """Largest over smallest nonzero singular value."""
    s = np.linalg.svd(matrix, compute_uv=False)
    s = s[s > CUTOFF * s[0]] if s[0] > 0 else np.ones(1)
    return float(s[0] / s[-1])


# ------------------------------------------------------------------------------- network


def product(weights: Layers) -> np.ndarray:
    """W = W_L ... W_1."""
    total = np.eye(weights[0].shape[-1])
    for w in weights:
        total = w @ total
    return total


def ahead(weights: Layers, i: int) -> np.ndarray:
    """W_i^a, the product of the layers after layer i (from 0)."""
    return product([np.eye(weights[i].shape[0]), *weights[i + 1 :]])


def behind(weights: Layers, i: int) -> np.ndarray:
    """W_i^b, the product of the layers before layer i (from 0)."""
    return product([np.eye(weights[0].shape[1]), *weights[:i]])


def jacobian(weights: Layers) -> np.ndarray:
    """A of Eq 20: W_i^b ⊗ W_i^aᵀ, layer under layer."""
    return np.concatenate([np.kron(behind(weights, i), ahead(weights, i).T) for i in range(len(weights))])


def numerical_jacobian(weights: Layers, x: np.ndarray) -> np.ndarray:
    """d(W x)/dθ by central differences: (n_L, P).

    W x is linear in each single parameter, so the difference is exact at any step.
    """
    theta, columns = stack(weights), []
    for k in range(theta.size):
        step = np.zeros_like(theta)
        step[k] = 0.5
        columns.append(product(split(theta + step, weights)) @ x - product(split(theta - step, weights)) @ x)
    return np.stack(columns, axis=-1)


def velocity(weights: Layers, tangent: Layers) -> np.ndarray:
    """Derivative of the product along a tangent, by the polynomial it is in the step.

    W(θ + t d) is a polynomial of degree L in t; its linear coefficient comes from exact
    interpolation at Chebyshev points.
    """
    depth = len(weights)
    points = np.cos(np.pi * (np.arange(depth + 1) + 0.5) / (depth + 1))
    values = np.stack([product([w + t * d for w, d in zip(weights, tangent, strict=True)]) for t in points])
    coefficients = np.linalg.solve(np.vander(points, increasing=True), values.reshape(depth + 1, -1))
    return coefficients[1].reshape(values.shape[1:])


# ------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A network and the moments of its task, as float64 NumPy arrays; any of them may be stacked."""

    weights: tuple[np.ndarray, ...]
    input_moment: np.ndarray
    noise_covariance: np.ndarray
    cross_moment: np.ndarray
    output_moment: np.ndarray

    @property
    def moments(self) -> tuple[np.ndarray, ...]:
        return self.input_moment, self.noise_covariance, self.cross_moment, self.output_moment

    @property
    def batch(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(a.shape[:-2] for a in (*self.weights, *self.moments)))

    @property
    def depth(self) -> int:
        return len(self.weights)

    def members(self) -> list[Problem]:
        """The single networks of a stack, batch axes broadcast."""
        batch = self.batch

        def pick(array: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
            return np.broadcast_to(array, (*batch, *array.shape[-2:]))[index]

        return [
            Problem(tuple(pick(w, index) for w in self.weights), *(pick(m, index) for m in self.moments))
            for index in np.ndindex(*batch)
        ]

    def on(self, backend: Any, dtype: str = "float64") -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Weights and moments as arrays of a library."""
        weights = backend.asarrays(*(w.astype(dtype) for w in self.weights))
        return weights, backend.asarrays(*(m.astype(dtype) for m in self.moments))

    # ------------------------------------------------------------------- single networks

    @property
    def product(self) -> np.ndarray:
        return product(self.weights)

    def seen(self, matrix: np.ndarray) -> np.ndarray:
        """(n_L, n_0) matrix times Σ^{1/2}: the part of it that data determine."""
        return matrix @ power(self.input_moment, 0.5)

    def optimum(self) -> np.ndarray:
        """W* = M Σ⁺."""
        return self.cross_moment @ power(self.input_moment, -1.0)

    def loss(self, weights: Layers | None = None) -> float:
        """½⟨(y − Wx)ᵀ Σ̃⁻¹ (y − Wx)⟩ multiplied out."""
        w = product(self.weights if weights is None else weights)
        m = self.cross_moment
        moment = self.output_moment - w @ m.T - m @ w.T + w @ self.input_moment @ w.T
        return 0.5 * float(np.trace(np.linalg.solve(self.noise_covariance, moment)))

    def minimum_loss(self) -> float:
        best = self.output_moment - self.optimum() @ self.cross_moment.T
        return 0.5 * float(np.trace(np.linalg.solve(self.noise_covariance, best)))

    def excess_loss(self) -> float:
        gap = self.product - self.optimum()
        return 0.5 * float(np.trace(np.linalg.solve(self.noise_covariance, gap @ self.input_moment @ gap.T)))

    def ascent(self) -> np.ndarray:
        """G = Σ̃⁻¹(M − WΣ)."""
        return np.linalg.solve(self.noise_covariance, self.cross_moment - self.product @ self.input_moment)

    def gradient(self) -> list[np.ndarray]:
        """∂loss/∂θ = −A vec(G)."""
        return split(-jacobian(self.weights) @ vec(self.ascent()), self.weights)

    def numerical_gradient(self) -> list[np.ndarray]:
        """Central differences: the loss is quadratic in each single parameter, so they are exact."""
        theta, slopes = stack(self.weights), []
        for k in range(theta.size):
            step = np.zeros_like(theta)
            step[k] = 0.5
            slopes.append(self.loss(split(theta + step, self.weights)) - self.loss(split(theta - step, self.weights)))
        return split(np.asarray(slopes), self.weights)

    def fisher(self) -> np.ndarray:
        """F = A (Σ ⊗ Σ̃⁻¹) Aᵀ, Eqs 21-22."""
        a = jacobian(self.weights)
        return a @ np.kron(self.input_moment, np.linalg.inv(self.noise_covariance)) @ a.T

    def spectrum(self) -> np.ndarray:
        """Eigenvalues of F, ascending."""
        return np.linalg.eigvalsh(self.fisher())

    def rank(self) -> int:
        return int(np.linalg.matrix_rank(self.fisher(), tol=CUTOFF * max(self.spectrum()[-1], 1e-300), hermitian=True))

    def factors(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """E_i and X_i with symmetric roots, Eqs 38-39."""
        e = ahead(self.weights, i).T @ power(self.noise_covariance, -0.5)
        return e, behind(self.weights, i) @ power(self.input_moment, 0.5)

    def operator(self, inverse: str) -> np.ndarray:
        """The (P, P) matrix of each generalised inverse of F."""
        if inverse == "moore_penrose":
            return pinv(self.fisher())
        depth = self.depth
        blocks = []
        lefts, rights = self._nested_differences()
        for i in range(depth):
            e, x = self.factors(i)
            if inverse in ("layerwise", "block_diagonal"):
                block = np.kron(pinv(x @ x.T), pinv(e @ e.T))
                blocks.append(block / depth if inverse == "layerwise" else block)
                continue
            share = sum(
                np.kron(rights[b], lefts[a]) / (b - a + 1) for a, b in itertools.product(range(i + 1), range(i, depth))
            )
            dual = np.kron(pinv(x), pinv(e))
            blocks.append(dual.T @ share @ dual)
        size = sum(block.shape[0] for block in blocks)
        total, start = np.zeros((size, size)), 0
        for block in blocks:
            stop = start + block.shape[0]
            total[start:stop, start:stop] = block
            start = stop
        return total

    def _nested_differences(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """ΔQ_a = Q_a − Q_{a−1} and ΔR_b = R_b − R_{b+1}."""
        pairs = [self.factors(i) for i in range(self.depth)]
        q = [np.zeros_like(self.noise_covariance)] + [projector(e.T) for e, _ in pairs]
        r = [projector(x.T) for _, x in pairs] + [np.zeros_like(self.input_moment)]
        return [b - a for a, b in itertools.pairwise(q)], [a - b for a, b in itertools.pairwise(r)]

    def direction(self, inverse: str) -> list[np.ndarray]:
        """A generalised inverse of F times the gradient."""
        return split(self.operator(inverse) @ stack(self.gradient()), self.weights)

    def exact_velocity(self) -> np.ndarray:
        """Aᵀ F⁺ ∇, and only its part that the inputs move in."""
        total = jacobian(self.weights).T @ stack(self.direction("moore_penrose"))
        return unvec(total, *self.product.shape) @ projector(self.input_moment)

    def exact_velocity_by_projectors(self) -> np.ndarray:
        """The closed form with nested projectors, descent sign."""
        root, unroot = power(self.noise_covariance, 0.5), power(self.input_moment, -0.5)
        error = root @ self.ascent() @ unroot
        lefts, _ = self._nested_differences()
        pieces = [dq @ error @ projector(self.factors(i)[1].T) for i, dq in enumerate(lefts)]
        return -root @ sum(pieces) @ unroot

    def projections(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """P_i^a and P_i^b of Eq 45."""
        pairs = []
        for i in range(self.depth):
            e, x = self.factors(i)
            left = power(self.noise_covariance, 0.5) @ (pinv(e) @ e).T @ power(self.noise_covariance, -0.5)
            pairs.append((left, power(self.input_moment, 0.5) @ pinv(x) @ x @ power(self.input_moment, -0.5)))
        return pairs

    def kernel(self) -> np.ndarray:
        a = jacobian(self.weights)
        return a.T @ a

    def regime(self) -> str:
        """From ranks and widths, as the theory says it."""
        n_in = np.linalg.matrix_rank(self.input_moment, tol=CUTOFF * np.max(np.abs(self.input_moment)), hermitian=True)
        n_out = self.noise_covariance.shape[0]
        hidden = [w.shape[0] for w in self.weights[:-1]]
        if all(h >= max(n_in, n_out) for h in hidden):
            return "wide"
        return "intermediate" if all(h >= min(n_in, n_out) for h in hidden) else "bottleneck"

    def worst_condition(self) -> float:
        """The largest κ of every partial product and of both moments, whitened and plain."""
        found = [condition(self.input_moment), condition(self.noise_covariance)]
        for i in range(self.depth):
            e, x = self.factors(i)
            found += [condition(m) for m in (ahead(self.weights, i), behind(self.weights, i), e, x)]
        return max(found)


def relative(actual: Any, expected: Any) -> float:
    """‖actual − expected‖ relative to ‖expected‖."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if expected.size == 0:
        return 0.0
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (size if size > 0 else 1.0)


# ------------------------------------------------------------------------------ the cases


def _basis(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return (q * np.sign(np.diagonal(r)))[:, :k]


def _moment(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    basis = _basis(rng, n, rank)
    moment = (basis * np.exp(rng.uniform(-2.0, 1.0, rank))) @ basis.T
    return (moment + moment.T) / 2


def _layers(rng: np.random.Generator, sizes: Sequence[int], ranks: Sequence[int]) -> tuple[np.ndarray, ...]:
    return tuple(
        (_basis(rng, m, k) * np.exp(rng.uniform(-0.8, 0.8, k))) @ _basis(rng, n, k).T
        for n, m, k in zip(sizes, sizes[1:], ranks, strict=False)
    )


def well_conditioned(
    sizes: Sequence[int],
    *,
    input_rank: int | None = None,
    layer_ranks: dict[int, int] | None = None,
    seed: int = 0,
) -> Problem:
    """A network with κ from 10 to 30 at worst, of every partial product, Σ and Σ̃, and a noisy teacher.

    Parameters
    ----------
    input_rank : int
        The rank of Σ, n_0 unless given.
    layer_ranks : dict
        Ranks of layers (from 0) that are singular.
    """
    n_in, n_out = sizes[0], sizes[-1]
    full = [min(pair) for pair in itertools.pairwise(sizes)]
    ranks = [(layer_ranks or {}).get(i, rank) for i, rank in enumerate(full)]
    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        sigma = _moment(rng, n_in, n_in if input_rank is None else input_rank)
        noise = _moment(rng, n_out, n_out)
        teacher = rng.standard_normal((n_out, n_in))
        cross = teacher @ sigma
        output = cross @ teacher.T + noise + 0.3 * np.eye(n_out)
        problem = Problem(_layers(rng, sizes, ranks), sigma, noise, cross, (output + output.T) / 2)
        if 10.0 <= problem.worst_condition() <= 30.0:
            return problem
    raise AssertionError(f"no well-conditioned network of sizes {sizes} found")


def stacked(batch: tuple[int, ...], make: Callable[[int], Problem]) -> Problem:
    """A stack of the problems `make(0)`, `make(1)`, ..., network and task."""
    count = int(np.prod(batch))
    problems = [make(seed) for seed in range(max(count, 1))]

    def pile(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack(arrays)[:count].reshape(*batch, *arrays[0].shape)

    weights = tuple(pile([p.weights[i] for p in problems]) for i in range(problems[0].depth))
    return Problem(weights, *(pile([p.moments[k] for p in problems]) for k in range(4)))


#: name -> (sizes, options of `well_conditioned`)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one layer": ((4, 3), {}),
    "one layer, dead inputs": ((5, 3), {"input_rank": 3}),
    "one singular layer": ((4, 5), {"layer_ranks": {0: 2}}),
    "wide 2": ((3, 5, 4), {}),
    "square 2": ((4, 4, 4), {}),
    "intermediate 2": ((6, 4, 3), {}),
    "bottleneck 2": ((5, 2, 5), {}),
    "dead inputs 2": ((6, 5, 4), {"input_rank": 4}),
    "singular layer 2": ((4, 5, 4), {"layer_ranks": {1: 3}}),
    "wide 3": ((4, 6, 5, 3), {}),
    "square 3": ((4, 4, 4, 4), {}),
    "intermediate 3": ((6, 5, 4, 3), {}),
    "expanding 3": ((3, 4, 5, 6), {}),
    "bottleneck 3": ((5, 2, 4, 4), {}),
    "dead inputs 3": ((6, 5, 5, 3), {"input_rank": 4}),
    "dead inputs and bottleneck 3": ((6, 3, 4, 5), {"input_rank": 4}),
    "singular layers 3": ((4, 5, 5, 4), {"layer_ranks": {0: 3, 1: 4, 2: 3}}),
    "all singular 3": ((5, 4, 4, 4), {"input_rank": 4, "layer_ranks": {0: 3, 1: 3}}),
    "wide 5": ((3, 4, 5, 5, 4, 3), {}),
    "intermediate 5": ((5, 5, 4, 5, 4, 3), {}),
    "bottleneck 5": ((4, 5, 2, 4, 3, 4), {}),
    "singular layers 5": ((4, 5, 5, 4, 5, 3), {"input_rank": 3, "layer_ranks": {1: 3, 3: 2}}),
    "many pairs, wide 3": ((8, 10, 9, 9), {}),
    "many pairs, intermediate 3": ((10, 8, 8, 8), {}),
    "many pairs, bottleneck 3": ((9, 4, 8, 8), {}),
    "many pairs, dead inputs 3": ((10, 9, 9, 8), {"input_rank": 9}),
    "many pairs, singular layers 4": ((9, 9, 8, 9, 8), {"layer_ranks": {0: 7, 2: 6}}),
}

#: One of each regime and kind, for the slower libraries.
FEW = ["one layer", "bottleneck 2", "wide 3", "intermediate 3", "all singular 3", "many pairs, bottleneck 3"]

_made: dict[str, Problem] = {}


def case(name: str) -> Problem:
    """A case by name, made once."""
    if name not in _made:
        sizes, options = CASES[name]
        _made[name] = well_conditioned(sizes, **options)
    return _made[name]


def tangent_of(weights: Layers, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A random tangent of a network."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(w.shape) for w in weights)
