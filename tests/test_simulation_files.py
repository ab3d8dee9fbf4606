"""Simulations in pieces, on disk, stopped and continued: the same numbers, and clear words where it cannot be."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from test_simulation import random_network, random_task

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array.simulation import CheckpointError, checkpoint, ensemble, memory, run
from natgrad_array.simulation.lock import Lock, LockedError

WEIGHTS, TASK = random_network((3, 5, 3), (4, 6)), random_task(3, 3)
RECORD = ("loss", "modes", "end_to_end")
OPTIONS: dict[str, Any] = {
    "learning_rate": np.linspace(0.01, 0.2, 4)[:, None],
    "steps": 40,
    "record": RECORD,
    "record_every": 3,
}
SMALL = 30_000
"""A budget that holds a few of these members."""


def assert_same(found: ng.simulation.History, wanted: ng.simulation.History, *, bitwise: bool) -> None:
    compare = np.testing.assert_array_equal if bitwise else np.testing.assert_allclose
    options = {} if bitwise else {"rtol": 1e-9, "atol": 1e-12}
    for name in wanted.records:
        compare(found.records[name][...], wanted.records[name][...], **options)
    for a, b in zip(found.weights, wanted.weights, strict=True):
        compare(a[...], b[...], **options)
    np.testing.assert_array_equal(found.diverged_at, wanted.diverged_at)
    np.testing.assert_array_equal(found.steps, wanted.steps)


# ------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("batch", [(), (1,), (7,), (3, 4), (2, 1, 5), (5, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 100])
def test_pieces_tile_the_batch(batch: tuple[int, ...], most: int) -> None:
    pieces = ensemble.cut(batch, most)
    numbers = np.arange(math.prod(batch)).reshape(batch)
    begin = 0
    for piece in pieces:
        assert 1 <= piece.members <= most
        assert piece.start == begin
        np.testing.assert_array_equal(numbers[piece.region].ravel(), np.arange(piece.start, piece.stop))
        # Chunks of a store are as long as the first piece, and no piece lies in two.
        for part, first in zip(piece.region, pieces[0].region, strict=True):
            length = first.stop - first.start
            assert part.start % length == 0
            assert part.stop - part.start <= length
        begin = piece.stop
    assert begin == math.prod(batch)


@pytest.mark.parametrize("batched_task", [False, True])
def test_pieces_are_as_the_whole(batched_task: bool) -> None:
    task = random_task(3, 3, batch=(4, 1)) if batched_task else TASK
    options = OPTIONS | {"rng": 5, "temperature": 1e-4, "label_noise": np.linspace(0.0, 0.1, 6)}
    whole = ng.simulate(WEIGHTS, task, **options)
    pieces = ng.simulate(WEIGHTS, task, max_bytes=SMALL, **options)
    assert memory_plan(task, options).members < 24
    assert_same(pieces, whole, bitwise=False)
    assert isinstance(pieces.loss, np.ndarray)


def memory_plan(task: ng.GaussianTask, options: dict[str, Any]) -> memory.Plan:
    """How the test ensemble is cut."""
    from natgrad_array.simulation import observables
    from natgrad_array.simulation import options as opts

    settings = {name: options.get(name) for name in opts.OPTIONS}
    members = ensemble.Ensemble(WEIGHTS, task, None, settings)
    system = opts.check_system(members, "layerwise", "euler", observables.check_records(RECORD, frozenset()), (0, 40))
    each = memory.sizes_of(members, system, opts.record_shapes(members, system))
    return memory.make_plan(each, members, system, 15, SMALL)


def test_a_constructor_is_as_its_arrays() -> None:
    """Asked for members once, in order, a piece at a time."""
    asked = []

    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        asked.append((start, stop))
        return tuple(w.reshape(24, *w.shape[2:])[start:stop] for w in WEIGHTS)

    found = ng.simulate(weights, TASK, members=(4, 6), max_bytes=SMALL, **OPTIONS)
    assert_same(found, ng.simulate(WEIGHTS, TASK, max_bytes=SMALL, **OPTIONS), bitwise=True)
    asked = [pair for pair in asked if pair != (0, 1)]
    assert [pair[0] for pair in asked] == [0, *(pair[1] for pair in asked[:-1])]
    assert asked[-1][1] == 24
    assert len(asked) > 2


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """An ensemble eight times larger, made as it goes, with records on disk."""
    sizes, budget = (8, 12, 8), 2**23
    task = random_task(8, 8)
    each = 8 * sum(m * n for n, m in itertools.pairwise(sizes))
    members = 8 * budget // each

    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return dl.gaussian(start, sizes, (stop - start,), like=np.empty(0))

    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 3, "record": ("loss", "modes"), "rule": "gradient"}
    ng.simulate(weights, task, members=10, store=tmp_path / "warm", **options)
    tracemalloc.start()
    try:
        history = ng.simulate(weights, task, members=members, max_bytes=budget, store=tmp_path / "large", **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Flags and settings of all members come back in memory.
    assert peak < 1.3 * budget + 3 * 8 * members
    assert history.loss.shape == (4, members)
    some = slice(members - 50, members)
    np.testing.assert_array_equal(np.isfinite(history.loss[:, some]), True)


def test_one_member_has_to_fit() -> None:
    with pytest.raises(ValueError, match=r"max_bytes must be at least [0-9]+, what one member takes, got 100"):
        ng.simulate(WEIGHTS, TASK, max_bytes=100, **OPTIONS)


# -------------------------------------------------------------------------------- stores


def test_a_store_is_the_dataset(tmp_path: Path) -> None:
    axes = {"rate": np.linspace(0.01, 0.2, 4), "seed": range(6)}
    options = OPTIONS | {"axes": axes, "max_bytes": SMALL}
    wanted = ng.simulate(WEIGHTS, TASK, **options)
    found = ng.simulate(WEIGHTS, TASK, store=tmp_path / "sweep.zarr", **options)
    assert_same(found, wanted, bitwise=True)
    assert not (tmp_path / "sweep.zarr.lock").exists()
    with xarray.open_zarr(tmp_path / "sweep.zarr", consolidated=False, chunks=None) as dataset:
        own = wanted.to_xarray()
        assert set(dataset.variables) == set(own.variables)
        for name in own.variables:
            assert dataset[name].dims == own[name].dims
            np.testing.assert_array_equal(dataset[name].values, own[name].values)
        assert dataset["loss"].dims == ("step", "rate", "seed")
        assert dataset["weights_2"].dims == ("rate", "seed", "width_2", "width_1")
        chosen = dataset["modes"].sel(step=39, seed=4).values
        np.testing.assert_array_equal(chosen, wanted.modes[13, :, 4])
        assert dataset.attrs["complete"]
        for name in ("numpy_version", "library", "device", "dtype", "rule", "command", "seed"):
            assert dataset.attrs[name] == own.attrs[name]
    assert found.to_xarray()["loss"].sizes == {"step": 15, "rate": 4, "seed": 6}
    assert own.attrs["dtype"] == "float64"
    assert own.attrs["rule"] == "layerwise"


def test_records_reach_the_disk_as_they_come(tmp_path: Path) -> None:
    """When the third piece is made, the first is there."""
    path, seen = tmp_path / "s.zarr", []

    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        if path.exists() and start >= 2:
            seen.append(xarray.open_zarr(path, consolidated=False, chunks=None)["loss"].values[:, 0, 0])
        return tuple(w.reshape(24, *w.shape[2:])[start:stop] for w in WEIGHTS)

    history = ng.simulate(weights, TASK, members=(4, 6), max_bytes=SMALL, store=path, **OPTIONS)
    assert seen
    np.testing.assert_array_equal(seen[-1], history.loss[:, 0, 0])


def test_a_store_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    history = ng.simulate(WEIGHTS, TASK, store=path, **OPTIONS)
    again = ng.simulate(WEIGHTS, TASK, store=path, **OPTIONS)
    assert_same(again, history, bitwise=True)
    with pytest.raises(FileExistsError, match=r"is another run's, or no store; choose another path"):
        ng.simulate(WEIGHTS, TASK, store=path, **(OPTIONS | {"steps": 41}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is another run's, or no store"):
        ng.simulate(WEIGHTS, TASK, store=tmp_path / "folder", **OPTIONS)
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["thesis.txt"]


def test_two_runs_into_one_store(tmp_path: Path) -> None:
    """The second is refused while the first is at it, in one process or in two."""
    path, refused = tmp_path / "s.zarr", []

    def nosy(weights: Any, task: Any) -> Any:
        if path.exists():
            with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()}") as caught:
                ng.simulate(WEIGHTS, TASK, store=path, **OPTIONS)
            refused.append(caught)
        return weights[0][:, 0, 0]

    ng.simulate(WEIGHTS, TASK, learning_rate=0.1, steps=2, record={"nosy": nosy}, store=path)
    assert refused


def test_without_zarr_or_xarray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = ng.simulate(WEIGHTS, TASK, **OPTIONS)
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ModuleNotFoundError, match=r"zarr is needed for this; install it with: pip install"):
        ng.simulate(WEIGHTS, TASK, store=tmp_path / "s", **OPTIONS)
    with pytest.raises(ModuleNotFoundError, match="xarray is needed"):
        history.to_xarray()


# ------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    """Looks like one."""

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at all steps of all members, with the loss of the worst member that has one."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    rates = np.asarray([0.01, 0.05, 0.1, 1e9])[:, None]
    options = OPTIONS | {"learning_rate": rates, "rule": "gradient", "record_every": 10, "steps": 40}
    history = ng.simulate(WEIGHTS, TASK, max_bytes=SMALL, progress="sweep 1", **options)
    assert np.count_nonzero(history.diverged) == 6
    plain = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in plain.split("\r") if "%" in line][-1]
    # The last piece has members that diverged, and may have nothing else.
    assert re.search(r"sweep 1 .* 100% [0-9.]+k? steps/s 0:00:00 (worst loss [0-9.]+|all diverged)", last), last
    shown = ng.simulation.progress.worst({"loss": history.loss[:4], "modes": history.modes[:4]})
    assert shown == f"worst loss {np.nanmax(history.loss[3]):.3g}"
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    ng.simulate(WEIGHTS, TASK, progress=True, **options)
    assert not quiet.getvalue()


# --------------------------------------------------------------------------- checkpoints

PROGRAM = """
import os, random, signal, sys
import numpy as np
import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array.simulation import checkpoint, run

