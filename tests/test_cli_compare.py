"""`natgrad-array compare`, called as its console script calls it."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import natgrad_array as ng
from natgrad_array.cli import compare, main, train

FAST = ["--steps", "2", "--members", "2", "--hidden", "3", "--samples", "8", "--batch", "50"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Forty images of 3 × 3 pixels and three classes: networks small enough for dense matrices."""
    rng = np.random.default_rng(0)
    for name, array in (("images", rng.integers(0, 256, (40, 3, 3))), ("labels", np.arange(40) % 3)):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (tmp_path / name).write_bytes(head + array.astype(np.uint8).tobytes())
    return ["--data", "images", "--labels", "labels"]


def arrays(folder: str = "natgrad-compare") -> dict[str, Any]:
    with np.load(f"{folder}/{compare.ARRAYS}", allow_pickle=False) as archive:
        return dict(archive)


def rows() -> dict[str, dict[str, str]]:
    with Path(f"natgrad-compare/{compare.TABLE}").open(encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("task", ["classify", "autoencoder"])
def test_compare_leaves_arrays_a_table_and_a_figure(
    files: list[str], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arrays against dense matrices of the networks that are written beside them."""
    assert main(["compare", *FAST, *files, "--task", task, "--damping", "0.01"]) == 0
    found, said = arrays(), capsys.readouterr().out
    assert found["methods"].tolist() == list(compare.METHODS)
    assert found["finished"]
    assert found["steps"] == 2
    parts = train.split(train.load(Path("images"), Path("labels")), task, "float64")
    net = train.make_network(parts, task, (3,), "tanh")
    x, y = parts.x[:8], parts.y[:8]
    for b in range(2):
        params = tuple(found[f"params_{i}"][b] for i in range(2))
        f = net.fisher(params, x).to_dense()
        gradient = np.concatenate([g.T.reshape(-1) for g in net.gradient(params, x, y)])
        wanted = np.linalg.pinv(f, rcond=1e-10, hermitian=True) @ gradient
        steps = {"exact": np.linalg.solve(f + 0.01 * np.eye(len(f)), gradient), "sgd": gradient}
        for name, step in steps.items():
            cosine = step @ wanted / np.linalg.norm(step) / np.linalg.norm(wanted)
            assert abs(found[f"{name}_cosine"][b] - cosine) <= 1e-6
            damped = steps["exact"]
            cosine = step @ damped / np.linalg.norm(step) / np.linalg.norm(damped)
            assert abs(found[f"{name}_damped_cosine"][b] - cosine) <= 1e-9
            gain = (gradient @ step) ** 2 / (step @ f @ step) / (gradient @ wanted)
            assert abs(found[f"{name}_gain"][b] - gain) <= 1e-6
        cut = params[0].size
        cross = 2**0.5 * np.linalg.norm(f[:cut, cut:]) / np.linalg.norm(f)
        assert abs(found["cross_layer"][b] - cross) <= 1e-9
        assert abs(found["kfac_left_out"][b] - cross) <= 1e-9
        assert found["tridiagonal_kfac_left_out"][b] == 0.0
        other = ng.empirical_fisher(net, params, x, y).to_dense()
        for i, j, part in ((0, 0, np.s_[:cut, :cut]), (0, 1, np.s_[:cut, cut:]), (1, 1, np.s_[cut:, cut:])):
            error = np.linalg.norm(other[part] - f[part]) / np.linalg.norm(f[part])
            assert abs(found["empirical_block_errors"][b, i, j] - error) <= 1e-9
    assert float(rows()["exact"]["gain"]) == pytest.approx(np.median(found["exact_gain"]), rel=1e-6)
    assert float(rows()["heskes"]["left out"]) == pytest.approx(np.median(found["cross_layer"]), rel=1e-6)
    assert set(rows()) == set(compare.METHODS)
    assert Path("natgrad-compare/compare.png").stat().st_size > 20_000
    for name in compare.METHODS:
        assert f"\n{name} " in said
    assert "2 steps of natural_gradient on images" in said


def test_heskes_has_the_factors_of_the_exact_layerwise_inverse(files: list[str]) -> None:
    """Two ways to the same direction, up to 1/L."""
    assert main(["compare", *FAST, *files]) == 0
    found = arrays()
    np.testing.assert_allclose(found["heskes_cosine"], found["exact_by_layers_cosine"], rtol=1e-6)
    np.testing.assert_allclose(found["heskes_length"], 2 * found["exact_by_layers_length"], rtol=1e-6)


def test_many_draws_come_close(files: list[str]) -> None:
    for draws in ("1", "400"):
        assert main(["compare", *FAST, *files, "--draws", draws, "--out", draws]) == 0
    few, many = (np.median(arrays(draws)["sampled_block_errors"]) for draws in ("1", "400"))
    assert many < 0.15 * few


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_libraries_agree(backend: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    # One of each kind: JAX compiles every new operation.
    monkeypatch.setattr(compare, "METHODS", ("exact", "sampled", "kfac"))
    options = [*FAST, *files, "--preset", "sgd", "--steps", "1"]
    assert main(["compare", *options]) == 0
    wanted = arrays()
    assert main(["compare", *options, "--backend", backend, "--out", backend]) == 0
    found = arrays(backend)
    assert set(found) == set(wanted)
    for name in ("kfac_block_errors", "sampled_block_errors", "spectrum", "exact_gain", "kfac_gain"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-12)


def test_the_seed_says_it_all(files: list[str]) -> None:
    runs = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["compare", *FAST, *files, "--seed", seed, "--out", folder]) == 0
        runs.append(arrays(folder))
    for name in runs[0]:
        np.testing.assert_array_equal(runs[0][name], runs[1][name])
    assert not np.array_equal(runs[0]["sampled_gain"], runs[2]["sampled_gain"])


def test_interruption_keeps_the_reports_that_are_there(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preconditioner = ng.optimizers.Optimizer.preconditioner

    def until_interrupted(self: Any, *args: Any) -> Any:
        if self == compare.make_optimizer("tridiagonal_kfac", 1e-3):
            raise KeyboardInterrupt
        return preconditioner(self, *args)

    monkeypatch.setattr(ng.optimizers.Optimizer, "preconditioner", until_interrupted)
    assert main(["compare", *FAST, *files]) == 130
    found, said = arrays(), capsys.readouterr()
    kept = [*compare.EXACT, *compare.ESTIMATES, "natural_gradient", "kfac"]
    assert found["methods"].tolist() == kept == list(rows())
    assert not found["finished"]
    assert found["kfac_gain"].shape == (2,)
    assert "interrupted; what was computed is written" in said.err
    assert Path("natgrad-compare/compare.png").exists()


def test_interruption_of_the_training_keeps_the_parameters(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = ng.optimizers.Optimizer.step, []

    def until_interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(ng.optimizers.Optimizer, "step", until_interrupted)
    assert main(["compare", *FAST, *files]) == 130
    found = arrays()
    assert found["steps"] == 1
    assert found["params_0"].shape == (2, 3, 10)
    assert found["methods"].size == 0
    assert not Path("natgrad-compare/compare.png").exists()
    assert "interrupted" in capsys.readouterr().err


def test_untrained_networks_and_no_damping(files: list[str]) -> None:
    options = ["--steps", "0", "--damping", "0", "--members", "1", "--hidden", "3", "--samples", "8"]
    assert main(["compare", *options, *files]) == 0
    found = arrays()
    assert found["steps"] == 0
    # The exact inverse without damping is F⁺ itself.
    np.testing.assert_allclose(found["exact_gain"], 1.0, atol=1e-9)
    np.testing.assert_allclose(found["exact_length"], 1.0, atol=1e-9)


def test_a_run_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("natgrad-compare").mkdir()
    Path("natgrad-compare/compare.npz").write_text("an earlier one")
    assert main(["compare", *FAST]) == 2
    assert "natgrad-compare holds a run, compare.npz: --out takes another folder" in capsys.readouterr().err
    assert Path("natgrad-compare/compare.npz").read_text() == "an earlier one"


def test_members_that_diverge_leave_a_report(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """NaN everywhere: dashes in the table, empty panels, and all arrays."""
    init = ng.networks.Network.init

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        return tuple(np.nan * w for w in init(self, *args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ng.networks.Network, "init", broken)
        assert main(["compare", *FAST, *files, "--preset", "sgd"]) == 0
    assert np.isnan(arrays()["kfac_gain"]).all()
    assert "–" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "newton"], "--preset must be one of natural_gradient, kfac"),
        (["--task", "sing"], "--task must be one of autoencoder, classify, got sing"),
        (["--activation", "step"], "--activation must be one of identity, tanh"),
        (["--hidden", "3,x"], "--hidden must be one or more positive integers"),
        (["--damping", "-1"], "--damping must be at least 0 and finite, got -1"),
        (["--damping", "nan"], "--damping must be at least 0 and finite, got nan"),
        (["--data", "nowhere"], "--data nowhere cannot be read: No such file or directory"),
        (["--labels", "some"], "--labels needs --data"),
        (["--hidden", "9" * 30], "--hidden and --members ask for more parameters than can be addressed"),
        (["--samples", "0"], "samples"),
        (["--draws", "0"], "draws"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("natgrad-compare").exists()


def test_a_network_too_large_for_dense_matrices(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ng.linalg._arrays.memory, "available_bytes", lambda _: 1000)
    assert main(["compare", *FAST, *files]) == 2
    assert "--hidden, --samples and --members say how large it is" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert main(["compare", *FAST, "--out", "file"]) == 2
    assert "--out file cannot be written" in capsys.readouterr().err
