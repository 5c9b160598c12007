"""Layer norm and rms norm on plain tensors without zero sizes, whose shapes the ops have checked.

A program has a row, or some short ones, which it reads from memory once, and again from the caches: as
src/cuda/norm/layer_norm.cu it finds the mean, then deviations from it and what rounding left of the mean, in units of a
power of two near the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layer_norm import laid_out, rows
from .._tensors import merge
from ._launch import ceil_div, launch
from .elementwise import offset
from .reduce import sum_rows

_MOST, _MOST_CHUNKS, _TILE = 4096, 512, 1024


@triton.jit
def unit_scale(magnitude):
    """The power of two that brings numbers of this magnitude near 1."""
    exponent = magnitude.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def statistics(
    x,  # where each row begins
    exists,
    size,
    step,
    share,
    unshare,
    eps,
    sqrt_eps,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What normalizes rows: x^ = (x * scale - shift - off) * factor, each (ROWS, 1). ``share`` is a power of two by which the
    sum stays finite, ``unshare`` 1 / (size * share)."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, size, BLOCK):
        i, inside = elements(first, size, exists, BLOCK)
        values = tl.load(x + i * step, mask=inside, other=0.0).to(tl.float32)
        total += values * share
        largest = tl.maximum(largest, tl.abs(values))
    scale = unit_scale(tl.maximum(tl.max(largest, 1), sqrt_eps))[:, None]
    shift = tl.sum(total, 1)[:, None] * unshare * scale if CENTERED else scale * 0
    deviations = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, size, BLOCK):
        i, inside = elements(first, size, exists, BLOCK)
        values = tl.load(x + i * step, mask=inside, other=0.0).to(tl.float32) * scale - shift
        values = tl.where(inside, values, 0.0)
        deviations += values
        squares += values * values
    var = tl.sum(squares, 1)[:, None] / size
    off = scale * 0
    if CENTERED:
        off = tl.sum(deviations, 1)[:, None] / size
        var = var - off * off
    var = tl.where(var < 0, 0.0, var)  # of rounding; NaN stays
    factor = 1 / tl.sqrt(var + eps * scale * scale)
    return scale, shift, off, factor


@triton.jit
def elements(first, size, exists, BLOCK: tl.constexpr):
    """The next elements of all rows, (1, BLOCK), and which there are, (ROWS, BLOCK)."""
    i = first + tl.arange(0, BLOCK).to(tl.int64)[None, :]
    return i, exists & (i < size)


@triton.jit
def parameter(given, i, size, missing: tl.constexpr):
    if given is not None:
        return tl.load(given + i, mask=i < size, other=0.0).to(tl.float32)
    else:
        return missing


@triton.jit
def rows_forward(
    x,
    y,
    weight,
    bias,
    count,
    size,
    x_step,
    y_step,
    shape,  # of the rows
    x_strides,
    y_strides,
    share,
    unshare,
    eps,
    sqrt_eps,
    CENTERED: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,  # of a program, at a time
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < count
    x += offset(row, shape, x_strides, DIMS)
    y += offset(row, shape, y_strides, DIMS)
    scale, shift, off, factor = statistics(
        x, exists, size, x_step, share, unshare, eps, sqrt_eps, CENTERED, ROWS, BLOCK
    )
    for first in range(0, size, BLOCK):
        i, inside = elements(first, size, exists, BLOCK)
        values = tl.load(x + i * x_step, mask=inside, other=0.0).to(tl.float32)
        values = (values * scale - shift - off) * factor
        values = values * parameter(weight, i, size, 1.0) + parameter(bias, i, size, 0.0)
        tl.store(y + i * y_step, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rows_backward(
    grad,
    x,
    to,
    weight,
    by_weight,  # of each program, float32; None: not wanted
    by_bias,
    count,
    size,
    grad_step,
    x_step,
    to_step,
    shape,
    grad_strides,
    x_strides,
    to_strides,
    share,
    unshare,
    eps,
    sqrt_eps,
    CENTERED: tl.constexpr,
    HELD: tl.constexpr,  # a row is one block
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,  # of a program, at a time
    BLOCK: tl.constexpr,
):
    """With g = weight * grad: (g - mean(g) - x^ mean(g x^)) / deviation, and this program's rows' share of Σ grad x^, Σ
    grad."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for first_row in range(program * ROWS, count, programs * ROWS):
        row = (first_row + tl.arange(0, ROWS).to(tl.int64))[:, None]
        exists = row < count
        grad_row = grad + offset(row, shape, grad_strides, DIMS)
        x_row = x + offset(row, shape, x_strides, DIMS)
        to_row = to + offset(row, shape, to_strides, DIMS)
        scale, shift, off, factor = statistics(
            x_row, exists, size, x_step, share, unshare, eps, sqrt_eps, CENTERED, ROWS, BLOCK
        )
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        product = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, size, BLOCK):
            i, inside = elements(first, size, exists, BLOCK)
            values = tl.load(x_row + i * x_step, mask=inside, other=0.0).to(tl.float32)
            values = tl.where(inside, (values * scale - shift - off) * factor, 0.0)
            g = tl.load(grad_row + i * grad_step, mask=inside, other=0.0).to(tl.float32)
            if by_weight is not None:
                if HELD:
                    weight_sum += tl.sum(g * values, 0)
                    bias_sum += tl.sum(g, 0)
                else:
                    # ROWS is 1. What lies there is this program's own, from its second row on.
                    at = program * size + i
                    before = inside & (row >= programs)
                    tl.store(by_weight + at, tl.load(by_weight + at, mask=before, other=0.0) + g * values, mask=inside)
                    tl.store(by_bias + at, tl.load(by_bias + at, mask=before, other=0.0) + g, mask=inside)
            g *= parameter(weight, i, size, 1.0)
            total += g
            product += g * values
        mean = tl.sum(total, 1)[:, None] / size if CENTERED else scale * 0
        along_x = tl.sum(product, 1)[:, None] / size
        for first in range(0, size, BLOCK):
            i, inside = elements(first, size, exists, BLOCK)
            values = tl.load(x_row + i * x_step, mask=inside, other=0.0).to(tl.float32)
            values = (values * scale - shift - off) * factor
            g = tl.load(grad_row + i * grad_step, mask=inside, other=0.0).to(tl.float32)
            g *= parameter(weight, i, size, 1.0)
            result = (g - mean - values * along_x) * (scale * factor)
            tl.store(to_row + i * to_step, result.to(to.dtype.element_ty), mask=inside)
    if HELD and by_weight is not None:
        along = tl.arange(0, BLOCK)
        tl.store(by_weight + program * size + along, weight_sum, mask=along < size)
        tl.store(by_bias + program * size + along, bias_sum, mask=along < size)


