"""The named methods of the literature, each as its three choices."""

from __future__ import annotations

from collections.abc import Callable

from natgrad_array._arrays import Array, is_integer
from natgrad_array.optimizers.estimates import Empirical, Estimate, ExactDirections, InputsOnly, ModelSampled
from natgrad_array.optimizers.inverses import (
    Adam,
    FactoredTikhonov,
    Identity,
    RescaledEigenbasis,
    RootDamped,
    Tikhonov,
)
from natgrad_array.optimizers.low_rank import LowRankOnline
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.searched import SearchedTikhonov
from natgrad_array.optimizers.steps import Damping, Fixed, LevenbergMarquardt, NormBound, PerLayer, QuadraticModel
from natgrad_array.optimizers.tridiagonal import BlockTridiagonal
from natgrad_array.optimizers.whitening import Whitening


def natural_gradient(
    *,
    learning_rate: float | Array = 1.0,
    damping: float | Array = 1.0,
    n_samples: int = 1,
    prediction: str = "block_diagonal",
) -> Optimizer:
    """The paper's rule for nonlinear networks: model samples × 1/(λ + √damping) × learning rate / L.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        α, of which each layer takes one L-th.
    damping : float or array of shape (*batch,)
        The first one; it grows by 1.5 where the loss falls by less than a quarter of what
        was predicted, and shrinks to two thirds where by more than three quarters. 0 stays 0.
    n_samples : int
        Targets drawn from the model for each input.
    prediction : {"block_diagonal", "exact"}
        The authors' prediction, by which a perfect step has a ratio of L/(2L − 1), or the
        one with cross-layer blocks, by which it has a ratio of 1.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `n_samples` is below 1 or `prediction` is unknown.

    Notes
    -----
    Bernacchia, Lengyel and Hennequin (2018), main text, last section.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.natural_gradient().scaling
    PerLayer(learning_rate=1.0, momentum=0.0)
    """
    return Optimizer(
        ModelSampled(n_samples=n_samples),
        RootDamped(),
        PerLayer(learning_rate),
        LevenbergMarquardt(damping, prediction=prediction),
    )


def kfac(
    *,
    damping: float | Array = 1.0,
    refresh: int = 5,
    average: float = 0.95,
    momentum: bool = True,
    share: float = 0.25,
    estimate: Estimate | None = None,
    search: int = 0,
    weight_decay: float | Array = 0.0,
) -> Optimizer:
    """K-FAC: averaged model samples × factored Tikhonov × exact quadratic model with momentum.

    Parameters
    ----------
    damping : float or array of shape (*batch,)
        The first one, adapted every fifth step.
    refresh : int
        Steps between two inverses.
    average : float
        The largest weight of the old moments.
    momentum : bool
        Whether the last change takes part in the quadratic model.
    share : float
        The part of the batch that moments and products with F are computed on.
    estimate : Estimate, optional
        Another one than averaged model samples: `convolution="reduce"` for instance.
    search : int
        Steps between searches of the factors' γ among three values, a multiple of
        `refresh`; 0 keeps γ at the root of damping and weight decay.
    weight_decay : float or array of shape (*batch,)
        η of a penalty ½ η ‖θ‖² in the loss.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `search` is not a multiple of `refresh`.

    Notes
    -----
    Martens and Grosse (2015), who search every 20 steps and decay by 1e-5; on convolutions
    it is KFC (Grosse and Martens 2016), with positions expanded or reduced.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.kfac(refresh=20).refresh
    20
    """
    if search and (not is_integer(search) or search < 0 or search % refresh):
        raise ValueError(f"search must be 0 or a multiple of refresh ({refresh}), got {search!r}")
    scaling = QuadraticModel(momentum=momentum, share=share)
    return Optimizer(
        ModelSampled(average, share) if estimate is None else estimate,
        SearchedTikhonov(search, scaling) if search else FactoredTikhonov(),
        scaling,
        _adaptive(damping, share),
        refresh,
        weight_decay,
    )


def _adaptive(damping: float | Array, share: float) -> LevenbergMarquardt:
    """The policy of section 6.5 of Martens and Grosse (2015)."""
    factor = (19.0 / 20.0) ** 5
    return LevenbergMarquardt(
        damping, prediction="damped", grow=1.0 / factor, shrink=factor, every=5, reject=True, share=share, minimum=1e-9
    )


