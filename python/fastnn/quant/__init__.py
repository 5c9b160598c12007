"""Quantized models: ``fastnn.quant.quantize_(model, Int8Dynamic())`` and its kin. See docs/quantization.md."""

from .adaround import round_weights
from .bias_correction import correct_bias_
from .config import Config, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from .conv import QuantizedConv
from .equalization import equalize_
from .interop import from_torch_
from .modules import (
    Int8DynamicLinear,
    Int8StaticLinear,
    Quantized,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    WeightOnlyLinear,
)
from .observers import MSE, MinMax, MovingAverage, Observer, Percentile
from .pruning import prunable_channels, prune_channels_, prune_magnitude_, remove_masks_
from .qat import QuantizationAware, convert_qat_, prepare_qat_
from .quantize import dequantize_, quantize_
from .report import LayerReport, QuantReport, report
from .weight_only_conv import WeightOnlyConv

__all__ = [
    "MSE",
    "Config",
    "Float8WeightOnly",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8DynamicLinear",
    "Int8Static",
    "Int8StaticLinear",
    "Int8WeightOnly",
    "LayerReport",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "QuantReport",
    "QuantizationAware",
    "Quantized",
    "QuantizedConv",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "WeightOnlyConv",
    "WeightOnlyLinear",
    "convert_qat_",
    "correct_bias_",
    "dequantize_",
    "equalize_",
    "from_torch_",
    "prepare_qat_",
    "prunable_channels",
    "prune_channels_",
    "prune_magnitude_",
    "quantize_",
    "remove_masks_",
    "report",
    "round_weights",
]
