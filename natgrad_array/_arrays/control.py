"""Branches and loops: on the host, or one compiled function in a JAX trace."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from natgrad_array._arrays.libraries import Array, Namespace, is_jax, is_lazy

T = TypeVar("T", bound=tuple[Any, ...])


def branch(flag: Array | bool, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """One of two ways by one scalar: on the host, or a conditional in a JAX trace."""
    if not isinstance(flag, bool) and is_lazy(flag):
        return sys.modules["jax"].lax.cond(flag, yes, no)
    return yes() if bool(flag) else no()


def branches_freely(array: Array) -> bool:
    """Whether `branch` costs no more than the way it takes: not in a trace for a CPU.

    There XLA works on independent operations side by side, but not within a conditional,
    which makes a long computation a quarter to a half slower.
    """
    return not is_lazy(array) or sys.modules["jax"].default_backend() != "cpu"


def usable_processors() -> int:
    """Those that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


_beside = contextvars.ContextVar("_beside", default=1)
"""How many times what is traced now will be at work at once."""


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """Trace what will be at work in so many threads at once."""
    token = _beside.set(count)
    try:
        yield
    finally:
        _beside.reset(token)


def most_calls() -> int:
    """How many calls of LAPACK may be at work at once on JAX.

    On a CPU jaxlib 0.10 has each wait, in one of XLA's threads, for work that it gives to
    others of them: as many calls side by side as there are threads never end. Where
    there are twice as many threads, calls of their own are faster, since XLA makes them side by side.
    """
    return int(os.environ.get("NPROC", "") or usable_processors()) // 2


def calls_may_meet(array: Array, count: int) -> bool:
    """Whether so many factorisations that do not depend on each other have to be one call (`most_calls`)."""
    return is_jax(array) and count * _beside.get() > most_calls()


def while_loop(condition: Callable[[T], Array], body: Callable[[T], T], state: T) -> T:
    """Repeat `body` on a tuple of arrays while `condition` holds.

    Traced JAX arrays become one compiled loop; on other arrays the condition costs one
    scalar brought to the host per round.
    """
    if any(is_jax(leaf) and is_lazy(leaf) for leaf in state):
        result: T = sys.modules["jax"].lax.while_loop(condition, body, state)
        return result
    while bool(condition(state)):
        state = body(state)
    return state


def repeat(body: Callable[[Any, Any], Any], state: Any, count: Any) -> Any:
    """`state` after `count` rounds of ``body(i, state)``: one compiled loop in a JAX trace."""
    if not isinstance(count, int):
        return sys.modules["jax"].lax.fori_loop(0, count, body, state)
    for i in range(count):
        state = body(i, state)
    return state


def stacks_for(xp: Namespace, function: Callable[..., tuple[Array, ...]], arguments: Any, count: int) -> Any:
    """In a JAX trace: zeros for `count` results of a function, each along a new first axis."""
    shapes = sys.modules["jax"].eval_shape(function, *arguments)
    return tuple(xp.zeros((count, *shape.shape), dtype=shape.dtype) for shape in shapes)


def compiled(function: Callable[..., Any], static: Any, like: Array, *arguments: Any, spent: bool = False) -> Any:
    """``function(static, *arguments)``; where `like` is JAX's, compiled once for each `static` and set of shapes.

    In a trace it becomes part of what is compiled there. What is `spent` is the first argument,
    arrays of the caller's own that nobody looks at again: results take their place.
    """
    if not is_jax(like) or is_lazy(like):
        return function(static, *arguments)
    return _jitted(function, spent)(static, *arguments)


@functools.cache
def _jitted(function: Callable[..., Any], spent: bool) -> Callable[..., Any]:
    donated = 1 if spent else ()
    jitted: Callable[..., Any] = sys.modules["jax"].jit(function, static_argnums=0, donate_argnums=donated)
    return jitted
