"""Networks from elsewhere: NumPy's own, optax's and torch's, against the core and dense matrices."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from backends import Backend, compiled_if_jax
from network_reference import make, relative
from sklearn.datasets import load_digits

import natgrad_array as ng
from natgrad_array import optimizers as opts
from natgrad_array.adapters.optax import natgrad, scale_by_kronecker
from natgrad_array.networks import MLP, Conv2d, ConvNet, Gaussian, Network
from natgrad_array.optimizers.presets import PRESETS

try:
    import torch

    from natgrad_array.adapters.torch import NaturalGradient
except ModuleNotFoundError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

NOISE = np.asarray([[1.0, 0.4, 0.0], [0.4, 2.0, -0.3], [0.0, -0.3, 0.5]])
MLPS = {
    "gaussian": MLP((3, 6, 4, 3), noise_covariance=NOISE),
    "bernoulli": MLP((3, 6, 3), activation="softplus", likelihood="bernoulli"),
    "categorical": MLP((3, 5, 3), activation="gelu", likelihood="categorical"),
}
CONVS = {
    "mixed": ConvNet(
        (6, 7, 2),
        (2, 2),
        (3, 2),
        stride=[(2, 1), 2],
        padding=[(0, 2), (1, 0)],
        kernel_size=[3, (2, 4)],
        activation=("gelu", "sigmoid", "softplus"),
        likelihood="bernoulli",
    ),
    "strided": ConvNet((5, 5, 2), (3,), (4, 3), padding=1, stride=2, likelihood="categorical"),
}
NETS = MLPS | CONVS
DENSE_ONLY = {"tridiagonal_kfac"}


@functools.cache
def problem(name: str) -> Any:
    """With more samples than directions, in the parts of the batch too: bases are unique."""
    return make(NETS[name], samples=160)


def on_library(name: str, convert: Any) -> tuple[Network, Any, Any, Any]:
    net, params, x, y = problem(name)
    if name == "gaussian":
        net = Network(net.layers, net.activations, Gaussian(convert(NOISE)))
    return net, tuple(convert(w) for w in params), convert(x), convert(y)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data[:400] / 16.0, data.target[:400]


# ------------------------------------------------------------------------- factors by hand


def arrays_of(shapes: list[tuple[int, ...]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def test_factors_of_an_ensemble(backend: Backend, dtype: str) -> None:
    a = [array.astype(dtype) for array in arrays_of([(2, 7, 3), (2, 7, 4)])]
    d = [array.astype(dtype) for array in arrays_of([(2, 7, 4), (2, 7, 2)], 1)]
    inputs, errors = backend.asarrays(*a), backend.asarrays(*d)
    found = backend.call(ng.adapters.kronecker_factors, inputs, errors)
    for (A, G), rows, deltas in zip(found, a, d, strict=True):
        rows = np.concatenate([rows, np.ones_like(rows[..., :1])], -1)
        backend.check(A, inputs[0])
        tol = 1e-12 if backend.to_numpy(A).dtype == np.float64 else 1e-5
        assert relative(backend.to_numpy(A), np.einsum("bni,bnj->bij", rows, rows) / 7) <= tol
        assert relative(backend.to_numpy(G), np.einsum("bni,bnj->bij", deltas, deltas) / 7) <= tol
    assert all(G is None for _, G in ng.adapters.kronecker_factors(inputs))


@pytest.mark.parametrize("convolution", ["expand", "reduce"])
def test_factors_with_positions(backend: Backend, convolution: str) -> None:
    (a,), (d,) = arrays_of([(2, 7, 5, 3)]), arrays_of([(2, 7, 5, 2)], 1)
    given = [backend.asarray(a)], [backend.asarray(d)]
    [(A, G)] = backend.call(ng.adapters.kronecker_factors, *given, convolution=convolution, bias=False)
    if convolution == "expand":
        wanted = np.einsum("bnti,bntj->bij", a, a) / 7, np.einsum("bnti,bntj->bij", d, d) / 35
    else:
        mean, total = a.mean(axis=-2), d.sum(axis=-2)
        wanted = np.einsum("bni,bnj->bij", mean, mean) / 7, np.einsum("bni,bnj->bij", total, total) / 7
    tol = 1e-12 if backend.float64 else 1e-5
    assert relative(backend.to_numpy(A), wanted[0]) <= tol
    assert relative(backend.to_numpy(G), wanted[1]) <= tol


def test_factors_of_one_sample_are_its_outer_product() -> None:
    """A ⊗ G is exact for one sample: the score times itself."""
    a, d = arrays_of([(1, 3)]), arrays_of([(1, 2)], 1)
    [block] = ng.adapters.kronecker_factors(a, d)
    score = (d[0].T @ np.concatenate([a[0], [[1.0]]], -1)).T.reshape(-1)
    assert relative(block.to_dense(), np.outer(score, score)) <= 1e-13


@pytest.mark.parametrize("name", NETS)
def test_factors_are_those_of_the_core(name: str) -> None:
    net, params, x, y = problem(name)
    trace = net.forward(params, x)
    errors = net.backward(params, trace, net.likelihood.residual(trace.output, y))
    inputs = [rows[..., :-1] for rows in trace.rows]
    for convolution in ("expand", "reduce"):
        estimate = opts.Empirical(convolution=convolution)
        wanted = estimate.factors(estimate.observe(net, params, trace, y, None))
        for a, b in zip(ng.adapters.kronecker_factors(inputs, errors, convolution=convolution), wanted, strict=True):
            assert relative(a.forward, b.forward) <= 1e-13
            assert relative(a.backward, b.backward) <= 1e-13


# --------------------------------------------------------------------------- directions


def psd(n: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((3, n + 3, n))
    return rows.mT @ rows


def dense_inverse(A: np.ndarray, G: np.ndarray, damping: float, inverse: str) -> np.ndarray:
    """What stands for the inverse of A ⊗ G, from its definition."""
    if inverse == "factored":
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        shifted = A + pi * damping**0.5 * np.eye(len(A)), G + damping**0.5 / pi * np.eye(len(G))
        return np.linalg.inv(np.kron(*shifted))
    if inverse == "tikhonov":
        return np.linalg.inv(np.kron(A, G) + damping * np.eye(len(A) * len(G)))
    if inverse == "moore_penrose":
        return np.linalg.pinv(np.kron(A, G))
    return np.linalg.inv(np.kron(A + damping**0.5 * np.eye(len(A)), G + damping**0.5 * np.eye(len(G))))


INVERSES = ["factored", "tikhonov", "moore_penrose", "root"]


@pytest.mark.parametrize("inverse", INVERSES)
def test_directions_against_dense_inverses(backend: Backend, inverse: str) -> None:
    """Member by member, each with its damping; a bad member hurts only itself."""
    compiled_if_jax(backend)
    g, A, G = np.random.default_rng(0).standard_normal((3, 2, 3)), psd(3, 1), psd(2, 2)
    bad, damping = A.copy(), np.asarray([0.1, 1.0, 3.0])
    bad[1, 0, 0] = np.nan
    options = {} if inverse == "moore_penrose" else {"damping": backend.asarray(damping)}

    def directions(g: Any, A: Any, G: Any, **options: Any) -> Any:
        return ng.adapters.precondition([g], [(A, G)], inverse=inverse, **options)[0]

    found, beside_bad = (
        backend.to_numpy(backend.call(directions, *backend.asarrays(g, forward, G), **options)) for forward in (A, bad)
    )
    for k in range(3):
        full = dense_inverse(A[k], G[k], damping[k], inverse)
        wanted = (full @ g[k].T.reshape(-1)).reshape(3, 2).T
        assert relative(found[k], wanted) <= (1e-9 if backend.float64 else 1e-3)
    assert np.isnan(beside_bad[1]).all()
    assert relative(beside_bad[[0, 2]], found[[0, 2]]) <= (1e-10 if backend.float64 else 1e-4)


@pytest.mark.parametrize("inverse", INVERSES)
def test_directions_of_inputs_alone(inverse: str) -> None:
    g, A = np.random.default_rng(0).standard_normal((2, 3)), psd(3, 1)[0]
    damping = 0.0 if inverse == "moore_penrose" else 0.3
    [found] = ng.adapters.precondition([g], [(A, None)], damping=damping, inverse=inverse)
    wanted = (dense_inverse(A, np.eye(2), damping, inverse) @ g.T.reshape(-1)).reshape(3, 2).T
    assert relative(found, wanted) <= 1e-12


def test_directions_that_no_sample_reaches_are_dropped() -> None:
    a, d = arrays_of([(2, 5)]), arrays_of([(2, 3)], 1)
    gradient = np.random.default_rng(2).standard_normal((3, 6))
    [(A, G)] = ng.adapters.kronecker_factors(a, d)
    [found] = ng.adapters.precondition([gradient], [(A, G)], damping=0.1, inverse="root")
    assert np.linalg.matrix_rank(found, tol=1e-10) == 2
    null = np.linalg.svd(A)[0][:, 2:]
    assert np.abs(found @ null).max() <= 1e-12


def test_arguments_of_layers_that_cannot_be() -> None:
    a, d, g = [np.ones((4, 2))], [np.ones((4, 3))], [np.ones((3, 3))]
    factors = ng.adapters.kronecker_factors(a, d)
    with pytest.raises(ValueError, match="convolution must be one of 'expand', 'reduce', got 'sum'"):
        ng.adapters.kronecker_factors(a, d, convolution="sum")
    with pytest.raises(ValueError, match=r"activations\[0\] must have shape \(\*batch, N, T, n\), got \(4, 2\)"):
        ng.adapters.kronecker_factors(a, d, convolution="expand")
    with pytest.raises(ValueError, match=r"errors\[0\] must have the positions of activations\[0\], got 3 and 2"):
        ng.adapters.kronecker_factors([np.ones((4, 2, 2))], [np.ones((4, 3, 3))], convolution="expand")
    with pytest.raises(ValueError, match=r"errors\[0\] must have a row for each of the samples"):
        ng.adapters.kronecker_factors(a, [np.ones((5, 3))])
    with pytest.raises(TypeError, match="gradients must be a tuple or list with one array for each layer"):
        ng.adapters.precondition(g[0], factors)
    with pytest.raises(ValueError, match="factors must have one pair for each of 2 layers, got 1"):
        ng.adapters.precondition(g + g, factors)
    with pytest.raises(TypeError, match=r"factors\[0\] must be a pair \(A, G\), got a numpy array"):
        ng.adapters.precondition(g, [factors[0].forward])
    with pytest.raises(ValueError, match=r"factors\[0\]\[0\] must have shape .* to match the columns"):
        ng.adapters.precondition([np.ones((3, 2))], factors)
    with pytest.raises(ValueError, match=r"factors\[0\]\[1\] must have shape .* to match the rows"):
        ng.adapters.precondition([np.ones((2, 3))], factors)
    with pytest.raises(ValueError, match=r"inverse must be one of 'factored', .*, got 'best'"):
        ng.adapters.precondition(g, factors, inverse="best")
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -1\.0"):
        ng.adapters.precondition(g, factors, damping=-1.0)
    with pytest.raises(ValueError, match="damping must be 0 for inverse 'moore_penrose'"):
        ng.adapters.precondition(g, factors, damping=1.0, inverse="moore_penrose")


def test_inputs_alone_with_the_damping_by_roots() -> None:
    """The identity's eigenvalues are 1, so that the errors' part is a number."""
    net, params, x, y = problem("categorical")
    optimizer = opts.Optimizer(opts.InputsOnly(), opts.RootDamped(), opts.Fixed(1.0), opts.Damping(0.25))
    new, _, _ = optimizer.step(net, params, optimizer.init(net, params), x, y)
    rows = net.forward(params, x).rows
    for w, later, g, a in zip(params, new, net.gradient(params, x, y), rows, strict=True):
        moment = a[:, 0].T @ a[:, 0] / len(x)
        wanted = w - g @ np.linalg.inv(moment + 0.5 * np.eye(len(moment))) / 1.5
        assert relative(later, wanted) <= 1e-11


# ------------------------------------------------------------------------------- optax


RATES = {
    "foof": {"learning_rate": 2.0},
    "prong": {"learning_rate": 0.1},
    "ng_sgd": {"learning_rate": 0.1},
    "sgd": {"learning_rate": 0.5},
    "adam": {"learning_rate": 0.02},
    "bounded_kfac": {"bound": 0.1},
}


@pytest.mark.parametrize("name", PRESETS)
def test_optax_steps_are_those_of_the_core(name: str) -> None:
    """Compiled on JAX, against the core on NumPy with the same noise; and they train."""
    net = MLP((2, 3, 2))
    _, params, x, _ = make(net, samples=160)
    y = np.stack([np.sin(2 * x[:, 0]) + x[:, 1], x.sum(axis=1)], axis=1)
    optimizer, steps = PRESETS[name](**RATES.get(name, {})), 15
    transform = natgrad(optimizer, net)
    data = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> Any:
        gradient = net.gradient(params, data["x"], data["y"])
        change, state = transform.update(gradient, state, params, key=key, **data)
        return optax.apply_updates(params, change), state

    samples = int(np.ceil(optimizer.estimate.share * len(x)))
    noise = np.random.default_rng(0).standard_normal((steps, 1, samples, 2))
    first, found = net.loss(params, x, y), tuple(map(jnp.asarray, params))
    state, reference = jax.jit(transform.init)(found), optimizer.init(net, params)
    for k in range(steps):
        found, state = step(found, state, jnp.asarray(noise[k]))
        if k < 3:
            params, reference, _ = optimizer.step(net, params, reference, x, y, noise[k])
            assert max(relative(a, b) for a, b in zip(found, params, strict=True)) <= 1e-10
    assert net.loss(tuple(map(np.asarray, found)), x, y) < 0.8 * first


def test_optax_scans_over_an_ensemble() -> None:
    """A sweep over learning rates in one compiled loop, each member as by itself."""
    net, params, x, y = on_library("categorical", jnp.asarray)
    rates = jnp.asarray([0.01, 0.1])
    members = tuple(jnp.stack([w, w]) for w in params)

    def run(transform: Any, params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            change, state = transform.update(net.gradient(params, x, y), state, params, x=x, y=y)
            return (optax.apply_updates(params, change), state), None

        return jax.jit(lambda p: jax.lax.scan(step, (p, transform.init(p)), None, 4)[0][0])(params)

    found = run(natgrad(opts.foof(learning_rate=rates), net), members)
    for k, rate in enumerate((0.01, 0.1)):
        alone = run(natgrad(opts.foof(learning_rate=rate), net), params)
        assert max(relative(a[k], b) for a, b in zip(found, alone, strict=True)) <= 1e-12


def test_optax_takes_the_gradient_that_it_is_given() -> None:
    net, params, x, y = on_library("categorical", jnp.asarray)
    gradient = jax.jit(net.gradient)(params, x, y)
    transform = optax.chain(optax.clip_by_global_norm(0.01), natgrad(opts.sgd(learning_rate=0.5), net))
    update = jax.jit(functools.partial(transform.update, x=x, y=y))
    change, _ = update(gradient, transform.init(params), params)
    scale = 0.005 / np.sqrt(sum(float(jnp.sum(g**2)) for g in gradient))
    for a, g in zip(change, gradient, strict=True):
        assert relative(a, -scale * g) <= 1e-10


def flax_like(params: Any) -> dict[str, Any]:
    return {
        f"dense{i}": {"kernel": jnp.asarray(w[:, :-1].T), "bias": jnp.asarray(w[:, -1])} for i, w in enumerate(params)
    }


CHOICES = {
    "factored": (None, None),
    "eigenbasis": (opts.RescaledEigenbasis(), opts.Empirical(average=0.5)),
    "low rank": (opts.LowRankOnline(), opts.Empirical()),
    "whitening": (opts.Whitening(), opts.InputsOnly()),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_kronecker_scaling_is_that_of_the_core(choice: str) -> None:
    """Jitted, on a tree of another framework's layout, against steps of the core on NumPy."""
    net, params, x, y = problem("categorical")
    inverse, estimate = CHOICES[choice]
    names = ["dense0", "dense1"]
    layers = dict.fromkeys(names, True) | {"scale": False}
    transform = scale_by_kronecker(layers, inverse=inverse, estimate=estimate, damping=0.1, refresh=2)
    kept = opts.Empirical(average=0.95) if estimate is None else estimate
    core = opts.Optimizer(kept, inverse or opts.FactoredTikhonov(), opts.Fixed(1.0), opts.Damping(0.1), refresh=2)
    tree = flax_like(params) | {"scale": jnp.ones(2)}
    state, reference, update = jax.jit(transform.init)(tree), core.init(net, params), jax.jit(transform.update)
    for k in range(3):
        part = slice(50 * k, 50 * (k + 1))
        trace = net.forward(params, x[part])
        errors = net.backward(params, trace, net.likelihood.residual(trace.output, y[part]))
        gradient = flax_like(net.gradient(params, x[part], y[part])) | {"scale": jnp.asarray([1.0, 2.0])}
        rows = {n: jnp.asarray(r[:, 0, :-1]) for n, r in zip(names, trace.rows, strict=True)} | {"scale": None}
        back = {n: jnp.asarray(e[:, 0]) for n, e in zip(names, errors, strict=True)} | {"scale": None}
        if not kept.has_errors:
            back = None
        found, state = update(gradient, state, tree, activations=rows, errors=back)
        new, reference, _ = core.step(net, params, reference, x[part], y[part])
        for n, before, after in zip(names, params, new, strict=True):
            assert relative(found[n]["kernel"].T, (before - after)[:, :-1]) <= 1e-8
            assert relative(found[n]["bias"], (before - after)[:, -1]) <= 1e-8
        np.testing.assert_array_equal(found["scale"], [1.0, 2.0])


