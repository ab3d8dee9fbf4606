"""What a user would write instead, and what an expert would: the opponents.

Each says where it is correct. Nothing is slower here than it would be there: what does not
depend on the members of an ensemble comes in ready (Σ⁻¹, W* = MΣ⁻¹), identity noise is
left out of products, and JAX compiles the whole. `xp` is NumPy, torch, jax.numpy or CuPy.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any
Weights = tuple[Array, ...]


# -------------------------------------------------------------------- pseudo-inverses


def pinv(xp: Any, a: Array) -> Array:
    """`pinv(hermitian=True)` with the relative cut-off n·eps; CuPy has no `hermitian`.

    Correct at every rank. The cut-off is said because defaults differ: 1e-15 in NumPy,
    which in float32 takes rounding for rank, n·eps in torch, 10 n·eps in JAX.
    """
    cutoff = a.shape[-1] * float(xp.finfo(a.dtype).eps)
    if xp.__name__ == "cupy":
        return xp.linalg.pinv(a, rcond=cutoff)
    return xp.linalg.pinv(a, rtol=cutoff, hermitian=True)


def inverse(xp: Any, a: Array) -> Array:
    """`inv`, or torch's fastest way by Cholesky: correct at full rank, and no one is told where rank is missing."""
    if xp.__name__ != "torch":
        return xp.linalg.inv(a)
    factor, n = xp.linalg.cholesky(a), int(a.shape[-1])
    if n > 256:
        return xp.cholesky_inverse(factor)
    half = xp.linalg.solve_triangular(factor, xp.eye(n, dtype=a.dtype, device=a.device), upper=False)
    return half.mT @ half


def symmetric_pinv(xp: Any, a: Array) -> Array:
    """`pinv` of the symmetric part, and symmetric itself to the last bit."""
    found = pinv(xp, (a + a.mT) / 2)
    return (found + found.mT) / 2


def pinv_preconditioned(xp: Any, grad: Array, left: Array, right: Array) -> Array:
    """left⁺ grad right⁺ by two pseudo-inverses."""
    return pinv(xp, left) @ grad @ pinv(xp, right)


# ------------------------------------------------------------- layerwise natural gradient


class Known(NamedTuple):
    """What experts work out once for all members of an ensemble."""

    moment: Array
    """Σ."""
    cross: Array
    """M = ⟨y xᵀ⟩."""
    optimum: Array
    """W* = M Σ⁻¹."""
    precision: Array | None
    """Σ̃⁻¹, None for identity noise."""


def known(moment: np.ndarray, noise: np.ndarray, cross: np.ndarray) -> Known:
    """Work it out in float64, on NumPy arrays."""
    dtype = moment.dtype
    wide = [array.astype(np.float64) for array in (moment, noise, cross)]
    optimum = np.linalg.solve(wide[0], wide[2].T).T.astype(dtype)
    identity = np.array_equal(noise, np.eye(noise.shape[0]))
    return Known(moment, cross, optimum, None if identity else np.linalg.inv(wide[1]).astype(dtype))


def _times(left: Array | None, right: Array | None) -> Array | None:
    """The product of two matrices, with None for the identity."""
    if left is None or right is None:
        return right if left is None else left
    return left @ right


def _partial_products(weights: Weights) -> tuple[list[Array | None], list[Array | None]]:
    """W_i^a and W_i^b of every layer, None for the identities at the ends."""
    ahead: list[Array | None] = [None]
    behind: list[Array | None] = [None]
    for layer in weights[:0:-1]:
        ahead.append(_times(ahead[-1], layer))
    for layer in weights[:-1]:
        behind.append(_times(layer, behind[-1]))
    return ahead[::-1], behind


