"""An ensemble learns a task by four rules, in the regimes of its network: population dynamics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from natgrad_array import _arrays
from natgrad_array import deep_linear as dl
from natgrad_array._arrays import Array
from natgrad_array.cli.data import Data
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.libraries import Backend

Host = np.ndarray[Any, Any]

RULES = ("layerwise", "exact", "moore_penrose", "gradient")
REGIMES = ("wide", "intermediate", "bottleneck")
MOST_SUBSTEPS = 100
POWER_ROUNDS = 30


# ----------------------------------------------------------------------- what is to be run


def make_task(data: Data, backend: Backend, dtype: str) -> dl.GaussianTask:
    """The task of some samples, with unit noise, on the backend."""
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = data.x.astype(dtype), data.y.astype(dtype)
        try:
            return dl.GaussianTask.from_samples(backend.asarray(x), backend.asarray(y))
        except ValueError as error:
            raise CommandError(f"{data.name} cannot be learned in {dtype}: {error}") from error


@dataclass(frozen=True)
class Network:
    """An architecture, and how well it can do.

    Attributes
    ----------
    sizes : tuple of int
        Widths (n_0, ..., n_L).
    regime : str
        As `deep_linear.regime` says for the task.
    floor : float
        Least excess loss that matrices of its rank reach: ½ Σ s² over the singular values
        of the whitened optimum that it has no room for.
    """

    sizes: tuple[int, ...]
    regime: str
    floor: float

    @property
    def name(self) -> str:
        """The widths, with hyphens."""
        return "-".join(map(str, self.sizes))


def make_network(sizes: tuple[int, ...], task: dl.GaussianTask) -> Network:
    """Look at an architecture in the light of a task."""
    like = task.cross_moment
    xp = _arrays.namespace(like)
    shapes = [(m, n) for n, m in itertools.pairwise(sizes)]
    layers = [xp.empty(shape, dtype=like.dtype, device=_arrays.device(like)) for shape in shapes]
    singular = np.linalg.svd(_arrays.to_numpy(task.factors.target).astype(np.float64), compute_uv=False)
    return Network(sizes, dl.regime(layers, task), 0.5 * float(np.sum(singular[min(sizes) :] ** 2)))


def default_networks(task: dl.GaussianTask) -> list[Network]:
    """A network with one hidden layer for each regime that the task has room for."""
    n, m, rank = task.n_inputs, task.n_outputs, task.input_rank
    few, many = min(rank, m), max(rank, m)
    hidden = [max(n, m)]
    if few < many:
        hidden.append(min(max(few, max(n, m) // 2), many - 1))
    if few > 1:
        hidden.append(few // 2)
    return [make_network((n, h, m), task) for h in hidden]


def chosen_network(sizes: tuple[int, ...], task: dl.GaussianTask, data: Data) -> Network:
    """The network that `--sizes` asks for."""
    if (sizes[0], sizes[-1]) != (task.n_inputs, task.n_outputs):
        raise CommandError(
            f"--sizes must lead from {task.n_inputs} inputs to {task.n_outputs} outputs, as {data.name} has them, "
            f"got {','.join(map(str, sizes))}"
        )
    return make_network(sizes, task)


def theory(rule: str, regime: str, learning_rate: float) -> float | None:
    """The decay rate that the theory gives; None where it has no single one."""
    exact = ("layerwise", "exact", "moore_penrose") if regime == "wide" else ("exact", "moore_penrose")
    if regime == "bottleneck" or rule not in exact:
        return None
    return float(dl.euler_decay_rate(learning_rate))


# -------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """How one ensemble learned by one rule.

    Attributes
    ----------
    network, rule
        What ran.
    learning_rate : float
        Size of its steps.
    substeps : int
        How many of them lie between two records.
    theory : float or None
        The decay rate to expect.
    time : array, shape (records,)
        Learning rate times steps.
    excess : array, shape (records, members)
        Excess loss, NaN from where a member diverged.
    rate : array, shape (members,)
        Fitted decay rate of the loss above the floor, NaN where there is too little to fit.
    diverged : array of bool, shape (members,)
        Members that stopped being finite; they were frozen then.
    finished : bool
        False if it was interrupted.
    """

    network: Network
    rule: str
    learning_rate: float
    substeps: int
    theory: float | None
    time: Host
    excess: Host
    rate: Host
    diverged: Host
    finished: bool

    @property
    def above_floor(self) -> Host:
        """Loss above the best that the network can reach."""
        return self.excess - self.network.floor


def train(
    network: Network,
    rule: str,
    task: dl.GaussianTask,
    *,
    members: int,
    steps: int,
    learning_rate: float,
    seed: int,
    tick: Callable[[], None],
) -> Run:
    """Follow an ensemble under the population dynamics of a rule.

    The loop reads nothing from the device: members that stop being finite are frozen by
    a mask. An interruption ends it, and what was recorded is kept.
    """
    weights = dl.gaussian(seed, network.sizes, (members,), like=task.cross_moment)
    xp = _arrays.namespace(weights[0])
    substeps = 1
    step = learning_rate
    expected = theory(rule, network.regime, learning_rate)
    if rule == "gradient":
        curvature = largest_curvature(weights, task)
        substeps = max(1, min(MOST_SUBSTEPS, math.ceil(learning_rate * curvature)))
        step = min(learning_rate / substeps, 1.0 / curvature if curvature > 0.0 else learning_rate)
    excess = dl.excess_loss(weights, task)
    alive = xp.isfinite(excess)
    records = [excess]
    finished = True
    with np.errstate(all="ignore"):
        try:
            for _ in range(steps):
                moved = weights
                for _ in range(substeps):
                    moved = tuple(w - step * d for w, d in zip(moved, _direction(rule, moved, task), strict=True))
                excess = dl.excess_loss(moved, task)
                alive = alive & xp.isfinite(excess)
                weights = tuple(xp.where(alive[:, None, None], w, v) for w, v in zip(moved, weights, strict=True))
                records.append(xp.where(alive, excess, xp.nan))
                tick()
        except KeyboardInterrupt:
            finished = False
    history = _arrays.to_numpy(xp.stack(records)).astype(np.float64)
    time = step * substeps * np.arange(history.shape[0])
    eps = _arrays.eps(xp, weights[0])
    rate = decay_rate(time, history - network.floor, eps, network.floor)
    diverged = np.isnan(history[-1])
    return Run(network, rule, step, substeps, expected, time, history, rate, diverged, finished)


def _direction(rule: str, weights: tuple[Array, ...], task: dl.GaussianTask) -> tuple[Array, ...]:
    if rule == "gradient":
        return dl.gradient(weights, task)
    return dl.natural_gradient(weights, task, inverse=rule)


def largest_curvature(weights: tuple[Array, ...], task: dl.GaussianTask) -> float:
    """The largest eigenvalue of the Fisher information over all members, by the power method."""
    xp = _arrays.namespace(weights[0])
    information = dl.fisher(weights, task)
    vector = tuple(xp.ones_like(w) for w in weights)
    length = xp.zeros((), dtype=weights[0].dtype, device=_arrays.device(weights[0]))
    for _ in range(POWER_ROUNDS):
        vector = information.matvec(vector)
        squares = [xp.sum(v * v, axis=(-2, -1), keepdims=True) for v in vector]
        length = xp.sqrt(sum(squares[1:], squares[0]))
        scale = xp.where(length > 0.0, length, 1.0)
        vector = tuple(v / scale for v in vector)
    values = _arrays.to_numpy(length)
    return float(np.max(values[np.isfinite(values)], initial=0.0))


def decay_rate(time: Host, excess: Host, eps: float, floor: float = 0.0) -> Host:
    """Decay rate of each column, −d ln(excess)/dt, by least squares on a late window.

    The window is the later half of the records before the first one at the level of
    rounding: that of the squared error, and of the floor that was taken off. It needs
    three records.
    """
    noise = np.maximum((1e4 * eps) ** 2 * excess[0], 100.0 * eps * floor)
    count = np.sum(np.cumprod(np.nan_to_num(excess) > noise, axis=0), axis=0)
    index = np.arange(excess.shape[0])[:, None]
    window = ((index < count) & (index >= count // 2)).astype(np.float64)
    size = np.sum(window, axis=0)
    logarithm = np.log(np.where(window > 0.0, excess, 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = window * (time[:, None] - np.sum(window * time[:, None], axis=0) / size)
        rate = -np.sum(centred * logarithm, axis=0) / np.sum(centred * centred, axis=0)
    return np.where(size >= 3, rate, np.nan)


# ------------------------------------------------------------------------------- all runs


def train_all(networks: list[Network], train_one: Callable[[Network, str], Run]) -> Iterator[Run]:
    """Run every rule on every network, until one is interrupted."""
    for network in networks:
        for rule in RULES:
            run = train_one(network, rule)
            yield run
            if not run.finished:
                return
