"""Inference with fewer passes over memory: what ``fastnn.convert(model, fuse=True)`` adds.

A convolution with the batch norm, the sum with a shortcut and the activation after it is one kernel call: the batch norm is
folded into the filters (w · γ / √(σ² + ε), and a bias to match; Jacob et al. 2018, arXiv:1712.05877, section 3.2), the rest
is done to each result while it is in registers. So it is with a linear layer and the activation or the sum after it. Which
layers follow each other is found by ``torch.fx``; the calls that stand in their places are those of ``_fused.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import nn
from ._fused import Calls, Chain, FusedConv, FusedLinear, InvertedResidual, Pool, Step
from ._graphs import count_calls, is_in_place, only_user, other_summand, undisturbed
from ._guards import Guards
from ._made_classes import graph_class, maker
from ._tracing import expect_dtype, trace_whole
from .nn.activation import activation_name
from .nn.hooks import any_global_hook, unwatched
from .ops._route import functorch_active

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.gelu: "gelu",
    F.silu: "silu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}
#: What takes any layout and hands on the one it was given; and what makes the same of every layout.
_KEEPS_LAYOUT = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    torch.nn.Dropout,
    torch.nn.Identity,
)
#: What hands its input on in eval mode.
_PASSES = (
    *(nn.Dropout, torch.nn.Identity, torch.nn.Dropout),
    *(torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout),
)
_ENDS_LAYOUT = (torch.flatten, "flatten", "mean")
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def _may_expand(conv: torch.nn.Module) -> bool:
    return type(conv) is nn.Conv2d and (conv.dilation, conv.groups) == ((1, 1), 1) and type(conv.padding) is tuple


def _is_pointwise(conv: torch.nn.Module) -> bool:
    return _may_expand(conv) and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _is_depthwise(conv: torch.nn.Module) -> bool:
    usual = type(conv) is nn.Conv2d and (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    return usual and conv.groups == conv.in_channels == conv.out_channels and conv.stride in ((1, 1), (2, 2))


def fuse_(model: torch.nn.Module, allowed: Callable[[torch.nn.Module], bool]) -> None:
    """Gives each module whose computation can be followed a forward of fewer calls; one that has it, its filters anew.

    ``allowed`` says which convolutions and batch norms may take part.
    """
    convolutions = any(isinstance(inner, _CONVOLUTIONS) for inner in model.modules())
    if not convolutions and not any(isinstance(inner, nn.Linear) for inner in model.modules()):
        return
    graph = None
    current = is_fused(type(model)) and type(model)._fused_calls.as_traced()
    if not current:
        if is_fused(type(model)):
            model.__class__ = type(model)._original_class
        # Of a convolution's result the layout may be chosen if all that read it are seen, wherever they are. Linear layers are
        # looked for module by module, each of which goes on being called.
        graph = trace_whole(model, inline=convolutions, expect=True)
    if not convolutions or (graph is None and not current):
        for child in model.children():
            fuse_(child, allowed)
    if current:
        type(model)._fused_calls.make_anew()
    if graph is None:
        return
    calls = _rewrite(graph, model, allowed)
    if calls.convolutions or calls.linears:
        code = graph.python_code(root_module="self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        model.__class__ = _fused_class(model, namespace["forward"], calls)
        # Now rather than in the first forward, whose time and memory it would be.
        calls.make_anew()


def is_fused(kind: type) -> bool:
    return "_fused_calls" in kind.__dict__


def _rewrite(graph: fx.Graph, model: torch.nn.Module, allowed: Callable[[torch.nn.Module], bool]) -> Calls:
    """Puts one call in the place of each layer and what follows it, and one in the place of several convolutions of these."""
    modules = dict(model.named_modules())
    guards = Guards(model, graph)
    fused: list[FusedConv] = []
    linears: list[FusedLinear] = []
    blocks: list[InvertedResidual] = []
    chains: list[Chain] = []

    def run_fused(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused[index](input, residual)

    def run_linear(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return linears[index](input, residual)

    def run_inverted(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return blocks[index](input, residual)

    def run_chain(index: int, *inputs: Tensor) -> Tensor:
        return chains[index](*inputs)

    kept = _skip_passes(graph, modules)
    _fuse_convolutions(graph, modules, allowed, fused, run_fused)
    _fuse_linears(graph, modules, allowed, linears, run_linear)
    kept += _find_layouts(graph, modules, fused, run_fused)
    _fuse_inverted(graph, modules, fused, run_fused, blocks, run_inverted)
    _find_last_uses(graph, fused, run_fused, run_inverted)
    calls: dict[fx.Node, FusedConv | InvertedResidual | Pool] = {
        node: (fused if node.target is run_fused else blocks)[node.args[0]]
        for node in _calls_of(graph, run_fused, run_inverted)
    }
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and unwatched(modules[node.target]):
            pool = Pool.of(modules[node.target])
            if pool is not None and isinstance(node.args[0], fx.Node):
                calls[node] = pool
    kept += _fuse_chains(graph, calls, chains, run_chain)
    return Calls(guards, fused, linears, chains, kept)


def _calls_of(graph: fx.Graph, *functions: Callable[..., Any]) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target in functions]


def _replace(graph: fx.Graph, chain: list[fx.Node], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One call in the place of nodes that follow each other."""
    last = chain[-1]
    with graph.inserting_before(last):
        call = graph.call_function(function, arguments)
    last.replace_all_uses_with(call)
    for old in reversed(chain):
        graph.erase_node(old)


