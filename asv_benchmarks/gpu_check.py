"""Everything that needs a GPU, in one command on a machine with one, without a network.

    python asv_benchmarks/gpu_check.py --wheels DIR --out DIR

installs the wheels of a folder for this run only, runs the tests on CuPy, compares CuPy with
NumPy over the public operations, and measures this library against its peers. Each stage is
a process with a time limit of its own, so that one which hangs or fails loses no other.
With ``--rehearse`` NumPy stands in for CuPy and no GPU is needed.

The exit status is 0 if all is well, 1 if a stage failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

TOTAL = 525.0
"""Seconds for everything, so that all is written within nine minutes."""

LIMITS = {"install": 60.0, "versions": 60.0, "parity": 90.0, "tests": 240.0, "compare": 90.0}
"""Seconds for each stage. No stage gets more than what is left of the total."""

ROWS = ("layerwise", "pinvh", "pinvh-half-rank", "pinvh-one-deficient", "small", "exact", "covariance", "ledoit-wolf")
ROWS += ("streaming", "fisher-matvec", "precondition", "accuracy", "oas", "fisher-dense", "moore-penrose")
"""Rows of the comparison, those that matter most first: the time may end before they do."""


# ------------------------------------------------------------------------------- the GPU


def gpus() -> list[str]:
    """Names of the GPUs that the NVIDIA driver sees, asked without any Python package."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode())
    return names


# ------------------------------------------------------------------------------ stages


