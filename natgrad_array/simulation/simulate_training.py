"""The public door to simulations of training: what comes in is checked here, before anything runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from natgrad_array import _arrays
from natgrad_array._arrays import Array, Shape
from natgrad_array.networks.network import Network, Params, sample_axes
from natgrad_array.optimizers.estimates import ModelSampled
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.simulation.ensemble import Constructor, Piece
from natgrad_array.simulation.fingerprint import about, dtype_name, identify, identity, in_parts, sum_of
from natgrad_array.simulation.history import RESERVED, History, check_axes
from natgrad_array.simulation.memory import Sizes, check_results_fit
from natgrad_array.simulation.observables import check_records
from natgrad_array.simulation.options import check_interval
from natgrad_array.simulation.prepared import Prepared, plan_of
from natgrad_array.simulation.progress import check_progress
from natgrad_array.simulation.schedule import check_count, schedule
from natgrad_array.simulation.state import leaves
from natgrad_array.simulation.training import RECORDS, Loader, Trained, Training, settings


def simulate_training(
    net: Network,
    params: Params | Constructor,
    samples: tuple[Array, Array] | Callable[[Any], tuple[Array, Array]],
    /,
    *,
    optimizer: Optimizer,
    steps: int,
    batch_size: int | None = None,
    held_out: tuple[Array, Array] | None = None,
    record: Any = ("loss",),
    record_every: int | None = None,
    record_at: Any = None,
    progress: bool | str = False,
    freeze_converged: float | Array | None = None,
    rng: Any = None,
    members: int | Shape | None = None,
    axes: Any = None,
    max_bytes: int | None = None,
    store: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 10.0,
    client: Any = None,
) -> History:
    """Simulate how an ensemble of networks is trained by an optimizer.

    Parameters
    ----------
    net : Network
        The layers and the likelihood.
    params : sequence of arrays, shapes (*batch, n_i, n_{i-1} + 1), or callable
        Where the networks start. Or a function of two integers that returns the parameters
        of the members from the first to before the second, as for `simulate`.
    samples : pair of arrays, or callable
        Inputs x, (*batch, N, n_0) or (*batch, N, height, width, channels), and targets y,
        (*batch, N, n_L) or (*batch, N) for classes. Without batch axes all members share
        them; a NaN in samples of a member's own stops that member alone. Or a function of the
        number of a step that returns the batch of that step, the same each time: samples that
        are drawn, or read, as they are needed. On JAX it is traced, and its argument an array.
    optimizer : Optimizer
        A preset or a mixture. Learning rate, first damping and weight decay may be arrays
        of shape (*batch,): a sweep is a batch axis.
    steps : int
        How many steps are made.
    batch_size : int, optional
        Samples in a batch, the same for all members: in each pass through the samples
        another order, of which what is less than a batch is left out. All by default.
    held_out : pair of arrays, optional
        Samples that networks do not learn from.
    record : str, callable, sequence of them, or dict of callables
        What is kept: "loss" (of the batch that the next step is made on, in nats per
        sample), "training_loss" (of all samples), "held_out_loss", "damping", or functions
        of (params, state), the parameters and the state of the optimizer, that return an
        array with members as its first axis.
    record_every : int, optional
        Record every so many steps; 1 by default. The first and the last step are recorded
        in any case.
    record_at : sequence of int, optional
        Record at these steps, as `simulation.log_steps` makes them.
    progress : bool or str
        Whether to show a bar, and what to put before it, as for `simulate`.
    freeze_converged : float or array of shape (*batch,), optional
        Members whose "loss" is at most this at a record stay as they are from then on.
    rng : int or JAX key, optional
        A seed, for batches and for optimizers that sample the model. What a member gets
        depends on the seed, the step and the member's number alone.
    members : int or tuple of int, optional
        The batch shape, where `params` is a function.
    axes, max_bytes, store, checkpoint, checkpoint_interval, client
        As for `simulate`. The samples are arguments: `max_bytes` does not count them.

    Returns
    -------
    History
        Records, last parameters as ``History.weights``, and which members diverged.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong or does not fit the others, if samples that all members share
        hold a NaN, an Inf or targets that the likelihood does not know, or if results would
        not fit in memory or on the disk. Nothing has run then.
    FileExistsError, ConnectionError, simulation.CheckpointError
        As `simulate` raises them.

    Notes
    -----
    Members whose loss is not finite at a record have diverged: they are frozen and
    flagged, as those of `simulate` are. Between records nothing is looked at, beside what
    the optimizer itself looks at. JAX arrays run as one compiled loop. A run that was
    stopped and goes on with the same versions, on the same kind of device, ends with the
    same bits: the optimizer's state and the place in the samples are in its checkpoint.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> x = np.random.default_rng(0).standard_normal((100, 2))
    >>> net = ng.networks.MLP((2, 8, 1))
    >>> params = net.init(0, (2, 5), like=x)
    >>> opt = ng.optimizers.natural_gradient(learning_rate=np.asarray([[0.5], [1.0]]))
    >>> data = x, x[:, :1] * x[:, 1:]
    >>> ng.simulation.simulate_training(net, params, data, optimizer=opt, steps=20, batch_size=50, rng=0)
    History(batch_shape=(2, 5), steps=20, records=21 of loss; 0 diverged)
    """
    return prepare_training(
        net,
        params,
        samples,
        optimizer=optimizer,
        steps=steps,
        batch_size=batch_size,
        held_out=held_out,
        record=record,
        record_every=record_every,
        record_at=record_at,
        progress=progress,
        freeze_converged=freeze_converged,
        rng=rng,
        members=members,
        axes=axes,
        max_bytes=max_bytes,
        store=store,
        checkpoint=checkpoint,
        checkpoint_interval=checkpoint_interval,
        client=client,
    ).run()


def prepare_training(
    net: Network,
    params: Any,
    samples: Any,
    /,
    *,
    optimizer: Any,
    steps: Any,
    batch_size: Any,
    held_out: Any,
    record: Any,
    record_every: Any,
    record_at: Any,
    progress: Any,
    freeze_converged: Any,
    rng: Any,
    members: Any,
    axes: Any,
    max_bytes: Any,
    store: Any,
    checkpoint: Any,
    checkpoint_interval: Any,
    client: Any,
) -> Prepared:
    """Check all arguments of `simulate_training`."""
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, got {_arrays.describe(net)}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be an Optimizer, got {_arrays.describe(optimizer)}")
    _refuse_own_noise(net)
    plain, arrays = settings(optimizer)
    stream = samples if callable(samples) else None
    data = () if stream is not None else _pair("samples", samples, "(x, y), or a function of the step")
    kept_out = () if held_out is None else _pair("held_out", held_out, "(x, y)")
    records = check_records(record, RESERVED, RECORDS, "(params, state)")
    for name, there in (("training_loss", bool(data)), ("held_out_loss", bool(kept_out))):
        if name in dict(records) and not there:
            what = "samples as arrays" if name == "training_loss" else "held_out"
            raise ValueError(f"record must not name {name!r} without {what}")
    recorded = schedule(check_count("steps", steps), record_every, record_at)
    ensemble = Trained(net, params, data, kept_out, members, {"freeze_converged": freeze_converged} | arrays)
    ensemble.check_values()
    of_x, _ = sample_axes(net)
    count = int(data[0].shape[data[0].ndim - of_x]) if data else 0
    size = _check_batch(batch_size, stream, count)
    draws = isinstance(plain.estimate, ModelSampled) and plain.inverse.uses_statistics
    if rng is None and (draws or size is not None):
        raise ValueError(f"rng must be given with {'batch_size' if size else 'this optimizer'}: an integer seed")
    key = None if rng is None else _arrays.counted_key(rng, ensemble.like)
    system = Training(net, plain, records, stream, count, size, len(recorded) == recorded[-1] + 1)
    load = Loader(ensemble, system, key)
    named = check_axes(axes, ensemble.batch, system.names)
    shapes, memory = _record_shapes(load)
    each = _sizes_of(ensemble, system, shapes, memory)
    path = None if store is None else os.fspath(store)
    plan = plan_of(each, ensemble, system, len(recorded), max_bytes, client)
    check_results_fit(each, ensemble, len(recorded), path)
    interval = check_interval(checkpoint_interval)
    title = check_progress(progress)
    known = about(ensemble, recorded[-1], rng) | {
        "optimizer": repr(plain),
        "network": repr(net),
        "batch_size": size or count or "streamed",
    }
    dtype = dtype_name(ensemble.like)
    dimensions = [(f"width_{i + 1}", f"input_{i + 1}") for i in range(len(net.layers))]
    finals: dict[str, tuple[Shape, str, tuple[str, ...]]] = {
        f"weights_{i + 1}": (core, dtype, names)
        for i, (core, names) in enumerate(zip(ensemble.cores, dimensions, strict=True))
    }
    finals |= {"step_size": ((), dtype, ()), "diverged_at": ((), "int32", ()), "converged_at": ((), "int32", ())}

    def fingerprint() -> dict[str, Any]:
        own = {"optimizer": repr(plain), "network": repr(net), "batch size": size}
        own["samples"] = identity(stream) if stream is not None else sum_of(p for a in data for p in in_parts(a))
        own["held out"] = sum_of(part for array in kept_out for part in in_parts(array))
        own["likelihood"] = sum_of(_arrays.to_numpy(array) for array in net.likelihood._constants().values())
        return identify(ensemble, records, recorded, key, path) | own

    def leave(found: Mapping[str, Array], weights: tuple[Array, ...], last: Mapping[str, Array]) -> History:
        return History(
            found, weights, last, steps=recorded, axes=named, attributes=known, store=path, dimensions=dimensions
        )

    return Prepared(
        ensemble,
        system,
        load,
        recorded,
        named,
        shapes,
        finals,
        plan,
        known,
        fingerprint,
        leave,
        path,
        checkpoint,
        interval,
        title,
        client,
    )


def _pair(name: str, value: Any, expected: str) -> tuple[Array, Array]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of arrays {expected}, got {_arrays.describe(value)}")
    return value[0], value[1]


def _refuse_own_noise(net: Network) -> None:
    """Noise of each member's own is inside the network, which cannot be cut into pieces."""
    own = [name for name, array in net.likelihood._constants().items() if array.ndim > 2]
    if own:
        raise ValueError(f"net must have no batch axes in {own[0]}: members of an ensemble share the network")


