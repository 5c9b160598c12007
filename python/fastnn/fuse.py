"""Inference with fewer passes over memory: what ``fastnn.convert(model, fuse=True)`` adds.

A convolution with the batch norm, the sum with a shortcut and the activation after it is one kernel call: the batch norm is
folded into the filters (w · γ / √(σ² + ε), and a bias to match; Jacob et al. 2018, arXiv:1712.05877, section 3.2), the rest
is done to each result while it is in registers. Which layers follow each other is found by ``torch.fx``.

The kernels read filters in an order of their own and keep them so. Once they have, the folded filters are let go of; what
else may need them (an input of another size, whose kernel reads them in another order) has them folded again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _cpu, nn
from ._folding import empty_filters, fold_batch_norm
from ._modules import new_module
from ._tracing import count_calls, only_user, other_summand, trace_whole
from .backends import cpu
from .backends._conv import is_channels_last
from .backends.cpu import empty_image
from .nn.activation import activation_name
from .nn.hooks import unwatched
from .ops._route import is_straight
from .ops.activation import activation as apply_activation
from .ops.conv import FusedLayer, activation_number, conv_fused, inverted_residual

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
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
#: A convolution's attributes that its fused call was chosen by.
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_ENDS_LAYOUT = (torch.flatten, "flatten", "mean")
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}

_steps = 0


def _count_step(*_: Any) -> None:
    """The fused steps of torch's optimizers change parameters without counting a version."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Folded:
    """The folded filters of some parameters, and what the kernels made of them."""

    def __init__(
        self, sources: tuple[Tensor | None, ...], eps: float | None, channels_last: bool, activation: str
    ) -> None:
        # Held, so that no other parameters can lie where these did; and for the next fold.
        self._sources = tuple(None if s is None else s.detach() for s in sources)
        self._eps = eps
        self._channels_last = channels_last
        weight, bias = self._fold()
        #: Whether the filters are a copy, that can be made again.
        self._copied = weight.data_ptr() != self._sources[0].data_ptr()
        self.layer: FusedLayer = weight, bias, activation_number(activation), _cpu.Prepared()

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        # Channels next to each other suit the kernels best, and the results follow the filters.
        layout = torch.channels_last if self._channels_last else torch.preserve_format
        if self._eps is not None:
            return fold_batch_norm(*self._sources, self._eps, layout)
        weight, bias = self._sources
        if self._channels_last and not weight.is_contiguous(memory_format=layout):
            weight = empty_filters(weight, layout).copy_(weight)
        return weight, bias

    def whole(self) -> FusedLayer:
        """The layer with its filters, which may be gone from the one that is kept."""
        return self.layer if self.layer[0] is not None else (self._fold()[0], *self.layer[1:])

    def keep(self, layer: FusedLayer, prepared_more: bool) -> None:
        """Keeps the layer that a call was made with, without its filters if the call had the kernels keep them in another
        form: the next one like it will not read them. Otherwise it does."""
        if prepared_more and self._copied and cpu.has_table:
            layer = None, *layer[1:]
        self.layer = layer


