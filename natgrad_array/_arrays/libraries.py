"""The array library of an array, and what all libraries have under one name."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import array_api_compat as compat
import numpy as np

Array: TypeAlias = Any


Namespace: TypeAlias = Any


Shape: TypeAlias = tuple[int, ...]


quiet = np.errstate(invalid="ignore", over="ignore")
"""A decorator: an Inf comes out as a NaN or an Inf of its own member; NumPy alone would also warn."""


def namespace(array: Array) -> Namespace:
    """The namespace of an array that has been checked before."""
    return compat.array_namespace(array)


def device(array: Array) -> Any:
    """The device of an array; None for a JAX tracer, which has none yet."""
    return compat.device(array)


def eye(xp: Namespace, n: int, like: Array) -> Array:
    """Identity matrix of the dtype and device of `like`."""
    return xp.eye(n, dtype=like.dtype, device=device(like))


def asarray_like(xp: Namespace, value: Any, like: Array) -> Array:
    """`value` (a NumPy array or nested numbers) as an array of `like`'s dtype and device."""
    return xp.asarray(value, dtype=like.dtype, device=device(like))


def eps(xp: Namespace, like: Array) -> float:
    """Machine epsilon of the dtype of `like`."""
    return _eps(xp, like.dtype)


def item_bytes(xp: Namespace, like: Array) -> int:
    """Bytes of one number of the dtype of `like`."""
    return int(xp.finfo(like.dtype).bits) // 8


@functools.cache
def _eps(xp: Namespace, dtype: Any) -> float:
    return float(xp.finfo(dtype).eps)


def finite_members(xp: Namespace, *arrays: Array) -> Array:
    """Which members of a stack of matrices have no NaN or Inf, with core axes kept as ones."""
    flags = []
    for array in arrays:
        if is_torch(array) and 0 not in array.shape[-2:]:
            # One pass over memory in place of three.
            norm = sys.modules["torch"].linalg.vector_norm(array, ord=math.inf, dim=(-2, -1), keepdim=True)
            flags.append(xp.isfinite(norm))
        else:
            flags.append(xp.all(xp.isfinite(array), axis=(-2, -1), keepdims=True))
    result = flags[0]
    for flag in flags[1:]:
        result = result & flag
    return result


def nan_unless_finite(xp: Namespace, array: Array) -> Array:
    """A stack of matrices with every member that holds a NaN or an Inf made all NaN.

    Inf − Inf and 0 · Inf make NumPy warn, NaN does not.
    """
    return xp.where(finite_members(xp, array), array, xp.nan)


def is_numpy(array: Array) -> bool:
    """Whether it is a NumPy array or scalar."""
    return isinstance(array, np.ndarray | np.generic)


def is_torch(array: Array) -> bool:
    """Whether it is a torch tensor."""
    return not is_numpy(array) and bool(compat.is_torch_array(array))


def is_jax(array: Array) -> bool:
    """Whether it is a JAX array or tracer."""
    return not is_numpy(array) and bool(compat.is_jax_array(array))


def is_cupy(array: Array) -> bool:
    """Whether it is a CuPy array."""
    return not is_numpy(array) and bool(compat.is_cupy_array(array))


def is_dask(array: Array) -> bool:
    """Whether it is a Dask array."""
    return not is_numpy(array) and bool(compat.is_dask_array(array))


def is_lazy(array: Array) -> bool:
    """Whether values cannot be looked at: a JAX tracer or a Dask array."""
    if is_numpy(array):
        return False
    if is_jax(array):
        return isinstance(array, sys.modules["jax"].core.Tracer)
    return bool(compat.is_lazy_array(array))


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """An array of any library as a NumPy array, for reports and files; its memory may be shared."""
    if is_cupy(array):
        return np.asarray(array.get())
    if is_torch(array):
        return np.asarray(array.detach().cpu().numpy())
    if is_dask(array):
        return np.asarray(array.compute())
    if type(array).__module__.startswith("array_api_strict"):
        strict = sys.modules["array_api_strict"]
        array = array.to_device(strict.Device("CPU_DEVICE"))
    return np.asarray(array)


def library(array: Array) -> tuple[str, str]:
    """The name and the version of the library of an array."""
    name = type(array).__module__.partition(".")[0]
    version = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return ("jax" if name == "jaxlib" else name), version


def numbers(xp: Namespace, start: int, stop: int, like: Array) -> Array:
    """Consecutive integers: on JAX an array of its own, else one of NumPy's."""
    return xp.arange(start, stop, dtype=xp.int32) if is_jax(like) else np.arange(start, stop)


def eager_any(xp: Namespace, flags: Array) -> bool | None:
    """One scalar brought to the host: whether any flag is set; None for lazy arrays."""
    if is_numpy(flags):
        return bool(flags.any())
    if is_lazy(flags):
        return None
    return bool(xp.any(flags))


def eager_all(xp: Namespace, flags: Array) -> bool | None:
    """One scalar brought to the host: whether all flags are set; None for lazy arrays."""
    if is_numpy(flags):
        return bool(flags.all())
    if is_lazy(flags):
        return None
    return bool(xp.all(flags))


@quiet
def plainly_finite(xp: Namespace, array: Array) -> bool:
    """Whether one sum shows that an eager array has no NaN or Inf: finite numbers may add up to too much."""
    return not is_lazy(array) and bool(xp.isfinite(xp.sum(array)))


def can_branch(array: Array) -> bool:
    """Whether `branch` and `repair` work: on eager arrays and JAX tracers, not on Dask."""
    return is_jax(array) or not is_lazy(array)


def finish(array: Array) -> None:
    """Wait until what was asked for is there, on libraries that return before it is."""
    if is_jax(array):
        array.block_until_ready()
    elif is_cupy(array):
        sys.modules["cupy"].cuda.get_current_stream().synchronize()
    elif is_torch(array) and array.device.type == "cuda":
        sys.modules["torch"].cuda.synchronize(array.device)


def register_pytree(cls: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Make a class a JAX pytree, once, when JAX is there."""
    jax = sys.modules.get("jax")
    if jax is not None and cls not in _registered:
        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        _registered.add(cls)


_registered: set[type] = set()
