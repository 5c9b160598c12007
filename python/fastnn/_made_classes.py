"""Classes of modules that are made at run time, and how pickle makes objects of them.

Those for classes of packages that fastnn does not import have two halves: one of fastnn's, and the very class that the module
has, so that ``isinstance`` and ``super()`` go on working.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from ._tracing import UnexpectedDtype, arguments_of


class Half:
    """The half of such a class that is known beforehand; the other half is the module's own class."""

    _half: type[Half]
    _original_class: type[torch.nn.Module]

    @staticmethod
    def members(original: type[torch.nn.Module]) -> dict[str, Any]:
        """What else the class on top of ``original`` has."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find a class by its name that was made at run time; those that it was made of can be found.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__.copy()  # object's: Python 3.11
        return _new_of_both, (self._half, self._original_class), state


@functools.cache
def fast_class(half: type[Half], original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The subclass of both; one for each pair, however often it is asked for."""
    body = {"__module__": half.__module__, "__doc__": half.__doc__, "_half": half, "_original_class": original}
    body.update(half.members(original))
    return types.new_class(original.__name__, (half, original), exec_body=lambda names: names.update(body))


def new_module(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """An object of this class on which no constructor has run."""
    return kind.__new__(kind)


def _new_of_both(half: type[Half], original: type[torch.nn.Module]) -> torch.nn.Module:
    return new_module(fast_class(half, original))


def maker(kind: type[torch.nn.Module]) -> tuple[Callable[..., torch.nn.Module], tuple[Any, ...]]:
    """The function and arguments, all of which pickle can name, that make an object of this class."""
    if "_half" in kind.__dict__:
        return _new_of_both, (kind._half, kind._original_class)
    return new_module, (kind,)


def graph_class(
    kind: type[torch.nn.Module],
    choose: Callable[[torch.nn.Module], Callable[..., Any] | None],
    members: dict[str, Any],
    otherwise: Callable[..., Any] | None = None,
    refuted: Callable[[], None] | None = None,
) -> type[torch.nn.Module]:
    """The class of a module whose forward is a graph, with these members.

    ``choose`` gives the graph's function for a call with the arguments that have no default, or None. Where that is None, and
    for calls with other arguments, ``otherwise`` is called: by default kind's own forward. So it is where a value has not the
    dtype that the graph was made for, which ``refuted`` is told.
    """
    arguments_of_call = arguments_of(kind.forward)

    @functools.wraps(kind.forward)  # whose parameters torch.export and others ask for
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = choose(self)
        arguments = None if chosen is None else arguments_of_call(self, *args, **kwargs)
        if arguments is not None:
            try:
                return chosen(self, *arguments)
            except UnexpectedDtype:
                refuted()
        return (otherwise or kind.forward)(self, *args, **kwargs)

    body = {
        "forward": forward,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), {**body, **members})