def ekfac(
    *,
    damping: float | Array = 1.0,
    refresh: int = 20,
    average: float = 0.95,
    momentum: bool = True,
    share: float = 0.25,
) -> Optimizer:
    """EKFAC: as K-FAC, with the measured second moments of the gradient in the joint eigenbasis.

    Parameters
    ----------
    damping : float or array of shape (*batch,)
        The first one, adapted every fifth step.
    refresh : int
        Steps between two eigenbases; the second moments follow every batch.
    average : float
        The largest weight of the old moments.
    momentum : bool
        Whether the last change takes part in the quadratic model.
    share : float
        The part of the batch that moments and products with F are computed on.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `refresh` is below 1, `average` not in [0, 1) or `share` not in (0, 1].

    Notes
    -----
    George, Laurent, Bouthillier, Ballas and Vincent (2018).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.ekfac().inverse
    RescaledEigenbasis(average=0.95)
    """
    return Optimizer(
        ModelSampled(average, share),
        RescaledEigenbasis(average),
        QuadraticModel(momentum=momentum, share=share),
        _adaptive(damping, share),
        refresh,
    )


def tridiagonal_kfac(
    *,
    damping: float | Array = 1.0,
    refresh: int = 5,
    average: float = 0.95,
    momentum: bool = True,
    share: float = 0.25,
) -> Optimizer:
    """K-FAC with neighbouring layers seen together: averaged model samples × block-tridiagonal × quadratic model.

    Parameters
    ----------
    damping : float or array of shape (*batch,)
        The first one, adapted every fifth step.
    refresh : int
        Steps between two inverses.
    average : float
        The largest weight of the old moments.
    momentum : bool
        Whether the last change takes part in the quadratic model.
    share : float
        The part of the batch that moments and products with F are computed on.

    Returns
    -------
    Optimizer
        The three choices, for networks of dense layers.

    Raises
    ------
    ValueError
        If `refresh` is below 1, `average` not in [0, 1) or `share` not in (0, 1].

    Notes
    -----
    Martens and Grosse (2015), section 4.3.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.tridiagonal_kfac().inverse
    BlockTridiagonal()
    """
    return Optimizer(
        ModelSampled(average, share),
        BlockTridiagonal(),
        QuadraticModel(momentum=momentum, share=share),
        _adaptive(damping, share),
        refresh,
    )


def ng_sgd(
    *,
    learning_rate: float | Array = 0.02,
    momentum: float = 0.9,
    input_rank: int = 20,
    output_rank: int = 80,
    refresh: int = 4,
) -> Optimizer:
    """Povey's natural gradient for SGD: the data's errors × low-rank online inverses × fixed rate.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        Of the gradient, whose rows keep their size.
    momentum : float
        How much of the last change is added.
    input_rank, output_rank : int
        Of the inverses on either side of a layer.
    refresh : int
        Steps between two updates of the inverses.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `momentum` is not in [0, 1), or a rank or `refresh` is below 1.

    Notes
    -----
    Povey, Zhang and Khudanpur (2014).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.ng_sgd().refresh
    4
    """
    return Optimizer(
        Empirical(),
        LowRankOnline(input_rank, output_rank),
        Fixed(learning_rate, momentum),
        Damping(),
        refresh,
    )


def prong(
    *,
    learning_rate: float | Array = 0.05,
    momentum: float = 0.0,
    damping: float | Array = 1e-2,
    average: float = 0.95,
    refresh: int = 5,
) -> Optimizer:
    """PRONG: the inputs' moment × whitening × fixed rate.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        In whitened coordinates.
    momentum : float
        How much of the last change is added.
    damping : float or array of shape (*batch,)
        Added to the eigenvalues of the inputs' covariances.
    average : float
        The largest weight of the old moments.
    refresh : int
        Steps between two whitenings.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `momentum` or `average` is not in [0, 1), or `refresh` is below 1.

    Notes
    -----
    Desjardins, Simonyan, Pascanu and Kavukcuoglu (2015).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.prong().inverse
    Whitening()
    """
    return Optimizer(InputsOnly(average), Whitening(), Fixed(learning_rate, momentum), Damping(damping), refresh)


