"""Bias correction: what quantization adds to a layer's results on average is taken off its bias.

An error ε = Ŵ - W of the weights shifts the results by ε E[x], which is not 0 where inputs are not, as after relu (Nagel, van
Baalen, Blankevoort, Welling 2019, "Data-free quantization through weight equalization and bias correction", ICCV,
arXiv:1906.04721, section 4.2). It is measured on a few batches (their appendix D), layer after layer, so that each sees
inputs that are corrected already; or, without data, computed from the batch norm before the layer (section 4.2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._folding import fold_batch_norm
from .._modules import Model, check_model
from .calibration import in_eval_mode, run_on
from .config import inputs_of
from .links import CONV, Source, find_sources
from .modules import Quantized, QuantizedMultiheadAttention


def correct_bias_(model: Model, reference: torch.nn.Module, calibration_data: Iterable[Any] | None = None) -> Model:
    """Has each quantized layer's results be right on average, in place; returns the model.

    Layers without a bias get one. Call it last, after :func:`quantize_`.

    Args:
        model: quantized.
        reference: the float model that it was made from, whose modules have the same names.
        calibration_data: inputs as for :class:`Int8Static`; a few hundred samples are enough. With it the mean of each output
            channel over all samples and positions becomes the reference's: batch by batch, each layer being corrected
            before its results go on to the next one, and the corrections averaged over the batches. That includes what the
            quantization of inputs adds. Inside of an attention only the last projection is corrected.
            Without data, layers that follow a batch norm (with nothing but an activation, averages and flattening between)
            are corrected for the error of their weights: of a channel that the norm makes normal with mean β and deviation
            |γ|, E[x] is β, and after relu β Φ(β/|γ|) + |γ| φ(β/|γ|). Zeros that a convolution pads with are not counted. Other
            layers are left.

    Raises:
        TypeError: ``model`` or ``reference`` is no module.
        ValueError: no calibration data in the iterable; no layer of ``model`` is quantized; ``reference`` has no module of a
            layer's name, or one of another size; without data, no layer follows a batch norm; or a mean is not finite.

    After an exception the model is as it was.
    """
    check_model("correct_bias_", model)
    check_model("correct_bias_", reference, "reference")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    if not layers:
        raise ValueError("correct_bias_: model has no quantized layer; call quantize_ first")
    pairs = {name: pair for name, layer in layers.items() if (pair := _counterpart(name, layer, model, reference))}
    if calibration_data is None:
        shifts = _analytic(layers, reference)
    else:
        inputs = inputs_of(calibration_data, "correct_bias_: calibration_data")
        shifts = _measured(model, reference, pairs, inputs)
    for name, shift in shifts.items():
        if not shift.isfinite().all():
            raise ValueError(f"correct_bias_: the mean error of {name} is not finite")
    for name, shift in shifts.items():
        _add(layers[name], shift)
    return model


def _counterpart(
    name: str, layer: Quantized, model: torch.nn.Module, reference: torch.nn.Module
) -> tuple[Quantized, torch.nn.Module] | None:
    """The layer, and the module of the reference whose result its result should be."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(model.get_submodule(parent), QuantizedMultiheadAttention):
        # The reference computes its projections inside of one call.
        if leaf != "out_proj":
            return None
        name = parent
    try:
        return layer, reference.get_submodule(getattr(layer, "norm", None) or name)
    except AttributeError:
        raise ValueError(f"correct_bias_: reference has no module {name!r}, which is quantized in model") from None


def _add(layer: Quantized, shift: Tensor) -> None:
    bias = layer.bias
    layer.bias = shift.to(layer.float_dtype) if bias is None else (bias.detach() + shift).to(bias.dtype)


# ---- measured ----------------------------------------------------------------------------------------------------


