"""Pooling, forward and backward, of tensors of any strides: see backends._pool.

A program computes neighbours in the memory of what it writes. Gradients gather, as in src/cuda/pool/: each element of the input
asks the windows that contain it, in their order, so that no sum needs atomics. Large windows of averages are summed
in tiles of some results and some of their elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._pool import AVG, AVG_BACKWARD, GATHER, INDICES, MAX, SCATTER, Pools, Windows
from .._tensors import contiguous, new_image
from ._launch import ceil_div, launch

_BLOCK = 512
#: Elements of a window from which on its average is summed in tiles: of so many results, and elements.
_LARGE, _RESULTS, _ELEMENTS = 256, 16, 64


@triton.jit
def place_of(i, size, CHANNELS_LAST: tl.constexpr):
    """Image, channel and position of the i-th element of (images, *size), size having channels and three dimensions."""
    if CHANNELS_LAST:
        channel = i % size[0]
        i = i // size[0]
    x = i % size[3]
    i = i // size[3]
    y = i % size[2]
    i = i // size[2]
    z = i % size[1]
    i = i // size[1]
    if not CHANNELS_LAST:
        channel = i % size[0]
        i = i // size[0]
    return i, channel, z, y, x


@triton.jit
def at_place(image, channel, z, y, x, strides):
    return image * strides[0] + channel * strides[1] + z * strides[2] + y * strides[3] + x * strides[4]


@triton.jit
def window_of(o, axis, ADAPTIVE: tl.constexpr):
    """Where tap 0 of window o lies, and how many taps it has. An axis: sizes of input and output, kernel, stride,
    padding, dilation."""
    if ADAPTIVE:
        wide = o.to(tl.int64)
        begin = wide * axis[0] // axis[1]
        count = ((wide + 1) * axis[0] + (axis[1] - 1)) // axis[1] - begin
        return begin.to(o.dtype), count.to(o.dtype)
    else:
        return o * axis[3] - axis[4], o * 0 + axis[2]


@triton.jit
def first_tap(begin, axis):
    """The first inside of the input."""
    return tl.where(begin < 0, (axis[5] - 1 - begin) // axis[5], 0)


@triton.jit
def share_of(begin, count, axis, INCLUDE_PADDING: tl.constexpr):
    """What an axis adds to the number that an average's sum is divided by."""
    if INCLUDE_PADDING:
        share = tl.minimum(begin + count, axis[0] + axis[4]) - begin
    else:
        share = tl.minimum(begin + count, axis[0]) - tl.maximum(begin, 0)
    return share.to(tl.float32)


