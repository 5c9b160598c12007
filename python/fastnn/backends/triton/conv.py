"""Convolutions as matrix products that lie nowhere: rows are the pixels of the result, columns its channels, and K runs over
the taps of a filter and, of each, the channels. See backends._conv for the tensors, and src/cuda/conv/ for the same in CUDA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._conv import Convolutions, five, three
from ..codes import precision
from ._launch import ceil_div, launch
from .elementwise import activate
from .gemm import multiply_parts
from .reduce import column_sum


@triton.jit
def place(index, sizes):
    """The pixel of that number: (image, and along each axis)."""
    w = index % sizes[2]
    index = index // sizes[2]
    h = index % sizes[1]
    index = index // sizes[1]
    return index // sizes[0], index % sizes[0], h, w


@triton.jit
def add_products(sums, x, y, PARTS: tl.constexpr):
    if PARTS > 0:
        return multiply_parts(sums, x, y, PARTS)
    else:
        return tl.dot(x, y, sums)


@triton.jit
def implicit(
    image,
    filters,
    out,
    residual,
    bias,
    images,
    channels,  # of a group in the image, and in the result
    columns,
    image_size,
    image_strides,
    filter_strides,  # of the result's channels, the image's channels and the taps
    filter_group,  # from a group's filters to the next one's
    out_strides,
    positions,  # along each axis: position j meets, with tap i, pixel first + j * stride + i * step,
    first,
    stride,
    step,
    taps,  # which is filter tap tap_first + i * tap_step; it is pixel out_first + j * out_step of the result
    tap_first,
    tap_step,
    out_first,
    out_step,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = images * positions[0] * positions[1] * positions[2]
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * column_tiles
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_inside = row < rows
    column_inside = column < columns
    n, d, h, w = place(row, positions)
    d0 = first[0] + d * stride[0]
    h0 = first[1] + h * stride[1]
    w0 = first[2] + w * stride[2]
    image += group * channels * image_strides[1]
    seen = image + n.to(tl.int64) * image_strides[0]
    filters += group * filter_group
    of_column = filters + column * filter_strides[0]

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(taps[0] * taps[1] * taps[2]):
        _, i, j, k = place(tap, taps)
        x0 = d0 + i * step[0]
        x1 = h0 + j * step[1]
        x2 = w0 + k * step[2]
        inside = row_inside & (x0 >= 0) & (x0 < image_size[0]) & (x1 >= 0) & (x1 < image_size[1])
        inside = inside & (x2 >= 0) & (x2 < image_size[2])
        pixel = seen + x0.to(tl.int64) * image_strides[2] + x1.to(tl.int64) * image_strides[3]
        pixel += x2.to(tl.int64) * image_strides[4]
        of_tap = of_column + (tap_first[0] + i * tap_step[0]).to(tl.int64) * filter_strides[2]
        of_tap += (tap_first[1] + j * tap_step[1]).to(tl.int64) * filter_strides[3]
        of_tap += (tap_first[2] + k * tap_step[2]).to(tl.int64) * filter_strides[4]
        group_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if PARTS > 0 else sums
        for at in range(0, channels, BLOCK_K):
            channel = (at + tl.arange(0, BLOCK_K)).to(tl.int64)
            there = channel < channels
            x = tl.load(
                pixel[:, None] + channel[None, :] * image_strides[1], mask=inside[:, None] & there[None, :], other=0.0
            )
            y = tl.load(
                of_tap[None, :] + channel[:, None] * filter_strides[1],
                mask=column_inside[None, :] & there[:, None],
                other=0.0,
            )
            group_sums = add_products(group_sums, x, y, PARTS)
        sums = sums + group_sums if PARTS > 0 else group_sums
    if PARTS > 0:
        # Not finite: as float32 has it, without tensor cores (see gemm.py).
        finite = (tl.abs(sums) < float("inf")).to(tl.int32)
        if tl.min(tl.min(finite, 1), 0) == 0:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for at in range(taps[0] * taps[1] * taps[2] * channels):
                _, i, j, k = place(at // channels, taps)
                channel = (at % channels).to(tl.int64)
                x0 = d0 + i * step[0]
                x1 = h0 + j * step[1]
                x2 = w0 + k * step[2]
                inside = row_inside & (x0 >= 0) & (x0 < image_size[0]) & (x1 >= 0) & (x1 < image_size[1])
                inside = inside & (x2 >= 0) & (x2 < image_size[2])
                pixel = seen + x0.to(tl.int64) * image_strides[2] + x1.to(tl.int64) * image_strides[3]
                pixel += x2.to(tl.int64) * image_strides[4] + channel * image_strides[1]
                of_tap = of_column + (tap_first[0] + i * tap_step[0]).to(tl.int64) * filter_strides[2]
                of_tap += (tap_first[1] + j * tap_step[1]).to(tl.int64) * filter_strides[3]
                of_tap += (tap_first[2] + k * tap_step[2]).to(tl.int64) * filter_strides[4]
                x = tl.load(pixel, mask=inside, other=0.0)
                y = tl.load(of_tap + channel * filter_strides[1], mask=column_inside, other=0.0)
                # Outside of the image nothing is added, not even 0 times infinity.
                sums += tl.where(inside[:, None], x[:, None] * y[None, :], 0.0)

    whole = group * columns + column
    to = n.to(tl.int64) * out_strides[0] + (out_first[0] + d * out_step[0]).to(tl.int64) * out_strides[2]
    to += (out_first[1] + h * out_step[1]).to(tl.int64) * out_strides[3]
    to += (out_first[2] + w * out_step[2]).to(tl.int64) * out_strides[4]
    element = to[:, None] + whole[None, :] * out_strides[1]
    stored = row_inside[:, None] & column_inside[None, :]
    if bias is not None:
        sums += tl.load(bias + whole, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        sums += tl.load(residual + element, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + element, activate(sums, ACTIVATION).to(out.dtype.element_ty), mask=stored)


@triton.jit
def weight_gradient(
    x,
    y,
    partial,  # [split][channel of y][tap][channel of x of its group]
    rows,  # channels of y, and of x, in a group
    columns,
    groups,
    pixels,  # of y, in all images
    piece,  # how many of them are summed by a program
    x_size,
    x_strides,
    y_size,
    y_strides,
    kernel,
    stride,
    padding,
    dilation,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * column_tiles
    taps = kernel[0] * kernel[1] * kernel[2]
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    tap = rest % taps
    rest = rest // taps
    group = (rest % groups).to(tl.int64)
    split = (rest // groups).to(tl.int64)
    row = (tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_inside = row < rows
    column_inside = column < columns
    _, i, j, k = place(tap, kernel)
    x_column = x + (group * columns + column) * x_strides[1]
    y_row = y + (group * rows + row) * y_strides[1]

    first = (split * piece).to(tl.int32)
    end = tl.minimum(first + piece, pixels)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(first, end, BLOCK_K):
        index = at + tl.arange(0, BLOCK_K)
        there = index < end
        n, d, h, w = place(index, y_size)
        x0 = d * stride[0] - padding[0] + i * dilation[0]
        x1 = h * stride[1] - padding[1] + j * dilation[1]
        x2 = w * stride[2] - padding[2] + k * dilation[2]
        inside = there & (x0 >= 0) & (x0 < x_size[0]) & (x1 >= 0) & (x1 < x_size[1]) & (x2 >= 0) & (x2 < x_size[2])
        image = n.to(tl.int64)
        y_pixel = image * y_strides[0] + d.to(tl.int64) * y_strides[2] + h.to(tl.int64) * y_strides[3]
        y_pixel += w.to(tl.int64) * y_strides[4]
        x_pixel = image * x_strides[0] + x0.to(tl.int64) * x_strides[2] + x1.to(tl.int64) * x_strides[3]
        x_pixel += x2.to(tl.int64) * x_strides[4]
        # Pixels outside of x are left out of both: 0 times infinity is no number.
        left = tl.load(y_row[:, None] + y_pixel[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_column[None, :] + x_pixel[:, None], mask=column_inside[None, :] & inside[:, None], other=0.0)
        sums = add_products(sums, left, right, PARTS)
    if PARTS > 0:
        finite = (tl.abs(sums) < float("inf")).to(tl.int32)
        if tl.min(tl.min(finite, 1), 0) == 0:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for index in range(first, end):
                n, d, h, w = place(index, y_size)
                x0 = d * stride[0] - padding[0] + i * dilation[0]
                x1 = h * stride[1] - padding[1] + j * dilation[1]
                x2 = w * stride[2] - padding[2] + k * dilation[2]
                inside = (x0 >= 0) & (x0 < x_size[0]) & (x1 >= 0) & (x1 < x_size[1]) & (x2 >= 0) & (x2 < x_size[2])
                image = n.to(tl.int64)
                y_pixel = image * y_strides[0] + d.to(tl.int64) * y_strides[2] + h.to(tl.int64) * y_strides[3]
                y_pixel += w.to(tl.int64) * y_strides[4]
                x_pixel = image * x_strides[0] + x0.to(tl.int64) * x_strides[2] + x1.to(tl.int64) * x_strides[3]
                x_pixel += x2.to(tl.int64) * x_strides[4]
                left = tl.load(y_row + y_pixel, mask=row_inside & inside, other=0.0)
                right = tl.load(x_column + x_pixel, mask=column_inside & inside, other=0.0)
                sums += left[:, None] * right[None, :]
    line = (split * groups * rows + group * rows + row) * taps + tap
    to = partial + line[:, None] * columns + column[None, :]
    tl.store(to, sums.to(partial.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


# (rows, columns, warps, stages), as of matrix products.
_LARGE, _LARGE_PARTS, _SMALL = (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 4)
_ENOUGH_TILES = 128
_BLOCK_K = 32
#: Programs that are worth dividing the sums of a weight for, and the fewest pixels of a program then.
_WANTED, _LEAST_PIXELS = 256, 512
_MOST_PIXELS = 2**31


def _input_axis(x: int, kernel: int, stride: int, padding: int, dilation: int, remainder: int) -> tuple[int, ...]:
    """Of the pixels of x whose index plus the padding leaves ``remainder`` to the stride, what implicit() is told of an
    axis: positions, first, stride, step, taps, tap_first, tap_step, out_first, out_step. See src/cuda/conv/gather.cuh."""
    divisor = math.gcd(stride, dilation)
    period = stride // divisor
    tap = next((t for t in range(min(period, kernel)) if t * dilation % stride == remainder), None)
    out = (remainder - padding) % stride
    positions = (x - 1 - out) // stride + 1 if out < x else 0
    if tap is None:
        return positions, 0, 1, 0, 0, 0, 0, out, stride
    first = (out + padding - tap * dilation) // stride
    return positions, first, 1, -(dilation // divisor), (kernel - 1 - tap) // period + 1, tap, period, out, stride


def tile_of(rows: int, columns: int, batches: int, parts: int) -> tuple[int, int, int, int]:
    large = _LARGE_PARTS if parts or columns <= 64 else _LARGE
    enough = ceil_div(rows, large[0]) * ceil_div(columns, large[1]) * batches >= _ENOUGH_TILES
    return large if enough else _SMALL


def convolve(
    product: str,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes y ("forward"), x ("input") or w ("weight") from the other two; the residual has the strides of what is written."""
    written = {"forward": y, "input": x, "weight": w}[product]
    if written.numel() == 0:
        return
    if max(t.shape[0] * math.prod(t.shape[2:]) for t in (x, y)) >= _MOST_PIXELS:
        raise ValueError(f"conv: x, y: expected fewer than 2^31 pixels, got {tuple(x.shape)}, {tuple(y.shape)}")
    stride, padding, dilation = three(stride, 1), three(padding, 0), three(dilation, 1)
    kernel = five(w.shape)[2:]
    if product == "weight":
        _weight(x, w, y, kernel, stride, padding, dilation, groups)
        return
    of_x = product == "input"
    image = y if of_x else x
    w_strides = five(w.stride())
    rows, columns = w.shape[0] // groups, w.shape[1]
    filters = (rows * w_strides[0], (w_strides[1], w_strides[0]) if of_x else (w_strides[0], w_strides[1]))
    channels, columns = (rows, columns) if of_x else (columns, rows)
    axes = list(zip(five(x.shape)[2:], five(y.shape)[2:], kernel, stride, padding, dilation, strict=True))
    if of_x:
        phases = itertools.product(
            *([_input_axis(n, k, s, p, d, remainder) for remainder in range(s)] for n, _, k, s, p, d in axes)
        )
    else:
        phases = [[(out, -p, s, d, k, 0, 1, 0, 1) for _, out, k, s, p, d in axes]]
    parts = 3 - precision(x.dtype) if x.dtype is torch.float32 else 0
    for phase in phases:
        numbers = list(zip(*phase, strict=True))
        pixels = image.shape[0] * math.prod(numbers[0])
        if pixels == 0:
            continue
        block_m, block_n, warps, stages = tile_of(pixels, columns, groups, parts)
        launch(
            implicit,
            ceil_div(pixels, block_m) * ceil_div(columns, block_n) * groups,
            written,
            image,
            w,
            written,
            residual,
            None if bias is None else bias.contiguous(),
            image.shape[0],
            channels,
            columns,
            five(image.shape)[2:],
            five(image.stride()),
            (*filters[1], *w_strides[2:]),
            filters[0],
            five(written.stride()),
            *numbers,
            ACTIVATION=activation or "none",
            PARTS=parts,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=_BLOCK_K,
            num_warps=warps,
            num_stages=stages,
        )


