"""The optimizers of this package as a `torch.optim.Optimizer`, for modules of linear layers and convolutions.

Hooks keep what comes into each `nn.Linear` and `nn.Conv2d`, and the errors that come back to
it. The rest is the optimizer's own: the same estimates, inverses, step rules and damping
policies, on tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from natgrad_array import _arrays
from natgrad_array._arrays import Array
from natgrad_array.kronecker import Kronecker
from natgrad_array.networks.likelihoods import LIKELIHOODS, Likelihood
from natgrad_array.networks.passes import Trace
from natgrad_array.optimizers import stepping
from natgrad_array.optimizers.estimates import Empirical, Statistics
from natgrad_array.optimizers.inverses import Context, Tangent
from natgrad_array.optimizers.optimizer import Optimizer
from natgrad_array.optimizers.stepping import StepInfo
from natgrad_array.optimizers.steps import Change, LevenbergMarquardt, Scaling
from natgrad_array.optimizers.tridiagonal import BlockTridiagonal

__all__ = ["NaturalGradient"]


class NaturalGradient(torch.optim.Optimizer):  # type: ignore[misc]
    """Run an optimizer of this package on the linear layers and convolutions of a module.

    Parameters
    ----------
    model : torch.nn.Module
        Called with samples on the first axis. Its `nn.Linear` and `nn.Conv2d` layers with
        parameters that require gradients are preconditioned, except convolutions with
        groups. Each has to be called once in a forward pass of the model.
    optimizer : Optimizer
        Of `natgrad_array.optimizers`: a preset, or choices of your own.
    likelihood : str or Likelihood, optional
        "gaussian", "bernoulli" or "categorical": what the model's outputs, of shape
        (N, n_L), mean. Needed by estimates that send errors of the model's own back
        (`ModelSampled`, `ExactDirections`) and by step rules and predictions that use the
        exact Fisher information.
    others : callable
        Makes an optimizer of the parameters that are in no such layer, such as
        ``functools.partial(torch.optim.SGD, lr=0.1)``. It is kept as the attribute `others`.
    skip : collection of str
        Names of layers that go to `others` too, as in ``model.named_modules()``.
    generator : torch.Generator, optional
        Where targets are drawn from, on the device of the model. When None, a new one is
        seeded from torch's global generator.

    Attributes
    ----------
    info : StepInfo or None
        What happened in the last step.
    others : torch.optim.Optimizer or None
        The optimizer of the other parameters.

    Raises
    ------
    TypeError, ValueError
        If there is no layer to precondition, layers share parameters with other modules,
        the likelihood is missing or unknown, or a step rule that runs the model again meets
        dropout or batch normalisation.

    Notes
    -----
    The loss is the mean over samples; with a likelihood it should be that of the likelihood
    (½‖y − f‖² summed over outputs for "gaussian"), or ratios of actual and predicted
    reductions mean nothing. The learning rate of the parameter group multiplies what the
    step rule decides, so that schedulers work; it starts as 1.

    Errors of the model's own are sent back within the forward pass, one backward pass for
    each draw or output direction. `QuadraticModel` and the predictions "exact" and "damped"
    run the model once more in forward mode (`torch.func.jvp`).

    Examples
    --------
    >>> import torch
    >>> import natgrad_array as ng
    >>> from natgrad_array.adapters.torch import NaturalGradient
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(100, 3)
    >>> y = (x[:, 0] * x[:, 1] > 0).long()
    >>> opt = NaturalGradient(model, ng.optimizers.kfac(), likelihood="categorical")
    >>> losses = [float(opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))) for _ in range(30)]
    >>> losses[-1] < 0.5 * losses[0]
    True
    """

    @_arrays.quiet
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        /,
        *,
        likelihood: str | Likelihood | None = None,
        others: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        skip: Collection[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_arrays.describe(model)}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {_arrays.describe(optimizer)}")
        self._model, self._optimizer = model, optimizer
        self._likelihood = _check_likelihood(optimizer, likelihood)
        self._layers = _find_layers(model, skip)
        if _makes_passes(optimizer):
            _check_repeatable(model)
        self._by_module = {layer.module: i for i, layer in enumerate(self._layers)}
        owned = {parameter for layer in self._layers for parameter in layer.parameters}
        rest = [p for p in model.parameters() if p.requires_grad and p not in owned]
        super().__init__([p for layer in self._layers for p in layer.parameters], {"lr": 1.0})
        self.others = others(rest) if rest else None
        weight = self._layers[0].module.weight
        if generator is None:
            generator = torch.Generator(weight.device).manual_seed(int(torch.randint(2**62, ())))
        self._generator = generator
        self.info: StepInfo | None = None
        self._state = stepping.start(optimizer, tuple(layer.read() for layer in self._layers))
        self._record: _Record | None = None
        self._inside = self._paused = False
        self._backwards = 0
        self._register()

    # --------------------------------------------------------------------------- hooks

    def _register(self) -> None:
        handles = [layer.module.register_forward_hook(_Hook(self, "_keep"), with_kwargs=True) for layer in self._layers]
        # After the layers' own, in case that the model is a single layer.
        handles.append(self._model.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True))
        handles.append(self._model.register_forward_hook(_Hook(self, "_leave"), with_kwargs=True))
        handles.append(self._layers[0].module.weight.register_post_accumulate_grad_hook(_Hook(self, "_count")))
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """The model starts a forward pass."""
        self._inside = module is self._model and not self._paused and torch.is_grad_enabled()
        if self._inside:
            if self._layers[0].module.weight.grad is None:
                self._backwards = 0
            self._record = _Record(args, kwargs, late=self._backwards > 0)

    def _keep(self, module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """A layer has been called."""
        record, i = self._record, self._by_module.get(module)
        if not self._inside or record is None or i is None:
            return
        if i in record.inputs:
            self._inside = False
            raise RuntimeError(
                f"layer {self._layers[i].name!r} was called twice in one forward pass, and its moments would be "
                "those of one call; name it in skip"
            )
        record.inputs[i] = (args[0] if args else kwargs["input"]).detach()
        record.edges[i] = torch.autograd.graph.get_gradient_edge(output)
        # A hook on the tensor sees it as it is now, whatever an activation does to it in place.
        output.register_hook(lambda error: record.arrived(i, error))

    def _leave(self, module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """The model has ended a forward pass."""
        record, inside, self._inside = self._record, self._inside, False
        if not inside or record is None or module is not self._model:
            return
        estimate = self._optimizer.estimate
        if self._likelihood is not None:
            if not isinstance(output, torch.Tensor) or output.ndim != 2:
                raise ValueError(
                    f"model must give outputs of shape (N, n_L) for a likelihood, got {_arrays.describe(output)}"
                )
            record.output = output.detach()
        if not self._optimizer.inverse.uses_statistics or not estimate.has_errors or isinstance(estimate, Empirical):
            return
        part = math.ceil(estimate.share * len(output))
        some = Trace((), (), record.output[:part])
        net: Any = _Net(self)
        errors: Any = estimate._errors(net, some, None, part, self._generator)
        edges = list(record.edges.values())
        record.listening = False
        with torch.enable_grad():
            head = output[:part]
            found = [torch.autograd.grad(head, edges, e, retain_graph=True, allow_unused=True) for e in errors]
        record.listening = True
        for number, i in enumerate(record.edges):
            deltas = [deltas[number] for deltas in found]
            if deltas[0] is not None:
                record.drawn[i] = torch.stack([delta[:part] for delta in deltas]).detach()

    def _count(self, _: torch.nn.Parameter) -> None:
        """A gradient has been added to the first layer's."""
        if not self._paused:
            self._backwards += 1

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    # ------------------------------------------------------------ what estimates ask for

    def _statistics(self) -> Statistics:
        """What came into the layers and back in the last passes."""
        record, estimate = self._checked(), self._optimizer.estimate
        part = math.ceil(estimate.share * record.samples(self._layers))
        rows = tuple(layer.rows(record.inputs[i][:part]) for i, layer in enumerate(self._layers))
        if not estimate.has_errors:
            return Statistics(rows, None)
        deltas = []
        for i, layer in enumerate(self._layers):
            if isinstance(estimate, Empirical):
                errors = record.errors[i][None, :part] * len(record.errors[i])
            elif i in record.drawn:
                errors = record.drawn[i]
            else:
                raise RuntimeError(f"layer {layer.name!r} has no influence on the outputs; name it in skip")
            deltas.append(layer.deltas(errors))
        return Statistics(rows, tuple(deltas))

    def _checked(self) -> _Record:
        """The record of the last passes, if they are complete."""
        record = self._record
        if self._backwards != 1 or record is None:
            raise RuntimeError(
                "a step needs one forward pass of the model (in grad mode) and one backward pass of its loss; "
                f"got {self._backwards} backward passes since the last step or zero_grad"
            )
        if not record.errors:
            between = "backward and step" if record.late else "the forward pass of the loss and backward"
            raise RuntimeError(
                f"another forward pass of the model in grad mode came between {between}, so that the step would see "
                "nothing of the loss; make passes that are only looked at under torch.no_grad()"
            )
        for i, layer in enumerate(self._layers):
            if i not in record.inputs:
                raise RuntimeError(f"layer {layer.name!r} was not called in the forward pass; name it in skip")
            if i not in record.errors or layer.module.weight.grad is None:
                raise RuntimeError(f"layer {layer.name!r} has no influence on the loss; name it in skip")
        record.samples(self._layers)
        if isinstance(self._optimizer.inverse, BlockTridiagonal) and list(record.inputs) != sorted(record.inputs):
            called = ", ".join(self._layers[i].name for i in record.inputs)
            raise RuntimeError(
                f"layers must be called in the order of the model for {BlockTridiagonal()}, got {called}"
            )
        return record

    # ---------------------------------------------------------------------------- a step

    def factors(self) -> dict[str, Kronecker]:
        """Compute the two moments of each layer, from the passes since the last step.

        Returns
        -------
        dict of str to Kronecker
            (A, G) by the layer's name, of this batch alone; the columns of a convolution
            are ordered (kernel height, kernel width, input channel), the bias last.

        Raises
        ------
        RuntimeError
            Unless there was one forward and one backward pass.
        """
        factors = self._optimizer.estimate.factors(self._statistics())
        return {layer.name: block for layer, block in zip(self._layers, factors, strict=True)}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    @_arrays.quiet
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss of the batch. It may clear gradients and call backward as in
            other optimizers of torch, or leave both to the step. Damping policies that learn
            from the loss need it, and call it once more after the step. Without one, the
            forward and the backward pass are those made before.

        Returns
        -------
        tensor or None
            The loss before the step, where a closure was given.

        Raises
        ------
        RuntimeError
            If a layer was called twice or not at all, there was not exactly one backward
            pass since the last step, or the last forward pass in grad mode was not that of
            the loss.
        ValueError
            If the damping policy needs a closure.
        """
        optimizer, loss, keeps_graph = self._optimizer, None, False
        learns = isinstance(optimizer.damping, LevenbergMarquardt)
        if learns and closure is None:
            raise ValueError(f"closure must compute the loss for {optimizer.damping}, got None")
        if closure is not None:
            self._backwards = 0
            with torch.enable_grad():
                loss = closure()
                if not isinstance(loss, torch.Tensor):
                    raise TypeError(f"closure must return the loss, a tensor, got {_arrays.describe(loss)}")
                keeps_graph = self._backwards == 0
                if keeps_graph:
                    self.zero_grad()
                    loss.backward()
            loss = loss.detach()
        record = self._checked()
        params = tuple(layer.read() for layer in self._layers)
        gradient = tuple(layer.read_gradient() for layer in self._layers)
        statistics = self._statistics() if optimizer.inverse.uses_statistics else None
        trace = Trace((), (), record.output)
        at = stepping.context(optimizer, _Net(self), params, None, trace, gradient, self._state)
        rate = self.param_groups[0]["lr"]
        if rate != 1.0:
            optimizer = dataclasses.replace(optimizer, scaling=_Scaled(optimizer.scaling, rate))

        def evaluate(new: Tangent) -> Array:
            assert closure is not None
            self._write(new)
            # A closure of the other kind calls backward: the gradients of this batch are put back.
            gradients = [(p, p.grad) for p in self._model.parameters()]
            with self._pause(), torch.set_grad_enabled(not keeps_graph):
                later = closure()
            for p, g in gradients:
                p.grad = g
            return later.detach()

        new, self._state, self.info = stepping.advance(
            optimizer, at, self._state, statistics, loss, evaluate if learns else None
        )
        self._write(new)
        if self.others is not None:
            self.others.step()
        self._record, self._backwards = None, 0
        return loss

    def _write(self, matrices: Tangent) -> None:
        for layer, matrix in zip(self._layers, matrices, strict=True):
            for parameter, value in zip(layer.parameters, layer.split(matrix), strict=True):
                parameter.copy_(value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters of the model, those of `others` too.

        Parameters
        ----------
        set_to_none : bool
            Whether they become None in place of zeros.

        Returns
        -------
        None
        """
        super().zero_grad(set_to_none)
        if self.others is not None:
            self.others.zero_grad(set_to_none)
        self._backwards = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group that there is.

        Parameters
        ----------
        param_group : dict
            The layers' parameters.

        Returns
        -------
        None

        Raises
        ------
        ValueError
            If there is a group already: the layers are those of the model.
        """
        if self.param_groups:
            raise ValueError("param_group must not be added: the layers are those of the model, the rest is in others")
        super().add_param_group(param_group)

    # -------------------------------------------------------------------------- on disk

    def state_dict(self) -> dict[str, Any]:
        """Collect all that the next step depends on, but the parameters.

        Returns
        -------
        dict
            Of tensors, numbers and lists: `torch.load` reads it with ``weights_only=True``.
        """
        found: dict[str, Any] = super().state_dict()
        found["natural_gradient"] = list(_leaves(self._state))
        found["generator"] = self._generator.get_state()
        found["others"] = None if self.others is None else self.others.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` collected.

        Parameters
        ----------
        state_dict : dict
            Of an optimizer with the same choices, for a model with the same layers.

        Returns
        -------
        None

        Raises
        ------
        ValueError
            If it is of other choices or of another model.
        """
        given = dict(state_dict)
        try:
            leaves, drawn, rest = (given.pop(name) for name in ("natural_gradient", "generator", "others"))
        except KeyError as error:
            raise ValueError(f"state_dict must be what state_dict returned, got no {error}") from None
        wanted = list(_leaves(self._state))
        shapes, expected = [_shape(leaf) for leaf in leaves], [_shape(leaf) for leaf in wanted]
        if shapes != expected or (rest is None) != (self.others is None):
            raise ValueError(f"state_dict must be of the same layers and choices, with shapes {expected}, got {shapes}")
        super().load_state_dict(given)
        moved = (None if leaf is None else leaf.clone().to(like) for leaf, like in zip(leaves, wanted, strict=True))
        self._state = _refilled(self._state, moved)
        self._generator.set_state(drawn.cpu())
        if self.others is not None:
            self.others.load_state_dict(rest)