def _measured(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    pairs: dict[str, tuple[Quantized, torch.nn.Module]],
    inputs: Iterable[Any],
) -> dict[str, Tensor]:
    """By how much the mean of each layer's results is below the reference's."""
    means: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in pairs}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(pairs, 0)

    def remember(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            means[name].append(_mean(output[0] if isinstance(output, tuple) else output, pairs[name][0]))

        return hook

    def correct(name: str) -> Callable[..., Tensor]:
        def hook(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
            if not means[name]:
                raise ValueError(f"correct_bias_: {name} is called more often in model than in reference")
            wanted, _ = means[name].pop(0)
            found, rows = _mean(output, module)
            if found.shape != wanted.shape:
                raise ValueError(
                    f"correct_bias_: {name} has {len(found)} channels in model and {len(wanted)} in reference"
                )
            shift = wanted - found
            sums[name] = sums.get(name, 0) + shift * rows
            counts[name] += rows
            return output + _along_channels(shift, output, module).to(output.dtype)

        return hook

    watch = [(other, remember(name)) for name, (_, other) in pairs.items()]
    watch += [(layer, correct(name)) for name, (layer, _) in pairs.items()]
    hooks = [module.register_forward_hook(hook) for module, hook in watch]
    try:
        with in_eval_mode(reference), in_eval_mode(model):
            for input in inputs:
                run_on(reference, input)
                run_on(model, input)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError(
            "correct_bias_: calibration_data reached no quantized layer; is it empty, or was it used up before?"
        )
    return {name: total / counts[name] for name, total in sums.items()}


def _channel_dim(output: Tensor, layer: Quantized) -> int:
    """A convolution of n dimensions has its channels before those; a linear layer has them last."""
    rank = CONV.get(layer.was[0], 0)
    return output.dim() - 1 - rank


def _mean(output: Tensor, layer: Quantized) -> tuple[Tensor, int]:
    """The mean of each channel in float64, and of how many numbers."""
    by_channel = output.detach().movedim(_channel_dim(output, layer), 0).flatten(1).double()
    return by_channel.mean(1), by_channel.shape[1]


def _along_channels(shift: Tensor, output: Tensor, layer: Quantized) -> Tensor:
    return shift.view(-1, *[1] * (output.dim() - 1 - _channel_dim(output, layer)))


# ---- computed ----------------------------------------------------------------------------------------------------


def _analytic(layers: dict[str, Quantized], reference: torch.nn.Module) -> dict[str, Tensor]:
    """-ε E[x] of each layer behind a batch norm."""
    sources = {name: source for name, source in find_sources(reference).items() if name in layers}
    if not sources:
        raise ValueError(
            "correct_bias_: no quantized layer follows a batch norm in reference, which would tell its inputs' mean; give"
            " calibration_data"
        )
    shifts = {}
    for name, source in sources.items():
        weight = _weight(reference, name, layers[name]).double()
        error = layers[name].dequantized().weight.detach().double() - weight
        mean = expected_input(source)
        by_input = error.flatten(2).sum(2) if error.dim() > 2 else error
        groups = getattr(reference.get_submodule(name), "groups", 1)
        by_group = mean.view(groups, -1, 1)
        shifts[name] = -(by_input.unflatten(0, (groups, -1)) @ by_group).flatten()
    return shifts


def _weight(reference: torch.nn.Module, name: str, layer: Quantized) -> Tensor:
    """The layer's weight before it was quantized, with the batch norm that has become part of it."""
    before = reference.get_submodule(name)
    if not getattr(layer, "norm", None):
        return before.weight.detach()
    norm = reference.get_submodule(layer.norm)
    weight, _ = fold_batch_norm(
        *(before.weight, before.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
        torch.preserve_format,
    )
    return weight.detach()


def expected_input(source: Source) -> Tensor:
    """E[x] of each input of a layer, in float64."""
    norm = source.norm
    zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=norm.running_mean.device)
    mean = zeros if norm.bias is None else norm.bias.detach().double()
    deviation = zeros + 1 if norm.weight is None else norm.weight.detach().double().abs()
    if source.activation != "none":
        mean = _above(mean, deviation, 0.0) - (_above(mean, deviation, 6.0) if source.activation == "relu6" else 0.0)
    return mean.repeat_interleave(source.repeat)


def _above(mean: Tensor, deviation: Tensor, least: float) -> Tensor:
    """E[max(x - least, 0)] of a normal x."""
    distance = mean - least
    ratio = distance / deviation.clamp(min=torch.finfo(torch.float64).tiny)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return distance * torch.special.ndtr(ratio) + deviation * density


__all__ = ["correct_bias_"]
