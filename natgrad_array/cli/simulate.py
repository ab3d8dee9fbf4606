"""`natgrad-array simulate`: a sweep over deep linear networks, and what it leaves behind."""

from __future__ import annotations

import csv
import shutil
import warnings
from collections.abc import Sequence
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
READ_BYTES = 2**27
"""About so much of a store is looked at together."""
SMALL = 1e-6
"""Excess loss that is small: the step that first reaches it is in the summary."""
FAR = 1e300
"""Stands for what is not finite, so that quantiles of members of which some diverged have a value."""
COLUMNS, LINES, SHAPES, RATES = 4, 6, 9, 3
"""Panels of the figure: columns and lines at most, shapes where there is one learning rate, learning rates."""

# Colours that stay apart for colour-blind eyes; width and markers say the same without colour, and show curves
# that lie upon each other. Dashes tell initial scales apart.
STYLES: dict[str, dict[str, Any]] = {
    "layerwise": {"color": "#E69F00", "linewidth": 4.0, "marker": ""},
    "exact": {"color": "#0072B2", "linewidth": 1.4, "marker": "o"},
    "moore_penrose": {"color": "#009E73", "linewidth": 1.4, "marker": "^"},
    "block_diagonal": {"color": "#CC79A7", "linewidth": 1.4, "marker": "D"},
    "gradient": {"color": "#555555", "linewidth": 1.4, "marker": "s"},
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (3, 1.5, 1, 1.5)), (0, (1, 1.5)))


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
    rose: int
    """How many ended above where they began, those that diverged apart."""
    steps_to_1e_6: float
    """Median of the first recorded step at which the excess loss is below it; Inf for members that are never there."""
    floor: float
    """Least excess loss of what has the rank of this width."""
    excess_loss: tuple[float, float, float] | None
    """Median and the ends of the spread at the last step, of members that have not diverged."""


class Course(NamedTuple):
    """The excess loss of a group over its steps."""

    curves: Host
    """Median and ends of the spread over seeds, (3, records, learning rates, scales); who diverged is above all."""
    reached: Host
    """The first recorded step at which it is small, of each member."""


