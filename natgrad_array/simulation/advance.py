"""Members in motion from one record to the next."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import array_api_extra as xpx
import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.simulation.state import State, System, chosen

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
        xp, count = _arrays.namespace(state.rate), len(lengths)
        padded = xp.asarray(np.pad(np.asarray(lengths, np.int32), (0, capacity - count)))
        arguments = (data, state, _scalar(xp, number), padded, _scalar(xp, count))
        state, seen = _arrays.compiled(_loops, system, state.rate, *arguments)
        return state, tuple(stack[:count, ...] for stack in seen)
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


class _Loop(NamedTuple):
    """Rounds, each a record and the steps after it, that a trace tries in one go."""

    begin: Array
    end: Array
    again: Array
    """Whether these rounds have been tried before, and to a later end."""
    size: Array
    """How many rounds are tried at once: one after a divergence, twice as many after each loop that went well."""
    state: State
    """After the rounds that were tried last."""
    start: State
    """Before them."""
    records: Seen
    """Those of all rounds of all loops."""


def _loops(system: System, data: Any, state: State, number: Array, lengths: Array, count: Array) -> tuple[State, Seen]:
    """`_advance` in a trace, over the first `count` lengths.

    Rounds keep no weights, as if no member ever diverged, but for the last two of a loop. A loop
    ends with a round in which one does, and if that is not its last it is tried again, to there:
    the same rounds give the same digits. Then the member is put to rest; the loops after it are
    short ones, since where one diverges others do.
    """
    xp = _arrays.namespace(state.rate)
    numbers = number + xp.cumulative_sum(lengths, include_initial=True)

    def attempt(loop: _Loop) -> _Loop:
        # What is kept is not taken back: the rounds that are tried again do that over, or have not touched it.
        start = loop.start._replace(kept=loop.state.kept)
        start = system.rest(xp, chosen(xp, loop.again, start, loop.state))
        known = start.diverged_at

        def goes_on(carry: Any) -> Array:
            i, state, _ = carry
            return (i < loop.end) & xp.all(state.diverged_at == known)

        def round_(carry: Any) -> Any:
            i, state, records = carry
            state = state._replace(keeps=i >= loop.end - 2)
            state, seen = system.interval(xp, data, state, numbers[i], lengths[i])
            records = tuple(xpx.at(stack)[i, ...].set(row) for stack, row in zip(records, seen, strict=True))
            return i + 1, state._replace(keeps=None), records

        i, state, records = _arrays.while_loop(goes_on, round_, (loop.begin, start, loop.records))
        whole = i == loop.end
        size = xp.where(xp.all(state.diverged_at == known), 2 * loop.size, 1)
        begin, end = xp.where(whole, i, loop.begin), xp.where(whole, xp.minimum(i + size, count), i)
        return _Loop(begin, end, ~whole, size, state, start._replace(kept=()), records)

    seen = _arrays.stacks_for(
        xp, lambda *given: system.interval(xp, *given)[1], (data, state, number, lengths[0]), lengths.shape[0]
    )
    zero = xp.zeros_like(count)
    first = _Loop(zero, count, zero > 0, count, state, state._replace(kept=()), seen)
    loop = _arrays.while_loop(lambda loop: loop.begin < count, attempt, first)
    return loop.state, loop.records


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
        if parts[0] is None:
            return None
        if isinstance(parts[0], tuple):
            return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return np.concatenate(parts)

    return State(*(join(field) for field in zip(*states, strict=True)))
