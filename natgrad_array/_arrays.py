"""The one room that knows array libraries exist.

Everything above it receives a namespace ``xp`` and arrays that have been checked: one
library, one device, one floating dtype. What a library offers beyond the Array API
standard is reached through the few functions at the end of this file and nowhere else.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import array_api_compat as compat
import array_api_extra as xpx
import numpy as np

Array: TypeAlias = Any
Namespace: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[str, Callable[[float], bool]]
"""What a number must be, in words, and the test of it."""

quiet = np.errstate(invalid="ignore", over="ignore")
"""A decorator: an Inf comes out as a NaN or an Inf of its own member; NumPy alone would also warn."""


# ------------------------------------------------------------------ what came, in words


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


# --------------------------------------------------------------------- checks and dtypes


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
    if (xp := _one_kind_of_numpy(given)) is not None:
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


def _one_kind_of_numpy(arrays: Mapping[str, Any]) -> Namespace | None:
    """NumPy's namespace if all are NumPy arrays of one accepted dtype, which passes every check there is.

    With one small network checks would take longer than the work.
    """
    if {type(array) for array in arrays.values()} != {np.ndarray}:
        return None
    dtypes = {array.dtype for array in arrays.values()}
    if len(dtypes) != 1 or dtypes.pop() not in _FLOATING:
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


# ------------------------------------------------------------------------- constructors


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


# ------------------------------------------------- what lies outside the standard: a table


# NumPy comes first: the checks of array-api-compat fail for its arrays where the import of
# another library is blocked.


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


def can_branch(array: Array) -> bool:
    """Whether `branch` and `repair` work: on eager arrays and JAX tracers, not on Dask."""
    return is_jax(array) or not is_lazy(array)


def branch(flag: Array | bool, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """One of two ways by one scalar: on the host, or a conditional in a JAX trace."""
    if not isinstance(flag, bool) and is_lazy(flag):
        return sys.modules["jax"].lax.cond(flag, yes, no)
    return yes() if bool(flag) else no()


def calls_may_meet(array: Array) -> bool:
    """Whether factorisations that do not depend on each other are better made by one call.

    On a CPU jaxlib 0.10 has each call of LAPACK wait, in one of XLA's threads, for work that it
    gives to others of them: as many calls side by side as there are threads never end.
    """
    return is_jax(array)


def gram(xp: Namespace, x: Array, divisor: Any = 1, *, less: Array | None = None) -> Array:
    """A new (xᵀx − lessᵀ less) / divisor, exactly symmetric; `less` is a row.

    NumPy knows the product of a matrix with its own transpose, computes half of it and
    mirrors that, so that no mean of both halves is needed. torch takes the row off in one
    pass over memory.
    """
    if is_numpy(x) and _blas_layout(x):
        product = xp.matrix_transpose(x) @ x
        if less is not None:
            product -= less.mT * less
        product /= divisor
        return product
    product = xp.matrix_transpose(x) @ x
    # Halved after the sum: XLA would fuse the two halves into one rounding and one exact product.
    product = product + xp.matrix_transpose(product)
    if less is not None and is_torch(x):
        product = sys.modules["torch"].addcmul(product, less.mT, less, value=-2)
    elif less is not None:
        product -= 2.0 * (xp.matrix_transpose(less) * less)
    product /= 2 * divisor
    return product


def _blas_layout(x: np.ndarray[Any, Any]) -> bool:
    """Whether NumPy hands these matrices to BLAS as they are: it does not know of copies that they are the same."""
    (n, p), (down, right), size = x.shape[-2:], x.strides[-2:], x.itemsize
    by_rows = right == size and down % size == 0 and down >= p * size
    by_columns = down == size and right % size == 0 and right >= n * size
    return by_rows or by_columns or x.size == 0


def sum_rows(xp: Namespace, x: Array) -> Array:
    """The sum over axis -2, kept as an axis of length one.

    A product with ones is faster than the strided sum on NumPy, and slower on JAX, whose
    compiler fuses the sum with what is around it.
    """
    if is_jax(x):
        return xp.sum(x, axis=-2, keepdims=True)
    return xp.ones((1, x.shape[-2]), dtype=x.dtype, device=device(x)) @ x


def reduce_blocks(
    x: Array,
    weights: Array | None,
    rows: int,
    of: Callable[[Array, Array | None], Array],
    merge: Callable[[Array, Array], Array],
) -> Array:
    """Look at every block of samples of a Dask array once, and merge what was seen by a tree.

    Parameters
    ----------
    x : Dask array, shape (*batch, n, p)
        In any chunks, of any library; features are brought into one.
    weights : Dask array, shape (*batch, n), or None
        Batch axes broadcast.
    rows : int
        Of what a block leaves.
    of : callable
        Takes a block, (*batch, n_k, p), and its weights, (*batch, n_k), as arrays of the
        blocks' own library, and returns an array (*batch, rows, p).
    merge : callable
        Takes two of these and returns one.

    Returns
    -------
    Dask array, shape (*batch, rows, p)
        Not computed yet.
    """
    da, given = sys.modules["dask.array"], None
    if weights is not None:
        batch = np.broadcast_shapes(x.shape[:-2], weights.shape[:-1])
        x, given = da.broadcast_to(x, (*batch, *x.shape[-2:])), weights[..., None]

    def chunk(block: Array, weights: Array | None = None, **_: Any) -> Array:
        return of(block, None if weights is None else weights[..., 0])

    def combine(parts: Any, **_: Any) -> Array:
        return functools.reduce(merge, parts) if isinstance(parts, list) else parts

    return da.reduction(
        x.rechunk({x.ndim - 1: -1}),
        chunk,
        combine,
        combine=combine,
        axis=x.ndim - 2,
        keepdims=True,
        output_size=rows,
        concatenate=False,
        dtype=x.dtype,
        meta=x._meta,
        weights=given,
    )


def add_to_diagonal(xp: Namespace, a: Array, values: float | Array) -> Array:
    """`a`, which is the caller's own, with values of shape (*batch, 1, 1) added to its diagonals.

    NumPy and torch write through a view of the diagonal: on NumPy a stack of multiples of
    the identity doubles the time of the shrinkage of small matrices.
    """
    if is_numpy(a):
        diagonal = np.einsum("...ii->...i", a)
    elif is_torch(a):
        diagonal = a.diagonal(dim1=-2, dim2=-1)
    else:
        a += values * eye(xp, a.shape[-1], a)
        return a
    diagonal += values if isinstance(values, float) else values[..., 0]
    return a


def plus_transpose(a: Array) -> Array:
    """A new a + aᵀ.

    Columns of rows that lie a power of two apart fall on few places of the cache: on NumPy such
    large matrices are read from a copy with longer rows, in a third of the time.
    """
    n = int(a.shape[-1])
    if not is_numpy(a) or n < 128 or n * a.dtype.itemsize % 1024:
        return a + a.mT
    apart = np.empty((*a.shape[:-1], n + 8), dtype=a.dtype)[..., :n]
    apart[...] = a
    return a + apart.mT


def cholesky(xp: Namespace, a: Array) -> Array:
    """Lower Cholesky factors; NaN in members that have none.

    NumPy's public function raises for a whole stack and computes float32 in float64; the
    generalised ufunc behind it writes NaN into the members that fail and keeps the dtype.
    """
    kernel = getattr(getattr(np.linalg, "_umath_linalg", None), "cholesky_lo", None)
    if is_numpy(a):
        if kernel is not None:
            with np.errstate(all="ignore"):
                return kernel(a, signature="f->f" if a.dtype == np.float32 else "d->d")
    elif is_torch(a):
        return _nan_where_failed(*sys.modules["torch"].linalg.cholesky_ex(a))
    elif is_jax(a):
        return xp.linalg.cholesky(a)
    elif is_cupy(a):
        return nan_unless_factor(xp, xp.linalg.cholesky(a), a)
    finite = finite_members(xp, a)
    safe = xp.where(finite, a, eye(xp, a.shape[-1], a))
    (factor,) = by_halving(xp, lambda x: (xp.linalg.cholesky(x),), safe, lambda x: (xp.full_like(x, xp.nan),))
    return xp.where(finite, factor, xp.nan)


def nan_unless_factor(xp: Namespace, factor: Array, a: Array) -> Array:
    """Cholesky factors with NaN in the members that they do not belong to.

    CuPy leaves finite garbage where a factorisation broke off, and its norms may pass for
    those of an inverse; but only a factor of the matrix has its diagonal.
    """
    rows, diagonal = xp.linalg.vecdot(factor, factor), xp.linalg.diagonal(a)
    precision = 8 * a.shape[-1] * eps(xp, a)
    fits = xp.all(xp.abs(rows - diagonal) <= precision * xp.abs(diagonal), axis=-1)
    return xp.where(fits[..., None, None], factor, xp.nan)


def has_fast_inverse(a: Array) -> bool:
    """Whether `inverse`, one call for all, beats the way by Cholesky factors: for a few small matrices on NumPy.

    By sizes alone, so that digits do not depend on where it is called.
    """
    return bool(is_numpy(a) and a.shape[-1] <= BLAS_THREADS_FROM and a.size < 2**13)


def merges_products(a: Array, b: Array) -> bool:
    """Whether one large product is faster than a stack of small ones.

    BLAS starts threads of its own for it, which stay busy for a while: not for little work on
    NumPy, as in a piece, nor where rows would have to be copied before they are one matrix.
    """
    return not is_numpy(a) or (a.flags.c_contiguous and a.size * b.shape[-1] >= 2**24)


def inverse(xp: Namespace, a: Array) -> Array:
    """Inverses of square matrices; not finite, or not an inverse at all, in members that have none.

    NumPy's public function raises for a whole stack and computes float32 in float64. What
    comes out holds for a member whose condition number says so. Where a member has none,
    NumPy would warn, but every door is `quiet`.
    """
    kernel = getattr(getattr(np.linalg, "_umath_linalg", None), "inv", None)
    if is_numpy(a) and kernel is not None:
        return kernel(a, signature="f->f" if a.dtype == np.float32 else "d->d")
    if is_torch(a) and a.device.type == "cpu":
        return _nan_where_failed(*sys.modules["torch"].linalg.inv_ex(a))
    finite = finite_members(xp, a)
    # A NaN can keep a GPU's LU factorisation busy for ever.
    safe = xp.where(finite, a, eye(xp, a.shape[-1], a))
    if is_jax(a):
        return xp.where(finite, xp.linalg.inv(safe), xp.nan)
    if is_torch(a):
        return xp.where(finite, _nan_where_failed(*sys.modules["torch"].linalg.inv_ex(safe)), xp.nan)
    (result,) = by_halving(xp, lambda x: (xp.linalg.inv(x),), safe, lambda x: (xp.full_like(x, xp.nan),))
    return xp.where(finite, result, xp.nan)


def _nan_where_failed(result: Array, failed: Array) -> Array:
    """What torch's functions without checks return, with NaN in members that they could not do."""
    if failed.device.type == "cpu" and not bool(failed.any()):
        return result
    return sys.modules["torch"].where((failed == 0)[..., None, None], result, math.nan)