def course(history: History) -> Course:
    """Look at the records of a group, part by part."""
    array, parts = history.records["excess_loss"], []
    reached = np.full(array.shape[1:], np.inf)
    each = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize)
    step = max(1, READ_BYTES // each)
    for begin in range(0, array.shape[0], step):
        values = np.asarray(array[begin : begin + step], dtype=np.float64)
        values = np.where(np.isfinite(values), np.minimum(values, FAR), FAR)
        parts.append(np.quantile(values, [0.5, *SPREAD], axis=-1))
        steps = np.asarray(history.steps[begin : begin + step], dtype=np.float64)[:, None, None, None]
        reached = np.minimum(reached, np.where(values < SMALL, steps, np.inf).min(axis=0))
    return Course(np.concatenate(parts, axis=1), reached)


def floor(sweep: Sweep, depth: int, width: int) -> float:
    """½ Σ s² over the teacher's modes that a network has no room for; inputs are white, the noise has unit size."""
    modes = sorted(sweep.singular_values, reverse=True)
    return 0.5 * sum(s**2 for s in modes[min(sweep.sizes(depth, width)) :])


def rows(sweep: Sweep, found: Groups, courses: dict[Any, Course]) -> list[Row]:
    """The summary, in the order of the grid."""
    result = []
    for (rule, depth, width), history in found.items():
        loss = history.records["excess_loss"]
        first, last = np.asarray(loss[0]), np.asarray(loss[-1])
        diverged, converged = np.asarray(history.diverged), np.asarray(history.converged)
        for i, j in np.ndindex(*sweep.batch[:2]):
            result.append(
                Row(
                    rule,
                    depth,
                    width,
                    sweep.learning_rate[i],
                    sweep.initial_scale[j],
                    sweep.seeds,
                    int(np.count_nonzero(diverged[i, j])),
                    int(np.count_nonzero(converged[i, j])),
                    int(np.count_nonzero(last[i, j] > first[i, j])),
                    float(np.median(courses[rule, depth, width].reached[i, j])),
                    floor(sweep, depth, width),
                    quantiles(last[i, j]),
                )
            )
    return result


def table(summary: list[Row]) -> Table:
    """The first rows of the summary."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        *("rule", "depth", "width", "rate", "scale"),
        *("diverged", "rose", "excess loss", "5–95 %", "to 1e-6"),
    ):
        result.add_column(name, justify="left" if name == "rule" else "right", no_wrap=True)
    for row in summary[:ROWS]:
        loss = row.excess_loss
        result.add_row(
            _label(row.rule),
            str(row.depth),
            str(row.width),
            f"{row.learning_rate:g}",
            f"{row.initial_scale:g}",
            str(row.diverged),
            str(row.rose),
            f"{loss[0]:.2e}" if loss else DASH,
            f"{loss[1]:.2e}–{loss[2]:.2e}" if loss else DASH,
            f"{row.steps_to_1e_6:g}" if np.isfinite(row.steps_to_1e_6) else DASH,
        )
    return result


def notes(sweep: Sweep, summary: list[Row]) -> list[str]:
    """How to read the table."""
    lines = [
        "rate, scale: learning rate, initial scale. diverged: not finite any more. "
        "rose: finite, and above where it began.",
        "excess loss: median and 5–95 % at the end, without those that diverged. to 1e-6: median of the first "
        f"recorded step below it, {DASH} where half of the networks are never there.",
    ]
    narrow = {min(sweep.sizes(row.depth, row.width)): row.floor for row in summary if row.floor}
    lines += [
        f"floor: networks with a layer of width {rank} have no more than rank {rank}; "
        f"the best of that rank is {least:.3g} above the optimum."
        for rank, least in narrow.items()
    ]
    return lines


def _label(rule: str) -> str:
    return LABELS.get(rule, rule.replace("_", " "))


def write(
    folder: Path, path: Path, sweep: Sweep, courses: dict[Any, Course], steps: Host, summary: list[Row]
) -> list[Path]:
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
        _draw(paths[1], sweep, courses, steps)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written: {error.strerror or error}") from error
    return paths


def spread_out(values: Sequence[Any], count: int) -> list[int]:
    """Indices of so many of the values, the first and the last among them."""
    return sorted({int(k) for k in np.linspace(0, len(values) - 1, min(count, len(values)))})


def _draw(path: Path, sweep: Sweep, courses: dict[Any, Course], steps: Host) -> None:
    """Excess loss against steps: a panel for a shape and a learning rate, a colour for a rule, dashes for a scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shapes = list(dict.fromkeys(key[1:] for key in courses))
    rates = spread_out(sweep.learning_rate, RATES)
    scales = spread_out(sweep.initial_scale, len(DASHES))
    shown = [shapes[k] for k in spread_out(shapes, LINES if len(rates) > 1 else SHAPES)]
    cells, columns = _places(shown, rates)
    lines = -(-len(cells) // columns)
    figure: Any = Figure(figsize=(max(3.4 * columns + 0.6, 6.5), 2.8 * lines + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    # Different learning rates take losses to different depths.
    share: Any = "row" if len(rates) > 1 else "all"
    panels = figure.subplots(lines, columns, sharex=True, sharey=share, squeeze=False)
    drawn: list[list[Host]] = [[] for _ in range(lines)]
    for number, (panel, (shape, rate)) in enumerate(zip(panels.flat, cells, strict=False)):
        for rule in sweep.rule:
            curves = courses[(rule, *shape)].curves[:, :, rate, :]
            for k, dash in zip(scales, DASHES, strict=False):
                _draw_curves(panel, steps, curves[..., k], STYLES[rule], dash, sweep.rule.index(rule))
            drawn[number // columns if share == "row" else 0].append(curves[..., scales])
        if least := floor(sweep, *shape):
            panel.axhline(least, color="black", linewidth=1.0, linestyle=":", zorder=4)
        depth, width = shape
        name = f"depth {depth}" + (f", width {width}" if depth > 1 else "")
        panel.set_title(name + (f", η = {sweep.learning_rate[rate]:g}" if len(rates) > 1 else ""), fontsize=10)
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    for line, group in zip(panels, drawn, strict=True):
        if group:
            line[0].set_yscale("log")
            line[0].set_ylim(*_limits(np.stack(group)))
    _label_edges(panels, len(cells), int(steps[-1]))
    names = [_label(rule) for rule in sweep.rule]
    handles = [Line2D([], [], **STYLES[rule], markersize=4) for rule in sweep.rule]
    if len(scales) > 1:
        names += [f"initial scale {sweep.initial_scale[k]:g}" for k in scales]
        handles += [Line2D([], [], color="black", linestyle=dash) for dash in DASHES[: len(scales)]]
    if any(floor(sweep, *shape) for shape in shown):
        names.append("the least at this width")
        handles.append(Line2D([], [], color="black", linewidth=1.0, linestyle=":"))
    count = len(courses) * int(np.prod(sweep.batch))
    more = [
        f"{some} of {all_of} {what}"
        for some, all_of, what in (
            (len(shown), len(shapes), "shapes"),
            (len(rates), len(sweep.learning_rate), "learning rates"),
            (len(scales), len(sweep.initial_scale), "initial scales"),
        )
        if some < all_of
    ]
    what = f"{count} deep linear networks"
    if sweep.seeds > 1:
        what += f": median and 5–95 % over {sweep.seeds} seeds"
    left_out = f"\nshown: {', '.join(more)}; the others are in the store" if more else ""
    figure.suptitle(what + left_out, fontsize=11)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), columns + 1), frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=150)


def _places(shapes: list[Any], rates: list[int]) -> tuple[list[tuple[Any, int]], int]:
    """Shape and learning rate of each panel, line by line, and how many there are on a line."""
    if len(rates) == 1:
        few = {4: 2, 7: 4, 8: 4}
        return [(shape, rates[0]) for shape in shapes], few.get(len(shapes), min(len(shapes), 3))
    if 1 < len(shapes) <= COLUMNS:
        return [(shape, rate) for rate in rates for shape in shapes], len(shapes)
    return [(shape, rate) for shape in shapes for rate in rates], len(rates)


def _draw_curves(panel: Any, steps: Host, curves: Host, style: dict[str, Any], dash: Any, place: int) -> None:
    """A median with its band; what has a marker has it where the other rules have none."""
    middle, low, high = np.clip(curves, 1e-99, 1e99)  # far out of the axes, where lines go to and come from
    colour, wide = style["color"], style["linewidth"] > 2.0
    panel.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    spacing = max(1, len(steps) // 5)
    panel.plot(
        *(steps, middle),
        **style,
        linestyle=dash,
        markersize=4,
        markevery=(place * spacing // len(STYLES), spacing),
        zorder=2.5 if wide else 3.0,
    )


def _limits(drawn: Host) -> tuple[float, float]:
    """From the level of rounding to not far above the start, (..., records, scales)."""
    first = drawn[..., 0, :]
    start = float(np.max(first, initial=0.0, where=first < FAR)) or 1.0
    least = np.min(drawn, initial=start, where=drawn > 1e-16 * start)
    high = drawn >= 1e3 * start
    # Room to see what leaves.
    most = np.max(drawn, initial=10.0 * start if high.any() else start, where=~high)
    return float(0.5 * least), float(2.0 * most)


def _label_edges(panels: Any, count: int, last: int) -> None:
    """Labels where there is no further panel below, or to the left."""
    columns = panels.shape[1]
    for k, panel in enumerate(panels.flat):
        if k >= count:
            panel.set_visible(False)
            continue
        panel.set_xscale("symlog", linthresh=1.0)
        panel.set_xlim(-0.1, 1.2 * last)
        panel.set_yscale("log")
        if k + columns >= count:
            panel.set_xlabel("steps")
            panel.tick_params(labelbottom=True)
        if k % columns == 0:
            panel.set_ylabel("excess loss")
