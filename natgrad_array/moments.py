"""Second moments and covariances of samples, whole or streamed.

Samples lie on axis -2 and features on axis -1; the axes before them are an ensemble.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape

SHRINKAGES = ("ledoit_wolf", "oas")

# With fewer samples than this the mean of centred noise is not small beside its spread.
MANY_SAMPLES = 64

# The sum of no more than so many is good to a few units of its last digit.
FEW_SAMPLES = 512

# A copy of samples that take no more than this stays in a cache: it is made sooner than found out to be needless.
SMALL_BYTES = 4 * _arrays.PIECE_BYTES


# ------------------------------------------------------------------------------ the door


@_arrays.quiet
def second_moment(x: Array, y: Array | None = None, /, *, weights: Array | None = None) -> Array:
    r"""Mean of x yᵀ over samples, about zero: nothing is centred.

    Parameters
    ----------
    x : array, shape (*batch, n, p)
        n samples of p features. Integers are promoted.
    y : array, shape (*batch, n, q), optional
        The same samples of other features. Default: `x`.
    weights : array, shape (*batch, n), optional
        Nonnegative weights of the samples; only their ratios count. Default: all equal.

    Returns
    -------
    array, shape (*batch, p, q)
        The second moments, in units of x times units of y, batch axes broadcast; exactly
        symmetric without `y`. A member with a NaN or an Inf touches no other; one whose
        weights are negative, not finite or sum to 0 is NaN.

    Raises
    ------
    TypeError
        If an argument is not an array of dtype float32, float64 or an integer, or if
        libraries or floating dtypes are mixed.
    ValueError
        If shapes do not fit, there are no samples, or `weights` without batch axes hold
        a negative or non-finite entry or sum to 0 (not asked of lazy arrays, where the
        result is NaN).

    See Also
    --------
    covariance : the second moment about the mean.
    Moments : the same from samples that come in pieces.

    Notes
    -----
    With :math:`w_k` the weights, it is :math:`\sum_k w_k x_k y_k^T / \sum_k w_k`. Moments of
    this kind are the two factors :math:`\langle x x^T \rangle` and :math:`\langle e e^T
    \rangle` that the natural gradient of a layer inverts: Bernacchia, Lengyel and Hennequin
    (2018), Eqs 14–15 of the main text and 38–39 of the supplement. To check weights takes
    one scalar brought to the host, if they have no batch axes.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> x = np.asarray([[1.0, 0.0], [1.0, 2.0]])
    >>> ng.second_moment(x)
    array([[1., 1.],
           [1., 2.]])
    >>> ng.second_moment(x, np.asarray([[4.0], [8.0]]), weights=np.asarray([3.0, 1.0]))
    array([[5.],
           [4.]])
    """
    xp = _arrays.check_arrays({"x": x, "y": y, "weights": weights}, integers=True, optional=("y", "weights"))
    check_samples(x, y)
    n = x.shape[-2]
    batches = {"x": tuple(x.shape[:-2])}
    if y is not None:
        batches["y"] = tuple(y.shape[:-2])
    if weights is not None:
        _arrays.check_core("weights", weights, (n,), "to match the samples of x")
        batches["weights"] = tuple(weights.shape[:-1])
    _arrays.broadcast_batch(batches)
    x, y, weights = _arrays.promote(xp, x, y, weights)
    fractions = None if weights is None else _normalise(xp, weights)[0]
    if y is None:
        if fractions is not None:
            return _arrays.gram(xp, x * xp.sqrt(fractions)[..., None])
        return _arrays.gram(xp, x, n)
    if fractions is None:
        return xp.matrix_transpose(x) @ y / n
    if x.shape[-1] <= y.shape[-1]:
        return xp.matrix_transpose(x * fractions[..., None]) @ y
    return xp.matrix_transpose(x) @ (y * fractions[..., None])


@_arrays.quiet
def covariance(
    x: Array,
    /,
    *,
    weights: Array | None = None,
    correction: float = 0,
    assume_centered: bool = False,
    shrinkage: float | str | None = None,
) -> Array:
    r"""Covariance matrices of samples, shrunk towards a multiple of the identity if asked.

    Parameters
    ----------
    x : array, shape (*batch, n, p)
        n samples of p features. Integers are promoted.
    weights : array, shape (*batch, n), optional
        Nonnegative weights of the samples, as `aweights` of `numpy.cov`. Default: all equal.
    correction : float
        The divisor is :math:`\sum w - \mathrm{correction} \sum w^2 / \sum w`, which is
        n − correction for equal weights: 0 for the mean, 1 for the unbiased estimate.
    assume_centered : bool
        The mean is known to be zero and is not subtracted.
    shrinkage : float in [0, 1], "ledoit_wolf", "oas" or None
        How far to go from the sample covariance S, at 0 or None, to tr(S)/p · I, at 1. The
        two names estimate the best distance for each member; they need equal weights and
        no correction.

    Returns
    -------
    array, shape (*batch, p, p)
        The covariances, in units of x squared, batch axes broadcast, exactly symmetric. A
        member with a NaN or an Inf touches no other; one whose divisor is not positive
        (a single sample with correction 1), or whose weights are negative, not finite or
        sum to 0, is NaN.

    Raises
    ------
    TypeError
        If an argument is not an array of dtype float32, float64 or an integer, if
        libraries or floating dtypes are mixed, or if an option is of another type.
    ValueError
        If shapes do not fit, there are no samples, an option is out of its range, a named
        shrinkage comes with weights or a correction, or `weights` without batch axes hold
        a negative or non-finite entry or sum to 0 (not asked of lazy arrays, where the
        result is NaN).

    See Also
    --------
    second_moment : the second moment about zero.
    Moments : the same from samples that come in pieces.

    Notes
    -----
    The mean is subtracted, and then the mean of what is left: the second step takes away
    the rounding error of the first, so that a mean of 1e8 times the spread does no harm in
    float64 (the corrected two-pass algorithm of Chan, Golub and LeVeque 1983).

    From 64 samples of equal weight on, members where the square of every feature's mean
    is at most half of its variance are spared a subtraction: :math:`\langle x x^T \rangle -
    \bar{x} \bar{x}^T` keeps two thirds of what is subtracted from, so that it rounds like the
    product itself. A mean is taken off first of samples of up to 4 MB, a piece of a stack for
    one, always, and of others where most members look as if they needed it, in a few of
    the samples of a few of the members. It is that of all samples, and taken off once, where
    their number n is small enough for the rounding of any sum of them not to be seen in the product, up to
    512, and in float32 :math:`1 / (8 \sqrt{\epsilon}) = 362`, for means of up to
    :math:`1 / (n \sqrt{2 \epsilon})` spreads. It is that of about 64 (on torch of all) where
    n is larger. Members that do not meet the bound then, with a feature that does not vary for
    one, are centred twice as above. One or two scalars come to the host for each piece; under
    `jax.jit` they are conditionals. So the last digits of a member may depend on what is
    stacked with it.

    Of a Dask array every block is looked at once, and blocks are merged by a tree as
    `Moments` are, in any chunks of the samples; features are brought into one chunk. Blocks
    may be larger than memory all together, and of any library. The result is a Dask array.

    With n samples of p features a member takes :math:`2 n p^2 + 2 n p + 3 p^2` operations,
    half of the first term on NumPy, which knows symmetric products; n p more about a
    mean, and 3 n p more with two centrings. "ledoit_wolf" adds 4 n p, and all
    shrinkage :math:`4 p^2`. The memory is that of a few results without a shift, one copy of
    the samples with one, and two copies of the members that are centred twice. On a CPU
    NumPy makes a large stack in pieces, as do torch and `jax.jit` from 32 MB on, and the
    copies are those of a piece.

    With :math:`S' = S / \mathrm{tr} S`, :math:`\delta = \lVert S' - I/p \rVert_F^2` (so that
    :math:`\lVert S' \rVert_F^2 = \delta + 1/p`) and
    :math:`x_k` the centred samples, "ledoit_wolf" goes by the fraction
    :math:`\min(1, \beta / \delta)`, :math:`\beta = (\langle \lVert x_k \rVert^4 \rangle /
    \mathrm{tr}(S)^2 - \lVert S' \rVert_F^2) / n` (Ledoit and Wolf 2004), and "oas" by
    :math:`\min(1, (\lVert S' \rVert_F^2 + 1) / ((n + 1) \delta))` (Chen, Wiesel, Eldar and
    Hero 2010, Eq 23 without its 2/p, as in scikit-learn).

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> x = np.asarray([[1.0, 0.0], [3.0, 4.0]])
    >>> ng.covariance(x)
    array([[1., 2.],
           [2., 4.]])
    >>> ng.covariance(x, correction=1, shrinkage=0.5)
    array([[3.5, 2. ],
           [2. , 6.5]])
    """
    xp, x, weights = _check_weighted_samples(x, weights)
    _check_number("correction", correction)
    correction = float(correction)
    if not isinstance(assume_centered, bool):
        raise TypeError(f"assume_centered must be True or False, got {_arrays.describe(assume_centered)}")
    if isinstance(shrinkage, str):
        _arrays.check_option("shrinkage", shrinkage, SHRINKAGES)
        if weights is not None or correction != 0:
            got = "weights" if weights is not None else f"correction {correction}"
            raise ValueError(f"shrinkage {shrinkage!r} needs equal weights and correction 0, got {got}")
    elif shrinkage is not None:
        _check_number("shrinkage", shrinkage, largest=1, expected="None, a number in [0, 1], 'ledoit_wolf' or 'oas'")
    n = x.shape[-2]
    if weights is None:

        def of(part: Array) -> tuple[Array]:
            return (_equally_weighted(xp, part, n - correction, assume_centered, shrinkage),)

        if not (_arrays.is_numpy(x) or _copies_are_slow(xp, x)):
            return of(x)[0]
        p = int(x.shape[-1])
        return _arrays.in_pieces(of, (x,), [(p, p)], one_by_one=_arrays.is_numpy(x))[0]
    fractions, _, squares = _normalise(xp, weights)
    divisor = 1.0 - correction * squares
    divisor = xp.where(divisor > 0.0, divisor, xp.nan)[..., None, None]
    cov = (
        _arrays.gram(xp, x * xp.sqrt(fractions)[..., None], divisor)
        if assume_centered
        else _weighted_gram(xp, x, fractions, divisor)[0]
    )
    return cov if shrinkage is None else _shrink(xp, cov, float(shrinkage))


def _equally_weighted(
    xp: Namespace, x: Array, divisor: float, assume_centered: bool, shrinkage: float | str | None
) -> Array:
    """`covariance` of samples that all count the same."""
    n, kurtosis, spread = x.shape[-2], shrinkage == "ledoit_wolf", None
    divisor = divisor if divisor > 0.0 else xp.nan
    if assume_centered:
        cov = _arrays.gram(xp, x, divisor)
        if kurtosis:
            spread = _spread(xp, xp.vecdot(x, x), cov)
    else:
        cov, spread = _centred_gram(xp, x, divisor, kurtosis=kurtosis)
    if shrinkage is None:
        return cov
    if kurtosis:
        return _shrink(xp, cov, _ledoit_wolf(xp, n, spread, cov))
    if shrinkage == "oas":
        return _shrink(xp, cov, _oas(xp, n, cov))
    assert not isinstance(shrinkage, str)
    return _shrink(xp, cov, float(shrinkage))


class Moments(NamedTuple):
    r"""Mean and scatter of samples that come in pieces: from batches, workers or a stream.

    Make one with `from_samples` or `empty`, join them with `merge` and let old samples fade
    with `discount`; each call returns a new one. It is a named tuple of arrays: a pytree for
    JAX, and it pickles.

    Attributes
    ----------
    weight : array, shape (*batch,)
        Sum of the weights of the samples: their number where weights are 1.
    weight_squared : array, shape (*batch,)
        Sum of the squared weights.
    mean : array, shape (*batch, p)
        Weighted mean of the samples, in units of x.
    scatter : array, shape (*batch, p, p)
        Weighted sum of (x − mean)(x − mean)ᵀ, in units of x squared.

    Notes
    -----
    Pieces are joined by the formula of Chan, Golub and LeVeque (1983): with
    :math:`d = \bar{x}_2 - \bar{x}_1` the joint scatter is :math:`S_1 + S_2 + d d^T w_1 w_2 /
    (w_1 + w_2)`. Sums of squares about zero never appear, so a large mean costs no digits,
    and the order of merges matters only to rounding. Those of a Dask array are made block by
    block and merged by a tree, in one pass over samples that may be larger than memory;
    ``dask.compute(moments)`` computes all four arrays together.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> x = np.asarray([[1.0, 0.0], [3.0, 4.0], [5.0, 2.0]])
    >>> moments = ng.Moments.empty(2, like=x)
    >>> for chunk in (x[:2, :], x[2:, :]):
    ...     moments = moments.merge(ng.Moments.from_samples(chunk))
    >>> moments.mean
    array([3., 2.])
    >>> moments.covariance(correction=1)
    array([[4., 2.],
           [2., 4.]])
    """

    weight: Array
    weight_squared: Array
    mean: Array
    scatter: Array

    @classmethod
    @_arrays.quiet
    def from_samples(cls, x: Array, /, *, weights: Array | None = None) -> Moments:
        """Moments of one piece.

        Parameters
        ----------
        x : array, shape (*batch, n, p)
            n samples of p features. Integers are promoted.
        weights : array, shape (*batch, n), optional
            Nonnegative weights of the samples. Default: 1 each.

        Returns
        -------
        Moments
            Batch axes broadcast. A member whose weights are negative, not finite or sum to
            0 is NaN.

        Raises
        ------
        TypeError
            If an argument is not an array of dtype float32, float64 or an integer, or if
            libraries or floating dtypes are mixed.
        ValueError
            If shapes do not fit, there are no samples, or `weights` without batch axes hold
            a negative or non-finite entry or sum to 0 (not asked of lazy arrays).

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> moments = ng.Moments.from_samples(np.asarray([[1.0], [3.0]]))
        >>> moments.mean, moments.scatter
        (array([2.]), array([[2.]]))
        """
        xp, x, weights = _check_weighted_samples(x, weights)
        n = x.shape[-2]
        if weights is None:
            scatter, mean = _centred_gram(xp, x, 1)
            # Two arrays, not one twice: JAX does not donate a buffer that appears again.
            count, squares = (
                xp.full(tuple(x.shape[:-2]), n, dtype=x.dtype, device=_arrays.device(x)) for _ in range(2)
            )
            return cls(count, squares, mean[..., 0, :], scatter)
        fractions, total, squares = _normalise(xp, weights)
        scatter, mean = _weighted_gram(xp, x, fractions, 1)
        zeros = xp.zeros(tuple(mean.shape[:-2]), dtype=x.dtype, device=_arrays.device(x))
        weight = xp.asarray(total + zeros)
        return cls(
            weight,
            xp.asarray(total * total * squares + zeros),
            mean[..., 0, :],
            scatter * weight[..., None, None],
        )

    @classmethod
    def empty(cls, features: int, /, *, like: Array, batch_shape: Shape = ()) -> Moments:
        """Moments of no samples: merging them changes nothing.

        Parameters
        ----------
        features : int
            Number p of features.
        like : array
            An array of the library, device and dtype to use, of any shape; samples will do.
        batch_shape : tuple of int
            Shape of the ensemble. Merging broadcasts, so () fits every ensemble.

        Returns
        -------
        Moments
            All zero. Their `second_moment` and `covariance` are NaN.

        Raises
        ------
        TypeError
            If `features` or an entry of `batch_shape` is not an integer, or `like` is not
            an array of dtype float32, float64 or an integer.
        ValueError
            If `features` or an entry of `batch_shape` is negative.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> x = np.asarray([[1.0], [3.0]])
        >>> ng.Moments.empty(1, like=x).merge(ng.Moments.from_samples(x)).mean
        array([2.])
        """
        xp = _arrays.check_arrays({"like": like}, integers=True)
        if not isinstance(batch_shape, tuple | list):
            raise TypeError(f"batch_shape must be a tuple of integers, got {_arrays.describe(batch_shape)}")
        p = _check_size("features", features, "be an integer")
        batch = tuple(_check_size("batch_shape", size, "be a tuple of integers") for size in batch_shape)
        device = _arrays.device(like)
        (scalar,) = _arrays.promote(xp, xp.zeros((), dtype=like.dtype, device=device))
        shapes = (batch, batch, (*batch, p), (*batch, p, p))
        return cls(*(xp.zeros(shape, dtype=scalar.dtype, device=device) for shape in shapes))

    @_arrays.quiet
    def merge(self, other: Moments, /) -> Moments:
        """Moments of the samples of both.

        Parameters
        ----------
        other : Moments
            Moments of other samples of the same features, batch axes broadcast.

        Returns
        -------
        Moments
            The same, to rounding, in whatever order pieces are merged.

        Raises
        ------
        TypeError
            If `other` is not a Moments, or of another library or dtype.
        ValueError
            If the features differ, batch axes do not broadcast, or devices differ.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> moments = ng.Moments.from_samples(np.asarray([[1.0], [3.0]]))
        >>> moments.merge(ng.Moments.from_samples(np.asarray([[8.0]]))).mean
        array([4.])
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments, got {_arrays.describe(other)}")
        xp = _arrays.check_arrays({"self": self.mean, "other": other.mean})
        p, q = self.mean.shape[-1], other.mean.shape[-1]
        if p != q:
            raise ValueError(f"other must have the {p} features of self, got {q}")
        _arrays.broadcast_batch({"self": tuple(self.weight.shape), "other": tuple(other.weight.shape)})
        weight = self.weight + other.weight
        total = xp.where(weight == 0.0, 1.0, weight)
        share = other.weight / total
        # An empty side leaves no trace at all.
        mean = _arrays.lerp(xp, self.mean, other.mean, share[..., None])
        step = (other.mean - self.mean) * xp.sqrt(self.weight * share)[..., None]
        scatter = _arrays.add_outer(xp, self.scatter + other.scatter, step[..., None, :])
        return Moments(xp.asarray(weight), xp.asarray(self.weight_squared + other.weight_squared), mean, scatter)

    def discount(self, factor: float | Array, /) -> Moments:
        """Let the samples so far count for less: exponential forgetting.

        Parameters
        ----------
        factor : float in [0, 1] or array of shape (*batch,)
            What every weight is multiplied by. A chain of discounts and merges forgets with
            a memory of 1/(1 − factor) pieces.

        Returns
        -------
        Moments
            The same mean and covariance (at correction 0), of smaller weight. A member
            whose entry of an array `factor` is outside [0, 1] is NaN.

        Raises
        ------
        TypeError
            If `factor` is neither a number nor an array of this library and dtype.
        ValueError
            If it is a number outside [0, 1], or its shape does not broadcast to the batch.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> moments = ng.Moments.from_samples(np.asarray([[1.0], [3.0]]))
        >>> moments.discount(0.5).merge(ng.Moments.from_samples(np.asarray([[8.0]]))).mean
        array([5.])
        """
        xp = _arrays.check_arrays({"self": self.mean})
        batch = tuple(self.weight.shape)
        mean = self.mean
        if isinstance(factor, Real):
            _check_number("factor", factor, largest=1)
            factor = matrix_factor = float(factor)
        else:
            factor = _arrays.check_nonnegative("factor", factor, xp, self.mean, batch=batch)
            factor = xp.where(factor <= 1.0, factor, xp.nan)
            mean = xp.where(xp.isnan(factor)[..., None], xp.nan, mean)
            matrix_factor = factor[..., None, None]
        return Moments(
            xp.asarray(self.weight * factor),
            xp.asarray(self.weight_squared * (factor * factor)),
            mean,
            self.scatter * matrix_factor,
        )

    @_arrays.quiet
    def second_moment(self) -> Array:
        """Mean of x xᵀ, about zero.

        Returns
        -------
        array, shape (*batch, p, p)
            In units of x squared, exactly symmetric; NaN in members without samples.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> moments = ng.Moments.from_samples(np.asarray([[1.0], [3.0]]))
        >>> moments.second_moment()
        array([[5.]])
        """
        xp = _arrays.check_arrays({"self": self.mean})
        weight = xp.where(self.weight > 0.0, self.weight, xp.nan)
        return self.scatter / weight[..., None, None] + self.mean[..., :, None] * self.mean[..., None, :]

    @_arrays.quiet
    def covariance(self, *, correction: float = 0) -> Array:
        r"""Covariance matrix.

        Parameters
        ----------
        correction : float
            The divisor is :math:`\sum w - \mathrm{correction} \sum w^2 / \sum w`.

        Returns
        -------
        array, shape (*batch, p, p)
            In units of x squared, exactly symmetric; NaN in members whose divisor is not
            positive.

        Raises
        ------
        TypeError
            If `correction` is not a number.
        ValueError
            If it is negative or not finite.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> moments = ng.Moments.from_samples(np.asarray([[1.0], [3.0]]))
        >>> moments.covariance()
        array([[1.]])
        """
        _check_number("correction", correction)
        correction = float(correction)
        xp = _arrays.check_arrays({"self": self.mean})
        weight = xp.where(self.weight > 0.0, self.weight, xp.nan)
        divisor = weight - correction * self.weight_squared / weight
        return self.scatter / xp.where(divisor > 0.0, divisor, xp.nan)[..., None, None]


