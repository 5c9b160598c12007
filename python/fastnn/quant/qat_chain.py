"""Convolutional networks in training for integers: the forward that computes what :mod:`fastnn.quant.chain` will, in
floating-point numbers that the integers could stand for, and differentiable.

What chains hand on in uint8 is rounded where it is made, shortcuts and inputs where they are read. A batch norm behind a
convolution is folded into its filters, which are rounded then; while it computes with the batch's own statistics the filters
are rounded without it. That is the same rounding: a norm multiplies each filter by one number, and so the filter's own scale,
but for its sign (Jacob et al., CVPR 2018, section 3.2, fold the norm in training as well, for filters with one scale in
common).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .._guards import OURS, Guards
from .._made_classes import graph_class
from .._tracing import trace
from ..ops.fake_quantize import fake_quantize
from ..ops.quantize import choose_scale
from .chain import AVERAGES, MAX_POOLS, Group, Part, activations_of, find_groups, first_node, forward_of
from .config import Config, Int8Static
from .layers import input_parameters
from .observers import Observer
from .weight_only_conv import filter_rows

#: Of a module that is simulated: where its state lies, and the property that its forward reads.
_STATE, _SIMULATED = f"{OURS}qat_state", f"{OURS}qat_chain"
_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is rounded: by which observer's range, and whether that one sees the tensor there."""

    observer: str
    sees: bool


@dataclass(frozen=True)
class _Call:
    """What one call of the converted model computes, by the names of its layers. ``input``, ``residual`` and ``output`` are
    None for what is not rounded there."""

    conv: str
    norm: str | None
    activation: str
    input: _Place | None
    residual: _Place | None
    output: _Place | None


class _State:
    """Of one module: its calls, the observers by the names of the nodes that they watch, and what the graphs of its forward hold
    good for, in training and not."""

    def __init__(
        self, calls: list[_Call], observers: dict[str, Observer], config: Int8Static, guards: dict[bool, Guards]
    ) -> None:
        self.calls = calls
        self.observers = observers
        self.config = config
        self.guards = guards

    def rounded(self, x: Tensor, place: _Place | None, training: bool) -> Tensor:
        """What uint8 leaves of a tensor, in float32."""
        x = x.float()
        if place is None:
            return x
        observer = self.observers[place.observer]
        if training and place.sees:
            observer.observe(x)
        scale, zero_point = input_parameters(observer, x.device)
        return fake_quantize(x, scale, zero_point, dtype="uint8")


