"""Products of the layers, and what follows from them without any inverse.

Layers are counted from 0 in code: ``weights[i]`` is the paper's W_{i+1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.task import GaussianTask, TaskFactors

Weights = tuple[Any, ...] | list[Any]

_NO_TASK = object()
_EXPECTED = "a tuple or list of weight matrices (W_1, ..., W_L), first layer first"


# ------------------------------------------------------------------------------- checks


def check_weights(weights: Weights, task: Any = _NO_TASK) -> tuple[Namespace, tuple[Array, ...]]:
    """Check a network (and that a task fits it) and return its namespace and layers."""
    layers = _arrays.check_sequence("weights", weights, _EXPECTED)
    if not isinstance(task, GaussianTask) and task is not _NO_TASK:
        raise TypeError(f"task must be a GaussianTask, got {_arrays.describe(task)}")
    named = {f"weights[{i}]": layer for i, layer in enumerate(layers)}
    xp = _arrays.check_arrays(named | {"task": task.cross_moment} if isinstance(task, GaussianTask) else named)
    batches: dict[str, Shape] = {}
    rows = None
    for i, (name, layer) in enumerate(named.items()):
        _arrays.check_matrix(name, layer)
        *batch, m, n = shape = tuple(layer.shape)
        if m == 0 or n == 0:
            raise ValueError(f"{name} must have at least one row and one column, got shape {shape}")
        if n != rows and i:
            raise ValueError(
                f"{name} must have as many columns as weights[{i - 1}] has rows ({rows}), got shape {shape}"
            )
        rows, batches[name] = m, tuple(batch)
    if isinstance(task, GaussianTask):
        if (layers[0].shape[-1], layers[-1].shape[-2]) != (task.n_inputs, task.n_outputs):
            raise ValueError(
                f"weights must lead from the task's {task.n_inputs} inputs to its {task.n_outputs} outputs, "
                f"got {layers[0].shape[-1]} and {layers[-1].shape[-2]}"
            )
        batches["task"] = task.batch_shape
    _arrays.broadcast_batch(batches)
    return xp, layers


def check_tangent(name: str, tangent: Weights, layers: tuple[Array, ...]) -> tuple[Array, ...]:
    """Check a tuple of arrays, one for each layer and of its core shape."""
    given = _arrays.check_sequence(name, tangent, "a tuple or list with one array for each layer")
    if len(given) != len(layers):
        raise ValueError(f"{name} must have one array for each of {len(layers)} layers, got {len(given)}")
    named = {f"{name}[{i}]": array for i, array in enumerate(given)}
    _arrays.check_arrays(named | {"weights[0]": layers[0]})
    for (key, array), layer in zip(named.items(), layers, strict=True):
        _arrays.check_core(key, array, tuple(layer.shape[-2:]), "like its layer's weights")
    _arrays.broadcast_batch(
        {key: tuple(array.shape[:-2]) for key, array in named.items()}
        | {f"weights[{i}]": tuple(layer.shape[:-2]) for i, layer in enumerate(layers)}
    )
    return given


def widths(layers: tuple[Array, ...]) -> Shape:
    """(n_0, ..., n_L)."""
    return (int(layers[0].shape[-1]), *(int(layer.shape[-2]) for layer in layers))


# ----------------------------------------------------------------------------- products


class Products(NamedTuple):
    """The factors E_i and X_i of every layer's two covariances, and the error between them."""

    ahead: tuple[Array, ...]
    """E_i = W_i^aᵀ R⁻ᵀ, (*batch, n_i, n_L); Eq 38."""
    behind: tuple[Array, ...]
    """X_i = W_i^b S, (*batch, n_{i-1}, ρ); Eq 39."""
    error: Array
    """The whitened error R⁻¹(W* − W) S, (*batch, n_L, ρ)."""


@_arrays.quiet
def products(layers: tuple[Array, ...], factors: TaskFactors) -> Products:
    """Every product once: 2 (L − 1) of them, and one across the narrowest hidden layer for the error."""
    depth, unroot = len(layers), factors.noise_root_inverse
    first = _arrays.eye(_arrays.namespace(layers[0]), layers[-1].shape[-2], layers[0]) if unroot is None else unroot.mT
    ahead, behind = [first], [factors.input_root]
    for layer in layers[:0:-1]:
        ahead.append(layer.mT if unroot is None and len(ahead) == 1 else layer.mT @ ahead[-1])
    for layer in layers[: max(depth - 1, 1)]:
        behind.append(linalg.matmul(layer, behind[-1]))
    ahead.reverse()
    cut = min(range(len(behind) - 1), key=lambda i: int(layers[i].shape[-2]))
    error = factors.target - ahead[cut].mT @ behind[cut + 1]
    return Products(tuple(ahead), tuple(behind[:depth]), error)