folder, store, limit = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
events = 0

def counted(function):
    def call(*args, **kwargs):
        global events
        events += 1
        if events == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

os.replace, os.fsync, os.unlink = counted(os.replace), counted(os.fsync), counted(os.unlink)
checkpoint.np.lib.format.write_array = counted(np.lib.format.write_array)
run.advance = counted(run.advance)
weights = dl.gaussian(0, (3, 5, 3), (30,), like=np.empty(0))
x = np.random.default_rng(1).standard_normal((50, 3))
task = ng.GaussianTask.from_samples(x, x @ np.asarray([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.0, 1.0]]))
history = ng.simulate(
    weights, task, learning_rate=np.linspace(0.01, 0.1, 30), steps=300, record=("loss", "modes"), record_every=2,
    rng=3, temperature=1e-5, max_bytes=100_000, checkpoint=folder, checkpoint_interval=0.0, store=store,
)
np.savez(sys.argv[4], history.loss[...], history.modes[...], *(w[...] for w in history.weights))
print(events)
"""


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(ng.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_killed_at_any_moment_and_resumed_to_the_same_bits(tmp_path: Path, stored: bool) -> None:
    """Ten times, at random events: in mid-step, in mid-write, between a write and its rename."""

    def paths(name: str) -> tuple[Path, str]:
        return tmp_path / name, str(tmp_path / f"{name}.zarr") if stored else ""

    whole = in_a_process(*paths("whole"), 0, tmp_path / "whole.npz")
    assert whole.returncode == 0, whole.stderr
    total, rng = int(whole.stdout), np.random.default_rng(int(stored))
    assert total > 100
    kills = 0
    while kills < 10:
        limit = int(rng.integers(1, total // 6))
        killed = in_a_process(*paths("killed"), limit, tmp_path / "killed.npz")
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        kills += 1
    assert kills >= 5
    last = in_a_process(*paths("killed"), 0, tmp_path / "killed.npz")
    assert last.returncode == 0, last.stderr
    with np.load(tmp_path / "whole.npz") as wanted, np.load(tmp_path / "killed.npz") as found:
        for name in wanted.files:
            np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("array", [0, 1, 3])
def test_a_store_that_was_not_made_whole_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: int
) -> None:
    """A run that dies while it makes its store can be started again."""
    options = OPTIONS | {"checkpoint": tmp_path / "c", "store": tmp_path / "s.zarr"}
    real, made = zarr.Group.create_array, []

    def die(*arguments: Any, **keywords: Any) -> Any:
        if len(made) == array:
            raise SystemExit
        made.append(arguments)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "create_array", die)
        with pytest.raises(SystemExit):
            ng.simulate(WEIGHTS, TASK, **options)
    assert_same(ng.simulate(WEIGHTS, TASK, **options), ng.simulate(WEIGHTS, TASK, **OPTIONS), bitwise=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s.zarr"]


def test_a_store_of_groups_that_was_not_made_whole_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise SystemExit

    options = {"learning_rate": 0.1, "steps": 3, "checkpoint": tmp_path / "c", "store": tmp_path / "s.zarr"}
    with monkeypatch.context() as patch:
        patch.setattr(type(zarr.group().attrs), "__setitem__", die)
        with pytest.raises(SystemExit):
            ng.simulation.simulate_groups({"a": WEIGHTS}, TASK, **options)
    assert ng.simulation.simulate_groups({"a": WEIGHTS}, TASK, **options)["a"].loss.shape[0] == 4


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_ctrl_c_makes_a_checkpoint_and_the_next_call_goes_on(tmp_path: Path, library: str) -> None:
    """With the interval far away; the finished run is returned without another step."""
    if library == "torch":
        convert = pytest.importorskip("torch").asarray
    else:
        import jax

        convert = jax.numpy.asarray if library == "jax" else np.array
    weights = tuple(convert(w) for w in WEIGHTS)
    task = ng.GaussianTask(*(convert(m) for m in TASK._flatten()[0][:4]))
    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 30, "record": ("loss", "modes"), "max_bytes": SMALL}
    wanted = ng.simulate(weights, task, **options)
    real, calls = run.advance, []

    def counting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "advance", counting)
        with pytest.raises(KeyboardInterrupt):
            ng.simulate(weights, task, checkpoint=tmp_path / "c", checkpoint_interval=1e9, **options)
        stopped = len(calls)
        found = ng.simulate(weights, task, checkpoint=tmp_path / "c", checkpoint_interval=1e9, **options)
        assert len(calls) > stopped
        done = len(calls)
        again = ng.simulate(weights, task, checkpoint=tmp_path / "c", **options)
        assert len(calls) == done
    for history in (found, again):
        assert type(history.loss) is type(wanted.loss)
        for name in wanted.records:
            np.testing.assert_array_equal(np.asarray(history.records[name]), np.asarray(wanted.records[name]))
        for a, b in zip(history.weights, wanted.weights, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not (tmp_path / "c" / "lock").exists()


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A checkpoint of a run that was stopped in the middle, after several."""
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        resume(folder, at=9)
    return folder


