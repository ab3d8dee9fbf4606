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
