"""`natgrad-array simulate`, called as its console script calls it."""

from __future__ import annotations

import csv
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray

import natgrad_array as ng
from natgrad_array.cli import main, simulate, sweep
from natgrad_array.simulation import run

FILE = """\
# Modes of balanced networks that are aligned with those of the teacher.
steps = 40
record = ["modes", "loss"]
integrator = "rk4"
init = "aligned"

[task]
singular_values = [3.0, 1.0]
inputs = 3

[grid]
rule = ["gradient", "layerwise"]
depth = [1, 3]
width = [2, 4]
learning_rate = [0.01, 0.02]
initial_scale = [0.2, 0.5, 1.0]
seeds = 2
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(FILE)


def opened(folder: str) -> dict[str, Any]:
    tree = xarray.open_datatree(f"{folder}/sweep.zarr", engine="zarr", consolidated=False, chunks=None)
    found = {name: node.to_dataset().load() for name, node in tree.children.items()}
    tree.close()
    return found


def test_a_sweep_follows_the_closed_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "sweep.toml", "--out", "o"]) == 0
    found = opened("o")
    # A network of one layer has no width.
    assert sorted(found) == sorted(
        f"rule={rule},depth={depth},width={width}"
        for rule in ("gradient", "layerwise")
        for depth, width in ((1, 2), (3, 2), (3, 4))
    )
    target = np.asarray([3.0, 1.0])
    for rule, flow in (
        ("gradient", ng.deep_linear.gradient_flow_modes),
        ("layerwise", ng.deep_linear.natural_gradient_flow_modes),
    ):
        for depth, width in ((1, 2), (3, 4)):
            data = found[f"rule={rule},depth={depth},width={width}"]
            assert dict(data["modes"].sizes) == {
                "step": data.sizes["step"],
                "learning_rate": 2,
                "initial_scale": 3,
                "seed": 2,
                "mode": 2,
            }
            time = (data["step"] * data["learning_rate"]).values[:, :, None, None, None]
            start = data["initial_scale"].values[None, None, :, None, None] + np.zeros(2)
            options = {"depth": depth} if rule == "gradient" else {}
            wanted = flow(start + 0.0 * time, target + 0.0 * time, time + 0.0 * start, **options)
            modes = data["modes"].values
            np.testing.assert_allclose(modes, np.broadcast_to(wanted, modes.shape), atol=1e-5)
            assert data.attrs["complete"]
    with open("o/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 3
    for row in rows:
        data = found[f"rule={row['rule']},depth={row['depth']},width={row['width']}"]
        chosen = data["excess_loss"].isel(step=-1)
        chosen = chosen.sel(learning_rate=float(row["learning_rate"]), initial_scale=float(row["initial_scale"]))
        assert float(row["excess_loss_median"]) == pytest.approx(float(np.median(chosen)), rel=1e-6)
        assert row["diverged"] == "0"
    assert Path("o/sweep.png").stat().st_size > 10_000
    assert Path("o/sweep.toml").read_text() == FILE
    assert "72 networks in 6 groups, 2 of each kind, 40 steps" in capsys.readouterr().out


def test_the_example_of_the_documentation_has_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs/simulation.md").read_text(encoding="utf-8")
    text = page.partition("```toml\n")[2].partition("```")[0]
    sweep.read(write("plain.toml", text))
    text = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    sweep.read(write("full.toml", text))
    given = tomllib.loads(text)
    keys = {f"{name}.{key}" for name in ("task", "grid") for key in given[name]} | set(given) - {"task", "grid"}
    assert keys == set(sweep.KEYS)
    for options in (sweep.INITS, sweep.INTEGRATORS, sweep.RULES, sweep.OBSERVABLES):
        assert all(f'"{option}"' in text for option in options)


def write(name: str, text: str) -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def test_blow_ups_and_narrow_networks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Members that rose, those that diverged, the least loss of a rank and the way there, against the store."""
    Path("sweep.toml").write_text(
        """
steps = 60
init = "gaussian"
[task]
singular_values = [1.0, 3.0, 2.0]
[grid]
rule = ["gradient", "exact"]
depth = 2
width = [1, 3]
learning_rate = [0.1, 0.5, 1.5]
initial_scale = 0.5
seeds = 8
"""
    )
    assert main(["simulate", "sweep.toml", "--out", "o"]) == 0
    said, found = capsys.readouterr().out, opened("o")
    with open("o/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        data = found[f"rule={row['rule']},depth=2,width={row['width']}"].isel(initial_scale=0)
        loss = data["excess_loss"].sel(learning_rate=float(row["learning_rate"])).values
        assert int(row["rose"]) == sum(end > start for start, end in zip(loss[0], loss[-1], strict=True))
        assert int(row["diverged"]) == np.isnan(loss[-1]).sum()
        small = [min([*data["step"].values[one < 1e-6], np.inf]) for one in loss.T]
        assert float(row["steps_to_1e_6"]) == np.median(small)
        # Matrices of rank 1 leave out the modes 2 and 1, whatever their order.
        assert float(row["floor"]) == (2.5 if row["width"] == "1" else 0.0)
        if (row["rule"], row["width"], row["learning_rate"]) == ("exact", "1", "0.5"):
            assert np.median(loss[-1]) == pytest.approx(float(row["floor"]), rel=1e-6)
    for name in ("rose", "diverged"):
        assert max(int(row[name]) for row in rows) > 0
    assert "width 1 have no more than rank 1; the best of that rank is 2.5 above the optimum" in said
    # A member that diverged is above all others, so that medians leave the figure through its top.
    values = np.asarray([[1.0, 1.0, 2.0], [0.5, np.nan, np.nan], [1e-7, np.nan, np.nan]])
    history = SimpleNamespace(records={"excess_loss": values[:, None, None, :]}, steps=np.arange(3))
    seen = simulate.course(history)
    assert seen.curves[0, 0, 0, 0] == 1.0
    assert (seen.curves[0, 1:, 0, 0] == simulate.FAR).all()
    assert seen.reached.tolist() == [[[2.0, np.inf, np.inf]]]


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "sweep.toml", "--out", "whole"]) == 0
    real, calls = run.advance, []

    def counting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "advance", counting)
    assert main(["simulate", "sweep.toml", "--out", "o"]) == 130
    told = capsys.readouterr().err.strip()
    assert "interrupted; a checkpoint is kept. To go on: " in told
    assert main(["simulate", "sweep.toml", "--out", "o"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["simulate", "sweep.toml", "--out", "elsewhere", "--resume"]) == 2
    assert "there is no checkpoint in elsewhere" in capsys.readouterr().err
    stopped = len(calls)
    assert main(shlex.split(told.partition("To go on: ")[2])[1:]) == 0
    assert len(calls) > stopped
    wanted, found = opened("whole"), opened("o")
    for name, data in wanted.items():
        for variable in data.data_vars:
            np.testing.assert_array_equal(found[name][variable].values, data[variable].values)
    Path("sweep.toml").write_text(FILE.replace("steps = 40", "steps = 41"))
    assert main(["simulate", "sweep.toml", "--out", "o", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "the checkpoint of another run (recorded steps differ; steps: 40 there, 41 here)" in told
    assert told.endswith("--out takes another folder\n")


def test_another_library() -> None:
    """The same start from the same seeds."""
    pytest.importorskip("torch")
    Path("sweep.toml").write_text(FILE.replace("depth = [1, 3]", "depth = 2").replace("width = [2, 4]", "width = 3"))
    Path("sweep.toml").write_text(Path("sweep.toml").read_text().replace('"gradient", ', ""))
    for name in ("numpy", "torch"):
        assert main(["simulate", "sweep.toml", "--backend", name, "--out", name]) == 0
    wanted, found = opened("numpy"), opened("torch")
    for name, data in wanted.items():
        np.testing.assert_allclose(found[name]["loss"].values, data["loss"].values, rtol=1e-9)
        assert found[name].attrs["library"] == "torch"


MISTAKES = {
    "typo": ("seeds = 2", "sseeds = 2", "line 17: grid.sseeds is not known: did you mean grid.seeds?"),
    "unknown table": ("[task]", "[tusk]\na = 1\n[task]", "line 7: tusk is not known: there are steps, record"),
    "negative step": ("steps = 40", "steps = -40", "line 2: steps must be an integer from 1 to 2147483647, got -40"),
    "float steps": ("steps = 40", "steps = 4.5", "line 2: steps must be an integer"),
    "bool": ("seeds = 2", "seeds = true", "line 17: grid.seeds must be a positive integer, got True"),
    "negative rate": (
        "[0.01, 0.02]",
        "[0.01, -0.02]",
        "line 15: grid.learning_rate must be a number of at least 0, or a list of such, got [0.01, -0.02]",
    ),
    "infinite rate": ("[0.01, 0.02]", "inf", "line 15: grid.learning_rate must be a number"),
    "text": ("[0.01, 0.02]", '"fast"', "line 15: grid.learning_rate must be a number of at least 0"),
    "empty": ("[0.01, 0.02]", "[]", "line 15: grid.learning_rate must be a number of at least 0"),
    "twice": ("[0.01, 0.02]", "[0.01, 0.01]", "line 15: grid.learning_rate must have everything once"),
    "missing": ("learning_rate = [0.01, 0.02]\n", "", "line 11: grid.learning_rate is missing"),
    "missing steps": ("steps = 40\n", "", "sweep.toml: steps is missing"),
    "rule": ('"layerwise"]', '"newton"]', "line 12: grid.rule must be one of layerwise, exact, moore_penrose"),
    "modes": ("inputs = 3", "inputs = 1", "line 9: task.inputs must be an integer of at least 2, the number of modes"),
    "width": ("width = [2, 4]", "width = 1", "line 14: grid.width must be at least 2, the number of modes"),
    "misspelt": (
        "learning_rate",
        "learningrate",
        "line 15: grid.learningrate is not known: did you mean grid.learning_rate",
    ),
    "value for a table": ("[task]", "[task]\nsingular_values = 3\n[other]", "line 9: other is not known"),
    "no table": ("[grid]", "[other]", "line 11: other is not known"),
    "table": ("steps = 40", "steps = 40\ngrid = 3", "is not a TOML file"),
    "syntax": ("steps = 40", "steps = ", "is not a TOML file: Invalid value (at line 2"),
    "members": ("seeds = 2", "seeds = 1_000_000_000_000", "line 17: grid.seeds is too much: 48000000000000 networks"),
    "wide": ("width = [2, 4]", "width = 1_000_000", "line 14: grid.width is too much"),
    "deep": ("depth = [1, 3]", "depth = 2_000_000_000_000", "line 13: grid.depth is too much"),
    "records": (
        "steps = 40",
        "record_every = 1\nsteps = 2_000_000_000",
        "line 3: steps is too much",
    ),
    "flow": (
        'integrator = "rk4"',
        'integrator = "exponential"',
        "this sweep cannot be run: groups[('gradient', 1, 2)]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_with_their_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, words = MISTAKES[name]
    assert before in FILE
    Path("sweep.toml").write_text(FILE.replace(before, after))
    monkeypatch.setattr(run, "advance", None)
    assert main(["simulate", "sweep.toml", "--out", "o"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("o/sweep.zarr").exists()


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "nowhere.toml"]) == 2
    assert "nowhere.toml cannot be read: No such file" in capsys.readouterr().err
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    assert main(["simulate", "binary.toml"]) == 2
    assert "binary.toml is not a text file" in capsys.readouterr().err
    Path("folder").write_text("a file")
    assert main(["simulate", "sweep.toml", "--out", "folder"]) == 2
    assert "--out folder cannot be written" in capsys.readouterr().err
