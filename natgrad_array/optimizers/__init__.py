"""Optimizers made of three choices: where moments come from, what stands for an inverse, how far to go.

>>> import natgrad_array as ng
>>> opt = ng.optimizers.kfac()

A preset is an `Optimizer` with choices of the literature; any mixture is one too.
"""

from natgrad_array.optimizers.estimates import (
    Empirical,
    Estimate,
    ExactDirections,
    InputsOnly,
    ModelSampled,
    Statistics,
)
from natgrad_array.optimizers.inverses import (
    Adam,
    Context,
    FactoredTikhonov,
    FullFisher,
    Identity,
    Inverse,
    MoorePenrose,
    RescaledEigenbasis,
    RootDamped,
    Tikhonov,
)
from natgrad_array.optimizers.low_rank import LowRankOnline
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.parallel import DataParallel, ParallelState
from natgrad_array.optimizers.preconditioner import Preconditioner
from natgrad_array.optimizers.presets import (
    adam,
    bounded_kfac,
    ekfac,
    foof,
    heskes,
    kfac,
    natural_gradient,
    ng_sgd,
    prong,
    sgd,
    tridiagonal_kfac,
)
from natgrad_array.optimizers.pruning import Pruned, prune, saliencies
from natgrad_array.optimizers.searched import SearchedTikhonov
from natgrad_array.optimizers.stepping import OptimizerState, StepInfo
from natgrad_array.optimizers.steps import (
    Change,
    Damping,
    Fixed,
    LevenbergMarquardt,
    NormBound,
    PerLayer,
    QuadraticModel,
    Scaling,
)
from natgrad_array.optimizers.tridiagonal import BlockTridiagonal
from natgrad_array.optimizers.whitening import Whitening

__all__ = [
    "Adam",
    "BlockTridiagonal",
    "Change",
    "Context",
    "Damping",
    "DataParallel",
    "Empirical",
    "Estimate",
    "ExactDirections",
    "FactoredTikhonov",
    "Fixed",
    "FullFisher",
    "Identity",
    "InputsOnly",
    "Inverse",
    "LevenbergMarquardt",
    "LowRankOnline",
    "ModelSampled",
    "MoorePenrose",
    "NormBound",
    "Optimizer",
    "OptimizerState",
    "ParallelState",
    "PerLayer",
    "Preconditioner",
    "Pruned",
    "QuadraticModel",
    "RescaledEigenbasis",
    "RootDamped",
    "Scaling",
    "SearchedTikhonov",
    "Statistics",
    "StepInfo",
    "Tikhonov",
    "Whitening",
    "adam",
    "bounded_kfac",
    "ekfac",
    "foof",
    "heskes",
    "kfac",
    "natural_gradient",
    "ng_sgd",
    "prong",
    "prune",
    "saliencies",
    "sgd",
    "tridiagonal_kfac",
]
