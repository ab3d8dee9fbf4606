"""The commands and their options."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from natgrad_array.cli import INTERRUPTED, check, compare, data, demo, libraries, output, simulate, sweep, train
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.libraries import BackendName, DtypeName
from natgrad_array.networks.activations import ACTIVATIONS
from natgrad_array.optimizers.presets import PRESETS

PLAIN_WIDTH = 110

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

BackendOption = Annotated[BackendName, typer.Option("--backend", help="Array library.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Device of the library, such as cuda:0.")]
DtypeOption = Annotated[DtypeName, typer.Option("--dtype", help="Floating type.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all draws.")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run a command and return its exit status."""
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command.main(args=given, prog_name="natgrad-array", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        # Usage errors of Typer, whichever parser stands behind this version of it.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        raise CommandError(f"{explain()} (try --help)") from error
    return int(status or 0)


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("natgrad-array")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def console() -> Console:
    """Standard output; wide and plain when it is not a terminal."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def parse_sizes(text: str, option: str = "--sizes", *, least: int = 2) -> tuple[int, ...]:
    """Read "64,32,10"."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < least or not all(part.isdecimal() and int(part) > 0 for part in parts):
        count = {1: "one", 2: "two"}[least]
        raise CommandError(f"{option} must be {count} or more positive integers, such as 64,32,10, got {text!r}")
    return tuple(int(part) for part in parts)


@app.callback(invoke_without_command=True)
def natgrad_array(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> int:
    """Exact natural gradient for ensembles of networks."""
    if show_version:
        typer.echo(f"natgrad-array {version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    return 0


@app.command("demo")
def demo_command(
    backend: BackendOption = BackendName.numpy,
    device: DeviceOption = None,
    members: Annotated[int, typer.Option("--members", min=1, help="Networks in each ensemble.")] = 64,
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="One network, such as 64,32,10, in place of one for each regime.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the natural gradients.")] = 40,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Their size, between 0 and 1.")] = 0.2,
    seed: SeedOption = 0,
    dtype: DtypeOption = DtypeName.float64,
    data_file: Annotated[
        Path | None, typer.Option("--data", help="npz file with arrays x (samples, inputs) and y (samples, outputs).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the figure and the arrays; those of an earlier demo are replaced.")
    ] = Path("natgrad-demo"),
) -> int:
    """Let ensembles learn handwritten digits by four rules, and hold the pace against the theory."""
    if not 0.0 < learning_rate < 1.0:
        raise CommandError(f"--learning-rate must be between 0 and 1, got {learning_rate:g}")
    widths = None if sizes is None else parse_sizes(sizes)
    place = libraries.connect(backend.value, device, dtype.value)
    samples = data.digits() if data_file is None else data.read(data_file)
    task = demo.make_task(samples, place, dtype.value)
    networks = demo.default_networks(task) if widths is None else [demo.chosen_network(widths, task, samples)]
    output.prepare(out)

    runs: list[demo.Run] = []
    interrupted = False
    with progress() as bar:
        job = bar.add_task("", total=len(networks) * len(demo.RULES) * steps)

        def train_one(network: demo.Network, rule: str) -> demo.Run:
            bar.update(job, description=f"{network.regime} {network.name}, {output.LABELS[rule]}")
            return demo.train(
                network,
                rule,
                task,
                members=members,
                steps=steps,
                learning_rate=learning_rate,
                seed=seed,
                tick=lambda: bar.advance(job),
            )

        try:
            with libraries.one_thread(max(max(network.sizes) for network in networks)):
                for finished in demo.train_all(networks, train_one):
                    runs.append(finished)  # noqa: PERF402 - one by one, so that an interruption keeps them
        except KeyboardInterrupt:
            interrupted = True
    if not runs:
        raise KeyboardInterrupt
    interrupted = interrupted or not runs[-1].finished

    about = {
        "data": samples.name,
        "backend": place.name,
        "device": place.device,
        "dtype": dtype.value,
        "seed": seed,
        "version": version(),
        "input_rank": task.input_rank,
    }
    what = f"{members} networks learn {samples.name}"
    written = output.write_arrays(out, runs, about), output.write_figure(out, runs, f"{what}: {output.headline(runs)}")
    screen = console()
    screen.print(
        f"{what}: {samples.x.shape[0]} samples, {task.n_inputs} inputs of rank {task.input_rank}, "
        f"{task.n_outputs} outputs; {place.name} on {place.device}, {dtype.value}.\n"
    )
    screen.print(output.table(runs))
    for line in output.notes(runs, learning_rate):
        screen.print(line)
    screen.print(f"\nWritten: {', '.join(map(str, written))}", soft_wrap=True)
    if interrupted:
        sys.stderr.write("natgrad-array: interrupted; what was computed is written\n")
        return INTERRUPTED
    return 0


@app.command("train")
def train_command(
    preset: Annotated[str, typer.Option("--preset", help=f"Optimizer: {', '.join(PRESETS)}.")] = "natural_gradient",
    task: Annotated[str, typer.Option("--task", help="autoencoder or classify.")] = "autoencoder",
    hidden: Annotated[
        str, typer.Option("--hidden", help="Widths of the hidden layers, such as 100,50,100.")
    ] = "32,16,32",
    activation: Annotated[str, typer.Option("--activation", help="Of all hidden layers.")] = "tanh",
    images: Annotated[
        Path | None, typer.Option("--data", help="IDX file of images (MNIST's format); digits of 8 x 8 pixels without.")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="IDX file of their labels.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many.")] = 100,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images in each.")] = 500,
    members: Annotated[
        int, typer.Option("--members", min=1, help="Networks trained at once, each from its own seed.")
    ] = 4,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of presets that have one; their own without.")
    ] = None,
    damping: Annotated[float | None, typer.Option("--damping", help="The first one, of presets that have it.")] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Steps between two records.")] = 5,
    backend: BackendOption = BackendName.numpy,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeName.float32,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the figure, the history and the parameters.")] = Path(
        "natgrad-train"
    ),
) -> int:
    """Train an ensemble of networks on images by any preset, and keep parameters, history and a figure."""
    _check_names(preset, task, activation)
    widths = parse_sizes(hidden, "--hidden", least=1)
    optimizer = train.make_optimizer(preset, learning_rate, damping)
    place = libraries.connect(backend.value, device, dtype.value)
    pictures = train.load(images, labels)
    samples = train.split(pictures, task, dtype.value)
    net = train.make_network(samples, task, widths, activation)
    train.check_size(net, members)
    output.prepare(out, train.ARRAYS)
    widest = max(max(layer.parameter_shape) for layer in net.layers)
    with progress() as bar, libraries.one_thread(widest):
        job = bar.add_task(preset, total=steps)
        history = train.train(
            net,
            optimizer,
            samples,
            place,
            members=members,
            steps=steps,
            batch=batch,
            every=every,
            seed=seed,
            tick=lambda loss: bar.update(job, advance=1, description=f"{preset}, loss {loss:.4g}"),
        )
    sizes = "-".join(str(n) for n in (samples.x.shape[-1], *(layer.output_shape[-1] for layer in net.layers)))
    about = {
        "data": pictures.name,
        "task": task,
        "preset": preset,
        "sizes": sizes,
        "activation": activation,
        "backend": place.name,
        "device": place.device,
        "dtype": dtype.value,
        "seed": seed,
        "batch": min(batch, len(samples.x)),
        "version": version(),
    }
    what = f"{members} networks {sizes} learn {pictures.name} by {preset}"
    written = train.write(out, history, about, what)
    screen = console()
    screen.print(
        f"{what}: {len(samples.x)} images, {len(samples.test_x)} held back; "
        f"{place.name} on {place.device}, {dtype.value}.\n",
        soft_wrap=True,
    )
    screen.print(train.table(history, preset))
    if lost := train.lost(history, preset):
        screen.print(f"\n{lost}", soft_wrap=True)
    if task == "classify":
        screen.print(f"\n{train.classified(net, history.params, samples)}")
    taken = history.step[-1]
    if taken:
        screen.print(f"\n{taken} steps recorded, {1e3 * history.seconds[-1] / taken:.1f} ms each for the ensemble.")
    screen.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    if not history.finished:
        sys.stderr.write("natgrad-array: interrupted; what was computed is written\n")
        return INTERRUPTED
    return 0


