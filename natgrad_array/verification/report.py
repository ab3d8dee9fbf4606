"""What `verify` returns: a row for each claim, and a table of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
        body = [
            (row.equation, row.claim, _worst(row.residual), _worst(row.tolerance), _verdict(row)) for row in self.rows
        ]
        sizes = [max(len(line[k]) for line in (heads, *body)) for k in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip()
            for line in (heads, *body)
        ]
        members = math.prod(self.batch_shape)
        held = int(self.holds if isinstance(self.holds, bool) else _arrays.to_numpy(self.holds).sum())
        what = "1 network" if self.batch_shape == () else f"{members} networks"
        lines.insert(1, "  ".join("-" * size for size in sizes))
        lines.append(f"{what}, {self.regime} regime: every claim that applies holds for {held} of {members}")
        return "\n".join(lines)


def _worst(values: Array) -> str:
    """The largest entry that is a number."""
    host = _arrays.to_numpy(values)
    numbers = host[host == host]
    return f"{numbers.max():.1e}" if numbers.size else "-"


def _verdict(row: Row) -> str:
    if row.holds is None:
        return "does not apply"
    if isinstance(row.holds, bool):
        return "yes" if row.holds else "NO"
    held = _arrays.to_numpy(row.holds)
    return "yes" if held.all() else f"NO, {held.size - held.sum()} of {held.size} fail"
