"""An ensemble and its members: taken from arrays or from a constructor, and cut into pieces that fit in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.products import Weights, check_weights, widths
from natgrad_array.deep_linear.task import GaussianTask

Constructor = Callable[[int, int], Weights]


def rows(xp: Namespace, array: Array, core_ndim: int, batch: Shape, start: int, stop: int) -> Array:
    """Members `start` to `stop`, in C order, of an array that broadcasts to a batch shape.

    What all members share comes back without a batch axis.
    """
    split = array.ndim - core_ndim
    own, core = tuple(array.shape[:split]), tuple(array.shape[split:])
    if not own or (math.prod(own) == 1 and math.prod(batch) != 1):
        return xp.reshape(array, core)
    flat = xp.reshape(array, (math.prod(own), *core))
    if math.prod(own) == math.prod(batch):
        return flat[start:stop, ...]
    strides = [0 if length == 1 else math.prod(own[i + 1 :]) for i, length in enumerate(own)]
    places = np.unravel_index(np.arange(start, stop), batch)[len(batch) - len(own) :]
    index = sum((stride * place for stride, place in zip(strides, places, strict=True)), np.zeros(stop - start, int))
    return xp.take(flat, xp.asarray(index, device=_arrays.device(array)), axis=0)


def stacked(xp: Namespace, array: Array, members: int) -> Array:
    """A new array with a batch axis of its own, whatever `rows` gave."""
    return xp.broadcast_to(array, (members, *array.shape[-2:])) + 0.0


class Piece(NamedTuple):
    """Members that are simulated together."""

    start: int
    stop: int
    region: tuple[slice, ...]
    """Where they are in the batch."""

    @property
    def members(self) -> int:
        """How many."""
        return self.stop - self.start


def cut(batch: Shape, most: int) -> tuple[Piece, ...]:
    """Cut a batch into pieces of at most so many members, each a block of the batch and consecutive in C order."""
    members = math.prod(batch)
    if members <= most:
        return (Piece(0, members, tuple(slice(0, length) for length in batch)),)
    axis, inner = len(batch) - 1, 1
    while inner * batch[axis] <= most:
        inner *= batch[axis]
        axis -= 1
    # As equal as can be, all but the last.
    count = -(-batch[axis] // max(1, most // inner))
    length = -(-batch[axis] // count)
    pieces, start = [], 0
    for outer in np.ndindex(*batch[:axis]):
        for begin in range(0, batch[axis], length):
            end = min(begin + length, batch[axis])
            region = (
                *(slice(place, place + 1) for place in outer),
                slice(begin, end),
                *(slice(0, whole) for whole in batch[axis + 1 :]),
            )
            pieces.append(Piece(start, start + (end - begin) * inner, region))
            start = pieces[-1].stop
    return tuple(pieces)


class Members:
    """Stacks of layers, and settings that may differ between members; checked when it is made.

    Parameters
    ----------
    weights : sequence of arrays, or callable
    members : int or tuple of int, optional
        The batch shape, where `weights` is a callable.
    options : mapping of str to float, array or None
        Settings of at least 0, of shapes (*batch,).
    others : callable
        Batch shapes of what else members have, by name, asked for when layers are known to fit.
    """

    noun = "weights"
    """What users call the layers."""

    def __init__(
        self, weights: Any, members: Any, options: Mapping[str, Any], others: Callable[[], Mapping[str, Shape]]
    ) -> None:
        self.constructor: Constructor | None = weights if callable(weights) else None
        shapes: dict[str, Shape] = {}
        if self.constructor is not None:
            shapes["members"] = _check_members(members)
            if 0 in shapes["members"]:
                raise ValueError(f"members must be at least 1 where {self.noun} is a callable, got {members!r}")
            weights = self.constructor(0, 1)
        elif members is not None:
            raise ValueError(f"members is the batch shape where {self.noun} is a callable; arrays have their own")
        self.xp, self.arrays = self.check(weights)
        self.like, self.cores = self.arrays[0], [tuple(layer.shape[-2:]) for layer in self.arrays]
        if _arrays.is_lazy(self.like):
            raise TypeError(
                f"{self.noun} must have values: a simulation does not run inside jit, it compiles its own loops"
            )
        if self.constructor is None:
            shapes |= {f"{self.noun}[{i}]": tuple(layer.shape[:-2]) for i, layer in enumerate(self.arrays)}
        self.options = {
            name: value if value is None else _arrays.check_nonnegative(name, value, self.xp, self.like)
            for name, value in options.items()
        }
        given = {name: value for name, value in self.options.items() if value is not None}
        shapes |= {name: tuple(getattr(value, "shape", ())) for name, value in given.items()}
        self.batch = _arrays.broadcast_batch(shapes | dict(others()))
        if self.constructor is not None and self.batch != shapes["members"]:
            raise ValueError(f"members must be the whole batch shape, {self.batch}, got {members!r}")

    def check(self, weights: Any) -> tuple[Namespace, tuple[Array, ...]]:
        """The namespace of layers, and the layers.

        Raises
        ------
        TypeError, ValueError
            If they do not fit.
        """
        raise NotImplementedError("an ensemble says which layers fit")

    @property
    def members(self) -> int:
        """How many networks."""
        return math.prod(self.batch)

    def from_host(self, array: Any) -> Array:
        """A NumPy array as one of the ensemble's library and device."""
        return self.xp.asarray(array, device=_arrays.device(self.like))

    def bare(self) -> Self:
        """The same without weights that were given as arrays: to other processes they go piece by piece."""
        if self.constructor is not None:
            return self
        found = copy.copy(self)
        found.arrays, found.like = (), self.xp.zeros((), dtype=self.like.dtype, device=_arrays.device(self.like))
        return found

    def layers(self, start: int, stop: int) -> tuple[Array, ...]:
        """New weights of some members, (members, n_i, n_{i-1})."""
        if self.constructor is None:
            given = tuple(rows(self.xp, layer, 2, self.batch, start, stop) for layer in self.arrays)
            return tuple(stacked(self.xp, layer, stop - start) for layer in given)
        _, given = self.check(self.constructor(start, stop))
        wanted = [(stop - start, *core) for core in self.cores]
        if [tuple(layer.shape) for layer in given] != wanted or given[0].dtype != self.like.dtype:
            shapes = [tuple(layer.shape) for layer in given]
            raise ValueError(
                f"{self.noun}({start}, {stop}) must return {self.like.dtype} arrays of shapes {wanted}, "
                f"got {given[0].dtype} and {shapes}"
            )
        return tuple(layer + 0.0 for layer in given)

    def option(self, name: str, start: int, stop: int) -> Array | None:
        """A setting of some members, (members,)."""
        value = self.options[name]
        if value is None:
            return None
        if isinstance(value, float):
            value = _arrays.asarray_like(self.xp, value, self.like)
        return self.xp.broadcast_to(rows(self.xp, value, 0, self.batch, start, stop), (stop - start,)) + 0.0


class Ensemble(Members):
    """Deep linear networks and their task.

    Parameters
    ----------
    weights : sequence of arrays, or callable
    task : GaussianTask
    members, options
        As for `Members`.
    """

    def __init__(
        self, weights: Weights | Constructor, task: GaussianTask, members: Any, options: Mapping[str, Any]
    ) -> None:
        self.task = task
        super().__init__(weights, members, options, lambda: {"task": task.batch_shape})
        self.widths = widths(self.arrays)

    def check(self, weights: Any) -> tuple[Namespace, tuple[Array, ...]]:
        """Layers that chain, and fit the task."""
        return check_weights(weights, self.task)

    def task_of(self, start: int, stop: int) -> GaussianTask:
        """The task of some members; what all share has no batch axis."""
        return self.task._mapped(lambda array, core: rows(self.xp, array, core, self.batch, start, stop))


def _check_members(members: Any) -> Shape:
    shape = (members,) if _arrays.is_integer(members) else members
    if not isinstance(shape, tuple | list) or not all(_arrays.is_integer(n) and n >= 0 for n in shape):
        raise ValueError(f"members must be the batch shape, an integer or a tuple of them, got {members!r}")
    return tuple(int(n) for n in shape)
