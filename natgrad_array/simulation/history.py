"""What a simulation leaves: the records, the last weights, and what became of each member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.simulation.state import RUNNING


class Axes(NamedTuple):
    """The batch axes of an ensemble."""

    shape: Shape
    names: tuple[str, ...]
    values: tuple[Any, ...]
    """A list of coordinates for each axis, or None."""


class History:
    """What a simulation leaves; made by `simulate` and `simulate_training`.

    Attributes
    ----------
    steps : numpy array of int, shape (records,)
        The steps that were recorded.
    records : mapping of str to array, shapes (records, *batch, ...)
        What was recorded, by name; each is an attribute too: ``history.loss``. Of a member
        that diverged the records from then on are NaN.
    weights : tuple of arrays, shapes (*batch, n_i, n_{i-1})
        The last weights, or parameters with the bias as last column; those of a member that
        diverged as they were at the last record at which its loss was finite. The
        exponential integrator leaves the end-to-end matrix alone, a network of one layer.
    learning_rate : array, shape (*batch,)
        The learning rate of each member; NaN where an optimizer finds its own.
    diverged_at : array of int, shape (*batch,)
        The recorded step at which a member's loss was not finite any more, −1 if it always was.
    converged_at : array of int, shape (*batch,)
        The recorded step at which a member was frozen for having converged, −1 if it was not.
    regime : str or None
        The regime of a deep linear network's widths.
    target_modes : array or None
        The singular values of the optimum in the order of recorded modes and rates, (*batch, modes),
        with the batch shape of the task.
    attributes : mapping
        Rule and integrator, or optimizer and network; seed, versions, device, dtype and command of the run.
    store : str or None
        The Zarr store that records and weights are in. Arrays are then Zarr's: index them.

    Examples
    --------
    Steps of ½ take half of what is left of every mode.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
    >>> history = ng.simulate((np.zeros((2, 2)),), task, learning_rate=0.5, steps=3, record="modes")
    >>> history
    History(batch_shape=(), steps=3, records=4 of modes; 0 diverged)
    >>> history.modes
    array([[0.   , 0.   ],
           [1.5  , 0.5  ],
           [2.25 , 0.75 ],
           [2.625, 0.875]])
    >>> history.time, history.target_modes, int(history.diverged_at)
    (array([0. , 0.5, 1. , 1.5]), array([3., 1.]), -1)
    """

    def __init__(
        self,
        records: Mapping[str, Array],
        weights: tuple[Array, ...],
        finals: Mapping[str, Array],
        *,
        steps: tuple[int, ...],
        axes: Axes,
        attributes: Mapping[str, Any],
        regime: str | None = None,
        target_modes: Array | None = None,
        store: str | None = None,
        dimensions: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self.steps = np.asarray(steps)
        self.records, self.weights, self.regime = records, weights, regime
        self.learning_rate = finals["step_size"]
        self.diverged_at, self.converged_at = finals["diverged_at"], finals["converged_at"]
        self.attributes, self.target_modes, self.store = attributes, target_modes, store
        self._axes = axes
        self._dimensions = weight_dimensions(weights) if dimensions is None else list(dimensions)

    def __getattr__(self, name: str) -> Array:
        records = self.__dict__.get("records", {})
        if name in records:
            return records[name]
        raise AttributeError(f"nothing called {name!r} was recorded; there is {', '.join(records) or 'nothing'}")

    @property
    def batch_shape(self) -> Shape:
        """Batch shape of the ensemble."""
        return self._axes.shape

    @property
    def diverged(self) -> Array:
        """Which members diverged, (*batch,)."""
        return self.diverged_at[...] != RUNNING

    @property
    def converged(self) -> Array:
        """Which members were frozen for having converged, (*batch,)."""
        return self.converged_at[...] != RUNNING

    @property
    def time(self) -> Array:
        """Steps times learning rate, (records, *batch)."""
        rate = self.learning_rate[...]
        xp = _arrays.namespace(rate)
        steps = _arrays.asarray_like(xp, self.steps, rate)
        return xp.reshape(steps, (-1, *(1,) * rate.ndim)) * rate

    def to_xarray(self) -> Any:
        """Make an xarray Dataset with named dimensions.

        Returns
        -------
        xarray.Dataset
            Records along "step" and the axes of the ensemble, the last weights, and the
            attributes of the run. From a store it is read as it is used.

        Raises
        ------
        ModuleNotFoundError
            If xarray is not installed (the extra "simulation").

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
        >>> weights = ng.deep_linear.orthogonal(0, (2, 2, 2), (5,), like=np.empty(0))
        >>> history = ng.simulate(weights, task, learning_rate=0.1, steps=20, axes=("seed",))
        >>> dict(history.to_xarray().sizes)
        {'step': 21, 'seed': 5, 'width_1': 2, 'width_0': 2, 'width_2': 2}
        """
        from natgrad_array.simulation import datasets

        return datasets.open_store(self.store) if self.store is not None else datasets.dataset(self)

    def __repr__(self) -> str:
        diverged = int(np.count_nonzero(_arrays.to_numpy(self.diverged)))
        converged = int(np.count_nonzero(_arrays.to_numpy(self.converged)))
        frozen = f", {converged} converged" if converged else ""
        return (
            f"History(batch_shape={self.batch_shape}, steps={int(self.steps[-1])}, records={len(self.steps)} of "
            f"{', '.join(self.records)}; {diverged} diverged{frozen})"
        )


RESERVED = frozenset(name for name in dir(History) if not name.startswith("_")) | {
    "records",
    "weights",
    "steps",
    "regime",
    "learning_rate",
    "diverged_at",
    "converged_at",
    "attributes",
    "target_modes",
    "store",
    "step",
    "step_size",
}
"""Names that no record can have."""


def core_dimensions(name: str, core_ndim: int) -> tuple[str, ...]:
    """Names of the axes that a record has beyond those of steps and members."""
    known = {
        "end_to_end": ("output", "input"),
        "modes": ("mode",),
        "rates": ("mode",),
        "balancedness": ("layer",),
    }
    return known.get(name, tuple(f"{name}_{i}" for i in range(core_ndim)))


def weight_dimensions(weights: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Names of the axes of each layer; the axis between two layers is one."""
    return [(f"width_{i + 1}", f"width_{i}") for i in range(len(weights))]


