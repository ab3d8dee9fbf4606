"""The claims of the theory, each as a residual.

Every claim compares what the library computes with a formula that does not use the same
code: plain products of the weights, the moments as the task states them, finite
differences that are exact because the loss is quadratic in each layer, or the defining
property of an inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from natgrad_array import _arrays, linalg
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array

Tangent: TypeAlias = tuple[Any, ...]

SPECTRUM_SIZE = 512
"""Up to this n_0 n_L the rank is held against a spectrum."""


class Outcome(NamedTuple):
    """A residual, which members it applies to, and what magnifies rounding: condition² when None."""

    residual: Array
    applies: Array | bool = True
    magnified: Array | None = None


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
        # Rounding grows with the lengths of all sums.
        self.cutoff = (task.n_inputs + sum(int(w.shape[-2]) for w in self.weights)) * _arrays.eps(xp, self.like)
        k = task.factors
        self.root, self.unroot = k.noise_roots(xp)
        self.scale = k.input_root

        self.product = self.end_to_end(self.weights)
        self.optimum = task.optimum()
        self.whitened_error = self.white(self.product - self.optimum)
        self.size = norm(xp, self.white(self.product)) + norm(xp, self.white(self.optimum)) + tiny(xp, self.like)
        self.ahead, self.behind = self.partial_products()
        self.ranks_ahead, self.ranks_behind, self.condition, self.fisher_condition = self._conditions()
        self.input_rank = xp.round(xp.linalg.trace(k.input_root_pinv @ k.input_root))
        full = (self.input_rank + 0.0) * task.n_outputs
        self.rank, before = 0.0 * full, 0.0
        for left, right in zip(self.ranks_ahead, self.ranks_behind, strict=True):
            self.rank, before = self.rank + (left - before) * right, left
        self.every_matrix = self.rank == full
        self.all_full = xp.ones_like(full) > 0.0
        for left, right in zip(self.ranks_ahead, self.ranks_behind, strict=True):
            self.all_full = self.all_full & (left == task.n_outputs) & (right == self.input_rank)

        self.gradient = dl.gradient(self.weights, task)
        self.directions = {inverse: dl.natural_gradient(self.weights, task, inverse=inverse) for inverse in _INVERSES}
        self.u, self.v, self.w = (self.random_tangent(seed) for seed in (1, 2, 3))
        # Freely added to a direction, u is not to drown it: its velocity is at most W's own size.
        part = self.size / (self.size + norm(xp, self.velocity(self.u)))
        self.u = tuple(part[..., None, None] * u for u in self.u)
        moves = self.fisher.precondition(self.fisher.matvec(self.u), inverse="moore_penrose")
        self.free = tuple(u - m for u, m in zip(self.u, moves, strict=True))
        """The part of u that changes nothing."""
        self.other = tuple(d + f for d, f in zip(self.directions["moore_penrose"], self.free, strict=True))
        """F^g∇ for an inverse that is none of ours."""

    # ----------------------------------------------------------------------- ingredients

    def random_tangent(self, seed: int) -> Tangent:
        """A fixed random tangent, the same for every member."""
        return tuple(self.random_matrix(10 * seed + i, w.shape[-2:]) for i, w in enumerate(self.weights))

    def random_matrix(self, seed: int, shape: Any) -> Array:
        """A fixed random matrix, the same for every member."""
        return _arrays.standard_normal(seed, tuple(shape), self.xp, self.like)

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

    def difference(self, a: Tangent, b: Tangent, *others: Tangent) -> Array:
        """Norm of a − b relative to that of both, and of others that their rounding comes from."""
        xp = self.xp
        gap = tuple(x - y for x, y in zip(a, b, strict=True))
        return tangent_norm(xp, gap) / (sum(tangent_norm(xp, t) for t in (a, b, *others)) + tiny(xp, self.like))

    def of_directions(self, a: Tangent, b: Tangent) -> Array:
        """`difference` of two directions of descent, which near the optimum are rounding.

        A layer's direction for the error W is the layer itself: as the rounding of W is to W,
        so is that of a direction to the weights.
        """
        return self.difference(a, b, self.weights)

    def _conditions(self) -> tuple[list[Array], list[Array], Array, Array]:
        """Ranks of the whitened products, the worst condition of one, and that of inverting F.

        F is a sum of a term for each layer, and on a direction that layers a to b realise
        at least the sum of their smallest eigenvalues.
        """
        xp = self.xp
        worst = xp.ones(self.batch, dtype=self.like.dtype, device=_arrays.device(self.like))
        nothing = 0.0 * worst
        ranks: tuple[list[Array], list[Array]] = ([], [])
        most, least = [nothing + 1.0] * self.depth, [nothing + 1.0] * self.depth
        for factors, found in (
            ([a.mT @ self.unroot.mT for a in self.ahead], ranks[0]),
            ([b @ self.scale for b in self.behind], ranks[1]),
        ):
            for i, factor in enumerate(factors):
                _, s, _ = linalg.svd(xp, factor)
                top = xp.max(s, axis=-1, keepdims=True)
                kept = s > self.cutoff * top
                smallest = xp.min(xp.where(kept, s, top), axis=-1)
                ratio = top[..., 0] / xp.where(smallest > 0.0, smallest, 1.0)
                worst = xp.where(xp.isnan(ratio) | (ratio > worst), ratio, worst)
                found.append(xp.sum(xp.where(kept, xp.ones_like(s), 0.0), axis=-1) + 0.0 * top[..., 0])
                most[i], least[i] = most[i] * top[..., 0] ** 2, least[i] * smallest**2
        weakest = nothing + xp.inf
        for first in range(self.depth):
            joined = ranks[0][first] - (ranks[0][first - 1] if first else 0.0)
            together = nothing
            for last in range(first, self.depth):
                left = ranks[1][last] - (ranks[1][last + 1] if last + 1 < self.depth else 0.0)
                together = together + least[last]
                weakest = xp.where((joined > 0.5) & (left > 0.5) & (together < weakest), together, weakest)
        spread = sum(most[1:], most[0]) / weakest
        return *ranks, worst, largest(xp, spread, worst**2)


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
    return _length(xp, a, (-2, -1))


def tangent_norm(xp: Any, tangent: Tangent) -> Array:
    """Norm of each member over all layers."""
    total = norm(xp, tangent[0])
    for d in tangent[1:]:
        total = xp.hypot(total, norm(xp, d))
    return total


def stack(xp: Any, tangent: Tangent) -> Array:
    """All layers in one vector, columns stacked."""
    columns = [linalg.vec(xp, d) for d in tangent]
    batch = _arrays.broadcast_batch({str(i): tuple(column.shape[:-1]) for i, column in enumerate(columns)})
    return xp.concat([xp.broadcast_to(column, (*batch, column.shape[-1])) for column in columns], axis=-1)


def vector_norm(xp: Any, a: Array) -> Array:
    """Euclidean norm of each member."""
    return _length(xp, a, (-1,))


def _length(xp: Any, a: Array, axes: tuple[int, ...]) -> Array:
    # Squares of what float32 holds may be beyond it.
    top = xp.max(xp.abs(a), axis=axes, keepdims=True)
    unit = a / xp.where((top > 0.0) & xp.isfinite(top), top, 1.0)
    return (
        xp.sqrt(xp.sum(unit * unit, axis=axes))
        * xp.where(xp.isfinite(top) & (top > 0.0), top, 1.0)[(..., *(0 for _ in axes))]
    )


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
    if c.fisher.n_parameters <= SPECTRUM_SIZE:
        image = (c.fisher.to_dense() @ stack(xp, c.v)[..., None])[..., 0]
        expected = stack(xp, c.seen(c.velocity(c.v)))
        scale = vector_norm(xp, image) + vector_norm(xp, expected) + tiny(xp, c.like)
        residuals.append(vector_norm(xp, image - expected) / scale)
    return Outcome(largest(xp, *residuals))


@claim("20–22", "F = A B Aᵀ: uᵀFv is the moment of two end-to-end velocities")
def _product_form(c: Case) -> Outcome:
    xp, u, v = c.xp, c.velocity(c.u), c.velocity(c.v)
    value = dot(xp, c.u, c.fisher.matvec(c.v))
    scale = norm(xp, u) * norm(xp, v) + tiny(xp, c.like)
    return Outcome(xp.abs(value - xp.sum(u * v, axis=(-2, -1))) / scale)


@claim("20, kernel", "gradient flow moves W by AᵀA: Σ W_i^aW_i^aᵀ Z W_i^bᵀW_i^b of the loss's gradient in W")
def _kernel(c: Case) -> Outcome | None:
    xp, size = c.xp, c.task.n_inputs * c.task.n_outputs
    if size > SPECTRUM_SIZE:
        return None
    noise = c.unroot.mT @ c.unroot
    output, target = noise @ c.product @ c.task.input_moment, noise @ c.task.cross_moment
    kernel, most = dl.end_to_end_kernel(c.weights), 0.0 * c.size
    for a, b in zip(c.ahead, c.behind, strict=True):
        most = most + norm(xp, a) ** 2 * norm(xp, b) ** 2

    def gap(z: Array, moved: Array, scale: Array) -> Array:
        image = [a @ (a.mT @ z @ b.mT) @ b for a, b in zip(c.ahead, c.behind, strict=True)]
        return norm(xp, moved - sum(image[1:], image[0])) / (most * scale + tiny(xp, c.like))

    def applied(z: Array) -> Array:
        return linalg.unvec(xp, (kernel @ linalg.vec(xp, z)[..., None])[..., 0], *z.shape[-2:])

    z = c.random_matrix(7, c.product.shape[-2:])
    flow = dl.end_to_end_velocity(c.weights, c.gradient)
    given = norm(xp, output) + norm(xp, target)
    residual = largest(xp, gap(z, applied(z), norm(xp, z)), gap(output - target, flow, given))
    # Squares of a deep network's products may overflow.
    return Outcome(residual, ~xp.isinf(most * given))


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
    clear = clear & (100 * values.shape[-1] * _arrays.eps(xp, values) * c.fisher_condition < 1.0)
    bound = c.task.n_outputs * c.input_rank
    excess = xp.where(c.fisher.rank() > bound, one[..., 0], 0.0)
    return Outcome(largest(xp, xp.abs(count - c.fisher.rank()), excess), clear)


@claim("widths", "wide: every product can have full rank; bottleneck: F cannot have rank n_0 n_L, and has not")
def _widths(c: Case) -> Outcome:
    xp, k = c.xp, c.task.factors
    sizes = (int(k.input_root.shape[-1]), *(int(w.shape[-2]) for w in c.weights))
    inputs, outputs = sizes[0], sizes[-1]
    ahead = [0, *(min(sizes[i:]) for i in range(1, c.depth + 1))]
    behind = [min(sizes[:i]) for i in range(1, c.depth + 1)]
    most = sum((ahead[i + 1] - ahead[i]) * behind[i] for i in range(c.depth))
    names = {"wide": ahead[1] == outputs and behind[-1] == inputs, "bottleneck": most < inputs * outputs}
    name = dl.regime(c.weights, c.task)
    wrong = name not in ("wide", "intermediate", "bottleneck") or any(
        (name == key) != holds for key, holds in names.items()
    )
    rank = c.fisher.rank()
    return Outcome(0.0 * c.size + xp.where(rank > most, 1.0 + 0.0 * rank, 0.0 * rank) + float(wrong))


# ------------------------------------------------------------ inverses of the Fisher matrix


@claim("23", "F F^g F = F for the exact layerwise rule and for F⁺")
def _inner_inverse(c: Case) -> Outcome:
    once = c.fisher.matvec(c.v)
    twice = [c.fisher.matvec(c.fisher.precondition(once, inverse=i)) for i in ("exact", "moore_penrose")]
    return Outcome(largest(c.xp, *(c.difference(image, once) for image in twice)), magnified=c.fisher_condition)


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
        ),
        magnified=c.fisher_condition,
    )


@claim("24–30", "every natural gradient moves W along W − W*")
def _same_velocity(c: Case) -> Outcome:
    xp = c.xp
    tangents = (c.directions["exact"], c.directions["moore_penrose"], c.other)
    residuals = [norm(xp, c.velocity(d) - c.whitened_error) / c.size for d in tangents]
    return Outcome(largest(xp, *residuals), c.every_matrix, c.fisher_condition)


@claim("27–28", "Σ W_i^a d_i W_i^b is the derivative of the product of the layers")
def _velocity(c: Case) -> Outcome:
    xp = c.xp
    # The product is linear in one layer: a difference with step one is exact.
    moved = [
        c.end_to_end(c.replaced(i, w + d)) - c.product for i, (w, d) in enumerate(zip(c.weights, c.v, strict=True))
    ]
    total = moved[0]
    for part in moved[1:]:
        total = total + part
    scale = sum(norm(xp, part) for part in moved) + norm(xp, c.product) + tiny(xp, c.like)
    return Outcome(norm(xp, dl.end_to_end_velocity(c.weights, c.v) - total) / scale)


@claim("31–32", "S = B^{1/2}AᵀCAB^{1/2} is the projector on what the layers can realise")
def _projector(c: Case) -> Outcome:
    xp, residuals = c.xp, []
    h = c.random_matrix(4, c.whitened_error.shape[-2:])
    for inverse in ("exact", "moore_penrose"):
        once = c.velocity(c.fisher.precondition(c.seen(h), inverse=inverse))
        twice = c.velocity(c.fisher.precondition(c.seen(once), inverse=inverse))
        residuals += [norm(xp, twice - once) / norm(xp, h), c.difference(c.seen(once), c.seen(h))]
    return Outcome(largest(xp, *residuals), magnified=c.fisher_condition)


@claim("exact velocity", "the closed form solves F d = ∇ and is every natural gradient's, at any widths and ranks")
def _exact_velocity(c: Case) -> Outcome:
    xp = c.xp
    closed = c.white(dl.exact_velocity(c.weights, c.task))
    solves = [c.fisher.matvec(c.directions[i]) for i in ("exact", "moore_penrose")] + [c.seen(closed)]
    reference = tangent_norm(xp, c.seen(c.white(c.optimum))) + tangent_norm(xp, c.gradient) + tiny(xp, c.like)
    gaps = [tangent_norm(xp, tuple(x - g for x, g in zip(s, c.gradient, strict=True))) / reference for s in solves]
    agree = [norm(xp, closed - c.velocity(d)) / c.size for d in (c.directions["moore_penrose"], c.other)]
    return Outcome(largest(xp, *gaps, *agree), magnified=c.fisher_condition)


@claim("short form", "layers of full rank: the exact velocity is G̃ − (I − UUᵀ) G̃ (I − VVᵀ)")
def _short_form(c: Case) -> Outcome:
    xp = c.xp
    moves = c.white(c.product)
    u, s, vh = linalg.svd(xp, moves)
    kept = s > c.cutoff * xp.max(s, axis=-1, keepdims=True)
    count = xp.sum(xp.where(kept, xp.ones_like(s), 0.0), axis=-1) + 0.0 * c.size
    smallest = xp.min(xp.where(kept, s, s[..., :1]), axis=-1)
    condition = s[..., 0] / xp.where(smallest > 0.0, smallest, 1.0)
    u, vh = u[..., : s.shape[-1]] * xp.where(kept, 1.0 + 0.0 * s, 0.0)[..., None, :], vh[..., : s.shape[-1], :]
    g = c.whitened_error
    left = g - u @ (u.mT @ g)
    expected = g - (left - (left @ (vh.mT * xp.where(kept, 1.0 + 0.0 * s, 0.0)[..., None, :])) @ vh)
    gap = norm(xp, c.white(dl.exact_velocity(c.weights, c.task)) - expected) / c.size
    # What the short form keeps is always realised; all of it is where the ranks agree.
    applies = c.rank == count * (c.input_rank + c.task.n_outputs - count)
    return Outcome(gap, applies, largest(xp, c.condition**2, condition**2))


@claim("exact rule", "the exact layerwise rule has the exact velocity in every regime")
def _exact_rule(c: Case) -> Outcome:
    closed = c.white(dl.exact_velocity(c.weights, c.task))
    return Outcome(norm(c.xp, c.velocity(c.directions["exact"]) - closed) / c.size)


@claim("exact rule, wide", "the exact layerwise rule is Eq 42 in the wide regime")
def _exact_is_layerwise(c: Case) -> Outcome:
    exact, layerwise = (c.fisher.precondition(c.v, inverse=inverse) for inverse in ("exact", "layerwise"))
    given = c.of_directions(c.directions["exact"], c.directions["layerwise"])
    return Outcome(largest(c.xp, given, c.difference(exact, layerwise)), c.all_full)


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
    gaps = [
        norm(xp, c.depth * c.white(a @ x @ b) - c.whitened_error) for a, x, b in zip(c.ahead, d, c.behind, strict=True)
    ]
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

    h = c.random_matrix(5, c.product.shape[-2:])
    column = tuple(a.mT @ h @ b.mT for a, b in zip(c.ahead, c.behind, strict=True))
    image, back = c.fisher.matvec(c.v), inverse(c.v)
    i, j = 0, c.depth - 1
    forward, backward = c.fisher.factors(i, j)
    block = (
        inverse_ahead[i]
        @ (c.task.noise_covariance @ (inverse_ahead[j].mT @ c.v[j] @ inverse_behind[j].mT) @ precision)
        @ inverse_behind[i]
    )
    restored = backward.mT @ block @ forward
    return Outcome(
        largest(
            xp,
            norm(xp, left_inverse(column) - h) / norm(xp, h),
            c.difference(c.fisher.matvec(inverse(image)), image),
            c.difference(inverse(c.fisher.matvec(back)), back),
            c.of_directions(inverse(c.gradient), c.directions["layerwise"]),
            norm(xp, restored - c.v[j]) / norm(xp, c.v[j]),
        ),
        square,
        c.condition**4,
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
    _, s, _ = linalg.svd(xp, c.product)
    # One layer alone may be singular: its products, of no layers, are not.
    square = square & (s[..., -1] > c.cutoff * s[..., 0])
    inverse = c.inverse_of(c.product, square)
    magnified = largest(xp, c.condition**3, (s[..., 0] / xp.where(square, s[..., -1], 1.0)) ** 2)
    k = inverse @ c.optimum @ inverse
    expected = tuple(
        (w - (w @ b) @ k @ (a @ w)) / c.depth for a, w, b in zip(c.ahead, c.weights, c.behind, strict=True)
    )
    d = c.directions["layerwise"]
    gap = tangent_norm(xp, tuple(x - y for x, y in zip(expected, d, strict=True)))
    # At the optimum both are the rounding of the weights.
    return Outcome(gap / (tangent_norm(xp, d) + tangent_norm(xp, c.weights)), square, magnified)


# --------------------------------------------------------------------- rectangular layers


@claim("38–42", "the layerwise rule inverts ⟨eeᵀ⟩ and ⟨xxᵀ⟩: E⁺∇X⁺/L, as operator and in closed form")
def _layerwise(c: Case) -> Outcome:
    xp, d = c.xp, c.directions["layerwise"]
    noise = c.unroot.mT @ c.unroot

    def undo(tangent: Tangent) -> Tangent:
        return tuple(
            a.mT @ noise @ a @ x @ (b @ c.task.input_moment @ b.mT) * c.depth
            for a, x, b in zip(c.ahead, tangent, c.behind, strict=True)
        )

    back, other = undo(d), undo(c.v)
    restored = undo(c.fisher.precondition(other, inverse="layerwise"))
    reference = tangent_norm(xp, c.seen(c.white(c.optimum))) + tangent_norm(xp, c.gradient) + tiny(xp, c.like)
    gap = tangent_norm(xp, tuple(s - g for s, g in zip(back, c.gradient, strict=True))) / reference
    applied = c.fisher.precondition(c.gradient, inverse="layerwise")
    near = tangent_norm(xp, tuple(x - y for x, y in zip(applied, d, strict=True)))
    near = near / (tangent_norm(xp, d) + tangent_norm(xp, c.weights) + tiny(xp, c.like))
    return Outcome(largest(xp, gap, near, c.difference(restored, other)))


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
    length = norm(xp, exact) + _arrays.eps(xp, c.like) * c.size
    # Near the optimum the rounding of W and W* is all there is of either velocity.
    return Outcome(gap / length, c.all_full, c.condition**2 * (1.0 + c.size / length))


# -------------------------------------------------------------- Moore–Penrose, conservation


@claim("F⁺∇, shortest", "the Moore–Penrose natural gradient is orthogonal to all that changes nothing")
def _shortest(c: Case) -> Outcome:
    xp, d = c.xp, c.directions["moore_penrose"]
    length = tangent_norm(xp, d)
    # Where F has full rank nothing is free, and what is left of u is rounding.
    angle = xp.abs(dot(xp, c.free, d)) / (tangent_norm(xp, c.u) * length + tiny(xp, c.like))
    longer = (length - tangent_norm(xp, c.directions["exact"])) / (length + tiny(xp, c.like))
    return Outcome(largest(xp, angle, longer, _gauge(c, d)), magnified=c.fisher_condition)


@claim("balance", "gradient flow and F⁺ flow conserve W_{i+1}ᵀW_{i+1} − W_iW_iᵀ")
def _balance(c: Case) -> Outcome | None:
    if c.depth == 1:
        return None
    xp, directions = c.xp, (c.gradient, c.directions["moore_penrose"])
    residuals = [_gauge(c, d) for d in directions]
    for d in directions:
        # The balance is quadratic in the weights: a central difference with any step is exact.
        length = tangent_norm(xp, d)
        part = tangent_norm(xp, c.weights) / xp.where(length > 0.0, length, 1.0)
        part = xp.where(xp.isnan(length), length, part)[..., None, None]
        up = dl.balancedness(tuple(w + part * x for w, x in zip(c.weights, d, strict=True)))
        down = dl.balancedness(tuple(w - part * x for w, x in zip(c.weights, d, strict=True)))
        scale = tangent_norm(xp, c.weights) ** 2 + tiny(xp, c.like)
        residuals += [norm(xp, x - y) / scale for x, y in zip(up, down, strict=True)]
    return Outcome(largest(xp, *residuals), magnified=c.fisher_condition)


def _gauge(c: Case, d: Tangent) -> Array:
    """How far a tangent is from leaving the balance alone: W_{i+1}ᵀ d_{i+1} − d_i W_iᵀ."""
    xp = c.xp
    result = 0.0 * tangent_norm(xp, d)
    for i in range(c.depth - 1):
        above, below = c.weights[i + 1].mT @ d[i + 1], d[i] @ c.weights[i].mT
        # A layer that hardly moves is known to the rounding of those that do.
        scale = (norm(xp, c.weights[i + 1]) + norm(xp, c.weights[i])) * tangent_norm(xp, d)
        result = largest(xp, result, norm(xp, above - below) / (scale + tiny(xp, c.like)))
    return result


# ------------------------------------------------------------------------------- dynamics


@claim("30, flow", "W(t) − W* = e^{−t}(W_0 − W*), and the excess loss falls as e^{−2t}")
def _flow(c: Case) -> Outcome:
    xp, time = c.xp, 0.75
    moved = dl.natural_gradient_flow(c.product, c.task, time)
    scale = c.moment_loss(0.0 * c.product) + c.moment_loss(c.product) + c.size**2
    least = c.moment_loss(c.optimum)
    fallen = c.moment_loss(moved) - least - math.exp(-2 * time) * (c.moment_loss(c.product) - least)
    halfway = dl.natural_gradient_flow(dl.natural_gradient_flow(c.product, c.task, 0.25), c.task, 0.5)
    straight = norm(xp, c.white(moved - c.optimum) - math.exp(-time) * c.whitened_error) / c.size
    return Outcome(largest(xp, xp.abs(fallen) / scale, norm(xp, c.white(halfway - moved)) / c.size, straight))


@claim("Euler", "n steps of size η shrink W − W* by (1 − η)ⁿ: the excess loss falls at the rate −2 ln(1 − η)/η")
def _euler(c: Case) -> Outcome:
    rate, steps, least = 0.1, 5, c.moment_loss(c.optimum)
    moved = c.product
    for _ in range(steps):
        moved = moved - rate * (moved - c.optimum)
    expected = math.exp(-dl.euler_decay_rate(rate) * rate * steps) * (c.moment_loss(c.product) - least)
    scale = c.moment_loss(0.0 * c.product) + c.moment_loss(c.product) + c.size**2
    return Outcome(c.xp.abs(c.moment_loss(moved) - least - expected) / scale)


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


@claim("modes, time", "the closed forms of a(t) solve these two equations")
def _modes_in_time(c: Case) -> Outcome:
    xp = c.xp
    _, s, _ = linalg.svd(xp, c.task.factors.target)
    top = s[..., :1]
    # In units of the largest mode both equations run on a time of order one.
    s = s / xp.where(top > 0.0, top, 1.0)
    start = 0.5 * s + 0.25
    end, nodes = 1.0 / (2 * c.depth), 16
    angles = [math.pi * (2 * k + 1) / (2 * nodes) for k in range(nodes)]
    series = [sum(math.cos(2 * j * angle) / (4 * j * j - 1) for j in range(1, nodes // 2 + 1)) for angle in angles]
    shape = (nodes, *(1 for _ in s.shape))
    weights = xp.reshape(_arrays.asarray_like(xp, [end / nodes * (1 - 2 * x) for x in series], s), shape)
    times = xp.reshape(_arrays.asarray_like(xp, [0.5 * end * (1 + math.cos(x)) for x in angles], s), shape)
    a = dl.gradient_flow_modes(start, s, times, depth=c.depth)
    # Fejér's quadrature of da/dt is exact to rounding: a(t) is analytic.
    change = xp.sum(weights * (c.depth * a ** (2 - 2 / c.depth) * (s - a)), axis=0)
    moved = dl.gradient_flow_modes(start, s, end, depth=c.depth) - start
    natural = dl.natural_gradient_flow_modes(start, s, end) - (s + math.exp(-end) * (start - s))
    gap = largest(xp, xp.max(xp.abs(moved - change), axis=-1), xp.max(xp.abs(natural), axis=-1))
    return Outcome(gap + xp.zeros(c.batch, dtype=s.dtype, device=_arrays.device(s)))
