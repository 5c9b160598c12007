"""Quantized models: ``fastnn.quant.quantize_(model, Int8Dynamic())`` and its kin. See docs/quantization.md."""

from .config import Config, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from .modules import (
    Int8DynamicLinear,
    Int8StaticLinear,
    Quantized,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    WeightOnlyLinear,
)
from .observers import MSE, MinMax, MovingAverage, Observer, Percentile
from .quantize import dequantize_, quantize_

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
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Quantized",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "WeightOnlyLinear",
    "dequantize_",
    "quantize_",
]
