"""What a graph of a module holds good for: the code that was followed, and all that it may have read of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from . import _cpu
from ._tracing import CONSTANT, changes_of, holds_the_same
from .nn.hooks import unwatched

#: A dictionary (of a module) and a name in it; without one, the dictionary's size.
Place = tuple[dict[str, Any], str | None]

#: How the attributes begin that fastnn gives to modules whose forward is a graph.
OURS = "_fastnn_"
#: The attributes that every module has.
_STANDARD = frozenset(torch.nn.Module().__dict__)
#: Of those the ones on which a graph depends: what unwatched asks (where it asks for others, they are new), and the mode.
_STATE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "training")
_CHILDREN = ("_modules", "_parameters", "_buffers")
_IMMUTABLE = (bool, int, float, complex, str, bytes, tuple, torch.dtype, torch.device, torch.Size)


class Guards:
    """The modules whose code lies within a graph, as they are now. Others the graph calls by name, whatever they have become.

    Python numbers, flags and the like are in a graph as they were; parameters and buffers are read when it runs. (Of what such
    attributes lead to, a configuration's fields for example, nothing is known.)
    """

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, training: bool | None = False) -> None:
        """``training``: the mode that the modules must be in, if any."""
        modules = dict(root.named_modules())
        called = {id(modules[node.target]) for node in graph.nodes if node.op == "call_module"}
        self._inside = list(_inside(root, called))
        self._training = training
        # The root's class is to change: it gets the graph for its forward.
        self._seen = [_Seen(module, None if module is root else type(module)) for module in self._inside]
        self._pinned: list[torch.nn.Module] = []
        self._edges: list[tuple[dict[str, Any], str, torch.nn.Module]] = []
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
            (parent._modules, name, child)
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
        right_mode = self._training is None or all(
            module.training is self._training for module in (self._inside[0], *self._pinned)
        )
        return right_mode and all(map(unwatched, self._pinned)) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether all is as it was but for modes and hooks."""
        in_place = all(children.get(name) is child for children, name, child in self._edges)
        return not self._refuted and in_place and all(seen.same() for seen in self._seen)

    def places(self) -> list[Place]:
        """Where all lies that this depends on."""
        found: list[Place] = [(module.__dict__, name) for module in self._pinned for name in (None, *_STATE)]
        found.append((self._inside[0].__dict__, "training"))
        found += [(children, name) for children, name, _ in self._edges]
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


class _Seen:
    """A module's class, if that matters, and its attributes and names, as they are now."""

    def __init__(self, module: torch.nn.Module, kind: type | None) -> None:
        self._module = module
        self._kind = kind
        self._attributes = {name: (value, _held(value)) for name, value in _attributes(module).items()}
        self._names = _names(module)

    def same(self) -> bool:
        module, kept = self._module, self._attributes
        now = _attributes(module)
        return (
            (self._kind is None or _alike(type(module), self._kind))
            and now.keys() == kept.keys()
            and all(_same(now[name], *kept[name]) for name in kept)
            and _names(module) == self._names
        )

    def places(self) -> list[Place]:
        module = self._module
        found: list[Place] = [(module.__dict__, None)]
        found += [(module.__dict__[table], None) for table in _CHILDREN]
        found += [(module._parameters, name) for name in module._parameters]
        for name, (value, _) in self._attributes.items():
            found.append((module.__dict__, name))
            if type(value) is dict:
                found += [(value, key) for key in value if type(key) is str]
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts what is written to it anew.
        current = {name: _same(value, value, held) for name, (value, held) in self._attributes.items()}
        return {**self.__dict__, "_current": current}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = state.pop("_current")
        self.__dict__.update(state)
        for name, (value, _) in self._attributes.items():
            if isinstance(value, torch.Tensor):
                self._attributes[name] = value, _held(value) if current[name] else -1


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


def _held(value: Any) -> Any:
    """What of a value can change while it stays the same object."""
    if isinstance(value, torch.Tensor):
        return changes_of(value)
    return value.copy() if type(value) in (list, dict) else None


def _same(value: Any, before: Any, held: Any) -> bool:
    if value is not before:
        return type(value) is type(before) and type(value) in _IMMUTABLE and value == before
    if isinstance(value, torch.Tensor):
        return _held(value) == held
    return held is None or holds_the_same(value, held)
