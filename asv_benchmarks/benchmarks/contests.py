"""The library against its peers: rows of the comparison, shared by ASV and by the table."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import natgrad_array as ng
from benchmarks import backends, measure, peers, problems
from benchmarks.backends import Backend
from natgrad_array import _arrays
from natgrad_array.deep_linear.slopes import slope
from natgrad_array.optimizers.presets import PRESETS

dl = ng.deep_linear


@dataclass(frozen=True)
class Contestant:
    """One way to compute a result.

    Parameters
    ----------
    label : str
        Its name in tables.
    kind : {"ours", "written", "expert", "other", "product"}
        "written" is what a user would write, "expert" hand-optimised code that is correct
        on this problem, "other" something to compare with that does not compute the same,
        "product" the matrix products of the same shapes.
    function : callable
        Takes `arguments` and nothing else: on JAX it is compiled with them traced.
    arguments : tuple
        Arrays, in nested tuples and tasks.
    jit : bool
        Whether the library's compiler takes it.
    scale : float
        What a time is multiplied by, where only some of the members are computed.
    """

    label: str
    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    jit: bool = True
    scale: float = 1.0

    def ready(self, backend: Backend) -> Callable[[], Any]:
        """A call without arguments that returns when the result is there."""
        function = backend.jit(self.function) if self.jit else self.function
        arguments, synchronise = self.arguments, backend.synchronise

        def call() -> Any:
            result = function(*arguments)
            synchronise(result)
            return result

        return call


Case = Mapping[str, Any]


@dataclass(frozen=True)
class Contest:
    """A row of the comparison.

    Parameters
    ----------
    title : str
        What is computed.
    enter : callable
        ``enter(backend, dtype, **case)`` gives the contestants, ours first.
    cases : mapping of str to mapping
        Problems by their label: the keywords of `enter`.
    quick : sequence of str
        The labels that a quick run takes.
    libraries : sequence of str
        Where it runs.
    """

    title: str
    enter: Callable[..., list[Contestant]]
    cases: Mapping[str, Case]
    quick: Sequence[str] = ()
    libraries: Sequence[str] = field(default=backends.NAMES)


def to(backend: Backend, value: Any) -> Any:
    """Arrays in nested tuples on a backend."""
    if isinstance(value, tuple):
        items = [to(backend, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value if value is None else backend.asarray(value)


# ----------------------------------------------------------------------- linear algebra


def _square(a: Any) -> Any:
    return a @ a


def _traced(backend: Backend, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Contestant]:
    """On JAX ours is called as it is, and runs compiled functions that it chooses by a look at the members.

    Beside it stands what it takes within a `jax.jit` of the user's.
    """
    return [Contestant("within a jit", "other", function, arguments)] if backend.name == "jax" else []


def pinvh_full_rank(backend: Backend, dtype: str, *, batch: int, n: int) -> list[Contestant]:
    """`pinvh` of positive-definite matrices."""
    xp, a = backend.xp, backend.asarray(problems.definite(batch, n, dtype))
    return [
        Contestant("pinvh", "ours", ng.pinvh, (a,), jit=False),
        Contestant("pinv(hermitian)", "written", functools.partial(peers.pinv, xp), (a,)),
        Contestant("inverse, rank not looked at", "other", functools.partial(peers.inverse, xp), (a,)),
        *_traced(backend, ng.pinvh, (a,)),
        Contestant("a @ a", "product", _square, (a,)),
    ]


def pinvh_half_rank(backend: Backend, dtype: str, *, batch: int, n: int) -> list[Contestant]:
    """`pinvh` of matrices of rank n/2, all of them."""
    a = backend.asarray(problems.half_rank(batch, n, dtype))
    return [
        Contestant("pinvh", "ours", ng.pinvh, (a,), jit=False),
        Contestant("pinv(hermitian)", "written", functools.partial(peers.pinv, backend.xp), (a,)),
        Contestant("pinv, symmetric in and out", "other", functools.partial(peers.symmetric_pinv, backend.xp), (a,)),
        *_traced(backend, ng.pinvh, (a,)),
        Contestant("a @ a", "product", _square, (a,)),
    ]


def pinvh_one_deficient(backend: Backend, dtype: str, *, batch: int, n: int) -> list[Contestant]:
    """`pinvh` of a stack in which one member has rank n/2."""
    a = backend.asarray(problems.one_deficient(batch, n, dtype))
    full = backend.asarray(problems.definite(batch, n, dtype))
    return [
        Contestant("pinvh", "ours", ng.pinvh, (a,)),
        Contestant("pinv(hermitian)", "written", functools.partial(peers.pinv, backend.xp), (a,)),
        Contestant("pinvh, all of full rank", "other", ng.pinvh, (full,)),
        Contestant("a @ a", "product", _square, (a,)),
    ]


def precondition(backend: Backend, dtype: str, *, batch: int, m: int, n: int) -> list[Contestant]:
    """`precondition` of a stack of gradients."""
    left, right = (backend.asarray(problems.definite(batch, size, dtype)) for size in (m, n))
    grad = backend.asarray(problems.samples(batch, m, n, dtype))
    return [
        Contestant("precondition", "ours", ng.precondition, (grad, left, right)),
        Contestant(
            "two pinv", "written", functools.partial(peers.pinv_preconditioned, backend.xp), (grad, left, right)
        ),
        Contestant("left @ grad @ right", "product", lambda g, a, b: a @ g @ b, (grad, left, right)),
    ]


# -------------------------------------------------------------------- natural gradients


def network(
    backend: Backend, dtype: str, sizes: tuple[int, ...], batch: int, weights: str, noise: str
) -> tuple[Any, Any, Any]:
    """Weights, the library's task, and what the peers know of it."""
    moments = problems.task(sizes[0], sizes[-1], noise, dtype)
    layers = to(backend, problems.weights(sizes, batch, weights, dtype))
    task = ng.GaussianTask(*to(backend, tuple(moments)))
    return layers, task, to(backend, peers.known(moments.moment, moments.noise, moments.cross))


