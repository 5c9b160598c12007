"""Which layers hand their channels to which: what equalization, bias correction and pruning need to know of a model.

Found by ``torch.fx`` in eval mode. Where a module's Python cannot be followed, its children are tried, save for a bare
``torch.nn.Sequential``: whoever holds one may call its layers one by one instead.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.modules import module as _torch_module

from .. import _tracing, nn
from ..fuse import is_fused

T = torch.nn
Modules = dict[str, torch.nn.Module]

LINEAR = (T.Linear, nn.Linear)
#: A convolution's class, and over how many dimensions it goes.
CONV = {T.Conv1d: 1, nn.Conv1d: 1, T.Conv2d: 2, nn.Conv2d: 2, T.Conv3d: 3, nn.Conv3d: 3}
LAYERS = (*LINEAR, *CONV)
BATCH_NORM = (T.BatchNorm1d, T.BatchNorm2d, T.BatchNorm3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: f(s x) = s f(x) for s > 0, element by element. Dropout does nothing in eval mode.
_HOMOGENEOUS = (
    *(T.ReLU, nn.ReLU, T.LeakyReLU, T.Identity, T.Dropout, nn.Dropout, T.Dropout1d, T.Dropout2d, T.Dropout3d),
)
_HOMOGENEOUS_CALLS = (
    *(F.relu, torch.relu, torch.relu_, "relu", "relu_", F.leaky_relu, "contiguous"),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
)
#: The same, of all the elements of a channel that a window holds.
_POOLS = tuple(
    getattr(package, f"{kind}Pool{rank}d")
    for package in (T, nn)
    for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
    for rank in (1, 2, 3)
)
_POOL_CALLS = tuple(
    getattr(F, f"{kind}_pool{rank}d") for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for rank in (1, 2, 3)
)
#: Other functions of one element.
_POINTWISE = (
    *(T.ReLU6, nn.ReLU6, T.GELU, nn.GELU, T.SiLU, nn.SiLU, T.Sigmoid, nn.Sigmoid, T.Tanh, nn.Tanh),
    *(T.ELU, T.SELU, T.CELU, T.Mish, T.Hardswish, T.Hardsigmoid, T.Hardtanh, T.Softplus, T.Softsign),
)
_POINTWISE_CALLS = (
    *(F.relu6, F.gelu, F.silu, F.sigmoid, torch.sigmoid, "sigmoid", F.tanh, torch.tanh, "tanh"),
    *(F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.softsign),
)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")


@dataclass(frozen=True)
class Part:
    """A part of a model that was traced in one piece."""

    #: What its names begin with: ``""``, or the name of the module with a dot after it.
    prefix: str
    graph: fx.Graph
    #: By the names in the graph.
    modules: Modules


@dataclass(frozen=True)
class Use:
    """A layer that takes the channels in: each as ``repeat`` inputs next to each other (a flattened map)."""

    name: str
    module: torch.nn.Module
    repeat: int = 1


@dataclass
class Link:
    """A layer, what its channels pass, and the layers that take them in."""

    name: str
    module: torch.nn.Module
    #: The batch norm right after the layer.
    norm: torch.nn.Module | None = None
    #: What else has something of its own for each channel: other batch norms, PReLU, depthwise convolutions.
    between: list[torch.nn.Module] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return channels_out(self.module)


@dataclass(frozen=True)
class Source:
    """What a layer's inputs come from: a batch norm, and an activation after it ("none", "relu" or "relu6")."""

    norm: torch.nn.Module
    activation: str
    #: Of how many inputs next to each other each channel is the source.
    repeat: int


class NotLinked(Exception):
    """Why a layer's channels cannot be told apart from outside."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        # An MLP is Sequential in all but speed.
        ours = module.__class__.__module__.startswith("fastnn.nn.") and not isinstance(module, T.Sequential)
        return ours or super().is_leaf_module(module, name)


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Has fastnn's blocks call their layers one by one, as they do while somebody watches."""
    watch = _torch_module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        yield
    finally:
        watch.remove()


