"""Train a deep autoencoder by natural gradient, K-FAC and others: test loss against steps and seconds.

With an IDX file of images (MNIST's format) this is the experiment of Bernacchia, Lengyel and
Hennequin (2018), figure 3: 784-400-200-100-50-100-200-400-784, tanh, linear outputs, squared
loss, batches of 1000 for all (there SGD has batches of 20). Without one it is a smaller network
on scikit-learn's digits.

    python examples/autoencoder.py --images t10k-images-idx3-ubyte.gz --out autoencoder
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import natgrad_array as ng
from natgrad_array.cli.idx import read_idx
from natgrad_array.optimizers.presets import PRESETS

#: Presets that need a learning rate for this network, and the best of a few tried.
OPTIONS = {
    "sgd": {"learning_rate": 0.002, "momentum": 0.9},
    "adam": {"learning_rate": 1e-3},
    "foof": {"learning_rate": 0.03, "damping": 0.03},
}
NAMES = ("natural_gradient", "kfac", "ekfac", "foof", "adam", "sgd")


def load(images: Path | None) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Training and test images, and the widths of a network for them."""
    if images is None:
        from sklearn.datasets import load_digits

        pixels, sizes = load_digits().data, (64, 32, 16, 8, 16, 32, 64)
    else:
        pixels = read_idx(images, "--images", ndim=3)
        pixels = pixels.reshape(len(pixels), -1) / 255.0
        sizes = (784, 400, 200, 100, 50, 100, 200, 400, 784)
    pixels = np.random.default_rng(0).permutation(pixels) if images is None else pixels
    x = pixels - pixels.mean(axis=0)
    x = (x / x.std()).astype(np.float32)
    cut = len(x) - len(x) // 10
    return x[:cut], x[cut:], sizes


def train(
    name: str, train_x: np.ndarray, test_x: np.ndarray, sizes: tuple[int, ...], *, steps: int, batch: int, seed: int
) -> dict[str, list[float]]:
    """One run; the time is that of steps alone."""
    net = ng.networks.MLP(sizes, activation="tanh")
    rng = np.random.default_rng(seed)
    params = net.init(rng, like=train_x)
    optimizer = PRESETS[name](**OPTIONS.get(name, {}))
    state = optimizer.init(net, params)
    history: dict[str, list[float]] = {"step": [0], "seconds": [0.0], "test": [float(net.loss(params, test_x, test_x))]}
    history |= {"train": [float(net.loss(params, train_x, train_x))], "batch": []}
    seconds, order = 0.0, np.arange(0)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.permutation(len(train_x))
        chosen, order = train_x[order[:batch]], order[batch:]
        start = time.perf_counter()
        params, state, info = optimizer.step(net, params, state, chosen, chosen, rng)
        seconds += time.perf_counter() - start
        history["batch"].append(float(info.loss))
        if step <= 20 or step % 10 == 0:
            history["step"].append(step)
            history["seconds"].append(seconds)
            history["test"].append(float(net.loss(params, test_x, test_x)))
            history["train"].append(float(net.loss(params, train_x, train_x)) if step % 50 == 0 else float("nan"))
    return history


def draw(histories: dict[str, dict[str, list[float]]], path: Path, title: str) -> None:
    """Test loss against steps and against seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    colours = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#555555", "#56B4E9")
    dashes = ("-", "--", "-.", (0, (3, 1, 1, 1)), ":", (0, (5, 1)))
    for (name, history), colour, dash in zip(histories.items(), colours, dashes, strict=False):
        for panel, axis in zip(panels, ("step", "seconds"), strict=True):
            panel.plot(history[axis], history["test"], color=colour, linestyle=dash, linewidth=1.8, label=name)
    for panel, label in zip(panels, ("steps", "seconds of steps"), strict=True):
        panel.set_yscale("log")
        panel.set_xlabel(label)
        panel.grid(visible=True, which="both", color="#DDDDDD", linewidth=0.5)
    panels[0].set_ylabel("test loss: half the squared error of an image")
    panels[1].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="IDX file of images; scikit-learn's digits without one")
    parser.add_argument("--out", type=Path, default=Path("autoencoder"), help="folder for the figure and the numbers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=NAMES)
    parser.add_argument("--quick", action="store_true", help="a few steps of a few presets")
    options = parser.parse_args(arguments)
    train_x, test_x, sizes = load(options.images)
    steps, names = (15, ("natural_gradient", "adam")) if options.quick else (options.steps, options.presets)
    options.out.mkdir(parents=True, exist_ok=True)
    histories = {}
    for name in names:
        history = train(name, train_x, test_x, sizes, steps=steps, batch=options.batch, seed=options.seed)
        histories[name] = history
        at = {step: history["test"][history["step"].index(step)] for step in (10, 20, 50, 100, 200) if step <= steps}
        lowest = min(history["test"])
        said = ", ".join(f"{loss:.1f} at {step}" for step, loss in at.items())
        print(f"{name:18s} test loss {said}; lowest {lowest:.1f}; {1e3 * history['seconds'][-1] / steps:.0f} ms a step")
        (options.out / "autoencoder.json").write_text(json.dumps(histories), encoding="utf-8")
    data = "scikit-learn's digits" if options.images is None else f"{len(train_x)} images"
    draw(histories, options.out / "autoencoder.png", f"Autoencoder {'-'.join(map(str, sizes))} on {data}")
    print(f"Written: {options.out / 'autoencoder.png'}, {options.out / 'autoencoder.json'}")


if __name__ == "__main__":
    main()
