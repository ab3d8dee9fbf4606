"""NET 1, 2 and 3 of Bernacchia, Lengyel and Hennequin (2018): deep linear networks that learn a random teacher.

Eight seeds of a network are one ensemble: teachers, data and students on the leading axis.
Natural gradient takes batches of 1000; gradient descent, from the same parameters, 20 000 steps
on batches of 20, which is most of the example's few minutes: ``--sgd-steps 0`` leaves it out.

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
#: Of gradient descent: from these parameters some seeds diverge with larger ones.
RATES = {"NET 1": 0.001, "NET 2": 0.001, "NET 3": 0.0001}


class Losses(NamedTuple):
    """Test losses of a run.

    Attributes
    ----------
    steps : array, shape (K,)
        After how many steps.
    losses : array, shape (K, seeds)
        Of every member.
    """

    steps: np.ndarray
    losses: np.ndarray


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


def run(
    name: str, optimizer: ng.optimizers.Optimizer, *, seeds: int, samples: int, batch: int, steps: int, every: int = 1
) -> Losses:
    """Train an ensemble; the same data and the same parameters to start from for every optimizer."""
    sizes = NETS[name].sizes
    net = ng.networks.MLP(sizes, activation="identity")
    rng = np.random.default_rng(0)
    x, y = data(net, sizes, rng, seeds, samples + 1000)
    test_x, test_y = x[:, samples:], y[:, samples:]
    params = net.init(rng, (seeds,), like=x)
    state = optimizer.init(net, params)
    noted, losses, order = [0], [net.loss(params, test_x, test_y)], np.arange(0)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.permutation(samples)
        chosen, order = order[:batch], order[batch:]
        params, state, _ = optimizer.step(net, params, state, x[:, chosen], y[:, chosen], rng)
        if step % every == 0:
            noted.append(step)
            losses.append(net.loss(params, test_x, test_y))
    return Losses(np.asarray(noted), np.stack(losses))


def reached(losses: np.ndarray, floor: float) -> np.ndarray:
    """The first step of each member within 5 % of the teacher's floor; one beyond the last where there is none."""
    within = losses <= 1.05 * floor
    return np.where(within.any(axis=0), within.argmax(axis=0), len(losses))


def draw(histories: dict[str, dict[str, Losses]], path: Path) -> None:
    """Test loss of all members, and the teacher's floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(histories), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(histories), squeeze=False)[0]
    for panel, (name, found) in zip(panels, histories.items(), strict=True):
        for (label, (steps, losses)), colour in zip(found.items(), ("#0072B2", "#D55E00"), strict=False):
            panel.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.4)
            panel.plot(steps, np.median(losses, axis=1), color=colour, linewidth=2.0, label=f"{label}, median")
        panel.axhline(NETS[name].floor, color="black", linestyle="--", linewidth=1.5, label="the teacher's own loss")
        panel.set_yscale("log")
        panel.set_xscale("symlog", linthresh=10)
        panel.set_xlim(left=0)
        panel.set_title(f"{name}: {len(NETS[name].sizes) - 1} layers, {losses.shape[1]} seeds")
        panel.set_xlabel("steps")
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.5)
    panels[0].set_ylabel("test loss")
    panels[-1].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nets"), help="folder for the figure and the losses")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--sgd-steps", type=int, default=20_000, help="steps of gradient descent; 0 for none")
    parser.add_argument("--quick", action="store_true", help="two seeds, few samples and steps of NET 1")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    names, seeds, samples, sgd_steps = options.nets, options.seeds, 10_000, options.sgd_steps
    if options.quick:
        names, seeds, samples, sgd_steps = ["NET 1"], 2, 400, 20
    histories: dict[str, dict[str, Losses]] = {}
    for name in names:
        net, start = NETS[name], time.perf_counter()
        natural = run(
            name,
            ng.optimizers.natural_gradient(damping=0.01),
            seeds=seeds,
            samples=samples,
            batch=200 if options.quick else 1000,
            steps=5 if options.quick else net.steps * 5 // 4,
        )
        histories[name] = {"natural gradient": natural}
        first = reached(natural.losses, net.floor)
        print(
            f"{name}: within 5 % of the floor {net.floor:g} after {', '.join(map(str, sorted(first)))} steps, "
            f"median {np.median(first):g} (at most {net.steps} are asked for); {time.perf_counter() - start:.0f} s"
        )
        if sgd_steps:
            start = time.perf_counter()
            sgd = run(
                name,
                ng.optimizers.sgd(learning_rate=RATES[name]),
                seeds=seeds,
                samples=samples,
                batch=20,
                steps=sgd_steps,
                every=max(1, sgd_steps // 200),
            )
            histories[name]["gradient descent"] = sgd
            last = sorted(sgd.losses[-1])
            print(
                f"{name}: gradient descent, rate {RATES[name]:g}: test loss {last[0]:.2g} to {last[-1]:.2g} after "
                f"{sgd_steps} steps, median {np.median(last):.2g}; {time.perf_counter() - start:.0f} s"
            )
        arrays = {
            f"{key}, {label}, {what}".replace(" ", "_"): value
            for key, found in histories.items()
            for label, losses in found.items()
            for what, value in losses._asdict().items()
        }
        np.savez(options.out / "nets.npz", **arrays)
    draw(histories, options.out / "nets.png")
    print(f"Written: {options.out / 'nets.png'}, {options.out / 'nets.npz'}")


if __name__ == "__main__":
    main()
