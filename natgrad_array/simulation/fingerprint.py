"""What makes one run another than others, and what is written beside its results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterable
from types import CodeType
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.simulation.deep_linear import DeepLinear
from natgrad_array.simulation.ensemble import Ensemble, Members

_ROWS = 4096


def versions(like: Array) -> dict[str, str]:
    """Versions of this package, of NumPy and of the library of an array."""
    library, version = _arrays.library(like)
    try:
        own = importlib.metadata.version("natgrad-array")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {"natgrad_array": own, "numpy": np.__version__, library: version}


def attributes(ensemble: Ensemble, system: DeepLinear, steps: int, rng: Any) -> dict[str, Any]:
    """What a reader of results wants to know of the run: JSON values by name."""
    own = {"rule": _name(system.rule), "integrator": system.integrator, "widths": list(ensemble.widths)}
    rate = ensemble.options["learning_rate"]
    return about(ensemble, steps, rng) | own | ({"learning_rate": rate} if isinstance(rate, float) else {})


def about(ensemble: Members, steps: int, rng: Any) -> dict[str, Any]:
    """What there is to know of every run."""
    like = ensemble.like
    found: dict[str, Any] = {f"{name}_version": version for name, version in versions(like).items()}
    return found | {
        "library": _arrays.library(like)[0],
        "device": str(_arrays.device(like)),
        "dtype": dtype_name(like),
        "steps": steps,
        "seed": int(rng) if _arrays.is_integer(rng) else "none" if rng is None else "a JAX key",
        "command": shlex.join(sys.argv),
    }


def fingerprint(
    ensemble: Ensemble, system: DeepLinear, recorded: tuple[int, ...], key: Any, store: str | None
) -> dict[str, Any]:
    """JSON values that are the same for two runs that must have the same results, bit for bit."""
    own = {"rule": identity(system.rule), "integrator": system.integrator, "task": sum_of(_leaves(ensemble.task))}
    return identify(ensemble, system.records, recorded, key, store) | own


def identify(
    ensemble: Members, records: tuple[tuple[str, Any], ...], recorded: tuple[int, ...], key: Any, store: str | None
) -> dict[str, Any]:
    """The part of a fingerprint that every run has."""
    like = ensemble.like
    found: dict[str, Any] = {
        "versions": versions(like),
        "device": str(_arrays.device(like)),
        "dtype": dtype_name(like),
        "record": {name: identity(name if f is None else f) for name, f in records},
        "steps": recorded[-1],
        "recorded steps": digest(list(recorded)),
        "batch shape": list(ensemble.batch),
        "rng": sum_of([_arrays.key_data(key)]) if key is not None else "none",
        "store": store or "none",
    }
    for name, value in ensemble.options.items():
        found[name] = value if value is None or isinstance(value, float) else sum_of([_arrays.to_numpy(value)])
    if ensemble.constructor is None:
        found[ensemble.noun] = sum_of(part for layer in ensemble.arrays for part in in_parts(layer))
    else:
        last = ensemble.members - 1
        some = (*ensemble.layers(0, 1), *ensemble.layers(last, last + 1))
        found[ensemble.noun] = sum_of(_arrays.to_numpy(layer) for layer in some)
        found["constructor"] = identity(ensemble.constructor)
    return found


def digest(value: Any) -> str:
    """The SHA-256 sum of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def dtype_name(like: Array) -> str:
    """The name that NumPy has for a floating dtype."""
    return "float32" if _arrays.eps(_arrays.namespace(like), like) > 1e-10 else "float64"


def sum_of(arrays: Iterable[np.ndarray[Any, Any]]) -> str:
    """The SHA-256 sum of arrays, their dtypes and shapes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def in_parts(layer: Array) -> Iterable[np.ndarray[Any, Any]]:
    """An array on the host, some rows at a time."""
    if layer.ndim < 3:
        yield _arrays.to_numpy(layer)
        return
    for begin in range(0, layer.shape[0], _ROWS):
        yield _arrays.to_numpy(layer[begin : begin + _ROWS, ...])


def _leaves(task: Any) -> list[np.ndarray[Any, Any]]:
    names = ("input_moment", "noise_covariance", "cross_moment", "output_moment")
    return [_arrays.to_numpy(getattr(task, name)) for name in names]


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__qualname__)


def identity(function: Any) -> str:
    """A name, and for functions a sum of their code; what they close over is not seen."""
    if isinstance(function, str):
        return function
    code = getattr(function, "__code__", None)
    where = f"{getattr(function, '__module__', '')}.{_name(function)}"
    return where if code is None else f"{where} {_sum_of_code(code)}"


def _sum_of_code(code: CodeType) -> str:
    found = hashlib.sha256(code.co_code)
    found.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        found.update((_sum_of_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return found.hexdigest()[:16]