def _weight(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    pixels = y.shape[0] * math.prod(y.shape[2:])
    rows, columns, taps = w.shape[0] // groups, w.shape[1], math.prod(kernel)
    parts = 3 - precision(x.dtype) if x.dtype is torch.float32 else 0
    block_m, block_n, warps, stages = _SMALL
    tiles = ceil_div(rows, block_m) * ceil_div(columns, block_n) * taps * groups
    splits = max(1, min(_WANTED // tiles, pixels // _LEAST_PIXELS))
    piece = max(1, ceil_div(pixels, splits))
    splits = max(1, ceil_div(pixels, piece))
    partial = x.new_empty((splits, w.shape[0], taps, columns), dtype=torch.float32)
    launch(
        weight_gradient,
        tiles * splits,
        w,
        x,
        y,
        partial,
        rows,
        columns,
        groups,
        pixels,
        piece,
        five(x.shape)[2:],
        five(x.stride()),
        five(y.shape)[2:],
        five(y.stride()),
        kernel,
        stride,
        padding,
        dilation,
        PARTS=parts,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=_BLOCK_K,
        num_warps=warps,
        num_stages=stages,
    )
    total = column_sum(partial.view(splits, -1)) if splits > 1 else partial
    w.copy_(total.view(w.shape[0], *w.shape[2:], columns).movedim(-1, 1))


_convolutions = Convolutions(convolve, column_sum)
forward = _convolutions.forward
input = _convolutions.input
weight = _convolutions.weight
channel_sum = _convolutions.channel_sum
inverted_residual = _convolutions.inverted_residual