def test_kronecker_scaling_of_other_layouts() -> None:
    """Kernels (n_out, n_in) and (n_in, n_out) without a bias, in tuples, with an axis of positions."""
    a, d = arrays_of([(7, 5, 3)]) + arrays_of([(7, 5, 2)], 1)
    g = np.random.default_rng(2).standard_normal((2, 3))
    factors = ng.adapters.kronecker_factors([a], [d], bias=False, convolution="expand")
    [wanted] = ng.adapters.precondition([g], factors, damping=0.1)
    for layout, kernel in (("oi", g), ("io", g.T)):
        transform = scale_by_kronecker((True,), damping=0.1, positions=True, layout=layout)

        def update(tree: Any, a: Any, d: Any, transform: Any = transform) -> Any:
            return transform.update(tree, transform.init(tree), activations=(a,), errors=(d,))[0]

        ((found,),) = jax.jit(update)(((kernel,),), a, d)
        assert relative(found if layout == "oi" else found.T, wanted) <= 1e-12


def test_kronecker_scaling_trains_a_model_of_jax() -> None:
    """A network in plain JAX with a layer of another kind; errors by autodiff of additive perturbations."""
    pixels, classes = digits()
    x, y = jnp.asarray(pixels), jnp.asarray(classes)
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "first": {"kernel": init(keys[0], (64, 12)), "bias": jnp.zeros(12)},
        "gain": jnp.ones(12),
        "last": {"kernel": init(keys[1], (12, 10)), "bias": jnp.zeros(10)},
    }

    def apply(params: Any, moved: Any) -> Any:
        z = x @ params["first"]["kernel"] + params["first"]["bias"] + moved["first"]
        a = params["gain"] * jnp.tanh(z)
        z = a @ params["last"]["kernel"] + params["last"]["bias"] + moved["last"]
        losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
        return jnp.sum(losses), {"first": x, "gain": None, "last": a}

    transform = optax.chain(
        scale_by_kronecker({"first": True, "gain": False, "last": True}, inverse=opts.Tikhonov(), damping=1e-2),
        optax.scale(-0.05),
    )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        still = {"first": jnp.zeros((400, 12)), "last": jnp.zeros((400, 10))}
        (loss, a), (gradient, errors) = jax.value_and_grad(apply, argnums=(0, 1), has_aux=True)(params, still)
        gradient = jax.tree_util.tree_map(lambda g: g / 400, gradient)
        change, state = transform.update(gradient, state, params, activations=a, errors=errors | {"gain": None})
        return optax.apply_updates(params, change), state, loss / 400

    state, losses = transform.init(params), []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert not np.allclose(params["gain"], 1.0, atol=1e-6)


