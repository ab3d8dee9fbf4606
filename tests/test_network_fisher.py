"""The Fisher information of networks: against Jacobians by autodifferentiation, in every form."""

from __future__ import annotations

import itertools
import pickle
import sys
import tracemalloc
from typing import Any

import jax
import network_reference as ref
import numpy as np
import pytest
from backends import JAX, Backend
from network_reference import FEW, NETS, TWO, case, ends, on, relative, stack, tangent_of, truth

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array.fisher import network as fisher_module
from natgrad_array.fisher import roots
from natgrad_array.networks import MLP, ConvNet, Network

INVERSES = ("layerwise", "moore_penrose", "block_diagonal")
ROUTES = ("root", "gram", "dense")
CUTOFF = 1e-8


def fisher_of(name: str) -> ng.NetworkFisher:
    net, params, x, _ = case(name)
    return net.fisher(params, x)


def pinv(matrix: np.ndarray, cutoff: float = CUTOFF) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > cutoff * values[-1]
    return (vectors * np.where(kept, 1.0 / np.where(kept, values, 1.0), 0.0)) @ vectors.T


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is decomposed: C itself, or the smaller of its Gram matrices."""
    if request.param != "root":
        monkeypatch.setattr(roots, "ROOT_ENTRIES", 0)
    return str(request.param)


# ----------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("name", NETS)
def test_dense_matrix_blocks_and_products(name: str) -> None:
    """F is the mean of Jᵀ M J, with J and M by JAX."""
    wanted, given = truth(name).fisher, case(name)
    fisher = fisher_of(name)
    dense = fisher.to_dense()
    assert relative(dense, wanted) <= 1e-10
    np.testing.assert_array_equal(dense, dense.T)
    start = ends(given.params)
    for i, j in itertools.product(range(len(given.params)), repeat=2):
        block = fisher.block(i, j)
        whole = wanted[start[i] : start[i + 1], start[j] : start[j + 1]]
        assert block.shape == whole.shape
        assert np.linalg.norm(block - whole) <= 1e-10 * np.linalg.norm(wanted)
    tangent = tangent_of(given.params, seed=3)
    assert relative(stack(fisher.matvec(tangent)), wanted @ stack(tangent)) <= 1e-10


@pytest.mark.parametrize("name", [name for name in NETS if "gelu" in name or "Conv" in name or "noise" in name])
def test_dense_matrix_against_torch(name: str) -> None:
    """By one reverse pass of torch for each output and sample, with the metrics in closed form."""
    torch = pytest.importorskip("torch")
    net, params, x, _ = case(name)
    given = [torch.tensor(w, requires_grad=True) for w in params]
    a = torch.tensor(x)
    activations = {
        "identity": lambda z: z,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "softplus": lambda z: torch.nn.functional.softplus(z, threshold=1000.0),
        "gelu": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    }
    for i, (layer, w) in enumerate(zip(net.layers, given, strict=True)):
        if len(layer.input_shape) == 3:
            kernel = w[:, :-1].reshape(layer.channels, *layer.kernel_size, -1).permute(0, 3, 1, 2)
            a = torch.nn.functional.conv2d(a.permute(0, 3, 1, 2), kernel, w[:, -1], layer.stride, layer.padding)
            a = a.permute(0, 2, 3, 1)
        else:
            a = torch.nn.functional.linear(a.reshape(len(x), -1), w[:, :-1], w[:, -1])
        if i < len(net.layers) - 1:
            a = activations[net.activations[i]](a)
    total = 0.0
    for output in a:
        jacobian = np.stack(
            [stack(g.numpy() for g in torch.autograd.grad(f, given, retain_graph=True)) for f in output]
        )
        f = output.detach().numpy()
        if net.likelihood.name == "gaussian":
            noise = getattr(net.likelihood, "noise_covariance", None)
            metric = np.eye(f.size) if noise is None else np.linalg.inv(noise)
        elif net.likelihood.name == "bernoulli":
            p = 1 / (1 + np.exp(-f))
            metric = np.diag(p * (1 - p))
        else:
            p = np.exp(f) / np.exp(f).sum()
            metric = np.diag(p) - np.outer(p, p)
        total = total + jacobian.T @ metric @ jacobian / len(x)
    assert relative(fisher_of(name).to_dense(), total) <= 1e-10


@pytest.mark.parametrize("name", TWO[1:])
def test_on_every_library(backend: Backend, name: str) -> None:
    net, params, x, _ = on(backend, case(name))
    tangent = backend.asarrays(*tangent_of(case(name).params))

    def everything(params: Any, x: Any, tangent: Any) -> Any:
        fisher = net.fisher(params, x)
        steps = [fisher.precondition(tangent, inverse=inverse, damping=0.1) for inverse in INVERSES[:2]]
        return fisher.to_dense(), fisher.block(0, 1), fisher.matvec(tangent), fisher.spectrum(), steps

    dense, block, moved, spectrum, steps = backend.call(everything, params, x, tangent)
    wanted, direction = truth(name).fisher, stack(tangent_of(case(name).params))
    bound = 1e-10 if backend.float64 else 1e-4
    start = ends(case(name).params)
    assert relative(backend.to_numpy(dense), wanted) <= bound
    assert relative(backend.to_numpy(block), wanted[: start[1], start[1] : start[2]]) <= bound
    assert relative(stack(map(backend.to_numpy, moved)), wanted @ direction) <= bound
    values = np.linalg.eigvalsh(wanted)
    found = backend.to_numpy(spectrum)
    assert np.max(np.abs(found - values[-found.size :])) <= bound * values[-1]
    reference = fisher_of(name)
    for inverse, step in zip(INVERSES[:2], steps, strict=True):
        expected = reference.precondition(tangent_of(case(name).params), inverse=inverse, damping=0.1)
        for a, e in zip(step, expected, strict=True):
            backend.check(a, x)
            assert relative(backend.to_numpy(a), e) <= bound
    for array in (dense, block, spectrum, *moved):
        backend.check(array, x)


@pytest.mark.parametrize("name", FEW)
def test_in_float32(name: str) -> None:
    given = case(name)
    low = Network(given.net.layers, given.net.activations, given.net.likelihood)
    if given.net.likelihood.name == "gaussian" and given.net.likelihood.noise_covariance is not None:
        low = Network(low.layers, low.activations, ng.networks.Gaussian(ref.NOISE.astype(np.float32)))
    params = tuple(w.astype(np.float32) for w in given.params)
    fisher = low.fisher(params, given.x.astype(np.float32))
    dense = fisher.to_dense()
    assert dense.dtype == np.float32
    assert relative(dense, truth(name).fisher) <= 1e-5
    tangent = tangent_of(params)
    direction = tuple(d.astype(np.float32) for d in tangent)
    shifted = truth(name).fisher + 0.1 * np.eye(dense.shape[0])
    in_range = truth(name).fisher @ stack(tangent)
    gradient = tuple(d.astype(np.float32) for d in fisher.matvec(direction))
    step = fisher.precondition(gradient, inverse="moore_penrose", damping=0.1)
    assert all(d.dtype == np.float32 for d in step)
    assert relative(stack(step), np.linalg.solve(shifted, in_range)) <= 1e-4


# ------------------------------------------------------------------------------- inverses


@pytest.mark.parametrize("name", FEW)
def test_layer_factors_sample_by_sample(name: str) -> None:
    """Moments of the inputs and of what every direction sends back, from JAX's Jacobians alone.

    The Jacobian of a dense layer is δ ⊗ ā for each sample; of a convolution the bias
    column is the sum of δ over positions only, so that there the sums are held against F.
    """
    given, wanted = case(name), truth(name)
    start = ends(given.params)
    factors = fisher_of(name).layer_factors()
    assert len(factors) == len(given.params)
    for i, (layer, (forward, backward)) in enumerate(zip(given.net.layers, factors, strict=True)):
        m, n = layer.parameter_shape
        assert forward.shape == (n, n)
        assert backward.shape == (m, m)
        np.testing.assert_array_equal(forward, forward.T)
        np.testing.assert_array_equal(backward, backward.T)
        if layer.positions > 1:
            continue
        jacobian = wanted.jacobian[:, :, start[i] : start[i + 1]].reshape(*wanted.jacobian.shape[:2], n, m)
        delta = jacobian[:, :, -1, :]
        expected = np.einsum("nkp,nkl,nlq->pq", delta, wanted.metric, delta) / len(delta)
        assert relative(backward, expected) <= 1e-10
        # One unit's inputs are its column over its error: the largest is the safest to divide by.
        inputs = []
        for sample in jacobian:
            k, unit = np.unravel_index(np.argmax(np.abs(sample[:, -1, :])), sample[:, -1, :].shape)
            inputs.append(sample[k, :, unit] / sample[k, -1, unit])
        assert relative(forward, np.asarray(inputs).T @ np.asarray(inputs) / len(inputs)) <= 1e-10


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("budget", [0, 3000])
def test_layer_factors_in_pieces(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction at a time, and two: the sums are the same."""
    given = case(name)
    sampled = lambda: ng.sampled_fisher(given.net, given.params, given.x, 0, n_samples=5)  # noqa: E731
    whole = [fisher_of(name).layer_factors(), sampled().layer_factors()]
    sizes = []
    backward = fisher_module.passes.backward

    def counted(*args: Any) -> Any:
        sizes.append(args[-1].shape[0])
        return backward(*args)

    monkeypatch.setattr(fisher_module, "CHUNK_BYTES", budget)
    monkeypatch.setattr(fisher_module.passes, "backward", counted)
    pieces = [fisher_of(name).layer_factors(), sampled().layer_factors()]
    assert max(sizes) < 5
    assert sum(sizes) == given.net.n_outputs + 5
    for a, e in zip(itertools.chain(*pieces[0], *pieces[1]), itertools.chain(*whole[0], *whole[1]), strict=True):
        assert relative(a, e) <= 1e-14


