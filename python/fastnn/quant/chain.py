"""A whole convolutional network in integers: :func:`quantize_cnn_`.

Batch norms are folded into the convolutions before them (Jacob et al., CVPR 2018, section 3.2); convolution, sum with a
shortcut and relu are one kernel call; and what such calls hand to each other, through maximum pooling and into global
averages, is uint8 with the channels as neighbours. What follows what is found by ``torch.fx``; the rest of the model is computed as
it was, on the floating-point numbers that the last of these calls give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import nn
from ..backends.cpu import int8_conv as kernels
from ..backends.reference.quantize import choose_scale
from ..fuse import _fold, _only_user, _other_summand, _trace
from ..nn.mlp import _unwatched
from .config import Int8Static
from .conv import GlobalAverage, Parameters, QuantizedConv, Step
from .observers import Observer
from .quantize import inputs_of

Model = TypeVar("Model", bound=torch.nn.Module)

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, nn.Conv1d, nn.Conv2d)
_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d)
_ACTIVATIONS = {torch.nn.ReLU: "relu", nn.ReLU: "relu", torch.nn.ReLU6: "relu6", nn.ReLU6: "relu6"}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", "relu": "relu", "relu_": "relu"}
_MAX_POOLS = (torch.nn.MaxPool2d, nn.MaxPool2d)
_AVERAGES = (torch.nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d)
_FLOATS = (torch.float32, torch.bfloat16)


class _Group:
    """A convolution and what is computed with it in one call: its nodes, from the first to the last."""

    def __init__(self, nodes: list[fx.Node], conv: torch.nn.Module, norm: torch.nn.Module | None) -> None:
        self.nodes = nodes
        self.conv = conv
        self.norm = norm
        self.norm_name: str | None = None
        self.sum: fx.Node | None = None
        self.activation = "none"

    @property
    def input(self) -> fx.Node:
        return self.nodes[0].args[0]

    @property
    def residual(self) -> fx.Node | None:
        return None if self.sum is None else next(arg for arg in self.sum.args if arg not in self.nodes)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        conv, norm = self.conv, self.norm
        if norm is None:
            return conv.weight, conv.bias
        return _fold(
            *(conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
            torch.preserve_format,
        )


def quantize_cnn_(model: Model, config: Int8Static) -> Model:
    """Replace, in place, the convolutions of one and two dimensions by :class:`~fastnn.quant.QuantizedConv`, batch norms after
    them by nothing, and the model's forward by one that keeps to integers between them; return the model, in eval mode.

    Linear layers are left to :func:`~fastnn.quant.quantize_`, which can be called afterwards. Nothing undoes this: quantize a
    copy.

    Args:
        model: a module whose forward ``torch.fx`` can follow.
        config: the calibration data (inputs: tensors, tuples of positional arguments, or mappings of keyword arguments) and
            what chooses the range of a tensor.

    Raises TypeError where these are something else; ValueError where the forward cannot be followed, there is nothing to
    quantize, no data, or a convolution is quantized already. The model is then as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"quantize_cnn_: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Int8Static):
        raise TypeError(f"quantize_cnn_: config: expected an Int8Static, got {type(config).__name__}")
    again = next((name for name, module in model.named_modules() if isinstance(module, QuantizedConv)), None)
    if again is not None:
        raise ValueError(f"quantize_cnn_: model: {again or 'it'} is a QuantizedConv already")
    graph = _trace(model)
    if graph is None:
        raise ValueError(f"quantize_cnn_: model: torch.fx cannot follow the forward of {type(model).__name__}")
    modules = dict(model.named_modules())
    groups = _find_groups(graph, modules)
    if not groups:
        raise ValueError("quantize_cnn_: model: expected a convolution of one or two dimensions that can be quantized")
    whole = _quantized_nodes(graph, modules, groups)
    watched = {group.input for group in groups} | {group.residual for group in groups if group.residual is not None}
    watched = {_origin(node, whole, modules) for node in watched | whole}
    ranges = _calibrate(model, graph, watched, config)
    made = [_quantize(group, ranges, whole, modules) for group in groups]
    # From here on nothing fails.
    steps = [
        Step(conv, group.activation, torch.uint8 if group.last in whole else group.conv.weight.dtype, place)
        for group, (conv, place) in zip(groups, made, strict=True)
    ]
    _rewrite(model, graph, modules, groups, [conv for conv, _ in made], steps, whole)
    return model.eval()


