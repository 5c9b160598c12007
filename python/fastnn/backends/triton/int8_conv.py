"""Convolutions of 8-bit images, to the CPU's bits: the implicit product of conv.py, of integers.

Tensor cores multiply s8 by s8: unsigned images are taken less 128. What lies around an image is its zero point, so that
what that has added is, everywhere, the zero point times the sum of a filter. Groups of few channels, depthwise ones
among them, which would fill tiles with zeros, are multiplied one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import _int8_conv
from .._conv import five, three
from ..reference.quantize import RANGE
from ._launch import ceil_div, launch
from .conv import place, tile_of
from .int8_linear import row_sums


@triton.jit
def pixel_of(n, d, h, w, strides):
    at = n.to(tl.int64) * strides[0] + d.to(tl.int64) * strides[2]
    return at + h.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]


@triton.jit
def see(d, h, w, tap, taps, sizes, stride, padding, dilation):
    """Of a position in the result: the pixel that the tap meets, along each axis, and whether it is one."""
    _, i, j, k = place(tap, taps)
    x0 = d * stride[0] - padding[0] + i * dilation[0]
    x1 = h * stride[1] - padding[1] + j * dilation[1]
    x2 = w * stride[2] - padding[2] + k * dilation[2]
    inside = (x0 >= 0) & (x0 < sizes[0]) & (x1 >= 0) & (x1 < sizes[1]) & (x2 >= 0) & (x2 < sizes[2])
    return x0, x1, x2, inside


@triton.jit
def tap_at(tap, taps, strides):
    _, i, j, k = place(tap, taps)
    return i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3] + k.to(tl.int64) * strides[4]


@triton.jit
def finish(
    sums,
    out,
    element,
    stored,
    filter,
    exists,
    numbers,
    ACTIVATION: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """The rest of the formula in ops/int8_conv.py, each step rounded, of exact sums (pixels, filters)."""
    bias, x_scale, w_scale, w_scale_step, y_scale, y_zero, residual, residual_scale, residual_zero = numbers
    inverse = tl.zeros((1, 1), tl.float32) + 1.0
    if y_scale is not None:
        inverse = tl.div_rn(inverse, tl.load(y_scale) + tl.zeros((1, 1), tl.float32))
    by = tl.load(x_scale) * tl.load(w_scale + filter * w_scale_step, mask=exists, other=0.0)
    v = sums.to(tl.float32) * (by[None, :] * inverse)
    if bias is not None:
        v += tl.load(bias + filter, mask=exists, other=0.0)[None, :] * inverse
    if residual is not None:
        difference = tl.load(residual + element, mask=stored, other=0).to(tl.int32) - tl.load(residual_zero)
        v += difference.to(tl.float32) * (tl.load(residual_scale) * inverse)
    # Comparisons that leave NaN as it is.
    if ACTIVATION != "none":
        v = tl.where(v < 0, 0.0, v)
    if ACTIVATION == "relu6":
        v = tl.where(v > 6 * inverse, 6 * inverse, v)
    if y_zero is not None:
        zero = tl.load(y_zero).to(tl.float32)
        v = tl.where(v != v, 0.0, tl.minimum(tl.maximum(v, LEAST - zero), MOST - zero))
        v = ((v + 12582912.0) - 12582912.0 + zero).to(tl.int32)
    tl.store(out + element, v.to(out.dtype.element_ty), mask=stored)


@triton.jit
def tiles(
    image,
    filters,
    filter_sums,
    out,
    x_zero,
    numbers,  # of finish
    images,
    channels,  # of a group in the image, and in the result
    columns,
    image_size,
    image_strides,
    filter_strides,
    out_size,
    out_strides,
    taps,
    stride,
    padding,
    dilation,
    ACTIVATION: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = images * out_size[0] * out_size[1] * out_size[2]
    column_tiles = tl.cdiv(columns, BLOCK_N)
    count = tl.cdiv(rows, BLOCK_M) * column_tiles
    tile = tl.program_id(0) % count
    group = (tl.program_id(0) // count).to(tl.int64)
    row = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_inside = row < rows
    column_inside = column < columns
    n, d, h, w = place(row, out_size)
    filter = group * columns + column
    image += group * channels * image_strides[1]
    of_filter = filters + filter * filter_strides[0]
    zero = tl.load(x_zero)
    around = zero.to(image.dtype.element_ty)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    # Taps and channels are one loop, of which the next steps' loads are under way.
    blocks = tl.cdiv(channels, BLOCK_K)
    for i in range(taps[0] * taps[1] * taps[2] * blocks):
        tap = i // blocks
        channel = (i % blocks * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        there = channel < channels
        x0, x1, x2, inside = see(d, h, w, tap, taps, image_size, stride, padding, dilation)
        pixel = image + pixel_of(n, x0, x1, x2, image_strides)
        of_tap = of_filter + tap_at(tap, taps, filter_strides)
        x = tl.load(
            pixel[:, None] + channel[None, :] * image_strides[1],
            mask=(row_inside & inside)[:, None] & there[None, :],
            other=around,
        )
        y = tl.load(
            of_tap[None, :] + channel[:, None] * filter_strides[1],
            mask=column_inside[None, :] & there[:, None],
            other=0,
        )
        if image.dtype.element_ty == tl.uint8:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(x, y, sums, out_dtype=tl.int32)
    if image.dtype.element_ty == tl.uint8:
        zero -= 128
    sums -= zero * tl.load(filter_sums + filter, mask=column_inside, other=0)[None, :]
    element = pixel_of(n, d, h, w, out_strides)[:, None] + filter[None, :] * out_strides[1]
    stored = row_inside[:, None] & column_inside[None, :]
    finish(sums, out, element, stored, filter, column_inside, numbers, ACTIVATION, LEAST, MOST)


@triton.jit
def direct(
    image,
    filters,
    out,
    x_zero,
    numbers,  # of finish
    images,
    channels,
    columns,
    groups,
    image_size,
    image_strides,
    filter_strides,
    out_size,
    out_strides,
    taps,
    stride,
    padding,
    dilation,
    ACTIVATION: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of all groups: neighbours have neighbouring filters of a pixel."""
    rows = images * out_size[0] * out_size[1] * out_size[2]
    column_tiles = tl.cdiv(groups * columns, BLOCK_N)
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    filter = (tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_inside = row < rows
    column_inside = filter < groups * columns
    n, d, h, w = place(row, out_size)
    of_group = image + filter // columns * channels * image_strides[1]
    of_filter = filters + filter * filter_strides[0]
    zero = tl.load(x_zero)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(taps[0] * taps[1] * taps[2]):
        x0, x1, x2, inside = see(d, h, w, tap, taps, image_size, stride, padding, dilation)
        inside = (row_inside & inside)[:, None] & column_inside[None, :]
        pixel = of_group[None, :] + pixel_of(n, x0, x1, x2, image_strides)[:, None]
        of_tap = of_filter + tap_at(tap, taps, filter_strides)
        for _ in range(channels):
            x = tl.load(pixel, mask=inside, other=0).to(tl.int32)
            y = tl.load(of_tap, mask=column_inside, other=0).to(tl.int32)
            sums += tl.where(inside, (x - zero) * y[None, :], 0)
            pixel += image_strides[1]
            of_tap += filter_strides[1]
    element = pixel_of(n, d, h, w, out_strides)[:, None] + filter[None, :] * out_strides[1]
    stored = row_inside[:, None] & column_inside[None, :]
    finish(sums, out, element, stored, filter, column_inside, numbers, ACTIVATION, LEAST, MOST)


#: Channels of a group, below which there are no tiles.
_FEW = 8
#: Pixels and filters of a program then, and its warps.
_DIRECT = (64, 64, 16)
_LEAST_K, _MOST_K = 32, 128
_MOST_PIXELS = 2**31


def _convolve(
    y: Tensor,
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
) -> None:
    if max(t.shape[0] * math.prod(t.shape[2:]) for t in (input, y)) >= _MOST_PIXELS:
        raise ValueError(f"int8_conv: input: expected fewer than 2^31 pixels, got {tuple(input.shape)}")
    channels, columns = weight.shape[1], weight.shape[0] // groups
    pixels = y.shape[0] * math.prod(y.shape[2:])
    numbers = (
        *(bias, input_scale, weight_scale, int(weight_scale.numel() > 1), output_scale, output_zero_point),
        *(residual, residual_scale, residual_zero_point),
    )
    lies = (
        *(five(input.shape)[2:], five(input.stride()), five(weight.stride()), five(y.shape)[2:], five(y.stride())),
        *(five(weight.shape)[2:], three(stride, 1), three(padding[: input.dim() - 2], 0), three(dilation, 1)),
    )
    least, most = RANGE.get(str(y.dtype).removeprefix("torch."), (0, 0))
    constants = dict(ACTIVATION=activation, LEAST=float(least), MOST=float(most), enable_fp_fusion=False)
    if groups > 1 and channels < _FEW:
        rows, width, warps = _DIRECT
        launch(
            direct,
            ceil_div(pixels, rows) * ceil_div(weight.shape[0], width),
            y,
            input,
            weight,
            y,
            input_zero_point,
            numbers,
            input.shape[0],
            channels,
            columns,
            groups,
            *lies,
            BLOCK_M=rows,
            BLOCK_N=width,
            num_warps=warps,
            **constants,
        )
        return
    rows, width, warps, stages = tile_of(pixels, columns, groups, 0)
    launch(
        tiles,
        ceil_div(pixels, rows) * ceil_div(columns, width) * groups,
        y,
        input,
        weight,
        row_sums(weight),
        y,
        input_zero_point,
        numbers,
        input.shape[0],
        channels,
        columns,
        *lies,
        BLOCK_M=rows,
        BLOCK_N=width,
        BLOCK_K=min(max(triton.next_power_of_2(channels), _LEAST_K), _MOST_K),
        num_warps=warps,
        num_stages=stages,
        **constants,
    )


int8_conv = functools.partial(_int8_conv.int8_conv, _convolve)
