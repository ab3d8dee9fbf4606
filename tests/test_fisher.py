"""The Fisher information of deep linear networks: samples, scores, dense blocks, ranks and spectra."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from backends import JAX, JAX_JIT, NUMPY
from reference import (
    CASES,
    FEW,
    Problem,
    case,
    numerical_jacobian,
    relative,
    split,
    stack,
    tangent_of,
    well_conditioned,
)

import natgrad_array as ng
from natgrad_array import deep_linear as dl

NAMES = list(CASES)


def fisher_of(problem: Problem) -> dl.DeepLinearFisher:
    return dl.fisher(problem.weights, ng.GaussianTask(*problem.moments))


# ------------------------------------------------------------------- what it is the mean of


@pytest.mark.parametrize("sizes", [(3, 2), (4, 3, 2), (3, 2, 4), (3, 4, 3, 3)], ids=str)
def test_mean_over_samples_of_jacobians_under_the_models_noise(sizes):
    """F = ⟨Jᵀ Σ̃⁻¹ J⟩ with J = d(Wx)/dθ by differences: all blocks, those between layers included."""
    problem = well_conditioned(sizes, seed=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, sizes[0]))
    x[:, 0] = x[:, 1]  # Σ is singular
    y = rng.standard_normal((9, sizes[-1]))
    task = ng.GaussianTask.from_samples(x, y, noise_covariance=problem.noise_covariance)
    precision = np.linalg.inv(problem.noise_covariance)
    jacobians = [numerical_jacobian(problem.weights, sample) for sample in x]
    wanted = np.mean([j.T @ precision @ j for j in jacobians], axis=0)
    assert relative(dl.fisher(problem.weights, task).to_dense(), wanted) <= 1e-10


def test_mean_of_scores_by_monte_carlo():
    """Targets drawn from the model give F within four standard errors; those of the data do not."""
    problem = well_conditioned((3, 2, 2), seed=2)
    rng = np.random.default_rng(1)
    count = 20_000
    x = rng.multivariate_normal(np.zeros(3), problem.input_moment, count)
    task = ng.GaussianTask(*problem.moments)
    dense = dl.fisher(problem.weights, task).to_dense()
    precision = np.linalg.inv(problem.noise_covariance)
    # The Jacobian is linear in x: three of them give all.
    basis = np.stack([numerical_jacobian(problem.weights, e) for e in np.eye(3)])
    jacobians = np.einsum("nk,kop->nop", x, basis)

    def mean_and_error(noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.einsum("nop,oq,nq->np", jacobians, precision, noise)
        outer = scores[:, :, None] * scores[:, None, :]
        return outer.mean(axis=0), outer.std(axis=0) / count**0.5

    model = rng.multivariate_normal(np.zeros(2), problem.noise_covariance, count)
    mean, error = mean_and_error(model)
    assert np.all(np.abs(mean - dense) <= 4 * error)
    teacher = problem.optimum()
    targets = x @ teacher.T + rng.multivariate_normal(np.zeros(2), problem.noise_covariance, count)
    empirical, error = mean_and_error(targets - x @ problem.product.T)
    assert np.any(np.abs(empirical - dense) > 20 * error)
    assert relative(empirical, dense) > 0.1


@pytest.mark.parametrize("name", ["wide 3", "all singular 3"])
def test_second_derivatives_of_the_loss_at_the_optimum(name):
    """Where the network fits the optimum, F is the Hessian of the loss: JAX differentiates twice."""
    import jax

    problem = case(name)
    weights, moments = problem.on(JAX)
    cross = problem.product @ problem.input_moment
    noise = problem.noise_covariance
    output = cross @ problem.product.T + noise
    sigma, precision = moments[0], jax.numpy.linalg.inv(moments[1])

    def loss(theta):
        w = jax.numpy.eye(sigma.shape[0])
        start = 0
        for layer in weights:
            m, n = layer.shape
            w = theta[start : start + m * n].reshape(n, m).T @ w
            start += m * n
        mixed = w @ jax.numpy.asarray(cross).T
        return 0.5 * jax.numpy.trace(precision @ (output - mixed - mixed.T + w @ sigma @ w.T))

    hessian = jax.jit(jax.hessian(loss))(jax.numpy.asarray(stack(problem.weights)))
    task = ng.GaussianTask(problem.input_moment, noise, cross, (output + output.T) / 2)
    assert relative(dl.fisher(problem.weights, task).to_dense(), hessian) <= 1e-10
    assert float(dl.excess_loss(problem.weights, task)) <= 1e-25


def test_targets_play_no_part():
    problem = case("intermediate 3")
    sigma, noise, cross, output = problem.moments
    other = Problem(problem.weights, sigma, noise, 0.0 * cross, output)
    np.testing.assert_array_equal(fisher_of(problem).to_dense(), fisher_of(other).to_dense())
    np.testing.assert_array_equal(fisher_of(problem).spectrum(), fisher_of(other).spectrum())


# -------------------------------------------------------------------- one object, many forms


@pytest.mark.parametrize("name", ["one layer", "intermediate 2", "all singular 3", "bottleneck 5"])
def test_every_block_is_its_place_in_the_whole(name):
    problem = case(name)
    fisher, dense = fisher_of(problem), problem.fisher()
    ends = np.cumsum([0, *(w.size for w in problem.weights)])
    for i, j in itertools.product(range(problem.depth), repeat=2):
        wanted = dense[ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
        assert relative(fisher.block(i, j), wanted) <= 1e-10
        forward, backward = fisher.factors(i, j)
        assert forward.shape == (problem.weights[i].shape[1], problem.weights[j].shape[1])
        assert backward.shape == (problem.weights[i].shape[0], problem.weights[j].shape[0])
        assert relative(np.kron(forward, backward), wanted) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_matvec_is_the_dense_product(name):
    problem = case(name)
    tangent = tangent_of(problem.weights, seed=4)
    found = fisher_of(problem).matvec(tangent)
    assert relative(stack(found), problem.fisher() @ stack(tangent)) <= 1e-10


def test_matvec_of_a_stack_of_tangents_by_one_network():
    problem = case("intermediate 3")
    rng = np.random.default_rng(0)
    tangents = tuple(rng.standard_normal((6, *w.shape)) for w in problem.weights)
    fisher = fisher_of(problem)
    for apply in (fisher.matvec, fisher.precondition, lambda d: fisher.precondition(d, inverse="moore_penrose")):
        found = apply(tangents)
        for k in range(6):
            alone = apply(tuple(d[k] for d in tangents))
            assert relative(stack([d[k] for d in found]), stack(alone)) <= 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_dense_matrix_is_symmetric_and_positive_semidefinite(name):
    dense = fisher_of(case(name)).to_dense()
    np.testing.assert_allclose(dense, dense.T, atol=1e-14 * np.max(np.abs(dense)))
    values = np.linalg.eigvalsh(dense)
    assert values[0] >= -1e-13 * values[-1]


@pytest.mark.parametrize("name", NAMES)
def test_rank_spectrum_and_determinant(name):
    problem = case(name)
    fisher = fisher_of(problem)
    pairs = problem.product.size
    dense = np.linalg.eigvalsh(problem.fisher())
    rank = int(np.sum(dense > 1e-10 * dense[-1]))
    assert int(fisher.rank()) == rank
    spectrum = fisher.spectrum()
    assert spectrum.shape == (pairs,)
    assert np.all(np.diff(spectrum) >= 0.0)
    assert np.all(spectrum >= 0.0)
    kept = dense[dense.size - rank :]
    assert relative(spectrum[pairs - rank :], kept) <= 1e-10
    assert np.all(spectrum[: pairs - rank] <= 1e-12 * spectrum[-1])
    assert abs(float(fisher.logdet()) - np.sum(np.log(kept))) <= 1e-10 * max(1.0, abs(np.sum(np.log(kept))))


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [((5, 2, 5), 16), ((6, 5, 4, 3), 18), ((7, 3, 6), 30), ((4, 1, 4), 7), ((5, 9, 2, 9, 4), 14), ((3, 3), 9)],
    ids=str,
)
def test_rank_of_random_networks_in_closed_form(sizes, rank):
    """r (n_0 + n_L − r) for the narrowest width r, n_0 n_L without a bottleneck."""
    weights = dl.gaussian(3, sizes, (5,), like=np.empty(0))
    n_in, n_out = sizes[0], sizes[-1]
    task = ng.GaussianTask(np.eye(n_in), np.eye(n_out), np.zeros((n_out, n_in)), np.eye(n_out))
    np.testing.assert_array_equal(dl.fisher(weights, task).rank(), np.full(5, float(rank)))


def test_fewer_parameters_than_pairs():
    """6 → 1 → 6 has 12 parameters, 11 of them seen, and 36 pairs of input and output."""
    weights = dl.gaussian(1, (6, 1, 6), like=np.empty(0))
    task = ng.GaussianTask(np.eye(6), np.eye(6), np.zeros((6, 6)), np.eye(6))
    fisher = dl.fisher(weights, task)
    assert fisher.n_parameters == 12
    assert float(fisher.rank()) == 11.0
    wanted = np.linalg.eigvalsh(fisher.to_dense())
    assert relative(fisher.spectrum()[-12:], wanted) <= 1e-12
    assert np.all(fisher.spectrum()[:-12] <= 1e-13 * wanted[-1])


def test_members_of_different_rank():
    problems = [
        well_conditioned((4, 4, 3), seed=0),
        well_conditioned((4, 4, 3), layer_ranks={0: 2}, seed=1),
        well_conditioned((4, 4, 3), layer_ranks={1: 1}, seed=2),
        well_conditioned((4, 4, 3), input_rank=2, seed=3),
    ]
    weights = tuple(np.stack([p.weights[i] for p in problems]) for i in range(2))
    fisher = dl.fisher(weights, ng.GaussianTask(*(np.stack([p.moments[i] for p in problems]) for i in range(4))))
    for k, problem in enumerate(problems):
        values = problem.spectrum()
        values = values[values > 1e-10 * values[-1]]
        assert int(fisher.rank()[k]) == values.size
        assert relative(fisher.spectrum()[k][-values.size :], values) <= 1e-10
        assert abs(float(fisher.logdet()[k]) - np.sum(np.log(values))) <= 1e-9


@pytest.mark.parametrize("name", FEW)
def test_one_object_serves_many_calls(name):
    """What is remembered between calls does not change an answer, in whatever order."""
    problem = case(name)
    tangent = tangent_of(problem.weights)
    inverses = ["layerwise", "exact", "moore_penrose"]
    fisher = fisher_of(problem)
    for inverse in [*inverses, *inverses[::-1]]:
        for method in ("auto", "eigh", "auto"):
            fresh = fisher_of(problem).precondition(tangent, inverse=inverse, method=method)
            again = fisher.precondition(tangent, inverse=inverse, method=method)
            for a, b in zip(again, fresh, strict=True):
                np.testing.assert_array_equal(a, b)
        fisher.precondition(tangent, inverse=inverse, rtol=0.1)


def test_object_made_outside_a_trace_and_used_in_it():
    """Nothing traced is kept: the object still works after the trace has ended, and in the next."""
    import jax

    problem = case("all singular 3")
    weights, moments = problem.on(JAX)
    fisher = JAX_JIT.call(lambda w, m: dl.fisher(w, ng.GaussianTask(*m)).rank(), weights, moments)
    assert float(fisher) == problem.rank()
    made = dl.fisher(weights, ng.GaussianTask(*moments))
    tangent = JAX.asarrays(*tangent_of(problem.weights))
    inside = jax.jit(lambda d: made.precondition(d, inverse="exact"))
    first = inside(tangent)
    second = jax.jit(lambda d: made.precondition(d, inverse="exact"))(tangent)
    wanted = problem.operator("exact") @ stack(tangent_of(problem.weights))
    assert relative(stack([np.asarray(d) for d in first]), wanted) <= 1e-10
    assert relative(stack([np.asarray(d) for d in second]), wanted) <= 1e-10


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("bad", [-1, 3, 1.0, True, None, "0"])
def test_layers_that_are_not_there(bad):
    fisher = fisher_of(case("intermediate 3"))
    for method in (fisher.block, fisher.factors):
        with pytest.raises(ValueError, match=r"i must be a layer from 0 to 2, got "):
            method(bad, 0)
        with pytest.raises(ValueError, match=r"j must be a layer from 0 to 2, got "):
            method(0, bad)


def test_a_matrix_that_would_not_fit(dtype):
    """Said before anything is allocated, with what to do instead."""
    one, eye = np.ones((), dtype=dtype), np.eye(2, dtype=dtype)
    weights = np.broadcast_to(one, (300_000, 2)), np.broadcast_to(one, (2, 300_000))
    fisher = dl.fisher(weights, ng.GaussianTask(eye, eye, 0 * eye, eye))
    message = (
        r"the dense Fisher matrix of shape \(1200000, 1200000\) needs about .* GB while .* GB are free; use F.matvec"
    )
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            fisher.to_dense()
        assert tracemalloc.get_traced_memory()[1] < 1e6
        with pytest.raises(ValueError, match=r"block \(0, 1\) of shape \(600000, 600000\) needs about .* F.matvec"):
            fisher.block(0, 1)
        assert tracemalloc.get_traced_memory()[1] < 5 * sum(w.size * w.itemsize for w in weights)
    finally:
        tracemalloc.stop()
    assert [d.shape for d in fisher.matvec(weights)] == [w.shape for w in weights]


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((24, 24, 24, 24), 1.3), ((300, 1), 2.1), ((1, 300), 2.1), ((300, 1, 1), 3.1), ((2, 150), 2.1)],
    ids=str,
)
def test_dense_matrix_takes_little_memory_beside_its_own(sizes, most):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((m, n)) for n, m in itertools.pairwise(sizes)]
    task = ng.GaussianTask(np.eye(sizes[0]), np.eye(sizes[-1]), np.zeros((sizes[-1], sizes[0])), np.eye(sizes[-1]))
    fisher = dl.fisher(weights, task)
    dense = fisher.to_dense()
    tracemalloc.start()
    try:
        fisher.to_dense()
        assert tracemalloc.get_traced_memory()[1] < most * dense.nbytes
    finally:
        tracemalloc.stop()


def test_the_dense_matrix_of_torch_has_its_derivatives():
    """It is written where it belongs in one pass, which torch does not differentiate."""
    torch = pytest.importorskip("torch")
    problem = well_conditioned((3, 2, 2), seed=2)
    weights = tuple(torch.asarray(w, requires_grad=True) for w in problem.weights)
    task = ng.GaussianTask(*(torch.asarray(moment) for moment in problem.moments))
    assert torch.autograd.gradcheck(lambda *w: dl.fisher(w, task).to_dense(), weights)
    given = dl.fisher(problem.weights, ng.GaussianTask(*problem.moments)).to_dense()
    with torch.no_grad():
        np.testing.assert_allclose(dl.fisher(weights, task).to_dense().numpy(), given, rtol=0, atol=1e-14)


def test_a_stack_that_would_not_fit():
    """It is the whole stack that has to fit, not one member."""
    one = np.ones(())
    weights = np.broadcast_to(one, (10_000_000, 3, 10)), np.ones((10, 3))
    task = ng.GaussianTask(np.eye(10), np.eye(10), np.zeros((10, 10)), np.eye(10))
    fisher = dl.fisher([w[:1] if w.ndim == 3 else w for w in weights], task)
    assert fisher.to_dense().shape == (1, 60, 60)
    with pytest.raises(ValueError, match=r"the end-to-end kernel of shape \(10000000, 100, 100\) needs about"):
        dl.end_to_end_kernel(weights)


def test_a_spectrum_that_would_not_fit():
    one = np.ones(())
    weights = np.broadcast_to(one, (1, 600)), np.broadcast_to(one, (600, 1))
    eye = np.eye(600)
    with pytest.raises(
        ValueError, match=r"the matrix behind the spectrum of shape \(360000, 360000\) needs about .* F.rank"
    ):
        dl.fisher(weights, ng.GaussianTask(eye, eye, 0 * eye, eye)).spectrum()


def test_properties():
    problem = case("intermediate 3")
    fisher = fisher_of(problem)
    assert fisher.n_parameters == sum(w.size for w in problem.weights)
    assert fisher.batch_shape == ()
    weights = [np.stack([w] * 3) for w in problem.weights]
    assert dl.fisher(weights, ng.GaussianTask(*problem.moments)).batch_shape == (3,)


def test_split_is_the_inverse_of_stack():
    """The order of parameters in dense matrices: layers in order, columns stacked."""
    problem = case("intermediate 3")
    dense = fisher_of(problem).to_dense()
    column = np.zeros(dense.shape[0])
    column[7] = 1.0
    found = fisher_of(problem).matvec(tuple(split(column, problem.weights)))
    assert relative(stack(found), dense[:, 7]) <= 1e-12
    assert NUMPY.to_numpy(found[0]).shape == problem.weights[0].shape
