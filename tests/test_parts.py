"""Compiled functions of JAX by several threads: parts make up the whole, and calls of LAPACK stay few."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import jax
import numpy as np
import pytest
from backends import JAX, JAX_JIT

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import control, parts
from natgrad_array.deep_linear import layerwise


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For parts however small, each with one call of LAPACK at a time."""
    monkeypatch.setattr(parts, "_LEAST_FLOPS", 1)
    monkeypatch.setattr(parts, "FEWEST", 2)
    monkeypatch.setattr(parts, "usable_threads", lambda: 3)
    monkeypatch.setenv("NPROC", "6")


class Products:
    """Two products of stacks, one times a number in the precision of JAX's settings; what was traced for it."""

    def __init__(self) -> None:
        self.traced: list[tuple[int, ...]] = []

    def __call__(self, factor: float, a: Any, b: Any) -> tuple[Any, Any]:
        self.traced.append(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
        return jax.numpy.linspace(factor, factor, 1) * (a @ b), b @ a


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("first", "second", "traced"),
    [
        ((9,), (9,), [(3,)]),
        ((7,), (), [(2,), (3,)]),
        ((2, 9), (9,), [(2, 3)]),
        ((9, 2), (9, 1), [(3, 2)]),
        ((1, 8), (3, 1), [(3, 2), (3, 3)]),
        ((3,), (3,), [(3,)]),
        ((0,), (0,), [(0,)]),
        ((), (), [()]),
    ],
    ids=str,
)
def test_parts_make_up_the_whole(
    first: tuple[int, ...], second: tuple[int, ...], traced: list[tuple[int, ...]]
) -> None:
    """With a function traced once for each length of a part."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((*first, 4, 4)), rng.standard_normal((*second, 4, 4))
    function = Products()
    found = _arrays.in_parts(function, 2.0, JAX.asarrays(a, b), [(4, 4), (4, 4)], calls=1)
    np.testing.assert_allclose(found[0], 2.0 * np.einsum("...ij,...jk->...ik", a, b), atol=1e-13)
    np.testing.assert_allclose(found[1], np.einsum("...ij,...jk->...ik", b, a), atol=1e-13)
    assert sorted(function.traced) == traced


@pytest.mark.usefixtures("three_threads")
def test_parts_follow_the_settings_of_their_caller() -> None:
    """Which a thread of its own would not know; and what they are compiled for."""
    function, one = Products(), np.ones((6, 4, 4), dtype=np.float32)
    for wide in (True, False, True):
        with jax.enable_x64(wide):
            found = _arrays.in_parts(function, 1.0, JAX.asarrays(one, one), [(4, 4), (4, 4)], calls=0)
        assert [part.dtype for part in found] == [np.float64 if wide else np.float32, np.float32]
    assert function.traced == [(2,), (2,)]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("calls", "processors", "threads"), [(0, 1, 3), (1, 6, 3), (1, 4, 2), (1, 2, 1), (2, 6, 1)])
def test_so_many_parts_as_calls_of_lapack_can_be_side_by_side(
    calls: int, processors: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in each as many as then are left."""
    monkeypatch.setenv("NPROC", str(processors))
    seen: list[set[bool]] = []
    at_work: set[int] = set()

    def look(_: None, a: Any) -> tuple[Any]:
        seen.append({_arrays.calls_may_meet(a, count) for count in (1, processors // 2 // threads)})
        return (a,)

    in_threads = parts.in_threads

    def spy(work: Any, ways: list[Any], count: int) -> list[Any]:
        def noted(way: Any) -> Any:
            at_work.add(threading.get_ident())
            return work(way)

        assert len(ways) == count == threads
        return in_threads(noted, ways, count)

    monkeypatch.setattr(parts, "in_threads", spy)
    _arrays.in_parts(look, None, JAX.asarrays(np.ones((12, 4, 4))), [(4, 4)], calls=calls)
    assert len(at_work) <= threads
    assert bool(at_work) == (threads > 1)
    if calls:
        assert seen == [{False}]


@pytest.mark.usefixtures("three_threads")
def test_a_trace_has_no_parts() -> None:
    function = Products()
    one = JAX.asarray(np.ones((6, 4, 4)))
    JAX_JIT.call(lambda a: _arrays.in_parts(function, 1.0, (a, a), [(4, 4), (4, 4)], calls=0), one)
    assert function.traced == [(6,)]


@pytest.mark.usefixtures("three_threads")
def test_arrays_of_any_layout_and_no_compiler_at_all() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((9, 4, 4))
    other = jax.numpy.from_dlpack(np.ascontiguousarray(a.mT).mT)
    for given in (other, JAX.asarray(a)):
        with jax.disable_jit(given is not other):
            found = _arrays.in_parts(Products(), 1.0, (given, given), [(4, 4), (4, 4)], calls=0)
        np.testing.assert_allclose(found[1], a @ a, atol=1e-13)


def test_processors_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX has as many threads, whatever else the machine has."""
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(control.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(control.os, "sched_getaffinity", lambda _: {3, 4, 5, 6}, raising=False)
    assert control.most_calls() == 2
    monkeypatch.setenv("NPROC", "12")
    assert control.most_calls() == 6


@pytest.mark.parametrize(
    ("sizes", "rank", "count"),
    [
        ((48, 32, 24, 16), 48, 0),
        ((9, 4, 9), 9, 0),
        ((32, 24, 8, 24, 32), 32, 0),
        ((32, 40, 32, 50), 32, 1),
        ((32, 40, 32, 40, 32), 32, 3),
        ((64, 32, 50), 32, 1),
    ],
    ids=str,
)
def test_square_factors_are_inverted_by_lapack(sizes: tuple[int, ...], rank: int, count: int) -> None:
    """So many at most may meet: products of layers, or of layers and the root of Σ."""
    layers = tuple(np.ones((2, m, n)) for n, m in itertools.pairwise(sizes))
    moment = np.diag(1.0 * (np.arange(sizes[0]) < rank))
    task = ng.GaussianTask(moment, np.eye(sizes[-1]), np.zeros((sizes[-1], sizes[0])), np.eye(sizes[-1]))
    assert layerwise._square_factors(layers, task.factors) == count


def test_what_is_differentiated_is_not_given_away() -> None:
    """With respect to one layer only, with a member that is computed again; against central differences."""
    rng = np.random.default_rng(0)
    first, second = (np.linalg.qr(rng.standard_normal((8, 6, 6)))[0] for _ in range(2))
    first[3] *= [1.0, 1.0, 1.0, 1.0, 1.0, 1e-5]
    teacher = rng.standard_normal((6, 6))
    task = ng.GaussianTask(*JAX.asarrays(np.eye(6), np.eye(6), teacher, teacher @ teacher.T + np.eye(6)))
    ahead, step = JAX.asarray(first), rng.standard_normal((8, 6, 6))

    def total(layer: Any) -> Any:
        return sum(d[:, 0, :].sum() for d in dl.natural_gradient((ahead, layer), task))

    found = np.sum(np.asarray(jax.grad(total)(JAX.asarray(second))) * step)
    sides = [float(total(JAX.asarray(second + sign * 1e-6 * step))) for sign in (1.0, -1.0)]
    assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("sizes", [(18, 18, 18, 18), (8, 8, 8, 8), (12, 8, 6, 5), (9, 4, 9)], ids=str)
@pytest.mark.parametrize("spread", [0.5, 1e4], ids=["by one inverse", "by pairs"])
def test_directions_in_parts_are_those_of_the_whole(
    sizes: tuple[int, ...], spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the members a singular layer and a NaN; against NumPy's, one by one."""
    rng = np.random.default_rng(0)
    weights = []
    for n, m in itertools.pairwise(sizes):
        u, s, vh = np.linalg.svd(rng.standard_normal((36, m, n)), full_matrices=False)
        weights.append((u * np.geomspace(1.0, spread, s.shape[-1])) @ vh)
    weights[0][3, 0] = weights[0][3, 1]
    weights[1][7, 0, 0] = np.nan
    n_in, n_out = sizes[0], sizes[-1]
    teacher = rng.standard_normal((n_out, n_in))
    given = np.eye(n_in), np.eye(n_out), teacher, teacher @ teacher.T + np.eye(n_out)
    task = ng.GaussianTask(*given)
    alone = [dl.natural_gradient(tuple(w[b] for w in weights), task) for b in range(36)]
    lengths = []
    in_threads = parts.in_threads

    def spy(work: Any, ways: list[Any], count: int) -> list[Any]:
        lengths.append(count)
        return in_threads(work, ways, count)

    monkeypatch.setattr(parts, "in_threads", spy)
    found = dl.natural_gradient(JAX.asarrays(*weights), ng.GaussianTask(*JAX.asarrays(*given)))
    assert 3 in lengths
    for b, directions in enumerate(alone):
        for whole, one in zip(found, directions, strict=True):
            assert np.isnan(whole[b]).all() == np.isnan(one).all() == (b == 7)
            if b != 7:
                assert np.linalg.norm(whole[b] - one) <= 1e-6 * np.linalg.norm(one)
