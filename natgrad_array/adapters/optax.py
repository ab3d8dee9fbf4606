"""The optimizers of this package as optax gradient transformations."""

from __future__ import annotations

from typing import Any

import jax
import optax

from natgrad_array import _arrays
from natgrad_array.networks.network import Network
from natgrad_array.optimizers import stepping
from natgrad_array.optimizers.estimates import Empirical, Estimate, Statistics
from natgrad_array.optimizers.inverses import FactoredTikhonov, Inverse
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.stepping import OptimizerState
from natgrad_array.optimizers.steps import Damping, Fixed

__all__ = ["natgrad", "scale_by_kronecker"]

LAYOUTS = ("io", "oi")


def natgrad(optimizer: Optimizer, net: Network, /) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer of this package on the parameters of one of its networks.

    Parameters
    ----------
    optimizer : Optimizer
        Of `natgrad_array.optimizers`: a preset, or choices of your own.
    net : Network
        The layers and the likelihood. Parameters are the tuple of its matrices, shapes
        (*batch, n_i, n_{i-1} + 1), JAX arrays.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its update takes `params` and the keywords `x`, `y` (the batch that the gradient is
        of) and `key` (a new JAX key in each step, for estimates that sample the model). It
        returns the change itself: nothing is to be scaled or negated after it. Its state is
        an `OptimizerState`.

    Raises
    ------
    TypeError
        If `optimizer` or `net` are none. An update raises where an argument is missing.

    Notes
    -----
    The step is that of `Optimizer.step` with the gradient that it is given, so that a
    transformation before it in a chain, a clipping for instance, has its effect. Damping
    policies compare with the likelihood's own loss.

    Examples
    --------
    >>> import jax, optax
    >>> import natgrad_array as ng
    >>> from natgrad_array.adapters.optax import natgrad
    >>> net = ng.networks.MLP((2, 8, 1))
    >>> x = jax.random.normal(jax.random.key(0), (50, 2))
    >>> y = x[:, :1] * x[:, 1:]
    >>> params = net.init(jax.random.key(1), like=x)
    >>> transform = natgrad(ng.optimizers.natural_gradient(), net)
    >>> state = transform.init(params)
    >>> @jax.jit
    ... def step(params, state, key):
    ...     gradient = net.gradient(params, x, y)
    ...     change, state = transform.update(gradient, state, params, x=x, y=y, key=key)
    ...     return optax.apply_updates(params, change), state
    >>> before = net.loss(params, x, y)
    >>> for key in jax.random.split(jax.random.key(2), 20):
    ...     params, state = step(params, state, key)
    >>> bool(net.loss(params, x, y) < 0.1 * before)
    True
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be an Optimizer, got {_arrays.describe(optimizer)}")
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, got {_arrays.describe(net)}")

    def init(params: Any) -> OptimizerState:
        return optimizer.init(net, params)

    def update(
        updates: Any,
        state: OptimizerState,
        params: Any = None,
        *,
        x: Any = None,
        y: Any = None,
        key: Any = None,
        **_: Any,
    ) -> tuple[Any, OptimizerState]:
        for name, value in (("params", params), ("x", x), ("y", y)):
            if value is None:
                raise TypeError(f"update must be given {name}, got None")
        given = net.check_tangent("params", params, x)
        gradient = net.check_tangent("updates", updates, x)
        after = stepping.step(optimizer, net, given, state, x, y, key, gradient)[1]
        return type(updates)(after.previous), after

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_kronecker(
    layers: Any,
    /,
    *,
    inverse: Inverse | None = None,
    estimate: Estimate | None = None,
    damping: float = 1e-3,
    refresh: int = 1,
    positions: bool = False,
    layout: str = "io",
) -> optax.GradientTransformationExtraArgs:
    """Precondition the dense layers of any model by the moments of their inputs and errors.

    Parameters
    ----------
    layers : tree of bool
        The top of the parameters' tree, as for `optax.masked`: True where below it are the
        kernel of a layer, an array with two axes, and perhaps its bias, an array with one;
        False for what passes unchanged.
    inverse : Inverse, optional
        Of `natgrad_array.optimizers`: `FactoredTikhonov`, that of K-FAC, when None.
    estimate : Estimate, optional
        Its average and its way with positions count; with `InputsOnly` errors play no part.
        ``Empirical(average=0.95)`` when None, for errors of any origin.
    damping : float
        Constant, in the units of the eigenvalues of A ⊗ G.
    refresh : int
        Steps between two inverses.
    positions : bool
        Whether activations and errors have an axis of positions, (N, T, n), such as the
        tokens of a sequence.
    layout : {"io", "oi"}
        Whether kernels are (n_in, n_out), as in Flax and Haiku, or (n_out, n_in), as in
        Equinox.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its update takes the keywords `activations` and `errors`, trees like `layers` with
        arrays of shapes (N, n_in) and (N, n_out) for each layer, and anything elsewhere.
        Errors are derivatives of each sample's own loss with respect to the layer's outputs.
        The result is a preconditioned gradient, to be scaled and negated by what follows in
        a chain. The state is an `OptimizerState`.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, there is no layer, or the inverse makes passes through
        a network. Its functions raise where trees or shapes do not fit.

    Notes
    -----
    Errors of targets drawn from the model make the moments those of the Fisher information,
    errors of the data those of the empirical one.

    Examples
    --------
    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from natgrad_array.adapters.optax import scale_by_kronecker
    >>> x = jax.random.normal(jax.random.key(0), (100, 3)) * jnp.asarray([3.0, 1.0, 0.3])
    >>> y = x @ jnp.asarray([[0.3], [1.0], [3.0]]) + 2.0
    >>> params = {"dense": {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}}
    >>> transform = optax.chain(scale_by_kronecker({"dense": True}, damping=1e-8), optax.scale(-1.0))
    >>> state = transform.init(params)
    >>> error = x @ params["dense"]["kernel"] + params["dense"]["bias"] - y
    >>> gradient = {"dense": {"kernel": x.T @ error / 100, "bias": error.mean(0)}}
    >>> seen = {"activations": {"dense": x}, "errors": {"dense": jnp.ones((100, 1))}}
    >>> change, state = transform.update(gradient, state, params, **seen)
    >>> found = optax.apply_updates(params, change)["dense"]["kernel"][:, 0]
    >>> bool(jnp.allclose(found, jnp.asarray([0.3, 1.0, 3.0]), rtol=0.01))
    True
    """
    flags, tree = jax.tree_util.tree_flatten(layers)
    if not any(flags) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"layers must be a tree of bool, True for one of them at least, got {layers!r}")
    _arrays.check_option("layout", layout, LAYOUTS)
    optimizer = Optimizer(
        Empirical(average=0.95) if estimate is None else estimate,
        FactoredTikhonov() if inverse is None else inverse,
        Fixed(1.0),
        Damping(damping),
        refresh,
    )
    if optimizer.inverse.needs_network:
        raise ValueError(f"inverse must not make passes through a network, got {optimizer.inverse}")

    def chosen(name: str, value: Any) -> list[Any]:
        if value is None:
            raise TypeError(f"update must be given {name}, got None")
        try:
            parts = tree.flatten_up_to(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a tree that begins like layers: {error}") from error
        return [part for part, flag in zip(parts, flags, strict=True) if flag]

    def init(params: Any) -> OptimizerState:
        found = [_Dense(part, layout) for part in chosen("params", params)]
        return stepping.start(optimizer, tuple(layer.matrix for layer in found))

    def update(
        updates: Any,
        state: OptimizerState,
        params: Any = None,  # noqa: ARG001 - only the gradient is looked at
        *,
        activations: Any = None,
        errors: Any = None,
        **_: Any,
    ) -> tuple[Any, OptimizerState]:
        found = [_Dense(part, layout) for part in chosen("updates", updates)]
        gradient = tuple(layer.matrix for layer in found)
        inputs = chosen("activations", activations)
        back = chosen("errors", errors) if optimizer.estimate.has_errors else None
        seen = [
            Statistics.of([a], None if back is None else [back[i]], bias=layer.has_bias, positions=positions)
            for i, (a, layer) in enumerate(zip(inputs, found, strict=True))
        ]
        deltas = None if back is None else tuple(s.deltas[0] for s in seen if s.deltas is not None)
        statistics = Statistics(tuple(s.rows[0] for s in seen), deltas)
        # Parameters themselves play no part: the gradient has their shapes.
        after = optimizer.update(gradient, state, gradient, statistics)[1]
        made = iter(layer.split(-change) for layer, change in zip(found, after.previous, strict=True))
        parts = [next(made) if flag else part for part, flag in zip(tree.flatten_up_to(updates), flags, strict=True)]
        return tree.unflatten(parts), after

    return optax.GradientTransformationExtraArgs(init, update)


class _Dense:
    """The part of a tree that is one dense layer, as a matrix (n_out, n_in + 1) and back."""

    def __init__(self, part: Any, layout: str) -> None:
        self._leaves, self._tree = jax.tree_util.tree_flatten(part)
        self._layout = layout
        axes = [getattr(leaf, "ndim", None) for leaf in self._leaves]
        if sorted(axes, key=str) not in ([2], [1, 2]):
            shapes = [getattr(leaf, "shape", leaf) for leaf in self._leaves]
            raise ValueError(
                f"a layer must be a kernel with two axes and perhaps a bias with one, got arrays of shapes {shapes}"
            )
        self._kernel, self.has_bias = axes.index(2), len(axes) == 2
        kernel = self._leaves[self._kernel]
        self.matrix = kernel.T if layout == "io" else kernel
        if self.has_bias:
            bias = self._leaves[1 - self._kernel]
            if bias.shape != self.matrix.shape[:1]:
                raise ValueError(
                    f"a layer with a kernel of shape {kernel.shape} and layout {layout!r} must have a bias of shape "
                    f"{self.matrix.shape[:1]}, got {bias.shape}"
                )
            self.matrix = jax.numpy.concatenate([self.matrix, bias[:, None]], axis=1)

    def split(self, matrix: Any) -> Any:
        """A matrix in the containers of the layer."""
        leaves = list(self._leaves)
        kernel = matrix[:, :-1] if self.has_bias else matrix
        leaves[self._kernel] = kernel.T if self._layout == "io" else kernel
        if self.has_bias:
            leaves[1 - self._kernel] = matrix[:, -1]
        return self._tree.unflatten(leaves)
