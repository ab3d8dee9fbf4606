"""The command line, called as its console script calls it."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from rich.console import Console

import natgrad_array as ng
from natgrad_array.cli import demo, libraries, main, output
from natgrad_array.cli.data import digits

ROOT = Path(ng.__file__).parents[1]
BACKENDS = ["numpy", "jax"] + (["torch"] if importlib.util.find_spec("torch") else [])
ETA = 0.2
RATE = -2 * math.log(1 - ETA) / ETA


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def samples(n: int = 5, m: int = 3, count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A regression with one dead input."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, n)) * np.linspace(1.5, 0.5, n)
    x[:, 1] = 0.0
    return x, x @ rng.standard_normal((n, m)) + 0.3 * rng.standard_normal((count, m))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    x, y = samples()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


def run_demo(npz: Path, *options: str) -> dict[str, np.ndarray]:
    """The demo on a small file: the arrays it leaves behind."""
    assert main(["demo", "--data", str(npz), "--members", "6", *options]) == 0
    with np.load("natgrad-demo/arrays.npz", allow_pickle=False) as archive:
        return dict(archive)


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


# ------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo_natural_gradients_keep_the_pace_of_the_theory(
    backend: str, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = run_demo(npz, "--backend", backend, "--steps", "30")
    assert list(arrays["regime"]) == ["wide", "intermediate", "bottleneck"]
    assert arrays["sizes"].tolist() == [[5, 5, 3], [5, 3, 3], [5, 1, 3]]
    assert list(arrays["rule"]) == ["layerwise", "exact", "moore_penrose", "gradient"]
    assert arrays["backend"] == backend
    assert arrays["input_rank"] == 4
    median = np.median(arrays["decay_rate"], axis=-1)
    assert abs(median[0, :3] / RATE - 1).max() < 0.01
    assert abs(median[1, 1:3] / RATE - 1).max() < 0.01
    assert median[1, 0] < 0.95 * RATE  # the layerwise rule is not exact there
    known = [[True, True, True, False], [False, True, True, False], [False] * 4]
    np.testing.assert_array_equal(np.isfinite(arrays["theory_rate"]), known)
    np.testing.assert_allclose(arrays["theory_rate"][known], RATE)
    assert arrays["finished"].all()
    assert not arrays["diverged"].any()
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    assert "Moore–Penrose" in out
    assert f"{RATE:.3f}" in out


def test_demo_files(npz: Path) -> None:
    arrays = run_demo(npz, "--steps", "7", "--out", "natgrad-demo")
    assert arrays["time"].shape == (3, 4, 8)
    assert arrays["excess_loss"].shape == (3, 4, 8, 6)
    assert arrays["decay_rate"].shape == arrays["diverged"].shape == (3, 4, 6)
    np.testing.assert_allclose(arrays["time"][0, 0], ETA * np.arange(8))
    np.testing.assert_allclose(arrays["learning_rate"] * arrays["substeps"], ETA)
    # All rules start from the same networks.
    np.testing.assert_array_equal(arrays["excess_loss"][:, 1:, 0], arrays["excess_loss"][:, :-1, 0])
    assert not any(array.dtype.hasobject for array in arrays.values())
    png = Path("natgrad-demo/loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000


def test_demo_learns_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--members", "2", "--steps", "3", "--sizes", "64,32,10"]) == 0
    out = capsys.readouterr().out
    assert "1797 samples, 64 inputs of rank 61, 10 outputs" in out
    assert "intermediate" in out
    assert "wide" not in out
    bunch = digits()
    assert bunch.x.min() == 0.0
    assert bunch.x.max() == 1.0
    assert np.linalg.matrix_rank(bunch.x) == 61
    np.testing.assert_array_equal(bunch.y.sum(axis=1), 1.0)


def test_demo_is_repeatable_and_follows_the_seed(npz: Path) -> None:
    first, again = (run_demo(npz, "--steps", "3", "--seed", "4") for _ in range(2))
    other = run_demo(npz, "--steps", "3", "--seed", "5")
    np.testing.assert_array_equal(first["excess_loss"], again["excess_loss"])
    assert (first["excess_loss"] != other["excess_loss"]).all()


def test_demo_float32(npz: Path) -> None:
    arrays = run_demo(npz, "--dtype", "float32")
    assert arrays["dtype"] == "float32"
    median = np.nanmedian(arrays["decay_rate"], axis=-1)
    assert abs(median[0, :3] / RATE - 1).max() < 0.05


def test_demo_one_architecture_of_any_depth(npz: Path) -> None:
    arrays = run_demo(npz, "--sizes", "5,6,4,3", "--learning-rate", "0.1", "--steps", "60")
    assert arrays["sizes"].tolist() == [[5, 6, 4, 3]]
    assert list(arrays["regime"]) == ["wide"]  # the rank of the inputs, 4, stands for their number
    expected = -2 * math.log(0.9) / 0.1
    assert abs(np.median(arrays["decay_rate"][0, :3], axis=-1) / expected - 1).max() < 0.01


def test_demo_more_time_than_rounding_leaves(npz: Path) -> None:
    """The fit stops where the loss is down to rounding."""
    arrays = run_demo(npz, "--steps", "200", "--sizes", "5,5,3")
    assert (np.nanmin(arrays["excess_loss"][0, 0], axis=0) < 1e-25).all()
    assert abs(arrays["decay_rate"][0, :3] / RATE - 1).max() < 0.01


def test_demo_too_short_to_fit(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = run_demo(npz, "--steps", "1")
    assert np.isnan(arrays["decay_rate"]).all()
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(("n", "m", "regimes"), [(1, 1, ["wide"]), (3, 3, ["wide", "bottleneck"]), (2, 6, None)])
def test_demo_tasks_with_room_for_fewer_regimes(n: int, m: int, regimes: list[str] | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "small.npz", x=rng.standard_normal((50, n)), y=rng.standard_normal((50, m)))
    arrays = run_demo(tmp_path / "small.npz", "--steps", "2")
    assert list(arrays["regime"]) == (regimes or ["wide", "intermediate", "bottleneck"])


def test_demo_data_of_integers_and_flags(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "int.npz", x=rng.integers(0, 5, (40, 3)), y=rng.random((40, 2)) > 0.5)
    assert run_demo(tmp_path / "int.npz", "--steps", "2")["sizes"].tolist()[0] == [3, 3, 2]


def test_floor_is_the_loss_of_the_best_matrix_of_that_rank() -> None:
    """Reduced-rank regression, from the samples and with a matrix square root."""
    x, y = samples(6, 5)
    x[:, 1] = np.random.default_rng(9).standard_normal(len(x))
    task = ng.GaussianTask.from_samples(x, y)
    root = scipy.linalg.sqrtm(x.T @ x / len(x)).real
    best = np.linalg.lstsq(x, y, rcond=None)[0].T
    u, s, vh = np.linalg.svd(best @ root)
    for rank in (1, 2, 4):
        reduced = (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root)
        gap = 0.5 * np.mean(np.sum((y - x @ reduced.T) ** 2 - (y - x @ best.T) ** 2, axis=1))
        assert demo.make_network((6, rank, 5), task).floor == pytest.approx(gap, rel=1e-10)
    assert demo.make_network((6, 5, 5), task).floor == 0.0


def test_bottleneck_settles_at_the_pace_of_its_singular_values() -> None:
    """Near the best of rank r the slowest mode turns, at 1 − s_{r+1} / s_r."""
    s = np.asarray([10.0, 2.0, 1.0])
    task = ng.GaussianTask.from_modes(np.eye(3), s, np.eye(4)[:, :3])
    network = demo.make_network((4, 2, 3), task)
    settings = {"members": 3, "steps": 200, "learning_rate": 0.1, "seed": 0, "tick": lambda: None}
    run = demo.train(network, "exact", task, **settings)
    slowest = 1 - s[2] / s[1]
    np.testing.assert_allclose(run.rate, -2 * math.log(1 - 0.1 * slowest) / 0.1, rtol=0.02)


def test_decay_rate_is_a_straight_line_fit_of_the_later_half() -> None:
    rng = np.random.default_rng(0)
    time = np.linspace(0, 4, 21)
    excess = np.exp(-1.3 * time)[:, None] * np.exp(0.1 * rng.standard_normal((21, 3)))
    expected = -np.polyfit(time[10:], np.log(excess[10:]), 1)[0]
    np.testing.assert_allclose(demo.decay_rate(time, excess, 1e-16), expected)
    excess[15:, 1] = np.nan  # diverged there
    excess[2:, 2] = 0.0
    found = demo.decay_rate(time, excess, 1e-16)
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(-np.polyfit(time[7:15], np.log(excess[7:15, 1]), 1)[0])
    assert np.isnan(found[2])


def test_largest_curvature_is_that_of_the_dense_fisher() -> None:
    x, y = samples()
    task = ng.GaussianTask.from_samples(x, y)
    weights = ng.deep_linear.gaussian(0, (5, 4, 3), (4,), like=x)
    dense = np.linalg.eigvalsh(ng.deep_linear.fisher(weights, task).to_dense())
    assert demo.largest_curvature(weights, task) == pytest.approx(dense.max(), rel=1e-2)


def test_diverged_members_are_frozen_and_reported(monkeypatch: pytest.MonkeyPatch, npz: Path) -> None:
    """One member of gradient descent blows up; the others do not notice."""
    plain = ng.deep_linear.gradient

    def explosive(weights: Any, task: Any) -> Any:
        return tuple(
            np.concatenate([-1e200 * w[:1], d[1:]]) for w, d in zip(weights, plain(weights, task), strict=True)
        )

    healthy = run_demo(npz, "--sizes", "5,4,3")
    monkeypatch.setattr(demo.dl, "gradient", explosive)
    arrays = run_demo(npz, "--sizes", "5,4,3")
    assert arrays["diverged"][0, 3].tolist() == [True] + [False] * 5
    assert np.isnan(arrays["excess_loss"][0, 3, -1, 0])
    np.testing.assert_array_equal(arrays["excess_loss"][0, 3, :, 1:], healthy["excess_loss"][0, 3, :, 1:])


def test_diverged_members_are_in_the_notes() -> None:
    network = demo.Network((2, 2), "wide", 0.0)
    bad = np.asarray([True, False])
    run = demo.Run(network, "gradient", 0.1, 1, None, np.zeros(1), np.ones((1, 2)), np.ones(2), bad, True)
    assert any("1 of 2 members" in line for line in output.notes([run], 0.1))


def test_everything_diverged_still_gives_a_table_and_a_figure(tmp_path: Path) -> None:
    network = demo.Network((2, 2), "wide", 0.0)
    nothing = np.full(2, np.nan)
    excess = np.asarray([[1.0, 2.0], [np.nan, np.nan]])
    run = demo.Run(network, "exact", 0.1, 1, 2.1, np.arange(2.0), excess, nothing, np.ones(2, dtype=bool), True)
    screen = Console(file=io.StringIO(), record=True)
    screen.print(output.table([run]))
    text = screen.export_text()
    assert "exact" in text
    assert "nan" not in text
    assert output.write_figure(tmp_path, [run], "nothing").exists()


def test_interruption_keeps_what_was_computed(
    monkeypatch: pytest.MonkeyPatch, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = ng.deep_linear.natural_gradient, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) == 40 + 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(demo.dl, "natural_gradient", interrupted)
    assert main(["demo", "--data", str(npz), "--members", "2"]) == 130
    out, err = capsys.readouterr()
    assert err == "natgrad-array: interrupted; what was computed is written\n"
    assert "layerwise" in out
    with np.load("natgrad-demo/arrays.npz") as arrays:
        assert arrays["finished"].tolist() == [[True, False]]
        assert np.isfinite(arrays["excess_loss"][0, 1, :6]).all()
        assert np.isnan(arrays["excess_loss"][0, 1, 6:]).all()
    assert Path("natgrad-demo/loss.png").exists()


def test_interruption_before_anything(monkeypatch: pytest.MonkeyPatch, npz: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert main(["demo", "--data", str(npz)]) == 130
    assert not Path("natgrad-demo/arrays.npz").exists()


# ---------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [("numpy", "6,7,8,5"), ("numpy", "5,3,4"), ("numpy", "5,2,4"), *((name, "3,3,3") for name in BACKENDS[1:])],
)
def test_verify(backend: str, sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", backend, "--sizes", sizes, "--members", "2"]) == 0
    out = capsys.readouterr().out
    assert "Every claim that applies holds." in out
    assert "NO" not in out


def test_verify_float32() -> None:
    assert main(["verify", "--dtype", "float32"]) == 0


def test_verify_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "--members", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is True
    assert report["regime"] == "wide"
    assert report["sizes"] == [6, 7, 8, 5]
    direct = ng.verify(*_networks(3))
    assert [row["claim"] for row in report["rows"]] == [row.claim for row in direct.rows]
    for row in report["rows"]:
        assert row["holds"] is None or row["holds"] == [True] * 3
        assert len(row["residual"]) == len(row["tolerance"]) == 3


def _networks(members: int) -> Any:
    weights = ng.deep_linear.orthogonal(0, (6, 7, 8, 5), (members,), like=np.empty(0))
    return weights, ng.GaussianTask.from_samples(*samples(6, 5))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_verify_fails_with_status_1(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient with a wrong sign in one member."""
    real = ng.verify

    def broken(*args: Any) -> Any:
        report = real(*args)
        rows = list(report.rows)
        rows[1] = rows[1]._replace(holds=np.asarray([True, False, True, True]), residual=np.full(4, np.nan))
        report.rows = tuple(rows)
        return report

    monkeypatch.setattr(ng, "verify", broken)
    assert main(["verify", *options]) == 1
    out = capsys.readouterr().out
    if options:
        report = json.loads(out)
        assert report["holds"] is False
        assert report["rows"][1]["holds"] == [True, False, True, True]
        assert report["rows"][1]["residual"] == [None] * 4
    else:
        assert "NO (1 fail)" in out
        assert "A claim fails." in out