def written(xp: Any, weights: Weights, known: Known) -> Weights:
    """Eq 42 as it stands: two covariances a layer, and the pseudo-inverse of both.

    Correct in every regime as far as the cut-off n·eps of `pinv` tells rank from rounding.
    At a bottleneck that takes this very cut-off: NumPy's 1e-15 inverts rounding in float32.
    A covariance squares the condition number, so Gaussian networks lose most digits.
    """
    moment, cross, _, precision = known
    ahead, behind = _partial_products(weights)
    error = (weights[-1] if behind[-1] is None else weights[-1] @ behind[-1]) @ moment - cross
    if precision is not None:
        error = precision @ error
    directions = []
    for a, b in zip(ahead, behind, strict=True):
        left = precision if a is None else _times(a.mT, _times(precision, a))
        right = moment if b is None else b @ moment @ b.mT
        gradient = error if a is None else a.mT @ error
        gradient = gradient if b is None else gradient @ b.mT
        if left is not None:
            gradient = pinv(xp, left) @ gradient
        directions.append(gradient @ pinv(xp, right) / len(weights))
    return tuple(directions)


def square_solves(xp: Any, weights: Weights, known: Known) -> Weights:
    """Eq 34 by LU: d_i = (W_i^a)⁻¹ (W − W*) (W_i^b)⁻¹ / L.

    Correct for square networks without a singular layer.
    """
    ahead, behind = _partial_products(weights)
    error = _times(weights[-1], behind[-1]) - known.optimum
    error = error / len(weights)
    directions = []
    for a, b in zip(ahead, behind, strict=True):
        direction = error if a is None else xp.linalg.solve(a, error)
        directions.append(direction if b is None else xp.linalg.solve(b.mT, direction.mT).mT)
    return tuple(directions)


def square_inverses(xp: Any, weights: Weights, known: Known) -> Weights:
    """Eq 34 by one inverse a layer, multiplied up: d_i = (W_i − (V_{i+1} ⋯ V_L) W* (V_1 ⋯ V_{i-1})) / L.

    Correct for square networks without a singular layer. The product W is not needed, and
    errors go with the condition of the layers in place of that of their products.
    """
    return _multiplied_up(weights, [xp.linalg.inv(layer) for layer in weights], known.optimum)


def _multiplied_up(weights: Weights, inverses: list[Array], optimum: Array) -> Weights:
    left = [optimum]
    for v in inverses[:0:-1]:
        left.append(v @ left[-1])
    left.reverse()
    right, directions = None, [(weights[0] - left[0]) / len(weights)]
    for layer, part, v in zip(weights[1:], left[1:], inverses[:-1], strict=True):
        right = _times(right, v)
        directions.append((layer - part @ right) / len(weights))
    return tuple(directions)


def gram(xp: Any, weights: Weights, known: Known, *, solve: Callable[[Array, Array], Array] | None = None) -> Weights:
    """Eq 42 through Gram matrices of the thin side, split at the narrowest layer.

    With W_i^a = U V split where it is narrowest, the left factor of the rule applied to D is
    Vᵀ(VVᵀ)⁻¹ (UᵀΣ̃⁻¹U)⁻¹ UᵀΣ̃⁻¹ D, and one of U, V is the identity unless there is a
    bottleneck in between; the right factor is the same with Σ. This is E⁺ = (EᵀE)⁻¹Eᵀ or
    Eᵀ(EEᵀ)⁻¹, whichever is thin. Correct in every regime when all layers have full rank.
    It works on covariances, so Gaussian networks lose most digits.
    """
    solve = solve or xp.linalg.solve
    moment, _, optimum, precision = known
    depth = len(weights)
    fronts, backs = [(None, None)], [(None, None)]
    for layer in weights[:0:-1]:
        fronts.append(_narrowed(*fronts[-1], layer))
    for layer in weights[:-1]:
        v, u = _narrowed(*(None if part is None else part.mT for part in backs[-1]), layer.mT)
        backs.append((None if v is None else v.mT, None if u is None else u.mT))
    fronts.reverse()
    v, u = backs[-1]
    product = weights[-1] if u is None and v is None else weights[-1] @ (v if u is None else _times(u, v))
    error = (product - optimum) / depth
    directions = []
    for (u, v), (v_behind, u_behind) in zip(fronts, backs, strict=True):
        direction = error
        if u is not None:
            weighted = u.mT if precision is None else u.mT @ precision
            direction = solve(weighted @ u, weighted @ direction)
        if v is not None:
            direction = v.mT @ solve(v @ v.mT, direction)
        if v_behind is not None:
            weighted = v_behind @ moment
            direction = solve(weighted @ v_behind.mT, weighted @ direction.mT).mT
        if u_behind is not None:
            direction = solve(u_behind.mT @ u_behind, direction.mT).mT @ u_behind.mT
        directions.append(direction)
    return tuple(directions)


