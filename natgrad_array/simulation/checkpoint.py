"""Checkpoints: written whole or not at all, checked when read, and never more than data.

A checkpoint is a folder. A manifest names the files that belong to it with their sizes and
SHA-256 sums, and has a sum of its own; a new one takes the place of the old one by a
rename, after everything that it names is on the disk. The one before stays until the next
is complete. Arrays are stored in NumPy's format, with objects (pickles) refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from natgrad_array.simulation.lock import Lock, LockedError

FORMAT = 1
_LOCK = "lock"
_SUM = re.compile(r"\b[0-9a-f]{16,}\b")

Host = dict[str, np.ndarray[Any, Any]]


class CheckpointError(RuntimeError):
    """A checkpoint or a store cannot be used or written: the message says why, and what can be done.

    Parameters
    ----------
    message : str
        In words.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> import tempfile
    >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for rate in (0.5, 0.25):
    ...         try:
    ...             ng.simulate((np.eye(2),), task, learning_rate=rate, steps=3, checkpoint=f"{folder}/run")
    ...         except ng.simulation.CheckpointError as error:
    ...             print(str(error).partition(" is ")[2])
    History(batch_shape=(), steps=3, records=4 of loss; 0 diverged)
    the checkpoint of another run (learning_rate: 0.5 there, 0.25 here); choose another path
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Saved(NamedTuple):
    """What a checkpoint holds."""

    progress: dict[str, Any]
    """Where the run was."""
    state: Host
    appended: list[Host]
    """What was kept, in the order in which it came."""


