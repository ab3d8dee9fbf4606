"""The public door to simulations: what comes in is checked here, before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from natgrad_array._arrays import Array, Shape
from natgrad_array.deep_linear.products import Weights, regime
from natgrad_array.deep_linear.task import GaussianTask
from natgrad_array.simulation.deep_linear import Rule
from natgrad_array.simulation.ensemble import Constructor, Ensemble
from natgrad_array.simulation.fingerprint import attributes, fingerprint
from natgrad_array.simulation.history import RESERVED, History, check_axes
from natgrad_array.simulation.memory import check_results_fit, sizes_of
from natgrad_array.simulation.observables import check_records, target_modes
from natgrad_array.simulation.options import (
    Loader,
    check_interval,
    check_rng,
    check_system,
    final_shapes,
    record_shapes,
)
from natgrad_array.simulation.prepared import Prepared, plan_of
from natgrad_array.simulation.progress import check_progress
from natgrad_array.simulation.schedule import check_count, schedule


def simulate(
    weights: Weights | Constructor,
    task: GaussianTask,
    /,
    *,
    learning_rate: float | Array,
    steps: int,
    rule: Rule = "layerwise",
    integrator: str = "euler",
    record: Any = ("loss",),
    record_every: int | None = None,
    record_at: Any = None,
    progress: bool | str = False,
    freeze_converged: float | Array | None = None,
    temperature: float | Array | None = None,
    label_noise: float | Array | None = None,
    rng: Any = None,
    members: int | Shape | None = None,
    axes: Any = None,
    max_bytes: int | None = None,
    store: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 10.0,
    client: Any = None,
) -> History:
    r"""Simulate how an ensemble of deep linear networks learns.

    Parameters
    ----------
    weights : sequence of arrays, shapes (*batch, n_i, n_{i-1}), or callable
        Where the networks start. Or a function of two integers that returns the weights of
        the members from the first to before the second, in C order over the batch, with one
        batch axis: an ensemble that never exists as a whole. It must return the same each
        time.
    task : GaussianTask
        What they learn. Its batch shape broadcasts against that of the weights.
    learning_rate : float or array of shape (*batch,)
        Step size η. Shapes broadcast, so that a sweep is a batch axis.
    steps : int
        How many steps are made; time is steps · η.
    rule : {"layerwise", "exact", "moore_penrose", "block_diagonal", "gradient"} or callable
        The direction that a step subtracts: a natural gradient by the name of its inverse
        (see `natural_gradient`), the gradient, or what a function of (weights, task)
        returns, one array for each layer. It sees members along one batch axis.
    integrator : {"euler", "rk4", "exponential"}
        "euler" is the algorithm itself. "rk4" follows the flow to fourth order.
        "exponential" is the solution of natural gradient flow of the end-to-end matrix,
        W* + exp(−t)(W_0 − W*), where it exists (`natural_gradient_flow`).
    record : str, callable, sequence of them, or dict of callables
        What is kept: "loss", "excess_loss", "end_to_end" (W), "modes" (u_kᵀ W v_k, with the
        singular vectors of the optimum W*, in the order of its singular values at all
        times), "rates" (the velocity of each mode over its distance from the target: 1
        under natural gradient flow, L a^{2−2/L} under that of the gradient), "balancedness"
        (Frobenius norm of W_{i+1}ᵀ W_{i+1} − W_i W_iᵀ between layers), "rank" (numerical
        rank of W), or functions of (weights, task) that return an array with members as
        its first axis.
    record_every : int, optional
        Record every so many steps; 1 by default. The first and the last step are recorded
        in any case.
    record_at : sequence of int, optional
        Record at these steps, as `simulation.log_steps` makes them.
    progress : bool or str
        Whether to show a bar, and what to put before it: steps of all members together,
        their rate, the time that is left, and the loss of the worst member where a loss is
        recorded. Nothing is shown where stderr is neither a terminal nor a notebook. Needs
        the extra "simulation".
    freeze_converged : float or array of shape (*batch,), optional
        Members whose excess loss is at most this at a record stay as they are from then on.
    temperature : float or array of shape (*batch,), optional
        T of Langevin dynamics: every step adds √(2Tη) ξ to the weights. With the gradient
        as the rule it samples exp(−loss / T) as η goes to zero.
    label_noise : float or array of shape (*batch,), optional
        σ: every step sees the cross moment M + σ Ξ S^T, where Σ = S Sᵀ. It is what a batch
        of B samples does whose labels have noise of standard deviation σ √B.
    rng : int or JAX key, optional
        A seed, for either noise. What a member gets depends on the seed, the step and the
        member's number alone.
    members : int or tuple of int, optional
        The batch shape, where `weights` is a function.
    axes : sequence of str, or dict of str to values, optional
        Names of the batch axes, and their coordinates, for datasets and stores.
    max_bytes : int, optional
        Memory that the simulation may use beside its arguments and its results; half of
        what the device has free by default. Larger ensembles are cut into pieces that are
        simulated one after the other.
    store : str or path, optional
        Where to make a Zarr store: records and weights go to disk as they come and never
        are in memory as a whole. Needs the extra "simulation".
    checkpoint : str or path, optional
        A folder that keeps the state of the run. Where one of the same run is there, the
        run goes on from it, and one that has ended is returned.
    checkpoint_interval : float
        Seconds between two checkpoints; the clock is looked at between records.
    client : dask.distributed.Client, optional
        Of a cluster whose workers simulate the pieces, which are then many enough to keep all
        of them busy; `max_bytes` is the memory for one thread of a worker. A piece whose
        worker dies is given to another. Checkpoints keep pieces that have ended. Needs the
        extra "dask", on workers too.

    Returns
    -------
    History
        Records, last weights, and which members diverged.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong or does not fit the others, or if results would not fit in
        memory or on the disk. Nothing has run then.
    FileExistsError
        If there is something at `store` that this run has not begun.
    ConnectionError
        If the cluster of `client` is gone; checkpoint and store keep the pieces that have ended.
    simulation.CheckpointError
        If the checkpoint is another run's, in use, damaged, or cannot be written.

    Notes
    -----
    Members whose loss is not finite at a record have diverged. They are frozen as they
    were at the record before, their records are NaN from there on, and
    ``History.diverged_at`` says when; the others are not touched. On eager arrays one
    scalar comes to the host at each record, beside those that the rule itself needs. JAX
    arrays run as one compiled loop. How an ensemble is cut changes the last digits at most.
    A run that was stopped and goes on with the same versions, on the same kind of device,
    ends with the same bits. KeyboardInterrupt makes a checkpoint and then goes on its way.

    Examples
    --------
    >>> import numpy as np
    >>> import natgrad_array as ng
    >>> task = ng.GaussianTask.from_modes(np.eye(2), np.asarray([3.0, 1.0]), np.eye(2))
    >>> weights = ng.deep_linear.orthogonal(0, (2, 4, 2), (100,), like=np.empty(0), gain=0.5)
    >>> history = ng.simulate(weights, task, learning_rate=0.1, steps=50, record=("loss", "modes"))
    >>> history
    History(batch_shape=(100,), steps=50, records=51 of loss, modes; 0 diverged)
    >>> history.modes.shape
    (51, 100, 2)
    """
    return prepare(
        weights,
        task,
        learning_rate=learning_rate,
        steps=steps,
        rule=rule,
        integrator=integrator,
        record=record,
        record_every=record_every,
        record_at=record_at,
        progress=progress,
        freeze_converged=freeze_converged,
        temperature=temperature,
        label_noise=label_noise,
        rng=rng,
        members=members,
        axes=axes,
        max_bytes=max_bytes,
        store=store,
        checkpoint=checkpoint,
        checkpoint_interval=checkpoint_interval,
        client=client,
    ).run()


def prepare(
    weights: Weights | Constructor,
    task: GaussianTask,
    /,
    *,
    learning_rate: Any,
    steps: Any,
    rule: Any,
    integrator: Any,
    record: Any,
    record_every: Any,
    record_at: Any,
    progress: Any,
    freeze_converged: Any,
    temperature: Any,
    label_noise: Any,
    rng: Any,
    members: Any,
    axes: Any,
    max_bytes: Any,
    store: Any,
    checkpoint: Any,
    checkpoint_interval: Any,
    client: Any,
) -> Prepared:
    """Check all arguments of `simulate`."""
    options = {
        "learning_rate": learning_rate,
        "freeze_converged": freeze_converged,
        "temperature": temperature,
        "label_noise": label_noise,
    }
    records = check_records(record, RESERVED)
    recorded = schedule(check_count("steps", steps), record_every, record_at)
    ensemble = Ensemble(weights, task, members, options)
    system = check_system(ensemble, rule, integrator, records, recorded)
    named = check_axes(axes, ensemble.batch, system.names)
    key = check_rng(ensemble, rng)
    shapes = record_shapes(ensemble, system)
    each = sizes_of(ensemble, system, shapes)
    path = None if store is None else os.fspath(store)
    plan = plan_of(each, ensemble, system, len(recorded), max_bytes, client)
    check_results_fit(each, ensemble, len(recorded), path)
    interval = check_interval(checkpoint_interval)
    title = check_progress(progress)

    known = attributes(ensemble, system, recorded[-1], rng)

    def leave(found: Mapping[str, Array], weights: tuple[Array, ...], finals: Mapping[str, Array]) -> History:
        return History(
            found,
            weights,
            finals,
            steps=recorded,
            axes=named,
            regime=regime(ensemble.arrays, task),
            attributes=known,
            target_modes=target_modes(ensemble.xp, task, system.names),
            store=path,
        )

    return Prepared(
        ensemble,
        system,
        Loader.of(ensemble, system, key),
        recorded,
        named,
        shapes,
        final_shapes(ensemble, system),
        plan,
        known,
        lambda: fingerprint(ensemble, system, recorded, key, path),
        leave,
        path,
        checkpoint,
        interval,
        title,
        client,
    )
