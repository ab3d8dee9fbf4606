"""The array libraries that the tests run on, each behind the same few methods."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import array_api_compat as compat
import array_api_strict
import jax
import numpy as np
import pytest


@dataclass(frozen=True)
class Backend:
    """One library on one device.

    Parameters
    ----------
    name : str
        The name in test identifiers.
    library : str
        What to import for `xp`.
    device : str, optional
        An array-api-strict device.
    flags : mapping
        array-api-strict flags that hold during a test.
    float64 : bool
        Whether the device has float64.
    """

    name: str
    library: str
    device: str | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    float64: bool = True
    readonly: bool = False
    jit: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def xp(self) -> Any:
        """The namespace, the same object that `array_namespace` returns."""
        return importlib.import_module(self.library)

    @property
    def lazy(self) -> bool:
        """Whether `call` hides values from Python (a JAX trace, a Dask graph)."""
        return self.jit or self.name == "dask"

    def asarray(self, array: Any) -> Any:
        """An array of this backend with the dtype of a NumPy array (float32 where there is no float64)."""
        array = np.array(array)  # a copy, so that no test can write into another's data
        if array.dtype == np.float64 and not self.float64:
            array = array.astype(np.float32)
        if self.readonly:
            array.flags.writeable = False
        if self.library == "array_api_compat.numpy":
            return array
        if self.device is not None:
            return self.xp.asarray(array, device=array_api_strict.Device(self.device))
        return self.xp.asarray(array)

    def asarrays(self, *arrays: Any) -> tuple[Any, ...]:
        """Several arrays at once, as a tuple."""
        return tuple(self.asarray(array) for array in arrays)

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy on the host."""
        if self.library == "array_api_strict":
            array = array.to_device(array_api_strict.Device("CPU_DEVICE"))
        elif self.library == "array_api_compat.torch":
            array = array.detach().cpu()
        elif self.library == "array_api_compat.cupy":
            array = array.get()
        elif self.library == "array_api_compat.dask.array":
            array = array.compute(scheduler="synchronous")
        return np.array(np.asarray(array))  # twice: torch does not know the copy keyword

    def call(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `f`; on "jax-jit" under `jax.jit`, with arrays traced and everything else static.

        Arrays may sit inside tuples, lists, dictionaries and registered classes. What `f`
        returns beside arrays (a string, a Python number) comes back as it is.
        """
        return _call_jitted(f, args, kwargs) if self.jit else f(*args, **kwargs)

    def call_optimized(self, f: Callable[..., Any], /, *args: Any) -> Any:
        """`call`, compiled as for users: what is fused, and so rounded once, is not the same without."""
        return jax.jit(f, compiler_options=_OPTIMIZED)(*args) if self.jit else f(*args)

    def check(self, array: Any, like: Any, *, dtype: Any = None) -> None:
        """Assert that `array` has the library, device and dtype of `like` (or the dtype given)."""
        assert compat.is_array_api_obj(array), f"not an array: {array!r}"
        assert compat.array_namespace(array) is compat.array_namespace(like)
        expected = like.dtype if dtype is None else dtype
        assert array.dtype == expected, f"dtype {array.dtype}, expected {expected}"
        assert compat.device(array) == compat.device(like)

    def activate(self) -> None:
        """Set the flags of array-api-strict."""
        if self.flags:
            array_api_strict.set_array_api_strict_flags(**self.flags)

    def deactivate(self) -> None:
        """Put the flags of array-api-strict back."""
        array_api_strict.reset_array_api_strict_flags()


class _Static:
    """What a compiled function returns beside arrays: a JAX pytree without leaves."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(_Static, lambda node: ((), node.value), lambda value, _: _Static(value))

_OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
"""XLA's own settings, in place of those of `conftest`."""

_compiled: dict[Any, Callable[..., Any]] = {}


def clear_compiled() -> None:
    """Forget compiled functions: the next test may patch what they call."""
    _compiled.clear()


def _call_jitted(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    traced = tuple(isinstance(leaf, jax.Array) for leaf in leaves)
    static = tuple(None if is_array else leaf for leaf, is_array in zip(leaves, traced, strict=True))

    def run(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if is_array else leaf for leaf, is_array in zip(static, traced, strict=True)]
        inner_args, inner_kwargs = jax.tree_util.tree_unflatten(tree, merged)
        result = f(*inner_args, **inner_kwargs)
        return jax.tree_util.tree_map(lambda leaf: leaf if isinstance(leaf, jax.Array) else _Static(leaf), result)

    try:
        key = (f, tree, tuple((type(leaf), leaf) for leaf in static))
        compiled = _compiled.setdefault(key, jax.jit(run))
    except TypeError:  # an argument that cannot be hashed
        compiled = jax.jit(run)
    result = compiled([leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array])
    is_static = lambda node: isinstance(node, _Static)  # noqa: E731
    return jax.tree_util.tree_map(lambda leaf: leaf.value if is_static(leaf) else leaf, result, is_leaf=is_static)


def _cupy_available() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


NUMPY = Backend("numpy", "array_api_compat.numpy")
STRICT_DEVICE1 = Backend("strict-device1", "array_api_strict", device="device1")
STRICT_DEVICE2 = Backend("strict-device2", "array_api_strict", device="device2")
JAX = Backend("jax", "jax.numpy")
JAX_JIT = Backend("jax-jit", "jax.numpy", jit=True)
DASK = Backend("dask", "array_api_compat.dask.array")

BACKENDS = [
    NUMPY,
    Backend("numpy-readonly", "array_api_compat.numpy", readonly=True),
    STRICT_DEVICE1,
    STRICT_DEVICE2,
    Backend("strict-no_float64", "array_api_strict", device="no_float64", float64=False),
    Backend(
        "strict-static",
        "array_api_strict",
        device="CPU_DEVICE",
        flags={"boolean_indexing": False, "data_dependent_shapes": False},
    ),
    JAX,
    JAX_JIT,
]
if importlib.util.find_spec("torch") is not None:
    BACKENDS.append(Backend("torch", "array_api_compat.torch"))
if _cupy_available():
    BACKENDS.append(Backend("cupy", "array_api_compat.cupy"))


def compiled_if_jax(backend: Backend) -> None:
    """Leave JAX to its compiled form where a test calls much at once.

    Op by op it compiles each for itself, which takes ten times as long and shows no more.
    """
    if backend is JAX:
        pytest.skip("compiled as jax-jit")