def resume(folder: Path, at: int = 0, **changes: Any) -> ng.simulation.History:
    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 30, "record": ("loss",), "checkpoint_interval": 0.0}
    real, calls = run.advance, []

    def counting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "advance", counting)
        return ng.simulate(WEIGHTS, TASK, max_bytes=SMALL, checkpoint=folder, **(options | changes))


def test_a_checkpoint_of_another_run_is_refused(stopped: Path) -> None:
    before = sorted((entry.name, entry.read_bytes()) for entry in stopped.iterdir())
    for changes, words in (
        ({"steps": 31}, r"recorded steps differ; steps: 30 there, 31 here"),
        ({"learning_rate": 0.2}, r"learning_rate(: \S+ there, 0.2 here| differs)"),
        ({"rule": "gradient"}, r"rule: layerwise there, gradient here"),
        ({"record": ("loss", "rank")}, r"record: .* there, loss, rank here"),
        ({"record_every": 2}, "recorded steps differ"),
        ({"freeze_converged": 0.1}, "freeze_converged: none there, 0.1 here"),
    ):
        with pytest.raises(CheckpointError, match=rf"is the checkpoint of another run \({words}\); choose"):
            resume(stopped, **changes)
    with pytest.raises(CheckpointError, match=r"another run \(weights differ\)"):
        ng.simulate(
            random_network((3, 5, 3), (4, 6), seed=9),
            TASK,
            learning_rate=0.1,
            steps=30,
            checkpoint=stopped,
        )
    assert sorted((entry.name, entry.read_bytes()) for entry in stopped.iterdir()) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "gone"])
