"""``quantize_(model, config)`` and ``dequantize_(model)``: layers become quantized ones, in place, and floating ones again.

As in :func:`fastnn.convert` a module stays the object that it was, with its hooks and its place in the model: it gets another
class and other tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import nn
from ..backends.reference.quantize import PACKED, RANGE
from ..convert import Selection, _check_model, _class_name, _named_modules, _original_class, _select
from ..fuse import is_fused
from ..nn.conv1d import is_conv1d
from ..ops.quantize import choose_scale, quantize_dynamic
from ._graph import CONV
from .adaround import Moments, refine
from .chain import Part, find_parts, unchain
from .config import Config, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
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

Model = TypeVar("Model", bound=torch.nn.Module)

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


def quantize_(
    model: Model,
    config: Config,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    rounding: str = "nearest",
    calibration_data: Iterable[Any] | None = None,
) -> Model:
    """Replace, in place, layers by quantized ones; return the model. :func:`dequantize_` undoes it.

    Linear layers (``torch.nn.Linear``, ``fastnn.nn.Linear``, transformers' ``Conv1D``) become
    :class:`~fastnn.quant.QuantizedLinear`, attention (``MultiheadAttention`` of torch and fastnn)
    :class:`~fastnn.quant.QuantizedMultiheadAttention`. As in :func:`fastnn.convert`, subclasses of these are left, since they
    may compute something else, and so are layers whose weight is computed at each call. torch's encoder layers around
    quantized ones get fastnn's classes, because torch's read the weights in them and never call them.

    Under :class:`Int8Static` convolutions of up to three dimensions (torch's and fastnn's) become
    :class:`~fastnn.quant.QuantizedConv` as well, where ``torch.fx`` can follow the forward of the model or of the largest module
    around them that it can: batch norms behind them become part of them, and uint8 goes from one to the next. Those of a
    forward that cannot be followed stay as they are; :func:`fastnn.report` tells. Under the weight-only schemes convolutions of
    up to three dimensions become :class:`~fastnn.quant.WeightOnlyConv`, wherever they are. :class:`Int8Dynamic` leaves all
    convolutions as they are.

    Quantized layers are for inference: they have buffers and no parameters.

    Args:
        model: any module; it may itself be the one that is replaced.
        config: :class:`Int8Dynamic`, :class:`Int8Static`, :class:`Int8WeightOnly`, :class:`Int4WeightOnly` or
            :class:`Float8WeightOnly`.
        only, skip: these layers alone, or all but these; forms as for :func:`fastnn.convert`.
        rounding: ``"nearest"``: scales hold the largest weight, and weights are rounded to the nearest integer. ``"mse"``:
            scales are those with the least squared error. ``"adaround"``: the same scales, and weights are rounded so that the
            layer's results on ``calibration_data`` change least (:mod:`fastnn.quant.adaround`), which few-bit weights gain
            most from. Neither is for float8.
        calibration_data: for ``"adaround"``, inputs as :class:`Int8Static` takes them; its own by default. They are read more
            than once if the layers are many.

    Raises:
        TypeError: ``model`` is no module, ``config`` no configuration, ``only`` or ``skip`` none of their forms.
        ValueError: a layer in question is quantized already; a model of ``fuse=True`` whose convolutions would be quantized; a layer that cannot be
            quantized so (its size has no such groups, is odd for 4 bits, its dtype is float64); a subclass of torch's encoder
            layer that would not call the layers in it; nothing to quantize; no calibration data, or a layer that saw none; a
            pattern that meets no module; another ``rounding``, one that float8 has not, or ``calibration_data`` that nothing
            reads.

    After an exception, of the model's forward in calibration as well, the model is as it was.
    """
    _check_model("quantize_", model)
    if not isinstance(config, Config):
        hint = f"; make one: {config.__name__}()" if isinstance(config, type) and issubclass(config, Config) else ""
        raise TypeError(f"quantize_: config must be one of fastnn.quant's, such as Int8Dynamic(), got {config!r}{hint}")
    _check_rounding(config, rounding, calibration_data)
    modules = _named_modules(model)
    chosen = _select("only", only, model, "quantize_") if only is not None else {id(module) for _, module in modules}
    if skip is not None:
        chosen -= _select("skip", skip, model, "quantize_")
    chosen = _in_ranges(modules, chosen, config)
    _check_first_time("quantize_", modules, chosen)
    _check_not_fused(modules, chosen, config)
    with undoing() as undo, torch.inference_mode(False), torch.no_grad():
        parts: list[Part] = []
        if isinstance(config, Int8Static):
            parts = find_parts(model, chosen, config)
            # Read more than once.
            config = dataclasses.replace(config, calibration_data=list(inputs_of(config.calibration_data)))
        layers = _plan(modules, chosen, config, undo, bool(parts))
        observers = _calibrate(model, config, layers, parts) if isinstance(config, Int8Static) else {}
        made = [(layer, rule.make(layer, config, observers.get(name))) for name, layer, rule in layers]
        if rounding != "nearest":
            waiting = [
                (name, layer, quantized, layer.weight.t() if _is_conv1d(layer) else layer.weight)
                for (name, layer, _), (_, quantized) in zip(layers, made, strict=True)
            ]
            waiting += [layer for part in parts for layer in part.made()]
            data = getattr(config, "calibration_data", None) if calibration_data is None else calibration_data
            _refine(model, waiting, data if rounding == "adaround" else None)
        for layer, quantized in made:
            undo.remember(layer)
            become(layer, quantized)
        for part in parts:
            part.commit()
    return model


def dequantize_(model: Model) -> Model:
    """Undo :func:`quantize_`, in place: every layer gets the class that it had, with weights that are what the quantized
    ones stood for; return the model. Weights and biases are new parameters, which require gradients.

    Batch norms that have become part of convolutions stay so.

    Raises TypeError if ``model`` is no module.
    """
    _check_model("dequantize_", model)
    for _, module in _named_modules(model):
        if isinstance(module, Quantized):
            become(module, module.dequantized())
    for _, module in _named_modules(model):
        unchain(module)
        if isinstance(module, QuantizedMultiheadAttention):
            become(module, module.recomposed())
        else:
            before = module.__dict__.pop(_BEFORE, None)
            if before is not None:
                module.__class__ = before
    return model


# ---- which layers ------------------------------------------------------------------------------------------------


def _is_linear(module: torch.nn.Module) -> bool:
    if type(module) in (torch.nn.Linear, nn.Linear):
        return "weight" in module._parameters
    original = _original_class(type(module))
    return is_conv1d(module) or (original is not None and original.__name__ == "Conv1D")


def _is_conv1d(layer: torch.nn.Module) -> bool:
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
    columns = weight.shape[0 if _is_conv1d(layer) else 1]
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
    if _is_conv1d(layer):
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


#: All kinds of layers. The first that matches a module is the one. (Convolutions under Int8Static are found by their places.)
RULES: list[Rule] = [
    Rule(_is_linear, (Config,), _why_not_linear, _quantize_linear),
    Rule(
        is_convolution,
        (Int8WeightOnly, Int4WeightOnly, Float8WeightOnly),
        lambda layer, config: _why_not(layer),
        lambda layer, config, observer: WeightOnlyConv.of(layer, config),
    ),
]


def _rule(module: torch.nn.Module, config: Config) -> Rule | None:
    for rule in RULES:
        if isinstance(config, rule.configs) and rule.matches(module):
            return rule
    return None


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
        if id(module) in chosen and any(_joined(name, f"{part}input") in ranges for name in names for part in inside)
    }


def _check_not_fused(modules: list[tuple[list[str], torch.nn.Module]], chosen: set[int], config: Config) -> None:
    """ValueError for a model that reads its convolutions' weights and does not call them, if these would change."""
    if not isinstance(config, Int8Static) and not any(
        id(module) in chosen and is_convolution(module) and _rule(module, config) for _, module in modules
    ):
        return
    for names, module in modules:
        if is_fused(type(module)):
            raise ValueError(
                f"quantize_: {names[0] or 'the model'} was converted with fuse=True, and does not call its convolutions; call"
                " fastnn.revert first (Int8Static folds batch norms by itself), or leave them with skip="
            )


def _plan(
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
    linear = next(rule for rule in RULES if rule.make is _quantize_linear)
    layers: list[tuple[str, torch.nn.Module, Rule]] = []
    attentions: list[tuple[str, torch.nn.Module, QuantizedMultiheadAttention]] = []
    found: set[int] = set()
    # A loss reads the weight of its layer.
    found.update(
        id(module.linear)
        for _, module in modules
        if isinstance(module, getattr(torch.nn, "LinearCrossEntropyLoss", ()))
    )
    touched: set[int] = set()
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
            inside = [
                (name, layer)
                for name, layer in twin.named_children()
                if ("out_proj" if name == "out_proj" else "in_proj") in parts
            ]
            attentions.append((names[0], module, twin))
            layers += [(_joined(names[0], name), layer, linear) for name, layer in inside]
            touched.add(id(module))
        elif id(module) in chosen and id(module) not in found:
            rule = _rule(module, config)
            if rule is not None:
                layers.append((names[0], module, rule))
                touched.add(id(module))
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
    around = list(_encoders(modules, touched))
    for _, module, twin in attentions:
        undo.remember(module)
        become(module, twin)
    for module, kind in around:
        undo.remember(module)
        module.__dict__[_BEFORE] = type(module)
        module.__class__ = kind
    return layers


def _attention_weights(attention: torch.nn.Module) -> tuple[str, ...]:
    if attention._qkv_same_embed_dim:
        return ("in_proj_weight",)
    return ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


#: Where a module keeps the class that it had before quantize_ gave it another one because of the layers in it.
_BEFORE = "_class_before_quantization"


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
                    f"quantize_: {names[0] or 'the model'} is or has a {_class_name(kind)}, which in eval mode hands the weights of"
                    " the layers in it to torch and never calls them; leave it with skip="
                )
            replaced.add(id(one))
            yield one, nn.TransformerEncoderLayer if kind is layer_kind else nn.TransformerEncoder


# ---- calibration -------------------------------------------------------------------------------------------------


def run_on(model: torch.nn.Module, input: Any) -> Any:
    """``model``'s answer to one of the inputs of a calibration: a tensor, positional arguments, or keyword arguments."""
    if isinstance(input, Tensor):
        return model(input)
    if isinstance(input, Mapping):
        return model(**input)
    if isinstance(input, (tuple, list)):
        return model(*input)
    raise TypeError(f"expected a tensor, a tuple, a list or a mapping as the model's input, got {type(input).__name__}")


def inputs_of(data: Any) -> Any:
    """The inputs in ``data``; one tensor or one mapping is one input."""
    return [data] if isinstance(data, (Tensor, Mapping)) else data


class in_eval_mode:
    """Inside of it the model is in eval mode and no gradients are recorded; after it every module is in the mode it had."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = {module: module.training for module in self._model.modules()}
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        self._model.eval()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        for module, mode in self._modes.items():
            module.training = mode


def _calibrate(
    model: torch.nn.Module,
    config: Int8Static,
    layers: list[tuple[str, torch.nn.Module, Rule]],
    parts: Sequence[Part] = (),
) -> dict[str, Observer]:
    """What each layer's observer has seen of its inputs while the model ran on the data; by the layers' names. The parts make
    their layers from what they have seen."""
    observers = {name: config.make_observer() for name, _, _ in layers}
    if config.ranges is not None:
        try:
            for name, observer in observers.items():
                observer.observe(torch.tensor(config.ranges[_joined(name, "input")]))
            for part in parts:
                part.take_ranges(config.ranges)
                part.make()
        except KeyError as error:
            raise ValueError(
                f"quantize_: {error.args[0]}_scale is missing in the state_dict that Int8Static was given: that of another model"
            ) from None
        return observers
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observers[name].observe(args[0] if args else next(iter(kwargs.values())))

        return hook

    count = 0
    try:
        for name, layer, _ in layers:
            handles.append(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
        with in_eval_mode(model):
            for input in inputs_of(config.calibration_data):
                run_on(model, input)
                count += 1
            # By themselves: while a part is looked into its layers are called twice.
            for handle in handles:
                handle.remove()
            handles = [part.module.register_forward_pre_hook(part.observe, with_kwargs=True) for part in parts]
            for input in inputs_of(config.calibration_data) if parts else ():
                run_on(model, input)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(
            "quantize_: Int8Static needs calibration_data, got none: it is empty, or was used up before (the state of a model that"
            " is quantized already does without: Int8Static.from_state_dict)"
        )
    for name, observer in observers.items():
        try:
            observer.range()
        except ValueError as error:
            raise ValueError(
                f"quantize_: {name or 'the model'} saw no finite value while the model ran on {count} inputs of"
                " calibration_data; leave it with skip=, or give data that reaches it"
            ) from error
    try:
        for part in parts:
            part.make()
    except ValueError as error:
        raise ValueError(
            f"quantize_: a convolution saw no finite value while the model ran on {count} inputs of calibration_data; leave it"
            " with skip=, or give data that reaches it"
        ) from error
    return observers


def _check_rounding(config: Config, rounding: str, data: Any) -> None:
    if rounding not in ("nearest", "mse", "adaround"):
        raise ValueError(f"quantize_: rounding must be 'nearest', 'mse' or 'adaround', got {rounding!r}")
    if rounding != "nearest" and config.weight_dtype not in RANGE:
        raise ValueError(f"quantize_: rounding={rounding!r} is for integers, not for {config.weight_dtype}")
    if rounding != "adaround" and data is not None:
        raise ValueError(f"quantize_: calibration_data is for rounding='adaround', got rounding={rounding!r}")
    if rounding == "adaround" and data is None and not isinstance(config, Int8Static):
        raise ValueError("quantize_: rounding='adaround' needs calibration_data, a few batches of the model's inputs")
    if data is not None and not isinstance(data, Iterable):
        raise TypeError(f"quantize_: calibration_data must be an iterable of inputs, got {type(data).__name__}")


#: The layers' moments, of 8 bytes times their inputs squared, that are in memory at a time.
_MOMENTS = 1 << 29


def _refine(
    model: torch.nn.Module, waiting: list[tuple[str, torch.nn.Module, Quantized, Tensor]], data: Any | None
) -> None:
    """Better scales for each layer that was made, and with data better roundings. Of a layer: its name, itself, what was made of
    it, and the weight that this has rounded."""
    inputs = [] if data is None else list(inputs_of(data))
    if data is not None and not inputs:
        raise ValueError("quantize_: calibration_data must hold an input at least, got none")
    while waiting:
        some, size = [], 0
        while waiting and (not some or size <= _MOMENTS):
            some.append(waiting.pop(0))
            _, layer, _, weight = some[-1]
            size += 8 * (weight.numel() // max(1, weight.shape[0])) ** 2 * getattr(layer, "groups", 1)
        moments = {name: Moments() for name, *_ in some}
        hooks = [layer.register_forward_hook(moments[name], with_kwargs=True) for name, layer, _, _ in some]
        try:
            with in_eval_mode(model):
                for input in inputs:
                    run_on(model, input)
        finally:
            for hook in hooks:
                hook.remove()
        for name, _, quantized, weight in some:
            moment = moments[name].total
            if inputs and moment is None:
                raise ValueError(
                    f"quantize_: {name or 'the model'} was not called while the model ran on {len(inputs)} inputs of"
                    " calibration_data; leave it with skip=, or give data that reaches it"
                )
            refine(quantized, weight, moment)


# ---- in place ----------------------------------------------------------------------------------------------------

#: What a module keeps when it becomes another: whoever watches it goes on doing so.
_KEPT = (
    "training",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def become(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Gives ``module`` the class, the tensors, the children and the attributes of ``other``; hooks, mode and what else it
    has of its own stay."""
    state = dict(module.__dict__)
    for name in (*getattr(type(module), "OWN", ()), "_packed_weight"):
        state.pop(name, None)
    state.update((name, value) for name, value in other.__dict__.items() if name not in _KEPT)
    module.__class__ = type(other)
    module.__dict__.clear()
    module.__dict__.update(state)


class undoing:
    """After an exception inside of it, modules are what they were when it was told of them."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[torch.nn.Module, type, dict[str, Any]]] = {}

    def remember(self, module: torch.nn.Module) -> None:
        self._saved.setdefault(id(module), (module, type(module), dict(module.__dict__)))

    def __enter__(self) -> undoing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            return
        for module, kind, state in self._saved.values():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)


__all__ = ["RULES", "Rule", "dequantize_", "quantize_"]
