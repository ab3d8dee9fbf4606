"""The exact Fisher information of a deep linear network with Gaussian noise.

Everything is written in whitened coordinates. With E_i and X_i the factors of layer i's
two covariances (Eqs 38–39), C the stack of X_i ⊗ E_i, and H an (n_L, ρ) matrix:

    F = C Cᵀ,    (C vec H)_i = E_i H X_iᵀ,    Cᵀ d = vec Σ_i E_iᵀ d_i X_i,

and the gradient of the loss is −C vec(error). Each inverse is a rule that turns such a
gradient, layer by layer, into a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear import moore_penrose
from natgrad_array.deep_linear.duals import Pair, duals
from natgrad_array.deep_linear.products import (
    Products,
    Weights,
    check_tangent,
    check_weights,
    products,
    sum_kernels,
    widths,
)
from natgrad_array.deep_linear.shares import (
    Subspaces,
    common_bases,
    projectors,
    shares,
    shares_of_full_rank,
)
from natgrad_array.deep_linear.task import GaussianTask

INVERSES = ("layerwise", "exact", "moore_penrose", "block_diagonal")

T = TypeVar("T")


def fisher(weights: Weights, task: GaussianTask, /) -> DeepLinearFisher:
    """The exact Fisher information of a network: factor once, apply many times.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network, or an ensemble of them.
    task : GaussianTask
        Gives the input moment and the noise covariance; its targets play no part.

    Returns
    -------
    DeepLinearFisher
        All blocks, those between layers included.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Notes
    -----
    Eqs 13–22 of Bernacchia, Lengyel and Hennequin (2018), supplement. The average is over
    the model's own noise, not over the residuals of the data.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, one, 2 * one)
    >>> ng.deep_linear.fisher([2 * one, 3 * one], task).to_dense()
    array([[9., 6.],
           [6., 4.]])
    """
    return DeepLinearFisher(weights, task)


class DeepLinearFisher:
    """Fisher information of a deep linear network; made by `fisher`.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        Gives the input moment and the noise covariance.

    Notes
    -----
    Block (i, j) is (W_i^b Σ W_j^bᵀ) ⊗ (W_i^aᵀ Σ̃⁻¹ W_j^a), with W_i^b the product of the layers
    before layer i and W_i^a that of those after it: Eqs 13–22 of Bernacchia, Lengyel and Hennequin
    (2018), supplement.

    A tangent, a gradient or a direction is a tuple with one array of the shape of each
    layer's weights. In dense matrices layers follow each other and Vec stacks columns.
    Inverses and ranks of eager arrays bring a scalar or two to the host, which say whether
    any member needs singular values.

    Examples
    --------
    A chain of two numbers has one direction that its product depends on.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> F = ng.deep_linear.DeepLinearFisher([2 * one, 3 * one], ng.GaussianTask(one, one, one, 2 * one))
    >>> F.matvec([one, one])
    (array([[15.]]), array([[10.]]))
    >>> F.n_parameters, int(F.rank())
    (2, 1)
    """

    def __init__(self, weights: Weights, task: GaussianTask) -> None:
        self._fill(*check_weights(weights, task), task)

    def _fill(self, xp: Namespace, layers: tuple[Array, ...], task: GaussianTask) -> None:
        self._xp, self._layers, self._task = xp, layers, task
        self._products = products(layers, task.factors)
        self._memory: dict[Any, Any] = {}

    @classmethod
    def _of_checked(cls, xp: Namespace, layers: tuple[Array, ...], task: GaussianTask) -> DeepLinearFisher:
        """Make one of a network and a task that have been checked before."""
        made = cls.__new__(cls)
        made._fill(xp, layers, task)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return DeepLinearFisher, (self._layers, self._task)

    # ------------------------------------------------------------------------ the matrix

    @property
    def batch_shape(self) -> Shape:
        """Batch shape of network and task together."""
        return tuple(self._products.error.shape[:-2])

    @property
    def n_parameters(self) -> int:
        """P = Σ n_i n_{i-1}."""
        return sum(int(layer.shape[-2] * layer.shape[-1]) for layer in self._layers)

    @_arrays.quiet
    def factors(self, i: int, j: int, /) -> tuple[Array, Array]:
        """Compute the two Kronecker factors of block (i, j).

        Parameters
        ----------
        i, j : int
            Layers, counted from 0.

        Returns
        -------
        forward : array, shape (*batch, n_{i-1}, n_{j-1})
            W_i^b Σ W_j^bᵀ, the moment of the layers' inputs.
        backward : array, shape (*batch, n_i, n_j)
            W_i^aᵀ Σ̃⁻¹ W_j^a, the moment of the errors that the model's noise sends back.

        Raises
        ------
        ValueError
            If there is no such layer.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> ng.deep_linear.fisher([2 * one, 3 * one], task).factors(0, 1)
        (array([[2.]]), array([[3.]]))
        """
        i, j = self._check_layer("i", i), self._check_layer("j", j)
        ahead, behind, _ = self._products
        return behind[i] @ behind[j].mT, ahead[i] @ ahead[j].mT

    @_arrays.quiet
    def block(self, i: int, j: int, /) -> Array:
        """Compute the dense block between two layers.

        Parameters
        ----------
        i, j : int
            Layers, counted from 0.

        Returns
        -------
        array, shape (*batch, n_i n_{i-1}, n_j n_{j-1})
            The Kronecker product of the two `factors`.

        Raises
        ------
        ValueError
            If there is no such layer, or the block would not fit in memory.

        Notes
        -----
        Eq 19 of Bernacchia, Lengyel and Hennequin (2018), supplement.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> ng.deep_linear.fisher([2 * one, 3 * one], task).block(0, 1)
        array([[6.]])
        """
        forward, backward = self.factors(i, j)
        shape = (forward.shape[-2] * backward.shape[-2], forward.shape[-1] * backward.shape[-1])
        _arrays.check_fits(
            f"block ({i}, {j})", (*self.batch_shape, *shape), self._xp, forward, "use F.factors or F.matvec"
        )
        return linalg.kron(self._xp, forward, backward)

    @_arrays.quiet
    def to_dense(self) -> Array:
        """Assemble the whole matrix from its blocks, for small P.

        Returns
        -------
        array, shape (*batch, P, P)
            All blocks, layers in order.

        Raises
        ------
        ValueError
            If it would not fit in memory, before anything is allocated.

        Notes
        -----
        Eq 22 of Bernacchia, Lengyel and Hennequin (2018), supplement.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> ng.deep_linear.fisher([one], task).to_dense()
        array([[1.]])
        """
        size = self.n_parameters
        shape = (*self.batch_shape, size, size)
        _arrays.check_fits(
            "the dense Fisher matrix", shape, self._xp, self._products.error, "use F.matvec, which never forms it"
        )
        ahead, behind, error = self._products

        def factors(i: int) -> tuple[Array, Array]:
            blocks = [(behind[i] @ x.mT, ahead[i] @ e.mT) for e, x in zip(ahead, behind, strict=True)]
            return linalg.wide_factors(self._xp, blocks, self.batch_shape)

        sizes = [int(layer.shape[-2] * layer.shape[-1]) for layer in self._layers]
        return _arrays.stack_products(self._xp, factors, sizes, self.batch_shape, error)

    @_arrays.quiet
    def matvec(self, tangent: Weights, /) -> tuple[Array, ...]:
        """Multiply a tangent by F with 4L − 2 small products, and two more for noise that is not the identity.

        Parameters
        ----------
        tangent : sequence of arrays, shapes (*batch, n_i, n_{i-1})
            What to multiply.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1})
            F times the tangent.

        Raises
        ------
        TypeError, ValueError
            If `tangent` does not have the layers of the network.

        Notes
        -----
        Eq 22 of Bernacchia, Lengyel and Hennequin (2018), supplement: A(B(Aᵀ tangent)).

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> ng.deep_linear.fisher([2 * one, 3 * one], task).matvec((one, 0 * one))
        (array([[9.]]), array([[6.]]))
        """
        return self._from_function_space(self._to_function_space(check_tangent("tangent", tangent, self._layers)))

    # --------------------------------------------------------------------------- inverses

    @_arrays.quiet
    def precondition(
        self,
        gradient: Weights,
        /,
        *,
        inverse: str = "layerwise",
        rtol: float | Array | None = None,
        method: str = "auto",
    ) -> tuple[Array, ...]:
        """Apply a generalised inverse of F to a gradient, a stochastic one too.

        Parameters
        ----------
        gradient : sequence of arrays, shapes (*batch, n_i, n_{i-1})
            Any gradient of the network's parameters.
        inverse : {"layerwise", "exact", "moore_penrose", "block_diagonal"}
            Which inverse, as in `natural_gradient`.
        rtol : float or array of shape (*batch,), optional
            Cut-off, as in `natural_gradient`.
        method : {"auto", "eigh", "cholesky"}
            How layers are inverted, as in `natural_gradient`.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1})
            The direction; an update subtracts it.

        Raises
        ------
        TypeError, ValueError
            If `gradient` does not have the layers of the network, `rtol` is negative, or
            an option is unknown.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> F = ng.deep_linear.fisher([one, 2 * one], task)
        >>> F.precondition((4 * one, 2 * one))
        (array([[0.5]]), array([[1.]]))
        """
        tangent = check_tangent("gradient", gradient, self._layers)
        rtol = self._check_inverse(inverse, rtol, method)
        if inverse == "moore_penrose":
            return self._moore_penrose(rtol).apply(tangent)
        pairs, full = self._duals(rtol, method)
        whitened = [e.mT @ g @ x for (e, x), g in zip(pairs, tangent, strict=True)]
        if inverse == "exact":
            whitened = self._shares(whitened, pairs, full)
        return self._layer_rule(inverse, pairs, whitened)

    def _natural_gradient(self, inverse: str, rtol: float | Array | None, method: str) -> tuple[Array, ...]:
        """Precondition the task's own gradient, whose whitened form is known: one inverse less."""
        rtol = self._check_inverse(inverse, rtol, method)
        error = -self._products.error
        if inverse == "moore_penrose":
            return self._moore_penrose(rtol).apply_to_function_space(error)
        depth = len(self._layers)
        if inverse == "exact":
            pairs, full = self._duals(rtol, method)
            return self._layer_rule(inverse, pairs, self._shares([error] * depth, pairs, full))
        # One layer's inverses at a time: an ensemble's memory stays near that of its weights.
        return self._layer_rule(inverse, (self._dual_pair(i, rtol, method) for i in range(depth)), [error] * depth)

    def _layer_rule(self, inverse: str, pairs: Iterable[Pair], whitened: list[Array]) -> tuple[Array, ...]:
        """E_i⁺ᵀ Y_i X_i⁺ for every layer, where Y_i is what it takes of the whitened gradient."""
        scale = 1.0 / len(self._layers) if inverse == "layerwise" else 1.0
        return tuple(scale * (e @ y @ x.mT) for (e, x), y in zip(pairs, whitened, strict=True))

    def _shares(self, whitened: list[Array], pairs: list[Pair], full: Array | bool) -> list[Array]:
        """Give each piece of the error to the layers that can realise it, in equal parts.

        Which layers can is a matter of the inverses in use: what a cut-off drops from one
        goes to the others. `full` says for which members nothing was dropped.
        """
        xp, depth = self._xp, len(self._layers)

        def at_any_rank(*arrays: Array) -> tuple[Array, ...]:
            given, ahead, behind, left, right = (arrays[k * depth : (k + 1) * depth] for k in range(5))
            of_layers = projectors(list(zip(left, right, strict=True)), Products(ahead, behind, None))
            return tuple(shares(xp, list(given), common_bases(xp, of_layers)))

        arguments = (
            *whitened,
            *self._products.ahead,
            *self._products.behind,
            *(e for e, _ in pairs),
            *(x for _, x in pairs),
        )
        if full is False:
            return list(at_any_rank(*arguments))
        found = tuple(shares_of_full_rank(whitened, pairs, self._products, self._effective_widths()))
        if full is True:
            return list(found)
        batch = _arrays.broadcast_shapes(tuple(y.shape[:-2]) for y in found)
        return list(_arrays.repair(xp, xp.broadcast_to(~full, batch), found, arguments, at_any_rank))

    def _exact_velocity(self) -> Array:
        """Compute R⁻¹ dW S of every natural gradient: the part of the error that layers can realise."""
        return self._realisable(-self._products.error)

    def _realisable(self, error: Array) -> Array:
        """Project a whitened (n_L, ρ) matrix onto the velocities that the network has."""
        xp, spaces, depth = self._xp, self._subspaces(), len(self._layers)
        kept = spaces.left_count + spaces.right_count - depth > 0.5
        rotated = spaces.left.mT @ error @ spaces.right
        return spaces.left @ xp.where(kept, rotated, 0.0) @ spaces.right.mT

    def _projectors(self) -> list[tuple[Array, Array]]:
        """The pairs Q_i, R_i: projectors on range(R⁻¹ W_i^a) and on the row space of W_i^b S."""
        return self._remember("projectors", lambda: projectors(self._duals(None, "auto")[0], self._products))

    def _subspaces(self) -> Subspaces:
        return self._remember("subspaces", lambda: common_bases(self._xp, self._projectors()))

    def _duals(self, rtol: float | Array | None, method: str) -> tuple[list[Pair], Array | bool]:
        """E_i⁺ᵀ and X_i⁺ᵀ of every layer, and which members are known to have the full rank of all shapes."""

        def compute() -> tuple[list[Pair], Array | bool]:
            if rtol is None and method == "auto":
                return duals(self._xp, self._layers, self._task.factors, self._products)
            return [self._dual_pair(i, rtol, method) for i in range(len(self._layers))], False

        return self._remember(("duals", method), compute) if rtol is None else compute()

    def _dual_pair(self, i: int, rtol: float | Array | None, method: str) -> Pair:
        """The duals of one layer by a given cut-off, or through its covariances."""
        ahead, behind, _ = self._products
        sizes = self._effective_widths()
        pair = []
        for factor, along in ((ahead[i], sizes[i + 1 :]), (behind[i], sizes[: i + 1])):
            # Rounding of a product grows with the lengths of all sums behind it. That of a
            # covariance is as large, not its square, and the cut-off is one on roots.
            cutoff = rtol if rtol is not None else (sum(along) * _arrays.eps(self._xp, factor)) ** 0.5
            pair.append(linalg.dual(self._xp, factor, min(along), cutoff, method))
        return pair[0], pair[1]

    def _moore_penrose(self, rtol: float | Array | None) -> moore_penrose.Inverse:
        """F⁺ in the form that suits the network's size."""
        depth = len(self._layers)
        size = self._products.error.shape[-2] * self._products.error.shape[-1]
        if rtol is None and depth > 1 and (depth == 2 or size > moore_penrose.DENSE_SIZE):
            return self._remember("kernel", lambda: moore_penrose.Kernel(self))
        if rtol is None:
            return self._remember("dense", lambda: moore_penrose.Dense(self, None))
        return moore_penrose.Dense(self, rtol)

    # ------------------------------------------------------------------- rank and spectrum

    @_arrays.quiet
    def rank(self) -> Array:
        """Count the directions in which the parameters carry information.

        Returns
        -------
        array, shape (*batch,), floating
            Rank of F, at most n_0 n_L, from the ranks of the products ahead of and behind
            each layer: Σ_i (rank W_i^a − rank W_{i-1}^a) · rank W_i^b. NaN for a member
            that is not finite.

        Notes
        -----
        With all layers of full rank and narrowest width r this is r (n_0 + n_L − r), or
        n_0 n_L without a bottleneck; the rank of Σ stands for n_0.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> task = ng.GaussianTask(np.eye(5), np.eye(5), np.eye(5), 2 * np.eye(5))
        >>> rng = np.random.default_rng(0)
        >>> narrow = rng.standard_normal((2, 5)), rng.standard_normal((5, 2))
        >>> float(ng.deep_linear.fisher(narrow, task).rank())
        16.0
        """
        xp = self._xp
        total, before = None, 0.0
        for q, r in self._projectors():
            left, right = xp.round(xp.linalg.trace(q)), xp.round(xp.linalg.trace(r))
            part = (left - before) * right
            total = part if total is None else total + part
            before = left
        return total

    @_arrays.quiet
    def spectrum(self) -> Array:
        """Compute the eigenvalues of F that can differ from zero, ascending.

        Returns
        -------
        array, shape (*batch, n_0 n_L)
            Eigenvalues of the (n_0 n_L)² matrix CᵀC with F = CCᵀ. All other eigenvalues
            of F are zero; where P < n_0 n_L the first ones here are zeros beyond F's own.

        Raises
        ------
        ValueError
            If the (n_0 n_L)² matrix would not fit in memory.

        Notes
        -----
        Absolute accuracy is that of the largest eigenvalue: those below n_0 n_L · eps
        times it are zero to rounding.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> ng.deep_linear.fisher([2 * one, 3 * one], task).spectrum()
        array([13.])
        """
        xp, (ahead, behind, error) = self._xp, self._products
        n_out, rank = error.shape[-2:]
        shape = (*self.batch_shape, n_out * rank, n_out * rank)
        _arrays.check_fits(
            "the matrix behind the spectrum", shape, xp, error, "use F.rank, or F.matvec with an iterative solver"
        )
        values, _ = linalg.eigh(xp, sum_kernels(xp, ahead, behind))
        missing = n_out * (self._layers[0].shape[-1] - rank)
        zeros = xp.zeros((*values.shape[:-1], missing), dtype=values.dtype, device=_arrays.device(values))
        return xp.concat([zeros, xp.where(values < 0.0, 0.0, values)], axis=-1)

    @_arrays.quiet
    def logdet(self) -> Array:
        """Compute the logarithm of the product of the nonzero eigenvalues of F.

        Returns
        -------
        array, shape (*batch,)
            Sum of the logarithms of the `rank` largest entries of `spectrum`.

        Raises
        ------
        ValueError
            As `spectrum` does.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> one = np.asarray([[1.0]])
        >>> task = ng.GaussianTask(one, one, one, 2 * one)
        >>> float(ng.deep_linear.fisher([0 * one, one], task).logdet())
        0.0
        """
        xp, values = self._xp, self.spectrum()
        order = xp.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=_arrays.device(values))
        counted = (order <= self.rank()[..., None]) | xp.isnan(values)
        return xp.sum(xp.log(xp.where(counted, values, 1.0)), axis=-1)

    # ----------------------------------------------------------------------------- within

    def _goes_by_outputs(self) -> bool:
        """Whether there are fewer outputs than directions of the inputs: the smaller side is what layers multiply."""
        n_out, rank = self._products.error.shape[-2:]
        return int(n_out) <= int(rank)

    def _to_function_space(self, tangent: tuple[Array, ...]) -> Array:
        """Cᵀ: the whitened end-to-end velocity Σ E_iᵀ D_i X_i of a tangent; what layers share is done once."""
        (ahead, behind, _), layers = self._products, self._layers
        whitens = self._task.factors.noise_root_inverse is not None
        if self._goes_by_outputs():
            total = ahead[-1].mT @ tangent[-1] if whitens else tangent[-1]
            for e, d, w in zip(ahead[-2::-1], tangent[-2::-1], layers[-2::-1], strict=True):
                total = total @ w + e.mT @ d
            return linalg.matmul(total, behind[0])
        total = linalg.matmul(tangent[0], behind[0])
        for x, d, w in zip(behind[1:], tangent[1:], layers[1:], strict=True):
            total = w @ total + d @ x
        return ahead[-1].mT @ total if whitens else total

    def _from_function_space(self, h: Array) -> tuple[Array, ...]:
        """C: the tangent E_i H X_iᵀ, by the same steps the other way round."""
        (ahead, behind, _), layers = self._products, self._layers
        whitens, found = self._task.factors.noise_root_inverse is not None, []
        if self._goes_by_outputs():
            moved = linalg.matmul(h, behind[0].mT)
            for e, w in zip(ahead[:-1], layers[:-1], strict=True):
                found.append(e @ moved)
                moved = moved @ w.mT
            return (*found, ahead[-1] @ moved if whitens else moved)
        moved = ahead[-1] @ h if whitens else h
        for x, w in zip(behind[:0:-1], layers[:0:-1], strict=True):
            found.append(moved @ x.mT)
            moved = w.mT @ moved
        return (linalg.matmul(moved, behind[0].mT), *found[::-1])

    def _dense_root(self) -> Array:
        """C as an array, (*batch, P, n_L ρ)."""
        xp, (ahead, behind, _) = self._xp, self._products
        rows = [linalg.kron(xp, x, e) for e, x in zip(ahead, behind, strict=True)]
        batch = self.batch_shape
        return xp.concat([xp.broadcast_to(row, (*batch, *row.shape[-2:])) for row in rows], axis=-2)

    def _split(self, vector: Array) -> tuple[Array, ...]:
        """Undo the stacking of all layers' columns: (*batch, P) to a tuple."""
        parts, start = [], 0
        for layer in self._layers:
            m, n = layer.shape[-2:]
            parts.append(linalg.unvec(self._xp, vector[..., start : start + m * n], m, n))
            start += m * n
        return tuple(parts)

    def _effective_widths(self) -> Shape:
        """Widths with the rank of Σ in place of n_0."""
        return (self._task.input_rank, *widths(self._layers)[1:])

    def _check_inverse(self, inverse: str, rtol: Any, method: str) -> Any:
        """Check options; return the cut-off on singular values, the root of that on eigenvalues."""
        _arrays.check_option("inverse", inverse, INVERSES)
        _arrays.check_option("method", method, linalg.METHODS)
        if rtol is None:
            return None
        rtol = _arrays.check_nonnegative("rtol", rtol, self._xp, self._layers[0], batch=self.batch_shape)
        return rtol**0.5

    def _check_layer(self, name: str, index: Any) -> int:
        depth = len(self._layers)
        if not _arrays.is_integer(index) or not 0 <= index < depth:
            raise ValueError(f"{name} must be a layer from 0 to {depth - 1}, got {index!r}")
        return int(index)

    def _remember(self, key: Any, compute: Callable[[], T]) -> T:
        """Compute once. Tracers are not kept: they must not outlive their trace."""
        if key not in self._memory:
            value = compute()
            if _arrays.is_lazy(self._products.error) or _any_lazy(value):
                return value
            self._memory[key] = value
        result: T = self._memory[key]
        return result


def _any_lazy(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_any_lazy(item) for item in value)
    if isinstance(value, moore_penrose.Inverse):
        return any(_any_lazy(item) for item in vars(value).values())
    return hasattr(value, "dtype") and _arrays.is_lazy(value)