def _narrowed(u: Array | None, v: Array | None, layer: Array) -> tuple[Array | None, Array | None]:
    """U V times one more layer, split where it is narrowest; None is the identity."""
    v = _times(v, layer)
    if v.shape[-1] < v.shape[-2]:
        return _times(u, v), None
    return u, v


def solve_by_cholesky(xp: Any) -> Callable[[Array, Array], Array] | None:
    """How a library solves stacks of positive-definite systems; None where it has no way of its own."""
    if xp.__name__ == "torch":
        return lambda a, b: xp.cholesky_solve(b, xp.linalg.cholesky(a))
    if xp.__name__ == "jax.numpy":
        scipy_linalg = importlib.import_module("jax.scipy.linalg")
        return lambda a, b: scipy_linalg.cho_solve((xp.linalg.cholesky(a), True), b)
    return None


def layerwise_experts(xp: Any, sizes: tuple[int, ...]) -> dict[str, Callable[..., Weights]]:
    """The expert variants that are correct for a network of these widths, by name."""
    variants = {
        "Gram, LU": functools.partial(gram, xp),
        "Gram, inv": functools.partial(gram, xp, solve=lambda a, b: xp.linalg.inv(a) @ b),
    }
    cholesky = solve_by_cholesky(xp)
    if cholesky is not None:
        variants["Gram, Cholesky"] = functools.partial(gram, xp, solve=cholesky)
    if len(set(sizes)) == 1:
        variants["LU of products"] = functools.partial(square_solves, xp)
        variants["inverse of each layer"] = functools.partial(square_inverses, xp)
    return variants


def simulated(
    xp: Any, weights: Weights, known: Known, minimum: Array, *, rate: float, steps: int, direct: Callable[..., Any]
) -> tuple[Array, ...]:
    """Steps of the layerwise rule of square networks by hand, with the loss of each: (steps + 1, batch), and weights.

    The loss comes out of the error W − W* that the direction needs anyway, for Σ̃ = I.
    """

    def loss(error: Array) -> Array:
        return minimum + 0.5 * xp.sum((error @ known.moment) * error, (-2, -1))

    def step(weights: Weights) -> tuple[Weights, Array]:
        directions, error = direct(xp, weights, known)
        return tuple(w - rate * d for w, d in zip(weights, directions, strict=True)), loss(error)

    if xp.__name__ == "jax.numpy":
        lax = importlib.import_module("jax").lax
        weights, losses = lax.scan(lambda carry, _: step(carry), weights, None, length=steps)
        last = loss(direct(xp, weights, known)[1])
        return xp.concatenate([losses, last[None]]), *weights
    rows = []
    for _ in range(steps):
        weights, found = step(weights)
        rows.append(found)
    return xp.stack([*rows, loss(direct(xp, weights, known)[1])]), *weights


def solves_and_error(xp: Any, weights: Weights, known: Known) -> tuple[Weights, Array]:
    """`square_solves`, and W − W* beside it."""
    ahead, behind = _partial_products(weights)
    error = _times(weights[-1], behind[-1]) - known.optimum
    share, directions = error / len(weights), []
    for a, b in zip(ahead, behind, strict=True):
        direction = share if a is None else xp.linalg.solve(a, share)
        directions.append(direction if b is None else xp.linalg.solve(b.mT, direction.mT).mT)
    return tuple(directions), error


def inverses_and_error(xp: Any, weights: Weights, known: Known) -> tuple[Weights, Array]:
    """`square_inverses`, and W − W* beside it."""
    product = functools.reduce(lambda done, layer: layer @ done, weights)
    return square_inverses(xp, weights, known), product - known.optimum


