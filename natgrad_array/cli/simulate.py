"""`natgrad-array simulate`: a sweep over deep linear networks, and what it leaves behind."""

from __future__ import annotations

import csv
import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from natgrad_array import deep_linear as dl
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.libraries import Backend
from natgrad_array.cli.output import DASH, LABELS, SPREAD, quantiles
from natgrad_array.cli.sweep import Sweep
from natgrad_array.simulation import CheckpointError, Groups, History, simulate_groups

Host = np.ndarray[Any, Any]

FIGURE, STORE, SUMMARY, FILE, CHECKPOINT = "sweep.png", "sweep.zarr", "summary.csv", "sweep.toml", "checkpoint"
ROWS = 40
"""The longest table that is printed."""
PANELS = 9
READ_BYTES = 2**27
"""About so much of a store is looked at together."""

# Colours that stay apart for colour-blind eyes; dashes tell learning rates apart.
COLOURS = {
    "layerwise": "#E69F00",
    "exact": "#0072B2",
    "moore_penrose": "#009E73",
    "block_diagonal": "#CC79A7",
    "gradient": "#555555",
}
DASHES = ("-", "--", "-.", ":")


class Start:
    """Where the networks of a group start: the same for each seed, whatever else differs.

    Parameters
    ----------
    sweep : Sweep
        The grid.
    sizes : tuple of int
        Widths of the layers.
    place : Backend
        Where the arrays go.
    """

    def __init__(self, sweep: Sweep, sizes: tuple[int, ...], place: Backend) -> None:
        self.sweep, self.sizes, self.place = sweep, sizes, place

    def __call__(self, start: int, stop: int) -> tuple[Any, ...]:
        """Weights of the members from the first to before the second."""
        sweep = self.sweep
        _, scale, seed = np.unravel_index(np.arange(start, stop), sweep.batch)
        seeds, places = np.unique(seed, return_inverse=True)
        drawn = [self.draw(int(one)) for one in seeds]
        # The scale is that of a layer, or of the product of a balanced network's layers.
        power = 1.0 if sweep.init in ("gaussian", "orthogonal") else 1.0 / (len(self.sizes) - 1)
        factor = (np.asarray(sweep.initial_scale)[scale] ** power)[:, None, None]
        layers = zip(*drawn, strict=True)
        return tuple(self.place.asarray(np.stack(layer)[places] * factor) for layer in layers)

    def draw(self, seed: int) -> tuple[Host, ...]:
        """One network of scale 1."""
        like, sweep = np.empty(0), self.sweep
        if sweep.init == "gaussian":
            return dl.gaussian(seed, self.sizes, like=like)
        if sweep.init == "orthogonal":
            return dl.orthogonal(seed, self.sizes, like=like)
        if sweep.init == "balanced":
            return dl.balanced(seed, self.sizes, like=like)
        modes = len(sweep.singular_values)
        product = np.eye(sweep.outputs)[:, :modes] @ np.eye(sweep.inputs)[:modes]
        return dl.balanced(seed, self.sizes, like=like, end_to_end=product)


def run(sweep: Sweep, place: Backend, folder: Path, *, resume: bool, progress: bool) -> Groups:
    """Run a sweep, or go on with it.

    Raises
    ------
    CommandError
        If the folder holds another run, or one that only `--resume` goes on with.
    KeyboardInterrupt
        After a checkpoint was made.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise CommandError(f"{folder} holds a run of a sweep: --resume goes on with it, --out takes another folder")
    if resume and not checkpoint.exists():
        raise CommandError(f"--resume: there is no checkpoint in {folder}")
    modes = len(sweep.singular_values)
    left, right = (place.asarray(np.eye(n)[:, :modes]) for n in (sweep.outputs, sweep.inputs))
    task = dl.GaussianTask.from_modes(left, place.asarray(np.asarray(sweep.singular_values)), right)
    noisy = sweep.temperature is not None or sweep.label_noise is not None
    names = sweep.record if "excess_loss" in sweep.record else (*sweep.record, "excess_loss")
    groups = {
        key: {"weights": Start(sweep, sweep.sizes(*key[1:]), place), "rule": key[0], "record": _recorded(names, key[1])}
        for key in sweep.groups
    }
    try:
        return simulate_groups(
            groups,
            task,
            names=("rule", "depth", "width"),
            store=folder / STORE,
            checkpoint=checkpoint,
            progress=progress,
            members=sweep.batch,
            learning_rate=place.asarray(np.asarray(sweep.learning_rate)[:, None, None]),
            steps=sweep.steps,
            integrator=sweep.integrator,
            record_at=sweep.recorded,
            freeze_converged=sweep.freeze_converged,
            temperature=sweep.temperature,
            label_noise=sweep.label_noise,
            rng=sweep.noise_seed if noisy else None,
            axes={
                "learning_rate": sweep.learning_rate,
                "initial_scale": sweep.initial_scale,
                "seed": range(sweep.seeds),
            },
            max_bytes=sweep.max_bytes,
        )
    except (CheckpointError, FileExistsError, ModuleNotFoundError) as error:
        raise CommandError(str(error).replace("choose another path", "--out takes another folder")) from error
    except (TypeError, ValueError) as error:
        raise CommandError(f"this sweep cannot be run: {error}") from error


def _recorded(names: tuple[str, ...], depth: int) -> tuple[str, ...]:
    return tuple(name for name in names if name != "balancedness" or depth > 1)


# ------------------------------------------------------------------------- what is left behind


class Row(NamedTuple):
    """Networks that differ in their seeds alone."""

    rule: str
    depth: int
    width: int
    learning_rate: float
    initial_scale: float
    members: int
    diverged: int
    converged: int
    excess_loss: tuple[float, float, float] | None
    """Median and the ends of the spread at the last step, of members that have not diverged."""


def rows(sweep: Sweep, found: Groups) -> list[Row]:
    """The summary, in the order of the grid."""
    result = []
    for (rule, depth, width), history in found.items():
        last = np.asarray(history.records["excess_loss"][-1])
        for i, j in np.ndindex(*sweep.batch[:2]):
            diverged, converged = (np.count_nonzero(flags[i, j]) for flags in (history.diverged, history.converged))
            result.append(
                Row(
                    rule,
                    depth,
                    width,
                    sweep.learning_rate[i],
                    sweep.initial_scale[j],
                    sweep.seeds,
                    int(diverged),
                    int(converged),
                    quantiles(last[i, j]),
                )
            )
    return result


def table(summary: list[Row]) -> Table:
    """The first rows of the summary."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    names = ("rule", "depth", "width", "learning rate", "initial scale", "seeds", "diverged", "excess loss", "5–95 %")
    for name in names:
        result.add_column(name, justify="left" if name == "rule" else "right", no_wrap=True)
    for row in summary[:ROWS]:
        loss = row.excess_loss
        result.add_row(
            LABELS.get(row.rule, row.rule),
            str(row.depth),
            str(row.width),
            f"{row.learning_rate:g}",
            f"{row.initial_scale:g}",
            str(row.members),
            str(row.diverged),
            f"{loss[0]:.2e}" if loss else DASH,
            f"{loss[1]:.1e}–{loss[2]:.1e}" if loss else DASH,
        )
    return result