def trace(module: torch.nn.Module) -> fx.Graph | None:
    """The module's computation in eval mode, layer by layer, or None where its Python does more than pass tensors on."""
    # Of a fused model torch.fx would see a forward that chooses between two.
    fused = {inner: type(inner) for inner in module.modules() if is_fused(type(inner))}
    try:
        for inner, kind in fused.items():
            inner.__class__ = kind.__bases__[0]
        with _one_by_one():
            return _tracing.trace(module, tracer=_Tracer())
    finally:
        for inner, kind in fused.items():
            inner.__class__ = kind


def traced_parts(model: torch.nn.Module) -> list[Part]:
    """The model, or the largest parts of it that can be traced."""

    def parts_of(module: torch.nn.Module, prefix: str) -> Iterator[Part]:
        library = type(module).__module__.startswith(("torch.nn.", "fastnn.nn."))
        whole = not library or isinstance(module, nn.MLP) or (not prefix and isinstance(module, T.Sequential))
        graph = trace(module) if whole else None
        if graph is not None:
            yield Part(prefix, graph, dict(module.named_modules(remove_duplicate=False)))
            return
        for name, child in module.named_children():
            yield from parts_of(child, f"{prefix}{name}.")

    return list(parts_of(model, ""))


def channels_out(layer: torch.nn.Module) -> int:
    return layer.out_features if type(layer) in LINEAR else layer.out_channels


def channels_in(layer: torch.nn.Module) -> int:
    return layer.in_features if type(layer) in LINEAR else layer.in_channels


def is_depthwise(layer: torch.nn.Module) -> bool:
    return type(layer) in CONV and layer.groups == layer.in_channels > 1


def why_not_changed(module: torch.nn.Module, owners: Counter[int]) -> str | None:
    """Why the module's parameters must stay as they are, if they must."""
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed at each call"
        parameter = module._parameters[name]
        if parameter is not None and owners[id(parameter)] > 1:
            return f"its {name} is another module's as well"
        if parameter is not None and type(parameter) is not T.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter is not None and not parameter.is_floating_point():
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
    return None