def test_transformations_that_cannot_be() -> None:
    net, params, x, y = on_library("categorical", jnp.asarray)
    with pytest.raises(TypeError, match="optimizer must be an Optimizer, got str 'kfac'"):
        natgrad("kfac", net)
    with pytest.raises(TypeError, match="net must be a Network, got NoneType None"):
        natgrad(opts.kfac(), None)
    transform = natgrad(opts.kfac(), net)
    state = transform.init(params)
    with pytest.raises(TypeError, match="update must be given x, got None"):
        transform.update(params, state, params, y=y)
    with pytest.raises(TypeError, match="update must be given params, got None"):
        transform.update(params, state, x=x, y=y)
    with pytest.raises(TypeError, match="rng must be a source of randomness"):
        transform.update(params, state, params, x=x, y=y)
    with pytest.raises(ValueError, match="params must have one array for each of 2 layers, got 1"):
        transform.init(params[:1])
    with pytest.raises(ValueError, match="layers must be a tree of bool, True for one of them at least"):
        scale_by_kronecker({"a": False})
    with pytest.raises(ValueError, match="layout must be one of 'io', 'oi', got 'ii'"):
        scale_by_kronecker(True, layout="ii")
    with pytest.raises(ValueError, match="inverse must not make passes through a network, got FullFisher"):
        scale_by_kronecker(True, inverse=opts.FullFisher())
    with pytest.raises(ValueError, match="estimate must have errors"):
        scale_by_kronecker(True, inverse=opts.LowRankOnline(), estimate=opts.InputsOnly())
    scaling = scale_by_kronecker({"a": True})
    with pytest.raises(ValueError, match="params must be a tree that begins like layers"):
        scaling.init({"b": x})
    with pytest.raises(ValueError, match=r"a layer must be a kernel with two axes .*, got arrays of shapes \[\(3,\)\]"):
        scaling.init({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"layout 'io' must have a bias of shape \(2,\), got \(3,\)"):
        scaling.init({"a": (jnp.ones((3, 2)), jnp.ones(3))})
    kernel = {"a": jnp.ones((3, 2))}
    state = scaling.init(kernel)
    with pytest.raises(TypeError, match="update must be given activations, got None"):
        scaling.update(kernel, state)
    with pytest.raises(TypeError, match="update must be given errors, got None"):
        scaling.update(kernel, state, activations={"a": jnp.ones((5, 3))})
    with pytest.raises(ValueError, match=r"statistics.rows\[0\] must have shape"):
        scaling.update(kernel, state, activations={"a": jnp.ones((5, 4))}, errors={"a": jnp.ones((5, 2))})


# ------------------------------------------------------------------------------- torch


def twin(name: str) -> tuple[Network, Any, Any, Any, Any]:
    """A network of the core on tensors, its module in torch, and data for both."""
    net, params, x, y = on_library(name, torch.tensor)
    return net, params, x, y, module_of(net, params)


def module_of(net: Network, params: Any) -> Any:
    activations = {"tanh": torch.nn.Tanh(), "sigmoid": torch.nn.Sigmoid(), "softplus": torch.nn.Softplus()}
    activations["gelu"] = torch.nn.GELU(approximate="tanh")
    parts: list[Any] = [ChannelsFirst()] if isinstance(net.layers[0], Conv2d) else []
    for i, (layer, w) in enumerate(zip(net.layers, params, strict=True)):
        if isinstance(layer, Conv2d):
            kind = layer.image_shape[-1], layer.channels, layer.kernel_size, layer.stride, layer.padding
            part = torch.nn.Conv2d(*kind, dtype=torch.float64)
            kernel = w[:, :-1].reshape(layer.channels, *layer.kernel_size, -1)
            part.weight.data = torch.einsum("ohwc->ochw", kernel).contiguous()
        else:
            if i and isinstance(net.layers[i - 1], Conv2d):
                parts.append(ChannelsLast())
            part = torch.nn.Linear(layer.n_in, layer.n_out, dtype=torch.float64)
            part.weight.data = w[:, :-1].clone()
        part.bias.data = w[:, -1].clone()
        parts.append(part)
        if i < len(net.activations):
            parts.append(activations[net.activations[i]])
    return torch.nn.Sequential(*parts)


if torch is not None:

    class ChannelsFirst(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.einsum("nhwc->nchw", x)

    class ChannelsLast(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.einsum("nchw->nhwc", x).flatten(1)


def matrices(model: Any) -> list[Any]:
    """The parameters of a module in the layout of the core."""
    found = []
    for part in model.modules():
        if hasattr(part, "weight"):
            w = part.weight.detach()
            w = torch.einsum("ochw->ohwc", w).flatten(1) if w.ndim == 4 else w
            found.append(torch.cat([w, part.bias.detach()[:, None]], dim=1))
    return found


def generator(seed: int = 3) -> Any:
    return torch.Generator().manual_seed(seed)


@needs_torch
@pytest.mark.parametrize("net_name", NETS)
@pytest.mark.parametrize("name", PRESETS)
def test_torch_steps_are_those_of_the_core(name: str, net_name: str) -> None:
    if name in DENSE_ONLY and net_name in CONVS:
        return
    net, params, x, y, model = twin(net_name)
    optimizer, rng = PRESETS[name](), generator()
    adapted = NaturalGradient(model, optimizer, likelihood=net.likelihood, generator=generator())
    state = optimizer.init(net, params)
    for _ in range(3):
        loss = adapted.step(lambda: net.likelihood.loss(model(x), y))
        params, state, info = optimizer.step(net, params, state, x, y, rng)
        assert max(relative(a, b) for a, b in zip(matrices(model), params, strict=True)) <= 1e-10
        assert relative(loss, info.loss) <= 1e-10
        if info.ratio is not None:
            # The core takes a part of the batch for the whole where it can; a closure knows the whole only.
            if relative(info.new_loss, adapted.info.new_loss) <= 1e-10 or optimizer.damping.share == 1.0:
                assert abs(float(adapted.info.ratio - info.ratio)) <= 1e-7
            assert relative(adapted.info.damping, info.damping) <= 1e-12


@needs_torch
@pytest.mark.parametrize("net_name", ["gaussian", "categorical", "mixed"])
@pytest.mark.parametrize("convolution", ["expand", "reduce"])
@pytest.mark.parametrize(
    "kind",
    [
        lambda **o: opts.Empirical(share=0.5, **o),
        lambda **o: opts.ExactDirections(**o),
        lambda **o: opts.ModelSampled(n_samples=3, share=0.25, **o),
        lambda **o: opts.InputsOnly(**o),
    ],
    ids=["empirical", "exact", "sampled", "inputs"],
)
def test_factors_of_hooks_are_those_of_the_core(kind: Any, convolution: str, net_name: str) -> None:
    net, params, x, y, model = twin(net_name)
    estimate = kind(convolution=convolution)
    optimizer = opts.Optimizer(estimate, opts.Tikhonov())
    adapted = NaturalGradient(model, optimizer, likelihood=net.likelihood, generator=generator())
    net.likelihood.loss(model(x), y).backward()
    wanted = estimate.factors(estimate.observe(net, params, net.forward(params, x), y, generator()))
    found = adapted.factors()
    parts = dict(model.named_modules())
    assert list(found) == [name for name, part in parts.items() if hasattr(part, "weight")]
    for a, b in zip(found.values(), wanted, strict=True):
        assert relative(a.forward, b.forward) <= 1e-12
        assert (a.backward is None) == (b.backward is None)
        assert a.backward is None or relative(a.backward, b.backward) <= 1e-12


@needs_torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "dilation": (2, 1), "kernel_size": (2, 4)},
        {"padding": "valid", "bias": False},
        {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
        {"padding": 1, "padding_mode": "reflect", "dilation": 2},
        {"padding": "same", "padding_mode": "replicate"},
        {"padding": (0, 1), "stride": 2},
    ],
    ids=str,
)
def test_patches_times_kernels_are_the_convolution(options: dict[str, Any]) -> None:
    """Against torch's own convolution, and its gradient by autodiff."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, **({"kernel_size": 3, "dtype": torch.float64} | options))
    model, x = torch.nn.Sequential(convolution), torch.randn(5, 3, 7, 6, dtype=torch.float64)
    adapted = NaturalGradient(model, opts.bounded_kfac())
    output = model(x)
    (0.5 * output**2).sum(dim=(1, 2, 3)).mean().backward()
    statistics = adapted._statistics()
    (rows,), (deltas,), (layer,) = statistics.rows, statistics.deltas, adapted._layers
    assert relative((rows @ layer.read().T), output.detach().flatten(2).mT) <= 1e-13
    assert relative(deltas[0], output.detach().flatten(2).mT) <= 1e-13
    assert relative(torch.einsum("nti,ntj->ij", deltas[0], rows) / 5, layer.read_gradient()) <= 1e-12
    for value, parameter in zip(layer.split(layer.read()), layer.parameters, strict=True):
        assert torch.equal(value, parameter.detach())


@needs_torch
def test_tokens_of_a_sequence_are_positions() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2, dtype=torch.float64), torch.randn(6, 5, 3, dtype=torch.float64)
    adapted = NaturalGradient(model, opts.bounded_kfac(average=0.0))
    output = model(x)
    (0.5 * output**2).sum(dim=(1, 2)).mean().backward()
    [wanted] = ng.adapters.kronecker_factors([x], [output.detach()], convolution="expand")
    found = adapted.factors()[""]
    assert relative(found.forward, wanted.forward) <= 1e-13
    assert relative(found.backward, wanted.backward) <= 1e-13


def closure_of(adapted: Any, model: Any, x: Any, y: Any, full: bool = False) -> Any:
    """The loss of a batch; a full one clears gradients and calls backward, as torch's own optimizers ask for."""

    def closure() -> Any:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if full:
            adapted.zero_grad()
            loss.backward()
        return loss

    return closure


@needs_torch
def test_ways_to_call_a_step() -> None:
    """Passes made before, a closure that calls backward, and one that leaves it to the step."""
    found = []
    for way in ("before", "full", "short"):
        _, _, x, y, model = twin("categorical")
        adapted = NaturalGradient(model, opts.bounded_kfac())
        closure = closure_of(adapted, model, x, y, way != "short")
        for _ in range(3):
            if way == "before":
                closure()
                assert adapted.step() is None
            else:
                assert not adapted.step(closure).requires_grad
        found.append(matrices(model))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_torch
def test_a_closure_that_calls_backward_learns_the_damping_too() -> None:
    found = []
    for full in (True, False):
        _, _, x, y, model = twin("categorical")
        adapted = NaturalGradient(model, opts.kfac(), likelihood="categorical", generator=generator())
        for _ in range(6):
            adapted.step(closure_of(adapted, model, x, y, full))
        found.append([*matrices(model), adapted.info.damping])
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) <= 1e-10


