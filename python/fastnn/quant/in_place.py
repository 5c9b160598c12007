"""A module that becomes another one and stays the object that it was, with its hooks and its place in the model."""

from __future__ import annotations

from typing import Any

import torch

#: What a module keeps when it becomes another: whoever watches it goes on doing so.
_KEPT = (
    "training",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def become(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Gives ``module`` the class, the tensors, the children and the attributes of ``other``; hooks, mode and what else it
    has of its own stay."""
    state = dict(module.__dict__)
    for name in (*getattr(type(module), "OWN", ()), "_packed_weight"):
        state.pop(name, None)
    state.update((name, value) for name, value in other.__dict__.items() if name not in _KEPT)
    module.__class__ = type(other)
    module.__dict__.clear()
    module.__dict__.update(state)


class undoing:
    """After an exception inside of it, modules are what they were when it was told of them."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[torch.nn.Module, type, dict[str, Any]]] = {}

    def remember(self, module: torch.nn.Module) -> None:
        self._saved.setdefault(id(module), (module, type(module), dict(module.__dict__)))

    def __enter__(self) -> undoing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            return
        for module, kind, state in self._saved.values():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