def grams_and_error(xp: Any, weights: Weights, known: Known) -> tuple[Weights, Array]:
    """`gram` by the library's fastest way to solve, and W − W* beside it."""
    product = functools.reduce(lambda done, layer: layer @ done, weights)
    return gram(xp, weights, known, solve=solve_by_cholesky(xp)), product - known.optimum


def written_and_error(xp: Any, weights: Weights, known: Known) -> tuple[Weights, Array]:
    """`written`, and W − W* beside it."""
    product = functools.reduce(lambda done, layer: layer @ done, weights)
    return written(xp, weights, known), product - known.optimum


ARITHMETIC: dict[tuple[int, ...], tuple[str, str]] = {
    # T = W_1 Σ, T W_1ᵀ, W_2 (T W_1ᵀ) W_2ᵀ; W_3 W_2 and the Gram matrices of it and W_3; the error Y, its product
    # with Tᵀ and that with W_2ᵀ; with an inverse each, and two inverses and W_3ᵀ; with an inverse and (W_3 W_2)ᵀ.
    (48, 32, 24, 16): (
        "32x48x48 32x48x32 24x32x32 24x32x24 16x24x32 16x24x16 16x32x16 16x32x48 16x48x32 16x32x24 "
        "16x24x24 16x32x32 16x16x32 24x16x32 16x16x48 32x16x48",
        "32 24 16 16",
    ),
    # The same from the other side, where moments cancel.
    (16, 24, 32, 48): (
        "32x48x32 24x32x32 24x32x24 32x24x16 16x24x16 16x32x16 48x32x16 32x48x16 24x32x16 24x24x16 "
        "32x32x16 32x16x16 32x16x24 48x16x16 48x16x32",
        "32 24 16 16",
    ),
    # W_2ᵀ W_2, W_1 Σ, W_1 Σ W_1ᵀ, W_2ᵀ W* and W_1 Σ W*ᵀ, each of these two with an inverse.
    (32, 8, 32): ("8x32x8 8x32x32 8x32x8 8x32x32 8x32x32 8x8x32 8x8x32", "8 8"),
}
"""The sides m × n × p of products and n of inverses, the fewest that are known to give Eq 42 for these widths."""


