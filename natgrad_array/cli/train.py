"""`natgrad-array train`: an ensemble of networks learns images by any preset."""

from __future__ import annotations

import csv
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from natgrad_array import _arrays
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.idx import read_idx
from natgrad_array.cli.libraries import Backend
from natgrad_array.cli.output import DASH, quantiles
from natgrad_array.networks import MLP, Network
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.presets import PRESETS

Host = np.ndarray[Any, Any]

TASKS = ("autoencoder", "classify")
FIGURE, ARRAYS, HISTORY = "train.png", "train.npz", "history.csv"


class Images(NamedTuple):
    """Images as rows of pixels, with their labels where they have any."""

    name: str
    pixels: Host
    labels: Host | None


class Split(NamedTuple):
    """What is learned, and what is held back: inputs and targets of both."""

    x: Host
    y: Host
    test_x: Host
    test_y: Host


def load(images: Path | None, labels: Path | None) -> Images:
    """Read IDX files, or take scikit-learn's digits."""
    if images is None:
        if labels is not None:
            raise CommandError("--labels needs --data: the digits that come without a file have labels of their own")
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))
        return Images("scikit-learn's digits", bunch.data[order], bunch.target[order])
    pixels = read_idx(images, "--data", ndim=3)
    classes = None if labels is None else read_idx(labels, "--labels", ndim=1)
    if classes is not None and len(classes) != len(pixels):
        raise CommandError(f"--labels must hold one label for each of {len(pixels)} images, got {len(classes)}")
    return Images(images.name, pixels.reshape(len(pixels), -1).astype(np.float64), classes)


def split(images: Images, task: str, dtype: str) -> Split:
    """Pixels minus the mean image over one standard deviation, the last tenth held back."""
    if task == "classify" and images.labels is None:
        raise CommandError("--task classify needs --labels")
    count = len(images.pixels)
    if count < 10:
        raise CommandError(f"--data must hold at least 10 images, got {count}")
    x = images.pixels - images.pixels.mean(axis=0)
    deviation = x.std()
    if not deviation > 0.0:
        raise CommandError("--data: all images are the same, so there is nothing to learn from")
    x = (x / deviation).astype(dtype)
    y = x if task == "autoencoder" or images.labels is None else images.labels.astype(np.int64)
    cut = count - count // 10
    return Split(x[:cut], y[:cut], x[cut:], y[cut:])


def make_network(samples: Split, task: str, hidden: tuple[int, ...], activation: str) -> Network:
    """The network between the pixels and what is asked of it."""
    n = int(samples.x.shape[-1])
    if task == "autoencoder":
        return MLP((n, *hidden, n), activation=activation)
    classes = 1 + int(max(samples.y.max(), samples.test_y.max()))
    return MLP((n, *hidden, max(classes, 2)), activation=activation, likelihood="categorical")


def check_size(net: Network, members: int) -> None:
    """Refuse what no machine can address; NumPy says itself what only this one cannot hold."""
    count = members * sum(math.prod(layer.parameter_shape) for layer in net.layers)
    if 8 * count > sys.maxsize:
        size = f"1e{math.floor(math.log10(count))}"
        raise CommandError(f"--hidden and --members ask for more parameters than can be addressed: {size}")


def make_optimizer(preset: str, learning_rate: float | None, damping: float | None) -> Optimizer:
    """A preset with the options that it has."""
    options = {"learning_rate": learning_rate, "damping": damping}
    given = {name: value for name, value in options.items() if value is not None}
    make = PRESETS[preset]
    known = inspect.signature(make).parameters
    for name in given:
        if name not in known:
            raise CommandError(f"--{name.replace('_', '-')} is none of the options of the preset {preset}")
    for name, value in given.items():
        if not (value >= 0.0 and math.isfinite(value)):
            raise CommandError(f"--{name.replace('_', '-')} must be at least 0 and finite, got {value:g}")
    return make(**given)


