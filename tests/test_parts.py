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
from natgrad_array._arrays import parts


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

        assert len(ways) == count
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
