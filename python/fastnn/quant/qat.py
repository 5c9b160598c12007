"""Quantization-aware training (Jacob et al., CVPR 2018): ``prepare_qat_(model, config)``, train, ``convert_qat_(model)``.

Between the two, layers keep their parameters, and compute with what quantization leaves of weights and inputs
(:func:`fastnn.fake_quantize`), so that training learns to live with it. Scales are chosen anew in each call, by the very
formulas of :func:`~fastnn.quant.quantize_`, and gradients go straight through. :func:`convert_qat_` makes of each layer what
``quantize_`` would make of it: integers that stand for the numbers the training computed with. What differs is how products
are added up: in int32, exactly, instead of in float32. Convolutions under ``Int8Static`` hand integers to each other, with what
is computed between them: see :mod:`fastnn.quant.qat_chain`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._modules import Model, Selection, check_model, named_modules
from ..backends.reference.quantize import FLOAT8
from ..ops.fake_quantize import fake_quantize
from ..ops.quantize import choose_scale
from .calibration import calibrate
from .chain import find_parts
from .config import Config, Int8Dynamic, Int8Static, check_config
from .in_place import become, undoing
from .layers import choose, input_parameters, rule_of, take_layers
from .links import CONV
from .observers import Observer
from .qat_chain import fake_quantized_filters, is_simulated, part_again, simulate


class QuantizationAware:
    """A layer that computes with what quantization leaves of its weight and its input. Its class is made at run time, on top
    of the class that the layer has, which is ``was_before_qat``."""

    #: Attributes that it has beside those of the layer.
    OWN = ("qat_config", "qat_observer")
    was_before_qat: type[torch.nn.Module]
    qat_config: Config
    qat_observer: Observer | None

    def forward(self, input: Tensor) -> Tensor:
        return _FORWARD[_kind(self)](self, input)

    def fake_quantized_weight(self) -> Tensor:
        """The weight (outputs first) that the integers will stand for, in float32; differentiable."""
        if _kind(self) == "Conv":
            return fake_quantized_filters(self.weight, self.qat_config)
        weight = self.weight.t() if _kind(self) == "Conv1D" else self.weight
        config = self.qat_config
        grouping: dict[str, Any] = {"axis": 0} if config.group_size is None else {"group_size": config.group_size}
        scale, zero_point = choose_scale(
            weight.detach(), dtype=config.weight_dtype, symmetric=config.symmetric, **grouping
        )
        return fake_quantize(weight.float(), scale, zero_point, dtype=config.weight_dtype, **grouping)

    def fake_quantized_input(self, input: Tensor) -> Tensor:
        """The input as the integers stand for it, in float32; as it is where the scheme is of weights alone."""
        config, x = self.qat_config, input.float()
        if isinstance(config, Int8Dynamic):
            rows = tuple(range(x.dim() - 1))
            scale, zero_point = choose_scale(x.detach(), dtype="uint8", axis=rows, symmetric=False)
            return fake_quantize(x, scale, zero_point, dtype="uint8", axis=rows)
        if self.qat_observer is not None:
            if self.training:
                self.qat_observer.observe(input)
            scale, zero_point = input_parameters(self.qat_observer, x.device)
            return fake_quantize(x, scale, zero_point, dtype="uint8")
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.qat_config!r}"


def _linear(layer: Any, input: Tensor) -> Tensor:
    bias = layer.bias
    weight, x = layer.fake_quantized_weight(), layer.fake_quantized_input(input)
    return functional.linear(x, weight, None if bias is None else bias.float()).to(input.dtype)


def _conv(layer: Any, input: Tensor) -> Tensor:
    weight, bias = layer.fake_quantized_weight(), layer.bias
    if layer.qat_observer is None:
        # As the converted layer computes, in the input's dtype.
        dtype = input.dtype
        return layer._conv_forward(input, weight.to(dtype), None if bias is None else bias.to(dtype))
    x = layer.fake_quantized_input(input)
    return layer._conv_forward(x, weight, None if bias is None else bias.float()).to(input.dtype)


_FORWARD: dict[str, Callable[[Any, Tensor], Tensor]] = {"Linear": _linear, "Conv1D": _linear, "Conv": _conv}


def _kind(layer: torch.nn.Module) -> str:
    before = type(layer).was_before_qat
    return "Conv" if before in CONV else "Conv1D" if before.__name__ == "Conv1D" else "Linear"


_CLASSES: dict[type, type] = {}


def _class_on(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of layers of this one that are trained for quantization."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"QuantizationAware{kind.__name__}", (QuantizationAware, kind), {"was_before_qat": kind})
    return _CLASSES[kind]


def prepare_qat_(
    model: Model, config: Config, *, only: Selection | None = None, skip: Selection | None = None
) -> Model:
    """Let layers compute, in place, with what the scheme leaves of their weights and inputs; return the model, to be trained.

    Parameters stay the objects that they were: an optimizer may have them already. Layers, classes of attention and
    encoders, convolutions, ``only`` and ``skip`` are as in :func:`~fastnn.quant.quantize_`, and so are the exceptions. With
    :class:`~fastnn.quant.Int8Static` the model runs on the calibration data first; in training the observers go on
    observing, and in eval mode they do not. Batch norms that will become part of convolutions go on computing with the
    batch's statistics where they are in training, and are folded where they are in eval mode.

    Raises:
        TypeError: ``model`` is no module, ``config`` no configuration, ``only`` or ``skip`` none of their forms.
        ValueError: as ``quantize_``; a layer is prepared already; a scheme of floats (:class:`Float8WeightOnly`); a module that
            in training follows its convolutions with something else than in eval mode.
    """
    check_model("prepare_qat_", model)
    check_config("prepare_qat_", config)
    if config.weight_dtype in FLOAT8:
        raise ValueError(f"prepare_qat_: config: expected a scheme of integers, got {config!r}")
    modules, chosen = choose("prepare_qat_", model, config, only, skip)
    with undoing() as undo:
        parts = []
        if isinstance(config, Int8Static):
            parts = find_parts(model, chosen, config)
            config = dataclasses.replace(config, calibration_data=list(config.inputs()))
        layers = take_layers(modules, chosen, config, undo, bool(parts))
        observers = calibrate(model, config, layers, parts) if isinstance(config, Int8Static) else {}
        if isinstance(config, Int8Static):
            # What was needed of it lies in the observers.
            config = dataclasses.replace(config, calibration_data=())
        prepared = [(layer, observers.get(name)) for name, layer, _ in layers]
        for part in parts:
            undo.remember(part.module)
            prepared += [(group.conv, part.observers[part.origin(group.input).name]) for group in part.groups]
            simulate(part, config)
        for layer, observer in prepared:
            undo.remember(layer)
            layer.__class__ = _class_on(type(layer))
            layer.__dict__.update(qat_config=config, qat_observer=observer)
    return model


def convert_qat_(model: Model) -> Model:
    """Make quantized layers, in place, of those that :func:`prepare_qat_` has prepared; return the model.

    It gives what it gave in eval mode before, to the rounding of the output. :func:`~fastnn.quant.dequantize_` makes floating
    layers of it again.

    Raises TypeError if ``model`` is no module, ValueError where nothing was prepared. After an exception the model is as it
    was.
    """
    check_model("convert_qat_", model)
    layers = [module for _, module in named_modules(model) if isinstance(module, QuantizationAware)]
    if not layers:
        raise ValueError("convert_qat_: nothing to convert: no layer was prepared by prepare_qat_")
    named = [(names[0], module) for names, module in named_modules(model)]
    with undoing() as undo, torch.inference_mode(False), torch.no_grad():
        found = []
        for layer in layers:
            undo.remember(layer)
            config, observer = (layer.__dict__.pop(name) for name in QuantizationAware.OWN)
            layer.__class__ = type(layer).was_before_qat
            found.append((layer, config, observer))
        parts = []
        for name, module in named:
            if is_simulated(module):
                undo.remember(module)
                parts.append(part_again(module, name))
                parts[-1].make()
        inside = {id(group.conv) for part in parts for group in part.groups}
        for layer, config, observer in found:
            if id(layer) not in inside:
                become(layer, rule_of(layer, config).make(layer, config, observer))
        for part in parts:
            part.commit()
    return model


__all__ = ["QuantizationAware", "convert_qat_", "prepare_qat_"]
