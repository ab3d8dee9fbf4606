"""An estimate and an inverse at one point, as a map from gradients to directions."""

from __future__ import annotations

import math
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.networks.network import Params
from natgrad_array.optimizers.inverses import Context, Inverse


class Preconditioner:
    """What an optimizer's inverse does to gradients at one point; made by `preconditioner`.

    Parameters
    ----------
    inverse : Inverse
        What stands for the inverse of the Fisher information.
    moments, prepared : tuple
        What the inverse has seen, and what it has made of that.
    at : Context
        The point.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
    >>> x, y = np.asarray([[2.0], [-2.0]]), np.asarray([[9.0], [-7.0]])
    >>> opt = ng.optimizers.Optimizer(ng.optimizers.ExactDirections(), ng.optimizers.MoorePenrose())
    >>> inverse = opt.preconditioner(net, params, opt.init(net, params), x, y)
    >>> net.gradient(params, x, y)
    (array([[-16.,  -1.]]),)
    >>> inverse(net.gradient(params, x, y))
    (array([[-4., -1.]]),)
    """

    def __init__(self, inverse: Inverse, moments: Any, prepared: Any, at: Context) -> None:
        self._inverse, self._moments, self._prepared, self._at = inverse, moments, prepared, at

    @_arrays.quiet
    def __call__(self, gradient: Params, /) -> tuple[Array, ...]:
        """Turn a gradient into a direction, before any step rule.

        Parameters
        ----------
        gradient : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            Any gradient of the network's parameters.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            Descent subtracts it.

        Raises
        ------
        TypeError, ValueError
            If `gradient` does not have the layers of the network.
        """
        given = self._at.net.check_tangent("gradient", gradient, self._at.params[0])
        return self._inverse.apply(self._prepared, self._at._replace(gradient=given))[0]

    @property
    def has_blocks(self) -> bool:
        """Whether there is an estimate of the Fisher information behind the inverse."""
        return self._inverse.has_blocks

    @_arrays.quiet
    def block(self, i: int, j: int, /) -> Array | None:
        """Form a dense block of the estimate that is inverted, before damping.

        Parameters
        ----------
        i, j : int
            Layers, counted from 0.

        Returns
        -------
        array, shape (*batch, n_i (n_{i-1} + 1), n_j (n_{j-1} + 1)), or None
            As of `NetworkFisher.block`; None where the estimate is zero.

        Raises
        ------
        ValueError
            If there is no such layer, no estimate behind the inverse, or the block would
            not fit in memory.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params = ng.networks.MLP((1, 1)), (np.zeros((1, 2)),)
        >>> x, y = np.asarray([[2.0], [-2.0]]), np.asarray([[9.0], [-7.0]])
        >>> opt = ng.optimizers.Optimizer(ng.optimizers.ExactDirections(), ng.optimizers.MoorePenrose())
        >>> inverse = opt.preconditioner(net, params, opt.init(net, params), x, y)
        >>> inverse.block(0, 0)
        array([[4., 0.],
               [0., 1.]])
        """
        params = self._at.params
        for name, index in (("i", i), ("j", j)):
            if not _arrays.is_integer(index) or not 0 <= index < len(params):
                raise ValueError(f"{name} must be a layer from 0 to {len(params) - 1}, got {index!r}")
        if not self.has_blocks:
            raise ValueError(f"{self._inverse} inverts no estimate of the Fisher information, so it has no blocks")
        first, last = min(int(i), int(j)), max(int(i), int(j))
        sizes = [math.prod(params[k].shape[-2:]) for k in (first, last)]
        xp, batch = self._at.xp, tuple(self._at.damping.shape)
        # A block, and the vectors that some are made of.
        _arrays.check_fits(f"block ({i}, {j})", (*batch, 2, *sizes), xp, params[0], "compare a smaller network")
        found = self._inverse.block(first, last, self._moments, self._prepared, self._at)
        return found if found is None or i <= j else found.mT
