"""What can run an op. ``cpu`` and ``cuda``: the kernels of this package; ``reference``: the formula in plain torch.

The device of a call's tensors chooses, unless ``with fastnn.backend(name):`` has chosen. Ops ask :func:`supports` whether the
chosen one has a kernel, and call it through a :class:`Kernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _state
from . import cpu, cuda

_MODULES = {"cpu": cpu, "cuda": cuda}


def name_of(*tensors: Any) -> str:
    """Whose kernels these tensors go to, "cpu" or "cuda". (Under "reference" nothing asks.)"""
    # Dynamo cannot read a ContextVar; what it traces asks again when it runs.
    asked = None if torch.compiler.is_dynamo_compiling() else _state.settings().backend
    if asked in _MODULES:
        return asked
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            return "cuda" if tensor.is_cuda else "cpu"
    return "cpu"


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when the kernels of the backend of these tensors can run ``op`` on them, else the reason why not, for people."""
    return _MODULES[name_of(*tensors)].supports(op, *tensors)


class Kernels:
    """The functions of one family, each on the backend that its tensors go to.

    ``Kernels("softmax").softmax(x, ...)`` is ``backends.cpu.softmax.softmax(x, ...)`` for a tensor on the CPU, and that of
    ``backends.cuda`` for one on a GPU; ``Kernels()`` has what the backends' own modules have.
    """

    def __init__(self, family: str = "") -> None:
        self._family = family

    def module(self, backend: str) -> ModuleType:
        name = f"{_MODULES[backend].__name__}.{self._family}" if self._family else _MODULES[backend].__name__
        return importlib.import_module(name)

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function.startswith("__"):
            raise AttributeError(function)
        on_cpu = self.module("cpu")
        getattr(on_cpu, function)  # an AttributeError now, not at the call

        def call(*args: Any, **kwargs: Any) -> Any:
            backend = name_of(*args)
            if backend == "cpu":
                return getattr(on_cpu, function)(*args, **kwargs)
            return getattr(self.module(backend), function)(*args, **kwargs)

        setattr(self, function, call)  # found at once from now on
        return call
