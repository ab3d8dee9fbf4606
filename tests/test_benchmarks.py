"""The opponents are correct where they say so, and the commands of the benchmarks work."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import compare
import gpu_check
import numpy as np
import pytest
from benchmarks import backends, contests, measure, parity, peers, problems

import natgrad_array as ng

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [name for name in ("numpy", "torch", "jax") if importlib.util.find_spec(name)]
NETWORKS = {
    "square": (6, 6, 6, 6),
    "contracting": (9, 7, 5, 4),
    "expanding": (4, 5, 7, 9),
    "narrow": (8, 3, 8),
    "bottleneck": (8, 6, 3, 6, 8),
    "two bottlenecks": (8, 6, 7, 3, 4, 6),
}

TINY = {
    "pinvh": {"batch": 5, "n": 6},
    "pinvh-half-rank": {"batch": 5, "n": 6},
    "pinvh-one-deficient": {"batch": 5, "n": 6},
    "precondition": {"batch": 3, "m": 4, "n": 5},
    "layerwise": {"sizes": (6, 5, 4), "batch": 3, "weights": "orthogonal", "noise": "general"},
    "small": {"sizes": (4, 4, 4), "batch": 1, "weights": "orthogonal"},
    "exact": {"sizes": (6, 5, 4), "batch": 3, "weights": "orthogonal"},
    "simulation": {"sizes": (4, 4, 4, 4), "batch": 3, "steps": 5},
    "moore-penrose": {"sizes": (4, 4, 4, 4), "batch": 2, "weights": "orthogonal"},
    "covariance": {"batch": 3, "n": 20, "p": 4},
    "ledoit-wolf": {"batch": 3, "n": 20, "p": 4, "shrinkage": "ledoit_wolf"},
    "oas": {"batch": 3, "n": 20, "p": 4, "shrinkage": "oas"},
    "streaming": {"batch": 2, "n": 20, "p": 4, "chunk": 6},
    "fisher-matvec": {"sizes": (4, 5, 3), "n": 20},
    "fisher-dense": {"sizes": (4, 5, 3), "n": 20},
    "autoencoder-step": {"sizes": (4, 3, 4), "samples": 20},
    "ensemble-step": {"sizes": (4, 3, 2), "batch": 3, "samples": 20, "preset": "kfac"},
}


def host(backend, result):
    items = result if isinstance(result, list | tuple) else (result,)
    return tuple(backend.to_numpy(item) for item in items)


def test_every_contest_is_tried_here():
    assert set(TINY) == set(contests.CONTESTS)
    assert all(set(contest.quick) <= set(contest.cases) for contest in contests.CONTESTS.values())


# ---------------------------------------------------------------------------- the opponents


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, name) for name in TINY for library in LIBRARIES if library in contests.CONTESTS[name].libraries],
)
# torch's own automatic differentiation calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_contestants_agree(library, name):
    backend, contest = backends.connect(library), contests.CONTESTS[name]
    ours, *others = contest.enter(backend, "float64", **TINY[name])
    assert ours.kind == "ours"
    assert others[-1].kind == "product"
    expected = host(backend, ours.ready(backend)())
    for entry in others:
        result = entry.ready(backend)()
        if entry.kind not in ("written", "expert"):
            continue
        if entry.scale == 1.0 and name != "moore-penrose":
            assert measure.relative_difference(host(backend, result), expected).max() < 1e-10, entry.label
        elif entry.kind == "expert":
            assert measure.relative_difference(host(backend, result), expected).max() < 1e-8, entry.label
        else:  # members one at a time: a list of directions
            for k, direction in enumerate(result):
                member = tuple(part[k] for part in expected)
                assert measure.relative_difference(host(backend, direction), member).max() < 1e-8, entry.label


@pytest.mark.parametrize("noise", ["identity", "general"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layerwise_peers_are_correct_in_every_regime(name, noise):
    sizes = NETWORKS[name]
    layers, task, known = contests.network(backends.connect("numpy"), "float64", sizes, 4, "orthogonal", noise)
    expected = ng.deep_linear.natural_gradient(layers, task)
    variants = {"written": functools.partial(peers.written, np)} | peers.layerwise_experts(np, sizes)
    assert ("inverse of each layer" in variants) == (name == "square")
    for label, variant in variants.items():
        assert measure.relative_difference(variant(layers, known), expected).max() < 1e-10, label


class Counted:
    """Products and inverses, with their sizes written down."""

    def __init__(self):
        self.products, self.inverses = [], []

    def times(self, a, *others):
        for b in others:
            self.products.append("x".join(map(str, (*a.shape[-2:], b.shape[-1]))))
            a = a @ b
        return a

    def inverse(self, a):
        self.inverses.append(str(a.shape[-1]))
        return np.linalg.inv(a)


def contracting(count, layers, moment, optimum):
    w1, w2, w3 = layers
    seen = count.times(w1, moment)
    first = count.times(seen, w1.mT)
    second = count.times(count.times(w2, first), w2.mT)
    ahead = count.times(w3, w2)
    last, both = count.times(w3, w3.mT), count.times(ahead, ahead.mT)
    error = count.times(ahead, w1) - optimum
    onto_first = count.times(error, seen.mT)
    onto_second = count.times(onto_first, w2.mT)
    return (
        count.times(ahead.mT, count.times(count.inverse(both), error)),
        count.times(w3.mT, count.times(count.inverse(last), count.times(onto_first, count.inverse(first)))),
        count.times(onto_second, count.inverse(second)),
    )


def expanding(count, layers, moment, optimum):
    w1, w2, w3 = layers
    last = count.times(w3.mT, w3)
    both = count.times(count.times(w2.mT, last), w2)
    behind = count.times(w2, w1)
    first, second = count.times(w1.mT, w1), count.times(behind.mT, behind)
    error = count.times(w3, behind) - optimum
    onto_last = count.times(w3.mT, error)
    onto_both = count.times(w2.mT, onto_last)
    return (
        count.times(count.inverse(both), onto_both),
        count.times(count.inverse(last), onto_last, count.inverse(first), w1.mT),
        count.times(error, count.inverse(second), behind.mT),
    )


def waisted(count, layers, moment, optimum):
    w1, w2 = layers
    front, seen = count.inverse(count.times(w2.mT, w2)), count.times(w1, moment)
    back = count.inverse(count.times(seen, w1.mT))
    return (
        w1 - count.times(front, count.times(w2.mT, optimum)),
        w2 - count.times(back, count.times(w1, moment @ optimum.mT)).mT,
    )


@pytest.mark.parametrize("way", [contracting, expanding, waisted])
def test_the_arithmetic_alone_is_that_of_a_way_that_is_correct(way):
    sizes = {contracting: (48, 32, 24, 16), expanding: (16, 24, 32, 48), waisted: (32, 8, 32)}[way]
    layers, task, known = contests.network(backends.connect("numpy"), "float64", sizes, 2, "orthogonal", "identity")
    count = Counted()
    directions = tuple(d / len(layers) for d in way(count, layers, known.moment, known.optimum))
    assert measure.relative_difference(directions, ng.deep_linear.natural_gradient(layers, task)).max() < 1e-10
    products, inverses = (words.split() for words in peers.ARITHMETIC[sizes])
    assert sorted(products) == sorted(count.products)
    assert sorted(inverses) == sorted(count.inverses)


def test_written_rule_needs_its_cutoff_at_a_bottleneck(monkeypatch):
    """In float32 the cut-off n·eps tells rank from rounding, NumPy's own default does not."""
    sizes = NETWORKS["bottleneck"]
    layers, task, known = contests.network(backends.connect("numpy"), "float32", sizes, 4, "orthogonal", "identity")
    expected = ng.deep_linear.natural_gradient(layers, task)
    assert measure.relative_difference(peers.written(np, layers, known), expected).max() < 1e-4
    monkeypatch.setattr(peers, "pinv", lambda xp, a: xp.linalg.pinv(a, hermitian=True))
    assert measure.relative_difference(peers.written(np, layers, known), expected).min() > 1.0


