"""Quantization on plain CPU tensors, whose arguments the ops have checked. Arguments are those of the formulas in
backends/reference/quantize.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _cpu
from .._quantize import SCHEME, address, halves, loop, scale_shape, scales, split, zero_points
from .._tensors import contiguous
from ..reference.quantize import PACKED, STORAGE
from . import DTYPE, LARGE_BYTES, empty, empty_strided


def _empty_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.empty_like(x, dtype=dtype), large ones from the caching allocator."""
    if x.numel() * dtype.itemsize <= LARGE_BYTES:
        return torch.empty_like(x, dtype=dtype)
    strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
    return empty_strided(x.shape, strides, dtype)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return empty(shape, dtype) if dtype in DTYPE else empty_strided(shape, contiguous(shape), dtype)


def _result(input: Tensor, dtype: str) -> tuple[Tensor, Sequence[int]]:
    """Memory for the quantized input, and its strides in elements."""
    if dtype not in PACKED:
        q = _empty_as(input, STORAGE[dtype])
        return q, q.stride()
    q = _empty((*input.shape[:-1], input.shape[-1] // 2), torch.uint8)
    return q, halves(q.stride())


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    dtype: str,
) -> Tensor:
    q, q_strides = _result(input, dtype)
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = scales(scale), zero_points(zero_point)
    _cpu.quantize(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        address(zero_point),
        shape,
        split(input.stride(), group_size),
        split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        seed is not None,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
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
    if from_dtype in PACKED:
        if input.stride(-1) != 1:
            input = input.contiguous()
        x = _empty((*input.shape[:-1], 2 * input.shape[-1]), dtype)
        q_strides = halves(input.stride())
    else:
        x = _empty_as(input, dtype)
        q_strides = input.stride()
    shape, scale_strides = loop(x.shape, axis, group_size)
    scale, zero_point = scales(scale), zero_points(zero_point)
    _cpu.dequantize(
        input.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        address(zero_point),
        shape,
        split(q_strides, group_size),
        split(x.stride(), group_size),
        scale_strides,
        scale.numel(),
        SCHEME[from_dtype],
        DTYPE[dtype],
    )
    return x


def choose_scale(
    input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale, and the zero point: of no elements where the scheme is symmetric."""
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    _cpu.choose_scale(
        input.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        split(input.stride(), group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        symmetric,
    )
    return scale, zero_point


def quantize_dynamic(
    input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, q_strides = _result(input, dtype)
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    _cpu.quantize_dynamic(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        split(input.stride(), group_size),
        split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        symmetric,
        seed is not None,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )
    return q, scale, zero_point


def _parameters(input: Tensor, axis: Sequence[int], group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    shape = scale_shape(input.shape, axis, group_size)
    return _empty(shape, torch.float32), torch.empty((0,) if symmetric else shape, dtype=torch.int32)
