"""Quantization-aware training (Jacob et al., CVPR 2018): ``prepare_qat_(model, config)``, train, ``convert_qat_(model)``.

Between the two, layers keep their parameters, and compute with what quantization leaves of weights and inputs
(:func:`fastnn.fake_quantize`), so that training learns to live with it. Scales are chosen anew in each call, by the very
formulas of :func:`~fastnn.quant.quantize_`, and gradients go straight through. :func:`convert_qat_` makes of each layer what
``quantize_`` would make of it: integers that stand for the numbers the training computed with. What differs is how products
are added up: in int32, exactly, instead of in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import functional
from ..backends.reference.quantize import FLOAT8
from ..convert import Selection, _check_model, _named_modules, _select
from ..ops.fake_quantize import fake_quantize
from ..ops.quantize import choose_scale
from .config import Config, Int8Dynamic, Int8Static
from .observers import Observer
from .quantize import _calibrate, _check_first_time, _is_linear, _plan, _rule, become, input_parameters, undoing

Model = TypeVar("Model", bound=torch.nn.Module)


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
        """The weight (rows of outputs first) that the integers will stand for, in float32; differentiable."""
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


_FORWARD: dict[str, Callable[[Any, Tensor], Tensor]] = {"Linear": _linear, "Conv1D": _linear}


def _kind(layer: torch.nn.Module) -> str:
    return "Conv1D" if type(layer).was_before_qat.__name__ == "Conv1D" else "Linear"


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
    encoders, ``only`` and ``skip`` are as in :func:`~fastnn.quant.quantize_`, and so are the exceptions. With
    :class:`~fastnn.quant.Int8Static` the model runs on the calibration data first; in training the observers go on
    observing, and in eval mode they do not.

    Raises:
        TypeError: ``model`` is no module, ``config`` no configuration, ``only`` or ``skip`` none of their forms.
        ValueError: as ``quantize_``; a layer is prepared already; a scheme of floats (:class:`Float8WeightOnly`).
    """
    _check_model("prepare_qat_", model)
    if not isinstance(config, Config):
        raise TypeError(f"prepare_qat_: config must be one of fastnn.quant's, such as Int8Dynamic(), got {config!r}")
    if config.weight_dtype in FLOAT8:
        raise ValueError(f"prepare_qat_: config: expected a scheme of integers, got {config!r}")
    modules = _named_modules(model)
    chosen = _select("only", only, model, "prepare_qat_") if only is not None else {id(m) for _, m in modules}
    if skip is not None:
        chosen -= _select("skip", skip, model, "prepare_qat_")
    _check_first_time(modules, chosen)
    for names, module in modules:
        if isinstance(module, QuantizationAware) and id(module) in chosen:
            raise ValueError(f"prepare_qat_: {names[0] or 'the model'} is prepared already; call convert_qat_ first")
    with undoing() as undo:
        layers = _plan(modules, chosen, config, undo)
        others = [name for name, layer, _ in layers if not _is_linear(layer)]
        if others:
            raise ValueError(f"prepare_qat_: only linear layers can be trained; leave {', '.join(others)} with skip=")
        observers = _calibrate(model, config, layers) if isinstance(config, Int8Static) else {}
        for name, layer, _ in layers:
            undo.remember(layer)
            layer.__class__ = _class_on(type(layer))
            layer.__dict__.update(qat_config=config, qat_observer=observers.get(name))
    return model


def convert_qat_(model: Model) -> Model:
    """Make quantized layers, in place, of those that :func:`prepare_qat_` has prepared; return the model.

    It gives what it gave in eval mode before, to the rounding of the output. :func:`~fastnn.quant.dequantize_` makes floating
    layers of it again.

    Raises TypeError if ``model`` is no module, ValueError where nothing was prepared. After an exception the model is as it
    was.
    """
    _check_model("convert_qat_", model)
    layers = [module for _, module in _named_modules(model) if isinstance(module, QuantizationAware)]
    if not layers:
        raise ValueError("convert_qat_: nothing to convert: no layer was prepared by prepare_qat_")
    with undoing() as undo, torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            undo.remember(layer)
            config, observer = (layer.__dict__.pop(name) for name in QuantizationAware.OWN)
            layer.__class__ = type(layer).was_before_qat
            become(layer, _rule(layer, config).make(layer, config, observer))
    return model


__all__ = ["QuantizationAware", "convert_qat_", "prepare_qat_"]