def check_axes(axes: Any, batch: Shape, taken: tuple[str, ...]) -> Axes:
    """Names and coordinates of the batch axes, made up where none are given.

    Raises
    ------
    TypeError, ValueError
        If they do not fit the batch shape, or a name is no identifier or taken.
    """
    if axes is None:
        names = ("member",) if len(batch) == 1 else tuple(f"batch_{i}" for i in range(len(batch)))
        return Axes(batch, names, (None,) * len(batch))
    if hasattr(axes, "items"):
        names, values = tuple(axes), tuple(axes.values())
    elif isinstance(axes, tuple | list):
        names, values = tuple(axes), (None,) * len(axes)
    else:
        raise TypeError(f"axes must be a sequence of names or a dictionary of coordinates, got {axes!r}")
    if len(names) != len(batch) or len(set(names)) != len(names):
        raise ValueError(f"axes must name each of the {len(batch)} axes of the batch shape {batch} once, got {names}")
    lists = []
    for name, value, length in zip(names, values, batch, strict=True):
        if not isinstance(name, str) or not name.isidentifier() or name in (*taken, "step", "step_size"):
            raise ValueError(f"axes must be named by identifiers that no record has, got {name!r}")
        if value is not None:
            value = _arrays.to_numpy(value) if hasattr(value, "dtype") else np.asarray(list(value))
            if value.shape != (length,) or value.dtype.kind not in "iufb":
                raise ValueError(f"axes[{name!r}] must be {length} numbers, got {value.dtype} of shape {value.shape}")
        lists.append(value)
    return Axes(batch, names, tuple(lists))
