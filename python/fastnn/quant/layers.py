"""Which layers of a model a scheme quantizes, and how each kind of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import nn
from .._modules import Selection, class_name, named_modules, selected
from ..backends.reference.quantize import PACKED
from ..convert import original_class
from ..fuse import is_fused
from ..nn.conv1d import is_conv1d
from ..ops.quantize import choose_scale, quantize_dynamic
from .config import Config, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from .in_place import become, undoing
from .links import CONV
from .modules import (
    Int8DynamicLinear,
    Int8StaticLinear,
    Quantized,
    QuantizedMultiheadAttention,
    WeightOnlyLinear,
    class_before,
    relative_error,
)
from .observers import Observer
from .weight_only_conv import WeightOnlyConv

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: 255 · 128 · 65,793 < 2³¹.
_MOST_INPUTS = 65_793
_ATTENTION = (torch.nn.MultiheadAttention, nn.MultiheadAttention)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How layers of one kind are quantized."""

    #: Whether a module is of this kind.
    matches: Callable[[torch.nn.Module], bool]
    #: The schemes that it has; layers of the kind are left as they are by others.
    configs: tuple[type[Config], ...]
    #: Why this layer cannot be quantized so, or None.
    why_not: Callable[[torch.nn.Module, Config], str | None]
    #: The quantized layer; for Int8Static with the observer of its inputs, else None.
    make: Callable[[torch.nn.Module, Config, Observer | None], Quantized]


def _is_linear(module: torch.nn.Module) -> bool:
    if type(module) in (torch.nn.Linear, nn.Linear):
        return "weight" in module._parameters
    original = original_class(type(module))
    return is_conv1d(module) or (original is not None and original.__name__ == "Conv1D")


def has_inputs_first(layer: torch.nn.Module) -> bool:
    """Whether the weight is (inputs, outputs), as transformers' Conv1D has it."""
    return type(layer).__name__ == "Conv1D"