def _layer_squares(layers: Any) -> Any:
    return tuple(layer @ layer.mT for layer in layers)


def _product(layers: Any) -> Contestant:
    return Contestant("W_i @ W_iᵀ of each layer", "product", _layer_squares, (layers,))


def _natural(inverse: str) -> Callable[..., Any]:
    return lambda layers, task: dl.natural_gradient(layers, task, inverse=inverse)


def layerwise(
    backend: Backend, dtype: str, *, sizes: tuple[int, ...], batch: int, weights: str, noise: str = "identity"
) -> list[Contestant]:
    """One direction of the layerwise rule for an ensemble."""
    layers, task, known = network(backend, dtype, sizes, batch, weights, noise)
    entries = [
        Contestant("layerwise", "ours", _natural("layerwise"), (layers, task), jit=False),
        Contestant("Eq 42 as written", "written", functools.partial(peers.written, backend.xp), (layers, known)),
    ]
    for label, variant in peers.layerwise_experts(backend.xp, sizes).items():
        entries.append(Contestant(label, "expert", variant, (layers, known)))
    condition = "good" if weights == "orthogonal" else "pairs" if dtype == "float64" else "layers"
    if (bare := peers.arithmetic(backend.xp, layers, condition=condition)) is not None:
        entries.append(Contestant("arithmetic alone", "other", *bare))
    return [*entries, *_traced(backend, _natural("layerwise"), (layers, task)), _product(layers)]


