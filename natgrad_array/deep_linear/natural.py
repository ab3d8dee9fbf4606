"""The family of natural gradients of a deep linear network."""

from __future__ import annotations

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.deep_linear.fisher import DeepLinearFisher, fisher
from natgrad_array.deep_linear.layerwise import layerwise
from natgrad_array.deep_linear.products import Weights, check_weights
from natgrad_array.deep_linear.task import GaussianTask


@_arrays.quiet
def natural_gradient(
    weights: Weights,
    task: GaussianTask,
    /,
    *,
    inverse: str = "layerwise",
    rtol: float | Array | None = None,
    method: str = "auto",
) -> tuple[Array, ...]:
    r"""Natural gradient of the loss, F^g ∂loss/∂θ.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network, or an ensemble of them.
    task : GaussianTask
        What it learns.
    inverse : {"layerwise", "exact", "moore_penrose", "block_diagonal"}
        Which generalised inverse of the Fisher information:

        - "layerwise": the paper's rule, (W_i^aᵀ Σ̃⁻¹ W_i^a)⁺ ∇_i (W_i^b Σ W_i^bᵀ)⁺ / L.
          Exact in the wide regime.
        - "exact": each piece of the error is shared by the layers that can realise it.
          Exact at every width and rank; "layerwise" in the wide regime.
        - "moore_penrose": F⁺∇, the shortest of all.
        - "block_diagonal": "layerwise" without 1/L.
    rtol : float or array of shape (*batch,), optional
        Relative cut-off on the eigenvalues of each layer's two covariances, or of CᵀC
        (the nonzero eigenvalues of F) for "moore_penrose". When None, ranks are decided
        on the factors of the covariances, at the rounding error of the products.
    method : {"auto", "eigh", "cholesky"}
        "auto" inverts factors, so that accuracy goes with their condition number, each
        member by the fastest way that is certified for it. The others invert the
        covariances, as `pinvh` does. "moore_penrose" does not use it.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        Descent directions: an update is ``W_i - learning_rate * d_i``.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`, `rtol` is negative, or an
        option is unknown.

    See Also
    --------
    exact_velocity : the motion of W that all of them have in common.

    Notes
    -----
    Eqs 24–26, 34, 35 and 42 of Bernacchia, Lengyel and Hennequin (2018), supplement.
    "layerwise" costs, for a square network whose end-to-end matrix is well conditioned, one
    n × n inverse and 3L products; where it is not, L/2 inverses and 4L − 4 products if each
    two layers are, else L inverses and 3L − 4 products; where all
    hidden layers have one width r and the ends are wider, an inverse for each layer, two of r and
    products with W* that all members share; and for other shapes two products and a Gram matrix a
    factor. On eager arrays a scalar or
    three say which members need what; the way is chosen by what most of a stack needs, so
    that a member's last digits may depend on what is stacked with it. In a layer of a square
    network only what is singular to the layer's own rounding counts as singular. On NumPy
    large stacks of matrices up to 64 × 64 are worked on in pieces by several threads (on torch's
    CPU in pieces one after the other): as
    many as there are processors, or as OPENBLAS_NUM_THREADS, MKL_NUM_THREADS or
    OMP_NUM_THREADS say, and one when called from a thread that is not the main one.
    On JAX each way is one compiled function (the last, by singular values, only where JAX has
    threads for their calls of LAPACK), and outside of `jax.jit` on a CPU
    such threads each call it with a part of a large stack; where it calls LAPACK, no more of them
    than half of the threads that JAX has (as many as usable processors, or as NPROC says), since more
    calls could wait for each other. Inverses of pairs are tried in float64 alone,
    and within `jax.jit`, on a CPU, neither they nor the one inverse,
    since a conditional costs more than it saves there.
    "moore_penrose" beyond two layers and n_0 n_L = 64 iterates to convergence, and on
    eager arrays reads one scalar a round.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> ng.deep_linear.natural_gradient([one, 4 * one], task)
    (array([[0.25]]), array([[1.]]))
    """
    if rtol is None and method == "auto" and inverse in ("layerwise", "block_diagonal"):
        xp, layers = check_weights(weights, task)
        return layerwise(xp, layers, task.factors, 1.0 / len(layers) if inverse == "layerwise" else 1.0)
    return fisher(weights, task)._natural_gradient(inverse, rtol, method)


@_arrays.quiet
def exact_velocity(weights: Weights, task: GaussianTask, /) -> Array:
    r"""Velocity of the end-to-end matrix under every natural gradient, in closed form.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    array, shape (*batch, n_L, n_0)
        In descent sign: W − W* where the network can realise it, its projection
        :math:`-\tilde\Sigma^{1/2} [\sum_i (Q_i - Q_{i-1}) \tilde G R_i] \Sigma^{-1/2}`
        in general. Directions in which the inputs never move are zero.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Notes
    -----
    Eqs 29–30 of Bernacchia, Lengyel and Hennequin (2018), supplement, extended to any
    widths and ranks: Q_i projects on range(Σ̃^{-1/2} W_i^a) and R_i on the row space of
    W_i^b Σ^{1/2}.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> ng.deep_linear.exact_velocity([one, 4 * one], task)
    array([[2.]])
    """
    f = fisher(weights, task)
    return task.factors.unwhiten(f._exact_velocity() @ task.factors.input_root_pinv)


@_arrays.quiet
def projections(weights: Weights, task: GaussianTask, /) -> tuple[tuple[Array, Array], ...]:
    r"""Projections of each layer that bend the layerwise rule.

    Under the layerwise rule, :math:`dW/dt = -W + \frac1L \sum_i P_i^a W^* P_i^b`.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    tuple of L pairs of arrays, shapes (*batch, n_L, n_L) and (*batch, n_0, n_0)
        P_i^a and P_i^b; identities in the wide regime (on the range of Σ).

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Notes
    -----
    Eq 45 of Bernacchia, Lengyel and Hennequin (2018), supplement.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> task = ng.GaussianTask(np.eye(2), np.eye(2), np.eye(2), 2 * np.eye(2))
    >>> narrow = np.asarray([[1.0, 0.0]]), np.asarray([[0.0], [1.0]])
    >>> ng.deep_linear.projections(narrow, task)[0][0] + 0.0
    array([[0., 0.],
           [0., 1.]])
    """
    f: DeepLinearFisher = fisher(weights, task)
    k = task.factors
    root, unroot = k.noise_roots(f._xp)
    return tuple((root @ q @ unroot, k.input_root @ r @ k.input_root_pinv) for q, r in f._projectors())
