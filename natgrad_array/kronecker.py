"""The Kronecker product of two covariances, as an object: what a layer's Fisher block is made of.

A ⊗ G takes an (m, n) matrix V, whose columns Vec stacks, to G V A. Nothing here forms the
(mn, mn) matrix but `to_dense`.
"""

from __future__ import annotations

from typing import NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace


class Kronecker(NamedTuple):
    """A ⊗ G of two symmetric positive semidefinite matrices, or of two inverses of such.

    Attributes
    ----------
    forward : array, shape (*batch, n, n)
        A, of what comes into a layer.
    backward : array, shape (*batch, m, m), or None
        G, of what comes back to it; None is the identity.

    Examples
    --------
    >>> import numpy as np
    >>> from natgrad_array.kronecker import Kronecker
    >>> block = Kronecker(np.asarray([[2.0]]), np.asarray([[3.0]]))
    >>> block.matvec(np.asarray([[1.0]]))
    array([[6.]])
    """

    forward: Array
    backward: Array | None

    def matvec(self, v: Array, /) -> Array:
        """Compute G V A.

        Parameters
        ----------
        v : array, shape (*batch, m, n)
            V.

        Returns
        -------
        array, shape (*batch, m, n)
            The product.
        """
        return (v if self.backward is None else self.backward @ v) @ self.forward

    def pinv(self, *, rtol: float | Array | None = None) -> Kronecker:
        """Compute A⁺ ⊗ G⁺, each factor with its own cut-off.

        Parameters
        ----------
        rtol : float or array of shape (*batch,), optional
            As in `pinvh`.

        Returns
        -------
        Kronecker
            The Moore–Penrose inverse.
        """
        xp = _arrays.namespace(self.forward)
        forward = linalg.pinvh_checked(xp, self.forward, rtol, "auto")
        backward = None if self.backward is None else linalg.pinvh_checked(xp, self.backward, rtol, "auto")
        return Kronecker(forward, backward)

    def damped(self, damping: float | Array, /) -> Kronecker:
        """Compute (A + πγ 1) ⊗ (G + γ/π 1) with γ² the damping, and π² the ratio of mean eigenvalues.

        Parameters
        ----------
        damping : float or array of shape (*batch, 1, 1)
            Added to the eigenvalues of the product, in their units, up to cross terms.

        Returns
        -------
        Kronecker
            The damped product.

        Notes
        -----
        Section 6.3 of Martens and Grosse (2015).
        """
        xp = _arrays.namespace(self.forward)
        on_forward, on_backward = self._shifts(xp, damping)
        forward = self.forward + on_forward * _arrays.eye(xp, self.forward.shape[-1], self.forward)
        if self.backward is None:
            return Kronecker(forward * (1.0 + on_backward), None)
        return Kronecker(forward, self.backward + on_backward * _arrays.eye(xp, self.backward.shape[-1], self.backward))

    def damped_inverse(self, damping: float | Array, /) -> Kronecker:
        """Invert `damped`; without damping A⁺ ⊗ G⁺.

        Parameters
        ----------
        damping : float or array of shape (*batch, 1, 1)
            As for `damped`.

        Returns
        -------
        Kronecker
            The inverse.
        """
        xp = _arrays.namespace(self.forward)
        on_forward, on_backward = self._shifts(xp, damping)
        forward = linalg.shifted_inverse(xp, self.forward, on_forward)
        if self.backward is None:
            return Kronecker(forward / (1.0 + on_backward), None)
        return Kronecker(forward, linalg.shifted_inverse(xp, self.backward, on_backward))

    def _shifts(self, xp: Namespace, damping: float | Array) -> tuple[Array, Array]:
        """πγ and γ/π, with two core axes of length one."""
        gamma, a = damping**0.5, _mean_eigenvalue(xp, self.forward)
        if self.backward is None:
            # The identity's mean eigenvalue is 1.
            pi = xp.sqrt(xp.where(a > 0.0, a, 1.0))
        else:
            g = _mean_eigenvalue(xp, self.backward)
            # A dead layer has a zero factor: nothing there to balance.
            alive = (a > 0.0) & (g > 0.0)
            pi = xp.sqrt(xp.where(alive, a, 1.0) / xp.where(alive, g, 1.0))
        return pi * gamma, gamma / pi

    def to_dense(self) -> Array:
        """Form the matrix itself, for small ones.

        Returns
        -------
        array, shape (*batch, m n, m n)
            A ⊗ G; column stacking.

        Raises
        ------
        ValueError
            If there is no G: the identity's size is not known.
        """
        if self.backward is None:
            raise ValueError("backward must be an array for a dense product, got None (the identity, of unknown size)")
        return linalg.kron(_arrays.namespace(self.forward), self.forward, self.backward)