def _check_names(preset: str, task: str, activation: str) -> None:
    for name, value, options in (
        ("preset", preset, tuple(PRESETS)),
        ("task", task, train.TASKS),
        ("activation", activation, tuple(ACTIVATIONS)),
    ):
        if value not in options:
            raise CommandError(f"--{name} must be one of {', '.join(options)}, got {value}")


@app.command("compare")
def compare_command(
    preset: Annotated[str, typer.Option("--preset", help="What the network is trained by.")] = "natural_gradient",
    task: Annotated[str, typer.Option("--task", help="autoencoder or classify.")] = "classify",
    hidden: Annotated[str, typer.Option("--hidden", help="Widths of the hidden layers, such as 10,10.")] = "10,10",
    activation: Annotated[str, typer.Option("--activation", help="Of all hidden layers.")] = "tanh",
    images: Annotated[
        Path | None, typer.Option("--data", help="IDX file of images (MNIST's format); digits of 8 x 8 pixels without.")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="IDX file of their labels.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Of training.")] = 20,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images in each.")] = 500,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images that F is the mean over.")] = 100,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Targets drawn for each of them by `sampled`.")] = 1,
    members: Annotated[int, typer.Option("--members", min=1, help="Networks, each from its own seed.")] = 4,
    damping: Annotated[float, typer.Option("--damping", help="Of everything but F itself.")] = 1e-3,
    backend: BackendOption = BackendName.numpy,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeName.float64,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the figure, the table and the arrays.")] = Path(
        "natgrad-compare"
    ),
) -> int:
    """Train networks a little, and hold estimates and optimizers against their exact Fisher information."""
    _check_names(preset, task, activation)
    if not (damping >= 0.0 and math.isfinite(damping)):
        raise CommandError(f"--damping must be at least 0 and finite, got {damping:g}")
    widths = parse_sizes(hidden, "--hidden", least=1)
    place = libraries.connect(backend.value, device, dtype.value)
    pictures = train.load(images, labels)
    parts = train.split(pictures, task, dtype.value)
    net = train.make_network(parts, task, widths, activation)
    train.check_size(net, members)
    output.prepare(out, compare.ARRAYS)
    reports: compare.Reports = {}
    widest = max(max(layer.parameter_shape) for layer in net.layers)
    with progress() as bar, libraries.one_thread(widest):
        job = bar.add_task(f"training by {preset}", total=steps + len(compare.METHODS))
        history = train.train(
            net,
            PRESETS[preset](),
            parts,
            place,
            members=members,
            steps=steps,
            batch=batch,
            every=max(1, steps),
            seed=seed,
            tick=lambda _: bar.advance(job),
        )
        interrupted = not history.finished
        if not interrupted:
            params = tuple(place.asarray(w) for w in history.params)
            x, y = (train.placed(place, array[:samples]) for array in (parts.x, parts.y))
            try:
                for name, report in compare.compare_all(net, params, x, y, damping=damping, draws=draws, seed=seed):
                    reports[name] = report
                    bar.update(job, advance=1, description=f"{name} compared")
            except KeyboardInterrupt:
                interrupted = True
            except ValueError as error:
                # What would not fit is refused before it is made.
                raise CommandError(f"{error}; --hidden, --samples and --members say how large it is") from error
    sizes = "-".join(str(n) for n in (parts.x.shape[-1], *(layer.output_shape[-1] for layer in net.layers)))
    count = min(samples, len(parts.x))
    about = {
        "data": pictures.name,
        "task": task,
        "preset": preset,
        "steps": history.params_step,
        "sizes": sizes,
        "activation": activation,
        "samples": count,
        "draws": draws,
        "damping": damping,
        "backend": place.name,
        "device": place.device,
        "dtype": dtype.value,
        "seed": seed,
        "finished": not interrupted,
        "version": version(),
    }
    what = f"{members} networks {sizes}, {history.params_step} steps of {preset} on {pictures.name}"
    written = compare.write(out, reports, history.params, about, f"{what}: F on {count} images, damping {damping:g}")
    screen = console()
    if reports:
        screen.print(
            f"{what}.\nThe exact Fisher information on {count} images: {net.n_parameters} parameters, "
            f"share of the norm between layers {compare.middle(next(iter(reports.values())).cross_layer):.3g}; "
            f"damping {damping:g}; {place.name} on {place.device}, {dtype.value}.\n",
            soft_wrap=True,
        )
        screen.print(compare.table(reports))
        screen.print("\n" + "\n".join(compare.NOTES), soft_wrap=True)
    screen.print(f"\nWritten: {', '.join(map(str, written))}", soft_wrap=True)
    if interrupted:
        sys.stderr.write("natgrad-array: interrupted; what was computed is written\n")
        return INTERRUPTED
    return 0