@dataclass
class History:
    """What a run leaves behind, record by record; members on the last axis.

    Attributes
    ----------
    step, seconds
        When a record was made; seconds are those of steps alone.
    train, test
        Loss of the last batch before its step, and of what was held back.
    damping
        Of each member.
    finished
        False after an interruption.
    params, params_step
        The last parameters, and the step they come from; after an interruption that may be
        later than the last record.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train: list[Host] = field(default_factory=list)
    test: list[Host] = field(default_factory=list)
    damping: list[Host] = field(default_factory=list)
    finished: bool = True
    params: tuple[Host, ...] = ()
    params_step: int = 0


def train(
    net: Network,
    optimizer: Optimizer,
    samples: Split,
    place: Backend,
    *,
    members: int,
    steps: int,
    batch: int,
    every: int,
    seed: int,
    tick: Callable[[float], None],
) -> History:
    """Train an ensemble; an interruption ends it, and what was computed is kept."""
    rng = np.random.default_rng(seed)
    x, y, test_x, test_y = (placed(place, array) for array in samples)
    params = net.init(rng, (members,), like=x)
    state = optimizer.init(net, params)
    history, order, seconds = History(), np.arange(0), 0.0

    def record(step: int, loss: Any, damping: Any) -> None:
        # All that can be interrupted comes first, so that a record is whole or missing.
        row = _host(loss), _host(net.loss(params, test_x, test_y)), _host(damping)
        history.step.append(step)
        history.seconds.append(seconds)
        for kept, values in zip((history.train, history.test, history.damping), row, strict=True):
            kept.append(values)

    record(0, net.loss(params, x[:batch, ...], y[:batch, ...]), state.damping)
    try:
        for step in range(1, steps + 1):
            if len(order) < min(batch, len(samples.x)):
                order = rng.permutation(len(samples.x))
            chosen, order = order[:batch], order[batch:]
            inputs, targets = (placed(place, array[chosen]) for array in (samples.x, samples.y))
            start = time.perf_counter()
            params, state, info = optimizer.step(net, params, state, inputs, targets, rng)
            history.params_step = step
            loss = _host(info.loss)
            seconds += time.perf_counter() - start
            if step % every == 0 or step == steps:
                record(step, info.loss, state.damping)
            tick(float(np.median(loss)))
    except KeyboardInterrupt:
        history.finished = False
        # A signal may still fall between two of the lists.
        whole = len(history.damping)
        for kept in (history.step, history.seconds, history.train, history.test):
            del kept[whole:]
    history.params = tuple(_host(w) for w in params)
    return history


def placed(place: Backend, array: Host) -> Any:
    """An array on the backend, which makes everything floating: classes back to integers."""
    placed = place.asarray(array)
    xp = _arrays.namespace(placed)
    return placed if array.dtype.kind == "f" else xp.astype(placed, xp.int32)


def _host(array: Any) -> Host:
    return np.array(_arrays.to_numpy(array))


# ------------------------------------------------------------------------- what is left behind


def table(history: History, preset: str) -> Table:
    """Loss at the start, at its lowest and at the end."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("loss", "start", "lowest", "end", "5–95 % at the end"):
        result.add_column(name, justify="left" if name == "loss" else "right", no_wrap=True)
    for name, values in (("batch", np.stack(history.train)), ("held back", np.stack(history.test))):
        medians = [found[0] if (found := quantiles(row)) else np.nan for row in values]
        low_high = quantiles(values[-1])
        result.add_row(
            f"{preset}, {name}",
            f"{medians[0]:.4g}",
            f"{np.nanmin(medians):.4g}" if np.isfinite(medians).any() else DASH,
            f"{medians[-1]:.4g}" if low_high else DASH,
            f"{low_high[1]:.4g}–{low_high[2]:.4g}" if low_high else DASH,
        )
    return result


