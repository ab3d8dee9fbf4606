"""A run: pieces of an ensemble one after the other, each from record to record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace
from natgrad_array.simulation.advance import advance, look
from natgrad_array.simulation.checkpoint import Checkpoint, Saved
from natgrad_array.simulation.ensemble import Piece
from natgrad_array.simulation.memory import Plan
from natgrad_array.simulation.progress import Bar
from natgrad_array.simulation.schedule import intervals
from natgrad_array.simulation.sinks import Host, Sink
from natgrad_array.simulation.state import Load, State, System, last_weights, leaves, rebuilt

BLOCK_SECONDS = 1.0
"""About so long nobody looks at a clock."""


class Job(NamedTuple):
    """All that a run needs."""

    xp: Namespace
    system: System
    load: Load
    pieces: tuple[Piece, ...]
    recorded: tuple[int, ...]
    """The steps that are recorded."""
    from_host: Callable[[Any], Array]
    """A NumPy array as one of the run's library and device."""
    plan: Plan
    title: str | None = None
    """What stands before a progress bar, None for no bar."""


class Begun(NamedTuple):
    """Where a piece goes on that is neither new nor finished."""

    piece: int
    record: int
    state: State


class Ledger:
    """What of a run is done; checkpoints are made through it.

    Parameters
    ----------
    job : Job
    sink : Sink
    checkpoint : Checkpoint, optional
        Where it holds something the run goes on from there.
    begun : Begun, optional
        The piece to go on with, where there is no checkpoint.
    """

    def __init__(self, job: Job, sink: Sink, checkpoint: Checkpoint | None = None, begun: Begun | None = None) -> None:
        self.job, self.sink, self.checkpoint, self.begun = job, sink, checkpoint, begun
        self.finished: list[int] = []
        if checkpoint is None:
            return
        if checkpoint.saved is None:
            # Better now than in an hour if there is something wrong with the folder.
            self.save()
            return
        progress = checkpoint.saved.progress
        self.finished = list(progress["finished"])
        if progress["piece"] is not None:
            self.begun = Begun(progress["piece"], progress["record"], _state_of(job, checkpoint.saved))

    def todo(self) -> list[int]:
        """Numbers of the pieces that are not finished, the one that has begun before the others."""
        left = set(range(len(self.job.pieces))) - set(self.finished)
        return sorted(left, key=lambda index: (self.begun is None or index != self.begun.piece, index))

    def take_begun(self, index: int) -> Begun | None:
        """Where a piece goes on, None if it is new; said once, so that no state is held longer than it is of use."""
        found, self.begun = self.begun, None
        assert found is None or found.piece == index
        return found

    def work(self) -> tuple[int, int]:
        """Steps of all members, and those of them that were made before."""
        job = self.job
        members, steps = [piece.members for piece in job.pieces], job.recorded[-1]
        done = sum(members[index] for index in self.finished) * steps
        if self.begun is not None:
            done += members[self.begun.piece] * job.recorded[self.begun.record]
        return sum(members) * steps, done

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.checkpoint is not None and self.checkpoint.due()

    def save(self, begun: Begun | None = None) -> None:
        """Make a checkpoint, if there is a place for it."""
        if self.checkpoint is None:
            return
        piece, record, state = (None, 0, {}) if begun is None else (begun.piece, begun.record, _host_of(begun.state))
        progress = {"finished": self.finished, "piece": piece, "record": record, "plan": self.job.plan._asdict()}
        self.checkpoint.save(progress, state | self.sink.pending(), self.sink.appended())
        self.sink.forget()


def run(job: Job, sink: Sink, checkpoint: Checkpoint | None, walk: Callable[[Job, Sink, Ledger, Bar], None]) -> None:
    """Simulate all pieces, by a function that walks those that are left; go on where a checkpoint stopped."""
    ledger = Ledger(job, sink, checkpoint)
    if not ledger.todo():
        return
    with Bar(job.title, *ledger.work()) as bar:
        walk(job, sink, ledger, bar)
    sink.complete()
    ledger.save()


