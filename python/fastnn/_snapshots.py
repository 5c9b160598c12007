"""Values as they were: what of a module's attribute can change, also where it stays the same object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

#: A dictionary and a key in it; without one, the dictionary itself, whatever is changed of it.
Place = tuple[dict[Any, Any], Any]
#: A value, and of a tensor what counts its changes, of a list, tuple or dictionary the snapshots of what it holds.
Snapshot = tuple[Any, Any]

_IMMUTABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
#: How deep lists, tuples and dictionaries within each other are looked into.
DEEPEST = 8


def changes_of(tensor: torch.Tensor) -> int:
    """A number that is another after each change in place, where torch counts these."""
    return 0 if tensor.is_inference() else tensor._version


def snapshot(value: Any, depth: int = 0) -> Snapshot:
    if isinstance(value, torch.Tensor):
        return value, changes_of(value)
    if depth < DEEPEST and isinstance(value, (list, tuple)):
        return value, [snapshot(item, depth + 1) for item in value]
    if depth < DEEPEST and isinstance(value, dict):
        return value, [(key, snapshot(item, depth + 1)) for key, item in value.items()]
    return value, None


def same(value: Any, before: Snapshot) -> bool:
    """Whether the value is what it was. Equal numbers, strings, lists, tuples and dictionaries are the same."""
    was, detail = before
    if type(value) is not type(was):
        return False
    if isinstance(was, torch.Tensor):
        return value is was and changes_of(value) == detail
    if detail is None:
        # As they are written, by which -0.0 is not 0.0, but a NaN itself.
        return value is was or (isinstance(was, _IMMUTABLE) and repr(value) == repr(was))
    if len(value) != len(detail):
        return False
    if isinstance(was, dict):
        pairs = zip(value.items(), detail, strict=True)
        return all(key is k or key == k for (key, _), (k, _) in pairs) and all(
            same(item, kept) for item, (_, kept) in zip(value.values(), detail, strict=True)
        )
    return all(same(item, kept) for item, kept in zip(value, detail, strict=True))


def put_back(value: Any, before: Snapshot) -> None:
    """Gives a list or a dictionary what it held."""
    _, detail = before
    if isinstance(value, list):
        value[:] = [item for item, _ in detail]
    elif isinstance(value, dict):
        value.clear()
        value.update((key, item) for key, (item, _) in detail)


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < DEEPEST and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth + 1)


def places_of(holder: dict[Any, Any], key: Any, value: Any, depth: int = 0) -> Iterator[Place]:
    """Where a value lies, and all that it holds."""
    yield holder, key
    if depth == DEEPEST:
        return
    if isinstance(value, dict):
        yield value, None
        for name, item in value.items():
            if name is not None:
                yield from places_of(value, name, item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (list, tuple, dict, torch.Tensor)):
                yield from places_of({"item": item}, "item", item, depth + 1)
