"""Records on disk as they come: a Zarr store that xarray opens."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.simulation.checkpoint import CheckpointError
from natgrad_array.simulation.datasets import need
from natgrad_array.simulation.ensemble import Piece
from natgrad_array.simulation.history import Axes, core_dimensions
from natgrad_array.simulation.lock import Lock, LockedError
from natgrad_array.simulation.sinks import Host, Seen

CHUNK_BYTES = 2**22
"""About so much goes to disk at a time: smaller files cost more to open than to read."""


@contextlib.contextmanager
def new_group(path: str) -> Iterator[Any]:
    """Make a Zarr group that is at its path only when it is whole, whenever this process dies.

    A process that is killed may leave a hidden folder beside the path, with arrays that hold nothing.
    """
    final = Path(path).absolute()
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
        unfinished = Path(folder) / final.name
        yield need("zarr").open_group(str(unfinished), mode="w-", zarr_format=3)
        unfinished.rename(final)


class Layout:
    """Names, shapes and dtypes of all that a store holds.

    Parameters
    ----------
    steps : tuple of int
        Recorded steps.
    axes : Axes
        The batch.
    records : mapping of str to shape
        Core shapes of records.
    finals : mapping of str to (shape, dtype, names of axes)
        Core shapes of what pieces leave.
    dtype : str
        Of records.
    pieces : tuple of Piece
        Chunks are as long as the first of them, the largest.
    """

    def __init__(
        self,
        steps: tuple[int, ...],
        axes: Axes,
        records: Mapping[str, Shape],
        finals: Mapping[str, tuple[Shape, str, tuple[str, ...]]],
        dtype: str,
        pieces: tuple[Piece, ...],
    ) -> None:
        self.steps, self.axes, self.records, self.finals, self.dtype = steps, axes, records, finals, dtype
        self.block = tuple(max(1, s.stop - s.start) for s in pieces[0].region)
        record = np.dtype(dtype).itemsize * sum(math.prod(core) for core in records.values())
        size = max(1, record * pieces[0].members)
        self.depth = min(len(steps), max(1, CHUNK_BYTES // size))


class Store:
    """A Zarr group with one array for each record, which grows chunk by chunk.

    Parameters
    ----------
    path : str
        Where; it must not be there, unless a checkpointed run goes on.
    layout : Layout
        What it will hold.
    attributes : mapping
        JSON values.
    digest : str
        Of the fingerprint of the run.
    resumed : bool
        Whether a store of the same run may be there.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    CheckpointError
        If another run is writing there, or a store of the same run was expected.
    """

    def __init__(
        self, path: str, layout: Layout, attributes: Mapping[str, Any], digest: str, *, resumed: bool, begun: bool
    ) -> None:
        self.path, self.layout = path, layout
        self.buffer: list[tuple[np.ndarray[Any, Any], ...]] = []
        self.begin = 0
        self.is_complete = False
        zarr = need("zarr")
        try:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(Path(f"{path}.lock"))
        except LockedError as error:
            raise CheckpointError(str(error)) from None
        except OSError as error:
            raise CheckpointError(f"the store {path} cannot be written: {error.strerror}") from error
        try:
            self.group = self._open(zarr, attributes, digest, resumed, begun)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, zarr: Any, attributes: Mapping[str, Any], digest: str, resumed: bool, begun: bool) -> Any:
        if Path(self.path).exists():
            try:
                group = zarr.open_group(self.path, mode="r+")
                same = group.attrs.get("fingerprint") == digest
            except (FileNotFoundError, ValueError, KeyError):
                same = False
            if same:
                self.is_complete = bool(group.attrs["complete"])
                if self.is_complete or resumed:
                    return group
            what = "was begun by this same run without a checkpoint" if same else "is another run's, or no store"
            raise FileExistsError(f"store {self.path!r} {what}; choose another path")
        if begun:
            raise CheckpointError(
                f"the store {self.path} of the checkpointed run is gone; remove the checkpoint to start again"
            )
        with new_group(self.path) as group:
            self._create(group, attributes, digest)
        return zarr.open_group(self.path, mode="r+")

    def _create(self, group: Any, attributes: Mapping[str, Any], digest: str) -> None:
        layout, names = self.layout, self.layout.axes.names
        group.attrs.update({**attributes, "fingerprint": digest, "complete": False})
        fill = float("nan")
        for name, core in layout.records.items():
            group.create_array(
                name,
                shape=(len(layout.steps), *layout.axes.shape, *core),
                chunks=(layout.depth, *layout.block, *(max(1, n) for n in core)),
                dtype=layout.dtype,
                fill_value=fill,
                dimension_names=("step", *names, *core_dimensions(name, len(core))),
            )
        for name, (core, dtype, dimensions) in layout.finals.items():
            group.create_array(
                name,
                shape=(*layout.axes.shape, *core),
                chunks=(*layout.block, *core),
                dtype=dtype,
                fill_value=fill if dtype == layout.dtype else -1,
                dimension_names=(*names, *dimensions),
            )
        coordinates = {"step": np.asarray(layout.steps)}
        for name, values in zip(names, layout.axes.values, strict=True):
            if values is not None:
                coordinates[name] = np.asarray(values)
        for name, values in coordinates.items():
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, dimension_names=(name,))
            array[...] = values

    # ------------------------------------------------------------------------ as a sink

    def write(self, index: int, piece: Piece, record: int, seen: Seen) -> None:
        """Take a block; write whole chunks, and hold what is left back."""
        if not self.buffer:
            self.begin = record
        self.buffer.append(tuple(_arrays.to_numpy(array) for array in seen))
        there = self.begin + sum(len(block[0]) for block in self.buffer)
        whole = there - there % self.layout.depth
        if whole > self.begin:
            self._flush(piece, whole - self.begin)

    def _flush(self, piece: Piece, count: int) -> None:
        """Write the first records of the buffer."""
        columns = [np.concatenate(column) for column in zip(*self.buffer, strict=True)]
        lengths = tuple(s.stop - s.start for s in piece.region)
        for name, column in zip(self.layout.records, columns, strict=True):
            values = column[:count].reshape(count, *lengths, *column.shape[2:])
            self._assign(name, (slice(self.begin, self.begin + count), *piece.region), values)
        self.begin += count
        rest = tuple(column[count:].copy() for column in columns)
        self.buffer = [rest] if len(rest[0]) else []

    def _assign(self, name: str, where: tuple[slice, ...], values: np.ndarray[Any, Any]) -> None:
        try:
            self.group[name][where] = values
        except OSError as error:
            raise CheckpointError(f"the store {self.path} could not be written: {error.strerror}") from error

    def finish(self, index: int, piece: Piece, final: Mapping[str, Array]) -> None:
        """Write the rest of a piece, and what it leaves."""
        if self.buffer:
            self._flush(piece, sum(len(block[0]) for block in self.buffer))
        lengths = tuple(s.stop - s.start for s in piece.region)
        for name, array in final.items():
            values = _arrays.to_numpy(array)
            self._assign(name, piece.region, values.reshape(*lengths, *values.shape[1:]))

    def complete(self) -> None:
        """Say so in the store."""
        self.group.attrs["complete"] = True

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def appended(self) -> Host:
        """Nothing: it is on disk."""
        return {}

    def pending(self) -> Host:
        """What was held back."""
        if not self.buffer:
            return {}
        columns = [np.concatenate(column) for column in zip(*self.buffer, strict=True)]
        return {f"pending {k}": column for k, column in enumerate(columns)}

    def forget(self) -> None:
        """Nothing is kept twice."""

    def restore(self, appended: list[Host], pending: Host, record: int) -> None:
        """Hold the same back."""
        columns = tuple(pending[name] for name in sorted(pending, key=_place) if name.startswith("pending "))
        self.buffer = [columns] if columns else []
        self.begin = record - (len(columns[0]) if columns else 0)

    def results(self, xp: Namespace, names: tuple[str, ...], batch: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
        """Zarr's arrays of records and weights, read when they are indexed; what is small comes as NumPy arrays."""
        group = need("zarr").open_group(self.path, mode="r")
        finals = {name: group[name] for name in self.layout.finals}
        return (
            {name: group[name] for name in names},
            {name: array if name.startswith("weights_") else array[...] for name, array in finals.items()},
        )


def _place(name: str) -> int:
    digits = name.rpartition(" ")[2]
    return int(digits) if digits.isdigit() else -1
