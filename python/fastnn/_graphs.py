"""What a graph of ``torch.fx`` computes where: which calls follow each other, and what they change in place."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: By their names in the module operator: what ``+=`` and its like call.
OPERATORS = tuple(
    f"i{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def apply(value: Any, other: Any) -> Any:
        return function(value, other)

    apply.__name__ = apply.__qualname__ = name
    return apply


APPLIED = {name: _in_place(name) for name in OPERATORS}
_SUMS = (operator.add, torch.add, APPLIED["iadd"])
_SUM_METHODS = ("add", "add_", "__add__", "__iadd__")
_SUMS_IN_PLACE = (APPLIED["iadd"], "add_", "__iadd__")


def count_calls(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> collections.Counter[int]:
    """How often each module is called, by its id."""
    return collections.Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_summand(node: fx.Node | None, one: fx.Node) -> fx.Node | None:
    """b where the node is a + b of two tensors, and a is the given one. Not where the sum is written over b, which somebody
    may read again."""
    if node is None or node.kwargs or len(node.args) != 2:
        return None
    if not (node.op == "call_function" and node.target in _SUMS) and not (
        node.op == "call_method" and node.target in _SUM_METHODS
    ):
        return None
    a, b = node.args
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if a is one:
        return b
    return None if is_in_place(node) else a


def is_in_place(total: fx.Node) -> bool:
    """Whether a sum is written over its first operand."""
    return total.target in _SUMS_IN_PLACE


def undisturbed(chain: list[fx.Node], modules: dict[str, torch.nn.Module]) -> bool:
    """Whether these calls can all be made where the last one is: nothing between changes in place what they may read."""
    node = chain[0].next
    while node is not chain[-1]:
        if node not in chain and not all(is_alone(value, modules) for value in written(node, modules)):
            return False
        node = node.next
    return True


def written(node: fx.Node, modules: dict[str, torch.nn.Module]) -> list[fx.Node]:
    """What the node changes in place, if it does."""
    given: list[fx.Node] = []
    if node.op == "call_module":
        in_place = getattr(modules[node.target], "inplace", False)
    elif node.op in ("call_function", "call_method"):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        bare = name.strip("_")
        in_place = (name.endswith("_") and not name.endswith("__")) or bool(
            bare in OPERATORS or bare == "setitem" or node.kwargs.get("inplace")
        )
        if node.kwargs.get("out") is not None:
            fx.node.map_arg(node.kwargs["out"], given.append)
    else:
        return []
    if in_place:
        fx.node.map_arg(node.args[0] if node.args else node.all_input_nodes, given.append)
    return given


def is_alone(value: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether nobody else reads this value, or memory that it shares."""
    makes_anew = (torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm, torch.nn.Linear)
    new = value.op == "call_module" and isinstance(modules[value.target], makes_anew)
    return len(value.users) == 1 and (new or getattr(value.target, "__module__", None) == "fastnn.fuse")
