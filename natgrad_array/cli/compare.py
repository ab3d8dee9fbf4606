"""`natgrad-array compare`: estimates and optimizers beside the exact Fisher information of trained networks."""

from __future__ import annotations

import csv
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.output import DASH, quantiles
from natgrad_array.networks import Network
from natgrad_array.optimizers.presets import PRESETS

Host = np.ndarray[Any, Any]

FIGURE, ARRAYS, TABLE = "compare.png", "compare.npz", "compare.csv"

EXACT = ("exact", "exact by blocks", "exact by layers")
ESTIMATES = ("sampled", "empirical")
OPTIMIZERS = (
    "natural_gradient",
    "kfac",
    "tridiagonal_kfac",
    "ekfac",
    "heskes",
    "bounded_kfac",
    "foof",
    "ng_sgd",
    "prong",
    "sgd",
)
METHODS = (*EXACT, *ESTIMATES, *OPTIMIZERS)
INVERSES = dict(zip(EXACT, ("moore_penrose", "block_diagonal", "layerwise"), strict=True))


class Report(NamedTuple):
    """A `FisherComparison` on the host, and one thing more about the step."""

    block_errors: Host | None
    cross_layer: Host
    left_out: Host | None
    spectrum: Host
    estimate_spectrum: Host | None
    cosine: Host
    length: Host
    gain: Host
    damped_cosine: Host
    """Between the step and (F + damping)⁻¹∇."""


Reports = dict[str, Report]

STEPS = {
    "damped_cosine": "cosine with (F + damping)⁻¹∇",
    "length": "length over that of F⁺∇",
    "gain": "gain over that of F⁺∇",
}


def compare_all(
    net: Network, params: tuple[Any, ...], x: Any, y: Any, *, damping: float, draws: int, seed: int
) -> Iterator[tuple[str, Report]]:
    """Every method's report, one after another, each with draws of its own."""
    exact, gradient = net.fisher(params, x), net.gradient(params, x, y)
    damped = exact.precondition(gradient, inverse="moore_penrose", damping=damping)
    for k, name in enumerate(METHODS):
        rng = np.random.default_rng((seed, k))
        if name in OPTIMIZERS:
            optimizer = make_optimizer(name, damping)
            made = optimizer.preconditioner(net, params, optimizer.init(net, params), x, y, rng)
            report, step = exact.compare(made, gradient), made(gradient)
        else:
            estimate = exact
            if name == "sampled":
                estimate = ng.sampled_fisher(net, params, x, rng, n_samples=draws)
            elif name == "empirical":
                estimate = ng.empirical_fisher(net, params, x, y)
            inverse = INVERSES.get(name, "moore_penrose")
            report = exact.compare(estimate, gradient, inverse=inverse, damping=damping)
            step = estimate.precondition(gradient, inverse=inverse, damping=damping)
        parts: dict[str, Any] = {
            key: None if part is None else np.array(_arrays.to_numpy(part)) for key, part in report._asdict().items()
        }
        yield name, Report(**parts, damped_cosine=_cosine(step, damped))


