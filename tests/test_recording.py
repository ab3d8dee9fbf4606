"""What the core asks of an array library: only what CuPy has too, and as often for one member as for fifty."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
from cases import factors, positive_definite
from recording import EXTENSIONS, Call, complaint, record

import natgrad_array as ng
from natgrad_array import deep_linear as dl
from natgrad_array import networks as nn
from natgrad_array import optimizers as opts
from natgrad_array.optimizers.presets import PRESETS
from natgrad_array.simulation.observables import OBSERVABLES

CUPY = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy has no build for this system")
SIZES = {"wide": (4, 6, 5, 3), "intermediate": (6, 5, 4, 3), "bottleneck": (5, 2, 4)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def psd(batch: int, n: int, seed: int = 0) -> np.ndarray:
    return positive_definite((batch,), n, seed)


def singular(batch: int, n: int, rank: int) -> np.ndarray:
    half = factors((batch,), n, n, rank)
    return half @ np.swapaxes(half, -1, -2)


def network(batch: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    layers = zip(sizes[1:], sizes[:-1], strict=True)
    return tuple(factors((batch,), m, n, min(m, n), seed) for seed, (m, n) in enumerate(layers))


def task(batch: int, sizes: tuple[int, ...], *, dead: int = 0) -> ng.GaussianTask:
    x, y = normal(1, batch, 40, sizes[0]), normal(2, batch, 40, sizes[-1])
    x[..., :dead] = 0.0
    return ng.GaussianTask.from_samples(x, y)


def pair(batch: int, kind: str = "wide") -> tuple[tuple[np.ndarray, ...], ng.GaussianTask]:
    return network(batch, SIZES[kind]), task(batch, SIZES[kind])


def deferred(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def of_fisher(method: str, *args: Any, kind: str = "wide", **options: Any) -> Callable[[int], Callable[[], Any]]:
    def make(batch: int) -> Callable[[], Any]:
        weights, goal = pair(batch, kind)
        tangent = tuple(normal(3, *w.shape) for w in weights)
        given = tuple(tangent if arg == "tangent" else arg for arg in args)
        # Made inside, since it keeps what it has computed.
        return lambda: getattr(dl.fisher(weights, goal), method)(*given, **options)

    return make


def of_pair(function: Callable[..., Any], kind: str = "wide", **options: Any) -> Callable[[int], Callable[[], Any]]:
    return lambda batch: deferred(function, *pair(batch, kind), **options)


def of_weights(function: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    return lambda batch: deferred(function, network(batch, SIZES["wide"]))


def of_moments(method: str, *args: Any) -> Callable[[int], Callable[[], Any]]:
    def make(batch: int) -> Callable[[], Any]:
        moments = ng.Moments.from_samples(normal(0, batch, 9, 4))
        given = tuple(moments if arg == "self" else arg for arg in args)
        return lambda: getattr(moments, method)(*given)

    return make


NETWORKS = {
    "MLP": nn.MLP((3, 4, 2), activation="gelu"),
    "MLP bernoulli": nn.MLP((3, 4, 2), likelihood="bernoulli"),
    "MLP wide": nn.MLP((3, 12, 2)),
    "ConvNet": nn.ConvNet((4, 4, 2), (3,), (3,), stride=2, padding=1, likelihood="categorical"),
}


def problem(batch: int, name: str) -> tuple[nn.Network, tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """A network, an ensemble of its parameters, inputs and targets."""
    net = NETWORKS[name]
    x = normal(1, batch, 5, *net.layers[0].input_shape)
    outputs = normal(2, batch, 5, net.n_outputs)
    y = {"gaussian": outputs, "bernoulli": (outputs > 0.0) + 0.0, "categorical": outputs.argmax(axis=-1)}
    return net, net.init(0, (batch,), like=x), x, y[net.likelihood.name]


def of_optimizer(make: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    """One step of an optimizer."""

    def of(batch: int) -> Callable[[], Any]:
        net, params, x, y = problem(batch, "MLP")
        # With a share of the batch one scalar decides whether its loss is enough, and any member may say no.
        optimizer = make(**({"share": 1.0} if "share" in inspect.signature(make).parameters else {}))
        state, rng = optimizer.init(net, params), np.random.default_rng(0)
        return lambda: optimizer.step(net, params, state, x, y, rng)

    return of


def train(members: int) -> None:
    """A few steps with averages, draws from the model, minibatches, and a member that comes to rest."""
    net, params, x, y = problem(members, "MLP")
    options: dict[str, Any] = {"optimizer": opts.kfac(share=1.0), "steps": 2, "batch_size": 3, "rng": 0}
    options["record_every"] = 2
    ng.simulation.simulate_training(net, params, (x, y), freeze_converged=1e3, **options)


def of_network(method: str, *names: str) -> Callable[[str], Callable[[int], Callable[[], Any]]]:
    """A method of a network, by the names of its arguments."""

    def of(name: str) -> Callable[[int], Callable[[], Any]]:
        def make(batch: int) -> Callable[[], Any]:
            net, params, x, y = problem(batch, name)
            trace = net.forward(params, x)
            known = {"params": params, "x": x, "y": y, "trace": trace, "outputs": trace.output}
            return lambda: getattr(net, method)(*(known[name] for name in names))

        return make

    return of


def of_network_fisher(method: str, *args: Any, **options: Any) -> Callable[[str], Callable[[int], Callable[[], Any]]]:
    def of(name: str) -> Callable[[int], Callable[[], Any]]:
        def make(batch: int) -> Callable[[], Any]:
            net, params, x, _ = problem(batch, name)
            given = tuple(params if arg == "tangent" else arg for arg in args)
            return lambda: getattr(net.fisher(params, x), method)(*given, **options)

        return make

    return of


def of_estimate(use: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    def make(batch: int) -> Callable[[], Any]:
        net, params, x, y = problem(batch, "ConvNet")
        return lambda: use(net, params, x, y)

    return make


#: Named calls: the public name, a remark after a space, and from a batch size a call to record.
CALLS: dict[str, Callable[[int], Callable[[], Any]]] = {
    # linalg
    **{
        f"pinvh {method}": lambda b, m=method: deferred(ng.pinvh, psd(b, 5), method=m)
        for method in ("auto", "eigh", "cholesky")
    },
    "pinvh singular": lambda b: deferred(ng.pinvh, singular(b, 5, 3), method="eigh"),
    "pinvh empty": lambda b: deferred(ng.pinvh, np.zeros((b, 0, 0))),
    "pinvh integers": lambda b: deferred(ng.pinvh, np.ones((b, 3, 3), dtype=int)),
    "pinvh rtol per member": lambda b: deferred(ng.pinvh, psd(b, 5), rtol=np.full(b, 0.1)),
    "pinvh cholesky, rtol per member": lambda b: deferred(
        ng.pinvh, psd(b, 5), rtol=np.full(b, 1e-9), method="cholesky"
    ),
    "pinvh large": lambda b: deferred(ng.pinvh, psd(b, 17), method="cholesky"),
    "precondition": lambda b: deferred(ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3)),
    "precondition damped": lambda b: deferred(ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3), damping=0.1),
    "precondition damped per member": lambda b: deferred(
        ng.precondition, normal(0, b, 4, 3), psd(b, 4), psd(b, 3), damping=np.full(b, 0.1), rtol=np.full(b, 1e-3)
    ),
    # moments
    "second_moment": lambda b: deferred(ng.second_moment, normal(0, b, 9, 4)),
    "second_moment of two": lambda b: deferred(ng.second_moment, normal(0, b, 9, 4), normal(1, b, 9, 2)),
    "second_moment weighted": lambda b: deferred(
        ng.second_moment, normal(0, b, 9, 4), normal(1, b, 9, 2), weights=np.ones((b, 9))
    ),
    "covariance": lambda b: deferred(ng.covariance, normal(0, b, 9, 4)),
    "covariance weighted": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), weights=np.ones((b, 9)), correction=1),
    "covariance centred": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), assume_centered=True, shrinkage=0.1),
    "covariance ledoit_wolf": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), shrinkage="ledoit_wolf"),
    "covariance oas": lambda b: deferred(ng.covariance, normal(0, b, 9, 4), shrinkage="oas"),
    **{
        f"covariance many samples {name}, mean {mean}": lambda b, name=name, mean=mean: deferred(
            ng.covariance, normal(0, b, 90, 4) + mean, shrinkage=name
        )
        for name in (None, "ledoit_wolf", "oas")
        for mean in (0, 5)
    },
    "Moments.from_samples": lambda b: deferred(ng.Moments.from_samples, normal(0, b, 9, 4)),
    "Moments.from_samples many samples": lambda b: deferred(ng.Moments.from_samples, normal(0, b, 90, 4)),
    "Moments.from_samples weighted": lambda b: deferred(
        ng.Moments.from_samples, normal(0, b, 9, 4), weights=np.ones((b, 9))
    ),
    "Moments.empty": lambda b: deferred(ng.Moments.empty, 4, like=normal(0, 1), batch_shape=(b,)),
    "Moments.merge": of_moments("merge", "self"),
    "Moments.discount": of_moments("discount", 0.5),
    "Moments.second_moment": of_moments("second_moment"),
    "Moments.covariance": of_moments("covariance"),
    # deep_linear: the task
    "GaussianTask": lambda b: deferred(ng.GaussianTask, psd(b, 4), psd(b, 3), normal(0, b, 3, 4) / 200, 9 * psd(b, 3)),
    "GaussianTask.from_samples": lambda b: deferred(
        ng.GaussianTask.from_samples, normal(0, b, 9, 4), normal(1, b, 9, 2)
    ),
    "GaussianTask.from_samples dead inputs": lambda b: deferred(task, b, (4, 2), dead=2),
    "GaussianTask.from_moments": lambda b: deferred(
        ng.GaussianTask.from_moments, ng.Moments.from_samples(normal(0, b, 9, 6)), 4
    ),
    "GaussianTask.from_modes": lambda b: deferred(
        ng.GaussianTask.from_modes, factors((b,), 3, 2, 2), np.ones((b, 2)), factors((b,), 4, 2, 2)
    ),
    "GaussianTask.optimum": lambda b: deferred(task(b, (4, 2)).optimum),
    "GaussianTask.minimum_loss": lambda b: deferred(task(b, (4, 2)).minimum_loss),
    # deep_linear: functions of weights and task
    **{
        f"deep_linear.{name}": of_weights(getattr(dl, name))
        for name in ("end_to_end", "end_to_end_kernel", "balancedness", "regime")
    },
    **{
        f"deep_linear.{name}": of_pair(getattr(dl, name))
        for name in ("loss", "excess_loss", "gradient", "fisher", "exact_velocity", "projections")
    },
    "deep_linear.end_to_end_velocity": lambda b: deferred(
        dl.end_to_end_velocity, network(b, SIZES["wide"]), network(b, SIZES["wide"])
    ),
    "deep_linear.exact_velocity bottleneck": of_pair(dl.exact_velocity, "bottleneck"),
    **{
        f"deep_linear.natural_gradient {inverse}, {kind}, {method}": of_pair(
            dl.natural_gradient, kind, inverse=inverse, method=method
        )
        for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal")
        for kind in SIZES
        for method in ("auto", "eigh", "cholesky")
        if (inverse, method) != ("moore_penrose", "cholesky")
    },
    "deep_linear.natural_gradient rtol per member": lambda b: deferred(
        dl.natural_gradient, *pair(b), rtol=np.full(b, 1e-9)
    ),
    "deep_linear.natural_gradient one layer": lambda b: deferred(
        dl.natural_gradient, network(b, (4, 3)), task(b, (4, 3)), inverse="moore_penrose"
    ),
    "deep_linear.natural_gradient dead inputs": lambda b: deferred(
        dl.natural_gradient, network(b, (4, 5, 3)), task(b, (4, 3), dead=1), inverse="moore_penrose"
    ),
    # deep_linear: the Fisher object
    "deep_linear.DeepLinearFisher.factors": of_fisher("factors", 0, 1),
    "deep_linear.DeepLinearFisher.block": of_fisher("block", 0, 1),
    "deep_linear.DeepLinearFisher.to_dense": of_fisher("to_dense"),
    "deep_linear.DeepLinearFisher.matvec": of_fisher("matvec", "tangent"),
    **{
        f"deep_linear.DeepLinearFisher.precondition {inverse}, {kind}": of_fisher(
            "precondition", "tangent", kind=kind, inverse=inverse
        )
        for inverse in ("layerwise", "exact", "moore_penrose", "block_diagonal")
        for kind in SIZES
    },
    "deep_linear.DeepLinearFisher.rank": of_fisher("rank"),
    "deep_linear.DeepLinearFisher.spectrum": of_fisher("spectrum"),
    "deep_linear.DeepLinearFisher.logdet": of_fisher("logdet"),
    # deep_linear: dynamics and networks to start from
    "deep_linear.natural_gradient_flow": lambda b: deferred(
        dl.natural_gradient_flow, normal(0, b, 2, 4), task(b, (4, 2)), 0.5
    ),
    "deep_linear.natural_gradient_flow_modes": lambda b: deferred(
        dl.natural_gradient_flow_modes, np.full((b, 2), 0.1), np.full((b, 2), 2.0), 0.5
    ),
    **{
        f"deep_linear.gradient_flow_modes depth {depth}": lambda b, depth=depth: deferred(
            dl.gradient_flow_modes, np.full((b, 2), 0.1), np.full((b, 2), 2.0), 0.5, depth=depth
        )
        for depth in (1, 2, 3)
    },
    "deep_linear.euler_decay_rate": lambda b: deferred(dl.euler_decay_rate, np.full(b, 0.1)),
    **{
        f"deep_linear.{f.__name__}": lambda b, f=f: deferred(f, 0, (4, 5, 3), (b,), like=normal(0, 1))
        for f in (dl.gaussian, dl.small, dl.orthogonal, dl.balanced)
    },
    # networks
    **{
        f"networks.{name}, {method}": of(name)
        for name in NETWORKS
        for method, of in {
            "output": of_network("output", "params", "x"),
            "loss": of_network("loss", "params", "x", "y"),
            "gradient": of_network("gradient", "params", "x", "y"),
            "tangent": of_network("tangent", "params", "trace", "params"),
            "cotangent": of_network("cotangent", "params", "trace", "outputs"),
        }.items()
    },
    "networks.Network.init": lambda b: deferred(NETWORKS["MLP"].init, 0, (b,), like=normal(0, 1)),
    "networks.Dense.rows": lambda b: deferred(nn.Dense(3, 2).rows, normal(0, b, 5, 3)),
    "networks.Conv2d.rows": lambda b: deferred(nn.Conv2d((4, 4, 2), 3, padding=1).rows, normal(0, b, 5, 4, 4, 2)),
    "networks.Layer.backward": lambda b: deferred(
        nn.Conv2d((4, 4, 2), 3, padding=1).backward, normal(0, b, 3, 19), normal(1, b, 5, 16, 3)
    ),
    "networks.Likelihood.residual": lambda b: deferred(nn.Bernoulli().residual, normal(0, b, 5, 3), np.ones((b, 5, 3))),
    "networks.Trace": lambda b: deferred(NETWORKS["MLP"].forward, *problem(b, "MLP")[1:3]),
    "networks.Gaussian": lambda b: deferred(nn.Gaussian, psd(b, 3)),
    "networks.Gaussian.sample": lambda b: deferred(nn.Gaussian(psd(b, 3)).sample, normal(0, b, 5, 3), 0),
    "networks.Gaussian.metric_root": lambda b: deferred(nn.Gaussian(psd(b, 3)).metric_root, normal(0, b, 5, 3)),
    "networks.Bernoulli.sample": lambda b: deferred(nn.Bernoulli().sample, normal(0, b, 5, 3), 0, draws=(2,)),
    "networks.Categorical.sample": lambda b: deferred(nn.Categorical().sample, normal(0, b, 5, 3), 0, draws=(2,)),
    # optimizers
    **{f"optimizers.{name}": of_optimizer(make) for name, make in PRESETS.items()},
    **{
        f"optimizers.{type(inverse).__name__}": of_optimizer(
            lambda inverse=inverse: opts.Optimizer(opts.Empirical(), inverse)
        )
        for inverse in (opts.MoorePenrose(), opts.FullFisher())
    },
    "optimizers.saliencies": lambda b: deferred(opts.saliencies, *problem(b, "MLP")[:3]),
    "optimizers.prune": lambda b: deferred(opts.prune, *problem(b, "MLP")[:3]),
    # adapters
    "adapters.kronecker_factors": lambda b: deferred(
        ng.adapters.kronecker_factors, [normal(0, b, 5, 3)], [normal(1, b, 5, 2)]
    ),
    **{
        f"adapters.precondition {inverse}": lambda b, inverse=inverse: deferred(
            ng.adapters.precondition,
            [normal(0, b, 2, 3)],
            [(psd(b, 3), psd(b, 2))],
            damping=0.0 if inverse == "moore_penrose" else 0.1,
            inverse=inverse,
        )
        for inverse in ("factored", "tikhonov", "moore_penrose", "root")
    },
    # the Fisher information of networks
    **{
        f"NetworkFisher.{method}, {name}": of(name)
        for name in NETWORKS
        for method, of in {
            "to_dense": of_network_fisher("to_dense"),
            "block": of_network_fisher("block", 0, 1),
            "matvec": of_network_fisher("matvec", "tangent"),
            "layerwise": of_network_fisher("precondition", "tangent"),
            "damped": of_network_fisher("precondition", "tangent", damping=0.1),
            "moore_penrose": of_network_fisher("precondition", "tangent", inverse="moore_penrose"),
            "block_diagonal": of_network_fisher("precondition", "tangent", inverse="block_diagonal", rtol=1e-9),
            "spectrum": of_network_fisher("spectrum"),
            "rank": of_network_fisher("rank"),
        }.items()
        # With fewer samples than inputs some moments are singular: `pinvh` takes members by what they need.
        if (name, method) != ("MLP wide", "layerwise")
    },
    "FisherEstimate": of_estimate(lambda net, params, x, y: ng.empirical_fisher(net, params, x, y).matvec(params)),
    "FisherEstimate.standard_error": of_estimate(
        lambda net, params, x, y: ng.sampled_fisher(net, params, x, 0, n_samples=3).standard_error()
    ),
    "FisherComparison": of_estimate(
        lambda net, params, x, y: net.fisher(params, x).compare(
            ng.empirical_fisher(net, params, x, y), params, damping=0.1
        )
    ),
    "sampled_fisher": of_estimate(lambda net, params, x, y: ng.sampled_fisher(net, params, x, 0, n_samples=2)),
    "empirical_fisher": of_estimate(ng.empirical_fisher),
    # simulation
    **{
        f"simulate {name}": of_pair(ng.simulate, learning_rate=0.001, steps=3, record_every=3, **options)
        for name, options in {
            "loss": {},
            "all": {"record": tuple(OBSERVABLES), "rule": "exact"},
            "rk4": {"integrator": "rk4", "rule": "gradient"},
            "exponential": {"integrator": "exponential", "rule": "exact"},
            "noise": {"temperature": 0.1, "label_noise": 0.1, "rng": 0, "freeze_converged": 0.1},
        }.items()
    },
    "simulate_training": lambda b: deferred(train, b),
    # verification
    "verify": of_pair(ng.verify),
    "verify bottleneck": of_pair(ng.verify, "bottleneck"),
    "check_preconditioner": lambda b: deferred(ng.check_preconditioner, lambda gradient: gradient, *pair(b)),
}


#: These read shapes, or what was computed when the object was made, or work by operators alone.
NO_CALLS = {
    "GaussianTask.optimum",
    "GaussianTask.minimum_loss",
    "deep_linear.end_to_end",
    "deep_linear.end_to_end_velocity",
    "deep_linear.natural_gradient_flow",
    "deep_linear.regime",
}


def cupy_namespace() -> ModuleType:
    """CuPy's namespace with its extensions, which are modules of their own; no GPU is needed."""
    for extension in EXTENSIONS:
        importlib.import_module(f"array_api_compat.cupy.{extension}")
    return importlib.import_module("array_api_compat.cupy")


