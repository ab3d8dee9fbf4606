"""Stacks on a CPU in pieces that fit a cache; those of NumPy by several threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import math
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from natgrad_array._arrays.checks import broadcast_shapes
from natgrad_array._arrays.control import usable_processors
from natgrad_array._arrays.factorisations import BLAS_THREADS_FROM
from natgrad_array._arrays.libraries import Array, Shape, is_jax, is_lazy, is_numpy, is_torch, namespace
from natgrad_array._arrays.schur import FEWEST

PIECE_BYTES = 2**20
"""The size of one stack of matrices that stays in a processor's cache with a few others."""


MAPPED_BYTES = 2**25
"""From here on glibc has memory for an array mapped anew each time, which takes longer than to fill it."""


def pays_in_pieces(arrays: tuple[Array, ...], cores: Sequence[Shape], *, one_by_one: bool = False) -> bool:
    """Whether `in_pieces` makes more than one piece."""
    batch = broadcast_shapes(array.shape[:-2] for array in arrays)
    if max(batch, default=1) < 2:
        return False
    if not is_numpy(arrays[0]):
        return _has_threads_within(arrays[0]) and not one_by_one and _pieces(batch, arrays, cores) > 1
    return (_threads(cores) > 0 or one_by_one) and _pieces(batch, arrays, cores) > 1


def _has_threads_within(array: Array) -> bool:
    """Whether each call works on a whole stack by several threads, and on a CPU: torch, or JAX in a trace."""
    if is_jax(array):
        return is_lazy(array) and sys.modules["jax"].default_backend() == "cpu"
    return is_torch(array) and array.device.type == "cpu"


def _threads(cores: Sequence[Shape]) -> int:
    """How many threads there are for pieces; none where BLAS has threads of its own."""
    return usable_threads() if max(side for core in cores for side in core) <= BLAS_THREADS_FROM else 0


