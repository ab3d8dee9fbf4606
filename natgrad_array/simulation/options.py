"""Which rules, integrators and records go together, and the data of a piece of an ensemble."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.deep_linear.natural import exact_velocity
from natgrad_array.deep_linear.products import check_tangent, end_to_end, regime
from natgrad_array.deep_linear.slopes import RULES
from natgrad_array.deep_linear.task import GaussianTask
from natgrad_array.simulation.deep_linear import INTEGRATORS, Data, DeepLinear
from natgrad_array.simulation.ensemble import Ensemble, Piece
from natgrad_array.simulation.fingerprint import dtype_name
from natgrad_array.simulation.history import weight_dimensions
from natgrad_array.simulation.observables import NEED_MODES, OF_END_TO_END, Modes, modes_of
from natgrad_array.simulation.state import State, start

OPTIONS = ("learning_rate", "freeze_converged", "temperature", "label_noise")
"""Settings that may differ between members."""


def check_system(
    ensemble: Ensemble,
    rule: Any,
    integrator: Any,
    records: tuple[tuple[str, Any], ...],
    recorded: tuple[int, ...],
) -> DeepLinear:
    """Put together what moves the networks of an ensemble.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown, or options exclude each other.
    """
    if not callable(rule):
        _arrays.check_option("rule", rule, RULES)
    _arrays.check_option("integrator", integrator, INTEGRATORS)
    depth = len(ensemble.widths) - 1
    if integrator == "exponential":
        _check_flow(regime(ensemble.arrays, ensemble.task), rule, records)
    if depth < 2 and "balancedness" in dict(records):
        raise ValueError("record must not name 'balancedness' for networks of one layer: it is between two")
    noisy = [name for name in ("temperature", "label_noise") if ensemble.options[name] is not None]
    if noisy and integrator != "euler":
        raise ValueError(f"{noisy[0]} needs integrator 'euler', got {integrator!r}")
    return DeepLinear(rule, integrator, records, depth, len(recorded) == recorded[-1] + 1)


def _check_flow(kind: str, rule: Any, records: tuple[tuple[str, Any], ...]) -> None:
    """The flow of W has a closed form where every natural gradient moves W straight to W*."""
    straight = {"wide": RULES[:4], "intermediate": ("exact", "moore_penrose"), "bottleneck": ()}[kind]
    if callable(rule) or rule not in straight:
        name = "a callable" if callable(rule) else repr(rule)
        raise ValueError(
            f"integrator 'exponential' is the closed form of a natural gradient flow that moves W straight to its "
            f"optimum; rule {name} on {kind} networks is none: use 'rk4'"
        )
    layered = [name for name, function in records if function is not None or name not in OF_END_TO_END]
    if layered:
        raise ValueError(
            f"integrator 'exponential' knows W alone, without layers: it cannot record {layered[0]!r}; use 'rk4'"
        )


def record_shapes(ensemble: Ensemble, system: DeepLinear) -> dict[str, Shape]:
    """Core shapes of all records; a rule and records of the user's are called once, on one member, to see them.

    Raises
    ------
    TypeError, ValueError
        If what they return does not fit.
    """
    n_in, n_out = ensemble.widths[0], ensemble.widths[-1]
    modes = min(n_in, n_out)
    known: dict[str, Shape] = {
        "loss": (),
        "excess_loss": (),
        "end_to_end": (n_out, n_in),
        "modes": (modes,),
        "rates": (modes,),
        "balancedness": (system.depth - 1,),
        "rank": (),
    }
    if system.own_code or not ensemble.members:
        return {name: known.get(name, ()) for name in system.names}
    layers, task = ensemble.layers(0, 1), ensemble.task_of(0, 1)
    if callable(system.rule):
        check_tangent("rule(weights, task)", system.rule(layers, task), layers)
    for name, function in system.records:
        if function is not None:
            value = function(layers, task)
            _arrays.check_arrays({f"record {name!r}": value}, integers=True)
            if value.ndim < 1 or value.shape[0] != 1:
                raise ValueError(
                    f"record {name!r} must return an array with one row for each member, got shape "
                    f"{tuple(value.shape)} for one member"
                )
            known[name] = tuple(value.shape[1:])
    return {name: known[name] for name in system.names}


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes the data and the first state of a piece, here or in another process."""

    ensemble: Ensemble
    system: DeepLinear
    key: Any
    """Of the noise, None where there is none."""
    common: Modes | None
    """The modes of the task, where it is one for all members and they are needed."""

    @classmethod
    def of(cls, ensemble: Ensemble, system: DeepLinear, key: Any) -> Loader:
        """Put together what all pieces share."""
        shared = not ensemble.task.batch_shape and _need_modes(system)
        return cls(ensemble, system, key, modes_of(ensemble.xp, ensemble.task) if shared else None)

    def sent(self) -> Loader:
        """What goes to other processes: the same without weights that were given as arrays."""
        return dataclasses.replace(self, ensemble=self.ensemble.bare())

    @_arrays.quiet
    def __call__(self, piece: Piece, layers: tuple[Array, ...] | None = None) -> tuple[Data, State]:
        """The data and the first state of a piece, from its weights if they are given."""
        ensemble, system, begin, end = self.ensemble, self.system, piece.start, piece.stop
        task = ensemble.task_of(begin, end)
        layers = ensemble.layers(begin, end) if layers is None else layers
        rate, tolerance, temperature, label_noise = (ensemble.option(name, begin, end) for name in OPTIONS)
        assert rate is not None
        own_modes = self.common is None and _need_modes(system)
        data = Data(
            task,
            rate[:, None, None],
            tolerance,
            None if temperature is None else temperature[:, None, None],
            None if label_noise is None else label_noise[:, None, None],
            modes_of(ensemble.xp, task) if own_modes else self.common,
            self.key,
            _arrays.numbers(ensemble.xp, begin, end, ensemble.like),
        )
        if system.integrator == "exponential":
            layers = (_flowing(ensemble, layers, task),)
        return data, start(ensemble.xp, layers, data.rate)


