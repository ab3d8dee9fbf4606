"""NET 1, 2 and 3 of Bernacchia, Lengyel and Hennequin (2018): deep linear networks that learn a random teacher.

Eight seeds of a network are one ensemble: teachers, data and students on the leading axis.

    python examples/nets.py --out nets
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import natgrad_array as ng


class Net(NamedTuple):
    """An experiment.

    Attributes
    ----------
    sizes : tuple of int
        Widths of teacher and student.
    floor : float
        The teacher's own loss: half the variance of its noise, summed over outputs.
    steps : int
        In how many of them the floor is to be reached.
    """

    sizes: tuple[int, ...]
    floor: float
    steps: int


NETS = {
    "NET 1": Net((20,) * 17, 1e-5, 80),
    "NET 2": Net((*range(20, 101, 10), *range(90, 19, -10)), 1e-5, 40),
    "NET 3": Net((200, 80, 34, 20, 10, 5, 2, 5, 10, 20, 34, 80, 200), 1e-4, 160),
}
NOISE = 0.001


def data(
    net: ng.networks.Network, sizes: tuple[int, ...], rng: np.random.Generator, seeds: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a spectrum 1e-3 + exp(−5k/n) in random directions, and a random teacher's noisy answers."""
    n = sizes[0]
    power = 1e-3 + np.exp(-5.0 * np.arange(n) / n)
    power *= n / power.sum()
    basis = np.linalg.qr(rng.standard_normal((seeds, n, n)))[0]
    x = (rng.standard_normal((seeds, samples, n)) * np.sqrt(power)) @ basis
    teacher = net.init(rng, (seeds,), like=x)
    clean = net.output(teacher, x)
    return x, clean + NOISE * rng.standard_normal(clean.shape)


def run(name: str, *, seeds: int, samples: int, batch: int, steps: int) -> np.ndarray:
    """Test loss of every member after each step, (steps + 1, seeds)."""
    sizes = NETS[name].sizes
    net = ng.networks.MLP(sizes, activation="identity")
    rng = np.random.default_rng(0)
    x, y = data(net, sizes, rng, seeds, samples + 1000)
    test_x, test_y = x[:, samples:], y[:, samples:]
    params = net.init(rng, (seeds,), like=x)
    optimizer = ng.optimizers.natural_gradient(damping=0.01)
    state = optimizer.init(net, params)
    losses, order = [net.loss(params, test_x, test_y)], np.arange(0)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(samples)
        chosen, order = order[:batch], order[batch:]
        params, state, _ = optimizer.step(net, params, state, x[:, chosen], y[:, chosen], rng)
        losses.append(net.loss(params, test_x, test_y))
    return np.stack(losses)


def reached(losses: np.ndarray, floor: float) -> np.ndarray:
    """The first step of each member within 5 % of the teacher's floor; one beyond the last where there is none."""
    within = losses <= 1.05 * floor
    return np.where(within.any(axis=0), within.argmax(axis=0), len(losses))


def draw(histories: dict[str, np.ndarray], path: Path) -> None:
    """Test loss of all members, and the teacher's floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(histories), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(histories), squeeze=False)[0]
    for panel, (name, losses) in zip(panels, histories.items(), strict=True):
        panel.plot(losses, color="#0072B2", linewidth=0.7, alpha=0.6)
        panel.plot(np.median(losses, axis=1), color="black", linewidth=1.8, label="median")
        panel.axhline(NETS[name].floor, color="#E69F00", linestyle="--", linewidth=1.8, label="the teacher's own loss")
        panel.set_yscale("log")
        panel.set_title(f"{name}: {len(NETS[name].sizes) - 1} layers, {losses.shape[1]} seeds")
        panel.set_xlabel("steps")
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.5)
    panels[0].set_ylabel("test loss")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nets"), help="folder for the figure and the losses")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--quick", action="store_true", help="two seeds, few samples and steps of NET 1")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    histories = {}
    for name in ["NET 1"] if options.quick else options.nets:
        net = NETS[name]
        start = time.perf_counter()
        if options.quick:
            losses = run(name, seeds=2, samples=400, batch=200, steps=5)
        else:
            losses = run(name, seeds=options.seeds, samples=10_000, batch=1000, steps=net.steps * 5 // 4)
        histories[name] = losses
        first = reached(losses, net.floor)
        print(
            f"{name}: within 5 % of the floor {net.floor:g} after {', '.join(map(str, sorted(first)))} steps, "
            f"median {np.median(first):g} (at most {net.steps} are asked for); {time.perf_counter() - start:.0f} s"
        )
        np.savez(options.out / "nets.npz", **{key.replace(" ", "_"): value for key, value in histories.items()})
    draw(histories, options.out / "nets.png")
    print(f"Written: {options.out / 'nets.png'}, {options.out / 'nets.npz'}")


if __name__ == "__main__":
    main()
