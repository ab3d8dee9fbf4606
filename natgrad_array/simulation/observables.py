"""What can be recorded of a deep linear network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from natgrad_array import _arrays, linalg
from natgrad_array._arrays import Array, Namespace
from natgrad_array.deep_linear.products import balancedness, end_to_end_velocity, half_square, widths
from natgrad_array.deep_linear.task import GaussianTask


class Modes(NamedTuple):
    """The singular vectors and values of an optimum W*, which do not change in the course of a run."""

    left: Array
    values: Array
    right: Array

    def part(self, piece: slice) -> Modes:
        """Those of some members, where members have their own."""
        return Modes(*(a[piece] if a.ndim > core else a for a, core in zip(self, (2, 1, 2), strict=True)))


def modes_of(xp: Namespace, task: GaussianTask) -> Modes:
    """U, s and V of W*."""
    u, s, vh = linalg.svd(xp, task.factors.optimum)
    return Modes(u, s, vh.mT)


def target_modes(xp: Namespace, task: GaussianTask, names: tuple[str, ...]) -> Array | None:
    """The singular values of W*, where records are in their order."""
    return modes_of(xp, task).values if any(name in NEED_MODES for name in names) else None


class View:
    """Networks at one moment; what several records need is worked out once."""

    def __init__(
        self,
        xp: Namespace,
        layers: tuple[Array, ...],
        task: GaussianTask,
        modes: Modes | None,
        direction: Callable[[], tuple[Array, ...]],
    ) -> None:
        self.xp, self.layers, self.task, self.modes, self._direction = xp, layers, task, modes, direction

    @functools.cached_property
    def end_to_end(self) -> Array:
        """W, (*batch, n_L, n_0)."""
        product = self.layers[0]
        for layer in self.layers[1:]:
            product = layer @ product
        return product

    @functools.cached_property
    def excess_loss(self) -> Array:
        """½ ‖R⁻¹(W* − W)S‖²."""
        factors = self.task.factors
        error = factors.target - factors.whiten(linalg.matmul(self.end_to_end, factors.input_root))
        return half_square(self.xp, error)[..., 0, 0]

    def loss(self) -> Array:
        """The minimum loss and the excess."""
        return self.excess_loss + self.task.factors.minimum_loss

    def along_modes(self, matrix: Array) -> Array:
        """u_kᵀ matrix v_k for every mode of the target, in its order."""
        assert self.modes is not None
        return self.xp.sum((self.modes.left.mT @ matrix) * self.modes.right.mT, axis=-1)

    def rates(self) -> Array:
        """The velocity of every mode over its distance from the target."""
        assert self.modes is not None
        moved = self.along_modes(-end_to_end_velocity(self.layers, self._direction()))
        left = self.modes.values - self.along_modes(self.end_to_end)
        return self.xp.where(left != 0.0, moved / self.xp.where(left != 0.0, left, 1.0), self.xp.nan)

    def balancedness(self) -> Array:
        """Frobenius norms of W_{i+1}ᵀ W_{i+1} − W_i W_iᵀ, (*batch, L − 1)."""
        return self.xp.stack([_arrays.norms(self.xp, b) for b in balancedness(self.layers)], axis=-1)

    def rank(self) -> Array:
        """How many singular values of W are above the rounding of the product."""
        s = linalg.svd(self.xp, self.end_to_end)[1]
        cutoff = sum(widths(self.layers)) * _arrays.eps(self.xp, s)
        above = s > cutoff * self.xp.max(s, axis=-1, keepdims=True)
        counted = self.xp.astype(self.xp.count_nonzero(above, axis=-1), s.dtype)
        return self.xp.where(self.xp.isnan(s[..., 0]), self.xp.nan, counted)


OBSERVABLES: dict[str, Callable[[View], Array]] = {
    "loss": View.loss,
    "excess_loss": lambda view: view.excess_loss,
    "end_to_end": lambda view: view.end_to_end,
    "modes": lambda view: view.along_modes(view.end_to_end),
    "rates": View.rates,
    "balancedness": View.balancedness,
    "rank": View.rank,
}

OF_END_TO_END = ("loss", "excess_loss", "end_to_end", "modes", "rank")
"""Those that need no layers."""

NEED_MODES = ("modes", "rates")


def check_records(
    record: Any,
    reserved: frozenset[str],
    observables: Collection[str] = OBSERVABLES.keys(),
    arguments: str = "(weights, task)",
) -> tuple[tuple[str, Any], ...]:
    """Names and what they stand for: None for one of the observables, else a callable.

    Raises
    ------
    TypeError, ValueError
        If `record` is not names, callables or a mapping of them, or names are unknown, taken or twice.
    """
    if isinstance(record, str) or callable(record):
        record = (record,)
    if hasattr(record, "items"):
        pairs = [(name, None if value == name else value) for name, value in record.items()]
    elif isinstance(record, tuple | list):
        pairs = [(item, None) if isinstance(item, str) else (getattr(item, "__name__", None), item) for item in record]
    else:
        raise TypeError(
            f"record must be names, callables, or a dictionary of callables by name, got {_arrays.describe(record)}"
        )
    known = ", ".join(map(repr, observables))
    for name, value in pairs:
        if value is None and name not in observables:
            raise ValueError(f"record names {name!r}, which is none of {known}; pass a callable for your own")
        if value is not None and not callable(value):
            raise TypeError(f"record[{name!r}] must be a callable of {arguments}, got {_arrays.describe(value)}")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"record must name each callable by an identifier, got {name!r}: use a dictionary")
        if value is not None and (name in observables or name in reserved or name.startswith("_")):
            raise ValueError(f"record names a callable {name!r}, which is taken; choose another name")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"record must name everything once, got {names}")
    return tuple(pairs)