class Checkpoint:
    """A folder that holds the state of one run.

    Parameters
    ----------
    path : str or path
        The folder; made if it is not there.
    interval : float
        Seconds between two checkpoints.
    fingerprint : mapping
        What makes this run another than others: JSON values by name.

    Raises
    ------
    CheckpointError
        If the folder cannot be written, is in use, or holds anything else than a checkpoint
        of the same run.
    """

    def __init__(self, path: str | os.PathLike[str], interval: float, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.interval, self.fingerprint = Path(path), interval, dict(fingerprint)
        self._appended: list[dict[str, Any]] = []
        self._number = 0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign_folder()
            self._lock = Lock(self.path / _LOCK)
        except LockedError as error:
            raise CheckpointError(str(error)) from None
        except OSError as error:
            raise CheckpointError(f"the checkpoint {self.path} cannot be written: {error.strerror}") from error
        self._last = time.monotonic()
        try:
            self.saved = self._load()
        except BaseException:
            self._lock.release()
            raise

    # --------------------------------------------------------------------------- writing

    def due(self) -> bool:
        """Whether the interval is over."""
        return time.monotonic() - self._last >= self.interval

    def save(self, progress: Mapping[str, Any], state: Host, appended: Host) -> None:
        """Write a checkpoint; what was appended before is kept.

        Raises
        ------
        CheckpointError
            If it cannot be written; the last one is kept.
        """
        number = self._number + 1
        try:
            kept = list(self._appended)
            if appended:
                kept.append(self._write_arrays(f"records-{number:08d}.npys", appended))
            payload = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "progress": dict(progress),
                "state": self._write_arrays(f"state-{number:08d}.npys", state),
                "appended": kept,
            }
            text = json.dumps(payload, sort_keys=True)
            content = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "payload": payload})
            self._write(f"manifest-{number:08d}.json", lambda file: file.write(content.encode()))
        except OSError as error:
            before = f"the last good one, number {self._number}, is kept" if self._number else "there is none before it"
            raise CheckpointError(
                f"checkpoint {number} could not be written to {self.path}: {error.strerror}; {before}"
            ) from error
        self._appended, self._number = kept, number
        for stale in (f"state-{number - 2:08d}.npys", f"manifest-{number - 2:08d}.json"):
            with contextlib.suppress(OSError):
                (self.path / stale).unlink()
        self._last = time.monotonic()

    def close(self) -> None:
        """Give the folder free."""
        self._lock.release()

    def _write_arrays(self, name: str, arrays: Host) -> dict[str, Any]:
        digest = hashlib.sha256()

        def write(file: BinaryIO) -> None:
            hashing = _Hashing(file, digest)
            for array in arrays.values():
                np.lib.format.write_array(hashing, np.asarray(array), allow_pickle=False)

        size = self._write(name, write)
        return {"file": name, "bytes": size, "sha256": digest.hexdigest(), "arrays": list(arrays)}

    def _write(self, name: str, write: Any) -> int:
        """Write a file under another name, bring it to the disk, and give it its name."""
        temporary = self.path / f"{name}.part"
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(temporary, self.path / name)
            _sync_folder(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return size

    # --------------------------------------------------------------------------- reading

    def _manifests(self) -> list[Path]:
        return sorted(self.path.glob("manifest-*.json"))

    def _refuse_foreign_folder(self) -> None:
        names = {entry.name for entry in self.path.iterdir()}
        strange = {name for name in names if name != _LOCK and not name.startswith(("manifest-", "state-", "records-"))}
        if strange:
            raise CheckpointError(
                f"{self.path} is not a checkpoint: it holds {', '.join(sorted(strange)[:3])}; choose another path"
            )

    def _load(self) -> Saved | None:
        manifests = self._manifests()
        if not manifests:
            return None
        newest = manifests[-1]
        try:
            payload = _read_manifest(newest)
            self._compare(payload["fingerprint"])
            saved = Saved(
                payload["progress"],
                self._read_arrays(payload["state"]),
                [self._read_arrays(entry) for entry in payload["appended"]],
            )
        except _DamagedError as error:
            instead = (
                f"remove {newest.name} to go on from the checkpoint before it, {manifests[-2].name}"
                if len(manifests) > 1
                else "there is none before it; remove the folder to start again"
            )
            raise CheckpointError(f"the checkpoint {self.path} is damaged: {error}; {instead}") from None
        self._number, self._appended = int(newest.stem.split("-")[1]), payload["appended"]
        return saved

    def _compare(self, other: Mapping[str, Any]) -> None:
        names = sorted(self.fingerprint.keys() | other.keys())
        different = [name for name in names if self.fingerprint.get(name) != other.get(name)]
        if different:
            shown = "; ".join(_difference(n, other.get(n), self.fingerprint.get(n)) for n in different)
            raise CheckpointError(f"{self.path} is the checkpoint of another run ({shown}); choose another path")

    def _read_arrays(self, entry: Mapping[str, Any]) -> Host:
        path = self.path / Path(str(entry["file"])).name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise _DamagedError(f"{path.name} has {size} bytes, expected {entry['bytes']}")
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise _DamagedError(f"{path.name} does not have its checksum")
                file.seek(0)
                return {name: np.lib.format.read_array(file, allow_pickle=False) for name in entry["arrays"]}
        except OSError as error:
            raise _DamagedError(f"{path.name} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise _DamagedError(f"{path.name} does not hold arrays of numbers: {error}") from None


class _DamagedError(Exception):
    """A file of a checkpoint is not what was written."""


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self.file, self.digest = file, digest

    def write(self, data: Any) -> int:
        """Write and hash."""
        self.digest.update(data)
        return self.file.write(data)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        payload: dict[str, Any] = content["payload"]
        text = json.dumps(payload, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != content["sha256"]:
            raise _DamagedError(f"{path.name} does not have its checksum")
        if payload["format"] != FORMAT:
            raise _DamagedError(f"{path.name} has format {payload['format']}, expected {FORMAT}")
    except OSError as error:
        raise _DamagedError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise _DamagedError(f"{path.name} is truncated or not a manifest") from None
    return payload


def _difference(name: str, there: Any, here: Any) -> str:
    """What differs, with both values where they can be compared by reading: sums cannot."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.keys() == here.keys():
        different = [key for key in here if there[key] != here[key]]
        there, here = ({key: value[key] for key in different} for value in (there, here))
    words = [_words(value) for value in (there, here)]
    if any(len(text) > 60 or _SUM.search(text) for text in words):
        return f"{name} {'differ' if name.endswith('s') else 'differs'}"
    return f"{name}: {words[0]} there, {words[1]} here"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [key if item == key else f"{key} {item}" for key, item in value.items()]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


def _sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk, where the system lets one."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
