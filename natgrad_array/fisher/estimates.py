"""Estimates of the Fisher information of a network: from the model's samples, from the data's residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.fisher.network import NetworkFisher
from natgrad_array.fisher.roots import Root
from natgrad_array.networks.network import Network, Params


class FisherEstimate(NetworkFisher):
    """An estimate of a network's Fisher information from targets; made by `sampled_fisher`.

    It has the interface of `NetworkFisher`: the sum over output directions is replaced by a
    mean over the scores of some targets.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters, bias column last.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        N inputs.
    errors : callable
        Takes the outputs, (*batch, N, n_L), and returns the derivatives of the loss of S
        targets with respect to them, (S, *batch, N, n_L).

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit each other.

    Notes
    -----
    F̂ = (1/NS) Σ_ns (J_nᵀ r_ns)(J_nᵀ r_ns)ᵀ with r_ns the derivatives of the losses.

    Examples
    --------
    Two errors for each sample, of mean square 1, as under the model.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params, x = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]])
    >>> estimate = ng.FisherEstimate(net, params, x, lambda outputs: np.stack([np.ones_like(outputs)] * 2))
    >>> estimate.n_draws
    2
    >>> estimate.to_dense()
    array([[5., 2.],
           [2., 1.]])
    """

    @_arrays.quiet
    def __init__(self, net: Network, params: Params, x: Array, errors: Callable[[Array], Array]) -> None:
        super().__init__(net, params, x)
        scores = errors(self._trace.output)
        self._scores = scores * (self.n_samples * scores.shape[0]) ** -0.5

    @property
    def batch_shape(self) -> Shape:
        """Batch shape of parameters, inputs, noise and targets together."""
        return tuple(self._scores.shape[1:-2])

    @property
    def n_draws(self) -> int:
        """S."""
        return int(self._scores.shape[0])

    @property
    def _n_directions(self) -> int:
        return self.n_draws

    def _directions(self, some: slice = slice(None)) -> Array:
        return self._scores[some, ...]

    def _metric(self, v: Array) -> Array:
        xp = _arrays.namespace(v)
        root = xp.moveaxis(self._scores, 0, -1)
        return (root @ (root.mT @ v[..., None]))[..., 0]

    @_arrays.quiet
    def standard_error(self, i: int | None = None, j: int | None = None, /) -> Array:
        """Estimate how far sampling alone puts every entry off.

        Parameters
        ----------
        i, j : int, optional
            Layers, counted from 0, for the entries of one block; all entries without.

        Returns
        -------
        array, shape (*batch, P, P), or that of the block
            Standard deviation between draws of the targets, divided by √S. The inputs are
            taken as given.

        Raises
        ------
        ValueError
            If there are fewer than two draws, no such layer, or S matrices of that size
            would not fit in memory.

        Notes
        -----
        √(Σ_s (F̂_s − F̂)² / (S (S − 1))), entry by entry, with F̂_s what draw s gives alone.

        Examples
        --------
        Squares of 1 and 4 at the bias: 2.5 ± 1.5.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params, x = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),), np.asarray([[0.0]])
        >>> errors = np.asarray([[[1.0]], [[2.0]]])
        >>> estimate = ng.FisherEstimate(net, params, x, lambda outputs: errors)
        >>> estimate.to_dense()[1:, 1:], estimate.standard_error()[1:, 1:]
        (array([[2.5]]), array([[1.5]]))
        """
        draws = self.n_draws
        if draws < 2:
            raise ValueError(f"standard_error needs at least 2 draws of the targets, got {draws}")
        if i is None and j is None:
            shape = (draws, self.n_parameters, self.n_parameters)
        else:
            i, j = self._check_layer("i", i), self._check_layer("j", j)
            shape = (draws, self._size(i), self._size(j))
        self._check_fits("a matrix for each draw", shape, "ask for one block, or take fewer draws")
        root = self._root()
        left, right = (root, root) if i is None or j is None else (root.layer(i), root.layer(j))
        each = _by_draw(left) @ _by_draw(right).mT
        xp = _arrays.namespace(each)
        # A draw's own matrix is S times its part of the mean, which gives the factor S² / (S (S − 1)).
        spread = each - xp.mean(each, axis=0, keepdims=True)
        return xp.sqrt(xp.sum(spread * spread, axis=0) * (draws / (draws - 1)))


def _by_draw(root: Root) -> Array:
    """C with the columns of each draw by themselves, (S, *batch, P, N)."""
    dense = root.dense()
    xp = _arrays.namespace(dense)
    samples, draws = root.deltas[0].shape[-4:-2]
    return xp.moveaxis(xp.reshape(dense, (*dense.shape[:-1], samples, draws)), -1, 0)


def sampled_fisher(net: Network, params: Params, x: Array, rng: Any, /, *, n_samples: int = 1) -> FisherEstimate:
    """Estimate the Fisher information from targets that are drawn from the model.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters, bias column last.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        N inputs.
    rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
        Where randomness comes from, as for `sample` of a likelihood.
    n_samples : int
        S, how many targets are drawn for each input.

    Returns
    -------
    FisherEstimate
        Unbiased; its `standard_error` falls as 1 / √S.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit each other, `n_samples` is not a positive integer, or
        `rng` is no source of randomness.

    See Also
    --------
    empirical_fisher : the other object, from the targets of the data.

    Notes
    -----
    With one draw it is what Bernacchia, Lengyel and Hennequin (2018) use for nonlinear
    networks, and what K-FAC samples (Martens and Grosse 2015).

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((2, 3, 1))
    >>> x = np.random.default_rng(0).standard_normal((20, 2))
    >>> params = net.init(1, like=x)
    >>> estimate = ng.sampled_fisher(net, params, x, 2, n_samples=400)
    >>> error = estimate.to_dense() - net.fisher(params, x).to_dense()
    >>> bool(np.all(abs(error) <= 5 * estimate.standard_error() + 1e-12))
    True
    """
    if not _arrays.is_integer(n_samples) or n_samples < 1:
        raise ValueError(f"n_samples must be a positive integer, got {n_samples!r}")
    draws = (int(n_samples),)

    def errors(outputs: Array) -> Array:
        return net.likelihood.residual(outputs, net.likelihood.sample(outputs, rng, draws=draws))

    return FisherEstimate(net, params, x, errors)


def empirical_fisher(net: Network, params: Params, x: Array, y: Array, /) -> FisherEstimate:
    """Average score times score over the targets of the data: not an estimate of the Fisher information.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters, bias column last.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        N inputs.
    y : array, shape (*batch, N, n_L), or (*batch, N) for classes
        Their targets.

    Returns
    -------
    FisherEstimate
        With one draw, the data.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit each other.

    See Also
    --------
    sampled_fisher : an unbiased estimate, from targets of the model.

    Notes
    -----
    It is the Fisher information only where the model is true: Eqs 38–39 of Bernacchia,
    Lengyel and Hennequin (2018) need the average over the model.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((1, 1))
    >>> one = np.asarray([[1.0]])
    >>> ng.empirical_fisher(net, (np.asarray([[2.0, 0.0]]),), one, 5 * one).to_dense()
    array([[9., 9.],
           [9., 9.]])
    """
    return FisherEstimate(net, params, x, lambda outputs: net.likelihood.residual(outputs, y)[None, ...])
