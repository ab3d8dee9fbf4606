"""Second moments, covariances and streams of samples."""

from __future__ import annotations

import functools

import natgrad_array as ng
from benchmarks import contests, problems, suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

SHAPES = tuple(contests.COVARIANCE)
STREAM = tuple(contests.CONTESTS["streaming"].cases)


class SecondMoment(suite.Timed):
    """`second_moment`."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*SHAPES))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        arguments = contests.ours("covariance", backend, dtype, case).arguments
        return Contestant("second_moment", "ours", ng.second_moment, arguments)


class Covariance(suite.Timed):
    """`covariance` without shrinkage."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*SHAPES))
    prepare = staticmethod(functools.partial(contests.ours, "covariance"))


class CovarianceRaced(suite.Raced):
    """`covariance` beside its peers."""

    contest = "covariance"
    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some("4096 x 64 x 16", "64 x 1024 x 128"),
        suite.against("written", "expert", "product"),
    )


class LedoitWolf(suite.Timed):
    """`covariance` with Ledoit–Wolf shrinkage."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*SHAPES))
    prepare = staticmethod(functools.partial(contests.ours, "ledoit-wolf"))


class LedoitWolfRaced(suite.Raced):
    """Ledoit–Wolf shrinkage beside its peers."""

    contest = "ledoit-wolf"
    params = (suite.LIBRARIES, suite.DTYPES, ("64 x 1024 x 128",), suite.against("written", "expert"))


class OAS(suite.Timed):
    """`covariance` with oracle-approximating shrinkage."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*SHAPES))
    prepare = staticmethod(functools.partial(contests.ours, "oas"))


class OASRaced(suite.Raced):
    """Oracle-approximating shrinkage beside its peers."""

    contest = "oas"
    params = (suite.LIBRARIES, suite.DTYPES, ("64 x 1024 x 128",), suite.against("written", "expert"))


class Streaming(suite.Timed):
    """`Moments` of samples that come in chunks."""

    params = (suite.LIBRARIES, suite.DTYPES, STREAM)
    prepare = staticmethod(functools.partial(contests.ours, "streaming"))


class StreamingRaced(suite.Raced):
    """`Moments` beside Chan's merge by hand."""

    contest = "streaming"
    params = (suite.LIBRARIES, suite.DTYPES, STREAM, suite.against("expert", "product"))


class MomentsPeak(suite.Peak):
    """Memory of `covariance`, by shrinkage."""

    params = (("numpy", "cupy"), ("covariance", "ledoit-wolf", "oas"))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        return contests.ours(case, backend, dtype, "64 x 1024 x 128")


class MomentsCalls(suite.Calls):
    """Library calls of `covariance`, by shrinkage."""

    params = (("none", "ledoit_wolf", "oas"), (16, 1024))

    @staticmethod
    def prepare(backend: Backend, case: str, members: int) -> Contestant:
        shrinkage = None if case == "none" else case
        function = functools.partial(ng.covariance, shrinkage=shrinkage)
        return Contestant(case, "ours", function, (problems.samples(members, 32, 8, "float64"),))
