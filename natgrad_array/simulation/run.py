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
from natgrad_array.simulation.deep_linear import Data, DeepLinear
from natgrad_array.simulation.ensemble import Piece
from natgrad_array.simulation.memory import Plan
from natgrad_array.simulation.progress import Bar
from natgrad_array.simulation.schedule import intervals
from natgrad_array.simulation.sinks import Host, Sink
from natgrad_array.simulation.state import State, last_weights

BLOCK_SECONDS = 0.25
"""About so long nobody looks at a clock."""


class Job(NamedTuple):
    """All that a run needs."""

    xp: Namespace
    system: DeepLinear
    load: Callable[[Piece], tuple[Data, State]]
    """The data of a piece, and the state that it starts from."""
    pieces: tuple[Piece, ...]
    recorded: tuple[int, ...]
    """The steps that are recorded."""
    from_host: Callable[[Any], Array]
    """A NumPy array as one of the run's library and device."""
    plan: Plan
    title: str | None = None
    """What stands before a progress bar, None for no bar."""


def run(job: Job, sink: Sink, checkpoint: Checkpoint | None) -> None:
    """Simulate all pieces; go on where a checkpoint stopped."""
    first, record, state = 0, 0, None
    saved = checkpoint.saved if checkpoint is not None else None
    if saved is not None:
        first, record = saved.progress["piece"], saved.progress["record"]
        state = _state_of(job, saved)
    with Bar(job.title, *_work(job, first, record)) as bar:
        for index in range(first, len(job.pieces)):
            piece = job.pieces[index]
            data, fresh = job.load(piece)
            walk = _Walk(job, sink, checkpoint, index, data, fresh if state is None else state, record, bar)
            with _saved_when_interrupted(walk):
                walk.go()
            record, state = 0, None
    if first < len(job.pieces):
        sink.complete()
        if checkpoint is not None:
            checkpoint.save(_progress(job, len(job.pieces), 0), {}, sink.appended())
            sink.forget()


def _work(job: Job, first: int, record: int) -> tuple[int, int]:
    """Steps of all members, and those of them that were made before."""
    members = [piece.members for piece in job.pieces]
    steps = job.recorded[-1]
    done = sum(members[:first]) * steps
    if first < len(members):
        done += members[first] * job.recorded[record]
    return sum(members) * steps, done


def _progress(job: Job, piece: int, record: int) -> dict[str, Any]:
    return {"piece": piece, "record": record, "plan": job.plan._asdict()}


class _Walk:
    """One piece on its way."""

    def __init__(
        self,
        job: Job,
        sink: Sink,
        checkpoint: Checkpoint | None,
        index: int,
        data: Data,
        state: State,
        record: int,
        bar: Bar,
    ) -> None:
        self.job, self.sink, self.checkpoint, self.index = job, sink, checkpoint, index
        self.data, self.state, self.record, self.bar = data, state, record, bar
        self.consistent = True

    def go(self) -> None:
        """To the last record."""
        job, piece = self.job, self.job.pieces[self.index]
        lengths, count = intervals(job.recorded), 1
        if self.checkpoint is not None and self.checkpoint.saved is None and self.index == 0:
            # Better now than in an hour if there is something wrong with the folder.
            self.save()
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
            if took < 0.5 * BLOCK_SECONDS:
                count = min(2 * count, job.plan.records)
            elif took > 2.0 * BLOCK_SECONDS:
                count = max(1, count // 2)
            if self.checkpoint is not None and self.checkpoint.due():
                self.save()
        state, seen = look(job.system, self.data, self.state, job.recorded[-1])
        self.consistent = False
        self.sink.write(self.index, piece, self.record, tuple(value[None, ...] for value in seen))
        self.sink.finish(self.index, piece, self.finals(state))

    def finals(self, state: State) -> dict[str, Array]:
        """What the piece leaves."""
        xp = self.job.xp
        weights = {f"weights_{i + 1}": w for i, w in enumerate(last_weights(xp, state))}
        rates = {"step_size": self.data.rate[:, 0, 0]}
        return weights | rates | {"diverged_at": state.diverged_at, "converged_at": state.converged_at}

    def save(self) -> None:
        """Make a checkpoint of where the piece is."""
        assert self.checkpoint is not None
        progress = _progress(self.job, self.index, self.record)
        self.checkpoint.save(progress, _host_of(self.state) | self.sink.pending(), self.sink.appended())
        self.sink.forget()


@contextlib.contextmanager
def _saved_when_interrupted(walk: _Walk) -> Iterator[None]:
    """Make a checkpoint before a KeyboardInterrupt goes on.

    None in the instant in which the sink has records that the state does not know of: the last
    checkpoint stands then.
    """
    try:
        yield
    except KeyboardInterrupt:
        if walk.checkpoint is not None and walk.consistent:
            walk.save()
        raise


def _host_of(state: State) -> Host:
    """The arrays of a state, by name."""
    found: Host = {}
    for name, value in state._asdict().items():
        arrays = value if isinstance(value, tuple) else (value,)
        found |= {f"state {name} {k}": _arrays.to_numpy(array) for k, array in enumerate(arrays)}
    return found


def _state_of(job: Job, saved: Saved) -> State | None:
    """The state that a checkpoint holds, None behind the last piece."""
    if saved.progress["piece"] == len(job.pieces):
        return None
    parts: dict[str, list[Array]] = {}
    for name, array in saved.state.items():
        kind, _, rest = name.partition(" ")
        if kind == "state":
            parts.setdefault(rest.split(" ")[0], []).append(job.from_host(array))
    return State(**{name: tuple(a) if name in ("weights", "kept") else a[0] for name, a in parts.items()})
