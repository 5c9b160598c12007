"""The modules of a model: which of them ``only=`` and ``skip=`` mean, and the names they go by."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)
Predicate = Callable[[str, torch.nn.Module], bool]
#: Name patterns, module classes and predicates; :func:`fastnn.convert` says what each means.
Selection = str | type | Predicate | Iterable[str | type | Predicate]


def check_model(function: str, model: Any, name: str = "model") -> None:
    """Raises TypeError for what is no module, as the argument ``name`` of ``function``."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: {name} must be a torch.nn.Module, got {type(model).__name__}")


def named_modules(model: torch.nn.Module) -> list[tuple[list[str], torch.nn.Module]]:
    """Every module once, with all the names it goes by."""
    found: dict[int, tuple[list[str], torch.nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), ([], module))[0].append(name)
    return list(found.values())


def selected(function: str, model: torch.nn.Module, only: Selection | None, skip: Selection | None) -> set[int]:
    """The ids of the modules that ``function`` is asked about: ``only`` these, or all, without those to ``skip``.

    Raises TypeError for what is no selection, ValueError for a name pattern that meets no module.
    """
    chosen = {id(module) for module in model.modules()} if only is None else _select(function, "only", only, model)
    return chosen if skip is None else chosen - _select(function, "skip", skip, model)


def _select(function: str, argument: str, selection: Selection, model: torch.nn.Module) -> set[int]:
    if isinstance(selection, (str, type)) or callable(selection):
        selection = [selection]
    if not isinstance(selection, Iterable):
        raise TypeError(f"{function}: {argument} must be names, module classes or a predicate, got {selection!r}")
    chosen: set[int] = set()
    for choice in selection:
        if isinstance(choice, str):
            matches = [m for n, m in model.named_modules(remove_duplicate=False) if fnmatch.fnmatchcase(n, choice)]
            if not matches:
                raise ValueError(f"{function}: {argument}={choice!r} matches the name of no module")
            chosen.update(_ids_inside(matches))
        elif isinstance(choice, type):
            if not issubclass(choice, torch.nn.Module):
                raise TypeError(f"{function}: {argument} names {choice.__name__}, which is no torch.nn.Module class")
            chosen.update(_ids_inside(m for m in model.modules() if isinstance(m, choice)))
        elif callable(choice):
            named = model.named_modules(remove_duplicate=False)
            chosen.update(id(module) for name, module in named if choice(name, module))
        else:
            raise TypeError(f"{function}: {argument} must be names, module classes or a predicate, got {choice!r}")
    return chosen


def _ids_inside(modules: Iterable[torch.nn.Module]) -> Iterator[int]:
    for module in modules:
        for inner in module.modules():
            yield id(inner)


def class_name(kind: type) -> str:
    """The name by which people know a class."""
    if kind.__module__.startswith("torch.nn.modules."):
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
