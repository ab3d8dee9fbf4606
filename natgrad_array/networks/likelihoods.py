"""What the outputs of a network mean: the distribution of a target given them.

Each likelihood knows its loss, the derivative of that, and the Fisher information of one
sample's outputs: as a product with a vector, and as a root R with R Rᵀ equal to it, whose
columns are the output directions that the exact Fisher information is a sum over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.networks import activations


class Likelihood:
    """The distribution of targets given a network's outputs: what the three likelihoods share.

    Attributes
    ----------
    name : str
        The name that a network is given it by.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> likelihood = ng.networks.Categorical()
    >>> logits = np.asarray([[0.0, 0.0], [2.0, 0.0]])
    >>> y = likelihood.sample(logits, 0, draws=(1000,))
    >>> y.shape
    (1000, 2)
    >>> root = likelihood.metric_root(logits)
    >>> (root @ root.mT)[0, ...]
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """

    name: ClassVar[str]

    @_arrays.quiet
    def loss(self, outputs: Array, y: Array, /) -> Array:
        """Compute the mean over samples of the negative log-likelihood, without constants.

        Parameters
        ----------
        outputs : array, shape (*batch, N, n_L)
            What the network gives.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            The targets.

        Returns
        -------
        array, shape (*batch,)
            In nats per sample.

        Raises
        ------
        TypeError, ValueError
            If the targets do not fit the outputs or the likelihood.

        Notes
        -----
        (1/N) Σ_n −log p(y_n | f_n).

        Examples
        --------
        A coin that the model knows nothing of costs log 2.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> loss = ng.networks.Categorical().loss(np.zeros((4, 2)), np.asarray([0, 1, 1, 0]))
        >>> bool(np.isclose(loss, np.log(np.asarray(2.0))))
        True
        """
        xp, outputs, y = self._check(outputs, y)
        return xp.sum(self._losses(xp, outputs, y), axis=-1) / outputs.shape[-2]

    @_arrays.quiet
    def residual(self, outputs: Array, y: Array, /) -> Array:
        """Compute the derivative of each sample's loss with respect to its outputs.

        Parameters
        ----------
        outputs : array, shape (*batch, N, n_L)
            What the network gives.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            The targets.

        Returns
        -------
        array, shape (*batch, N, n_L)
            Not divided by the number of samples.

        Raises
        ------
        TypeError, ValueError
            If the targets do not fit the outputs or the likelihood.

        Notes
        -----
        ∂(−log p(y | f))/∂f: Σ̃⁻¹(f − y) for Gaussian noise, p − y for classes.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.networks.Gaussian().residual(np.asarray([[3.0]]), np.asarray([[5.0]]))
        array([[-2.]])
        >>> ng.networks.Bernoulli().residual(np.asarray([[0.0]]), np.asarray([[0]]))
        array([[0.5]])
        """
        xp, outputs, y = self._check(outputs, y)
        return self._residuals(xp, outputs, y)

    @_arrays.quiet
    def metric(self, outputs: Array, v: Array, /) -> Array:
        """Multiply by the Fisher information of each sample's outputs.

        Parameters
        ----------
        outputs : array, shape (*batch, N, n_L)
            What the network gives.
        v : array, shape (*batch, N, n_L)
            A vector for each sample.

        Returns
        -------
        array, shape (*batch, N, n_L)
            The products.

        Raises
        ------
        TypeError, ValueError
            If `v` does not have the core shape of `outputs`.

        Notes
        -----
        M v with M = ⟨r rᵀ⟩, r the `residual` of targets of the model.

        Examples
        --------
        diag(p) − p pᵀ with p = (½, ½).

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.networks.Categorical().metric(np.asarray([[0.0, 0.0]]), np.asarray([[1.0, 0.0]]))
        array([[ 0.25, -0.25]])
        """
        self._check_outputs(outputs)
        _arrays.check_arrays({"outputs": outputs, "v": v} | self._constants())
        _arrays.check_core("v", v, tuple(outputs.shape[-2:]), "like the outputs")
        _arrays.broadcast_batch({"outputs": tuple(outputs.shape[:-2]), "v": tuple(v.shape[:-2])})
        return self._metric(outputs, v)

    @_arrays.quiet
    def metric_root(self, outputs: Array, /) -> Array:
        """Compute a root R of the Fisher information of each sample's outputs.

        Parameters
        ----------
        outputs : array, shape (*batch, N, n_L)
            What the network gives.

        Returns
        -------
        array, shape (*batch, N, n_L, n_L)
            R with R Rᵀ the Fisher information; its columns are output directions.

        Raises
        ------
        TypeError, ValueError
            If `outputs` are not floating, or have the wrong number of columns.

        Examples
        --------
        For Gaussian noise it is the inverse of a root of the covariance.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> root = ng.networks.Gaussian(np.asarray([[4.0]])).metric_root(np.zeros((2, 1)))
        >>> root @ root.mT
        array([[[0.25]],
        <BLANKLINE>
               [[0.25]]])
        """
        return self._root_columns(self._check_outputs(outputs), outputs, slice(None))

    @_arrays.quiet
    def sample(self, outputs: Array, rng: Any, /, *, draws: Shape = ()) -> Array:
        """Draw targets from the model.

        Parameters
        ----------
        outputs : array, shape (*batch, N, n_L)
            What the network gives.
        rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
            Where randomness comes from. An array is standard normal noise already drawn,
            of shape (*draws, *batch, N, n_L), with a last axis of 2 more for the two
            likelihoods of classes.
        draws : tuple of int
            Axes of independent draws, put in front.

        Returns
        -------
        array, shape (*draws, *batch, N, n_L), or (*draws, *batch, N) for classes
            Targets that `loss` takes.

        Raises
        ------
        TypeError, ValueError
            If `outputs` are not floating, or `rng` is no source of randomness.

        Examples
        --------
        Draws are repeated by their seed, and average to the outputs.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> likelihood, outputs = ng.networks.Gaussian(np.asarray([[4.0]])), np.asarray([[3.0], [7.0]])
        >>> y = likelihood.sample(outputs, 0, draws=(10000,))
        >>> y.shape
        (10000, 2, 1)
        >>> bool(np.all(abs(np.mean(y, axis=0) - outputs) < 5 * (4.0 / 10000) ** 0.5))
        True
        """
        return self._sample(self._check_outputs(outputs), outputs, rng, tuple(draws))

    # ------------------------------------------------------------------------- by each

    def _losses(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        raise NotImplementedError("a likelihood says what its loss is")

    def _residuals(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        raise NotImplementedError("a likelihood says what its residuals are")

    def _metric(self, outputs: Array, v: Array, /) -> Array:
        raise NotImplementedError("a likelihood says what its metric is")

    def _root_columns(self, xp: Namespace, outputs: Array, columns: slice) -> Array:
        """Some of the columns of the root: all of them at once can be too many."""
        raise NotImplementedError("a likelihood says what its metric is")

    def _sample(self, xp: Namespace, outputs: Array, rng: Any, draws: Shape) -> Array:
        raise NotImplementedError("a likelihood says what its targets are")

    def _targets(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        """Check targets; return them floating and of the shape of the outputs."""
        raise NotImplementedError("a likelihood says what its targets are")

    def _check_values(self, name: str, y: Array, width: int) -> Array | None:  # noqa: ARG002
        """Where targets are none; raise ValueError if all members share such, and they are not lazy."""
        return None

    def _constants(self) -> dict[str, Array]:
        """Arrays that the others have to agree with, under their names."""
        return {}

    # -------------------------------------------------------------------------- checks

    def check_width(self, width: int) -> None:
        """Raise ValueError unless the likelihood fits a number of outputs.

        Parameters
        ----------
        width : int
            n_L.

        Returns
        -------
        None

        Raises
        ------
        ValueError
            If it does not.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.networks.Gaussian().check_width(3)
        >>> ng.networks.Gaussian(np.eye(2)).check_width(3)
        Traceback (most recent call last):
            ...
        ValueError: noise_covariance must have shape (*batch, 3, 3) to match the outputs, got (2, 2)
        """

    def _check_outputs(self, outputs: Array) -> Namespace:
        xp = _arrays.check_arrays({"outputs": outputs} | self._constants())
        _arrays.check_matrix("outputs", outputs)
        self.check_width(int(outputs.shape[-1]))
        return xp

    def _check(self, outputs: Array, y: Array) -> tuple[Namespace, Array, Array]:
        self._check_outputs(outputs)
        xp = _arrays.check_arrays({"the outputs": outputs, "y": y} | self._constants(), integers=True)
        return xp, outputs, self._targets(xp, outputs, y)


def _floating_targets(xp: Namespace, outputs: Array, y: Array) -> Array:
    """Targets that have the shape of the outputs."""
    _arrays.check_core("y", y, tuple(outputs.shape[-2:]), "like the outputs (N, n_L)")
    _arrays.broadcast_batch({"the network's outputs": tuple(outputs.shape[:-2]), "y": tuple(y.shape[:-2])})
    _, y = _arrays.promote(xp, outputs, y)
    return y


def _reject_targets(name: str, y: Array, bad: Array, expected: str) -> None:
    """Raise ValueError for eager targets that are none, with the first of them."""
    if _arrays.eager_any(_arrays.namespace(y), bad):
        flags = _arrays.to_numpy(bad)
        place = np.unravel_index(np.argmax(flags), flags.shape)
        where = ", ".join(str(int(i)) for i in place)
        raise ValueError(f"{name} must hold {expected}, got {_arrays.to_numpy(y)[place]} at {name}[{where}]")


def _exponential(xp: Namespace, outputs: Array, rng: Any, draws: Shape) -> Array:
    """Independent Exp(1) variables like the outputs.

    Half the sum of two squared normal variables is one, exactly, and normal variables are
    what every source of randomness gives.
    """
    normal = _arrays.standard_normal(rng, (*draws, *outputs.shape, 2), xp, outputs)
    return 0.5 * xp.sum(normal**2, axis=-1)


@dataclass(frozen=True, eq=False)
class Gaussian(Likelihood):
    """Targets around the outputs, with Gaussian noise: regression.

    Parameters
    ----------
    noise_covariance : array, shape (*batch, n_L, n_L), optional
        Σ̃, the covariance of a target given the outputs; the identity when None. Batch
        axes give members noises of their own. A value that is not symmetric and positive
        definite raises without batch axes, and turns its member to NaN with them.

    Raises
    ------
    TypeError
        If it is not a floating array.
    ValueError
        If it is not square, or not a covariance (not asked of lazy arrays).

    Notes
    -----
    The loss is ½ (y − f)ᵀ Σ̃⁻¹ (y − f), the metric Σ̃⁻¹.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> likelihood = ng.networks.Gaussian(np.asarray([[4.0]]))
    >>> float(likelihood.loss(np.asarray([[1.0]]), np.asarray([[3.0]])))
    0.5
    """

    name: ClassVar[str] = "gaussian"
    noise_covariance: Array | None = None
    _root: Array | None = field(init=False, repr=False, default=None)
    _whitener: Array | None = field(init=False, repr=False, default=None)

    @_arrays.quiet
    def __post_init__(self) -> None:
        if self.noise_covariance is None:
            return
        xp = _arrays.check_arrays({"noise_covariance": self.noise_covariance})
        _arrays.check_matrix("noise_covariance", self.noise_covariance, square=True)
        # A copy: what the caller does to the array later must not reach the likelihood.
        noise = self.noise_covariance + 0.0
        largest = xp.max(xp.abs(noise), axis=(-2, -1))
        skew = xp.max(xp.abs(noise - noise.mT), axis=(-2, -1)) > _arrays.eps(xp, noise) ** 0.5 * largest
        values, basis, kept = linalg.eigh_kept(xp, linalg.symmetric_part(noise + 0.0), None)
        bad = skew | ~xp.all(kept & (values > 0.0), axis=-1)
        if noise.ndim == 2 and _arrays.eager_any(xp, bad):
            raise ValueError("noise_covariance must be finite, symmetric and positive definite")
        deviation = xp.sqrt(xp.where(bad[..., None], xp.nan, values))[..., None, :]
        object.__setattr__(self, "noise_covariance", noise)
        object.__setattr__(self, "_root", basis * deviation)
        object.__setattr__(self, "_whitener", (basis / deviation).mT)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gaussian) and self.noise_covariance is other.noise_covariance

    def __hash__(self) -> int:
        return hash((Gaussian, id(self.noise_covariance)))

    def check_width(self, width: int) -> None:
        """Raise ValueError unless the noise covariance fits a number of outputs.

        Parameters
        ----------
        width : int
            n_L.

        Returns
        -------
        None

        Raises
        ------
        ValueError
            If it does not.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> ng.networks.Gaussian(np.eye(2)).check_width(3)
        Traceback (most recent call last):
            ...
        ValueError: noise_covariance must have shape (*batch, 3, 3) to match the outputs, got (2, 2)
        """
        if self.noise_covariance is not None:
            _arrays.check_core("noise_covariance", self.noise_covariance, (width, width), "to match the outputs")

    def _constants(self) -> dict[str, Array]:
        return {} if self.noise_covariance is None else {"noise_covariance": self.noise_covariance}

    def _targets(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        return _floating_targets(xp, outputs, y)

    def _whiten(self, v: Array) -> Array:
        return v if self._whitener is None else linalg.matmul(v, self._whitener.mT)

    def _losses(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        whitened = self._whiten(y - outputs)
        return 0.5 * xp.sum(whitened * whitened, axis=-1)

    def _residuals(self, xp: Namespace, outputs: Array, y: Array) -> Array:  # noqa: ARG002
        return self._metric(outputs, outputs - y)

    def _metric(self, _: Array, v: Array, /) -> Array:
        return v if self._whitener is None else linalg.matmul(self._whiten(v), self._whitener)

    def _root_columns(self, xp: Namespace, outputs: Array, columns: slice) -> Array:
        root = _arrays.eye(xp, outputs.shape[-1], outputs) if self._whitener is None else self._whitener.mT
        return xp.zeros_like(outputs)[..., None] + root[..., None, :, columns]

    def _sample(self, xp: Namespace, outputs: Array, rng: Any, draws: Shape) -> Array:
        if self._root is None:
            return outputs + _arrays.standard_normal(rng, (*draws, *outputs.shape), xp, outputs)
        batch = _arrays.broadcast_batch(
            {"outputs": tuple(outputs.shape[:-2]), "noise_covariance": tuple(self._root.shape[:-2])}
        )
        noise = _arrays.standard_normal(rng, (*draws, *batch, *outputs.shape[-2:]), xp, outputs)
        return outputs + linalg.matmul(noise, self._root.mT)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent binary targets, 0 or 1, with the outputs as logits.

    Attributes
    ----------
    name : str
        "bernoulli".

    Notes
    -----
    With p = 1 / (1 + exp(−f)) the loss is −y log p − (1 − y) log(1 − p), summed over
    outputs, and the metric p (1 − p). Targets other than 0 and 1 raise without batch axes,
    and turn their member to NaN with them.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.networks.Bernoulli().residual(np.asarray([[0.0]]), np.asarray([[1]]))
    array([[-0.5]])
    """

    name: ClassVar[str] = "bernoulli"

    def _targets(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        y = _floating_targets(xp, outputs, y)
        return xp.where(self._check_values("y", y, outputs.shape[-1]), xp.nan, y)

    def _check_values(self, name: str, y: Array, width: int) -> Array:  # noqa: ARG002
        bad = (y != 0) & (y != 1)
        if y.ndim == 2:
            _reject_targets(name, y, bad, "nothing but 0 and 1 for the Bernoulli likelihood")
        return bad

    def _losses(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        # log(1 + exp(−f)) for a target of 1 and log(1 + exp(f)) for one of 0: nothing cancels.
        return xp.sum(activations.softplus(xp, (1.0 - 2.0 * y) * outputs), axis=-1)

    def _residuals(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        sign = 1.0 - 2.0 * y
        return sign * activations.sigmoid(xp, sign * outputs)

    def _metric(self, outputs: Array, v: Array, /) -> Array:
        xp = _arrays.namespace(outputs)
        return activations.sigmoid_slope(xp, outputs) * v

    def _root_columns(self, xp: Namespace, outputs: Array, columns: slice) -> Array:
        scale = xp.sqrt(activations.sigmoid_slope(xp, outputs))
        return scale[..., None] * _arrays.eye(xp, outputs.shape[-1], outputs)[:, columns]

    def _sample(self, xp: Namespace, outputs: Array, rng: Any, draws: Shape) -> Array:
        # An Exp(1) variable is above −log p with probability p.
        above = _exponential(xp, outputs, rng, draws) > activations.softplus(xp, -outputs)
        return xp.astype(above, outputs.dtype)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One class of n_L, with the outputs as logits.

    Attributes
    ----------
    name : str
        "categorical".

    Notes
    -----
    With p the softmax of f the loss is −log p_y and the metric diag(p) − p pᵀ, whose root
    diag(√p) − p √pᵀ has n_L columns and rank n_L − 1. Targets are integers from 0 to
    n_L − 1; others raise without batch axes, and turn their member to NaN with them.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.networks.Categorical().residual(np.asarray([[0.0, 0.0]]), np.asarray([1]))
    array([[ 0.5, -0.5]])
    """

    name: ClassVar[str] = "categorical"

    def _targets(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        if not xp.isdtype(y.dtype, "integral"):
            raise TypeError(f"y must have an integer dtype (classes) for the categorical likelihood, got {y.dtype}")
        samples, classes = outputs.shape[-2:]
        if y.ndim < 1 or y.shape[-1] != samples:
            raise ValueError(f"y must have shape (*batch, {samples}), one class a sample, got {tuple(y.shape)}")
        _arrays.broadcast_batch({"the network's outputs": tuple(outputs.shape[:-2]), "y": tuple(y.shape[:-1])})
        bad = self._check_values("y", y, classes)
        hits = y[..., None] == xp.arange(classes, dtype=y.dtype, device=_arrays.device(y))
        return xp.where(bad[..., None], xp.nan, xp.astype(hits, outputs.dtype))

    def _check_values(self, name: str, y: Array, width: int) -> Array:
        bad = (y < 0) | (y >= width)
        if y.ndim == 1:
            _reject_targets(name, y, bad, f"classes from 0 to {width - 1} for the categorical likelihood")
        return bad

    def _losses(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        # From the class's own logit, so that a loss near 0 keeps its digits.
        gaps = outputs - xp.sum(y * outputs, axis=-1, keepdims=True)
        largest = xp.max(gaps, axis=-1, keepdims=True)
        others = xp.sum(xp.where(y > 0.5, 0.0, xp.exp(gaps - largest)), axis=-1)
        largest = largest[..., 0]
        return xp.where(largest > 0.0, largest + xp.log(others + xp.exp(-largest)), xp.log1p(others))

    def _residuals(self, xp: Namespace, outputs: Array, y: Array) -> Array:
        p = _softmax(xp, outputs)
        # p − 1 as minus the sum of the others.
        rest = xp.sum((1.0 - y) * p, axis=-1, keepdims=True)
        return xp.where(y > 0.5, -rest, p + 0.0 * y)

    def _metric(self, outputs: Array, v: Array, /) -> Array:
        xp = _arrays.namespace(outputs)
        p = _softmax(xp, outputs)
        return p * (v - xp.sum(p * v, axis=-1, keepdims=True))

    def _root_columns(self, xp: Namespace, outputs: Array, columns: slice) -> Array:
        p = _softmax(xp, outputs)
        root = xp.sqrt(p)
        eye = _arrays.eye(xp, outputs.shape[-1], outputs)[:, columns]
        return root[..., None] * eye - p[..., :, None] * root[..., None, columns]

    def _sample(self, xp: Namespace, outputs: Array, rng: Any, draws: Shape) -> Array:
        # The first of exponential clocks with rates exp(f) to ring, in logarithms.
        times = _exponential(xp, outputs, rng, draws)
        tiny = float(xp.finfo(outputs.dtype).smallest_normal)
        return xp.argmax(outputs - xp.log(xp.where(times > tiny, times, tiny)), axis=-1)


def _softmax(xp: Namespace, f: Array) -> Array:
    powers = xp.exp(f - xp.max(f, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


LIKELIHOODS: dict[str, type[Likelihood]] = {cls.name: cls for cls in (Gaussian, Bernoulli, Categorical)}
"""The likelihoods that a network can be given by name."""