class _FusedConv:
    """One convolution and what follows it, with the folded filters of the parameters as they were last seen."""

    def __init__(
        self, conv: torch.nn.Module, norm: torch.nn.Module | None, activation: str, after: torch.nn.Module | None
    ) -> None:
        self.conv = conv
        self.norm = norm
        self.activation = activation
        #: The activation's module, if it is one.
        self.after = after
        #: Whether all that read the result take it in any layout, so that the kernels may choose.
        self.any_layout = False
        #: Whether this call is the last that sees its residual, whose memory may then be the result's.
        self.ends_residual = False
        self._geometry = self._read_geometry()
        self._key: tuple[Any, ...] = ()
        self.folded: _Folded

    def modules(self) -> list[torch.nn.Module]:
        return [module for module in (self.conv, self.norm, self.after) if module is not None]

    def _read_geometry(self) -> list[Any]:
        return [self.conv.__dict__.get(name) for name in _GEOMETRY]

    def as_traced(self) -> bool:
        """Whether the convolution has the geometry that it had, and parameters (not a parametrization's attributes)."""
        return self._read_geometry() == self._geometry and all(name in place for place, name in self.places())

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where all lies that the filters are made of, and how they are used."""
        found = [(self.conv._parameters, name) for name in ("weight", "bias")]
        found += [(self.conv.__dict__, name) for name in _GEOMETRY]
        if self.norm is not None:
            found += [(self.norm._parameters, name) for name in ("weight", "bias")]
            found += [(self.norm._buffers, name) for name in ("running_mean", "running_var")]
            found.append((self.norm.__dict__, "eps"))
        return found

    def forget(self) -> None:
        self._key = ()

    def see(self) -> None:
        """Makes the filters anew if what they are made of has changed."""
        conv, norm = self.conv, self.norm
        if norm is None:
            sources, eps = (conv.weight, conv.bias), None
        else:
            sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
            eps = norm.eps
        key = (_steps, eps, *[None if s is None else (s.data_ptr(), _version(s), s.dtype) for s in sources])
        if key == self._key:
            return
        self.folded = _Folded(sources, eps, conv.weight.dim() == 4 and self.any_layout, self.activation)
        self._key = key

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.laid_out(_computed([self], self._compute, input, residual))

    def layers(self) -> list[FusedLayer]:
        return [self.folded.layer]

    def arguments(self) -> tuple[Any, ...]:
        """Those of a step of a chain."""
        conv = self.conv
        weight, bias, activation, prepared = self.folded.layer
        return (weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, activation, prepared)

    def _compute(self, input: Tensor, residual: Tensor | None, layer: FusedLayer) -> Tensor | None:
        conv = self.conv
        weight, bias, _, prepared = layer
        return conv_fused(
            *(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups),
            *(self.activation, residual, prepared, self.ends_residual),
        )

    def unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        y = self.conv(input)
        if self.norm is not None:
            y = self.norm(y)
        return apply_activation(self.activation, y if residual is None else y + residual)

    def laid_out(self, result: Tensor) -> Tensor:
        if self.any_layout or result.dim() != 4 or is_channels_last(self.conv.weight):
            return result
        # The model's own code may ask for a view of it.
        return result.contiguous()


class _InvertedResidual:
    """Two or three convolutions that one kernel computes, each with what follows it: one to many channels, if there is one,
    a depthwise and a pointwise one."""

    def __init__(self, layers: list[_FusedConv]) -> None:
        self._calls = layers

    #: Its memory plan is a chain's, or nobody's.
    ends_residual = False

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.laid_out(_computed(self._calls, self._compute, input, residual))

    def laid_out(self, result: Tensor) -> Tensor:
        return self._calls[-1].laid_out(result)

    def layers(self) -> list[FusedLayer]:
        return [call.folded.layer for call in self._calls]

    def arguments(self) -> tuple[Any, ...]:
        """Those of a step of a chain."""
        return self._arguments(self.layers())

    def _arguments(self, layers: Sequence[FusedLayer]) -> tuple[Any, ...]:
        conv = self._calls[0].conv
        first = (layers[0], conv.stride, conv.padding) if len(layers) == 3 else (None, 1, 0)
        return (*first, layers[-2], self._calls[-2].conv.stride[0], layers[-1])

    def _compute(self, input: Tensor, residual: Tensor | None, *layers: FusedLayer) -> Tensor | None:
        return inverted_residual(input, residual, *self._arguments(layers))


class _Step(NamedTuple):
    """A call of a chain, and the values that it reads: first the chain's inputs are counted, then the results."""

    call: _FusedConv | _InvertedResidual
    input: int
    residual: int | None
    #: Which values nothing reads after it.
    ended: list[int]


