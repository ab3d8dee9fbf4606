"""Deep linear networks as something that can be simulated: a rule, an integrator, and what is recorded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Namespace, Shape
from natgrad_array.deep_linear.products import Weights, check_tangent
from natgrad_array.deep_linear.slopes import slope
from natgrad_array.deep_linear.task import GaussianTask
from natgrad_array.simulation.observables import OBSERVABLES, Modes, View
from natgrad_array.simulation.state import State, masked, rest, settle

Rule = str | Callable[[Weights, GaussianTask], Weights]
Layers = tuple[Array, ...]

INTEGRATORS = ("euler", "rk4", "exponential")

_LANGEVIN, _LABELS = 0, 1
"""Streams of random numbers."""


class Data(NamedTuple):
    """The arrays of a run that do not change: members are their first axis, where they have one for members."""

    task: GaussianTask
    rate: Array
    """(members, 1, 1): the learning rate."""
    tolerance: Array | None
    """(members,): excess loss at which a member has converged."""
    temperature: Array | None
    """(members, 1, 1)."""
    label_noise: Array | None
    """(members, 1, 1)."""
    modes: Modes | None
    key: Any
    members: Any
    """(members,): the numbers of the members in the ensemble, on the host (on JAX an array)."""

    def part(self, piece: slice) -> Data:
        """Some of the members; what all share has no axis for them."""
        own = {
            name: None if (array := getattr(self, name)) is None else array[piece]
            for name in ("rate", "tolerance", "temperature", "label_noise", "members")
        }
        task = self.task._mapped(lambda array, core: array[piece] if array.ndim > core else array)
        modes = None if self.modes is None else self.modes.part(piece)
        return self._replace(task=task, modes=modes, **own)


@dataclasses.dataclass(frozen=True)
class DeepLinear:
    """How deep linear networks move and what is recorded of them; hashable, so that compiled loops are found again."""

    rule: Rule
    integrator: str
    records: tuple[tuple[str, Any], ...]
    depth: int
    """L; the exponential integrator keeps the end-to-end matrix alone."""
    dense: bool
    """Whether every step is recorded: a compiled loop then has none within."""

    @property
    def names(self) -> tuple[str, ...]:
        """What is recorded."""
        return tuple(name for name, _ in self.records)

    @property
    def own_code(self) -> bool:
        """Whether nothing of the user's is called."""
        return isinstance(self.rule, str) and all(function is None for _, function in self.records)

    @property
    def shares_products(self) -> bool:
        """Whether all that is recorded comes out of the pass that gives the direction."""
        return self.own_code and self.integrator != "exponential" and {"loss", "excess_loss"} >= set(self.names)

    def cuts_to_cache(self, like: Array, widths: Shape) -> bool:
        """Whether NumPy's stacks are worked on in parts that fit a cache."""
        return self.own_code and _arrays.is_numpy(like) and max(widths) <= _arrays.BLAS_THREADS_FROM

    # ------------------------------------------------------------------------- recording

    def interval(self, xp: Namespace, data: Data, state: State, number: Any, length: Any) -> tuple[State, Layers]:
        """Record, and go `length` steps on, at least one."""
        if self.shares_products and data.label_noise is None:
            assert isinstance(self.rule, str)
            found = slope(xp, state.weights, data.task, self.rule, with_excess=True)
            excess = found[-1][:, 0, 0]
            state, mask, direction = settle(xp, self, state, excess, data.tolerance, number, found[:-1])
            seen = {"excess_loss": excess, "loss": excess + data.task.factors.minimum_loss}
            weights = self.step(xp, data, state.rate, state.weights, number, direction)
            if not self.dense:
                weights = self.steps(xp, data, state.rate, weights, number + 1, length - 1)
            return state._replace(weights=weights), tuple(masked(xp, mask, seen[name]) for name in self.names)
        state, found = self.look(xp, data, state, number)
        return state._replace(weights=self.steps(xp, data, state.rate, state.weights, number, length)), found

    def look(self, xp: Namespace, data: Data, state: State, number: Any) -> tuple[State, Layers]:
        """Record without going on."""
        view = View(xp, state.weights, data.task, data.modes, lambda: self.direction(xp, data.task, state.weights))
        settled, mask, _ = settle(xp, self, state, view.excess_loss, data.tolerance, number)
        found = tuple(
            OBSERVABLES[name](view) if function is None else function(state.weights, data.task)
            for name, function in self.records
        )
        dtype = state.rate.dtype
        found = tuple(value if value.dtype == dtype else xp.astype(value, dtype) for value in found)
        return settled, tuple(masked(xp, mask, value) for value in found)

    def rest(self, xp: Namespace, state: State) -> State:
        """Members that have diverged do no harm and do not move."""
        return rest(xp, state)

    def finals(self, data: Data, state: State) -> dict[str, Array]:
        """The learning rates."""
        return {"step_size": data.rate[:, 0, 0]}

    # ---------------------------------------------------------------------------- moving

    def direction(self, xp: Namespace, task: GaussianTask, weights: Layers) -> Layers:
        """The descent direction of the rule."""
        if isinstance(self.rule, str):
            return slope(xp, weights, task, self.rule, with_excess=False)
        return tuple(self.rule(weights, task))

    def check_rule(self, task: GaussianTask, weights: Layers) -> None:
        """Call a rule of the user's once, to see that it gives directions."""
        if not isinstance(self.rule, str):
            check_tangent("rule(weights, task)", self.rule(weights, task), weights)

    def steps(self, xp: Namespace, data: Data, rate: Array, weights: Layers, number: Any, count: Any) -> Layers:
        """`count` steps from step `number` on."""
        if self.integrator == "exponential":
            return self._flow(xp, data.task, rate * count, weights)

        def body(i: Any, weights: Layers) -> Layers:
            return self.step(xp, data, rate, weights, number + i, None)

        found: Layers = _arrays.repeat(body, weights, count)
        return found

    def step(
        self, xp: Namespace, data: Data, rate: Array, weights: Layers, number: Any, direction: Layers | None
    ) -> Layers:
        """One step, along a direction that is known already if one is given."""
        task = data.task
        if data.label_noise is not None:
            size = task.n_outputs * task.input_rank
            noise = _arrays.counted_normal(data.key, _LABELS, number, data.members, size, xp, rate)
            noise = xp.reshape(noise, (-1, task.n_outputs, task.input_rank))
            task = task._with_noisy_targets(data.label_noise * noise)
        first = self.direction(xp, task, weights) if direction is None else direction
        if self.integrator == "rk4":
            second = self.direction(xp, task, _moved(weights, 0.5 * rate, first))
            third = self.direction(xp, task, _moved(weights, 0.5 * rate, second))
            fourth = self.direction(xp, task, _moved(weights, rate, third))
            first = tuple(a + 2.0 * b + 2.0 * c + d for a, b, c, d in zip(first, second, third, fourth, strict=True))
            return _moved(weights, rate / 6.0, first)
        moved = _moved(weights, rate, first)
        if data.temperature is None:
            return moved
        sizes = [math.prod(w.shape[1:]) for w in weights]
        noise = _arrays.counted_normal(data.key, _LANGEVIN, number, data.members, sum(sizes), xp, rate)
        scale, shaken, begin = xp.sqrt(2.0 * data.temperature * rate), [], 0
        for w, size in zip(moved, sizes, strict=True):
            shaken.append(w + scale * xp.reshape(noise[:, begin : begin + size], w.shape))
            begin += size
        return tuple(shaken)

    def _flow(self, xp: Namespace, task: GaussianTask, time: Array, weights: Layers) -> Layers:
        """W* + exp(−t)(W − W*) on the range of Σ."""
        (product,), factors = weights, task.factors
        error = factors.target - factors.whiten(product @ factors.input_root)
        speed = self.depth if self.rule == "block_diagonal" else 1
        return (product - xp.expm1(-speed * time) * factors.unwhiten(error @ factors.input_root_pinv),)


def _moved(weights: Layers, rate: Array, direction: Layers) -> Layers:
    return tuple(w - rate * d for w, d in zip(weights, direction, strict=True))