def row_norm(
    input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> Tensor:
    """Over the last ``dims`` dimensions. The result has torch's strides."""
    out = input.new_empty(input.shape)
    x, y = rows(dims, input, out)
    given = (None if p is None else p.contiguous() for p in (weight, bias))
    _, at_once = _tile(x.shape[-1])
    _run(rows_forward, ceil_div(x.numel() // x.shape[-1], at_once), (x, y), given, eps, centered)
    return laid_out(out, input, centered)


def row_norm_backward(
    grad: Tensor, input: Tensor, dims: int, weight: Tensor | None, eps: float, centered: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64 (empty where there is none)."""
    by_input = input.new_empty(input.shape)
    shape = input.shape[input.dim() - dims :]
    by_weight = input.new_empty(shape if weight is not None else (0,), dtype=torch.float64)
    by_bias = input.new_empty(shape if bias else (0,), dtype=torch.float64)
    tensors = rows(dims, grad, input, by_input)
    size = math.prod(shape)
    count = input.numel() // size
    chunks = min(ceil_div(count, _tile(size)[1]), _MOST_CHUNKS)
    parts = [None, None]
    if weight is not None or bias:
        parts = [input.new_empty((chunks, size), dtype=torch.float32) for _ in range(2)]
    given = (None if weight is None else weight.contiguous(), *parts)
    _run(rows_backward, chunks, tensors, given, eps, centered, HELD=size <= _MOST)
    for wanted, part in zip((by_weight, by_bias), parts, strict=True):
        if wanted.numel():
            sum_rows(part, wanted.view(1, size), 1)
    return laid_out(by_input, input, centered), by_weight, by_bias


def _tile(size: int) -> tuple[int, int]:
    """How much of a row is loaded at a time, and of how many rows."""
    block = min(triton.next_power_of_2(size), _MOST)
    return block, max(_TILE // block, 1)


def _run(
    kernel: triton.JITFunction,
    programs: int,
    tensors: Sequence[Tensor],
    given: Iterable[Tensor | None],
    eps: float,
    centered: bool,
    **options: bool,
) -> None:
    out = tensors[-1]
    size = out.shape[-1]
    shape, strides = merge(*(rest[:-1] for rest in (out.shape, *(t.stride() for t in tensors))))
    block, at_once = _tile(size)
    power = math.ceil(math.log2(size))
    numbers = 2.0**-power, 2.0**power / size, eps, math.sqrt(max(eps, 0.0))
    options |= dict(CENTERED=centered, DIMS=len(shape), ROWS=at_once, BLOCK=block, num_warps=4 if block < 2048 else 8)
    steps = (tensor.stride(-1) for tensor in tensors)
    launch(
        kernel, programs, out, *tensors, *given, out.numel() // size, size, *steps, shape, *strides, *numbers, **options
    )