def digits_model(kind: str) -> tuple[Any, Any, Any]:
    pixels, classes = digits()
    x, y = torch.tensor(pixels, dtype=torch.float32), torch.tensor(classes)
    torch.manual_seed(0)
    if kind == "mlp":
        return torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Tanh(), torch.nn.Linear(10, 10)), x, y
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2, padding=1),
        torch.nn.ReLU(inplace=True),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    return model, x.reshape(-1, 1, 8, 8), y


@needs_torch
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", PRESETS)
def test_torch_trains_on_digits(name: str, kind: str) -> None:
    if name in DENSE_ONLY and kind == "conv":
        return
    model, x, y = digits_model(kind)
    adapted = NaturalGradient(model, PRESETS[name](**RATES.get(name, {})), likelihood="categorical")
    losses = [float(adapted.step(closure_of(adapted, model, x, y))) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


@needs_torch
@pytest.mark.parametrize("name", ["kfac", "ekfac", "ng_sgd", "adam"])
def test_state_on_disk(name: str) -> None:
    """Training that is cut in two ends where it would have, to the last bit; no code is unpickled."""

    def parts() -> tuple[Any, Any, Any]:
        model, x, y = digits_model("mlp")
        model = torch.nn.Sequential(torch.nn.LayerNorm(64), *model)
        options = {"refresh": 3} if name in ("kfac", "ekfac") else {}
        made = NaturalGradient(model, PRESETS[name](**options), likelihood="categorical", generator=generator())
        return model, made, lambda: torch.nn.functional.cross_entropy(model(x), y)

    model, adapted, closure = parts()
    for _ in range(4):
        adapted.step(closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": adapted.state_dict()}, file)
    for _ in range(4):
        adapted.step(closure)

    again, later, closure = parts()
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.load_state_dict(loaded["model"])
    later.load_state_dict(loaded["optimizer"])
    for _ in range(4):
        later.step(closure)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="state_dict must be of the same layers and choices, with shapes"):
        NaturalGradient(model, opts.foof()).load_state_dict({**loaded["optimizer"], "natural_gradient": []})
    with pytest.raises(ValueError, match="state_dict must be what state_dict returned, got no 'natural_gradient'"):
        later.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@needs_torch
def test_other_parameters_have_an_optimizer_of_their_own() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2), torch.nn.PReLU()
    )
    model[2].weight.requires_grad_(False)
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    before = copy.deepcopy(model)
    others = functools.partial(torch.optim.SGD, lr=0.5)
    adapted = NaturalGradient(model, opts.foof(), others=others, skip=["3"])
    (0.5 * (model(x) - y) ** 2).sum(dim=1).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    adapted.step()
    assert [layer.name for layer in adapted._layers] == ["0"]
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if name == "2.weight":
            assert torch.equal(p, old)
        elif not name.startswith("0."):
            assert torch.equal(p, old - 0.5 * gradients[name])
        else:
            assert not torch.equal(p, old)
    adapted.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@needs_torch