@_arrays.quiet
def end_to_end(weights: Weights, /) -> Array:
    """Product of the layers, W = W_L ⋯ W_1.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network, first layer first.

    Returns
    -------
    array, shape (*batch, n_L, n_0)
        The linear map from inputs to outputs.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a sequence of floating matrices whose shapes chain.

    Notes
    -----
    Eq 2 of Bernacchia, Lengyel and Hennequin (2018), supplement.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.end_to_end([np.asarray([[1.0, 2.0]]), np.asarray([[3.0], [0.0]])])
    array([[3., 6.],
           [0., 0.]])
    """
    _, layers = check_weights(weights)
    product = layers[0]
    for layer in layers[1:]:
        product = layer @ product
    return product


@_arrays.quiet
def end_to_end_velocity(weights: Weights, direction: Weights, /) -> Array:
    r"""Velocity of the end-to-end matrix when every layer moves, Σ W_i^a d_i W_i^b.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    direction : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        How each layer moves.

    Returns
    -------
    array, shape (*batch, n_L, n_0)
        The derivative of ``end_to_end`` along `direction`.

    Raises
    ------
    TypeError, ValueError
        If `direction` does not have the layers of `weights`.

    Notes
    -----
    Eqs 27–28 of Bernacchia, Lengyel and Hennequin (2018), supplement: Aᵀ applied to a
    tangent, by the product rule, three small products a layer.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> two, one = np.asarray([[2.0]]), np.asarray([[1.0]])
    >>> ng.deep_linear.end_to_end_velocity([two, two], [one, one])
    array([[4.]])
    """
    _, layers = check_weights(weights)
    tangent = check_tangent("direction", direction, layers)
    product, velocity = layers[0], tangent[0]
    for layer, moved in zip(layers[1:], tangent[1:], strict=True):
        velocity = layer @ velocity + moved @ product
        product = layer @ product
    return velocity


@_arrays.quiet
def end_to_end_kernel(weights: Weights, /) -> Array:
    r"""The kernel AᵀA of the product map, which turns gradient flow into a flow of W.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.

    Returns
    -------
    array, shape (*batch, n_0 n_L, n_0 n_L)
        :math:`\sum_i W_i^{bT} W_i^b \otimes W_i^a W_i^{aT}`, acting on column-stacked
        (n_L, n_0) matrices.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network, or the kernel would not fit in memory.

    Notes
    -----
    A is Eq 20 of Bernacchia, Lengyel and Hennequin (2018), supplement. Gradient flow
    moves vec(W) by AᵀA vec(G); natural gradient removes this preconditioner of depth.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.end_to_end_kernel([np.asarray([[2.0]]), np.asarray([[3.0]])])
    array([[13.]])
    """
    xp, layers = check_weights(weights)
    size = layers[0].shape[-1] * layers[-1].shape[-2]
    batch = _arrays.broadcast_batch({f"weights[{i}]": tuple(w.shape[:-2]) for i, w in enumerate(layers)})
    _arrays.check_fits("the end-to-end kernel", (*batch, size, size), xp, layers[0], "work with smaller layers")
    ahead = [_arrays.eye(xp, layers[-1].shape[-2], layers[-1])]
    behind = [_arrays.eye(xp, layers[0].shape[-1], layers[0])]
    for layer in layers[:0:-1]:
        ahead.append(ahead[-1] @ layer)
    for layer in layers[:-1]:
        behind.append(layer @ behind[-1])
    return sum_kernels(xp, tuple(a.mT for a in reversed(ahead)), tuple(behind))


