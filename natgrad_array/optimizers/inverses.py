"""What stands for the inverse of the Fisher information: the second of an optimizer's three choices.

An inverse says which moments it needs, makes something of them at every refresh, and turns
gradients into directions with that. All of it is arrays, so that a state can be traced,
pickled and written to disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.kronecker import Kronecker, KroneckerBasis
from natgrad_array.networks import passes
from natgrad_array.optimizers.estimates import Estimate, Statistics

Tangent = tuple[Array, ...]


class Context(NamedTuple):
    """Where an optimizer is: what inverses and step rules may look at.

    Attributes
    ----------
    net : Network or None
        The layers and the likelihood; None where only their statistics are known.
    params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters before the step.
    x : array or None
        The batch's inputs.
    trace : Trace or None
        Their forward pass.
    gradient : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The gradient of the loss.
    damping : array, shape (*batch,)
        Of each member.
    count : array, shape ()
        Steps taken before this one.
    previous : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The last change of the parameters.
    decay : float or array of shape (*batch,)
        The weight decay: the curvature of the penalty, which is a multiple of the identity.
    sums : callable or None
        Where the samples are elsewhere: from directions to sums over samples of products with
        F, as `sums_of_products` gives them.
    samples : int
        How many samples these are sums over.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> w, damping = np.ones((2, 1, 1)), np.asarray([0.1, 0.2])
    >>> at = ng.optimizers.Context(None, (w,), None, None, (w,), damping, np.asarray(0.0), decay=0.1)
    >>> at.scalar.shape, [round(float(s), 3) for s in at.shift]
    ((2, 1, 1), [0.2, 0.3])
    """

    net: Any
    params: Tangent
    x: Array
    trace: Any
    gradient: Tangent
    damping: Array
    count: Array
    previous: Tangent = ()
    decay: Any = 0.0
    sums: Any = None
    samples: int = 0

    @property
    def xp(self) -> Namespace:
        """The namespace of all arrays."""
        return _arrays.namespace(self.damping)

    @property
    def shift(self) -> Array:
        """What is added to eigenvalues of the Fisher information: the damping and the weight decay."""
        return self.damping + self.decay

    @property
    def scalar(self) -> Array:
        """The shift with two core axes of length one."""
        return self.shift[..., None, None]


class Inverse:
    """What all inverses share; by itself it is the identity, that of gradient descent.

    Notes
    -----
    An inverse of one's own makes `moments` of a batch, which the optimizer averages, whatever it
    needs of these in `refresh`, and a direction of the gradient in `apply`. `start_moments` and
    `start` give zeros of the same structures, for an estimate with an average and an optimizer
    that does not refresh in each step. The class attributes say what it has a use for. All of it
    is arrays, so that a state can be traced, pickled and written to disk.

    Examples
    --------
    The diagonal of the Fisher information of dense layers, ⟨δ² ā²⟩ entry by entry.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> class Diagonal(ng.optimizers.Inverse):
    ...     uses_statistics = needs_errors = True
    ...
    ...     def moments(self, statistics, estimate):
    ...         pairs = zip(statistics.rows, statistics.deltas)
    ...         return tuple(np.mean(np.sum(d**2, axis=0).mT @ a**2, axis=-3) for a, d in pairs)
    ...
    ...     def start_moments(self, params, estimate):
    ...         return tuple(0.0 * w for w in params)
    ...
    ...     start = start_moments
    ...
    ...     def refresh(self, prepared, moments, statistics, estimate, at):
    ...         return moments
    ...
    ...     def apply(self, prepared, at):
    ...         return tuple(g / (f + at.scalar) for g, f in zip(at.gradient, prepared)), prepared
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(average=0.95), Diagonal(), refresh=10)
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[0.2]]),)
    """

    uses_statistics: ClassVar[bool] = False
    """Whether it needs an estimate at all."""

    needs_errors: ClassVar[bool] = False
    """Whether the estimate has to send errors back."""

    needs_network: ClassVar[bool] = False
    """Whether it makes passes through the network itself."""

    remembers: ClassVar[bool] = False
    """Whether it works on what it made in earlier steps."""

    has_blocks: ClassVar[bool] = False
    """Whether there is an estimate of the Fisher information behind it."""

    looks_at_samples: ClassVar[bool] = False
    """Whether `refresh` does without moments, where those of one batch are all that there are."""

    def moments(self, statistics: Statistics, estimate: Estimate) -> Any:
        """Compute the quantities that are averaged over batches.

        Parameters
        ----------
        statistics : Statistics
            What the estimate saw of a batch.
        estimate : Estimate
            It.

        Returns
        -------
        tuple
            Arrays in nested tuples.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
        >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
        >>> ng.optimizers.MoorePenrose().moments(seen, ng.optimizers.Empirical())
        (Kronecker(forward=array([[5.]]), backward=array([[1.]])),)
        """
        return ()

    def start_moments(self, params: Tangent, estimate: Estimate) -> Any:
        """Make moments of zeros.

        Parameters
        ----------
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            Arrays like the parameters, with the batch axes of the whole ensemble.
        estimate : Estimate
            Where moments will come from.

        Returns
        -------
        tuple
            Of the structure and shapes of `moments`.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> params = (np.ones((3, 1, 2)),)
        >>> [block] = ng.optimizers.MoorePenrose().start_moments(params, ng.optimizers.Empirical())
        >>> block.forward.shape, block.backward.shape
        ((3, 2, 2), (3, 1, 1))
        """
        return ()

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        """Make what there is before the first refresh.

        Parameters
        ----------
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            Arrays like the parameters, with the batch axes of the whole ensemble.
        estimate : Estimate
            Where moments will come from.

        Returns
        -------
        tuple
            Of the same structure and shapes as after a refresh.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.optimizers.Adam().start((np.ones((1, 2)),), ng.optimizers.InputsOnly())
        AdamState(first=(array([[0., 0.]]),), second=(array([[0., 0.]]),))
        """
        return ()

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        """Make something new of the moments.

        Parameters
        ----------
        prepared : tuple
            What was made before.
        moments : tuple
            The averaged moments; empty for an inverse that looks at the samples of this batch.
        statistics : Statistics or None
            What the estimate saw of this batch; None where only sums over it are known.
        estimate : Estimate
            It.
        at : Context
            Where the optimizer is.

        Returns
        -------
        tuple
            What `apply` works with.

        Examples
        --------
        Eigenvalues 3 and 1 inverted as 1/(λ + √damping), with a damping of 1.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> from natgrad_array.kronecker import Kronecker
        >>> w, one = np.asarray([[0.0]]), np.asarray(1.0)
        >>> at = ng.optimizers.Context(None, (w,), None, None, (w,), one, one)
        >>> moments = (Kronecker(np.asarray([[3.0]]), np.asarray([[1.0]])),)
        >>> ng.optimizers.RootDamped().refresh((), moments, None, ng.optimizers.Empirical(), at)
        (Kronecker(forward=array([[0.25]]), backward=array([[0.5]])),)
        """
        return prepared

    def follow(self, prepared: Any, statistics: Statistics, estimate: Estimate, at: Context) -> Any:
        """Keep up with a batch between two refreshes.

        Parameters
        ----------
        prepared : tuple
            What was made before.
        statistics : Statistics
            What the estimate saw of this batch.
        estimate : Estimate
            It.
        at : Context
            Where the optimizer is.

        Returns
        -------
        tuple
            What `apply` works with.

        Examples
        --------
        Half of an old second moment of 1 and half of a new one of 5, in a basis that stays.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
        >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
        >>> from natgrad_array.kronecker import KroneckerBasis
        >>> w, one = np.asarray([[0.0]]), np.asarray([[1.0]])
        >>> at = ng.optimizers.Context(None, (w,), None, None, (w,), w[0, 0], w[0, 0])
        >>> inverse, estimate = ng.optimizers.RescaledEigenbasis(average=0.5), ng.optimizers.Empirical()
        >>> [basis] = inverse.follow((KroneckerBasis(one, one, one),), seen, estimate, at)
        >>> basis.scale
        array([[3.]])
        """
        return prepared

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        """Turn the gradient into a direction.

        Parameters
        ----------
        prepared : tuple
            What `refresh` or `follow` made.
        at : Context
            Where the optimizer is, the gradient included.

        Returns
        -------
        direction : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            Descent subtracts it.
        prepared : tuple
            What is kept.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> from natgrad_array.kronecker import Kronecker
        >>> w, g, one = np.asarray([[0.0]]), np.asarray([[8.0]]), np.asarray(1.0)
        >>> prepared = (Kronecker(np.asarray([[0.25]]), np.asarray([[0.5]])),)
        >>> at = ng.optimizers.Context(None, (w,), None, None, (g,), one, one)
        >>> direction, _ = ng.optimizers.RootDamped().apply(prepared, at)
        >>> direction
        (array([[1.]]),)
        """
        return at.gradient, prepared

    def ranks(self, prepared: Any) -> tuple[Any, ...]:
        """Report the ranks of each layer's two moments, where the inverse decides on them.

        Parameters
        ----------
        prepared : tuple
            What `apply` worked with.

        Returns
        -------
        tuple of pairs of arrays, shapes (*batch,)
            Empty where there are none.

        Examples
        --------
        Inputs that are the same in each sample have a moment of rank 1, bias and all.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> seen = ng.optimizers.Statistics.of([np.ones((5, 3))], [np.ones((5, 1))])
        >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(), ng.optimizers.MoorePenrose())
        >>> _, _, info = opt.update([np.zeros((1, 4))], None, [np.ones((1, 4))], seen)
        >>> [(int(forward), int(backward)) for forward, backward in info.ranks]
        [(1, 1)]
        """
        return ()

    def block(self, i: int, j: int, moments: Any, prepared: Any, at: Context) -> Array | None:
        """Form a dense block of the estimate of the Fisher information that is inverted, before damping.

        Parameters
        ----------
        i, j : int
            Layers, i ≤ j.
        moments : tuple
            The averaged moments.
        prepared : tuple
            What `refresh` or `follow` made.
        at : Context
            Where the optimizer is.

        Returns
        -------
        array, shape (*batch, n_i (n_{i-1} + 1), n_j (n_{j-1} + 1)), or None
            None for zero.

        Examples
        --------
        A ⊗ G of the layer.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> from natgrad_array.kronecker import Kronecker
        >>> w, one = np.asarray([[0.0]]), np.asarray(1.0)
        >>> at = ng.optimizers.Context(None, (w,), None, None, (w,), one, one)
        >>> moments = (Kronecker(np.asarray([[3.0]]), np.asarray([[2.0]])),)
        >>> ng.optimizers.Tikhonov().block(0, 0, moments, (), at)
        array([[6.]])
        """
        return None


def dense(block: Kronecker, w: Array) -> Array:
    """A ⊗ G of a layer, the identity in place of a G that is not there."""
    xp = _arrays.namespace(block.forward)
    backward = _arrays.eye(xp, w.shape[-2], block.forward) if block.backward is None else block.backward
    return linalg.kron(xp, block.forward, backward)


def zero_blocks(params: Tangent, estimate: Estimate) -> tuple[Kronecker, ...]:
    """Blocks of zeros for every layer, of the parts that an estimate has."""
    found, backward = [], estimate.has_errors
    for weights in params:
        xp, (m, n) = _arrays.namespace(weights), weights.shape[-2:]
        batch, kind = weights.shape[:-2], {"dtype": weights.dtype, "device": _arrays.device(weights)}
        found.append(
            Kronecker(xp.zeros((*batch, n, n), **kind), xp.zeros((*batch, m, m), **kind) if backward else None)
        )
    return tuple(found)


class ByFactors(Inverse):
    """Inverses of the two moments of every layer."""

    uses_statistics: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True

    def moments(self, statistics: Statistics, estimate: Estimate) -> Any:
        return estimate.factors(statistics)

    def start_moments(self, params: Tangent, estimate: Estimate) -> Any:
        return zero_blocks(params, estimate)

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        return zero_blocks(params, estimate)

    def block(self, i: int, j: int, moments: Any, prepared: Any, at: Context) -> Array | None:
        return dense(moments[i], at.params[i]) if i == j else None


@dataclass(frozen=True)
class Identity(Inverse):
    """No inverse: the direction is the gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(), ng.optimizers.Identity())
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[1.]]),)
    """


@dataclass(frozen=True)
class MoorePenrose(ByFactors):
    """The pseudo-inverse of both moments, A⁺ ⊗ G⁺: no damping, ranks decided by a relative cut-off.

    Parameters
    ----------
    rtol : float, optional
        As in `pinvh`.

    Notes
    -----
    E⁺ ∇ X⁺ of Eqs 38–45 of Bernacchia, Lengyel and Hennequin (2018), supplement; `PerLayer` is the
    1/L that makes it the layerwise rule.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(), ng.optimizers.MoorePenrose())
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[0.2]]),)
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None:
            _arrays.check_setting("rtol", self.rtol)

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        none = not estimate.has_errors
        ranks = tuple((w[..., 0, 0], None if none else w[..., 0, 0]) for w in params)
        return zero_blocks(params, estimate), ranks

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        blocks = tuple(block.pinv(rtol=self.rtol) for block in moments)
        # The trace of A A⁺ is the rank of A.
        ranks = tuple(
            (_overlap(block.forward, inverse.forward), _overlap(block.backward, inverse.backward))
            for block, inverse in zip(moments, blocks, strict=True)
        )
        return blocks, ranks

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        return multiply(prepared[0], at.gradient), prepared

    def ranks(self, prepared: Any) -> tuple[Any, ...]:
        return tuple(prepared[1])


