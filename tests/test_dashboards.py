"""What the dashboards say is what the committed files say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import compare
import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(name="dashboards")
def load_dashboards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "docs" / "_ext" / "natgrad_dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_are_those_of_the_tables(dashboards: ModuleType) -> None:
    """Every race once, and the ratio that the table of the comparison prints, to its digits."""
    raced: list[tuple[str, dict[str, Any]]] = []
    for path in sorted((ROOT / "asv_benchmarks" / "tables").glob("*.json")):
        raced += [(path.stem, row) for row in compare.read(path) if "times" in row]
    assert raced
    found = dashboards.peers()["races"]
    assert len(found) == len(raced)
    keys = ("machine", "library", "dtype", "operation", "problem")
    known = {tuple(race[key] for key in keys): race for race in found}
    for machine, row in raced:
        title, problem, dtype, *_, written, _, _, _ = compare.cells(row)
        race = known[machine, row["library"], dtype, title, problem]
        ours, other = dashboards.fastest(race, "ours"), dashboards.fastest(race, "written")
        if ours is None or other is None:
            continue
        assert float(written.split()[0]) == pytest.approx(ours["ms"] / other["ms"], rel=0.06)
        assert other["agrees"] == ("off" not in written)


def test_history_is_that_of_the_results(dashboards: ModuleType, tmp_path: Path) -> None:
    """Two commits out of order, two machines, a benchmark without parameters, a value that failed."""
    columns = ["result", "params", "version"]
    sets = [["'numpy'", "'jax'"], ["'float64'"]]

    def write(machine: str, commit: str, date: int, results: dict[str, Any]) -> None:
        (tmp_path / "results" / machine).mkdir(parents=True, exist_ok=True)
        run = {"commit_hash": commit, "date": date, "result_columns": columns, "results": results}
        (tmp_path / "results" / machine / f"{commit[:8]}-env.json").write_text(json.dumps(run), encoding="utf-8")

    write("host", "b" * 40, 86_400_000, {"a.time_call": [[0.002, None], sets, "1"]})
    write("host", "a" * 40, 0, {"a.time_call": [[0.001, 0.004], sets, "1"], "b.track_ratio": [[1.5], [], "1"]})
    write("gpu", "a" * 40, 0, {"a.time_call": [[0.0001], [["'cupy'"], ["'float64'"]], "1"]})
    (tmp_path / "results" / "host" / "machine.json").write_text("{}", encoding="utf-8")
    index = {"b.track_ratio": {"unit": "ratio"}, "version": 2}
    (tmp_path / "results" / "benchmarks.json").write_text(json.dumps(index), encoding="utf-8")

    dashboards.BENCHMARKS = tmp_path
    data = dashboards.history()
    assert data["commits"] == [["a" * 8, "1970-01-01"], ["b" * 8, "1970-01-02"]]
    series = {(row["benchmark"], row["machine"], row["library"]): row for row in data["series"]}
    assert series["a.time_call", "host", "numpy"]["values"] == [1.0, 2.0]
    assert series["a.time_call", "host", "jax"]["values"] == [4.0, None]
    assert series["a.time_call", "gpu", "cupy"]["values"] == [0.1, None]
    assert series["a.time_call", "gpu", "cupy"]["unit"] == "ms"
    assert series["a.time_call", "gpu", "cupy"]["case"] == "float64"
    assert series["b.track_ratio", "host", ""]["values"] == [1.5, None]
    assert series["b.track_ratio", "host", ""]["unit"] == "ratio"
