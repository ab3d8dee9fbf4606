"""Stacks cut into pieces for threads, and members computed again: nothing is lost, mixed up or touched twice."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import JAX_JIT, Backend

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array import deep_linear as dl


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two matrices 16 × 16, in three threads."""
    monkeypatch.setattr(_arrays.pieces, "PIECE_BYTES", 2 * 16 * 16 * 8)
    monkeypatch.setattr(_arrays.pieces, "usable_threads", lambda: 3)


def both_products(a: Any, b: Any) -> tuple[Any, Any]:
    return a @ b, b @ a


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((7,), (7,)),
        ((7,), ()),
        ((2, 9), (9,)),
        ((9, 2), (9, 1)),
        ((1, 8), (3, 1)),
        ((1,), (1,)),
        ((0,), (0,)),
        ((), ()),
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_make_up_the_whole(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((*first, 16, 16)), rng.standard_normal((*second, 16, 16))
    found = _arrays.in_pieces(both_products, (a, b), [(16, 16), (16, 16)])
    np.testing.assert_allclose(found[0], np.einsum("...ij,...jk->...ik", a, b), atol=1e-13)
    np.testing.assert_allclose(found[1], np.einsum("...ij,...jk->...ik", b, a), atol=1e-13)


def test_torch_makes_its_pieces_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_arrays.pieces, "PIECE_BYTES", 2 * 4 * 4 * 8)
    monkeypatch.setattr(_arrays.pieces, "_cache_bytes", lambda: 0)
    rng = np.random.default_rng(0)
    a, b = (torch.asarray(rng.standard_normal(shape), requires_grad=True) for shape in ((2, 21, 4, 4), (21, 4, 4)))
    lengths = []

    def work(a: Any, b: Any) -> tuple[Any, Any]:
        assert threading.current_thread() is threading.main_thread()
        lengths.append((a.shape[1], b.shape[0]))
        return both_products(a, b)

    found = _arrays.in_pieces(work, (a, b), [(4, 4), (4, 4)])
    assert set(lengths) == {(1, 1), (2, 2)}
    assert sum(length for length, _ in lengths) == 21
    wanted = both_products(a, b)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    gradients = [torch.autograd.grad(sum(part.square().sum() for part in parts), (a, b)) for parts in (found, wanted)]
    assert all(torch.allclose(f, w) for f, w in zip(*gradients, strict=True))


def test_torch_leaves_whole_what_the_last_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_arrays.pieces, "PIECE_BYTES", 2 * 4 * 4 * 8)
    a, cores = torch.zeros((42, 4, 4), dtype=torch.float64), [(4, 4), (4, 4)]
    for cache, whole in ((0, False), (2 * 3 * a.nbytes - 1, False), (2 * 3 * a.nbytes, True)):
        monkeypatch.setattr(_arrays.pieces, "_cache_bytes", lambda size=cache: size)
        assert _arrays.pays_in_pieces((a,), cores) is not whole
    # What is mapped anew each time is cut even so.
    monkeypatch.setattr(_arrays.pieces, "MAPPED_BYTES", a.nbytes)
    assert _arrays.pays_in_pieces((a,), cores)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_run_in_threads_and_in_the_context_of_the_caller() -> None:
    a = np.ones((12, 16, 16))
    a[5] = 0.0
    names, lengths = [], []

    def reciprocal(a: Any) -> tuple[Any]:
        names.append(threading.current_thread().name)
        lengths.append(a.shape[0])
        return (1.0 / a,)

    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = _arrays.in_pieces(reciprocal, (a,), [(16, 16)])
    assert np.isinf(found[5]).all()
    assert np.all(np.delete(found, 5, axis=0) == 1.0)
    assert sorted(lengths) == [2] * 6
    assert set(names) <= {threading.main_thread().name, "natgrad_array_0", "natgrad_array_1"}


