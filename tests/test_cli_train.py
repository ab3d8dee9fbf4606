"""`natgrad-array train`, called as its console script calls it."""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import natgrad_array as ng
from natgrad_array.cli import main, train
from natgrad_array.cli.errors import CommandError
from natgrad_array.cli.idx import read_idx
from natgrad_array.optimizers.presets import PRESETS

FAST = ["--steps", "4", "--members", "2", "--every", "2", "--hidden", "6"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Sixty images of 4 × 4 pixels, gzipped, and three classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    images = np.clip(rng.integers(0, 200, (60, 4, 4)) + 20 * labels[:, None, None], 0, 255)
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "labels").write_bytes(idx(labels))
    return tmp_path / "images.gz", tmp_path / "labels"


def arrays(folder: str = "natgrad-train") -> dict[str, Any]:
    with np.load(f"{folder}/train.npz", allow_pickle=False) as archive:
        return dict(archive)


def test_idx_files_come_back(files: tuple[Path, Path]) -> None:
    images = read_idx(files[0], "--data", ndim=3)
    assert images.shape == (60, 4, 4)
    assert idx(images) == gzip.decompress(files[0].read_bytes())
    assert read_idx(files[1], "--labels", ndim=1).tolist() == list(files[1].read_bytes()[8:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not an IDX file of unsigned bytes"),
        (b"PK\3\4 an archive of some kind", "is not an IDX file of unsigned bytes"),
        (struct.pack(">HBB3I", 0, 0x0D, 3, 1, 2, 2) + bytes(16), "is not an IDX file of unsigned bytes"),
        (struct.pack(">HBBI", 0, 8, 1, 5) + bytes(5), "must have 3 axes, got 1"),
        (struct.pack(">HBB2I", 0, 8, 3, 5, 2), "breaks off within its header"),
        (struct.pack(">HBB3I", 0, 8, 3, 5, 2, 2) + bytes(19), "must hold 5 x 2 x 2 bytes after its header, got 19"),
        (struct.pack(">HBB3I", 0, 8, 3, 5, 2, 2) + bytes(21), "must hold 5 x 2 x 2 bytes after its header, got 21"),
        (struct.pack(">HBB3I", 0, 8, 3, 0, 2, 2), "is empty: 0 x 2 x 2"),
        (gzip.compress(bytes(100))[:-20], "cannot be read"),
    ],
)
def test_files_that_are_not_idx(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CommandError, match=words):
        read_idx(path, "--data", ndim=3)


def test_train_leaves_parameters_history_and_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps", "30", "--members", "3", "--hidden", "16", "--every", "10"]) == 0
    found = arrays()
    assert found["step"].tolist() == [0, 10, 20, 30]
    assert found["train_loss"].shape == found["test_loss"].shape == found["damping"].shape == (4, 3)
    assert np.all(found["test_loss"][-1] < 0.6 * found["test_loss"][0])
    assert found["finished"]
    # The parameters are those of the last record.
    net = ng.networks.MLP((64, 16, 64), activation="tanh")
    params = tuple(found[f"params_{i}"] for i in range(2))
    held_back = train.split(train.load(None, None), "autoencoder", "float32").test_x
    np.testing.assert_allclose(net.loss(params, held_back, held_back), found["test_loss"][-1], rtol=1e-5)
    with Path("natgrad-train/history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[-1]["test_loss"]) == pytest.approx(found["test_loss"][-1, -1], rel=1e-6)
    assert Path("natgrad-train/train.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "3 networks 64-16-64 learn scikit-learn's digits by natural_gradient" in said
    assert "1618 images, 179 held back" in said


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str) -> None:
    assert main(["train", "--preset", preset, *FAST]) == 0
    assert np.isfinite(arrays()["test_loss"]).all()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_libraries_agree(backend: str) -> None:
    pytest.importorskip(backend)
    options = [*FAST, "--dtype", "float64", "--preset", "kfac"]
    assert main(["train", *options]) == 0
    assert main(["train", *options, "--backend", backend, "--out", backend]) == 0
    np.testing.assert_allclose(arrays(backend)["test_loss"], arrays()["test_loss"], rtol=1e-8)


def test_classes_from_files(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(files[0]), "--labels", str(files[1]), "--task", "classify", "--preset", "adam"]
    assert main(["train", *options, *FAST, "--learning-rate", "0.05"]) == 0
    found = arrays()
    assert found["params_1"].shape == (2, 3, 7)
    assert str(found["sizes"]) == "16-6-3"
    assert np.all(found["train_loss"][-1] < found["train_loss"][0])
    # Hidden units and classes by hand, from what was written.
    held_back = train.split(train.load(*files), "classify", "float32")
    w, v = found["params_0"], found["params_1"]
    hidden = np.tanh(held_back.test_x @ w[:, :, :-1].mT + w[:, None, :, -1])
    scores = hidden @ v[:, :, :-1].mT + v[:, None, :, -1]
    right = 100 * np.mean(scores.argmax(axis=-1) == held_back.test_y, axis=-1)
    said = f"classified right: {np.median(right):.1f} % in the median, {right.min():.1f}–{right.max():.1f}."
    assert said in capsys.readouterr().out


def test_the_seed_says_it_all() -> None:
    runs = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["train", *FAST, "--seed", seed, "--out", folder]) == 0
        runs.append(arrays(folder)["test_loss"])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_interruption_keeps_what_was_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = ng.optimizers.Optimizer.step, []

    def until_interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(ng.optimizers.Optimizer, "step", until_interrupted)
    assert main(["train", "--steps", "50", "--members", "2", "--every", "2", "--hidden", "6"]) == 130
    found = arrays()
    assert found["step"].tolist() == [0, 2, 4]
    assert not found["finished"]
    assert found["params_step"] == 5
    assert found["params_0"].shape == (2, 6, 65)
    assert "interrupted; what was computed is written" in capsys.readouterr().err


