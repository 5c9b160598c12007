"""Quantization on plain tensors, whose arguments the ops have checked; formulas as in backends/reference/quantize.py.

To the bits of the CPU's kernels and of CUDA's (src/cuda/quant/codes.cuh): products and sums are rounded one by one, and random
numbers are Triton's own Philox, which counts as this package's does. Rounding to integers is the addition of 1.5 · 2²³. The
values of scales and zero points are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._quantize import Memory, loop, on_device, scales, split, zero_points
from .._tensors import merge
from ..reference.quantize import FLOAT8, PACKED, RANGE
from ._launch import ceil_div, launch
from .elementwise import offset

_MEMORY = Memory()
_BLOCK = 1024
#: A tile of ranges: scales, and elements of each; and how many elements a program goes through.
_SCALES, _ELEMENTS, _PIECE = 32, 64, 16384


@triton.jit
def whole(y, word, STOCHASTIC: tl.constexpr):
    """An integer, as a float: half to even, or up with the probability of what y is above its floor."""
    if STOCHASTIC:
        low = tl.floor(y)
        fraction = (word.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
        return low + tl.where(fraction < y - low, 1.0, 0.0)
    else:
        return (y + 12582912.0) - 12582912.0


@triton.jit
def random_word(seed, element):
    """Word e % 4 of the Philox block e / 4."""
    counter = element // 4
    zero = (counter * 0).to(tl.uint32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    place = element % 4
    return tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))


@triton.jit
def encode(x, scale, zero, word, least, most, DIGITS: tl.constexpr, BIAS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The codes of float32 numbers: integers where DIGITS is 0, else a float of eight bits with so many digits."""
    y = x * tl.div_rn(1.0, scale)
    if DIGITS == 0:
        # Clamped before, so that the rounding sees no number that it has no bits for; NaN is 0.
        y = tl.where(y != y, 0.0, tl.minimum(tl.maximum(y, least - zero), most - zero))
        return (whole(y, word, STOCHASTIC) + zero).to(tl.int32)
    else:
        size = tl.where(y != y, 0.0, tl.minimum(tl.abs(y), most))
        exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - (127 - BIAS), 1)
        per_unit = ((127 + BIAS + DIGITS - exponent) << 23).to(tl.float32, bitcast=True)
        code = ((exponent - 1) << DIGITS) + whole(size * per_unit, word, STOCHASTIC).to(tl.int32)
        return tl.where(y != y, 127, code) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)