def write(folder: Path, path: Path, sweep: Sweep, found: Groups, summary: list[Row]) -> list[Path]:
    """Write the summary and the figure beside the store, and keep the sweep file with them."""
    paths = [folder / name for name in (STORE, FIGURE, SUMMARY, FILE)]
    try:
        with paths[2].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*Row._fields[:-1], "excess_loss_median", "excess_loss_5%", "excess_loss_95%"))
            for row in summary:
                writer.writerow((*row[:-1], *(f"{value:.8g}" for value in row.excess_loss or ())))
        if path.resolve() != paths[3].resolve():
            shutil.copyfile(path, paths[3])
        _draw(paths[1], sweep, found)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written: {error.strerror or error}") from error
    return paths


def _medians(history: History) -> Host:
    """Median and ends of the spread of the excess loss over scales and seeds: (3, records, learning rates)."""
    array, parts = history.records["excess_loss"], []
    each = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize)
    step = max(1, READ_BYTES // each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # records of which all members have diverged
        for begin in range(0, array.shape[0], step):
            values = np.asarray(array[begin : begin + step])
            values = values.reshape(*values.shape[:2], -1)
            parts.append(np.nanquantile(values, [0.5, *SPREAD], axis=-1))
    return np.concatenate(parts, axis=1)


def _draw(path: Path, sweep: Sweep, found: Groups) -> None:
    """Excess loss against steps, one panel for each depth and width, a colour for each rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(key[1:] for key in found))
    columns = min(len(shapes), 3)
    lines = -(-min(len(shapes), PANELS) // columns)
    figure = Figure(figsize=(max(4.0 * columns, 6.5), 3.4 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    shown = sweep.learning_rate
    if len(shown) > len(DASHES):
        shown = tuple(shown[k] for k in np.linspace(0, len(shown) - 1, len(DASHES)).astype(int))
    for panel, (depth, width) in zip(panels.flat, shapes, strict=False):
        for rule in sweep.rule:
            history = found[rule, depth, width]
            median, low, high = _medians(history)
            for rate, dash in zip(shown, DASHES, strict=False):
                k = sweep.learning_rate.index(rate)
                curves = _drawable(median[:, k], low[:, k], high[:, k])
                panel.fill_between(history.steps, curves[1], curves[2], color=COLOURS[rule], alpha=0.15, linewidth=0)
                (line,) = panel.plot(history.steps, curves[0], color=COLOURS[rule], linestyle=dash, linewidth=1.8)
                name = LABELS.get(rule, rule.replace("_", " "))
                handles.setdefault(f"{name}, η = {rate:g}" if len(shown) > 1 else name, line)
        panel.set_xscale("symlog", linthresh=1.0)
        panel.set_yscale("log")
        panel.set_title(f"depth {depth}" + (f", width {width}" if depth > 1 else ""), fontsize=10)
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in itertools.islice(panels.flat, len(shapes), None):
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    for panel in panels[:, 0]:
        panel.set_ylabel("excess loss")
    count = len(found) * int(np.prod(sweep.batch))
    left_out = f"; {len(shapes) - PANELS} more shapes are in the store" if len(shapes) > PANELS else ""
    figure.suptitle(f"{count} deep linear networks: median and 5–95 % over scales and seeds{left_out}", fontsize=11)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=150)


def _drawable(*curves: Host) -> list[Host]:
    """What is above zero, and not far above where it began: members on the way to divergence."""
    most = 1e3 * curves[0][0]
    return [np.where((curve > 0.0) & (curve < most), curve, np.nan) for curve in curves]
