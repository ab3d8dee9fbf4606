"""The passes through a network on checked arrays: forward, backward, tangent.

Core axes of a layer's errors are (N, T, n_i): samples, positions of the layer, outputs. Axes
before them broadcast, those of an ensemble and, before these, of vectors stacked by a caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Shape
from natgrad_array.networks.activations import ACTIVATIONS
from natgrad_array.networks.layers import Layer


class Trace(NamedTuple):
    """What a forward pass leaves for the others; made by `forward`.

    Attributes
    ----------
    rows : tuple of arrays, shapes (*batch, N, T_i, n_{i-1} + 1)
        Homogeneous inputs of every layer, the 1 of the bias last. Batch axes may still
        have to broadcast.
    slopes : tuple of arrays, shapes (*batch, N, *output_shape)
        Derivatives of the activations, of every layer but the last.
    output : array, shape (*batch, N, n_L)
        What the network gives: the mean, or logits.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> net, params = ng.networks.MLP((1, 1)), (np.asarray([[2.0, 1.0]]),)
    >>> trace = net.forward(params, np.asarray([[1.0], [3.0]]))
    >>> trace.rows[0][:, 0, :]
    array([[1., 1.],
           [3., 1.]])
    >>> trace.output
    array([[3.],
           [7.]])
    """

    rows: tuple[Any, ...]
    slopes: tuple[Any, ...]
    output: Any


def forward(
    layers: Sequence[Layer], names: Sequence[str], params: Sequence[Array], x: Array, *, slopes: bool = True
) -> Trace:
    """The forward pass; `names` are those of the hidden activations, whose slopes only other passes need."""
    xp = _arrays.namespace(x)
    rows, found, a = [], [], x
    for i, (layer, weights) in enumerate(zip(layers, params, strict=True)):
        rows.append(layer.rows(_reshaped(a, layers[i - 1].output_shape, layer.input_shape) if i else a))
        z = layer.forward(weights, rows[-1])
        if i < len(names):
            activation = ACTIVATIONS[names[i]]
            a = activation.value(xp, z)
            if slopes:
                found.append(activation.slope(xp, z))
    return Trace(tuple(rows), tuple(found), z)


def backward(layers: Sequence[Layer], params: Sequence[Array], trace: Trace, errors: Array) -> tuple[Array, ...]:
    """Errors (*stack, *batch, N, n_L) of the outputs to those of every layer's pre-activations."""
    deltas = [errors[..., None, :]]
    for i in range(len(layers) - 1, 0, -1):
        below = layers[i - 1]
        back = layers[i].backward(params[i], deltas[-1])
        back = _reshaped(back, layers[i].input_shape, below.output_shape) * trace.slopes[i - 1]
        deltas.append(_reshaped(back, below.output_shape, (below.positions, below.output_shape[-1])))
    return tuple(reversed(deltas))


def tangent(layers: Sequence[Layer], params: Sequence[Array], trace: Trace, direction: Sequence[Array]) -> Array:
    """The derivative of the outputs along a direction of the parameters."""
    change = None
    for i, layer in enumerate(layers):
        if i:
            change = change * trace.slopes[i - 1]
            change = _reshaped(change, layers[i - 1].output_shape, layer.input_shape)
        change = layer.tangent(params[i], trace.rows[i], direction[i], change)
    return change


def collect(inputs: Sequence[Array], deltas: Sequence[Array]) -> tuple[Array, ...]:
    """Σ_nt δ_nt ā_ntᵀ of every layer: its gradient from its errors."""
    return tuple(linalg.matmul(_merged(delta).mT, _merged(rows)) for delta, rows in zip(deltas, inputs, strict=True))


def jacobian(delta: Array, rows: Array) -> Array:
    """J_n = Σ_t δ_nt ⊗ ā_nt of one layer, (*stack, *batch, N, n_i, n_{i-1} + 1)."""
    if rows.shape[-2] == 1:
        return delta[..., 0, :, None] * rows[..., 0, None, :]
    return delta.mT @ rows


def _merged(a: Array) -> Array:
    """Samples and positions as one axis."""
    *batch, samples, positions, n = a.shape
    return _arrays.namespace(a).reshape(a, (*batch, samples * positions, n))


def _reshaped(a: Array, old: Shape, new: Shape) -> Array:
    """The same numbers of each sample in another shape."""
    if old == new:
        return a
    return _arrays.namespace(a).reshape(a, (*a.shape[: a.ndim - len(old)], *new))