def simulation(backend: Backend, dtype: str, *, sizes: tuple[int, ...], batch: int, steps: int) -> list[Contestant]:
    """Steps of the layerwise rule with the loss recorded at each; the same steps bare, and by loops of experts."""
    moments = problems.task(sizes[0], sizes[-1], "identity", dtype)
    task = ng.GaussianTask(*to(backend, tuple(moments)))
    host = peers.known(moments.moment, moments.noise, moments.cross)
    known = to(backend, host)
    layers = to(backend, problems.on_the_way(sizes, batch, host.optimum))
    rate, xp = 0.05, backend.xp
    minimum = task.minimum_loss()

    def ours(layers: Any, task: Any) -> Any:
        history = ng.simulate(layers, task, learning_rate=rate, steps=steps)
        return history.loss, *history.weights

    def once(layers: Any, task: Any) -> Any:
        found = slope(_arrays.namespace(layers[0]), layers, task, "layerwise", with_excess=True)
        moved = tuple(w - rate * d for w, d in zip(layers, found[:-1], strict=True))
        return moved, found[-1][:, 0, 0] + task.factors.minimum_loss

    def bare(layers: Any, task: Any) -> Any:
        if backend.name == "jax":
            lax = importlib.import_module("jax").lax
            layers, losses = lax.scan(lambda carry, _: once(carry, task), layers, None, length=steps)
            return losses, *layers
        losses = []
        for _ in range(steps):
            layers, loss = once(layers, task)
            losses.append(loss)
        return xp.stack(losses), *layers

    def loop(direct: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(peers.simulated, xp, rate=rate, steps=steps, direct=direct)

    arguments = (layers, known, minimum)
    return [
        Contestant("simulate", "ours", ours, (layers, task), jit=False),
        Contestant("Eq 42 as written", "written", loop(peers.written_and_error), arguments),
        Contestant("LU of products", "expert", loop(peers.solves_and_error), arguments),
        Contestant("inverse of each layer", "expert", loop(peers.inverses_and_error), arguments),
        Contestant("Gram", "expert", loop(peers.grams_and_error), arguments),
        Contestant("bare steps", "other", bare, (layers, task)),
        Contestant("W_i @ W_iᵀ of each layer", "product", _layer_squares, (layers,), scale=float(steps)),
    ]


def exact(
    backend: Backend, dtype: str, *, sizes: tuple[int, ...], batch: int, weights: str, noise: str = "identity"
) -> list[Contestant]:
    """The exact layerwise rule; nobody else has it, so it is set beside our own layerwise rule."""
    layers, task, _ = network(backend, dtype, sizes, batch, weights, noise)
    return [
        Contestant("exact", "ours", _natural("exact"), (layers, task)),
        Contestant("our layerwise", "other", _natural("layerwise"), (layers, task)),
        _product(layers),
    ]


SUBSET = 2
"""Members that a peer computes where it takes them one at a time for seconds each."""


def moore_penrose(
    backend: Backend, dtype: str, *, sizes: tuple[int, ...], batch: int, weights: str, noise: str = "identity"
) -> list[Contestant]:
    """The Moore–Penrose natural gradient; the dense F and its `pinv` one network at a time."""
    layers, task, known = network(backend, dtype, sizes, batch, weights, noise)
    count = min(SUBSET, batch)
    members = tuple(tuple(layer[k] for layer in layers) for k in range(count))
    one = backend.jit(functools.partial(peers.moore_penrose_dense, backend.xp))

    def loop(members: Any, known: Any) -> Any:
        return [one(member, known) for member in members]

    return [
        Contestant("moore_penrose", "ours", _natural("moore_penrose"), (layers, task)),
        Contestant(
            f"pinv of the dense F, {count} of {batch} timed",
            "written",
            loop,
            (members, known),
            jit=False,
            scale=batch / count,
        ),
        Contestant(
            "solve with AᵀA", "expert", functools.partial(peers.moore_penrose_kernel, backend.xp), (layers, known)
        ),
        _product(layers),
    ]


# -------------------------------------------------------------------------------- moments


def _gram(x: Any) -> Any:
    return x.mT @ x


def covariance(
    backend: Backend, dtype: str, *, batch: int, n: int, p: int, shrinkage: str | None = None
) -> list[Contestant]:
    """Covariances of an ensemble of samples, shrunk or not."""
    xp, x = backend.xp, backend.asarray(problems.samples(batch, n, p, dtype))
    by_hand = {None: peers.covariance, "ledoit_wolf": peers.ledoit_wolf, "oas": peers.oas}[shrinkage]
    entries = [
        Contestant("covariance", "ours", lambda x: ng.covariance(x, shrinkage=shrinkage), (x,)),
        Contestant("batched by hand", "expert", functools.partial(by_hand, xp), (x,)),
    ]
    if backend.name == "numpy":
        function = {None: "empirical_covariance"}.get(shrinkage, shrinkage)
        entries.append(
            Contestant("scikit-learn, looped", "written", functools.partial(peers.sklearn_loop, function), (x,))
        )
        if shrinkage is None:
            entries.append(Contestant("numpy.cov, looped", "expert", peers.numpy_cov, (x,)))
    if shrinkage is None:
        checked = functools.partial(peers.checked_covariance, xp)
        entries.append(Contestant("by hand, symmetric and checked", "other", checked, (x,)))
    return [*entries, Contestant("xᵀ @ x", "product", _gram, (x,))]


def _stream(chunks: Any) -> Any:
    moments = ng.Moments.from_samples(chunks[0])
    for chunk in chunks[1:]:
        moments = moments.merge(ng.Moments.from_samples(chunk))
    return moments.covariance()


def streaming(backend: Backend, dtype: str, *, batch: int, n: int, p: int, chunk: int) -> list[Contestant]:
    """Covariance of samples that come in chunks."""
    x = problems.samples(batch, n, p, dtype)
    chunks = tuple(backend.asarray(x[:, start : start + chunk]) for start in range(0, n, chunk))
    return [
        Contestant("Moments", "ours", _stream, (chunks,)),
        Contestant("Chan's merge by hand", "expert", functools.partial(peers.chan_stream, backend.xp), (chunks,)),
        Contestant(
            "by hand, symmetric and checked", "other", functools.partial(peers.checked_stream, backend.xp), (chunks,)
        ),
        Contestant("xᵀ @ x of each chunk", "product", lambda chunks: tuple(_gram(c) for c in chunks), (chunks,)),
    ]


# ------------------------------------------------------------------------------- Fisher


def _sampled(backend: Backend, dtype: str, sizes: tuple[int, ...], n: int) -> tuple[Any, Any, Any, Any]:
    """One network, its input samples, the task with their moment, and a tangent."""
    layers = tuple(layer[0] for layer in problems.weights(sizes, 1, "orthogonal", dtype))
    tangent = tuple(layer[0] for layer in problems.weights(sizes, 1, "gaussian", dtype))
    x = problems.samples(1, n, sizes[0], dtype)[0]
    y = x @ problems.task(sizes[0], sizes[-1], "identity", dtype).cross.T
    layers, tangent, x, y = to(backend, (layers, tangent, x, y))
    return layers, tangent, x, ng.GaussianTask.from_samples(x, y)


def fisher_matvec(backend: Backend, dtype: str, *, sizes: tuple[int, ...], n: int) -> list[Contestant]:
    """F times a vector.

    Eager libraries have F made before; what JAX compiles begins at the weights, as its peer does.
    """
    xp = backend.xp
    layers, tangent, x, task = _sampled(backend, dtype, sizes, n)
    partial = peers.partial_products(layers, task.input_moment)
    if backend.name == "jax":
        ours = Contestant("F.matvec", "ours", lambda w, task, t: dl.fisher(w, task).matvec(t), (layers, task, tangent))
    else:
        ours = Contestant("F.matvec", "ours", dl.fisher(layers, task).matvec, (tangent,))
    entries = [ours, Contestant("A B Aᵀ by hand", "expert", peers.structured_matvec, (partial, tangent))]
    if backend.name in ("torch", "jax"):
        autodiff = functools.partial(peers.autodiff_matvec, xp)
        entries.append(Contestant("jvp and vjp", "written", autodiff, (layers, x, tangent)))
    if backend.name == "torch" and (operator := peers.curvlinops_operator(layers, x)) is not None:
        entries.append(Contestant("curvlinops", "other", lambda t: operator @ list(t), (tangent,)))
    return [*entries, _product(layers)]


def _columns(operator: Any, parts: Sequence[Any]) -> list[Any]:
    """An operator's products with a basis, some vectors at a time."""
    return [operator @ part for part in parts]


def fisher_dense(backend: Backend, dtype: str, *, sizes: tuple[int, ...], n: int) -> list[Contestant]:
    """Dense F."""
    xp = backend.xp
    layers, _, x, task = _sampled(backend, dtype, sizes, n)
    entries = [
        Contestant("F.to_dense", "ours", lambda w, task: dl.fisher(w, task).to_dense(), (layers, task)),
        Contestant(
            "Kronecker blocks", "expert", functools.partial(peers.dense_fisher, xp), (layers, task.input_moment)
        ),
    ]
    if backend.name in ("torch", "jax"):
        autodiff = functools.partial(peers.autodiff_dense, xp)
        entries.append(Contestant("jvp and vjp", "written", autodiff, (layers, x)))
    if backend.name == "torch" and (operator := peers.curvlinops_operator(layers, x)) is not None:
        basis = xp.eye(operator.shape[-1], dtype=x.dtype, device=x.device)
        columns = functools.partial(_columns, operator)
        entries.append(Contestant("curvlinops, by columns", "other", columns, (basis.split(128, dim=-1),)))
    root = backend.asarray(np.ones((sum(m * k for m, k in itertools.pairwise(sizes)), 1), dtype=dtype))
    return [*entries, Contestant("a write of P × P", "product", lambda c: c @ c.mT, (root,))]


# -------------------------------------------------------------------- nonlinear networks


def _mlp(backend: Backend, dtype: str, sizes: tuple[int, ...], members: tuple[int, ...], samples: int) -> Any:
    """A network with parameters, inputs and targets of the width of its outputs."""
    net = ng.networks.MLP(sizes)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((samples, n)).astype(dtype) for n in (sizes[0], sizes[-1]))
    return net, *to(backend, (net.init(rng, members, like=x), x, y))


