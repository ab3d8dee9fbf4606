"""The Fisher information of a network as F = C Cᵀ, and what is solved with it.

C has a row for each parameter and a column for each sample n and output direction k: with
δ_i the errors that the direction sends back to layer i and ā_i what comes into it,

    (C c)_i = Σ_nkt c_nk δ_inkt ā_intᵀ,    (Cᵀ d)_nk = Σ_it δ_inktᵀ d_i ā_int.

The weight of a sample in the mean is part of δ, as its square root. Neither F nor C is needed
for products; small C are decomposed, and of large ones the smaller of CᵀC and C Cᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array
from natgrad_array.networks import passes
from natgrad_array.networks.layers import multiply

ROOT_ENTRIES = 2**18
"""Up to this many entries C is decomposed itself: a Gram matrix squares its condition number."""


class Root(NamedTuple):
    """Errors and inputs of some layers: C without being formed."""

    deltas: tuple[Any, ...]
    """δ_i, (*batch, N, K, T_i, n_i)."""
    rows: tuple[Any, ...]
    """ā_i, (*batch, N, T_i, n_{i-1} + 1); batch axes may still have to broadcast."""

    @property
    def n_columns(self) -> int:
        """N · K."""
        return int(self.deltas[0].shape[-4] * self.deltas[0].shape[-3])

    @property
    def n_rows(self) -> int:
        """P of these layers."""
        return sum(int(d.shape[-1] * a.shape[-1]) for d, a in zip(self.deltas, self.rows, strict=True))

    def layer(self, i: int) -> Root:
        """The rows of C that belong to one layer."""
        return Root((self.deltas[i],), (self.rows[i],))

    def times(self, c: Array) -> tuple[Array, ...]:
        """C c, for c of shape (*stack, *batch, N · K)."""
        samples, directions = self.deltas[0].shape[-4:-2]
        xp = _arrays.namespace(c)
        weights = xp.reshape(c, (*c.shape[:-1], samples, 1, directions))
        sums = []
        for delta in self.deltas:
            positions, n = delta.shape[-2:]
            total = weights @ xp.reshape(delta, (*delta.shape[:-2], positions * n))
            sums.append(xp.reshape(total, (*total.shape[:-2], positions, n)))
        return passes.collect(self.rows, sums)

    def transposed(self, d: Sequence[Array]) -> Array:
        """Cᵀ d, of shape (*stack, *batch, N · K)."""
        xp, total = _arrays.namespace(d[0]), None
        for delta, rows, part in zip(self.deltas, self.rows, d, strict=True):
            *batch, samples, directions, positions, n = delta.shape
            moved = multiply(rows, part.mT)
            column = xp.reshape(moved, (*moved.shape[:-2], positions * n, 1))
            product = xp.reshape(delta, (*batch, samples, directions, positions * n)) @ column
            product = xp.reshape(product, (*product.shape[:-3], samples * directions))
            total = product if total is None else total + product
        return total

    def dense(self) -> Array:
        """C, (*batch, P, N · K): layers in order, columns of their parameters stacked."""
        xp, parts = _arrays.namespace(self.deltas[0]), []
        for delta, rows in zip(self.deltas, self.rows, strict=True):
            jacobian = passes.jacobian(delta, rows[..., None, :, :])
            *batch, samples, directions, m, n = jacobian.shape
            b = len(batch)
            turned = xp.permute_dims(jacobian, (*range(b), b + 3, b + 2, b, b + 1))
            parts.append(xp.reshape(turned, (*batch, n * m, samples * directions)))
        return xp.concat(parts, axis=-2)

    def gram(self) -> Array:
        """CᵀC, (*batch, N · K, N · K), one layer at a time."""
        xp, total = _arrays.namespace(self.deltas[0]), None
        for i, (delta, rows) in enumerate(zip(self.deltas, self.rows, strict=True)):
            *batch, samples, directions, positions, n = delta.shape
            if positions == 1:
                # A column is a Kronecker product: the inner products of both factors are multiplied.
                errors = xp.reshape(delta, (*batch, samples * directions, n))
                backward = xp.reshape(errors @ errors.mT, (*batch, samples, directions, samples, directions))
                inputs = rows[..., 0, :]
                product = backward * (inputs @ inputs.mT)[..., :, None, :, None]
                product = xp.reshape(product, (*batch, samples * directions, samples * directions))
            else:
                product = _arrays.gram(xp, self.layer(i).dense())
            total = product if total is None else total + product
        return total


class Eigen(NamedTuple):
    """Eigenvalues of F that can differ from zero, and its eigenvectors in one of two forms."""

    values: Array
    """(*batch, r), ascending."""
    kept: Array
    """Those above the cut-off."""
    vectors: Array
    """U with F = U Λ Uᵀ, (*batch, P, r); or V with U = C V Λ^{-1/2}, (*batch, N · K, r)."""
    of_gram: bool

    def solve(self, root: Root, gradient: Sequence[Array], damping: float | Array) -> tuple[Array, ...]:
        """(F + damping)⁻¹ on the kept eigenvectors, zero on the others."""
        xp = _arrays.namespace(self.values)
        inverse = linalg.reciprocal(xp, self.values + damping, self.kept)
        if self.of_gram:
            inverse = inverse * linalg.reciprocal(xp, self.values, self.kept)
            return root.times(self._filtered(root.transposed(gradient), inverse))
        return split(self._filtered(join(gradient), inverse), [part.shape[-2:] for part in gradient])

    def _filtered(self, h: Array, factors: Array) -> Array:
        coordinates = (self.vectors.mT @ h[..., None])[..., 0]
        return (self.vectors @ (factors * coordinates)[..., None])[..., 0]


def eigen(root: Root, rtol: float | Array | None) -> Eigen:
    """Decompose F by its root, or by the smaller of its Gram matrices where the root is large.

    Parameters
    ----------
    root : Root
        C.
    rtol : float or array of shape (*batch,), or None
        Cut-off relative to the largest eigenvalue. By default what rounding explains: of the
        singular values of C, or of the eigenvalues of a Gram matrix.
    """
    like = root.deltas[0]
    xp = _arrays.namespace(like)
    rows, columns = root.n_rows, root.n_columns
    if rows * columns <= ROOT_ENTRIES:
        u, s, _ = linalg.svd(xp, root.dense())
        u, s = xp.flip(u, axis=-1), xp.flip(s, axis=-1)
        if rtol is None:
            return Eigen(s * s, s > max(rows, columns) * _arrays.eps(xp, like) * s[..., -1:], u, of_gram=False)
        values, cutoff = s * s, rtol if isinstance(rtol, float) else rtol[..., None]
        if not isinstance(cutoff, float):
            values = xp.where(cutoff >= 0.0, values, xp.nan)
        return Eigen(values, values > cutoff * values[..., -1:], u, of_gram=False)
    size = min(rows, columns)
    batch = tuple(like.shape[:-4])
    _arrays.check_fits(
        "the matrix behind the inverse", (*batch, size, size), xp, like, "use inverse 'layerwise', or fewer samples"
    )
    if columns < rows:
        gram = root.gram()
    else:
        _arrays.check_fits(
            "the root of the Fisher matrix",
            (*batch, rows, columns),
            xp,
            like,
            "use inverse 'layerwise', or fewer samples",
        )
        gram = _arrays.gram(xp, root.dense().mT)
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(gram), rtol)
    return Eigen(xp.where(values < 0.0, 0.0, values), kept & (values > 0.0), vectors, of_gram=columns < rows)


def join(tangent: Sequence[Array]) -> Array:
    """All layers' columns, one under the other: (*batch, P)."""
    xp = _arrays.namespace(tangent[0])
    batch = _arrays.broadcast_batch({str(i): tuple(part.shape[:-2]) for i, part in enumerate(tangent)})
    columns = [linalg.vec(xp, part) for part in tangent]
    return xp.concat([xp.broadcast_to(c, (*batch, c.shape[-1])) for c in columns], axis=-1)


def split(vector: Array, shapes: Sequence[tuple[int, int]]) -> tuple[Array, ...]:
    """Undo `join`."""
    xp, parts, start = _arrays.namespace(vector), [], 0
    for m, n in shapes:
        parts.append(linalg.unvec(xp, vector[..., start : start + m * n], m, n))
        start += m * n
    return tuple(parts)