class _Whole:
    """The one call that a chain is, made of some layers."""

    def __init__(self) -> None:
        self.layers: list[FusedLayer] = []
        self.chain: _cpu.Chain | None = None


class _Chain:
    """Fused calls of which only the last's result is read by others: one call, where the kernels take all of them."""

    def __init__(self, inputs: int, steps: list[_Step]) -> None:
        self._inputs = inputs
        self._steps = steps
        self.forget()

    def forget(self) -> None:
        """To be called when filters were made anew."""
        # What another thread makes of the old ones meanwhile goes with this.
        self._whole = _Whole()

    def __call__(self, *inputs: Tensor) -> Tensor:
        whole = self._whole
        if whole.chain is not None:
            result = whole.chain.run(empty_image, *inputs)
            if result is not None:
                return self._steps[-1].call.laid_out(result)
        result = self._one_by_one(inputs)
        self._see(whole)
        return result

    def _one_by_one(self, inputs: tuple[Tensor, ...]) -> Tensor:
        values: list[Tensor | None] = list(inputs)
        for call, input, residual, ended in self._steps:
            result = call(values[input], None if residual is None else values[residual])
            for number in ended:
                values[number] = None
            values.append(result)
        return result

    def _see(self, whole: _Whole) -> None:
        """Makes the one call of what the kernels keep, if that has changed."""
        layers = [layer for step in self._steps for layer in step.call.layers()]
        if not cpu.has_table or list(map(id, layers)) == list(map(id, whole.layers)):
            return
        steps = [
            (input, -1 if residual is None else residual, call.ends_residual, call.arguments())
            for call, input, residual, _ in self._steps
        ]
        whole.layers, whole.chain = layers, _cpu.Chain.of(steps, self._inputs)


def _computed(
    calls: list[_FusedConv], compute: Callable[..., Tensor | None], input: Tensor, residual: Tensor | None
) -> Tensor:
    """compute's result for the input, the residual and the layers of these calls, of which that of the last is returned."""
    folded = [call.folded for call in calls]
    layers = [one.layer for one in folded]
    before = [layer[3].nbytes for layer in layers]
    result = compute(input, residual, *layers)
    if result is None:
        if not is_straight("conv", input):
            # What looks on would see the folding.
            for call in calls:
                input = call.unfused(input, residual if call is calls[-1] else None)
            return input
        layers = [one.whole() for one in folded]
        result = compute(input, residual, *layers)
    for one, layer, size in zip(folded, layers, before, strict=True):
        prepared_more = layer[3].nbytes > size
        if prepared_more or layer is not one.layer:
            one.keep(layer, prepared_more)
    return result


def _may_expand(conv: torch.nn.Module) -> bool:
    return type(conv) is nn.Conv2d and (conv.dilation, conv.groups) == ((1, 1), 1) and type(conv.padding) is tuple


