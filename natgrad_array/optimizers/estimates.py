"""Where the two moments of every layer come from: the first of an optimizer's three choices.

An estimate looks at a batch once and leaves `Statistics`: what came into every layer, and
errors that came back to it. All moments that inverses work on are sums over these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.kronecker import Kronecker
from natgrad_array.networks import passes
from natgrad_array.networks.network import Network
from natgrad_array.networks.passes import Trace

CONVOLUTIONS = ("expand", "reduce")


class Statistics(NamedTuple):
    """What an estimate has seen of a batch.

    Attributes
    ----------
    rows : tuple of arrays, shapes (*batch, N, T_i, n_{i-1} + 1)
        Homogeneous inputs of every layer.
    deltas : tuple of arrays, shapes (K, *batch, N, T_i, n_i), or None
        K errors of every layer, scaled so that the Fisher information is the sum over them
        of the mean over samples; None where errors play no part.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> rows, deltas = np.asarray([[[1.0, 1.0]], [[3.0, 1.0]]]), np.asarray([[[[1.0]], [[-1.0]]]])
    >>> seen = ng.optimizers.Statistics((rows,), (deltas,))
    >>> [block] = ng.optimizers.Empirical().factors(seen)
    >>> block.forward, block.backward
    (array([[5., 2.],
           [2., 1.]]), array([[1.]]))
    """

    rows: tuple[Any, ...]
    deltas: tuple[Any, ...] | None

    @classmethod
    def of(
        cls,
        activations: Sequence[Array],
        errors: Sequence[Array] | None = None,
        /,
        *,
        bias: bool = True,
        positions: bool = False,
    ) -> Statistics:
        """Take what came into the dense layers of any network, and what came back to them.

        Parameters
        ----------
        activations : sequence of arrays, shapes (*batch, N, n_{i-1})
            Inputs of every layer, first layer first; (*batch, N, T_i, n_{i-1}) with positions.
        errors : sequence of arrays, shapes (*batch, N, n_i), or (*batch, N, T_i, n_i), optional
            Derivatives of each sample's own loss (not of the mean over samples) with respect
            to the layer's pre-activations; of targets drawn from the model for its Fisher
            information, of the data's targets for the empirical one.
        bias : bool
            Whether the layers have a bias, the last column of their parameters.
        positions : bool
            Whether the arrays have an axis of positions, that a layer works on one by one:
            the patches of a convolution, the tokens of a sequence.

        Returns
        -------
        Statistics
            For `Optimizer.update`.

        Raises
        ------
        TypeError, ValueError
            If these are not sequences of floating arrays, or their shapes do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> seen = ng.optimizers.Statistics.of([np.ones((5, 3))], [np.ones((5, 2))])
        >>> [rows.shape for rows in seen.rows], [delta.shape for delta in seen.deltas]
        ([(5, 1, 4)], [(1, 5, 1, 2)])
        """
        inputs = _arrays.check_sequence("activations", activations, "a tuple or list with one array for each layer")
        named = {f"activations[{i}]": array for i, array in enumerate(inputs)}
        back: tuple[Array, ...] = ()
        if errors is not None:
            back = _arrays.check_sequence("errors", errors, "a tuple or list with one array for each layer")
            if len(back) != len(inputs):
                raise ValueError(f"errors must have one array for each of {len(inputs)} layers, got {len(back)}")
            named |= {f"errors[{i}]": array for i, array in enumerate(back)}
        xp = _arrays.check_arrays(named)
        core = 3 if positions else 2
        for name, array in named.items():
            if array.ndim < core:
                expected = "(*batch, N, T, n)" if positions else "(*batch, N, n)"
                raise ValueError(f"{name} must have shape {expected}, got {tuple(array.shape)}")
            if array.shape[-core] != inputs[0].shape[-core] or array.shape[-core] == 0:
                raise ValueError(
                    f"{name} must have a row for each of the samples of activations[0] ({inputs[0].shape[-core]}, "
                    f"at least 1), got shape {tuple(array.shape)}"
                )
        _arrays.broadcast_batch({name: tuple(array.shape[: array.ndim - core]) for name, array in named.items()})
        if not positions:
            inputs, back = (tuple(array[..., None, :] for array in arrays) for arrays in (inputs, back))
        for i, (a, delta) in enumerate(zip(inputs, back, strict=False)):
            if a.shape[-2] != delta.shape[-2]:
                raise ValueError(
                    f"errors[{i}] must have the positions of activations[{i}], got {delta.shape[-2]} and {a.shape[-2]}"
                )
        rows = tuple(xp.concat([a, xp.ones_like(a[..., :1])], axis=-1) if bias else a for a in inputs)
        return cls(rows, None if errors is None else tuple(delta[None, ...] for delta in back))


@dataclass(frozen=True)
class Estimate:
    """What all estimates share.

    Parameters
    ----------
    average : float
        How much of the old moments is kept at most, in [0, 1): the weight is
        min(1 − 1/k, average) in step k. 0 takes the batch alone.
    share : float
        The part of the batch, from its start, that is looked at, in (0, 1].
    convolution : {"expand", "reduce"}
        How the positions of a convolution enter: as if they were samples (Grosse and
        Martens 2016), or inputs averaged and errors summed first (Eschenhagen et al. 2023).

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    An estimate of one's own says in `observe` what goes back to the layers; the rest is inherited.
    For `DataParallel` one that draws needs `noise` too.

    Examples
    --------
    Random signs s in place of targets of the model: as ⟨s sᵀ⟩ = 1, errors R s with R Rᵀ the Fisher
    information of the outputs are as good, and with one output exact.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> class RandomSigns(ng.optimizers.Estimate):
    ...     def observe(self, net, params, trace, y, rng):
    ...         signs = np.sign(rng.standard_normal((1, *trace.output.shape)))
    ...         root = net.likelihood.metric_root(trace.output)
    ...         errors = (root @ signs[..., None])[..., 0]
    ...         return ng.optimizers.Statistics(trace.rows, net.backward(params, trace, errors))
    >>> net, x, y = ng.networks.MLP((1, 1)), np.asarray([[1.0], [3.0]]), np.asarray([[3.0], [7.0]])
    >>> params = (np.asarray([[0.0, 0.0]]),)
    >>> opt = ng.optimizers.Optimizer(RandomSigns(), ng.optimizers.MoorePenrose())
    >>> params, state, info = opt.step(net, params, opt.init(net, params), x, y, np.random.default_rng(0))
    >>> params
    (array([[2., 1.]]),)
    """

    average: float = 0.0
    share: float = 1.0
    convolution: str = "expand"

    has_errors: ClassVar[bool] = True
    """Whether errors come back to the layers at all."""

    def __post_init__(self) -> None:
        _arrays.check_within("average", self.average, *_arrays.FRACTION)
        _arrays.check_within("share", self.share, *_arrays.SHARE)
        _arrays.check_option("convolution", self.convolution, CONVOLUTIONS)

    def observe(self, net: Network, params: tuple[Array, ...], trace: Trace, y: Array, rng: Any) -> Statistics:
        """Look at a batch.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters.
        trace : Trace
            Their forward pass.
        y : array
            The batch's targets, which only an empirical estimate looks at.
        rng : object
            Where randomness comes from, for an estimate that draws.

        Returns
        -------
        Statistics
            Of the first part of the batch.

        Raises
        ------
        TypeError, ValueError
            If an estimate that draws is given no source of randomness, or an empirical one targets
            that do not fit the outputs.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net, params = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),)
        >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[4.0], [7.0]])
        >>> seen = ng.optimizers.Empirical().observe(net, params, net.forward(params, x), y, None)
        >>> seen.deltas
        (array([[[[-2.]],
        <BLANKLINE>
                [[-1.]]]]),)
        """
        samples = int(trace.output.shape[-2])
        part = self._part(samples)
        trace = trace if part == samples else _first(net, trace, part)
        errors = self._errors(net, trace, y, part, rng)
        if errors is None:
            return Statistics(trace.rows, None)
        return Statistics(trace.rows, passes.backward(net.layers, params, trace, errors))

    def _part(self, samples: int) -> int:
        """How many samples are looked at."""
        return max(1, math.ceil(self.share * samples))

    def _errors(self, net: Network, trace: Trace, y: Array, part: int, rng: Any) -> Array | None:
        """Derivatives (K, *batch, N, n_L) at the outputs."""
        raise NotImplementedError("an estimate says which errors it sends back")

    def noise(self, net: Network, batch: Shape, samples: int, rng: Any, like: Array) -> Array | None:
        """Draw what `observe` would: to be handed to it in place of the source of randomness.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        batch : tuple of int
            The ensemble's shape.
        samples : int
            N.
        rng : object
            Where randomness comes from, for an estimate that draws.
        like : array
            Gives the library, dtype and device.

        Returns
        -------
        array, shape (K, *batch, N', n_L), or (K, *batch, N', n_L, 2), or None
            N(0, 1) variables for the N' samples that are looked at, two for each target that is
            not Gaussian; None where nothing is drawn.

        Raises
        ------
        TypeError, ValueError
            If an estimate that draws is given no source of randomness.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((3, 2))
        >>> ng.optimizers.ModelSampled(share=0.5, n_samples=4).noise(net, (7,), 10, 0, np.empty(0)).shape
        (4, 7, 5, 2)
        """
        return None

    def factors(self, statistics: Statistics) -> tuple[Kronecker, ...]:
        """Compute the two moments of every layer.

        Parameters
        ----------
        statistics : Statistics
            What `observe` saw.

        Returns
        -------
        tuple of Kronecker
            A = ⟨ā āᵀ⟩ and G = Σ ⟨δ δᵀ⟩.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> a, delta = np.asarray([[1.0], [3.0]]), np.asarray([[1.0], [-2.0]])
        >>> seen = ng.optimizers.Statistics.of([a], [delta], bias=False)
        >>> ng.optimizers.Empirical().factors(seen)
        (Kronecker(forward=array([[5.]]), backward=array([[2.5]])),)
        """
        deltas = (None,) * len(statistics.rows) if statistics.deltas is None else statistics.deltas
        return tuple(self._pair(rows, errors) for rows, errors in zip(statistics.rows, deltas, strict=True))

    def _pair(self, rows: Array, errors: Array | None) -> Kronecker:
        forward, backward = self.samples(rows, errors)
        return Kronecker(_gram(*forward), None if backward is None else _gram(*backward))

    def samples(self, rows: Array, errors: Array | None) -> tuple[tuple[Array, int], tuple[Array, int] | None]:
        """Give what the two moments of a layer are sums over.

        Parameters
        ----------
        rows : array, shape (*batch, N, T, n + 1)
            Homogeneous inputs.
        errors : array, shape (K, *batch, N, T, m), or None
            Errors.

        Returns
        -------
        forward, backward : pairs of an array and an int, or None
            Rows, of shapes (*batch, N T, n + 1) and (*batch, K N T, m), and what the sum of
            their outer products is divided by.

        Examples
        --------
        Five samples of four positions, and two errors of each.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> rows, errors = np.ones((5, 4, 3)), np.ones((2, 5, 4, 1))
        >>> (a, n), (delta, m) = ng.optimizers.ExactDirections().samples(rows, errors)
        >>> (a.shape, n), (delta.shape, m)
        (((20, 3), 5), ((40, 1), 20))
        """
        rows, errors = self.as_samples(rows, errors)
        xp, (*batch, count, positions, n) = _arrays.namespace(rows), rows.shape
        forward = xp.reshape(rows, (*batch, count * positions, n)), count
        if errors is None:
            return forward, None
        # The error directions become samples too, of which N make a mean.
        stacked = xp.moveaxis(errors, 0, -4) if errors.shape[0] > 1 else errors[0, ..., None, :, :, :]
        shape = (*stacked.shape[:-4], math.prod(stacked.shape[-4:-1]), stacked.shape[-1])
        return forward, (xp.reshape(stacked, shape), count * positions)

    def as_samples(self, rows: Array, errors: Array | None) -> tuple[Array, Array | None]:
        """Reduce the positions of a convolution to one, if that is how they enter.

        Parameters
        ----------
        rows : array, shape (*batch, N, T, n + 1)
            Homogeneous inputs.
        errors : array, shape (K, *batch, N, T, m), or None
            Errors.

        Returns
        -------
        rows, errors : arrays
            With T = 1 for "reduce", as they were for "expand".

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> rows, errors = np.asarray([[[1.0, 1.0], [3.0, 1.0]]]), np.asarray([[[[1.0], [2.0]]]])
        >>> ng.optimizers.Empirical(convolution="reduce").as_samples(rows, errors)
        (array([[[2., 1.]]]), array([[[[3.]]]]))
        """
        if self.convolution == "expand" or rows.shape[-2] == 1:
            return rows, errors
        xp = _arrays.namespace(rows)
        mean = xp.mean(rows, axis=-2, keepdims=True)
        return mean, None if errors is None else xp.sum(errors, axis=-2, keepdims=True)


@dataclass(frozen=True)
class ModelSampled(Estimate):
    """Errors of targets drawn from the model: an unbiased estimate of the Fisher information.

    Parameters
    ----------
    average : float
        How much of the old moments is kept at most, in [0, 1).
    share : float
        The part of the batch, from its start, that is looked at, in (0, 1].
    convolution : {"expand", "reduce"}
        How the positions of a convolution enter.
    n_samples : int
        How many targets are drawn for each input.

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    Of Martens and Grosse (2015), and with one draw of Bernacchia, Lengyel and Hennequin
    (2018).

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params, x = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),), np.asarray([[1.0], [3.0]])
    >>> estimate = ng.optimizers.ModelSampled(n_samples=1000)
    >>> [block] = estimate.factors(estimate.observe(net, params, net.forward(params, x), x, 0))
    >>> bool(abs(block.backward[0, 0] - 1.0) < 5 * (2 / 2000) ** 0.5)
    True
    """

    n_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _arrays.is_integer(self.n_samples) or self.n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {self.n_samples!r}")

    def noise(self, net: Network, batch: Shape, samples: int, rng: Any, like: Array) -> Array:
        _check_source(rng)
        shape: Shape = (self.n_samples, *batch, self._part(samples), net.n_outputs)
        shape = shape if net.likelihood.name == "gaussian" else (*shape, 2)
        return _arrays.standard_normal(rng, shape, _arrays.namespace(like), like)

    def _errors(self, net: Network, trace: Trace, y: Array, part: int, rng: Any) -> Array:
        _check_source(rng)
        drawn = net.likelihood.sample(trace.output, rng, draws=(self.n_samples,))
        return net.likelihood.residual(trace.output, drawn) * self.n_samples**-0.5


@dataclass(frozen=True)
class ExactDirections(Estimate):
    """Every output direction, no sampling: n_L backward passes, and the exact moments.

    Parameters
    ----------
    average : float
        How much of the old moments is kept at most, in [0, 1).
    share : float
        The part of the batch, from its start, that is looked at, in (0, 1].
    convolution : {"expand", "reduce"}
        How the positions of a convolution enter.

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    G = ⟨Σ_k δ_k δ_kᵀ⟩ with δ_k what the layer gets of column k of the root R, R Rᵀ the Fisher
    information of a sample's outputs: the average over the model's noise in Eqs 38–39 of
    Bernacchia, Lengyel and Hennequin (2018), supplement, in closed form.

    Examples
    --------
    The Fisher information p (1 − p) of one binary output with p = ½.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params, x = ng.networks.MLP((1, 1), likelihood="bernoulli"), (np.zeros((1, 2)),), np.ones((3, 1))
    >>> estimate = ng.optimizers.ExactDirections()
    >>> [block] = estimate.factors(estimate.observe(net, params, net.forward(params, x), x, None))
    >>> block.backward
    array([[0.25]])
    """

    def _errors(self, net: Network, trace: Trace, y: Array, part: int, rng: Any) -> Array:
        root = net.likelihood.metric_root(trace.output)
        return _arrays.namespace(root).moveaxis(root, -1, 0)


@dataclass(frozen=True)
class Empirical(Estimate):
    """The data's own errors: the empirical Fisher information, which is another matrix.

    Parameters
    ----------
    average : float
        How much of the old moments is kept at most, in [0, 1).
    share : float
        The part of the batch, from its start, that is looked at, in (0, 1].
    convolution : {"expand", "reduce"}
        How the positions of a convolution enter.

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    G = ⟨δ δᵀ⟩ over the residuals. It is the Fisher information only where the model is true: the
    theory needs the average over the model, see `empirical_fisher`.

    Examples
    --------
    Residuals of 2 and 1, where the Fisher information of the output is 1.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 0.0]]),)
    >>> x, y = np.asarray([[1.0], [3.0]]), np.asarray([[4.0], [7.0]])
    >>> estimate = ng.optimizers.Empirical()
    >>> [block] = estimate.factors(estimate.observe(net, params, net.forward(params, x), y, None))
    >>> block.backward
    array([[2.5]])
    """

    def _errors(self, net: Network, trace: Trace, y: Array, part: int, rng: Any) -> Array:
        samples = y.shape[-1] if net.likelihood.name == "categorical" else y.shape[-2]
        if part != samples:
            y = y[..., :part] if net.likelihood.name == "categorical" else y[..., :part, :]
        return net.likelihood.residual(trace.output, y)[None, ...]


@dataclass(frozen=True)
class InputsOnly(Estimate):
    """The identity in place of the moment of errors, as in FOOF (Benzing 2022).

    Parameters
    ----------
    average : float
        How much of the old moments is kept at most, in [0, 1).
    share : float
        The part of the batch, from its start, that is looked at, in (0, 1].
    convolution : {"expand", "reduce"}
        How the positions of a convolution enter.

    Raises
    ------
    ValueError
        If one of them is out of range.

    Notes
    -----
    F ≈ A ⊗ 1 with A = ⟨ā āᵀ⟩.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> seen = ng.optimizers.Statistics.of([np.asarray([[1.0], [3.0]])], bias=False)
    >>> ng.optimizers.InputsOnly().factors(seen)
    (Kronecker(forward=array([[5.]]), backward=None),)
    """

    has_errors: ClassVar[bool] = False

    def _errors(self, net: Network, trace: Trace, y: Array, part: int, rng: Any) -> None:
        return None


def _check_source(rng: Any) -> None:
    if rng is None:
        raise TypeError("rng must be a source of randomness for an estimate that samples the model, got None")


def _gram(flat: Array, count: int) -> Array:
    return _arrays.gram(_arrays.namespace(flat), flat, count)


def _first(net: Network, trace: Trace, part: int) -> Trace:
    """The trace of the first samples of a batch."""
    slopes = []
    for slope, layer in zip(trace.slopes, net.layers, strict=False):
        after = (slice(None),) * len(layer.output_shape)
        slopes.append(slope[(..., slice(part), *after)])
    rows = tuple(array[..., :part, :, :] for array in trace.rows)
    return Trace(rows, tuple(slopes), trace.output[..., :part, :])


def weighted(old: Any, new: Any, weight: Array) -> Any:
    """`weight` of the old moments and the rest of the new ones, in nested tuples."""
    if isinstance(old, tuple):
        parts = [weighted(a, b, weight) for a, b in zip(old, new, strict=True)]
        return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)
    if old is None:
        return None
    return weight * old + (1.0 - weight) * new
