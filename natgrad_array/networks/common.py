"""The two common chains of layers, from their sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from natgrad_array._arrays import Array
from natgrad_array.networks.layers import Conv2d, Dense, check_integers
from natgrad_array.networks.likelihoods import Gaussian, Likelihood
from natgrad_array.networks.network import Network


def MLP(  # noqa: N802 - it reads like the class that it makes one of
    sizes: Sequence[int],
    /,
    *,
    activation: str | Sequence[str] = "tanh",
    likelihood: str | Likelihood = "gaussian",
    noise_covariance: Array | None = None,
) -> Network:
    """Chain dense layers to a network.

    Parameters
    ----------
    sizes : sequence of int
        Widths (n_0, ..., n_L).
    activation : str or sequence of str
        "identity", "tanh", "relu", "sigmoid", "softplus" or "gelu" (its approximation by
        a tanh, since the array API has no erf): one for all hidden layers, or one for
        each. The last layer is linear.
    likelihood : str or likelihood
        "gaussian", "bernoulli" or "categorical", or an instance.
    noise_covariance : array, shape (*batch, n_L, n_L), optional
        Σ̃ of the Gaussian likelihood; the identity when None.

    Returns
    -------
    Network
        Without parameters: `init` draws some.

    Raises
    ------
    TypeError, ValueError
        If `sizes` are not at least two positive integers, a name is unknown, or the noise
        covariance is none or does not belong to the likelihood.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.MLP((4, 8, 3), activation="tanh", likelihood="categorical")
    >>> x = np.random.default_rng(0).standard_normal((20, 4))
    >>> y = np.arange(20) % 3
    >>> params = net.init(1, (100,), like=x)
    >>> net.loss(params, x, y).shape
    (100,)
    >>> [g.shape for g in net.gradient(params, x, y)]
    [(100, 8, 5), (100, 3, 9)]
    >>> direction = net.fisher(params, x).precondition(net.gradient(params, x, y), damping=1e-3)
    >>> later = tuple(w - 0.1 * d for w, d in zip(params, direction))
    >>> bool(np.all(net.loss(later, x, y) < net.loss(params, x, y)))
    True
    """
    widths = check_integers("sizes", sizes, 1)
    if len(widths) < 2:
        raise ValueError(f"sizes must be a tuple of at least 2 integers, got {sizes!r}")
    layers = tuple(Dense(n, m) for n, m in itertools.pairwise(widths))
    return Network(layers, activation, _likelihood(likelihood, noise_covariance))


def ConvNet(  # noqa: N802 - it reads like the class that it makes one of
    image_shape: Sequence[int],
    channels: Sequence[int],
    sizes: Sequence[int],
    /,
    *,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 0,
    activation: str | Sequence[str] = "tanh",
    likelihood: str | Likelihood = "gaussian",
    noise_covariance: Array | None = None,
) -> Network:
    """Chain convolutions, and dense layers after them, to a network.

    Parameters
    ----------
    image_shape : sequence of 3 int
        (height, width, channels) of the images: channels come last.
    channels : sequence of int
        Output channels of each convolution.
    sizes : sequence of int
        Widths of the dense layers after them, the last one n_L.
    kernel_size, stride, padding : int, or list with one for each convolution
        As in `Conv2d`; an entry of a list may be a pair (down, right).
    activation : str or sequence of str
        For all hidden layers, or one for each, as in `MLP`.
    likelihood : str or likelihood
        As in `MLP`.
    noise_covariance : array, shape (*batch, n_L, n_L), optional
        As in `MLP`.

    Returns
    -------
    Network
        Without parameters: `init` draws some.

    Raises
    ------
    TypeError, ValueError
        If sizes are not positive integers, a kernel does not fit, a name is unknown, or
        the noise covariance is none or does not belong to the likelihood.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net = ng.networks.ConvNet((8, 8, 1), (4, 6), (10,), stride=[1, 2], likelihood="categorical")
    >>> [layer.output_shape for layer in net.layers]
    [(6, 6, 4), (2, 2, 6), (10,)]
    >>> net.output(net.init(0, like=np.empty(0)), np.zeros((5, 8, 8, 1))).shape
    (5, 10)
    """
    shape = check_integers("image_shape", image_shape, 1, 3)
    counts = check_integers("channels", channels, 1)
    layers: list[Dense | Conv2d] = []
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    for name, value in options.items():
        if isinstance(value, list) and len(value) != len(counts):
            raise ValueError(f"{name} must have one entry for each of {len(counts)} convolutions, got {value!r}")
    for i, count in enumerate(counts):
        chosen = {name: value[i] if isinstance(value, list) else value for name, value in options.items()}
        layers.append(Conv2d((shape[0], shape[1], shape[2]), count, **chosen))
        shape = layers[-1].output_shape
    widths = check_integers("sizes", sizes, 1)
    if not widths:
        raise ValueError("sizes must be a tuple of at least 1 integer, the number of outputs, got ()")
    width = math.prod(shape)
    for n in widths:
        layers.append(Dense(width, n))
        width = n
    return Network(layers, activation, _likelihood(likelihood, noise_covariance))


def _likelihood(likelihood: str | Likelihood, noise_covariance: Array | None) -> str | Likelihood:
    if noise_covariance is None:
        return likelihood
    if likelihood != "gaussian":
        raise ValueError(f"noise_covariance belongs to likelihood 'gaussian' alone, got {likelihood!r}")
    return Gaussian(noise_covariance)
