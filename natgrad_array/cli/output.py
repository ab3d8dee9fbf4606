"""What the demo leaves behind: a table, a figure, and the arrays behind both."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from natgrad_array.cli.demo import RULES, Host, Network, Run
from natgrad_array.cli.errors import CommandError

FIGURE, ARRAYS = "loss.png", "arrays.npz"
DASH = "–"
SPREAD = (0.05, 0.95)

LABELS = {
    "layerwise": "layerwise",
    "exact": "exact",
    "moore_penrose": "Moore–Penrose",
    "gradient": "gradient descent",
}
# Colours that stay apart for colour-blind eyes; width, dashes and marker say the same without colour.
STYLES: dict[str, dict[str, Any]] = {
    "layerwise": {"color": "#E69F00", "linewidth": 4.0, "linestyle": "-", "marker": ""},
    "exact": {"color": "#0072B2", "linewidth": 1.6, "linestyle": "-", "marker": "o"},
    "moore_penrose": {"color": "#009E73", "linewidth": 1.6, "linestyle": "-.", "marker": "^"},
    "gradient": {"color": "#555555", "linewidth": 1.6, "linestyle": ":", "marker": "s"},
}


def prepare(folder: Path, kept: str | None = None) -> None:
    """Make the output folder and see that it can be written, before anything is computed.

    A folder with a file of the name `kept` holds an earlier run, which is not overwritten.
    """
    if kept is not None and (folder / kept).exists():
        raise CommandError(f"{folder} holds a run, {kept}: --out takes another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written: {error.strerror or error}") from error


# ------------------------------------------------------------------------------- the table


def quantiles(values: Host) -> tuple[float, float, float] | None:
    """Median and the ends of the spread over the members that have a value."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    low, middle, high = np.quantile(known, [SPREAD[0], 0.5, SPREAD[1]])
    return float(middle), float(low), float(high)


