"""What the demo learns: scikit-learn's digits, or arrays from a file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from natgrad_array.cli.errors import CommandError

_UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Data(NamedTuple):
    """Samples on axis 0."""

    name: str
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]


def digits() -> Data:
    """8 × 8 images of handwritten digits, pixels in [0, 1], and their labels as unit vectors."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Data("scikit-learn's digits", bunch.data / 16.0, np.eye(10)[bunch.target])


def read(path: Path) -> Data:
    """Read arrays x (N, n_0) and y (N, n_L) from an npz file; nothing is unpickled."""
    try:
        # numpy.load leaves a file open that it cannot read.
        with path.open("rb") as file:
            return _samples(file, path)
    except OSError as error:
        raise CommandError(f"--data {path} cannot be read: {error.strerror or error}") from error


def _samples(file: BinaryIO, path: Path) -> Data:
    try:
        archive = np.load(file, allow_pickle=False)
    except _UNREADABLE as error:
        raise CommandError(f"--data {path} is not an npz file") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CommandError(f"--data {path} is not an npz file, but a single array; save x and y with numpy.savez")
    with archive:
        x, y = (_array(archive, path, name) for name in ("x", "y"))
    if x.shape[0] != y.shape[0]:
        raise CommandError(f"--data {path}: x and y must have as many rows, got {x.shape[0]} and {y.shape[0]}")
    if not x.any():
        raise CommandError(f"--data {path}: x is zero everywhere, so there is nothing to learn from")
    return Data(path.name, x, y)


def _array(archive: Any, path: Path, name: str) -> np.ndarray[Any, Any]:
    if name not in archive.files:
        raise CommandError(f"--data {path} must hold arrays x and y, got {', '.join(archive.files) or 'none'}")
    try:
        array = archive[name]
    except _UNREADABLE as error:
        broken = "holds Python objects, which are not unpickled" if "allow_pickle" in str(error) else "cannot be read"
        raise CommandError(f"--data {path}: {name} {broken}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise CommandError(f"--data {path}: {name} must hold real numbers, got {getattr(array, 'dtype', 'no array')}")
    if array.ndim != 2 or 0 in array.shape:
        raise CommandError(f"--data {path}: {name} must have shape (samples, features), neither 0, got {array.shape}")
    bad = int(np.sum(~np.all(np.isfinite(array), axis=1)))
    if bad:
        raise CommandError(f"--data {path}: {name} has NaN or Inf in {bad} of {array.shape[0]} rows")
    return array.astype(np.float64)