def here(job: Job, sink: Sink, ledger: Ledger, bar: Bar) -> None:
    """Walk one piece after the other, in this process."""
    for index in ledger.todo():
        one = Walk(job, sink, ledger, index, bar)
        with _saved_when_interrupted(one):
            one.go()


class Walk:
    """One piece on its way.

    Parameters
    ----------
    job : Job
    sink : Sink
    ledger : Ledger
    index : int
        The number of the piece.
    bar : Bar
    layers : tuple of arrays, optional
        The first weights of the piece, where the job does not have them.
    """

    def __init__(
        self, job: Job, sink: Sink, ledger: Ledger, index: int, bar: Bar, layers: tuple[Array, ...] | None = None
    ) -> None:
        self.job, self.sink, self.ledger, self.index, self.bar = job, sink, ledger, index, bar
        self.data, fresh = job.load(job.pieces[index], layers)
        begun = ledger.take_begun(index)
        self.record, self.state = 0, fresh
        if begun is not None:
            # From a file its memory comes as a row of arrays.
            memory = rebuilt(fresh.memory, iter(leaves(begun.state.memory)))
            self.record, self.state = begun.record, begun.state._replace(memory=memory)
        self.consistent = True

    def go(self) -> None:
        """To the last record."""
        job, piece = self.job, self.job.pieces[self.index]
        lengths, count = intervals(job.recorded), 1
        while self.record < len(lengths):
            began = time.monotonic()
            block = lengths[self.record : self.record + count]
            state, seen = advance(job.system, self.data, self.state, job.recorded[self.record], block, job.plan.records)
            _arrays.finish(state.rate)
            self.consistent = False
            self.sink.write(self.index, piece, self.record, seen)
            self.state, self.record = state, self.record + len(block)
            self.consistent = True
            self.bar.advance(piece.members * sum(block), dict(zip(job.system.names, seen, strict=True)))
            took = time.monotonic() - began
            factor = min(max(BLOCK_SECONDS / max(took, 1e-3), 0.25), 16.0)
            count = min(max(int(factor * len(block)), 1), job.plan.records)
            if self.ledger.due():
                self.save()
        state, seen = look(job.system, self.data, self.state, job.recorded[-1])
        self.consistent = False
        self.sink.write(self.index, piece, self.record, tuple(value[None, ...] for value in seen))
        self.sink.finish(self.index, piece, self.finals(state))
        self.ledger.finished.append(self.index)

    def finals(self, state: State) -> dict[str, Array]:
        """What the piece leaves."""
        weights = {f"weights_{i + 1}": w for i, w in enumerate(last_weights(self.job.xp, state))}
        flags = {"diverged_at": state.diverged_at, "converged_at": state.converged_at}
        return weights | self.job.system.finals(self.data, state) | flags

    def save(self) -> None:
        """Make a checkpoint of where the piece is."""
        self.ledger.save(Begun(self.index, self.record, self.state))


@contextlib.contextmanager
def _saved_when_interrupted(walk: Walk) -> Iterator[None]:
    """Make a checkpoint before a KeyboardInterrupt goes on.

    None in the instant in which the sink has records that the state does not know of: the last
    checkpoint stands then.
    """
    try:
        yield
    except KeyboardInterrupt:
        if walk.consistent:
            walk.save()
        raise


def _host_of(state: State) -> Host:
    """The arrays of a state, by name."""
    found: Host = {}
    for name, value in state._asdict().items():
        found |= {f"state {name} {k}": _arrays.to_numpy(array) for k, array in enumerate(leaves(value))}
    return found


def _state_of(job: Job, saved: Saved) -> State:
    """The state that a checkpoint holds."""
    parts: dict[str, list[Array]] = {}
    for name, array in saved.state.items():
        kind, _, rest = name.partition(" ")
        if kind == "state":
            parts.setdefault(rest.split(" ")[0], []).append(job.from_host(array))
    several = ("weights", "kept", "memory")
    return State(**{name: tuple(a) if name in several else a[0] for name, a in parts.items()})
