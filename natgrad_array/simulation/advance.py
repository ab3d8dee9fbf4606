"""Members in motion from one record to the next."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.simulation.state import State, System

Seen = tuple[Array, ...]


@_arrays.quiet
def advance(
    system: System, data: Any, state: State, number: int, lengths: tuple[int, ...], capacity: int
) -> tuple[State, Seen]:
    """Record before each of some intervals, and end where the next record is due.

    Parameters
    ----------
    number : int
        The step that `state` is at.
    lengths : tuple of int
        Steps of each interval, at least one.
    capacity : int
        The most intervals that are ever asked for: a compiled loop has room for so many.

    Returns
    -------
    State
        After the last interval.
    tuple of arrays, shapes (intervals, members, ...)
        The records.
    """
    like, count = state.rate, len(lengths)
    if _arrays.is_jax(like):
        xp = _arrays.namespace(like)
        padded = xp.asarray(np.pad(np.asarray(lengths, np.int32), (0, capacity - count)))
        arguments = (data, state, _scalar(xp, number), padded, _scalar(xp, count))
        state, seen = _arrays.compiled(_advance, system, like, *arguments)
        return state, tuple(stack[:count, ...] for stack in seen)
    pieces = _cut(system, state)
    if not pieces:
        return _advance(system, data, state, number, lengths, count)

    def work(piece: slice) -> tuple[State, Seen]:
        return _advance(system, data.part(piece), state.part(piece), number, lengths, count)

    parts = _arrays.in_threads(work, pieces, _arrays.usable_threads())
    states, records = zip(*parts, strict=True)
    return _joined(states), tuple(np.concatenate(column, axis=1) for column in zip(*records, strict=True))


@_arrays.quiet
def look(system: System, data: Any, state: State, number: int) -> tuple[State, Seen]:
    """Record where members are, and stay there; records have no axis for intervals."""
    like = state.rate
    if _arrays.is_jax(like):
        number = _scalar(_arrays.namespace(like), number)
    found: tuple[State, Seen] = _arrays.compiled(_look, system, like, data, state, number)
    return found


def _advance(system: System, data: Any, state: State, number: Any, lengths: Any, count: Any) -> tuple[State, Seen]:
    xp = _arrays.namespace(state.rate)

    def body(carry: tuple[State, Any], length: Any) -> tuple[tuple[State, Any], Seen]:
        state, number = carry
        state, seen = system.interval(xp, data, state, number, length)
        return (state, number + length), seen

    (state, _), records = _arrays.collect(xp, body, (state, number), lengths, count)
    return state, records


def _look(system: System, data: Any, state: State, number: Any) -> tuple[State, Seen]:
    return system.look(_arrays.namespace(state.rate), data, state, number)


def _scalar(xp: Any, value: int) -> Any:
    return xp.asarray(value, dtype=xp.int32)


# ----------------------------------------------------------------- NumPy: caches and threads


_THREADS, _WORK = 8, 2**21
"""So many pieces, for as many threads, where each has so many multiplications of a product with its layers."""


def _cut(system: System, state: State) -> list[slice]:
    """Cut NumPy's stacks so that what one step works on stays in a processor's cache, and threads have work.

    The cut follows from sizes alone, so that digits do not depend on how many threads there are.
    """
    members = state.rate.shape[0]
    sides = tuple(side for w in state.weights for side in w.shape[1:])
    if not system.cuts_to_cache(state.rate, sides):
        return []
    largest = max(w.nbytes for w in state.weights)
    work = sum(w.size * min(w.shape[1:]) for w in state.weights)
    count = min(members, max(-(-largest // _arrays.PIECE_BYTES), min(_THREADS, work // _WORK)))
    ends = [members * k // max(count, 1) for k in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _joined(states: tuple[State, ...]) -> State:
    def join(parts: tuple[Any, ...]) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return np.concatenate(parts)

    return State(*(join(field) for field in zip(*states, strict=True)))
