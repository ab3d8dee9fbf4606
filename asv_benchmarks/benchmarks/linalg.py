"""Pseudo-inverses and preconditioned gradients."""

from __future__ import annotations

import functools

import natgrad_array as ng
from benchmarks import contests, problems, suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

HALF_RANK = tuple(contests.CONTESTS["pinvh-half-rank"].cases)


class Pinvh(suite.Timed):
    """`pinvh` at full rank, by size."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*contests.PINVH))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        return contests.ours("pinvh", backend, dtype, case)


class PinvhRaced(suite.Raced):
    """`pinvh` at full rank beside `pinv(hermitian=True)`."""

    contest = "pinvh"
    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some("4096 x 8²", "1024 x 32²", "64 x 128²"),
        suite.against("written", "product"),
    )


class PinvhDeficient(suite.Timed):
    """`pinvh` where rank is missing: from every member, or from one."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some("one of 1024 x 32²", *HALF_RANK))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        if case.startswith("one of "):
            return contests.ours("pinvh-one-deficient", backend, dtype, case.removeprefix("one of "))
        return contests.ours("pinvh-half-rank", backend, dtype, case)


class PinvhBatch(suite.Timed):
    """`pinvh` of 8 x 8 matrices, by their number."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(1, 64, 65536))
    param_names = ("library", "dtype", "members")

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: int) -> Contestant:
        return Contestant("pinvh", "ours", ng.pinvh, (backend.asarray(problems.definite(case, 8, dtype)),))


class Precondition(suite.Timed):
    """`precondition`, plain and damped."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some("plain", "damped"))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        entry = contests.ours("precondition", backend, dtype, "1024 x 32 x 32")
        function = functools.partial(ng.precondition, damping=0.1) if case == "damped" else entry.function
        return Contestant(case, "ours", function, entry.arguments)


class PreconditionRaced(suite.Raced):
    """`precondition` beside two `pinv(hermitian=True)`."""

    contest = "precondition"
    params = (suite.LIBRARIES, suite.DTYPES, ("1024 x 32 x 32",), suite.against("written", "product"))


class PinvhPeak(suite.Peak):
    """Memory of `pinvh`."""

    params = (("numpy", "cupy"), suite.some("1024 x 32²", "4 x 512²"))
    prepare = Pinvh.prepare


class PinvhCalls(suite.Calls):
    """Library calls of `pinvh`."""

    params = (("full rank", "rank n/2"), (16, 1024))

    @staticmethod
    def prepare(backend: Backend, case: str, members: int) -> Contestant:
        make = problems.definite if case == "full rank" else problems.half_rank
        return Contestant(case, "ours", ng.pinvh, (make(members, 8, "float64"),))
