"""The MNIST autoencoder by this library and by kfac-jax, in turns: seconds to the same training loss.

    python asv_benchmarks/autoencoder_race.py --images t10k-images-idx3-ubyte.gz --peer kfac-venv/bin/python

kfac-jax 0.0.8 does not run on the JAX that this library is tested with, so it has an
interpreter of its own: ``pip install "jax==0.8.3" "kfac-jax==0.0.8"``. Both train
784-400-200-100-50-100-200-400-784 (tanh, squared loss) from the same parameters on the same
batches of 1000 in float32. The time is that of steps alone, with what has been compiled
compiled; losses on all training images are computed between the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
EVERY = 10


def batches(samples: int, batch: int, steps: int) -> Iterator[np.ndarray]:
    """Indices of every step's batch."""
    rng, order = np.random.default_rng(0), np.arange(0)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(samples)
        yield order[:batch]
        order = order[batch:]


def follow(step: Callable[[np.ndarray], Any], loss: Callable[[], float], x: np.ndarray, steps: int) -> dict[str, Any]:
    """Take the steps, and note the seconds spent in them and the training loss."""
    record: dict[str, Any] = {"step": [], "seconds": [], "train": []}
    seconds = 0.0
    for k, chosen in enumerate(batches(len(x), 1000, steps), start=1):
        rows = x[chosen]
        start = time.perf_counter()
        step(rows)
        seconds += time.perf_counter() - start
        if k % EVERY == 0:
            record["step"].append(k)
            record["seconds"].append(seconds)
            record["train"].append(loss())
    return record


# --------------------------------------------------------------- the peer, in its own interpreter


def peer(problem: Path, steps: int) -> None:
    """kfac-jax with everything adaptive, from a first damping of 1."""
    import jax
    import jax.numpy as jnp
    import kfac_jax

    with np.load(problem) as arrays:
        x = arrays["x"]
        params = [jnp.asarray(arrays[f"params_{i}"]) for i in range(len(arrays.files) - 1)]
    # Weights and bias apart, as its registration of dense layers expects them.
    first = [(w[:, :-1].T, w[:, -1]) for w in params]

    def output(layers: Any, a: Any) -> Any:
        for i, (w, b) in enumerate(layers):
            a = a @ w + b
            a = jnp.tanh(a) if i + 1 < len(layers) else a
        return a

    def loss(layers: Any, a: Any) -> Any:
        found = output(layers, a)
        kfac_jax.register_squared_error_loss(found, targets=a, weight=0.5)
        return 0.5 * jnp.sum((found - a) ** 2) / a.shape[0]

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
    )
    whole = jax.jit(lambda layers: 0.5 * jnp.sum((output(layers, x) - x) ** 2) / x.shape[0])
    key = jax.random.PRNGKey(0)
    held: dict[str, Any] = {}

    def start() -> None:
        # Its step gives its buffers away, so every run has copies of its own.
        held["layers"] = jax.tree_util.tree_map(jnp.array, first)
        held["state"] = optimizer.init(held["layers"], key, x[:1000])
        held["count"] = 0

    def step(rows: np.ndarray) -> None:
        held["layers"], held["state"], stats = optimizer.step(
            held["layers"],
            held["state"],
            jax.random.fold_in(key, held["count"]),
            batch=jnp.asarray(rows),
            global_step_int=held["count"],
        )
        held["count"] += 1
        jax.block_until_ready((held["layers"], stats["loss"]))

    start()
    follow(step, lambda: float(whole(held["layers"])), x, EVERY)
    start()
    print(json.dumps(follow(step, lambda: float(whole(held["layers"])), x, steps)))


# ------------------------------------------------------------------------------------- ours


def ours(problem: Path, steps: int, preset: str) -> None:
    """A preset as it comes, on NumPy."""
    sys.path.insert(0, str(HERE.parents[1]))
    import natgrad_array as ng
    from natgrad_array.optimizers.presets import PRESETS

    with np.load(problem) as arrays:
        x = arrays["x"]
        params = tuple(arrays[f"params_{i}"] for i in range(len(arrays.files) - 1))
    net = ng.networks.MLP((*(w.shape[1] - 1 for w in params), params[-1].shape[0]), activation="tanh")
    optimizer, rng = PRESETS[preset](), np.random.default_rng(1)
    held: dict[str, Any] = {"params": params, "state": optimizer.init(net, params)}

    def step(rows: np.ndarray) -> None:
        held["params"], held["state"], _ = optimizer.step(net, held["params"], held["state"], rows, rows, rng)

    print(json.dumps(follow(step, lambda: float(net.loss(held["params"], x, x)), x, steps)))


# ------------------------------------------------------------------------------------- race


def race(
    images: Path, interpreter: str, presets: list[str], steps: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Every contestant in a process of its own, one after another, `rounds` times."""
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "examples")]
    import autoencoder

    import natgrad_array as ng

    x, _, sizes = autoencoder.load(images)
    params = ng.networks.MLP(sizes, activation="tanh").init(0, like=x)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "problem.npz"
        np.savez(problem, x=x, **{f"params_{i}": w for i, w in enumerate(params)})
        for _ in range(rounds):
            for name, python in (("kfac-jax", interpreter), *((preset, sys.executable) for preset in presets)):
                command = [python, str(HERE), "--worker", name, "--problem", str(problem), "--steps", str(steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
                last = found[name][-1]
                print(f"{name}: {last['seconds'][-1]:.1f} s, training loss {last['train'][-1]:.2f}", flush=True)
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """When each reached the peer's last training loss, in medians over rounds."""

    def median(name: str, key: str, place: int) -> float:
        return statistics.median(record[key][place] for record in found[name])

    goal, limit = median("kfac-jax", "train", -1), median("kfac-jax", "seconds", -1)
    lines = [f"kfac-jax: training loss {goal:.2f} after {found['kfac-jax'][0]['step'][-1]} steps and {limit:.1f} s"]
    for name in (name for name in found if name != "kfac-jax"):
        reached = [_reached(record, goal) for record in found[name]]
        steps, seconds = (statistics.median(values) for values in zip(*reached, strict=True))
        lines.append(f"{name}: there after {steps:g} steps and {seconds:.1f} s, {seconds / limit:.2f} of its time")
    return "\n".join(lines)


def _reached(record: dict[str, Any], goal: float) -> tuple[float, float]:
    """Steps and seconds to a training loss, infinite where it was not reached."""
    for step, seconds, loss in zip(record["step"], record["seconds"], record["train"], strict=True):
        if loss <= goal:
            return step, seconds
    return float("inf"), float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="IDX file of images")
    parser.add_argument("--peer", default=sys.executable, help="Python interpreter that has kfac-jax")
    parser.add_argument("--presets", nargs="+", default=["kfac", "ekfac", "natural_gradient"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--problem", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "kfac-jax":
        peer(options.problem, options.steps)
    elif options.worker:
        ours(options.problem, options.steps, options.worker)
    else:
        found = race(options.images, options.peer, options.presets, options.steps, options.rounds)
        if options.json:
            options.json.write_text(json.dumps(found), encoding="utf-8")
        print(report(found))


if __name__ == "__main__":
    main()
