"""The block-tridiagonal inverse of K-FAC: neighbouring layers see each other.

In a chain of layers as a graphical model, each layer's gradient depends on that of the next
one alone. With Ψ_i = (A_{i,i+1} A_{i+1}⁻¹) ⊗ (G_{i,i+1} G_{i+1}⁻¹) the regression of layer i
on layer i + 1, and Σ_i what that leaves of layer i's block,

    F̂⁻¹ = Ξᵀ Λ Ξ,    (Ξ V)_i = V_i − Ψ_i V_{i+1},    Λ = diag(Σ_1⁻¹, ..., Σ_{L-1}⁻¹, F_L⁻¹).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.kronecker import Kronecker
from natgrad_array.optimizers.estimates import Estimate, Statistics
from natgrad_array.optimizers.inverses import Context, Inverse, Tangent, dense, zero_blocks


class Regression(NamedTuple):
    """One layer of the inverse.

    Attributes
    ----------
    forward, backward : arrays, shapes (*batch, n, n) and (*batch, m, m)
        K_1 and K_2: bases in which both parts of Σ_i are diagonal.
    scale : array, shape (*batch, m, n)
        The inverse of Σ_i there.
    psi_forward, psi_backward : arrays, shapes (*batch, n, n_next) and (*batch, m, m_next)
        The two factors of Ψ_i.
    """

    forward: Array
    backward: Array
    scale: Array
    psi_forward: Array
    psi_backward: Array


@dataclass(frozen=True)
class BlockTridiagonal(Inverse):
    """The inverse whose inverse agrees with the Fisher information's estimate on three block diagonals.

    Each layer's own factors are damped as by `FactoredTikhonov`. Without damping it is
    singular wherever a layer's input determines the next one's, as in a deep linear
    network; such directions are left out. For networks of dense layers.

    Raises
    ------
    ValueError
        If the network has a convolution: in a step.

    Notes
    -----
    F̂⁻¹ = ΞᵀΛΞ, with (ΞV)_i = V_i − Ψ_i V_{i+1} and Λ the inverses of what the regressions Ψ_i on the
    next layer leave of each block: section 4.3 and appendix B of Martens and Grosse (2015).

    Examples
    --------
    With two layers there is nothing beyond three block diagonals: in a linear network, where
    inputs and errors are independent, the whole estimate is exact.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((2, 2, 1), activation="identity")
    >>> x = np.random.default_rng(0).standard_normal((20, 2))
    >>> params = net.init(1, like=x)
    >>> opt = ng.optimizers.Optimizer(
    ...     ng.optimizers.ExactDirections(), ng.optimizers.BlockTridiagonal(), damping=ng.optimizers.Damping(0.1)
    ... )
    >>> tridiagonal = opt.preconditioner(net, params, opt.init(net, params), x, x[:, :1])
    >>> report = net.fisher(params, x).compare(tridiagonal, net.gradient(params, x, x[:, :1]))
    >>> bool(np.all(report.block_errors < 1e-12)), bool(report.cross_layer > 0.1)
    (True, True)
    """

    uses_statistics: ClassVar[bool] = True
    needs_errors: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True

    def moments(self, statistics: Statistics, estimate: Estimate) -> Any:
        if any(rows.shape[-2] != 1 for rows in statistics.rows):
            raise ValueError("net must have dense layers only for the inverse BlockTridiagonal, got a convolution")
        assert statistics.deltas is not None
        rows = [array[..., 0, :] for array in statistics.rows]
        deltas = [array[..., 0, :] for array in statistics.deltas]
        xp, count = _arrays.namespace(rows[0]), rows[0].shape[-2]
        crosses = tuple(
            Kronecker(rows[i].mT @ rows[i + 1] / count, xp.sum(deltas[i].mT @ deltas[i + 1], axis=0) / count)
            for i in range(len(rows) - 1)
        )
        return estimate.factors(statistics), crosses

    def start_moments(self, params: Tangent, estimate: Estimate) -> Any:
        return zero_blocks(params, estimate), tuple(Kronecker(*pair) for pair in _zero_crosses(params))

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        pairs = [*_zero_crosses(params), (params[-1][..., :, 0, None], params[-1][..., :, 0, None])]
        blocks = zero_blocks(params, estimate)
        found = []
        for w, block, pair in zip(params, blocks, pairs, strict=True):
            found.append(Regression(block.forward, block.backward, 0.0 * w, *pair))
        return tuple(found[:-1]), found[-1][:3]

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        xp, (blocks, crosses) = at.xp, moments
        damped = [block.damped(at.scalar) for block in blocks]
        found = []
        for block, after, cross in zip(damped, blocks[1:], crosses, strict=False):
            inverse = after.damped_inverse(at.scalar)
            assert cross.backward is not None
            psi = cross.forward @ inverse.forward, cross.backward @ inverse.backward
            forward = _joint_basis(xp, block.forward, psi[0] @ cross.forward.mT)
            backward = _joint_basis(xp, block.backward, psi[1] @ cross.backward.mT)
            found.append(Regression(forward[0], backward[0], _difference(xp, forward, backward), *psi))
        forward, backward = (_joint_basis(xp, m, 0.0 * m) for m in damped[-1])
        return tuple(found), (forward[0], backward[0], _difference(xp, forward, backward))

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        regressions, last = prepared
        moved = [
            g - r.psi_backward @ after @ r.psi_forward.mT
            for r, g, after in zip(regressions, at.gradient, at.gradient[1:], strict=False)
        ]
        solved = [_solve(r[:3], v) for r, v in zip((*regressions, last), (*moved, at.gradient[-1]), strict=True)]
        found = [solved[0]]
        for r, before, w in zip(regressions, solved, solved[1:], strict=False):
            found.append(w - r.psi_backward.mT @ before @ r.psi_forward)
        return tuple(found), prepared

    def block(self, i: int, j: int, moments: Any, prepared: Any, at: Context) -> Array | None:
        blocks, crosses = moments
        if i == j:
            return dense(blocks[i], at.params[i])
        # Layers further apart see each other through those between: F̂_ij = Ψ_i F̂_{i+1,j}.
        forward, backward = crosses[j - 1]
        for regression in reversed(prepared[0][i : j - 1]):
            forward, backward = regression.psi_forward @ forward, regression.psi_backward @ backward
        return linalg.kron(at.xp, forward, backward)


def _zero_crosses(params: Tangent) -> list[tuple[Array, Array]]:
    """Zeros of the shapes of ⟨ā_i ā_{i+1}ᵀ⟩ and ⟨δ_i δ_{i+1}ᵀ⟩."""
    pairs = []
    for w, after in itertools.pairwise(params):
        pairs.append((0.0 * (w.mT[..., :, :1] @ after[..., :1, :]), 0.0 * (w[..., :, :1] @ after.mT[..., :1, :])))
    return pairs


def _joint_basis(xp: Namespace, a: Array, c: Array) -> tuple[Array, Array, Array]:
    """K = A^{-1/2} E with E, s the eigenpairs of A^{-1/2} C A^{-1/2}, s, and the rounding of s.

    Kᵀ A K = 1 and Kᵀ C K = diag(s), on the range of A.
    """
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(a + 0.0), None)
    kept = kept & (values > 0.0)
    scaled = linalg.reciprocal(xp, xp.sqrt(xp.where(values < 0.0, 0.0, values)), kept)
    root = (vectors * scaled[..., None, :]) @ vectors.mT
    s, e = linalg.eigh(xp, linalg.symmetric_part(root @ c @ root))
    condition = xp.max(values, axis=-1) * xp.max(scaled, axis=-1) ** 2
    return root @ e, s, 8 * a.shape[-1] * _arrays.eps(xp, s) * condition[..., None, None]


def _difference(xp: Namespace, forward: tuple[Array, ...], backward: tuple[Array, ...]) -> Array:
    """1 / (1 − t sᵀ), zero where a layer is determined by the next one up to rounding."""
    rest = 1.0 - backward[1][..., :, None] * forward[1][..., None, :]
    return linalg.reciprocal(xp, rest, rest > forward[2] + backward[2])


def _solve(layer: tuple[Array, Array, Array], v: Array) -> Array:
    """K_2 [(K_2ᵀ V K_1) ∘ scale] K_1ᵀ."""
    forward, backward, scale = layer
    return backward @ ((backward.mT @ v @ forward) * scale) @ forward.mT
