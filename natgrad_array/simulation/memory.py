"""How much memory a simulation takes, from sizes alone."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.simulation.deep_linear import DeepLinear
from natgrad_array.simulation.ensemble import Ensemble, Members
from natgrad_array.simulation.state import System


class Sizes(NamedTuple):
    """What the memory of a member follows from, in bytes."""

    weights: int
    """The layers."""
    largest: int
    """The largest layer."""
    scratch: int
    """What one step holds beside them."""
    task: int
    """Moments and their factors, where each member has its own."""
    record: int
    """One record."""


class Plan(NamedTuple):
    """How an ensemble is worked on."""

    members: int
    """The most members in one piece."""
    records: int
    """The most records that are held before they are handed on."""


def sizes_of(ensemble: Ensemble, system: DeepLinear, records: Mapping[str, Shape]) -> Sizes:
    """Bytes of one member of an ensemble."""
    widths = ensemble.widths
    n_in, n_out, side = widths[0], widths[-1], max(widths)
    cores = [m * n for m, n in itertools.pairwise(widths)]
    layers = sum(cores)
    scratch = 4 * layers + 10 * side * side
    if system.rule in ("exact", "moore_penrose"):
        scratch += 8 * layers + 8 * len(widths) * side * side
    if system.rule == "moore_penrose":
        scratch += 6 * (n_in * n_out) ** 2 if n_in * n_out <= 64 else 12 * n_in * n_out
    if system.integrator == "rk4":
        scratch += 5 * layers
    task = 12 * (n_in**2 + n_out**2 + n_in * n_out) if ensemble.task.batch_shape else 0
    record = sum(math.prod(core) for core in records.values())
    item = _arrays.item_bytes(ensemble.xp, ensemble.like)
    return Sizes(layers * item, max(cores) * item, scratch * item, task * item, record * item)


SENT_BYTES = 2**27
"""At most so much of a piece is sent to a worker, or back, at once."""


def make_plan(
    each: Sizes, ensemble: Members, system: System, recorded: int, budget: int | None, pieces: int = 0
) -> Plan:
    """The largest pieces that fit in a budget; at least so many, if they are to be sent to workers.

    A worker holds all records of its piece to the end.

    Weights are there four times at the worst: those a step starts from, those that were kept
    at the last record, and new ones being put together from parts; on JAX five times, since a
    compiled loop also holds those that it may have to go back to. On NumPy only members
    that fit a cache are worked on at a time and need scratch space.

    Raises
    ------
    ValueError
        If one member does not fit.
    """
    capacity = max(1, min(recorded, 1024, each.weights // max(1, each.record)))
    most = max(1, ensemble.members)
    if pieces:
        sent = max(1, each.weights + recorded * each.record)
        most = max(1, min(-(-most // pieces), SENT_BYTES // sent))
    if budget is None:
        return Plan(most, capacity)
    weights = (5 if _arrays.is_jax(ensemble.like) else 4) * each.weights
    lasting = weights + 3 * capacity * each.record + each.task + (2 * recorded * each.record if pieces else 0)
    members = budget // (lasting + each.scratch)
    sides = tuple(side for core in ensemble.cores for side in core)
    if system.cuts_to_cache(ensemble.like, sides):
        working = _arrays.usable_threads() * max(1, _arrays.PIECE_BYTES // each.largest)
        members = max(members, (budget - working * each.scratch) // lasting)
    if members < 1:
        raise ValueError(
            f"max_bytes must be at least {lasting + each.scratch}, what one member takes, got {budget}; "
            "record less, or make networks smaller"
        )
    return Plan(min(int(members), most) if pieces else int(members), capacity)


def check_results_fit(each: Sizes, ensemble: Members, recorded: int, store: str | None) -> None:
    """Refuse what would not fit in memory, or on the disk where results go there, before anything runs.

    Raises
    ------
    ValueError
        If it would not.
    """
    needed = ensemble.members * (recorded * each.record + each.weights)
    if store is None:
        free, where = _arrays.available_bytes(ensemble.like), "in memory"
        instead = "record less often, or give a store, which keeps results on disk"
    else:
        folder = Path(store).absolute().parent
        while not folder.exists():
            folder = folder.parent
        free, where = shutil.disk_usage(folder).free, f"on the disk of {os.fspath(folder)}"
        instead = "record less often, or choose another disk"
    if free is not None and needed > free:
        raise ValueError(
            f"{ensemble.members} members with {recorded} records leave about {needed / 1e9:.3g} GB, "
            f"while {free / 1e9:.3g} GB are free {where}; {instead}"
        )


def budget_of(max_bytes: Any, like: Array) -> int | None:
    """The budget in bytes, None where there is none to be known.

    Raises
    ------
    ValueError
        If `max_bytes` is not a positive integer.
    """
    if max_bytes is None:
        free = _arrays.available_bytes(like)
        return None if free is None else free // 2
    if not _arrays.is_integer(max_bytes) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    return int(max_bytes)
