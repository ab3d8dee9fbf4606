"""Training as a simulation: the loop by hand, every sample once in a pass, pieces, checkpoints, divergence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, NUMPY, Backend
from test_simulation_files import assert_same

import natgrad_array as ng
from natgrad_array import _arrays
from natgrad_array.optimizers.presets import PRESETS
from natgrad_array.simulation import run, simulate_training
from natgrad_array.simulation.training import settings

OTHERS = {backend.name: backend for backend in BACKENDS if not backend.jit}
JAX = OTHERS["jax"]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 3))
Y = np.tanh(X @ RNG.standard_normal((3, 2))) + 0.1 * RNG.standard_normal((24, 2))
HELD_OUT = X[:7] + 0.1, Y[:7]
NET = ng.networks.MLP((3, 4, 2))
PARAMS = NET.init(1, (2, 3), like=X)
OPTIONS: dict[str, Any] = {"steps": 12, "batch_size": 6, "rng": 3, "record": ("loss", "training_loss", "damping")}
KFAC = ng.optimizers.kfac(damping=np.asarray([[0.1], [1.0]]))
SMALL = 20_000


def by_hand(optimizer: Any, params: Any, batches: Any) -> tuple[np.ndarray, Any]:
    """Loss of each batch before its step, and the last parameters, by the public optimizer."""
    state, losses = optimizer.init(NET, params), []
    for x, y in batches:
        losses.append(NET.loss(params, x, y))
        params, state, _ = optimizer.step(NET, params, state, x, y)
    return np.stack(losses), params


# ------------------------------------------------------------------------- against a loop


@pytest.mark.parametrize("name", ["sgd", "adam", "foof", "full", "decay"])
@pytest.mark.parametrize("every", [1, 5])
def test_it_is_the_loop_by_hand(name: str, every: int) -> None:
    """Streamed batches, optimizers that draw nothing, settings that differ between members."""
    rates = np.asarray([0.02, 0.05, 0.1])
    opts = ng.optimizers
    optimizer = {
        "sgd": lambda: opts.sgd(learning_rate=rates, momentum=0.5),
        "adam": lambda: opts.adam(learning_rate=rates),
        "foof": lambda: opts.foof(learning_rate=rates, damping=np.asarray([[0.1], [0.5]])),
        "full": lambda: opts.Optimizer(opts.InputsOnly(), opts.FullFisher(), opts.Fixed(rates), opts.Damping(0.1)),
        "decay": lambda: opts.Optimizer(scaling=opts.Fixed(rates), weight_decay=np.asarray([[0.0], [0.1]])),
    }[name]()

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.random.default_rng(step).integers(0, 24, 9)
        return X[chosen], Y[chosen]

    history = simulate_training(
        NET,
        PARAMS,
        batch,
        optimizer=optimizer,
        steps=10,
        record=("loss", "held_out_loss"),
        held_out=HELD_OUT,
        record_every=every,
    )
    losses, _ = by_hand(optimizer, PARAMS, [batch(k) for k in range(11)])
    _, last = by_hand(optimizer, PARAMS, [batch(k) for k in range(10)])
    np.testing.assert_allclose(history.loss, losses[history.steps], rtol=1e-12)
    np.testing.assert_allclose(history.held_out_loss[-1], NET.loss(last, *HELD_OUT), rtol=1e-12)
    for found, wanted in zip(history.weights, last, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(history.learning_rate, np.broadcast_to(rates, (2, 3)))
    assert history.regime is None


@pytest.mark.parametrize(
    "library", [OTHERS[name] for name in OTHERS if name in ("numpy", "torch", "strict-device1", "jax")], ids=str
)
def test_a_pass_sees_every_sample_once(library: Backend) -> None:
    """At rest the loss of a batch of one is that of one sample; each pass has an order of its own."""
    params, (x, y) = library.asarrays(*PARAMS), library.asarrays(X, Y)
    optimizer = ng.optimizers.sgd(learning_rate=0.0)
    options: dict[str, Any] = {"optimizer": optimizer, "steps": 47, "rng": 5}
    found = library.to_numpy(simulate_training(NET, params, (x, y), batch_size=1, **options).loss)
    each = np.stack([NET.loss(PARAMS, X[k : k + 1], Y[k : k + 1]) for k in range(24)])
    for begin in (0, 24):
        np.testing.assert_allclose(np.sort(found[begin : begin + 24], axis=0), np.sort(each, axis=0), rtol=1e-5)
    assert np.max(np.abs(found[:24] - found[24:])) > 0.1
    if library is JAX:
        return
    # All members see the same order, and a batch is a piece of it.
    order = [int(np.argmin(np.abs(each[:, 0, 0] - value))) for value in found[:24, 0, 0]]
    five = library.to_numpy(simulate_training(NET, params, (x, y), batch_size=5, **(options | {"steps": 3})).loss)
    for k in range(4):
        chosen = order[5 * k : 5 * k + 5]
        np.testing.assert_allclose(five[k], NET.loss(PARAMS, X[chosen], Y[chosen]), rtol=1e-5)


def test_draws_are_normal_and_members_have_their_own() -> None:
    key = _arrays.counted_key(7, X)
    noise = _arrays.MemberNoise(key, 3, 11, np.arange(40)).draw((2, 40, 50, 3), np, X)
    assert noise.shape == (2, 40, 50, 3)
    assert abs(noise.mean()) < 4.5 * noise.size**-0.5
    assert abs(noise.var() - 1.0) < 4.5 * (2.0 / noise.size) ** 0.5
    flat = np.moveaxis(noise, 1, 0).reshape(40, -1)
    crossed = flat @ flat.T / flat.shape[1] - np.eye(40)
    assert np.max(np.abs(crossed)) < 6.0 * (2.0 / flat.shape[1]) ** 0.5
    part = _arrays.MemberNoise(key, 3, 11, np.arange(8, 20)).draw((2, 12, 50, 3), np, X)
    np.testing.assert_array_equal(part, noise[:, 8:20])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_and_pieces_are_as_the_whole(name: str) -> None:
    """The same numbers for a member whoever is beside it; the compiled loop can find it again."""
    optimizer = PRESETS[name]()
    assert hash(settings(optimizer)[0]) == hash(settings(PRESETS[name]())[0])
    options = OPTIONS | {"optimizer": optimizer, "steps": 30}
    whole = simulate_training(NET, PARAMS, (X, Y), **options)
    assert np.all(whole.training_loss[-1] < whole.training_loss[0])
    pieces = simulate_training(NET, PARAMS, (X, Y), max_bytes=SMALL, **options)
    assert_same(pieces, whole, bitwise=False)
    other = simulate_training(NET, PARAMS, (X, Y), **(options | {"rng": 4}))
    assert np.max(np.abs(other.loss - whole.loss)) > 1e-4


@pytest.mark.parametrize("name", ["kfac"])
@pytest.mark.parametrize("library", [OTHERS[name] for name in ("torch", "jax") if name in OTHERS], ids=str)
def test_other_libraries(library: Backend, name: str) -> None:
    """On torch the same numbers; JAX has random numbers of its own, and one compiled loop."""
    params, (x, y) = library.asarrays(*PARAMS), library.asarrays(X, Y)
    options = OPTIONS | {"optimizer": PRESETS[name](), "record_every": 3, "held_out": HELD_OUT}
    options["record"] = {"corner": lambda params, state: params[0][:, :2, 0], "loss": "loss"}
    host = simulate_training(NET, PARAMS, (X, Y), **options)
    options["held_out"] = library.asarrays(*HELD_OUT)
    found = simulate_training(NET, params, (x, y), **options)
    library.check(found.loss, params[0])
    assert found.corner.shape == (5, 2, 3, 2)
    if library.name == "torch":
        np.testing.assert_allclose(library.to_numpy(found.loss), host.loss, rtol=1e-8)
        np.testing.assert_allclose(library.to_numpy(found.corner), host.corner, rtol=1e-7)
    else:
        first = np.mean(library.to_numpy(NET.loss(params, x, y)))
        assert np.mean(library.to_numpy(NET.loss(found.weights, x, y))) < 0.7 * first


def test_samples_of_each_member_and_classes() -> None:
    """Data with batch axes of their own, images, integer targets."""
    net = ng.networks.ConvNet((4, 4, 1), (2,), (3,), likelihood="categorical")
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((3, 10, 4, 4, 1)), rng.integers(0, 3, (2, 1, 10))
    params, optimizer = net.init(0, (3,), like=x), ng.optimizers.sgd(learning_rate=0.1)
    history = simulate_training(
        net, params, (x, y), optimizer=optimizer, steps=4, batch_size=5, rng=0, max_bytes=20_000
    )
    assert history.batch_shape == (2, 3)
    assert dict(history.to_xarray()["weights_1"].sizes) == {"batch_0": 2, "batch_1": 3, "width_1": 2, "input_1": 10}
    alone = simulate_training(
        net, tuple(w[2] for w in params), (x[2], y[1, 0]), optimizer=optimizer, steps=4, batch_size=5, rng=0
    )
    np.testing.assert_allclose(history.loss[:, 1, 2], alone.loss, rtol=1e-10)


# --------------------------------------------------------------------------- at rest


@pytest.mark.parametrize(
    ("library", "name"),
    [(NUMPY, "sgd"), (NUMPY, "foof"), (NUMPY, "natural_gradient"), (JAX, "natural_gradient")],
    ids=str,
)
def test_members_that_diverge_hurt_only_themselves(library: Backend, name: str) -> None:
    rates = np.asarray([0.05, 1e150, 0.1])
    start = tuple(w.copy() for w in PARAMS)
    start[1][1, 2, 0, 0] = np.inf
    net = ng.networks.MLP((3, 4, 2), activation="identity")
    options = OPTIONS | {"steps": 20, "record": ("loss", "training_loss")}
    made = {"sgd": ng.optimizers.sgd, "foof": ng.optimizers.foof, "natural_gradient": ng.optimizers.natural_gradient}
    optimizer = made[name](learning_rate=library.asarray(rates))
    history = simulate_training(net, library.asarrays(*start), library.asarrays(X, Y), optimizer=optimizer, **options)
    at, loss = history.diverged_at, library.to_numpy(history.loss)
    at = library.to_numpy(at)
    assert np.all(at[:, 1] > 0)
    assert at[1, 2] == 0
    assert np.all(at[[0, 0, 1], [0, 2, 0]] == -1)
    for i, j in np.ndindex(2, 3):
        assert np.all(np.isfinite(loss[: at[i, j], i, j])) if at[i, j] >= 0 else np.all(np.isfinite(loss[:, i, j]))
        assert at[i, j] < 0 or np.all(np.isnan(loss[at[i, j] :, i, j]))
    assert all(np.all(np.isfinite(library.to_numpy(w)[:, :2])) for w in history.weights)
    if library is NUMPY and name != "natural_gradient":
        alone = made[name](learning_rate=0.1)
        wanted = simulate_training(net, tuple(w[0, 2] for w in PARAMS), (X, Y), optimizer=alone, **options)
        np.testing.assert_allclose(loss[:, 0, 2], wanted.loss, rtol=1e-9)


def test_converged_members_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = ng.optimizers.sgd(learning_rate=np.asarray([0.1, 0.5, 0.0]))
    options = {"optimizer": optimizer, "steps": 60}
    free = simulate_training(NET, PARAMS, (X, Y), **options)
    limit = float(np.median(free.loss[-1, :, :2]))
    asked, real = [], _arrays.eager_any
    monkeypatch.setattr(_arrays, "eager_any", lambda xp, flags: asked.append(1) or real(xp, flags))
    history = simulate_training(NET, PARAMS, (X, Y), freeze_converged=limit, **options)
    # One scalar at each record, for those that have diverged.
    assert len(asked) == 61
    assert history.converged.any()
    assert not history.converged.all()
    for i, j in np.ndindex(2, 3):
        at = int(history.converged_at[i, j])
        below = np.flatnonzero(free.loss[:, i, j] <= limit)
        assert at == (below[0] if below.size else -1)
        stop = at if at >= 0 else 60
        np.testing.assert_array_equal(history.loss[: stop + 1, i, j], free.loss[: stop + 1, i, j])
        np.testing.assert_array_equal(history.loss[stop:, i, j], free.loss[stop, i, j])


# ------------------------------------------------------------------- stores and checkpoints


@pytest.mark.parametrize("library", [NUMPY, JAX], ids=str)
def test_stopped_and_continued_to_the_same_bits(library: Backend, tmp_path: Path) -> None:
    """With averages, inverses that are kept, damping, and a place in the samples."""
    params, samples = library.asarrays(*PARAMS), library.asarrays(X, Y)
    optimizer = ng.optimizers.kfac(damping=library.asarray(np.asarray([[0.1], [1.0]])))
    options = OPTIONS | {
        "optimizer": optimizer,
        "max_bytes": SMALL,
        "axes": {"damping_0": (0.1, 1.0), "seed": range(3)},
    }
    options["record"] = ("loss", "training_loss")
    wanted = simulate_training(NET, params, samples, **options)
    real, calls = run.advance, []

    def counting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 7):
            raise KeyboardInterrupt
        return real(*args)

    paths = {"checkpoint": tmp_path / "c", "store": tmp_path / "s.zarr"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "advance", counting)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                simulate_training(NET, params, samples, checkpoint_interval=1e9, **options, **paths)
        found = simulate_training(NET, params, samples, **options, **paths)
    for name in wanted.records:
        np.testing.assert_array_equal(found.records[name][...], library.to_numpy(wanted.records[name]))
    for a, b in zip(found.weights, wanted.weights, strict=True):
        np.testing.assert_array_equal(a[...], library.to_numpy(b))
    dataset, own = found.to_xarray(), wanted.to_xarray()
    assert set(dataset.variables) == set(own.variables)
    for name in own.variables:
        assert dataset[name].dims == own[name].dims
    assert "ModelSampled" in dataset.attrs["optimizer"]
    options["optimizer"] = ng.optimizers.foof()
    with pytest.raises(ng.simulation.CheckpointError, match=r"another run .*optimizer differs"):
        simulate_training(NET, params, samples, checkpoint=tmp_path / "c", **options)


# ------------------------------------------------------------------------------ bad input


def with_bad(array: np.ndarray, *rows: int, value: float = np.nan) -> np.ndarray:
    """The array with something in the last column of some rows."""
    found = array.copy()
    found[list(rows), -1] = value
    return found


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "optimizer": ({"optimizer": "kfac"}, TypeError, "optimizer must be an Optimizer, got str"),
    "samples": ({"samples": X}, TypeError, r"samples must be a pair of arrays \(x, y\), or a function of the step"),
    "counts": ({"samples": (X, Y[:5])}, ValueError, r"y must have shape \(\*batch, 24, 2\) .*, got \(5, 2\)"),
    "inputs": ({"samples": (X[:, :2], Y)}, ValueError, r"x must have shape \(\*batch, N, 3\) .*, got \(24, 2\)"),
    "one input": ({"samples": (X[0], Y)}, ValueError, r"x must have shape \(\*batch, N, 3\) .*, got \(3,\)"),
    "targets": ({"samples": (X, Y[:, 0])}, ValueError, r"y must have shape \(\*batch, 24, 2\) .*, got \(24,\)"),
    "NaN in x": ({"samples": (with_bad(X, 7, 9), Y)}, ValueError, r"x must be finite, got .* 2 of 24 .* x\[7\]"),
    "Inf in y": ({"samples": (X, with_bad(Y, 3, value=np.inf))}, ValueError, r"y must be finite, got .* y\[3\]"),
    "NaN for all": ({"samples": (with_bad(X, 5)[None, None], Y)}, ValueError, r"x must be finite, got .* x\[5\]"),
    "NaN in held_out": ({"held_out": (X, with_bad(Y, 23))}, ValueError, r"held_out\[1\] must .* held_out\[1\]\[23\]"),
    "held_out": ({"held_out": X}, TypeError, r"held_out must be a pair of arrays \(x, y\)"),
    "held_out counts": ({"held_out": (X, Y[:5])}, ValueError, r"held_out\[1\] must .* match held_out\[0\] .*\(5, 2\)"),
    "batch_size": ({"batch_size": 25}, ValueError, "batch_size must be an integer from 1 to 24, the number of samples"),
    "batch of stream": (
        {"samples": lambda k: (X, Y), "record": "loss"},
        ValueError,
        "batch_size must not be given where samples are a",
    ),
    "seed": ({"rng": None}, ValueError, "rng must be given with batch_size"),
    "seed of draws": ({"rng": None, "batch_size": None}, ValueError, "rng must be given with this optimizer"),
    "record": ({"record": "excess_loss"}, ValueError, "record names 'excess_loss', which is none of 'loss', 'training"),
    "no held_out": ({"record": "held_out_loss"}, ValueError, "must not name 'held_out_loss' without held_out"),
    "record shape": (
        {"record": {"mine": lambda params, state: state.count}},
        ValueError,
        "record 'mine' must return an array with one row for each member",
    ),
    "damping": (
        {"optimizer": ng.optimizers.kfac(damping=np.ones(5))},
        ValueError,
        r"batch shapes must broadcast, got .*damping: \(5,\)",
    ),
    "params": ({"params": PARAMS[:1]}, ValueError, "params must have one array for each of 2 layers, got 1"),
    "members": ({"members": 3}, ValueError, "members is the batch shape where params is a callable"),
    "steps": ({"steps": 0}, ValueError, "steps must be an integer from 1"),
    "no training_loss": (
        {"samples": lambda k: (X, Y), "batch_size": None, "record": "training_loss"},
        ValueError,
        "must not name 'training_loss' without samples as arrays",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, words = MISTAKES[name]
    monkeypatch.setattr(run, "advance", None)
    options = OPTIONS | {"optimizer": KFAC, "params": PARAMS, "samples": (X, Y)} | changes
    params, samples = options.pop("params"), options.pop("samples")
    with pytest.raises(error, match=words):
        simulate_training(NET, params, samples, **options)
    with pytest.raises(TypeError, match="net must be a Network"):
        simulate_training(None, params, samples, **options)


def test_classes_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "advance", None)
    net = ng.networks.MLP((3, 4, 2), likelihood="categorical")
    with pytest.raises(ValueError, match=r"y must hold class numbers of shape \(\*batch, 24\) .*, got \(24, 2\)"):
        simulate_training(net, PARAMS, (X, np.eye(2)[np.arange(24) % 2]), **OPTIONS, optimizer=KFAC)
    classes = np.arange(24) % 2
    with pytest.raises(
        ValueError, match=r"held_out\[1\] must hold classes from 0 to 1 .*, got 2 at held_out\[1\]\[5\]"
    ):
        simulate_training(net, PARAMS, (X, classes), held_out=(X, np.arange(24) ** 2 // 9), **OPTIONS, optimizer=KFAC)


@pytest.mark.parametrize("library", [NUMPY, JAX], ids=str)
def test_a_bad_sample_of_a_member_stops_it_alone(library: Backend) -> None:
    """Finite numbers whose sum is not are no mistake."""
    x = np.stack([X] * 3)
    x[1] = with_bad(X, 7)
    optimizer = ng.optimizers.sgd(learning_rate=0.1)
    options = {"optimizer": optimizer, "steps": 2}
    params, (own, shared, y) = library.asarrays(*PARAMS), library.asarrays(x, X, Y)
    found = simulate_training(NET, params, (own, y), **options)
    wanted = simulate_training(NET, params, (shared, y), **options)
    stopped = np.asarray([False, True, False])
    diverged = library.to_numpy(found.diverged_at)
    np.testing.assert_array_equal(diverged, np.where(stopped, 0, -1) + np.zeros((2, 1), int))
    for a, b in zip(found.weights, wanted.weights, strict=True):
        a, b = (library.to_numpy(w)[:, ~stopped] for w in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-12)
    large = library.asarray(np.where(np.arange(24)[:, None] < 2, 1e308, Y))
    assert np.all(library.to_numpy(simulate_training(NET, params, (shared, large), **options).diverged))


def test_a_constructor_and_noise_of_members() -> None:
    def params(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(w.reshape(6, *w.shape[2:])[start:stop] for w in PARAMS)

    options = OPTIONS | {"optimizer": KFAC}
    found = simulate_training(NET, params, (X, Y), members=(2, 3), max_bytes=SMALL, **options)
    assert_same(found, simulate_training(NET, PARAMS, (X, Y), max_bytes=SMALL, **options), bitwise=True)
    noisy = ng.networks.MLP((3, 4, 2), likelihood=ng.networks.Gaussian(np.eye(2) * np.ones((3, 1, 1))))
    with pytest.raises(ValueError, match="net must have no batch axes in noise_covariance"):
        simulate_training(noisy, PARAMS, (X, Y), **options)
    assert len(list(itertools.islice(found.records, 5))) == 3
