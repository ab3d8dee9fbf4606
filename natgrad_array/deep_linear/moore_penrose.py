"""The Moore–Penrose natural gradient, F⁺∇, without a P × P matrix.

F⁺∇ is the shortest update whose end-to-end velocity is that of every natural gradient.
`Dense` takes the (P, n_L ρ) root C of F = CCᵀ and suits small networks and any cut-off.
`Kernel` solves with AᵀA in place, an operator on (n_L, ρ) matrices made of small products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array

if TYPE_CHECKING:
    from natgrad_array.deep_linear.fisher import DeepLinearFisher

DENSE_SIZE = 64
"""Up to this n_L ρ the root C is decomposed; beyond it conjugate gradients are cheaper."""


class Inverse:
    """F⁺, applied to gradients that are known in one of two forms."""

    def apply(self, gradient: tuple[Array, ...]) -> tuple[Array, ...]:
        """F⁺ times any tangent."""
        raise NotImplementedError("an inverse says how it is applied")

    def apply_to_function_space(self, error: Array) -> tuple[Array, ...]:
        """F⁺ times the gradient C vec(error)."""
        raise NotImplementedError("an inverse says how it is applied")


class Dense(Inverse):
    """F⁺ through the singular values of C, whose squares are the eigenvalues of F.

    `rtol` is relative to the largest singular value. For one layer C is a Kronecker
    product with orthogonal columns, X_1 ⊗ E_1, and needs no decomposition.
    """

    def __init__(self, fisher: DeepLinearFisher, rtol: float | Array | None) -> None:
        self.fisher = fisher
        xp = fisher._xp
        ahead, behind, error = fisher._products
        if rtol is None:
            rtol = fisher.n_parameters * _arrays.eps(xp, error)
        if len(ahead) == 1:
            squared = xp.sum(ahead[0] ** 2, axis=-2)[..., :, None] * xp.sum(behind[0] ** 2, axis=-2)[..., None, :]
            cutoff = rtol if isinstance(rtol, float) else rtol[..., None, None]
            largest = xp.max(squared, axis=(-2, -1), keepdims=True)
            inverse = linalg.reciprocal(xp, squared, squared > cutoff**2 * largest)
            self.closed: Array | None = inverse if isinstance(rtol, float) else xp.where(cutoff >= 0, inverse, xp.nan)
            self.dual: Array | None = None
            return
        shape = (*fisher.batch_shape, fisher.n_parameters, error.shape[-2] * error.shape[-1])
        _arrays.check_fits(
            "the root of the Fisher matrix", shape, xp, error, "leave rtol at None, which solves with small products"
        )
        self.closed = None
        self.dual = linalg.dual(xp, fisher._dense_root(), error.shape[-2] * error.shape[-1], rtol)

    def apply(self, gradient: tuple[Array, ...]) -> tuple[Array, ...]:
        """F⁺ = C⁺ᵀ C⁺."""
        xp, fisher = self.fisher._xp, self.fisher
        if self.closed is not None:
            return self.apply_to_function_space(self.closed * fisher._to_function_space(gradient))
        batch = _arrays.broadcast_shapes(tuple(g.shape[:-2]) for g in gradient)
        columns = [linalg.vec(xp, g) for g in gradient]
        stacked = xp.concat([xp.broadcast_to(g, (*batch, g.shape[-1])) for g in columns], axis=-1)
        assert self.dual is not None
        return fisher._split((self.dual @ (self.dual.mT @ stacked[..., None]))[..., 0])

    def apply_to_function_space(self, error: Array) -> tuple[Array, ...]:
        """F⁺C = C⁺ᵀ."""
        xp, fisher = self.fisher._xp, self.fisher
        if self.closed is not None:
            return fisher._from_function_space(self.closed * error)
        assert self.dual is not None
        return fisher._split((self.dual @ linalg.vec(xp, error)[..., None])[..., 0])


class Kernel(Inverse):
    """F⁺ through the end-to-end kernel AᵀA restricted to directions that the inputs move in.

    With A_i = W_i^aᵀ and B_i = W_i^b V, the kernel takes Y to Σ_i A_iᵀA_i Y B_iᵀB_i. In
    the eigenbases of its first and last terms these two are diagonal, so that two layers
    (a Sylvester equation) are solved in closed form; the diagonals of the other terms
    complete a preconditioner for conjugate gradients, exact for balanced networks.
    """

    def __init__(self, fisher: DeepLinearFisher) -> None:
        self.fisher = fisher
        xp, factors = fisher._xp, fisher._task.factors
        ahead, behind, _ = fisher._products
        self.root, unroot = factors.noise_roots(xp)
        self.unscale = factors.input_root_pinv @ factors.input_basis
        left = [e @ self.root.mT for e in ahead]
        right = [x @ self.unscale for x in behind]
        left_grams, right_grams = [a.mT @ a for a in left], [b.mT @ b for b in right]
        alpha, self.u = linalg.eigh(xp, linalg.symmetric_part(left_grams[0]))
        beta, self.v = linalg.eigh(xp, linalg.symmetric_part(right_grams[-1]))
        self.left = [a @ self.u for a in left]
        self.right = [b @ self.v for b in right]
        self.ends = alpha[..., :, None] + beta[..., None, :]
        self.middle = [
            (self.u.mT @ a @ self.u, self.v.mT @ b @ self.v)
            for a, b in zip(left_grams[1:-1], right_grams[1:-1], strict=True)
        ]
        spaces, depth = fisher._subspaces(), len(ahead)
        self.kept = spaces.left_count + spaces.right_count - depth > 0.5
        scale = self.v.mT @ (factors.input_basis.mT @ factors.input_root)
        self.inward = spaces.left.mT @ unroot @ self.u, scale @ spaces.right
        self.outward = self.u.mT @ self.root @ spaces.left, spaces.right.mT @ self.unscale @ self.v
        diagonal = self.ends
        for a, b in self.middle:
            diagonal = diagonal + xp.linalg.diagonal(a)[..., :, None] * xp.linalg.diagonal(b)[..., None, :]
        largest = xp.max(diagonal, axis=(-2, -1), keepdims=True)
        cutoff = (diagonal.shape[-2] + diagonal.shape[-1]) * _arrays.eps(xp, diagonal)
        self.preconditioner = linalg.reciprocal(xp, diagonal, diagonal > cutoff * largest)

    def apply(self, gradient: tuple[Array, ...]) -> tuple[Array, ...]:
        """Project on the range of F by least squares, then as for a gradient."""
        h = self._solve(self._transpose(gradient))
        error = self.root.mT @ (self.u @ h @ self.v.mT) @ self.unscale.mT
        return self.apply_to_function_space(error)

    def apply_to_function_space(self, error: Array) -> tuple[Array, ...]:
        """The shortest tangent with the velocity that the error asks for."""
        velocity = self.root @ self.fisher._realisable(error) @ self.unscale
        y = self._solve(self.u.mT @ velocity @ self.v)
        return tuple(a @ y @ b.mT for a, b in zip(self.left, self.right, strict=True))

    def _transpose(self, tangent: tuple[Array, ...]) -> Array:
        parts = [a.mT @ d @ b for a, d, b in zip(self.left, tangent, self.right, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _times(self, y: Array) -> Array:
        product = self.ends * y
        for a, b in self.middle:
            product = product + a @ y @ b
        return product

    def _in_range(self, y: Array) -> Array:
        """Project on the range of the kernel, the velocities that the network has."""
        xp = self.fisher._xp
        rotated = xp.where(self.kept, self.inward[0] @ y @ self.inward[1], 0.0)
        return self.outward[0] @ rotated @ self.outward[1]

    def _solve(self, rhs: Array) -> Array:
        """Solve kernel(y) = rhs for a right side in the kernel's range, every member to its own convergence."""
        if not self.middle:
            return self.preconditioner * rhs
        xp = self.fisher._xp
        # Squares of its entries are summed below: float32 has room for those of a unit matrix.
        scale = xp.max(xp.abs(rhs), axis=(-2, -1), keepdims=True)
        scale = xp.where(scale > 0.0, scale, 1.0)
        rhs = rhs / scale
        y = self.preconditioner * rhs
        # A right side is in the range only to rounding. What lies outside never shrinks, and
        # the preconditioner can magnify it beyond all that is inside.
        precision = (rhs.shape[-2] + rhs.shape[-1]) * _arrays.eps(xp, rhs)
        target = precision**2 * _dot(rhs, rhs)
        residual = self._in_range(rhs - self._times(y))
        z = self.preconditioner * residual
        rounds = xp.zeros((), dtype=rhs.dtype, device=_arrays.device(rhs))
        limit = rhs.shape[-2] * rhs.shape[-1] + 100

        def unfinished(state: tuple[Array, ...]) -> Array:
            _, residual, _, _, rounds = state
            return xp.any(_dot(residual, residual) > target) & (rounds < limit)

        def advance(state: tuple[Array, ...]) -> tuple[Array, ...]:
            y, residual, direction, energy, rounds = state
            image = self._times(direction)
            curvature = _dot(direction, image)
            # A member that has converged stands still: its step is zero from here on.
            moving = (_dot(residual, residual) > target) & (curvature > 0.0)
            step = xp.where(moving, energy / xp.where(moving, curvature, 1.0), 0.0)
            y, residual = y + step * direction, self._in_range(residual - step * image)
            z = self.preconditioner * residual
            renewed = _dot(residual, z)
            ratio = xp.where(moving, renewed / xp.where(moving & (energy > 0.0), energy, 1.0), 0.0)
            direction = xp.where(moving, z + ratio * direction, 0.0)
            return y, residual, direction, xp.where(moving, renewed, 0.0), rounds + 1.0

        y, *_ = _arrays.while_loop(unfinished, advance, (y, residual, z, _dot(residual, z), rounds))
        return scale * y


def _dot(a: Array, b: Array) -> Array:
    """Inner product of stacks of matrices, core axes kept as ones."""
    return _arrays.namespace(a).sum(a * b, axis=(-2, -1), keepdims=True)
