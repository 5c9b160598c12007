"""Batch normalization on plain tensors without zero sizes, whose shapes the ops have checked; and the kernels of group norm.

Tensors (N, C, ...) of any strides are seen as images of channels of elements; batch norm has one image. A program has a tile of
elements and channels, ELEMENTS x CHANNELS, longer the way that the memory goes. As in src/cuda/norm there are three passes: the
mean of each tile's channels and the squared deviations from it, their combination in float64 and in order, and the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._running_statistics import update_running as update_running
from .._tensors import merge
from ..cpu.norm import result_format
from ._launch import ceil_div, launch
from .elementwise import offset
from .layer_norm import unit_scale
from .reduce import sum_rows

_TILE, _MOST_CHANNELS = 4096, 64


@triton.jit
def tile(channels, elements, chunks, NARROW: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image and chunk; its channels (1, CHANNELS) and elements (ELEMENTS, 1), and which there are."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(channels, CHANNELS)
    chunk = program // tiles % chunks
    c = (program % tiles * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    e = (chunk * ELEMENTS + tl.arange(0, ELEMENTS))[:, None]
    inside = (e < elements) & (c < channels)
    if NARROW:  # a GPU divides 32 bits much faster
        e = e.to(tl.int32)
    return program // tiles // chunks, chunk, c, e, inside


@triton.jit
def read(x, image, c, e, inside, shape, strides, DIMS: tl.constexpr):
    """``strides``: of an image, a channel, and the elements' dimensions."""
    at = image * strides[0] + c * strides[1] + offset(e, shape, strides[2:], DIMS)
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(x, values, image, c, e, inside, shape, strides, DIMS: tl.constexpr):
    at = image * strides[0] + c * strides[1] + offset(e, shape, strides[2:], DIMS)
    tl.store(x + at, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def statistics(
    x,
    means,  # (images, chunks, channels) in float64
    squares,
    channels,
    elements,
    chunks,
    shape,
    x_strides,
    sqrt_eps,
    NARROW: tl.constexpr,
    DIMS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, chunk, c, e, inside = tile(channels, elements, chunks, NARROW, ELEMENTS, CHANNELS)
    values = read(x, image, c, e, inside, shape, x_strides, DIMS)
    count = tl.minimum(elements - chunk * ELEMENTS, ELEMENTS).to(tl.float32)
    # In units of a power of two near the largest, so that squares stay in range.
    scale = unit_scale(tl.maximum(tl.max(tl.abs(values), 0), sqrt_eps))[None, :]
    shift = tl.sum(values * (scale / ELEMENTS), 0)[None, :] * (ELEMENTS / count)
    values = tl.where(inside, values * scale - shift, 0.0)
    off = tl.sum(values, 0)[None, :] / count  # what rounding left of the mean
    square = tl.sum(values * values, 0)[None, :] - off * off * count
    square = tl.where(square < 0, 0.0, square)  # of rounding; NaN stays
    unit = 1 / scale.to(tl.float64)
    at = (image * chunks + chunk) * channels + c
    tl.store(means + at, (shift.to(tl.float64) + off.to(tl.float64)) * unit, mask=c < channels)
    tl.store(squares + at, square.to(tl.float64) * unit * unit, mask=c < channels)


@triton.jit
def per_channel(given, c, stride, inside, missing: tl.constexpr):
    if given is not None:
        return tl.load(given + c * stride, mask=inside, other=0.0).to(tl.float64)
    else:
        return tl.full(c.shape, missing, tl.float64)


@triton.jit
def combine(
    means,
    squares,
    given_mean,  # None: the statistics are what is combined
    given_var,
    weight,
    bias,
    mean,  # (images, groups) in float64, written
    var,
    coefficients,  # 3 x (images, channels): (x - [0]) * [1] + [2]
    images,
    groups,
    share,  # channels of a group
    elements,
    chunks,
    mean_stride,
    var_stride,
    weight_stride,
    bias_stride,
    eps,
    ELEMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """A program has a group of an image."""
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    channels = groups * share
    if given_mean is not None:
        center = tl.load(given_mean + group * mean_stride).to(tl.float64)
        spread = tl.load(given_var + group * var_stride).to(tl.float64)
    else:
        every = (elements * share).to(tl.float64)
        total = tl.zeros((CHUNKS, SHARE), tl.float64)
        for first in range(0, chunks, CHUNKS):
            k = (first + tl.arange(0, CHUNKS).to(tl.int64))[:, None]
            count = tl.minimum(elements - k * ELEMENTS, ELEMENTS).to(tl.float64)
            for from_channel in range(0, share, SHARE):
                q = (from_channel + tl.arange(0, SHARE))[None, :]
                at = (image * chunks + k) * channels + group * share + q
                total += tl.load(means + at, mask=(k < chunks) & (q < share), other=0.0) * count
        center = tl.sum(tl.sum(total, 1), 0) / every
        total = tl.zeros((CHUNKS, SHARE), tl.float64)
        for first in range(0, chunks, CHUNKS):
            k = (first + tl.arange(0, CHUNKS).to(tl.int64))[:, None]
            count = tl.minimum(elements - k * ELEMENTS, ELEMENTS).to(tl.float64)
            for from_channel in range(0, share, SHARE):
                q = (from_channel + tl.arange(0, SHARE))[None, :]
                at = (image * chunks + k) * channels + group * share + q
                there = (k < chunks) & (q < share)
                away = tl.load(means + at, mask=there, other=0.0) - center
                total += tl.where(there, tl.load(squares + at, mask=there, other=0.0) + away * away * count, 0.0)
        spread = tl.sum(tl.sum(total, 1), 0) / every
    tl.store(mean + program, center)
    tl.store(var + program, spread)
    inverse = 1 / tl.sqrt(spread + eps)
    near = center.to(tl.float32)
    # What rounding the mean leaves of it goes into another term.
    rest = tl.where(center - center == 0, center - near.to(tl.float64), 0.0)
    for from_channel in range(0, share, SHARE):
        q = from_channel + tl.arange(0, SHARE).to(tl.int64)
        there = q < share
        c = group * share + q
        scale = per_channel(weight, c, weight_stride, there, 1.0) * inverse
        shift = per_channel(bias, c, bias_stride, there, 0.0)
        shift = tl.where(scale - scale == 0, shift - rest * scale, shift)
        to = coefficients + image * channels + c
        tl.store(to, tl.full((SHARE,), 0.0, tl.float32) + near, mask=there)
        tl.store(to + images * channels, scale.to(tl.float32), mask=there)
        tl.store(to + 2 * images * channels, shift.to(tl.float32), mask=there)


@triton.jit
def results(
    x,
    residual,
    out,
    coefficients,
    images,
    channels,
    elements,
    chunks,
    shape,
    x_strides,
    residual_strides,
    out_strides,
    RELU: tl.constexpr,
    NARROW: tl.constexpr,
    DIMS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, _, c, e, inside = tile(channels, elements, chunks, NARROW, ELEMENTS, CHANNELS)
    values = read(x, image, c, e, inside, shape, x_strides, DIMS)
    at = coefficients + image * channels + c
    center = tl.load(at, mask=c < channels, other=0.0)
    scale = tl.load(at + images * channels, mask=c < channels, other=0.0)
    values = (values - center) * scale + tl.load(at + 2 * images * channels, mask=c < channels, other=0.0)
    if residual is not None:
        values += read(residual, image, c, e, inside, shape, residual_strides, DIMS)
    if RELU:
        values = tl.where(values <= 0, 0.0, values)
    write(out, values, image, c, e, inside, shape, out_strides, DIMS)


@triton.jit
def gradient_sums(
    grad,
    x,
    out,  # None: no relu
    mean,
    sums,  # (images, chunks, channels) in float64: of the gradient, and of it times x - mean
    products,
    channels,
    share,
    elements,
    chunks,
    shape,
    grad_strides,
    x_strides,
    out_strides,
    NARROW: tl.constexpr,
    DIMS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, chunk, c, e, inside = tile(channels, elements, chunks, NARROW, ELEMENTS, CHANNELS)
    g = read(grad, image, c, e, inside, shape, grad_strides, DIMS)
    if out is not None:
        g = tl.where(read(out, image, c, e, inside, shape, out_strides, DIMS) <= 0, 0.0, g)
    there = c < channels
    center = tl.load(mean + image * (channels // share) + c // share, mask=there, other=0.0).to(tl.float32)
    values = read(x, image, c, e, inside, shape, x_strides, DIMS) - center
    at = (image * chunks + chunk) * channels + c
    tl.store(sums + at, tl.sum(tl.where(inside, g, 0.0), 0)[None, :].to(tl.float64), mask=there)
    tl.store(products + at, tl.sum(tl.where(inside, g * values, 0.0), 0)[None, :].to(tl.float64), mask=there)


@triton.jit
def combine_gradients(
    sums,
    products,
    weight,
    mean,
    var,
    by_weight,  # (images, channels) in float64
    by_bias,
    coefficients,  # 4 x (images, channels): grad * [1] + (x - [0]) * [2] + [3]
    images,
    groups,
    share,
    elements,
    chunks,
    weight_stride,
    eps,
    CHUNKS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """A program has a group of an image."""
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    channels = groups * share
    center = tl.load(mean + program)
    near = center.to(tl.float32)
    rest = tl.where(center - center == 0, center - near.to(tl.float64), 0.0)
    inverse = 1 / tl.sqrt(tl.load(var + program) + eps)
    total = tl.zeros((SHARE,), tl.float64)  # of the group, times the weight
    along = tl.zeros((SHARE,), tl.float64)
    for from_channel in range(0, share, SHARE):
        q = from_channel + tl.arange(0, SHARE).to(tl.int64)
        there = q < share
        c = group * share + q
        part = tl.zeros((CHUNKS, SHARE), tl.float64)
        product = tl.zeros((CHUNKS, SHARE), tl.float64)
        for first in range(0, chunks, CHUNKS):
            k = (first + tl.arange(0, CHUNKS).to(tl.int64))[:, None]
            at = (image * chunks + k) * channels + c[None, :]
            both = (k < chunks) & there[None, :]
            part += tl.load(sums + at, mask=both, other=0.0)
            product += tl.load(products + at, mask=both, other=0.0)
        of_bias = tl.sum(part, 0)
        of_weight = (tl.sum(product, 0) - rest * of_bias) * inverse
        tl.store(by_bias + image * channels + c, of_bias, mask=there)
        tl.store(by_weight + image * channels + c, of_weight, mask=there)
        scale = per_channel(weight, c, weight_stride, there, 1.0)
        total += tl.where(there, scale * of_bias, 0.0)
        along += tl.where(there, scale * of_weight, 0.0)
    every = (elements * share).to(tl.float64)
    by_x = -inverse * inverse * (tl.sum(along, 0) / every)
    shift = -inverse * (tl.sum(total, 0) / every) - by_x * rest
    for from_channel in range(0, share, SHARE):
        q = from_channel + tl.arange(0, SHARE).to(tl.int64)
        there = q < share
        c = group * share + q
        scale = per_channel(weight, c, weight_stride, there, 1.0) * inverse
        to = coefficients + image * channels + c
        zeros = tl.full((SHARE,), 0.0, tl.float32)
        tl.store(to, zeros + near, mask=there)
        tl.store(to + images * channels, scale.to(tl.float32), mask=there)
        tl.store(to + 2 * images * channels, zeros + by_x.to(tl.float32), mask=there)
        tl.store(to + 3 * images * channels, zeros + shift.to(tl.float32), mask=there)


@triton.jit
def gradients(
    grad,
    x,
    out,
    to,
    to_residual,
    coefficients,
    images,
    channels,
    elements,
    chunks,
    shape,
    grad_strides,
    x_strides,
    out_strides,
    to_strides,
    to_residual_strides,
    TRAINING: tl.constexpr,
    NARROW: tl.constexpr,
    DIMS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, _, c, e, inside = tile(channels, elements, chunks, NARROW, ELEMENTS, CHANNELS)
    g = read(grad, image, c, e, inside, shape, grad_strides, DIMS)
    if out is not None:
        g = tl.where(read(out, image, c, e, inside, shape, out_strides, DIMS) <= 0, 0.0, g)
    if to_residual is not None:
        write(to_residual, g, image, c, e, inside, shape, to_residual_strides, DIMS)
    at = coefficients + image * channels + c
    there = c < channels
    result = g * tl.load(at + images * channels, mask=there, other=0.0)
    if TRAINING:
        values = read(x, image, c, e, inside, shape, x_strides, DIMS) - tl.load(at, mask=there, other=0.0)
        values *= tl.load(at + 2 * images * channels, mask=there, other=0.0)
        result += values + tl.load(at + 3 * images * channels, mask=there, other=0.0)
    write(to, result, image, c, e, inside, shape, to_strides, DIMS)


class Tiles:
    """Tensors of one shape, some of them None, cut into tiles. The last one that is there is dense: it says how."""

    def __init__(self, of_images: bool, *tensors: Tensor | None) -> None:
        there = [x for x in tensors if x is not None]
        last = there[-1]
        self.images = last.shape[0] if of_images else 1
        self.channels = last.shape[1]
        self.elements = last.numel() // (self.images * self.channels)
        axes = [*(() if of_images else (0,)), *range(2, last.dim())]
        self.shape, strides = merge([last.shape[a] for a in axes], *([x.stride(a) for a in axes] for x in there))
        found = iter(strides)
        #: Of each tensor, as read() takes them.
        self.strides = [
            None if x is None else (x.stride(0) if of_images else 0, x.stride(1), *next(found)) for x in tensors
        ]
        most = triton.next_power_of_2(self.channels)
        if last.stride(1) == 1 and self.channels > 1:
            channels = min(most, _MOST_CHANNELS)
            elements = min(triton.next_power_of_2(self.elements), _TILE // channels)
        else:
            elements = min(triton.next_power_of_2(self.elements), _TILE)
            channels = min(most, max(_TILE // elements, 1))
        self.chunks = ceil_div(self.elements, elements)
        self.programs = self.images * self.chunks * ceil_div(self.channels, channels)
        extent = (sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) for x in there)
        narrow = max(extent) < 2**31 and self.chunks * elements < 2**31
        self.options = dict(NARROW=narrow, DIMS=len(self.shape), ELEMENTS=elements, CHANNELS=channels)

    def by_group(self, groups: int) -> dict[str, int]:
        """How many chunks and channels of a group are combined at a time."""
        share = min(triton.next_power_of_2(self.channels // groups), 64)
        return dict(CHUNKS=min(triton.next_power_of_2(self.chunks), 256 // share), SHARE=share)


def stride_of(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def forward(
    of_images: bool,
    groups: int,
    input: Tensor,
    residual: Tensor | None,
    given: Sequence[Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the statistics in float64, those of all images one behind the other."""
    out = torch.empty_like(input, memory_format=result_format(input))
    tiles = Tiles(of_images, input, residual, out)
    images, channels, chunks = tiles.images, tiles.channels, tiles.chunks
    mean, var = (input.new_empty(images * groups, dtype=torch.float64) for _ in range(2))
    parts: list[Any] = [None, None]
    sizes = channels, tiles.elements, chunks, tiles.shape
    if given[0] is None:
        parts = [input.new_empty(images * chunks * channels, dtype=torch.float64) for _ in range(2)]
        root = math.sqrt(max(eps, 0.0))
        launch(statistics, tiles.programs, out, input, *parts, *sizes, tiles.strides[0], root, **tiles.options)
    coefficients = input.new_empty(3 * images * channels, dtype=torch.float32)
    launch(
        combine,
        images * groups,
        out,
        *(*parts, *given, weight, bias, mean, var, coefficients),
        *(images, groups, channels // groups, tiles.elements, chunks),
        *(stride_of(x) for x in (*given, weight, bias)),
        eps,
        ELEMENTS=tiles.options["ELEMENTS"],
        **tiles.by_group(groups),
    )
    tensors = input, residual, out, coefficients
    launch(results, tiles.programs, out, *tensors, images, *sizes, *tiles.strides, RELU=relu, **tiles.options)
    return out, mean, var


def backward(
    of_images: bool,
    groups: int,
    grad: Tensor,
    input: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of input, weight and bias (in float64), and residual, None where there was none."""
    by_residual = torch.empty_like(input, memory_format=result_format(input)) if residual else None
    by_input = torch.empty_like(input, memory_format=result_format(input))
    tiles = Tiles(of_images, grad, input, out, by_residual, by_input)
    images, channels, chunks = tiles.images, tiles.channels, tiles.chunks
    mean, var = mean.contiguous(), var.contiguous()
    grad_lies, input_lies, out_lies, residual_lies, result_lies = tiles.strides
    sums, products = (input.new_empty(images * chunks * channels, dtype=torch.float64) for _ in range(2))
    launch(
        gradient_sums,
        tiles.programs,
        input,
        *(grad, input, out, mean, sums, products, channels, channels // groups, tiles.elements, chunks, tiles.shape),
        *(grad_lies, input_lies, out_lies),
        **tiles.options,
    )
    by_weight, by_bias = (input.new_empty((images, channels), dtype=torch.float64) for _ in range(2))
    coefficients = input.new_empty(4 * images * channels, dtype=torch.float32)
    launch(
        combine_gradients,
        images * groups,
        input,
        *(sums, products, weight, mean, var, by_weight, by_bias, coefficients),
        *(images, groups, channels // groups, tiles.elements, chunks, stride_of(weight), eps),
        **tiles.by_group(groups),
    )
    launch(
        gradients,
        tiles.programs,
        input,
        *(grad, input, out, by_input, by_residual, coefficients),
        *(images, channels, tiles.elements, chunks, tiles.shape),
        *(grad_lies, input_lies, out_lies, result_lies, residual_lies),
        TRAINING=training,
        **tiles.options,
    )
    over_images = []
    for part in (by_weight, by_bias):
        total = part if images == 1 else part.new_empty((1, channels))
        if images > 1:
            sum_rows(part, total, 1)
        over_images.append(total.view(channels))
    return by_input, *over_images, by_residual


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the biased variance that it was computed with, in float64."""
    return forward(False, input.shape[1], input, residual, (mean, var), weight, bias, eps, relu)


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    out: Tensor | None,
    training: bool,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias (in float64), and residual (empty where there was none)."""
    *found, by_residual = backward(False, input.shape[1], grad, input, out, weight, mean, var, training, eps, residual)
    return *found, input.new_empty(0) if by_residual is None else by_residual
