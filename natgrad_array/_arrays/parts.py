"""A compiled function of JAX by several threads, each with a part of a stack."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from natgrad_array._arrays.checks import broadcast_shapes
from natgrad_array._arrays.control import beside, compiled, most_calls
from natgrad_array._arrays.libraries import Array, Shape, is_jax, is_lazy
from natgrad_array._arrays.pieces import in_threads, usable_threads
from natgrad_array._arrays.schur import FEWEST

_LEAST_FLOPS = 2**23
"""A part with less to do is over before a thread has begun with it."""

Part = Callable[..., tuple[Array, ...]]


def in_parts(
    function: Part, static: Any, arrays: tuple[Array, ...], cores: Sequence[Shape], *, calls: int
) -> tuple[Array, ...]:
    """`compiled(function, static, arrays[0], *arrays)`; of large stacks of JAX on a CPU each thread takes a part.

    XLA gives a product of two stacks of small matrices one processor, and the products of a
    step mostly wait for each other. LAPACK's calls alone have threads within.

    Parameters
    ----------
    function : callable
        Takes `static`, which is hashable, and arrays like `arrays`, and returns a tuple of
        stacks with the batch axes of all of them; what it does for a member depends on no other.
    arrays : tuple of arrays, shapes (*batch, m, n)
        Batch axes may still have to broadcast.
    cores : sequence of tuple of int
        The core shapes of what `function` returns.
    calls : int
        How many calls of LAPACK it has side by side at most.
    """
    batch = broadcast_shapes(array.shape[:-2] for array in arrays)
    length, count = max(batch, default=1), _count(arrays, batch, cores, calls)
    if count < 2:
        found: tuple[Array, ...] = compiled(function, static, arrays[0], *arrays)
        return found
    axis = batch.index(length) - len(batch) - 2
    cut = tuple(array.ndim >= -axis and array.shape[axis] == length for array in arrays)
    jax = sys.modules["jax"]
    given = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.format, weak_type=a.weak_type) for a in arrays)
    settings = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    ends = [length * k // count for k in range(count + 1)]
    # Compiled here: a thread knows nothing of settings that hold for its caller alone.
    ways = [
        (start, _executable((function, static, axis, cut, end - start), count, given, settings))
        for start, end in itertools.pairwise(ends)
    ]

    def work(way: tuple[int, Callable[..., Any]]) -> tuple[Array, ...]:
        start, executable = way
        result: tuple[Array, ...] = jax.block_until_ready(executable(np.asarray(start, dtype="int32"), *arrays))
        return result

    joined: tuple[Array, ...] = compiled(_joined, axis, arrays[0], in_threads(work, ways, count))
    return joined


def _count(arrays: tuple[Array, ...], batch: Shape, cores: Sequence[Shape], calls: int) -> int:
    """In how many parts a stack is worth to be cut."""
    if not all(is_jax(a) and not is_lazy(a) for a in arrays) or len({a.sharding for a in arrays}) > 1:
        return 1
    devices = arrays[0].sharding.device_set
    if (
        sys.modules["jax"].config.jax_disable_jit
        or len(devices) > 1
        or any(device.platform != "cpu" for device in devices)
    ):
        return 1
    flops = math.prod(batch) * sum(m * n * min(m, n) for m, n in cores)
    # Each is long enough to be inverted by blocks.
    most = min(max(batch, default=1) // FEWEST, flops // _LEAST_FLOPS)
    if calls:
        most = min(most, most_calls() // calls)
    return min(usable_threads(), most) if most > 1 else 1


@functools.lru_cache(maxsize=256)
def _executable(how: tuple[Any, ...], count: int, given: tuple[Any, ...], _: tuple[Any, ...]) -> Callable[..., Any]:
    jax = sys.modules["jax"]
    with beside(count):
        lowered = jax.jit(_part, static_argnums=0).lower(how, jax.ShapeDtypeStruct((), "int32"), *given)
        found: Callable[..., Any] = lowered.compile()
    return found


def _part(how: tuple[Any, ...], start: Array, *arrays: Array) -> tuple[Array, ...]:
    function, static, axis, cut, length = how
    slices = sys.modules["jax"].lax.dynamic_slice_in_dim
    own = [slices(a, start, length, a.ndim + axis) if is_cut else a for is_cut, a in zip(cut, arrays, strict=True)]
    result: tuple[Array, ...] = function(static, *own)
    return result


def _joined(axis: int, parts: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(sys.modules["jax"].numpy.concatenate(column, axis=axis) for column in zip(*parts, strict=True))
