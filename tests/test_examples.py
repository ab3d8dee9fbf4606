"""The examples run, and leave what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py"))])
def test_quick(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "Written:" in capsys.readouterr().out


def test_the_teachers_own_loss_is_the_floor() -> None:
    """Half of the noise's variance, summed over outputs, within the spread of a sample's mean."""
    nets = load("nets")
    for experiment in nets.NETS.values():
        assert np.isclose(experiment.floor, 0.5 * nets.NOISE**2 * experiment.sizes[-1])


def test_modes_are_those_of_the_closed_forms(tmp_path: Path) -> None:
    """Natural gradient flow at every depth; gradient flow of one layer and of two: straight, and logistic."""
    load("modes").main(["--quick", "--out", str(tmp_path)])
    with np.load(tmp_path / "modes.npz") as kept:
        times, modes, depths = kept["times"][:, None, None, None], kept["modes"], kept["depths"].tolist()
    target, start = np.asarray([3.0, 2.0, 1.0]), modes[:, :, :1]
    straight = target + np.exp(-times) * (start - target)
    np.testing.assert_allclose(modes[1], straight[1], atol=2e-3)
    np.testing.assert_allclose(modes[0, depths.index(1)], straight[0, depths.index(1)], atol=1e-7)
    first = start[0, depths.index(2)]
    logistic = target / (1.0 + (target / first - 1.0) * np.exp(-2.0 * target * times))
    np.testing.assert_allclose(modes[0, depths.index(2)], logistic, atol=1e-5)
