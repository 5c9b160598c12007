"""``quantize_(model, config)`` and ``dequantize_(model)``: layers become quantized ones, in place, and floating ones again.

As in :func:`fastnn.convert` a module stays the object that it was, with its hooks and its place in the model: it gets another
class and other tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._modules import Model, Selection, check_model, named_modules
from ..backends.reference.quantize import RANGE
from .adaround import Moments, refine
from .calibration import calibrate, in_eval_mode, run_on
from .chain import Part, find_parts, unchain
from .config import Config, Int8Static, check_config, inputs_of
from .in_place import become, undoing
from .layers import CLASS_BEFORE, choose, has_inputs_first, take_layers
from .modules import Quantized, QuantizedMultiheadAttention


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
    :class:`~fastnn.quant.QuantizedConv` as well, where ``torch.fx`` can follow the forward of the model or of the
    largest module
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
        ValueError: a layer in question is quantized already; a model of ``fuse=True`` whose convolutions would be
            quantized; a layer that cannot be quantized so (its size has no such groups, is odd for 4 bits, its dtype is
            float64); a subclass of torch's encoder layer that would not call the layers in it; nothing to quantize; no
            calibration data, or a layer that saw none; a pattern that meets no module; another ``rounding``, one that
            float8 has not, or ``calibration_data`` that nothing reads.

    After an exception, of the model's forward in calibration as well, the model is as it was.
    """
    check_model("quantize_", model)
    check_config("quantize_", config)
    _check_rounding(config, rounding, calibration_data)
    modules, chosen = choose("quantize_", model, config, only, skip)
    with undoing() as undo, torch.inference_mode(False), torch.no_grad():
        parts: list[Part] = []
        if isinstance(config, Int8Static):
            parts = find_parts(model, chosen, config)
            # Read more than once.
            config = dataclasses.replace(config, calibration_data=list(config.inputs()))
        layers = take_layers(modules, chosen, config, undo, bool(parts))
        observers = calibrate(model, config, layers, parts) if isinstance(config, Int8Static) else {}
        made = [(layer, rule.make(layer, config, observers.get(name))) for name, layer, rule in layers]
        if rounding != "nearest":
            waiting = [
                (name, layer, quantized, layer.weight.t() if has_inputs_first(layer) else layer.weight)
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
    check_model("dequantize_", model)
    for _, module in named_modules(model):
        if isinstance(module, Quantized):
            become(module, module.dequantized())
    for _, module in named_modules(model):
        unchain(module)
        if isinstance(module, QuantizedMultiheadAttention):
            become(module, module.recomposed())
        else:
            before = module.__dict__.pop(CLASS_BEFORE, None)
            if before is not None:
                module.__class__ = before
    return model


def _check_rounding(config: Config, rounding: str, data: Any) -> None:
    if rounding not in ("nearest", "mse", "adaround"):
        raise ValueError(f"quantize_: rounding must be 'nearest', 'mse' or 'adaround', got {rounding!r}")
    if rounding != "nearest" and config.weight_dtype not in RANGE:
        raise ValueError(f"quantize_: rounding={rounding!r} is for integers, not for {config.weight_dtype}")
    if rounding != "adaround" and data is not None:
        raise ValueError(f"quantize_: calibration_data is for rounding='adaround', got rounding={rounding!r}")
    if rounding == "adaround" and data is None and not isinstance(config, Int8Static):
        raise ValueError("quantize_: rounding='adaround' needs calibration_data, a few batches of the model's inputs")
    if data is not None:
        inputs_of(data, "quantize_: calibration_data")


#: The layers' moments, of 8 bytes times their inputs squared, that are in memory at a time.
_MOMENTS = 1 << 29


def _refine(
    model: torch.nn.Module, waiting: list[tuple[str, torch.nn.Module, Quantized, Tensor]], data: Any | None
) -> None:
    """Better scales for each layer that was made, and with data better roundings. Of a layer: its name, itself, what
    was made of it, and the weight that this has rounded."""
    inputs = [] if data is None else list(inputs_of(data, "quantize_: calibration_data"))
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