def test_checked_covariances_by_hand_are_numpys():
    x = problems.samples(3, 90, 5, "float64")
    far = x + 1e9 * (np.arange(3) == 1)[:, None, None]
    for given, fits in ((x, True), (far, False)):
        expected = peers.numpy_cov(given)
        cov, found = peers.checked_covariance(np, given)
        streamed, flags = peers.checked_stream(np, (given[:, :40], given[:, 40:]))
        assert (found, *flags) == (fits,) * 3
        for actual in (cov, streamed):
            np.testing.assert_allclose(actual, expected, rtol=1e-12 if fits else 1e-3, atol=1e-12 if fits else 0.1)


def test_shrinkage_by_hand_is_scikit_learns():
    pytest.importorskip("sklearn")
    x = problems.samples(3, 30, 5, "float64")
    for name, by_hand in (("ledoit_wolf", peers.ledoit_wolf), ("oas", peers.oas)):
        np.testing.assert_allclose(by_hand(np, x), peers.sklearn_loop(name, x), rtol=1e-12)


def test_reference_is_better_than_double():
    """Eq 34 by exact fractions on integer layers."""
    layers = (np.asarray([[2.0, 1.0], [1.0, 1.0]]), np.asarray([[3.0, 1.0], [2.0, 1.0]]))
    first, second = peers.reference_direction(layers, np.eye(2), np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    # W_2⁻¹ W* = [[-2, -2], [7, 8]] and W* W_1⁻¹ = [[-1, 3], [-1, 5]].
    np.testing.assert_array_equal(np.asarray(first, dtype=float), [[2.0, 1.5], [-3.0, -3.5]])
    np.testing.assert_array_equal(np.asarray(second, dtype=float), [[2.0, -1.0], [1.5, -2.0]])


# ------------------------------------------------------------------------ what is measured


def test_interleave_takes_turns_and_times_slow_calls_once():
    calls = []
    samples = measure.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, budget=1e9, warm=False
    )
    assert [len(times) for times in samples.values()] == [4, 4]
    assert {"a", "b"} == set(calls)
    assert [len(times) for times in measure.interleave({"a": lambda: None}, budget=1e-12).values()] == [1]


