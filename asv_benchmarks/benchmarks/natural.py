"""Natural gradients of ensembles, and the loss and gradient they start from."""

from __future__ import annotations

import functools

import natgrad_array as ng
from benchmarks import contests, suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant

dl = ng.deep_linear

INVERSES = ("layerwise", "exact", "moore_penrose", "block_diagonal")
ENSEMBLE = ((16, 16, 16, 16), 256)


def _natural(inverse: str, **options: str) -> object:
    return functools.partial(dl.natural_gradient, inverse=inverse, **options)


class Layerwise(suite.Timed):
    """One direction of the layerwise rule."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some("1 x 8, L 3", *contests.LAYERWISE))

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        return contests.ours("small" if case in contests.CONTESTS["small"].cases else "layerwise", backend, dtype, case)


class LayerwiseRaced(suite.Raced):
    """The layerwise rule beside Eq 42 as written and beside experts."""

    contest = "layerwise"
    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some(*contests.CONTESTS["layerwise"].quick),
        suite.against("written", "expert", "product"),
    )


class Inverses(suite.Timed):
    """One direction of every inverse, 256 networks 16-16-16-16."""

    params = (suite.LIBRARIES, suite.DTYPES, INVERSES)
    param_names = ("library", "dtype", "inverse")

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: str) -> Contestant:
        return Contestant(case, "ours", _natural(case), suite.network(backend.name, dtype, *ENSEMBLE))


class MoorePenroseRaced(suite.Raced):
    """The Moore–Penrose direction beside the dense F and its pseudo-inverse, and beside an expert's system."""

    contest = "moore-penrose"
    params = (suite.LIBRARIES, suite.DTYPES, ("256 x 16-16-16-16",), suite.against("written", "expert"))


class Products(suite.Timed):
    """`loss`, `gradient` and `exact_velocity` of networks 8-8-8-8, by their number."""

    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some(1, 64, 4096, 65536),
        suite.some("loss", "gradient", "exact_velocity"),
    )
    param_names = ("library", "dtype", "members", "function")

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: tuple[int, str]) -> Contestant:
        members, name = case
        return Contestant(name, "ours", getattr(dl, name), suite.network(backend.name, dtype, (8,) * 4, members))

    def setup(self, library: str, dtype: str, members: int, function: str) -> None:
        super().setup(library, dtype, (members, function))

    def time_call(self, library: str, dtype: str, members: int, function: str) -> None:
        self.call()


class NaturalPeak(suite.Peak):
    """Memory of the inverses."""

    params = (("numpy", "cupy"), INVERSES)
    prepare = Inverses.prepare


class NaturalCalls(suite.Calls):
    """Library calls of the inverses. "moore_penrose" iterates: its number goes by the slowest member."""

    params = (INVERSES, (16, 256))

    @staticmethod
    def prepare(backend: Backend, case: str, members: int) -> Contestant:
        return Contestant(case, "ours", _natural(case), suite.network("numpy", "float64", ENSEMBLE[0], members))
