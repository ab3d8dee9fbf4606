"""A simulation that has been checked, and runs when it is told to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from natgrad_array._arrays import Array, Shape
from natgrad_array._client import check_client
from natgrad_array.simulation.checkpoint import Checkpoint
from natgrad_array.simulation.cluster import PIECES_PER_THREAD, there, threads, worker_budget
from natgrad_array.simulation.ensemble import Members, cut
from natgrad_array.simulation.fingerprint import digest, dtype_name
from natgrad_array.simulation.history import Axes, History
from natgrad_array.simulation.memory import Plan, Sizes, budget_of, make_plan
from natgrad_array.simulation.run import Job, here, run
from natgrad_array.simulation.sinks import Memory
from natgrad_array.simulation.state import Load, System
from natgrad_array.simulation.store import Layout, Store


@dataclass(frozen=True)
class Prepared:
    """All that a simulation is made of."""

    ensemble: Members
    system: System
    load: Load
    recorded: tuple[int, ...]
    """The steps that are recorded."""
    axes: Axes
    shapes: Mapping[str, Shape]
    """Core shapes of records."""
    finals: Mapping[str, tuple[Shape, str, tuple[str, ...]]]
    """Core shape, dtype and names of axes of all that a piece leaves."""
    plan: Plan
    attributes: Mapping[str, Any]
    fingerprint: Callable[[], dict[str, Any]]
    """What makes this run another than others; it takes a look at every weight."""
    leave: Callable[[Mapping[str, Array], tuple[Array, ...], Mapping[str, Array]], History]
    """A history of records, last weights and all that pieces left."""
    store: str | None
    checkpoint: str | os.PathLike[str] | None
    interval: float
    title: str | None
    """What stands before a progress bar, None for no bar."""
    client: Any
    """Of a Dask cluster, or None."""

    def run(self) -> History:
        """Simulate, or go on where a checkpoint is."""
        xp, system, plan = self.ensemble.xp, self.system, self.plan
        identity = {} if self.store is None and self.checkpoint is None else self.fingerprint()
        host = self.ensemble.from_host
        with contextlib.ExitStack() as stack:
            kept = saved = None
            if self.checkpoint is not None:
                kept = Checkpoint(self.checkpoint, self.interval, identity)
                stack.callback(kept.close)
                saved = kept.saved
            if saved is not None:
                plan = Plan(**saved.progress["plan"])
            pieces = cut(self.ensemble.batch, plan.members)
            sink: Memory | Store
            if self.store is None:
                sink = Memory(host, checkpointed=kept is not None)
            else:
                dtype = dtype_name(self.ensemble.like)
                layout = Layout(self.recorded, self.axes, self.shapes, self.finals, dtype, pieces)
                again = {"resumed": kept is not None, "begun": saved is not None}
                sink = Store(self.store, layout, self.attributes, digest(identity), **again)
                stack.callback(sink.close)
            if saved is not None:
                sink.restore(saved.appended, saved.state, saved.progress["record"])
            job = Job(xp, system, self.load, pieces, self.recorded, host, plan, self.title)
            if not sink.is_complete:
                run(job, sink, kept, here if self.client is None else there(self.client))
            found, finals = sink.results(xp, system.names, self.ensemble.batch)
        count = sum(name.startswith("weights_") for name in finals)
        return self.leave(found, tuple(finals[f"weights_{i + 1}"] for i in range(count)), finals)


def plan_of(each: Sizes, ensemble: Members, system: System, recorded: int, max_bytes: Any, client: Any) -> Plan:
    """How an ensemble is worked on, here or by a cluster.

    Raises
    ------
    TypeError, ValueError
        If `max_bytes` or `client` is wrong, or one member does not fit.
    """
    budget, pieces = budget_of(max_bytes, ensemble.like), 0
    if client is not None:
        check_client(client)
        pieces = PIECES_PER_THREAD * threads(client)
        budget = worker_budget(client, budget) if max_bytes is None else budget
    return make_plan(each, ensemble, system, recorded, budget, pieces)