def _why_not(layer: torch.nn.Module) -> str | None:
    """Why no scheme can quantize this layer, or None."""
    weight = layer.weight
    if type(weight) not in (torch.nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return (
            f"its weight is {str(weight.dtype).removeprefix('torch.')}; float32, bfloat16 and float16 can be quantized"
        )
    if "forward" in layer.__dict__:
        return "its forward was set on the instance, which would go on calling torch"
    return None


def _why_not_linear(layer: torch.nn.Module, config: Config) -> str | None:
    weight, reason = layer.weight, _why_not(layer)
    if reason is not None:
        return reason
    columns = weight.shape[0 if has_inputs_first(layer) else 1]
    if config.weight_dtype in PACKED and columns % 2:
        return f"its {columns} inputs are odd in number, and a byte holds two numbers of 4 bits"
    if isinstance(config, (Int8Dynamic, Int8Static)) and columns > _MOST_INPUTS:
        return (
            f"its {columns:,} inputs are more than the {_MOST_INPUTS:,} of which a sum of products surely fits 32 bits"
        )
    if config.group_size is not None and columns % config.group_size:
        return f"its {columns} inputs do not divide into groups of group_size={config.group_size}"
    return None


def _quantize_linear(layer: torch.nn.Module, config: Config, observer: Observer | None) -> Quantized:
    weight, bias = layer.weight.detach(), layer.bias
    if has_inputs_first(layer):
        weight = weight.t()
    grouping = {"axis": 0} if config.group_size is None else {"group_size": config.group_size}
    q, scale, zero_point = quantize_dynamic(weight, dtype=config.weight_dtype, symmetric=config.symmetric, **grouping)
    args = (q.contiguous(), scale, zero_point, None if bias is None else bias.detach().clone())
    options = {"weight_dtype": config.weight_dtype, "group_size": config.group_size, "float_dtype": weight.dtype}
    if observer is not None:
        input_scale, input_zero_point = input_parameters(observer, weight.device)
        made = Int8StaticLinear(*args, **options, input_scale=input_scale, input_zero_point=input_zero_point)
    elif isinstance(config, Int8Dynamic):
        made = Int8DynamicLinear(*args, **options)
    else:
        made = WeightOnlyLinear(*args, **options)
    if not weight.is_meta:
        made.weight_error = relative_error(weight, made.dequantized_weight())
    made.was = class_before(layer)
    return made


def input_parameters(observer: Observer, device: torch.device) -> tuple[Tensor, Tensor]:
    """The scale (float32) and zero point (int32) of uint8 for the range that an observer has found; no dimensions."""
    ends = torch.tensor(observer.range(), dtype=torch.float32, device=device)
    scale, zero_point = choose_scale(ends, dtype="uint8", symmetric=False)
    return scale.reshape(()), zero_point.reshape(())


def is_convolution(module: torch.nn.Module) -> bool:
    return type(module) in CONV and "weight" in module._parameters


_LINEAR = Rule(_is_linear, (Config,), _why_not_linear, _quantize_linear)

#: All kinds of layers. The first that matches a module is the one. (Convolutions under Int8Static are found by their places.)
RULES: list[Rule] = [
    _LINEAR,
    Rule(
        is_convolution,
        (Int8WeightOnly, Int4WeightOnly, Float8WeightOnly),
        lambda layer, config: _why_not(layer),
        lambda layer, config, observer: WeightOnlyConv.of(layer, config),
    ),
]


def rule_of(module: torch.nn.Module, config: Config) -> Rule | None:
    """How the scheme quantizes this module, or None."""
    for rule in RULES:
        if isinstance(config, rule.configs) and rule.matches(module):
            return rule
    return None


def choose(
    function: str, model: torch.nn.Module, config: Config, only: Selection | None, skip: Selection | None
) -> tuple[list[tuple[list[str], torch.nn.Module]], set[int]]:
    """The modules of a model with their names, and the ids of those that the scheme is asked for.

    Raises TypeError and ValueError as :func:`fastnn.quant.quantize_`, for modules that cannot be asked for.
    """
    modules = named_modules(model)
    chosen = _in_ranges(modules, selected(function, model, only, skip), config)
    _check_first_time(function, modules, chosen)
    _check_not_fused(modules, chosen, config)
    return modules, chosen


def _check_first_time(op: str, modules: list[tuple[list[str], torch.nn.Module]], chosen: set[int]) -> None:
    """ValueError for a chosen module that is quantized already, or is being trained for it."""
    named = [(names[0] or "the model", module) for names, module in modules if id(module) in chosen]
    for name, module in named:
        if hasattr(type(module), "was_before_qat"):
            raise ValueError(f"{op}: {name} is prepared already, by prepare_qat_; call convert_qat_ first")
    for name, module in named:
        if isinstance(module, (Quantized, QuantizedMultiheadAttention)):
            raise ValueError(
                f"{op}: {name} is a {type(module).__name__} already; call dequantize_ first, or choose others with only= or"
                " skip="
            )


def _in_ranges(modules: list[tuple[list[str], torch.nn.Module]], chosen: set[int], config: Config) -> set[int]:
    """Of the chosen modules those whose ranges the scheme knows already, where it knows any."""
    ranges = getattr(config, "ranges", None)
    if ranges is None:
        return chosen
    inside = ("", "in_proj.", "q_proj.")
    return {
        id(module)
        for names, module in modules
        if id(module) in chosen and any(joined(name, f"{part}input") in ranges for name in names for part in inside)
    }


def _check_not_fused(modules: list[tuple[list[str], torch.nn.Module]], chosen: set[int], config: Config) -> None:
    """ValueError for a model that reads its convolutions' weights and does not call them, if these would change."""
    if not isinstance(config, Int8Static) and not any(
        id(module) in chosen and is_convolution(module) and rule_of(module, config) for _, module in modules
    ):
        return
    for names, module in modules:
        if is_fused(type(module)):
            raise ValueError(
                f"quantize_: {names[0] or 'the model'} was converted with fuse=True, and does not call its convolutions; call"
                " fastnn.revert first (Int8Static folds batch norms by itself), or leave them with skip="
            )


@dataclasses.dataclass
class _Found:
    """The layers to quantize, each once, with its name and its rule."""

    layers: list[tuple[str, torch.nn.Module, Rule]] = dataclasses.field(default_factory=list)
    #: Attention around some of them, and what takes its place: the same with its projections as layers.
    attentions: list[tuple[torch.nn.Module, QuantizedMultiheadAttention]] = dataclasses.field(default_factory=list)
    #: The ids of the modules that will change.
    touched: set[int] = dataclasses.field(default_factory=set)


def take_layers(
    modules: list[tuple[list[str], torch.nn.Module]],
    chosen: set[int],
    config: Config,
    undo: undoing,
    convolutions: bool = False,
) -> list[tuple[str, torch.nn.Module, Rule]]:
    """The layers to quantize beside the convolutions, each once, with its name; attention is taken apart and encoders get
    fastnn's classes.

    All checks come before the first change.
    """
    found = _find(modules, chosen, config)
    _check_found(found.layers, config, convolutions)
    around = list(_encoders(modules, found.touched))
    for module, twin in found.attentions:
        undo.remember(module)
        become(module, twin)
    for module, kind in around:
        undo.remember(module)
        module.__dict__[CLASS_BEFORE] = type(module)
        module.__class__ = kind
    return found.layers


def _find(modules: list[tuple[list[str], torch.nn.Module]], chosen: set[int], config: Config) -> _Found:
    found = _Found()
    # A loss reads the weight of its layer.
    read = {
        id(module.linear)
        for _, module in modules
        if isinstance(module, getattr(torch.nn, "LinearCrossEntropyLoss", ()))
    }
    for names, module in modules:
        if type(module) in _ATTENTION:
            parts = [
                name
                for name in ("in_proj", "out_proj")
                if id(module if name == "in_proj" else module.out_proj) in chosen
            ]
            if not parts or not all(name in module._parameters for name in _attention_weights(module)):
                continue
            twin = QuantizedMultiheadAttention(module)
            found.layers += [
                (joined(names[0], name), layer, _LINEAR)
                for name, layer in twin.named_children()
                if ("out_proj" if name == "out_proj" else "in_proj") in parts
            ]
            found.attentions.append((module, twin))
            found.touched.add(id(module))
        elif id(module) in chosen and id(module) not in read:
            rule = rule_of(module, config)
            if rule is not None:
                found.layers.append((names[0], module, rule))
                found.touched.add(id(module))
    return found


def _check_found(layers: list[tuple[str, torch.nn.Module, Rule]], config: Config, convolutions: bool) -> None:
    wrong = [
        f"  {name or '(model)'}: {reason}" for name, layer, rule in layers if (reason := rule.why_not(layer, config))
    ]
    if wrong:
        lines = "\n".join(wrong)
        raise ValueError(f"quantize_: {type(config).__name__} cannot quantize these; leave them with skip=:\n{lines}")
    if not layers and not convolutions:
        raise ValueError(
            f"quantize_: nothing to quantize: {type(config).__name__} knows no layer that was asked for. Linear layers must be"
            " torch.nn.Linear, fastnn.nn.Linear or transformers' Conv1D themselves, with a weight that is a parameter; convolutions"
            " Conv1d to Conv3d themselves, for Int8Static in a module around them whose forward torch.fx can follow, and not for"
            " Int8Dynamic"
        )


def _attention_weights(attention: torch.nn.Module) -> tuple[str, ...]:
    if attention._qkv_same_embed_dim:
        return ("in_proj_weight",)
    return ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


#: Where a module keeps the class that it had before quantize_ gave it another one because of the layers in it.
CLASS_BEFORE = "_class_before_quantization"


def _encoders(
    modules: list[tuple[list[str], torch.nn.Module]], touched: set[int]
) -> Iterator[tuple[torch.nn.Module, type[torch.nn.Module]]]:
    """torch's encoders and encoder layers around quantized layers, and the classes that call the layers in them."""
    layer_kind, stack_kind = torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder
    replaced: set[int] = set()
    for names, module in modules:
        if not isinstance(module, (layer_kind, stack_kind)):
            continue
        if not any(id(inner) in touched for inner in module.modules()):
            continue
        base = layer_kind if isinstance(module, layer_kind) else stack_kind
        # A stack hands nested tensors on to all its layers, unless the first one is fastnn's.
        around = [module, *(module.layers if base is stack_kind else ())]
        for one in around:
            kind = type(one)
            if id(one) in replaced or kind.forward not in (layer_kind.forward, stack_kind.forward):
                continue
            if kind is not layer_kind and kind is not stack_kind:
                raise ValueError(
                    f"quantize_: {names[0] or 'the model'} is or has a {class_name(kind)}, which in eval mode hands the weights of"
                    " the layers in it to torch and never calls them; leave it with skip="
                )
            replaced.add(id(one))
            yield one, nn.TransformerEncoderLayer if kind is layer_kind else nn.TransformerEncoder
