"""What it costs to put the claims to the test."""

from __future__ import annotations

import natgrad_array as ng
from benchmarks import suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

dl = ng.deep_linear


class Verify(suite.Timed):
    """`verify`, which looks at values and is not compiled."""

    # JAX compiles each operation by itself when it is not told to compile the whole: half a minute.
    params = (suite.some(*suite.LIBRARIES), suite.DTYPES, suite.some("1 x 4-5-3", "100 x 4-5-3"))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        members = int(case.partition(" ")[0])
        return Contestant("verify", "ours", _verify, suite.network(backend.name, dtype, (4, 5, 3), members), jit=False)


def _verify(layers: object, task: object) -> object:
    return ng.verify(layers, task).holds


class CheckPreconditioner(suite.Timed):
    """`check_preconditioner` of the layerwise rule, called on n_0 n_L gradients."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some("64 x 4-5-3", "64 x 8-12-6"))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        members, _, sizes = case.partition(" x ")
        widths = tuple(int(n) for n in sizes.split("-"))
        return Contestant("check", "ours", _check, suite.network(backend.name, dtype, widths, int(members)))


def _check(layers: object, task: object) -> object:
    return tuple(ng.check_preconditioner(dl.fisher(layers, task).precondition, layers, task))