@pytest.mark.parametrize("call", [3, 4])
def test_interruption_while_the_held_back_loss_is_computed(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is whole or missing, and the parameters say which step they are of."""
    loss, calls = ng.networks.Network.loss, []

    def until_interrupted(self: Any, params: Any, x: Any, y: Any) -> Any:
        if len(x) == 179:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
        return loss(self, params, x, y)

    monkeypatch.setattr(ng.networks.Network, "loss", until_interrupted)
    assert main(["train", "--steps", "50", "--members", "2", "--every", "2", "--hidden", "6"]) == 130
    found = arrays()
    kept = call - 1
    assert found["step"].tolist() == [0, 2, 4][:kept]
    for name in ("train_loss", "test_loss", "damping"):
        assert found[name].shape == (kept, 2)
    assert found["params_step"] == 2 * kept
    with Path("natgrad-train/history.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2 * kept
    assert Path("natgrad-train/train.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "newton"], "--preset must be one of natural_gradient, kfac"),
        (["--task", "sing"], "--task must be one of autoencoder, classify, got sing"),
        (["--activation", "step"], "--activation must be one of identity, tanh"),
        (["--hidden", "3,x"], "--hidden must be one or more positive integers"),
        (["--hidden", ""], "--hidden must be one or more positive integers"),
        (["--labels", "some"], "--labels needs --data"),
        (["--data", "nowhere"], "--data nowhere cannot be read: No such file or directory"),
        (["--preset", "kfac", "--learning-rate", "0.1"], "--learning-rate is none of the options of the preset kfac"),
        (["--damping", "-1"], "--damping must be at least 0 and finite, got -1"),
        (["--preset", "sgd", "--learning-rate", "nan"], "--learning-rate must be at least 0 and finite, got nan"),
        (["--preset", "sgd", "--learning-rate", "inf"], "--learning-rate must be at least 0 and finite, got inf"),
        (["--damping", "inf"], "--damping must be at least 0 and finite, got inf"),
        (["--hidden", "99999999999999999999"], "--hidden and --members ask for more parameters than can be addressed"),
        (["--hidden", "9999999999,9999999999"], "--hidden and --members ask for more parameters than can be addressed"),
        (["--members", "99999999999999999999"], "--hidden and --members ask for more parameters than can be addressed"),
        (["--hidden", "9" * 400], "--hidden and --members ask for more parameters than can be addressed: 1e402"),
        (["--steps", "0"], "steps"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("natgrad-train").exists()


def test_bad_pairs_of_files(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few").write_bytes(idx(np.zeros(3)))
    (tmp_path / "same").write_bytes(idx(np.full((20, 2, 2), 7)))
    (tmp_path / "short").write_bytes(idx(np.zeros((4, 2, 2))))
    for options, words in (
        (["--data", str(files[0]), "--labels", "few"], "--labels must hold one label for each of 60 images, got 3"),
        (["--data", str(files[0]), "--task", "classify"], "--task classify needs --labels"),
        (["--data", "same"], "all images are the same"),
        (["--data", "short"], "--data must hold at least 10 images, got 4"),
    ):
        assert main(["train", *options]) == 2
        assert words in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert main(["train", *FAST, "--out", "file"]) == 2
    assert "--out file cannot be written" in capsys.readouterr().err


def test_a_run_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *FAST]) == 0
    before = Path("natgrad-train/train.npz").read_bytes()
    assert main(["train", *FAST, "--seed", "1"]) == 2
    assert "natgrad-train holds a run, train.npz: --out takes another folder" in capsys.readouterr().err
    assert Path("natgrad-train/train.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["sgd", "--learning-rate", "1e30"], "a smaller --learning-rate."),
        (["prong", "--learning-rate", "1e30"], "a smaller --learning-rate or a larger --damping."),
    ],
)
def test_networks_that_diverge_are_told(options: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss of NaN everywhere still leaves a table, a figure and all arrays."""
    assert main(["train", "--preset", *options, *FAST]) == 0
    losses = arrays()["test_loss"]
    assert np.isnan(losses[-1]).all()
    by = arrays()["step"][np.isfinite(losses).all(axis=1).argmin()]
    said = capsys.readouterr().out
    assert f"2 of 2 networks diverged by step {by}; try {advice}" in said
    assert "nan" not in said


def test_one_of_three_networks_diverged() -> None:
    nan = np.nan
    rows = [[1.0, 1.0, 1.0], [1.0, 2.0, nan], [1.0, nan, nan], [1.0, nan, 3.0]]
    history = train.History(step=[0, 5, 10, 15], train=[np.ones(3)] * 4, test=[np.asarray(row) for row in rows])
    assert train.diverged(history) == "2 of 3 networks diverged by step 10"
    assert train.lost(history, "kfac").endswith("; try a larger --damping.")
    assert not train.lost(train.History(step=[0], train=[np.ones(3)], test=[np.ones(3)]), "kfac")
