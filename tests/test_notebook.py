"""The introduction runs as it is, and with another library in its first line."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import array_api_strict
import matplotlib as mpl
import numpy as np
import pytest
from recording import Recorder, complaint

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "introduction.ipynb"
FIRST = "import numpy as xp"


def run(namespace: Any) -> tuple[dict[str, Any], str]:
    """Run all code cells in one scope; `namespace` in place of NumPy, if there is one."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert source.startswith(FIRST)
    assert "numpy" not in source.removeprefix(FIRST).partition("\n")[2]
    scope: dict[str, Any] = {"given": namespace}
    mpl.use("agg")
    import matplotlib.pyplot as plt

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(source if namespace is None else "xp = given" + source.removeprefix(FIRST), scope)
    plt.close("all")
    return scope, printed.getvalue()


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("namespace", [None, array_api_strict, Recorder()], ids=["numpy", "strict", "recorded"])
def test_introduction(namespace: Any) -> None:
    scope, printed = run(namespace)
    final = np.asarray(scope["natural"].excess_loss[-1, :] / scope["natural"].excess_loss[0, :])
    # Steps of a fiftieth: within a factor of the flow's e^{-8}.
    assert np.all(np.abs(np.log(final) + 8) < 1)
    assert "Eq" in printed or "eq" in printed
    assert bool(scope["ng"].verify(scope["first"], scope["task"]).holds)
    if isinstance(namespace, Recorder):
        cupy = pytest.importorskip("array_api_compat.cupy")
        assert namespace.calls
        assert not [text for call in namespace.calls if (text := complaint(call, cupy))]
