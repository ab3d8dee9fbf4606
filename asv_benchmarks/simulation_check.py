"""What simulations promise, measured where it runs: ``python asv_benchmarks/simulation_check.py``.

memory      the largest resident memory of a process that simulates an ensemble twenty times larger
            than `max_bytes`, made as it goes and stored on disk, above that of a small one
checkpoint  the share of a minute that checkpoints every ten seconds take, of 1024 networks 16-16-16-16
kills       runs that are killed at random moments and resumed: how many end with the same bits
"""

from __future__ import annotations

import argparse
import itertools
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

from benchmarks import peers, problems  # noqa: E402

import natgrad_array as ng  # noqa: E402
from natgrad_array.simulation import run  # noqa: E402


def task_of(n: int) -> tuple[ng.GaussianTask, np.ndarray]:
    """A task of n inputs and outputs, and its optimum."""
    moments = problems.task(n, n, "identity", "float64")
    return ng.GaussianTask(*moments), peers.known(moments.moment, moments.noise, moments.cross).optimum


# -------------------------------------------------------------------------------- memory


def memory(folder: Path, *, budget: int = 2**26) -> str:
    """In this process, whose memory nothing else has used."""
    sizes = (16, 24, 16)
    task, _ = task_of(16)
    each = 8 * sum(m * n for n, m in itertools.pairwise(sizes))
    members = 20 * budget // each

    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        # Blocks of their own seeds, so that a member is the same however the ensemble is cut.
        first, last = start // 64, -(-stop // 64)
        blocks = [ng.deep_linear.gaussian(k, sizes, (64,), like=np.empty(0)) for k in range(first, last)]
        layers = zip(*blocks, strict=True)
        return tuple(np.concatenate(layer)[start - 64 * first : stop - 64 * first] for layer in layers)

    options: dict[str, Any] = {"rule": "layerwise", "learning_rate": 0.05, "steps": 4, "record": ("loss", "modes")}
    ng.simulate(weights, task, members=64, max_bytes=2**21, store=folder / "small", **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    history = ng.simulate(weights, task, members=members, max_bytes=budget, store=folder / "large", **options)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    some = np.arange(members - 200, members)
    whole = ng.simulate(weights(members - 200, members), task, **options)
    difference = float(np.max(np.abs(history.loss[:, some] / whole.loss - 1.0)))
    return (
        f"memory: {members} networks of {each * members / 1e9:.2f} GB under max_bytes {budget / 1e6:.0f} MB: "
        f"{peak / budget:.2f} of it above a small run; losses within {difference:.0e} of the uncut run"
    )


# ---------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, *, seconds: float = 60.0, interval: float = 10.0) -> str:
    """What checkpoints take of a run, by the clock around them."""
    task, optimum = task_of(16)
    weights, options = problems.on_the_way((16,) * 4, 1024, optimum), {"learning_rate": 1e-3, "record": "loss"}
    begin = time.perf_counter()
    ng.simulate(weights, task, steps=200, **options)
    steps = max(1, int(200 * seconds / (time.perf_counter() - begin)))
    taken, real = [], run.Ledger.save

    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        real(self, *args)
        taken.append(time.perf_counter() - start)

    run.Ledger.save = timed  # type: ignore[method-assign]
    begin = time.perf_counter()
    ng.simulate(weights, task, steps=steps, checkpoint=folder / "c", checkpoint_interval=interval, **options)
    whole = time.perf_counter() - begin
    run.Ledger.save = real  # type: ignore[method-assign]
    share = sum(taken) / (whole - sum(taken))
    return f"checkpoint: {len(taken)} in {whole:.0f} s of {steps} steps took {sum(taken):.2f} s, {100 * share:.2f} %"


# ---------------------------------------------------------------------------------- kills

PROGRAM = """
import sys
import numpy as np
import natgrad_array as ng
from natgrad_array import deep_linear as dl

weights = dl.gaussian(0, (8, 12, 8), (200,), like=np.empty(0), scale=0.5)
task = ng.GaussianTask.from_modes(np.eye(8), np.linspace(0.5, 2.0, 8), np.eye(8))
history = ng.simulate(
    weights, task, rule="gradient", learning_rate=0.01, steps=1500, record=("loss", "modes"), record_every=10, rng=1,
    temperature=1e-5, max_bytes=1_000_000, checkpoint=sys.argv[1], checkpoint_interval=0.05, store=sys.argv[2] or None,
)
np.savez(sys.argv[3], history.loss[...], history.modes[...], *(w[...] for w in history.weights))
"""


def kills(folder: Path, *, count: int = 20) -> str:
    """SIGKILL at moments spread over the whole of a run, with and without a store in turns."""
    rng = np.random.default_rng()

    def start(name: str, stored: bool) -> subprocess.Popen[bytes]:
        store = folder / f"{name}.zarr" if stored else ""
        arguments = [str(folder / name), str(store), str(folder / f"{name}.npz")]
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments])

    begin, same, died = time.perf_counter(), 0, 0
    if start("whole", False).wait():
        raise RuntimeError("the run that nobody kills failed")
    whole = time.perf_counter() - begin
    for k in range(3 * count):
        stored, begin = bool(k % 2), time.perf_counter()
        process = start(f"run{k}", stored)
        try:
            process.wait(rng.uniform(0.15, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        else:
            # Too late: what else the machine does may have made the first run a slow one.
            whole = min(whole, time.perf_counter() - begin)
        if process.wait() != -signal.SIGKILL:
            continue
        died += 1
        if start(f"run{k}", stored).wait() == 0:
            with np.load(folder / "whole.npz") as wanted, np.load(folder / f"run{k}.npz") as found:
                same += all(np.array_equal(found[name], wanted[name]) for name in wanted.files)
        if died == count:
            break
    return f"kills: {died} runs of {whole:.1f} s were killed and resumed; {same} of {died} ended with the same bits"


CHECKS = {"memory": memory, "checkpoint": checkpoint, "kills": kills}


def main() -> None:
    """Each check in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=list(CHECKS), help=", ".join(CHECKS))
    parser.add_argument("--worker", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            print(CHECKS[options.worker](Path(folder)), flush=True)
        return
    for name in options.checks:
        subprocess.run([sys.executable, str(Path(__file__).resolve()), "--worker", name], check=True)


if __name__ == "__main__":
    main()