# ----------------------------------------------------------------- backends, version, help


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert np.__version__ in out
    for name in ("numpy", "cupy", "torch", "jax", "dask"):
        assert name in out


def test_backends_with_everything_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = libraries.importlib.import_module

    def load(name: str) -> Any:
        if name == "numpy":
            return real(name)
        raise OSError("libcuda is gone") if name == "torch" else ImportError(name)

    monkeypatch.setattr(libraries.importlib, "import_module", load)
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert out.count("missing") == 4
    assert "libcuda is gone" in out
    assert "natgrad-array[cuda12]" in out
    assert "pip install torch" not in out
    assert "pip install jax" in out


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", ("cpu", 0)), ("cuda:1", ("cuda", 1)), ("2", ("", 2)), ("cuda:x", ("cuda", -1)), ("cuda:", ("cuda", -1))],
)
def test_device_names(device: str, expected: tuple[str, int]) -> None:
    assert libraries._platform_and_index(device) == expected


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("natgrad-array ")
    assert main([]) == 0
    assert "backends" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    assert "--learning-rate" in capsys.readouterr().out


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--sizes", "64,x,10"], "--sizes"),
        (["demo", "--sizes", "64"], "--sizes"),
        (["demo", "--sizes", ""], "--sizes"),
        (["demo", "--sizes", "64,0,10"], "--sizes"),
        (["demo", "--sizes", "64,-3,10"], "--sizes"),
        (["demo", "--sizes", "64,32.5,10"], "--sizes"),
        (["demo", "--sizes", "60,32,10"], "64 inputs to 10 outputs"),
        (["demo", "--sizes", "64,32,9"], "64 inputs to 10 outputs"),
        (["demo", "--steps", "-3"], "--steps"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
        (["demo", "--members", "0"], "--members"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--learning-rate", "0"], "--learning-rate"),
        (["demo", "--learning-rate", "-0.1"], "--learning-rate"),
        (["demo", "--learning-rate", "1"], "--learning-rate"),
        (["demo", "--learning-rate", "nan"], "--learning-rate"),
        (["demo", "--dtype", "float16"], "float16"),
        (["demo", "--backend", "tensorflow"], "tensorflow"),
        (["demo", "--device", "cuda"], "cuda"),
        (["demo", "--backend", "jax", "--device", "cpu:99"], "cpu:99"),
        (["demo", "--backend", "jax", "--device", "abacus"], "abacus"),
        (["demo", "--data", "nowhere.npz"], "nowhere.npz"),
        (["demo", "--data", "."], "cannot be read"),
        (["verify", "--sizes", "6;5"], "--sizes"),
        (["verify", "--members", "-1"], "--members"),
        (["verify", "--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    _one_line(capsys, words)


def _one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("natgrad-array: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta"])
def test_bad_torch_device(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "torch", "--device", device]) == 2
    _one_line(capsys, device)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize(("count", "words"), [(0, "there is no CUDA GPU"), (2, "there are cuda:0, cuda:1\n")])
def test_torch_names_the_gpus_that_there_are(
    count: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert main(["verify", "--backend", "torch", "--device", "cuda:2"]) == 2
    _one_line(capsys, f"torch cannot use device 'cuda:2': {words}")


def test_reasons_of_libraries_are_kept_short() -> None:
    error = libraries._no_device("torch", "xpu", f"Could not run it. {'This could be because. ' * 50}\nBackends: CPU")
    assert str(error) == "torch cannot use device 'xpu': Could not run it"


def test_cupy_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("cupy"):
        monkeypatch.setattr("cupy.cuda.is_available", lambda: False)
    assert main(["verify", "--backend", "cupy"]) == 2
    _one_line(capsys, "GPU" if importlib.util.find_spec("cupy") else "natgrad-array[cuda12]")


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["demo", "--backend", "torch"]) == 2
    _one_line(capsys, "python -m pip install torch")


def _write(path: Path, case: str) -> None:
    x, y = samples()
    broken = x.copy()
    broken[7, 0] = np.nan
    infinite = y.copy()
    infinite[:3] = np.inf
    arrays: dict[str, dict[str, Any]] = {
        "nan": {"x": broken, "y": y},
        "inf": {"x": x, "y": infinite},
        "unequal": {"x": x, "y": y[:-1]},
        "no y": {"x": x, "z": y},
        "nothing": {},
        "objects": {"x": x, "y": np.asarray([{"a": 1}, None], dtype=object)},
        "one axis": {"x": x, "y": y[:, 0]},
        "no samples": {"x": x[:0], "y": y[:0]},
        "no features": {"x": x[:, :0], "y": y},
        "complex": {"x": x + 1j, "y": y},
        "text": {"x": x.astype(str), "y": y},
        "zero": {"x": 0 * x, "y": y},
        "huge": {"x": 1e200 * x, "y": y},
    }
    if case in arrays:
        np.savez(path, **arrays[case])
    elif case == "npy":
        with path.open("wb") as file:
            np.save(file, x)
    elif case == "pickle":
        path.write_bytes(pickle.dumps({"x": x, "y": y}))
    elif case == "text file":
        path.write_text("x, y\n1, 2\n")
    elif case == "empty":
        path.write_bytes(b"")
    else:
        np.savez(path, x=x, y=y)
        whole = bytearray(path.read_bytes())
        middle = slice(400, 500)
        whole[middle] = bytes(100) if case == "damaged" else whole[middle]
        path.write_bytes(whole if case == "damaged" else whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nan", "x has NaN or Inf in 1 of 200 rows"),
        ("inf", "y has NaN or Inf in 3 of 200 rows"),
        ("unequal", "200 and 199"),
        ("no y", "arrays x and y, got x, z"),
        ("nothing", "arrays x and y, got none"),
        ("objects", "not unpickled"),
        ("one axis", "(200,)"),
        ("no samples", "(0, 5)"),
        ("no features", "(200, 0)"),
        ("complex", "real numbers"),
        ("text", "real numbers"),
        ("zero", "zero everywhere"),
        ("huge", "finite"),
        ("npy", "not an npz file"),
        ("pickle", "not an npz file"),
        ("text file", "not an npz file"),
        ("empty", "not an npz file"),
        ("damaged", "cannot be read"),
        ("cut off", "not an npz file"),
    ],
)
def test_bad_data(case: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.npz"
    _write(path, case)
    assert main(["demo", "--data", str(path)]) == 2
    _one_line(capsys, words)
    assert not Path("natgrad-demo").exists()


def test_data_is_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    for name in ("trap.npz", "trap.pkl"):
        if name.endswith("npz"):
            np.savez(tmp_path / name, x=np.asarray([[Trap()]], dtype=object), y=np.ones((1, 1)))
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        assert main(["demo", "--data", str(tmp_path / name)]) == 2
        _one_line(capsys, name)
    assert not (tmp_path / "sprung").exists()


def test_float32_overflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    x, y = samples()
    np.savez(tmp_path / "large.npz", x=1e30 * x, y=y)
    assert main(["demo", "--data", str(tmp_path / "large.npz"), "--dtype", "float32"]) == 2
    _one_line(capsys, "float32")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_output_folder_that_cannot_be_written(
    out: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--data", str(npz), "--out", str(tmp_path / out)]) == 2
    _one_line(capsys, "--out")


def test_disk_that_fills_up(npz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert main(["demo", "--data", str(npz), "--steps", "1"]) == 2
    _one_line(capsys, "No space left")


def test_not_enough_memory(npz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def hungry(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 2 TiB")

    monkeypatch.setattr(demo, "train", hungry)
    assert main(["demo", "--data", str(npz)]) == 2
    _one_line(capsys, "2 TiB")


# ------------------------------------------------------------------------------ the process


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib", "sklearn"])
def test_without_the_demo_extra(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from natgrad_array.cli import main; sys.exit(main())"
    done = process(code, "demo", "--steps", "1", "--members", "1", "--sizes", "64,2,10", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f'natgrad-array: {missing} is missing: python -m pip install "natgrad-array[demo]"\n'


def test_importing_the_command_line_needs_no_extra() -> None:
    done = process(
        "import sys, natgrad_array.cli; "
        "print(sorted({'typer', 'rich', 'matplotlib', 'sklearn', 'jax', 'torch', 'cupy'} & set(sys.modules)))"
    )
    assert done.stdout == "[]\n"


def test_the_process_passes_the_exit_status_on() -> None:
    code = "import sys; from natgrad_array.cli import main; sys.exit(main())"
    done = process(code, "verify", "--sizes", "3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = process(code, "verify", "--sizes", "3,4,2", "--members", "1")
    assert (done.returncode, done.stderr) == (0, "")
