"""Networks with nonlinear layers: parameters as matrices, passes, and likelihoods.

Parameters are a tuple of matrices, first layer first, each of shape (*batch, n_i, n_{i-1} + 1)
with the bias as last column. Methods broadcast over the batch axes of parameters and data.
"""

from natgrad_array.networks.common import MLP, ConvNet
from natgrad_array.networks.layers import Conv2d, Dense, Layer
from natgrad_array.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from natgrad_array.networks.network import Network
from natgrad_array.networks.passes import Trace

__all__ = [  # noqa: RUF022 - in the order of sorted, like all others
    "Bernoulli",
    "Categorical",
    "Conv2d",
    "ConvNet",
    "Dense",
    "Gaussian",
    "Layer",
    "Likelihood",
    "MLP",
    "Network",
    "Trace",
]
