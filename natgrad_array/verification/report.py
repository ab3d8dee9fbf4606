"""What `verify` returns: a row for each claim, and a table of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array


class Row(NamedTuple):
    """One claim of the theory, put to the test on every member.

    Attributes
    ----------
    equation : str
        Number in the supplement of Bernacchia, Lengyel and Hennequin (2018), or the name
        of a result beyond it.
    claim : str
        What must hold, in words.
    residual : array, shape (*batch,)
        By how much it does not, relative to the size of its terms.
    tolerance : array, shape (*batch,)
        What rounding explains at the network's condition and precision.
    holds : bool or array of bool, shape (*batch,), or None
        Whether the residual is within the tolerance; True for a member of a batch to
        which the claim does not apply. None where it applies to no member: the network is
        in another regime, or too ill-conditioned for its precision to tell.
    """

    equation: str
    claim: str
    residual: Array
    tolerance: Array
    holds: Any


class Report:
    """The claims of the theory on a network or an ensemble; made by `verify`.

    Attributes
    ----------
    rows : tuple of Row
        One for each claim.
    regime : {"wide", "intermediate", "bottleneck"}
        As `deep_linear.regime` says.
    batch_shape : tuple of int
        Shape of the ensemble.
    holds : bool or array of bool, shape (*batch,)
        Whether all rows that apply hold, per member.
    """

    def __init__(self, rows: tuple[Row, ...], regime: str, batch_shape: tuple[int, ...], holds: Any) -> None:
        self.rows = rows
        self.regime = regime
        self.batch_shape = batch_shape
        for row in rows:
            if row.holds is not None:
                holds = row.holds & holds
        self.holds = holds

    def __getitem__(self, equation: str) -> Row:
        """Return the row of an equation, by the text of its first column."""
        for row in self.rows:
            if row.equation == equation:
                return row
        raise KeyError(f"no row {equation!r}; there are {', '.join(row.equation for row in self.rows)}")

    def __str__(self) -> str:
        heads = ("equation", "claim", "residual", "tolerance", "holds")
        body = [(row.equation, row.claim, _worst(row.residual), _worst(row.tolerance), _verdict(row)) for row in self.rows]
        sizes = [max(len(line[k]) for line in (heads, *body)) for k in range(len(heads))]
        lines = ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip() for line in (heads, *body)]
        members = int(np.prod(self.batch_shape))
        held = int(np.sum(np.broadcast_to(_host(self.holds), self.batch_shape)))
        what = "1 network" if self.batch_shape == () else f"{members} networks"
        lines.insert(1, "  ".join("-" * size for size in sizes))
        lines.append(f"{what}, {self.regime} regime: every claim that applies holds for {held} of {members}")
        return "\n".join(lines)


def _host(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value) if isinstance(value, bool) else _arrays.to_numpy(value)


def _worst(values: Array) -> str:
    host = _host(values)
    if host.size == 0:
        return "-"
    return "nan" if np.all(np.isnan(host)) else f"{np.nanmax(host):.1e}"


def _verdict(row: Row) -> str:
    if row.holds is None:
        return "does not apply"
    held = _host(row.holds)
    return "yes" if bool(np.all(held)) else "NO" if held.ndim == 0 else f"NO, {int(np.sum(~held))} of {held.size} fail"