def arithmetic(
    xp: Any, weights: Weights, *, condition: str
) -> tuple[Callable[..., Weights], tuple[Weights, ...]] | None:
    """The products and inverses that no known way to Eq 42 does without, on any matrices of the same shapes.

    Nothing is added, copied or checked, and nothing depends on anything before it. For square
    networks: one inverse and 3L products where W is well conditioned ("good"); L/2 inverses
    and 4L − 4 products where each two layers are ("pairs"); L and 3L − 4 where layers are
    ("layers"). None for widths that nobody has counted.
    """
    sizes = (int(weights[0].shape[-1]), *(int(layer.shape[-2]) for layer in weights))
    depth, batch = len(weights), int(weights[0].shape[0])
    if len(set(sizes)) == 1:
        inverses, count = {
            "good": (1, 3 * depth),
            "pairs": (-(-depth // 2), 4 * depth - 4),
            "layers": (depth, 3 * depth - 4),
        }[condition]
        pairs = tuple((weights[i % depth], weights[(i + 1) % depth]) for i in range(count))
        return _bare(xp, xp.linalg.inv), (pairs, weights[:inverses])
    if sizes not in ARITHMETIC:
        return None
    shapes, sides = ([tuple(map(int, word.split("x"))) for word in words.split()] for words in ARITHMETIC[sizes])
    numbers = xp.concatenate([layer.reshape(-1) for layer in weights])

    def matrices(m: int, n: int) -> Array:
        repeats = -(-batch * m * n // numbers.shape[0])
        return xp.concatenate([numbers] * repeats)[: batch * m * n].reshape(batch, m, n)

    grams = tuple(matrices(n, 2 * n) for (n,) in sides)
    return _bare(xp, functools.partial(inverse, xp)), (
        tuple((matrices(m, n), matrices(n, p)) for m, n, p in shapes),
        tuple(x @ x.mT for x in grams),
    )


def _bare(xp: Any, invert: Callable[[Array], Array]) -> Callable[..., Weights]:
    return lambda pairs, square: (*(a @ b for a, b in pairs), *(invert(a) for a in square))


# ------------------------------------------------------------ Moore–Penrose natural gradient


def kronecker(xp: Any, a: Array, b: Array) -> Array:
    """a ⊗ b for stacks of matrices."""
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    p, m, q, n = product.shape[-4:]
    return product.reshape((*product.shape[:-4], p * m, q * n))


def dense_fisher(xp: Any, weights: Weights, moment: Array, precision: Array | None = None) -> Array:
    """F of Eq 19 by its Kronecker blocks, those below the diagonal transposed from above."""
    ahead, behind = _partial_products(weights)
    identity = xp.eye(weights[-1].shape[-2], dtype=moment.dtype, **_device(xp, moment))
    sandwich = identity if precision is None else precision
    rows: list[list[Any]] = []
    for i, (a, b) in enumerate(zip(ahead, behind, strict=True)):
        left = sandwich if a is None else a.mT @ sandwich
        right = moment if b is None else b @ moment
        row = [rows[j][i].mT for j in range(i)]
        for c, d in list(zip(ahead, behind, strict=True))[i:]:
            row.append(kronecker(xp, right if d is None else right @ d.mT, left if c is None else left @ c))
        rows.append(row)
    concatenate = xp.cat if xp.__name__ == "torch" else xp.concatenate
    return concatenate([concatenate(row, -1) for row in rows], -2)


def _device(xp: Any, like: Array) -> dict[str, Any]:
    return {"device": like.device} if xp.__name__ == "torch" else {}


def stacked(xp: Any, tangent: Weights) -> Array:
    """The columns of all layers in one vector."""
    concatenate = xp.cat if xp.__name__ == "torch" else xp.concatenate
    return concatenate([part.mT.reshape((*part.shape[:-2], -1)) for part in tangent], -1)


def split(weights: Weights, vector: Array) -> Weights:
    """Undo `stacked`."""
    parts, start = [], 0
    for layer in weights:
        m, n = layer.shape[-2:]
        parts.append(vector[..., start : start + m * n].reshape((*vector.shape[:-1], n, m)).mT)
        start += m * n
    return tuple(parts)


def gradient(weights: Weights, known: Known) -> Weights:
    """The gradient of the loss, W_i^aᵀ Σ̃⁻¹ (WΣ − M) W_i^bᵀ."""
    ahead, behind = _partial_products(weights)
    error = _times(weights[-1], behind[-1]) @ known.moment - known.cross
    error = _times(known.precision, error)
    return tuple(
        _times(_times(None if a is None else a.mT, error), None if b is None else b.mT)
        for a, b in zip(ahead, behind, strict=True)
    )


def moore_penrose_dense(xp: Any, weights: Weights, known: Known) -> Weights:
    """F⁺∇ of one network, by the dense F and `pinv`. Correct everywhere."""
    dense = dense_fisher(xp, weights, known.moment, known.precision)
    return split(weights, (pinv(xp, dense) @ stacked(xp, gradient(weights, known))[..., None])[..., 0])


def moore_penrose_kernel(xp: Any, weights: Weights, known: Known) -> Weights:
    """F⁺∇ = A (AᵀA)⁻¹ vec(W − W*) for a stack, through systems of n_0 n_L equations.

    Correct in the wide and intermediate regimes, with Σ of full rank.
    """
    ahead, behind = _partial_products(weights)
    error = _times(weights[-1], behind[-1]) - known.optimum
    n_out, n_in = error.shape[-2:]
    left_identity, right_identity = (xp.eye(n, dtype=error.dtype, **_device(xp, error)) for n in (n_out, n_in))
    kernel = 0.0
    for a, b in zip(ahead, behind, strict=True):
        left = left_identity if a is None else a @ a.mT
        kernel = kernel + kronecker(xp, right_identity if b is None else b.mT @ b, left)
    vector = error.mT.reshape((*error.shape[:-2], n_in * n_out, 1))
    solve = solve_by_cholesky(xp) or xp.linalg.solve
    solved = solve(kernel, vector).reshape((*error.shape[:-2], n_in, n_out)).mT
    return tuple(
        _times(_times(None if a is None else a.mT, solved), None if b is None else b.mT)
        for a, b in zip(ahead, behind, strict=True)
    )


# ------------------------------------------------------------------------------ moments


def _centred(xp: Any, x: Array) -> Array:
    return x - xp.mean(x, axis=-2, keepdims=True)


def covariance(xp: Any, x: Array) -> Array:
    """Centre, and one matrix product. Loses digits where the mean is large beside the spread in the sum itself."""
    c = _centred(xp, x)
    return c.mT @ c / x.shape[-2]


def checked_covariance(xp: Any, x: Array) -> tuple[Array, Any]:
    """`covariance` made symmetric, and whether its mean is too small to leave a rounding error in it."""
    _, scatter, fits = _checked_scatter(xp, x)
    return scatter / x.shape[-2], fits


def _checked_scatter(xp: Any, x: Array) -> tuple[Array, Array, Any]:
    mean = xp.mean(x, axis=-2, keepdims=True)
    c = x - mean
    scatter = c.mT @ c
    if xp is not np:  # which knows the product of a matrix with its own transpose, and has it symmetric
        scatter = (scatter + scatter.mT) / 2
    least = (x.shape[-2] * float(xp.finfo(x.dtype).eps)) * mean[..., 0, :] ** 2
    fits = xp.all(least <= xp.linalg.diagonal(scatter))
    return mean, scatter, fits if xp.__name__ == "jax.numpy" else bool(fits)


def numpy_cov(x: np.ndarray) -> np.ndarray:
    """`numpy.cov`, member by member."""
    return np.stack([np.cov(member, rowvar=False, bias=True, dtype=x.dtype) for member in x])


def _square_sums(xp: Any, x: Array) -> Array:
    """Squared norms along the last axis, without an array of squares where the library can."""
    return xp.einsum("...i,...i->...", x, x)


def _shrunk(xp: Any, cov: Array, mean: Array, share: Array) -> Array:
    share = share[..., None, None]
    identity = xp.eye(cov.shape[-1], dtype=cov.dtype, **_device(xp, cov))
    return (1.0 - share) * cov + (share * mean[..., None, None]) * identity


def ledoit_wolf(xp: Any, x: Array) -> Array:
    """Ledoit and Wolf (2004) for a stack, by the formula of scikit-learn without its blocks."""
    n, p = x.shape[-2:]
    c = _centred(xp, x)
    cov = c.mT @ c / n
    mean = xp.einsum("...ii->...", cov) / p
    norms = _square_sums(xp, c)
    square = _square_sums(xp, cov.reshape((*cov.shape[:-2], p * p)))
    beta = (_square_sums(xp, norms) / n - square) / n
    delta = square - p * mean * mean
    return _shrunk(xp, cov, mean, xp.minimum(beta, delta) / delta)


def oas(xp: Any, x: Array) -> Array:
    """Chen, Wiesel, Eldar and Hero (2010) for a stack, by the formula of scikit-learn."""
    n, p = x.shape[-2:]
    cov = covariance(xp, x)
    mean = xp.einsum("...ii->...", cov) / p
    alpha = _square_sums(xp, cov.reshape((*cov.shape[:-2], p * p))) / (p * p)
    # Over the matrix's entries: (mean square + mean trace squared) / ((n + 1)(mean square − mean trace squared / p)).
    share = (alpha + mean * mean) / ((n + 1) * (alpha - mean * mean / p))
    return _shrunk(xp, cov, mean, xp.clip(share, None, 1.0))


def sklearn_loop(name: str, x: np.ndarray) -> np.ndarray:
    """scikit-learn's `empirical_covariance`, `ledoit_wolf` or `oas`, member by member."""
    function = getattr(importlib.import_module("sklearn.covariance"), name)
    results = [function(member) for member in x]
    return np.stack([result[0] if isinstance(result, tuple) else result for result in results])


def chan_stream(xp: Any, chunks: tuple[Array, ...]) -> Array:
    """Covariance of samples that come in chunks, by the merge of Chan, Golub and LeVeque."""

    def plain(x: Array) -> tuple[Array, Array, None]:
        mean = xp.mean(x, axis=-2, keepdims=True)
        c = x - mean
        return mean, c.mT @ c, None

    return _merged(chunks, plain)[0]


def checked_stream(xp: Any, chunks: tuple[Array, ...]) -> tuple[Array, list[Any]]:
    """`chan_stream` with each chunk's scatter as in `checked_covariance`."""
    return _merged(chunks, functools.partial(_checked_scatter, xp))


def _merged(chunks: tuple[Array, ...], of: Callable[[Array], tuple[Array, Array, Any]]) -> tuple[Array, list[Any]]:
    """The covariance from each chunk's mean and scatter, and what else is said of each."""
    count, mean, scatter, said = 0, None, None, []
    for x in chunks:
        n = x.shape[-2]
        m, s, more = of(x)
        said.append(more)
        if scatter is None:
            count, mean, scatter = n, m, s
            continue
        step = m - mean
        total = count + n
        scatter = scatter + s + step.mT @ (step * (count * n / total))
        mean = mean + step * (n / total)
        count = total
    return scatter / count, said


# ---------------------------------------------------------------------- Fisher information


class Partial(NamedTuple):
    """The products of a network, worked out once for many products with F."""

    ahead: tuple[Array | None, ...]
    behind: tuple[Array | None, ...]
    moment: Array
    precision: Array | None


def partial_products(weights: Weights, moment: Array, precision: Array | None = None) -> Partial:
    """Work them out."""
    ahead, behind = _partial_products(weights)
    return Partial(tuple(ahead), tuple(behind), moment, precision)


def structured_matvec(partial: Partial, tangent: Weights) -> Weights:
    """F times a tangent by the structure A B Aᵀ: three small products a layer, there and back."""
    ahead, behind, moment, precision = partial
    total = None
    for a, b, t in zip(ahead, behind, tangent, strict=True):
        term = _times(_times(a, t), b)
        total = term if total is None else total + term
    total = _times(precision, total @ moment)
    return tuple(
        _times(_times(None if a is None else a.mT, total), None if b is None else b.mT)
        for a, b in zip(ahead, behind, strict=True)
    )


def _forward(weights: Weights, x: Array) -> Array:
    for layer in weights:
        x = x @ layer.mT
    return x


def autodiff_matvec(xp: Any, weights: Weights, x: Array, tangent: Weights) -> Weights:
    """F times a tangent by forward and reverse differentiation over samples (JAX and torch), identity noise."""
    transforms = importlib.import_module("torch.func" if xp.__name__ == "torch" else "jax")

    def network(weights: Weights) -> Array:
        return _forward(weights, x)

    _, moved = transforms.jvp(network, (weights,), (tangent,))
    _, pull = transforms.vjp(network, weights)
    return pull(moved / x.shape[-2])[0]


def autodiff_dense(xp: Any, weights: Weights, x: Array) -> Array:
    """Dense F by `autodiff_matvec` on all unit vectors, 128 at a time."""
    size = sum(layer.shape[-2] * layer.shape[-1] for layer in weights)
    basis = xp.eye(size, dtype=x.dtype, **_device(xp, x))

    def column(vector: Array) -> Array:
        return stacked(xp, autodiff_matvec(xp, weights, x, split(weights, vector)))

    if xp.__name__ == "torch":
        return xp.func.vmap(column, chunk_size=128)(basis)
    return importlib.import_module("jax").lax.map(column, basis, batch_size=128)


def curvlinops_operator(weights: Weights, x: Array) -> Any:
    """The generalised Gauss–Newton operator of curvlinops for the same network (torch), or None without it.

    Its loss is the squared error averaged over samples and outputs, so it is 2/n_L times F.
    """
    try:
        curvlinops = importlib.import_module("curvlinops")
    except ImportError:
        return None
    torch = importlib.import_module("torch")
    layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device=w.device) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight.data.copy_(w)
    model = torch.nn.Sequential(*layers)
    y = torch.zeros((x.shape[0], weights[-1].shape[0]), dtype=x.dtype, device=x.device)
    loss = torch.nn.MSELoss(reduction="mean")
    return curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)])