def _check_batch(value: Any, stream: Any, count: int) -> int | None:
    """Samples in a batch, None where all are one."""
    if value is None:
        return None
    if stream is not None:
        raise ValueError("batch_size must not be given where samples are a function, which makes the batches")
    if not _arrays.is_integer(value) or not 1 <= value <= count:
        raise ValueError(f"batch_size must be an integer from 1 to {count}, the number of samples, got {value!r}")
    return None if value == count else int(value)


def _record_shapes(load: Loader) -> tuple[dict[str, Shape], int]:
    """Core shapes of all records, and the entries of one member's memory; functions of the user's are called once."""
    system, ensemble = load.system, load.ensemble
    if not ensemble.members:
        return dict.fromkeys(system.names, ()), 0
    data, state = load(Piece(0, 1, ()))
    if system.stream is not None:
        x, y = _pair("samples(0)", system.stream(0), "(x, y)")
        ensemble.net.loss(state.weights, x, y)
    shapes: dict[str, Shape] = {}
    for name, function in system.records:
        value = data.rate[:, 0, 0] if function is None else function(state.weights, state.memory.optimizer)
        _arrays.check_arrays({f"record {name!r}": value}, integers=True)
        if value.ndim < 1 or value.shape[0] != 1:
            raise ValueError(
                f"record {name!r} must return an array with one row for each member, got shape "
                f"{tuple(value.shape)} for one member"
            )
        shapes[name] = tuple(value.shape[1:])
    return shapes, sum(math.prod(array.shape) for array in leaves(state.memory.optimizer))