# ---- which nodes -------------------------------------------------------------------------------------------------


def _find_groups(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> list[_Group]:
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            key = id(modules[node.target])
            calls[key] = calls.get(key, 0) + 1

    def module_of(node: fx.Node | None, kinds: tuple[type, ...]) -> torch.nn.Module | None:
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = modules[node.target]
        return module if type(module) in kinds and calls[id(module)] == 1 and _unwatched(module) else None

    groups, taken = [], set()
    for node in graph.nodes:
        conv = module_of(node, _CONVOLUTIONS)
        if conv is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        if conv.weight.dtype not in _FLOATS or not conv.weight.is_cpu or conv.weight[0].numel() > 65793:
            continue
        after = _only_user(node)
        norm = module_of(after, _NORMS)
        if norm is None or norm.running_mean is None or norm.num_features != conv.out_channels:
            norm = None
        group = _Group([node], conv, norm)
        if norm is not None:
            group.norm_name = after.target
            group.nodes.append(after)
        after = _only_user(group.last)
        other = _other_summand(after, group.last)
        if other is not None and after not in taken:
            group.sum = after
            group.nodes.append(after)
        after = _only_user(group.last)
        activation = _activation(after, modules)
        if activation is not None:
            group.activation = activation
            group.nodes.append(after)
        taken.update(group.nodes)
        groups.append(group)
    return groups


def _activation(node: fx.Node | None, modules: dict[str, torch.nn.Module]) -> str | None:
    if node is None or len([arg for arg in node.args if isinstance(arg, fx.Node)]) != 1:
        return None
    if node.op == "call_module":
        module = modules[node.target]
        return _ACTIVATIONS.get(type(module)) if _unwatched(module) else None
    if node.op not in ("call_function", "call_method") or set(node.kwargs) - {"inplace"}:
        return None
    return _FUNCTIONS.get(node.target)


def _is_max_pool(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None
    if type(module) not in _MAX_POOLS or not _unwatched(module):
        return False
    return _both(module.dilation) == (1, 1) and not module.ceil_mode and not module.return_indices


def _is_global_average(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None
    return type(module) in _AVERAGES and _unwatched(module) and _both(module.output_size) == (1, 1)


def _both(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _quantized_nodes(graph: fx.Graph, modules: dict[str, torch.nn.Module], groups: list[_Group]) -> set[fx.Node]:
    """The nodes that give uint8: all that read them take it."""
    found = {group.last for group in groups}
    for node in graph.nodes:
        if _is_max_pool(node, modules) and node.args[0] in found:
            found.add(node)
    takes = {group.nodes[0]: group for group in groups}
    adds = {group.sum: group for group in groups if group.sum is not None}
    while True:
        refused = {
            node
            for node in found
            if not all(
                user in takes
                or (user in adds and adds[user].residual is node)
                or (user in found and _is_max_pool(user, modules))
                or _is_global_average(user, modules)
                for user in node.users
            )
            or (_is_max_pool(node, modules) and node.args[0] not in found)
        }
        if not refused:
            return found
        found -= refused


def _origin(node: fx.Node, whole: set[fx.Node], modules: dict[str, torch.nn.Module]) -> fx.Node:
    """The node whose scale this one has: maxima of integers are integers of the same scale."""
    while node in whole and _is_max_pool(node, modules):
        node = node.args[0]
    return node


# ---- ranges ------------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observers: dict[fx.Node, Observer]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.observers:
            self.observers[n].observe(result)
        return result


def _calibrate(
    model: torch.nn.Module, graph: fx.Graph, watched: set[fx.Node], config: Int8Static
) -> dict[fx.Node, Parameters]:
    recorder = _Recorder(fx.GraphModule(model, graph), {})
    # The interpreter runs a copy of the graph, whose nodes have the same names.
    named = {node.name: node for node in recorder.module.graph.nodes}
    observers = {node: config.make_observer() for node in watched}
    recorder.observers = {named[node.name]: observer for node, observer in observers.items()}
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    training = {module: module.training for module in model.modules()}
    model.eval()
    seen = 0
    try:
        with torch.no_grad():
            for inputs in inputs_of(config.calibration_data):
                if isinstance(inputs, Mapping):
                    inputs = [inputs[name] for name in names if name in inputs]
                elif not isinstance(inputs, (tuple, list)):
                    inputs = [inputs]
                recorder.run(*inputs)
                seen += 1
    finally:
        for module, mode in training.items():
            module.training = mode
    if not seen:
        raise ValueError("quantize_cnn_: calibration_data: expected inputs, got none")
    return {node: _parameters(observer.range()) for node, observer in observers.items()}


def _parameters(ends: tuple[float, float]) -> Parameters:
    scale, zero_point = choose_scale(torch.tensor(ends), [], 0, "uint8", False)
    return scale.reshape(()), zero_point.reshape(())


# ---- the model ---------------------------------------------------------------------------------------------------


def _quantize(
    group: _Group, ranges: dict[fx.Node, Parameters], whole: set[fx.Node], modules: dict[str, torch.nn.Module]
) -> tuple[QuantizedConv, Any]:
    """The layer, and where the scale of its residual lies."""
    conv = group.conv
    outputs = ranges[group.last] if group.last in whole else None
    made = QuantizedConv.of(
        *group.folded(),
        *(ranges[_origin(group.input, whole, modules)], outputs),
        **dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups),
    )
    made.was = type(conv)
    if group.residual is None:
        return made, None
    for name, value in zip(_RESIDUAL, ranges[_origin(group.residual, whole, modules)], strict=True):
        made.register_buffer(name, value.clone())
    return made, (made._buffers, *_RESIDUAL)


_RESIDUAL = ("residual_scale", "residual_zero_point")


def _rewrite(
    model: torch.nn.Module,
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    groups: list[_Group],
    made: list[QuantizedConv],
    steps: list[Step],
    whole: set[fx.Node],
) -> None:
    averages: list[GlobalAverage] = []

    def run_step(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return steps[index](input, residual)

    def run_average(input: Tensor, index: int) -> Tensor:
        return averages[index](input)

    def run_max(input: Tensor, *windows: tuple[int, int]) -> Tensor:
        return kernels.max_pool(input, *windows)

    producers = {group.last: conv for group, conv in zip(groups, made, strict=True)}
    dtypes = {conv: group.conv.weight.dtype for group, conv in zip(groups, made, strict=True)}
    pools: list[tuple[fx.Node, Callable[..., Tensor], tuple[Any, ...]]] = []
    for node in graph.nodes:
        if node in whole and _is_max_pool(node, modules):
            module = modules[node.target]
            stride = module.kernel_size if module.stride is None else module.stride
            windows = _both(module.kernel_size), _both(stride), _both(module.padding)
            pools.append((node, run_max, windows))
        elif _is_global_average(node, modules) and node.args[0] in whole:
            producer = producers[_origin(node.args[0], whole, modules)]
            place = producer._buffers, "output_scale", "output_zero_point"
            averages.append(GlobalAverage(place, dtypes[producer]))
            pools.append((node, run_average, (len(averages) - 1,)))
    for node, function, arguments in pools:
        with graph.inserting_before(node):
            replacement = graph.call_function(function, (node.args[0], *arguments))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    for index, group in enumerate(groups):
        with graph.inserting_before(group.last):
            arguments = (index, group.input) if group.residual is None else (index, group.input, group.residual)
            call = graph.call_function(run_step, arguments)
        group.last.replace_all_uses_with(call)
        for old in reversed(group.nodes):
            graph.erase_node(old)
    for group, conv in zip(groups, made, strict=True):
        name = next(name for name, module in modules.items() if module is group.conv)
        model.set_submodule(name, conv)
        if group.norm_name is not None:
            model.set_submodule(group.norm_name, torch.nn.Identity())
    code = graph.python_code(root_module="self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    model.__class__ = _chained_class(type(model), namespace["forward"])


def _chained_class(kind: type, forward: Callable[..., Any]) -> type:
    """The class of a model in integers. Its own forward, of layers that take and give floating-point numbers, is for those who
    compile the model."""

    def dispatch(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return kind.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    body = {
        "forward": dispatch,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_original_class": kind,
    }
    return type(kind.__name__, (kind,), body)
