"""The clock, and the other things that are measured."""

from __future__ import annotations

import contextlib
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np

from benchmarks.backends import Backend
from natgrad_array import _arrays

SAMPLE = 0.002
"""Calls shorter than this are repeated within a sample, in seconds."""

REST = 0.04
"""Between contestants, in seconds: OpenBLAS's threads look for work for some 30 ms before they sleep."""


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 15, budget: float = 5.0, warm: bool = True
) -> dict[str, list[float]]:
    """Time contestants in turns, so that what the machine does meanwhile meets all that take part alike.

    Each sample comes after a rest, in which the threads of the last contestant's BLAS leave the
    processors, and an untimed call: as in a loop that does nothing else.

    Parameters
    ----------
    calls : mapping of str to callable
        Each returns when its result is there.
    rounds : int
        At most so many samples of each.
    budget : float
        Seconds of calls, in equal shares: who has used up its own sits out the rounds that are left,
        from the fourth on, so that a slow contestant takes no samples from the others. A call
        that alone takes longer is timed once, and not in turns.
    warm : bool
        Call each once before, for compilers and caches.

    Returns
    -------
    dict of str to list of float
        Seconds a call.
    """
    numbers = {}
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for label, call in calls.items():
        if warm:
            call()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds > budget > 0.0:
            samples[label].append(seconds)
        else:
            numbers[label] = max(1, round(SAMPLE / max(seconds, 1e-7)))
    order, spent = list(numbers), dict.fromkeys(numbers, 0.0)
    for done in range(rounds):
        # Whoever goes first finds the caches as the last one left them: take turns at that too.
        first = done % max(1, len(order))
        for label in order[first:] + order[:first]:
            if done >= 3 and spent[label] > budget / len(order):
                continue
            call, number = calls[label], numbers[label]
            time.sleep(REST)
            call()
            start = time.perf_counter()
            for _ in range(number):
                call()
            seconds = time.perf_counter() - start
            samples[label].append(seconds / number)
            spent[label] += seconds
    return samples


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(samples) < 2:
        return (samples[0],) * 3
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third


def peak_bytes(backend: Backend, call: Callable[[], Any]) -> int:
    """Memory that a call takes at its peak beyond what is there before it, its result included.

    NumPy's arrays are seen by `tracemalloc`. CuPy's pool does not give back what it once
    took from the device, so what it holds afterwards is the peak.
    """
    if backend.name == "cupy":
        pool = backend.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        result = call()
        backend.synchronise(result)
        return int(pool.total_bytes() - before)
    if backend.name != "numpy":
        raise NotImplementedError(f"the memory of {backend.name} is not seen by tracemalloc")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def nbytes(value: Any) -> int:
    """Bytes of all arrays in nested tuples."""
    if isinstance(value, list | tuple):
        return sum(nbytes(item) for item in value)
    return int(getattr(value, "nbytes", 0))


class _Counter:
    """NumPy's namespace with a count of its calls; arrays stay NumPy arrays."""

    def __init__(self, module: ModuleType, total: list[int]) -> None:
        self._module, self._total = module, total

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name in ("linalg", "fft"):
            return _Counter(value, self._total)
        # A dtype is callable too, but naming one is not a call.
        if not callable(value) or isinstance(value, type):
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._total[0] += 1
            return value(*args, **kwargs)

        return counted


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Count calls of the array library by the package, on NumPy arrays: a list of one number.

    Operators between arrays are calls too, but do not go through the namespace: they are
    not in the count.
    """
    total = [0]
    original = _arrays.libraries.compat.array_namespace
    _arrays.libraries.compat.array_namespace = lambda *arrays, **options: _Counter(array_api_compat.numpy, total)
    try:
        yield total
    finally:
        _arrays.libraries.compat.array_namespace = original


def count_calls(call: Callable[[], Any]) -> int:
    """How many times a call goes to the array library."""
    with counting() as total:
        call()
    return total[0]


def relative_difference(result: Any, reference: Any) -> np.ndarray:
    """Frobenius norm of the difference over that of the reference, all arrays of a member together.

    Results are an array or a tuple of arrays, with members on the first axis where there
    are more than two axes.
    """
    results = result if isinstance(result, tuple) else (result,)
    references = reference if isinstance(reference, tuple) else (reference,)
    top = below = 0.0
    for x, y in zip(results, references, strict=True):
        x, y = (np.asarray(z, dtype=np.result_type(z, np.float64)) for z in (x, y))
        axes = tuple(range(-min(2, y.ndim), 0))
        top = top + np.sum((x - y) ** 2, axis=axes)
        below = below + np.sum(y**2, axis=axes)
    return np.atleast_1d(np.sqrt(top / below)).astype(np.float64)
