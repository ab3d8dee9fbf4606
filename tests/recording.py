"""A namespace over NumPy that writes down what the core asks of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat.numpy
import pytest

from natgrad_array import _arrays

EXTENSIONS = ("linalg", "fft")


class Call(NamedTuple):
    """One call: the function ("linalg.eigh" for an extension), its keywords, how many positional arguments."""

    function: str
    keywords: tuple[str, ...]
    positional: int


@dataclass(eq=False)
class Recorder:
    """NumPy's namespace with a log; arrays stay NumPy arrays."""

    calls: list[Call] = field(default_factory=list)
    module: ModuleType = array_api_compat.numpy
    prefix: str = ""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if name in EXTENSIONS:
            return Recorder(self.calls, value, f"{name}.")
        # A dtype is callable too, but naming one is not a call.
        if not callable(value) or isinstance(value, type):
            return value

        def logged(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(Call(self.prefix + name, tuple(sorted(kwargs)), len(args)))
            return value(*args, **kwargs)

        return logged


def record(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> list[Call]:
    """Everything that `function` calls through the namespace it is given by `_arrays`."""
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(_arrays.libraries.compat, "array_namespace", lambda *arrays, **options: recorder)
        function()
    return recorder.calls


def complaint(call: Call, namespace: ModuleType) -> str | None:
    """Why `namespace` cannot take a call, or None if it can.

    A keyword has to be a parameter by its name: one that vanishes in ``**kwargs`` reaches
    a routine which may not know it. Element-wise functions carry no signature, but say how
    many inputs they take.
    """
    target: Any = namespace
    for part in call.function.split("."):
        target = getattr(target, part, None)
        if target is None:
            return f"{namespace.__name__} has no {call.function}"
    if hasattr(target, "nin"):
        if call.positional != target.nin:
            return f"{call.function} takes {target.nin} arrays, called with {call.positional}"
        unknown = set(call.keywords) - {"dtype", "out", "casting"}
        return f"{call.function} does not know {unknown}" if unknown else None
    try:
        signature = inspect.signature(target)
    except ValueError:
        return None  # a built-in function: that it is there is all that can be said
    unknown = set(call.keywords) - {
        name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
    }
    if unknown:
        return f"{call.function}{signature} does not know {unknown}"
    try:
        signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.function}{signature}: {error}"
    return None