def _sizes_of(ensemble: Trained, system: Training, records: Mapping[str, Shape], memory: int) -> Sizes:
    """Bytes of one member: a pass through a batch, or through all samples where their loss is recorded."""
    positions = [math.prod(layer.output_shape[:-1]) for layer in system.net.layers]
    cores = [(m, n, t) for (m, n), t in zip(ensemble.cores, positions, strict=True)]
    layers = sum(m * n for m, n, _ in cores)
    batch = system.batch_size or system.count or 1
    if system.stream is not None:
        x, _ = system.stream(0)
        batch = int(x.shape[x.ndim - sample_axes(system.net)[0]])
    # Inputs, slopes and errors of every layer live through a step; one loss needs two neighbours.
    passing = 4 * batch * sum(t * (m + n) for m, n, t in cores)
    looked_at = {"training_loss": system.count, "held_out_loss": _held_out(ensemble)}
    most = max((looked_at[name] for name in system.names if name in looked_at), default=0)
    looking = 3 * most * max(t * (m + n) for m, n, t in cores)
    factors = 6 * sum(m * m + n * n for m, n, _ in cores) if system.optimizer.inverse.uses_statistics else 0
    scratch = 6 * layers + max(passing + factors, looking)
    own = sum(
        math.prod(array.shape) // max(1, ensemble.members)
        for array, axes in zip((*ensemble.samples, *ensemble.held_out), 2 * sample_axes(system.net), strict=False)
        if array.ndim > axes
    )
    item = _arrays.item_bytes(ensemble.xp, ensemble.like)
    record = sum(math.prod(core) for core in records.values())
    largest = max(m * n for m, n, _ in cores)
    return Sizes(layers * item, largest * item, scratch * item, (3 * memory + own) * item, record * item)


def _held_out(ensemble: Trained) -> int:
    if not ensemble.held_out:
        return 0
    x = ensemble.held_out[0]
    return int(x.shape[x.ndim - sample_axes(ensemble.net)[0]])