def _cosine(some: tuple[Any, ...], others: tuple[Any, ...]) -> Host:
    """Between two steps, of each member; NaN where one of them is zero."""
    u, v = (
        np.concatenate([(w := np.asarray(_arrays.to_numpy(part))).reshape(*w.shape[:-2], -1) for part in step], axis=-1)
        for step in (some, others)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        # To unit size first: squares of small steps must not vanish.
        u, v = (way / np.max(np.abs(way), axis=-1, keepdims=True) for way in (u, v))
        return np.asarray(np.sum(u * v, axis=-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1))


def make_optimizer(name: str, damping: float) -> ng.optimizers.Optimizer:
    """A preset that looks at all samples, with this damping where it has one."""
    make = PRESETS[name]
    known = inspect.signature(make).parameters
    return make(**{key: value for key, value in (("damping", damping), ("share", 1.0)) if key in known})


# ------------------------------------------------------------------------- what is left behind


def middle(values: Host | None) -> float:
    """The median over members; NaN where there is none."""
    found = None if values is None else quantiles(values)
    return np.nan if found is None else found[0]


def own_block_errors(report: Report) -> tuple[float, float]:
    """Median over members of the mean error of blocks on the diagonal, and off it."""
    if report.block_errors is None:
        return np.nan, np.nan
    depth = report.block_errors.shape[-1]
    same = np.eye(depth, dtype=bool)
    on = middle(report.block_errors[..., same].mean(axis=-1))
    return on, middle(report.block_errors[..., ~same].mean(axis=-1)) if depth > 1 else np.nan


COLUMNS: dict[str, Callable[[Report], float]] = {
    "own blocks": lambda report: own_block_errors(report)[0],
    "between layers": lambda report: own_block_errors(report)[1],
    "left out": lambda report: middle(report.left_out),
    "largest λ": lambda report: middle(
        None if report.estimate_spectrum is None else report.estimate_spectrum[..., -1] / report.spectrum[..., -1]
    ),
    "cosine": lambda report: middle(report.cosine),
    "damped": lambda report: middle(report.damped_cosine),
    "length": lambda report: middle(report.length),
    "gain": lambda report: middle(report.gain),
}


def table(reports: Reports) -> Table:
    """One line for each method; medians over members."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("method", no_wrap=True)
    for name in COLUMNS:
        result.add_column(name, justify="right", no_wrap=True)
    for name, report in reports.items():
        values = (column(report) for column in COLUMNS.values())
        result.add_row(name, *(DASH if np.isnan(value) else f"{value:.3g}" for value in values))
    return result


NOTES = (
    "own blocks, between layers: relative error of the blocks of F, mean over those on the diagonal and off it.",
    "left out: norm of the blocks of F where the estimate is zero, over that of F. largest λ: over that of F.",
    "cosine, length: of the step beside F⁺∇, most of which lies along the smallest eigenvalues of F: where the damping "
    "is above them the cosine is near 0, for the exact inverse too. damped: cosine with (F + damping)⁻¹∇.",
    "gain: how much of the model's best reduction lies along the step.",
)


def write(folder: Path, reports: Reports, params: tuple[Host, ...], about: dict[str, Any], title: str) -> list[Path]:
    """Write all reports and the parameters as plain arrays, the table, and a figure if there is a report."""
    arrays: dict[str, Host] = {f"params_{i}": w for i, w in enumerate(params)}
    for name, report in reports.items():
        for key, value in zip(report._fields, report, strict=True):
            if value is not None and (key not in ("spectrum", "cross_layer") or key not in arrays):
                arrays[key if key in ("spectrum", "cross_layer") else f"{_key(name)}_{key}"] = value
    arrays |= {key: np.asarray(value) for key, value in about.items()}
    arrays["methods"] = np.asarray(list(reports), dtype=str)
    paths = [folder / ARRAYS, folder / TABLE]
    try:
        np.savez_compressed(paths[0], **arrays)  # type: ignore[arg-type, unused-ignore]
        with paths[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("method", *COLUMNS))
            for name, report in reports.items():
                writer.writerow((name, *(f"{column(report):.8g}" for column in COLUMNS.values())))
        if reports:
            draw(reports, title, folder / FIGURE)
            paths.insert(0, folder / FIGURE)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written: {error.strerror or error}") from error
    return paths


def _key(name: str) -> str:
    return name.replace(" ", "_")


def draw(reports: Reports, title: str, path: Path) -> None:
    """Errors of blocks as heat maps, spectra, and the steps of all members."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name, report in reports.items() if report.block_errors is not None and name not in EXACT]
    rows = max(1, -(-len(shown) // 6))
    figure: Any = Figure(figsize=(13.0, 5.0 + 2.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.4 + 2.3 * rows, 4.4))
    _draw_blocks(top, reports, shown, rows)
    panels = bottom.subplots(1, 4, width_ratios=(1.5, 1.0, 1.0, 1.0))
    _draw_spectra(panels[0], reports)
    _draw_steps(panels[1:], reports)
    figure.get_layout_engine().set(hspace=0.03, h_pad=0.08)
    figure.suptitle(title, fontsize=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=150)


ERRORS = (0.25, 4.0)
"""Relative errors that the colours tell apart, on both sides of 1."""


def _draw_blocks(part: Any, reports: Reports, shown: list[str], rows: int) -> None:
    from matplotlib.colors import LogNorm

    panels = part.subplots(rows, 6, squeeze=False).reshape(-1)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    image = None
    for panel, name in zip(panels, shown, strict=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = np.asarray(reports[name].block_errors)
            errors = np.nanmedian(errors.reshape(-1, *errors.shape[-2:]), axis=0)
        low, high = ERRORS
        image = panel.imshow(np.clip(errors, low, high), cmap="RdBu_r", norm=LogNorm(low, high))
        ticks = range(len(errors))
        if len(errors) <= 5:
            for i in ticks:
                for j in ticks:
                    colour = "white" if not low * 1.7 < errors[i, j] < high / 1.7 else "black"
                    panel.text(j, i, f"{errors[i, j]:.2g}", ha="center", va="center", color=colour, fontsize=8)
        panel.set_xticks(ticks, [str(i) for i in ticks], fontsize=8)
        panel.set_yticks(ticks, [str(i) for i in ticks] if panel in panels[::6] else [], fontsize=8)
        panel.set_xlabel("layer", fontsize=8)
        if panel in panels[::6]:
            panel.set_ylabel("layer", fontsize=8)
        panel.tick_params(length=0)
        panel.set_title(name, fontsize=9)
    if image is not None:
        bar = part.colorbar(image, ax=list(panels), extend="both", shrink=0.9)
        bar.set_label("relative error of blocks of F\n(1: no better than zeros)")
        bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
        bar.ax.minorticks_off()


def _draw_spectra(panel: Any, reports: Reports) -> None:
    for name, style in _STYLES.items():
        report = reports.get(name)
        if report is None:
            continue
        values: Any = report.spectrum if name == "exact" else report.estimate_spectrum
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            typical = np.nanmedian(np.asarray(values).reshape(-1, np.shape(values)[-1]), axis=0)[::-1]
        # Below that it is rounding.
        floor = len(typical) * np.finfo(typical.dtype).eps * np.nanmax(typical, initial=0.0)
        kept = typical > floor
        if kept.any():
            panel.plot(np.arange(1, 1 + len(typical))[kept], typical[kept], label=name, **style)
    if panel.lines:
        panel.set_xscale("log")
        panel.set_yscale("log")
    others = [name for name in reports if name not in (*_STYLES, *EXACT)]
    note = textwrap.fill(f"not drawn: {', '.join(others)}", 52)
    panel.set_xlabel("rank of the eigenvalue" + (f"\n{note}" if others else ""), fontsize=9)
    panel.set_ylabel("eigenvalue")
    panel.set_title("spectra, median network", fontsize=10)
    panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    if panel.lines:
        panel.legend(frameon=False, fontsize=8, loc="lower left")


# Colours that stay apart for colour-blind eyes; width and dashes say the same without colour.
_STYLES: dict[str, dict[str, Any]] = {
    "exact": {"color": "black", "linewidth": 2.4, "linestyle": "-"},
    "sampled": {"color": "#E69F00", "linewidth": 1.6, "linestyle": "--"},
    "empirical": {"color": "#D55E00", "linewidth": 1.6, "linestyle": ":"},
    "kfac": {"color": "#0072B2", "linewidth": 1.6, "linestyle": "-"},
    "tridiagonal_kfac": {"color": "#56B4E9", "linewidth": 1.6, "linestyle": "--"},
    "ekfac": {"color": "#009E73", "linewidth": 1.6, "linestyle": "-."},
    "foof": {"color": "#CC79A7", "linewidth": 1.6, "linestyle": ":"},
}


def _draw_steps(panels: Any, reports: Reports) -> None:
    """A dot for each member and a bar at their median."""
    names = list(reports)
    for panel, (key, label) in zip(panels, STEPS.items(), strict=True):
        for k, name in enumerate(names):
            values = np.asarray(getattr(reports[name], key), dtype=np.float64).reshape(-1)
            values = values[np.isfinite(values) & ((values > 0.0) | (key != "length"))]
            colour = "black" if name in EXACT else "#0072B2" if name in OPTIMIZERS else "#D55E00"
            if not values.size:
                continue
            panel.plot(values, np.full(values.shape, k), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            panel.plot([np.median(values)], [k], "|", color=colour, markersize=13, markeredgewidth=2.2)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks(range(len(names)), names if panel is panels[0] else [""] * len(names), fontsize=8)
        panel.set_title(label, fontsize=10)
        panel.grid(visible=True, axis="both", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    if panels[1].lines:
        panels[1].set_xscale("log")
    panels[0].set_xlim(min(-0.03, panels[0].get_xlim()[0]), 1.03)
    panels[0].axvline(0.0, color="#888888", linewidth=0.8)
    panels[2].set_xlim(-0.03, 1.03)
