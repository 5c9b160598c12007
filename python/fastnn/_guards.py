"""What a graph of a module holds good for: the code that was followed, and all that it may have read of its modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from . import _cpu
from ._snapshots import Place, places_of, same, snapshot
from ._tracing import CONSTANT
from .nn.hooks import unwatched

#: How the attributes begin that fastnn gives to modules whose forward is a graph.
OURS = "_fastnn_"
#: The attributes that every module has.
_STANDARD = frozenset(torch.nn.Module().__dict__)
#: Of those the ones on which a graph depends: what unwatched asks (where it asks for others, they are new), and the mode.
_STATE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "training")
_CHILDREN = ("_modules", "_parameters", "_buffers")


class Guards:
    """The modules whose code lies within a graph, as they are now. Others the graph calls by name, whatever they have become.

    Attributes are in a graph as they were: numbers, flags, lists, tuples and dictionaries with what they hold. Parameters and
    buffers are read when it runs. Nothing is known of what other objects hold (a configuration's fields for example), of
    attributes of classes, and of global variables.
    """

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, training: bool | None = False) -> None:
        """``training``: the mode that the modules must be in, if any."""
        modules = dict(root.named_modules())
        called = {id(modules[node.target]) for node in graph.nodes if node.op == "call_module"}
        self._inside = list(_inside(root, called))
        self._training = training
        # The root's class is to change: it gets the graph for its forward.
        self._seen = [_Seen(module, None if module is root else type(module)) for module in self._inside]
        # Of the others what the code may read of them.
        names = {kind: _mentioned(kind) for kind in {type(module) for module in self._inside}}
        read = frozenset().union(*names.values())
        others = [module for module in modules.values() if id(module) in called]
        self._seen += [_Seen(module, None, read) for module in others if not read.isdisjoint(_attributes(module))]
        self._ties = _ties(modules.values(), {id(module) for module in self._inside})
        self._asking = [module for module in self._inside[1:] if "training" in names[type(module)]]
        self._pinned: list[torch.nn.Module] = []
        self._edges: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
        self.pin(self._inside[1:])
        self._watch: _cpu.Watch | None = None
        self._refuted = False

    def refute(self) -> None:
        """To be called where the graph has turned out not to hold good."""
        self._refuted = True

    def pin(self, modules: Iterable[torch.nn.Module]) -> None:
        """These, that others have or that are one of the others, must go on to be where they are and to be watched by nobody."""
        self._pinned += modules
        pinned = set(map(id, self._pinned))
        self._edges = [
            (parent, name, child)
            for parent in self._inside
            for name, child in parent._modules.items()
            if id(child) in pinned
        ]

    def keep(self, modules: Iterable[torch.nn.Module]) -> None:
        """These are pinned, and must keep their classes and attributes."""
        modules = list(modules)
        self.pin(modules)
        self._seen += [_Seen(module, type(module)) for module in modules]

    def hold(self) -> bool:
        """Whether all is as it was, and nobody watches one of these modules."""
        if self._watch is not None and self._watch.same():
            return True
        watch = _cpu.Watch(self.places())  # before the rest: a change meanwhile is seen by the next call
        if not self.as_traced():
            return False
        self._watch = watch
        return True

    def as_traced(self) -> bool:
        """The same, asked of everything."""
        root = self._inside[0]
        if self._training is None:
            right_mode = all(module.training is root.training for module in self._asking)
        else:
            right_mode = all(module.training is self._training for module in (root, *self._pinned))
        return right_mode and all(map(unwatched, self._pinned)) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether all is as it was but for modes and hooks."""
        in_place = all(parent._modules.get(name) is child for parent, name, child in self._edges)
        tied = all(len({id(table.get(name)) for table, name in group}) == 1 for group in self._ties)
        return not self._refuted and in_place and tied and all(seen.same() for seen in self._seen)

    def places(self) -> list[Place]:
        """Where all lies that this depends on."""
        found: list[Place] = [(module.__dict__, name) for module in self._pinned for name in (None, *_STATE)]
        found.append((self._inside[0].__dict__, "training"))
        found += [(parent._modules, name) for parent, name, _ in self._edges]
        found += [place for group in self._ties for place in group]
        return found + [place for seen in self._seen for place in seen.places()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None}  # copies have places of their own


def _inside(module: torch.nn.Module, called: set[int]) -> Iterator[torch.nn.Module]:
    """The module and those in it that are not called as a whole, each once."""
    found = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop().children():
            if id(child) not in called and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    yield from found.values()


def _ties(modules: Iterable[torch.nn.Module], inside: set[int]) -> list[list[Place]]:
    """Where modules, parameters and buffers lie that have several names, which are one in a graph."""
    places: dict[int, list[Place]] = {}
    of_graph = set()
    for module in modules:
        for table in _CHILDREN:
            for name, value in module.__dict__[table].items():
                if value is not None:
                    places.setdefault(id(value), []).append((module.__dict__[table], name))
                    if id(module) in inside:
                        of_graph.add(id(value))
    return [group for key, group in places.items() if len(group) > 1 and key in of_graph]


class _Seen:
    """A module's class, if that matters, and its attributes and names, as they are now; ``names``: only of these attributes."""

    def __init__(self, module: torch.nn.Module, kind: type | None, names: frozenset[str] | None = None) -> None:
        self._module = module
        self._kind = kind
        self._some = names
        self._attributes = {name: snapshot(value) for name, value in self._now().items()}
        self._names = None if names is not None else _names(module)

    def _now(self) -> dict[str, Any]:
        found = _attributes(self._module)
        return found if self._some is None else {name: found[name] for name in found.keys() & self._some}

    def same(self) -> bool:
        module, kept, now = self._module, self._attributes, self._now()
        new = now.keys() - kept.keys()
        return (
            (self._kind is None or _alike(type(module), self._kind))
            and kept.keys() <= now.keys()
            and not any(_may_be_read(module, name) for name in new)
            and all(same(now[name], kept[name]) for name in kept)
            and (self._names is None or _names(module) == self._names)
        )

    def places(self) -> list[Place]:
        module = self._module
        found: list[Place] = [(module.__dict__, None)]
        if self._some is None:
            for table in _CHILDREN:
                found += [(module.__dict__, table), (module.__dict__[table], None)]
            found += [(module._parameters, name) for name in module._parameters]
        for name, (value, _) in self._attributes.items():
            found += places_of(module.__dict__, name, value)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts what is written to it anew.
        current = {name: same(kept[0], kept) for name, kept in self._attributes.items()}
        return {**self.__dict__, "_current": current}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = state.pop("_current")
        self.__dict__.update(state)
        for name, (value, _) in self._attributes.items():
            self._attributes[name] = snapshot(value if current[name] else object())


def _mentioned(kind: type) -> frozenset[str]:
    """All names and strings in the code of a class of modules: among them the attributes that it reads."""
    names: set[str] = set()

    def look(code: Any) -> None:
        names.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, str):
                names.add(constant)
            elif inspect.iscode(constant):
                look(constant)

    for base in kind.__mro__:
        if base is torch.nn.Module:
            break
        for member in vars(base).values():
            for function in (member, *(getattr(member, name, None) for name in ("fget", "__func__", "func"))):
                if isinstance(function, Callable) and hasattr(inspect.unwrap(function), "__code__"):
                    look(inspect.unwrap(function).__code__)
    return frozenset(names)


def _may_be_read(module: torch.nn.Module, name: str) -> bool:
    """Of an attribute that a module was given later: the code may ask whether it is there, or have read the class's."""
    kind = type(module)
    return not hasattr(torch.nn.Module, name) and (hasattr(kind, name) or name in _mentioned(kind))


def _alike(kind: type, before: type) -> bool:
    """Whether they are the same but for :func:`fastnn.convert` or :func:`fastnn.revert`."""
    return kind is before or any(
        issubclass(one, other) and one.__module__.startswith("fastnn.")
        for one, other in ((kind, before), (before, kind))
    )


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _STANDARD and not name.startswith((CONSTANT, OURS))
    }


def _names(module: torch.nn.Module) -> list[tuple[str, bool]]:
    """Of children, parameters and buffers, and which there are not."""
    return [(name, value is None) for table in _CHILDREN for name, value in module.__dict__[table].items()]
