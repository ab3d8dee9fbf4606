"""Where records go as they come: to memory here, to disk in `store`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.simulation.ensemble import Piece

Seen = tuple[Array, ...]
Host = dict[str, np.ndarray[Any, Any]]


class Sink(Protocol):
    """Takes records in order, one piece of the ensemble after the other."""

    def write(self, index: int, piece: Piece, record: int, seen: Seen) -> None:
        """Take the records from number `record` on, (records, members, ...), of piece number `index`."""

    def finish(self, index: int, piece: Piece, final: Mapping[str, Array]) -> None:
        """Take what a piece leaves at its end, by name."""

    def complete(self) -> None:
        """Take note that all pieces are there."""

    def appended(self) -> Host:
        """What a checkpoint has to keep of what came since `forget`."""

    def pending(self) -> Host:
        """What a checkpoint has to hold in place of what it held before."""

    def forget(self) -> None:
        """Take note that a checkpoint has what `appended` returned."""

    def restore(self, appended: list[Host], pending: Host, record: int) -> None:
        """Be as the sink was whose parts these are, with the next record to come."""


class Memory:
    """Keeps everything on the device it comes from."""

    is_complete = False

    def __init__(self, from_host: Callable[[np.ndarray[Any, Any]], Array], *, checkpointed: bool) -> None:
        self.from_host, self.checkpointed = from_host, checkpointed
        self.blocks: dict[int, list[Seen]] = {}
        self.finals: dict[int, dict[str, Array]] = {}
        self.fresh: dict[str, Array] = {}

    def write(self, index: int, piece: Piece, record: int, seen: Seen) -> None:
        """Keep a block; what comes from another process comes through the host."""
        seen = tuple(self._from_host(array) for array in seen)
        self.blocks.setdefault(index, []).append(seen)
        if self.checkpointed:
            self.fresh |= {f"record {index} {record} {k}": array for k, array in enumerate(seen)}

    def finish(self, index: int, piece: Piece, final: Mapping[str, Array]) -> None:
        """Keep what a piece leaves."""
        self.finals[index] = {name: self._from_host(array) for name, array in final.items()}
        if self.checkpointed:
            self.fresh |= {f"final {index} {name}": array for name, array in self.finals[index].items()}

    def _from_host(self, array: Array) -> Array:
        return self.from_host(array) if _arrays.is_numpy(array) else array

    def complete(self) -> None:
        """Nothing is left to do."""

    def appended(self) -> Host:
        """All that came since `forget`."""
        return {name: _arrays.to_numpy(array) for name, array in self.fresh.items()}

    def pending(self) -> Host:
        """Nothing is ever taken back."""
        return {}

    def forget(self) -> None:
        """Start over with what is new."""
        self.fresh = {}

    def restore(self, appended: list[Host], pending: Host, record: int) -> None:
        """Take it all again, in order."""
        for part in appended:
            blocks: dict[tuple[int, int], list[Array]] = {}
            for name, array in part.items():
                kind, index, rest = name.split(" ", 2)
                if kind == "final":
                    self.finals.setdefault(int(index), {})[rest] = self.from_host(array)
                else:
                    begin = int(rest.split(" ")[0])
                    blocks.setdefault((int(index), begin), []).append(self.from_host(array))
            for (piece, _), seen in blocks.items():
                self.blocks.setdefault(piece, []).append(tuple(seen))

    def results(self, xp: Namespace, names: tuple[str, ...], batch: Shape) -> tuple[dict[str, Array], dict[str, Array]]:
        """All records, (records, *batch, ...), and all that pieces left, (*batch, ...)."""
        order = sorted(self.finals)
        pieces = [
            tuple(_concat(xp, column, 0) for column in zip(*self.blocks.pop(index), strict=True)) for index in order
        ]
        records = {}
        for name, column in zip(names, zip(*pieces, strict=True), strict=True):
            whole = _concat(xp, column, 1)
            records[name] = xp.reshape(whole, (whole.shape[0], *batch, *whole.shape[2:]))
        finals = {}
        for name in list(self.finals[order[0]]):
            whole = _concat(xp, tuple(self.finals[index].pop(name) for index in order), 0)
            finals[name] = xp.reshape(whole, (*batch, *whole.shape[1:]))
        return records, finals


def _concat(xp: Namespace, arrays: tuple[Array, ...], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else xp.concat(arrays, axis=axis)