class Run:
    """The stages of one run, their files and what came of them.

    Parameters
    ----------
    out : Path
        Where files go, without folders below.
    scratch : Path
        Where packages are installed to, and what is not kept.
    total : float
        Seconds for everything.
    """

    def __init__(self, out: Path, scratch: Path, total: float = TOTAL) -> None:
        self.out, self.scratch = out, scratch
        self.end = time.monotonic() + total
        self.lines: list[str] = []
        self.failed = False
        self.environment = os.environ | {
            # The checkout comes first: it is what is tested, whatever wheels hold.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), str(scratch / "site")]),
            "NVIDIA_TF32_OVERRIDE": "0",
            "CUPY_TF32": "0",
            "CUPY_CACHE_DIR": str(scratch / "kernels"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def note(self, line: str) -> None:
        """Write a line of the summary, at once."""
        self.lines.append(line)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        print(line, flush=True)

    def stage(self, name: str, command: Sequence[str], log: Path, limit: float, partial: Path | None = None) -> bool:
        """Run a command with its output in a file, and say how it went.

        `partial` is a file of results that are worth having when the time is up: with more
        than one line in it, the stage has not failed.
        """
        limit = min(limit, self.left)
        if limit < 5.0:
            self.failed = True
            self.note(f"{name}: left out, the time is up")
            return False
        start = time.monotonic()
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=ROOT,
                start_new_session=os.name == "posix",
            )
            try:
                how = f"exit status {process.wait(limit)}"
            except subprocess.TimeoutExpired:
                _kill(process)
                how = f"stopped after {limit:.0f} s, its limit"
        fine = process.returncode == 0
        if "its limit" in how and partial is not None and partial.exists():
            finished = len(partial.read_text(encoding="utf-8").splitlines()) - 1
            fine = finished > 0
            how += f", {finished} results kept"
        self.failed |= not fine
        self.note(
            f"{name}: {'ok' if process.returncode == 0 else how}, {time.monotonic() - start:.0f} s; {_last_line(log)}"
        )
        return fine


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip(" =.")[:150] if lines else "no output"


def check(options: argparse.Namespace, scratch: Path) -> int:
    """Run all stages."""
    library = "numpy" if options.rehearse else "cupy"
    out: Path = options.out
    run = Run(out, scratch, options.total)
    run.note(f"device: {', '.join(gpus()) or 'no GPU'}{'; a rehearsal on NumPy' if options.rehearse else ''}")
    python = sys.executable
    if options.wheels:
        wheels = sorted(str(path) for path in options.wheels.glob("*.whl"))
        command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(scratch / "site"), *wheels]
        run.stage(f"install {len(wheels)} wheels", command, out / "install.txt", LIMITS["install"])
    itself = [python, str(HERE / "gpu_check.py"), "--library", library, "--out", str(out), "--stage"]
    run.stage("versions", [*itself, "versions"], out / "versions.json", LIMITS["versions"])
    run.stage("parity", [*itself, "parity"], out / "parity.txt", LIMITS["parity"])

    parts = []

    def compare(library: str, dtype: str, rows: Sequence[str], limit: float) -> None:
        part = scratch / f"{library}-{dtype}.jsonl"
        parts.append(part)
        command = [python, str(HERE / "compare.py"), "--worker", library, "--json", str(part), "--dtype", dtype]
        command += ["--only", *rows, "--budget", "0.5", *(["--quick"] if options.rehearse else [])]
        run.stage(f"compare {library} {dtype}", command, scratch / "compare.txt", limit, part)

    compare(library, "float32", ROWS, LIMITS["compare"])
    which = "numpy and not readonly" if options.rehearse else "cupy"
    # One process: several would share one GPU's memory.
    command = [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", which, *options.tests]
    # What comes after must have its time too.
    run.stage("tests", command, out / "tests.txt", min(LIMITS["tests"], run.left - LIMITS["compare"]))
    compare(library, "float64", ROWS, min(LIMITS["compare"], run.left - 15.0))
    for other in () if options.rehearse else _others_on_gpu(out / "versions.json"):
        if run.left > 45.0:
            compare(other, "float32", ROWS[:4], min(60.0, run.left - 15.0))

    results = "".join(part.read_text(encoding="utf-8") for part in parts if part.exists())
    (out / "results.jsonl").write_text(results, encoding="utf-8")
    command = [python, str(HERE / "compare.py"), "--show", str(out / "results.jsonl")]
    run.stage("table", command, out / "table.txt", 30.0)
    run.note("failed" if run.failed else "all is well")
    return int(run.failed)


def _others_on_gpu(versions: Path) -> list[str]:
    """Which of torch and JAX are there and work on the GPU."""
    try:
        found = json.loads(versions.read_text(encoding="utf-8"))["libraries"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in ("torch", "jax") if found.get(name, {}).get("on_gpu")]


# ------------------------------------------------- what runs in processes of their own


def versions(library: str) -> int:
    """Print versions and devices; fail if the library cannot be used."""
    import platform
    from importlib import metadata

    from benchmarks import backends

    libraries: dict[str, Any] = {}
    for name in backends.NAMES:
        try:
            backend = backends.connect(name)
        except Exception as error:  # noqa: BLE001 a broken installation raises anything
            libraries[name] = {"missing": str(error)}
            continue
        libraries[name] = {"version": backend.version, "device": backend.device, "on_gpu": backend.on_gpu}
    packages = sorted(f"{dist.name}=={dist.version}" for dist in metadata.distributions())
    found = {"python": platform.python_version(), "gpus": gpus(), "libraries": libraries, "packages": packages}
    print(json.dumps(found, indent=1))
    return 0 if "version" in libraries[library] else 1


def parity(library: str) -> int:
    """Print how far a library is from NumPy on every public operation; fail if one is too far."""
    from benchmarks import backends, parity

    failed = 0
    for row in parity.rows(backends.connect(library)):
        print(row, flush=True)
        failed += not row.fine
    print(f"{failed} operations differ from NumPy" if failed else "all operations agree with NumPy")
    return int(failed > 0)


# --------------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tests, parity and speed on an NVIDIA GPU, without a network.")
    parser.add_argument("--wheels", metavar="DIR", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--rehearse", action="store_true", help="NumPy in place of CuPy; no GPU is needed")
    parser.add_argument("--tests", metavar="PATH", nargs="+", default=["tests"], help="test files to run")
    parser.add_argument("--total", metavar="SECONDS", type=float, default=TOTAL, help="time for everything")
    parser.add_argument("--stage", choices=("versions", "parity"), help=argparse.SUPPRESS)
    parser.add_argument("--library", default="cupy", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} holds no wheels")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse(arguments)
    if options.stage:
        return {"versions": versions, "parity": parity}[options.stage](options.library)
    if not options.rehearse and not gpus():
        print("gpu_check: no NVIDIA GPU, or no driver for it; --rehearse runs the stages on NumPy", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    if options.wheels:
        options.wheels = options.wheels.resolve()
    for name in ("summary.txt", "install.txt", "versions.json", "parity.txt", "tests.txt", "table.txt"):
        (options.out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        return check(options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