def test_interleave_lets_the_fast_go_on_when_the_slow_have_had_their_share(monkeypatch):
    now = [0.0]

    def taking(seconds):
        def call():
            now[0] += seconds

        return call

    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: None))
    calls = {"fast": taking(0.125), "slow": taking(2.0), "slower": taking(64.0)}
    samples = measure.interleave(calls, rounds=8, budget=15.0, warm=False)
    assert samples == {"fast": [0.125] * 8, "slow": [2.0] * 4, "slower": [64.0]}
    assert measure.interleave(calls, rounds=2, budget=2.0, warm=False)["slow"] == [2.0] * 2


def test_count_of_library_calls_does_not_depend_on_members():
    counts = [measure.count_calls(lambda n=n: ng.pinvh(problems.definite(n, 4, "float64"))) for n in (2, 50)]
    assert counts[0] == counts[1] > 0


def test_peak_is_that_of_the_arrays():
    backend = backends.connect("numpy")
    assert 8_000_000 <= measure.peak_bytes(backend, lambda: np.ones(1_000_000)) < 9_000_000


def test_missing_library_is_what_asv_skips(monkeypatch):
    backends.connect.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NotImplementedError, match="cupy is not installed"):
        backends.connect("cupy")


def test_parity_of_numpy_with_itself(monkeypatch):
    monkeypatch.setattr(parity, "NETWORKS", {"contracting": (4, 3, 2)})
    rows = list(parity.rows(backends.connect("numpy")))
    assert all(row.fine and row.difference == 0.0 for row in rows)
    assert not parity.Row("x", "float64", 1.0).fine
    assert not parity.Row("x", "float64", float("nan")).fine


# -------------------------------------------------------------------------- the commands


