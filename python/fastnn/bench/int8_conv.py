"""Convolutions of 8-bit images, with relu, from uint8 to uint8, as they follow each other in a quantized network: N
(images) × C (channels) × H × W × M (filters) × K (the edge of a filter) × S (the stride), with a padding of K/2;
2·N·M·C·K²·positions operations.

Both have the channels as neighbours and their filters laid out beforehand. torch runs its own int8 convolutions, by both of its
engines that x86 has. (Inside the op a call of :func:`fastnn.functional.int8_conv2d` lays the filters out each time.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastnn.quant.conv import QuantizedConv, Step

from .benchmark import Benchmark, Problem, register
from .int8_linear import ENGINES

#: torch's engines round their scales each in their own way; an integer here and there is the next one.
_APART = 0.01


def _torch(
    engine: str, weight: Tensor, scale: Tensor, bias: Tensor, stride: int, padding: int, output: tuple[float, int]
) -> Callable[[Tensor], Tensor]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        filters, channels, edge, _ = weight.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is to move to torchao
            layer = torch.ao.nn.intrinsic.quantized.ConvReLU2d(channels, filters, edge, stride, padding)
            zeros = torch.zeros(filters, dtype=torch.int64)
            layer.set_weight_bias(
                torch.quantize_per_channel(weight * scale.view(-1, 1, 1, 1), scale, zeros, 0, torch.qint8), bias
            )
    finally:
        torch.backends.quantized.engine = before
    layer.scale, layer.zero_point = output
    return lambda q: layer(q).int_repr()


def _build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    n, c, h, w, m, k, s = shape
    weight = torch.randint(-127, 128, (m, c, k, k), dtype=torch.int8)
    # The filters' largest values decide torch's scales, which it is given as numbers.
    scale, bias = torch.rand(m) * 0.005 + 0.005, torch.randn(m)
    x_scale, x_zero = 0.03, 117
    # Results of a few deviations, about half of which relu cuts off.
    y_scale, y_zero = x_scale * 0.0075 * 73 * 74 * (c * k * k) ** 0.5 * 3 / 255, 0
    conv = QuantizedConv(
        *(weight, scale, bias, torch.tensor(x_scale), torch.tensor(x_zero, dtype=torch.int32)),
        *(torch.tensor(y_scale), torch.tensor(y_zero, dtype=torch.int32)),
        **dict(stride=(s, s), padding=(k // 2, k // 2), dilation=(1, 1), groups=1),
    )
    step = Step(conv, "relu", torch.uint8, None)
    layers = {
        f"torch {engine}": _torch(engine, weight, scale, bias, s, k // 2, (y_scale, y_zero))
        for engine in ENGINES
        if engine in torch.backends.quantized.supported_engines
    }

    def inputs() -> tuple[Tensor, Tensor]:
        numbers = torch.randn(n, c, h, w).to(memory_format=torch.channels_last)
        quantized = torch.quantize_per_tensor(numbers, x_scale, x_zero, torch.quint8)
        return quantized.int_repr(), quantized

    contestants = {"fastnn": lambda q, theirs: step(q)}
    contestants |= {name: lambda q, theirs, layer=layer: layer(theirs) for name, layer in layers.items()}
    positions = ((h + 2 * (k // 2) - k) // s + 1) * ((w + 2 * (k // 2) - k) // s + 1)
    return Problem(inputs, contestants, 2.0 * n * m * c * k * k * positions, unit="OP", peak="int8", tolerance=_APART)


#: Of ResNet-50.
_SHAPES = (
    (1, 64, 56, 56, 64, 3, 1),
    (1, 256, 14, 14, 1024, 1, 1),
    (1, 512, 28, 28, 256, 1, 2),
    (8, 256, 14, 14, 256, 3, 1),
)
register(Benchmark("int8_conv", "NxCxHxWxMxKxS", _SHAPES, _build, dtypes=(torch.uint8,)))