def test_layer_factors_of_a_convolution() -> None:
    """Patches and errors by hand: one channel of two positions, and a linear output."""
    net = ConvNet((1, 3, 1), (2,), (1,), kernel_size=(1, 2), activation="identity")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 1, 3, 1))
    params = tuple(rng.standard_normal(layer.parameter_shape) for layer in net.layers)
    (forward, backward), _ = net.fisher(params, x).layer_factors()
    patches = np.stack([np.stack([x[:, 0, t, 0], x[:, 0, t + 1, 0], np.ones(6)], axis=-1) for t in range(2)], axis=1)
    assert relative(forward, np.einsum("ntp,ntq->pq", patches, patches) / 6) <= 1e-14
    # The outputs are (position, channel), and the dense layer's weights are the errors.
    errors = params[1][0, :-1].reshape(2, 2)
    assert relative(backward, errors.T @ errors / 2) <= 1e-14


@pytest.mark.parametrize("name", FEW)
def test_layerwise_is_made_of_the_factors(name: str) -> None:
    fisher, gradient = fisher_of(name), tangent_of(case(name).params)
    step = fisher.precondition(gradient)
    damped = fisher.precondition(gradient, damping=0.3)
    for g, d, e, (forward, backward) in zip(gradient, step, damped, fisher.layer_factors(), strict=True):
        wanted = np.linalg.pinv(backward, rcond=1e-12, hermitian=True) @ g
        wanted = wanted @ np.linalg.pinv(forward, rcond=1e-12, hermitian=True)
        assert relative(d, wanted / len(gradient)) <= 1e-7
        # On the range of both factors the damped step solves with their Kronecker product.
        product = np.kron(forward, backward)
        left = product @ ref.vec(e) + 0.3 * ref.vec(e)
        onto = pinv(product, 1e-12) @ product
        assert relative(left * len(gradient), onto @ ref.vec(g)) <= 1e-7