def public_callables() -> set[str]:
    """The public functions and classes, by their path from the package."""
    names = {name for name in ng.__all__ if not inspect.ismodule(getattr(ng, name))}
    names |= {f"networks.{name}" for name in nn.__all__} | {f"adapters.{name}" for name in ng.adapters.__all__}
    return names | {f"deep_linear.{name}" for name in dl.__all__ if name != "GaussianTask"}


def test_every_public_callable_is_recorded() -> None:
    recorded = {name.split(" ")[0].rstrip(",") for name in CALLS}
    missing = {name for name in public_callables() if not any(r == name or r.startswith(name + ".") for r in recorded)}
    assert not missing


@CUPY
@pytest.mark.parametrize("name", CALLS)
def test_calls_exist_in_cupy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, CALLS[name](3))
    assert calls or name in NO_CALLS
    reasons = [complaint(call, cupy_namespace()) for call in set(calls)]
    assert not [reason for reason in reasons if reason is not None]


@pytest.mark.parametrize("name", CALLS)
def test_calls_do_not_grow_with_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three, fifty = (Counter(record(monkeypatch, CALLS[name](batch))) for batch in (1, 3, 50))
    assert one == three
    assert one == fifty


@CUPY
def test_array_attributes_exist_in_cupy() -> None:
    """Attributes of NumPy arrays that the sources name are attributes of CuPy's arrays."""
    import cupy

    used = set()
    for module in pkgutil.walk_packages(ng.__path__, "natgrad_array."):
        # The command line works on NumPy arrays, `_arrays` asks each library for what is its own,
        # and torch's tensors are no business of CuPy.
        if module.name.startswith(("natgrad_array.cli", "natgrad_array._arrays", "natgrad_array.adapters.torch")):
            continue
        path = module.module_finder.find_spec(module.name, None).origin  # type: ignore[union-attr, call-arg]
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    on_arrays = {name for name in used if hasattr(np.ndarray, name) and not name.startswith("__")}
    assert {"mT", "shape", "dtype"} <= on_arrays
    assert not {name for name in on_arrays if not hasattr(cupy.ndarray, name)}


