"""One run at a time on a checkpoint or a store: a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockedError(RuntimeError):
    """Another run holds the lock."""


class Lock:
    """A file that is locked as long as its holder lives, and says who that is.

    The system releases the lock when the process ends, however it ends. A holder on another
    host cannot be asked whether it lives: its lock stands until its file is removed.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    LockedError
        If another run holds it.
    OSError
        If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = _read(self._descriptor)
            free = _try_lock(self._descriptor)
            elsewhere = bool(holder) and holder.get("host") != socket.gethostname()
            if not free or elsewhere:
                raise LockedError(_refusal(path, holder, elsewhere))
            text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}).encode()
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text, 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        # Who wrote the file is all that is known.
        holder = _read(descriptor)
        return not holder or holder.get("boot") != _boot()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _refusal(path: Path, holder: dict[str, Any], elsewhere: bool) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this host')}"
    if elsewhere:
        return f"{path.parent} is in use by {who}, which cannot be asked from here; if it is gone, remove {path}"
    return f"{path.parent} is in use by {who}; wait for it to end, or choose another path"


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _boot() -> str:
    """What tells one start of the system from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
