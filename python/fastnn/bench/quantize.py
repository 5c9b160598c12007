"""Quantization of M×N numbers to int8 and back: what is read and written, in bytes.

torch's own functions write into quantized tensors; their integers are looked at where they lie. Groups, dynamic scales and
stochastic rounding torch has as expressions only: those that torchao and torch.ao compute, with a product by the inverse of
the scale, so that the integers are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastnn

from .benchmark import Benchmark, Problem, register

#: Two draws of stochastic rounding differ by about 0.6 of a step, and the numbers are some 40 steps.
_APART = 0.1


def _integers(quantized: Tensor) -> Tensor:
    """The bytes of torch's quantized tensor; its own int_repr() copies them."""
    place = torch.empty(0, dtype=torch.int8)
    return place.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """torch's quantized tensor, without its warning, once a process, that there will be none one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if axis is None:
            return torch.quantize_per_tensor(x, scale.item(), zero_point.item(), torch.qint8)
        return torch.quantize_per_channel(x, scale, zero_point, axis, torch.qint8)


def _to_int8(y: Tensor) -> Tensor:
    return y.round().clamp(-128, 127).to(torch.int8)


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 0.02


def _problem(
    inputs: Callable[[], tuple[Any, ...]], contestants: dict[str, Callable[..., Any]], moved: float, **options: Any
) -> Problem:
    return Problem(inputs, contestants, moved, unit="B", peak="copy", **options)


def _per_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    scale, zero_point = torch.tensor(0.025), torch.tensor(0)
    contestants = {
        "fastnn": lambda x: fastnn.quantize(x, scale, dtype=torch.int8),
        "torch": lambda x: _integers(_quantized(x, scale, zero_point, None)),
    }
    return _problem(lambda: (torch.randn(shape),), contestants, 5.0 * shape[0] * shape[1])


def _per_channel(axis: int) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        def inputs() -> tuple[Any, ...]:
            # torch adds zero points before it rounds; with others a few integers in a million are not the same.
            zero_point = torch.zeros(shape[axis], dtype=torch.int32)
            return torch.randn(shape), _scales(shape[axis]), zero_point

        contestants = {
            "fastnn": lambda x, scale, zero: fastnn.quantize(x, scale, zero, dtype=torch.int8, axis=axis),
            "torch": lambda x, scale, zero: _integers(_quantized(x, scale, zero, axis)),
        }
        return _problem(inputs, contestants, 5.0 * shape[0] * shape[1])

    return build


def _groups(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, size = shape

    def expression(x: Tensor, scale: Tensor) -> Tensor:
        return _to_int8(x.view(m, -1, size) * (1.0 / scale).unsqueeze(-1)).view(m, n)

    contestants = {
        "fastnn": lambda x, scale: fastnn.quantize(x, scale, dtype=torch.int8, group_size=size),
        "torch": expression,
    }
    return _problem(lambda: (torch.randn(m, n), _scales(m, n // size)), contestants, 5.0 * m * n)


def _per_token(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    def expression(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1) / 127
        return _to_int8(x * (1.0 / scale).unsqueeze(-1)), scale

    contestants = {"fastnn": lambda x: fastnn.quantize_dynamic(x, axis=0)[:2], "torch": expression}
    return _problem(lambda: (torch.randn(shape),), contestants, 5.0 * shape[0] * shape[1])


def _stochastic(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    scale = torch.tensor(0.025)

    def expression(x: Tensor) -> Tensor:
        y = x * (1.0 / scale)
        low = y.floor()
        return (low + (torch.rand_like(y) < y - low)).clamp(-128, 127).to(torch.int8)

    contestants = {
        "fastnn": lambda x: fastnn.quantize(x, scale, dtype=torch.int8, rounding="stochastic"),
        "torch": expression,
    }
    return _problem(lambda: (torch.randn(shape),), contestants, 5.0 * shape[0] * shape[1], tolerance=_APART)


def _dequantize(axis: int | None) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        size = () if axis is None else shape[axis : axis + 1]

        def inputs() -> tuple[Any, ...]:
            scale, zero_point = _scales(*size), torch.randint(-10, 10, size, dtype=torch.int32)
            theirs = _quantized(torch.randn(shape), scale, zero_point, axis)
            return _integers(theirs).clone(), scale, zero_point, theirs

        def along(parameter: Tensor) -> Tensor:
            return parameter.unsqueeze(-1) if axis == 0 else parameter

        contestants = {
            "fastnn": lambda q, scale, zero, theirs: fastnn.dequantize(q, scale, zero, axis=axis),
            "torch": lambda q, scale, zero, theirs: theirs.dequantize(),
            "torch expression": lambda q, scale, zero, theirs: (q.to(torch.float32) - along(zero)) * along(scale),
        }
        return _problem(inputs, contestants, 5.0 * shape[0] * shape[1])

    return build


_SIZE = ((4096, 4096),)
_ONLY = (torch.float32,)
register(Benchmark("quantize", "MxN", _SIZE, _per_tensor, _ONLY))
register(Benchmark("quantize_groups", "MxNxG", ((4096, 4096, 128),), _groups, _ONLY))
register(Benchmark("quantize_per_token_dynamic", "MxN", _SIZE, _per_token, _ONLY))
register(Benchmark("quantize_stochastic", "MxN", _SIZE, _stochastic, _ONLY))
register(Benchmark("dequantize", "MxN", _SIZE, _dequantize(None), _ONLY))
for _axis in (0, 1):
    register(Benchmark(f"quantize_per_channel_{_axis}", "MxN", _SIZE, _per_channel(_axis), _ONLY))
    register(Benchmark(f"dequantize_per_channel_{_axis}", "MxN", _SIZE, _dequantize(_axis), _ONLY))