# --------------------------------------------------------------------- nonlinear networks


def authors_step(xp: Any, params: Weights, damping: Array, x: Array, noise: Array, invert: Any) -> tuple[Any, ...]:
    """One step of the rule of Bernacchia, Lengyel and Hennequin (2018) for a tanh autoencoder.

    Parameters, the loss before the step, and the next damping. `invert` takes a moment and
    √damping to what stands for the inverse.
    """
    depth, samples = len(params), x.shape[-2]
    rows, a = [], x
    for i, w in enumerate(params):
        rows.append(xp.concatenate([a, xp.ones_like(a[:, :1])], axis=1))
        z = rows[-1] @ w.T
        a = z if i == depth - 1 else xp.tanh(z)
    error = a - x
    loss = 0.5 * xp.sum(error * error) / samples

    def back(delta: Array) -> list[Array]:
        found = [delta]
        for i in range(depth - 1, 0, -1):
            delta = (delta @ params[i][:, :-1]) * (1.0 - rows[i][:, :-1] ** 2)
            found.append(delta)
        return found[::-1]

    rate, root = 1.0 / depth, damping**0.5
    new, promised = [], 0.0
    for w, r, delta, drawn in zip(params, rows, back(error), back(noise), strict=True):
        gradient = delta.T @ r / samples
        direction = invert(xp, drawn.T @ drawn / samples, root) @ gradient @ invert(xp, r.T @ r / samples, root)
        new.append(w - rate * direction)
        promised = promised + rate * (1.0 - 0.5 * rate) * xp.sum(gradient * direction)
    a = x
    for i, w in enumerate(new):
        z = a @ w[:, :-1].T + w[:, -1]
        a = z if i == depth - 1 else xp.tanh(z)
    ratio = (loss - 0.5 * xp.sum((a - x) ** 2) / samples) / promised
    return *new, loss, damping * xp.where(ratio < 0.25, 1.5, xp.where(ratio > 0.75, 2.0 / 3.0, 1.0))