# -------------------------------------------------------------------------------- checks


def check_samples(x: Array, y: Array | None) -> None:
    """Raise ValueError unless these are samples, and as many of both."""
    _check_samples("x", x)
    if y is None:
        return
    _check_samples("y", y)
    if y.shape[-2] != x.shape[-2]:
        raise ValueError(
            f"y must have as many samples on axis -2 as x, got shapes x: {tuple(x.shape)}, y: {tuple(y.shape)}"
        )


def _check_samples(name: str, x: Array) -> None:
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(f"{name} must have shape (*batch, samples, features), got {shape}")
    # Dask writes a length that it does not know yet as NaN.
    if not shape[-2] > 0:
        raise ValueError(
            f"{name} must have at least one sample on axis -2, and a known number of them, got shape {shape}"
        )


def _check_weighted_samples(x: Array, weights: Array | None) -> tuple[Namespace, Array, Array | None]:
    xp = _arrays.check_arrays({"x": x, "weights": weights}, integers=True, optional=("weights",))
    _check_samples("x", x)
    if weights is not None:
        _arrays.check_core("weights", weights, (x.shape[-2],), "to match the samples of x")
        _arrays.broadcast_batch({"x": tuple(x.shape[:-2]), "weights": tuple(weights.shape[:-1])})
    x, weights = _arrays.promote(xp, x, weights)
    return xp, x, weights


