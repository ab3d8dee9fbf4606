"""The declaration of what works on which library is true.

The rooms' own tests run on the libraries that all rows name. Here every row is called
inside `jax.jit` and on Dask where it says that it can be.
"""

from typing import Any

import numpy as np
import pytest
from backends import DASK, JAX_JIT, NUMPY

import natgrad_array as ng
from natgrad_array import _support
from natgrad_array.optimizers.presets import PRESETS

RNG = np.random.default_rng(3)
X, Y = RNG.standard_normal((2, 20, 4)), RNG.standard_normal((2, 20, 3))
MOMENT, NOISE = X.mT @ X / 20, np.eye(3) + 0.1
WEIGHTS = (RNG.standard_normal((2, 5, 4)), RNG.standard_normal((2, 3, 5)))
TANGENT = tuple(RNG.standard_normal(w.shape) for w in WEIGHTS)
MODES = np.asarray([0.2, 0.5])


def on_network(function, **options):
    """Call a function of weights and task, with the task made inside."""

    def call(w1, w2, x, y):
        return function((w1, w2), ng.GaussianTask.from_samples(x, y), **options)

    return call, (*WEIGHTS, X, Y)


def on_fisher(fisher):
    def call(w1, w2, x, y, d1, d2):
        f = fisher((w1, w2), ng.GaussianTask.from_samples(x, y))
        return (
            f.matvec((d1, d2)),
            f.to_dense(),
            f.block(0, 1),
            f.rank(),
            f.spectrum()[..., :-1],
            f.precondition((d1, d2)),
        )

    return call, (*WEIGHTS, X, Y, *TANGENT)


def on_draw(function):
    """Shapes alone can agree between sources of randomness; a seed is not one inside jit."""

    def call(x):
        rng = 0
        if type(x).__module__.startswith("jax"):
            import jax

            rng = jax.random.key(0)
        return tuple(0.0 * w for w in function(rng, (4, 5, 3), (2,), like=x))

    return call, (X,)


def on_moments(x, y):
    moments = ng.Moments.from_samples(x).merge(ng.Moments.from_samples(y)).discount(0.5)
    return moments.mean, moments.second_moment(), moments.covariance(correction=1)


def check_layerwise(w1, w2, x, y):
    task = ng.GaussianTask.from_samples(x, y)
    fisher = ng.deep_linear.fisher((w1, w2), task)
    report = ng.check_preconditioner(fisher.precondition, (w1, w2), task)
    return report.residual, report.cosine, report.length


dl, nn, opts = ng.deep_linear, ng.networks, ng.optimizers
IMAGES = RNG.standard_normal((2, 6, 4, 4, 2))
CLASSES = np.asarray([0, 1, 2, 1, 0, 2])
MLP = nn.MLP((4, 5, 3), activation="softplus", likelihood="bernoulli")
CONVNET = nn.ConvNet((4, 4, 2), (3,), (3,), stride=2, padding=1, likelihood="categorical")
PARAMS, FILTERS = MLP.init(1, (2,), like=X), CONVNET.init(2, (2,), like=X)


def on_params(net, function):
    """Call a function of parameters, inputs and targets."""
    params, x, y = (PARAMS, X, (Y > 0) + 0.0) if net is MLP else (FILTERS, IMAGES, CLASSES)
    return lambda a, b, x, y: function(net, (a, b), x, y), (*params, x, y)


def passes_of(net, params, x, y):
    trace = net.forward(params, x)
    errors = net.tangent(params, trace, params)
    return net.loss(params, x, y), net.gradient(params, x, y), errors, net.cotangent(params, trace, errors)


def fisher_of(fisher):
    def call(net, params, x, y):
        f = fisher(net, params, x, y)
        return (
            f.to_dense(),
            f.matvec(params),
            f.precondition(params, damping=0.1),
            f.precondition(params, inverse="moore_penrose", rtol=1e-6),
            f.spectrum(),
            f.rank(rtol=1e-6),
        )

    return call


