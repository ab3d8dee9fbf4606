"""The regression task that a deep linear network learns, as four moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.moments import Moments, check_samples, second_moment


class TaskFactors(NamedTuple):
    """What every computation needs of a task, factorised once.

    ρ is the rank of Σ (the largest one over members, n_0 for lazy arrays), so that
    directions in which the inputs never move are gone from every factor.
    """

    input_root: Array
    """S, (*batch, n_0, ρ), with Σ = S Sᵀ."""
    input_root_pinv: Array
    """S⁺, (*batch, ρ, n_0)."""
    input_basis: Array
    """V, (*batch, n_0, ρ): the eigenvectors of Σ behind the columns of S."""
    noise_root: Array | None
    """R, (*batch, n_L, n_L), with Σ̃ = R Rᵀ and RᵀR diagonal; None where all members share the identity."""
    noise_root_inverse: Array | None
    """R⁻¹, (*batch, n_L, n_L), or None."""
    target: Array
    """The whitened target R⁻¹ M S⁺ᵀ = R⁻¹ W* S, (*batch, n_L, ρ)."""
    optimum: Array
    """W*, (*batch, n_L, n_0)."""
    minimum_loss: Array
    """Loss at the optimum, (*batch,)."""

    def whiten(self, y: Array) -> Array:
        """R⁻¹ y."""
        return y if self.noise_root_inverse is None else self.noise_root_inverse @ y

    def unwhiten(self, y: Array) -> Array:
        """R y."""
        return y if self.noise_root is None else self.noise_root @ y

    def noise_roots(self, xp: Namespace) -> tuple[Array, Array]:
        """R and R⁻¹, written out."""
        if self.noise_root is None or self.noise_root_inverse is None:
            identity = _arrays.eye(xp, self.target.shape[-2], self.target)
            return identity, identity
        return self.noise_root, self.noise_root_inverse


class GaussianTask:
    r"""A linear-Gaussian regression task, given by its moments.

    The data enter a deep linear network with Gaussian noise through nothing else. A task
    may be a stack, and broadcasts against stacks of weights.

    Parameters
    ----------
    input_moment : array, shape (*batch, n_0, n_0)
        :math:`\Sigma = \langle x x^T \rangle`, positive semidefinite. It may be rank
        deficient (a pixel that is always dark): eigenvalues up to n_0 · eps times the
        largest count as zero.
    noise_covariance : array, shape (*batch, n_L, n_L)
        :math:`\tilde\Sigma`, the covariance of the model's output noise, positive
        definite.
    cross_moment : array, shape (*batch, n_L, n_0)
        :math:`M = \langle y x^T \rangle`; its rows lie in the range of Σ.
    output_moment : array, shape (*batch, n_L, n_L)
        :math:`\langle y y^T \rangle`, at least as large as M Σ⁺ Mᵀ.

    Raises
    ------
    TypeError
        If an argument is not a float32 or float64 array, or libraries or dtypes differ.
    ValueError
        If shapes do not fit, or a value is wrong in an unbatched argument: NaN or Inf, a
        moment that is not symmetric or not positive (semi)definite, or moments that no
        joint distribution has. In a batch such a member becomes NaN and the others are
        not touched. Values of lazy arrays (under a JAX trace) are not looked at.

    Notes
    -----
    Eqs 3–4 and 17 of Bernacchia, Lengyel and Hennequin (2018), supplement. A task is
    immutable, can be pickled, and is a JAX pytree.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> eye = np.eye(2)
    >>> task = ng.GaussianTask(eye, eye, np.asarray([[1.0, 0.0], [0.0, 2.0]]), 6 * eye)
    >>> task.optimum()
    array([[1., 0.],
           [0., 2.]])
    >>> float(task.minimum_loss())
    3.5
    """

    __slots__ = ("cross_moment", "factors", "input_moment", "noise_covariance", "output_moment")

    input_moment: Array
    noise_covariance: Array
    cross_moment: Array
    output_moment: Array
    factors: TaskFactors

    @_arrays.quiet
    def __init__(self, input_moment: Array, noise_covariance: Array, cross_moment: Array, output_moment: Array) -> None:
        named = {
            "input_moment": input_moment,
            "noise_covariance": noise_covariance,
            "cross_moment": cross_moment,
            "output_moment": output_moment,
        }
        xp = _arrays.check_arrays(named)
        _arrays.check_matrix("input_moment", input_moment, square=True)
        _arrays.check_matrix("noise_covariance", noise_covariance, square=True)
        n_in, n_out = input_moment.shape[-1], noise_covariance.shape[-1]
        if n_in == 0 or n_out == 0:
            raise ValueError(f"a task must have at least one input and one output, got {n_in} and {n_out}")
        _arrays.check_core("cross_moment", cross_moment, (n_out, n_in), "(outputs, inputs)")
        _arrays.check_core("output_moment", output_moment, (n_out, n_out), "to match noise_covariance")
        _arrays.broadcast_batch({name: tuple(array.shape[:-2]) for name, array in named.items()})
        moments, factors = _factorise(xp, named)
        self._fill(tuple(moments[name] for name in named), factors)

    @classmethod
    def from_samples(cls, x: Array, y: Array, /, *, noise_covariance: Array | None = None) -> GaussianTask:
        """Make a task from data.

        Parameters
        ----------
        x : array, shape (*batch, N, n_0)
            Inputs, one sample a row. Moments are not centred.
        y : array, shape (*batch, N, n_L)
            Targets.
        noise_covariance : array, shape (*batch, n_L, n_L), optional
            Covariance of the model's noise; the identity when None.

        Returns
        -------
        GaussianTask
            The task with the moments of the samples.

        Raises
        ------
        TypeError, ValueError
            As `second_moment` and `GaussianTask` do, and if `x` or `y` without batch axes
            holds a NaN or an Inf.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> x = np.asarray([[1.0, 0.0], [0.0, 1.0]])
        >>> ng.GaussianTask.from_samples(x, 3 * x).optimum()
        array([[3., 0.],
               [0., 3.]])
        """
        xp = _arrays.check_arrays(
            {"x": x, "y": y, "noise_covariance": noise_covariance}, integers=True, optional=("noise_covariance",)
        )
        check_samples(x, y)
        for name, samples in (("x", x), ("y", y)):
            _arrays.check_finite(name, samples, 2)
        x, y, noise_covariance = _arrays.promote(xp, x, y, noise_covariance)
        cross = second_moment(y, x)
        if noise_covariance is None:
            noise_covariance = _arrays.eye(xp, cross.shape[-2], cross)
        return cls(second_moment(x), noise_covariance, cross, second_moment(y))

    @classmethod
    def from_moments(cls, joint: Moments, n_inputs: int, /, *, noise_covariance: Array | None = None) -> GaussianTask:
        """Make a task from streamed moments of inputs and targets side by side.

        Parameters
        ----------
        joint : Moments
            Moments of samples [x, y] with n_0 + n_L features.
        n_inputs : int
            n_0: how many of the features are inputs.
        noise_covariance : array, shape (*batch, n_L, n_L), optional
            Covariance of the model's noise; the identity when None.

        Returns
        -------
        GaussianTask
            The task with those moments.

        Raises
        ------
        TypeError
            If `joint` is not a `Moments`.
        ValueError
            If `n_inputs` does not leave at least one input and one output.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> xy = np.asarray([[1.0, 2.0], [2.0, 4.0]])
        >>> ng.GaussianTask.from_moments(ng.Moments.from_samples(xy), 1).optimum()
        array([[2.]])
        """
        if not isinstance(joint, Moments):
            raise TypeError(
                f"joint must be a Moments of inputs and targets side by side, got {_arrays.describe(joint)}"
            )
        moment = joint.second_moment()
        features = moment.shape[-1]
        if not _arrays.is_integer(n_inputs) or not 0 < n_inputs < features:
            raise ValueError(f"n_inputs must be an integer from 1 to {features - 1}, got {n_inputs!r}")
        xp = _arrays.check_arrays(
            {"joint": moment, "noise_covariance": noise_covariance}, optional=("noise_covariance",)
        )
        if noise_covariance is None:
            noise_covariance = _arrays.eye(xp, features - n_inputs, moment)
        return cls(
            moment[..., :n_inputs, :n_inputs],
            noise_covariance,
            moment[..., n_inputs:, :n_inputs],
            moment[..., n_inputs:, n_inputs:],
        )

    @classmethod
    def from_modes(
        cls,
        left: Array,
        singular_values: Array,
        right: Array,
        /,
        *,
        input_moment: Array | None = None,
        noise_covariance: Array | None = None,
    ) -> GaussianTask:
        r"""Make a teacher with given singular modes: y = U diag(s) Vᵀ x + noise.

        Parameters
        ----------
        left : array, shape (*batch, n_L, k)
            U, orthonormal columns where modes are to be singular vectors.
        singular_values : array, shape (*batch, k)
            s.
        right : array, shape (*batch, n_0, k)
            V.
        input_moment : array, shape (*batch, n_0, n_0), optional
            Σ; the identity (whitened inputs) when None.
        noise_covariance : array, shape (*batch, n_L, n_L), optional
            Σ̃, of the teacher and of the model; the identity when None.

        Returns
        -------
        GaussianTask
            The task whose optimum is that teacher; its minimum loss is n_L / 2.

        Raises
        ------
        TypeError, ValueError
            If an argument is not an array of the common library and dtype, or shapes
            do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
        >>> task.optimum()
        array([[3., 0.],
               [0., 1.]])
        """
        xp = _arrays.check_arrays(
            {
                "left": left,
                "singular_values": singular_values,
                "right": right,
                "input_moment": input_moment,
                "noise_covariance": noise_covariance,
            },
            optional=("input_moment", "noise_covariance"),
        )
        _arrays.check_matrix("left", left)
        _arrays.check_matrix("right", right)
        k = left.shape[-1]
        if right.shape[-1] != k:
            raise ValueError(f"right must have as many columns as left has ({k}), got shape {tuple(right.shape)}")
        _arrays.check_core("singular_values", singular_values, (k,), "to match the columns of left")
        if input_moment is None:
            input_moment = _arrays.eye(xp, right.shape[-2], right)
        if noise_covariance is None:
            noise_covariance = _arrays.eye(xp, left.shape[-2], left)
        _arrays.check_core("input_moment", input_moment, (right.shape[-2],) * 2, "to match the rows of right")
        _arrays.check_core("noise_covariance", noise_covariance, (left.shape[-2],) * 2, "to match the rows of left")
        teacher = (left * singular_values[..., None, :]) @ right.mT
        cross = teacher @ input_moment
        signal = linalg.symmetric_part(cross @ teacher.mT)
        return cls(input_moment, noise_covariance, cross, signal + noise_covariance)

    # ------------------------------------------------------------------------ questions

    @property
    def batch_shape(self) -> Shape:
        """Batch shape of the task: that of its four moments, broadcast."""
        return _arrays.broadcast_shapes(tuple(getattr(self, name).shape[:-2]) for name in _MOMENTS)

    @property
    def n_inputs(self) -> int:
        """n_0."""
        return int(self.input_moment.shape[-1])

    @property
    def n_outputs(self) -> int:
        """n_L."""
        return int(self.noise_covariance.shape[-1])

    @property
    def input_rank(self) -> int:
        """ρ: the rank of Σ, the largest over members; n_0 where values cannot be seen."""
        return int(self.factors.input_root.shape[-1])

    def optimum(self) -> Array:
        """W* = M Σ⁺, the end-to-end matrix of least loss.

        Returns
        -------
        array, shape (*batch, n_L, n_0)
            The one of least norm where Σ is rank deficient.

        Notes
        -----
        Eq 30 of Bernacchia, Lengyel and Hennequin (2018), with Σ⁺ for Σ⁻¹.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> x = np.asarray([[1.0, 0.0], [2.0, 0.0]])
        >>> ng.GaussianTask.from_samples(x, x).optimum()
        array([[1., 0.],
               [0., 0.]])
        """
        return self.factors.optimum

    def minimum_loss(self) -> Array:
        """Loss at the optimum, ½ tr Σ̃⁻¹(⟨yyᵀ⟩ − M Σ⁺ Mᵀ).

        Returns
        -------
        array, shape (*batch,)
            In nats per sample, without the constant of the Gaussian's normalisation.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> eye = np.eye(2)
        >>> float(ng.GaussianTask(eye, eye, 0 * eye, eye).minimum_loss())
        1.0
        """
        return self.factors.minimum_loss

    # ---------------------------------------------------------------------- for ensembles

    def _mapped(self, function: Callable[[Array, int], Array]) -> GaussianTask:
        """The task with a function of an array and the number of its core axes applied to all arrays."""
        moments = tuple(function(getattr(self, name), 2) for name in _MOMENTS)
        factors = {
            name: None if value is None else function(value, 0 if name == "minimum_loss" else 2)
            for name, value in self.factors._asdict().items()
        }
        return GaussianTask._unflatten(None, (*moments, TaskFactors(**factors)))

    def _with_noisy_targets(self, noise: Array) -> GaussianTask:
        """The task with noise · Sᵀ added to the cross moment; noise is (*batch, n_L, ρ)."""
        factors = self.factors
        shifted = factors._replace(
            target=factors.target + factors.whiten(noise), optimum=factors.optimum + noise @ factors.input_root_pinv
        )
        cross = self.cross_moment + noise @ factors.input_root.mT
        return GaussianTask._unflatten(
            None, (self.input_moment, self.noise_covariance, cross, self.output_moment, shifted)
        )

    def __repr__(self) -> str:
        return (
            f"GaussianTask(n_inputs={self.n_inputs}, n_outputs={self.n_outputs}, "
            f"input_rank={self.input_rank}, batch_shape={self.batch_shape})"
        )

    # ------------------------------------------------------- immutable, picklable, a pytree

    def _fill(self, moments: tuple[Array, ...], factors: TaskFactors) -> None:
        for name, value in zip((*_MOMENTS, "factors"), (*moments, factors), strict=True):
            object.__setattr__(self, name, value)
        _arrays.register_pytree(GaussianTask, GaussianTask._flatten, GaussianTask._unflatten)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"GaussianTask is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"GaussianTask is immutable: {name} cannot be deleted")

    def _flatten(self) -> tuple[tuple[Any, ...], None]:
        return (*(getattr(self, name) for name in _MOMENTS), self.factors), None

    @staticmethod
    def _unflatten(_: None, children: tuple[Any, ...]) -> GaussianTask:
        # Transformations rebuild a task from placeholders, so nothing is checked here.
        task = object.__new__(GaussianTask)
        task._fill(tuple(children[:4]), children[4])
        return task

    def __reduce__(self) -> tuple[Any, ...]:
        return GaussianTask._unflatten, (None, self._flatten()[0])


_MOMENTS = ("input_moment", "noise_covariance", "cross_moment", "output_moment")


# ------------------------------------------------------------------------------- making one


def _factorise(xp: Namespace, moments: dict[str, Array]) -> tuple[dict[str, Array], TaskFactors]:
    """Check the values (unless lazy), turn bad members to NaN, and factorise."""
    # A copy: what the caller does to its array later must not reach the task.
    moments = moments | {"cross_moment": moments["cross_moment"] + 0.0}
    like = moments["cross_moment"]
    lazy = any(_arrays.is_lazy(array) for array in moments.values())
    precision = _arrays.eps(xp, like)

    def reject(name: str, bad: Array, why: str, what: str = "", value: Array | None = None) -> None:
        if lazy or not _arrays.eager_any(xp, bad):
            return
        if bad.ndim == 0:
            raise ValueError(f"{name} must {why}" + ("" if value is None else f", got {what} {float(value):.3g}"))
        moments[name] = xp.where(bad[..., None, None], xp.nan, moments[name])

    for name in _MOMENTS:
        reject(name, ~_arrays.finite_members(xp, moments[name])[..., 0, 0], "be finite, got NaN or Inf")
    for name in ("input_moment", "noise_covariance", "output_moment"):
        array = moments[name]
        largest = xp.max(xp.abs(array), axis=(-2, -1))
        asymmetry = xp.max(xp.abs(array - array.mT), axis=(-2, -1))
        reject(name, asymmetry > precision**0.5 * largest, "be symmetric", "a largest difference of", asymmetry)
        moments[name] = linalg.symmetric_part(moments[name])

    covariance = moments["noise_covariance"]
    root = root_inverse = None
    # Most tasks have unit noise, and every product with its root costs as much as one with a layer.
    unit = covariance.ndim == 2 and not lazy
    if not unit or _arrays.eager_any(xp, covariance != _arrays.eye(xp, covariance.shape[-1], covariance)):
        noise, noise_basis, kept = linalg.eigh_kept(xp, covariance, None)
        positive = kept & (noise > 0.0)
        bad = xp.any(~positive & ~xp.isnan(noise), axis=-1)
        reject("noise_covariance", bad, "be positive definite", "the smallest eigenvalue", noise[..., 0])
        deviation = xp.sqrt(xp.where(xp.all(positive, axis=-1, keepdims=True), noise, xp.nan))
        root = noise_basis * deviation[..., None, :]
        root_inverse = (noise_basis / deviation[..., None, :]).mT

    power, basis, kept = linalg.eigh_kept(xp, moments["input_moment"], None)
    n_in = power.shape[-1]
    negative = power[..., 0] < -100 * n_in * precision * xp.max(xp.abs(power), axis=-1)
    reject("input_moment", negative, "be positive semidefinite", "the smallest eigenvalue", power[..., 0])
    power = xp.where(xp.isnan(moments["input_moment"][..., :1, 0]), xp.nan, power)
    kept = kept & (power > 0.0)
    if not lazy:
        rank = _largest_rank(xp, kept)
        power, basis, kept = power[..., n_in - rank :], basis[..., n_in - rank :], kept[..., n_in - rank :]
    scale = xp.sqrt(xp.where(kept | xp.isnan(power), power, 0.0))
    unscale = linalg.reciprocal(xp, scale, kept)
    live = xp.where(kept[..., None, :], basis, 0.0)
    input_root, input_root_pinv = basis * scale[..., None, :], (basis * unscale[..., None, :]).mT

    if not lazy:
        # Cauchy-Schwarz: along a direction that the inputs hardly move in, the cross
        # moment of any data is small too. The slack is for moments that were rounded.
        cross = moments["cross_moment"]
        outside = cross - cross @ live @ live.mT
        bound = xp.linalg.trace(moments["output_moment"]) * xp.linalg.trace(moments["input_moment"])
        largest = xp.max(xp.abs(outside), axis=(-2, -1))
        excess = largest**2 > 10 * n_in * precision * xp.abs(bound)
        reject("cross_moment", excess, "have its rows in the range of input_moment", "a part outside of", largest)
    target, output = moments["cross_moment"] @ input_root_pinv.mT, moments["output_moment"]
    if root_inverse is not None:
        target, output = root_inverse @ target, root_inverse @ output @ root_inverse.mT
    residual = output - target @ target.mT
    if not lazy:
        floor = xp.min(linalg.eigh(xp, linalg.symmetric_part(residual))[0], axis=-1)
        size = xp.linalg.trace(residual + 2.0 * target @ target.mT)
        impossible = floor < -10 * precision**0.5 * size
        why = "be at least cross_moment pinv(input_moment) cross_momentᵀ"
        reject("output_moment", impossible, why, "the smallest eigenvalue of the whitened difference", floor)
        bad = xp.isnan(moments["output_moment"][..., 0, 0])
        if bad.ndim and _arrays.eager_any(xp, bad):
            target = xp.where(bad[..., None, None], xp.nan, target)
    minimum_loss = 0.5 * xp.linalg.trace(output - target @ target.mT)
    optimum = (target if root is None else root @ target) @ input_root_pinv
    return moments, TaskFactors(input_root, input_root_pinv, live, root, root_inverse, target, optimum, minimum_loss)


def _largest_rank(xp: Namespace, kept: Array) -> int:
    """The largest number of kept eigenvalues over members, at least one: read once, at the start."""
    if 0 in kept.shape:
        return int(kept.shape[-1])
    return max(1, int(xp.max(xp.count_nonzero(kept, axis=-1))))
