"""What can run an op. ``cpu``, ``cuda`` and ``triton``: the kernels of this package; ``reference``: the formula in plain torch.

The device of a call's tensors says which backends it may go to, unless ``with fastnn.backend(name):`` has: on a GPU CUDA, then
Triton. The first of them that can run at all and has a function runs it (:func:`file_of`). Ops ask :func:`supports` whether one
has a kernel for their tensors, and call it through a :class:`Kernels`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _state
from . import cpu, cuda, triton

_MODULES = {"cpu": cpu, "cuda": cuda, "triton": triton}
#: Of the device of a call's tensors: the backends that have kernels for it. The first that has one runs an op.
_ON_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def names_of(*tensors: Any) -> tuple[str, ...]:
    """The backends that these tensors may go to, the first choice first. (Under "reference" nothing asks.)"""
    # Dynamo cannot read a ContextVar; what it traces asks again when it runs.
    asked = None if torch.compiler.is_dynamo_compiling() else _state.settings().backend
    if asked in _MODULES:
        return (asked,)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            return _ON_DEVICE["cuda" if tensor.is_cuda else "cpu"]
    return _ON_DEVICE["cpu"]


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when a backend of these tensors has kernels that can run ``op`` on them, else the reasons why not, for people."""
    reasons = []
    for name in names_of(*tensors):
        reason = _MODULES[name].supports(op, *tensors)
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons)


@functools.cache
def _module(backend: str, family: str) -> ModuleType | None:
    """A backend's file for a family, "" for the backend itself; None where it has none."""
    module = _MODULES[backend]
    if not family:
        return module
    name = f"{module.__name__}.{family}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def file_of(family: str, function: str, *tensors: Any) -> ModuleType:
    """The file for a family of the backend that runs one of its functions: of those of these tensors the first that can run at
    all and has it."""
    names = names_of(*tensors)
    for name in names:
        module = _module(name, family) if _MODULES[name].why_not() is None else None
        if hasattr(module, function):
            return module
    raise NotImplementedError(f"no kernel {function!r} on {' or '.join(names)}")


class Kernels:
    """The functions of one family, each in the file that :func:`file_of` its arguments gives.

    ``Kernels("softmax").softmax(x, ...)`` is ``backends.cpu.softmax.softmax(x, ...)`` for a tensor on the CPU; for one on a
    GPU it is that of ``backends.cuda``, or where there is none that of ``backends.triton``. ``Kernels()`` has what the
    backends' own modules have.
    """

    def __init__(self, family: str = "") -> None:
        self._family = family

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function.startswith("__"):
            raise AttributeError(function)
        on_cpu = _module("cpu", self._family)
        getattr(on_cpu, function)  # an AttributeError now, not at the call

        def call(*args: Any, **kwargs: Any) -> Any:
            # Without a search where there is no choice: that is some of what a small call takes.
            module = on_cpu if names_of(*args) == ("cpu",) else file_of(self._family, function, *args)
            return getattr(module, function)(*args, **kwargs)

        setattr(self, function, call)  # found at once from now on
        return call