def _check_number(name: str, value: Any, *, largest: float | None = None, expected: str | None = None) -> None:
    expected = expected or ("a finite number, at least 0" if largest is None else f"a number in [0, {largest}]")
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {_arrays.describe(value)}")
    if not 0.0 <= float(value) < float("inf") or (largest is not None and float(value) > largest):
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_size(name: str, value: Any, needs: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must {needs}, got {_arrays.describe(value)}") from None
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")
    return size


# ---------------------------------------------------------------------------- the bodies


def _normalise(xp: Namespace, weights: Array) -> tuple[Array, Array, Array]:
    """Weights over their sum, that sum, and the sum of squared fractions; NaN if bad."""
    total = xp.sum(weights, axis=-1)
    good = xp.all(weights >= 0.0, axis=-1) & (total > 0.0) & xp.isfinite(total)
    if weights.ndim == 1 and _arrays.eager_any(xp, ~good):
        smallest, total = float(xp.min(weights)), float(total)
        raise ValueError(
            f"weights must be finite, at least 0 and not all 0, got a smallest of {smallest} and a sum of {total}"
        )
    total = xp.where(good, total, xp.nan)
    fractions = xp.where(good[..., None], weights, 0.0) / total[..., None]
    return fractions, total, xp.sum(fractions * fractions, axis=-1)


def _mean(xp: Namespace, x: Array, fractions: Array | None) -> Array:
    """Mean over samples, shape (*batch, 1, p)."""
    return _arrays.mean_rows(xp, x) if fractions is None else fractions[..., None, :] @ x


def _centre(xp: Namespace, x: Array, fractions: Array | None) -> tuple[Array, Array]:
    """The mean over samples, shape (*batch, 1, p), and a centred copy of x."""
    mean = _mean(xp, x, fractions)
    centred = x - mean
    residual = _mean(xp, centred, fractions)
    # In place where the library can: large samples are held once, not twice.
    centred -= residual
    return mean + residual, centred


def _centred_gram(xp: Namespace, x: Array, divisor: float, *, kurtosis: bool = False) -> tuple[Array, ...]:
    """The sum of (x − mean)(x − mean)ᵀ over `divisor`, and the mean, shape (*batch, 1, p), or the `_spread` if asked.

    A centred copy costs more than the product itself where memory is slow, so of many samples
    it is made only if they need one: see `covariance`. In a trace all branches are compiled,
    and a copy is fused with what reads it.
    """
    if _arrays.is_dask(x) and x.shape[-1]:
        return _by_blocks(x, divisor, kurtosis)
    if x.shape[-2] < MANY_SAMPLES or not _arrays.can_branch(x):
        return _two_pass(xp, x, divisor, kurtosis)
    once = x.shape[-2] <= FEW_SAMPLES and 64 * x.shape[-2] ** 2 * _arrays.eps(xp, x) < 1.0

    def shifted() -> tuple[Array, ...]:
        return _centred_once(xp, x, divisor, kurtosis) if once else _shifted(xp, x, divisor, kurtosis)

    if not _arrays.is_lazy(x) and _bytes(xp, x.shape, x) <= SMALL_BYTES:
        small, *values = shifted()
    else:
        small, *values = _arrays.branch(_looks_centred(xp, x), lambda: _one_pass(xp, x, divisor, kurtosis), shifted)
    if _arrays.eager_all(xp, small):
        return tuple(values)
    flags = ~xp.all(small, axis=-1)
    return _arrays.repair(xp, flags, tuple(values), (x,), lambda part: _two_pass(xp, part, divisor, kurtosis))


def _bytes(xp: Namespace, shape: Shape, x: Array) -> int:
    """What an array of this shape and of the dtype of `x` takes."""
    return math.prod(shape) * _arrays.item_bytes(xp, x)


def _copies_are_slow(xp: Namespace, x: Array) -> bool:
    """Whether a copy of the whole stack leaves the caches, and one of a few members does not."""
    whole, member = _bytes(xp, x.shape, x), _bytes(xp, x.shape[-2:], x)
    return whole >= 8 * SMALL_BYTES and member <= SMALL_BYTES


def _two_pass(xp: Namespace, x: Array, divisor: float, kurtosis: bool) -> tuple[Array, ...]:
    """`_centred_gram` of any samples."""
    mean, centred = _centre(xp, x, None)
    gram = _arrays.gram(xp, centred, divisor)
    return gram, _spread(xp, xp.vecdot(centred, centred), gram) if kurtosis else mean


def _weighted_gram(xp: Namespace, x: Array, fractions: Array, divisor: Any) -> tuple[Array, Array]:
    """The sum of fractions · (x − mean)(x − mean)ᵀ over `divisor`, and the mean, shape (*batch, 1, p)."""
    if _arrays.is_dask(x) and x.shape[-1]:
        _, mean, scatter = _parts(_arrays.reduce_blocks(x, fractions, x.shape[-1] + 2, _seen, _merged))
        return scatter / divisor, mean
    mean, centred = _centre(xp, x, fractions)
    centred *= xp.sqrt(fractions)[..., None]
    return _arrays.gram(xp, centred, divisor), mean


def _one_pass(xp: Namespace, x: Array, divisor: float, kurtosis: bool) -> tuple[Array, ...]:
    """Features whose mean is small beside their spread, and `_centred_gram` of members that have no others."""
    n = x.shape[-2]
    total = _arrays.sum_rows(xp, x)
    mean = total / n
    # The square root of n in both factors: the product is then the same from both sides of the diagonal.
    less = total / n**0.5
    gram = _arrays.gram(xp, x, divisor, less=less)
    # With mean² ≤ variance / 2 two thirds are left of what the mean was taken from.
    small = ((2.0 / divisor) * less * less)[..., 0, :] <= _diagonal(xp, gram)
    if not kurtosis:
        return small, gram, mean
    lengths = xp.vecdot(x, x)
    lengths -= (x @ xp.matrix_transpose(2.0 * mean))[..., 0]
    lengths += xp.vecdot(mean, mean)
    return small, gram, _spread(xp, lengths, gram)


def _shifted(xp: Namespace, x: Array, divisor: float, kurtosis: bool) -> tuple[Array, ...]:
    """`_one_pass` after the mean of some samples has been taken off; torch reads all of them in the time for a few."""
    shift = _mean(xp, x if _arrays.is_torch(x) else _some(x), None)
    small, gram, other = _one_pass(xp, x - shift, divisor, kurtosis)
    return small, gram, other if kurtosis else other + shift


def _centred_once(xp: Namespace, x: Array, divisor: float, kurtosis: bool) -> tuple[Array, ...]:
    """`_shifted` by the mean of all samples, where no more of a mean can be left than the product's own rounding.

    A mean of n numbers, in whatever order they are added up, is off by no more than n eps (|mean| + spread).
    """
    n = x.shape[-2]
    mean = _mean(xp, x, None)
    centred = x - mean
    gram = _arrays.gram(xp, centred, divisor)
    # From n · 2 n² eps² (mean² + variance) ≤ eps · n variance.
    most = 2 * n * n * _arrays.eps(xp, x)
    small = (most / (1.0 - most) * n / divisor) * (mean * mean)[..., 0, :] <= _diagonal(xp, gram)
    return small, gram, _spread(xp, xp.vecdot(centred, centred), gram) if kurtosis else mean


def _some(x: Array) -> Array:
    """About MANY_SAMPLES of the samples, spread over all of them."""
    return x[..., :: max(1, x.shape[-2] // MANY_SAMPLES), :]


def _looks_centred(xp: Namespace, x: Array) -> Array:
    """Whether most members seem to have a mean that is small beside their spread, from a few members and samples."""
    few = _some(x[(*(slice(None, None, max(1, size // 8)) for size in x.shape[:-2]), ...)])
    total, squares = _arrays.sum_rows(xp, few), _arrays.sum_rows(xp, few * few)
    # 4 mean² > ⟨x²⟩ is 3 mean² > variance: a little more than the bound, since a few samples vary.
    off = xp.any(4.0 * total * total > few.shape[-2] * squares, axis=-1)
    return xp.mean(xp.astype(off, x.dtype)) <= 0.5


def _diagonal(xp: Namespace, a: Array) -> Array:
    p = a.shape[-1]
    return xp.reshape(a, (*a.shape[:-2], p * p))[..., :: p + 1]


def _trace(xp: Namespace, a: Array) -> Array:
    """Traces, with two core axes of length one."""
    return xp.sum(_diagonal(xp, a), axis=-1)[..., None, None]


def _spread(xp: Namespace, lengths: Array, cov: Array) -> Array:
    """Mean of ‖x_k‖⁴ over tr(S)², from the ‖x_k‖² and S, with two core axes of length one."""
    trace = _trace(xp, cov)[..., 0]
    lengths = lengths / xp.where(trace == 0.0, 1.0, trace)
    return xp.vecdot(lengths, lengths)[..., None, None] / lengths.shape[-1]


def _shrink(xp: Namespace, cov: Array, shrinkage: float | Array) -> Array:
    p = cov.shape[-1]
    return _arrays.add_to_diagonal(xp, cov * (1.0 - shrinkage), shrinkage * _trace(xp, cov) / max(p, 1))


def _distance_to_target(xp: Namespace, cov: Array, trace: Array) -> Array:
    """‖S' − I/p‖² of S' = S / tr S: without units, so that no fourth power of x overflows."""
    p = cov.shape[-1]
    off = _arrays.add_to_diagonal(xp, cov / trace, -1.0 / max(p, 1))
    return xp.sum(xp.vecdot(off, off), axis=-1)[..., None, None]


def _ledoit_wolf(xp: Namespace, n: int, spread: Array, cov: Array) -> Array:
    trace = _trace(xp, cov)
    delta = _distance_to_target(xp, cov, xp.where(trace == 0.0, 1.0, trace))
    beta = (spread - delta - 1.0 / max(cov.shape[-1], 1)) / n
    beta = xp.where(beta > 0.0, beta, 0.0)
    return xp.where(beta < delta, beta / xp.where(delta > 0.0, delta, 1.0), 1.0)


def _oas(xp: Namespace, n: int, cov: Array) -> Array:
    trace = _trace(xp, cov)
    delta = _distance_to_target(xp, cov, xp.where(trace == 0.0, 1.0, trace))
    numerator, denominator = delta + 1.0 / max(cov.shape[-1], 1) + 1.0, (n + 1) * delta
    return xp.where(numerator < denominator, numerator / xp.where(denominator > 0.0, denominator, 1.0), 1.0)


# ------------------------------------------------------------------------ blocks of Dask arrays

# What a block leaves is one array: the scatter, and below it rows with the mean and the weight;
# with fourth moments two more, t / s^1.5 and q / s², with s the trace of the scatter, t and q the
# sums of |d|² d and |d|⁴ over d = x − mean: without units, so that no fourth power overflows.


def _by_blocks(x: Array, divisor: float, kurtosis: bool) -> tuple[Array, ...]:
    """`_centred_gram` of a Dask array, in one pass."""
    n, p = x.shape[-2:]
    if not kurtosis:
        _, mean, scatter = _parts(_arrays.reduce_blocks(x, None, p + 2, _seen, _merged))
        return scatter / divisor, mean
    found = _arrays.reduce_blocks(x, None, p + 4, _seen_to_fourth_order, _merged_to_fourth_order)
    return found[..., :p, :] / divisor, found[..., p + 3 :, :1] * (divisor * divisor / n)


def _parts(found: Array) -> tuple[Array, Array, Array]:
    """Weight and mean, shapes (*batch, 1, p), and scatter."""
    p = found.shape[-1]
    return found[..., p + 1 : p + 2, :], found[..., p : p + 1, :], found[..., :p, :]


@_arrays.quiet
def _seen(x: Array, weights: Array | None) -> Array:
    """What a block of samples leaves; weights that are all 0 are no samples."""
    xp = _arrays.namespace(x)
    *batch, n, p = x.shape
    if weights is not None:
        total = xp.sum(weights, axis=-1)[..., None, None]
        safe = xp.where(total == 0.0, 1.0, total)
        scatter, mean = _weighted_gram(xp, x, weights / safe[..., 0], 1)
        return xp.concat([scatter * total, mean, total + xp.zeros_like(mean)], axis=-2)
    if n == 0:
        return xp.zeros((*batch, p + 2, p), dtype=x.dtype, device=_arrays.device(x))
    scatter, mean = _centred_gram(xp, x, 1)
    return xp.concat([scatter, mean, xp.full_like(mean, n)], axis=-2)


@_arrays.quiet
def _merged(a: Array, b: Array) -> Array:
    """What two blocks leave together."""
    xp, p = _arrays.namespace(a), a.shape[-1]
    first, second = (
        Moments(part[..., p + 1, 0], part[..., p + 1, 0], part[..., p, :], part[..., :p, :]) for part in (a, b)
    )
    both = first.merge(second)
    mean = both.mean[..., None, :]
    return xp.concat([both.scatter, mean, both.weight[..., None, None] + xp.zeros_like(mean)], axis=-2)


@_arrays.quiet
def _seen_to_fourth_order(x: Array, weights: Array | None) -> Array:
    """`_seen` with fourth moments; without weights."""
    xp, seen = _arrays.namespace(x), _seen(x, weights)
    _, mean, scatter = _parts(seen)
    centred = x - mean
    trace = _trace(xp, scatter)
    lengths = (xp.vecdot(centred, centred) / xp.where(trace == 0.0, 1.0, trace)[..., 0])[..., None, :]
    t = lengths @ centred / xp.sqrt(xp.where(trace == 0.0, 1.0, trace))
    q = xp.vecdot(lengths, lengths)[..., None]
    return xp.concat([seen, t, q + xp.zeros_like(mean)], axis=-2)


@_arrays.quiet
def _merged_to_fourth_order(a: Array, b: Array) -> Array:
    """`_merged` with fourth moments, each side's taken about the mean of both."""
    xp, p = _arrays.namespace(a), a.shape[-1]
    both = _merged(a[..., : p + 2, :], b[..., : p + 2, :])
    _, mean, scatter = _parts(both)
    trace = _trace(xp, scatter)
    trace = xp.where(trace == 0.0, 1.0, trace)
    t, q = xp.zeros_like(mean), xp.zeros_like(mean)
    for part in (a, b):
        weight, own_mean, own = _parts(part)
        ratio, own = _trace(xp, own) / trace, own / trace
        d = (own_mean - mean) / xp.sqrt(trace)
        square, moved, old = xp.sum(d * d, axis=-1, keepdims=True), d @ own, part[..., p + 2 : p + 3, :] * ratio**1.5
        t += old + ratio * d + 2.0 * moved + weight * square * d
        q += part[..., p + 3 :, :] * ratio**2 + weight * square**2 + 2.0 * ratio * square
        q += 4.0 * xp.sum(d * (moved + old), axis=-1, keepdims=True)
    return xp.concat([both, t, q], axis=-2)
