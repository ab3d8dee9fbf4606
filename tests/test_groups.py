"""Ensembles of different shapes as one result: the numbers of each run alone, in the places of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from test_simulation import random_network, random_task

import natgrad_array as ng
from natgrad_array.simulation import run, simulate_groups

TASK = random_task(3, 3)
OPTIONS: dict[str, Any] = {"learning_rate": np.asarray([0.05, 0.1, 1e9]), "steps": 12, "record": ("loss", "modes")}
SHAPES = {(2, 4): (3, 4, 3), (2, 5): (3, 5, 3), (3, 4): (3, 4, 4, 3), (3, 5): (3, 5, 5, 3)}
WEIGHTS = {key: random_network(sizes, (3,), seed=k) for k, (key, sizes) in enumerate(SHAPES.items())}


def test_groups_are_their_runs(tmp_path: Path) -> None:
    store = tmp_path / "sweep.zarr"
    found = simulate_groups(WEIGHTS, TASK, names=("depth", "width"), store=store, axes=("rate",), **OPTIONS)
    dataset = found.to_xarray()
    assert dict(dataset["modes"].sizes) == {"depth": 2, "width": 2, "step": 13, "rate": 3, "mode": 3}
    assert not [name for name in dataset.variables if name.startswith("weights")]
    tree = xarray.open_datatree(store, engine="zarr", consolidated=False, chunks=None)
    assert len(found) == 4
    diverged = 0
    for (depth, width), weights in WEIGHTS.items():
        alone = ng.simulate(weights, TASK, **OPTIONS)
        diverged += int(np.count_nonzero(alone.diverged))
        chosen = dataset.sel(depth=depth, width=width)
        for name in ("loss", "modes"):
            np.testing.assert_array_equal(chosen[name].values, getattr(alone, name))
        np.testing.assert_array_equal(chosen["diverged_at"].values, alone.diverged_at)
        node = tree[f"depth={depth},width={width}"]
        np.testing.assert_array_equal(node["weights_2"].values, alone.weights[1])
        np.testing.assert_array_equal(found[depth, width].weights[0][...], alone.weights[0])
    assert repr(found) == f"Groups(4 by depth, width; 12 members, {diverged} diverged)"
    assert diverged
    tree.close()
    with pytest.raises(FileExistsError, match="another run's, or no store"):
        simulate_groups(WEIGHTS, TASK, names=("deep", "wide"), store=store, **OPTIONS)


def test_keys_that_are_no_grid_and_rules_of_their_own() -> None:
    groups = {(2, "gradient"): {"weights": WEIGHTS[2, 4], "rule": "gradient"}, (3, "exact"): {"weights": WEIGHTS[3, 5]}}
    dataset = simulate_groups(groups, TASK, names=("depth", "rule"), **(OPTIONS | {"rule": "exact"})).to_xarray()
    assert dataset["loss"].dims == ("group", "step", "member")
    assert dataset["rule"].values.tolist() == ["gradient", "exact"]
    assert "rule" not in dataset.attrs
    for k, (weights, rule) in enumerate(((WEIGHTS[2, 4], "gradient"), (WEIGHTS[3, 5], "exact"))):
        alone = ng.simulate(weights, TASK, rule=rule, **OPTIONS)
        np.testing.assert_array_equal(dataset["loss"].values[k], alone.loss)


def test_groups_of_trained_networks(tmp_path: Path) -> None:
    """Networks of two widths under two optimizers, each as alone; deep linear ones beside them have no optimizer."""
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((30, 2)), rng.standard_normal((30, 1))
    nets = {width: ng.networks.MLP((2, width, 1)) for width in (3, 5)}
    rules = {"natural_gradient": ng.optimizers.natural_gradient(), "sgd": ng.optimizers.sgd(learning_rate=0.1)}
    options: dict[str, Any] = {"steps": 6, "batch_size": 10, "rng": 1, "record": ("loss", "training_loss")}
    groups = {
        (width, rule): {"net": net, "params": net.init(width, (4,), like=samples[0]), "optimizer": optimizer}
        for width, net in nets.items()
        for rule, optimizer in rules.items()
    }
    found = simulate_groups(groups, samples, names=("width", "rule"), store=tmp_path / "s.zarr", **options)
    dataset = found.to_xarray()
    assert dict(dataset["training_loss"].sizes) == {"width": 2, "rule": 2, "step": 7, "member": 4}
    for (width, rule), group in groups.items():
        alone = ng.simulation.simulate_training(
            group["net"], group["params"], samples, optimizer=group["optimizer"], **options
        )
        np.testing.assert_array_equal(dataset["loss"].sel(width=width, rule=rule).values, alone.loss)
        for a, b in zip(found[width, rule].weights, alone.weights, strict=True):
            np.testing.assert_array_equal(a[...], b)
    with pytest.raises(ValueError, match=r"groups\[1\] must have params, got 'net'"):
        simulate_groups({1: {"net": nets[3]}}, samples, steps=1)
    with pytest.raises(ValueError, match=r"groups\[1\]: batch_size must be"):
        simulate_groups({1: {**groups[3, "sgd"], "batch_size": 31}}, samples, steps=1)


def test_groups_that_have_ended_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = simulate_groups(WEIGHTS, TASK, names=("depth", "width"), **OPTIONS)
    real, begun = run.advance, []

    def counting(system: Any, data: Any, state: Any, *rest: Any) -> Any:
        begun.append(len(state.weights))
        if begun == [2, 2, 3]:
            raise KeyboardInterrupt
        return real(system, data, state, *rest)

    monkeypatch.setattr(run, "advance", counting)
    options = OPTIONS | {"names": ("depth", "width"), "checkpoint": tmp_path / "c", "record_every": 12}
    with pytest.raises(KeyboardInterrupt):
        simulate_groups(WEIGHTS, TASK, **options)
    found = simulate_groups(WEIGHTS, TASK, **options)
    assert begun == [2, 2, 3, 3, 3]
    for key, history in found.items():
        np.testing.assert_array_equal(history.loss, wanted[key].loss[[0, -1]])


@pytest.mark.parametrize(
    ("groups", "options", "error", "words"),
    [
        ({}, {}, TypeError, "groups must be a mapping with at least one ensemble"),
        ({1: {"rule": "exact"}}, {}, ValueError, r"groups\[1\] must have weights, got 'rule'"),
        ({1: WEIGHTS[2, 4], 2: {"weights": WEIGHTS[2, 4], "rule": "x"}}, {}, ValueError, r"groups\[2\]: rule must be"),
        ({1: WEIGHTS[2, 4]}, {"rool": 3}, TypeError, "unexpected keyword argument 'rool'"),
        ({(1, 2): WEIGHTS[2, 4]}, {}, ValueError, "names must have an identifier for each part of a key"),
        ({"../up": WEIGHTS[2, 4]}, {}, ValueError, "keys of groups must be made of letters"),
        ({None: WEIGHTS[2, 4]}, {}, TypeError, "keys of groups must be strings or numbers"),
    ],
)
def test_mistakes_are_named_before_any_group_runs(
    groups: Any, options: Any, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "advance", None)
    with pytest.raises(error, match=words):
        simulate_groups(groups, TASK, **(OPTIONS | options))