def test_schedules_scale_the_step() -> None:
    found = []
    for rate in (1.0, 0.25):
        _, params, x, y, model = twin("categorical")
        adapted = NaturalGradient(model, opts.natural_gradient(), likelihood="categorical", generator=generator())
        schedule = torch.optim.lr_scheduler.LambdaLR(adapted, lambda _, rate=rate: rate)
        adapted.step(closure_of(adapted, model, x, y))
        schedule.step()
        found.append([a - b for a, b in zip(matrices(model), params, strict=True)])
    for whole, part in zip(*found, strict=True):
        assert relative(part, 0.25 * whole) <= 1e-12


@needs_torch
def test_copies_of_a_model_are_free() -> None:
    """Copied and pickled models keep working and leave the optimizer alone; so does one without its optimizer."""
    net, _, x, y, model = twin("categorical")
    adapted = NaturalGradient(model, opts.foof())
    loss = net.likelihood.loss(model(x), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        net.likelihood.loss(other(x[:5]), y[:5]).backward()
    loss.backward()
    with torch.no_grad():
        model(x[:7])
    adapted.step()
    hooks = [part._forward_hooks for part in model.modules()]
    assert any(hooks)
    del adapted
    gc.collect()
    assert not any(hooks)
    model(x)


@needs_torch
def test_dropout_is_drawn_once() -> None:
    """Errors of the model's own go back through the pass that the loss is of."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 2))
    adapted = NaturalGradient(model, opts.natural_gradient(), likelihood="gaussian")
    output = model(torch.ones(10, 3))
    (0.5 * output**2).sum(dim=1).mean().backward()
    statistics = adapted._statistics()
    dropped = statistics.rows[1][:, 0, :-1] == 0.0
    assert dropped.any()
    assert torch.equal(statistics.deltas[0][0, :, 0] == 0.0, dropped)


@needs_torch
def test_modules_that_cannot_be() -> None:
    linear = torch.nn.Linear(3, 2)
    x = torch.ones(5, 3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str 'model'"):
        NaturalGradient("model", opts.foof())
    with pytest.raises(TypeError, match="optimizer must be an Optimizer, got str 'kfac'"):
        NaturalGradient(linear, "kfac")
    with pytest.raises(ValueError, match=r"model must have an nn.Linear or an nn.Conv2d to precondition, got none"):
        NaturalGradient(torch.nn.Conv2d(2, 2, 1, groups=2), opts.foof())
    with pytest.raises(ValueError, match=r"likelihood must be one of 'gaussian', .* for ModelSampled"):
        NaturalGradient(linear, opts.natural_gradient())
    quadratic = opts.Optimizer(opts.Empirical(), opts.Tikhonov(), opts.QuadraticModel())
    with pytest.raises(ValueError, match=r"likelihood must be one of .* for \(QuadraticModel"):
        NaturalGradient(linear, quadratic)
    with pytest.raises(ValueError, match=r"likelihood must be one of .*, got 'poisson'"):
        NaturalGradient(linear, opts.kfac(), likelihood="poisson")
    with pytest.raises(ValueError, match="optimizer must not have the inverse FullFisher"):
        NaturalGradient(linear, opts.Optimizer(inverse=opts.FullFisher()))
    with pytest.raises(ValueError, match="skip must be a collection of names of the model's modules, got 'last'"):
        NaturalGradient(linear, opts.foof(), skip="last")
    with pytest.raises(TypeError, match=r"bias must have dtype float32 or float64|weight must have dtype float32"):
        NaturalGradient(torch.nn.Linear(3, 2, dtype=torch.float16), opts.foof())
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="layer '0' must not share parameters with another module"):
        NaturalGradient(tied, opts.foof())
    for part in (torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(2)):
        with pytest.raises(ValueError, match="model must give the same outputs when it is run again"):
            NaturalGradient(torch.nn.Sequential(linear, part), opts.kfac(), likelihood="gaussian")
    with pytest.raises(ValueError, match="param_group must not be added"):
        NaturalGradient(linear, opts.foof()).add_param_group({"params": [torch.nn.Parameter(x)]})


if torch is not None:

    class Twice(torch.nn.Module):
        """A layer called twice, one that is not called, and one without influence."""

        def __init__(self, way: str) -> None:
            super().__init__()
            self.way, self.shared, self.rest = way, torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            if self.way == "twice":
                return self.rest(self.shared(self.shared(x)))
            if self.way == "backwards":
                return self.shared(self.rest(x))
            if self.way == "flat":
                return self.rest(self.shared(torch.cat([x, x]))).reshape(2, 5, 3).sum(dim=0)
            return self.shared(x) + (0.0 if self.way == "never" else self.rest(x).detach())


@needs_torch
def test_passes_that_cannot_be() -> None:
    x = torch.ones(5, 3)

    def passes(way: str, optimizer: Any = None, **options: Any) -> Any:
        model = Twice(way)
        adapted = NaturalGradient(model, opts.foof() if optimizer is None else optimizer, **options)
        model(x).sum(dim=1).mean().backward()
        return model, adapted

    with pytest.raises(RuntimeError, match="layer 'shared' was called twice in one forward pass"):
        passes("twice")
    passes("twice", skip=["shared"])[1].step()
    with pytest.raises(RuntimeError, match="layer 'rest' was not called in the forward pass; name it in skip"):
        passes("never")[1].step()
    with pytest.raises(RuntimeError, match="layer 'rest' has no influence on the loss; name it in skip"):
        passes("detached")[1].step()
    model, adapted = passes("detached", skip=["rest"])
    with torch.no_grad():
        model(x)
    adapted.step()
    model(x).sum(dim=1).mean().backward()
    model(x)
    with pytest.raises(RuntimeError, match=r"another forward pass .* between backward and step, .*torch.no_grad\(\)"):
        adapted.step()
    adapted.zero_grad()
    loss = model(x).sum()
    model(x)
    loss.backward()
    with pytest.raises(
        RuntimeError, match=r"another forward pass .* between the forward pass of the loss and backward"
    ):
        adapted.step()
    chain = opts.Optimizer(opts.Empirical(), opts.BlockTridiagonal())
    with pytest.raises(RuntimeError, match=r"layers must be called in the order of the model .*, got rest, shared"):
        passes("backwards", chain)[1].step()
    with pytest.raises(RuntimeError, match="layer 'shared' must be called with the 5 samples on the first"):
        passes("flat", likelihood="gaussian")[1].step()
    model, adapted = passes("backwards")
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="got 2 backward passes since the last step or zero_grad"):
        adapted.step()
    adapted.zero_grad()
    with pytest.raises(RuntimeError, match="got 0 backward passes since the last step or zero_grad"):
        adapted.step()
    model(x).sum().backward()
    adapted.step()
    with pytest.raises(RuntimeError, match="got 0 backward passes"):
        adapted.factors()
    with pytest.raises(TypeError, match="closure must return the loss, a tensor, got float"):
        adapted.step(lambda: 1.0)
    with pytest.raises(ValueError, match=r"closure must compute the loss for LevenbergMarquardt.*, got None"):
        passes("backwards", opts.heskes(), likelihood="gaussian")[1].step()
    model = torch.nn.Linear(3, 2)
    adapted = NaturalGradient(model, opts.foof(), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"model must give outputs of shape \(N, n_L\) for a likelihood, got a torch"):
        model(torch.ones(5, 4, 3))


@needs_torch
def test_zeroing_by_the_model_is_seen() -> None:
    """A loop that clears gradients through the model and skips a step is no accumulation."""
    net, _, x, y, model = twin("categorical")
    adapted = NaturalGradient(model, opts.foof())
    for _ in range(2):
        model.zero_grad()
        net.likelihood.loss(model(x), y).backward()
    adapted.step()