# ---------------------------------------------------------------- what the core asks for


class _Net:
    """The model as estimates and step rules see a network."""

    layers = ()

    def __init__(self, owner: NaturalGradient) -> None:
        self._owner, self.likelihood = owner, owner._likelihood

    def tangent(self, params: Tangent, trace: Trace, direction: Tangent) -> Array:
        """How the outputs of the first samples move when the layers' parameters do."""
        if direction[0].ndim > 2:
            ways = zip(*(moved.unbind(0) for moved in direction), strict=True)
            return torch.stack([self.tangent(params, trace, way) for way in ways])
        model, record = self._owner._model, self._owner._record
        assert record is not None
        args, kwargs = record.first(trace.output.shape[-2])

        def outputs(named: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(model, named, args, kwargs)

        with self._owner._pause(), warnings.catch_warnings():
            # Forward mode compiles a few of torch's own formulas in a way that torch calls deprecated.
            warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
            return torch.func.jvp(outputs, (self._named(params),), (self._named(direction),))[1].detach()

    def _named(self, matrices: Tangent) -> dict[str, torch.Tensor]:
        return {
            name: value
            for layer, matrix in zip(self._owner._layers, matrices, strict=True)
            for name, value in zip(layer.names, layer.split(matrix), strict=True)
        }


# ---------------------------------------------------------------------------------- layers


@dataclasses.dataclass(eq=False)
class _Record:
    """What hooks have seen of a forward pass, and of the backward pass after it; layers by number."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    edges: dict[int, Any] = dataclasses.field(default_factory=dict)
    errors: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    drawn: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    output: Any = None
    listening: bool = True
    late: bool = False
    """Whether there had been a backward pass before, and no step."""

    def arrived(self, i: int, error: torch.Tensor) -> None:
        """An error has come back to a layer."""
        if self.listening:
            self.errors[i] = error.detach()

    def samples(self, layers: list[_Layer]) -> int:
        """N, the same for all layers."""
        count = len(self.inputs[0] if self.output is None else self.output)
        for i, inputs in self.inputs.items():
            if inputs.ndim < layers[i].axes or len(inputs) != count:
                raise RuntimeError(
                    f"layer {layers[i].name!r} must be called with the {count} samples on the first of at least "
                    f"{layers[i].axes} axes, got shape {tuple(inputs.shape)}"
                )
        return count

    def first(self, part: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, of the first samples only."""
        count = len(self.output)

        def cut(value: Any) -> Any:
            batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count
            return value[:part] if batched and part < count else value

        return tuple(cut(value) for value in self.args), {name: cut(value) for name, value in self.kwargs.items()}


class _Layer:
    """A linear layer: how its parameters, inputs and errors are those of a matrix."""

    axes = 2

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self.module = name, module
        prefix = f"{name}." if name else ""
        self.names = [f"{prefix}weight"] + ([] if module.bias is None else [f"{prefix}bias"])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.module.weight] if self.module.bias is None else [self.module.weight, self.module.bias]

    def _flat(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def _unflat(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def _patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, T, n_in) of what came in."""
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])

    def _joined(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = self._flat(weight)
        return matrix.clone() if bias is None else torch.cat([matrix, bias[:, None]], dim=1)

    def read(self) -> torch.Tensor:
        """The parameters as a matrix (n_out, n_in + 1)."""
        bias = self.module.bias
        return self._joined(self.module.weight.detach(), None if bias is None else bias.detach())

    def read_gradient(self) -> torch.Tensor:
        """Their gradient as a matrix."""
        bias = self.module.bias
        return self._joined(self.module.weight.grad, None if bias is None else bias.grad)

    def split(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """A matrix as weight and bias."""
        if self.module.bias is None:
            return [self._unflat(matrix)]
        return [self._unflat(matrix[:, :-1]), matrix[:, -1]]

    def rows(self, inputs: torch.Tensor) -> torch.Tensor:
        """Homogeneous inputs (N, T, n_in + 1)."""
        patches = self._patches(inputs.to(self.module.weight.dtype))
        return patches if self.module.bias is None else torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)

    def deltas(self, errors: torch.Tensor) -> torch.Tensor:
        """Errors (K, N, T, n_out) of such at the layer's outputs, stacked in front."""
        return errors.reshape(*errors.shape[:2], -1, errors.shape[-1]).to(self.module.weight.dtype)


class _Convolution(_Layer):
    """A convolution: columns are ordered (height, width, channel) as in `Conv2d` of this package.

    torch has kernels as (out, channel, height, width) and images as (N, channel, height, width).
    """

    axes = 4

    def _flat(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)

    def _unflat(self, matrix: torch.Tensor) -> torch.Tensor:
        out, channels, height, width = self.module.weight.shape
        return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)

    def _patches(self, inputs: torch.Tensor) -> torch.Tensor:
        module, size = self.module, self.module.kernel_size
        if module.padding == "same":
            totals = [dilation * (k - 1) for dilation, k in zip(module.dilation, size, strict=True)]
            (up, down), (left, right) = ((total // 2, total - total // 2) for total in totals)
        else:
            up, left = (0, 0) if module.padding == "valid" else module.padding
            down, right = up, left
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = torch.nn.functional.pad(inputs, (left, right, up, down), mode=mode)
        columns = torch.nn.functional.unfold(padded, size, module.dilation, 0, module.stride)
        samples, _, positions = columns.shape
        split = columns.reshape(samples, inputs.shape[1], -1, positions)
        return split.permute(0, 3, 2, 1).reshape(samples, positions, -1)

    def deltas(self, errors: torch.Tensor) -> torch.Tensor:
        return super().deltas(errors.movedim(-3, -1))


def _find_layers(model: torch.nn.Module, skip: Collection[str]) -> list[_Layer]:
    """The layers to precondition, in the order of the model."""
    modules = dict(model.named_modules())
    if isinstance(skip, str) or not set(skip) <= set(modules):
        raise ValueError(f"skip must be a collection of names of the model's modules, got {skip!r}")
    owners = Counter(p for module in modules.values() for p in module.parameters(recurse=False))
    layers: list[_Layer] = []
    for name, module in modules.items():
        if name in skip or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        parameters = list(module.parameters(recurse=False))
        if not all(p.requires_grad for p in parameters):
            continue
        if isinstance(module, torch.nn.Conv2d) and module.groups != 1:
            continue
        layer = _Layer(name, module) if isinstance(module, torch.nn.Linear) else _Convolution(name, module)
        if {id(p) for p in parameters} != {id(p) for p in layer.parameters}:
            raise ValueError(f"layer {name!r} must have a weight and a bias as its only parameters; name it in skip")
        if any(owners[p] > 1 for p in parameters):
            raise ValueError(f"layer {name!r} must not share parameters with another module; name both in skip")
        layers.append(layer)
    if not layers:
        raise ValueError("model must have an nn.Linear or an nn.Conv2d to precondition, got none")
    _arrays.check_arrays({name: p.detach() for x in layers for name, p in zip(x.names, x.parameters, strict=True)})
    return layers


def _check_likelihood(optimizer: Optimizer, likelihood: str | Likelihood | None) -> Likelihood | None:
    if optimizer.inverse.needs_network:
        raise ValueError(f"optimizer must not have the inverse {optimizer.inverse}, which only knows a Network")
    if likelihood is None:
        estimate = optimizer.estimate
        own = optimizer.inverse.uses_statistics and estimate.has_errors and not isinstance(estimate, Empirical)
        for needs, part in ((own, estimate), (_makes_passes(optimizer), (optimizer.scaling, optimizer.damping))):
            if needs:
                raise ValueError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))} for {part}, got None")
        return None
    if isinstance(likelihood, Likelihood):
        return likelihood
    _arrays.check_option("likelihood", likelihood, tuple(LIKELIHOODS))
    return LIKELIHOODS[likelihood]()


