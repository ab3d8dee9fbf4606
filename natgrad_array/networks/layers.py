"""Layers whose parameters are one matrix: outputs are W times homogeneous inputs.

A layer turns what comes in into *rows*, one for each sample n and position t, with a 1 as
last entry that carries the bias. A dense layer has one position and a convolution one for
each place of its kernel, whose patch is the row. Everything else follows for both alike:

    z_nt = W ā_nt,    ∂loss/∂W = Σ_nt δ_nt ā_ntᵀ,    J_n = Σ_t δ_nt ⊗ ā_nt.

The methods take arrays that the network has checked.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape


class Layer:
    """A layer whose outputs are a matrix times homogeneous inputs: what `Dense` and `Conv2d` share.

    Attributes
    ----------
    input_shape : tuple of int
        Axes of one sample that comes in.
    output_shape : tuple of int
        Axes of one sample that goes out.
    positions : int
        T, how many rows a sample gives: 1 for a dense layer.
    parameter_shape : tuple of 2 int
        (n_out, n_in + 1), the shape of W with the bias in its last column.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> layer = ng.networks.Dense(2, 1)
    >>> rows = layer.rows(np.asarray([[3.0, 4.0]]))
    >>> rows
    array([[[3., 4., 1.]]])
    >>> layer.forward(np.asarray([[1.0, 1.0, 0.5]]), rows)
    array([[7.5]])
    """

    @property
    def input_shape(self) -> Shape:
        """Axes of one sample that comes in."""
        raise NotImplementedError("a layer says what it takes")

    @property
    def output_shape(self) -> Shape:
        """Axes of one sample that goes out."""
        raise NotImplementedError("a layer says what it gives")

    @property
    def positions(self) -> int:
        """T, how many rows a sample gives."""
        return math.prod(self.output_shape[:-1])

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """(n_out, n_in + 1): the shape of W, bias in the last column."""
        raise NotImplementedError("a layer says how many parameters it has")

    def _unfold(self, a: Array) -> Array:
        """The patches of all positions, (*batch, N, *input_shape) to (*batch, N, T, n_in)."""
        raise NotImplementedError("a layer says what its rows are")

    def _fold(self, patches: Array) -> Array:
        """The transpose of `_unfold`: what reaches an input from all patches that it is in."""
        raise NotImplementedError("a layer says what its rows are")

    def rows(self, a: Array, /) -> Array:
        """Make the homogeneous inputs of every sample and position.

        Parameters
        ----------
        a : array, shape (*batch, N, *input_shape)
            What comes in.

        Returns
        -------
        array, shape (*batch, N, T, n_in + 1)
            The rows, each with a 1 at its end.

        Examples
        --------
        A convolution of two pixels over an image of three has two positions.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> layer = ng.networks.Conv2d((1, 3, 1), 1, kernel_size=(1, 2))
        >>> layer.rows(np.asarray([[[[5.0], [6.0], [7.0]]]]))
        array([[[5., 6., 1.],
                [6., 7., 1.]]])
        """
        xp = _arrays.namespace(a)
        patches = self._unfold(a)
        return xp.concat([patches, xp.ones_like(patches[..., :1])], axis=-1)

    def forward(self, weights: Array, rows: Array, /) -> Array:
        """Compute the layer's pre-activations.

        Parameters
        ----------
        weights : array, shape (*batch, n_out, n_in + 1)
            W.
        rows : array, shape (*batch, N, T, n_in + 1)
            What `rows` made.

        Returns
        -------
        array, shape (*batch, N, *output_shape)
            W ā.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> layer = ng.networks.Conv2d((1, 3, 1), 1, kernel_size=(1, 2))
        >>> rows = layer.rows(np.asarray([[[[5.0], [6.0], [7.0]]]]))
        >>> layer.forward(np.asarray([[1.0, 10.0, 0.5]]), rows)[..., 0]
        array([[[65.5, 76.5]]])
        """
        return self._outputs(multiply(rows, weights.mT))

    def backward(self, weights: Array, errors: Array, /) -> Array:
        """Send errors back to the layer's input.

        Parameters
        ----------
        weights : array, shape (*batch, n_out, n_in + 1)
            W.
        errors : array, shape (*batch, N, T, n_out)
            Derivatives with respect to the pre-activations.

        Returns
        -------
        array, shape (*batch, N, *input_shape)
            Derivatives with respect to what came in.

        Notes
        -----
        The transpose of `forward` in what comes in; the column of the bias plays no part.

        Examples
        --------
        The pixel in the middle is in both patches.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> layer = ng.networks.Conv2d((1, 3, 1), 1, kernel_size=(1, 2))
        >>> layer.backward(np.asarray([[1.0, 10.0, 0.5]]), np.ones((1, 2, 1)))[..., 0]
        array([[[ 1., 11., 10.]]])
        """
        return self._fold(multiply(errors, weights[..., :-1]))

    def tangent(self, weights: Array, rows: Array, moved: Array, change: Array | None, /) -> Array:
        """Compute how the pre-activations move when the weights and the input do.

        Parameters
        ----------
        weights : array, shape (*batch, n_out, n_in + 1)
            W.
        rows : array, shape (*batch, N, T, n_in + 1)
            What `rows` made.
        moved : array, shape (*batch, n_out, n_in + 1)
            How the weights move.
        change : array, shape (*batch, N, *input_shape), or None
            How the input moves; None if it does not.

        Returns
        -------
        array, shape (*batch, N, *output_shape)
            The derivative of `forward`.

        Notes
        -----
        dW ā + W dā, where dā has no entry for the bias.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> layer = ng.networks.Dense(2, 1)
        >>> rows = layer.rows(np.asarray([[3.0, 4.0]]))
        >>> weights, moved = np.asarray([[1.0, 10.0, 0.5]]), np.asarray([[0.0, 0.0, 1.0]])
        >>> layer.tangent(weights, rows, moved, None)
        array([[1.]])
        >>> layer.tangent(weights, rows, moved, np.asarray([[0.0, 2.0]]))
        array([[21.]])
        """
        total = multiply(rows, moved.mT)
        if change is not None:
            total = total + multiply(self._unfold(change), weights[..., :-1].mT)
        return self._outputs(total)

    def _outputs(self, z: Array) -> Array:
        return _arrays.namespace(z).reshape(z, (*z.shape[:-2], *self.output_shape))


@dataclass(frozen=True)
class Dense(Layer):
    """A layer in which every input reaches every output.

    Parameters
    ----------
    n_in : int
        Number of inputs.
    n_out : int
        Number of outputs.

    Raises
    ------
    ValueError
        If one of them is not a positive integer.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.networks.Dense(3, 2).parameter_shape
    (2, 4)
    """

    n_in: int
    n_out: int

    def __post_init__(self) -> None:
        _set_integers(self, ("n_in", "n_out"), 1)

    @property
    def input_shape(self) -> Shape:
        """(n_in,)."""
        return (self.n_in,)

    @property
    def output_shape(self) -> Shape:
        """(n_out,)."""
        return (self.n_out,)

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """(n_out, n_in + 1)."""
        return self.n_out, self.n_in + 1

    def _unfold(self, a: Array) -> Array:
        return a[..., None, :]

    def _fold(self, patches: Array) -> Array:
        return patches[..., 0, :]


@dataclass(frozen=True)
class Conv2d(Layer):
    """A convolution of images with channels last, as a matrix product with their patches.

    As in other libraries it is a cross-correlation: the kernel is not flipped.

    Parameters
    ----------
    image_shape : tuple of 3 int
        (height, width, channels) of what comes in.
    channels : int
        Number of output channels, n_out.
    kernel_size : int or tuple of 2 int
        Height and width of a patch.
    stride : int or tuple of 2 int
        Steps between patches, down and right.
    padding : int or tuple of 2 int
        Rows and columns of zeros on each side.

    Raises
    ------
    ValueError
        If one of these is not made of integers large enough, or a patch does not fit in
        the padded image.

    Notes
    -----
    Parameters are a matrix of shape (channels, kernel height · kernel width · input
    channels + 1), its columns in this order, and the bias last.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> layer = ng.networks.Conv2d((8, 8, 3), 4, kernel_size=3, stride=2, padding=1)
    >>> layer.output_shape, layer.parameter_shape
    ((4, 4, 4), (4, 28))
    """

    image_shape: tuple[int, int, int]
    channels: int
    kernel_size: Any = 3
    stride: Any = 1
    padding: Any = 0

    def __post_init__(self) -> None:
        _set_integers(self, ("channels",), 1)
        for name, count, least in (("image_shape", 3, 1), ("kernel_size", 2, 1), ("stride", 2, 1), ("padding", 2, 0)):
            value = getattr(self, name)
            if count == 2 and _arrays.is_integer(value):
                value = (value, value)
            object.__setattr__(self, name, check_integers(name, value, least, count))
        for side, extent, kernel, padding in zip(
            ("height", "width"), self.image_shape, self.kernel_size, self.padding, strict=False
        ):
            if kernel > extent + 2 * padding:
                raise ValueError(
                    f"kernel_size must fit in the padded image, got {side} {kernel} in {extent + 2 * padding}"
                )

    @property
    def input_shape(self) -> Shape:
        """(height, width, channels) of what comes in."""
        return self.image_shape

    @property
    def output_shape(self) -> Shape:
        """(height, width, channels) of what goes out."""
        height, width = (
            (extent + 2 * padding - kernel) // stride + 1
            for extent, kernel, stride, padding in zip(
                self.image_shape, self.kernel_size, self.stride, self.padding, strict=False
            )
        )
        return height, width, self.channels

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """(channels, kernel height · kernel width · input channels + 1)."""
        return self.channels, math.prod(self.kernel_size) * self.image_shape[-1] + 1

    def _unfold(self, a: Array) -> Array:
        xp = _arrays.namespace(a)
        height, width, channels = self.image_shape
        pixels = xp.reshape(a, (*a.shape[:-3], height * width, channels))
        patches = _take(xp, pixels, _places(self).forth)
        return xp.reshape(patches, (*a.shape[:-3], self.positions, self.parameter_shape[1] - 1))

    def _fold(self, patches: Array) -> Array:
        xp = _arrays.namespace(patches)
        batch, size = patches.shape[:-2], math.prod(self.kernel_size)
        height, width, channels = self.image_shape
        entries = xp.reshape(patches, (*batch, self.positions * size, channels))
        reached = xp.reshape(_take(xp, entries, _places(self).back), (*batch, height * width, size, channels))
        return xp.reshape(xp.sum(reached, axis=-2), (*batch, height, width, channels))


class _Places(NamedTuple):
    """Where the entries of patches are in the image, and the other way round."""

    forth: np.ndarray[Any, Any]
    """(T · kernel,): the pixel of each entry; the number of pixels where it lies in the padding."""
    back: np.ndarray[Any, Any]
    """(pixels · kernel,): the entry that each place of the kernel makes of a pixel, or the number of entries."""


@functools.lru_cache(maxsize=64)
def _places(layer: Conv2d) -> _Places:
    """Compute both tables, once for each geometry."""
    height, width, _ = layer.image_shape
    along = []
    for axis in range(2):
        starts = np.arange(layer.output_shape[axis]) * layer.stride[axis] - layer.padding[axis]
        along.append(starts[:, None] + np.arange(layer.kernel_size[axis]))
    down, right = along[0][:, None, :, None], along[1][None, :, None, :]
    inside = (down >= 0) & (down < height) & (right >= 0) & (right < width)
    forth = np.where(inside, down * width + right, height * width).reshape(-1)
    size = math.prod(layer.kernel_size)
    back = np.full((height * width, size), forth.size)
    entries = np.flatnonzero(forth < height * width)
    # One place of the kernel reaches a pixel from one position at most.
    back[forth[entries], entries % size] = entries
    return _Places(forth, back.reshape(-1))


def _take(xp: Namespace, a: Array, places: np.ndarray[Any, Any]) -> Array:
    """Rows of matrices by number; the number after the last one stands for zeros."""
    if int(places.max()) == a.shape[-2]:
        a = xp.concat([a, xp.zeros_like(a[..., :1, :])], axis=-2)
    return xp.take(a, xp.asarray(places, device=_arrays.device(a)), axis=-2)


def multiply(rows: Array, matrix: Array) -> Array:
    """Rows (*batch, N, T, n) times matrices (*batch, n, m), samples and positions in one product."""
    xp = _arrays.namespace(rows)
    *batch, samples, positions, n = rows.shape
    product = linalg.matmul(xp.reshape(rows, (*batch, samples * positions, n)), matrix)
    return xp.reshape(product, (*product.shape[:-2], samples, positions, product.shape[-1]))


def check_integers(name: str, values: object, least: int, count: int | None = None) -> tuple[int, ...]:
    """Return a tuple or list of integers as a tuple of Python's, or say what was expected."""
    fits = isinstance(values, tuple | list) and all(_arrays.is_integer(value) and value >= least for value in values)
    if not fits or (count is not None and len(values) != count):  # type: ignore[arg-type]
        what = "integers" if count is None else f"{count} integers"
        raise ValueError(f"{name} must be a tuple of {what} of at least {least}, got {values!r}")
    return tuple(int(value) for value in values)  # type: ignore[attr-defined]


def _set_integers(layer: Any, names: tuple[str, ...], least: int) -> None:
    for name in names:
        value = getattr(layer, name)
        if not _arrays.is_integer(value) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        object.__setattr__(layer, name, int(value))
