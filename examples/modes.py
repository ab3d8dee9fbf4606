"""Modes of 4 096 deep linear networks under gradient flow and natural gradient flow, beside their closed forms.

Depth × initial scale × seed: depths are groups, scales and seeds the axes of each. A network of L layers that starts
balanced, with modes along those of its teacher, learns a mode of strength s by da/dt = L a^(2 − 2/L) (s − a) under
gradient flow (Saxe, McClelland and Ganguli 2014): the first factor is the preconditioner of depth. Under natural
gradient flow it is da/dt = s − a at every depth (Bernacchia, Lengyel and Hennequin 2018).

    python examples/modes.py --out modes
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np

import natgrad_array as ng

TARGET = np.asarray([3.0, 2.0, 1.0])
DEPTHS = (1, 2, 4, 8)
RULES = {"gradient": "gradient flow", "layerwise": "natural gradient flow"}
COLOURS = dict(zip(DEPTHS, ("#009E73", "#E69F00", "#0072B2", "#CC79A7"), strict=True))


def starts(scales: np.ndarray, seeds: int) -> np.ndarray:
    """First modes, (scales, seeds, modes): each seed has its own, around the scale."""
    rng = np.random.default_rng(0)
    return scales[:, None, None] * np.exp(0.3 * rng.standard_normal((seeds, len(TARGET))))


def simulate(scales: np.ndarray, seeds: int, steps: int, until: float, *, progress: bool) -> ng.simulation.Groups:
    """Simulate all depths under both flows, by the fourth-order rule of Runge and Kutta."""
    modes = np.eye(len(TARGET))
    task = ng.GaussianTask.from_modes(modes, TARGET, modes)
    product = starts(scales, seeds)[..., None] * modes
    width, groups = len(TARGET), {}
    for depth in DEPTHS:
        sizes = (width,) * (depth + 1)
        weights = ng.deep_linear.balanced(depth, sizes, product.shape[:2], like=product, end_to_end=product)
        groups |= {(rule, depth): {"weights": weights, "rule": rule} for rule in RULES}
    return ng.simulation.simulate_groups(
        groups,
        task,
        names=("rule", "depth"),
        integrator="rk4",
        learning_rate=until / steps,
        steps=steps,
        record=("modes", "rates"),
        record_at=ng.simulation.log_steps(steps, count=60),
        axes={"initial_scale": scales, "seed": range(seeds)},
        progress=progress,
    )


def closed_form(rule: str, depth: int, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The modes at some times, (times, scales, seeds, modes)."""
    at = times[:, None, None, None] + 0.0 * start
    first, target = start + 0.0 * at, TARGET + 0.0 * at
    if rule == "gradient":
        return ng.deep_linear.gradient_flow_modes(first, target, at, depth=depth)
    return ng.deep_linear.natural_gradient_flow_modes(first, target, at)


