"""A bar on a terminal or in a notebook: how far, how fast, how long still, and the worst member."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.simulation.datasets import need

LOSSES = ("loss", "training_loss", "held_out_loss", "excess_loss")
"""Records that the worst member is looked up in, the first that is there."""


def check_progress(value: Any) -> str | None:
    """What stands before the bar, None where none is asked for.

    Raises
    ------
    TypeError
        If `value` is neither a bool nor a text.
    """
    if not isinstance(value, bool | str):
        raise TypeError(f"progress must be True, False or a text that is put before the bar, got {value!r}")
    return value if isinstance(value, str) else "" if value else None


class Bar:
    """Counts steps of members; nothing at all where it is not wanted, or nobody looks.

    Parameters
    ----------
    title : str or None
        What stands before it; None for no bar.
    total : int
        Steps of all members.
    done : int
        Steps that were made before.

    Raises
    ------
    ModuleNotFoundError
        If it is wanted and rich is not installed (the extra "simulation").
    """

    def __init__(self, title: str | None, total: int, done: int = 0) -> None:
        self._bar: Any = None
        if title is None:
            return
        console = need("rich.console").Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            return
        rich = need("rich.progress")
        # Drawn when it is told something: no thread of its own beside those that compute.
        self._bar = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.TextColumn("{task.fields[rate]}", markup=False),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[worst]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._job = self._bar.add_task(title, total=max(total, 1), completed=done, rate="", worst="")

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int, seen: Mapping[str, Array]) -> None:
        """Count steps; one scalar of the last record comes to the host where the bar is drawn."""
        if self._bar is None:
            return
        self._bar.update(self._job, advance=steps)
        speed = self._bar.tasks[0].speed
        rate = "" if speed is None else f"{_short(speed)} steps/s"
        self._bar.update(self._job, rate=rate, worst=worst(seen), refresh=True)


def worst(seen: Mapping[str, Array]) -> str:
    """The largest loss of the last record, of the members that have one; nothing where no loss is recorded."""
    name = next((name for name in LOSSES if name in seen), None)
    if name is None or 0 in seen[name].shape:
        return ""
    losses = seen[name][-1, ...]
    xp = _arrays.namespace(losses)
    found = float(xp.max(xp.where(xp.isnan(losses), -xp.inf, losses)))
    return "all diverged" if found == -float("inf") else f"worst {name.replace('_', ' ')} {found:.3g}"


def _short(number: float) -> str:
    """Three digits and a prefix."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{prefix}"
    return f"{number:.3g}"
