"""Bad input, in words: each check names the argument, what came and what was expected."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import array_api_compat as compat
import array_api_extra as xpx
import numpy as np

from natgrad_array._arrays.libraries import Array, Namespace, Shape, device, is_lazy, namespace, to_numpy

Range: TypeAlias = tuple[str, Callable[[float], bool]]
"""What a number must be, in words, and the test of it."""


def describe(value: object) -> str:
    """Say what a rejected argument was, for the end of an error message."""
    if compat.is_array_api_obj(value):
        array: Array = value
        return (
            f"a {type(array).__module__.partition('.')[0]} array of dtype {array.dtype} and shape {tuple(array.shape)}"
        )
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {value!r}"


def check_arrays(arrays: Mapping[str, Any], *, integers: bool = False, optional: Collection[str] = ()) -> Namespace:
    """Return the namespace shared by named arrays.

    Parameters
    ----------
    arrays : mapping of str to array
        The arrays under the names that error messages use.
    integers : bool
        Accept integer arrays too; `promote` makes them floating.
    optional : collection of str
        The names of arguments that may be None: not given.

    Raises
    ------
    TypeError
        If a value is not an array, if libraries or floating dtypes are mixed, or if a
        dtype is not float32 or float64 (or an integer, where those are accepted).
    ValueError
        If the arrays live on different devices.
    """
    given = arrays
    if optional:
        given = {name: array for name, array in arrays.items() if array is not None or name not in optional}
    if (xp := _one_kind(given)) is not None:
        return xp
    for name, array in given.items():
        if not compat.is_array_api_obj(array):
            raise TypeError(
                f"{name} must be an array (NumPy, CuPy, torch, JAX, ...), got {describe(array)}; "
                "convert it with the library's asarray first"
            )
    try:
        xp = compat.array_namespace(*given.values())
    except TypeError as error:
        kinds = ", ".join(f"{name}: {type(array).__module__}.{type(array).__name__}" for name, array in given.items())
        raise TypeError(f"all arrays must come from one library, got {kinds}") from error
    floating: dict[str, Any] = {}
    for name, array in given.items():
        kind = _kind(xp, array.dtype)
        if integers and kind == "integral":
            continue
        if kind != "floating":
            expected = "float32, float64 or an integer dtype" if integers else "float32 or float64"
            raise TypeError(f"{name} must have dtype {expected}, got {array.dtype}")
        floating[name] = array
    _require_equal(floating, lambda array: array.dtype, "dtype", TypeError, "convert with astype")
    _require_equal(given, device, "device", ValueError, "move with to_device")
    return xp


_FLOATING = (np.dtype(np.float32), np.dtype(np.float64))


def _one_kind(arrays: Mapping[str, Any]) -> Namespace | None:
    """The namespace if all are plain arrays of NumPy or torch, of one accepted dtype, which pass every check there is.

    With one small network checks would take longer than the work.
    """
    kinds = {type(array) for array in arrays.values()}
    torch = sys.modules.get("torch")
    if kinds == {np.ndarray}:
        accepted: tuple[Any, ...] = _FLOATING
    elif torch is not None and kinds == {torch.Tensor} and len({array.device for array in arrays.values()}) == 1:
        accepted = (torch.float32, torch.float64)
    else:
        return None
    dtypes = {array.dtype for array in arrays.values()}
    if len(dtypes) != 1 or dtypes.pop() not in accepted:
        return None
    return namespace(next(iter(arrays.values())))


@functools.cache
def _kind(xp: Namespace, dtype: Any) -> str:
    """What a dtype is to this library."""
    if xp.isdtype(dtype, "integral"):
        return "integral"
    return "floating" if xp.isdtype(dtype, "real floating") and xp.finfo(dtype).bits in (32, 64) else "other"


def _require_equal(
    arrays: Mapping[str, Any], key: Callable[[Any], Any], what: str, error: type[Exception], hint: str
) -> None:
    # A JAX tracer has no device; it follows the others.
    values = {name: value for name, array in arrays.items() if (value := key(array)) is not None}
    for first, expected in list(values.items())[:1]:
        for name, value in values.items():
            if value != expected:
                came, there = f"{name} {_verb(name)} {what} {value}", f"{first} {_verb(first)} {what} {expected}"
                raise error(f"{came}, but {there}; {hint} so that they agree")


def _verb(name: str) -> str:
    return "have" if name.startswith("the ") and name.endswith("s") else "has"


def promote(xp: Namespace, *arrays: Array | None) -> tuple[Any, ...]:
    """Give integer arrays the floating dtype of the others, or the library's default one."""
    given = [array for array in arrays if array is not None]
    dtypes = [array.dtype for array in given if xp.isdtype(array.dtype, "real floating")]
    dtype = dtypes[0] if dtypes else xpx.default_dtype(xp, "real floating", device=compat.device(given[0]))
    return tuple(array if array is None or array.dtype == dtype else xp.astype(array, dtype) for array in arrays)


def check_matrix(name: str, array: Array, *, square: bool = False) -> None:
    """Raise ValueError unless `array` has a matrix core (a square one, if asked)."""
    shape = tuple(array.shape)
    if len(shape) < 2 or (square and shape[-1] != shape[-2]):
        expected = "(*batch, n, n)" if square else "(*batch, m, n)"
        raise ValueError(f"{name} must have shape {expected}, got {shape}")


