"""Convolutional networks in integers: what :func:`fastnn.quant.quantize_` makes of convolutions under ``Int8Static``.

Batch norms are folded into the convolutions before them (Jacob et al., CVPR 2018, section 3.2); convolution, sum with a
shortcut and relu are one kernel call; and what such calls hand to each other, through maximum pooling and into global
averages, is uint8 with the channels as neighbours. What follows what is found by ``torch.fx``; the rest of the model is
computed as it was, on the floating-point numbers that the last of these calls give.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import nn
from .._folding import fold_batch_norm
from .._graphs import count_calls, only_user, other_summand, undisturbed
from .._guards import OURS, Guards
from .._made_classes import graph_class, maker
from .._tracing import trace_whole
from ..backends.reference.quantize import choose_scale
from ..nn.hooks import any_global_hook, unwatched
from .config import Int8Static
from .conv import RESIDUAL, GlobalAverage, Parameters, QuantizedConv, Step
from .modules import class_before
from .observers import Observer
from .program import Call, Calls

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = tuple(getattr(package, f"BatchNorm{rank}d") for package in (torch.nn, nn) for rank in (1, 2, 3))
_ACTIVATIONS = {torch.nn.ReLU: "relu", nn.ReLU: "relu", torch.nn.ReLU6: "relu6", nn.ReLU6: "relu6"}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", "relu": "relu", "relu_": "relu"}
MAX_POOLS = (torch.nn.MaxPool2d, nn.MaxPool2d)
AVERAGES = (torch.nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d)
_FLOATS = (torch.float32, torch.bfloat16)


class Group:
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
    def layer(self) -> str:
        """The convolution's name in the module that was traced."""
        return self.nodes[0].target

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def replace_in(self, graph: fx.Graph, function: Callable[..., Any], chain: fx.Node, index: int) -> fx.Node:
        """Puts ``function(chain, index, input[, residual])`` in the place of the nodes, and returns it."""
        added = () if self.residual is None else (self.residual,)
        with graph.inserting_before(self.last):
            call = graph.call_function(function, (chain, index, self.input, *added))
        self.last.replace_all_uses_with(call)
        for old in reversed(self.nodes):
            graph.erase_node(old)
        return call

    def folded(self) -> tuple[Tensor, Tensor | None]:
        conv, norm = self.conv, self.norm
        if norm is None:
            return conv.weight, conv.bias
        return fold_batch_norm(
            *(conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
            torch.preserve_format,
        )


class Part:
    """A module whose forward can be followed, and the convolutions in it that are to be quantized. Nothing of it changes before
    :meth:`commit`, which cannot fail once :meth:`make` has not."""

    def __init__(
        self, module: torch.nn.Module, name: str, graph: fx.Graph, groups: list[Group], config: Int8Static
    ) -> None:
        self.module = module
        self.prefix = name + "." if name else ""
        self.graph = graph
        self.groups = groups
        self.modules = dict(module.named_modules())
        self.whole = _quantized_nodes(graph, self.modules, groups)
        watched = {group.input for group in groups}
        watched |= {group.residual for group in groups if group.residual is not None}
        watched = {self.origin(node) for node in watched | self.whole}
        self._observers = {node: config.make_observer() for node in watched}
        self._recorder = _Recorder(fx.GraphModule(module, graph))
        # The interpreter runs a copy of the graph, whose nodes have the same names.
        named = {node.name: node for node in self._recorder.module.graph.nodes}
        self._recorder.observers = {named[node.name]: observer for node, observer in self._observers.items()}
        self._names = [node.target for node in graph.nodes if node.op == "placeholder"]

    @property
    def observers(self) -> dict[str, Observer]:
        """What watches the results of the nodes, by their names. Others may be put in."""
        return {node.name: observer for node, observer in self._observers.items()}

    @observers.setter
    def observers(self, given: dict[str, Observer]) -> None:
        self._observers = {node: given[node.name] for node in self._observers}

    def origin(self, node: fx.Node) -> fx.Node:
        """The node whose range a node's result is quantized with: maxima of integers are integers of the same scale."""
        while node in self.whole and _is_max_pool(node, self.modules):
            node = node.args[0]
        return node

    def averages(self, node: fx.Node) -> bool:
        """Whether the node is the mean of each channel of what comes in uint8."""
        return _is_global_average(node, self.modules) and node.args[0] in self.whole

    def observe(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: the ranges of what is between the layers, for these inputs."""
        rest = self._names[len(args) :]
        self._recorder.run(*args, *(kwargs[name] for name in rest if name in kwargs))

    def take_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Has the observers see ranges that were found before, by the names of the layers' scales. KeyError where one
        is missing."""
        for group in self.groups:
            nodes = [("input", group.input), ("residual", group.residual)]
            if group.last in self.whole:
                nodes.append(("output", group.last))
            for name, node in nodes:
                if node is not None:
                    ends = ranges[f"{self.prefix}{group.layer}.{name}"]
                    self._observers[self.origin(node)].observe(torch.tensor(ends))

    def make(self) -> None:
        """The quantized layers, from the ranges that were observed. ValueError where there were none."""
        ranges = {node: _parameters(observer.range()) for node, observer in self._observers.items()}
        self._made = [_quantize(group, ranges, self) for group in self.groups]
        for group, made in zip(self.groups, self._made, strict=True):
            made.norm = None if group.norm_name is None else self.prefix + group.norm_name

    def made(self) -> Iterator[tuple[str, torch.nn.Module, QuantizedConv, Tensor]]:
        """Each convolution's name, itself, the quantized layer, and the filters that this has rounded."""
        for group, made in zip(self.groups, self._made, strict=True):
            yield self.prefix + group.layer, group.conv, made, group.folded()[0]

    def commit(self) -> None:
        """The layers take their places, and the module gets a forward that runs them one after the other."""
        _rewrite(self, self._made)


def find_parts(model: torch.nn.Module, chosen: set[int], config: Int8Static, name: str = "") -> list[Part]:
    """The model, or else the largest modules in it that ``torch.fx`` can follow, with convolutions of which ``chosen`` has the
    ids; ``name`` is the model's own. What is chosen and in no part cannot be quantized: its forward cannot be followed,
    or it is called more than once."""
    if not any(isinstance(inner, _CONVOLUTIONS) and id(inner) in chosen for inner in model.modules()):
        return []
    graph = trace_whole(model)
    if graph is None:
        prefix = name + "." if name else ""
        inner = dict(model.named_children()).items()
        return [part for label, child in inner for part in find_parts(child, chosen, config, prefix + label)]
    groups = find_groups(graph, dict(model.named_modules()), chosen)
    return [Part(model, name, graph, groups, config)] if groups else []


# ---- which nodes -------------------------------------------------------------------------------------------------


def find_groups(graph: fx.Graph, modules: dict[str, torch.nn.Module], chosen: set[int]) -> list[Group]:
    """The convolutions whose ids are ``chosen``, each with what is computed in one call with it."""
    calls = count_calls(graph, modules)

    def module_of(node: fx.Node | None, kinds: tuple[type, ...]) -> torch.nn.Module | None:
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = modules[node.target]
        return module if type(module) in kinds and calls[id(module)] == 1 and unwatched(module) else None

    groups, taken = [], set()
    for node in graph.nodes:
        conv = module_of(node, _CONVOLUTIONS)
        if conv is None or id(conv) not in chosen or conv.padding_mode != "zeros":
            continue
        if (
            conv.weight.dtype not in _FLOATS
            or not (conv.weight.is_cpu or conv.weight.is_meta)
            or conv.weight[0].numel() > 65793
        ):
            continue
        after = only_user(node)
        norm = module_of(after, _NORMS)
        if norm is None or norm.running_mean is None or norm.num_features != conv.out_channels:
            norm = None
        group = Group([node], conv, norm)
        if norm is not None:
            group.norm_name = after.target
            group.nodes.append(after)
        after = only_user(group.last)
        other = other_summand(after, group.last)
        if other is not None and after not in taken:
            group.sum = after
            group.nodes.append(after)
        after = only_user(group.last)
        activation = _activation(after, modules)
        if activation is not None:
            group.activation = activation
            group.nodes.append(after)
        if not undisturbed(group.nodes, modules):
            group = Group([node], conv, None)
        taken.update(group.nodes)
        groups.append(group)
    return groups


def _activation(node: fx.Node | None, modules: dict[str, torch.nn.Module]) -> str | None:
    if node is None or len([arg for arg in node.args if isinstance(arg, fx.Node)]) != 1:
        return None
    if node.op == "call_module":
        module = modules[node.target]
        return _ACTIVATIONS.get(type(module)) if unwatched(module) else None
    if node.op not in ("call_function", "call_method") or set(node.kwargs) - {"inplace"}:
        return None
    return _FUNCTIONS.get(node.target)


def _is_max_pool(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None
    if type(module) not in MAX_POOLS or not unwatched(module):
        return False
    return _both(module.dilation) == (1, 1) and not module.ceil_mode and not module.return_indices


def _is_global_average(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None
    return type(module) in AVERAGES and unwatched(module) and _both(module.output_size) == (1, 1)


def _both(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _quantized_nodes(graph: fx.Graph, modules: dict[str, torch.nn.Module], groups: list[Group]) -> set[fx.Node]:
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


# ---- ranges ------------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    observers: dict[fx.Node, Observer]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.observers:
            self.observers[n].observe(result)
        return result


def _parameters(ends: tuple[float, float]) -> Parameters:
    scale, zero_point = choose_scale(torch.tensor(ends), [], 0, "uint8", False)
    return scale.reshape(()), zero_point.reshape(())


# ---- the model ---------------------------------------------------------------------------------------------------


def _quantize(group: Group, ranges: dict[fx.Node, Parameters], part: Part) -> QuantizedConv:
    conv = group.conv

    def of(node: fx.Node) -> Parameters:
        # Tensors of each layer's own: what is saved may not share memory.
        scale, zero_point = ranges[part.origin(node)]
        return scale.clone(), zero_point.clone()

    made = QuantizedConv.of(
        *group.folded(),
        *(of(group.input), of(group.last) if group.last in part.whole else None),
        **dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups),
    )
    made.was, made.float_dtype = class_before(conv), conv.weight.dtype
    made.train(conv.training)
    if group.residual is not None:
        for name, value in zip(RESIDUAL, of(group.residual), strict=True):
            made.register_buffer(name, value)
    return made


#: Calls that follow each other: what stands for each in the graph, which step, average or windows, and the numbers of what it
#: reads; and the numbers of those whose results are wanted.
_Run = tuple[list[tuple[Any, ...]], list[int]]


class _Chain:
    """What the rewritten forward of one model calls. It belongs to that very model: copies make theirs anew."""

    def __init__(
        self,
        model: torch.nn.Module,
        steps: list[tuple[str, str, torch.dtype, bool]],
        averages: list[tuple[str, torch.dtype]],
        runs: list[_Run],
        guards: Guards,
    ) -> None:
        self.guards = guards
        self._parts = model, steps, averages, runs

    @functools.cached_property
    def runs(self) -> list[Calls]:
        model, steps, averages, runs = self._parts  # whose tensors may have had no values before
        layers = [model.get_submodule(name) for name, *_ in steps]
        made: dict[type, list[Any]] = {}
        made[Step] = [
            Step(conv, activation, dtype, (conv._buffers, *RESIDUAL) if added else None)
            for conv, (_, activation, dtype, added) in zip(layers, steps, strict=True)
        ]
        made[GlobalAverage] = [
            GlobalAverage((model.get_submodule(name)._buffers, "output_scale", "output_zero_point"), dtype)
            for name, dtype in averages
        ]

        def what(kind: type, argument: Any) -> Any:
            return made[kind][argument] if kind in made else argument

        return [Calls([Call(what(*call[:2]), *call[2:]) for call in calls], wanted) for calls, wanted in runs]


def _run_calls(chain: _Chain, index: int, *inputs: Tensor) -> list[Tensor]:
    return chain.runs[index](*inputs)


#: What stands in the graph for calls until those that follow each other become one: the types of Call.what.
_KINDS = (Step, GlobalAverage, tuple)


def _rewrite(part: Part, made: list[QuantizedConv]) -> None:
    model, graph, modules, whole = part.module, part.graph, part.modules, part.whole
    guards = Guards(model, graph)
    followed = activations_of(part.groups, modules)
    names = {id(module): name for name, module in reversed(modules.items())}
    producers = {group.last: group for group in part.groups}
    steps, averages = [], []
    chain = first_node(graph, _CHAIN)
    of = {node: producers[part.origin(node.args[0])].conv for node in graph.nodes if part.averages(node)}
    for node in list(graph.nodes):
        if node in whole and _is_max_pool(node, modules):
            module = modules[node.target]
            stride = module.kernel_size if module.stride is None else module.stride
            windows = _both(module.kernel_size), _both(stride), _both(module.padding)
            kind, arguments = tuple, (chain, windows, node.args[0])
        elif node in of:
            kind, arguments = GlobalAverage, (chain, len(averages), node.args[0])
            averages.append((names[id(of[node])], of[node].weight.dtype))
        else:
            continue
        followed.append(modules[node.target])
        with graph.inserting_before(node):
            replacement = graph.call_function(kind, arguments)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    for index, group in enumerate(part.groups):
        added = () if group.residual is None else (group.residual,)
        dtype = torch.uint8 if group.last in whole else group.conv.weight.dtype
        steps.append((names[id(group.conv)], group.activation, dtype, bool(added)))
        group.replace_in(graph, Step, chain, index)
    for group, conv in zip(part.groups, made, strict=True):
        model.set_submodule(names[id(group.conv)], conv)
        if group.norm_name is not None:
            model.set_submodule(group.norm_name, torch.nn.Identity().train(group.norm.training))
    guards.keep(followed)
    guards.pin([*made, *(model.get_submodule(g.norm_name) for g in part.groups if g.norm_name is not None)])
    runs = _join(graph, chain)

    def make_chain(model: torch.nn.Module, guards: Guards) -> _Chain:
        return _Chain(model, steps, averages, runs, guards)

    model.__class__ = _chained_class(type(model), forward_of(graph), make_chain)
    model.__dict__[_CHAIN] = make_chain(model, guards)


def activations_of(groups: list[Group], modules: dict[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """The activations that are modules."""
    nodes = [group.last for group in groups if group.activation != "none"]
    return [modules[node.target] for node in nodes if node.op == "call_module"]


def first_node(graph: fx.Graph, attribute: str) -> fx.Node:
    """A new node, before all others, that reads this attribute of the module."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        return graph.create_node("get_attr", attribute)


def forward_of(graph: fx.Graph) -> Callable[..., Any]:
    """The Python function, of a module and its inputs, that a graph stands for."""
    code = graph.python_code(root_module="self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


def _join(graph: fx.Graph, chain: fx.Node) -> list[_Run]:
    """Makes one node of calls that follow each other in the graph, and tells what they are."""
    together: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _KINDS:
            together[-1].append(node)
        elif together[-1]:
            together.append([])
    runs = []
    for nodes in filter(None, together):
        numbers = {node: i for i, node in enumerate(nodes)}
        inputs: dict[fx.Node, int] = {}

        def number(node: fx.Node, numbers: Any = numbers, inputs: Any = inputs) -> int:
            return numbers[node] if node in numbers else inputs.setdefault(node, -1 - len(inputs))

        calls = [(node.target, node.args[1], *map(number, node.args[2:])) for node in nodes]
        wanted = [i for node, i in numbers.items() if any(user not in numbers for user in node.users)]
        with graph.inserting_before(nodes[0]):
            results = graph.call_function(_run_calls, (chain, len(runs), *inputs))
            for i, number_wanted in enumerate(wanted):
                result = graph.call_function(operator.getitem, (results, i))
                nodes[number_wanted].replace_all_uses_with(result, lambda user, numbers=numbers: user not in numbers)
        for node in reversed(nodes):
            graph.erase_node(node)
        runs.append((calls, wanted))
    return runs


#: Where a model keeps what its forward calls.
_CHAIN = f"{OURS}integer_chain"


def _chained_class(
    kind: type, forward: Callable[..., Any], make_chain: Callable[[torch.nn.Module, Guards], _Chain]
) -> type[torch.nn.Module]:
    """The class of a model in integers. Its own forward, of layers that take and give floating-point numbers, is for those who
    compile the model, watch its layers, have changed it, or have unpickled it: a class that was made at run time cannot be
    pickled."""

    def choose(self: torch.nn.Module) -> Callable[..., Any] | None:
        if torch.compiler.is_compiling() or any_global_hook():
            return None
        chain = self.__dict__.get(_CHAIN)
        return forward if chain is not None and chain.guards.hold() else None

    def state(self: torch.nn.Module) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _CHAIN}

    def deepcopy(self: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(state(self), memo))
        made.__dict__[_CHAIN] = make_chain(made, copy.deepcopy(self.__dict__[_CHAIN].guards, memo))
        return made

    def reduce(self: torch.nn.Module, protocol: int) -> Any:
        return *maker(kind), state(self)

    def _is_current_chain(self: torch.nn.Module) -> bool:
        return self.__dict__[_CHAIN].guards.unchanged()

    members = {
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "_is_current_chain": _is_current_chain,
        "_original_class": kind,
        "_is_chain": True,
    }
    return graph_class(kind, choose, members)


def unchain(module: torch.nn.Module) -> None:
    """Gives a module of a chain its own forward back."""
    if type(module).__dict__.get("_is_chain"):
        module.__dict__.pop(_CHAIN, None)
        module.__class__ = type(module)._original_class