def _is_pointwise(conv: torch.nn.Module) -> bool:
    return _may_expand(conv) and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _is_depthwise(conv: torch.nn.Module) -> bool:
    usual = type(conv) is nn.Conv2d and (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    return usual and conv.groups == conv.in_channels == conv.out_channels and conv.stride in ((1, 1), (2, 2))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def fuse_(model: torch.nn.Module, allowed: Callable[[torch.nn.Module], bool]) -> None:
    """Gives each module whose computation can be followed a forward of fewer calls; one that has it, its filters anew.

    ``allowed`` says which convolutions and batch norms may take part.
    """
    if is_fused(type(model)):
        type(model)._fold_anew()
        return
    if not any(isinstance(inner, _CONVOLUTIONS) for inner in model.modules()):
        return
    graph = trace_whole(model)
    if graph is None:
        for child in model.children():
            fuse_(child, allowed)
        return
    fused, chains = _rewrite(graph, dict(model.named_modules()), allowed)
    if fused:
        code = graph.python_code(root_module="self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        model.__class__ = _fused_class(type(model), namespace["forward"], fused, chains)
        # Now rather than in the first forward, whose time and memory it would be.
        type(model)._fold_anew()


def is_fused(kind: type) -> bool:
    return "_fused_calls" in kind.__dict__


def _rewrite(
    graph: fx.Graph, modules: dict[str, torch.nn.Module], allowed: Callable[[torch.nn.Module], bool]
) -> tuple[list[_FusedConv], list[_Chain]]:
    """Puts one call in the place of each convolution and what follows it, and one in the place of several of these."""
    fused: list[_FusedConv] = []
    blocks: list[_InvertedResidual] = []
    chains: list[_Chain] = []

    def run_fused(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused[index](input, residual)

    def run_inverted(index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return blocks[index](input, residual)

    def run_chain(index: int, *inputs: Tensor) -> Tensor:
        return chains[index](*inputs)

    _fuse_convolutions(graph, modules, allowed, fused, run_fused)
    _find_layouts(graph, modules, fused, run_fused)
    _fuse_inverted(graph, fused, run_fused, blocks, run_inverted)
    _find_last_uses(graph, fused, run_fused, run_inverted)
    _fuse_chains(graph, {run_fused: fused, run_inverted: blocks}, chains, run_chain)
    return fused, chains


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


def _fuse_convolutions(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    allowed: Callable[[torch.nn.Module], bool],
    fused: list[_FusedConv],
    run_fused: Callable[..., Tensor],
) -> None:
    """Each convolution with the batch norm, the sum and the activation that follow it."""
    calls = count_calls(graph, modules)

    def module_of(node: fx.Node | None) -> torch.nn.Module | None:
        """The module that a node calls, if it may take part: called in this place alone, and watched by nobody."""
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = modules[node.target]
        return module if calls[id(module)] == 1 and allowed(module) and unwatched(module) else None

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
        residual = None
        after = only_user(chain[-1])
        other = other_summand(after, chain[-1])
        if other is not None:
            residual = other
            chain.append(after)
        activation = _activation_of(only_user(chain[-1]), modules)
        if activation is not None:
            chain.append(only_user(chain[-1]))
        after = modules[chain[-1].target] if activation is not None and chain[-1].op == "call_module" else None
        if len(chain) == 1:
            continue
        arguments = (len(fused), node.args[0]) if residual is None else (len(fused), node.args[0], residual)
        _replace(graph, chain, run_fused, arguments)
        fused.append(_FusedConv(conv, norm, activation or "none", after))


def _find_layouts(
    graph: fx.Graph,
    modules: dict[str, torch.nn.Module],
    fused: list[_FusedConv],
    run_fused: Callable[..., Tensor],
) -> None:
    """Of which results the kernels may choose the layout: those that are read by what takes any."""

    def takes_any_layout(node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is run_fused:
            return True
        if node.op in ("call_function", "call_method"):
            return node.target in _ENDS_LAYOUT
        module = modules[node.target] if node.op == "call_module" else None
        if module is None or not unwatched(module):
            return False
        return type(module) is torch.nn.Flatten or (
            type(module) in _KEEPS_LAYOUT and all(map(takes_any_layout, node.users))
        )

    for node in _calls_of(graph, run_fused):
        fused[node.args[0]].any_layout = all(map(takes_any_layout, node.users))


def _fuse_inverted(
    graph: fx.Graph,
    fused: list[_FusedConv],
    run_fused: Callable[..., Tensor],
    blocks: list[_InvertedResidual],
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
        if len(chain) == 1:
            continue
        _replace(graph, chain, run_inverted, (len(blocks), chain[0].args[1], *node.args[2:]))
        blocks.append(_InvertedResidual([fused[old.args[0]] for old in chain]))


def _find_last_uses(
    graph: fx.Graph,
    fused: list[_FusedConv],
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
    calls: dict[Callable[..., Tensor], Sequence[_FusedConv | _InvertedResidual]],
    chains: list[_Chain],
    run_chain: Callable[..., Tensor],
) -> None:
    """One call for those that follow each other, where others read the last one's result alone."""

    def replace(nodes: list[fx.Node]) -> None:
        read = [[arg for arg in node.args[1:] if arg is not None] for node in nodes]
        inputs = list(dict.fromkeys(arg for args in read for arg in args if arg not in nodes))
        number = {value: i for i, value in enumerate([*inputs, *nodes])}
        last_reader = {value: i for i, args in enumerate(read) for value in args}
        steps = []
        for i, (node, args) in enumerate(zip(nodes, read, strict=True)):
            ended = [number[value] for value in args if last_reader[value] == i]
            values = [number[value] for value in args]
            steps.append(
                _Step(calls[node.target][node.args[0]], values[0], values[1] if len(values) > 1 else None, ended)
            )
        _replace(graph, nodes, run_chain, (len(chains), *inputs))
        chains.append(_Chain(len(inputs), steps))

    run: list[fx.Node] = []
    for node in [*graph.nodes, None]:
        if node is not None and node.op == "call_function" and node.target in calls:
            run.append(node)
            continue
        for nodes in _cut(run):
            if len(nodes) > 1:
                replace(nodes)
        run = []


def _cut(run: list[fx.Node]) -> list[list[fx.Node]]:
    """In as few pieces as it takes for the last result of each to be the only one that is read outside of it."""
    ends = set(run[-1:])
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


def _fused_class(kind: type, forward: Callable[..., Any], fused: list[_FusedConv], chains: list[_Chain]) -> type:
    """The class of a module whose forward was rewritten; its own forward stays for training and gradients."""
    watched = [module for call in fused for module in call.modules()]
    watch: _cpu.Watch | None = None

    def plain() -> bool:
        """Whether the modules do what they did when they were traced, and nobody watches; makes the filters then, if
        anything has changed."""
        nonlocal watch, steps
        if watch is not None and steps == _steps and watch.same():
            return True
        if not all(not module.training and unwatched(module) for module in watched):
            return False
        if not all(call.as_traced() for call in fused):
            return False
        # Before the filters are made: a change meanwhile is seen by the next call.
        steps_now, watch_now = _steps, _cpu.Watch(_places(fused))
        for call in fused:
            call.see()
        for chain in chains:
            chain.forget()
        steps, watch = steps_now, watch_now
        return True

    steps = _steps

    def fold_anew() -> None:
        nonlocal watch
        for call in fused:
            call.forget()
        watch = None
        plain()

    @functools.wraps(kind.forward)  # whose parameters torch.export and others ask for
    def dispatch(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.training
            or torch._C._is_any_autocast_enabled()
            or not plain()
        ):
            return kind.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    def reduce(self: torch.nn.Module, protocol: int) -> Any:
        # A copy has parameters of its own, and a class made at run time cannot be pickled: copies are not fused.
        _, _, *rest = object.__reduce_ex__(self, protocol)
        return (new_module, (kind,), *rest)

    body = {
        "forward": dispatch,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_original_class": kind,
        "_fused_calls": fused,
        "_fold_anew": staticmethod(fold_anew),
    }
    return type(kind.__name__, (kind,), body)


#: Of a module: what unwatched asks, and the mode.
_STATE = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_compiled_call_impl", "forward", "training"),
)


def _places(fused: list[_FusedConv]) -> list[tuple[dict[str, Any], str]]:
    """Where all lies on which it depends whether and how these are run."""
    state = [(module.__dict__, name) for call in fused for module in call.modules() for name in _STATE]
    return state + [place for call in fused for place in call.places()]


def fused_calls(model: torch.nn.Module) -> Iterator[_FusedConv]:
    """Of all modules of the model."""
    for module in model.modules():
        if is_fused(type(module)):
            yield from type(module)._fused_calls