def _step_products(params: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
    """The products of two passes forward and two back, of the gradient and of both moments of every layer."""
    found = []
    for w in params:
        a = x[:, :1] + 0.0 * w[:1, :]
        delta = a @ w.T
        found += [a @ w.T, delta @ w, delta @ w, delta.T @ a, a.T @ a, delta.T @ delta]
    return tuple(found)


def autoencoder_step(backend: Backend, dtype: str, *, sizes: tuple[int, ...], samples: int) -> list[Contestant]:
    """A step of the paper's rule for nonlinear networks against the rule written in NumPy."""
    net, params, x, _ = _mlp(backend, dtype, sizes, (), samples)
    noise = to(backend, np.random.default_rng(1).standard_normal((samples, sizes[-1])).astype(dtype))
    optimizer = ng.optimizers.natural_gradient()
    state, one = optimizer.init(net, params), backend.asarray(np.ones((), dtype))

    def ours(params: Any, state: Any, x: Any, noise: Any) -> tuple[Any, ...]:
        new, after, info = optimizer.step(net, params, state, x, x, noise[None, ...])
        return *new, info.loss, after.damping

    def written(invert: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, damping, x, noise: peers.authors_step(backend.xp, params, damping, x, noise, invert)

    return [
        Contestant("natural_gradient", "ours", ours, (params, state, x, noise)),
        Contestant("the rule as written", "written", written(peers.root_damped_by_eigh), (params, one, x, noise)),
        Contestant("by inverses", "expert", written(peers.root_damped_by_inverse), (params, one, x, noise)),
        Contestant("products", "product", _step_products, (params, x)),
    ]


def ensemble_step(
    backend: Backend, dtype: str, *, sizes: tuple[int, ...], batch: int, samples: int, preset: str
) -> list[Contestant]:
    """One step of an ensemble against a step of each of its networks, one after another."""
    net, params, x, y = _mlp(backend, dtype, sizes, (batch,), samples)
    optimizer = PRESETS[preset]()
    shape = (1, batch, int(np.ceil(optimizer.estimate.share * samples)), sizes[-1])
    noise = to(backend, np.random.default_rng(1).standard_normal(shape).astype(dtype))
    state = optimizer.init(net, params)
    members = tuple(tuple(w[k, ...] for w in params) for k in range(batch))
    states = tuple(optimizer.init(net, member) for member in members)

    def together(params: Any, state: Any, x: Any, y: Any, noise: Any) -> Any:
        return optimizer.step(net, params, state, x, y, noise)[0]

    def apart(members: Any, states: Any, x: Any, y: Any, noise: Any) -> Any:
        found = [together(member, states[k], x, y, noise[:, k, ...]) for k, member in enumerate(members)]
        return tuple(backend.xp.stack(layer) for layer in zip(*found, strict=True))

    def products(params: Any, x: Any) -> Any:
        return [_step_products(tuple(w[k, ...] for w in params), x)[-1] for k in range(batch)]

    return [
        Contestant("together", "ours", together, (params, state, x, y, noise)),
        Contestant("one after another", "written", apart, (members, states, x, y, noise), jit=False),
        Contestant("products", "product", products, (params, x)),
    ]


# -------------------------------------------------------------------------------- the rows


def _networks(names: Mapping[str, tuple[tuple[int, ...], int]]) -> dict[str, Case]:
    return {
        f"{label}, {kind}": {"sizes": sizes, "batch": batch, "weights": kind}
        for label, (sizes, batch) in names.items()
        for kind in ("orthogonal", "gaussian")
    }


PINVH = {f"{b} x {n}²": {"batch": b, "n": n} for b, n in ((4096, 8), (1024, 32), (256, 64), (64, 128), (32, 256))}
PINVH |= {"4 x 512²": {"batch": 4, "n": 512}}
LAYERWISE = _networks(
    {
        "4096 x 8, L 3": ((8,) * 4, 4096),
        "1024 x 32, L 4": ((32,) * 5, 1024),
        "256 x 64, L 4": ((64,) * 5, 256),
        "32 x 128, L 6": ((128,) * 7, 32),
        "512 x 48-32-24-16": ((48, 32, 24, 16), 512),
        "512 x 16-24-32-48": ((16, 24, 32, 48), 512),
        "512 x 32-8-32": ((32, 8, 32), 512),
        "512 x 32-24-8-24-32": ((32, 24, 8, 24, 32), 512),
    }
)
LAYERWISE["512 x 48-32-24-16, general noise"] = {
    "sizes": (48, 32, 24, 16),
    "batch": 512,
    "weights": "orthogonal",
    "noise": "general",
}
COVARIANCE = {
    f"{b} x {n} x {p}": {"batch": b, "n": n, "p": p}
    for b, n, p in ((4096, 64, 16), (512, 256, 64), (64, 1024, 128), (8, 4096, 512))
}
FISHER = {"32-32-32-32, 512 samples": {"sizes": (32,) * 4, "n": 512}}


def _shrunk(shrinkage: str) -> dict[str, Case]:
    return {label: case | {"shrinkage": shrinkage} for label, case in COVARIANCE.items()}


CONTESTS: dict[str, Contest] = {
    "pinvh": Contest("pinvh, full rank", pinvh_full_rank, PINVH, ("4096 x 8²", "1024 x 32²")),
    "pinvh-half-rank": Contest(
        "pinvh, rank n/2",
        pinvh_half_rank,
        {label: PINVH[label] for label in ("4096 x 8²", "1024 x 32²", "64 x 128²")},
        ("4096 x 8²",),
    ),
    "pinvh-one-deficient": Contest(
        "pinvh, one deficient",
        pinvh_one_deficient,
        {"1024 x 32²": {"batch": 1024, "n": 32}},
        ("1024 x 32²",),
        # A compiled JAX function decides for the whole stack: its case is the row before.
        ("numpy", "torch", "cupy"),
    ),
    "precondition": Contest(
        "precondition", precondition, {"1024 x 32 x 32": {"batch": 1024, "m": 32, "n": 32}}, ("1024 x 32 x 32",)
    ),
    "layerwise": Contest(
        "layerwise direction",
        layerwise,
        LAYERWISE,
        ("4096 x 8, L 3, orthogonal", "512 x 48-32-24-16, orthogonal", "512 x 32-24-8-24-32, orthogonal"),
    ),
    "small": Contest(
        "one small network",
        layerwise,
        {"1 x 8, L 3": {"sizes": (8,) * 4, "batch": 1, "weights": "orthogonal"}},
        ("1 x 8, L 3",),
    ),
    "simulation": Contest(
        "simulation, layerwise",
        simulation,
        {
            f"{batch} x 16-16-16-16, {steps} steps": {"sizes": (16,) * 4, "batch": batch, "steps": steps}
            for batch, steps in ((16, 50), (1024, 200))
        },
        ("1024 x 16-16-16-16, 200 steps",),
    ),
    "exact": Contest(
        "exact direction",
        exact,
        {"512 x 48-32-24-16": {"sizes": (48, 32, 24, 16), "batch": 512, "weights": "orthogonal"}},
        ("512 x 48-32-24-16",),
    ),
    "moore-penrose": Contest(
        "Moore–Penrose direction",
        moore_penrose,
        {"256 x 16-16-16-16": {"sizes": (16,) * 4, "batch": 256, "weights": "orthogonal"}},
    ),
    "covariance": Contest("covariance", covariance, COVARIANCE, ("4096 x 64 x 16", "64 x 1024 x 128")),
    "ledoit-wolf": Contest("Ledoit–Wolf", covariance, _shrunk("ledoit_wolf"), ("64 x 1024 x 128",)),
    "oas": Contest("OAS", covariance, _shrunk("oas"), ("64 x 1024 x 128",)),
    "streaming": Contest(
        "streamed covariance",
        streaming,
        {"64 x 4096 x 32, chunks of 256": {"batch": 64, "n": 4096, "p": 32, "chunk": 256}},
        ("64 x 4096 x 32, chunks of 256",),
    ),
    "fisher-matvec": Contest("F.matvec", fisher_matvec, FISHER, tuple(FISHER)),
    "fisher-dense": Contest("F.to_dense", fisher_dense, FISHER),
    "autoencoder-step": Contest(
        "natural gradient step",
        autoencoder_step,
        {
            "784-400-200-100-50-100-200-400-784, N 1000": {
                "sizes": (784, 400, 200, 100, 50, 100, 200, 400, 784),
                "samples": 1000,
            }
        },
        libraries=("numpy",),
    ),
    "ensemble-step": Contest(
        "step of 64 networks",
        ensemble_step,
        {
            f"64 x 64-32-10, N {samples}, {preset}": {
                "sizes": (64, 32, 10),
                "batch": 64,
                "samples": samples,
                "preset": preset,
            }
            for samples in (16, 256)
            for preset in ("natural_gradient", "kfac", "sgd")
        },
        libraries=("numpy", "torch"),
    ),
}


def entries(name: str, library: str, dtype: str, label: str) -> list[Contestant]:
    """The contestants of one contest on one problem."""
    contest = CONTESTS[name]
    return contest.enter(backends.connect(library), dtype, **contest.cases[label])


def ours(name: str, backend: Backend, dtype: str, label: str) -> Contestant:
    """Our side of a contest."""
    return entries(name, backend.name, dtype, label)[0]


# ------------------------------------------------------------------------------ accuracy

ACCURACY = {"1024 x 32, L 4, gaussian": {"sizes": (32,) * 5, "batch": 1024, "weights": "gaussian"}}
OFF = 1e-2
"""A direction with a larger relative error is off."""


def complaint(error: Exception) -> str:
    """The first line of an error, cut to the width of a table's cell."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:60]


def accuracy(backend: Backend, dtype: str, **case: Any) -> dict[str, dict[str, Any]]:
    """Errors of every contestant of `layerwise` against higher precision, on square networks.

    The reference starts from the same rounded inputs, so the error is that of the method.

    Returns
    -------
    dict of str to dict
        For each contestant the share of members that are "off" and the "median" error, or
        how it "failed" on the whole stack.
    """
    sizes, batch, kind = case["sizes"], case["batch"], case["weights"]
    reference = _reference(sizes, batch, kind, dtype)
    result: dict[str, dict[str, Any]] = {}
    for entry in layerwise(backend, dtype, **case):
        if entry.kind in ("product", "other"):
            continue
        try:
            directions = tuple(backend.to_numpy(d) for d in entry.ready(backend)())
        except Exception as error:  # noqa: BLE001 libraries have no common error
            result[entry.label] = {"failed": complaint(error)}
            continue
        error = measure.relative_difference(directions, reference)
        share = float(np.mean(~(error <= OFF)))
        result[entry.label] = {"off": share, "median": float(np.median(error))}
    return result


@functools.cache
def _reference(sizes: tuple[int, ...], batch: int, kind: str, dtype: str) -> tuple[np.ndarray, ...]:
    moments = problems.task(sizes[0], sizes[-1], "identity", dtype)
    return peers.reference_direction(problems.weights(sizes, batch, kind, dtype), moments.moment, moments.cross)
