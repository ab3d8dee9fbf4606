"""Sweep files: what `natgrad-array simulate` runs, read as data and checked before anything runs."""

from __future__ import annotations

import difflib
import math
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad_array.cli.errors import CommandError
from natgrad_array.deep_linear.slopes import RULES
from natgrad_array.simulation.deep_linear import INTEGRATORS
from natgrad_array.simulation.observables import OBSERVABLES
from natgrad_array.simulation.schedule import MOST_STEPS, log_steps, schedule

INITS = ("balanced", "aligned", "gaussian", "orthogonal")
KEYS = (
    "steps",
    "record",
    "record_every",
    "integrator",
    "freeze_converged",
    "temperature",
    "label_noise",
    "noise_seed",
    "max_bytes",
    "init",
    "task.singular_values",
    "task.inputs",
    "task.outputs",
    "grid.rule",
    "grid.depth",
    "grid.width",
    "grid.learning_rate",
    "grid.initial_scale",
    "grid.seeds",
)
POINTS = 50
"""Records on the logarithmic grid that is used where `record_every` is not given."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes
    ----------
    steps, record_every, record, integrator, freeze_converged, temperature, label_noise, noise_seed, max_bytes
        Options of `simulate`.
    init : str
        How networks start.
    singular_values, inputs, outputs
        The teacher.
    rule, depth, width : tuple
        Groups.
    learning_rate, initial_scale : tuple of float
        Axes of the batch; the last axis are the seeds.
    seeds : int
        How many networks there are of each kind.
    """

    steps: int
    record_every: int | None
    record: tuple[str, ...]
    integrator: str
    freeze_converged: float | None
    temperature: float | None
    label_noise: float | None
    noise_seed: int
    max_bytes: int | None
    init: str
    singular_values: tuple[float, ...]
    inputs: int
    outputs: int
    rule: tuple[str, ...]
    depth: tuple[int, ...]
    width: tuple[int, ...]
    learning_rate: tuple[float, ...]
    initial_scale: tuple[float, ...]
    seeds: int

    @property
    def recorded(self) -> tuple[int, ...]:
        """The steps that are recorded."""
        if self.record_every is None:
            return log_steps(self.steps, count=POINTS)
        return schedule(self.steps, self.record_every, None)

    @property
    def batch(self) -> tuple[int, int, int]:
        """Members of each group: learning rates, initial scales and seeds."""
        return len(self.learning_rate), len(self.initial_scale), self.seeds

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """Rule, depth and width of each ensemble; a network of one layer has no width."""
        narrow = [(rule, depth, width) for rule in self.rule for depth in self.depth for width in self.width]
        return [group for group in narrow if group[1] > 1 or group[2] == self.width[0]]

    def sizes(self, depth: int, width: int) -> tuple[int, ...]:
        """Widths of all layers."""
        return (self.inputs, *(width,) * (depth - 1), self.outputs)