def owners_of(model: torch.nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def find_links(model: torch.nn.Module, *, homogeneous: bool) -> dict[str, Link | str]:
    """For each linear layer and convolution the link that begins with it, or why there is none.

    Args:
        homogeneous: for scaling the channels: only positively homogeneous functions may lie between, and at most one batch
            norm, right after the layer. A depthwise convolution takes channels in and hands others on. Otherwise, for
            removing them: any function of single elements may lie between, and depthwise convolutions.
    """
    found: dict[str, Link | str] = {}
    owners = owners_of(model)
    for part in traced_parts(model):
        calls = Counter(id(part.modules[node.target]) for node in part.graph.nodes if node.op == "call_module")
        for node in part.graph.nodes:
            if node.op == "call_module" and type(part.modules[node.target]) in LAYERS:
                name = part.prefix + node.target
                try:
                    found[name] = _Walk(part, calls, owners, homogeneous).link(node)
                except NotLinked as reason:
                    found[name] = str(reason)
    for name, module in model.named_modules():
        if type(module) in LAYERS and name not in found:
            found[name] = "torch.fx cannot follow the code that calls it"
    return found


_RELU = {T.ReLU: "relu", nn.ReLU: "relu", T.ReLU6: "relu6", nn.ReLU6: "relu6"}
_RELU_CALLS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    "relu": "relu",
    "relu_": "relu",
}
_IDENTITY = (T.Identity, T.Dropout, nn.Dropout, T.Dropout1d, T.Dropout2d, T.Dropout3d)
_IDENTITY_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, "contiguous")
#: They leave each channel's mean as it is, as do identities and flattening.
_AVERAGES = (
    *(T.AdaptiveAvgPool1d, T.AdaptiveAvgPool2d, T.AdaptiveAvgPool3d, T.Flatten),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_AVERAGE_CALLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def find_sources(model: torch.nn.Module) -> dict[str, Source]:
    """The linear layers and convolutions whose inputs come from a batch norm with running statistics."""
    found: dict[str, Source] = {}
    for part in traced_parts(model):
        calls = Counter(id(part.modules[node.target]) for node in part.graph.nodes if node.op == "call_module")
        for node in part.graph.nodes:
            if node.op != "call_module" or type(part.modules[node.target]) not in LAYERS:
                continue
            layer = part.modules[node.target]
            source = _source(part, node) if calls[id(layer)] == 1 else None
            if source is None:
                continue
            repeat, rest = divmod(channels_in(layer), source[0].num_features)
            if not rest and (repeat == 1 or type(layer) in LINEAR):
                found[part.prefix + node.target] = Source(*source, repeat)
    return found


def _source(part: Part, node: fx.Node) -> tuple[torch.nn.Module, str] | None:
    """The batch norm and the activation before a layer."""
    activation = "none"
    while True:
        before = [other for other in node.all_input_nodes if not _is_batch_size(other)]
        if len(before) != 1:
            return None
        node = before[0]
        if node.op == "call_module":
            module = part.modules[node.target]
            kind = type(module)
            if kind in BATCH_NORM:
                return (module, activation) if module.running_mean is not None else None
            name, same, averages = _RELU.get(kind), kind in _IDENTITY, kind in _AVERAGES
        else:
            name = _RELU_CALLS.get(node.target)
            same = node.target in _IDENTITY_CALLS
            averages = node.target in _AVERAGE_CALLS or any(
                _flattens(node, other, rank) for other in node.all_input_nodes for rank in (1, 2, 3)
            )
        if name is not None and activation == "none":
            activation = name
        elif not same and not (averages and activation == "none"):
            # The activation of an average is not that of a normal variable of the norm's deviation.
            return None


class _Walk:
    """From one layer along everything that reads its result."""

    def __init__(self, part: Part, calls: Counter[int], owners: Counter[int], homogeneous: bool) -> None:
        self._part = part
        self._calls = calls
        self._owners = owners
        self._homogeneous = homogeneous
        self._found: Link

    def link(self, node: fx.Node) -> Link:
        module = self._part.modules[node.target]
        self._check(node.target, module)
        if not self._homogeneous and type(module) in CONV and module.groups > 1:
            if is_depthwise(module):
                raise NotLinked("it is depthwise: its channels are those of the layer before it")
            raise NotLinked(f"it has {module.groups} groups")
        self._found = Link(self._part.prefix + node.target, module)
        # 0 for a linear layer, whose channels lie in the last dimension.
        self._rank = CONV.get(type(module), 0)
        self._follow(node, flat=False, direct=True)
        if not self._found.uses:
            raise NotLinked("no layer takes its result in")
        return self._found

    def _check(self, target: str, module: torch.nn.Module) -> None:
        if self._calls[id(module)] > 1:
            raise NotLinked(f"{self._name(target)} is called more than once")
        reason = why_not_changed(module, self._owners)
        if reason is not None:
            raise NotLinked(f"{self._name(target)}: {reason}")

    def _name(self, target: str) -> str:
        return self._part.prefix + target

    def _follow(self, node: fx.Node, *, flat: bool, direct: bool) -> None:
        """Goes to all that read the node. ``flat``: each channel's map is now elements next to each other in the last
        dimension; ``direct``: nothing lies between the layer and the node."""
        for user in node.users:
            if _reads_batch_size(user):
                continue
            if user.op == "call_module":
                self._enter(node, user, flat, direct)
            elif _flattens(user, node, self._rank):
                self._follow(user, flat=True, direct=False)
            elif self._passes(user, node, flat):
                self._follow(user, flat=flat, direct=False)
            else:
                raise NotLinked(self._why(user))

    def _passes(self, user: fx.Node, node: fx.Node, flat: bool) -> bool:
        """Whether a function or method leaves each channel in its place."""
        if user.all_input_nodes != [node]:
            return False
        return (
            user.target in _HOMOGENEOUS_CALLS
            or (user.target in _POOL_CALLS and self._rank > 0 and not flat)
            or (user.target in _POINTWISE_CALLS and not self._homogeneous)
        )

    def _enter(self, node: fx.Node, user: fx.Node, flat: bool, direct: bool) -> None:
        module = self._part.modules[user.target]
        kind = type(module)
        if user.all_input_nodes != [node]:
            raise NotLinked(self._why(user))
        if kind in LAYERS:
            self._take_in(user, module, flat)
        elif kind in BATCH_NORM and module.num_features == self._found.channels and module.track_running_stats:
            self._check(user.target, module)
            if direct and len(node.users) == 1 and module.affine:
                self._found.norm = module
            elif self._homogeneous:
                raise NotLinked(f"batch norm {self._name(user.target)} is not affine, or not all that reads its result")
            else:
                self._found.between.append(module)
            self._follow(user, flat=flat, direct=False)
        elif kind is T.PReLU and module.num_parameters == 1:
            self._follow(user, flat=flat, direct=False)
        elif kind is T.PReLU and module.num_parameters == self._found.channels and self._rank > 0 and not flat:
            if self._calls[id(module)] > 1:
                raise NotLinked(f"{self._name(user.target)} is called more than once")
            self._found.between.append(module)
            self._follow(user, flat=flat, direct=False)
        elif kind is T.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            self._follow(user, flat=True, direct=False)
        elif (
            kind in _HOMOGENEOUS
            or (kind in _POOLS and self._rank > 0 and not flat)
            or (kind in _POINTWISE and not self._homogeneous)
        ):
            self._follow(user, flat=flat, direct=False)
        else:
            raise NotLinked(self._why(user))

    def _take_in(self, user: fx.Node, module: torch.nn.Module, flat: bool) -> None:
        channels = self._found.channels
        self._check(user.target, module)
        if type(module) in LINEAR:
            # A linear layer's channels are the last dimension, and stay so unless flattening moved others into it.
            repeat, rest = divmod(module.in_features, channels)
            if rest or (repeat != 1 and not flat) or (self._rank == 0 and repeat != 1) or (self._rank > 0 and not flat):
                raise NotLinked(f"{self._name(user.target)} mixes its channels with other dimensions")
            self._found.uses.append(Use(self._name(user.target), module, repeat))
            return
        if flat or CONV[type(module)] != self._rank or module.in_channels != channels:
            raise NotLinked(f"{self._name(user.target)} mixes its channels with other dimensions")
        if self._homogeneous or module.groups == 1:
            self._found.uses.append(Use(self._name(user.target), module))
        elif is_depthwise(module) and module.out_channels == module.in_channels:
            self._found.between.append(module)
            self._follow(user, flat=False, direct=False)
        else:
            raise NotLinked(f"{self._name(user.target)} has {module.groups} groups")

    def _why(self, user: fx.Node) -> str:
        if user.op == "output":
            return "its result is returned" + (
                f" by {self._part.prefix[:-1]}" if self._part.prefix else " by the model"
            )
        if user.op == "call_module":
            return f"its result goes to {self._name(user.target)}, a {type(self._part.modules[user.target]).__name__}"
        if user.target in _SUMS and len(user.all_input_nodes) > 1:
            return "its result is added to another one, as in a residual connection, whose channels would have to be the same"
        what = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))
        return f"its result goes to {what}"


