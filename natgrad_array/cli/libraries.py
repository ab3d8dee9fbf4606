"""Array libraries as the command line sees them: versions, devices, and how to get them."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from natgrad_array._arrays import Array
from natgrad_array.cli.errors import CommandError


class BackendName(StrEnum):
    """The libraries that `--backend` takes."""

    numpy = "numpy"
    cupy = "cupy"
    torch = "torch"
    jax = "jax"


class DtypeName(StrEnum):
    """The floating types that `--dtype` takes."""

    float64 = "float64"
    float32 = "float32"


LONG = 200
"""Characters of a reason that fit in a message."""

SMALL = 128
"""Up to this width a matrix is not worth several threads."""

INSTALL = {
    "numpy": "python -m pip install numpy",
    "cupy": 'python -m pip install "natgrad-array[cuda12]", or "natgrad-array[cuda13]" with a CUDA 13 driver',
    "torch": "python -m pip install torch",
    "jax": "python -m pip install jax",
    "dask": 'python -m pip install "dask[array]"',
}


@dataclass(frozen=True)
class Backend:
    """A library and one of its devices, ready to make arrays on.

    Attributes
    ----------
    name : str
        The library.
    device : str
        The device, in its own words.
    asarray : callable
        Makes an array there of a NumPy array, dtype kept.
    """

    name: str
    device: str
    asarray: Callable[[np.ndarray[Any, Any]], Array]


@dataclass(frozen=True)
class Status:
    """What `natgrad-array backends` says of a library."""

    name: str
    version: str | None
    devices: tuple[str, ...]
    remark: str


# ------------------------------------------------------------------------------- one of them


def connect(name: str, device: str | None, dtype: str) -> Backend:
    """Open a library on a device, and try it."""
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise CommandError(f"backend {name} is not installed: {INSTALL[name]}") from error
    except Exception as error:  # a broken installation raises anything
        raise CommandError(f"backend {name} is installed but does not load: {error}") from error
    backend = _CONNECT[name](library, device, dtype)
    try:
        probe = backend.asarray(np.ones((1, 1), dtype=dtype))
        finite = bool((probe @ probe)[0, 0] == 1.0)
    except Exception as error:  # every library has its own way to say so
        raise _no_device(name, device, str(error)) from error
    if not finite:
        raise _no_device(name, device, "it does not compute")
    return backend


def _no_device(name: str, device: str | None, why: str) -> CommandError:
    which = "a device" if device is None else f"device {device!r}"
    line = why.strip().partition("\n")[0]
    # The first sentence says it; what libraries write after it are their insides.
    reason = (line if len(line) <= LONG else line.partition(". ")[0]) or "no reason given"
    return CommandError(f"{name} cannot use {which}: {reason}")


def _connect_numpy(numpy: Any, device: str | None, dtype: str) -> Backend:
    if device not in (None, "cpu"):
        raise _no_device("numpy", device, "it has no device but 'cpu'")
    return Backend("numpy", "cpu", lambda array: numpy.asarray(array, dtype=dtype))


def _connect_cupy(cupy: Any, device: str | None, dtype: str) -> Backend:
    if not cupy.cuda.is_available():
        raise _no_device("cupy", device, "there is no CUDA GPU, or no driver for it")
    count = int(cupy.cuda.runtime.getDeviceCount())
    platform, index = _platform_and_index(device or "cuda:0")
    if platform not in ("", "cuda", "gpu") or not 0 <= index < count:
        raise _no_device("cupy", device, f"there are {_cuda_names(count)}")
    cupy.cuda.Device(index).use()
    return Backend("cupy", f"cuda:{index}", lambda array: cupy.asarray(array, dtype=dtype))


def _connect_torch(torch: Any, device: str | None, dtype: str) -> Backend:
    chosen = device or "cpu"
    platform, index = _platform_and_index(chosen)
    if platform == "cuda":
        # torch itself answers with pages about its insides.
        count = int(torch.cuda.device_count())
        if not count:
            raise _no_device("torch", device, "there is no CUDA GPU, or a build of torch without CUDA")
        if not 0 <= index < count:
            raise _no_device("torch", device, f"there are {_cuda_names(count)}")
    return Backend("torch", chosen, lambda array: torch.asarray(array, dtype=getattr(torch, dtype), device=chosen))


def _connect_jax(jax: Any, device: str | None, dtype: str) -> Backend:
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        if device is None:
            chosen = jax.devices()[0]
        else:
            platform, index = _platform_and_index(device)
            chosen = jax.devices(platform or None)[index]
    except (RuntimeError, IndexError) as error:
        raise _no_device("jax", device, str(error)) from error
    return Backend("jax", str(chosen), lambda array: jax.device_put(np.asarray(array, dtype=dtype), chosen))


_CONNECT: dict[str, Callable[[Any, str | None, str], Backend]] = {
    "numpy": _connect_numpy,
    "cupy": _connect_cupy,
    "torch": _connect_torch,
    "jax": _connect_jax,
}


def _platform_and_index(device: str) -> tuple[str, int]:
    """Split "cuda:1", "cuda" or "1"; an index that is no number is −1, which no device has."""
    platform, _, index = device.partition(":")
    if platform.isdecimal() and not index:
        platform, index = "", platform
    return platform, int(index) if index.isdecimal() else (0 if device == platform else -1)


def _cuda_names(count: int) -> str:
    return ", ".join(f"cuda:{i}" for i in range(count))


def one_thread(widest: int) -> AbstractContextManager[Any]:
    """Keep the CPU from splitting small matrices over threads, which takes up to ten times the work."""
    try:
        limit = importlib.import_module("threadpoolctl").threadpool_limits
    except ImportError:
        return nullcontext()
    limited: AbstractContextManager[Any] = nullcontext() if widest > SMALL else limit(1)
    return limited


# -------------------------------------------------------------------------------- all of them


def survey() -> list[Status]:
    """Say what is there, whatever is missing or broken."""
    return [_status(name) for name in INSTALL]


def _status(name: str) -> Status:
    try:
        library = importlib.import_module(name)
    except ImportError:
        return Status(name, None, (), INSTALL[name])
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        return Status(name, None, (), f"installed, but does not load: {' '.join(str(error).split())}")
    version = str(getattr(library, "__version__", "unknown"))
    try:
        devices, remark = _DEVICES[name](library)
    except Exception as error:  # noqa: BLE001 - so does a broken driver
        return Status(name, version, (), f"its devices cannot be listed: {' '.join(str(error).split())}")
    return Status(name, version, devices, remark)


def _cpu(_: Any) -> tuple[tuple[str, ...], str]:
    return ("cpu",), ""


def _dask(_: Any) -> tuple[tuple[str, ...], str]:
    importlib.import_module("dask.array")
    return ("cpu",), "some functions, not --backend"


def _cupy(cupy: Any) -> tuple[tuple[str, ...], str]:
    if not cupy.cuda.is_available():
        return (), "no CUDA GPU, or no driver for it"
    runtime = cupy.cuda.runtime
    names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
    return tuple(f"cuda:{i} ({name})" for i, name in enumerate(names)), ""


def _torch(torch: Any) -> tuple[tuple[str, ...], str]:
    found = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    return tuple(found), "" if len(found) > 1 else "no CUDA GPU, or a build without CUDA"


def _jax(jax: Any) -> tuple[tuple[str, ...], str]:
    found = [f"{device.platform}:{device.id}" for device in jax.devices()]
    remark = 'no accelerator; for CUDA: python -m pip install "jax[cuda12]"' if jax.default_backend() == "cpu" else ""
    return tuple(found), remark


_DEVICES: dict[str, Callable[[Any], tuple[tuple[str, ...], str]]] = {
    "numpy": _cpu,
    "cupy": _cupy,
    "torch": _torch,
    "jax": _jax,
    "dask": _dask,
}