@pytest.mark.parametrize("name", [*FEW, "one layer", "one unit", "wide output", "MLP relu categorical"])
def test_moore_penrose_and_blocks_against_dense_inverses(name: str, route: str) -> None:
    given, wanted = case(name), truth(name).fisher
    if route == "dense":
        # More samples than parameters, so that F is the smaller matrix.
        given = ref.make(NETS[name], samples=70)
        wanted = ref.differentiate(given).fisher
    start = ends(given.params)
    fisher = given.net.fisher(given.params, given.x)
    gradient = tangent_of(given.params, seed=1)
    step = fisher.precondition(gradient, inverse="moore_penrose", rtol=CUTOFF)
    assert relative(stack(step), pinv(wanted) @ stack(gradient)) <= 1e-6
    blocks = fisher.precondition(gradient, inverse="block_diagonal", rtol=CUTOFF)
    for i, (d, g) in enumerate(zip(blocks, gradient, strict=True)):
        block = wanted[start[i] : start[i + 1], start[i] : start[i + 1]]
        assert relative(ref.vec(d), pinv(block) @ ref.vec(g)) <= 1e-6
    # A gradient in the range of F, where damping is Tikhonov's to the digit.
    image = wanted @ stack(gradient)
    inside = fisher.matvec(gradient)
    step = fisher.precondition(inside, inverse="moore_penrose", damping=0.05)
    assert relative(stack(step), np.linalg.solve(wanted + 0.05 * np.eye(len(wanted)), image)) <= 1e-9


@pytest.mark.parametrize("name", FEW)
def test_four_penrose_conditions(name: str, route: str) -> None:
    """The inverse applied to every unit vector, against the dense F."""
    fisher, given = fisher_of(name), case(name)
    dense = fisher.to_dense()
    size = dense.shape[0]
    units = roots.split(np.eye(size), [w.shape for w in given.params])
    columns = roots.join(fisher.precondition(units, inverse="moore_penrose", rtol=CUTOFF))
    inverse = columns.T
    scale = np.linalg.norm(dense) * np.linalg.norm(inverse)
    for residual in (
        (dense @ inverse @ dense - dense) / np.linalg.norm(dense),
        (inverse @ dense @ inverse - inverse) / np.linalg.norm(inverse),
        dense @ inverse - (dense @ inverse).T,
        inverse @ dense - (inverse @ dense).T,
    ):
        # What is dropped is a part of F smaller than the cut-off.
        assert np.linalg.norm(residual) <= 1e-13 * scale + 10 * CUTOFF


def test_the_root_keeps_what_a_gram_matrix_loses() -> None:
    """Two outputs that differ by 1e-6: eigenvalues of 1 and 1e-13, told apart by C alone."""
    net = MLP((2, 1))
    x = np.asarray([[1.0, 0.0], [1.0, 1e-6], [1.0, -1e-6]])
    fisher = net.fisher((np.asarray([[1.0, 2.0, 0.5]]),), x)
    design = np.concatenate([x, np.ones((3, 1))], axis=-1)
    values = np.linalg.svd(design, compute_uv=False) ** 2 / 3
    spectrum = fisher.spectrum()
    assert abs(spectrum[1] - values[1]) <= 1e-9 * values[1]
    assert float(fisher.rank()) == 2.0


