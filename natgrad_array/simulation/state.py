"""The state of a stack of members, and how those that diverge or have converged come to rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape

RUNNING = -1
"""In place of a step number: it has not happened."""


class State(NamedTuple):
    """Where a stack of members is. Members are the first axis of every array."""

    weights: tuple[Array, ...]
    """(members, n_i, n_{i-1}); a diverged member is an identity, which costs no more than any other
    (in compiled loops from the loop after it on)."""
    kept: tuple[Array, ...]
    """Weights at the last record, in a compiled loop from its last two rounds on; those of a diverged
    member are its last finite ones."""
    rate: Array
    """(members, 1, 1): the learning rate, zero for members at rest."""
    diverged_at: Array
    """(members,): the recorded step at which the loss was not finite, or `RUNNING`."""
    converged_at: Array
    """(members,): the recorded step at which a member was put to rest, or `RUNNING`."""
    memory: Any = ()
    """What else a system carries from step to step: arrays in nested tuples."""
    keeps: Array | None = None
    """(), in a compiled loop: whether weights are kept at this record; None for always."""

    def part(self, piece: slice) -> State:
        """Some of the members."""
        weights, kept = (tuple(w[piece] for w in layers) for layers in (self.weights, self.kept))
        return State(weights, kept, self.rate[piece], self.diverged_at[piece], self.converged_at[piece])


class System(Protocol):
    """What moves members and is recorded of them; hashable, so that compiled loops are found again."""

    @property
    def names(self) -> tuple[str, ...]:
        """What is recorded."""

    def cuts_to_cache(self, like: Array, widths: Shape) -> bool:
        """Whether NumPy's stacks are worked on in parts that fit a cache."""

    def interval(self, xp: Namespace, data: Any, state: State, number: Any, length: Any) -> tuple[State, Any]:
        """Record, and go `length` steps on, at least one."""

    def look(self, xp: Namespace, data: Any, state: State, number: Any) -> tuple[State, Any]:
        """Record without going on."""

    def rest(self, xp: Namespace, state: State) -> State:
        """Members that have diverged do no harm and do not move."""

    def finals(self, data: Any, state: State) -> dict[str, Array]:
        """What is left at the end beside the weights, by name."""


class Load(Protocol):
    """Makes the data and the first state of a piece of an ensemble, here or in another process."""

    @property
    def ensemble(self) -> Any:
        """What the pieces are cut from."""

    def sent(self) -> Load:
        """What goes to other processes: the same without weights that were given as arrays."""

    def __call__(self, piece: Any, layers: tuple[Array, ...] | None = None) -> tuple[Any, State]:
        """From its weights, if they are given."""


def start(xp: Namespace, weights: tuple[Array, ...], rate: Array, memory: Any = ()) -> State:
    """All members running."""
    running = xp.full((rate.shape[0],), RUNNING, dtype=xp.int32, device=_arrays.device(rate))
    return State(weights, weights, rate, running, running, memory)


def leaves(value: Any) -> list[Array]:
    """The arrays in nested tuples, in order."""
    if isinstance(value, tuple):
        return [array for part in value for array in leaves(part)]
    return [] if value is None else [value]


def rebuilt(like: Any, arrays: Iterator[Array]) -> Any:
    """Nested tuples such as `like`, of the next arrays."""
    if isinstance(like, tuple):
        parts = [rebuilt(part, arrays) for part in like]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return None if like is None else next(arrays)


def chosen(xp: Namespace, flag: Array, yes: Any, no: Any) -> Any:
    """One of two nested tuples of arrays, by a scalar."""
    pairs = zip(leaves(yes), leaves(no), strict=True)
    return rebuilt(no, iter([xp.where(flag, a, b) for a, b in pairs]))


def settle(
    xp: Namespace,
    system: System,
    state: State,
    excess: Array,
    tolerance: Array | None,
    number: Any,
    direction: tuple[Array, ...] = (),
) -> tuple[State, Any, tuple[Array, ...]]:
    """Freeze the members whose loss is not finite, and those whose excess is within the tolerance.

    Returns the state; the mask of members that have not diverged, None where that is known to
    be all; and the direction they are about to take, zero for those that do not move any more.
    On eager arrays one scalar comes to the host and saves the work where all is well. In a JAX
    trace the loop ends after a round in which members diverge, and the next puts them to rest.
    """
    good = (state.diverged_at == RUNNING) & xp.isfinite(excess)
    trouble = _arrays.eager_any(xp, ~good)
    if trouble is False:
        state = state._replace(kept=state.weights)
    else:
        newly, keep = (state.diverged_at == RUNNING) & ~good, good[:, None, None]
        state = state._replace(diverged_at=xp.where(newly, _number(xp, number, good), state.diverged_at))
        state = _keep(xp, state, keep)
        direction = tuple(xp.where(keep, d, 0.0) for d in direction)
    if trouble:
        state = system.rest(xp, state)
    if tolerance is not None:
        calm = good & (state.converged_at == RUNNING) & (excess <= tolerance)
        state = state._replace(
            rate=xp.where(calm[:, None, None], 0.0, state.rate),
            converged_at=xp.where(calm, _number(xp, number, calm), state.converged_at),
        )
    return state, None if trouble is False else good, direction


def _keep(xp: Namespace, state: State, members: Array) -> State:
    """Keep the weights of some members, if they are to be kept."""

    def kept(state: State) -> tuple[Array, ...]:
        return tuple(xp.where(members, w, k) for w, k in zip(state.weights, state.kept, strict=True))

    if state.keeps is None:
        return state._replace(kept=kept(state))
    # A loop of one round or none, other than a conditional, leaves weights and what is kept where they are.
    never = xp.zeros_like(state.keeps)
    found: State = _arrays.while_loop(
        lambda state: state.keeps, lambda state: state._replace(kept=kept(state), keeps=never), state
    )
    return found


def rest(xp: Namespace, state: State) -> State:
    """Members that have diverged do no harm and do not move."""
    alive = (state.diverged_at == RUNNING)[:, None, None]
    weights = tuple(xp.where(alive, w, idle(xp, w)) for w in state.weights)
    return state._replace(weights=weights, rate=xp.where(alive, state.rate, 0.0))


def idle(xp: Namespace, layer: Array) -> Array:
    """A layer that does no harm: the identity, cut to shape."""
    rows, columns = layer.shape[-2:]
    return _arrays.eye(xp, max(rows, columns), layer)[:rows, :columns]


def masked(xp: Namespace, mask: Array | None, value: Array) -> Array:
    """`value`, (members, ...), with NaN for members that the mask leaves out."""
    if mask is None:
        return value
    return xp.where(xp.reshape(mask, (-1, *(1,) * (value.ndim - 1))), value, xp.nan)


def last_weights(xp: Namespace, state: State) -> tuple[Array, ...]:
    """The weights, those of diverged members as they last were."""
    alive = (state.diverged_at == RUNNING)[:, None, None]
    return tuple(xp.where(alive, w, k) for w, k in zip(state.weights, state.kept, strict=True))


def _number(xp: Namespace, number: Any, like: Array) -> Array:
    return xp.asarray(number, dtype=xp.int32, device=_arrays.device(like))
