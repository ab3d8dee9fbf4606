"""How much memory there is, and that what arrays leave behind is kept."""

from __future__ import annotations

import math
import os
import sys

import numpy as np

from natgrad_array._arrays.libraries import Array, Namespace, Shape, is_cupy, is_torch


def _keep_freed_memory() -> None:
    """Have the C library's allocator keep what arrays leave behind, where it is glibc's.

    Once a block of this size has been freed, smaller ones come from memory that the process
    keeps (mallopt(3), on M_MMAP_THRESHOLD). Before that, arrays of a megabyte are mapped anew,
    page by page, in every step, which takes as long as the arithmetic of a small ensemble.
    Nothing is written to the block, so that it takes no memory itself.
    """
    np.empty(2**25 - 2**16, dtype=np.uint8)


_keep_freed_memory()


def available_bytes(array: Array) -> int | None:
    """Free memory on the device of `array`, or None where it cannot be told."""
    if is_cupy(array):
        return int(sys.modules["cupy"].cuda.runtime.memGetInfo()[0])
    if is_torch(array) and array.device.type == "cuda":
        return int(sys.modules["torch"].cuda.mem_get_info(array.device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_fits(what: str, shape: Shape, xp: Namespace, like: Array, instead: str) -> None:
    """Raise ValueError when an array of `shape` would not fit in memory, before it is made."""
    free = available_bytes(like)
    # An assembled matrix and the pieces it is assembled from live side by side.
    needed = 2 * math.prod(shape) * xp.finfo(like.dtype).bits // 8
    if free is not None and needed > free:
        raise ValueError(
            f"{what} of shape {shape} needs about {needed / 1e9:.1f} GB while {free / 1e9:.1f} GB are free; {instead}"
        )