def test_threads_keep_the_order_and_share_their_processors_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrays.pieces.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    together = threading.Barrier(3)  # each of three threads takes a piece, or this waits

    def work(k: int) -> tuple[int, int, str]:
        if k in (0, 1, 19):
            together.wait(timeout=60)
        return k, _arrays.usable_threads(), threading.current_thread().name

    found = _arrays.in_threads(work, range(20), 3)
    assert [k for k, _, _ in found] == list(range(20))
    assert {threads for _, threads, _ in found} == {1}
    assert len({name for _, _, name in found}) == 3
    assert _arrays.usable_threads() == 6


def test_a_piece_that_a_thread_has_taken_and_not_begun_is_not_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(concurrent.futures.Future[int]):
        """Begins only when somebody waits for it, behind a piece that is at work already."""

        def __init__(self, work: Callable[[], int]) -> None:
            super().__init__()
            self.work = work

        def result(self, timeout: float | None = None) -> int:
            if not self.done() and self.set_running_or_notify_cancel():
                self.set_result(self.work())
            return super().result(timeout)

    class Pool:
        """Of two threads: one has taken the first piece, the other has done the second."""

        def submit(self, *call: Any) -> concurrent.futures.Future[int]:
            future = Taken(functools.partial(*call))
            if call[-1] == 1:
                future.result()
            return future

    monkeypatch.setattr(_arrays.pieces, "_pool", lambda _: Pool())
    assert _arrays.in_threads(lambda k: 10 + k, [0, 1, 2], 3) == [10, 11, 12]