def table(runs: list[Run]) -> Table:
    """Fitted rates beside the theory's, and the loss reached."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("network", "rule", "decay rate", "theory", "loss", "5–95 %"):
        result.add_column(name, justify="left" if name in ("network", "rule") else "right", no_wrap=True)
    for network, group in grouped(runs):
        heads = (network.regime, network.name, f"floor {network.floor:.3f}" if network.floor else "")
        for k, run in enumerate(group):
            rate, loss = quantiles(run.rate), quantiles(run.above_floor[-1])
            result.add_row(
                heads[k] if k < len(heads) else "",
                LABELS[run.rule],
                f"{rate[0]:.3f} ± {(rate[2] - rate[1]) / 2:.3f}" if rate else DASH,
                f"{run.theory:.3f}" if run.theory is not None else DASH,
                f"{loss[0]:.1e}" if loss else DASH,
                f"{loss[1]:.1e}–{loss[2]:.1e}" if loss else DASH,
            )
        result.add_row()
    return result


def notes(runs: list[Run], learning_rate: float) -> list[str]:
    """How to read the table, and what went wrong."""
    lines = [
        "decay rate: fitted to the later half of each run; median, and half of the 5–95 % range over members.",
        f"theory: −2 ln(1 − η)/η with η = {learning_rate:g}; {DASH} where there is no single rate.",
        "loss: what is left above the best that a network of this shape can reach; median over members.",
    ]
    lines += [
        f"floor: {network.name} has no more than rank {min(network.sizes)}; "
        f"the best of that rank is {network.floor:.3f} above the optimum."
        for network, _ in grouped(runs)
        if network.floor
    ]
    shorter = [f"{run.substeps} ({run.network.name})" for run in runs if run.substeps > 1]
    if shorter:
        lines.append(f"gradient descent: for each step of the others {', '.join(shorter)} shorter ones, to be stable.")
    lines += [
        f"diverged: {int(run.diverged.sum())} of {run.diverged.size} members, {LABELS[run.rule]}, {run.network.name}."
        for run in runs
        if run.diverged.any()
    ]
    return lines


def grouped(runs: list[Run]) -> list[tuple[Network, list[Run]]]:
    """Runs by network, in order."""
    groups: dict[Network, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.network, []).append(run)
    return list(groups.items())


# ------------------------------------------------------------------------------ the arrays


def write_arrays(folder: Path, runs: list[Run], about: dict[str, Any]) -> Path:
    """Write everything behind the table and the figure, as plain arrays.

    Axes are (network, rule, record, member); NaN and False fill what was not run.
    """
    groups = grouped(runs)
    rules = [rule for rule in RULES if any(run.rule == rule for run in runs)]
    shape = (len(groups), len(rules))
    records = max(run.time.size for run in runs)
    members = runs[0].diverged.size
    arrays: dict[str, Host] = {
        "time": np.full((*shape, records), np.nan),
        "excess_loss": np.full((*shape, records, members), np.nan),
        "decay_rate": np.full((*shape, members), np.nan),
        "theory_rate": np.full(shape, np.nan),
        "learning_rate": np.full(shape, np.nan),
        "substeps": np.zeros(shape, dtype=np.int64),
        "diverged": np.zeros((*shape, members), dtype=bool),
        "finished": np.zeros(shape, dtype=bool),
    }
    for g, (_, group) in enumerate(groups):
        for run in group:
            at = g, rules.index(run.rule)
            arrays["time"][at][: run.time.size] = run.time
            arrays["excess_loss"][at][: run.time.size] = run.excess
            arrays["decay_rate"][at] = run.rate
            arrays["theory_rate"][at] = np.nan if run.theory is None else run.theory
            arrays["learning_rate"][at] = run.learning_rate
            arrays["substeps"][at] = run.substeps
            arrays["diverged"][at] = run.diverged
            arrays["finished"][at] = run.finished
    arrays["rule"] = np.asarray(rules)
    arrays["regime"] = np.asarray([network.regime for network, _ in groups])
    arrays["sizes"] = np.asarray([network.sizes for network, _ in groups])
    arrays["floor"] = np.asarray([network.floor for network, _ in groups])
    arrays |= {key: np.asarray(value) for key, value in about.items()}
    path = folder / ARRAYS
    try:
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type, unused-ignore]
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


# ------------------------------------------------------------------------------ the figure


def headline(runs: list[Run]) -> str:
    """What the figure shows, if it does."""
    gaps = [abs(found[0] / run.theory - 1.0) for run in runs if run.theory and (found := quantiles(run.rate))]
    if gaps and max(gaps) < 0.05:
        return "exact natural gradients keep the theory's pace"
    return "loss against time"


def write_figure(folder: Path, runs: list[Run], title: str) -> Path:
    """Draw loss against time, one panel a network, the theory's line over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(runs)
    figure = Figure(figsize=(max(4.2 * len(groups), 7.0), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for panel, (network, group) in zip(axes, groups, strict=True):
        for run in group:
            handles |= _draw(panel, run)
        handles |= _draw_theory(panel, group)
        panel.set_yscale("log")
        panel.set_xlabel("time t = learning rate × steps")
        panel.set_title(f"{network.regime}: {network.name}\n{_seen(network, group)}", fontsize=10)
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    axes[0].set_ylabel("loss above the network's best")
    figure.suptitle(title, fontsize=11)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False)
    path = folder / FIGURE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _seen(network: Network, group: list[Run]) -> str:
    """The panel in words, with its own numbers."""
    if network.floor:
        return f"best of rank {min(network.sizes)}: {network.floor:.2g} above the optimum"
    rates = {run.rule: found[0] for run in group if (found := quantiles(run.rate))}
    natural = [rates[rule] for rule in ("exact", "moore_penrose") if rule in rates]
    if "layerwise" not in rates or not natural:
        return "too few records to fit a rate"
    exact = "–".join(dict.fromkeys((f"{min(natural):.2f}", f"{max(natural):.2f}")))
    return f"decay rate: layerwise {rates['layerwise']:.2f}, exact {exact}"


def _draw(panel: Any, run: Run) -> dict[str, Any]:
    values = np.where(run.above_floor > 0.0, run.above_floor, np.nan)
    kept = np.isfinite(values).any(axis=1)
    if not kept.any():
        return {}
    low, middle, high = np.nanquantile(values[kept], [SPREAD[0], 0.5, SPREAD[1]], axis=1)
    style = dict(STYLES[run.rule])
    panel.fill_between(run.time[kept], low, high, color=style["color"], alpha=0.15, linewidth=0)
    spacing = max(1, int(kept.sum()) // 8)
    offset = spacing * RULES.index(run.rule) // len(RULES)
    (line,) = panel.plot(run.time[kept], middle, markevery=(offset, spacing), markersize=5, **style)
    return {LABELS[run.rule]: line}


def _draw_theory(panel: Any, group: list[Run]) -> dict[str, Any]:
    """The theory's line, from where the ensembles start."""
    known = [run for run in group if run.theory is not None]
    if not known:
        return {}
    run = known[0]
    rate = run.theory or 0.0
    start = np.median(run.above_floor[0])
    style: dict[str, Any] = {"color": "black", "linestyle": (0, (5, 3)), "linewidth": 1.2, "zorder": 5}
    (line,) = panel.plot(run.time, start * np.exp(-rate * run.time), **style)
    return {f"theory, exp(−{rate:.3f} t)": line}
