"""Nonlinear networks in plain JAX, differentiated by JAX: what the tests hold the package against.

Layers are written with JAX's own convolution, activations and losses; nothing comes from the
package but the description of a network. Everything is float64 and unbatched.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_array.networks import MLP, Conv2d, ConvNet, Gaussian, Network

ACTIVATIONS = {
    "identity": lambda z: z,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}
NOISE = np.asarray([[1.0, 0.4, 0.0], [0.4, 2.0, -0.3], [0.0, -0.3, 0.5]])


def apply(net: Network, params: Any, x: Any) -> Any:
    """Outputs of a network, (N, n_L)."""
    a = jnp.asarray(x)
    for i, (layer, w) in enumerate(zip(net.layers, params, strict=True)):
        if isinstance(layer, Conv2d):
            kernel = w[:, :-1].reshape(layer.channels, *layer.kernel_size, layer.image_shape[-1])
            a = jax.lax.conv_general_dilated(
                a,
                kernel.transpose(1, 2, 3, 0),
                layer.stride,
                [(p, p) for p in layer.padding],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        else:
            a = a.reshape(a.shape[0], -1) @ w[:, :-1].T
        a = a + w[:, -1]
        if i < len(net.layers) - 1:
            a = ACTIVATIONS[net.activations[i]](a)
    return a


def losses(net: Network, f: Any, y: Any) -> Any:
    """Loss of each sample from its outputs."""
    if net.likelihood.name == "gaussian":
        noise = getattr(net.likelihood, "noise_covariance", None)
        noise = jnp.eye(f.shape[-1]) if noise is None else jnp.asarray(noise)
        return 0.5 * jnp.sum((y - f) * jnp.linalg.solve(noise, (y - f).T).T, axis=-1)
    if net.likelihood.name == "bernoulli":
        return -jnp.sum(y * jax.nn.log_sigmoid(f) + (1 - y) * jax.nn.log_sigmoid(-f), axis=-1)
    return -jnp.take_along_axis(jax.nn.log_softmax(f), y[:, None], axis=-1)[:, 0]


class Case(NamedTuple):
    """A network with parameters and data, all NumPy."""

    net: Network
    params: tuple[np.ndarray, ...]
    x: np.ndarray
    y: np.ndarray


class Truth(NamedTuple):
    """What JAX computes of a case."""

    output: np.ndarray
    loss: np.ndarray
    gradient: tuple[np.ndarray, ...]
    tangent: np.ndarray
    jacobian: np.ndarray
    """(N, n_L, P), layers in order, columns stacked."""
    metric: np.ndarray
    """(N, n_L, n_L), second derivatives of the losses by the outputs."""

    @property
    def fisher(self) -> np.ndarray:
        return np.einsum("nap,nab,nbq->pq", self.jacobian, self.metric, self.jacobian) / len(self.jacobian)


def make(net: Network, samples: int = 5, seed: int = 0) -> Case:
    """Parameters with biases, inputs and targets for a network."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, *net.layers[0].input_shape))
    params = tuple(w + 0.3 * rng.standard_normal(w.shape) for w in net.init(rng, like=x))
    y = rng.standard_normal((samples, net.n_outputs))
    if net.likelihood.name == "bernoulli":
        y = (y > 0.0) + 0.0
    if net.likelihood.name == "categorical":
        y = y.argmax(axis=-1)
    return Case(net, params, x, y)


NETS: dict[str, Network] = {
    **{
        f"MLP {activation} {likelihood}": MLP((3, 4, 4, 3), activation=activation, likelihood=likelihood)
        for activation, likelihood in [
            *(("tanh", likelihood) for likelihood in ("gaussian", "bernoulli", "categorical")),
            ("identity", "gaussian"),
            ("relu", "categorical"),
            ("sigmoid", "bernoulli"),
            ("softplus", "gaussian"),
            ("gelu", "categorical"),
        ]
    },
    "MLP noise": MLP((4, 6, 3), activation="softplus", noise_covariance=NOISE),
    "one layer": MLP((4, 3), likelihood="categorical"),
    "one unit": MLP((3, 1, 3, 1), activation=("sigmoid", "tanh"), likelihood="bernoulli"),
    "wide output": MLP((2, 3, 8), likelihood="categorical"),
    "ConvNet tanh gaussian": ConvNet((4, 5, 2), (3,), (3,), noise_covariance=NOISE),
    "ConvNet relu categorical": ConvNet(
        (5, 4, 1), (2, 3), (4, 3), kernel_size=[2, (3, 2)], padding=[1, 0], activation="relu", likelihood="categorical"
    ),
    "ConvNet mixed bernoulli": ConvNet(
        (6, 7, 2),
        (2, 2),
        (3, 2),
        stride=[(2, 1), 2],
        padding=[(0, 2), (1, 0)],
        kernel_size=[3, (2, 4)],
        activation=("gelu", "sigmoid", "softplus"),
        likelihood="bernoulli",
    ),
    "ConvNet small": ConvNet((4, 3, 2), (2,), (3,), padding=(0, 1), activation="gelu", likelihood="categorical"),
    "ConvNet stride beyond kernel": ConvNet((7, 5, 1), (2,), (2,), kernel_size=1, stride=(3, 2), activation="identity"),
}
#: For what is compiled anew by each library.
TWO = ["MLP noise", "ConvNet small"]
FEW = ["MLP tanh gaussian", "MLP gelu categorical", "MLP noise", "ConvNet mixed bernoulli"]


