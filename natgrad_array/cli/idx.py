"""IDX files, the format of MNIST: a magic number, sizes, and unsigned bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from natgrad_array.cli.errors import CommandError

_BYTES = 0x08


def read_idx(path: Path, option: str, *, ndim: int) -> np.ndarray[Any, Any]:
    """Read an array of unsigned bytes.

    Parameters
    ----------
    path : Path
        The file; it is unpacked if it starts as a gzip file does.
    option : str
        What error messages call it.
    ndim : int
        How many axes it must have.

    Raises
    ------
    CommandError
        If it cannot be read, is no such file, or is shorter or longer than it says.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{option} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _BYTES:
        raise CommandError(f"{option} {path} is not an IDX file of unsigned bytes")
    if content[3] != ndim:
        raise CommandError(f"{option} {path} must have {ndim} axes, got {content[3]}")
    start = 4 + 4 * ndim
    if len(content) < start:
        raise CommandError(f"{option} {path} breaks off within its header")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise CommandError(f"{option} {path} must hold {size} bytes after its header, got {len(content) - start}")
    if 0 in shape:
        raise CommandError(f"{option} {path} is empty: {' x '.join(map(str, shape))}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