def check_core(name: str, array: Array, core: Shape, why: str) -> None:
    """Raise ValueError unless the last axes of `array` are `core`."""
    shape = tuple(array.shape)
    if len(shape) < len(core) or shape[len(shape) - len(core) :] != core:
        raise ValueError(f"{name} must have shape (*batch, {', '.join(map(str, core))}) {why}, got {shape}")


def check_option(name: str, value: object, options: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def broadcast_batch(shapes: Mapping[str, Shape]) -> Shape:
    """Broadcast named batch shapes.

    Raises
    ------
    ValueError
        If they do not broadcast; the message lists them all.
    """
    try:
        return broadcast_shapes(shapes.values())
    except ValueError as error:
        listed = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"batch shapes must broadcast, got {listed}") from error


def broadcast_shapes(shapes: Iterable[Shape]) -> Shape:
    """`numpy.broadcast_shapes`, which takes longer than a product of small matrices, where shapes differ."""
    different = {*shapes} - {()}
    return tuple(np.broadcast_shapes(*different)) if len(different) > 1 else next(iter(different), ())


def check_sequence(name: str, arrays: object, expected: str) -> tuple[Any, ...]:
    """Return a tuple or list of arrays as a tuple.

    Raises
    ------
    TypeError
        If `arrays` is not a tuple or a list.
    ValueError
        If it is empty.
    """
    if not isinstance(arrays, tuple | list):
        raise TypeError(f"{name} must be {expected}, got {describe(arrays)}")
    if not arrays:
        raise ValueError(f"{name} must be {expected}, got an empty {type(arrays).__name__}")
    return tuple(arrays)


def check_finite(name: str, samples: Array, axes: int) -> None:
    """Raise ValueError if samples that all members share hold a NaN or an Inf.

    `axes` are those of samples without batch axes, the samples first. Samples of members' own
    may hold some, which hurt their member alone, and values of lazy arrays are not looked at.
    """
    if samples.ndim != axes or 0 in samples.shape or is_lazy(samples):
        return
    xp = namespace(samples)
    if not xp.isdtype(samples.dtype, "real floating"):
        return
    # A finite sum has nothing else in it, and takes no memory; a sum that is not may have overflowed.
    with np.errstate(invalid="ignore", over="ignore"):
        if bool(xp.isfinite(xp.sum(samples))):
            return
    flags = to_numpy(xp.all(xp.isfinite(samples), axis=tuple(range(1, axes))))
    bad = np.flatnonzero(~flags)
    if bad.size:
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {bad.size} of {flags.size} samples, the first {name}[{bad[0]}]"
        )


def is_number(value: object) -> bool:
    """Whether it is a real number of Python or NumPy; truth values are none."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


FINITE: Range = "finite", math.isfinite


NONNEGATIVE: Range = "at least 0", lambda value: value >= 0.0


POSITIVE: Range = "above 0", lambda value: value > 0.0


FRACTION: Range = "at least 0 and below 1", lambda value: 0.0 <= value < 1.0


SHARE: Range = "above 0 and at most 1", lambda value: 0.0 < value <= 1.0


def check_within(name: str, value: Any, expected: str, within: Callable[[float], bool]) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is within what `expected` says."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, {expected}, got {describe(value)}")
    if not within(value):
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_setting(name: str, value: Any) -> None:
    """Raise for a setting that is neither a number of at least 0 nor an array, whose values are not looked at."""
    if is_number(value):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    elif not compat.is_array_api_obj(value):
        raise TypeError(f"{name} must be a number or an array of shape (*batch,), got {describe(value)}")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; truth values are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_bool(xp: Namespace, value: object) -> bool:
    """Whether it is an array of truth values of a namespace."""
    if not compat.is_array_api_obj(value) or namespace(value) is not xp:
        return False
    return bool(xp.isdtype(value.dtype, "bool"))  # type: ignore[attr-defined]


def check_nonnegative(
    name: str, value: Any, xp: Namespace, like: Array, *, batch: Shape | None = None, core_ndim: int = 0
) -> Any:
    """Check a scalar setting that may differ between members (a cut-off, a damping).

    Parameters
    ----------
    value : float or array
        A Python number, or an array of the library and dtype of `like`, of shape
        (*batch,).
    batch : tuple of int, optional
        The batch shape that an array has to broadcast into.
    core_ndim : int
        How many axes of length one to append to an array, so that it lines up with
        arrays that have core axes.

    Returns
    -------
    float or array
        Negative entries of an array are NaN: that member alone is bad.

    Raises
    ------
    TypeError
        If it is neither a number nor an array.
    ValueError
        If it is a negative or NaN Python number, or of a shape that does not broadcast.
    """
    check_setting(name, value)
    if is_number(value):
        # NumPy's scalars too: a number has no library and no dtype to agree with.
        return float(value)
    check_arrays({"the other arrays": like, name: value})
    if batch is not None:
        try:
            fits = np.broadcast_shapes(tuple(value.shape), batch) == batch
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must have a shape that broadcasts to the batch shape {batch}, got {tuple(value.shape)}"
            )
    value = xp.where(value >= 0, value, xp.nan)
    return xp.reshape(value, (*value.shape, *(1,) * core_ndim))