def results(name="layerwise", library="numpy", dtype="float64"):
    entries = contests.CONTESTS[name].enter(backends.connect(library), dtype, **TINY[name])
    head = {"row": name, "problem": "tiny", "library": library, "dtype": dtype}
    return head | compare.race_entries(entries, library, rounds=2, budget=0.01)


def test_table_names_the_contestants():
    machine = {"machine": compare.describe(backends.connect("numpy"))}
    accuracy = contests.accuracy(backends.connect("numpy"), "float64", sizes=(4, 4, 4), batch=3, weights="orthogonal")
    errors = {"row": "accuracy", "problem": "tiny", "library": "numpy", "dtype": "float64", "errors": accuracy}
    text = compare.table(json.loads(json.dumps([machine, results(), results("pinvh"), errors])))
    assert text.splitlines()[1].startswith(f"numpy {np.__version__} on ")
    assert "(Eq 42 as written)" in text
    assert "Gram" in text
    assert "(pinv(hermitian))" in text
    assert "inverse of each layer" in text
    assert "0.00 %" in text
    assert " off" not in text.partition("members off")[0]


def test_contestant_that_fails_or_is_off_is_said_to():
    def fail(a):
        raise np.linalg.LinAlgError("Singular matrix\nin member 3")

    a = problems.definite(3, 4, "float64")
    entries = [
        contests.Contestant("pinvh", "ours", ng.pinvh, (a,)),
        contests.Contestant("zero", "expert", np.zeros_like, (a,)),
        contests.Contestant("no", "written", fail, (a,)),
    ]
    result = compare.race_entries(entries, "numpy", rounds=1, budget=0.0)
    assert result["times"][2] == {"label": "no", "kind": "written", "failed": "Singular matrix"}
    cells = compare.cells(result | {"row": "pinvh", "problem": "tiny", "dtype": "float64"})
    assert cells[6] == "failed"
    assert cells[7].endswith("(zero, off)")


def test_compare_shows_what_it_kept(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(results()) + '\n{"row": "cut o', encoding="utf-8")
    assert compare.main(["--show", str(path)]) == 0
    assert "layerwise direction" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--backend", "fortran"]])
def test_compare_rejects_unknown_names(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.parse(arguments)
    assert exit_.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_gpu_check_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "gpus", list)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_check_arguments(tmp_path, capsys):
    options = gpu_check.parse(["--out", "out", "--rehearse"])
    assert options.rehearse
    assert options.wheels is None
    assert options.total < 9 * 60
    for arguments in ([], ["--out", "out", "--wheels", str(tmp_path)]):
        with pytest.raises(SystemExit) as exit_:
            gpu_check.parse(arguments)
        assert exit_.value.code == 2
    assert "holds no wheels" in capsys.readouterr().err


def test_gpu_check_stages_end_by_themselves(tmp_path):
    run = gpu_check.Run(tmp_path, tmp_path, total=600.0)
    log = tmp_path / "log.txt"
    assert run.stage("fine", [sys.executable, "-c", "print('done')"], log, 60.0)
    assert not run.failed
    assert not run.stage("bad", [sys.executable, "-c", "raise SystemExit(3)"], log, 60.0)
    assert run.failed
    run.end = 0.0
    assert not run.stage("late", [sys.executable, "-c", "pass"], log, 60.0)
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in summary] == ["fine: ok", "bad: exit status 3", "late: left out"]


def test_modules_of_the_suite_import_and_have_benchmarks():
    """ASV finds benchmarks by their names; base classes must not be among them."""
    code = (
        "import inspect\n"
        "from benchmarks import fisher, linalg, moments, natural, suite, training, verification\n"
        "for module in (fisher, linalg, moments, natural, training, verification):\n"
        "    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, (suite.Timed,\n"
        "               suite.Raced, suite.Peak, suite.Calls))]\n"
        "    assert classes and not any(inspect.isabstract(c) for c in classes), module\n"
        "    assert all(len(c.params) == len(c.param_names) for c in classes), module\n"
        "assert all(inspect.isabstract(c) for c in (suite.Timed, suite.Raced, suite.Peak, suite.Calls))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "asv_benchmarks")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
