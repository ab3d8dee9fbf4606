"""Simulations on a Dask cluster: the same numbers, whatever dies on the way."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import numpy as np
import pytest
from backends import BACKENDS, Backend
from test_simulation import random_network, random_task
from test_simulation_files import Terminal, assert_same

import natgrad_array as ng
from natgrad_array.simulation import CheckpointError, cluster, prepared, run
from natgrad_array.simulation.memory import Plan
from natgrad_array.simulation.sinks import Memory

WEIGHTS, TASK = random_network((3, 5, 3), (4, 6)), random_task(3, 3)
OPTIONS: dict[str, Any] = {
    "learning_rate": np.linspace(0.01, 0.2, 4)[:, None],
    "steps": 20,
    "record": ("loss", "modes"),
    "record_every": 3,
    "rng": 5,
    "temperature": np.linspace(0.0, 1e-4, 6),
}


def start(**options: Any) -> distributed.Client:
    return distributed.Client(dashboard_address=":0", **({"n_workers": 2, "threads_per_worker": 1} | options))


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    """Of workers that are threads: what goes to them and back is pickled all the same."""
    with start(processes=False) as found:
        yield found


@pytest.fixture(autouse=True)
def by_threes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same eight pieces everywhere."""
    monkeypatch.setattr(prepared, "make_plan", lambda *_: Plan(3, 15))


