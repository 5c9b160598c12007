"""Fake quantization and its gradients, on plain tensors of any strides, whose arguments the ops have checked: the
result to the bits of the CPU's kernels and of CUDA's. The values of scales and zero points are not looked at.

A program has 1024 neighbours, whose bits are 128 bytes of the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._quantize import fake_zero_points, on_device, scales
from .._tensors import contiguous, merge
from ..reference.fake_quantize import mask_bytes
from ._launch import ceil_div, launch
from .elementwise import offset
from .quantize import random_word

_BYTES = 128  # of the mask
#: Elements of a scale that one program sums, at most.
_PIECE = 8192


@triton.jit
def nearest(y):
    """Half to even, of numbers of any size; zeros are +0."""
    low = tl.floor(y)
    above = y - low
    is_odd = low * 0.5 != tl.floor(low * 0.5)
    return low + tl.where((above > 0.5) | ((above == 0.5) & is_odd), 1.0, 0.0)


@triton.jit
def range_of(step, zero_point, there, lowest, highest):
    """The range with the zero point taken away."""
    low = step * 0.0 + lowest
    high = step * 0.0 + highest
    if zero_point is not None:
        zero = tl.load(zero_point, mask=there, other=0)
        if zero.dtype == tl.float32:
            zero = tl.minimum(tl.maximum(nearest(zero), lowest), highest)
        low -= zero.to(tl.float32)
        high -= zero.to(tl.float32)
    return low, high


@triton.jit
def round_to(x, step, low, high, seed, element, AS_TORCH: tl.constexpr):
    """x / scale, that rounded, and that within the range."""
    y = x * tl.div_rn(1.0, step)
    if seed is not None:
        word = random_word(tl.load(seed), element).to(tl.uint32, bitcast=True)
        fraction = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.floor(y) + tl.where(fraction < y - tl.floor(y), 1.0, 0.0)
    else:
        rounded = nearest(y)
    number = tl.where(rounded != rounded, low if AS_TORCH else 0.0, rounded)
    return y, rounded, tl.minimum(tl.maximum(number, low), high)


@triton.jit
def elements_of(BYTES: tl.constexpr):
    """The numbers of a program's elements: those of a byte in a row."""
    first = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    return first, first[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def round_each(
    x,
    out,
    mask,
    mask_size,
    scale,
    zero_point,
    seed,
    count,
    shape,
    x_strides,
    out_strides,
    scale_strides,
    zero_strides,
    lowest,
    highest,
    AS_TORCH: tl.constexpr,
    DIMS: tl.constexpr,
    BYTES: tl.constexpr,
):
    byte, i = elements_of(BYTES)
    there = i < count
    step = tl.load(scale + offset(i, shape, scale_strides, DIMS), mask=there, other=1.0)
    at = None
    if zero_point is not None:
        at = zero_point + offset(i, shape, zero_strides, DIMS)
    low, high = range_of(step, at, there, lowest, highest)
    value = tl.load(x + offset(i, shape, x_strides, DIMS), mask=there, other=0.0).to(tl.float32)
    _, rounded, to = round_to(value, step, low, high, seed, i, AS_TORCH)
    # Adding 0 makes +0 of -0, as the way over integers does.
    result = (to + 0.0) * step
    tl.store(out + offset(i, shape, out_strides, DIMS), result.to(out.dtype.element_ty), mask=there)
    if mask is not None:
        # What may be read beyond the last element's bit is 0.
        bits = (there & (rounded == to)).to(tl.int32) << tl.arange(0, 8)[None, :]
        tl.store(mask + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < mask_size)


@triton.jit
def mask_each(grad, out, mask, count, shape, grad_strides, out_strides, DIMS: tl.constexpr, BYTES: tl.constexpr):
    byte, i = elements_of(BYTES)
    there = i < count
    value = tl.load(grad + offset(i, shape, grad_strides, DIMS), mask=there, other=0.0).to(tl.float32)
    bits = tl.load(mask + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    inside = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    value = tl.where(inside, value, value * 0.0)  # which keeps NaN
    tl.store(out + offset(i, shape, out_strides, DIMS), value.to(out.dtype.element_ty), mask=there)


@triton.jit
def sum_gradients(
    grad,
    x,
    to,
    mask,
    scale,
    zero_point,
    seed,
    by_scale,  # (pieces, scales)
    by_zero_point,
    scales,
    elements,  # of a scale
    piece,
    pieces,
    own_shape,
    own_grad,
    own_x,
    own_to,
    own_index,
    shared_shape,
    shared_grad,
    shared_x,
    shared_to,
    shared_index,
    lowest,
    highest,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    SCALES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """The gradient of x and, of a piece of each scale's elements, those of scale and zero point (this over -scale)."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // pieces) * SCALES + tl.arange(0, SCALES)
    first = (program % pieces) * piece
    known = row < scales
    step = tl.load(scale + row, mask=known, other=1.0)
    at = None
    if zero_point is not None:
        at = zero_point + row
    low, high = range_of(step, at, known, lowest, highest)
    sums = tl.zeros((SCALES, ELEMENTS), tl.float32)
    zeros = tl.zeros((SCALES, ELEMENTS), tl.float32)
    for begin in range(0, piece, ELEMENTS):
        i = first + begin + tl.arange(0, ELEMENTS)
        there = known[:, None] & (i < elements)[None, :]
        at_grad = offset(row, own_shape, own_grad, OWN)[:, None] + offset(i, shared_shape, shared_grad, SHARED)[None, :]
        at_x = offset(row, own_shape, own_x, OWN)[:, None] + offset(i, shared_shape, shared_x, SHARED)[None, :]
        at_to = offset(row, own_shape, own_to, OWN)[:, None] + offset(i, shared_shape, shared_to, SHARED)[None, :]
        index = offset(row, own_shape, own_index, OWN)[:, None] + offset(i, shared_shape, shared_index, SHARED)[None, :]
        g = tl.load(grad + at_grad, mask=there, other=0.0).to(tl.float32)
        value = tl.load(x + at_x, mask=there, other=0.0).to(tl.float32)
        bits = tl.load(mask + index // 8, mask=there, other=0).to(tl.int32)
        inside = ((bits >> (index % 8).to(tl.int32)) & 1) != 0
        y, _, rounded = round_to(value, step[:, None], low[:, None], high[:, None], seed, index, False)
        sums += g * tl.where(inside, rounded - y, rounded)
        zeros += tl.where(inside | (y != y), 0.0, g)
        tl.store(to + at_to, tl.where(inside, g, g * 0.0).to(to.dtype.element_ty), mask=there)
    at = (program % pieces) * scales + row
    tl.store(by_scale + at, tl.sum(sums, 1), mask=known)
    tl.store(by_zero_point + at, tl.sum(zeros, 1), mask=known)


@triton.jit
def add_pieces(scale, of_scale, of_zero_point, factor, by_scale, by_zero_point, scales, pieces, BLOCK: tl.constexpr):
    """In order, in float64."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < scales
    sums = tl.zeros((BLOCK,), tl.float64)
    zeros = tl.zeros((BLOCK,), tl.float64)
    for p in range(pieces):
        sums += tl.load(of_scale + p * scales + i, mask=there, other=0.0).to(tl.float64)
        zeros += tl.load(of_zero_point + p * scales + i, mask=there, other=0.0).to(tl.float64)
    times = tl.load(factor)
    tl.store(by_scale + i, (sums * times).to(tl.float32), mask=there)
    step = tl.load(scale + i, mask=there, other=1.0).to(tl.float64)
    tl.store(by_zero_point + i, (zeros * (0.0 - step) * times).to(tl.float32), mask=there)


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    factor: float,
    as_torch: bool,
    wide: bool,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the mask (of no elements where none is asked for)."""
    out = torch.empty_like(input)
    mask = input.new_empty(mask_bytes(input.numel()) if masked else 0, dtype=torch.uint8)
    scale, zero = scales(scale), fake_zero_points(zero_point)
    steps = (t.expand(input.shape).stride() for t in (scale, scale if zero is None else zero))
    shape, strides = merge(input.shape, input.stride(), out.stride(), *steps)
    programs = ceil_div(max(mask.numel(), ceil_div(input.numel(), 8)), _BYTES)
    if programs == 0:
        return out, mask
    launch(
        round_each,
        programs,
        input,
        input,
        out,
        mask if masked else None,
        mask.numel(),
        scale,
        zero,
        on_device(seed, input),
        input.numel(),
        shape,
        *strides,
        float(quant_min),
        float(quant_max),
        AS_TORCH=as_torch,
        DIMS=len(shape),
        BYTES=_BYTES,
        enable_fp_fusion=False,
    )
    return out, mask


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit is set, else 0 grad."""
    out, mask = torch.empty_like(grad), mask.contiguous()
    shape, strides = merge(grad.shape, grad.stride(), out.stride())
    programs = ceil_div(grad.numel(), 8 * _BYTES)
    if programs:
        launch(mask_each, programs, grad, grad, out, mask, grad.numel(), shape, *strides, DIMS=len(shape), BYTES=_BYTES)
    return out


def gradients(
    grad: Tensor,
    input: Tensor,
    mask: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, scale and zero point; these two in float32 and of scale's shape."""
    out = torch.empty_like(grad)
    by_scale, by_zero_point = (scale.new_empty(scale.shape, dtype=torch.float32) for _ in range(2))
    count = scale.numel()
    if count == 0 or grad.numel() == 0:
        return out, by_scale.zero_(), by_zero_point.zero_()
    mask = mask.contiguous()
    steps = [t.stride() for t in (grad, input, out)] + [contiguous(grad.shape)]
    lead = grad.dim() - scale.dim()
    own = [d for d in range(lead, grad.dim()) if scale.shape[d - lead] != 1]
    shared = [d for d in range(grad.dim()) if d not in own]
    own_shape, own_strides = merge([grad.shape[d] for d in own], *([step[d] for d in own] for step in steps))
    shared_shape, shared_strides = merge([grad.shape[d] for d in shared], *([s[d] for d in shared] for s in steps))
    elements = grad.numel() // count
    pieces = ceil_div(elements, _PIECE)
    parts = [grad.new_empty((pieces, count), dtype=torch.float32) for _ in range(2)]
    scale, zero = scales(scale), fake_zero_points(zero_point)
    together, at_once = (32, 16) if count >= 32 else (1, 512)
    launch(
        sum_gradients,
        ceil_div(count, together) * pieces,
        grad,
        grad,
        input,
        out,
        mask,
        scale,
        zero,
        on_device(seed, grad),
        *parts,
        count,
        elements,
        min(_PIECE, elements),
        pieces,
        own_shape,
        *own_strides,
        shared_shape,
        *shared_strides,
        float(quant_min),
        float(quant_max),
        OWN=len(own_shape),
        SHARED=len(shared_shape),
        SCALES=together,
        ELEMENTS=at_once,
        enable_fp_fusion=False,
    )
    times = torch.full((1,), factor, dtype=torch.float64, device=grad.device)
    launch(
        add_pieces, ceil_div(count, 128), grad, scale, *parts, times, by_scale, by_zero_point, count, pieces, BLOCK=128
    )
    return out, by_scale, by_zero_point