def drawn(net, params, x, y):
    """Noise already drawn is the same everywhere."""
    noise = np.random.default_rng(0).standard_normal((3, 2, 20, 3, 2))
    xp = ng.linalg._arrays.namespace(x)
    estimate = ng.sampled_fisher(net, params, x, xp.asarray(noise), n_samples=3)
    return estimate.to_dense(), estimate.standard_error()


def trained(make):
    """Two steps of an optimizer with noise already drawn."""

    def call(net, params, x, y):
        optimizer = make()
        samples = int(np.ceil(optimizer.estimate.share * x.shape[-2]))
        xp = ng.linalg._arrays.namespace(x)
        noise = xp.asarray(np.random.default_rng(0).standard_normal((1, 2, samples, 3, 2)))
        state = optimizer.init(net, params)
        for _ in range(2):
            params, state, info = optimizer.step(net, params, state, x, y, noise)
        return params, info.loss, info.damping

    return call


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "second_moment": (ng.second_moment, (X, Y)),
    "covariance": (lambda x: (ng.covariance(x, correction=1), ng.covariance(x, shrinkage="oas")), (X,)),
    "Moments": (on_moments, (X, X[:, 3:])),
    "pinvh": (ng.pinvh, (MOMENT,)),
    "precondition": (
        lambda g, a, b: ng.precondition(g, a, b, damping=0.1),
        (Y[:, :3, :].mT @ X[:, :3, :], NOISE, MOMENT),
    ),
    "GaussianTask": (lambda x, y: ng.GaussianTask.from_samples(x, y).optimum(), (X, Y)),
    "adapters.kronecker_factors": (
        lambda a, b, x, y: tuple(tuple(pair) for pair in ng.adapters.kronecker_factors([a, b], [x, y])),
        (X, Y, Y, X),
    ),
    "adapters.precondition": (
        lambda g, a, b: tuple(
            ng.adapters.precondition([g], [(a, b)], damping=0.1, inverse=inverse)
            for inverse in ("factored", "tikhonov", "root")
        ),
        (WEIGHTS[1] @ WEIGHTS[0], MOMENT + np.eye(4), NOISE),
    ),
    "check_preconditioner": (check_layerwise, (*WEIGHTS, X, Y)),
    "deep_linear.gaussian": on_draw(dl.gaussian),
    "deep_linear.small": on_draw(dl.small),
    "deep_linear.orthogonal": on_draw(dl.orthogonal),
    "deep_linear.balanced": on_draw(dl.balanced),
    "deep_linear.regime": (lambda *weights: dl.regime(weights), WEIGHTS),
    "deep_linear.end_to_end": (lambda *weights: dl.end_to_end(weights), WEIGHTS),
    "deep_linear.end_to_end_velocity": (lambda a, b, c, d: dl.end_to_end_velocity((a, b), (c, d)), WEIGHTS + TANGENT),
    "deep_linear.end_to_end_kernel": (lambda *weights: dl.end_to_end_kernel(weights), WEIGHTS),
    "deep_linear.balancedness": (lambda *weights: dl.balancedness(weights), WEIGHTS),
    "deep_linear.loss": on_network(dl.loss),
    "deep_linear.excess_loss": on_network(dl.excess_loss),
    "deep_linear.gradient": on_network(dl.gradient),
    "deep_linear.fisher": on_fisher(dl.fisher),
    "deep_linear.DeepLinearFisher": on_fisher(dl.DeepLinearFisher),
    "deep_linear.natural_gradient": on_network(
        lambda weights, task: tuple(
            dl.natural_gradient(weights, task, inverse=inverse)
            for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal")
        )
    ),
    "deep_linear.exact_velocity": on_network(dl.exact_velocity),
    "deep_linear.projections": on_network(dl.projections),
    "deep_linear.natural_gradient_flow": (
        lambda w, x, y: dl.natural_gradient_flow(w, ng.GaussianTask.from_samples(x, y), 0.5),
        (WEIGHTS[1] @ WEIGHTS[0], X, Y),
    ),
    "deep_linear.natural_gradient_flow_modes": (
        lambda a, s: dl.natural_gradient_flow_modes(a, s, 0.5),
        (MODES, 2 * MODES),
    ),
    "deep_linear.gradient_flow_modes": (lambda a, s: dl.gradient_flow_modes(a, s, 0.5, depth=3), (MODES, 2 * MODES)),
    "deep_linear.euler_decay_rate": (dl.euler_decay_rate, (MODES,)),
    "networks.MLP": on_params(MLP, passes_of),
    "networks.ConvNet": on_params(CONVNET, passes_of),
    "networks.Network": on_params(
        CONVNET, lambda net, params, x, y: net.backward(params, t := net.forward(params, x), t.output)
    ),
    "networks.Dense": (lambda w, x: nn.Dense(4, 5).forward(w, nn.Dense(4, 5).rows(x)), (PARAMS[0], X)),
    "networks.Conv2d": (lambda w, x: CONVNET.layers[0].forward(w, CONVNET.layers[0].rows(x)), (FILTERS[0], IMAGES)),
    "networks.Layer": (lambda w, e: MLP.layers[1].backward(w, e[..., None, :]), (PARAMS[1], Y)),
    "networks.Likelihood": (nn.Categorical().metric_root, (Y,)),
    "networks.Trace": on_params(MLP, lambda net, params, x, y: net.forward(params, x)),
    "networks.Gaussian": (lambda noise, x, y: nn.Gaussian(noise).residual(x, y), (NOISE, Y, 2 * Y)),
    "networks.Bernoulli": (nn.Bernoulli().loss, (Y, (Y > 0) + 0.0)),
    "networks.Categorical": (nn.Categorical().metric, (Y, 2 * Y)),
    "NetworkFisher": on_params(CONVNET, fisher_of(lambda net, params, x, y: ng.NetworkFisher(net, params, x))),
    "FisherEstimate": on_params(MLP, drawn),
    "FisherComparison": on_params(
        MLP,
        lambda net, params, x, y: net.fisher(params, x).compare(
            ng.empirical_fisher(net, params, x, y), params, damping=0.1
        ),
    ),
    "sampled_fisher": on_params(MLP, drawn),
    **{f"optimizers.{name}": on_params(MLP, trained(make)) for name, make in PRESETS.items()},
    "optimizers.Optimizer": on_params(MLP, trained(lambda: opts.Optimizer(opts.Empirical(), opts.MoorePenrose(1e-6)))),
    "optimizers.prune": on_params(MLP, lambda net, params, x, y: tuple(opts.prune(net, params, x, damping=0.1))),
    "optimizers.saliencies": on_params(MLP, lambda net, params, x, y: opts.saliencies(net, params, x, damping=0.1)),
    "empirical_fisher": on_params(MLP, fisher_of(ng.empirical_fisher)),
}
ROWS = {row.name: row for row in _support.SUPPORT}


def flatten(value):
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, tuple | list) else [value]


def compare(name, backend):
    call, arrays = CALLS[name]
    expected = flatten(call(*arrays))
    actual = flatten(backend.call(call, *(backend.asarray(array) for array in arrays)))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, str):
            assert a == e
        elif isinstance(a, np.ndarray):  # what lives on the host
            np.testing.assert_allclose(a, e, atol=1e-10)
        else:
            np.testing.assert_allclose(backend.to_numpy(a), NUMPY.to_numpy(e), atol=1e-10)


def test_every_row_is_called():
    assert set(CALLS) == {name for name, row in ROWS.items() if row.jit or "dask" in row.libraries}


@pytest.mark.parametrize("name", [name for name in CALLS if ROWS[name].jit])
def test_jit(name):
    compare(name, JAX_JIT)


@pytest.mark.parametrize("name", [name for name in CALLS if "dask" in ROWS[name].libraries])
def test_dask(name):
    compare(name, DASK)
