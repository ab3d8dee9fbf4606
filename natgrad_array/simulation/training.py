"""Networks that an optimizer trains as something that can be simulated: minibatches, steps, and what is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array, MemberNoise, Namespace, Shape
from natgrad_array.networks.network import Network, check_samples, sample_axes
from natgrad_array.optimizers import stepping
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.stepping import OptimizerState
from natgrad_array.simulation.ensemble import Members, Piece, rows
from natgrad_array.simulation.state import RUNNING, State, idle, masked, rest, settle, start

Layers = tuple[Array, ...]
Batch = tuple[Array, Array]

RECORDS = ("loss", "training_loss", "held_out_loss", "damping")

_ORDERS, _DRAWS = 2, 3
"""Streams of random numbers."""


class Memory(NamedTuple):
    """What training carries from step to step beside the parameters."""

    optimizer: OptimizerState
    order: Any
    """(N,): the order of the samples in this pass through them; empty where all are one batch."""


class Data(NamedTuple):
    """The arrays of a run that do not change; what all members share has no axis for them."""

    samples: tuple[Array, ...]
    """Inputs and targets; empty where they are streamed."""
    held_out: tuple[Array, ...]
    rate: Array
    """(members, 1, 1): 1 for members that move."""
    tolerance: Array | None
    """(members,): loss at which a member has converged."""
    learning_rate: Array | None
    """(members,): that of the optimizer, where it has one."""
    weight_decay: Array | None
    """(members,): where it is an array."""
    key: Any
    members: Any
    """(members,): the numbers of the members in the ensemble, on the host (on JAX an array)."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How networks are trained and what is recorded of them; hashable, so that compiled loops are found again."""

    net: Network
    optimizer: Optimizer
    """With numbers in place of arrays: these are in `Data`."""
    records: tuple[tuple[str, Any], ...]
    stream: Callable[[Any], Any] | None
    """Batches by the number of the step, in place of samples."""
    count: int
    """N."""
    batch_size: int | None
    """None where all samples are one batch."""
    dense: bool
    """Whether every step is recorded: a compiled loop then has none within."""

    @property
    def names(self) -> tuple[str, ...]:
        """What is recorded."""
        return tuple(name for name, _ in self.records)

    def cuts_to_cache(self, like: Array, widths: Shape) -> bool:
        """Never: layers are as large as their batches."""
        return False

    # ------------------------------------------------------------------------- recording

    def interval(self, xp: Namespace, data: Data, state: State, number: Any, length: Any) -> tuple[State, Layers]:
        """Record, and go `length` steps on, at least one."""
        penalised = data.weight_decay is not None or self.optimizer.weight_decay != 0.0
        if not self.dense or penalised:
            state, seen, everyone = self._look(xp, data, state, number)
            return self._steps(xp, data, state, number, length, everyone), seen
        moved, memory, loss = self.step(xp, data, state.weights, state.memory, number)
        state, seen, everyone = self._observe(xp, data, state, number, loss)
        return self._kept(xp, state, moved, memory, everyone), seen

    def look(self, xp: Namespace, data: Data, state: State, number: Any) -> tuple[State, Layers]:
        """Record without going on."""
        state, seen, _ = self._look(xp, data, state, number)
        return state, seen

    def _look(self, xp: Namespace, data: Data, state: State, number: Any) -> tuple[State, Layers, bool]:
        x, y = self.batch(xp, data, self._order(xp, data, state.memory.order, number), number)
        return self._observe(xp, data, state, number, self.net.loss(state.weights, x, y))

    def _observe(self, xp: Namespace, data: Data, state: State, number: Any, loss: Array) -> tuple[State, Layers, bool]:
        """Put those to rest that have diverged or converged, and record; the last says if all are known to move."""
        settled, mask, _ = settle(xp, self, state, loss, data.tolerance, number)
        seen = []
        for name, function in self.records:
            if function is not None:
                value = function(state.weights, state.memory.optimizer)
            elif name == "loss":
                value = loss
            elif name == "damping":
                value = state.memory.optimizer.damping
            else:
                value = self.net.loss(state.weights, *(data.samples if name == "training_loss" else data.held_out))
            value = value if value.dtype == loss.dtype else xp.astype(value, loss.dtype)
            seen.append(masked(xp, mask, value))
        return settled, tuple(seen), mask is None and data.tolerance is None

    def rest(self, xp: Namespace, state: State) -> State:
        """Members that have diverged do no harm and do not move; nor does their memory."""
        state, memory = rest(xp, state), state.memory.optimizer
        fresh = stepping.start(self.optimizer, tuple(idle(xp, w) + xp.zeros_like(w) for w in state.weights))
        optimizer = _where(xp, state.diverged_at == RUNNING, memory, fresh)
        return state._replace(memory=state.memory._replace(optimizer=optimizer))

    # ---------------------------------------------------------------------------- moving

    def _steps(self, xp: Namespace, data: Data, state: State, number: Any, count: Any, everyone: bool) -> State:
        def body(i: Any, carry: tuple[Layers, Memory]) -> tuple[Layers, Memory]:
            weights, memory = carry
            moved, new, _ = self.step(xp, data, weights, memory, number + i)
            kept = self._kept(xp, state._replace(weights=weights, memory=memory), moved, new, everyone)
            return kept.weights, kept.memory

        weights, memory = _arrays.repeat(body, (state.weights, state.memory), count)
        return state._replace(weights=weights, memory=memory)

    def step(
        self, xp: Namespace, data: Data, weights: Layers, memory: Memory, number: Any
    ) -> tuple[Layers, Memory, Array]:
        """One step of the optimizer on the batch of a step number; the loss is that before it."""
        order = self._order(xp, data, memory.order, number)
        x, y = self.batch(xp, data, order, number)
        rng = None if data.key is None else MemberNoise(data.key, _DRAWS, number, data.members)
        optimizer = with_settings(self.optimizer, data.learning_rate, data.weight_decay)
        moved, state, info = stepping.step(optimizer, self.net, weights, memory.optimizer, x, y, rng, None)
        return moved, Memory(state, order), info.loss

    def _kept(self, xp: Namespace, state: State, moved: Layers, memory: Memory, everyone: bool) -> State:
        """The step, of the members that are not at rest."""
        if everyone:
            return state._replace(weights=moved, memory=memory)
        moves = state.rate[:, 0, 0] != 0.0
        weights, optimizer = _where(xp, moves, (moved, memory.optimizer), (state.weights, state.memory.optimizer))
        return state._replace(weights=weights, memory=Memory(optimizer, memory.order))

    def batch(self, xp: Namespace, data: Data, order: Any, number: Any) -> Batch:
        """Inputs and targets of a step."""
        if self.stream is not None:
            x, y = self.stream(number)
            return x, y
        x, y = data.samples
        if self.batch_size is None:
            return x, y
        begin = (number % (self.count // self.batch_size)) * self.batch_size
        chosen = (
            order[begin : begin + self.batch_size]
            if isinstance(number, int)
            else xp.take(order, begin + xp.arange(self.batch_size), axis=0)
        )
        of_x, of_y = sample_axes(self.net)
        return xp.take(x, chosen, axis=x.ndim - of_x), xp.take(y, chosen, axis=y.ndim - of_y)

    def _order(self, xp: Namespace, data: Data, order: Any, number: Any) -> Any:
        """The order of the samples at a step: a new one at the beginning of each pass."""
        if self.batch_size is None:
            return order
        passes = self.count // self.batch_size
        return _arrays.branch(
            number % passes == 0,
            lambda: _arrays.counted_permutation(data.key, _ORDERS, number // passes, self.count, xp, data.rate),
            lambda: order,
        )

    def finals(self, data: Data, state: State) -> dict[str, Array]:
        """The learning rates, NaN where the optimizer finds its own."""
        rate = data.rate[:, 0, 0]
        own = getattr(self.optimizer.scaling, "learning_rate", float("nan"))
        return {"step_size": 0.0 * rate + (own if data.learning_rate is None else data.learning_rate)}


def _where(xp: Namespace, members: Array, yes: Any, no: Any) -> Any:
    """Of some members one, of the others the other, in nested tuples; what members share is taken from the first."""
    if isinstance(yes, tuple):
        parts = [_where(xp, members, a, b) for a, b in zip(yes, no, strict=True)]
        return type(yes)(*parts) if hasattr(yes, "_fields") else tuple(parts)
    if yes is None or yes.ndim == 0:
        return yes
    return xp.where(xp.reshape(members, (-1, *(1,) * (yes.ndim - 1))), yes, no)


# ------------------------------------------------------------------------------ optimizers


def settings(optimizer: Optimizer) -> tuple[Optimizer, dict[str, Any]]:
    """An optimizer with numbers alone, and what was an array in it, by name."""
    found: dict[str, Any] = {"learning_rate": None, "damping": None, "weight_decay": None}
    scaling, damping = optimizer.scaling, optimizer.damping
    if hasattr(getattr(scaling, "learning_rate", None), "dtype"):
        found["learning_rate"] = getattr(scaling, "learning_rate")  # noqa: B009 - not all rules have one
        scaling = dataclasses.replace(scaling, learning_rate=1.0)  # type: ignore[type-var]
    if hasattr(damping.initial, "dtype"):
        found["damping"], damping = damping.initial, dataclasses.replace(damping, initial=0.0)
    decay = optimizer.weight_decay
    if hasattr(decay, "dtype"):
        found["weight_decay"], decay = decay, 0.0
    return dataclasses.replace(optimizer, scaling=scaling, damping=damping, weight_decay=decay), found


def with_settings(optimizer: Optimizer, learning_rate: Array | None, weight_decay: Array | None) -> Optimizer:
    """The optimizer with its arrays."""
    if learning_rate is not None:
        scaling = dataclasses.replace(optimizer.scaling, learning_rate=learning_rate)  # type: ignore[type-var]
        optimizer = dataclasses.replace(optimizer, scaling=scaling)
    return optimizer if weight_decay is None else dataclasses.replace(optimizer, weight_decay=weight_decay)


# -------------------------------------------------------------------------------- ensembles


class Trained(Members):
    """Networks with parameters, and the samples that they learn from."""

    noun = "params"

    def __init__(
        self,
        net: Network,
        params: Any,
        samples: tuple[Array, ...],
        held_out: tuple[Array, ...],
        members: Any,
        options: Mapping[str, Any],
    ) -> None:
        self.net, self.samples, self.held_out = net, samples, held_out
        super().__init__(params, members, options, self._check_samples)

    def check(self, weights: Any) -> tuple[Namespace, Layers]:
        """Parameters that fit the network."""
        given = _arrays.check_sequence("params", weights, "a tuple or list with one array for each layer")
        return _arrays.namespace(given[0]), self.net.check_tangent("params", given, given[0])

    def _check_samples(self) -> dict[str, Shape]:
        """Batch shapes of the samples, which are tried on one network."""
        shapes: dict[str, Shape] = {}
        one = tuple(rows(self.xp, w, 2, tuple(w.shape[:-2]), 0, 1) for w in self.arrays)
        of_x, of_y = sample_axes(self.net)
        for names, pair in ((("x", "y"), self.samples), (("held_out[0]", "held_out[1]"), self.held_out)):
            if not pair:
                continue
            x, y = pair
            _arrays.check_arrays({names[0]: x, "params[0]": self.like})
            _arrays.check_arrays({names[1]: y}, integers=True)
            check_samples(self.net, x, y, names)
            self.net.loss(one, x[..., :1, *(slice(None),) * (of_x - 1)], y[..., :1, *(slice(None),) * (of_y - 1)])
            shapes |= {names[0]: tuple(x.shape[: x.ndim - of_x]), names[1]: tuple(y.shape[: y.ndim - of_y])}
        return shapes

    def check_values(self) -> None:
        """Raise ValueError if samples that all members share hold a NaN, an Inf, or targets that are none."""
        for names, pair in ((("x", "y"), self.samples), (("held_out[0]", "held_out[1]"), self.held_out)):
            shared = self.data(pair, 0, 1)
            for name, array, axes in zip(names, shared, sample_axes(self.net), strict=False):
                _arrays.check_finite(name, array, axes)
            if shared:
                self.net.likelihood._check_values(names[1], shared[1], self.net.n_outputs)

    def data(self, pair: tuple[Array, ...], start: int, stop: int) -> tuple[Array, ...]:
        """Samples of some members; what all share has no batch axis."""
        return tuple(
            rows(self.xp, array, axes, self.batch, start, stop)
            for array, axes in zip(pair, sample_axes(self.net), strict=False)
        )


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes the data and the first state of a piece."""

    ensemble: Trained
    system: Training
    key: Any
    """Of batches and draws, None where there are none."""

    def sent(self) -> Loader:
        """What goes to other processes: the same without parameters that were given as arrays."""
        return dataclasses.replace(self, ensemble=self.ensemble.bare())

    @_arrays.quiet
    def __call__(self, piece: Piece, layers: Layers | None = None) -> tuple[Data, State]:
        """The data and the first state of a piece, from its parameters if they are given."""
        ensemble, system, begin, end = self.ensemble, self.system, piece.start, piece.stop
        xp, like = ensemble.xp, ensemble.like
        layers = ensemble.layers(begin, end) if layers is None else layers
        tolerance, rate, damping, decay = (
            ensemble.option(name, begin, end)
            for name in ("freeze_converged", "learning_rate", "damping", "weight_decay")
        )
        moving = xp.ones((end - begin, 1, 1), dtype=like.dtype, device=_arrays.device(like))
        samples, held_out = (ensemble.data(pair, begin, end) for pair in (ensemble.samples, ensemble.held_out))
        numbers = _arrays.numbers(xp, begin, end, like)
        data = Data(samples, held_out, moving, tolerance, rate, decay, self.key, numbers)
        optimizer = system.optimizer
        if damping is not None:
            policy = dataclasses.replace(optimizer.damping, initial=damping)
            optimizer = dataclasses.replace(optimizer, damping=policy)
        order: Any = ()
        if system.batch_size is not None:
            order = _arrays.counted_permutation(self.key, _ORDERS, 0, system.count, xp, like)
        return data, start(xp, layers, moving, Memory(stepping.start(optimizer, layers), order))