def _reads_batch_size(node: fx.Node) -> bool:
    """Whether the node is ``x.size(0)``, ``len(x)``, or ``x.shape`` of which only the first is read."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,) or (not node.args[1:] and not node.kwargs and _only_first_read(node))
    if node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",):
        return _only_first_read(node)
    return node.op == "call_function" and node.target is len


def _only_first_read(node: fx.Node) -> bool:
    return all(user.target is operator.getitem and user.args[1:] == (0,) for user in node.users)


def _is_batch_size(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.getitem:
        return value.args[1:] == (0,) and isinstance(value.args[0], fx.Node) and _reads_batch_size(value.args[0])
    return (value.target == "size" and value.args[1:] == (0,)) or value.target is len


def _flattens(user: fx.Node, node: fx.Node, rank: int) -> bool:
    """Whether the node makes each channel's map elements next to each other: by flattening, or by its mean."""
    if not user.args or user.args[0] is not node:
        return False
    options: Callable[[str, int, Any], Any] = lambda name, place, default: (  # noqa: E731
        user.kwargs.get(name, user.args[place] if len(user.args) > place else default)
    )
    if user.target in (torch.flatten, "flatten"):
        return (options("start_dim", 1, 0), options("end_dim", 2, -1)) == (1, -1)
    if user.target in ("view", "reshape", torch.reshape):
        shape = user.args[1] if len(user.args) == 2 and isinstance(user.args[1], (tuple, list)) else user.args[1:]
        return len(shape) == 2 and _is_batch_size(shape[0]) and shape[1] == -1
    if user.target in ("mean", torch.mean) and rank > 0 and not options("keepdim", 2, False):
        dims = options("dim", 1, None)
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        return sorted(d - rank - 2 if d >= 0 else d for d in dims) == list(range(-rank, 0))
    return False
