"""The Fisher information: products, dense matrix, inverses, rank and spectrum."""

from __future__ import annotations

import functools

import natgrad_array as ng
from benchmarks import contests, suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

dl = ng.deep_linear

CASES = tuple(contests.FISHER)


class Matvec(suite.Timed):
    """`F.matvec` of one network 32-32-32-32."""

    params = (suite.LIBRARIES, suite.DTYPES, CASES)
    prepare = staticmethod(functools.partial(contests.ours, "fisher-matvec"))


class MatvecRaced(suite.Raced):
    """`F.matvec` beside automatic differentiation, and beside the structure by hand."""

    contest = "fisher-matvec"
    params = (suite.LIBRARIES, suite.DTYPES, CASES, suite.against("written", "expert"))


class Dense(suite.Timed):
    """`F.to_dense` of one network 32-32-32-32."""

    params = (suite.LIBRARIES, suite.DTYPES, CASES)
    prepare = staticmethod(functools.partial(contests.ours, "fisher-dense"))


class DenseRaced(suite.Raced):
    """`F.to_dense` beside Kronecker blocks by hand."""

    contest = "fisher-dense"
    params = (suite.LIBRARIES, suite.DTYPES, CASES, suite.some("expert", "product"))


class Methods(suite.Timed):
    """What else F does, for 64 networks 8-12-12-6, F being made each time."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some("precondition", "rank", "spectrum"))
    param_names = ("library", "dtype", "method")

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        layers, task = suite.network(backend.name, dtype, (8, 12, 12, 6), 64)
        if case == "precondition":
            gradient = dl.gradient(layers, task)
            return Contestant(case, "ours", lambda w, t, g: dl.fisher(w, t).precondition(g), (layers, task, gradient))
        return Contestant(case, "ours", lambda w, t: getattr(dl.fisher(w, t), case)(), (layers, task))
