"""The array libraries that are measured, behind the few things in which they differ."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NAMES = ("numpy", "torch", "jax", "cupy")
DTYPES = ("float64", "float32")


def usable_cpus() -> int:
    """CPUs that this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# JAX sizes its pool of threads by NPROC. Compiled for the CPU (0.10.2), independent factorisations
# of stacks wait for each other for ever when there are more of them than threads, whoever wrote
# them: two in two threads, six LU in four. All of these variables are read once, on import.
os.environ.setdefault("NPROC", str(max(16, usable_cpus())))
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # no TF32
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
os.environ["CUPY_TF32"] = "0"


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _nothing(result: Any) -> None:
    """Wait for nothing: the library has computed when it returns."""


@dataclass(frozen=True)
class Backend:
    """One library on one device.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    xp : module
        The library's own namespace, not a compatible one: peers are written for it.
    device : str
        The device, in words.
    asarray : callable
        Makes an array there of a NumPy array, dtype kept.
    to_numpy : callable
        Undoes `asarray`.
    synchronise : callable
        Waits until a result (an array, or tuples of them) is there.
    jit : callable
        Compiles a function of arrays where the library can; returns it as it is elsewhere.
    """

    name: str
    xp: Any
    device: str
    asarray: Callable[[Any], Any]
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    synchronise: Callable[[Any], None] = _nothing
    jit: Callable[[Callable[..., Any]], Callable[..., Any]] = _same

    @property
    def version(self) -> str:
        """Version of the library."""
        return str(self.xp.__version__ if self.name != "jax" else importlib.import_module("jax").__version__)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is not the host's processor."""
        return self.device != "cpu"


@functools.cache
def connect(name: str) -> Backend:
    """Open a library.

    Raises
    ------
    NotImplementedError
        If it is not installed or has no device: what ASV takes for "does not apply here".
    """
    try:
        return {"numpy": _numpy, "torch": _torch, "jax": _jax, "cupy": _cupy}[name]()
    except ImportError as error:
        raise NotImplementedError(f"{name} is not installed") from error


def available() -> tuple[str, ...]:
    """Names of the libraries that can be opened here."""
    found = []
    for name in NAMES:
        try:
            connect(name)
        except NotImplementedError:
            continue
        found.append(name)
    return tuple(found)


def _numpy() -> Backend:
    return Backend("numpy", np, "cpu", np.ascontiguousarray)


def _torch() -> Backend:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Backend(
            "torch",
            torch,
            name,
            lambda array: torch.asarray(np.ascontiguousarray(array), device="cuda"),
            lambda array: array.cpu().numpy(),
            lambda result: torch.cuda.synchronize(),
        )
    return Backend("torch", torch, "cpu", lambda array: torch.asarray(np.array(array)), lambda array: array.numpy())


def load_jax() -> Any:
    """Import JAX with one thread for each LAPACK call.

    JAX runs the factorisations of a stack on threads of its own, and OpenBLAS's threads
    below them then get in each other's way. SciPy's
    OpenBLAS, which JAX uses, reads the number when it is loaded; NumPy's is another one.
    """
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        import jax
        import scipy.linalg  # noqa: F401
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before
    return jax


def _jax() -> Backend:
    jax = load_jax()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    (device, *_) = jax.devices()
    name = "cpu" if device.platform == "cpu" else str(device.device_kind)
    return Backend("jax", jax.numpy, name, jax.numpy.asarray, np.asarray, jax.block_until_ready, jax.jit)


def _cupy() -> Backend:
    import cupy

    if not cupy.cuda.is_available():
        raise NotImplementedError("CuPy finds no CUDA GPU, or no driver for it")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return Backend(
        "cupy",
        cupy,
        properties["name"].decode(),
        cupy.asarray,
        cupy.asnumpy,
        lambda result: cupy.cuda.get_current_stream().synchronize(),
    )