def _need_modes(system: DeepLinear) -> bool:
    return any(name in NEED_MODES for name in system.names)


def _flowing(ensemble: Ensemble, layers: tuple[Array, ...], task: GaussianTask) -> Array:
    """W, and NaN for members that do not move straight to W*: those with layers of lower rank than their shapes."""
    xp, factors = ensemble.xp, task.factors
    product = end_to_end(layers)
    error = factors.target - factors.whiten(product @ factors.input_root)
    straight = factors.unwhiten(error @ factors.input_root_pinv)
    off = _arrays.norms(xp, exact_velocity(layers, task) + straight)
    bent = ~(off <= _arrays.eps(xp, product) ** 0.25 * _arrays.norms(xp, straight))
    return xp.where(bent[:, None, None], xp.nan, product)


def final_shapes(ensemble: Ensemble, system: DeepLinear) -> dict[str, tuple[Shape, str, tuple[str, ...]]]:
    """Core shape, dtype and names of axes of all that a piece leaves."""
    dtype, sizes = dtype_name(ensemble.like), ensemble.widths
    if system.integrator == "exponential":
        sizes = (sizes[0], sizes[-1])
    cores = tuple((m, n) for n, m in itertools.pairwise(sizes))
    found: dict[str, tuple[Shape, str, tuple[str, ...]]] = {
        f"weights_{i + 1}": (core, dtype, names)
        for i, (core, names) in enumerate(zip(cores, weight_dimensions(cores), strict=True))
    }
    return found | {"step_size": ((), dtype, ()), "diverged_at": ((), "int32", ()), "converged_at": ((), "int32", ())}


def check_rng(ensemble: Ensemble, rng: Any) -> Any:
    """The key of the noise, None where there is none.

    Raises
    ------
    TypeError, ValueError
        If noise has no seed, or `rng` is no seed.
    """
    noisy = [name for name in ("temperature", "label_noise") if ensemble.options[name] is not None]
    if noisy and rng is None:
        raise ValueError(f"rng must be given with {noisy[0]}: an integer seed")
    key = None if rng is None else _arrays.counted_key(rng, ensemble.like)
    return key if noisy else None


def check_interval(value: Any) -> float:
    """Seconds between checkpoints."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"checkpoint_interval must be a number of seconds, at least 0, got {value!r}")
    return float(value)