@pytest.mark.parametrize("kind", ["manifest", "state"])
def test_a_damaged_checkpoint_says_so_and_the_one_before_it_serves(stopped: Path, kind: str, damage: str) -> None:
    newest = max(stopped.glob(f"{kind}-*"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if (damage == "gone" and kind == "manifest") or damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes({"truncated": newest.read_bytes()[:-7], "empty": b"", "flipped": bytes(content)}[damage])
    wanted = ng.simulate(WEIGHTS, TASK, learning_rate=0.1, steps=30, max_bytes=SMALL)
    if not (damage == "gone" and kind == "manifest"):
        with pytest.raises(
            CheckpointError, match=rf"is damaged: {newest.name} .*; remove (manifest-\d+.json) to go on"
        ) as e:
            resume(stopped)
        (stopped / str(e.value).split("; remove ")[1].split(" ")[0]).unlink()
    assert_same(resume(stopped), wanted, bitwise=True)


def test_a_damaged_file_of_records(stopped: Path) -> None:
    first = min(stopped.glob("records-*"))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"is damaged: {first.name} has \d+ bytes, expected \d+"):
        resume(stopped)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it holds thesis.txt; choose another path"):
        resume(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_reading_runs_no_code(stopped: Path, tmp_path: Path) -> None:
    """A state with a pickle in it, and the sums to go with it."""
    import hashlib

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    manifest = max(stopped.glob("manifest-*"))
    payload = json.loads(manifest.read_bytes())["payload"]
    state = stopped / payload["state"]["file"]
    with open(state, "wb") as file:
        np.lib.format.write_array(file, np.asarray([Evil()], dtype=object), allow_pickle=True)
    payload["state"] |= {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
        "arrays": ["state rate 0"],
    }
    text = json.dumps(payload, sort_keys=True)
    manifest.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "payload": payload}))
    with pytest.raises(CheckpointError, match="does not hold arrays of numbers"):
        resume(stopped)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(stopped: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A clear error, nothing half written left, and the last good checkpoint goes on."""
    names = {entry.name for entry in stopped.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, full)
        with pytest.raises(
            CheckpointError,
            match=r"could not be written to .*: No space left on device; the last good one, number \d+, is",
        ):
            resume(stopped)
    assert {entry.name for entry in stopped.iterdir()} == names
    wanted = ng.simulate(WEIGHTS, TASK, learning_rate=0.1, steps=30, max_bytes=SMALL)
    assert_same(resume(stopped), wanted, bitwise=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step is made."""
    monkeypatch.setattr(run, "advance", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the checkpoint .*file.inside cannot be written: Not a directory"):
        resume(tmp_path / "file" / "inside")

    def read_only(*args: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        resume(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"the store .* cannot be written: Read-only file system"):
        ng.simulate(WEIGHTS, TASK, store=tmp_path / "s", **OPTIONS)


def test_the_store_of_a_checkpoint_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "c", at=9, store=tmp_path / "s")
    shutil.move(tmp_path / "s", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the store .* of the checkpointed run is gone"):
        resume(tmp_path / "c", store=tmp_path / "s")
    shutil.move(tmp_path / "elsewhere", tmp_path / "s")
    found = resume(tmp_path / "c", store=tmp_path / "s")
    assert_same(found, ng.simulate(WEIGHTS, TASK, learning_rate=0.1, steps=30, max_bytes=SMALL), bitwise=True)


# ---------------------------------------------------------------------------------- locks


def lock_in_a_process(path: Path, then: str) -> subprocess.CompletedProcess[str]:
    code = "import os, pathlib\nfrom natgrad_array.simulation.lock import Lock\n"
    code += f"lock = Lock(pathlib.Path({str(path)!r}))\n{then}"
    environment = os.environ | {"PYTHONPATH": str(Path(ng.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_a_lock_is_one_holder_s(tmp_path: Path) -> None:
    first = Lock(tmp_path / "lock")
    words = f"is in use by process {os.getpid()} on {socket.gethostname()}; wait for it"
    with pytest.raises(LockedError, match=words):
        Lock(tmp_path / "lock")
    other = lock_in_a_process(tmp_path / "lock", "")

    assert other.returncode == 1
    assert f"in use by process {os.getpid()}" in other.stderr
    first.release()
    first.release()
    assert not (tmp_path / "lock").exists()
    Lock(tmp_path / "lock").release()


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    """The file stays behind, the lock does not; that of another host cannot be told from a live one."""
    path = tmp_path / "lock"
    lock_in_a_process(path, "os.kill(os.getpid(), 9)")

    assert json.loads(path.read_text())["host"] == socket.gethostname()
    Lock(path).release()
    path.write_text(json.dumps({"host": "far-away", "pid": 17, "boot": "x"}))
    with pytest.raises(
        LockedError, match=f"process 17 on far-away, which cannot be asked from here; if it is gone, remove {path}"
    ):
        Lock(path)
    path.write_text("not a lock")
    Lock(path).release()


# ------------------------------------------------------------------------------ bad input

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "steps": ({"steps": -1}, ValueError, "steps must be an integer from 1 to 2147483647, got -1"),
    "steps float": ({"steps": 2.0}, ValueError, "steps must be an integer"),
    "rate": ({"learning_rate": -0.1}, ValueError, "learning_rate must be at least 0, got -0.1"),
    "rate text": ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number or an array"),
    "rate shape": (
        {"learning_rate": np.ones(5)},
        ValueError,
        r"batch shapes must broadcast, got .*learning_rate: \(5,\)",
    ),
    "rate dtype": ({"learning_rate": np.ones(6, np.float32)}, TypeError, "float32"),
    "rule": ({"rule": "newton"}, ValueError, "rule must be one of 'layerwise', .*, 'gradient', got 'newton'"),
    "rule shape": ({"rule": lambda w, t: w[:1]}, ValueError, "must have one array for each of 2 layers, got 1"),
    "integrator": ({"integrator": "rk2"}, ValueError, "integrator must be one of 'euler', 'rk4', 'exponential'"),
    "exponential gradient": (
        {"integrator": "exponential", "rule": "gradient"},
        ValueError,
        "rule 'gradient' on wide networks is none: use 'rk4'",
    ),
    "exponential callable": ({"integrator": "exponential", "rule": dl.gradient}, ValueError, "rule a callable on wide"),
    "exponential layers": (
        {"integrator": "exponential", "record": "balancedness"},
        ValueError,
        "cannot record 'balancedness'",
    ),
    "record": ({"record": ("loss", "los")}, ValueError, "record names 'los', which is none of 'loss', 'excess_loss'"),
    "record type": ({"record": 3}, TypeError, "record must be names, callables, or a dictionary"),
    "record twice": ({"record": ("loss", "loss")}, ValueError, "record must name everything once"),
    "record lambda": ({"record": (lambda w, t: w[0],)}, ValueError, "identifier, got '<lambda>': use a dictionary"),
    "record taken": ({"record": {"weights": lambda w, t: w[0]}}, ValueError, "'weights', which is taken"),
    "record of nothing": ({"record": {"mine": 7}}, TypeError, r"record\['mine'\] must be a callable"),
    "record scalar": (
        {"record": {"mine": lambda w, t: w[0][0, 0]}},
        ValueError,
        r"record 'mine' must return an array with one row for each member, got shape \(3,\)",
    ),
    "record_every": ({"record_every": 0}, ValueError, "record_every must be an integer from 1"),
    "record_at": ({"record_at": (3, 50)}, ValueError, "record_at must be integers from 0 to 40"),
    "both": ({"record_every": 2, "record_at": (3,)}, ValueError, "record_every and record_at exclude each other"),
    "members": ({"members": 24}, ValueError, "members is the batch shape where weights is a callable"),
    "axes count": ({"axes": ("seed",)}, ValueError, r"axes must name each of the 2 axes of the batch shape \(4, 6\)"),
    "axes name": ({"axes": ("step", "seed")}, ValueError, "axes must be named by identifiers that no record has"),
    "axes type": ({"axes": 3}, TypeError, "axes must be a sequence of names"),
    "axes values": (
        {"axes": {"rate": [1, 2, 3], "seed": None}},
        ValueError,
        r"axes\['rate'\] must be 4 numbers, got int64 of shape \(3,\)",
    ),
    "max_bytes": ({"max_bytes": -1}, ValueError, "max_bytes must be a positive integer, got -1"),
    "progress": (
        {"progress": 3},
        TypeError,
        "progress must be True, False or a text that is put before the bar, got 3",
    ),
    "interval": ({"checkpoint_interval": -1.0}, ValueError, "checkpoint_interval must be a number of seconds"),
    "noise without a seed": ({"temperature": 0.1}, ValueError, "rng must be given with temperature: an integer seed"),
    "generator": (
        {"temperature": 0.1, "rng": np.random.default_rng(0)},
        TypeError,
        "rng must be an integer seed .*, got Generator",
    ),
    "seed": ({"temperature": 0.1, "rng": -3}, ValueError, "rng must be at least 0, got -3"),
    "temperature": ({"temperature": -0.1, "rng": 0}, ValueError, "temperature must be at least 0"),
    "noise in rk4": (
        {"label_noise": 0.1, "rng": 0, "integrator": "rk4"},
        ValueError,
        "label_noise needs integrator 'euler', got 'rk4'",
    ),
    "freeze": ({"freeze_converged": True}, TypeError, "freeze_converged must be a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, words = MISTAKES[name]
    monkeypatch.setattr(run, "advance", None)
    with pytest.raises(error, match=words):
        ng.simulate(WEIGHTS, TASK, **(OPTIONS | {"record_every": None} | changes))


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="weights must be a tuple or list"):
        ng.simulate(3, TASK, learning_rate=0.1, steps=2)
    with pytest.raises(TypeError, match="task must be a GaussianTask"):
        ng.simulate(WEIGHTS, None, learning_rate=0.1, steps=2)
    with pytest.raises(ValueError, match="rule 'layerwise' on intermediate networks is none"):
        ng.simulate(
            random_network((4, 3, 3), (2,)), random_task(4, 3), learning_rate=0.1, steps=2, integrator="exponential"
        )
    with pytest.raises(ValueError, match="for networks of one layer"):
        ng.simulate(random_network((3, 3), (2,)), random_task(3, 3), learning_rate=0.1, steps=2, record="balancedness")


def test_constructors_that_do_not_fit() -> None:
    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(np.ones((1, *w.shape[2:])) for w in WEIGHTS)

    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 2}
    with pytest.raises(ValueError, match=r"members must be the batch shape, an integer or a tuple of them, got None"):
        ng.simulate(weights, TASK, **options)
    with pytest.raises(ValueError, match=r"weights\(0, 5\) must return float64 arrays of shapes \[\(5, 5, 3\)"):
        ng.simulate(weights, TASK, members=5, **options)
    with pytest.raises(ValueError, match=r"members must be the whole batch shape, \(2, 5\), got 5"):
        ng.simulate(weights, TASK, members=5, learning_rate=np.ones((2, 1)), steps=2)


@pytest.mark.parametrize("stored", [False, True])
def test_a_grid_beyond_all_bounds_is_refused(tmp_path: Path, stored: bool) -> None:
    def weights(start: int, stop: int) -> tuple[np.ndarray, ...]:
        assert stop - start <= 1
        return tuple(np.ones((stop - start, *w.shape[2:])) for w in WEIGHTS)

    store = tmp_path / "s" if stored else None
    with pytest.raises(ValueError, match=r"1000000000000 members with 3 records leave about .* GB, while"):
        ng.simulate(weights, TASK, members=(10**6, 10**6), learning_rate=0.1, steps=2, store=store)
    assert not (tmp_path / "s").exists()


def test_a_simulation_inside_jit() -> None:
    import jax

    def inside(w: Any) -> Any:
        task = ng.GaussianTask(*(jax.numpy.asarray(m) for m in TASK._flatten()[0][:4]))
        return ng.simulate((w, w), task, learning_rate=0.1, steps=2).loss

    with pytest.raises(TypeError, match="a simulation does not run inside jit"):
        jax.jit(inside)(jax.numpy.ones((3, 3)))


def test_an_attribute_that_was_not_recorded() -> None:
    history = ng.simulate(WEIGHTS, TASK, **OPTIONS)
    with pytest.raises(AttributeError, match="nothing called 'rank' was recorded; there is loss, modes, end_to_end"):
        history.rank  # noqa: B018