def simulate(part: Part, config: Int8Static) -> None:
    """Gives a part's module, whose ranges were observed, a forward that computes what the chain will. Nothing but its class
    and its state changes.

    Raises ValueError for a module that in training calls its convolutions otherwise than in eval mode.
    """
    module, chosen = part.module, {id(group.conv) for group in part.groups}
    graph = trace(module, training=True)
    modules = dict(module.named_modules())
    groups = {} if graph is None else {group.layer: group for group in find_groups(graph, modules, chosen)}
    apart = [part.prefix + group.layer for group in part.groups if not _alike(group, groups.get(group.layer))]
    if apart:
        raise ValueError(
            f"prepare_qat_: what follows {', '.join(apart)} in training is not what follows in eval mode; leave them with skip="
        )
    # Parts of a model may be in eval mode while it is trained.
    guards = {mode: Guards(module, graph, None) for mode, graph in ((True, graph), (False, part.graph))}
    pools = [inner for inner in modules.values() if type(inner) in (*MAX_POOLS, *AVERAGES)]
    for each in guards.values():
        each.pin(layer for group in part.groups for layer in (group.conv, group.norm) if layer is not None)
        each.keep([*activations_of(part.groups, modules), *pools])
    state = _State(_calls(part), part.observers, config, guards)
    # Changes the graphs.
    forwards = {
        True: _forward(part, graph, [groups[group.layer] for group in part.groups]),
        False: _forward(part, part.graph, part.groups),
    }
    kind = type(module)

    def choose(self: torch.nn.Module) -> Any:
        current = torch.compiler.is_compiling() or self.__dict__[_STATE].guards[self.training].hold()
        return forwards[self.training] if current else None

    def refuse(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if choose(self) is None:
            raise ValueError(
                f"{kind.__name__}: a module of it was changed, or is watched by hooks, since prepare_qat_; call prepare_qat_"
                " after that"
            )
        raise ValueError(
            f"{kind.__name__}: in quantization-aware training, arguments that have a default must be left to it"
        )

    members = {
        _SIMULATED: property(lambda self: (self, self.__dict__[_STATE])),
        "was_before_qat": kind,
    }
    module.__class__ = graph_class(kind, choose, members, refuse)
    module.__dict__[_STATE] = state


def is_simulated(module: torch.nn.Module) -> bool:
    return _STATE in module.__dict__


def part_again(module: torch.nn.Module, name: str) -> Part:
    """The part that :func:`simulate` was given, with what its observers have seen since; the module gets its own forward back.
    Its convolutions must have their own classes again.

    Raises ValueError if the module no longer has the layers that it had.
    """
    state = module.__dict__.pop(_STATE)
    module.__class__ = type(module).was_before_qat
    modules = dict(module.named_modules())
    names = [call.conv for call in state.calls]
    chosen = {id(modules[name]) for name in names if name in modules}
    graph = trace(module)
    groups = [] if graph is None else find_groups(graph, modules, chosen)
    if [group.layer for group in groups] != names:
        raise ValueError(
            f"convert_qat_: {name or 'the model'} no longer calls the convolutions that prepare_qat_ found, or hooks watch them"
        )
    part = Part(module, name, graph, groups, state.config)
    part.observers = state.observers
    return part


def _alike(one: Group, other: Group | None) -> bool:
    return other is not None and (one.norm, one.activation, one.sum is None) == (
        *(other.norm, other.activation),
        other.sum is None,
    )


def _calls(part: Part) -> list[_Call]:
    seen: set[str] = set()

    def place(node: fx.Node | None) -> _Place | None:
        """Where a node's result is read: it was rounded before if it comes in uint8."""
        if node is None or node in part.whole:
            return None
        first = node.name not in seen
        seen.add(node.name)
        return _Place(node.name, first)

    return [
        _Call(
            *(group.layer, group.norm_name, group.activation, place(group.input), place(group.residual)),
            _Place(group.last.name, True) if group.last in part.whole else None,
        )
        for group in part.groups
    ]


def _forward(part: Part, graph: fx.Graph, groups: list[Group]) -> Any:
    """The graph, which is changed, with one call for each group. What will be uint8 is float32 until something else
    reads it."""
    chain = first_node(graph, _SIMULATED)
    wide: dict[fx.Node, torch.dtype] = {}
    for index, (group, twin) in enumerate(zip(groups, part.groups, strict=True)):
        call = group.replace_in(graph, _run, chain, index)
        if twin.last in part.whole and group.conv.weight.dtype is not torch.float32:
            wide[call] = group.conv.weight.dtype
    for node in list(graph.nodes):
        source = next((other for other in node.all_input_nodes if other in wide), None)
        if source is None or node.target is _run:
            continue
        kind = type(part.modules[node.target]) if node.op == "call_module" else None
        if kind in MAX_POOLS:
            wide[node] = wide[source]
        elif kind in AVERAGES:
            with graph.inserting_after(node):
                narrow = graph.call_method("to", (node, wide[source]))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)
        else:
            with graph.inserting_before(node):
                node.replace_input_with(source, graph.call_method("to", (source, wide[source])))
    return forward_of(graph)


def _run(chain: tuple[torch.nn.Module, _State], index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
    module, state = chain
    call = state.calls[index]
    conv = module.get_submodule(call.conv)
    norm = None if call.norm is None else module.get_submodule(call.norm)
    dtype = conv.weight.dtype
    x = state.rounded(input, call.input, module.training)
    if norm is None or norm.training:
        y = _convolve(conv, x, conv.weight, conv.bias)
        y = y if norm is None else norm(y.to(dtype)).float()
    else:
        y = _convolve(conv, x, *_folded(conv, norm))
    if residual is not None:
        y = y + state.rounded(residual, call.residual, module.training)
    y = _ACTIVATIONS[call.activation](y)
    return y.to(dtype) if call.output is None else state.rounded(y, call.output, module.training)


def _convolve(conv: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = fake_quantized_filters(weight, conv.qat_config)
    return conv._conv_forward(x, weight, None if bias is None else bias.float())


def fake_quantized_filters(weight: Tensor, config: Config) -> Tensor:
    """The filters that the integers will stand for, in float32; differentiable."""
    rows, grouping = filter_rows(weight, config)
    scale, zero_point = choose_scale(rows.detach(), dtype=config.weight_dtype, symmetric=config.symmetric, **grouping)
    rows = fake_quantize(rows.float(), scale, zero_point, dtype=config.weight_dtype, **grouping)
    return rows[:, : weight[0].numel()].reshape(weight.shape)


def _folded(conv: torch.nn.Module, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """As :func:`fastnn._folding.fold_batch_norm`, to the bit, and differentiable."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)
