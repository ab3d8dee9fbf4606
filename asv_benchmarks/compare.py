"""This library against its peers, measured where it runs: ``python asv_benchmarks/compare.py``.

Every array library has a process of its own. In it the contestants of a row take turns, so
that what else the machine does meets all of them alike; the table gives medians. On JAX both
sides are compiled, with their arrays as arguments, but for what of ours compiles itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

from benchmarks import backends, contests, measure  # noqa: E402

COLUMNS = (
    "row",
    "problem",
    "dtype",
    "ours, ms",
    "quartiles",
    "x products",
    "x written",
    "x expert",
    "beside",
    "agrees",
)
LEGEND = """\
ours         median time of one call of natgrad_array, and its quartiles, in milliseconds
x products   ours over the matrix products of the same shapes
x written    ours over what a user would write: below 1 we are faster
x expert     ours over the fastest hand-optimised code that agrees, which is named
beside       other times, of what does not compute the same
agrees       median relative difference between ours and those two; "off" where it is above 0.01"""


# ------------------------------------------------------------------------ in the worker


def race(name: str, label: str, library: str, dtype: str, *, rounds: int, budget: float) -> dict[str, Any]:
    """Time all contestants of one row on one problem."""
    return race_entries(contests.entries(name, library, dtype, label), library, rounds=rounds, budget=budget) | {
        "row": name,
        "problem": label,
        "library": library,
        "dtype": dtype,
    }


def race_entries(entries: Sequence[contests.Contestant], library: str, *, rounds: int, budget: float) -> dict[str, Any]:
    """Time contestants in turns; one that fails says why and holds up nobody."""
    backend = backends.connect(library)
    calls, results, failed = {}, {}, {}
    for entry in entries:
        call = entry.ready(backend)
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 libraries have no common error
            failed[entry.label] = contests.complaint(error)
            continue
        calls[entry.label] = call
        if entry.kind in ("ours", "written", "expert") and entry.scale == 1.0:
            results[entry.label] = _on_host(backend, result)
    samples = measure.interleave(calls, rounds=rounds, budget=budget, warm=False)
    times = []
    for entry in entries:
        row: dict[str, Any] = {"label": entry.label, "kind": entry.kind}
        if entry.label in failed:
            row["failed"] = failed[entry.label]
        else:
            first, median, third = (entry.scale * value for value in measure.quartiles(samples[entry.label]))
            row |= {"median": median, "quartiles": [first, third], "samples": len(samples[entry.label])}
        if entry.kind in ("written", "expert") and {entry.label, entries[0].label} <= set(results):
            difference = measure.relative_difference(results[entry.label], results[entries[0].label])
            row["difference"] = float(statistics.median(difference.tolist()))
        times.append(row)
    return {"times": times}


def _on_host(backend: backends.Backend, result: Any) -> Any:
    if isinstance(result, list | tuple):
        return tuple(backend.to_numpy(item) for item in result)
    return backend.to_numpy(result)


def work(
    library: str, rows: Sequence[str], dtypes: Sequence[str], *, quick: bool = False, budget: float | None = None
) -> Iterator[dict[str, Any]]:
    """Everything that one library does, result by result; the machine first."""
    backend = backends.connect(library)
    rounds = 5 if quick else 15
    if budget is None:
        budget = 0.5 if quick else 8.0
    yield {"machine": describe(backend)}
    for name in rows:
        if name == "accuracy":
            for label, case in contests.ACCURACY.items():
                case = {**case, "batch": 128} if quick else case
                problem = label.replace("1024", "128") if quick else label
                for dtype in dtypes:
                    errors = contests.accuracy(backend, dtype, **case)
                    yield {"row": name, "problem": problem, "library": library, "dtype": dtype, "errors": errors}
            continue
        contest = contests.CONTESTS[name]
        if library not in contest.libraries:
            continue
        for label in contest.quick if quick else contest.cases:
            for dtype in dtypes:
                try:
                    yield race(name, label, library, dtype, rounds=rounds, budget=budget)
                except Exception as error:  # noqa: BLE001 the rows after it are worth having
                    why = f"{name}, {label}, {dtype} failed: {contests.complaint(error)}"
                    yield {"library": library, "stopped": why}


def describe(backend: backends.Backend) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "library": backend.name,
        "version": backend.version,
        "device": backend.device if backend.on_gpu else processor(),
        "cpus": backends.usable_cpus(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------- the table


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    title = contests.CONTESTS[result["row"]].title
    head = (title, result["problem"], result["dtype"])
    times = result["times"]
    ours = times[0]
    if "failed" in ours:
        return (*head, f"failed: {ours['failed']}", *[""] * 6)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in times[1:]:
        by_kind.setdefault(row["kind"], []).append(row)

    def best(kind: str) -> dict[str, Any] | None:
        done = [row for row in by_kind.get(kind, []) if "failed" not in row]
        # Code that agrees comes before code that is off, however fast.
        return min(done, key=lambda row: (is_off(row), row["median"]), default=None)

    def ratio(kind: str) -> str:
        row = best(kind)
        if row is None:
            return "failed" if kind in by_kind else "-"
        text = number(ours["median"] / row["median"])
        return text if kind == "product" else f"{text} ({row['label']}{', off' if is_off(row) else ''})"

    beside = [
        f"{row['label']} {'failed' if 'failed' in row else number(1e3 * row['median'])}"
        for row in by_kind.get("other", [])
    ]
    chosen = [row for kind in ("written", "expert") if (row := best(kind)) is not None]
    differences = [row["difference"] for row in chosen if "difference" in row]
    return (
        *head,
        number(1e3 * ours["median"]),
        "–".join(number(1e3 * value) for value in ours["quartiles"]),
        ratio("product"),
        ratio("written"),
        ratio("expert"),
        ", ".join(beside) or "-",
        f"{max(differences):.0e}" if differences else "-",
    )


def is_off(row: dict[str, Any]) -> bool:
    """Whether a result is not ours, to a hundredth."""
    return not row.get("difference", 0.0) <= contests.OFF


def number(value: float) -> str:
    """Two or three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:#.2g}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Text of all results, one part for each library, from what `work` yields.

    Parameters
    ----------
    results : sequence of dict
        In the order in which they came.

    Returns
    -------
    str
        A machine's line, a table of times and a table of errors for each library.
    """
    parts = []
    for library in dict.fromkeys(_library(result) for result in results):
        mine = [result for result in results if _library(result) == library]
        # A file of several runs says it more than once.
        parts += dict.fromkeys(_headline(result["machine"]) for result in mine if "machine" in result)
        times = [cells(result) for result in mine if "times" in result]
        if times:
            parts.append(_aligned((COLUMNS, *times)))
        errors = [
            (
                "accuracy",
                result["problem"],
                result["dtype"],
                label,
                error.get("failed") or f"{100 * error['off']:.2f} %",
                "-" if "failed" in error else f"{error['median']:.1e}",
            )
            for result in mine
            if "errors" in result
            for label, error in result["errors"].items()
        ]
        if errors:
            head = ("row", "problem", "dtype", "method", f"members off by {contests.OFF}", "median error")
            parts.append(_aligned((head, *errors)))
        parts += [f"{library}: {result['stopped']}" for result in mine if "stopped" in result]
    return "\n".join(parts)


def _headline(machine: dict[str, Any]) -> str:
    return (
        f"\n{machine['library']} {machine['version']} on {machine['device']}, {machine['cpus']} CPUs, "
        f"Python {machine['python']}, NumPy {machine['numpy']}"
    )


def _library(result: dict[str, Any]) -> str:
    return str(result["machine"]["library"] if "machine" in result else result["library"])


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(len(line) for line in text), *text[1:]])


# --------------------------------------------------------------------------- the command


def read(path: Path) -> list[dict[str, Any]]:
    """Results from a file, one a line; a last line that was cut off is left out."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def run_worker(library: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `work` in a process of its own; what it has finished is kept if it ends badly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", library, "--json", str(path)]
        command += ["--only", *options.only, "--dtype", *options.dtype, *(["--quick"] if options.quick else [])]
        command += [] if options.budget is None else ["--budget", str(options.budget)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # What libraries print on errors of their own would tear the table apart.
        stopped = None
        try:
            status = subprocess.run(
                command, env=environment, stderr=subprocess.PIPE, text=True, timeout=options.limit, check=False
            )
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {options.limit:.0f} s, its limit"
        else:
            if status.returncode:
                last = (status.stderr.strip().splitlines() or ["no message"])[-1]
                stopped = f"stopped with exit status {status.returncode}: {last}"
        results = read(path) if path.exists() else []
    if stopped is not None:
        results.append({"library": library, "stopped": stopped})
    return results


def absent(library: str) -> str | None:
    """Why a library cannot be measured, found out without loading the large ones."""
    if importlib.util.find_spec(library) is None:
        return "not installed"
    if library == "cupy":
        try:
            backends.connect(library)
        except NotImplementedError as error:
            return str(error)
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    rows = [*contests.CONTESTS, "accuracy"]
    parser = argparse.ArgumentParser(
        description="Measure this library against its peers, here and now.",
        epilog=f"rows: {', '.join(rows)}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer problems and rounds: minutes, for a first look")
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=rows, default=rows, help="rows to measure")
    parser.add_argument("--backend", metavar="NAME", nargs="+", choices=backends.NAMES, help="array libraries")
    parser.add_argument("--dtype", nargs="+", choices=backends.DTYPES, default=list(backends.DTYPES))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results there too, one a line")
    parser.add_argument("--budget", metavar="SECONDS", type=float, help="time for each row and problem")
    parser.add_argument(
        "--limit", metavar="SECONDS", type=float, default=3600.0, help="time for each library, one hour by default"
    )
    parser.add_argument("--show", metavar="FILE", type=Path, help="measure nothing; print the table of such a file")
    parser.add_argument("--worker", choices=backends.NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a process, a row or one of our own calls failed."""
    options = parse(arguments)
    if options.show:
        print(LEGEND)
        print(table(read(options.show)))
        return 0
    if options.worker:
        steps = work(options.worker, options.only, options.dtype, quick=options.quick, budget=options.budget)
        with options.json.open("w", encoding="utf-8") as file:
            for result in steps:
                print(json.dumps(result), file=file, flush=True)
                print(".", end="", file=sys.__stdout__, flush=True)
        return 0
    results: list[dict[str, Any]] = []
    print(LEGEND)
    for library in options.backend or backends.NAMES:
        if (why := absent(library)) is not None:
            results.append({"library": library, "stopped": f"left out, {why}"})
            print(table(results[-1:]))
            continue
        found = run_worker(library, options)
        results += found
        print()  # after the worker's dots
        print(table(found), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    bad = any(
        not result.get("stopped", "left out").startswith("left out") or "failed" in result.get("times", [{}])[0]
        for result in results
    )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
