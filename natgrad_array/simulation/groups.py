"""Networks of different shapes, or under different rules: ensembles that run one after another and are one result."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array.simulation.datasets import need
from natgrad_array.simulation.history import History
from natgrad_array.simulation.prepared import Prepared
from natgrad_array.simulation.progress import check_progress
from natgrad_array.simulation.simulate import prepare, simulate
from natgrad_array.simulation.simulate_training import prepare_training, simulate_training
from natgrad_array.simulation.store import new_group

_MARK = "natgrad_array_groups"


class Groups(Mapping[Any, History]):
    """Histories by the keys of their groups; made by `simulate_groups`, or of any histories.

    Parameters
    ----------
    histories : mapping
        By key, of `simulate` or `simulate_training`.
    names : tuple of str
        What keys, or their parts, stand for.
    store : str, optional
        The Zarr store that has a group for each of them.

    Attributes
    ----------
    histories : dict of History
        By key, in the order in which they ran.
    names : tuple of str
        What keys, or their parts, stand for.
    store : str or None
        The Zarr store that has a group for each of them. `xarray.open_datatree` opens it.

    Examples
    --------
    Two simulations that have run one by one, under one name.

    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
    >>> start = ng.deep_linear.orthogonal(0, (2, 2, 2), (5,), like=np.empty(0))
    >>> rules = ("gradient", "layerwise")
    >>> runs = {rule: ng.simulate(start, task, rule=rule, learning_rate=0.1, steps=10) for rule in rules}
    >>> groups = ng.simulation.Groups(runs, ("rule",))
    >>> groups
    Groups(2 by rule; 10 members, 0 diverged)
    >>> groups["layerwise"].loss.shape
    (11, 5)
    """

    def __init__(self, histories: Mapping[Any, History], names: tuple[str, ...], store: str | None = None) -> None:
        self.histories: dict[Any, History] = dict(histories)
        self.names, self.store = names, store

    def __getitem__(self, key: Any) -> History:
        return self.histories[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.histories)

    def __len__(self) -> int:
        return len(self.histories)

    def to_xarray(self) -> Any:
        """Make one xarray Dataset of all that has the same shape in every group.

        Returns
        -------
        xarray.Dataset
            With an axis in front for each name, where keys are all combinations of their
            parts; else with one axis "group" and the names as its coordinates. What
            differs in shape between groups, as weights do, is left out: each history has
            its own. Stores are read into memory.

        Raises
        ------
        ModuleNotFoundError
            If xarray is not installed (the extra "simulation").

        Examples
        --------
        >>> import numpy as np
        >>> import natgrad_array as ng
        >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
        >>> draw = ng.deep_linear.orthogonal
        >>> groups = {n: draw(0, (2, n, 2), (5,), like=np.empty(0)) for n in (2, 4)}
        >>> found = ng.simulation.simulate_groups(groups, task, names="width", learning_rate=0.1, steps=10)
        >>> dict(found.to_xarray()["loss"].sizes)
        {'width': 2, 'step': 11, 'member': 5}
        """
        xarray = need("xarray")
        parts = [_parts(key) for key in self.histories]
        axes = [tuple(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
        whole = sorted(map(repr, itertools.product(*axes))) == sorted(map(repr, parts))
        leading = self.names if whole else ("group",)
        lengths = tuple(len(axis) for axis in axes) if whole else (len(parts),)
        places = [tuple(axis.index(p) for axis, p in zip(axes, part, strict=True)) for part in parts]
        sets = [history.to_xarray() for history in self.histories.values()]
        variables: dict[str, Any] = {}
        for name, first in sets[0].data_vars.items():
            same = [
                name in other and other[name].dims == first.dims and other[name].shape == first.shape for other in sets
            ]
            if not all(same):
                continue
            values = np.empty((*lengths, *first.shape), first.dtype)
            for k, other in enumerate(sets):
                values[places[k] if whole else k] = other[name].values
            variables[name] = ((*leading, *first.dims), values)
        used = {dimension for dimensions, _ in variables.values() for dimension in dimensions}
        coordinates = {name: value for name, value in sets[0].coords.items() if name in used}
        for name, axis, column in zip(self.names, axes, zip(*parts, strict=True), strict=True):
            coordinates[name] = list(axis) if whole else ("group", list(column))
        attributes = {
            name: value for name, value in sets[0].attrs.items() if all(_equal(s.attrs.get(name), value) for s in sets)
        }
        return xarray.Dataset(variables, coordinates, attributes)

    def __repr__(self) -> str:
        members = sum(int(np.prod(history.batch_shape, dtype=np.int64)) for history in self.values())
        diverged = sum(int(np.count_nonzero(_arrays.to_numpy(history.diverged))) for history in self.values())
        return f"Groups({len(self)} by {', '.join(self.names)}; {members} members, {diverged} diverged)"


def simulate_groups(
    groups: Mapping[Any, Any],
    data: Any,
    /,
    *,
    names: str | Sequence[str] = "group",
    store: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Groups:
    """Simulate ensembles that differ in depth, width, rule or optimizer, one after another.

    Parameters
    ----------
    groups : mapping
        By key the weights of an ensemble, or a mapping of arguments of `simulate` that are
        its own, "weights" among them; with "net" and "params" among them, arguments of
        `simulate_training`. Keys are strings or numbers, or tuples of them.
    data : GaussianTask, or pair of arrays or callable
        What all learn, where a group does not bring a "task", or "samples", of its own.
    names : str or sequence of str
        What the keys stand for, or each of their parts.
    store : str or path, optional
        Where to make a Zarr store with a group for each.
    checkpoint : str or path, optional
        A folder for checkpoints, one for each group. Groups that have ended are not run again.
    progress : bool
        Whether to show a bar for each group.
    **options
        Arguments of `simulate`, or of `simulate_training`, for all groups.

    Returns
    -------
    Groups
        The histories by key, which make one xarray Dataset.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, in any group. Nothing has run then.
    FileExistsError, simulation.CheckpointError
        As `simulate` raises them.

    See Also
    --------
    simulate, simulate_training : what a group runs by.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
    >>> weights = ng.deep_linear.balanced(0, (2, 4, 4, 2), (5,), like=np.empty(0))
    >>> groups = {rule: {"weights": weights, "rule": rule} for rule in ("gradient", "layerwise")}
    >>> ng.simulation.simulate_groups(groups, task, names="rule", learning_rate=0.1, steps=10)
    Groups(2 by rule; 10 members, 0 diverged)

    Nonlinear networks of two widths, under an optimizer:

    >>> x = np.random.default_rng(0).standard_normal((50, 2))
    >>> nets = {width: ng.networks.MLP((2, width, 1)) for width in (4, 8)}
    >>> groups = {width: {"net": net, "params": net.init(0, (5,), like=x)} for width, net in nets.items()}
    >>> opt = ng.optimizers.foof(learning_rate=0.5)
    >>> ng.simulation.simulate_groups(groups, (x, x[:, :1] * x[:, 1:]), names="width", optimizer=opt, steps=10)
    Groups(2 by width; 10 members, 0 diverged)
    """
    if not isinstance(groups, Mapping) or not groups:
        raise TypeError(f"groups must be a mapping with at least one ensemble, got {_arrays.describe(groups)}")
    titles = (names,) if isinstance(names, str) else tuple(names)
    root = None if store is None else os.fspath(store)
    check_progress(progress)
    prepared = {}
    for key, group in groups.items():
        label = _label(titles, key)
        own = dict(group) if isinstance(group, Mapping) else {"weights": group}
        arguments = options | own | {"progress": label if progress else False}
        if root is not None:
            arguments["store"] = os.path.join(root, label)
        if checkpoint is not None:
            arguments["checkpoint"] = Path(checkpoint) / label
        prepared[key] = _prepared(key, own, arguments, data)
    if root is not None:
        _open(root, titles)
    return Groups({key: one.run() for key, one in prepared.items()}, titles, root)


def _prepared(key: Any, own: dict[str, Any], arguments: dict[str, Any], data: Any) -> Prepared:
    """All of a group's arguments checked."""
    trained = "net" in arguments
    needed, learnt = (("net", "params"), "samples") if trained else (("weights",), "task")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ValueError(f"groups[{key!r}] must have {missing[0]}, got {', '.join(map(repr, own)) or 'nothing'}")
    positional = [arguments.pop(name) for name in needed] + [arguments.pop(learnt, data)]
    bound = inspect.signature(simulate_training if trained else simulate).bind(*positional, **arguments)
    bound.apply_defaults()
    try:
        return (prepare_training if trained else prepare)(*bound.args, **bound.kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"groups[{key!r}]: {error}") from error