def _makes_passes(optimizer: Optimizer) -> bool:
    """Whether the exact Fisher information is asked for, and with it the model run again."""
    damping = optimizer.damping
    predicts = isinstance(damping, LevenbergMarquardt) and damping.prediction != "block_diagonal"
    return optimizer.scaling.needs_products or predicts


def _check_repeatable(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        batch_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        if batch_norm or (isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0.0):
            raise ValueError(
                f"model must give the same outputs when it is run again, for this optimizer's step rule, got {name!r}: "
                f"{module}; choose a step rule and a damping without products with F"
            )


# ----------------------------------------------------------------------------- small parts


class _Hook:
    """A hook that keeps no optimizer alive, and that does nothing in copies of the model."""

    def __init__(self, owner: NaturalGradient | None, method: str) -> None:
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)
        self._method = method

    def __call__(self, *args: Any) -> None:
        owner = self._owner()
        if owner is not None:
            getattr(owner, self._method)(*args)

    def __reduce__(self) -> Any:
        return _Hook, (None, self._method)


@dataclasses.dataclass(frozen=True)
class _Scaled(Scaling):
    """A step rule of which a part is taken."""

    rule: Scaling
    rate: float

    def take(self, direction: Tangent, previous: Tangent, at: Context) -> Change:
        """Take a part."""
        made, rate = self.rule.take(direction, previous, at), self.rate
        square = None if made.curvature is None else rate * rate * made.curvature
        return Change(tuple(rate * change for change in made.change), rate * made.rate, square, made.share)


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors in nested tuples, in order."""
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _refilled(like: Any, leaves: Iterator[Any]) -> Any:
    """Nested tuples with other tensors."""
    if not isinstance(like, tuple):
        return next(leaves)
    parts = [_refilled(part, leaves) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def _shape(leaf: Any) -> Any:
    return None if leaf is None else tuple(leaf.shape)
