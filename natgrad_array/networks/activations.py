"""Activation functions and their derivatives, by name.

A NaN comes out as a NaN, so that a bad member cannot look like a dead unit. Derivatives keep
their relative precision where a unit saturates, because ranks are read off them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace


class Activation(NamedTuple):
    """A function of the pre-activations, element by element, and its derivative.

    Attributes
    ----------
    value : callable
        Takes the namespace and an array of pre-activations.
    slope : callable
        The derivative there, called in the same way.
    """

    value: Callable[[Namespace, Array], Array]
    slope: Callable[[Namespace, Array], Array]


def _decay(xp: Namespace, z: Array) -> Array:
    """exp(−|z|), which neither overflows nor loses a digit; an array of the caller's own."""
    size = xp.abs(z)
    size *= -1.0
    return xp.exp(size)


def sigmoid(xp: Namespace, z: Array) -> Array:
    """1 / (1 + exp(−z)), to full relative precision on both sides."""
    decay = _decay(xp, z)
    return xp.where(z >= 0.0, 1.0, decay) / (1.0 + decay)


def sigmoid_slope(xp: Namespace, z: Array) -> Array:
    """Slope p (1 − p) of the sigmoid p, without the difference."""
    decay = _decay(xp, z)
    whole = 1.0 + decay
    decay /= whole
    decay /= whole
    return decay


def softplus(xp: Namespace, z: Array) -> Array:
    """log(1 + exp(z)); its derivative is the sigmoid."""
    return relu(xp, z) + xp.log1p(_decay(xp, z))


def _tanh_slope(xp: Namespace, z: Array) -> Array:
    slope = sigmoid_slope(xp, 2.0 * z)
    slope *= 4.0
    return slope


def relu(xp: Namespace, z: Array) -> Array:
    """max(z, 0)."""
    return xp.where(z <= 0.0, 0.0, z)


def _relu_slope(xp: Namespace, z: Array) -> Array:
    return xp.where(z <= 0.0, 0.0, xp.where(z > 0.0, 1.0, z))


# sqrt(2 / pi), and the cubic coefficient of Hendrycks and Gimpel (2016).
_GELU_SCALE, _GELU_CUBIC = 0.7978845608028654, 0.044715

# From here on the sigmoid of the inner argument is 0 or 1 even in float64; cubes stay in the range of float32.
_GELU_END = 24.0


def _gelu_inner(xp: Namespace, z: Array) -> tuple[Array, Array]:
    """Twice the argument of the tanh, so that (1 + tanh) / 2 is a sigmoid; and z cut off."""
    near = xp.where(z > _GELU_END, _GELU_END, xp.where(z < -_GELU_END, -_GELU_END, z))
    return 2.0 * _GELU_SCALE * (near + _GELU_CUBIC * near**3), near


def _gelu(xp: Namespace, z: Array) -> Array:
    return z * sigmoid(xp, _gelu_inner(xp, z)[0])


def _gelu_slope(xp: Namespace, z: Array) -> Array:
    inner, near = _gelu_inner(xp, z)
    change = 2.0 * _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * near**2)
    return sigmoid(xp, inner) + near * sigmoid_slope(xp, inner) * change


ACTIVATIONS = {
    "identity": Activation(lambda _, z: z, lambda xp, z: xp.ones_like(z)),
    "tanh": Activation(lambda xp, z: xp.tanh(z), _tanh_slope),
    "relu": Activation(relu, _relu_slope),
    "sigmoid": Activation(sigmoid, sigmoid_slope),
    "softplus": Activation(softplus, sigmoid),
    # The standard has no erf: this is the approximation by a tanh, not the exact form.
    "gelu": Activation(_gelu, _gelu_slope),
}
"""What a hidden layer can be given, by name."""


def check_activation(name: str, value: object) -> str:
    """Return the name of an activation, or say which there are."""
    _arrays.check_option(name, value, tuple(ACTIVATIONS))
    return str(value)
