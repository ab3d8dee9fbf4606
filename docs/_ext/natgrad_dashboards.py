"""Performance dashboards from committed measurements, and ASV's own site where there are results for it."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "asv_benchmarks"
sys.path.append(str(BENCHMARKS))
TITLES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "cupy": "CuPy"}
#: Units in which times are told, and how many of them a second has.
UNITS = {"seconds": ("ms", 1e3)}


# ------------------------------------------------------------------ beside other code


def peers() -> dict[str, Any]:
    """Machines and races of all committed tables."""
    from benchmarks import contests

    machines, races = [], []
    for path in sorted((BENCHMARKS / "tables").glob("*.json")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        machines += [
            {"machine": path.stem, **line["machine"], "title": TITLES[line["machine"]["library"]]}
            for line in lines
            if "machine" in line
        ]
        races += [
            {
                "machine": path.stem,
                "library": line["library"],
                "dtype": line["dtype"],
                "operation": contests.CONTESTS[line["row"]].title,
                "problem": line["problem"],
                "times": [contestant(row, contests.OFF) for row in line["times"] if "median" in row],
            }
            for line in lines
            if "times" in line
        ]
    races.sort(key=lambda race: race["operation"] != contests.CONTESTS["layerwise"].title)  # what to see first
    return {"machines": machines, "races": races}


def contestant(row: dict[str, Any], off: float) -> dict[str, Any]:
    """One way to compute a result: its name, its kind, milliseconds and their quartiles."""
    low, high = (float(f"{1e3 * value:.4g}") for value in row["quartiles"])
    median = float(f"{1e3 * row['median']:.4g}")
    agrees = row.get("difference", 0.0) <= off
    return {"label": row["label"], "kind": row["kind"], "ms": median, "low": low, "high": high, "agrees": agrees}


def fastest(race: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The fastest contestant of a kind; one that agrees with ours comes before one that does not."""
    found = [row for row in race["times"] if row["kind"] == kind]
    return min(found, key=lambda row: (not row["agrees"], row["ms"]), default=None)


class Peers(SphinxDirective):
    """``peers-dashboard``: this library beside what else one would write, and beside matrix products."""

    def run(self) -> list[nodes.Node]:
        for path in (BENCHMARKS / "tables").glob("*.json"):
            self.env.note_dependency(str(path))
        data = peers()
        rows = []
        for race in data["races"]:
            ours = fastest(race, "ours")
            if ours is None:
                continue
            cells = [race["problem"], number(ours["ms"]), f"{number(ours['low'])} – {number(ours['high'])}"]
            for kind in ("written", "expert", "product"):
                other = fastest(race, kind)
                cells.append("–" if other is None else number(other["ms"]))
                cells.append("–" if other is None else ratio(other, ours, kind))
            rows.append(({key: race[key] for key in ("machine", "library", "dtype", "operation")}, cells))
        head = ("problem", "this library, ms", "quartiles", "as written, ms", "times ours", "expert, ms", "times ours")
        head += ("matrix products, ms", "ours over products")
        table = table_html("peers", "Times of one call, medians", head, rows)
        machines = "".join(f"<li>{html.escape(machine_line(machine))}</li>" for machine in unique(data["machines"]))
        return [
            nodes.raw("", dashboard("peers", data) + table + f"<ul class='machines'>{machines}</ul>", format="html")
        ]


def ratio(other: dict[str, Any], ours: dict[str, Any], kind: str) -> str:
    """How many times as long; whose result is not ours says so."""
    if kind == "product":
        return number(ours["ms"] / other["ms"])
    return number(other["ms"] / ours["ms"]) + ("" if other["agrees"] else ", another result")


def machine_line(machine: dict[str, Any]) -> str:
    """A machine in words."""
    return (
        f"{machine['machine']}: {machine['title']} {machine['version']} on {machine['device']}, "
        f"{machine['cpus']} CPUs, Python {machine['python']}, NumPy {machine['numpy']}"
    )


def unique(items: list[Any]) -> list[Any]:
    """Items once each, in order."""
    return [item for k, item in enumerate(items) if item not in items[:k]]


# ----------------------------------------------------------------------- over commits


def results() -> list[Path]:
    """Results of ASV that are committed."""
    found = (BENCHMARKS / "results").glob("*/*.json")
    return sorted(path for path in found if path.name not in ("machine.json", "benchmarks.json"))


def history() -> dict[str, Any]:
    """Series of all benchmarks: a value for each commit, by machine and parameters."""
    index = BENCHMARKS / "results" / "benchmarks.json"
    units = {}
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))
        units = {name: row["unit"] for name, row in listed.items() if isinstance(row, dict)}
    commits: dict[str, int] = {}
    series: dict[tuple[str, ...], dict[str, float]] = {}
    for path in results():
        run = json.loads(path.read_text(encoding="utf-8"))
        commits[run["commit_hash"]] = run["date"]
        columns = run["result_columns"]
        for name, row in run["results"].items():
            fields = dict(zip(columns, row, strict=False))
            sets = itertools.product(*fields.get("params") or [])
            for values, value in zip(sets, fields.get("result") or [], strict=False):
                if not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                unit = units.get(name, "seconds" if ".time_" in name else "")
                unit, scale = UNITS.get(unit, (unit, 1.0))
                words = [value.strip("'") for value in values]
                library = words.pop(0) if words and words[0] in TITLES else ""
                key = (name, unit, " · ".join(words), path.parent.name, library)
                series.setdefault(key, {})[run["commit_hash"]] = float(f"{scale * value:.4g}")
    order = sorted(commits, key=lambda commit: commits[commit])
    return {
        "commits": [[commit[:8], time.strftime("%Y-%m-%d", time.gmtime(commits[commit] / 1000))] for commit in order],
        "series": [
            {
                "benchmark": name,
                "unit": unit,
                "case": case,
                "machine": machine,
                "library": library,
                "values": [values.get(commit) for commit in order],
            }
            for (name, unit, case, machine, library), values in sorted(series.items())
        ],
    }