def _mean_eigenvalue(xp: Namespace, a: Array) -> Array:
    return (xp.linalg.trace(a) / a.shape[-1])[..., None, None]


class KroneckerBasis(NamedTuple):
    """The joint eigenbasis of A ⊗ G, in which a damping can be added exactly.

    Attributes
    ----------
    forward : array, shape (*batch, n, n)
        Eigenvectors of A, as columns.
    backward : array, shape (*batch, m, m), or None
        Those of G; None is the identity.
    scale : array, shape (*batch, m, n)
        The eigenvalues of the product, or what stands for them.
    """

    forward: Array
    backward: Array | None
    scale: Array

    @classmethod
    def of(cls, block: Kronecker, m: int, /) -> KroneckerBasis:
        """Decompose both factors.

        Parameters
        ----------
        block : Kronecker
            A ⊗ G.
        m : int
            The size of G.

        Returns
        -------
        KroneckerBasis
            Eigenvalues below the cut-off n·eps of their factor are zero.
        """
        xp = _arrays.namespace(block.forward)
        values, vectors = _eigen(xp, block.forward)
        if block.backward is None:
            ones = xp.ones((m, 1), dtype=values.dtype, device=_arrays.device(values))
            return cls(vectors, None, ones * values[..., None, :])
        values_back, vectors_back = _eigen(xp, block.backward)
        return cls(vectors, vectors_back, values_back[..., :, None] * values[..., None, :])

    def rotate(self, v: Array, /) -> Array:
        """Turn V into the basis.

        Parameters
        ----------
        v : array, shape (*batch, m, n)
            V.

        Returns
        -------
        array, shape (*batch, m, n)
            U_Gᵀ V U_A.
        """
        return (v if self.backward is None else self.backward.mT @ v) @ self.forward

    def rotate_back(self, v: Array, /) -> Array:
        """Undo `rotate`.

        Parameters
        ----------
        v : array, shape (*batch, m, n)
            What `rotate` gave.

        Returns
        -------
        array, shape (*batch, m, n)
            U_G V U_Aᵀ.
        """
        return (v if self.backward is None else self.backward @ v) @ self.forward.mT

    def solve(self, v: Array, damping: float | Array, /) -> Array:
        """Solve (A ⊗ G + damping 1) vec(result) = vec(V); in the sense of Moore and Penrose where it is singular.

        Parameters
        ----------
        v : array, shape (*batch, m, n)
            V.
        damping : float or array of shape (*batch, 1, 1)
            Added to every eigenvalue, in their units.

        Returns
        -------
        array, shape (*batch, m, n)
            The solution.
        """
        xp = _arrays.namespace(v)
        scale = self.scale + damping
        return self.rotate_back(self.rotate(v) * linalg.reciprocal(xp, scale, scale > 0.0))

    def to_dense(self) -> Array:
        """Form the matrix itself, for small ones.

        Returns
        -------
        array, shape (*batch, m n, m n)
            U diag(scale) Uᵀ with U = U_A ⊗ U_G; column stacking.
        """
        xp = _arrays.namespace(self.scale)
        backward = _arrays.eye(xp, self.scale.shape[-2], self.scale) if self.backward is None else self.backward
        vectors = linalg.kron(xp, self.forward, backward)
        return (vectors * linalg.vec(xp, self.scale)[..., None, :]) @ vectors.mT


def _eigen(xp: Namespace, a: Array) -> tuple[Array, Array]:
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(a), None)
    # Covariances have no negative eigenvalue: what is below zero is rounding.
    return xp.where(xp.isnan(values) | (kept & (values > 0.0)), values, 0.0), vectors
