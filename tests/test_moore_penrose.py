"""The Moore–Penrose natural gradient against the dense pseudo-inverse of F, by every way it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import JAX_JIT, NUMPY, Backend
from reference import CASES, Problem, case, pinv, relative, split, stack, tangent_of, well_conditioned

import natgrad_array as ng
from natgrad_array import deep_linear as dl

NAMES = list(CASES)

#: More than 64 pairs of input and output and three layers or more: conjugate gradients.
ITERATED = {
    "wide": ((8, 10, 9, 9), {}),
    "square": ((9, 9, 9, 9), {}),
    "expanding": ((7, 8, 9, 10), {}),
    "contracting": ((10, 9, 8, 7), {}),
    "bottleneck": ((10, 3, 8, 8), {}),
    "two bottlenecks": ((9, 4, 8, 3, 9), {}),
    "dead inputs": ((10, 9, 9, 9), {"input_rank": 8}),
    "dead inputs and bottleneck": ((11, 9, 4, 8), {"input_rank": 9}),
    "first layer singular": ((9, 9, 8, 9), {"layer_ranks": {0: 6}}),
    "middle layer singular": ((9, 9, 9, 9), {"layer_ranks": {1: 5}}),
    "last layer singular": ((9, 8, 9, 9), {"layer_ranks": {2: 5}}),
    "two layers singular": ((9, 9, 8, 9, 8), {"layer_ranks": {0: 7, 2: 6}}),
    "all layers singular": ((9, 9, 9, 9), {"layer_ranks": {0: 7, 1: 7, 2: 7}}),
    "dead inputs, singular layers": ((10, 9, 9, 9), {"input_rank": 9, "layer_ranks": {0: 7, 2: 6}}),
    "deep": ((8, 9, 9, 9, 9, 9), {}),
}


def tolerance(backend: Backend, dtype: str = "float64") -> float:
    return 1e-10 if dtype == "float64" and backend.float64 else 1e-3


def fisher_of(problem: Problem) -> dl.DeepLinearFisher:
    return dl.fisher(problem.weights, ng.GaussianTask(*problem.moments))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_tangent_against_the_dense_pseudo_inverse(dtype, name):
    problem = case(name)
    weights, moments = problem.on(NUMPY, dtype)
    operator = pinv(problem.fisher())
    task = ng.GaussianTask(*moments)
    found = dl.natural_gradient(weights, task, inverse="moore_penrose")
    assert relative(stack(found), operator @ stack(problem.gradient())) <= tolerance(NUMPY, dtype)
    tangent = tangent_of(problem.weights, seed=3)
    found = dl.fisher(weights, task).precondition([d.astype(dtype) for d in tangent], inverse="moore_penrose")
    assert all(d.dtype == np.dtype(dtype) for d in found)
    assert relative(stack(found), operator @ stack(tangent)) <= tolerance(NUMPY, dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ITERATED)
def test_conjugate_gradients(dtype, name, seed):
    sizes, options = ITERATED[name]
    problem = well_conditioned(sizes, seed=seed, **options)
    assert problem.depth > 2
    assert sizes[0] * sizes[-1] > 64
    weights, moments = problem.on(NUMPY, dtype)
    operator = pinv(problem.fisher())
    task = ng.GaussianTask(*moments)
    found = dl.natural_gradient(weights, task, inverse="moore_penrose")
    assert relative(stack(found), operator @ stack(problem.gradient())) <= tolerance(NUMPY, dtype)
    tangent = tangent_of(problem.weights, seed=3)
    found = dl.fisher(weights, task).precondition([d.astype(dtype) for d in tangent], inverse="moore_penrose")
    assert relative(stack(found), operator @ stack(tangent)) <= tolerance(NUMPY, dtype)


@pytest.mark.parametrize(
    "name", ["one layer, dead inputs", "bottleneck 2", "all singular 3", "many pairs, bottleneck 3"]
)
def test_on_every_library(backend, name):
    """Closed form, Sylvester, dense root and conjugate gradients; a made task goes in, also under jit."""
    if backend.name == "jax":
        backend = JAX_JIT
    problem = case(name)
    weights, moments = problem.on(backend)
    tangent = backend.asarrays(*tangent_of(problem.weights))

    def both(w: Any, m: Any, d: Any) -> Any:
        task = ng.GaussianTask(*m)
        fisher = dl.fisher(w, task)
        return dl.natural_gradient(w, task, inverse="moore_penrose"), fisher.precondition(d, inverse="moore_penrose")

    for found, desired in zip(
        backend.call(both, weights, moments, tangent), (problem.gradient(), tangent_of(problem.weights)), strict=True
    ):
        for array in found:
            backend.check(array, weights[0])
        wanted = pinv(problem.fisher()) @ stack(desired)
        assert relative(stack([backend.to_numpy(d) for d in found]), wanted) <= tolerance(backend)


@pytest.mark.parametrize("name", ["one layer", "intermediate 2", "bottleneck 3", "many pairs, wide 3"])
def test_the_four_penrose_conditions(name):
    """As an operator on all unit tangents, with F dense."""
    problem = case(name)
    fisher = problem.fisher()
    size = fisher.shape[0]
    units = tuple(np.stack(parts) for parts in zip(*(split(e, problem.weights) for e in np.eye(size)), strict=True))
    columns = fisher_of(problem).precondition(units, inverse="moore_penrose")
    inverse = np.stack([stack([part[k] for part in columns]) for k in range(size)], axis=-1)
    assert relative(fisher @ inverse @ fisher, fisher) <= 1e-10
    assert relative(inverse @ fisher @ inverse, inverse) <= 1e-10
    assert relative((fisher @ inverse).T, fisher @ inverse) <= 1e-10
    assert relative((inverse @ fisher).T, inverse @ fisher) <= 1e-10


def gaps(problem: Problem) -> list[float]:
    """Cut-offs in the two widest gaps of the spectrum of F, so that none is close to an eigenvalue."""
    values = problem.spectrum()[::-1]
    values = values[values > 1e-9 * values[0]]
    widths = values[:-1] / values[1:]
    widest = np.argsort(widths)[::-1][:2]
    return [float(np.sqrt(values[k] * values[k + 1]) / values[0]) for k in widest]


@pytest.mark.parametrize(
    "name",
    ["one layer", "one layer, dead inputs", "intermediate 2", "bottleneck 3", "all singular 3", "many pairs, wide 3"],
)
def test_truncated_pseudo_inverse(name):
    """An explicit cut-off is one on the eigenvalues of F."""
    problem = case(name)
    tangent = tangent_of(problem.weights, seed=1)
    task = ng.GaussianTask(*problem.moments)
    for rtol in gaps(problem):
        operator = pinv(problem.fisher(), rtol)
        assert np.linalg.matrix_rank(operator, tol=1e-9 * np.linalg.norm(operator)) < problem.rank()
        for given in (rtol, np.asarray(rtol)):
            found = dl.natural_gradient(problem.weights, task, inverse="moore_penrose", rtol=given)
            assert relative(stack(found), operator @ stack(problem.gradient())) <= 1e-10
            found = dl.fisher(problem.weights, task).precondition(tangent, inverse="moore_penrose", rtol=given)
            assert relative(stack(found), operator @ stack(tangent)) <= 1e-10


@pytest.mark.parametrize("sizes", [(5, 3), (6, 4, 3), (4, 5, 4, 3)], ids=str)
def test_cut_off_of_each_member(backend, sizes):
    """Beside each other: a common cut-off, one in a gap, everything cut, a negative one."""
    if backend.name == "jax":
        backend = JAX_JIT
    one = well_conditioned(sizes, seed=3)
    rtols = np.asarray([1e-6, gaps(one)[0], 2.0, -1.0])
    problem = Problem(tuple(np.stack([w] * 4) for w in one.weights), *one.moments)
    weights, moments = problem.on(backend)
    found = backend.call(
        lambda w, m, rtol: dl.natural_gradient(w, ng.GaussianTask(*m), inverse="moore_penrose", rtol=rtol),
        weights,
        moments,
        backend.asarray(rtols),
    )
    numbers = [backend.to_numpy(d) for d in found]
    for k in range(3):
        wanted = pinv(one.fisher(), rtols[k]) @ stack(one.gradient())
        assert relative(stack([d[k] for d in numbers]), wanted) <= tolerance(backend)
    assert np.all(np.isnan(stack([d[3] for d in numbers])))


@pytest.mark.parametrize("name", ["one layer", "intermediate 2", "intermediate 3"])
def test_cut_off_of_zero_on_full_column_rank(name):
    problem = case(name)
    task = ng.GaussianTask(*problem.moments)
    small = dl.natural_gradient(problem.weights, task, inverse="moore_penrose", rtol=1e-13)
    wanted = dl.natural_gradient(problem.weights, task, inverse="moore_penrose")
    assert relative(stack(small), stack(wanted)) <= 1e-10


@pytest.mark.parametrize("batch", [(0,), (1,), (7,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(5, 3), (6, 4, 3), (4, 2, 4, 3), (9, 4, 8, 8)], ids=str)
def test_stacks(batch, sizes):
    count = int(np.prod(batch))
    problems = [well_conditioned(sizes, seed=seed) for seed in range(count)]
    single = well_conditioned(sizes)
    pile = lambda pick, core: np.asarray([pick(p) for p in problems]).reshape(*batch, *core)  # noqa: E731
    weights = [pile(lambda p, i=i: p.weights[i], w.shape) for i, w in enumerate(single.weights)]
    moments = [pile(lambda p, i=i: p.moments[i], m.shape) for i, m in enumerate(single.moments)]
    found = dl.natural_gradient(weights, ng.GaussianTask(*moments), inverse="moore_penrose")
    for d, w in zip(found, weights, strict=True):
        assert d.shape == w.shape
    for index, problem in zip(np.ndindex(*batch), problems, strict=True):
        assert relative(stack([d[index] for d in found]), stack(problem.direction("moore_penrose"))) <= 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["one layer", "bottleneck 2", "bottleneck 3", "many pairs, bottleneck 3"])
def test_scale_of_inputs_and_noise(name, scale):
    """F scales by the units of the data; its pseudo-inverse undoes it."""
    problem = case(name)
    rescaled = Problem(
        problem.weights,
        problem.input_moment * scale**2,
        problem.noise_covariance,
        problem.cross_moment * scale**2,
        problem.output_moment * 1.0 if scale < 1 else problem.output_moment * scale**2,
    )
    found = dl.natural_gradient(rescaled.weights, ng.GaussianTask(*rescaled.moments), inverse="moore_penrose")
    assert relative(stack(found), stack(problem.direction("moore_penrose"))) <= 1e-10


def test_parameters_that_are_fewer_than_pairs():
    """9 → 1 → 1 → 9 has 19 parameters and 81 pairs."""
    problem = well_conditioned((9, 1, 1, 9), seed=2)
    found = dl.natural_gradient(problem.weights, ng.GaussianTask(*problem.moments), inverse="moore_penrose")
    assert relative(stack(found), stack(problem.direction("moore_penrose"))) <= 1e-10
    tangent = tangent_of(problem.weights)
    found = fisher_of(problem).precondition(tangent, inverse="moore_penrose")
    assert relative(stack(found), pinv(problem.fisher()) @ stack(tangent)) <= 1e-10


def test_unbalanced_layers_take_more_rounds_and_get_there():
    """Conjugate gradients on a kernel far from diagonal in the bases of its ends."""
    problem = well_conditioned((9, 12, 7, 12, 10, 9), seed=4)
    task = ng.GaussianTask(*problem.moments)
    found = dl.natural_gradient(problem.weights, task, inverse="moore_penrose")
    assert relative(stack(found), stack(problem.direction("moore_penrose"))) <= 1e-10


def test_a_dense_root_that_would_not_fit():
    one = np.ones(())
    weights = np.broadcast_to(one, (600, 600)), np.broadcast_to(one, (600, 600)), np.broadcast_to(one, (600, 600))
    eye = np.eye(600)
    task = ng.GaussianTask(eye, eye, 0 * eye, eye)
    with pytest.raises(
        ValueError, match=r"the root of the Fisher matrix of shape \(1080000, 360000\) .* leave rtol at None"
    ):
        dl.fisher(weights, task).precondition(weights, inverse="moore_penrose", rtol=1e-3)