def root_damped_by_eigh(xp: Any, a: Array, root: Array) -> Array:
    """Each eigenvalue λ to 1/(λ + √damping), those of rounding to 0: the rule as it reads."""
    values, vectors = xp.linalg.eigh(a)
    kept = values > a.shape[-1] * float(xp.finfo(a.dtype).eps) * values[-1]
    return (vectors * xp.where(kept, 1.0 / (xp.abs(values) + root), 0.0)) @ vectors.T


def root_damped_by_inverse(xp: Any, a: Array, root: Array) -> Array:
    """(a + √damping 1)⁻¹: the same with enough samples, by an inverse."""
    return xp.linalg.inv(a + root * xp.eye(a.shape[-1], dtype=a.dtype))


# ------------------------------------------------------------------------ higher precision


def reference_direction(weights: Weights, moment: np.ndarray, cross: np.ndarray) -> tuple[np.ndarray, ...]:
    """Eq 34 in `numpy.longdouble` for square networks: layers' inverses refined by Newton's iteration.

    Each round squares the residual of the inverse; two take float64's to the rounding of the
    wider format, for layers of condition below 1e7 or so.
    """
    wide = np.longdouble
    layers = [np.asarray(layer, dtype=wide) for layer in weights]
    optimum = np.asarray(cross, dtype=wide) @ _refined_inverse(np.asarray(moment, dtype=wide))
    return _multiplied_up(layers, [_refined_inverse(layer) for layer in layers], optimum)


def _refined_inverse(a: np.ndarray) -> np.ndarray:
    guess = np.linalg.inv(a.astype(np.float64)).astype(np.longdouble)
    for _ in range(2):
        guess = guess + guess @ (np.eye(a.shape[-1], dtype=np.longdouble) - a @ guess)
    return guess