@triton.jit
def decode(code, zero, SIGN: tl.constexpr, DIGITS: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Back. SIGN: what the sign's bit of an integer counts, 0 where it has none."""
    if DIGITS == 0:
        # Behind 2^23 an integer is the lower bits, of which one subtraction takes the rest.
        return ((code ^ SIGN) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + (8388608.0 + SIGN))
    else:
        size = code & 127
        # Subnormal numbers by a product, so that nothing depends on whether the device flushes its own.
        small = size.to(tl.float32) * (2.0 ** (1 - BIAS - DIGITS))
        normal = ((size + ((127 - BIAS) << DIGITS)) << (23 - DIGITS)).to(tl.float32, bitcast=True)
        value = tl.where(size < (1 << DIGITS), small, normal)
        beyond = ((size << (23 - DIGITS)) | 0x7F800000).to(tl.float32, bitcast=True)
        value = tl.where(size > LARGEST, beyond, value)
        sign = (code & 128) << 24
        return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def encode_at(
    element,
    inside,
    x,
    scale,
    zero_point,
    seed,
    shape,
    x_strides,
    scale_strides,
    least,
    most,
    DIMS: tl.constexpr,
    DIGITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    value = tl.load(x + offset(element, shape, x_strides, DIMS), mask=inside, other=0.0).to(tl.float32)
    at = offset(element, shape, scale_strides, DIMS)
    step = tl.load(scale + at, mask=inside, other=1.0)
    zero = step * 0.0
    if zero_point is not None:
        zero = tl.load(zero_point + at, mask=inside, other=0).to(tl.float32)
    word = element
    if seed is not None:
        word = random_word(tl.load(seed), element)
    return encode(value, step, zero, word, least, most, DIGITS, BIAS, seed is not None)


@triton.jit
def quantize_each(
    x,
    q,  # bytes
    scale,
    zero_point,
    seed,
    count,  # of bytes
    shape,
    x_strides,
    q_strides,  # in elements
    scale_strides,
    least,
    most,
    PACKED: tl.constexpr,
    DIGITS: tl.constexpr,
    BIAS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    element = i * 2 if PACKED else i
    code = encode_at(
        element, inside, x, scale, zero_point, seed, shape, x_strides, scale_strides, least, most, DIMS, DIGITS, BIAS
    )
    at = offset(element, shape, q_strides, DIMS)
    if PACKED:
        above = encode_at(
            element + 1,
            inside,
            x,
            scale,
            zero_point,
            seed,
            shape,
            x_strides,
            scale_strides,
            least,
            most,
            DIMS,
            DIGITS,
            BIAS,
        )
        code = (code & 15) | ((above & 15) << 4)
        at = at // 2
    tl.store(q + at, (code & 255).to(tl.uint8), mask=inside)


@triton.jit
def dequantize_each(
    q,
    x,
    scale,
    zero_point,
    count,
    shape,
    q_strides,
    x_strides,
    scale_strides,
    PACKED: tl.constexpr,
    SIGN: tl.constexpr,
    DIGITS: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = offset(i, shape, q_strides, DIMS)
    if PACKED:
        code = tl.load(q + place // 2, mask=inside, other=0).to(tl.int32)
        code = (code >> (4 * (place % 2)).to(tl.int32)) & 15
    else:
        code = tl.load(q + place, mask=inside, other=0).to(tl.int32)
    at = offset(i, shape, scale_strides, DIMS)
    zero = 0.0
    if zero_point is not None:
        zero = tl.load(zero_point + at, mask=inside, other=0).to(tl.float32)
    value = decode(code, zero, SIGN, DIGITS, BIAS, LARGEST) * tl.load(scale + at, mask=inside, other=1.0)
    tl.store(x + offset(i, shape, x_strides, DIMS), value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def ranges(
    x,
    low,  # (pieces, scales)
    high,
    scales,
    elements,  # of a scale
    piece,
    pieces,
    own_shape,
    own_strides,
    shared_shape,
    shared_strides,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    SCALES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """The least and the largest finite number, or 0, of a piece of each scale's elements."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // pieces) * SCALES + tl.arange(0, SCALES)
    first = (program % pieces) * piece
    rows = x + offset(row, own_shape, own_strides, OWN)
    least = tl.zeros((SCALES,), tl.float32)
    most = tl.zeros((SCALES,), tl.float32)
    for begin in range(0, piece, ELEMENTS):
        i = first + begin + tl.arange(0, ELEMENTS)
        at = offset(i, shared_shape, shared_strides, SHARED)
        inside = (row < scales)[:, None] & (i < elements)[None, :]
        value = tl.load(rows[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
        least = tl.minimum(least, tl.min(value, 1))
        most = tl.maximum(most, tl.max(value, 1))
    at = (program % pieces) * scales + row
    tl.store(low + at, least, mask=row < scales)
    tl.store(high + at, most, mask=row < scales)


@triton.jit
def grid_of(bottom, top, least, most, SYMMETRIC: tl.constexpr):
    """The scale and the zero point, a whole float, of numbers from bottom, at most 0, to top, at least 0."""
    if SYMMETRIC:
        step = tl.div_rn(tl.maximum(top, -bottom), most)
    else:
        step = tl.div_rn(top, most - least) - tl.div_rn(bottom, most - least)
    step = tl.where(step == 0.0, 1.0, tl.maximum(step, 1.1754943508222875e-38))
    # Of no more than 255 steps.
    zero = least - ((tl.div_rn(bottom, step) + 12582912.0) - 12582912.0)
    return step, tl.minimum(tl.maximum(zero, least), most)


@triton.jit
def choose(low, high, scale, zero_point, scales, pieces, least, most, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < scales
    bottom = tl.zeros((BLOCK,), tl.float32)
    top = tl.zeros((BLOCK,), tl.float32)
    for p in range(pieces):
        bottom = tl.minimum(bottom, tl.load(low + p * scales + i, mask=inside, other=0.0))
        top = tl.maximum(top, tl.load(high + p * scales + i, mask=inside, other=0.0))
    step, zero = grid_of(bottom, top, least, most, zero_point is None)
    tl.store(scale + i, step, mask=inside)
    if zero_point is not None:
        tl.store(zero_point + i, zero.to(tl.int32), mask=inside)


def _scheme(dtype: str) -> tuple[float, float, int, int]:
    """The least and the largest number, and of a float its digits and its bias."""
    if dtype in RANGE:
        least, most = RANGE[dtype]
        return float(least), float(most), 0, 0
    largest, digits, least_exponent = FLOAT8[dtype]
    return -largest, largest, digits, 1 - least_exponent


def decoding(dtype: str) -> dict[str, int]:
    """What decode() is told of a scheme."""
    _, _, digits, bias = _scheme(dtype)
    return {
        "SIGN": {"int8": 128, "int4": 8}.get(dtype, 0),
        "DIGITS": digits,
        "BIAS": bias,
        "LARGEST": 0x7E if digits == 3 else 0x7B,
    }


def _bytes(q: Tensor) -> Tensor:
    return q if q.dtype is torch.uint8 else q.view(torch.uint8)


def _launch(kernel: Any, count: int, on: Tensor, *args: Any, block: int = _BLOCK, **constants: Any) -> None:
    # A product and a sum are rounded one by one.
    launch(kernel, ceil_div(count, block), on, *args, BLOCK=block, enable_fp_fusion=False, **constants)


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    dtype: str,
) -> Tensor:
    q, q_strides = _MEMORY.codes(input, dtype)
    if q.numel() == 0:
        return q
    shape, scale_strides = loop(input.shape, axis, group_size)
    shape, strides = merge(shape, split(input.stride(), group_size), split(q_strides, group_size), scale_strides)
    least, most, digits, bias = _scheme(dtype)
    _launch(
        quantize_each,
        q.numel(),
        input,
        input,
        _bytes(q),
        scales(scale),
        zero_points(zero_point),
        on_device(seed, input),
        q.numel(),
        shape,
        *strides,
        least,
        most,
        PACKED=dtype in PACKED,
        DIGITS=digits,
        BIAS=bias,
        DIMS=len(shape),
    )
    return q


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    from_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    x, input, q_strides = _MEMORY.numbers(input, from_dtype, dtype)
    if x.numel() == 0:
        return x
    shape, scale_strides = loop(x.shape, axis, group_size)
    shape, strides = merge(shape, split(q_strides, group_size), split(x.stride(), group_size), scale_strides)
    _launch(
        dequantize_each,
        x.numel(),
        input,
        _bytes(input),
        x,
        scales(scale),
        zero_points(zero_point),
        x.numel(),
        shape,
        *strides,
        PACKED=from_dtype in PACKED,
        **decoding(from_dtype),
        DIMS=len(shape),
    )
    return x


def choose_scale(
    input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale, and the zero point: of no elements where the scheme is symmetric."""
    scale, zero_point = _MEMORY.parameters(input, axis, group_size, symmetric)
    count = scale.numel()
    if count == 0:
        return scale, zero_point
    shape, scale_strides = loop(input.shape, axis, group_size)
    steps = split(input.stride(), group_size)
    # Scales are contiguous: their dimensions in order number them.
    own = [d for d, stride in enumerate(scale_strides) if stride]
    shared = [d for d, stride in enumerate(scale_strides) if not stride]
    own_shape, (own_strides,) = merge([shape[d] for d in own], [steps[d] for d in own])
    shared_shape, (shared_strides,) = merge([shape[d] for d in shared], [steps[d] for d in shared])
    elements = input.numel() // count
    pieces = max(ceil_div(elements, _PIECE), 1)
    low, high = (input.new_empty((pieces, count), dtype=torch.float32) for _ in range(2))
    launch(
        ranges,
        ceil_div(count, _SCALES) * pieces,
        input,
        input,
        low,
        high,
        count,
        elements,
        min(_PIECE, elements),
        pieces,
        own_shape,
        own_strides,
        shared_shape,
        shared_strides,
        OWN=len(own_shape),
        SHARED=len(shared_shape),
        SCALES=_SCALES,
        ELEMENTS=_ELEMENTS,
    )
    least, most, _, _ = _scheme(dtype)
    _launch(
        choose, count, input, low, high, scale, None if symmetric else zero_point, count, pieces, least, most, block=128
    )
    return scale, zero_point


def quantize_dynamic(
    input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = choose_scale(input, axis, group_size, dtype, symmetric)
    q = quantize(input, scale, None if symmetric else zero_point, seed, axis, group_size, dtype)
    return q, scale, zero_point
