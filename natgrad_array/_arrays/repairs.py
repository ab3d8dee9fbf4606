"""Members of a stack for which the fast way does not hold, by a slower one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import array_api_extra as xpx
import numpy as np

from natgrad_array._arrays.control import compiled
from natgrad_array._arrays.libraries import (
    Array,
    Namespace,
    Shape,
    is_cupy,
    is_jax,
    is_lazy,
    is_numpy,
    is_torch,
    namespace,
)

_WRITABLE = (is_numpy, is_cupy, is_torch, is_jax)


def repair(
    xp: Namespace,
    flags: Array,
    values: tuple[Array, ...],
    arguments: tuple[Array, ...],
    slow: Callable[..., tuple[Array, ...]],
    *,
    spent: bool = False,
) -> tuple[Array, ...]:
    """Give the flagged members of stacks of matrices the results of a slower function.

    Parameters
    ----------
    flags : array of bool, shape (*batch,)
        Members whose `values` are not to be used.
    values : tuple of arrays, shapes (*batch, m, n)
        Results of the fast way; batch axes may still have to broadcast.
    arguments : tuple of arrays, shapes (*batch, m, n)
        Arguments of `slow`, stacks of matrices; batch axes may still have to broadcast.
    slow : callable
        Takes the flagged members, with one batch axis, or the whole stack; returns a tuple
        like `values`.
    spent : bool
        Whether `values` have all batch axes, are the caller's own and nobody looks at them again.

    Notes
    -----
    On eager arrays a scalar or two come to the host, on JAX the flags, and only flagged members are
    computed again. A JAX trace has one conditional of three ways: nothing, a sixteenth of
    the stack or the whole of it, sixteenth by sixteenth, is computed again.
    """
    batch = tuple(flags.shape)
    if is_lazy(flags):
        return _repair_traced(xp, flags, values, arguments, slow)
    # On JAX each look at flags would take longer than to bring all of them to the host.
    looked = np.asarray(flags) if is_jax(flags) else flags
    at = namespace(looked)
    if not bool(at.any(looked)):
        return values
    if bool(at.all(looked)):
        return slow(*arguments)
    if not any(test(flags) for test in _WRITABLE):
        # The standard has no assignment by index: everything is computed again, and chosen.
        flagged = flags[..., None, None]
        return tuple(xp.where(flagged, new, old) for new, old in zip(slow(*arguments), values, strict=True))
    (chosen,) = at.nonzero(at.reshape(looked, (-1,)))
    if is_jax(flags):
        largest = max(math.prod(value.shape[-2:]) for value in values)
        chosen = xp.asarray(_padded(chosen, math.prod(batch), min(16, 2**16 // largest)))
    # On JAX a function each: a dozen small ones take longer than a few members do.
    new = slow(*compiled(_members, batch, flags, arguments, chosen))
    # What is differentiated is looked at again.
    spent = spent and not any(is_lazy(array) for array in (*values, *new))
    repaired: tuple[Array, ...] = compiled(_put, batch, flags, values, new, chosen, spent=spent)
    return repaired


def _repair_traced(
    xp: Namespace,
    flags: Array,
    values: tuple[Array, ...],
    arguments: tuple[Array, ...],
    slow: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    """`repair` in a JAX trace.

    Memory is set aside for every way, and what exceeds the allocator's pool is mapped anew in
    every call, which takes longer than a small computation: so nothing slow is done for more
    than a sixteenth of the stack at once.
    """
    jax, batch = sys.modules["jax"], tuple(flags.shape)
    members = math.prod(batch)
    few, count = members // 16, xp.count_nonzero(flags)

    def none() -> tuple[Array, ...]:
        return tuple(xp.broadcast_to(value, (*batch, *value.shape[-2:])) for value in values)

    def some() -> tuple[Array, ...]:
        chosen, few_of = first_flagged(xp, flags, arguments, few)
        return put_back(xp, batch, values, slow(*few_of), chosen)

    def all_() -> tuple[Array, ...]:
        if not few:
            new = slow(*arguments)
        else:
            rows = xp.reshape(xp.arange(16 * -(-members // 16)), (16, -1))
            parts = jax.lax.map(lambda chosen: slow(*_members(batch, arguments, chosen, mode="clip")), rows)
            new = tuple(
                xp.reshape(xp.reshape(part, (-1, *part.shape[-2:]))[:members, ...], (*batch, *part.shape[-2:]))
                for part in parts
            )
        return tuple(xp.where(flags[..., None, None], part, old) for part, old in zip(new, values, strict=True))

    ways = [none, some, all_] if few else [none, all_]
    index = xp.sum(count > xp.asarray([0, few] if few else [0]))
    result: tuple[Array, ...] = jax.lax.switch(index, ways)
    return result


def first_flagged(
    xp: Namespace, flags: Array, arrays: tuple[Array, ...], count: int
) -> tuple[Array, tuple[Array, ...]]:
    """The places of the first `count` flagged members in JAX's stacks of matrices, and these members.

    A trace has fixed shapes: places that no member fills lie outside the stack.
    """
    batch = tuple(flags.shape)
    (chosen,) = xp.nonzero(xp.reshape(flags, (-1,)), size=count, fill_value=math.prod(batch))
    return chosen, _members(batch, arrays, chosen, mode="clip")


def put_back(
    xp: Namespace, batch: Shape, values: tuple[Array, ...], new: tuple[Array, ...], chosen: Array
) -> tuple[Array, ...]:
    """Stacks with the members at places of `first_flagged` replaced."""
    return tuple(
        xp.reshape(_in_a_row(xp, old, batch).at[chosen].set(part, mode="drop"), (*batch, *old.shape[-2:]))
        for old, part in zip(values, new, strict=True)
    )


def _padded(chosen: np.ndarray[Any, Any], members: int, least: int) -> np.ndarray[Any, Any]:
    """Some indices with the first repeated, to `least` or by a quarter: JAX compiles anew for every number of them."""
    step = max(1, least, 2 ** (chosen.size.bit_length() - 3))
    count = min(members, -(-chosen.size // step) * step)
    return np.concatenate([chosen, np.repeat(chosen[:1], count - chosen.size)])


def _in_a_row(xp: Namespace, array: Array, batch: Shape) -> Array:
    """A stack of matrices with the members of a batch on one axis."""
    shape = (*batch, *array.shape[-2:])
    # What has the shape already is written to in place: a broadcast view would be copied.
    whole = array if tuple(array.shape) == shape else xp.broadcast_to(array, shape)
    return xp.reshape(whole, (math.prod(batch), *array.shape[-2:]))


def _members(batch: Shape, arrays: tuple[Array, ...], chosen: Array, **options: str) -> tuple[Array, ...]:
    """Some of the members of stacks of matrices; what all members share is not taken apart."""
    xp = namespace(chosen)
    return tuple(
        xp.take(_in_a_row(xp, array, batch), chosen, axis=0, **options) if array.ndim > 2 else array for array in arrays
    )


def _put(batch: Shape, values: tuple[Array, ...], new: tuple[Array, ...], chosen: Array) -> tuple[Array, ...]:
    """Stacks of matrices with some of their members replaced."""
    xp = namespace(chosen)
    return tuple(
        xp.reshape(xpx.at(_in_a_row(xp, old, batch))[chosen, ...].set(part), (*batch, *old.shape[-2:]))
        for old, part in zip(values, new, strict=True)
    )
