"""Networks: activations, likelihoods, layers, and the passes, against autodifferentiation."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import network_reference as ref
import numpy as np
import pytest
from backends import JAX, JAX_JIT, NUMPY, Backend, compiled_if_jax
from network_reference import FEW, NETS, TWO, case, on, relative, tangent_of, truth

from natgrad_array.networks import (
    MLP,
    Bernoulli,
    Categorical,
    Conv2d,
    ConvNet,
    Dense,
    Gaussian,
    Network,
)
from natgrad_array.networks.activations import ACTIVATIONS

POINTS = [-700.0, -40.0, -12.3, -5.0, -1.0, -1e-7, 1e-7, 0.3, 1.0, 5.0, 12.3, 40.0, 700.0]


def tolerance(x: Any, float64: float = 1e-10, float32: float = 2e-4) -> float:
    return float32 if "float32" in str(x.dtype) else float64


def passes_of(net: Network, params: Any, x: Any, y: Any, moved: Any) -> tuple[Any, ...]:
    trace = net.forward(params, x)
    tangent = net.tangent(params, trace, moved)
    return net.output(params, x), net.loss(params, x, y), net.gradient(params, x, y), tangent


# ---------------------------------------------------------------------------- activations


def _exact(name: str, z: Any) -> Any:
    exp, one = mpmath.exp, mpmath.mpf(1)
    scale, cubic = mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
    return {
        "identity": lambda z: z,
        "tanh": mpmath.tanh,
        "relu": lambda z: max(z, 0 * z),
        "sigmoid": lambda z: one / (one + exp(-z)),
        "softplus": lambda z: mpmath.log(one + exp(z)),
        "gelu": lambda z: z * (one + mpmath.tanh(scale * (z + cubic * z**3))) / 2,
    }[name](z)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_to_the_last_digits(name: str) -> None:
    """Against 60 digits, where units saturate too; what float64 cannot hold may be zero."""
    with mpmath.workdps(900 if name == "gelu" else 700):
        values = [_exact(name, mpmath.mpf(z)) for z in POINTS]
        slopes = [mpmath.diff(lambda z: _exact(name, z), mpmath.mpf(z)) for z in POINTS]
        z = np.asarray(POINTS)
        activation = ACTIVATIONS[name]
        with np.errstate(under="ignore"):
            found = activation.value(np, z), activation.slope(np, z)
        for actual, wanted in zip(found, (values, slopes), strict=True):
            for point, a, w in zip(POINTS, actual, wanted, strict=True):
                # The gelu's argument is a cube, whose rounding an exponential magnifies.
                bound = 1e-12 if name == "gelu" else 1e-14
                assert abs(mpmath.mpf(float(a)) - w) <= bound * abs(w) + mpmath.mpf("1e-300"), point


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_the_ends(backend: Backend, name: str, dtype: str) -> None:
    """Large values overflow nothing, and a NaN stays one."""
    z = backend.asarray(np.asarray([-1e30, -100.0, 0.0, 100.0, 1e30, np.nan], dtype=dtype))
    xp = backend.xp
    value, slope = (backend.call(f, xp, z) for f in ACTIVATIONS[name])
    for array in (value, slope):
        backend.check(array, z)
        host = backend.to_numpy(array)
        assert np.isfinite(host[:5]).all()
        assert np.isnan(host[5]) or (name == "identity" and array is slope)


# ---------------------------------------------------------------------------- likelihoods


def likelihoods(backend: Backend, dtype: str = "float64") -> dict[str, Any]:
    return {
        "gaussian": Gaussian(),
        "noise": Gaussian(backend.asarray(ref.NOISE.astype(dtype))),
        "bernoulli": Bernoulli(),
        "categorical": Categorical(),
    }


KINDS = list(likelihoods(NUMPY))


def targets(kind: str, outputs: np.ndarray, seed: int = 3) -> np.ndarray:
    y = np.random.default_rng(seed).standard_normal(outputs.shape).astype(outputs.dtype)
    if kind == "categorical":
        return y.argmax(axis=-1)
    return (y > 0).astype(y.dtype) if kind == "bernoulli" else y


@functools.cache
def derivatives(kind: str) -> tuple[np.ndarray, ...]:
    """Outputs and targets, with the mean loss and its two derivatives by JAX."""
    f = np.random.default_rng(0).standard_normal((5, 3)) * 2.0
    y = targets(kind, f)
    net = Network((Dense(1, 3),), (), likelihoods(NUMPY)[kind])
    losses = ref.losses(net, jnp.asarray(f), y)
    grad = jax.grad(lambda f: ref.losses(net, f, y).sum())(jnp.asarray(f))
    hessian = jax.vmap(jax.hessian(lambda f, y: ref.losses(net, f[None], y[None])[0]))(jnp.asarray(f), jnp.asarray(y))
    return f, y, *map(np.asarray, (losses.mean(), grad, hessian))


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_against_autodifferentiation(backend: Backend, kind: str, dtype: str) -> None:
    """The residual is the first derivative of the loss, the metric the second, R a root of it."""
    compiled_if_jax(backend)
    f, y, loss, grad, hessian = derivatives(kind)
    mine = likelihoods(backend, dtype)[kind]
    outputs = backend.asarray(f.astype(dtype))
    given = backend.asarray(y if kind == "categorical" else y.astype(dtype))
    v = np.random.default_rng(1).standard_normal((2, 5, 3))
    bound = tolerance(outputs, 1e-13, 1e-5)
    for found, wanted in (
        (backend.call(mine.loss, outputs, given), loss),
        (backend.call(mine.residual, outputs, given), grad),
        (backend.call(mine.metric, outputs, backend.asarray(v.astype(dtype))), np.einsum("nab,snb->sna", hessian, v)),
    ):
        backend.check(found, outputs)
        assert relative(backend.to_numpy(found), wanted) <= bound
    root = backend.to_numpy(backend.call(mine.metric_root, outputs))
    assert relative(root @ root.mT, hessian) <= bound


@pytest.mark.parametrize("scale", [30.0, 800.0])
def test_extreme_logits_keep_their_digits(scale: float) -> None:
    """Losses and residuals near 0 and near the logits themselves, against 700 digits."""
    f = np.asarray([[scale, 0.3, -scale], [0.1, -0.7, scale]])
    with mpmath.workdps(800):
        for y in ([0, 2], [2, 0], [1, 1]):
            categorical, bernoulli = Categorical(), Bernoulli()
            classes, bits = np.asarray(y), np.asarray([[y[0] > 0, 1, y[1] > 0]] * 2) + 0.0
            powers = [[mpmath.exp(mpmath.mpf(z)) for z in row] for row in f]
            p = [[value / sum(row) for value in row] for row in powers]
            wanted = -sum(mpmath.log(p[n][y[n]]) for n in range(2)) / 2
            assert abs(mpmath.mpf(float(categorical.loss(f, classes))) - wanted) <= 1e-14 * wanted + 1e-300
            found = categorical.residual(f, classes)
            for n, k in np.ndindex(2, 3):
                value = sum(p[n][j] for j in range(3) if j != k) if k == y[n] else p[n][k]
                sign = -1 if k == y[n] else 1
                assert abs(mpmath.mpf(float(found[n, k])) - sign * value) <= 1e-14 * value + 1e-300
            signed = [
                [mpmath.mpf(z) * (1 - 2 * b) for z, b in zip(*pair, strict=True)] for pair in zip(f, bits, strict=True)
            ]
            wanted = sum(mpmath.log(1 + mpmath.exp(z)) for row in signed for z in row) / 2
            assert abs(mpmath.mpf(float(bernoulli.loss(f, bits))) - wanted) <= 1e-14 * wanted
            found = bernoulli.residual(f, bits)
            for n, k in np.ndindex(2, 3):
                value = 1 / (1 + mpmath.exp(-signed[n][k]))
                assert abs(abs(mpmath.mpf(float(found[n, k]))) - value) <= 1e-14 * value + 1e-300


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_from_the_model(kind: str) -> None:
    """Means and, for Gaussian noise, covariances within 4 standard errors."""
    f = np.asarray([[0.3, -1.2, 2.0], [0.0, 0.5, -0.4]])
    count = 20_000
    like = likelihoods(NUMPY)[kind]
    drawn = like.sample(f, 5, draws=(count,))
    if kind == "categorical":
        assert drawn.shape == (count, 2)
        assert np.isdtype(drawn.dtype, "integral")
        hits = (drawn[..., None] == np.arange(3)) + 0.0
        p = np.exp(f) / np.exp(f).sum(axis=-1, keepdims=True)
    else:
        assert drawn.shape == (count, 2, 3)
        hits, p = drawn, 1 / (1 + np.exp(-f)) if kind == "bernoulli" else f
    if kind == "bernoulli":
        assert set(np.unique(drawn)) == {0.0, 1.0}
    error = hits.std(axis=0) / count**0.5
    assert np.all(np.abs(hits.mean(axis=0) - p) <= 4 * error)
    if kind in ("gaussian", "noise"):
        off = drawn - f
        noise = ref.NOISE if kind == "noise" else np.eye(3)
        products = np.einsum("sna,snb->snab", off, off)
        assert np.all(np.abs(products.mean(axis=0) - noise) <= 4 * products.std(axis=0) / count**0.5)
        assert np.all(np.abs(np.mean(off[:, 0, :, None] * off[:, 1, None, :], axis=0)) <= 4 * 2.0 / count**0.5)


def test_scores_of_samples_have_the_metric_as_their_moment() -> None:
    """What makes the sampled Fisher information unbiased, for every likelihood."""
    f = np.asarray([[0.3, -1.2, 1.0]])
    count = 40_000
    for like in likelihoods(NUMPY).values():
        scores = like.residual(f, like.sample(f, 11, draws=(count,)))[:, 0]
        root = like.metric_root(f)[0]
        products = scores[:, :, None] * scores[:, None, :]
        assert np.all(np.abs(products.mean(axis=0) - root @ root.T) <= 4 * products.std(axis=0) / count**0.5 + 1e-12)
        assert np.all(np.abs(scores.mean(axis=0)) <= 4 * scores.std(axis=0) / count**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_already_drawn_gives_the_same_targets_everywhere(backend: Backend, kind: str) -> None:
    f = np.random.default_rng(0).standard_normal((2, 4, 3))
    shape = (5, 2, 4, 3) if kind in ("gaussian", "noise") else (5, 2, 4, 3, 2)
    noise = np.random.default_rng(1).standard_normal(shape)
    wanted = likelihoods(NUMPY)[kind].sample(f, noise, draws=(5,))
    outputs, drawn = backend.asarrays(f, noise)
    like = likelihoods(backend)[kind]
    found = backend.call(like.sample, outputs, drawn, draws=(5,))
    np.testing.assert_allclose(backend.to_numpy(found), wanted, rtol=1e-5, atol=1e-5)


def test_a_jax_key_draws_inside_jit() -> None:
    key, f = jax.random.key(0), JAX.asarray(np.zeros((6, 3)))
    for like in (Gaussian(), Bernoulli(), Categorical()):
        a = jax.jit(lambda key, f, like=like: like.sample(f, key))(key, f)
        np.testing.assert_allclose(a, like.sample(f, key), rtol=1e-12)
        with pytest.raises(TypeError, match="under a JAX trace"):
            jax.jit(lambda f, like=like: like.sample(f, 0))(f)


def test_noise_of_its_own_for_each_member() -> None:
    rng = np.random.default_rng(0)
    f, y = rng.standard_normal((2, 5, 3))
    noise = np.stack([ref.NOISE, 2 * ref.NOISE, np.eye(3)])
    like = Gaussian(noise)
    for method in ("loss", "residual"):
        found = getattr(like, method)(f, y)
        for b in range(3):
            assert relative(found[b], getattr(Gaussian(noise[b]), method)(f, y)) <= 1e-14
    assert like.metric_root(f).shape == (3, 5, 3, 3)
    assert like.sample(f, 0).shape == (3, 5, 3)


# --------------------------------------------------------------------------------- layers

GEOMETRIES = [
    ((5, 5, 1), 2, 3, 1, 0),
    ((4, 6, 2), 3, (2, 3), 1, 1),
    ((7, 5, 3), 2, (3, 1), (2, 3), (1, 0)),
    ((6, 6, 1), 1, 2, 3, 0),
    ((3, 3, 2), 2, 3, 1, 0),
    ((2, 2, 1), 2, 4, 1, 1),
    ((1, 1, 4), 3, 1, 1, 0),
    ((4, 4, 2), 2, 2, 2, (0, 2)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution_against_torch(geometry: Any) -> None:
    torch = pytest.importorskip("torch")
    shape, channels, kernel, stride, padding = geometry
    layer = Conv2d(shape, channels, kernel, stride, padding)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, *shape))
    w = rng.standard_normal(layer.parameter_shape)
    t = torch.tensor(a.transpose(0, 3, 1, 2), requires_grad=True)
    kernels = torch.tensor(w[:, :-1].reshape(channels, *layer.kernel_size, shape[-1]).transpose(0, 3, 1, 2).copy())
    z = torch.nn.functional.conv2d(t, kernels, torch.tensor(w[:, -1]), layer.stride, layer.padding)
    rows = layer.rows(a)
    assert rows.shape == (4, layer.positions, layer.parameter_shape[1])
    found = layer.forward(w, rows)
    assert found.shape == (4, *layer.output_shape)
    assert relative(found, z.detach().numpy().transpose(0, 2, 3, 1)) <= 1e-14
    errors = rng.standard_normal(found.shape)
    z.backward(torch.tensor(errors.transpose(0, 3, 1, 2).copy()))
    back = layer.backward(w, errors.reshape(4, layer.positions, channels))
    assert relative(back, t.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-14


@pytest.mark.parametrize("layer", [Dense(5, 3), *(Conv2d(*g) for g in GEOMETRIES)], ids=str)
def test_tangent_is_the_transpose_of_backward(layer: Any) -> None:
    """⟨δ, dz⟩ is ⟨back, da⟩ + ⟨Σ δ ā, dW⟩, for stacks of either."""
    rng = np.random.default_rng(0)
    a, da = rng.standard_normal((2, 2, 4, *layer.input_shape))
    w, dw = rng.standard_normal((2, *layer.parameter_shape))
    errors = rng.standard_normal((2, 4, layer.positions, layer.parameter_shape[0]))
    rows = layer.rows(a)
    moved = layer.tangent(w, rows, dw, da).reshape(errors.shape)
    gradient = np.einsum("bntm,bntk->mk", errors, rows)
    left = np.sum(errors * moved)
    right = np.sum(layer.backward(w, errors) * da) + np.sum(gradient * dw)
    assert abs(left - right) <= 1e-12 * abs(left)


# ------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", NETS)
def test_against_jax(name: str) -> None:
    net, params, x, y = case(name)
    output, loss, gradient, tangent = passes_of(net, params, x, y, tangent_of(params))
    wanted = truth(name)
    assert relative(output, wanted.output) <= 1e-12
    assert relative(loss, wanted.loss) <= 1e-12
    assert relative(tangent, wanted.tangent) <= 1e-12
    for found, expected in zip(gradient, wanted.gradient, strict=True):
        assert relative(found, expected) <= 1e-10
    u = np.random.default_rng(1).standard_normal(output.shape)
    back = net.cotangent(params, net.forward(params, x), u)
    assert relative(ref.stack(back), np.einsum("na,nap->p", u, wanted.jacobian)) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_against_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    net, params, x, y = case(name)
    given = [torch.tensor(w, requires_grad=True) for w in params]
    activations = {
        "identity": lambda z: z,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        # Its softplus turns into the identity from 20 on, unless told otherwise.
        "softplus": lambda z: f.softplus(z, threshold=1000.0),
        "gelu": lambda z: f.gelu(z, approximate="tanh"),
    }
    a = torch.tensor(x)
    for i, (layer, w) in enumerate(zip(net.layers, given, strict=True)):
        if isinstance(layer, Conv2d):
            kernel = w[:, :-1].reshape(layer.channels, *layer.kernel_size, -1).permute(0, 3, 1, 2)
            a = f.conv2d(a.permute(0, 3, 1, 2), kernel, w[:, -1], layer.stride, layer.padding).permute(0, 2, 3, 1)
        else:
            a = f.linear(a.reshape(len(x), -1), w[:, :-1], w[:, -1])
        if i < len(net.layers) - 1:
            a = activations[net.activations[i]](a)
    y = torch.tensor(y)
    if net.likelihood.name == "gaussian":
        noise = getattr(net.likelihood, "noise_covariance", None)
        precision = torch.eye(a.shape[1], dtype=a.dtype) if noise is None else torch.linalg.inv(torch.tensor(noise))
        loss = 0.5 * torch.einsum("na,ab,nb->", y - a, precision, y - a) / len(x)
    elif net.likelihood.name == "bernoulli":
        loss = f.binary_cross_entropy_with_logits(a, y, reduction="sum") / len(x)
    else:
        loss = f.cross_entropy(a, y)
    loss.backward()
    assert relative(net.output(params, x), a.detach().numpy()) <= 1e-12
    assert abs(float(net.loss(params, x, case(name).y)) - float(loss.detach())) <= 1e-12 * float(loss.detach())
    for found, w in zip(net.gradient(params, x, case(name).y), given, strict=True):
        assert relative(found, w.grad.numpy()) <= 1e-10


@pytest.mark.parametrize("name", TWO)
def test_on_every_library(backend: Backend, name: str, dtype: str) -> None:
    compiled_if_jax(backend)
    net, params, x, y = on(backend, case(name), dtype)
    wanted = truth(name)
    moved = backend.asarrays(*(d.astype(dtype) for d in tangent_of(case(name).params)))
    output, loss, gradient, tangent = backend.call(passes_of, net, params, x, y, moved)
    for found, expected in ((output, wanted.output), (loss, wanted.loss), (tangent, wanted.tangent)):
        backend.check(found, x)
        assert relative(backend.to_numpy(found), expected) <= tolerance(x)
    for found, expected in zip(gradient, wanted.gradient, strict=True):
        backend.check(found, x)
        assert relative(backend.to_numpy(found), expected) <= tolerance(x)


def test_gradient_by_differences() -> None:
    """Complex steps would need complex activations; central differences of two sizes do."""
    net, params, x, y = case("ConvNet relu categorical")
    gradient = net.gradient(params, x, y)
    for i, w in enumerate(params):
        for entry in [(0, 0), (w.shape[0] - 1, w.shape[1] - 1), (0, w.shape[1] // 2)]:

            def shifted(step: float, i: int = i, entry: tuple[int, int] = entry) -> float:
                moved = [v.copy() for v in params]
                moved[i][entry] += step
                return float(net.loss(moved, x, y))

            once, twice = ((shifted(h) - shifted(-h)) / (2 * h) for h in (1e-4, 2e-4))
            assert abs((4 * once - twice) / 3 - gradient[i][entry]) <= 1e-10


# ------------------------------------------------------------------------------ ensembles


def ensemble(name: str, batch: tuple[int, ...], *, data: bool = False) -> Any:
    net, _, x, y = case(name)
    rng = np.random.default_rng(0)
    params = tuple(w + 0.1 * rng.standard_normal(w.shape) for w in net.init(rng, batch, like=x))
    if data:
        x = rng.standard_normal((*batch, *x.shape))
        y = rng.permuted(np.broadcast_to(y, (*batch, *y.shape)), axis=len(batch))
    return net, params, x, y


@pytest.mark.parametrize("data", [False, True], ids=["shared data", "own data"])
@pytest.mark.parametrize("batch", [(3,), (2, 2), (1,)], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_a_stack_is_its_members(name: str, batch: tuple[int, ...], data: bool) -> None:
    net, params, x, y = ensemble(name, batch, data=data)
    moved = tangent_of(params)
    found = passes_of(net, params, x, y, moved)
    assert found[1].shape == batch
    assert found[0].shape == (*batch, 5, net.n_outputs)
    for b in np.ndindex(*batch):
        pick = lambda a, b=b: a[b] if data else a  # noqa: E731
        alone = passes_of(net, tuple(w[b] for w in params), pick(x), pick(y), tuple(d[b] for d in moved))
        for whole, one in zip(found[:2] + found[3:], alone[:2] + alone[3:], strict=True):
            assert relative(whole[b], one) <= 1e-13
        for whole, one in zip(found[2], alone[2], strict=True):
            assert whole.shape[:-2] == batch
            assert relative(whole[b], one) <= 1e-13


@pytest.mark.parametrize("name", FEW)
def test_stacks_of_errors_and_directions_come_before_the_ensemble(name: str) -> None:
    net, params, x, _ = ensemble(name, (2,))
    trace = net.forward(params, x)
    rng = np.random.default_rng(1)
    errors = rng.standard_normal((6, *trace.output.shape))
    deltas, back = net.backward(params, trace, errors), net.cotangent(params, trace, errors)
    for delta, layer in zip(deltas, net.layers, strict=True):
        assert delta.shape == (6, 2, 5, layer.positions, layer.parameter_shape[0])
    moved = tuple(rng.standard_normal((6, *w.shape)) for w in params)
    forward = net.tangent(params, trace, moved)
    for k in range(6):
        for whole, one in zip(back, net.cotangent(params, trace, errors[k]), strict=True):
            assert relative(whole[k], one) <= 1e-13
        for whole, one in zip(deltas, net.backward(params, trace, errors[k]), strict=True):
            assert relative(whole[k], one) <= 1e-13
        assert relative(forward[k], net.tangent(params, trace, [d[k] for d in moved])) <= 1e-13
    # The two are transposes of each other.
    left = np.sum(forward * errors, axis=(-1, -2))
    right = sum(np.sum(b * d, axis=(-1, -2)) for b, d in zip(back, moved, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-10)


def test_one_set_of_parameters_on_many_data_sets_and_partly_shared_layers() -> None:
    net, params, x, y = ensemble("MLP gelu categorical", (3,), data=True)
    mixed = (params[0][0], params[1], params[2][:1])
    found = net.gradient(mixed, x, y)
    for b in range(3):
        alone = net.gradient((params[0][0], params[1][b], params[2][0]), x[b], y[b])
        for whole, one in zip(found, alone, strict=True):
            assert relative(whole[b], one) <= 1e-13


@pytest.mark.parametrize("name", TWO[1:])
def test_a_bad_sample_hurts_its_member_alone(backend: Backend, name: str) -> None:
    net, params, x, y = ensemble(name, (3,), data=True)
    x[1, 2] = np.nan
    bad = on(backend, ref.Case(net, params, x, y))
    net, params = bad[:2]
    loss, gradient = backend.call(lambda net, p, x, y: (net.loss(p, x, y), net.gradient(p, x, y)), *bad)
    assert np.isnan(backend.to_numpy(loss)).tolist() == [False, True, False]
    for g in gradient:
        host = backend.to_numpy(g)
        assert np.isnan(host[1]).all()
        assert np.isfinite(host[[0, 2]]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_member_hurts_itself_alone(value: float) -> None:
    for name in FEW:
        net, params, x, y = ensemble(name, (3,))
        params[1][1, 0, 0] = value
        loss, gradient = net.loss(params, x, y), net.gradient(params, x, y)
        assert np.isfinite(loss).tolist() == [True, False, True] or value == np.inf
        assert np.isfinite(loss[[0, 2]]).all()
        for g in gradient:
            assert np.isfinite(g[[0, 2]]).all()


def test_bad_values_of_targets() -> None:
    """Shared by all members they raise; of a stack they turn their own member to NaN."""
    net, params, x, y = ensemble("MLP tanh bernoulli", (3,), data=True)
    y[1, 0, 0] = 0.5
    assert np.isnan(net.loss(params, x, y)).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="y must hold nothing but 0 and 1"):
        net.loss(params, x, y[1])
    with pytest.raises(ValueError, match="y must hold nothing but 0 and 1"):
        net.gradient(params, x, np.nan * y[1])
    net, params, x, y = ensemble("MLP tanh categorical", (3,), data=True)
    for bad in (-1, 3):
        y[1, 0] = bad
        assert np.isnan(net.loss(params, x, y)).tolist() == [False, True, False]
        with pytest.raises(ValueError, match=r"y must hold classes from 0 to 2 .*, got -?\d+ at y\[\d+\]"):
            net.loss(params, x, y[1])
    # In a trace values cannot be looked at.
    assert np.isnan(JAX_JIT.call(net.loss, JAX.asarrays(*params), JAX.asarray(x[1]), JAX.asarray(y[1]))).all()


def test_bad_values_of_the_noise() -> None:
    for bad in (-np.eye(3), np.full((3, 3), np.nan), np.diag([1.0, 1.0, 0.0]), np.eye(3) + np.eye(3, k=1)):
        with pytest.raises(ValueError, match="noise_covariance must be finite, symmetric and positive definite"):
            MLP((2, 3), noise_covariance=bad)
        stacked = MLP((2, 3), noise_covariance=np.stack([np.eye(3), bad]))
        params = stacked.init(0, like=bad)
        loss = stacked.loss(params, np.zeros((4, 2)), np.ones((4, 3)))
        assert np.isnan(loss).tolist() == [False, True]


@pytest.mark.parametrize("name", FEW)
def test_a_dead_layer(name: str) -> None:
    """All zero: nothing passes but the biases of the layers above."""
    given = case(name)
    params = (*given.params[:-1], 0.0 * given.params[-1])
    dead = ref.Case(given.net, params, given.x, given.y)
    wanted = ref.differentiate(dead)
    assert not given.net.output(params, given.x).any()
    gradient = given.net.gradient(params, given.x, given.y)
    for found, expected in zip(gradient, wanted.gradient, strict=True):
        assert relative(found, expected) <= 1e-12
    assert not any(g.any() for g in gradient[:-1])


@pytest.mark.parametrize("name", FEW)
def test_one_sample(name: str) -> None:
    net, params, x, y = case(name)
    losses = [float(net.loss(params, x[n : n + 1], y[n : n + 1])) for n in range(5)]
    assert abs(np.mean(losses) - float(truth(name).loss)) <= 1e-12
    gradients = [net.gradient(params, x[n : n + 1], y[n : n + 1]) for n in range(5)]
    for i, expected in enumerate(truth(name).gradient):
        assert relative(np.mean([g[i] for g in gradients], axis=0), expected) <= 1e-10


def test_an_ensemble_of_none() -> None:
    for name in FEW:
        net, params, x, y = ensemble(name, (0,))
        assert net.loss(params, x, y).shape == (0,)
        assert [g.shape for g in net.gradient(params, x, y)] == [w.shape for w in params]


def test_integer_and_boolean_targets() -> None:
    net, params, x, y = case("MLP tanh bernoulli")
    assert net.loss(params, x, y.astype(np.int32)) == net.loss(params, x, y)
    net, params, x, y = case("MLP tanh categorical")
    for dtype in (np.int8, np.uint8, np.int64):
        assert net.loss(params, x, y.astype(dtype)) == net.loss(params, x, y)


# ------------------------------------------------------------------------------------ init


def test_initial_parameters(backend: Backend, dtype: str) -> None:
    net = ConvNet((4, 4, 2), (3,), (5, 2))
    like = backend.asarray(np.zeros(1, dtype=dtype))
    params = net.init(3, (2, 7), like=like)
    expected = net.init(np.random.default_rng(3), (2, 7), like=np.zeros(1))
    shapes = [(2, 7, 3, 19), (2, 7, 5, 13), (2, 7, 2, 6)]
    assert [tuple(w.shape) for w in params] == shapes
    for w, e in zip(params, expected, strict=True):
        backend.check(w, like)
        assert not backend.to_numpy(w)[..., -1].any()
        np.testing.assert_allclose(backend.to_numpy(w), e, rtol=1e-6)


def test_initial_weights_have_variance_one_over_fan_in() -> None:
    for w in MLP((50, 20, 5)).init(0, (200,), like=np.zeros(1)):
        squares = w[..., :-1] ** 2 * (w.shape[-1] - 1)
        assert abs(squares.mean() - 1.0) <= 4 * squares.std() / squares.size**0.5


def test_parameters_from_a_key_inside_jit() -> None:
    net = MLP((3, 4, 2))
    params = jax.jit(lambda key, x: net.init(key, (2,), like=x))(jax.random.key(1), jnp.zeros(1))
    for a, b in zip(params, net.init(jax.random.key(1), (2,), like=jnp.zeros(1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert not np.allclose(params[0][0], params[0][1])


def test_networks_are_values() -> None:
    net = ConvNet((4, 4, 2), (3,), (2,), likelihood="categorical")
    assert net == ConvNet((4, 4, 2), (3,), (2,), likelihood="categorical")
    assert hash(net) == hash(pickle.loads(pickle.dumps(net)))
    assert net != ConvNet((4, 4, 2), (3,), (2,), likelihood="bernoulli")
    noisy = MLP((2, 3), noise_covariance=ref.NOISE)
    assert noisy == noisy
    assert noisy != MLP((2, 3))
    copy = pickle.loads(pickle.dumps(noisy))
    x, y = np.ones((4, 2)), np.zeros((4, 3))
    params = noisy.init(0, like=x)
    assert copy.loss(params, x, y) == noisy.loss(params, x, y)
    with pytest.raises(AttributeError):
        net.layers = ()  # type: ignore[misc]
    own = ref.NOISE.copy()
    kept = MLP((2, 3), noise_covariance=own)
    own[:] = 0.0
    assert kept.loss(params, x, y) == noisy.loss(params, x, y)
    assert isinstance(kept.likelihood, Gaussian)
    np.testing.assert_array_equal(kept.likelihood.noise_covariance, ref.NOISE)


# --------------------------------------------------------------------------- what is refused

NET = MLP((3, 4, 2))
PARAMS = NET.init(0, like=np.zeros(1))
X, Y = np.zeros((5, 3)), np.zeros((5, 2))
CLASSES = Network(NET.layers, "tanh", "categorical")
IMAGES = ConvNet((4, 4, 1), (2,), (3,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NET.output(PARAMS, X[:, :2]), ValueError, r"x must have shape \(\*batch, N, 3\) .* got \(5, 2\)"),
        (lambda: NET.output(PARAMS, X[0]), ValueError, r"x must have shape .* got \(3,\)"),
        (lambda: NET.output(PARAMS, X[:0]), ValueError, r"x must hold at least one sample, got shape \(0, 3\)"),
        (lambda: NET.output(PARAMS, X.tolist()), TypeError, "x must be an array"),
        (lambda: NET.output(PARAMS, X.astype(np.float32)), TypeError, r"^x has dtype float32, but params\[0\] has"),
        (lambda: NET.output(PARAMS, X.astype(int)), TypeError, "x must have dtype float32 or float64, got int64"),
        (lambda: NET.output(PARAMS[:1], X), ValueError, "params must have one array for each of 2 layers, got 1"),
        (lambda: NET.output(PARAMS[0], X), TypeError, "params must be a tuple or list"),
        (
            lambda: NET.output((PARAMS[0][:, :-1], PARAMS[1]), X),
            ValueError,
            r"params\[0\] must have shape \(\*batch, 4, 4\) \(n_out, n_in \+ 1\) of its layer, got \(4, 3\)",
        ),
        (
            lambda: NET.output([np.stack([w] * n) for w, n in zip(PARAMS, (2, 3), strict=True)], X),
            ValueError,
            "batch shapes must broadcast",
        ),
        (
            lambda: NET.output([np.stack([w] * 2) for w in PARAMS], np.zeros((3, 5, 3))),
            ValueError,
            "batch shapes must broadcast, got .*x: ",
        ),
        (lambda: NET.loss(PARAMS, X, Y[:4]), ValueError, r"y must have shape \(\*batch, 5, 2\) .* got \(4, 2\)"),
        (lambda: NET.loss(PARAMS, X, Y.astype(np.float32)), TypeError, "y has dtype float32"),
        (lambda: NET.gradient(PARAMS, X, None), TypeError, "y must be an array"),
        (lambda: CLASSES.loss(PARAMS, X, np.zeros(5)), TypeError, "y must have an integer dtype"),
        (lambda: CLASSES.loss(PARAMS, X, np.zeros((5, 1), dtype=int)), ValueError, r"y must have shape \(\*batch, 5\)"),
        (lambda: CLASSES.loss(PARAMS, X, np.zeros((), dtype=int)), ValueError, r"y must have shape \(\*batch, 5\)"),
        (lambda: CLASSES.loss(PARAMS, X, np.zeros(5, dtype=bool)), TypeError, "y must have dtype .* got bool"),
        (
            lambda: IMAGES.output(IMAGES.init(0, like=X), np.zeros((2, 1, 4, 4))),
            ValueError,
            r"x must have shape \(\*batch, N, 4, 4, 1\)",
        ),
        (lambda: NET.backward(PARAMS, X, Y), TypeError, "trace must be what forward returns"),
        (
            lambda: NET.backward(PARAMS, NET.forward(PARAMS, X), Y[:, :1]),
            ValueError,
            r"output_errors must have shape \(\*batch, 5, 2\) like the outputs",
        ),
        (
            lambda: NET.tangent(PARAMS, NET.forward(PARAMS, X), PARAMS[:1]),
            ValueError,
            "direction must have one array for each of 2 layers",
        ),
        (lambda: NET.init(0, (-1,), like=X), ValueError, "batch_shape must be a tuple of integers of at least 0"),
        (lambda: NET.init(None, like=X), TypeError, "rng must be a generator"),
        (lambda: NET.init(0, like=5), TypeError, "like must be an array"),
        (lambda: MLP((3,)), ValueError, "sizes must be a tuple of at least 2 integers"),
        (lambda: MLP((3, 0)), ValueError, "sizes must be a tuple of integers of at least 1"),
        (lambda: MLP((3, 2.0)), ValueError, "sizes must be a tuple of integers"),
        (lambda: MLP((3, 2, 2), activation="swish"), ValueError, "activation must be one of 'identity'"),
        (lambda: MLP((3, 2, 2), activation=("tanh",) * 2), ValueError, "activation must have one name for each of 1"),
        (lambda: MLP((3, 2, 2), activation=("gelo",)), ValueError, r"activation\[0\] must be one of"),
        (lambda: MLP((3, 2), activation=3), TypeError, "activation must be a name or a tuple of names"),
        (lambda: MLP((3, 2), likelihood="poisson"), ValueError, "likelihood must be one of 'gaussian'"),
        (lambda: MLP((3, 2), likelihood=Gaussian), TypeError, "likelihood must be a name or a likelihood"),
        (
            lambda: MLP((3, 2), likelihood="bernoulli", noise_covariance=np.eye(2)),
            ValueError,
            "noise_covariance belongs to likelihood 'gaussian'",
        ),
        (lambda: MLP((3, 2), noise_covariance=np.eye(3)), ValueError, "noise_covariance must have shape"),
        (lambda: MLP((3, 2), noise_covariance=np.zeros((2, 3))), ValueError, "noise_covariance must have shape"),
        (lambda: MLP((3, 2), noise_covariance=[[1.0]]), TypeError, "noise_covariance must be an array"),
        (lambda: Dense(0, 2), ValueError, "n_in must be an integer of at least 1, got 0"),
        (lambda: Dense(2, True), ValueError, "n_out must be an integer of at least 1, got True"),
        (lambda: Conv2d((4, 4), 2), ValueError, "image_shape must be a tuple of 3 integers"),
        (lambda: Conv2d((4, 4, 1), 2, 5), ValueError, "kernel_size must fit in the padded image, got height 5 in 4"),
        (lambda: Conv2d((4, 4, 1), 2, (1, 7), padding=1), ValueError, "got width 7 in 6"),
        (lambda: Conv2d((4, 4, 1), 2, stride=0), ValueError, "stride must be a tuple of 2 integers of at least 1"),
        (lambda: Conv2d((4, 4, 1), 2, padding=-1), ValueError, "padding must be a tuple of 2 integers of at least 0"),
        (lambda: ConvNet((4, 4, 1), (2, 2), (2,), stride=[1]), ValueError, "stride must have one entry for each of 2"),
        (lambda: ConvNet((4, 4, 1), (2,), ()), ValueError, "sizes must be a tuple of at least 1 integer"),
        (lambda: Network((), "tanh"), ValueError, "layers must be a tuple or list of layers"),
        (lambda: Network((Dense(3, 2), Dense(3, 2))), ValueError, r"layers\[1\] must take what layers\[0\] gives"),
        (lambda: Network((Dense(3, 4), Conv2d((2, 2, 1), 1, 1), Dense(4, 1))), ValueError, r"layers\[1\] must take"),
        (lambda: Network((Conv2d((4, 4, 1), 2),)), ValueError, "layers must end with a Dense"),
        (lambda: Network((Dense(3, 2), "tanh")), TypeError, r"layers\[1\] must be a Dense or a Conv2d"),
        (lambda: Gaussian().loss(Y, Y[:2]), ValueError, "y must have shape"),
        (lambda: Gaussian().metric(Y, Y[:2]), ValueError, "v must have shape"),
        (lambda: Gaussian(np.eye(3)).metric_root(Y), ValueError, "noise_covariance must have shape"),
        (lambda: Bernoulli().sample(Y, "seed"), TypeError, "rng must be"),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_arrays_of_two_libraries_are_refused() -> None:
    with pytest.raises(TypeError, match="all arrays must come from one library"):
        NET.output(JAX.asarrays(*PARAMS), X)
    noisy = MLP((3, 2), noise_covariance=JAX.asarray(np.eye(2)))
    with pytest.raises(TypeError, match="all arrays must come from one library"):
        noisy.output(noisy.init(0, like=X), X)