@pytest.mark.parametrize("name", FEW)
def test_rank_and_spectrum(name: str, route: str) -> None:
    given = case(name)
    wanted = truth(name).fisher
    if route == "dense":
        given = ref.make(NETS[name], samples=70)
        wanted = ref.differentiate(given).fisher
    fisher = given.net.fisher(given.params, given.x)
    values = np.linalg.eigvalsh(wanted)
    spectrum = fisher.spectrum()
    assert spectrum.shape == (min(len(wanted), len(given.x) * given.net.n_outputs),)
    assert np.all(np.diff(spectrum) >= 0.0)
    assert np.all(spectrum >= 0.0)
    assert np.max(np.abs(spectrum - values[-spectrum.size :])) <= 1e-12 * values[-1]
    assert float(fisher.rank(rtol=CUTOFF)) == np.sum(values > CUTOFF * values[-1])


# --------------------------------------------------------- the theory of deep linear networks


@pytest.mark.parametrize("noise", [None, ref.NOISE], ids=["identity", "noise"])
@pytest.mark.parametrize("sizes", [(4, 5, 6, 3), (5, 4, 3), (4, 2, 3), (3, 3)], ids=str)
def test_a_linear_network_is_a_deep_linear_one(sizes: tuple[int, ...], noise: Any) -> None:
    """Biases aside: loss, gradient and every block; and the layerwise rule of inputs without mean."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, sizes[0]))
    x -= x.mean(axis=0)
    y = rng.standard_normal((40, sizes[-1]))
    weights = dl.gaussian(1, sizes, (2,), like=x)
    params = tuple(np.concatenate([w, np.zeros_like(w[..., :1])], axis=-1) for w in weights)
    net = MLP(sizes, activation="identity", noise_covariance=noise)
    task = ng.GaussianTask.from_samples(x, y, noise_covariance=noise)
    np.testing.assert_allclose(net.loss(params, x, y), dl.loss(weights, task), rtol=1e-12)
    gradient = dl.gradient(weights, task)
    found = net.gradient(params, x, y)
    for a, e in zip(found, gradient, strict=True):
        assert relative(a[..., :-1], e) <= 1e-12
    mine, theirs = net.fisher(params, x), dl.fisher(weights, task)
    for i, j in itertools.product(range(len(weights)), repeat=2):
        block, wanted = mine.block(i, j), theirs.block(i, j)
        # Nothing of a single layer's differs between members.
        wanted = np.broadcast_to(wanted, (2, *wanted.shape[-2:]))
        assert relative(block[..., : wanted.shape[-2], : wanted.shape[-1]], wanted) <= 1e-12
    # The inputs have no mean, so that nothing reaches from the weights to the bias of the first layer on.
    without_bias = tuple(np.concatenate([g, np.zeros_like(g[..., :1])], axis=-1) for g in gradient)
    for a, e in zip(
        mine.precondition(without_bias, rtol=1e-12), theirs.precondition(gradient, rtol=1e-12), strict=True
    ):
        assert relative(a[..., :-1], e) <= 1e-8
        assert np.max(np.abs(a[..., -1])) <= 1e-8 * np.max(np.abs(e))
    damped = mine.precondition(without_bias, damping=0.1)
    for i, (a, g) in enumerate(zip(damped, gradient, strict=True)):
        forward, backward = theirs.factors(i, i)
        wanted = ng.precondition(g, backward, forward, damping=0.1) / len(gradient)
        assert relative(a[..., :-1], wanted) <= 1e-9


# ------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", ["MLP tanh gaussian", "MLP noise", "MLP gelu categorical", "ConvNet mixed bernoulli"])
def test_samples_of_the_model_give_the_fisher_information(name: str) -> None:
    given = case(name)
    estimate = ng.sampled_fisher(given.net, given.params, given.x, 12, n_samples=400)
    error, dense = estimate.standard_error(), truth(name).fisher
    off = np.abs(estimate.to_dense() - dense)
    floor = 1e-12 * np.max(np.abs(dense))
    # Four standard errors on average over entries, and no single one of thousands beyond six.
    assert np.mean(off > 4 * error + floor) <= 1e-3
    assert np.all(off <= 6 * error + floor)
    start = ends(given.params)
    np.testing.assert_allclose(estimate.standard_error(0, 1), error[: start[1], start[1] : start[2]], atol=floor)


def test_standard_error_falls_with_the_root_of_the_samples() -> None:
    net, params, x, _ = case("MLP gelu categorical")
    few, many = (ng.sampled_fisher(net, params, x, 5, n_samples=s).standard_error() for s in (200, 3200))
    assert abs(np.linalg.norm(few) / np.linalg.norm(many) / 4.0 - 1.0) <= 0.1


def test_standard_error_is_the_spread_of_repeated_estimates() -> None:
    """Sixty estimates from their own seeds scatter as one of them says."""
    net, params, x, _ = case("MLP noise")
    each = [ng.sampled_fisher(net, params, x, seed, n_samples=50) for seed in range(60)]
    spread = np.std([e.to_dense() for e in each], axis=0, ddof=1)
    said = np.sqrt(np.mean([e.standard_error() ** 2 for e in each], axis=0))
    assert abs(np.linalg.norm(spread) / np.linalg.norm(said) - 1.0) <= 0.1


@pytest.mark.parametrize("name", FEW)
def test_estimates_are_means_of_scores(name: str) -> None:
    """Scores by JAX of targets from the data, and of those that a seed draws."""
    net, params, x, y = case(name)
    wanted = truth(name)
    residual = jax.vmap(jax.grad(lambda f, y: ref.losses(net, f[None], y[None])[0]))
    count = len(x)

    def moment(targets: np.ndarray) -> np.ndarray:
        scores = np.einsum("na,nap->np", np.asarray(residual(wanted.output, targets)), wanted.jacobian)
        return scores.T @ scores / count

    empirical = ng.empirical_fisher(net, params, x, y)
    drawn = net.likelihood.sample(net.output(params, x), 3, draws=(2,))
    sampled = ng.sampled_fisher(net, params, x, 3, n_samples=2)
    for estimate, dense in ((empirical, moment(y)), (sampled, (moment(drawn[0]) + moment(drawn[1])) / 2)):
        assert relative(estimate.to_dense(), dense) <= 1e-10
        tangent = tangent_of(params, seed=3)
        assert relative(stack(estimate.matvec(tangent)), dense @ stack(tangent)) <= 1e-10
        step = estimate.precondition(tangent, inverse="moore_penrose", rtol=CUTOFF)
        assert relative(stack(step), pinv(dense) @ stack(tangent)) <= 1e-6
        values = np.linalg.eigvalsh(dense)
        spectrum = estimate.spectrum()
        assert np.max(np.abs(spectrum - values[-spectrum.size :])) <= 1e-12 * values[-1]
    error = np.abs(moment(drawn[0]) - moment(drawn[1])) / 2
    np.testing.assert_allclose(sampled.standard_error(), error, atol=1e-12 * np.max(error))
    assert sampled.n_draws == 2
    # It is another object than the Fisher information.
    assert relative(empirical.to_dense(), wanted.fisher) > 0.1


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_estimates_of_stacks(batch: tuple[int, ...]) -> None:
    """Noise already drawn is split between members, and shared data serve all."""
    for name in ("MLP tanh gaussian", "MLP gelu categorical"):
        net, _, x, y = case(name)
        params = net.init(2, batch, like=x)
        core = (5, 3) if net.likelihood.name == "gaussian" else (5, 3, 2)
        noise = np.random.default_rng(0).standard_normal((4, *batch, *core))
        sampled = ng.sampled_fisher(net, params, x, noise, n_samples=4)
        empirical = ng.empirical_fisher(net, params, x, y)
        assert sampled.batch_shape == empirical.batch_shape == batch
        for b in np.ndindex(*batch):
            own = tuple(w[b] for w in params)
            alone = ng.sampled_fisher(net, own, x, noise[:, *b], n_samples=4)
            assert relative(sampled.to_dense()[b], alone.to_dense()) <= 1e-13
            assert relative(sampled.standard_error()[b], alone.standard_error()) <= 1e-13
            assert relative(empirical.to_dense()[b], ng.empirical_fisher(net, own, x, y).to_dense()) <= 1e-13


def test_estimates_in_a_trace() -> None:
    given = case("MLP gelu categorical")
    net, params, x, _ = on(JAX, given)
    key = jax.random.key(3)
    found = jax.jit(lambda key, p, x: ng.sampled_fisher(net, p, x, key, n_samples=3).to_dense())(key, params, x)
    noise = np.asarray(jax.random.normal(key, (3, 5, 3, 2), dtype=np.float64))
    wanted = ng.sampled_fisher(net, given.params, given.x, noise, n_samples=3).to_dense()
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    with pytest.raises(TypeError, match="rng is a NumPy generator or seed under a JAX trace"):
        jax.jit(lambda p, x: ng.sampled_fisher(net, p, x, 3).to_dense())(params, x)


# ------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("name", FEW)
def test_a_stack_is_its_members(name: str, route: str) -> None:
    net, _, x, _ = case(name)
    params = net.init(4, (2, 2), like=x)
    params = tuple(w + 0.1 * d for w, d in zip(params, tangent_of(params), strict=True))
    fisher, gradient = net.fisher(params, x), tangent_of(params, seed=2)
    assert fisher.batch_shape == (2, 2)
    assert fisher.n_parameters == sum(w[0, 0].size for w in params)
    damping, rtol = np.asarray([0.1, 0.2]), np.asarray([[1e-6], [1e-3]])
    steps = {
        inverse: fisher.precondition(gradient, inverse=inverse, damping=damping, rtol=rtol) for inverse in INVERSES
    }
    for b in np.ndindex(2, 2):
        own, g = tuple(w[b] for w in params), tuple(d[b] for d in gradient)
        alone = net.fisher(own, x)
        assert relative(fisher.to_dense()[b], alone.to_dense()) <= 1e-13
        assert relative(fisher.block(1, 0)[b], alone.block(1, 0)) <= 1e-13
        assert relative(stack(d[b] for d in fisher.matvec(gradient)), stack(alone.matvec(g))) <= 1e-13
        assert np.max(np.abs(fisher.spectrum()[b] - alone.spectrum())) <= 1e-13 * alone.spectrum()[-1]
        assert fisher.rank()[b] == alone.rank()
        for inverse, step in steps.items():
            one = alone.precondition(g, inverse=inverse, damping=float(damping[b[1]]), rtol=float(rtol[b[0], 0]))
            assert relative(stack(d[b] for d in step), stack(one)) <= 1e-9


@pytest.mark.parametrize("name", FEW)
def test_stacks_of_gradients_for_one_network(name: str, route: str) -> None:
    fisher, given = fisher_of(name), case(name)
    rng = np.random.default_rng(0)
    stacked = tuple(rng.standard_normal((6, *w.shape)) for w in given.params)
    calls = [fisher.matvec] + [
        lambda d, inverse=inverse: fisher.precondition(d, inverse=inverse, damping=0.1) for inverse in INVERSES
    ]
    for call in calls:
        found = call(stacked)
        for k in range(6):
            assert relative(stack(d[k] for d in found), stack(call(tuple(d[k] for d in stacked)))) <= 1e-10


def test_inputs_and_noise_of_its_own_for_each_member() -> None:
    params = case("MLP noise").params
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((3, 5, 4)), np.stack([ref.NOISE, np.eye(3), 2 * ref.NOISE])
    fisher = MLP((4, 6, 3), activation="softplus", noise_covariance=noise).fisher(params, x)
    for b in range(3):
        alone = MLP((4, 6, 3), activation="softplus", noise_covariance=noise[b]).fisher(params, x[b])
        assert relative(fisher.to_dense()[b], alone.to_dense()) <= 1e-13
    shared = MLP((4, 6, 3), activation="softplus", noise_covariance=noise).fisher(params, x[0])
    assert shared.batch_shape == (3,)
    gradient = tangent_of(params)
    step = shared.precondition(gradient, inverse="moore_penrose", rtol=CUTOFF)
    moved = shared.matvec(gradient)
    for b in range(3):
        alone = MLP((4, 6, 3), activation="softplus", noise_covariance=noise[b]).fisher(params, x[0])
        one = alone.precondition(gradient, inverse="moore_penrose", rtol=CUTOFF)
        assert relative(stack(d[b] for d in step), stack(one)) <= 1e-7
        assert relative(stack(d[b] for d in moved), stack(alone.matvec(gradient))) <= 1e-13


def test_a_bad_sample_hurts_its_member_alone(backend: Backend) -> None:
    given = case("MLP noise")
    params = given.net.init(4, (3,), like=given.x)
    x = np.stack([given.x] * 3)
    x[1, 2] = np.nan
    net, params, x, _ = on(backend, ref.Case(given.net, params, x, given.y))

    def everything(params: Any, x: Any) -> Any:
        fisher = net.fisher(params, x)
        step = fisher.precondition(params, inverse="moore_penrose", damping=0.1)
        return *step, fisher.layer_factors()[0][1], fisher.rank(), fisher.spectrum()

    for array in backend.call(everything, params, x):
        host = backend.to_numpy(array)
        assert np.isnan(host[1]).all()
        assert np.isfinite(host[[0, 2]]).all()


@pytest.mark.parametrize("name", FEW)
def test_a_bad_member_hurts_itself_alone(name: str, route: str) -> None:
    given = case(name)
    for value in (np.nan, np.inf):
        params = given.net.init(4, (3,), like=given.x)
        good = given.net.fisher(tuple(w[[0, 2]] for w in params), given.x)
        params[1][1, 0, 0] = value
        fisher = given.net.fisher(params, given.x)
        gradient = tangent_of(params)
        assert np.isfinite(fisher.to_dense()[[0, 2]]).all()
        assert np.isfinite(fisher.rank()).tolist() == [True, False, True] or value == np.inf
        for inverse in INVERSES:
            found = fisher.precondition(gradient, inverse=inverse, damping=0.1)
            wanted = good.precondition(tuple(g[[0, 2]] for g in gradient), inverse=inverse, damping=0.1)
            for a, e in zip(found, wanted, strict=True):
                assert relative(a[[0, 2]], e) <= 1e-10
            assert any(not np.isfinite(a[1]).all() for a in found) or value == np.inf


@pytest.mark.parametrize("name", FEW)
def test_a_dead_layer(name: str, route: str) -> None:
    """Nothing is sent back through zeros: the layers before have no information and get no step."""
    given = case(name)
    params = (*given.params[:-1], 0.0 * given.params[-1])
    fisher = given.net.fisher(params, given.x)
    wanted = ref.differentiate(ref.Case(given.net, params, given.x, given.y)).fisher
    assert relative(fisher.to_dense(), wanted) <= 1e-10
    gradient = tangent_of(params)
    values = np.linalg.eigvalsh(wanted)
    assert float(fisher.rank(rtol=CUTOFF)) == np.sum(values > CUTOFF * values[-1])
    for inverse in INVERSES:
        for damping in (0.0, 0.1):
            step = fisher.precondition(gradient, inverse=inverse, damping=damping, rtol=CUTOFF)
            assert all(np.isfinite(d).all() for d in step)
            assert not any(d.any() for d in step[:-1]) or inverse == "moore_penrose"
            assert max(np.max(np.abs(d)) for d in step[:-1]) <= 1e-12 * np.max(np.abs(step[-1]))
    step = fisher.precondition(gradient, inverse="moore_penrose", rtol=CUTOFF)
    assert relative(stack(step), pinv(wanted) @ stack(gradient)) <= 1e-6


@pytest.mark.parametrize("name", FEW)
def test_one_sample(name: str, route: str) -> None:
    net, params, x, y = case(name)
    mean = np.mean([net.fisher(params, x[n : n + 1]).to_dense() for n in range(5)], axis=0)
    assert relative(mean, truth(name).fisher) <= 1e-10
    alone = net.fisher(params, x[:1])
    rank = net.n_outputs - (net.likelihood.name == "categorical")
    assert float(alone.rank(rtol=CUTOFF)) == rank
    gradient = net.gradient(params, x[:1], y[:1])
    step = alone.precondition(gradient, inverse="moore_penrose", rtol=CUTOFF)
    assert relative(stack(alone.matvec(step)), stack(gradient)) <= 1e-8


def test_an_ensemble_of_none(route: str) -> None:
    net, _, x, _ = case("MLP noise")
    params = net.init(0, (0,), like=x)
    fisher = net.fisher(params, x)
    assert fisher.to_dense().shape == (0, 51, 51)
    for inverse in INVERSES:
        step = fisher.precondition(params, inverse=inverse, damping=0.1)
        assert [d.shape for d in step] == [w.shape for w in params]


# ---------------------------------------------------------------------- the object in use


def test_one_object_serves_many_calls() -> None:
    given, fisher = case("MLP noise"), fisher_of("MLP noise")
    gradient = tangent_of(given.params)
    for inverse in [*INVERSES, *INVERSES[::-1]]:
        fresh = fisher_of("MLP noise").precondition(gradient, inverse=inverse)
        for a, b in zip(fisher.precondition(gradient, inverse=inverse), fresh, strict=True):
            np.testing.assert_array_equal(a, b)
        fisher.precondition(gradient, inverse=inverse, rtol=0.1)
    copy = pickle.loads(pickle.dumps(fisher))
    np.testing.assert_array_equal(copy.to_dense(), fisher.to_dense())
    np.testing.assert_array_equal(copy.spectrum(), fisher.spectrum())


def test_object_made_outside_a_trace_and_used_in_it() -> None:
    """Nothing traced is kept: the object still works after the trace has ended, and in the next."""
    given = case("MLP noise")
    net, params, x, _ = on(JAX, given)
    made = net.fisher(params, x)
    gradient = JAX.asarrays(*tangent_of(given.params))
    wanted = pinv(truth("MLP noise").fisher) @ stack(tangent_of(given.params))
    for _ in range(2):
        inside = jax.jit(lambda d: made.precondition(d, inverse="moore_penrose", rtol=CUTOFF))(gradient)
        assert relative(stack(inside), wanted) <= 1e-6
        step = jax.jit(lambda d: made.precondition(d, damping=0.1))(gradient)
        eager = fisher_of("MLP noise").precondition(tangent_of(given.params), damping=0.1)
        assert relative(stack(step), stack(eager)) <= 1e-10


def test_as_an_operator_of_scipy(backend: Backend) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net, params, x, _ = on(backend, case("MLP noise"))
    operator = net.fisher(params, x).to_scipy()
    wanted = truth("MLP noise").fisher
    bound = 1e-10 if backend.float64 else 1e-4
    assert operator.shape == wanted.shape
    assert operator.dtype == (np.float64 if backend.float64 else np.float32)
    v = np.random.default_rng(0).standard_normal(len(wanted)).astype(operator.dtype)
    assert relative(operator @ v, wanted @ v) <= bound
    assert relative(operator.T @ v, wanted @ v) <= bound
    assert relative(operator @ v[:, None], wanted @ v[:, None]) <= bound
    shifted = linalg.aslinearoperator(np.eye(len(wanted), dtype=operator.dtype)) * 0.1 + operator
    solution, failed = linalg.cg(shifted, v, rtol=1e-12 if backend.float64 else 1e-5)
    assert not failed
    assert relative(solution, np.linalg.solve(wanted + 0.1 * np.eye(len(wanted)), v)) <= 10 * bound


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="to_scipy needs SciPy, which is not installed"):
        fisher_of("MLP noise").to_scipy()


# ------------------------------------------------------------------------- what is refused


def test_a_matrix_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is allocated, with what to do instead."""
    one = np.ones(())
    net = MLP((100_000, 3, 10_000))
    params = tuple(np.broadcast_to(one, layer.parameter_shape) for layer in net.layers)
    fisher = net.fisher(params, np.ones((1, 100_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"the dense Fisher matrix of shape .* use F.matvec"):
            fisher.to_dense()
        with pytest.raises(ValueError, match=r"block \(0, 0\) of shape .* use F.matvec"):
            fisher.block(0, 0)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1e6
    moved = fisher.matvec(params)
    assert [d.shape for d in moved] == [w.shape for w in params]


def _make(name: str = "MLP noise") -> tuple[ng.NetworkFisher, Any]:
    return fisher_of(name), tangent_of(case(name).params)


@pytest.mark.parametrize("bad", [-1, 2, 1.0, True, None, "0"])
def test_layers_that_are_not_there(bad: Any) -> None:
    fisher, _ = _make()
    estimate = ng.sampled_fisher(*case("MLP noise")[:3], 0, n_samples=2)
    with pytest.raises(ValueError, match="i must be a layer from 0 to 1, got "):
        fisher.block(bad, 0)
    with pytest.raises(ValueError, match="j must be a layer from 0 to 1, got "):
        fisher.block(0, bad)
    with pytest.raises(ValueError, match="j must be a layer from 0 to 1, got "):
        estimate.standard_error(0, bad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda F, g: F.precondition(g, inverse="exact"), ValueError, "inverse must be one of 'layerwise'"),
        (lambda F, g: F.precondition(g[:1]), ValueError, "gradient must have one array for each of 2 layers, got 1"),
        (lambda F, g: F.precondition(g[0]), TypeError, "gradient must be a tuple or list"),
        (lambda F, g: F.precondition((g[0].T, g[1])), ValueError, r"gradient\[0\] must have shape \(\*batch, 6, 5\)"),
        (lambda F, g: F.matvec((g[0], None)), TypeError, r"tangent\[1\] must be an array"),
        (
            lambda F, g: F.matvec(tuple(d.astype(np.float32) for d in g)),
            TypeError,
            r"the other arrays have dtype float64, but tangent\[0\] has dtype float32",
        ),
        (lambda F, g: F.precondition(g, damping=-1.0), ValueError, "damping must be at least 0"),
        (
            lambda F, g: F.precondition(g, damping="1", inverse="moore_penrose"),
            TypeError,
            "damping must be a number or an array",
        ),
        (lambda F, g: F.precondition(g, rtol=-1.0, inverse="block_diagonal"), ValueError, "rtol must be at least 0"),
        (
            lambda F, g: F.precondition(g, rtol=np.ones(2), inverse="moore_penrose"),
            ValueError,
            r"rtol must have a shape that broadcasts to the batch shape \(\)",
        ),
        (lambda F, g: F.rank(rtol=-1.0), ValueError, "rtol must be at least 0"),
        (lambda F, g: ng.NetworkFisher("net", g, g[0]), TypeError, "net must be a Network, got str 'net'"),
        (
            lambda F, g: ng.sampled_fisher(*case("MLP noise")[:3], 0, n_samples=0),
            ValueError,
            "n_samples must be a positive integer, got 0",
        ),
        (lambda F, g: ng.sampled_fisher(None, g, g[0], 0), TypeError, "net must be a Network"),
        (lambda F, g: ng.empirical_fisher(None, g, g[0], 0), TypeError, "net must be a Network"),
        (
            lambda F, g: ng.sampled_fisher(*case("MLP noise")[:3], None),
            TypeError,
            "rng must be a generator",
        ),
        (
            lambda F, g: ng.empirical_fisher(*case("MLP noise")).standard_error(),
            ValueError,
            "standard_error needs at least 2 draws of the targets, got 1",
        ),
        (
            lambda F, g: ng.empirical_fisher(*case("MLP gelu categorical")[:3], np.full(5, 7)),
            ValueError,
            "y must hold classes from 0 to 2",
        ),
        (
            lambda F, g: case("MLP noise").net.fisher([np.stack([w] * 2) for w in g], case("MLP noise").x).to_scipy(),
            ValueError,
            r"to_scipy needs a Fisher matrix without batch axes, got batch shape \(2,\)",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*_make())


def test_settings_of_a_bad_member_are_its_own() -> None:
    given = case("MLP noise")
    params = given.net.init(0, (3,), like=given.x)
    fisher, gradient = given.net.fisher(params, given.x), tangent_of(params)
    for options in ({"rtol": np.asarray([1e-6, -1.0, 1e-6])}, {"damping": np.asarray([0.1, -1.0, 0.1])}):
        for inverse in INVERSES:
            for d in fisher.precondition(gradient, inverse=inverse, **options):
                assert np.isnan(d[1]).all()
                assert np.isfinite(d[[0, 2]]).all()