def _pieces(batch: Shape, arrays: tuple[Array, ...], cores: Sequence[Shape]) -> int:
    """In how many pieces a stack fits into a processor's cache; two a thread at least where there is work for all.

    Products of matrices below 16 × 16 are over so soon that passes over memory decide: all
    stacks of a step, and not only a few, have to stay there.
    Large matrices take their turns, so that a piece may fill the cache that processors share.
    So do all on torch, where a call costs more, and a stack that fits a few times is left whole, as
    are all that the last cache of a large processor holds together.
    On JAX pieces are rounds of a loop, of one length, and long enough to be inverted by blocks.
    """
    if is_jax(arrays[0]):
        fewest = min(math.prod(array.shape[:-2]) for array in arrays if array.ndim > 2)
        most = min(2 * math.prod(batch) * _member_bytes(arrays, cores) // PIECE_BYTES, fewest // FEWEST)
        return max((k for k in range(1, most + 1) if max(batch) % k == 0), default=1)
    if not is_numpy(arrays[0]):
        stack = math.prod(batch) * _member_bytes(arrays, cores)
        if stack < 8 * PIECE_BYTES or (stack < MAPPED_BYTES and 2 * _all_bytes(batch, arrays, cores) <= _cache_bytes()):
            return 1
        return -(-stack // (2 * PIECE_BYTES))
    largest = max(side for core in cores for side in core)
    limit = PIECE_BYTES // 4 if largest < 16 else PIECE_BYTES if largest <= BLAS_THREADS_FROM else 4 * PIECE_BYTES
    count = -(-math.prod(batch) * _member_bytes(arrays, cores) // limit)
    flops = math.prod(batch) * sum(m * n * min(m, n) for m, n in cores)
    return max(count, min(2 * _threads(cores), flops // 2**21))


def _member_bytes(arrays: tuple[Array, ...], cores: Sequence[Shape]) -> int:
    """Bytes of the largest matrix of one member."""
    sizes = [math.prod(array.shape[-2:]) for array in arrays if array.ndim > 2] + [math.prod(core) for core in cores]
    return int(max(sizes) * arrays[0].dtype.itemsize)


def _all_bytes(batch: Shape, arrays: tuple[Array, ...], cores: Sequence[Shape]) -> int:
    """Bytes of all stacks that come in or go out."""
    sizes = [math.prod(array.shape) for array in arrays] + [math.prod(batch) * math.prod(core) for core in cores]
    return int(sum(sizes) * arrays[0].dtype.itemsize)


@functools.cache
def _cache_bytes() -> int:
    """The size of the last cache that the first processor has, as Linux tells it; 0 elsewhere."""
    found = 0
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            found = max(found, int(path.read_text().strip().removesuffix("K")) * 2**10)
    return found


def in_pieces(
    function: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    cores: Sequence[Shape],
    *,
    one_by_one: bool = False,
) -> tuple[Array, ...]:
    """Apply a function of stacks of matrices; on NumPy to pieces of the stacks, in threads.

    NumPy works on a stack with one processor, and for every step of a long computation goes
    through memory. Both cost a factor of two where the matrices are not so large that BLAS has
    threads of its own. Torch has threads, and gains from its pieces a fifth or so.

    Parameters
    ----------
    function : callable
        Takes arrays like `arrays` and returns a tuple of stacks with the batch axes of all
        of them; what it does for a member depends on no other.
    arrays : tuple of arrays, shapes (*batch, m, n)
        Batch axes may still have to broadcast.
    cores : sequence of tuple of int
        The core shapes of what `function` returns.
    one_by_one : bool
        Whether pieces of large matrices, for which BLAS has threads, are made one after the
        other; they are left whole without.
    """
    if not pays_in_pieces(arrays, cores, one_by_one=one_by_one):
        return function(*arrays)
    batch = broadcast_shapes(array.shape[:-2] for array in arrays)
    length = max(batch)
    count = min(length, _pieces(batch, arrays, cores))
    axis = batch.index(length) - len(batch) - 2

    def parts(piece: slice) -> list[Array]:
        return [array[_along(axis, piece)] if _has(array, axis, length) else array for array in arrays]

    def cut(count: int) -> list[slice]:
        return [slice(length * k // count, length * (k + 1) // count) for k in range(count)]

    if is_jax(arrays[0]):
        return _in_rounds(function, arrays, length, axis, count)
    if not is_numpy(arrays[0]):
        xp = namespace(arrays[0])
        columns = zip(*(function(*parts(piece)) for piece in cut(count)), strict=True)
        return tuple(xp.concat(column, axis=axis) for column in columns)
    threads = max(1, min(_threads(cores), count))
    count = min(length, -(-count // threads) * threads)
    results = tuple(np.empty((*batch, *core), dtype=arrays[0].dtype) for core in cores)

    def work(piece: slice) -> None:
        for result, part in zip(results, function(*parts(piece)), strict=True):
            result[_along(axis, piece)] = part

    in_threads(work, cut(count), threads)
    return results


def _in_rounds(
    function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], length: int, axis: int, count: int
) -> tuple[Array, ...]:
    """`in_pieces` as a loop in a JAX trace."""
    jax = sys.modules["jax"]
    cut = [_has(array, axis, length) for array in arrays]

    def rounds(array: Array) -> Array:
        at = array.ndim + axis
        shape = (*array.shape[:at], count, length // count, *array.shape[at + 1 :])
        return jax.numpy.moveaxis(array.reshape(shape), at, 0)

    def one(pieces: tuple[Array, ...]) -> tuple[Array, ...]:
        own = iter(pieces)
        return function(*(next(own) if is_cut else array for is_cut, array in zip(cut, arrays, strict=True)))

    results = jax.lax.map(one, tuple(rounds(array) for is_cut, array in zip(cut, arrays, strict=True) if is_cut))

    def joined(array: Array) -> Array:
        at = array.ndim - 1 + axis
        array = jax.numpy.moveaxis(array, 0, at)
        return array.reshape(*array.shape[:at], length, *array.shape[at + 2 :])

    return tuple(joined(result) for result in results)


def in_threads(work: Callable[[Any], Any], pieces: Sequence[Any], threads: int) -> list[Any]:
    """What `work` returns for each piece, in order; by several threads where more than one is given.

    The caller is one of them: were it to wait, two others could come to share a processor.
    """

    def alone(piece: Any) -> Any:
        _in_a_piece.set(True)
        return work(piece)

    # Settings such as `errstate` belong to the caller's context.
    contexts = [contextvars.copy_context() for _ in pieces]
    if threads < 2 or len(pieces) < 2:
        return [context.run(alone, piece) for context, piece in zip(contexts, pieces, strict=True)]
    waiting = [
        _pool(threads - 1).submit(context.run, alone, piece) for context, piece in zip(contexts, pieces, strict=True)
    ]
    mine = {}
    try:
        for k in reversed(range(len(pieces))):
            if not waiting[k].cancel():
                break
            mine[k] = contexts[k].run(alone, pieces[k])
        return [mine[k] if k in mine else future.result() for k, future in enumerate(waiting)]
    finally:
        # After a failure nothing more is begun, and nothing is left at work.
        concurrent.futures.wait([future for future in waiting if not future.cancel()])


_in_a_piece = contextvars.ContextVar("_in_a_piece", default=False)


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that are kept: to begin and end them takes as long as many a stack does."""
    return concurrent.futures.ThreadPoolExecutor(threads, "natgrad_array")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _has(array: Array, axis: int, length: int) -> bool:
    return bool(array.ndim >= -axis and array.shape[axis] == length)


def _along(axis: int, piece: slice) -> tuple[Any, ...]:
    """The index that takes a piece of an axis counted from the end."""
    return (..., piece, *(slice(None),) * (-axis - 1))


def _beside_others() -> bool:
    """Whether other threads are at work."""
    return _in_a_piece.get() or threading.current_thread() is not threading.main_thread()


def usable_threads() -> int:
    """How many threads NumPy's work is given: one for each usable processor, unless BLAS is told fewer.

    One in a thread that is not the main one, where whoever started it has taken the
    processors already, and for what is a piece itself.
    """
    if _beside_others():
        return 1
    count = usable_processors()
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if (limit := os.environ.get(name, "")).isdigit() and int(limit) > 0:
            return min(count, int(limit))
    return count
