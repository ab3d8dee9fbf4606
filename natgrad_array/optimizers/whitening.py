"""Whitened inputs, as in natural neural networks (PRONG), without a second set of parameters.

Desjardins et al. write a layer as z = V U (h − c) + d, with h − c whitened by U, descend on V
and d, and rewrite both whenever c and U are new. In the layer's own parameters W = V U and
b = d − W c such a step is a gradient times a matrix,

    ΔW̄ = −η ∇̄ Cᵀ diag(UᵀU, 1) C,    C = [[1, −c], [0, 1]],

and new c and U change nothing but that matrix: the function is preserved exactly, at any
rank of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.kronecker import Kronecker
from natgrad_array.optimizers.estimates import Estimate, Statistics
from natgrad_array.optimizers.inverses import ByFactors, Context


@dataclass(frozen=True)
class Whitening(ByFactors):
    """Inputs centred and whitened by (Λ + damping)^{-1/2} in their eigenbasis; errors are left as they are.

    Without damping directions in which inputs do not vary are left out.

    Notes
    -----
    The direction is ∇̄ Cᵀ diag((Λ + damping)⁻¹ in its eigenbasis, 1) C, with C what centres
    homogeneous inputs: gradient descent on the whitened parameters of
    Desjardins, Simonyan, Pascanu and Kavukcuoglu (2015).

    Examples
    --------
    With whitened inputs gradient descent solves a linear regression in one step.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[3.0], [7.0]])
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.InputsOnly(), ng.optimizers.Whitening())
    >>> opt.step(net, params, opt.init(net, params), x, y)[0]
    (array([[2., 1.]]),)
    """

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        return tuple(Kronecker(_whitener(at.xp, block.forward, at.damping), block.backward) for block in moments)

    def apply(self, prepared: Any, at: Context) -> Any:
        return tuple(g @ block.forward for g, block in zip(at.gradient, prepared, strict=True)), prepared


def _whitener(xp: Namespace, moment: Array, damping: Array) -> Array:
    """Cᵀ diag(UᵀU, 1) C from the moment of homogeneous inputs, whose last entries are 1."""
    count = moment[..., -1:, -1:]
    mean = moment[..., :-1, -1:] / count
    covariance = moment[..., :-1, :-1] / count - mean @ mean.mT
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(covariance), None)
    # Where the mean is large the covariance is a small difference, known no better than this.
    rounding = moment.shape[-1] * _arrays.eps(xp, moment) * xp.linalg.trace(moment / count)[..., None]
    values = xp.where(xp.isnan(values) | (kept & (values > rounding)), values, 0.0) + damping[..., None]
    inner = (vectors * linalg.reciprocal(xp, values, values > 0.0)[..., None, :]) @ vectors.mT
    corner = -inner @ mean
    bottom = xp.concat([corner.mT, 1.0 - mean.mT @ corner], axis=-1)
    return xp.concat([xp.concat([inner, corner], axis=-1), bottom], axis=-2)
