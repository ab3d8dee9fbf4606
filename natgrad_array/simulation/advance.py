"""Members in motion from one record to the next."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.simulation.state import State, System, last_weights

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
    if _arrays.is_jax(state.rate):
        return _advance_compiled(system, data, state, number, lengths, capacity)
    pieces = _cut(system, state)
    if not pieces:
        return _advance(system, data, state, number, lengths)

    def work(piece: slice) -> tuple[State, Seen]:
        return _advance(system, data.part(piece), state.part(piece), number, lengths)

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


def _advance(system: System, data: Any, state: State, number: int, lengths: tuple[int, ...]) -> tuple[State, Seen]:
    xp, rows = _arrays.namespace(state.rate), []
    for length in lengths:
        state, seen = system.interval(xp, data, state, number, length)
        number += length
        rows.append(seen)
    return state, tuple(xp.stack(column) for column in zip(*rows, strict=True))


def _look(system: System, data: Any, state: State, number: Any) -> tuple[State, Seen]:
    return system.look(_arrays.namespace(state.rate), data, state, number)


# ------------------------------------------------------------------------ JAX: compiled loops


def _advance_compiled(
    system: System, data: Any, state: State, number: int, lengths: tuple[int, ...], capacity: int
) -> tuple[State, Seen]:
    """`advance` by loops that keep nothing from round to round, as if no member ever diverged.

    A loop ends where one does. The rounds before are then made again, which gives the same
    digits; the member is put to rest, and the next loop goes on from there.
    """
    xp = _arrays.namespace(state.rate)

    def loop(state: State, done: int, count: int) -> tuple[State, Seen, int]:
        left = lengths[done:]
        padded = xp.asarray(np.pad(np.asarray(left, np.int32), (0, capacity - len(left))))
        start = _scalar(xp, number + sum(lengths[:done]))
        arguments = (data, state, start, padded, _scalar(xp, count))
        after, seen, well = _arrays.compiled(_loop, system, state.rate, *arguments)
        return after, tuple(stack[:count, ...] for stack in seen), int(well)

    done, records = 0, []
    while True:
        after, seen, well = loop(state, done, len(lengths) - done)
        if done + well == len(lengths):
            records.append(seen)
            return after, tuple(_joined_rows(xp, column) for column in zip(*records, strict=True))
        marks = after.diverged_at
        # What is of no more use makes room.
        del after, seen
        if well:
            state, seen, _ = loop(state, done, well)
            records.append(seen)
        state, done = state._replace(diverged_at=marks), done + well


def _loop(
    system: System, data: Any, state: State, number: Any, lengths: Array, count: Array
) -> tuple[State, Seen, Any]:
    """The state after some rounds or the first one in which a member diverges, records, and rounds that went well."""
    xp = _arrays.namespace(state.rate)
    state = system.rest(xp, state)
    known, kept = state.diverged_at, state.kept

    def body(i: Array, carry: tuple[State, Array], length: Array) -> tuple[tuple[State, Array], Seen]:
        state, number = carry
        # Who diverges by the steps of the last round is found by the next loop, which needs what was before.
        last = _arrays.branch(i == count - 1, lambda: last_weights(xp, state._replace(kept=kept)), lambda: state.kept)
        state, seen = system.interval(xp, data, state._replace(kept=last), number, length)
        return (state, number + length), seen

    def all_known(carry: tuple[State, Array]) -> Array:
        return xp.all(carry[0].diverged_at == known)

    carry = (state._replace(kept=tuple(xp.zeros_like(w) for w in kept)), number)
    carry, records, rounds = _arrays.collect(xp, body, carry, lengths, count, all_known)
    return carry[0], records, rounds - ~all_known(carry)


def _joined_rows(xp: Namespace, stacks: tuple[Array, ...]) -> Array:
    return stacks[0] if len(stacks) == 1 else xp.concat(stacks)


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