def draw(found: ng.simulation.Groups, scales: np.ndarray, times: np.ndarray, path: Path) -> None:
    """How much of each mode is learned against time, under both flows; and the rates behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(14.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    rng = np.random.default_rng(0)
    later = times > 0.0
    shown = np.flatnonzero(later)[:: max(1, len(times) // 20)]
    for panel, (rule, name) in zip(panels, RULES.items(), strict=False):
        for place, depth in enumerate(reversed(DEPTHS)):
            modes = found[rule, depth].modes
            form = closed_form(rule, depth, modes[0], times)
            # The median over seeds, of the smallest and the largest scale, of the strongest and the weakest mode.
            learned, wanted = (np.median((a - modes[0]) / (TARGET - modes[0]), axis=2) for a in (modes, form))
            # Where all curves are one, each is seen beside the next.
            width = 1.8 if rule == "gradient" else 9.0 - 2.4 * place
            for scale, (mode, dash) in itertools.product((0, -1), ((0, "-"), (-1, "--"))):
                style = {"color": COLOURS[depth], "linewidth": width, "linestyle": dash if rule == "gradient" else "-"}
                panel.plot(times[later], learned[later, scale, mode], **style)
                panel.plot(times[shown], wanted[shown, scale, mode], "k.", markersize=3.5, zorder=5)
        panel.set_xscale("log")
        panel.set_xlabel("time")
        panel.set_ylim(-0.04, 1.06)
        panel.set_title(name)
    first, second = panels[:2]
    first.set_ylabel("part of the mode that is learned, $(a - a_0) / (s - a_0)$")
    text = f"from scales {scales[0]:g} and {scales[-1]:g};\n$s = 3$ solid, $s = 1$ dashed"
    first.text(0.04, 0.95, text, transform=first.transAxes, va="top")
    text = "every depth, scale and mode:\n$1 - e^{-t}$"
    second.text(0.04, 0.95, text, transform=second.transAxes, va="top")
    last = panels[2]
    curve = np.geomspace(0.5 * scales[0], TARGET[0], 200)
    for depth in DEPTHS:
        for rule, marker in (("gradient", "o"), ("layerwise", "x")):
            modes, rates = found[rule, depth].modes, found[rule, depth].rates
            # At its target a mode stands still, and what is left of its rate is rounding.
            known = np.flatnonzero(np.abs(TARGET - modes) > 0.02 * TARGET)
            some = rng.choice(known, min(100 if marker == "o" else 20, known.size), replace=False)
            size = 14 if marker == "o" else 36
            last.scatter(
                modes.ravel()[some],
                rates.ravel()[some],
                s=size,
                marker=marker,
                color=COLOURS[depth],
                alpha=0.8,
                linewidths=0.0 if marker == "o" else 1.6,
            )
        last.plot(curve, depth * curve ** (2.0 - 2.0 / depth), color=COLOURS[depth], linewidth=1.2)
    last.axhline(1.0, color="black", linewidth=1.0, linestyle="--")
    last.set_xscale("log")
    last.set_yscale("log")
    last.set_ylim(3e-3, 2e2)
    last.set_xlabel("strength of the mode, $a$")
    last.set_ylabel("rate, $\\dot a / (s - a)$")
    last.set_title("the preconditioner of depth, and none")
    handles = [
        Line2D([], [], marker="o", linestyle="", color="#444444", label="gradient flow"),
        Line2D([], [], linestyle="-", color="#444444", label="$L\\,a^{2-2/L}$"),
        Line2D([], [], marker="x", linestyle="", color="#444444", label="natural gradient flow"),
        Line2D([], [], linestyle="--", color="black", label="1"),
    ]
    last.legend(handles=handles, frameon=False, loc="lower right", fontsize=9)
    for panel in panels:
        panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    handles = [Line2D([], [], color=COLOURS[depth], linewidth=2.0, label=f"{depth} layers") for depth in DEPTHS]
    handles[0].set_label("1 layer")
    handles.append(Line2D([], [], marker="o", markersize=3, linestyle="", color="black", label="closed form"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    members = len(DEPTHS) * math.prod(found["gradient", DEPTHS[0]].batch_shape)
    figure.suptitle(f"{members} deep linear networks: natural gradient removes the preconditioner of depth")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("modes"), help="folder for the figure and the modes")
    parser.add_argument("--seeds", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="three seeds, and longer steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    scales = np.geomspace(0.05, 0.5, 8)
    seeds, steps, until = (3, 400, 6.0) if options.quick else (options.seeds, 1500, 6.0)
    begin = time.perf_counter()
    found = simulate(scales, seeds, steps, until, progress=not options.quick)
    seconds = time.perf_counter() - begin
    times = until / steps * found["gradient", 1].steps
    for (rule, depth), history in found.items():
        off = np.max(np.abs(history.modes - closed_form(rule, depth, history.modes[0], times)))
        print(f"{RULES[rule]}, depth {depth}: at most {off:.1e} off the closed form")
    members = len(DEPTHS) * len(scales) * seeds
    print(f"{members} networks under {len(RULES)} flows, {steps} steps: {seconds:.0f} s")
    data = found.to_xarray()
    np.savez(options.out / "modes.npz", times=times, scales=scales, depths=DEPTHS, modes=data["modes"].values)
    draw(found, scales, times, options.out / "modes.png")
    print(f"Written: {options.out / 'modes.png'}, {options.out / 'modes.npz'}")


if __name__ == "__main__":
    main()