class History(SphinxDirective):
    """``history-dashboard``: every benchmark over commits, machines side by side."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(BENCHMARKS / "results"))
        for path in results():
            self.env.note_dependency(str(path))
        if not results():
            text = "No results over commits are committed yet: they appear here with the first ones."
            return [nodes.paragraph(text, text)]
        data = history()
        head = ("machine", "library", *(f"{commit}, {date}" for commit, date in data["commits"]))
        rows = [
            (
                {"benchmark": row["benchmark"], "case": row["case"]},
                [
                    row["machine"],
                    row["library"],
                    *("–" if v is None else f"{number(v)} {row['unit']}" for v in row["values"]),
                ],
            )
            for row in data["series"]
        ]
        table = table_html("history", "Results over commits", head, rows)
        if self.config.natgrad_asv:
            link = "<a href='asv/index.html'>ASV's own site of these results</a> loads scripts from elsewhere."
        else:
            link = "ASV's own site is not part of this build: it takes <code>asv</code> and the history of the source."
        return [nodes.raw("", dashboard("history", data) + f"{table}<p>{link}</p>", format="html")]


def publish(app: Sphinx, config: Any) -> None:
    """Let ASV make its site of the committed results, where it can."""
    config.natgrad_asv = ""
    repository = (ROOT / ".git").exists()
    if not results() or not repository or importlib.util.find_spec("asv") is None:
        return
    folder = Path(app.doctreedir) / "asv"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = json.loads((BENCHMARKS / "asv.conf.json").read_text(encoding="utf-8"))
    git = shutil.which("git") or "git"
    main = subprocess.run(
        [git, "-C", str(ROOT), "rev-parse", "--verify", "-q", "main"], capture_output=True, check=False
    )
    settings |= {
        "repo": str(ROOT),
        "branches": ["main" if main.returncode == 0 else "HEAD"],
        "benchmark_dir": str(BENCHMARKS / "benchmarks"),
        "results_dir": str(BENCHMARKS / "results"),
        "env_dir": str(folder / "env"),
        "html_dir": str(folder / "html"),
    }
    (folder / "asv.conf.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "asv", "publish", "--config", str(folder / "asv.conf.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode == 0:
        config.natgrad_asv = str(folder / "html")
    else:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        logger.info("asv publish did not work, its site is left out: %s", *last)


def copy_site(app: Sphinx, error: Exception | None) -> None:
    """Put ASV's site into ours."""
    target = Path(app.outdir) / "asv"
    shutil.rmtree(target, ignore_errors=True)
    if error is None and app.config.natgrad_asv and app.builder.format == "html":
        shutil.copytree(app.config.natgrad_asv, target)


def add_script(app: Sphinx, pagename: str, templatename: str, context: Any, doctree: Any) -> None:
    """Load the script on the page with dashboards alone."""
    if pagename == "performance":
        app.add_js_file("dashboards.js", loading_method="defer")


# ------------------------------------------------------------------------------- HTML


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"


def dashboard(name: str, data: dict[str, Any]) -> str:
    """Data, and the place where a script draws them; without scripts there is the table below."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return (
        f"<div class='dashboard' id='dashboard-{name}' data-kind='{name}' hidden></div>"
        f"<script type='application/json' id='data-{name}'>{text}</script>"
    )


def table_html(name: str, caption: str, head: tuple[str, ...], rows: list[tuple[dict[str, str], list[str]]]) -> str:
    """A table whose rows say by data attributes what they are about, with those as first columns."""
    keys = tuple(rows[0][0]) if rows else ()
    lines = [
        f"<div class='dashboard-table' tabindex='0' role='region' aria-label='{caption}'>",
        f"<table class='table' id='table-{name}'><caption>{html.escape(caption)}</caption><thead><tr>",
        *(f"<th scope='col' class='key'>{html.escape(title)}</th>" for title in keys),
        *(f"<th scope='col'>{html.escape(title)}</th>" for title in head),
        "</tr></thead><tbody>",
    ]
    for about, cells in rows:
        data = " ".join(f"data-{key}='{html.escape(value, quote=True)}'" for key, value in about.items())
        lines.append(f"<tr {data}>")
        lines += [f"<td class='key'>{html.escape(value)}</td>" for value in about.values()]
        lines += [f"<td>{html.escape(value)}</td>" for value in cells]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("natgrad_asv", "", "env", [str])
    app.add_directive("peers-dashboard", Peers)
    app.add_directive("history-dashboard", History)
    app.connect("config-inited", publish)
    app.connect("html-page-context", add_script)
    app.connect("build-finished", copy_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
