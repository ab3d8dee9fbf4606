"""Histories as xarray Datasets."""

from __future__ import annotations

import importlib
from typing import Any

from natgrad_array import _arrays
from natgrad_array.simulation.history import History, core_dimensions


def need(module: str) -> Any:
    """Import a library that only stores and datasets need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{module} is needed for this; install it with: pip install "natgrad-array[simulation]"', name=module
        ) from error


def dataset(history: History) -> Any:
    """The whole history, in memory."""
    xarray, axes = need("xarray"), history._axes
    leading = ("step", *axes.names)
    variables: dict[str, Any] = {}
    for name, array in history.records.items():
        values = _arrays.to_numpy(array)
        variables[name] = ((*leading, *core_dimensions(name, values.ndim - len(leading))), values)
    for i, (pair, w) in enumerate(zip(history._dimensions, history.weights, strict=True)):
        variables[f"weights_{i + 1}"] = ((*axes.names, *pair), _arrays.to_numpy(w))
    for name in ("diverged_at", "converged_at"):
        variables[name] = (axes.names, _arrays.to_numpy(getattr(history, name)))
    coordinates: dict[str, Any] = {"step": history.steps}
    coordinates |= {name: values for name, values in zip(axes.names, axes.values, strict=True) if values is not None}
    variables["step_size"] = (axes.names, _arrays.to_numpy(history.learning_rate))
    return xarray.Dataset(variables, coordinates, dict(history.attributes))


def open_store(path: str) -> Any:
    """A Zarr store that a simulation wrote, read as it is used."""
    need("zarr")
    return need("xarray").open_zarr(path, consolidated=False, chunks=None)
