"""From activations and errors of any origin to the moments of layers, and to directions."""

from __future__ import annotations

from collections.abc import Sequence

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.kronecker import Kronecker, KroneckerBasis
from natgrad_array.optimizers.estimates import Estimate, Statistics
from natgrad_array.optimizers.inverses import root_damped

INVERSES = ("factored", "tikhonov", "moore_penrose", "root")


@_arrays.quiet
def kronecker_factors(
    activations: Sequence[Array],
    errors: Sequence[Array] | None = None,
    /,
    *,
    bias: bool = True,
    convolution: str | None = None,
) -> tuple[Kronecker, ...]:
    r"""Compute the two moments of every layer, that of what comes in and that of what comes back.

    Parameters
    ----------
    activations : sequence of arrays, shapes (*batch, N, n_{i-1})
        Inputs of every layer; (*batch, N, T_i, n_{i-1}) if `convolution` is given, with T_i
        positions that the layer works on one by one.
    errors : sequence of arrays, shapes (*batch, N, n_i), or (*batch, N, T_i, n_i), optional
        Derivatives of each sample's own loss (not of the mean over samples) with respect to
        the layer's outputs before the activation. With targets drawn from the model the
        moments are those of the Fisher information, with the data's of the empirical one.
        When None, the identity stands for their moment.
    bias : bool
        Whether the layers have a bias: a 1 is put after the inputs.
    convolution : {"expand", "reduce"}, optional
        How positions (patches of a convolution, tokens of a sequence) enter: as if they were
        samples, or inputs averaged and errors summed first. None: there are none.

    Returns
    -------
    tuple of Kronecker
        For each layer (A, G): A = ⟨ā āᵀ⟩ of shape (*batch, n_{i-1} + 1, n_{i-1} + 1) (or
        n_{i-1} without a bias), and G = ⟨δ δᵀ⟩ of shape (*batch, n_i, n_i), or None.

    Raises
    ------
    TypeError, ValueError
        If these are not sequences of floating arrays of one library, their shapes do not
        fit, or `convolution` is unknown.

    Notes
    -----
    The block of the Fisher information of a layer is about A ⊗ G (Martens and Grosse 2015).
    With positions A sums over them, and G is their mean ("expand": Grosse and Martens 2016;
    "reduce": Eschenhagen et al. 2023).

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-1.0]])
    >>> [(A, G)] = ng.adapters.kronecker_factors([a], [delta])
    >>> A
    array([[5., 2.],
           [2., 1.]])
    >>> G
    array([[1.]])
    """
    if convolution is None:
        return Estimate().factors(Statistics.of(activations, errors, bias=bias))
    return Estimate(convolution=convolution).factors(Statistics.of(activations, errors, bias=bias, positions=True))


@_arrays.quiet
def precondition(
    gradients: Sequence[Array],
    factors: Sequence[tuple[Array, Array | None]],
    /,
    *,
    damping: float | Array = 0.0,
    inverse: str = "factored",
) -> tuple[Array, ...]:
    r"""Multiply the gradient of every layer by a damped inverse of A ⊗ G.

    Parameters
    ----------
    gradients : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        Of the layers' matrices, the bias as last column where the factors have one.
    factors : sequence of pairs (A, G), or of Kronecker
        What `kronecker_factors` made, or averages of such. None for G is the identity.
    damping : float or array of shape (*batch,)
        In the units of the eigenvalues of A ⊗ G.
    inverse : {"factored", "tikhonov", "moore_penrose", "root"}
        "factored" is (G + γ/π 1)⁻¹ ∇ (A + πγ 1)⁻¹ with γ² the damping, the rule of K-FAC.
        "tikhonov" is (A ⊗ G + damping 1)⁻¹ exactly. "moore_penrose" is G⁺ ∇ A⁺ and takes no
        damping. "root" inverts each eigenvalue λ > 0 of both factors as 1/(λ + √damping),
        and drops the others.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The directions; an update subtracts them. None is divided by the number of layers.

    Raises
    ------
    TypeError, ValueError
        If gradients and factors do not fit each other, `damping` is negative, or `inverse`
        is unknown.

    Notes
    -----
    The rules of `ng.optimizers.FactoredTikhonov`, `Tikhonov`, `MoorePenrose` and
    `RootDamped`. Where the damping is zero all are the Moore–Penrose inverse.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> factors = [(np.diag([1.0, 3.0]), np.asarray([[2.0]]))]
    >>> ng.adapters.precondition([np.asarray([[6.0, 6.0]])], factors, inverse="moore_penrose")
    (array([[3., 1.]]),)
    >>> ng.adapters.precondition([np.asarray([[6.0, 6.0]])], factors, damping=1.0, inverse="tikhonov")
    (array([[2.        , 0.85714286]]),)
    """
    given = _arrays.check_sequence("gradients", gradients, "a tuple or list with one array for each layer")
    _arrays.check_option("inverse", inverse, INVERSES)
    blocks = _check_factors(given, factors)
    xp = _arrays.namespace(given[0])
    shift = _arrays.check_nonnegative("damping", damping, xp, given[0], core_ndim=2)
    if inverse == "moore_penrose":
        if not isinstance(shift, float) or shift != 0.0:
            raise ValueError(f"damping must be 0 for inverse 'moore_penrose', got {_arrays.describe(damping)}")
        return tuple(block.pinv().matvec(g) for block, g in zip(blocks, given, strict=True))
    if inverse == "tikhonov":
        return tuple(
            KroneckerBasis.of(block, g.shape[-2]).solve(g, shift) for block, g in zip(blocks, given, strict=True)
        )
    if inverse == "root":
        # How many samples the factors are of is not known: whatever has no eigenvalue is dropped.
        return tuple(root_damped(block, shift).matvec(g) for block, g in zip(blocks, given, strict=True))
    return tuple(block.damped_inverse(shift).matvec(g) for block, g in zip(blocks, given, strict=True))


def _check_factors(gradients: tuple[Array, ...], factors: object) -> list[Kronecker]:
    pairs = _arrays.check_sequence("factors", factors, "a tuple or list with a pair (A, G) for each layer")
    if len(pairs) != len(gradients):
        raise ValueError(f"factors must have one pair for each of {len(gradients)} layers, got {len(pairs)}")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"factors[{i}] must be a pair (A, G), got {_arrays.describe(pair)}")
    blocks = [Kronecker(*pair) for pair in pairs]
    named = {f"gradients[{i}]": g for i, g in enumerate(gradients)}
    named |= {f"factors[{i}][0]": block.forward for i, block in enumerate(blocks)}
    named |= {f"factors[{i}][1]": block.backward for i, block in enumerate(blocks) if block.backward is not None}
    _arrays.check_arrays(named)
    for i, (g, block) in enumerate(zip(gradients, blocks, strict=True)):
        _arrays.check_matrix(f"gradients[{i}]", g)
        m, n = g.shape[-2:]
        _arrays.check_core(f"factors[{i}][0]", block.forward, (n, n), "to match the columns of the gradient")
        if block.backward is not None:
            _arrays.check_core(f"factors[{i}][1]", block.backward, (m, m), "to match the rows of the gradient")
    _arrays.broadcast_batch({name: tuple(array.shape[:-2]) for name, array in named.items()})
    return blocks
