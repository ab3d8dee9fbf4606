"""Pieces of an ensemble on the workers of a Dask cluster: sent, watched over and taken in as they end."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array._client import keep, submit
from natgrad_array.simulation.ensemble import Piece
from natgrad_array.simulation.fingerprint import dtype_name
from natgrad_array.simulation.progress import Bar
from natgrad_array.simulation.run import Begun, Job, Ledger, Walk
from natgrad_array.simulation.sinks import Memory, Seen, Sink

PIECES_PER_THREAD = 4
"""Into so many pieces for each thread of the cluster an ensemble is cut, if it has as many members."""

WORKER_SECONDS = 60.0
"""So long a cluster may be without workers."""

_AHEAD = 2
"""Pieces for each thread that a cluster has at a time: one at work, one that waits for it."""

Parcel = tuple[Seen, dict[str, np.ndarray[Any, Any]]]
"""All records of a piece, and what it leaves, as NumPy arrays."""


def threads(client: Any) -> int:
    """How many pieces a cluster works on at a time."""
    return max(1, sum(map(int, client.nthreads().values())))


def worker_budget(client: Any, own: int | None) -> int | None:
    """Half of the memory that a worker may use for one of its threads, or the budget here if it is smaller."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] // (2 * worker["nthreads"]) for worker in workers if worker["memory_limit"]]
    return min([*limits, *([] if own is None else [own])], default=None)


def there(client: Any) -> Callable[[Job, Sink, Ledger, Bar], None]:
    """What walks the pieces of a run on the workers of a client."""

    def walk(job: Job, sink: Sink, ledger: Ledger, bar: Bar) -> None:
        watch = _Watch(client, job, sink, ledger, bar)
        try:
            todo = ledger.todo()
            if watch.begun is not None:
                # A store takes records in their order: the piece that it has a part of comes before all others.
                watch.go(todo[:1])
                del todo[0]
            watch.go(todo)
        except BaseException:
            # What has come stays, whatever ends the run; in the middle of a piece the last checkpoint stands.
            if not watch.is_taking:
                watch.save()
            raise
        finally:
            watch.close()

    return walk


