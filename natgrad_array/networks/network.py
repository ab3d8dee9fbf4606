"""Networks of layers with a likelihood: outputs, loss, gradient and the passes behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.networks import passes
from natgrad_array.networks.activations import check_activation
from natgrad_array.networks.layers import Conv2d, Dense, check_integers
from natgrad_array.networks.likelihoods import LIKELIHOODS, Likelihood
from natgrad_array.networks.passes import Trace

if TYPE_CHECKING:
    from natgrad_array.fisher import NetworkFisher

Params = tuple[Any, ...] | list[Any]


@dataclass(frozen=True)
class Network:
    """A chain of layers, the activations between them and a likelihood; `MLP` and `ConvNet` make common ones.

    Parameters
    ----------
    layers : sequence of Dense and Conv2d
        Their sizes have to chain; the last is dense. What a convolution gives a dense
        layer is flattened, channels last.
    activations : str or sequence of str
        "identity", "tanh", "relu", "sigmoid", "softplus" or "gelu" (its approximation by
        a tanh, since the array API has no erf): one for all hidden layers, or one for
        each. The last layer is linear.
    likelihood : str or likelihood
        "gaussian" (with identity noise), "bernoulli" or "categorical", or an instance.

    Raises
    ------
    TypeError, ValueError
        If layers do not chain, there are not as many activations as hidden layers, a name
        is unknown, or the likelihood does not fit the outputs.

    Notes
    -----
    Parameters are a tuple of matrices, first layer first, each of shape (*batch, n_i,
    n_{i-1} + 1) with the bias as last column: for a convolution n_i counts channels and
    n_{i-1} the entries of a patch. Leading axes are an ensemble, which data without them
    are shared by. A network holds no parameters, can be hashed, and every method runs
    under `jax.jit`.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> from natgrad_array.networks import Conv2d, Dense, Network
    >>> net = Network((Conv2d((6, 6, 1), 2), Dense(32, 3)), "relu", "categorical")
    >>> images = np.zeros((10, 6, 6, 1))
    >>> params = net.init(0, (5,), like=images)
    >>> net.output(params, images).shape
    (5, 10, 3)
    """

    layers: tuple[Dense | Conv2d, ...]
    activations: tuple[str, ...]
    likelihood: Likelihood

    def __init__(
        self,
        layers: Sequence[Dense | Conv2d],
        activations: str | Sequence[str] = "tanh",
        likelihood: str | Likelihood = "gaussian",
    ) -> None:
        chain = _check_layers(layers)
        if isinstance(likelihood, str):
            _arrays.check_option("likelihood", likelihood, tuple(LIKELIHOODS))
            likelihood = LIKELIHOODS[likelihood]()
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a name or a likelihood, got {_arrays.describe(likelihood)}")
        likelihood.check_width(chain[-1].output_shape[-1])
        object.__setattr__(self, "layers", chain)
        object.__setattr__(self, "activations", _check_activations(activations, len(chain) - 1))
        object.__setattr__(self, "likelihood", likelihood)

    @property
    def n_parameters(self) -> int:
        """P, biases counted."""
        return sum(m * n for m, n in (layer.parameter_shape for layer in self.layers))

    @property
    def n_outputs(self) -> int:
        """n_L."""
        return int(self.layers[-1].output_shape[-1])

    # ----------------------------------------------------------------------- parameters

    def init(self, rng: Any, batch_shape: Shape = (), /, *, like: Array) -> tuple[Array, ...]:
        """Draw parameters: weights N(0, 1 / fan-in) and no bias.

        Parameters
        ----------
        rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator or JAX key
            Where randomness comes from. Draws of a seed or of a NumPy generator are the
            same on every library.
        batch_shape : tuple of int
            Shape of the ensemble.
        like : array
            Gives the library, dtype and device of the parameters.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.

        Raises
        ------
        TypeError, ValueError
            If `batch_shape` is no shape, `like` is not a floating array, or `rng` is no
            source of randomness.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((4, 8, 3))
        >>> [w.shape for w in net.init(0, (10,), like=np.empty(0))]
        [(10, 8, 5), (10, 3, 9)]
        """
        xp = _arrays.check_arrays({"like": like})
        batch = check_integers("batch_shape", batch_shape, 0)
        params = []
        for key, layer in zip(_arrays.split_rng(rng, len(self.layers)), self.layers, strict=True):
            m, n = layer.parameter_shape
            weights = _arrays.standard_normal(key, (*batch, m, n - 1), xp, like) * (n - 1) ** -0.5
            params.append(xp.concat([weights, xp.zeros_like(weights[..., :1])], axis=-1))
        return tuple(params)

    # ------------------------------------------------------------- outputs, loss, gradient

    @_arrays.quiet
    def output(self, params: Params, x: Array, /) -> Array:
        """Compute the network's outputs.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.

        Returns
        -------
        array, shape (*batch, N, n_L)
            The mean of the targets, or their logits.

        Raises
        ------
        TypeError, ValueError
            If `params` or `x` do not fit the network or each other.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> net.output(params, x)
        array([[3.],
               [7.]])
        """
        _, params = self._check_params(params, x)
        return passes.forward(self.layers, self.activations, params, x, slopes=False).output

    def loss(self, params: Params, x: Array, y: Array, /) -> Array:
        """Compute the mean over samples of the negative log-likelihood.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            Their targets.

        Returns
        -------
        array, shape (*batch,)
            In nats per sample; without the constant of a Gaussian's normalisation.

        Raises
        ------
        TypeError, ValueError
            If `params`, `x` or `y` do not fit the network or each other.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> bool(np.isclose(net.loss(params, x, np.asarray([[4.0], [7.0]])), 0.25))
        True
        """
        return self.likelihood.loss(self.output(params, x), y)

    @_arrays.quiet
    def gradient(self, params: Params, x: Array, y: Array, /) -> tuple[Array, ...]:
        """Compute the gradient of the loss.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.
        y : array, shape (*batch, N, n_L), or (*batch, N) for classes
            Their targets.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            ∂loss/∂W_i: descent subtracts it.

        Raises
        ------
        TypeError, ValueError
            If `params`, `x` or `y` do not fit the network or each other.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> net.gradient(params, x, np.asarray([[4.0], [7.0]]))
        (array([[-0.5, -0.5]]),)
        """
        trace = self.forward(params, x)
        errors = self.likelihood.residual(trace.output, y) / trace.output.shape[-2]
        return passes.collect(trace.rows, passes.backward(self.layers, params, trace, errors))

    def fisher(self, params: Params, x: Array, /) -> NetworkFisher:
        """Compute the exact Fisher information of the parameters on N inputs.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs; the mean is over them.

        Returns
        -------
        NetworkFisher
            Exact through every output direction: nothing is sampled.

        Raises
        ------
        TypeError, ValueError
            If `params` or `x` do not fit the network or each other.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1))
        >>> params = (np.asarray([[2.0, 1.0]]),)
        >>> x = np.asarray([[1.0], [3.0]])
        >>> net.fisher(params, x).to_dense()
        array([[5., 2.],
               [2., 1.]])
        """
        # The one import that points up: a method where users look for it.
        from natgrad_array.fisher import NetworkFisher

        return NetworkFisher(self, params, x)

    # --------------------------------------------------------------------------- passes

    @_arrays.quiet
    def forward(self, params: Params, x: Array, /) -> Trace:
        """Compute the outputs, and keep what the other passes need.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        x : array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs.

        Returns
        -------
        Trace
            The layers' inputs, slopes and the output.

        Raises
        ------
        TypeError, ValueError
            If `params` or `x` do not fit the network or each other.

        Notes
        -----
        ā_i = [φ(W_i ā_{i-1}), 1] from ā_0 = [x, 1]: section 2 of Martens and Grosse (2015).

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1), activation="relu")
        >>> params, x = (np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 1.0]])), np.asarray([[1.0], [-1.0]])
        >>> trace = net.forward(params, x)
        >>> trace.output
        array([[7.],
               [1.]])
        >>> trace.slopes
        (array([[1.],
               [0.]]),)
        """
        _, params = self._check_params(params, x)
        return passes.forward(self.layers, self.activations, params, x)

    @_arrays.quiet
    def backward(self, params: Params, trace: Trace, output_errors: Array, /) -> tuple[Array, ...]:
        """Send errors of the outputs back to every layer.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        trace : Trace
            What `forward` made of them.
        output_errors : array, shape (*stack, *batch, N, n_L)
            Derivatives with respect to the outputs; any number of them, stacked on axes in
            front of those of the ensemble.

        Returns
        -------
        tuple of arrays, shapes (*stack, *batch, N, T_i, n_i)
            Derivatives with respect to every layer's pre-activations, at each of its
            positions (one, for a dense layer).

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit the network or each other.

        Notes
        -----
        δ_L are the errors given, and δ_{i-1} = φ'(z_{i-1}) ∘ W_iᵀ δ_i, without the row of the bias.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1), activation="relu")
        >>> params, x = (np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 1.0]])), np.asarray([[1.0], [-1.0]])
        >>> trace = net.forward(params, x)
        >>> first, last = net.backward(params, trace, np.ones((2, 1)))
        >>> first[..., 0, :]
        array([[3.],
               [0.]])
        >>> first.shape, net.backward(params, trace, np.ones((5, 2, 1)))[0].shape
        ((2, 1, 1), (5, 2, 1, 1))
        """
        params = self._check_pass(params, trace, {"output_errors": output_errors})
        _arrays.check_core("output_errors", output_errors, tuple(trace.output.shape[-2:]), "like the outputs")
        return passes.backward(self.layers, params, trace, output_errors)

    @_arrays.quiet
    def tangent(self, params: Params, trace: Trace, direction: Params, /) -> Array:
        """Compute the Jacobian of the outputs times a direction of the parameters.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        trace : Trace
            What `forward` made of them.
        direction : sequence of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            How the parameters move; any number of ways, stacked in front of the ensemble.

        Returns
        -------
        array, shape (*stack, *batch, N, n_L)
            How the outputs move.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit the network or each other.

        Notes
        -----
        J_n v of each sample, by one pass forward.

        Examples
        --------
        The product with a direction is the derivative along it.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1), activation="relu")
        >>> params, x = (np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 1.0]])), np.asarray([[1.0], [-1.0]])
        >>> trace = net.forward(params, x)
        >>> net.tangent(params, trace, (np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]])))
        array([[4.],
               [1.]])
        """
        moved = self._check_tangent("direction", direction, {"the outputs": trace.output})
        params = self._check_pass(params, trace, {})
        return passes.tangent(self.layers, params, trace, moved)

    @_arrays.quiet
    def cotangent(self, params: Params, trace: Trace, output_errors: Array, /) -> tuple[Array, ...]:
        """Compute the transposed Jacobian of the outputs times errors of them.

        Parameters
        ----------
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters, bias column last.
        trace : Trace
            What `forward` made of them.
        output_errors : array, shape (*stack, *batch, N, n_L)
            Derivatives with respect to the outputs, as for `backward`.

        Returns
        -------
        tuple of arrays, shapes (*stack, *batch, n_i, n_{i-1} + 1)
            Σ_nt δ_nt ā_ntᵀ, summed over samples, not averaged.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit the network or each other.

        Notes
        -----
        Σ_n J_nᵀ u_n, by one pass backward.

        Examples
        --------
        It is the transpose of `tangent`: uᵀ(J v) = (Jᵀu)ᵀv.

        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1), activation="relu")
        >>> params, x = (np.asarray([[2.0, 0.0]]), np.asarray([[3.0, 1.0]])), np.asarray([[1.0], [-1.0]])
        >>> trace = net.forward(params, x)
        >>> u, v = np.asarray([[2.0], [5.0]]), (np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]]))
        >>> net.cotangent(params, trace, u)
        (array([[6., 6.]]), array([[4., 7.]]))
        >>> float(np.sum(u * net.tangent(params, trace, v)))
        13.0
        >>> float(sum(np.sum(g * w) for g, w in zip(net.cotangent(params, trace, u), v)))
        13.0
        """
        return passes.collect(trace.rows, self.backward(params, trace, output_errors))

    # --------------------------------------------------------------------------- checks

    def check_tangent(self, name: str, tangent: Params, like: Array, /) -> tuple[Array, ...]:
        """Check a tuple of arrays, one for each layer and of the core shape of its parameters.

        Parameters
        ----------
        name : str
            What error messages call it.
        tangent : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            What to check.
        like : array
            Gives the library, dtype and device.

        Returns
        -------
        tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The arrays.

        Raises
        ------
        TypeError, ValueError
            If it is not such a tuple.

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> net = ng.networks.MLP((1, 1, 1))
        >>> net.check_tangent("momentum", (np.ones((1, 2)),), np.empty(0))
        Traceback (most recent call last):
            ...
        ValueError: momentum must have one array for each of 2 layers, got 1
        """
        return self._check_tangent(name, tangent, {"the other arrays": like})

    def _check_tangent(self, name: str, tangent: Params, like: dict[str, Array]) -> tuple[Array, ...]:
        given = _arrays.check_sequence(name, tangent, "a tuple or list with one array for each layer")
        if len(given) != len(self.layers):
            raise ValueError(f"{name} must have one array for each of {len(self.layers)} layers, got {len(given)}")
        named = {f"{name}[{i}]": array for i, array in enumerate(given)}
        _arrays.check_arrays(named | like)
        for (key, array), layer in zip(named.items(), self.layers, strict=True):
            _arrays.check_core(key, array, layer.parameter_shape, "(n_out, n_in + 1) of its layer")
        _arrays.broadcast_batch({key: tuple(array.shape[:-2]) for key, array in named.items()})
        return given

    def _check_params(self, params: Params, x: Array) -> tuple[Namespace, tuple[Array, ...]]:
        xp = _arrays.check_arrays({"x": x} | self.likelihood._constants())
        given = self._check_tangent("params", params, {"x": x})
        check_inputs("x", x, self.layers[0].input_shape)
        axes = sample_axes(self)[0]
        batches = {f"params[{i}]": tuple(array.shape[:-2]) for i, array in enumerate(given)}
        batches["x"] = tuple(x.shape[: x.ndim - axes])
        batches |= {name: tuple(array.shape[:-2]) for name, array in self.likelihood._constants().items()}
        _arrays.broadcast_batch(batches)
        return xp, given

    def _check_pass(self, params: Params, trace: Trace, arrays: dict[str, Array]) -> tuple[Array, ...]:
        if not isinstance(trace, Trace) or len(trace.rows) != len(self.layers):
            raise TypeError(f"trace must be what forward returns for this network, got {_arrays.describe(trace)}")
        _arrays.check_arrays(arrays | {"the outputs": trace.output})
        return self._check_tangent("params", params, {"the outputs": trace.output})


def check_inputs(name: str, x: Array, core: Shape) -> None:
    """Raise ValueError unless these are inputs of a shape, and at least one."""
    shape = tuple(x.shape)
    if len(shape) <= len(core) or shape[len(shape) - len(core) :] != core:
        raise ValueError(
            f"{name} must have shape (*batch, N, {', '.join(map(str, core))}) to match the network's input, got {shape}"
        )
    if shape[-len(core) - 1] == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {shape}")


def check_samples(net: Network, x: Array, y: Array, names: tuple[str, str] = ("x", "y")) -> None:
    """Raise ValueError unless the shapes of inputs and targets fit the network and each other."""
    check_inputs(names[0], x, net.layers[0].input_shape)
    samples = x.shape[x.ndim - sample_axes(net)[0]]
    if net.likelihood.name != "categorical":
        _arrays.check_core(names[1], y, (samples, net.n_outputs), f"to match {names[0]} and the network's outputs")
    elif y.ndim < 1 or y.shape[-1] != samples:
        raise ValueError(
            f"{names[1]} must hold class numbers of shape (*batch, {samples}) to match {names[0]}, got {tuple(y.shape)}"
        )


def sample_axes(net: Network) -> tuple[int, int]:
    """How many axes the samples of inputs and of targets have, counted from the end."""
    return len(net.layers[0].input_shape) + 1, 1 if net.likelihood.name == "categorical" else 2


def _check_layers(layers: Sequence[Dense | Conv2d]) -> tuple[Dense | Conv2d, ...]:
    chain = _arrays.check_sequence("layers", layers, "a tuple or list of layers, first layer first")
    for i, layer in enumerate(chain):
        if not isinstance(layer, Dense | Conv2d):
            raise TypeError(f"layers[{i}] must be a Dense or a Conv2d, got {_arrays.describe(layer)}")
        if not i:
            continue
        before = chain[i - 1].output_shape
        fits = layer.input_shape == before if isinstance(layer, Conv2d) else layer.n_in == math.prod(before)
        if not fits:
            raise ValueError(f"layers[{i}] must take what layers[{i - 1}] gives, {before}, got {layer}")
    if not isinstance(chain[-1], Dense):
        raise ValueError(f"layers must end with a Dense, got {chain[-1]}")
    return chain


def _check_activations(activations: str | Sequence[str], hidden: int) -> tuple[str, ...]:
    if isinstance(activations, str):
        return (check_activation("activation", activations),) * hidden
    if not isinstance(activations, tuple | list):
        raise TypeError(f"activation must be a name or a tuple of names, got {_arrays.describe(activations)}")
    if len(activations) != hidden:
        raise ValueError(f"activation must have one name for each of {hidden} hidden layers, got {len(activations)}")
    return tuple(check_activation(f"activation[{i}]", name) for i, name in enumerate(activations))
