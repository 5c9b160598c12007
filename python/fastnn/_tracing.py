"""Models as graphs of ``torch.fx``: which layers are computed one after the other."""

from __future__ import annotations

import collections
import operator

import torch
from torch import fx

_SUMS = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        ours = module.__class__.__module__.startswith(("fastnn.nn.", "fastnn.quant."))
        return ours or super().is_leaf_module(module, name)


def trace(module: torch.nn.Module, training: bool = False, tracer: fx.Tracer | None = None) -> fx.Graph | None:
    """The module's computation in eval mode, or in training, or None where its Python does more than pass tensors on.

    ``tracer`` says which modules are looked into; by default no layer of torch or fastnn is.
    """
    modes = {inner: inner.training for inner in module.modules()}
    module.train(training)
    try:
        return (tracer or _Tracer()).trace(module)
    except Exception:  # whatever the model's code raises when it meets a proxy
        return None
    finally:
        for inner, mode in modes.items():
            inner.training = mode


def trace_whole(model: torch.nn.Module) -> fx.Graph | None:
    """As :func:`trace`; None as well for torch's layers around others, which do not run them one after the other, except for
    Sequential."""
    library = type(model).__module__.startswith(("torch.nn.", "fastnn.nn.", "fastnn.quant."))
    return trace(model) if not library or isinstance(model, torch.nn.Sequential) else None


def count_calls(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> collections.Counter[int]:
    """How often each module is called, by its id."""
    return collections.Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_summand(node: fx.Node | None, one: fx.Node) -> fx.Node | None:
    """b where the node is a + b of two tensors, and a is the given one."""
    if node is None or node.kwargs or len(node.args) != 2:
        return None
    if not (node.op == "call_function" and node.target in _SUMS) and not (
        node.op == "call_method" and node.target in ("add", "add_", "__iadd__", "__add__")
    ):
        return None
    a, b = node.args
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    return b if a is one else a
