"""A training step of every preset, for one network and for an ensemble."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import natgrad_array as ng
from benchmarks import contests, suite
from benchmarks.backends import Backend
from benchmarks.contests import Contestant, to
from natgrad_array.optimizers.presets import PRESETS

PROBLEMS = {
    "64 x (64-32-10), N 256": ((64, 32, 10), 64, 256),
    "256-128-32-128-256, N 500": ((256, 128, 32, 128, 256), 1, 500),
}


@functools.cache
def _problem(backend: Backend, dtype: str, case: str) -> tuple[Any, ...]:
    sizes, members, samples = PROBLEMS[case]
    net = ng.networks.MLP(sizes)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((samples, n)).astype(dtype) for n in (sizes[0], sizes[-1]))
    params = net.init(rng, (members,) if members > 1 else (), like=x)
    return net, *to(backend, (params, x, y))


class Steps(suite.Timed):
    """One step, with the noise of sampled targets already drawn."""

    params = (suite.LIBRARIES, suite.DTYPES, suite.some(*PROBLEMS), suite.some(*PRESETS))
    param_names = ("library", "dtype", "problem", "preset")

    @staticmethod
    def prepare(backend: Backend, dtype: str, case: tuple[str, str]) -> Contestant:
        net, params, x, y = _problem(backend, dtype, case[0])
        optimizer = PRESETS[case[1]]()
        part = int(np.ceil(optimizer.estimate.share * x.shape[-2]))
        shape = (1, *params[0].shape[:-2], part, y.shape[-1])
        noise = backend.asarray(np.random.default_rng(1).standard_normal(shape).astype(dtype))
        state = optimizer.init(net, params)

        def step(params: Any, state: Any, x: Any, y: Any, noise: Any) -> Any:
            return optimizer.step(net, params, state, x, y, noise)[0]

        return Contestant(case[1], "ours", step, (params, state, x, y, noise))

    def setup(self, library: str, dtype: str, problem: str, preset: str) -> None:
        super().setup(library, dtype, (problem, preset))

    def time_call(self, library: str, dtype: str, problem: str, preset: str) -> None:
        self.call()


class AutoencoderStepRaced(suite.Raced):
    """A step of the paper's rule on its MNIST autoencoder beside the rule written in NumPy."""

    contest = "autoencoder-step"
    params = (
        suite.LIBRARIES[:1],
        suite.DTYPES,
        tuple(contests.CONTESTS["autoencoder-step"].cases),
        suite.against("written", "expert", "product"),
    )


class EnsembleStepRaced(suite.Raced):
    """A step of 64 networks at once beside a step of each."""

    contest = "ensemble-step"
    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some(*contests.CONTESTS["ensemble-step"].cases),
        suite.against("written"),
    )