@functools.cache
def case(name: str) -> Case:
    return make(NETS[name], seed=len(name))


def vec(w: Any) -> Any:
    return w.T.reshape(-1)


def stack(tangent: Any) -> np.ndarray:
    """All layers' columns, one under the other."""
    return np.concatenate([np.asarray(d).T.reshape(-1) for d in tangent])


def tangent_of(params: Any, seed: int = 7) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(w.shape) for w in params)


@functools.cache
def truth(name: str) -> Truth:
    """The derivatives of a case, by JAX."""
    return differentiate(case(name))


def differentiate(given: Case) -> Truth:
    net, params, x, y = given
    shapes = [w.shape for w in params]

    def unstack(theta: Any) -> tuple[Any, ...]:
        parts = jnp.split(theta, np.cumsum([m * n for m, n in shapes])[:-1])
        return tuple(part.reshape(n, m).T for part, (m, n) in zip(parts, shapes, strict=True))

    def everything(params: Any, moved: Any) -> tuple[Any, ...]:
        def mean(params: Any) -> Any:
            return jnp.mean(losses(net, apply(net, params, x), y))

        output, tangent = jax.jvp(lambda p: apply(net, p, x), (params,), (moved,))
        theta = jnp.concatenate([vec(w) for w in params])
        jacobian = jax.jacfwd(lambda t: apply(net, unstack(t), x))(theta)
        metric = jax.vmap(jax.hessian(lambda f, y: losses(net, f[None], y[None])[0]))(output, jnp.asarray(y))
        return output, mean(params), jax.grad(mean)(params), tangent, jacobian, metric

    found = jax.jit(everything)(tuple(map(jnp.asarray, params)), tuple(map(jnp.asarray, tangent_of(params))))
    return Truth(*jax.tree_util.tree_map(np.asarray, found))


def on(backend: Any, given: Case, dtype: Any = np.float64) -> tuple[Network, Any, Any, Any]:
    """A case in the arrays of a backend."""
    net, params, x, y = given
    noise = getattr(net.likelihood, "noise_covariance", None)
    if noise is not None:
        noise = backend.asarray(np.asarray(noise).astype(dtype))
        net = Network(net.layers, net.activations, Gaussian(noise))
    y = backend.asarray(y if net.likelihood.name == "categorical" else y.astype(dtype))
    return net, backend.asarrays(*(w.astype(dtype) for w in params)), backend.asarray(x.astype(dtype)), y


def relative(found: Any, wanted: Any) -> float:
    """Error relative to the size of what is wanted."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape, f"{found.shape} in place of {wanted.shape}"
    scale = np.linalg.norm(wanted)
    return float(np.linalg.norm(found - wanted) / (scale if scale else 1.0))


def rows_of(name: str) -> list[np.ndarray]:
    """Homogeneous inputs of a network's layers, by plain NumPy."""
    net, params, x, _ = case(name)
    functions = {
        "tanh": np.tanh,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "softplus": lambda z: np.log1p(np.exp(z)),
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }
    rows, a = [], x
    for i, w in enumerate(params):
        rows.append(np.concatenate([a, np.ones((len(a), 1))], axis=-1))
        z = rows[-1] @ w.T
        a = functions[net.activations[i]](z) if i < len(net.activations) else z
    return rows


def deltas_of(name: str) -> list[np.ndarray]:
    """Derivatives of all outputs by each layer's pre-activations, (N, n_L, n_i): the bias columns of JAX's Jacobian."""
    jacobian, end, found = truth(name).jacobian, 0, []
    for w in case(name).params:
        end += w.size
        found.append(jacobian[..., end - w.shape[0] : end])
    return found


def ends(params: Any) -> list[int]:
    """Where each layer's parameters start in a stack of them, and where the last one's end."""
    return [0, *np.cumsum([w[0].size if w.ndim > 2 else w.size for w in params]).tolist()]