def norms(xp: Namespace, a: Array) -> Array:
    """Frobenius norm of each member of a stack of matrices."""
    if is_numpy(a):
        flat = a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])
        return np.sqrt(np.vecdot(flat, flat))
    if is_torch(a):
        return sys.modules["torch"].linalg.vector_norm(a, dim=(-2, -1))
    flat = xp.reshape(a, (*a.shape[:-2], a.shape[-2] * a.shape[-1]))
    return xp.sqrt(xp.linalg.vecdot(flat, flat))


def inverse_of_factored(factor: Array) -> Array | None:
    """Inverses of matrices with given lower Cholesky factors by the library's own means, else None."""
    if is_numpy(factor):
        return _gram_of_lower(_inverse_lower_in_place(factor))
    if is_torch(factor):
        return sys.modules["torch"].cholesky_inverse(factor)
    if is_jax(factor):
        jax = sys.modules["jax"]
        identity = jax.numpy.broadcast_to(jax.numpy.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        half = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        product = half.mT @ half
        return 0.5 * (product + product.mT)
    return None


def _inverse_lower_in_place(lower: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`linalg.inverse_lower` on NumPy: the same rounds, written through views of one array."""
    n = lower.shape[-1]
    flat = np.ascontiguousarray(lower).reshape(-1, n, n)
    inverse = np.zeros_like(flat)
    with np.errstate(all="ignore"):
        whole = n - n % _SMALLEST
        _substitute(flat[:, :whole, :whole], inverse[:, :whole, :whole], _SMALLEST)
        _substitute(flat[:, whole:, whole:], inverse[:, whole:, whole:], n % _SMALLEST)
        size = _SMALLEST
        while size < n:
            whole = n // (2 * size)
            top, bottom = _blocks(inverse, 0, 0, size, whole), _blocks(inverse, size, size, size, whole)
            product = bottom @ (_blocks(flat, size, 0, size, whole) @ top)
            np.negative(product, out=_blocks(inverse, size, 0, size, whole))
            start = 2 * size * whole
            if n - start > size:
                # What is left at the end holds one block and a smaller one.
                left, right = slice(start, start + size), slice(start + size, None)
                inverse[:, right, left] = -(inverse[:, right, right] @ (flat[:, right, left] @ inverse[:, left, left]))
            size *= 2
    return inverse.reshape(lower.shape)


def _gram_of_lower(lower: Array) -> Array:
    """lowerᵀ lower of lower triangular matrices, where they are large without the products with zeros."""
    n = lower.shape[-1]
    if n < 2 * BLAS_THREADS_FROM:
        return lower.mT @ lower
    h = n // 2
    left, right = lower[..., h:, :h], lower[..., h:, h:]
    product = np.empty_like(lower)
    product[..., :h, :h] = _gram_of_lower(lower[..., :h, :h])
    product[..., :h, :h] += left.mT @ left
    corner = np.matmul(right.mT, left, out=product[..., h:, :h])
    product[..., :h, h:] = corner.mT
    product[..., h:, h:] = _gram_of_lower(right)
    return product


# Below this size a matrix product is all overhead: rows of all blocks are worked on at once.
_SMALLEST = 4


def _substitute(lower: np.ndarray[Any, Any], inverse: np.ndarray[Any, Any], size: int) -> None:
    """Invert the diagonal blocks of `size` by forward substitution, with blocks on the last axes."""
    if not lower.shape[-1]:
        return
    rows, result = _tiles(lower, size).copy(), _tiles(inverse, size)
    for i in range(size):
        pivot = 1.0 / rows[i, i]
        result[i, i] = pivot
        for k in range(i):
            rows[i, k] *= -pivot
        for j in range(i):
            total = rows[i, j] * result[j, j]
            for k in range(j + 1, i):
                total += rows[i, k] * result[k, j]
            result[i, j] = total


def _tiles(a: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """A view of the diagonal blocks, (members, n, n) to (size, size, members, n / size)."""
    member, down, right = a.strides
    return np.lib.stride_tricks.as_strided(
        a, (size, size, a.shape[0], a.shape[-1] // size), (down, right, member, size * (down + right))
    )


def _blocks(a: np.ndarray[Any, Any], row: int, column: int, size: int, count: int) -> np.ndarray[Any, Any]:
    """A view of the blocks at (row, column) in each of `count` diagonal tiles of twice the size."""
    member, down, right = a.strides
    return np.lib.stride_tricks.as_strided(
        a[:, row:, column:],
        (a.shape[0], count, size, size),
        (member, 2 * size * (down + right), down, right),
    )


def by_halving(
    xp: Namespace, factorise: Callable[[Array], Any], a: Array, alone: Callable[[Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Factorise a stack although the library raises for all of it when one member fails.

    Libraries that raise do not say which member failed, so the stack is halved until every
    failure is alone; `alone` then gives its factors, with a batch axis of length one.
    """
    try:
        return tuple(factorise(a))
    except (ValueError, RuntimeError) as error:
        # NumPy's is a ValueError, torch's a RuntimeError.
        if not type(error).__name__.endswith("LinAlgError"):
            raise
        flat = xp.reshape(a, (-1, *a.shape[-2:]))
        if flat.shape[0] == 1:
            parts = alone(flat)
        else:
            middle = flat.shape[0] // 2
            halves = [by_halving(xp, factorise, half, alone) for half in (flat[:middle, ...], flat[middle:, ...])]
            parts = tuple(xp.concat(pair) for pair in zip(*halves, strict=True))
        return tuple(xp.reshape(part, (*a.shape[:-2], *part.shape[1:])) for part in parts)


_WRITABLE = (is_numpy, is_cupy, is_torch, is_jax)


def repair(
    xp: Namespace,
    flags: Array,
    values: tuple[Array, ...],
    arguments: tuple[Array, ...],
    slow: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    """Give the flagged members of stacks of matrices the results of a slower function.

    Parameters
    ----------
    flags : array of bool, shape (*batch,)
        Members whose `values` are not to be used.
    values : tuple of arrays, shapes (*batch, m, n)
        Results of the fast way; batch axes may still have to broadcast.
    arguments : tuple of arrays, shapes (*batch, m, n)
        Arguments of `slow`, stacks of matrices; batch axes may still have to broadcast.
    slow : callable
        Takes the flagged members, with one batch axis, or the whole stack; returns a tuple
        like `values`.

    Notes
    -----
    On eager arrays a scalar or two come to the host, and only flagged members are
    computed again. A JAX trace has one conditional of three ways: nothing, a sixteenth of
    the stack or the whole of it, sixteenth by sixteenth, is computed again.
    """
    batch = tuple(flags.shape)
    if is_lazy(flags):
        return _repair_traced(xp, flags, values, arguments, slow)
    if not bool(xp.any(flags)):
        return values
    if bool(xp.all(flags)):
        return slow(*arguments)
    if not any(test(flags) for test in _WRITABLE):
        # The standard has no assignment by index: everything is computed again, and chosen.
        flagged = flags[..., None, None]
        return tuple(xp.where(flagged, new, old) for new, old in zip(slow(*arguments), values, strict=True))
    (chosen,) = xp.nonzero(xp.reshape(flags, (-1,)))
    return tuple(
        xp.reshape(xpx.at(_in_a_row(xp, old, batch))[chosen, ...].set(new), (*batch, *old.shape[-2:]))
        for old, new in zip(values, slow(*_members(xp, arguments, batch, chosen)), strict=True)
    )


def _repair_traced(
    xp: Namespace,
    flags: Array,
    values: tuple[Array, ...],
    arguments: tuple[Array, ...],
    slow: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    """`repair` in a JAX trace.

    Memory is set aside for every way, and what exceeds the allocator's pool is mapped anew in
    every call, which takes longer than a small computation: so nothing slow is done for more
    than a sixteenth of the stack at once.
    """
    jax, batch = sys.modules["jax"], tuple(flags.shape)
    members = math.prod(batch)
    few, count = members // 16, xp.count_nonzero(flags)

    def none() -> tuple[Array, ...]:
        return tuple(xp.broadcast_to(value, (*batch, *value.shape[-2:])) for value in values)

    def some() -> tuple[Array, ...]:
        # A trace has fixed shapes: places that no member fills lie outside the stack.
        (chosen,) = xp.nonzero(xp.reshape(flags, (-1,)), size=few, fill_value=members)
        new = slow(*_members(xp, arguments, batch, chosen, mode="clip"))
        return tuple(
            xp.reshape(_in_a_row(xp, old, batch).at[chosen].set(part, mode="drop"), (*batch, *old.shape[-2:]))
            for old, part in zip(values, new, strict=True)
        )

    def all_() -> tuple[Array, ...]:
        if not few:
            new = slow(*arguments)
        else:
            rows = xp.reshape(xp.arange(16 * -(-members // 16)), (16, -1))
            parts = jax.lax.map(lambda chosen: slow(*_members(xp, arguments, batch, chosen, mode="clip")), rows)
            new = tuple(
                xp.reshape(xp.reshape(part, (-1, *part.shape[-2:]))[:members, ...], (*batch, *part.shape[-2:]))
                for part in parts
            )
        return tuple(xp.where(flags[..., None, None], part, old) for part, old in zip(new, values, strict=True))

    ways = [none, some, all_] if few else [none, all_]
    index = xp.sum(count > xp.asarray([0, few] if few else [0]))
    result: tuple[Array, ...] = jax.lax.switch(index, ways)
    return result


def _in_a_row(xp: Namespace, array: Array, batch: Shape) -> Array:
    """A stack of matrices with the members of a batch on one axis."""
    shape = (*batch, *array.shape[-2:])
    # What has the shape already is written to in place: a broadcast view would be copied.
    whole = array if tuple(array.shape) == shape else xp.broadcast_to(array, shape)
    return xp.reshape(whole, (math.prod(batch), *array.shape[-2:]))


def _members(
    xp: Namespace, arrays: tuple[Array, ...], batch: Shape, chosen: Array, **options: str
) -> tuple[Array, ...]:
    """Some of the members of stacks of matrices; what all members share is not taken apart."""
    return tuple(
        xp.take(_in_a_row(xp, array, batch), chosen, axis=0, **options) if array.ndim > 2 else array for array in arrays
    )


def _keep_freed_memory() -> None:
    """Have the C library's allocator keep what arrays leave behind, where it is glibc's.

    Once a block of this size has been freed, smaller ones come from memory that the process
    keeps (mallopt(3), on M_MMAP_THRESHOLD). Before that, arrays of a megabyte are mapped anew,
    page by page, in every step, which takes as long as the arithmetic of a small ensemble.
    Nothing is written to the block, so that it takes no memory itself.
    """
    np.empty(2**25 - 2**16, dtype=np.uint8)


_keep_freed_memory()

PIECE_BYTES = 2**20
"""The size of one stack of matrices that stays in a processor's cache with a few others."""

BLAS_THREADS_FROM = 64
"""OpenBLAS gives products of larger matrices threads of its own."""


def pays_in_pieces(arrays: tuple[Array, ...], cores: Sequence[Shape], *, one_by_one: bool = False) -> bool:
    """Whether `in_pieces` makes more than one piece."""
    if not is_numpy(arrays[0]):
        return False
    batch = broadcast_shapes(array.shape[:-2] for array in arrays)
    if max(batch, default=1) < 2:
        return False
    return (_threads(cores) > 0 or one_by_one) and _pieces(batch, arrays, cores) > 1


def _threads(cores: Sequence[Shape]) -> int:
    """How many threads there are for pieces; none where BLAS has threads of its own."""
    return usable_threads() if max(side for core in cores for side in core) <= BLAS_THREADS_FROM else 0


def _pieces(batch: Shape, arrays: tuple[Array, ...], cores: Sequence[Shape]) -> int:
    """In how many pieces a stack fits into a processor's cache; two a thread at least where there is work for all.

    Products of matrices below 16 × 16 are over so soon that passes over memory decide: all
    stacks of a step, and not only a few, have to stay there.
    Large matrices take their turns, so that a piece may fill the cache that processors share.
    """
    largest = max(side for core in cores for side in core)
    limit = PIECE_BYTES // 4 if largest < 16 else PIECE_BYTES if largest <= BLAS_THREADS_FROM else 4 * PIECE_BYTES
    count = -(-math.prod(batch) * _member_bytes(arrays, cores) // limit)
    flops = math.prod(batch) * sum(m * n * min(m, n) for m, n in cores)
    return max(count, min(2 * _threads(cores), flops // 2**21))


def _member_bytes(arrays: tuple[Array, ...], cores: Sequence[Shape]) -> int:
    """Bytes of the largest matrix of one member."""
    sizes = [math.prod(array.shape[-2:]) for array in arrays if array.ndim > 2] + [math.prod(core) for core in cores]
    return int(max(sizes) * arrays[0].dtype.itemsize)


def in_pieces(
    function: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    cores: Sequence[Shape],
    *,
    one_by_one: bool = False,
) -> tuple[Array, ...]:
    """Apply a function of stacks of matrices; on NumPy to pieces of the stacks, in threads.

    NumPy works on a stack with one processor, and for every step of a long computation goes
    through memory. Both cost a factor of two where the matrices are not so large that BLAS has
    threads of its own.

    Parameters
    ----------
    function : callable
        Takes arrays like `arrays` and returns a tuple of stacks with the batch axes of all
        of them; what it does for a member depends on no other.
    arrays : tuple of arrays, shapes (*batch, m, n)
        Batch axes may still have to broadcast.
    cores : sequence of tuple of int
        The core shapes of what `function` returns.
    one_by_one : bool
        Whether pieces of large matrices, for which BLAS has threads, are made one after the
        other; they are left whole without.
    """
    if not pays_in_pieces(arrays, cores, one_by_one=one_by_one):
        return function(*arrays)
    batch = broadcast_shapes(array.shape[:-2] for array in arrays)
    length = max(batch)
    count = min(length, _pieces(batch, arrays, cores))
    threads = max(1, min(_threads(cores), count))
    count = min(length, -(-count // threads) * threads)
    axis = batch.index(length) - len(batch) - 2
    results = tuple(np.empty((*batch, *core), dtype=arrays[0].dtype) for core in cores)

    def work(piece: slice) -> None:
        parts = [array[_along(axis, piece)] if _has(array, axis, length) else array for array in arrays]
        for result, part in zip(results, function(*parts), strict=True):
            result[_along(axis, piece)] = part

    ends = [length * k // count for k in range(count + 1)]
    pieces = [slice(*pair) for pair in itertools.pairwise(ends)]
    in_threads(work, pieces, threads)
    return results


def in_threads(work: Callable[[Any], Any], pieces: Sequence[Any], threads: int) -> list[Any]:
    """What `work` returns for each piece, in order; by several threads where more than one is given.

    The caller is one of them: were it to wait, two others could come to share a processor.
    """

    def alone(piece: Any) -> Any:
        _in_a_piece.set(True)
        return work(piece)

    # Settings such as `errstate` belong to the caller's context.
    contexts = [contextvars.copy_context() for _ in pieces]
    if threads < 2 or len(pieces) < 2:
        return [context.run(alone, piece) for context, piece in zip(contexts, pieces, strict=True)]
    waiting = [
        _pool(threads - 1).submit(context.run, alone, piece) for context, piece in zip(contexts, pieces, strict=True)
    ]
    mine = {}
    try:
        for k in reversed(range(len(pieces))):
            if not waiting[k].cancel():
                break
            mine[k] = contexts[k].run(alone, pieces[k])
    finally:
        concurrent.futures.wait([future for future in waiting if not future.cancel()])
    return [mine[k] if k in mine else future.result() for k, future in enumerate(waiting)]


_in_a_piece = contextvars.ContextVar("_in_a_piece", default=False)


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that are kept: to begin and end them takes as long as many a stack does."""
    return concurrent.futures.ThreadPoolExecutor(threads, "natgrad_array")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _has(array: Array, axis: int, length: int) -> bool:
    return bool(array.ndim >= -axis and array.shape[axis] == length)


def _along(axis: int, piece: slice) -> tuple[Any, ...]:
    """The index that takes a piece of an axis counted from the end."""
    return (..., piece, *(slice(None),) * (-axis - 1))


def _beside_others() -> bool:
    """Whether other threads are at work."""
    return _in_a_piece.get() or threading.current_thread() is not threading.main_thread()


def usable_threads() -> int:
    """How many threads NumPy's work is given: one for each usable processor, unless BLAS is told fewer.

    One in a thread that is not the main one, where whoever started it has taken the
    processors already, and for what is a piece itself.
    """
    if _beside_others():
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if (limit := os.environ.get(name, "")).isdigit() and int(limit) > 0:
            return min(count, int(limit))
    return count


def block_matrix(
    xp: Namespace, block: Callable[[int, int], Array], sizes: Sequence[int], batch: Shape, like: Array
) -> Array:
    """Assemble a square matrix from its blocks; where the library writes in place, one block at a time lives."""
    depth = range(len(sizes))
    if not any(test(like) for test in (is_numpy, is_cupy, is_torch)):
        rows = [
            xp.concat([xp.broadcast_to(block(i, j), (*batch, sizes[i], sizes[j])) for j in depth], axis=-1)
            for i in depth
        ]
        return xp.concat(rows, axis=-2)
    ends = list(itertools.accumulate(sizes, initial=0))
    whole = xp.empty((*batch, ends[-1], ends[-1]), dtype=like.dtype, device=device(like))
    for i in depth:
        for j in depth:
            whole[..., ends[i] : ends[i + 1], ends[j] : ends[j + 1]] = block(i, j)
    return whole


def while_loop(
    condition: Callable[[Any], Array], body: Callable[[Any], Any], state: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Repeat `body` on a tuple of arrays while `condition` holds.

    Traced JAX arrays become one compiled loop; on other arrays the condition costs one
    scalar brought to the host per round.
    """
    if any(is_jax(leaf) and is_lazy(leaf) for leaf in state):
        result: tuple[Any, ...] = sys.modules["jax"].lax.while_loop(condition, body, state)
        return result
    while bool(condition(state)):
        state = body(state)
    return state


def made_first(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Arrays that a JAX trace makes once, before all that is made of them."""
    if not (is_jax(arrays[0]) and is_lazy(arrays[0])):
        return arrays
    result: tuple[Array, ...] = sys.modules["jax"].lax.optimization_barrier(arrays)
    return result


def repeat(body: Callable[[Any, Any], Any], state: Any, count: Any) -> Any:
    """`state` after `count` rounds of ``body(i, state)``: one compiled loop in a JAX trace."""
    if not isinstance(count, int):
        return sys.modules["jax"].lax.fori_loop(0, count, body, state)
    for i in range(count):
        state = body(i, state)
    return state


def collect(
    xp: Namespace, body: Callable[[Any, Any], tuple[Any, tuple[Array, ...]]], state: Any, lengths: Any, count: Any
) -> tuple[Any, tuple[Array, ...]]:
    """`state` after ``state, seen = body(state, length)`` for each length, and all that was seen, stacked.

    In a JAX trace one compiled loop over the first `count` lengths: what lies behind them in
    the stacks is zero, so that one compiled function serves every count up to their number.
    """
    if isinstance(count, int):
        rows = []
        for length in lengths[:count]:
            state, seen = body(state, length)
            rows.append(seen)
        return state, tuple(xp.stack(column) for column in zip(*rows, strict=True))
    jax = sys.modules["jax"]
    shapes = jax.eval_shape(body, state, lengths[0])[1]
    stacks = tuple(xp.zeros((lengths.shape[0], *shape.shape), dtype=shape.dtype) for shape in shapes)

    def round_(i: Any, carry: Any) -> Any:
        state, stacks = carry
        state, seen = body(state, lengths[i])
        return state, tuple(stack.at[i].set(row) for stack, row in zip(stacks, seen, strict=True))

    result: tuple[Any, tuple[Array, ...]] = jax.lax.fori_loop(0, count, round_, (state, stacks))
    return result


def compiled(function: Callable[..., Any], static: Any, like: Array, *arguments: Any) -> Any:
    """``function(static, *arguments)``; compiled, once for each `static` and set of shapes, where `like` is JAX's."""
    if not is_jax(like):
        return function(static, *arguments)
    return _jitted(function)(static, *arguments)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    jitted: Callable[..., Any] = sys.modules["jax"].jit(function, static_argnums=0)
    return jitted


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


# ----------------------------------------------------------------------------- randomness


def standard_normal(rng: Any, shape: Shape, xp: Namespace, like: Array) -> Array:
    """Draw independent N(0, 1) variables of the library, dtype and device of `like`.

    Parameters
    ----------
    rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
        Where randomness comes from. An array is noise already drawn and is returned if
        its shape fits. Draws of an integer seed and of a NumPy generator are made on the
        host and so are the same on every library.

    Raises
    ------
    TypeError
        If `rng` is none of these, or a host generator under a JAX trace, where its draw
        would freeze into a constant.
    """
    if isinstance(rng, bool) or rng is None:
        raise TypeError(f"rng must be a generator, a key, an integer seed or an array of noise, got {describe(rng)}")
    if isinstance(rng, MemberNoise):
        return rng.draw(shape, xp, like)
    rng = _from_seed(rng)
    if isinstance(rng, np.random.Generator):
        if is_lazy(like):
            raise TypeError(
                "rng is a NumPy generator or seed under a JAX trace, where its draw would be a constant; pass a JAX key"
            )
        return asarray_like(xp, rng.standard_normal(shape), like)
    module = type(rng).__module__.partition(".")[0]
    if _is_jax_key(rng):
        _check_rng_library(is_jax(like), rng, like)
        return sys.modules["jax"].random.normal(rng, shape, dtype=like.dtype)
    if compat.is_array_api_obj(rng):
        check_arrays({"rng": rng, "the other arrays": like})
        if tuple(rng.shape) != shape:
            raise ValueError(f"rng must have shape {shape} when it is noise already drawn, got {tuple(rng.shape)}")
        return rng
    if module == "torch":
        _check_rng_library(is_torch(like), rng, like)
        return sys.modules["torch"].randn(shape, generator=rng, dtype=like.dtype, device=rng.device)
    if module == "cupy":
        _check_rng_library(is_cupy(like), rng, like)
        return rng.standard_normal(size=shape, dtype=like.dtype)
    raise TypeError(f"rng must be a generator, a key, an integer seed or an array of noise, got {describe(rng)}")


def _from_seed(rng: Any) -> Any:
    """An integer seed as a NumPy generator; every other source as it is."""
    if not is_integer(rng):
        return rng
    if rng < 0:
        raise ValueError(f"rng must be at least 0 when it is a seed, got {rng}")
    return np.random.default_rng(rng)


def _check_rng_library(fits: bool, rng: Any, like: Array) -> None:
    if not fits:
        raise TypeError(f"rng must draw arrays of the library in use, got {describe(rng)} beside {describe(like)}")


def _is_jax_key(rng: Any) -> bool:
    if not is_jax(rng):
        return False
    jax = sys.modules["jax"]
    return bool(jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key) or (rng.dtype == np.uint32 and rng.shape == (2,)))


def split_rng(rng: Any, count: int) -> list[Any]:
    """`count` sources of randomness from one; generators advance, keys are split."""
    rng = _from_seed(rng)
    if _is_jax_key(rng):
        return list(sys.modules["jax"].random.split(rng, count))
    if count > 1 and compat.is_array_api_obj(rng):
        raise TypeError(f"rng must be a generator, a key or an integer seed to draw {count} times, got {describe(rng)}")
    return [rng] * count


def counted_key(rng: Any, like: Array) -> Any:
    """The key of `counted_normal` from an integer seed, or a JAX key for JAX arrays.

    Raises
    ------
    TypeError
        If `rng` is anything else: a generator has a state, which a run that stops and goes on cannot share.
    """
    if _is_jax_key(rng):
        _check_rng_library(is_jax(like), rng, like)
        return rng
    if not is_integer(rng):
        raise TypeError(f"rng must be an integer seed (or a JAX key with JAX arrays), got {describe(rng)}")
    if rng < 0:
        raise ValueError(f"rng must be at least 0, got {rng}")
    if is_jax(like):
        return sys.modules["jax"].random.key(int(rng))
    return tuple(int(word) for word in np.random.SeedSequence(int(rng)).generate_state(2, np.uint64))


def counted_normal(key: Any, stream: int, step: Any, members: Array, size: int, xp: Namespace, like: Array) -> Array:
    """N(0, 1) variables, (members, size), that depend on nothing but the key, the step and each member's number.

    Parameters
    ----------
    key : what `counted_key` returns
    stream : int
        Keeps draws for different ends apart.
    step : int
        An integer of Python, or in a JAX trace an array.
    members : array of int, shape (members,)
        Numbers of the members: consecutive ones on the host, a JAX array in a JAX trace.
    size : int
        Draws for each member.
    """
    if is_jax(like):
        random = sys.modules["jax"].random
        key = random.fold_in(random.fold_in(key, stream), step)
        draw = sys.modules["jax"].vmap(lambda m: random.normal(random.fold_in(key, m), (size,), dtype=like.dtype))
        return draw(members)
    blocks, count = -(-size // 4), len(members)
    first = int(members[0]) * blocks if count else 0
    bits = np.random.Philox(key=np.asarray(key, np.uint64), counter=np.asarray([first, 0, step, stream], np.uint64))
    words = bits.random_raw(count * blocks * 4).reshape(count, 2, blocks * 2)
    # Box and Muller, since a rejection method takes an unknown number of words for each variable.
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0])), 2.0 * math.pi * uniform[:, 1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return asarray_like(xp, normal[:, :size], like)


class MemberNoise(NamedTuple):
    """A source of randomness for `standard_normal` where members are the second axis: `counted_normal` for each.

    What a member draws does not depend on the members beside it.
    """

    key: Any
    stream: int
    step: Any
    members: Any

    def draw(self, shape: Shape, xp: Namespace, like: Array) -> Array:
        """N(0, 1) variables of a shape (draws, members, ...)."""
        draws, members, *core = shape
        size = draws * math.prod(core)
        noise = counted_normal(self.key, self.stream, self.step, self.members, size, xp, like)
        return xp.moveaxis(xp.reshape(noise, (members, draws, *core)), 0, 1)


def counted_permutation(key: Any, stream: int, round_: Any, size: int, xp: Namespace, like: Array) -> Array:
    """A random order of `size` things that depends on nothing but the key and the round."""
    if is_jax(like):
        random = sys.modules["jax"].random
        return random.permutation(random.fold_in(random.fold_in(key, stream), round_), size)
    bits = np.random.Philox(key=np.asarray(key, np.uint64), counter=np.asarray([0, 0, round_, stream], np.uint64))
    return xp.asarray(np.random.Generator(bits).permutation(size), device=device(like))


def key_data(key: Any) -> np.ndarray[Any, Any]:
    """The numbers in a key of `counted_key`."""
    if isinstance(key, tuple):
        return np.asarray(key, np.uint64)
    jax = sys.modules["jax"]
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)