def test_the_recording_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, lambda: ng.pinvh(np.eye(2)))
    assert any(call.function == "linalg.diagonal" for call in calls)
    assert Call("isdtype", (), 2) in calls
    # The monkeypatch is gone.
    assert isinstance(ng.pinvh(np.eye(2)), np.ndarray)
    assert ng.linalg._arrays.check_arrays({"a": np.eye(2)}) is array_api_compat.numpy


@CUPY
@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (Call("linalg.eigh", (), 1), False),
        (Call("linalg.svd", ("full_matrices",), 1), False),
        (Call("max", ("axis", "keepdims"), 1), False),
        (Call("minimum", (), 2), False),
        (Call("linalg.eigh", ("UPLO",), 1), True),  # would vanish in **kwargs
        (Call("linalg.inv", ("hermitian",), 1), True),
        (Call("linalg.no_such_function", (), 1), True),
        (Call("no_such_function", (), 1), True),
        (Call("matrix_transpose", (), 2), True),
        (Call("minimum", (), 3), True),
        (Call("sqrt", ("where",), 1), True),
        (Call("max", ("initial",), 1), True),
    ],
    ids=str,
)
def test_complaint_can_complain(call: Call, wrong: bool) -> None:
    assert (complaint(call, cupy_namespace()) is not None) == wrong
