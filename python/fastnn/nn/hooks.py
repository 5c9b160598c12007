"""Whether somebody watches a module's calls: calls that several layers make as one would pass by hooks."""

from __future__ import annotations

import torch
from torch.nn.modules import module as _torch_module


def any_global_hook() -> bool:
    """Whether somebody watches every module."""
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def unwatched(module: torch.nn.Module) -> bool:
    """Whether calling the module does nothing but run the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