def _skip_passes(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """Takes the calls that hand their input on out of the graph. Returns their modules."""
    passed = []
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        module = modules[node.target]
        # One in another mode than the model is to drop elements in inference.
        if type(module) in _PASSES and unwatched(module) and module.training == modules[""].training:
            passed.append(module)
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return passed


def _takes_part(
    graph: fx.Graph, modules: dict[str, torch.nn.Module], allowed: Callable[[torch.nn.Module], bool]
) -> Callable[[fx.Node | None], torch.nn.Module | None]:
    """What gives the module that a node calls, if it may take part: called in this place alone, and watched by nobody."""
    calls = count_calls(graph, modules)

    def module_of(node: fx.Node | None) -> torch.nn.Module | None:
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = modules[node.target]
        return module if calls[id(module)] == 1 and allowed(module) and unwatched(module) else None

    return module_of


def _fuse_convolutions(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    allowed: Callable[[torch.nn.Module], bool],
    fused: list[FusedConv],
    run_fused: Callable[..., Tensor],
) -> None:
    """Each convolution with the batch norm, the sum and the activation that follow it."""
    module_of = _takes_part(graph, modules, allowed)
    for node in list(graph.nodes):
        conv = module_of(node)
        if type(conv) not in _CONVOLUTIONS or conv.padding_mode != "zeros":
            continue
        chain = [node]
        norm = module_of(only_user(node))
        if type(norm) in _NORMS and norm.running_mean is not None and norm.num_features == conv.out_channels:
            chain.append(only_user(node))
        else:
            norm = None
        total = only_user(chain[-1])
        residual = other_summand(total, chain[-1])
        if residual is not None:
            chain.append(total)
        activation = _activation_of(only_user(chain[-1]), modules)
        if activation is not None:
            chain.append(only_user(chain[-1]))
        after = modules[chain[-1].target] if activation is not None and chain[-1].op == "call_module" else None
        if len(chain) == 1 or not undisturbed(chain, modules):
            continue
        arguments = (len(fused), node.args[0]) if residual is None else (len(fused), node.args[0], residual)
        _replace(graph, chain, run_fused, arguments)
        fused.append(FusedConv(conv, norm, activation or "none", after, residual is not None and is_in_place(total)))


def _fuse_linears(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    allowed: Callable[[torch.nn.Module], bool],
    linears: list[FusedLinear],
    run_linear: Callable[..., Tensor],
) -> None:
    """Each linear layer with the activation or the sum that follows it."""
    module_of = _takes_part(graph, modules, allowed)
    for node in list(graph.nodes):
        if type(module_of(node)) is not nn.Linear:
            continue
        following = only_user(node)
        residual, activation = other_summand(following, node), _activation_of(following, modules)
        if (residual is None and activation is None) or not undisturbed([node, following], modules):
            continue
        after = modules[following.target] if residual is None and following.op == "call_module" else None
        arguments = (len(linears), node.args[0]) if residual is None else (len(linears), node.args[0], residual)
        in_place = residual is not None and is_in_place(following)
        linears.append(FusedLinear(modules[node.target], activation or "none", after, in_place))
        _replace(graph, [node, following], run_linear, arguments)


def _find_layouts(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    fused: list[FusedConv],
    run_fused: Callable[..., Tensor],
) -> list[torch.nn.Module]:
    """Of which results the kernels may choose the layout: those that are read by what takes any. Returns the modules of these
    that do."""
    taking = []

    def takes_any_layout(node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is run_fused:
            return True
        if node.op in ("call_function", "call_method"):
            return node.target in _ENDS_LAYOUT or node.target is expect_dtype
        module = modules[node.target] if node.op == "call_module" else None
        if module is None or not unwatched(module):
            return False
        if module.training == modules[""].training:  # not dropout that is to go on in inference
            taking.append(module)
        return type(module) is torch.nn.Flatten or (
            type(module) in _KEEPS_LAYOUT and all(map(takes_any_layout, node.users))
        )

    for node in _calls_of(graph, run_fused):
        fused[node.args[0]].any_layout = all(map(takes_any_layout, node.users))
    return taking


def _fuse_inverted(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    fused: list[FusedConv],
    run_fused: Callable[..., Tensor],
    blocks: list[InvertedResidual],
    run_inverted: Callable[..., Tensor],
) -> None:
    """One call for a convolution that widens, a depthwise one and a pointwise one, or for the last two (MobileNetV2's
    blocks)."""
    for node in _calls_of(graph, run_fused):
        if not _is_pointwise(fused[node.args[0]].conv):
            continue
        # From the last to the first: only the last may have a residual, and only its result other users.
        chain = [node]
        for fits in (_is_depthwise, _may_expand):
            before = chain[0].args[1]
            alone = isinstance(before, fx.Node) and before.op == "call_function" and len(before.users) == 1
            if not (
                alone and before.target is run_fused and len(before.args) == 2 and fits(fused[before.args[0]].conv)
            ):
                break
            chain.insert(0, before)
        if len(chain) == 1 or not undisturbed(chain, modules):
            continue
        _replace(graph, chain, run_inverted, (len(blocks), chain[0].args[1], *node.args[2:]))
        blocks.append(InvertedResidual([fused[old.args[0]] for old in chain]))


def _find_last_uses(
    graph: fx.Graph,
    fused: list[FusedConv],
    run_fused: Callable[..., Tensor],
    run_inverted: Callable[..., Tensor],
) -> None:
    """Which calls may write their result over their residual."""
    # What these calls return is new, and they hand nothing on that they were given.
    order = {node: place for place, node in enumerate(graph.nodes)}
    ours = _calls_of(graph, run_fused, run_inverted)
    for node in ours:
        if node.target is run_fused and len(node.args) == 3:
            _, input, residual = node.args
            alone = residual in ours and residual is not input and all(user in ours for user in residual.users)
            fused[node.args[0]].ends_residual = alone and max(residual.users, key=order.__getitem__) is node


def _fuse_chains(
    graph: fx.Graph,
    calls: dict[fx.Node, FusedConv | InvertedResidual | Pool],
    chains: list[Chain],
    run_chain: Callable[..., Tensor],
) -> list[torch.nn.Module]:
    """One call for those that follow each other, where others read the last one's result alone. Returns the poolings among
    them."""
    pools: list[torch.nn.Module] = []

    def replace(nodes: list[fx.Node]) -> None:
        read = [[arg for arg in node.args if isinstance(arg, fx.Node)] for node in nodes]
        inputs = list(dict.fromkeys(arg for args in read for arg in args if arg not in nodes))
        number = {value: i for i, value in enumerate([*inputs, *nodes])}
        last_reader = {value: i for i, args in enumerate(read) for value in args}
        steps = []
        for i, (node, args) in enumerate(zip(nodes, read, strict=True)):
            ended = [number[value] for value in args if last_reader[value] == i]
            residual = number[args[1]] if len(args) > 1 else None
            steps.append(Step(calls[node], number[args[0]], residual, ended))
        pools.extend(step.call.module for step in steps if isinstance(step.call, Pool))
        _replace(graph, nodes, run_chain, (len(chains), *inputs))
        chains.append(Chain(len(inputs), steps))

    run: list[fx.Node] = []
    for node in [*graph.nodes, None]:
        if node in calls:
            run.append(node)
            continue
        for nodes in _cut(run, calls):
            if len(nodes) > 1 and not all(isinstance(calls[one], Pool) for one in nodes):
                replace(nodes)
        run = []
    return pools


def _cut(run: list[fx.Node], calls: dict[fx.Node, FusedConv | InvertedResidual | Pool]) -> list[list[fx.Node]]:
    """In as few pieces as it takes for the last result of each to be the only one that is read outside of it, or has to have
    a layout of its own."""
    ends = {node for node in run if not calls[node].any_layout} | set(run[-1:])
    while True:
        pieces: list[list[fx.Node]] = [[]]
        for node in run:
            pieces[-1].append(node)
            if node in ends:
                pieces.append([])
        pieces.pop()
        read_outside = {
            node for piece in pieces for node in piece[:-1] if any(user not in piece for user in node.users)
        }
        if not read_outside:
            return pieces
        ends |= read_outside


def _activation_of(node: fx.Node | None, modules: dict[str, torch.nn.Module]) -> str | None:
    if node is None:
        return None
    if node.op == "call_module":
        module = modules[node.target]
        if not unwatched(module):
            return None
        return activation_name(module)
    rest = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input")}
    if rest or len([arg for arg in node.args if isinstance(arg, fx.Node)]) + ("input" in node.kwargs) != 1:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(node.target) if node.op == "call_method" else None


def _fused_class(model: torch.nn.Module, forward: Callable[..., Any], calls: Calls) -> type:
    """The class of a module whose forward was rewritten; its own forward stays for training and gradients, and for others that are
    made of that class."""
    kind, fused = type(model), weakref.ref(model)

    def choose(self: torch.nn.Module) -> Callable[..., Any] | None:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.training
            or self is not fused()
            or torch._C._is_any_autocast_enabled()
            or any_global_hook()
            or functorch_active()
            or not calls.are_current()
        ):
            return None
        return forward

    def reduce(self: torch.nn.Module, protocol: int) -> Any:
        # A copy has parameters of its own, and a class made at run time cannot be pickled: copies are not fused.
        _, _, *rest = object.__reduce_ex__(self, protocol)
        return (*maker(kind), *rest)

    members = {"__reduce_ex__": reduce, "_original_class": kind, "_fused_calls": calls}
    return graph_class(kind, choose, members, refuted=calls.refute)


def fused_calls(model: torch.nn.Module) -> Iterator[FusedConv]:
    """Of all modules of the model."""
    for module in model.modules():
        if is_fused(type(module)):
            yield from type(module)._fused_calls.convolutions
