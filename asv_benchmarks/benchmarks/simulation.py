"""Simulations: members times steps in a second against the size of the ensemble, and loops of others."""

from __future__ import annotations

import statistics

import natgrad_array as ng
from benchmarks import backends, contests, measure, suite

STEPS = 50


class Throughput:
    """Members times steps in a second, networks 16-16-16-16, by how many are simulated together."""

    param_names = ("library", "dtype", "members", "rule")
    params = (suite.LIBRARIES, suite.DTYPES, suite.some(1, 32, 1024, 16384), suite.some("layerwise", "gradient"))
    timeout = 300
    unit = "member steps / s"

    def setup(self, library: str, dtype: str, members: int, rule: str) -> None:
        self.backend = backends.connect(library)
        self.layers, self.task = suite.network(library, dtype, (16,) * 4, members)

    def track_rate(self, library: str, dtype: str, members: int, rule: str) -> float:
        def call() -> None:
            history = ng.simulate(self.layers, self.task, rule=rule, learning_rate=0.05, steps=STEPS)
            self.backend.synchronise(history.loss)

        samples = measure.interleave({"simulate": call}, rounds=suite.ROUNDS, budget=suite.BUDGET)
        return members * STEPS / statistics.median(samples["simulate"])


class SimulationRaced(suite.Raced):
    """A simulation with the loss at every step beside loops that users and experts would write."""

    contest = "simulation"
    params = (
        suite.LIBRARIES,
        suite.DTYPES,
        suite.some(*contests.CONTESTS["simulation"].cases),
        suite.against("written", "expert", "other"),
    )