def sum_kernels(xp: Namespace, left: tuple[Array, ...], right: tuple[Array, ...]) -> Array:
    """Σ_i (right_iᵀ right_i) ⊗ (left_iᵀ left_i): the Gram matrix of the stack of right_i ⊗ left_i."""
    total = linalg.kron(xp, right[0].mT @ right[0], left[0].mT @ left[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total + linalg.kron(xp, b.mT @ b, a.mT @ a)
    return total


# -------------------------------------------------------------------- loss and gradient


def loss(weights: Weights, task: GaussianTask, /) -> Array:
    r"""Population loss ½⟨(y − Wx)ᵀ Σ̃⁻¹ (y − Wx)⟩.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    array, shape (*batch,)
        Mean negative log-likelihood in nats per sample, without its constant. It is the
        minimum loss plus ``excess_loss``, so a small excess keeps its digits.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Notes
    -----
    Eq 4 of Bernacchia, Lengyel and Hennequin (2018), supplement.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> float(ng.deep_linear.loss([one, one], task))
    1.0
    """
    return excess_loss(weights, task) + task.factors.minimum_loss


@_arrays.quiet
def excess_loss(weights: Weights, task: GaussianTask, /) -> Array:
    r"""How far the loss is above its minimum, ½ ‖Σ̃^{-1/2} (W − W*) Σ^{1/2}‖².

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    array, shape (*batch,)
        Loss minus minimum loss, exact to rounding however small. Under natural gradient
        flow it decays as exp(−2t).

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> float(ng.deep_linear.excess_loss([one, one], task))
    0.5
    """
    xp, layers = check_weights(weights, task)
    product = task.factors.input_root
    for layer in layers:
        product = layer @ product
    return half_square(xp, task.factors.target - task.factors.whiten(product))[..., 0, 0]


def half_square(xp: Namespace, error: Array) -> Array:
    """The excess loss of a whitened error R⁻¹(W* − W) S, (*batch, 1, 1)."""
    flat = xp.reshape(error, (*error.shape[:-2], error.shape[-2] * error.shape[-1]))
    return 0.5 * xp.linalg.vecdot(flat, flat)[..., None, None]


@_arrays.quiet
def gradient(weights: Weights, task: GaussianTask, /) -> tuple[Array, ...]:
    r"""Gradient of the loss in every layer, ∂loss/∂W_i = −W_i^aᵀ Σ̃⁻¹ (M − WΣ) W_i^bᵀ.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask
        What it learns.

    Returns
    -------
    tuple of arrays, shapes (*batch, n_i, n_{i-1})
        Ascent directions of the loss: descent subtracts them.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Notes
    -----
    Eqs 7–10 and 13 of Bernacchia, Lengyel and Hennequin (2018), supplement, with the
    sign of a loss. 4L small products.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> one = np.asarray([[1.0]])
    >>> task = ng.GaussianTask(one, one, 2 * one, 5 * one)
    >>> ng.deep_linear.gradient([one, 3 * one], task)
    (array([[3.]]), array([[1.]]))
    """
    _, layers = check_weights(weights, task)
    return gradients(products(layers, task.factors))


def gradients(found: Products) -> tuple[Array, ...]:
    """−E_i error X_iᵀ for every layer."""
    return tuple(-((e @ found.error) @ x.mT) for e, x in zip(found.ahead, found.behind, strict=True))


# -------------------------------------------------------------- regimes and conservation


def regime(weights: Weights, task: GaussianTask | None = None, /) -> str:
    """Say which of three regimes the widths of a network put it in.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.
    task : GaussianTask, optional
        With a task, the rank of Σ stands for n_0.

    Returns
    -------
    {"wide", "intermediate", "bottleneck"}
        "wide": every hidden width is at least max(n_0, n_L), and the layerwise rule is
        the exact natural gradient. "intermediate": every hidden width is at least
        min(n_0, n_L) but not all reach the maximum; the natural gradient still moves W
        straight to W*, the layerwise rule does not. "bottleneck": some hidden width is
        below min(n_0, n_L), and W cannot reach every matrix.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network or does not fit `task`.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.regime([np.ones((4, 6)), np.ones((3, 4))])
    'intermediate'
    """
    _, layers = check_weights(weights) if task is None else check_weights(weights, task)
    n_in, *hidden, n_out = widths(layers)
    if task is not None:
        n_in = task.input_rank
    narrowest = min(hidden, default=max(n_in, n_out))
    if narrowest >= max(n_in, n_out):
        return "wide"
    return "intermediate" if narrowest >= min(n_in, n_out) else "bottleneck"


@_arrays.quiet
def balancedness(weights: Weights, /) -> tuple[Array, ...]:
    r"""W_{i+1}ᵀ W_{i+1} − W_i W_iᵀ between neighbouring layers.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1})
        The network.

    Returns
    -------
    tuple of L − 1 arrays, shapes (*batch, n_i, n_i)
        All zero for a balanced network. Gradient flow conserves them, and so does the
        flow of the Moore–Penrose natural gradient.

    Raises
    ------
    TypeError, ValueError
        If `weights` is not a network.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> ng.deep_linear.balancedness([np.asarray([[2.0]]), np.asarray([[3.0]])])
    (array([[5.]]),)
    """
    xp, layers = check_weights(weights)
    transpose = [xp.matrix_transpose(layer) for layer in layers]
    return tuple(transpose[i + 1] @ layers[i + 1] - layers[i] @ transpose[i] for i in range(len(layers) - 1))