@app.command("simulate")
def simulate_command(
    file: Annotated[Path, typer.Argument(help="The sweep, in TOML; see the documentation's page on simulations.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint that is in the folder.")] = False,
    backend: BackendOption = BackendName.numpy,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeName.float64,
    out: Annotated[Path, typer.Option("--out", help="Folder for store, figure, summary and checkpoint.")] = Path(
        "natgrad-simulate"
    ),
) -> int:
    """Run a sweep over deep linear networks: depths, widths, rules, learning rates, initial scales and seeds."""
    grid = sweep.read(file)
    place = libraries.connect(backend.value, device, dtype.value)
    output.prepare(out)
    sweep.check_size(grid, file, out, 4 if dtype is DtypeName.float32 else 8)
    try:
        found = simulate.run(grid, place, out, resume=resume, progress=True)
    except KeyboardInterrupt:
        options = [f"--{name} {value}" for name, value in _chosen(backend, device, dtype).items()]
        command = " ".join(["natgrad-array simulate", str(file), *options, f"--out {out} --resume"])
        sys.stderr.write(f"natgrad-array: interrupted; a checkpoint is kept. To go on: {command}\n")
        return INTERRUPTED
    courses = {key: simulate.course(history) for key, history in found.items()}
    summary = simulate.rows(grid, found, courses)
    written = simulate.write(out, file, grid, courses, np.asarray(grid.recorded), summary)
    screen = console()
    members = sum(row.members for row in summary)
    screen.print(
        f"{members} networks in {len(found)} groups, {grid.seeds} of each kind, {grid.steps} steps, "
        f"{len(grid.recorded)} records; "
        f"{place.name} on {place.device}, {dtype.value}.\n",
        soft_wrap=True,
    )
    screen.print(simulate.table(summary))
    if len(summary) > simulate.ROWS:
        screen.print(f"… and {len(summary) - simulate.ROWS} more in {written[2]}", soft_wrap=True)
    screen.print("\n" + "\n".join(simulate.notes(grid, summary)), soft_wrap=True)
    diverged = sum(row.diverged for row in summary)
    screen.print(f"\nDiverged: {diverged} of {members}. Written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _chosen(backend: BackendName, device: str | None, dtype: DtypeName) -> dict[str, str]:
    """Options that are not as they are by default."""
    options = {"backend": backend.value, "device": device or "", "dtype": dtype.value}
    return {name: value for name, value in options.items() if value not in ("numpy", "", "float64")}


@app.command("verify")
def verify_command(
    sizes: Annotated[str, typer.Option("--sizes", help="Widths of the networks.")] = "6,7,8,5",
    members: Annotated[int, typer.Option("--members", min=1, help="Networks in the ensemble.")] = 4,
    backend: BackendOption = BackendName.numpy,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeName.float64,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> int:
    """Put every claim of the theory to the test; exit status 1 when one fails."""
    import natgrad_array as ng

    widths = parse_sizes(sizes)
    place = libraries.connect(backend.value, device, dtype.value)
    weights, task = check.draw(widths, members, seed, dtype.value, place)
    with libraries.one_thread(max(widths)):
        report = ng.verify(weights, task)
    result = check.as_json(report)
    about = {
        "version": version(),
        "backend": place.name,
        "device": place.device,
        "dtype": dtype.value,
        "sizes": widths,
        "members": members,
        "seed": seed,
    }
    if as_json:
        typer.echo(json.dumps(about | result, ensure_ascii=False, indent=2, allow_nan=False))
    else:
        screen = console()
        screen.print(
            f"{members} networks {'-'.join(map(str, widths))}, {report.regime} regime; "
            f"{place.name} on {place.device}, {dtype.value}.\n"
        )
        screen.print(check.table(report))
        screen.print(f"\n{'Every claim that applies holds.' if result['holds'] else 'A claim fails.'}")
    return 0 if result["holds"] else 1


@app.command("backends")
def backends_command() -> int:
    """Say which array libraries are there, and how to get the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("library", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("devices")
    table.add_column("remark", overflow="fold")
    for status in libraries.survey():
        table.add_row(status.name, status.version or "missing", "\n".join(status.devices) or output.DASH, status.remark)
    console().print(table)
    return 0


def progress() -> Progress:
    """A bar on stderr; nothing at all when that is not a terminal."""
    columns: tuple[Any, ...] = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