class _Reader:
    """Takes keys out of a file; what is wrong with one is said with its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise CommandError(f"{path} is not a text file: {error.reason} at byte {error.start}") from error
        try:
            self.content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise CommandError(f"{path} is not a TOML file: {error}") from error
        self.lines = _lines(text)
        self._refuse_unknown()

    def refuse(self, key: str, why: str) -> CommandError:
        """What is wrong with a key, and where it is."""
        line = self.lines.get(key) or self.lines.get(key.rpartition(".")[0])
        where = f"{self.path}, line {line}" if line else str(self.path)
        return CommandError(f"{where}: {key} {why}")

    def take(self, key: str, check: Callable[[Any], bool], expected: str, default: Any = ...) -> Any:
        """A value, or its default where the key is not there."""
        table, _, name = key.rpartition(".")
        values = self.content.get(table, {}) if table else self.content
        if not isinstance(values, dict):
            raise self.refuse(table, f"must be a table, [{table}], got {_shown(values)}")
        if name not in values:
            if default is ...:
                raise self.refuse(key, f"is missing: it must be {expected}")
            return default
        if not check(values[name]):
            raise self.refuse(key, f"must be {expected}, got {_shown(values[name])}")
        return values[name]

    def several(self, key: str, check: Callable[[Any], bool], expected: str, default: Any = ...) -> tuple[Any, ...]:
        """A value or a list of different ones."""

        def fits(value: Any) -> bool:
            return bool(value) and all(map(check, value)) if isinstance(value, list) else check(value)

        found = self.take(key, fits, f"{expected}, or a list of such", default)
        values = tuple(found) if isinstance(found, list) else (found,)
        if len(set(values)) < len(values):
            raise self.refuse(key, f"must have everything once, got {_shown(found)}")
        return values

    def _refuse_unknown(self) -> None:
        """Refuse the first key that means nothing."""
        tables = {key.rpartition(".")[0] for key in KEYS} - {""}
        for name, value in self.content.items():
            inner = [f"{name}.{key}" for key in value] if name in tables and isinstance(value, dict) else [name]
            for key in inner:
                if key in KEYS or key in tables:
                    continue
                close = difflib.get_close_matches(key, KEYS, n=1)
                meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(KEYS)}"
                raise self.refuse(key, f"is not known: {meant}")


def read(path: Path) -> Sweep:
    """Read a sweep file; nothing in it is run.

    Raises
    ------
    CommandError
        If it is not one: the key and the line are named.
    """
    file = _Reader(path)
    values = file.take(
        "task.singular_values",
        lambda v: isinstance(v, list) and len(v) > 0 and all(_is_number(s) for s in v),
        "a list of numbers of at least 0, the teacher's modes",
    )
    modes = len(values)

    def holds(value: Any) -> bool:
        return _is_count(value) and value >= modes

    found = Sweep(
        steps=file.take("steps", _is_count, f"an integer from 1 to {MOST_STEPS}"),
        record_every=file.take("record_every", _is_count, f"an integer from 1 to {MOST_STEPS}", None),
        record=file.several("record", _one_of(OBSERVABLES), f"one of {', '.join(OBSERVABLES)}", "loss"),
        integrator=file.take("integrator", _one_of(INTEGRATORS), f"one of {', '.join(INTEGRATORS)}", "euler"),
        freeze_converged=file.take("freeze_converged", _is_number, "a number of at least 0", None),
        temperature=file.take("temperature", _is_number, "a number of at least 0", None),
        label_noise=file.take("label_noise", _is_number, "a number of at least 0", None),
        noise_seed=file.take("noise_seed", lambda v: _is_integer(v) and v >= 0, "an integer of at least 0", 0),
        max_bytes=file.take("max_bytes", lambda v: _is_integer(v) and v > 0, "a positive integer", None),
        init=file.take("init", _one_of(INITS), f"one of {', '.join(INITS)}", "balanced"),
        singular_values=tuple(map(float, values)),
        inputs=file.take("task.inputs", holds, f"an integer of at least {modes}, the number of modes", modes),
        outputs=file.take("task.outputs", holds, f"an integer of at least {modes}, the number of modes", modes),
        rule=file.several("grid.rule", _one_of(RULES), f"one of {', '.join(RULES)}", "layerwise"),
        depth=file.several("grid.depth", _is_count, "a positive integer", 2),
        width=file.several("grid.width", _is_count, "a positive integer", max(1, modes)),
        learning_rate=_floats(file.several("grid.learning_rate", _is_number, "a number of at least 0")),
        initial_scale=_floats(file.several("grid.initial_scale", _is_number, "a number of at least 0", 1.0)),
        seeds=file.take("grid.seeds", _is_count, "a positive integer", 1),
    )
    if found.init == "aligned" and min(found.width) < modes and max(found.depth) > 1:
        raise file.refuse("grid.width", f"must be at least {modes}, the number of modes, where init is 'aligned'")
    if min(found.depth) < 2 and "balancedness" in found.record:
        raise file.refuse("record", "must not name 'balancedness' where grid.depth has 1: it is between two layers")
    return found


def check_size(sweep: Sweep, path: Path, folder: Path, itemsize: int) -> None:
    """Refuse a grid whose results would not fit on the disk, before any list of it is made.

    Raises
    ------
    CommandError
        With the key that is largest.
    """
    file = _Reader(path)
    scalars = {"end_to_end": sweep.inputs * sweep.outputs, "modes": sweep.outputs, "rates": sweep.outputs}
    count = sweep.steps if sweep.record_every is None else sweep.steps // sweep.record_every + 2
    records = min(count, POINTS + 2) if sweep.record_every is None else count
    names = {*sweep.record, "excess_loss"}
    each = records * sum(scalars.get(name, 1) for name in names)
    members = math.prod(sweep.batch)
    total = len(sweep.rule) * sum(
        members * itemsize * (each + _parameters(sweep, depth, width)) for depth in sweep.depth for width in sweep.width
    )
    free = shutil.disk_usage(folder).free
    if total > free or records > 10**7:
        lengths = {
            "steps": records,
            "grid.seeds": sweep.seeds,
            "grid.width": max(sweep.width),
            "grid.depth": max(sweep.depth),
            "grid.learning_rate": len(sweep.learning_rate),
            "grid.initial_scale": len(sweep.initial_scale),
        }
        groups = len(sweep.rule) * len(sweep.depth) * len(sweep.width)
        key = max(lengths, key=lambda name: lengths[name])
        raise file.refuse(
            key,
            f"is too much: {members * groups} networks with {records} records leave about {total / 1e9:.3g} GB, "
            f"while {free / 1e9:.3g} GB are free in {folder}",
        )


def _parameters(sweep: Sweep, depth: int, width: int) -> int:
    """Weights of a network, without a list of its widths."""
    if depth == 1:
        return sweep.inputs * sweep.outputs
    return width * (sweep.inputs + sweep.outputs + (depth - 2) * width)


def _lines(text: str) -> dict[str, int]:
    """Where keys and tables stand; keys of inline tables are where these are."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            table = header[1].strip("\"'")
            found.setdefault(table, number)
        elif key := re.match(r"\s*([\w\-\"'. ]+?)\s*=", line):
            name = ".".join(part.strip().strip("\"'") for part in key[1].split("."))
            found.setdefault(f"{table}.{name}" if table else name, number)
            found.setdefault(table or name.partition(".")[0], number)
    return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < math.inf


def _one_of(options: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in options


def _floats(values: tuple[Any, ...]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