@pytest.mark.parametrize("sizes", [(16, 16, 16), (48, 32, 24, 16), (32, 8, 32)], ids=str)
def test_digits_of_simulations_do_not_depend_on_threads(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    weights = tuple(rng.standard_normal((64, m, n)) / n**0.5 for n, m in itertools.pairwise(sizes))
    task = ng.GaussianTask.from_samples(rng.standard_normal((99, sizes[0])), rng.standard_normal((99, sizes[-1])))
    found = []

    def run() -> None:
        found.append(ng.simulate(weights, task, learning_rate=0.02, steps=3))

    for threads in ("1", "3"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        monkeypatch.setattr(_arrays.pieces.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
        run()
    elsewhere = threading.Thread(target=run)
    elsewhere.start()
    elsewhere.join()
    for other in found[1:]:
        np.testing.assert_array_equal(other.loss, found[0].loss)
        for a, b in zip(other.weights, found[0].weights, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(found) == 3


@pytest.mark.usefixtures("small_pieces")
def test_what_goes_wrong_in_a_piece_is_raised() -> None:
    def fail(a: Any) -> tuple[Any]:
        raise MemoryError(f"no room for {a.shape[0]} members")

    with pytest.raises(MemoryError, match="no room for 2"):
        _arrays.in_pieces(fail, (np.ones((12, 16, 16)),), [(16, 16)])


@pytest.mark.parametrize(("n", "pieces"), [(8, 21), (16, 21), (65, 1)])
@pytest.mark.usefixtures("small_pieces")
def test_large_matrices_stay_together_and_small_ones_are_cut_to_a_quarter(n: int, pieces: int) -> None:
    lengths = []

    def keep(a: Any, _: Any) -> tuple[Any]:
        lengths.append(a.shape[0])
        return (a,)

    # A matrix that all share counts for nothing.
    _arrays.in_pieces(keep, (np.ones((40, n, n)), np.ones((99, 99))), [(n, n)])
    assert sum(lengths) == 40
    assert len(lengths) == pieces


def test_threads_follow_the_limits_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrays.pieces.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert _arrays.usable_threads() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert _arrays.usable_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    assert _arrays.usable_threads() == 6
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert _arrays.usable_threads() == 1
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(_arrays.usable_threads()))
    thread.start()
    thread.join()
    assert seen == [1]


@pytest.mark.parametrize("sizes", [(16, 16, 16), (20, 16, 18), (18, 16, 24)], ids=str)
def test_directions_in_pieces_are_those_of_the_whole(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the members a singular layer, a NaN and a product too ill conditioned for one inverse."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((24, m, n)) / n**0.5 for n, m in itertools.pairwise(sizes)]
    weights[0][3, 0] = weights[0][3, 1]
    weights[1][7, 0, 0] = np.nan
    weights[0][11, 0] = weights[0][11, 1] + 1e-7 * weights[0][11, 0]
    n_in, n_out = sizes[0], sizes[-1]
    teacher = rng.standard_normal((n_out, n_in))
    task = ng.GaussianTask(np.eye(n_in), np.eye(n_out), teacher, teacher @ teacher.T + np.eye(n_out))
    alone = [dl.natural_gradient(tuple(w[b] for w in weights), task) for b in range(24)]
    monkeypatch.setattr(_arrays.pieces, "PIECE_BYTES", 4 * 24 * 24 * 8)
    monkeypatch.setattr(_arrays.pieces, "usable_threads", lambda: 2)
    found = dl.natural_gradient(tuple(weights), task)
    for b, directions in enumerate(alone):
        for whole, one in zip(found, directions, strict=True):
            assert np.isnan(whole[b]).all() == np.isnan(one).all() == (b == 7)
            if b != 7:
                assert np.linalg.norm(whole[b] - one) <= 1e-6 * np.linalg.norm(one)


@pytest.mark.usefixtures("small_pieces")
def test_pseudo_inverses_in_pieces_keep_the_cutoff_of_each_member() -> None:
    """Against the spectral sum of each member, with another cut-off and a NaN among them."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((2, 24, 4, 4)))[0]
    values = np.asarray([1.0, 0.5, 0.1, 0.0])
    a = (basis * values) @ np.swapaxes(basis, -1, -2)
    a[1, 5, 0, 0] = np.nan
    rtol = np.where(np.arange(24) % 2, 0.2, 0.01)
    found = ng.pinvh(a, rtol=rtol, method="eigh")
    kept = values > rtol[:, None]
    inverse = np.where(kept, 1.0 / np.where(kept, values, 1.0), 0.0)
    wanted = (basis * inverse[:, None, :]) @ np.swapaxes(basis, -1, -2)
    assert np.isnan(found[1, 5]).all()
    found[1, 5] = wanted[1, 5]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


# --------------------------------------------------------------------- members computed again


@pytest.mark.parametrize("flagged", [[], [3], [0, 39], [0, 3, 7], list(range(0, 40, 2)), list(range(40))], ids=len)
def test_only_flagged_members_are_replaced(backend: Backend, flagged: list[int]) -> None:
    """None, one, a sixteenth of the stack and less, more, most and all of them, in a trace too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3, 2))
    shared = rng.standard_normal((2, 2))
    flags = np.zeros(40)
    flags[flagged] = 1.0

    def run(flags: Any, x: Any, shared: Any) -> Any:
        return _arrays.repair(
            backend.xp, flags > 0.5, (x + 0.0, -x), (x, shared), lambda x, shared: (x @ shared, 2.0 * x @ shared)
        )

    found = backend.call(run, *backend.asarrays(flags, x, shared))
    for actual, slow, fast in zip(found, (x @ shared, 2 * x @ shared), (x, -x), strict=True):
        wanted = np.where(flags[:, None, None] > 0.5, slow, fast)
        np.testing.assert_allclose(backend.to_numpy(actual), wanted, rtol=1e-5, atol=1e-5)


def test_a_trace_computes_few_members_again() -> None:
    """Nothing is computed for all 40 members at once: for 2 of them, or for 3 in each of 16 turns."""
    lengths = []

    def slow(x: Any) -> tuple[Any]:
        lengths.append(x.shape[0])
        return (x,)

    x = JAX_JIT.asarray(np.zeros((40, 3, 3)))
    JAX_JIT.call(lambda x: _arrays.repair(JAX_JIT.xp, x[:, 0, 0] > 0, (x,), (x,), slow), x)
    assert set(lengths) == {2, 3}
