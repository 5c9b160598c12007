"""Linear layers in int8, dynamic: M×N×K, rows by outputs by inputs; 2·M·N·K operations.

float32 layers run against torch's own int8 layers: dynamic, by both of its engines that x86 has, and static, which
quantizes its input and dequantizes its result. bfloat16 layers run against torch's in bfloat16. All weights are packed
beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

import fastnn

from .benchmark import Benchmark, Problem, register

#: One scale for all of the input, and seven bits of eight in one engine, lose a few percent of what 8 bits lose anyway.
_APART = 0.06
ENGINES = ("x86", "onednn")

Call = Callable[[torch.Tensor], torch.Tensor]


def _quantized(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in int8, symmetric by rows, and its scales."""
    weight = layer.weight.detach().float()
    scale = weight.abs().amax(1) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def _fastnn(layer: torch.nn.Linear) -> Call:
    weight, scale = _quantized(layer)
    bias, packed = layer.bias.detach(), fastnn.functional.pack_int8_weight(weight)
    return lambda x: fastnn.functional.int8_linear(x, weight, scale, bias, packed=packed)


def _dynamic(layer: torch.nn.Linear) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move to torchao
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)
    return model[0]


def _static(layer: torch.nn.Linear) -> Call:
    """Of a standard normal input, with a range of four of its deviations each way."""
    weight, scale = _quantized(layer)
    made = torch.ao.nn.quantized.Linear(layer.in_features, layer.out_features)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    made.set_weight_bias(
        torch.quantize_per_channel(weight * scale.unsqueeze(1), scale, zeros, 0, torch.qint8), layer.bias.detach()
    )
    made.scale, made.zero_point = 4 * 0.6 / 128, 128  # the outputs of torch's initial weights deviate by 0.6
    return lambda x: made(torch.quantize_per_tensor(x, 4 / 128, 128, torch.quint8)).dequantize()


def _peers(layer: torch.nn.Linear) -> dict[str, Call]:
    before = torch.backends.quantized.engine
    peers: dict[str, Call] = {}
    try:
        for engine in ENGINES:
            if engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                peers[f"torch dynamic {engine}"] = _dynamic(layer)
                peers[f"torch static {engine}"] = _static(layer)
    finally:
        torch.backends.quantized.engine = before
    return peers


def _inference(call: Call) -> Call:
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return call(x)

    return run


def _build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, k = shape
    layer = torch.nn.Linear(k, n, dtype=dtype)
    peers: dict[str, Any] = {"torch": layer} if dtype is torch.bfloat16 else _peers(layer)
    return Problem(
        inputs=lambda: (torch.randn(m, k).to(dtype),),
        contestants={name: _inference(call) for name, call in {"fastnn": _fastnn(layer), **peers}.items()},
        work=2.0 * m * n * k,
        unit="OP",
        peak="int8",
        tolerance=_APART,
    )


_SHAPES = ((1, 4096, 1024), (16, 4096, 1024), (128, 4096, 1024), (1024, 4096, 1024), (1, 64, 64))
register(Benchmark("int8_linear", "MxNxK", _SHAPES, _build, dtypes=(torch.float32, torch.bfloat16)))