def noted(folder: Path, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Weights of some members, and a file that says who was asked for."""
    (folder / f"{start}-{stop}").touch()
    return tuple(w.reshape(24, *w.shape[2:])[start:stop] for w in WEIGHTS)


def asked(folder: Path) -> set[str]:
    """Pieces whose weights were asked for since the last call."""
    found = {path.name for path in folder.iterdir()}
    for name in found:
        (folder / name).unlink()
    return found - {"0-1", "23-24"}


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name in ("numpy", "torch", "jax", "cupy")], ids=str)
def test_the_same_bits_as_without_a_cluster(backend: Backend, client: distributed.Client) -> None:
    """Arrays come back as the library of the weights, writable, with what each member has of its own."""
    weights, rate = backend.asarrays(*WEIGHTS), backend.asarray(OPTIONS["learning_rate"])
    task = ng.GaussianTask(*backend.asarrays(*random_task(3, 3, batch=(6,))._flatten()[0][:4]))
    options = OPTIONS | {"learning_rate": rate, "temperature": backend.asarray(OPTIONS["temperature"])}
    options |= {"record": "loss", "rule": "gradient"}
    wanted = ng.simulate(weights, task, **options)
    found = ng.simulate(weights, task, client=client, **options)
    for name in wanted.records:
        backend.check(found.records[name], weights[0])
        np.testing.assert_array_equal(backend.to_numpy(found.records[name]), backend.to_numpy(wanted.records[name]))
    for a, b in zip(found.weights, wanted.weights, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))
    if backend.name == "numpy":
        assert found.loss.flags.writeable


def test_training_on_a_cluster(client: distributed.Client) -> None:
    """With draws from the model and minibatches that follow the members wherever they are."""
    x = np.random.default_rng(0).standard_normal((40, 3))
    net = ng.networks.MLP((3, 4, 2))
    params, samples = net.init(0, (4, 6), like=x), (x, np.sin(x[:, :2]))
    optimizer = ng.optimizers.kfac(damping=np.asarray([0.1, 0.5, 1.0, 2.0])[:, None])
    options: dict[str, Any] = {"optimizer": optimizer, "steps": 8, "batch_size": 10, "rng": 2}
    wanted = ng.simulation.simulate_training(net, params, samples, **options)
    assert_same(ng.simulation.simulate_training(net, params, samples, client=client, **options), wanted, bitwise=True)


def test_an_ensemble_is_cut_for_its_workers(client: distributed.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into four pieces for each thread, or more if the budget asks for more; the digits stay."""
    monkeypatch.undo()
    plans = []
    real = prepared.make_plan
    monkeypatch.setattr(prepared, "make_plan", lambda *a: plans.append(real(*a)) or plans[-1])
    wanted = ng.simulate(WEIGHTS, TASK, **OPTIONS)
    assert_same(ng.simulate(WEIGHTS, TASK, client=client, **OPTIONS), wanted, bitwise=False)
    ng.simulate(WEIGHTS, TASK, client=client, max_bytes=12_000, **OPTIONS)
    assert plans[0].members >= 24
    assert plans[1].members == 3
    assert plans[2].members < 3


def test_one_member_and_no_member(client: distributed.Client) -> None:
    weights = tuple(w[0, 0] for w in WEIGHTS)
    options = OPTIONS | {"learning_rate": 0.1, "temperature": None}
    assert_same(
        ng.simulate(weights, TASK, client=client, **options), ng.simulate(weights, TASK, **options), bitwise=True
    )
    none = tuple(w[:0] for w in WEIGHTS)
    assert ng.simulate(none, TASK, client=client, **(OPTIONS | {"learning_rate": 0.1})).loss.shape == (8, 0, 6)


def test_a_bar_counts_what_workers_have_done(client: distributed.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    ng.simulate(WEIGHTS, TASK, client=client, progress="sweep", **OPTIONS)
    assert "100%" in screen.getvalue()
    assert "worst loss" in screen.getvalue()


# --------------------------------------------------------------- stores and checkpoints


def test_a_store_and_a_checkpoint_are_the_same(tmp_path: Path, client: distributed.Client) -> None:
    """Weights are made where they are needed; a finished run is returned without another step."""
    folder = tmp_path / "asked"
    folder.mkdir()
    draw = functools.partial(noted, folder)
    paths = {"store": tmp_path / "s.zarr", "checkpoint": tmp_path / "c"}
    wanted = ng.simulate(WEIGHTS, TASK, **OPTIONS)
    found = ng.simulate(draw, TASK, members=(4, 6), client=client, **paths, **OPTIONS)
    assert_same(found, wanted, bitwise=True)
    assert found.to_xarray().attrs["complete"]
    assert len(asked(folder)) == 8
    again = ng.simulate(draw, TASK, members=(4, 6), client=client, **paths, **OPTIONS)
    assert_same(again, wanted, bitwise=True)
    assert not asked(folder)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Do something when so many pieces have been taken in."""
    real, taken = cluster._Watch._take, []

    def take(self: Any, future: Any) -> None:
        real(self, future)
        taken.append(future)
        if len(taken) == count:
            what()

    monkeypatch.setattr(cluster._Watch, "_take", take)


def settle(client: distributed.Client) -> None:
    """Wait until workers have ended what nobody wants any more."""
    while any(client.run(lambda dask_worker: len(dask_worker.state.executing)).values()):
        pass


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_there_here_and_there_again(
    tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """Begun on a cluster, gone on with here into the middle of a piece, ended on a cluster: nothing is done twice."""
    folder = tmp_path / "asked"
    folder.mkdir()
    draw = functools.partial(noted, folder)
    options = OPTIONS | {"members": (4, 6), "checkpoint": tmp_path / "c", "checkpoint_interval": 1e9}
    options |= {"store": tmp_path / "s.zarr"} if stored else {}
    with monkeypatch.context() as patch:
        stop_after(3, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ng.simulate(draw, TASK, client=client, **options)
    # The cluster may have begun more than it could hand over.
    settle(client)
    asked(folder)
    real, numbers = run.advance, []

    def advance(*arguments: Any) -> Any:
        numbers.append(arguments[3])
        if numbers.count(0) == 2 and numbers[-1] > 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            ng.simulate(draw, TASK, **options)
    here = asked(folder)
    assert len(here) == 2
    with monkeypatch.context() as patch:
        # What is half done here is no less done when the cluster is interrupted over it.
        patch.setattr(cluster._Watch, "_some", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ng.simulate(draw, TASK, client=client, **options)
    settle(client)
    asked(folder)
    found = ng.simulate(draw, TASK, client=client, **options)
    there = asked(folder)
    assert len(there) == 4
    # The piece in whose middle it was went on, all others that had ended were left alone.
    assert len(here & there) == 1
    assert_same(found, ng.simulate(WEIGHTS, TASK, **OPTIONS), bitwise=True)


# -------------------------------------------------------------------------------- faults


def close(client: distributed.Client) -> None:
    client.close()


def retire(client: distributed.Client) -> None:
    client.cluster.scale(0)
    while client.nthreads():
        pass


@pytest.mark.parametrize(
    ("end", "words"),
    [(close, "the cluster of the client is gone"), (retire, "the cluster of the client has had no workers for 0.2 s")],
    ids=["gone", "no workers"],
)
def test_a_cluster_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[distributed.Client], None], words: str
) -> None:
    """What was computed is kept, and the run goes on without it."""
    monkeypatch.setattr(cluster, "WORKER_SECONDS", 0.2)
    folder = tmp_path / "c"
    with start(processes=False, n_workers=1) as gone, monkeypatch.context() as patch:
        stop_after(2, patch, lambda: end(gone))
        with pytest.raises(ConnectionError, match=rf"{words}. 2 of 8 pieces had ended and are in the checkpoint"):
            ng.simulate(WEIGHTS, TASK, client=gone, checkpoint=folder, **OPTIONS)
        if end is close:
            with pytest.raises(ConnectionError, match="connected to a running cluster, its status is 'closed'"):
                ng.simulate(WEIGHTS, TASK, client=gone, **OPTIONS)
    real, begun = run.Walk.__init__, []
    monkeypatch.setattr(run.Walk, "__init__", lambda *a, **k: begun.append(1) or real(*a, **k))
    found = ng.simulate(WEIGHTS, TASK, checkpoint=folder, **OPTIONS)
    assert len(begun) == 6
    assert_same(found, ng.simulate(WEIGHTS, TASK, **OPTIONS), bitwise=True)


def test_what_goes_wrong_on_a_worker_is_raised_here(client: distributed.Client) -> None:
    def missing(start: int, stop: int) -> tuple[np.ndarray, ...]:
        if start:
            raise FileNotFoundError("no such network")
        return tuple(w.reshape(24, *w.shape[2:])[start:stop] for w in WEIGHTS)

    with pytest.raises(FileNotFoundError, match="no such network"):
        ng.simulate(missing, TASK, members=(4, 6), client=client, **OPTIONS)
    assert client.submit(int, 3).result() == 3


def test_a_sink_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a piece is never in a checkpoint."""
    options = OPTIONS | {"checkpoint": tmp_path / "c", "checkpoint_interval": 0.0, "client": client}
    real, finished = Memory.finish, []

    def finish(*arguments: Any) -> None:
        finished.append(1)
        if len(finished) == 3:
            raise CheckpointError("the disk is full")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "finish", finish)
        with pytest.raises(CheckpointError, match="the disk is full"):
            ng.simulate(WEIGHTS, TASK, **options)
    assert_same(ng.simulate(WEIGHTS, TASK, **options), ng.simulate(WEIGHTS, TASK, **OPTIONS), bitwise=True)


def test_what_is_no_client(client: distributed.Client) -> None:
    with pytest.raises(TypeError, match=r"client must be a dask.distributed.Client, got str 'tcp://"):
        ng.simulate(WEIGHTS, TASK, client="tcp://127.0.0.1:8786", **OPTIONS)
    like = SimpleNamespace(ensemble=SimpleNamespace(like=np.ones(1, np.float32)))
    job: Any = SimpleNamespace(load=like, from_host=None)
    with pytest.raises(ValueError, match="arrived at a worker as float32, not float64: set JAX_ENABLE_X64=1"):
        cluster.simulate_piece(job, 0, None, None, "float64")


# ----------------------------------------------------------------------------- processes


def deadly(marker: str, caller: int, weights: Any, task: Any) -> Any:
    """Kills the first worker that comes here; without a marker every one."""
    if os.getpid() != caller:
        try:
            if marker:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return weights[0][:, 0, 0]


def steps_with_a_killed_worker(client: distributed.Client) -> None:
    """Data-parallel steps go on as they would have."""
    net, opt = ng.networks.MLP((3, 4, 2)), ng.optimizers.bounded_kfac()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((40, 2))
    alone = spread = net.init(0, like=x)
    parallel = ng.optimizers.DataParallel(opt, client)
    state, shared = opt.init(net, alone), parallel.init(net, spread)
    for step in range(3):
        if step == 1:
            os.kill(max(client.run(os.getpid).values()), signal.SIGKILL)
        alone, state, _ = opt.step(net, alone, state, x, y)
        spread, shared, _ = parallel.step(net, spread, shared, x, y)
    for a, b in zip(spread, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_workers_that_are_killed(tmp_path: Path) -> None:
    """One of two processes dies in the middle of a piece, and then whoever takes a certain piece."""
    marker = tmp_path / "killed"
    record = functools.partial(deadly, str(marker), os.getpid())
    options = OPTIONS | {"record": {"loss": "loss", "mine": record}}
    with start(processes=True) as client:
        found = ng.simulate(WEIGHTS, TASK, client=client, **options)
        assert marker.exists()
        assert_same(found, ng.simulate(WEIGHTS, TASK, **options), bitwise=True)
        steps_with_a_killed_worker(client)
        client.cluster.scheduler.allowed_failures = 0
        options["record"] = functools.partial(deadly, "", os.getpid())
        options["record"].__name__ = "mine"
        with pytest.raises(
            RuntimeError, match=r"members \d+ to \d+ ended every worker .* 0 of 8 pieces had ended; with a"
        ):
            ng.simulate(WEIGHTS, TASK, client=client, **options)
