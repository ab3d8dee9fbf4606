"""The exact Fisher information of a network on a batch of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.fisher.roots import Eigen, Root, eigen, join, split
from natgrad_array.networks import passes
from natgrad_array.networks.network import Network, Params
from natgrad_array.networks.passes import Trace

if TYPE_CHECKING:
    from natgrad_array.fisher.compare import FisherComparison

CHUNK_BYTES = 2**28
"""How much memory the errors that are alive at once may take where they can be added up."""

INVERSES = ("layerwise", "moore_penrose", "block_diagonal")

T = TypeVar("T")


class NetworkFisher:
    r"""Fisher information of a network's parameters on N inputs; made by `fisher`.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
        The parameters, bias column last.
    x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
        N inputs; the mean is over them.

    Raises
    ------
    TypeError, ValueError
        If `net` is no network, or `params` or `x` do not fit it or each other.

    Notes
    -----
    With :math:`J_n` the Jacobian of the outputs of sample n and :math:`M_n` the Fisher
    information of these outputs, :math:`F = \frac{1}{N} \sum_n J_n^T M_n J_n`: the mean of
    score times score under the *model's* own targets, here in closed form by one backward
    pass for each output direction. Targets of data play no part (`empirical_fisher` is the
    other object).

    A tangent, a gradient or a direction is a tuple with one array of the shape of each
    layer's parameters. In dense matrices layers follow each other and Vec stacks columns,
    the bias column last. Inverses of eager arrays bring a few scalars to the host.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((1, 1))
    >>> F = net.fisher((np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]]))
    >>> F.to_dense()
    array([[5., 2.],
           [2., 1.]])
    """

    def __init__(self, net: Network, params: Params, x: Array) -> None:
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {_arrays.describe(net)}")
        self._trace: Trace = net.forward(params, x)
        self._net = net
        self._params = tuple(params)
        self._memory: dict[Any, Any] = {}

    # ------------------------------------------------------------------------ the matrix

    @property
    def batch_shape(self) -> Shape:
        """Batch shape of parameters, inputs and noise together."""
        constants = self._net.likelihood._constants()
        shapes = {name: tuple(array.shape[:-2]) for name, array in constants.items()}
        return _arrays.broadcast_batch(shapes | {"the outputs": tuple(self._trace.output.shape[:-2])})

    @property
    def n_parameters(self) -> int:
        """P, biases counted."""
        return self._net.n_parameters

    @property
    def n_samples(self) -> int:
        """N."""
        return int(self._trace.output.shape[-2])

    @_arrays.quiet
    def block(self, i: int, j: int, /) -> Array:
        """Compute the dense block between two layers.

        Parameters
        ----------
        i, j : int
            Layers, counted from 0.

        Returns
        -------
        array, shape (*batch, n_i (n_{i-1} + 1), n_j (n_{j-1} + 1))
            Mean of the scores of layer i times those of layer j.

        Raises
        ------
        ValueError
            If there is no such layer, or the block would not fit in memory.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1), activation="identity")
        >>> params = np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 0.0]])
        >>> net.fisher(params, np.asarray([[1.0]])).block(0, 1)
        array([[6., 3.],
               [6., 3.]])
        """
        i, j = self._check_layer("i", i), self._check_layer("j", j)
        rows, columns = self._size(i), self._size(j)
        self._check_fits(f"block ({i}, {j})", (rows, columns), "use F.matvec, which never forms it")
        return self._root().layer(i).dense() @ self._root().layer(j).dense().mT

    @_arrays.quiet
    def to_dense(self) -> Array:
        """Assemble the whole matrix, for small P.

        Returns
        -------
        array, shape (*batch, P, P)
            All blocks, layers in order; exactly symmetric.

        Raises
        ------
        ValueError
            If it would not fit in memory, before anything is allocated.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> net.fisher(params, x).to_dense()
        array([[5., 2.],
               [2., 1.]])
        """
        size, like = self.n_parameters, self._trace.output
        self._check_fits("the dense Fisher matrix", (size, size), "use F.matvec, which never forms it")
        columns = self.n_samples * self._n_directions
        self._check_fits("the root of the Fisher matrix", (size, columns), "use F.matvec, or fewer samples")
        return _arrays.gram(_arrays.namespace(like), self._root().dense().mT)

    @_arrays.quiet
    def matvec(self, tangent: Params, /) -> tuple[Array, ...]:
        """Multiply a tangent by F: a tangent pass, the outputs' metric and a backward pass.

        Parameters
        ----------
        tangent : sequence of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            What to multiply; any number of them, stacked in front of the ensemble.

        Returns
        -------
        tuple of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            F times the tangent.

        Raises
        ------
        TypeError, ValueError
            If `tangent` does not have the layers of the network.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> F = net.fisher((np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]]))
        >>> F.matvec((np.asarray([[1.0, 0.0]]),))
        (array([[5., 2.]]),)
        """
        moved = self._check_tangent("tangent", tangent)
        layers, trace = self._net.layers, self._trace
        outputs = passes.tangent(layers, self._params, trace, moved)
        deltas = passes.backward(layers, self._params, trace, self._metric(outputs))
        return passes.collect(trace.rows, deltas)

    @property
    def _n_directions(self) -> int:
        """K, how many directions of the outputs F is a sum over."""
        return self._net.n_outputs

    def _directions(self, some: slice = slice(None)) -> Array:
        """Directions of the outputs, (K, *batch, N, n_L), with the root of a sample's weight in the mean."""
        output = self._trace.output
        xp = _arrays.namespace(output)
        return xp.moveaxis(self._net.likelihood._root_columns(xp, output, some), -1, 0) * self.n_samples**-0.5

    def _metric(self, v: Array) -> Array:
        """The outputs' Fisher information times a vector, as part of the mean over samples."""
        return self._net.likelihood.metric(self._trace.output, v) / self.n_samples

    @_arrays.quiet
    def layer_factors(self) -> tuple[tuple[Array, Array], ...]:
        r"""Compute the two moments of every layer that Kronecker-factored inverses use.

        Returns
        -------
        tuple of (forward, backward) for each layer
            forward, shape (*batch, n_{i-1} + 1, n_{i-1} + 1): mean over samples of
            :math:`\sum_t \bar{a} \bar{a}^T`, the homogeneous inputs at all positions.
            backward, shape (*batch, n_i, n_i): mean over samples, and over positions, of
            the sum over output directions of :math:`\delta \delta^T`. Batch axes may still
            have to broadcast.

        Notes
        -----
        The factors of K-FAC (Martens and Grosse 2015), and of KFC for convolutions (Grosse
        and Martens 2016), with exact output directions in place of sampled targets. A dense
        layer has one position.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> F = net.fisher((np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]]))
        >>> [(forward, backward)] = F.layer_factors()
        >>> forward
        array([[5., 2.],
               [2., 1.]])
        """
        return self._remember("factors", self._layer_factors)

    def _layer_factors(self) -> tuple[tuple[Array, Array], ...]:
        """Both moments, with as many directions sent back at once as fit in a budget."""
        layers, trace, total = self._net.layers, self._trace, self._n_directions
        xp = _arrays.namespace(trace.output)
        # While errors pass through a layer, a few arrays of their size are alive.
        widest = 4 * max(layer.positions * layer.parameter_shape[0] for layer in layers)
        one = math.prod(self.batch_shape) * self.n_samples * widest * xp.finfo(trace.output.dtype).bits // 8
        count = max(1, CHUNK_BYTES // max(one, 1))
        backward: list[Array] = []
        for start in range(0, total, count):
            some = self._directions(slice(start, min(start + count, total)))
            deltas = passes.backward(layers, self._params, trace, some)
            parts = [_arrays.gram(xp, _samples_last(xp, delta), delta.shape[-2]) for delta in deltas]
            backward = [a + b for a, b in zip(backward, parts, strict=True)] if start else parts
        forward = []
        for rows in trace.rows:
            *batch, samples, positions, n = rows.shape
            forward.append(_arrays.gram(xp, xp.reshape(rows, (*batch, samples * positions, n)), samples))
        return tuple(zip(forward, backward, strict=True))

    # -------------------------------------------------------------------------- inverses

    @_arrays.quiet
    def precondition(
        self,
        gradient: Params,
        /,
        *,
        inverse: str = "layerwise",
        damping: float | Array = 0.0,
        rtol: float | Array | None = None,
    ) -> tuple[Array, ...]:
        r"""Apply an inverse of F to a gradient.

        Parameters
        ----------
        gradient : sequence of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            Any gradient of the network's parameters.
        inverse : {"layerwise", "moore_penrose", "block_diagonal"}
            "layerwise" is G⁺ ∇ A⁺ / L with the two moments of `layer_factors`.
            "moore_penrose" is F⁺∇, all blocks between layers included. "block_diagonal" is
            the pseudo-inverse of every diagonal block, without 1/L.
        damping : float or array of shape (*batch,)
            Added to the eigenvalues of F, of its blocks, or of the Kronecker products, in
            their units. What the cut-off drops stays zero.
        rtol : float or array of shape (*batch,), optional
            Cut-off relative to the largest eigenvalue of what is inverted: F, a block, or
            each of the two moments. Default: what rounding explains.

        Returns
        -------
        tuple of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            The direction; an update subtracts it.

        Raises
        ------
        TypeError, ValueError
            If `gradient` does not have the layers of the network, `damping` or `rtol` is
            negative, `inverse` is unknown, or the matrix to decompose would not fit.

        Notes
        -----
        F⁺∇ goes through the smaller of P and N · n_L. Small problems decompose the root C of
        F = CCᵀ, whose condition number is the square root of F's; large ones decompose CᵀC,
        of size N · n_L, or F.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> F = net.fisher((np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [-1.0]]))
        >>> F.precondition((np.asarray([[3.0, 4.0]]),))
        (array([[3., 4.]]),)
        """
        given = self._check_tangent("gradient", gradient)
        _arrays.check_option("inverse", inverse, INVERSES)
        if inverse == "layerwise":
            return tuple(
                linalg.precondition(g, backward, forward, damping=damping, rtol=rtol) / len(given)
                for g, (forward, backward) in zip(given, self.layer_factors(), strict=True)
            )
        like, batch = self._trace.output, self.batch_shape
        xp = _arrays.namespace(like)
        if rtol is not None:
            rtol = _arrays.check_nonnegative("rtol", rtol, xp, like, batch=batch)
        damping = _arrays.check_nonnegative("damping", damping, xp, like, batch=batch, core_ndim=1)
        if inverse == "moore_penrose":
            return self._eigen(None, rtol).solve(self._root(), given, damping)
        return tuple(self._eigen(i, rtol).solve(self._root().layer(i), (g,), damping)[0] for i, g in enumerate(given))

    @_arrays.quiet
    def rank(self, *, rtol: float | Array | None = None) -> Array:
        """Count the directions in which the parameters carry information.

        Parameters
        ----------
        rtol : float or array of shape (*batch,), optional
            Cut-off relative to the largest eigenvalue, as in `precondition`.

        Returns
        -------
        array, shape (*batch,), floating
            Rank of F, at most the smaller of P and N · n_L. NaN for a member that is not
            finite.

        Raises
        ------
        TypeError, ValueError
            If `rtol` is negative, or the matrix to decompose would not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> int(net.fisher(params, x[:1, :]).rank())
        1
        """
        like = self._trace.output
        xp = _arrays.namespace(like)
        if rtol is not None:
            rtol = _arrays.check_nonnegative("rtol", rtol, xp, like, batch=self.batch_shape)
        found = self._eigen(None, rtol)
        counted = xp.astype(found.kept, found.values.dtype)
        return xp.sum(xp.where(xp.isnan(found.values), xp.nan, counted), axis=-1)

    @_arrays.quiet
    def spectrum(self) -> Array:
        """Compute the eigenvalues of F that can differ from zero, ascending.

        Returns
        -------
        array, shape (*batch, r)
            r is the smaller of P and N · n_L (for an estimate, N times its draws); all other
            eigenvalues of F are zero.

        Raises
        ------
        ValueError
            If the matrix to decompose would not fit in memory.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> bool(np.isclose(np.sum(net.fisher(params, x).spectrum()), 6.0))
        True
        """
        return self._eigen(None, None).values

    # ----------------------------------------------------------------- comparison, export

    def compare(
        self,
        estimate: NetworkFisher | Callable[[tuple[Array, ...]], Any],
        gradient: Params | None = None,
        /,
        *,
        inverse: str = "layerwise",
        damping: float | Array = 0.0,
        rtol: float | Array | None = None,
    ) -> FisherComparison:
        """Hold an estimate, an inverse of F or any preconditioner against F and F⁺∇.

        Parameters
        ----------
        estimate : NetworkFisher or callable
            An estimate of this Fisher information; or itself, to see what an inverse does;
            or a preconditioner, which takes a gradient and returns a direction. One that
            `Optimizer.preconditioner` makes is compared block by block too, and so is any
            other with a true `has_blocks` and a method `block` like that one's.
        gradient : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1), optional
            The gradient that both are applied to; without one there are no steps.
        inverse, damping, rtol : str, float or array, float or array
            How a NetworkFisher is inverted, as in `precondition`; F itself by
            "moore_penrose" without damping.

        Returns
        -------
        FisherComparison
            Errors of the blocks, spectra, and the step's cosine, length and gain, per
            member; None for what does not apply. `str` makes a table of it.

        Raises
        ------
        TypeError, ValueError
            If the estimate is none of the same layers, a preconditioner is given options
            that are not its own, or a bare callable no gradient; as `precondition` does;
            and where dense blocks would not fit in memory.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> F = net.fisher((np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [-1.0]]))
        >>> report = F.compare(lambda gradient: gradient, (np.asarray([[3.0, 4.0]]),))
        >>> bool(np.isclose(report.cosine, 1.0)), report.block_errors is None
        (True, True)
        """
        from natgrad_array.fisher.compare import compare

        return compare(self, estimate, gradient, inverse=inverse, damping=damping, rtol=rtol)

    def to_scipy(self) -> Any:
        """Export F for SciPy's iterative solvers.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Of shape (P, P), symmetric; it takes and gives NumPy vectors in the order of
            `to_dense` and calls `matvec`.

        Raises
        ------
        ImportError
            If SciPy is not installed.
        ValueError
            If there are batch axes: SciPy's operators have none.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params, x = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]])
        >>> operator = net.fisher(params, x).to_scipy()
        >>> operator.shape
        (2, 2)
        >>> operator.matvec([1.0, 0.0]).tolist()
        [5.0, 2.0]
        """
        if self.batch_shape:
            raise ValueError(f"to_scipy needs a Fisher matrix without batch axes, got batch shape {self.batch_shape}")
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy, which is not installed: python -m pip install scipy") from error
        like = self._trace.output
        xp, size = _arrays.namespace(like), self.n_parameters
        shapes = [layer.parameter_shape for layer in self._net.layers]

        def matvec(vector: Any) -> Any:
            tangent = split(_arrays.asarray_like(xp, vector.reshape(-1), like), shapes)
            return _arrays.to_numpy(join(self.matvec(tangent)))

        dtype = _arrays.to_numpy(like).dtype
        return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=dtype)

    # ----------------------------------------------------------------------------- within

    def _root(self) -> Root:
        """C: errors of all directions sent back at once."""

        def compute() -> Root:
            xp, layers = _arrays.namespace(self._trace.output), self._net.layers
            units = sum(layer.positions * layer.parameter_shape[0] for layer in layers)
            size = (self._n_directions, self.n_samples, units)
            self._check_fits(
                "the errors of all directions", size, "use F.matvec, inverse 'layerwise', or fewer samples"
            )
            deltas = passes.backward(layers, self._params, self._trace, self._directions())
            return Root(tuple(xp.moveaxis(delta, 0, -3) for delta in deltas), self._trace.rows)

        return self._remember("root", compute)

    def _eigen(self, layer: int | None, rtol: float | Array | None) -> Eigen:
        """Decompose F, or the diagonal block of one layer."""

        def compute() -> Eigen:
            return eigen(self._root() if layer is None else self._root().layer(layer), rtol)

        return self._remember(("eigen", layer), compute) if rtol is None else compute()

    def _check_tangent(self, name: str, tangent: Params) -> tuple[Array, ...]:
        return self._net.check_tangent(name, tangent, self._trace.output)

    def _size(self, i: int) -> int:
        """How many parameters a layer has."""
        return math.prod(self._net.layers[i].parameter_shape)

    def _check_fits(self, what: str, core: Shape, instead: str) -> None:
        like = self._trace.output
        _arrays.check_fits(what, (*self.batch_shape, *core), _arrays.namespace(like), like, instead)

    def _check_layer(self, name: str, index: Any) -> int:
        depth = len(self._net.layers)
        if not _arrays.is_integer(index) or not 0 <= index < depth:
            raise ValueError(f"{name} must be a layer from 0 to {depth - 1}, got {index!r}")
        return int(index)

    def _remember(self, key: Any, compute: Callable[[], T]) -> T:
        """Compute once. Tracers are not kept: they must not outlive their trace."""
        if key not in self._memory:
            value = compute()
            if _any_lazy(value):
                return value
            self._memory[key] = value
        result: T = self._memory[key]
        return result


def _samples_last(xp: Namespace, delta: Array) -> Array:
    """Errors (K, *batch, N, T, n) as the rows of matrices, (*batch, N · K · T, n)."""
    turned = xp.moveaxis(delta, 0, -3)
    *batch, samples, directions, positions, n = turned.shape
    return xp.reshape(turned, (*batch, samples * directions * positions, n))


def _any_lazy(value: Any) -> bool:
    if isinstance(value, Sequence):
        return any(_any_lazy(item) for item in value)
    return hasattr(value, "dtype") and _arrays.is_lazy(value)