def diverged(history: History) -> str:
    """How many losses are not finite any more, and by which record; empty where all are."""
    finite = np.isfinite(np.stack(history.train)) & np.isfinite(np.stack(history.test))
    bad = ~finite.all(axis=0)
    if not bad.any():
        return ""
    by = history.step[int(np.max(np.argmin(finite, axis=0)[bad]))]
    return f"{np.count_nonzero(bad)} of {bad.size} networks diverged by step {by}"


def lost(history: History, preset: str) -> str:
    """What went wrong, and what to try."""
    if said := diverged(history):
        known = inspect.signature(PRESETS[preset]).parameters
        options = {"learning_rate": "a smaller --learning-rate", "damping": "a larger --damping"}
        said += f"; try {' or '.join(text for name, text in options.items() if name in known)}."
    return said


def classified(net: Network, params: tuple[Host, ...], samples: Split) -> str:
    """How many of the images held back each network puts in their class."""
    share = 100.0 * np.mean(net.output(params, samples.test_x).argmax(axis=-1) == samples.test_y, axis=-1)
    return (
        f"Held back and classified right: {np.median(share):.1f} % in the median, {share.min():.1f}–{share.max():.1f}."
    )


def write(folder: Path, history: History, about: dict[str, Any], title: str) -> list[Path]:
    """Write the parameters and the history as plain arrays, the history as a table too, and a figure."""
    arrays: dict[str, Host] = {
        "step": np.asarray(history.step),
        "seconds": np.asarray(history.seconds),
        "train_loss": np.stack(history.train),
        "test_loss": np.stack(history.test),
        "damping": np.stack(history.damping),
        "finished": np.asarray(history.finished),
        "params_step": np.asarray(history.params_step),
    }
    arrays |= {f"params_{i}": w for i, w in enumerate(history.params)}
    arrays |= {key: np.asarray(value) for key, value in about.items()}
    paths = [folder / name for name in (FIGURE, ARRAYS, HISTORY)]
    try:
        np.savez_compressed(paths[1], **arrays)  # type: ignore[arg-type, unused-ignore]
        with paths[2].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "seconds", "member", "train_loss", "test_loss", "damping"))
            for k, step in enumerate(history.step):
                for member in range(len(history.train[k])):
                    values = (history.train[k][member], history.test[k][member], history.damping[k][member])
                    writer.writerow((step, f"{history.seconds[k]:.4f}", member, *(f"{v:.8g}" for v in values)))
        _draw(history, paths[0], title)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written: {error.strerror or error}") from error
    return paths


def _draw(history: History, path: Path, title: str) -> None:
    """Loss of each member, thin, and the median, against steps and against seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    times = np.asarray(history.step), np.asarray(history.seconds)
    for panel, axis, label in zip(panels, times, ("steps", "seconds of steps"), strict=True):
        for name, values, colour, dash in (
            ("batch", np.stack(history.train), "#E69F00", "--"),
            ("held back", np.stack(history.test), "#0072B2", "-"),
        ):
            lines = panel.plot(axis, values, color=colour, linestyle=dash, linewidth=0.7, alpha=0.5)
            lines[0].set_label(f"{name}, each network")
            medians = [found[0] if (found := quantiles(row)) else np.nan for row in values]
            # A line of one point is none.
            marker = "o" if np.count_nonzero(np.isfinite(medians)) < 3 else ""
            panel.plot(
                axis, medians, color=colour, linestyle=dash, linewidth=2.0, marker=marker, label=f"{name}, median"
            )
        panel.set_xlabel(label)
        # All of it, whatever of it has a loss.
        panel.set_xlim(-0.04 * (axis[-1] or 1.0), 1.04 * (axis[-1] or 1.0))
        panel.set_yscale("log")
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    panels[0].set_ylabel("loss, nats per sample")
    said = diverged(history)
    figure.suptitle(f"{title}\n{said}" if said else title, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=150)