class _Watch:
    """Keeps a cluster busy, and takes in what comes back."""

    def __init__(self, client: Any, job: Job, sink: Sink, ledger: Ledger, bar: Bar) -> None:
        self.client, self.job, self.sink, self.ledger, self.bar = client, job, sink, ledger, bar
        self.running: dict[Any, tuple[int, int, str | None]] = {}
        self.is_taking, self.begun = False, ledger.begun
        self.dtype = dtype_name(job.load.ensemble.like)
        self.shared = keep(client, job._replace(load=job.load.sent(), title=None))

    def go(self, todo: Iterable[int]) -> None:
        """Have pieces simulated, and hand them on in the order in which they end."""
        left = iter(todo)
        while True:
            workers = self._asked(self.client.nthreads)
            room = max(1, _AHEAD * sum(workers.values()) - len(self.running))
            for index in itertools.islice(left, room):
                self._send(index, workers)
            if not self.running:
                return
            for future in self._some():
                self._take(future)
            if self.ledger.due():
                self.save()

    def save(self) -> None:
        """Make a checkpoint; a piece that has begun before stays where it was until it has ended."""
        waits = self.begun is not None and self.begun.piece not in self.ledger.finished
        self.ledger.save(self.begun if waits else None)

    def close(self) -> None:
        """Let the cluster forget what is not needed any more."""
        for future in (*self.running, self.shared):
            if self.client.status == "running":
                future.cancel()
        self.running = {}

    def _send(self, index: int, workers: Mapping[str, int]) -> None:
        """Give a piece to the worker that has the fewest for its threads.

        Dask alone would give most of them to the one that has what all pieces share.
        """
        load, piece = self.job.load, self.job.pieces[index]
        layers = None if load.ensemble.constructor is not None else load.ensemble.layers(piece.start, piece.stop)
        begun = self.ledger.take_begun(index)
        arguments = self.shared, index, layers, begun, self.dtype
        busy = Counter(worker for _, _, worker in self.running.values())
        worker = min(workers, key=lambda name: (busy[name] + 1) / workers[name], default=None)
        where = {} if worker is None else {"workers": [worker], "allow_other_workers": True}
        future = self._asked(lambda: submit(self.client, simulate_piece, *arguments, **where))
        self.running[future] = (index, 0 if begun is None else begun.record, worker)

    def _some(self) -> Iterable[Any]:
        """Pieces that have ended, at least one."""
        wait = sys.modules["distributed"].wait
        while True:
            try:
                options = {"timeout": WORKER_SECONDS, "return_when": "FIRST_COMPLETED"}
                return tuple(self._asked(functools.partial(wait, list(self.running), **options)).done)
            except TimeoutError:
                if not self._asked(self.client.nthreads):
                    raise self._gone(f"has had no workers for {WORKER_SECONDS:g} s") from None

    def _take(self, future: Any) -> None:
        index, record, _ = self.running[future]
        piece = self.job.pieces[index]
        if future.status == "error":
            self._fail(future, piece)
        try:
            seen, final = self._asked(lambda: future.result(WORKER_SECONDS))
        except TimeoutError:
            # Its worker died with the result: the piece is made again.
            return
        self.is_taking = True
        self.sink.write(index, piece, record, seen)
        self.sink.finish(index, piece, final)
        self.ledger.finished.append(index)
        self.is_taking = False
        del self.running[future]
        steps = self.job.recorded[-1] - self.job.recorded[record]
        self.bar.advance(piece.members * steps, dict(zip(self.job.system.names, seen, strict=True)))

    def _fail(self, future: Any, piece: Piece) -> None:
        """Raise what went wrong in a piece."""
        try:
            future.result()
        except sys.modules["distributed"].KilledWorker as error:
            raise RuntimeError(
                f"members {piece.start} to {piece.stop - 1} ended every worker that they were given to, as running "
                f"out of memory does; give a smaller max_bytes, or workers more memory. {self._kept()}"
            ) from error

    def _asked(self, question: Callable[[], Any]) -> Any:
        """What a cluster says, unless it is gone."""
        try:
            return question()
        except Exception as error:
            if self.client.status == "running":
                raise
            raise self._gone("is gone") from error

    def _gone(self, how: str) -> ConnectionError:
        return ConnectionError(f"the cluster of the client {how}. {self._kept()}")

    def _kept(self) -> str:
        done = f"{len(self.ledger.finished)} of {len(self.job.pieces)} pieces had ended"
        if self.ledger.checkpoint is None:
            return f"{done}; with a checkpoint they would not have to be made again"
        return f"{done} and are in the checkpoint: the same call goes on from there, with another client or without one"


class _Parcel(Memory):
    """Keeps a piece on the host, to be sent."""

    def write(self, index: int, piece: Piece, record: int, seen: Seen) -> None:
        self.blocks.setdefault(index, []).append(tuple(_arrays.to_numpy(array) for array in seen))

    def finish(self, index: int, piece: Piece, final: Mapping[str, Array]) -> None:
        self.finals[index] = {name: _arrays.to_numpy(array) for name, array in final.items()}


def simulate_piece(job: Job, index: int, layers: tuple[Array, ...] | None, begun: Begun | None, dtype: str) -> Parcel:
    """Simulate one piece, on a worker.

    Raises
    ------
    ValueError
        If arrays do not arrive as they were.
    """
    sink = _Parcel(job.from_host, checkpointed=False)
    found = dtype_name(job.load.ensemble.like)
    if found != dtype:
        raise ValueError(
            f"arrays arrived at a worker as {found}, not {dtype}: set JAX_ENABLE_X64=1 where workers start"
        )
    Walk(job, sink, Ledger(job, sink, begun=begun), index, Bar(None, 0), layers).go()
    blocks = zip(*sink.blocks[index], strict=True)
    return tuple(np.concatenate(column) for column in blocks), sink.finals[index]
