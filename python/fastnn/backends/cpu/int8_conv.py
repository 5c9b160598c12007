"""The convolution of 8-bit images on CPU tensors: x (N, C, *spatial) uint8 or int8, w (M, C / groups, *kernel) int8, 1 to 3
spatial dimensions, any strides; images whose channels are not neighbours are copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from .._conv import five, three
from .._tensors import channels_last_strides
from ..reference import int8_conv as formulas
from ..reference.quantize import RANGE
from . import DTYPE, empty_channels, empty_strided

_SIGN = 128


@dataclass(frozen=True, slots=True)
class Requantization:
    """How sums become elements of the result: see src/cpp/quant/requantize.hpp."""

    start: Tensor
    scale: Tensor
    shift: Tensor
    low: float
    high: float
    zero: int
    outside: int
    inverse: float


def requantization(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor | None,
    output_zero_point: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    of_signed: bool,
) -> Requantization:
    """Of uint8 images; ``of_signed``: of int8 ones, which become uint8 by adding 128."""
    scale, shift, inverse = formulas.columns(weight_scale, bias, input_scale, output_scale, weight.shape[0])
    outside = int(input_zero_point) + (_SIGN if of_signed else 0)
    start = weight.sum(tuple(range(1, weight.dim())), dtype=torch.int32) * -outside
    low = 0.0 if activation != "none" else -math.inf
    high = float(6 * inverse) if activation == "relu6" else math.inf
    zero = 0
    if not dtype.is_floating_point:
        least, most = RANGE[str(dtype).removeprefix("torch.")]
        zero = int(output_zero_point)
        low, high = max(low, least - zero), min(high, most - zero)
    return Requantization(
        start.contiguous(), scale.contiguous(), shift.contiguous(), low, high, zero, outside, float(inverse)
    )


def int8_conv(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor | None,
    output_zero_point: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    formulas.check(input, weight_scale, input_scale, input_zero_point, output_scale, output_zero_point, dtype)
    how = requantization(
        *(weight, weight_scale, bias, input_scale, input_zero_point, output_scale, output_zero_point),
        *(activation, dtype, input.dtype is torch.int8),
    )
    added = (None, 0.0, 0)
    if residual is not None:
        formulas.check_residual(residual, residual_scale, residual_zero_point)
        scale = float(residual_scale.to(torch.float32) * torch.tensor(how.inverse))
        added = (residual, scale, int(residual_zero_point))
    if input.dtype is torch.int8:
        input = input.view(torch.uint8) ^ _SIGN
    return convolve(input, weight, how, *added, stride, padding, dilation, groups, dtype)


def convolve(
    x: Tensor,
    w: Tensor,
    how: Requantization,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """Of uint8 images; ``residual_scale`` is its own by ``how.inverse``."""
    return Convolution(w, how, stride, padding, dilation, groups, dtype, residual_scale, residual_zero, None)(
        x, residual
    )


class Convolution:
    """The same with the same filters, called again and again: what depends on the input's layout alone is found once."""

    __slots__ = ("_after", "_calls", "_how", "_options", "_w", "dtype", "prepared", "residual")

    #: Layouts remembered.
    MOST = 16

    def __init__(
        self,
        w: Tensor,
        how: Requantization,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        dtype: torch.dtype,
        residual_scale: float,
        residual_zero: int,
        prepared: _cpu.Prepared | None,
    ) -> None:
        """``prepared`` is of this very w, which does not change."""
        self._w = w
        self._how = how
        self._options = tuple(stride), tuple(padding), tuple(dilation), groups
        self.residual = residual_scale, residual_zero
        self.prepared = prepared
        self._calls: dict[Any, tuple[Any, ...]] = {}
        self.dtype = dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual`` broadcasts to the result's shape."""
        x = channels_last(x)
        key = x.shape, x.stride()
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= self.MOST:
                self._calls.clear()
            found = self._calls[key] = self.arguments(x)
        shape, strides, before, between = found
        y = empty_strided(shape, strides, self.dtype)
        if residual is None:
            _int8_conv(x.data_ptr(), *before, y.data_ptr(), *between, 0, 5, 0.0, 0, self.prepared)
            return y
        if residual.shape != shape or residual.stride() != strides:
            residual = torch.empty_strided(shape, strides, dtype=residual.dtype).copy_(residual.expand(shape))
        code = DTYPE[residual.dtype]
        _int8_conv(
            x.data_ptr(), *before, y.data_ptr(), *between, residual.data_ptr(), code, *self.residual, self.prepared
        )
        return y

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """The result's shape and strides, and what the kernel is told between and behind the addresses of x and of the
        result."""
        w, how = self._w, self._how
        stride, padding, dilation, groups = self._options
        shape = (x.shape[0], w.shape[0], *formulas.output_size(x.shape[2:], w.shape[2:], stride, padding, dilation))
        strides = channels_last_strides(shape)
        begin, end = padding[: x.dim() - 2], padding[2 - x.dim() :]
        filters = w.data_ptr(), five(w.shape, 1), five(w.stride(), 1)
        before = (five(x.shape, 1), five(x.stride(), 1), *filters)
        between = (
            *(five(shape, 1), five(strides, 1), DTYPE[self.dtype]),
            *(three(stride, 1), (*three(begin, 0), *three(end, 0)), three(dilation, 1), groups, how.outside),
            *(how.start.data_ptr(), how.scale.data_ptr(), how.shift.data_ptr(), how.low, how.high, how.zero),
        )
        return shape, strides, before, between


_int8_conv = _cpu.int8_conv


def max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The maxima of windows of a uint8 image (N, C, H, W) with the channels as neighbours and no gaps."""
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    y = empty_channels((*x.shape[:2], *size), x.dtype, True)
    _cpu.int8_max_pool(
        x.data_ptr(), tuple(x.shape), y.data_ptr(), tuple(size), tuple(kernel), tuple(stride), tuple(padding)
    )
    return y


def channels_last(x: Tensor) -> Tensor:
    """Images as the kernels read them."""
    if x.shape[1] == 1 or x.stride(1) == 1:
        return x
    return torch.empty_strided(x.shape, channels_last_strides(x.shape), dtype=x.dtype).copy_(x)
