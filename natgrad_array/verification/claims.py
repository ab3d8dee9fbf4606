"""The claims of the theory, each as a residual.

Every claim compares what the library computes with a formula that does not use the same
code: plain products of the weights, the moments as the task states them, finite
differences that are exact because the loss is quadratic in each layer, or the defining
property of an inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from natgrad_array import _arrays, linalg
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array

Tangent: TypeAlias = tuple[Any, ...]

SPECTRUM_SIZE = 512
"""Up to this n_0 n_L the rank is held against a spectrum."""


class Outcome(NamedTuple):
    """A residual, which members it applies to, and how the tolerance grows with condition."""

    residual: Array
    applies: Array | bool = True
    power: int = 2


class Case:
    """A network and a task, with what several claims need, computed plainly."""

    def __init__(self, weights: Any, task: dl.GaussianTask) -> None:
        self.fisher = dl.fisher(weights, task)
        self.weights: Tangent = tuple(weights)
        self.task = task
        self.xp = xp = _arrays.namespace(self.weights[0])
        self.depth = len(self.weights)
        self.batch = self.fisher.batch_shape
        self.like = self.weights[0]
        k = task.factors
        self.root, self.unroot, self.scale = k.noise_root, k.noise_root_inverse, k.input_root

        self.product = self.end_to_end(self.weights)
        self.optimum = task.optimum()
        self.whitened_error = self.white(self.product - self.optimum)
        self.size = norm(xp, self.white(self.product)) + norm(xp, self.white(self.optimum)) + tiny(xp, self.like)
        self.ahead, self.behind = self.partial_products()
        self.ranks_ahead, self.ranks_behind, self.condition = self._conditions()
        self.input_rank = xp.round(xp.linalg.trace(k.input_root_pinv @ k.input_root))
        full = (self.input_rank + 0.0) * task.n_outputs
        self.every_matrix = self.fisher.rank() == full
        self.all_full = xp.ones_like(full) > 0.0
        for left, right in zip(self.ranks_ahead, self.ranks_behind, strict=True):
            self.all_full = self.all_full & (left == task.n_outputs) & (right == self.input_rank)

        self.gradient = dl.gradient(self.weights, task)
        self.directions = {inverse: dl.natural_gradient(self.weights, task, inverse=inverse) for inverse in _INVERSES}
        self.u, self.v, self.w = (self.random_tangent(seed) for seed in (1, 2, 3))
        self.other = self._some_other_inverse()

    # ----------------------------------------------------------------------- ingredients

    def random_tangent(self, seed: int) -> Tangent:
        """A fixed random tangent, the same for every member."""
        draws = np.random.default_rng(seed)
        return tuple(_arrays.asarray_like(self.xp, draws.standard_normal(w.shape[-2:]), self.like) for w in self.weights)

    @staticmethod
    def end_to_end(weights: Tangent) -> Array:
        """W_L ⋯ W_1."""
        product = weights[0]
        for layer in weights[1:]:
            product = layer @ product
        return product

    def partial_products(self) -> tuple[list[Array], list[Array]]:
        """W_i^a and W_i^b."""
        ahead = [_arrays.eye(self.xp, self.task.n_outputs, self.like)]
        behind = [_arrays.eye(self.xp, self.task.n_inputs, self.like)]
        for layer in self.weights[:0:-1]:
            ahead.append(ahead[-1] @ layer)
        for layer in self.weights[:-1]:
            behind.append(layer @ behind[-1])
        return ahead[::-1], behind

    def replaced(self, i: int, layer: Array) -> Tangent:
        """The network with one other layer."""
        return (*self.weights[:i], layer, *self.weights[i + 1 :])

    def white(self, matrix: Array) -> Array:
        """R⁻¹ (·) S: what data can see of an end-to-end matrix, in units of the noise."""
        return self.unroot @ matrix @ self.scale

    def velocity(self, tangent: Tangent) -> Array:
        """The whitened end-to-end velocity of a tangent, layer by layer."""
        total = self.white(self.ahead[0] @ tangent[0] @ self.behind[0])
        for a, d, b in zip(self.ahead[1:], tangent[1:], self.behind[1:], strict=True):
            total = total + self.white(a @ d @ b)
        return total

    def seen(self, h: Array) -> Tangent:
        """The gradient of which a whitened matrix is the error: W_i^aᵀ R⁻ᵀ h Sᵀ W_i^bᵀ."""
        middle = self.unroot.mT @ h @ self.scale.mT
        return tuple(a.mT @ middle @ b.mT for a, b in zip(self.ahead, self.behind, strict=True))

    def moment_loss(self, product: Array) -> Array:
        """½ tr Σ̃⁻¹(⟨yyᵀ⟩ − WMᵀ − MWᵀ + WΣWᵀ), Eq 4 written out."""
        t = self.task
        mixed = product @ t.cross_moment.mT
        moment = t.output_moment - mixed - mixed.mT + product @ t.input_moment @ product.mT
        return 0.5 * self.xp.linalg.trace(self.unroot @ moment @ self.unroot.mT)

    def inverse_of(self, matrix: Array, usable: Array) -> Array:
        """Inverses of the usable members of a stack; the others come out as identities."""
        xp = self.xp
        good = _arrays.finite_members(xp, matrix) & usable[..., None, None]
        return xp.linalg.inv(xp.where(good, matrix, _arrays.eye(xp, matrix.shape[-1], matrix)))

    def difference(self, a: Tangent, b: Tangent) -> Array:
        """Norm of a − b relative to that of both."""
        xp = self.xp
        gap = tuple(x - y for x, y in zip(a, b, strict=True))
        return tangent_norm(xp, gap) / (tangent_norm(xp, a) + tangent_norm(xp, b) + tiny(xp, self.like))

    def _conditions(self) -> tuple[list[Array], list[Array], Array]:
        xp, widths = self.xp, self.task.n_inputs + sum(int(w.shape[-2]) for w in self.weights)
        cutoff = widths * _arrays.eps(xp, self.like)
        worst = xp.ones(self.batch, dtype=self.like.dtype, device=_arrays.device(self.like))
        ranks: tuple[list[Array], list[Array]] = ([], [])
        for factors, found in (
            ([a.mT @ self.unroot.mT for a in self.ahead], ranks[0]),
            ([b @ self.scale for b in self.behind], ranks[1]),
        ):
            for factor in factors:
                _, s, _ = linalg.svd(xp, factor)
                largest = xp.max(s, axis=-1, keepdims=True)
                kept = s > cutoff * largest
                smallest = xp.min(xp.where(kept, s, largest), axis=-1)
                ratio = largest[..., 0] / xp.where(smallest > 0.0, smallest, 1.0)
                worst = xp.where(xp.isnan(ratio) | (ratio > worst), ratio, worst)
                found.append(xp.sum(xp.where(kept, xp.ones_like(s), 0.0), axis=-1) + 0.0 * largest[..., 0])
        return *ranks, worst

    def _some_other_inverse(self) -> Tangent:
        """F⁻∇ for a {1}-inverse that is none of ours: a tangent without information added."""
        extra = self.fisher.precondition(self.fisher.matvec(self.u), inverse="moore_penrose")
        return tuple(d + u - e for d, u, e in zip(self.directions["moore_penrose"], self.u, extra, strict=True))


_INVERSES = ("layerwise", "exact", "moore_penrose", "block_diagonal")

CLAIMS: list[tuple[str, str, Callable[[Case], Outcome | None]]] = []
"""(equation, claim, residual) in the order of the report."""


def claim(equation: str, words: str) -> Callable[[Callable[[Case], Outcome | None]], Callable[[Case], Outcome | None]]:
    """Enter a residual into `CLAIMS`."""

    def enter(residual: Callable[[Case], Outcome | None]) -> Callable[[Case], Outcome | None]:
        CLAIMS.append((equation, words, residual))
        return residual

    return enter


# ------------------------------------------------------------------------- small helpers


def norm(xp: Any, a: Array) -> Array:
    """Frobenius norm of each member."""
    return xp.sqrt(xp.sum(a * a, axis=(-2, -1)))


def tangent_norm(xp: Any, tangent: Tangent) -> Array:
    """Norm of each member over all layers."""
    return xp.sqrt(sum(xp.sum(d * d, axis=(-2, -1)) for d in tangent))


def dot(xp: Any, a: Tangent, b: Tangent) -> Array:
    """Inner product over all layers."""
    return sum(xp.sum(x * y, axis=(-2, -1)) for x, y in zip(a, b, strict=True))


def tiny(xp: Any, like: Array) -> float:
    """Far below any size that occurs; keeps 0/0 out of ratios."""
    return _arrays.eps(xp, like) ** 2


def largest(xp: Any, *residuals: Array) -> Array:
    """The largest of several residuals; NaN if one is NaN."""
    result = residuals[0]
    for residual in residuals[1:]:
        result = xp.where(xp.isnan(residual) | (residual > result), residual, result)
    return result


# ------------------------------------------------------------------- task, loss, gradient


@claim("3–4", "the loss is that of the moments, and least at W* = MΣ⁺")
def _loss(c: Case) -> Outcome:
    xp = c.xp
    value, least = c.moment_loss(c.product), c.task.minimum_loss()
    scale = xp.abs(value) + xp.abs(c.moment_loss(0.0 * c.product)) + c.size**2
    at_optimum = c.moment_loss(c.optimum)
    return Outcome(
        largest(
            xp,
            xp.abs(dl.loss(c.weights, c.task) - value) / scale,
            xp.abs(at_optimum - least) / scale,
            xp.abs(dl.excess_loss(c.weights, c.task) - (value - at_optimum)) / scale,
        )
    )


@claim("7–13", "the gradient is the derivative of the loss, in every layer")
def _gradient(c: Case) -> Outcome:
    xp, residuals = c.xp, []
    for i, (layer, direction, g) in enumerate(zip(c.weights, c.v, c.gradient, strict=True)):
        # The loss is quadratic in one layer: a central difference with any step is exact.
        step = norm(xp, layer)[..., None, None] / norm(xp, direction)
        up = c.moment_loss(c.end_to_end(c.replaced(i, layer + step * direction)))
        down = c.moment_loss(c.end_to_end(c.replaced(i, layer - step * direction)))
        slope = xp.sum(g * step * direction, axis=(-2, -1))
        residuals.append(xp.abs((up - down) / 2 - slope) / (xp.abs(up) + xp.abs(down) + c.size**2))
    return Outcome(largest(xp, *residuals))


@claim("W*, Σ⁺", "W* solves the normal equations W*Σ = M, Σ rank deficient or not")
def _optimum(c: Case) -> Outcome:
    xp, m = c.xp, c.task.cross_moment
    gap = norm(xp, c.unroot @ (c.optimum @ c.task.input_moment - m))
    return Outcome(gap / (norm(xp, c.unroot @ m) + norm(xp, c.unroot @ c.optimum @ c.task.input_moment) + tiny(xp, m)))


# --------------------------------------------------------------------- Fisher information


@claim("13–17", "the Fisher averages over the model's noise: targets and residuals play no part")
def _model_noise(c: Case) -> Outcome:
    xp, t = c.xp, c.task
    zero = 0.0 * t.cross_moment
    noise_only = dl.GaussianTask(t.input_moment, t.noise_covariance, zero, t.noise_covariance)
    without_targets = dl.fisher(c.weights, noise_only).matvec(c.v)
    _, backward = c.fisher.factors(c.depth - 1, c.depth - 1)
    identity = _arrays.eye(xp, t.n_outputs, c.like)
    gap = norm(xp, c.root.mT @ (t.noise_covariance @ backward - identity) @ c.root) / norm(xp, c.root) ** 2
    return Outcome(largest(xp, c.difference(c.fisher.matvec(c.v), without_targets), gap))


@claim("14–19", "block (i, j) is (W_i^b Σ W_j^bᵀ) ⊗ (W_i^aᵀ Σ̃⁻¹ W_j^a), between layers too")
def _blocks(c: Case) -> Outcome:
    xp, residuals = c.xp, []
    moved = [c.white(a @ d @ b) for a, d, b in zip(c.ahead, c.v, c.behind, strict=True)]
    probed = [c.white(a @ d @ b) for a, d, b in zip(c.ahead, c.w, c.behind, strict=True)]
    for j in range(c.depth):
        alone = tuple(d if k == j else 0.0 * d for k, d in enumerate(c.v))
        column = c.fisher.matvec(alone)
        for i in range(c.depth):
            forward, backward = c.fisher.factors(i, j)
            block = xp.sum(c.w[i] * (backward @ c.v[j] @ forward.mT), axis=(-2, -1))
            applied = xp.sum(c.w[i] * column[i], axis=(-2, -1))
            expected = xp.sum(probed[i] * moved[j], axis=(-2, -1))
            scale = norm(xp, probed[i]) * norm(xp, moved[j]) + tiny(xp, c.like)
            residuals += [xp.abs(block - expected) / scale, xp.abs(applied - expected) / scale]
    return Outcome(largest(xp, *residuals))


@claim("20–22", "F = A B Aᵀ: uᵀFv is the moment of two end-to-end velocities")
def _product_form(c: Case) -> Outcome:
    xp, u, v = c.xp, c.velocity(c.u), c.velocity(c.v)
    value = dot(xp, c.u, c.fisher.matvec(c.v))
    scale = norm(xp, u) * norm(xp, v) + tiny(xp, c.like)
    return Outcome(xp.abs(value - xp.sum(u * v, axis=(-2, -1))) / scale)


@claim("22, rank", "rank F = Σ (rank W_i^a − rank W_{i-1}^a) rank W_i^b, at most n_0 n_L")
def _rank(c: Case) -> Outcome | None:
    xp = c.xp
    if c.task.n_inputs * c.task.n_outputs > SPECTRUM_SIZE:
        return None
    values = c.fisher.spectrum()
    top = values[..., -1:]
    cutoff = 10 * values.shape[-1] * _arrays.eps(xp, values) * top
    one = xp.ones_like(values)
    count = xp.sum(xp.where(values > cutoff, one, 0.0), axis=-1)
    # Where eigenvalues crowd around the cut-off, a spectrum cannot tell a rank.
    clear = xp.sum(xp.where(values > 1e3 * cutoff, one, 0.0), axis=-1) == count
    bound = c.task.n_outputs * c.input_rank
    excess = xp.where(c.fisher.rank() > bound, one[..., 0], 0.0)
    return Outcome(largest(xp, xp.abs(count - c.fisher.rank()), excess), clear)


# ------------------------------------------------------------ inverses of the Fisher matrix


@claim("23", "F F^g F = F for the exact layerwise rule and for F⁺")
def _inner_inverse(c: Case) -> Outcome:
    once = c.fisher.matvec(c.v)
    twice = [c.fisher.matvec(c.fisher.precondition(once, inverse=i)) for i in ("exact", "moore_penrose")]
    return Outcome(largest(c.xp, *(c.difference(image, once) for image in twice)))


@claim("Penrose", "F⁺ meets all four Penrose conditions")
def _penrose(c: Case) -> Outcome:
    xp, f = c.xp, c.fisher

    def plus(tangent: Tangent) -> Tangent:
        return f.precondition(tangent, inverse="moore_penrose")

    image, back = f.matvec(c.v), plus(c.v)
    project, backproject = f.matvec(back), plus(image)
    scale = tangent_norm(xp, c.u) * tangent_norm(xp, c.v)
    return Outcome(
        largest(
            xp,
            c.difference(f.matvec(backproject), image),
            c.difference(plus(project), back),
            xp.abs(dot(xp, c.u, project) - dot(xp, f.matvec(plus(c.u)), c.v)) / scale,
            xp.abs(dot(xp, c.u, backproject) - dot(xp, plus(f.matvec(c.u)), c.v)) / scale,
        )
    )


@claim("24–30", "every natural gradient moves W along W − W*")
def _same_velocity(c: Case) -> Outcome:
    xp = c.xp
    tangents = (c.directions["exact"], c.directions["moore_penrose"], c.other)
    residuals = [norm(xp, c.velocity(d) - c.whitened_error) / c.size for d in tangents]
    return Outcome(largest(xp, *residuals), c.every_matrix)


@claim("27–28", "Σ W_i^a d_i W_i^b is the derivative of the product of the layers")
def _velocity(c: Case) -> Outcome:
    xp = c.xp
    # The product is linear in one layer: a difference with step one is exact.
    moved = [c.end_to_end(c.replaced(i, w + d)) - c.product for i, (w, d) in enumerate(zip(c.weights, c.v, strict=True))]
    total = moved[0]
    for part in moved[1:]:
        total = total + part
    scale = sum(norm(xp, part) for part in moved) + norm(xp, c.product) + tiny(xp, c.like)
    return Outcome(norm(xp, dl.end_to_end_velocity(c.weights, c.v) - total) / scale)


@claim("31–32", "S = B^{1/2}AᵀCAB^{1/2} is the projector on what the layers can realise")
def _projector(c: Case) -> Outcome:
    xp, residuals = c.xp, []
    h = _arrays.asarray_like(xp, np.random.default_rng(4).standard_normal(c.whitened_error.shape[-2:]), c.like)
    for inverse in ("exact", "moore_penrose"):
        once = c.velocity(c.fisher.precondition(c.seen(h), inverse=inverse))
        twice = c.velocity(c.fisher.precondition(c.seen(once), inverse=inverse))
        residuals += [norm(xp, twice - once) / norm(xp, h), c.difference(c.seen(once), c.seen(h))]
    return Outcome(largest(xp, *residuals))


@claim("exact velocity", "the closed form solves F d = ∇ and is every natural gradient's, at any widths and ranks")
def _exact_velocity(c: Case) -> Outcome:
    xp = c.xp
    closed = c.white(dl.exact_velocity(c.weights, c.task))
    solves = [c.fisher.matvec(c.directions[i]) for i in ("exact", "moore_penrose")] + [c.seen(closed)]
    reference = tangent_norm(xp, c.seen(c.white(c.optimum))) + tangent_norm(xp, c.gradient) + tiny(xp, c.like)
    gaps = [tangent_norm(xp, tuple(x - g for x, g in zip(s, c.gradient, strict=True))) / reference for s in solves]
    agree = [norm(xp, closed - c.velocity(d)) / c.size for d in (c.directions["moore_penrose"], c.other)]
    return Outcome(largest(xp, *gaps, *agree))


@claim("exact rule", "the exact layerwise rule has the exact velocity in every regime")
def _exact_rule(c: Case) -> Outcome:
    closed = c.white(dl.exact_velocity(c.weights, c.task))
    return Outcome(norm(c.xp, c.velocity(c.directions["exact"]) - closed) / c.size)


@claim("exact rule, wide", "the exact layerwise rule is Eq 42 in the wide regime")
def _exact_is_layerwise(c: Case) -> Outcome:
    return Outcome(c.difference(c.directions["exact"], c.directions["layerwise"]), c.all_full)


# ------------------------------------------------------- square layers, block by block


def _invertible(c: Case) -> Array | None:
    """Members whose layers are all square and of full rank, on data of full rank."""
    if any(w.shape[-1] != w.shape[-2] for w in c.weights):
        return None
    return c.all_full & (c.input_rank == c.task.n_inputs)


@claim("33–34", "square layers: every layer alone moves W by (W − W*)/L")
def _square(c: Case) -> Outcome | None:
    square, xp = _invertible(c), c.xp
    if square is None:
        return None
    d = c.directions["layerwise"]
    gaps = [norm(xp, c.depth * c.white(a @ x @ b) - c.whitened_error) for a, x, b in zip(c.ahead, d, c.behind, strict=True)]
    return Outcome(largest(xp, *(gap / c.size for gap in gaps)), square)


@claim("33, 36", "A^l is a left inverse; F^g = A^lᵀB⁻¹A^l is reflexive, its block (i, j) is L⁻²(F_ijᵀ)⁻¹")
def _reflexive(c: Case) -> Outcome | None:
    square, xp = _invertible(c), c.xp
    if square is None:
        return None
    inverse_ahead = [c.inverse_of(a, square) for a in c.ahead]
    inverse_behind = [c.inverse_of(b, square) for b in c.behind]
    precision = c.inverse_of(c.task.input_moment, square)

    def left_inverse(tangent: Tangent) -> Array:
        parts = [a.mT @ x @ b.mT for a, x, b in zip(inverse_ahead, tangent, inverse_behind, strict=True)]
        return sum(parts[1:], parts[0]) / c.depth

    def spread(h: Array) -> Tangent:
        return tuple(a @ h @ b / c.depth for a, b in zip(inverse_ahead, inverse_behind, strict=True))

    def inverse(tangent: Tangent) -> Tangent:
        return spread(c.task.noise_covariance @ left_inverse(tangent) @ precision)

    h = _arrays.asarray_like(xp, np.random.default_rng(5).standard_normal(c.product.shape[-2:]), c.like)
    column = tuple(a.mT @ h @ b.mT for a, b in zip(c.ahead, c.behind, strict=True))
    image, back = c.fisher.matvec(c.v), inverse(c.v)
    i, j = 0, c.depth - 1
    forward, backward = c.fisher.factors(i, j)
    block = inverse_ahead[i] @ (c.task.noise_covariance @ (inverse_ahead[j].mT @ c.v[j] @ inverse_behind[j].mT) @ precision) @ inverse_behind[i]
    restored = backward.mT @ block @ forward
    return Outcome(
        largest(
            xp,
            norm(xp, left_inverse(column) - h) / norm(xp, h),
            c.difference(c.fisher.matvec(inverse(image)), image),
            c.difference(inverse(c.fisher.matvec(back)), back),
            c.difference(inverse(c.gradient), c.directions["layerwise"]),
            norm(xp, restored - c.v[j]) / norm(xp, c.v[j]),
        ),
        square,
        power=4,
    )


@claim("35–37", "inverting the diagonal blocks alone gives L times the layerwise rule")
def _block_diagonal(c: Case) -> Outcome:
    xp, block = c.xp, c.directions["block_diagonal"]
    scaled = tuple(c.depth * d for d in c.directions["layerwise"])
    solved = []
    for i, d in enumerate(block):
        forward, backward = c.fisher.factors(i, i)
        solved.append(backward @ d @ forward.mT)
    reference = tangent_norm(xp, c.seen(c.white(c.optimum))) + tangent_norm(xp, c.gradient) + tiny(xp, c.like)
    gap = tangent_norm(xp, tuple(s - g for s, g in zip(solved, c.gradient, strict=True))) / reference
    return Outcome(largest(xp, c.difference(block, scaled), gap))


@claim("one inverse", "square layers: d_i = (W_i − (W_i⋯W_1) W⁻¹W*W⁻¹ (W_L⋯W_i))/L")
def _one_inverse(c: Case) -> Outcome | None:
    square, xp = _invertible(c), c.xp
    if square is None:
        return None
    inverse = c.inverse_of(c.product, square)
    k = inverse @ c.optimum @ inverse
    expected = tuple(
        (w - (w @ b) @ k @ (a @ w)) / c.depth for a, w, b in zip(c.ahead, c.weights, c.behind, strict=True)
    )
    return Outcome(c.difference(expected, c.directions["layerwise"]), square, power=3)


# --------------------------------------------------------------------- rectangular layers


@claim("38–42", "the layerwise rule inverts ⟨eeᵀ⟩ and ⟨xxᵀ⟩: E⁺∇X⁺/L, as operator and in closed form")
def _layerwise(c: Case) -> Outcome:
    xp, d = c.xp, c.directions["layerwise"]
    noise = c.unroot.mT @ c.unroot
    back = tuple(
        a.mT @ noise @ a @ x @ (b @ c.task.input_moment @ b.mT) * c.depth
        for a, x, b in zip(c.ahead, d, c.behind, strict=True)
    )
    reference = tangent_norm(xp, c.seen(c.white(c.optimum))) + tangent_norm(xp, c.gradient) + tiny(xp, c.like)
    gap = tangent_norm(xp, tuple(s - g for s, g in zip(back, c.gradient, strict=True))) / reference
    applied = c.fisher.precondition(c.gradient, inverse="layerwise")
    near = tangent_norm(xp, tuple(x - y for x, y in zip(applied, d, strict=True)))
    return Outcome(largest(xp, gap, near / (tangent_norm(xp, d) + tangent_norm(xp, c.weights))))


@claim("43–45", "the layerwise rule moves W by W − Σ P_i^a W* P_i^b / L, at any widths")
def _projections(c: Case) -> Outcome:
    xp = c.xp
    parts = [left @ c.optimum @ right for left, right in dl.projections(c.weights, c.task)]
    expected = c.product - sum(parts[1:], parts[0]) / c.depth
    return Outcome(norm(xp, c.velocity(c.directions["layerwise"]) - c.white(expected)) / c.size)


@claim("regimes", "wide: the layerwise rule has the exact velocity (elsewhere the residual says how far off it is)")
def _layerwise_is_exact(c: Case) -> Outcome:
    xp = c.xp
    exact = c.white(dl.exact_velocity(c.weights, c.task))
    gap = norm(xp, c.velocity(c.directions["layerwise"]) - exact)
    return Outcome(gap / (norm(xp, exact) + _arrays.eps(xp, c.like) * c.size), c.all_full)


# -------------------------------------------------------------- Moore–Penrose, conservation


@claim("F⁺∇, shortest", "the Moore–Penrose natural gradient is orthogonal to all that changes nothing")
def _shortest(c: Case) -> Outcome:
    xp, d = c.xp, c.directions["moore_penrose"]
    free = tuple(o - m for o, m in zip(c.other, d, strict=True))
    length = tangent_norm(xp, d)
    # Where F has full rank nothing is free, and what is left of u is rounding.
    angle = xp.abs(dot(xp, free, d)) / (tangent_norm(xp, c.u) * length + tiny(xp, c.like))
    longer = (length - tangent_norm(xp, c.directions["exact"])) / (length + tiny(xp, c.like))
    return Outcome(largest(xp, angle, longer, _gauge(c, d)))


@claim("balance", "gradient flow and F⁺ flow conserve W_{i+1}ᵀW_{i+1} − W_iW_iᵀ")
def _balance(c: Case) -> Outcome | None:
    if c.depth == 1:
        return None
    return Outcome(largest(c.xp, _gauge(c, c.gradient), _gauge(c, c.directions["moore_penrose"])))


def _gauge(c: Case, d: Tangent) -> Array:
    """How far a tangent is from leaving the balance alone: W_{i+1}ᵀ d_{i+1} − d_i W_iᵀ."""
    xp = c.xp
    result = 0.0 * tangent_norm(xp, d)
    for i in range(c.depth - 1):
        above, below = c.weights[i + 1].mT @ d[i + 1], d[i] @ c.weights[i].mT
        scale = norm(xp, c.weights[i + 1]) * norm(xp, d[i + 1]) + norm(xp, d[i]) * norm(xp, c.weights[i])
        result = largest(xp, result, norm(xp, above - below) / (scale + tiny(xp, c.like)))
    return result


# ------------------------------------------------------------------------------- dynamics


@claim("30, flow", "W(t) − W* = e^{−t}(W_0 − W*), and the excess loss falls as e^{−2t}")
def _flow(c: Case) -> Outcome:
    xp, time = c.xp, 0.75
    moved = dl.natural_gradient_flow(c.product, c.task, time)
    scale = c.moment_loss(0.0 * c.product) + c.moment_loss(c.product) + c.size**2
    least = c.moment_loss(c.optimum)
    fallen = c.moment_loss(moved) - least - np.exp(-2 * time) * (c.moment_loss(c.product) - least)
    halfway = dl.natural_gradient_flow(dl.natural_gradient_flow(c.product, c.task, 0.25), c.task, 0.5)
    straight = norm(xp, c.white(moved - c.optimum) - float(np.exp(-time)) * c.whitened_error) / c.size
    return Outcome(largest(xp, xp.abs(fallen) / scale, norm(xp, c.white(halfway - moved)) / c.size, straight))


@claim("modes", "balanced aligned modes: da/dt = L a^{2−2/L}(s − a) under the gradient, s − a under natural gradient")
def _modes(c: Case) -> Outcome:
    xp, k = c.xp, c.task.factors
    u, s, vh = linalg.svd(xp, k.target)
    narrowest = min(int(s.shape[-1]), *(int(w.shape[-2]) for w in c.weights))
    s, u, vh = s[..., :narrowest], u[..., :narrowest], vh[..., :narrowest, :]
    a = 0.5 * s + 0.25 * s[..., :1]
    product = (u * a[..., None, :]) @ vh
    sizes = (int(k.target.shape[-1]), *(int(w.shape[-2]) for w in c.weights))
    finite = _arrays.finite_members(xp, product)
    batch = tuple(product.shape[:-2])
    aligned = dl.balanced(6, sizes, batch, like=product, end_to_end=xp.where(finite, product, 0.0))
    aligned = tuple(xp.where(finite, layer, xp.nan) for layer in aligned)
    inputs, outputs = _arrays.eye(xp, sizes[0], product), _arrays.eye(xp, sizes[-1], product)
    task = dl.GaussianTask(inputs, outputs, k.target, k.target @ k.target.mT + outputs)

    def modes(tangent: Tangent) -> Array:
        return xp.linalg.diagonal(u.mT @ dl.end_to_end_velocity(aligned, tangent) @ vh.mT)

    gradient = modes(dl.gradient(aligned, task)) + c.depth * a ** (2 - 2 / c.depth) * (s - a)
    natural = modes(dl.natural_gradient(aligned, task, inverse="moore_penrose")) + (s - a)
    top = xp.max(a, axis=-1) + tiny(xp, a)
    residuals = [
        xp.max(xp.abs(gradient), axis=-1) / (c.depth * top ** (3 - 2 / c.depth)),
        xp.max(xp.abs(natural), axis=-1) / top,
    ]
    return Outcome(largest(xp, *residuals) + xp.zeros(c.batch, dtype=a.dtype, device=_arrays.device(a)))
