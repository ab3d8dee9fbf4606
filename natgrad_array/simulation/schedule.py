"""When a simulation records."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from natgrad_array import _arrays

MOST_STEPS = 2**31 - 1
"""Step numbers are 32-bit integers on every library."""


def log_steps(steps: int, /, *, count: int = 50) -> tuple[int, ...]:
    """Steps on a logarithmic grid, for `record_at` of `simulate`.

    Parameters
    ----------
    steps : int
        The last step.
    count : int
        How many points the grid has; neighbours that round to one step are one.

    Returns
    -------
    tuple of int
        0, and the grid from 1 to `steps`, ascending.

    Raises
    ------
    ValueError
        If an argument is not a positive integer.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> ng.simulation.log_steps(1000, count=7)
    (0, 1, 3, 10, 32, 100, 316, 1000)
    """
    steps = check_count("steps", steps)
    grid = np.geomspace(1.0, steps, check_count("count", count))
    return tuple(sorted({0, steps, *(int(step) for step in np.rint(grid))}))


def schedule(steps: int, every: Any, at: Any) -> tuple[int, ...]:
    """The steps that are recorded, ascending, the first and the last one among them."""
    if every is not None and at is not None:
        raise ValueError("record_every and record_at exclude each other, got both")
    if at is None:
        return (*range(0, steps, check_count("record_every", 1 if every is None else every)), steps)
    if isinstance(at, np.ndarray):
        at = at.tolist()
    valid = isinstance(at, Sequence) and all(_arrays.is_integer(step) and 0 <= step <= steps for step in at)
    if not valid:
        raise ValueError(f"record_at must be integers from 0 to {steps}, the number of steps, got {at!r}")
    return tuple(sorted({0, steps, *map(int, at)}))


def intervals(recorded: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of steps between records."""
    return tuple(after - before for before, after in itertools.pairwise(recorded))


def check_count(name: str, value: Any) -> int:
    """A positive integer that a 32-bit number holds."""
    if not _arrays.is_integer(value) or not 1 <= value <= MOST_STEPS:
        raise ValueError(f"{name} must be an integer from 1 to {MOST_STEPS}, got {value!r}")
    return int(value)