def foof(*, learning_rate: float | Array = 0.1, damping: float | Array = 1.0, refresh: int = 1) -> Optimizer:
    """FOOF: the moment of inputs alone, the identity for that of errors.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        Of every layer.
    damping : float or array of shape (*batch,)
        Added to the eigenvalues of the inputs' moments.
    refresh : int
        Steps between two inverses.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `refresh` is below 1.

    Notes
    -----
    Benzing (2022).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.foof().estimate
    InputsOnly(average=0.0, share=1.0, convolution='expand')
    """
    return Optimizer(InputsOnly(), Tikhonov(), Fixed(learning_rate), Damping(damping), refresh)


def heskes(*, learning_rate: float | Array = 1.0, damping: float | Array = 0.1) -> Optimizer:
    """Heskes's layered natural gradient: exact output directions × joint Tikhonov × learning rate / L.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        Of which each layer takes one L-th.
    damping : float or array of shape (*batch,)
        The first one, adapted in every step.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    TypeError, ValueError
        By `Optimizer.init`, if `learning_rate` or `damping` does not fit the ensemble.

    Notes
    -----
    Heskes (2000): the Fisher information of a layer as ⟨xxᵀ⟩ ⊗ ⟨δδᵀ⟩.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.heskes().estimate
    ExactDirections(average=0.0, share=1.0, convolution='expand')
    """
    return Optimizer(
        ExactDirections(), Tikhonov(), PerLayer(learning_rate), LevenbergMarquardt(damping, prediction="exact")
    )


def bounded_kfac(
    *,
    learning_rate: float | Array = 1.0,
    bound: float = 1e-2,
    damping: float | Array = 0.01,
    average: float = 0.95,
    refresh: int = 5,
) -> Optimizer:
    """K-FAC with the data's errors and steps of bounded length, as Ba et al. scale it out.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        The longest step, in directions.
    bound : float
        Of the squared length of a step in the metric of the estimate.
    damping : float or array of shape (*batch,)
        Constant.
    average : float
        The largest weight of the old moments.
    refresh : int
        Steps between two inverses.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `bound` is not positive, `average` not in [0, 1) or `refresh` below 1.

    Notes
    -----
    Ba, Grosse and Martens (2017).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.bounded_kfac().scaling.bound
    0.01
    """
    return Optimizer(
        Empirical(average), FactoredTikhonov(), NormBound(learning_rate, bound=bound), Damping(damping), refresh
    )


def sgd(*, learning_rate: float | Array = 0.01, momentum: float = 0.0) -> Optimizer:
    """Gradient descent, with or without momentum.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        How much of the gradient is taken.
    momentum : float
        How much of the last change is added.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `momentum` is not in [0, 1).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.sgd(momentum=0.9).inverse
    Identity()
    """
    return Optimizer(InputsOnly(), Identity(), Fixed(learning_rate, momentum))


def adam(
    *, learning_rate: float | Array = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam: the gradient's running mean over the root of its running square.

    Parameters
    ----------
    learning_rate : float or array of shape (*batch,)
        Of every parameter.
    beta1, beta2 : float
        How much of the old means is kept.
    eps : float
        Added to the root.

    Returns
    -------
    Optimizer
        The three choices.

    Raises
    ------
    ValueError
        If `beta1` or `beta2` is not in [0, 1), or `eps` is negative.

    Notes
    -----
    Kingma and Ba (2015).

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.optimizers.adam().inverse
    Adam(beta1=0.9, beta2=0.999, eps=1e-08)
    """
    return Optimizer(InputsOnly(), Adam(beta1, beta2, eps), Fixed(learning_rate))


PRESETS: dict[str, Callable[..., Optimizer]] = {
    "natural_gradient": natural_gradient,
    "kfac": kfac,
    "tridiagonal_kfac": tridiagonal_kfac,
    "ekfac": ekfac,
    "foof": foof,
    "heskes": heskes,
    "ng_sgd": ng_sgd,
    "prong": prong,
    "bounded_kfac": bounded_kfac,
    "sgd": sgd,
    "adam": adam,
}
"""The presets by name, for the command line."""
