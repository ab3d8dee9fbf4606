"""What the benchmark modules of ASV have in common.

asv-runner calls `setup` again before every timed call, so everything heavy is made once
for each set of parameters and kept. Each set of parameters has a process of its own, which
imports one library only.
"""

from __future__ import annotations

import abc
import functools
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import natgrad_array as ng
from benchmarks import backends, contests, measure
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

BRIEF = os.environ.get("NATGRAD_BENCHMARKS") == "brief"
"""Whether to take one problem, one dtype and NumPy for each benchmark: enough to see that all of them run."""

# Each set of parameters has a process that imports a library; the tests try the contests on all of them.
LIBRARIES = backends.NAMES[:1] if BRIEF else tuple(backends.NAMES)
DTYPES = backends.DTYPES[:1] if BRIEF else backends.DTYPES
ROUNDS, BUDGET = (1, 0.0) if BRIEF else (9, 3.0)


EVERYONE = "everyone"


def against(*kinds: str) -> tuple[str, ...]:
    """Kinds of others to be compared with, or all of them at once in a brief run."""
    return (EVERYONE,) if BRIEF else kinds


def some(*labels: Any) -> tuple[Any, ...]:
    """The labels of problems, or only the first one in a brief run."""
    return labels[:1] if BRIEF else labels


@functools.cache
def once(make: Callable[..., Any], *key: Any) -> Any:
    """``make(*key)``, kept for as long as the process lives."""
    return make(*key)


@functools.cache
def network(
    library: str, dtype: str, sizes: tuple[int, ...], batch: int, kind: str = "orthogonal"
) -> tuple[tuple[Any, ...], ng.GaussianTask]:
    """An ensemble and the task that it learns."""
    layers, task, _ = contests.network(backends.connect(library), dtype, sizes, batch, kind, "identity")
    return layers, task


class Timed(abc.ABC):
    """The time of one call. A subclass has `cases` in its parameters and makes the call."""

    param_names = ("library", "dtype", "case")
    timeout = 300
    rounds = 2
    repeat = (3, 10, 2.0)
    warmup_time = 0.0  # `setup` has made the call once

    @staticmethod
    @abc.abstractmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        """The call that is timed."""

    def setup(self, library: str, dtype: str, case: str) -> None:
        self.call = once(_warmed, type(self).prepare, library, dtype, case)

    def time_call(self, library: str, dtype: str, case: str) -> None:
        self.call()


def _warmed(
    prepare: Callable[[Backend, str, str], Contestant], library: str, dtype: str, case: str
) -> Callable[[], Any]:
    backend = backends.connect(library)
    call = prepare(backend, dtype, case).ready(backend)
    call()
    return call


class Raced(abc.ABC):
    """Our time over those of others, taken in turns in one process.

    `against` is "written" (what a user would write), "expert" (the fastest hand-optimised
    code) or "product" (the matrix products of the same shapes). Below 1 we are faster.
    """

    param_names = ("library", "dtype", "case", "against")
    timeout = 300
    unit = "ratio"

    @property
    @abc.abstractmethod
    def contest(self) -> str:
        """Name of the contest."""

    def setup(self, library: str, dtype: str, case: str, against: str) -> None:
        self.backend, contest = backends.connect(library), contests.CONTESTS[self.contest]
        if library not in contest.libraries:
            raise NotImplementedError(f"{contest.title} is not compared on {library}")
        entries = once(contests.entries, self.contest, library, dtype, case)
        self.ours, *others = entries
        self.others = [entry for entry in others if against in (entry.kind, EVERYONE)]
        if not self.others:
            raise NotImplementedError(f"nobody is {against!r} here")

    def track_ratio(self, library: str, dtype: str, case: str, against: str) -> float:
        calls = {entry.label: entry.ready(self.backend) for entry in (self.ours, *self.others)}
        samples = measure.interleave(calls, rounds=ROUNDS, budget=BUDGET)
        fastest = min(statistics.median(samples[entry.label]) * entry.scale for entry in self.others)
        return statistics.median(samples[self.ours.label]) / fastest


class Peak(abc.ABC):
    """Memory at the peak of a call beyond what it was given, as a multiple of what it was given."""

    param_names = ("library", "case")
    unit = "inputs"

    @staticmethod
    @abc.abstractmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        """The call."""

    def setup(self, library: str, case: str) -> None:
        self.backend = backends.connect(library)
        self.entry = once(type(self).prepare, self.backend, "float64", case)
        self.call = once(_warmed, type(self).prepare, library, "float64", case)

    def track_peak(self, library: str, case: str) -> float:
        given = measure.nbytes(self.entry.arguments)
        return measure.peak_bytes(self.backend, self.call) / given if given else math.nan


class Calls(abc.ABC):
    """How often a call goes to the array library, for few and for many members: it should not depend on them."""

    param_names = ("case", "members")
    unit = "calls"

    @staticmethod
    @abc.abstractmethod
    def prepare(backend: Backend, case: str, members: int) -> Contestant:
        """The call."""

    def setup(self, case: str, members: int) -> None:
        self.entry = type(self).prepare(backends.connect("numpy"), case, members)

    def track_calls(self, case: str, members: int) -> int:
        return measure.count_calls(lambda: self.entry.function(*self.entry.arguments))