def _parts(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _label(names: tuple[str, ...], key: Any) -> str:
    """A key as the name of a folder.

    Raises
    ------
    TypeError, ValueError
        If it does not fit the names, or would not be a name.
    """
    parts = _parts(key)
    if len(parts) != len(names) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"names must have an identifier for each part of a key, got {names} for {key!r}")
    if not all(isinstance(part, str | int | float) for part in parts):
        raise TypeError(f"keys of groups must be strings or numbers, or tuples of them, got {key!r}")
    label = ",".join(f"{name}={part}" for name, part in zip(names, parts, strict=True))
    if not re.fullmatch(r"[\w=,.+-]+", label):
        raise ValueError(f"keys of groups must be made of letters, digits and -_.+, got {key!r}")
    return label


def _open(path: str, names: tuple[str, ...]) -> None:
    """Make the root of a store of groups, or see that it is one.

    Raises
    ------
    FileExistsError
        If there is something else.
    """
    zarr = need("zarr")
    if Path(path).exists():
        try:
            there = zarr.open_group(path, mode="r").attrs.get(_MARK)
        except (FileNotFoundError, ValueError, KeyError):
            there = None
        if there != list(names):
            raise FileExistsError(f"store {path!r} is another run's, or no store; choose another path")
        return
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_group(path) as group:
        group.attrs[_MARK] = list(names)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(np.all(a == b))
