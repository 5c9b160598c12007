"""Modules of other packages that compute attention in a forward of their own: vision transformers, GPTs and the models of
Hugging Face transformers, whose forward calls ``scaled_dot_product_attention`` between layers.

Their forward stays what it is; what it asks torch for is computed by fastnn. Which classes do so is read off the names that
their code uses, which imports nothing and runs nothing.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import functional
from .._made_classes import Half, fast_class
from ..ops._route import PLAIN

#: What the code of such a forward names: torch's function, or the table in which transformers looks for one that calls it.
_NAMES = frozenset({"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"})
_COPYING = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__deepcopy__", "__copy__")


class _AttentionMode(TorchFunctionMode):
    """Sends ``scaled_dot_product_attention`` to fastnn, and nothing else."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            if all(kind in PLAIN for kind in types):
                func = functional.scaled_dot_product_attention
            else:
                given = [*args, *(kwargs or {}).values()]
                proxy = next((value for value in given if isinstance(value, fx.Proxy)), None)
                if proxy is not None:  # being traced: the graph runs outside of this mode
                    function = functional.scaled_dot_product_attention
                    return proxy.tracer.create_proxy("call_function", function, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_MODE = _AttentionMode()


class OwnAttention(Half):
    """A forward of its own, in which ``scaled_dot_product_attention`` is fastnn's; all else in it is as it was written."""

    remark = "attention in a forward of its own, whose other functions are torch's"

    @staticmethod
    def members(original: type[torch.nn.Module]) -> dict[str, Any]:
        # wraps: torch.fx, and those who read a model's signature, find the arguments of the original.
        @functools.wraps(original.forward)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _MODE:
                return original.forward(self, *args, **kwargs)

        # Not one of fastnn's layers, which torch.fx would not look into.
        return {"forward": forward, "__module__": original.__module__}


def own_attention_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast subclass of a class that :func:`has_own_attention` has recognised."""
    return fast_class(OwnAttention, original)


def has_own_attention(module: torch.nn.Module) -> bool:
    """Whether the forward of the module, whose class is neither torch's nor fastnn's, computes attention by itself."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "fastnn.")) or not isinstance(
        _member(kind, "forward"), types.FunctionType
    ):
        return False
    # One that says itself how it is copied would be copied as something else.
    copies = any(name in vars(base) for base in kind.__mro__[:-1] for name in _COPYING)
    return not copies and _computes_attention(kind)


@functools.cache
def _computes_attention(kind: type[torch.nn.Module]) -> bool:
    """Whether the code of its forward names one of :data:`_NAMES`, or that of methods which that calls. Not where it asks for
    checkpoints: in the backward they compute it again, outside of the forward."""
    pending, seen, found = ["forward"], {"forward"}, False
    while pending:
        for names in _names_in(kind, pending.pop()):
            if "checkpoint" in names:
                return False
            found = found or not names.isdisjoint(_NAMES)
            methods = {name for name in names - seen if _member(kind, name) and not hasattr(torch.nn.Module, name)}
            pending += methods
            seen |= methods
    return found


def _member(kind: type, name: str) -> Any:
    """What the class holds under the name, which asking the class itself might compute."""
    return inspect.getattr_static(kind, name, None)


def _names_in(kind: type, method: str) -> Iterator[frozenset[str]]:
    """The names that the code of a method uses, in each class that has one, with those of functions inside of it."""
    for base in kind.__mro__:
        function = vars(base).get(method)
        function = inspect.unwrap(getattr(function, "__func__", function))
        pending = [getattr(function, "__code__", None)]
        while pending:
            code = pending.pop()
            if isinstance(code, types.CodeType):
                yield frozenset(code.co_names)
                pending += code.co_consts