@triton.jit
def reduce_windows(
    x,
    out,
    codes,
    count,  # of results
    size,
    x_strides,
    out_strides,
    code_strides,
    z_axis,
    y_axis,
    x_axis,
    divisor,  # 0: by how many elements there are
    MAXIMUM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INCLUDE_PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Maxima with their codes, one element after another, or averages, some at a time."""
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    o = program * BLOCK + tl.arange(0, BLOCK)
    there = o < count
    image, channel, oz, oy, ox = place_of(o, size, CHANNELS_LAST)
    z, of_z = window_of(oz, z_axis, ADAPTIVE)
    y, of_y = window_of(oy, y_axis, ADAPTIVE)
    xx, of_x = window_of(ox, x_axis, ADAPTIVE)
    row, column = z_axis[2], y_axis[2]
    line = x + image * x_strides[0] + channel * x_strides[1]
    taps = row * column * x_axis[2]
    if MAXIMUM:
        found = tl.full((BLOCK,), float("-inf"), tl.float32)
        code = (first_tap(z, z_axis) * column + first_tap(y, y_axis)) * x_axis[2] + first_tap(xx, x_axis)
        code = code.to(tl.int32)
        for tap in range(taps):
            i, j, k = tap // (column * x_axis[2]), tap // x_axis[2] % column, tap % x_axis[2]
            at_z, at_y, at_x = z + i * z_axis[5], y + j * y_axis[5], xx + k * x_axis[5]
            inside = there & (i < of_z) & (j < of_y) & (k < of_x) & (at_z >= 0) & (at_y >= 0) & (at_x >= 0)
            inside = inside & (at_z < z_axis[0]) & (at_y < y_axis[0]) & (at_x < x_axis[0])
            at = at_z * x_strides[2] + at_y * x_strides[3] + at_x * x_strides[4]
            value = tl.load(line + at, mask=inside, other=float("-inf")).to(tl.float32)
            better = inside & ((value > found) | (value != value))  # the first, or the last NaN
            found = tl.where(better, value, found)
            code = tl.where(better, tap, code)
        if codes is not None:
            at = at_place(image, channel, oz, oy, ox, code_strides)
            tl.store(codes + at, code.to(codes.dtype.element_ty), mask=there)
    else:
        sums = tl.zeros((BLOCK, ELEMENTS), tl.float32)
        for first in range(0, taps, ELEMENTS):
            tap = (first + tl.arange(0, ELEMENTS))[None, :]
            i, j, k = tap // (column * x_axis[2]), tap // x_axis[2] % column, tap % x_axis[2]
            at_z, at_y, at_x = z[:, None] + i, y[:, None] + j, xx[:, None] + k
            inside = there[:, None] & (i < of_z[:, None]) & (j < of_y[:, None]) & (k < of_x[:, None])
            inside = inside & (at_z >= 0) & (at_y >= 0) & (at_x >= 0)
            inside = inside & (at_z < z_axis[0]) & (at_y < y_axis[0]) & (at_x < x_axis[0])
            at = at_z * x_strides[2] + at_y * x_strides[3] + at_x * x_strides[4]
            sums += tl.load(line[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        shares = share_of(z, of_z, z_axis, INCLUDE_PADDING) * share_of(y, of_y, y_axis, INCLUDE_PADDING)
        shares *= share_of(xx, of_x, x_axis, INCLUDE_PADDING)
        found = tl.div_rn(tl.sum(sums, 1), tl.where(divisor == 0, shares, divisor))
    tl.store(out + at_place(image, channel, oz, oy, ox, out_strides), found.to(out.dtype.element_ty), mask=there)


@triton.jit
def first_user(i, axis, ADAPTIVE: tl.constexpr):
    """The first window that contains element i."""
    if ADAPTIVE:
        return (i.to(tl.int64) * axis[1] // axis[0]).to(i.dtype)
    else:
        before = i + axis[4] - (axis[2] - 1) * axis[5]
        return tl.where(before > 0, (before + axis[3] - 1) // axis[3], 0)


@triton.jit
def tap_at(o, i, axis, ADAPTIVE: tl.constexpr):
    """Of window o: the tap that meets element i, whether there is one, and what an average knows of the window."""
    begin, count = window_of(o, axis, ADAPTIVE)
    distance = i - begin
    tap = distance // axis[5]
    meets = (o < axis[1]) & (distance >= 0) & (tap * axis[5] == distance) & (tap < count)
    return tap, meets, begin, count


@triton.jit
def gather_gradient(
    grad,
    codes,
    to,
    count,  # of the input's elements
    size,
    to_strides,
    grad_strides,
    code_strides,
    z_axis,
    y_axis,
    x_axis,
    users,  # how many windows contain an element at most, along each axis
    divisor,
    MAXIMUM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INCLUDE_PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    image, channel, z, y, x = place_of(i, size, CHANNELS_LAST)
    first_z = first_user(z, z_axis, ADAPTIVE)
    first_y = first_user(y, y_axis, ADAPTIVE)
    first_x = first_user(x, x_axis, ADAPTIVE)
    sums = tl.zeros((BLOCK,), tl.float32)
    for user in range(users[0] * users[1] * users[2]):
        oz = first_z + user // (users[1] * users[2])
        oy = first_y + user // users[2] % users[1]
        ox = first_x + user % users[2]
        tap_z, meets_z, begin_z, count_z = tap_at(oz, z, z_axis, ADAPTIVE)
        tap_y, meets_y, begin_y, count_y = tap_at(oy, y, y_axis, ADAPTIVE)
        tap_x, meets_x, begin_x, count_x = tap_at(ox, x, x_axis, ADAPTIVE)
        meets = there & meets_z & meets_y & meets_x
        if MAXIMUM:
            at = at_place(image, channel, oz, oy, ox, code_strides)
            code = tl.load(codes + at, mask=meets, other=0).to(tl.int32)
            meets = meets & (code == (tap_z * y_axis[2] + tap_y) * x_axis[2] + tap_x)
        at = at_place(image, channel, oz, oy, ox, grad_strides)
        value = tl.load(grad + at, mask=meets, other=0.0).to(tl.float32)
        if not MAXIMUM:
            shares = share_of(begin_z, count_z, z_axis, INCLUDE_PADDING)
            shares *= share_of(begin_y, count_y, y_axis, INCLUDE_PADDING)
            shares *= share_of(begin_x, count_x, x_axis, INCLUDE_PADDING)
            shares = tl.where(meets, tl.where(divisor == 0, shares, divisor), 1.0)
            value = tl.div_rn(value, shares)
        sums += value
    tl.store(to + at_place(image, channel, z, y, x, to_strides), sums.to(to.dtype.element_ty), mask=there)


@triton.jit
def pointed_at(rest, o, axis, ADAPTIVE: tl.constexpr):
    """Along an axis where tap rest % kernel of window o lies; a tap that no window has is at the nearest element."""
    begin, _ = window_of(o, axis, ADAPTIVE)
    place = begin + rest % axis[2] * axis[5]
    return tl.minimum(tl.maximum(place, 0), axis[0] - 1)


@triton.jit
def follow_codes(
    x,
    codes,
    out,
    count,  # of results
    size,
    x_strides,
    out_strides,
    code_strides,
    z_axis,
    y_axis,
    x_axis,
    ADAPTIVE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What codes point at: the place in its plane or, where x is given, the element there."""
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    o = program * BLOCK + tl.arange(0, BLOCK)
    there = o < count
    image, channel, oz, oy, ox = place_of(o, size, CHANNELS_LAST)
    at = at_place(image, channel, oz, oy, ox, code_strides)
    code = tl.maximum(tl.load(codes + at, mask=there, other=0).to(tl.int32), 0)
    at_x = pointed_at(code, ox, x_axis, ADAPTIVE)
    at_y = pointed_at(code // x_axis[2], oy, y_axis, ADAPTIVE)
    at_z = pointed_at(code // x_axis[2] // y_axis[2], oz, z_axis, ADAPTIVE)
    if x is None:
        value = (at_z.to(tl.int64) * y_axis[0] + at_y) * x_axis[0] + at_x
    else:
        value = tl.load(x + at_place(image, channel, at_z, at_y, at_x, x_strides), mask=there, other=0.0)
    tl.store(out + at_place(image, channel, oz, oy, ox, out_strides), value, mask=there)


def _five(numbers: Sequence[int], dims: int, missing: int) -> tuple[int, ...]:
    """Of (images, channels, *three dimensions), from those with or without images and of ``dims`` dimensions."""
    lead, spatial = numbers[: len(numbers) - dims], numbers[len(numbers) - dims :]
    return (*(missing,) * (2 - len(lead)), *lead, *(missing,) * (3 - dims), *spatial)


def _users(axis: Sequence[int], adaptive: bool) -> int:
    """How many windows an element of the input is in, at most."""
    size, out, kernel, stride, _, dilation = axis
    return (out - 1) // size + 2 if adaptive else min((kernel - 1) * dilation // stride + 1, out)


def _is_wide(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether addresses need 64 bits; a block beyond the last element is still counted."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return max(last, math.prod(shape) + _BLOCK) >= 1 << 31


def _run(
    job: int,
    dims: int,
    x: Tensor | None,
    x_shape: Sequence[int],
    out: Tensor,
    codes: Tensor | None,
    windows: Windows,
    dtype: torch.dtype,
    include_padding: bool = True,
    divisor: int = 0,
) -> None:
    adaptive = not windows.kernel
    shape, out_shape = _five(x_shape, dims, 1), _five(out.shape, dims, 1)
    x_strides = contiguous(shape) if x is None else _five(x.stride(), dims, 0)
    out_strides = _five(out.stride(), dims, 0)
    code_strides = out_strides if codes is None else _five(codes.stride(), dims, 0)
    axes = []
    for d in range(3):
        size, results = shape[2 + d], out_shape[2 + d]
        if d < 3 - dims:
            axes.append((1, 1, 1, 1, 0, 1))
        elif adaptive:
            # Taps of the largest window, which begins as far behind o * size / results as fractions of it can be.
            most = (size + 2 * results - math.gcd(size, results) - 1) // results
            axes.append((size, results, most, 1, 0, 1))
        else:
            axes.append((size, results, *(numbers[d - 3 + dims] for numbers in windows)))
    backward = job in (SCATTER, AVG_BACKWARD)
    written, size = (x, shape) if backward else (out, out_shape)
    count = written.numel()
    strides = x_strides if backward else out_strides
    constants = {
        "ADAPTIVE": adaptive,
        "CHANNELS_LAST": strides[1] == 1 and math.prod(size[2:]) > 1,
        "WIDE": _is_wide(shape, x_strides) or _is_wide(out_shape, out_strides) or _is_wide(out_shape, code_strides),
    }
    numbers = count, size[1:], x_strides, out_strides, code_strides, *axes
    padding = include_padding and not adaptive
    programs = ceil_div(count, _BLOCK)
    if backward:
        launch(
            gather_gradient,
            programs,
            out,
            out,
            codes,
            x,
            *numbers,
            tuple(_users(axis, adaptive) for axis in axes),
            float(divisor),
            MAXIMUM=job == SCATTER,
            INCLUDE_PADDING=padding,
            BLOCK=_BLOCK,
            **constants,
        )
    elif job in (GATHER, INDICES):
        launch(follow_codes, programs, out, x, codes, out, *numbers, BLOCK=_BLOCK, **constants)
    else:
        large = job == AVG and math.prod(axis[2] for axis in axes) >= _LARGE
        block = _RESULTS if large else _BLOCK
        launch(
            reduce_windows,
            ceil_div(count, block),
            out,
            x,
            out,
            codes,
            *numbers,
            float(divisor),
            MAXIMUM=job == MAX,
            INCLUDE_PADDING=padding,
            BLOCK=block,
            ELEMENTS=_ELEMENTS if large else 1,
            **constants,
        )


_pools = Pools(_run, lambda like, shape, dtype, channels_last: new_image(like, shape, channels_last, dtype))
max_pool = _pools.max_pool
max_pool_backward = _pools.max_pool_backward
max_pool_gather = _pools.max_pool_gather
max_pool_indices = _pools.max_pool_indices
avg_pool = _pools.avg_pool
avg_pool_backward = _pools.avg_pool_backward
