"""Optimizer steps on the shards of many workers: what is reduced are sums and counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array._client import check_client, keep, submit
from natgrad_array.networks import passes
from natgrad_array.networks.network import Network, Params, check_samples, sample_axes
from natgrad_array.optimizers import stepping
from natgrad_array.optimizers.inverses import Context, Inverse, Tangent
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.stepping import StepInfo, check_network, check_state
from natgrad_array.optimizers.steps import sums_of_products

_FAN_IN = 4
"""Sums that one worker adds up at a time."""


class ParallelState(NamedTuple):
    """What data-parallel steps remember; made by `DataParallel`.

    Attributes
    ----------
    optimizer : OptimizerState
        As in one process.
    steps : int
        Steps taken.
    prepared : tuple
        The inverse in use.
    waiting : tuple of (int, distributed.Future)
        Inverses on their way, and the step that each is for.

    Notes
    -----
    The example of `DataParallel` has one: it takes a cluster. With a staleness of 0 there are no
    inverses on their way, and it holds nothing but arrays.
    """

    optimizer: Any
    steps: Any
    prepared: Any
    waiting: Any


class _Shard(NamedTuple):
    """Futures of inputs and targets, and where they are worked on."""

    x: Any
    y: Any
    where: dict[str, Any]


def _near(worker: str) -> dict[str, Any]:
    """Options for a task that belongs on a worker, or on others if that one is gone."""
    return {"workers": [worker], "allow_other_workers": True} if worker else {}


@dataclass(frozen=True)
class DataParallel:
    """An optimizer whose batches are spread over the workers of a Dask cluster.

    Every worker looks at its shard of a batch. Sums of gradients, of the two moments of every
    layer and of losses are added up by a tree, and one worker inverts the moments, while
    the others go on with older inverses if they may.

    Parameters
    ----------
    optimizer : Optimizer
        What a step is. It has to work from sums over samples: no inverse that makes passes through
        the network of its own or follows samples one by one, and an estimate, a step rule and
        a damping policy that look at the whole batch.
    client : dask.distributed.Client
        Of the cluster. Needs the extra "dask".
    staleness : int
        How many steps old inverses are, but for the first: that of step 0 is waited for. With
        0 each step waits for its own, and is that of one process to rounding.

    Raises
    ------
    TypeError, ValueError
        If the optimizer does not work from sums, `client` is no client, or `staleness` is no integer
        of at least 0.
    ConnectionError
        If there is no cluster.

    Notes
    -----
    Ba, Grosse and Martens (2017). An inverse that is late is waited for, so that results do
    not depend on how fast workers are. A worker that dies costs time alone.

    Examples
    --------
    >>> import natgrad_array as ng
    >>> def train(client, net, params, batches):
    ...     parallel = ng.optimizers.DataParallel(ng.optimizers.bounded_kfac(), client, staleness=2)
    ...     state = parallel.init(net, params)
    ...     for x, y in batches:
    ...         params, state, info = parallel.step(net, params, state, x, y)
    ...     return params
    """

    optimizer: Optimizer
    client: Any
    staleness: int = 0

    def __post_init__(self) -> None:
        opt = self.optimizer
        if not isinstance(opt, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {_arrays.describe(opt)}")
        if opt.inverse.needs_network:
            raise ValueError(
                f"optimizer must work from sums over samples; {opt.inverse} makes passes through the network"
            )
        if type(opt.inverse).follow is not Inverse.follow:
            raise ValueError(f"optimizer must work from sums over samples; {opt.inverse} follows every batch")
        for name in ("estimate", "scaling", "damping"):
            if getattr(getattr(opt, name), "share", 1.0) < 1.0:
                raise ValueError(f"optimizer must look at the whole batch, share 1, got {name} {getattr(opt, name)}")
        if not _arrays.is_integer(self.staleness) or self.staleness < 0:
            raise ValueError(f"staleness must be an integer of at least 0, got {self.staleness!r}")
        check_client(self.client)

    def init(self, net: Network, params: Params, /) -> ParallelState:
        """Make the state before the first step.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The first parameters.

        Returns
        -------
        ParallelState
            Of the library, dtype and device of the parameters.

        Raises
        ------
        TypeError, ValueError
            If `net` is no network, or `params` do not fit it.

        Notes
        -----
        The example of `DataParallel` begins with it: there is no client without a cluster.
        """
        return ParallelState(self.optimizer.init(net, params), 0, (), ())

    @_arrays.quiet
    def step(
        self, net: Network, params: Params, state: ParallelState, x: Any, y: Any, rng: Any = None, /
    ) -> tuple[tuple[Array, ...], ParallelState, StepInfo]:
        """Take one step on one batch.

        Parameters
        ----------
        net : Network
            The layers and the likelihood.
        params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The parameters.
        state : ParallelState
            From `init` or from the last step.
        x : array or Dask array, shape (*batch, N, n_0), or (*batch, N, height, width, channels)
            N inputs. An array is cut into a shard for each worker. Of a Dask array every
            chunk along the samples is a shard, which stays where it is if the array is
            persisted; no other axis may be in several chunks.
        y : array or Dask array, shape (*batch, N, n_L), or (*batch, N) for classes
            Their targets, in the same chunks.
        rng : int, numpy.random.Generator, cupy.random.Generator, torch.Generator, JAX key, or array
            Where randomness comes from, as for `Optimizer.step`.

        Returns
        -------
        params : tuple of arrays, shapes (*batch, n_i, n_{i-1} + 1)
            The new parameters.
        state : ParallelState
            For the next step.
        info : StepInfo
            What happened.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit the network or each other, or `rng` is missing.
        ConnectionError
            If the cluster is gone; `params` and `state` are as they were.

        Notes
        -----
        The example of `DataParallel` has it in a loop: there is no client without a cluster.
        """
        if not isinstance(state, ParallelState):
            raise TypeError(f"state must be what init or step returned, got {_arrays.describe(state)}")
        _, given = check_network(net, params)
        check_state(state.optimizer)
        check_client(self.client)
        _check_batch(net, given, x, y)
        first, *others = sorted(self.client.nthreads()) or [""]
        cuts = self._cuts(net, x, y, len(others))
        noise = self._noise(net, given, x, cuts[-1], rng)
        try:
            shards = self._shards(net, x, y, cuts, others or [first])
            return self._step(first, net, given, state, shards, noise, cuts)
        except Exception as error:
            if self.client.status == "running":
                raise
            raise ConnectionError("the cluster of the client is gone; params and state are as they were") from error

    def _step(
        self,
        inverter: str,
        net: Network,
        given: Tangent,
        state: ParallelState,
        shards: list[_Shard],
        noise: Any,
        cuts: list[int],
    ) -> tuple[Tangent, ParallelState, StepInfo]:
        opt, before = self.optimizer, state.optimizer
        params = keep(self.client, given)
        axis = -2 if net.likelihood.name == "gaussian" else -3
        looks = []
        for (x, y, where), cut in zip(shards, itertools.pairwise(cuts), strict=True):
            part = None if noise is None else _samples_of(noise, *cut, axis)
            looks.append(submit(self.client, _look, opt, net, params, x, y, part, **where))
        total = self._sum(looks)
        count = cuts[-1]
        loss, gradient, sums = _mapped(lambda a: a / count, total)
        at = stepping.context(opt, net, given, None, None, gradient, before)

        def products(ways: Sequence[Tangent]) -> Any:
            sent = keep(self.client, tuple(ways))
            return self._sum([submit(self.client, _products, net, params, sent, x, **where) for x, _, where in shards])

        at = at._replace(sums=products, samples=count)
        made = before.moments, before.prepared
        prepared, waiting = state.prepared, state.waiting
        if opt.inverse.uses_statistics:
            moments = stepping.averaged(opt, before, at, sums)
            if state.steps % opt.refresh == 0:
                bare = at._replace(net=None, params=(), gradient=(), previous=(), sums=None)
                future = submit(self.client, _invert, opt, prepared, moments, params, bare, **_near(inverter))
                waiting = (*waiting, (state.steps + self.staleness if state.steps else 0, future))
            ready = [future for step, future in waiting if step <= state.steps]
            waiting = tuple((step, future) for step, future in waiting if step > state.steps)
            prepared = ready[-1].result() if ready else prepared
            made = moments, prepared

        def evaluate(new: Tangent) -> Array:
            moved = keep(self.client, new)
            losses = [submit(self.client, _loss, net, moved, x, y, **where) for x, y, where in shards]
            return self._sum(losses)[0] / count

        new, after, info = stepping.advance(opt, at, before, None, loss, evaluate, elsewhere=made)
        return new, ParallelState(after, state.steps + 1, prepared, waiting), info

    def _sum(self, parts: list[Any]) -> Any:
        """Add up by a tree, and bring the sum here."""
        while len(parts) > 1:
            groups = [parts[k : k + _FAN_IN] for k in range(0, len(parts), _FAN_IN)]
            parts = [submit(self.client, _total, group) for group in groups]
        return parts[0].result()

    # --------------------------------------------------------------------------- shards

    def _cuts(self, net: Network, x: Any, y: Any, workers: int) -> list[int]:
        """Where shards begin, and how many samples there are."""
        axis = -sample_axes(net)[0]
        if not _arrays.is_dask(x):
            samples = x.shape[axis]
            shards = max(1, min(samples, workers))
            return [samples * k // shards for k in range(shards + 1)]
        chunks = x.chunks[axis]
        same = _arrays.is_dask(y) and y.chunks[-sample_axes(net)[1]] == chunks
        if not same or not math.prod(x.numblocks) == math.prod(y.numblocks) == len(chunks):
            raise ValueError("x and y must be Dask arrays in the same chunks of samples, and whole along other axes")
        return [0, *itertools.accumulate(int(n) for n in chunks)]

    def _shards(self, net: Network, x: Any, y: Any, cuts: list[int], workers: list[str]) -> list[_Shard]:
        if _arrays.is_dask(x):
            blocks = [self.client.compute(list(array.to_delayed().ravel())) for array in (x, y)]
            return [_Shard(a, b, {}) for a, b in zip(*blocks, strict=True)]
        found, axis = [], -len(net.layers[0].input_shape) - 1
        for cut, worker in zip(itertools.pairwise(cuts), itertools.cycle(workers), strict=False):
            where = _near(worker)
            inputs = keep(self.client, _samples_of(x, *cut, axis), **where)
            found.append(_Shard(inputs, keep(self.client, _samples_of(y, *cut, -sample_axes(net)[1]), **where), where))
        return found

    def _noise(self, net: Network, params: Tangent, x: Any, samples: int, rng: Any) -> Array | None:
        """The noise of the whole batch, as one process draws it."""
        if not self.optimizer.inverse.uses_statistics:
            return None
        axes = sample_axes(net)[0]
        named = {str(i): tuple(w.shape[:-2]) for i, w in enumerate(params)} | {"x": tuple(x.shape[: x.ndim - axes])}
        return self.optimizer.estimate.noise(net, _arrays.broadcast_batch(named), samples, rng, params[0])


def _check_batch(net: Network, params: Tangent, x: Any, y: Any) -> None:
    """Raise here what workers would raise, each with a traceback of its own."""
    for name, array in (("x", x), ("y", y)):
        if not hasattr(array, "shape"):
            raise TypeError(f"{name} must be an array or a Dask array, got {_arrays.describe(array)}")
    if not _arrays.is_dask(x):
        _arrays.check_arrays({"params[0]": params[0], "x": x})
        _arrays.check_arrays({"x": x, "y": y}, integers=True)
    elif str(x.dtype) != (wanted := str(params[0].dtype).rpartition(".")[2]):
        # Which library chunks are of is known to their workers alone.
        raise TypeError(f"x must have the dtype of params[0], {wanted}, got {x.dtype}")
    check_samples(net, x, y)
    of_x, of_y = sample_axes(net)
    batches = {f"params[{i}]": tuple(w.shape[:-2]) for i, w in enumerate(params)}
    batches |= {"x": tuple(x.shape[: x.ndim - of_x]), "y": tuple(y.shape[: y.ndim - of_y])}
    _arrays.broadcast_batch(batches)


# ------------------------------------------------------------------------------ on workers


@_arrays.quiet
def _look(opt: Optimizer, net: Network, params: Tangent, x: Array, y: Array, noise: Array | None) -> Any:
    """Sums over a shard: of losses, gradients, and what the inverse takes moments of."""
    trace = net.forward(params, x)
    samples = trace.output.shape[-2]
    errors = net.likelihood.residual(trace.output, y)
    gradient = passes.collect(trace.rows, passes.backward(net.layers, params, trace, errors))
    sums: Any = ()
    if opt.inverse.uses_statistics:
        statistics = opt.estimate.observe(net, params, trace, y, noise)
        sums = _mapped(lambda a: a * samples, opt.inverse.moments(statistics, opt.estimate))
    return net.likelihood.loss(trace.output, y) * samples, gradient, sums


@_arrays.quiet
def _loss(net: Network, params: Tangent, x: Array, y: Array) -> tuple[Array]:
    trace = net.forward(params, x)
    return (net.likelihood.loss(trace.output, y) * trace.output.shape[-2],)


@_arrays.quiet
def _products(net: Network, params: Tangent, ways: Sequence[Tangent], x: Array) -> tuple[Array, ...]:
    return tuple(sums_of_products(net, params, net.forward(params, x), ways))


@_arrays.quiet
def _invert(opt: Optimizer, prepared: Any, moments: Any, params: Tangent, at: Context) -> Any:
    return opt.inverse.refresh(prepared, moments, None, opt.estimate, at._replace(params=params))


@_arrays.quiet
def _total(parts: Sequence[Any]) -> Any:
    return _mapped(lambda *arrays: sum(arrays[1:], start=arrays[0]), *parts)


def _mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """A function of the arrays at the same place of nested tuples."""
    first = trees[0]
    if isinstance(first, tuple):
        parts = [_mapped(function, *column) for column in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return None if first is None else function(*trees)


def _samples_of(array: Array, begin: int, end: int, axis: int) -> Array:
    return array[(..., slice(begin, end), *(slice(None),) * (-axis - 1))]
