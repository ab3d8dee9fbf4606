"""Ensembles of networks to start from, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape


def gaussian(
    rng: Any, sizes: Sequence[int], batch_shape: Shape = (), /, *, like: Array, scale: float | Array = 1.0
) -> tuple[Array, ...]:
    r"""Draw Gaussian networks, entries N(0, scale² / fan-in).

    Parameters
    ----------
    rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator or JAX key
        Where randomness comes from. Draws of a seed or of a NumPy generator are the same
        on every library.
    sizes : sequence of int
        Widths (n_0, ..., n_L).
    batch_shape : tuple of int
        Shape of the ensemble.
    like : array
        Gives the library, dtype and device of the weights.
    scale : float or array of shape (*batch,)
        Standard deviation relative to 1/√fan-in; an array sweeps it over the ensemble.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        The weights, first layer first.

    Raises
    ------
    TypeError, ValueError
        If `sizes` are not at least two positive integers, `like` is not a floating array,
        `scale` is negative, or `rng` is no source of randomness.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> weights = ng.deep_linear.gaussian(0, (4, 5, 3), (100,), like=np.empty(0))
    >>> [w.shape for w in weights]
    [(100, 5, 4), (100, 3, 5)]
    """
    xp, widths, batch = _check(sizes, batch_shape, like)
    scale = _arrays.check_nonnegative("scale", scale, xp, like, batch=batch, core_ndim=2)
    keys = _arrays.split_rng(rng, len(widths) - 1)
    return tuple(
        _arrays.standard_normal(key, (*batch, m, n), xp, like) * (scale * n**-0.5)
        for key, n, m in zip(keys, widths, widths[1:], strict=False)
    )


def small(
    rng: Any, sizes: Sequence[int], batch_shape: Shape = (), /, *, like: Array, scale: float | Array = 1e-3
) -> tuple[Array, ...]:
    """Draw networks near the origin: `gaussian` with a small scale.

    Parameters
    ----------
    rng, sizes, batch_shape, like, scale
        As in `gaussian`.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        The weights, first layer first.

    Raises
    ------
    TypeError, ValueError
        As `gaussian` does.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> first, second = ng.deep_linear.small(0, (4, 5, 3), like=np.empty(0))
    >>> bool(np.max(abs(first)) < 0.01)
    True
    """
    return gaussian(rng, sizes, batch_shape, like=like, scale=scale)


def orthogonal(
    rng: Any, sizes: Sequence[int], batch_shape: Shape = (), /, *, like: Array, gain: float | Array = 1.0
) -> tuple[Array, ...]:
    r"""Draw networks whose layers have all singular values equal.

    Parameters
    ----------
    rng, sizes, batch_shape, like
        As in `gaussian`.
    gain : float or array of shape (*batch,)
        The singular value.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        Each layer is `gain` times a matrix with orthonormal rows or columns, uniformly
        distributed.

    Raises
    ------
    TypeError, ValueError
        As `gaussian` does.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> first, second = ng.deep_linear.orthogonal(0, (4, 5, 3), like=np.empty(0), gain=2.0)
    >>> bool(np.allclose(first.T @ first, 4 * np.eye(4)))
    True
    """
    xp, widths, batch = _check(sizes, batch_shape, like)
    gain = _arrays.check_nonnegative("gain", gain, xp, like, batch=batch, core_ndim=2)
    keys = _arrays.split_rng(rng, len(widths) - 1)
    layers = []
    for key, n, m in zip(keys, widths, widths[1:], strict=False):
        q = _orthonormal(key, (*batch, max(m, n), min(m, n)), xp, like)
        layers.append(gain * (q if m >= n else q.mT))
    return tuple(layers)


def balanced(
    rng: Any,
    sizes: Sequence[int],
    batch_shape: Shape = (),
    /,
    *,
    like: Array,
    scale: float | Array = 1.0,
    end_to_end: Array | None = None,
) -> tuple[Array, ...]:
    r"""Draw balanced networks, W_{i+1}ᵀ W_{i+1} = W_i W_iᵀ between all layers.

    Parameters
    ----------
    rng, sizes, batch_shape, like
        As in `gaussian`. Hidden bases are drawn uniformly. The signs of the product's
        singular vectors are the library's, so that one seed gives layers which may differ
        between libraries in the signs of modes; their product does not.
    scale : float or array of shape (*batch,)
        Scale of a Gaussian end-to-end matrix, where none is given.
    end_to_end : array, shape (*batch, n_L, n_0), optional
        The product that the network is to have. Its singular vectors are kept, so modes
        can be aligned with those of a task. Modes beyond the narrowest layer are left out.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        Layer i has the singular values :math:`a_k^{1/L}` for modes :math:`a_k` of the
        product.

    Raises
    ------
    TypeError, ValueError
        As `gaussian` does, and if `end_to_end` does not fit `sizes` and `batch_shape`.

    Notes
    -----
    Gradient flow keeps a balanced network balanced, and its modes then follow
    `gradient_flow_modes` (Saxe, McClelland and Ganguli 2014) where they are aligned.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> weights = ng.deep_linear.balanced(0, (2, 3, 2), like=np.empty(0), end_to_end=np.diag([4.0, 1.0]))
    >>> bool(np.allclose(ng.deep_linear.end_to_end(weights), np.diag([4.0, 1.0])))
    True
    """
    xp, widths, batch = _check(sizes, batch_shape, like)
    *keys, last = _arrays.split_rng(rng, len(widths) - 1)
    if end_to_end is None:
        (end_to_end,) = gaussian(last, (widths[0], widths[-1]), batch, like=like, scale=scale)
    else:
        _arrays.check_arrays({"end_to_end": end_to_end, "like": like})
        _arrays.check_core("end_to_end", end_to_end, (widths[-1], widths[0]), "(outputs, inputs) of sizes")
        if _arrays.broadcast_batch({"end_to_end": tuple(end_to_end.shape[:-2]), "batch_shape": batch}) != batch:
            raise ValueError(f"end_to_end must broadcast to batch_shape {batch}, got shape {tuple(end_to_end.shape)}")
    depth, modes = len(widths) - 1, min(widths)
    u, s, vh = linalg.svd(xp, end_to_end)
    root = (s[..., :modes] ** (1.0 / depth))[..., None, :]
    left = vh[..., :modes, :].mT
    layers = []
    for key, width in zip(keys, widths[1:-1], strict=True):
        basis = _orthonormal(key, (*batch, width, modes), xp, like)
        layers.append((basis * root) @ left.mT)
        left = basis
    layers.append((u[..., :, :modes] * root) @ left.mT)
    return tuple(xp.broadcast_to(layer, (*batch, *layer.shape[-2:])) + 0.0 for layer in layers)


def _orthonormal(rng: Any, shape: Shape, xp: Namespace, like: Array) -> Array:
    """Uniformly distributed orthonormal columns: a QR whose signs do not depend on the library."""
    q, r = xp.linalg.qr(_arrays.standard_normal(rng, shape, xp, like))
    return q * xp.sign(xp.linalg.diagonal(r))[..., None, :]


def _check(sizes: Sequence[int], batch_shape: Shape, like: Array) -> tuple[Namespace, Shape, Shape]:
    xp = _arrays.check_arrays({"like": like})
    for name, values, least, count in (("sizes", sizes, 1, 2), ("batch_shape", batch_shape, 0, 0)):
        integers = isinstance(values, tuple | list) and all(
            _arrays.is_integer(value) and value >= least for value in values
        )
        if not integers or len(values) < count:
            raise ValueError(f"{name} must be a tuple of at least {count} integers of at least {least}, got {values!r}")
    return xp, tuple(map(int, sizes)), tuple(map(int, batch_shape))