def _overlap(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return None
    xp = _arrays.namespace(a)
    return xp.round(xp.sum(a * b, axis=(-2, -1)))


def multiply(blocks: Any, gradient: Tangent) -> Tangent:
    """Every layer's block times its gradient."""
    return tuple(block.matvec(g) for block, g in zip(blocks, gradient, strict=True))


@dataclass(frozen=True)
class FactoredTikhonov(ByFactors):
    """(A + πγ 1)⁻¹ ⊗ (G + γ/π 1)⁻¹: each factor damped by its share, as in K-FAC; A⁺ ⊗ G⁺ without damping.

    Notes
    -----
    γ² is the damping and π² = (tr A / dim A) / (tr G / dim G): section 6.3 of Martens and Grosse (2015).

    Examples
    --------
    A = 5 and G = 1 have π² = 5, and a damping of 5 makes 10 and 2 of them.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(
    ...     ng.optimizers.Empirical(), ng.optimizers.FactoredTikhonov(), damping=ng.optimizers.Damping(5.0)
    ... )
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[0.05]]),)
    """

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        return tuple(block.damped_inverse(at.scalar) for block in moments)

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        return multiply(prepared, at.gradient), prepared


class Thin(NamedTuple):
    """The inverse of a moment of few samples, Xᵀ C X, not multiplied out.

    Attributes
    ----------
    rows : array, shape (*batch, N, n)
        X, the samples.
    core : array, shape (*batch, N, N)
        C.
    """

    rows: Array
    core: Array

    def times(self, v: Array) -> Array:
        """Multiply from the left, by products no larger than V."""
        return self.rows.mT @ (self.core @ (self.rows @ v))

    def times_from_right(self, v: Array) -> Array:
        """Multiply from the right."""
        return linalg.matmul(linalg.matmul(v, self.rows.mT) @ self.core, self.rows)


@dataclass(frozen=True)
class RootDamped(ByFactors):
    """Every eigenvalue λ of both factors inverted as 1/(λ + √damping), what no sample reaches dropped.

    The rule of Bernacchia, Lengyel and Hennequin's own experiments (2018). Fewer samples than
    directions are worked on themselves, as a Gram matrix has their eigenvalues too.

    Examples
    --------
    With a damping of 9 the factors 5 and 1 are inverted as 1/8 and 1/4.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(
    ...     ng.optimizers.Empirical(), ng.optimizers.RootDamped(), damping=ng.optimizers.Damping(9.0)
    ... )
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[0.03125]]),)
    """

    looks_at_samples: ClassVar[bool] = True

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        if moments:
            # What is kept for later steps, or has been summed elsewhere, is of a size that no batch changes.
            return tuple(root_damped(block, at.scalar) for block in moments)
        assert statistics is not None
        found, shift = [], at.scalar**0.5
        for i, rows in enumerate(statistics.rows):
            forward, backward = estimate.samples(rows, None if statistics.deltas is None else statistics.deltas[i])
            left = None if backward is None else _of_samples(*backward, shift)
            right = _of_samples(*forward, shift)
            # Every eigenvalue of the identity is 1.
            found.append((right if backward else _divided(right, 1.0 + shift), left))
        return tuple(found)

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        found = []
        for (forward, backward), g in zip(prepared, at.gradient, strict=True):
            if backward is not None:
                g = backward.times(g) if isinstance(backward, Thin) else backward @ g
            found.append(forward.times_from_right(g) if isinstance(forward, Thin) else g @ forward)
        return tuple(found), prepared


def root_damped(block: Kronecker, damping: float | Array) -> Kronecker:
    """The rule of `RootDamped` for one layer of which only the moments are known."""
    shift = damping**0.5
    if block.backward is None:
        return Kronecker(_of_moment(block.forward, shift) / (1.0 + shift), None)
    return Kronecker(_of_moment(block.forward, shift), _of_moment(block.backward, shift))


def _divided(side: Array | Thin, divisor: float | Array) -> Array | Thin:
    return side._replace(core=side.core / divisor) if isinstance(side, Thin) else side / divisor


def _of_moment(a: Array, shift: float | Array) -> Array:
    # What all members share is decomposed once, whatever their dampings.
    xp = _arrays.namespace(a)
    values, vectors, kept = linalg.eigh_kept(xp, linalg.symmetric_part(a), None)
    return (vectors * _reciprocal(xp, values, shift, kept)[..., None, :]) @ vectors.mT


def _of_samples(flat: Array, count: int, shift: float | Array) -> Array | Thin:
    """Of the moment Xᵀ X / count of samples."""
    xp = _arrays.namespace(flat)
    if flat.shape[-2] >= flat.shape[-1]:
        a = _arrays.gram(xp, flat, count)
        # As many samples as directions: what none of them reaches, their gradient does not either.
        shared = a.ndim == 2 and not isinstance(shift, float) and shift.ndim > 2
        return _of_moment(a, shift) if shared else linalg.shifted_inverse(xp, a, shift)
    # With the Gram matrix K = X Xᵀ / count it is Xᵀ K⁺ (K + shift 1)⁻¹ X / count.
    gram, cutoff = _arrays.gram(xp, flat.mT, count), flat.shape[-1] * _arrays.eps(xp, flat)
    if not isinstance(shift, float) and math.prod(gram.shape[:-2]) >= _MANY:
        core = linalg.pinvh_checked(xp, gram, cutoff, "auto") @ linalg.shifted_inverse(xp, gram, shift)
        return Thin(flat, core / count)
    values, vectors, kept = linalg.eigh_kept(xp, gram, cutoff)
    inverse = _reciprocal(xp, values, 0.0, kept) * _reciprocal(xp, values, shift, kept)
    return Thin(flat, (vectors * (inverse / count)[..., None, :]) @ vectors.mT)


_MANY = 16
"""Decompositions of fewer matrices take less time than the calls of a certified inverse."""


def _reciprocal(xp: Namespace, values: Array, shift: float | Array, kept: Array) -> Array:
    """1/(λ + shift) of the eigenvalues kept, of which a moment has no negative ones."""
    total = values + (shift if isinstance(shift, float) else shift[..., 0])
    return linalg.reciprocal(xp, total, kept & (values > 0.0))


@dataclass(frozen=True)
class Tikhonov(ByFactors):
    """(A ⊗ G + damping 1)⁻¹, exactly, in the joint eigenbasis; at each step with the damping of that step.

    Notes
    -----
    With A = U Λ Uᵀ and G = V M Vᵀ the direction is V [(Vᵀ ∇ U) ⊘ (μ λᵀ + damping)] Uᵀ. K-FAC's own
    damping, `FactoredTikhonov`, is this one up to cross terms.

    Examples
    --------
    A = 5, G = 1 and a damping of 5 make 10.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(
    ...     ng.optimizers.Empirical(), ng.optimizers.Tikhonov(), damping=ng.optimizers.Damping(5.0)
    ... )
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[0.1]]),)
    """

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        return tuple(
            KroneckerBasis(block.forward, block.backward, _arrays.namespace(w).zeros_like(w))
            for block, w in zip(zero_blocks(params, estimate), params, strict=True)
        )

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        return tuple(KroneckerBasis.of(block, w.shape[-2]) for block, w in zip(moments, at.params, strict=True))

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        return tuple(basis.solve(g, at.scalar) for basis, g in zip(prepared, at.gradient, strict=True)), prepared


@dataclass(frozen=True)
class RescaledEigenbasis(Tikhonov):
    """The joint eigenbasis with the measured second moments of the gradient in it, as in EKFAC.

    The basis is new at every refresh, the second moments follow every batch (George et al.
    2018).

    Parameters
    ----------
    average : float
        How much of the old second moments is kept in the steps between.

    Raises
    ------
    ValueError
        If `average` is out of range.

    Examples
    --------
    The error comes with the smaller input alone: ⟨δ²a²⟩ is 2, where ⟨δ²⟩⟨a²⟩ is 10.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[2.0], [0.0]])
    >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.Empirical(), ng.optimizers.RescaledEigenbasis())
    >>> opt.update([np.zeros((1, 1))], None, [delta.T @ a / 2], seen)[0]
    (array([[-0.5]]),)
    """

    average: float = 0.95

    needs_errors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _arrays.check_within("average", self.average, *_arrays.FRACTION)

    def refresh(
        self, prepared: Any, moments: Any, statistics: Statistics | None, estimate: Estimate, at: Context
    ) -> Any:
        assert statistics is not None
        bases = super().refresh(prepared, moments, statistics, estimate, at)
        return self._rescaled(bases, statistics, 0.0)

    def follow(self, prepared: Any, statistics: Statistics, estimate: Estimate, at: Context) -> Any:
        return self._rescaled(prepared, statistics, self.average)

    def block(self, i: int, j: int, moments: Any, prepared: Any, at: Context) -> Array | None:
        basis: KroneckerBasis = prepared[i]
        return basis.to_dense() if i == j else None

    def _rescaled(self, bases: Any, statistics: Statistics, average: float) -> tuple[KroneckerBasis, ...]:
        assert statistics.deltas is not None
        found = []
        for basis, rows, delta in zip(bases, statistics.rows, statistics.deltas, strict=True):
            measured = _second_moments(basis, rows, delta)
            found.append(basis._replace(scale=average * basis.scale + (1.0 - average) * measured))
        return tuple(found)


def _second_moments(basis: KroneckerBasis, rows: Array, delta: Array) -> Array:
    """⟨(U_Gᵀ J U_A)²⟩, entry by entry, over samples and summed over error directions."""
    assert basis.backward is not None
    xp = _arrays.namespace(delta)
    forward, backward = rows @ basis.forward[..., None, :, :], delta @ basis.backward[..., None, :, :]
    samples = rows.shape[-3]
    if rows.shape[-2] == 1:
        # The square of a product of two vectors is a product of squares.
        squares = (backward[..., 0, :] ** 2).mT @ forward[..., 0, :] ** 2
        return xp.sum(squares, axis=0) / samples
    return xp.sum(passes.jacobian(backward, forward) ** 2, axis=(0, -3)) / samples


@dataclass(frozen=True)
class FullFisher(Inverse):
    """The Moore–Penrose inverse of the whole exact Fisher information of the batch, layers together.

    Through P × P or, for few samples, N n_L × N n_L systems, whichever is smaller; a
    damping other than zero is added to all eigenvalues.

    Notes
    -----
    F⁺∇, the shortest of all natural gradients F^g ∇ (Eqs 23–30 of Bernacchia, Lengyel and Hennequin,
    2018, supplement).

    Examples
    --------
    Linear regression in one step.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[3.0], [7.0]])
    >>> opt = ng.optimizers.Optimizer(inverse=ng.optimizers.FullFisher())
    >>> opt.step(net, params, opt.init(net, params), x, y)[0]
    (array([[2., 1.]]),)
    """

    needs_network: ClassVar[bool] = True

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        fisher = at.net.fisher(at.params, at.x)
        return fisher.precondition(at.gradient, inverse="moore_penrose", damping=at.shift), prepared


class AdamState(NamedTuple):
    """Running moments of the gradient.

    Attributes
    ----------
    first, second : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        Means of the gradient and of its square.
    """

    first: Tangent
    second: Tangent


@dataclass(frozen=True)
class Adam(Inverse):
    """The gradient's running mean over the root of its running square (Kingma and Ba 2015).

    Parameters
    ----------
    beta1, beta2 : float
        How much of the old means is kept.
    eps : float
        Added to the root.

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    With means m = β₁m + (1 − β₁)∇ and v = β₂v + (1 − β₂)∇² the direction of step k is
    m / (1 − β₁ᵏ) over √(v / (1 − β₂ᵏ)) + eps: algorithm 1.

    Examples
    --------
    The first step has the sign of the gradient, and no more of it.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> w, g = np.zeros((1, 2)), np.asarray([[4.0, -0.25]])
    >>> seen = ng.optimizers.Statistics.of([np.ones((1, 2))], bias=False)
    >>> opt = ng.optimizers.Optimizer(inverse=ng.optimizers.Adam(eps=0.0), scaling=ng.optimizers.Fixed(0.5))
    >>> opt.update([w], None, [g], seen)[0]
    (array([[-0.5,  0.5]]),)
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            _arrays.check_within(name, getattr(self, name), *_arrays.FRACTION)
        _arrays.check_within("eps", self.eps, *_arrays.NONNEGATIVE)

    remembers: ClassVar[bool] = True

    def start(self, params: Tangent, estimate: Estimate) -> Any:
        zeros = tuple(_arrays.namespace(w).zeros_like(w) for w in params)
        return AdamState(zeros, zeros)

    def apply(self, prepared: Any, at: Context) -> tuple[Tangent, Any]:
        xp = at.xp
        first = tuple(self.beta1 * m + (1.0 - self.beta1) * g for m, g in zip(prepared.first, at.gradient, strict=True))
        second = tuple(
            self.beta2 * v + (1.0 - self.beta2) * g * g for v, g in zip(prepared.second, at.gradient, strict=True)
        )
        k = at.count + 1.0
        unbias, unbias_square = 1.0 / (1.0 - self.beta1**k), 1.0 / (1.0 - self.beta2**k)
        direction = tuple(
            m * unbias / (xp.sqrt(v * unbias_square) + self.eps) for m, v in zip(first, second, strict=True)
        )
        return direction, AdamState(first, second)
