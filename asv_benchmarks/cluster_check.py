"""The floors of a cluster: two workers beside one, and a covariance eight times larger than a worker's memory.

    python asv_benchmarks/cluster_check.py efficiency
    python asv_benchmarks/cluster_check.py covariance

On the workers of this machine; each result is a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import dask
import dask.array as da
import distributed
import numpy as np

import natgrad_array as ng

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""For workers and for the caller alike: two workers on two processors have one thread each."""


def start(workers: int, **options: Any) -> distributed.Client:
    """Worker processes of one thread each."""
    dask.config.set({"distributed.nanny.pre-spawn-environ": THREADS})
    return distributed.Client(n_workers=workers, threads_per_worker=1, dashboard_address=":0", **options)


# ------------------------------------------------------------------------- two workers and one


def sweep(client: distributed.Client | None, members: int, steps: int) -> ng.simulation.History:
    """Networks 16-16-16-16 under the layerwise rule, the loss recorded each step, made where they are needed."""
    task = ng.GaussianTask.from_modes(np.eye(16), np.linspace(1.0, 2.0, 16), np.eye(16))

    def draw(start: int, stop: int) -> tuple[np.ndarray, ...]:
        noise = [np.random.default_rng(k).standard_normal((3, 16, 16)) for k in range(start, stop)]
        layers = 0.9 * np.eye(16) + 0.05 * np.stack(noise)
        return tuple(layers[:, i] for i in range(3))

    return ng.simulate(draw, task, members=members, learning_rate=0.01, steps=steps, client=client)


def efficiency(members: int, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of the same sweep by one worker and by two, in turns; numbers beside those without a cluster."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found = {}
    with start(1) as one, start(2) as two:
        for client in (one, two):
            sweep(client, 8, 2)
        for _ in range(repeats):
            for workers, client in ((1, one), (2, two)):
                began = time.perf_counter()
                found[workers] = sweep(client, members, steps)
                seconds[workers].append(time.perf_counter() - began)
    alone = sweep(None, members, steps)
    return {
        "what": f"{members} networks 16-16-16-16, {steps} steps, loss each step",
        "seconds": {workers: [round(s, 3) for s in taken] for workers, taken in seconds.items()},
        "ratio": round(float(np.median(seconds[1]) / np.median(seconds[2])), 3),
        "floor": 1.6,
        "largest relative difference from no cluster": max(
            float(np.max(np.abs(history.loss / alone.loss - 1.0))) for history in found.values()
        ),
    }


# --------------------------------------------------------------------- larger than memory


def block(info: Any, features: int) -> np.ndarray:
    """Samples of known covariance: whole waves over all samples, which are orthogonal, each mixed with the next."""
    (begin, end), total = info[None]["array-location"][0], info[None]["shape"][0]
    k, j = np.arange(begin, end)[:, None], np.arange(1, features + 1)
    # Integers modulo n: the phases are exact.
    waves = amplitudes(features) * np.cos(2.0 * np.pi / total * ((j * k) % total))
    waves[:, :-1] += 0.5 * waves[:, 1:]
    waves += 100.0 + np.arange(features)
    return waves


def amplitudes(features: int) -> np.ndarray:
    """Of the waves; offsets are a hundred times larger."""
    return np.linspace(1.0, 2.0, features)


def covariance(gigabytes: float, limit: str) -> dict[str, Any]:
    """The covariance of a Dask array that no worker could hold, beside its closed form."""
    features, chunk = 256, 32768
    samples = round(gigabytes * 1e9 / (8 * features * chunk)) * chunk
    x = da.map_blocks(
        lambda block_info=None: block(block_info, features),
        chunks=((chunk,) * (samples // chunk), (features,)),
        dtype=float,
        meta=np.empty((0, 0)),
    )
    mix = np.eye(features) + 0.5 * np.eye(features, k=1)
    exact = (mix * (amplitudes(features) ** 2 / 2.0)) @ mix.T
    with start(2, memory_limit=limit) as client:
        began = time.perf_counter()
        found = ng.covariance(x).compute()
        took = time.perf_counter() - began
        peaks = client.run(peak)
    return {
        "what": f"covariance of {samples} x {features}, {x.nbytes / 1e9:.3g} GB, in chunks of {chunk}",
        "memory limit": limit,
        "seconds": round(took, 1),
        "peak of a worker, GB": round(max(peaks.values()) / 1e9, 2),
        "largest error over the largest entry": float(np.max(np.abs(found - exact)) / np.max(exact)),
        "floor": 1e-10,
    }


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run one of the two checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=("efficiency", "covariance"))
    parser.add_argument("--members", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--limit", default="2GB")
    given = parser.parse_args()
    if given.check == "efficiency":
        result = efficiency(given.members, given.steps, given.repeats)
    else:
        result = covariance(given.gigabytes, given.limit)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
